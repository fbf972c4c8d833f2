//! Frames of the command channel between the harness and the agent inside a test host.
//!
//! One byte stream (a virtio-serial port, or a Unix socket to the process that holds the hosts) carries many commands
//! at once. Each frame names the command that it belongs to:
//!
//! ```text
//! magic "LTF1" · kind u8 · id u32 · length u32 · payload (at most 64 KiB)      integers little-endian
//!
//! agent  → harness   Hello(nonce)                    after each start of the agent, so also after a reboot
//! harness→ agent     Sync(nonce)                     everything before it is from an earlier boot and is skipped
//! harness→ agent     Exec(json) Stdin Eof Signal     begin and feed a command
//! agent  → harness   Stdout Stderr Exit(json)        what it says and how it ends
//! both               Ack(bytes u32)                  so much was taken off: at most WINDOW bytes are on their way
//! ```
//!
//! The reader skips bytes until it finds a magic: a host that is reset in the middle of a frame costs that frame only.

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

/// The most bytes that one frame carries.
pub const MAX_PAYLOAD: usize = 64 * 1024;
/// The most unacknowledged bytes per command and direction (stdout and stderr together).
pub const WINDOW: usize = 1024 * 1024;

const MAGIC: [u8; 4] = *b"LTF1";
const HEADER: usize = 13;

/// What a frame means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// The agent has started; the payload is a nonce.
    Hello = 1,
    /// Answer to [`Kind::Hello`] with the same nonce.
    Sync = 2,
    /// Begin a command; the payload is an [`ExecSpec`] as JSON.
    Exec = 3,
    /// Bytes for the command's standard input.
    Stdin = 4,
    /// The command's standard input ends.
    Eof = 5,
    /// Send a signal (i32) to the command's process group.
    Signal = 6,
    /// Bytes of the command's standard output.
    Stdout = 7,
    /// Bytes of the command's standard error.
    Stderr = 8,
    /// The command ended; the payload is its exit status (i32), 128 + n for signal n.
    Exit = 9,
    /// The receiver has taken so many bytes (u32) off its queue.
    Ack = 10,
    /// The host behind a relayed channel is gone; the payload says why.
    Lost = 11,
    /// Nobody listens to the command any more: kill it and send nothing else.
    Close = 12,
}

impl Kind {
    fn from_wire(byte: u8) -> Option<Self> {
        use Kind::*;
        [Hello, Sync, Exec, Stdin, Eof, Signal, Stdout, Stderr, Exit, Ack, Lost, Close]
            .into_iter()
            .find(|kind| *kind as u8 == byte)
    }
}

/// One message of the channel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// What it means.
    pub kind: Kind,
    /// The command it belongs to; 0 for the channel itself.
    pub id: u32,
    /// Its content.
    pub payload: Vec<u8>,
}

impl Frame {
    /// A frame with a copy of `payload`.
    pub fn new(kind: Kind, id: u32, payload: &[u8]) -> Self {
        Self { kind, id, payload: payload.to_vec() }
    }

    /// The payload as a little-endian integer, if it is exactly one.
    pub fn integer(&self) -> Option<i32> {
        Some(i32::from_le_bytes(self.payload.as_slice().try_into().ok()?))
    }

    /// Writes the frame with one call.
    ///
    /// # Errors
    /// What the writer says; a payload above [`MAX_PAYLOAD`] is invalid input.
    pub fn write(&self, out: &mut impl Write) -> io::Result<()> {
        if self.payload.len() > MAX_PAYLOAD {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "payload larger than a frame"));
        }
        let mut bytes = Vec::with_capacity(HEADER + self.payload.len());
        bytes.extend_from_slice(&MAGIC);
        bytes.push(self.kind as u8);
        bytes.extend_from_slice(&self.id.to_le_bytes());
        bytes.extend_from_slice(&(self.payload.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&self.payload);
        out.write_all(&bytes)
    }

    /// Reads the next frame, skipping whatever is none.
    ///
    /// # Errors
    /// What the reader says; the end of the stream is [`io::ErrorKind::UnexpectedEof`].
    pub fn read(input: &mut impl Read) -> io::Result<Self> {
        let mut header = [0; HEADER];
        input.read_exact(&mut header)?;
        loop {
            if let Some((kind, id, length)) = parse(&header) {
                let mut payload = vec![0; length];
                input.read_exact(&mut payload)?;
                return Ok(Self { kind, id, payload });
            }
            // Out of step: slide by one byte until a header fits.
            header.copy_within(1.., 0);
            input.read_exact(&mut header[HEADER - 1..])?;
        }
    }
}

fn parse(header: &[u8; HEADER]) -> Option<(Kind, u32, usize)> {
    let kind = Kind::from_wire(header[4])?;
    let id = u32::from_le_bytes(header[5..9].try_into().ok()?);
    let length = u32::from_le_bytes(header[9..13].try_into().ok()?) as usize;
    (header[..4] == MAGIC && length <= MAX_PAYLOAD).then_some((kind, id, length))
}

/// A command to run inside a host.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExecSpec {
    /// Program and arguments; the program is looked up in `PATH`.
    pub argv: Vec<String>,
    /// Variables on top of the agent's own environment.
    pub env: Vec<(String, String)>,
    /// Rows and columns of a terminal to run on; none: three pipes.
    pub tty: Option<(u16, u16)>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_torn_frame_costs_only_itself() {
        let mut wire = Vec::new();
        Frame::new(Kind::Stdout, 7, b"lost").write(&mut wire).unwrap();
        wire.truncate(9);
        let hello = Frame::new(Kind::Hello, 0, b"nonce");
        hello.write(&mut wire).unwrap();
        assert_eq!(Frame::read(&mut wire.as_slice()).unwrap(), hello);
    }

    #[test]
    fn an_oversized_payload_is_refused_both_ways() {
        let frame = Frame { kind: Kind::Stdin, id: 1, payload: vec![0; MAX_PAYLOAD + 1] };
        assert!(frame.write(&mut Vec::new()).is_err());
        let mut wire = Vec::new();
        Frame::new(Kind::Stdin, 1, b"").write(&mut wire).unwrap();
        wire[9..13].copy_from_slice(&(MAX_PAYLOAD as u32 + 1).to_le_bytes());
        let error = Frame::read(&mut wire.as_slice()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
