//! The host's bridge: where all machines and the host meet.

use netlink_packet_route::link::InfoKind;

use crate::addr::Prefix;
use crate::error::{Error, Outcome};
use crate::name::IfName;
use crate::netlink::{LinkChange, Netlink, failed};

const KIND: &str = "bridge";

/// The host's bridge.
pub struct Bridge;

impl Bridge {
    /// Makes the bridge, or finds it; gives it exactly these addresses (link-local ones aside), the MTU if any, and brings
    /// it up. Returns its interface index. The MAC address is pinned: a bridge otherwise takes the least of its ports',
    /// and guests would lose their gateway whenever a machine comes or goes.
    ///
    /// # Errors
    /// [`Error::Foreign`] if the name belongs to another kind of interface; [`Error::Kernel`].
    pub async fn ensure(
        nl: &Netlink,
        name: &IfName,
        addresses: &[Prefix],
        mtu: Option<u32>,
    ) -> Result<u32, Error> {
        let (link, created) = match nl.link(name).await? {
            Some(link) if link.kind == KIND => (link, false),
            Some(link) => {
                return Err(Error::Foreign {
                    link: name.clone(),
                    kind: link.kind_or_hardware(),
                    wanted: KIND,
                });
            }
            None => {
                nl.add_link(name, InfoKind::Bridge).await.map_err(failed("make the bridge", name))?;
                (nl.link_of_kind(name, KIND).await?, true)
            }
        };
        let change = LinkChange {
            up: (!link.up).then_some(true),
            mtu: mtu.filter(|wanted| link.mtu != Some(*wanted)),
            mac: link.mac.filter(|_| created),
            ..LinkChange::default()
        };
        if change != LinkChange::default() {
            nl.set_link(link.index, &change).await.map_err(failed("set up the bridge", name))?;
        }
        let there = nl.addresses(link.index).await.map_err(failed("read the addresses of", name))?;
        for address in addresses.iter().filter(|a| !there.contains(a)) {
            nl.set_address(link.index, *address, true).await.map_err(failed("add an address to", name))?;
        }
        for address in there.iter().filter(|a| !addresses.contains(a)) {
            nl.set_address(link.index, *address, false)
                .await
                .map_err(failed("remove an address from", name))?;
        }
        Ok(link.index)
    }

    /// Removes the bridge; its ports stay, without it.
    ///
    /// # Errors
    /// [`Error::Foreign`], [`Error::Kernel`].
    pub async fn remove(nl: &Netlink, name: &IfName) -> Result<Outcome, Error> {
        match nl.link(name).await? {
            None => Ok(Outcome::Unchanged),
            Some(link) if link.kind == KIND => {
                nl.remove_link(link.index).await.map_err(failed("remove", name))?;
                Ok(Outcome::Changed)
            }
            Some(link) => {
                Err(Error::Foreign { link: name.clone(), kind: link.kind_or_hardware(), wanted: KIND })
            }
        }
    }
}
