//! The configuration of lathed: `lathe.toml` and its drop-ins, merged the way systemd merges its own.
//!
//! ```text
//! /etc/lathe/lathe.toml  ──▶  {/usr/lib,/run,/etc}/lathe/lathe.d/*.toml in the order of their names  ──▶  Config
//!                              same name: /etc beats /run beats /usr/lib; a link to /dev/null masks
//! ```
//!
//! Each file is checked by itself, so that an error names file and line; an unknown key is an error, with the nearest
//! known one. Values are checked while they are read (`file`). It never guesses: a file that cannot be read or is
//! wrong stops lathed with exit status 78, before anything was touched.

mod file;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use lathe_netshape::{Prefix, Service};
use lathe_shard::{Bytes, MilliCpu};

use crate::foresight;

/// Exit status of lathed when its configuration is wrong (`EX_CONFIG` of sysexits.h).
pub const EXIT_CONFIG: u8 = 78;
/// Largest file that is read, in bytes.
const MAX_FILE_BYTES: u64 = 1024 * 1024;
/// Most drop-ins that are read.
const MAX_DROP_INS: usize = 1000;

/// Everything that can be configured, with defaults filled in.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// `[host]`.
    pub host: Host,
    /// `[api]`.
    pub api: Api,
    /// `[reserve]`.
    pub reserve: Reserve,
    /// `[overcommit]`.
    pub overcommit: Overcommit,
    /// `[network]`.
    pub network: Network,
    /// `[disks] allowed`: absolute.
    pub allowed_disks: Vec<PathBuf>,
    /// `[machines]`.
    pub machines: Machines,
    /// `[foresight]`.
    pub foresight: foresight::Settings,
    /// `[cluster]`.
    pub cluster: Cluster,
    /// `[log] level`.
    pub log_level: String,
}

/// Identity and places.
#[derive(Clone, Debug, PartialEq)]
pub struct Host {
    /// `None`: the host's own name.
    pub name: Option<String>,
    /// What must outlive a reboot.
    pub state_dir: PathBuf,
    /// Sockets.
    pub runtime_dir: PathBuf,
    /// Who starts monitors.
    pub launcher: Launcher,
    /// For [`Launcher::Direct`].
    pub direct_cgroup: Option<PathBuf>,
}

/// Who starts monitors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Launcher {
    /// systemd if it runs here, otherwise lathed itself.
    Auto,
    /// Units `lathe-vm@…`.
    Systemd,
    /// lathed itself, below a delegated cgroup.
    Direct,
}

/// The API's socket.
#[derive(Clone, Debug, PartialEq)]
pub struct Api {
    /// Used when systemd passes none.
    pub socket: PathBuf,
    /// Group that may change things.
    pub group: String,
    /// Group that may look.
    pub view_group: String,
}

/// Kept back for the host.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Reserve {
    /// CPUs.
    pub cpu: MilliCpu,
    /// Memory.
    pub memory: Bytes,
    /// Below the state directory.
    pub disk: Bytes,
}

/// How often the same shard may be promised to machines without a guarantee, in thousandths, 1000 to 16000.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Overcommit {
    /// CPU.
    pub cpu_permille: u32,
    /// Memory; suspended while any is guaranteed.
    pub memory_permille: u32,
    /// Disk; likewise.
    pub disk_permille: u32,
}

/// The machines' network.
#[derive(Clone, Debug, PartialEq)]
pub struct Network {
    /// `false`: machines have no network card.
    pub enabled: bool,
    /// Name of the bridge.
    pub bridge: String,
    /// The bridge's own address and its prefix.
    pub ipv4: Prefix,
    /// The same for IPv6.
    pub ipv6: Option<Prefix>,
    /// Machines reach beyond the host through its addresses.
    pub nat: bool,
    /// Machines cannot reach each other.
    pub isolated: bool,
    /// Machines send from their own addresses only.
    pub check_sources: bool,
    /// Machines reach nothing of the host but [`Self::host_services`].
    pub guard_host: bool,
    /// What they reach of it all the same; at most 64.
    pub host_services: Vec<Service>,
}

