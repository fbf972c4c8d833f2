//! The program `nft`: started with an argument vector, without environment, its text in a pipe.

use std::io::{self, Read, Write as _};
use std::path::PathBuf;
use std::process::{Command, Stdio};

const PROGRAM: &str = "/usr/sbin/nft";
/// Of what `nft` prints, so much is read.
const OUTPUT_BYTES_MAX: u64 = 4 << 20;
/// Of what `nft` complains, so many lines are shown.
const COMPLAINT_LINES: usize = 2;

/// A change of the table that did not happen.
#[derive(Debug, thiserror::Error)]
pub enum NatError {
    /// The program cannot be run.
    #[error("cannot run {}; check: package nftables is installed", program.display())]
    Run {
        /// The program.
        program: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The program refused.
    #[error(
        "nft cannot {action}: {said}; check: CAP_NET_ADMIN, kernel modules nf_tables, nft_masq, nft_nat, nft_fib_inet"
    )]
    Refused {
        /// What was tried.
        action: &'static str,
        /// The first lines of its complaint.
        said: String,
    },
    /// The program printed what this version does not understand.
    #[error("nft printed something unexpected: {0}")]
    Output(String),
    /// A port that cannot be published.
    #[error("port 0 cannot be published")]
    PortZero,
}

/// The program.
#[derive(Clone, Debug)]
pub(crate) struct Nft {
    program: PathBuf,
}

impl Nft {
    /// Debian's.
    pub(crate) fn new() -> Nft {
        Nft::with_program(PROGRAM.into())
    }

    pub(crate) fn with_program(program: PathBuf) -> Nft {
        Nft { program }
    }

    pub(crate) fn has_table(&self) -> Result<bool, NatError> {
        let tables = self.run("list tables", &["list", "tables", "inet"], "")?;
        Ok(tables.lines().any(|line| line.trim() == "table inet lathe"))
    }

    pub(crate) fn run(
        &self,
        action: &'static str,
        arguments: &[&str],
        input: &str,
    ) -> Result<String, NatError> {
        let failed = |source| NatError::Run { program: self.program.clone(), source };
        let mut child = Command::new(&self.program)
            .args(arguments)
            .env_clear()
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        if let Some(mut pipe) = child.stdin.take() {
            // The texts are shorter than a pipe's buffer, so this never waits; a program that does not read is seen below.
            let _ = pipe.write_all(input.as_bytes());
        }
        let mut output = String::new();
        if let Some(pipe) = child.stdout.take() {
            pipe.take(OUTPUT_BYTES_MAX).read_to_string(&mut output).map_err(failed)?;
        }
        let mut said = String::new();
        if let Some(pipe) = child.stderr.take() {
            pipe.take(OUTPUT_BYTES_MAX).read_to_string(&mut said).map_err(failed)?;
        }
        if child.wait().map_err(failed)?.success() {
            return Ok(output);
        }
        let said = said.lines().take(COMPLAINT_LINES).map(str::trim).collect::<Vec<_>>().join(": ");
        Err(NatError::Refused { action, said })
    }
}
