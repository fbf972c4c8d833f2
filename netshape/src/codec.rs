//! HTB and TBF as the kernel speaks them (`include/uapi/linux/pkt_sched.h`), which netlink-packet-route 0.34 does not
//! know. Plain bytes in and out; every length is checked, so a message of a newer or hostile kernel is an error, never
//! a panic.
//!
//! Both take rates twice: a 32-bit field and, above 4 GiB/s, a 64-bit attribute beside it. Times are in scheduler ticks
//! of 64 ns (`PSCHED_SHIFT` 6, shown in `/proc/net/psched`). Rate tables (`TCA_*_RTAB`) are optional since Linux 3.8 when
//! `linklayer` is set, and are left out.

use netlink_packet_core::{DefaultNla, Emitable, NlasIterator};

const TCA_HTB_PARMS: u16 = 1;
const TCA_HTB_INIT: u16 = 2;
const TCA_HTB_RATE64: u16 = 6;
const TCA_HTB_CEIL64: u16 = 7;
const TCA_TBF_PARMS: u16 = 1;
const TCA_TBF_RATE64: u16 = 4;
const TCA_TBF_BURST: u16 = 6;

const RATESPEC_BYTES: usize = 12;
const HTB_OPT_BYTES: usize = 44;
const HTB_GLOB_BYTES: usize = 20;
const TBF_QOPT_BYTES: usize = 36;
/// `TC_HTB_PROTOVER`.
const HTB_VERSION: u32 = 3;
/// `TC_LINKLAYER_ETHERNET`.
const LINKLAYER_ETHERNET: u8 = 1;
const NANOS_PER_TICK: u128 = 64;
const NANOS_PER_SEC: u128 = 1_000_000_000;

/// The kernel's bytes are not what the header file says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the kernel's {what} is too short, cut or missing")]
pub struct Malformed {
    what: &'static str,
}

/// How long `bytes` take at `rate` bytes/s, in scheduler ticks.
pub fn ticks_of(bytes: u64, bytes_per_sec: u64) -> u32 {
    let ticks = u128::from(bytes) * NANOS_PER_SEC / NANOS_PER_TICK / u128::from(bytes_per_sec.max(1));
    u32::try_from(ticks).unwrap_or(u32::MAX)
}

/// How many bytes pass in `ticks` at `rate` bytes/s.
pub fn bytes_of(ticks: u32, bytes_per_sec: u64) -> u64 {
    let bytes = u128::from(ticks) * NANOS_PER_TICK * u128::from(bytes_per_sec) / NANOS_PER_SEC;
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

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
        let glob = attribute(options, TCA_HTB_INIT).filter(|v| v.len() >= HTB_GLOB_BYTES);
        let glob = glob.ok_or(Malformed { what: "tc_htb_glob" })?;
        Ok(HtbQdisc { rate2quantum: word(&glob, 4), default_class: word(&glob, 8) })
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

    /// # Errors
    /// [`Malformed`].
    pub fn parse(options: &[u8]) -> Result<HtbClass, Malformed> {
        let opt = attribute(options, TCA_HTB_PARMS).filter(|v| v.len() >= HTB_OPT_BYTES);
        let opt = opt.ok_or(Malformed { what: "tc_htb_opt" })?;
        Ok(HtbClass {
            rate_bytes_per_sec: rate64(options, TCA_HTB_RATE64, &opt, 0),
            ceil_bytes_per_sec: rate64(options, TCA_HTB_CEIL64, &opt, RATESPEC_BYTES),
            buffer_ticks: word(&opt, 24),
            cbuffer_ticks: word(&opt, 28),
            quantum_bytes: word(&opt, 32),
            prio: word(&opt, 40),
        })
    }
}

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
        let qopt = attribute(options, TCA_TBF_PARMS).filter(|v| v.len() >= TBF_QOPT_BYTES);
        let qopt = qopt.ok_or(Malformed { what: "tc_tbf_qopt" })?;
        let rate = rate64(options, TCA_TBF_RATE64, &qopt, 0);
        let burst = match attribute(options, TCA_TBF_BURST) {
            Some(value) if value.len() >= 4 => word(&value, 0),
            _ => u32::try_from(bytes_of(word(&qopt, 28), rate)).unwrap_or(u32::MAX),
        };
        Ok(TbfQdisc { rate_bytes_per_sec: rate, limit_bytes: word(&qopt, 24), burst_bytes: burst })
    }
}

