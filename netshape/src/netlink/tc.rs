//! Queues and classes.
//!
//! A trap of netlink-packet-route 0.34: the options of a qdisc of a kind that it does not know come back as **one**
//! attribute that holds the raw nested bytes (`codec` takes them apart), and echoing a parsed message would nest them twice.

use std::io;

use netlink_packet_core::{
    DefaultNla, Emitable, NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_ECHO, NLM_F_EXCL, NLM_F_REPLACE, Nla,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{TcAttribute, TcHandle, TcHeader, TcMessage, TcOption, TcStats2, TcXstats};

use super::Netlink;

pub(super) const TCA_OPTIONS: u16 = 2;
/// Packets beyond 32 bits, Linux 5.5.
const TCA_STATS_PKT64: u16 = 8;
/// The handle of the clsact qdisc, and the parent of filters on its ingress side.
pub(crate) const CLSACT: TcHandle = TcHandle { major: 0xffff, minor: 0 };
pub(crate) const CLSACT_INGRESS: TcHandle = TcHandle { major: 0xffff, minor: TcHandle::MIN_INGRESS };

/// A qdisc or class as the kernel shows it.
#[derive(Clone, Debug, Default)]
pub(crate) struct TcObject {
    pub(crate) kind: String,
    pub(crate) handle: TcHandle,
    pub(crate) parent: TcHandle,
    /// The nested attributes, of a kind that netlink-packet-route does not know.
    pub(crate) options: Vec<u8>,
    /// The typed ones of a kind that it knows.
    pub(crate) known: Vec<TcOption>,
    pub(crate) bytes: u64,
    pub(crate) packets: u64,
    pub(crate) drops: u64,
    pub(crate) overlimits: u64,
    pub(crate) backlog_bytes: u64,
    pub(crate) queued_packets: u64,
    /// Statistics of the kind's own.
    pub(crate) extra: Vec<u8>,
}

/// What to do when the object is there already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Existing {
    /// Refuse.
    Fail,
    /// Take its place, or change it in place if it is of the same kind and handle.
    Replace,
    /// It must be there: change it in place.
    Change,
}

impl Existing {
    pub(super) fn flags(self) -> u16 {
        match self {
            Existing::Fail => NLM_F_CREATE | NLM_F_EXCL,
            Existing::Replace => NLM_F_CREATE | NLM_F_REPLACE,
            Existing::Change => 0,
        }
    }
}

impl Netlink {
    /// Qdiscs of a link.
    pub(crate) async fn qdiscs(&self, index: u32) -> io::Result<Vec<TcObject>> {
        let request = RouteNetlinkMessage::GetQueueDiscipline(tc_message(index)?);
        self.tc_objects(index, request).await
    }

    /// Classes of a link.
    pub(crate) async fn classes(&self, index: u32) -> io::Result<Vec<TcObject>> {
        let request = RouteNetlinkMessage::GetTrafficClass(tc_message(index)?);
        self.tc_objects(index, request).await
    }

    async fn tc_objects(&self, index: u32, request: RouteNetlinkMessage) -> io::Result<Vec<TcObject>> {
        let answers = self.request(request, NLM_F_DUMP).await?;
        Ok(answers
            .into_iter()
            .filter_map(|answer| match answer {
                RouteNetlinkMessage::NewQueueDiscipline(message)
                | RouteNetlinkMessage::NewTrafficClass(message) => Some(message),
                _ => None,
            })
            .filter(|message| u32::try_from(message.header.index) == Ok(index))
            .map(TcObject::from)
            .collect())
    }

    /// Makes or changes a qdisc whose options netlink-packet-route does not know.
    pub(crate) async fn set_qdisc(
        &self,
        index: u32,
        at: At,
        kind: &str,
        options: Option<Vec<u8>>,
        existing: Existing,
    ) -> io::Result<()> {
        let options = options.map(|bytes| TcAttribute::Other(DefaultNla::new(TCA_OPTIONS, bytes)));
        let message = tc_with(index, at, kind, options)?;
        self.ack(RouteNetlinkMessage::NewQueueDiscipline(message), existing.flags()).await
    }

    /// Makes or changes a qdisc with typed options.
    pub(crate) async fn set_known_qdisc(
        &self,
        index: u32,
        at: At,
        kind: &str,
        options: Vec<TcOption>,
        existing: Existing,
    ) -> io::Result<()> {
        let message = tc_with(index, at, kind, Some(TcAttribute::Options(options)))?;
        self.ack(RouteNetlinkMessage::NewQueueDiscipline(message), existing.flags()).await
    }

