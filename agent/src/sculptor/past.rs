//! What a resource was wanted for: each minute of the last hour, and the largest of them of each ten minutes of the last day.
//!
//! Of a minute counts what is forecast of it: the mean, of memory the largest. What passes within a minute is for whoever reacts. Steps without
//! a look hold what was seen before them: a machine that is paused wants again what it wanted.

use std::collections::VecDeque;

use super::outlook::MAX_AMOUNT;
use crate::foresight::Of;

const MINUTE_MSEC: u64 = 60_000;
const TEN_MSEC: u64 = 600_000;
/// Milliseconds of a day.
pub(super) const DAY_MSEC: u64 = 86_400_000;
/// Up to here minutes are looked at.
const HOUR_MSEC: u64 = 3_600_000;
/// Time in which most of what was wanted before is forgotten by `Past::lasting`.
const LASTING_MSEC: u64 = 30_000;
/// Time in which what was short is forgotten, when it no longer is.
const DEBT_MSEC: u64 = 1_800_000;

/// Largest amounts of consecutive steps, the newest last.
#[derive(Clone, Debug)]
struct Tops {
    length_msec: u64,
    most: usize,
    newest: u64,
    amounts: VecDeque<u64>,
}

impl Tops {
    fn new(length_msec: u64, most_msec: u64) -> Self {
        let most = usize::try_from(most_msec / length_msec).unwrap_or(usize::MAX).saturating_add(1);
        Self { length_msec, most, newest: 0, amounts: VecDeque::new() }
    }

    fn take(&mut self, at_msec: u64, amount: u64) {
        let step = at_msec / self.length_msec;
        match self.amounts.back_mut() {
            Some(top) if step <= self.newest => {
                *top = amount.max(*top);
                return;
            }
            Some(top) => {
                let (held, gap) = (*top, step - self.newest - 1);
                let gap = usize::try_from(gap).unwrap_or(usize::MAX).min(self.most);
                self.amounts.extend(std::iter::repeat_n(held, gap));
            }
            None => {}
        }
        self.amounts.push_back(amount);
        self.newest = step;
        let excess = self.amounts.len().saturating_sub(self.most);
        self.amounts.drain(..excess);
    }

    /// Over the last `over_msec`, and the rest of the step in which they begin.
    fn top(&self, over_msec: u64) -> u64 {
        let steps = over_msec.div_ceil(self.length_msec).saturating_add(1);
        let steps = usize::try_from(steps).unwrap_or(usize::MAX);
        self.amounts.iter().rev().take(steps).copied().max().unwrap_or(0)
    }
}

/// The minute that is not over.
#[derive(Clone, Copy, Debug, Default)]
struct Open {
    minute: u64,
    sum: u64,
    looks: u64,
    largest: u64,
}

/// What came of a rise of demand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Jump {
    /// The largest within the time looked at.
    pub(super) peak: u64,
    /// The mean of the ten minutes of that time, each by its largest.
    pub(super) mean: u64,
}

/// The past of one resource of one machine.
#[derive(Clone, Debug)]
pub(super) struct Past {
    of: Of,
    begun_msec: Option<u64>,
    last_msec: u64,
    /// What is wanted for longer than a moment: the mean of the last half minute or so.
    lasting: u64,
    /// What was wanted of late and not there, amount times milliseconds.
    debt: u128,
    open: Open,
    minutes: Tops,
    tens: Tops,
}

impl Past {
    pub(super) fn new(of: Of) -> Self {
        Self {
            of,
            begun_msec: None,
            last_msec: 0,
            lasting: 0,
            debt: 0,
            open: Open::default(),
            minutes: Tops::new(MINUTE_MSEC, HOUR_MSEC),
            tens: Tops::new(TEN_MSEC, DAY_MSEC),
        }
    }

