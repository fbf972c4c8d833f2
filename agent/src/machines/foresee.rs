//! The hands of [`crate::foresight`]: reads machines into their profiles, lets forecasters learn, keeps and restores.
//!
//! ```text
//! sample, 1 s ─► take ─► profile of each machine ─► run: each minute catch up ─► store
//!                           ▲                         └─ each 10 s: what balloons tell
//! ```
//! Taking in is some microseconds for each machine and done where it is sampled. Learning and encoding takes longer the more machines there
//! are, and is done on a thread that nobody waits for. Nothing here changes a machine, and no failure here stops anything.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use lathe_shard::Shape;
use lathe_vmm::control::wire::MemoryStatus;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::core::{Core, Entry, Shared};
use super::{by_hand, inside, sculpt, sight, view as shown};
use crate::api::wire::forecast::{AheadView, CycleView, ForecastResource, ForecastView, RingView};
use crate::api::wire::{MachineState, MachineView, SCHEMA};
use crate::foresight::by_hand::{ByHand, Merged};
use crate::foresight::demand::{Cpu, Disks, Inside, Memory, Net, Reading};
use crate::foresight::forecaster::{ENOUGH, P50, P95, P99};
use crate::foresight::kept::Parts;
use crate::foresight::profile::Track;
use crate::foresight::rhythm::Cycle as Seen;
use crate::foresight::ring::{Coarse, HOUR, MINUTE, Ring};
use crate::foresight::{Mode, Profile, Resource};
use crate::problem::{Kind, Problem};
use crate::sculptor::Cycle;
use crate::store::{Change, Past};

/// Between two questions about what balloons tell.
const ASK_EVERY: Duration = Duration::from_secs(10);
/// How long a monitor may take to answer.
const MONITOR_TIMEOUT: Duration = Duration::from_millis(500);

/// Now by the wall clock, seconds since the epoch.
fn now_sec() -> u64 {
    super::core::unix_sec()
}

/// Microseconds since lathed started.
fn usec(core: &Core, at: Instant) -> u64 {
    u64::try_from(at.saturating_duration_since(core.started).as_micros()).unwrap_or(u64::MAX)
}

/// Takes in what has just been sampled of every machine.
pub(super) fn take(core: &Core) {
    if core.config.foresight.mode == Mode::Off {
        return;
    }
    let (at_sec, at_usec) = (now_sec(), usec(core, Instant::now()));
    let most = core.most();
    for entry in core.entries() {
        let is_off = entry.foresight().mode == Mode::Off;
        let reading = entry.with(|shared| reading(core, &most, shared)).filter(|_| !is_off);
        entry.profile(|profile| match reading {
            Some(reading) => profile.take(at_sec, at_usec, reading),
            None => profile.lose(),
        });
    }
}

/// What was read of a machine last; `None` while it does not run: a machine that is off or paused asks for nothing that can be seen.
fn reading(core: &Core, most: &Shape, shared: &Shared) -> Option<Reading> {
    shared.launched.as_ref().filter(|_| shared.record.life.state() == MachineState::Running)?;
    let seen = shared.sight.last();
    let bounds = inside::bounds(most, shared);
    let asked_milli = shared.sight.cpu(sight::SEC_1).map_or(0, |window| window.asked);
    let cpu = seen.cpu.map(|cpu| Cpu {
        at_usec: cpu.at_usec,
        used_usec: cpu.used_usec,
        throttled_usec: cpu.throttled_usec,
        wall_periods: cpu.wall_periods,
        vcpu_periods: cpu.vcpu_periods,
        period_usec: cpu.period_usec,
        vcpus: shown::vcpus(shared),
        asked_milli,
        most_milli: bounds.cpu.most,
    });
    let usage = &shared.usage;
    // Both come from the same look at its cgroups.
    let memory = seen.cpu.map(|_| Memory {
        charged_bytes: usage.memory_bytes,
        inactive_file_bytes: usage.memory_inactive_file_bytes,
        swapped_bytes: usage.memory_swapped_bytes,
        inside: None,
        most_bytes: bounds.memory.most,
    });
    let net = |net: sight::Net| Net {
        at_usec: net.at_usec,
        bytes: net.bytes,
        backlog_bytes: net.queue.map_or(0, |queue| queue.backlog_bytes),
    };
    let disks =
        usage.disks_told.map(|(at, _)| Disks { at_usec: usec(core, at), operations: usage.disks.operations });
    let (to_guest, from_guest) = (seen.to_guest.map(net), seen.from_guest.map(net));
    Some(Reading { cpu, memory, to_guest, from_guest, disks, pressed: None })
}

/// Puts back what was known when lathed ended.
pub(super) fn restore(core: &Core, pasts: Vec<Past>) {
    if core.config.foresight.mode == Mode::Off {
        return;
    }
    for past in pasts {
        let Ok(entry) = core.entry(&past.name) else { continue };
        let restored = Profile::restore(past.whole.as_deref(), past.recent.as_deref());
        if let Some(cause) = restored.lost {
            tracing::warn!(
                machine = past.name,
                "what it asked for before is not all known any more: {cause}"
            );
        }
        let by_hand =
            past.by_hand.map_or_else(ByHand::default, |bytes| by_hand::read_back(&past.name, &bytes));
        entry.profile(|profile| {
            *profile = restored.profile;
            profile.by_hand = by_hand;
        });
        sculpt::past::restore(&entry, past.accounts.as_deref(), past.decisions.as_deref());
    }
}

