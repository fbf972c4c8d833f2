//! TBF: one token bucket (`net/sched/sch_tbf.c`).

use super::{Attributes, Malformed, RATESPEC_BYTES, bytes_of, nest, ratespec, ticks_of, word};

const TCA_TBF_PARMS: u16 = 1;
const TCA_TBF_RATE64: u16 = 4;
const TCA_TBF_BURST: u16 = 6;

const TBF_QOPT_BYTES: usize = 36;

/// `TCA_OPTIONS` of the TBF qdisc, without a peak rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TbfQdisc {
    /// Bytes/s.
    pub rate_bytes_per_sec: u64,
    /// Length of the queue in bytes.
    pub limit_bytes: u32,
    /// What may be sent at once; a larger GSO packet is cut into its segments.
    pub burst_bytes: u32,
}

impl TbfQdisc {
    /// The nested attributes.
    pub fn to_bytes(self) -> Vec<u8> {
        let mut qopt = Vec::with_capacity(TBF_QOPT_BYTES);
        qopt.extend(ratespec(self.rate_bytes_per_sec));
        qopt.extend([0; RATESPEC_BYTES]);
        let buffer = ticks_of(self.burst_bytes.into(), self.rate_bytes_per_sec);
        for field in [self.limit_bytes, buffer, 0] {
            qopt.extend(field.to_ne_bytes());
        }
        let mut attributes =
            vec![(TCA_TBF_PARMS, qopt), (TCA_TBF_BURST, self.burst_bytes.to_ne_bytes().to_vec())];
        if self.rate_bytes_per_sec > u64::from(u32::MAX) {
            attributes.push((TCA_TBF_RATE64, self.rate_bytes_per_sec.to_ne_bytes().to_vec()));
        }
        nest(&attributes)
    }

    /// The burst is exact in what [`TbfQdisc::to_bytes`] writes; a kernel shows it as time only, which rounds.
    ///
    /// # Errors
    /// [`Malformed`].
    pub fn parse(options: &[u8]) -> Result<TbfQdisc, Malformed> {
        let attributes = Attributes::parse(options, "tc_tbf_qopt")?;
        let qopt = attributes.fixed(TCA_TBF_PARMS, TBF_QOPT_BYTES)?;
        let rate = attributes.rate(TCA_TBF_RATE64, qopt, 0)?;
        let burst = match attributes.get(TCA_TBF_BURST) {
            Some(_) => word(attributes.fixed(TCA_TBF_BURST, 4)?, 0),
            None => u32::try_from(bytes_of(word(qopt, 28), rate)).unwrap_or(u32::MAX),
        };
        Ok(TbfQdisc { rate_bytes_per_sec: rate, limit_bytes: word(qopt, 24), burst_bytes: burst })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn round_trip(rate in any::<u64>(), limit_bytes in any::<u32>(), burst_bytes in any::<u32>()) {
            let qdisc = TbfQdisc { rate_bytes_per_sec: rate, limit_bytes, burst_bytes };
            prop_assert_eq!(TbfQdisc::parse(&qdisc.to_bytes()), Ok(qdisc));
        }

        #[test]
        fn hostile_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..120)) {
            let _ = TbfQdisc::parse(&bytes);
        }

        #[test]
        fn hostile_attributes_never_panic(attributes in proptest::collection::vec((0_u16..10, proptest::collection::vec(any::<u8>(), 0..50)), 0..12)) {
            let _ = TbfQdisc::parse(&nest(&attributes));
        }
    }
}
