//! What foca calls an identity: a node, where it is, and which of its lives this is.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::card::NodeId;

/// A node in one of its lives. Equal only if all fields are.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct Identity {
    pub(crate) id: NodeId,
    pub(crate) address: SocketAddr,
    /// Rises with every start of the agent.
    pub(crate) boot_epoch: u64,
    /// Rises when the others declared this life dead while it was not.
    pub(crate) renewal: u16,
}

impl Identity {
    /// Whether datagrams can sensibly be sent there.
    pub(crate) fn is_plausible(&self) -> bool {
        let reachable = match self.address.ip() {
            IpAddr::V4(ip) => !ip.is_broadcast() && !ip.is_unspecified() && !ip.is_multicast(),
            IpAddr::V6(ip) => !ip.is_unspecified() && !ip.is_multicast(),
        };
        reachable && self.address.port() != 0
    }

    fn order(&self) -> (u64, u16, SocketAddr) {
        (self.boot_epoch, self.renewal, self.address)
    }
}

impl foca::Identity for Identity {
    type Addr = NodeId;

    fn renew(&self) -> Option<Self> {
        Some(Self { renewal: self.renewal.checked_add(1)?, ..*self })
    }

    fn addr(&self) -> NodeId {
        self.id
    }

    fn win_addr_conflict(&self, adversary: &Self) -> bool {
        self.order() > adversary.order()
    }
}
