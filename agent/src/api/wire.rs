//! What travels over the agent's Unix socket: JSON bodies of `/v1/…`, shared by `lathed` and `lathe`.
//!
//! Amounts are integers of the smallest unit: milliCPU, bytes, bit/s, I/O operations per second. Everything that answers carries
//! `schema`; fields are only ever added. Requests refuse unknown fields. The OpenAPI document is generated from these types.
//!
//! | method and path | body → answer | who |
//! |---|---|---|
//! | `GET /v1/version` | → [`Version`] | view |
//! | `GET /v1/host` | → [`HostView`] | view |
//! | `GET /v1/host/uplink` | → [`UplinkView`] | view |
//! | `PUT /v1/host/uplink[?plan=true]` | [`UplinkRequest`] → [`UplinkView`], or [`PlanView`] | change |
//! | `DELETE /v1/host/uplink` | → [`UplinkView`] | change |
//! | `GET /v1/machines` | → [`MachineList`] | view |
//! | `POST /v1/machines[?plan=true]` | [`RunRequest`] → 201 [`MachineView`], or [`PlanView`] | change |
//! | `GET /v1/machines/{name}` | → [`MachineView`] with its revision as `ETag` | view |
//! | `PATCH /v1/machines/{name}[?plan=true]` | [`ResizeRequest`], `If-Match: REVISION` → 200 or 202 [`ResizeView`], or [`PlanView`] | change |
//! | `GET /v1/machines/{name}/forecast` | → [`forecast::ForecastView`] | view |
//! | `PATCH /v1/machines/{name}/foresight` | [`foresight::ForesightRequest`] → [`MachineView`] | change |
//! | `GET /v1/machines/{name}/why` | → [`foresight::WhyView`] | view |
//! | `PUT /v1/machines/{name}/forecast/blueprint` | [`by_hand::BlueprintRequest`] → [`by_hand::ByHandView`] | change |
//! | `DELETE /v1/machines/{name}/forecast/blueprint` | → [`by_hand::ByHandView`] | change |
//! | `PUT /v1/machines/{name}/forecast/events/{event}` | [`by_hand::AnnounceRequest`] → [`by_hand::ByHandView`] | change |
//! | `DELETE /v1/machines/{name}/forecast/events/{event}` | → [`by_hand::ByHandView`] | change |
//! | `GET /v1/machines/{name}/operations` | → [`OperationList`] | view |
//! | `GET /v1/operations/{id}` | → [`OperationView`] | view |
//! | `DELETE /v1/operations/{id}` | cancels it → [`OperationView`] | change |
//! | `POST /v1/machines/{name}/stop` | [`StopRequest`] → [`MachineView`] | change |
//! | `POST /v1/machines/{name}/start` | → [`MachineView`] | change |
//! | `DELETE /v1/machines/{name}?purge=bool&force=bool` | → [`Removed`] | change |
//! | `GET /v1/machines/{name}/disks` | → [`DiskList`] | view |
//! | `POST /v1/machines/{name}/disks[?plan=true]` | [`DiskAddRequest`] → 201 [`DiskView`], or [`PlanView`] | change |
//! | `PATCH /v1/machines/{name}/disks/{disk}[?plan=true]` | [`DiskGrowRequest`] → [`DiskView`], or [`PlanView`] | change |
//! | `DELETE /v1/machines/{name}/disks/{disk}?purge=bool&timeout_sec=N[&plan=true]` | → [`Removed`], or [`PlanView`] | change |
//! | `GET /v1/machines/{name}/nics` | → [`NicList`] | view |
//! | `POST /v1/machines/{name}/nics[?plan=true]` | [`NicAddRequest`] → 201 [`NicView`], or [`PlanView`] | change |
//! | `PATCH /v1/machines/{name}/nics/{nic}[?plan=true]` | [`NicLimitRequest`] → [`NicView`], or [`PlanView`] | change |
//! | `DELETE /v1/machines/{name}/nics/{nic}?timeout_sec=N[&plan=true]` | → [`Removed`], or [`PlanView`] | change |
//! | `GET /v1/machines/{name}/logs?lines=N&follow=bool` | → text/plain, the console | view |
//! | `POST /v1/machines/{name}/exec` | `Connection: upgrade`, `Upgrade: lathe-guest`: then frames of the guest protocol, first an `Exec` request | change |
//! | `POST /v1/machines/{name}/console` | `Upgrade: lathe-console`: then raw bytes both ways | change |
//! | `GET /v1/images` | → [`ImageList`] | view |
//! | `PUT /v1/images/{name}?format=raw\|tar` | bytes → [`ImageView`] | change |
//! | `DELETE /v1/images/{name}` | → [`Removed`] | change |
//! | `PUT /v1/uploads` | bytes → [`Upload`]; kept one hour unless a machine uses it | change |
//! | `DELETE /v1/uploads/{id}` | → [`Removed`] | change |
//! | `GET /v1/peers` | → [`PeerList`] | view |
//! | `POST /v1/cluster/init`, `…/token`, `…/join` | [`ClusterInit`], [`TokenRequest`], [`JoinRequest`] → [`ClusterView`], [`TokenView`], [`ClusterView`] | change |
//! | `GET /v1/doctor` | → [`DoctorReport`] | view |
//! | `GET /v1/events` | → server-sent events of [`EventView`] | view |
//! | `GET /v1/openapi.json`, `GET /metrics` | | view |
//!
//! Errors have status 4xx/5xx and [`ErrorBody`]. Status codes: 400 bad request, 403 not permitted, 404 no such thing, 409 conflict
//! (name taken, revision, in use, wrong state), 422 more than the host has or the guest can, 500 our fault, 503 not ready.

