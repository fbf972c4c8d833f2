//! Benchmarks of the monitor alone, each beside QEMU on the same host and with the same guest.
//!
//! ```text
//! tests/run bench boot     boots a test host, puts lathe-vmm and `bench` into it, runs the line below
//! bench boot --here        measures on this machine, which needs KVM and QEMU
//! bench boot --name SET    the same in a host that `tests/testhost up --name SET` has left up
//! ```
//! Every benchmark prints `RESULT` lines with figure, target and verdict; `--check` makes a missed target a failure.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand};

use crate::channel::{Channel, Passthrough};
use crate::frame::ExecSpec;
use crate::{hold, place, transfer};
use monitors::Setup;

pub mod boot;
pub mod ceiling;
pub mod counters;
pub mod elastic;
pub mod initramfs;
pub mod memory;
pub mod monitors;
pub mod programs;
pub mod rates;
pub mod requests;
pub mod resize;
pub mod stats;
pub mod tax;

/// Where the kernels are in a test host.
const KERNELS: &str = "/usr/lib/lathe-test/kernels";
/// Where the programs go in a test host.
const INSIDE: &str = "/root/bench";
/// How long one benchmark may take.
const LIMIT: Duration = Duration::from_secs(3600);

/// Benchmarks of the monitor beside QEMU.
#[derive(Debug, Parser)]
#[command(name = "bench", disable_help_subcommand = true)]
pub struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Clone, Debug, Subcommand)]
enum Verb {
    /// Time from the start of the monitor to the guest's init.
    Boot(Options),
    /// Memory of an idle machine's monitor beside the guest's.
    Memory(Options),
    /// What everything costs that a machine could become and does not.
    ElasticTax(Options),
    /// Time to change a running machine: vCPUs, memory, balloon.
    Resize(Options),
    /// What a request server notices while its machine's shape changes once a second.
    Requests(Options),
    /// Changes of shape a second of one core.
    Resizes(Options),
    /// Time until lathed enforces a lower CPU ceiling; only with --here, on a host with lathed.
    Ceiling {
        /// A machine with 2 vCPUs, paused
        #[arg(long)]
        machine: String,
        #[command(flatten)]
        options: Options,
    },
}

impl Verb {
    fn options(&self) -> &Options {
        match self {
            Self::Boot(options)
            | Self::Memory(options)
            | Self::ElasticTax(options)
            | Self::Resize(options)
            | Self::Requests(options)
            | Self::Resizes(options) => options,
            Self::Ceiling { options, .. } => options,
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Boot(_) => "boot",
            Self::Memory(_) => "memory",
            Self::ElasticTax(_) => "elastic-tax",
            Self::Resize(_) => "resize",
            Self::Requests(_) => "requests",
            Self::Resizes(_) => "resizes",
            Self::Ceiling { .. } => "ceiling",
        }
    }

    /// Whether the guest's init is `hand`.
    fn with_hand(&self) -> bool {
        matches!(self, Self::Resize(_) | Self::Requests(_) | Self::Resizes(_))
    }
}

#[derive(Clone, Debug, Args)]
struct Options {
    /// Measure on this very machine
    #[arg(long)]
    here: bool,
    /// Measure in the hosts that are up under this name
    #[arg(long, conflicts_with = "here")]
    name: Option<String>,
    /// Rounds that count (default: as many as the benchmark needs)
    #[arg(long)]
    rounds: Option<usize>,
    /// Kernel image; may be repeated (default: 6.12 vmlinux, and for boot 6.1 bzImage)
    #[arg(long = "kernel", value_name = "FILE")]
    kernels: Vec<PathBuf>,
    /// The monitor under test (default: this workspace's release build)
    #[arg(long, value_name = "FILE")]
    vmm: Option<PathBuf>,
    /// Init of the guests whose shape is changed (default: this workspace's release build)
    #[arg(long, value_name = "FILE")]
    hand: Option<PathBuf>,
    /// Also list every mapping of the monitor under test
    #[arg(long)]
    detail: bool,
    /// Exit with 1 if a target is missed
    #[arg(long)]
    check: bool,
}

/// Carries a command line out. Returns the exit status.
///
/// # Errors
/// What keeps the benchmark from being run.
pub fn run(command: &Cli) -> Result<u8> {
    let options = command.verb.options();
    if !options.here {
        return elsewhere(&command.verb, options);
    }
    let missed = !here(&command.verb, options)?;
    Ok(u8::from(missed && options.check))
}

