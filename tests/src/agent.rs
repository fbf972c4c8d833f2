//! The command agent: runs inside a test host and carries out what the harness asks for.
//!
//! ```text
//! /dev/virtio-ports/cmd ──▶ reader ──▶ one command each: stdin pump ─▶ child ─▶ stdout pump, stderr pump ──▶ port
//! ```
//!
//! It knows nothing of Lathe. Each command gets its own process group, three pipes or a terminal, and a window of
//! [`WINDOW`] bytes in each direction, so one slow reader outside holds up nobody else. A command that leaves
//! something behind which keeps its pipes open is over [`LINGER`] after its main process.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::frame::{ExecSpec, Frame, Kind, MAX_PAYLOAD, WINDOW};

/// How long a command's pipes are still read after its main process ended, if something else keeps them open.
pub const LINGER: Duration = Duration::from_millis(300);
/// Exit status of a command that could not be started, as in a shell.
const NOT_FOUND: i32 = 127;

/// Waits for room in a window of [`WINDOW`] bytes.
#[derive(Debug, Default)]
pub struct Window {
    used: Mutex<usize>,
    changed: Condvar,
    closed: AtomicBool,
}

impl Window {
    /// Takes `bytes`, waiting until they fit. Returns whether the window is still open.
    pub fn take(&self, bytes: usize) -> bool {
        let mut used = lock(&self.used);
        while *used + bytes > WINDOW && !self.closed.load(Ordering::Acquire) {
            used = self.changed.wait(used).unwrap_or_else(PoisonError::into_inner);
        }
        *used += bytes;
        !self.closed.load(Ordering::Acquire)
    }

    /// Gives `bytes` back.
    pub fn give(&self, bytes: usize) {
        let mut used = lock(&self.used);
        *used = used.saturating_sub(bytes);
        self.changed.notify_all();
    }

    /// Lets everybody through who waits, for ever.
    pub fn close(&self) {
        let _used = lock(&self.used);
        self.closed.store(true, Ordering::Release);
        self.changed.notify_all();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The port, shared by everything that sends.
type Port = Arc<Mutex<File>>;

fn send(port: &Port, frame: &Frame) -> io::Result<()> {
    frame.write(&mut *lock(port))
}

/// A running command as the reader sees it.
struct Running {
    group: Pid,
    input: Sender<Option<Vec<u8>>>,
    window: Arc<Window>,
}

/// Serves the channel at `path` until the port fails.
///
/// # Errors
/// The port cannot be opened, or reading or writing fails.
pub fn serve(path: &Path) -> io::Result<()> {
    // A virtio-serial port can be open only once.
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let mut reader = PortReader(file.try_clone()?);
    let port: Port = Arc::new(Mutex::new(file));
    greet(&mut reader, &port)?;
    let running: Arc<Mutex<HashMap<u32, Running>>> = Arc::default();
    loop {
        let frame = Frame::read(&mut reader)?;
        if frame.kind == Kind::Exec {
            begin(&frame, &port, &running)?;
            continue;
        }
        if let Some(command) = lock(&running).get(&frame.id) {
            feed(command, frame);
        }
    }
}

fn feed(command: &Running, frame: Frame) {
    match frame.kind {
        // The pump ends with the command; what comes after that is dropped.
        Kind::Stdin => drop(command.input.send(Some(frame.payload))),
        Kind::Eof => drop(command.input.send(None)),
        Kind::Ack => command.window.give(frame.integer().unwrap_or(0).max(0) as usize),
        Kind::Signal => {
            if let Some(signal) = frame.integer().and_then(|number| Signal::try_from(number).ok()) {
                // It may be over already; its Exit is then on its way.
                let _ = killpg(command.group, signal);
            }
        }
        Kind::Close => {
            command.window.close();
            let _ = killpg(command.group, Signal::SIGKILL);
        }
        _ => {}
    }
}

/// Says hello and skips everything until the answer to exactly this hello.
fn greet(reader: &mut PortReader, port: &Port) -> io::Result<()> {
    let mut nonce = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut nonce)?;
    send(port, &Frame::new(Kind::Hello, 0, &nonce))?;
    loop {
        let frame = Frame::read(reader)?;
        if frame.kind == Kind::Sync && frame.payload == nonce {
            return Ok(());
        }
    }
}

/// A virtio-serial port reads as ended while nobody is connected outside; this waits instead.
struct PortReader(File);

impl Read for PortReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.0.read(buffer) {
                Ok(0) => thread::sleep(Duration::from_millis(20)),
                result => return result,
            }
        }
    }
}

/// The command's ends on our side.
struct Ends {
    input: OwnedFd,
    outputs: Vec<(Kind, OwnedFd)>,
}

fn begin(frame: &Frame, port: &Port, running: &Arc<Mutex<HashMap<u32, Running>>>) -> io::Result<()> {
    let id = frame.id;
    let started = serde_json::from_slice::<ExecSpec>(&frame.payload)
        .map_err(io::Error::from)
        .and_then(|spec| spawn(&spec));
    let (child, ends) = match started {
        Ok(started) => started,
        Err(error) => {
            send(
                port,
                &Frame::new(Kind::Stderr, id, format!("cannot run the command: {error}\n").as_bytes()),
            )?;
            return send(port, &Frame::new(Kind::Exit, id, &NOT_FOUND.to_le_bytes()));
        }
    };
    let (input, queue) = channel();
    let window = Arc::new(Window::default());
    let group = Pid::from_raw(child.id() as i32);
    lock(running).insert(id, Running { group, input, window: Arc::clone(&window) });
    let (port, running) = (Arc::clone(port), Arc::clone(running));
    thread::spawn(move || {
        // A port that fails ends the agent through the reader.
        let _ = attend(id, child, ends, &port, queue, &window);
        lock(&running).remove(&id);
    });
    Ok(())
}

