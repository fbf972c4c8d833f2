//! Changes of shape whose limits the kernel does not take: the files of a machine's cgroups are plain ones, and some refuse to be written.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use lathe_cgroup::MachineTree;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

use super::tests::{Lathed, World};
use super::*;
use crate::api::wire::{Cores, CpusView, MachineState, OperationView, Tier};
use crate::host::placement::{self, Wish};
use crate::host::topology::{self, Topology};

const MIB: u64 = 1 << 20;

/// What each of the three groups has, as far as lathed reads it.
const GROUP: [(&str, &str); 5] = [
    ("cgroup.procs", ""),
    ("cgroup.threads", ""),
    ("cpu.max", "max 100000\n"),
    ("cpu.weight", "100\n"),
    ("cpu.stat", "usage_usec 0\nnr_periods 0\nnr_throttled 0\nthrottled_usec 0\n"),
];
/// What `machine` has besides. So little is charged that no limit has to stay up for it.
const MACHINE: [(&str, &str); 11] = [
    ("memory.max", "max\n"),
    ("memory.high", "max\n"),
    ("memory.low", "0\n"),
    ("memory.min", "0\n"),
    ("memory.current", "30000000\n"),
    ("memory.stat", "anon 29000000\nfile 0\nkernel 1000000\nshmem 0\n"),
    ("memory.events", "low 0\nhigh 0\nmax 0\noom 0\noom_kill 0\n"),
    ("pids.max", "max\n"),
    ("pids.current", "4\n"),
    ("io.stat", ""),
    ("cgroup.events", "populated 1\nfrozen 0\n"),
];

/// What was given of the unit's own.
const UNIT: [(&str, &str); 4] =
    [("cpu.weight", "100\n"), ("cpu.idle", "0\n"), ("memory.min", "0\n"), ("memory.low", "0\n")];

/// The cgroups of the machine `demo`.
struct Groups {
    unit: PathBuf,
}

impl Groups {
    /// Makes them, and gives them to every monitor that is launched in this world.
    fn of(world: &World) -> Self {
        let groups = Self { unit: world.folder.path().join("lathe-vm@demo.service") };
        for name in ["machine", "machine/vcpu", "machine/vmm"] {
            groups.make(name);
        }
        for (file, text) in MACHINE {
            fs::write(groups.path("machine").join(file), text).unwrap();
        }
        for (file, text) in UNIT {
            fs::write(groups.unit.join(file), text).unwrap();
        }
        *world.launcher.tree.lock().unwrap() = Some(MachineTree::open(&groups.unit).unwrap());
        groups
    }

