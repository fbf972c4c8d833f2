//! Client of one monitor's control socket: requests with descriptors out, replies and events in.
//!
//! One task per monitor reads the socket until its end. Replies find their request by id; events go to whoever opened the connection, in
//! order, and the last one is always [`Notice::Gone`]. Everything is bounded: packets by the protocol, requests by a time-out each, events
//! by a channel. Descriptors that a monitor might send are not received. The protocol is `lathe_vmm::control::wire`.

#[cfg(test)]
pub(crate) mod fake;

use std::collections::HashMap;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use lathe_vmm::control::wire::{self, Answer, Command, Event, Message, Reply, Request};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    SocketAddrUnix, SocketFlags, SocketType,
};
use tokio::io::Interest;
use tokio::net::UnixDatagram;
use tokio::sync::{mpsc, oneshot};

/// How long a monitor may take to answer. Under emulation a busy monitor needs seconds for what takes milliseconds on hardware.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// Events waiting for a slow listener before the reader waits for it.
const EVENT_QUEUE: usize = 64;

/// What a monitor says without being waited for.
#[derive(Debug)]
pub enum Notice {
    /// An event.
    Event(Event),
    /// The answer to what was sent by [`Monitor::begin`], in order with the events before and after it.
    Answer(u64, Result<Answer, MonitorError>),
    /// The connection is over; no more will come.
    Gone,
}

/// Why a command has no good answer.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    /// The monitor refused; nothing was changed.
    #[error("{message} ({code})")]
    Refused {
        /// Stable, kebab-case.
        code: String,
        /// For people.
        message: String,
    },
    /// Nobody listens there.
    #[error("no monitor answers on its control socket: {0}")]
    Connect(io::Error),
    /// The socket failed.
    #[error("the monitor's control socket failed: {0}")]
    Socket(io::Error),
    /// The monitor went away.
    #[error("the monitor went away before it answered")]
    Gone,
    /// It took too long.
    #[error("the monitor did not answer within {} s", ANSWER_TIMEOUT.as_secs())]
    Timeout,
    /// It answered something else than was asked for.
    #[error("the monitor answered something unexpected to {0}")]
    Unexpected(&'static str),
    /// The command cannot be encoded.
    #[error("the command is {0} bytes long, at most {most} fit", most = wire::MAX_MESSAGE_BYTES)]
    TooLong(usize),
}

/// Who an answer is for.
enum Waiter {
    /// Somebody waits for just this one.
    Caller(oneshot::Sender<Result<Answer, MonitorError>>),
    /// Whoever takes the notices.
    Notices,
}

type Waiting = HashMap<u64, Waiter>;

struct Inner {
    /// tokio has no type for `SOCK_SEQPACKET`; this one waits for readiness, and the calls are ours.
    socket: UnixDatagram,
    waiting: Mutex<Option<Waiting>>,
    next_id: AtomicU64,
    /// Spoken with this monitor: the oldest until it has said what it understands.
    version: AtomicU32,
}

/// A connection to a monitor.
#[derive(Clone)]
pub struct Monitor {
    inner: Arc<Inner>,
}

impl Monitor {
    /// Connects to the control socket at `path` and starts to read.
    ///
    /// # Errors
    /// [`MonitorError::Connect`].
    pub fn connect(path: &Path) -> Result<(Self, mpsc::Receiver<Notice>), MonitorError> {
        Self::from_socket(connect(path).map_err(MonitorError::Connect)?)
    }

    /// Speaks on a connected, non-blocking socket.
    ///
    /// # Errors
    /// [`MonitorError::Socket`] when it cannot be watched.
    pub fn from_socket(socket: OwnedFd) -> Result<(Self, mpsc::Receiver<Notice>), MonitorError> {
        let socket = UnixDatagram::from_std(socket.into()).map_err(MonitorError::Socket)?;
        let waiting = Mutex::new(Some(Waiting::new()));
        let inner = Arc::new(Inner {
            socket,
            waiting,
            next_id: AtomicU64::new(1),
            version: AtomicU32::new(wire::OLDEST_VERSION),
        });
        let (notices, receiver) = mpsc::channel(EVENT_QUEUE);
        tokio::spawn(read_all(Arc::clone(&inner), notices));
        Ok((Self { inner }, receiver))
    }

