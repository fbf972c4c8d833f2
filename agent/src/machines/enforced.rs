//! How long it took from a decision until it was in force, by what is limited, since lathed started: what `/metrics` tells as a histogram.
//!
//! A decision is made when what is wanted is stored, or, of a quota that falls, when it is admitted: that is in force before it is stored.
//! In force is what has been read back: `cpu.max` from the cgroup, the shapers of a tap over netlink, the rate of disks from the answer of
//! the monitor that limits them. Only what has changed counts: to look, and to find that nothing is to be done, takes less time and would
//! make the rest look better than it is.

use std::array;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Upper bounds of the buckets, microseconds; one more bucket takes what is above the last.
pub const BOUNDS_USEC: [u64; 13] =
    [100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000, 500_000, 1_000_000];
const BUCKETS: usize = BOUNDS_USEC.len() + 1;

/// What is put in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// A quota.
    Cpu,
    /// A rate of a nic, both ways.
    Net,
    /// A rate of all disks of a machine.
    Iops,
}

impl Limit {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Cpu, Self::Net, Self::Iops];

    /// As metrics call it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Net => "net",
            Self::Iops => "iops",
        }
    }
}

/// How long changes of one of them took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Took {
    /// How many took at most [`BOUNDS_USEC`] and longer than the bound before; the last: longer than all.
    pub within: [u64; BUCKETS],
    /// All together.
    pub sum: Duration,
}

/// Counts them.
#[derive(Debug)]
pub(super) struct Enforced([Counters; Limit::ALL.len()]);

#[derive(Debug)]
struct Counters {
    within: [AtomicU64; BUCKETS],
    sum_nsec: AtomicU64,
}

impl Default for Enforced {
    fn default() -> Self {
        let counters =
            || Counters { within: array::from_fn(|_| AtomicU64::default()), sum_nsec: AtomicU64::default() };
        Self(array::from_fn(|_| counters()))
    }
}

impl Enforced {
    /// A change is in force this long after it was decided.
    pub(super) fn after(&self, limit: Limit, took: Duration) {
        let counters = &self.0[limit as usize];
        let place = BOUNDS_USEC.partition_point(|bound| Duration::from_micros(*bound) < took);
        counters.within[place].fetch_add(1, Ordering::Relaxed);
        let nsec = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        counters.sum_nsec.fetch_add(nsec, Ordering::Relaxed);
    }

    /// All until now.
    pub(super) fn view(&self) -> [(Limit, Took); Limit::ALL.len()] {
        Limit::ALL.map(|limit| {
            let counters = &self.0[limit as usize];
            let within = array::from_fn(|place| counters.within[place].load(Ordering::Relaxed));
            let sum = Duration::from_nanos(counters.sum_nsec.load(Ordering::Relaxed));
            (limit, Took { within, sum })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_change_counts_once_and_a_bound_belongs_to_its_bucket() {
        let enforced = Enforced::default();
        for usec in [0, 100, 101, 5000, 1_000_000, 1_000_001] {
            enforced.after(Limit::Net, Duration::from_micros(usec));
        }
        let [(_, cpu), (limit, net), (_, iops)] = enforced.view();
        assert_eq!((limit, cpu, iops), (Limit::Net, Took::default(), Took::default()));
        let mut expected = [0; BUCKETS];
        (expected[0], expected[1], expected[5], expected[12], expected[13]) = (2, 1, 1, 1, 1);
        assert_eq!(net, Took { within: expected, sum: Duration::from_micros(2_005_202) });
    }
}
