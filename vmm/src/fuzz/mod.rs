//! Fuzz targets for everything that a hostile guest or a user of the control socket can reach.
//!
//! A target takes any bytes, reads them as a sequence of deeds (`source`) and panics when something does not hold that must.
//! For all devices that is: no panic, an end after a bounded number of rounds, no chain given back that was not offered, nothing
//! written beside guest memory (`arena`). Those of their own:
//!
//! | target | what is driven | what must hold |
//! |---|---|---|
//! | `block` | disk on io_uring, rates | the file keeps its length, and its content if it is read-only |
//! | `net` | network card, tap | |
//! | `vsock` | socket device, clients, listener | bounds of connections and buffers, each listed once |
//! | `rng` | entropy device | |
//! | `balloon` | balloon, statistics, reporting | no page is thrown away that was not named |
//! | `mem` | virtio-mem, a host that fails | what is reported is mapped, for devices and the guest; the limit |
//! | `ports` | all I/O ports, the host's changes | vCPU 0 stays, what the guest has runs; a reset resets |
//! | `pci` | ECAM, BARs, MSI-X, virtio's registers, real devices, watchdog | no vector fires unrouted; notifications end with a reset |
//! | `control` | control messages with descriptors | every message is answered, within the protocol's bounds |
//! | `image` | bzImage, ELF, initial RAM disk | an entry inside of what is loaded; low memory untouched |
//! | `frames` | frames of the guest agent | what is read is what was sent |
//!
//! Two ways to run them:
//!
//! - Tests of this crate replay the corpus in `vmm/fuzz/corpus` and try some mutations of it, others each time. `LATHE_FUZZ_ROUNDS` says
//!   how many, `LATHE_FUZZ_SEED` repeats a run, `LATHE_FUZZ_INPUT` (hexadecimal) tries one input alone.
//! - cargo-fuzz searches by coverage, for as long as it is let. With a stable toolchain, from `vmm`:
//!   `RUSTC_BOOTSTRAP=1 cargo fuzz run TARGET`. What it finds is mended, and the input committed to the corpus
//!   (`cargo fuzz cmin TARGET` keeps that small: at most 200 files of at most 4 KiB).
//!
//! No target needs `/dev/kvm`.

#![allow(clippy::unwrap_used, reason = "whatever fails here is a finding")]
#![allow(clippy::expect_used, reason = "likewise")]

mod arena;
mod board;
mod devices;
mod hostile;
mod net;
mod parsers;
mod source;
#[cfg(test)]
mod tests;

use std::fs::File;

/// A target.
#[derive(Clone, Copy)]
pub struct Target {
    /// Its name, as that of the file in `vmm/fuzz/fuzz_targets` and the folder in `vmm/fuzz/corpus`.
    pub name: &'static str,
    /// Takes an input; panics if it is a finding.
    pub run: fn(&[u8]),
}

/// All targets.
pub const TARGETS: [Target; 11] = [
    Target { name: "block", run: devices::block },
    Target { name: "net", run: net::net },
    Target { name: "vsock", run: net::vsock },
    Target { name: "rng", run: devices::rng },
    Target { name: "balloon", run: devices::balloon },
    Target { name: "mem", run: devices::mem },
    Target { name: "ports", run: board::ports },
    Target { name: "pci", run: board::pci },
    Target { name: "control", run: parsers::control },
    Target { name: "image", run: parsers::image },
    Target { name: "frames", run: parsers::frames },
];

/// Runs one input of the target `name`.
///
/// # Panics
/// When the input is a finding, or there is no such target.
pub fn run(name: &str, data: &[u8]) {
    let target = TARGETS.iter().find(|target| target.name == name).expect("a target of this name");
    (target.run)(data);
}

/// A file in memory.
fn memfd() -> File {
    let name = c"lathe-fuzz";
    File::from(nix::sys::memfd::memfd_create(name, nix::sys::memfd::MFdFlags::MFD_CLOEXEC).unwrap())
}
