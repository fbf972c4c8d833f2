//! `bench NAME`: see `lathe_tests::bench`. Exit status: 0; 1 a target missed with `--check`; 125 it could not be measured.

use std::process::ExitCode;

use clap::Parser;
use lathe_tests::bench::{self, Cli};
use lathe_tests::cli::INFRASTRUCTURE;

fn main() -> ExitCode {
    match bench::run(&Cli::parse()) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::from(INFRASTRUCTURE)
        }
    }
}
