//! Units of resource shards and the arithmetic of shapes. No I/O.
//!
//! Amounts are integers of the smallest unit that can be granted, so that sums are exact and nothing is lost to rounding:
//!
//! | kind | unit | shard |
//! |---|---|---|
//! | [`MilliCpu`] | 0.001 CPU | 1 |
//! | [`Bytes`] | byte | [`MEMORY_SHARD`] (2 MiB) for memory, 1 MiB for disk |
//! | [`BitRate`] | bit/s | [`RATE_SHARD`] (1 kbit/s) |
//! | [`Iops`] | I/O operation per second | 1 |
//!
//! - [`amount`]: the units, how people write them and how they are shown
//! - [`change`]: `+10%`, `-0.5`, `0.5..4`
//! - [`shape`]: an amount of every kind, and checked arithmetic on them

pub mod amount;
pub mod change;
pub mod shape;

pub use amount::{BitRate, Bytes, Iops, MEMORY_SHARD, MilliCpu, ParseAmountError, RATE_SHARD};
pub use change::Change;
pub use shape::{Shape, Shortage};
