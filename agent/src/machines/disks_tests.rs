//! Disks that come, grow and go against fake monitors, and lathed killed at any moment of that.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lathe_vmm::control::wire::{DiskStats, Event as MonitorEvent};

use super::record::{Disk, Drive, Link};
use super::tests::{Lathed, STOP, World, until};
use super::*;
use crate::api::wire::{DiskAddRequest, DiskSource, DiskState, DiskView};
use crate::monitor::fake::Script;
use crate::store::Change;

const MIB: u64 = 1 << 20;

fn empty(mib: u64) -> DiskAddRequest {
    DiskAddRequest { size_bytes: Some(mib * MIB), ..Default::default() }
}

fn removal(disk: &str) -> DiskChange {
    DiskChange::Remove { disk: disk.to_owned(), purge: false, timeout_sec: None }
}

impl Lathed {
    fn change(&self, change: DiskChange) -> Result<DiskChanged, Problem> {
        self.wait(self.machines.change_disk("demo", change))
    }

    fn add(&self, request: DiskAddRequest) -> Result<DiskView, Problem> {
        match self.change(DiskChange::Add(request))? {
            DiskChanged::Disk(view) => Ok(view),
            DiskChanged::Removed(removed) => panic!("{removed:?}"),
        }
    }

    fn grow(&self, disk: &str, size_bytes: u64) -> Result<DiskChanged, Problem> {
        self.change(DiskChange::Grow { disk: disk.to_owned(), size_bytes })
    }

    fn disks(&self) -> Vec<DiskView> {
        self.wait(self.machines.disks("demo")).unwrap().disks
    }

    fn states(&self) -> Vec<(String, DiskState)> {
        self.disks().into_iter().map(|disk| (disk.name, disk.state)).collect()
    }

    /// Waits until the disks are in these states.
    fn until(&self, states: &[(&str, DiskState)]) {
        let states: Vec<_> = states.iter().map(|(name, state)| ((*name).to_owned(), *state)).collect();
        until(|| self.states() == states);
    }

    /// Stores a record with this disk as an earlier lathed may have left it, and dies.
    fn leave(self, drive: Drive) {
        let entry = self.machines.core.entry("demo").unwrap();
        let mut record = entry.with(|shared| shared.record.clone());
        record.source.disks.retain(|other| other.name != drive.name);
        record.insert_drive(drive);
        self.wait(self.machines.core.store.apply(Change::Put(Box::new(record)))).unwrap();
        self.kill();
    }
}

impl World {
    /// Serials and sizes that the monitor has.
    fn plugged(&self) -> Vec<(String, u64)> {
        let disks = |told: &mut crate::monitor::fake::Told| {
            told.disks.iter().map(|disk| (disk.status.serial.clone(), disk.status.bytes)).collect()
        };
        self.launcher.monitor("demo").told(disks)
    }

    /// The guest lets go of what it has been asked for, late.
    fn let_go(&self) {
        let monitor = self.launcher.monitor("demo");
        let gone: Vec<String> = monitor.told(|told| {
            let gone = told.disks.extract_if(.., |disk| disk.asked);
            gone.map(|disk| disk.status.device).collect()
        });
        for device in gone {
            monitor.event(&MonitorEvent::DeviceDetached { device });
        }
    }

    fn script(&self, script: Script) {
        *self.launcher.script.lock().unwrap() = script;
    }

    fn disk_file(&self, name: &str) -> PathBuf {
        self.folder.path().join("state/machines/demo").join(format!("disk-{name}.raw"))
    }

    /// Names of the files of disks in the machine's folder.
    fn files(&self) -> Vec<String> {
        let folder = fs::read_dir(self.folder.path().join("state/machines/demo")).unwrap();
        let names = folder.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> = names.filter(|name| name.starts_with("disk")).collect();
        names.sort();
        names
    }
}

fn drive(name: &str, mib: u64, link: Link) -> Drive {
    let disk = Disk::Empty { size_bytes: mib * MIB };
    Drive { disk, name: name.to_owned(), read_only: false, link }
}

