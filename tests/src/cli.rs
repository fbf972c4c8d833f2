//! The command line of `tests/testhost`.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use clap::{Args, Parser, Subcommand};

use crate::accel;
use crate::channel::{Channel, ExecError, Passthrough, Process};
use crate::frame::ExecSpec;
use crate::hold::{self, Request};
use crate::hosts::{HostSet, MAX_HOSTS, Plan, save_consoles};
use crate::image::{self, Image};
use crate::{agent, payload, place, transfer, workspace};

/// Exit status: the command did not end in time.
pub const TIMED_OUT: u8 = 124;
/// Exit status: not the command failed, but what was to carry it.
pub const INFRASTRUCTURE: u8 = 125;
/// How often hosts that did not come up are tried again.
pub const RETRIES: usize = 2;

/// Test hosts: Debian 12 with systemd and a working /dev/kvm, on any machine with two cores.
#[derive(Debug, Parser)]
#[command(name = "testhost", disable_help_subcommand = true)]
pub struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Boot hosts, install this workspace, run a command as root, throw the hosts away.
    ///
    /// Exit status: the command's; 124 if it did not end in time; 125 if the hosts failed.
    Run(Run),
    /// Boot hosts and leave them up.
    Up(Up),
    /// Run a command in a host that is up.
    Exec(Exec),
    /// A shell in a host that is up.
    Shell(Target),
    /// Copy a file or a folder's content into a host that is up.
    Push(Copy),
    /// Copy a file or a folder's content out of a host that is up.
    Pull(Copy),
    /// Reboot a host that is up and wait until it has settled.
    Reboot(Reboot),
    /// Save journals and consoles of hosts that are up.
    Save(Save),
    /// End hosts and remove everything of them.
    Down(Name),
    /// The hosts that are up.
    List,
    /// Build the host image if it is not cached, and print where it is.
    Image,
    #[command(hide = true)]
    Hold(Hold),
    #[command(hide = true)]
    Agent {
        #[arg(long)]
        port: PathBuf,
    },
}

#[derive(Clone, Debug, Args)]
struct Hosts {
    /// How many hosts, on one private segment (host K is 10.77.0.K)
    #[arg(long, default_value_t = 1)]
    hosts: usize,
    /// Memory of each host, MiB
    #[arg(long, default_value_t = 4096)]
    memory: usize,
    /// CPUs of each host
    #[arg(long, default_value_t = 2)]
    cpus: usize,
    /// Do not install this workspace
    #[arg(long)]
    no_install: bool,
}

#[derive(Clone, Debug, Args)]
struct Name {
    /// Which set of hosts
    #[arg(long, default_value = "default")]
    name: String,
}

#[derive(Clone, Debug, Args)]
struct Target {
    #[command(flatten)]
    set: Name,
    /// On which host, from 1
    #[arg(long, default_value_t = 1)]
    on: usize,
}

#[derive(Clone, Debug, Args)]
struct What {
    /// Copy SRC to DST in the host first; a folder's content goes into DST
    #[arg(long, value_name = "SRC:DST")]
    push: Vec<String>,
    /// Set a variable
    #[arg(long, value_name = "K=V")]
    env: Vec<String>,
    /// Kill the command after so many seconds
    #[arg(long, value_name = "S")]
    timeout: Option<f64>,
    /// Pass our standard input on
    #[arg(long, short = 'i')]
    stdin: bool,
    /// The command and its arguments
    #[arg(required = true, last = true)]
    command: Vec<String>,
}

#[derive(Debug, Args)]
struct Run {
    #[command(flatten)]
    hosts: Hosts,
    /// On which host the command runs, from 1
    #[arg(long, default_value_t = 1)]
    on: usize,
    #[command(flatten)]
    what: What,
}

#[derive(Debug, Args)]
struct Up {
    #[command(flatten)]
    hosts: Hosts,
    #[command(flatten)]
    set: Name,
}

