//! This workspace: where it is, its release binaries, and how they get into a test host.
//!
//! The tree is laid out by `systemd/install`, as the package would, and finished inside the host by
//! `systemd/postinst`; this module only carries it there.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::channel::Channel;
use crate::hosts::capture;

/// The target of the static guest.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// The root of the workspace.
pub fn root() -> PathBuf {
    std::env::var_os("LATHE_TESTHOST_ROOT").map(PathBuf::from).unwrap_or_else(|| {
        Path::new(env!("CARGO_MANIFEST_DIR")).parent().map_or_else(|| PathBuf::from("."), Path::to_owned)
    })
}

fn target_directory() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// Builds the release binaries and lays the installed tree out in `stage`. Returns whether there was one to lay out.
///
/// # Errors
/// A build or the installation fails.
pub fn stage(stage: &Path) -> Result<bool> {
    let installer = root().join("systemd/install");
    if !installer.exists() {
        eprintln!("testhost: systemd/install does not exist yet, the hosts come up without Lathe");
        return Ok(false);
    }
    eprintln!("testhost: building the release binaries");
    cargo(&["build", "--release", "-p", "lathe-agent", "-p", "lathe-vmm"], false)?;
    cargo(&["build", "--release", "--target", TARGET, "-p", "lathe-guest"], true)?;
    let binaries = stage.join("bin");
    for built in [target_directory().join("release"), target_directory().join(TARGET).join("release")] {
        copy_programs(&built, &binaries)?;
    }
    let tree = stage.join("tree");
    let status = Command::new(&installer)
        .args(["--destdir".as_ref(), tree.as_os_str(), "--bindir".as_ref(), binaries.as_os_str()])
        .stdin(Stdio::null())
        .stdout(io::stderr().as_fd().try_clone_to_owned()?)
        .status()
        .context("cannot run systemd/install")?;
    if !status.success() {
        bail!("systemd/install failed ({status})");
    }
    fs::remove_dir_all(&binaries)?;
    let finish = root().join("systemd/postinst");
    fs::copy(&finish, stage.join("postinst")).with_context(|| format!("cannot copy {}", finish.display()))?;
    Ok(true)
}

/// cargo as a shell would start it: what an outer cargo says of its own package would make build scripts run again.
pub fn cargo_command() -> Command {
    let mut command = Command::new("cargo");
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy();
        if ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_", "CARGO_CRATE_"]
            .iter()
            .any(|own| name.starts_with(own))
        {
            command.env_remove(name.as_ref());
        }
    }
    command
}

fn cargo(arguments: &[&str], linked_statically: bool) -> Result<()> {
    let mut command = cargo_command();
    command.args(arguments).current_dir(root()).stdin(Stdio::null());
    command.stdout(io::stderr().as_fd().try_clone_to_owned()?);
    if linked_statically {
        command.env("RUSTFLAGS", "-C target-feature=+crt-static");
    }
    let status = command.status().context("cannot run cargo")?;
    if !status.success() {
        bail!("cargo {} failed ({status})", arguments.join(" "));
    }
    Ok(())
}

/// Copies the programs that cargo put at the top of a target folder.
fn copy_programs(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from).with_context(|| format!("cannot read {}", from.display()))?.flatten() {
        let metadata = entry.metadata()?;
        let program = metadata.is_file()
            && metadata.permissions().mode() & 0o111 != 0
            && !entry.file_name().to_string_lossy().contains('.');
        if program {
            fs::copy(entry.path(), to.join(entry.file_name()))?;
        }
    }
    Ok(())
}

/// What guests reach of a test host, TCP: where scenarios listen.
pub const HOST_PORTS: std::ops::RangeInclusive<u16> = 5300..=5331;

/// Puts the tree from the payload in place inside a host and finishes the installation as the package would.
///
/// # Errors
/// A step fails; the message carries what it said.
pub fn install(channel: &Channel) -> Result<()> {
    let services: Vec<_> = HOST_PORTS.map(|port| format!("\"tcp/{port}\"")).collect();
    let script = format!(
        "set -e; cd /run/lathe-test; tar -C tree -c . | tar -C / -x --keep-directory-symlink; rm -rf tree
         mkdir -p /etc/lathe/lathe.d; echo '[network]\nhost_services = [{}]' >/etc/lathe/lathe.d/40-services.toml
         sh ./postinst configure",
        services.join(", ")
    );
    let (status, output) = capture(channel, &["sh", "-c", &script], Duration::from_secs(180))?;
    if status != 0 {
        bail!("installing Lathe failed ({status}): {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
