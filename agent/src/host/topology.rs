//! Which CPUs the host has, and which of them share what: siblings of a core, a last-level cache, a memory node.
//!
//! ```text
//! /sys/devices/system/cpu/online                            0-7
//! /sys/devices/system/cpu/cpuN/topology/core_cpus_list      threads of its core (thread_siblings_list before Linux 5.2)
//! /sys/devices/system/cpu/cpuN/cache/indexK/shared_cpu_list K the largest there is: the last level
//! /sys/devices/system/node/nodeM/cpulist                    CPUs of a memory node
//! ```
//! Hypervisors often tell less. Without siblings each CPU is a core; without caches those of a package share one, without packages all of them
//! do; without nodes there is one. Sources: Documentation/admin-guide/cputopology.rst, ABI/stable/sysfs-devices-node,
//! ABI/testing/sysfs-devices-system-cpu.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use lathe_cgroup::CpuList;

use crate::problem::Problem;

/// Where CPUs are, below the root.
const CPUS: &str = "sys/devices/system/cpu";
/// Where memory nodes are.
const NODES: &str = "sys/devices/system/node";
/// Caches that a CPU is asked for: more than any has.
const CACHES_MAX: u32 = 10;

/// One core, as far as machines may use it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostCore {
    /// Its threads that are online and that machines may use; at least one.
    pub cpus: CpuList,
    /// Number of the last-level cache that it shares: that of its first CPU.
    pub cache: u32,
    /// Number of the memory node that it is next to.
    pub node: u32,
    /// None of its threads is online for others alone.
    pub whole: bool,
}

impl HostCore {
    /// How many CPUs it is.
    pub fn size(&self) -> u64 {
        self.cpus.0.len() as u64
    }
}

/// The CPUs of a host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Topology {
    /// Cores that machines may use, by their first CPU.
    pub cores: Vec<HostCore>,
    /// Online CPUs that machines may not use.
    pub outside: u64,
}

impl Topology {
    /// What the CPUs `online` share, below `root`; machines may use `allowed` of them, or all.
    pub fn read(root: &Path, online: &CpuList, allowed: Option<&CpuList>) -> Self {
        let ours = |cpu: &u32| allowed.is_none_or(|allowed| allowed.0.contains(cpu));
        let mut usable: CpuList = online.0.iter().copied().filter(ours).collect();
        if usable.0.is_empty() {
            // The kernel never leaves a group without any either.
            usable = online.clone();
        }
        let nodes = nodes(root);
        let mut cores: BTreeMap<u32, HostCore> = BTreeMap::new();
        for cpu in &usable.0 {
            let folder = root.join(CPUS).join(format!("cpu{cpu}"));
            let among = |list: CpuList| -> CpuList { list.0.intersection(&online.0).copied().collect() };
            let siblings = siblings(&folder).map(among).filter(|list| list.0.contains(cpu));
            let siblings = siblings.unwrap_or_else(|| [*cpu].into_iter().collect());
            let first = siblings.0.first().copied().unwrap_or(*cpu);
            let whole = siblings.0.is_subset(&usable.0);
            let core = cores.entry(first).or_insert_with(|| HostCore {
                cpus: CpuList::default(),
                cache: cache(&folder).unwrap_or(0),
                node: nodes.get(cpu).copied().unwrap_or(0),
                whole,
            });
            core.cpus.0.insert(*cpu);
        }
        Self { cores: cores.into_values().collect(), outside: (online.0.len() - usable.0.len()) as u64 }
    }

    /// How many CPUs are online.
    pub fn online(&self) -> u64 {
        self.cores.iter().map(HostCore::size).sum::<u64>() + self.outside
    }

    /// The CPUs that machines may use.
    pub fn cpus(&self) -> CpuList {
        self.cores.iter().flat_map(|core| core.cpus.0.iter().copied()).collect()
    }
}

/// The CPUs that are online below `root`.
///
/// # Errors
/// `internal` where neither sysfs nor procfs tells.
pub fn online(root: &Path) -> Result<CpuList, Problem> {
    if let Some(list) = list(&root.join(CPUS).join("online")) {
        return Ok(list);
    }
    // A container may have no sysfs.
    let path = root.join("proc/stat");
    let failed = |cause| Problem::internal(format!("cannot read {}", path.display()), cause);
    let stat = fs::read_to_string(&path).map_err(failed)?;
    let words = stat.lines().filter_map(|line| line.split_whitespace().next()?.strip_prefix("cpu"));
    Ok(words.filter_map(|number| number.parse::<u32>().ok()).collect())
}

/// The list in a file; `None`: there is none, or it is empty.
fn list(path: &Path) -> Option<CpuList> {
    let list: CpuList = fs::read_to_string(path).ok()?.parse().ok()?;
    Some(list).filter(|list| !list.0.is_empty())
}

/// All threads of a CPU's core.
fn siblings(folder: &Path) -> Option<CpuList> {
    ["core_cpus_list", "thread_siblings_list"]
        .iter()
        .find_map(|name| list(&folder.join("topology").join(name)))
}

