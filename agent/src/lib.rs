//! The Lathe agent: the daemon `lathed` and the command `lathe`.
//!
//! - [`api`]: what is spoken on the Unix socket
//! - [`bootimage`]: the built-in guest's initramfs
//! - [`cli`]: the command `lathe`
//! - [`config`]: `lathe.toml` and its drop-ins
//! - [`daemon`]: lathed from its first second to its last
//! - [`doctor`]: what the host has and lacks
//! - [`foresight`]: what machines ask for over time, and will ask for
//! - [`host`]: what the host has and uses, and the books
//! - [`images`]: the image store, and uploads
//! - [`launcher`]: starts and ends monitors: systemd, or directly
//! - [`machines`]: the core: state, reconciling, adoption, resize
//! - [`monitor`]: client of a monitor's control socket
//! - [`nearest`]: "did you mean"
//! - [`network`]: addresses, bridge, taps, rates of machines
//! - [`peer`]: other hosts: membership, gossip, the peer API
//! - [`problem`]: errors, from where they happen to the terminal
//! - [`sculptor`]: what shape machines are to have
//! - [`store`]: SQLite: every promise, durable

pub mod api;
pub mod bootimage;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod doctor;
pub mod foresight;
pub mod host;
pub mod images;
pub mod launcher;
pub mod machines;
pub mod monitor;
pub mod nearest;
pub mod network;
pub mod peer;
pub mod problem;
pub mod sculptor;
pub mod store;
