//! Listens on vsock and serves the host's requests, one thread per connection, at most [`MAX_SESSIONS`].
//!
//! The host is trusted more than the guest, but nothing that it sends makes the agent grow or panic.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use lathe_guest::protocol::{
    FrameKind, Hello, OLDEST_VERSION, PORT, Request, Response, ShutdownMode, VERSION,
};

use crate::connection::{Connection, Received};
use crate::failure::Failure;
use crate::hotplug::Events;
use crate::resources::{cpus, features, memory};
use crate::{exec, inside, network, shutdown, sys, usage};

/// Connections served at once.
const MAX_SESSIONS: usize = 64;
/// A connection without a request for this long is closed.
const IDLE_TIMEOUT: Duration = Duration::from_secs(600);
/// Stack of a session's thread, bytes; only touched pages cost memory.
const STACK_BYTES: usize = 256 * 1024;
/// Pause after a failed accept, so that a shortage of descriptors does not become a busy loop.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

static SESSIONS: AtomicUsize = AtomicUsize::new(0);
/// Requests that change the guest happen one after the other; those for CPUs have a lock of their own.
static CHANGES: Mutex<()> = Mutex::new(());

/// Whether the host has said hello.
static GREETED: (Mutex<bool>, Condvar) = (Mutex::new(false), Condvar::new());

/// Serves for ever, as a service of a distribution.
///
/// # Errors
/// When the port cannot be listened on.
pub fn run() -> io::Result<()> {
    let listener = listen()?;
    memory::bring_online_automatically();
    let followed = Events::new().and_then(|events| {
        // Modules are the distribution's own business.
        let follow = move || events.follow(|| ());
        std::thread::Builder::new().name("hotplug".into()).stack_size(STACK_BYTES).spawn(follow)
    });
    if let Err(error) = followed {
        eprintln!("lathe-guest: CPUs that are plugged in stay offline until the host asks: {error}");
    }
    let wants = || {
        if let Err(error) = inside::socket::serve() {
            eprintln!("lathe-guest: nothing can be wanted from inside: {error}");
        }
    };
    std::thread::Builder::new().name("wants".into()).stack_size(STACK_BYTES).spawn(wants)?;
    accept_all(&listener)
}

/// Waits until the host has said hello, for `limit` at most.
pub fn wait_for_hello(limit: Duration) {
    let (greeted, changed) = &GREETED;
    let greeted = greeted.lock().unwrap_or_else(PoisonError::into_inner);
    // Whether it has or the time is over is all the same to whoever waits.
    drop(changed.wait_timeout_while(greeted, limit, |greeted| !*greeted));
}

fn note_hello() {
    let (greeted, changed) = &GREETED;
    *greeted.lock().unwrap_or_else(PoisonError::into_inner) = true;
    changed.notify_all();
}

/// Listens on the agent's port.
///
/// # Errors
/// As [`sys::listen_vsock`].
pub fn listen() -> io::Result<OwnedFd> {
    sys::listen_vsock(PORT)
}

/// Serves the connections of a listener for ever.
///
/// # Errors
/// None at present; the type leaves room for a listener that ends.
pub fn accept_all(listener: &OwnedFd) -> io::Result<()> {
    loop {
        match sys::accept(listener) {
            Ok(stream) => admit(stream),
            Err(error) => {
                eprintln!("lathe-guest: cannot accept a connection: {error}");
                std::thread::sleep(ACCEPT_PAUSE);
            }
        }
    }
}

/// Counts a session while it lives.
struct Seat;

impl Seat {
    fn take() -> Option<Self> {
        let taken = SESSIONS.fetch_add(1, Ordering::AcqRel) + 1;
        let seat = Self;
        (taken <= MAX_SESSIONS).then_some(seat)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        SESSIONS.fetch_sub(1, Ordering::AcqRel);
    }
}

fn admit(stream: OwnedFd) {
    let Ok(mut connection) = Connection::new(stream) else { return };
    let Some(seat) = Seat::take() else {
        // One frame fits into any socket's buffer, so this does not wait.
        let _ = connection
            .send(&Failure::failed(format!("{MAX_SESSIONS} connections are open already")).response());
        return;
    };
    let session = move || {
        let _seat = seat;
        if let Err(error) = session(&mut connection) {
            eprintln!("lathe-guest: connection closed: {error}");
        }
    };
    let started = std::thread::Builder::new().name("session".into()).stack_size(STACK_BYTES).spawn(session);
    if let Err(error) = started {
        eprintln!("lathe-guest: cannot start a session: {error}");
    }
}

/// Answers requests until the host closes, breaks a rule, or runs a command, which is always the last request.
///
/// # Errors
/// What the connection says, and broken rules.
pub fn session(connection: &mut Connection) -> io::Result<()> {
    loop {
        let payload = match connection.receive(IDLE_TIMEOUT)? {
            Received::Frame(FrameKind::Message, payload) => payload,
            Received::End | Received::Nothing => return Ok(()),
            Received::Frame(kind, _) => {
                let message = format!("{kind:?} comes without a running command");
                return connection.send(&Failure::bad_request(message).response());
            }
        };
        let request = match serde_json::from_slice(&payload) {
            Ok(request) => request,
            Err(error) => {
                return connection.send(&Failure::bad_request(format!("no request: {error}")).response());
            }
        };
        match request {
            Request::Exec(exec) => return exec::run(connection, &exec),
            Request::Shutdown { mode } => return shut_down(connection, mode),
            other => connection.send(&answer(other).unwrap_or_else(Failure::response))?,
        }
    }
}