    /// What is known from before, as if it had been looked at since: minutes that end now, the oldest first.
    ///
    /// Where more than ten minutes were not measured nobody knows what was wanted, so that patience begins anew after them.
    pub(super) fn recalled(of: Of, now_msec: u64, minutes: &[Option<u64>]) -> Self {
        let mut past = Self::new(of);
        let most = usize::try_from(DAY_MSEC / MINUTE_MSEC).unwrap_or(usize::MAX);
        let minutes = &minutes[minutes.len().saturating_sub(most)..];
        let begin = now_msec.saturating_sub(minutes.len() as u64 * MINUTE_MSEC);
        let mut until_msec = begin;
        for (at_msec, amount) in (0..).map(|minute| begin + minute * MINUTE_MSEC).zip(minutes) {
            let Some(amount) = amount.map(|amount| amount.min(MAX_AMOUNT)) else { continue };
            if past.begun_msec.is_none() || at_msec - until_msec > TEN_MSEC {
                past.begun_msec = Some(at_msec);
            }
            until_msec = at_msec + MINUTE_MSEC;
            past.minutes.take(at_msec, amount);
            past.tens.take(at_msec, amount);
            past.lasting = amount;
        }
        past.begun_msec = past.begun_msec.filter(|_| now_msec.saturating_sub(until_msec) <= TEN_MSEC);
        (past.last_msec, past.open.minute) = (now_msec, now_msec / MINUTE_MSEC);
        past
    }

    /// Takes in what is wanted beside what is granted, at a time that is never before the last.
    pub(super) fn take(&mut self, now_msec: u64, amount: u64, granted: u64) {
        let amount = amount.min(MAX_AMOUNT);
        let minute = now_msec / MINUTE_MSEC;
        if self.begun_msec.is_none() {
            (self.begun_msec, self.open.minute) = (Some(now_msec), minute);
        }
        if minute > self.open.minute {
            self.end_minute();
            self.open = Open { minute, ..Open::default() };
        }
        let passed = now_msec.saturating_sub(self.last_msec);
        self.last_msec = now_msec;
        let part = passed.min(LASTING_MSEC);
        // Paid back by time in which nothing is short, the faster the more was paid.
        let paid = self.debt / u128::from(DEBT_MSEC / passed.clamp(1, DEBT_MSEC));
        let owed = u128::from(amount.saturating_sub(granted)) * u128::from(passed.min(LASTING_MSEC));
        self.debt = if owed > 0 { self.debt.saturating_add(owed) } else { self.debt - paid };
        let sum = u128::from(self.lasting) * u128::from(LASTING_MSEC - part)
            + u128::from(amount) * u128::from(part);
        // A mean of amounts is one.
        self.lasting = u64::try_from(sum / u128::from(LASTING_MSEC)).unwrap_or(MAX_AMOUNT);
        self.open.sum = self.open.sum.saturating_add(amount);
        self.open.looks += 1;
        self.open.largest = self.open.largest.max(amount);
    }

    fn end_minute(&mut self) {
        let amount = match self.of {
            Of::Mean => self.open.sum / self.open.looks.max(1),
            Of::Max => self.open.largest,
        };
        let at_msec = self.open.minute * MINUTE_MSEC;
        self.minutes.take(at_msec, amount);
        self.tens.take(at_msec, amount);
    }

    /// What was wanted of late and not there, amount times milliseconds.
    pub(super) fn debt(&self) -> u128 {
        self.debt
    }

    /// Another grant: what was short of the one before it is no longer.
    pub(super) fn settle(&mut self) {
        self.debt = 0;
    }

    /// How much of the past is known, milliseconds.
    pub(super) fn known_msec(&self, now_msec: u64) -> u64 {
        self.begun_msec.map_or(0, |begun| now_msec.saturating_sub(begun))
    }

    /// The largest minute of the last `over_msec`, of a minute or ten more. The one that is not over counts as what lasts in it.
    pub(super) fn top(&self, over_msec: u64) -> u64 {
        let tops = if over_msec < HOUR_MSEC { &self.minutes } else { &self.tens };
        tops.top(over_msec).max(self.lasting)
    }

