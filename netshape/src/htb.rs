//! Parts that the shaper of a tap and the sharing of the uplink have in common: an HTB class, and the leaf behind it.

use std::io;

use netlink_packet_route::tc::{TcOption, TcQdiscFqCodelOption};

use crate::codec::{HtbClass, ticks_of};
use crate::error::Error;
use crate::name::IfName;
use crate::netlink::{At, Existing, Netlink, TcObject, failed};
use crate::rate::BitRate;

pub(crate) const HTB: &str = "htb";
const FQ_CODEL: &str = "fq_codel";
const FQ_CODEL_INTERVAL_USEC: u32 = 100_000;
const FIFO: &str = "bfifo";
/// HTB's divisor where a class names no quantum; ours do.
pub(crate) const RATE2QUANTUM: u32 = 10;

/// A class with bursts by its rates.
pub(crate) fn class_of(rate: BitRate, ceil: BitRate, quantum_bytes: u32, prio: u32) -> HtbClass {
    let (rate_bytes, ceil_bytes) = (rate.bytes_per_sec(), ceil.bytes_per_sec());
    HtbClass {
        rate_bytes_per_sec: rate_bytes,
        ceil_bytes_per_sec: ceil_bytes,
        buffer_ticks: ticks_of(rate.burst_bytes(), rate_bytes),
        cbuffer_ticks: ticks_of(ceil.burst_bytes(), ceil_bytes),
        quantum_bytes,
        prio,
    }
}

/// Makes a class or changes it in place, which leaves its queue alone; nothing is written if it is so already.
pub(crate) async fn ensure_class(
    nl: &Netlink,
    name: &IfName,
    index: u32,
    (at, class): (At, HtbClass),
    classes: &[TcObject],
) -> Result<(), Error> {
    let there = classes.iter().find(|c| c.handle == at.handle).map(|c| HtbClass::parse(&c.options));
    if there == Some(Ok(class)) {
        return Ok(());
    }
    let existing = if there.is_some() { Existing::Change } else { Existing::Fail };
    nl.set_class(index, at, HTB, class.to_bytes(), existing).await.map_err(failed("set the rate of", name))
}

/// The leaf of a class: fq_codel, or a FIFO where the kernel has none.
pub(crate) async fn set_leaf(
    nl: &Netlink,
    name: &IfName,
    index: u32,
    (at, rate): (At, BitRate),
    qdiscs: &[TcObject],
) -> Result<(), Error> {
    let there =
        qdiscs.iter().find(|q| q.handle == at.handle && q.parent == at.parent).map(|q| q.kind.as_str());
    let target_usec = rate.codel_target_usec();
    let options = || {
        vec![
            TcOption::FqCodel(TcQdiscFqCodelOption::Target(target_usec)),
            TcOption::FqCodel(TcQdiscFqCodelOption::Interval(
                FQ_CODEL_INTERVAL_USEC.max(target_usec.saturating_mul(2)),
            )),
        ]
    };
    let limit = rate.queue_bytes().to_ne_bytes().to_vec();
    let result = match there {
        Some(FQ_CODEL) => nl.set_known_qdisc(index, at, FQ_CODEL, options(), Existing::Change).await,
        Some(FIFO) => nl.set_qdisc(index, at, FIFO, Some(limit), Existing::Change).await,
        _ => match nl.set_known_qdisc(index, at, FQ_CODEL, options(), Existing::Replace).await {
            Err(error) if is_unknown_kind(&error) => {
                nl.set_qdisc(index, at, FIFO, Some(limit), Existing::Replace).await
            }
            result => result,
        },
    };
    result.map_err(failed("add a leaf queue to", name))
}

/// What the kernel answers for a qdisc that it has neither built in nor as a module.
fn is_unknown_kind(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EOPNOTSUPP))
}
