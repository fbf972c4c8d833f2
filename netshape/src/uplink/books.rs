//! What the uplink has promised, and in which order promises change: pure.
//!
//! HTB gives a class its rate whatever the others use, so rates that sum to more than the capacity would be promises on
//! somebody else's account, the host's among them. Sums are in the kernel's unit, bytes/s, to which each rate is rounded
//! up; so many bytes/s as there are classes are forgiven.

use std::collections::BTreeMap;

use super::{ClassSpec, UplinkClass};
use crate::rate::BitRate;

/// Changes of classes: set, or remove.
pub(super) type Changes = BTreeMap<UplinkClass, Option<ClassSpec>>;

/// Rates that are promised, bytes/s.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Books {
    pub(super) capacity: u64,
    pub(super) host: u64,
    pub(super) machines: BTreeMap<UplinkClass, u64>,
}

/// What does not fit, bytes/s.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Overbooked {
    pub(super) asked: u64,
    pub(super) capacity: u64,
}

/// One change of one class.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Remove(UplinkClass),
    Set(UplinkClass, ClassSpec),
}

impl Books {
    fn asked(&self) -> u64 {
        self.machines.values().fold(self.host, |sum, rate| sum.saturating_add(*rate))
    }

    /// Whether everything fits.
    pub(super) fn check(&self) -> Result<(), Overbooked> {
        let rounding = u64::try_from(self.machines.len()).unwrap_or(u64::MAX).saturating_add(1);
        let asked = self.asked();
        if asked <= self.capacity.saturating_add(rounding) {
            Ok(())
        } else {
            Err(Overbooked { asked, capacity: self.capacity })
        }
    }

    /// The steps of a change that fits when it is done, in an order in which it fits all the time: first what gives back.
    pub(super) fn plan(&self, changes: &Changes) -> Result<Vec<Step>, Overbooked> {
        let mut after = self.clone();
        let (mut gives, mut takes) = (Vec::new(), Vec::new());
        for (class, change) in changes {
            let before = self.machines.get(class).copied();
            match change {
                None => {
                    after.machines.remove(class);
                    if before.is_some() {
                        gives.push(Step::Remove(*class));
                    }
                }
                Some(spec) => {
                    let rate = spec.rate.bytes_per_sec();
                    after.machines.insert(*class, rate);
                    let steps =
                        if before.is_some_and(|before| rate <= before) { &mut gives } else { &mut takes };
                    steps.push(Step::Set(*class, *spec));
                }
            }
        }
        after.check()?;
        gives.append(&mut takes);
        Ok(gives)
    }

    /// What a capacity would mean for what is promised already.
    pub(super) fn with_capacity(&self, capacity: BitRate, host: BitRate) -> Books {
        Books {
            capacity: capacity.bytes_per_sec(),
            host: host.bytes_per_sec(),
            machines: self.machines.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The plainest model: bits in a map.
    #[derive(Default)]
    struct Model {
        capacity: u64,
        host: u64,
        rates: BTreeMap<UplinkClass, u64>,
    }

    impl Model {
        fn fits(&self) -> bool {
            self.host + self.rates.values().sum::<u64>() <= self.capacity
        }
    }

    fn spec(bits: u64) -> ClassSpec {
        ClassSpec { rate: BitRate(bits), ceil: BitRate(bits), prio: 1, share: 10 }
    }

    fn a_change() -> impl Strategy<Value = Changes> {
        let class = (0_u16..12).prop_map(|n| UplinkClass::new(n).expect("in range"));
        // Whole bytes, a thousand of them at least, so that forgiven bytes decide nothing.
        let rate = (1_u64..40).prop_map(|n| spec(n * 80_000));
        prop::collection::btree_map(class, prop::option::weighted(0.8, rate), 1..5)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1_000))]

        /// 10⁵ random changes: what fits is accepted and nothing else, and no step on the way is overbooked.
        #[test]
        fn promises_are_kept_at_every_step(changes in prop::collection::vec((a_change(), prop::option::weighted(0.1, 50_u64..250)), 100)) {
            let mut model = Model { capacity: 8_000_000, host: 800_000, rates: BTreeMap::new() };
            let mut books = Books::default().with_capacity(BitRate(model.capacity), BitRate(model.host));
            for (change, capacity) in changes {
                if let Some(capacity) = capacity {
                    let before = std::mem::replace(&mut model.capacity, capacity * 80_000);
                    let resized = books.with_capacity(BitRate(model.capacity), BitRate(model.host));
                    prop_assert_eq!(resized.check().is_ok(), model.fits());
                    if model.fits() { books = resized } else { model.capacity = before }
                }
                let before = model.rates.clone();
                for (class, change) in &change {
                    match change {
                        Some(spec) => model.rates.insert(*class, spec.rate.0),
                        None => model.rates.remove(class),
                    };
                }
                match books.plan(&change) {
                    Err(refused) => {
                        prop_assert!(!model.fits() && refused.asked > refused.capacity);
                        model.rates = before;
                    }
                    Ok(steps) => {
                        prop_assert!(model.fits());
                        for step in steps {
                            match step {
                                Step::Remove(class) => prop_assert!(books.machines.remove(&class).is_some()),
                                Step::Set(class, spec) => {
                                    books.machines.insert(class, spec.rate.bytes_per_sec());
                                }
                            }
                            prop_assert_eq!(books.check(), Ok(()));
                        }
                    }
                }
                let bits: BTreeMap<_, _> = books.machines.iter().map(|(c, bytes)| (*c, bytes * 8)).collect();
                prop_assert_eq!(&bits, &model.rates);
            }
        }

        /// What fits in bits fits in bytes, though each rate is rounded up.
        #[test]
        fn rounding_refuses_nobody(rates in prop::collection::vec(8_000_u64..1_000_000, 1..50), host in 8_000_u64..1_000_000) {
            let capacity = BitRate(host + rates.iter().sum::<u64>());
            let books = Books::default().with_capacity(capacity, BitRate(host));
            let changes: Changes = rates.iter().zip(0..).map(|(bits, n)| (UplinkClass::new(n).expect("in range"), Some(spec(*bits)))).collect();
            prop_assert!(books.plan(&changes).is_ok());
        }
    }
}
