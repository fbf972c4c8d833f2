//! Links, bridge ports, forwarding entries, addresses and the default route.

use std::io;

use netlink_packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope,
};
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoBridgePort, InfoKind, InfoPortData, InfoPortKind,
    LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::neighbour::{NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState};
use netlink_packet_route::route::{RouteAttribute, RouteHeader, RouteMessage, RouteType};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::{Netlink, failed};
use crate::addr::{Mac, Prefix};
use crate::error::Error;
use crate::name::IfName;

/// A link as the kernel shows it.
#[derive(Clone, Debug)]
pub(crate) struct Link {
    pub(crate) name: String,
    pub(crate) index: u32,
    /// `tun`, `ifb`, `bridge`, …; empty for hardware.
    pub(crate) kind: String,
    pub(crate) up: bool,
    /// Of a tap: a process has its queue.
    pub(crate) carrier: bool,
    pub(crate) mac: Option<Mac>,
    pub(crate) mtu: Option<u32>,
    pub(crate) queue_len: Option<u32>,
    pub(crate) master: Option<u32>,
    pub(crate) port: Option<PortFlags>,
    pub(crate) rx: Counters,
    pub(crate) tx: Counters,
}

/// Counters of one direction of a link.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counters {
    pub(crate) bytes: u64,
    pub(crate) packets: u64,
    pub(crate) drops: u64,
}

/// Flags of a bridge port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct PortFlags {
    /// No traffic to other isolated ports.
    pub(crate) isolated: bool,
    /// Only source addresses with a static entry on this port (Linux 5.18).
    pub(crate) locked: bool,
    /// Source addresses are learned.
    pub(crate) learning: bool,
}

/// What to change on a link; `None` stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct LinkChange {
    pub(crate) up: Option<bool>,
    pub(crate) mtu: Option<u32>,
    pub(crate) queue_len: Option<u32>,
    pub(crate) master: Option<u32>,
    pub(crate) mac: Option<Mac>,
}

impl Netlink {
    /// All links.
    pub(crate) async fn links(&self) -> io::Result<Vec<Link>> {
        let answers = self.request(RouteNetlinkMessage::GetLink(LinkMessage::default()), NLM_F_DUMP).await?;
        Ok(answers
            .into_iter()
            .filter_map(|answer| match answer {
                RouteNetlinkMessage::NewLink(message) => Some(Link::from(message)),
                _ => None,
            })
            .collect())
    }