pub mod by_hand;
mod delivered;
pub mod forecast;
pub mod foresight;
pub mod inside;
mod tier;
mod uplink;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

pub use self::delivered::{Delivered, DeliveredShare, DeliveredWindows, Stalls};
pub use self::tier::{Cores, CpusView, Tier};
pub use self::uplink::{UplinkMachine, UplinkRequest, UplinkShare, UplinkView};

/// Value of every `schema` field.
pub const SCHEMA: u32 = 1;

/// Who answers.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Version {
    /// Always [`SCHEMA`].
    pub schema: u32,
    /// Version of lathed.
    pub version: String,
}

/// One resource of a machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Amounts {
    /// What was asked for last.
    pub desired: u64,
    /// What the books hold for it.
    pub granted: u64,
    /// What is in force now, read back.
    pub actual: u64,
    /// What it consumes now (CPU, network, I/O operations: over the last second or so).
    pub used: u64,
}

/// One machine, as `lathe show --json` prints it.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct MachineView {
    /// Always [`SCHEMA`].
    pub schema: u32,
    /// Unique on the host.
    pub name: String,
    /// Where it is in its life.
    pub state: MachineState,
    /// Grows by one with every change of what is desired.
    pub revision: u64,
    /// milliCPU.
    pub cpu: Amounts,
    /// Bytes.
    pub memory: Amounts,
    /// bit/s each way of its first nic; all zero for a machine without network; desired 0 with a network means unlimited.
    pub net: Amounts,
    /// I/O operations per second; 0 means unlimited.
    pub iops: Amounts,
    /// What was asked for last.
    #[serde(default)]
    pub tier: Tier,
    /// What is in force now; `null` while it is off, and where the host cannot put it in force.
    #[serde(default)]
    pub tier_actual: Option<Tier>,
    /// The host's CPUs that it runs on.
    #[serde(default)]
    pub cpus: CpusView,
    /// vCPUs.
    pub vcpus: u32,
    /// Addresses with prefix length, of all its nics in order.
    pub addresses: Vec<String>,
    /// `52:54:…` of its first nic, empty without network.
    pub mac: String,
    /// What it was made from, for people: `image debian-12`, `built-in guest, kernel 6.1.0-37-amd64`.
    pub source: String,
    /// The guest agent answers.
    pub guest_agent: bool,
    /// `no`, `on-failure`, `always`.
    pub restart: RestartPolicy,
    /// `report`, `pause`, `reboot`, `end`.
    pub on_panic: OnTrouble,
    /// Likewise; `null` without a watchdog.
    pub watchdog: Option<OnTrouble>,
    /// Starts with the host.
    pub autostart: bool,
    /// systemd unit, empty when started without systemd.
    pub unit: String,
    /// Process id of the monitor while it lives.
    pub pid: Option<u32>,
    /// Seconds since it began to run.
    pub uptime_sec: Option<u64>,
    /// How often the guest has rebooted and how often the monitor was restarted.
    pub restarts: u64,
    /// In words, why it is in that state: `powered off by the guest`, `monitor killed by signal 9`, ….
    pub reason: String,
    /// Time in microseconds that its threads were held back by its quota, cumulative.
    pub cpu_throttled_usec: u64,
    /// Cumulative CPU time, vCPUs and monitor, microseconds.
    pub cpu_usage_usec: u64,
    /// I/O operations of all its disks since it was started, as the guest sent them.
    #[serde(default)]
    pub disk_operations: u64,
    /// Bytes that it has read from its disks since it was started.
    #[serde(default)]
    pub disk_read_bytes: u64,
    /// Bytes that it has written to its disks since it was started.
    #[serde(default)]
    pub disk_written_bytes: u64,
    /// Cumulative bytes towards the guest, all nics.
    pub net_rx_bytes: u64,
    /// Cumulative bytes from the guest, all nics.
    pub net_tx_bytes: u64,
    /// milliCPU that it may have at most; `None`: what the host has.
    #[serde(default)]
    pub cpu_max_milli: Option<u64>,
    /// Bytes that it may have at most; `None`: what the host has.
    #[serde(default)]
    pub memory_max_bytes: Option<u64>,
    /// milliCPU that lathed leaves it at least of its own accord; `None`: what any machine must have.
    #[serde(default)]
    pub cpu_min_milli: Option<u64>,
    /// Bytes, likewise.
    #[serde(default)]
    pub memory_min_bytes: Option<u64>,
    /// What is done about its future.
    #[serde(default)]
    pub foresight: foresight::ForesightView,
    /// The change of its shape that is under way.
    #[serde(default)]
    pub operation: Option<OperationView>,
    /// Milliseconds since the epoch, when what was asked for a time goes back.
    #[serde(default)]
    pub back_unix_msec: Option<u64>,
    /// What it asked for of its grant lately, and what it got.
    #[serde(default)]
    pub delivered: Delivered,
    /// How much of the last 10 s it stood waiting.
    #[serde(default)]
    pub stalls: Stalls,
    /// What is wanted of it now, from inside or by hand; told where machines are shown or listed.
    #[serde(default)]
    pub wanted: Vec<inside::WantedView>,
}

