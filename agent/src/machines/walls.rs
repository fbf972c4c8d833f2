//! One wall around each machine, and how what it lets through is divided between its vCPUs and its monitor's own threads.
//!
//! ```text
//! machine/cpu.max          the grant: vCPUs and monitor together, always            ◄── resize, at once
//! ├─ vcpu/cpu.max          the grant less what the monitor needs, if that is much   ◄─┐ once a second:
//! └─ vmm/cpu.max           three quarters of the grant                                │ what the monitor's threads used,
//!                                                                          cpu.stat ──┘ and all of the machine
//! ```
//! A quota that only vCPUs have is no promise: device threads work for the guest as well, and a busy sender's machine would use a fifth more
//! than it is granted. A wall alone is no good either: CPUs draw on its quota as they come, so a guest that spins has used it up before its
//! device threads wake up, period after period. Hence the division. It is a forecast, never a promise: whatever it is, the machine gets its
//! grant and no more, because the wall is never moved for it. That is also why the parts may be written as often as need be (each write refills
//! the quota of the part, `Documentation/scheduler/sched-bwc.rst`, but not of the wall), and have a burst, so that being charged in coarse steps
//! costs them little.
//!
//! What the monitor's threads used in the last second is kept for them in the next. How long they waited says nothing: whoever wakes up while the
//! wall stands waits for the next period, whether it then gets on or not. The rest is settled by holding what was used against what was granted
//! over time:
//! ```text
//! owed  = owed + used - granted over time       above the slack: too much, goes off the vCPUs' part
//! vcpu  = grant - kept - owed                   below it, while a quota is reached: too little, goes to them
//! ```
//! *Too much* comes from writing the wall, which is each change of the grant: it refills the quota and forgives what threads have run over it until
//! the next tick, a hundredth of the grant or several if that is changed once a second. *Too little* comes from two quotas, one in the other,
//! charged in steps of a tick: what the outer one gives in a period in which the inner one stands is lost. A reading falls anywhere in a period and
//! a tick; so much, the slack, is neither owed nor missed. A machine that reaches no quota asks for less than its grant and misses nothing.
//!
//! Half of the grant is the guest's at least. Where less than a hundredth of it would be held back, vCPUs are held by the wall alone. The other
//! way round the monitor's threads leave a quarter, so that a flood of packets does not freeze the guest that could drop them.
//!
//! A wall of all that the vCPUs can take, or more, has a burst of a whole quota whatever the tier: time is charged in coarse steps, and a
//! quota that is all but used up in every period would hold them back. Over more than two periods it is exact all the same.
//!
//! The kernel's files are the state. A lathed that was started anew puts the wall up before it frees the vCPUs of a limit that an earlier release
//! has given them, so a machine is never without; what somebody else writes is corrected within a second or so.
//!
//! Kernel: `Documentation/scheduler/sched-bwc.rst` (hierarchical quotas: each level is charged), cgroup-v2.rst "CPU".

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use lathe_cgroup::{CpuDivision, Error, MachineTree, MilliCpu, Patch};

use crate::api::wire::Tier;
use crate::problem::Problem;

/// `cpu.max.burst` of walls that have one, percent of their quota.
const BURST_PERCENT: u8 = 100;
/// `cpu.weight` of the monitor's threads; vCPUs have 100. It counts where both want the same CPU: who serves is woken before who spins.
const WEIGHT_VMM: u32 = 1000;
/// Millionths of a CPU in a milliCPU.
const MICRO: u64 = 1000;
/// A tick of distributions' kernels (`CONFIG_HZ=250`), microseconds.
const TICK_USEC: u64 = 4000;
/// The longest period of walls from 0.1 CPU on, microseconds; the smaller ones' quota is less than theirs.
const PERIOD_USEC: u64 = 20_000;

