//! The shared uplink against a fake kernel that outlives lathed: classes follow machines, and lathed killed at any moment.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use lathe_netshape::{BitRate, ClassSpec, ClassState, RootQueue, UplinkClass, UplinkSpec, UplinkState};

use super::nics::NicChange;
use super::tests::{Lathed, STOP, World, until};
use super::*;
use crate::api::wire::{MachineState, NicAddRequest, ResizeOutcome, UplinkRequest, UplinkView};
use crate::launcher::Pending;
use crate::network::uplinks::{ClassChanges, Uplinks};

const MBIT: u64 = 1_000_000;

/// A device: what is at its root.
#[derive(Clone, Debug)]
struct Device {
    root: Root,
    speed: Option<u64>,
}

#[derive(Clone, Debug)]
enum Root {
    Theirs(RootQueue),
    Foreign,
    Ours { spec: UplinkSpec, classes: BTreeMap<UplinkClass, ClassSpec> },
}

#[derive(Debug)]
struct Kernel {
    devices: BTreeMap<String, Device>,
    marks: BTreeMap<String, u32>,
    /// What is refused.
    fails: Option<&'static str>,
    /// What is done, and never answered.
    hangs: Option<&'static str>,
    /// How many wait for such an answer.
    hanging: usize,
}

/// Devices and marks as a kernel has them.
#[derive(Clone, Debug)]
pub(super) struct FakeUplinks(Arc<Mutex<Kernel>>);

impl Default for FakeUplinks {
    fn default() -> Self {
        let device = |root, speed| Device { root, speed };
        let eth0 = device(Root::Theirs(RootQueue::Mq { major: 1 }), Some(1_000 * MBIT));
        let up0 = device(Root::Theirs(RootQueue::Default), None);
        let devices = [("eth0", eth0), ("up0", up0), ("shaped", device(Root::Foreign, None))];
        let devices = devices.into_iter().map(|(name, device)| (name.to_owned(), device)).collect();
        Self(Arc::new(Mutex::new(Kernel {
            devices,
            marks: BTreeMap::new(),
            fails: None,
            hangs: None,
            hanging: 0,
        })))
    }
}

impl Kernel {
    fn device(&mut self, name: &str) -> Result<&mut Device, Problem> {
        let gone = || Problem::new(Kind::NotFound, "no-such-device", format!("no {name}"));
        self.devices.get_mut(name).ok_or_else(gone)
    }

    fn check(&self, what: &str) -> Result<(), Problem> {
        if self.fails == Some(what) { Err(Problem::internal(what, "no luck")) } else { Ok(()) }
    }
}

impl FakeUplinks {
    fn kernel<T>(&self, look: impl FnOnce(&mut Kernel) -> T) -> T {
        look(&mut self.0.lock().unwrap())
    }

    /// Does something unless it is to fail, and answers unless it is to hang.
    fn answer<'a, T: Send + 'a>(
        &'a self,
        what: &'static str,
        act: impl FnOnce(&mut Kernel) -> Result<T, Problem> + Send + 'a,
    ) -> Pending<'a, Result<T, Problem>> {
        Box::pin(async move {
            let (result, hangs) = self.kernel(|kernel| {
                let result = kernel.check(what).and_then(|()| act(kernel));
                let hangs = kernel.hangs == Some(what);
                kernel.hanging += usize::from(hangs);
                (result, hangs)
            });
            if hangs {
                std::future::pending::<()>().await;
            }
            result
        })
    }

    fn fail(&self, what: Option<&'static str>) {
        self.kernel(|kernel| kernel.fails = what);
    }

    fn hang(&self, what: Option<&'static str>) {
        self.kernel(|kernel| kernel.hangs = what);
    }

    /// The root of a device as words.
    fn root(&self, device: &str) -> String {
        self.kernel(|kernel| match &kernel.devices[device].root {
            Root::Theirs(queue) => queue.to_string(),
            Root::Foreign => "foreign".to_owned(),
            Root::Ours { spec, .. } => format!("ours {}", spec.capacity.0 / MBIT),
        })
    }

    /// Number and rate, Mbit/s, of each class of `eth0`.
    fn classes(&self) -> Vec<(u16, u64)> {
        self.kernel(|kernel| match &kernel.devices["eth0"].root {
            Root::Ours { classes, .. } => {
                classes.iter().map(|(class, spec)| (class.number(), spec.rate.0 / MBIT)).collect()
            }
            _ => Vec::new(),
        })
    }

    fn marks(&self) -> BTreeMap<String, u16> {
        let number = |mark: u32| UplinkClass::of_mark(mark).unwrap().number();
        self.kernel(|kernel| kernel.marks.iter().map(|(tap, mark)| (tap.clone(), number(*mark))).collect())
    }
}

