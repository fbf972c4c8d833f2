//! The past of one resource: every second of ten minutes, every minute of a day, every hour of thirty days.
//!
//! A slot belongs to a step of wall-clock time: the number of seconds, minutes or hours since the epoch. What was not measured is missing
//! and stays missing; nothing is ever interpolated. The clock may do what it likes:
//!
//! - it stands still, or two samples fall into one second: the larger one counts;
//! - it jumps ahead: the steps in between are missing;
//! - it is set back: the steps that are to come again are forgotten, because there is one truth per step.
//!
//! A slot is a `u32` of a resource's grain ([`super::Resource::grain`]), so that a machine's whole past takes some 80 KiB; 0 is missing and
//! every other number one more than the amount. Amounts beyond 2³² - 2 grains (4 million CPUs, 16 TiB, 4 Tbit/s) are cut to that.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::Of;

/// Seconds that are kept.
pub const SECONDS: usize = 600;
/// Minutes that are kept.
pub const MINUTES: usize = 24 * 60;
/// Hours that are kept.
pub const HOURS: usize = 30 * 24;
/// Length of a minute in seconds.
pub const MINUTE: u64 = 60;
/// Length of an hour in seconds.
pub const HOUR: u64 = 3600;
/// A minute or an hour counts as measured when at least one in this many of its seconds was.
const MEASURED_PART: u64 = 3;
/// Largest amount of a slot.
pub const MAX_AMOUNT: u32 = u32::MAX - 1;

/// Consecutive steps, the newest last.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ring {
    /// Step of the newest slot; 0 while there is none.
    newest: u64,
    /// 0 is missing, otherwise one more than the amount.
    slots: VecDeque<u32>,
}

impl Ring {
    /// Step of the newest slot.
    pub fn newest(&self) -> Option<u64> {
        (!self.slots.is_empty()).then_some(self.newest)
    }

    /// Steps from the oldest measured to the newest, missing ones in between included.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether nothing was ever put in.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Steps and their amounts, oldest first.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = (u64, Option<u32>)> + '_ {
        let first = self.newest.saturating_add(1).saturating_sub(self.slots.len() as u64);
        self.slots.iter().enumerate().map(move |(at, slot)| (first + at as u64, slot.checked_sub(1)))
    }

    /// The amount of a step, where it was measured.
    pub fn at(&self, step: u64) -> Option<u32> {
        let age = usize::try_from(self.newest()?.checked_sub(step)?).ok()?;
        let place = self.slots.len().checked_sub(age + 1)?;
        self.slots[place].checked_sub(1)
    }

    /// Puts a step in, `None` for one that was not measured. Steps from there on are forgotten, those in between are missing.
    fn put(&mut self, step: u64, amount: Option<u32>, most: usize) {
        self.cut(step);
        let Some(amount) = amount else { return };
        if let Some(newest) = self.newest() {
            // The oldest of a gap that is longer than the ring would fall out again.
            let gap = usize::try_from(step - newest - 1).unwrap_or(usize::MAX);
            if gap >= most {
                self.slots.clear();
            } else {
                self.slots.extend(std::iter::repeat_n(0, gap));
            }
        }
        self.newest = step;
        self.slots.push_back(amount.min(MAX_AMOUNT) + 1);
        let excess = self.slots.len().saturating_sub(most);
        self.slots.drain(..excess);
        self.tidy();
    }

    /// A ring begins and ends with something measured, or is empty: so the same past is always the same ring.
    fn tidy(&mut self) {
        while self.slots.back() == Some(&0) {
            self.slots.pop_back();
            self.newest = self.newest.saturating_sub(1);
        }
        while self.slots.front() == Some(&0) {
            self.slots.pop_front();
        }
        if self.slots.is_empty() {
            self.newest = 0;
        }
    }

    /// Forgets the steps from `step` on.
    fn cut(&mut self, step: u64) {
        let Some(newest) = self.newest().filter(|newest| *newest >= step) else { return };
        let excess = usize::try_from(newest - step + 1).unwrap_or(usize::MAX).min(self.slots.len());
        self.slots.truncate(self.slots.len() - excess);
        self.newest = step.saturating_sub(1);
        self.tidy();
    }

    /// What is newer than `step`.
    pub fn after(&self, step: u64) -> Self {
        let fresh = self.newest().map_or(0, |newest| newest.saturating_sub(step));
        let fresh = usize::try_from(fresh).unwrap_or(usize::MAX).min(self.slots.len());
        let slots = self.slots.range(self.slots.len() - fresh..).copied().collect();
        let mut later = Self { newest: self.newest, slots };
        later.tidy();
        later
    }

    /// Goes on with what was taken by [`Ring::after`].
    fn extend(&mut self, later: &Self, most: usize) {
        for (step, amount) in later.iter() {
            self.put(step, amount, most);
        }
    }

    fn sound(&self, most: usize) -> bool {
        self.slots.len() <= most && self.slots.len() as u64 <= self.newest.saturating_add(1)
    }
}

