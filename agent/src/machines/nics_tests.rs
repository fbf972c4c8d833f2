//! Nics that come, change and go against fake monitors and guests, and lathed killed at any moment of that.

use std::collections::BTreeMap;
use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lathe_guest::protocol::{Network, Request};
use lathe_vmm::control::wire::Event as MonitorEvent;

use super::enforced::Limit;
use super::record::{Net, Plug};
use super::tests::{Lathed, STOP, World, until};
use super::*;
use crate::api::wire::{NicAddRequest, NicState, NicView, ResizeRequest};
use crate::monitor::fake::{Script, Told};
use crate::store::Change;

const MBIT: u64 = 1_000_000;

fn at(mbit: u64) -> NicAddRequest {
    NicAddRequest { bit_per_sec: Some(mbit * MBIT), ..Default::default() }
}

fn named(name: &str) -> NicAddRequest {
    NicAddRequest { name: Some(name.to_owned()), ..at(1) }
}

fn removal(nic: &str) -> NicChange {
    NicChange::Remove { nic: nic.to_owned(), timeout_sec: None }
}

fn limit(nic: &str, mbit: u64) -> NicChange {
    NicChange::Limit { nic: nic.to_owned(), bit_per_sec: mbit * MBIT }
}

impl Lathed {
    fn change_of_nic(&self, change: NicChange) -> Result<NicChanged, Problem> {
        self.wait(self.machines.change_nic("demo", change))
    }

    fn add_nic(&self, request: NicAddRequest) -> Result<NicView, Problem> {
        match self.change_of_nic(NicChange::Add(request))? {
            NicChanged::Nic(view) => Ok(view),
            NicChanged::Removed(removed) => panic!("{removed:?}"),
        }
    }

    fn nics(&self) -> Vec<NicView> {
        self.wait(self.machines.nics("demo")).unwrap().nics
    }

    fn nic_states(&self) -> Vec<(String, NicState)> {
        self.nics().into_iter().map(|nic| (nic.name, nic.state)).collect()
    }

    /// Waits until the nics are in these states.
    fn until_nics(&self, states: &[(&str, NicState)]) {
        let states: Vec<_> = states.iter().map(|(name, state)| ((*name).to_owned(), *state)).collect();
        until(|| self.nic_states() == states);
    }

    /// Stores a record that was changed as an earlier lathed may have left it, and dies.
    fn leave_nic(self, change: impl FnOnce(&mut Record)) {
        let entry = self.machines.core.entry("demo").unwrap();
        let mut record = entry.with(|shared| shared.record.clone());
        change(&mut record);
        self.wait(self.machines.core.store.apply(Change::Put(Box::new(record)))).unwrap();
        self.kill();
    }

    /// The guest's agent from now on, which remembers what it was asked.
    fn guest(&self, world: &World) -> Arc<Mutex<Vec<Request>>> {
        let socket = world.folder.path().join("run/machines/demo/vsock.sock");
        let _ = fs::remove_file(&socket);
        let asked = self.wait(async { guest::tests::fake_guest(&socket) });
        until(|| self.show("demo").guest_agent);
        asked
    }
}

impl World {
    /// MAC addresses that the monitor has.
    fn macs(&self) -> Vec<String> {
        let macs = |told: &mut Told| told.nics.iter().map(|nic| view::mac_text(nic.status.mac)).collect();
        self.launcher.monitor("demo").told(macs)
    }

    fn do_as(&self, script: Script) {
        *self.launcher.script.lock().unwrap() = script;
    }

    /// A machine without a nic.
    fn bare(&self) -> RunRequest {
        RunRequest { net: false, net_bit_per_sec: None, ..self.request("demo") }
    }
}

fn networks(asked: &Arc<Mutex<Vec<Request>>>) -> Vec<Network> {
    let asked = asked.lock().unwrap();
    let network = |request: &Request| match request {
        Request::Network(network) => Some(network.clone()),
        _ => None,
    };
    asked.iter().filter_map(network).collect()
}