    /// Removes a class with its leaf.
    pub(crate) async fn remove_class(&self, index: u32, at: At) -> io::Result<()> {
        let mut message = tc_message(index)?;
        (message.header.handle, message.header.parent) = (at.handle, at.parent);
        self.ack(RouteNetlinkMessage::DelTrafficClass(message), 0).await
    }

    /// Removes a qdisc.
    pub(crate) async fn remove_qdisc(&self, index: u32, at: At) -> io::Result<()> {
        let mut message = tc_message(index)?;
        (message.header.handle, message.header.parent) = (at.handle, at.parent);
        self.ack(RouteNetlinkMessage::DelQueueDiscipline(message), 0).await
    }

    /// Makes or changes a class; a change leaves its queue alone.
    pub(crate) async fn set_class(
        &self,
        index: u32,
        at: At,
        kind: &str,
        options: Vec<u8>,
        existing: Existing,
    ) -> io::Result<()> {
        let options = TcAttribute::Other(DefaultNla::new(TCA_OPTIONS, options));
        let message = tc_with(index, at, kind, Some(options))?;
        self.ack(RouteNetlinkMessage::NewTrafficClass(message), existing.flags()).await
    }

    /// Changes a class that is there, and answers with what it is afterwards: the kernel says so in the same trip (`NLM_F_ECHO`,
    /// `Documentation/userspace-api/netlink/intro.rst`).
    pub(crate) async fn change_class(
        &self,
        index: u32,
        at: At,
        kind: &str,
        options: Vec<u8>,
    ) -> io::Result<TcObject> {
        let options = TcAttribute::Other(DefaultNla::new(TCA_OPTIONS, options));
        let message = RouteNetlinkMessage::NewTrafficClass(tc_with(index, at, kind, Some(options))?);
        let answers = self.request(message, NLM_F_ACK | NLM_F_ECHO).await?;
        let told = answers.into_iter().find_map(|answer| match answer {
            RouteNetlinkMessage::NewTrafficClass(message) => Some(TcObject::from(message)),
            _ => None,
        });
        told.ok_or_else(|| io::Error::other("the kernel has not said what the class is now"))
    }
}

/// Where a qdisc or class sits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct At {
    pub(crate) handle: TcHandle,
    pub(crate) parent: TcHandle,
}

pub(super) fn tc_message(index: u32) -> io::Result<TcMessage> {
    let index = i32::try_from(index).map_err(|_| io::Error::from_raw_os_error(libc::ENODEV))?;
    Ok(TcMessage::from_parts(TcHeader { index, ..TcHeader::default() }, Vec::new()))
}

pub(super) fn tc_with(index: u32, at: At, kind: &str, options: Option<TcAttribute>) -> io::Result<TcMessage> {
    let mut message = tc_message(index)?;
    (message.header.handle, message.header.parent) = (at.handle, at.parent);
    message.attributes.push(TcAttribute::Kind(kind.into()));
    message.attributes.extend(options);
    Ok(message)
}

impl From<TcMessage> for TcObject {
    fn from(message: TcMessage) -> TcObject {
        let mut object =
            TcObject { handle: message.header.handle, parent: message.header.parent, ..TcObject::default() };
        for attribute in message.attributes {
            match attribute {
                TcAttribute::Kind(kind) => object.kind = kind,
                TcAttribute::Options(options) => object.take_options(options),
                TcAttribute::Stats2(stats) => object.take_stats(&stats),
                _ => {}
            }
        }
        object
    }
}

fn eight_bytes(nla: &DefaultNla) -> Option<u64> {
    let mut bytes = vec![0; nla.value_len()];
    nla.emit_value(&mut bytes);
    Some(u64::from_ne_bytes(bytes.get(..8)?.try_into().ok()?))
}

impl TcObject {
    fn take_options(&mut self, options: Vec<TcOption>) {
        for option in options {
            match option {
                TcOption::Other(raw) => {
                    let mut bytes = vec![0; raw.buffer_len()];
                    raw.emit(&mut bytes);
                    // Without the attribute's own header of 4 bytes: what is nested in TCA_OPTIONS.
                    self.options = bytes.split_off(bytes.len().min(4));
                }
                known => self.known.push(known),
            }
        }
    }