/// A machine's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum MachineState {
    /// Accepted, its parts are being made.
    Creating,
    /// Its monitor is being started and told.
    Starting,
    /// Guest code runs.
    Running,
    /// Its vCPUs stand still.
    Paused,
    /// Asked to power off.
    Stopping,
    /// Not running; its disks and name are kept.
    Stopped,
    /// Ended other than asked; see `reason`.
    Failed,
    /// Being removed.
    Removing,
}

/// All machines.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct MachineList {
    /// Always [`SCHEMA`].
    pub schema: u32,
    /// By name.
    pub machines: Vec<MachineView>,
}

/// What to do when a machine ends by itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum RestartPolicy {
    /// Nothing.
    #[default]
    No,
    /// Start again unless the guest powered itself off.
    OnFailure,
    /// Start again whatever happened, unless `lathe stop` did it.
    Always,
}

/// What a machine does whose guest is in trouble: its kernel has panicked, or its watchdog has expired.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum OnTrouble {
    /// Says so. A guest that has panicked may reset by itself for 45 s, then its power is cut and `restart` decides.
    #[default]
    Report,
    /// Stands still as it is, to be looked at.
    Pause,
    /// Boots again at once.
    Reboot,
    /// Its power is cut, and `restart` decides.
    End,
}

/// A new machine.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RunRequest {
    /// 1..=28 of `a-z 0-9 -`, beginning with a letter, not ending with `-`.
    pub name: String,
    /// milliCPU, at least 50.
    pub cpu_milli: u64,
    /// milliCPU that it may have at most; `None`: what the host has.
    #[serde(default)]
    pub cpu_max_milli: Option<u64>,
    /// vCPUs at least; otherwise as few as carry `cpu_milli`.
    pub vcpus: Option<u32>,
    /// Bytes, a multiple of 2 MiB, at least 64 MiB.
    pub memory_bytes: u64,
    /// Bytes that it may have at most, a multiple of 2 MiB; `None`: what the host has.
    #[serde(default)]
    pub memory_max_bytes: Option<u64>,
    /// bit/s each way; `None`: no limit.
    pub net_bit_per_sec: Option<u64>,
    /// `false`: no network card (`--net none`).
    pub net: bool,
    /// I/O operations per second; `None`: no limit.
    pub iops: Option<u64>,
    /// What happens to it when shards are short.
    #[serde(default)]
    pub tier: Tier,
    /// Whether it has the host's cores to itself: then `cpu_milli` is whole CPUs, and `tier` is `guaranteed`.
    #[serde(default)]
    pub cores: Cores,
    /// Boot an imported image (its disk is copied to a private one).
    pub image: Option<String>,
    /// Upload id of a kernel; otherwise the host's own.
    pub kernel: Option<String>,
    /// Upload id of an initrd; otherwise the built-in guest's (without image and disk), or none.
    pub initrd: Option<String>,
    /// Disks, in order.
    #[serde(default)]
    pub disks: Vec<DiskSource>,
    /// Bytes; enlarges the private disk of the image.
    pub disk_size_bytes: Option<u64>,
    /// Kernel command line; otherwise one that suits.
    pub cmdline: Option<String>,
    /// What to do when it ends by itself.
    #[serde(default)]
    pub restart: RestartPolicy,
    /// What it does when its kernel panics.
    #[serde(default)]
    pub on_panic: OnTrouble,
    /// With a watchdog device (i6300esb), and what it does when that expires; `None`: without.
    #[serde(default)]
    pub watchdog: Option<OnTrouble>,
    /// Start with the host.
    #[serde(default)]
    pub autostart: bool,
    /// milliCPU that lathed leaves it at least of its own accord, no more than `cpu_milli`; `None`: 50.
    #[serde(default)]
    pub cpu_min_milli: Option<u64>,
    /// Bytes, likewise, a multiple of 2 MiB; `None`: 64 MiB.
    #[serde(default)]
    pub memory_min_bytes: Option<u64>,
    /// What is done about its future; `None`: as the host is configured.
    #[serde(default)]
    pub foresight: Option<foresight::ForesightMode>,
    /// 0..=1000; `None`: as the host is configured.
    #[serde(default)]
    pub aggressiveness_permille: Option<u64>,
}

