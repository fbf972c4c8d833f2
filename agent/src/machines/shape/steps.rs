//! Which step comes next in each lane: host, disks, CPU, memory.
//!
//! A lane has one step under way at most. The same step is not repeated within [`RETRY_MSEC`], so a guest that refuses, or reports that
//! change nothing, cost next to nothing; another step goes at once, but for the balloon's, which follow a moving target.

use super::{Effect, Force, HOT_RATIO, Lane, Msec, PACE_MSEC, RETRY_MSEC, State, Step, UNPLUG_PATIENCE_MSEC};
use crate::machines::record::Desired;
use lathe_vmm::control::wire::MemoryStatus;

/// Granularity of the balloon.
const PAGE_BYTES: u64 = 4096;
/// Granularity of plugging.
const BLOCK_BYTES: u64 = 2 << 20;

/// The most memory that a guest can have until its next start: its region, and what a guest that booted with so little can carry.
pub fn memory_limit(boot_bytes: u64, pluggable_bytes: u64) -> u64 {
    boot_bytes.saturating_add(pluggable_bytes.min(boot_bytes.saturating_mul(HOT_RATIO)))
}

impl Lane {
    /// When `step` may be taken.
    fn gate(&self, step: &Step) -> Msec {
        let repeated = match &self.last {
            // The limit follows what is charged, and pages go back a little after the guest has said so.
            Some((last @ Step::SetWall(_), at)) if last == step => at.saturating_add(PACE_MSEC),
            Some((last, at)) if last == step => at.saturating_add(RETRY_MSEC),
            Some((Step::SetBalloon(_), at)) if matches!(step, Step::SetBalloon(_)) => {
                at.saturating_add(PACE_MSEC)
            }
            _ => 0,
        };
        repeated.max(self.not_before)
    }
}

impl State {
    /// When to look again, after a decision at `now`, if nothing happens; `None`: never.
    pub fn wake(&self, now: Msec) -> Option<Msec> {
        let deadline = self.operation.as_ref().and_then(|operation| operation.deadline);
        let gate = |lane: &Lane, step: Option<Step>| match (lane.busy, step) {
            (None, Some(step)) => Some(lane.gate(&step)),
            _ => None,
        };
        let waits = |at: Msec| (self.memory_step(at), self.operation.is_some() && self.memory_rests(at));
        let patience =
            (now < self.patience_ends() && waits(now) != waits(Msec::MAX)).then(|| self.patience_ends());
        let gates = [
            gate(&self.host, self.host_step()),
            gate(&self.disks, self.disks_step()),
            gate(&self.cpu, self.cpu_step()),
            gate(&self.memory, self.memory_step(now)),
            patience,
            deadline,
        ];
        gates.into_iter().flatten().min()
    }

    /// The host has something to do at once.
    pub(super) fn host_is_behind(&self, now: Msec) -> bool {
        self.host.busy.is_some() || self.host_step().is_some_and(|step| self.host.gate(&step) <= now)
    }

    pub(super) fn next_steps(&mut self, now: Msec, effects: &mut Vec<Effect>) {
        // Each lane sees what the one before it has begun: nothing grows in the guest before its wall has.
        if let Some(step) = self.host_step() {
            self.host = self.issue(now, self.host.clone(), step, effects);
        }
        if let Some(step) = self.disks_step() {
            self.disks = self.issue(now, self.disks.clone(), step, effects);
        }
        if let Some(step) = self.cpu_step() {
            self.cpu = self.issue(now, self.cpu.clone(), step, effects);
        }
        if let Some(step) = self.memory_step(now) {
            self.memory = self.issue(now, self.memory.clone(), step, effects);
        }
    }

    fn issue(&mut self, now: Msec, lane: Lane, step: Step, effects: &mut Vec<Effect>) -> Lane {
        if lane.busy.is_some() || now < lane.gate(&step) {
            return lane;
        }
        self.steps += 1;
        effects.push(Effect::Step(self.steps, step.clone()));
        Lane { busy: Some(self.steps), last: Some((step, now)), ..lane }
    }

