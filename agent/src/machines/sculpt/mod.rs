//! The hands of [`crate::sculptor`]: shows it every machine, resizes those whose mode is on, and remembers why.
//!
//! ```text
//! sample, 1 s ─► note ─► accounts of a day            ┌─ observe: kept, nothing is done
//!                  └─ pressed ─┐                      │
//!              every 5 s ──────┴─► look ─► decide ────┴─ on: a task for the machine ─► Ask::Resize ─► what became of it
//!                                                        (at most one change of it at a time)
//! ```
//! | file | what |
//! |---|---|
//! | `look` | what the sculptor is shown of a machine, and what keeps one from being touched |
//! | `act` | a decision becomes a resize, and how that ended |
//! | `kept` | decisions, accounts and failures of one machine |
//! | `past` | the same over the end of a lathed |
//! | `why` | the same as it is shown |
//!
//! A person has the last word: a machine that somebody resized is left alone for [`PERSON_REST_MSEC`], what was asked for a time until that
//! time is over, and an operation under way is never disturbed; the machine's actor checks that again with the revision that was looked at. No
//! failure here stops anything: what cannot be done is remembered, and not asked again at once.
//!
//! Changed are CPU and memory. Bandwidth and I/O operations have no bounds between which anybody allowed it, so that they stay as they are.

mod act;
mod kept;
mod look;
pub(super) mod past;
#[cfg(test)]
mod tests;
pub(super) mod why;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::MissedTickBehavior;

pub use self::kept::{Came, Counts, Sculpted};

use self::kept::Numbers;
use super::actor::Actor;
use super::core::{Core, Entry, unix_sec};
use super::spec;
use crate::api::wire::MachineState;
use crate::api::wire::foresight::{ForesightChoice, ForesightMode, ForesightRequest};
use crate::foresight::profile::Profile;
use crate::foresight::ring::{MINUTE, MINUTES};
use crate::foresight::{Mode, Resource};
use crate::problem::Problem;
use crate::sculptor::{Decision, Host, Machine, RESOURCES, Sculptor, Settings};
use crate::store::Change;

/// How often every machine is looked at.
const INTERVAL: Duration = Duration::from_secs(if cfg!(test) { 3600 } else { 5 });
/// Seconds that a look reaches back at most.
const LOOK_SEC: u64 = 5;
/// How long a machine that somebody resized is left alone.
pub(super) const PERSON_REST_MSEC: u64 = 600_000;
/// Seconds in a row in which a machine asks for all that it has, until it is looked at at once: one alone is a burst that is over.
const PRESSED_SEC: u32 = 2;

/// What all machines share of being sculpted.
#[derive(Default)]
pub struct Sculpting {
    /// Told when a machine asks for all that it has.
    pressed: Notify,
    settings: Settings,
    counts: Mutex<Counts>,
}

