//! The tree of one machine below its unit's cgroup: prepared once by a root helper, opened by the agent ever after.
//!
//! The order in [`MachineTree::prepare`] is the only one that the kernel allows (cgroup-v2.rst):
//!
//! 1. Folders first, and `vcpu` and `vmm` made threaded while no controller is on: after "+memory" a cgroup with
//!    threaded children would be refused the controller, and `machine` becomes "domain threaded" by it ("Threads").
//! 2. The main process goes to `machine/vmm`, because a cgroup that has processes itself cannot give domain controllers
//!    to its children ("No Internal Process Constraint").
//! 3. Controllers on in the unit, then cpu and cpuset (threaded ones only) on in `machine`.
//! 4. Ownership: everything from `machine` down to the agent's user, the unit itself **back to root**. systemd gives a
//!    delegated cgroup to the unit's own user at each exec; left like that, a monitor taken over by its guest could
//!    raise its own limits. Of the unit's files the agent gets the four of [`crate::standing`]. It owns `machine/cgroup.procs`, the common ancestor of `vcpu` and `vmm`, which is what
//!    the kernel asks of who moves threads between them ("Delegation Containment").
//!
//! systemd 252 has its control processes in `.control` beside `machine`; the helper that calls this runs in it. A
//! sibling with processes disturbs nothing.

use std::fs;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::cpu::{self, CpuDivision, CpuLimits, CpuPatch, GroupPatch};
use crate::cpuset::{self, CpuList, Cpuset, CpusetPatch};
use crate::error::{Error, check_for};
use crate::file;
use crate::freezer;
use crate::io::{self, Device, IoLimits, IoPatch};
use crate::memory::{self, MemoryLimits, MemoryPatch};
use crate::pids;
use crate::pressure::{self, Resource, Stall, Trigger};
use crate::standing::{self, Reach, SLICE_FILES, Standing, UNIT_FILES};
use crate::units::{Bytes, MilliCpu, Patch};
use crate::usage::{self, Usage};

const MACHINE: &str = "machine";
const VCPU: &str = "machine/vcpu";
const VMM: &str = "machine/vmm";
/// Where systemd keeps control processes of a unit with delegation.
const CONTROL: &str = ".control";

/// On in the unit's cgroup for `machine`.
const DOMAIN_CONTROLLERS: [&str; 4] = ["cpu", "memory", "io", "pids"];
/// On in `machine` for its threaded children.
const THREADED_CONTROLLERS: [&str; 1] = ["cpu"];
/// On in both where the delegation has it.
const OPTIONAL_CONTROLLER: &str = "cpuset";
/// A cgroup has about 80 files; more than this is not a cgroup.
const FILES_MAX: usize = 512;

/// Who owns the tree: the agent's user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

const ROOT: Owner = Owner { uid: 0, gid: 0 };

/// How a removal ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removal {
    /// The whole tree is gone.
    Removed,
    /// There was none.
    AlreadyGone,
    /// `vcpu` and `vmm` are gone; `machine` lies in a folder that is not ours: systemd removes it with the unit.
    LeftToSystemd,
}

/// The cgroups of one machine. Holds paths only: the kernel has the state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineTree {
    unit: PathBuf,
    machine: PathBuf,
    vcpu: PathBuf,
    vmm: PathBuf,
}

impl MachineTree {
    fn at(unit: &Path) -> Result<MachineTree, Error> {
        if !unit.is_absolute() || unit.to_str().is_none() {
            return Err(Error::Path { path: unit.into() });
        }
        Ok(MachineTree {
            unit: unit.into(),
            machine: unit.join(MACHINE),
            vcpu: unit.join(VCPU),
            vmm: unit.join(VMM),
        })
    }