    /// The wall first when it falls on CPU, then what growing waits for.
    fn host_step(&self) -> Option<Step> {
        let force = self.force.as_ref()?;
        let vcpus = match &force.cpus {
            Some(cpus) => cpus.present.max(self.vcpus_wanted()),
            None => force.boot_cpus,
        };
        if force.quota != Some((self.desired.cpu_milli, vcpus)) {
            return Some(Step::SetQuota { cpu_milli: self.desired.cpu_milli, vcpus });
        }
        if force.net_bit_per_sec != Some(self.desired.net_bit_per_sec) {
            return Some(Step::SetRates(self.desired.net_bit_per_sec));
        }
        let Desired { tier, memory_bytes, .. } = self.desired;
        if force.standing.is_none_or(|now| (now.tier, now.memory_bytes) != (tier, memory_bytes)) {
            return Some(Step::SetTier { tier, memory_bytes });
        }
        if let Some(cpus) = &force.cpus
            && force.placed < cpus.vcpu_tids.len()
        {
            return Some(Step::Place(cpus.vcpu_tids.get(force.placed..).unwrap_or_default().to_vec()));
        }
        let wall = self.wall_wanted()?;
        (force.wall_bytes != Some(wall)).then_some(Step::SetWall(wall))
    }

    /// A lane of its own: no guest has a part in it, and no wall waits for a monitor.
    fn disks_step(&self) -> Option<Step> {
        let in_force = self.force.as_ref()?.iops?;
        (in_force != self.desired.iops).then_some(Step::SetIops(self.desired.iops))
    }

    /// Room for what the guest may take and for what it is about to be offered.
    fn wall_wanted(&self) -> Option<u64> {
        let force = self.force.as_ref()?;
        Some(self.may_hold(force).max(self.memory_goal().unwrap_or(force.boot_bytes)))
    }

    /// Bytes of guest memory that the host holds, or will as soon as the guest takes what the monitor offers, or may be offering by the time
    /// that this is known.
    pub(super) fn may_hold(&self, force: &Force) -> u64 {
        let under_way = self.memory.last.as_ref().filter(|_| self.memory.busy.is_some());
        self.may_hold_after(force, under_way.map(|(step, _)| step))
    }

    /// The same if the monitor is told `step`.
    fn may_hold_after(&self, force: &Force, step: Option<&Step>) -> u64 {
        let Some(memory) = &force.memory else { return force.boot_bytes };
        let mut plugged = memory.plugged_bytes.max(memory.requested_bytes);
        let mut balloon = memory.balloon_bytes.min(memory.balloon_target_bytes);
        match step {
            Some(Step::SetPlugged(bytes)) => plugged = plugged.max(*bytes),
            Some(Step::SetBalloon(bytes)) => balloon = balloon.min(*bytes),
            _ => {}
        }
        memory.boot_bytes.saturating_add(plugged).saturating_sub(balloon)
    }

    fn cpu_step(&self) -> Option<Step> {
        let force = self.force.as_ref()?;
        let cpus = force.cpus.as_ref()?;
        let wanted = self.vcpus_wanted();
        if cpus.present < wanted {
            if cpus.vcpu_tids.len() < wanted as usize {
                return Some(Step::PrepareCpus(wanted));
            }
            // A thread that is not limited yet must not run guest code.
            return (force.placed >= cpus.vcpu_tids.len()).then_some(Step::SetCpus(wanted));
        }
        if cpus.target < wanted {
            // An ejection that is not wanted any more.
            return Some(Step::SetCpus(wanted));
        }
        let refuses = self.agent_refuses.is_some() && cpus.present > wanted;
        if force.agent && !refuses {
            let asks = cpus.present > 1 && force.online != Some(wanted) && !force.paused;
            return asks.then_some(Step::GuestCpus(wanted));
        }
        (cpus.present > wanted && !force.paused).then_some(Step::SetCpus(wanted))
    }

