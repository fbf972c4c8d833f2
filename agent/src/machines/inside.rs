//! What guest agents tell of what goes on inside, and what is wanted there: asked once a second over the connection that is open anyway.
//!
//! ```text
//! lathe-guest ◄── Inside {settled} ── follow, once a second ─► Word (foresight::inside) ─► demand, wanted, lathe forecast --apps
//!             ─── applications, what waits, wants ──►│
//!                                                    └─ what is made of wants: said with the next question
//! ```
//! lathed keeps nothing of it over its own end: a guest says anew what it wants, what was made of it, and its goals.

use std::io;
use std::time::{Duration, Instant};

use lathe_guest::protocol::inside::{Application, ApplicationKind, Goal, Inside, Settled};
use lathe_guest::protocol::{Request, Response};
use lathe_shard::Shape;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;

use super::core::{Core, Entry, Shared, unix_sec};
use super::{guest, sample};
use crate::api::wire::MachineState;
use crate::api::wire::inside::{ApplicationView, GoalView, InsideView, WantedView};
use crate::foresight::goal::{Goals, Pursuit, SERVED};
use crate::foresight::inside::{Bound, Bounds, Word};
use crate::foresight::{Mode, Resource};

/// Oldest version of the guest's protocol that can be asked.
const SINCE_VERSION: u32 = 4;
/// Between two questions.
const INTERVAL: Duration = Duration::from_secs(1);

/// Asks until the connection ends; a guest agent that cannot be asked is only listened to, for its end.
pub(super) async fn follow(core: &Core, entry: &Entry, stream: &mut UnixStream, version: u32) {
    if version >= SINCE_VERSION && core.config.foresight.mode != Mode::Off {
        match ask_on(core, entry, stream).await {
            // It may end the connection by that, or go on: nothing more is asked of it.
            Ok(()) => {}
            Err(cause) => {
                tracing::debug!(machine = entry.name, %cause, "what goes on inside is not told any more");
                entry.profile(|profile| profile.word.lose());
                return;
            }
        }
    }
    // Nothing is said here.
    let _ = stream.read_u8().await;
}

/// Asks once a second while the machine runs, until it says that it cannot tell.
async fn ask_on(core: &Core, entry: &Entry, stream: &mut UnixStream) -> io::Result<()> {
    let mut settled: Vec<Settled> = Vec::new();
    loop {
        let begun = Instant::now();
        // What is paused could not answer, and of what is not profiled nobody wants to know.
        let runs = entry.with(|shared| shared.record.life.state() == MachineState::Running);
        if runs && entry.foresight().mode != Mode::Off {
            let request = Request::Inside { settled: std::mem::take(&mut settled) };
            settled = match guest::ask_patiently(stream, &request).await? {
                Response::Inside(inside) => take(core, entry, *inside),
                Response::Error { .. } => return Ok(()),
                _ => return Err(io::Error::new(io::ErrorKind::InvalidData, "an answer to something else")),
            };
        }
        tokio::time::sleep(INTERVAL.saturating_sub(begun.elapsed()).max(INTERVAL / 2)).await;
    }
}

fn take(core: &Core, entry: &Entry, inside: Inside) -> Vec<Settled> {
    let most = core.most();
    let bounds = entry.with(|shared| bounds(&most, shared));
    let at_usec = sample::usec(core, Instant::now());
    let note = match entry.foresight().mode {
        Mode::Observe => "the host only observes: nothing is resized for it by itself",
        Mode::Off | Mode::On => "",
    };
    entry.profile(|profile| {
        let settled = profile.word.take(at_usec, inside, &bounds, note);
        profile.pursue(at_usec, &bounds);
        settled
    })
}

/// What a machine may have of what can be wanted, on a host that could give `most`.
pub(super) fn bounds(most: &Shape, shared: &Shared) -> Bounds {
    let record = &shared.record;
    let (cpu, memory) = (record.desired.cpu_milli, record.desired.memory_bytes);
    Bounds {
        cpu: Bound { granted: cpu, most: record.cpu_max_milli.unwrap_or(most.cpu.0).max(cpu) },
        memory: Bound { granted: memory, most: record.memory_max_bytes.unwrap_or(most.memory.0).max(memory) },
    }
}

