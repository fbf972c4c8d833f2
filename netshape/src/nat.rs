//! NAT for machines: one nftables table, `inet lathe`, written by `nft -f -`; no other table is read or touched.
//!
//! ```text
//! prerouting, output   new connections to an address of the host ─► map `ports` ─► machine   (--publish)
//! postrouting          from a machine's network, not back into the bridge ─► masquerade
//! ```
//!
//! Every change is one transaction: the kernel has the old table or the new one. Published ports live in the map, which
//! [`Nat::ensure`] leaves alone, so it may be repeated at any time. Whether the host forwards at all (`ip_forward`, another
//! table's policy) is set elsewhere. These calls block for some milliseconds while `nft` runs.
//!
//! `nft` is started with an argument vector and reads from a pipe: there is no shell, and everything that gets into the
//! text is a checked name, an address or a number.
//!
//! [`crate::HostGuard`] has a chain of its own in the same table.

use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::path::PathBuf;

use crate::addr::Prefix;
use crate::error::Outcome;
use crate::name::IfName;
use crate::nft::{NatError, Nft};

/// Two protocols with 65,535 ports each.
const PUBLISHED_MAX: usize = 2 * 65_535;

/// A transport protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Proto {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl Proto {
    /// The number of the protocol (IANA): a name needs `/etc/protocols`, which a small host has not.
    pub(crate) fn number(self) -> u8 {
        match self {
            Proto::Tcp => 6,
            Proto::Udp => 17,
        }
    }

    /// nft prints a name where the host knows it, else the number.
    fn parse(shown: &serde_json::Value) -> Option<Proto> {
        match (shown.as_str(), shown.as_u64()) {
            (Some("tcp" | "6"), _) | (_, Some(6)) => Some(Proto::Tcp),
            (Some("udp" | "17"), _) | (_, Some(17)) => Some(Proto::Udp),
            _ => None,
        }
    }
}

/// A port of the host that leads to a port of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Publish {
    /// The protocol.
    pub proto: Proto,
    /// Port of the host, all its addresses but 127.0.0.0/8.
    pub host_port: u16,
    /// Address of the machine.
    pub addr: Ipv4Addr,
    /// Port of the machine.
    pub port: u16,
}

/// NAT by `nft`.
#[derive(Clone, Debug)]
pub struct Nat {
    nft: Nft,
}

impl Default for Nat {
    fn default() -> Nat {
        Nat::new()
    }
}

impl Nat {
    /// With Debian's `nft`.
    pub fn new() -> Nat {
        Nat { nft: Nft::new() }
    }

    /// With another program.
    pub fn with_program(program: PathBuf) -> Nat {
        Nat { nft: Nft::with_program(program) }
    }

    /// Makes the table, or sets its chains right; published ports stay.
    ///
    /// # Errors
    /// [`NatError::Run`], [`NatError::Refused`].
    pub fn ensure(&self, bridge: &IfName, prefixes: &[Prefix]) -> Result<(), NatError> {
        self.nft.run("set up the table lathe", &["-f", "-"], &table(bridge, prefixes)).map(drop)
    }

    /// Publishes a port, in the place of what was published there.
    ///
    /// # Errors
    /// [`NatError::PortZero`], [`NatError::Run`], [`NatError::Refused`].
    pub fn publish(&self, publish: &Publish) -> Result<(), NatError> {
        if publish.host_port == 0 || publish.port == 0 {
            return Err(NatError::PortZero);
        }
        let published = self.published()?;
        if published.contains(publish) {
            return Ok(());
        }
        let mut text = String::new();
        if published.iter().any(|p| (p.proto, p.host_port) == (publish.proto, publish.host_port)) {
            text = delete(publish.proto, publish.host_port);
        }
        let Publish { proto, host_port, addr, port } = publish;
        let _ = writeln!(
            text,
            "add element inet lathe ports {{ {} . {host_port} : {addr} . {port} }}",
            proto.number()
        );
        self.nft.run("publish a port", &["-f", "-"], &text).map(drop)
    }

    /// Publishes a port no more.
    ///
    /// # Errors
    /// [`NatError::Run`], [`NatError::Refused`].
    pub fn unpublish(&self, proto: Proto, host_port: u16) -> Result<Outcome, NatError> {
        if !self.published()?.iter().any(|p| (p.proto, p.host_port) == (proto, host_port)) {
            return Ok(Outcome::Unchanged);
        }
        self.nft.run("unpublish a port", &["-f", "-"], &delete(proto, host_port))?;
        Ok(Outcome::Changed)
    }

    /// What is published, as the kernel has it; nothing without the table.
    ///
    /// # Errors
    /// [`NatError::Run`], [`NatError::Refused`], [`NatError::Output`].
    pub fn published(&self) -> Result<Vec<Publish>, NatError> {
        if !self.nft.has_table()? {
            return Ok(Vec::new());
        }
        parse_map(&self.nft.run(
            "list published ports",
            &["-j", "list", "map", "inet", "lathe", "ports"],
            "",
        )?)
    }

    /// The rules of the table as `nft` lists them, those of [`crate::HostGuard`] among them, without counters and published ports: equal while
    /// nobody has changed them. `None` without the table. Blocks for some milliseconds.
    ///
    /// # Errors
    /// [`NatError::Run`], [`NatError::Refused`].
    pub fn rules(&self) -> Result<Option<String>, NatError> {
        if !self.nft.has_table()? {
            return Ok(None);
        }
        let table = ["--stateless", "--terse", "list", "table", "inet", "lathe"];
        self.nft.run("list the table lathe", &table, "").map(Some)
    }

