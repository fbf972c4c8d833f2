//! Carries bytes between the connection and a running command.
//!
//! ```text
//! connection ─► input (≤ 256 KiB) ─► standard input or terminal
//! connection ◄─ output (≤ 256 KiB) ◄─ standard output, standard error or terminal
//! ```
//! Each side is read only while the buffer towards the other has room, so a slow reader slows the writer down and
//! nothing grows. One loop, one poll(2); no thread per stream.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use lathe_guest::protocol::{FrameKind, MAX_FRAME_BYTES, Request, Response, encode_frame};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::children::{self, Child};
use crate::connection::{Connection, Received, is_transient, set_nonblocking, wait};
use crate::sys::{self, Ended};

/// Either buffer is filled to this (and one frame) at most, bytes.
const BUFFER_BYTES: usize = 256 * 1024;
/// Bytes per read of a stream.
const READ_BYTES: usize = 16 * 1024;
/// What is still read after the command has ended, while others may go on writing; two of the largest pipes, bytes.
const DRAIN_BYTES: usize = 2 << 20;
/// Between the hang-up signal and the kill.
const HANGUP_GRACE: Duration = Duration::from_secs(1);
/// For a killed process to be gone; one in uninterruptible sleep is left alone.
const KILL_GRACE: Duration = Duration::from_secs(5);
/// POLLRDHUP: a vsock whose peer has closed shows this only. nix has no name for it and gives `None` for flags it
/// does not know, see [`Relay::poll`].
const PEER_CLOSED: PollFlags = PollFlags::from_bits_retain(libc::POLLRDHUP);
/// End of file, as typed at a terminal.
const TERMINAL_EOF: u8 = 4;

/// The command's side.
pub struct Streams {
    input: Option<File>,
    outputs: [Option<(FrameKind, File)>; 2],
    terminal: Option<File>,
}

impl Streams {
    /// The three pipes of a child.
    pub fn pipes(child: &mut Child) -> io::Result<Self> {
        let file = |fd: Option<OwnedFd>| -> io::Result<Option<File>> {
            fd.map(|fd| set_nonblocking(&fd).map(|()| File::from(fd))).transpose()
        };
        let stdout = file(child.stdout.take().map(OwnedFd::from))?;
        let stderr = file(child.stderr.take().map(OwnedFd::from))?;
        Ok(Self {
            input: file(child.stdin.take().map(OwnedFd::from))?,
            outputs: [
                stdout.map(|file| (FrameKind::Stdout, file)),
                stderr.map(|file| (FrameKind::Stderr, file)),
            ],
            terminal: None,
        })
    }

    /// The master of a terminal.
    pub fn terminal(master: OwnedFd) -> io::Result<Self> {
        set_nonblocking(&master)?;
        let master = File::from(master);
        Ok(Self {
            input: Some(master.try_clone()?),
            outputs: [Some((FrameKind::Stdout, master.try_clone()?)), None],
            terminal: Some(master),
        })
    }
}

/// One running command and its connection.
pub struct Relay<'a> {
    connection: &'a mut Connection,
    child: Child,
    streams: Streams,
    input: VecDeque<u8>,
    input_ends: bool,
    output: VecDeque<u8>,
}

/// What poll said, in the order of [`Relay::poll`].
struct Ready {
    connection: PollFlags,
    input: bool,
    outputs: [bool; 2],
    ended: bool,
}

impl<'a> Relay<'a> {
    /// Takes over a started child.
    pub fn new(connection: &'a mut Connection, child: Child, streams: Streams) -> io::Result<Self> {
        Ok(Self {
            connection,
            child,
            streams,
            input: VecDeque::new(),
            input_ends: false,
            output: VecDeque::new(),
        })
    }

    /// Relays until the command has ended, or ends it when the connection has gone.
    pub fn run(mut self) -> io::Result<()> {
        let result = self.relay();
        match result {
            Ok(Some(ended)) => self.finish(ended),
            Ok(None) => {
                end(&self.child);
                Ok(())
            }
            Err(error) => {
                end(&self.child);
                Err(error)
            }
        }
    }

