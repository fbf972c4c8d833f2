//! `spin [SECONDS] [THREADS]`: keeps CPUs busy and says how much of them it really got.

use std::hint::black_box;
use std::io::{self, Write};
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};

use super::{number, usage};

const MAX_SECONDS: f64 = 86_400.0;
const MAX_THREADS: usize = 256;
/// Rounds between two looks at the clock; microseconds on any CPU.
const ROUNDS: u64 = 20_000;

/// What one thread did.
#[derive(Clone, Copy, Debug, Default)]
struct Spun {
    cpu: Duration,
    rounds: u64,
    /// Longest time between two looks at the clock: how long the thread stood still.
    longest_gap: Duration,
}

/// Prints `wall_sec= cpu_sec= share= rounds= longest_gap_msec=`, all threads together, `share` in CPUs.
pub fn spin(arguments: &[&str]) -> io::Result<u8> {
    let seconds: f64 = number(arguments, 0, 10.0)?;
    let threads: usize = number(arguments, 1, 1)?;
    if !(0.0..=MAX_SECONDS).contains(&seconds) || !(1..=MAX_THREADS).contains(&threads) {
        return Err(usage("spin [SECONDS] [THREADS], a day and 256 threads at most"));
    }
    let started = Instant::now();
    let until = started + Duration::from_secs_f64(seconds);
    let workers: Vec<_> = (0..threads).map(|_| std::thread::spawn(move || one(until))).collect();
    let mut all = Spun::default();
    for worker in workers {
        let spun = worker.join().map_err(|_| io::Error::other("a thread failed"))??;
        all.cpu += spun.cpu;
        all.rounds += spun.rounds;
        all.longest_gap = all.longest_gap.max(spun.longest_gap);
    }
    let wall = started.elapsed().as_secs_f64();
    let cpu = all.cpu.as_secs_f64();
    writeln!(
        io::stdout(),
        "wall_sec={wall:.3} cpu_sec={cpu:.3} share={:.4} rounds={} longest_gap_msec={:.1}",
        cpu / wall.max(f64::MIN_POSITIVE),
        all.rounds,
        all.longest_gap.as_secs_f64() * 1e3
    )?;
    Ok(0)
}

/// Work that is the same whoever does it, and that no compiler can do without.
pub(super) fn work(mut state: u64, rounds: u64) -> u64 {
    for _ in 0..rounds {
        state = black_box(state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1));
    }
    state
}

fn one(until: Instant) -> io::Result<Spun> {
    let mut spun = Spun::default();
    let mut state = 1u64;
    let mut last = Instant::now();
    while last < until {
        state = work(state, ROUNDS);
        spun.rounds += ROUNDS;
        let now = Instant::now();
        spun.longest_gap = spun.longest_gap.max(now - last);
        last = now;
    }
    spun.cpu = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?.into();
    Ok(spun)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_counts_its_own_time() {
        let spun = one(Instant::now() + Duration::from_millis(20)).unwrap();
        assert!(spun.rounds > 0 && spun.cpu > Duration::ZERO && spun.longest_gap > Duration::ZERO);
    }

    #[test]
    fn absurd_amounts_are_refused() {
        for arguments in [["-1", "1"], ["1", "0"], ["1", "1000"], ["nan", "1"], ["1e9", "1"]] {
            assert!(spin(&arguments).is_err(), "{arguments:?}");
        }
    }
}
