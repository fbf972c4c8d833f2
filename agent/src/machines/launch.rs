//! Starting a machine: from a stored record to guest code that runs.
//!
//! ```text
//! launcher ─► control socket ─► Hello ─► Define(+ descriptors) ─► Start ─► vCPU threads
//!                                  limits in the cgroups, rates on the tap ─► Go
//! ```
//! No guest code runs before every limit is in force. When anything fails the caller clears everything up; nothing is undone here.

use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream as StdStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use lathe_cgroup::{Bytes, MachineTree, MemoryPatch, Patch};
use lathe_vmm::control::definition::MAX_MEMORY;
use lathe_vmm::control::wire::{
    Answer, Command, DiskConfig, DiskRates, FdIndex, MachineConfig, NicConfig, OnPanic, OnReboot, Phase,
    VsockConfig,
};
use tokio::net::UnixStream;
use tokio::sync::mpsc;

use super::console::Console;
use super::core::Core;
use super::files;
use super::record::{Booted, Desired, Drive, Initrd, Kernel, Link, Net, Plug, Record};
use super::shape::{HOT_RATIO, Standing};
use crate::api::wire::OnTrouble;
use crate::bootimage::{self, BootImageSpec};
use crate::launcher::Launched;
use crate::monitor::{Monitor, MonitorError, Notice};
use crate::network::Ports;
use crate::problem::{Kind, Problem};

/// What a monitor needs besides its guest's memory before its limit is reached: devices, page tables, page cache of disks.
pub const OVERHEAD_BYTES: u64 = 64 << 20;
/// Most threads of a monitor: vCPUs, devices, io_uring workers.
const PIDS_MAX: u64 = 256;
/// First protocol version of monitors that can limit disks.
const DISK_RATES_VERSION: u32 = 3;
/// How many more disks and nics than at its start a machine can have while it runs: as many disks as monitors keep rings for.
pub const HOTPLUG_SLOTS: u8 = 4;
/// First protocol version of monitors that plug disks and say which they have.
const HOTPLUG_VERSION: u32 = 3;
/// Where distributions keep kernels and their initial RAM disks.
const BOOT: &str = "/boot";
/// Static busybox of Debian's busybox-static, for a shell in the built-in guest.
const BUSYBOX: &str = "/usr/bin/busybox";
/// What every guest is told: its console, and to end instead of hanging when it panics.
const CMDLINE: &str = "console=ttyS0 panic=-1";

/// For guests with memory that can be plugged in: it is brought online as it comes, and movable, so that it can be taken away again.
const CMDLINE_HOT: &str = "memhp_default_state=online_movable";
/// Linux brings memory online in blocks of this size, at least.
const MEMORY_BLOCK_BYTES: u64 = 128 << 20;

/// A monitor that runs guest code.
pub struct Live {
    /// Its control socket.
    pub monitor: Monitor,
    /// Process, unit, cgroups.
    pub launched: Launched,
}

/// What came of a start.
pub struct Started {
    /// The monitor.
    pub live: Live,
    /// What it says.
    pub notices: mpsc::Receiver<Notice>,
    /// What it was started with.
    pub booted: Booted,
    /// vCPU threads that are where they are limited.
    pub placed: usize,
    /// Its tier as it is in force.
    pub standing: Standing,
}

/// Descriptors of one message, and their indices.
#[derive(Default)]
struct Handover(Vec<OwnedFd>);

impl Handover {
    fn add(&mut self, descriptor: impl Into<OwnedFd>) -> FdIndex {
        self.0.push(descriptor.into());
        // At most 16 disks and a handful of others.
        (self.0.len() - 1) as FdIndex
    }
}