    /// Makes the tree, moves the process `main_pid` into `vmm`, and gives it to `owner`. Needs root. Memory that the
    /// process has touched before stays charged to the unit, so guest memory is to be touched afterwards. Repeating it is
    /// harmless: a main process that is in the tree already is not moved, so placed vCPU threads stay where they are.
    ///
    /// # Errors
    /// [`Error::Controllers`] where the delegation lacks one; [`Error::Folder`] and [`Error::Write`] with what the kernel said.
    pub fn prepare(unit: &Path, main_pid: u32, owner: Owner) -> Result<MachineTree, Error> {
        let tree = MachineTree::at(unit)?;
        tree.require_controllers()?;
        for path in [&tree.machine, &tree.vcpu, &tree.vmm] {
            make_folder(path)?;
        }
        for path in [&tree.vcpu, &tree.vmm] {
            make_threaded(path)?;
        }
        if !tree.processes()?.contains(&main_pid) {
            // The kernel moves all threads of the process.
            file::write(&tree.vmm.join("cgroup.procs"), &main_pid.to_string())?;
        }
        enable(&tree.unit, &DOMAIN_CONTROLLERS)?;
        enable(&tree.machine, &THREADED_CONTROLLERS)?;
        for path in [&tree.machine, &tree.vcpu, &tree.vmm] {
            give(path, owner)?;
        }
        take_back(&tree.unit)?;
        let control = tree.unit.join(CONTROL);
        if control.is_dir() {
            take_back(&control)?;
        }
        give_files(&tree.unit, &UNIT_FILES, owner)?;
        Ok(tree)
    }

    /// Gives `owner` what it takes to protect the memory of all machines of a slice: two files of the slice's cgroup, nothing else. Needs
    /// root. systemd removes an empty slice's cgroup and makes another later, so it is for every start of a machine. Repeating it is harmless.
    ///
    /// # Errors
    /// [`Error::Folder`] with what the kernel said.
    pub fn prepare_slice(slice: &Path, owner: Owner) -> Result<(), Error> {
        give_files(slice, &SLICE_FILES, owner)
    }

    /// The tree that [`MachineTree::prepare`] made, also after a restart of the agent.
    ///
    /// # Errors
    /// [`Error::NoTree`] if it is not there.
    pub fn open(unit: &Path) -> Result<MachineTree, Error> {
        let tree = MachineTree::at(unit)?;
        if [&tree.machine, &tree.vcpu, &tree.vmm].iter().all(|path| path.is_dir()) {
            Ok(tree)
        } else {
            Err(Error::NoTree { unit: tree.unit })
        }
    }

    /// The unit's cgroup, systemd's.
    pub fn unit(&self) -> &Path {
        &self.unit
    }

    /// The whole machine: memory, io, pids, and the wall of its CPU.
    pub fn machine(&self) -> &Path {
        &self.machine
    }

    /// The vCPU threads.
    pub fn vcpu(&self) -> &Path {
        &self.vcpu
    }

    /// All other threads of the monitor.
    pub fn vmm(&self) -> &Path {
        &self.vmm
    }

    /// Moves one thread of the monitor under the vCPU limit.
    ///
    /// # Errors
    /// [`Error::Write`]; the thread has ended, or is not of this machine.
    pub fn place_vcpu(&self, tid: u32) -> Result<(), Error> {
        file::write(&self.vcpu.join("cgroup.threads"), &tid.to_string())
    }

    /// Moves one thread of the monitor under the limit of its other threads.
    ///
    /// # Errors
    /// As [`MachineTree::place_vcpu`].
    pub fn place_vmm(&self, tid: u32) -> Result<(), Error> {
        file::write(&self.vmm.join("cgroup.threads"), &tid.to_string())
    }

    /// Thread ids under the vCPU limit.
    ///
    /// # Errors
    /// [`Error::Read`], [`Error::Content`].
    pub fn vcpu_threads(&self) -> Result<Vec<u32>, Error> {
        file::read_ids(&self.vcpu.join("cgroup.threads"))
    }

    /// Process ids of the machine: its monitor, and nothing else.
    ///
    /// # Errors
    /// [`Error::Read`], [`Error::Content`].
    pub fn processes(&self) -> Result<Vec<u32>, Error> {
        file::read_ids(&self.machine.join("cgroup.procs"))
    }

