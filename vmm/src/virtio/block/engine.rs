//! Requests in flight in the kernel, over io_uring.
//!
//! ```text
//! start ─▶ slot ─▶ submission ─▶ kernel ─▶ completion ─▶ reap ─▶ Finished
//!            ▲                                  │
//!            └──── rest of a short transfer, ───┘
//!                  next piece of a bounced one, another way to punch a hole
//! ```
//! A slot keeps the guest memory map alive that its addresses lead into, and everything that the kernel reads or writes,
//! until the completion is there. Nothing but the kernel ends a request: [`Engine::drain`] waits for all.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use io_uring::register::Restriction;
use io_uring::{IoUring, opcode, squeue, types};
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::super::iovecs::IoVecs;
use super::backend::Backend;
use super::request::Request;
use super::throttle::Alarm;

/// Pieces of guest memory that a free slot keeps room for.
const KEPT_PIECES: usize = 16;
/// Bytes moved at a time for buffers that O_DIRECT cannot use.
const BOUNCE_BYTES: usize = 64 * 1024;
/// Requests with such buffers in flight at once.
const MAX_BOUNCES: usize = 4;
/// How often one request is given to the kernel again although nothing moved (EINTR, EAGAIN).
const MAX_FRUITLESS: u8 = 8;
/// How often the kernel is asked again to take submissions when it is out of resources, before the caller goes on.
const MAX_SUBMITS: usize = 8;

/// A request with everything needed to answer it.
pub struct Job {
    /// Chain to give back.
    pub head: u16,
    /// Where the answer goes.
    pub status: GuestAddress,
    /// What is done.
    pub request: Request,
    /// Writes are durable before they are acknowledged.
    pub write_through: bool,
    /// The map that addresses were looked up in: keeps what the kernel reads and writes mapped.
    pub memory: Arc<GuestMemoryMmap>,
}

/// A job that is over.
pub struct Finished {
    /// The job.
    pub job: Job,
    /// 0, or the errno.
    pub errno: i32,
}

#[derive(Default)]
struct Slot {
    job: Option<Job>,
    pieces: IoVecs,
    done: u64,
    fruitless: u8,
    /// Ways to do it that the file system did not know.
    refused: u8,
    bounce: Option<Bounce>,
}

/// A buffer that starts at a multiple of the alignment.
struct Bounce {
    space: Vec<u8>,
    start: usize,
}

impl Bounce {
    fn new(align: usize) -> Self {
        let space = vec![0; BOUNCE_BYTES + align];
        let start = space.as_ptr().addr().wrapping_neg() & (align - 1);
        Self { space, start }
    }

    fn part(&mut self, len: usize) -> &mut [u8] {
        &mut self.space[self.start..self.start + len.min(BOUNCE_BYTES)]
    }
}

/// What one completion means for its slot.
enum Step {
    Again,
    Over(i32),
}

/// The disk's file in the ring's table.
const FILE: types::Fixed = types::Fixed(0);

/// IORING_REGISTER_FILES_UPDATE of linux/io_uring.h.
pub const REGISTER_FILES_UPDATE: u8 = 6;
/// No file, in a table of files.
const NO_FILE: RawFd = -1;

/// The only operations that the ring accepts, on registered files only, and the only change that can be made to it.
fn restrictions() -> [Restriction; 9] {
    let fixed_file = squeue::Flags::FIXED_FILE.bits();
    [
        Restriction::sqe_op(opcode::Readv::CODE),
        Restriction::sqe_op(opcode::Writev::CODE),
        Restriction::sqe_op(opcode::Read::CODE),
        Restriction::sqe_op(opcode::Write::CODE),
        Restriction::sqe_op(opcode::Fsync::CODE),
        Restriction::sqe_op(opcode::Fallocate::CODE),
        Restriction::register_op(REGISTER_FILES_UPDATE),
        Restriction::sqe_flags_allowed(fixed_file),
        Restriction::sqe_flags_required(fixed_file),
    ]
}

