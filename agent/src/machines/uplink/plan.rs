//! What the shared uplink is to be: pure.
//!
//! ```text
//! capacity ─┬─ 4 %   the host's own, at least; it may borrow all that is free, and is served first
//!           ├─ 1 %   at least, for machines with a nic without limit, in equal parts
//!           └─ 95 %  may be granted: the rates of all nics with a limit
//! ```
//! A machine is promised the rates of its limited nics together, and for its unlimited ones an equal part of all that is not granted, a
//! hundredth of the capacity at most: a promise small enough that such machines do not crowd each other out. Beyond its promise each may
//! borrow whatever is free, up to all but the host's own.

use std::collections::{BTreeMap, BTreeSet};

use lathe_netshape::{BitRate as Rate, ClassSpec, RootQueue, UplinkClass, UplinkSpec};
use lathe_shard::BitRate;

use super::Phase;
use crate::machines::FIRST_CID;
use crate::network::uplinks::ClassChanges;
use crate::problem::{Kind, Problem};

/// Of the capacity, this part is kept back: for the host and for machines without limit.
const RESERVED_PART: u64 = 20;
/// Of the capacity, this part is the host's, at least.
const HOST_PART: u64 = 25;
/// Of the capacity, this part is promised to a machine for its nics without limit, at most.
const OPEN_PART: u64 = 100;
/// The least rate of a class, bit/s (`lathe_netshape`).
const LEAST: u64 = 8_000;
/// The least capacity, bit/s: the host's part of it is a rate that works.
const CAPACITY_MIN: u64 = 1_000_000;
/// The largest, bit/s (`lathe_netshape`).
const CAPACITY_MAX: u64 = 800_000_000_000;
/// Machines borrow after the host, and among each other alike.
const PRIO: u8 = 1;
const SHARE: u8 = 10;

/// Classes that are to be.
pub type Classes = BTreeMap<UplinkClass, ClassSpec>;

/// A machine that has a part in the uplink.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its name.
    pub name: String,
    /// Its vsock context id, from which its class follows.
    pub cid: u32,
    /// What it is granted for its nics with a limit, bit/s.
    pub granted: u64,
    /// Whether it has one without.
    pub open: bool,
    /// Its taps.
    pub taps: Vec<String>,
}

impl Member {
    /// Its class: context ids are unique on the host and the lowest free one is given, so there are enough classes for some 4,000 machines.
    pub fn class(&self) -> Option<UplinkClass> {
        class_of(self.cid)
    }
}

/// The class of the machine with this context id; `None` beyond the last.
pub fn class_of(cid: u32) -> Option<UplinkClass> {
    cid.checked_sub(FIRST_CID).and_then(|number| u16::try_from(number).ok()).and_then(UplinkClass::new)
}

/// What is kept back of a capacity, bit/s.
pub fn reserved(capacity: u64) -> u64 {
    capacity.div_ceil(RESERVED_PART)
}

/// What mechanism is told of a capacity.
pub fn spec(capacity: u64) -> UplinkSpec {
    UplinkSpec { capacity: Rate(capacity), host_least: Rate(capacity / HOST_PART) }
}

/// The capacity that is asked for, or that of the link.
///
/// # Errors
/// `bad-amount`, `uplink-capacity-unknown`.
pub fn capacity(device: &str, asked: Option<u64>, speed: Option<u64>) -> Result<u64, Problem> {
    let capacity = asked.or(speed).ok_or_else(|| {
        let message = format!("{device} does not tell its speed, and no capacity was given");
        Problem::new(Kind::Impossible, "uplink-capacity-unknown", message)
            .detail("virtual links do not know theirs, and none does that is down")
            .fix(format!("lathe host uplink enable --device {device} --capacity 1gbit"))
    })?;
    if (CAPACITY_MIN..=CAPACITY_MAX).contains(&capacity) {
        return Ok(capacity);
    }
    let [shown, least, most] = [capacity, CAPACITY_MIN, CAPACITY_MAX].map(BitRate);
    let message = format!("a capacity of {shown}: between {least} and {most}");
    Err(Problem::new(Kind::BadRequest, "bad-amount", message))
}

