//! The resource demand vector: what a machine asked for in a second, put together from what the kernel counts outside of it.
//!
//! Use is what somebody let it have; demand is what it would have had without a limit. All of it in integers:
//!
//! - **CPU**: what vCPUs and monitor used, and of the time in which a quota held its threads back (`throttled_usec`) the share of periods in
//!   which one was used up. A guest that spins is held back in every period, and all of it counts; a short burst is held back in one
//!   period and done in the next, so that what it wanted is already in what it used. Together no more than its vCPUs could run. Waiting
//!   for a CPU that others have counts as far as `machines::sight` sees it, which is up to the grant.
//! - **Memory**: the working set, `memory.current` less the page cache that nobody uses (`inactive_file`), plus what was swapped out. Guest
//!   memory is shared memory to the host, so that the guest's own page cache is in there; where its balloon tells what is available inside,
//!   the working set is no more than what it was given less that, which can only make its demand smaller.
//! - **Network**: the busier direction of its first nic: what went through its tap, and what waits before its shaper at the end.
//! - **Disks**: operations that its monitor has carried out. It does not tell which it held back, so a limit on them bounds this.
//! - **From inside** its guest agent tells of more: while all its vCPUs are busy and tasks wait for them all the same, at least one more would
//!   run in that share of the time; what it swapped out it would have kept; and while tasks wait for memory it lacks as large a share of what
//!   it has, a quarter at most. That counts up to what the machine may have, so that no word makes more of it than work would.
//!
//! Counters that run backwards have begun anew, and a reading that comes too late tells nothing of any second: then nothing is known.

use super::Resource;
use super::inside::Pressed;

/// Time between two readings above which they tell nothing of any second, microseconds.
const MAX_SPAN_USEC: u64 = 3_000_000;
/// How long a guest's own account of its memory counts, microseconds.
pub const INSIDE_FRESH_USEC: u64 = 45_000_000;
const SEC: u64 = 1_000_000;
/// Largest share of its memory that a guest is taken to lack because its tasks wait for memory, parts per thousand.
const MAX_LACK_PERMILLE: u64 = 250;

/// What is read of a machine; cumulative but for what says otherwise. Times are microseconds of one clock that does not go backwards.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reading {
    /// CPU.
    pub cpu: Option<Cpu>,
    /// Memory.
    pub memory: Option<Memory>,
    /// Towards the guest.
    pub to_guest: Option<Net>,
    /// From the guest.
    pub from_guest: Option<Net>,
    /// Disks.
    pub disks: Option<Disks>,
    /// What it lacks by its guest's account.
    pub pressed: Option<Pressed>,
}

/// CPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cpu {
    /// When.
    pub at_usec: u64,
    /// CPU time of vCPUs and monitor, microseconds.
    pub used_usec: u64,
    /// Time that its threads were held back by a quota, summed over CPUs, microseconds.
    pub throttled_usec: u64,
    /// Enforcement periods in which the whole machine used its quota up.
    pub wall_periods: u64,
    /// Enforcement periods in which the vCPUs used up what they may take of it.
    pub vcpu_periods: u64,
    /// How long a period is, microseconds.
    pub period_usec: u64,
    /// vCPUs that can run now.
    pub vcpus: u32,
    /// What it is known to have asked for of its grant in the last second, milliCPU.
    pub asked_milli: u64,
    /// What it may have at most, milliCPU.
    pub most_milli: u64,
}

/// Memory; all of it now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Charged to its cgroup, bytes.
    pub charged_bytes: u64,
    /// Of that, page cache of the host that nobody uses, bytes.
    pub inactive_file_bytes: u64,
    /// Swapped out, bytes.
    pub swapped_bytes: u64,
    /// What its balloon tells.
    pub inside: Option<Inside>,
    /// What it may have at most, bytes.
    pub most_bytes: u64,
}

/// A guest's own account of its memory, which is not to be trusted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Inside {
    /// What it was given, bytes.
    pub given_bytes: u64,
    /// What new applications could have without swapping, bytes.
    pub available_bytes: u64,
}

