//! Join tokens: one line that lets one host into the cluster, once.
//!
//! `lathe1.` and the URL-safe base64 of: postcard of addresses, server name, pin and secret; then 4 bytes of SHA-256 over that, which tell
//! a torn copy from a wrong token. The pin is the SHA-256 of the CA's certificate: whoever holds the token knows
//! the cluster, and nobody in between can pose as it. Of the secret (160 bit) the CA's host keeps only the hash.

use std::fmt;
use std::net::SocketAddr;

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use ring::digest::{SHA256, digest};
use serde::{Deserialize, Serialize};

use super::error::PeerError;
use super::store::{Store, file};

/// Tokens remembered at most.
pub const MAX_TOKENS: usize = 64;
/// Addresses in a token at most.
pub const MAX_ADDRESSES: usize = 4;

const PREFIX: &str = "lathe1.";
const MAX_TEXT: usize = 512;
const CHECK: usize = 4;

/// What a token says. Debug does not show the secret.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Token {
    /// Where the peer API of the CA's host is; tried in order.
    pub addresses: Vec<SocketAddr>,
    /// Node name of the CA's host.
    pub server: String,
    /// SHA-256 of the CA's certificate (DER).
    pub pin: [u8; 32],
    /// The one-time secret.
    pub secret: [u8; 20],
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token(for {} at {:?})", self.server, self.addresses)
    }
}

/// SHA-256.
pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut hash = [0; 32];
    hash.copy_from_slice(digest(&SHA256, bytes).as_ref());
    hash
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Token {
    /// The line.
    ///
    /// # Errors
    /// [`PeerError::Internal`] if it would be longer than what [`Token::parse`] takes.
    pub fn text(&self) -> Result<String, PeerError> {
        let mut bytes = postcard::to_stdvec(self).map_err(|error| PeerError::Internal(error.to_string()))?;
        let check = sha256(&bytes);
        bytes.extend_from_slice(&check[..CHECK]);
        let text = format!("{PREFIX}{}", BASE64_URL_SAFE_NO_PAD.encode(bytes));
        if text.len() > MAX_TEXT {
            return Err(PeerError::Internal(format!("token of {} characters", text.len())));
        }
        Ok(text)
    }

    /// Reads a line; blanks around and line breaks inside are forgiven.
    ///
    /// # Errors
    /// [`PeerError::TokenMalformed`].
    pub fn parse(text: &str) -> Result<Self, PeerError> {
        let bad = PeerError::TokenMalformed;
        let text: String = text.chars().filter(|c| !c.is_whitespace()).take(MAX_TEXT + 1).collect();
        if text.len() > MAX_TEXT {
            return Err(bad("too long"));
        }
        let code = text.strip_prefix(PREFIX).ok_or(bad("it does not start with \"lathe1.\""))?;
        let torn = bad("it is incomplete or altered; copy the whole line");
        let Ok(bytes) = BASE64_URL_SAFE_NO_PAD.decode(code) else { return Err(torn) };
        let Some(at) = bytes.len().checked_sub(CHECK) else { return Err(torn) };
        let (content, check) = bytes.split_at(at);
        if sha256(content)[..CHECK] != *check {
            return Err(torn);
        }
        match postcard::take_from_bytes::<Self>(content) {
            Ok((token, [])) if (1..=MAX_ADDRESSES).contains(&token.addresses.len()) => Ok(token),
            _ => Err(bad("made by another version of lathe")),
        }
    }
}

/// A token given out, as the CA's host remembers it.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Given {
    /// SHA-256 of the secret, hexadecimal.
    hash: String,
    /// Seconds since 1970.
    expires_unix: u64,
    used_by: Option<String>,
}

/// What the CA's host says to a secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Known, not used, not expired.
    Good,
    /// Never given out, or forgotten.
    Unknown,
    /// Expired.
    Expired,
    /// Used by the host of this name.
    Used(String),
}

/// The tokens given out by this host.
pub struct Tokens<'a> {
    store: &'a Store,
    given: Vec<Given>,
}

impl<'a> Tokens<'a> {
    /// Reads them.
    ///
    /// # Errors
    /// [`PeerError::Store`].
    pub fn load(store: &'a Store) -> Result<Self, PeerError> {
        Ok(Self { given: store.read_json(file::TOKENS)?.unwrap_or_default(), store })
    }

