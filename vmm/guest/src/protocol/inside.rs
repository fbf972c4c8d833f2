//! What goes on inside a machine: its applications, what its kernel says is short, and what applications wish for.
//!
//! The host asks with [`super::Request::Inside`], once a second at most; the answer tells what was since the question before. All numbers
//! are of the last interval or of now, so that neither side has to remember the other's. Since version 4.

use serde::{Deserialize, Serialize};

/// Most applications that are told one by one; the others are told as one.
pub const MAX_APPLICATIONS: usize = 32;
/// Longest name of an application, bytes.
pub const MAX_NAME_BYTES: usize = 64;
/// Most wishes at a time: one of each [`Wished`].
pub const MAX_WANTS: usize = 2;
/// Longest time that something may be wanted for, seconds.
pub const MAX_WANT_SEC: u32 = 86_400;

/// Most goals at a time.
pub const MAX_GOALS: usize = 4;
/// Longest words about a goal, bytes.
pub const MAX_WORDS_BYTES: usize = 200;

/// What goes on inside.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inside {
    /// Time that rates are of, milliseconds; 0 when this is the first look, which has no rates.
    pub over_msec: u32,
    /// The whole machine.
    pub machine: Whole,
    /// What an application is here.
    pub kind: ApplicationKind,
    /// Those that ask for most, the first the most; at most [`MAX_APPLICATIONS`].
    pub applications: Vec<Application>,
    /// The others as one, its `name` empty.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub others: Option<Application>,
    /// How many the others are.
    #[serde(default)]
    pub others_count: u32,
    /// What is wanted now; at most [`MAX_WANTS`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub wants: Vec<Want>,
    /// What is expected of applications; at most [`MAX_GOALS`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub goals: Vec<Pursued>,
}

/// The whole machine, as its kernel sees it. What the kernel does not tell is `None`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Whole {
    /// Used, milliCPU.
    pub cpu_milli: u64,
    /// Share of time in which some task waited for a CPU (PSI), parts per thousand.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_some_permille: Option<u32>,
    /// The same for memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_some_permille: Option<u32>,
    /// The same for I/O.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub io_some_permille: Option<u32>,
    /// MemTotal, bytes.
    pub memory_total_bytes: u64,
    /// MemAvailable, bytes.
    pub memory_available_bytes: u64,
    /// SwapTotal less SwapFree, bytes.
    pub swap_used_bytes: u64,
    /// All interfaces but loopback, bit/s. Of applications one by one no counter of the kernel tells it.
    pub net_rx_bit_per_sec: u64,
    /// The same, sent.
    pub net_tx_bit_per_sec: u64,
}

/// What an application is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ApplicationKind {
    /// A leaf of the tree of control groups (v2): a unit of systemd, a container. Nothing that it does is missed.
    Units,
    /// A session of processes, where there are no units. Processes that come and go between two looks are missed.
    #[default]
    Sessions,
    /// Of a later version.
    #[serde(other)]
    Other,
}

/// One application. What cannot be known of its kind is `None`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Application {
    /// At most [`MAX_NAME_BYTES`] long.
    pub name: String,
    /// milliCPU.
    pub cpu_milli: u64,
    /// Charged to it, or resident, bytes.
    pub memory_bytes: u64,
    /// Of that, memory that no file stands behind, bytes.
    pub anon_bytes: u64,
    /// Of that, memory with a file behind it, bytes.
    pub file_bytes: u64,
    /// All but page cache that it has not used of late, bytes.
    pub working_set_bytes: u64,
    /// Bytes read from disks, a second.
    pub read_bytes_per_sec: u64,
    /// Bytes written to disks, a second.
    pub written_bytes_per_sec: u64,
    /// Operations on disks, a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub operations_per_sec: Option<u64>,
    /// Share of time in which some task of it waited for a CPU, parts per thousand.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_some_permille: Option<u32>,
    /// The same for memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_some_permille: Option<u32>,
    /// The same for I/O.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub io_some_permille: Option<u32>,
}

/// What can be wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Wished {
    /// milliCPU.
    Cpu,
    /// Bytes.
    Memory,
}

/// How much is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Amount {
    /// So much, in the resource's unit.
    To(u64),
    /// So much more than is granted when the host hears of it.
    Up(u64),
    /// The same in hundredths of a percent of what is granted then.
    UpCentipercent(u32),
}

/// Something wanted from inside, until its time is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Want {
    /// Which one; never used again while this guest agent lives.
    pub id: u64,
    /// Of which resource.
    pub resource: Wished,
    /// How much.
    pub amount: Amount,
    /// What the host has made of `amount`, in the resource's unit; `None` until it has said so. The guest says it anew each time, so
    /// that a host that has forgotten does not add to what it has added to already.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub settled: Option<u64>,
    /// Until it is over, seconds.
    pub left_sec: u32,
}

/// What the host made of something wanted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settled {
    /// Which one.
    pub id: u64,
    /// What it makes of it, in the resource's unit; `None`: nothing, it is refused.
    pub amount: Option<u64>,
    /// What there is to say about it, in words.
    pub words: String,
}

/// What is expected of an application.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Goal {
    /// It answers in time.
    Latency {
        /// Of its requests so many at least, parts per thousand: 950 is the 95th percentile. 1 to 999.
        permille: u32,
        /// In less than this, microseconds; at least 1.
        under_usec: u64,
    },
    /// It gets through as much as it can: whatever more CPU makes it faster is wanted.
    Throughput,
    /// Of a later version.
    #[serde(other)]
    Other,
}

/// A goal, and what its application says of itself by its own metrics (OpenMetrics 1.0).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pursued {
    /// Of which application, as its administrator calls it; at most [`MAX_NAME_BYTES`] long. One goal of a name.
    pub name: String,
    /// What is expected.
    pub goal: Goal,
    /// Time that the figures below are of, milliseconds; 0 when there are none.
    pub over_msec: u32,
    /// The quantile that the goal is about, or the 95th percentile, microseconds. `None`: not told, or nothing was asked of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latency_usec: Option<u64>,
    /// Requests, or whatever it counts, thousandths a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_milli: Option<u64>,
    /// Why its metrics cannot be read, at most [`MAX_WORDS_BYTES`] long.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wrong: Option<String>,
}