/// A problem of a monitor, in the words of the machine.
pub fn monitor_problem(name: &str, what: &str, error: MonitorError) -> Problem {
    match error {
        MonitorError::Refused { code, message } if code == "kernel-image" => Problem::new(
            Kind::Impossible,
            "kernel-image",
            format!("{name} cannot boot this kernel: {message}"),
        )
        .fix("use a bzImage or an ELF vmlinux for x86_64: lathe run --kernel FILE"),
        MonitorError::Refused { code, message } if code == "memory-too-small" => {
            let message = format!("{name} has too little memory for this kernel: {message}");
            Problem::new(Kind::Impossible, "launch-failed", message).fix("give it more: --memory 256M")
        }
        MonitorError::Refused { code, message } => {
            Problem::new(Kind::Impossible, "launch-failed", format!("{name} cannot be started: {message}"))
                .detail(format!("its monitor says {code} while {what}"))
        }
        other => {
            let message = format!("{name} cannot be started: {other}");
            Problem::new(Kind::Internal, "launch-failed", message).detail(format!("while {what}"))
        }
    }
}

/// Starts the machine up to `Go`.
///
/// # Errors
/// `launch-failed`, `kernel-image`, `kvm-missing`, `disk-in-use`, `cores-over-capacity`, `internal`.
pub async fn launch(core: &Core, record: &Record, console: &Arc<Console>) -> Result<Started, Problem> {
    let name = record.name.as_str();
    // Whatever can be missing is looked for before anything is started.
    let mut handover = Handover::default();
    let (mut config, ours) = define(core, record, &mut handover).await?;
    let launched = core.launcher.launch(name).await?;
    let failed = |what: &'static str| move |error| monitor_problem(name, what, error);
    let (monitor, notices) = Monitor::connect(&launched.socket).map_err(failed("connecting to it"))?;
    let phase = monitor.hello().await.map_err(failed("greeting it"))?;
    if monitor.version() < DISK_RATES_VERSION {
        // It would refuse what it does not know; that its disks are not limited is said by the machine's shape.
        config.disk_rates = DiskRates::default();
    }
    if phase != Phase::Empty {
        let message = format!("{name}: its new monitor is already in phase {phase:?}");
        return Err(Problem::new(Kind::Internal, "launch-failed", message));
    }
    if monitor.version() < HOTPLUG_VERSION {
        config.hotplug_slots = 0;
    }
    let descriptors: Vec<_> = handover.0.iter().map(AsFd::as_fd).collect();
    monitor
        .call(Command::Define(Box::new(config)), &descriptors)
        .await
        .map_err(failed("being told what the machine is"))?;
    // The monitor has its own copies now.
    drop(handover);
    let vcpu_tids =
        match monitor.call(Command::Start {}, &[]).await.map_err(failed("making memory and devices"))? {
            Answer::Started { vcpu_tids } => vcpu_tids,
            _ => return Err(failed("making memory and devices")(MonitorError::Unexpected("start"))),
        };
    let Desired { tier, memory_bytes, .. } = record.desired;
    let mut standing = Standing { tier, memory_bytes, among_others: true };
    if let Some(tree) = &launched.tree {
        place(tree, &vcpu_tids)?;
        limit(core, tree, record)?;
        core.walls.set_tier(tree, tier)?;
        standing = core.standings.enforce(tree, tier, memory_bytes)?;
        super::cores::admit(core, name, tree)?;
    }
    if let Some(ports) = &core.ports {
        for nic in ready_nics(record) {
            ports.limit(&nic.tap, record.rate_of(nic)).await?;
        }
        super::uplink::join(core, record, ready_nics(record).map(|nic| nic.tap.clone()).collect()).await;
    }
    console.attach(ours);
    monitor.tell(Command::Go {}).await.map_err(failed("letting the guest run"))?;
    let booted = Booted {
        vcpus: record.vcpus(),
        memory_bytes: record.desired.memory_bytes,
        host_boot_id: core.boot_id.clone(),
        at_unix_sec: super::core::unix_sec(),
    };
    Ok(Started { live: Live { monitor, launched }, notices, booted, placed: vcpu_tids.len(), standing })
}

