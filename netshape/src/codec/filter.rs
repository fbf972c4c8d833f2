//! The `bpf` filter with a classic program (`net/sched/cls_bpf.c`), and the `skbedit` action (`net/sched/act_skbedit.c`).

use super::{Attributes, Malformed, nest, word};
use crate::cbpf::{INSTRUCTION_BYTES, INSTRUCTIONS_MAX};

const TCA_BPF_OPS_LEN: u16 = 4;
const TCA_BPF_OPS: u16 = 5;
const TCA_BPF_FLAGS: u16 = 8;
/// `TCA_BPF_FLAG_ACT_DIRECT`.
const DIRECT: u32 = 1;

const TCA_SKBEDIT_PARMS: u16 = 2;
const TCA_SKBEDIT_MARK: u16 = 5;
/// `struct tc_skbedit`, which is `tc_gen`: index, capab, action, refcnt, bindcnt.
const TC_GEN_BYTES: usize = 20;
/// `TC_ACT_UNSPEC`: on to the next filter; `tc` says `continue`.
const NEXT_FILTER: i32 = -1;

/// `TCA_OPTIONS` of a `bpf` filter whose program is classic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BpfFilter {
    /// Instructions, `struct sock_filter` of 8 bytes each, at most 4096.
    pub program: Vec<u8>,
    /// The program's result is the verdict; else it is the class, and 0 means "not mine".
    pub direct: bool,
}

impl BpfFilter {
    /// Name of the kind.
    pub const KIND: &'static str = "bpf";

    /// The nested attributes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let instructions = u16::try_from(self.program.len() / INSTRUCTION_BYTES).unwrap_or(u16::MAX);
        let mut attributes =
            vec![(TCA_BPF_OPS_LEN, instructions.to_ne_bytes().to_vec()), (TCA_BPF_OPS, self.program.clone())];
        if self.direct {
            attributes.push((TCA_BPF_FLAGS, DIRECT.to_ne_bytes().to_vec()));
        }
        nest(&attributes)
    }

    /// # Errors
    /// [`Malformed`], also for an extended program.
    pub fn parse(options: &[u8]) -> Result<BpfFilter, Malformed> {
        let bad = Malformed { what: "classic bpf filter" };
        let attributes = Attributes::parse(options, bad.what)?;
        let count = attributes.fixed(TCA_BPF_OPS_LEN, 2)?;
        let count = usize::from(u16::from_ne_bytes([count[0], count[1]]));
        let program = attributes.get(TCA_BPF_OPS).ok_or(bad)?;
        if count > INSTRUCTIONS_MAX || program.len() != count * INSTRUCTION_BYTES {
            return Err(bad);
        }
        let flags = match attributes.get(TCA_BPF_FLAGS) {
            Some(_) => word(attributes.fixed(TCA_BPF_FLAGS, 4)?, 0),
            None => 0,
        };
        Ok(BpfFilter { program: program.to_vec(), direct: flags & DIRECT != 0 })
    }
}

/// `TCA_ACT_OPTIONS` of a `skbedit` action that sets the firewall mark and goes on to the next filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SkbEdit {
    /// The mark.
    pub mark: u32,
}

impl SkbEdit {
    /// Name of the kind.
    pub const KIND: &'static str = "skbedit";

    pub(crate) fn attributes(self) -> Vec<(u16, Vec<u8>)> {
        let parms = [0, 0, NEXT_FILTER, 0, 0].map(i32::to_ne_bytes).concat();
        vec![(TCA_SKBEDIT_PARMS, parms), (TCA_SKBEDIT_MARK, self.mark.to_ne_bytes().to_vec())]
    }

    /// The nested attributes.
    pub fn to_bytes(self) -> Vec<u8> {
        nest(&self.attributes())
    }

    /// # Errors
    /// [`Malformed`], also for one that sets no mark or does not go on.
    pub fn parse(options: &[u8]) -> Result<SkbEdit, Malformed> {
        let attributes = Attributes::parse(options, "tc_skbedit with a mark")?;
        let parms = attributes.fixed(TCA_SKBEDIT_PARMS, TC_GEN_BYTES)?;
        if word(parms, 8).cast_signed() != NEXT_FILTER {
            return Err(Malformed { what: attributes.what });
        }
        Ok(SkbEdit { mark: word(attributes.fixed(TCA_SKBEDIT_MARK, 4)?, 0) })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn bpf_round_trip(words in proptest::collection::vec(any::<u64>(), 0..200), direct in any::<bool>()) {
            let program = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
            let filter = BpfFilter { program, direct };
            prop_assert_eq!(BpfFilter::parse(&filter.to_bytes()), Ok(filter));
        }

        #[test]
        fn skbedit_round_trip(mark in any::<u32>()) {
            let edit = SkbEdit { mark };
            prop_assert_eq!(SkbEdit::parse(&edit.to_bytes()), Ok(edit));
        }

        #[test]
        fn hostile_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..120)) {
            let _ = (BpfFilter::parse(&bytes), SkbEdit::parse(&bytes));
        }

        #[test]
        fn hostile_attributes_never_panic(attributes in proptest::collection::vec((0_u16..10, proptest::collection::vec(any::<u8>(), 0..50)), 0..12)) {
            let bytes = nest(&attributes);
            let _ = (BpfFilter::parse(&bytes), SkbEdit::parse(&bytes));
        }
    }

    /// What `tc … action skbedit mark 0x1a7e0010 continue` of iproute2 6.1 sends on a little-endian machine.
    #[test]
    #[cfg(target_endian = "little")]
    fn skbedit_is_what_tc_sends() {
        let mut sent = vec![0x18, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff];
        sent.extend([0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 5, 0, 0x10, 0, 0x7e, 0x1a]);
        let edit = SkbEdit { mark: 0x1a7e_0010 };
        assert_eq!((edit.to_bytes(), SkbEdit::parse(&sent)), (sent.clone(), Ok(edit)));
    }

    #[test]
    fn a_program_has_as_many_instructions_as_it_says() {
        let filter = BpfFilter { program: vec![0; 24], direct: true };
        let mut bytes = filter.to_bytes();
        bytes[4] = 4;
        assert!(BpfFilter::parse(&bytes).is_err());
        let whole = filter.to_bytes();
        // Without flags at the end it is whole too.
        for end in (0..whole.len()).filter(|end| *end != whole.len() - 8) {
            assert!(BpfFilter::parse(&whole[..end]).is_err(), "{end} bytes");
        }
    }
}
