//! Makes the guest's network look as the host says: hostname, addresses, default routes, MTU, name servers.
//!
//! Everything is checked before anything is changed, and the same request twice changes nothing. On the named cards
//! permanent global addresses and static default routes that are not in the request are removed; other cards, other
//! routes, and what the kernel or router advertisements made stay. Cards after the first have ways out of their own: [`paths`].

pub mod netlink;
mod paths;

use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use lathe_guest::protocol::{Interface, Network};

use crate::failure::Failure;
use netlink::{
    Body, Netlink, PLAIN, PUT, RTM_DELADDR, RTM_DELROUTE, RTM_GETADDR, RTM_GETROUTE, RTM_NEWADDR,
    RTM_NEWLINK, RTM_NEWROUTE, family, find_attribute, to_address,
};

/// A card shows up within this time, as its driver may still be loading.
const APPEAR_TIMEOUT: Duration = Duration::from_secs(5);
const APPEAR_POLL: Duration = Duration::from_millis(20);
/// Longest label of RFC 1123.
const MAX_HOSTNAME_BYTES: usize = 63;
const MIN_MTU: u16 = 68;

const IFF_UP: u32 = 1;
const IFLA_MTU: u16 = 4;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_BROADCAST: u16 = 4;
const IFA_FLAGS: u16 = 8;
const IFA_F_NODAD: u32 = 0x02;
const IFA_F_PERMANENT: u32 = 0x80;
const ADDRESS_FIXED: usize = 8;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
const ROUTE_FIXED: usize = 12;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_BOOT: u8 = 3;
const RTPROT_STATIC: u8 = 4;
const RTN_UNICAST: u8 = 1;
/// The gateway is on this link even if no address says so (/32 addresses).
const RTNH_F_ONLINK: u32 = 4;

/// An address with the length of its network's prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cidr {
    address: IpAddr,
    prefix: u8,
}

impl Cidr {
    fn parse(text: &str) -> Option<Self> {
        let (address, prefix) = text.split_once('/')?;
        let address: IpAddr = address.parse().ok()?;
        let prefix: u8 = prefix.parse().ok()?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        (prefix <= most && !address.is_unspecified() && !address.is_multicast())
            .then_some(Self { address, prefix })
    }

    /// The address with all bits of the host zero.
    fn network(self) -> IpAddr {
        match self.address {
            IpAddr::V4(address) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(self.prefix)).unwrap_or(0);
                IpAddr::from((u32::from(address) & mask).to_be_bytes())
            }
            IpAddr::V6(address) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(self.prefix)).unwrap_or(0);
                IpAddr::from((u128::from(address) & mask).to_be_bytes())
            }
        }
    }

    /// The IPv4 broadcast address; networks of two have none (RFC 3021).
    fn broadcast(self) -> Option<IpAddr> {
        let IpAddr::V4(address) = self.address else { return None };
        (self.prefix < 31)
            .then(|| IpAddr::from((u32::from(address) | (u32::MAX >> self.prefix)).to_be_bytes()))
    }
}

/// An interface of the request after checking.
struct Card {
    mac: [u8; 6],
    addresses: Vec<Cidr>,
    gateways: Vec<IpAddr>,
    mtu: Option<u16>,
}

/// Applies the request.
///
/// # Errors
/// `bad-request` before anything is changed; `not-found` when a card does not appear; `failed` with what the kernel says.
pub fn apply(network: &Network) -> Result<(), Failure> {
    let (cards, dns) = check(network)?;
    let mut found = Vec::new();
    for card in cards {
        let index = wait_for(Path::new("/sys/class/net"), card.mac, APPEAR_TIMEOUT)?;
        found.push((card, index));
    }
    set_hostname(&network.hostname)?;
    let socket = |error| Failure::failed(format!("cannot reach the kernel's routing tables: {error}"));
    let mut netlink = Netlink::new().map_err(socket)?;
    for (position, (card, index)) in found.iter().enumerate() {
        // One default route for all: the first card's.
        let gateways = if position == 0 { card.gateways.as_slice() } else { &[] };
        configure(&mut netlink, card, gateways, *index)?;
    }
    paths::separate(&mut netlink, &found)?;
    if !dns.is_empty() {
        let contents: String = dns.iter().map(|server| format!("nameserver {server}\n")).collect();
        write_if_different(Path::new("/etc/resolv.conf"), &contents)
            .map_err(|error| Failure::failed(format!("cannot write /etc/resolv.conf: {error}")))?;
    }
    Ok(())
}

