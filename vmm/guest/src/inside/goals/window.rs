//! What a family of metrics has done over the last ten seconds: readings of it, and what lies between the oldest and the newest.
//!
//! Quantiles are those of Prometheus' histogram_quantile: linear inside a bucket, and the largest bound that is finite beyond it.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::family::{Bucket, Reading};

/// Figures are of so long, or of the time between two readings where that is longer.
pub const WINDOW: Duration = Duration::from_secs(10);
/// Readings further apart have nothing to do with each other.
const APART: Duration = Duration::from_secs(120);
/// Most readings that are kept: one a second, and some more.
const MAX_READINGS: usize = 16;

/// What a goal is judged by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// Time that they are of; zero when there are none.
    pub over: Duration,
    /// Microseconds.
    pub latency_usec: Option<u64>,
    /// Thousandths a second.
    pub rate_milli: Option<u64>,
}

/// Readings of one family, the oldest first.
#[derive(Debug, Default)]
pub struct Window {
    readings: VecDeque<(Instant, Reading)>,
}

impl Window {
    /// Takes a reading in. One that does not continue the others begins anew: counters that fell are those of another process.
    pub fn push(&mut self, at: Instant, reading: Reading) {
        if let Some((last, before)) = self.readings.back() {
            let apart = at.checked_duration_since(*last).filter(|apart| !apart.is_zero());
            if apart.is_none_or(|apart| apart > APART) || !continues(before, &reading) {
                self.readings.clear();
            }
        }
        self.readings.push_back((at, reading));
        // The youngest that is old enough is the one to compare with; those before it are not needed.
        while self.readings.len() > MAX_READINGS
            || self.readings.get(1).is_some_and(|(second, _)| at - *second >= WINDOW)
        {
            self.readings.pop_front();
        }
    }

    /// Nothing has been read.
    pub fn clear(&mut self) {
        self.readings.clear();
    }

    /// When the newest reading is from.
    pub fn newest(&self) -> Option<Instant> {
        self.readings.back().map(|(at, _)| *at)
    }

    /// Time between the last two readings.
    pub fn interval(&self) -> Option<Duration> {
        let (at, _) = self.readings.back()?;
        let (before, _) = self.readings.get(self.readings.len().checked_sub(2)?)?;
        Some(at.saturating_duration_since(*before))
    }

    /// Figures with that quantile, parts per thousand; none before there are two readings.
    pub fn figures(&self, permille: u32) -> Figures {
        let (Some((begin, before)), Some((end, now))) = (self.readings.front(), self.readings.back()) else {
            return Figures::default();
        };
        let over = end.saturating_duration_since(*begin);
        if over.is_zero() {
            return Figures::default();
        }
        let requests = now.count.zip(before.count).map(|(now, before)| now - before);
        let latency = if now.buckets.is_empty() {
            // One that the application tells itself is of requests long past when there were none since.
            now.direct.filter(|_| requests.is_none_or(|requests| requests > 0.0))
        } else {
            quantile(f64::from(permille) / 1000.0, &between(before, now))
        };
        let latency_usec = latency.and_then(|latency| whole(latency * now.unit_usec));
        let rate_milli = requests.and_then(|requests| whole(requests * 1000.0 / over.as_secs_f64()));
        Figures { over, latency_usec, rate_milli }
    }
}

/// Whether one reading can come after the other without the application having begun anew.
fn continues(before: &Reading, now: &Reading) -> bool {
    let grows = match (before.count, now.count) {
        (Some(before), Some(now)) => now >= before,
        (None, None) => true,
        _ => false,
    };
    // Without a request yet there may be no buckets.
    let same = before.buckets.is_empty() || before.buckets.len() == now.buckets.len();
    let buckets = before.buckets.iter().zip(&now.buckets);
    grows && same && buckets.into_iter().all(|(before, now)| before.le == now.le && now.count >= before.count)
}

/// What went into each bucket since.
fn between(before: &Reading, now: &Reading) -> Vec<Bucket> {
    let earlier = |at: usize| before.buckets.get(at).map_or(0.0, |bucket| bucket.count);
    let since = |(at, bucket): (usize, &Bucket)| Bucket { count: bucket.count - earlier(at), ..*bucket };
    now.buckets.iter().enumerate().map(since).collect()
}