    /// Sends `command` with `descriptors` and waits for its answer.
    ///
    /// # Errors
    /// [`MonitorError`]; after anything but `Refused` it is unknown whether the command was carried out.
    pub async fn call(
        &self,
        command: Command,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<Answer, MonitorError> {
        let id = self.inner.next_id.fetch_add(1, Ordering::Relaxed);
        let (sender, answer) = oneshot::channel();
        match self.inner.waiting().as_mut() {
            Some(waiting) => waiting.insert(id, Waiter::Caller(sender)),
            None => return Err(MonitorError::Gone),
        };
        let result = tokio::time::timeout(ANSWER_TIMEOUT, async {
            let v = self.inner.version.load(Ordering::Relaxed);
            self.inner.send(Request { v, id, command }, descriptors).await?;
            answer.await.map_err(|_| MonitorError::Gone)?
        });
        let result = result.await.unwrap_or(Err(MonitorError::Timeout));
        if let Some(waiting) = self.inner.waiting().as_mut() {
            waiting.remove(&id);
        }
        result
    }

    /// Sends a command that answers nothing.
    ///
    /// # Errors
    /// As [`Monitor::call`].
    pub async fn tell(&self, command: Command) -> Result<(), MonitorError> {
        self.call(command, &[]).await.map(|_| ())
    }

    /// Sends `command`; its answer comes as [`Notice::Answer`] with the id that is returned here, or never if the monitor goes.
    ///
    /// # Errors
    /// When it cannot be sent.
    pub async fn begin(&self, command: Command) -> Result<u64, MonitorError> {
        let id = self.inner.next_id.fetch_add(1, Ordering::Relaxed);
        match self.inner.waiting().as_mut() {
            Some(waiting) => waiting.insert(id, Waiter::Notices),
            None => return Err(MonitorError::Gone),
        };
        let v = self.inner.version.load(Ordering::Relaxed);
        let sent =
            tokio::time::timeout(ANSWER_TIMEOUT, self.inner.send(Request { v, id, command }, &[])).await;
        let sent = sent.unwrap_or(Err(MonitorError::Timeout));
        if sent.is_err()
            && let Some(waiting) = self.inner.waiting().as_mut()
        {
            waiting.remove(&id);
        }
        sent.map(|()| id)
    }

    /// Says hello and learns where the machine is.
    ///
    /// # Errors
    /// As [`Monitor::call`], and `Refused` when it speaks no common version.
    pub async fn hello(&self) -> Result<wire::Phase, MonitorError> {
        match self.call(Command::Hello {}, &[]).await? {
            Answer::Hello { version, oldest_version, phase, build } => {
                if version < wire::OLDEST_VERSION || oldest_version > wire::VERSION {
                    let message = format!(
                        "the monitor (build {build}) speaks versions {oldest_version} to {version}, lathed {} to {}",
                        wire::OLDEST_VERSION,
                        wire::VERSION
                    );
                    return Err(MonitorError::Refused { code: "unsupported-version".to_owned(), message });
                }
                self.inner.version.store(version.min(wire::VERSION), Ordering::Relaxed);
                Ok(phase)
            }
            _ => Err(MonitorError::Unexpected("hello")),
        }
    }

    /// The protocol version spoken since [`Monitor::hello`].
    pub fn version(&self) -> u32 {
        self.inner.version.load(Ordering::Relaxed)
    }

    /// Where the machine is.
    ///
    /// # Errors
    /// As [`Monitor::call`].
    pub async fn status(&self) -> Result<wire::Status, MonitorError> {
        match self.call(Command::Status {}, &[]).await? {
            Answer::Status(status) => Ok(*status),
            _ => Err(MonitorError::Unexpected("status")),
        }
    }
}

impl Inner {
    fn waiting(&self) -> MutexGuard<'_, Option<Waiting>> {
        self.waiting.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    async fn send(&self, request: Request, descriptors: &[BorrowedFd<'_>]) -> Result<(), MonitorError> {
        let packet = serde_json::to_vec(&request).map_err(|cause| MonitorError::Socket(cause.into()))?;
        if packet.len() > wire::MAX_MESSAGE_BYTES || descriptors.len() > wire::MAX_MESSAGE_FDS {
            return Err(MonitorError::TooLong(packet.len()));
        }
        let send = || send_packet(self.socket.as_fd(), &packet, descriptors);
        self.socket.async_io(Interest::WRITABLE, send).await.map_err(MonitorError::Socket)
    }

    async fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.socket.async_io(Interest::READABLE, || receive_packet(self.socket.as_fd(), buffer)).await
    }
}

/// A non-blocking `SOCK_SEQPACKET` connection to `path`.
fn connect(path: &Path) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

fn send_packet(socket: BorrowedFd<'_>, packet: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(wire::MAX_MESSAGE_FDS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many descriptors"));
    }
    let flags = SendFlags::NOSIGNAL;
    let sent = rustix::net::sendmsg(socket, &[IoSlice::new(packet)], &mut ancillary, flags)?;
    if sent == packet.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

/// One packet without descriptors: where no room is given for them, the kernel closes them.
fn receive_packet(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
    let mut ancillary = RecvAncillaryBuffer::default();
    let flags = RecvFlags::CMSG_CLOEXEC;
    let received = rustix::net::recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut ancillary, flags)?;
    Ok(received.bytes)
}

