//! Every verb and option of `lathe`. Help, man page and completions are made from this one definition.

pub mod by_hand;
pub mod foresight;

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use lathe_shard::{BitRate, Bytes, Change, Iops, MilliCpu};

use crate::api::wire::{Cores, OnTrouble, RestartPolicy, Tier};
use crate::problem::{Kind, Problem};

/// Where lathed listens unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/lathe/lathe.sock";

/// Runs microVMs and changes their shape while they run.
#[derive(Debug, Parser)]
#[command(name = "lathe", version, propagate_version = true, disable_help_subcommand = true)]
pub struct Cli {
    /// Socket of lathed
    #[arg(
        long,
        global = true,
        env = "LATHE_SOCKET",
        default_value = DEFAULT_SOCKET,
        value_name = "PATH"
    )]
    pub socket: PathBuf,
    /// Print JSON (stable: fields are only ever added)
    #[arg(long, global = true)]
    pub json: bool,
    /// What to do
    #[command(subcommand)]
    pub verb: Verb,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Make a machine and start it
    Run(Box<RunArgs>),
    /// List machines
    #[command(visible_alias = "ls")]
    List(ListArgs),
    /// Show one machine: what is desired, granted, actual, used
    Show {
        /// Machine
        name: String,
    },
    /// Change the shape of a machine while it runs
    Resize(ResizeArgs),
    /// Start a stopped machine
    Start {
        /// Machine
        name: String,
    },
    /// Hold a machine between two instructions; it keeps its memory and its place in the books
    Pause {
        /// Machine
        name: String,
    },
    /// Let a paused machine go on
    Resume {
        /// Machine
        name: String,
    },
    /// Stop a machine: power button first, then the power
    Stop(StopArgs),
    /// Remove a machine; its data is kept unless --purge
    Rm(RmArgs),
    /// Run a command inside a machine
    Exec(ExecArgs),
    /// Attach to a machine's serial console (leave with Ctrl-])
    Console {
        /// Machine
        name: String,
    },
    /// Print what a machine wrote to its console
    Logs(LogsArgs),
    /// Show this host: capacity, reserved, granted, used, free; or share its uplink between machines
    Host {
        /// What of it
        #[command(subcommand)]
        verb: Option<HostVerb>,
    },
    /// Watch the host and its machines, those that get least of what they ask for first
    ///
    /// GOT is what a machine got in the last 10 s of what it asked for within its grant; `!` marks less than 95 %. STALL is the share of that
    /// time in which some thread of it waited. Keys show the command that they stand for at the bottom, Enter runs it. Without a
    /// terminal on standard output one picture is printed
    Top(TopArgs),
    /// Draw what a machine asked for, what it is likely to ask for next, and what it is granted
    ///
    /// What it asks for is measured from outside each second: CPU with what its quota held back, memory without what nobody uses, network
    /// with what waits, disk operations. A minute at a time it is forecast six minutes ahead: half of the time it asks for no more than p50,
    /// in 95 of 100 cases for no more than p95; the text says how often that held. With --mode on it is resized so, see lathe why
    Forecast(ForecastArgs),
    /// Show what was decided about a machine's shape and why, and how good its forecasts were
    ///
    /// Every 5 seconds, and as soon as it asks for all that it has, it is weighed what a machine should have: what it would be short of against
    /// what would lie idle, and what a change costs. With --foresight on it is resized so within its bounds; otherwise that is only said. Who
    /// resizes a machine has the last word: it is left alone for 10 minutes, or until the time of a resize --for is over
    Why(WhyArgs),
    /// Show peers and what they have to spare
    Peers,
    /// Check what this host has and lacks, with a fix for each
    Doctor,
    /// Follow what happens
    Events,
    /// Add, grow, list and remove disks of a machine, while it runs too
    #[command(subcommand)]
    Disk(DiskVerb),
    /// Add, limit, list and remove network cards of a machine, while it runs too
    #[command(subcommand)]
    Nic(NicVerb),
    /// Import, list and remove images
    #[command(subcommand)]
    Image(ImageVerb),
    /// Make or join a cluster of hosts
    #[command(subcommand)]
    Cluster(ClusterVerb),
    /// Print completions for a shell
    #[command(hide = true)]
    Completions {
        /// Which shell
        shell: Shell,
    },
    /// Print the man page lathe(1)
    #[command(hide = true)]
    Man,
}

