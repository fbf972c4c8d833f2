//! All that is known over time of one machine.

use super::Resource;
use super::by_hand::{ByHand, Merged};
use super::demand::{Demand, INSIDE_FRESH_USEC, Inside, Reading, demand};
use super::forecaster::Forecaster;
use super::goal::{Goals, Having, Holding};
use super::inside::{Bounds, Word};
use super::rhythm::{Cycle, Rhythms};
use super::ring::{MAX_AMOUNT, Rings};

/// One resource: what was asked for, and what will be.
#[derive(Clone, Debug)]
pub struct Track {
    /// The past, in the resource's grain.
    pub rings: Rings,
    /// What comes.
    pub forecaster: Forecaster,
    /// What comes back.
    pub rhythms: Rhythms,
}

impl Track {
    /// Without a past.
    pub fn new(resource: Resource) -> Self {
        Self { rings: Rings::default(), forecaster: Forecaster::new(resource), rhythms: Rhythms::default() }
    }
}

/// How far the large part of what is stored reaches, by resource: the newest minute and the newest hour in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reach {
    /// The minute in which it was made; the small part names it, so that the two cannot be of different times.
    pub stamp: u64,
    /// Newest minute and hour; `None` for what is not in it.
    pub newest: [Option<(u64, u64)>; Resource::ALL.len()],
}

/// What is known over time of one machine.
#[derive(Clone, Debug, Default)]
pub struct Profile {
    /// By [`Resource`]; a machine without disks has no track of them.
    pub(super) tracks: [Option<Box<Track>>; Resource::ALL.len()],
    last: Option<Reading>,
    inside: Option<(u64, Inside)>,
    now: Demand,
    /// Share of the periods of the last second that a quota ended, parts per thousand.
    held_permille: u64,
    /// What its guest agent says.
    pub word: Word,
    /// What its applications are expected to achieve.
    pub goals: Goals,
    /// What people say.
    pub by_hand: ByHand,
    /// What the store has of it.
    pub(super) stored: Option<Reach>,
}

impl Profile {
    /// Takes in what was read at the second `at_sec` since the epoch, which is `at_usec` on the clock of readings.
    pub fn take(&mut self, at_sec: u64, at_usec: u64, mut reading: Reading) {
        let fresh = |(told_usec, _): &(u64, Inside)| at_usec.saturating_sub(*told_usec) <= INSIDE_FRESH_USEC;
        if let (Some(memory), Some((_, inside))) = (&mut reading.memory, self.inside.filter(fresh)) {
            memory.inside = Some(inside);
        }
        reading.pressed = self.word.pressed(at_usec);
        let before = self.last.replace(reading);
        self.now = before.map_or(Demand::default(), |before| demand(&before, &reading));
        self.held_permille = before.and_then(|before| held(&before, &reading)).unwrap_or(0);
        for resource in Resource::ALL {
            let Some(amount) = self.now.of(resource) else { continue };
            // Rounded up: what was asked for is in it.
            let grains = u32::try_from(amount.div_ceil(resource.grain())).unwrap_or(MAX_AMOUNT);
            let track = &mut self.tracks[resource as usize];
            track.get_or_insert_with(|| Box::new(Track::new(resource))).rings.take(at_sec, grains);
        }
    }

    /// It cannot be read now: what it asks for is not known.
    pub fn lose(&mut self) {
        (self.last, self.inside, self.now, self.held_permille) = (None, None, Demand::default(), 0);
        self.word.lose();
    }

    /// Takes in what its guest says of its memory.
    pub fn told(&mut self, at_usec: u64, inside: Inside) {
        self.inside = Some((at_usec, inside));
    }

    /// Ends the minutes that are over, and learns from them; it is the second `at_sec` now.
    pub fn catch_up(&mut self, at_sec: u64) {
        for track in self.tracks.iter_mut().flatten() {
            track.rings.pass(at_sec);
            track.forecaster.catch_up(&track.rings);
        }
    }

    /// Looks for what comes back, where it is time to; it is the second `at_sec` now.
    pub fn look_for_cycles(&mut self, at_sec: u64) {
        for resource in Resource::ALL {
            let Some(track) = &mut self.tracks[resource as usize] else { continue };
            track.rhythms.look(resource.forecast_of(), &track.rings, at_sec);
        }
    }