    /// Mean of the last day's ten minutes, each by its largest.
    pub(super) fn usual(&self) -> u64 {
        let tops = &self.tens.amounts;
        tops.iter().sum::<u64>().checked_div(tops.len() as u64).unwrap_or(self.lasting)
    }

    /// How much more than `amount` was wanted in the mean of the last `over_msec`.
    pub(super) fn beyond(&self, over_msec: u64, amount: u64) -> u64 {
        let tops = if over_msec < HOUR_MSEC { &self.minutes } else { &self.tens };
        let steps = usize::try_from(over_msec.div_ceil(tops.length_msec)).unwrap_or(usize::MAX).max(1);
        let of = tops.amounts.iter().rev().take(steps);
        let count = of.len() as u64;
        of.map(|top| top.saturating_sub(amount)).sum::<u64>().div_ceil(count.max(1))
    }

    /// How many times within `ahead_msec` demand will rise above `level`, if it goes on as in the last day; thousandths.
    pub(super) fn rises_permille(&self, level: u64, ahead_msec: u64) -> u64 {
        let tops = &self.tens.amounts;
        let pairs = tops.iter().zip(tops.iter().skip(1));
        let rises = pairs.filter(|(before, after)| **before <= level && **after > level).count() as u64;
        let known = (tops.len() as u64).max(1) * TEN_MSEC;
        (rises * 1000).saturating_mul(ahead_msec) / known
    }