impl Uplinks for FakeUplinks {
    fn default_device(&self) -> Pending<'_, Result<Option<String>, Problem>> {
        self.answer("default", |kernel| Ok(kernel.devices.keys().next().cloned()))
    }

    fn speed(&self, device: &str) -> Option<u64> {
        self.kernel(|kernel| kernel.devices.get(device)?.speed)
    }

    fn found<'a>(&'a self, device: &'a str) -> Pending<'a, Result<Option<RootQueue>, Problem>> {
        self.answer("found", move |kernel| match &kernel.device(device)?.root {
            Root::Theirs(queue) => Ok(Some(queue.clone())),
            Root::Foreign => Err(Problem::new(Kind::Conflict, "uplink-queue", "a queue of somebody's")),
            Root::Ours { .. } => Ok(None),
        })
    }

    fn enable<'a>(&'a self, device: &'a str, spec: UplinkSpec) -> Pending<'a, Result<(), Problem>> {
        self.answer("enable", move |kernel| {
            let device = kernel.device(device)?;
            let classes = match &device.root {
                Root::Ours { classes, .. } => classes.clone(),
                _ => BTreeMap::new(),
            };
            fits(&spec, &classes);
            device.root = Root::Ours { spec, classes };
            Ok(())
        })
    }

    fn apply<'a>(&'a self, device: &'a str, changes: &'a ClassChanges) -> Pending<'a, Result<(), Problem>> {
        self.answer("apply", move |kernel| {
            let Root::Ours { spec, classes } = &mut kernel.device(device)?.root else {
                return Err(Problem::new(Kind::Conflict, "uplink-replaced", "it is not shared"));
            };
            for (class, change) in changes {
                match change {
                    Some(spec) => classes.insert(*class, *spec),
                    None => classes.remove(class),
                };
            }
            fits(spec, classes);
            Ok(())
        })
    }

    fn read<'a>(&'a self, device: &'a str) -> Pending<'a, Result<UplinkState, Problem>> {
        self.answer("read", move |kernel| {
            let Root::Ours { spec, classes } = &kernel.device(device)?.root else {
                return Err(Problem::new(Kind::Conflict, "uplink-replaced", "it is not shared"));
            };
            let state = |rate: BitRate, ceil: BitRate| ClassState {
                rate: rate.0,
                ceil: ceil.0,
                ..ClassState::default()
            };
            Ok(UplinkState {
                capacity: spec.capacity,
                host: state(spec.host_least, spec.capacity),
                machines: classes.iter().map(|(class, spec)| (*class, state(spec.rate, spec.ceil))).collect(),
            })
        })
    }

    fn disable<'a>(&'a self, device: &'a str, before: &'a RootQueue) -> Pending<'a, Result<(), Problem>> {
        self.answer("disable", move |kernel| {
            let device = kernel.device(device)?;
            if let Root::Ours { .. } = device.root {
                device.root = Root::Theirs(before.clone());
            }
            Ok(())
        })
    }

    fn mark<'a>(&'a self, tap: &'a str, mark: Option<u32>) -> Pending<'a, Result<(), Problem>> {
        self.answer("mark", move |kernel| {
            match mark {
                Some(mark) => kernel.marks.insert(tap.to_owned(), mark),
                None => kernel.marks.remove(tap),
            };
            Ok(())
        })
    }
}