#[derive(Debug, Args)]
struct Exec {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    what: What,
}

#[derive(Debug, Args)]
struct Copy {
    #[command(flatten)]
    target: Target,
    /// From where to where
    #[arg(value_name = "SRC:DST", required = true)]
    pairs: Vec<String>,
}

#[derive(Debug, Args)]
struct Reboot {
    #[command(flatten)]
    target: Target,
    /// Cut the power instead
    #[arg(long)]
    hard: bool,
}

#[derive(Debug, Args)]
struct Save {
    #[command(flatten)]
    set: Name,
    /// The folder that receives them
    target: PathBuf,
}

#[derive(Debug, Args)]
struct Hold {
    #[command(flatten)]
    hosts: Hosts,
    #[arg(long)]
    directory: PathBuf,
    #[arg(long)]
    accelerated: bool,
}

/// Carries a command line out and returns the exit status.
///
/// # Errors
/// Whatever is no result of a command inside a host: infrastructure, wrong arguments.
pub fn run(cli: Cli) -> Result<u8> {
    match cli.verb {
        Verb::Run(run) => run_once(&run),
        Verb::Up(up) => bring_up(&up),
        Verb::Exec(exec) => {
            let channel = attach(&exec.target)?;
            execute(&channel, &exec.what)
        }
        Verb::Shell(target) => shell(&attach(&target)?),
        Verb::Push(copy) => {
            let channel = attach(&copy.target)?;
            push_all(&channel, &copy.pairs).map(|()| 0)
        }
        Verb::Pull(copy) => {
            let channel = attach(&copy.target)?;
            for pair in &copy.pairs {
                let (source, target) = split(pair)?;
                transfer::pull(&channel, source, Path::new(target))?;
            }
            Ok(0)
        }
        Verb::Reboot(reboot) => {
            let host = reboot.target.on;
            let request = if reboot.hard { Request::Reset { host } } else { Request::Reboot { host } };
            hold::ask(&place::named(&reboot.target.set.name)?, &request).map(|_| 0)
        }
        Verb::Save(save) => {
            fs::create_dir_all(&save.target)?;
            let target = save.target.canonicalize()?;
            hold::ask(&place::named(&save.set.name)?, &Request::Save { target }).map(|_| 0)
        }
        Verb::Down(set) => take_down(&set.name),
        Verb::List => list(),
        Verb::Image => {
            println!("{}", image_of_workspace()?.disk.display());
            Ok(0)
        }
        Verb::Hold(hold) => keep(&hold),
        Verb::Agent { port } => agent::serve(&port).map(|()| 0).context("the command agent's port failed"),
    }
}

/// The image that this workspace's recipe describes.
///
/// # Errors
/// It cannot be built.
pub fn image_of_workspace() -> Result<Image> {
    image::ensure(&workspace::root().join("tests/image"))
}

/// How hosts are run here.
///
/// # Errors
/// The environment demands something unknown.
pub fn accelerator(image: &Image) -> Result<crate::qemu::Accel> {
    accel::choose(|| {
        let directory = place::own()?;
        payload::write(&directory.join("payload.tar"), &directory.join("stage"), &own_program()?)?;
        let result = accel::trial(image, &directory);
        fs::remove_dir_all(&directory)?;
        result
    })
}

/// The program that goes into the hosts as their agent: `$LATHE_TESTHOST_BIN`, else this one.
///
/// # Errors
/// The kernel does not say where this program is.
pub fn own_program() -> Result<PathBuf> {
    match std::env::var_os("LATHE_TESTHOST_BIN") {
        Some(path) => Ok(path.into()),
        None => std::env::current_exe().context("cannot find my own program"),
    }
}

impl Hosts {
    fn plan(&self, accel: crate::qemu::Accel) -> Result<Plan> {
        if !(1..=MAX_HOSTS).contains(&self.hosts) {
            bail!("--hosts {}: 1 to {MAX_HOSTS} are possible", self.hosts);
        }
        Ok(Plan { hosts: self.hosts, cpus: self.cpus, memory_mib: self.memory, accel })
    }