fn check(network: &Network) -> Result<(Vec<Card>, Vec<IpAddr>), Failure> {
    let bad = |message: String| Err(Failure::bad_request(message));
    let label = network.hostname.as_bytes();
    let inner = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'-';
    if label.is_empty()
        || label.len() > MAX_HOSTNAME_BYTES
        || !label.iter().all(inner)
        || label.first() == Some(&b'-')
        || label.last() == Some(&b'-')
    {
        return bad(format!("not a host name of letters, digits and inner hyphens: {:?}", network.hostname));
    }
    let mut cards = Vec::new();
    for interface in &network.interfaces {
        cards.push(check_card(interface)?);
    }
    let mut dns = Vec::new();
    for server in &network.dns {
        match server.parse() {
            Ok(address) => dns.push(address),
            Err(_) => return bad(format!("not the address of a name server: {server:?}")),
        }
    }
    Ok((cards, dns))
}

fn check_card(interface: &Interface) -> Result<Card, Failure> {
    let addresses = interface.addresses.iter().map(|text| {
        let wrong = || Failure::bad_request(format!("not an address with prefix length: {text:?}"));
        Cidr::parse(text).ok_or_else(wrong)
    });
    let gateways = interface.gateways.iter().map(|text| {
        text.parse::<IpAddr>().map_err(|_| Failure::bad_request(format!("not a gateway's address: {text:?}")))
    });
    let card = Card {
        mac: interface.mac,
        addresses: addresses.collect::<Result<_, _>>()?,
        gateways: gateways.collect::<Result<_, _>>()?,
        mtu: interface.mtu,
    };
    if card.gateways.iter().filter(|gateway| gateway.is_ipv4()).count() > 1
        || card.gateways.iter().filter(|gateway| gateway.is_ipv6()).count() > 1
    {
        return Err(Failure::bad_request("more than one gateway of one family".into()));
    }
    if card.mtu.is_some_and(|mtu| mtu < MIN_MTU) {
        return Err(Failure::bad_request(format!("an MTU is {MIN_MTU} at least")));
    }
    Ok(card)
}

/// Index of the card with this address; a bridge or VLAN on it has the same, but no device behind it.
fn wait_for(folder: &Path, mac: [u8; 6], timeout: Duration) -> Result<u32, Failure> {
    let wanted = mac.map(|byte| format!("{byte:02x}")).join(":");
    let deadline = Instant::now() + timeout;
    loop {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let read = |name| fs::read_to_string(entry.path().join(name)).unwrap_or_default();
            if read("address").trim() == wanted
                && entry.path().join("device").exists()
                && let Ok(index) = read("ifindex").trim().parse()
            {
                return Ok(index);
            }
        }
        if Instant::now() >= deadline {
            let message = format!("no network card with address {wanted} after {} s", timeout.as_secs());
            return Err(Failure::not_found(message));
        }
        std::thread::sleep(APPEAR_POLL);
    }
}

/// Brings a link up, with this MTU if one is given.
pub fn link_up(netlink: &mut Netlink, index: u32, mtu: Option<u16>) -> io::Result<()> {
    let mut fixed = [0; 16];
    fixed[4..8].copy_from_slice(&index.to_ne_bytes());
    fixed[8..12].copy_from_slice(&IFF_UP.to_ne_bytes());
    fixed[12..16].copy_from_slice(&IFF_UP.to_ne_bytes());
    let mut body = Body::new(&fixed);
    if let Some(mtu) = mtu {
        body = body.attribute(IFLA_MTU, &u32::from(mtu).to_ne_bytes());
    }
    netlink.change(RTM_NEWLINK, PLAIN, &body)
}