/// Shells with completions.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Shell {
    /// bash
    Bash,
    /// zsh
    Zsh,
    /// fish
    Fish,
}

/// `NOW` or `NOW..AT-MOST`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds<T> {
    /// Now.
    pub now: T,
    /// At most.
    pub max: Option<T>,
}

fn bounds<T: std::str::FromStr<Err = lathe_shard::ParseAmountError> + PartialOrd + Copy>(
    text: &str,
) -> Result<Bounds<T>, String> {
    let parse = |part: &str| part.parse::<T>().map_err(|error| error.to_string());
    let (now, max) = match text.split_once("..") {
        Some((now, max)) => (parse(now)?, Some(parse(max)?)),
        None => (parse(text)?, None),
    };
    if max.is_some_and(|max| max < now) {
        return Err(format!("in NOW..AT-MOST the second amount must not be the smaller one: {text}"));
    }
    Ok(Bounds { now, max })
}

/// Options of `lathe run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// Name: 1 to 28 of a-z 0-9 -, beginning with a letter
    pub name: String,
    /// CPUs, fractional (0.37, 370m); without AT-MOST it may grow to what the host has
    #[arg(long, default_value = "1", value_name = "NOW[..AT-MOST]", value_parser = bounds::<MilliCpu>)]
    pub cpu: Bounds<MilliCpu>,
    /// CPUs at most
    #[arg(long, value_name = "CPUS")]
    pub cpu_max: Option<MilliCpu>,
    /// vCPUs at least, when it shall be more than --cpu needs
    #[arg(long, value_name = "N")]
    pub vcpus: Option<u32>,
    /// Memory (512M, 1.5G); without AT-MOST it may grow to what the host has
    #[arg(long, default_value = "512M", value_name = "NOW[..AT-MOST]", value_parser = bounds::<Bytes>)]
    pub memory: Bounds<Bytes>,
    /// Memory at most
    #[arg(long, value_name = "BYTES")]
    pub memory_max: Option<Bytes>,
    /// Bandwidth each way (40mbit), or none for no network card
    #[arg(long, value_name = "RATE|none", value_parser = net)]
    pub net: Option<Net>,
    /// I/O operations per second of all its disks together (300iops) [default: unlimited]
    #[arg(long, value_name = "IOPS")]
    pub iops: Option<Iops>,
    /// What happens to it when shards are short
    #[arg(long, value_enum, default_value_t = TierWord::Standard)]
    pub tier: TierWord,
    /// Whether it has whole cores of the host to itself, as many as --cpu; needs --tier guaranteed
    #[arg(long, value_enum, default_value_t = CoresWord::Shared)]
    pub cores: CoresWord,
    /// Boot this imported image
    #[arg(long, value_name = "IMAGE", conflicts_with_all = ["kernel", "initrd", "disk"])]
    pub image: Option<String>,
    /// Kernel (bzImage or vmlinux); otherwise the host's own
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// Raw disk: a file is copied, a block device or a file that the configuration allows is used in place with `in-place:PATH[,ro]`
    #[arg(long, value_name = "FILE|in-place:PATH[,ro]")]
    pub disk: Vec<String>,
    /// Enlarge the private disk to this size
    #[arg(long, value_name = "BYTES")]
    pub disk_size: Option<Bytes>,
    /// Kernel command line
    #[arg(long, value_name = "TEXT")]
    pub cmdline: Option<String>,
    /// Start again when it ends by itself
    #[arg(long, value_enum, default_value_t = Restart::No)]
    pub restart: Restart,
    /// What it does when its kernel panics
    #[arg(long, value_enum, default_value_t = Trouble::Report, value_name = "ACTION")]
    pub on_panic: Trouble,
    /// With a watchdog (i6300esb), and what it does when the guest has not fed it in time
    #[arg(long, value_enum, value_name = "ACTION")]
    pub watchdog: Option<Trouble>,
    /// Start with the host
    #[arg(long)]
    pub autostart: bool,
    /// What it becomes by itself
    #[command(flatten)]
    pub growth: foresight::GrowthArgs,
    /// Show what would be done, change nothing
    #[arg(long)]
    pub plan: bool,
    /// With --plan: exit with 11 when there is something to do
    #[arg(long, requires = "plan")]
    pub exit_code: bool,
    /// Seconds to wait for the guest agent, 0 to 600 [default: 60 for the built-in guest, otherwise 0]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(0..=600))]
    pub wait: Option<u32>,
}

