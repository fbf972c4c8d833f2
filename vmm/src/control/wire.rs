//! The control protocol of one machine's monitor: what travels on its control socket.
//!
//! The socket is `SOCK_SEQPACKET`: one message is one packet of JSON, at most [`MAX_MESSAGE_BYTES`] long, and any
//! message may carry descriptors by `SCM_RIGHTS`. A command names each descriptor it needs by its index in that
//! packet ([`FdIndex`]), so that several can travel at once and none is guessed.
//!
//! ```text
//! client ── Request{v, id, command} + descriptors ──▶ monitor
//! client ◀── Reply{v, id, result}                 ── monitor     (exactly one per request, in order)
//! client ◀── Event                  + descriptors ── monitor     (any time)
//! ```
//!
//! Several clients may be connected ([`MAX_CLIENTS`]); every one receives every event. A machine runs on when its
//! last client goes. Whoever speaks here is trusted to own the machine, but nothing it sends may crash the monitor.
//!
//! Phases and what is allowed in them: see [`Phase`].

use serde::{Deserialize, Serialize};

/// The protocol version that this build speaks. 2 added [`Command::PrepareCpus`], [`Command::SetCpus`], [`Command::SetPlugged`],
/// [`Command::SetBalloon`], [`Command::AttachDisk`], [`Command::AttachNic`], [`Command::Detach`], [`Command::GrowDisk`], their answers
/// and events, the dormant parts of [`MachineConfig`], [`MachineConfig::on_panic`] and what is said of panics. 3 added
/// [`Command::SetDiskRates`], [`MachineConfig::disk_rates`], [`Status::disk_rates`], [`Status::disks`], [`MachineConfig::watchdog`] and
/// what is said of it. 4 added [`Status::nics`]. 5 added [`Status::watchdog_expired`].
pub const VERSION: u32 = 5;
/// Oldest protocol version that this build still understands.
pub const OLDEST_VERSION: u32 = 1;
/// Longest message in bytes, both ways.
pub const MAX_MESSAGE_BYTES: usize = 64 * 1024;
/// Most descriptors in one message (the kernel's `SCM_MAX_FD` is 253).
pub const MAX_MESSAGE_FDS: usize = 32;
/// Most clients connected at once.
pub const MAX_CLIENTS: usize = 8;

/// Index of a descriptor among those that came with the same message, from 0.
pub type FdIndex = u8;

/// One message from a client.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// Protocol version, [`OLDEST_VERSION`]..=[`VERSION`].
    pub v: u32,
    /// Chosen by the client, repeated in the reply.
    pub id: u64,
    /// What to do.
    pub command: Command,
}

/// The monitor's answer to the request of the same `id`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Reply {
    /// Protocol version.
    pub v: u32,
    /// The request's id.
    pub id: u64,
    /// What came of it.
    pub result: Result<Answer, Refusal>,
}