    /// One link.
    pub(crate) async fn link(&self, name: &IfName) -> Result<Option<Link>, Error> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.to_string()));
        match self.request(RouteNetlinkMessage::GetLink(message), NLM_F_ACK).await {
            Ok(answers) => Ok(answers.into_iter().find_map(|answer| match answer {
                RouteNetlinkMessage::NewLink(message) => Some(Link::from(message)),
                _ => None,
            })),
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
            Err(error) => Err(failed("look for", name)(error)),
        }
    }

    /// One link that must be there and of a kind.
    pub(crate) async fn link_of_kind(&self, name: &IfName, wanted: &'static str) -> Result<Link, Error> {
        let link = self.link(name).await?.ok_or_else(|| Error::NoLink(name.clone()))?;
        if link.kind == wanted {
            Ok(link)
        } else {
            Err(Error::Foreign { link: name.clone(), kind: link.kind_or_hardware(), wanted })
        }
    }

    /// Makes a link of a kind that needs no parameters.
    pub(crate) async fn add_link(&self, name: &IfName, kind: InfoKind) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.to_string()));
        message.attributes.push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind)]));
        self.ack(RouteNetlinkMessage::NewLink(message), NLM_F_CREATE | NLM_F_EXCL).await
    }

    /// Changes a link.
    pub(crate) async fn set_link(&self, index: u32, change: &LinkChange) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        if let Some(up) = change.up {
            message.header.change_mask = LinkFlags::Up;
            message.header.flags = if up { LinkFlags::Up } else { LinkFlags::empty() };
        }
        message.attributes.extend(change.mtu.map(LinkAttribute::Mtu));
        message.attributes.extend(change.queue_len.map(LinkAttribute::TxQueueLen));
        message.attributes.extend(change.master.map(LinkAttribute::Controller));
        message.attributes.extend(change.mac.map(|mac| LinkAttribute::Address(mac.0.to_vec())));
        self.ack(RouteNetlinkMessage::SetLink(message), 0).await
    }

    /// No link-local IPv6 address of the host on this link. A kernel without IPv6 refuses, and has none anyway.
    pub(crate) async fn no_own_ipv6(&self, index: u32) {
        let mut message = LinkMessage::default();
        message.header.index = index;
        let mode = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
        message.attributes.push(LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![mode])]));
        let _ = self.ack(RouteNetlinkMessage::SetLink(message), 0).await;
    }

    /// Sets the flags of a bridge port.
    pub(crate) async fn set_port(&self, index: u32, flags: PortFlags) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        let data = vec![
            InfoBridgePort::Isolated(flags.isolated),
            InfoBridgePort::Locked(flags.locked),
            InfoBridgePort::Learning(flags.learning),
        ];
        message.attributes.push(LinkAttribute::LinkInfo(vec![
            LinkInfo::PortKind(InfoPortKind::Bridge),
            LinkInfo::PortData(InfoPortData::BridgePort(data)),
        ]));
        self.ack(RouteNetlinkMessage::NewLink(message), 0).await
    }

    /// Removes a link; one that is gone is no error.
    pub(crate) async fn remove_link(&self, index: u32) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        match self.ack(RouteNetlinkMessage::DelLink(message), 0).await {
            Err(error) if error.raw_os_error() != Some(libc::ENODEV) => Err(error),
            _ => Ok(()),
        }
    }

    /// The static addresses behind a bridge port.
    pub(crate) async fn static_entries(&self, port: u32) -> io::Result<Vec<Mac>> {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Bridge;
        let answers = self.request(RouteNetlinkMessage::GetNeighbour(message), NLM_F_DUMP).await?;
        Ok(answers
            .into_iter()
            .filter_map(|answer| match answer {
                RouteNetlinkMessage::NewNeighbour(message)
                    if message.header.ifindex == port && message.header.state == NeighbourState::Noarp =>
                {
                    message.attributes.iter().find_map(|attribute| match attribute {
                        NeighbourAttribute::LinkLayerAddress(bytes) => mac_of(bytes),
                        _ => None,
                    })
                }
                _ => None,
            })
            .collect())
    }

    /// Adds or removes a static entry of the bridge (`bridge fdb … master static`).
    pub(crate) async fn set_static_entry(&self, port: u32, mac: Mac, present: bool) -> io::Result<()> {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Bridge;
        message.header.ifindex = port;
        message.header.state = NeighbourState::Noarp;
        message.header.flags = NeighbourFlags::Controller;
        message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()));
        if present {
            self.ack(RouteNetlinkMessage::NewNeighbour(message), NLM_F_CREATE | NLM_F_REPLACE).await
        } else {
            self.ack(RouteNetlinkMessage::DelNeighbour(message), 0).await
        }
    }

    /// Addresses of a link, link-local ones left out.
    pub(crate) async fn addresses(&self, index: u32) -> io::Result<Vec<Prefix>> {
        let answers =
            self.request(RouteNetlinkMessage::GetAddress(AddressMessage::default()), NLM_F_DUMP).await?;
        Ok(answers
            .into_iter()
            .filter_map(|answer| match answer {
                RouteNetlinkMessage::NewAddress(message)
                    if message.header.index == index && message.header.scope != AddressScope::Link =>
                {
                    let len = message.header.prefix_len;
                    // IPv4 has both: `Local` is ours, `Address` a peer's or the same.
                    let local = message.attributes.iter().find_map(|attribute| match attribute {
                        AddressAttribute::Local(addr) => Some(*addr),
                        _ => None,
                    });
                    let any = message.attributes.iter().find_map(|attribute| match attribute {
                        AddressAttribute::Address(addr) => Some(*addr),
                        _ => None,
                    });
                    local.or(any).map(|addr| Prefix { addr, len })
                }
                _ => None,
            })
            .collect())
    }

    /// The link of the IPv4 default route of the main table with the least metric.
    pub(crate) async fn default_route(&self) -> io::Result<Option<u32>> {
        let mut message = RouteMessage::default();
        message.header.address_family = AddressFamily::Inet;
        let answers = self.request(RouteNetlinkMessage::GetRoute(message), NLM_F_DUMP).await?;
        let defaults = answers.into_iter().filter_map(|answer| match answer {
            RouteNetlinkMessage::NewRoute(route)
                if route.header.destination_prefix_length == 0
                    && route.header.table == RouteHeader::RT_TABLE_MAIN
                    && route.header.kind == RouteType::Unicast =>
            {
                let number = |of: fn(&RouteAttribute) -> Option<u32>| route.attributes.iter().find_map(of);
                let metric =
                    number(|a| if let RouteAttribute::Priority(metric) = a { Some(*metric) } else { None });
                let index = number(|a| if let RouteAttribute::Oif(index) = a { Some(*index) } else { None });
                Some((metric.unwrap_or(0), index?))
            }
            _ => None,
        });
        // Of equal metrics the kernel takes the first.
        Ok(defaults.min_by_key(|(metric, _)| *metric).map(|(_, index)| index))
    }

    /// Adds or removes an address.
    pub(crate) async fn set_address(&self, index: u32, prefix: Prefix, present: bool) -> io::Result<()> {
        let mut message = AddressMessage::default();
        message.header.index = index;
        message.header.prefix_len = prefix.len;
        message.header.family =
            if prefix.addr.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
        message.attributes.push(AddressAttribute::Local(prefix.addr));
        message.attributes.push(AddressAttribute::Address(prefix.addr));
        if prefix.addr.is_ipv6() {
            // A bridge without a port has no carrier, and duplicate address detection would wait for it.
            message.header.flags = AddressHeaderFlags::Nodad;
            message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        if present {
            self.ack(RouteNetlinkMessage::NewAddress(message), NLM_F_CREATE | NLM_F_REPLACE).await
        } else {
            self.ack(RouteNetlinkMessage::DelAddress(message), 0).await
        }
    }
}

