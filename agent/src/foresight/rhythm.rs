//! What comes back in the demand of one resource, on two scales: cycles of one to thirty minutes in steps of ten seconds, cycles of half an hour
//! to twelve hours in steps of two minutes.
//!
//! A forecast of the next minutes knows nothing of a job that begins in eight of them; a cycle does. It is believed from its second time on, so
//! that the third is met; bursts at random look like a cycle of two now and then, and each time that one breaks off more of them must have been
//! alike before the next is believed.
//!
//! Nothing of it is stored: after a restart it is found again in what the rings hold, ten minutes of seconds and a day of minutes.

use std::collections::VecDeque;

use lathe_forecast::Rhythm;

use super::Of;
use super::ring::{MINUTE, Rings};

/// Length of a step of the quick scale, seconds.
pub const QUICK_SEC: u64 = 10;
/// Its steps that are kept: an hour.
const QUICK_STEPS: usize = 360;
/// How often it is looked at, seconds; takes 0.1 ms.
const QUICK_EVERY_SEC: u64 = 30;
/// Length of a step of the slow scale, seconds.
pub const SLOW_SEC: u64 = 120;
/// Its steps that are kept: a day.
const SLOW_STEPS: u64 = 720;
/// How often it is looked at, seconds; takes 0.2 ms.
const SLOW_EVERY_SEC: u64 = 600;
/// Cycles that must have been alike at first.
const FEW: u32 = 2;
/// No more are asked for, however often one broke off.
const MANY: u32 = 8;
/// After so long without one that broke off, one cycle less is asked for, seconds.
const FORGIVEN_SEC: u64 = 3600;
/// Two lengths that differ by less than one in so many parts are the same.
const SAME_PART: f32 = 8.0;

/// What comes back, and since when that is said.
#[derive(Clone, Debug, PartialEq)]
pub struct Cycle {
    /// When the first step of [`Rhythm::ahead`] begins, seconds since the epoch.
    pub from_sec: u64,
    /// Length of its steps, seconds.
    pub step_sec: u64,
    /// In the ring's grain.
    pub rhythm: Rhythm,
}

impl Cycle {
    /// Length of a cycle, seconds.
    pub fn period_sec(&self) -> u64 {
        // At least six steps, at most half a day.
        (self.rhythm.period * self.step_sec as f32).round() as u64
    }
}

/// Which cycles were believed, and how many must be alike for the next.
#[derive(Clone, Debug, Default)]
struct Belief {
    cycle: Option<Cycle>,
    /// Cycles asked for beyond [`FEW`].
    more: u32,
    /// When the last one broke off, or that was last forgiven.
    broke_sec: u64,
    looked_sec: u64,
}

impl Belief {
    /// Whether it is time to look again.
    fn is_due(&self, now_sec: u64, every_sec: u64) -> bool {
        now_sec / every_sec != self.looked_sec / every_sec
    }

    fn take(&mut self, now_sec: u64, found: Option<Cycle>) {
        self.looked_sec = now_sec;
        if now_sec.abs_diff(self.broke_sec) >= FORGIVEN_SEC {
            (self.more, self.broke_sec) = (self.more.saturating_sub(1), now_sec);
        }
        let before = self.cycle.take();
        if before.is_some_and(|before| !found.as_ref().is_some_and(|found| same(&before, found))) {
            (self.more, self.broke_sec) = ((self.more + 1).min(MANY - FEW), now_sec);
        }
        self.cycle = found.filter(|found| found.rhythm.cycles >= FEW + self.more);
    }

    /// What is believed at a time, while what it was found in is not old.
    fn at(&self, now_sec: u64, every_sec: u64) -> Option<&Cycle> {
        let old = every_sec + MINUTE;
        self.cycle.as_ref().filter(|cycle| now_sec.saturating_sub(cycle.from_sec) <= old + 2 * cycle.step_sec)
    }
}

/// Whether they are as long as each other, or one as several of the other.
fn same(before: &Cycle, found: &Cycle) -> bool {
    let (a, b) = (before.rhythm.period, found.rhythm.period);
    let times = a.max(b) / a.min(b);
    (times - times.round()).abs() * SAME_PART <= times.round()
}

/// What comes back in the demand of one resource.
#[derive(Clone, Debug, Default)]
pub struct Rhythms {
    /// Newest step of the quick scale, and what is known of it and those before it.
    newest: u64,
    steps: VecDeque<f32>,
    quick: Belief,
    slow: Belief,
}

