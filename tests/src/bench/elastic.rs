//! One elastic machine under way: `lathe-vmm` by its control socket, or QEMU by QMP, with the same guest and the same questions.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, send, socket};
use serde_json::{Value, json};

use super::counters::Counters;
use super::monitors;

/// Memory at boot, MiB.
pub const BOOT_MIB: u64 = 512;
/// Memory that can be plugged, MiB.
pub const PLUGGABLE_MIB: u64 = 1024;
/// Possible CPUs.
pub const CPUS: u32 = 4;
/// How long anything may take before it counts as failed.
pub const LIMIT: Duration = Duration::from_secs(60);
/// Longest answer of a monitor, bytes.
const MAX_ANSWER: usize = 64 * 1024;
/// `init_on_alloc=0`: else the guest clears each page that it gives back, each with a nested fault.
const CMDLINE: &str = "console=ttyS0 quiet init_on_alloc=0 memhp_default_state=online_movable";

/// Which monitor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `lathe-vmm run`.
    Lathe,
    /// `qemu-system-x86_64 -M q35`.
    Qemu,
}

impl Kind {
    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lathe => "lathe-vmm",
            Self::Qemu => "qemu q35",
        }
    }
}

/// What boots.
#[derive(Clone, Debug)]
pub struct Setup {
    /// `lathe-vmm`.
    pub vmm: PathBuf,
    /// The kernel.
    pub kernel: PathBuf,
    /// The initial RAM disk with `hand`.
    pub initrd: PathBuf,
    /// For sockets and logs.
    pub directory: PathBuf,
}

/// How the monitor is spoken to.
enum Control {
    Lathe(OwnedFd),
    Qemu(UnixStream, BufReader<UnixStream>),
}

/// A machine; ends when dropped.
pub struct Machine {
    child: Child,
    control: Control,
    input: ChildStdin,
    output: ChildStdout,
    said: String,
}

impl Setup {
    fn lathe(&self, socket: &Path) -> Command {
        let mut command = Command::new(&self.vmm);
        command.arg("run").arg("--kernel").arg(&self.kernel).arg("--initrd").arg(&self.initrd);
        command.args(["--cpus", "1", "--cpus-max", &CPUS.to_string(), "--balloon"]);
        command.args(["--memory", &format!("{BOOT_MIB}M")]);
        command.args(["--memory-max", &format!("{}M", BOOT_MIB + PLUGGABLE_MIB), "--cmdline", CMDLINE]);
        command.arg("--control").arg(socket);
        command
    }

    fn qemu(&self, socket: &Path) -> Command {
        let mut command = monitors::qemu(monitors::Q35);
        command.args(["-smp", &format!("1,maxcpus={CPUS}")]);
        command.args(["-m", &format!("{BOOT_MIB}M,maxmem={}M", BOOT_MIB + PLUGGABLE_MIB)]);
        command.args(["-object", &format!("memory-backend-ram,id=mem,size={PLUGGABLE_MIB}M")]);
        command.args(["-device", "virtio-mem-pci,id=vm,memdev=mem,requested-size=0"]);
        command.args(["-device", "virtio-balloon-pci,id=balloon,free-page-reporting=on,deflate-on-oom=on"]);
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", socket.display()));
        command.arg("-kernel").arg(&self.kernel).arg("-initrd").arg(&self.initrd).args(["-append", CMDLINE]);
        command
    }

    /// Boots a machine and waits for its hand.
    ///
    /// # Errors
    /// It does not come up.
    pub fn start(&self, kind: Kind) -> Result<Machine> {
        let path = self.directory.join("control.sock");
        let _ = std::fs::remove_file(&path);
        let mut command = match kind {
            Kind::Lathe => self.lathe(&path),
            Kind::Qemu => self.qemu(&path),
        };
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(self.directory.join("monitor.log"))?)
            .spawn()
            .with_context(|| format!("cannot run {}", command.get_program().display()))?;
        let input = child.stdin.take().context("the child has no input")?;
        let output = child.stdout.take().context("the child has no output")?;
        let control = match connected(kind, &path) {
            Ok(control) => control,
            Err(error) => {
                let _: io::Result<()> = child.kill();
                let log = std::fs::read_to_string(self.directory.join("monitor.log")).unwrap_or_default();
                return Err(error.context(log));
            }
        };
        let mut machine = Machine { child, control, input, output, said: String::new() };
        machine.expect("ready", LIMIT)?;
        machine.expect("memory ", LIMIT)?;
        Ok(machine)
    }
}