/// As mechanism refuses it: then something here has promised too much.
fn fits(spec: &UplinkSpec, classes: &BTreeMap<UplinkClass, ClassSpec>) {
    let sum: u64 = classes.values().map(|class| class.rate.0).sum();
    assert!(sum + spec.host_least.0 <= spec.capacity.0, "{sum} of {spec:?}");
}

impl Lathed {
    fn enable(&self, device: Option<&str>, mbit: Option<u64>) -> Result<UplinkView, Problem> {
        let capacity_bit_per_sec = mbit.map(|mbit| mbit * MBIT);
        let request = UplinkRequest { device: device.map(str::to_owned), capacity_bit_per_sec };
        self.wait(self.machines.enable_uplink(&request))
    }

    fn uplink(&self) -> UplinkView {
        self.wait(self.machines.uplink())
    }

    fn disable(&self) -> Result<UplinkView, Problem> {
        self.wait(self.machines.disable_uplink())
    }

    fn net_of(&self, name: &str, mbit: u64) -> Result<ResizeOutcome, Problem> {
        let request = ResizeRequest { net_bit_per_sec: Some(mbit * MBIT), ..ResizeRequest::default() };
        self.wait(self.machines.resize(name, request, None)).map(|view| view.outcome)
    }

    fn books(&self) -> Option<(u64, u64, u64)> {
        let net = self.machines.host().resources.net?;
        Some((net.capacity / MBIT, net.granted / MBIT, net.free / MBIT))
    }
}

fn at(world: &World, name: &str, mbit: u64) -> RunRequest {
    RunRequest { net_bit_per_sec: Some(mbit * MBIT), ..world.request(name) }
}

/// The device `eth0` is as it was, and nothing is left.
fn is_as_before(world: &World, lathed: &Lathed) {
    assert_eq!((world.uplinks.root("eth0").as_str(), lathed.books()), ("mq 1:", None));
    let (marks, taps) = (world.uplinks.marks(), world.taps());
    assert!(!marks.keys().any(|tap| taps.contains_key(tap)), "{marks:?}");
    let view = lathed.uplink();
    assert!(!view.enabled && view.device.is_empty() && view.problem.is_empty(), "{view:?}");
}

#[test]
fn classes_follow_machines_and_what_was_there_comes_back() {
    let world = World::new();
    let lathed = world.lathed();
    lathed.run(at(&world, "early", 100)).unwrap();
    assert_eq!((lathed.uplink().enabled, lathed.books()), (false, None));
    let view = lathed.enable(None, None).unwrap();
    assert_eq!((view.device.as_str(), view.before.as_str(), view.problem.as_str()), ("eth0", "mq 1:", ""));
    assert_eq!((world.uplinks.root("eth0").as_str(), lathed.books()), ("ours 1000", Some((1000, 100, 850))));
    assert_eq!(view.machines[0].share.unwrap().ceil_bit_per_sec, 960 * MBIT);
    lathed.run(at(&world, "later", 50)).unwrap();
    lathed.run(at(&world, "open", 0)).unwrap();
    assert_eq!(world.uplinks.classes(), [(0, 100), (1, 50), (2, 10)]);
    let marks = BTreeMap::from([("early", 0), ("later", 1), ("open", 2)]);
    let marks: BTreeMap<String, u16> =
        marks.into_iter().map(|(name, class)| (format!("lt-{name}"), class)).collect();
    assert_eq!(world.uplinks.marks(), marks);

    assert_eq!(lathed.net_of("later", 200).unwrap(), ResizeOutcome::Applied);
    let add = NicAddRequest { bit_per_sec: Some(30 * MBIT), ..NicAddRequest::default() };
    lathed.wait(lathed.machines.change_nic("later", NicChange::Add(add))).unwrap();
    assert_eq!((world.uplinks.classes()[1], world.uplinks.marks()["lt-later_1"]), ((1, 230), 1));
    let limit = NicChange::Limit { nic: "net1".to_owned(), bit_per_sec: 40 * MBIT };
    lathed.wait(lathed.machines.change_nic("later", limit)).unwrap();
    assert_eq!((world.uplinks.classes()[1], lathed.books()), ((1, 240), Some((1000, 340, 610))));

    lathed.wait(lathed.machines.stop("early", STOP)).unwrap();
    assert_eq!((world.uplinks.classes().len(), lathed.books()), (2, Some((1000, 240, 710))));
    lathed.wait(lathed.machines.start_machine("early")).unwrap();
    lathed.wait(lathed.machines.remove("later", true, true)).unwrap();
    assert_eq!(world.uplinks.classes(), [(0, 100), (2, 10)]);
    lathed.disable().unwrap();
    is_as_before(&world, &lathed);
    lathed.disable().unwrap();
}

