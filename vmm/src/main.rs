//! `lathe-vmm serve`: one machine's monitor, told what to do over its control socket (how lathed uses it).
//! `lathe-vmm run`: boots a machine from the command line.

use std::process::ExitCode;

mod cli;

fn main() -> ExitCode {
    cli::main()
}