async fn read_all(inner: Arc<Inner>, notices: mpsc::Sender<Notice>) {
    let mut buffer = vec![0; wire::MAX_MESSAGE_BYTES];
    loop {
        let length = match inner.receive(&mut buffer).await {
            Ok(0) => break,
            Ok(length) => length,
            Err(cause) => {
                tracing::debug!(%cause, "a monitor's control socket ended");
                break;
            }
        };
        match serde_json::from_slice(&buffer[..length]) {
            Ok(Message::Reply(reply)) => {
                if let Some((id, result)) = answer(&inner, reply) {
                    let _ = notices.send(Notice::Answer(id, result)).await;
                }
            }
            Ok(Message::Event(event)) => {
                // Whoever opened the connection may have lost interest in events but not in answers.
                let _ = notices.send(Notice::Event(event)).await;
            }
            // A newer monitor may say more than we know; what is not an answer can be left.
            Err(cause) => tracing::warn!(%cause, "a monitor sent something that is no message"),
        }
    }
    // Dropping the senders tells every caller that the monitor is gone.
    inner.waiting().take();
    let _ = notices.send(Notice::Gone).await;
}

/// Hands an answer to its caller, or back for whoever takes the notices.
fn answer(inner: &Inner, reply: Reply) -> Option<(u64, Result<Answer, MonitorError>)> {
    let waiter = inner.waiting().as_mut().and_then(|waiting| waiting.remove(&reply.id));
    let result = reply
        .result
        .map_err(|refusal| MonitorError::Refused { code: refusal.code, message: refusal.message });
    match waiter? {
        Waiter::Caller(sender) => {
            // Gone if the caller gave up.
            let _ = sender.send(result);
            None
        }
        Waiter::Notices => Some((reply.id, result)),
    }
}

#[cfg(test)]
mod tests {
    use super::fake::{FakeMonitor, Script};
    use super::*;

    #[tokio::test]
    async fn commands_are_answered_and_refused() {
        let folder = tempfile::tempdir().unwrap();
        let fake = FakeMonitor::listen(&folder.path().join("m.sock"), Script::default());
        let (monitor, _notices) = Monitor::connect(fake.path()).unwrap();
        assert_eq!(monitor.hello().await.unwrap(), wire::Phase::Empty);
        let refused = monitor.tell(Command::Go {}).await.unwrap_err();
        assert!(matches!(refused, MonitorError::Refused { code, .. } if code == "wrong-phase"));
    }

    #[tokio::test]
    async fn a_monitor_that_dies_is_noticed_by_callers_and_listeners() {
        let folder = tempfile::tempdir().unwrap();
        let fake = FakeMonitor::listen(&folder.path().join("m.sock"), Script::default());
        let (monitor, mut notices) = Monitor::connect(fake.path()).unwrap();
        monitor.hello().await.unwrap();
        fake.die();
        assert!(matches!(notices.recv().await, Some(Notice::Gone)));
        assert!(matches!(monitor.hello().await, Err(MonitorError::Gone)));
    }

    #[tokio::test]
    async fn nobody_there_is_an_error_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let error = Monitor::connect(&folder.path().join("none")).map(|_| ()).unwrap_err();
        assert!(matches!(error, MonitorError::Connect(_)), "{error}");
    }
}
