//! A shape: an amount of every kind of shard, and arithmetic on shapes that neither overflows nor goes below zero.

use crate::amount::{BitRate, Bytes, Iops, MilliCpu};

/// An amount of every kind of shard: what a machine has or wants, what a host has to spare.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shape {
    /// CPU.
    pub cpu: MilliCpu,
    /// Memory.
    pub memory: Bytes,
    /// Bandwidth each way.
    pub net: BitRate,
    /// I/O operations per second.
    pub iops: Iops,
    /// Disk space.
    pub disk: Bytes,
}

/// What there is too little of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{resource}: {wanted} wanted, {available} there")]
pub struct Shortage {
    /// `cpu`, `memory`, `net`, `iops`, `disk`.
    pub resource: &'static str,
    /// In the resource's smallest unit.
    pub wanted: u64,
    /// In the resource's smallest unit.
    pub available: u64,
}

impl Shape {
    fn zip(
        self,
        other: Self,
        op: impl Fn(&'static str, u64, u64) -> Result<u64, Shortage>,
    ) -> Result<Self, Shortage> {
        Ok(Self {
            cpu: MilliCpu(op("cpu", self.cpu.0, other.cpu.0)?),
            memory: Bytes(op("memory", self.memory.0, other.memory.0)?),
            net: BitRate(op("net", self.net.0, other.net.0)?),
            iops: Iops(op("iops", self.iops.0, other.iops.0)?),
            disk: Bytes(op("disk", self.disk.0, other.disk.0)?),
        })
    }

    /// The sum.
    ///
    /// # Errors
    /// The first resource whose sum does not fit in 64 bits.
    pub fn plus(self, other: Self) -> Result<Self, Shortage> {
        self.zip(other, |resource, a, b| {
            a.checked_add(b).ok_or(Shortage { resource, wanted: b, available: u64::MAX - a })
        })
    }

    /// The difference.
    ///
    /// # Errors
    /// The first resource that `other` has more of.
    pub fn minus(self, other: Self) -> Result<Self, Shortage> {
        self.zip(other, |resource, a, b| {
            a.checked_sub(b).ok_or(Shortage { resource, wanted: b, available: a })
        })
    }

    /// Whether `self` has at least as much of everything.
    pub fn holds(self, other: Self) -> bool {
        self.minus(other).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn shapes() -> impl Strategy<Value = Shape> {
        any::<(u64, u64, u64, u64, u64)>().prop_map(|(cpu, memory, net, iops, disk)| Shape {
            cpu: MilliCpu(cpu),
            memory: Bytes(memory),
            net: BitRate(net),
            iops: Iops(iops),
            disk: Bytes(disk),
        })
    }

    #[test]
    fn a_shortage_names_the_resource_and_both_numbers() {
        let host = Shape { cpu: MilliCpu(1500), ..Shape::default() };
        let wish = Shape { cpu: MilliCpu(2000), ..Shape::default() };
        assert_eq!(host.minus(wish), Err(Shortage { resource: "cpu", wanted: 2000, available: 1500 }));
    }

    proptest! {
        #[test]
        fn what_is_added_can_be_taken_away_again(a in shapes(), b in shapes()) {
            match a.plus(b) {
                Ok(sum) => prop_assert_eq!(sum.minus(b), Ok(a)),
                Err(shortage) => prop_assert!(shortage.wanted > shortage.available),
            }
        }

        #[test]
        fn nothing_is_taken_that_is_not_there(a in shapes(), b in shapes()) {
            prop_assert_eq!(a.holds(b), a.minus(b).is_ok());
            if let Ok(rest) = a.minus(b) {
                prop_assert_eq!(rest.plus(b), Ok(a));
            }
        }
    }
}
