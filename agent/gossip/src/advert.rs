//! Adverts: what a host has to spare, said and signed by itself.
//!
//! `version (u8 = 1) | postcard(card, advert) | Ed25519 signature over everything before it`, at most [`MAX_ADVERT`] bytes. The newest
//! (boot epoch, counter) of a node wins; anything else is dropped before its signature costs anything.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::card::{self, CaPublicKey, CardError, NodeCard, NodeId, SecretKey, Signature};
use crate::identity::Identity;

/// Longest encoded advert, in bytes.
pub const MAX_ADVERT: usize = 512;
/// Longest region and version, in bytes each.
pub const MAX_WORD: usize = 32;

const VERSION: u8 = 1;
const LABEL: &[u8] = b"lathe advert 1\0";

/// Amounts of what is traded most, in the smallest units.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Amounts {
    /// Thousandths of a CPU.
    pub cpu_milli: u64,
    /// Memory, bytes.
    pub memory_bytes: u64,
    /// Network, bit/s at L2, the smaller of the two directions.
    pub net_bit_s: u64,
    /// Disk space, bytes.
    pub disk_bytes: u64,
}

/// What a node says of itself. Its name and key are on the card beside it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Advert {
    /// Which life of the node said this.
    pub boot_epoch: u64,
    /// Rises with every advert within a life.
    pub counter: u64,
    /// Where the node's peer API listens (TCP).
    pub api: SocketAddr,
    /// Region, as configured; at most [`MAX_WORD`] bytes, may be empty.
    pub region: String,
    /// Version of lathed, at most [`MAX_WORD`] bytes.
    pub version: String,
    /// When the amounts were measured, by the node's own clock, in ms since 1970.
    pub measured_unix_ms: u64,
    /// All there is.
    pub capacity: Amounts,
    /// Capacity − reserved − granted.
    pub free: Amounts,
}

impl Advert {
    fn order(&self) -> (u64, u64) {
        (self.boot_epoch, self.counter)
    }
}

/// Why an advert was not taken.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum AdvertError {
    /// Too long, too short, another version, or does not decode.
    #[error("advert of {0} bytes cannot be decoded")]
    Malformed(usize),
    /// A word is too long.
    #[error("advert of {0}: region or version longer than {MAX_WORD} bytes")]
    Word(String),
    /// The CA does not vouch for the sender.
    #[error("advert: {0}")]
    Card(#[from] CardError),
    /// The node did not sign this.
    #[error("advert of {0} is not signed by its key")]
    Signature(String),
    /// As many nodes as are kept are known.
    #[error("advert of {0}: {1} nodes are known already")]
    Full(String, usize),
}

/// Signs and encodes.
///
/// # Errors
/// [`AdvertError::Word`], or [`AdvertError::Malformed`] if it comes out longer than [`MAX_ADVERT`].
pub fn encode(card: &NodeCard, advert: &Advert, key: &SecretKey) -> Result<Vec<u8>, AdvertError> {
    check_words(card, advert)?;
    let mut bytes = vec![VERSION];
    bytes = postcard::to_extend(&(card, advert), bytes).map_err(|_| AdvertError::Malformed(0))?;
    let signature = key.sign(LABEL, &bytes);
    bytes.extend_from_slice(&signature.to_bytes());
    if bytes.len() > MAX_ADVERT { Err(AdvertError::Malformed(bytes.len())) } else { Ok(bytes) }
}

fn check_words(card: &NodeCard, advert: &Advert) -> Result<(), AdvertError> {
    if advert.region.len() > MAX_WORD || advert.version.len() > MAX_WORD {
        return Err(AdvertError::Word(card.name().to_owned()));
    }
    Ok(())
}

/// Splits an encoded advert into its parts without checking signatures.
fn decode(bytes: &[u8]) -> Result<(NodeCard, Advert, &[u8], Signature), AdvertError> {
    let malformed = || AdvertError::Malformed(bytes.len());
    if bytes.len() > MAX_ADVERT || bytes.first() != Some(&VERSION) {
        return Err(malformed());
    }
    let at = bytes.len().checked_sub(Signature::LEN).filter(|at| *at > 1).ok_or_else(malformed)?;
    let (signed, signature) = bytes.split_at(at);
    let signature = Signature::from_bytes(signature).ok_or_else(malformed)?;
    match postcard::take_from_bytes(&signed[1..]) {
        Ok(((card, advert), [])) => Ok((card, advert, signed, signature)),
        _ => Err(malformed()),
    }
}