    /// Changes CPU limits and returns what the kernel shows afterwards. Refused before anything is written if any
    /// field is out of range.
    ///
    /// # Errors
    /// [`Error::CpuTooSmall`], [`Error::OutOfRange`], [`Error::Write`], [`Error::ReadBack`], [`Error::Lacks`].
    pub fn set_cpu(&self, patch: &CpuPatch) -> Result<CpuLimits, Error> {
        let [machine, vcpu, vmm] = patch.groups();
        for part in [&machine, &vcpu, &vmm] {
            part.check()?;
        }
        Ok(CpuLimits {
            machine: cpu::set_group(&self.unit, MACHINE, &machine)?,
            vcpu: cpu::set_group(&self.unit, VCPU, &vcpu)?,
            vmm: cpu::set_group(&self.unit, VMM, &vmm)?,
        })
    }

    /// Limits all threads of the machine together, and nothing else; a limit that is in force already is not written, because each write refills
    /// the quota. Its burst stays the same part of it. Returns what is in force.
    ///
    /// # Errors
    /// As [`MachineTree::set_cpu`].
    pub fn set_wall(&self, share: MilliCpu) -> Result<Option<MilliCpu>, Error> {
        let patch = GroupPatch { max: Patch::Set(share), ..GroupPatch::default() };
        patch.check()?;
        cpu::set_max(&self.unit, MACHINE, &patch)
    }

    /// How the monitor's other threads stand against the vCPU threads where both want the same CPU, 1 to 10000.
    ///
    /// # Errors
    /// [`Error::OutOfRange`], [`Error::Read`], [`Error::Write`], [`Error::ReadBack`].
    pub fn set_vmm_weight(&self, weight: u32) -> Result<(), Error> {
        GroupPatch { weight: Some(weight), ..GroupPatch::default() }.check()?;
        cpu::write_changed(&self.vmm.join("cpu.weight"), u64::from(weight))
    }

    /// Lets the whole machine catch up on so much unused time, percent of its quota, 0 to 100.
    ///
    /// # Errors
    /// [`Error::Lacks`] before Linux 5.14, [`Error::OutOfRange`], [`Error::Read`], [`Error::Write`], [`Error::ReadBack`].
    pub fn set_burst(&self, percent: u8) -> Result<(), Error> {
        let patch = GroupPatch { burst_percent: Some(percent), ..GroupPatch::default() };
        patch.check()?;
        cpu::set_max(&self.unit, MACHINE, &patch).map(drop)
    }

    /// Divides what the wall lets through; what is so already is not written.
    ///
    /// # Errors
    /// As [`MachineTree::set_cpu`].
    pub fn divide_cpu(&self, division: &CpuDivision) -> Result<(), Error> {
        let [vcpu, vmm] = division.groups();
        vcpu.check()?;
        vmm.check()?;
        cpu::set_part(&self.unit, VCPU, &vcpu)?;
        cpu::set_part(&self.unit, VMM, &vmm).map(drop)
    }

    /// CPU limits as the kernel has them.
    ///
    /// # Errors
    /// [`Error::Read`], [`Error::Content`].
    pub fn cpu(&self) -> Result<CpuLimits, Error> {
        Ok(CpuLimits {
            machine: cpu::read_group(&self.machine)?,
            vcpu: cpu::read_group(&self.vcpu)?,
            vmm: cpu::read_group(&self.vmm)?,
        })
    }

    /// The period in which the wall is enforced, 1 ms to 1 s; it is in force whether there is a quota or not.
    ///
    /// # Errors
    /// [`Error::Read`], [`Error::Content`].
    pub fn period(&self) -> Result<Duration, Error> {
        cpu::read_period(&self.machine)
    }

    /// Changes memory limits and returns what the kernel shows afterwards. A `max` below what is charged makes the
    /// kernel reclaim, and kill if that is not enough.
    ///
    /// # Errors
    /// [`Error::OutOfRange`], [`Error::Write`], [`Error::ReadBack`].
    pub fn set_memory(&self, patch: &MemoryPatch) -> Result<MemoryLimits, Error> {
        memory::set(&self.unit, MACHINE, patch)
    }