fn spawn(spec: &ExecSpec) -> io::Result<(std::process::Child, Ends)> {
    let (program, arguments) =
        spec.argv.split_first().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "no program"))?;
    let mut command = Command::new(program);
    command.args(arguments).envs(spec.env.iter().cloned()).current_dir("/root");
    if let Some((rows, columns)) = spec.tty {
        return spawn_on_terminal(command, rows, columns);
    }
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let mut child = command.spawn()?;
    let missing = || io::Error::other("a pipe is missing");
    let input = child.stdin.take().ok_or_else(missing)?.into();
    let stdout = child.stdout.take().ok_or_else(missing)?.into();
    let stderr = child.stderr.take().ok_or_else(missing)?.into();
    Ok((child, Ends { input, outputs: vec![(Kind::Stdout, stdout), (Kind::Stderr, stderr)] }))
}

fn spawn_on_terminal(
    mut command: Command,
    rows: u16,
    columns: u16,
) -> io::Result<(std::process::Child, Ends)> {
    let size = nix::pty::Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    let pty = nix::pty::openpty(Some(&size), None)?;
    let (slave, master) = (pty.slave, pty.master);
    command.stdin(slave.try_clone()?).stdout(slave.try_clone()?).stderr(slave);
    // SAFETY: the closure runs between fork and exec and calls only setsid and ioctl, which are async-signal-safe.
    unsafe {
        command.pre_exec(|| {
            nix::unistd::setsid()?;
            take_terminal()
        });
    }
    let child = command.spawn()?;
    Ok((child, Ends { input: master.try_clone()?, outputs: vec![(Kind::Stdout, master)] }))
}

/// Makes standard input the controlling terminal of a fresh session.
fn take_terminal() -> io::Result<()> {
    // SAFETY: TIOCSCTTY takes an integer and touches no memory of ours.
    let result = unsafe { nix::libc::ioctl(0, nix::libc::TIOCSCTTY, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Pumps a command's streams, waits for it and reports its end.
fn attend(
    id: u32,
    mut child: std::process::Child,
    ends: Ends,
    port: &Port,
    queue: Receiver<Option<Vec<u8>>>,
    window: &Arc<Window>,
) -> io::Result<()> {
    let over = Arc::new(AtomicBool::new(false));
    let feeder = Arc::clone(port);
    // Ends when the command is removed from the table, which drops the queue's sender.
    thread::spawn(move || pump_in(id, ends.input, &queue, &feeder));
    let pumps: Vec<_> = ends
        .outputs
        .into_iter()
        .map(|(kind, end)| {
            let pump = OutPump { id, kind, end, window: Arc::clone(window), over: Arc::clone(&over) };
            let port = Arc::clone(port);
            thread::spawn(move || pump.run(&port))
        })
        .collect();
    let status = child.wait()?;
    over.store(true, Ordering::Release);
    for pump in pumps {
        // A pump that panicked has nothing more to say.
        let _ = pump.join();
    }
    send(port, &Frame::new(Kind::Exit, id, &exit_code(status).to_le_bytes()))
}

fn exit_code(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

fn pump_in(id: u32, end: OwnedFd, queue: &Receiver<Option<Vec<u8>>>, port: &Port) {
    let mut end = Some(File::from(end));
    while let Ok(chunk) = queue.recv() {
        match (chunk, &mut end) {
            (Some(bytes), Some(file)) => {
                if file.write_all(&bytes).is_err() {
                    end = None;
                }
                acknowledge(id, bytes.len(), port);
            }
            // The command does not read any more; the sender must not wait for it.
            (Some(bytes), None) => acknowledge(id, bytes.len(), port),
            (None, _) => end = None,
        }
    }
}

fn acknowledge(id: u32, bytes: usize, port: &Port) {
    // The reader notices a port that fails.
    let _ = send(port, &Frame::new(Kind::Ack, id, &(bytes as u32).to_le_bytes()));
}

/// One of a command's output streams.
struct OutPump {
    id: u32,
    kind: Kind,
    end: OwnedFd,
    window: Arc<Window>,
    over: Arc<AtomicBool>,
}

impl OutPump {
    fn run(self, port: &Port) {
        let mut file = match self.end.try_clone() {
            Ok(end) => File::from(end),
            Err(_) => return,
        };
        let mut buffer = vec![0; MAX_PAYLOAD];
        while self.readable() {
            // A terminal whose other side is closed reads as EIO, which is its end.
            let Ok(length @ 1..) = file.read(&mut buffer) else { return };
            if !self.window.take(length)
                || send(port, &Frame::new(self.kind, self.id, &buffer[..length])).is_err()
            {
                return;
            }
        }
    }

    /// Waits for data or the end of the stream; false once the command is over and nothing has come for [`LINGER`].
    fn readable(&self) -> bool {
        let step = PollTimeout::try_from(LINGER).unwrap_or(PollTimeout::ZERO);
        loop {
            let was_over = self.over.load(Ordering::Acquire);
            let mut ends = [PollFd::new(self.end.as_fd(), PollFlags::POLLIN)];
            match poll(&mut ends, step) {
                Ok(0) if was_over => return false,
                Ok(0) | Err(nix::errno::Errno::EINTR) => {}
                Ok(_) => return true,
                Err(_) => return false,
            }
        }
    }
}
