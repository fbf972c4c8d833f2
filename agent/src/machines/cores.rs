//! Who runs on which of the host's CPUs: machines with cores to themselves on these, everybody else on all others.
//!
//! ```text
//! sysfs: what is online ──┐
//! lathe.slice: what an ───┼─► books: topology ─► placement ─► cpuset.cpus of each machine ─► read back ─► lathe show
//! administrator allows    │                         ▲
//! grants: who is alone ───┘                         └─ where they stand: they stay if they may
//! ```
//! Decided anew once a second, before a machine starts and when it wants more cores: so CPUs that come and go, a slice that is narrowed, and
//! what somebody else writes are seen, and places that are better are taken. A list is written only where another is in force. As long as no
//! machine has cores to itself, and none had, nothing is written at all.
//!
//! The effective list is what counts. An administrator's `AllowedCPUs=`, of a unit or of lathe.slice, narrows it; it is never worked around. Where
//! nothing of what is written here is left, the kernel lets a machine run wherever its unit may: that is said as the problem that it is.
//!
//! Other slices are not ours: that the host's own services stay away from such cores is for whoever wants it to say there.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use lathe_cgroup::{CpuList, Cpuset, Error, MachineTree, Patch, cpuset};

use super::core::Core;
use super::tiers::SLICE;
use crate::host::placement::Placement;
use crate::problem::{Kind, Problem};

/// Where cgroups are on a host with systemd.
const CGROUPS: &str = "/sys/fs/cgroup";

/// What is known of the CPUs of a machine with a monitor.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cpus {
    /// What it shall run on; `None`: there is no place for the cores that it shall have to itself.
    pub wanted: Option<CpuList>,
    /// What its vCPUs run on; `None`: the host cannot say.
    pub actual: Option<CpuList>,
    /// Why it does not have what it was promised; empty while it has.
    pub problem: String,
}

/// Who stands where. Who places machines has it locked.
#[derive(Default)]
pub(super) struct Places(Mutex<Known>);

#[derive(Default)]
struct Known {
    places: BTreeMap<String, CpuList>,
    /// What the books' topology was made of: what is online, and what of it machines may use.
    host: Option<(CpuList, Option<CpuList>)>,
}

impl Places {
    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Places a machine that is about to start, and all others around it.
///
/// # Errors
/// `cores-over-capacity` where it does not get the cores that it shall have to itself: the slice may have been narrowed since it was admitted.
pub(super) fn admit(core: &Core, name: &str, tree: &MachineTree) -> Result<(), Problem> {
    if let Err(failures) = arrange(core, Some((name, tree))) {
        tracing::warn!("machines do not run where they shall: {failures}");
    }
    let (alone, problem) = core
        .entry(name)?
        .with(|shared| (shared.record.booking().cpus_alone() > 0, shared.cpus.problem.clone()));
    if !alone || problem.is_empty() {
        return Ok(());
    }
    let message = format!("{name} cannot have cores to itself: {problem}");
    Err(Problem::new(Kind::Impossible, "cores-over-capacity", message)
        .fix("systemctl show -p AllowedCPUs lathe.slice"))
}

/// Places all machines. Answers whether it could, in words where it could not.
pub(super) fn keep(core: &Core) -> Result<(), String> {
    arrange(core, None)
}

fn arrange(core: &Core, starting: Option<(&str, &MachineTree)>) -> Result<(), String> {
    let mut known = core.places.lock();
    let launched = core.entries().into_iter().filter_map(|entry| {
        let tree = entry.with(|shared| shared.launched.as_ref()?.tree.clone())?;
        Some((entry.name.clone(), tree))
    });
    let starting = starting.map(|(name, tree)| (name.to_owned(), tree.clone()));
    let trees: BTreeMap<String, MachineTree> = launched.chain(starting).collect();
    let mut failures = Vec::new();
    if let Err(problem) = look(core, &mut known, &trees) {
        failures.push(problem.message);
    }
    let mut now = known.places.clone();
    for (name, tree) in &trees {
        // A lathed that was started again finds them where they stand.
        if !now.contains_key(name)
            && let Ok(Cpuset { cpus: Some(cpus), .. }) = tree.cpus()
        {
            now.insert(name.clone(), cpus);
        }
    }
    let (placement, all) = core.with_books(|books| (books.place(&now), books.cpus()));
    known.places.clone_from(&placement.places);
    let told = enforce(&placement, &all, &trees);
    for (name, cpus) in told {
        if !cpus.problem.is_empty() {
            failures.push(format!("{name}: {}", cpus.problem));
        }
        // It may have been removed meanwhile.
        if let Ok(entry) = core.entry(&name) {
            entry.with(|shared| shared.cpus = cpus);
        }
    }
    if failures.is_empty() { Ok(()) } else { Err(failures.join("; ")) }
}

/// Enters in the books which CPUs there are, when these are others than before.
fn look(core: &Core, known: &mut Known, trees: &BTreeMap<String, MachineTree>) -> Result<(), Problem> {
    let online = core.probe.online()?;
    let parent = trees.values().next().and_then(|tree| tree.unit().parent()).map(Path::to_path_buf);
    let default = || (core.launcher.kind() == "systemd").then(|| Path::new(CGROUPS).join(SLICE));
    let slice: Option<PathBuf> = parent.or_else(default);
    // Where it cannot be read nothing is known to be narrowed.
    let allowed = slice.and_then(|slice| cpuset::effective(&slice).ok().flatten());
    let host = Some((online, allowed));
    if known.host == host {
        return Ok(());
    }
    if let Some((online, allowed)) = &host {
        let topology = core.probe.topology(online, allowed.as_ref());
        let (usable, all) = (topology.cpus(), topology.online());
        let before = core.with_books(|books| {
            let before = (books.cpus(), books.online());
            books.set_topology(topology);
            before
        });
        if before != (usable.clone(), all) {
            let message = format!("the host has {all} CPUs online, machines may use {usable}");
            core.tell("host-cpus", &core.config.host_name, message);
        }
    }
    known.host = host;
    Ok(())
}

/// Writes what shall be, and says what is.
fn enforce(
    placement: &Placement,
    all: &CpuList,
    trees: &BTreeMap<String, MachineTree>,
) -> BTreeMap<String, Cpus> {
    let mut shown: BTreeMap<&str, Result<Cpuset, Error>> = BTreeMap::new();
    let follows = placement.rest == *all;
    // First all others get out of the way.
    for alone in [false, true] {
        for (name, tree) in trees.iter().filter(|(name, _)| placement.places.contains_key(*name) == alone) {
            let wanted = placement.places.get(name).unwrap_or(&placement.rest);
            let shows = match tree.cpus() {
                Ok(shows) if follows && !alone && shows.cpus.is_none() => Ok(shows),
                Ok(_) => tree.set_cpus(&Patch::Set(wanted.clone())),
                Err(cause) => Err(cause),
            };
            shown.insert(name, shows);
        }
    }
    let seen = Seen { placement, all, shown: &shown };
    let told = |(name, tree): (&String, &MachineTree)| {
        // Where its cgroup has gone it has ended.
        let problem = if tree.unit().exists() { seen.trouble(name) } else { String::new() };
        let place = placement.places.get(name);
        let wanted = place.or((!placement.refused.contains(name)).then_some(&placement.rest)).cloned();
        (name.clone(), Cpus { wanted, actual: seen.runs_on(name).cloned(), problem })
    };
    trees.iter().map(told).collect()
}

/// What shall be, and what the kernel shows.
struct Seen<'a> {
    placement: &'a Placement,
    all: &'a CpuList,
    shown: &'a BTreeMap<&'a str, Result<Cpuset, Error>>,
}

