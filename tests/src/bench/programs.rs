//! The release binaries that benchmarks and scenarios of the monitor alone put into a host, without the rest of the package.

use std::path::PathBuf;
use std::process::Stdio;

use anyhow::{Context, Result, bail};

use crate::{cli, workspace};

/// The target of the static guest, as the package has it.
const STATIC_TARGET: &str = "x86_64-unknown-linux-gnu";

fn build(package: &str, program: &str, statically: bool) -> Result<PathBuf> {
    let mut command = workspace::cargo_command();
    command
        .args(["build", "--release", "--quiet", "-p", package, "--bin", program])
        .current_dir(workspace::root())
        .stdin(Stdio::null());
    let mut built =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace::root().join("target"), PathBuf::from);
    if statically {
        command.args(["--target", STATIC_TARGET]).env("RUSTFLAGS", "-C target-feature=+crt-static");
        built.push(STATIC_TARGET);
    }
    let status = command.status().context("cannot run cargo")?;
    if !status.success() {
        bail!("cargo build --release -p {package} --bin {program} failed ({status})");
    }
    Ok(built.join("release").join(program))
}

/// Builds `lathe-vmm` and returns where it is.
///
/// # Errors
/// It does not build.
pub fn monitor() -> Result<PathBuf> {
    build("lathe-vmm", "lathe-vmm", false)
}

/// Builds the static `lathe-guest` and returns where it is.
///
/// # Errors
/// It does not build.
pub fn guest() -> Result<PathBuf> {
    build("lathe-guest", "lathe-guest", true)
}

/// Builds the static `hand`, init of the guests whose shape is changed, and returns where it is.
///
/// # Errors
/// It does not build.
pub fn hand() -> Result<PathBuf> {
    build("lathe-tests", "hand", true)
}

/// Where a static program is that scenarios run inside guests, `hostile` or `inside`: they are built with the harness.
///
/// # Errors
/// The harness was not built by `tests/run`.
pub fn beside_harness(name: &str) -> Result<PathBuf> {
    let path = cli::own_program()?.with_file_name(name);
    anyhow::ensure!(path.exists(), "{} does not exist; tests/run builds it", path.display());
    Ok(path)
}
