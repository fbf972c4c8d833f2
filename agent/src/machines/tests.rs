//! The core against fake monitors and a fake network: whole lives, and lathed killed at any moment.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use lathe_cgroup::MachineTree;
use lathe_shard::Shape;
use lathe_vmm::control::wire::{Event as MonitorEvent, ExitReason, Phase};
use tokio::runtime::{Builder, Runtime};

use super::config::tests::{config, run_request};
use super::life::{End, EndKind};
use super::uplink_tests::FakeUplinks;
use super::*;
use crate::api::wire::{DiskSource, MachineState, OnTrouble, ResizeOutcome, RestartPolicy};
use crate::launcher::{Launched, Launcher, Pending};
use crate::monitor::fake::{FakeMonitor, Script};
use crate::network::{PortBytes, PortLimited, PortQueues, PortState, Ports};

/// Monitors that outlive lathed, as units do.
#[derive(Clone, Default)]
pub(super) struct FakeLauncher {
    folder: PathBuf,
    monitors: Arc<Mutex<BTreeMap<String, FakeMonitor>>>,
    pub(super) script: Arc<Mutex<Script>>,
    /// The cgroups of every machine.
    pub(super) tree: Arc<Mutex<Option<MachineTree>>>,
    launches: Arc<Mutex<u32>>,
}

impl FakeLauncher {
    pub(super) fn monitor(&self, name: &str) -> FakeMonitor {
        self.monitors.lock().unwrap()[name].clone()
    }

    fn living(&self) -> BTreeSet<String> {
        let monitors = self.monitors.lock().unwrap();
        monitors.iter().filter(|(_, fake)| fake.is_alive()).map(|(name, _)| name.clone()).collect()
    }

    fn describe(&self, fake: &FakeMonitor) -> Launched {
        let tree = self.tree.lock().unwrap().clone();
        Launched { socket: fake.path().to_owned(), pid: Some(4711), unit: String::new(), tree }
    }
}

impl Launcher for FakeLauncher {
    fn kind(&self) -> &'static str {
        "fake"
    }

    fn launch<'a>(&'a self, name: &'a str) -> Pending<'a, Result<Launched, Problem>> {
        Box::pin(async move {
            *self.launches.lock().unwrap() += 1;
            fs::create_dir_all(&self.folder).unwrap();
            assert!(!self.living().contains(name), "two monitors of {name}");
            let path = self.folder.join(format!("{name}.sock"));
            let fake = FakeMonitor::listen(&path, self.script.lock().unwrap().clone());
            self.monitors.lock().unwrap().insert(name.to_owned(), fake.clone());
            Ok(self.describe(&fake))
        })
    }

    fn find<'a>(&'a self, name: &'a str) -> Pending<'a, Result<Option<Launched>, Problem>> {
        Box::pin(async move {
            let monitors = self.monitors.lock().unwrap();
            Ok(monitors.get(name).filter(|fake| fake.is_alive()).map(|fake| self.describe(fake)))
        })
    }

    fn how_it_ended<'a>(&'a self, _: &'a str) -> Pending<'a, End> {
        Box::pin(async { End { kind: EndKind::Failure, reason: "monitor killed by signal 9".to_owned() } })
    }

    fn end<'a>(&'a self, name: &'a str) -> Pending<'a, Result<(), Problem>> {
        Box::pin(async move {
            if let Some(fake) = self.monitors.lock().unwrap().remove(name) {
                fake.die();
            }
            Ok(())
        })
    }
}

/// Taps by name, with their rate.
#[derive(Clone, Default)]
struct FakePorts(Arc<Mutex<BTreeMap<String, u64>>>, Arc<Refusal>, Arc<Mutex<Sources>>);

/// Addresses that each tap lets through.
type Sources = BTreeMap<String, Vec<String>>;

/// How the rate that no tap can have is refused.
#[derive(Default)]
struct Refusal {
    /// How often it was asked for.
    asked: AtomicUsize,
    /// Not yet.
    waits: AtomicBool,
}

impl FakePorts {
    fn state(rate: u64) -> PortState {
        let rate = Some(rate).filter(|rate| *rate != 0);
        PortState { to_guest: rate, from_guest: rate }
    }
}

