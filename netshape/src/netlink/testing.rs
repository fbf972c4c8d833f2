//! Tests in a network namespace of their own, beside `tc`.

use std::process::Command;

use netlink_packet_route::link::InfoKind;

use super::Netlink;
use crate::name::IfName;

/// Runs a test in a network namespace of its own; only root can.
pub(crate) fn in_namespace(test: impl AsyncFnOnce(Netlink)) {
    if let Err(error) = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET) {
        println!("skipped: no network namespace of its own: {error}");
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let (nl, connection) = Netlink::connect().expect("a socket");
        tokio::spawn(connection);
        test(nl).await;
    });
}

pub(super) fn tc(arguments: &[&str]) -> Option<String> {
    let output = Command::new("tc").args(arguments).output().ok()?;
    assert!(output.status.success(), "tc {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    Some(String::from_utf8_lossy(&output.stdout).into_owned())
}

pub(super) fn tc_json(arguments: &[&str]) -> Option<serde_json::Value> {
    let text = tc(&[&["-j"], arguments].concat())?;
    Some(serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error} in {text}")))
}

pub(crate) async fn an_ifb(nl: &Netlink, name: &str) -> u32 {
    let name = IfName::new(name).expect("a name");
    nl.add_link(&name, InfoKind::Ifb).await.expect("an ifb");
    nl.link(&name).await.expect("an answer").expect("a link").index
}
