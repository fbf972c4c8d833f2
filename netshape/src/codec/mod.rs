//! What the kernel's traffic control says and hears, of kinds that netlink-packet-route 0.34 does not know. Plain bytes in
//! and out; every length is checked, so a message of a newer or hostile kernel is an error, never a panic.
//!
//! | file | what | structures in `include/uapi/linux/` |
//! |---|---|---|
//! | `htb` | queue, class, counters of a class | `pkt_sched.h`: `tc_htb_glob`, `tc_htb_opt`, `tc_htb_xstats` |
//! | `tbf` | queue | `pkt_sched.h`: `tc_tbf_qopt` |
//! | `filter` | classic `bpf` filter, `skbedit` action | `pkt_cls.h`, `filter.h`, `tc_act/tc_skbedit.h` |
//!
//! Rates are told twice: a 32-bit field and, above 4 GiB/s, a 64-bit attribute beside it. Times are in scheduler ticks
//! of 64 ns (`PSCHED_SHIFT` 6, shown in `/proc/net/psched`). Rate tables (`TCA_*_RTAB`) are optional since Linux 3.8 when
//! `linklayer` is set, and are left out.

mod filter;
mod htb;
mod tbf;

use netlink_packet_core::{DefaultNla, Emitable, NLA_TYPE_MASK};

pub use self::filter::{BpfFilter, SkbEdit};
pub use self::htb::{HtbClass, HtbCounters, HtbQdisc};
pub use self::tbf::TbfQdisc;

const RATESPEC_BYTES: usize = 12;
/// `TC_LINKLAYER_ETHERNET`.
const LINKLAYER_ETHERNET: u8 = 1;
const NANOS_PER_TICK: u128 = 64;
const NANOS_PER_SEC: u128 = 1_000_000_000;
/// No kind has more attributes.
const ATTRIBUTES_MAX: usize = 64;

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

/// `struct tc_ratespec`: cell_log, linklayer, overhead, cell_align, mpu, rate.
fn ratespec(bytes_per_sec: u64) -> [u8; RATESPEC_BYTES] {
    let mut spec = [0; RATESPEC_BYTES];
    spec[1] = LINKLAYER_ETHERNET;
    let rate = u32::try_from(bytes_per_sec).unwrap_or(u32::MAX);
    spec[8..].copy_from_slice(&rate.to_ne_bytes());
    spec
}

/// Kind and value.
type Attribute<'a> = (u16, &'a [u8]);

/// What is nested in an attribute.
struct Attributes<'a> {
    what: &'static str,
    found: Vec<Attribute<'a>>,
}

impl<'a> Attributes<'a> {
    /// All attributes are whole, and not too many.
    fn parse(bytes: &'a [u8], what: &'static str) -> Result<Attributes<'a>, Malformed> {
        let (mut found, mut rest) = (Vec::new(), bytes);
        while !rest.is_empty() {
            let (one, after) = next_attribute(rest).ok_or(Malformed { what })?;
            if found.len() == ATTRIBUTES_MAX {
                return Err(Malformed { what });
            }
            found.push(one);
            rest = after;
        }
        Ok(Attributes { what, found })
    }

    /// The first of a kind.
    fn get(&self, kind: u16) -> Option<&'a [u8]> {
        self.found.iter().find(|(found, _)| *found == kind).map(|(_, value)| *value)
    }

    /// One that must be there, and have at least so many bytes.
    fn fixed(&self, kind: u16, least_bytes: usize) -> Result<&'a [u8], Malformed> {
        self.get(kind).filter(|v| v.len() >= least_bytes).ok_or(Malformed { what: self.what })
    }

    /// The 64-bit attribute if it is there, else the rate of the ratespec at `at`.
    fn rate(&self, kind: u16, parms: &[u8], at: usize) -> Result<u64, Malformed> {
        let Some(value) = self.get(kind) else { return Ok(word(parms, at + 8).into()) };
        let eight = value.get(..8).and_then(|eight| eight.try_into().ok());
        eight.map(u64::from_ne_bytes).ok_or(Malformed { what: self.what })
    }
}

/// `struct nlattr`: length with these 4 bytes, kind, value; then zeros up to the next multiple of 4.
fn next_attribute(bytes: &[u8]) -> Option<(Attribute<'_>, &[u8])> {
    let (&[a, b, c, d], _) = bytes.split_first_chunk::<4>()?;
    let end = usize::from(u16::from_ne_bytes([a, b]));
    let value = bytes.get(4..end)?;
    let after = bytes.get(end.next_multiple_of(4)..).unwrap_or(&[]);
    Some(((u16::from_ne_bytes([c, d]) & NLA_TYPE_MASK, value), after))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_64_nanoseconds() {
        assert_eq!(ticks_of(1_000_000, 1_000_000), 15_625_000);
        assert_eq!(bytes_of(15_625_000, 1_000_000), 1_000_000);
        assert_eq!(ticks_of(u64::MAX, 1), u32::MAX);
        assert_eq!(ticks_of(1, 0), 15_625_000);
    }

    #[test]
    fn a_flood_of_attributes_is_malformed() {
        let some = nest(&vec![(9, vec![1]); ATTRIBUTES_MAX]);
        assert!(Attributes::parse(&some, "a test").is_ok());
        let many = nest(&vec![(9, vec![1]); ATTRIBUTES_MAX + 1]);
        assert!(Attributes::parse(&many, "a test").is_err());
    }
}