impl Seen<'_> {
    fn runs_on(&self, name: &str) -> Option<&CpuList> {
        Some(&self.shown.get(name)?.as_ref().ok()?.effective)
    }

    /// Why a machine does not have what it was promised; empty if it has.
    fn trouble(&self, name: &str) -> String {
        let (placement, all) = (self.placement, self.all);
        let (place, refused) = (placement.places.get(name), placement.refused.contains(name));
        match (self.shown.get(name), place) {
            (Some(Err(Error::Lacks { .. })), None) if !refused => String::new(),
            (Some(Err(cause)), _) => cause.to_string(),
            (None, _) => String::new(),
            (Some(Ok(_)), None) if refused => format!(
                "there is no place for it: machines may use CPUs {all}, and all others need some; it shares {}",
                placement.rest
            ),
            (Some(Ok(shows)), Some(place)) => self.trouble_alone(name, place, &shows.effective),
            (Some(Ok(shows)), None) => trouble_among(&shows.effective, placement),
        }
    }

    /// Why a machine does not have this place to itself.
    fn trouble_alone(&self, name: &str, place: &CpuList, effective: &CpuList) -> String {
        if effective != place {
            return format!(
                "it runs on CPUs {effective} instead of {place}: AllowedCPUs= of its unit or of {SLICE} says so"
            );
        }
        let there = |other: &str| self.runs_on(other).is_some_and(|cpus| !common(cpus, place).0.is_empty());
        let others: Vec<_> =
            self.shown.keys().filter(|other| **other != name && there(other)).copied().collect();
        if others.is_empty() {
            return String::new();
        }
        format!("{} may run on its cores too: AllowedCPUs= of the unit says so", others.join(", "))
    }
}

fn common(one: &CpuList, other: &CpuList) -> CpuList {
    one.0.intersection(&other.0).copied().collect()
}