impl Ports for FakePorts {
    fn keep(&self) -> Pending<'_, ()> {
        Box::pin(async {})
    }

    fn prepare(&self) -> Pending<'_, Result<(), Problem>> {
        Box::pin(async { Ok(()) })
    }

    fn ensure<'a>(
        &'a self,
        tap: &'a str,
        _: [u8; 6],
        addresses: &'a [String],
    ) -> Pending<'a, Result<Option<OwnedFd>, Problem>> {
        Box::pin(async move {
            self.2.lock().unwrap().insert(tap.to_owned(), addresses.to_vec());
            self.0.lock().unwrap().entry(tap.to_owned()).or_default();
            Ok(Some(fs::File::open("/dev/null").unwrap().into()))
        })
    }

    fn remove<'a>(&'a self, tap: &'a str) -> Pending<'a, Result<(), Problem>> {
        Box::pin(async move {
            self.0.lock().unwrap().remove(tap);
            self.2.lock().unwrap().remove(tap);
            Ok(())
        })
    }

    fn limit<'a>(&'a self, tap: &'a str, rate: u64) -> Pending<'a, Result<PortLimited, Problem>> {
        Box::pin(async move {
            if rate == 13_000 {
                self.1.asked.fetch_add(1, Ordering::Relaxed);
                while self.1.waits.load(Ordering::Relaxed) {
                    tokio::task::yield_now().await;
                }
            }
            match self.0.lock().unwrap().get_mut(tap) {
                Some(_) if rate == 13_000 => Err(Problem::internal("tc", "no luck")),
                Some(now) => {
                    *now = rate;
                    Ok(PortLimited { state: Self::state(rate), since: Instant::now() })
                }
                None => Err(Problem::internal("tc", "no such tap")),
            }
        })
    }

    fn read<'a>(&'a self, tap: &'a str) -> Pending<'a, Result<PortState, Problem>> {
        Box::pin(async move { Ok(Self::state(self.0.lock().unwrap().get(tap).copied().unwrap_or(0))) })
    }

    fn bytes<'a>(&'a self, _: &'a str) -> Pending<'a, Result<PortBytes, Problem>> {
        Box::pin(async { Ok(PortBytes::default()) })
    }

    fn queues<'a>(&'a self, _: &'a str) -> Pending<'a, Result<PortQueues, Problem>> {
        Box::pin(async { Ok(PortQueues::default()) })
    }

    fn list(&self) -> Pending<'_, Result<Vec<String>, Problem>> {
        Box::pin(async { Ok(self.0.lock().unwrap().keys().cloned().collect()) })
    }
}

/// A host that outlives lathed.
pub(super) struct World {
    pub(super) folder: tempfile::TempDir,
    pub(super) launcher: FakeLauncher,
    ports: FakePorts,
    pub(super) uplinks: FakeUplinks,
}

/// One life of lathed.
pub(super) struct Lathed {
    pub(super) runtime: Runtime,
    pub(super) machines: Machines,
    /// It is being killed: whoever uses it ends, and hears nothing of what a dying runtime answers and a killed process does not.
    pub(super) killed: Arc<AtomicBool>,
}

/// Far more than anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// Waits for something that comes by itself.
pub(super) fn until(mut there: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !there() {
        assert!(begun.elapsed() < PATIENCE, "it hangs");
        std::thread::yield_now();
    }
}

impl Lathed {
    pub(super) fn wait<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(async { tokio::time::timeout(PATIENCE, work).await.expect("it hangs") })
    }

    pub(super) fn run(&self, request: RunRequest) -> Result<MachineView, Problem> {
        self.wait(self.machines.run(request))
    }

    pub(super) fn show(&self, name: &str) -> MachineView {
        self.wait(self.machines.show(name)).unwrap()
    }

    /// How many changes of a limit are in the figures.
    pub(super) fn enforced(&self, limit: enforced::Limit) -> u64 {
        let all = self.machines.enforced();
        all.iter().filter(|(of, _)| *of == limit).flat_map(|(_, took)| took.within).sum()
    }

    pub(super) fn settled(&self, name: &str, state: MachineState) -> MachineView {
        let entry = self.machines.core.entry(name).unwrap();
        self.wait(entry.until(|life| life.state() == state));
        self.show(name)
    }

    /// As `kill -9`: no task gets another turn.
    pub(super) fn kill(self) {
        self.killed.store(true, Ordering::Relaxed);
        self.runtime.shutdown_timeout(Duration::from_secs(10));
    }
}

