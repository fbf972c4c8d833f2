//! Where sets of hosts keep their sockets and logs, and where failures are saved.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// The longest name of a set: the paths of its sockets must fit into 108 bytes.
const MAX_NAME: usize = 24;

/// The folder of all sets of this user.
pub fn runtime_directory() -> PathBuf {
    match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(directory) => PathBuf::from(directory).join("lathe-testhost"),
        None => PathBuf::from(format!("/tmp/lathe-testhost-{}", nix::unistd::getuid())),
    }
}

/// The folder of the set that is called `name`.
///
/// # Errors
/// The name is no plain word.
pub fn named(name: &str) -> Result<PathBuf> {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if name.is_empty() || name.len() > MAX_NAME || !name.chars().all(plain) || name.starts_with("run-") {
        bail!(
            "{name:?} is no name for hosts: up to {MAX_NAME} letters, digits, - and _, not beginning with run-"
        );
    }
    Ok(runtime_directory().join(name))
}

/// Makes a fresh folder for hosts that end with this process, after removing what dead processes left.
///
/// # Errors
/// The runtime directory cannot be written.
pub fn own() -> Result<PathBuf> {
    let base = runtime_directory();
    fs::create_dir_all(&base).with_context(|| format!("cannot make {}", base.display()))?;
    for entry in fs::read_dir(&base)?.flatten() {
        if owner_of(&entry.path()).is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists()) {
            // Another process may be removing it as well.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    for attempt in 1..u32::MAX {
        let directory = base.join(format!("run-{}-{attempt}", std::process::id()));
        match fs::create_dir(&directory) {
            Ok(()) => return Ok(directory),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error).with_context(|| format!("cannot make {}", directory.display())),
        }
    }
    bail!("no free name in {}", base.display())
}

/// The process that owns a folder made by [`own`].
fn owner_of(directory: &Path) -> Option<u32> {
    directory.file_name()?.to_str()?.strip_prefix("run-")?.split('-').next()?.parse().ok()
}

/// A fresh folder for what a failure leaves behind.
pub fn failures() -> PathBuf {
    let since = std::time::UNIX_EPOCH.elapsed().unwrap_or_default().as_secs();
    PathBuf::from(format!("/var/tmp/lathe-testhost-failure-{since}-{}", std::process::id()))
}
