//! What is shown of machines, and plans of what would happen.

use std::time::Duration;

use lathe_guest::protocol::{Interface, Network, Request};
use lathe_shard::Shape;

use super::core::{Core, Entry, Shared, unix_sec};
use super::life::{self, Life};
use super::record::{Desired, Record};
use super::resize::carried_milli;
use crate::api::wire::{Amounts, MachineView, PlanStep, PlanView, ResizeOutcome, ResizeView, SCHEMA};
use crate::host::books::Books;
use crate::problem::Problem;

/// One machine.
pub fn machine(entry: &Entry) -> MachineView {
    entry.with(|shared| {
        let record = &shared.record;
        let resources = resources(shared);
        let addresses = record.net.as_ref().map(|net| net.addresses.clone()).unwrap_or_default();
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
            vcpus: booted.map_or(record.vcpus(), |booted| booted.vcpus),
            addresses,
            mac: record.net.as_ref().map(|net| mac_text(net.mac)).unwrap_or_default(),
            source: record.source.text.clone(),
            guest_agent: shared.guest_agent,
            restart: record.restart,
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
            net_rx_bytes: shared.usage.rx_bytes,
            net_tx_bytes: shared.usage.tx_bytes,
        }
    })
}

fn reason(shared: &Shared) -> String {
    let reason = shared.record.life.reason();
    match (&shared.problem, &shared.record.life) {
        (Some(problem), Life::Waiting { .. }) if reason.is_empty() => problem.message.clone(),
        (_, Life::Panicked { message }) => life::panic_reason(message),
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
    let running = record.booted.as_ref().filter(|_| shared.launched.is_some());
    let mut resources = Resources {
        cpu: Amounts { desired: record.desired.cpu_milli, granted: held.cpu.0, ..Amounts::default() },
        memory: Amounts {
            desired: record.desired.memory_bytes,
            granted: held.memory.0,
            ..Amounts::default()
        },
        net: Amounts { desired: record.desired.net_bit_per_sec, ..Amounts::default() },
        iops: Amounts { desired: record.desired.iops, ..Amounts::default() },
    };
    if let Some(booted) = running {
        // Without a quota the vCPUs themselves are the limit.
        resources.cpu.actual = carried_milli(shared.quota_milli.unwrap_or(u64::MAX), booted.vcpus);
        resources.cpu.used = shared.usage.cpu_milli;
        resources.memory.actual = booted.memory_bytes;
        resources.memory.used = shared.usage.memory_bytes;
        resources.net.granted = record.desired.net_bit_per_sec;
        // Both directions are set alike; what is in force is the slower one.
        let slower = match (shared.port.to_guest, shared.port.from_guest) {
            (Some(to), Some(from)) => to.min(from),
            (one, other) => one.or(other).unwrap_or(0),
        };
        resources.net.actual = slower;
        resources.net.used = shared.usage.net_bit_per_sec;
    }
    resources
}

/// A resize that has ended.
pub fn resize(entry: &Entry, outcome: ResizeOutcome, reason: String, took: Duration) -> ResizeView {
    entry.with(|shared| {
        let record = &shared.record;
        let resources = resources(shared);
        ResizeView {
            schema: SCHEMA,
            operation: format!("{}-{}", record.name, record.revision),
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
        }
    })
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
    let disk = record.held().disk.0;
    if disk > 0 {
        steps.push(step("disk", 0, disk, "private disks, sparse".to_owned()));
    }
    steps.push(step("machine", 0, 1, format!("starts {}", record.source.text)));
    plan(core, record, 0, steps)
}

/// The plan of a resize from `record.desired` to `target`.
///
/// # Errors
/// `…-over-capacity`.
pub fn plan_resize(core: &Core, record: &Record, target: Desired) -> Result<PlanView, Problem> {
    let mut steps = Vec::new();
    let old = record.desired;
    let running = record.booted.as_ref().filter(|_| record.life == Life::Running);
    if old.cpu_milli != target.cpu_milli {
        let how = match running {
            Some(booted) if carried_milli(target.cpu_milli, booted.vcpus) < target.cpu_milli => format!(
                "quota of its {} vCPUs as far as they carry, at once; the rest at its next start",
                booted.vcpus
            ),
            Some(_) => "quota of its vCPUs, at once".to_owned(),
            None => "at its next start".to_owned(),
        };
        steps.push(step("cpu", old.cpu_milli, target.cpu_milli, how));
    }
    if old.memory_bytes != target.memory_bytes {
        steps.push(step("memory", old.memory_bytes, target.memory_bytes, "at its next start".to_owned()));
    }
    if old.net_bit_per_sec != target.net_bit_per_sec {
        let how = if running.is_some() { "both directions at its tap, at once" } else { "at its next start" };
        steps.push(step("net", old.net_bit_per_sec, target.net_bit_per_sec, how.to_owned()));
    }
    let mut after = record.clone();
    after.desired = target;
    plan(core, &after, record.revision, steps)
}

fn plan(core: &Core, after: &Record, revision: u64, steps: Vec<PlanStep>) -> Result<PlanView, Problem> {
    let mut books: Books = core.with_books(|books| books.clone());
    books.set(&after.name, after.held())?;
    let host_after = books.view(Shape::default());
    Ok(PlanView { schema: SCHEMA, name: after.name.clone(), revision, steps, host_after })
}

fn step(resource: &str, from: u64, to: u64, how: String) -> PlanStep {
    PlanStep { resource: resource.to_owned(), from, to, how }
}

fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// What the guest agent is told about its network.
pub fn guest_network(core: &Core, entry: &Entry) -> Request {
    let (name, net) = entry.with(|shared| (shared.record.name.clone(), shared.record.net.clone()));
    let mut interfaces = Vec::new();
    let mut dns = Vec::new();
    if let (Some(net), Some(config)) = (net, &core.config.network) {
        let gateways = [Some(config.ipv4), config.ipv6].into_iter().flatten();
        interfaces.push(Interface {
            mac: net.mac,
            addresses: net.addresses,
            gateways: gateways.map(|prefix| prefix.addr.to_string()).collect(),
            mtu: None,
        });
        dns = core.probe.name_servers();
    }
    Request::Network(Network { hostname: name, interfaces, dns })
}
