//! The region against a model of what the steps mean, with steps that fail.

use proptest::prelude::*;

use super::testing::{BLOCK, BLOCKS, BYTES, Fake, blocks};
use super::*;

#[derive(Clone, Debug)]
enum Action {
    Plug(Range<u64>),
    Unplug(Range<u64>),
    UnplugAll,
}

fn action() -> impl Strategy<Value = Action> {
    let range = || {
        (0..BLOCKS, 1..40u64).prop_map(|(start, length)| start * BLOCK..(start + length).min(BLOCKS) * BLOCK)
    };
    prop_oneof![
        8 => range().prop_map(Action::Plug),
        8 => range().prop_map(Action::Unplug),
        1 => Just(Action::UnplugAll),
    ]
}

fn step(region: &mut Region, known: &mut [bool], action: &Action) -> Result<Option<Refused>, TestCaseError> {
    let (range, plug) = match action {
        Action::Plug(range) => (range.clone(), true),
        Action::Unplug(range) => (range.clone(), false),
        Action::UnplugAll => (0..BYTES, false),
    };
    let fits = known[blocks(&range)].iter().all(|b| *b != plug) || matches!(action, Action::UnplugAll);
    let result = match action {
        Action::Plug(range) => region.plug(range.clone()),
        Action::Unplug(range) => region.unplug(range),
        Action::UnplugAll => region.unplug_all(),
    };
    match result {
        Ok(()) => {
            prop_assert!(fits);
            known[blocks(&range)].fill(plug);
            prop_assert_eq!(region.state(&range), if plug { Plugged::All } else { Plugged::Nothing });
            Ok(None)
        }
        Err(Refused::State) => {
            prop_assert!(!fits);
            Ok(None)
        }
        Err(other) => Ok(Some(other)),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    /// 10^5 steps in all; every step that fails on its way leaves everything as it was.
    #[test]
    fn reported_is_mapped_after_every_step(
        steps in prop::collection::vec((action(), prop::option::weighted(0.3, 0..8u32)), 60..140)
    ) {
        let fake = Fake::new();
        let mut region = Region::new(BYTES, Box::new(fake.clone()));
        let mut known = vec![false; BLOCKS as usize];
        for (action, fails) in steps {
            fake.fail(fails.unwrap_or(u32::MAX), 1);
            let refused = step(&mut region, &mut known, &action)?;
            let busy = matches!(refused, Some(Refused::Busy(_)));
            prop_assert!(refused.is_none() || busy, "{:?}", refused);
            prop_assert_eq!(busy, fake.has_failed());
            fake.fail(u32::MAX, 0);
            // What had to be opened again after a failure may have lost its content, which nobody uses.
            fake.check(region.plugged_bytes(), &known);
        }
    }

    /// When undoing fails too, it is said.
    #[test]
    fn a_region_that_cannot_go_back_says_so(
        steps in prop::collection::vec(action(), 10..30), after in 0..8u32, failures in 2..4u32
    ) {
        let fake = Fake::new();
        let mut region = Region::new(BYTES, Box::new(fake.clone()));
        let mut known = vec![false; BLOCKS as usize];
        for action in steps {
            fake.fail(after, failures);
            match step(&mut region, &mut known, &action)? {
                Some(Refused::Lost { .. }) => return Ok(()),
                Some(Refused::Busy(_)) | None => {}
                Some(other) => prop_assert!(false, "{:?}", other),
            }
            fake.fail(u32::MAX, 0);
            fake.check(region.plugged_bytes(), &known);
        }
    }
}

#[test]
fn slots_are_few_and_cover_the_region() {
    for gib in [1u64, 16, 32, 33, 64, 1024, 16 << 10] {
        let (bytes, slot) = (gib << 30, slot_bytes(gib << 30));
        assert!(bytes.div_ceil(slot) <= MAX_SLOTS && slot >= MIN_SLOT_BYTES && slot.is_power_of_two());
    }
}