    /// What comes back of a resource, as known at the second `at_sec` since the epoch.
    pub fn cycle(&self, resource: Resource, at_sec: u64) -> Option<&Cycle> {
        self.track(resource)?.rhythms.cycle(at_sec)
    }

    /// What is known of a resource.
    pub fn track(&self, resource: Resource) -> Option<&Track> {
        self.tracks[resource as usize].as_deref()
    }

    /// What it asked for in the last second.
    pub fn now(&self) -> &Demand {
        &self.now
    }

    /// What is ahead of a resource at the second `at_sec` since the epoch, with what people say of it.
    pub fn outlook(&self, resource: Resource, at_sec: u64) -> Option<Merged> {
        let track = self.track(resource);
        let learnt = track.and_then(|track| track.forecaster.outlook(at_sec));
        self.by_hand.merge(resource, learnt, track.map(|track| &track.rings), at_sec)
    }

    /// Takes in how its goals stand at `at_usec` on the clock of readings, after what its guest has told.
    pub fn pursue(&mut self, at_usec: u64, bounds: &Bounds) {
        let told = self.word.told(at_usec).map(|(inside, _)| inside.goals.clone()).unwrap_or_default();
        let pressed = self.word.pressed(at_usec).unwrap_or_default();
        let holding = |bound: super::inside::Bound, resource| Holding {
            granted: bound.granted,
            most: bound.most,
            demand: self.now.of(resource).unwrap_or(0),
        };
        let having = Having {
            holdings: [holding(bounds.cpu, Resource::Cpu), holding(bounds.memory, Resource::Memory)],
            cpu_waits_permille: pressed.cpu_some_permille,
            held_permille: self.held_permille,
            memory_waits_permille: pressed.memory_some_permille,
        };
        self.goals.take(at_usec, told, &having);
    }

    /// Its guest has ended, and with it whoever wanted something of it.
    pub fn forget_inside(&mut self) {
        self.word.forget();
        self.goals.forget();
    }

    /// What is wanted of a resource, in its unit: from inside, for a goal, or because people say that it will be asked for within moments. At
    /// least this should be there. It is the second `at_sec` since the epoch, and `at_usec` on the clock of readings.
    pub fn wanted(&self, resource: Resource, at_sec: u64, at_usec: u64) -> Option<u64> {
        let inside = self.word.wanted(at_usec).filter(|wanted| wanted.resource == resource);
        let rings = self.track(resource).map(|track| &track.rings);
        let inside = inside.map(|wanted| wanted.amount).max();
        inside.max(self.goals.wanted(resource, at_usec)).max(self.by_hand.wanted(resource, rings, at_sec))
    }
}

/// Share of the enforcement periods between two readings in which a quota was used up, parts per thousand.
fn held(before: &Reading, now: &Reading) -> Option<u64> {
    let (before, now) = (before.cpu?, now.cpu?);
    let periods = |cpu: &super::demand::Cpu| cpu.wall_periods.saturating_add(cpu.vcpu_periods);
    let ended_usec = periods(&now).checked_sub(periods(&before))?.saturating_mul(now.period_usec);
    let passed_usec = now.at_usec.checked_sub(before.at_usec).filter(|passed| *passed > 0)?;
    Some((ended_usec.saturating_mul(1000) / passed_usec).min(1000))
}

#[cfg(test)]
mod tests {
    use super::super::by_hand::{Event, Raise, When};
    use super::super::demand::{Cpu, Memory};
    use super::super::inside::{Bound, Bounds};
    use super::*;

    const SEC: u64 = 1_000_000;

    fn reading(second: u64) -> Reading {
        let cpu = Cpu { at_usec: second * SEC, used_usec: second * 250_000, vcpus: 1, ..Cpu::default() };
        let memory = Memory { charged_bytes: 1 << 20, ..Memory::default() };
        Reading { cpu: Some(cpu), memory: Some(memory), ..Reading::default() }
    }

