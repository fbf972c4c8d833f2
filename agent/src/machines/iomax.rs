//! `io.max` behind the limit of a machine's disks: what holds when the monitor, which limits exactly, is not what it should be.
//!
//! A wall stands at twice the limit and [`ROOM`] more, for reads and for writes, on every device that holds one of the machine's disks: a file
//! system adds operations of its own, a large request becomes several, and a wall that acts before the exact limiter would spoil it. A file
//! system that lies on no block device of its own (tmpfs, overlayfs, btrfs, ZFS, NFS) has none, which is said.
//!
//! A wall is raised before the limit ([`make_room`]) and lowered after it: [`keep`] looks once a second, and corrects what somebody else has
//! written.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use lathe_cgroup::{Device, Error, IoLimits, IoPatch, MachineTree, Patch};

use super::core::{Core, Entry as Machine};
use super::files::disk_path;

/// What a file system may add whatever the limit, operations a second.
const ROOM: u64 = 64;
/// Where the kernel lists block devices by their numbers (sysfs-dev in the kernel's ABI documents).
const DEVICES: &str = "/sys/dev/block";

/// The wall behind a limit of `iops`; 0 is none.
fn wall_of(iops: u64) -> Option<u64> {
    (iops > 0).then(|| iops.saturating_mul(2).saturating_add(ROOM).min(u64::from(u32::MAX)))
}

/// The whole disk that `path` lies on, or is; `None` where there is none, or none that may be looked at.
pub(super) fn device_of(path: &Path) -> Option<Device> {
    let metadata = fs::metadata(path).ok()?;
    let number = if metadata.file_type().is_block_device() { metadata.rdev() } else { metadata.dev() };
    whole_disk(Path::new(DEVICES), nix::sys::stat::major(number), nix::sys::stat::minor(number))
}

fn whole_disk(devices: &Path, major: u64, minor: u64) -> Option<Device> {
    let here = devices.join(format!("{major}:{minor}"));
    let numbers = if here.join("partition").exists() {
        // A partition's folder lies in its disk's.
        fs::read_to_string(fs::canonicalize(&here).ok()?.parent()?.join("dev")).ok()?
    } else if here.exists() {
        format!("{major}:{minor}")
    } else {
        return None;
    };
    let (major, minor) = numbers.trim().split_once(':')?;
    Some(Device { major: major.parse().ok()?, minor: minor.parse().ok()? })
}

/// The devices that have a wall, by the cgroup of the machine's unit.
#[derive(Default)]
pub(super) struct IoWalls(Mutex<BTreeMap<PathBuf, BTreeSet<Device>>>);

impl IoWalls {
    fn known(&self) -> MutexGuard<'_, BTreeMap<PathBuf, BTreeSet<Device>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a wall on `devices` and none on others that had one; on the first look at a machine that may be any of `all`.
    fn enforce(
        &self,
        tree: &MachineTree,
        wall: Option<u64>,
        all: impl FnOnce() -> BTreeSet<Device>,
    ) -> Result<(), Error> {
        let mut known = self.known();
        if wall.is_none() && known.get(tree.unit()).is_some_and(BTreeSet::is_empty) {
            return Ok(());
        }
        let all = all();
        let walled = match known.entry(tree.unit().to_path_buf()) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => {
                let mut found = BTreeSet::new();
                for &device in &all {
                    if tree.io(device)? != IoLimits::default() {
                        found.insert(device);
                    }
                }
                new.insert(found)
            }
        };
        let devices = if wall.is_some() { all } else { BTreeSet::new() };
        for gone in walled.difference(&devices).copied().collect::<Vec<_>>() {
            tree.set_io(gone, &patch(None))?;
            walled.remove(&gone);
        }
        for device in devices {
            tree.set_io(device, &patch(wall))?;
            walled.insert(device);
        }
        Ok(())
    }

    fn tidy(&self) {
        self.known().retain(|unit, _| unit.exists());
    }
}

fn patch(wall: Option<u64>) -> IoPatch {
    let operations = wall.map_or(Patch::Unlimited, Patch::Set);
    IoPatch { reads: operations, writes: operations, ..IoPatch::default() }
}

/// The wall behind the limit that is in force, or behind one that is to come where that is higher.
fn set(core: &Core, entry: &Machine, to_come: Option<u64>) -> Result<(), Error> {
    let (tree, record, iops) = entry.with(|shared| {
        let tree = shared.launched.as_ref().and_then(|launched| launched.tree.clone());
        let iops = shared.force.as_ref().and_then(|force| force.iops);
        (tree, shared.record.clone(), iops)
    });
    // Not before it is known what its monitor has.
    let (Some(tree), Some(iops)) = (tree, iops) else { return Ok(()) };
    // None is the highest.
    let most = to_come.into_iter().chain([iops]).max_by_key(|iops| iops.wrapping_sub(1)).unwrap_or(iops);
    let devices = || {
        let paths = record.source.disks.iter().map(|drive| disk_path(&core.config, &record.name, drive));
        paths.filter_map(|path| device_of(&path)).collect()
    };
    core.io_walls.enforce(&tree, wall_of(most), devices)
}

