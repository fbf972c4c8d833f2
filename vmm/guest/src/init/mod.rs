//! PID 1 of the built-in guest: filesystems, modules, loopback, then the agent's own service, until shutdown.
//!
//! ```text
//! mounts ─► modules (as devices ask) ─► loopback ─► vsock service, power button, wants, goals, console, hotplug and late modules:
//!                                                   a thread each
//!                                                   main thread: signals ─► reap orphans │ shut down
//! ```
//! Whatever fails here is said on the console and not fatal: a guest with a message is better than a dead one.

pub mod modules;
mod mounts;
mod power;
mod stop;
mod watchdog;

use std::fs;
use std::io::{self, BufRead};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, SigmaskHow, Signal, pthread_sigmask};

use self::modules::Stage;
use crate::hotplug::Events;
use crate::resources::memory;
use crate::{children, inside, network, serve, shutdown, sys};

/// Stack of a service thread, bytes.
const STACK_BYTES: usize = 128 * 1024;
/// How long modules that can wait do so for the host's hello.
const HELLO_LIMIT: Duration = Duration::from_secs(2);
/// What follows a hello at once, the network's set-up and a first command, goes before them.
const LATE_PAUSE: Duration = Duration::from_millis(100);
/// Between a shell's end on the console and the next.
const CONSOLE_PAUSE: Duration = Duration::from_secs(1);
const SHELL: &str = "/bin/sh";

/// Never returns: ends in power-off or reboot, or with the kernel's panic that follows the end of PID 1.
pub fn run() -> io::Result<()> {
    let started = Instant::now();
    // Before there are threads, so that all inherit it and signals wait for `signals` below.
    let signals = blocked_signals()?;
    for problem in mounts::mount_all() {
        say(&problem);
    }
    let mounted = started.elapsed();
    let loaded = modules::load_for_devices(Path::new(modules::FOLDER), Stage::Boot);
    let loading = started.elapsed() - mounted;
    for problem in &loaded.problems {
        say(problem);
    }
    if let Err(error) = loopback_up() {
        say(&format!("no loopback: {error}"));
    }
    memory::bring_online_automatically();
    match serve::listen() {
        Ok(listener) => start("serve", move || serve::accept_all(&listener)),
        Err(error) => say(&format!("the host cannot reach this guest, no vsock: {error}")),
    }
    start("power", power::watch);
    start("wants", inside::socket::serve);
    start("hotplug", hotplug);
    say(&format!(
        "ready after {} ms, {} ms since the kernel started; mounts took {} ms, {} modules {} ms",
        started.elapsed().as_millis(),
        uptime_msec(),
        mounted.as_millis(),
        loaded.count,
        loading.as_millis()
    ));
    if Path::new(SHELL).exists() {
        start("console", console);
    }
    wait_for_shutdown(&signals)
}

/// Loads the modules that boot does not wait for, then what is plugged in.
fn hotplug() -> io::Result<()> {
    // From before the modules are loaded on, so that no device is missed in between.
    let events = Events::new()?;
    serve::wait_for_hello(HELLO_LIMIT);
    std::thread::sleep(LATE_PAUSE);
    let load = || {
        let loaded = modules::load_for_devices(Path::new(modules::FOLDER), Stage::Later);
        loaded.problems.iter().for_each(|problem| say(problem));
    };
    load();
    if watchdog::is_there() {
        start("watchdog", watchdog::feed);
    }
    events.follow(load)
}

/// One line on the console.
fn say(message: &str) {
    eprintln!("lathe-guest: {message}");
}

fn uptime_msec() -> u128 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME);
    now.map_or(0, |now| Duration::from(now).as_millis())
}

fn start(name: &'static str, service: impl FnOnce() -> io::Result<()> + Send + 'static) {
    let service = move || {
        if let Err(error) = service() {
            say(&format!("{name} ended: {error}"));
        }
    };
    let started = std::thread::Builder::new().name(name.into()).stack_size(STACK_BYTES).spawn(service);
    if let Err(error) = started {
        say(&format!("cannot start {name}: {error}"));
    }
}

fn blocked_signals() -> io::Result<SigSet> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGCHLD, Signal::SIGUSR2, Signal::SIGTERM, Signal::SIGINT, Signal::SIGPWR] {
        signals.add(signal);
    }
    pthread_sigmask(SigmaskHow::SIG_BLOCK, Some(&signals), None)?;
    // Ctrl-Alt-Delete comes as a signal and does not reset at once.
    let _ = nix::sys::reboot::set_cad_enabled(false);
    Ok(signals)
}

fn wait_for_shutdown(signals: &SigSet) -> io::Result<()> {
    use lathe_guest::protocol::ShutdownMode::{PowerOff, Reboot};
    loop {
        match signals.wait()? {
            Signal::SIGCHLD => drop(children::reap()),
            Signal::SIGINT => return stop::stop(Reboot),
            _ => return stop::stop(PowerOff),
        }
    }
}

fn loopback_up() -> io::Result<()> {
    let index = fs::read_to_string("/sys/class/net/lo/ifindex")?;
    let index = index.trim().parse().map_err(|_| io::Error::other("no index"))?;
    network::link_up(&mut network::netlink::Netlink::new()?, index, None)
}

/// A shell on the console, once somebody has pressed Enter there; until then it costs nothing.
fn console() -> io::Result<()> {
    loop {
        say("press Enter for a shell");
        let mut line = String::new();
        if io::stdin().lock().read_line(&mut line)? == 0 {
            return Ok(());
        }
        let mut command = Command::new(SHELL);
        command.env_clear().env("PATH", "/bin:/sbin").env("HOME", "/root").env("TERM", "vt100");
        command.current_dir("/root");
        let terminal = || fs::OpenOptions::new().read(true).write(true).open("/dev/console");
        command.stdin(terminal()?).stdout(terminal()?).stderr(terminal()?);
        sys::in_new_session(&mut command, true);
        let child = children::spawn(&mut command)?;
        let far = Instant::now() + Duration::from_secs(u32::MAX.into());
        crate::connection::wait(child.pidfd.as_fd(), nix::poll::PollFlags::POLLIN, far)?;
        if children::collect(child.pid).is_none() {
            children::abandon(child.pid);
        }
        std::thread::sleep(CONSOLE_PAUSE);
    }
}

/// `poweroff` and `reboot` as commands inside the guest.
pub fn signal_init(signal: i32) -> io::Result<()> {
    sys::kill(1, signal)
}

/// What the commands send.
pub const SIGNALS: [(&str, i32); 2] =
    [("poweroff", shutdown::SIGNAL_POWER_OFF), ("reboot", shutdown::SIGNAL_REBOOT)];