/// What was counted of a machine until now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counted {
    /// When, microseconds on a clock that does not go backwards.
    pub at_usec: u64,
    /// CPU time of all threads, microseconds.
    pub used_usec: u64,
    /// CPU time of the monitor's own threads, microseconds.
    pub vmm_usec: u64,
    /// Periods in which the wall had been reached.
    pub wall_periods: u64,
    /// Periods in which the vCPUs had reached what they may take of it.
    pub vcpu_periods: u64,
}

/// What a machine did between two counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Seen {
    /// By all of it, microseconds of CPU time.
    used_usec: u64,
    /// By its monitor's own threads, millionths of a CPU.
    vmm: u64,
    /// A quota was reached.
    stood: bool,
}

impl Counted {
    /// What has happened since an earlier count; `None` where no time has passed, or counters began anew.
    fn since(&self, earlier: &Self) -> Option<Seen> {
        let span = self.at_usec.checked_sub(earlier.at_usec).filter(|span| *span > 0)?;
        let vmm = u128::from(self.vmm_usec.checked_sub(earlier.vmm_usec)?) * 1_000_000 / u128::from(span);
        Some(Seen {
            used_usec: self.used_usec.checked_sub(earlier.used_usec)?,
            vmm: u64::try_from(vmm).unwrap_or(u64::MAX),
            stood: self.wall_periods > earlier.wall_periods || self.vcpu_periods > earlier.vcpu_periods,
        })
    }
}

/// What a reading may be above or below what was granted until then, microseconds of CPU time.
fn slack_usec(share_milli: u64) -> u64 {
    (share_milli.saturating_mul(PERIOD_USEC) / 1000).saturating_add(TICK_USEC)
}

fn signed(usec: u64) -> i64 {
    i64::try_from(usec).unwrap_or(i64::MAX)
}

/// What is owed when so much was granted; less than nothing is missed, and no more than the slack where no quota was reached.
fn owed_after(owed_usec: i64, share_milli: u64, seen: Seen, granted_usec: u64) -> i64 {
    let slack = signed(slack_usec(share_milli));
    let most = slack.saturating_add(signed(share_milli.saturating_mul(MICRO) / 4));
    let least = if seen.stood { -most } else { -slack };
    owed_usec.saturating_add(signed(seen.used_usec)).saturating_sub(signed(granted_usec)).clamp(least, most)
}

/// What is held back from the vCPUs, millionths of a CPU: what the monitor used, and what is owed beyond the slack within a second.
fn held_back(kept: u64, owed_usec: i64, share_milli: u64) -> u64 {
    let slack = signed(slack_usec(share_milli));
    let back = if owed_usec > 0 { (owed_usec - slack).max(0) } else { (owed_usec + slack).min(0) };
    u64::try_from(signed(kept).saturating_add(back)).unwrap_or(0)
}

/// How a wall of so many milliCPU is divided when so much is held back from the vCPUs, millionths of a CPU.
fn division(share_milli: u64, held: u64) -> CpuDivision {
    let kept_milli = held.min(share_milli.saturating_mul(MICRO) / 2) / MICRO;
    let part = |milli: u64| Patch::Set(MilliCpu(milli.max(lathe_cgroup::cpu::CPU_MIN.0)));
    let free = kept_milli == 0 || kept_milli < share_milli / 100;
    CpuDivision {
        vcpu: if free { Patch::Unlimited } else { part(share_milli.saturating_sub(kept_milli)) },
        vmm: part(share_milli - share_milli / 4),
    }
}

/// The wall of a machine that is granted `cpu_milli` and has `vcpus`: the grant, and where its vCPUs alone cannot take that, a tenth more than
/// they can.
fn share_for(cpu_milli: u64, vcpus: u32) -> u64 {
    let most = most_of(vcpus);
    cpu_milli.min(most.saturating_add(most / 10))
}

/// All that so many vCPUs can take, milliCPU.
fn most_of(vcpus: u32) -> u64 {
    u64::from(vcpus).saturating_mul(1000)
}

