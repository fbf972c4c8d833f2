//! Machines of a lathed with fake monitors, sculpted turn by turn.

use super::*;
use crate::api::wire::foresight::{AskedBy, WhyView};
use crate::api::wire::{ResizeRequest, RunRequest};
use crate::foresight::demand::{Cpu, Reading};
use crate::machines::tests::{Lathed, STOP, World, until};

const SEC: u64 = 1_000_000;

fn request(world: &World, mode: ForesightMode) -> RunRequest {
    RunRequest { cpu_max_milli: Some(1000), foresight: Some(mode), ..world.request("demo") }
}

fn entry(lathed: &Lathed) -> Arc<Entry> {
    lathed.machines.core.entry("demo").unwrap()
}

/// As if it had asked for so much CPU in the last seconds.
fn asks_for(lathed: &Lathed, milli: u64) {
    let now = unix_sec();
    entry(lathed).profile(|profile| {
        for second in 0..=10 {
            let cpu =
                Cpu { at_usec: second * SEC, used_usec: second * milli * 1000, vcpus: 4, ..Cpu::default() };
            profile.take(now - 10 + second, second * SEC, Reading { cpu: Some(cpu), ..Reading::default() });
        }
        profile.lose();
    });
}

/// A turn of the loop, and what it leads to.
fn turn(lathed: &Lathed, turn: &mut Turn) -> usize {
    let core = &lathed.machines.core;
    let decided = turn.take(core);
    let count = decided.iter().map(|of| of.decisions.len()).sum();
    lathed.wait(async { decided.into_iter().for_each(|of| settle(core, of)) });
    until(|| !entry(lathed).sculpted(|sculpted| sculpted.doing));
    count
}

fn new_turn() -> Turn {
    Turn::new(Settings::default())
}

fn why(lathed: &Lathed) -> WhyView {
    lathed.wait(lathed.machines.why("demo")).unwrap()
}

fn cpu(milli: u64) -> ResizeRequest {
    ResizeRequest { cpu_milli: Some(milli), ..ResizeRequest::default() }
}

#[test]
fn a_machine_that_asks_for_all_that_it_has_gets_more_and_it_is_told_why() {
    let world = World::new();
    let lathed = world.lathed();
    lathed.run(request(&world, ForesightMode::On)).unwrap();
    let mut turns = new_turn();
    asks_for(&lathed, 20);
    assert_eq!(turn(&lathed, &mut turns), 0);
    let nothing = why(&lathed);
    assert!(nothing.decisions.is_empty() && nothing.now.starts_with("looked at every 5 s"), "{nothing:?}");
    assert_eq!((nothing.weighings[0].granted, nothing.weighings[0].amount), (100, 100));

    asks_for(&lathed, 400);
    assert_eq!(turn(&lathed, &mut turns), 1);
    let grown = lathed.show("demo");
    assert!((400..=1000).contains(&grown.cpu.desired), "{:?}", grown.cpu);
    assert_eq!((grown.cpu.granted, grown.revision), (grown.cpu.desired, 2));
    world.check(&lathed);
    let told = why(&lathed);
    let decision = &told.decisions[0];
    assert_eq!((decision.resource.as_str(), decision.from, decision.to), ("cpu", 100, grown.cpu.desired));
    assert_eq!((decision.cause.as_str(), decision.outcome.as_str()), ("reached", "applied"));
    assert_eq!((decision.demand, decision.recent), (None, Some(400)), "its sampler reads no CPU");
    assert!(decision.options.iter().any(|option| option.rejected.is_none() && option.amount == decision.to));
    let id = decision.operation.clone().unwrap();
    assert_eq!(lathed.wait(lathed.machines.operation(&id)).unwrap().by, AskedBy::Sculptor);
    let applied = lathed.machines.sculpted().all().find(|(.., count)| *count > 0);
    assert_eq!(applied, Some((Resource::Cpu, "applied", 1)));

    // It never gets more than its bound, and undoing is for what a person did.
    asks_for(&lathed, 4000);
    turn(&lathed, &mut turns);
    asks_for(&lathed, 4000);
    turn(&lathed, &mut turns);
    assert_eq!(lathed.show("demo").cpu.desired, 1000);
    let undo = ResizeRequest { undo: true, ..ResizeRequest::default() };
    let problem = lathed.wait(lathed.machines.resize("demo", undo, None)).unwrap_err();
    assert_eq!(problem.code, "nothing-to-undo");
}

