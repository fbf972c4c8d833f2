//! A host for tests of what stands on a [`super::Region`]: it keeps books of the steps, and fails when it is told to.

use std::sync::{Arc, Mutex};

use super::*;

/// A block in bytes.
pub const BLOCK: u64 = BLOCK_BYTES;
/// Blocks of the region.
pub const BLOCKS: u64 = 160;
/// The region in bytes.
pub const BYTES: u64 = BLOCKS * BLOCK;

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

/// A host that keeps books, and fails when it is told to.
#[derive(Clone)]
pub struct Fake(Arc<Mutex<Model>>);

/// The blocks of a range.
pub fn blocks(range: &Range<u64>) -> Range<usize> {
    assert!(range.start.is_multiple_of(BLOCK) && range.end.is_multiple_of(BLOCK) && range.end <= BYTES);
    (range.start / BLOCK) as usize..(range.end / BLOCK) as usize
}

impl Fake {
    /// Nothing is plugged.
    pub fn new() -> Self {
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

    /// The step after `after` more fails, and with it `failures` in all.
    pub fn fail(&self, after: u32, failures: u32) {
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

    /// All the failures asked for have happened.
    pub fn has_failed(&self) -> bool {
        self.0.lock().unwrap().failures == 0
    }

    /// What devices reach, by block.
    pub fn published(&self) -> Vec<bool> {
        self.0.lock().unwrap().published.clone()
    }

    /// Reported is mapped, exactly: for devices, for the guest, in slots, and what is unplugged holds nothing.
    pub fn check(&self, plugged_bytes: u64, known: &[bool]) {
        self.scribble();
        let model = self.0.lock().unwrap();
        assert_eq!(&model.published, known);
        assert_eq!(&model.open, known);
        assert_eq!(&model.dirty, known);
        assert_eq!(plugged_bytes, known.iter().filter(|b| **b).count() as u64 * BLOCK);
        let slot_blocks = (slot_bytes(BYTES) / BLOCK) as usize;
        for (slot, blocks) in known.chunks(slot_blocks).enumerate() {
            assert_eq!(model.slots[slot], blocks.contains(&true), "slot {slot}");
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