fn configure(netlink: &mut Netlink, card: &Card, gateways: &[IpAddr], index: u32) -> Result<(), Failure> {
    let failed = |what: &str| {
        let what = format!("cannot {what} on card {}", card.mac.map(|byte| format!("{byte:02x}")).join(":"));
        move |error: io::Error| Failure::failed(format!("{what}: {error}"))
    };
    link_up(netlink, index, card.mtu).map_err(failed("bring the link up or set its MTU"))?;
    let present = addresses(netlink, index).map_err(failed("read addresses"))?;
    for cidr in present.iter().filter(|cidr| !card.addresses.contains(cidr)) {
        netlink
            .change(RTM_DELADDR, PLAIN, &address_body(*cidr, index))
            .map_err(failed("remove an old address"))?;
    }
    for cidr in card.addresses.iter().filter(|cidr| !present.contains(cidr)) {
        let what = format!("set {}/{}", cidr.address, cidr.prefix);
        netlink.change(RTM_NEWADDR, PUT, &address_body(*cidr, index)).map_err(failed(&what))?;
    }
    let present = default_gateways(netlink, index).map_err(failed("read routes"))?;
    for (gateway, body) in &present {
        if !gateways.contains(gateway) {
            netlink.change(RTM_DELROUTE, PLAIN, body).map_err(failed("remove an old default route"))?;
        }
    }
    for gateway in gateways {
        if !present.iter().any(|(address, _)| address == gateway) {
            let what = format!("route through {gateway}");
            netlink.change(RTM_NEWROUTE, PUT, &route_body(*gateway, index)).map_err(failed(&what))?;
        }
    }
    Ok(())
}

fn address_body(cidr: Cidr, index: u32) -> Body {
    let mut fixed = [family(cidr.address), cidr.prefix, 0, 0, 0, 0, 0, 0];
    fixed[4..8].copy_from_slice(&index.to_ne_bytes());
    let mut body = Body::new(&fixed).address(IFA_LOCAL, cidr.address).address(IFA_ADDRESS, cidr.address);
    if let Some(broadcast) = cidr.broadcast() {
        body = body.address(IFA_BROADCAST, broadcast);
    }
    if cidr.address.is_ipv6() {
        // The host has allotted it: no need to ask the link for a second or two whether it is taken.
        body = body.attribute(IFA_FLAGS, &IFA_F_NODAD.to_ne_bytes());
    }
    body
}

fn route_body(gateway: IpAddr, index: u32) -> Body {
    let mut fixed = [0; ROUTE_FIXED];
    fixed[0] = family(gateway);
    fixed[4] = RT_TABLE_MAIN;
    fixed[5] = RTPROT_STATIC;
    fixed[7] = RTN_UNICAST;
    fixed[8..12].copy_from_slice(&RTNH_F_ONLINK.to_ne_bytes());
    Body::new(&fixed).attribute(RTA_OIF, &index.to_ne_bytes()).address(RTA_GATEWAY, gateway)
}

/// Permanent addresses of global scope.
fn addresses(netlink: &mut Netlink, index: u32) -> io::Result<Vec<Cidr>> {
    let messages = netlink.dump(RTM_GETADDR, &Body::new(&[0; ADDRESS_FIXED]))?;
    Ok(messages.iter().filter_map(|message| permanent_address(message, index)).collect())
}

