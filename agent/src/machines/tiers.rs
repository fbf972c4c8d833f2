//! What the kernel is told about who comes first when machines, or they and the host, want the same.
//!
//! | tier | CPU among machines | unused time caught up on | memory kept |
//! |---|---|---|---|
//! | guaranteed | weight 10000 | a period's worth | its grant, always (`memory.min`) |
//! | standard | weight 100 | none | half of its grant, while others have something to give (`memory.low`) |
//! | harvest | `cpu.idle` | none | none |
//!
//! `cpu.idle` rather than weight 1: the kernel lets an idle group run when no other wants to, and takes the CPU back the moment one does. With
//! weight 1 it would keep a hundredth against a standard machine and run on until the next tick. Weights act once the books' promises meet: the
//! quotas of guaranteed machines together are never more than the host has beside its reserve, so these get all of them; a hundredth of the
//! largest guarantee is what each standard machine could take of it when all of them want everything at once.
//!
//! Among machines only: all of them together stand against the host's own services by the weight of lathe.slice, which `lathed host-setup` sets
//! from the reserve. So a harvest machine gives way to the host only down to the host's reserve. Memory that a guest has written can be taken
//! back only where the host has swap.
//!
//! Catching up is done by the wall around the machine's CPU, in `walls`.
//!
//! systemd writes the units' files anew after each `daemon-reload`: [`keep`] looks at them once a second.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use lathe_cgroup::standing::set_slice;
use lathe_cgroup::{Bytes, CpuTurn, Error, MachineTree, Protection, Reach, Standing};

use super::core::Core;
use super::shape;
use crate::api::wire::Tier;
use crate::problem::Problem;

/// The slice of all machines, as their unit names it.
pub const SLICE: &str = "lathe.slice";
/// The largest `cpu.weight`.
const WEIGHT_GUARANTEED: u32 = 10_000;
/// What systemd gives every unit.
const WEIGHT_STANDARD: u32 = 100;

/// How a machine of this tier with this much memory stands among others.
fn standing(tier: Tier, memory_bytes: u64) -> Standing {
    let (cpu, min, low) = match tier {
        Tier::Guaranteed => (CpuTurn::Weight(WEIGHT_GUARANTEED), memory_bytes, memory_bytes),
        Tier::Standard => (CpuTurn::Weight(WEIGHT_STANDARD), 0, memory_bytes / 2),
        Tier::Harvest => (CpuTurn::Idle, 0, 0),
    };
    Standing { cpu, memory: Protection { min: Bytes(min), low: Bytes(low) } }
}

/// What was put in force, by the cgroup of the machine's unit. Who writes such files, or looks whether they are still so, has it locked.
#[derive(Default)]
pub(super) struct Standings(Mutex<BTreeMap<PathBuf, shape::Standing>>);

impl Standings {
    fn known(&self) -> MutexGuard<'_, BTreeMap<PathBuf, shape::Standing>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a tier in force. Twice is once.
    ///
    /// # Errors
    /// `internal`; then nobody looks after it until it has succeeded.
    pub(super) fn enforce(
        &self,
        tree: &MachineTree,
        tier: Tier,
        memory_bytes: u64,
    ) -> Result<shape::Standing, Problem> {
        let failed =
            |cause| Problem::internal(format!("cannot set the tier of {}", tree.unit().display()), cause);
        let mut known = self.known();
        known.remove(tree.unit());
        let reach = tree.set_standing(&standing(tier, memory_bytes)).map_err(failed)?;
        let standing = shape::Standing { tier, memory_bytes, among_others: reach == Reach::Siblings };
        known.insert(tree.unit().to_path_buf(), standing);
        Ok(standing)
    }

    /// Corrects what somebody else has written for a machine. Answers what it is to have; `None` where it is not ours to say.
    fn correct(&self, tree: &MachineTree) -> (Option<Protection>, Result<(), Error>) {
        let known = self.known();
        match known.get(tree.unit()).filter(|standing| standing.among_others) {
            Some(known) => {
                let wanted = standing(known.tier, known.memory_bytes);
                (Some(wanted.memory), tree.set_standing(&wanted).map(drop))
            }
            None => (None, Ok(())),
        }
    }

    /// Forgets machines whose cgroup is gone.
    fn tidy(&self) {
        self.known().retain(|unit, _| unit.exists());
    }
}

