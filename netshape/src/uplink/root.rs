//! What was at the root of the uplink before, and how it comes back.

use std::fmt;
use std::str::FromStr;

use netlink_packet_route::tc::{TcHandle, TcOption, TcQdiscFqCodelOption};

use crate::error::Error;
use crate::netlink::TcObject;

/// Kinds that the kernel puts there by itself (`net.core.default_qdisc`, several queues, none needed).
const MQ: &str = "mq";
const PFIFO_FAST: &str = "pfifo_fast";
const FQ_CODEL: &str = "fq_codel";

/// The root queue of a link as it was found: what brings it back. Its text form is for keeping; it is stable.
///
/// ```
/// # use lathe_netshape::RootQueue;
/// let kept = RootQueue::Default.to_string();
/// assert_eq!(kept, "default");
/// assert_eq!(kept.parse::<RootQueue>().ok(), Some(RootQueue::Default));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RootQueue {
    /// What the kernel puts there by itself: one of `net.core.default_qdisc`, `mq` with several of them, or `noqueue`.
    Default,
    /// `mq` under a handle of somebody's, with the kernel's choice for each queue.
    Mq {
        /// Major number of the handle.
        major: u16,
    },
    /// `pfifo_fast`, which has no options.
    PfifoFast {
        /// Major number of the handle.
        major: u16,
    },
    /// `fq_codel` with its options.
    FqCodel {
        /// Major number of the handle.
        major: u16,
        /// The options.
        options: FqCodelOptions,
    },
}

/// Options of `fq_codel` (`TCA_FQ_CODEL_*`), in the kernel's units; `None` is the kernel's default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FqCodelOptions {
    /// Microseconds.
    pub target: Option<u32>,
    /// Packets.
    pub limit: Option<u32>,
    /// Microseconds.
    pub interval: Option<u32>,
    /// 1 marks instead of dropping.
    pub ecn: Option<u32>,
    /// Queues.
    pub flows: Option<u32>,
    /// Bytes.
    pub quantum: Option<u32>,
    /// Packets dropped at once when full.
    pub drop_batch: Option<u32>,
    /// Bytes.
    pub memory_limit: Option<u32>,
}

impl FqCodelOptions {
    fn fields(&mut self) -> [(&'static str, &mut Option<u32>); 8] {
        [
            ("target", &mut self.target),
            ("limit", &mut self.limit),
            ("interval", &mut self.interval),
            ("ecn", &mut self.ecn),
            ("flows", &mut self.flows),
            ("quantum", &mut self.quantum),
            ("drop_batch", &mut self.drop_batch),
            ("memory_limit", &mut self.memory_limit),
        ]
    }

    /// `None` if there are options that this does not know.
    fn of(known: &[TcOption]) -> Option<FqCodelOptions> {
        let mut options = FqCodelOptions::default();
        for option in known {
            let TcOption::FqCodel(option) = option else { return None };
            let (field, value) = match option {
                TcQdiscFqCodelOption::Target(v) => (&mut options.target, v),
                TcQdiscFqCodelOption::Limit(v) => (&mut options.limit, v),
                TcQdiscFqCodelOption::Interval(v) => (&mut options.interval, v),
                TcQdiscFqCodelOption::Ecn(v) => (&mut options.ecn, v),
                TcQdiscFqCodelOption::Flows(v) => (&mut options.flows, v),
                TcQdiscFqCodelOption::Quantum(v) => (&mut options.quantum, v),
                TcQdiscFqCodelOption::DropBatchSize(v) => (&mut options.drop_batch, v),
                TcQdiscFqCodelOption::MemoryLimit(v) => (&mut options.memory_limit, v),
                _ => return None,
            };
            *field = Some(*value);
        }
        Some(options)
    }

    /// As the kernel takes them. It keeps times in units of 1,024 ns and shows them rounded down, so a microsecond more
    /// than it showed gives the same again.
    fn to_options(self) -> Vec<TcOption> {
        let time = |usec: u32| usec.saturating_add(1);
        let some = [
            self.target.map(|v| TcQdiscFqCodelOption::Target(time(v))),
            self.limit.map(TcQdiscFqCodelOption::Limit),
            self.interval.map(|v| TcQdiscFqCodelOption::Interval(time(v))),
            self.ecn.map(TcQdiscFqCodelOption::Ecn),
            self.flows.map(TcQdiscFqCodelOption::Flows),
            self.quantum.map(TcQdiscFqCodelOption::Quantum),
            self.drop_batch.map(TcQdiscFqCodelOption::DropBatchSize),
            self.memory_limit.map(TcQdiscFqCodelOption::MemoryLimit),
        ];
        some.into_iter().flatten().map(TcOption::FqCodel).collect()
    }
}

impl RootQueue {
    /// What is there, from the qdiscs of a link, `ours` left out; the description of what cannot be brought back otherwise.
    pub(super) fn of(qdiscs: &[TcObject]) -> Result<RootQueue, String> {
        let Some(root) = qdiscs.iter().find(|q| q.parent == TcHandle::ROOT) else {
            return Ok(RootQueue::Default);
        };
        let told = |q: &TcObject| format!("{} {:x}:", q.kind, q.handle.major);
        let is_root_or_ingress = |q: &&TcObject| q.parent == TcHandle::ROOT || q.parent == TcHandle::INGRESS;
        // Below the root only what the kernel made by itself, which has no handle.
        if let Some(child) = qdiscs.iter().find(|q| !is_root_or_ingress(q) && q.handle != TcHandle::UNSPEC) {
            return Err(format!("{} with {}", told(root), told(child)));
        }
        let major = root.handle.major;
        match root.kind.as_str() {
            _ if major == 0 => Ok(RootQueue::Default),
            MQ => Ok(RootQueue::Mq { major }),
            PFIFO_FAST => Ok(RootQueue::PfifoFast { major }),
            FQ_CODEL => FqCodelOptions::of(&root.known)
                .map(|options| RootQueue::FqCodel { major, options })
                .ok_or_else(|| format!("{} with further options", told(root))),
            _ => Err(told(root)),
        }
    }

