//! What depends on the processor architecture: memory layout, firmware tables, boot protocol, register set-up.
//!
//! Everything outside of this folder is the same for every architecture. Only x86_64 exists so far.

pub mod x86_64;
