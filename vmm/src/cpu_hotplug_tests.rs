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
    cpus.aim(4);
    assert!(raised(&cpus));
    assert_eq!(events(&cpus), [1, 2, 3]);
    assert_eq!((0..8).map(|id| status(&cpus, id)).collect::<Vec<_>>(), [15, 15, 15, 15, 0, 0, 0, 0]);
    (1..4).for_each(|id| ost(&cpus, id, OST_DEVICE_CHECK, OST_SUCCESS));
    assert!(noticed(&cpus));
    cpus.aim(2);
    assert!(raised(&cpus));
    assert_eq!(events(&cpus), [3 | NEXT_EJECT, 2 | NEXT_EJECT], "highest first");
    eject(&cpus, 3);
    assert_eq!(cpus.census(), Census { target: 2, present: 0b111, refused: 0 });
    assert_eq!(running(&cpus), 0b111);
    assert!(noticed(&cpus));
}

#[test]
fn the_same_target_again_repeats_only_what_is_not_answered() {
    let cpus = block(2, 4);
    cpus.aim(4);
    assert_eq!(events(&cpus), [2, 3]);
    ost(&cpus, 2, OST_DEVICE_CHECK, OST_SUCCESS);
    cpus.aim(4);
    assert_eq!(events(&cpus), [3]);
    ost(&cpus, 3, OST_DEVICE_CHECK, OST_SUCCESS);
    raised(&cpus);
    cpus.aim(4);
    assert!(!raised(&cpus), "there is nothing to say");
    cpus.aim(2);
    assert_eq!(events(&cpus).len(), 2);
    eject(&cpus, 3);
    cpus.aim(2);
    assert_eq!(events(&cpus), [2 | NEXT_EJECT]);
}

#[test]
fn a_refusal_is_reported_once_and_forgotten_when_asked_again() {
    let cpus = block(4, 4);
    cpus.aim(2);
    ost(&cpus, 3, OST_EJECT_REQUEST, OST_EJECT_IN_PROGRESS);
    ost(&cpus, 1, OST_EJECT_REQUEST, 0x82);
    assert!(!noticed(&cpus) && cpus.census().refused == 0, "in progress, and not asked");
    ost(&cpus, 3, OST_EJECT_REQUEST, 0x82);
    assert!(noticed(&cpus));
    assert_eq!(cpus.census(), Census { target: 2, present: 0b1111, refused: 1 });
    ost(&cpus, 3, OST_EJECT_REQUEST, 0x82);
    assert!(!noticed(&cpus));
    cpus.aim(2);
    assert_eq!(cpus.census().refused, 0);
}

#[test]
fn a_removal_taken_back_before_the_guest_knows_leaves_no_trace() {
    let cpus = block(4, 4);
    cpus.aim(1);
    cpus.aim(4);
    assert!(events(&cpus).is_empty());
    eject(&cpus, 3);
    assert_eq!((cpus.census().present, events(&cpus)), (0b1111, vec![]));
}

#[test]
fn an_eject_that_crosses_its_own_withdrawal_is_refused_and_the_guest_gets_the_vcpu_again() {
    let cpus = block(4, 4);
    cpus.aim(3);
    assert_eq!(events(&cpus), [3 | NEXT_EJECT]);
    cpus.aim(4);
    assert!(events(&cpus).is_empty());
    raised(&cpus);
    eject(&cpus, 3);
    assert!(raised(&cpus));
    assert_eq!((events(&cpus), cpus.census().present, running(&cpus)), (vec![3], 0b1111, 0b1111));
    eject(&cpus, 3);
    assert!(events(&cpus).is_empty(), "once");
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
    assert_eq!(cpus.census(), Census { target: 1, present: 1, refused: 0 });
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

    /// Only what was asked back goes, never vCPU 0; what the guest has is what runs; nothing wanted is ever missing; NEXT names
    /// only vCPUs that have an event, each once per request.
    #[test]
    fn whatever_the_guest_writes(steps in steps()) {
        let cpus = block(3, 8);
        let mut target = 3;
        let mut due: u64 = 0;
        for step in steps {
            let before = cpus.census();
            match step {
                Step::Aim(count) => {
                    cpus.aim(count);
                    target = count;
                    prop_assert_eq!(cpus.census().present, before.present | first(count));
                    due = 16;
                }
                Step::Reboot => {
                    cpus.adopt(target);
                    prop_assert_eq!(cpus.census().present, first(target));
                    prop_assert_eq!(next(&cpus), NO_EVENT);
                }
                Step::Read(offset) => {
                    let mut data = [0u8; 1];
                    cpus.read(offset, &mut data);
                    if offset == NEXT && data[0] != NO_EVENT {
                        let (id, asks) = (data[0] & 0x3f, data[0] & NEXT_EJECT != 0);
                        prop_assert!(before.present & (1 << id) != 0, "an event of an absent vCPU");
                        prop_assert!(!asks || u32::from(id) >= target);
                    }
                    prop_assert_eq!(cpus.census(), before);
                }
                Step::Write(offset, data) => {
                    cpus.write(offset, &data);
                    let gone = before.present & !cpus.census().present;
                    prop_assert_eq!(gone & first(target), 0);
                    prop_assert!(gone == 0 || (gone == 1 << offset && data[0] == EJECT));
                    due += u64::from(raised(&cpus));
                }
            }
            let now = cpus.census();
            prop_assert_eq!(now.target, target);
            prop_assert_eq!(now.present & first(target), first(target));
            prop_assert_eq!(running(&cpus), now.present);
            prop_assert!(now.refused <= (now.present & !first(target)).count_ones());
        }
        prop_assert!(events(&cpus).len() as u64 <= due.min(16));
    }
}
