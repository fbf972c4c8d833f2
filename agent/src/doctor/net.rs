//! What the machines' network needs.

use std::fs::File;
use std::net::{IpAddr, Ipv4Addr};

use super::{Host, fail, ok, warn};
use crate::api::wire::Check;

/// What shapes bandwidth.
const SHAPERS: [&str; 5] = ["sch_htb", "sch_fq_codel", "sch_ingress", "act_police", "ifb"];

/// Taps can be made.
pub fn tun(host: Host<'_>) -> Check {
    if !host.config.network.enabled {
        return ok("tun", "the network is off ([network] enabled = false)");
    }
    match File::options().read(true).write(true).open(host.path("/dev/net/tun")) {
        Ok(_) => ok("tun", "/dev/net/tun opens"),
        Err(error) => {
            fail("tun", format!("/dev/net/tun: {error}: machines get no network"), "sudo modprobe tun")
        }
    }
}

/// The bridge's name is ours.
pub fn bridge(host: Host<'_>) -> Check {
    let name = &host.config.network.bridge;
    let link = format!("/sys/class/net/{name}");
    if host.exists(&link) && !host.exists(&format!("{link}/bridge")) {
        return fail(
            "bridge",
            format!("a link {name} exists and is no bridge"),
            format!("ip link show {name}; or set [network] bridge"),
        );
    }
    ok("bridge", format!("{name} is free or a bridge"))
}

/// The machines' prefix does not overlap another link's network.
pub fn prefix(host: Host<'_>) -> Check {
    let network = &host.config.network;
    let IpAddr::V4(own) = network.ipv4.addr else { return ok("prefix", "no IPv4 prefix") };
    let mask = mask(network.ipv4.len);
    let table = host.read("/proc/net/route").unwrap_or_default();
    match routes(&table).find(|route| route.link != network.bridge && route.overlaps(own, mask)) {
        None => ok("prefix", format!("machines have {} to themselves", network.ipv4)),
        Some(route) => {
            let message = format!(
                "{} overlaps {} on {}: one of the two is not reached",
                network.ipv4, route.network, route.link
            );
            fail("prefix", message, "set [network] ipv4 to another prefix and restart lathed")
        }
    }
}

/// A line of `/proc/net/route` (fib_trie.c: words are in network order, printed as numbers of this machine).
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Route<'a> {
    pub link: &'a str,
    pub network: Ipv4Addr,
    pub mask: u32,
}

impl Route<'_> {
    /// Whether it shares addresses with a network; a default route overlaps nothing.
    pub fn overlaps(&self, addr: Ipv4Addr, mask: u32) -> bool {
        let common = self.mask & mask;
        self.mask != 0 && u32::from(self.network) & common == u32::from(addr) & common
    }
}

pub(super) fn mask(len: u8) -> u32 {
    u32::MAX.checked_shl(32_u32.saturating_sub(len.into())).unwrap_or(0)
}

pub(super) fn routes(table: &str) -> impl Iterator<Item = Route<'_>> {
    table.lines().skip(1).filter_map(|line| {
        let mut fields = line.split_whitespace();
        let (link, network) = (fields.next()?, fields.next()?);
        let mask = fields.nth(5)?;
        let number = |hex| Some(u32::from_be(u32::from_str_radix(hex, 16).ok()?));
        Some(Route { link, network: number(network)?.into(), mask: number(mask)? })
    })
}

/// NAT can be set up.
pub fn nft(host: Host<'_>) -> Check {
    let network = &host.config.network;
    if !network.enabled || !(network.nat || network.guard_host) {
        return ok("nft", "nothing is done with it ([network] nat = false, guard_host = false)");
    }
    if host.exists("/usr/sbin/nft") || host.exists("/sbin/nft") {
        return ok("nft", "nft is installed");
    }
    fail("nft", "nft is not installed: no machine with a nic starts", "sudo apt install nftables")
}

/// The host forwards.
pub fn forwarding(host: Host<'_>) -> Check {
    if !host.config.network.enabled || !host.config.network.nat {
        return ok("forwarding", "NAT is off ([network] nat = false)");
    }
    match host.read("/proc/sys/net/ipv4/ip_forward").as_deref().map(str::trim) {
        Some("1") => ok("forwarding", "the host forwards IPv4"),
        _ => {
            let message = "the host does not forward IPv4: machines do not reach beyond it";
            fail("forwarding", message, "sudo systemctl restart lathe-host-setup")
        }
    }
}

/// What machines send can be checked.
pub fn sources(host: Host<'_>) -> Check {
    let network = &host.config.network;
    if !network.enabled || !network.check_sources {
        return ok("sources", "what machines send is not checked ([network] check_sources = false)");
    }
    if host.missing_modules(&["cls_bpf"]).is_empty() {
        return ok("sources", "machines send from their own addresses only");
    }
    let message = "kernel module cls_bpf not found: no machine with a nic starts";
    let fix =
        format!("sudo apt install linux-image-{}; or set [network] check_sources = false", host.release);
    fail("sources", message, fix)
}

/// Bandwidth can be limited.
pub fn shapers(host: Host<'_>) -> Check {
    let missing = host.missing_modules(&SHAPERS);
    if missing.is_empty() {
        return ok("shapers", "bandwidth can be limited both ways");
    }
    let message = format!("kernel modules not found: {}: bandwidth cannot be limited", missing.join(", "));
    warn("shapers", message, format!("sudo apt install linux-image-{}", host.release))
}