fn permanent_address(message: &[u8], index: u32) -> Option<Cidr> {
    let fixed = message.first_chunk::<ADDRESS_FIXED>()?;
    let flags = find_attribute(message, ADDRESS_FIXED, IFA_FLAGS).and_then(to_u32);
    let flags = flags.unwrap_or(u32::from(fixed[2]));
    let ours = to_u32(&fixed[4..8]) == Some(index) && fixed[3] == 0 && flags & IFA_F_PERMANENT != 0;
    let local = find_attribute(message, ADDRESS_FIXED, IFA_LOCAL);
    let address = local.or_else(|| find_attribute(message, ADDRESS_FIXED, IFA_ADDRESS))?;
    ours.then_some(Cidr { address: to_address(address)?, prefix: fixed[1] })
}

/// Gateways of static default routes through this card, each with the body that deletes it.
fn default_gateways(netlink: &mut Netlink, index: u32) -> io::Result<Vec<(IpAddr, Body)>> {
    let messages = netlink.dump(RTM_GETROUTE, &Body::new(&[0; ROUTE_FIXED]))?;
    Ok(messages.iter().filter_map(|message| default_gateway(message, index)).collect())
}

fn default_gateway(message: &[u8], index: u32) -> Option<(IpAddr, Body)> {
    let fixed = message.first_chunk::<ROUTE_FIXED>()?;
    let oif = find_attribute(message, ROUTE_FIXED, RTA_OIF).and_then(to_u32);
    let set_by_people = matches!(fixed[5], RTPROT_BOOT | RTPROT_STATIC);
    let plain =
        fixed[1] == 0 && fixed[4] == RT_TABLE_MAIN && find_attribute(message, ROUTE_FIXED, RTA_DST).is_none();
    if oif != Some(index) || !set_by_people || !plain {
        return None;
    }
    let gateway = to_address(find_attribute(message, ROUTE_FIXED, RTA_GATEWAY)?)?;
    let mut deletion = [0; ROUTE_FIXED];
    deletion[0] = fixed[0];
    deletion[4] = RT_TABLE_MAIN;
    let mut body =
        Body::new(&deletion).attribute(RTA_OIF, &index.to_ne_bytes()).address(RTA_GATEWAY, gateway);
    if let Some(priority) = find_attribute(message, ROUTE_FIXED, RTA_PRIORITY) {
        body = body.attribute(RTA_PRIORITY, priority);
    }
    Some((gateway, body))
}

fn to_u32(bytes: &[u8]) -> Option<u32> {
    bytes.try_into().ok().map(u32::from_ne_bytes)
}

fn set_hostname(name: &str) -> Result<(), Failure> {
    let failed =
        |error: &dyn std::fmt::Display| Failure::failed(format!("cannot set the host name: {error}"));
    if nix::unistd::gethostname().is_ok_and(|present| present == *name) {
        return Ok(());
    }
    nix::unistd::sethostname(name).map_err(|error| failed(&error))?;
    write_if_different(Path::new("/etc/hostname"), &format!("{name}\n")).map_err(|error| failed(&error))
}

