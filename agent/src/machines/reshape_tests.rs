//! Changes of shape against fake monitors whose guests follow, refuse or are deaf.

use super::enforced::Limit;
use super::tests::{Lathed, STOP, World, until};
use super::*;
use crate::api::wire::{DeadlineAction, MachineState, OperationView, Tier};
use crate::monitor::fake::Script;

const MIB: u64 = 1 << 20;

fn change(cpu_milli: Option<u64>, memory_mib: Option<u64>) -> ResizeRequest {
    ResizeRequest { cpu_milli, memory_bytes: memory_mib.map(|mib| mib * MIB), ..Default::default() }
}

impl Lathed {
    fn resize(&self, request: &ResizeRequest) -> ResizeView {
        self.wait(self.machines.resize("demo", request.clone(), None)).unwrap()
    }

    fn last(&self) -> OperationView {
        self.wait(self.machines.operations("demo")).unwrap().operations.pop().unwrap()
    }
}

#[test]
fn cpus_and_memory_grow_and_shrink_while_the_guest_runs() {
    let world = World::new();
    let lathed = world.lathed();
    lathed.run(RunRequest { cpu_max_milli: Some(4000), ..world.request("demo") }).unwrap();
    let larger = lathed.resize(&change(Some(1500), Some(256)));
    assert_eq!((larger.outcome, larger.revision), (ResizeOutcome::Applied, 2), "{}", larger.reason);
    assert_eq!(
        (larger.cpu.granted, larger.memory.actual, larger.memory.granted),
        (1500, 256 * MIB, 256 * MIB)
    );
    let view = lathed.show("demo");
    assert_eq!((view.vcpus, view.state), (2, MachineState::Running));
    let monitor = world.launcher.monitor("demo");
    let told = monitor.told(|told| told.commands.clone());
    let at = |name: &str| told.iter().position(|command| command == name).unwrap();
    assert!(at("prepare_cpus") < at("set_cpus"), "{told:?}");
    let smaller = lathed.resize(&change(Some(300), Some(64)));
    assert_eq!(smaller.outcome, ResizeOutcome::Applied, "{}", smaller.reason);
    assert_eq!(
        (smaller.memory.actual, smaller.memory.granted, smaller.cpu.granted),
        (64 * MIB, 64 * MIB, 300)
    );
    assert_eq!(lathed.show("demo").vcpus, 1);
    let over = lathed.wait(lathed.machines.resize("demo", change(Some(4001), None), None)).unwrap_err();
    assert_eq!(over.code, "over-bound");
    world.check(&lathed);
}

#[test]
fn what_the_guest_does_not_give_back_is_partial_stays_desired_and_is_gone_on_with() {
    let world = World::new();
    let pinned = Script { pinned_bytes: 64 * MIB, balloon_most_bytes: Some(0), ..Script::default() };
    *world.launcher.script.lock().unwrap() = pinned.clone();
    let lathed = world.lathed();
    lathed.run(world.request("demo")).unwrap();
    lathed.resize(&change(None, Some(192)));
    // It has given half of it back at once, and may be at it still.
    let soon = ResizeRequest { deadline_msec: Some(300), ..change(None, Some(64)) };
    let partial = lathed.resize(&soon);
    assert_eq!(partial.outcome, ResizeOutcome::Partial);
    assert_eq!(partial.reason, "its guest is giving memory back, and has 64 MiB to go");
    let later = ResizeRequest { deadline_msec: Some(2500), ..change(None, Some(66)) };
    let partial = lathed.resize(&later);
    assert_eq!(partial.outcome, ResizeOutcome::Partial);
    assert_eq!(partial.reason, "62 MiB of the guest's memory is not movable now");
    let partial = lathed.resize(&ResizeRequest { deadline_msec: Some(2500), ..change(None, Some(64)) });
    assert_eq!(partial.reason, "64 MiB of the guest's memory is not movable now");
    assert_eq!((partial.memory.desired, partial.memory.actual), (64 * MIB, 128 * MIB));
    assert_eq!(partial.memory.granted, 128 * MIB, "held memory stays in the books");
    let background = lathed.last();
    assert!(background.background && background.outcome == ResizeOutcome::UnderWay, "{background:?}");
    // It survives lathed, and ends when the guest can.
    lathed.kill();
    let lathed = world.lathed();
    assert_eq!(lathed.show("demo").operation.unwrap().operation, background.operation);
    world.launcher.monitor("demo").guest_follows(&Script::default());
    until(|| lathed.last().outcome != ResizeOutcome::UnderWay);
    assert_eq!(lathed.last().outcome, ResizeOutcome::Applied);
    assert_eq!(lathed.show("demo").memory.granted, 64 * MIB);
}