    /// Writes the payload into `directory`. Returns whether there is something to install.
    fn pack(&self, directory: &Path) -> Result<bool> {
        let stage = directory.join("stage");
        fs::create_dir_all(&stage)?;
        let install = !self.no_install && workspace::stage(&stage)?;
        payload::write(&directory.join("payload.tar"), &stage, &own_program()?)?;
        fs::remove_dir_all(&stage)?;
        Ok(install)
    }
}

/// Boots hosts in `directory`; hosts that do not come up are tried again, aloud.
///
/// # Errors
/// They did not come up [`RETRIES`] + 1 times.
pub fn boot_patiently(plan: &Plan, image: &Image, directory: &Path) -> Result<HostSet> {
    let mut attempt = 0;
    loop {
        let begun = Instant::now();
        match HostSet::boot(plan, image, directory) {
            Ok(hosts) => {
                eprintln!("testhost: {} host(s) up in {:.1} s", plan.hosts, begun.elapsed().as_secs_f32());
                return Ok(hosts);
            }
            Err(error) if attempt < RETRIES => {
                attempt += 1;
                let saved = place::failures();
                save_consoles(directory, &saved)?;
                eprintln!("testhost: INFRASTRUCTURE FAILURE, retry {attempt} of {RETRIES}: {error:#}");
                eprintln!("testhost: consoles in {}", saved.display());
                remove_sockets(directory)?;
            }
            Err(error) => return Err(error),
        }
    }
}

