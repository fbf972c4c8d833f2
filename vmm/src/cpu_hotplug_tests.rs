//! The register block against a model of what may be obeyed, with guests that write whatever they like.

use super::*;
use crate::arch::x86_64::layout;
use crate::control::definition::MAX_CPUS;
use crate::gate::Wish;
use proptest::prelude::*;

fn block(target: u32, possible: u32) -> CpuHotplug {
    let parts = Parts {
        gate: Arc::default(),
        kicker: Arc::default(),
        power: Arc::new(PowerRegisters::new(Box::new(|_| {}))),
        notices: Arc::new(Notices::new().unwrap()),
    };
    parts.gate.wish(Wish::Run);
    CpuHotplug::new(parts, target, possible)
}

fn next(block: &CpuHotplug) -> u8 {
    let mut byte = [0];
    block.read(NEXT, &mut byte);
    byte[0]
}

fn events(block: &CpuHotplug) -> Vec<u8> {
    std::iter::from_fn(|| Some(next(block)).filter(|&event| event != NO_EVENT)).take(1000).collect()
}

fn status(block: &CpuHotplug, id: u32) -> u8 {
    let mut byte = [0xaa];
    block.read(id as u16, &mut byte);
    byte[0]
}

fn eject(block: &CpuHotplug, id: u32) {
    block.write(id as u16, &[EJECT]);
}

fn ost(block: &CpuHotplug, id: u32, event: u8, status: u16) {
    block.write(OST, &(id | u32::from(event) << 8 | u32::from(status) << 16).to_le_bytes());
}

fn noticed(block: &CpuHotplug) -> bool {
    block.notices.take().cpus
}

fn raised(block: &CpuHotplug) -> bool {
    block.power.read(power::EVENTS) & power::EVENT_CPUS != 0
}

fn running(block: &CpuHotplug) -> u64 {
    (0..MAX_CPUS).filter(|&id| block.gate.runs(id)).fold(0, |set, id| set | 1 << id)
}

#[test]
fn the_guest_is_told_of_what_was_plugged_and_asked_back_and_of_nothing_else() {
    let cpus = block(1, 8);
    assert!(events(&cpus).is_empty());
    cpus.aim(4, u64::MAX);
    assert!(raised(&cpus));
    assert_eq!(events(&cpus), [1, 2, 3]);
    assert_eq!((0..8).map(|id| status(&cpus, id)).collect::<Vec<_>>(), [15, 15, 15, 15, 0, 0, 0, 0]);
    (1..4).for_each(|id| ost(&cpus, id, OST_DEVICE_CHECK, OST_SUCCESS));
    assert!(noticed(&cpus));
    cpus.aim(2, u64::MAX);
    assert!(raised(&cpus));
    assert_eq!(events(&cpus), [3 | NEXT_EJECT, 2 | NEXT_EJECT], "highest first");
    eject(&cpus, 3);
    assert_eq!(cpus.census(), Census { target: 2, present: 0b111, refused: 0, missing: 0 });
    assert_eq!(running(&cpus), 0b111);
    assert!(noticed(&cpus));
}

#[test]
fn the_same_target_again_repeats_only_what_is_not_answered() {
    let cpus = block(2, 4);
    cpus.aim(4, u64::MAX);
    assert_eq!(events(&cpus), [2, 3]);
    ost(&cpus, 2, OST_DEVICE_CHECK, OST_SUCCESS);
    cpus.aim(4, u64::MAX);
    assert_eq!(events(&cpus), [3]);
    ost(&cpus, 3, OST_DEVICE_CHECK, OST_SUCCESS);
    raised(&cpus);
    cpus.aim(4, u64::MAX);
    assert!(!raised(&cpus), "there is nothing to say");
    cpus.aim(2, u64::MAX);
    assert_eq!(events(&cpus).len(), 2);
    eject(&cpus, 3);
    cpus.aim(2, u64::MAX);
    assert_eq!(events(&cpus), [2 | NEXT_EJECT]);
}

#[test]
fn a_refusal_is_reported_once_and_forgotten_when_asked_again() {
    let cpus = block(4, 4);
    cpus.aim(2, u64::MAX);
    ost(&cpus, 3, OST_EJECT_REQUEST, OST_EJECT_IN_PROGRESS);
    ost(&cpus, 1, OST_EJECT_REQUEST, 0x82);
    assert!(!noticed(&cpus) && cpus.census().refused == 0, "in progress, and not asked");
    ost(&cpus, 3, OST_EJECT_REQUEST, 0x82);
    assert!(noticed(&cpus));
    assert_eq!(cpus.census(), Census { target: 2, present: 0b1111, refused: 1, missing: 0 });
    ost(&cpus, 3, OST_EJECT_REQUEST, 0x82);
    assert!(!noticed(&cpus));
    cpus.aim(2, u64::MAX);
    assert_eq!(cpus.census().refused, 0);
}

