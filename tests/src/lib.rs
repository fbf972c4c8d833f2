//! End-to-end scenarios, the test host, benchmarks.
//!
//! A *test host* is a Debian 12 machine with systemd and a working `/dev/kvm`, run by QEMU on any machine that has
//! two cores. `tests/testhost` is its command, `tests/run` runs everything in it.
//!
//! ```text
//! image      the host's disk, built once and cached          qemu      one host as a process
//! payload    what changes between builds, as a disk           hub       the Ethernet segment between hosts
//! workspace  this tree's binaries, built and installed        frame     the command channel's wire format
//! hosts      a set of hosts, booted and held                  agent     its end inside the host
//! hold       keeps a set in the background for `up`           channel   its end out here
//! scenario   tests that read as sentences, and their runner   transfer  files in and out
//! cli        the command line of `tests/testhost`             accel     KVM or emulation
//! place      where sockets, logs and failures lie             dice      chance that can be repeated
//! picture    what machines had and used over time, drawn
//! ```

pub mod accel;
pub mod agent;
pub mod bench;
pub mod channel;
pub mod cli;
pub mod dice;
pub mod frame;
pub mod hold;
pub mod hosts;
pub mod hub;
pub mod image;
pub mod payload;
pub mod picture;
pub mod place;
pub mod qemu;
pub mod scenario;
pub mod transfer;
pub mod workspace;
