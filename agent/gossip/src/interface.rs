//! What goes into a [`Node`](crate::Node) and what comes out: configuration, outputs, views.

use std::net::SocketAddr;
use std::num::{NonZeroU32, NonZeroUsize};
use std::time::Duration;

use serde::Serialize;
use thiserror::Error;

use crate::advert::{Advert, Amounts};
use crate::card::{CaPublicKey, CardError, NodeCard, NodeId, SecretKey};
use crate::identity::Identity;
use crate::seal::{Keyring, MAX_DATAGRAM, OVERHEAD};

/// How fast things go. `Default` suits a LAN; all nodes of a cluster should agree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// One member is probed per period. Default 1 s.
    pub probe_period: Duration,
    /// An answer later than this is asked for through others. Default 500 ms; less than the period.
    pub probe_rtt: Duration,
    /// Housekeeping: joining, adverts, repair. Default 1 s.
    pub tick: Duration,
    /// An advert is said again after this, or later in clusters of more than 100 nodes. Default 20 s.
    pub readvertise: Duration,
    /// Announcements to the dead, so that partitions heal. Default 5 s.
    pub announce_to_dead: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            probe_period: Duration::from_secs(1),
            probe_rtt: Duration::from_millis(500),
            tick: Duration::from_secs(1),
            readvertise: Duration::from_secs(20),
            announce_to_dead: Duration::from_secs(5),
        }
    }
}

impl Timing {
    /// Ten times faster than the default: for tests over a loopback.
    pub fn fast() -> Self {
        let slow = Self::default();
        Self {
            probe_period: slow.probe_period / 10,
            probe_rtt: slow.probe_rtt / 10,
            tick: slow.tick / 10,
            readvertise: slow.readvertise / 10,
            announce_to_dead: slow.announce_to_dead / 10,
        }
    }

    pub(crate) fn foca(&self, members: usize) -> foca::Config {
        let size = u32::try_from(members + 1).ok().and_then(NonZeroU32::new).unwrap_or(NonZeroU32::MIN);
        let lan = foca::Config::new_lan(size);
        let scale = self.probe_period.as_secs_f64() / lan.probe_period.as_secs_f64();
        let periodic = |frequency, count: usize| {
            NonZeroUsize::new(count).map(|num_members| foca::PeriodicParams { frequency, num_members })
        };
        foca::Config {
            probe_period: self.probe_period,
            probe_rtt: self.probe_rtt,
            suspect_to_down_after: lan.suspect_to_down_after.mul_f64(scale),
            max_packet_size: NonZeroUsize::new(MAX_DATAGRAM - OVERHEAD - 1).unwrap_or(NonZeroUsize::MIN),
            notify_down_members: true,
            periodic_announce: periodic(self.probe_period * 10, 1),
            periodic_announce_to_down_members: periodic(self.announce_to_dead, 2),
            periodic_gossip: periodic(self.probe_period / 5, 3),
            ..lan
        }
    }

    /// Least time between two adverts of a node that differ.
    pub(crate) fn advert_pause(&self, members: usize) -> Duration {
        self.tick * u32::try_from(members / 100 + 1).unwrap_or(u32::MAX)
    }

    pub(crate) fn readvertise_every(&self, members: usize) -> Duration {
        self.readvertise * u32::try_from(members / 100 + 1).unwrap_or(u32::MAX)
    }
}

/// What a node is made of.
#[derive(Debug)]
pub struct NodeConfig {
    /// This node's card.
    pub card: NodeCard,
    /// The key that the card names.
    pub secret: SecretKey,
    /// The cluster's CA.
    pub ca: CaPublicKey,
    /// The cluster's gossip keys.
    pub keys: Keyring,
    /// Where the others reach this node by UDP.
    pub address: SocketAddr,
    /// Must be greater at each start, for ever: keys and nonces hang on it.
    pub boot_epoch: u64,
    /// How fast things go.
    pub timing: Timing,
}

/// Why a node cannot be made.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum NodeError {
    /// The card is not this cluster's.
    #[error("{0}")]
    Card(#[from] CardError),
    /// The private key belongs to another card.
    #[error("node key belongs to {key}, but the card to {card}")]
    KeyMismatch {
        /// Identifier of the key.
        key: NodeId,
        /// Identifier on the card.
        card: NodeId,
    },
    /// Nobody could reach this.
    #[error("{0} is not an address that others can send to")]
    Address(SocketAddr),
    /// The cryptographic library refused.
    #[error("gossip keys cannot be derived")]
    Keys,
}

