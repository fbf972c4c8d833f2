//! Changing a machine's shape while it runs.
//!
//! ```text
//! reserve in the books ─► store {granted: larger of both, resizing: target} ─► host ─► store {desired: target} ─► release
//! ```
//! Enforced at the host first; the guest is not asked for CPU and bandwidth. When lathed dies in between, [`settle`] finishes it: setting
//! a limit that is in force already changes nothing.

use std::time::Instant;

use lathe_shard::{BitRate, Bytes, MilliCpu};

use super::actor::Actor;
use super::core::unix_sec;
use super::launch;
use super::life::Life;
use super::record::{Booted, Desired, Record};
use super::{spec, view};
use crate::api::wire::{ResizeOutcome, ResizeRequest, ResizeView};
use crate::problem::{Kind, Problem};
use crate::store::Change;

/// A CPU quota is one vCPU's worth at most for each vCPU.
pub fn carried_milli(cpu_milli: u64, vcpus: u32) -> u64 {
    cpu_milli.min(u64::from(vcpus).saturating_mul(1000))
}

/// Refuses when somebody else has changed the machine meanwhile.
///
/// # Errors
/// `revision`.
pub fn check_revision(record: &Record, wanted: Option<u64>) -> Result<(), Problem> {
    match wanted {
        Some(wanted) if wanted != record.revision => {
            let name = &record.name;
            let message =
                format!("{name} is at revision {}, the change was made for {wanted}", record.revision);
            Err(Problem::new(Kind::Conflict, "revision", message).fix(format!("lathe show {name}")))
        }
        _ => Ok(()),
    }
}

/// Carries a resize out; it has ended when this returns.
///
/// # Errors
/// `revision`, `machine-busy`, `bad-amount`, `not-yet`, `…-over-capacity`, `store`; then nothing changed.
pub(super) async fn resize(
    actor: &mut Actor,
    request: &ResizeRequest,
    revision: Option<u64>,
) -> Result<ResizeView, Problem> {
    let begin = Instant::now();
    let record = actor.entry.with(|shared| shared.record.clone());
    check_revision(&record, revision)?;
    if !record.life.is_settled() {
        let message = format!("{} is neither running nor off at the moment", record.name);
        return Err(Problem::new(Kind::Conflict, "machine-busy", message).fix("try again in a moment"));
    }
    let target = spec::resized(record.desired, request, record.net.is_some())?;
    if target == record.desired && record.resizing.is_none() {
        let reasons = shortfalls(&record);
        return Ok(view::resize(&actor.entry, ResizeOutcome::Unchanged, reasons.join("; "), begin.elapsed()));
    }
    let mut intent = record.clone();
    intent.resizing = Some(target);
    actor.core.with_books(|books| books.set(&record.name, intent.held()))?;
    if let Err(problem) = actor.core.store.apply(Change::Put(Box::new(intent.clone()))).await {
        actor.core.with_books(|books| books.enter(&record.name, record.held()));
        return Err(problem);
    }
    actor.entry.with(|shared| shared.record = intent);
    match enforce(actor, target).await {
        Ok(()) => commit(actor, target, begin).await,
        Err(problem) => {
            roll_back(actor, &record).await;
            Ok(view::resize(&actor.entry, ResizeOutcome::Failed, problem.message, begin.elapsed()))
        }
    }
}

async fn commit(actor: &mut Actor, target: Desired, begin: Instant) -> Result<ResizeView, Problem> {
    let took = begin.elapsed();
    let mut done = actor.entry.with(|shared| shared.record.clone());
    done.desired = target;
    done.resizing = None;
    done.revision += 1;
    // If this cannot be stored the larger of both stays in the books, and the next lathed finishes it.
    actor.core.store.apply(Change::Put(Box::new(done.clone()))).await?;
    actor.core.with_books(|books| books.enter(&done.name, done.held()));
    let reasons = shortfalls(&done);
    let outcome = if reasons.is_empty() { ResizeOutcome::Applied } else { ResizeOutcome::Partial };
    let message = format!("{} is resized: {}", done.name, describe(&done.desired));
    actor.core.tell("machine-resized", &done.name, message);
    actor.entry.with(|shared| shared.record = done);
    Ok(view::resize(&actor.entry, outcome, reasons.join("; "), took))
}