impl World {
    pub(super) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let launcher = FakeLauncher { folder: folder.path().join("run/vm"), ..FakeLauncher::default() };
        Self { folder, launcher, ports: FakePorts::default(), uplinks: FakeUplinks::default() }
    }

    fn config(&self) -> CoreConfig {
        let mut config = config(self.folder.path());
        config.network = Some(NetworkConfig {
            bridge: "lathe0".to_owned(),
            ipv4: "10.77.0.1/16".parse().unwrap(),
            ipv6: None,
            nat: false,
            isolated: false,
            check_sources: true,
            guard_host: false,
            host_services: Vec::new(),
        });
        config.allowed_disks = vec![self.folder.path().join("disks")];
        config
    }

    pub(super) fn lathed(&self) -> Lathed {
        // Commands of the lathed before would be carried out in the middle of this one's.
        let monitors: Vec<_> = self.launcher.monitors.lock().unwrap().values().cloned().collect();
        until(|| monitors.iter().all(FakeMonitor::has_heard_all));
        let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let (config, launcher, ports) = (self.config(), self.launcher.clone(), self.ports.clone());
        let core = runtime.block_on(async {
            // The store of the lathed before may take a moment to let go of its lock.
            let begun = Instant::now();
            loop {
                let (launcher, ports) = (Box::new(launcher.clone()), Box::new(ports.clone()));
                let (config, uplinks) = (config.clone(), Box::new(self.uplinks.clone()));
                match start::start_with(config, launcher, Some(ports), uplinks, "/dev/null".into()).await {
                    Err(problem)
                        if problem.detail.contains("another lathed") && begun.elapsed() < PATIENCE =>
                    {
                        tokio::task::yield_now().await;
                    }
                    started => return started.unwrap(),
                }
            }
        });
        Lathed { runtime, machines: Machines { core }, killed: Arc::default() }
    }

    /// While `doing` is done, a tap is asked for a rate that it refuses afterwards.
    pub(super) fn before_a_rate_is_refused(&self, doing: impl FnOnce()) {
        until(|| self.ports.1.asked.load(Ordering::Relaxed) > 0);
        doing();
        self.ports.1.waits.store(false, Ordering::Relaxed);
    }

    /// Addresses that each tap lets through; forgotten with the look.
    pub(super) fn take_sources(&self) -> BTreeMap<String, Vec<String>> {
        std::mem::take(&mut self.ports.2.lock().unwrap())
    }

    /// From now on who asks for it waits for the refusal.
    pub(super) fn refuse_rates_later(&self) {
        self.ports.1.asked.store(0, Ordering::Relaxed);
        self.ports.1.waits.store(true, Ordering::Relaxed);
    }

    /// A machine with its own kernel, so that nothing of this host is needed.
    pub(super) fn request(&self, name: &str) -> RunRequest {
        let uploads = self.folder.path().join("state/uploads");
        fs::create_dir_all(&uploads).unwrap();
        fs::write(uploads.join(name), "kernel").unwrap();
        let kernel = Some(name.to_owned());
        RunRequest {
            kernel,
            net: true,
            net_bit_per_sec: Some(1_000_000),
            cpu_milli: 100,
            ..run_request(name)
        }
    }

    /// Taps and their rates.
    pub(super) fn taps(&self) -> BTreeMap<String, u64> {
        self.ports.0.lock().unwrap().clone()
    }

    /// The same as they should be.
    fn wanted_taps(&self, lathed: &Lathed, running: &BTreeSet<String>) -> BTreeMap<String, u64> {
        let nics = running.iter().flat_map(|name| lathed.wait(lathed.machines.nics(name)).unwrap().nics);
        nics.map(|nic| (nic.tap, nic.bit_per_sec)).collect()
    }

    /// Books, monitors, taps, folders and records agree.
    pub(super) fn check(&self, lathed: &Lathed) {
        let views = lathed.wait(lathed.machines.list());
        let names: BTreeSet<String> = views.iter().map(|view| view.name.clone()).collect();
        let running: BTreeSet<String> =
            views.iter().filter(|v| v.state == MachineState::Running).map(|v| v.name.clone()).collect();
        assert_eq!(self.launcher.living(), running, "monitors");
        assert_eq!(self.taps(), self.wanted_taps(lathed, &running), "taps and rates");
        let folders = fs::read_dir(self.folder.path().join("state/machines")).unwrap();
        let folders: BTreeSet<String> =
            folders.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        assert_eq!(folders, names, "folders");
        let granted: u64 = views.iter().map(|view| view.cpu.granted).sum();
        let resources = lathed.machines.host().resources;
        assert_eq!(resources.cpu.promised, granted, "books");
        assert_eq!(
            granted,
            views.iter().filter(|v| v.state == MachineState::Running).map(|v| v.cpu.desired).sum::<u64>()
        );
        for name in &running {
            assert_eq!(self.launcher.monitor(name).told(|told| told.phase), Phase::Running, "{name}");
        }
    }
}

