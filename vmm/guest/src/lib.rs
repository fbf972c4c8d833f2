//! The agent inside a machine: its protocol, shared with the host.
//!
//! - [`protocol`]: what travels over vsock

pub mod protocol;