fn mac_of(bytes: &[u8]) -> Option<Mac> {
    bytes.try_into().ok().map(Mac)
}
impl Link {
    /// For error messages.
    pub(crate) fn kind_or_hardware(&self) -> String {
        if self.kind.is_empty() { "hardware interface".into() } else { self.kind.clone() }
    }
}

impl From<LinkMessage> for Link {
    fn from(message: LinkMessage) -> Link {
        let flags = message.header.flags;
        let mut link = Link {
            name: String::new(),
            index: message.header.index,
            kind: String::new(),
            up: flags.contains(LinkFlags::Up),
            carrier: flags.contains(LinkFlags::LowerUp),
            mac: None,
            mtu: None,
            queue_len: None,
            master: None,
            port: None,
            rx: Counters::default(),
            tx: Counters::default(),
        };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name = name,
                LinkAttribute::Address(bytes) => link.mac = mac_of(&bytes),
                LinkAttribute::Mtu(mtu) => link.mtu = Some(mtu),
                LinkAttribute::TxQueueLen(len) => link.queue_len = Some(len),
                LinkAttribute::Controller(index) => link.master = Some(index),
                LinkAttribute::Stats64(s) => {
                    link.rx = Counters { bytes: s.rx_bytes, packets: s.rx_packets, drops: s.rx_dropped };
                    link.tx = Counters { bytes: s.tx_bytes, packets: s.tx_packets, drops: s.tx_dropped };
                }
                LinkAttribute::LinkInfo(infos) => link.take_infos(infos),
                _ => {}
            }
        }
        link
    }
}

impl Link {
    fn take_infos(&mut self, infos: Vec<LinkInfo>) {
        for info in infos {
            match info {
                LinkInfo::Kind(kind) => self.kind = kind.to_string(),
                LinkInfo::PortData(InfoPortData::BridgePort(data)) => {
                    let port = self.port.get_or_insert_with(PortFlags::default);
                    for flag in data {
                        match flag {
                            InfoBridgePort::Isolated(on) => port.isolated = on,
                            InfoBridgePort::Locked(on) => port.locked = on,
                            InfoBridgePort::Learning(on) => port.learning = on,
                            _ => {}
                        }
                    }
                }
                _ => {}
            }
        }
    }
}
