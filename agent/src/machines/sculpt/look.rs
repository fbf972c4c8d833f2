//! What the sculptor is shown of a machine, and what keeps one from being touched.

use std::time::Instant;

use lathe_shard::{BitRate, Bytes, Iops, MEMORY_SHARD, MilliCpu, Shape};

use super::PERSON_REST_MSEC;
use super::kept::Numbers;
use crate::api::wire::foresight::AskedBy;
use crate::api::wire::{Cores, MachineState};
use crate::foresight::forecaster::{P50, P95, P99};
use crate::foresight::profile::Track;
use crate::foresight::{Mode, Resource};
use crate::machines::core::{Core, Entry, Shared};
use crate::machines::record::Record;
use crate::machines::sample;
use crate::machines::shape::memory_limit;
use crate::machines::spec::{MIN_CPU_MILLI, MIN_MEMORY_BYTES};
use crate::machines::view::vcpus;
use crate::sculptor::{Cycle, Machine, Outlook, RESOURCES, Sight};

/// Resources that are changed.
pub const SCULPTED: [Resource; 2] = [Resource::Cpu, Resource::Memory];
/// Seconds over which the largest demand is looked for.
const RECENT_SEC: u64 = 10;
/// A ring whose newest second is older than this tells nothing of now.
const FRESH_SEC: u64 = 3;
/// Room that a guest is left at least beside its working set, bytes: below it kernels begin to drop what they read a moment ago.
const ROOM_BYTES: u64 = 16 << 20;
/// The same as a part of the working set.
const ROOM_PART: u64 = 8;
/// Two reactions, each a turn of five seconds and the resize in a guest that has little left: seconds.
const RISE_SEC: u64 = 20;

/// A machine as the sculptor sees it.
pub struct Look {
    /// What it is shown.
    pub machine: Machine,
    /// What people are shown of that, by [`Resource`].
    pub numbers: [Numbers; RESOURCES],
    /// The revision that was looked at.
    pub revision: u64,
    /// What is decided is done.
    pub is_on: bool,
}

impl Look {
    /// Whether it would be given more at once; who would not need not be looked at before it is time.
    pub fn may_grow(&self) -> [bool; RESOURCES] {
        let free = self.is_on && !self.machine.busy;
        Resource::ALL.map(|resource| {
            let sight = self.machine.sights[resource as usize].as_ref();
            free && sight.is_some_and(|sight| sight.granted < sight.max)
        })
    }
}

/// Between what a resource may be, and in which steps.
struct Bounds {
    granted: u64,
    min: u64,
    max: u64,
    step: u64,
    /// What is wanted beyond the grant cannot be seen.
    hidden: bool,
}

/// An amount as people read it.
pub fn shown(resource: Resource, amount: u64) -> String {
    match resource {
        Resource::Cpu => MilliCpu(amount).to_string(),
        Resource::Memory => Bytes(amount).to_string(),
        Resource::Net => BitRate(amount).to_string(),
        Resource::Iops => Iops(amount).to_string(),
    }
}

/// What it is granted, in the resource's unit; 0 of net and I/O operations: without limit. Memory that is not there yet, or still there, while
/// a change goes on in the background counts as it is.
pub fn granted(shared: &Shared, resource: Resource) -> u64 {
    let desired = &shared.record.desired;
    match resource {
        Resource::Cpu => desired.cpu_milli,
        Resource::Memory => match (&shared.record.operation, &shared.force) {
            (Some(operation), Some(force)) if operation.deadline.is_none() => {
                force.held_bytes().next_multiple_of(MEMORY_SHARD.0)
            }
            _ => desired.memory_bytes,
        },
        Resource::Net => desired.net_bit_per_sec,
        Resource::Iops => desired.iops,
    }
}

/// Why a machine is left as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hold {
    /// It has no guest at work: stopped, paused, on its way up or down.
    Still(MachineState),
    /// What was decided is being carried out.
    Doing,
    /// A change is under way; whose.
    UnderWay(AskedBy),
    /// Somebody resized it; until when, milliseconds since the epoch.
    Asked(u64),
}