/// `struct tc_ratespec`: cell_log, linklayer, overhead, cell_align, mpu, rate.
fn ratespec(bytes_per_sec: u64) -> [u8; RATESPEC_BYTES] {
    let mut spec = [0; RATESPEC_BYTES];
    spec[1] = LINKLAYER_ETHERNET;
    let rate = u32::try_from(bytes_per_sec).unwrap_or(u32::MAX);
    spec[8..].copy_from_slice(&rate.to_ne_bytes());
    spec
}

/// The 64-bit attribute if it is there, else the rate of the ratespec at `at`.
fn rate64(options: &[u8], kind: u16, parms: &[u8], at: usize) -> u64 {
    attribute(options, kind)
        .and_then(|value| value.get(..8)?.try_into().ok())
        .map_or_else(|| u64::from(word(parms, at + 8)), u64::from_ne_bytes)
}

/// The 32-bit word at `at`; 0 beyond the end.
fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|four| four.try_into().ok()).map_or(0, u32::from_ne_bytes)
}

fn nest(attributes: &[(u16, Vec<u8>)]) -> Vec<u8> {
    let nlas: Vec<DefaultNla> =
        attributes.iter().map(|(kind, value)| DefaultNla::new(*kind, value.clone())).collect();
    let mut bytes = vec![0; nlas.as_slice().buffer_len()];
    nlas.as_slice().emit(&mut bytes);
    bytes
}

/// The first attribute of a kind among well-formed ones.
fn attribute(options: &[u8], kind: u16) -> Option<Vec<u8>> {
    NlasIterator::new(options)
        .map_while(Result::ok)
        .find(|nla| nla.kind() == kind)
        .map(|nla| nla.value().to_vec())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ticks_are_64_nanoseconds() {
        assert_eq!(ticks_of(1_000_000, 1_000_000), 15_625_000);
        assert_eq!(bytes_of(15_625_000, 1_000_000), 1_000_000);
        assert_eq!(ticks_of(u64::MAX, 1), u32::MAX);
        assert_eq!(ticks_of(1, 0), 15_625_000);
    }

    proptest! {
        #[test]
        fn htb_class_round_trip(rate in any::<u64>(), ceil in any::<u64>(), a in any::<u32>(), b in any::<u32>(), q in any::<u32>(), prio in any::<u32>()) {
            let class = HtbClass { rate_bytes_per_sec: rate, ceil_bytes_per_sec: ceil, buffer_ticks: a, cbuffer_ticks: b, quantum_bytes: q, prio };
            prop_assert_eq!(HtbClass::parse(&class.to_bytes()), Ok(class));
        }

        #[test]
        fn htb_qdisc_round_trip(default_class in any::<u32>(), rate2quantum in any::<u32>()) {
            let qdisc = HtbQdisc { default_class, rate2quantum };
            prop_assert_eq!(HtbQdisc::parse(&qdisc.to_bytes()), Ok(qdisc));
        }

        #[test]
        fn tbf_round_trip(rate in any::<u64>(), limit_bytes in any::<u32>(), burst_bytes in any::<u32>()) {
            let qdisc = TbfQdisc { rate_bytes_per_sec: rate, limit_bytes, burst_bytes };
            prop_assert_eq!(TbfQdisc::parse(&qdisc.to_bytes()), Ok(qdisc));
        }

        #[test]
        fn hostile_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..120)) {
            let _ = (HtbClass::parse(&bytes), HtbQdisc::parse(&bytes), TbfQdisc::parse(&bytes));
        }
    }

    #[test]
    fn cut_messages_are_malformed() {
        let class = HtbClass {
            rate_bytes_per_sec: 1,
            ceil_bytes_per_sec: 1,
            buffer_ticks: 1,
            cbuffer_ticks: 1,
            quantum_bytes: 1,
            prio: 0,
        };
        let bytes = class.to_bytes();
        for end in 0..bytes.len() {
            assert!(HtbClass::parse(&bytes[..end]).is_err(), "{end} bytes");
        }
    }
}