    #[test]
    fn what_is_read_lands_in_the_rings_and_what_is_not_there_has_none() {
        let mut profile = Profile::default();
        for second in 0..5 {
            profile.take(1000 + second, second * SEC, reading(second));
        }
        assert_eq!(profile.now().of(Resource::Cpu), Some(250));
        let seconds = &profile.track(Resource::Cpu).unwrap().rings.seconds;
        assert_eq!(seconds.iter().collect::<Vec<_>>(), [1001, 1002, 1003, 1004].map(|at| (at, Some(250))));
        assert_eq!(profile.track(Resource::Memory).unwrap().rings.seconds.at(1004), Some(256));
        assert!(profile.track(Resource::Iops).is_none() && profile.track(Resource::Net).is_none());
    }

    #[test]
    fn a_guests_account_counts_while_it_is_fresh() {
        let mut profile = Profile::default();
        let bytes = |profile: &Profile| profile.now().of(Resource::Memory);
        profile.take(1000, 0, reading(0));
        profile.told(0, Inside { given_bytes: 1 << 20, available_bytes: 1 << 19 });
        profile.take(1001, SEC, reading(1));
        assert_eq!(bytes(&profile), Some(1 << 19));
        profile.take(1060, 60 * SEC, reading(60));
        assert_eq!(bytes(&profile), Some(1 << 20));
        profile.lose();
        assert_eq!(bytes(&profile), None);
    }

    #[test]
    fn a_goal_is_pursued_with_what_is_read_of_the_machine() {
        use lathe_guest::protocol::inside::{Goal, Inside, Pursued};

        let mut profile = Profile::default();
        let bound = Bound { granted: 500, most: 1000 };
        let bounds = Bounds { cpu: bound, memory: Bound { granted: 1 << 30, most: 1 << 30 } };
        for second in 0..10_u64 {
            let cpu = Cpu { wall_periods: second * 3, period_usec: 100_000, ..reading(second).cpu.unwrap() };
            profile.take(1000 + second, second * SEC, Reading { cpu: Some(cpu), ..reading(second) });
            let goal = Goal::Latency { permille: 950, under_usec: 1000 };
            let (latency_usec, name) = (Some(1200), "web".into());
            let web = Pursued { name, goal, over_msec: 1, latency_usec, rate_milli: None, wrong: None };
            let inside = Inside { goals: vec![web], ..Inside::default() };
            profile.word.take(second * SEC, inside, &bounds, "");
            profile.pursue(second * SEC, &bounds);
        }
        assert_eq!(profile.held_permille, 300);
        assert_eq!(profile.wanted(Resource::Cpu, 1010, 10 * SEC), Some(600), "its quota holds it back");
        profile.forget_inside();
        assert_eq!(profile.wanted(Resource::Cpu, 1010, 10 * SEC), None);
    }

    #[test]
    fn what_is_wanted_is_the_most_of_what_the_guest_and_people_want() {
        use lathe_guest::protocol::inside::{Amount, Inside, Want, Wished};

        let mut profile = Profile::default();
        assert_eq!(profile.wanted(Resource::Cpu, 1000, SEC), None);
        let want =
            Want { id: 1, resource: Wished::Cpu, amount: Amount::To(700), settled: None, left_sec: 61 };
        let inside = Inside { wants: vec![want], ..Inside::default() };
        let most = Bound { granted: 100, most: 1000 };
        let bounds = Bounds { cpu: most, memory: most };
        profile.word.take(SEC, inside, &bounds, "");
        let when = When { daily: false, from_sec: 1000, for_sec: 60 };
        let raises = vec![(Resource::Cpu, Raise::To(900)), (Resource::Net, Raise::To(5))];
        profile.by_hand.events = vec![Event { name: "sale".to_owned(), when, raises }];
        let wanted = |second| {
            [Resource::Cpu, Resource::Memory, Resource::Net]
                .map(|resource| profile.wanted(resource, second, (second - 999) * SEC))
        };
        assert_eq!(wanted(1000), [Some(900), None, Some(5)]);
        assert_eq!(wanted(1060), [Some(700), None, None], "the event is over");
        assert_eq!(wanted(1061), [None, None, None], "the wish is, too");
    }
}
