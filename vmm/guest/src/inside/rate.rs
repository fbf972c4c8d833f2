//! What a counter has done since it was read before.

use std::time::Instant;

/// A counter that only grows, and how fast.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rate {
    before: Option<(Instant, u64)>,
    /// Per second, between the last two readings; 0 of a counter that has begun anew.
    pub per_sec: u64,
}

impl Rate {
    /// Takes a reading in.
    pub fn take(&mut self, now: Instant, value: u64) {
        self.per_sec = match self.before {
            Some((at, before)) => {
                let usec = now.saturating_duration_since(at).as_micros().max(1);
                let more = u128::from(value.saturating_sub(before));
                u64::try_from(more.saturating_mul(1_000_000) / usec).unwrap_or(u64::MAX)
            }
            None => 0,
        };
        self.before = Some((now, value));
    }

    /// Of a counter of microseconds, milliCPU.
    pub fn milli(&self) -> u64 {
        self.per_sec / 1000
    }

    /// Of a counter of microseconds in which something was so, parts per thousand of the time; `None` before it was read.
    pub fn permille(&self) -> Option<u32> {
        self.before.map(|_| u32::try_from(self.per_sec / 1000).unwrap_or(u32::MAX).min(1000))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn rates_are_per_second_and_a_counter_may_begin_anew() {
        let (mut rate, now) = (Rate::default(), Instant::now());
        assert_eq!(rate.permille(), None);
        rate.take(now, 5_000_000);
        assert_eq!((rate.per_sec, rate.permille()), (0, Some(0)));
        rate.take(now + Duration::from_secs(2), 6_000_000);
        assert_eq!((rate.per_sec, rate.milli(), rate.permille()), (500_000, 500, Some(500)));
        rate.take(now + Duration::from_secs(3), 10);
        assert_eq!(rate.per_sec, 0);
        rate.take(now + Duration::from_secs(3), u64::MAX);
        assert_eq!(rate.permille(), Some(1000));
    }
}