#[test]
fn who_only_observes_changes_nothing_and_says_once_what_it_would_do() {
    let world = World::new();
    let lathed = world.lathed();
    lathed.run(request(&world, ForesightMode::Observe)).unwrap();
    let mut turns = new_turn();
    for _ in 0..3 {
        asks_for(&lathed, 400);
        assert_eq!(turn(&lathed, &mut turns), 1);
    }
    assert_eq!((lathed.show("demo").cpu.desired, lathed.show("demo").revision), (100, 1));
    let told = why(&lathed);
    let decisions: Vec<_> =
        told.decisions.iter().map(|one| (one.outcome.as_str(), one.from, one.times)).collect();
    assert_eq!(decisions, [("observed", 100, 3)]);
    assert!(told.now.contains("mode is observe"), "{}", told.now);
    let observed: u64 = lathed.machines.sculpted().all().map(|(.., count)| count).sum();
    assert_eq!(observed, 1);
}

#[test]
fn a_persons_resize_is_not_fought() {
    let world = World::new();
    let lathed = world.lathed();
    lathed.run(request(&world, ForesightMode::On)).unwrap();
    let mut turns = new_turn();
    lathed.wait(lathed.machines.resize("demo", cpu(200), None)).unwrap();
    asks_for(&lathed, 800);
    assert_eq!(turn(&lathed, &mut turns), 0);
    assert_eq!(lathed.show("demo").cpu.desired, 200);
    assert!(why(&lathed).now.starts_with("somebody resized it"), "{}", why(&lathed).now);
    // Ten minutes later.
    entry(&lathed).with(|shared| shared.record.asked_unix_msec -= PERSON_REST_MSEC);
    assert_eq!(turn(&lathed, &mut turns), 1);
    assert!(lathed.show("demo").cpu.desired >= 800);

    // What was asked for a time is left until that is over, however long ago it was.
    let timed = ResizeRequest { for_sec: Some(7200), ..cpu(300) };
    lathed.wait(lathed.machines.resize("demo", timed, None)).unwrap();
    entry(&lathed).with(|shared| shared.record.asked_unix_msec = 1);
    asks_for(&lathed, 800);
    assert_eq!(turn(&lathed, &mut turns), 0);
    assert_eq!(lathed.show("demo").cpu.desired, 300);
    assert!(why(&lathed).now.contains("was asked for a time"), "{}", why(&lathed).now);
}

#[test]
fn who_resizes_while_it_is_decided_wins() {
    let world = World::new();
    let lathed = world.lathed();
    lathed.run(request(&world, ForesightMode::On)).unwrap();
    asks_for(&lathed, 400);
    let mut turns = new_turn();
    let decided = turns.take(&lathed.machines.core);
    assert_eq!(decided.len(), 1);
    lathed.wait(lathed.machines.resize("demo", cpu(150), None)).unwrap();
    lathed.wait(async { decided.into_iter().for_each(|of| settle(&lathed.machines.core, of)) });
    until(|| !entry(&lathed).sculpted(|sculpted| sculpted.doing));
    assert_eq!(lathed.show("demo").cpu.desired, 150);
    let refused = why(&lathed).decisions.remove(0);
    assert_eq!((refused.outcome.as_str(), refused.operation), ("refused", None));
    assert!(refused.reason.contains("revision"), "{}", refused.reason);
    // And it is not asked again at once.
    entry(&lathed).with(|shared| shared.record.asked_unix_msec = 0);
    asks_for(&lathed, 400);
    assert_eq!(turn(&lathed, &mut turns), 0);
    assert!(why(&lathed).now.contains("did not come about"), "{}", why(&lathed).now);
}