    /// Remembers a secret until `expires_unix`. Expired ones are forgotten after a day, and the oldest if there are too many.
    ///
    /// # Errors
    /// [`PeerError::Store`].
    pub fn give(&mut self, secret: &[u8], now_unix: u64, expires_unix: u64) -> Result<(), PeerError> {
        const DAY: u64 = 86_400;
        self.given.retain(|given| given.expires_unix.saturating_add(DAY) > now_unix);
        if self.given.len() >= MAX_TOKENS {
            self.given.remove(0);
        }
        self.given.push(Given { hash: hex(&sha256(secret)), expires_unix, used_by: None });
        self.store.write_json(file::TOKENS, &self.given)
    }

    /// What to say to a secret. Comparing hashes leaks nothing about a secret of 160 bit.
    pub fn verdict(&self, secret: &[u8], now_unix: u64) -> Verdict {
        let hash = hex(&sha256(secret));
        match self.given.iter().find(|given| given.hash == hash) {
            None => Verdict::Unknown,
            Some(Given { used_by: Some(name), .. }) => Verdict::Used(name.clone()),
            Some(given) if given.expires_unix <= now_unix => Verdict::Expired,
            Some(_) => Verdict::Good,
        }
    }

    /// Marks a secret as used, durably.
    ///
    /// # Errors
    /// [`PeerError::Store`].
    pub fn spend(&mut self, secret: &[u8], by: &str) -> Result<(), PeerError> {
        let hash = hex(&sha256(secret));
        if let Some(given) = self.given.iter_mut().find(|given| given.hash == hash) {
            given.used_by = Some(by.to_owned());
        }
        self.store.write_json(file::TOKENS, &self.given)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token() -> Token {
        Token {
            addresses: vec!["10.0.0.1:7946".parse().unwrap(), "[2001:db8::1]:7946".parse().unwrap()],
            server: "web-03".into(),
            pin: [7; 32],
            secret: [9; 20],
        }
    }

    #[test]
    fn a_token_survives_being_pasted() {
        let text = token().text().unwrap();
        assert_eq!(Token::parse(&text).unwrap(), token());
        let (left, right) = text.split_at(40);
        assert_eq!(Token::parse(&format!("  {left}\n{right}\n")).unwrap(), token());
        assert!(!format!("{:?}", token()).contains("9, 9"), "the secret is not shown");
    }

    #[test]
    fn what_is_no_token_is_told_so() {
        let text = token().text().unwrap();
        let mut altered = text.clone().into_bytes();
        altered[30] = if altered[30] == b'A' { b'B' } else { b'A' };
        let altered = String::from_utf8(altered).unwrap();
        let cases = [
            ("", "start with"),
            ("secret", "start with"),
            ("lathe1.", "incomplete"),
            ("lathe1.!!!!", "incomplete"),
            (&text[..text.len() - 3], "incomplete"),
            (&altered, "incomplete"),
            (&"x".repeat(10_000), "too long"),
        ];
        for (text, expected) in cases {
            let error = Token::parse(text).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn a_secret_is_good_once_and_in_time() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let mut tokens = Tokens::load(&store).unwrap();
        tokens.give(&[1; 20], 1_000, 2_000).unwrap();
        tokens.give(&[2; 20], 1_000, 2_000).unwrap();
        assert_eq!(tokens.verdict(&[3; 20], 1_500), Verdict::Unknown);
        assert_eq!(tokens.verdict(&[1; 20], 1_999), Verdict::Good);
        assert_eq!(tokens.verdict(&[1; 20], 2_000), Verdict::Expired);
        tokens.spend(&[1; 20], "db-02").unwrap();
        let again = Tokens::load(&store).unwrap();
        assert_eq!(again.verdict(&[1; 20], 1_500), Verdict::Used("db-02".into()));
        assert_eq!(again.verdict(&[2; 20], 1_500), Verdict::Good);
        assert!(
            !store.read(file::TOKENS).unwrap().unwrap().contains(&hex(&[2; 20])),
            "only hashes are stored"
        );
    }

    #[test]
    fn tokens_remembered_are_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let mut tokens = Tokens::load(&store).unwrap();
        for number in 0..=MAX_TOKENS as u8 {
            tokens.give(&[number; 20], 0, 10).unwrap();
        }
        assert_eq!(tokens.given.len(), MAX_TOKENS);
        assert_eq!(tokens.verdict(&[0; 20], 1), Verdict::Unknown);
    }
}