/// Asks, learns and keeps until lathed ends.
pub(super) async fn run(core: Arc<Core>) {
    if core.config.foresight.mode == Mode::Off {
        return;
    }
    let (mut minute, mut trouble) = (now_sec() / MINUTE, String::new());
    loop {
        tokio::time::sleep(until_next_minute().min(ASK_EVERY)).await;
        ask_all(&core).await;
        let now = now_sec() / MINUTE;
        if now != minute {
            minute = now;
            let kept = keep(&core).await.err().map(|problem| problem.to_string()).unwrap_or_default();
            // Said when it changes, not every minute.
            if !kept.is_empty() && kept != trouble {
                tracing::warn!("what machines ask for is not kept: {kept}");
            }
            trouble = kept;
        }
    }
}

/// The sampler has then had its turn in the new minute.
fn until_next_minute() -> Duration {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let into = Duration::new(now.as_secs() % MINUTE, now.subsec_nanos());
    Duration::from_secs(MINUTE).saturating_sub(into) + Duration::from_millis(100)
}

/// Asks every balloon that has a driver what its guest says of its memory.
async fn ask_all(core: &Arc<Core>) {
    let mut asked = JoinSet::new();
    for entry in core.entries() {
        let core = Arc::clone(core);
        asked.spawn(async move {
            let told = ask(&entry).await;
            if let Some(inside) = told {
                entry.profile(|profile| profile.told(usec(&core, Instant::now()), inside));
            }
        });
    }
    while let Some(result) = asked.join_next().await {
        if let Err(cause) = result {
            tracing::error!(%cause, "cannot ask what a guest says of its memory");
        }
    }
}

async fn ask(entry: &Entry) -> Option<Inside> {
    let monitor = entry.with(|shared| {
        let memory = shared.force.as_ref().and_then(|force| force.memory.as_ref());
        let runs = shared.record.life.state() == MachineState::Running;
        shared.monitor.clone().filter(|_| runs && memory.is_some_and(|memory| memory.balloon_driver))
    })?;
    let status = timeout(MONITOR_TIMEOUT, monitor.status()).await.ok()?.ok()?;
    inside(&status.memory?)
}

fn inside(memory: &MemoryStatus) -> Option<Inside> {
    let guest = memory.guest.filter(|guest| guest.total_bytes > 0 && guest.available_bytes > 0)?;
    let given_bytes = super::shape::held_bytes(memory);
    Some(Inside { given_bytes, available_bytes: guest.available_bytes })
}

/// Lets forecasters learn from the minutes that are over, and stores what is known.
pub(super) async fn keep(core: &Arc<Core>) -> Result<(), Problem> {
    let entries = core.entries();
    let work = move || {
        let at_sec = now_sec();
        let of = |entry: Arc<Entry>| {
            let parts = entry.profile(|profile| {
                profile.catch_up(at_sec);
                profile.save(at_sec)
            });
            parts.map(|parts| (entry, parts))
        };
        entries.into_iter().filter_map(of).collect::<Vec<_>>()
    };
    let kept = tokio::task::spawn_blocking(work).await;
    let kept = kept.map_err(|cause| Problem::internal("forecasting", cause))?;
    if kept.is_empty() {
        return Ok(());
    }
    let mut reaches = Vec::with_capacity(kept.len());
    let mut pasts = Vec::with_capacity(kept.len());
    for (entry, Parts { whole, recent, reach }) in kept {
        let mut past = Past { name: entry.name.clone(), whole, recent: Some(recent), ..Past::default() };
        let decisions = sculpt::past::save(&entry, &mut past);
        pasts.push(past);
        reaches.push((entry, reach, decisions));
    }
    core.store.apply(Change::Pasts(pasts)).await?;
    for (entry, reach, decisions) in reaches {
        entry.profile(|profile| profile.stored(reach));
        if let Some(decisions) = decisions {
            sculpt::past::stored(&entry, decisions);
        }
    }
    Ok(())
}

/// What a machine asked for and will ask for.
///
/// # Errors
/// `no-such-machine`, `foresight-off`.
pub(super) fn view(core: &Core, name: &str) -> Result<ForecastView, Problem> {
    let entry = core.entry(name)?;
    let mode = is_on(core, &entry)?;
    let machine = shown::machine(&entry);
    let (now, at_usec) = (now_sec(), usec(core, Instant::now()));
    let of = |profile: &mut Profile| {
        let of = |which: Resource| {
            let outlook = profile.outlook(which, now);
            // People may speak of what was never measured.
            let unmeasured = || outlook.as_ref().map(|_| Track::new(which));
            let track = profile.track(which).cloned().or_else(unmeasured)?;
            Some(of_track(which, &track, outlook, profile.now().of(which), &machine, now))
        };
        let resources = Resource::ALL.into_iter().filter_map(of).collect();
        (
            resources,
            inside::view(&profile.word, &profile.goals, at_usec),
            by_hand::view(&profile.by_hand, now),
        )
    };
    let (resources, inside, by_hand) = entry.profile(of);
    Ok(ForecastView {
        schema: SCHEMA,
        name: name.to_owned(),
        mode: mode.word().to_owned(),
        now_unix_sec: now,
        resources,
        wanted: inside::wanted(core, &entry),
        by_hand,
        inside,
    })
}

