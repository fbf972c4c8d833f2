//! Sealing and opening of datagrams.
//!
//! ```text
//!  0        1          5            21             29          37
//!  | version | key id   | sender     | boot epoch   | counter   | ChaCha20-Poly1305 ciphertext, 16 bytes of tag
//!  | u8 = 1  | [u8; 4]  | [u8; 16]   | u64 BE       | u64 BE    |
//! ```
//! The key is HKDF-SHA256 (RFC 5869) of the gossip key, with sender and boot epoch as info; the nonce is the counter. So no two
//! datagrams of a cluster share key and nonce as long as **no node uses a boot epoch twice**, and there is no limit by the birthday of random nonces.
//! The whole header is associated data (RFC 8439). Whatever does not open costs one derivation and
//! one tag check, changes nothing and is only counted.

use std::collections::HashMap;
use std::fmt;

use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use ring::hkdf::{HKDF_SHA256, Prk, Salt};

use crate::card::NodeId;

/// Longest datagram sent or heard, in bytes: fits an Ethernet frame with room for tunnels.
pub const MAX_DATAGRAM: usize = 1_400;
/// Bytes added by sealing.
pub const OVERHEAD: usize = HEADER + TAG;
/// Keys accepted at once while they are being changed.
pub const MAX_KEYS: usize = 4;

const VERSION: u8 = 1;
const HEADER: usize = 37;
const TAG: usize = 16;
const WINDOW_WORDS: usize = 16;
const WINDOW_BITS: u64 = 64 * WINDOW_WORDS as u64;
/// Senders whose windows are kept; only holders of the key get in. The one unheard for longest goes first.
const MAX_SENDERS: usize = 4_096;

/// A cluster's gossip key, 256 bit. Debug shows its identifier only.
#[derive(Clone, PartialEq, Eq)]
pub struct GossipKey([u8; 32]);

impl GossipKey {
    /// Takes 256 random bits.
    pub fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The secret itself, for storing and for the join answer.
    pub fn secret_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Names the key in headers and logs; tells nothing about it.
    pub fn id(&self) -> [u8; 4] {
        let mut id = [0; 4];
        let extracted = self.prk();
        if let Ok(okm) = extracted.expand(&[b"key id"], Len(4)) {
            // Four bytes were asked for and four are given.
            let _ = okm.fill(&mut id);
        }
        id
    }

    fn prk(&self) -> Prk {
        Salt::new(HKDF_SHA256, b"lathe gossip 1").extract(&self.0)
    }
}

impl fmt::Debug for GossipKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d] = self.id();
        write!(f, "GossipKey({a:02x}{b:02x}{c:02x}{d:02x})")
    }
}

struct Len(usize);

impl ring::hkdf::KeyType for Len {
    fn len(&self) -> usize {
        self.0
    }
}

/// The keys in use: one to send with, up to [`MAX_KEYS`] to hear with. To change a key: add the new one to `accepted` everywhere, then
/// make it `sending` everywhere, then drop the old one everywhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keyring {
    sending: GossipKey,
    accepted: Vec<GossipKey>,
}

impl Keyring {
    /// One key for both directions.
    pub fn new(key: GossipKey) -> Self {
        Self { accepted: vec![key.clone()], sending: key }
    }

    /// Hears `key` too. Returns false, changing nothing, if [`MAX_KEYS`] are held already.
    pub fn accept(&mut self, key: GossipKey) -> bool {
        if self.accepted.contains(&key) {
            return true;
        }
        if self.accepted.len() == MAX_KEYS {
            return false;
        }
        self.accepted.push(key);
        true
    }

    /// The key to send with, then the others that are heard.
    pub fn keys(&self) -> impl Iterator<Item = &GossipKey> {
        std::iter::once(&self.sending).chain(self.accepted.iter().filter(|key| **key != self.sending))
    }
}

/// Why a datagram was not heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reject {
    /// Shorter than any, or longer than [`MAX_DATAGRAM`].
    Size,
    /// Of a format version that this node does not speak.
    Version,
    /// Under a key that is not accepted here.
    UnknownKey,
    /// Claims to come from this node itself.
    FromSelf,
    /// Heard before, or older than the window.
    Replay,
    /// The tag does not match.
    Forged,
}

/// An opened datagram.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Opened {
    pub(crate) sender: NodeId,
    pub(crate) boot_epoch: u64,
    pub(crate) plaintext: Vec<u8>,
}

