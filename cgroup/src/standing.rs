//! How a machine stands against its siblings: `cpu.weight`, `cpu.idle`, `memory.min` and `memory.low`.
//!
//! A weight acts among siblings, and a machine's siblings are the other units of its slice: written in `machine/` it would have no effect at
//! all. Memory is protected only as far as every ancestor is. So four files of the unit's cgroup, and the two of memory of the slice above it,
//! are given to the agent by the root helper; nothing else of them, and nothing of all this to the monitor.
//!
//! ```text
//! lathe.slice                 memory.min, memory.low: the sum of what its machines claim
//! └─ lathe-vm@web.service     cpu.weight, cpu.idle, memory.min, memory.low
//!    └─ machine/              memory.min, memory.low: the same again
//! ```
//! systemd writes these files as well, whenever it applies the unit's settings: when the unit is started and after each `daemon-reload`. Whoever
//! wants them to stay looks at them again and again; what is as it shall be is only read.
//!
//! Kernel: cgroup-v2.rst "CPU" (`cpu.idle` since 5.15: the group runs when nothing else of its siblings wants to, and is preempted as soon as
//! something does; its `cpu.weight` cannot be written meanwhile) and "Memory Interface Files" (protection of a child is bounded by its ancestors').

use std::path::Path;

use crate::cpu;
use crate::error::Error;
use crate::file;
use crate::units::Bytes;

/// What the agent may write of the unit's cgroup.
pub(crate) const UNIT_FILES: [&str; 4] = ["cpu.weight", "cpu.idle", "memory.min", "memory.low"];
/// What it may write of the slice's.
pub(crate) const SLICE_FILES: [&str; 2] = ["memory.min", "memory.low"];
/// The least weight, for kernels without `cpu.idle`.
const WEIGHT_LEAST: u32 = 1;
/// The largest page size by which the kernel may round a value down.
const ROUNDING_MAX_BYTES: u64 = 64 * 1024;

/// Whose turn it is when several machines want the same CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CpuTurn {
    /// In proportion to this, 1 to 10000.
    Weight(u32),
    /// When no other wants it; where the kernel lacks `cpu.idle`, weight 1.
    Idle,
}

/// How a machine stands against its siblings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// CPU.
    pub cpu: CpuTurn,
    /// What memory it keeps.
    pub memory: Protection,
}

/// Memory that is not taken back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Protection {
    /// Never (`memory.min`).
    pub min: Bytes,
    /// As long as others have something to give (`memory.low`).
    pub low: Bytes,
}

/// How far a standing could be put in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Among siblings.
    Siblings,
    /// Inside the machine only: the files above it were never given to us, as in a tree that an earlier release has made.
    Inside,
}

/// Puts a standing in force in the unit's cgroup.
pub(crate) fn set_unit(unit: &Path, standing: &Standing) -> Result<Reach, Error> {
    reach(set_cpu(unit, standing.cpu).and_then(|()| protect(unit, standing.memory)))
}

/// Protects memory of all machines of a slice together: at least the sum of theirs, or theirs have no effect.
///
/// # Errors
/// [`Error::Read`], [`Error::Write`], [`Error::ReadBack`]; that the files are not ours is a [`Reach`].
pub fn set_slice(slice: &Path, memory: Protection) -> Result<Reach, Error> {
    reach(protect(slice, memory))
}

/// Not to be allowed is an answer.
fn reach(result: Result<(), Error>) -> Result<Reach, Error> {
    match result {
        Ok(()) => Ok(Reach::Siblings),
        Err(Error::Write { source, .. }) if source.kind() == std::io::ErrorKind::PermissionDenied => {
            Ok(Reach::Inside)
        }
        Err(error) => Err(error),
    }
}

