//! `bursts ROUNDS [SECONDS] [REST_MSEC]`: a server with one client: rests, does the same work again and again, and says how long that took.
//!
//! The loop is closed, so a machine that is slow does fewer bursts and no burst waits for another. What the guest could have begun and did
//! not, because its CPU was somebody else's when the rest was over, is told apart from the work.

use std::io::{self, Write};
use std::time::{Duration, Instant};

use super::spin::work;
use super::{number, usage};

const MAX_SECONDS: f64 = 3600.0;
const MAX_REST_MSEC: u64 = 10_000;

/// How long each burst took, and how late each began, in the order in which they came.
#[derive(Debug, Default)]
struct Bursts {
    took: Vec<Duration>,
    late: Vec<Duration>,
}

/// Prints `bursts= busy_sec= p50_usec= p99_usec= longest_usec= late_p50_usec= late_p99_usec= late_longest_usec=`.
pub fn bursts(arguments: &[&str]) -> io::Result<u8> {
    let rounds: u64 = number(arguments, 0, 0)?;
    let seconds: f64 = number(arguments, 1, 10.0)?;
    let rest_msec: u64 = number(arguments, 2, 7)?;
    if rounds == 0 || !(0.0..=MAX_SECONDS).contains(&seconds) || !(1..=MAX_REST_MSEC).contains(&rest_msec) {
        return Err(usage("bursts ROUNDS [SECONDS] [REST_MSEC], an hour and rests of 1 to 10000 ms at most"));
    }
    let Bursts { mut took, mut late } =
        run(rounds, Duration::from_secs_f64(seconds), Duration::from_millis(rest_msec));
    let busy: Duration = took.iter().sum();
    let [p50, p99, longest] = quantiles(&mut took);
    let [late_p50, late_p99, late_longest] = quantiles(&mut late);
    writeln!(
        io::stdout(),
        "bursts={} busy_sec={:.3} p50_usec={p50} p99_usec={p99} longest_usec={longest} late_p50_usec={late_p50} late_p99_usec={late_p99} late_longest_usec={late_longest}",
        took.len(),
        busy.as_secs_f64()
    )?;
    Ok(0)
}

fn run(rounds: u64, lasts: Duration, rest: Duration) -> Bursts {
    let (mut all, mut state, begun) = (Bursts::default(), 1, Instant::now());
    while begun.elapsed() < lasts {
        let rests = Instant::now();
        std::thread::sleep(rest);
        let awake = Instant::now();
        state = work(state, rounds);
        all.late.push(awake.saturating_duration_since(rests + rest));
        all.took.push(awake.elapsed());
    }
    all
}

/// The middle, the 99th hundredth and the longest, microseconds; 0 if there are none.
fn quantiles(of: &mut [Duration]) -> [u128; 3] {
    of.sort_unstable();
    let at = |percent: usize| {
        let place = (of.len() * percent / 100).min(of.len().saturating_sub(1));
        of.get(place).map_or(0, Duration::as_micros)
    };
    [at(50), at(99), at(100)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_burst_follows_a_rest_and_is_counted_twice_over() {
        let all = run(1000, Duration::from_millis(20), Duration::from_millis(2));
        assert!(!all.took.is_empty() && all.took.len() == all.late.len());
        assert!(all.took.len() <= 10, "none begins before its rest is over");
    }

    #[test]
    fn quantiles_are_of_what_was_measured() {
        let mut of: Vec<_> = (1..=200).rev().map(Duration::from_micros).collect();
        assert_eq!(quantiles(&mut of), [101, 199, 200]);
        assert_eq!(quantiles(&mut []), [0; 3]);
    }

    #[test]
    fn absurd_amounts_are_refused() {
        for arguments in
            [&[][..], &["0"], &["1", "-1"], &["1", "nan"], &["1", "1", "0"], &["1", "1", "99999"]]
        {
            assert!(bursts(arguments).is_err(), "{arguments:?}");
        }
    }
}
