//! Pages that the driver has put into the balloon and that have not gone back to the host yet.
//!
//! Linux hands a balloon over by 256 pages, 1 MiB, and waits for the answer each time; the host gives memory by huge pages of 2 MiB. To
//! discard each half on its own would have the host split the huge page first, which takes longer than all the rest. So the driver is
//! answered at once, whole huge pages go back as they come together, and what is left over goes back when the driver pauses.
//!
//! That is sound with VIRTIO_BALLOON_F_MUST_TELL_HOST only: the driver then uses no page before its deflation has been answered, and
//! the answer waits until everything from before is done.
//!
//! What is left over is a part of a huge page mostly, and the host goes on holding the whole of it, until it is short of memory and splits it.
//! Who pays for that memory cannot wait so long: when the driver has paused for longer, these huge pages are split, a few at a time, each of
//! which takes a third of a millisecond. They stay split, lest khugepaged make them whole again, until one of their pages leaves the balloon.

use std::collections::BTreeSet;
use std::ops::Range;
use std::time::Duration;

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::pages::{self, FRAME_BYTES};

/// A huge page of the host.
const HUGE_BYTES: u64 = 2 << 20;
/// Most pages kept: 128 MiB.
pub const MAX_FRAMES: usize = 1 << 15;
/// How long the driver must pause before what is left over goes back.
pub const PAUSE: Duration = Duration::from_millis(20);

/// How long it must pause before huge pages are split, and how long that rests in between: whatever a guest does, it takes 5 % of a core.
pub const SPLIT_PAUSE: Duration = Duration::from_millis(100);
/// Huge pages split at a time.
const SPLITS: usize = 16;
/// Most huge pages that wait for it: 128 GiB.
const MAX_BROKEN: usize = 1 << 16;

/// Most huge pages that are kept from becoming whole: each may make three mappings of one, and a process has 65,530 (vm.max_map_count).
const MAX_KEPT_SPLIT: usize = 8192;

/// See the module.
#[derive(Default)]
pub struct Later {
    frames: Vec<u32>,
    /// Numbers of huge pages of which a part has gone back.
    broken: BTreeSet<u64>,
    /// Numbers of those that were split.
    split: BTreeSet<u64>,
}

fn range_of(number: u64) -> Range<u64> {
    number * HUGE_BYTES..(number + 1) * HUGE_BYTES
}

impl Later {
    /// Where pages are added.
    pub fn frames(&mut self) -> &mut Vec<u32> {
        &mut self.frames
    }

    /// Nothing waits.
    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Some huge pages are to be split.
    pub fn has_broken(&self) -> bool {
        !self.broken.is_empty()
    }

    /// Forgets all pages: they stay with the guest, or come back by being used.
    pub fn forget(&mut self, memory: &GuestMemoryMmap) {
        let Self { split, .. } = std::mem::take(self);
        split.into_iter().for_each(|number| pages::allow_huge(memory, &range_of(number), true));
    }

    /// Some huge page was split, and is kept so.
    pub fn has_split(&self) -> bool {
        !self.split.is_empty()
    }

    /// These pages leave the balloon: what they are parts of may become whole again.
    pub fn leave(&mut self, memory: &GuestMemoryMmap, frames: &[u32]) {
        for number in frames.iter().map(|frame| u64::from(*frame) * FRAME_BYTES / HUGE_BYTES) {
            if self.split.remove(&number) {
                pages::allow_huge(memory, &range_of(number), true);
            }
        }
    }

    /// Discards whole huge pages, and everything if there is too much.
    pub fn discard_whole(&mut self, memory: &GuestMemoryMmap) {
        if self.frames.len() > MAX_FRAMES {
            return self.discard_all(memory);
        }
        let mut left = Vec::new();
        pages::for_each_run(&mut self.frames, |run| {
            let start = run.start.next_multiple_of(HUGE_BYTES).min(run.end);
            let end = (run.end / HUGE_BYTES * HUGE_BYTES).max(start);
            if start < end {
                pages::discard(memory, &(start..end));
                (start..end).step_by(HUGE_BYTES as usize).for_each(|whole| {
                    self.broken.remove(&(whole / HUGE_BYTES));
                });
            }
            let frames = (run.start..start).chain(end..run.end).step_by(FRAME_BYTES as usize);
            left.extend(frames.map(|at| (at / FRAME_BYTES) as u32));
        });
        self.frames = left;
    }