    fn make(&self, name: &str) {
        fs::create_dir_all(self.path(name)).unwrap();
        for (file, text) in GROUP {
            fs::write(self.path(name).join(file), text).unwrap();
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.unit.join(name)
    }

    fn limits(&self) -> (String, String) {
        let read = |name: &str| fs::read_to_string(self.path(name)).unwrap().trim().to_owned();
        (read("machine/cpu.max"), read("machine/memory.max"))
    }
}

/// A file that shows what it did and refuses every write, whoever writes, until this is dropped.
struct Refusing {
    path: PathBuf,
    file: File,
}

impl Refusing {
    fn new(path: &Path) -> Self {
        let mut file = File::from(memfd_create("limit", MemfdFlags::ALLOW_SEALING).unwrap());
        file.write_all(&fs::read(path).unwrap()).unwrap();
        fcntl_add_seals(&file, SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK).unwrap();
        fs::remove_file(path).unwrap();
        let target = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
        std::os::unix::fs::symlink(target, path).unwrap();
        Self { path: path.to_owned(), file }
    }
}

impl Drop for Refusing {
    fn drop(&mut self) {
        let text = fs::read(&self.path).unwrap();
        assert_eq!(text.len() as u64, self.file.metadata().unwrap().len(), "nobody got round it");
        fs::remove_file(&self.path).unwrap();
        fs::write(&self.path, text).unwrap();
    }
}

fn change(cpu_milli: u64, memory_mib: u64) -> ResizeRequest {
    ResizeRequest {
        cpu_milli: Some(cpu_milli),
        memory_bytes: Some(memory_mib * MIB),
        ..ResizeRequest::default()
    }
}

/// `demo` with 0.1 CPU and 64 MiB, both limited.
fn running(world: &World) -> (Groups, Lathed) {
    let groups = Groups::of(world);
    let lathed = world.lathed();
    let view = lathed.run(world.request("demo")).unwrap();
    assert_eq!((view.state, view.memory.actual), (MachineState::Running, 64 * MIB));
    assert_eq!(groups.limits(), quota_and_wall(100, 64));
    (groups, lathed)
}

/// What the files say for a share of one vCPU and so much guest memory.
fn quota_and_wall(cpu_milli: u64, memory_mib: u64) -> (String, String) {
    (format!("{} 10000", cpu_milli * 10), (memory_mib * MIB + launch::OVERHEAD_BYTES).to_string())
}

fn resize(lathed: &Lathed, request: &ResizeRequest) -> ResizeView {
    lathed.wait(lathed.machines.resize("demo", request.clone(), None)).unwrap()
}

fn last(lathed: &Lathed) -> OperationView {
    lathed.wait(lathed.machines.operations("demo")).unwrap().operations.pop().unwrap()
}

/// The change has ended as if nobody had asked for it: in words, in the books, in the kernel and at the monitor.
fn expect_undone(world: &World, lathed: &Lathed, groups: &Groups, failed: &ResizeView, file: &str) {
    assert_eq!((failed.outcome, failed.revision), (ResizeOutcome::Failed, 1), "{}", failed.reason);
    assert!(failed.reason.contains(file) && failed.reason.contains("cannot"), "{}", failed.reason);
    // Looking at it once more may take a step in the background, at once.
    tests::until(|| lathed.show("demo").operation.is_none());
    let view = lathed.show("demo");
    assert_eq!((view.cpu.desired, view.cpu.granted, view.cpu.actual), (100, 100, 100));
    let memory = view.memory;
    assert_eq!((memory.desired, memory.granted, memory.actual), (64 * MIB, 64 * MIB, 64 * MIB));
    assert_eq!(view.vcpus, 1);
    assert_eq!(groups.limits(), quota_and_wall(100, 64));
    world.launcher.monitor("demo").told(|told| {
        let memory = told.memory.unwrap();
        assert_eq!((memory.requested_bytes, memory.balloon_target_bytes), (0, 0));
        assert_eq!(told.cpus.as_ref().unwrap().target, 1);
    });
    let host = lathed.machines.host().resources;
    assert_eq!((host.cpu.granted, host.memory.granted), (100, 64 * MIB));
    world.check(lathed);
}

#[test]
fn a_quota_that_the_kernel_refuses_fails_the_whole_change() {
    let world = World::new();
    let (groups, lathed) = running(&world);
    let quota = Refusing::new(&groups.path("machine/cpu.max"));
    let failed = resize(&lathed, &change(300, 128));
    expect_undone(&world, &lathed, &groups, &failed, "cpu.max");
    // As often as somebody asks.
    let failed = resize(&lathed, &change(2000, 64));
    expect_undone(&world, &lathed, &groups, &failed, "cpu.max");
    let failed = resize(&lathed, &change(50, 64));
    expect_undone(&world, &lathed, &groups, &failed, "cpu.max");
    drop(quota);
    let applied = resize(&lathed, &change(300, 128));
    assert_eq!(applied.outcome, ResizeOutcome::Applied, "{}", applied.reason);
    assert_eq!((applied.cpu.granted, applied.memory.granted), (300, 128 * MIB));
    assert_eq!(groups.limits(), quota_and_wall(300, 128));
    world.check(&lathed);
}

#[test]
fn memory_whose_limit_does_not_rise_is_not_offered_and_the_quota_goes_back() {
    let world = World::new();
    let (groups, lathed) = running(&world);
    let wall = Refusing::new(&groups.path("machine/memory.max"));
    let failed = resize(&lathed, &change(300, 128));
    expect_undone(&world, &lathed, &groups, &failed, "memory.max");
    drop(wall);
    assert_eq!(resize(&lathed, &change(300, 128)).outcome, ResizeOutcome::Applied);
    assert_eq!(groups.limits(), quota_and_wall(300, 128));
    world.check(&lathed);
}

#[test]
fn memory_whose_limit_does_not_fall_stays_the_machines() {
    let world = World::new();
    let (groups, lathed) = running(&world);
    assert_eq!(resize(&lathed, &change(100, 128)).outcome, ResizeOutcome::Applied);
    let wall = Refusing::new(&groups.path("machine/memory.max"));
    let failed = resize(&lathed, &change(100, 64));
    assert_eq!((failed.outcome, failed.memory.desired), (ResizeOutcome::Failed, 128 * MIB));
    assert!(failed.reason.contains("memory.max"), "{}", failed.reason);
    // Its guest had given the memory back already, and gets it again.
    tests::until(|| lathed.show("demo").memory.actual == 128 * MIB);
    assert_eq!(lathed.show("demo").memory.granted, 128 * MIB);
    assert_eq!(groups.limits(), quota_and_wall(100, 128));
    drop(wall);
    assert_eq!(resize(&lathed, &change(100, 64)).outcome, ResizeOutcome::Applied);
    assert_eq!(groups.limits(), quota_and_wall(100, 64));
    world.check(&lathed);
}

#[test]
fn while_nobody_knows_what_is_in_force_the_books_hold_the_larger_amount() {
    let world = World::new();
    let (groups, lathed) = running(&world);
    let (here, away) = (groups.path("machine/vcpu"), groups.path("away"));
    fs::rename(&here, &away).unwrap();
    let failed = resize(&lathed, &change(300, 64));
    assert_eq!((failed.outcome, failed.cpu.desired), (ResizeOutcome::Failed, 100));
    assert!(failed.reason.contains("cpu.max"), "{}", failed.reason);
    let view = lathed.show("demo");
    assert_eq!((view.cpu.granted, lathed.machines.host().resources.cpu.granted), (300, 300));
    let background = last(&lathed);
    assert!(background.background && background.outcome == ResizeOutcome::UnderWay, "{background:?}");
    assert!(background.reason.contains("cpu.max"), "{}", background.reason);
    fs::rename(&away, &here).unwrap();
    let found = resize(&lathed, &change(100, 64));
    assert_eq!((found.outcome, found.cpu.granted), (ResizeOutcome::Applied, 100), "{}", found.reason);
    assert_eq!(groups.limits(), quota_and_wall(100, 64));
    world.check(&lathed);
}

/// A machine that wants so much CPU as cores to itself.
fn dedicated(world: &World, cpu_milli: u64) -> RunRequest {
    RunRequest { cpu_milli, tier: Tier::Guaranteed, cores: Cores::Dedicated, ..world.request("demo") }
}

#[test]
fn cores_that_cannot_be_are_refused_and_nothing_is_made() {
    let world = World::new();
    let lathed = world.lathed();
    let all = topology::online(Path::new("/")).unwrap().0.len() as u64 * 1000;
    let refused = |request: RunRequest| lathed.run(request).unwrap_err();
    assert_eq!(refused(dedicated(&world, all)).code, "cores-over-capacity");
    let half = refused(dedicated(&world, 1500));
    assert_eq!((half.code, half.fix.as_str()), ("bad-amount", "lathe run demo --cpu 1"));
    let shared = refused(RunRequest { tier: Tier::Standard, ..dedicated(&world, 1000) });
    assert!(shared.code == "bad-amount" && shared.fix.contains("--tier guaranteed"), "{shared}");
    assert!(lathed.wait(lathed.machines.list()).is_empty());
    world.check(&lathed);
}

#[test]
fn cores_are_in_force_before_the_guest_runs_and_found_again() {
    let host = Topology::read(Path::new("/"), &topology::online(Path::new("/")).unwrap(), None);
    let cpus = host.cores.last().unwrap().size();
    let wishes = [("demo".to_owned(), Wish { cpus, now: None })].into_iter().collect();
    let placement = placement::place(&host, 0, &wishes);
    let Some(place) = placement.places.get("demo").map(ToString::to_string) else {
        println!("not tried: this host has one core");
        return;
    };
    let world = World::new();
    let groups = Groups::of(&world);
    let effective = |list: &str| {
        for group in ["machine", "machine/vcpu", "machine/vmm"] {
            fs::write(groups.path(group).join("cpuset.cpus"), "\n").unwrap();
            fs::write(groups.path(group).join("cpuset.cpus.effective"), list).unwrap();
        }
    };
    let lathed = world.lathed();
    effective(&placement.rest.to_string());
    let narrowed = lathed.run(dedicated(&world, cpus * 1000)).unwrap_err();
    assert_eq!(narrowed.code, "cores-over-capacity", "{narrowed}");
    assert!(lathed.wait(lathed.machines.list()).is_empty());
    effective(&place);
    let view = lathed.run(dedicated(&world, cpus * 1000)).unwrap();
    let (wanted, actual) = (Some(place.clone()), Some(place.clone()));
    let expected = CpusView { cores: Cores::Dedicated, wanted, actual, problem: String::new() };
    assert_eq!(view.cpus, expected);
    let file = groups.path("machine/cpuset.cpus");
    let written = || fs::read_to_string(&file).unwrap().trim().to_owned();
    assert_eq!(written(), place);
    let half = ResizeRequest { cpu_milli: Some(cpus * 1000 + 500), ..ResizeRequest::default() };
    let harvest = ResizeRequest { tier: Some(Tier::Harvest), ..ResizeRequest::default() };
    for request in [half, harvest] {
        let refused = lathed.wait(lathed.machines.resize("demo", request, None)).unwrap_err();
        assert_eq!(refused.code, "bad-amount", "{refused}");
    }
    lathed.kill();
    fs::write(&file, "0\n").unwrap();
    let lathed = world.lathed();
    tests::until(|| lathed.show("demo").cpus == expected && written() == place);
    world.check(&lathed);
}