/// How a machine is foreseen; refused where it is not.
///
/// # Errors
/// `foresight-off`.
pub(super) fn is_on(core: &Core, entry: &Entry) -> Result<Mode, Problem> {
    match entry.foresight().mode {
        Mode::Off => Err(is_off(core, &entry.name)),
        mode => Ok(mode),
    }
}

/// It is not profiled.
fn is_off(core: &Core, name: &str) -> Problem {
    if core.config.foresight.mode != Mode::Off {
        let message = format!("{name} has no forecast: its own mode is off");
        return Problem::new(Kind::Conflict, "foresight-off", message)
            .fix(format!("lathe forecast {name} --mode observe"));
    }
    let message = format!("{name} has no forecast: this host does not profile its machines");
    Problem::new(Kind::Conflict, "foresight-off", message)
        .detail("[foresight] mode is off in the configuration of lathed")
        .fix("set it to \"observe\", then: sudo systemctl restart lathed")
}

fn of_track(
    which: Resource,
    track: &Track,
    merged: Option<Merged>,
    now: Option<u64>,
    machine: &MachineView,
    at_sec: u64,
) -> ForecastResource {
    let grain = which.grain();
    let granted = match which {
        Resource::Cpu => machine.cpu.granted,
        Resource::Memory => machine.memory.granted,
        Resource::Net => machine.net.granted,
        Resource::Iops => machine.iops.granted,
    };
    let measured = track.rings.minutes.mean.iter().filter(|(_, amount)| amount.is_some()).count();
    let learnt = track.forecaster.outlook(at_sec).is_some();
    // Of a number between 0 and 1, whole.
    let permille = |confidence: f32| (confidence.clamp(0.0, 1.0) * 1000.0) as u64;
    let said = merged.as_ref().is_some_and(|merged| merged.blueprint);
    let confidence = merged.as_ref().map(|merged| permille(merged.outlook.blueprint.confidence));
    let known = said || (learnt && measured >= ENOUGH);
    let (held, judged) = track.forecaster.held();
    let ahead = merged.iter().flat_map(|Merged { outlook, by_hand, .. }| {
        outlook.blueprint.quantiles.iter().zip(by_hand).enumerate().map(move |(step, (levels, by_hand))| {
            // Finite and not negative, as a blueprint is; beyond what an integer holds it is cut.
            let amount = |place: usize| (levels[place].ceil() as u64).saturating_mul(grain);
            let from_unix_sec = outlook.from_sec.saturating_add(step as u64 * MINUTE);
            AheadView {
                from_unix_sec,
                until_unix_sec: from_unix_sec.saturating_add(MINUTE),
                p50: amount(P50),
                p95: amount(P95),
                p99: amount(P99),
                by_hand: *by_hand,
            }
        })
    });
    ForecastResource {
        resource: which.word().to_owned(),
        granted,
        now,
        of: which.forecast_of().word().to_owned(),
        measured_min: measured as u64,
        confidence_permille: confidence.filter(|_| known),
        judged: judged.into(),
        held: held.into(),
        ahead: ahead.collect(),
        cycle: track.rhythms.cycle(at_sec).and_then(|cycle| cycle_view(cycle, which, at_sec)),
        seconds: ring(1, &track.rings.seconds, None, grain),
        minutes: coarse(MINUTE, &track.rings.minutes, grain),
        hours: coarse(HOUR, &track.rings.hours, grain),
    }
}

fn cycle_view(seen: &Seen, which: Resource, at_sec: u64) -> Option<CycleView> {
    let cycle = Cycle::of(seen, which, at_sec)?;
    Some(CycleView {
        period_sec: seen.period_sec(),
        cycles: cycle.cycles.into(),
        from_unix_sec: at_sec.saturating_sub(cycle.over_msec / 1000),
        step_sec: seen.step_sec,
        ahead: cycle.steps,
    })
}

fn coarse(step_sec: u64, coarse: &Coarse, grain: u64) -> RingView {
    ring(step_sec, &coarse.mean, Some(&coarse.max), grain)
}

fn ring(step_sec: u64, mean: &Ring, max: Option<&Ring>, grain: u64) -> RingView {
    let amounts = |ring: &Ring| {
        ring.iter().map(|(_, amount)| amount.map(|amount| u64::from(amount).saturating_mul(grain))).collect()
    };
    let first = mean.iter().next().map_or(0, |(step, _)| step);
    RingView {
        step_sec,
        from_unix_sec: first.saturating_mul(step_sec),
        mean: amounts(mean),
        max: max.map_or_else(Vec::new, amounts),
    }
}
