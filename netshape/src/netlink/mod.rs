//! The only folder that knows rtnetlink and netlink-packet-route, whose interfaces change monthly. Messages are built
//! from netlink-packet-route's types and sent through rtnetlink's connection.

mod filter;
mod link;
mod tc;
#[cfg(test)]
pub(crate) mod testing;

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use tokio::sync::Mutex;

pub(crate) use self::filter::{FilterAt, FoundFilter};
pub(crate) use self::link::{Link, LinkChange, PortFlags};
pub(crate) use self::tc::{At, CLSACT, CLSACT_INGRESS, Existing, TcObject};
use crate::error::{Error, check_for};
use crate::name::IfName;

/// A dump of more than this many objects is not this host's.
const DUMP_MAX: usize = 100_000;

/// The kernel answers at once, or after whoever else changes the network; what takes longer is lost.
const ANSWER_LIMIT: Duration = Duration::from_secs(20);

/// A connection to the kernel's network, of the network namespace in which it was made. Cloning shares it.
#[derive(Clone, Debug)]
pub struct Netlink {
    handle: rtnetlink::Handle,
    /// A socket carries one dump at a time: the kernel refuses the next with EBUSY while the answer to the last is not all read
    /// (`netlink_dump_start` in net/netlink/af_netlink.c).
    dump: Arc<Mutex<()>>,
}

/// Names what failed where.
pub(crate) fn failed<'a>(
    action: &'static str,
    link: &'a IfName,
) -> impl FnOnce(io::Error) -> Error + use<'a> {
    move |source| Error::Kernel { action, link: link.to_string(), check: check_for(&source), source }
}

impl Netlink {
    /// Opens a socket. Must be called in a tokio runtime; the returned future carries the messages and wants to be
    /// spawned, it ends when the last clone is dropped.
    ///
    /// # Errors
    /// [`Error::Socket`].
    pub fn connect() -> Result<(Netlink, impl Future<Output = ()> + Send + 'static), Error> {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(Error::Socket)?;
        Ok((Netlink { handle, dump: Arc::default() }, connection))
    }

    async fn request(
        &self,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> io::Result<Vec<RouteNetlinkMessage>> {
        let _alone = if flags & NLM_F_DUMP == NLM_F_DUMP { Some(self.dump.lock().await) } else { None };
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | flags;
        let mut answers = self.handle.clone().request(request).map_err(io::Error::other)?;
        let answered = async {
            let mut inner = Vec::new();
            while let Some(answer) = answers.next().await {
                match answer.payload {
                    NetlinkPayload::InnerMessage(message) if inner.len() < DUMP_MAX => inner.push(message),
                    NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
                    NetlinkPayload::Overrun(_) => return Err(io::Error::from_raw_os_error(libc::ENOBUFS)),
                    _ => {}
                }
            }
            Ok(inner)
        };
        let late = |_| io::Error::new(io::ErrorKind::TimedOut, "the kernel has not answered");
        tokio::time::timeout(ANSWER_LIMIT, answered).await.map_err(late)?
    }

    async fn ack(&self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.request(message, NLM_F_ACK | flags).await.map(drop)
    }
}
