//! What the driver tells: its state in short, and the peers as people see them.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use lathe_gossip::{NodeId, PeerState as Known, PeerView};

use super::driver::{Driver, Mode};
use super::wire::KnownPeer;
use super::{LocalShape, PeerAdvert, PeerInfo, PeerState, PeerStatus, RuntimeState};

impl Driver {
    /// State in short.
    pub(super) fn status(&self) -> PeerStatus {
        let member = self.member();
        let mut status = PeerStatus {
            state: RuntimeState::NoCluster,
            name: self.config.name.clone(),
            node_id: member.map(|m| m.card.id().to_string()),
            address: None,
            cluster: member.map(|m| m.file.cluster.clone()),
            cluster_id: member.map(|m| m.cluster_id()),
            has_ca: member.is_some_and(|m| m.has_ca()),
            peers_alive: 0,
            stats: None,
        };
        match &self.mode {
            Mode::Alone => {}
            Mode::Fault { reason, .. } => status.state = RuntimeState::Fault { reason: reason.clone() },
            Mode::Member(live) => {
                status.state = RuntimeState::Member;
                status.address = Some(live.address);
                status.peers_alive = live.node.members_active();
                status.stats = Some(live.node.stats());
            }
        }
        status
    }

    /// This host, then the others by name.
    pub(super) fn peers(&self) -> Vec<PeerInfo> {
        let mut peers = vec![self.own_info()];
        let Mode::Member(live) = &self.mode else { return peers };
        let views = live.node.peers(self.now());
        let me = live.node.id().to_string();
        let unseen =
            |peer: &&KnownPeer| peer.id != me && views.iter().all(|view| view.id.to_string() != peer.id);
        let mut others: Vec<PeerInfo> = self.remembered.iter().filter(unseen).map(remembered_info).collect();
        others.extend(views.into_iter().map(|view| {
            let name = self.remembered_name(&view.id);
            info_of(view, name)
        }));
        others.sort_by(|a, b| a.name.cmp(&b.name));
        peers.append(&mut others);
        peers
    }

    /// The name under which a peer was known in an earlier life.
    pub(super) fn remembered_name(&self, id: &NodeId) -> Option<String> {
        let id = id.to_string();
        let peer = self.remembered.iter().find(|peer| peer.id == id && !peer.name.is_empty())?;
        Some(peer.name.clone())
    }

    fn own_info(&self) -> PeerInfo {
        let shape = *self.shape.borrow();
        let address = match &self.mode {
            Mode::Member(live) => Some(live.address),
            _ => None,
        };
        let advert = PeerAdvert {
            region: self.config.region.clone(),
            version: self.config.version.clone(),
            capacity: shape.capacity,
            free: shape.free,
            revision: 0,
            measured_unix_ms: measured(&shape),
            age_ms: 0,
        };
        PeerInfo {
            name: self.config.name.clone(),
            address,
            state: PeerState::Me,
            last_heard_ms: None,
            rtt_us: None,
            advert: Some(advert),
        }
    }
}

/// When the shape was measured, ms since 1970.
pub(super) fn measured(shape: &LocalShape) -> u64 {
    let at = shape.measured.unwrap_or_else(SystemTime::now);
    at.duration_since(UNIX_EPOCH).ok().and_then(|since| u64::try_from(since.as_millis()).ok()).unwrap_or(0)
}

fn remembered_info(peer: &KnownPeer) -> PeerInfo {
    let name = if peer.name.is_empty() { peer.id.clone() } else { peer.name.clone() };
    let address = Some(peer.address);
    PeerInfo { name, address, state: PeerState::Dead, last_heard_ms: None, rtt_us: None, advert: None }
}

fn info_of(view: PeerView, remembered: Option<String>) -> PeerInfo {
    let millis = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    PeerInfo {
        name: view.name.or(remembered).unwrap_or_else(|| view.id.to_string()),
        address: Some(view.address),
        state: match view.state {
            Known::Alive => PeerState::Alive,
            Known::Suspect => PeerState::Suspect,
            Known::Dead => PeerState::Dead,
        },
        last_heard_ms: view.last_heard.map(millis),
        rtt_us: view.rtt.and_then(|rtt| u64::try_from(rtt.as_micros()).ok()),
        advert: view.advert.map(|(advert, age)| PeerAdvert {
            region: advert.region,
            version: advert.version,
            capacity: advert.capacity,
            free: advert.free,
            revision: advert.counter,
            measured_unix_ms: advert.measured_unix_ms,
            age_ms: millis(age),
        }),
    }
}