#[test]
fn a_nic_comes_changes_and_goes_while_the_guest_runs() {
    let world = World::new();
    let lathed = world.lathed();
    lathed.run(world.request("demo")).unwrap();
    let view = lathed.add_nic(at(20)).unwrap();
    assert_eq!(
        (view.name.as_str(), view.state, view.tap.as_str()),
        ("net1", NicState::Attached, "lt-demo_1")
    );
    assert_eq!((view.addresses.as_slice(), view.bit_per_sec), (&["10.77.0.3/16".to_owned()][..], 20 * MBIT));
    assert_eq!((view.to_guest_bit_per_sec, view.from_guest_bit_per_sec), (Some(20 * MBIT), Some(20 * MBIT)));
    assert_eq!(
        (view.configured, view.reason.as_str()),
        (false, "its guest agent does not answer"),
        "said in words"
    );
    let machine = lathed.show("demo");
    assert_eq!(world.macs(), [machine.mac.clone(), view.mac.clone()]);
    assert_eq!((machine.revision, machine.net.desired, machine.addresses.len()), (2, MBIT, 2));
    lathed.change_of_nic(limit("net1", 5)).unwrap();
    lathed.change_of_nic(limit("net1", 5)).unwrap();
    assert_eq!((world.taps()["lt-demo_1"], lathed.show("demo").revision), (5 * MBIT, 3), "twice is once");
    // --net is net0's, whatever else there is.
    let faster = ResizeRequest { net_bit_per_sec: Some(9 * MBIT), ..Default::default() };
    lathed.wait(lathed.machines.resize("demo", faster, None)).unwrap();
    let rates = BTreeMap::from([("lt-demo".to_owned(), 9 * MBIT), ("lt-demo_1".to_owned(), 5 * MBIT)]);
    assert_eq!(world.taps(), rates);
    assert_eq!(
        lathed.enforced(Limit::Net),
        2,
        "both changes are in the figures, and what was no change is not"
    );
    world.check(&lathed);
    assert!(matches!(lathed.change_of_nic(removal("net1")), Ok(NicChanged::Removed(_))));
    assert_eq!((world.macs().len(), lathed.nics().len(), world.taps().len()), (1, 1, 1));
    // Its address is free again, and its name leads to the same card.
    let again = lathed.add_nic(at(1)).unwrap();
    assert_eq!((again.mac, again.addresses), (view.mac, view.addresses));
    world.check(&lathed);
    lathed.wait(lathed.machines.remove("demo", true, true)).unwrap();
    assert!(world.taps().is_empty());
}

#[test]
fn the_guest_agent_configures_what_comes_and_what_stays() {
    let world = World::new();
    let lathed = world.lathed();
    lathed.run(world.request("demo")).unwrap();
    lathed.add_nic(at(1)).unwrap();
    lathed.kill();
    // Otherwise the fake monitor's listener would be found, behind which nobody answers.
    fs::remove_file(world.folder.path().join("run/machines/demo/vsock.sock")).unwrap();
    let lathed = world.lathed();
    assert_eq!(lathed.nics()[1].reason, "its guest agent does not answer");
    // Found late, it is told of all.
    let asked = lathed.guest(&world);
    until(|| lathed.nics().iter().all(|nic| nic.configured));
    let told = networks(&asked).pop().unwrap();
    assert_eq!(
        (told.interfaces.len(), told.interfaces[0].gateways.as_slice()),
        (2, &["10.77.0.1".to_owned()][..])
    );
    assert!(told.interfaces[1].gateways.is_empty(), "the fake is an earlier release");
    let view = lathed.add_nic(at(2)).unwrap();
    assert!(view.configured && view.reason.is_empty(), "{view:?}");
    assert_eq!(networks(&asked).pop().unwrap().interfaces[2].addresses, view.addresses);
    lathed.change_of_nic(removal("net0")).unwrap();
    let told = networks(&asked).pop().unwrap();
    assert_eq!(
        (told.interfaces.len(), told.interfaces[0].gateways.len()),
        (2, 1),
        "net1 has the default route now"
    );
    let entry = lathed.machines.core.entry("demo").unwrap();
    let nics: Vec<Net> = entry.with(|shared| shared.record.all_nics().cloned().collect());
    let Request::Network(newer) = nics::network_request(&lathed.machines.core, "demo", &nics, 3) else {
        panic!("no network")
    };
    assert!(newer.interfaces.iter().all(|interface| interface.gateways == ["10.77.0.1"]));
    // A paused guest is told when it goes on.
    lathed.wait(lathed.machines.pause("demo")).unwrap();
    let paused = lathed.add_nic(at(3)).unwrap();
    assert!(!paused.configured && paused.reason.contains("paused"), "{paused:?}");
    lathed.wait(lathed.machines.resume("demo")).unwrap();
    until(|| lathed.nics().iter().all(|nic| nic.configured));
}

