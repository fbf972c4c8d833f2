//! The peers as the local API speaks of them: [`Cluster`] for [`PeerHandle`].

use std::net::SocketAddr;
use std::time::Duration;

use super::{PeerError, PeerHandle, PeerInfo, PeerState, PeerStatus};
use crate::api::core::{Cluster, Later, Reply};
use crate::api::wire::{
    ClusterInit, ClusterView, HostAmounts, JoinRequest, PeerList, PeerView, SCHEMA, TokenView,
};
use crate::problem::{Kind, Problem};

impl Cluster for PeerHandle {
    fn peers(&self) -> Reply<'_, PeerList> {
        Box::pin(async {
            let cluster = self.status().await?.cluster.unwrap_or_default();
            let peers = PeerHandle::peers(self).await?.iter().map(view).collect();
            Ok(PeerList { schema: SCHEMA, cluster, peers })
        })
    }

    fn alive(&self) -> Later<'_, u64> {
        Box::pin(async { self.status().await.map_or(0, |status| status.peers_alive as u64) })
    }

    fn init(&self, request: ClusterInit) -> Reply<'_, ClusterView> {
        Box::pin(async move {
            let address = address(request.address.as_deref())?;
            Ok(cluster(PeerHandle::init(self, &request.name, address).await?))
        })
    }

    fn token(&self, ttl_sec: u64) -> Reply<'_, TokenView> {
        Box::pin(async move {
            let token = PeerHandle::token(self, Duration::from_secs(ttl_sec)).await?;
            Ok(TokenView { schema: SCHEMA, token, ttl_sec })
        })
    }

    fn join(&self, request: JoinRequest) -> Reply<'_, ClusterView> {
        Box::pin(async move {
            let address = address(request.address.as_deref())?;
            Ok(cluster(PeerHandle::join(self, &request.token, address).await?))
        })
    }
}

fn address(text: Option<&str>) -> Result<Option<SocketAddr>, Problem> {
    let Some(text) = text else { return Ok(None) };
    let shown: String = text.chars().take(64).collect();
    match text.parse::<SocketAddr>() {
        Ok(address) if !address.ip().is_unspecified() && address.port() != 0 => Ok(Some(address)),
        _ => Err(Problem::new(
            Kind::BadRequest,
            "peer-address",
            format!("{shown:?} is not IP:PORT that peers can reach"),
        )
        .fix("--address 10.0.0.21:7946")),
    }
}

fn cluster(status: PeerStatus) -> ClusterView {
    ClusterView {
        schema: SCHEMA,
        cluster: status.cluster.unwrap_or_default(),
        node: status.name,
        address: status.address.map(|address| address.to_string()).unwrap_or_default(),
    }
}

/// An advert tells capacity and free; how the rest divides is the host's own business.
fn view(peer: &PeerInfo) -> PeerView {
    let advert = peer.advert.as_ref();
    let amounts = |capacity: u64, free: u64| HostAmounts { capacity, free, ..HostAmounts::default() };
    let state = match peer.state {
        PeerState::Me => "self",
        PeerState::Alive => "alive",
        PeerState::Suspect => "suspect",
        PeerState::Dead => "dead",
    };
    PeerView {
        name: peer.name.clone(),
        state: state.to_owned(),
        address: peer.address.map(|address| address.to_string()).unwrap_or_default(),
        revision: advert.map_or(0, |a| a.revision),
        heard_msec: peer.last_heard_ms,
        rtt_usec: peer.rtt_us,
        version: advert.map(|a| a.version.clone()).unwrap_or_default(),
        cpu: advert.map(|a| amounts(a.capacity.cpu_milli, a.free.cpu_milli)).unwrap_or_default(),
        memory: advert.map(|a| amounts(a.capacity.memory_bytes, a.free.memory_bytes)).unwrap_or_default(),
    }
}

impl From<PeerError> for Problem {
    fn from(error: PeerError) -> Self {
        let kind = match &error {
            PeerError::TokenMalformed(_) | PeerError::NameInvalid(_) => Kind::BadRequest,
            PeerError::NoCluster
            | PeerError::NoCa { .. }
            | PeerError::AlreadyMember { .. }
            | PeerError::NameTaken(_)
            | PeerError::Bind { .. } => Kind::Conflict,
            PeerError::TokenRejected { .. }
            | PeerError::TokenExpired { .. }
            | PeerError::PinMismatch { .. } => Kind::NotPermitted,
            PeerError::UnknownPeer(_) => Kind::NotFound,
            PeerError::Unreachable { .. } | PeerError::Stopped => Kind::Unavailable,
            PeerError::NoAddress(_) => Kind::Impossible,
            PeerError::Store { .. } | PeerError::Protocol { .. } | PeerError::Internal(_) => Kind::Internal,
        };
        Self::new(kind, error.code(), error.to_string()).fix(error.fix().unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::peer::{Amounts, PeerAdvert};

    #[test]
    fn addresses_are_those_that_others_can_dial() {
        assert_eq!(address(None).unwrap(), None);
        assert_eq!(address(Some("[2001:db8::1]:7946")).unwrap(), Some("[2001:db8::1]:7946".parse().unwrap()));
        for bad in ["", "10.0.0.1", "host:7946", "0.0.0.0:7946", "10.0.0.1:0", &"x".repeat(9_999)] {
            let problem = address(Some(bad)).unwrap_err();
            assert_eq!((problem.kind, problem.code), (Kind::BadRequest, "peer-address"));
            assert!(problem.message.len() < 150);
        }
    }

    #[test]
    fn a_peer_is_shown_with_what_it_says() {
        let amounts = |cpu_milli| Amounts { cpu_milli, memory_bytes: 1 << 30, ..Amounts::default() };
        let advert = PeerAdvert {
            region: String::new(),
            version: "0.1.0".into(),
            capacity: amounts(8_000),
            free: amounts(5_500),
            revision: 4,
            measured_unix_ms: 1,
            age_ms: 2,
        };
        let mut peer = PeerInfo {
            name: "build-01".into(),
            address: "10.0.0.21:7946".parse().ok(),
            state: PeerState::Suspect,
            last_heard_ms: Some(600),
            rtt_us: Some(400),
            advert: Some(advert),
        };
        let shown = view(&peer);
        assert_eq!(
            (shown.state.as_str(), shown.address.as_str(), shown.revision),
            ("suspect", "10.0.0.21:7946", 4)
        );
        assert_eq!((shown.cpu.capacity, shown.cpu.free, shown.memory.free), (8_000, 5_500, 1 << 30));
        peer.advert = None;
        assert_eq!(view(&peer).cpu, HostAmounts::default());
    }

    #[test]
    fn a_refused_token_is_told_with_a_way_out() {
        let problem = Problem::from(PeerError::TokenExpired { address: ([10, 0, 0, 1], 7946).into() });
        assert_eq!((problem.kind, problem.code), (Kind::NotPermitted, "peer-token-expired"));
        assert!(problem.message.contains("10.0.0.1:7946") && problem.fix.contains("lathe cluster token"));
    }
}