/// `--net`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Net {
    /// No network card.
    None,
    /// This much each way.
    Rate(BitRate),
}

fn net(text: &str) -> Result<Net, String> {
    if text == "none" {
        Ok(Net::None)
    } else {
        text.parse().map(Net::Rate).map_err(|error: lathe_shard::ParseAmountError| error.to_string())
    }
}

/// `--cores`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CoresWord {
    /// It runs on whatever CPU is free
    Shared,
    /// No other machine runs on its cores
    Dedicated,
}

impl From<CoresWord> for Cores {
    fn from(cores: CoresWord) -> Self {
        match cores {
            CoresWord::Shared => Self::Shared,
            CoresWord::Dedicated => Self::Dedicated,
        }
    }
}

/// `--tier`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TierWord {
    /// It gets its grant always
    Guaranteed,
    /// It shares what guaranteed machines leave with others of its tier
    Standard,
    /// It takes CPU that no other machine wants, up to its grant, and is promised none
    Harvest,
}

impl From<TierWord> for Tier {
    fn from(tier: TierWord) -> Self {
        match tier {
            TierWord::Guaranteed => Self::Guaranteed,
            TierWord::Standard => Self::Standard,
            TierWord::Harvest => Self::Harvest,
        }
    }
}

/// `--restart`.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Restart {
    /// Never
    No,
    /// Unless the guest powered itself off
    OnFailure,
    /// Unless it was stopped with lathe stop
    Always,
}

impl From<Restart> for RestartPolicy {
    fn from(restart: Restart) -> Self {
        match restart {
            Restart::No => Self::No,
            Restart::OnFailure => Self::OnFailure,
            Restart::Always => Self::Always,
        }
    }
}

/// `--on-panic`, `--watchdog`.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Trouble {
    /// Say so; after a panic the guest has 45 s to reset by itself, then as with end
    Report,
    /// Stand still, to be looked at
    Pause,
    /// Boot again at once
    Reboot,
    /// Power off, and --restart decides
    End,
}

impl From<Trouble> for OnTrouble {
    fn from(trouble: Trouble) -> Self {
        match trouble {
            Trouble::Report => Self::Report,
            Trouble::Pause => Self::Pause,
            Trouble::Reboot => Self::Reboot,
            Trouble::End => Self::End,
        }
    }
}

/// Options of `lathe list`.
#[derive(Debug, Args)]
pub struct ListArgs {
    /// Sort by this column, largest first
    #[arg(long, value_enum, default_value_t = SortBy::Name)]
    pub sort: SortBy,
    /// Print names only
    #[arg(short, long)]
    pub quiet: bool,
}

/// Columns to sort by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SortBy {
    /// name
    #[value(name = "name")]
    Name,
    /// CPU granted
    #[value(name = "cpu.granted")]
    CpuGranted,
    /// CPU used
    #[value(name = "cpu.used")]
    CpuUsed,
    /// memory granted
    #[value(name = "memory.granted")]
    MemoryGranted,
    /// memory used
    #[value(name = "memory.used")]
    MemoryUsed,
}

/// Options of `lathe top`.
#[derive(Debug, Args)]
pub struct TopArgs {
    /// Print one picture and end, as without a terminal on standard output
    #[arg(long)]
    pub once: bool,
}

/// Options of `lathe forecast`.
#[derive(Debug, Args)]
pub struct ForecastArgs {
    /// Machine
    pub name: String,
    /// Draw this much of the past, to 30d: to 10min by the second, to 24h by the minute, beyond by the hour [default: 1h, or 10min of a young machine]
    #[arg(long, value_name = "TIME", value_parser = time)]
    pub over: Option<Duration>,
    /// Draw into this file instead, as SVG
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
    /// What people say
    #[command(flatten)]
    pub by_hand: by_hand::ByHandArgs,
    /// What is changed
    #[command(flatten)]
    pub settings: foresight::SettingArgs,
}

/// Options of `lathe why`.
#[derive(Debug, Args)]
pub struct WhyArgs {
    /// Machine
    pub name: String,
    /// Only the last so many decisions [default: all that are remembered, 32 at most]
    #[arg(short = 'n', long, value_name = "N")]
    pub last: Option<usize>,
}