/// Replaces a file, also when it is a link to what a resolver manages, but only if it says something else.
fn write_if_different(path: &Path, contents: &str) -> io::Result<()> {
    if fs::read_to_string(path).is_ok_and(|present| present == contents) {
        return Ok(());
    }
    let temporary = path.with_extension("lathe-new");
    fs::write(&temporary, contents)?;
    fs::rename(&temporary, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(change: impl FnOnce(&mut Network)) -> Network {
        let interface = Interface {
            mac: [2, 0, 0, 0, 0, 7],
            addresses: vec!["192.0.2.7/24".into(), "2001:db8::7/64".into()],
            gateways: vec!["192.0.2.1".into(), "2001:db8::1".into()],
            mtu: Some(1500),
        };
        let mut network =
            Network { hostname: "demo".into(), interfaces: vec![interface], dns: vec!["192.0.2.1".into()] };
        change(&mut network);
        network
    }

    #[test]
    fn requests_are_checked_before_anything_happens() {
        assert!(check(&request(|_| ())).is_ok());
        let wrong: [fn(&mut Network); 9] = [
            |network| network.hostname = "a.b".into(),
            |network| network.hostname = "-a".into(),
            |network| network.hostname = "x".repeat(64),
            |network| network.interfaces[0].addresses[0] = "192.0.2.7".into(),
            |network| network.interfaces[0].addresses[0] = "192.0.2.7/33".into(),
            |network| network.interfaces[0].gateways.push("192.0.2.2".into()),
            |network| network.interfaces[0].gateways[0] = "gateway".into(),
            |network| network.interfaces[0].mtu = Some(67),
            |network| network.dns[0] = "dns.example".into(),
        ];
        for (index, change) in wrong.into_iter().enumerate() {
            assert!(check(&request(change)).is_err(), "{index}");
        }
    }

    #[test]
    fn broadcast_addresses() {
        let broadcast = |text| Cidr::parse(text).unwrap().broadcast().map(|address| address.to_string());
        assert_eq!(broadcast("192.0.2.7/24").as_deref(), Some("192.0.2.255"));
        assert_eq!(broadcast("10.1.2.3/0").as_deref(), Some("255.255.255.255"));
        assert_eq!(broadcast("192.0.2.7/31"), None);
        assert_eq!(broadcast("2001:db8::7/64"), None);
    }

    #[test]
    fn the_card_behind_a_bridge_is_found() {
        let folder = tempfile::tempdir().unwrap();
        for (name, index, device) in [("br0", "9", false), ("eth0", "2", true)] {
            let card = folder.path().join(name);
            fs::create_dir(&card).unwrap();
            fs::write(card.join("address"), "02:00:00:00:00:07\n").unwrap();
            fs::write(card.join("ifindex"), index).unwrap();
            if device {
                fs::create_dir(card.join("device")).unwrap();
            }
        }
        assert_eq!(wait_for(folder.path(), [2, 0, 0, 0, 0, 7], Duration::ZERO), Ok(2));
        let error = wait_for(folder.path(), [2, 0, 0, 0, 0, 8], Duration::ZERO).unwrap_err().to_string();
        assert!(error.contains("02:00:00:00:00:08"), "{error}");
    }

    #[test]
    fn what_the_kernel_made_is_left_alone() {
        let cidr = Cidr::parse("2001:db8::7/64").unwrap();
        let mut message = vec![family(cidr.address), 64, 0, 0, 3, 0, 0, 0];
        let attributes = |flags: u32| {
            Body::new(&[]).address(IFA_ADDRESS, cidr.address).attribute(IFA_FLAGS, &flags.to_ne_bytes())
        };
        let with = |flags| {
            let mut whole = message.clone();
            whole.extend(attributes(flags).into_bytes());
            whole
        };
        assert_eq!(permanent_address(&with(IFA_F_PERMANENT), 3), Some(cidr));
        assert_eq!(permanent_address(&with(0), 3), None, "from a router's advertisement");
        assert_eq!(permanent_address(&with(IFA_F_PERMANENT), 4), None, "another card's");
        message[3] = 253;
        let mut link_local = message.clone();
        link_local.extend(attributes(IFA_F_PERMANENT).into_bytes());
        assert_eq!(permanent_address(&link_local, 3), None, "link-local");
    }

    #[test]
    fn default_routes_are_recognised_with_what_deletes_them() {
        let gateway: IpAddr = "192.0.2.1".parse().unwrap();
        let message = route_body(gateway, 5).into_bytes();
        assert_eq!(default_gateway(&message, 5).map(|found| found.0), Some(gateway));
        assert_eq!(default_gateway(&message, 6).map(|found| found.0), None);
        let mut other = message.clone();
        other[5] = 9; // RTPROT_RA
        assert_eq!(default_gateway(&other, 5).map(|found| found.0), None);
        for length in 0..message.len() {
            let _ = default_gateway(&message[..length], 5);
        }
    }
}