    /// Changes how the machine stands against its siblings; twice is once. In a tree whose unit's files were not given to us only its inside
    /// is changed.
    ///
    /// # Errors
    /// [`Error::OutOfRange`], [`Error::Read`], [`Error::Write`], [`Error::ReadBack`].
    pub fn set_standing(&self, standing: &Standing) -> Result<Reach, Error> {
        standing::protect(&self.machine, standing.memory)?;
        standing::set_unit(&self.unit, standing)
    }

    /// Memory limits as the kernel has them.
    ///
    /// # Errors
    /// [`Error::Read`], [`Error::Content`].
    pub fn memory(&self) -> Result<MemoryLimits, Error> {
        memory::read_limits(&self.machine)
    }

    /// Changes how many processes and threads the machine may have; returns what the kernel shows, `None` for unlimited.
    ///
    /// # Errors
    /// [`Error::OutOfRange`], [`Error::Write`], [`Error::ReadBack`].
    pub fn set_pids(&self, patch: Patch<u64>) -> Result<Option<u64>, Error> {
        pids::set(&self.unit, MACHINE, patch)
    }

    /// How many processes and threads the machine may have, `None` for unlimited.
    ///
    /// # Errors
    /// [`Error::Read`], [`Error::Content`].
    pub fn pids(&self) -> Result<Option<u64>, Error> {
        pids::read(&self.machine)
    }

    /// Changes which CPUs the machine may run on, vCPUs and all other threads of the monitor; returns what was asked for, and what holds for
    /// the vCPUs. Where one of the two groups of threads has a narrower list of its own, that is changed as well.
    ///
    /// # Errors
    /// [`Error::OutOfRange`], [`Error::Lacks`] where the delegation has no cpuset, [`Error::Write`], [`Error::ReadBack`].
    pub fn set_cpus(&self, cpus: &Patch<CpuList>) -> Result<Cpuset, Error> {
        let patch = |cpus: &Patch<CpuList>| CpusetPatch { cpus: cpus.clone(), mems: Patch::Keep };
        let machine = cpuset::set(&self.machine, &patch(cpus))?;
        for threads in [&self.vcpu, &self.vmm] {
            // Groups that have none follow the machine's.
            if let (Some(own), Some(wanted)) = (cpuset::read(threads)?.cpus, &machine.cpus)
                && own != *wanted
            {
                cpuset::set(threads, &patch(&Patch::Set(wanted.clone())))?;
            }
        }
        self.cpus()
    }

    /// Which CPUs the machine was given, and which its vCPUs run on.
    ///
    /// # Errors
    /// [`Error::Lacks`], [`Error::Read`], [`Error::Content`].
    pub fn cpus(&self) -> Result<Cpuset, Error> {
        let asked = cpuset::read(&self.machine)?.cpus;
        Ok(Cpuset { cpus: asked, effective: cpuset::read(&self.vcpu)?.effective })
    }

    /// Changes the wall of one block device; returns what the kernel shows.
    ///
    /// # Errors
    /// [`Error::OutOfRange`], [`Error::Lacks`], [`Error::Write`] with ENODEV where there is no such disk, [`Error::ReadBack`].
    pub fn set_io(&self, device: Device, patch: &IoPatch) -> Result<IoLimits, Error> {
        io::set(&self.machine, device, patch)
    }

    /// The wall of one block device.
    ///
    /// # Errors
    /// [`Error::Lacks`], [`Error::Read`], [`Error::Content`].
    pub fn io(&self, device: Device) -> Result<IoLimits, Error> {
        io::read(&self.machine, device)
    }

    /// Changes the machine's weight among others at a busy block device, 1 to 10000; returns what the kernel shows.
    ///
    /// # Errors
    /// [`Error::OutOfRange`], [`Error::Lacks`] where no I/O scheduler has weights, [`Error::Write`], [`Error::ReadBack`].
    pub fn set_io_weight(&self, weight: u32) -> Result<u32, Error> {
        io::set_weight(&self.machine, weight)
    }

    /// Makes the kernel take memory back that can be dropped or swapped; answers whether it got all of it. May take long.
    ///
    /// # Errors
    /// [`Error::Lacks`] before Linux 5.19, [`Error::Write`].
    pub fn reclaim(&self, bytes: Bytes) -> Result<bool, Error> {
        memory::reclaim(&self.machine, bytes)
    }

