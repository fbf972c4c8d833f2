//! Classic BPF: programs that the kernel runs on each packet at a `bpf` filter of tc (`net/sched/cls_bpf.c`). Classic,
//! not extended: it is handed over as plain instructions, is checked and compiled by the kernel, and asks for
//! CAP_NET_ADMIN only; the extended kind asks for CAP_BPF. It has no loops and no memory, and can do no harm.
//!
//! Instructions are `struct sock_filter` of `include/uapi/linux/filter.h`. **A load beyond the packet's end ends the program
//! with 0**, which at a `direct-action` filter means "let it pass": [`Assembler::need`] comes before every load that
//! the length does not allow for certain.

/// Bytes of one instruction.
pub(crate) const INSTRUCTION_BYTES: usize = 8;
/// `BPF_MAXINSNS`.
pub(crate) const INSTRUCTIONS_MAX: usize = 4096;

const LD: u16 = 0x00;
const LDX_MSH: u16 = 0xb1;
const JMP: u16 = 0x05;
const RET_K: u16 = 0x06;
const RET_A: u16 = 0x16;
const ABS: u16 = 0x20;
const IND: u16 = 0x40;
const LD_LEN: u16 = 0x80;
const ADD_K: u16 = 0x04;
const AND_K: u16 = 0x54;
const TAX: u16 = 0x07;
const TXA: u16 = 0x87;
const JA: u16 = 0x05;
const JEQ_K: u16 = JMP | 0x10;
const JGE_K: u16 = JMP | 0x30;
const JGE_X: u16 = JMP | 0x38;
const JSET_K: u16 = JMP | 0x40;
/// Offsets from here on are not of the packet but of what the kernel knows about it: `SKF_AD_OFF`.
const AUXILIARY: u32 = 0_u32.wrapping_sub(0x1000);

/// What a load takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Size {
    Word = 0x00,
    Half = 0x08,
    Byte = 0x10,
}

/// What the kernel knows about a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Auxiliary {
    /// `SKF_AD_MARK`: the firewall mark.
    Mark = 20,
    /// `SKF_AD_VLAN_TAG_PRESENT`: 1 if it had an 802.1Q tag.
    VlanTagPresent = 48,
}

/// One instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Instruction {
    code: u16,
    jump_true: u8,
    jump_false: u8,
    k: u32,
}

/// A place in a program.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Label(usize);

/// Builds a program. Conditional jumps reach 255 instructions only, so each is a short one around an unconditional jump,
/// which reaches everything.
#[derive(Default)]
pub(crate) struct Assembler {
    code: Vec<Instruction>,
    labels: Vec<usize>,
    jumps: Vec<(usize, Label)>,
}

impl Assembler {
    /// A label that is placed later.
    pub(crate) fn label(&mut self) -> Label {
        self.labels.push(usize::MAX);
        Label(self.labels.len() - 1)
    }

    /// The next instruction is where `label` leads to. Jumps go forward only.
    pub(crate) fn place(&mut self, label: Label) {
        self.labels[label.0] = self.code.len();
    }

    fn push(&mut self, code: u16, k: u32) {
        self.code.push(Instruction { code, jump_true: 0, jump_false: 0, k });
    }

    /// A = the bytes at an offset of the frame.
    pub(crate) fn load(&mut self, size: Size, at: u32) {
        self.push(LD | ABS | size as u16, at);
    }

    /// A = the bytes at X + an offset.
    pub(crate) fn load_at_x(&mut self, size: Size, at: u32) {
        self.push(LD | IND | size as u16, at);
    }

    /// A = what the kernel knows.
    pub(crate) fn load_auxiliary(&mut self, what: Auxiliary) {
        self.push(LD | ABS | Size::Word as u16, AUXILIARY.wrapping_add(what as u32));
    }

    /// X = length in bytes of the IPv4 header that begins at an offset.
    pub(crate) fn load_header_length(&mut self, at: u32) {
        self.push(LDX_MSH, at);
    }

    /// A = A & mask.
    pub(crate) fn and(&mut self, mask: u32) {
        self.push(AND_K, mask);
    }

    /// Jumps.
    pub(crate) fn jump(&mut self, to: Label) {
        self.jumps.push((self.code.len(), to));
        self.push(JA, 0);
    }

    fn branch(&mut self, code: u16, k: u32, when: bool, to: Label) {
        let (jump_true, jump_false) = if when { (0, 1) } else { (1, 0) };
        self.code.push(Instruction { code, jump_true, jump_false, k });
        self.jump(to);
    }

    /// Jumps if A is this.
    pub(crate) fn if_equal(&mut self, k: u32, to: Label) {
        self.branch(JEQ_K, k, true, to);
    }

    /// Jumps if A is something else.
    pub(crate) fn unless_equal(&mut self, k: u32, to: Label) {
        self.branch(JEQ_K, k, false, to);
    }

    /// Jumps if A has any of these bits.
    pub(crate) fn if_any_bit(&mut self, bits: u32, to: Label) {
        self.branch(JSET_K, bits, true, to);
    }

    /// Jumps if the frame has less than so many bytes. Changes A.
    pub(crate) fn need(&mut self, bytes: u32, otherwise: Label) {
        self.push(LD_LEN, 0);
        self.branch(JGE_K, bytes, false, otherwise);
    }