/// What the kernel holds a machine to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct InForce {
    /// The wall, milliCPU; `None` where there is none.
    pub milli: Option<u64>,
    /// Since when it has been read back.
    pub at: Instant,
}

/// Which way a wall moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    Grows,
    /// Falls, or stays.
    Falls,
}

/// What is to be in force for one machine.
#[derive(Debug, Default)]
struct Wall {
    /// milliCPU; `None` until it was put in force, and while that has failed.
    share_milli: Option<u64>,
    /// It is all that its vCPUs can take.
    full: bool,
    /// Its tier lets it catch up; `None` until it was said.
    catches_up: Option<bool>,
    /// Kept for the monitor's threads, millionths of a CPU.
    kept: u64,
    /// Used above what was granted, microseconds of CPU time; below, where negative.
    owed_usec: i64,
    /// Held back from the vCPUs in the division that is in force, millionths of a CPU.
    held: u64,
    /// What was granted since it was counted last, microseconds of CPU time, and until when that is.
    granted_usec: u64,
    granted_until_usec: u64,
    counted: Counted,
}

impl Wall {
    /// Puts all of it in force. What is so already is only read.
    fn put(&mut self, tree: &MachineTree, share_milli: u64, change: Change) -> Result<InForce, Error> {
        let division = division(share_milli, self.held);
        if change == Change::Grows {
            // It is there once the part below the wall lets it through as well.
            tree.divide_cpu(&CpuDivision { vmm: Patch::Keep, ..division })?;
        }
        let shows = tree.set_wall(MilliCpu(share_milli))?;
        let in_force = InForce { milli: shows.map(|shows| shows.0), at: Instant::now() };
        // The rest moves nobody's grant.
        tree.set_vmm_weight(WEIGHT_VMM)?;
        tree.divide_cpu(&division)?;
        self.put_burst(tree)?;
        Ok(in_force)
    }

    /// Adds up what was granted until now.
    fn grant_until(&mut self, at_usec: u64) {
        let span = at_usec.saturating_sub(self.granted_until_usec);
        let granted = u128::from(span) * u128::from(self.share_milli.unwrap_or(0)) / 1000;
        self.granted_usec = self.granted_usec.saturating_add(u64::try_from(granted).unwrap_or(u64::MAX));
        self.granted_until_usec = self.granted_until_usec.max(at_usec);
    }

    /// Takes a count in; decides how much is held back from the vCPUs.
    fn count(&mut self, share_milli: u64, counted: Counted) {
        self.grant_until(counted.at_usec);
        let granted_usec = std::mem::take(&mut self.granted_usec);
        let before = std::mem::replace(&mut self.counted, counted);
        // The first count has nothing before it.
        let Some(seen) = counted.since(&before).filter(|_| before.at_usec > 0) else { return };
        self.kept = seen.vmm;
        self.owed_usec = owed_after(self.owed_usec, share_milli, seen, granted_usec);
        let held = held_back(self.kept, self.owed_usec, share_milli);
        // What differs by less is not worth a write.
        let step = (share_milli.saturating_mul(MICRO) / 200).max(MICRO);
        let free = |held| division(share_milli, held).vcpu == Patch::Unlimited;
        if held.abs_diff(self.held) >= step || free(held) != free(self.held) {
            self.held = held;
        }
    }

    fn put_burst(&self, tree: &MachineTree) -> Result<(), Error> {
        // Until the tier is known a burst stays that is there.
        let burst = match (self.full, self.catches_up) {
            (true, _) | (_, Some(true)) => BURST_PERCENT,
            (false, Some(false)) => 0,
            (false, None) => return Ok(()),
        };
        match tree.set_burst(burst) {
            // A comfort that a kernel may lack.
            Err(Error::Lacks { .. }) => Ok(()),
            other => other,
        }
    }
}