fn set_cpu(group: &Path, turn: CpuTurn) -> Result<(), Error> {
    let idle_file = group.join("cpu.idle");
    let idle = match file::read_if_there(&idle_file)?.as_deref().map(str::trim) {
        None => None,
        Some("0") => Some(false),
        Some("1") => Some(true),
        Some(other) => return Err(file::unexpected(&idle_file, other, "0 or 1")),
    };
    let weight_file = group.join("cpu.weight");
    match (turn, idle) {
        (CpuTurn::Idle, Some(_)) => cpu::write_changed(&idle_file, 1),
        (CpuTurn::Idle, None) => cpu::write_changed(&weight_file, u64::from(WEIGHT_LEAST)),
        (CpuTurn::Weight(weight), idle) => {
            if !(1..=10_000).contains(&weight) {
                return Err(Error::OutOfRange {
                    field: "cpu.weight",
                    asked: weight.into(),
                    range: "1 to 10000",
                });
            }
            if idle.is_some() {
                // A weight is refused while the group is idle.
                cpu::write_changed(&idle_file, 0)?;
            }
            cpu::write_changed(&weight_file, u64::from(weight))
        }
    }
}

/// Writes `memory.min` and `memory.low` of one cgroup where they are others.
pub(crate) fn protect(group: &Path, memory: Protection) -> Result<(), Error> {
    for (name, Bytes(wanted)) in [("memory.min", memory.min), ("memory.low", memory.low)] {
        let path = group.join(name);
        let as_wanted = |shows: Option<u64>| {
            shows.is_some_and(|shows| shows <= wanted && wanted - shows < ROUNDING_MAX_BYTES)
        };
        if as_wanted(file::read_max(&path)?) {
            continue;
        }
        file::write(&path, &wanted.to_string())?;
        let shows = file::read_max(&path)?;
        if !as_wanted(shows) {
            return Err(Error::ReadBack {
                file: path,
                wrote: wanted.to_string(),
                shows: format!("{shows:?}"),
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::testing::{Fixture, content};
    use crate::tree::MachineTree;

    const MIB: u64 = 1 << 20;

    fn standing(cpu: CpuTurn, min: u64, low: u64) -> Standing {
        Standing { cpu, memory: Protection { min: Bytes(min * MIB), low: Bytes(low * MIB) } }
    }

    #[test]
    fn a_standing_is_written_in_the_unit_and_its_memory_in_the_machine_too() {
        let fixture = Fixture::new();
        let tree = MachineTree::open(&fixture.unit()).expect("there");
        let reach = tree.set_standing(&standing(CpuTurn::Weight(10_000), 512, 512)).expect("written");
        assert_eq!(reach, Reach::Siblings);
        assert_eq!(content(&fixture.unit().join("cpu.weight")), "10000");
        assert_eq!(content(&fixture.machine().join("cpu.weight")), "100", "where it would do nothing");
        for group in [fixture.unit(), fixture.machine()] {
            assert_eq!(content(&group.join("memory.min")), (512 * MIB).to_string());
            assert_eq!(content(&group.join("memory.low")), (512 * MIB).to_string());
        }
    }

    #[test]
    fn idle_comes_and_goes_and_needs_no_weight() {
        let fixture = Fixture::new();
        let tree = MachineTree::open(&fixture.unit()).expect("there");
        tree.set_standing(&standing(CpuTurn::Idle, 0, 0)).expect("written");
        assert_eq!(content(&fixture.unit().join("cpu.idle")), "1");
        assert_eq!(content(&fixture.unit().join("cpu.weight")), "100");
        tree.set_standing(&standing(CpuTurn::Weight(300), 0, 0)).expect("written");
        assert_eq!(content(&fixture.unit().join("cpu.idle")), "0");
        assert_eq!(content(&fixture.unit().join("cpu.weight")), "300");
        fs::remove_file(fixture.unit().join("cpu.idle")).expect("an older kernel");
        tree.set_standing(&standing(CpuTurn::Idle, 0, 0)).expect("written");
        assert_eq!(content(&fixture.unit().join("cpu.weight")), "1");
        tree.set_standing(&standing(CpuTurn::Weight(0), 0, 0)).expect_err("no weight at all");
    }

    #[test]
    fn what_was_not_given_is_said_and_nothing_else_is_hidden() {
        let refused = |kind: std::io::ErrorKind| {
            reach(Err(file::write_error(Path::new("/x/cpu.weight"), "1", kind.into())))
        };
        assert_eq!(refused(std::io::ErrorKind::PermissionDenied).expect("an answer"), Reach::Inside);
        refused(std::io::ErrorKind::InvalidInput).expect_err("the kernel's own refusal");
    }
}