#[test]
fn a_machine_that_does_not_run_is_left_alone_and_says_so() {
    let world = World::new();
    let lathed = world.lathed();
    lathed.run(request(&world, ForesightMode::On)).unwrap();
    asks_for(&lathed, 400);
    lathed.wait(lathed.machines.pause("demo")).unwrap();
    assert_eq!(turn(&lathed, &mut new_turn()), 0);
    assert!(why(&lathed).now.starts_with("it is paused"), "{}", why(&lathed).now);
    lathed.wait(lathed.machines.stop("demo", STOP)).unwrap();
    assert_eq!(turn(&lathed, &mut new_turn()), 0);
    assert!(why(&lathed).now.starts_with("it is stopped"), "{}", why(&lathed).now);
    assert_eq!(lathed.show("demo").revision, 1);
}

#[test]
fn a_machines_own_say_outlives_lathed() {
    let world = World::new();
    let lathed = world.lathed();
    lathed.run(world.request("demo")).unwrap();
    let told = |lathed: &Lathed| lathed.show("demo").foresight;
    assert_eq!((told(&lathed).mode, told(&lathed).own_mode), (ForesightMode::Observe, None));
    let set = |lathed: &Lathed, mode, aggressiveness_permille| {
        let request = ForesightRequest { mode, aggressiveness_permille };
        lathed.wait(lathed.machines.set_foresight("demo", request)).map(|view| view.foresight)
    };
    let on = set(&lathed, Some(ForesightChoice::On), Some(1000)).unwrap();
    assert_eq!((on.mode, on.aggressiveness_permille), (ForesightMode::On, 1000));
    let problem = set(&lathed, None, Some(1001)).unwrap_err();
    assert_eq!(problem.code, "bad-amount");
    lathed.kill();
    let lathed = world.lathed();
    assert_eq!(told(&lathed), on);
    let off = set(&lathed, Some(ForesightChoice::Off), None).unwrap();
    assert_eq!((off.mode, off.own_aggressiveness_permille), (ForesightMode::Off, Some(1000)));
    asks_for(&lathed, 400);
    assert_eq!(turn(&lathed, &mut new_turn()), 0);
    assert!(why(&lathed).now.starts_with("its mode is off"), "{}", why(&lathed).now);
    let problem = lathed.wait(lathed.machines.forecast("demo")).unwrap_err();
    assert_eq!((problem.code, problem.fix.as_str()), ("foresight-off", "lathe forecast demo --mode observe"));
    let host = set(&lathed, Some(ForesightChoice::Host), None).unwrap();
    assert_eq!(
        (host.mode, host.own_mode, host.own_aggressiveness_permille),
        (ForesightMode::Observe, None, None)
    );
}

#[test]
fn seconds_that_are_pressed_wake_the_sculptor_and_accounts_are_kept() {
    let world = World::new();
    let lathed = world.lathed();
    lathed.run(request(&world, ForesightMode::On)).unwrap();
    let core = &lathed.machines.core;
    asks_for(&lathed, 20);
    turn(&lathed, &mut new_turn());
    let pressed = |milli: u64| {
        entry(&lathed).profile(|profile| {
            for second in [0, 1] {
                let cpu = Cpu {
                    at_usec: second * SEC,
                    used_usec: second * milli * 1000,
                    vcpus: 4,
                    ..Cpu::default()
                };
                profile.take(unix_sec(), second * SEC, Reading { cpu: Some(cpu), ..Reading::default() });
            }
        });
        note(core);
        entry(&lathed).sculpted(|sculpted| sculpted.pressed_sec)
    };
    // The sampler may have come in between, which sees no CPU here.
    until(|| pressed(100) >= PRESSED_SEC);
    let day = entry(&lathed).sculpted(|sculpted| sculpted.accounts[Resource::Cpu as usize].day(unix_sec()));
    assert!(day.seconds >= 2 && day.granted == 100 * day.seconds && day.asked == day.granted, "{day:?}");
    until(|| pressed(20) == 0);
    // Who has all that it may have need not be looked at before it is time.
    entry(&lathed).with(|shared| shared.record.cpu_max_milli = Some(100));
    asks_for(&lathed, 20);
    turn(&lathed, &mut new_turn());
    assert_eq!((0..5).map(|_| pressed(100)).max(), Some(0));
    let quality = why(&lathed).quality;
    assert!(quality.iter().any(|of| of.resource == "cpu" && of.slack_permille > 0), "{quality:?}");
}