#[test]
fn a_disk_comes_grows_and_goes_while_the_guest_runs() {
    let world = World::new();
    let lathed = world.lathed();
    lathed.run(world.request("demo")).unwrap();
    let view = lathed.add(empty(2)).unwrap();
    assert_eq!(
        (view.name.as_str(), view.state, view.size_bytes),
        ("data1", DiskState::Attached, Some(2 * MIB))
    );
    assert_eq!(world.plugged(), [("data1".to_owned(), 2 * MIB)]);
    assert_eq!(lathed.show("demo").revision, 2);
    assert_eq!(lathed.machines.host().resources.disk.granted, 2 * MIB);
    lathed.grow("data1", 4 * MIB).unwrap();
    lathed.grow("data1", 4 * MIB).unwrap();
    assert_eq!((world.plugged()[0].1, lathed.show("demo").revision), (4 * MIB, 3), "twice is once");
    assert_eq!(lathed.grow("data1", 3 * MIB).unwrap_err().code, "disk-cannot-shrink");
    fs::write(world.disk_file("data1"), "written").unwrap();
    let DiskChanged::Removed(removed) = lathed.change(removal("data1")).unwrap() else {
        panic!("still there")
    };
    assert_eq!(fs::read(removed.kept.unwrap()).unwrap(), b"written");
    assert!(world.plugged().is_empty() && lathed.disks().is_empty() && world.files().is_empty());
    assert_eq!(lathed.machines.host().resources.disk.granted, 0);
    let purge = DiskChange::Remove { disk: "data1".to_owned(), purge: true, timeout_sec: None };
    lathed.add(empty(2)).unwrap();
    let DiskChanged::Removed(removed) = lathed.change(purge).unwrap() else { panic!("still there") };
    assert_eq!((removed.kept, world.files().len()), (None, 0));
    world.check(&lathed);
}

#[test]
fn a_machine_that_is_off_gets_its_disks_at_its_start_and_keeps_them() {
    let world = World::new();
    let lathed = world.lathed();
    lathed.run(world.request("demo")).unwrap();
    lathed.wait(lathed.machines.stop("demo", STOP)).unwrap();
    assert_eq!(lathed.add(empty(2)).unwrap().state, DiskState::Detached);
    lathed.add(DiskAddRequest { name: Some("logs".to_owned()), ..empty(1) }).unwrap();
    lathed.grow("logs", 3 * MIB).unwrap();
    lathed.kill();
    let lathed = world.lathed();
    lathed.wait(lathed.machines.start_machine("demo")).unwrap();
    assert_eq!(world.plugged(), [("data1".to_owned(), 2 * MIB), ("logs".to_owned(), 3 * MIB)]);
    lathed.kill();
    let lathed = world.lathed();
    lathed.until(&[("data1", DiskState::Attached), ("logs", DiskState::Attached)]);
    // One from the start goes like any other, and another may come instead.
    lathed.change(removal("data1")).unwrap();
    assert_eq!(lathed.add(empty(5)).unwrap().name, "data1");
    lathed.wait(lathed.machines.stop("demo", STOP)).unwrap();
    lathed.change(removal("logs")).unwrap();
    lathed.wait(lathed.machines.start_machine("demo")).unwrap();
    assert_eq!(world.plugged(), [("data1".to_owned(), 5 * MIB)]);
    let removed = lathed.wait(lathed.machines.remove("demo", false, true)).unwrap();
    assert!(PathBuf::from(removed.kept.unwrap()).join("disk-data1.raw").exists());
}

#[test]
fn what_the_monitor_refuses_leaves_nothing() {
    let world = World::new();
    world.script(Script { refuse_disks: true, ..Script::default() });
    let lathed = world.lathed();
    lathed.run(world.request("demo")).unwrap();
    assert_eq!(lathed.add(empty(2)).unwrap_err().code, "no-disk-slot");
    let uploads = world.folder.path().join("state/uploads");
    fs::write(uploads.join("u1"), "disk").unwrap();
    let upload = DiskAddRequest {
        source: Some(DiskSource::Upload { id: "u1".to_owned() }),
        ..DiskAddRequest::default()
    };
    assert_eq!(lathed.add(upload).unwrap_err().code, "no-disk-slot");
    assert!(uploads.join("u1").exists(), "its upload stays");
    assert!(lathed.disks().is_empty() && world.files().is_empty());
    assert_eq!((lathed.show("demo").revision, lathed.machines.host().resources.disk.granted), (1, 0));
    lathed.kill();
    assert!(world.lathed().disks().is_empty());
}