impl Rhythms {
    /// Looks for cycles in what rings hold, where it is time to; it is the second `now_sec` since the epoch.
    pub fn look(&mut self, of: Of, rings: &Rings, now_sec: u64) {
        self.look_quick(of, rings, now_sec);
        self.look_slow(of, rings, now_sec);
    }

    fn look_quick(&mut self, of: Of, rings: &Rings, now_sec: u64) {
        if self.quick.is_due(now_sec, QUICK_EVERY_SEC) {
            self.take_seconds(of, rings, now_sec);
            let found = Rhythm::find(self.steps.make_contiguous());
            let from_sec = (self.newest + 1) * QUICK_SEC;
            let found = found.map(|rhythm| Cycle { from_sec, step_sec: QUICK_SEC, rhythm });
            self.quick.take(now_sec, found);
        }
    }

    /// Looks for cycles of hours alone, as where nothing quicker is in what is measured.
    pub fn look_slow(&mut self, of: Of, rings: &Rings, now_sec: u64) {
        if self.slow.is_due(now_sec, SLOW_EVERY_SEC) {
            let (from_sec, steps) = slow_steps(of, rings, now_sec);
            let found = Rhythm::find(&steps);
            let found = found.map(|rhythm| Cycle { from_sec, step_sec: SLOW_SEC, rhythm });
            self.slow.take(now_sec, found);
        }
    }

    /// What comes back; of two scales the quick one.
    pub fn cycle(&self, now_sec: u64) -> Option<&Cycle> {
        self.quick.at(now_sec, QUICK_EVERY_SEC).or_else(|| self.slow.at(now_sec, SLOW_EVERY_SEC))
    }

    /// Takes in the steps that are over since the last look. Where the clock was set back, what was to be since is forgotten.
    fn take_seconds(&mut self, of: Of, rings: &Rings, now_sec: u64) {
        let over = (now_sec / QUICK_SEC).saturating_sub(1);
        let Some((oldest, _)) = rings.seconds.iter().next() else { return };
        if self.steps.is_empty() || self.newest > over || over - self.newest > QUICK_STEPS as u64 {
            self.steps.clear();
            let from = (oldest / QUICK_SEC).max(over.saturating_sub(QUICK_STEPS as u64)).min(over);
            self.newest = from.saturating_sub(1);
        }
        for step in self.newest + 1..=over {
            let seconds = (step * QUICK_SEC..(step + 1) * QUICK_SEC).map(|second| rings.seconds.at(second));
            self.steps.push_back(one(of, seconds));
        }
        self.newest = over;
        let excess = self.steps.len().saturating_sub(QUICK_STEPS);
        self.steps.drain(..excess);
    }
}

/// The last day in steps of the slow scale, and when the next one begins.
fn slow_steps(of: Of, rings: &Rings, now_sec: u64) -> (u64, Vec<f32>) {
    let next = now_sec / SLOW_SEC;
    let minutes = rings.minutes.of(of);
    let first = minutes.iter().next().map_or(next, |(minute, _)| (minute * MINUTE).div_ceil(SLOW_SEC));
    let steps = first.max(next.saturating_sub(SLOW_STEPS))..next;
    let of = |step: u64| {
        let minutes =
            (step * SLOW_SEC / MINUTE..(step + 1) * SLOW_SEC / MINUTE).map(|minute| minutes.at(minute));
        one(of, minutes)
    };
    (next * SLOW_SEC, steps.map(of).collect())
}