pub(super) const STOP: StopRequest = StopRequest { timeout_sec: 30, force: false };

#[test]
fn a_machine_runs_is_resized_stops_starts_and_is_removed() {
    let world = World::new();
    let lathed = world.lathed();
    let view = lathed.run(world.request("demo")).unwrap();
    assert_eq!((view.state, view.revision, view.vcpus), (MachineState::Running, 1, 1));
    assert_eq!(view.addresses, ["10.77.0.2/16"]);
    assert_eq!(view.net.actual, 1_000_000);
    world.check(&lathed);
    let told = world.launcher.monitor("demo").told(|told| told.commands.clone());
    assert_eq!(told, ["hello", "define", "start", "go", "status"]);
    assert!(!world.folder.path().join("state/uploads/demo").exists(), "its upload is its own now");

    let faster =
        ResizeRequest { net_bit_per_sec: Some(2_000_000), cpu_milli: Some(200), ..Default::default() };
    let resized = lathed.wait(lathed.machines.resize("demo", faster.clone(), Some(1))).unwrap();
    assert_eq!(
        (resized.outcome, resized.revision, resized.net.actual),
        (ResizeOutcome::Applied, 2, 2_000_000)
    );
    let again = lathed.wait(lathed.machines.resize("demo", faster.clone(), None)).unwrap();
    assert_eq!((again.outcome, again.revision), (ResizeOutcome::Unchanged, 2));
    let stale = lathed.wait(lathed.machines.resize("demo", faster, Some(1))).unwrap_err();
    assert_eq!(stale.code, "revision");
    world.check(&lathed);

    let running = lathed.wait(lathed.machines.remove("demo", false, false)).unwrap_err();
    assert_eq!(running.code, "machine-running");
    let stopped = lathed.wait(lathed.machines.stop("demo", STOP)).unwrap();
    assert_eq!((stopped.state, stopped.reason.as_str()), (MachineState::Stopped, "stopped on request"));
    assert_eq!((stopped.cpu.granted, stopped.cpu.actual), (0, 0));
    lathed.wait(lathed.machines.stop("demo", STOP)).unwrap();
    world.check(&lathed);

    let started = lathed.wait(lathed.machines.start_machine("demo")).unwrap();
    assert_eq!((started.state, started.net.actual), (MachineState::Running, 2_000_000));
    lathed.wait(lathed.machines.remove("demo", false, true)).unwrap();
    assert_eq!(lathed.wait(lathed.machines.show("demo")).unwrap_err().code, "no-such-machine");
    world.check(&lathed);
}

#[test]
fn a_run_that_cannot_be_leaves_nothing_but_its_uploads() {
    let world = World::new();
    let lathed = world.lathed();
    *world.launcher.script.lock().unwrap() =
        Script { refuse_define: Some("kernel-image".to_owned()), ..Script::default() };
    assert_eq!(lathed.run(world.request("demo")).unwrap_err().code, "kernel-image");
    world.check(&lathed);
    assert!(lathed.wait(lathed.machines.list()).is_empty());
    assert!(world.folder.path().join("state/uploads/demo").exists());
    *world.launcher.script.lock().unwrap() = Script { die_at: Some("start"), ..Script::default() };
    assert_eq!(lathed.run(world.request("demo")).unwrap_err().code, "launch-failed");
    world.check(&lathed);
    *world.launcher.script.lock().unwrap() = Script::default();
    lathed.run(world.request("demo")).unwrap();
    assert_eq!(lathed.run(world.request("demo")).unwrap_err().code, "name-taken");
    let huge = RunRequest { cpu_milli: 1 << 40, ..world.request("huge") };
    assert_eq!(lathed.run(huge).unwrap_err().code, "cpu-over-capacity");
    world.check(&lathed);
}