#[test]
fn a_monitor_has_four_slots_and_one_of_an_earlier_release_none() {
    let world = World::new();
    let lathed = world.lathed();
    lathed.run(world.request("demo")).unwrap();
    let boot = world.launcher.monitor("demo").told(|told| told.config.as_ref().unwrap().hotplug_slots);
    assert_eq!(boot, 4);
    for number in 1..=4 {
        assert_eq!(lathed.add(empty(1)).unwrap().name, format!("data{number}"));
    }
    assert_eq!(lathed.add(empty(1)).unwrap_err().code, "no-disk-slot");
    lathed.change(removal("data2")).unwrap();
    assert_eq!(lathed.add(empty(1)).unwrap().name, "data2");
    lathed.wait(lathed.machines.remove("demo", true, true)).unwrap();
    world.script(Script { protocol: Some(1), ..Script::default() });
    lathed.run(world.request("demo")).unwrap();
    assert_eq!(lathed.add(empty(1)).unwrap_err().code, "no-disk-slot");
    lathed.wait(lathed.machines.stop("demo", STOP)).unwrap();
    lathed.add(empty(1)).unwrap();
    lathed.wait(lathed.machines.start_machine("demo")).unwrap();
    assert_eq!(lathed.states(), [("data1".to_owned(), DiskState::Attached)]);
    assert_eq!(lathed.change(removal("data1")).unwrap_err().code, "no-disk-slot");
    lathed.until(&[("data1", DiskState::Attached)]);
}

#[test]
fn a_guest_that_does_not_let_go_keeps_its_disk() {
    let world = World::new();
    world.script(Script { deaf_guest: true, ..Script::default() });
    let lathed = world.lathed();
    lathed.run(world.request("demo")).unwrap();
    lathed.add(empty(2)).unwrap();
    let hurried = DiskChange::Remove { disk: "data1".to_owned(), purge: true, timeout_sec: Some(1) };
    let problem = lathed.change(hurried).unwrap_err();
    assert_eq!(problem.code, "disk-not-released", "{problem}");
    lathed.until(&[("data1", DiskState::Attached)]);
    assert!(world.disk_file("data1").exists());
    // Now it does, and gets the disk again as another device.
    world.let_go();
    until(|| !world.plugged().is_empty());
    // The monitor has it a moment before lathed is told so.
    lathed.until(&[("data1", DiskState::Attached)]);
    assert_eq!(world.launcher.monitor("demo").told(|told| told.disks[0].status.device.clone()), "block1");
}

#[test]
fn a_removal_survives_lathed_and_ends_with_the_machine() {
    let world = World::new();
    world.script(Script { deaf_guest: true, ..Script::default() });
    let lathed = world.lathed();
    lathed.run(world.request("demo")).unwrap();
    for name in ["asked", "gone", "off"] {
        lathed.add(DiskAddRequest { name: Some(name.to_owned()), ..empty(1) }).unwrap();
        let machines = lathed.machines.clone();
        lathed.runtime.spawn(async move { machines.change_disk("demo", removal(name)).await.map(|_| ()) });
    }
    let removing = |names: &[&str]| -> Vec<(String, DiskState)> {
        names.iter().map(|name| ((*name).to_owned(), DiskState::Removing)).collect()
    };
    until(|| lathed.states() == removing(&["asked", "gone", "off"]));
    assert_eq!(lathed.grow("asked", 9 * MIB).unwrap_err().code, "disk-busy");
    lathed.kill();
    let monitor = world.launcher.monitor("demo");
    monitor.told(|told| {
        told.disks.retain(|disk| disk.status.serial != "gone");
        told.disks.iter_mut().for_each(|disk| disk.asked = false);
    });
    let lathed = world.lathed();
    until(|| lathed.states() == removing(&["asked", "off"]));
    assert_eq!(world.files(), ["disk-asked.raw", "disk-off.raw"]);
    monitor.told(|told| {
        assert!(told.disks.iter().all(|disk| disk.asked), "asked again");
        told.disks[1].asked = false;
    });
    world.let_go();
    until(|| lathed.states() == removing(&["off"]));
    lathed.wait(lathed.machines.stop("demo", STOP)).unwrap();
    assert!(lathed.disks().is_empty() && world.files().is_empty());
    let kept = fs::read_dir(world.folder.path().join("state/kept")).unwrap();
    let kept = kept.flat_map(|shelf| fs::read_dir(shelf.unwrap().path()).unwrap());
    assert_eq!(kept.count(), 3, "nobody said purge");
}

