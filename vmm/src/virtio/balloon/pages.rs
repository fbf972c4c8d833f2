//! Gives pages back to the host: sorted, adjacent ones together, one madvise(2) per run.
//!
//! Only memory that the guest has is touched; the rest of a range is skipped. What the guest says is not checked otherwise: it can throw
//! away nothing but its own memory, which reads as zero afterwards.

use std::ops::Range;

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// Unit of page frame numbers, whatever the guest's page size is (virtio 1.2, 5.5.6).
pub const FRAME_BYTES: u64 = 4096;
/// Where there is no memory, the next look is taken at a multiple of this, which all regions begin at.
const STEP: u64 = 2 << 20;

/// Sorts `frames` and calls `visit` with each longest run of guest addresses.
pub fn for_each_run(frames: &mut [u32], mut visit: impl FnMut(Range<u64>)) {
    frames.sort_unstable();
    let mut run = 0..0;
    for &frame in &*frames {
        let start = u64::from(frame) * FRAME_BYTES;
        if start > run.end {
            if !run.is_empty() {
                visit(run);
            }
            run = start..start;
        } else if run.is_empty() {
            // The very first frame is number 0.
            run.start = start;
        }
        run.end = run.end.max(start + FRAME_BYTES);
    }
    if !run.is_empty() {
        visit(run);
    }
}

/// The part of `start..start + len` that consists of whole frames.
pub fn whole_frames(start: u64, len: u64) -> Range<u64> {
    let end = start.saturating_add(len) & !(FRAME_BYTES - 1);
    match start.checked_next_multiple_of(FRAME_BYTES) {
        Some(start) if start < end => start..end,
        _ => 0..0,
    }
}

/// Gives what there is of `range`, whole frames, back to the host; returns how many bytes. A refusal by the host leaves pages where
/// they are, which harms nobody.
pub fn discard(memory: &GuestMemoryMmap, range: &Range<u64>) -> u64 {
    advise(memory, range, libc::MADV_DONTNEED)
}

/// Has the host split a huge page in `range` of which a part has been discarded: until then it holds all of it. MADV_COLD of madvise(2),
/// since Linux 5.4, splits what it covers only the rest of, and keeps every content; a host that is older or refuses goes on holding it.
pub fn split(memory: &GuestMemoryMmap, range: &Range<u64>) {
    advise(memory, range, libc::MADV_COLD);
}

/// Whether the host may make huge pages of what is in `range`. Where it may, khugepaged (admin-guide/mm/transhuge) fills what has been discarded of
/// one with zeroes after some seconds, as long as a single page of it is left (`max_ptes_none`).
pub fn allow_huge(memory: &GuestMemoryMmap, range: &Range<u64>, may: bool) {
    advise(memory, range, if may { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE });
}

fn advise(memory: &GuestMemoryMmap, range: &Range<u64>, advice: libc::c_int) -> u64 {
    let (mut at, mut done) = (range.start, 0);
    while at < range.end {
        let Some(region) = memory.find_region(GuestAddress(at)) else {
            at = (at / STEP + 1).saturating_mul(STEP);
            continue;
        };
        let offset = at - region.start_addr().0;
        let len = (region.len() - offset).min(range.end - at);
        let pointer = region.as_ptr().wrapping_add(offset as usize);
        // SAFETY: the range lies in one region of a private anonymous mapping that is never unmapped. The guest may see its content
        // vanish at any time, and devices read such memory with no promise about its content.
        if unsafe { libc::madvise(pointer.cast(), len as usize, advice) } == 0 {
            done += len;
        }
        at += len;
    }
    done
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn runs_are_the_frames_as_few_as_can_be(
            frames in prop::collection::vec(prop_oneof![0..40u32, u32::MAX - 8..=u32::MAX], 0..60)
        ) {
            let mut runs = Vec::new();
            for_each_run(&mut frames.clone(), |run| runs.push(run));
            let covered: Vec<u32> = runs
                .iter()
                .flat_map(|run| run.start / FRAME_BYTES..run.end / FRAME_BYTES)
                .map(|frame| frame as u32)
                .collect();
            let expected: Vec<u32> = frames.into_iter().collect::<BTreeSet<_>>().into_iter().collect();
            prop_assert_eq!(covered, expected);
            for pair in runs.windows(2) {
                prop_assert!(pair[0].end < pair[1].start, "{:?} could be one", pair);
            }
        }

        #[test]
        fn whole_frames_lie_within(start in any::<u64>(), len in 0..20_000u64) {
            let range = whole_frames(start, len);
            prop_assert!(range.start.is_multiple_of(FRAME_BYTES) && range.end.is_multiple_of(FRAME_BYTES));
            prop_assert!(range.is_empty() || (range.start >= start && range.end <= start.saturating_add(len)));
        }
    }
}