#[test]
fn a_deadline_may_lead_back_and_an_operation_can_be_cancelled_and_undone() {
    let world = World::new();
    *world.launcher.script.lock().unwrap() = Script { deaf_guest: true, ..Script::default() };
    let lathed = world.lathed();
    lathed.run(world.request("demo")).unwrap();
    let back = ResizeRequest {
        deadline_msec: Some(200),
        deadline_action: DeadlineAction::Revert,
        ..change(None, Some(128))
    };
    let failed = lathed.resize(&back);
    assert_eq!((failed.outcome, failed.memory.desired), (ResizeOutcome::Failed, 64 * MIB));
    assert!(failed.reason.contains("has taken 64 MiB of 128 MiB"), "{}", failed.reason);
    // Whoever does not wait learns the operation, joins it by asking again, and may cancel it.
    let now = ResizeRequest { wait_msec: Some(0), ..change(None, Some(128)) };
    let begun = lathed.resize(&now);
    assert_eq!(begun.outcome, ResizeOutcome::UnderWay);
    assert_eq!(lathed.resize(&now).operation, begun.operation);
    let cancelled = lathed.wait(lathed.machines.cancel(&begun.operation)).unwrap();
    assert_eq!(cancelled.outcome, ResizeOutcome::Failed);
    assert_eq!(lathed.show("demo").memory.desired, 64 * MIB);
    assert_eq!(lathed.wait(lathed.machines.cancel(&begun.operation)).unwrap_err().code, "operation-ended");
    assert_eq!(lathed.wait(lathed.machines.cancel("demo-99")).unwrap_err().code, "no-such-operation");
    // Until the guest looks again nobody knows that it will not follow what was cancelled.
    assert_eq!(lathed.last().outcome, ResizeOutcome::UnderWay);
    world.launcher.monitor("demo").guest_follows(&Script::default());
    lathed.resize(&change(Some(300), None));
    let undone = lathed.resize(&ResizeRequest { undo: true, ..Default::default() });
    assert_eq!((undone.cpu.desired, undone.cpu.granted), (100, 100));
    world.check(&lathed);
}

#[test]
fn a_change_for_a_time_goes_back_even_across_a_restart_of_lathed() {
    let world = World::new();
    let lathed = world.lathed();
    lathed.run(world.request("demo")).unwrap();
    let hour = ResizeRequest { for_sec: Some(1), ..change(Some(300), None) };
    assert_eq!(lathed.resize(&hour).cpu.granted, 300);
    assert!(lathed.show("demo").back_unix_msec.is_some());
    lathed.kill();
    let lathed = world.lathed();
    until(|| lathed.show("demo").cpu.desired == 100);
    assert_eq!(lathed.show("demo").back_unix_msec, None);
    lathed.wait(lathed.machines.stop("demo", STOP)).unwrap();
    world.check(&lathed);
}