#[test]
fn an_intent_is_finished_where_the_guest_has_it_and_taken_back_where_not() {
    let world = World::new();
    let lathed = world.lathed();
    lathed.run(world.request("demo")).unwrap();
    lathed.add(empty(2)).unwrap();
    // As if it had not been stored that the guest has it.
    lathed.leave(drive("data1", 2, Link::Adding));
    let lathed = world.lathed();
    lathed.until(&[("data1", DiskState::Attached)]);
    fs::write(world.disk_file("data2"), "half made").unwrap();
    lathed.leave(drive("data2", 2, Link::Adding));
    let lathed = world.lathed();
    lathed.until(&[("data1", DiskState::Attached)]);
    assert_eq!(world.files(), ["disk-data1.raw"]);
    // Grown in the record only.
    lathed.leave(drive("data1", 6, Link::Here));
    let lathed = world.lathed();
    lathed.until(&[("data1", DiskState::Attached)]);
    assert_eq!(world.plugged(), [("data1".to_owned(), 6 * MIB)]);
    lathed.wait(lathed.machines.stop("demo", STOP)).unwrap();
    fs::write(world.disk_file("data3"), "half made").unwrap();
    lathed.leave(drive("data3", 2, Link::Adding));
    let lathed = world.lathed();
    lathed.leave(drive("data1", 6, Link::Removing { purge: true }));
    let lathed = world.lathed();
    assert!(lathed.disks().is_empty() && world.files().is_empty());
    assert_eq!(lathed.machines.host().resources.disk.granted, 0);
}

#[test]
fn disks_in_place_belong_to_one_machine_and_are_not_ours() {
    let world = World::new();
    let disks = world.folder.path().join("disks");
    fs::create_dir_all(&disks).unwrap();
    fs::write(disks.join("d"), [0; 4096]).unwrap();
    let in_place = |read_only| DiskAddRequest {
        source: Some(DiskSource::Path { path: disks.join("d").to_string_lossy().into_owned(), read_only }),
        ..DiskAddRequest::default()
    };
    let lathed = world.lathed();
    lathed.run(world.request("demo")).unwrap();
    lathed.run(world.request("other")).unwrap();
    lathed.wait(lathed.machines.change_disk("other", DiskChange::Add(in_place(false)))).unwrap();
    let problem = lathed.add(in_place(false)).unwrap_err();
    assert!(problem.code == "disk-in-use" && problem.fix == "lathe stop other", "{problem}");
    lathed.wait(lathed.machines.change_disk("other", removal("data1"))).unwrap();
    assert!(disks.join("d").exists());
    lathed.add(in_place(true)).unwrap();
    assert_eq!(lathed.add(in_place(true)).unwrap_err().code, "disk-in-use", "once is enough");
    assert_eq!(lathed.grow("data1", 8192).unwrap_err().code, "disk-read-only");
    lathed.change(removal("data1")).unwrap();
    lathed.add(in_place(false)).unwrap();
    lathed.grow("data1", 8192).unwrap();
    assert_eq!((world.plugged()[0].1, fs::metadata(disks.join("d")).unwrap().len()), (8192, 8192));
}

