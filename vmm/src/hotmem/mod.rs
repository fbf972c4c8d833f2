//! Memory that comes and goes while the guest runs: the region behind virtio-mem.
//!
//! ```text
//! plug:    open (mprotect) ─▶ KVM slot, if it is the slot's first block ─▶ devices' map ─▶ plugged
//! unplug:  devices' map ─▶ close (PROT_NONE) ─▶ discard ─▶ KVM slot, if it was the slot's last block ─▶ unplugged
//! ```
//!
//! The region is reserved as inaccessible address space at the start and divided into KVM slots that exist only while something in
//! them is plugged. Within a slot what is not plugged stays inaccessible, so the guest never holds more than what is counted
//! here: touching the rest makes KVM_RUN fail, and that ends the guest. Memory is closed before it is discarded, or the guest could
//! fault it in again in between. A step that fails undoes those before it. That an undoing fails as well is [`Refused::Lost`]: then
//! nobody can say what the guest has, and the machine must end.
//!
//! This module knows neither virtio nor KVM: [`Host`] does the steps. Offsets are relative to the region's start.

mod host;
mod ranges;
#[cfg(any(test, fuzzing))]
#[allow(clippy::unwrap_used, reason = "whatever fails here fails a test")]
#[cfg_attr(fuzzing, allow(dead_code, reason = "tests need more of it"))]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

use std::io;
use std::ops::Range;

pub use host::Mapping;
pub use ranges::RangeSet;

/// Memory is plugged and unplugged in blocks of this size: a huge page, below which it could not be returned whole.
pub const BLOCK_BYTES: u64 = 2 << 20;
/// Smallest KVM slot, the smallest memory block of Linux on x86.
const MIN_SLOT_BYTES: u64 = 128 << 20;
/// Most KVM slots of a region; KVM had 509 before Linux 5.12.
const MAX_SLOTS: u64 = 256;

/// Carries the steps out. Each either happens or changes nothing.
pub trait Host: Send {
    /// Makes a range accessible to this process, and with that to a guest whose slot spans it.
    ///
    /// # Errors
    /// What mprotect(2) says.
    fn open(&mut self, range: &Range<u64>) -> io::Result<()>;
    /// Makes it inaccessible.
    ///
    /// # Errors
    /// What mprotect(2) says.
    fn close(&mut self, range: &Range<u64>) -> io::Result<()>;
    /// Gives its pages back to the host.
    ///
    /// # Errors
    /// What madvise(2) says.
    fn discard(&mut self, range: &Range<u64>) -> io::Result<()>;
    /// Lets the guest reach slot number `slot`.
    ///
    /// # Errors
    /// What KVM says.
    fn add_slot(&mut self, slot: u64, range: &Range<u64>) -> io::Result<()>;
    /// Undoes [`Host::add_slot`].
    ///
    /// # Errors
    /// What KVM says.
    fn remove_slot(&mut self, slot: u64) -> io::Result<()>;
    /// Lets devices reach these ranges of the region and no others.
    ///
    /// # Errors
    /// When the map cannot be built.
    fn publish(&mut self, plugged: &RangeSet) -> io::Result<()>;
}

/// Why blocks were neither plugged nor unplugged.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// Some of them are so already.
    #[error("not all of the blocks are in the state that the request changes")]
    State,
    /// The host has failed, and all is as it was before.
    #[error("the host cannot do it now: {0}")]
    Busy(io::Error),
    /// The host has failed and could not go back.
    #[error("the host failed to change the guest's memory ({first}) and to change it back ({second})")]
    Lost {
        /// What failed.
        first: io::Error,
        /// What failed while undoing.
        second: io::Error,
    },
}

/// What is plugged of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plugged {
    /// All.
    All,
    /// Some.
    Some,
    /// Nothing.
    Nothing,
}

/// See the module.
pub struct Region {
    bytes: u64,
    slot_bytes: u64,
    plugged: RangeSet,
    host: Box<dyn Host>,
}

/// Size of the KVM slots of a region of `bytes`.
pub fn slot_bytes(bytes: u64) -> u64 {
    (bytes / MAX_SLOTS).next_power_of_two().max(MIN_SLOT_BYTES)
}

impl Region {
    /// A region of `bytes` with nothing plugged, as `host` must have it too.
    pub fn new(bytes: u64, host: Box<dyn Host>) -> Self {
        Self { bytes, slot_bytes: slot_bytes(bytes), plugged: RangeSet::default(), host }
    }

    /// Size.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What of it is plugged.
    pub fn plugged_bytes(&self) -> u64 {
        self.plugged.bytes()
    }

