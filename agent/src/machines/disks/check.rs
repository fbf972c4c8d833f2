//! What a change of a machine's disks leads to, and whether that can be: nothing is made or told here.

use std::collections::BTreeSet;
use std::time::Duration;

use lathe_shard::Bytes;

use super::super::core::Core;
use super::super::life::Life;
use super::super::record::{Disk, Drive, Link, Record};
use super::super::{files, iomax, spec, view};
use super::{DiskChange, RELEASE_SEC};
use crate::api::wire::{DiskAddRequest, DiskSource, DiskState, DiskView, MachineState, PlanStep, SCHEMA};
use crate::problem::{Kind, Problem};

/// Least size of a disk that begins empty.
const MIN_BYTES: u64 = 1 << 20;
/// Longest name of a disk: what fits into the serial of a virtio disk.
const MAX_NAME_BYTES: usize = 20;
/// Longest time that it may be given, seconds.
const MAX_RELEASE_SEC: u32 = 3600;

/// The record after a change, and the step that leads there.
pub(super) fn planned(
    core: &Core,
    record: &Record,
    change: &DiskChange,
) -> Result<(Record, Option<PlanStep>), Problem> {
    check_settled(record)?;
    let on = record.life.has_monitor();
    let mut after = record.clone();
    let (from, to, how) = match change {
        DiskChange::Add(request) => {
            let drive = new_drive(core, record, request)?;
            let bytes = bytes_of(core, record, &drive).unwrap_or(0);
            let how = match on {
                true => format!("{} plugged in at once, {}", drive.name, in_guest(&drive.name)),
                false => format!("{} at its next start, {}", drive.name, in_guest(&drive.name)),
            };
            after.insert_drive(drive);
            (0, bytes, how)
        }
        DiskChange::Grow { disk, size_bytes } => {
            let growth = check_growth(core, record, disk, *size_bytes)?;
            if growth.from == growth.to {
                return Ok((after, None));
            }
            if let Some(drive) = after.drive_mut(disk) {
                drive.disk.set_private_bytes(growth.to);
            }
            let told = if on { ", the guest is told at once" } else { "" };
            (growth.from, growth.to, format!("{disk}: its file grows{told}"))
        }
        DiskChange::Remove { disk, purge, timeout_sec } => {
            let drive = check_removal(record, disk)?.clone();
            let seconds = release_time(*timeout_sec)?.as_secs();
            let asked = if on {
                format!("the guest is asked to let it go within {seconds} s, ")
            } else {
                String::new()
            };
            let data = match (&drive.disk, purge) {
                (Disk::Path { .. }, _) => "it stays where it is",
                (_, true) => "its data is deleted",
                (_, false) => "its data is kept",
            };
            after.source.disks.retain(|drive| drive.name != *disk);
            (bytes_of(core, record, &drive).unwrap_or(0), 0, format!("{disk}: {asked}{data}"))
        }
    };
    Ok((after, Some(PlanStep { resource: "disk".to_owned(), from, to, how })))
}

/// Where a guest finds a disk.
fn in_guest(name: &str) -> String {
    format!("/dev/disk/by-id/virtio-{name} in the guest")
}

/// Bytes of a disk; `None` when its file cannot be looked at.
pub(super) fn bytes_of(core: &Core, record: &Record, drive: &Drive) -> Option<u64> {
    let in_place = || files::size_of(&files::disk_path(&core.config, &record.name, drive)).ok();
    drive.disk.private_bytes().or_else(in_place)
}

pub(super) fn view_of(core: &Core, record: &Record, drive: &Drive, plugged: &BTreeSet<String>) -> DiskView {
    let source = match &drive.disk {
        Disk::Empty { .. } => "empty".to_owned(),
        Disk::Image { image, .. } => format!("image {image}"),
        Disk::Upload { .. } => "upload".to_owned(),
        Disk::Path { .. } => "in place".to_owned(),
    };
    let state = match drive.link {
        Link::Adding => DiskState::Adding,
        Link::Removing { .. } => DiskState::Removing,
        Link::Here if plugged.contains(&drive.name) => DiskState::Attached,
        Link::Here => DiskState::Detached,
    };
    let path = files::disk_path(&core.config, &record.name, drive);
    DiskView {
        schema: SCHEMA,
        machine: record.name.clone(),
        name: drive.name.clone(),
        size_bytes: bytes_of(core, record, drive),
        read_only: drive.is_read_only(),
        boots: record.boots_from(&drive.name),
        state,
        source,
        wall: iomax::word(record.desired.iops, &path),
        path: path.to_string_lossy().into_owned(),
    }
}

