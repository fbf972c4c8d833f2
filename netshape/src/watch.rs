//! Hears of changes of nftables, whoever makes them, so that what is ours in it can be looked at.
//!
//! `nft flush ruleset`, with which Debian's `nftables.service` begins to load a host's firewall, takes tables of others with it. The kernel tells
//! everybody who listens (`NFNLGRP_NFTABLES`, linux/netfilter/nfnetlink.h); what changed is not looked at here: [`crate::Nat::rules`] says what is
//! there then. Needs CAP_NET_ADMIN.

use std::io;

use futures_util::FutureExt;
use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{AsyncSocket, AsyncSocketExt, TokioSocket};

use crate::error::Error;

/// `NFNLGRP_NFTABLES` of linux/netfilter/nfnetlink.h.
const GROUP: u32 = 7;

/// Listens to changes of nftables in the network namespace in which it was made.
pub struct RulesWatch(TokioSocket);

impl RulesWatch {
    /// Listens from now on. Must be called in a tokio runtime.
    ///
    /// # Errors
    /// [`Error::Socket`].
    pub fn new() -> Result<RulesWatch, Error> {
        let listen = || {
            let mut socket = TokioSocket::new(NETLINK_NETFILTER)?;
            socket.socket_mut().bind_auto()?;
            socket.socket_mut().add_membership(GROUP)?;
            Ok(socket)
        };
        listen().map(RulesWatch).map_err(Error::Socket)
    }

    /// Waits until something has changed since the last answer, in any table. A transaction of many rules may be told in several parts.
    ///
    /// # Errors
    /// What the kernel said; the next call listens on.
    pub async fn changed(&self) -> io::Result<()> {
        match self.0.recv_from_full().await {
            // So many changes that some were not told.
            Err(error) if error.raw_os_error() != Some(libc::ENOBUFS) => return Err(error),
            _ => {}
        }
        // What has come meanwhile is the same news.
        while let Some(Ok(_)) = self.0.recv_from_full().now_or_never() {}
        Ok(())
    }
}