/// Options of `lathe resize`.
#[derive(Debug, Args)]
pub struct ResizeArgs {
    /// Machine
    pub name: String,
    /// CPUs: 1.5, 370m, +10%, -0.5
    #[arg(long, value_name = "CHANGE", allow_hyphen_values = true)]
    pub cpu: Option<Change<MilliCpu>>,
    /// Memory: 768M, +256M, -10%
    #[arg(long, value_name = "CHANGE", allow_hyphen_values = true)]
    pub memory: Option<Change<Bytes>>,
    /// Bandwidth each way of its nic net0: 40mbit, +10%, or unlimited (of others: lathe nic limit)
    #[arg(long, value_name = "CHANGE|unlimited", allow_hyphen_values = true, value_parser = limit::<BitRate>)]
    pub net: Option<Limit<BitRate>>,
    /// I/O operations per second of all its disks together: 300iops, +10%, or unlimited
    #[arg(long, value_name = "CHANGE|unlimited", allow_hyphen_values = true, value_parser = limit::<Iops>)]
    pub iops: Option<Limit<Iops>>,
    /// What happens to it when shards are short
    #[arg(long, value_enum)]
    pub tier: Option<TierWord>,
    /// Show what would be done, change nothing
    #[arg(long)]
    pub plan: bool,
    /// With --plan: exit with 11 when there is something to do
    #[arg(long, requires = "plan")]
    pub exit_code: bool,
    /// Only if the machine still has this revision
    #[arg(long, value_name = "N")]
    pub if_revision: Option<u64>,
    /// Back to what it was after this time (90s, 10min, 1h, 2d), also across a restart of lathed
    #[arg(long, value_name = "TIME", value_parser = time)]
    pub r#for: Option<Duration>,
    /// End the operation after this time whatever is in force [default: 30s]
    #[arg(long, value_name = "TIME", value_parser = time)]
    pub deadline: Option<Duration>,
    /// What becomes of what is not in force then
    #[arg(long, value_enum, default_value_t = AtDeadline::Keep)]
    pub deadline_action: AtDeadline,
    /// Wait this long for the end; it goes on afterwards [default: until it ends]
    #[arg(long, value_name = "TIME", value_parser = time)]
    pub wait: Option<Duration>,
    /// Back to the shape before the last resize
    #[arg(long, conflicts_with_all = ["cpu", "memory", "net", "iops", "tier", "for"])]
    pub undo: bool,
    /// Give up what is under way: back to what was before
    #[arg(long, conflicts_with_all = ["cpu", "memory", "net", "iops", "tier", "for", "undo", "plan", "wait", "deadline"])]
    pub cancel: bool,
}

/// `--deadline-action`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum AtDeadline {
    /// It stays desired, and is gone on with in the background
    Keep,
    /// Back to what it was
    Revert,
}

/// `500ms`, `90s`, `10min`, `1h`, `2d`; without unit seconds.
fn time(text: &str) -> Result<Duration, String> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let wrong = || format!("{text} is no time: write 500ms, 90s, 10min, 1h or 2d");
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let msec = match unit.trim() {
        "ms" => 1,
        "" | "s" => 1000,
        "m" | "min" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return Err(wrong()),
    };
    number.checked_mul(msec).map(Duration::from_millis).ok_or_else(wrong)
}

/// A change of something that may be unlimited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit<T> {
    /// No limit.
    Unlimited,
    /// A change.
    Change(Change<T>),
}

fn limit<T: std::str::FromStr<Err = lathe_shard::ParseAmountError>>(text: &str) -> Result<Limit<T>, String> {
    if text == "unlimited" {
        return Ok(Limit::Unlimited);
    }
    text.parse().map(Limit::Change).map_err(|error: lathe_shard::ParseAmountError| error.to_string())
}

/// Options of `lathe stop`.
#[derive(Debug, Args)]
pub struct StopArgs {
    /// Machine
    pub name: String,
    /// Seconds that the guest gets after the power button
    #[arg(long, default_value_t = 30, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(0..=3600))]
    pub timeout: u32,
    /// Cut the power at once
    #[arg(long)]
    pub force: bool,
    /// Show what would be done, change nothing
    #[arg(long)]
    pub plan: bool,
}