/// What keeps a machine from being touched, if anything does.
pub fn hold(record: &Record, doing: bool, now_msec: u64) -> Option<Hold> {
    let state = record.life.state();
    if state != MachineState::Running {
        return Some(Hold::Still(state));
    }
    if doing {
        return Some(Hold::Doing);
    }
    // What goes on in the background after a change of its own is no more than a late one.
    let own = |by: AskedBy, background: bool| by == AskedBy::Sculptor && background;
    let under_way = record.operation.as_ref().map(|operation| (operation.by, operation.deadline.is_none()));
    if let Some((by, _)) = under_way.filter(|(by, background)| !own(*by, *background)) {
        return Some(Hold::UnderWay(by));
    }
    let until = record.asked_unix_msec.saturating_add(PERSON_REST_MSEC);
    // A clock that was set back since lets nobody wait longer than that.
    let ago = now_msec.saturating_sub(record.asked_unix_msec);
    let asked = record.asked_unix_msec > 0 && ago < PERSON_REST_MSEC && record.asked_unix_msec <= now_msec;
    asked.then_some(Hold::Asked(until))
}

/// Whether what it has of a resource was asked for a time, which is not over.
pub fn is_timed(record: &Record, resource: Resource) -> bool {
    let back = record.back.unwrap_or_default();
    match resource {
        Resource::Cpu => back.cpu_milli,
        Resource::Memory => back.memory_bytes,
        Resource::Net => back.net_bit_per_sec,
        Resource::Iops => back.iops,
    }
    .is_some()
}

/// Looks at a machine. `None` for one that does not run, or is not profiled. `since` are the seconds since the last look.
pub fn look(core: &Core, entry: &Entry, now_sec: u64, since: u64) -> Option<Look> {
    let settings = entry.foresight();
    if settings.mode == Mode::Off {
        return None;
    }
    let (now_msec, at_usec) = (core.now_msec(), sample::usec(core, Instant::now()));
    let (doing, rests) = entry.sculpted(|sculpted| {
        let rests = |resource| sculpted.rests_until(resource, now_msec).is_some();
        (sculpted.doing, Resource::ALL.map(rests))
    });
    let most = core.most();
    let (name, tier, revision, held, mut bounds) = entry.with(|shared| {
        let record = &shared.record;
        let of = |resource| bounds(&most, shared, resource).filter(|_| !is_timed(record, resource));
        let hold = hold(record, doing, now_msec);
        (record.name.clone(), record.desired.tier, record.revision, hold, Resource::ALL.map(of))
    });
    if matches!(held, Some(Hold::Still(_))) {
        return None;
    }
    entry.profile(|profile| profile.look_for_cycles(now_sec));
    let mut numbers: [Numbers; RESOURCES] = Default::default();
    let sights = Resource::ALL.map(|resource| {
        let place = resource as usize;
        let now = entry.profile(|profile| {
            let track = profile.track(resource)?;
            let outlook = profile.outlook(resource, now_sec).map(|merged| merged.outlook);
            let outlook = outlook.and_then(|outlook| Outlook::of(&outlook, resource, now_sec));
            numbers[place] =
                numbers_of(track, resource, profile.now().of(resource), outlook.as_ref(), now_sec);
            let demand = asked(track, resource, now_sec, since)?;
            let wanted = profile.wanted(resource, now_sec, at_usec);
            // Who goes on filling its memory needs it while a resize is made, too; without any a guest stops for good.
            let (rise, floor) = match resource {
                Resource::Memory => (rise(track, now_sec), with_room(demand)),
                _ => (0, 0),
            };
            let cycle = profile.cycle(resource, now_sec).and_then(|seen| Cycle::of(seen, resource, now_sec));
            let ahead = (outlook, cycle, track.forecaster.held());
            Some((demand.saturating_add(rise), floor, wanted, ahead))
        });
        let (demand, floor, wanted, (outlook, cycle, held)) = now?;
        // A change that did not come about a moment ago is not asked for again at once.
        let bounds = bounds[place].take().filter(|_| !rests[place])?;
        let recent = numbers[place].recent.unwrap_or(demand);
        Some(Sight {
            granted: bounds.granted,
            min: bounds.min,
            max: bounds.max,
            step: bounds.step,
            demand,
            hidden: bounds.hidden,
            recent,
            floor,
            wanted,
            outlook,
            cycle,
            held,
        })
    });
    let aggressiveness_permille = settings.aggressiveness_permille.into();
    let machine = Machine { name, tier, aggressiveness_permille, busy: held.is_some(), sights };
    Some(Look { machine, numbers, revision, is_on: settings.mode == Mode::On })
}

