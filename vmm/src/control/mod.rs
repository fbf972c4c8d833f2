//! The monitor's control socket.
//!
//! - [`wire`]: the protocol
//! - [`phase`]: which command is allowed when, pure
//! - [`definition`]: checks what a machine is made from
//! - [`server`]: connections, descriptors, events

pub mod definition;
pub mod phase;
pub mod server;
pub mod wire;