/// Everything that a monitor can be told.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Command {
    /// Versions and phase. Allowed in every phase, first of all.
    Hello {},
    /// Describes the machine and hands its descriptors over. `Empty` → `Defined`.
    Define(Box<MachineConfig>),
    /// Creates memory, devices and vCPU threads; no guest code runs yet. `Defined` → `Ready`. Answers with [`Answer::Started`].
    Start {},
    /// Lets the vCPUs run guest code. `Ready` → `Running`.
    Go {},
    /// Stops the vCPUs between two instructions. `Running` → `Paused`.
    Pause {},
    /// `Paused` → `Running`.
    Resume {},
    /// Presses the ACPI power button. `Running`.
    PowerButton {},
    /// Phase, exit reason, thread ids.
    Status {},
    /// Counters of devices and vCPUs.
    Stats {},
    /// Hands in a `SOCK_SEQPACKET` socket: for each connection that the guest makes to `port` of CID 2 (the host), the
    /// monitor sends one packet of JSON [`VsockArrival`] with a connected stream socket on it. Replaces an earlier one of the
    /// same port. While nobody holds the other end, the guest's connections are refused. Any phase from `Defined` on.
    VsockListen {
        /// vsock port, 1..=0xffff_fffe.
        port: u32,
        /// The socket.
        fd: FdIndex,
    },
    /// Creates the threads of vCPUs `0..count`, so that they can be put into cgroups; the guest is not told. Threads that are there
    /// stay. Answers with [`Answer::Cpus`]. `Ready`, `Running`, `Paused`. Since version 2.
    PrepareCpus {
        /// vCPUs, 1..=`cpus_max`.
        count: u32,
    },
    /// Asks the guest to have vCPUs `0..count`: those that it lacks are plugged in at once (prepared first if they are not),
    /// for those above it gets an eject request, highest first, which it may refuse or answer late. Replaces an earlier target; the
    /// same one again repeats the requests. Answers with [`Answer::Cpus`] without waiting; [`Event::CpusChanged`] follows.
    /// `Ready`, `Running`, `Paused`. Since version 2.
    SetCpus {
        /// vCPUs, 1..=`cpus_max`.
        count: u32,
    },
    /// Asks the guest to have this much of the pluggable memory (virtio-mem `requested_size`). Answers with [`Answer::Memory`]
    /// without waiting; [`Event::MemoryChanged`] follows as the guest plugs and unplugs. `Ready`, `Running`, `Paused`. Since version 2.
    SetPlugged {
        /// Bytes, a multiple of 2 MiB, at most `memory_max_bytes - memory_bytes`.
        bytes: u64,
    },
    /// Asks the guest to put this much of its memory into the balloon. As [`Command::SetPlugged`] otherwise.
    SetBalloon {
        /// Bytes, a multiple of 4 KiB, less than the memory that the guest has.
        bytes: u64,
    },
    /// Plugs a disk in. Answers with [`Answer::Attached`]; the guest finds it on its own. As many as there are slots
    /// ([`MachineConfig::hotplug_slots`]), and at most 4 more disks than at the start. `Ready`, `Running`, `Paused`. Since version 2.
    AttachDisk(DiskConfig),
    /// Plugs a network device in. As [`Command::AttachDisk`] otherwise.
    AttachNic(NicConfig),
    /// Asks the guest to let a disk or a nic go, also one from the start, if the machine has slots. It may refuse or never
    /// answer; asking again repeats the request. [`Event::DeviceDetached`] tells when it has; a reboot lets go at once. `Ready`, `Running`,
    /// `Paused`. Since version 2.
    Detach {
        /// `block0`, `net0`, …
        device: String,
    },
    /// Looks how large the file or block device of a disk is now, and tells the guest when it has grown. It never shrinks. Answers with
    /// [`Answer::DiskSize`]. `Ready`, `Running`, `Paused`. Since version 2.
    GrowDisk {
        /// `block0`, …
        device: String,
    },
    /// Changes how much all disks together may do, from the next request on; also of disks that come later. Answers with
    /// [`Answer::DiskRates`]. `Ready`, `Running`, `Paused`. Since version 3.
    SetDiskRates(DiskRates),
    /// Replaces where the console goes (a stream socket, pty or pipe). Any phase from `Defined` on. `None` only keeps the ring of
    /// the last output.
    ConsoleAttach {
        /// The new end.
        fd: Option<FdIndex>,
    },
    /// The last console output kept by the monitor, at most 32 KiB, as [`Answer::Console`].
    ConsoleTail {},
    /// Ends the monitor at once, as a power cut.
    Quit {},
}

/// What a successful command answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// To [`Command::Hello`].
    Hello {
        /// Newest protocol version spoken.
        version: u32,
        /// Oldest protocol version understood.
        oldest_version: u32,
        /// Version of the monitor's build.
        build: String,
        /// Where the machine is.
        phase: Phase,
    },
    /// To [`Command::Start`] : the thread ids to place in cgroups before `Go`.
    Started {
        /// One per vCPU, in order of vCPU index.
        vcpu_tids: Vec<i32>,
    },
    /// To [`Command::PrepareCpus`] and [`Command::SetCpus`].
    Cpus(CpuStatus),
    /// To [`Command::SetPlugged`] and [`Command::SetBalloon`].
    Memory(MemoryStatus),
    /// To [`Command::AttachDisk`] and [`Command::AttachNic`].
    Attached {
        /// Its name: `block` or `net` with a number that no other device of this machine had or will have.
        device: String,
    },
    /// To [`Command::GrowDisk`].
    DiskSize {
        /// Bytes.
        bytes: u64,
    },
    /// To [`Command::SetDiskRates`]: what is in force now.
    DiskRates(DiskRates),
    /// To [`Command::Status`].
    Status(Box<Status>),
    /// To [`Command::Stats`].
    Stats(Stats),
    /// To [`Command::ConsoleTail`].
    Console {
        /// Output of the guest, lossily as UTF-8.
        text: String,
    },
    /// To all others.
    Done {},
}

/// Why a command was not carried out; nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// Stable, kebab-case, for programs: `bad-request`, `wrong-phase`, `bad-config`, `bad-descriptor`, `kernel-image`, `kvm`,
    /// `device`, `unsupported-version`.
    pub code: String,
    /// One sentence for people: what, where, both numbers.
    pub message: String,
}