    /// The command's end, or `None` when the host has gone first.
    fn relay(&mut self) -> io::Result<Option<Ended>> {
        loop {
            // Also what an earlier read left behind when the input was full; poll knows nothing of that.
            if !self.receive()? {
                return Ok(None);
            }
            let ready = self.poll()?;
            if ready.ended
                && let Some(ended) = children::collect(self.child.pid)
            {
                return Ok(Some(ended));
            }
            let gone = PollFlags::POLLHUP | PollFlags::POLLERR | PollFlags::POLLNVAL;
            if ready.connection.intersects(gone) {
                return Ok(None);
            }
            if ready.input {
                self.feed();
            }
            for index in 0..2 {
                if ready.outputs[index] {
                    self.drain_once(index);
                }
            }
            self.flush_some()?;
        }
    }

    fn poll(&self) -> io::Result<Ready> {
        let mut wanted = PEER_CLOSED;
        wanted.set(PollFlags::POLLIN, self.input.len() < BUFFER_BYTES);
        wanted.set(PollFlags::POLLOUT, !self.output.is_empty());
        let mut fds = vec![
            PollFd::new(self.connection.as_fd(), wanted),
            PollFd::new(self.child.pidfd.as_fd(), PollFlags::POLLIN),
        ];
        let input = self.streams.input.as_ref().filter(|_| !self.input.is_empty());
        let room = self.output.len() < BUFFER_BYTES;
        let outputs = self.streams.outputs.each_ref().map(|output| output.as_ref().filter(|_| room));
        fds.extend(input.map(|file| PollFd::new(file.as_fd(), PollFlags::POLLOUT)));
        fds.extend(outputs.iter().flatten().map(|(_, file)| PollFd::new(file.as_fd(), PollFlags::POLLIN)));
        match poll(&mut fds, PollTimeout::NONE) {
            Err(nix::errno::Errno::EINTR) => {}
            other => drop(other?),
        }
        let mut flags = fds.iter().map(|fd| fd.revents().unwrap_or(PollFlags::POLLHUP));
        let mut next = |there: bool| if there { flags.next() } else { None }.unwrap_or(PollFlags::empty());
        Ok(Ready {
            connection: next(true),
            ended: !next(true).is_empty(),
            input: !next(input.is_some()).is_empty(),
            outputs: outputs.map(|output| !next(output.is_some()).is_empty()),
        })
    }

    /// Takes frames of the host; false when it has gone.
    fn receive(&mut self) -> io::Result<bool> {
        // A frame has 5 bytes at least, so one read brings a bounded number of them.
        while self.input.len() < BUFFER_BYTES {
            match self.connection.try_receive()? {
                Received::End => return Ok(false),
                Received::Nothing => return Ok(true),
                Received::Frame(FrameKind::Stdin, bytes) => self.queue_input(&bytes),
                Received::Frame(FrameKind::Message, bytes) => self.message(&bytes)?,
                Received::Frame(kind, _) => {
                    let message = format!("a host does not send {kind:?}");
                    return Err(io::Error::new(io::ErrorKind::InvalidData, message));
                }
            }
        }
        Ok(true)
    }

    fn queue_input(&mut self, bytes: &[u8]) {
        if self.streams.input.is_none() || self.input_ends {
            return; // The command has closed its input; what comes for it is dropped as in a broken pipe.
        }
        self.input.extend(bytes);
        if bytes.is_empty() {
            self.input_ends = true;
            if self.streams.terminal.is_some() {
                self.input.push_back(TERMINAL_EOF);
                self.input_ends = false;
            }
        }
        self.feed();
    }

