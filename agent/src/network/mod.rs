//! Policy of the machines' network: which bridge, which addresses, isolation, NAT, rates. Mechanism is `lathe-netshape`.
//!
//! Everything here is idempotent: asked twice it changes nothing, and what an earlier lathed left is taken over.

pub mod allot;
pub mod ports;
pub mod uplinks;

use std::future::Future;
use std::os::fd::OwnedFd;
use std::time::Instant;

use lathe_netshape::{Prefix, Service};

use crate::launcher::Pending;
use crate::problem::Problem;

/// How machines are connected.
#[derive(Clone, Debug)]
pub struct NetworkConfig {
    /// The bridge, made when it is not there.
    pub bridge: String,
    /// The bridge's own IPv4 address and the prefix that machines get addresses from.
    pub ipv4: Prefix,
    /// The same for IPv6.
    pub ipv6: Option<Prefix>,
    /// Masquerade what leaves the prefix.
    pub nat: bool,
    /// Machines cannot talk to each other, only to the host and beyond.
    pub isolated: bool,
    /// Machines send from their own addresses only.
    pub check_sources: bool,
    /// Machines reach nothing of the host but [`Self::host_services`].
    pub guard_host: bool,
    /// What they reach of it all the same.
    pub host_services: Vec<Service>,
}

/// A machine's port as it is now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortState {
    /// bit/s towards the guest; `None` is unlimited.
    pub to_guest: Option<u64>,
    /// bit/s from the guest; `None` is unlimited.
    pub from_guest: Option<u64>,
}

/// Cumulative bytes of a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortBytes {
    /// Towards the guest.
    pub to_guest: u64,
    /// From the guest.
    pub from_guest: u64,
}

/// What the shaper of one direction has done; cumulative but for what says otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortQueue {
    /// L2 bytes sent, each segment with its own header.
    pub bytes: u64,
    /// How often a packet had to wait for the rate.
    pub overlimits: u64,
    /// Bytes that wait now.
    pub backlog_bytes: u64,
}

/// The shapers of a port; `None` where a direction is unlimited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortQueues {
    /// Towards the guest.
    pub to_guest: Option<PortQueue>,
    /// From the guest.
    pub from_guest: Option<PortQueue>,
}

/// A port whose rate was set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortLimited {
    /// What is in force.
    pub state: PortState,
    /// Since when it has been read back.
    pub since: Instant,
}

/// Boxes a future and says what failed.
fn boxed<'a, T: 'a>(
    work: impl Future<Output = Result<T, Problem>> + Send + 'a,
) -> Pending<'a, Result<T, Problem>> {
    Box::pin(work)
}

/// Ports of machines on the bridge.
pub trait Ports: Send + Sync {
    /// Makes the bridge and its NAT as configured.
    fn prepare(&self) -> Pending<'_, Result<(), Problem>>;
    /// Puts back what others take away of that, as long as it is polled.
    fn keep(&self) -> Pending<'_, ()>;
    /// Makes the port, or finds it, for a machine that has this MAC and these addresses (`10.77.0.5/16`); its queue, unless a running
    /// monitor holds it.
    fn ensure<'a>(
        &'a self,
        tap: &'a str,
        mac: [u8; 6],
        addresses: &'a [String],
    ) -> Pending<'a, Result<Option<OwnedFd>, Problem>>;
    /// Removes the port with all that belongs to it.
    fn remove<'a>(&'a self, tap: &'a str) -> Pending<'a, Result<(), Problem>>;
    /// Sets both directions to `bit_per_sec`, 0 is unlimited; says what is in force then.
    fn limit<'a>(&'a self, tap: &'a str, bit_per_sec: u64) -> Pending<'a, Result<PortLimited, Problem>>;
    /// What is in force.
    fn read<'a>(&'a self, tap: &'a str) -> Pending<'a, Result<PortState, Problem>>;
    /// What went through.
    fn bytes<'a>(&'a self, tap: &'a str) -> Pending<'a, Result<PortBytes, Problem>>;
    /// What its shapers have done; some ten questions to the kernel, so not for every port all the time.
    fn queues<'a>(&'a self, tap: &'a str) -> Pending<'a, Result<PortQueues, Problem>>;
    /// All ports of machines that there are, by tap.
    fn list(&self) -> Pending<'_, Result<Vec<String>, Problem>>;
}
