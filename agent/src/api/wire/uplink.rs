//! The host's uplink, shared between machines.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// How the uplink is to be shared.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct UplinkRequest {
    /// Network device; otherwise the one of the default route.
    #[serde(default)]
    pub device: Option<String>,
    /// What it carries, bit/s, 1 Mbit/s to 800 Gbit/s; otherwise the speed that the link tells.
    #[serde(default)]
    pub capacity_bit_per_sec: Option<u64>,
}

/// The host's uplink and what machines have of it, as `lathe host uplink show --json` prints it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct UplinkView {
    /// Always 1.
    pub schema: u32,
    /// Whether it is shared between machines. If not, everything else is empty, unless what was there before is still to be put back.
    pub enabled: bool,
    /// Network device.
    pub device: String,
    /// What it carries, bit/s.
    pub capacity_bit_per_sec: u64,
    /// Kept back for the host and for machines without limit, bit/s.
    pub reserved_bit_per_sec: u64,
    /// Granted to machines, bit/s.
    pub granted_bit_per_sec: u64,
    /// What was at the root of the device, and comes back when sharing ends.
    pub before: String,
    /// Why not all is in force, empty when it is.
    pub problem: String,
    /// What helps; may be empty.
    pub fix: String,
    /// The host's own class; absent while the device is not ours.
    pub host: Option<UplinkShare>,
    /// Machines with a nic that are on, by name.
    pub machines: Vec<UplinkMachine>,
}

/// A machine's part in the uplink.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct UplinkMachine {
    /// Machine name.
    pub machine: String,
    /// Its class; absent when it has none.
    pub share: Option<UplinkShare>,
    /// Why its packets go with the host's, empty when they do not.
    pub problem: String,
}

/// A class on the uplink, read back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct UplinkShare {
    /// Promised, bit/s.
    pub rate_bit_per_sec: u64,
    /// With what it may borrow, bit/s.
    pub ceil_bit_per_sec: u64,
    /// L2 bytes sent since the class was made.
    pub sent_bytes: u64,
    /// Packets dropped since then.
    pub dropped_packets: u64,
    /// Bytes that wait now.
    pub backlog_bytes: u64,
}
