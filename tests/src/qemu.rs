//! One emulated (or accelerated) host as a QEMU process: its command line, its start, its end.
//!
//! What is measured about this command line stands in the comments beside it. QEMU never outlives the process that
//! started it: it gets SIGKILL with its parent, even if that one dies by SIGKILL.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use crate::hub;
use crate::image::Image;

/// How the host's CPUs are run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accel {
    /// KVM with nested virtualization.
    Kvm,
    /// QEMU's translator, emulating AMD SVM.
    Tcg,
}

/// What one host is made of.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Its number, from 1.
    pub number: usize,
    /// CPUs.
    pub cpus: usize,
    /// Memory, MiB.
    pub memory_mib: usize,
    /// How it is run.
    pub accel: Accel,
    /// Whether it has a card on the private segment.
    pub segment: bool,
}

/// A running QEMU.
#[derive(Debug)]
pub struct Qemu {
    child: Child,
    directory: PathBuf,
    number: usize,
}

/// Path of one of host `number`'s files.
pub fn path_of(directory: &Path, number: usize, what: &str) -> PathBuf {
    directory.join(format!("host{number}-{what}"))
}

impl Qemu {
    /// Starts a host with its files in `directory`, where `payload.tar` lies ready.
    ///
    /// # Errors
    /// QEMU cannot be started.
    pub fn start(machine: &Machine, image: &Image, directory: &Path) -> Result<Self> {
        let log = File::create(path_of(directory, machine.number, "qemu.log"))?;
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(arguments(machine, image, directory))
            // The overlay of snapshot=on is an unlinked file in here; a runtime directory may be a small tmpfs.
            .env("TMPDIR", "/var/tmp")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let child = spawn_bound(command).context("cannot start qemu-system-x86_64")?;
        Ok(Self { child, directory: directory.to_owned(), number: machine.number })
    }