impl Sculpting {
    fn counted(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was decided and what became of it, since lathed started.
    pub(super) fn counts(&self) -> Counts {
        *self.counted()
    }

    pub(super) fn count(&self, resource: Resource, came: &Came) {
        self.counted().add(resource, came);
    }
}

/// Takes in what has just been sampled: how grants meet demand, and who is pressed. Some microseconds a machine.
pub(super) fn note(core: &Core) {
    if core.config.foresight.mode == Mode::Off {
        return;
    }
    let (at_sec, mut pressed) = (unix_sec(), false);
    for entry in core.entries() {
        let granted = entry.with(|shared| {
            let runs = shared.record.life.state() == MachineState::Running;
            runs.then(|| Resource::ALL.map(|resource| look::granted(shared, resource)))
        });
        let demand = entry.profile(|profile| *profile.now());
        let reached = |resource: Resource, granted: u64, asked: u64| {
            let permille = core.sculpting.settings.reached_permille[resource as usize];
            u128::from(asked) * 1000 >= u128::from(granted) * u128::from(permille)
        };
        pressed |= entry.sculpted(|sculpted| {
            let mut all = false;
            for resource in Resource::ALL {
                let known = granted.map(|granted| granted[resource as usize]).filter(|granted| *granted > 0);
                let Some((granted, asked)) = known.zip(demand.of(resource)) else { continue };
                sculpted.accounts[resource as usize].take(at_sec, granted, asked);
                all |= sculpted.may_grow[resource as usize] && reached(resource, granted, asked);
            }
            sculpted.pressed_sec = if all { sculpted.pressed_sec.saturating_add(1) } else { 0 };
            sculpted.pressed_sec >= PRESSED_SEC
        });
    }
    if pressed {
        core.sculpting.pressed.notify_one();
    }
}

/// Looks, decides and has done until lathed ends.
pub(super) async fn run(core: Arc<Core>) {
    if core.config.foresight.mode == Mode::Off {
        return;
    }
    let mut beat = tokio::time::interval(INTERVAL);
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut turn = Turn::new(core.sculpting.settings);
    loop {
        tokio::select! {
            _ = beat.tick() => {}
            // No more than once a second, which is how often it is sampled.
            () = core.sculpting.pressed.notified() => {}
        }
        let looking = Arc::clone(&core);
        // Of thousands of machines it takes milliseconds.
        let taken = tokio::task::spawn_blocking(move || {
            let decided = turn.take(&looking);
            (turn, decided)
        });
        let (next, decided) = match taken.await {
            Ok((next, decided)) => (next, decided),
            Err(cause) => {
                tracing::error!(%cause, "the sculptor failed, and begins anew without its past");
                (Turn::new(core.sculpting.settings), Vec::new())
            }
        };
        turn = next;
        decided.into_iter().for_each(|decided| settle(&core, decided));
    }
}

/// What was decided of one machine.
struct Decided {
    entry: Arc<Entry>,
    /// At which it was looked at.
    revision: u64,
    decisions: Vec<(Decision, Numbers)>,
}

/// The sculptor with what it has to know of the turn before.
struct Turn {
    sculptor: Sculptor,
    /// A name that belongs to another machine now has no past.
    known: BTreeMap<String, Arc<Entry>>,
    last_sec: u64,
}

impl Turn {
    fn new(settings: Settings) -> Self {
        Self { sculptor: Sculptor::new(settings), known: BTreeMap::new(), last_sec: 0 }
    }