/// Why a machine without cores to itself runs on those of others.
fn trouble_among(effective: &CpuList, placement: &Placement) -> String {
    let taken = placement.places.iter().find_map(|(owner, place)| {
        let common = common(effective, place);
        (!common.0.is_empty()).then_some((owner, common))
    });
    taken.map_or(String::new(), |(owner, cpus)| {
        format!("it runs on CPUs {cpus}, which {owner} has to itself: AllowedCPUs= of its unit leaves it nothing else")
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs;

    use super::*;

    /// Machines' cgroups as plain folders: what is effective stays as a test writes it.
    fn machine(folder: &Path, name: &str, effective: &str) -> (String, MachineTree) {
        let unit = folder.join(format!("lathe-vm@{name}.service"));
        for group in ["machine", "machine/vcpu", "machine/vmm"] {
            fs::create_dir_all(unit.join(group)).unwrap();
            fs::write(unit.join(group).join("cpuset.cpus"), "\n").unwrap();
            fs::write(unit.join(group).join("cpuset.cpus.effective"), effective).unwrap();
        }
        (name.to_owned(), MachineTree::open(&unit).unwrap())
    }

    fn list(text: &str) -> CpuList {
        text.parse().unwrap()
    }

    fn written(tree: &MachineTree) -> String {
        fs::read_to_string(tree.machine().join("cpuset.cpus")).unwrap().trim().to_owned()
    }

    fn alone(name: &str, cpus: &str, rest: &str) -> Placement {
        let places = [(name.to_owned(), list(cpus))].into_iter().collect();
        Placement { places, refused: BTreeSet::new(), rest: list(rest) }
    }

    #[test]
    fn nothing_is_written_until_somebody_is_alone_and_then_for_everybody() {
        let folder = tempfile::tempdir().unwrap();
        let mut trees: BTreeMap<_, _> = [machine(folder.path(), "web", "0-3")].into_iter().collect();
        let nobody = Placement { rest: list("0-3"), ..Placement::default() };
        let told = enforce(&nobody, &list("0-3"), &trees);
        let expected = Cpus { wanted: Some(list("0-3")), actual: Some(list("0-3")), problem: String::new() };
        assert_eq!((written(&trees["web"]).as_str(), &told["web"]), ("", &expected));
        trees.extend([machine(folder.path(), "db", "2-3")]);
        fs::write(trees["web"].vcpu().join("cpuset.cpus.effective"), "0-1").unwrap();
        let told = enforce(&alone("db", "2-3", "0-1"), &list("0-3"), &trees);
        assert_eq!((written(&trees["web"]), written(&trees["db"])), ("0-1".to_owned(), "2-3".to_owned()));
        assert!(told.values().all(|cpus| cpus.problem.is_empty()), "{told:?}");
        // What somebody else writes, in whichever group, is corrected; and what was taken comes back.
        fs::write(trees["db"].machine().join("cpuset.cpus"), "0").unwrap();
        fs::write(trees["db"].vcpu().join("cpuset.cpus"), "0").unwrap();
        enforce(&alone("db", "2-3", "0-1"), &list("0-3"), &trees);
        let inner = fs::read_to_string(trees["db"].vcpu().join("cpuset.cpus")).unwrap();
        assert_eq!((written(&trees["db"]).as_str(), inner.trim()), ("2-3", "2-3"));
        enforce(&nobody, &list("0-3"), &trees);
        assert_eq!(written(&trees["web"]), "0-3");
    }

    #[test]
    fn what_an_administrator_leaves_of_it_is_said() {
        let folder = tempfile::tempdir().unwrap();
        let trees: BTreeMap<_, _> =
            [machine(folder.path(), "web", "0-1"), machine(folder.path(), "db", "2")].into_iter().collect();
        let narrowed = enforce(&alone("db", "2-3", "0-1"), &list("0-3"), &trees);
        assert!(narrowed["db"].problem.contains("CPUs 2 instead of 2-3"), "{narrowed:?}");
        assert_eq!(narrowed["web"].problem, "");
        let beside = enforce(&alone("db", "2", "0,3"), &list("0-3"), &trees);
        assert_eq!(beside["db"].problem, "");
        fs::write(trees["web"].vcpu().join("cpuset.cpus.effective"), "2").unwrap();
        let both = enforce(&alone("db", "2", "0,3"), &list("0-3"), &trees);
        assert!(both["db"].problem.starts_with("web may run on its cores"), "{both:?}");
        assert!(both["web"].problem.contains("CPUs 2, which db has"), "{both:?}");
        let refused = [String::from("db")].into_iter().collect();
        let none = Placement { refused, rest: list("0"), ..Placement::default() };
        let told = enforce(&none, &list("0"), &trees);
        assert_eq!(told["db"].wanted, None);
        assert!(
            told["db"].problem.contains("no place") && told["db"].problem.contains("shares 0"),
            "{told:?}"
        );
    }

    #[test]
    fn without_a_cpuset_only_who_wants_cores_has_a_problem() {
        let folder = tempfile::tempdir().unwrap();
        let trees: BTreeMap<_, _> =
            [machine(folder.path(), "web", "0"), machine(folder.path(), "db", "0")].into_iter().collect();
        for tree in trees.values() {
            fs::remove_file(tree.machine().join("cpuset.cpus")).unwrap();
        }
        let told = enforce(&alone("db", "1", "0"), &list("0-1"), &trees);
        assert_eq!((told["web"].problem.as_str(), &told["web"].actual), ("", &None));
        assert!(told["db"].problem.contains("cpuset.cpus"), "{told:?}");
        fs::remove_dir_all(trees["db"].unit()).unwrap();
        assert_eq!(enforce(&alone("db", "1", "0"), &list("0-1"), &trees)["db"].problem, "", "it has ended");
    }
}
