//! What can go wrong between hosts, in words for the administrator.

use std::net::SocketAddr;
use std::path::PathBuf;

use lathe_gossip::CardError;
use thiserror::Error;

/// One problem between hosts. No variant holds a secret.
#[derive(Debug, Error)]
pub enum PeerError {
    /// Asked for something that only a member can do.
    #[error("this host is in no cluster")]
    NoCluster,
    /// Asked to make or join a cluster while in one.
    #[error("this host is in cluster {cluster} already")]
    AlreadyMember {
        /// Name of the cluster.
        cluster: String,
    },
    /// Tokens are made where the CA's key is.
    #[error(
        "the key of cluster {cluster}'s CA is not on this host, but on the one where `lathe cluster init` ran"
    )]
    NoCa {
        /// Name of the cluster.
        cluster: String,
    },
    /// The text is no token.
    #[error("this is not a join token: {0}")]
    TokenMalformed(&'static str),
    /// The other host knows no such token, or it was used.
    #[error("{address} does not accept the token: {reason}")]
    TokenRejected {
        /// The other host.
        address: SocketAddr,
        /// In its words.
        reason: String,
    },
    /// The token is too old.
    #[error("{address} does not accept the token: it has expired")]
    TokenExpired {
        /// The other host.
        address: SocketAddr,
    },
    /// Somebody else answers at that address, or stands between.
    #[error("{address} does not belong to the cluster of the token: its CA is another (pin {pin})")]
    PinMismatch {
        /// Who answered.
        address: SocketAddr,
        /// First 16 hex digits of the expected SHA-256.
        pin: String,
    },
    /// Names are unique within a cluster.
    #[error("the cluster has a living host called {0} already")]
    NameTaken(String),
    /// The host's name cannot name a node.
    #[error("{0}")]
    NameInvalid(#[from] CardError),
    /// No connection, or it broke.
    #[error("cannot reach {address}: {reason}")]
    Unreachable {
        /// The other host.
        address: SocketAddr,
        /// Why.
        reason: String,
    },
    /// A file of the cluster's folder cannot be read, written or understood.
    #[error("{}: {reason}", path.display())]
    Store {
        /// Which.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The port is taken, or the address is not this host's.
    #[error("cannot listen on {address} (TCP and UDP): {reason}")]
    Bind {
        /// Where.
        address: SocketAddr,
        /// Why.
        reason: String,
    },
    /// The other side says what this version does not understand.
    #[error("{address} answers what this version does not understand: {what}")]
    Protocol {
        /// The other host.
        address: SocketAddr,
        /// What was wrong.
        what: String,
    },
    /// No address that others could dial.
    #[error("no address found that peers could reach this host at: {0}")]
    NoAddress(String),
    /// No peer with this name is alive.
    #[error("no living peer is called {0}")]
    UnknownPeer(String),
    /// The runtime was shut down.
    #[error("the peer runtime has ended")]
    Stopped,
    /// A library refused what it never should.
    #[error("internal: {0}")]
    Internal(String),
}

impl PeerError {
    /// Stable, for `error[code]`.
    pub fn code(&self) -> &'static str {
        match self {
            Self::NoCluster => "peer-no-cluster",
            Self::AlreadyMember { .. } => "peer-already-member",
            Self::NoCa { .. } => "peer-no-ca",
            Self::TokenMalformed(_) => "peer-token-malformed",
            Self::TokenRejected { .. } => "peer-token-rejected",
            Self::TokenExpired { .. } => "peer-token-expired",
            Self::PinMismatch { .. } => "peer-pin-mismatch",
            Self::NameTaken(_) => "peer-name-taken",
            Self::NameInvalid(_) => "peer-name-invalid",
            Self::Unreachable { .. } => "peer-unreachable",
            Self::Store { .. } => "peer-store",
            Self::Bind { .. } => "peer-bind",
            Self::Protocol { .. } => "peer-protocol",
            Self::NoAddress(_) => "peer-no-address",
            Self::UnknownPeer(_) => "peer-unknown",
            Self::Stopped => "peer-stopped",
            Self::Internal(_) => "internal",
        }
    }

    /// A command that helps, where there is one.
    pub fn fix(&self) -> Option<String> {
        let fix = match self {
            Self::NoCluster => {
                "lathe cluster init        or on this host, with a token of another: lathe cluster join -"
            }
            Self::TokenMalformed(_) | Self::TokenRejected { .. } | Self::TokenExpired { .. } => {
                "make a new token on the other host: lathe cluster token"
            }
            Self::PinMismatch { .. } => {
                "check the address, then make a new token on the right host: lathe cluster token"
            }
            Self::NameTaken(_) => "sudo hostnamectl hostname NEW-NAME && sudo systemctl restart lathed",
            Self::NameInvalid(_) => {
                "sudo hostnamectl hostname NAME (a-z, 0-9, '-') && sudo systemctl restart lathed"
            }
            Self::Unreachable { address, .. } => {
                return Some(format!(
                    "allow {}/tcp and {}/udp there, and check that lathed runs",
                    address.port(),
                    address.port()
                ));
            }
            Self::Bind { address, .. } => {
                return Some(format!("see who has it: ss -lntup 'sport = :{}'", address.port()));
            }
            Self::NoAddress(_) => "lathe cluster init --address IP:PORT",
            Self::UnknownPeer(_) => "lathe peers",
            _ => return None,
        };
        Some(fix.to_owned())
    }
}