/// An advert that was heard and checked.
#[derive(Clone, Debug)]
pub(crate) struct Heard {
    pub(crate) card: NodeCard,
    pub(crate) advert: Advert,
    /// Time of the node that heard it.
    pub(crate) at: Duration,
}

/// The newest advert of each node.
pub(crate) struct AdvertBook {
    ca: CaPublicKey,
    me: NodeId,
    limit: usize,
    now: Duration,
    heard: HashMap<NodeId, Heard>,
    updated: Vec<NodeId>,
}

/// What became of an advert.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    New(AdvertKey),
    /// The same or a newer one is known, or it is this node's own.
    Known,
}

impl AdvertBook {
    pub(crate) fn new(ca: CaPublicKey, me: NodeId, limit: usize) -> Self {
        Self { ca, me, limit, now: Duration::ZERO, heard: HashMap::new(), updated: Vec::new() }
    }

    pub(crate) fn set_time(&mut self, now: Duration) {
        self.now = now;
    }

    pub(crate) fn get(&self, id: &NodeId) -> Option<&Heard> {
        self.heard.get(id)
    }

    /// Nodes whose advert changed since the last call.
    pub(crate) fn take_updated(&mut self) -> Vec<NodeId> {
        std::mem::take(&mut self.updated)
    }

    pub(crate) fn retain(&mut self, keep: impl Fn(&NodeId) -> bool) {
        self.heard.retain(|id, _| keep(id));
    }

    pub(crate) fn take(&mut self, bytes: &[u8]) -> Result<Taken, AdvertError> {
        let (card, advert, signed, signature) = decode(bytes)?;
        let id = card.id();
        let known = self.heard.get(&id);
        if id == self.me || known.is_some_and(|k| k.advert.order() >= advert.order()) {
            return Ok(Taken::Known);
        }
        check_words(&card, &advert)?;
        if known.is_none_or(|k| k.card != card) {
            card.check(&self.ca)?;
        }
        if !card::verify(card.public_key(), LABEL, signed, &signature) {
            return Err(AdvertError::Signature(card.name().to_owned()));
        }
        if known.is_none() && self.heard.len() >= self.limit {
            return Err(AdvertError::Full(card.name().to_owned(), self.limit));
        }
        let key = AdvertKey { id, order: advert.order() };
        self.heard.insert(id, Heard { card, advert, at: self.now });
        self.updated.push(id);
        Ok(Taken::New(key))
    }
}

/// Replaces older broadcasts of the same node in foca's queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AdvertKey {
    id: NodeId,
    order: (u64, u64),
}

impl foca::Invalidates for AdvertKey {
    fn invalidates(&self, other: &Self) -> bool {
        self.id == other.id && self.order >= other.order
    }
}

/// foca's view of the book. The lock is never contended: node and handler run in one call.
#[derive(Clone)]
pub(crate) struct SharedBook(Arc<Mutex<AdvertBook>>);