#[test]
fn a_machine_without_network_gets_its_first_nic_and_a_first_nic_can_go() {
    let world = World::new();
    let lathed = world.lathed();
    lathed.run(world.bare()).unwrap();
    let faster = || ResizeRequest { net_bit_per_sec: Some(9 * MBIT), ..Default::default() };
    let problem = lathed.wait(lathed.machines.resize("demo", faster(), None)).unwrap_err();
    assert!(problem.code == "no-network" && problem.fix.contains("lathe nic add demo"), "{problem}");
    let view = lathed.add_nic(at(4)).unwrap();
    let machine = lathed.show("demo");
    assert_eq!((machine.mac, machine.addresses), (view.mac, view.addresses));
    assert_eq!(
        (machine.net.desired, machine.net.granted, machine.net.actual),
        (4 * MBIT, 4 * MBIT, 4 * MBIT)
    );
    let problem = lathed.wait(lathed.machines.resize("demo", faster(), None)).unwrap_err();
    assert!(problem.code == "no-network" && problem.fix.contains("lathe nic limit demo net1"), "{problem}");
    lathed.wait(lathed.machines.remove("demo", true, true)).unwrap();
    lathed.run(world.request("demo")).unwrap();
    lathed.change_of_nic(removal("net0")).unwrap();
    assert!(world.macs().is_empty() && world.taps().is_empty() && lathed.nics().is_empty());
    let machine = lathed.show("demo");
    assert_eq!((machine.mac.as_str(), machine.net.desired, machine.net.granted), ("", 0, 0));
    lathed.kill();
    let lathed = world.lathed();
    lathed.wait(lathed.machines.stop("demo", STOP)).unwrap();
    lathed.wait(lathed.machines.start_machine("demo")).unwrap();
    assert!(world.macs().is_empty());
    world.check(&lathed);
}

#[test]
fn a_machine_that_is_off_gets_its_nics_at_its_start_and_keeps_them() {
    let world = World::new();
    let lathed = world.lathed();
    lathed.run(world.request("demo")).unwrap();
    lathed.wait(lathed.machines.stop("demo", STOP)).unwrap();
    assert_eq!(lathed.add_nic(at(2)).unwrap().state, NicState::Detached);
    lathed.add_nic(named("net7")).unwrap();
    lathed.change_of_nic(limit("net7", 3)).unwrap();
    assert!(world.taps().is_empty());
    lathed.kill();
    let lathed = world.lathed();
    lathed.run(world.request("other")).unwrap();
    assert_eq!(lathed.show("other").addresses, ["10.77.0.5/16"], "nobody else gets their addresses");
    lathed.wait(lathed.machines.start_machine("demo")).unwrap();
    assert_eq!(world.macs().len(), 3);
    assert_eq!((world.taps()["lt-demo_1"], world.taps()["lt-demo_7"]), (2 * MBIT, 3 * MBIT));
    lathed.kill();
    let lathed = world.lathed();
    let all = [("net0", NicState::Attached), ("net1", NicState::Attached), ("net7", NicState::Attached)];
    lathed.until_nics(&all);
    world.check(&lathed);
    // One from the start goes like any other.
    lathed.change_of_nic(removal("net1")).unwrap();
    lathed.wait(lathed.machines.stop("demo", STOP)).unwrap();
    lathed.change_of_nic(removal("net7")).unwrap();
    lathed.wait(lathed.machines.start_machine("demo")).unwrap();
    assert_eq!(world.macs().len(), 1);
    world.check(&lathed);
}

