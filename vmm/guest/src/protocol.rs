//! The protocol between a host and the agent inside a machine, over vsock.
//!
//! The guest agent listens on vsock port [`PORT`]; the host connects (through the monitor's listener). One connection
//! is one session: the host sends one [`Request`], and the guest answers with one [`Response`]; after `Exec` frames
//! follow both ways until [`Response::Exited`]. All other requests may be repeated on the same connection.
//!
//! A frame is `kind: u8, length: u32 little endian, payload`. Payloads are at most [`MAX_FRAME_BYTES`] long. Either side
//! closes the connection when the other breaks a rule. The host treats everything from the guest as hostile.

pub mod inside;

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

/// vsock port that the guest agent listens on.
pub const PORT: u32 = 1024;
/// The protocol version that this build speaks. 2 added [`Request::Features`]; since 3 several network cards with gateways do not get into
/// each other's way, see [`Network::interfaces`]; 4 added [`Request::Inside`].
pub const VERSION: u32 = 4;
/// Oldest protocol version that this build still understands.
pub const OLDEST_VERSION: u32 = 1;
/// Longest payload of a frame in bytes.
pub const MAX_FRAME_BYTES: usize = 64 * 1024;

/// What a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum FrameKind {
    /// A [`Request`] or [`Response`] as JSON.
    Message = 0,
    /// Host → guest: bytes for the command's standard input; empty means end of file.
    Stdin = 1,
    /// Guest → host: bytes of standard output (of the terminal, when there is one).
    Stdout = 2,
    /// Guest → host: bytes of standard error.
    Stderr = 3,
}

impl TryFrom<u8> for FrameKind {
    type Error = io::Error;

    fn try_from(kind: u8) -> io::Result<Self> {
        match kind {
            0 => Ok(Self::Message),
            1 => Ok(Self::Stdin),
            2 => Ok(Self::Stdout),
            3 => Ok(Self::Stderr),
            other => Err(io::Error::new(io::ErrorKind::InvalidData, format!("unknown frame kind {other}"))),
        }
    }
}

/// Writes one frame.
///
/// # Errors
/// `InvalidInput` when the payload exceeds [`MAX_FRAME_BYTES`]; otherwise what the stream says.
pub fn write_frame(stream: &mut impl Write, kind: FrameKind, payload: &[u8]) -> io::Result<()> {
    stream.write_all(&encode_frame(kind, payload)?)?;
    stream.flush()
}

/// One frame as bytes.
///
/// # Errors
/// `InvalidInput` when the payload exceeds [`MAX_FRAME_BYTES`].
pub fn encode_frame(kind: FrameKind, payload: &[u8]) -> io::Result<Vec<u8>> {
    if payload.len() > MAX_FRAME_BYTES {
        let message = format!("a frame of {} bytes exceeds {MAX_FRAME_BYTES}", payload.len());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    let mut frame = Vec::with_capacity(5 + payload.len());
    frame.push(kind as u8);
    frame.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    frame.extend_from_slice(payload);
    Ok(frame)
}

/// Decodes a frame's header into kind and payload length.
///
/// # Errors
/// `InvalidData` for an unknown kind or a length above [`MAX_FRAME_BYTES`].
pub fn decode_header(header: [u8; 5]) -> io::Result<(FrameKind, usize)> {
    let kind = FrameKind::try_from(header[0])?;
    let length = u32::from_le_bytes([header[1], header[2], header[3], header[4]]) as usize;
    if length > MAX_FRAME_BYTES {
        let message = format!("a frame of {length} bytes exceeds {MAX_FRAME_BYTES}");
        return Err(io::Error::new(io::ErrorKind::InvalidData, message));
    }
    Ok((kind, length))
}

/// Reads one frame.
///
/// # Errors
/// `InvalidData` for a frame that breaks the rules; otherwise what the stream says.
pub fn read_frame(stream: &mut impl Read) -> io::Result<(FrameKind, Vec<u8>)> {
    let mut header = [0; 5];
    stream.read_exact(&mut header)?;
    let (kind, length) = decode_header(header)?;
    let mut payload = vec![0; length];
    stream.read_exact(&mut payload)?;
    Ok((kind, payload))
}

/// What the host asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Who is there.
    Hello {
        /// Newest version that the host speaks.
        version: u32,
    },
    /// Runs a command. Frames `Stdin`/`Stdout`/`Stderr` follow, and messages `WindowSize` and `Signal`.
    Exec(Exec),
    /// Changes the size of the running command's terminal.
    WindowSize {
        /// Columns.
        columns: u16,
        /// Rows.
        rows: u16,
    },
    /// Sends a signal to the running command's process group.
    Signal {
        /// Number as in signal(7), 1..=64.
        number: i32,
    },
    /// Sets hostname, addresses, routes and name servers; the same request twice changes nothing.
    Network(Network),
    /// Brings the first `online` CPUs online and the others, from the highest down, offline. CPU 0 always stays. CPUs that are yet to
    /// be plugged in are waited for, five seconds at most; a later request of the kind ends the wait.
    Cpus {
        /// How many to have online, at least 1.
        online: u32,
    },
    /// Brings every present but offline memory block online.
    MemoryOnline {},
    /// Shuts the guest down in order.
    Shutdown {
        /// What comes after.
        mode: ShutdownMode,
    },
    /// Present usage.
    Usage {},
    /// What the guest can follow of a change of shape. Since version 2.
    Features {},
    /// What goes on inside, and what is wanted. Since version 4.
    Inside {
        /// What the host made of what was wanted when it asked before.
        #[serde(default)]
        settled: Vec<inside::Settled>,
    },
}