    /// What of `range`, which lies in the region, is plugged.
    pub fn state(&self, range: &Range<u64>) -> Plugged {
        match (self.plugged.contains(range), self.plugged.intersects(range)) {
            (true, _) => Plugged::All,
            (false, true) => Plugged::Some,
            (false, false) => Plugged::Nothing,
        }
    }

    fn slot_range(&self, slot: u64) -> Range<u64> {
        slot * self.slot_bytes..((slot + 1) * self.slot_bytes).min(self.bytes)
    }

    /// The slots of `range` in which nothing is plugged.
    fn idle_slots(&self, range: &Range<u64>) -> Vec<u64> {
        let slots = range.start / self.slot_bytes..range.end.div_ceil(self.slot_bytes);
        slots.filter(|slot| !self.plugged.intersects(&self.slot_range(*slot))).collect()
    }

    /// Gives the guest a range of blocks that lies in the region, none of which it has.
    ///
    /// # Errors
    /// [`Refused`].
    pub fn plug(&mut self, range: Range<u64>) -> Result<(), Refused> {
        if self.plugged.intersects(&range) {
            return Err(Refused::State);
        }
        self.host.open(&range).map_err(Refused::Busy)?;
        let slots = self.idle_slots(&range);
        let mut added = Vec::with_capacity(slots.len());
        for slot in slots {
            if let Err(error) = self.host.add_slot(slot, &self.slot_range(slot)) {
                return Err(self.undo_plug(&range, &added, error));
            }
            added.push(slot);
        }
        self.plugged.insert(range.clone());
        if let Err(error) = self.host.publish(&self.plugged) {
            self.plugged.remove(&range);
            return Err(self.undo_plug(&range, &added, error));
        }
        Ok(())
    }

    /// Takes the memory back that the guest could reach for a moment, so its content goes as well.
    fn undo_plug(&mut self, range: &Range<u64>, added: &[u64], first: io::Error) -> Refused {
        let undone = self
            .host
            .close(range)
            .and_then(|()| added.iter().try_for_each(|slot| self.host.remove_slot(*slot)))
            .and_then(|()| self.host.discard(range));
        match undone {
            Ok(()) => Refused::Busy(first),
            Err(second) => Refused::Lost { first, second },
        }
    }

    /// Takes a range of blocks back that lies in the region, all of which the guest has.
    ///
    /// # Errors
    /// [`Refused`].
    pub fn unplug(&mut self, range: &Range<u64>) -> Result<(), Refused> {
        if !self.plugged.contains(range) {
            return Err(Refused::State);
        }
        self.take(range, std::slice::from_ref(range))
    }

    /// Takes everything back.
    ///
    /// # Errors
    /// [`Refused::Busy`] or [`Refused::Lost`].
    pub fn unplug_all(&mut self) -> Result<(), Refused> {
        let runs: Vec<_> = self.plugged.runs().collect();
        match (runs.first(), runs.last()) {
            // In one piece, however it was cut: what lies between is closed and empty already.
            (Some(first), Some(last)) => self.take(&(first.start..last.end), &runs),
            _ => Ok(()),
        }
    }

    /// Takes the plugged `runs` back; `span` begins and ends with them.
    fn take(&mut self, span: &Range<u64>, runs: &[Range<u64>]) -> Result<(), Refused> {
        let before = self.plugged.clone();
        runs.iter().for_each(|run| self.plugged.remove(run));
        if let Err(error) = self.host.publish(&self.plugged) {
            self.plugged = before;
            return Err(Refused::Busy(error));
        }
        let mut removed = Vec::new();
        match self.withdraw(span, &before, &mut removed) {
            Ok(()) => Ok(()),
            Err(first) => {
                self.plugged = before;
                Err(match self.give_back(runs, &removed) {
                    Ok(()) => Refused::Busy(first),
                    Err(second) => Refused::Lost { first, second },
                })
            }
        }
    }

    fn withdraw(&mut self, span: &Range<u64>, before: &RangeSet, removed: &mut Vec<u64>) -> io::Result<()> {
        self.host.close(span)?;
        self.host.discard(span)?;
        for slot in self.idle_slots(span) {
            if before.intersects(&self.slot_range(slot)) {
                self.host.remove_slot(slot)?;
                removed.push(slot);
            }
        }
        Ok(())
    }

    /// The guest was told that nothing has changed; that the content is gone is what a driver that gave it away must expect.
    fn give_back(&mut self, runs: &[Range<u64>], removed: &[u64]) -> io::Result<()> {
        for run in runs {
            self.host.open(run)?;
        }
        for &slot in removed {
            self.host.add_slot(slot, &self.slot_range(slot))?;
        }
        self.host.publish(&self.plugged)
    }
}
