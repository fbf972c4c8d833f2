//! Profiles of machines of a lathed with fake monitors: kept, restored, gone with their machines.

use rusqlite::Connection;

use super::core::unix_sec;
use super::tests::{Lathed, World, until};
use super::*;
use crate::foresight::Resource;
use crate::foresight::demand::{Cpu, Reading};
use crate::foresight::ring::MINUTE;

const SEC: u64 = 1_000_000;

/// As if the machine had used a quarter of a CPU for so many whole minutes, the last that are over.
fn lived(lathed: &Lathed, name: &str, minutes: u64) {
    let entry = lathed.machines.core.entry(name).unwrap();
    let end = unix_sec() / MINUTE * MINUTE;
    entry.profile(|profile| {
        for second in 0..minutes * MINUTE {
            let cpu = Cpu { at_usec: second * SEC, used_usec: second * SEC / 4, vcpus: 1, ..Cpu::default() };
            let reading = Reading { cpu: Some(cpu), ..Reading::default() };
            profile.take(end - minutes * MINUTE + second, second * SEC, reading);
        }
        profile.lose();
    });
}

fn keep(lathed: &Lathed) {
    lathed.wait(foresee::keep(&lathed.machines.core)).unwrap();
}

fn rows(world: &World) -> i64 {
    // lathed has to have let go of it.
    let path = world.folder.path().join("state/lathe.db");
    let mut found = None;
    until(|| {
        let connection = Connection::open(&path).unwrap();
        found = connection.query_row("SELECT count(*) FROM past", [], |row| row.get(0)).ok();
        found.is_some()
    });
    found.unwrap()
}

#[test]
fn a_profile_outlives_lathed_and_not_its_machine() {
    let world = World::new();
    let lathed = world.lathed();
    lathed.run(world.request("demo")).unwrap();
    lived(&lathed, "demo", 30);
    keep(&lathed);
    let before = lathed.wait(lathed.machines.forecast("demo")).unwrap();
    let cpu = &before.resources[0];
    assert_eq!((cpu.resource.as_str(), cpu.granted, cpu.of.as_str()), ("cpu", 100, "mean"));
    assert_eq!(cpu.measured_min, 30);
    assert!(cpu.ahead.len() == 6 && cpu.ahead.iter().all(|ahead| (240..=400).contains(&ahead.p50)));
    assert!(cpu.confidence_permille.is_some_and(|permille| (50..500).contains(&permille)));
    assert_eq!((cpu.judged, cpu.held), (29, 29));
    assert!(cpu.minutes.mean.iter().all(|amount| *amount == Some(250)), "{:?}", cpu.minutes);
    lathed.kill();

    let lathed = world.lathed();
    let after = lathed.wait(lathed.machines.forecast("demo")).unwrap();
    assert_eq!(after.resources[0].minutes, cpu.minutes);
    let seconds = &after.resources[0].seconds;
    assert!(seconds.mean.iter().filter(|amount| **amount == Some(250)).count() >= 590, "{seconds:?}");
    assert_eq!(after.resources[0].ahead, cpu.ahead);
    lathed.wait(lathed.machines.remove("demo", true, true)).unwrap();
    keep(&lathed);
    let problem = lathed.wait(lathed.machines.forecast("demo")).unwrap_err();
    assert_eq!(problem.code, "no-such-machine");
    lathed.kill();
    assert_eq!(rows(&world), 0);
}

#[test]
fn a_damaged_past_begins_anew() {
    let world = World::new();
    let lathed = world.lathed();
    lathed.run(world.request("demo")).unwrap();
    lived(&lathed, "demo", 12);
    keep(&lathed);
    lathed.kill();
    let path = world.folder.path().join("state/lathe.db");
    until(|| Connection::open(&path).unwrap().execute("UPDATE past SET bytes = x'4c54'", []).is_ok());
    let lathed = world.lathed();
    let view = lathed.wait(lathed.machines.forecast("demo")).unwrap();
    assert!(view.resources.iter().all(|resource| resource.minutes.mean.is_empty()), "{view:?}");
    lived(&lathed, "demo", 3);
    keep(&lathed);
    let cpu = lathed.wait(lathed.machines.forecast("demo")).unwrap().resources.remove(0);
    assert_eq!(cpu.confidence_permille, None, "three minutes are too little");
    let track = |profile: &mut crate::foresight::Profile| profile.track(Resource::Cpu).is_some();
    assert!(lathed.machines.core.entry("demo").unwrap().profile(track));
}

#[test]
fn the_sampler_feeds_profiles() {
    let world = World::new();
    let lathed = world.lathed();
    lathed.run(world.request("demo")).unwrap();
    let seconds = || {
        let view = lathed.wait(lathed.machines.forecast("demo")).unwrap();
        let net = view.resources.into_iter().find(|resource| resource.resource == "net");
        net.map_or(0, |net| net.seconds.mean.len())
    };
    // Its tap carries nothing, which is something to know.
    let mut beats = lathed.machines.heartbeat();
    while seconds() < 2 {
        lathed.wait(beats.changed()).unwrap();
    }
}
