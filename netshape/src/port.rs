//! A machine's place on the bridge: its tap, who may speak through it, what went through; and how all of it is found
//! and removed again.

use std::os::fd::OwnedFd;

use crate::addr::Mac;
use crate::error::{Error, Outcome};
use crate::name::IfName;
use crate::netlink::{Link, LinkChange, Netlink, PortFlags, failed};
use crate::tap::{Tap, TapError};

const TAP_KIND: &str = "tun";
const IFB_KIND: &str = "ifb";
/// Frames that the tap's ring holds for the monitor; the rate's own queue is in front of it.
const TAP_RING_FRAMES: u32 = 1_000;

/// What a machine's port is to be.
#[derive(Clone, Copy, Debug)]
pub struct PortSpec<'a> {
    /// The tap, by [`IfName::tap_of`].
    pub tap: &'a IfName,
    /// The bridge, which exists.
    pub bridge: &'a IfName,
    /// Who may open the tap's queue without a capability.
    pub owner: Option<u32>,
    /// Largest packet in bytes; `None` leaves 1500.
    pub mtu: Option<u32>,
    /// The only address that may send: nothing else from this port enters the bridge, and nothing is learned (Linux 5.18).
    /// Which IP addresses it may use is for [`crate::AntiSpoof`].
    pub guest_mac: Option<Mac>,
    /// Machines whose ports are isolated reach the host and what is beyond, not each other.
    pub isolated: bool,
}

/// A port as it is.
#[derive(Debug)]
pub struct Port {
    /// Interface index of the tap.
    pub ifindex: u32,
    /// Its queue.
    pub fd: PortFd,
}

/// The queue of a tap.
#[derive(Debug)]
pub enum PortFd {
    /// Opened now, to be passed to a monitor.
    Open(OwnedFd),
    /// A monitor that runs has it.
    HeldElsewhere,
}

/// A link that Lathe made for a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundLink {
    /// The name.
    pub name: IfName,
    /// What it is.
    pub kind: LinkKind,
    /// Interface index.
    pub ifindex: u32,
    /// Of a tap that is up: a process has its queue open.
    pub held: bool,
    /// Interface index of the bridge that it is on.
    pub master: Option<u32>,
}

/// Kinds of links that Lathe makes for machines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkKind {
    /// A machine's tap.
    Tap,
    /// The ifb that shapes what it sends.
    Ifb,
}

/// What went through a tap since it was made, seen from the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkStats {
    /// Bytes.
    pub to_guest_bytes: u64,
    /// Packets; a large GSO packet counts once.
    pub to_guest_packets: u64,
    /// Dropped because the guest did not take them.
    pub to_guest_drops: u64,
    /// Bytes.
    pub from_guest_bytes: u64,
    /// Packets.
    pub from_guest_packets: u64,
    /// Dropped on the way in.
    pub from_guest_drops: u64,
}

/// Ports of machines.
pub struct Network;

impl Network {
    /// Makes a machine's port, or finds it and sets right what differs. If it fails on a tap that it made, the tap is
    /// removed again.
    ///
    /// # Errors
    /// [`Error::Foreign`], [`Error::NoLink`] without the bridge, [`Error::Tap`], [`Error::Kernel`], [`Error::ReadBack`] where the
    /// kernel cannot lock a port.
    pub async fn ensure(nl: &Netlink, spec: &PortSpec<'_>) -> Result<Port, Error> {
        IfName::ifb_of(spec.tap)?;
        let bridge = nl.link_of_kind(spec.bridge, "bridge").await?;
        let before = nl.link(spec.tap).await?;
        if let Some(link) = before.as_ref().filter(|link| link.kind != TAP_KIND) {
            return Err(Error::Foreign {
                link: spec.tap.clone(),
                kind: link.kind_or_hardware(),
                wanted: "tap",
            });
        }
        let fd = match Tap::create(spec.tap, spec.owner) {
            Ok(fd) => PortFd::Open(fd),
            Err(TapError::Busy(_)) if before.is_some() => PortFd::HeldElsewhere,
            Err(error) => return Err(error.into()),
        };
        match set_up(nl, spec, bridge.index).await {
            Ok(ifindex) => Ok(Port { ifindex, fd }),
            Err(error) => {
                if before.is_none() {
                    // The first error counts; a tap that stays is found by `list`.
                    let _ = Network::remove(nl, spec.tap).await;
                }
                Err(error)
            }
        }
    }