/// All machines' walls, by the cgroup of their unit. Who writes their files, or looks whether they are still so, has the machine's locked.
#[derive(Default)]
pub(super) struct Walls(Mutex<BTreeMap<PathBuf, Arc<Mutex<Wall>>>>);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Walls {
    fn of(&self, unit: &Path) -> Arc<Mutex<Wall>> {
        Arc::clone(lock(&self.0).entry(unit.to_path_buf()).or_default())
    }

    /// Forgets what is known of a machine that is being started: its cgroups are new.
    pub(super) fn begin(&self, tree: &MachineTree) {
        lock(&self.0).remove(tree.unit());
    }

    /// Puts the wall of a machine up, or moves it, if it is another, `at_usec` on the clock of [`Counted`]; answers what is in force.
    ///
    /// # Errors
    /// `internal`; then nobody looks after it until it has succeeded.
    pub(super) fn limit(
        &self,
        tree: &MachineTree,
        cpu_milli: u64,
        vcpus: u32,
        at_usec: u64,
    ) -> Result<InForce, Problem> {
        let failed =
            |cause| Problem::internal(format!("cannot limit CPU of {}", tree.unit().display()), cause);
        let wall = self.of(tree.unit());
        let mut wall = lock(&wall);
        let share_milli = share_for(cpu_milli, vcpus);
        wall.grant_until(at_usec);
        let before = wall.share_milli.take();
        if let Some(before) = before.filter(|before| *before > 0) {
            // The division follows at once, and is looked at within a second.
            let scaled = |part: u64| {
                let part = u128::from(part) * u128::from(share_milli) / u128::from(before);
                u64::try_from(part).unwrap_or(u64::MAX)
            };
            (wall.kept, wall.held) = (scaled(wall.kept), scaled(wall.held));
        }
        wall.full = cpu_milli >= most_of(vcpus);
        let grows = before.is_some_and(|before| before < share_milli);
        let in_force =
            wall.put(tree, share_milli, if grows { Change::Grows } else { Change::Falls }).map_err(failed)?;
        wall.share_milli = Some(share_milli);
        Ok(in_force)
    }

    /// Lets a machine whose wall is up catch up on unused time as its tier does. Twice is once.
    ///
    /// # Errors
    /// `internal`.
    pub(super) fn set_tier(&self, tree: &MachineTree, tier: Tier) -> Result<(), Problem> {
        let wall = self.of(tree.unit());
        let mut wall = lock(&wall);
        wall.catches_up = Some(tier == Tier::Guaranteed);
        wall.put_burst(tree).map_err(|cause| {
            Problem::internal(format!("cannot limit CPU of {}", tree.unit().display()), cause)
        })
    }

    /// Looks after a wall once a second: corrects what somebody else has written, and divides anew.
    ///
    /// # Errors
    /// What the kernel refused; tried again in a second.
    pub(super) fn keep(&self, tree: &MachineTree, counted: Counted) -> Result<(), Error> {
        let wall = self.of(tree.unit());
        let mut wall = lock(&wall);
        let Some(share_milli) = wall.share_milli else { return Ok(()) };
        wall.count(share_milli, counted);
        wall.put(tree, share_milli, Change::Falls).map(drop)
    }