    /// Watches the machine for stalls, if the kernel lets this user; otherwise [`Usage::pressure`] is to be polled.
    ///
    /// # Errors
    /// [`Error::OutOfRange`], [`Error::Write`].
    pub fn watch(&self, resource: Resource, stall: Stall) -> Result<Option<Trigger>, Error> {
        pressure::watch(&self.machine, resource, stall)
    }

    /// Begins to freeze every thread of the machine, or lets them go.
    ///
    /// # Errors
    /// [`Error::Read`], [`Error::Write`].
    pub fn freeze(&self, frozen: bool) -> Result<(), Error> {
        freezer::set(&self.machine, frozen)
    }

    /// Whether every thread of the machine stands still.
    ///
    /// # Errors
    /// [`Error::Read`].
    pub fn is_frozen(&self) -> Result<bool, Error> {
        freezer::is_frozen(&self.machine)
    }

    /// What the machine uses now and has used so far.
    ///
    /// # Errors
    /// [`Error::Read`], [`Error::Content`].
    pub fn usage(&self) -> Result<Usage, Error> {
        usage::read(&self.machine, &self.vcpu, &self.vmm)
    }

    /// Whether any process is left.
    ///
    /// # Errors
    /// [`Error::Read`].
    pub fn is_populated(&self) -> Result<bool, Error> {
        Ok(file::keyed(&file::read(&self.machine.join("cgroup.events"))?, "populated") != 0)
    }

    /// Kills every process of the machine with SIGKILL (`cgroup.kill`, Linux 5.14).
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn kill(&self) -> Result<(), Error> {
        file::write(&self.machine.join("cgroup.kill"), "1")
    }

    /// Removes the tree once no process is left in it.
    ///
    /// # Errors
    /// [`Error::Folder`] while processes are left.
    pub fn remove(&self) -> Result<Removal, Error> {
        if !self.machine.exists() {
            return Ok(Removal::AlreadyGone);
        }
        remove_folder(&self.vcpu)?;
        remove_folder(&self.vmm)?;
        match remove_folder(&self.machine) {
            Ok(()) => Ok(Removal::Removed),
            Err(Error::Folder { source, .. }) if source.kind() == std::io::ErrorKind::PermissionDenied => {
                Ok(Removal::LeftToSystemd)
            }
            Err(error) => Err(error),
        }
    }

    fn require_controllers(&self) -> Result<(), Error> {
        let offers = file::read(&self.unit.join("cgroup.controllers"))?;
        match DOMAIN_CONTROLLERS.iter().find(|wanted| !offers.split_whitespace().any(|one| one == **wanted)) {
            None => Ok(()),
            Some(lacks) => {
                Err(Error::Controllers { unit: self.unit.clone(), offers: offers.trim().into(), lacks })
            }
        }
    }
}

fn folder_error(action: &'static str, path: &Path, source: std::io::Error) -> Error {
    Error::Folder { action, path: path.into(), check: check_for(&source), source }
}

fn make_folder(path: &Path) -> Result<(), Error> {
    match fs::create_dir(path) {
        Err(source) if source.kind() != std::io::ErrorKind::AlreadyExists => {
            Err(folder_error("make", path, source))
        }
        _ => Ok(()),
    }
}

fn remove_folder(path: &Path) -> Result<(), Error> {
    match fs::remove_dir(path) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            Err(folder_error("remove", path, source))
        }
        _ => Ok(()),
    }
}

fn make_threaded(group: &Path) -> Result<(), Error> {
    let path = group.join("cgroup.type");
    if file::read(&path)?.trim() == "threaded" {
        return Ok(());
    }
    file::write(&path, "threaded")
}

/// Turns controllers on for the children of `group`; those that are on already are not written again.
fn enable(group: &Path, controllers: &[&str]) -> Result<(), Error> {
    let path = group.join("cgroup.subtree_control");
    let offers = file::read(&group.join("cgroup.controllers"))?;
    let on = file::read(&path)?;
    let has = |list: &str, one: &str| list.split_whitespace().any(|word| word == one);
    let optional = [OPTIONAL_CONTROLLER];
    let wanted: Vec<String> = controllers
        .iter()
        .chain(optional.iter().filter(|one| has(&offers, one)))
        .filter(|one| !has(&on, one))
        .map(|one| format!("+{one}"))
        .collect();
    if wanted.is_empty() { Ok(()) } else { file::write(&path, &wanted.join(" ")) }
}

