//! State, clock, and the turn of all of it.

use std::collections::{BTreeMap, VecDeque};

use super::outlook::MAX_AMOUNT;
use super::past::{DAY_MSEC, Past};
use super::share::{self, Ask};
use super::weigh::{Case, weigh};
use super::{Cause, Decision, Host, Machine, RESOURCES, Settings, Sight, Weighing};
use crate::foresight::Resource;

/// Changes that are remembered of one resource: more than any setting allows in a day.
const MOST_CHANGES: usize = 512;
/// How often the price of changes is looked at.
const DEARER_EVERY_MSEC: u64 = 3_600_000;
/// No dearer than this, thousandths of what they cost at first.
const MOST_DEARER_PERMILLE: u64 = 32_000;
/// Longest time between two turns: a clock that jumps ahead passes no more.
const MAX_TURN_MSEC: u64 = 3_600_000;

/// What is remembered of one resource of a machine.
#[derive(Clone, Debug)]
struct Track {
    past: Past,
    /// When it changed, the newest last.
    changes: VecDeque<u64>,
    /// What it had at the last look.
    granted: u64,
    /// What was decided at the last look that decided anything, and has not come about.
    pending: Option<(u64, Cause)>,
    /// When it last grew because it was reached.
    grown_msec: Option<u64>,
    /// How much dearer changes are than at first, thousandths, and when that was last looked at.
    dearer_permille: u64,
    dearer_msec: u64,
    weighing: Option<Weighing>,
}

impl Track {
    fn new(past: Past, granted: u64, dearer_msec: u64) -> Self {
        let changes = VecDeque::new();
        Self {
            past,
            changes,
            granted,
            pending: None,
            grown_msec: None,
            dearer_permille: 1000,
            dearer_msec,
            weighing: None,
        }
    }

    /// What has become of the last decision, and what is wanted now.
    fn see(&mut self, now_msec: u64, sight: &Sight) {
        let grew = sight.granted > self.granted;
        if sight.granted != self.granted {
            self.granted = sight.granted;
            self.past.settle();
            // Whatever changed it: towards what was decided, it was that.
            if let Some((to, cause)) = self.pending.take()
                && (to == sight.granted || (grew == (to > sight.granted)))
            {
                self.changes.push_back(now_msec);
                if grew && cause == Cause::Reached {
                    self.grown_msec = Some(now_msec);
                }
            }
        }
        while self.changes.len() > MOST_CHANGES
            || self.changes.front().is_some_and(|at| now_msec - at >= DAY_MSEC)
        {
            self.changes.pop_front();
        }
        self.past.take(now_msec, sight.demand, sight.granted);
    }
}

impl Track {
    /// Changes become dearer while there are many, until those that are made are worth it and last for the day.
    fn price(&mut self, now_msec: u64, budget: u64) {
        while now_msec.saturating_sub(self.dearer_msec) >= DEARER_EVERY_MSEC {
            self.dearer_msec += DEARER_EVERY_MSEC;
            let changes = self.changes.len() as u64;
            let by = if changes * 6 > budget * 5 {
                1100
            } else if changes * 3 < budget * 2 {
                950
            } else {
                1000
            };
            self.dearer_permille = (self.dearer_permille * by / 1000).clamp(1000, MOST_DEARER_PERMILLE);
        }
    }
}

/// The state of the sculptor of one host.
#[derive(Clone, Debug, Default)]
pub struct Sculptor {
    settings: Settings,
    /// The last time told, and the time that has passed: the latter never goes back.
    told_msec: Option<u64>,
    now_msec: u64,
    machines: BTreeMap<String, Known>,
}

/// What is remembered of a machine.
#[derive(Clone, Debug, Default)]
struct Known {
    seen_msec: u64,
    /// What is known from before the first look.
    recalled: [Option<Past>; RESOURCES],
    tracks: [Option<Box<Track>>; RESOURCES],
}

impl Sculptor {
    /// Without a past.
    pub fn new(settings: Settings) -> Self {
        Self { settings, ..Self::default() }
    }