    /// Discards everything.
    pub fn discard_all(&mut self, memory: &GuestMemoryMmap) {
        pages::for_each_run(&mut self.frames, |run| {
            pages::discard(memory, &run);
            let ends = [run.start, run.end].into_iter().filter(|end| !end.is_multiple_of(HUGE_BYTES));
            for number in ends.map(|end| end / HUGE_BYTES) {
                let there = memory.find_region(GuestAddress(number * HUGE_BYTES)).is_some();
                if there && self.broken.len() < MAX_BROKEN {
                    self.broken.insert(number);
                }
            }
        });
        self.frames = Vec::new();
    }

    /// Splits a few of the huge pages that are to be split.
    pub fn split_some(&mut self, memory: &GuestMemoryMmap) {
        for _ in 0..SPLITS {
            let Some(number) = self.broken.pop_first() else { break };
            if self.split.len() < MAX_KEPT_SPLIT && self.split.insert(number) {
                pages::allow_huge(memory, &range_of(number), false);
            }
            pages::split(memory, &range_of(number));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::testing;
    use super::*;
    use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

    /// What the kernel says of the mapping that has this guest address (VmFlags of /proc/self/smaps).
    fn flags(map: &GuestMemoryMmap, address: u64) -> String {
        let at = map.get_host_address(GuestAddress(address)).unwrap() as usize;
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut here = false;
        for line in smaps.lines() {
            let (first, rest) = line.split_once(' ').unwrap_or((line, ""));
            if let Some((start, end)) = first.split_once('-') {
                let number = |text| usize::from_str_radix(text, 16).unwrap_or(0);
                here = (number(start)..number(end)).contains(&at);
            } else if here && first == "VmFlags:" {
                return rest.to_owned();
            }
        }
        panic!("no mapping of {address:#x}")
    }

    #[test]
    fn huge_pages_go_back_when_they_are_whole_and_the_rest_when_asked() {
        let memory = testing::memory();
        let map = memory.memory();
        let huge = HUGE_BYTES;
        map.write_slice(&vec![7; 4 * huge as usize], GuestAddress(3 * huge)).unwrap();
        let empty = |at: u64| map.read_obj::<u8>(GuestAddress(at)).unwrap() == 0;
        let frames = |range: Range<u64>| range.map(|frame| frame as u32);
        let mut later = Later::default();
        let half = huge / FRAME_BYTES / 2;
        // The second half first, with a bit of the next.
        later.frames().extend(frames(7 * half..8 * half + 3).rev());
        later.discard_whole(&map);
        assert!(!empty(4 * huge - 1) && later.frames().len() as u64 == half + 3);
        later.frames().extend(frames(6 * half..7 * half));
        later.discard_whole(&map);
        assert!(empty(3 * huge) && empty(4 * huge - 1) && !empty(4 * huge));
        assert_eq!(*later.frames(), frames(8 * half..8 * half + 3).collect::<Vec<_>>());
        later.discard_all(&map);
        assert!(empty(4 * huge + 2 * FRAME_BYTES) && !empty(4 * huge + 3 * FRAME_BYTES));
        assert!(later.is_empty());
        // Of the fourth a part has gone back; the third has gone as a whole.
        assert_eq!(later.broken.iter().copied().collect::<Vec<_>>(), [4]);
        later.split_some(&map);
        assert!(!later.has_broken() && !empty(4 * huge + 3 * FRAME_BYTES), "what it still has is as it was");
        assert!(later.has_split() && flags(&map, 4 * huge).contains("nh"), "{}", flags(&map, 4 * huge));
        assert!(!flags(&map, 3 * huge).contains("nh") && !flags(&map, 5 * huge).contains("nh"));
        later.leave(&map, &[(5 * huge / FRAME_BYTES) as u32, u32::MAX]);
        assert!(later.has_split(), "another one");
        later.leave(&map, &[(4 * huge / FRAME_BYTES) as u32 + 9]);
        assert!(!later.has_split() && !flags(&map, 4 * huge).contains("nh"));
        later.frames().push(u32::MAX);
        later.discard_all(&map);
        assert!(!later.has_broken(), "no memory");
        later.frames().extend(frames(6 * half + 1..7 * half));
        later.discard_all(&map);
        later.frames().extend(frames(6 * half..8 * half));
        later.discard_whole(&map);
        assert!(!later.has_broken(), "the rest has followed");
        later.frames().extend((0..=MAX_FRAMES as u32).map(|i| 2 * i));
        later.discard_whole(&map);
        assert!(later.is_empty(), "too much to keep");
        later.split_some(&map);
        assert!(later.has_split());
        later.forget(&map);
        assert!(!later.has_split() && !later.has_broken() && !flags(&map, 0).contains("nh"));
    }
}
