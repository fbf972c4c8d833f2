//! Compares a machine's disks with what its monitor has, and finishes or takes back what differs: after a restart of lathed, whenever a
//! device has gone, and at the machine's end.

use lathe_vmm::control::wire::Command;

use super::super::actor::Actor;
use super::super::files;
use super::super::life::Life;
use super::super::record::{Link, Record};
use super::check::{bytes_of, plugged_at_start};
use super::{
    Plugs, attach, blocking, disks_of, finish, has, let_go, monitor_of, note, record_of, release_default,
    take_back, tell_size,
};

/// What is to be done about one disk of a machine whose monitor lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Todo {
    Nothing,
    Attach,
    Grow,
    Accept,
    TakeBack,
    AskAgain,
    Finish,
}

/// Compares what is stored with what the monitor has. `making`: its file is being made by this lathed; `bytes`: its file's size.
fn decide(link: Link, making: bool, plugged: Option<u64>, bytes: Option<u64>) -> Todo {
    match (link, plugged) {
        (Link::Adding, _) if making => Todo::Nothing,
        (Link::Adding, Some(_)) => Todo::Accept,
        (Link::Adding, None) => Todo::TakeBack,
        (Link::Here, None) => Todo::Attach,
        (Link::Here, Some(seen)) if bytes.is_some_and(|bytes| bytes > seen) => Todo::Grow,
        (Link::Here, Some(_)) => Todo::Nothing,
        (Link::Removing { .. }, Some(_)) => Todo::AskAgain,
        (Link::Removing { .. }, None) => Todo::Finish,
    }
}

/// Finishes or takes back what differs between the record and the running monitor.
pub(in crate::machines) async fn settle(actor: &mut Actor) {
    let Some(monitor) = monitor_of(actor) else { return };
    let record = record_of(actor);
    let Some(disks) = disks_of(&record.name, &monitor).await else {
        // One of an earlier release has what it was started with.
        actor.entry.with(|shared| shared.plugged = plugged_at_start(&shared.record));
        return;
    };
    let plugged = disks.disks.iter().map(|disk| disk.serial.clone()).collect();
    actor.entry.with(|shared| shared.plugged = plugged);
    enlarge(actor, &record).await;
    for drive in &record.source.disks {
        let there = has(&disks, &drive.name);
        let making = actor.plugs.making.contains_key(&drive.name);
        let bytes = bytes_of(&actor.core, &record, drive);
        match decide(drive.link, making, there.map(|disk| disk.bytes), bytes) {
            Todo::Nothing => {}
            Todo::Attach => {
                if let Err(problem) = attach(actor, &monitor, drive).await {
                    let message = format!("{} is without its disk {}: {problem}", record.name, drive.name);
                    actor.core.tell("disk-missing", &record.name, message);
                }
            }
            Todo::Grow => {
                if let Some(disk) = there
                    && let Err(cause) = tell_size(&monitor, disk).await
                {
                    tracing::warn!(machine = record.name, disk = drive.name, %cause, "a guest does not see a larger disk");
                }
            }
            Todo::Accept => accept(actor, &drive.name).await,
            Todo::TakeBack => take_back(actor, &drive.name).await,
            Todo::AskAgain => {
                if let Some(disk) = there {
                    let_go(actor, &monitor, &disk.device, &drive.name, release_default()).await;
                }
            }
            Todo::Finish => drop(finish(actor, &drive.name).await),
        }
    }
    for stranger in disks.disks.iter().filter(|disk| record.drive(&disk.serial).is_none()) {
        tracing::warn!(machine = record.name, serial = stranger.serial, "a monitor has a disk of no record");
        if let Err(cause) = monitor.tell(Command::Detach { device: stranger.device.clone() }).await {
            tracing::warn!(machine = record.name, %cause, "and cannot be asked to let it go");
        }
    }
}

/// A disk that the guest already has when its intent is found is one of the machine.
async fn accept(actor: &Actor, name: &str) {
    let mut record = record_of(actor);
    if let Some(drive) = record.drive_mut(name) {
        drive.link = Link::Here;
        let drive = drive.clone();
        record.revision += 1;
        note(actor, record).await;
        files::forget_upload(&actor.core.config, &drive);
    }
}

/// Files that an earlier lathed was about to enlarge.
async fn enlarge(actor: &Actor, record: &Record) {
    for drive in record.source.disks.iter().filter(|drive| drive.link == Link::Here) {
        let Some(bytes) = drive.disk.private_bytes() else { continue };
        let path = files::disk_path(&actor.core.config, &record.name, drive);
        if path.metadata().is_ok_and(|metadata| metadata.len() < bytes)
            && let Err(problem) = blocking(move || files::set_size(&path, bytes)).await
        {
            tracing::error!(machine = record.name, disk = drive.name, %problem, "cannot enlarge a disk");
        }
    }
}

/// Finishes or takes back what is under way of a machine that has no monitor any more.
pub(in crate::machines) async fn down(actor: &mut Actor) {
    let record = record_of(actor);
    if matches!(record.life, Life::Creating | Life::Removing { .. } | Life::Gone) {
        // All of it goes. Whoever waits is told so, because nobody is left to answer.
        actor.plugs = Plugs::default();
        return;
    }
    enlarge(actor, &record).await;
    for drive in &record.source.disks {
        let making = actor.plugs.making.contains_key(&drive.name);
        match drive.link {
            Link::Adding if !making => take_back(actor, &drive.name).await,
            Link::Removing { .. } => drop(finish(actor, &drive.name).await),
            _ => {}
        }
    }
}
