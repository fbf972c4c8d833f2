//! What happens to a frame that a guest sends, before the bridge sees it: the filters at the ingress of its tap, in this
//! order, each at a priority of its own so that one is changed without touching the others.
//!
//! ```text
//! guest ─► tap ─► SPOOF  forged? dropped ─► MARK  which machine ─► REDIRECT  to the ifb that shapes ─► bridge
//! ```

use netlink_packet_route::tc::TcHandle;

use crate::error::{Error, Outcome};
use crate::name::IfName;
use crate::netlink::{At, CLSACT, CLSACT_INGRESS, Existing, FilterAt, FoundFilter, Netlink, failed};

/// Refuses forged sources.
pub(crate) const SPOOF: u16 = 1;
/// Marks the machine's traffic.
pub(crate) const MARK: u16 = 2;
/// Sends it to the machine's ifb.
pub(crate) const REDIRECT: u16 = 3;

const INGRESS: At = At { handle: CLSACT, parent: TcHandle::CLSACT };

/// A filter of ours.
pub(crate) fn filter_at(priority: u16, handle: u32) -> FilterAt {
    FilterAt { parent: CLSACT_INGRESS, priority, handle }
}

async fn has_clsact(nl: &Netlink, tap: &IfName, index: u32) -> Result<bool, Error> {
    let qdiscs = nl.qdiscs(index).await.map_err(failed("read the queues of", tap))?;
    Ok(qdiscs.iter().any(|q| q.handle == CLSACT))
}

async fn filters(nl: &Netlink, tap: &IfName, index: u32) -> Result<Vec<FoundFilter>, Error> {
    nl.filters(index, CLSACT_INGRESS).await.map_err(failed("read the filters of", tap))
}

/// Makes the place for filters, or finds it. A redirect at a priority of others, as earlier versions had it, gets its own.
pub(crate) async fn ensure(nl: &Netlink, tap: &IfName, index: u32) -> Result<(), Error> {
    ensure_clsact(nl, tap, index).await?;
    let found = filters(nl, tap, index).await?;
    let misplaced = |f: &&FoundFilter| f.priority < REDIRECT && !f.redirects.is_empty();
    if let Some(to) = found.iter().find(misplaced).and_then(|f| f.redirects.first()) {
        redirect(nl, tap, index, *to).await?;
    }
    Ok(())
}

/// Where the tap's ingress is sent.
pub(crate) async fn redirects(nl: &Netlink, tap: &IfName, index: u32) -> Result<Vec<u32>, Error> {
    if !has_clsact(nl, tap, index).await? {
        return Ok(Vec::new());
    }
    Ok(filters(nl, tap, index).await?.iter().flat_map(|f| f.redirects.clone()).collect())
}

/// Whether [`redirect`] has nothing to do.
pub(crate) async fn is_redirected(nl: &Netlink, tap: &IfName, index: u32, to: u32) -> Result<bool, Error> {
    // Where there is no clsact there are no filters.
    let found = filters(nl, tap, index).await?;
    let mut redirects = found.iter().filter(|filter| !filter.redirects.is_empty());
    let ours = redirects.next().is_some_and(|one| one.priority == REDIRECT && one.redirects == [to]);
    Ok(ours && redirects.next().is_none())
}

/// Sends the tap's ingress to the link `to` and nowhere else; nothing is touched where it does so already.
pub(crate) async fn redirect(nl: &Netlink, tap: &IfName, index: u32, to: u32) -> Result<(), Error> {
    ensure_clsact(nl, tap, index).await?;
    let found = filters(nl, tap, index).await?.into_iter().filter(|f| !f.redirects.is_empty());
    let (here, elsewhere): (Vec<_>, Vec<_>) = found.partition(|f| f.priority == REDIRECT);
    let (handle, existing) = match here.as_slice() {
        [one] if one.redirects == [to] => (0, None),
        // To an ifb that is gone.
        [one] => (one.handle, Some(Existing::Replace)),
        [] => (0, Some(Existing::Fail)),
        _ => {
            remove(nl, tap, index, REDIRECT).await?;
            (0, Some(Existing::Fail))
        }
    };
    if let Some(existing) = existing {
        nl.set_redirect(index, filter_at(REDIRECT, handle), to, existing)
            .await
            .map_err(failed("redirect what comes in on", tap))?;
    }
    for filter in elsewhere {
        remove(nl, tap, index, filter.priority).await?;
    }
    Ok(())
}

async fn ensure_clsact(nl: &Netlink, tap: &IfName, index: u32) -> Result<(), Error> {
    if has_clsact(nl, tap, index).await? {
        return Ok(());
    }
    nl.set_qdisc(index, INGRESS, "clsact", None, Existing::Fail).await.map_err(failed("add clsact to", tap))
}

/// The filters of a priority.
pub(crate) async fn filters_of(
    nl: &Netlink,
    tap: &IfName,
    index: u32,
    priority: u16,
) -> Result<Vec<FoundFilter>, Error> {
    if !has_clsact(nl, tap, index).await? {
        return Ok(Vec::new());
    }
    Ok(filters(nl, tap, index).await?.into_iter().filter(|f| f.priority == priority).collect())
}

/// Removes all filters of a priority.
pub(crate) async fn remove(nl: &Netlink, tap: &IfName, index: u32, priority: u16) -> Result<Outcome, Error> {
    if filters_of(nl, tap, index, priority).await?.is_empty() {
        return Ok(Outcome::Unchanged);
    }
    nl.remove_filters(index, CLSACT_INGRESS, priority).await.map_err(failed("remove filters of", tap))?;
    Ok(Outcome::Changed)
}