/// The disks that a monitor has which was started from `record`.
pub(in crate::machines) fn plugged_at_start(record: &Record) -> BTreeSet<String> {
    let given = record.source.disks.iter().filter(|drive| drive.link != Link::Adding);
    given.map(|drive| drive.name.clone()).collect()
}

fn bad(code: &'static str, message: impl Into<String>) -> Problem {
    Problem::new(Kind::BadRequest, code, message)
}

pub(in crate::machines) fn check_settled(record: &Record) -> Result<(), Problem> {
    if record.life.is_settled() && record.life != Life::Gone {
        return Ok(());
    }
    let message = format!("{} is {} at the moment", record.name, record.life.word());
    Err(Problem::new(Kind::Conflict, "machine-busy", message).fix("try again in a moment"))
}

/// The machine's disk of this name, if it neither comes nor goes.
pub(super) fn check_here<'a>(record: &'a Record, name: &str) -> Result<&'a Drive, Problem> {
    let machine = &record.name;
    let drive = record.drive(name).ok_or_else(|| {
        let shown = view::printable(name);
        Problem::new(Kind::NotFound, "no-such-disk", format!("{machine} has no disk {shown:?}"))
            .fix(format!("lathe disk list {machine}"))
    })?;
    let busy = match drive.link {
        Link::Here => return Ok(drive),
        Link::Adding => "is still being made",
        Link::Removing { .. } => "is being removed",
    };
    Err(Problem::new(Kind::Conflict, "disk-busy", format!("disk {name} of {machine} {busy}"))
        .fix(format!("lathe disk list {machine}")))
}

fn check_name(record: &Record, name: &str) -> Result<(), Problem> {
    let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    let fine = (1..=MAX_NAME_BYTES).contains(&name.len())
        && name.bytes().all(allowed)
        && name.starts_with(|first: char| first.is_ascii_lowercase())
        && !name.ends_with('-');
    if !fine {
        return Err(bad("bad-name", format!("{:?} cannot be a disk's name", view::printable(name)))
            .detail("1 to 20 of a-z, 0-9 and -, beginning with a letter, not ending with -"));
    }
    if record.drive(name).is_some() {
        let machine = &record.name;
        return Err(Problem::new(
            Kind::Conflict,
            "disk-name-taken",
            format!("{machine} already has a disk {name}"),
        )
        .fix(format!("lathe disk list {machine}        or leave --id out")));
    }
    Ok(())
}

/// What a request for one more disk leads to; nothing is made yet.
pub(super) fn new_drive(core: &Core, record: &Record, request: &DiskAddRequest) -> Result<Drive, Problem> {
    if record.source.disks.len() >= spec::MAX_DISKS {
        let message = format!("{} has {} disks, and no machine has more", record.name, spec::MAX_DISKS);
        return Err(Problem::new(Kind::Impossible, "no-disk-slot", message)
            .fix(format!("lathe disk remove {} NAME", record.name)));
    }
    let name = match &request.name {
        Some(name) => name.clone(),
        // There are fewer disks than numbers.
        None => {
            (1..).map(|n| format!("data{n}")).find(|name| record.drive(name).is_none()).unwrap_or_default()
        }
    };
    check_name(record, &name)?;
    let disk = new_disk(core, request)?;
    if let Disk::Path { path, .. } = &disk {
        check_unused(core, record, path)?;
    }
    Ok(Drive { disk, name, read_only: request.read_only, link: Link::Adding })
}

fn new_disk(core: &Core, request: &DiskAddRequest) -> Result<Disk, Problem> {
    let config = &core.config;
    match (&request.source, &request.image, request.size_bytes) {
        (Some(_), Some(_), _) => {
            Err(bad("bad-request", "a disk comes from an image or from a file, not from both"))
        }
        (Some(DiskSource::Path { .. }), _, Some(_)) => {
            Err(bad("bad-request", "a disk that is used in place has its size already"))
        }
        (Some(DiskSource::Path { path, read_only }), None, None) => {
            let path = spec::allowed_path(config, path.as_ref())?.to_string_lossy().into_owned();
            Ok(Disk::Path { path, read_only: *read_only || request.read_only })
        }
        (Some(DiskSource::Upload { id }), None, size) => {
            let has = spec::whole_sectors(spec::upload(config, id)?.1)?;
            let size_bytes = spec::whole_sectors(size.unwrap_or(has))?;
            match size_bytes {
                0 => Err(bad("bad-amount", "the file is empty").fix("--size 10G makes an empty disk")),
                _ if size_bytes < has => Err(bad(
                    "bad-amount",
                    format!("the file has {}, a disk of {} is too small", Bytes(has), Bytes(size_bytes)),
                )),
                _ => Ok(Disk::Upload { upload: id.clone(), size_bytes }),
            }
        }
        (None, Some(image), size) => spec::image_disk(config, image, size),
        (None, None, None) => Err(bad("bad-request", "how large, or made from what?")
            .fix("--size 10G, --file FILE or --image IMAGE")),
        (None, None, Some(_)) if request.read_only => {
            Err(bad("bad-request", "an empty disk that cannot be written to is of no use"))
        }
        (None, None, Some(size)) if size < MIN_BYTES => {
            let message = format!("a disk of {} is too small: at least {}", Bytes(size), Bytes(MIN_BYTES));
            Err(bad("bad-amount", message))
        }
        (None, None, Some(size)) => Ok(Disk::Empty { size_bytes: spec::whole_sectors(size)? }),
    }
}