    /// What the guest's memory shall be, as far as that is possible without a restart.
    pub(super) fn memory_goal(&self) -> Option<u64> {
        let memory = self.force.as_ref()?.memory.as_ref()?;
        let limit = memory_limit(memory.boot_bytes, memory.pluggable_bytes);
        let goal = self.desired.memory_bytes.min(limit);
        Some(goal - goal % BLOCK_BYTES)
    }

    /// Until then the guest may take its time to unplug.
    fn patience_ends(&self) -> Msec {
        self.standing_since.saturating_add(UNPLUG_PATIENCE_MSEC)
    }

    /// Bytes that shall be in the balloon. It is not filled while the guest unplugs: it would fill with just the memory that is to be unplugged,
    /// which the guest then has to move.
    fn balloon_wanted(&self, now: Msec, memory: &MemoryStatus, goal: u64) -> u64 {
        let over = memory.boot_bytes.saturating_add(memory.plugged_bytes).saturating_sub(goal);
        let unplugs = memory.plugged_bytes > goal.saturating_sub(memory.boot_bytes);
        let patient = unplugs && memory.plug_driver && now < self.patience_ends();
        let wanted = if patient { over.min(memory.balloon_target_bytes) } else { over };
        wanted - wanted % PAGE_BYTES
    }

    /// Bytes that shall be plugged.
    fn plug_wanted(memory: &MemoryStatus, goal: u64) -> u64 {
        let plug = goal.saturating_sub(memory.boot_bytes).min(memory.pluggable_bytes);
        plug - plug % BLOCK_BYTES
    }

    /// A guest that has what it shall have stays there: its drivers have their last targets and know them. With an earlier target it would
    /// only be passing.
    ///
    /// It also rests if it has not been able to unplug any more for a while, and the balloon makes up for that. It goes on trying, and the
    /// balloon would follow.
    pub(super) fn memory_rests(&self, now: Msec) -> bool {
        let Some(memory) = self.force.as_ref().and_then(|force| force.memory.as_ref()) else { return true };
        let Some(goal) = self.memory_goal() else { return true };
        let targets = (memory.requested_bytes, memory.balloon_target_bytes);
        let last = self.memory.last.as_ref().filter(|_| self.memory.busy.is_some());
        let on_its_way = match last.map(|(step, _)| step) {
            Some(Step::SetPlugged(bytes)) => *bytes != targets.0,
            Some(Step::SetBalloon(bytes)) => *bytes != targets.1,
            _ => false,
        };
        let unplugs = memory.plugged_bytes != targets.0 && memory.plug_driver && now < self.patience_ends();
        targets == (Self::plug_wanted(memory, goal), self.balloon_wanted(now, memory, goal))
            && !(on_its_way || memory.plug_unread || memory.balloon_unread || unplugs)
    }

    fn memory_step(&self, now: Msec) -> Option<Step> {
        let force = self.force.as_ref()?;
        let memory = force.memory.as_ref()?;
        let goal = self.memory_goal()?;
        let plug = Self::plug_wanted(memory, goal);
        let balloon = self.balloon_wanted(now, memory, goal);
        // What takes comes before what gives, so that the room that giving needs is no more than the goal.
        if plug < memory.requested_bytes {
            return Some(Step::SetPlugged(plug));
        }
        if balloon > memory.balloon_target_bytes {
            return Some(Step::SetBalloon(balloon));
        }
        let gives = match (balloon < memory.balloon_target_bytes, plug > memory.requested_bytes) {
            (true, _) => Some(Step::SetBalloon(balloon)),
            (false, true) => Some(Step::SetPlugged(plug)),
            (false, false) => None,
        };
        if let Some(step) = gives {
            let room = force.wall_bytes.is_some_and(|wall| wall >= self.may_hold_after(force, Some(&step)));
            return room.then_some(step);
        }
        if plug != memory.plugged_bytes && memory.plug_driver && !force.paused {
            // Said once more: a driver that gave up for the moment tries again, and the answer says where it stands.
            return Some(Step::SetPlugged(plug));
        }
        let offline = memory.plugged_bytes > self.onlined_bytes && memory.plugged_bytes == plug;
        (offline && force.agent && !force.paused).then_some(Step::GuestMemory)
    }
}
