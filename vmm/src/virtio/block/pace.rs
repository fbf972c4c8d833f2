//! Rates in time: when the next request may go, and whose turn it is. Nothing here reads a clock.
//!
//! Each unit takes a slot of 1/rate seconds, and the next one may go when the slots before are over (the generic cell rate algorithm of
//! ITU-T I.371, virtual scheduling). Slots are counted in whole nanoseconds and a remainder, so no rate is rounded.
//!
//! ```text
//! take ─▶│ slot │ slot │ slot │▶ due        nobody takes any: due stays up to a burst behind the present, and no further
//! ```
//! What lies behind the present is credit: a wake-up that comes late costs nothing, and over any time `t` no more goes than
//! rate × (t + burst) + 1. Without credit 1 % of a rate would be lost with each wake-up that is 1 % of a slot late; with the refills
//! of a token bucket a guest would stand still between them.
//!
//! Disks share a rate in turns: who is not in time waits in a line, and goes on for as long as there are slots when it is first.

use std::collections::VecDeque;

/// Nanoseconds of a clock that never goes backwards.
pub type Nsec = u64;

const SECOND_NSEC: u64 = 1_000_000_000;
/// How much time may be caught up with, or one unit's if that is longer: more than timers are late on a host that works, less than anybody
/// measures a rate over.
pub const BURST_NSEC: Nsec = 10_000_000;
/// A disk that waits is looked at so often at most, whatever the rate: what was due meanwhile goes together.
pub const PAUSE_NSEC: Nsec = 100_000;

/// One rate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pacer {
    /// Units per second; 0 is unlimited.
    per_sec: u64,
    /// When the slots taken are over, without the rest.
    next: Nsec,
    /// What is missing to `next`, in parts of a nanosecond of which there are `per_sec`.
    rest: u64,
}

impl Pacer {
    /// When the next unit may go: now, if that is past.
    pub fn due(&self) -> Nsec {
        self.next.saturating_add(u64::from(self.rest > 0))
    }

    /// Takes the slots of `units` that go at `now`.
    pub fn take(&mut self, now: Nsec, units: u64) {
        if self.per_sec == 0 {
            return;
        }
        self.limit_credit(now);
        let parts = u128::from(units) * u128::from(SECOND_NSEC) + u128::from(self.rest);
        let per_sec = u128::from(self.per_sec);
        self.next = self.next.saturating_add(u64::try_from(parts / per_sec).unwrap_or(Nsec::MAX));
        // Less than the rate, which has 64 bits.
        self.rest = (parts % per_sec) as u64;
    }

    /// How much time may be caught up with: one unit at least, for a slow rate is not to lose more to late timers than a fast one.
    fn burst(&self) -> Nsec {
        SECOND_NSEC.checked_div(self.per_sec).unwrap_or(0).max(BURST_NSEC)
    }

    fn limit_credit(&mut self, now: Nsec) {
        let earliest = now.saturating_sub(self.burst());
        if self.next < earliest {
            (self.next, self.rest) = (earliest, 0);
        }
    }

    /// Another rate from `now` on. What is waited for, or may be caught up with, stays the same number of units, so changes in a row give
    /// nothing away and take nothing; a rate that was unlimited leaves no credit.
    pub fn set(&mut self, now: Nsec, per_sec: u64) {
        let burst = self.burst();
        let before = std::mem::replace(&mut self.per_sec, per_sec);
        if before == per_sec {
            return;
        }
        let scaled = |time: Nsec| {
            let time = u128::from(time) * u128::from(before) / u128::from(per_sec.max(1));
            u64::try_from(time).unwrap_or(Nsec::MAX)
        };
        let due = self.due();
        self.next = match (before, per_sec) {
            (_, 0) => 0,
            (0, _) => now,
            _ if due > now => now.saturating_add(scaled(due - now)),
            _ => now.saturating_sub(scaled((now - due).min(burst)).min(self.burst())),
        };
        self.rest = 0;
    }
}

/// What the disks of a machine may do together, and the line in front of it.
#[derive(Debug, Default)]
pub struct Budget {
    ops: Pacer,
    bytes: Pacer,
    /// Disks that wait, by number, in the order in which they go.
    line: VecDeque<u32>,
    /// Whose turn it is, for as long as there are slots.
    turn: Option<u32>,
}

impl Budget {
    /// Other rates from `now` on; 0 is unlimited. The line is empty then: everybody who waits is to ask again.
    pub fn set(&mut self, now: Nsec, ops_per_sec: u64, bytes_per_sec: u64) {
        self.line.clear();
        self.turn = None;
        self.ops.set(now, ops_per_sec);
        self.bytes.set(now, bytes_per_sec);
    }

