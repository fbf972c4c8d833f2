//! Node keys and cards: how the cluster's CA vouches for a node in 200 bytes.
//!
//! A node has one Ed25519 key (RFC 8032), the one in its TLS certificate. Its identifier is the first half of the SHA-256 of
//! the public key, so it cannot be chosen freely. The card binds a name to that key under the CA's signature; it
//! travels inside adverts because a certificate would fill half a datagram. Every signature starts with a label of its own, so that none
//! can be taken for another or for one of TLS.

use std::fmt;
use std::str::FromStr;

use ring::digest;
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Longest node name, in bytes: that of a DNS label.
pub const MAX_NAME: usize = 63;
/// Longest encoded card, in bytes.
pub const MAX_CARD: usize = 200;

const CARD_LABEL: &[u8] = b"lathe node card 1\0";

/// What can be wrong with a card or a key.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum CardError {
    /// The name is empty, too long, or has characters outside `a-z 0-9 - .`.
    #[error(
        "node name {0:?} is not 1 to {MAX_NAME} characters of a-z, 0-9, '-' and '.', starting and ending with a letter or digit"
    )]
    Name(String),
    /// The bytes do not decode.
    #[error("node card of {0} bytes cannot be decoded")]
    Malformed(usize),
    /// The CA did not sign this.
    #[error("node card is not signed by this cluster's CA")]
    Signature,
    /// The private key is not PKCS#8 Ed25519.
    #[error("private key is not an Ed25519 key in PKCS#8")]
    Key,
}

/// Identifies a node for ever: the first 128 bit of the SHA-256 of its public key.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct NodeId(pub [u8; 16]);

impl NodeId {
    /// The identifier of the node with this public key.
    pub fn of(public_key: &[u8; 32]) -> Self {
        let hash = digest::digest(&digest::SHA256, public_key);
        let mut id = [0; 16];
        id.copy_from_slice(&hash.as_ref()[..16]);
        Self(id)
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl FromStr for NodeId {
    type Err = CardError;

    /// Reads 32 hexadecimal digits.
    fn from_str(text: &str) -> Result<Self, CardError> {
        let malformed = || CardError::Malformed(text.len());
        if text.len() != 32 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(malformed());
        }
        u128::from_str_radix(text, 16).map(|number| Self(number.to_be_bytes())).map_err(|_| malformed())
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// An Ed25519 signature in two halves, because serde stops at arrays of 32.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct Signature([u8; 32], [u8; 32]);

impl Signature {
    /// Length in bytes, encoded and not.
    pub(crate) const LEN: usize = 64;

    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (low, high) = bytes.split_at_checked(32)?;
        Some(Self(low.try_into().ok()?, high.try_into().ok()?))
    }

    pub(crate) fn to_bytes(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[..32].copy_from_slice(&self.0);
        bytes[32..].copy_from_slice(&self.1);
        bytes
    }
}

/// A private Ed25519 key: of a node, or of the CA. Debug shows the public half only.
pub struct SecretKey {
    pair: Ed25519KeyPair,
    public: [u8; 32],
}

impl SecretKey {
    /// Reads a PKCS#8 document (version 1 or 2).
    ///
    /// # Errors
    /// [`CardError::Key`] for anything else.
    pub fn from_pkcs8(der: &[u8]) -> Result<Self, CardError> {
        Self::new(Ed25519KeyPair::from_pkcs8_maybe_unchecked(der).map_err(|_| CardError::Key)?)
    }

    /// The key of a 256 bit seed (RFC 8032 section 5.1.5).
    ///
    /// # Errors
    /// Never for 32 bytes with the present `ring`; [`CardError::Key`] should it refuse.
    pub fn from_seed(seed: &[u8; 32]) -> Result<Self, CardError> {
        Self::new(Ed25519KeyPair::from_seed_unchecked(seed).map_err(|_| CardError::Key)?)
    }

    fn new(pair: Ed25519KeyPair) -> Result<Self, CardError> {
        let public = pair.public_key().as_ref().try_into().map_err(|_| CardError::Key)?;
        Ok(Self { pair, public })
    }

    /// The public half.
    pub fn public_key(&self) -> [u8; 32] {
        self.public
    }

    pub(crate) fn sign(&self, label: &[u8], message: &[u8]) -> Signature {
        let signature = self.pair.sign(&[label, message].concat());
        Signature::from_bytes(signature.as_ref()).unwrap_or(Signature([0; 32], [0; 32]))
    }
}

impl fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SecretKey(of {})", NodeId::of(&self.public))
    }
}

pub(crate) fn verify(public_key: &[u8; 32], label: &[u8], message: &[u8], signature: &Signature) -> bool {
    UnparsedPublicKey::new(&ED25519, public_key)
        .verify(&[label, message].concat(), &signature.to_bytes())
        .is_ok()
}

/// The public key of the cluster's CA.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CaPublicKey(pub [u8; 32]);

/// The CA's statement "the node with this key is called so".
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct NodeCard {
    name: String,
    public_key: [u8; 32],
    signature: Signature,
}