    /// Removes a machine's tap and ifb with their queues, classes, filters and entries; also under a monitor that still
    /// holds the queue, whose descriptor then is dead.
    ///
    /// # Errors
    /// [`Error::Foreign`] if the name belongs to another kind of interface; [`Error::Kernel`].
    pub async fn remove(nl: &Netlink, tap: &IfName) -> Result<Outcome, Error> {
        let ifb = IfName::ifb_of(tap)?;
        let mut outcome = Outcome::Unchanged;
        for (name, kind) in [(tap, TAP_KIND), (&ifb, IFB_KIND)] {
            match nl.link(name).await? {
                None => {}
                Some(link) if link.kind == kind => {
                    nl.remove_link(link.index).await.map_err(failed("remove", name))?;
                    outcome = Outcome::Changed;
                }
                Some(link) => {
                    return Err(Error::Foreign {
                        link: name.clone(),
                        kind: link.kind_or_hardware(),
                        wanted: kind,
                    });
                }
            }
        }
        Ok(outcome)
    }

    /// Everything that Lathe made for machines, by name and kind: what is left after a crash.
    ///
    /// # Errors
    /// [`Error::Socket`].
    pub async fn list(nl: &Netlink) -> Result<Vec<FoundLink>, Error> {
        let links = nl.links().await.map_err(Error::Socket)?;
        Ok(links.iter().filter_map(found).collect())
    }

    /// Counters of a machine's tap.
    ///
    /// # Errors
    /// [`Error::NoLink`], [`Error::Foreign`].
    pub async fn stats(nl: &Netlink, tap: &IfName) -> Result<LinkStats, Error> {
        let link = nl.link_of_kind(tap, TAP_KIND).await?;
        // What the host transmits on a tap, the guest receives.
        Ok(LinkStats {
            to_guest_bytes: link.tx.bytes,
            to_guest_packets: link.tx.packets,
            to_guest_drops: link.tx.drops,
            from_guest_bytes: link.rx.bytes,
            from_guest_packets: link.rx.packets,
            from_guest_drops: link.rx.drops,
        })
    }
}

fn found(link: &Link) -> Option<FoundLink> {
    let name = IfName::new(&link.name).ok()?;
    let kind = match link.kind.as_str() {
        TAP_KIND if name.is_tap() => LinkKind::Tap,
        IFB_KIND if name.is_ifb() => LinkKind::Ifb,
        _ => return None,
    };
    Some(FoundLink {
        held: kind == LinkKind::Tap && link.carrier,
        name,
        kind,
        ifindex: link.index,
        master: link.master,
    })
}

/// Brings an existing tap to what the spec says; returns its index.
async fn set_up(nl: &Netlink, spec: &PortSpec<'_>, bridge: u32) -> Result<u32, Error> {
    let tap = nl.link_of_kind(spec.tap, TAP_KIND).await?;
    if !tap.up {
        nl.no_own_ipv6(tap.index).await;
    }
    let change = LinkChange {
        master: (tap.master != Some(bridge)).then_some(bridge),
        mtu: spec.mtu.filter(|wanted| tap.mtu != Some(*wanted)),
        queue_len: (tap.queue_len != Some(TAP_RING_FRAMES)).then_some(TAP_RING_FRAMES),
        ..LinkChange::default()
    };
    if change != LinkChange::default() {
        nl.set_link(tap.index, &change).await.map_err(failed("put on the bridge", spec.tap))?;
    }
    set_up_port(nl, spec, tap.index).await?;
    // Up comes last: nothing passes before the port is as it should be.
    if !tap.up {
        let up = LinkChange { up: Some(true), ..LinkChange::default() };
        nl.set_link(tap.index, &up).await.map_err(failed("bring up", spec.tap))?;
    }
    Ok(tap.index)
}

async fn set_up_port(nl: &Netlink, spec: &PortSpec<'_>, index: u32) -> Result<(), Error> {
    let locked = spec.guest_mac.is_some();
    let wanted = PortFlags { isolated: spec.isolated, locked, learning: !locked };
    let shown = nl.link(spec.tap).await?.and_then(|link| link.port);
    if shown != Some(wanted) {
        nl.set_port(index, wanted).await.map_err(failed("set the bridge port", spec.tap))?;
        let shown = nl.link(spec.tap).await?.and_then(|link| link.port);
        if shown != Some(wanted) {
            return Err(Error::ReadBack {
                what: "the bridge port",
                link: spec.tap.to_string(),
                wrote: format!("isolated {}, locked {}", wanted.isolated, wanted.locked),
                shows: shown.map_or("nothing".into(), |s| {
                    format!("isolated {}, locked {} (locked needs Linux 5.18)", s.isolated, s.locked)
                }),
            });
        }
    }
    let entries = nl.static_entries(index).await.map_err(failed("read the addresses behind", spec.tap))?;
    for mac in entries.iter().filter(|mac| Some(**mac) != spec.guest_mac) {
        nl.set_static_entry(index, *mac, false)
            .await
            .map_err(failed("remove an address behind", spec.tap))?;
    }
    if let Some(mac) = spec.guest_mac.filter(|mac| !entries.contains(mac)) {
        nl.set_static_entry(index, mac, true).await.map_err(failed("add the address behind", spec.tap))?;
    }
    Ok(())
}