/// Where a machine is in its life. Transitions: `Empty → Defined → Ready → Running ⇄ Paused`, and from each of them
/// `→ Ended`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Nothing known yet.
    Empty,
    /// Configuration and descriptors are here.
    Defined,
    /// vCPU threads exist and wait.
    Ready,
    /// Guest code runs.
    Running,
    /// vCPUs stand still.
    Paused,
    /// The machine is over; the process exits as soon as its clients have been told.
    Ended,
}

/// Everything that makes a machine. Sizes in bytes unless named otherwise.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// `/dev/kvm`, opened for reading and writing.
    pub kvm: FdIndex,
    /// vCPUs at boot, 1..=64.
    pub cpus: u32,
    /// Most vCPUs while it runs, `cpus`..=64; otherwise `cpus`.
    #[serde(default)]
    pub cpus_max: Option<u32>,
    /// Guest memory at boot in bytes, a multiple of 2 MiB, at least 64 MiB.
    pub memory_bytes: u64,
    /// Most memory while it runs, bytes, a multiple of 2 MiB: what exceeds `memory_bytes` is a dormant virtio-mem region. Otherwise
    /// `memory_bytes`, and no such device.
    #[serde(default)]
    pub memory_max_bytes: Option<u64>,
    /// virtio-balloon, with free page reporting, statistics and deflation on OOM.
    #[serde(default)]
    pub balloon: bool,
    /// bzImage or ELF (vmlinux), opened for reading.
    pub kernel: FdIndex,
    /// Initial RAM disk.
    pub initrd: Option<FdIndex>,
    /// PCI slots for disks and nics that come while it runs, 0..=16; 31 together with all devices from the start. With any, disks
    /// and nics from the start can go, too.
    #[serde(default)]
    pub hotplug_slots: u8,
    /// Kernel command line, at most 2047 bytes, without NUL.
    pub cmdline: String,
    /// 16550 at I/O port 0x3f8, IRQ 4: the stream that it speaks on.
    pub console: Option<FdIndex>,
    /// Block devices, in PCI order: /dev/vda, /dev/vdb, …
    #[serde(default)]
    pub disks: Vec<DiskConfig>,
    /// How much all disks together may do. Since version 3, and not sent to older ones when it is unlimited.
    #[serde(default, skip_serializing_if = "DiskRates::is_unlimited")]
    pub disk_rates: DiskRates,
    /// Network devices.
    #[serde(default)]
    pub nics: Vec<NicConfig>,
    /// virtio-vsock.
    pub vsock: Option<VsockConfig>,
    /// virtio-rng, fed by getrandom(2).
    #[serde(default)]
    pub rng: bool,
    /// What a reset by the guest does.
    #[serde(default)]
    pub on_reboot: OnReboot,
    /// What a panic of the guest's kernel does, besides [`Event::GuestPanicked`]. Since version 2.
    #[serde(default)]
    pub on_panic: OnPanic,
    /// With a watchdog (Intel's 6300ESB; drivers `i6300esb`), and what it does when it expires, besides [`Event::WatchdogExpired`]. Since
    /// version 3, and not sent to older ones when there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub watchdog: Option<OnPanic>,
}

/// What happens when the guest resets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnReboot {
    /// The machine boots again in the same process.
    #[default]
    Reboot,
    /// The machine ends with [`ExitReason::Reboot`].
    End,
}

/// What happens when the guest's kernel panics, or its watchdog expires.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnPanic {
    /// Nothing more: the guest resets by itself, or hangs, as its own `panic=` has it.
    #[default]
    Report,
    /// The machine is paused as it is.
    Pause,
    /// The machine boots again in the same process, whatever [`OnReboot`] says.
    Reboot,
    /// The machine ends with [`ExitReason::Panic`] or [`ExitReason::Watchdog`].
    End,
}

/// One virtio-block device.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// A raw regular file or a block device; opened for reading and, unless `read_only`, writing. O_DIRECT is the opener's choice.
    pub fd: FdIndex,
    /// Refuses writes and tells the guest so.
    #[serde(default)]
    pub read_only: bool,
    /// What the guest reads as the disk's serial, at most 20 bytes of ASCII.
    #[serde(default)]
    pub serial: String,
}

/// How much all disks of a machine may do together. Every read, write, flush, discard and write-zeroes is one operation as the guest
/// sends it; bytes are those read, written and zeroed. Requests wait for their time in the order in which they come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskRates {
    /// Operations per second; 0 is unlimited.
    pub iops: u64,
    /// Bytes per second; 0 is unlimited.
    pub bytes_per_sec: u64,
}

