//! What hosts say to each other over the peer API, as JSON.

use std::net::SocketAddr;

use lathe_gossip::Amounts;
use serde::{Deserialize, Serialize};

use super::membership::Issued;

/// Version of these types.
pub const SCHEMA: u32 = 1;
/// Longest body either way, in bytes.
pub const MAX_BODY: usize = 32 * 1024;

/// `POST /v1/join`.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JoinAsk {
    /// Always 1.
    pub schema: u32,
    /// The joiner's name.
    pub name: String,
    /// Certificate request (PKCS#10), PEM.
    pub request: String,
    /// The token's secret, base64.
    pub secret: String,
}

/// The answer to [`JoinAsk`]. Holds secrets: no Debug.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JoinAnswer {
    /// Always 1.
    pub schema: u32,
    /// Certificates, card, keys.
    pub issued: Issued,
    /// Members to gossip with first.
    pub seeds: Vec<KnownPeer>,
}

/// A member, as remembered and as handed to joiners.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KnownPeer {
    /// Node identifier, 32 hex digits.
    pub id: String,
    /// Name, if its card was heard.
    pub name: String,
    /// Gossip address (UDP).
    pub address: SocketAddr,
}

/// `GET /v1/host`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostInfo {
    /// Always 1.
    pub schema: u32,
    /// Node name.
    pub name: String,
    /// Version of lathed.
    pub version: String,
    /// Region, may be empty.
    pub region: String,
    /// All there is.
    pub capacity: Amounts,
    /// Capacity − reserved − granted.
    pub free: Amounts,
}

/// Any refusal.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Refusal {
    /// What was refused and why.
    pub error: RefusalBody,
}

/// Inside [`Refusal`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RefusalBody {
    /// Stable code.
    pub code: String,
    /// A sentence.
    pub message: String,
}