    /// What it goes by.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// What is to change now. `now_msec` is of any clock that goes on; where it is set back no time has passed, where it jumps no more than an
    /// hour has.
    ///
    /// Asked again without the grants having changed it answers the same again, as long as it still holds: who cannot or must not carry it out
    /// needs to do nothing. A machine counts once; the first of a name is meant.
    pub fn decide(&mut self, now_msec: u64, host: &Host, machines: &[Machine]) -> Vec<Decision> {
        self.pass(now_msec);
        let mut asks: [Vec<Ask>; RESOURCES] = std::array::from_fn(|_| Vec::new());
        for (at, machine) in machines.iter().enumerate() {
            self.look(at, machine, host, &mut asks);
        }
        let mut decisions = Vec::new();
        for resource in Resource::ALL {
            let asks = &mut asks[resource as usize];
            share::share(asks, host.free[resource as usize], host.missing[resource as usize]);
            for ask in asks.drain(..) {
                decisions.extend(self.decided(&machines[ask.machine].name, resource, ask));
            }
        }
        let now = self.now_msec;
        self.machines.retain(|_, known| now - known.seen_msec < DAY_MSEC);
        decisions
    }

    fn pass(&mut self, now_msec: u64) {
        self.now_msec = match self.told_msec.replace(now_msec) {
            Some(told) => self.now_msec.saturating_add(now_msec.saturating_sub(told).min(MAX_TURN_MSEC)),
            // There is a day before the beginning that may be recalled.
            None => DAY_MSEC,
        };
    }

    /// What a machine that was not looked at yet wanted before: the minutes of each resource up to now, the oldest first, `None` for those that
    /// were not measured. Of one that was looked at its own past counts.
    pub fn recall(&mut self, now_msec: u64, machine: &str, minutes: [Vec<Option<u64>>; RESOURCES]) {
        self.pass(now_msec);
        let known = self.machines.entry(machine.to_owned()).or_default();
        known.seen_msec = self.now_msec;
        for resource in Resource::ALL {
            let past = Past::recalled(resource.forecast_of(), self.now_msec, &minutes[resource as usize]);
            known.recalled[resource as usize] = Some(past);
        }
    }

    /// What was weighed for a resource of a machine at the last look, also when it stays as it is.
    pub fn weighing(&self, machine: &str, resource: Resource) -> Option<&Weighing> {
        self.machines.get(machine)?.tracks[resource as usize].as_ref()?.weighing.as_ref()
    }

    /// Forgets a machine: it is gone, and another may take its name.
    pub fn forget(&mut self, machine: &str) {
        self.machines.remove(machine);
    }

    fn look(&mut self, at: usize, machine: &Machine, host: &Host, asks: &mut [Vec<Ask>; RESOURCES]) {
        let now_msec = self.now_msec;
        let known = self.machines.entry(machine.name.clone()).or_default();
        known.seen_msec = now_msec;
        for resource in Resource::ALL {
            let Some(sight) = &machine.sights[resource as usize] else { continue };
            // Without a limit there is nothing to shape.
            if sight.granted > MAX_AMOUNT {
                continue;
            }
            let track = &mut known.tracks[resource as usize];
            let recalled = known.recalled[resource as usize].take();
            let past = || recalled.unwrap_or_else(|| Past::new(resource.forecast_of()));
            let track = track.get_or_insert_with(|| Box::new(Track::new(past(), sight.granted, now_msec)));
            track.see(now_msec, sight);
            let budget = self.settings.changes_a_day.at(machine.aggressiveness_permille);
            track.price(now_msec, budget);
            let just = 2 * self.settings.reaction_msec;
            let case = Case {
                settings: &self.settings,
                machine,
                resource,
                sight,
                past: &track.past,
                price_permille: host.price_permille[resource as usize],
                changes: track.changes.len() as u64,
                again: track.grown_msec.is_some_and(|grown| now_msec - grown <= just),
                dearer_permille: track.dearer_permille,
                now_msec,
            };
            asks[resource as usize].push(share::ask(at, machine, sight, weigh(&case)));
        }
    }

    fn decided(&mut self, machine: &str, resource: Resource, ask: Ask) -> Option<Decision> {
        let track = self.machines.get_mut(machine)?.tracks[resource as usize].as_mut()?;
        let weighing = ask.weighing;
        track.weighing = Some(weighing.clone());
        let (from, to, cause) = (weighing.granted, weighing.amount, weighing.cause);
        if from == to {
            return None;
        }
        let again = track.pending.replace((to, cause)) == Some((to, cause));
        Some(Decision { machine: machine.to_owned(), resource, from, to, cause, weighing, again })
    }
}