/// Describes the machine and opens everything it needs; with our end of its console.
async fn define(
    core: &Core,
    record: &Record,
    handover: &mut Handover,
) -> Result<(MachineConfig, UnixStream), Problem> {
    let kvm = handover.add(open_kvm(&core.kvm)?);
    let kernel = handover.add(open(&kernel_path(core, record))?);
    let initrd_path = initrd_path(core, record).await?;
    let initrd = initrd_path.as_deref().map(open).transpose()?.map(|file| handover.add(file));
    let (ours, theirs) = console_pair()?;
    let console = handover.add(theirs);
    let disks = open_disks(core, record, handover)?;
    let mut nics = Vec::new();
    if let Some(ports) = &core.ports {
        for nic in ready_nics(record) {
            let tap = handover.add(open_nic(ports.as_ref(), record, nic).await?);
            nics.push(NicConfig { tap, mac: nic.mac, mtu: None });
        }
    }
    let listener = handover.add(vsock_listener(&core.config.socket_dir(&record.name))?);
    let memory_max_bytes = memory_max(core, record);
    let config = MachineConfig {
        kvm,
        cpus: record.vcpus(),
        cpus_max: Some(record.vcpus_max(core.most().cpu.0)),
        memory_max_bytes: Some(memory_max_bytes),
        balloon: true,
        hotplug_slots: HOTPLUG_SLOTS,
        memory_bytes: record.desired.memory_bytes,
        kernel,
        initrd,
        cmdline: cmdline(core, record, memory_max_bytes > record.desired.memory_bytes),
        console: Some(console),
        disks,
        disk_rates: DiskRates { iops: record.desired.iops, bytes_per_sec: 0 },
        nics,
        vsock: Some(VsockConfig { cid: record.cid, listener: Some(listener) }),
        rng: true,
        on_reboot: OnReboot::Reboot,
        on_panic: told(record.on_panic),
        watchdog: record.watchdog.map(told),
    };
    Ok((config, ours))
}

fn told(action: OnTrouble) -> OnPanic {
    match action {
        OnTrouble::Report => OnPanic::Report,
        OnTrouble::Pause => OnPanic::Pause,
        OnTrouble::Reboot => OnPanic::Reboot,
        OnTrouble::End => OnPanic::End,
    }
}

fn open_kvm(path: &Path) -> Result<File, Problem> {
    fs::OpenOptions::new().read(true).write(true).open(path).map_err(|cause| {
        Problem::new(Kind::Impossible, "kvm-missing", format!("cannot open {}: {cause}", path.display()))
            .detail("without KVM no machine runs on this host")
            .fix("lathe doctor")
    })
}

fn open(path: &Path) -> Result<File, Problem> {
    File::open(path).map_err(|cause| {
        Problem::new(Kind::Impossible, "launch-failed", format!("cannot open {}: {cause}", path.display()))
    })
}

fn kernel_path(core: &Core, record: &Record) -> PathBuf {
    match record.source.kernel {
        Kernel::Own { .. } => core.config.machine_dir(&record.name).join("kernel"),
        Kernel::Host => core.host_kernel(),
    }
}

async fn initrd_path(core: &Core, record: &Record) -> Result<Option<PathBuf>, Problem> {
    match record.source.initrd {
        Initrd::None => Ok(None),
        Initrd::Own { .. } => Ok(Some(core.config.machine_dir(&record.name).join("initrd"))),
        Initrd::Host => host_initrd(core, Path::new(BOOT)),
        Initrd::BuiltIn => built_in(core).await.map(Some),
    }
}

/// The initial RAM disk of the host's own kernel, which mounts a machine's disk. A kernel that can do so by itself needs none.
fn host_initrd(core: &Core, boot: &Path) -> Result<Option<PathBuf>, Problem> {
    let release = &core.kernel_release;
    let path = boot.join(format!("initrd.img-{release}"));
    if path.exists() {
        return Ok(Some(path));
    }
    let modules = core.config.modules_root.join(release).join("modules.builtin");
    let built_in = fs::read_to_string(modules).unwrap_or_default();
    if built_in.lines().any(|line| line.ends_with("/virtio_blk.ko")) {
        return Ok(None);
    }
    let message =
        format!("{} does not exist; without it kernel {release} cannot mount a disk", path.display());
    Err(Problem::new(Kind::Impossible, "launch-failed", message).fix(format!(
        "update-initramfs -c -k {release}        or: lathe run --kernel FILE --initrd FILE --disk FILE"
    )))
}