#[test]
fn what_makes_no_sense_is_refused_and_changes_nothing() {
    let world = World::new();
    let lathed = world.lathed();
    lathed.run(world.request("demo")).unwrap();
    lathed.add(empty(1)).unwrap();
    let named = |name: &str| DiskAddRequest { name: Some(name.to_owned()), ..empty(1) };
    let upload = |id: &str| Some(DiskSource::Upload { id: id.to_owned() });
    for (request, code) in [
        (named("data1"), "disk-name-taken"),
        (named("Data"), "bad-name"),
        (named("a/b"), "bad-name"),
        (named("a-name-of-more-than-20"), "bad-name"),
        (empty(0), "bad-amount"),
        (DiskAddRequest::default(), "bad-request"),
        (DiskAddRequest { size_bytes: Some(u64::MAX), ..Default::default() }, "bad-amount"),
        (DiskAddRequest { size_bytes: Some(1 << 60), ..Default::default() }, "disk-over-capacity"),
        (DiskAddRequest { read_only: true, ..empty(1) }, "bad-request"),
        (DiskAddRequest { source: upload("none"), ..Default::default() }, "no-such-upload"),
        (
            DiskAddRequest { source: upload("none"), image: Some("x".to_owned()), ..Default::default() },
            "bad-request",
        ),
        (
            DiskAddRequest {
                source: Some(DiskSource::Path { path: "/etc/passwd".to_owned(), read_only: true }),
                ..Default::default()
            },
            "disk-not-allowed",
        ),
    ] {
        let plan = lathed.wait(lathed.machines.plan_disk("demo", &DiskChange::Add(request.clone())));
        assert_eq!(plan.unwrap_err().code, code, "{request:?}");
        assert_eq!(lathed.add(request.clone()).unwrap_err().code, code, "{request:?}");
    }
    assert_eq!(lathed.grow("data2", MIB).unwrap_err().code, "no-such-disk");
    assert_eq!(lathed.grow("data1", 1 << 60).unwrap_err().code, "disk-over-capacity");
    assert_eq!(lathed.change(removal("data2")).unwrap_err().code, "no-such-disk");
    lathed.wait(lathed.machines.pause("demo")).unwrap();
    assert_eq!(lathed.change(removal("data1")).unwrap_err().code, "machine-paused");
    assert_eq!(lathed.states(), [("data1".to_owned(), DiskState::Attached)]);
    let plan = |change: DiskChange| lathed.wait(lathed.machines.plan_disk("demo", &change)).unwrap().steps;
    let steps = plan(DiskChange::Grow { disk: "data1".to_owned(), size_bytes: 3 * MIB });
    assert_eq!((steps[0].from, steps[0].to), (MIB, 3 * MIB));
    assert!(plan(DiskChange::Grow { disk: "data1".to_owned(), size_bytes: MIB }).is_empty());
    assert_eq!(plan(DiskChange::Add(empty(2)))[0].to, 2 * MIB);
    assert_eq!((lathed.disks().len(), lathed.show("demo").revision), (1, 2));
}

#[test]
fn what_disks_do_is_counted_and_stays_counted_when_one_goes() {
    let world = World::new();
    let lathed = world.lathed();
    lathed.run(world.request("demo")).unwrap();
    lathed.add(empty(1)).unwrap();
    let monitor = world.launcher.monitor("demo");
    let done = |reads| {
        let disk = DiskStats { reads, writes: 2, written_bytes: 8192, ..DiskStats::default() };
        monitor.told(|told| told.stats.disks = vec![disk]);
    };
    done(5);
    until(|| lathed.show("demo").disk_operations == 7);
    done(105);
    until(|| lathed.show("demo").iops.used > 0);
    assert_eq!(lathed.show("demo").disk_operations, 107);
    done(0);
    until(|| lathed.show("demo").iops.used == 0);
    let view = lathed.show("demo");
    assert_eq!((view.disk_operations, view.disk_written_bytes, view.disk_read_bytes), (107, 8192, 0));
}

#[test]
fn the_disk_that_a_running_machine_boots_from_stays() {
    let world = World::new();
    fs::create_dir_all(world.folder.path().join("state/uploads")).unwrap();
    fs::write(world.folder.path().join("state/uploads/root"), [0; 4096]).unwrap();
    let lathed = world.lathed();
    let root = DiskSource::Upload { id: "root".to_owned() };
    lathed.run(RunRequest { disks: vec![root], ..world.request("demo") }).unwrap();
    assert!(lathed.disks()[0].boots && lathed.disks()[0].name == "lathe-0");
    assert_eq!(lathed.change(removal("lathe-0")).unwrap_err().code, "disk-boots");
    lathed.add(empty(1)).unwrap();
    lathed.wait(lathed.machines.stop("demo", STOP)).unwrap();
    // Another takes its place, and its order.
    lathed.change(removal("lathe-0")).unwrap();
    assert!(!lathed.disks()[0].boots, "a disk of data is not booted from because it is alone");
    lathed.add(DiskAddRequest { name: Some("lathe-0".to_owned()), ..empty(3) }).unwrap();
    assert!(lathed.disks()[0].boots && lathed.disks()[0].name == "lathe-0");
    lathed.wait(lathed.machines.start_machine("demo")).unwrap();
    assert_eq!(world.plugged()[0], ("lathe-0".to_owned(), 3 * MIB));
}