#[test]
fn more_than_the_uplink_has_is_refused_before_anything_changes() {
    let world = World::new();
    let lathed = world.lathed();
    lathed.run(at(&world, "demo", 100)).unwrap();
    let too_small = lathed.enable(None, Some(100)).unwrap_err();
    assert_eq!(too_small.code, "net-over-capacity", "{too_small}");
    is_as_before(&world, &lathed);
    lathed.enable(None, Some(200)).unwrap();
    assert_eq!(lathed.net_of("demo", 191).unwrap_err().code, "net-over-capacity");
    assert_eq!(lathed.run(at(&world, "other", 91)).unwrap_err().code, "net-over-capacity");
    let add = NicAddRequest { bit_per_sec: Some(91 * MBIT), ..NicAddRequest::default() };
    let plan = lathed.wait(lathed.machines.plan_nic("demo", &NicChange::Add(add.clone()))).unwrap_err();
    let added = lathed.wait(lathed.machines.change_nic("demo", NicChange::Add(add))).unwrap_err();
    assert_eq!((plan.code, added.code), ("net-over-capacity", "net-over-capacity"));
    assert_eq!(lathed.wait(lathed.machines.nics("demo")).unwrap().nics.len(), 1);
    assert_eq!((world.uplinks.classes(), lathed.books()), (vec![(0, 100)], Some((200, 100, 90))));
    assert_eq!(lathed.net_of("demo", 190).unwrap(), ResizeOutcome::Applied);
    // Another capacity, in place.
    assert_eq!(lathed.enable(None, Some(199)).unwrap_err().code, "net-over-capacity");
    assert_eq!((world.uplinks.root("eth0").as_str(), lathed.books()), ("ours 200", Some((200, 190, 0))));
    lathed.enable(None, Some(400)).unwrap();
    lathed.run(at(&world, "open", 0)).unwrap();
    assert_eq!(world.uplinks.classes(), [(0, 190), (1, 4)]);
    lathed.enable(None, Some(300)).unwrap();
    assert_eq!(world.uplinks.classes(), [(0, 190), (1, 3)]);
    // The part of the one without limit must be smaller before the whole is.
    lathed.enable(None, Some(201)).unwrap();
    assert_eq!(world.uplinks.classes(), [(0, 190), (1, 2)]);
    lathed.enable(None, Some(300)).unwrap();
    assert_eq!(world.uplinks.classes(), [(0, 190), (1, 3)]);
    world.uplinks.fail(Some("enable"));
    assert_eq!(lathed.enable(None, Some(250)).unwrap_err().code, "internal");
    assert_eq!((lathed.books(), lathed.uplink().capacity_bit_per_sec), (Some((300, 190, 95)), 300 * MBIT));
    world.uplinks.fail(None);
    lathed.wait(uplink::look(&lathed.machines.core));
    assert_eq!((lathed.uplink().problem.as_str(), world.uplinks.classes()[1]), ("", (1, 3)));
}