    /// Removes the table, published ports and the chain of [`crate::HostGuard`] with it.
    ///
    /// # Errors
    /// [`NatError::Run`], [`NatError::Refused`].
    pub fn remove(&self) -> Result<Outcome, NatError> {
        if !self.nft.has_table()? {
            return Ok(Outcome::Unchanged);
        }
        self.nft.run("remove the table lathe", &["delete", "table", "inet", "lathe"], "")?;
        Ok(Outcome::Changed)
    }
}

/// The whole table but for its elements, as one transaction.
fn table(bridge: &IfName, prefixes: &[Prefix]) -> String {
    let mut text = String::from(
        "add table inet lathe\n\
         add map inet lathe ports { type inet_proto . inet_service : ipv4_addr . inet_service ; }\n\
         add chain inet lathe prerouting { type nat hook prerouting priority dstnat ; policy accept ; }\n\
         add chain inet lathe output { type nat hook output priority -100 ; policy accept ; }\n\
         add chain inet lathe postrouting { type nat hook postrouting priority srcnat ; policy accept ; }\n\
         flush chain inet lathe prerouting\n\
         flush chain inet lathe output\n\
         flush chain inet lathe postrouting\n\
         add rule inet lathe prerouting fib daddr type local dnat ip to meta l4proto . th dport map @ports\n\
         add rule inet lathe output ip daddr != 127.0.0.0/8 fib daddr type local dnat ip to meta l4proto . th dport map @ports\n",
    );
    for prefix in prefixes.iter().map(Prefix::network) {
        let family = if prefix.addr.is_ipv4() { "ip" } else { "ip6" };
        let _ = writeln!(
            text,
            "add rule inet lathe postrouting {family} saddr {prefix} {family} daddr != {prefix} oifname != \"{bridge}\" masquerade"
        );
    }
    text
}

fn delete(proto: Proto, host_port: u16) -> String {
    format!("delete element inet lathe ports {{ {} . {host_port} }}\n", proto.number())
}

/// `nft -j list map`: `{"nftables": [{"metainfo": …}, {"map": {…, "elem": [[{"concat": ["tcp", 8080]}, {"concat": ["10.0.0.1", 80]}]]}}]}`.
fn parse_map(text: &str) -> Result<Vec<Publish>, NatError> {
    let bad = || NatError::Output(text.chars().rev().take(200).collect::<String>().chars().rev().collect());
    let json: serde_json::Value = serde_json::from_str(text).map_err(|_| bad())?;
    let map = json
        .get("nftables")
        .and_then(serde_json::Value::as_array)
        .and_then(|objects| objects.iter().find_map(|object| object.get("map")))
        .ok_or_else(bad)?;
    let Some(elements) = map.get("elem") else { return Ok(Vec::new()) };
    let elements = elements.as_array().ok_or_else(bad)?;
    elements.iter().take(PUBLISHED_MAX).map(|element| parse_element(element).ok_or_else(bad)).collect()
}

fn parse_element(element: &serde_json::Value) -> Option<Publish> {
    let [key, value] = element.as_array()?.as_slice() else { return None };
    let [proto, host_port] = key.get("concat")?.as_array()?.as_slice() else { return None };
    let [addr, port] = value.get("concat")?.as_array()?.as_slice() else { return None };
    Some(Publish {
        proto: Proto::parse(proto)?,
        host_port: u16::try_from(host_port.as_u64()?).ok()?,
        addr: addr.as_str()?.parse().ok()?,
        port: u16::try_from(port.as_u64()?).ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_names_networks_and_the_bridge() {
        let bridge = IfName::new("lathe0").expect("a name");
        let prefixes = ["10.77.0.1/16", "fd77::1/64"].map(|text| text.parse().expect("a prefix"));
        let text = table(&bridge, &prefixes);
        assert!(
            text.contains(
                "ip saddr 10.77.0.0/16 ip daddr != 10.77.0.0/16 oifname != \"lathe0\" masquerade\n"
            ),
            "{text}"
        );
        assert!(
            text.contains("ip6 saddr fd77::/64 ip6 daddr != fd77::/64 oifname != \"lathe0\" masquerade\n"),
            "{text}"
        );
        assert!(text.lines().all(|line| line.contains(" inet lathe")), "{text}");
    }

    #[test]
    fn what_nft_prints_is_parsed_and_garbage_refused() {
        let good = r#"{"nftables": [{"metainfo": {"version": "1.0.6"}}, {"map": {"family": "inet", "name": "ports",
            "elem": [[{"concat": ["tcp", 8080]}, {"concat": ["10.77.0.5", 80]}]]}}]}"#;
        let expected =
            Publish { proto: Proto::Tcp, host_port: 8080, addr: Ipv4Addr::new(10, 77, 0, 5), port: 80 };
        assert_eq!(parse_map(good).expect("good"), [expected]);
        assert_eq!(parse_map(r#"{"nftables": [{"map": {}}]}"#).expect("empty"), []);
        for bad in [
            "",
            "[]",
            r#"{"nftables": []}"#,
            r#"{"nftables": [{"map": {"elem": [[1, 2]]}}]}"#,
            r#"{"nftables": [{"map": {"elem": 1}}]}"#,
        ] {
            assert!(parse_map(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_missing_program_is_named() {
        let nat = Nat::with_program("/nonexistent/nft".into());
        let error = nat.remove().expect_err("nothing to run");
        assert!(error.to_string().contains("/nonexistent/nft"), "{error}");
    }
}