    fn take(&mut self, core: &Core) -> Vec<Decided> {
        let (now_sec, now_msec) = (unix_sec(), core.now_msec());
        let entries: BTreeMap<_, _> =
            core.entries().into_iter().map(|entry| (entry.name.clone(), entry)).collect();
        let mut before = BTreeSet::new();
        for (name, one) in std::mem::replace(&mut self.known, entries) {
            if self.known.get(&name).is_none_or(|entry| !Arc::ptr_eq(entry, &one)) {
                self.sculptor.forget(&name);
            } else {
                before.insert(name);
            }
        }
        for (name, entry) in self.known.iter().filter(|(name, _)| !before.contains(*name)) {
            self.sculptor.recall(now_msec, name, entry.profile(|profile| minutes(profile, now_sec)));
        }
        // What was asked for since the last look; the first time, for as long as it lasts until the next.
        let since = now_sec.saturating_sub(self.last_sec).clamp(1, LOOK_SEC);
        self.last_sec = now_sec;
        let looks: Vec<_> = self
            .known
            .values()
            .filter_map(|entry| Some((Arc::clone(entry), look::look(core, entry, now_sec, since)?)))
            .collect();
        let machines: Vec<Machine> = looks.iter().map(|(_, look)| look.machine.clone()).collect();
        let decisions = self.sculptor.decide(now_msec, &host(core), &machines);
        let mut decided: BTreeMap<&str, (&look::Look, Decided)> = BTreeMap::new();
        for (entry, look) in &looks {
            let weighing = |resource| self.sculptor.weighing(&entry.name, resource).cloned();
            entry.sculpted(|sculpted| {
                sculpted.weighings = Resource::ALL.map(weighing);
                sculpted.may_grow = look.may_grow();
            });
            let none = Decided { entry: Arc::clone(entry), revision: look.revision, decisions: Vec::new() };
            decided.insert(&entry.name, (look, none));
        }
        for decision in decisions {
            let Some((look, of)) = decided.get_mut(decision.machine.as_str()) else { continue };
            let numbers = look.numbers[decision.resource as usize].clone();
            of.decisions.push((decision, numbers));
        }
        decided.into_values().map(|(_, of)| of).filter(|of| !of.decisions.is_empty()).collect()
    }
}

/// What a machine asked for in each minute of the last day, up to now: what a lathed before this one has seen, or would have.
fn minutes(profile: &Profile, now_sec: u64) -> [Vec<Option<u64>>; RESOURCES] {
    Resource::ALL.map(|resource| {
        let Some(track) = profile.track(resource) else { return Vec::new() };
        let ring = track.rings.minutes.of(resource.forecast_of());
        let amount = |minute| Some(u64::from(ring.at(minute)?).saturating_mul(resource.grain()));
        let now = now_sec / MINUTE;
        let oldest = ring.iter().next().map_or(now, |(minute, _)| minute);
        (oldest.max(now.saturating_sub(MINUTES as u64))..now).map(amount).collect()
    })
}

/// What the host has left. What may be promised several times is there as often; what one of the guaranteed cannot have, the books refuse.
fn host(core: &Core) -> Host {
    let resources = *core.shape.borrow();
    let overcommit = &core.config.overcommit;
    let promised = |free: u64, permille: u64| free.saturating_mul(permille.max(1000)) / 1000;
    let mut host = Host::default();
    host.free[Resource::Cpu as usize] = promised(resources.cpu.free, overcommit.cpu_permille);
    host.free[Resource::Memory as usize] = promised(resources.memory.free, overcommit.memory_permille);
    host
}

/// Keeps what was decided of a machine, and has it done where its mode is on.
fn settle(core: &Arc<Core>, decided: Decided) {
    let Decided { entry, revision, decisions } = decided;
    let (mode, tier) = (entry.foresight().mode, entry.with(|shared| shared.record.desired.tier));
    let now_msec = core.now_msec();
    let mut tasks = Vec::new();
    for (decision, numbers) in decisions {
        let why = why::sentence(&decision, &numbers, tier);
        let told = decision.clone();
        let kept = entry.sculpted(|sculpted| match mode {
            Mode::On => Some(sculpted.keep(now_msec, decision, numbers.clone(), why.clone(), Came::UnderWay)),
            _ => sculpted.observe(now_msec, decision, numbers.clone(), why.clone()),
        });
        let Some(id) = kept else { continue };
        tell(&entry, mode, &told, &numbers, &why);
        match mode {
            Mode::On => tasks.push(act::Task { id, resource: told.resource, from: told.from, to: told.to }),
            _ => core.sculpting.count(told.resource, &Came::Observed),
        }
    }
    if !tasks.is_empty() {
        act::begin(core, entry, revision, tasks);
    }
}

/// One line in the journal for each decision.
fn tell(entry: &Entry, mode: Mode, decision: &Decision, numbers: &Numbers, why: &str) {
    let (from, to) =
        (look::shown(decision.resource, decision.from), look::shown(decision.resource, decision.to));
    let verb = if mode == Mode::On { "gets" } else { "would get" };
    tracing::info!(
        machine = entry.name,
        resource = decision.resource.word(),
        from = decision.from,
        to = decision.to,
        cause = decision.cause.word(),
        demand = numbers.demand,
        p95 = numbers.p95,
        confidence_permille = numbers.confidence_permille,
        cycle_sec = decision.weighing.recurrence.map(|cycle| cycle.period_msec / 1000),
        changes_a_day = decision.weighing.changes,
        mode = mode.word(),
        "{} {verb} {to} instead of {from} {}: {why}",
        entry.name,
        decision.resource.word()
    );
}

/// Another say of a machine about its future.
///
/// # Errors
/// `bad-amount`, `store`.
pub(super) async fn set(actor: &mut Actor, request: &ForesightRequest) -> Result<(), Problem> {
    let aggressiveness = request.aggressiveness_permille.map(spec::check_aggressiveness).transpose()?;
    let mut record = actor.entry.with(|shared| shared.record.clone());
    let own = &mut record.foresight;
    match request.mode {
        Some(ForesightChoice::Host) => *own = Default::default(),
        Some(ForesightChoice::Off) => own.mode = Some(ForesightMode::Off),
        Some(ForesightChoice::Observe) => own.mode = Some(ForesightMode::Observe),
        Some(ForesightChoice::On) => own.mode = Some(ForesightMode::On),
        None => {}
    }
    own.aggressiveness_permille = aggressiveness.or(own.aggressiveness_permille);
    let foresight = record.foresight;
    if foresight == actor.entry.with(|shared| shared.record.foresight) {
        return Ok(());
    }
    actor.core.store.apply(Change::Put(Box::new(record))).await?;
    actor.entry.with(|shared| shared.record.foresight = foresight);
    let name = &actor.entry.name;
    let settings = actor.entry.foresight();
    let permille = settings.aggressiveness_permille;
    actor.core.tell(
        "machine-foresight",
        name,
        format!("{name}: foresight {}, aggressiveness {permille} in 1000", settings.mode.word()),
    );
    Ok(())
}
