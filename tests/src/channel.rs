//! The harness's end of a command channel: runs commands inside one host, many at a time.
//!
//! A [`Channel`] sits on any byte stream that speaks [`frame`](crate::frame): the socket of QEMU's serial port, or a
//! socket to the process that holds the hosts of `testhost up`. A thread reads; whoever runs a command gets its
//! frames through a queue that the protocol's window bounds.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::agent::Window;
use crate::frame::{ExecSpec, Frame, Kind, MAX_PAYLOAD};

/// How a message says that a command has not ended in time.
pub const NOT_FINISHED: &str = "not finished after";

/// Why a command's result cannot be had.
#[derive(Debug)]
pub enum ExecError {
    /// The host is gone, restarted under the command, or its channel broke: an infrastructure failure.
    Lost(String),
    /// The command did not end in time and was killed.
    TimedOut(Duration),
    /// One of our own streams failed.
    Io(io::Error),
}

impl std::fmt::Display for ExecError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Lost(why) => write!(f, "the test host was lost: {why}"),
            Self::TimedOut(limit) => write!(f, "{NOT_FINISHED} {} s", limit.as_secs_f32()),
            Self::Io(error) => write!(f, "input or output: {error}"),
        }
    }
}

impl std::error::Error for ExecError {}

impl From<io::Error> for ExecError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// Whether the host's agent answers.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Link {
    /// Not yet, or not again since a reboot.
    Waiting,
    /// It has said hello so many times (once per boot).
    Up(u32),
    /// The stream ended: no host behind it any more.
    Dead(String),
}

struct State {
    link: Link,
    hellos: u32,
    next_id: u32,
    commands: HashMap<u32, Sender<Frame>>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    writer: Mutex<UnixStream>,
}