/// A command to run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exec {
    /// Program and arguments, at least the program, looked up in PATH.
    pub argv: Vec<String>,
    /// Added to the environment, `NAME=VALUE`.
    #[serde(default)]
    pub env: Vec<String>,
    /// Working directory; `/` (or the home directory of root) otherwise.
    pub cwd: Option<String>,
    /// With a terminal of this size, or with three pipes.
    pub tty: Option<Tty>,
}

/// A terminal's properties.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tty {
    /// Columns.
    pub columns: u16,
    /// Rows.
    pub rows: u16,
    /// Value of TERM.
    pub term: String,
}

/// How the guest's network shall look.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Network {
    /// Host name, RFC 1123 label.
    pub hostname: String,
    /// One per network card that is to be configured. The machine's default routes are the first one's; since version 3 what is sent from an
    /// address of another goes out through that card and its gateways. Before, gateways of another would replace the first one's.
    pub interfaces: Vec<Interface>,
    /// Addresses of name servers.
    #[serde(default)]
    pub dns: Vec<String>,
}

/// One network card in the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Interface {
    /// Which one, by its address.
    pub mac: [u8; 6],
    /// `192.0.2.7/24` or `2001:db8::7/64`.
    pub addresses: Vec<String>,
    /// Default routes' gateways, one per family at most.
    #[serde(default)]
    pub gateways: Vec<String>,
    /// Bytes, 68..=65535.
    pub mtu: Option<u16>,
}

/// What comes after a shutdown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ShutdownMode {
    /// ACPI S5.
    PowerOff,
    /// Reset.
    Reboot,
}

/// What the guest answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Response {
    /// To `Hello`.
    Hello(Hello),
    /// `Exec` has started this process.
    Started {
        /// Process id in the guest.
        pid: u32,
    },
    /// The command is over; the last message of the connection.
    Exited {
        /// Exit status 0..=255, or 128 + signal number as shells have it.
        code: i32,
        /// The signal that ended it, if one did.
        signal: Option<i32>,
    },
    /// To `Usage`.
    Usage(Usage),
    /// To `Features`.
    Features(Features),
    /// To `Inside`.
    Inside(Box<inside::Inside>),
    /// To all others that succeeded.
    Done {},
    /// The request failed and changed nothing, or as much as the message says.
    Error {
        /// Stable, kebab-case: `bad-request`, `not-found`, `not-permitted`, `failed`, `unsupported`.
        code: String,
        /// For people.
        message: String,
    },
}

/// Who the guest agent is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Newest protocol version spoken.
    pub version: u32,
    /// Oldest protocol version understood.
    pub oldest_version: u32,
    /// Version of the guest agent's build.
    pub build: String,
    /// `uname -r`.
    pub kernel: String,
    /// PRETTY_NAME of os-release, or `Lathe built-in guest`.
    pub os: String,
    /// Random id of this boot of the guest (/proc/sys/kernel/random/boot_id).
    pub boot_id: String,
}

/// What the guest can follow of a change of shape, and how far it has; figures are 0 where its kernel does not say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Features {
    /// CPUs that can ever be plugged in.
    pub cpus_possible: u32,
    /// CPUs plugged in.
    pub cpus_present: u32,
    /// CPUs online.
    pub cpus_online: u32,
    /// A driver serves a virtio-mem device.
    pub virtio_mem: bool,
    /// A driver serves a virtio-balloon device.
    pub virtio_balloon: bool,
    /// What becomes of memory that is plugged in.
    pub new_memory: NewMemory,
    /// Size of the blocks in which memory goes online, bytes.
    pub memory_block_bytes: u64,
    /// In blocks that are online, bytes.
    pub memory_online_bytes: u64,
    /// In blocks that are present but offline, bytes.
    pub memory_offline_bytes: u64,
}

/// What becomes of memory that is plugged in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NewMemory {
    /// It waits for [`Request::MemoryOnline`].
    #[default]
    Offline,
    /// It comes online by itself, where the kernel likes, and may not be given back.
    Online,
    /// It comes online by itself and can be given back.
    Movable,
}

/// First usage figures, all cumulative where they say so.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Since boot, milliseconds.
    pub uptime_msec: u64,
    /// CPUs online.
    pub cpus_online: u32,
    /// CPUs present.
    pub cpus_present: u32,
    /// Cumulative busy time (user + nice + system + irq + softirq), all CPUs, microseconds.
    pub cpu_busy_usec: u64,
    /// Cumulative time stolen by the host, all CPUs, microseconds.
    pub cpu_steal_usec: u64,
    /// MemTotal, bytes.
    pub memory_total_bytes: u64,
    /// MemAvailable, bytes.
    pub memory_available_bytes: u64,
    /// Cumulative, all interfaces but loopback.
    pub net_rx_bytes: u64,
    /// Cumulative, all interfaces but loopback.
    pub net_tx_bytes: u64,
    /// Cumulative, all disks.
    pub disk_read_bytes: u64,
    /// Cumulative, all disks.
    pub disk_written_bytes: u64,
    /// Load average over one minute, thousandths.
    pub load1_milli: u64,
    /// Share of time in which some task waited for memory, last 10 s, hundredths of a percent; `None` without PSI.
    pub psi_memory_some_centipercent: Option<u32>,
    /// The same for CPU.
    pub psi_cpu_some_centipercent: Option<u32>,
    /// The same for I/O.
    pub psi_io_some_centipercent: Option<u32>,
}
