//! The serial console: a 16550 whose other end is a stream that was handed in, and a ring with the last output.
//!
//! Every byte that the guest writes is an exit of its vCPU, so what happens there is short: the byte is put into a buffer, and the
//! buffer is written to the stream when a line ends or the buffer is well filled. The rest is left to the device thread, which is
//! woken once and looks again some milliseconds later. A stream that takes nothing costs the oldest output, never time of the guest.
//! Descriptors are never switched to non-blocking mode: they may be shared with others (a terminal).

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

/// Output kept for those who come late.
pub const RING_BYTES: usize = 32 * 1024;
/// Output kept for a stream that does not take it.
const PENDING_BYTES: usize = 64 * 1024;
/// A buffer this full is written although no line ends.
const FLUSH_BYTES: usize = 512;
/// Bytes per write(2): a pipe or terminal that polls writable takes them without blocking.
const WRITE_BYTES: usize = 512;
/// Writes per flush.
const MAX_WRITES: usize = 256;
/// When the device thread looks again at what was not written: at first, and at most.
const FIRST_DELAY: Duration = Duration::from_millis(4);
const LAST_DELAY: Duration = Duration::from_millis(500);
const INPUT_BYTES: usize = 64;

/// An interrupt line by eventfd.
pub struct Line(EventFd);
impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Tells the device thread that the guest has read all input.
pub struct Drained {
    paused: Arc<AtomicBool>,
    wake: EventFd,
}

impl SerialEvents for Drained {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        if self.paused.load(Ordering::Acquire) {
            // A full counter wakes as well.
            let _ = self.wake.write(1);
        }
    }
}

struct Output {
    ring: VecDeque<u8>,
    pending: VecDeque<u8>,
    stream: Option<OwnedFd>,
    wake: EventFd,
    woken: bool,
}

fn push_bounded(queue: &mut VecDeque<u8>, byte: u8, bound: usize) {
    if queue.len() >= bound {
        queue.pop_front();
    }
    queue.push_back(byte);
}

impl Output {
    /// Writes what the stream takes now; `false` when the stream is gone.
    fn flush_pending(&mut self) -> bool {
        let Some(stream) = &self.stream else { return true };
        for _ in 0..MAX_WRITES {
            if self.pending.is_empty() {
                self.pending.shrink_to(FLUSH_BYTES);
                return true;
            }
            let (front, _) = self.pending.as_slices();
            match write_some(stream.as_fd(), &front[..front.len().min(WRITE_BYTES)]) {
                Ok(0) => return true,
                Ok(count) => drop(self.pending.drain(..count)),
                Err(_) => return false,
            }
        }
        true
    }
}