impl SharedBook {
    pub(crate) fn new(book: AdvertBook) -> Self {
        Self(Arc::new(Mutex::new(book)))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, AdvertBook> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl foca::BroadcastHandler<Identity> for SharedBook {
    type Key = AdvertKey;
    type Error = AdvertError;

    fn receive_item(
        &mut self,
        data: &[u8],
        sender: Option<&Identity>,
    ) -> Result<Option<AdvertKey>, AdvertError> {
        // Without a sender it is this node's own, just made.
        if sender.is_none() {
            let (card, advert, ..) = decode(data)?;
            return Ok(Some(AdvertKey { id: card.id(), order: advert.order() }));
        }
        match self.lock().take(data)? {
            Taken::New(key) => Ok(Some(key)),
            Taken::Known => Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    struct World {
        ca: SecretKey,
        key: SecretKey,
        card: NodeCard,
        book: AdvertBook,
    }

    fn world() -> World {
        let ca = SecretKey::from_seed(&[1; 32]).unwrap();
        let key = SecretKey::from_seed(&[2; 32]).unwrap();
        let card = NodeCard::issue("web-03", key.public_key(), &ca).unwrap();
        let book = AdvertBook::new(CaPublicKey(ca.public_key()), NodeId([0; 16]), 2);
        World { ca, key, card, book }
    }

    fn advert(boot_epoch: u64, counter: u64) -> Advert {
        Advert {
            boot_epoch,
            counter,
            api: "[2001:db8::1]:7946".parse().unwrap(),
            region: "r".repeat(MAX_WORD),
            version: "v".repeat(MAX_WORD),
            measured_unix_ms: u64::MAX,
            capacity: Amounts {
                cpu_milli: u64::MAX,
                memory_bytes: u64::MAX,
                net_bit_s: u64::MAX,
                disk_bytes: u64::MAX,
            },
            free: Amounts {
                cpu_milli: u64::MAX,
                memory_bytes: u64::MAX,
                net_bit_s: u64::MAX,
                disk_bytes: u64::MAX,
            },
        }
    }

    #[test]
    fn the_longest_advert_fits() {
        let World { ca, key, mut book, .. } = world();
        let card = NodeCard::issue(&"n".repeat(card::MAX_NAME), key.public_key(), &ca).unwrap();
        let bytes = encode(&card, &advert(u64::MAX, u64::MAX), &key).unwrap();
        assert!(bytes.len() <= MAX_ADVERT, "{}", bytes.len());
        assert!(matches!(book.take(&bytes), Ok(Taken::New(_))));
    }

    #[test]
    fn only_newer_ones_are_taken() {
        let World { key, card, mut book, .. } = world();
        let mut take =
            |epoch, counter| book.take(&encode(&card, &advert(epoch, counter), &key).unwrap()).unwrap();
        assert!(matches!(take(5, 2), Taken::New(_)));
        for (epoch, counter) in [(5, 2), (5, 1), (4, 9)] {
            assert_eq!(take(epoch, counter), Taken::Known);
        }
        assert!(matches!(take(5, 3), Taken::New(_)));
        assert!(matches!(take(6, 1), Taken::New(_)));
    }

    #[test]
    fn forgeries_are_refused() {
        let World { key, card, mut book, .. } = world();
        let other = SecretKey::from_seed(&[3; 32]).unwrap();
        let by_another = encode(&card, &advert(1, 1), &other).unwrap();
        assert_eq!(book.take(&by_another), Err(AdvertError::Signature("web-03".into())));
        let own_ca = NodeCard::issue("web-03", key.public_key(), &other).unwrap();
        let uncertified = encode(&own_ca, &advert(1, 1), &key).unwrap();
        assert_eq!(book.take(&uncertified), Err(AdvertError::Card(CardError::Signature)));
        let good = encode(&card, &advert(1, 1), &key).unwrap();
        for position in 0..good.len() {
            let mut altered = good.clone();
            altered[position] ^= 0x10;
            assert!(!matches!(book.take(&altered), Ok(Taken::New(_))), "byte {position}");
        }
        assert!(book.get(&card.id()).is_none());
    }

    #[test]
    fn nodes_remembered_are_bounded() {
        let World { ca, mut book, .. } = world();
        let results: Vec<_> = (10..14u8)
            .map(|seed| {
                let key = SecretKey::from_seed(&[seed; 32]).unwrap();
                let card = NodeCard::issue("x", key.public_key(), &ca).unwrap();
                book.take(&encode(&card, &advert(1, 1), &key).unwrap()).is_ok()
            })
            .collect();
        assert_eq!(results, [true, true, false, false]);
    }

    proptest! {
        #[test]
        fn random_bytes_are_never_taken(mut bytes in proptest::collection::vec(any::<u8>(), 0..700), version in any::<bool>()) {
            if version && !bytes.is_empty() {
                bytes[0] = VERSION;
            }
            prop_assert!(world().book.take(&bytes).is_err());
        }
    }
}