/// A working set and some room.
fn with_room(bytes: u64) -> u64 {
    bytes.saturating_add((bytes / ROOM_PART).max(ROOM_BYTES))
}

/// The last `seconds` of a ring that are measured, the newest first; nothing when they are long over.
fn last(track: &Track, resource: Resource, now_sec: u64, seconds: u64) -> impl Iterator<Item = u64> {
    let ring = &track.rings.seconds;
    let newest = ring.newest().filter(|newest| now_sec.abs_diff(*newest) <= FRESH_SEC);
    let amount = move |grains: u32| u64::from(grains).saturating_mul(resource.grain());
    let steps =
        newest.into_iter().flat_map(move |newest| (0..seconds).map(move |age| newest.saturating_sub(age)));
    steps.filter_map(|second| ring.at(second)).map(amount)
}

/// How much more memory was asked for now than the least within two reactions: as much may come until a growth is in force.
fn rise(track: &Track, now_sec: u64) -> u64 {
    let mut amounts = last(track, Resource::Memory, now_sec, RISE_SEC);
    let Some(newest) = amounts.next() else { return 0 };
    newest.saturating_sub(amounts.min().unwrap_or(newest))
}

/// What was asked for since the last look: of memory the most, otherwise the mean.
fn asked(track: &Track, resource: Resource, now_sec: u64, since: u64) -> Option<u64> {
    let amounts: Vec<u64> = last(track, resource, now_sec, since).collect();
    if resource == Resource::Memory {
        return amounts.into_iter().max();
    }
    let count = amounts.len() as u64;
    (count > 0).then(|| amounts.into_iter().fold(0, u64::saturating_add).div_ceil(count))
}

fn numbers_of(
    track: &Track,
    resource: Resource,
    demand: Option<u64>,
    outlook: Option<&Outlook>,
    now_sec: u64,
) -> Numbers {
    let level = |place: usize| outlook.map(|outlook| outlook.level(place));
    Numbers {
        demand,
        recent: last(track, resource, now_sec, RECENT_SEC).max(),
        p50: level(P50),
        p95: level(P95),
        p99: level(P99),
        ahead_sec: outlook.map_or(0, |outlook| outlook.reach_msec() / 1000),
        confidence_permille: outlook.map(|outlook| outlook.confidence_permille.into()),
    }
}