impl DiskRates {
    /// Neither is limited.
    pub fn is_unlimited(&self) -> bool {
        *self == Self::default()
    }
}

/// One virtio-net device.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NicConfig {
    /// A tap queue with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR` and a vnet header of 12 bytes.
    pub tap: FdIndex,
    /// Unicast address.
    pub mac: [u8; 6],
    /// What the guest learns as MTU, 68..=65535.
    pub mtu: Option<u16>,
}

/// The virtio-vsock device. Host → guest: a client of `listener` writes `CONNECT <port>\n`, reads `OK <host port>\n` (or the end
/// of the file), then has the stream. Guest → host: [`Command::VsockListen`].
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The guest's context id, 3..=0xffff_fffe.
    pub cid: u32,
    /// A listening Unix stream socket.
    pub listener: Option<FdIndex>,
}

/// Accompanies the stream of a connection that the guest made.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockArrival {
    /// Host port that the guest connected to.
    pub port: u32,
    /// The guest's own port.
    pub guest_port: u32,
}

/// Sent to every client without being asked.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// The phase changed.
    Phase(Phase),
    /// The guest reset and boots again.
    Rebooted {},
    /// The guest's kernel says that it has panicked: once between two resets. Since version 2.
    GuestPanicked {
        /// What it wrote to its console last, at most 200 characters; from the guest, not to be trusted.
        message: String,
    },
    /// The guest has given no sign of life for as long as it had allowed itself. Since version 3.
    WatchdogExpired {},
    /// The guest reset by a triple fault, which is seldom what it wanted; [`Event::Rebooted`] follows. Since version 2.
    TripleFault {},
    /// The machine is over.
    Ended(ExitReason),
    /// The guest has ejected or taken vCPUs. Since version 2.
    CpusChanged(CpuStatus),
    /// The guest has plugged, unplugged, inflated or deflated, has noticed that it is where it shall be, or its driver came or went; at most
    /// some twenty per second. Since version 2.
    MemoryChanged(MemoryStatus),
    /// The guest has let a device go: it is gone, its descriptors are closed. Since version 2.
    DeviceDetached {
        /// `block0`, `net0`, …
        device: String,
    },
    /// A device was stopped because its driver broke the rules; it waits for a reset by the guest.
    DeviceNeedsReset {
        /// `block0`, `net0`, `vsock`, …
        device: String,
        /// What the driver did.
        reason: String,
    },
}

/// A message from the monitor, as read by clients.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Message {
    /// Answers a request.
    Reply(Reply),
    /// Came by itself.
    Event(Event),
}

/// Why a machine is over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitReason {
    /// The guest powered itself off (ACPI S5).
    PowerOff,
    /// The guest reset, and `on_reboot` says end.
    Reboot,
    /// The guest's kernel panicked, and `on_panic` says end. Since version 2.
    Panic {
        /// As in [`Event::GuestPanicked`].
        message: String,
    },
    /// The guest's watchdog expired, and `watchdog` says end. Since version 3.
    Watchdog,
    /// The guest reset by a triple fault, and `on_reboot` says end. Since version 2.
    TripleFault,
    /// A client sent [`Command::Quit`], or SIGTERM came.
    Quit,
    /// KVM reported something that cannot go on.
    Crash {
        /// What KVM said.
        message: String,
    },
}

/// To [`Command::Status`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// Where the machine is.
    pub phase: Phase,
    /// Set once it is over.
    pub exit: Option<ExitReason>,
    /// vCPU thread ids, once started.
    pub vcpu_tids: Vec<i32>,
    /// How often the guest has reset since `Go`.
    pub reboots: u64,
    /// What the guest's kernel said when it panicked, until it is reset. Since version 2.
    #[serde(default)]
    pub panic: Option<String>,
    /// It is paused because the guest's watchdog has expired; false from monitors that cannot tell. Since version 5.
    #[serde(default)]
    pub watchdog_expired: bool,
    /// Nanoseconds of CLOCK_MONOTONIC at `Go`; 0 before.
    pub go_monotonic_nsec: u64,
    /// vCPUs, once started. Since version 2.
    #[serde(default)]
    pub cpus: Option<CpuStatus>,
    /// Memory, once started. Since version 2.
    #[serde(default)]
    pub memory: Option<MemoryStatus>,
    /// What its disks may do, once started. Since version 3.
    #[serde(default)]
    pub disk_rates: Option<DiskRates>,
    /// Disks, once started; absent from monitors that cannot tell. Since version 3.
    #[serde(default)]
    pub disks: Option<DisksStatus>,
    /// Nics, once started; absent from monitors that cannot tell. Since version 4.
    #[serde(default)]
    pub nics: Option<NicsStatus>,
}

