//! Which machine has which cores to itself. Pure: topology, reserve and wishes in, sets of CPUs out.
//!
//! ```text
//!  kept for all others          cores that machines may have to themselves
//! ┌─────────┐┌──────────────────────────────────────────────────────────────┐
//!  cores in part, then the      each machine: cores of one cache if that has room, else of one
//!  lowest, up to the reserve    memory node, else of as few as possible
//! ```
//! - **Whole cores**: siblings go to one machine or to nobody. A core whose sibling is not for machines is kept for all others.
//! - **Contiguous**: the cache with the least room that suffices is taken, so that large rooms stay large.
//! - **Stable**: who stands where it may stand stays there.
//! - **Mended**: a machine moves when it, or all of them together, then spread over fewer nodes, or over as many nodes and fewer caches; never
//!   otherwise. To move is to write a set of CPUs: nothing is stopped.
//! - **Never empty**: all who ask for nothing share what nobody has to itself, at least a core and at least what the host's reserve is.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use lathe_cgroup::CpuList;

use super::topology::Topology;

/// What a machine asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wish {
    /// CPUs, in whole cores.
    pub cpus: u64,
    /// What it has now.
    pub now: Option<CpuList>,
}

/// Who has what.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Placement {
    /// What each machine has to itself.
    pub places: BTreeMap<String, CpuList>,
    /// Those for which there is no place.
    pub refused: BTreeSet<String>,
    /// What all others share.
    pub rest: CpuList,
}

/// Numbers of cores in [`Topology::cores`].
type Cores = BTreeSet<usize>;

/// Finds a place for everybody, or for as many as possible; those who have one come first. `reserved_milli` is kept for all others, less what is
/// outside of the topology.
pub fn place(topology: &Topology, reserved_milli: u64, wishes: &BTreeMap<String, Wish>) -> Placement {
    let planner = Planner { topology, wishes, all: dedicable(topology, reserved_milli) };
    let stable = planner.stable();
    let fresh = planner.fresh();
    let plan = if planner.cost(&fresh) < planner.cost(&stable) { fresh } else { stable };
    let places: BTreeMap<_, _> =
        plan.iter().map(|(name, cores)| ((*name).to_owned(), planner.cpus(cores))).collect();
    let taken: BTreeSet<u32> = places.values().flat_map(|place| place.0.iter().copied()).collect();
    Placement {
        refused: wishes.keys().filter(|name| !places.contains_key(*name)).cloned().collect(),
        rest: topology.cpus().0.difference(&taken).copied().collect(),
        places,
    }
}

/// How many CPUs machines may have to themselves in all.
pub fn dedicable_cpus(topology: &Topology, reserved_milli: u64) -> u64 {
    dedicable(topology, reserved_milli).iter().map(|core| topology.cores[*core].size()).sum()
}

/// Cores that a machine may have to itself: whole, and not kept.
fn dedicable(topology: &Topology, reserved_milli: u64) -> Cores {
    let reserved = reserved_milli.div_ceil(1000).saturating_sub(topology.outside).max(1);
    let cores = || topology.cores.iter().enumerate();
    let mut kept: u64 = cores().filter(|(_, core)| !core.whole).map(|(_, core)| core.size()).sum();
    let mut free = Cores::new();
    for (index, core) in cores().filter(|(_, core)| core.whole) {
        if kept < reserved {
            kept += core.size();
        } else {
            free.insert(index);
        }
    }
    free
}

/// Over how many memory nodes and caches a place is spread.
type Spread = (usize, usize);
type Plan<'a> = BTreeMap<&'a str, Cores>;

struct Planner<'a> {
    topology: &'a Topology,
    wishes: &'a BTreeMap<String, Wish>,
    all: Cores,
}

impl<'a> Planner<'a> {
    fn cpus(&self, cores: &Cores) -> CpuList {
        cores.iter().flat_map(|core| self.topology.cores[*core].cpus.0.iter().copied()).collect()
    }

    fn size(&self, cores: &Cores) -> u64 {
        cores.iter().map(|core| self.topology.cores[*core].size()).sum()
    }

    /// The cores of these CPUs, as far as machines may have them.
    fn cores(&self, cpus: &CpuList) -> Cores {
        let among = |core: &usize| self.topology.cores[*core].cpus.0.iter().any(|cpu| cpus.0.contains(cpu));
        self.all.iter().copied().filter(among).collect()
    }

