//! HTB: hierarchical token buckets (`net/sched/sch_htb.c`).

use super::{Attributes, Malformed, NANOS_PER_TICK, RATESPEC_BYTES, bytes_of, nest, ratespec, word};

const TCA_HTB_PARMS: u16 = 1;
const TCA_HTB_INIT: u16 = 2;
const TCA_HTB_RATE64: u16 = 6;
const TCA_HTB_CEIL64: u16 = 7;

const HTB_OPT_BYTES: usize = 44;
const HTB_GLOB_BYTES: usize = 20;
const HTB_XSTATS_BYTES: usize = 20;
/// `TC_HTB_PROTOVER`.
const HTB_VERSION: u32 = 3;

/// `TCA_OPTIONS` of the HTB qdisc.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HtbQdisc {
    /// Minor number of the class for what no filter has sorted.
    pub default_class: u32,
    /// Divides a rate to a quantum where a class has none.
    pub rate2quantum: u32,
}

impl HtbQdisc {
    /// The nested attributes.
    pub fn to_bytes(self) -> Vec<u8> {
        let mut glob = Vec::with_capacity(HTB_GLOB_BYTES);
        for field in [HTB_VERSION, self.rate2quantum, self.default_class, 0, 0] {
            glob.extend(field.to_ne_bytes());
        }
        nest(&[(TCA_HTB_INIT, glob)])
    }

    /// # Errors
    /// [`Malformed`].
    pub fn parse(options: &[u8]) -> Result<HtbQdisc, Malformed> {
        let glob = Attributes::parse(options, "tc_htb_glob")?.fixed(TCA_HTB_INIT, HTB_GLOB_BYTES)?;
        Ok(HtbQdisc { rate2quantum: word(glob, 4), default_class: word(glob, 8) })
    }
}

/// `TCA_OPTIONS` of an HTB class.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HtbClass {
    /// Guaranteed, bytes/s.
    pub rate_bytes_per_sec: u64,
    /// With what it may borrow, bytes/s.
    pub ceil_bytes_per_sec: u64,
    /// What may be sent at once at `rate`, in ticks.
    pub buffer_ticks: u32,
    /// What may be sent at once at `ceil`, in ticks.
    pub cbuffer_ticks: u32,
    /// Bytes for each turn when classes of one level borrow.
    pub quantum_bytes: u32,
    /// 0 is served first.
    pub prio: u32,
}

impl HtbClass {
    /// The nested attributes.
    pub fn to_bytes(self) -> Vec<u8> {
        let mut opt = Vec::with_capacity(HTB_OPT_BYTES);
        opt.extend(ratespec(self.rate_bytes_per_sec));
        opt.extend(ratespec(self.ceil_bytes_per_sec));
        for field in [self.buffer_ticks, self.cbuffer_ticks, self.quantum_bytes, 0, self.prio] {
            opt.extend(field.to_ne_bytes());
        }
        let mut attributes = vec![(TCA_HTB_PARMS, opt)];
        for (kind, rate) in
            [(TCA_HTB_RATE64, self.rate_bytes_per_sec), (TCA_HTB_CEIL64, self.ceil_bytes_per_sec)]
        {
            if rate > u64::from(u32::MAX) {
                attributes.push((kind, rate.to_ne_bytes().to_vec()));
            }
        }
        nest(&attributes)
    }

    /// What may be sent at once at the rate, bytes.
    pub fn burst_bytes(&self) -> u64 {
        bytes_of(self.buffer_ticks, self.rate_bytes_per_sec)
    }

    /// What may be sent at once at the ceiling, bytes.
    pub fn ceil_burst_bytes(&self) -> u64 {
        bytes_of(self.cbuffer_ticks, self.ceil_bytes_per_sec)
    }

    /// # Errors
    /// [`Malformed`].
    pub fn parse(options: &[u8]) -> Result<HtbClass, Malformed> {
        let attributes = Attributes::parse(options, "tc_htb_opt")?;
        let opt = attributes.fixed(TCA_HTB_PARMS, HTB_OPT_BYTES)?;
        Ok(HtbClass {
            rate_bytes_per_sec: attributes.rate(TCA_HTB_RATE64, opt, 0)?,
            ceil_bytes_per_sec: attributes.rate(TCA_HTB_CEIL64, opt, RATESPEC_BYTES)?,
            buffer_ticks: word(opt, 24),
            cbuffer_ticks: word(opt, 28),
            quantum_bytes: word(opt, 32),
            prio: word(opt, 40),
        })
    }
}

