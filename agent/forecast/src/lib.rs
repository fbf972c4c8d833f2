//! Demand series in, calibrated quantiles over time out.
//!
//! A [`Series`] takes one sample a step and answers at once with a [`Blueprint`]: quantiles of the next six steps and a
//! confidence. It does no I/O and has no clock: time comes with the samples, randomness from a seed, so equal input gives
//! equal output, and a restored state goes on bit by bit where it was saved.
//!
//! ```text
//!  sample ─► past ─► experts ─► mix ─────────► calibrate ─► snap, sort ─► Blueprint
//!             │       12        loss and BOA    where coverage             quantiles
//!             └─────────────►  per cell         has drifted                confidence ◄─ trust
//! ```
//! | module | what it holds |
//! |---|---|
//! | `past` | the last five days of 5-minute steps |
//! | `experts` | last value, Holt-Winters, ARMA, ridge, windows, seasons given and learnt, analogs, LSTM |
//! | `mix` | weights per level and pair of steps ahead, from what each expert lost of late |
//! | `calibrate` | conformal correction outside a dead band |
//! | `trust` | the confidence |
//! | [`rhythm`] | what comes back, seen by itself: the length of its cycle, and the next one |
//!
//! What it never does: know what the series means, or decide anything.
#![forbid(unsafe_code)]
#![allow(clippy::needless_range_loop)] // loops over several arrays at once

mod blueprint;
mod calibrate;
mod experts;
mod math;
mod mix;
mod past;
mod quantile;
pub mod rhythm;
mod series;
mod trust;

pub use blueprint::Blueprint;
pub use experts::{EXPERTS, NAMES};
pub use quantile::{HORIZONS, LEVELS, Quantiles};
pub use rhythm::Rhythm;
pub use series::{Config, MAX_STATE, Outcome, RestoreError, Series};