/// The files of one cgroup, without folders.
fn files_of(group: &Path) -> Result<Vec<PathBuf>, Error> {
    let mut files = Vec::new();
    for entry in fs::read_dir(group).map_err(|source| folder_error("list", group, source))?.take(FILES_MAX) {
        let entry = entry.map_err(|source| folder_error("list", group, source))?;
        if entry.file_type().is_ok_and(|kind| kind.is_file()) {
            files.push(entry.path());
        }
    }
    Ok(files)
}

/// Gives a cgroup and what can be written in it to `owner`.
fn give(group: &Path, owner: Owner) -> Result<(), Error> {
    for path in files_of(group)? {
        let meta = fs::metadata(&path).map_err(|source| folder_error("look at", &path, source))?;
        if meta.mode() & 0o200 != 0 {
            change_owner(&path, &meta, owner)?;
        }
    }
    let meta = fs::metadata(group).map_err(|source| folder_error("look at", group, source))?;
    change_owner(group, &meta, owner)
}

/// Gives single files of a cgroup to `owner`, as far as this kernel has them.
fn give_files(group: &Path, names: &[&str], owner: Owner) -> Result<(), Error> {
    for path in names.iter().map(|name| group.join(name)) {
        match fs::metadata(&path) {
            Ok(meta) => change_owner(&path, &meta, owner)?,
            Err(source) if source.kind() == std::io::ErrorKind::NotFound => {}
            Err(source) => return Err(folder_error("look at", &path, source)),
        }
    }
    Ok(())
}

/// Takes a cgroup and all its files back to root; its children are not touched.
fn take_back(group: &Path) -> Result<(), Error> {
    let mut paths = files_of(group)?;
    paths.push(group.into());
    for path in paths {
        let meta = fs::metadata(&path).map_err(|source| folder_error("look at", &path, source))?;
        change_owner(&path, &meta, ROOT)?;
    }
    Ok(())
}