    /// Whether disk `number` may start a request at `now`.
    ///
    /// # Errors
    /// When to ask again, at least [`PAUSE_NSEC`] later; until it has, or [leaves](Budget::leave), it stands in the line.
    pub fn ask(&mut self, number: u32, now: Nsec) -> Result<(), Nsec> {
        let due = self.ops.due().max(self.bytes.due());
        let first = self.line.front().is_none_or(|first| *first == number);
        if due <= now && (first || self.turn == Some(number)) {
            self.line.retain(|waiting| *waiting != number);
            self.turn = Some(number);
            return Ok(());
        }
        if self.turn == Some(number) {
            self.turn = None;
        }
        if !self.line.contains(&number) {
            self.line.push_back(number);
        }
        Err(due.max(now.saturating_add(PAUSE_NSEC)))
    }

    /// A request of `bytes` starts at `now`. Its size is paid for afterwards: the guest can change it until it is read.
    pub fn take(&mut self, now: Nsec, bytes: u64) {
        self.ops.take(now, 1);
        self.bytes.take(now, bytes);
    }

    /// Disk `number` wants nothing at the moment.
    pub fn leave(&mut self, number: u32) {
        self.line.retain(|waiting| *waiting != number);
        self.turn = self.turn.filter(|turn| *turn != number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const START: Nsec = 77 * SECOND_NSEC;

    fn budget(ops: u64, bytes: u64) -> Budget {
        let mut budget = Budget::default();
        budget.set(START, ops, bytes);
        budget
    }

    fn budget_of_one() -> Budget {
        budget(1, 0)
    }

    /// Requests of `bytes` as fast as they may go until `end`, each wake-up late by what `late` says; when each went.
    fn saturate(budget: &mut Budget, end: Nsec, bytes: u64, mut late: impl FnMut() -> Nsec) -> Vec<Nsec> {
        let (mut now, mut went) = (START, Vec::new());
        while now < end {
            match budget.ask(0, now) {
                Ok(()) => {
                    budget.take(now, bytes);
                    went.push(now);
                }
                Err(at) => {
                    assert!(at >= now + PAUSE_NSEC, "it would spin");
                    now = at + late();
                }
            }
        }
        went
    }

    #[test]
    fn every_rate_is_delivered_to_the_request_by_timers_that_are_on_time() {
        for rate in [1, 3, 7, 50, 500, 999, 50_000, 333_333] {
            let seconds = if rate < 1000 { 1000 } else { 10 };
            let end = START + seconds * SECOND_NSEC;
            let went = saturate(&mut budget(rate, 0), end, 4096, || 0).len() as u64;
            // The first goes at once, and what is within one pause may miss the end.
            let pause = rate * PAUSE_NSEC / SECOND_NSEC + 1;
            assert!((rate * seconds - pause..=rate * seconds + 1).contains(&went), "{rate}: {went}");
        }
    }

    #[test]
    fn bytes_are_exact_whatever_the_requests_are() {
        for (rate, bytes) in [(1_000_000, 4096), (10_000_000, 1 << 20), (123_457, 512)] {
            let end = START + 100 * SECOND_NSEC;
            let moved = saturate(&mut budget(0, rate), end, bytes, || 0).len() as u64 * bytes;
            assert!(
                (rate * 100..rate * 100 + bytes + rate / 100).contains(&moved),
                "{rate} {bytes}: {moved}"
            );
        }
    }

    #[test]
    fn the_stricter_of_both_rates_counts() {
        let end = START + 10 * SECOND_NSEC;
        assert_eq!(saturate(&mut budget(100, 1 << 30), end, 4096, || 0).len(), 1000);
        assert_eq!(saturate(&mut budget(1_000_000, 40_960), end, 4096, || 0).len(), 100);
    }

    #[test]
    fn unlimited_takes_nothing_and_extremes_do_not_overflow() {
        let mut pacer = Pacer::default();
        pacer.take(START, u64::MAX);
        assert_eq!(pacer, Pacer::default());
        pacer.set(START, 1);
        pacer.take(START, u64::MAX);
        assert_eq!(pacer.due(), Nsec::MAX, "for ever");
        pacer.set(START, u64::MAX);
        pacer.take(START, 1);
        pacer.set(START, 0);
        assert_eq!(pacer.due(), 0, "nobody waits for what is unlimited");
    }

    #[test]
    fn idle_time_is_credit_for_one_burst_only() {
        let mut budget = budget(1000, 0);
        let later = START + 3600 * SECOND_NSEC;
        let mut burst = 0;
        while budget.ask(0, later).is_ok() {
            budget.take(later, 0);
            burst += 1;
        }
        assert_eq!(burst, 11, "10 ms of 1000 iops, and the one that is due");
    }

    #[test]
    fn a_change_counts_at_once_and_many_changes_give_nothing_away() {
        let mut slow = budget(1, 0);
        assert_eq!(slow.ask(0, START), Ok(()));
        slow.take(START, 0);
        assert_eq!(slow.ask(0, START), Err(START + SECOND_NSEC));
        slow.set(START + SECOND_NSEC / 2, 100, 0);
        assert_eq!(slow.ask(0, START + SECOND_NSEC / 2), Err(START + SECOND_NSEC / 2 + 5_000_000));
        // Back and forth every millisecond for ten seconds.
        let (mut budget, mut went) = (budget(100, 0), 0);
        for msec in 0..10_000 {
            let now = START + msec * 1_000_000;
            budget.set(now, if msec % 2 == 0 { 100 } else { 300 }, 0);
            while budget.ask(0, now).is_ok() {
                budget.take(now, 0);
                went += 1;
            }
        }
        assert!((1980..=2005).contains(&went), "{went} went where 200 a second are the mean");
    }

    #[test]
    fn disks_take_turns_and_none_waits_for_one_that_wants_nothing() {
        // Both always want; both look at the same times, the first one always first.
        let mut budget = budget(50_000, 0);
        let (mut now, mut went) = (START, [0_u64; 2]);
        while now < START + SECOND_NSEC {
            for disk in 0..2 {
                while budget.ask(disk, now).is_ok() {
                    budget.take(now, 0);
                    went[disk as usize] += 1;
                }
            }
            now += PAUSE_NSEC;
        }
        assert!(went[0] + went[1] >= 49_990, "{went:?}");
        assert!(went[0].abs_diff(went[1]) <= 20, "{went:?}");
        // The one in front goes away.
        let mut budget = budget_of_one();
        budget.take(START, 0);
        assert!(budget.ask(0, START).is_err() && budget.ask(1, START).is_err());
        let due = START + SECOND_NSEC;
        assert!(budget.ask(1, due).is_err(), "disk 0 came first");
        budget.leave(0);
        assert_eq!(budget.ask(1, due), Ok(()));
        // Who waited when there was a rate is not waited for when there is one again.
        budget.take(due, 0);
        assert!(budget.ask(0, due).is_err());
        budget.set(due, 0, 0);
        budget.set(due, 1, 0);
        assert_eq!(budget.ask(1, due), Ok(()));
    }

    proptest! {
        #[test]
        fn no_window_has_more_than_the_rate_and_a_burst(
            rate in 1_u64..200_000,
            gaps in prop::collection::vec((0_u64..40_000_000, 0_u64..20_000_000), 1..60),
        ) {
            let mut budget = budget(rate, 0);
            let (mut now, mut went) = (START, Vec::new());
            for (gap, busy) in gaps {
                now += gap;
                let end = now + busy;
                while now < end && went.len() < 4000 {
                    match budget.ask(0, now) {
                        Ok(()) => {
                            budget.take(now, 0);
                            went.push(now);
                        }
                        Err(at) => now = at,
                    }
                }
                budget.leave(0);
            }
            // Exactly: n requests after any one need n slots, less the burst. How far each is ahead of the rate, in parts of a slot:
            let ahead = (0_i128..).zip(&went).map(|(n, at)| n * i128::from(SECOND_NSEC) - i128::from(*at) * i128::from(rate));
            let mut least = i128::MAX;
            for ahead in ahead {
                least = least.min(ahead);
                let burst = i128::from(BURST_NSEC.max(SECOND_NSEC / rate));
                prop_assert!(ahead - least <= burst * i128::from(rate));
            }
        }

        #[test]
        fn timers_that_are_late_by_less_than_the_burst_lose_nothing(
            rate in 1_u64..100_000,
            seed in any::<u64>(),
        ) {
            let mut random = seed | 1;
            let mut late = move || {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                random % (BURST_NSEC - PAUSE_NSEC)
            };
            let seconds = (20_000 / rate).clamp(2, 2000);
            let end = START + seconds * SECOND_NSEC;
            let went = saturate(&mut budget(rate, 0), end, 0, &mut late).len() as u64;
            let asked = rate * seconds;
            // What the last wake-up, late by a burst at most, has not caught up with yet.
            let pending = rate * BURST_NSEC / SECOND_NSEC + 1;
            prop_assert!(went + pending >= asked && went <= asked + 1 + pending, "{went} of {asked}");
            prop_assert!(rate < 100 || went * 1000 + pending * 1000 >= asked * 999);
        }
    }
}