fn connected(kind: Kind, path: &Path) -> Result<Control> {
    let deadline = Instant::now() + LIMIT;
    loop {
        match open(kind, path) {
            Ok(control) => return Ok(control),
            Err(error) if Instant::now() > deadline => return Err(error.context("no control socket")),
            Err(_) => thread::sleep(Duration::from_millis(5)),
        }
    }
}

fn open(kind: Kind, path: &Path) -> Result<Control> {
    if kind == Kind::Lathe {
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
        connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
        return Ok(Control::Lathe(fd));
    }
    let stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(LIMIT))?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut greeting = String::new();
    reader.read_line(&mut greeting)?;
    let mut control = Control::Qemu(stream, reader);
    control.qmp("qmp_capabilities", json!({}))?;
    Ok(control)
}

impl Control {
    fn qmp(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let Self::Qemu(writer, reader) = self else { bail!("{command} is QEMU's") };
        writer
            .write_all(format!("{}\n", json!({ "execute": command, "arguments": arguments })).as_bytes())?;
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line)? == 0 {
                bail!("QEMU hung up");
            }
            let mut value: Value = serde_json::from_str(&line)?;
            if value.get("error").is_some() {
                bail!("{command}: {value}");
            }
            if value.get("return").is_some() {
                return Ok(value["return"].take());
            }
        }
    }

    fn lathe(&mut self, command: Value) -> Result<Value> {
        let Self::Lathe(fd) = self else { bail!("{command} is lathe-vmm's") };
        let request = json!({ "v": 2, "id": 1, "command": command }).to_string();
        send(fd.as_raw_fd(), request.as_bytes(), MsgFlags::MSG_NOSIGNAL)?;
        let mut buffer = vec![0; MAX_ANSWER];
        loop {
            let count = recv(fd.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
            if count == 0 {
                bail!("the monitor hung up");
            }
            let mut value: Value = serde_json::from_slice(&buffer[..count])?;
            if value.get("reply").is_some() {
                let result = value["reply"]["result"].take();
                return result.get("Ok").cloned().with_context(|| format!("{request}: {result}"));
            }
        }
    }
}

impl Machine {
    /// Tells the guest's hand something.
    ///
    /// # Errors
    /// The console is closed.
    pub fn tell(&mut self, line: &str) -> Result<()> {
        Ok(self.input.write_all(format!("{line}\n").as_bytes())?)
    }