/// The built-in guest's initramfs for the host's kernel, made when it is not there or not of these inputs.
async fn built_in(core: &Core) -> Result<PathBuf, Problem> {
    let release = core.kernel_release.clone();
    let config = core.config.clone();
    // One at a time: several machines started at once want the same file.
    let _building = core.building.lock().await;
    let build = move || {
        let out = config.state_dir.join("boot").join(format!("guest-{release}.cpio"));
        let busybox = Some(PathBuf::from(BUSYBOX)).filter(|path| path.exists());
        let spec = |busybox| BootImageSpec {
            kernel_release: &release,
            modules_root: &config.modules_root,
            guest_binary: &config.guest_binary,
            busybox,
            extra_modules: &[],
            out: &out,
        };
        // A dynamic busybox is of no use, and no reason not to boot.
        bootimage::build(&spec(busybox)).or_else(|_| bootimage::build(&spec(None)))
    };
    let built = tokio::task::spawn_blocking(build).await;
    let built = built.map_err(|cause| Problem::internal("cannot build the built-in guest", cause))?;
    built.map(|image| image.path).map_err(|cause| {
        let mut message = format!("cannot build the built-in guest: {cause}");
        if let Some(source) = std::error::Error::source(&cause) {
            message = format!("{message}: {source}");
        }
        Problem::new(Kind::Impossible, "launch-failed", message).fix("lathe doctor")
    })
}

fn console_pair() -> Result<(UnixStream, StdStream), Problem> {
    let failed = |cause| Problem::internal("cannot make a console", cause);
    let (ours, theirs) = StdStream::pair().map_err(failed)?;
    ours.set_nonblocking(true).map_err(failed)?;
    theirs.set_nonblocking(true).map_err(failed)?;
    Ok((UnixStream::from_std(ours).map_err(failed)?, theirs))
}

/// A new console for a monitor that lives: our end, and the one to hand over.
///
/// # Errors
/// `internal`.
pub fn new_console() -> Result<(UnixStream, OwnedFd), Problem> {
    console_pair().map(|(ours, theirs)| (ours, theirs.into()))
}

fn vsock_listener(folder: &Path) -> Result<UnixListener, Problem> {
    let path = folder.join("vsock.sock");
    let failed = |cause| Problem::internal(format!("cannot listen on {}", path.display()), cause);
    fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(failed)?;
    match fs::remove_file(&path) {
        Err(cause) if cause.kind() != std::io::ErrorKind::NotFound => return Err(failed(cause)),
        _ => {}
    }
    let listener = UnixListener::bind(&path).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    Ok(listener)
}

fn open_disks(core: &Core, record: &Record, handover: &mut Handover) -> Result<Vec<DiskConfig>, Problem> {
    // One that is still being made comes later.
    let ready = record.source.disks.iter().filter(|drive| drive.link != Link::Adding);
    ready.map(|drive| Ok(disk_config(drive, handover.add(open_disk(core, &record.name, drive)?)))).collect()
}

/// Nics that a machine starts with.
fn ready_nics(record: &Record) -> impl Iterator<Item = &Net> {
    // One that is still being made comes later.
    record.all_nics().filter(|nic| nic.plug != Plug::Adding)
}

/// Makes a nic's tap, or finds it, and opens its queue.
///
/// # Errors
/// `launch-failed` when another process has the queue, `internal`.
pub async fn open_nic(ports: &dyn Ports, record: &Record, nic: &Net) -> Result<OwnedFd, Problem> {
    ports.ensure(&nic.tap, nic.mac, &record.all_addresses()).await?.ok_or_else(|| {
        let message = format!("tap {} is held by another process", nic.tap);
        Problem::new(Kind::Conflict, "launch-failed", message).fix(format!("ip -d link show {}", nic.tap))
    })
}