#[test]
fn a_removal_taken_back_before_the_guest_knows_leaves_no_trace() {
    let cpus = block(4, 4);
    cpus.aim(1, u64::MAX);
    cpus.aim(4, u64::MAX);
    assert!(events(&cpus).is_empty());
    assert_eq!(cpus.census().present, 0b1111);
}

#[test]
fn vcpu_0_and_absent_ones_are_not_ejected_whatever_was_asked() {
    let cpus = block(4, 8);
    cpus.aim(1, u64::MAX);
    raised(&cpus);
    [0, 4, 7].into_iter().for_each(|id| eject(&cpus, id));
    assert_eq!((cpus.census().present, running(&cpus), raised(&cpus)), (0b1111, 0b1111, false));
}

#[test]
fn an_eject_that_crosses_the_withdrawal_of_its_request_is_obeyed_and_the_vcpu_plugged_again() {
    let cpus = block(4, 4);
    // The guest has read two requests for the same vCPU, and a third waits, when the vCPU is wanted again.
    for _ in 0..2 {
        cpus.aim(3, u64::MAX);
        assert_eq!(events(&cpus), [3 | NEXT_EJECT]);
        cpus.aim(4, u64::MAX);
    }
    cpus.aim(3, u64::MAX);
    cpus.aim(4, u64::MAX);
    assert!(events(&cpus).is_empty());
    raised(&cpus);
    eject(&cpus, 3);
    assert!(noticed(&cpus));
    assert_eq!((cpus.census().missing, running(&cpus)), (0, 0b0111));
    cpus.plug(u64::MAX);
    assert_eq!(status(&cpus, 3), 0, "not before the guest has looked");
    assert!(noticed(&cpus) && cpus.census().missing == 0b1000);
    cpus.plug(0);
    assert!(noticed(&cpus), "not before it is ready");
    cpus.plug(u64::MAX);
    assert!(raised(&cpus));
    assert_eq!((events(&cpus), cpus.census().present, running(&cpus)), (vec![3], 0b1111, 0b1111));
    eject(&cpus, 3);
    assert_eq!(cpus.census().present, 0b0111, "the second request");
    status(&cpus, 3);
    cpus.plug(u64::MAX);
    eject(&cpus, 3);
    assert_eq!(cpus.census().present, 0b1111, "there was no third one");
}

#[test]
fn registers_that_are_not_there_read_zero_and_take_nothing() {
    let cpus = block(1, 64);
    for offset in (NEXT + 1)..LENGTH {
        let mut data = [0xaa; 4];
        cpus.read(offset, &mut data);
        assert_eq!(data, [0; 4]);
        cpus.write(offset, &[EJECT]);
        cpus.write(offset, &[]);
    }
    cpus.read(0, &mut []);
    assert_eq!(cpus.census(), Census { target: 1, present: 1, refused: 0, missing: 0 });
    const _: () = assert!(NEXT as u32 == MAX_CPUS && layout::CPU_PORT.checked_add(LENGTH).is_some());
}