/// Sizes of disks that lathed has acknowledged, and of those that it may or may not have.
#[derive(Default)]
struct Promises {
    there: BTreeMap<String, u64>,
    open: Option<String>,
}

/// What somebody does to the disks of a machine, over and over, until lathed is killed; one name at a time.
async fn bustle(machines: Machines, killed: Arc<AtomicBool>, promises: Arc<Mutex<Promises>>, seed: u64) {
    for round in seed.. {
        let name = format!("d{}", round % 3);
        let size = MIB * (1 + round % 7);
        let before = promises.lock().unwrap().there.get(&name).copied();
        let change = match before {
            None => DiskChange::Add(DiskAddRequest {
                name: Some(name.clone()),
                size_bytes: Some(size),
                ..Default::default()
            }),
            Some(before) if round % 2 == 0 => {
                DiskChange::Grow { disk: name.clone(), size_bytes: before + MIB }
            }
            Some(_) => DiskChange::Remove { disk: name.clone(), purge: true, timeout_sec: None },
        };
        promises.lock().unwrap().open = Some(name.clone());
        let done = machines.change_disk("demo", change).await;
        {
            let mut promises = promises.lock().unwrap();
            if killed.load(Ordering::Relaxed) {
                return;
            }
            match done {
                Ok(DiskChanged::Disk(view)) => promises.there.insert(name, view.size_bytes.unwrap()),
                Ok(DiskChanged::Removed(_)) => promises.there.remove(&name),
                Err(_) => None,
            };
            promises.open = None;
        }
        if round % 5 == 0 {
            let _ = machines.stop("demo", STOP).await;
            let _ = machines.start_machine("demo").await;
        }
    }
}

#[test]
fn what_was_acknowledged_survives_a_kill_at_any_moment() {
    let world = World::new();
    let lathed = world.lathed();
    lathed.run(world.request("demo")).unwrap();
    lathed.kill();
    let promises = Arc::new(Mutex::new(Promises::default()));
    let mut random: u64 = 0x9e37_79b9_7f4a_7c15;
    for round in 0..20 {
        let lathed = world.lathed();
        let (machines, killed) = (lathed.machines.clone(), Arc::clone(&lathed.killed));
        lathed.runtime.spawn(bustle(machines, killed, Arc::clone(&promises), round));
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        std::thread::sleep(Duration::from_micros(500 + (random >> 33) % 60_000));
        lathed.kill();
        let lathed = world.lathed();
        let entry = lathed.machines.core.entry("demo").unwrap();
        lathed.wait(entry.until(Life::is_settled));
        let off = lathed.show("demo").state != MachineState::Running;
        let rests = if off { DiskState::Detached } else { DiskState::Attached };
        until(|| lathed.states().iter().all(|(_, state)| *state == rests));
        let found: BTreeMap<String, u64> =
            lathed.disks().into_iter().map(|disk| (disk.name, disk.size_bytes.unwrap())).collect();
        let mut promised = promises.lock().unwrap();
        let open = promised.open.take();
        let known = |names: &BTreeMap<String, u64>| -> BTreeMap<String, u64> {
            names
                .iter()
                .filter(|(name, _)| Some(*name) != open.as_ref())
                .map(|(name, size)| (name.clone(), *size))
                .collect()
        };
        assert_eq!(known(&found), known(&promised.there), "round {round}, open {open:?}");
        let files: Vec<String> = found.keys().map(|name| format!("disk-{name}.raw")).collect();
        assert_eq!(world.files(), files, "round {round}");
        for (name, size) in &found {
            assert_eq!(fs::metadata(world.disk_file(name)).unwrap().len(), *size, "{name}");
        }
        if !off {
            let plugged: BTreeMap<String, u64> = world.plugged().into_iter().collect();
            assert_eq!(plugged, found, "round {round}");
        }
        assert_eq!(lathed.machines.host().resources.disk.granted, found.values().sum::<u64>());
        promised.there = found;
        drop(promised);
        world.check(&lathed);
        lathed.kill();
    }
}