    /// Jumps if the frame has less than X + so many bytes, where X is [`Assembler::load_header_length`] of `header_at`. Changes A.
    pub(crate) fn need_at_x(&mut self, header_at: u32, bytes: u32, otherwise: Label) {
        self.load_header_length(header_at);
        self.push(TXA, 0);
        self.push(ADD_K, bytes);
        self.push(TAX, 0);
        self.push(LD_LEN, 0);
        self.branch(JGE_X, 0, false, otherwise);
        self.load_header_length(header_at);
    }

    /// Ends with this value.
    pub(crate) fn give(&mut self, value: u32) {
        self.push(RET_K, value);
    }

    /// Ends with A.
    pub(crate) fn give_a(&mut self) {
        self.push(RET_A, 0);
    }

    /// The instructions as the kernel takes them; `None` if there are more than [`INSTRUCTIONS_MAX`], or a jump does not go forward.
    pub(crate) fn finish(mut self) -> Option<Vec<u8>> {
        for (at, Label(label)) in self.jumps {
            let distance = self.labels[label].checked_sub(at + 1).filter(|d| *d <= INSTRUCTIONS_MAX)?;
            self.code[at].k = u32::try_from(distance).ok()?;
        }
        if self.code.len() > INSTRUCTIONS_MAX {
            return None;
        }
        let mut bytes = Vec::with_capacity(self.code.len() * INSTRUCTION_BYTES);
        for Instruction { code, jump_true, jump_false, k } in self.code {
            bytes.extend(code.to_ne_bytes());
            bytes.extend([jump_true, jump_false]);
            bytes.extend(k.to_ne_bytes());
        }
        Some(bytes)
    }
}

/// What the kernel does with a program, for tests of programs.
#[cfg(test)]
pub(crate) mod machine {
    use super::*;

    /// A packet and what the kernel knows about it.
    pub(crate) struct Packet<'a> {
        pub(crate) bytes: &'a [u8],
        pub(crate) mark: u32,
        pub(crate) vlan: bool,
    }

    impl Packet<'_> {
        fn load(&self, size: u16, at: u32) -> Option<u32> {
            if at == AUXILIARY.wrapping_add(Auxiliary::Mark as u32) {
                return Some(self.mark);
            }
            if at == AUXILIARY.wrapping_add(Auxiliary::VlanTagPresent as u32) {
                return Some(self.vlan.into());
            }
            let len = match size & 0x18 {
                0x00 => 4,
                0x08 => 2,
                _ => 1,
            };
            let at = at as usize;
            Some(self.bytes.get(at..at + len)?.iter().fold(0, |n, b| n << 8 | u32::from(*b)))
        }
    }

    /// Runs a program; a load beyond the end gives 0, as in the kernel.
    pub(crate) fn run(program: &[u8], packet: &Packet<'_>) -> u32 {
        step_through(program, packet).unwrap_or(0)
    }

    fn step_through(program: &[u8], packet: &Packet<'_>) -> Option<u32> {
        let (mut a, mut x, mut at) = (0_u32, 0_u32, 0);
        loop {
            let raw = program.chunks_exact(INSTRUCTION_BYTES).nth(at).expect("within the program");
            let code = u16::from_ne_bytes([raw[0], raw[1]]);
            let k = u32::from_ne_bytes([raw[4], raw[5], raw[6], raw[7]]);
            let len = u32::try_from(packet.bytes.len()).expect("a frame");
            at += 1;
            let jump = match code {
                RET_K => return Some(k),
                RET_A => return Some(a),
                LD_LEN => {
                    a = len;
                    continue;
                }
                LDX_MSH => {
                    x = 4 * (packet.load(0x10, k)? & 0xf);
                    continue;
                }
                ADD_K => {
                    a = a.wrapping_add(k);
                    continue;
                }
                AND_K => {
                    a &= k;
                    continue;
                }
                TAX => {
                    x = a;
                    continue;
                }
                TXA => {
                    a = x;
                    continue;
                }
                JA => {
                    at += k as usize;
                    continue;
                }
                JEQ_K => a == k,
                JGE_K => a >= k,
                JGE_X => a >= x,
                JSET_K => a & k != 0,
                _ if code & 0x67 == ABS => {
                    a = packet.load(code, k)?;
                    continue;
                }
                _ if code & 0x67 == IND => {
                    a = packet.load(code, x.checked_add(k)?)?;
                    continue;
                }
                _ => panic!("code {code:#x}"),
            };
            at += usize::from(if jump { raw[2] } else { raw[3] });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::machine::{Packet, run};
    use super::*;

    #[test]
    fn jumps_reach_far_and_only_forward() {
        let mut asm = Assembler::default();
        let far = asm.label();
        asm.load(Size::Byte, 0);
        asm.if_equal(7, far);
        for _ in 0..1000 {
            asm.and(0xff);
        }
        asm.give(1);
        asm.place(far);
        asm.give(2);
        let program = asm.finish().expect("it fits");
        let packet = |byte: &'static [u8]| Packet { bytes: byte, mark: 0, vlan: false };
        assert_eq!(run(&program, &packet(&[7])), 2);
        assert_eq!(run(&program, &packet(&[8])), 1);
        assert_eq!(run(&program, &packet(&[])), 0, "a load beyond the end gives 0");

        let mut back = Assembler::default();
        let here = back.label();
        back.place(here);
        back.jump(here);
        assert!(back.finish().is_none());
        let mut long = Assembler::default();
        (0..=INSTRUCTIONS_MAX).for_each(|_| long.give(0));
        assert!(long.finish().is_none());
    }
}
