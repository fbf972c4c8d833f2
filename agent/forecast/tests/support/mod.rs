//! The project's own scorer and generator of demand: shared by the tests and by `examples/score.rs`.
#![allow(dead_code)] // each user takes another part

pub mod csv;
pub mod regimes;
pub mod score;