fn remove_sockets(directory: &Path) -> Result<()> {
    for entry in fs::read_dir(directory)?.flatten() {
        if entry.path().extension().is_some_and(|extension| extension == "sock") {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

fn run_once(run: &Run) -> Result<u8> {
    if !(1..=run.hosts.hosts).contains(&run.on) {
        bail!("--on {}: there are {} hosts", run.on, run.hosts.hosts);
    }
    let image = image_of_workspace()?;
    let directory = place::own()?;
    let result = run_in(run, &image, &directory);
    let saved = match &result {
        Ok((0, _)) => None,
        Ok((_, hosts)) => {
            let saved = place::failures();
            hosts.save(&saved)?;
            Some(saved)
        }
        Err(_) => {
            let saved = place::failures();
            save_consoles(&directory, &saved)?;
            Some(saved)
        }
    };
    let status = match result {
        Ok((status, hosts)) => {
            drop(hosts);
            Ok(status)
        }
        Err(error) => {
            eprintln!("testhost: {error:#}");
            Ok(INFRASTRUCTURE)
        }
    };
    fs::remove_dir_all(&directory)?;
    if let Some(saved) = saved {
        eprintln!("testhost: journals and consoles in {}", saved.display());
    }
    status
}

fn run_in(run: &Run, image: &Image, directory: &Path) -> Result<(u8, HostSet)> {
    let plan = run.hosts.plan(accelerator(image)?)?;
    let install = run.hosts.pack(directory)?;
    let hosts = boot_patiently(&plan, image, directory)?;
    if install {
        for number in 1..=hosts.len() {
            workspace::install(&hosts.channel(number)?).with_context(|| format!("on host {number}"))?;
        }
    }
    let status = execute(&hosts.channel(run.on)?, &run.what);
    match status {
        Ok(status) => Ok((status, hosts)),
        Err(error) => {
            eprintln!("testhost: {error:#}");
            Ok((INFRASTRUCTURE, hosts))
        }
    }
}

fn bring_up(up: &Up) -> Result<u8> {
    let directory = place::named(&up.set.name)?;
    if hold::ask(&directory, &Request::Status).is_ok() {
        bail!("hosts called {:?} are up already: testhost down --name {0}", up.set.name);
    }
    if directory.exists() {
        if let Some(pid) = living_holder(&directory) {
            bail!(
                "hosts called {:?} are booting already (process {pid}): testhost down --name {0}",
                up.set.name
            );
        }
        fs::remove_dir_all(&directory)?;
    }
    let image = image_of_workspace()?;
    let plan = up.hosts.plan(accelerator(&image)?)?;
    fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
    let install = up.hosts.pack(&directory)?;
    start_holder(&plan, &directory)?;
    for number in (1..=plan.hosts).filter(|_| install) {
        workspace::install(&connected(&directory, number)?).with_context(|| format!("on host {number}"))?;
    }
    Ok(0)
}

/// Starts the process that holds the hosts and waits until they are up.
fn start_holder(plan: &Plan, directory: &Path) -> Result<()> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["hold", "--directory"]).arg(directory);
    command.args(["--hosts", &plan.hosts.to_string(), "--cpus", &plan.cpus.to_string()]);
    command.args(["--memory", &plan.memory_mib.to_string()]);
    if plan.accel == crate::qemu::Accel::Kvm {
        command.arg("--accelerated");
    }
    let log = directory.join("hold.log");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(fs::File::create(&log)?);
    // SAFETY: between fork and exec the closure makes one system call and allocates nothing.
    unsafe {
        command.pre_exec(|| nix::unistd::setsid().map(drop).map_err(io::Error::from));
    }
    let mut child = command.spawn().context("cannot start the holder")?;
    // The holder closes its output when the hosts are up, or dies.
    let mut word = String::new();
    child.stdout.take().context("the holder has no output")?.read_to_string(&mut word)?;
    eprint!("{}", fs::read_to_string(&log).unwrap_or_default());
    if word.trim() == "up" {
        return Ok(());
    }
    child.wait()?;
    let saved = place::failures();
    save_consoles(directory, &saved)?;
    fs::remove_dir_all(directory)?;
    bail!("the hosts did not come up, consoles in {}", saved.display())
}

fn keep(hold: &Hold) -> Result<u8> {
    fs::write(holder_file(&hold.directory), std::process::id().to_string())?;
    let image = image_of_workspace()?;
    let accel = if hold.accelerated { crate::qemu::Accel::Kvm } else { crate::qemu::Accel::Tcg };
    let hosts = boot_patiently(&hold.hosts.plan(accel)?, &image, &hold.directory)?;
    let listener = UnixListener::bind(hold::control_socket(&hold.directory))?;
    println!("up");
    io::stdout().flush()?;
    // Whoever waits for our word reads until the end.
    let null = fs::OpenOptions::new().write(true).open("/dev/null")?;
    nix::unistd::dup2_stdout(&null)?;
    hold::serve(hosts, &listener)?;
    Ok(0)
}

fn take_down(name: &str) -> Result<u8> {
    let directory = place::named(name)?;
    if !directory.exists() {
        eprintln!("testhost: no hosts called {name:?} are up");
        return Ok(0);
    }
    if hold::ask(&directory, &Request::Down).is_err() && directory.exists() {
        // The holder is still booting, or dead, and then its hosts with it.
        end_holder(&directory)?;
        fs::remove_dir_all(&directory)?;
    }
    Ok(0)
}

/// Kills the process that holds the hosts in `directory`, if it is one; its hosts die with it.
fn end_holder(directory: &Path) -> Result<()> {
    if let Some(pid) = living_holder(directory) {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL)?;
    }
    Ok(())
}

fn living_holder(directory: &Path) -> Option<i32> {
    let pid: i32 = fs::read_to_string(holder_file(directory)).ok()?.trim().parse().ok()?;
    // The number may belong to somebody else by now.
    let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let words: Vec<&[u8]> = command.split(|&byte| byte == 0).collect();
    let ours = words.contains(&"hold".as_bytes()) && words.contains(&directory.as_os_str().as_bytes());
    ours.then_some(pid)
}