/// Options of `lathe rm`.
#[derive(Debug, Args)]
pub struct RmArgs {
    /// Machine
    pub name: String,
    /// Delete its private disks too
    #[arg(long)]
    pub purge: bool,
    /// Even when it runs: cut its power
    #[arg(long)]
    pub force: bool,
    /// Show what would be done, change nothing
    #[arg(long)]
    pub plan: bool,
}

/// Options of `lathe exec`.
#[derive(Debug, Args)]
pub struct ExecArgs {
    /// Machine
    pub name: String,
    /// With a terminal [default: when standard input and output are terminals]
    #[arg(short = 't', long)]
    pub tty: bool,
    /// Without a terminal
    #[arg(short = 'T', long, conflicts_with = "tty")]
    pub no_tty: bool,
    /// Add to the environment
    #[arg(short, long, value_name = "NAME=VALUE")]
    pub env: Vec<String>,
    /// Working directory
    #[arg(long, value_name = "DIR")]
    pub cwd: Option<String>,
    /// Command and arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<String>,
}

/// Options of `lathe logs`.
#[derive(Debug, Args)]
pub struct LogsArgs {
    /// Machine
    pub name: String,
    /// How many of the last lines
    #[arg(short = 'n', long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(0..=100_000))]
    pub lines: u32,
    /// Go on as more is written
    #[arg(short, long)]
    pub follow: bool,
}

/// Verbs of `lathe disk`.
#[derive(Debug, Subcommand)]
pub enum DiskVerb {
    /// Give a machine one more disk: plugged in at once if it runs, otherwise at its next start
    Add(DiskAddArgs),
    /// List a machine's disks
    #[command(visible_alias = "ls")]
    List {
        /// Machine
        machine: String,
    },
    /// Enlarge a disk, which a running guest sees at once; disks never shrink
    Grow(DiskGrowArgs),
    /// Take a disk out of a machine as soon as its guest lets it go; a private one's data is kept unless --purge
    #[command(visible_alias = "rm")]
    Remove(DiskRemoveArgs),
}

/// Options of `lathe disk add`.
#[derive(Debug, Args)]
pub struct DiskAddArgs {
    /// Machine
    pub machine: String,
    /// Size of an empty disk, or what the file or image is enlarged to (10G)
    #[arg(long, value_name = "BYTES", required_unless_present_any = ["file", "image"])]
    pub size: Option<Bytes>,
    /// Raw disk: a file is copied, a block device or a file that the configuration allows is used in place with `in-place:PATH[,ro]`
    #[arg(long, value_name = "FILE|in-place:PATH[,ro]")]
    pub file: Option<String>,
    /// A copy of this imported image
    #[arg(long, value_name = "IMAGE", conflicts_with = "file")]
    pub image: Option<String>,
    /// Refuse writes
    #[arg(long)]
    pub read_only: bool,
    /// Its name, and its serial in the guest: 1 to 20 of a-z 0-9 -; lathe-0 is the one to boot from [default: data1, data2, …]
    #[arg(long, value_name = "NAME")]
    pub id: Option<String>,
    /// Show what would be done, change nothing
    #[arg(long)]
    pub plan: bool,
    /// With --plan: exit with 11 when there is something to do
    #[arg(long, requires = "plan")]
    pub exit_code: bool,
}

/// Options of `lathe disk grow`.
#[derive(Debug, Args)]
pub struct DiskGrowArgs {
    /// Machine
    pub machine: String,
    /// Disk
    pub disk: String,
    /// Its size then: 20G, +2G, +10%
    #[arg(value_name = "CHANGE", allow_hyphen_values = true)]
    pub size: Change<Bytes>,
    /// Show what would be done, change nothing
    #[arg(long)]
    pub plan: bool,
    /// With --plan: exit with 11 when there is something to do
    #[arg(long, requires = "plan")]
    pub exit_code: bool,
}

/// Options of `lathe disk remove`.
#[derive(Debug, Args)]
pub struct DiskRemoveArgs {
    /// Machine
    pub machine: String,
    /// Disk
    pub disk: String,
    /// Delete its data too
    #[arg(long)]
    pub purge: bool,
    /// Seconds that a running guest gets to let it go; after that it stays
    #[arg(long, default_value_t = 30, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=3600))]
    pub timeout: u32,
    /// Show what would be done, change nothing
    #[arg(long)]
    pub plan: bool,
    /// With --plan: exit with 11 when there is something to do
    #[arg(long, requires = "plan")]
    pub exit_code: bool,
}

