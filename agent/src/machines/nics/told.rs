//! What the guest agent is told of a machine's nics, and who waits for that.
//!
//! It is told all of them at once, when it is found and whenever one has come or gone; what it has configured is remembered until the guest
//! is reset. Nothing here fails: a guest that cannot be told has the nic all the same, and why is kept in words.

use std::sync::Arc;
use std::time::Duration;

use lathe_guest::protocol::{Interface, Network, Request};
use tokio::net::UnixStream;

use super::super::actor::Actor;
use super::super::core::{Core, Entry};
use super::super::life::Life;
use super::super::record::Net;
use super::super::{guest, view};
use super::check::{no_such, view_of};
use super::{NicChanged, Reply, answer};
use crate::api::wire::Removed;
use crate::problem::Problem;

/// First protocol version of guest agents that keep several cards apart.
const SEVERAL_CARDS_VERSION: u32 = 3;
/// How long whoever adds or removes a nic waits for the guest agent.
const GUEST_TIMEOUT: Duration = Duration::from_secs(15);

/// What is answered.
#[derive(Clone)]
pub(super) enum After {
    /// The nic of this name as it is then.
    Seen(String),
    /// This.
    Gone(Removed),
    /// Nobody asks.
    Nothing,
}

pub(super) async fn seen(core: &Core, entry: &Entry, name: &str) -> Result<NicChanged, Problem> {
    let record = entry.with(|shared| shared.record.clone());
    // It may have been removed meanwhile.
    let nic = record.nic(name).ok_or_else(|| no_such(&record, name))?;
    Ok(NicChanged::Nic(view_of(core, entry, &record, nic).await))
}

/// Has the guest agent configure the nics as they are now, if it answers, and answers then. The machine's other business goes on meanwhile.
pub(super) fn answer_after_guest(actor: &Actor, waiting: Vec<Reply>, after: After) {
    let (core, entry) = (Arc::clone(&actor.core), Arc::clone(&actor.entry));
    tokio::spawn(async move {
        reach_guest(&core, &entry).await;
        for reply in waiting {
            let result = match &after {
                After::Seen(name) => seen(&core, &entry, name).await,
                After::Gone(removed) => Ok(NicChanged::Removed(removed.clone())),
                After::Nothing => return,
            };
            answer(reply, result);
        }
    });
}

/// Has the guest agent configure what it has not yet: it has just been found, or the guest goes on after a pause.
pub(in crate::machines) fn catch_up(actor: &Actor) {
    if actor.entry.with(|shared| shared.guest_agent && !shared.nics.is_subset(&shared.configured)) {
        answer_after_guest(actor, Vec::new(), After::Nothing);
    }
}

/// Tells the guest agent if it has answered before, and notes why it cannot be told.
async fn reach_guest(core: &Core, entry: &Entry) {
    let (agent, life) = entry.with(|shared| (shared.guest_agent, shared.record.life.clone()));
    if !agent {
        return;
    }
    let socket = core.config.socket_dir(&entry.name).join("vsock.sock");
    let told = tokio::time::timeout(GUEST_TIMEOUT, async {
        let mut stream = guest::connect(&socket).await?;
        let hello = guest::hello(&mut stream).await?;
        tell_guest(core, entry, &mut stream, hello.version).await;
        Ok::<_, std::io::Error>(())
    });
    let words = match life {
        Life::Paused => "it is paused; its guest agent is told when it goes on".to_owned(),
        _ => match told.await {
            Ok(Ok(())) => return,
            Ok(Err(cause)) => {
                format!("its guest agent cannot be reached: {}", view::printable(&cause.to_string()))
            }
            Err(_) => format!("its guest agent has not answered for {} s", GUEST_TIMEOUT.as_secs()),
        },
    };
    entry.with(|shared| shared.not_configured = words);
}

/// Tells the guest agent, which speaks this version, how its network shall look now; and remembers what it has configured.
pub(in crate::machines) async fn tell_guest(
    core: &Core,
    entry: &Entry,
    stream: &mut UnixStream,
    version: u32,
) {
    let _one_at_a_time = entry.guest_network.lock().await;
    let nics: Vec<Net> = entry.with(|shared| {
        shared.record.all_nics().filter(|nic| shared.nics.contains(&nic.name)).cloned().collect()
    });
    let names = nics.iter().map(|nic| nic.name.clone()).collect();
    match guest::tell(stream, &network_request(core, &entry.name, &nics, version)).await {
        Ok(()) => entry.with(|shared| (shared.configured, shared.not_configured) = (names, String::new())),
        Err(cause) => {
            tracing::warn!(machine = entry.name, %cause, "the guest's network is not configured");
            let words = format!("its guest agent says: {}", view::printable(&cause.to_string()));
            entry.with(|shared| shared.not_configured = words);
        }
    }
}

pub(in crate::machines) fn network_request(core: &Core, name: &str, nics: &[Net], version: u32) -> Request {
    let hostname = name.to_owned();
    let Some(config) = core.config.network.as_ref().filter(|_| !nics.is_empty()) else {
        return Request::Network(Network { hostname, interfaces: Vec::new(), dns: Vec::new() });
    };
    let gateways = [Some(config.ipv4), config.ipv6].into_iter().flatten();
    let gateways: Vec<_> = gateways.map(|prefix| prefix.addr.to_string()).collect();
    let interface = |(position, nic): (usize, &Net)| Interface {
        mac: nic.mac,
        addresses: nic.addresses.clone(),
        // An older one would route everything through the card that it is told of last.
        gateways: if position == 0 || version >= SEVERAL_CARDS_VERSION {
            gateways.clone()
        } else {
            Vec::new()
        },
        mtu: None,
    };
    let interfaces = nics.iter().enumerate().map(interface).collect();
    Request::Network(Network { hostname, interfaces, dns: core.probe.name_servers() })
}