fn holder_file(directory: &Path) -> PathBuf {
    directory.join("hold.pid")
}

fn list() -> Result<u8> {
    let base = place::runtime_directory();
    let Ok(entries) = fs::read_dir(&base) else { return Ok(0) };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        match hold::ask(&entry.path(), &Request::Status) {
            Ok((_, reply)) => println!("{name}: {} host(s)", reply.hosts),
            Err(_) if name.starts_with("run-") => println!("{name}: a run under way"),
            Err(_) => println!("{name}: booting or dead (testhost down --name {name} removes it)"),
        }
    }
    Ok(0)
}

fn attach(target: &Target) -> Result<Channel> {
    connected(&place::named(&target.set.name)?, target.on)
}

fn connected(directory: &Path, host: usize) -> Result<Channel> {
    let channel = hold::attach(directory, host)?;
    channel.wait_up(1, Duration::from_secs(10)).map_err(|error| anyhow!("{error}"))?;
    Ok(channel)
}

fn split(pair: &str) -> Result<(&str, &str)> {
    pair.split_once(':').with_context(|| format!("{pair:?} is not SRC:DST"))
}

fn push_all(channel: &Channel, pairs: &[String]) -> Result<()> {
    for pair in pairs {
        let (source, target) = split(pair)?;
        transfer::push(channel, Path::new(source), target)?;
    }
    Ok(())
}

/// Runs a command with our own streams. The result is its exit status or [`TIMED_OUT`].
fn execute(channel: &Channel, what: &What) -> Result<u8> {
    push_all(channel, &what.push)?;
    let variable = |pair: &String| {
        let (name, value) = pair.split_once('=').with_context(|| format!("--env {pair:?} is not K=V"))?;
        anyhow::Ok((name.to_owned(), value.to_owned()))
    };
    let env = what.env.iter().map(variable).collect::<Result<_>>()?;
    let process = channel.begin(&ExecSpec { argv: what.command.clone(), env, tty: None })?;
    if what.stdin {
        process.feed(io::stdin());
    } else {
        process.end_input()?;
    }
    finish(process, what.timeout.map(Duration::from_secs_f64))
}

fn finish(process: Process, limit: Option<Duration>) -> Result<u8> {
    match process.wait(&mut Passthrough, limit) {
        Ok(status) => Ok(u8::try_from(status).unwrap_or(u8::MAX)),
        Err(error @ ExecError::TimedOut(_)) => {
            eprintln!("testhost: {error}");
            Ok(TIMED_OUT)
        }
        Err(error) => Err(error.into()),
    }
}

fn shell(channel: &Channel) -> Result<u8> {
    use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};
    let argv = ["bash", "-l"].map(str::to_owned).to_vec();
    let term = std::env::var("TERM").unwrap_or_else(|_| "linux".into());
    let env = vec![("TERM".to_owned(), term)];
    let Ok(saved) = tcgetattr(io::stdin()) else {
        // No terminal: the shell reads a script from us.
        let process = channel.begin(&ExecSpec { argv, env, tty: None })?;
        process.feed(io::stdin());
        return finish(process, None);
    };
    let mut raw = saved.clone();
    cfmakeraw(&mut raw);
    let process = channel.begin(&ExecSpec { argv, env, tty: Some(terminal_size()) })?;
    tcsetattr(io::stdin(), SetArg::TCSANOW, &raw)?;
    process.feed(io::stdin());
    let result = finish(process, None);
    tcsetattr(io::stdin(), SetArg::TCSANOW, &saved)?;
    result
}

/// Rows and columns of our terminal.
fn terminal_size() -> (u16, u16) {
    let mut size = nix::pty::Winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCGWINSZ writes one winsize to the address it gets, and `size` is one that outlives the call.
    let result = unsafe { nix::libc::ioctl(0, nix::libc::TIOCGWINSZ, &mut size) };
    if result == 0 { (size.ws_row, size.ws_col) } else { (24, 80) }
}