/// Verbs of `lathe nic`.
#[derive(Debug, Subcommand)]
pub enum NicVerb {
    /// Give a machine one more network card with addresses of its own: plugged in at once if it runs, otherwise at its next start
    Add(NicAddArgs),
    /// List a machine's network cards
    #[command(visible_alias = "ls")]
    List {
        /// Machine
        machine: String,
    },
    /// Change the rate of a network card, at once; that of net0 is changed with lathe resize --net
    Limit(NicLimitArgs),
    /// Take a network card out of a machine as soon as its guest lets it go
    #[command(visible_alias = "rm")]
    Remove(NicRemoveArgs),
}

/// Options of `lathe nic add`.
#[derive(Debug, Args)]
pub struct NicAddArgs {
    /// Machine
    pub machine: String,
    /// Bandwidth each way (20mbit) [default: unlimited]
    #[arg(long, value_name = "RATE")]
    pub net: Option<BitRate>,
    /// Its name: net1 to net9 [default: the first that is free]
    #[arg(long, value_name = "NAME")]
    pub id: Option<String>,
    /// Show what would be done, change nothing
    #[arg(long)]
    pub plan: bool,
    /// With --plan: exit with 11 when there is something to do
    #[arg(long, requires = "plan")]
    pub exit_code: bool,
}

/// Options of `lathe nic limit`.
#[derive(Debug, Args)]
pub struct NicLimitArgs {
    /// Machine
    pub machine: String,
    /// Nic
    pub nic: String,
    /// Bandwidth each way then: 40mbit, +10%, or unlimited
    #[arg(value_name = "CHANGE|unlimited", allow_hyphen_values = true, value_parser = limit::<BitRate>)]
    pub rate: Limit<BitRate>,
    /// Show what would be done, change nothing
    #[arg(long)]
    pub plan: bool,
    /// With --plan: exit with 11 when there is something to do
    #[arg(long, requires = "plan")]
    pub exit_code: bool,
}

/// Options of `lathe nic remove`.
#[derive(Debug, Args)]
pub struct NicRemoveArgs {
    /// Machine
    pub machine: String,
    /// Nic
    pub nic: String,
    /// Seconds that a running guest gets to let it go; after that it stays
    #[arg(long, default_value_t = 30, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=3600))]
    pub timeout: u32,
    /// Show what would be done, change nothing
    #[arg(long)]
    pub plan: bool,
    /// With --plan: exit with 11 when there is something to do
    #[arg(long, requires = "plan")]
    pub exit_code: bool,
}

/// Verbs of `lathe host`.
#[derive(Debug, Subcommand)]
pub enum HostVerb {
    /// Share the host's uplink between machines: each is promised its rate, and may borrow what the others leave (changing it takes root)
    #[command(subcommand)]
    Uplink(UplinkVerb),
}

/// Verbs of `lathe host uplink`.
#[derive(Debug, Subcommand)]
pub enum UplinkVerb {
    /// Show the uplink and what machines have of it
    Show,
    /// Share it; what is at the root of the device is kept, and put back by disable
    ///
    /// Of the capacity 95 % may be granted to machines; 4 % are the host's at least, 1 % is left for machines without limit, which have
    /// equal parts of all that is not granted, a hundredth of the capacity each at most. Beyond its part each may borrow what is free.
    /// Again with another capacity changes it in place
    Enable(UplinkEnableArgs),
    /// Put back what was there before
    Disable,
}

/// Options of `lathe host uplink enable`.
#[derive(Debug, Args)]
pub struct UplinkEnableArgs {
    /// Network device [default: that of the IPv4 default route]
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<String>,
    /// What it carries (1gbit); what is above queues in the card instead of here [default: the speed that the link tells]
    #[arg(long, value_name = "RATE")]
    pub capacity: Option<BitRate>,
    /// Show what would be done, change nothing
    #[arg(long)]
    pub plan: bool,
    /// With --plan: exit with 11 when there is something to do
    #[arg(long, requires = "plan")]
    pub exit_code: bool,
}