#[test]
fn what_cannot_be_shared_is_refused_with_what_helps() {
    let world = World::new();
    let lathed = world.lathed();
    for (device, code) in [
        ("shaped", "uplink-queue"),
        ("up0", "uplink-capacity-unknown"),
        ("none", "no-such-device"),
        ("lathe0", "bad-name"),
    ] {
        let problem = lathed.enable(Some(device), None).unwrap_err();
        assert_eq!(problem.code, code, "{device}: {problem}");
    }
    let request = UplinkRequest::default();
    let plan = lathed.wait(lathed.machines.plan_uplink(&request)).unwrap();
    assert_eq!((plan.name.as_str(), plan.steps.len(), plan.steps[0].to), ("eth0", 1, 1_000 * MBIT));
    assert!(plan.steps[0].how.contains("(mq 1:) comes back"), "{}", plan.steps[0].how);
    is_as_before(&world, &lathed);
    lathed.enable(Some("up0"), Some(10)).unwrap();
    assert_eq!(lathed.enable(Some("eth0"), None).unwrap_err().code, "uplink-busy");
    lathed.enable(None, None).unwrap();
    assert!(lathed.wait(lathed.machines.plan_uplink(&request)).unwrap().steps.is_empty());
    lathed.disable().unwrap();
    world.uplinks.fail(Some("enable"));
    assert_eq!(lathed.enable(None, None).unwrap_err().code, "internal");
    is_as_before(&world, &lathed);
    world.uplinks.kernel(|kernel| kernel.devices.clear());
    world.uplinks.fail(None);
    assert_eq!(lathed.enable(None, None).unwrap_err().code, "no-uplink");
}

#[test]
fn a_failure_stops_no_machine_and_is_tried_again() {
    let world = World::new();
    let lathed = world.lathed();
    lathed.enable(None, None).unwrap();
    for what in ["apply", "mark"] {
        world.uplinks.fail(Some(what));
        assert_eq!(lathed.run(at(&world, what, 100)).unwrap().state, MachineState::Running);
        let view = lathed.uplink();
        let machine = view.machines.iter().find(|machine| machine.machine == what).unwrap();
        assert!(!machine.problem.is_empty(), "{view:?}");
        world.uplinks.fail(None);
        lathed.wait(uplink::look(&lathed.machines.core));
        let view = lathed.uplink();
        assert!(view.problem.is_empty() && view.machines.iter().all(|m| m.problem.is_empty()), "{view:?}");
    }
    assert_eq!(world.uplinks.marks().len(), 2);
    // Somebody else's queue stays; the kernel's own, after the link was made anew, does not.
    let set = |root| world.uplinks.kernel(|kernel| kernel.device("eth0").map(|device| device.root = root));
    set(Root::Foreign).unwrap();
    lathed.wait(uplink::look(&lathed.machines.core));
    assert_eq!((world.uplinks.root("eth0").as_str(), lathed.uplink().problem.is_empty()), ("foreign", false));
    lathed.run(at(&world, "demo", 100)).unwrap();
    set(Root::Theirs(RootQueue::PfifoFast { major: 7 })).unwrap();
    lathed.wait(uplink::look(&lathed.machines.core));
    assert!(lathed.uplink().problem.contains("pfifo_fast 7:"), "{}", lathed.uplink().problem);
    set(Root::Theirs(RootQueue::Default)).unwrap();
    lathed.wait(uplink::look(&lathed.machines.core));
    assert_eq!((world.uplinks.classes().len(), lathed.uplink().before.as_str()), (3, "default"));
    // What cannot be put back is tried again.
    world.uplinks.fail(Some("disable"));
    assert!(lathed.disable().unwrap_err().detail.contains("tried again"));
    assert!(!lathed.uplink().enabled && !lathed.uplink().problem.is_empty());
    world.uplinks.fail(None);
    lathed.wait(uplink::look(&lathed.machines.core));
    assert_eq!((world.uplinks.root("eth0").as_str(), lathed.books()), ("default", None));
}