    /// Forgets machines whose cgroup is gone.
    pub(super) fn tidy(&self) {
        lock(&self.0).retain(|unit, _| unit.exists());
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use lathe_cgroup::CpuLimits;

    use super::*;

    /// A machine's cgroups as plain files, as an earlier release left them: half a CPU for the vCPUs, none for the rest.
    struct Groups {
        folder: tempfile::TempDir,
        tree: MachineTree,
    }

    impl Groups {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let unit = folder.path().join("lathe-vm@demo.service");
            for group in ["machine", "machine/vcpu", "machine/vmm"] {
                fs::create_dir_all(unit.join(group)).unwrap();
                let max = if group == "machine/vcpu" { "5000 10000" } else { "max 100000" };
                for (name, text) in [("cpu.max", max), ("cpu.max.burst", "0"), ("cpu.weight", "100")] {
                    fs::write(unit.join(group).join(name), text).unwrap();
                }
            }
            Self { folder, tree: MachineTree::open(&unit).unwrap() }
        }

        fn limits(&self) -> CpuLimits {
            self.tree.cpu().unwrap()
        }

        /// Shares of the whole machine, its vCPUs and its monitor.
        fn shares(&self) -> [Option<u64>; 3] {
            let limits = self.limits();
            [limits.machine, limits.vcpu, limits.vmm].map(|group| group.max.map(|max| max.0))
        }
    }

    /// So many seconds in which the monitor used so many milliCPU and the machine all of 1500, the wall being reached.
    fn second(number: u64, vmm_milli: u64) -> Counted {
        Counted {
            at_usec: number * 1_000_000,
            used_usec: number * 1_500_000,
            vmm_usec: number * vmm_milli * 1000,
            wall_periods: number,
            vcpu_periods: 0,
        }
    }

    #[test]
    fn a_wall_is_the_grant_and_little_more_than_the_vcpus_can_take() {
        for (cpu_milli, vcpus, share) in
            [(250, 1, 250), (999, 1, 999), (1000, 1, 1000), (1050, 1, 1050), (1500, 2, 1500), (6000, 2, 2200)]
        {
            assert_eq!(share_for(cpu_milli, vcpus), share, "{cpu_milli} for {vcpus}");
        }
    }

    #[test]
    fn a_machine_of_an_earlier_release_gets_its_wall_before_its_vcpus_are_freed() {
        let groups = Groups::new();
        let walls = Walls::default();
        assert_eq!(walls.limit(&groups.tree, 500, 1, 0).unwrap().milli, Some(500));
        assert_eq!(groups.shares(), [Some(500), None, Some(375)]);
        assert_eq!(groups.limits().vmm.weight, WEIGHT_VMM);
        // Refused, it keeps the limit that it has.
        let groups = Groups::new();
        fs::remove_file(groups.tree.machine().join("cpu.max")).unwrap();
        let problem = Walls::default().limit(&groups.tree, 500, 1, 0).unwrap_err();
        assert!(problem.to_string().contains("cpu.max"), "{problem}");
        assert_eq!(fs::read_to_string(groups.tree.vcpu().join("cpu.max")).unwrap(), "5000 10000");
    }

    #[test]
    fn what_the_monitor_uses_the_vcpus_do_not_get_and_the_wall_never_moves() {
        let groups = Groups::new();
        let walls = Walls::default();
        walls.limit(&groups.tree, 1500, 2, 0).unwrap();
        for number in 1..=3 {
            walls.keep(&groups.tree, second(number, 200)).unwrap();
        }
        assert_eq!(groups.shares(), [Some(1500), Some(1300), Some(1125)]);
        assert_eq!(groups.limits().vcpu.burst_usec, groups.limits().vcpu.quota_usec.unwrap());
        // Another grant is divided alike at once, also in the next second.
        walls.limit(&groups.tree, 750, 2, 3_000_000).unwrap();
        assert_eq!(groups.shares(), [Some(750), Some(650), Some(563)]);
        // A monitor that sleeps leaves everything.
        let sleeps = |number: u64| Counted { at_usec: number * 1_000_000, ..second(3, 200) };
        walls.keep(&groups.tree, sleeps(4)).unwrap();
        assert_eq!(groups.shares(), [Some(750), None, Some(563)]);
    }