#[derive(Clone, Debug)]
enum Step {
    Aim(u32),
    Reboot,
    Read(u16),
    Write(u16, Vec<u8>),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let write = prop_oneof![
        4 => (0u16..9).prop_map(|offset| Step::Write(offset, vec![EJECT])),
        2 => (0u32..9, 0u8..4, prop_oneof![Just(0u16), Just(0x82), Just(0x84), any::<u16>()])
            .prop_map(|(id, event, status)| (id | u32::from(event) << 8 | u32::from(status) << 16).to_le_bytes())
            .prop_map(|bytes| Step::Write(OST, bytes.to_vec())),
        1 => (any::<u16>(), prop::collection::vec(any::<u8>(), 0..9))
            .prop_map(|(offset, data)| Step::Write(offset % (LENGTH + 4), data)),
    ];
    let step = prop_oneof![
        4 => (1u32..=8).prop_map(Step::Aim),
        1 => Just(Step::Reboot),
        4 => Just(Step::Read(NEXT)),
        1 => any::<u16>().prop_map(|offset| Step::Read(offset % (LENGTH + 4))),
        8 => write,
    ];
    prop::collection::vec(step, 0..200)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    /// Only what was asked back goes, once per request, never vCPU 0; what the guest has is what runs; what stays away is what it has
    /// not looked for since; NEXT names only vCPUs that the guest has.
    #[test]
    fn whatever_the_guest_writes(steps in steps()) {
        let cpus = block(3, 8);
        let (mut target, mut told, mut gone) = (3, [0; 8], 0);
        for step in steps {
            let before = cpus.census();
            match step {
                Step::Aim(count) => {
                    cpus.aim(count, u64::MAX);
                    target = count;
                    prop_assert_eq!(cpus.census().missing, 0);
                    prop_assert_eq!(cpus.census().present & !before.present & !first(count), 0);
                }
                Step::Reboot => {
                    cpus.adopt(target);
                    prop_assert_eq!(cpus.census().present, first(target));
                    prop_assert_eq!(next(&cpus), NO_EVENT);
                    (told, gone) = ([0; 8], 0);
                }
                Step::Read(offset) => {
                    let mut data = [0u8; 1];
                    cpus.read(offset, &mut data);
                    if offset == NEXT && data[0] != NO_EVENT {
                        let (id, asks) = (data[0] & 0x3f, data[0] & NEXT_EJECT != 0);
                        prop_assert!(before.present & (1 << id) != 0, "an event of an absent vCPU");
                        prop_assert!(!asks || u32::from(id) >= target);
                        told[usize::from(id)] += i32::from(asks);
                    }
                    prop_assert_eq!(cpus.census().present, before.present);
                }
                Step::Write(offset, data) => {
                    raised(&cpus);
                    cpus.write(offset, &data);
                    prop_assert!(offset != 0 || !raised(&cpus));
                    let went = before.present & !cpus.census().present;
                    prop_assert!(went & (first(target) | 1) == 0 || (offset != 0 && told[usize::from(offset)] > 0));
                    prop_assert!(went == 0 || (went == 1 << offset && data[0] == EJECT));
                    prop_assert_eq!(running(&cpus), cpus.census().present);
                    if went != 0 {
                        told[usize::from(offset)] -= 1;
                    }
                    gone |= went;
                    if noticed(&cpus) {
                        cpus.plug(u64::MAX);
                    }
                }
            }
            let now = cpus.census();
            prop_assert_eq!(now.target, target);
            prop_assert_eq!(first(target) & !now.present & !gone, 0);
            prop_assert_eq!(running(&cpus), now.present);
            prop_assert!(now.refused <= (now.present & !first(target)).count_ones());
        }
        prop_assert!(events(&cpus).len() <= 16);
    }
    /// A guest that does what it is told, however late and in whatever mixture with new targets, ends with what was asked for last.
    #[test]
    fn a_willing_guest_ends_where_it_shall(steps in prop::collection::vec((0u32..12, 1u32..=8), 0..300)) {
        let cpus = block(3, 8);
        let mut guest = Linux { known: first(3), ..Linux::default() };
        let mut target = 3;
        for (what, count) in steps {
            match what {
                0..4 => {
                    cpus.aim(count, u64::MAX);
                    target = count;
                }
                4..6 => guest.interrupted(&cpus),
                _ => {
                    guest.works(&cpus);
                }
            }
        }
        guest.interrupted(&cpus);
        while guest.works(&cpus) {
            guest.interrupted(&cpus);
        }
        prop_assert_eq!((guest.known, guest.stranded), (first(target), 0));
        prop_assert_eq!(cpus.census(), Census { target, present: first(target), refused: 0, missing: 0 });
    }
}

/// What Linux does with the events (drivers/acpi/scan.c, `acpi_device_hotplug`): it queues them and deals with one after the other.
#[derive(Default)]
struct Linux {
    known: u64,
    /// Offline after an eject that was refused, for good.
    stranded: u64,
    queue: std::collections::VecDeque<u8>,
}

impl Linux {
    fn interrupted(&mut self, cpus: &CpuHotplug) {
        if raised(cpus) {
            self.queue.extend(events(cpus));
        }
    }

    /// Deals with one event; says whether there was one.
    fn works(&mut self, cpus: &CpuHotplug) -> bool {
        let Some(event) = self.queue.pop_front() else { return false };
        let id = u32::from(event & 0x3f);
        if event & NEXT_EJECT != 0 {
            eject(cpus, id);
            cpus.plug(u64::MAX);
            if status(cpus, id) == PRESENT {
                self.stranded |= self.known & (1 << id);
            } else {
                self.known &= !(1 << id);
            }
            if noticed(cpus) {
                cpus.plug(u64::MAX);
            }
            ost(cpus, id, OST_EJECT_REQUEST, OST_SUCCESS);
        } else {
            let taken = self.known & (1 << id) == 0 && status(cpus, id) == PRESENT;
            self.known |= u64::from(taken) << id;
            ost(cpus, id, OST_DEVICE_CHECK, u16::from(!taken));
        }
        true
    }
}
