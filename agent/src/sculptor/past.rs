//! What a resource was wanted for: the largest of each minute of the last hour, and of each ten minutes of the last day.
//!
//! Steps without a look hold what was seen before them: a machine that is paused wants again what it wanted.

use std::collections::VecDeque;

const MINUTE_MSEC: u64 = 60_000;
const TEN_MSEC: u64 = 600_000;
/// Milliseconds of a day.
pub const DAY_MSEC: u64 = 86_400_000;
/// Up to here minutes are looked at.
const HOUR_MSEC: u64 = 3_600_000;

/// Largest amounts of consecutive steps, the newest last.
#[derive(Clone, Debug)]
struct Tops {
    length_msec: u64,
    most: usize,
    newest: u64,
    amounts: VecDeque<u64>,
}

impl Tops {
    fn new(length_msec: u64, most: usize) -> Self {
        Self { length_msec, most, newest: 0, amounts: VecDeque::new() }
    }

    fn take(&mut self, now_msec: u64, amount: u64) {
        let step = now_msec / self.length_msec;
        match self.amounts.back_mut() {
            Some(top) if step <= self.newest => *top = amount.max(*top),
            Some(top) => {
                let (held, gap) = (*top, step - self.newest - 1);
                let gap = usize::try_from(gap).unwrap_or(usize::MAX).min(self.most);
                self.amounts.extend(std::iter::repeat_n(held, gap));
                self.amounts.push_back(amount);
                self.newest = step;
            }
            None => {
                self.amounts.push_back(amount);
                self.newest = step;
            }
        }
        let excess = self.amounts.len().saturating_sub(self.most);
        self.amounts.drain(..excess);
    }

    /// Over the last `over_msec`, and the rest of the step in which they begin.
    fn top(&self, over_msec: u64) -> u64 {
        let steps =
            usize::try_from(over_msec.div_ceil(self.length_msec)).unwrap_or(usize::MAX).saturating_add(1);
        self.amounts.iter().rev().take(steps).copied().max().unwrap_or(0)
    }
}

/// The past of one resource of one machine.
#[derive(Clone, Debug)]
pub(super) struct Past {
    begun_msec: Option<u64>,
    minutes: Tops,
    tens: Tops,
}

impl Past {
    pub(super) fn new() -> Self {
        Self {
            begun_msec: None,
            minutes: Tops::new(MINUTE_MSEC, (HOUR_MSEC / MINUTE_MSEC) as usize + 1),
            tens: Tops::new(TEN_MSEC, (DAY_MSEC / TEN_MSEC) as usize + 1),
        }
    }

    /// Takes in what is wanted at a time that is never before the last.
    pub(super) fn take(&mut self, now_msec: u64, amount: u64) {
        self.begun_msec.get_or_insert(now_msec);
        self.minutes.take(now_msec, amount);
        self.tens.take(now_msec, amount);
    }

    /// How much of the past is known, milliseconds.
    pub(super) fn known_msec(&self, now_msec: u64) -> u64 {
        self.begun_msec.map_or(0, |begun| now_msec.saturating_sub(begun))
    }

    /// The largest amount of the last `over_msec`, of a minute or ten more.
    pub(super) fn top(&self, over_msec: u64) -> u64 {
        let tops = if over_msec < HOUR_MSEC { &self.minutes } else { &self.tens };
        tops.top(over_msec)
    }

    /// How far demand went within `ahead_msec` each time that it rose above `level` in the last day; ascending. The ten minutes that are not
    /// over do not count.
    pub(super) fn jumps(&self, level: u64, ahead_msec: u64) -> Vec<u64> {
        let ahead = usize::try_from(ahead_msec.div_ceil(TEN_MSEC)).unwrap_or(usize::MAX).max(1);
        let over: Vec<u64> =
            self.tens.amounts.iter().take(self.tens.amounts.len().saturating_sub(1)).copied().collect();
        let rises = (1..over.len()).filter(|&at| over[at - 1] <= level && over[at] > level);
        let peak = |at: usize| over[at..over.len().min(at.saturating_add(ahead))].iter().copied().max();
        let mut peaks: Vec<u64> = rises.filter_map(peak).collect();
        peaks.sort_unstable();
        peaks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_of_a_time_is_known_and_forgotten_after_it() {
        let mut past = Past::new();
        for minute in 0..200 {
            past.take(minute * MINUTE_MSEC, if minute == 100 { 900 } else { minute });
        }
        let top = |minutes| past.top(minutes * MINUTE_MSEC);
        assert_eq!([top(1), top(59), top(60), top(98), top(110), top(5000)], [199, 199, 199, 900, 900, 900]);
        assert_eq!(past.known_msec(199 * MINUTE_MSEC), 199 * MINUTE_MSEC);
    }

    #[test]
    fn a_pause_holds_what_was_before_it_and_takes_no_room() {
        let mut past = Past::new();
        past.take(0, 70);
        past.take(u64::MAX, 5);
        assert_eq!((past.top(MINUTE_MSEC), past.top(DAY_MSEC)), (70, 70));
        assert!(past.minutes.amounts.len() <= 61 && past.tens.amounts.len() <= 145);
    }

    #[test]
    fn jumps_are_found_with_how_far_they_went() {
        let mut past = Past::new();
        let tens = [10, 50, 80, 10, 10, 30, 10, 10, 50, 20, 90, 10];
        for (at, amount) in tens.into_iter().enumerate() {
            past.take(at as u64 * TEN_MSEC, amount);
        }
        assert_eq!(past.jumps(20, 2 * TEN_MSEC), [30, 50, 80, 90]);
        assert_eq!(past.jumps(20, HOUR_MSEC), [80, 90, 90, 90]);
        assert!(past.jumps(95, HOUR_MSEC).is_empty());
    }
}