#[test]
fn a_disk_belongs_to_one_machine() {
    let world = World::new();
    let disks = world.folder.path().join("disks");
    fs::create_dir_all(&disks).unwrap();
    fs::write(disks.join("d"), [0; 4096]).unwrap();
    let lathed = world.lathed();
    let with_disk = |name: &str| {
        let path = disks.join("d").to_string_lossy().into_owned();
        RunRequest { disks: vec![DiskSource::Path { path, read_only: false }], ..world.request(name) }
    };
    lathed.run(with_disk("one")).unwrap();
    let problem = lathed.run(with_disk("two")).unwrap_err();
    assert_eq!(problem.code, "disk-in-use");
    assert!(problem.message.ends_with("is in use by machine one"), "{problem}");
    lathed.wait(lathed.machines.stop("one", STOP)).unwrap();
    lathed.run(with_disk("two")).unwrap();
    let problem = lathed.wait(lathed.machines.start_machine("one")).unwrap_err();
    assert_eq!(problem.code, "disk-in-use", "{problem}");
    assert!(problem.message.contains("machine two"), "{problem}");
    assert!(disks.join("d").exists());
}

#[test]
fn a_resize_that_fails_puts_the_old_shape_back() {
    let world = World::new();
    let lathed = world.lathed();
    lathed.run(world.request("demo")).unwrap();
    let unlucky = ResizeRequest { net_bit_per_sec: Some(13_000), cpu_milli: Some(300), ..Default::default() };
    let failed = lathed.wait(lathed.machines.resize("demo", unlucky, None)).unwrap();
    assert_eq!((failed.outcome, failed.revision), (ResizeOutcome::Failed, 1));
    assert!(failed.reason.contains("no luck"), "{}", failed.reason);
    assert_eq!((failed.cpu.desired, failed.net.actual), (100, 1_000_000));
    world.check(&lathed);
}

#[test]
fn what_cannot_be_changed_while_running_is_partial_and_follows_at_the_next_start() {
    let world = World::new();
    // The monitor of a release before.
    *world.launcher.script.lock().unwrap() = Script { protocol: Some(1), ..Script::default() };
    let lathed = world.lathed();
    lathed.run(world.request("demo")).unwrap();
    let memory = ResizeRequest { memory_bytes: Some(128 << 20), ..Default::default() };
    let plan = lathed.wait(lathed.machines.plan_resize("demo", &memory, None)).unwrap();
    assert_eq!((plan.steps.len(), plan.steps[0].resource.as_str()), (1, "memory"));
    let partial = lathed.wait(lathed.machines.resize("demo", memory, None)).unwrap();
    assert_eq!(partial.outcome, ResizeOutcome::Partial);
    assert_eq!((partial.memory.actual, partial.memory.granted), (64 << 20, 128 << 20));
    lathed.wait(lathed.machines.stop("demo", STOP)).unwrap();
    assert_eq!(lathed.wait(lathed.machines.start_machine("demo")).unwrap().memory.actual, 128 << 20);
}

#[test]
fn a_machine_is_paused_found_paused_and_goes_on() {
    let world = World::new();
    let lathed = world.lathed();
    lathed.run(world.request("demo")).unwrap();
    for _ in 0..2 {
        let view = lathed.wait(lathed.machines.pause("demo")).unwrap();
        assert_eq!((view.state, view.cpu.granted), (MachineState::Paused, 100));
    }
    let phase = || world.launcher.monitor("demo").told(|told| told.phase);
    assert_eq!(phase(), Phase::Paused);
    assert_eq!(lathed.wait(lathed.machines.start_machine("demo")).unwrap_err().code, "machine-paused");
    assert_eq!(lathed.wait(lathed.machines.guest_stream("demo")).unwrap_err().code, "machine-paused");
    lathed.kill();
    let lathed = world.lathed();
    assert_eq!(lathed.show("demo").state, MachineState::Paused);
    let view = lathed.wait(lathed.machines.resume("demo")).unwrap();
    assert_eq!((view.state, phase()), (MachineState::Running, Phase::Running));
    world.check(&lathed);
    // Somebody else at the monitor's socket is followed.
    let monitor = world.launcher.monitor("demo");
    monitor.told(|told| told.phase = Phase::Paused);
    monitor.event(&MonitorEvent::Phase(Phase::Paused));
    lathed.settled("demo", MachineState::Paused);
    let off = lathed.wait(lathed.machines.stop("demo", STOP)).unwrap();
    assert_eq!((off.state, off.reason.as_str()), (MachineState::Stopped, "stopped on request"));
    assert_eq!(lathed.wait(lathed.machines.pause("demo")).unwrap_err().code, "machine-not-running");
    world.check(&lathed);
}

