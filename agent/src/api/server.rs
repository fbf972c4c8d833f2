//! Accepts connections on the Unix socket: where the socket comes from, who is at the other end, and how many there may be.
//!
//! The socket is everybody's (mode 0666, see `lathed.socket`), so strangers are bounded: [`MAX_CONNECTIONS_PER_USER`] for each
//! user, [`MAX_CONNECTIONS`] for all of them together, root and lathed's own user apart; and [`HEADER_TIMEOUT`] to say what they want.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net as std_net;
use std::path::Path;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use nix::fcntl::{Flock, FlockArg};
use tokio::io::AsyncWriteExt;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::access::Peer;
use super::wire::ErrorBody;
use super::{App, router};
use crate::problem::{Kind, Problem};

/// Most connections of strangers and members together.
pub const MAX_CONNECTIONS: usize = 512;
/// Most connections of one user.
pub const MAX_CONNECTIONS_PER_USER: usize = 64;
/// How long a client may take to say what it wants.
pub const HEADER_TIMEOUT: Duration = Duration::from_secs(15);
/// Longest head of a request in bytes.
const MAX_HEAD_BYTES: usize = 64 * 1024;
/// How long open requests may go on when lathed ends.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);
/// How long accepting rests after an error such as "too many open files".
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Longest line read from a lock file.
const MAX_LOCK_BYTES: u64 = 32;

/// Keeps a second agent from the same state directory, for as long as it lives.
#[derive(Debug)]
pub struct Lock {
    _file: Flock<File>,
}

impl Lock {
    /// Takes `STATE_DIR/lathed.lock`.
    ///
    /// # Errors
    /// `already-running` with the other's process id; `state-dir` when the file cannot be made.
    pub fn take(state_dir: &Path) -> Result<Self, Problem> {
        let path = state_dir.join("lathed.lock");
        let failed = |error: io::Error| {
            Problem::new(Kind::Internal, "state-dir", format!("{}: {error}", path.display()))
                .fix(format!("sudo install -d -o lathe -g lathe -m 700 {}", state_dir.display()))
        };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(failed)?;
        let mut locked = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(locked) => locked,
            Err((mut file, nix::errno::Errno::EWOULDBLOCK)) => {
                let mut holder = String::new();
                let _ = Read::take(&mut file, MAX_LOCK_BYTES).read_to_string(&mut holder);
                let holder = holder
                    .trim()
                    .parse::<u32>()
                    .map_or_else(|_| "another process".to_owned(), |pid| format!("process {pid}"));
                return Err(Problem::new(
                    Kind::Conflict,
                    "already-running",
                    format!("an agent already runs on {}", state_dir.display()),
                )
                .detail(format!("{holder} holds {}", path.display()))
                .fix("systemctl status lathed"));
            }
            Err((_, error)) => return Err(failed(error.into())),
        };
        locked.set_len(0).and_then(|()| writeln!(locked, "{}", std::process::id())).map_err(failed)?;
        Ok(Self { _file: locked })
    }
}

/// The listening socket: the one that systemd passed, otherwise a new one at `path`.
///
/// # Errors
/// `already-running` when somebody answers at `path`; `api-socket` when it cannot be made there.
pub fn listener(path: &Path) -> Result<UnixListener, Problem> {
    let failed =
        |error: io::Error| Problem::new(Kind::Internal, "api-socket", format!("{}: {error}", path.display()));
    let passed = listenfd::ListenFd::from_env().take_unix_listener(0).map_err(failed)?;
    let listener = match passed {
        Some(listener) => listener,
        None => bind(path, failed)?,
    };
    listener.set_nonblocking(true).map_err(failed)?;
    UnixListener::from_std(listener).map_err(failed)
}

/// Makes the socket, in place of one that nobody listens on any more.
fn bind(path: &Path, failed: impl Fn(io::Error) -> Problem) -> Result<std_net::UnixListener, Problem> {
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.file_type().is_socket() => {
            if std_net::UnixStream::connect(path).is_ok() {
                return Err(Problem::new(
                    Kind::Conflict,
                    "already-running",
                    format!("an agent already answers at {}", path.display()),
                )
                .fix("systemctl status lathed"));
            }
            fs::remove_file(path).map_err(&failed)?;
        }
        Ok(_) => return Err(failed(io::Error::new(io::ErrorKind::AlreadyExists, "is there and no socket"))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(&failed)?;
    }
    let listener = std_net::UnixListener::bind(path).map_err(&failed)?;
    fs::set_permissions(path, Permissions::from_mode(0o666)).map_err(&failed)?;
    Ok(listener)
}

/// Who has how many connections.
#[derive(Debug, Default)]
struct Census {
    of: Mutex<HashMap<u32, usize>>,
}

/// One connection counted; forgotten when dropped.
#[derive(Debug)]
struct Seat {
    census: Arc<Census>,
    uid: u32,
}