    fn spread(&self, cores: &Cores) -> Spread {
        let count = |of: &dyn Fn(usize) -> (u32, u32)| {
            cores.iter().map(|core| of(*core)).collect::<BTreeSet<_>>().len()
        };
        let node = |core: usize| self.topology.cores[core].node;
        (count(&|core| (node(core), 0)), count(&|core| (node(core), self.topology.cores[core].cache)))
    }

    /// What is worse about a plan: who is refused, then how far all are spread.
    fn cost(&self, plan: &Plan<'a>) -> (usize, Spread) {
        let sum = plan
            .values()
            .map(|cores| self.spread(cores))
            .fold((0, 0), |sum: Spread, spread| (sum.0 + spread.0, sum.1 + spread.1));
        (self.wishes.len() - plan.len(), sum)
    }

    fn free(&self, plan: &Plan<'a>) -> Cores {
        let taken: Cores = plan.values().flatten().copied().collect();
        self.all.difference(&taken).copied().collect()
    }

    /// The names without a place, the largest wishes first.
    fn missing(&self, plan: &Plan<'a>) -> Vec<&'a str> {
        let mut names: Vec<_> =
            self.wishes.iter().filter(|(name, _)| !plan.contains_key(name.as_str())).collect();
        names.sort_by_key(|(name, wish)| (Reverse(wish.cpus), name.as_str()));
        names.into_iter().map(|(name, _)| name.as_str()).collect()
    }

    fn add_missing(&self, plan: &mut Plan<'a>, near: impl Fn(&str) -> Cores) {
        for name in self.missing(plan) {
            if let Some(cores) = self.pick(self.wishes[name].cpus, &self.free(plan), &near(name)) {
                plan.insert(name, cores);
            }
        }
    }

    /// Everybody stays who may; the others get what is left; then single machines move to where they are less spread.
    fn stable(&self) -> Plan<'a> {
        let mut plan = Plan::new();
        for (name, wish) in self.wishes {
            let Some(now) = &wish.now else { continue };
            let cores = self.cores(now);
            if wish.cpus > 0
                && self.cpus(&cores) == *now
                && self.size(&cores) == wish.cpus
                && cores.is_subset(&self.free(&plan))
            {
                plan.insert(name, cores);
            }
        }
        self.settle(&mut plan, |name| {
            self.wishes[name].now.as_ref().map(|now| self.cores(now)).unwrap_or_default()
        });
        plan
    }

    /// Gives places to who has none, and mends, until neither changes anything.
    fn settle(&self, plan: &mut Plan<'a>, near: impl Fn(&str) -> Cores) {
        loop {
            self.add_missing(plan, &near);
            if !self.mend(plan) {
                return;
            }
        }
    }

    /// Moves one machine to where it is less spread; each time the sum of all spreads falls.
    fn mend(&self, plan: &mut Plan<'a>) -> bool {
        let free = self.free(plan);
        let better = plan.iter().find_map(|(name, own)| {
            let room: Cores = free.union(own).copied().collect();
            let cores = self.pick(self.wishes[*name].cpus, &room, own)?;
            (self.spread(&cores) < self.spread(own)).then_some((*name, cores))
        });
        match better {
            Some((name, cores)) => plan.insert(name, cores).is_some(),
            None => false,
        }
    }

