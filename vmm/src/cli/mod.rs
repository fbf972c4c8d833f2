//! The command line: options, errors for people, exit codes (0 done, 1 failed, 2 usage).

use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use lathe_vmm::control::wire::{ExitReason, OnPanic};

mod ask;
mod run;
mod serve;
mod terminal;

/// The microVM monitor of Lathe: one process per machine.
#[derive(Parser)]
#[command(name = "lathe-vmm", version, about, long_about = None)]
struct Options {
    #[command(subcommand)]
    command: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Serve a control socket: the one systemd hands in, or --control PATH
    Serve(ServeOptions),
    /// Boot a machine from files and wait until it ends
    Run(Box<RunOptions>),
    /// Send one command to a control socket and print the answer
    Ask(AskOptions),
}

#[derive(Args)]
struct AskOptions {
    /// The control socket
    control: String,
    /// The command as JSON, such as {"status":{}} or {"attach_disk":{"fd":0}}
    command: String,
    /// Opens this and sends it along, for the command to name by its place from 0; may be repeated
    #[arg(long = "fd", value_name = "FILE[,ro]|tap:NAME")]
    fds: Vec<String>,
}

#[derive(Args)]
struct ServeOptions {
    /// Make the control socket here instead of taking it from systemd
    #[arg(long, value_name = "PATH")]
    control: Option<String>,
}

#[derive(Args)]
struct RunOptions {
    /// Kernel image, bzImage or vmlinux
    #[arg(long, value_name = "FILE")]
    kernel: String,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE")]
    initrd: Option<String>,
    /// Raw disk image or block device; ",ro" makes it read-only; may be repeated
    #[arg(long = "disk", value_name = "FILE[,ro]")]
    disks: Vec<String>,
    /// Existing tap device; may be repeated
    #[arg(long = "tap", value_name = "NAME")]
    taps: Vec<String>,
    /// vCPUs
    #[arg(long, default_value_t = 1)]
    cpus: u32,
    /// Most vCPUs while it runs; otherwise as many as at boot
    #[arg(long)]
    cpus_max: Option<u32>,
    /// Guest memory, such as 512M or 2G
    #[arg(long, default_value = "512M", value_name = "AMOUNT", allow_hyphen_values = true)]
    memory: String,
    /// Most memory while it runs; otherwise as much as at boot
    #[arg(long, value_name = "AMOUNT")]
    memory_max: Option<String>,
    /// With a balloon, through which the guest also reports free pages
    #[arg(long)]
    balloon: bool,
    /// PCI slots for disks and nics that are attached while it runs, 0 to 16
    #[arg(long, default_value_t = 0, value_name = "COUNT")]
    hotplug_slots: u8,
    /// Kernel command line
    #[arg(long, default_value = "console=ttyS0 quiet", value_name = "TEXT")]
    cmdline: String,
    /// vsock: the guest's context id, and where to make the socket for connections to it
    #[arg(long, value_name = "CID,PATH")]
    vsock: Option<String>,
    /// Where the serial console goes: "stdio", "none", or a file, terminal or pipe
    #[arg(long, default_value = "stdio", value_name = "stdio|none|PATH")]
    console: String,
    /// End instead of booting again when the guest resets
    #[arg(long)]
    no_reboot: bool,
    /// What a panic of the guest's kernel does, once it has said so
    #[arg(long, default_value = "report", value_name = "report|pause|reboot|end", value_parser = on_panic)]
    on_panic: OnPanic,
    /// With a watchdog, and what it does when the guest has given no sign of life in time
    #[arg(long, value_name = "report|pause|reboot|end", value_parser = on_panic)]
    watchdog: Option<OnPanic>,
    /// Also serve a control socket, made here
    #[arg(long, value_name = "PATH")]
    control: Option<String>,
}

/// An error for people: what, optionally what to do.
#[derive(Debug)]
pub struct Failure {
    code: String,
    message: String,
    fix: Option<String>,
}

