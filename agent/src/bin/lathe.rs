//! The command `lathe`; see [`lathe_agent::cli`].

use std::process::ExitCode;

use clap::Parser;
use lathe_agent::cli::{self, args::Cli, exit, output};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let json = cli.json;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let verdict = match runtime {
        Ok(runtime) => {
            let verdict = runtime.block_on(cli::execute(cli));
            // A thread may still be waiting for standard input: it is not waited for.
            runtime.shutdown_background();
            verdict
        }
        Err(error) => {
            eprintln!("error[internal]: cannot start: {error}");
            return ExitCode::from(exit::FAILED);
        }
    };
    match verdict {
        Ok(code) => ExitCode::from(code),
        Err(problem) => {
            output::print_problem(&problem, json);
            ExitCode::from(cli::exit_code(&problem))
        }
    }
}