    /// Everybody anew, the largest first; of places of one size each machine keeps its own where that is among them.
    fn fresh(&self) -> Plan<'a> {
        let mut plan = Plan::new();
        self.settle(&mut plan, |_| Cores::new());
        let mut pools: BTreeMap<u64, Vec<Cores>> = BTreeMap::new();
        let mut left = Vec::new();
        for (name, cores) in std::mem::take(&mut plan) {
            pools.entry(self.wishes[name].cpus).or_default().push(cores);
            left.push(name);
        }
        let now = |name: &str| self.wishes[name].now.as_ref().map(|now| self.cores(now));
        left.retain(|name| {
            let pool = pools.entry(self.wishes[*name].cpus).or_default();
            let own = now(name).and_then(|now| pool.iter().position(|cores| *cores == now));
            own.map(|index| plan.insert(*name, pool.remove(index))).is_none()
        });
        for name in left {
            let pool = pools.entry(self.wishes[name].cpus).or_default();
            if !pool.is_empty() {
                plan.insert(name, pool.remove(0));
            }
        }
        plan
    }

    /// Cores of `free` that are `cpus` CPUs together, as close to each other as can be, and to `near`.
    fn pick(&self, cpus: u64, free: &Cores, near: &Cores) -> Option<Cores> {
        if cpus == 0 {
            return None;
        }
        let core = |index: usize| &self.topology.cores[index];
        let levels: [&dyn Fn(usize) -> (u32, u32); 3] =
            [&|index| (core(index).node, core(index).cache), &|index| (core(index).node, 0), &|_| (0, 0)];
        levels.iter().find_map(|group_of| {
            let mut groups: BTreeMap<(u32, u32), Cores> = BTreeMap::new();
            for index in free {
                groups.entry(group_of(*index)).or_default().insert(*index);
            }
            let best = groups.values().filter_map(|group| {
                let cores = self.fill(cpus, group, near)?;
                let away = near.difference(&cores).count();
                Some(((self.spread(&cores), away, self.size(group)), cores))
            });
            best.min_by_key(|(cost, _)| *cost).map(|(_, cores)| cores)
        })
    }

    /// `cpus` CPUs of a group, over as few caches as can be: those of `near` first, or cache by cache, those with the most room first.
    fn fill(&self, cpus: u64, group: &Cores, near: &Cores) -> Option<Cores> {
        let place = |index: usize| (self.topology.cores[index].node, self.topology.cores[index].cache);
        let mut rooms: BTreeMap<(u32, u32), u64> = BTreeMap::new();
        for index in group {
            *rooms.entry(place(*index)).or_default() += self.topology.cores[*index].size();
        }
        let mut nodes: BTreeMap<u32, u64> = BTreeMap::new();
        for ((node, _), room) in &rooms {
            *nodes.entry(*node).or_default() += room;
        }
        let room = |index: usize| {
            (Reverse(nodes[&place(index).0]), place(index).0, Reverse(rooms[&place(index)]), place(index).1)
        };
        let close = |index: &usize| {
            let beside = near.iter().any(|other| place(*other) == place(*index));
            let away = near.iter().map(|other| other.abs_diff(*index)).min().unwrap_or(0);
            (!near.contains(index), !beside, room(*index), away, *index)
        };
        // Where cores differ in size, only the largest first find every sum.
        let largest = |index: &usize| (Reverse(self.topology.cores[*index].size()), *index);
        let mut orders = [(); 3].map(|()| group.iter().copied().collect::<Vec<_>>());
        orders[0].sort_by_key(close);
        orders[1].sort_by_key(|index| (room(*index), *index));
        orders[2].sort_by_key(largest);
        let found = orders.iter().filter_map(|order| self.take(cpus, order));
        found.min_by_key(|cores| (self.spread(cores), near.difference(cores).count()))
    }

    fn take(&self, cpus: u64, order: &[usize]) -> Option<Cores> {
        let mut left = cpus;
        let mut cores = Cores::new();
        for index in order {
            let size = self.topology.cores[*index].size();
            if size <= left {
                left -= size;
                cores.insert(*index);
            }
        }
        (left == 0).then_some(cores)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::host::topology::HostCore;

    /// `nodes` × `caches` × `cores` × `threads`, CPUs numbered in that order.
    fn host(nodes: u32, caches: u32, cores: u32, threads: u32) -> Topology {
        let core = |number: u32| HostCore {
            cpus: (number * threads..(number + 1) * threads).collect(),
            cache: number / cores * cores * threads,
            node: number / (cores * caches),
            whole: true,
        };
        Topology { cores: (0..nodes * caches * cores).map(core).collect(), outside: 0 }
    }

    fn list(text: &str) -> CpuList {
        text.parse().unwrap()
    }

    fn wishes(wishes: &[(&str, u64, &str)]) -> BTreeMap<String, Wish> {
        let wish = |(name, cpus, now): &(&str, u64, &str)| {
            ((*name).to_owned(), Wish { cpus: *cpus, now: Some(list(now)).filter(|now| !now.0.is_empty()) })
        };
        wishes.iter().map(wish).collect()
    }

    fn shown(placement: &Placement) -> String {
        let places = placement.places.iter().map(|(name, cpus)| format!("{name} {cpus}"));
        places.chain([format!("rest {}", placement.rest)]).collect::<Vec<_>>().join("; ")
    }

    fn placed(topology: &Topology, asked: &[(&str, u64, &str)]) -> String {
        shown(&place(topology, 250, &wishes(asked)))
    }

    #[test]
    fn siblings_go_together_and_the_lowest_core_is_kept() {
        let smt = host(1, 1, 4, 2);
        assert_eq!(placed(&smt, &[("web", 2, "")]), "web 2-3; rest 0-1,4-7");
        assert_eq!(placed(&smt, &[("web", 4, ""), ("db", 2, "")]), "db 6-7; web 2-5; rest 0-1");
        let half = place(&smt, 250, &wishes(&[("web", 3, "")]));
        assert!(half.refused.contains("web") && half.rest == smt.cpus(), "{half:?}");
        let reserve = place(&smt, 2001, &wishes(&[("web", 4, "")]));
        assert_eq!(shown(&reserve), "web 4-7; rest 0-3");
    }

    #[test]
    fn a_cache_that_just_suffices_is_taken_before_a_larger_one() {
        let two = host(1, 2, 4, 1);
        // The kept core leaves three in the first cache, four in the second.
        assert_eq!(placed(&two, &[("web", 3, "")]), "web 1-3; rest 0,4-7");
        assert_eq!(placed(&two, &[("web", 4, "")]), "web 4-7; rest 0-3");
        assert_eq!(placed(&two, &[("web", 5, "")]), "web 1,4-7; rest 0,2-3");
        assert_eq!(placed(&host(2, 2, 2, 1), &[("web", 4, "")]), "web 4-7; rest 0-3");
    }

    #[test]
    fn who_has_a_place_keeps_it() {
        let two = host(1, 2, 4, 1);
        assert_eq!(placed(&two, &[("a", 2, "6-7"), ("b", 1, "3")]), "a 6-7; b 3; rest 0-2,4-5");
        // More is taken beside what it has, less is taken of it.
        assert_eq!(placed(&two, &[("a", 3, "6-7")]), "a 5-7; rest 0-4");
        assert_eq!(placed(&two, &[("a", 1, "6-7")]), "a 6; rest 0-5,7");
    }

    #[test]
    fn what_is_spread_is_mended_and_nothing_else_moves() {
        let two = host(1, 2, 4, 1);
        assert_eq!(placed(&two, &[("a", 2, "3-4")]), "a 2-3; rest 0-1,4-7");
        // There is a cache for c only if a gives way, which is as well off elsewhere.
        let asked = [("a", 1, "1"), ("b", 2, "4-5"), ("c", 3, "2-3,6")];
        assert_eq!(placed(&two, &asked), "a 6; b 4-5; c 1-3; rest 0,7");
    }

    #[test]
    fn a_host_that_shrinks_leaves_whom_it_can_and_gives_all_a_rest() {
        let small = Topology { outside: 6, ..host(1, 1, 2, 1) };
        let placement = place(&small, 2000, &wishes(&[("a", 1, "7"), ("b", 1, "1")]));
        assert_eq!((shown(&placement).as_str(), placement.refused.len()), ("b 1; rest 0", 1));
        let one = place(&Topology { outside: 1, ..host(1, 1, 1, 1) }, 250, &wishes(&[("a", 1, "1")]));
        assert_eq!((shown(&one).as_str(), one.refused.contains("a")), ("rest 0", true));
    }

    #[test]
    fn cores_in_part_are_for_all_others() {
        let mut part = host(1, 1, 3, 2);
        part.cores[1].whole = false;
        part.cores[1].cpus.0.pop_first();
        assert_eq!(placed(&part, &[("a", 4, "")]), "a 0-1,4-5; rest 3");
        assert_eq!(dedicable_cpus(&part, 250), 4);
        assert_eq!(dedicable_cpus(&part, 1001), 2);
    }

    #[test]
    fn cores_of_several_sizes_make_every_sum() {
        let mut hybrid = host(1, 1, 6, 2);
        for core in &mut hybrid.cores[3..] {
            core.cpus.0.pop_last();
        }
        for cpus in 1..=7 {
            let placement = place(&hybrid, 250, &wishes(&[("a", cpus, "")]));
            assert_eq!(placement.places["a"].0.len() as u64, cpus);
        }
    }

    fn topologies() -> impl Strategy<Value = Topology> {
        (1u32..3, 1u32..4, 1u32..5, 1u32..3, any::<u64>()).prop_map(
            |(nodes, caches, cores, threads, gone)| {
                let mut topology = host(nodes, caches, cores, threads);
                for (index, core) in topology.cores.iter_mut().enumerate() {
                    if gone >> (index % 64) & 7 == 7 && core.cpus.0.len() > 1 {
                        core.cpus.0.pop_last();
                        core.whole = gone >> (index % 61) & 1 == 0;
                    }
                }
                topology
            },
        )
    }

    fn asked() -> impl Strategy<Value = Vec<u64>> {
        proptest::collection::vec(0u64..7, 0..7)
    }

    fn wished(sizes: &[u64], now: &Placement) -> BTreeMap<String, Wish> {
        let wish = |(index, cpus): (usize, &u64)| {
            let name = format!("m{index}");
            let now = now.places.get(&name).cloned();
            (name, Wish { cpus: *cpus, now })
        };
        sizes.iter().enumerate().map(wish).collect()
    }

    fn check(topology: &Topology, reserved: u64, wishes: &BTreeMap<String, Wish>) -> Placement {
        let placement = place(topology, reserved, wishes);
        let mut seen = placement.rest.0.clone();
        assert!(!seen.is_empty(), "the rest is never empty");
        for (name, cpus) in &placement.places {
            assert_eq!(cpus.0.len() as u64, wishes[name].cpus);
            for cpu in &cpus.0 {
                assert!(seen.insert(*cpu), "{cpu} is given twice");
            }
            for core in topology.cores.iter().filter(|core| !core.cpus.0.is_disjoint(&cpus.0)) {
                assert!(core.whole && core.cpus.0.is_subset(&cpus.0), "{name} has half a core");
            }
        }
        assert_eq!(CpuList(seen), topology.cpus(), "every CPU is somebody's");
        assert_eq!(placement.places.len() + placement.refused.len(), wishes.len());
        let reserved = reserved.div_ceil(1000).saturating_sub(topology.outside);
        assert!(placement.rest.0.len() as u64 >= reserved.min(topology.cpus().0.len() as u64));
        placement
    }

    proptest! {
        #[test]
        fn sets_are_disjoint_whole_and_stable(topology in topologies(), reserved in 0u64..4000, first in asked(), then in asked()) {
            let begin = check(&topology, reserved, &wished(&first, &Placement::default()));
            // Nothing has changed: nobody moves.
            let again = check(&topology, reserved, &wished(&first, &begin));
            prop_assert_eq!(&again, &begin);
            // Others come and go: what comes of it stays as it is.
            let changed = check(&topology, reserved, &wished(&then, &begin));
            prop_assert_eq!(&check(&topology, reserved, &wished(&then, &changed)), &changed);
        }

        #[test]
        fn cores_of_one_size_refuse_nobody_for_whom_there_is_room(cores in 2u32..17, threads in 1u32..3, sizes in asked()) {
            let topology = host(1, 1, cores, threads);
            let threads = u64::from(threads);
            let sizes: Vec<u64> = sizes.iter().map(|size| (size + 1) * threads).collect();
            let placement = check(&topology, 250, &wished(&sizes, &Placement::default()));
            if sizes.iter().sum::<u64>() <= dedicable_cpus(&topology, 250) {
                prop_assert!(placement.refused.is_empty(), "{placement:?}");
            }
        }

        #[test]
        fn who_moves_makes_it_better(topology in topologies(), sizes in asked(), leave in any::<u64>()) {
            let begin = check(&topology, 250, &wished(&sizes, &Placement::default()));
            let stay: BTreeMap<String, Wish> = wished(&sizes, &begin)
                .into_iter()
                .enumerate()
                .filter(|(index, (_, wish))| leave >> index & 1 == 0 && wish.now.is_some())
                .map(|(_, wish)| wish)
                .collect();
            let after = check(&topology, 250, &stay);
            let planner = Planner { topology: &topology, wishes: &stay, all: dedicable(&topology, 250) };
            let spreads = |place: &dyn Fn(&str) -> CpuList| {
                stay.keys().map(|name| planner.spread(&planner.cores(&place(name)))).fold((0, 0), |sum: Spread, one| {
                    (sum.0 + one.0, sum.1 + one.1)
                })
            };
            prop_assert!(after.refused.is_empty());
            let (old, new) = (spreads(&|name| begin.places[name].clone()), spreads(&|name| after.places[name].clone()));
            let moved = stay.keys().any(|name| begin.places[name] != after.places[name]);
            prop_assert!(if moved { new < old } else { new == old }, "{old:?} {new:?}");
        }
    }
}