/// The ring and its slots.
///
/// No ring can be made once the process is filtered, so one for a disk to come is made before, without a file and slots:
/// then it takes some memory of the kernel's and nearly none of ours. The same holds for the timer that its disk waits with. A disk that
/// goes gives its ring back.
pub struct Engine {
    ring: IoUring,
    capacity: u16,
    slots: Vec<Slot>,
    free: Vec<u16>,
    completed: EventFd,
    alarm: Alarm,
    bounces: usize,
}

impl Engine {
    /// For at most `capacity` requests at once, on no file yet. The ring can do nothing but what this module does, to no
    /// other file: io_uring is not subject to system call filters (io_uring_register(2), IORING_REGISTER_RESTRICTIONS, 5.10).
    ///
    /// # Errors
    /// When the kernel has no such ring for us.
    pub fn new(capacity: u16) -> io::Result<Self> {
        let ring = IoUring::builder().dontfork().setup_r_disabled().build(u32::from(capacity))?;
        let completed = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let alarm = Alarm::new()?;
        let submitter = ring.submitter();
        submitter.register_eventfd(completed.as_raw_fd())?;
        submitter.register_files(&[NO_FILE])?;
        submitter.register_restrictions(&mut restrictions())?;
        submitter.register_enable_rings()?;
        Ok(Self { ring, capacity, slots: Vec::new(), free: Vec::new(), completed, alarm, bounces: 0 })
    }

    /// Serves the file `fd` from now on.
    ///
    /// # Errors
    /// When the kernel has no memory.
    pub fn open(&mut self, fd: RawFd) -> io::Result<()> {
        self.ring.submitter().register_files_update(FILE.0, &[fd])?;
        self.slots = (0..self.capacity).map(|_| Slot::default()).collect();
        // Taken from the end: a shallow queue keeps to a few slots and their memory.
        self.free = (0..self.capacity).rev().collect();
        Ok(())
    }

    /// Lets go of the file, once nothing is in flight any more; `None` when the ring is beyond use.
    pub fn close(mut self) -> Option<Self> {
        self.drain();
        let idle = self.in_flight() == 0;
        if !idle || self.ring.submitter().register_files_update(FILE.0, &[NO_FILE]).is_err() {
            return None;
        }
        (self.slots, self.free) = (Vec::new(), Vec::new());
        Some(self)
    }

    /// Readable when something has completed.
    pub fn completed(&self) -> &EventFd {
        &self.completed
    }

    /// Goes off when the next request is due.
    pub fn alarm(&mut self) -> &mut Alarm {
        &mut self.alarm
    }

    /// Whether another request fits.
    pub fn has_room(&self) -> bool {
        !self.free.is_empty() && self.bounces < MAX_BOUNCES
    }

    /// Requests that the kernel works on.
    pub fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Starts a job, for which [`Engine::has_room`]; `fill` lists the guest memory of reads and writes.
    ///
    /// # Errors
    /// Those of `fill`; nothing was started then.
    pub fn start<E>(
        &mut self,
        job: Job,
        backend: &Backend,
        fill: impl FnOnce(&mut Vec<libc::iovec>) -> Result<(), E>,
    ) -> Result<(), E> {
        let Some(&index) = self.free.last() else { return Ok(()) };
        let slot = &mut self.slots[usize::from(index)];
        slot.pieces.clear(KEPT_PIECES);
        fill(slot.pieces.entries())?;
        self.free.pop();
        if !slot.pieces.aligned(backend.memory_align) {
            slot.bounce = Some(Bounce::new(backend.memory_align));
            self.bounces += 1;
        }
        (slot.done, slot.fruitless, slot.refused) = (0, 0, 0);
        slot.job = Some(job);
        self.queue(index);
        Ok(())
    }

    fn queue(&mut self, index: u16) {
        let Some(entry) = self.slots[usize::from(index)].entry() else { return };
        let entry = entry.user_data(u64::from(index));
        // SAFETY: all that the entry points to lives in the slot (its pieces or its bounce buffer) or in guest memory, which
        // the slot's job keeps mapped; the slot is not touched until the completion is there.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        // There are as many slots as submission entries, and each slot is queued at most once between submissions.
        debug_assert!(pushed.is_ok());
    }