/// One host's command channel. Clones share it.
#[derive(Clone)]
pub struct Channel {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for Channel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Channel({:?})", lock(&self.shared.state).link)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Channel {
    /// Takes over a connected stream and starts its reader.
    ///
    /// # Errors
    /// The descriptor cannot be duplicated.
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        let reader = stream.try_clone()?;
        let state = State { link: Link::Waiting, hellos: 0, next_id: 1, commands: HashMap::new() };
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            changed: Condvar::new(),
            writer: Mutex::new(stream),
        });
        let channel = Self { shared };
        let copy = channel.clone();
        thread::Builder::new().name("channel".into()).spawn(move || copy.read(reader))?;
        Ok(channel)
    }

    fn read(&self, mut reader: UnixStream) {
        let why = loop {
            match Frame::read(&mut reader) {
                Ok(frame) => self.dispatch(frame),
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    break "its virtual machine ended".to_owned();
                }
                Err(error) => break format!("its channel failed: {error}"),
            }
        };
        self.lose_commands(&why);
        self.set_link(Link::Dead(why));
    }

    fn dispatch(&self, frame: Frame) {
        match frame.kind {
            Kind::Hello => {
                // Counted first: whoever is told of the loss may ask how often it has started.
                lock(&self.shared.state).hellos += 1;
                self.lose_commands("it restarted");
                // A writer that fails ends in the reader.
                let _ = self.send(&Frame::new(Kind::Sync, 0, &frame.payload));
                let mut state = lock(&self.shared.state);
                state.link = Link::Up(state.hellos);
                self.shared.changed.notify_all();
            }
            Kind::Lost if frame.id == 0 => {
                let why = String::from_utf8_lossy(&frame.payload).into_owned();
                self.lose_commands(&why);
                self.set_link(Link::Dead(why));
            }
            _ => {
                let state = lock(&self.shared.state);
                if let Some(command) = state.commands.get(&frame.id) {
                    // Its owner is about to close it.
                    let _ = command.send(frame);
                }
            }
        }
    }

    fn set_link(&self, link: Link) {
        lock(&self.shared.state).link = link;
        self.shared.changed.notify_all();
    }

    fn lose_commands(&self, why: &str) {
        let commands = std::mem::take(&mut lock(&self.shared.state).commands);
        for (id, command) in commands {
            let _ = command.send(Frame::new(Kind::Lost, id, why.as_bytes()));
        }
    }

    /// Sends one frame.
    ///
    /// # Errors
    /// The stream is broken.
    pub fn send(&self, frame: &Frame) -> io::Result<()> {
        frame.write(&mut *lock(&self.shared.writer))
    }

    /// How many times the agent has said hello: 1 after the first boot, 2 after a reboot.
    pub fn boots(&self) -> u32 {
        lock(&self.shared.state).hellos
    }

    /// Waits until the agent has said hello at least `boots` times.
    ///
    /// # Errors
    /// [`ExecError::Lost`] if the host ends first, [`ExecError::TimedOut`] if it does not come.
    pub fn wait_up(&self, boots: u32, limit: Duration) -> Result<(), ExecError> {
        let deadline = Instant::now() + limit;
        let mut state = lock(&self.shared.state);
        loop {
            match &state.link {
                Link::Up(hellos) if *hellos >= boots => return Ok(()),
                Link::Dead(why) => return Err(ExecError::Lost(why.clone())),
                _ => {}
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ExecError::TimedOut(limit));
            }
            state = self.shared.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Opens a command's queue; its frames arrive there until [`Self::close`].
    ///
    /// # Errors
    /// [`ExecError::Lost`] if the host does not answer now.
    pub fn open(&self) -> Result<(u32, Receiver<Frame>), ExecError> {
        let mut state = lock(&self.shared.state);
        match &state.link {
            Link::Up(_) => {}
            Link::Waiting => return Err(ExecError::Lost("it has not started yet".into())),
            Link::Dead(why) => return Err(ExecError::Lost(why.clone())),
        }
        let id = state.next_id;
        state.next_id = state.next_id.checked_add(1).unwrap_or(1);
        let (sender, receiver) = channel();
        state.commands.insert(id, sender);
        Ok((id, receiver))
    }

    /// Forgets a command. If it still runs it is killed.
    pub fn close(&self, id: u32) {
        let known = lock(&self.shared.state).commands.remove(&id).is_some();
        if known {
            // A channel that fails has lost the command anyway.
            let _ = self.send(&Frame::new(Kind::Close, id, &[]));
        }
    }

    /// Forgets a command that has ended.
    pub fn forget(&self, id: u32) {
        lock(&self.shared.state).commands.remove(&id);
    }

    /// Begins a command.
    ///
    /// # Errors
    /// [`ExecError::Lost`] if the host does not answer.
    pub fn begin(&self, spec: &ExecSpec) -> Result<Process, ExecError> {
        let (id, frames) = self.open()?;
        let process =
            Process { channel: self.clone(), id, frames, window: Arc::new(Window::default()), over: false };
        let json = serde_json::to_vec(spec).map_err(io::Error::from)?;
        self.send(&Frame::new(Kind::Exec, id, &json))?;
        Ok(process)
    }
}

/// Where a command's output goes.
pub trait Sink {
    /// Takes bytes of standard output.
    ///
    /// # Errors
    /// What the destination says; the command is then killed.
    fn stdout(&mut self, bytes: &[u8]) -> io::Result<()>;
    /// Takes bytes of standard error.
    ///
    /// # Errors
    /// What the destination says; the command is then killed.
    fn stderr(&mut self, bytes: &[u8]) -> io::Result<()>;
}

/// Passes output on to our own standard streams.
#[derive(Debug)]
pub struct Passthrough;

impl Sink for Passthrough {
    fn stdout(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut out = io::stdout().lock();
        out.write_all(bytes)?;
        out.flush()
    }
    fn stderr(&mut self, bytes: &[u8]) -> io::Result<()> {
        io::stderr().lock().write_all(bytes)
    }
}

/// Keeps output in memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Captured {
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
}

/// The most that [`Captured`] keeps of each stream; more is an error, which kills the command.
pub const MAX_CAPTURED: usize = 256 * 1024 * 1024;