#[test]
fn a_rate_of_disks_is_given_at_the_start_changed_while_it_runs_and_found_again() {
    let world = World::new();
    let lathed = world.lathed();
    let rated = |iops| ResizeRequest { iops: Some(iops), ..Default::default() };
    lathed.run(RunRequest { iops: Some(50), ..world.request("demo") }).unwrap();
    let told = || world.launcher.monitor("demo").told(|told| told.disk_rates.unwrap().iops);
    assert_eq!(world.launcher.monitor("demo").told(|told| told.config.as_ref().unwrap().disk_rates.iops), 50);
    let view = lathed.show("demo").iops;
    assert_eq!((view.desired, view.granted, view.actual), (50, 50, 50));
    let plan = lathed.wait(lathed.machines.plan_resize("demo", &rated(500), None)).unwrap();
    assert_eq!((plan.steps.len(), plan.steps[0].resource.as_str(), plan.steps[0].to), (1, "iops", 500));
    assert_eq!(plan.steps[0].how, "all its disks together, at once");
    let hour = ResizeRequest { for_sec: Some(1), ..rated(500) };
    let faster = lathed.resize(&hour);
    assert_eq!((faster.outcome, faster.iops.actual, told()), (ResizeOutcome::Applied, 500, 500));
    assert_eq!(lathed.resize(&rated(500)).outcome, ResizeOutcome::Unchanged);
    lathed.kill();
    let lathed = world.lathed();
    until(|| lathed.show("demo").iops.actual == 50);
    assert_eq!(told(), 50, "the time of the change is over");
    let before = lathed.enforced(Limit::Iops);
    let free = lathed.resize(&rated(0));
    assert_eq!((free.outcome, free.iops.actual, told()), (ResizeOutcome::Applied, 0, 0));
    assert_eq!(lathed.enforced(Limit::Iops), before + 1, "it is in the figures");
    let wrong = lathed.wait(lathed.machines.resize("demo", rated(1_000_000_001), None)).unwrap_err();
    assert_eq!(wrong.code, "bad-amount");
    world.check(&lathed);
}

#[test]
fn a_tier_changes_like_every_other_part_of_a_shape() {
    let world = World::new();
    let lathed = world.lathed();
    let tiered = |tier| ResizeRequest { tier: Some(tier), ..Default::default() };
    lathed.run(RunRequest { tier: Tier::Harvest, ..world.request("demo") }).unwrap();
    let view = lathed.show("demo");
    assert_eq!((view.tier, view.tier_actual), (Tier::Harvest, Some(Tier::Harvest)));
    let booked = || lathed.machines.host().resources.cpu;
    assert_eq!((booked().granted, booked().promised), (0, 100), "it is promised no CPU");
    let plan = lathed.wait(lathed.machines.plan_resize("demo", &tiered(Tier::Guaranteed), None)).unwrap();
    let step = &plan.steps[0];
    assert_eq!((plan.steps.len(), step.resource.as_str(), step.from, step.to), (1, "tier", 0, 2));
    assert!(step.how.ends_with(", at once"), "{}", step.how);
    assert_eq!(plan.host_after.cpu.granted, 100);
    // One that an earlier release has started has no place among others before its next start.
    let among_others = |is| {
        let entry = lathed.machines.core.entry("demo").unwrap();
        entry.with(|shared| {
            shared.force.as_mut().unwrap().standing.as_mut().unwrap().among_others = is;
        });
    };
    among_others(false);
    let plan = lathed.wait(lathed.machines.plan_resize("demo", &tiered(Tier::Guaranteed), None)).unwrap();
    assert!(plan.steps[0].how.ends_with(", at its next start"), "{}", plan.steps[0].how);
    among_others(true);
    let firmer = lathed.resize(&tiered(Tier::Guaranteed));
    assert_eq!((firmer.outcome, firmer.revision), (ResizeOutcome::Applied, 2), "{}", firmer.reason);
    assert_eq!((firmer.tier, firmer.tier_actual), (Tier::Guaranteed, Some(Tier::Guaranteed)));
    assert_eq!(lathed.resize(&tiered(Tier::Guaranteed)).outcome, ResizeOutcome::Unchanged);
    assert_eq!(booked().granted, 100);
    assert_eq!(lathed.last().to.tier, Tier::Guaranteed);
    lathed.kill();
    let lathed = world.lathed();
    until(|| lathed.show("demo").tier_actual == Some(Tier::Guaranteed));
    let undone = lathed.resize(&ResizeRequest { undo: true, ..Default::default() });
    assert_eq!((undone.outcome, undone.tier_actual), (ResizeOutcome::Applied, Some(Tier::Harvest)));
    let both = ResizeRequest { undo: true, ..tiered(Tier::Standard) };
    assert_eq!(lathed.wait(lathed.machines.resize("demo", both, None)).unwrap_err().code, "bad-amount");
    let second = ResizeRequest { for_sec: Some(1), ..tiered(Tier::Standard) };
    assert_eq!(lathed.resize(&second).tier, Tier::Standard);
    until(|| lathed.show("demo").tier == Tier::Harvest);
    lathed.wait(lathed.machines.stop("demo", STOP)).unwrap();
    assert_eq!(lathed.show("demo").tier_actual, None);
    world.check(&lathed);
}