    #[test]
    fn who_gets_more_gets_it_below_the_wall_first() {
        let groups = Groups::new();
        let walls = Walls::default();
        walls.limit(&groups.tree, 1500, 2, 0).unwrap();
        for number in 1..=3 {
            walls.keep(&groups.tree, second(number, 200)).unwrap();
        }
        walls.limit(&groups.tree, 750, 2, 3_000_000).unwrap();
        assert_eq!(groups.shares(), [Some(750), Some(650), Some(563)]);
        // Stopped half way, it is as far as it came: what is called in force when the wall has moved is so.
        fs::remove_file(groups.tree.machine().join("cpu.max")).unwrap();
        walls.limit(&groups.tree, 1500, 2, 3_000_000).unwrap_err();
        let vcpu = || fs::read_to_string(groups.tree.vcpu().join("cpu.max")).unwrap();
        assert_eq!(vcpu(), "26000 20000");
        fs::write(groups.tree.machine().join("cpu.max"), "7500 10000").unwrap();
        walls.limit(&groups.tree, 1500, 2, 3_000_000).unwrap();
        assert_eq!(groups.shares(), [Some(1500), Some(1300), Some(1125)]);
        // Who gets less meets the wall first.
        fs::remove_file(groups.tree.vcpu().join("cpu.max")).unwrap();
        walls.limit(&groups.tree, 750, 2, 3_000_000).unwrap_err();
        assert_eq!(fs::read_to_string(groups.tree.machine().join("cpu.max")).unwrap(), "7500 10000");
    }

    #[test]
    fn what_somebody_else_writes_is_corrected() {
        let groups = Groups::new();
        let walls = Walls::default();
        fs::write(groups.tree.machine().join("cpu.max"), "7000 10000").unwrap();
        walls.keep(&groups.tree, second(1, 0)).unwrap();
        assert_eq!(groups.shares()[0], Some(700), "whose wall is not ours to say is left alone");
        walls.limit(&groups.tree, 500, 1, 0).unwrap();
        walls.set_tier(&groups.tree, Tier::Standard).unwrap();
        for (group, text) in [("", "max 100000"), ("vcpu", "1000 10000"), ("vmm", "1000 10000")] {
            fs::write(groups.tree.machine().join(group).join("cpu.max"), text).unwrap();
        }
        fs::write(groups.tree.machine().join("cpu.max.burst"), "9").unwrap();
        walls.keep(&groups.tree, second(2, 0)).unwrap();
        assert_eq!(groups.shares(), [Some(500), None, Some(375)]);
        assert_eq!(groups.limits().machine.burst_usec, 0);
        fs::remove_dir_all(groups.folder.path().join("lathe-vm@demo.service")).unwrap();
        walls.tidy();
        assert!(lock(&walls.0).is_empty());
    }

    #[test]
    fn bursts_are_for_guaranteed_machines_and_for_walls_that_vcpus_cannot_pass() {
        let groups = Groups::new();
        let walls = Walls::default();
        let burst = |of: &Groups| (of.limits().machine.quota_usec.unwrap(), of.limits().machine.burst_usec);
        walls.limit(&groups.tree, 500, 1, 0).unwrap();
        walls.set_tier(&groups.tree, Tier::Standard).unwrap();
        assert_eq!(burst(&groups), (5000, 0));
        walls.limit(&groups.tree, 1000, 1, 0).unwrap();
        assert_eq!(burst(&groups), (10_000, 10_000));
        walls.limit(&groups.tree, 400, 1, 0).unwrap();
        assert_eq!(burst(&groups), (4000, 0));
        walls.set_tier(&groups.tree, Tier::Guaranteed).unwrap();
        assert_eq!(burst(&groups), (4000, 4000));
        walls.limit(&groups.tree, 500, 1, 0).unwrap();
        assert_eq!(burst(&groups), (5000, 5000));
        walls.set_tier(&groups.tree, Tier::Harvest).unwrap();
        assert_eq!(burst(&groups), (5000, 0));
    }