    /// Hands what was started to the kernel; `false` when some of it must be tried again later.
    pub fn submit(&mut self) -> bool {
        for _ in 0..MAX_SUBMITS {
            if self.ring.submission().is_empty() {
                return true;
            }
            // EINTR, EAGAIN and EBUSY are what can come back; the entries stay in the ring.
            let _ = self.ring.submit();
        }
        self.ring.submission().is_empty()
    }

    /// Takes what has completed, at most as much as was in flight, and calls `finish` for each job that is over. `memory` is the map of
    /// now: a request whose memory the guest has unplugged meanwhile fails with EFAULT, as the kernel makes it fail by itself.
    pub fn reap(&mut self, backend: &Backend, memory: &GuestMemoryMmap, mut finish: impl FnMut(Finished)) {
        for _ in 0..self.slots.len() {
            let Some(entry) = self.ring.completion().next() else { break };
            let index = entry.user_data() as u16;
            let Some(slot) = self.slots.get_mut(usize::from(index)) else { continue };
            // Bounced bytes are copied here and not in the kernel.
            if slot.bounce.is_some() && !slot.pieces.lie_in(memory) {
                self.release(index, libc::EFAULT, &mut finish);
                continue;
            }
            match slot.complete(entry.result(), backend) {
                Step::Again => self.queue(index),
                Step::Over(errno) => self.release(index, errno, &mut finish),
            }
        }
    }

    fn release(&mut self, index: u16, errno: i32, finish: &mut impl FnMut(Finished)) {
        let slot = &mut self.slots[usize::from(index)];
        slot.pieces.clear(KEPT_PIECES);
        if slot.bounce.take().is_some() {
            self.bounces -= 1;
        }
        if let Some(job) = slot.job.take() {
            self.free.push(index);
            finish(Finished { job, errno });
        }
    }

    /// Waits until the kernel has finished with all requests, and forgets them. Bounded by what the storage takes.
    pub fn drain(&mut self) {
        while self.in_flight() > 0 {
            let passing = [libc::EINTR, libc::EAGAIN, libc::EBUSY];
            if let Err(error) = self.ring.submit_and_wait(1)
                && !passing.contains(&error.raw_os_error().unwrap_or(0))
            {
                // The ring is beyond use: the slots stay taken, and with them the memory stays mapped.
                return;
            }
            for _ in 0..self.slots.len() {
                let Some(entry) = self.ring.completion().next() else { break };
                self.release(entry.user_data() as u16, libc::ECANCELED, &mut drop);
            }
        }
        // Nothing is left that this could announce.
        let _ = self.completed.read();
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // Closing a ring cancels only what has not begun; the kernel could still write to memory that is no longer ours.
        self.drain();
        if self.in_flight() > 0 {
            std::mem::forget(std::mem::take(&mut self.slots));
        }
    }
}

impl Slot {
    fn entry(&mut self) -> Option<squeue::Entry> {
        let job = self.job.as_ref()?;
        let fd = FILE;
        let flags = if job.write_through { libc::RWF_DSYNC } else { 0 };
        let pieces = self.pieces.as_slice();
        let count = pieces.len().min(libc::UIO_MAXIOV as usize) as u32;
        Some(match (job.request, &mut self.bounce) {
            (Request::Read { offset, .. }, None) => {
                opcode::Readv::new(fd, pieces.as_ptr(), count).offset(offset + self.done).build()
            }
            (Request::Write { offset, .. }, None) => opcode::Writev::new(fd, pieces.as_ptr(), count)
                .offset(offset + self.done)
                .rw_flags(flags)
                .build(),
            (Request::Read { offset, len }, Some(bounce)) => {
                let part = bounce.part((len - self.done) as usize);
                opcode::Read::new(fd, part.as_mut_ptr(), part.len() as u32).offset(offset + self.done).build()
            }
            (Request::Write { offset, len }, Some(bounce)) => {
                let part = bounce.part((len - self.done) as usize);
                self.pieces.gather(part);
                let write = opcode::Write::new(fd, part.as_ptr(), part.len() as u32);
                write.offset(offset + self.done).rw_flags(flags).build()
            }
            (Request::Discard { offset, len }, _) => {
                opcode::Fallocate::new(fd, len).offset(offset).mode(PUNCH).build()
            }
            (Request::WriteZeroes { offset, len, unmap }, _) => {
                // tmpfs, for one, can only punch.
                let mode = if unmap != (self.refused > 0) { PUNCH } else { ZERO };
                opcode::Fallocate::new(fd, len).offset(offset).mode(mode).build()
            }
            (Request::Flush | Request::GetId, _) => {
                opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build()
            }
        })
    }