#[test]
fn a_guarantee_that_the_host_cannot_keep_is_refused() {
    let world = World::new();
    let lathed = world.lathed();
    let all = lathed.machines.host().resources.cpu.free;
    let with = |name: &str, cpu_milli, tier| RunRequest { cpu_milli, tier, ..world.request(name) };
    lathed.run(with("demo", all, Tier::Guaranteed)).unwrap();
    let refused = lathed.run(with("other", 50, Tier::Standard)).unwrap_err();
    assert_eq!(refused.code, "cpu-over-capacity");
    lathed.run(with("other", all, Tier::Harvest)).unwrap();
    let promise = ResizeRequest { tier: Some(Tier::Standard), ..Default::default() };
    let refused = lathed.wait(lathed.machines.resize("other", promise, None)).unwrap_err();
    assert_eq!(refused.code, "cpu-over-capacity");
    assert_eq!(lathed.show("other").revision, 1, "nothing changed");
    world.check(&lathed);
}

#[test]
fn an_older_monitor_cannot_limit_disks_and_that_is_said() {
    let world = World::new();
    *world.launcher.script.lock().unwrap() = Script { protocol: Some(2), ..Script::default() };
    let lathed = world.lathed();
    lathed.run(RunRequest { iops: Some(50), ..world.request("demo") }).unwrap();
    let view = lathed.show("demo").iops;
    assert_eq!((view.desired, view.actual), (50, 0), "it was not told what it does not know");
    let asked = ResizeRequest { iops: Some(300), ..Default::default() };
    let plan = lathed.wait(lathed.machines.plan_resize("demo", &asked, None)).unwrap();
    assert_eq!(plan.steps[0].how, "at its next start");
    let partial = lathed.resize(&asked);
    assert_eq!(partial.outcome, ResizeOutcome::Partial);
    assert!(
        partial.reason.contains("older release") && partial.reason.contains("300 iops"),
        "{}",
        partial.reason
    );
    // The next monitor is a new one.
    lathed.wait(lathed.machines.stop("demo", STOP)).unwrap();
    *world.launcher.script.lock().unwrap() = Script::default();
    assert_eq!(lathed.wait(lathed.machines.start_machine("demo")).unwrap().iops.actual, 300);
}

#[test]
fn who_gets_least_of_what_it_asks_for_is_shown() {
    let world = World::new();
    let lathed = world.lathed();
    for (name, used_usec) in [("demo", 400_000), ("other", 500_000)] {
        lathed.run(world.request(name)).unwrap();
        let entry = lathed.machines.core.entry(name).unwrap();
        // A second of a spinning guest, of a time at which nobody else looks.
        let at = |at_usec, used_usec, wall_periods| {
            let cpu = sight::Cpu {
                at_usec,
                granted_milli: 500,
                used_usec,
                wall_periods,
                period_usec: 10_000,
                ..sight::Cpu::default()
            };
            sight::Observation { at_usec, cpu: Some(cpu), ..sight::Observation::default() }
        };
        entry.with(|shared| {
            shared.sight.observe(at(1_000_000_000, 0, 0));
            shared.sight.observe(at(1_001_000_000, used_usec, 100));
        });
    }
    let shown = lathed.show("demo").delivered.cpu.unwrap();
    for share in [shown.sec_1, shown.sec_10, shown.sec_60] {
        assert_eq!((share.measured_msec, share.asked, share.delivered), (1000, 500, 400));
        assert_eq!(share.permille, Some(800));
    }
    let worst = lathed.machines.host().worst_delivered;
    assert_eq!(worst.iter().map(|worst| worst.machine.as_str()).collect::<Vec<_>>(), ["demo"]);
    assert_eq!((worst[0].resource.as_str(), worst[0].permille), ("cpu", 800));
    lathed.wait(lathed.machines.stop("demo", STOP)).unwrap();
    assert_eq!(lathed.show("demo").delivered.cpu, None, "that was another life");
}