/// The classes of all machines that have a part. One for which nothing is left has none: its packets go with the host's.
pub fn classes(capacity: u64, members: &[Member]) -> Classes {
    let host = spec(capacity).host_least.0;
    let limited: u64 = members.iter().fold(host, |sum, member| sum.saturating_add(least(member.granted)));
    let mut left = capacity.saturating_sub(limited);
    let open = members.iter().filter(|member| member.open).count() as u64;
    let part = left.checked_div(open).unwrap_or(0).min(capacity / OPEN_PART).max(LEAST);
    let ceil = capacity - host;
    let mut classes = Classes::new();
    for member in members {
        let mut rate = least(member.granted);
        if member.open && left >= part {
            left -= part;
            rate = rate.saturating_add(part);
        }
        if let Some(class) = member.class()
            && rate > 0
        {
            let spec = ClassSpec { rate: Rate(rate), ceil: Rate(ceil.max(rate)), prio: PRIO, share: SHARE };
            classes.insert(class, spec);
        }
    }
    classes
}

/// As a rate of a class, if it is one at all.
fn least(rate: u64) -> u64 {
    if rate == 0 { 0 } else { rate.max(LEAST) }
}

/// What leads from the classes before to those that are to be.
pub fn changes(before: &Classes, after: &Classes) -> ClassChanges {
    let gone = before.keys().filter(|class| !after.contains_key(class)).map(|class| (*class, None));
    let set = after.iter().filter(|(class, spec)| before.get(class) != Some(spec));
    gone.chain(set.map(|(class, spec)| (*class, Some(*spec)))).collect()
}

/// The same where only the names of those before are known: all are set anew, which changes nothing of those that are so already.
pub fn all_anew(there: &BTreeSet<UplinkClass>, after: &Classes) -> ClassChanges {
    let gone = there.iter().filter(|class| !after.contains_key(class)).map(|class| (*class, None));
    gone.chain(after.iter().map(|(class, spec)| (*class, Some(*spec)))).collect()
}