fn keep(kept: &mut Vec<u8>, bytes: &[u8]) -> io::Result<()> {
    if kept.len() + bytes.len() > MAX_CAPTURED {
        return Err(io::Error::other(format!("more than {MAX_CAPTURED} bytes of output")));
    }
    kept.extend_from_slice(bytes);
    Ok(())
}

impl Sink for Captured {
    fn stdout(&mut self, bytes: &[u8]) -> io::Result<()> {
        keep(&mut self.stdout, bytes)
    }
    fn stderr(&mut self, bytes: &[u8]) -> io::Result<()> {
        keep(&mut self.stderr, bytes)
    }
}

/// A command under way. Dropping it kills the command.
pub struct Process {
    channel: Channel,
    id: u32,
    frames: Receiver<Frame>,
    window: Arc<Window>,
    over: bool,
}

impl Process {
    /// Sends everything from `source` as standard input, in the background.
    pub fn feed(&self, source: impl Read + Send + 'static) {
        let (channel, id, window) = (self.channel.clone(), self.id, Arc::clone(&self.window));
        thread::spawn(move || pump(&channel, id, &window, source));
    }

    /// Ends standard input.
    ///
    /// # Errors
    /// The channel is broken.
    pub fn end_input(&self) -> io::Result<()> {
        self.channel.send(&Frame::new(Kind::Eof, self.id, &[]))
    }

    /// Sends a signal to the command's process group.
    ///
    /// # Errors
    /// The channel is broken.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        self.channel.send(&Frame::new(Kind::Signal, self.id, &(signal as i32).to_le_bytes()))
    }

    /// Passes output to `sink` until the command ends, and returns its exit status (128 + n for signal n).
    ///
    /// # Errors
    /// [`ExecError`]; the command is killed if it still runs.
    pub fn wait(mut self, sink: &mut dyn Sink, limit: Option<Duration>) -> Result<i32, ExecError> {
        let deadline = limit.map(|limit| (limit, Instant::now() + limit));
        loop {
            let frame = match deadline {
                None => self.frames.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some((_, deadline)) => {
                    self.frames.recv_timeout(deadline.saturating_duration_since(Instant::now()))
                }
            };
            match (frame, deadline) {
                (Ok(frame), _) => {
                    if let Some(status) = self.take(frame, sink)? {
                        self.over = true;
                        return Ok(status);
                    }
                }
                (Err(RecvTimeoutError::Timeout), Some((limit, _))) => return Err(ExecError::TimedOut(limit)),
                (Err(_), _) => return Err(ExecError::Lost("its channel closed".into())),
            }
        }
    }

    fn take(&self, frame: Frame, sink: &mut dyn Sink) -> Result<Option<i32>, ExecError> {
        match frame.kind {
            Kind::Stdout => sink.stdout(&frame.payload)?,
            Kind::Stderr => sink.stderr(&frame.payload)?,
            Kind::Ack => self.window.give(frame.integer().unwrap_or(0).max(0) as usize),
            Kind::Exit => return Ok(Some(frame.integer().unwrap_or(-1))),
            Kind::Lost => return Err(ExecError::Lost(String::from_utf8_lossy(&frame.payload).into_owned())),
            _ => {}
        }
        if matches!(frame.kind, Kind::Stdout | Kind::Stderr) {
            let length = frame.payload.len() as u32;
            self.channel.send(&Frame::new(Kind::Ack, self.id, &length.to_le_bytes()))?;
        }
        Ok(None)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.window.close();
        if self.over {
            self.channel.forget(self.id);
        } else {
            self.channel.close(self.id);
        }
    }
}

fn pump(channel: &Channel, id: u32, window: &Window, mut source: impl Read) {
    let mut buffer = vec![0; MAX_PAYLOAD];
    loop {
        match source.read(&mut buffer) {
            Ok(length @ 1..) => {
                let frame = Frame::new(Kind::Stdin, id, &buffer[..length]);
                if !window.take(length) || channel.send(&frame).is_err() {
                    return;
                }
            }
            // A source that fails ends the input; a channel that fails shows in the reader.
            _ => return drop(channel.send(&Frame::new(Kind::Eof, id, &[]))),
        }
    }
}
