//! What all machines of a host share: configuration, books, store, launcher, network, and the list of machines.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use lathe_shard::{Bytes, MilliCpu, Shape};
use tokio::sync::{broadcast, mpsc, watch};

use super::actor::Ask;
use super::config::CoreConfig;
use super::console::Console;
use super::cores::{Cpus, Places};
use super::enforced::Enforced;
use super::iomax::IoWalls;
use super::life::Life;
use super::record::{Disk, Record};
use super::sculpt::{Sculpted, Sculpting};
use super::shape::Force;
use super::sight::Sight;
use super::spec;
use super::tiers::Standings;
use super::uplink::Sharing;
use super::walls::Walls;
use crate::api::wire::{EventView, HostResources, SCHEMA};
use crate::foresight::{self, Profile};
use crate::host::Probe;
use crate::host::books::Books;
use crate::launcher::{Launched, Launcher};
use crate::monitor::Monitor;
use crate::network::uplinks::Uplinks;
use crate::network::{PortBytes, PortState, Ports};
use crate::problem::{Kind, Problem};
use crate::store::Store;

/// Events that a slow listener may lag behind.
const EVENT_QUEUE: usize = 256;

/// Shared by all machines of this host.
pub struct Core {
    pub(super) config: CoreConfig,
    pub(super) launcher: Box<dyn Launcher>,
    pub(super) ports: Option<Box<dyn Ports>>,
    pub(super) uplinks: Box<dyn Uplinks>,
    /// What is shared of the uplink.
    pub(super) uplink: tokio::sync::Mutex<Sharing>,
    pub(super) standings: Standings,
    pub(super) places: Places,
    pub(super) walls: Walls,
    pub(super) store: Store,
    pub(super) probe: Probe,
    pub(super) boot_id: String,
    pub(super) kernel_release: String,
    /// Held while the built-in guest is being made.
    pub(super) building: tokio::sync::Mutex<()>,
    /// Held while what people say of the future is changed, lest one change undo another.
    pub(super) saying: tokio::sync::Mutex<()>,
    /// Held while a new machine is being admitted.
    pub(super) admission: tokio::sync::Mutex<()>,
    /// The host is going down: nothing is started any more.
    pub(super) closing: AtomicBool,
    pub(super) kvm: PathBuf,
    pub(super) started: Instant,
    started_unix_msec: u64,
    books: Mutex<Books>,
    machines: Mutex<BTreeMap<String, Arc<Entry>>>,
    events: broadcast::Sender<EventView>,
    pub(super) shape: watch::Sender<HostResources>,
    pub(super) heartbeat: watch::Sender<Instant>,
    pub(super) enforced: Enforced,
    /// What stands behind the limits of disks.
    pub(super) io_walls: IoWalls,
    /// What all machines share of being sculpted.
    pub(super) sculpting: Sculpting,
    used: Mutex<Shape>,
}

/// What [`Core::new`] is made of.
pub(super) struct Parts {
    pub config: CoreConfig,
    pub launcher: Box<dyn Launcher>,
    pub ports: Option<Box<dyn Ports>>,
    pub uplinks: Box<dyn Uplinks>,
    pub store: Store,
    pub probe: Probe,
    pub books: Books,
    pub boot_id: String,
    pub kernel_release: String,
    pub kvm: PathBuf,
}

/// What is unique on the host.
#[derive(Default)]
pub struct Taken {
    /// vsock context ids.
    pub cids: BTreeSet<u32>,
    /// Numbers of addresses.
    pub indices: BTreeSet<u64>,
    /// Names of taps.
    pub taps: BTreeSet<String>,
}