#[test]
fn every_tap_lets_through_what_all_nics_of_its_machine_have() {
    let world = World::new();
    let lathed = world.lathed();
    lathed.run(world.request("demo")).unwrap();
    let addresses = |lathed: &Lathed| -> Vec<String> {
        lathed.nics().iter().flat_map(|nic| nic.addresses.clone()).collect()
    };
    let first = addresses(&lathed);
    assert!(!first.is_empty());
    assert_eq!(world.take_sources(), BTreeMap::from([("lt-demo".to_owned(), first.clone())]));
    lathed.add_nic(at(1)).unwrap();
    let both = addresses(&lathed);
    assert!(both.len() > first.len());
    let of_both = BTreeMap::from(["lt-demo", "lt-demo_1"].map(|tap| (tap.to_owned(), both.clone())));
    assert_eq!(world.take_sources(), of_both);
    // A lathed that finds the machine has the taps check what it knows: an earlier release may have left them without.
    lathed.kill();
    let lathed = world.lathed();
    let mut seen = BTreeMap::new();
    until(|| {
        seen.extend(world.take_sources());
        seen == of_both
    });
    lathed.change_of_nic(removal("net1")).unwrap();
    assert_eq!(world.take_sources(), BTreeMap::from([("lt-demo".to_owned(), first)]));
}

#[test]
fn what_the_monitor_refuses_leaves_nothing() {
    let world = World::new();
    world.do_as(Script { refuse_disks: true, ..Script::default() });
    let lathed = world.lathed();
    lathed.run(world.request("demo")).unwrap();
    assert_eq!(lathed.add_nic(at(2)).unwrap_err().code, "no-nic-slot");
    assert_eq!((lathed.nics().len(), lathed.show("demo").revision), (1, 1));
    // Nor what the kernel refuses: a rate of 13 kbit/s, in this world.
    let cursed = NicAddRequest { bit_per_sec: Some(13_000), ..Default::default() };
    assert_eq!(lathed.add_nic(cursed).unwrap_err().code, "internal");
    world.check(&lathed);
    lathed.kill();
    let lathed = world.lathed();
    world.check(&lathed);
    lathed.wait(lathed.machines.remove("demo", true, true)).unwrap();
    world.do_as(Script::default());
    lathed.run(world.request("demo")).unwrap();
    lathed.add_nic(at(2)).unwrap();
    let cursed = NicChange::Limit { nic: "net1".to_owned(), bit_per_sec: 13_000 };
    assert_eq!(lathed.change_of_nic(cursed).unwrap_err().code, "internal");
    assert_eq!(lathed.nics()[1].bit_per_sec, 2 * MBIT);
    world.check(&lathed);
}

#[test]
fn a_monitor_has_four_slots_and_one_of_an_earlier_release_none() {
    let world = World::new();
    let lathed = world.lathed();
    lathed.run(world.request("demo")).unwrap();
    for number in 1..=4 {
        assert_eq!(lathed.add_nic(at(1)).unwrap().name, format!("net{number}"));
    }
    assert_eq!(lathed.add_nic(at(1)).unwrap_err().code, "no-nic-slot");
    lathed.change_of_nic(removal("net2")).unwrap();
    assert_eq!(lathed.add_nic(at(1)).unwrap().name, "net2");
    lathed.wait(lathed.machines.stop("demo", STOP)).unwrap();
    lathed.add_nic(at(1)).unwrap();
    let problem = lathed.add_nic(at(1)).unwrap_err();
    assert!(problem.code == "no-nic-slot" && problem.message.contains("6 nics"), "{problem}");
    lathed.wait(lathed.machines.remove("demo", true, true)).unwrap();
    world.do_as(Script { protocol: Some(3), ..Script::default() });
    lathed.run(world.request("demo")).unwrap();
    assert_eq!(lathed.add_nic(at(1)).unwrap_err().code, "no-nic-slot");
    assert_eq!(lathed.change_of_nic(removal("net0")).unwrap_err().code, "no-nic-slot");
    lathed.until_nics(&[("net0", NicState::Attached)]);
    lathed.kill();
    let lathed = world.lathed();
    lathed.until_nics(&[("net0", NicState::Attached)]);
    world.check(&lathed);
}