    #[test]
    fn counters_that_began_anew_tell_nothing() {
        let (before, now) = (second(1, 200), second(3, 200));
        let seen = Seen { used_usec: 3_000_000, vmm: 200_000, stood: true };
        assert_eq!(now.since(&before), Some(seen));
        assert_eq!(before.since(&now), None);
        assert_eq!(Counted { used_usec: 0, ..now }.since(&before), None);
        let quiet = Counted { wall_periods: 1, ..now };
        assert_eq!(quiet.since(&before), Some(Seen { stood: false, ..seen }));
        let inside = Counted { vcpu_periods: 1, ..quiet };
        assert_eq!(inside.since(&before), Some(seen));
    }

    #[test]
    fn what_two_quotas_lose_is_given_back_down_to_the_wall_alone() {
        let share_milli = 500;
        let slack = slack_usec(share_milli) as i64;
        // The monitor uses a quarter, and a twentieth is lost as long as the vCPUs have a quota of their own.
        let (kept, mut owed, mut held) = (125_000, 0, 125_000);
        let mut used = 0;
        for _ in 0..20 {
            let lost: u64 = if held > 0 { 25_000 } else { 0 };
            let used_usec = (500_000 - held + kept).min(500_000) - lost;
            used = used_usec;
            owed = owed_after(owed, share_milli, Seen { used_usec, vmm: kept, stood: true }, 500_000);
            held = held_back(kept, owed, share_milli);
        }
        assert_eq!(used, 500_000);
        assert!(held < 125_000 && owed >= -slack - 125_000, "{held} {owed}");
        // Nothing is missed by who asks for less.
        let idle = Seen { used_usec: 1000, vmm: 0, stood: false };
        assert_eq!(owed_after(0, share_milli, idle, 500_000), -slack);
        assert_eq!(held_back(kept, -slack, share_milli), kept);
    }

    #[test]
    fn what_was_used_too_much_is_paid_back_and_what_was_saved_is_not_hoarded() {
        let groups = Groups::new();
        let walls = Walls::default();
        // Another grant each second, and each change lets it have a twentieth of a second's grant more.
        let mut used_usec = 0;
        let (mut granted_usec, mut delivered) = (0, Vec::new());
        for number in 1..=20_u64 {
            let share = if number % 2 == 0 { 500 } else { 400 };
            walls.limit(&groups.tree, share, 1, number * 1_000_000).unwrap();
            let [wall, vcpu, _] = groups.shares();
            assert_eq!(wall, Some(share));
            used_usec += (vcpu.unwrap_or(share) + share / 20) * 1000;
            granted_usec += share * 1000;
            delivered.push(used_usec as f64 / granted_usec as f64);
            let counted = Counted { at_usec: (number + 1) * 1_000_000, used_usec, ..Counted::default() };
            walls.keep(&groups.tree, counted).unwrap();
        }
        let excess = used_usec - granted_usec;
        assert!(excess <= slack_usec(500) + 500_000 / 10, "{excess} us too much after 20 s: {delivered:?}");
        // Ten seconds asleep buy no more than what readings differ by.
        let counted = Counted { at_usec: 31_000_000, used_usec, ..Counted::default() };
        walls.keep(&groups.tree, counted).unwrap();
        assert_eq!(groups.shares()[1], None);
        assert_eq!(lock(&walls.of(groups.tree.unit())).owed_usec, -(slack_usec(500) as i64));
    }

    #[test]
    fn no_part_is_smaller_than_the_kernel_takes_or_larger_than_the_wall() {
        for share_milli in [10, 11, 20, 100, 999, 1000, 100_000] {
            for kept in [0, MICRO, 10 * MICRO, share_milli * MICRO / 2] {
                let CpuDivision { vcpu, vmm } = division(share_milli, kept);
                for part in [vcpu, vmm] {
                    match part {
                        Patch::Set(MilliCpu(milli)) => assert!((10..=share_milli).contains(&milli)),
                        other => assert_eq!(other, Patch::Unlimited),
                    }
                }
            }
        }
    }
}
