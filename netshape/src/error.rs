//! What can go wrong on the network: what was tried on which interface, what the kernel said, what to check.

use std::io;

use crate::name::IfName;
use crate::tap::TapError;

/// Whether an operation had anything to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The kernel's state was changed.
    Changed,
    /// It was that way already.
    Unchanged,
}

/// An operation on links, addresses or queues that did not happen.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel refused.
    #[error("cannot {action} {link}; check: {check}")]
    Kernel {
        /// What was tried.
        action: &'static str,
        /// On which interface.
        link: String,
        /// What to look at.
        check: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// No netlink socket.
    #[error("cannot open a netlink socket")]
    Socket(#[source] io::Error),
    /// There is no such interface.
    #[error("there is no interface {0}")]
    NoLink(IfName),
    /// An interface of that name is of another kind: somebody else's.
    #[error("interface {link} exists but is a {kind}, not a {wanted}; check: rename or remove it")]
    Foreign {
        /// The interface.
        link: IfName,
        /// What it is.
        kind: String,
        /// What was needed.
        wanted: &'static str,
    },
    /// A value was accepted but is not what the kernel shows afterwards.
    #[error("{what} of {link} was set to {wrote}, the kernel shows {shows}")]
    ReadBack {
        /// What was written.
        what: &'static str,
        /// The interface.
        link: String,
        /// Written.
        wrote: String,
        /// Shown.
        shows: String,
    },
    /// No name for an interface.
    #[error("{0:?} is no interface name: 1 to 15 of A-Z a-z 0-9 . _ -, not `.` or `..`")]
    Name(String),
    /// No address with a prefix length.
    #[error("{0:?} is no address with a prefix length, as in 10.77.0.1/16 or fd77::1/64")]
    Prefix(String),
    /// No protocol with a port.
    #[error("{0:?} is no service: tcp/PORT or udp/PORT, ports 1 to 65535")]
    Service(String),
    /// A rate that cannot be enforced.
    #[error("a rate of {asked} bit/s is outside {least} to {most} bit/s")]
    Rate {
        /// Asked, bit/s.
        asked: u64,
        /// The least.
        least: u64,
        /// The most.
        most: u64,
    },
    /// More addresses than one tap may have.
    #[error("{link} may have {most} prefixes at most")]
    TooManyAddresses {
        /// The interface.
        link: IfName,
        /// So many.
        most: usize,
    },
    /// What is at the root of a link could not be put back later.
    #[error(
        "{link} has the queue {found}, which Lathe cannot put back later; check: tc qdisc show dev {link}, and remove it with tc qdisc del dev {link} root if nobody needs it"
    )]
    RootQueue {
        /// The link.
        link: IfName,
        /// Kind and handle of what is there.
        found: String,
    },
    /// No description of a root queue.
    #[error("{0:?} describes no root queue that can be put back")]
    RootQueueText(String),
    /// The uplink is not shared.
    #[error(
        "the uplink {0} is not shared; check: that sharing is enabled, and that nobody has replaced its root queue"
    )]
    NotShared(IfName),
    /// More is asked than there is.
    #[error("{asked} bit/s are asked of {link}, which has {capacity} bit/s")]
    Overbooked {
        /// The link.
        link: IfName,
        /// All rates together, bit/s.
        asked: u64,
        /// bit/s.
        capacity: u64,
    },
    /// A class that cannot be.
    #[error("class {class} of {link}: {wrong}")]
    UplinkClass {
        /// The link.
        link: IfName,
        /// The class.
        class: u16,
        /// What is wrong.
        wrong: &'static str,
    },
    /// The tap itself.
    #[error(transparent)]
    Tap(#[from] TapError),
}

/// What to check, by the kernel's answer.
pub(crate) fn check_for(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => "CAP_NET_ADMIN of this service",
        Some(libc::ENODEV) => "the interface was removed meanwhile",
        Some(libc::ENOENT | libc::EOPNOTSUPP) => {
            "kernel modules: bridge, tun, ifb, sch_htb, sch_fq_codel, sch_ingress, cls_u32, cls_bpf, act_mirred, act_skbedit"
        }
        Some(libc::EBUSY) => "another process holds it",
        Some(libc::EEXIST) => "the name is taken",
        Some(libc::ENOBUFS | libc::ENOMEM) => "memory of the host",
        _ => "the kernel log",
    }
}
