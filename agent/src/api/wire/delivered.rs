//! What machines got of what they asked for, and how long they stood waiting.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What a machine asked for, never more than its grant, and what it got. Nothing is known of what its disks were held back from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Delivered {
    /// milliCPU; `null` while nothing is measured.
    pub cpu: Option<DeliveredWindows>,
    /// bit/s towards the guest, of its first nic; likewise.
    pub net_to_guest: Option<DeliveredWindows>,
    /// bit/s from the guest, of its first nic; likewise.
    pub net_from_guest: Option<DeliveredWindows>,
}

/// One resource over three times that end now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DeliveredWindows {
    /// 1 s.
    pub sec_1: DeliveredShare,
    /// 10 s.
    pub sec_10: DeliveredShare,
    /// 1 min.
    pub sec_60: DeliveredShare,
}

/// One resource over one time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DeliveredShare {
    /// Milliseconds of it that were measured: fewer where the machine is young or lathed was away.
    pub measured_msec: u64,
    /// What it asked for, on average.
    pub asked: u64,
    /// What it got, on average.
    pub delivered: u64,
    /// Parts per thousand that it got of what it asked for; `null` where that was less than a hundredth of its grant.
    pub permille: Option<u64>,
}

/// Share of the last 10 s in which some thread of a machine waited, hundredths of a percent; `null` where the kernel does not measure it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Stalls {
    /// For a CPU, its own quota included.
    pub cpu_centipercent: Option<u32>,
    /// For memory.
    pub memory_centipercent: Option<u32>,
    /// For a block device of the host.
    pub io_centipercent: Option<u32>,
}