/// Where a disk comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum DiskSource {
    /// An uploaded raw disk, which becomes the machine's private one.
    Upload {
        /// Upload id.
        id: String,
    },
    /// A file or block device on the host that the configuration allows (`[disks] allowed = …`); used in place, locked.
    Path {
        /// Absolute.
        path: String,
        /// Refuse writes.
        #[serde(default)]
        read_only: bool,
    },
}

/// One more disk of a machine: an upload, a file or device in place, a copy of an image, or an empty one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DiskAddRequest {
    /// 1..=20 of `a-z 0-9 -`, beginning with a letter, not ending with `-`; the guest sees it as the disk's serial. `None`: `data1`, `data2`, ….
    #[serde(default)]
    pub name: Option<String>,
    /// Where it comes from, unless it is a copy of an image or empty.
    #[serde(default)]
    pub source: Option<DiskSource>,
    /// An imported image, which is copied.
    #[serde(default)]
    pub image: Option<String>,
    /// Bytes: of an empty disk, at least 1 MiB; or what an upload or image is enlarged to.
    #[serde(default)]
    pub size_bytes: Option<u64>,
    /// Refuse writes.
    #[serde(default)]
    pub read_only: bool,
}

/// A disk grows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DiskGrowRequest {
    /// Bytes, at least as many as it has; rounded up to whole sectors of 512.
    pub size_bytes: u64,
}