/// What machines are made with.
#[derive(Clone, Debug, PartialEq)]
pub struct Machines {
    /// `None`: the running host's own.
    pub kernel: Option<PathBuf>,
    /// Seconds after the power button when the host goes down, 1..=300.
    pub shutdown_timeout_sec: u32,
    /// lathe-vmm, for the direct launcher.
    pub monitor: PathBuf,
    /// lathe-guest, packed into the built-in guest.
    pub guest: PathBuf,
    /// Kernel modules.
    pub modules_root: PathBuf,
}

/// Peers.
#[derive(Clone, Debug, PartialEq)]
pub struct Cluster {
    /// UDP gossip and TCP peer API.
    pub listen: SocketAddr,
    /// What peers dial; `None`: found from the routing table.
    pub advertise: Option<IpAddr>,
    /// At most 32 bytes.
    pub region: String,
}

impl Default for Config {
    fn default() -> Self {
        file::File::default().merged()
    }
}

/// What is wrong with a configuration. The text is for the administrator.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file or folder cannot be read.
    #[error("{path}: {source}", path = path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// More than can be meant.
    #[error("{path}: {what}", path = path.display())]
    TooMuch {
        /// File or folder.
        path: PathBuf,
        /// Both numbers.
        what: String,
    },
    /// Something in a file is wrong.
    #[error("{path}:{line}: {message}", path = path.display())]
    Wrong {
        /// Which file.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// What.
        message: String,
    },
}

impl Config {
    /// Reads the configuration of this host; `root` is `/` except in tests.
    ///
    /// # Errors
    /// The first thing that is wrong, see [`ConfigError`]. That there is no file at all is no error.
    pub fn load(root: &Path) -> Result<Self, ConfigError> {
        let main = root.join("etc/lathe/lathe.toml");
        let mut merged = match read(&main)? {
            Some(text) => file::parse(&main, &text)?,
            None => file::File::default(),
        };
        for path in drop_ins(root)? {
            if let Some(text) = read(&path)? {
                merged = merged.overridden_by(file::parse(&path, &text)?);
            }
        }
        Ok(merged.merged())
    }

    /// Reads one file and nothing else.
    ///
    /// # Errors
    /// As [`Config::load`]; also when the file does not exist.
    pub fn load_file(path: &Path) -> Result<Self, ConfigError> {
        let missing = || ConfigError::Read { path: path.to_owned(), source: io::ErrorKind::NotFound.into() };
        let text = read(path)?.ok_or_else(missing)?;
        Ok(file::parse(path, &text)?.merged())
    }
}

/// The drop-ins that count, in order.
fn drop_ins(root: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    let mut found = BTreeMap::new();
    for folder in ["usr/lib/lathe/lathe.d", "run/lathe/lathe.d", "etc/lathe/lathe.d"] {
        let folder = root.join(folder);
        let failed = |source| ConfigError::Read { path: folder.clone(), source };
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(failed(error)),
        };
        for entry in entries {
            let entry = entry.map_err(failed)?;
            if entry.path().extension().is_some_and(|extension| extension == "toml") {
                found.insert(entry.file_name(), entry.path());
            }
            if found.len() > MAX_DROP_INS {
                let what = format!("more than {MAX_DROP_INS} drop-ins");
                return Err(ConfigError::TooMuch { path: folder, what });
            }
        }
    }
    let masked = |path: &PathBuf| fs::canonicalize(path).is_ok_and(|target| target == Path::new("/dev/null"));
    Ok(found.into_values().filter(|path| !masked(path)).collect())
}

/// A file's text; `None` when there is none.
fn read(path: &Path) -> Result<Option<String>, ConfigError> {
    let failed = |source| ConfigError::Read { path: path.to_owned(), source };
    let size = match fs::metadata(path) {
        Ok(metadata) => metadata.len(),
        Err(error) if error.kind() == io::ErrorKind::NotFound && fs::symlink_metadata(path).is_err() => {
            return Ok(None);
        }
        Err(error) => return Err(failed(error)),
    };
    if size > MAX_FILE_BYTES {
        let what = format!("{size} bytes, more than {MAX_FILE_BYTES}");
        return Err(ConfigError::TooMuch { path: path.to_owned(), what });
    }
    fs::read_to_string(path).map(Some).map_err(failed)
}

#[cfg(test)]
mod tests;