#[test]
fn a_panic_is_told_and_a_reset_makes_it_good() {
    let world = World::new();
    let lathed = world.lathed();
    lathed.run(world.request("demo")).unwrap();
    let panic = || {
        world.launcher.monitor("demo").event(&MonitorEvent::GuestPanicked { message: "no init".to_owned() })
    };
    let reason = |wanted: &str| until(|| lathed.show("demo").reason == wanted);
    panic();
    reason("the guest's kernel panicked: no init");
    assert_eq!(lathed.show("demo").state, MachineState::Running);
    world.launcher.monitor("demo").event(&MonitorEvent::Rebooted {});
    reason("");
    // It may also be configured to stand still.
    panic();
    let monitor = world.launcher.monitor("demo");
    monitor.told(|told| (told.phase, told.panic) = (Phase::Paused, Some("no init".to_owned())));
    monitor.event(&MonitorEvent::Phase(Phase::Paused));
    let paused = lathed.settled("demo", MachineState::Paused);
    assert_eq!(paused.reason, "the guest's kernel panicked: no init");
    lathed.kill();
    let lathed = world.lathed();
    assert_eq!(lathed.show("demo").reason, "the guest's kernel panicked: no init");
    lathed.wait(lathed.machines.resume("demo")).unwrap();
    monitor.told(|told| told.panic = None);
    monitor.event(&MonitorEvent::Rebooted {});
    let reason = |wanted: &str| until(|| lathed.show("demo").reason == wanted);
    reason("");
    panic();
    world.launcher.monitor("demo").end(ExitReason::Quit);
    let failed = lathed.settled("demo", MachineState::Failed);
    assert_eq!(failed.reason, "the guest's kernel panicked: no init");
    world.check(&lathed);
}

#[test]
fn a_watchdog_that_pauses_or_ends_says_so() {
    let world = World::new();
    let lathed = world.lathed();
    let watched = RunRequest { watchdog: Some(OnTrouble::Pause), ..world.request("demo") };
    lathed.run(watched).unwrap();
    let monitor = world.launcher.monitor("demo");
    monitor.told(|told| (told.phase, told.expired) = (Phase::Paused, true));
    monitor.event(&MonitorEvent::WatchdogExpired {});
    monitor.event(&MonitorEvent::Phase(Phase::Paused));
    let paused = lathed.settled("demo", MachineState::Paused);
    assert_eq!(paused.reason, "the guest's watchdog expired");
    lathed.kill();
    let lathed = world.lathed();
    assert_eq!(lathed.show("demo").reason, "the guest's watchdog expired");
    // Whoever pauses it later has another reason.
    lathed.wait(lathed.machines.resume("demo")).unwrap();
    monitor.told(|told| told.expired = false);
    monitor.event(&MonitorEvent::Phase(Phase::Running));
    lathed.wait(lathed.machines.pause("demo")).unwrap();
    until(|| lathed.show("demo").reason.is_empty());
    monitor.end(ExitReason::Watchdog);
    let failed = lathed.settled("demo", MachineState::Failed);
    assert_eq!(failed.reason, "the guest's watchdog expired");
    world.check(&lathed);
}