/// One step of several that were measured or not; no number where none was.
fn one(of: Of, amounts: impl Iterator<Item = Option<u32>>) -> f32 {
    let (mut sum, mut count, mut largest) = (0.0_f64, 0_u32, 0_u32);
    for amount in amounts.flatten() {
        (sum, count, largest) = (sum + f64::from(amount), count + 1, largest.max(amount));
    }
    match of {
        _ if count == 0 => f32::NAN,
        Of::Mean => (sum / f64::from(count)) as f32,
        Of::Max => largest as f32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEGIN: u64 = 1_790_000_000 / 600 * 600;

    /// Goes through `seconds` of a load, looks every five, and answers what was believed at each look.
    fn through(
        rhythms: &mut Rhythms,
        rings: &mut Rings,
        seconds: std::ops::Range<u64>,
        load: impl Fn(u64) -> u32,
    ) -> Vec<Option<u64>> {
        let mut believed = Vec::new();
        for second in seconds {
            let at = BEGIN + second;
            rings.take(at, load(second));
            rings.pass(at + 1);
            if second % 5 == 4 {
                rhythms.look(Of::Mean, rings, at + 1);
                believed.push(rhythms.cycle(at + 1).map(Cycle::period_sec));
            }
        }
        believed
    }

    fn every_four_minutes(second: u64) -> u32 {
        if second % 240 >= 150 { 900 } else { 120 }
    }

    #[test]
    fn a_load_of_every_few_minutes_is_known_before_its_third_time() {
        let (mut rhythms, mut rings) = Default::default();
        let believed = through(&mut rhythms, &mut rings, 0..620, every_four_minutes);
        let known = believed.last().copied().flatten().expect("the third time begins in ten seconds");
        assert!(known.abs_diff(240) <= 10, "{known}");
        let cycle = rhythms.cycle(BEGIN + 620).unwrap();
        let busy = |second: u64| {
            let steps = (BEGIN + second - cycle.from_sec) / QUICK_SEC;
            cycle.rhythm.ahead[steps as usize % cycle.rhythm.ahead.len()] > 500.0
        };
        assert!(busy(640) && busy(700) && !busy(760) && !busy(820), "{cycle:?}");
    }

    #[test]
    fn it_is_found_again_after_a_restart_and_forgotten_when_it_is_over() {
        let (mut rhythms, mut rings) = Default::default();
        through(&mut rhythms, &mut rings, 0..1500, every_four_minutes);
        let mut anew = Rhythms::default();
        anew.look(Of::Mean, &rings, BEGIN + 1500);
        assert!(anew.cycle(BEGIN + 1500).is_some_and(|cycle| cycle.period_sec().abs_diff(240) <= 10));
        let believed = through(&mut rhythms, &mut rings, 1500..2400, |_| 120);
        assert!(
            believed.iter().take(40).all(Option::is_some) && believed.last() == Some(&None),
            "{believed:?}"
        );
        assert_eq!(rhythms.quick.more, 1, "it broke off");
    }

    #[test]
    fn a_batch_of_every_hour_is_seen_in_minutes() {
        let (mut rhythms, mut rings) = Default::default();
        let load = |second: u64| if second % 3600 < 600 { 2000 } else { 100 };
        let believed = through(&mut rhythms, &mut rings, 0..3 * 3600, load);
        let last = believed.last().copied().flatten().expect("an hour");
        assert!(last.abs_diff(3600) <= 120, "{last}");
    }

    #[test]
    fn one_that_breaks_off_again_and_again_is_believed_less() {
        let cycle = |period: f32, cycles: u32| {
            let rhythm = Rhythm { period, cycles, ahead: vec![1.0; period as usize] };
            Some(Cycle { from_sec: BEGIN, step_sec: QUICK_SEC, rhythm })
        };
        let mut belief = Belief { broke_sec: BEGIN, ..Belief::default() };
        let mut takes = |found| {
            belief.take(BEGIN, found);
            belief.cycle.is_some()
        };
        assert!(takes(cycle(24.0, 2)) && takes(cycle(48.0, 2)), "twice as long is the same");
        assert!(!takes(cycle(31.0, 2)) && takes(cycle(31.0, 3)), "another needs one more");
        assert!(!takes(None) && !takes(cycle(24.0, 3)) && takes(cycle(24.0, 4)));
        for _ in 0..20 {
            takes(cycle(24.0, 9));
            takes(None);
        }
        assert!(takes(cycle(24.0, MANY)), "no more than that");
        belief.take(BEGIN + FORGIVEN_SEC, None);
        assert_eq!(belief.more, MANY - FEW, "forgiven and broken off at once");
        belief.take(BEGIN + 2 * FORGIVEN_SEC, None);
        assert_eq!(belief.more, MANY - FEW - 1);
    }

    #[test]
    fn the_clock_may_do_what_it_likes() {
        let (mut rhythms, mut rings) = Default::default();
        through(&mut rhythms, &mut rings, 10_000..11_000, every_four_minutes);
        assert!(rhythms.steps.len() <= QUICK_STEPS);
        // Back, far ahead, and to the beginning of time.
        for now in [BEGIN + 9_000, BEGIN * 2, 0, u64::MAX / 2, BEGIN] {
            rhythms.look(Of::Max, &rings, now);
            let _ = rhythms.cycle(now);
        }
        assert!(rhythms.steps.len() <= QUICK_STEPS);
    }
}
