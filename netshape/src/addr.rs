//! Addresses: MAC, and an IP address with its prefix length.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use crate::error::Error;
use crate::name::fnv1a;

/// A MAC address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// A unicast, locally administered MAC address (IEEE 802, bits 0 and 1 of the first byte) from a seed: the same for
/// ever. The seed is the host's salt and the machine's name, so that two hosts on one segment do not meet.
pub fn mac_for(seed: &[u8]) -> Mac {
    // FNV mixes its last bytes into the low half only; a final multiplication spreads them.
    let hash = fnv1a(seed).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let [_, _, a, b, c, d, e, f] = (hash ^ (hash >> 32)).to_be_bytes();
    Mac([(a & 0xfc) | 0x02, b, c, d, e, f])
}

/// An address and the length of its network's prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Prefix {
    /// The address; for a bridge the host's own.
    pub addr: IpAddr,
    /// Bits of the network, at most 32 or 128.
    pub len: u8,
}

impl Prefix {
    /// The network: the address with all host bits zero.
    pub fn network(&self) -> Prefix {
        let addr = match self.addr {
            IpAddr::V4(v4) => {
                let mask = u32::MAX.checked_shl(32_u32.saturating_sub(self.len.into())).unwrap_or(0);
                IpAddr::V4((u32::from(v4) & mask).into())
            }
            IpAddr::V6(v6) => {
                let mask = u128::MAX.checked_shl(128_u32.saturating_sub(self.len.into())).unwrap_or(0);
                IpAddr::V6((u128::from(v6) & mask).into())
            }
        };
        Prefix { addr, len: self.len }
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.addr, self.len)
    }
}

impl FromStr for Prefix {
    type Err = Error;

    fn from_str(text: &str) -> Result<Prefix, Error> {
        let bad = || Error::Prefix(text.into());
        let (addr, len) = text.split_once('/').ok_or_else(bad)?;
        let addr: IpAddr = addr.parse().map_err(|_| bad())?;
        let len: u8 = len.parse().map_err(|_| bad())?;
        let most = if addr.is_ipv4() { 32 } else { 128 };
        if len <= most { Ok(Prefix { addr, len }) } else { Err(bad()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn macs_are_local_unicast_stable_and_differ() {
        let seen: std::collections::HashSet<_> =
            (0..2000).map(|n| mac_for(format!("salt/web{n}").as_bytes())).collect();
        assert_eq!(seen.len(), 2000);
        assert!(seen.iter().all(|mac| mac.0[0] & 3 == 2));
        assert_eq!(mac_for(b"salt/web"), mac_for(b"salt/web"));
        // A guest keeps its address over an upgrade of the agent.
        assert_eq!(mac_for(b"salt/web").to_string(), "2e:ce:87:e6:69:92");
    }

    #[test]
    fn prefixes_parse_and_mask() {
        let p: Prefix = "10.77.3.1/16".parse().expect("good");
        assert_eq!(p.network().to_string(), "10.77.0.0/16");
        assert_eq!("fd77::1:2/64".parse::<Prefix>().expect("good").network().to_string(), "fd77::/64");
        assert_eq!("1.2.3.4/0".parse::<Prefix>().expect("good").network().to_string(), "0.0.0.0/0");
        assert_eq!("1.2.3.4/32".parse::<Prefix>().expect("good").network().to_string(), "1.2.3.4/32");
        for bad in ["10.0.0.1", "10.0.0.1/33", "::1/129", "x/8", "10.0.0.1/-1", ""] {
            assert!(bad.parse::<Prefix>().is_err(), "{bad:?}");
        }
    }
}