/// One machine as the rest of lathed sees it; its actor is the only one who writes.
pub struct Entry {
    pub(super) name: String,
    pub(super) asks: mpsc::Sender<Ask>,
    pub(super) console: Arc<Console>,
    pub(super) life: watch::Sender<Life>,
    /// Number of the last operation that is over.
    pub(super) ended: watch::Sender<u64>,
    /// Held while the guest agent is told how its network shall look, lest an older word come last.
    pub(super) guest_network: tokio::sync::Mutex<()>,
    shared: Mutex<Shared>,
    /// What it asked for over time; never locked while `shared` is.
    profile: Mutex<Profile>,
    /// What was decided about it, and what came of that; locked after `profile`, never while `shared` is.
    sculpted: Mutex<Sculpted>,
    /// What the host does about the future of machines that have no say of their own.
    pub(super) host_foresight: foresight::Settings,
}

/// What is known of a machine now.
pub struct Shared {
    /// As stored.
    pub record: Record,
    /// While it has a monitor.
    pub launched: Option<Launched>,
    /// The same as its actor's, to ask what its devices have done.
    pub monitor: Option<Monitor>,
    /// What its first nic's port has in force.
    pub port: PortState,
    /// Which CPUs it runs on.
    pub cpus: Cpus,
    /// What its wall has in force, milliCPU.
    pub quota_milli: Option<u64>,
    /// What is in force of its shape, while it runs.
    pub force: Option<Force>,
    /// What is not in force of it, in words.
    pub short: String,
    /// Names of the disks that its monitor has.
    pub plugged: BTreeSet<String>,
    /// Names of the nics that its monitor has.
    pub nics: BTreeSet<String>,
    /// Names of those that its guest agent has configured.
    pub configured: BTreeSet<String>,
    /// Why it has not configured the others, in words.
    pub not_configured: String,
    /// The guest agent answers.
    pub guest_agent: bool,
    /// How often the guest has reset since it was started.
    pub reboots: u64,
    /// What the guest's kernel said when it panicked, until it is reset.
    pub panic: Option<String>,
    /// It was paused because its guest's watchdog expired, until it goes on.
    pub expired: bool,
    /// Why its last start failed.
    pub problem: Option<Problem>,
    /// Where its data was left when it was removed.
    pub kept: Option<PathBuf>,
    /// What it uses.
    pub usage: Usage,
    /// What had gone through its taps when they were read last.
    pub seen: BTreeMap<String, PortBytes>,
    /// What it has asked for and got in the last minute.
    pub sight: Box<Sight>,
}

/// What a machine's disks have done together since it was started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskUse {
    /// Reads, writes, flushes, discards, as the guest sent them.
    pub operations: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub written_bytes: u64,
}

/// What a machine uses; cumulative but for what says otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// When it was read.
    pub at: Option<Instant>,
    /// CPU time of vCPUs and monitor, microseconds.
    pub cpu_usec: u64,
    /// Time that its threads were held back, microseconds.
    pub throttled_usec: u64,
    /// milliCPU, over the last interval.
    pub cpu_milli: u64,
    /// Bytes now.
    pub memory_bytes: u64,
    /// Of these, page cache of the host that nobody uses.
    pub memory_inactive_file_bytes: u64,
    /// Swapped out, bytes now.
    pub memory_swapped_bytes: u64,
    /// Bytes towards the guest, all nics.
    pub rx_bytes: u64,
    /// Bytes from the guest, all nics.
    pub tx_bytes: u64,
    /// bit/s of the busier direction of its first nic, over the last interval.
    pub net_bit_per_sec: u64,
    /// What its disks have done.
    pub disks: DiskUse,
    /// The same as its monitor has said last, and when: it forgets a disk that goes.
    pub disks_told: Option<(Instant, DiskUse)>,
    /// I/O operations per second of all its disks, over the last interval.
    pub iops: u64,
}