/// The value that the share `q` of all is below; `None` when there are none, or no bound is finite.
fn quantile(q: f64, buckets: &[Bucket]) -> Option<f64> {
    // Buckets are read one after the other while they grow: each holds at least what smaller ones do.
    let mut most = 0.0_f64;
    let mut counts = Vec::with_capacity(buckets.len());
    for bucket in buckets {
        most = most.max(bucket.count);
        counts.push(most);
    }
    if most <= 0.0 || !most.is_finite() {
        return None;
    }
    let rank = q * most;
    let at = counts.iter().position(|count| *count >= rank)?;
    let before = at.checked_sub(1);
    let upper = buckets.get(at)?.le;
    let lower = before.and_then(|at| buckets.get(at)).map(|bucket| bucket.le);
    if upper.is_infinite() {
        return lower.filter(|lower| lower.is_finite());
    }
    if lower.is_none() && upper <= 0.0 {
        return Some(upper);
    }
    let lower = lower.unwrap_or(0.0);
    let below = before.and_then(|at| counts.get(at)).copied().unwrap_or(0.0);
    let inside = counts.get(at)? - below;
    Some(lower + (upper - lower) * ((rank - below) / inside))
}

/// Rounded; `None` of what is no amount.
fn whole(value: f64) -> Option<u64> {
    // The conversion goes no further than the largest number.
    (value.is_finite() && value >= 0.0).then(|| value.round() as u64)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn buckets(counts: &[(f64, f64)]) -> Vec<Bucket> {
        counts.iter().map(|(le, count)| Bucket { le: *le, count: *count }).collect()
    }

    fn counter(count: f64) -> Reading {
        Reading { unit_usec: 1e6, count: Some(count), ..Reading::default() }
    }

    fn histogram(counts: [f64; 3]) -> Reading {
        let buckets = buckets(&[(0.01, counts[0]), (0.02, counts[1]), (f64::INFINITY, counts[2])]);
        Reading { buckets, ..counter(counts[2]) }
    }

    #[test]
    fn quantiles_are_those_of_prometheus() {
        const INF: f64 = f64::INFINITY;
        let of =
            |q, counts: &[(f64, f64)]| quantile(q, &buckets(counts)).map(|value| (value * 1e6).round() / 1e6);
        let positive = [(0.1, 5.0), (0.2, 7.0), (1e0, 11.0), (INF, 12.0)];
        assert_eq!(of(0.2, &positive), Some(0.048));
        assert_eq!(of(0.5, &positive), Some(0.15));
        assert_eq!(of(0.8, &positive), Some(0.72));
        assert_eq!(of(0.999, &positive), Some(1.0), "the largest bound that is finite");
        let negative = [(-0.2, 1.0), (-0.1, 2.0), (0.3, 2.0), (INF, 3.0)];
        assert_eq!(of(0.2, &negative), Some(-0.2));
        assert_eq!(of(0.5, &negative), Some(-0.15));
        assert_eq!(of(0.8, &negative), Some(0.3));
        assert_eq!(of(0.5, &[(INF, 3.0)]), None);
        assert_eq!(of(0.5, &[(0.1, 0.0), (INF, 0.0)]), None);
        assert_eq!(of(0.5, &[]), None);
        assert_eq!(of(0.9, &[(1.0, 10.0), (2.0, 8.0), (INF, 10.0)]), Some(0.9), "read while they grow");
        assert_eq!(of(0.9, &[(1.0, 10.0)]), Some(0.9), "a last bound that is finite");
    }

    #[test]
    fn figures_are_of_the_last_ten_seconds() {
        let (mut window, begin) = (Window::default(), Instant::now());
        let second = |at| begin + Duration::from_secs(at);
        window.push(begin, histogram([0.0, 0.0, 0.0]));
        assert_eq!(window.figures(500), Figures::default(), "one reading is no change");
        for at in 1..=20_u32 {
            // From the tenth second on all are slow.
            let slow = f64::from(at.saturating_sub(10)) * 100.0;
            window.push(
                second(at.into()),
                histogram([
                    f64::from(at.min(10)) * 100.0,
                    f64::from(at.min(10)) * 100.0 + slow,
                    f64::from(at) * 100.0,
                ]),
            );
            assert!(window.readings.len() <= 11);
            if at == 4 {
                let figures = window.figures(500);
                assert_eq!(
                    (figures.over.as_secs(), figures.latency_usec, figures.rate_milli),
                    (4, Some(5000), Some(100_000))
                );
            }
        }
        let figures = window.figures(500);
        assert_eq!(
            (figures.over, figures.latency_usec, figures.rate_milli),
            (WINDOW, Some(15_000), Some(100_000))
        );
        assert_eq!(window.interval(), Some(Duration::from_secs(1)));
        window.push(second(50), histogram([1000.0, 2000.0, 2000.0]));
        let figures = window.figures(500);
        assert_eq!(
            (figures.over.as_secs(), figures.latency_usec, figures.rate_milli),
            (30, None, Some(0)),
            "nobody came"
        );
    }

    #[test]
    fn what_begins_anew_is_not_compared_with_before() {
        let now = Instant::now();
        let second = |at| now + Duration::from_secs(at);
        for other in [
            histogram([5.0, 6.0, 6.0]),
            histogram([11.0, 9.0, 11.0]),
            Reading { buckets: buckets(&[(0.01, 20.0), (f64::INFINITY, 30.0)]), ..counter(30.0) },
            Reading { count: None, ..Reading::default() },
        ] {
            let mut window = Window::default();
            window.push(now, histogram([10.0, 10.0, 10.0]));
            window.push(second(1), other);
            assert_eq!(window.figures(950), Figures::default());
        }
        let mut window = Window::default();
        window.push(now, counter(0.0));
        window.push(second(1), histogram([10.0, 10.0, 10.0]));
        assert_eq!(window.figures(500).latency_usec, Some(5000), "the first requests make the buckets");
        window.push(second(1), histogram([10.0, 10.0, 10.0]));
        assert_eq!(window.figures(500), Figures::default(), "time stood still");
        window.push(second(200), histogram([10.0, 10.0, 10.0]));
        assert_eq!(window.figures(500), Figures::default(), "too long ago");
    }

    #[test]
    fn a_latency_that_is_told_needs_requests() {
        let told = |count| Reading { direct: Some(18.25), unit_usec: 1e3, count, ..Reading::default() };
        let figures = |before, now| {
            let (mut window, begin) = (Window::default(), Instant::now());
            window.push(begin, told(before));
            window.push(begin + Duration::from_secs(2), told(now));
            let figures = window.figures(950);
            (figures.latency_usec, figures.rate_milli)
        };
        assert_eq!(figures(Some(1.0), Some(2.0)), (Some(18_250), Some(500)));
        assert_eq!(figures(Some(2.0), Some(2.0)), (None, Some(0)));
        assert_eq!(figures(None, None), (Some(18_250), None));
    }

    proptest! {
        #[test]
        fn quantiles_are_within_the_bounds(
            counts in prop::collection::vec(0u32..1000, 1..20),
            q in 0.001f64..0.999,
        ) {
            let mut sum = 0.0;
            let mut buckets: Vec<_> = counts.iter().enumerate().map(|(at, count)| {
                sum += f64::from(*count);
                Bucket { le: (at + 1) as f64, count: sum }
            }).collect();
            buckets.push(Bucket { le: f64::INFINITY, count: sum });
            match quantile(q, &buckets) {
                Some(value) => prop_assert!((0.0..=counts.len() as f64).contains(&value)),
                None => prop_assert_eq!(sum, 0.0),
            }
        }

        #[test]
        fn no_numbers_are_too_strange(
            readings in prop::collection::vec((any::<f64>(), any::<f64>(), any::<f64>(), 0u64..30), 0..40),
        ) {
            let (mut window, mut at) = (Window::default(), Instant::now());
            for (one, other, direct, later) in readings {
                at += Duration::from_secs(later);
                let direct = Some(direct);
                window.push(at, Reading { direct, buckets: buckets(&[(one, other), (other, one)]), ..counter(one) });
                prop_assert!(window.readings.len() <= MAX_READINGS);
                window.figures(950);
            }
        }
    }
}