    /// Kind, major number and options of what is to be put there; `None` is the kernel's own choice.
    pub(super) fn wanted(&self) -> Option<(&'static str, u16, Vec<TcOption>)> {
        match self {
            RootQueue::Default => None,
            RootQueue::Mq { major } => Some((MQ, *major, Vec::new())),
            RootQueue::PfifoFast { major } => Some((PFIFO_FAST, *major, Vec::new())),
            RootQueue::FqCodel { major, options } => Some((FQ_CODEL, *major, options.to_options())),
        }
    }
}

impl fmt::Display for RootQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RootQueue::Default => f.write_str("default"),
            RootQueue::Mq { major } => write!(f, "{MQ} {major:x}:"),
            RootQueue::PfifoFast { major } => write!(f, "{PFIFO_FAST} {major:x}:"),
            RootQueue::FqCodel { major, options } => {
                write!(f, "{FQ_CODEL} {major:x}:")?;
                let mut options = *options;
                for (name, value) in options.fields() {
                    if let Some(value) = value {
                        write!(f, " {name} {value}")?;
                    }
                }
                Ok(())
            }
        }
    }
}

impl FromStr for RootQueue {
    type Err = Error;

    fn from_str(text: &str) -> Result<RootQueue, Error> {
        parse(text).ok_or_else(|| Error::RootQueueText(text.into()))
    }
}