/// A disk of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DiskView {
    /// Always [`SCHEMA`].
    pub schema: u32,
    /// Machine name.
    pub machine: String,
    /// Unique in the machine, and its serial in the guest: `/dev/disk/by-id/virtio-NAME`.
    pub name: String,
    /// Bytes; `None` when a disk in place cannot be looked at.
    pub size_bytes: Option<u64>,
    /// Refuses writes.
    pub read_only: bool,
    /// The machine boots from it.
    pub boots: bool,
    /// Whether the guest has it.
    pub state: DiskState,
    /// `empty`, `upload`, `image debian-12`, `in place`.
    pub source: String,
    /// Its file or device on the host.
    pub path: String,
    /// What the kernel enforces behind the machine's limit of operations: `164 iops at 254:0` (`io.max` of the machine's cgroup), `none`
    /// where its file system lies on no block device of its own, empty while there is no limit.
    #[serde(default)]
    pub wall: String,
}

/// Whether the guest has a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DiskState {
    /// It has.
    Attached,
    /// It has not; it gets it at its next start.
    Detached,
    /// It is being made.
    Adding,
    /// The guest has been asked to let it go.
    Removing,
}

/// Disks of one machine.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct DiskList {
    /// Always [`SCHEMA`].
    pub schema: u32,
    /// In the order in which it gets them.
    pub disks: Vec<DiskView>,
}

/// One more nic of a machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NicAddRequest {
    /// `net1` to `net9`; `None`: the first of them that is free.
    #[serde(default)]
    pub name: Option<String>,
    /// bit/s each way, at least 1000; `None` or 0: unlimited.
    #[serde(default)]
    pub bit_per_sec: Option<u64>,
}

/// Another rate of a nic.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NicLimitRequest {
    /// bit/s each way, at least 1000; 0: unlimited.
    pub bit_per_sec: u64,
}

/// A nic of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NicView {
    /// Always [`SCHEMA`].
    pub schema: u32,
    /// Machine name.
    pub machine: String,
    /// Unique in the machine: `net0` is the one that it was made with, others are `net1` to `net9`.
    pub name: String,
    /// Whether the guest has it.
    pub state: NicState,
    /// `52:54:…`; by this the guest's card is known.
    pub mac: String,
    /// With prefix length.
    pub addresses: Vec<String>,
    /// Its interface on the host, while it is attached.
    pub tap: String,
    /// bit/s each way that were asked for; 0: unlimited.
    pub bit_per_sec: u64,
    /// bit/s towards the guest in force now, read back; 0: unlimited, `None`: not attached.
    pub to_guest_bit_per_sec: Option<u64>,
    /// bit/s from the guest in force now, read back; 0: unlimited, `None`: not attached.
    pub from_guest_bit_per_sec: Option<u64>,
    /// Bytes towards the guest since its tap was made.
    pub rx_bytes: u64,
    /// Bytes from the guest since its tap was made.
    pub tx_bytes: u64,
    /// The guest agent has given the guest's card its addresses.
    pub configured: bool,
    /// In words, why the guest has it but not its addresses.
    pub reason: String,
}

/// Whether the guest has a nic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum NicState {
    /// It has.
    Attached,
    /// It has not; it gets it at its next start.
    Detached,
    /// It is being made.
    Adding,
    /// The guest has been asked to let it go.
    Removing,
}

/// Nics of one machine.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct NicList {
    /// Always [`SCHEMA`].
    pub schema: u32,
    /// In the order in which it gets them.
    pub nics: Vec<NicView>,
}