#[test]
fn machines_run_on_without_lathed_and_are_found_again() {
    let world = World::new();
    let lathed = world.lathed();
    for name in ["stays", "dies", "again", "off"] {
        let restart = if name == "again" { RestartPolicy::OnFailure } else { RestartPolicy::No };
        lathed.run(RunRequest { restart, ..world.request(name) }).unwrap();
    }
    lathed.kill();
    assert_eq!(world.launcher.living().len(), 4);
    world.launcher.monitor("dies").die();
    world.launcher.monitor("again").die();
    // Somebody has changed a rate meanwhile.
    world.ports.0.lock().unwrap().insert("lt-stays".to_owned(), 7);
    world.ports.0.lock().unwrap().insert("lt-stray".to_owned(), 7);
    let lathed = world.lathed();
    assert_eq!(lathed.show("stays").state, MachineState::Running);
    assert_eq!(lathed.show("stays").net.actual, 1_000_000);
    let dead = lathed.settled("dies", MachineState::Failed);
    assert_eq!(dead.reason, "monitor killed by signal 9");
    assert_eq!(lathed.settled("again", MachineState::Running).restarts, 1);
    world.launcher.monitor("off").end(ExitReason::PowerOff);
    let off = lathed.settled("off", MachineState::Stopped);
    assert_eq!(off.reason, "powered off by the guest");
    world.launcher.monitor("stays").event(&MonitorEvent::Rebooted {});
    until(|| lathed.show("stays").restarts != 0);
    world.check(&lathed);
}

#[test]
fn a_reboot_of_the_host_brings_autostart_machines_back() {
    let world = World::new();
    let lathed = world.lathed();
    lathed.run(RunRequest { autostart: true, ..world.request("auto") }).unwrap();
    lathed.run(world.request("other")).unwrap();
    lathed
        .wait(lathed.machines.core.store.apply(Change::Fact("boot_id", "an earlier boot".to_owned())))
        .unwrap();
    lathed.kill();
    for name in ["auto", "other"] {
        world.launcher.monitor(name).die();
    }
    world.ports.0.lock().unwrap().clear();
    let lathed = world.lathed();
    let auto = lathed.settled("auto", MachineState::Running);
    assert_eq!((auto.net.actual, auto.addresses.as_slice()), (1_000_000, &["10.77.0.2/16".to_owned()][..]));
    assert_eq!(lathed.settled("other", MachineState::Stopped).reason, life::HOST_REBOOTED);
    world.check(&lathed);
}

#[test]
fn the_power_button_is_pressed_until_somebody_watches_it() {
    let world = World::new();
    let lathed = world.lathed();
    *world.launcher.script.lock().unwrap() = Script { ignored_presses: 2, ..Script::default() };
    lathed.run(world.request("sleepy")).unwrap();
    let monitor = world.launcher.monitor("sleepy");
    lathed.wait(lathed.machines.stop("sleepy", StopRequest { timeout_sec: 20, force: false })).unwrap();
    monitor.told(|told| {
        assert_eq!(told.commands.iter().filter(|name| *name == "power_button").count(), 3);
        assert!(!told.commands.contains(&"quit".to_owned()));
    });
    world.check(&lathed);
}

#[test]
fn at_shutdown_of_the_host_machines_get_the_power_button() {
    let world = World::new();
    let lathed = world.lathed();
    lathed.run(world.request("polite")).unwrap();
    *world.launcher.script.lock().unwrap() = Script { ignored_presses: usize::MAX, ..Script::default() };
    lathed.run(world.request("deaf")).unwrap();
    let commands = |name: &str| world.launcher.monitor(name).told(|told| told.commands.clone());
    let (polite, deaf) = (world.launcher.monitor("polite"), world.launcher.monitor("deaf"));
    assert!(!commands("deaf").contains(&"quit".to_owned()));
    lathed.wait(lathed.machines.shutdown(Shutdown::HostGoesDown { timeout: Duration::from_millis(300) }));
    assert!(polite.told(|told| told.commands.contains(&"power_button".to_owned())));
    assert!(deaf.told(|told| told.commands.contains(&"quit".to_owned())));
    world.check(&lathed);
    assert!(lathed.run(world.request("late")).is_err());
}