/// Verbs of `lathe image`.
#[derive(Debug, Subcommand)]
pub enum ImageVerb {
    /// Import a raw disk, or a root file system as tar
    Import {
        /// Name of the image
        name: String,
        /// File
        file: PathBuf,
        /// What the file is [default: by its ending]
        #[arg(long, value_enum)]
        format: Option<ImageFormat>,
    },
    /// List images
    #[command(visible_alias = "ls")]
    List,
    /// Remove an image; machines made from it are not touched
    Rm {
        /// Name of the image
        name: String,
    },
}

/// What an image file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ImageFormat {
    /// Raw disk
    Raw,
    /// Root file system
    Tar,
}

/// Verbs of `lathe cluster`.
#[derive(Debug, Subcommand)]
pub enum ClusterVerb {
    /// Make a cluster of this host alone
    Init {
        /// Name of the cluster
        #[arg(default_value = "lathe")]
        name: String,
        /// IP:PORT that peers reach this host at
        #[arg(long, value_name = "IP:PORT")]
        address: Option<String>,
    },
    /// Print a token with which one host can join
    Token {
        /// Seconds that it is good for
        #[arg(long, default_value_t = 3600, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(60..=604_800))]
        ttl: u64,
    },
    /// Join the cluster that printed the token
    Join {
        /// Token, or - to read it from standard input (arguments can be seen by other users)
        token: String,
        /// IP:PORT that peers reach this host at
        #[arg(long, value_name = "IP:PORT")]
        address: Option<String>,
    },
}

/// Prints completions.
pub fn completions(shell: Shell) {
    let mut command = Cli::command();
    let out = &mut io::stdout();
    match shell {
        Shell::Bash => clap_complete::generate(clap_complete::Shell::Bash, &mut command, "lathe", out),
        Shell::Zsh => clap_complete::generate(clap_complete::Shell::Zsh, &mut command, "lathe", out),
        Shell::Fish => clap_complete::generate(clap_complete::Shell::Fish, &mut command, "lathe", out),
    }
}

/// Prints the man page.
///
/// # Errors
/// When standard output cannot be written.
pub fn man() -> Result<(), Problem> {
    let mut page = Vec::new();
    man_page(&mut page).and_then(|()| io::Write::write_all(&mut io::stdout(), &page)).map_err(|error| {
        Problem::new(Kind::Internal, "internal", format!("cannot write the man page: {error}"))
    })
}

/// lathe(1), every verb with its options on one page.
fn man_page(out: &mut Vec<u8>) -> io::Result<()> {
    let mut command = Cli::command();
    command.build();
    let page = clap_mangen::Man::new(command.clone());
    page.render_title(out)?;
    page.render_name_section(out)?;
    page.render_synopsis_section(out)?;
    page.render_options_section(out)?;
    out.extend_from_slice(b".SH VERBS\n");
    for verb in command.get_subcommands().filter(|verb| !verb.is_hide_set()) {
        man_verb(verb, "lathe", out);
    }
    out.extend_from_slice(MAN_END.as_bytes());
    Ok(())
}

/// What stands below the verbs: the meaning of exit codes (see [`super::exit`]) and where to read on.
const MAN_END: &str = ".SH EXIT STATUS
0 done, 1 failed, 2 the command line makes no sense, 4 not permitted, 6 not configured, 7 lathed is not running, 8 no such thing, 9 a conflict \
(name taken, other revision, in use), 10 accepted but not wholly in force yet, 11 \\-\\-plan \\-\\-exit\\-code found something to do. \\fBlathe exec\\fR ends with \
the command's own exit status, or with 127 when there is no such command.
.SH SEE ALSO
\\fBlathed\\fR(8), \\fBlathe.toml\\fR(5), \\fBlathe\\-errors\\fR(7)
";

/// Text with what troff would take for its own made harmless.
fn troff(text: &str) -> String {
    text.replace('\\', "\\e").replace('-', "\\-").replace("\n.", "\n\\&.").replace("\n'", "\n\\&'")
}