/// Puts the old shape back in force; after a failure the old `desired` holds.
async fn roll_back(actor: &mut Actor, record: &Record) {
    if let Err(problem) = enforce(actor, record.desired).await {
        tracing::error!(machine = record.name, %problem, "cannot put the old shape back in force");
    }
    if let Err(problem) = actor.core.store.apply(Change::Put(Box::new(record.clone()))).await {
        // The stored intent would be finished after a restart; until then the books hold the larger of both.
        tracing::error!(machine = record.name, %problem, "cannot store that a resize failed");
        return;
    }
    actor.core.with_books(|books| books.enter(&record.name, record.held()));
    actor.entry.with(|shared| shared.record = record.clone());
}

/// Puts `shape` in force at the host, as far as it can be changed while running.
async fn enforce(actor: &Actor, shape: Desired) -> Result<(), Problem> {
    let Some(live) = actor.live() else { return Ok(()) };
    let record = actor.entry.with(|shared| shared.record.clone());
    if let Some(tree) = &live.launched.tree {
        let vcpus = record.booted.as_ref().map_or(record.vcpus(), |booted| booted.vcpus);
        let quota = launch::limit_cpu(tree, shape.cpu_milli, vcpus)?;
        actor.entry.with(|shared| shared.quota_milli = quota);
    }
    if let (Some(ports), Some(net)) = (&actor.core.ports, &record.net) {
        let port = actor.entry.with(|shared| shared.port);
        let wanted = Some(shape.net_bit_per_sec).filter(|rate| *rate != 0);
        if (port.to_guest, port.from_guest) != (wanted, wanted) {
            let port = ports.limit(&net.tap, shape.net_bit_per_sec).await?;
            actor.entry.with(|shared| shared.port = port);
        }
    }
    Ok(())
}

/// What of the desired shape is not in force until the next start, in words.
fn shortfalls(record: &Record) -> Vec<String> {
    let mut reasons = Vec::new();
    let Some(booted) = record.booted.as_ref().filter(|_| record.life == Life::Running) else {
        return reasons;
    };
    let carried = carried_milli(record.desired.cpu_milli, booted.vcpus);
    if carried < record.desired.cpu_milli {
        reasons.push(format!(
            "its {} vCPUs carry {} cpu; the rest follows at its next start",
            booted.vcpus,
            MilliCpu(carried)
        ));
    }
    if booted.memory_bytes != record.desired.memory_bytes {
        reasons.push(format!("it keeps {} of memory until its next start", Bytes(booted.memory_bytes)));
    }
    reasons
}

fn describe(shape: &Desired) -> String {
    let mut text = format!("{} cpu, {}", MilliCpu(shape.cpu_milli), Bytes(shape.memory_bytes));
    if shape.net_bit_per_sec != 0 {
        text = format!("{text}, {}", BitRate(shape.net_bit_per_sec));
    }
    text
}

/// After adoption: finishes a resize that was under way, and corrects every limit that is another than desired.
pub(super) async fn settle(actor: &mut Actor) {
    let mut record = actor.entry.with(|shared| shared.record.clone());
    if record.booted.is_none() {
        // `Go` was acknowledged, but lathed died before it could write down what it had started.
        record.booted = Some(Booted {
            vcpus: record.vcpus(),
            memory_bytes: record.desired.memory_bytes,
            host_boot_id: actor.core.boot_id.clone(),
            at_unix_sec: unix_sec(),
        });
    }
    if let Some(target) = record.resizing.take() {
        record.desired = target;
        record.revision += 1;
    }
    if let Some(tree) = actor.live().and_then(|live| live.launched.tree.clone())
        && let Err(problem) = launch::limit(&tree, &record)
    {
        tracing::error!(machine = record.name, %problem, "cannot put an adopted machine's limits in force");
    }
    if let Err(problem) = enforce(actor, record.desired).await {
        tracing::error!(machine = record.name, %problem, "cannot put an adopted machine's shape in force");
    }
    if let Err(problem) = actor.core.store.apply(Change::Put(Box::new(record.clone()))).await {
        tracing::error!(machine = record.name, %problem, "cannot store an adopted machine");
    }
    actor.core.with_books(|books| books.enter(&record.name, record.held()));
    actor.entry.with(|shared| shared.record = record);
}