/// A change of shape. What is absent stays.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ResizeRequest {
    /// milliCPU.
    pub cpu_milli: Option<u64>,
    /// Bytes.
    pub memory_bytes: Option<u64>,
    /// bit/s each way of `net0`, the nic that it was made with; 0: no limit.
    pub net_bit_per_sec: Option<u64>,
    /// I/O operations per second; 0: no limit.
    pub iops: Option<u64>,
    /// What happens to it when shards are short.
    #[serde(default)]
    pub tier: Option<Tier>,
    /// Seconds after which what this changes goes back to what it was, 1..=31536000; `None`: it stays.
    #[serde(default)]
    pub for_sec: Option<u64>,
    /// Back to the shape before the last operation; no amounts then.
    #[serde(default)]
    pub undo: bool,
    /// Milliseconds until the operation ends whatever is in force, 1..=86400000; `None`: 30 s.
    #[serde(default)]
    pub deadline_msec: Option<u64>,
    /// What becomes of what is not in force then.
    #[serde(default)]
    pub deadline_action: DeadlineAction,
    /// Milliseconds to wait for the end before answering 202; `None`: until it ends.
    #[serde(default)]
    pub wait_msec: Option<u64>,
}

/// What the deadline of a resize does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DeadlineAction {
    /// What was asked for stays desired, and is gone on with in the background.
    #[default]
    Keep,
    /// Back to what it was.
    Revert,
}

/// A shape that is asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ShapeView {
    /// milliCPU.
    pub cpu_milli: u64,
    /// Bytes.
    pub memory_bytes: u64,
    /// bit/s each way; 0: no limit.
    pub net_bit_per_sec: u64,
    /// I/O operations per second; 0: no limit.
    pub iops: u64,
    /// What happens to it when shards are short.
    #[serde(default)]
    pub tier: Tier,
}

/// One change of a machine's shape, under way or over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct OperationView {
    /// Always [`SCHEMA`].
    pub schema: u32,
    /// Its id: machine name and number.
    pub operation: String,
    /// Machine name.
    pub name: String,
    /// `under-way` until it ends.
    pub outcome: ResizeOutcome,
    /// In words, why it ended so; while it is under way what is not in force yet.
    pub reason: String,
    /// Who asked for it.
    #[serde(default)]
    pub by: foresight::AskedBy,
    /// Goes on after the deadline of another; it has none itself.
    pub background: bool,
    /// Milliseconds since the epoch.
    pub began_unix_msec: u64,
    /// Milliseconds since the epoch, when it ends at the latest.
    pub deadline_unix_msec: Option<u64>,
    /// Milliseconds since the epoch, when it ended.
    pub ended_unix_msec: Option<u64>,
    /// What was desired before.
    pub from: ShapeView,
    /// What it leads to.
    pub to: ShapeView,
}

/// Operations of one machine.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct OperationList {
    /// Always [`SCHEMA`].
    pub schema: u32,
    /// The newest last; those that are over are kept for a while.
    pub operations: Vec<OperationView>,
}

/// How a resize ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ResizeOutcome {
    /// It was so already.
    Unchanged,
    /// All of it is in force.
    Applied,
    /// Some of it is; `reason` says why.
    Partial,
    /// What was desired before is desired again; `reason` says why.
    Failed,
    /// It has not ended yet; `reason` says what is missing.
    UnderWay,
}

/// A resize that has ended, or whose waiting has, as `lathe resize --json` prints it.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ResizeView {
    /// Always [`SCHEMA`].
    pub schema: u32,
    /// Operation id.
    pub operation: String,
    /// How it ended.
    pub outcome: ResizeOutcome,
    /// In words, for `partial` and `failed`.
    pub reason: String,
    /// From the decision to the last limit in force, microseconds.
    pub took_usec: u64,
    /// Machine name.
    pub name: String,
    /// Machine state.
    pub state: MachineState,
    /// Revision after.
    pub revision: u64,
    /// milliCPU.
    pub cpu: Amounts,
    /// Bytes.
    pub memory: Amounts,
    /// bit/s.
    pub net: Amounts,
    /// I/O operations per second.
    pub iops: Amounts,
    /// What was asked for last.
    #[serde(default)]
    pub tier: Tier,
    /// What is in force now, as in [`MachineView`].
    #[serde(default)]
    pub tier_actual: Option<Tier>,
}

