//! What of the desired shape is not in force, in words for people.

use lathe_shard::{Bytes, Iops, MilliCpu};
use lathe_vmm::control::wire::{CpuStatus, MemoryStatus};

use super::steps::memory_limit;
use super::{Force, GIVING_MSEC, Msec, State, held_bytes};
use crate::machines::record::vcpus_for;
use crate::machines::resize::carried_milli;

/// One thing that is not as desired.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Short {
    /// In words.
    pub words: String,
    /// Nothing but a restart of the machine brings it.
    pub until_restart: bool,
}

fn waits(words: impl Into<String>) -> Short {
    Short { words: words.into(), until_restart: false }
}

fn until_restart(words: impl Into<String>) -> Short {
    Short { words: words.into(), until_restart: true }
}

/// All of them in one line.
pub fn words(shortfalls: &[Short]) -> String {
    shortfalls.iter().map(|short| short.words.as_str()).collect::<Vec<_>>().join("; ")
}

impl State {
    /// What is not in force at `now`; empty for a machine that is off: it starts with what is desired.
    pub fn shortfalls(&self, now: Msec) -> Vec<Short> {
        let mut all = Vec::new();
        let Some(force) = &self.force else { return all };
        let in_force = force.quota.is_some_and(|quota| quota.0 == self.desired.cpu_milli)
            && force.net_bit_per_sec == Some(self.desired.net_bit_per_sec)
            && force.standing.is_some_and(|standing| standing.tier == self.desired.tier);
        if !in_force {
            all.push(waits(self.trouble.clone().unwrap_or_else(|| "its limits are being set".to_owned())));
        }
        if force.standing.is_some_and(|standing| standing.tier_in_force().is_none()) {
            all.push(until_restart(
                "it was started by an older release, which left its weight among others to systemd: its tier follows at its next start",
            ));
        }
        match force.iops {
            Some(iops) if iops != self.desired.iops => {
                let cause = self.trouble.clone();
                all.push(waits(cause.unwrap_or_else(|| "the rate of its disks is being set".to_owned())));
            }
            None if self.desired.iops != 0 => all.push(until_restart(format!(
                "its monitor is of an older release and cannot limit its disks: {} follow at its next start",
                Iops(self.desired.iops)
            ))),
            _ => {}
        }
        match &force.cpus {
            Some(cpus) => self.short_cpus(force, cpus, &mut all),
            None => {
                let carried = carried_milli(self.desired.cpu_milli, force.boot_cpus);
                if carried < self.desired.cpu_milli {
                    all.push(until_restart(format!(
                        "its {} vCPUs carry {} cpu; the rest follows at its next start",
                        force.boot_cpus,
                        MilliCpu(carried)
                    )));
                }
            }
        }
        match &force.memory {
            Some(memory) => self.short_memory(now, force, memory, &mut all),
            None if force.boot_bytes != self.desired.memory_bytes => all.push(until_restart(format!(
                "it keeps {} of memory until its next start",
                Bytes(force.boot_bytes)
            ))),
            None => {}
        }
        if force.paused && all.iter().any(|short| !short.until_restart) {
            all.push(waits("it is paused, and its guest can do nothing"));
        }
        all
    }

    fn short_cpus(&self, force: &Force, cpus: &CpuStatus, all: &mut Vec<Short>) {
        let needed = vcpus_for(self.desired.cpu_milli);
        if needed > cpus.possible {
            all.push(until_restart(format!(
                "{} vCPUs at most until its next start, they carry {} cpu",
                cpus.possible,
                MilliCpu(carried_milli(self.desired.cpu_milli, cpus.possible))
            )));
        }
        let wanted = self.vcpus_wanted();
        if cpus.present < wanted {
            let cause = self.trouble.as_ref().map(|trouble| format!(": {trouble}")).unwrap_or_default();
            all.push(waits(format!("{} of {wanted} vCPUs are plugged in{cause}", cpus.present)));
        } else if force.agent {
            // vCPUs beyond those wanted may stay plugged in as long as the guest has them offline.
            if cpus.present > 1 && force.online != Some(wanted) {
                let cause =
                    self.agent_refuses.as_ref().map(|reason| format!(": {reason}")).unwrap_or_default();
                all.push(waits(format!("its guest does not have {wanted} CPUs online yet{cause}")));
            }
        } else if cpus.present > wanted {
            all.push(waits(format!(
                "its guest has not given back {} of {} vCPUs; they share {} cpu",
                cpus.present - wanted,
                cpus.present,
                MilliCpu(self.desired.cpu_milli)
            )));
        }
    }

    fn short_memory(&self, now: Msec, force: &Force, memory: &MemoryStatus, all: &mut Vec<Short>) {
        let limit = memory_limit(memory.boot_bytes, memory.pluggable_bytes);
        let goal = self.memory_goal().unwrap_or(limit);
        if self.desired.memory_bytes > limit {
            all.push(until_restart(format!(
                "{} at most without a restart: {}",
                Bytes(limit),
                why_limited(memory)
            )));
        }
        let held = held_bytes(memory);
        if held < goal {
            all.push(waits(too_little(memory, held, goal)));
        } else if held > goal {
            let gives = self.gave_at.is_some_and(|at| now < at.saturating_add(GIVING_MSEC));
            all.push(waits(too_much(memory, held, goal, gives)));
        } else if self.may_hold(force) > goal || force.wall_bytes.is_none() {
            all.push(waits(self.trouble.clone().unwrap_or_else(|| "its limits are being set".to_owned())));
        } else if !self.memory_rests(now) {
            all.push(waits(format!(
                "its guest has {} just now, but has not come to rest there",
                Bytes(goal)
            )));
        } else if let Some(over) =
            force.wall_bytes.and_then(|wall| wall.checked_sub(goal)).filter(|over| *over > 0)
        {
            // What a balloon holds is its driver's word; what is charged is the kernel's.
            all.push(waits(format!(
                "the host still holds up to {} more than its guest says it has given back",
                Bytes(over)
            )));
        }
    }
}

fn why_limited(memory: &MemoryStatus) -> String {
    if memory.pluggable_bytes < memory.boot_bytes.saturating_mul(super::HOT_RATIO) {
        "that is its --memory-max".to_owned()
    } else {
        format!("a guest that booted with {} has no room to keep account of more", Bytes(memory.boot_bytes))
    }
}

fn too_little(memory: &MemoryStatus, held: u64, goal: u64) -> String {
    let (held, goal) = (Bytes(held), Bytes(goal));
    if memory.plugged_bytes < memory.requested_bytes && !memory.plug_driver {
        return format!("its kernel has no virtio-mem driver at work: it has {held} of {goal}");
    }
    format!("its guest has taken {held} of {goal} so far")
}

fn too_much(memory: &MemoryStatus, held: u64, goal: u64, gives: bool) -> String {
    let over = Bytes(held - goal);
    if gives {
        return format!("its guest is giving memory back, and has {over} to go");
    }
    match (memory.plugged_bytes > 0, memory.plug_driver, memory.balloon_driver) {
        (_, _, false) if goal < memory.boot_bytes => {
            format!("its kernel has no balloon driver at work: {over} stay with it until its next start")
        }
        (true, true, _) => format!("{over} of the guest's memory is not movable now"),
        (true, false, _) => format!("its kernel has no virtio-mem driver at work: {over} stay with it"),
        (false, _, _) => format!("{over} of the guest's memory is in use now"),
    }
}
