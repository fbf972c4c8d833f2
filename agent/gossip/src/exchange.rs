//! The seam to foca: what it wants done is collected, what it would take on trust is checked first. And the few
//! words that nodes exchange directly, beside it.

use std::time::Duration;

use foca::{Codec, Header, Identity as _, Member, Message, Notification, PostcardCodec};
use serde::{Deserialize, Serialize};

use crate::card::NodeId;
use crate::identity::Identity;
use crate::interface::Event;

/// Between two nodes, beside foca. Names the receiver, so that it cannot be replayed to another or to a later life.
#[derive(Serialize, Deserialize)]
pub(crate) struct Direct<'a> {
    pub(crate) to: NodeId,
    pub(crate) to_epoch: u64,
    #[serde(borrow)]
    pub(crate) what: Word<'a>,
}

#[derive(Serialize, Deserialize)]
pub(crate) enum Word<'a> {
    AdvertWanted,
    Advert(#[serde(borrow)] &'a [u8]),
}

/// Collects what foca wants done.
#[derive(Default)]
pub(crate) struct Effects {
    pub(crate) send: Vec<(Identity, Vec<u8>)>,
    pub(crate) timers: Vec<(Duration, foca::Timer<Identity>)>,
    pub(crate) events: Vec<Event>,
    pub(crate) connected: Option<bool>,
}

impl foca::Runtime<Identity> for Effects {
    fn notify(&mut self, notification: Notification<'_, Identity>) {
        match notification {
            Notification::MemberUp(member) => self.events.push(Event::PeerUp(member.id)),
            Notification::MemberDown(member) => self.events.push(Event::PeerDown(member.id)),
            Notification::Active => self.connected = Some(true),
            Notification::Idle | Notification::Defunct | Notification::Rejoin(_) => {
                self.connected = Some(false)
            }
            Notification::Rename(..) => {}
        }
    }

    fn send_to(&mut self, to: Identity, data: &[u8]) {
        self.send.push((to, data.to_vec()));
    }

    fn submit_after(&mut self, event: foca::Timer<Identity>, after: Duration) {
        self.timers.push((after, event));
    }
}

pub(crate) fn decode_header(data: &mut &[u8]) -> Result<Header<Identity>, postcard::Error> {
    PostcardCodec.decode_header(data)
}

/// Reads what foca will read, and refuses what it would take on trust. Gives the header and the nodes named. None: malformed.
pub(crate) fn inspect(payload: &[u8]) -> Option<(Header<Identity>, Vec<NodeId>)> {
    let mut rest = payload;
    let header = decode_header(&mut rest).ok()?;
    let inner = match &header.message {
        Message::PingReq { target, .. } | Message::IndirectAck { target, .. } => Some(target),
        Message::IndirectPing { origin, .. } | Message::ForwardedAck { origin, .. } => Some(origin),
        _ => None,
    };
    if !header.src.is_plausible() || inner.is_some_and(|identity| !identity.is_plausible()) {
        return None;
    }
    let mut named = Vec::new();
    if header.message != Message::Broadcast
        && let Some((count, mut updates)) = rest.split_first_chunk::<2>()
    {
        for _ in 0..u16::from_be_bytes(*count) {
            let member: Member<Identity> = PostcardCodec.decode_member(&mut updates).ok()?;
            if !member.id().is_plausible() {
                return None;
            }
            named.push(member.id().addr());
        }
    }
    Some((header, named))
}