    /// What came within `ahead_msec` of each rise of demand above `level` in the last day, by how far it went. The ten minutes that are not over
    /// do not count.
    pub(super) fn jumps(&self, level: u64, ahead_msec: u64) -> Vec<Jump> {
        let ahead = usize::try_from(ahead_msec.div_ceil(TEN_MSEC)).unwrap_or(usize::MAX).max(1);
        let tops = &self.tens.amounts;
        let over = tops.len().saturating_sub(1);
        let rises = (1..over).filter(|&at| tops[at - 1] <= level && tops[at] > level);
        let of = |at: usize| {
            let ahead = tops.range(at..over.min(at.saturating_add(ahead)));
            let count = ahead.len() as u64;
            let (peak, sum) = ahead.fold((0, 0), |(peak, sum), top| (top.max(&peak).to_owned(), sum + top));
            Jump { peak, mean: sum / count.max(1) }
        };
        let mut jumps: Vec<Jump> = rises.map(of).collect();
        jumps.sort_unstable();
        jumps
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_of_a_time_is_known_and_forgotten_after_it() {
        let mut past = Past::new(Of::Max);
        for minute in 0..200 {
            past.take(minute * MINUTE_MSEC, if minute == 100 { 900 } else { minute }, u64::MAX);
        }
        let top = |minutes| past.top(minutes * MINUTE_MSEC);
        assert_eq!([top(1), top(59), top(60), top(98), top(110), top(5000)], [199, 199, 199, 900, 900, 900]);
        assert_eq!(past.known_msec(199 * MINUTE_MSEC), 199 * MINUTE_MSEC);
    }

    #[test]
    fn of_rates_the_mean_of_a_minute_counts_and_a_moment_does_not() {
        let [mut rate, mut memory] = [Of::Mean, Of::Max].map(Past::new);
        for turn in 0..=24 {
            for past in [&mut rate, &mut memory] {
                past.take(turn * 5000, if turn == 3 { 700 } else { 100 }, u64::MAX);
            }
        }
        assert_eq!((rate.top(2 * MINUTE_MSEC), memory.top(2 * MINUTE_MSEC)), (150, 700));
        assert!((100..=110).contains(&rate.lasting), "{}", rate.lasting);
    }

    #[test]
    fn a_pause_holds_what_was_before_it_and_takes_no_room() {
        let mut past = Past::new(Of::Mean);
        past.take(0, 70, u64::MAX);
        past.take(MINUTE_MSEC, 70, u64::MAX);
        past.take(u64::MAX - 1, 5, u64::MAX);
        past.take(u64::MAX, 5, u64::MAX);
        assert_eq!((past.top(MINUTE_MSEC), past.top(DAY_MSEC)), (70, 70));
        assert!(past.minutes.amounts.len() <= 61 && past.tens.amounts.len() <= 145);
    }

    #[test]
    fn what_is_recalled_is_as_if_it_had_been_seen() {
        // Quiet at last: what lasts for half a minute is not known of minutes.
        let amount = |minute: u64| match minute % 180 {
            60..75 => 900,
            _ if minute > 950 => 100,
            other => 100 + other % 7,
        };
        let (mut seen, minutes) = (Past::new(Of::Max), 1000);
        for minute in 0..minutes {
            seen.take(DAY_MSEC + minute * MINUTE_MSEC, amount(minute), u64::MAX);
        }
        let now = DAY_MSEC + minutes * MINUTE_MSEC;
        seen.take(now, amount(minutes), u64::MAX);
        let told: Vec<Option<u64>> = (0..minutes).map(|minute| Some(amount(minute))).collect();
        let mut past = Past::recalled(Of::Max, now, &told);
        past.take(now, amount(minutes), u64::MAX);
        assert_eq!(past.known_msec(now), seen.known_msec(now));
        for look in [MINUTE_MSEC, TEN_MSEC, HOUR_MSEC, DAY_MSEC] {
            assert_eq!(
                (past.top(look), past.beyond(look, 200)),
                (seen.top(look), seen.beyond(look, 200)),
                "{look}"
            );
        }
        assert_eq!((past.usual(), past.jumps(200, HOUR_MSEC)), (seen.usual(), seen.jumps(200, HOUR_MSEC)));
        let missing = Past::recalled(Of::Mean, now, &[None; 30]);
        assert_eq!((missing.known_msec(now), missing.top(DAY_MSEC)), (0, 0));
        // An hour, a gap, half an hour: of the hour it is known how far it went, and not that it is over for so long.
        let gap = |missing: usize, after: usize| {
            let minutes = [vec![Some(900); 60], vec![None; missing], vec![Some(100); after]].concat();
            let past = Past::recalled(Of::Mean, now, &minutes);
            (past.known_msec(now) / MINUTE_MSEC, past.top(DAY_MSEC))
        };
        assert_eq!([gap(10, 30), gap(11, 30)], [(100, 900), (30, 900)]);
        assert_eq!([gap(10, 0), gap(11, 0)], [(70, 900), (0, 900)], "until now");
        let long = Past::recalled(Of::Mean, now, &vec![Some(u64::MAX); 5000]);
        assert_eq!((long.known_msec(now), long.top(DAY_MSEC)), (DAY_MSEC, MAX_AMOUNT));
    }

    #[test]
    fn jumps_are_found_with_what_came_of_them() {
        let mut past = Past::new(Of::Max);
        let tens = [10, 50, 80, 10, 10, 30, 10, 10, 50, 20, 90, 10, 10];
        for (at, amount) in tens.into_iter().enumerate() {
            past.take(at as u64 * TEN_MSEC, amount, u64::MAX);
        }
        let peaks = |level, ahead| past.jumps(level, ahead).iter().map(|jump| jump.peak).collect::<Vec<_>>();
        assert_eq!(peaks(20, 2 * TEN_MSEC), [30, 50, 80, 90]);
        assert_eq!(peaks(20, HOUR_MSEC), [80, 90, 90, 90]);
        assert_eq!(past.jumps(20, 2 * TEN_MSEC)[2], Jump { peak: 80, mean: 65 });
        assert!(past.jumps(95, HOUR_MSEC).is_empty());
    }
}
