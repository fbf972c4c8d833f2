//! One connection of the host: frames in and out of a non-blocking stream socket, with every buffer bounded.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use lathe_guest::protocol::{FrameKind, MAX_FRAME_BYTES, Response, decode_header, encode_frame};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// The other side takes nothing for this long: it is gone.
const SEND_TIMEOUT: Duration = Duration::from_secs(60);
/// Bytes per read.
const READ_BYTES: usize = 16 * 1024;
const HEADER_BYTES: usize = 5;

/// Frames out of a stream of bytes that arrive in any portions. Holds at most one frame and one read.
#[derive(Debug, Default)]
pub struct Decoder {
    bytes: Vec<u8>,
    start: usize,
}

impl Decoder {
    /// Adds what has arrived.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.drain(..self.start);
        self.start = 0;
        self.bytes.extend_from_slice(bytes);
    }

    /// The next complete frame.
    ///
    /// # Errors
    /// `InvalidData` for a frame that breaks the rules; then the stream is unusable.
    pub fn next(&mut self) -> io::Result<Option<(FrameKind, Vec<u8>)>> {
        let rest = &self.bytes[self.start..];
        let Some(header) = rest.first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        let (kind, length) = decode_header(*header)?;
        let Some(payload) = rest.get(HEADER_BYTES..HEADER_BYTES + length) else {
            return Ok(None);
        };
        let payload = payload.to_vec();
        self.start += HEADER_BYTES + length;
        if self.start == self.bytes.len() && self.bytes.capacity() > MAX_FRAME_BYTES {
            *self = Self::default();
        }
        Ok(Some((kind, payload)))
    }
}

/// A connection of the host.
pub struct Connection {
    stream: File,
    decoder: Decoder,
}

/// What a look at the stream brought.
#[derive(Debug, PartialEq, Eq)]
pub enum Received {
    /// A frame.
    Frame(FrameKind, Vec<u8>),
    /// Nothing yet.
    Nothing,
    /// The host has gone.
    End,
}

impl Connection {
    /// Takes over a connected stream socket.
    ///
    /// # Errors
    /// As fcntl(2).
    pub fn new(stream: OwnedFd) -> io::Result<Self> {
        set_nonblocking(&stream)?;
        Ok(Self { stream: File::from(stream), decoder: Decoder::default() })
    }

    /// Waits for the next frame, for `timeout` at most.
    ///
    /// # Errors
    /// `InvalidData` for a broken frame; otherwise what the socket says.
    pub fn receive(&mut self, timeout: Duration) -> io::Result<Received> {
        let deadline = Instant::now() + timeout;
        loop {
            match self.try_receive()? {
                Received::Nothing => {}
                other => return Ok(other),
            }
            if !wait(self.stream.as_fd(), PollFlags::POLLIN, deadline)? {
                return Ok(Received::Nothing);
            }
        }
    }

    /// The next frame if it is there. Reads at most once.
    ///
    /// # Errors
    /// As [`Self::receive`].
    pub fn try_receive(&mut self) -> io::Result<Received> {
        if let Some((kind, payload)) = self.decoder.next()? {
            return Ok(Received::Frame(kind, payload));
        }
        let mut bytes = [0; READ_BYTES];
        match self.stream.read(&mut bytes) {
            Ok(0) => Ok(Received::End),
            Ok(count) => {
                self.decoder.push(&bytes[..count]);
                Ok(match self.decoder.next()? {
                    Some((kind, payload)) => Received::Frame(kind, payload),
                    None => Received::Nothing,
                })
            }
            Err(error) if is_transient(&error) => Ok(Received::Nothing),
            Err(error) => Err(error),
        }
    }

    /// Sends a message.
    ///
    /// # Errors
    /// `TimedOut` when the other side takes nothing; otherwise what the socket says.
    pub fn send(&mut self, response: &Response) -> io::Result<()> {
        self.send_bytes(&encode_frame(FrameKind::Message, &serde_json::to_vec(response)?)?)
    }

    /// Sends whole frames that [`encode_frame`] made.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub fn send_bytes(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let taken = self.try_send(bytes)?;
            bytes = &bytes[taken..];
            if taken == 0 && !wait(self.stream.as_fd(), PollFlags::POLLOUT, Instant::now() + SEND_TIMEOUT)? {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "the host takes nothing"));
            }
        }
        Ok(())
    }

    /// Sends what goes without waiting; gives the number of bytes.
    ///
    /// # Errors
    /// What the socket says.
    pub fn try_send(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.stream.write(bytes) {
            Err(error) if is_transient(&error) => Ok(0),
            other => other,
        }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// Makes reads and writes of this descriptor return at once.
///
/// # Errors
/// As fcntl(2).
pub fn set_nonblocking(fd: impl AsFd) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
    fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

/// Whether to try again later.
pub fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

/// Waits until the descriptor is ready, or has failed, which the next call shows; false at the deadline.
///
/// # Errors
/// As poll(2).
pub fn wait(fd: BorrowedFd<'_>, events: PollFlags, deadline: Instant) -> io::Result<bool> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let millis =
            u16::try_from(left.as_millis() + u128::from(left.subsec_nanos() > 0)).unwrap_or(u16::MAX);
        let mut fds = [PollFd::new(fd, events)];
        match poll(&mut fds, PollTimeout::from(millis)) {
            Ok(0) if Instant::now() >= deadline => return Ok(false),
            Ok(0) | Err(nix::errno::Errno::EINTR) => {}
            Ok(_) => return Ok(true),
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn random_bytes_never_panic(portions in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 0..20)) {
            let mut decoder = Decoder::default();
            'all: for portion in portions {
                decoder.push(&portion);
                loop {
                    match decoder.next() {
                        Ok(Some((_, payload))) => prop_assert!(payload.len() <= MAX_FRAME_BYTES),
                        Ok(None) => break,
                        Err(_) => break 'all,
                    }
                }
            }
        }

        #[test]
        fn frames_survive_any_portions(
            payloads in prop::collection::vec((0u8..4, prop::collection::vec(any::<u8>(), 0..300)), 0..10),
            cut in 1usize..50,
        ) {
            let mut stream = Vec::new();
            for (kind, payload) in &payloads {
                stream.extend(encode_frame(FrameKind::try_from(*kind).unwrap(), payload).unwrap());
            }
            let mut decoder = Decoder::default();
            let mut decoded = Vec::new();
            for portion in stream.chunks(cut) {
                decoder.push(portion);
                while let Some((kind, payload)) = decoder.next().unwrap() {
                    decoded.push((kind as u8, payload));
                }
            }
            prop_assert_eq!(decoded, payloads);
        }
    }

    #[test]
    fn a_frame_too_long_is_refused_by_its_header() {
        let mut decoder = Decoder::default();
        decoder.push(&[0, 1, 0, 1, 0]);
        assert_eq!(decoder.next().unwrap_err().kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn receiving_ends_with_the_connection_and_times_out_without_data() {
        let (host, guest) = UnixStream::pair().unwrap();
        let mut connection = Connection::new(guest.into()).unwrap();
        assert_eq!(connection.receive(Duration::from_millis(1)).unwrap(), Received::Nothing);
        drop(host);
        assert_eq!(connection.receive(Duration::from_secs(5)).unwrap(), Received::End);
    }
}
