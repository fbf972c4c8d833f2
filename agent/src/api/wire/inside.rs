//! What goes on inside a machine, as its guest agent tells it: nobody outside can check it.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What goes on inside.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct InsideView {
    /// How long ago it was told, milliseconds.
    pub age_msec: u64,
    /// What an application is in it: `units` of its tree of control groups, or `sessions` of processes where it has none.
    pub kind: String,
    /// Share of the last second in which some task waited for a CPU, parts per thousand; absent where its kernel does not tell.
    pub cpu_some_permille: Option<u32>,
    /// The same for memory.
    pub memory_some_permille: Option<u32>,
    /// The same for I/O.
    pub io_some_permille: Option<u32>,
    /// Swapped out inside, bytes.
    pub swap_used_bytes: u64,
    /// Received on all its interfaces, bit/s. Of applications one by one no kernel counts it.
    pub net_rx_bit_per_sec: u64,
    /// Sent on all its interfaces, bit/s.
    pub net_tx_bit_per_sec: u64,
    /// Those that ask for most, the first the most; 32 at most.
    pub applications: Vec<ApplicationView>,
    /// The others as one; absent without any.
    pub others: Option<ApplicationView>,
    /// How many these are.
    pub others_count: u32,
    /// What is expected of them, four at most.
    #[serde(default)]
    pub goals: Vec<GoalView>,
}

/// What is expected of an application (`lathe-guest goal`), and what its own metrics say.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GoalView {
    /// Of which application, as it is called inside; what is not plain in it is `?`.
    pub name: String,
    /// latency or throughput.
    pub kind: String,
    /// Of its requests so many, parts per thousand; absent of throughput.
    pub permille: Option<u32>,
    /// Shall take less than this, microseconds; absent of throughput.
    pub under_usec: Option<u64>,
    /// Time that the figures are of, milliseconds; 0 without any.
    pub over_msec: u32,
    /// What these requests take at most, microseconds; of throughput the 95th percentile. Absent where it is not told.
    pub latency_usec: Option<u64>,
    /// Requests, or whatever it counts, thousandths per second; absent where it is not told.
    pub rate_milli: Option<u64>,
    /// Why its metrics cannot be read; empty otherwise.
    pub wrong: String,
    /// `unknown`, `met`, `missed` (a moment ago), `wanting` (more than is granted), `trying` (whether more helps), `elsewhere` (neither CPU nor
    /// memory is short), `bounded` (the machine has all that it may have), `futile` (more did not help).
    pub stands: String,
    /// What is wanted for its sake, milliCPU.
    pub cpu_milli: Option<u64>,
    /// The same, bytes of memory.
    pub memory_bytes: Option<u64>,
}

/// One application.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ApplicationView {
    /// Its unit, or the leader of its session and that one's number; what is not plain in it is `?`.
    pub name: String,
    /// milliCPU.
    pub cpu_milli: u64,
    /// Charged to it, or resident, bytes.
    pub memory_bytes: u64,
    /// Of that, with no file behind it, bytes.
    pub anon_bytes: u64,
    /// Of that, with a file behind it, bytes.
    pub file_bytes: u64,
    /// All but page cache that it has not used of late, bytes.
    pub working_set_bytes: u64,
    /// Read from disks, bytes per second.
    pub read_bytes_per_sec: u64,
    /// Written to disks, bytes per second.
    pub written_bytes_per_sec: u64,
    /// Operations on disks per second; absent of sessions.
    pub operations_per_sec: Option<u64>,
    /// Share of time in which some task of it waited for a CPU, parts per thousand; absent of sessions.
    pub cpu_some_permille: Option<u32>,
    /// The same for memory.
    pub memory_some_permille: Option<u32>,
    /// The same for I/O.
    pub io_some_permille: Option<u32>,
}

/// Something that is wanted of the host: at least so much should be there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct WantedView {
    /// cpu, memory, net or iops.
    pub resource: String,
    /// In its unit.
    pub amount: u64,
    /// Who wants it: `inside` (lathe-guest want), `goal` (lathe-guest goal), or `by-hand` (a blueprint or an event that is about to begin).
    pub source: String,
    /// How long it will be wanted, seconds; absent by hand, and for a goal.
    pub left_sec: Option<u64>,
}
