//! Membership, failure detection and shard adverts, sans I/O.
//!
//! One [`Node`] per host says who is alive and what each of them has to spare. It owns no socket, no clock, no
//! thread and no source of randomness: datagrams, the time and a seed come in, datagrams, timers and events go out, so
//! hundreds of nodes can be run in virtual time (`tests/simulation.rs`).
//!
//! ```text
//!   datagram ──► seal::Opener ──► node: inspect ──► foca (SWIM) ──► Event, Send, SetTimer
//!                key, replay        bounds, src        │
//!                                                      └─ custom broadcasts ──► advert::AdvertBook (card and signature)
//! ```
//! | module | what it holds |
//! |---|---|
//! | [`card`] | node keys, node identifiers, the card by which the cluster's CA vouches for a node |
//! | [`seal`] | gossip keys, sealing and opening of datagrams, replay windows |
//! | [`advert`] | the signed statement of what a host has to spare, and the book of those heard |
//! | [`node`] | the state machine that joins them |
//!
//! What is gossiped is a hint. Nothing here grants anything: the owner of a host decides (see the market).
//!
//! # What is protected, and what is not
//! - **A stranger** (no gossip key) is not heard: every datagram is ChaCha20-Poly1305 under a key derived from the
//!   cluster's gossip key, the sender's node identifier and its boot epoch; header in the associated data. Strangers see
//!   sizes, timing, addresses, and the pseudonymous node identifiers in the headers.
//! - **A recorded datagram** sent again is dropped: per sender a window of 1,024 counters within the newest boot epoch
//!   heard, older epochs are refused. A receiver that restarts forgets its windows, but membership messages
//!   name the receiver's own boot epoch and are then refused for that reason. The one exception is `Announce` (the first message
//!   of a joiner, which cannot know it): replayed to a restarted receiver it can make a dead node seem alive until
//!   the next probe fails, some seconds, and costs one answer to that node's address.
//! - **A member** (holder of the key) cannot forge or alter another's advert: it is signed with the node's Ed25519 key, which the CA
//!   vouches for, and the newest (boot epoch, counter) wins. It can hand an old advert to a node that has not
//!   yet heard a newer one; adverts carry the time of measurement for that.
//! - **A member can lie about membership**: claim that another is dead (the victim refutes it by a new incarnation), or invent
//!   identities (bounded by [`node::MAX_MEMBERS`]; without a card they never have an advert). SWIM has no defence, so nothing
//!   that costs money or data may rest on "alive" alone.
//! - **An expelled member** keeps hearing until the gossip key is changed ([`Keyring`] accepts several, sends with one). There is no
//!   forward secrecy: who steals the key reads what was recorded under it.

#![forbid(unsafe_code)]

pub mod advert;
pub mod card;
mod exchange;
mod identity;
mod interface;
pub mod node;
pub mod seal;

pub use advert::{Advert, Amounts};
pub use card::{CaPublicKey, CardError, NodeCard, NodeId, SecretKey};
pub use interface::{
    Event, LocalAdvert, NodeConfig, NodeError, Output, PeerState, PeerView, Seed, Stats, Timer, Timing,
};
pub use node::Node;
pub use seal::{GossipKey, Keyring, MAX_DATAGRAM};