/// Now, in seconds since the epoch.
pub fn unix_sec() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Entry {
    pub(super) fn new(
        record: Record,
        folder: &Path,
        asks: mpsc::Sender<Ask>,
        host_foresight: foresight::Settings,
    ) -> Self {
        Self {
            name: record.name.clone(),
            asks,
            console: Arc::new(Console::new(folder)),
            life: watch::Sender::new(record.life.clone()),
            ended: watch::Sender::new(record.ended.last().map_or(0, |ended| ended.operation.number)),
            shared: Mutex::new(Shared {
                record,
                launched: None,
                monitor: None,
                port: PortState::default(),
                cpus: Cpus::default(),
                quota_milli: None,
                force: None,
                short: String::new(),
                plugged: BTreeSet::new(),
                nics: BTreeSet::new(),
                configured: BTreeSet::new(),
                not_configured: String::new(),
                guest_agent: false,
                reboots: 0,
                panic: None,
                expired: false,
                problem: None,
                kept: None,
                usage: Usage::default(),
                seen: BTreeMap::new(),
                sight: Box::default(),
            }),
            guest_network: tokio::sync::Mutex::new(()),
            profile: Mutex::default(),
            sculpted: Mutex::default(),
            host_foresight,
        }
    }

    /// Looks at, or changes, what is known; never held over an await.
    pub(super) fn with<T>(&self, look: impl FnOnce(&mut Shared) -> T) -> T {
        look(&mut lock(&self.shared))
    }

    /// Looks at, or changes, what is known of it over time; never held over an await.
    pub(super) fn profile<T>(&self, look: impl FnOnce(&mut Profile) -> T) -> T {
        look(&mut lock(&self.profile))
    }

    /// Looks at, or changes, what was decided about it; never held over an await.
    pub(super) fn sculpted<T>(&self, look: impl FnOnce(&mut Sculpted) -> T) -> T {
        look(&mut lock(&self.sculpted))
    }

    /// What is done about its future.
    pub(super) fn foresight(&self) -> foresight::Settings {
        self.with(|shared| shared.record.foresight.on(self.host_foresight))
    }

    /// Waits until the machine's state satisfies `wanted`.
    pub(super) async fn until(&self, wanted: impl Fn(&Life) -> bool) -> Life {
        let mut life = self.life.subscribe();
        // The sender lives as long as this entry.
        life.wait_for(|life| wanted(life)).await.map_or(Life::Gone, |life| life.clone())
    }
}

