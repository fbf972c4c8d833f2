//! Memory that harvest machines give back while the host is short of it.
//!
//! Harvest takes what is idle. While less is left than half of the host's reserve (or less than all of it, and tasks wait for memory), each
//! harvest machine is made smaller by what its guest says it could do without, the one that has most first, until the reserve would be whole
//! again; [`FOR_SEC`] later it gets it back, as after `lathe resize --for`. So all that a resize is comes with it: it ends by its deadline, the
//! books follow, it is shown and can be undone. A guest that says nothing gives a quarter; what it has too little of then, its balloon's driver
//! takes back before it kills (deflate on OOM).
//!
//! What a guest says is believed to its own disadvantage only: one that says it has nothing idle keeps what it was granted and what the books
//! hold for it, and one that was asked and gives nothing counts for nothing after [`REST`], so that the others are asked.
//!
//! That others stall is not enough: `/proc/pressure/memory` tells of a group that has reached its own limit as well.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lathe_shard::Bytes;
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, timeout};

use super::actor::Ask;
use super::core::{Core, Entry};
use super::shape;
use super::spec::MIN_MEMORY_BYTES;
use crate::api::wire::foresight::AskedBy;
use crate::api::wire::{MachineState, ResizeRequest, Tier};
use crate::host::MemoryNow;

/// How often it is looked: what is short is to be given back within a second.
const INTERVAL: Duration = Duration::from_millis(250);
/// How long a machine does without.
const FOR_SEC: u64 = 300;
/// How long one change may take before it ends as it is.
const DEADLINE_MSEC: u64 = 10_000;
/// For how long a machine that gave is left alone: until its guest has said anew what it does not use.
const REST: Duration = Duration::from_secs(2);
/// How long a monitor may take to say what its guest has.
const MONITOR_TIMEOUT: Duration = Duration::from_millis(100);
/// Share of time in which somebody waits for memory that makes it short before half of the reserve is gone, thousandths.
const STALLED_PERMILLE: u64 = 100;
/// Less than this is not worth a change.
const LEAST: u64 = 16 << 20;
/// Sizes are whole blocks of virtio-mem.
const BLOCK: u64 = 2 << 20;

/// A harvest machine that could give something back.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Lender {
    name: String,
    memory_bytes: u64,
    /// What its guest says that it could do without.
    idle_bytes: Option<u64>,
}

impl Lender {
    /// Three quarters of what is idle: the guest goes on meanwhile.
    fn spare(&self) -> u64 {
        let spare = self.idle_bytes.map_or(self.memory_bytes / 4, |idle| idle / 4 * 3);
        spare.min(self.memory_bytes.saturating_sub(MIN_MEMORY_BYTES)) / BLOCK * BLOCK
    }
}

/// How much is missing until the reserve is whole; 0 while the host is not short.
fn missing(reserve: u64, available: u64, stalled_permille: u64) -> u64 {
    let short = available < reserve / 2 || (available < reserve && stalled_permille >= STALLED_PERMILLE);
    if short { reserve - available } else { 0 }
}

/// Who becomes how small.
fn taken(mut missing: u64, mut lenders: Vec<Lender>) -> Vec<(String, u64)> {
    lenders.sort_by(|one, other| other.spare().cmp(&one.spare()).then_with(|| one.name.cmp(&other.name)));
    let mut taken = Vec::new();
    for lender in lenders {
        let less = lender.spare().min(missing.next_multiple_of(BLOCK));
        if less < LEAST || missing == 0 {
            break;
        }
        missing = missing.saturating_sub(less);
        taken.push((lender.name, lender.memory_bytes - less));
    }
    taken
}

/// What one machine has to do with it.
enum Part {
    /// It could give something back.
    Could(Lender),
    /// It is about to give so much back.
    Does(u64),
}

/// What is still to come of one that gave a moment ago (it `rests`: what its guest said before is no longer so), or is being resized for another
/// reason; `None`: it may be asked. Who was asked and has not given by then has nothing to come.
fn to_come(rests: bool, resized: bool, held: u64, desired: u64) -> Option<u64> {
    match (rests, resized) {
        (true, _) => Some(held.saturating_sub(desired)),
        (false, true) => Some(0),
        (false, false) => None,
    }
}

/// Only a machine of tier harvest that runs has a part in it.
async fn part(entry: &Entry, rests: bool) -> Option<Part> {
    let (record, monitor, memory) = entry.with(|shared| {
        let memory = shared.force.as_ref().and_then(|force| force.memory);
        (shared.record.clone(), shared.monitor.clone(), memory)
    });
    if record.desired.tier != Tier::Harvest || record.life.state() != MachineState::Running {
        return None;
    }
    let held = memory.as_ref().map_or(0, shape::held_bytes);
    if let Some(bytes) = to_come(rests, record.operation.is_some(), held, record.desired.memory_bytes) {
        return Some(Part::Does(bytes));
    }
    // Asking also makes the guest say it anew, for the next look.
    let status = timeout(MONITOR_TIMEOUT, monitor?.status()).await.ok()?.ok()?;
    let idle_bytes = status.memory.and_then(|memory| memory.guest).map(|guest| guest.available_bytes);
    Some(Part::Could(Lender { name: record.name, memory_bytes: record.desired.memory_bytes, idle_bytes }))
}