/// Makes the ports of a machine's nics again, or finds them: whatever they check is of this record and of this lathed's configuration.
///
/// # Errors
/// `internal`; the ports before are done.
pub async fn find_ports(core: &Core, record: &Record) -> Result<(), Problem> {
    let Some(ports) = &core.ports else { return Ok(()) };
    let addresses = record.all_addresses();
    for nic in ready_nics(record) {
        ports.ensure(&nic.tap, nic.mac, &addresses).await?;
    }
    Ok(())
}

/// What a monitor is told of a disk, whose file has this index in the message.
pub fn disk_config(drive: &Drive, fd: FdIndex) -> DiskConfig {
    DiskConfig { fd, read_only: drive.is_read_only(), serial: drive.name.clone() }
}

/// Opens and locks a disk of `machine`.
///
/// # Errors
/// `disk-in-use` with the machine that has it, `internal`.
pub fn open_disk(core: &Core, machine: &str, drive: &Drive) -> Result<File, Problem> {
    let path = files::disk_path(&core.config, machine, drive);
    files::open_disk(&path, drive.is_read_only()).map_err(|problem| match core.user_of_disk(&path, machine) {
        Some(owner) if problem.code == "disk-in-use" => {
            let message = format!("{} is in use by machine {owner}", path.display());
            Problem { message, ..problem }.detail("").fix(format!("lathe stop {owner}"))
        }
        _ => problem,
    })
}

/// The most memory that it may have while it runs: its bound or what the host has, and no more than what it can carry, because a guest prepares
/// for all of it. In steps of what Linux calls a memory block.
fn memory_max(core: &Core, record: &Record) -> u64 {
    let boot = record.desired.memory_bytes;
    let bound = record.memory_max_bytes.unwrap_or(core.most().memory.0);
    let hot = bound.saturating_sub(boot).min(boot.saturating_mul(HOT_RATIO));
    boot.saturating_add(hot - hot % MEMORY_BLOCK_BYTES).min(MAX_MEMORY)
}

fn cmdline(core: &Core, record: &Record, hot: bool) -> String {
    if let Some(own) = &record.source.cmdline {
        return own.clone();
    }
    let own = own_cmdline(core, record);
    if hot { format!("{own} {CMDLINE_HOT}") } else { own }
}

fn own_cmdline(core: &Core, record: &Record) -> String {
    let root = record.source.disks.first().filter(|drive| record.boots_from(&drive.name));
    match (&record.source.initrd, root) {
        (Initrd::BuiltIn, _) => format!("{CMDLINE} quiet"),
        (_, None) => CMDLINE.to_owned(),
        (_, Some(root)) => {
            let root = files::root_device(&files::disk_path(&core.config, &record.name, root));
            format!("{CMDLINE} root={root} rw")
        }
    }
}

/// Puts vCPU threads where they can be told from the monitor's others; twice is once.
///
/// # Errors
/// `internal`.
pub fn place(tree: &MachineTree, vcpu_tids: &[i32]) -> Result<(), Problem> {
    for tid in vcpu_tids {
        let tid = u32::try_from(*tid)
            .map_err(|_| Problem::internal("placing vCPU threads", format!("thread id {tid}")))?;
        tree.place_vcpu(tid)
            .map_err(|cause| Problem::internal(format!("cannot place vCPU thread {tid}"), cause))?;
    }
    Ok(())
}

/// Puts a new machine's limits in force.
fn limit(core: &Core, tree: &MachineTree, record: &Record) -> Result<(), Problem> {
    let failed = |what: &'static str| {
        let unit = tree.unit().display().to_string();
        move |cause: lathe_cgroup::Error| Problem::internal(format!("cannot limit {what} of {unit}"), cause)
    };
    let max = record.desired.memory_bytes.saturating_add(OVERHEAD_BYTES);
    let memory = MemoryPatch { max: Patch::Set(Bytes(max)), ..MemoryPatch::default() };
    tree.set_memory(&memory).map_err(failed("memory"))?;
    tree.set_pids(Patch::Set(PIDS_MAX)).map_err(failed("processes"))?;
    core.walls.begin(tree);
    let at_usec = super::sample::usec(core, Instant::now());
    core.walls.limit(tree, record.desired.cpu_milli, record.vcpus(), at_usec).map(drop)
}