    fn message(&mut self, bytes: &[u8]) -> io::Result<()> {
        let invalid = |message| io::Error::new(io::ErrorKind::InvalidData, message);
        match serde_json::from_slice(bytes) {
            Ok(Request::WindowSize { columns, rows }) => {
                if let Some(terminal) = &self.streams.terminal {
                    sys::set_window_size(terminal, columns, rows)?;
                }
                Ok(())
            }
            Ok(Request::Signal { number: number @ 1..=64 }) => {
                // The group may be gone already; then there is nobody to signal.
                let _ = sys::kill(-self.child.pid, number);
                Ok(())
            }
            Ok(other) => Err(invalid(format!("not possible while a command runs: {other:?}"))),
            Err(error) => Err(invalid(error.to_string())),
        }
    }

    /// Writes queued input until the command takes no more.
    fn feed(&mut self) {
        let Some(file) = &mut self.streams.input else { return };
        while !self.input.is_empty() {
            let (bytes, _) = self.input.as_slices();
            match file.write(bytes) {
                Ok(count) => drop(self.input.drain(..count)),
                Err(error) if is_transient(&error) => return,
                Err(_) => {
                    self.input.clear();
                    self.streams.input = None;
                    return;
                }
            }
        }
        if self.input_ends {
            self.streams.input = None;
        }
    }

    /// Reads one of the command's streams once; false when nothing is there now.
    fn drain_once(&mut self, index: usize) -> bool {
        let Some((kind, file)) = &mut self.streams.outputs[index] else { return false };
        let mut bytes = [0; READ_BYTES];
        const { assert!(READ_BYTES <= MAX_FRAME_BYTES) };
        match file.read(&mut bytes) {
            Ok(count @ 1..) => {
                if let Ok(frame) = encode_frame(*kind, &bytes[..count]) {
                    self.output.extend(frame);
                }
                true
            }
            Err(error) if is_transient(&error) => false,
            // End of file; a terminal says EIO when its last user has gone.
            Ok(_) | Err(_) => {
                self.streams.outputs[index] = None;
                false
            }
        }
    }

    fn flush_some(&mut self) -> io::Result<()> {
        while !self.output.is_empty() {
            let taken = self.connection.try_send(self.output.as_slices().0)?;
            if taken == 0 {
                break;
            }
            self.output.drain(..taken);
        }
        Ok(())
    }

    /// Sends the rest and how it ended.
    fn finish(mut self, ended: Ended) -> io::Result<()> {
        for index in 0..2 {
            let mut budget = DRAIN_BYTES / READ_BYTES;
            while budget > 0 && self.drain_once(index) {
                budget -= 1;
                if self.output.len() >= BUFFER_BYTES {
                    self.flush_all()?;
                }
            }
        }
        self.flush_all()?;
        let (code, signal) = match ended {
            Ended::Exited(code) => (code, None),
            Ended::Signaled(signal) => (128 + signal, Some(signal)),
        };
        self.connection.send(&Response::Exited { code, signal })
    }

    fn flush_all(&mut self) -> io::Result<()> {
        let bytes = Vec::from(std::mem::take(&mut self.output));
        self.connection.send_bytes(&bytes)
    }
}

/// Ends a command's whole process group: hang-up, then kill.
pub fn end(child: &Child) {
    for (signal, grace) in [(libc::SIGHUP, HANGUP_GRACE), (libc::SIGKILL, KILL_GRACE)] {
        // Errors mean that the group has gone already.
        let _ = sys::kill(-child.pid, signal);
        let _ = sys::kill(-child.pid, libc::SIGCONT);
        let ended = ended_within(child.pidfd.as_fd(), grace);
        if signal == libc::SIGKILL || ended {
            // Whoever of the group outlived its leader.
            let _ = sys::kill(-child.pid, libc::SIGKILL);
        }
        if ended {
            break;
        }
    }
    if children::collect(child.pid).is_none() {
        children::abandon(child.pid);
    }
}

fn ended_within(pidfd: BorrowedFd<'_>, grace: Duration) -> bool {
    wait(pidfd, PollFlags::POLLIN, Instant::now() + grace).unwrap_or(false)
}