fn change_owner(path: &Path, meta: &fs::Metadata, owner: Owner) -> Result<(), Error> {
    if meta.uid() == owner.uid && meta.gid() == owner.gid {
        return Ok(());
    }
    chown(path, Some(owner.uid), Some(owner.gid))
        .map_err(|source| folder_error("change the owner of", path, source))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Fixture, content};
    use crate::units::{Bytes, MilliCpu};

    /// Folders of a test belong to who runs it; only root may give them away.
    fn is_root(fixture: &Fixture) -> bool {
        fs::metadata(fixture.unit()).expect("a folder").uid() == 0
    }

    const AGENT: Owner = Owner { uid: 12345, gid: 23456 };

    #[test]
    fn prepare_makes_threaded_children_and_gives_them_away() {
        let fixture = Fixture::new();
        if !is_root(&fixture) {
            println!("skipped: giving files away needs root");
            return;
        }
        let control = fixture.unit().join(CONTROL);
        fs::create_dir(&control).expect("a folder");
        chown(&control, Some(777), Some(777)).expect("root may");
        chown(fixture.unit(), Some(777), Some(777)).expect("root may");
        let tree = MachineTree::prepare(&fixture.unit(), 4711, AGENT).expect("prepared");
        assert_eq!(content(&tree.vcpu().join("cgroup.type")), "threaded");
        assert_eq!(content(&tree.vmm().join("cgroup.procs")), "4711");
        assert_eq!(content(&tree.unit().join("cgroup.subtree_control")), "+cpu +memory +io +pids +cpuset");
        assert_eq!(content(&tree.machine().join("cgroup.subtree_control")), "+cpu +cpuset");
        for path in
            [tree.machine(), &tree.vcpu().join("cpu.max"), &tree.machine().join("cgroup.procs"), tree.vmm()]
        {
            assert_eq!(fs::metadata(path).expect("there").uid(), AGENT.uid, "{}", path.display());
        }
        for name in UNIT_FILES {
            assert_eq!(fs::metadata(tree.unit().join(name)).expect("there").uid(), AGENT.uid, "{name}");
        }
        for path in [tree.unit(), &tree.unit().join("cgroup.procs"), &tree.unit().join("cpu.max"), &control] {
            assert_eq!(fs::metadata(path).expect("there").uid(), 0, "{}", path.display());
        }
    }

    #[test]
    fn preparing_again_moves_nobody() {
        let fixture = Fixture::new();
        if !is_root(&fixture) {
            println!("skipped: giving files away needs root");
            return;
        }
        fs::write(fixture.machine().join("cgroup.procs"), "4711\n").expect("written");
        fs::write(fixture.unit().join("cgroup.subtree_control"), "cpuset cpu io memory pids\n")
            .expect("written");
        MachineTree::prepare(&fixture.unit(), 4711, AGENT).expect("prepared");
        assert_eq!(content(&fixture.vmm().join("cgroup.procs")), "");
        assert_eq!(content(&fixture.unit().join("cgroup.subtree_control")), "cpuset cpu io memory pids");
    }

    #[test]
    fn a_delegation_without_memory_is_named_and_nothing_is_made() {
        let fixture = Fixture::new();
        fs::write(fixture.unit().join("cgroup.controllers"), "cpu io pids\n").expect("written");
        let error = MachineTree::prepare(&fixture.unit(), 1, AGENT).expect_err("no memory");
        assert!(matches!(error, Error::Controllers { lacks: "memory", .. }), "{error}");
        assert_eq!(content(&fixture.vcpu().join("cgroup.type")), "domain");
    }

    #[test]
    fn open_needs_the_whole_tree() {
        let fixture = Fixture::new();
        assert_eq!(MachineTree::open(&fixture.unit()).expect("there").vcpu(), fixture.vcpu());
        fs::remove_dir_all(fixture.vcpu()).expect("removed");
        assert!(matches!(MachineTree::open(&fixture.unit()), Err(Error::NoTree { .. })));
        assert!(matches!(MachineTree::open(Path::new("relative")), Err(Error::Path { .. })));
    }

    #[test]
    fn a_bad_field_changes_nothing_in_any_group() {
        let fixture = Fixture::new();
        let tree = MachineTree::open(&fixture.unit()).expect("there");
        let patch = CpuPatch { max: Patch::Set(MilliCpu(500)), vmm_weight: Some(0), ..CpuPatch::default() };
        tree.set_cpu(&patch).expect_err("a weight of 0");
        tree.set_wall(MilliCpu(0)).expect_err("no CPU at all");
        tree.set_burst(101).expect_err("more than the quota");
        assert_eq!(content(&tree.machine().join("cpu.max")), "max 100000");
        assert_eq!(tree.set_wall(MilliCpu(400)).expect("good"), Some(MilliCpu(400)));
        assert_eq!(content(&tree.machine().join("cpu.max")), "4000 10000");
        let division = CpuDivision { vmm: Patch::Set(MilliCpu(200)), ..CpuDivision::default() };
        let limits = tree.set_cpu(&CpuPatch { vmm_weight: Some(50), division, ..patch }).expect("good");
        assert_eq!(
            (limits.machine.max, limits.vcpu.max, limits.vmm.max, limits.vmm.weight),
            (Some(MilliCpu(500)), None, Some(MilliCpu(200)), 50)
        );
        assert_eq!(tree.cpu().expect("read"), limits);
        assert_eq!(tree.period().expect("read"), Duration::from_millis(10));
    }

    #[test]
    fn the_wall_is_around_all_threads_and_parts_are_bounded_below_it() {
        let fixture = Fixture::new();
        let tree = MachineTree::open(&fixture.unit()).expect("there");
        tree.set_wall(MilliCpu(500)).expect("written");
        tree.set_burst(100).expect("written");
        tree.set_vmm_weight(300).expect("written");
        tree.set_vmm_weight(0).expect_err("no weight at all");
        assert_eq!(tree.cpu().expect("read").vmm.weight, 300);
        let parts = CpuDivision { vcpu: Patch::Set(MilliCpu(300)), vmm: Patch::Set(MilliCpu(375)) };
        tree.divide_cpu(&parts).expect("written");
        let limits = tree.cpu().expect("read");
        assert_eq!(
            [limits.machine, limits.vcpu, limits.vmm].map(|group| (group.quota_usec, group.burst_usec)),
            [(Some(5000), 5000), (Some(3000), 3000), (Some(3750), 3750)]
        );
        // The burst follows the wall; a part that is not named stays, and one may be free.
        tree.set_wall(MilliCpu(250)).expect("written");
        tree.divide_cpu(&CpuDivision { vcpu: Patch::Unlimited, vmm: Patch::Keep }).expect("written");
        let limits = tree.cpu().expect("read");
        assert_eq!(
            [limits.machine, limits.vcpu, limits.vmm].map(|group| (group.quota_usec, group.burst_usec)),
            [(Some(2500), 2500), (None, 0), (Some(3750), 3750)]
        );
        // One bad part, and neither is written.
        let parts = CpuDivision { vcpu: Patch::Set(MilliCpu(100)), vmm: Patch::Set(MilliCpu(1)) };
        tree.divide_cpu(&parts).expect_err("too small");
        assert_eq!(content(&tree.vcpu().join("cpu.max")), "max 100000");
        // A kernel without bursts divides without.
        for group in [fixture.machine(), fixture.vcpu(), fixture.vmm()] {
            fs::remove_file(group.join("cpu.max.burst")).expect("removed");
        }
        tree.divide_cpu(&CpuDivision { vcpu: Patch::Set(MilliCpu(100)), vmm: Patch::Keep }).expect("written");
        assert_eq!(content(&tree.vcpu().join("cpu.max")), "1000 10000");
        assert!(matches!(tree.set_burst(100), Err(Error::Lacks { .. })));
    }

    #[test]
    fn usage_comes_from_all_three_groups() {
        let fixture = Fixture::new();
        fs::write(fixture.vmm().join("cpu.stat"), "usage_usec 99\n").expect("written");
        fs::write(fixture.machine().join("cpu.stat"), "usage_usec 88000\nthrottled_usec 5\n")
            .expect("written");
        let usage = MachineTree::open(&fixture.unit()).expect("there").usage().expect("read");
        assert_eq!((usage.vcpu.usage_usec, usage.vcpu.nr_throttled, usage.vmm.usage_usec), (2500, 7, 99));
        assert_eq!((usage.machine.usage_usec, usage.machine.throttled_usec), (88_000, 5));
        assert_eq!(
            (usage.memory.current, usage.pids_current, usage.io.read),
            (Bytes(300_000_000), 9, Bytes(4096))
        );
        assert_eq!(usage.pressure.cpu, None);
    }

    #[test]
    fn threads_and_population() {
        let fixture = Fixture::new();
        let tree = MachineTree::open(&fixture.unit()).expect("there");
        tree.place_vcpu(42).expect("placed");
        assert_eq!(tree.vcpu_threads().expect("read"), [42]);
        assert!(tree.is_populated().expect("read"));
        fs::write(tree.vcpu().join("cgroup.threads"), "one\n").expect("written");
        assert!(matches!(tree.vcpu_threads(), Err(Error::Content { .. })));
    }

    #[test]
    fn remove_says_what_is_left() {
        let fixture = Fixture::new();
        let tree = MachineTree::open(&fixture.unit()).expect("there");
        // Plain folders with files in them refuse rmdir as a populated cgroup does.
        assert!(matches!(tree.remove(), Err(Error::Folder { .. })));
        for path in [fixture.vcpu(), fixture.vmm()] {
            fs::remove_dir_all(path).expect("removed");
        }
        for entry in fs::read_dir(fixture.machine()).expect("a folder") {
            fs::remove_file(entry.expect("an entry").path()).expect("removed");
        }
        assert_eq!(tree.remove().expect("empty"), Removal::Removed);
        assert_eq!(tree.remove().expect("gone"), Removal::AlreadyGone);
    }
}