/// What is wanted of a machine now.
pub(super) fn wanted(core: &Core, entry: &Entry) -> Vec<WantedView> {
    let (now_sec, at_usec) = (unix_sec(), sample::usec(core, Instant::now()));
    entry.profile(|profile| {
        let inside = profile.word.wanted(at_usec).map(|wanted| WantedView {
            resource: wanted.resource.word().to_owned(),
            amount: wanted.amount,
            source: "inside".to_owned(),
            left_sec: Some(wanted.until_usec.saturating_sub(at_usec).div_ceil(1_000_000)),
        });
        let by_hand = Resource::ALL.into_iter().filter_map(|which| {
            let rings = profile.track(which).map(|track| &track.rings);
            let amount = profile.by_hand.wanted(which, rings, now_sec)?;
            let (resource, source) = (which.word().to_owned(), "by-hand".to_owned());
            Some(WantedView { resource, amount, source, left_sec: None })
        });
        let goals = SERVED.into_iter().filter_map(|which| {
            let amount = profile.goals.wanted(which, at_usec)?;
            let (resource, source) = (which.word().to_owned(), "goal".to_owned());
            Some(WantedView { resource, amount, source, left_sec: None })
        });
        inside.chain(goals).chain(by_hand).collect()
    })
}

/// What a guest tells, as it is shown.
pub(super) fn view(word: &Word, goals: &Goals, at_usec: u64) -> Option<InsideView> {
    let (inside, age_usec) = word.told(at_usec)?;
    let machine = &inside.machine;
    Some(InsideView {
        age_msec: age_usec / 1000,
        kind: match inside.kind {
            ApplicationKind::Sessions => "sessions",
            ApplicationKind::Units | ApplicationKind::Other => "units",
        }
        .to_owned(),
        cpu_some_permille: machine.cpu_some_permille,
        memory_some_permille: machine.memory_some_permille,
        io_some_permille: machine.io_some_permille,
        swap_used_bytes: machine.swap_used_bytes,
        net_rx_bit_per_sec: machine.net_rx_bit_per_sec,
        net_tx_bit_per_sec: machine.net_tx_bit_per_sec,
        applications: inside.applications.iter().map(of_application).collect(),
        others: inside.others.as_ref().map(of_application),
        others_count: inside.others_count,
        goals: goals.iter().filter_map(of_goal).collect(),
    })
}

fn of_goal(pursuit: &Pursuit) -> Option<GoalView> {
    let told = &pursuit.told;
    let (kind, permille, under_usec) = match told.goal {
        Goal::Latency { permille, under_usec } => ("latency", Some(permille), Some(under_usec)),
        Goal::Throughput => ("throughput", None, None),
        Goal::Other => return None,
    };
    Some(GoalView {
        name: told.name.clone(),
        kind: kind.to_owned(),
        permille,
        under_usec,
        over_msec: told.over_msec,
        latency_usec: told.latency_usec,
        rate_milli: told.rate_milli,
        wrong: told.wrong.clone().unwrap_or_default(),
        stands: pursuit.stands.word().to_owned(),
        cpu_milli: pursuit.wants[0],
        memory_bytes: pursuit.wants[1],
    })
}

fn of_application(told: &Application) -> ApplicationView {
    ApplicationView {
        name: told.name.clone(),
        cpu_milli: told.cpu_milli,
        memory_bytes: told.memory_bytes,
        anon_bytes: told.anon_bytes,
        file_bytes: told.file_bytes,
        working_set_bytes: told.working_set_bytes,
        read_bytes_per_sec: told.read_bytes_per_sec,
        written_bytes_per_sec: told.written_bytes_per_sec,
        operations_per_sec: told.operations_per_sec,
        cpu_some_permille: told.cpu_some_permille,
        memory_some_permille: told.memory_some_permille,
        io_some_permille: told.io_some_permille,
    }
}