/// A disk in place belongs to one machine at a time, and to that once.
fn check_unused(core: &Core, record: &Record, path: &str) -> Result<(), Problem> {
    let in_use = |owner: &str| {
        Problem::new(Kind::Conflict, "disk-in-use", format!("{path} is in use by machine {owner}"))
    };
    let wanted = spec::disk_identity(path.as_ref());
    let twice = record.source.disks.iter().any(|drive| match &drive.disk {
        Disk::Path { path, .. } => spec::disk_identity(path.as_ref()) == wanted,
        _ => false,
    });
    if twice {
        let name = &record.name;
        return Err(in_use(name).detail("it is a disk of it already").fix(format!("lathe disk list {name}")));
    }
    match core.user_of_disk(path.as_ref(), &record.name).filter(|_| record.life.has_monitor()) {
        Some(owner) => Err(in_use(&owner).fix(format!("lathe stop {owner}"))),
        None => Ok(()),
    }
}

/// The disk to be removed.
pub(super) fn check_removal<'a>(record: &'a Record, name: &str) -> Result<&'a Drive, Problem> {
    let drive = check_here(record, name)?;
    let machine = &record.name;
    if record.life.has_monitor() && record.boots_from(name) {
        let message = format!("{machine} runs from its disk {name}");
        return Err(Problem::new(Kind::Conflict, "disk-boots", message)
            .fix(format!("lathe stop {machine}        then: lathe disk remove {machine} {name}")));
    }
    if record.life.state() == MachineState::Paused {
        let message = format!("{machine} is paused: it cannot let its disk {name} go");
        return Err(
            Problem::new(Kind::Conflict, "machine-paused", message).fix(format!("lathe resume {machine}"))
        );
    }
    Ok(drive)
}

pub(in crate::machines) fn release_time(timeout_sec: Option<u32>) -> Result<Duration, Problem> {
    let seconds = timeout_sec.unwrap_or(RELEASE_SEC);
    if !(1..=MAX_RELEASE_SEC).contains(&seconds) {
        let message = format!("timeout_sec: {seconds} s is not between 1 and {MAX_RELEASE_SEC}");
        return Err(bad("bad-amount", message));
    }
    Ok(Duration::from_secs(u64::from(seconds)))
}

/// Bytes before and after.
pub(super) struct Growth {
    pub from: u64,
    pub to: u64,
}

pub(super) fn check_growth(
    core: &Core,
    record: &Record,
    name: &str,
    size_bytes: u64,
) -> Result<Growth, Problem> {
    let drive = check_here(record, name)?;
    let machine = &record.name;
    let path = files::disk_path(&core.config, machine, drive);
    let from = drive.disk.private_bytes().map_or_else(|| files::size_of(&path), Ok)?;
    let to = spec::whole_sectors(size_bytes)?;
    let is_device =
        matches!(drive.disk, Disk::Path { .. }) && !path.metadata().is_ok_and(|metadata| metadata.is_file());
    if is_device && to <= from {
        // Whoever enlarged it wants the guest to know.
        return Ok(Growth { from, to: from });
    }
    if to < from {
        let message =
            format!("disk {name} of {machine} has {}, and cannot shrink to {}", Bytes(from), Bytes(to));
        return Err(Problem::new(Kind::Impossible, "disk-cannot-shrink", message)
            .detail("the guest's file system may be anywhere on it")
            .fix(format!("add a smaller one and copy: lathe disk add {machine} --size {to}")));
    }
    if let (Disk::Path { .. }, true) = (&drive.disk, to > from) {
        let message = format!("disk {name} of {machine} is {}, which lathed cannot enlarge", path.display());
        if is_device {
            return Err(Problem::new(Kind::Impossible, "disk-not-ours", message)
                .detail(format!("a block device of {}", Bytes(from)))
                .fix(format!("enlarge it (lvextend, …), then: lathe disk grow {machine} {name} {to}")));
        }
        if drive.is_read_only() {
            return Err(Problem::new(Kind::Impossible, "disk-read-only", message)
                .detail("it was given to the machine to be read only"));
        }
    }
    Ok(Growth { from, to })
}
