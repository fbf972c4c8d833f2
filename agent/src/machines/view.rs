//! What is shown of machines, and plans of what would happen.

use std::cmp::Ordering;
use std::sync::Arc;
use std::time::Duration;

use lathe_cgroup::CpuList;
use lathe_shard::{Bytes, Shape};

use super::core::{Core, Entry, Shared, unix_sec};
use super::cores::Cpus;
use super::life::{self, Life};
use super::record::{Desired, Plug, Record, vcpus_for};
use super::resize::carried_milli;
use super::shape::{Ended, Force, Operation, Outcome, memory_limit};
use super::sight::{self, Sight, Window};
use crate::api::wire::foresight::ForesightView;
use crate::api::wire::{
    Amounts, Cores, CpusView, Delivered, DeliveredShare, DeliveredWindows, MachineView, OperationView,
    PlanStep, PlanView, ResizeOutcome, ResizeView, SCHEMA, ShapeView, Stalls, Tier, WorstDelivered,
};
use crate::foresight;
use crate::host::books::Books;
use crate::problem::{Kind, Problem};

/// One machine.
pub fn machine(entry: &Entry) -> MachineView {
    entry.with(|shared| {
        let record = &shared.record;
        let resources = resources(shared);
        let known = || record.all_nics().filter(|nic| nic.plug != Plug::Adding);
        let addresses = known().flat_map(|nic| nic.addresses.clone()).collect();
        let launched = shared.launched.as_ref();
        let booted = record.booted.as_ref();
        MachineView {
            schema: SCHEMA,
            name: record.name.clone(),
            state: record.life.state(),
            revision: record.revision,
            cpu: resources.cpu,
            memory: resources.memory,
            net: resources.net,
            iops: resources.iops,
            tier: record.desired.tier,
            tier_actual: tier_actual(shared),
            cpus: cpus(shared),
            vcpus: vcpus(shared),
            addresses,
            mac: known().next().map(|nic| mac_text(nic.mac)).unwrap_or_default(),
            source: record.source.text.clone(),
            guest_agent: shared.guest_agent,
            restart: record.restart,
            on_panic: record.on_panic,
            watchdog: record.watchdog,
            autostart: record.autostart,
            unit: launched.map(|launched| launched.unit.clone()).unwrap_or_default(),
            pid: launched.and_then(|launched| launched.pid),
            uptime_sec: booted
                .filter(|_| record.life.has_monitor())
                .map(|booted| unix_sec().saturating_sub(booted.at_unix_sec)),
            restarts: record.restarts.saturating_add(shared.reboots),
            reason: reason(shared),
            cpu_throttled_usec: shared.usage.throttled_usec,
            cpu_usage_usec: shared.usage.cpu_usec,
            disk_operations: shared.usage.disks.operations,
            disk_read_bytes: shared.usage.disks.read_bytes,
            disk_written_bytes: shared.usage.disks.written_bytes,
            net_rx_bytes: shared.usage.rx_bytes,
            net_tx_bytes: shared.usage.tx_bytes,
            cpu_max_milli: record.cpu_max_milli,
            memory_max_bytes: record.memory_max_bytes,
            cpu_min_milli: record.cpu_min_milli,
            memory_min_bytes: record.memory_min_bytes,
            foresight: foresight(record, entry.host_foresight),
            operation: record.operation.as_ref().map(|operation| of_operation(shared, operation)),
            back_unix_msec: record.back.map(|back| back.at_unix_msec),
            delivered: delivered(&shared.sight),
            stalls: stalls(&shared.sight),
            wanted: Vec::new(),
        }
    })
}

/// What is done about its future, and who says so.
pub(super) fn foresight(record: &Record, host: foresight::Settings) -> ForesightView {
    let counts = record.foresight.on(host);
    ForesightView {
        mode: counts.mode.into(),
        aggressiveness_permille: counts.aggressiveness_permille.into(),
        own_mode: record.foresight.mode,
        own_aggressiveness_permille: record.foresight.aggressiveness_permille.map(u64::from),
    }
}

/// What it asked for and got.
fn delivered(sight: &Sight) -> Delivered {
    let share = |window: Window| DeliveredShare {
        measured_msec: window.measured_usec / 1000,
        asked: window.asked,
        delivered: window.delivered,
        permille: window.permille,
    };
    let windows = |of: fn(&Sight, u64) -> Option<Window>| {
        Some(DeliveredWindows {
            sec_1: of(sight, sight::SEC_1).map(share)?,
            sec_10: of(sight, sight::SEC_10).map(share)?,
            sec_60: of(sight, sight::SEC_60).map(share)?,
        })
    };
    Delivered {
        cpu: windows(Sight::cpu),
        net_to_guest: windows(Sight::net_to_guest),
        net_from_guest: windows(Sight::net_from_guest),
    }
}