impl NodeCard {
    /// Makes a card; only the holder of the CA's key can.
    ///
    /// # Errors
    /// [`CardError::Name`] if the name is not one.
    pub fn issue(name: &str, public_key: [u8; 32], ca: &SecretKey) -> Result<Self, CardError> {
        check_name(name)?;
        let signature = ca.sign(CARD_LABEL, &signed_part(name, &public_key));
        Ok(Self { name: name.to_owned(), public_key, signature })
    }

    /// Checks the name and the CA's signature.
    ///
    /// # Errors
    /// [`CardError::Name`] or [`CardError::Signature`].
    pub fn check(&self, ca: &CaPublicKey) -> Result<(), CardError> {
        check_name(&self.name)?;
        if !verify(&ca.0, CARD_LABEL, &signed_part(&self.name, &self.public_key), &self.signature) {
            return Err(CardError::Signature);
        }
        Ok(())
    }

    /// The node's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The node's public key.
    pub fn public_key(&self) -> &[u8; 32] {
        &self.public_key
    }

    /// The node's identifier.
    pub fn id(&self) -> NodeId {
        NodeId::of(&self.public_key)
    }

    /// The bytes for storing and for the join answer.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = signed_part(&self.name, &self.public_key);
        bytes.extend_from_slice(&self.signature.to_bytes());
        bytes
    }

    /// The reverse of [`NodeCard::encode`]; does not check the signature.
    ///
    /// # Errors
    /// [`CardError::Malformed`].
    pub fn decode(bytes: &[u8]) -> Result<Self, CardError> {
        if bytes.len() > MAX_CARD {
            return Err(CardError::Malformed(bytes.len()));
        }
        match postcard::take_from_bytes(bytes) {
            Ok((card, [])) => Ok(card),
            _ => Err(CardError::Malformed(bytes.len())),
        }
    }
}

/// Whether this can name a node: 1 to 63 of `a-z 0-9 - .`, starting and ending with a letter or digit.
///
/// # Errors
/// [`CardError::Name`] if not.
pub fn check_name(name: &str) -> Result<(), CardError> {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let bytes = name.as_bytes();
    let ends = bytes.first().is_some_and(|b| plain(*b)) && bytes.last().is_some_and(|b| plain(*b));
    let inner = bytes.iter().all(|b| plain(*b) || matches!(b, b'-' | b'.'));
    if !ends || !inner || bytes.len() > MAX_NAME || name.contains("..") {
        return Err(CardError::Name(name.chars().take(2 * MAX_NAME).collect()));
    }
    Ok(())
}

/// Length-prefixed name and key: the same bytes as postcard makes of these two fields (names are under 128 bytes).
fn signed_part(name: &str, public_key: &[u8; 32]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(MAX_CARD);
    bytes.push(u8::try_from(name.len()).unwrap_or(u8::MAX));
    bytes.extend_from_slice(name.as_bytes());
    bytes.extend_from_slice(public_key);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_card_survives_encoding_and_is_checked() {
        let ca = SecretKey::from_seed(&[1; 32]).unwrap();
        let node = SecretKey::from_seed(&[2; 32]).unwrap();
        let card = NodeCard::issue(&"n".repeat(MAX_NAME), node.public_key(), &ca).unwrap();
        let bytes = card.encode();
        assert!(bytes.len() <= MAX_CARD);
        assert_eq!(NodeCard::decode(&bytes).unwrap(), card);
        assert_eq!(postcard::to_stdvec(&card).unwrap(), bytes);
        assert_eq!(card.check(&CaPublicKey(ca.public_key())), Ok(()));
        assert_eq!(card.check(&CaPublicKey(node.public_key())), Err(CardError::Signature));
    }

    #[test]
    fn a_card_of_another_name_or_key_is_refused() {
        let ca = SecretKey::from_seed(&[1; 32]).unwrap();
        let node = SecretKey::from_seed(&[2; 32]).unwrap();
        let bytes = NodeCard::issue("web-03", node.public_key(), &ca).unwrap().encode();
        for position in 1..bytes.len() {
            let mut altered = bytes.clone();
            altered[position] ^= 1;
            let accepted =
                NodeCard::decode(&altered).is_ok_and(|c| c.check(&CaPublicKey(ca.public_key())).is_ok());
            assert!(!accepted, "byte {position} altered and still accepted");
        }
    }

    #[test]
    fn identifiers_are_written_and_read() {
        let id = NodeId::of(&[3; 32]);
        assert_eq!(id.to_string().parse(), Ok(id));
        for bad in ["", "12", &"g".repeat(32), &format!("+{}", "1".repeat(31)), &"0".repeat(33)] {
            assert!(bad.parse::<NodeId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn names_are_those_of_hosts() {
        for good in ["a", "web-03", "db.example.org", &"x".repeat(63)] {
            assert_eq!(check_name(good), Ok(()), "{good}");
        }
        for bad in ["", "-a", "a-", "a..b", "Web", "a b", "a/b", "ä", &"x".repeat(64)] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }
}