fn parse(text: &str) -> Option<RootQueue> {
    let mut words = text.split(' ');
    let kind = words.next()?;
    if kind == "default" {
        return words.next().is_none().then_some(RootQueue::Default);
    }
    let major = words.next()?.strip_suffix(':')?;
    let major = u16::from_str_radix(major, 16).ok().filter(|major| *major != 0)?;
    let queue = match kind {
        MQ => RootQueue::Mq { major },
        PFIFO_FAST => RootQueue::PfifoFast { major },
        FQ_CODEL => {
            let mut options = FqCodelOptions::default();
            while let Some(name) = words.next() {
                let value = words.next()?.parse().ok()?;
                let (_, field) = options.fields().into_iter().find(|(known, _)| *known == name)?;
                *field = Some(value);
            }
            RootQueue::FqCodel { major, options }
        }
        _ => return None,
    };
    words.next().is_none().then_some(queue)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn qdisc(kind: &str, major: u16, parent: TcHandle, known: Vec<TcOption>) -> TcObject {
        TcObject {
            kind: kind.into(),
            handle: TcHandle { major, minor: 0 },
            parent,
            known,
            ..TcObject::default()
        }
    }

    #[test]
    fn only_what_can_come_back_is_accepted() {
        let queue = |major, minor| TcHandle { major, minor };
        let clsact = || qdisc("clsact", 0xffff, TcHandle::INGRESS, Vec::new());
        assert_eq!(RootQueue::of(&[]), Ok(RootQueue::Default));
        for kind in ["noqueue", "pfifo_fast", "fq_codel", "mq", "fq", "cake"] {
            let kernels = [qdisc(kind, 0, TcHandle::ROOT, Vec::new()), clsact()];
            assert_eq!(RootQueue::of(&kernels), Ok(RootQueue::Default), "{kind}");
        }
        let mq = |child| {
            [
                qdisc("mq", 1, TcHandle::ROOT, Vec::new()),
                qdisc("fq_codel", child, queue(1, 1), Vec::new()),
                qdisc("fq_codel", 0, queue(1, 2), Vec::new()),
            ]
        };
        assert_eq!(RootQueue::of(&mq(0)), Ok(RootQueue::Mq { major: 1 }));
        assert_eq!(RootQueue::of(&mq(2)), Err("mq 1: with fq_codel 2:".into()));
        for kind in ["fq", "cake", "htb", "tbf", "prio", "bfifo"] {
            let told = RootQueue::of(&[qdisc(kind, 0x8001, TcHandle::ROOT, Vec::new())]);
            assert_eq!(told, Err(format!("{kind} 8001:")));
        }
        let known = vec![
            TcOption::FqCodel(TcQdiscFqCodelOption::Target(4999)),
            TcOption::FqCodel(TcQdiscFqCodelOption::Flows(512)),
        ];
        let found = RootQueue::of(&[qdisc("fq_codel", 0x8001, TcHandle::ROOT, known)]).expect("it can");
        assert_eq!(found.to_string(), "fq_codel 8001: target 4999 flows 512");
        let (kind, major, options) = found.wanted().expect("not the default");
        assert_eq!((kind, major, options.len()), ("fq_codel", 0x8001, 2));
        assert_eq!(options[0], TcOption::FqCodel(TcQdiscFqCodelOption::Target(5000)));
        let newer = vec![TcOption::FqCodel(TcQdiscFqCodelOption::CeThreshold(7))];
        assert!(RootQueue::of(&[qdisc("fq_codel", 1, TcHandle::ROOT, newer)]).is_err());
    }

    #[test]
    fn other_texts_are_refused() {
        for bad in [
            "",
            "default ",
            "mq",
            "mq 0:",
            "mq 1",
            "mq 1: 2",
            "htb 1:",
            "fq_codel 1: target",
            "fq_codel 1: x 1",
            "fq_codel 1: target -1",
            "pfifo_fast 10000:",
        ] {
            assert!(bad.parse::<RootQueue>().is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn the_text_round_trips(major in 1_u16.., values in proptest::array::uniform8(proptest::option::of(any::<u32>()))) {
            let mut options = FqCodelOptions::default();
            options.fields().into_iter().zip(values).for_each(|((_, field), value)| *field = value);
            for queue in [RootQueue::Mq { major }, RootQueue::PfifoFast { major }, RootQueue::FqCodel { major, options }] {
                prop_assert_eq!(queue.to_string().parse::<RootQueue>().expect("its own text"), queue);
            }
        }

        #[test]
        fn hostile_texts_never_panic(text in "\\PC{0,60}") {
            let _ = text.parse::<RootQueue>();
        }

        /// The kernel's arithmetic (`net/sched/sch_fq_codel.c`): units of 1,024 ns in, microseconds rounded down out.
        #[test]
        fn times_come_back_exactly(usec in 0_u32..10_000_000) {
            let kept = |usec: u64| (usec * 1000) >> 10;
            let shown = |units: u64| (units << 10) / 1000;
            let before = kept(usec.into());
            let options = FqCodelOptions { target: u32::try_from(shown(before)).ok(), ..FqCodelOptions::default() };
            let [TcOption::FqCodel(TcQdiscFqCodelOption::Target(again))] = options.to_options()[..] else {
                panic!("a target");
            };
            prop_assert_eq!(kept(again.into()), before);
        }
    }
}