fn stalls(sight: &Sight) -> Stalls {
    let [cpu_centipercent, memory_centipercent, io_centipercent] = sight.stalls(sight::SEC_10);
    Stalls { cpu_centipercent, memory_centipercent, io_centipercent }
}

/// Of each resource the machine that got least of what it asked for over 10 s.
pub fn worst_delivered(entries: &[Arc<Entry>]) -> Vec<WorstDelivered> {
    let mut worst: [Option<(u64, &str)>; 3] = [None; 3];
    for entry in entries {
        let (tier, mut delivered) =
            entry.with(|shared| (shared.record.desired.tier, delivered(&shared.sight)));
        // Of CPU that nobody promised it, it is not short.
        delivered.cpu = delivered.cpu.filter(|_| tier != Tier::Harvest);
        let resources = [delivered.cpu, delivered.net_to_guest, delivered.net_from_guest];
        for (worst, windows) in worst.iter_mut().zip(resources) {
            if let Some(permille) = windows.and_then(|windows| windows.sec_10.permille)
                && worst.is_none_or(|(least, _)| permille < least)
            {
                *worst = Some((permille, &entry.name));
            }
        }
    }
    let view = |(resource, worst): (&str, Option<(u64, &str)>)| {
        let (permille, machine) = worst?;
        Some(WorstDelivered { resource: resource.to_owned(), machine: machine.to_owned(), permille })
    };
    ["cpu", "net-to-guest", "net-from-guest"].into_iter().zip(worst).filter_map(view).collect()
}

fn reason(shared: &Shared) -> String {
    let reason = shared.record.life.reason();
    match (&shared.problem, &shared.record.life) {
        (Some(problem), Life::Waiting { .. }) if reason.is_empty() => problem.message.clone(),
        (_, Life::Panicked { message }) => life::panic_reason(message),
        // Whoever has it paused then wants to know why it is.
        (_, Life::Paused) => match &shared.panic {
            Some(message) => life::panic_reason(message),
            None if shared.expired => life::WATCHDOG_REASON.to_owned(),
            None => String::new(),
        },
        _ => reason.to_owned(),
    }
}

/// Amounts of all resources.
struct Resources {
    cpu: Amounts,
    memory: Amounts,
    net: Amounts,
    iops: Amounts,
}

fn resources(shared: &Shared) -> Resources {
    let record = &shared.record;
    let held = record.held();
    let first = record.all_nics().find(|nic| nic.plug != Plug::Adding);
    let net_bit_per_sec = first.map_or(0, |nic| record.rate_of(nic));
    let running = record.booted.as_ref().filter(|_| shared.launched.is_some());
    let mut resources = Resources {
        cpu: Amounts { desired: record.desired.cpu_milli, granted: held.cpu.0, ..Amounts::default() },
        memory: Amounts {
            desired: record.desired.memory_bytes,
            granted: held.memory.0,
            ..Amounts::default()
        },
        net: Amounts { desired: net_bit_per_sec, ..Amounts::default() },
        iops: Amounts { desired: record.desired.iops, ..Amounts::default() },
    };
    if let Some(booted) = running {
        // Without a quota the vCPUs themselves are the limit.
        resources.cpu.actual = carried_milli(shared.quota_milli.unwrap_or(u64::MAX), vcpus(shared));
        resources.cpu.used = shared.usage.cpu_milli;
        resources.memory.actual = shared.force.as_ref().map_or(booted.memory_bytes, Force::held_bytes);
        resources.memory.used = shared.usage.memory_bytes;
        resources.net.granted = net_bit_per_sec;
        // Both directions are set alike; what is in force is the slower one.
        let slower = match (shared.port.to_guest, shared.port.from_guest) {
            (Some(to), Some(from)) => to.min(from),
            (one, other) => one.or(other).unwrap_or(0),
        };
        resources.net.actual = slower;
        resources.net.used = shared.usage.net_bit_per_sec;
        resources.iops.granted = record.desired.iops;
        resources.iops.used = shared.usage.iops;
        resources.iops.actual = shared.force.as_ref().and_then(|force| force.iops).unwrap_or(0);
    }
    resources
}