/// Writes without blocking; 0 when the stream takes nothing now.
fn write_some(stream: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<usize> {
    let mut polled = [PollFd::new(stream, PollFlags::POLLOUT)];
    if poll(&mut polled, PollTimeout::ZERO)? == 0 {
        return Ok(0);
    }
    let again = |e: nix::Error| match e {
        nix::Error::EAGAIN | nix::Error::EINTR => Ok(0),
        other => Err(io::Error::from(other)),
    };
    let flags = nix::sys::socket::MsgFlags::MSG_DONTWAIT | nix::sys::socket::MsgFlags::MSG_NOSIGNAL;
    match nix::sys::socket::send(stream.as_raw_fd(), bytes, flags) {
        Err(nix::Error::ENOTSOCK) => nix::unistd::write(stream, bytes).or_else(again),
        sent => sent.or_else(again),
    }
}

/// Reads without blocking, also when somebody else who has the stream was faster: `EAGAIN` when there is nothing.
fn read_some(stream: BorrowedFd<'_>, buffer: &mut [u8]) -> nix::Result<usize> {
    let mut polled = [PollFd::new(stream, PollFlags::POLLIN)];
    if poll(&mut polled, PollTimeout::ZERO)? == 0 {
        return Err(nix::Error::EAGAIN);
    }
    match nix::sys::socket::recv(stream.as_raw_fd(), buffer, nix::sys::socket::MsgFlags::MSG_DONTWAIT) {
        Err(nix::Error::ENOTSOCK) => nix::unistd::read(stream, buffer),
        received => received,
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for &byte in bytes {
            push_bounded(&mut self.ring, byte, RING_BYTES);
            if self.stream.is_some() {
                push_bounded(&mut self.pending, byte, PENDING_BYTES);
            }
        }
        let due = bytes.contains(&b'\n') || self.pending.len() >= FLUSH_BYTES;
        if due && !self.flush_pending() {
            self.stream = None;
            self.pending.clear();
        }
        if !self.pending.is_empty() && !self.woken {
            self.woken = true;
            let _ = self.wake.write(1);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Inner {
    serial: Serial<Line, Drained, Output>,
    delay: Duration,
}

/// See the module.
pub struct Console {
    inner: Mutex<Inner>,
    paused: Arc<AtomicBool>,
    /// Readable when the device thread should call [`Console::tick`].
    pub wake: EventFd,
}

/// What came of reading input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// Go on watching.
    More,
    /// The guest's buffer is full: stop watching until [`Console::wake`].
    Full,
    /// The stream has ended or cannot be read: stop watching.
    Closed,
}

impl Console {
    /// A console whose interrupt is raised by `interrupt`.
    ///
    /// # Errors
    /// When there is no descriptor left.
    pub fn new(interrupt: EventFd, stream: Option<OwnedFd>) -> io::Result<Self> {
        let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let paused = Arc::new(AtomicBool::new(false));
        let drained = Drained { paused: paused.clone(), wake: wake.try_clone()? };
        let output = Output {
            ring: VecDeque::new(),
            pending: VecDeque::new(),
            stream,
            wake: wake.try_clone()?,
            woken: false,
        };
        let serial = Serial::with_events(Line(interrupt), drained, output);
        Ok(Self { inner: Mutex::new(Inner { serial, delay: FIRST_DELAY }), paused, wake })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest writes bytes to the register at `offset`.
    pub fn write(&self, offset: u8, data: &[u8]) {
        let mut inner = self.lock();
        for &byte in data {
            // Only the interrupt's eventfd could fail, when its counter is full: then it is raised already.
            let _ = inner.serial.write(offset, byte);
        }
    }

    /// The guest reads the register at `offset`.
    pub fn read(&self, offset: u8) -> u8 {
        self.lock().serial.read(offset)
    }

    /// Called by the device thread when `wake` is readable or the time it returned is over: writes what is left, and says when to
    /// call again.
    pub fn tick(&self) -> Option<Duration> {
        let mut inner = self.lock();
        let delay = inner.delay;
        let output = inner.serial.writer_mut();
        let before = output.pending.len();
        // Just woken: give the guest a moment to finish its line.
        if output.wake.read().is_ok() {
            output.woken = !output.pending.is_empty();
            inner.delay = FIRST_DELAY;
            return (before > 0).then_some(FIRST_DELAY);
        }
        if !output.flush_pending() {
            output.stream = None;
            output.pending.clear();
        }
        let left = output.pending.len();
        output.woken = left > 0;
        inner.delay = if left < before { FIRST_DELAY } else { (delay * 2).min(LAST_DELAY) };
        (left > 0).then_some(inner.delay)
    }

    /// Whether input waits for the guest to make room.
    pub fn input_paused(&self) -> bool {
        self.paused.load(Ordering::Acquire)
    }

    /// Descriptor to watch for input, if a stream is attached.
    pub fn stream_fd(&self) -> Option<RawFd> {
        self.lock().serial.writer().stream.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// Called by the device thread when the stream is readable: moves what fits to the guest.
    pub fn input(&self) -> Input {
        let mut inner = self.lock();
        let room = inner.serial.fifo_capacity().min(INPUT_BYTES);
        if room == 0 {
            self.paused.store(true, Ordering::Release);
            return Input::Full;
        }
        self.paused.store(false, Ordering::Release);
        let Some(stream) = &inner.serial.writer().stream else { return Input::Closed };
        let mut buffer = [0; INPUT_BYTES];
        match read_some(stream.as_fd(), &mut buffer[..room]) {
            Ok(0) => Input::Closed,
            Ok(count) => {
                // Bytes that come while the guest tests its port in loop-back mode are lost, as on a real line.
                let _ = inner.serial.enqueue_raw_bytes(&buffer[..count]);
                Input::More
            }
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => Input::More,
            Err(_) => Input::Closed,
        }
    }

    /// Replaces the stream and returns the old one; what was not written to that is dropped.
    pub fn attach(&self, stream: Option<OwnedFd>) -> Option<OwnedFd> {
        let mut inner = self.lock();
        let output = inner.serial.writer_mut();
        output.pending.clear();
        std::mem::replace(&mut output.stream, stream)
    }

    /// Writes what is left, when the machine ends.
    pub fn finish(&self) {
        self.lock().serial.writer_mut().flush_pending();
    }

    /// The last output, lossily as UTF-8.
    pub fn tail(&self) -> String {
        let inner = self.lock();
        let (a, b) = inner.serial.writer().ring.as_slices();
        String::from_utf8_lossy(&[a, b].concat()).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    fn console() -> (Console, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        let interrupt = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        (Console::new(interrupt, Some(ours.into())).unwrap(), theirs)
    }

    #[test]
    fn a_line_is_written_at_once_and_the_rest_by_the_next_tick() {
        let (console, mut theirs) = console();
        for byte in b"hello\nlogin: " {
            console.write(0, &[*byte]);
        }
        let mut buffer = [0; 64];
        let count = theirs.read(&mut buffer).unwrap();
        assert_eq!(&buffer[..count], b"hello\n");
        assert_eq!(console.tick(), Some(FIRST_DELAY));
        assert_eq!(console.tick(), None);
        let count = theirs.read(&mut buffer).unwrap();
        assert_eq!(&buffer[..count], b"login: ");
        assert_eq!(console.tail(), "hello\nlogin: ");
    }

    #[test]
    fn a_stream_that_takes_nothing_costs_the_oldest_output_only() {
        let (console, mut theirs) = console();
        for line in 0..40_000 {
            console.write(0, format!("line {line}\n").as_bytes());
        }
        assert!(console.tail().ends_with("line 39999\n"));
        assert!(console.tail().len() <= RING_BYTES);
        let mut all = Vec::new();
        let mut buffer = [0; 4096];
        let mut drained = false;
        while !drained {
            drained = console.tick().is_none();
            while let Ok(count) = theirs.read(&mut buffer) {
                all.extend_from_slice(&buffer[..count]);
            }
        }
        assert!(all.ends_with(b"line 39999\n"));
    }

    #[test]
    fn input_reaches_the_guest_and_stops_when_its_buffer_is_full() {
        let (console, mut theirs) = console();
        theirs.write_all(&[b'x'; 100]).unwrap();
        assert_eq!(console.input(), Input::More);
        assert_eq!(console.input(), Input::Full);
        assert_eq!(console.read(0), b'x');
        for _ in 0..63 {
            console.read(0);
        }
        assert_eq!(console.wake.read().unwrap(), 1, "told that there is room");
        assert_eq!(console.input(), Input::More);
        while console.read(5) & 1 != 0 {
            console.read(0);
        }
        assert_eq!(console.input(), Input::More, "somebody else may have read it: no waiting");
        drop(theirs);
        while console.input() == Input::More {}
    }
}
