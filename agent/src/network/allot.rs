//! Which addresses a machine gets: one number per machine, all addresses follow from it.
//!
//! The number is added to the prefix's network address, so that a machine's IPv4 and IPv6 addresses end alike. Numbers are given
//! lowest first, the bridge's own is left out, and so are network and broadcast address (RFC 1812, 5.3.5).

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::problem::{Kind, Problem};

/// A bridge's own address inside the prefix that machines are numbered from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    own: IpAddr,
    len: u8,
}

impl Range {
    /// # Errors
    /// `bad-prefix` when there is no room for machines.
    pub fn new(own: IpAddr, len: u8) -> Result<Self, Problem> {
        let most = if own.is_ipv4() { 30 } else { 126 };
        if len < 8 || len > most {
            let message = format!("the prefix {own}/{len} is not between /8 and /{most}");
            return Err(Problem::new(Kind::BadRequest, "bad-prefix", message));
        }
        Ok(Self { own, len })
    }

    fn host_bits(&self) -> u32 {
        (if self.own.is_ipv4() { 32 } else { 128 }) - u32::from(self.len)
    }

    /// The bridge's own number.
    fn own_index(&self) -> u64 {
        let mask = (1_u128 << self.host_bits().min(63)) - 1;
        match self.own {
            IpAddr::V4(own) => u64::from(own.to_bits()) & mask as u64,
            IpAddr::V6(own) => (own.to_bits() & mask) as u64,
        }
    }

    /// Largest usable number; the last of IPv4 is the broadcast address.
    fn last(&self) -> u64 {
        (1_u64 << self.host_bits().min(32)) - 2
    }

    /// The address of number `index` with its prefix length.
    pub fn address(&self, index: u64) -> String {
        let bits = self.host_bits();
        match self.own {
            IpAddr::V4(own) => {
                let network = own.to_bits() & !((1_u64 << bits) - 1) as u32;
                format!("{}/{}", Ipv4Addr::from_bits(network | index as u32), self.len)
            }
            IpAddr::V6(own) => {
                let network = own.to_bits() >> bits << bits;
                format!("{}/{}", Ipv6Addr::from_bits(network | u128::from(index)), self.len)
            }
        }
    }

    /// The bridge's own address, which is the machines' gateway.
    pub fn gateway(&self) -> IpAddr {
        self.own
    }
}

/// The lowest number that is free in all of `ranges`.
///
/// # Errors
/// `addresses-exhausted` when none is.
pub fn lowest_free(ranges: &[Range], taken: &BTreeSet<u64>) -> Result<u64, Problem> {
    let last = ranges.iter().map(Range::last).min().unwrap_or(0);
    let own: BTreeSet<u64> = ranges.iter().map(Range::own_index).collect();
    // One more candidate than numbers taken always finds a free one.
    let candidates = 1..=last.min(taken.len() as u64 + own.len() as u64 + 1);
    candidates.into_iter().find(|index| !taken.contains(index) && !own.contains(index)).ok_or_else(|| {
        let message = format!("all {} addresses are allotted", taken.len());
        Problem::new(Kind::Impossible, "addresses-exhausted", message)
            .fix("remove machines with lathe rm, or set a larger prefix in /etc/lathe/lathe.toml")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(own: &str, len: u8) -> Range {
        Range::new(own.parse().unwrap(), len).unwrap()
    }

    #[test]
    fn addresses_of_both_families_end_alike() {
        let ranges = [range("10.77.0.1", 16), range("fd77:1a7e::1", 64)];
        let index = lowest_free(&ranges, &BTreeSet::from([2, 3])).unwrap();
        assert_eq!(index, 4);
        assert_eq!(ranges[0].address(index), "10.77.0.4/16");
        assert_eq!(ranges[1].address(index), "fd77:1a7e::4/64");
        assert_eq!(ranges[0].address(300), "10.77.1.44/16");
    }

    #[test]
    fn neither_the_bridge_nor_the_broadcast_address_is_given_away() {
        let range = range("192.0.2.2", 30);
        assert_eq!(lowest_free(&[range], &BTreeSet::new()).unwrap(), 1);
        let problem = lowest_free(&[range], &BTreeSet::from([1])).unwrap_err();
        assert_eq!(problem.code, "addresses-exhausted");
    }

    #[test]
    fn prefixes_without_room_are_refused() {
        assert!(Range::new("192.0.2.1".parse().unwrap(), 31).is_err());
        assert!(Range::new("192.0.2.1".parse().unwrap(), 0).is_err());
        assert!(Range::new("2001:db8::1".parse().unwrap(), 127).is_err());
    }
}