/// Seals what this node sends.
pub(crate) struct Sealer {
    header: [u8; HEADER],
    key: LessSafeKey,
    counter: u64,
}

impl Sealer {
    pub(crate) fn new(keys: &Keyring, node: NodeId, boot_epoch: u64) -> Option<Self> {
        let mut header = [0; HEADER];
        header[0] = VERSION;
        header[1..5].copy_from_slice(&keys.sending.id());
        header[5..21].copy_from_slice(&node.0);
        header[21..29].copy_from_slice(&boot_epoch.to_be_bytes());
        Some(Self { header, key: sender_key(&keys.sending.prk(), node, boot_epoch)?, counter: 0 })
    }

    /// None if the plaintext is too long for a datagram, or after 2^64 datagrams.
    pub(crate) fn seal(&mut self, plaintext: &[u8]) -> Option<Vec<u8>> {
        if plaintext.len() + OVERHEAD > MAX_DATAGRAM {
            return None;
        }
        self.counter = self.counter.checked_add(1)?;
        self.header[29..].copy_from_slice(&self.counter.to_be_bytes());
        let mut body = plaintext.to_vec();
        self.key.seal_in_place_append_tag(nonce(self.counter), Aad::from(&self.header), &mut body).ok()?;
        let mut datagram = Vec::with_capacity(HEADER + body.len());
        datagram.extend_from_slice(&self.header);
        datagram.append(&mut body);
        Some(datagram)
    }
}

/// A first datagram of a member that seals what it likes. For tests of what hostile members can do.
#[doc(hidden)]
pub fn seal_for_tests(key: &GossipKey, sender: NodeId, boot_epoch: u64, plaintext: &[u8]) -> Vec<u8> {
    let sealer = Sealer::new(&Keyring::new(key.clone()), sender, boot_epoch);
    sealer.and_then(|mut sealer| sealer.seal(plaintext)).unwrap_or_default()
}

/// The plaintexts of recorded datagrams. For tests.
#[doc(hidden)]
pub fn open_all_for_tests(key: &GossipKey, datagrams: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
    let mut opener = Opener::new(&Keyring::new(key.clone()), NodeId([0; 16]));
    datagrams
        .iter()
        .filter_map(|datagram| opener.open(datagram).ok())
        .map(|opened| opened.plaintext)
        .collect()
}

/// Opens what this node hears.
pub(crate) struct Opener {
    me: NodeId,
    keys: Vec<([u8; 4], Prk)>,
    senders: HashMap<NodeId, Sender>,
    clock: u64,
}

struct Sender {
    boot_epoch: u64,
    key_id: [u8; 4],
    key: LessSafeKey,
    window: Window,
    /// Value of the opener's clock when last heard.
    heard: u64,
}

impl Opener {
    pub(crate) fn new(keys: &Keyring, me: NodeId) -> Self {
        let keys = keys.keys().map(|key| (key.id(), key.prk())).collect();
        Self { me, keys, senders: HashMap::new(), clock: 0 }
    }

    pub(crate) fn open(&mut self, datagram: &[u8]) -> Result<Opened, Reject> {
        if datagram.len() > MAX_DATAGRAM || datagram.len() <= OVERHEAD {
            return Err(Reject::Size);
        }
        let (header, body) = datagram.split_at(HEADER);
        if header[0] != VERSION {
            return Err(Reject::Version);
        }
        let key_id: [u8; 4] = array(header, 1);
        let prk = &self.keys.iter().find(|(id, _)| *id == key_id).ok_or(Reject::UnknownKey)?.1;
        let sender = NodeId(array(header, 5));
        let boot_epoch = u64::from_be_bytes(array(header, 21));
        let counter = u64::from_be_bytes(array(header, 29));
        if sender == self.me {
            return Err(Reject::FromSelf);
        }
        self.clock += 1;
        let known = self.senders.get_mut(&sender);
        if known.as_ref().is_some_and(|k| boot_epoch < k.boot_epoch) {
            return Err(Reject::Replay);
        }
        let mut body = body.to_vec();
        if let Some(known) = known.filter(|k| k.boot_epoch == boot_epoch && k.key_id == key_id) {
            if !known.window.is_new(counter) {
                return Err(Reject::Replay);
            }
            let plaintext = open_body(&known.key, counter, header, &mut body)?;
            known.window.mark(counter);
            known.heard = self.clock;
            return Ok(Opened { sender, boot_epoch, plaintext });
        }
        let key = sender_key(prk, sender, boot_epoch).ok_or(Reject::Forged)?;
        let plaintext = open_body(&key, counter, header, &mut body)?;
        self.remember(sender, boot_epoch, key_id, key, counter)?;
        Ok(Opened { sender, boot_epoch, plaintext })
    }

