//! Compares a machine's nics with what its monitor has, and finishes or takes back what differs: after a restart of lathed, whenever a
//! device has gone, and at the machine's end.

use lathe_vmm::control::wire::Command;

use super::super::actor::Actor;
use super::super::disks::{monitor_of, record_of};
use super::super::life::Life;
use super::super::record::{FIRST_NIC, Net, Plug, Record};
use super::{Unplugs, attach, catch_up, finish, has, let_go, nics_of, note, plugged_at_start, take_back};

/// What is to be done about one nic of a machine whose monitor lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Todo {
    Attach,
    Limit,
    Accept,
    TakeBack,
    AskAgain,
    Finish,
}

/// Compares what is stored with what the monitor has.
fn decide(plug: Plug, plugged: bool) -> Todo {
    match (plug, plugged) {
        (Plug::Adding, true) => Todo::Accept,
        (Plug::Adding, false) => Todo::TakeBack,
        (Plug::Here, false) => Todo::Attach,
        (Plug::Here, true) => Todo::Limit,
        (Plug::Removing, true) => Todo::AskAgain,
        (Plug::Removing, false) => Todo::Finish,
    }
}

/// Finishes or takes back what differs between the record and the running monitor.
pub(in crate::machines) async fn settle(actor: &mut Actor) {
    let Some(monitor) = monitor_of(actor) else { return };
    let record = record_of(actor);
    let Some(nics) = nics_of(&record.name, &monitor).await else {
        // One of an earlier release has what it was started with.
        actor.entry.with(|shared| shared.nics = plugged_at_start(&actor.core, &shared.record));
        return;
    };
    let there: Vec<&Net> = record.all_nics().filter(|nic| has(&nics, nic).is_some()).collect();
    actor.entry.with(|shared| shared.nics = there.iter().map(|nic| nic.name.clone()).collect());
    for nic in record.all_nics() {
        let status = has(&nics, nic);
        match decide(nic.plug, status.is_some()) {
            // Where machines have no network any more they run without.
            Todo::Attach if actor.core.ports.is_none() => {}
            Todo::Attach => {
                if let Err(problem) = attach(actor, &monitor, nic).await {
                    let message = format!("{} is without its nic {}: {problem}", record.name, nic.name);
                    actor.core.tell("nic-missing", &record.name, message);
                }
            }
            Todo::Limit => limit(actor, &record, nic).await,
            Todo::Accept => accept(actor, nic).await,
            Todo::TakeBack => take_back(actor, &nic.name).await,
            Todo::AskAgain => {
                if let Some(status) = status {
                    let_go(actor, &monitor, &status.device, &nic.name).await;
                }
            }
            Todo::Finish => finish(actor, &nic.name, None).await,
        }
    }
    for stranger in nics.nics.iter().filter(|status| !record.all_nics().any(|nic| nic.mac == status.mac)) {
        tracing::warn!(machine = record.name, device = stranger.device, "a monitor has a nic of no record");
        if let Err(cause) = monitor.tell(Command::Detach { device: stranger.device.clone() }).await {
            tracing::warn!(machine = record.name, %cause, "and cannot be asked to let it go");
        }
    }
    catch_up(actor);
}

/// A rate that an earlier lathed was about to set. That of the first nic is part of the machine's shape, which is looked after elsewhere.
async fn limit(actor: &Actor, record: &Record, nic: &Net) {
    let Some(ports) = actor.core.ports.as_ref().filter(|_| nic.name != FIRST_NIC) else { return };
    let wanted = Some(nic.bit_per_sec).filter(|rate| *rate != 0);
    let limited = match ports.read(&nic.tap).await {
        Ok(port) if (port.to_guest, port.from_guest) == (wanted, wanted) => return,
        Ok(_) => ports.limit(&nic.tap, nic.bit_per_sec).await.map(drop),
        Err(problem) => Err(problem),
    };
    if let Err(problem) = limited {
        let message = format!("the rate of nic {} of {} is not in force: {problem}", nic.name, record.name);
        actor.core.tell("nic-not-limited", &record.name, message);
    }
}

/// A nic that the guest already has when its intent is found is one of the machine. Its tap was limited before.
async fn accept(actor: &Actor, nic: &Net) {
    let mut record = record_of(actor);
    if let Some(nic) = record.nic_mut(&nic.name) {
        nic.plug = Plug::Here;
        record.revision += 1;
        note(actor, record).await;
    }
}

/// Finishes or takes back what is under way of a machine that has no monitor any more.
pub(in crate::machines) async fn down(actor: &mut Actor) {
    let record = record_of(actor);
    if matches!(record.life, Life::Creating | Life::Removing { .. } | Life::Gone) {
        // All of it goes. Whoever waits is told so, because nobody is left to answer.
        actor.unplugs = Unplugs::default();
        return;
    }
    for nic in record.all_nics() {
        match nic.plug {
            Plug::Adding => take_back(actor, &nic.name).await,
            Plug::Removing => finish(actor, &nic.name, None).await,
            Plug::Here => {}
        }
    }
}