#[test]
fn a_guest_that_does_not_let_go_keeps_its_nic() {
    let world = World::new();
    world.do_as(Script { deaf_guest: true, ..Script::default() });
    let lathed = world.lathed();
    lathed.run(world.request("demo")).unwrap();
    lathed.add_nic(at(2)).unwrap();
    let hurried = NicChange::Remove { nic: "net1".to_owned(), timeout_sec: Some(1) };
    let problem = lathed.change_of_nic(hurried).unwrap_err();
    assert_eq!(problem.code, "nic-not-released", "{problem}");
    lathed.until_nics(&[("net0", NicState::Attached), ("net1", NicState::Attached)]);
    world.check(&lathed);
    // Now it does, and gets the nic again as another device.
    let monitor = world.launcher.monitor("demo");
    let gone: Vec<String> =
        monitor.told(|told| told.nics.extract_if(.., |nic| nic.asked).map(|nic| nic.status.device).collect());
    for device in gone {
        monitor.event(&MonitorEvent::DeviceDetached { device });
    }
    until(|| world.macs().len() == 2);
    assert_eq!(monitor.told(|told| told.nics[1].status.device.clone()), "net2");
    lathed.until_nics(&[("net0", NicState::Attached), ("net1", NicState::Attached)]);
    world.check(&lathed);
}

#[test]
fn a_removal_survives_lathed_and_ends_with_the_machine() {
    let world = World::new();
    world.do_as(Script { deaf_guest: true, ..Script::default() });
    let lathed = world.lathed();
    lathed.run(world.request("demo")).unwrap();
    for name in ["net1", "net2", "net3"] {
        lathed.add_nic(named(name)).unwrap();
        let machines = lathed.machines.clone();
        lathed.runtime.spawn(async move { machines.change_nic("demo", removal(name)).await.map(|_| ()) });
    }
    let removing = |names: &[&'static str]| -> Vec<(&'static str, NicState)> {
        let removing = names.iter().map(|name| (*name, NicState::Removing));
        [("net0", NicState::Attached)].into_iter().chain(removing).collect()
    };
    lathed.until_nics(&removing(&["net1", "net2", "net3"]));
    assert_eq!(lathed.change_of_nic(limit("net1", 3)).unwrap_err().code, "nic-busy");
    lathed.kill();
    let monitor = world.launcher.monitor("demo");
    monitor.told(|told| {
        // net2 has gone meanwhile.
        told.nics.remove(2);
        told.nics.iter_mut().for_each(|nic| nic.asked = false);
    });
    let lathed = world.lathed();
    lathed.until_nics(&removing(&["net1", "net3"]));
    monitor.told(|told| assert!(told.nics[1..].iter().all(|nic| nic.asked), "asked again"));
    assert!(!world.taps().contains_key("lt-demo_2"));
    lathed.wait(lathed.machines.stop("demo", STOP)).unwrap();
    lathed.until_nics(&[("net0", NicState::Detached)]);
    world.check(&lathed);
}

#[test]
fn an_intent_is_finished_where_the_guest_has_it_and_taken_back_where_not() {
    let world = World::new();
    let lathed = world.lathed();
    lathed.run(world.request("demo")).unwrap();
    lathed.add_nic(at(2)).unwrap();
    // As if it had not been stored that the guest has it; and as if another had been stored and no more.
    lathed.leave_nic(|record| {
        let nic = record.nic_mut("net1").unwrap();
        nic.plug = Plug::Adding;
        let mut other = nic.clone();
        (other.name, other.tap, other.mac[5]) = ("net2".to_owned(), "lt-demo_2".to_owned(), nic.mac[5] ^ 1);
        record.insert_nic(other);
    });
    let lathed = world.lathed();
    lathed.until_nics(&[("net0", NicState::Attached), ("net1", NicState::Attached)]);
    world.check(&lathed);
    // Another rate in the record only.
    lathed.leave_nic(|record| record.nic_mut("net1").unwrap().bit_per_sec = 6 * MBIT);
    let lathed = world.lathed();
    assert_eq!(world.taps()["lt-demo_1"], 6 * MBIT);
    world.check(&lathed);
    lathed.wait(lathed.machines.stop("demo", STOP)).unwrap();
    lathed.leave_nic(|record| record.nic_mut("net1").unwrap().plug = Plug::Removing);
    let lathed = world.lathed();
    assert_eq!(lathed.nic_states(), [("net0".to_owned(), NicState::Detached)]);
}

