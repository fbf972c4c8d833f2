//! What machines may reach of the host itself: nothing but what is named, and what a network needs (ICMP errors, echo,
//! neighbour discovery, reports of multicast listeners).
//!
//! A chain `input` in the table `inet lathe`, for packets that come from the bridge and are for the host, whichever of
//! its addresses they name. Answers to what the host has begun pass (connection tracking), so the host reaches its
//! machines as before. What the host forwards, and ports that [`crate::Nat`] publishes, do not come here: those packets
//! are for somebody else. Rules of other tables hold beside it: a packet passes if all let it.

use std::fmt::{self, Write as _};
use std::path::PathBuf;
use std::str::FromStr;

use crate::error::{Error, Outcome};
use crate::name::IfName;
use crate::nat::Proto;
use crate::nft::{NatError, Nft};

/// ICMP (IANA): destination unreachable, echo request, time exceeded, parameter problem.
const ICMP: &str = "3, 8, 11, 12";
/// ICMPv6: errors, echo request, reports of listeners, router and neighbour solicitation, neighbour advertisement.
const ICMP6: &str = "1, 2, 3, 4, 128, 131, 132, 133, 135, 136, 143";

/// A service of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Service {
    /// The protocol.
    pub proto: Proto,
    /// The port.
    pub port: u16,
}

impl fmt::Display for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let proto = match self.proto {
            Proto::Tcp => "tcp",
            Proto::Udp => "udp",
        };
        write!(f, "{proto}/{}", self.port)
    }
}

/// `tcp/53`, `udp/53`; port 1 to 65535.
impl FromStr for Service {
    type Err = Error;

    fn from_str(text: &str) -> Result<Service, Error> {
        let bad = || Error::Service(text.into());
        let (proto, port) = text.split_once('/').ok_or_else(bad)?;
        let proto = match proto {
            "tcp" => Proto::Tcp,
            "udp" => Proto::Udp,
            _ => return Err(bad()),
        };
        let digits = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
        match port.parse() {
            Ok(port @ 1..) if digits => Ok(Service { proto, port }),
            _ => Err(bad()),
        }
    }
}

/// What machines may reach of the host, by `nft`.
#[derive(Clone, Debug)]
pub struct HostGuard {
    nft: Nft,
}

impl Default for HostGuard {
    fn default() -> HostGuard {
        HostGuard::new()
    }
}

impl HostGuard {
    /// With Debian's `nft`.
    pub fn new() -> HostGuard {
        HostGuard { nft: Nft::new() }
    }

    /// With another program.
    pub fn with_program(program: PathBuf) -> HostGuard {
        HostGuard { nft: Nft::with_program(program) }
    }

    /// Lets machines on the bridge reach exactly these services of the host, from now on: one transaction. A machine that
    /// has a connection to a service which is named no more keeps it until it ends. Blocks for some milliseconds.
    ///
    /// # Errors
    /// [`NatError::PortZero`], [`NatError::Run`], [`NatError::Refused`].
    pub fn ensure(&self, bridge: &IfName, services: &[Service]) -> Result<(), NatError> {
        if services.iter().any(|service| service.port == 0) {
            return Err(NatError::PortZero);
        }
        self.nft.run("guard the host", &["-f", "-"], &chain(bridge, services)).map(drop)
    }

    /// Guards no more; what else is in the table stays.
    ///
    /// # Errors
    /// [`NatError::Run`], [`NatError::Refused`].
    pub fn remove(&self) -> Result<Outcome, NatError> {
        if !self.nft.has_table()? {
            return Ok(Outcome::Unchanged);
        }
        let table = self.nft.run("list the table lathe", &["list", "table", "inet", "lathe"], "")?;
        if !table.lines().any(|line| line.trim() == "chain input {") {
            return Ok(Outcome::Unchanged);
        }
        let text = "flush chain inet lathe input\ndelete chain inet lathe input\n";
        self.nft.run("remove the guard of the host", &["-f", "-"], text)?;
        Ok(Outcome::Changed)
    }
}

/// The chain, as one transaction.
fn chain(bridge: &IfName, services: &[Service]) -> String {
    let mut text = format!(
        "add table inet lathe\n\
         add chain inet lathe input {{ type filter hook input priority filter ; policy accept ; }}\n\
         flush chain inet lathe input\n\
         add rule inet lathe input iifname != \"{bridge}\" accept\n\
         add rule inet lathe input ct state established,related accept\n\
         add rule inet lathe input icmp type {{ {ICMP} }} accept\n\
         add rule inet lathe input icmpv6 type {{ {ICMP6} }} accept\n"
    );
    for Service { proto, port } in services {
        let proto = proto.number();
        let _ = writeln!(text, "add rule inet lathe input meta l4proto {proto} th dport {port} accept");
    }
    text.push_str("add rule inet lathe input counter drop\n");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_is_a_protocol_and_a_port() {
        for text in ["tcp/53", "udp/1", "tcp/65535"] {
            assert_eq!(text.parse::<Service>().expect(text).to_string(), text);
        }
        for text in [
            "",
            "53",
            "tcp",
            "tcp/",
            "tcp/0",
            "tcp/65536",
            "sctp/5",
            "TCP/5",
            "tcp/+5",
            "tcp/5 accept",
            "tcp/5/6",
        ] {
            assert!(text.parse::<Service>().is_err(), "{text}");
        }
    }

    #[test]
    fn only_what_is_named_passes_and_the_last_rule_drops() {
        let bridge = IfName::new("lathe0").expect("a name");
        let services = [Service { proto: Proto::Udp, port: 67 }, Service { proto: Proto::Tcp, port: 53 }];
        let text = chain(&bridge, &services);
        assert!(text.ends_with("counter drop\n"), "{text}");
        assert!(text.contains("meta l4proto 17 th dport 67 accept\n"), "{text}");
        assert!(text.contains("meta l4proto 6 th dport 53 accept\n"), "{text}");
        assert!(text.lines().all(|line| line.contains(" inet lathe")), "{text}");
        let zero = HostGuard::new().ensure(&bridge, &[Service { proto: Proto::Tcp, port: 0 }]);
        assert!(matches!(zero, Err(NatError::PortZero)), "{zero:?}");
    }
}