/// Steps of more than a second: mean and largest of their seconds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Coarse {
    /// Mean of the seconds measured.
    pub mean: Ring,
    /// Largest of them.
    pub max: Ring,
    /// The step that is not over yet.
    step: u64,
    sum: u64,
    seconds: u64,
    largest: u32,
}

impl Coarse {
    /// The ring of one of its two numbers.
    pub fn of(&self, of: Of) -> &Ring {
        match of {
            Of::Mean => &self.mean,
            Of::Max => &self.max,
        }
    }

    /// Takes a second in.
    fn take(&mut self, step: u64, amount: u32, length: u64, most: usize) {
        self.pass(step, length, most);
        self.sum = self.sum.saturating_add(u64::from(amount));
        self.seconds = self.seconds.saturating_add(1);
        self.largest = self.largest.max(amount);
    }

    /// A second that was taken in has turned out larger.
    fn note(&mut self, step: u64, amount: u32) {
        if self.step == step && self.seconds > 0 {
            self.largest = self.largest.max(amount);
        }
    }

    /// It is `step` now: whatever was before is over, whatever was to be then is not.
    fn pass(&mut self, step: u64, length: u64, most: usize) {
        if self.step == step {
            return;
        }
        if self.step < step && self.seconds > 0 {
            let measured = self.seconds >= length / MEASURED_PART;
            // The mean of amounts is one.
            let mean = u32::try_from(self.sum / self.seconds).unwrap_or(MAX_AMOUNT);
            self.mean.put(self.step, measured.then_some(mean), most);
            self.max.put(self.step, measured.then_some(self.largest), most);
        }
        self.mean.cut(step);
        self.max.cut(step);
        (self.step, self.sum, self.seconds, self.largest) = (step, 0, 0, 0);
    }

    fn after(&self, step: u64) -> Self {
        let (mean, max) = (self.mean.after(step), self.max.after(step));
        Self { mean, max, step: self.step, sum: self.sum, seconds: self.seconds, largest: self.largest }
    }

    fn extend(&mut self, later: &Self, most: usize) {
        self.mean.extend(&later.mean, most);
        self.max.extend(&later.max, most);
        (self.step, self.sum, self.seconds, self.largest) =
            (later.step, later.sum, later.seconds, later.largest);
    }

    fn sound(&self, length: u64, most: usize) -> bool {
        self.mean.sound(most)
            && self.max.sound(most)
            && self.mean.newest() == self.max.newest()
            && self.mean.len() == self.max.len()
            && self.seconds <= length
            && self.sum <= self.seconds.saturating_mul(self.largest.into())
            && self.largest <= MAX_AMOUNT
    }
}

/// The past of one resource.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rings {
    /// Every second.
    pub seconds: Ring,
    /// Every minute.
    pub minutes: Coarse,
    /// Every hour.
    pub hours: Coarse,
}

impl Rings {
    /// Takes the amount of the second `at` since the epoch.
    pub fn take(&mut self, at: u64, amount: u32) {
        let amount = amount.min(MAX_AMOUNT);
        if self.seconds.newest() == Some(at) {
            // That second counts once in what is coarser, too.
            let larger = self.seconds.at(at).map_or(amount, |before| before.max(amount));
            self.seconds.put(at, Some(larger), SECONDS);
            self.minutes.note(at / MINUTE, larger);
            self.hours.note(at / HOUR, larger);
            return;
        }
        self.seconds.put(at, Some(amount), SECONDS);
        self.minutes.take(at / MINUTE, amount, MINUTE, MINUTES);
        self.hours.take(at / HOUR, amount, HOUR, HOURS);
    }