impl Core {
    pub(super) fn new(parts: Parts) -> Arc<Self> {
        let resources = parts.books.view(Shape::default());
        Arc::new(Self {
            config: parts.config,
            launcher: parts.launcher,
            ports: parts.ports,
            uplinks: parts.uplinks,
            uplink: tokio::sync::Mutex::default(),
            standings: Standings::default(),
            places: Places::default(),
            walls: Walls::default(),
            store: parts.store,
            probe: parts.probe,
            boot_id: parts.boot_id,
            kernel_release: parts.kernel_release,
            building: tokio::sync::Mutex::new(()),
            saying: tokio::sync::Mutex::new(()),
            admission: tokio::sync::Mutex::new(()),
            closing: AtomicBool::new(false),
            kvm: parts.kvm,
            started: Instant::now(),
            started_unix_msec: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |elapsed| u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX)),
            books: Mutex::new(parts.books),
            machines: Mutex::new(BTreeMap::new()),
            events: broadcast::channel(EVENT_QUEUE).0,
            shape: watch::Sender::new(resources),
            heartbeat: watch::Sender::new(Instant::now()),
            enforced: Enforced::default(),
            io_walls: IoWalls::default(),
            sculpting: Sculpting::default(),
            used: Mutex::new(Shape::default()),
        })
    }

    /// Looks at, or changes, the books, and tells whoever watches them.
    pub(super) fn with_books<T>(&self, act: impl FnOnce(&mut Books) -> T) -> T {
        let used = *lock(&self.used);
        let mut books = lock(&self.books);
        let result = act(&mut books);
        let resources = books.view(used);
        drop(books);
        self.shape.send_if_modified(|shape| {
            let changed = *shape != resources;
            *shape = resources;
            changed
        });
        result
    }

    pub(super) fn set_used(&self, used: Shape) {
        *lock(&self.used) = used;
        self.with_books(|_| ());
    }

    pub(super) fn entries(&self) -> Vec<Arc<Entry>> {
        lock(&self.machines).values().cloned().collect()
    }

    pub(super) fn entry(&self, name: &str) -> Result<Arc<Entry>, Problem> {
        lock(&self.machines).get(name).cloned().ok_or_else(|| {
            let shown: String = name.chars().take(64).collect();
            Problem::new(Kind::NotFound, "no-such-machine", format!("there is no machine {shown:?}"))
                .fix("lathe list")
        })
    }

    pub(super) fn add(&self, entry: Arc<Entry>) {
        lock(&self.machines).insert(entry.name.clone(), entry);
    }

    pub(super) fn forget(&self, name: &str) {
        lock(&self.machines).remove(name);
    }

    /// What machines have and no other may.
    pub(super) fn taken(&self) -> Taken {
        let Taken { mut cids, mut indices, mut taps } = Taken::default();
        for entry in self.entries() {
            entry.with(|shared| {
                cids.insert(shared.record.cid);
                indices.extend(shared.record.all_nics().map(|nic| nic.index));
                taps.extend(shared.record.all_nics().map(|nic| nic.tap.clone()));
            });
        }
        Taken { cids, indices, taps }
    }

    /// The machine other than `name` that has a monitor and uses the disk at `path`.
    pub(super) fn user_of_disk(&self, path: &Path, name: &str) -> Option<String> {
        let wanted = spec::disk_identity(path)?;
        let uses = |entry: &Arc<Entry>| {
            entry.with(|shared| {
                shared.record.life.holds_shards()
                    && shared.record.source.disks.iter().any(|drive| match &drive.disk {
                        Disk::Path { path, .. } => spec::disk_identity(Path::new(path)) == Some(wanted),
                        _ => false,
                    })
            })
        };
        self.entries().iter().find(|entry| entry.name != name && uses(entry)).map(|entry| entry.name.clone())
    }

    pub(super) fn host_kernel(&self) -> PathBuf {
        let default = || PathBuf::from(format!("/boot/vmlinuz-{}", self.kernel_release));
        self.config.kernel.clone().unwrap_or_else(default)
    }

    pub(super) fn tell(&self, kind: &str, name: &str, message: impl Into<String>) {
        let event = EventView {
            schema: SCHEMA,
            kind: kind.to_owned(),
            name: name.to_owned(),
            message: message.into(),
        };
        tracing::info!(kind = event.kind, machine = event.name, "{}", event.message);
        // Nobody may be listening.
        let _ = self.events.send(event);
    }

    pub(super) fn subscribe(&self) -> broadcast::Receiver<EventView> {
        self.events.subscribe()
    }

    /// What one machine could have if there were no other. Never asked for with a machine locked: whoever writes the books' view waits for those
    /// who read it.
    pub(super) fn most(&self) -> Shape {
        let resources = *self.shape.borrow();
        Shape {
            cpu: MilliCpu(resources.cpu.capacity.saturating_sub(resources.cpu.reserved)),
            memory: Bytes(resources.memory.capacity.saturating_sub(resources.memory.reserved)),
            ..Shape::default()
        }
    }

    /// Now, in milliseconds since the epoch as it was told when lathed started: this clock never goes backwards.
    pub(super) fn now_msec(&self) -> u64 {
        let elapsed = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.started_unix_msec.saturating_add(elapsed)
    }

    pub(super) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }
}

/// Per second, from two cumulative readings.
pub fn rate(before: u64, after: u64, elapsed: Duration) -> u64 {
    let usec = elapsed.as_micros().max(1);
    let rate = u128::from(after.saturating_sub(before)) * 1_000_000 / usec;
    u64::try_from(rate).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_per_second_and_survive_counters_that_start_again() {
        assert_eq!(rate(1000, 1500, Duration::from_millis(500)), 1000);
        assert_eq!(rate(1500, 0, Duration::from_secs(1)), 0);
        assert_eq!(rate(0, u64::MAX, Duration::ZERO), u64::MAX);
    }
}