/// `None`: it is not changed.
fn bounds(host: &Shape, shared: &Shared, resource: Resource) -> Option<Bounds> {
    let record = &shared.record;
    let granted = granted(shared, resource);
    let (min, max, step, hidden) = match resource {
        // Whole cores to itself are what it was made for.
        Resource::Cpu if record.cores == Cores::Shared => {
            let carried = shared.force.as_ref().map(|force| {
                let possible = force.cpus.as_ref().map_or(force.boot_cpus, |cpus| cpus.possible);
                u64::from(possible).saturating_mul(1000)
            });
            let most = record.cpu_max_milli.unwrap_or(host.cpu.0).min(carried?);
            // What a quota holds back is counted, what more vCPUs would do is not.
            let hidden = u64::from(vcpus(shared)).saturating_mul(1000) <= granted;
            (record.cpu_min_milli.unwrap_or(MIN_CPU_MILLI), most, 1, hidden)
        }
        Resource::Memory => {
            let memory = shared.force.as_ref()?.memory?;
            let boot = memory.boot_bytes;
            let carried = if memory.plug_driver { memory_limit(boot, memory.pluggable_bytes) } else { boot };
            let most = record.memory_max_bytes.unwrap_or(host.memory.0).min(carried);
            let least = record.memory_min_bytes.unwrap_or(MIN_MEMORY_BYTES);
            // A guest that would need more drops its caches, swaps or kills, and says nothing.
            (if memory.balloon_driver { least } else { least.max(boot) }, most, MEMORY_SHARD.0, true)
        }
        Resource::Cpu | Resource::Net | Resource::Iops => return None,
    };
    // What somebody has given it beyond these is not taken or forced back.
    Some(Bounds { granted, min: min.min(granted), max: max.max(granted), step, hidden })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machines::life::Life;
    use crate::machines::record::Back;
    use crate::machines::record::tests::record;
    use crate::machines::shape::{AtDeadline, Operation};

    #[test]
    fn a_person_has_the_last_word_for_ten_minutes() {
        let mut demo = record("demo");
        assert_eq!(hold(&demo, false, 1), None);
        demo.asked_unix_msec = 1_000_000;
        let until = 1_000_000 + PERSON_REST_MSEC;
        assert_eq!(hold(&demo, false, 1_000_000), Some(Hold::Asked(until)));
        assert_eq!(hold(&demo, false, until - 1), Some(Hold::Asked(until)));
        assert_eq!(hold(&demo, false, until), None);
        assert_eq!(hold(&demo, false, 5), None, "a clock that was set back");
        assert_eq!(hold(&demo, true, until), Some(Hold::Doing));
        demo.life = Life::Paused;
        assert_eq!(hold(&demo, false, until), Some(Hold::Still(MachineState::Paused)));
    }

    #[test]
    fn an_operation_is_not_disturbed_but_for_its_own_that_is_late() {
        let mut demo = record("demo");
        let mut of = |by, deadline| {
            let (target, before, at_deadline) = (demo.desired, demo.desired, AtDeadline::Keep);
            let (number, base_revision, began) = (1, 1, 0);
            demo.operation =
                Some(Operation { number, target, before, base_revision, by, began, deadline, at_deadline });
            hold(&demo, false, 9)
        };
        for by in [AskedBy::Person, AskedBy::Lathed] {
            assert_eq!(of(by, Some(10)), Some(Hold::UnderWay(by)));
            assert_eq!(of(by, None), Some(Hold::UnderWay(by)));
        }
        assert_eq!(of(AskedBy::Sculptor, Some(10)), Some(Hold::UnderWay(AskedBy::Sculptor)));
        assert_eq!(of(AskedBy::Sculptor, None), None);
    }

    #[test]
    fn what_was_asked_for_a_time_is_left_until_it_is_over() {
        let mut demo = record("demo");
        assert!(!is_timed(&demo, Resource::Cpu));
        demo.back = Some(Back { at_unix_msec: 9, memory_bytes: Some(1), ..Back::default() });
        assert_eq!(Resource::ALL.map(|resource| is_timed(&demo, resource)), [false, true, false, false]);
    }

    #[test]
    fn memory_that_is_being_filled_is_expected_to_go_on_until_a_growth_is_in_force() {
        let mut track = Track::new(Resource::Memory);
        let at = |second: u64| 1_000_000 + second;
        let pages = |mib: u32| mib << 8;
        for second in 0..10 {
            track.rings.take(at(second), pages(100));
        }
        assert_eq!(rise(&track, at(9)), 0);
        for second in 10..=25 {
            track.rings.take(at(second), pages(100 + 2 * (second as u32 - 9)));
        }
        assert_eq!(rise(&track, at(25)), 32 << 20, "all of it within the last seconds");
        for second in 26..60 {
            track.rings.take(at(second), pages(132 - (second as u32 - 26)));
        }
        assert_eq!(rise(&track, at(59)), 0, "what is freed is no rise");
        assert_eq!(rise(&track, at(59 + FRESH_SEC + 1)), 0, "long over");
    }

    #[test]
    fn a_working_set_has_room() {
        assert_eq!(with_room(32 << 20), 48 << 20);
        assert_eq!(with_room(8 << 30), 9 << 30);
        assert_eq!(with_room(u64::MAX), u64::MAX);
    }
}