/// vCPUs that run: those that the guest has, less those that it says it has taken offline.
pub(super) fn vcpus(shared: &Shared) -> u32 {
    match &shared.force {
        Some(force) => force.present().min(force.online.filter(|_| force.agent).unwrap_or(u32::MAX)),
        None => shared.record.booted.as_ref().map_or(shared.record.vcpus(), |booted| booted.vcpus),
    }
}

fn operation_id(record: &Record, number: u64) -> String {
    format!("{}-{number}", record.name)
}

/// Machine name and number of an operation's id.
pub fn parse_operation_id(id: &str) -> Option<(&str, u64)> {
    let (name, number) = id.rsplit_once('-')?;
    Some((name, number.parse().ok()?))
}

/// How a resize stands, or how it ended.
pub fn resize(
    entry: &Entry,
    number: u64,
    outcome: ResizeOutcome,
    reason: String,
    took: Duration,
) -> ResizeView {
    entry.with(|shared| {
        let record = &shared.record;
        let resources = resources(shared);
        ResizeView {
            schema: SCHEMA,
            operation: operation_id(record, number),
            outcome,
            reason,
            took_usec: u64::try_from(took.as_micros()).unwrap_or(u64::MAX),
            name: record.name.clone(),
            state: record.life.state(),
            revision: record.revision,
            cpu: resources.cpu,
            memory: resources.memory,
            net: resources.net,
            iops: resources.iops,
            tier: record.desired.tier,
            tier_actual: tier_actual(shared),
        }
    })
}

/// The tier that is in force.
fn tier_actual(shared: &Shared) -> Option<Tier> {
    shared.launched.as_ref()?;
    shared.force.as_ref()?.standing?.tier_in_force()
}

/// The CPUs that it runs on.
fn cpus(shared: &Shared) -> CpusView {
    let cores = shared.record.cores;
    if shared.launched.is_none() {
        return CpusView { cores, ..CpusView::default() };
    }
    let Cpus { wanted, actual, problem } = shared.cpus.clone();
    let text = |list: CpuList| list.to_string();
    CpusView { cores, wanted: wanted.map(text), actual: actual.map(text), problem }
}

/// What its tier promises it.
fn plan_tier(tier: Tier) -> &'static str {
    match tier {
        Tier::Guaranteed => "its grant always: first among machines, and its memory is kept",
        Tier::Standard => "shares with its like what guaranteed machines leave",
        Tier::Harvest => "CPU that no other machine wants, up to its grant",
    }
}

/// The operation under way, as the answer to who asked for it.
pub fn under_way(entry: &Entry) -> ResizeView {
    let number =
        entry.with(|shared| shared.record.operation.as_ref().map_or(0, |under_way| under_way.number));
    resized(entry, number, None)
}

/// The operation of this number as it stands now; `took` where it is known better than in milliseconds.
pub fn resized(entry: &Entry, number: u64, took: Option<Duration>) -> ResizeView {
    let ended = entry.with(|shared| {
        shared.record.ended.iter().rev().find(|ended| ended.operation.number == number).cloned()
    });
    match ended {
        Some(ended) => {
            let msec = Duration::from_millis(ended.at.saturating_sub(ended.operation.began));
            resize(entry, number, outcome(ended.outcome), ended.reason, took.unwrap_or(msec))
        }
        None => {
            let short = entry.with(|shared| shared.short.clone());
            resize(entry, number, ResizeOutcome::UnderWay, short, took.unwrap_or_default())
        }
    }
}

fn outcome(outcome: Outcome) -> ResizeOutcome {
    match outcome {
        Outcome::Applied => ResizeOutcome::Applied,
        Outcome::Partial => ResizeOutcome::Partial,
        Outcome::Failed => ResizeOutcome::Failed,
    }
}

fn shape_view(shape: &Desired) -> ShapeView {
    ShapeView {
        cpu_milli: shape.cpu_milli,
        memory_bytes: shape.memory_bytes,
        net_bit_per_sec: shape.net_bit_per_sec,
        iops: shape.iops,
        tier: shape.tier,
    }
}

fn of_operation(shared: &Shared, operation: &Operation) -> OperationView {
    OperationView {
        schema: SCHEMA,
        operation: operation_id(&shared.record, operation.number),
        name: shared.record.name.clone(),
        outcome: ResizeOutcome::UnderWay,
        reason: shared.short.clone(),
        by: operation.by,
        background: operation.deadline.is_none(),
        began_unix_msec: operation.began,
        deadline_unix_msec: operation.deadline,
        ended_unix_msec: None,
        from: shape_view(&operation.before),
        to: shape_view(&operation.target),
    }
}