/// `struct tc_htb_xstats` of an HTB class.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HtbCounters {
    /// Packets sent within the class's own rate.
    pub lends: u32,
    /// Packets sent with a parent's.
    pub borrows: u32,
    /// Packets longer than the rate tables of old kernels knew; 0 today.
    pub giants: u32,
    /// Credit at `rate`, ticks; below zero it has been spent in advance.
    pub tokens_ticks: i32,
    /// Credit at `ceil`, ticks.
    pub ctokens_ticks: i32,
}

impl HtbCounters {
    /// As the kernel shows it.
    pub fn to_bytes(self) -> Vec<u8> {
        let tokens = [self.tokens_ticks, self.ctokens_ticks].map(i32::cast_unsigned);
        [self.lends, self.borrows, self.giants, tokens[0], tokens[1]].map(u32::to_ne_bytes).concat()
    }

    /// # Errors
    /// [`Malformed`].
    pub fn parse(bytes: &[u8]) -> Result<HtbCounters, Malformed> {
        if bytes.len() < HTB_XSTATS_BYTES {
            return Err(Malformed { what: "tc_htb_xstats" });
        }
        Ok(HtbCounters {
            lends: word(bytes, 0),
            borrows: word(bytes, 4),
            giants: word(bytes, 8),
            tokens_ticks: word(bytes, 12).cast_signed(),
            ctokens_ticks: word(bytes, 16).cast_signed(),
        })
    }

    /// [`HtbCounters::tokens_ticks`] in nanoseconds.
    pub fn tokens_nsec(self) -> i64 {
        i64::from(self.tokens_ticks) * i64::try_from(NANOS_PER_TICK).unwrap_or(64)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn class_round_trip(rate in any::<u64>(), ceil in any::<u64>(), a in any::<u32>(), b in any::<u32>(), q in any::<u32>(), prio in any::<u32>()) {
            let class = HtbClass { rate_bytes_per_sec: rate, ceil_bytes_per_sec: ceil, buffer_ticks: a, cbuffer_ticks: b, quantum_bytes: q, prio };
            prop_assert_eq!(HtbClass::parse(&class.to_bytes()), Ok(class));
        }

        #[test]
        fn qdisc_round_trip(default_class in any::<u32>(), rate2quantum in any::<u32>()) {
            let qdisc = HtbQdisc { default_class, rate2quantum };
            prop_assert_eq!(HtbQdisc::parse(&qdisc.to_bytes()), Ok(qdisc));
        }

        #[test]
        fn counters_round_trip(lends in any::<u32>(), borrows in any::<u32>(), giants in any::<u32>(), tokens_ticks in any::<i32>(), ctokens_ticks in any::<i32>()) {
            let counters = HtbCounters { lends, borrows, giants, tokens_ticks, ctokens_ticks };
            prop_assert_eq!(HtbCounters::parse(&counters.to_bytes()), Ok(counters));
        }

        #[test]
        fn hostile_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..120)) {
            let _ = (HtbClass::parse(&bytes), HtbQdisc::parse(&bytes), HtbCounters::parse(&bytes));
        }

        /// Well-formed attributes of hostile kinds and lengths get further than random bytes.
        #[test]
        fn hostile_attributes_never_panic(attributes in proptest::collection::vec((0_u16..10, proptest::collection::vec(any::<u8>(), 0..50)), 0..12)) {
            let bytes = nest(&attributes);
            let _ = (HtbClass::parse(&bytes), HtbQdisc::parse(&bytes));
        }
    }

    #[test]
    fn cut_messages_are_malformed() {
        let class = HtbClass {
            rate_bytes_per_sec: u64::MAX,
            ceil_bytes_per_sec: u64::MAX,
            buffer_ticks: 1,
            cbuffer_ticks: 1,
            quantum_bytes: 1,
            prio: 0,
        };
        let bytes = class.to_bytes();
        let whole = [48, 60, bytes.len()];
        for end in (0..=bytes.len()).filter(|end| !whole.contains(end)) {
            assert!(HtbClass::parse(&bytes[..end]).is_err(), "{end} bytes");
        }
        let counters = HtbCounters::default().to_bytes();
        assert!((0..counters.len()).all(|end| HtbCounters::parse(&counters[..end]).is_err()));
    }
}