/// Looks until lathed ends.
pub(super) async fn run(core: Arc<Core>) {
    let mut beat = tokio::time::interval(INTERVAL);
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut before: Option<MemoryNow> = None;
    let mut gave: BTreeMap<String, Instant> = BTreeMap::new();
    loop {
        beat.tick().await;
        let harvest = |entry: &Arc<Entry>| entry.with(|shared| shared.record.desired.tier == Tier::Harvest);
        let entries: Vec<_> = core.entries().into_iter().filter(harvest).collect();
        // Who cannot be read is told of by whoever shows it, once a second.
        let now = if entries.is_empty() { None } else { core.probe.memory().ok() };
        let reserve = core.config.reserve.memory_bytes;
        gave.retain(|_, at| at.elapsed() < REST);
        // From here on guests are asked, so that what they say is new when it is needed.
        if let Some(now) = now.filter(|now| now.available_bytes < reserve) {
            let stalled = before.map_or(0, |before| now.stalled_permille_since(&before));
            let (mut lenders, mut coming) = (Vec::new(), 0_u64);
            // Beside each other: one monitor that stands still delays no other machine.
            let mut asked = JoinSet::new();
            for entry in entries {
                let rests = gave.contains_key(&entry.name);
                asked.spawn(async move { part(&entry, rests).await });
            }
            while let Some(answer) = asked.join_next().await {
                match answer {
                    Ok(Some(Part::Could(lender))) => lenders.push(lender),
                    Ok(Some(Part::Does(bytes))) => coming = coming.saturating_add(bytes),
                    Ok(None) => {}
                    Err(cause) => tracing::error!(%cause, "cannot ask what a machine could give back"),
                }
            }
            let missing = missing(reserve, now.available_bytes, stalled).saturating_sub(coming);
            for (name, memory_bytes) in taken(missing, lenders) {
                take(&core, &name, memory_bytes, now.available_bytes).await;
                gave.insert(name, Instant::now());
            }
        }
        before = now;
    }
}

async fn take(core: &Core, name: &str, memory_bytes: u64, available: u64) {
    let Ok(entry) = core.entry(name) else { return };
    let request = ResizeRequest {
        memory_bytes: Some(memory_bytes),
        for_sec: Some(FOR_SEC),
        deadline_msec: Some(DEADLINE_MSEC),
        wait_msec: Some(0),
        ..ResizeRequest::default()
    };
    let (reply, result) = oneshot::channel();
    if entry.asks.send(Ask::Resize(AskedBy::Lathed, request, None, reply)).await.is_err() {
        return;
    }
    match result.await {
        Ok(Ok(_)) => tracing::warn!(
            machine = name,
            memory_bytes,
            available_bytes = available,
            "{name} has {} for {FOR_SEC} s: the host has only {} left, and harvest gives way",
            Bytes(memory_bytes),
            Bytes(available)
        ),
        Ok(Err(problem)) => tracing::warn!(machine = name, %problem, "{name} cannot give memory back now"),
        Err(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn of(name: &str, memory: u64, idle: Option<u64>) -> Lender {
        Lender { name: name.to_owned(), memory_bytes: memory * MIB, idle_bytes: idle.map(|idle| idle * MIB) }
    }

    #[test]
    fn a_host_is_short_when_half_of_its_reserve_is_gone_or_all_is_used_and_somebody_waits() {
        assert_eq!(missing(512, 600, 1000), 0, "a group at its own limit is no shortage of the host's");
        assert_eq!(missing(512, 500, 99), 0);
        assert_eq!(missing(512, 500, 100), 12);
        assert_eq!(missing(512, 255, 0), 257);
        assert_eq!(missing(0, 0, 1000), 0);
    }

    #[test]
    fn who_was_asked_and_gives_nothing_keeps_nobody_else_from_being_asked() {
        assert_eq!(to_come(false, false, 900, 900), None, "it may be asked");
        assert_eq!(to_come(true, true, 900, 300), Some(600), "it is about to give");
        assert_eq!(to_come(false, true, 900, 300), Some(0), "it has had its time");
        assert_eq!(to_come(true, false, 300, 900), Some(0));
    }

    #[test]
    fn who_has_most_idle_gives_first_and_no_more_than_is_missing() {
        let lenders = vec![of("small", 256, Some(100)), of("large", 1024, Some(800)), of("deaf", 400, None)];
        assert_eq!(taken(0, lenders.clone()), []);
        assert_eq!(taken(100 * MIB, lenders.clone()), [("large".to_owned(), 924 * MIB)]);
        let all = taken(4096 * MIB, lenders);
        assert_eq!(
            all,
            [
                ("large".to_owned(), 424 * MIB),
                ("deaf".to_owned(), 300 * MIB),
                ("small".to_owned(), (256 - 74) * MIB)
            ]
        );
    }

    #[test]
    fn a_guest_keeps_what_a_machine_must_have_and_small_change_is_left() {
        assert_eq!(of("x", 70, Some(u64::MAX / MIB)).spare(), 6 * MIB);
        assert_eq!(taken(4096 * MIB, vec![of("x", 70, Some(70))]), []);
        assert_eq!(taken(4096 * MIB, vec![of("x", 256, Some(20))]), [], "15 MiB are not worth it");
        assert_eq!(taken(1, vec![of("x", 256, Some(200))]), [], "nor is a byte");
    }
}