impl Failure {
    fn new(code: &str, message: impl ToString) -> Self {
        Self { code: code.to_owned(), message: message.to_string(), fix: None }
    }

    fn fix(mut self, fix: impl Into<String>) -> Self {
        self.fix = Some(fix.into());
        self
    }

    fn print(&self) {
        eprintln!("error[{}]: {}", self.code, self.message);
        if let Some(fix) = &self.fix {
            eprintln!("  fix: {fix}");
        }
    }
}

impl From<lathe_vmm::control::wire::Refusal> for Failure {
    fn from(refusal: lathe_vmm::control::wire::Refusal) -> Self {
        let fix = match refusal.code.as_str() {
            "kernel-image" => {
                Some("lathe-vmm run --kernel /boot/vmlinuz-$(uname -r) --initrd /boot/initrd.img-$(uname -r)")
            }
            "memory-too-small" => Some("lathe-vmm run --memory 512M    or more"),
            "bad-config" | "bad-descriptor" => Some("lathe-vmm run --help    shows each option"),
            "kvm" => Some("ls -l /dev/kvm; dmesg | grep -i kvm    and see whether virtualization is enabled"),
            _ => None,
        };
        Self { code: refusal.code, message: refusal.message, fix: fix.map(str::to_owned) }
    }
}

/// Makes the listening control socket at `path`, which must not exist.
fn listen(path: &str) -> Result<std::os::fd::OwnedFd, Failure> {
    use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
    use std::os::fd::AsRawFd;
    let failed = |error: nix::Error| {
        let failure = Failure::new("control-socket", format!("cannot listen at {path}: {}", error.desc()));
        match error {
            nix::Error::EADDRINUSE => failure.fix(format!("rm {path}    if no other monitor uses it")),
            _ => failure,
        }
    };
    let address = UnixAddr::new(path).map_err(failed)?;
    let fd =
        socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).map_err(failed)?;
    bind(fd.as_raw_fd(), &address).map_err(failed)?;
    Backlog::new(8).and_then(|backlog| listen(&fd, backlog)).map_err(failed)?;
    Ok(fd)
}

/// Removes the control socket when the process is done with it.
struct Unlink(Option<String>);
impl Drop for Unlink {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            let _ = std::fs::remove_file(path);
        }
    }
}

fn on_panic(text: &str) -> Result<OnPanic, String> {
    match text {
        "report" => Ok(OnPanic::Report),
        "pause" => Ok(OnPanic::Pause),
        "reboot" => Ok(OnPanic::Reboot),
        "end" => Ok(OnPanic::End),
        _ => Err("it must be report, pause, reboot or end".to_owned()),
    }
}

fn outcome(reason: &ExitReason) -> Result<(), Failure> {
    match reason {
        ExitReason::PowerOff | ExitReason::Reboot | ExitReason::Quit => Ok(()),
        ExitReason::Crash { message } => Err(Failure::new("guest-crash", message)),
        ExitReason::TripleFault => {
            Err(Failure::new("guest-crash", "the guest reset itself by a triple fault"))
        }
        ExitReason::Panic { message } => {
            Err(Failure::new("guest-panic", format!("the guest's kernel panicked: {message}")))
        }
        ExitReason::Watchdog => Err(Failure::new("guest-hangs", "the guest's watchdog expired")),
    }
}

/// Parses the command line and does what it says.
pub fn main() -> ExitCode {
    limit_arenas();
    let result = match Options::parse().command {
        Verb::Serve(options) => serve::serve(&options),
        Verb::Run(options) => run::run(&options),
        Verb::Ask(options) => ask::ask(&options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            failure.print();
            ExitCode::FAILURE
        }
    }
}

/// One heap for all threads: they allocate rarely, and each heap of glibc's keeps its own pages.
fn limit_arenas() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt changes a parameter of the allocator; no thread has been started yet.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}