fn of_ended(shared: &Shared, ended: &Ended) -> OperationView {
    OperationView {
        outcome: outcome(ended.outcome),
        reason: ended.reason.clone(),
        ended_unix_msec: Some(ended.at),
        ..of_operation(shared, &ended.operation)
    }
}

/// The operations that are remembered, the newest last.
pub fn operations(entry: &Entry) -> Vec<OperationView> {
    entry.with(|shared| {
        let ended = shared.record.ended.iter().map(|ended| of_ended(shared, ended));
        ended.chain(shared.record.operation.iter().map(|operation| of_operation(shared, operation))).collect()
    })
}

/// One of them.
///
/// # Errors
/// `no-such-operation`.
pub fn operation(entry: &Entry, number: u64) -> Result<OperationView, Problem> {
    let id = entry.with(|shared| operation_id(&shared.record, number));
    operations(entry).into_iter().rev().find(|view| view.operation == id).ok_or_else(|| no_operation(&id))
}

/// There is none of this id.
pub fn no_operation(id: &str) -> Problem {
    let message = format!("there is no operation {}", printable(id));
    Problem::new(Kind::NotFound, "no-such-operation", message)
        .detail("the last 16 of each machine are remembered")
}

/// What a guest or a stranger says, fit to be shown: without control characters, not too long.
pub fn printable(text: &str) -> String {
    text.chars().filter(|character| !character.is_control()).take(200).collect()
}

/// The plan of a new machine.
///
/// # Errors
/// `…-over-capacity`.
pub fn plan_run(core: &Core, record: &Record) -> Result<PlanView, Problem> {
    let shape = record.desired;
    let mut steps = vec![
        step("cpu", 0, shape.cpu_milli, format!("{} vCPUs under a quota", record.vcpus())),
        step("memory", 0, shape.memory_bytes, "given at its start".to_owned()),
    ];
    if record.net.is_some() {
        let how = if shape.net_bit_per_sec == 0 { "no limit" } else { "both directions limited at its tap" };
        steps.push(step("net", 0, shape.net_bit_per_sec, how.to_owned()));
    }
    if shape.iops != 0 {
        steps.push(step("iops", 0, shape.iops, "all its disks together, in its monitor".to_owned()));
    }
    if shape.tier != Tier::Standard {
        let (standard, tier) = (Tier::Standard.rank(), shape.tier.rank());
        steps.push(step("tier", standard, tier, plan_tier(shape.tier).to_owned()));
    }
    if record.cores == Cores::Dedicated {
        let how = "cores to itself: no other machine runs on them".to_owned();
        steps.push(step("cores", 0, record.booking().cpus_alone(), how));
    }
    let disk = record.held().disk.0;
    if disk > 0 {
        steps.push(step("disk", 0, disk, "private disks, sparse".to_owned()));
    }
    steps.push(step("machine", 0, 1, format!("starts {}", record.source.text)));
    plan(core, record, 0, steps)
}

/// The plan of a resize from what is desired to `target`.
///
/// # Errors
/// `…-over-capacity`.
pub fn plan_resize(core: &Core, entry: &Entry, target: Desired) -> Result<PlanView, Problem> {
    let (record, force) = entry.with(|shared| (shared.record.clone(), shared.force.clone()));
    let mut steps = Vec::new();
    let old = record.desired;
    let at_start = || "at its next start".to_owned();
    if old.cpu_milli != target.cpu_milli {
        let how = force.as_ref().map_or_else(at_start, |force| plan_cpu(force, &record, target.cpu_milli));
        steps.push(step("cpu", old.cpu_milli, target.cpu_milli, how));
    }
    if old.memory_bytes != target.memory_bytes {
        let how = force.as_ref().map_or_else(at_start, |force| plan_memory(force, target.memory_bytes));
        steps.push(step("memory", old.memory_bytes, target.memory_bytes, how));
    }
    if old.net_bit_per_sec != target.net_bit_per_sec {
        let how = if force.is_some() { "both directions at its tap, at once" } else { "at its next start" };
        steps.push(step("net", old.net_bit_per_sec, target.net_bit_per_sec, how.to_owned()));
    }
    if old.iops != target.iops {
        let at_once = force.as_ref().is_some_and(|force| force.iops.is_some());
        let how = if at_once { "all its disks together, at once" } else { "at its next start" };
        steps.push(step("iops", old.iops, target.iops, how.to_owned()));
    }
    if old.tier != target.tier {
        let inside = |force: &Force| force.standing.is_some_and(|standing| !standing.among_others);
        let at_once = force.as_ref().is_some_and(|force| !inside(force));
        let when = if at_once { "at once" } else { "at its next start" };
        let how = format!("{}, {when}", plan_tier(target.tier));
        steps.push(step("tier", old.tier.rank(), target.tier.rank(), how));
    }
    let mut after = record.clone();
    after.desired = target;
    // What is booked for what it has now is given back on the way.
    after.holds = None;
    after.operation = None;
    plan(core, &after, record.revision, steps)
}