/// Number of a CPU's last-level cache.
fn cache(folder: &Path) -> Option<u32> {
    let caches = folder.join("cache");
    let last =
        (0..CACHES_MAX).rev().find_map(|index| list(&caches.join(format!("index{index}/shared_cpu_list"))));
    let package = || {
        ["package_cpus_list", "core_siblings_list"]
            .iter()
            .find_map(|name| list(&folder.join("topology").join(name)))
    };
    last.or_else(package)?.0.first().copied()
}

/// The memory node of each CPU.
fn nodes(root: &Path) -> BTreeMap<u32, u32> {
    let entries = fs::read_dir(root.join(NODES)).into_iter().flatten().flatten();
    let numbered = entries.filter_map(|entry| {
        let number: u32 = entry.file_name().to_str()?.strip_prefix("node")?.parse().ok()?;
        Some((number, list(&entry.path().join("cpulist"))?))
    });
    numbered.flat_map(|(number, cpus)| cpus.0.into_iter().map(move |cpu| (cpu, number))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A recorded tree: which CPUs are online, and of each its siblings, its last cache and its node.
    fn tree(online: &str, cpus: &[(u32, &str, Option<&str>)], nodes: &[&str]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let write = |path: String, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("{text}\n")).unwrap();
        };
        write(format!("{CPUS}/online"), online);
        for (cpu, siblings, cache) in cpus {
            write(format!("{CPUS}/cpu{cpu}/topology/thread_siblings_list"), siblings);
            write(format!("{CPUS}/cpu{cpu}/cache/index0/shared_cpu_list"), siblings);
            if let Some(cache) = cache {
                write(format!("{CPUS}/cpu{cpu}/cache/index3/shared_cpu_list"), cache);
            }
        }
        for (node, cpus) in nodes.iter().enumerate() {
            write(format!("{NODES}/node{node}/cpulist"), cpus);
        }
        root
    }

    fn cpus(text: &str) -> CpuList {
        text.parse().unwrap()
    }

    fn read(root: &tempfile::TempDir, allowed: Option<&str>) -> Topology {
        let allowed = allowed.map(cpus);
        Topology::read(root.path(), &online(root.path()).unwrap(), allowed.as_ref())
    }

    fn shown(topology: &Topology) -> Vec<String> {
        let core = |core: &HostCore| {
            let part = if core.whole { "" } else { " in part" };
            format!("{} cache {} node {}{part}", core.cpus, core.cache, core.node)
        };
        topology.cores.iter().map(core).collect()
    }

    #[test]
    fn siblings_caches_and_nodes_are_told_apart() {
        // Two nodes with a cache each, two cores of two threads in each, numbered as Intel does.
        let all = [
            (0, "0,4", Some("0-1,4-5")),
            (1, "1,5", Some("0-1,4-5")),
            (2, "2,6", Some("2-3,6-7")),
            (3, "3,7", Some("2-3,6-7")),
            (4, "0,4", Some("0-1,4-5")),
            (5, "1,5", Some("0-1,4-5")),
            (6, "2,6", Some("2-3,6-7")),
            (7, "3,7", Some("2-3,6-7")),
        ];
        let root = tree("0-7", &all, &["0-1,4-5", "2-3,6-7"]);
        let topology = read(&root, None);
        let expected =
            ["0,4 cache 0 node 0", "1,5 cache 0 node 0", "2,6 cache 2 node 1", "3,7 cache 2 node 1"];
        assert_eq!(shown(&topology), expected);
        assert_eq!((topology.online(), topology.outside, topology.cpus()), (8, 0, cpus("0-7")));
    }

    #[test]
    fn what_machines_may_not_use_is_outside_and_leaves_cores_in_part() {
        let all = [(0, "0-1", None), (1, "0-1", None), (2, "2-3", None), (3, "2-3", None)];
        let root = tree("0-3", &all, &[]);
        let topology = read(&root, Some("1-3"));
        assert_eq!(shown(&topology), ["1 cache 0 node 0 in part", "2-3 cache 2 node 0"]);
        assert_eq!((topology.online(), topology.outside), (4, 1));
        // Nothing of it is online: then nothing is kept from machines, as in the kernel.
        assert_eq!(read(&root, Some("9")).cpus(), cpus("0-3"));
    }

    #[test]
    fn what_is_offline_is_in_no_core() {
        let all = [(0, "0-1", None), (2, "2-3", None), (3, "2-3", None)];
        let topology = read(&tree("0,2-3", &all, &[]), None);
        assert_eq!(shown(&topology), ["0 cache 0 node 0", "2-3 cache 2 node 0"]);
        assert_eq!(topology.online(), 3);
    }

    #[test]
    fn a_host_that_tells_nothing_has_a_core_for_each_cpu() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("proc")).unwrap();
        fs::write(root.path().join("proc/stat"), "cpu  1 2\ncpu0 1\ncpu1 1\nintr 5\n").unwrap();
        assert_eq!(shown(&read(&root, None)), ["0 cache 0 node 0", "1 cache 0 node 0"]);
        online(Path::new("/nowhere")).unwrap_err();
    }
}