impl Census {
    fn enter(self: &Arc<Self>, uid: u32, unbounded: bool) -> Option<Seat> {
        let mut of = self.of.lock().unwrap_or_else(PoisonError::into_inner);
        let all: usize = of.values().sum();
        let own = of.get(&uid).copied().unwrap_or(0);
        if !unbounded && (all >= MAX_CONNECTIONS || own >= MAX_CONNECTIONS_PER_USER) {
            return None;
        }
        of.insert(uid, own + 1);
        Some(Seat { census: Arc::clone(self), uid })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut of = self.census.of.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = of.get_mut(&self.uid) {
            *count -= 1;
            if *count == 0 {
                of.remove(&self.uid);
            }
        }
    }
}

/// Answers until `stop` says true, then lets open requests end, for at most five seconds.
pub async fn serve(listener: UnixListener, app: App, mut stop: watch::Receiver<bool>) {
    let access = Arc::clone(&app.access);
    let router = router(app);
    let census = Arc::new(Census::default());
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            () = stopped(&mut stop) => break,
            Some(_) = connections.join_next() => continue,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!("accepting on the API socket: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let peer = match stream.peer_cred() {
            Ok(cred) => Peer { uid: cred.uid(), gid: cred.gid(), pid: cred.pid() },
            Err(error) => {
                tracing::warn!("a connection without credentials: {error}");
                continue;
            }
        };
        match census.enter(peer.uid, access.is_owner(peer)) {
            Some(seat) => {
                connections.spawn(connection(stream, peer, router.clone(), stop.clone(), seat));
            }
            None => {
                connections.spawn(turn_away(stream, peer));
            }
        }
    }
    let drained = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(DRAIN_TIMEOUT, drained).await.is_err() {
        tracing::info!("requests still open after {} s are cut", DRAIN_TIMEOUT.as_secs());
    }
}

/// Waits until `stop` says true, or nobody can say it any more.
async fn stopped(stop: &mut watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
}

/// One connection, from its first byte to its last.
async fn connection(
    stream: UnixStream,
    peer: Peer,
    router: Router,
    mut stop: watch::Receiver<bool>,
    _seat: Seat,
) {
    let service = TowerToHyperService::new(router);
    let service = hyper::service::service_fn(move |mut request: hyper::Request<Incoming>| {
        request.extensions_mut().insert(peer);
        hyper::service::Service::call(&service, request.map(Body::new))
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(MAX_HEAD_BYTES)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    let mut served = pin!(served);
    let ended = tokio::select! {
        ended = served.as_mut() => ended,
        () = stopped(&mut stop) => {
            served.as_mut().graceful_shutdown();
            served.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(uid = peer.uid, "connection: {error}");
    }
}

/// Tells a user who has too many connections so, and closes.
async fn turn_away(mut stream: UnixStream, peer: Peer) {
    let problem =
        Problem::new(Kind::Unavailable, "too-many-connections", "too many connections to lathed are open")
            .detail(format!(
                "at most {MAX_CONNECTIONS_PER_USER} for each user and {MAX_CONNECTIONS} for all"
            ));
    tracing::warn!(uid = peer.uid, "turned away: {problem}");
    let body = serde_json::to_string(&ErrorBody { error: problem.view() }).unwrap_or_default();
    let head = "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: ";
    let answer = format!("{head}{}\r\n\r\n{body}", body.len());
    let _ = tokio::time::timeout(Duration::from_secs(1), stream.write_all(answer.as_bytes())).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_agent_is_told_of_the_first() {
        let dir = tempfile::tempdir().unwrap();
        let first = Lock::take(dir.path()).unwrap();
        let problem = Lock::take(dir.path()).unwrap_err();
        assert_eq!(problem.code, "already-running");
        assert!(problem.detail.contains(&format!("process {}", std::process::id())), "{}", problem.detail);
        drop(first);
        Lock::take(dir.path()).unwrap();
    }

    #[test]
    fn a_state_directory_that_is_missing_is_named() {
        let problem = Lock::take(Path::new("/nonexistent/state")).unwrap_err();
        assert_eq!(problem.code, "state-dir");
        assert!(problem.message.contains("/nonexistent/state/lathed.lock"), "{}", problem.message);
    }

    #[tokio::test]
    async fn a_socket_left_behind_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("below/lathe.sock");
        let first = listener(&path).unwrap();
        assert_eq!(listener(&path).unwrap_err().code, "already-running");
        drop(first);
        let second = listener(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o666);
        drop(second);
        fs::remove_file(&path).unwrap();
        fs::write(&path, "precious").unwrap();
        assert_eq!(listener(&path).unwrap_err().code, "api-socket");
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    }

    #[test]
    fn connections_are_bounded_for_each_user_and_in_all() {
        let census = Arc::new(Census::default());
        let mut seats: Vec<_> =
            (0..MAX_CONNECTIONS_PER_USER).map(|_| census.enter(1000, false).unwrap()).collect();
        assert!(census.enter(1000, false).is_none());
        assert!(census.enter(0, true).is_some(), "root is never turned away");
        seats.pop();
        seats.push(census.enter(1000, false).unwrap());
        for user in 0..(MAX_CONNECTIONS - MAX_CONNECTIONS_PER_USER) as u32 {
            seats.push(census.enter(2000 + user, false).unwrap());
        }
        assert!(census.enter(9999, false).is_none());
        seats.clear();
        assert!(census.of.lock().unwrap().is_empty());
    }
}