    /// It is the second `at` now, whether anything was measured or not.
    pub fn pass(&mut self, at: u64) {
        self.seconds.cut(at.saturating_add(1));
        self.minutes.pass(at / MINUTE, MINUTE, MINUTES);
        self.hours.pass(at / HOUR, HOUR, HOURS);
    }

    /// All seconds, and of the rest what is newer than these minutes and hours.
    pub fn after(&self, minute: u64, hour: u64) -> Self {
        Self {
            seconds: self.seconds.clone(),
            minutes: self.minutes.after(minute),
            hours: self.hours.after(hour),
        }
    }

    /// Goes on with what was taken by [`Rings::after`].
    pub fn extend(&mut self, later: &Self) {
        self.seconds.extend(&later.seconds, SECONDS);
        self.minutes.extend(&later.minutes, MINUTES);
        self.hours.extend(&later.hours, HOURS);
    }

    /// Whether these could have come about.
    pub fn sound(&self) -> bool {
        self.seconds.sound(SECONDS) && self.minutes.sound(MINUTE, MINUTES) && self.hours.sound(HOUR, HOURS)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Some time in 2026, at the beginning of an hour.
    const NOW: u64 = 1_790_000_000 / HOUR * HOUR;

    fn every_second(rings: &mut Rings, from: u64, amounts: impl IntoIterator<Item = u32>) {
        for (after, amount) in amounts.into_iter().enumerate() {
            rings.take(from + after as u64, amount);
        }
    }

    #[test]
    fn a_minute_is_the_mean_and_the_largest_of_its_seconds() {
        let mut rings = Rings::default();
        every_second(&mut rings, NOW, (0..60).chain([7]));
        assert_eq!(rings.minutes.mean.iter().collect::<Vec<_>>(), [(NOW / 60, Some(29))]);
        assert_eq!(rings.minutes.max.at(NOW / 60), Some(59));
        assert_eq!((rings.seconds.len(), rings.seconds.at(NOW + 60)), (61, Some(7)));
        assert!(rings.hours.mean.is_empty(), "the hour is not over");
        every_second(&mut rings, NOW + 61, std::iter::repeat_n(100, 3600));
        assert_eq!(rings.hours.mean.at(NOW / HOUR), Some((29 * 60 + 30 + 7 + 100 * 3539) / 3600));
        assert_eq!((rings.seconds.len(), rings.minutes.mean.len()), (SECONDS, 61));
    }

    #[test]
    fn what_was_hardly_measured_is_missing() {
        let mut rings = Rings::default();
        every_second(&mut rings, NOW, std::iter::repeat_n(5, 60));
        every_second(&mut rings, NOW + 60, std::iter::repeat_n(5, 19));
        every_second(&mut rings, NOW + 120, std::iter::repeat_n(5, 20));
        rings.pass(NOW + 300);
        let minutes: Vec<_> = rings.minutes.mean.iter().map(|(_, amount)| amount).collect();
        assert_eq!(minutes, [Some(5), None, Some(5)]);
    }

    #[test]
    fn a_jump_ahead_leaves_a_gap_and_a_long_one_begins_anew() {
        let mut rings = Rings::default();
        every_second(&mut rings, NOW, [1, 2]);
        rings.take(NOW + 5, 3);
        let amounts: Vec<_> = rings.seconds.iter().map(|(_, amount)| amount).collect();
        assert_eq!(amounts, [Some(1), Some(2), None, None, None, Some(3)]);
        rings.take(NOW + 5 + SECONDS as u64 - 1, 4);
        assert_eq!(rings.seconds.len(), SECONDS, "the last second before the gap has just room");
        assert_eq!(rings.seconds.at(NOW + 5), Some(3));
        rings.take(u64::MAX / 2, 5);
        assert_eq!(rings.seconds.iter().collect::<Vec<_>>(), [(u64::MAX / 2, Some(5))]);
    }

    #[test]
    fn a_clock_that_is_set_back_forgets_what_comes_again() {
        let mut rings = Rings::default();
        every_second(&mut rings, NOW, std::iter::repeat_n(9, 600));
        rings.take(NOW + 130, 1);
        assert_eq!((rings.seconds.newest(), rings.seconds.len()), (Some(NOW + 130), 131));
        assert_eq!(rings.minutes.mean.newest(), Some(NOW / 60 + 1), "the third minute has begun again");
        every_second(&mut rings, NOW + 131, std::iter::repeat_n(1, 60));
        assert_eq!(rings.minutes.max.at(NOW / 60 + 2), Some(1));
    }

    #[test]
    fn two_samples_of_one_second_count_as_the_larger() {
        let mut rings = Rings::default();
        every_second(&mut rings, NOW, std::iter::repeat_n(4, 59));
        rings.take(NOW + 59, 4);
        rings.take(NOW + 59, 8);
        rings.pass(NOW + 60);
        assert_eq!(rings.seconds.at(NOW + 59), Some(8));
        let minute = NOW / 60;
        assert_eq!((rings.minutes.mean.at(minute), rings.minutes.max.at(minute)), (Some(4), Some(8)));
    }

    /// A clock that mostly ticks, sometimes stands, jumps or is set back, and amounts of any size.
    fn walks() -> impl Strategy<Value = Vec<(i64, u32)>> {
        let tick = prop_oneof![
            20 => Just(1_i64),
            2 => 0_i64..5,
            1 => 50_i64..5000,
            1 => -5000_i64..0,
            1 => Just(40 * 86_400),
            1 => Just(-40 * 86_400),
        ];
        let amount = prop_oneof![4 => 0_u32..4000, 1 => any::<u32>()];
        proptest::collection::vec((tick, amount), 0..800)
    }

    fn walk(steps: &[(i64, u32)], mut each: impl FnMut(u64, u32)) {
        let mut now = NOW as i64;
        for (tick, amount) in steps {
            now = (now + tick).max(0);
            each(now as u64, *amount);
        }
    }

    proptest! {
        #[test]
        fn whatever_the_clock_does_rings_are_bounded_and_end_now(steps in walks()) {
            let (mut rings, mut last, mut largest) = (Rings::default(), 0, 0);
            walk(&steps, |at, amount| {
                rings.take(at, amount);
                (last, largest) = (at, largest.max(amount.min(MAX_AMOUNT)));
            });
            prop_assert!(rings.sound());
            prop_assert_eq!(rings.seconds.newest(), (!steps.is_empty()).then_some(last));
            prop_assert!(rings.minutes.mean.newest().is_none_or(|newest| newest < last / MINUTE));
            prop_assert!(rings.hours.mean.newest().is_none_or(|newest| newest < last / HOUR));
            for coarse in [&rings.minutes, &rings.hours] {
                for ((step, mean), (same, max)) in coarse.mean.iter().zip(coarse.max.iter()) {
                    prop_assert!(step == same && mean.is_some() == max.is_some() && mean <= max);
                    prop_assert!(max.is_none_or(|max| max <= largest));
                }
            }
        }

        #[test]
        fn what_is_saved_in_two_parts_is_the_whole(before in walks(), after in walks()) {
            let mut rings = Rings::default();
            walk(&before, |at, amount| rings.take(at, amount));
            let saved = rings.clone();
            let newest = |rings: &Rings| {
                (rings.minutes.mean.newest().unwrap_or(0), rings.hours.mean.newest().unwrap_or(0))
            };
            let (minute, hour) = newest(&saved);
            // From there on time goes ahead: where it was set back the whole is saved again.
            let late = before.iter().map(|(tick, _)| tick.abs()).sum::<i64>() as u64;
            let after: Vec<_> = after.into_iter().map(|(tick, amount)| (tick.abs(), amount)).collect();
            walk(&after, |at, amount| rings.take(at + late, amount));
            let mut again = saved;
            again.extend(&rings.after(minute, hour));
            prop_assert_eq!(&again.minutes, &rings.minutes);
            prop_assert_eq!(&again.hours, &rings.hours);
            prop_assert_eq!(again.seconds.newest(), rings.seconds.newest());
        }
    }
}