/// How its CPU gets there.
fn plan_cpu(force: &Force, record: &Record, cpu_milli: u64) -> String {
    let needed = vcpus_for(cpu_milli).max(record.vcpus_asked.unwrap_or(1));
    let Some(cpus) = &force.cpus else {
        return match carried_milli(cpu_milli, force.boot_cpus) < cpu_milli {
            true => format!(
                "quota of the machine, as far as its {} vCPUs carry, at once; the rest at its next start",
                force.boot_cpus
            ),
            false => "quota of the machine, at once".to_owned(),
        };
    };
    let wanted = needed.min(cpus.possible.max(1));
    let online = force.online.filter(|_| force.agent).unwrap_or(cpus.present).min(cpus.present);
    let rest = if needed > cpus.possible { "; more vCPUs than that only at its next start" } else { "" };
    let who = if force.agent { "by its guest agent" } else { "by its udev rules: no guest agent answers" };
    match (wanted.cmp(&online), wanted > cpus.present) {
        (Ordering::Equal, _) => format!("quota of the machine, at once{rest}"),
        (Ordering::Greater, true) => {
            format!(
                "quota at once; {} -> {wanted} vCPUs plugged in and brought online {who}{rest}",
                cpus.present
            )
        }
        (Ordering::Greater, false) => {
            format!("quota at once; {online} -> {wanted} CPUs brought online {who}{rest}")
        }
        (Ordering::Less, _) if force.agent => {
            format!("quota at once; {online} -> {wanted} CPUs, taken offline by its guest agent")
        }
        (Ordering::Less, _) => format!("quota at once; {online} -> {wanted} vCPUs, ejected by its kernel"),
    }
}

/// How its memory gets there.
fn plan_memory(force: &Force, bytes: u64) -> String {
    let Some(memory) = &force.memory else { return "at its next start".to_owned() };
    let limit = memory_limit(memory.boot_bytes, memory.pluggable_bytes);
    let goal = bytes.min(limit);
    let held = force.held_bytes();
    let mut parts = Vec::new();
    let plug = goal.saturating_sub(memory.boot_bytes);
    if goal > held && memory.balloon_bytes > 0 {
        parts.push("given back by its balloon".to_owned());
    }
    if plug > memory.plugged_bytes {
        parts.push(format!("{} plugged in by virtio-mem", Bytes(plug - memory.plugged_bytes)));
    }
    if plug < memory.plugged_bytes {
        let remainder = "what it cannot move goes into its balloon";
        parts.push(format!("{} unplugged, {remainder}", Bytes(memory.plugged_bytes - plug)));
    }
    if goal < memory.boot_bytes && goal < held {
        parts.push(format!("{} into its balloon", Bytes(memory.boot_bytes - goal)));
    }
    if bytes > limit {
        parts.push(format!("{} at its next start", Bytes(bytes - limit)));
    }
    if !memory.plug_driver && plug != memory.plugged_bytes {
        parts.push("its kernel has no virtio-mem driver at work now".to_owned());
    }
    if parts.is_empty() { "as it is".to_owned() } else { parts.join("; ") }
}

/// A plan: these steps lead to `after`.
///
/// # Errors
/// `…-over-capacity`.
pub fn plan(core: &Core, after: &Record, revision: u64, steps: Vec<PlanStep>) -> Result<PlanView, Problem> {
    let mut books: Books = core.with_books(|books| books.clone());
    books.set(&after.name, after.booking())?;
    let host_after = books.view(Shape::default());
    Ok(PlanView { schema: SCHEMA, name: after.name.clone(), revision, steps, host_after })
}

fn step(resource: &str, from: u64, to: u64, how: String) -> PlanStep {
    PlanStep { resource: resource.to_owned(), from, to, how }
}

pub(super) fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}