/// What would happen, step by step.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct PlanView {
    /// Always [`SCHEMA`].
    pub schema: u32,
    /// Machine name; of the uplink its device.
    pub name: String,
    /// Present revision, of the uplink that of the books; 0 for a machine that does not exist yet.
    pub revision: u64,
    /// Nothing to do when empty.
    pub steps: Vec<PlanStep>,
    /// Books of the host afterwards.
    pub host_after: HostResources,
}

/// One step of a plan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PlanStep {
    /// `cpu`, `memory`, `net`, `iops`, `tier`, `cores`, `disk`, `nic`, `machine`.
    pub resource: String,
    /// In the resource's unit; of `tier` 0 is harvest, 1 standard, 2 guaranteed.
    pub from: u64,
    /// In the resource's unit.
    pub to: u64,
    /// In words, how.
    pub how: String,
}

/// How to stop.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StopRequest {
    /// Seconds that the guest gets after the power button, 0..=3600; then the power is cut.
    pub timeout_sec: u32,
    /// Cut the power at once.
    pub force: bool,
}

/// Something is gone.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Removed {
    /// Always [`SCHEMA`].
    pub schema: u32,
    /// What.
    pub name: String,
    /// Where data was left, if any was.
    pub kept: Option<String>,
}

/// One resource of a host. `free = capacity - reserved - granted`: what a machine more could be guaranteed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HostAmounts {
    /// All there is.
    pub capacity: u64,
    /// Kept back for the host.
    pub reserved: u64,
    /// What machines take of it: guarantees in full, shared promises divided by the overcommit, no CPU for harvest.
    pub granted: u64,
    /// What machines were promised in all, whatever their tier.
    #[serde(default)]
    pub promised: u64,
    /// Consumed now.
    pub used: u64,
    /// Left to give.
    pub free: u64,
}

/// The books of a host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HostResources {
    /// milliCPU.
    pub cpu: HostAmounts,
    /// Bytes.
    pub memory: HostAmounts,
    /// Bytes under the state directory.
    pub disk: HostAmounts,
    /// bit/s of the uplink, while it is shared between machines; used: what their first nics carry in the busier direction.
    #[serde(default)]
    pub net: Option<HostAmounts>,
}

/// A host, as `lathe host --json` prints it.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct HostView {
    /// Always [`SCHEMA`].
    pub schema: u32,
    /// Host name.
    pub name: String,
    /// `healthy` or what is wrong in words.
    pub state: String,
    /// Grows with every change of the books.
    pub revision: u64,
    /// Version of lathed.
    pub version: String,
    /// Seconds since lathed started.
    pub uptime_sec: u64,
    /// The books.
    #[serde(flatten)]
    pub resources: HostResources,
    /// How many machines there are, running or not.
    pub machines: u64,
    /// Peers alive, without this host.
    pub peers_alive: u64,
    /// `systemd` or `direct`.
    pub launcher: String,
    /// Share of time in which some task waited for CPU, 10 s, hundredths of a percent.
    pub psi_cpu_centipercent: Option<u32>,
    /// The same for memory.
    pub psi_memory_centipercent: Option<u32>,
    /// The same for I/O.
    pub psi_io_centipercent: Option<u32>,
    /// Of each resource the machine that got least of what it asked for in the last 10 s, as far as any asked.
    #[serde(default)]
    pub worst_delivered: Vec<WorstDelivered>,
    /// What is done about the future of machines that have no say of their own.
    #[serde(default)]
    pub foresight: foresight::ForesightMode,
    /// How many machines are resized ahead of what they ask for, running or not.
    #[serde(default)]
    pub machines_sculpted: u64,
}

/// Who gets least of a resource.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct WorstDelivered {
    /// `cpu`, `net-to-guest`, `net-from-guest`.
    pub resource: String,
    /// Machine name.
    pub machine: String,
    /// Parts per thousand that it got of what it asked for.
    pub permille: u64,
}