#[test]
fn what_makes_no_sense_is_refused_and_changes_nothing() {
    let world = World::new();
    let lathed = world.lathed();
    lathed.run(world.request("demo")).unwrap();
    lathed.add_nic(at(1)).unwrap();
    let rate = |bit_per_sec| NicAddRequest { bit_per_sec: Some(bit_per_sec), ..Default::default() };
    for (request, code) in [
        (named("net1"), "nic-name-taken"),
        (named("net0"), "bad-name"),
        (named("net10"), "bad-name"),
        (named("net01"), "bad-name"),
        (named("eth0"), "bad-name"),
        (named(""), "bad-name"),
        (rate(999), "bad-amount"),
        (rate(u64::MAX), "bad-amount"),
    ] {
        let plan = lathed.wait(lathed.machines.plan_nic("demo", &NicChange::Add(request.clone())));
        assert_eq!(plan.unwrap_err().code, code, "{request:?}");
        assert_eq!(lathed.add_nic(request.clone()).unwrap_err().code, code, "{request:?}");
    }
    assert_eq!(lathed.change_of_nic(limit("net2", 1)).unwrap_err().code, "no-such-nic");
    let problem = lathed.change_of_nic(limit("net0", 3)).unwrap_err();
    assert!(
        problem.code == "nic-rate-elsewhere" && problem.fix.contains("lathe resize demo --net 3000000bit")
    );
    assert_eq!(lathed.change_of_nic(removal("net2")).unwrap_err().code, "no-such-nic");
    lathed.wait(lathed.machines.pause("demo")).unwrap();
    assert_eq!(lathed.change_of_nic(removal("net1")).unwrap_err().code, "machine-paused");
    lathed.until_nics(&[("net0", NicState::Attached), ("net1", NicState::Attached)]);
    let plan = |change: NicChange| lathed.wait(lathed.machines.plan_nic("demo", &change)).unwrap().steps;
    assert_eq!((plan(NicChange::Add(at(2)))[0].from, plan(NicChange::Add(at(2)))[0].to), (0, 1));
    assert_eq!((plan(limit("net1", 7))[0].from, plan(limit("net1", 7))[0].to), (MBIT, 7 * MBIT));
    assert!(plan(limit("net1", 1)).is_empty());
    assert_eq!((lathed.nics().len(), lathed.show("demo").revision), (2, 2));
}

/// Rates of nics that lathed has acknowledged, and the one that it may or may not have changed.
#[derive(Default)]
struct Promises {
    there: BTreeMap<String, u64>,
    open: Option<String>,
}

/// What somebody does to the nics of a machine, over and over, until lathed is killed; one name at a time.
async fn bustle(machines: Machines, killed: Arc<AtomicBool>, promises: Arc<Mutex<Promises>>, seed: u64) {
    for round in seed.. {
        let name = format!("net{}", 1 + round % 3);
        let rate = MBIT * (1 + round % 7);
        let before = promises.lock().unwrap().there.get(&name).copied();
        let change = match before {
            None => NicChange::Add(NicAddRequest { name: Some(name.clone()), bit_per_sec: Some(rate) }),
            Some(_) if round % 2 == 0 => NicChange::Limit { nic: name.clone(), bit_per_sec: rate },
            Some(_) => removal(&name),
        };
        promises.lock().unwrap().open = Some(name.clone());
        let done = machines.change_nic("demo", change).await;
        {
            let mut promises = promises.lock().unwrap();
            if killed.load(Ordering::Relaxed) {
                return;
            }
            match done {
                Ok(NicChanged::Nic(view)) => promises.there.insert(name, view.bit_per_sec),
                Ok(NicChanged::Removed(_)) => promises.there.remove(&name),
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
    lathed.run(world.bare()).unwrap();
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
        let rests = if off { NicState::Detached } else { NicState::Attached };
        until(|| lathed.nic_states().iter().all(|(_, state)| *state == rests));
        let found: BTreeMap<String, u64> =
            lathed.nics().into_iter().map(|nic| (nic.name, nic.bit_per_sec)).collect();
        let mut promised = promises.lock().unwrap();
        let open = promised.open.take();
        let known = |names: &BTreeMap<String, u64>| -> BTreeMap<String, u64> {
            let others = names.iter().filter(|(name, _)| Some(*name) != open.as_ref());
            others.map(|(name, rate)| (name.clone(), *rate)).collect()
        };
        assert_eq!(known(&found), known(&promised.there), "round {round}, open {open:?}");
        if !off {
            assert_eq!(world.macs().len(), found.len(), "round {round}");
        }
        promised.there = found;
        drop(promised);
        world.check(&lathed);
        lathed.kill();
    }
}