fn shut_down(connection: &mut Connection, mode: ShutdownMode) -> io::Result<()> {
    match shutdown::way() {
        Ok(way) => {
            // The answer first: after that nobody may be left to give it.
            connection.send(&Response::Done {})?;
            way.go(mode)
        }
        Err(failure) => connection.send(&failure.response()),
    }
}

fn answer(request: Request) -> Result<Response, Failure> {
    let _one_at_a_time = match request {
        Request::Network(_) | Request::MemoryOnline {} => {
            Some(CHANGES.lock().unwrap_or_else(PoisonError::into_inner))
        }
        _ => None,
    };
    match request {
        Request::Hello { version } if version < OLDEST_VERSION => {
            Err(Failure::unsupported(format!("version {version} is older than {OLDEST_VERSION}")))
        }
        Request::Hello { .. } => {
            note_hello();
            Ok(Response::Hello(hello()))
        }
        Request::Network(network) => network::apply(&network).map(|()| Response::Done {}),
        Request::Cpus { online } => cpus::set(online).map(|()| Response::Done {}),
        Request::MemoryOnline {} => memory::bring_online().map(|()| Response::Done {}),
        Request::Usage {} => Ok(Response::Usage(usage::read())),
        Request::Features {} => Ok(Response::Features(features::read())),
        Request::Inside { settled } => Ok(Response::Inside(Box::new(inside::look(&settled)))),
        Request::WindowSize { .. } | Request::Signal { .. } => {
            Err(Failure::bad_request("no command runs on this connection".into()))
        }
        Request::Exec(_) | Request::Shutdown { .. } => Err(Failure::bad_request("not possible here".into())),
    }
}

fn hello() -> Hello {
    let line = |path| std::fs::read_to_string(path).map(|text| text.trim().to_owned()).unwrap_or_default();
    let release = line("/etc/os-release");
    let pretty = release.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="));
    Hello {
        version: VERSION,
        oldest_version: OLDEST_VERSION,
        build: env!("CARGO_PKG_VERSION").into(),
        kernel: line("/proc/sys/kernel/osrelease"),
        os: pretty.map_or("Lathe built-in guest", |name| name.trim_matches(['"', '\''])).into(),
        boot_id: line("/proc/sys/kernel/random/boot_id"),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use lathe_guest::protocol::{read_frame, write_frame};

    use super::*;

    fn talk(requests: &[&[u8]]) -> Vec<Response> {
        let (mut host, guest) = UnixStream::pair().unwrap();
        let server = std::thread::spawn(move || session(&mut Connection::new(guest.into()).unwrap()));
        for request in requests {
            match write_frame(&mut host, FrameKind::Message, request) {
                // A session that ends because of what it was told does not wait for the rest.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => break,
                written => written.unwrap(),
            }
        }
        // Likewise.
        let _ = host.shutdown(std::net::Shutdown::Write);
        let mut responses = Vec::new();
        while let Ok((FrameKind::Message, payload)) = read_frame(&mut host) {
            responses.push(serde_json::from_slice(&payload).unwrap());
        }
        server.join().unwrap().unwrap();
        responses
    }

    fn code(response: &Response) -> &str {
        match response {
            Response::Error { code, .. } => code,
            other => panic!("no error: {other:?}"),
        }
    }

    #[test]
    fn several_requests_on_one_connection() {
        let hello = br#"{"hello":{"version":1}}"#;
        let responses = talk(&[hello, br#"{"usage":{}}"#, hello]);
        assert_eq!(responses.len(), 3);
        assert!(
            matches!(&responses[0], Response::Hello(hello) if hello.version == VERSION && !hello.kernel.is_empty())
        );
        assert!(matches!(&responses[1], Response::Usage(usage) if usage.memory_total_bytes > 0));
        let responses =
            talk(&[br#"{"inside":{}}"#, br#"{"inside":{"settled":[{"id":9,"amount":1,"words":""}]}}"#]);
        let told = |response: &Response| matches!(response, Response::Inside(inside) if !inside.applications.is_empty());
        assert!(responses.len() == 2 && responses.iter().all(told), "{responses:?}");
    }

    #[test]
    fn nonsense_is_answered_and_ends_the_connection() {
        for nonsense in [&b"{}"[..], b"\xff", b"{\"usage\":{\"more\":1}}", b"{\"cpus\":{\"online\":-1}}"] {
            let responses = talk(&[nonsense, br#"{"usage":{}}"#]);
            assert_eq!(responses.len(), 1, "{responses:?}");
            assert_eq!(code(&responses[0]), "bad-request");
        }
        assert_eq!(code(&talk(&[br#"{"signal":{"number":9}}"#])[0]), "bad-request");
        assert_eq!(code(&talk(&[br#"{"cpus":{"online":0}}"#])[0]), "bad-request");
        assert_eq!(code(&talk(&[br#"{"hello":{"version":0}}"#])[0]), "unsupported");
    }

    #[test]
    fn a_broken_frame_ends_the_connection() {
        let (mut host, guest) = UnixStream::pair().unwrap();
        host.write_all(&[9, 0, 0, 0, 0]).unwrap();
        let error = session(&mut Connection::new(guest.into()).unwrap()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn seats_are_bounded_and_given_back() {
        let seats: Vec<Option<Seat>> = (0..=MAX_SESSIONS).map(|_| Seat::take()).collect();
        assert!(seats[..1].iter().all(Option::is_some));
        assert!(seats[MAX_SESSIONS].is_none());
        drop(seats);
        assert!(Seat::take().is_some());
    }
}