fn man_verb(verb: &clap::Command, before: &str, out: &mut Vec<u8>) {
    let name = format!("{before} {}", verb.get_name());
    if verb.has_subcommands() {
        for inner in verb.get_subcommands().filter(|inner| inner.get_name() != "help") {
            man_verb(inner, &name, out);
        }
        return;
    }
    let shown: Vec<_> = verb
        .get_arguments()
        .filter(|arg| {
            !arg.is_hide_set() && !arg.is_global_set() && arg.get_id() != "help" && arg.get_id() != "version"
        })
        .collect();
    let mut synopsis = name;
    if shown.iter().any(|arg| !arg.is_positional()) {
        synopsis.push_str(" [OPTIONS]");
    }
    for arg in shown.iter().filter(|arg| arg.is_positional()) {
        synopsis.push_str(&format!(" {arg}"));
    }
    let about = verb.get_long_about().or(verb.get_about()).map(ToString::to_string).unwrap_or_default();
    let about = troff(&about).replace("\n\n", ".\n.PP\n");
    out.extend_from_slice(format!(".SS {}\n{about}.\n", troff(&synopsis)).as_bytes());
    for arg in shown {
        let mut help = arg.get_help().map(ToString::to_string).unwrap_or_default();
        let default: Vec<_> =
            arg.get_default_values().iter().map(|value| value.to_string_lossy().into_owned()).collect();
        if !default.is_empty() && !default.contains(&"false".to_owned()) {
            help.push_str(&format!(" [default: {}]", default.join(" ")));
        }
        out.extend_from_slice(
            format!(".TP\n\\fB{}\\fR\n{}.\n", troff(&arg.to_string()), troff(&help)).as_bytes(),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_man_page_has_every_verb_and_option() {
        let mut page = Vec::new();
        man_page(&mut page).unwrap();
        let page = String::from_utf8(page).unwrap();
        for piece in [
            "lathe run [OPTIONS]",
            "\\-\\-if\\-revision",
            "lathe image import",
            "lathe disk grow [OPTIONS]",
            "lathe nic add [OPTIONS]",
            "lathe cluster join",
            "lathe top [OPTIONS]\nWatch the host",
            "lathe forecast [OPTIONS] <NAME>\nDraw what",
            "ask for first.\n.PP\nGOT is",
            "EXIT STATUS",
        ] {
            assert!(page.contains(piece), "{piece} is missing in:\n{page}");
        }
        assert!(!page.contains("completions"), "hidden verbs stay hidden");
    }

    #[test]
    fn bounds_read_now_and_at_most() {
        assert_eq!(
            bounds::<MilliCpu>("0.5..4"),
            Ok(Bounds { now: MilliCpu(500), max: Some(MilliCpu(4000)) })
        );
        assert_eq!(bounds::<MilliCpu>("370m"), Ok(Bounds { now: MilliCpu(370), max: None }));
        assert!(bounds::<MilliCpu>("4..0.5").is_err());
        assert!(bounds::<MilliCpu>("..").is_err());
    }

    #[test]
    fn times_have_units() {
        assert_eq!(time("90"), Ok(Duration::from_secs(90)));
        assert_eq!(time("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(time("1h"), Ok(Duration::from_secs(3600)));
        for bad in ["", "h", "1w", "-1s", "1.5h", "99999999999999999999d", "99999999999999999d"] {
            assert!(time(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn relative_changes_are_not_taken_for_options() {
        let cli = Cli::try_parse_from(["lathe", "resize", "web", "--cpu", "-0.5", "--net", "+10%"]).unwrap();
        let Verb::Resize(args) = cli.verb else { panic!("not a resize") };
        assert_eq!(args.cpu, Some(Change::Down(MilliCpu(500))));
        assert_eq!(args.net, Some(Limit::Change(Change::Percent { up: true, centipercent: 1000 })));
        let cli = Cli::try_parse_from(["lathe", "disk", "grow", "web", "data1", "-2G", "--plan"]).unwrap();
        let Verb::Disk(DiskVerb::Grow(args)) = cli.verb else { panic!("grows no disk") };
        assert!(args.plan && args.size == Change::Down(Bytes(2 << 30)));
        assert!(Cli::try_parse_from(["lathe", "disk", "add", "web"]).is_err(), "how large?");
        let cli = Cli::try_parse_from(["lathe", "nic", "limit", "web", "net1", "-10%"]).unwrap();
        let Verb::Nic(NicVerb::Limit(args)) = cli.verb else { panic!("limits no nic") };
        assert_eq!(args.rate, Limit::Change(Change::Percent { up: false, centipercent: 1000 }));
    }
}