/// What this host says of itself. Signed and numbered by the node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalAdvert {
    /// Where the peer API listens (TCP).
    pub api: SocketAddr,
    /// At most 32 bytes.
    pub region: String,
    /// At most 32 bytes.
    pub version: String,
    /// When measured, ms since 1970. Does not count as a change.
    pub measured_unix_ms: u64,
    /// All there is.
    pub capacity: Amounts,
    /// Capacity − reserved − granted.
    pub free: Amounts,
}

impl LocalAdvert {
    pub(crate) fn says_the_same(&self, other: &Self) -> bool {
        let same_time = Self { measured_unix_ms: other.measured_unix_ms, ..self.clone() };
        same_time == *other
    }
}

/// A node to join through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seed {
    /// Its identifier.
    pub id: NodeId,
    /// Where it is, or was.
    pub address: SocketAddr,
}

/// To be handed back by [`Node::handle_timer`](crate::Node::handle_timer) when its time has come.
#[derive(Clone, Debug)]
pub struct Timer(pub(crate) TimerKind);

impl Timer {
    /// Whether only the forgetting of a dead member hangs on it: a driver that holds too many timers may drop these, and no others.
    pub fn is_cleanup(&self) -> bool {
        matches!(&self.0, TimerKind::Foca(timer) if matches!(**timer, foca::Timer::RemoveDown(_)))
    }
}

#[derive(Clone, Debug)]
pub(crate) enum TimerKind {
    Tick,
    Foca(Box<foca::Timer<Identity>>),
}

/// What the driver shall do.
#[derive(Clone, Debug)]
pub enum Output {
    /// Send this datagram.
    Send {
        /// To whom.
        to: SocketAddr,
        /// At most [`MAX_DATAGRAM`] bytes.
        bytes: Vec<u8>,
    },
    /// Call [`Node::handle_timer`](crate::Node::handle_timer) later.
    SetTimer {
        /// How much later.
        after: Duration,
        /// With this.
        timer: Timer,
    },
    /// Something changed.
    Event(Event),
}

/// What changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A member joined or came back.
    PeerUp(NodeId),
    /// A member does not answer; it has some seconds to object. Noticed once per tick.
    PeerSuspect(NodeId),
    /// A member is counted dead, or left.
    PeerDown(NodeId),
    /// A member's advert is new.
    AdvertUpdated(NodeId),
}

/// What is thought of a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerState {
    /// Answers, or nobody complained.
    Alive,
    /// Did not answer.
    Suspect,
    /// Did not answer for long, or left.
    Dead,
}

/// What is known of a peer.
#[derive(Clone, Debug)]
pub struct PeerView {
    /// Its identifier.
    pub id: NodeId,
    /// Its name, once its card was heard.
    pub name: Option<String>,
    /// Its gossip address (UDP).
    pub address: SocketAddr,
    /// What is thought of it.
    pub state: PeerState,
    /// How long ago a datagram came from it directly.
    pub last_heard: Option<Duration>,
    /// Round trip, smoothed over some probes.
    pub rtt: Option<Duration>,
    /// Its newest advert and how long ago that was heard.
    pub advert: Option<(Advert, Duration)>,
}

/// Counters since the start.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq, Serialize)]
pub struct Stats {
    /// Datagrams sent.
    pub sent: u64,
    /// Bytes in them.
    pub sent_bytes: u64,
    /// Datagrams heard.
    pub heard: u64,
    /// Dropped: too short or too long.
    pub bad_size: u64,
    /// Dropped: another format version, or a key unknown here.
    pub unknown_key: u64,
    /// Dropped: the tag does not match.
    pub forged: u64,
    /// Dropped: heard before, from an earlier life, or our own.
    pub replayed: u64,
    /// Dropped: opened, but makes no sense (a member with a fault, or hostile).
    pub malformed: u64,
    /// Dropped: names more than [`MAX_MEMBERS`](crate::node::MAX_MEMBERS) nodes.
    pub over_capacity: u64,
}