fn kernels(verb: &Verb, options: &Options) -> Vec<PathBuf> {
    if !options.kernels.is_empty() {
        return options.kernels.clone();
    }
    let of = |name: &str| Path::new(KERNELS).join(name);
    match verb {
        Verb::Boot(_) => vec![of("6.12/vmlinux"), of("6.1/bzImage")],
        _ => vec![of("6.12/vmlinux")],
    }
}

fn here(verb: &Verb, options: &Options) -> Result<bool> {
    if let Verb::Ceiling { machine, .. } = verb {
        return ceiling::run(machine, options.rounds.unwrap_or(40));
    }
    let vmm = options.vmm.clone().context("--here needs --vmm")?;
    let directory = std::env::temp_dir().join(format!("lathe-bench-{}", std::process::id()));
    fs::create_dir_all(&directory)?;
    let initrd = directory.join("initramfs");
    initramfs::write(&mut File::create(&initrd)?)?;
    let mut met = true;
    for kernel in kernels(verb, options) {
        let setup = Setup { vmm: vmm.clone(), kernel, initrd: initrd.clone(), extra: &[] };
        met &= one(verb, options, &setup, &directory)?;
    }
    fs::remove_dir_all(&directory)?;
    Ok(met)
}

fn one(verb: &Verb, options: &Options, setup: &Setup, directory: &Path) -> Result<bool> {
    let rounds = |otherwise| options.rounds.unwrap_or(otherwise);
    if !verb.with_hand() {
        return match verb {
            Verb::Boot(_) => boot::run(setup, rounds(10)),
            Verb::ElasticTax(_) => tax::run(setup, rounds(10)),
            _ => memory::run(setup, rounds(3), options.detail),
        };
    }
    let hand = options.hand.as_ref().context("--here needs --hand")?;
    let setup = resize::setup(setup, hand, directory)?;
    match verb {
        Verb::Requests(_) => requests::run(&setup, rounds(2)),
        Verb::Resizes(_) => rates::run(&setup, rounds(3)),
        _ => resize::run(&setup, rounds(5)),
    }
}

fn elsewhere(verb: &Verb, options: &Options) -> Result<u8> {
    if matches!(verb, Verb::Ceiling { .. }) {
        bail!("ceiling is measured with --here, on a host with lathed");
    }
    let name = options.name.as_ref().context("name the hosts (--name), or --here; or use tests/run bench")?;
    let vmm = options.vmm.clone().map_or_else(programs::monitor, Ok)?;
    let channel = hold::attach(&place::named(name)?, 1)?;
    channel.wait_up(1, Duration::from_secs(10))?;
    inside(&channel, verb, options, &vmm)
}

/// Runs the benchmark in a host.
fn inside(channel: &Channel, verb: &Verb, options: &Options, vmm: &Path) -> Result<u8> {
    transfer::push(channel, vmm, &format!("{INSIDE}/lathe-vmm"))?;
    transfer::push(channel, &std::env::current_exe()?, &format!("{INSIDE}/bench"))?;
    let mut argv = vec![format!("{INSIDE}/bench")];
    argv.push(verb.name().to_owned());
    argv.extend(["--here".to_owned(), "--vmm".to_owned(), format!("{INSIDE}/lathe-vmm")]);
    if verb.with_hand() {
        let hand = options.hand.clone().map_or_else(programs::hand, Ok)?;
        transfer::push(channel, &hand, &format!("{INSIDE}/hand"))?;
        argv.extend(["--hand".to_owned(), format!("{INSIDE}/hand")]);
    }
    for kernel in &options.kernels {
        argv.extend(["--kernel".to_owned(), kernel.display().to_string()]);
    }
    if let Some(rounds) = options.rounds {
        argv.extend(["--rounds".to_owned(), rounds.to_string()]);
    }
    argv.extend(options.detail.then(|| "--detail".to_owned()));
    argv.extend(options.check.then(|| "--check".to_owned()));
    let process = channel.begin(&ExecSpec { argv, ..ExecSpec::default() })?;
    process.end_input()?;
    let status = process.wait(&mut Passthrough, Some(LIMIT))?;
    Ok(u8::try_from(status).unwrap_or(u8::MAX))
}
