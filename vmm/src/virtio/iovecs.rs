//! Host addresses of guest buffers, as the kernel takes them (readv(2), io_uring).

use std::ptr::copy_nonoverlapping;

use vm_memory::{GuestMemoryBackend, GuestMemoryMmap};

/// A list of pieces of guest memory. Whoever fills it keeps the guest memory map alive for as long as the list is used,
/// and asks [`IoVecs::lie_in`] before bytes are copied after the map may have changed.
#[derive(Default)]
pub struct IoVecs(Vec<libc::iovec>);

// SAFETY: the pointers lead into guest memory, which is mapped in the whole process and shared with the guest anyway;
// no thread gains an access by them that it would not have otherwise.
unsafe impl Send for IoVecs {}

impl IoVecs {
    /// Forgets all pieces; keeps room for `keep` and gives the rest of the heap back.
    pub fn clear(&mut self, keep: usize) {
        self.0.clear();
        if self.0.capacity() > keep {
            self.0 = Vec::new();
        }
    }

    /// Where pieces are added.
    pub fn entries(&mut self) -> &mut Vec<libc::iovec> {
        &mut self.0
    }

    /// The pieces.
    pub fn as_slice(&self) -> &[libc::iovec] {
        &self.0
    }

    /// Whether every piece begins and ends at a multiple of `align` (a power of two).
    pub fn aligned(&self, align: usize) -> bool {
        self.0.iter().all(|piece| (piece.iov_base.addr() | piece.iov_len) & (align - 1) == 0)
    }

    /// Whether every piece lies in what `memory` maps. A piece was looked up in a map that may be older.
    pub fn lie_in(&self, memory: &GuestMemoryMmap) -> bool {
        self.0.iter().all(|piece| {
            let (start, end) = (piece.iov_base.addr(), piece.iov_base.addr().saturating_add(piece.iov_len));
            memory.iter().any(|region| {
                let first = region.as_ptr().addr();
                first <= start && end <= first + region.size()
            })
        })
    }

    /// Drops the first `count` bytes.
    pub fn advance(&mut self, count: usize) {
        let mut left = count;
        let whole = self.0.iter().take_while(|piece| {
            let done = piece.iov_len <= left;
            if done {
                left -= piece.iov_len;
            }
            done
        });
        let whole = whole.count();
        self.0.drain(..whole);
        if let Some(piece) = self.0.first_mut() {
            piece.iov_base = piece.iov_base.wrapping_byte_add(left);
            piece.iov_len -= left;
        }
    }

    /// Copies the first bytes of guest memory out.
    pub fn gather(&self, data: &mut [u8]) {
        let mut at = 0;
        for piece in &self.0 {
            let take = piece.iov_len.min(data.len() - at);
            let target = &mut data[at..at + take];
            // SAFETY: the piece is mapped guest memory of at least this length (invariant of the list), `target` is ours and
            // does not overlap it. The guest may write meanwhile: then the bytes are whatever it wrote, nobody interprets them.
            unsafe {
                copy_nonoverlapping(piece.iov_base.cast::<u8>().cast_const(), target.as_mut_ptr(), take)
            };
            at += take;
        }
    }

    /// Copies `data` to `offset` bytes behind the start.
    pub fn scatter_at(&self, offset: usize, data: &[u8]) {
        let mut skip = offset;
        let mut left = data;
        for piece in &self.0 {
            if skip >= piece.iov_len {
                skip -= piece.iov_len;
                continue;
            }
            let take = left.len().min(piece.iov_len - skip);
            let (now, later) = left.split_at(take);
            let target = piece.iov_base.cast::<u8>().wrapping_add(skip);
            // SAFETY: `skip + take` is within the piece, which is mapped guest memory (invariant of the list).
            unsafe { copy_nonoverlapping(now.as_ptr(), target, take) };
            (left, skip) = (later, 0);
        }
    }

    /// Copies into the first bytes of guest memory.
    pub fn scatter(&self, data: &[u8]) {
        self.scatter_at(0, data);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_walked_in_order() {
        let mut memory = [*b"abc", *b"def"];
        let mut list = IoVecs::default();
        for part in &mut memory {
            list.entries().push(libc::iovec { iov_base: part.as_mut_ptr().cast(), iov_len: 3 });
        }
        list.advance(2);
        let mut data = [0; 3];
        list.gather(&mut data);
        assert_eq!(&data, b"cde");
        list.scatter(b"XY");
        list.advance(4);
        assert!(list.as_slice().is_empty());
        assert_eq!(&memory, &[*b"abX", *b"Yef"]);
    }
}
