//! The cluster's folder: what a host must remember to be the same node after a restart.
//!
//! | file | content |
//! |---|---|
//! | `cluster.json` | name, own address; written last, so that its presence means "member" |
//! | `ca.pem`, `ca.key` | the cluster's CA; the key only where `init` ran |
//! | `node.pem`, `node.key`, `node.card` | this node's certificate, key (PKCS#8) and card |
//! | `gossip.keys` | the gossip keys, the one to send with first |
//! | `boot-epoch` | the last boot epoch used; never used twice, because keys and nonces hang on it |
//! | `peers.json` | members last seen alive, to rejoin through |
//! | `tokens.json` | hashes of the join tokens given out |
//!
//! Every file is 0600 in a 0700 folder, replaced as a whole (write, fsync, rename, fsync of the folder), and read up to
//! [`MAX_FILE`].

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::error::PeerError;

/// Longest file read, in bytes.
pub const MAX_FILE: u64 = 256 * 1024;

/// Names of the files.
pub mod file {
    /// The mark of membership.
    pub const CLUSTER: &str = "cluster.json";
    /// CA certificate.
    pub const CA_CERT: &str = "ca.pem";
    /// CA key.
    pub const CA_KEY: &str = "ca.key";
    /// Node certificate.
    pub const NODE_CERT: &str = "node.pem";
    /// Node key.
    pub const NODE_KEY: &str = "node.key";
    /// Node card.
    pub const NODE_CARD: &str = "node.card";
    /// Gossip keys.
    pub const GOSSIP_KEYS: &str = "gossip.keys";
    /// Last boot epoch.
    pub const BOOT_EPOCH: &str = "boot-epoch";
    /// Last known members.
    pub const PEERS: &str = "peers.json";
    /// Tokens given out.
    pub const TOKENS: &str = "tokens.json";
}

/// The folder.
#[derive(Clone, Debug)]
pub struct Store {
    dir: PathBuf,
}

impl Store {
    /// Makes the folder if it is missing.
    ///
    /// # Errors
    /// [`PeerError::Store`].
    pub fn open(dir: &Path) -> Result<Self, PeerError> {
        let made = DirBuilder::new().mode(0o700).recursive(true).create(dir);
        made.map_err(|error| store_error(dir, error))?;
        Ok(Self { dir: dir.to_owned() })
    }

    /// The whole file; `None` if there is none.
    ///
    /// # Errors
    /// [`PeerError::Store`], also if it is longer than [`MAX_FILE`] or not UTF-8.
    pub fn read(&self, name: &str) -> Result<Option<String>, PeerError> {
        let path = self.dir.join(name);
        let file = match File::open(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            other => other.map_err(|error| store_error(&path, error))?,
        };
        let mut text = String::new();
        let read =
            file.take(MAX_FILE + 1).read_to_string(&mut text).map_err(|error| store_error(&path, error))?;
        if read as u64 > MAX_FILE {
            return Err(store_error(&path, format!("longer than {MAX_FILE} bytes")));
        }
        Ok(Some(text))
    }

    /// A file that must be there.
    ///
    /// # Errors
    /// [`PeerError::Store`].
    pub fn need(&self, name: &str) -> Result<String, PeerError> {
        self.read(name)?
            .ok_or_else(|| store_error(&self.dir.join(name), "missing, but cluster.json is there"))
    }

    /// A JSON file; `None` if there is none.
    ///
    /// # Errors
    /// [`PeerError::Store`].
    pub fn read_json<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, PeerError> {
        let Some(text) = self.read(name)? else { return Ok(None) };
        serde_json::from_str(&text).map(Some).map_err(|error| self.corrupt(name, error))
    }

    /// Replaces a file durably.
    ///
    /// # Errors
    /// [`PeerError::Store`]; then the old file stands.
    pub fn write(&self, name: &str, content: &str) -> Result<(), PeerError> {
        let (path, temporary) = (self.dir.join(name), self.dir.join(format!(".{name}.new")));
        let replace = || -> std::io::Result<()> {
            match fs::remove_file(&temporary) {
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
            file.write_all(content.as_bytes())?;
            file.sync_all()?;
            fs::rename(&temporary, &path)?;
            File::open(&self.dir)?.sync_all()
        };
        replace().map_err(|error| store_error(&path, error))
    }

    /// Removes a file if it is there.
    ///
    /// # Errors
    /// [`PeerError::Store`].
    pub fn remove(&self, name: &str) -> Result<(), PeerError> {
        let path = self.dir.join(name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(store_error(&path, error)),
            _ => Ok(()),
        }
    }

    /// Replaces a JSON file durably.
    ///
    /// # Errors
    /// [`PeerError::Store`].
    pub fn write_json<T: Serialize>(&self, name: &str, value: &T) -> Result<(), PeerError> {
        let text = serde_json::to_string_pretty(value).map_err(|error| self.corrupt(name, error))?;
        self.write(name, &text)
    }

    /// A boot epoch never used before: after the last one, and not before the clock, so that a folder restored from a backup
    /// does not repeat one. `unix_now` in seconds.
    ///
    /// # Errors
    /// [`PeerError::Store`].
    pub fn next_boot_epoch(&self, unix_now: u64) -> Result<u64, PeerError> {
        let last: u64 = match self.read(file::BOOT_EPOCH)? {
            None => 0,
            Some(text) => text.trim().parse().map_err(|error| self.corrupt(file::BOOT_EPOCH, error))?,
        };
        let next =
            unix_now.max(last.checked_add(1).ok_or_else(|| self.corrupt(file::BOOT_EPOCH, "used up"))?);
        self.write(file::BOOT_EPOCH, &format!("{next}\n"))?;
        Ok(next)
    }

    /// A file that does not mean what it should.
    pub fn corrupt(&self, name: &str, reason: impl std::fmt::Display) -> PeerError {
        store_error(&self.dir.join(name), reason)
    }
}

fn store_error(path: &Path, reason: impl std::fmt::Display) -> PeerError {
    PeerError::Store { path: path.to_owned(), reason: reason.to_string() }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn files_are_replaced_and_private() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/cluster");
        let store = Store::open(&path).unwrap();
        assert_eq!(store.read("x").unwrap(), None);
        store.write("x", "one").unwrap();
        fs::write(path.join(".x.new"), "left by a crash").unwrap();
        store.write("x", "two").unwrap();
        assert_eq!(store.read("x").unwrap().as_deref(), Some("two"));
        assert_eq!(fs::metadata(path.join("x")).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
        assert_eq!(fs::read_dir(&path).unwrap().count(), 1);
    }

    #[test]
    fn boot_epochs_never_repeat() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let epochs: Vec<u64> =
            [100, 100, 50, 200].iter().map(|now| store.next_boot_epoch(*now).unwrap()).collect();
        assert_eq!(epochs, [100, 101, 102, 200]);
        store.write(file::BOOT_EPOCH, "junk").unwrap();
        let text = store.next_boot_epoch(1).unwrap_err().to_string();
        assert!(text.contains("boot-epoch"), "{text}");
    }

    #[test]
    fn a_file_without_end_is_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        store.write("x", &"y".repeat(MAX_FILE as usize + 1)).unwrap();
        assert!(store.read("x").unwrap_err().to_string().contains("262144 bytes"));
    }
}