#[test]
fn another_capacity_replaces_nobody_elses_queue() {
    let world = World::new();
    let lathed = world.lathed();
    lathed.run(at(&world, "demo", 100)).unwrap();
    lathed.enable(None, Some(300)).unwrap();
    let set = |root| world.uplinks.kernel(|kernel| kernel.device("eth0").map(|device| device.root = root));
    set(Root::Theirs(RootQueue::PfifoFast { major: 7 })).unwrap();
    let larger = UplinkRequest { capacity_bit_per_sec: Some(900 * MBIT), ..UplinkRequest::default() };
    let planned = lathed.wait(lathed.machines.plan_uplink(&larger)).unwrap_err();
    assert_eq!(planned.code, "uplink-replaced", "{planned}");
    for mbit in [900, 300, 200] {
        let problem = lathed.enable(None, Some(mbit)).unwrap_err();
        assert_eq!(problem.code, "uplink-replaced", "{mbit}: {problem}");
    }
    set(Root::Foreign).unwrap();
    lathed.enable(None, Some(900)).unwrap_err();
    assert_eq!((world.uplinks.root("eth0").as_str(), lathed.books()), ("foreign", Some((300, 100, 185))));
    // A link that was made anew has lost the classes too, and what comes back later is what it has now.
    set(Root::Theirs(RootQueue::Default)).unwrap();
    let view = lathed.enable(None, Some(900)).unwrap();
    assert_eq!((view.before.as_str(), view.problem.as_str()), ("default", ""));
    assert_eq!((world.uplinks.root("eth0").as_str(), world.uplinks.classes()), ("ours 900", vec![(0, 100)]));
    set(Root::Theirs(RootQueue::Default)).unwrap();
    lathed.enable(None, Some(200)).unwrap();
    assert_eq!((world.uplinks.root("eth0").as_str(), world.uplinks.classes()), ("ours 200", vec![(0, 100)]));
}

#[test]
fn what_a_nic_gives_back_is_nobodys_before_the_kernel_has_it() {
    let world = World::new();
    let lathed = world.lathed();
    lathed.enable(None, Some(200)).unwrap();
    lathed.run(at(&world, "demo", 100)).unwrap();
    let add = NicAddRequest { bit_per_sec: Some(80 * MBIT), ..NicAddRequest::default() };
    lathed.wait(lathed.machines.change_nic("demo", NicChange::Add(add))).unwrap();
    let limit = |bit_per_sec| NicChange::Limit { nic: "net1".to_owned(), bit_per_sec };
    world.refuse_rates_later();
    let (machines, cursed) = (lathed.machines.clone(), limit(13_000));
    let refused = lathed.runtime.spawn(async move { machines.change_nic("demo", cursed).await.map(drop) });
    world.before_a_rate_is_refused(|| {
        assert_eq!(lathed.run(at(&world, "other", 50)).unwrap_err().code, "net-over-capacity");
    });
    assert_eq!(lathed.wait(refused).unwrap().unwrap_err().code, "internal");
    assert_eq!((world.uplinks.classes(), lathed.books()), (vec![(0, 180)], Some((200, 180, 10))));
    lathed.wait(lathed.machines.change_nic("demo", limit(20 * MBIT))).unwrap();
    assert_eq!((world.uplinks.classes(), lathed.books()), (vec![(0, 120)], Some((200, 120, 70))));
    lathed.run(at(&world, "other", 50)).unwrap();
}

#[test]
fn who_looks_keeps_no_machine_waiting() {
    let world = World::new();
    let lathed = world.lathed();
    lathed.enable(None, None).unwrap();
    world.uplinks.hang(Some("read"));
    let machines = lathed.machines.clone();
    let looks = lathed.runtime.spawn(async move { machines.uplink().await });
    until(|| world.uplinks.kernel(|kernel| kernel.hanging) > 0);
    assert_eq!(lathed.run(at(&world, "demo", 100)).unwrap().state, MachineState::Running);
    assert_eq!(world.uplinks.classes(), [(0, 100)]);
    looks.abort();
    world.uplinks.hang(None);
}