#[test]
fn the_guest_agent_is_found_and_told_its_addresses() {
    let world = World::new();
    let lathed = world.lathed();
    lathed.run(world.request("demo")).unwrap();
    assert!(!lathed.show("demo").guest_agent);
    // The fake monitor holds the listener that it was given; the guest serves on another of the same name.
    let socket = world.folder.path().join("run/machines/demo/vsock.sock");
    fs::remove_file(&socket).unwrap();
    let asked = lathed.wait(async { guest::tests::fake_guest(&socket) });
    until(|| lathed.show("demo").guest_agent);
    let network = asked.lock().unwrap()[1].clone();
    let lathe_guest::protocol::Request::Network(network) = network else { panic!("{network:?}") };
    assert_eq!(network.hostname, "demo");
    assert_eq!(network.interfaces[0].addresses, ["10.77.0.2/16"]);
    assert_eq!(network.interfaces[0].gateways, ["10.77.0.1"]);
    lathed.wait(lathed.machines.guest_stream("demo")).unwrap();
    lathed.wait(lathed.machines.stop("demo", StopRequest { timeout_sec: 1, force: false })).unwrap();
    let asked = asked.lock().unwrap();
    assert!(asked.iter().any(|request| matches!(request, lathe_guest::protocol::Request::Shutdown { .. })));
}

/// What somebody does to a host, over and over, until lathed is killed.
async fn bustle(machines: Machines, killed: Arc<AtomicBool>, request: RunRequest, seed: u64) {
    let name = request.name.clone();
    for round in seed.. {
        if killed.load(Ordering::Relaxed) {
            return;
        }
        let _ = match round % 5 {
            0 => machines.run(request.clone()).await.map(|_| ()),
            1 => {
                let net_bit_per_sec = Some(1_000_000 + round * 1000);
                let cpu_milli = Some(100 + round % 50);
                let change = ResizeRequest { net_bit_per_sec, cpu_milli, ..Default::default() };
                machines.resize(&name, change, None).await.map(|_| ())
            }
            2 => machines.stop(&name, STOP).await.map(|_| ()),
            3 => machines.start_machine(&name).await.map(|_| ()),
            _ => machines.remove(&name, true, true).await.map(|_| ()),
        };
    }
}

#[test]
fn kill_at_any_moment_loses_nothing_and_leaves_nothing_half_made() {
    let world = World::new();
    let mut random: u64 = 0x9e37_79b9_7f4a_7c15;
    for round in 0..20 {
        let lathed = world.lathed();
        for (number, name) in ["a", "b", "c"].iter().enumerate() {
            let request = world.request(name);
            let (machines, killed) = (lathed.machines.clone(), Arc::clone(&lathed.killed));
            lathed.runtime.spawn(bustle(machines, killed, request, round + number as u64));
        }
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        std::thread::sleep(Duration::from_micros(500 + (random >> 33) % 60_000));
        lathed.kill();
        let lathed = world.lathed();
        for entry in lathed.machines.core.entries() {
            lathed.wait(entry.until(Life::is_settled));
        }
        world.check(&lathed);
        for entry in lathed.machines.core.entries() {
            lathed.wait(lathed.machines.remove(&entry.name, true, true)).unwrap();
        }
        world.check(&lathed);
        assert_eq!(lathed.machines.core.with_books(|books| *books.held("a").shape()), Shape::default());
        lathed.kill();
    }
}

/// Whoever reads the host's view, whoever has a machine locked and asks what the host could give, and whoever changes the books: none of them
/// may wait for the others in a circle.
#[test]
fn the_hosts_view_and_the_books_do_not_wait_for_each_other() {
    let world = World::new();
    let lathed = world.lathed();
    lathed.run(world.request("a")).unwrap();
    let machines = lathed.machines.clone();
    let entry = machines.core.entry("a").unwrap();
    let (done, ended) = std::sync::mpsc::channel();
    let until = Instant::now() + Duration::from_millis(500);
    let mut rounds: Vec<Box<dyn FnMut() + Send>> = Vec::new();
    let view = machines.clone();
    rounds.push(Box::new(move || drop(view.host())));
    let look = machines.clone();
    rounds.push(Box::new(move || assert!(entry.with(|_| look.core.most()).cpu.0 > 0)));
    let books = machines.clone();
    rounds.push(Box::new(move || books.core.with_books(|_| ())));
    for mut round in rounds {
        let done = done.clone();
        std::thread::spawn(move || {
            while Instant::now() < until {
                round();
            }
            done.send(()).unwrap();
        });
    }
    for _ in 0..3 {
        if ended.recv_timeout(PATIENCE).is_err() {
            eprintln!("they wait for each other");
            // Whoever cleans up would wait with them.
            std::process::abort();
        }
    }
    lathed.kill();
}