    /// Waits until the guest says a line that begins with `prefix`; returns the rest of it. Lines before are forgotten.
    ///
    /// # Errors
    /// It says `error`, ends, or is silent for `limit`.
    pub fn expect(&mut self, prefix: &str, limit: Duration) -> Result<String> {
        let deadline = Instant::now() + limit;
        loop {
            while let Some((line, rest)) = self.said.split_once('\n') {
                let (line, rest) = (line.trim_end().to_owned(), rest.to_owned());
                self.said = rest;
                if let Some(tail) = line.strip_prefix(prefix) {
                    return Ok(tail.to_owned());
                }
                if line.starts_with("error") {
                    bail!("the guest: {line}");
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            if left.is_zero()
                || poll(&mut [PollFd::new(self.output.as_fd(), PollFlags::POLLIN)], timeout)? == 0
            {
                bail!("no {prefix:?} within {} s; unfinished: {:?}", limit.as_secs(), self.said);
            }
            let mut buffer = [0; 4096];
            let count = self.output.read(&mut buffer)?;
            if count == 0 {
                bail!("the machine ended while it should say {prefix:?}");
            }
            self.said.push_str(&String::from_utf8_lossy(&buffer[..count]));
        }
    }

    /// Plugs CPU `number` in; CPUs below it are there.
    ///
    /// # Errors
    /// The monitor refuses.
    pub fn plug_cpu(&mut self, number: u32) -> Result<()> {
        match &self.control {
            Control::Lathe(_) => self.control.lathe(json!({ "set_cpus": { "count": number + 1 } }))?,
            Control::Qemu(..) => self.control.qmp(
                "device_add",
                json!({ "driver": "host-x86_64-cpu", "id": format!("cpu{number}"), "socket-id": 0, "die-id": 0,
                        "module-id": 0, "core-id": number, "thread-id": 0 }),
            )?,
        };
        Ok(())
    }

    /// Takes CPU `number`, the highest, out again and waits until it is gone.
    ///
    /// # Errors
    /// The monitor refuses, or the guest does not let go.
    pub fn unplug_cpu(&mut self, number: u32) -> Result<()> {
        self.begin_unplug_cpu(number)?;
        wait(|| Ok(self.present_cpus()? == u64::from(number)), "the CPU leaves")
    }

    /// Asks the guest to let CPU `number`, the highest, go.
    ///
    /// # Errors
    /// The monitor refuses.
    pub fn begin_unplug_cpu(&mut self, number: u32) -> Result<()> {
        match &self.control {
            Control::Lathe(_) => self.control.lathe(json!({ "set_cpus": { "count": number } }))?,
            Control::Qemu(..) => self.control.qmp("device_del", json!({ "id": format!("cpu{number}") }))?,
        };
        Ok(())
    }

    /// How many CPUs are plugged in.
    ///
    /// # Errors
    /// The monitor refuses.
    pub fn present_cpus(&mut self) -> Result<u64> {
        if matches!(self.control, Control::Lathe(_)) {
            let status = self.control.lathe(json!({ "status": {} }))?;
            return status["status"]["cpus"]["present"].as_u64().context("no CPUs in the status");
        }
        let cpus = self.control.qmp("query-cpus-fast", json!({}))?;
        Ok(cpus.as_array().map_or(0, |cpus| cpus.len() as u64))
    }

    /// Asks for `mib` of pluggable memory.
    ///
    /// # Errors
    /// The monitor refuses.
    pub fn request_memory(&mut self, mib: u64) -> Result<()> {
        let bytes = mib << 20;
        match &self.control {
            Control::Lathe(_) => self.control.lathe(json!({ "set_plugged": { "bytes": bytes } }))?,
            Control::Qemu(..) => self.control.qmp(
                "qom-set",
                json!({ "path": "/machine/peripheral/vm", "property": "requested-size", "value": bytes }),
            )?,
        };
        Ok(())
    }

    /// What is plugged, MiB.
    ///
    /// # Errors
    /// The monitor refuses.
    pub fn plugged_mib(&mut self) -> Result<u64> {
        let bytes = if matches!(self.control, Control::Lathe(_)) {
            self.control.lathe(json!({ "status": {} }))?["status"]["memory"]["plugged_bytes"].as_u64()
        } else {
            self.control
                .qmp("qom-get", json!({ "path": "/machine/peripheral/vm", "property": "size" }))?
                .as_u64()
        };
        Ok(bytes.context("no size of the plugged memory")? >> 20)
    }

    /// Inflates the balloon to `mib`.
    ///
    /// # Errors
    /// The monitor refuses.
    pub fn inflate(&mut self, mib: u64) -> Result<()> {
        let bytes = mib << 20;
        match &self.control {
            Control::Lathe(_) => self.control.lathe(json!({ "set_balloon": { "bytes": bytes } }))?,
            // QEMU wants what the guest shall have; plugged memory counts there too.
            Control::Qemu(..) => {
                let plugged = self.plugged_mib()? << 20;
                self.control.qmp("balloon", json!({ "value": (BOOT_MIB << 20) + plugged - bytes }))?
            }
        };
        Ok(())
    }

    /// What the balloon holds, MiB.
    ///
    /// # Errors
    /// The monitor refuses.
    pub fn balloon_mib(&mut self) -> Result<u64> {
        if matches!(self.control, Control::Lathe(_)) {
            let status = self.control.lathe(json!({ "status": {} }))?;
            let bytes = status["status"]["memory"]["balloon_bytes"].as_u64();
            return Ok(bytes.context("no balloon in the status")? >> 20);
        }
        let plugged = self.plugged_mib()? << 20;
        let actual = self.control.qmp("query-balloon", json!({}))?["actual"].as_u64();
        Ok(((BOOT_MIB << 20) + plugged).saturating_sub(actual.context("no balloon")?) >> 20)
    }

    /// What it has cost its host so far.
    ///
    /// # Errors
    /// It is gone, or the host does not count.
    pub fn counters(&self) -> Result<Counters> {
        Counters::of(self.child.id())
    }

    /// Resident memory of the monitor's process, MiB.
    ///
    /// # Errors
    /// It is gone.
    pub fn resident_mib(&self) -> Result<u64> {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
        let kib: u64 = line.trim().trim_end_matches(" kB").parse()?;
        Ok(kib >> 10)
    }
}

/// Looks every two milliseconds until it holds.
///
/// # Errors
/// It does not within [`LIMIT`].
pub fn wait(mut holds: impl FnMut() -> Result<bool>, what: &str) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    while !holds()? {
        if Instant::now() > deadline {
            bail!("{what}: not within {} s", LIMIT.as_secs());
        }
        thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

impl Drop for Machine {
    fn drop(&mut self) {
        // It may have ended by itself; either way it is over afterwards.
        let _: io::Result<()> = self.child.kill();
        let _ = self.child.wait();
    }
}