/// Corrects what somebody else has written, and keeps the machines' slice as protected as its machines are together. Answers whether it could,
/// in words where it could not.
pub(super) fn keep(core: &Core) -> Result<(), String> {
    let mut slices: BTreeMap<PathBuf, Protection> = BTreeMap::new();
    let mut failures = Vec::new();
    core.standings.tidy();
    for entry in core.entries() {
        let Some(tree) = entry.with(|shared| shared.launched.as_ref()?.tree.clone()) else { continue };
        let (memory, corrected) = core.standings.correct(&tree);
        // A machine may have ended since: then its cgroup has gone.
        if let Err(cause) = corrected
            && tree.unit().exists()
        {
            failures.push(format!("{}: {cause}", entry.name));
        }
        // The cgroup above a direct launcher's belongs to whoever delegated it.
        let slice = tree.unit().parent().filter(|slice| slice.ends_with(SLICE));
        let (Some(slice), Some(memory)) = (slice, memory) else { continue };
        let sum = slices.entry(slice.to_path_buf()).or_default();
        sum.min.0 = sum.min.0.saturating_add(memory.min.0);
        sum.low.0 = sum.low.0.saturating_add(memory.low.0);
    }
    for (slice, sum) in slices {
        match set_slice(&slice, sum) {
            Ok(Reach::Siblings) => {}
            Ok(Reach::Inside) => {
                failures.push(format!(
                    "{}: its memory.min and memory.low are not ours to write",
                    slice.display()
                ));
            }
            Err(cause) if slice.exists() => failures.push(format!("{}: {cause}", slice.display())),
            Err(_) => {}
        }
    }
    if failures.is_empty() { Ok(()) } else { Err(failures.join("; ")) }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    /// Says that it is over, also when a test fails.
    struct Ends<'a>(&'a AtomicBool);

    impl Drop for Ends<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    #[test]
    fn who_looks_after_tiers_never_undoes_one_that_is_being_set() {
        let folder = tempfile::tempdir().unwrap();
        let unit = folder.path().join("lathe-vm@demo.service");
        for group in ["", "machine", "machine/vcpu", "machine/vmm"] {
            fs::create_dir_all(unit.join(group)).unwrap();
        }
        for (name, text) in [
            ("cpu.weight", "100"),
            ("cpu.idle", "0"),
            ("memory.min", "0"),
            ("memory.low", "0"),
            ("machine/memory.min", "0"),
            ("machine/memory.low", "0"),
        ] {
            fs::write(unit.join(name), text).unwrap();
        }
        let tree = MachineTree::open(&unit).unwrap();
        let (standings, over) = (Standings::default(), AtomicBool::new(false));
        std::thread::scope(|scope| {
            let ends = Ends(&over);
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    standings.correct(&tree).1.unwrap();
                }
            });
            for round in 0..200_u64 {
                let (tier, weight) =
                    [(Tier::Guaranteed, "10000"), (Tier::Standard, "100")][(round % 2) as usize];
                let memory_bytes = (1 + round) << 20;
                let now = standings.enforce(&tree, tier, memory_bytes).unwrap();
                assert_eq!((now.tier, now.memory_bytes), (tier, memory_bytes));
                let known = standings.known();
                assert_eq!(known[&unit], now);
                assert_eq!(fs::read_to_string(unit.join("cpu.weight")).unwrap().trim(), weight);
            }
            drop(ends);
        });
        // What somebody else writes is corrected, and a machine that is gone is forgotten.
        fs::write(unit.join("cpu.weight"), "7").unwrap();
        let (memory, corrected) = standings.correct(&tree);
        corrected.unwrap();
        assert_eq!(memory, Some(Protection { min: Bytes(0), low: Bytes(100 << 20) }));
        assert_eq!(fs::read_to_string(unit.join("cpu.weight")).unwrap().trim(), "100");
        fs::remove_dir_all(&unit).unwrap();
        standings.tidy();
        assert!(standings.known().is_empty());
    }

    #[test]
    fn more_is_promised_by_each_tier_than_by_the_one_below() {
        let mib = 1 << 20;
        let of = |tier| standing(tier, 512 * mib);
        assert_eq!(of(Tier::Harvest).cpu, CpuTurn::Idle);
        assert_eq!(of(Tier::Harvest).memory, Protection::default());
        assert_eq!(of(Tier::Standard).cpu, CpuTurn::Weight(100));
        assert_eq!(of(Tier::Standard).memory, Protection { min: Bytes(0), low: Bytes(256 * mib) });
        assert_eq!(of(Tier::Guaranteed).cpu, CpuTurn::Weight(10_000));
        let all = Bytes(512 * mib);
        assert_eq!(of(Tier::Guaranteed).memory, Protection { min: all, low: all });
    }
}