/// A peer, or this host itself.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct PeerView {
    /// Host name.
    pub name: String,
    /// `self`, `alive`, `suspect`, `dead`.
    pub state: String,
    /// `10.0.0.21:7946`.
    pub address: String,
    /// Advert's counter.
    pub revision: u64,
    /// Milliseconds since it was heard; `None` for this host.
    pub heard_msec: Option<u64>,
    /// Round trip in microseconds, if known.
    pub rtt_usec: Option<u64>,
    /// Version of its lathed.
    pub version: String,
    /// milliCPU.
    pub cpu: HostAmounts,
    /// Bytes.
    pub memory: HostAmounts,
}

/// All peers, this host first.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct PeerList {
    /// Always [`SCHEMA`].
    pub schema: u32,
    /// Name of the cluster, empty without one.
    pub cluster: String,
    /// This host first, then by name.
    pub peers: Vec<PeerView>,
}

/// Makes a cluster of this host alone.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ClusterInit {
    /// Name of the cluster, like a machine's.
    pub name: String,
    /// `IP:PORT` that peers reach this host at; otherwise the default route's address and port 7946.
    pub address: Option<String>,
}

/// Asks for a join token.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TokenRequest {
    /// Seconds that it is good for, 60..=604800.
    pub ttl_sec: u64,
}

/// A join token; a secret.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct TokenView {
    /// Always [`SCHEMA`].
    pub schema: u32,
    /// To be given to `lathe cluster join`, once.
    pub token: String,
    /// Seconds that it is good for.
    pub ttl_sec: u64,
}

/// Joins the cluster that made the token.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct JoinRequest {
    /// From `lathe cluster token`.
    pub token: String,
    /// `IP:PORT` that peers reach this host at; otherwise the address that reaches the other host, port 7946.
    pub address: Option<String>,
}

/// This host's cluster.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ClusterView {
    /// Always [`SCHEMA`].
    pub schema: u32,
    /// Name.
    pub cluster: String,
    /// This host's name in it.
    pub node: String,
    /// This host's address in it.
    pub address: String,
}

/// An image.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ImageView {
    /// Always [`SCHEMA`].
    pub schema: u32,
    /// Unique on the host.
    pub name: String,
    /// `raw` disk or root file system made of a `tar`.
    pub format: String,
    /// Bytes as the guest sees it.
    pub size_bytes: u64,
    /// Bytes really occupied.
    pub occupied_bytes: u64,
    /// SHA-256 of what was imported, hex.
    pub sha256: String,
}

/// All images.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ImageList {
    /// Always [`SCHEMA`].
    pub schema: u32,
    /// By name.
    pub images: Vec<ImageView>,
}

/// An uploaded file.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Upload {
    /// To be named in a [`RunRequest`].
    pub id: String,
    /// Bytes received.
    pub size_bytes: u64,
}

/// What the host has and lacks.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct DoctorReport {
    /// Always [`SCHEMA`].
    pub schema: u32,
    /// In the order in which things are needed.
    pub checks: Vec<Check>,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Check {
    /// Stable, kebab-case.
    pub code: String,
    /// What came of it.
    pub verdict: Verdict,
    /// One sentence.
    pub message: String,
    /// A command or a page that helps; empty when `ok`.
    pub fix: String,
}

/// What came of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// Works, but less well.
    Warn,
    /// Something does not work.
    Fail,
}

/// Something happened.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct EventView {
    /// Always [`SCHEMA`].
    pub schema: u32,
    /// `machine-running`, `machine-stopped`, `machine-resized`, `peer-alive`, …
    pub kind: String,
    /// Machine or peer.
    pub name: String,
    /// One sentence.
    pub message: String,
}

/// Every error's body.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    /// The error.
    pub error: ErrorView,
}

/// An error as people and programs need it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorView {
    /// Stable, kebab-case: `cpu-over-capacity`, `name-taken`, `no-such-machine`, …
    pub code: String,
    /// What, with both numbers and their units.
    pub message: String,
    /// Why or where; may be empty.
    pub detail: String,
    /// A command that can be pasted; may be empty.
    pub fix: String,
    /// Where to read more: `man lathe-errors`.
    pub docs: String,
}