/// One direction of a nic.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Net {
    /// When.
    pub at_usec: u64,
    /// Bytes that went through its tap.
    pub bytes: u64,
    /// Bytes that wait before its shaper now.
    pub backlog_bytes: u64,
}

/// All disks together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Disks {
    /// When.
    pub at_usec: u64,
    /// Operations carried out.
    pub operations: u64,
}

/// What was asked for, by [`Resource`]: milliCPU, bytes, bit/s, operations per second; `None`: not known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Demand([Option<u64>; Resource::ALL.len()]);

impl Demand {
    /// Of one resource.
    pub fn of(&self, resource: Resource) -> Option<u64> {
        self.0[resource as usize]
    }

    /// Of all resources, in their order.
    pub fn new(amounts: [Option<u64>; Resource::ALL.len()]) -> Self {
        Self(amounts)
    }
}

/// `amount × by ÷ parts`, without overflow on the way; 0 parts make 0.
fn scaled(amount: u64, by: u64, parts: u64) -> u64 {
    let product = u128::from(amount) * u128::from(by);
    u64::try_from(product.checked_div(u128::from(parts)).unwrap_or(0)).unwrap_or(u64::MAX)
}

/// Time between two readings, unless it is none or too long to tell anything.
fn span(before_usec: u64, now_usec: u64) -> Option<u64> {
    now_usec.checked_sub(before_usec).filter(|span| (1..=MAX_SPAN_USEC).contains(span))
}

/// What was asked for between two readings.
pub fn demand(before: &Reading, now: &Reading) -> Demand {
    let [to_guest, from_guest] = [(before.to_guest, now.to_guest), (before.from_guest, now.from_guest)]
        .map(|(before, now)| net(before?, now?));
    let pressed = now.pressed.unwrap_or_default();
    Demand([
        before.cpu.zip(now.cpu).and_then(|(before, now)| cpu(&before, &now, &pressed)),
        now.memory.map(|memory| with_lack(&memory, &pressed)),
        to_guest.max(from_guest),
        before.disks.zip(now.disks).and_then(|(before, now)| disks(&before, &now)),
    ])
}

fn cpu(before: &Cpu, now: &Cpu, pressed: &Pressed) -> Option<u64> {
    let span_usec = span(before.at_usec, now.at_usec)?;
    let used = now.used_usec.checked_sub(before.used_usec)?;
    let throttled = now.throttled_usec.checked_sub(before.throttled_usec)?;
    // A period may be of both kinds.
    let wall = now.wall_periods.checked_sub(before.wall_periods)?;
    let periods = wall.max(now.vcpu_periods.checked_sub(before.vcpu_periods)?);
    let full_usec = periods.saturating_mul(now.period_usec).min(span_usec);
    let most = span_usec.saturating_mul(now.vcpus.into());
    let held_back = scaled(throttled, full_usec, span_usec).min(most.saturating_sub(used));
    let milli = scaled(used.saturating_add(held_back), 1000, span_usec);
    let milli = milli.max(now.asked_milli);
    // Where a vCPU is idle tasks wait for a moment and not for want of CPU.
    let busy = milli.saturating_mul(5) >= u64::from(now.vcpus).saturating_mul(4000);
    let waiting = if busy { pressed.cpu_some_permille.min(1000) } else { 0 };
    Some(milli.saturating_add(waiting).min(now.most_milli).max(milli))
}

/// The working set and what its guest lacks.
fn with_lack(memory: &Memory, pressed: &Pressed) -> u64 {
    let set = working_set(memory);
    let given = memory.inside.map_or(memory.charged_bytes, |inside| inside.given_bytes);
    let lack = scaled(given, pressed.memory_some_permille.min(MAX_LACK_PERMILLE), 1000);
    let with_lack = set.saturating_add(pressed.swapped_bytes).saturating_add(lack);
    with_lack.min(memory.most_bytes).max(set)
}

