//! The monitors that are compared, how each is told to boot the same machine, and one such machine under way.
//!
//! QEMU gets what an experienced user gives it who wants it small and fast: no default devices, no display, the host's CPU, no legacy
//! timers, interrupt controllers or buses. Tried with 10.0.2 and the 6.12 cloud kernel: `microvm` without ACPI is not faster, and
//! without ACPI, PIT and PIC together the kernel hangs; q35 gains 5 % by the options below.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::initramfs::MARKER;

/// Memory of the machines, MiB.
pub const MEMORY_MIB: u64 = 256;
/// How long a machine may take to its init before it counts as hung. Emulated hosts need 3 to 10 s.
pub const BOOT_LIMIT: Duration = Duration::from_secs(90);
/// The command line of every guest.
const CMDLINE: &str = "console=ttyS0 quiet";
/// The most console output kept for a message about a failure, bytes.
const MAX_CONSOLE: usize = 256 * 1024;

/// Which monitor, set up how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Monitor {
    /// `lathe-vmm run`.
    Lathe,
    /// The same once more: how far two equal things differ here.
    LatheAgain,
    /// `qemu-system-x86_64 -M microvm`.
    QemuMicrovm,
    /// `qemu-system-x86_64 -M q35`.
    QemuQ35,
}

impl Monitor {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Lathe, Self::QemuMicrovm, Self::LatheAgain, Self::QemuQ35];

    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lathe => "lathe-vmm",
            Self::LatheAgain => "lathe-vmm (again)",
            Self::QemuMicrovm => "qemu microvm",
            Self::QemuQ35 => "qemu q35",
        }
    }
}

/// What boots, and the monitor under test.
#[derive(Clone, Debug)]
pub struct Setup {
    /// `lathe-vmm`.
    pub vmm: PathBuf,
    /// bzImage or vmlinux.
    pub kernel: PathBuf,
    /// The initial RAM disk; its init prints [`MARKER`].
    pub initrd: PathBuf,
    /// What `lathe-vmm run` is told besides.
    pub extra: &'static [&'static str],
}

/// A plain q35.
pub const Q35: &str = "q35,accel=kvm,hpet=off,smbus=off,sata=off,usb=off,vmport=off";
/// A plain microvm.
const MICROVM: &str = "microvm,accel=kvm,pit=off,pic=off,rtc=off,isa-serial=on";

/// QEMU with a machine of this type, the host's CPU, a serial console on its own streams, and nothing else.
pub fn qemu(machine: &str) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-M", machine, "-cpu", "host", "-nodefaults", "-no-user-config", "-display", "none"]);
    command.args(["-no-reboot", "-serial", "stdio"]);
    command
}

impl Setup {
    fn command(&self, monitor: Monitor) -> Command {
        let mut command = match monitor {
            Monitor::Lathe | Monitor::LatheAgain => return self.lathe(),
            Monitor::QemuMicrovm => qemu(MICROVM),
            Monitor::QemuQ35 => qemu(Q35),
        };
        command.args(["-smp", "1", "-m", &MEMORY_MIB.to_string()]);
        command.arg("-kernel").arg(&self.kernel).arg("-initrd").arg(&self.initrd).args(["-append", CMDLINE]);
        command
    }

    fn lathe(&self) -> Command {
        let mut command = Command::new(&self.vmm);
        command.arg("run").arg("--kernel").arg(&self.kernel).arg("--initrd").arg(&self.initrd);
        command.args(["--cpus", "1", "--memory", &format!("{MEMORY_MIB}M"), "--cmdline", CMDLINE]);
        command.args(self.extra);
        command
    }

    /// Starts a machine.
    ///
    /// # Errors
    /// The program cannot be run.
    pub fn start(&self, monitor: Monitor, log: &Path) -> Result<Machine> {
        let mut command = self.command(monitor);
        let begun = Instant::now();
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(File::create(log)?)
            .spawn()
            .with_context(|| format!("cannot run {}", command.get_program().display()))?;
        let console = child.stdout.take().context("the child has no output")?;
        Ok(Machine { child, console, begun, said: Vec::new(), log: log.to_owned() })
    }
}

/// A machine under way; ends when dropped.
pub struct Machine {
    child: Child,
    console: ChildStdout,
    begun: Instant,
    said: Vec<u8>,
    log: PathBuf,
}

impl Machine {
    /// The monitor's process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for init's line on the console. Returns the time since the monitor was started.
    ///
    /// # Errors
    /// It does not come within [`BOOT_LIMIT`], or the monitor ends before.
    pub fn wait_for_init(&mut self) -> Result<Duration> {
        let mut buffer = [0; 4096];
        loop {
            let left = BOOT_LIMIT.saturating_sub(self.begun.elapsed());
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            if poll(&mut [PollFd::new(std::os::fd::AsFd::as_fd(&self.console), PollFlags::POLLIN)], timeout)?
                == 0
            {
                bail!("no init after {} s; {}", BOOT_LIMIT.as_secs(), self.last_words());
            }
            let count = self.console.read(&mut buffer)?;
            let now = self.begun.elapsed();
            if count == 0 {
                bail!("the monitor ended before init; {}", self.last_words());
            }
            self.said.extend_from_slice(&buffer[..count]);
            let marker = MARKER.as_bytes();
            if self.said.windows(marker.len()).any(|window| window == marker) {
                return Ok(now);
            }
            if self.said.len() > MAX_CONSOLE {
                bail!("more than {MAX_CONSOLE} bytes on the console before init");
            }
        }
    }

    fn last_words(&self) -> String {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let console = String::from_utf8_lossy(&self.said);
        let tail: Vec<&str> = console.lines().rev().take(5).collect();
        format!("it said {:?}, the console {:?}", log.trim(), tail)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // It may have ended by itself; either way it is over afterwards.
        let _: io::Result<()> = self.child.kill();
        let _ = self.child.wait();
    }
}