    fn take_stats(&mut self, stats: &[TcStats2]) {
        let mut packets = None;
        for one in stats {
            match one {
                TcStats2::Basic(basic) => {
                    self.bytes = basic.bytes;
                    self.packets = basic.packets.into();
                }
                TcStats2::Queue(queue) => {
                    self.drops = queue.drops.into();
                    self.overlimits = queue.overlimits.into();
                    self.backlog_bytes = queue.backlog.into();
                    self.queued_packets = queue.qlen.into();
                }
                TcStats2::App(TcXstats::Other(bytes)) => self.extra.clone_from(bytes),
                TcStats2::Other(nla) if nla.kind() == TCA_STATS_PKT64 => packets = eight_bytes(nla),
                _ => {}
            }
        }
        self.packets = packets.unwrap_or(self.packets);
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{an_ifb, in_namespace, tc, tc_json};
    use super::*;
    use crate::codec::{HtbClass, HtbQdisc, TbfQdisc, ticks_of};

    const ROOT: At = At { handle: TcHandle { major: 1, minor: 0 }, parent: TcHandle::ROOT };

    #[test]
    fn tbf_is_what_tc_says_in_both_directions() {
        in_namespace(async |nl| {
            let index = an_ifb(&nl, "li-t").await;
            // tc shows the burst in whole microseconds at the rate.
            for (rate, rounding) in [(1_250_000, 2), (12_500_000_000, 12_500)] {
                let ours = TbfQdisc { rate_bytes_per_sec: rate, limit_bytes: 200_000, burst_bytes: 100_000 };
                nl.set_qdisc(index, ROOT, "tbf", Some(ours.to_bytes()), Existing::Replace)
                    .await
                    .expect("accepted");
                let Some(shown) = tc_json(&["qdisc", "show", "dev", "li-t", "root"]) else {
                    return println!("skipped: no tc");
                };
                let options = &shown[0]["options"];
                assert_eq!(options["rate"], rate, "{shown}");
                let burst = options["burst"].as_u64().expect("a number");
                assert!(burst.abs_diff(100_000) <= rounding, "{shown}");
                let there = nl.qdiscs(index).await.expect("a dump");
                let back = TbfQdisc::parse(&there[0].options).expect("parsed");
                assert_eq!((back.rate_bytes_per_sec, back.limit_bytes), (rate, 200_000));
                assert!(back.burst_bytes.abs_diff(100_000) <= 800, "{back:?}");
            }
            tc(&[
                "qdisc", "replace", "dev", "li-t", "root", "handle", "1:", "tbf", "rate", "10mbit", "burst",
                "32k", "limit", "64k",
            ]);
            let back = TbfQdisc::parse(&nl.qdiscs(index).await.expect("a dump")[0].options).expect("parsed");
            assert_eq!((back.rate_bytes_per_sec, back.limit_bytes), (1_250_000, 65_536));
            assert!(back.burst_bytes.abs_diff(32_768) <= 1, "{back:?}");
        });
    }

    #[test]
    fn htb_is_what_tc_says_in_both_directions() {
        in_namespace(async |nl| {
            let index = an_ifb(&nl, "li-t").await;
            let qdisc = HtbQdisc { default_class: 0x30, rate2quantum: 10 };
            nl.set_qdisc(index, ROOT, "htb", Some(qdisc.to_bytes()), Existing::Replace)
                .await
                .expect("accepted");
            let there = nl.qdiscs(index).await.expect("a dump");
            assert_eq!(HtbQdisc::parse(&there[0].options), Ok(qdisc));
            let at = At { handle: TcHandle { major: 1, minor: 0x30 }, parent: ROOT.handle };
            for (rate, text) in
                [(1_250_000, "rate 10Mbit ceil 20Mbit"), (12_500_000_000, "rate 100Gbit ceil 200Gbit")]
            {
                let ticks = ticks_of(rate / 50, rate);
                let class = HtbClass {
                    rate_bytes_per_sec: rate,
                    ceil_bytes_per_sec: rate * 2,
                    buffer_ticks: ticks,
                    cbuffer_ticks: ticks,
                    quantum_bytes: 6056,
                    prio: 1,
                };
                nl.set_class(index, at, "htb", class.to_bytes(), Existing::Replace).await.expect("accepted");
                let there = nl.classes(index).await.expect("a dump");
                assert_eq!(HtbClass::parse(&there[0].options), Ok(class));
                let Some(shown) = tc(&["class", "show", "dev", "li-t"]) else {
                    return println!("skipped: no tc");
                };
                // tc of iproute2 6.1 knows no JSON for HTB classes.
                assert!(shown.contains(text), "{shown}");
            }
            tc(&[
                "class", "replace", "dev", "li-t", "parent", "1:", "classid", "1:30", "htb", "rate", "8mbit",
                "ceil", "16mbit", "burst", "20k",
            ]);
            let back = HtbClass::parse(&nl.classes(index).await.expect("a dump")[0].options).expect("parsed");
            assert_eq!((back.rate_bytes_per_sec, back.ceil_bytes_per_sec), (1_000_000, 2_000_000));
            assert_eq!(back.buffer_ticks, ticks_of(20 * 1024, 1_000_000));
        });
    }
}