fn working_set(memory: &Memory) -> u64 {
    let outside = memory.charged_bytes.saturating_sub(memory.inactive_file_bytes);
    let outside = outside.saturating_add(memory.swapped_bytes);
    match memory.inside {
        Some(inside) => outside.min(inside.given_bytes.saturating_sub(inside.available_bytes)),
        None => outside,
    }
}

fn net(before: Net, now: Net) -> Option<u64> {
    let span_usec = span(before.at_usec, now.at_usec)?;
    let bytes = now.bytes.checked_sub(before.bytes)?.saturating_add(now.backlog_bytes);
    Some(scaled(bytes, 8 * SEC, span_usec))
}

fn disks(before: &Disks, now: &Disks) -> Option<u64> {
    let span_usec = span(before.at_usec, now.at_usec)?;
    Some(scaled(now.operations.checked_sub(before.operations)?, SEC, span_usec))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn cpu_of(used_msec: u64, throttled_msec: u64, periods: u64, vcpus: u32) -> Option<u64> {
        let before =
            Cpu { at_usec: 5 * SEC, used_usec: 77, throttled_usec: 88, vcpu_periods: 9, ..Cpu::default() };
        let now = Cpu {
            at_usec: 6 * SEC,
            used_usec: 77 + used_msec * 1000,
            throttled_usec: 88 + throttled_msec * 1000,
            wall_periods: 0,
            vcpu_periods: 9 + periods,
            period_usec: 10_000,
            vcpus,
            asked_milli: 0,
            most_milli: 0,
        };
        cpu(&before, &now, &Pressed::default())
    }

    #[test]
    fn a_spinning_guest_would_have_all_of_its_vcpus() {
        assert_eq!(cpu_of(500, 500, 100, 1), Some(1000));
        assert_eq!(cpu_of(500, 1500, 100, 2), Some(2000));
        assert_eq!(cpu_of(510, 500, 100, 1), Some(1000), "no more than its vCPUs could run");
        assert_eq!(cpu_of(300, 0, 0, 4), Some(300));
    }

    #[test]
    fn a_burst_that_is_done_in_the_next_period_wanted_what_it_used() {
        // As measured: 8 bursts of 3 ms at a tenth of a CPU.
        assert_eq!(cpu_of(24, 126, 17, 1), Some(45));
        assert_eq!(cpu_of(10, 5, 1, 1), Some(10));
    }

    #[test]
    fn waiting_for_a_cpu_that_others_have_is_demand_too() {
        let before = Cpu { at_usec: SEC, ..Cpu::default() };
        let now = Cpu { at_usec: 2 * SEC, used_usec: 300_000, asked_milli: 500, vcpus: 1, ..Cpu::default() };
        assert_eq!(cpu(&before, &now, &Pressed::default()), Some(500));
    }

    #[test]
    fn what_waits_inside_is_demand_up_to_the_bounds() {
        let before = Cpu { at_usec: SEC, ..Cpu::default() };
        let with = |used_msec: u64, vcpus, most_milli, cpu_some_permille| {
            let now =
                Cpu { at_usec: 2 * SEC, used_usec: used_msec * 1000, vcpus, most_milli, ..Cpu::default() };
            cpu(&before, &now, &Pressed { cpu_some_permille, ..Pressed::default() })
        };
        assert_eq!(with(1000, 1, 4000, 900), Some(1900), "two that spin on one vCPU");
        assert_eq!(with(1000, 1, 1500, 900), Some(1500));
        assert_eq!(with(1000, 1, 0, 900), Some(1000), "what it uses it uses, whatever it may");
        assert_eq!(with(1000, 2, 4000, 900), Some(1000), "a vCPU is idle");
        assert_eq!(with(1000, 1, u64::MAX, u64::MAX), Some(2000));
        let memory = |most_bytes, memory_some_permille, swapped_bytes| {
            let memory = Memory { charged_bytes: 1000, most_bytes, ..Memory::default() };
            with_lack(&memory, &Pressed { memory_some_permille, swapped_bytes, ..Pressed::default() })
        };
        assert_eq!([memory(4000, 0, 0), memory(4000, 100, 0), memory(4000, 1000, 500)], [1000, 1100, 1750]);
        assert_eq!([memory(1200, 1000, 500), memory(0, 1000, 500)], [1200, 1000]);
        assert_eq!(memory(u64::MAX, u64::MAX, u64::MAX), u64::MAX);
    }

    #[test]
    fn the_working_set_is_without_cold_cache_and_with_what_was_swapped_out() {
        let memory =
            Memory { charged_bytes: 900, inactive_file_bytes: 300, swapped_bytes: 50, ..Memory::default() };
        assert_eq!(working_set(&memory), 650);
        let inside = |given_bytes, available_bytes| Some(Inside { given_bytes, available_bytes });
        assert_eq!(working_set(&Memory { inside: inside(1000, 800), ..memory }), 200);
        assert_eq!(working_set(&Memory { inside: inside(1000, 100), ..memory }), 650, "it is not that much");
        assert_eq!(
            working_set(&Memory { inside: inside(1000, u64::MAX), ..memory }),
            0,
            "a lie hurts who tells it"
        );
    }

    #[test]
    fn the_busier_direction_counts_and_what_waits() {
        let net = |at_usec, bytes, backlog_bytes| Some(Net { at_usec, bytes, backlog_bytes });
        let before = Reading { to_guest: net(SEC, 0, 0), from_guest: net(SEC, 0, 99), ..Reading::default() };
        let now = Reading { to_guest: net(2 * SEC, 900, 0), from_guest: net(2 * SEC, 1000, 250), ..before };
        assert_eq!(demand(&before, &now).of(Resource::Net), Some(10_000));
        let one = Reading { from_guest: None, ..now };
        assert_eq!(demand(&before, &one).of(Resource::Net), Some(7200));
        assert_eq!(demand(&before, &one).of(Resource::Iops), None, "it has no disks");
    }

    fn readings() -> impl Strategy<Value = Reading> {
        let number = || prop_oneof![0_u64..4_000_000, any::<u64>()];
        let net = || {
            proptest::option::of((number(), number(), number())).prop_map(|net| {
                net.map(|(at_usec, bytes, backlog_bytes)| Net { at_usec, bytes, backlog_bytes })
            })
        };
        let cpu = (number(), number(), number(), number(), number(), any::<u32>());
        let cpu = cpu.prop_map(|(at_usec, used_usec, throttled_usec, vcpu_periods, period_usec, vcpus)| {
            let wall_periods = vcpu_periods / 2;
            Cpu {
                at_usec,
                used_usec,
                throttled_usec,
                wall_periods,
                vcpu_periods,
                period_usec,
                vcpus,
                asked_milli: 0,
                most_milli: 0,
            }
        });
        let disks = (number(), number()).prop_map(|(at_usec, operations)| Disks { at_usec, operations });
        (cpu, net(), net(), disks).prop_map(|(cpu, to_guest, from_guest, disks)| Reading {
            cpu: Some(cpu),
            memory: None,
            to_guest,
            from_guest,
            disks: Some(disks),
            pressed: None,
        })
    }

    proptest! {
        #[test]
        fn counters_of_any_kind_make_no_more_than_the_machine_could_ask_for(before in readings(), now in readings()) {
            let vector = demand(&before, &now);
            let (Some(earlier), Some(later)) = (before.cpu, now.cpu) else { return Ok(()) };
            if let Some(milli) = vector.of(Resource::Cpu) {
                let used = (later.used_usec - earlier.used_usec) as u128 * 1000 / (later.at_usec - earlier.at_usec) as u128;
                let vcpus = u128::from(later.vcpus) * 1000;
                prop_assert!(u128::from(milli) <= used.max(vcpus));
                prop_assert!(u128::from(milli) >= used.min(u64::MAX.into()) || milli == u64::MAX);
            }
            let span = later.at_usec.checked_sub(earlier.at_usec);
            let known = span.is_some_and(|span| (1..=MAX_SPAN_USEC).contains(&span));
            prop_assert!(known || vector.of(Resource::Cpu).is_none());
        }
    }
}
