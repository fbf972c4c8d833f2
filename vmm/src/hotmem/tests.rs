//! The region against a model of what the steps mean, with steps that fail.

use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use super::*;

const BLOCK: u64 = BLOCK_BYTES;
const BLOCKS: u64 = 160;
const BYTES: u64 = BLOCKS * BLOCK;

/// What the steps have done, by block.
#[derive(Debug)]
struct Model {
    open: Vec<bool>,
    dirty: Vec<bool>,
    slots: Vec<bool>,
    published: Vec<bool>,
    /// Steps until one fails, and how many fail then.
    fails_in: Option<u32>,
    failures: u32,
}

#[derive(Clone)]
struct Fake(Arc<Mutex<Model>>);

fn blocks(range: &Range<u64>) -> Range<usize> {
    assert!(range.start.is_multiple_of(BLOCK) && range.end.is_multiple_of(BLOCK) && range.end <= BYTES);
    (range.start / BLOCK) as usize..(range.end / BLOCK) as usize
}

impl Fake {
    fn new() -> Self {
        let none = || vec![false; BLOCKS as usize];
        let slots = vec![false; BYTES.div_ceil(slot_bytes(BYTES)) as usize];
        let (open, dirty, published) = (none(), none(), none());
        Self(Arc::new(Mutex::new(Model { open, dirty, slots, published, fails_in: None, failures: 0 })))
    }

    fn step(&self) -> io::Result<std::sync::MutexGuard<'_, Model>> {
        let mut model = self.0.lock().unwrap();
        match model.fails_in {
            Some(0) if model.failures > 0 => {
                model.failures -= 1;
                return Err(io::Error::from_raw_os_error(libc::ENOMEM));
            }
            Some(0) | None => {}
            Some(left) => model.fails_in = Some(left - 1),
        }
        Ok(model)
    }

    fn fail(&self, after: u32, failures: u32) {
        let mut model = self.0.lock().unwrap();
        (model.fails_in, model.failures) = (Some(after), failures);
    }

    /// The guest writes wherever it can.
    fn scribble(&self) {
        let mut model = self.0.lock().unwrap();
        let slot_blocks = (slot_bytes(BYTES) / BLOCK) as usize;
        for block in 0..BLOCKS as usize {
            if model.open[block] && model.slots[block / slot_blocks] {
                model.dirty[block] = true;
            }
        }
    }
}

impl Host for Fake {
    fn open(&mut self, range: &Range<u64>) -> io::Result<()> {
        self.step()?.open[blocks(range)].fill(true);
        Ok(())
    }

    fn close(&mut self, range: &Range<u64>) -> io::Result<()> {
        let mut model = self.step()?;
        assert!(!model.published[blocks(range)].contains(&true), "devices could still reach it");
        model.open[blocks(range)].fill(false);
        Ok(())
    }

    fn discard(&mut self, range: &Range<u64>) -> io::Result<()> {
        let mut model = self.step()?;
        assert!(!model.open[blocks(range)].contains(&true), "the guest could fault it in again");
        model.dirty[blocks(range)].fill(false);
        Ok(())
    }

    fn add_slot(&mut self, slot: u64, range: &Range<u64>) -> io::Result<()> {
        assert!(range.end <= BYTES && range.start == slot * slot_bytes(BYTES));
        let mut model = self.step()?;
        assert!(!std::mem::replace(&mut model.slots[slot as usize], true), "slot {slot} is there already");
        drop(model);
        self.scribble();
        Ok(())
    }

    fn remove_slot(&mut self, slot: u64) -> io::Result<()> {
        let mut model = self.step()?;
        assert!(std::mem::replace(&mut model.slots[slot as usize], false), "slot {slot} is not there");
        Ok(())
    }

    fn publish(&mut self, plugged: &RangeSet) -> io::Result<()> {
        let mut model = self.step()?;
        model.published.fill(false);
        for run in plugged.runs() {
            model.published[blocks(&run)].fill(true);
            assert!(!model.open[blocks(&run)].contains(&false), "devices would fault");
        }
        Ok(())
    }
}

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

/// Reported is mapped, exactly: for devices, for the guest, in slots, and what is unplugged holds nothing.
fn check(region: &Region, fake: &Fake, known: &[bool]) -> Result<(), TestCaseError> {
    fake.scribble();
    let model = fake.0.lock().unwrap();
    prop_assert_eq!(&model.published, known);
    prop_assert_eq!(&model.open, known);
    prop_assert_eq!(&model.dirty, known);
    prop_assert_eq!(region.plugged_bytes(), known.iter().filter(|b| **b).count() as u64 * BLOCK);
    let slot_blocks = (slot_bytes(BYTES) / BLOCK) as usize;
    for (slot, blocks) in known.chunks(slot_blocks).enumerate() {
        prop_assert_eq!(model.slots[slot], blocks.contains(&true), "slot {}", slot);
    }
    Ok(())
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
            prop_assert_eq!(busy, fake.0.lock().unwrap().failures == 0);
            fake.fail(u32::MAX, 0);
            // What had to be opened again after a failure may have lost its content, which nobody uses.
            check(&region, &fake, &known)?;
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
            check(&region, &fake, &known)?;
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