    /// A new life of a sender gets a new window; a new key within a life keeps it.
    fn remember(
        &mut self,
        sender: NodeId,
        boot_epoch: u64,
        key_id: [u8; 4],
        key: LessSafeKey,
        counter: u64,
    ) -> Result<(), Reject> {
        let mut window = match self.senders.remove(&sender) {
            Some(known) if known.boot_epoch == boot_epoch => known.window,
            _ => Window::default(),
        };
        let is_new = window.is_new(counter);
        window.mark(counter);
        if self.senders.len() >= MAX_SENDERS
            && let Some(oldest) = self.senders.iter().min_by_key(|(_, s)| s.heard).map(|(id, _)| *id)
        {
            self.senders.remove(&oldest);
        }
        self.senders.insert(sender, Sender { boot_epoch, key_id, key, window, heard: self.clock });
        if is_new { Ok(()) } else { Err(Reject::Replay) }
    }
}

fn sender_key(prk: &Prk, sender: NodeId, boot_epoch: u64) -> Option<LessSafeKey> {
    let epoch = boot_epoch.to_be_bytes();
    let info: [&[u8]; 3] = [b"datagram", &sender.0, &epoch];
    let okm = prk.expand(&info, &CHACHA20_POLY1305).ok()?;
    Some(LessSafeKey::new(UnboundKey::from(okm)))
}

fn open_body(key: &LessSafeKey, counter: u64, header: &[u8], body: &mut [u8]) -> Result<Vec<u8>, Reject> {
    let plain = key.open_in_place(nonce(counter), Aad::from(header), body).map_err(|_| Reject::Forged)?;
    Ok(plain.to_vec())
}

fn nonce(counter: u64) -> Nonce {
    let mut bytes = [0; 12];
    bytes[4..].copy_from_slice(&counter.to_be_bytes());
    Nonce::assume_unique_for_key(bytes)
}

/// `N` bytes of a header whose length was checked; zeros if it was not.
fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..at + N).and_then(|part| part.try_into().ok()).unwrap_or([0; N])
}

/// Which counters were heard, of the last 1,024 (the ring buffer of RFC 6479).
#[derive(Default)]
struct Window {
    highest: u64,
    seen: [u64; WINDOW_WORDS],
}

impl Window {
    fn is_new(&self, counter: u64) -> bool {
        if counter == 0 {
            return false;
        }
        if counter > self.highest {
            return true;
        }
        // One word is kept clear ahead of the highest, so the window is that much shorter.
        if self.highest - counter >= WINDOW_BITS - 64 {
            return false;
        }
        let (word, bit) = place(counter);
        self.seen[word] & bit == 0
    }

    fn mark(&mut self, counter: u64) {
        if counter > self.highest {
            let steps = (counter / 64 - self.highest / 64).min(WINDOW_WORDS as u64);
            for step in 1..=steps {
                self.seen[((self.highest / 64 + step) % WINDOW_WORDS as u64) as usize] = 0;
            }
            if steps == WINDOW_WORDS as u64 {
                self.seen = [0; WINDOW_WORDS];
            }
            self.highest = counter;
        }
        let (word, bit) = place(counter);
        self.seen[word] |= bit;
    }
}