    fn complete(&mut self, result: i32, backend: &Backend) -> Step {
        let Some(job) = &self.job else { return Step::Over(0) };
        match (result, job.request) {
            (0.., Request::Read { len, .. } | Request::Write { len, .. }) => {
                self.moved(result as usize, len, matches!(job.request, Request::Read { .. }))
            }
            (0.., _) => Step::Over(0),
            (error, _) if error == -libc::EINTR || error == -libc::EAGAIN => {
                self.fruitless += 1;
                if self.fruitless > MAX_FRUITLESS { Step::Over(-error) } else { Step::Again }
            }
            (error, Request::WriteZeroes { .. }) if error == -libc::EOPNOTSUPP && self.refused == 0 => {
                self.refused = 1;
                Step::Again
            }
            // A device that cannot zero quickly may still forget (thin volumes): the ioctl does not promise zeroes.
            (error, Request::Discard { offset, len }) if error == -libc::EOPNOTSUPP && backend.is_device => {
                Step::Over(backend.discard_now(offset, len).map_or_else(|errno| errno as i32, |()| 0))
            }
            (error, _) => Step::Over(error.saturating_neg()),
        }
    }

    /// `count` bytes of a transfer of `len` were moved by the last step.
    fn moved(&mut self, count: usize, len: u64, read: bool) -> Step {
        if let (true, Some(bounce)) = (read, &mut self.bounce) {
            self.pieces.scatter(bounce.part(count));
        }
        self.pieces.advance(count);
        self.done += count as u64;
        match count {
            _ if self.done >= len => Step::Over(0),
            // The file has become shorter than the disk.
            0 => Step::Over(libc::EIO),
            _ => Step::Again,
        }
    }
}

const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ring_does_nothing_else_and_knows_no_other_file() {
        let file = tempfile::tempfile().unwrap();
        let mut engine = Engine::new(8).unwrap();
        engine.open(file.as_raw_fd()).unwrap();
        let mut byte = 0u8;
        let entries = [
            opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), c"/dev/null".as_ptr()).build(),
            opcode::Read::new(types::Fd(file.as_raw_fd()), &raw mut byte, 1).build(),
            opcode::Read::new(types::Fixed(1), &raw mut byte, 1).build(),
        ];
        for (entry, expected) in entries.iter().zip([libc::EACCES, libc::EACCES, libc::EBADF]) {
            // SAFETY: the path is static, and the byte outlives the completion waited for below.
            unsafe { engine.ring.submission().push(entry) }.unwrap();
            engine.ring.submit_and_wait(1).unwrap();
            assert_eq!(engine.ring.completion().next().map(|entry| entry.result()), Some(-expected));
        }
        assert_eq!(byte, 0);
    }

    #[test]
    fn a_ring_serves_one_file_after_another_and_none_between() {
        use std::io::Write as _;
        let mut engine = Engine::new(8).unwrap();
        let read = |engine: &mut Engine| {
            let mut byte = 0u8;
            let entry = opcode::Read::new(FILE, &raw mut byte, 1).offset(0).build();
            // SAFETY: the byte outlives the completion waited for below.
            unsafe { engine.ring.submission().push(&entry.flags(squeue::Flags::FIXED_FILE)) }.unwrap();
            engine.ring.submit_and_wait(1).unwrap();
            (engine.ring.completion().next().map(|entry| entry.result()), byte)
        };
        assert_eq!(read(&mut engine), (Some(-libc::EBADF), 0));
        for content in *b"ab" {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(&[content]).unwrap();
            engine.open(file.as_raw_fd()).unwrap();
            assert_eq!(read(&mut engine), (Some(1), content));
            engine = engine.close().unwrap();
            assert_eq!(read(&mut engine), (Some(-libc::EBADF), 0));
        }
        assert!(engine.ring.submitter().unregister_files().is_err(), "the ring's restrictions were lost");
    }
}
