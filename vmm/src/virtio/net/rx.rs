//! Receive buffers: taken from the ring ahead of time, filled by one readv(2) per frame.
//!
//! ```text
//! held:  [chain][chain][chain]…│spill      readv fills from the left; what overflows lands in the spill buffer
//! frame: ██████████████                    uses up the first two chains, `num_buffers` = 2
//! ```
//! With mergeable buffers an overflowing frame is completed by a copy as soon as the driver has offered enough more, and
//! dropped when it keeps failing to. Without them a frame has exactly one chain, and is dropped if that is too short.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use vm_memory::GuestMemoryMmap;

use super::super::chain::{Chain, ChainError, Half};
use super::super::iovecs::IoVecs;
use super::super::served::ServedQueue;
use super::tap::Tap;
use super::{HEADER_BYTES, MAX_FRAME_BYTES, MAX_PIECES};
use crate::control::wire::NicStats;

/// Where `num_buffers` is in the header.
const NUM_BUFFERS_AT: usize = 10;
/// How often the driver may offer buffers without offering enough for a frame that waits.
const MAX_REFUSALS: u8 = 16;
/// Most buffers held; a frame in more than so many is dropped.
const MAX_HELD: usize = 128;

#[derive(Clone, Copy)]
struct Held {
    head: u16,
    bytes: usize,
    pieces: usize,
}

/// A frame that was read and is not yet given to the driver.
#[derive(Clone, Copy)]
struct Frame {
    bytes: usize,
    /// Of these, how many are in guest memory; the rest is in the spill buffer.
    placed: usize,
}

/// The buffers, and at most one frame that waits for more of them.
pub struct Receiver {
    memory: Arc<GuestMemoryMmap>,
    /// Bytes worth holding: the longest frame expected.
    wanted: usize,
    mergeable: bool,
    held: VecDeque<Held>,
    held_bytes: usize,
    pieces: IoVecs,
    spill: Vec<u8>,
    frame: Option<Frame>,
    refusals: u8,
    used: Vec<(u16, u32)>,
}

impl Receiver {
    /// Holds buffers for frames of `wanted` bytes with their headers.
    pub fn new(memory: Arc<GuestMemoryMmap>, wanted: usize, mergeable: bool) -> Self {
        Self {
            memory,
            wanted,
            mergeable,
            held: VecDeque::new(),
            held_bytes: 0,
            pieces: IoVecs::default(),
            spill: vec![0; MAX_FRAME_BYTES],
            frame: None,
            refusals: 0,
            used: Vec::new(),
        }
    }

    /// Follows a change of the memory map: buffers go back to the ring and are looked up again.
    pub fn remap(&mut self, queue: &mut ServedQueue, memory: &Arc<GuestMemoryMmap>) {
        if !Arc::ptr_eq(memory, &self.memory) {
            queue.unpop(self.held.len());
            self.held.clear();
            self.held_bytes = 0;
            self.pieces.clear(MAX_PIECES);
            self.memory = memory.clone();
        }
    }

    /// Takes buffers from the ring until there are `bytes`; tells whether there are.
    fn gather(
        &mut self,
        queue: &mut ServedQueue,
        chain: &mut Chain,
        bytes: usize,
    ) -> Result<bool, ChainError> {
        let limit = if self.mergeable { MAX_HELD } else { 1 };
        while self.held_bytes < bytes && self.held.len() < limit {
            if !queue.pop(&self.memory, chain)? {
                // Buffers in hand suffice for now unless a frame waits for more.
                if (self.held.is_empty() || self.frame.is_some())
                    && queue.enable_notification(&self.memory)?
                {
                    continue;
                }
                break;
            }
            let length = chain.writable_bytes();
            if length < HEADER_BYTES as u64 {
                return Err(ChainError::Short { have: length, need: HEADER_BYTES as u64 });
            }
            // More than the longest frame is never filled.
            let length = length.min(MAX_FRAME_BYTES as u64);
            let before = self.pieces.as_slice().len();
            let entries = self.pieces.entries();
            if before + chain.segments() > MAX_PIECES && before > 0 {
                queue.unpop(1);
                break;
            }
            chain.iovecs(&self.memory, Half::Writable, (0, length), MAX_PIECES, entries)?;
            let pieces = entries.len() - before;
            self.held.push_back(Held { head: chain.head(), bytes: length as usize, pieces });
            self.held_bytes += length as usize;
        }
        Ok(self.held_bytes >= bytes)
    }

    /// Gives the frame read last to the driver, if there is one and it fits, then holds buffers for the next. Tells whether a
    /// frame can be read.
    ///
    /// # Errors
    /// When the driver broke the rules.
    pub fn prepare(
        &mut self,
        queue: &mut ServedQueue,
        chain: &mut Chain,
        stats: &mut NicStats,
    ) -> Result<bool, ChainError> {
        if let Some(frame) = self.frame {
            if self.gather(queue, chain, frame.bytes)? {
                self.complete(queue, frame)?;
                stats.rx_packets += 1;
                stats.rx_bytes += (frame.bytes - HEADER_BYTES) as u64;
            } else {
                self.refusals += 1;
                let hopeless = !self.mergeable || self.held.len() >= usize::from(queue.size()).min(MAX_HELD);
                if !hopeless && self.refusals <= MAX_REFUSALS {
                    return Ok(false);
                }
                stats.rx_dropped += 1;
            }
            self.frame = None;
            self.refusals = 0;
        }
        self.gather(queue, chain, self.wanted)?;
        Ok(!self.held.is_empty())
    }

    /// Reads one frame into what is held. There must be no frame waiting.
    ///
    /// # Errors
    /// What the tap says; nothing was read then.
    pub fn read(&mut self, tap: &Tap) -> io::Result<()> {
        let spill = libc::iovec { iov_base: self.spill.as_mut_ptr().cast(), iov_len: self.spill.len() };
        let entries = self.pieces.entries();
        entries.push(spill);
        let result = tap.read(entries);
        entries.pop();
        let bytes = result?;
        if bytes >= HEADER_BYTES {
            self.frame = Some(Frame { bytes, placed: bytes.min(self.held_bytes) });
        }
        Ok(())
    }

    /// `frame` fits into what is held: completes it and gives its buffers back.
    fn complete(&mut self, queue: &mut ServedQueue, frame: Frame) -> Result<(), ChainError> {
        let tail = self.spill.get(..frame.bytes - frame.placed).unwrap_or_default();
        self.pieces.scatter_at(frame.placed, tail);
        self.used.clear();
        let (mut left, mut pieces) = (frame.bytes, 0);
        while let Some(held) = self.held.front().copied()
            && left > 0
        {
            self.held.pop_front();
            let part = left.min(held.bytes);
            self.used.push((held.head, part as u32));
            left -= part;
            pieces += held.pieces;
            self.held_bytes -= held.bytes;
        }
        let count = self.used.len() as u16;
        self.pieces.scatter_at(NUM_BUFFERS_AT, &count.to_le_bytes());
        self.pieces.entries().drain(..pieces);
        queue.push_together(&self.memory, &self.used)
    }
}