    /// Connects to one of the sockets that QEMU makes, waiting for it to appear.
    ///
    /// # Errors
    /// QEMU ends first (with what it said), or the socket does not come.
    pub fn connect(&mut self, what: &str) -> Result<UnixStream> {
        let path = path_of(&self.directory, self.number, what);
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            if let Ok(stream) = UnixStream::connect(&path) {
                return Ok(stream);
            }
            if let Some(status) = self.child.try_wait()? {
                let log =
                    fs::read_to_string(path_of(&self.directory, self.number, "qemu.log")).unwrap_or_default();
                bail!("QEMU ended ({status}): {}", log.trim());
            }
            if Instant::now() > deadline {
                bail!("QEMU made no {} within 20 s", path.display());
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Gives a command without arguments to QEMU's monitor (QMP) and waits for its answer.
    ///
    /// # Errors
    /// The monitor cannot be reached or refuses.
    pub fn monitor(&mut self, command: &str) -> Result<()> {
        let stream = self.connect("qmp.sock")?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        let mut writer = stream.try_clone()?;
        let mut lines = BufReader::new(stream).lines();
        for execute in ["qmp_capabilities", command] {
            writeln!(writer, "{{\"execute\":\"{execute}\"}}")?;
            loop {
                let line = lines.next().ok_or_else(|| anyhow!("QEMU's monitor closed"))??;
                let value: serde_json::Value = serde_json::from_str(&line)?;
                if value.get("return").is_some() {
                    break;
                }
                if let Some(error) = value.get("error") {
                    bail!("QEMU's monitor refuses {execute}: {error}");
                }
            }
        }
        Ok(())
    }

    /// Ends it at once. Nothing in it is worth an orderly end: its disk is thrown away.
    pub fn kill(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        self.kill();
    }
}

fn arguments(machine: &Machine, image: &Image, directory: &Path) -> Vec<OsString> {
    let number = machine.number;
    let path = |what: &str| path_of(directory, number, what).display().to_string();
    let mut list: Vec<String> = Vec::new();
    let mut add = |words: &[&str]| list.extend(words.iter().map(|&word| word.to_owned()));
    match machine.accel {
        Accel::Kvm => add(&["-accel", "kvm", "-cpu", "host"]),
        // EPYC boots inner guests a third faster and steadier than `max`; thread=single hangs them.
        Accel::Tcg => add(&["-accel", "tcg,thread=multi", "-cpu", "EPYC,svm=on"]),
    }
    add(&[
        "-smp",
        &machine.cpus.to_string(),
        "-M",
        "q35,sata=off,smbus=off",
        "-m",
        &format!("{}M", machine.memory_mib),
    ]);
    add(&["-nodefaults", "-no-user-config", "-display", "none", "-nic", "none", "-rtc", "base=utc"]);
    add(&["-name", &format!("lathe-testhost-{number}")]);
    add(&["-kernel", &image.kernel.display().to_string(), "-append", &command_line(machine)]);
    // nvme and ext4 are built into the 6.12 cloud kernel, so there is no initrd.
    add(&[
        "-drive",
        &format!("file={},format=raw,if=none,id=root,snapshot=on,cache=unsafe", image.disk.display()),
    ]);
    add(&["-device", "nvme,drive=root,serial=root"]);
    let payload = directory.join("payload.tar").display().to_string();
    add(&["-drive", &format!("file={payload},format=raw,if=none,id=payload,readonly=on")]);
    add(&["-device", "virtio-blk-pci,drive=payload,serial=payload"]);
    add(&["-device", "virtio-rng-pci", "-device", "virtio-serial-pci"]);
    add(&["-chardev", &format!("socket,id=cmd,path={},server=on,wait=off", path("cmd.sock"))]);
    add(&["-device", "virtserialport,chardev=cmd,name=cmd"]);
    add(&["-qmp", &format!("unix:{},server=on,wait=off", path("qmp.sock"))]);
    add(&["-serial", &format!("file:{}", path("console.log"))]);
    if machine.segment {
        let (ours, hubs) = (hub::host_socket(directory, number), hub::hub_socket(directory, number));
        let (ours, hubs) = (ours.display(), hubs.display());
        add(&[
            "-netdev",
            &format!(
                "dgram,id=segment,local.type=unix,local.path={ours},remote.type=unix,remote.path={hubs}"
            ),
        ]);
        add(&["-device", &format!("virtio-net-pci,netdev=segment,mac=52:54:00:4c:00:{number:02x},romfile=")]);
    }
    list.into_iter().map(OsString::from).collect()
}

fn command_line(machine: &Machine) -> String {
    let number = machine.number;
    // A fixed machine id per number: stable over a reboot, different between hosts.
    format!(
        "root=/dev/nvme0n1 rw console=ttyS0 panic=-1 psi=1 mitigations=off no_timer_check nowatchdog net.ifnames=0 quiet loglevel=4 \
         systemd.show_status=0 systemd.hostname=host{number} systemd.machine_id=1a7e{number:028x} lathe.host={number}"
    )
}

/// Spawns a process that is killed with this one. The kernel ties that to the spawning *thread*, so a thread that
/// lives as long as the process does it.
fn spawn_bound(command: Command) -> io::Result<Child> {
    type Job = (Command, Sender<io::Result<Child>>);
    static SPAWNER: OnceLock<Sender<Job>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (sender, jobs) = channel::<Job>();
        thread::spawn(move || {
            for (mut command, answer) in jobs {
                bind_to_parent(&mut command);
                // Whoever asked may have given up.
                let _ = answer.send(command.spawn());
            }
        });
        sender
    });
    let (answer, result) = channel();
    spawner.send((command, answer)).map_err(|_| io::Error::other("the spawning thread is gone"))?;
    result.recv().map_err(|_| io::Error::other("the spawning thread is gone"))?
}

fn bind_to_parent(command: &mut Command) {
    let parent = nix::unistd::getpid();
    // SAFETY: between fork and exec the closure makes two system calls and allocates nothing.
    unsafe {
        command.pre_exec(move || {
            nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
            // The parent may have died before the line above.
            if nix::unistd::getppid() == parent {
                Ok(())
            } else {
                Err(io::Error::from_raw_os_error(nix::libc::ESRCH))
            }
        });
    }
}
