//! `testhost`: boots hosts, runs commands in them. Started by `tests/testhost`, which builds it first.
//!
//! The same program is the command agent inside the hosts (`testhost agent`) and the process that keeps the hosts of
//! `up` (`testhost hold`).

use std::process::ExitCode;

use clap::Parser;
use lathe_tests::cli::{self, Cli};

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Where standard error is closed there is nobody to tell.
            let _ = error.print();
            return if error.use_stderr() { ExitCode::from(cli::INFRASTRUCTURE) } else { ExitCode::SUCCESS };
        }
    };
    match cli::run(cli) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("testhost: {error:#}");
            ExitCode::from(cli::INFRASTRUCTURE)
        }
    }
}
