//! How a grant met what was asked for, over the last day: what of it was idle, and what was missing.
//!
//! An hour each, so that a day takes 25 sums and not 86,400 readings. Only seconds count of which both are known.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::ring::HOUR;

/// Hours that are kept: the last day, and the one that is not over.
const HOURS: usize = 25;
/// Of these, what counts as the last day.
const DAY: u64 = 24;

/// Sums over seconds, in the resource's unit times seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sums {
    /// How many.
    pub seconds: u64,
    /// What was granted.
    pub granted: u64,
    /// What was asked for.
    pub asked: u64,
    /// What was granted and not asked for.
    pub unused: u64,
    /// What was asked for beyond the grant.
    pub missing: u64,
    /// Seconds in which something was.
    pub short_seconds: u64,
}

impl Sums {
    fn add(&mut self, more: &Self) {
        let sums = [
            (&mut self.seconds, more.seconds),
            (&mut self.granted, more.granted),
            (&mut self.asked, more.asked),
            (&mut self.unused, more.unused),
            (&mut self.missing, more.missing),
            (&mut self.short_seconds, more.short_seconds),
        ];
        for (sum, more) in sums {
            *sum = sum.saturating_add(more);
        }
    }

    /// `part` of `whole`, thousandths, rounded up: little is not nothing.
    pub fn permille(part: u64, whole: u64) -> u64 {
        let permille = (u128::from(part) * 1000).div_ceil(u128::from(whole.max(1)));
        u64::try_from(permille).unwrap_or(u64::MAX)
    }
}

/// The last day of one resource.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Account {
    /// Hours since the epoch and their sums, the newest last.
    hours: VecDeque<(u64, Sums)>,
}

impl Account {
    /// Takes the second `at` since the epoch. Where the clock was set back, what is to come again is forgotten.
    pub fn take(&mut self, at: u64, granted: u64, asked: u64) {
        let hour = at / HOUR;
        while self.hours.back().is_some_and(|(newest, _)| *newest > hour) {
            self.hours.pop_back();
        }
        if self.hours.back().is_none_or(|(newest, _)| *newest != hour) {
            self.hours.push_back((hour, Sums::default()));
        }
        let missing = asked.saturating_sub(granted);
        let second = Sums {
            seconds: 1,
            granted,
            asked,
            unused: granted.saturating_sub(asked),
            missing,
            short_seconds: u64::from(missing > 0),
        };
        if let Some((_, sums)) = self.hours.back_mut() {
            sums.add(&second);
        }
        let excess = self.hours.len().saturating_sub(HOURS);
        self.hours.drain(..excess);
    }

    /// Whether it is one that this build could have made: hours ascend, and are no more than there can be.
    pub fn sound(&self) -> bool {
        self.hours.len() <= HOURS && self.hours.iter().is_sorted_by(|(one, _), (other, _)| one < other)
    }

    /// When the oldest hour that is known began, seconds since the epoch.
    pub fn since(&self) -> Option<u64> {
        self.hours.front().map(|(hour, _)| hour.saturating_mul(HOUR))
    }

    /// The last 24 hours before the second `at`, whole ones, and what has passed of the present one.
    pub fn day(&self, at: u64) -> Sums {
        let mut sums = Sums::default();
        let now = at / HOUR;
        let counts = |hour: &u64| *hour <= now && now - hour <= DAY;
        self.hours.iter().filter(|(hour, _)| counts(hour)).for_each(|(_, hour)| sums.add(hour));
        sums
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_day_is_summed_and_older_hours_are_forgotten() {
        let mut account = Account::default();
        for second in 0..30 * HOUR {
            account.take(second, 500, if second % 10 == 0 { 600 } else { 300 });
        }
        let day = account.day(30 * HOUR - 1);
        let seconds = 25 * HOUR;
        assert_eq!((day.seconds, day.granted), (seconds, 500 * seconds));
        assert_eq!((day.missing, day.short_seconds), (10 * seconds, seconds / 10));
        assert_eq!((day.asked, day.unused), (330 * seconds, 180 * seconds));
        assert_eq!(Sums::permille(day.missing, day.asked), 31);
        assert_eq!((Sums::permille(1, u64::MAX), Sums::permille(0, 0)), (1, 0));
        assert_eq!(account.day(53 * HOUR).seconds, HOUR, "all but the last hour is older than a day");
        assert_eq!(account.day(55 * HOUR), Sums::default());
    }

    #[test]
    fn only_what_could_have_been_made_here_is_sound() {
        let mut account = Account::default();
        assert!(account.sound() && account.since().is_none());
        account.take(10 * HOUR + 5, 1, 1);
        account.take(12 * HOUR, 1, 1);
        assert!(account.sound() && account.since() == Some(10 * HOUR));
        account.hours.push_back((12, Sums::default()));
        assert!(!account.sound(), "an hour that is there twice");
        account.hours = (0..=HOURS as u64).map(|hour| (hour, Sums::default())).collect();
        assert!(!account.sound(), "more than are kept");
    }

    #[test]
    fn a_clock_that_is_set_back_counts_no_hour_twice() {
        let mut account = Account::default();
        account.take(10 * HOUR, 1, 1);
        account.take(9 * HOUR, 1, 1);
        account.take(u64::MAX, u64::MAX, 0);
        account.take(u64::MAX, u64::MAX, 0);
        assert_eq!(account.day(9 * HOUR).seconds, 1);
        assert_eq!(account.day(u64::MAX).granted, u64::MAX);
    }
}