#[test]
fn decisions_and_accounts_outlive_lathed() {
    let world = World::new();
    let lathed = world.lathed();
    lathed.run(request(&world, ForesightMode::Observe)).unwrap();
    asks_for(&lathed, 400);
    assert_eq!(turn(&lathed, &mut new_turn()), 1);
    let now = unix_sec();
    entry(&lathed).sculpted(|sculpted| {
        let decision = sculpted.decisions().next().unwrap().decision.clone();
        sculpted.keep(1000, decision, Numbers::default(), "it begins".to_owned(), Came::UnderWay);
        sculpted.accounts[Resource::Cpu as usize].take(now - 7200, 100, 400);
    });
    let keep = |lathed: &Lathed| lathed.wait(crate::machines::foresee::keep(&lathed.machines.core)).unwrap();
    keep(&lathed);
    assert_eq!(entry(&lathed).sculpted(|sculpted| sculpted.to_store()), None, "only what is new is written");
    let before = why(&lathed);
    lathed.kill();
    let lathed = world.lathed();
    let after = why(&lathed);
    assert_eq!(after.decisions[1..], before.decisions[1..]);
    let cut_off = &after.decisions[0];
    assert_eq!((cut_off.why.as_str(), cut_off.outcome.as_str()), ("it begins", "unknown"));
    assert!(cut_off.reason.starts_with("lathed ended"), "{cut_off:?}");
    let cpu = |view: &WhyView| view.quality.iter().find(|of| of.resource == "cpu").cloned().unwrap();
    assert!(cpu(&after).short_sec >= 1 && after.since_unix_sec <= 1, "{after:?}");
    // What is decided from here on comes before, and no more than can be are kept.
    entry(&lathed).sculpted(|sculpted| {
        for at in 0..40 {
            let decision = kept::tests::decision(Resource::Cpu, 500 + at);
            sculpted.keep(2000 + at, decision, Numbers::default(), String::new(), Came::Applied);
            assert!(sculpted.decisions().count() + sculpted.before().len() <= kept::MAX_KEPT);
        }
    });
    assert_eq!(why(&lathed).decisions.len(), kept::MAX_KEPT);
    keep(&lathed);
    lathed.kill();
    let lathed = world.lathed();
    assert_eq!(why(&lathed).decisions[0].to, 539);
}

#[test]
fn a_lathed_that_comes_back_knows_what_was_wanted_before_it() {
    let world = World::new();
    let lathed = world.lathed();
    lathed.run(request(&world, ForesightMode::On)).unwrap();
    let now = unix_sec();
    entry(&lathed).profile(|profile| {
        for second in 0..3600 {
            let used_usec = second * 20_000;
            let cpu = Cpu { at_usec: second * SEC, used_usec, vcpus: 4, ..Cpu::default() };
            profile.take(now - 3600 + second, second * SEC, Reading { cpu: Some(cpu), ..Reading::default() });
        }
        profile.catch_up(now);
        let minutes = minutes(profile, now);
        let cpu = &minutes[Resource::Cpu as usize];
        assert!((59..=61).contains(&cpu.len()) && cpu.iter().flatten().all(|milli| *milli == 20), "{cpu:?}");
        assert!(minutes[Resource::Net as usize].is_empty());
        profile.lose();
    });
    lathed.wait(lathed.machines.resize("demo", cpu(900), None)).unwrap();
    entry(&lathed).with(|shared| shared.record.asked_unix_msec = 0);
    asks_for(&lathed, 20);
    // A sculptor without a past would wait for ten minutes at least.
    assert_eq!(turn(&lathed, &mut new_turn()), 1);
    assert!(lathed.show("demo").cpu.desired < 900);
}
