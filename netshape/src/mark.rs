//! A firewall mark on everything that a machine sends, set where it enters the host: at its tap, so that it says which
//! machine this is whatever addresses the packet has. It stays with the packet through bridge, routing and NAT;
//! [`crate::Uplink`] sorts by it. A packet's priority would not do: the host's routing writes it anew (`ip_forward`).
//!
//! tc's `skbedit` at the tap's ingress, between the check of sources and the redirect to the ifb; Linux 2.6.36 or later with
//! `act_skbedit`.

use crate::codec::SkbEdit;
use crate::error::{Error, Outcome};
use crate::ingress;
use crate::name::IfName;
use crate::netlink::{Existing, Netlink, failed};

/// Marks of machines.
pub struct Marking;

impl Marking {
    /// Marks what the machine sends. Another mark is replaced in one step.
    ///
    /// # Errors
    /// [`Error::NoLink`], [`Error::Foreign`], [`Error::Kernel`], [`Error::ReadBack`].
    pub async fn ensure(nl: &Netlink, tap: &IfName, mark: u32) -> Result<Outcome, Error> {
        let link = nl.link_of_kind(tap, "tun").await?;
        ingress::ensure(nl, tap, link.index).await?;
        let found = ingress::filters_of(nl, tap, link.index, ingress::MARK).await?;
        let wanted = SkbEdit { mark };
        let (at, existing) = match found.as_slice() {
            [one] if one.edits == [wanted] => return Ok(Outcome::Unchanged),
            [one] if one.kind == "u32" => (one.handle, Existing::Replace),
            [] => (0, Existing::Fail),
            _ => {
                ingress::remove(nl, tap, link.index, ingress::MARK).await?;
                (0, Existing::Fail)
            }
        };
        nl.set_edit(link.index, ingress::filter_at(ingress::MARK, at), wanted, existing)
            .await
            .map_err(failed("mark what comes in on", tap))?;
        let shown = Marking::read(nl, tap).await?;
        if shown == Some(mark) {
            return Ok(Outcome::Changed);
        }
        Err(Error::ReadBack {
            what: "the mark",
            link: tap.to_string(),
            wrote: format!("{mark:#x}"),
            shows: shown.map_or("none".into(), |shown| format!("{shown:#x}")),
        })
    }

    /// The mark that is set.
    ///
    /// # Errors
    /// [`Error::NoLink`], [`Error::Foreign`], [`Error::Kernel`].
    pub async fn read(nl: &Netlink, tap: &IfName) -> Result<Option<u32>, Error> {
        let link = nl.link_of_kind(tap, "tun").await?;
        let found = ingress::filters_of(nl, tap, link.index, ingress::MARK).await?;
        Ok(found.iter().flat_map(|filter| &filter.edits).map(|edit| edit.mark).next())
    }

    /// Marks nothing any more; everything else on the tap stays.
    ///
    /// # Errors
    /// [`Error::NoLink`], [`Error::Foreign`], [`Error::Kernel`].
    pub async fn remove(nl: &Netlink, tap: &IfName) -> Result<Outcome, Error> {
        let link = nl.link_of_kind(tap, "tun").await?;
        ingress::remove(nl, tap, link.index, ingress::MARK).await
    }
}