#[test]
fn what_is_left_of_machines_that_are_gone_goes_with_the_next_lathed() {
    let world = World::new();
    let lathed = world.lathed();
    lathed.enable(None, None).unwrap();
    for name in ["one", "two"] {
        lathed.run(at(&world, name, 100)).unwrap();
    }
    // The kernel forgets nothing while lathed is away; a class too many and a rate of somebody's are there when it comes back.
    lathed.kill();
    world.uplinks.kernel(|kernel| {
        kernel.marks.remove("lt-one");
        let Root::Ours { classes, .. } = &mut kernel.device("eth0").unwrap().root else { panic!("not ours") };
        let [first, stray] = [0, 77].map(|number| UplinkClass::new(number).unwrap());
        let other = ClassSpec { rate: BitRate(MBIT), ..classes[&first] };
        classes.extend([(first, other), (stray, other)]);
    });
    let lathed = world.lathed();
    assert_eq!((world.uplinks.classes(), lathed.books()), (vec![(0, 100), (1, 100)], Some((1000, 200, 750))));
    assert_eq!((world.uplinks.marks()["lt-one"], lathed.uplink().problem.as_str()), (0, ""));
}

/// Kills lathed when it has done `what` and does not know it yet.
fn killed_in(world: &World, lathed: Lathed, what: &'static str, begin: impl FnOnce(&Lathed), done: &str) {
    world.uplinks.hang(Some(what));
    begin(&lathed);
    until(|| world.uplinks.root("eth0") == done);
    lathed.kill();
    world.uplinks.hang(None);
}

#[test]
fn a_kill_in_the_middle_of_enabling_or_disabling_is_gone_on_with() {
    let world = World::new();
    let lathed = world.lathed();
    lathed.run(at(&world, "demo", 100)).unwrap();
    let enable = |lathed: &Lathed| {
        let machines = lathed.machines.clone();
        lathed
            .runtime
            .spawn(async move { machines.enable_uplink(&UplinkRequest::default()).await.map(drop) });
    };
    killed_in(&world, lathed, "enable", enable, "ours 1000");
    // Completed.
    let lathed = world.lathed();
    let view = lathed.uplink();
    assert!(view.enabled && view.before == "mq 1:" && view.problem.is_empty(), "{view:?}");
    assert_eq!((world.uplinks.classes(), lathed.books()), (vec![(0, 100)], Some((1000, 100, 850))));
    let disable = |lathed: &Lathed| {
        let machines = lathed.machines.clone();
        lathed.runtime.spawn(async move { machines.disable_uplink().await.map(drop) });
    };
    killed_in(&world, lathed, "disable", disable, "mq 1:");
    let lathed = world.lathed();
    is_as_before(&world, &lathed);
    killed_in(&world, lathed, "enable", enable, "ours 1000");
    // It cannot be completed: what was there comes back.
    world.uplinks.fail(Some("enable"));
    is_as_before(&world, &world.lathed());
}

#[test]
fn kill_at_any_moment_leaves_all_or_nothing() {
    let world = World::new();
    let mut random: u64 = 0x2545_f491_4f6c_dd1d;
    for _ in 0..20 {
        let lathed = world.lathed();
        let (machines, killed) = (lathed.machines.clone(), Arc::clone(&lathed.killed));
        lathed.runtime.spawn(async move {
            while !killed.load(Ordering::Relaxed) {
                let _ = machines.enable_uplink(&UplinkRequest::default()).await;
                let _ = machines.disable_uplink().await;
            }
        });
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        std::thread::sleep(Duration::from_micros((random >> 33) % 20_000));
        lathed.kill();
        let lathed = world.lathed();
        let view = lathed.uplink();
        if view.enabled {
            assert_eq!((world.uplinks.root("eth0").as_str(), view.before.as_str()), ("ours 1000", "mq 1:"));
        } else {
            is_as_before(&world, &lathed);
        }
        lathed.disable().unwrap();
        is_as_before(&world, &lathed);
        lathed.kill();
    }
}