/// Before the limit of a machine's disks becomes `iops`.
pub(super) fn make_room(core: &Core, entry: &Machine, iops: u64) {
    // The exact limiter decides either way, and the next look tells of what is wrong.
    if let Err(cause) = set(core, entry, Some(iops)) {
        tracing::debug!(machine = entry.name, %cause, "cannot raise io.max yet");
    }
}

/// Puts every wall where it belongs. Answers whether it could, in words where it could not.
pub(super) fn keep(core: &Core) -> Result<(), String> {
    core.io_walls.tidy();
    let mut failures = Vec::new();
    for entry in core.entries() {
        match set(core, &entry, None) {
            // A kernel without such walls is none that fails.
            Ok(()) | Err(Error::Lacks { .. }) => {}
            Err(cause) => {
                let tree =
                    entry.with(|shared| shared.launched.as_ref().and_then(|launched| launched.tree.clone()));
                // A machine may have ended since: then its cgroup has gone.
                if tree.is_some_and(|tree| tree.unit().exists()) {
                    failures.push(format!("{}: {cause}", entry.name));
                }
            }
        }
    }
    if failures.is_empty() { Ok(()) } else { Err(failures.join("; ")) }
}

/// What stands behind the limit of a disk at `path`: nothing is said where there is no limit.
pub(super) fn word(iops: u64, path: &Path) -> String {
    match (wall_of(iops), device_of(path)) {
        (None, _) => String::new(),
        (Some(_), None) => "none".to_owned(),
        (Some(wall), Some(device)) => format!("{wall} iops at {device}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partition_has_the_wall_of_its_disk() {
        let folder = tempfile::tempdir().unwrap();
        let (devices, disk) = (folder.path().join("dev"), folder.path().join("block/vda"));
        fs::create_dir_all(&devices).unwrap();
        fs::create_dir_all(disk.join("vda1")).unwrap();
        fs::write(disk.join("dev"), "254:0\n").unwrap();
        fs::write(disk.join("vda1/dev"), "254:1\n").unwrap();
        fs::write(disk.join("vda1/partition"), "1\n").unwrap();
        std::os::unix::fs::symlink(&disk, devices.join("254:0")).unwrap();
        std::os::unix::fs::symlink(disk.join("vda1"), devices.join("254:1")).unwrap();
        let whole = Some(Device { major: 254, minor: 0 });
        assert_eq!(whole_disk(&devices, 254, 0), whole);
        assert_eq!(whole_disk(&devices, 254, 1), whole);
        assert_eq!(whole_disk(&devices, 0, 33), None, "a file system of its own");
    }

    #[test]
    fn a_wall_is_well_above_its_limit() {
        assert_eq!([0, 1, 50].map(wall_of), [None, Some(66), Some(164)]);
        assert_eq!(wall_of(u64::MAX), Some(4_294_967_295), "the largest that the kernel takes");
        assert_eq!(word(0, Path::new("/")), "");
        assert_eq!(word(50, Path::new("/proc/self/status")), "none");
    }

    #[test]
    fn walls_follow_disks_and_go_with_the_limit() {
        let folder = tempfile::tempdir().unwrap();
        let unit = folder.path().join("lathe-vm@demo.service");
        for group in ["", "machine", "machine/vcpu", "machine/vmm"] {
            fs::create_dir_all(unit.join(group)).unwrap();
        }
        // A file keeps the last line only, the kernel one of each device.
        let file = unit.join("machine/io.max");
        fs::write(&file, "").unwrap();
        let tree = MachineTree::open(&unit).unwrap();
        let (walls, [one, other]) = (IoWalls::default(), [0, 16].map(|minor| Device { major: 254, minor }));
        let said = || fs::read_to_string(&file).unwrap().trim().to_owned();
        walls.enforce(&tree, None, || BTreeSet::from([one])).unwrap();
        assert_eq!(said(), "", "nothing is taken away where nothing was put");
        walls.enforce(&tree, Some(164), || BTreeSet::from([one])).unwrap();
        assert_eq!(said(), "254:0 rbps=max wbps=max riops=164 wiops=164");
        walls.enforce(&tree, Some(164), || BTreeSet::from([other])).unwrap();
        assert_eq!(said(), "254:16 rbps=max wbps=max riops=164 wiops=164");
        assert_eq!(walls.known()[&unit], BTreeSet::from([other]));
        fs::write(&file, "254:16 rbps=max wbps=max riops=max wiops=7").unwrap();
        walls.enforce(&tree, Some(164), || BTreeSet::from([other])).unwrap();
        assert_eq!(said(), "254:16 rbps=max wbps=max riops=164 wiops=164", "somebody else's is corrected");
        walls.enforce(&tree, None, || BTreeSet::from([other])).unwrap();
        assert!(said().ends_with("riops=max wiops=max"), "{}", said());
        // What an earlier lathed has left is found.
        fs::write(&file, "254:0 rbps=max wbps=max riops=66 wiops=66").unwrap();
        let next = IoWalls::default();
        next.enforce(&tree, None, || BTreeSet::from([one])).unwrap();
        assert!(said().ends_with("riops=max wiops=max"), "{}", said());
        next.enforce(&tree, None, || unreachable!("there is nothing to look after")).unwrap();
        fs::remove_dir_all(&unit).unwrap();
        walls.tidy();
        assert!(walls.known().is_empty());
    }
}