/// Whether a root queue that was found instead of ours may be replaced: what was there before, or what the kernel puts there by itself when
/// a link is made anew. Anything else is somebody's wish, and stays until sharing is asked for again.
pub fn may_replace(phase: Phase, before: &RootQueue, found: &RootQueue) -> bool {
    phase != Phase::Disabling && (found == before || *found == RootQueue::Default)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MBIT: u64 = 1_000_000;

    fn member(cid: u32, granted_mbit: u64, open: bool) -> Member {
        Member { name: format!("m{cid}"), cid, granted: granted_mbit * MBIT, open, taps: Vec::new() }
    }

    fn rates(capacity: u64, members: &[Member]) -> Vec<u64> {
        classes(capacity, members).values().map(|class| class.rate.0).collect()
    }

    #[test]
    fn a_grant_is_promised_and_the_rest_may_be_borrowed() {
        let members = [member(3, 100, false), member(4, 0, true), member(5, 20, true)];
        let classes = classes(1_000 * MBIT, &members);
        let numbers: Vec<_> = classes.keys().map(|class| class.number()).collect();
        assert_eq!(numbers, [0, 1, 2]);
        assert_eq!(rates(1_000 * MBIT, &members), [100 * MBIT, 10 * MBIT, 30 * MBIT]);
        assert!(classes.values().all(|class| class.ceil.0 == 960 * MBIT));
        assert_eq!((spec(1_000 * MBIT).host_least.0, reserved(1_000 * MBIT)), (40 * MBIT, 50 * MBIT));
    }

    #[test]
    fn many_machines_without_limit_share_what_is_left() {
        // 95 % are granted: 1 % is left for all of them.
        let mut members = vec![member(3, 950, false)];
        members.extend((4..104).map(|cid| member(cid, 0, true)));
        let rates = rates(1_000 * MBIT, &members);
        assert_eq!((rates[0], rates[1], rates.len()), (950 * MBIT, 100_000, 101));
        // More than can have the least of all rates: the last ones have none.
        members.extend((104..4000).map(|cid| member(cid, 0, true)));
        let classes = classes(1_000 * MBIT, &members);
        assert_eq!(classes.len(), 1 + 10_000_000 / 8_000);
    }

    #[test]
    fn a_class_is_for_one_machine_as_long_as_it_lives() {
        assert_eq!(class_of(FIRST_CID).map(UplinkClass::number), Some(0));
        assert_eq!(class_of(FIRST_CID - 1), None);
        assert_eq!(class_of(FIRST_CID + 4079).map(UplinkClass::number), Some(4079));
        assert_eq!((class_of(FIRST_CID + 4080), class_of(u32::MAX)), (None, None));
    }

    #[test]
    fn changes_are_what_differs() {
        let one = classes(1_000 * MBIT, &[member(3, 10, false), member(4, 10, false)]);
        let two = classes(1_000 * MBIT, &[member(3, 20, false), member(5, 10, false)]);
        let changed: Vec<_> =
            changes(&one, &two).into_iter().map(|(c, s)| (c.number(), s.is_some())).collect();
        assert_eq!(changed, [(0, true), (1, false), (2, true)]);
        assert!(changes(&one, &one).is_empty());
        let there = one.keys().copied().collect();
        assert_eq!(all_anew(&there, &one).len(), 2);
        assert!(all_anew(&there, &Classes::new()).values().all(Option::is_none));
    }

    #[test]
    fn a_capacity_must_be_known_and_sensible() {
        assert_eq!(capacity("eth0", None, Some(1_000 * MBIT)).unwrap(), 1_000 * MBIT);
        assert_eq!(capacity("eth0", Some(500 * MBIT), Some(1_000 * MBIT)).unwrap(), 500 * MBIT);
        let unknown = capacity("up0", None, None).unwrap_err();
        assert_eq!(unknown.code, "uplink-capacity-unknown");
        assert!(unknown.fix.contains("--device up0 --capacity"), "{}", unknown.fix);
        for absurd in [0, 999_999, u64::MAX] {
            assert_eq!(capacity("eth0", Some(absurd), None).unwrap_err().code, "bad-amount");
        }
    }

    #[test]
    fn what_somebody_else_put_there_stays() {
        let fq = RootQueue::PfifoFast { major: 5 };
        let mq = RootQueue::Mq { major: 1 };
        for phase in [Phase::Enabling, Phase::Enabled] {
            assert!(may_replace(phase, &fq, &fq) && may_replace(phase, &fq, &RootQueue::Default));
            assert!(!may_replace(phase, &fq, &mq));
        }
        assert!(!may_replace(Phase::Disabling, &fq, &fq));
    }

    proptest! {
        /// Whatever the books let through fits, in every order and number.
        #[test]
        fn promises_never_exceed_the_capacity(
            capacity in CAPACITY_MIN..10_000_000_000,
            parts in prop::collection::vec((0_u64..100, any::<bool>()), 0..300),
        ) {
            let most = capacity - reserved(capacity);
            let mut members = Vec::new();
            let mut granted = 0;
            for ((part, open), cid) in parts.into_iter().zip(FIRST_CID..) {
                let rate = (most / 100 * part).min(most - granted);
                let rate = if rate < LEAST { 0 } else { rate };
                granted += rate;
                members.push(Member { name: String::new(), cid, granted: rate, open, taps: Vec::new() });
            }
            let classes = classes(capacity, &members);
            let sum: u64 = classes.values().map(|class| class.rate.0).sum();
            prop_assert!(sum + spec(capacity).host_least.0 <= capacity);
            for member in &members {
                let rate = member.class().and_then(|class| classes.get(&class)).map_or(0, |class| class.rate.0);
                prop_assert!(rate >= member.granted);
            }
        }
    }
}