/// The disks of a machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DisksStatus {
    /// Those that the guest can have, in the order in which they came; also one that shall go, until it has.
    pub disks: Vec<DiskStatus>,
    /// So many more can be attached now.
    pub free: u32,
}

/// One disk of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskStatus {
    /// `block0`, …
    pub device: String,
    /// As in [`DiskConfig::serial`].
    pub serial: String,
    /// Bytes that the guest was told last.
    pub bytes: u64,
}

/// The nics of a machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicsStatus {
    /// Those that the guest can have, in the order in which they came; also one that shall go, until it has.
    pub nics: Vec<NicStatus>,
    /// So many more can be attached now.
    pub free: u32,
}

/// One nic of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicStatus {
    /// `net0`, …
    pub device: String,
    /// As in [`NicConfig::mac`].
    pub mac: [u8; 6],
}

/// The vCPUs of a machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuStatus {
    /// Most that there can be.
    pub possible: u32,
    /// What the guest was last asked to have.
    pub target: u32,
    /// What it has: plugged in and not ejected. The guest may have taken some of them offline.
    pub present: u32,
    /// How many of those that it was last asked to give back it has refused to (`_OST`); it may be asked again.
    #[serde(default)]
    pub refused: u32,
    /// Thread ids by vCPU number, also of prepared and of ejected ones; threads live as long as the machine.
    pub vcpu_tids: Vec<i32>,
}

/// The memory of a machine, bytes. What the guest has is `boot_bytes + plugged_bytes - balloon_bytes`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryStatus {
    /// There from boot on.
    pub boot_bytes: u64,
    /// Size of the virtio-mem region; 0 without one.
    pub pluggable_bytes: u64,
    /// What the guest was last asked to plug.
    pub requested_bytes: u64,
    /// What it has plugged: mapped into the guest now.
    pub plugged_bytes: u64,
    /// A driver serves the virtio-mem region.
    pub plug_driver: bool,
    /// `requested_bytes` have changed since that driver read them: what it does may still be for an earlier size, so that `plugged_bytes`
    /// may only be passing. False without a driver and from monitors that cannot tell.
    #[serde(default)]
    pub plug_unread: bool,
    /// What the guest was last asked to put into the balloon.
    pub balloon_target_bytes: u64,
    /// What the balloon holds.
    pub balloon_bytes: u64,
    /// A driver serves the balloon.
    pub balloon_driver: bool,
    /// The same of that driver, `balloon_target_bytes` and `balloon_bytes`.
    #[serde(default)]
    pub balloon_unread: bool,
    /// What the balloon's driver says of the guest's memory; absent until it has. Nothing of it is to be trusted.
    #[serde(default)]
    pub guest: Option<GuestMemory>,
}

/// Statistics of the guest's memory by its own account (virtio 1.2, 5.5.6.3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestMemory {
    /// Unused, bytes.
    pub free_bytes: u64,
    /// All, bytes.
    pub total_bytes: u64,
    /// An estimate of what new applications could get without swapping, bytes.
    pub available_bytes: u64,
    /// Page cache that could be dropped, bytes.
    pub disk_caches_bytes: u64,
    /// Swapped in since boot, bytes.
    pub swap_in_bytes: u64,
    /// Swapped out since boot, bytes.
    pub swap_out_bytes: u64,
    /// Major page faults since boot.
    pub major_faults: u64,
    /// Processes killed for lack of memory since boot.
    pub oom_kills: u64,
}

/// Counters since the machine was started.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Stats {
    /// One per disk.
    pub disks: Vec<DiskStats>,
    /// One per nic.
    pub nics: Vec<NicStats>,
    /// vCPU exits to user space, all vCPUs.
    pub exits: u64,
}

/// Counters of one disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskStats {
    /// Completed reads.
    pub reads: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Completed writes.
    pub writes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Completed flushes.
    pub flushes: u64,
    /// Completed discards and write-zeroes.
    pub discards: u64,
    /// Requests answered with an error.
    pub errors: u64,
}

/// Counters of one nic; rx is towards the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicStats {
    /// Frames to the guest.
    pub rx_packets: u64,
    /// Bytes to the guest, without the vnet header.
    pub rx_bytes: u64,
    /// Frames dropped because the guest had no buffer.
    pub rx_dropped: u64,
    /// Frames from the guest.
    pub tx_packets: u64,
    /// Bytes from the guest, without the vnet header.
    pub tx_bytes: u64,
    /// Frames that the tap refused.
    pub tx_dropped: u64,
}