fn place(counter: u64) -> (usize, u64) {
    ((counter / 64 % WINDOW_WORDS as u64) as usize, 1 << (counter % 64))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    fn ring(byte: u8) -> Keyring {
        Keyring::new(GossipKey::new([byte; 32]))
    }

    const A: NodeId = NodeId([1; 16]);
    const B: NodeId = NodeId([2; 16]);

    #[test]
    fn what_is_sealed_opens_once() {
        let mut sealer = Sealer::new(&ring(7), A, 5).unwrap();
        let mut opener = Opener::new(&ring(7), B);
        let datagram = sealer.seal(b"hello").unwrap();
        assert!(!datagram.windows(5).any(|part| part == b"hello"));
        let opened = opener.open(&datagram).unwrap();
        assert_eq!((opened.sender, opened.boot_epoch, &opened.plaintext[..]), (A, 5, &b"hello"[..]));
        assert_eq!(opener.open(&datagram), Err(Reject::Replay));
    }

    #[test]
    fn no_altered_datagram_opens() {
        let mut sealer = Sealer::new(&ring(7), A, 5).unwrap();
        let datagram = sealer.seal(b"hello").unwrap();
        let mut opener = Opener::new(&ring(7), B);
        for position in 0..datagram.len() {
            for bit in 0..8 {
                let mut altered = datagram.clone();
                altered[position] ^= 1 << bit;
                assert!(opener.open(&altered).is_err(), "byte {position} bit {bit}");
            }
        }
        assert!(opener.open(&datagram).is_ok(), "forgeries must not move the window");
    }

    #[test]
    fn keys_can_be_changed_without_a_gap() {
        let (old, new) = (GossipKey::new([1; 32]), GossipKey::new([2; 32]));
        let mut both = Keyring::new(old.clone());
        assert!(both.accept(new.clone()));
        let mut opener = Opener::new(&both, B);
        assert!(opener.open(&Sealer::new(&Keyring::new(old), A, 1).unwrap().seal(b"x").unwrap()).is_ok());
        let mut sealer = Sealer::new(&Keyring::new(new), A, 1).unwrap();
        assert_eq!(opener.open(&sealer.seal(b"x").unwrap()), Err(Reject::Replay), "same epoch and counter");
        assert!(opener.open(&sealer.seal(b"x").unwrap()).is_ok());
        assert_eq!(
            opener.open(&Sealer::new(&ring(9), A, 1).unwrap().seal(b"x").unwrap()),
            Err(Reject::UnknownKey)
        );
    }

    #[test]
    fn an_earlier_life_is_not_heard() {
        let mut opener = Opener::new(&ring(7), B);
        let mut old = Sealer::new(&ring(7), A, 5).unwrap();
        let mut new = Sealer::new(&ring(7), A, 6).unwrap();
        assert!(opener.open(&old.seal(b"x").unwrap()).is_ok());
        assert!(opener.open(&new.seal(b"x").unwrap()).is_ok());
        assert_eq!(opener.open(&old.seal(b"x").unwrap()), Err(Reject::Replay));
    }

    #[test]
    fn sizes_are_bounded_both_ways() {
        let mut sealer = Sealer::new(&ring(7), A, 5).unwrap();
        let largest = sealer.seal(&vec![0; MAX_DATAGRAM - OVERHEAD]).unwrap();
        assert_eq!(largest.len(), MAX_DATAGRAM);
        assert!(sealer.seal(&vec![0; MAX_DATAGRAM - OVERHEAD + 1]).is_none());
        let mut opener = Opener::new(&ring(7), B);
        for size in [0, 1, OVERHEAD, MAX_DATAGRAM + 1, 65_507] {
            assert_eq!(opener.open(&vec![VERSION; size]), Err(Reject::Size), "{size}");
        }
    }

    #[test]
    fn senders_remembered_are_bounded() {
        let mut opener = Opener::new(&ring(7), B);
        for number in 0..MAX_SENDERS as u64 + 10 {
            let mut id = [9; 16];
            id[..8].copy_from_slice(&number.to_be_bytes());
            opener.open(&Sealer::new(&ring(7), NodeId(id), 1).unwrap().seal(b"x").unwrap()).unwrap();
        }
        assert_eq!(opener.senders.len(), MAX_SENDERS);
    }

    proptest! {
        #[test]
        fn random_bytes_never_open(bytes in proptest::collection::vec(any::<u8>(), 0..1_600)) {
            prop_assert!(Opener::new(&ring(7), B).open(&bytes).is_err());
        }

        #[test]
        fn each_counter_is_new_at_most_once(counters in proptest::collection::vec(0u64..5_000, 1..400)) {
            let (mut window, mut heard) = (Window::default(), HashSet::new());
            let mut highest = 0;
            for counter in counters {
                let new = window.is_new(counter);
                let within = counter > highest || highest - counter < WINDOW_BITS - 64;
                prop_assert_eq!(new, counter > 0 && within && !heard.contains(&counter));
                if new {
                    window.mark(counter);
                    heard.insert(counter);
                    highest = highest.max(counter);
                }
            }
        }
    }
}
