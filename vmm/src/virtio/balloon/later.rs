//! Pages that the driver has put into the balloon and that have not gone back to the host yet.
//!
//! Linux hands a balloon over by 256 pages, 1 MiB, and waits for the answer each time; the host gives memory by huge pages of 2 MiB. To
//! discard each half on its own would have the host split the huge page first, which takes longer than all the rest. So the driver is
//! answered at once, whole huge pages go back as they come together, and what is left over goes back when the driver pauses.
//!
//! That is sound with VIRTIO_BALLOON_F_MUST_TELL_HOST only: the driver then uses no page before its deflation has been answered, and
//! the answer waits until everything from before is done.

use std::time::Duration;

use vm_memory::GuestMemoryMmap;

use super::pages::{self, FRAME_BYTES};

/// A huge page of the host.
const HUGE_BYTES: u64 = 2 << 20;
/// Most pages kept: 128 MiB.
pub const MAX_FRAMES: usize = 1 << 15;
/// How long the driver must pause before what is left over goes back.
pub const PAUSE: Duration = Duration::from_millis(20);

/// See the module.
#[derive(Default)]
pub struct Later {
    frames: Vec<u32>,
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

    /// Forgets all pages: they stay with the guest.
    pub fn forget(&mut self) {
        self.frames = Vec::new();
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
        });
        self.forget();
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::testing;
    use super::*;
    use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

    #[test]
    fn huge_pages_go_back_when_they_are_whole_and_the_rest_when_asked() {
        let memory = testing::memory();
        let map = memory.memory();
        let huge = HUGE_BYTES;
        map.write_slice(&vec![7; 4 * huge as usize], GuestAddress(3 * huge)).unwrap();
        let empty = |at: u64| map.read_obj::<u8>(GuestAddress(at)).unwrap() == 0;
        let frames = |range: std::ops::Range<u64>| range.map(|frame| frame as u32);
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
        later.frames().extend((0..=MAX_FRAMES as u32).map(|i| 2 * i));
        later.discard_whole(&map);
        assert!(later.is_empty(), "too much to keep");
    }
}
