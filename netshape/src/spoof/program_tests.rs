//! The program against a second description of the same rules, on frames that are honest, changed in places, and cut.

use std::net::{Ipv4Addr, Ipv6Addr};

use proptest::prelude::*;

use super::*;
use crate::cbpf::machine::{Packet, run};

const MAC: Mac = Mac([2, 0x11, 0x22, 0x33, 0x44, 0x55]);
const OTHER_MAC: Mac = Mac([2, 0x11, 0x22, 0x33, 0x44, 0x56]);

fn allowed() -> Vec<Prefix> {
    ["10.77.0.5/32", "10.78.4.0/22", "fd77::5/128", "fd78:0:0:10::/60", "192.0.2.9/31"]
        .map(|text| text.parse().expect("a prefix"))
        .to_vec()
}

fn passes(program: &[u8], frame: &[u8], vlan: bool) -> bool {
    match run(program, &Packet { bytes: frame, mark: 0, vlan }) {
        PASS => true,
        REFUSE => false,
        other => panic!("{other} is no verdict, for {frame:02x?}"),
    }
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]))
}

fn own4(allowed: &[Prefix], addr: Ipv4Addr) -> bool {
    allowed
        .iter()
        .any(|p| p.addr.is_ipv4() && Prefix { addr: addr.into(), len: p.len }.network() == p.network())
}

fn own6(allowed: &[Prefix], addr: Ipv6Addr) -> bool {
    addr.octets() == [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0x11, 0x22, 0xff, 0xfe, 0x33, 0x44, 0x55]
        || allowed
            .iter()
            .any(|p| p.addr.is_ipv6() && Prefix { addr: addr.into(), len: p.len }.network() == p.network())
}

fn addr4(bytes: &[u8], at: usize) -> Option<Ipv4Addr> {
    Some(<[u8; 4]>::try_from(bytes.get(at..at + 4)?).ok()?.into())
}

fn addr6(bytes: &[u8], at: usize) -> Option<Ipv6Addr> {
    Some(<[u8; 16]>::try_from(bytes.get(at..at + 16)?).ok()?.into())
}

/// The rules in other words; `None` is a frame that is too short.
fn honest(frame: &[u8], allowed: &[Prefix]) -> Option<bool> {
    let (source, body) = (frame.get(6..12)?, frame.get(14..)?);
    if source != MAC.0 {
        return Some(false);
    }
    match half(frame, 12)? {
        0x0800 => honest4(body, allowed),
        0x0806 => {
            body.get(27)?;
            let operation = half(body, 6)?;
            let sender = addr4(body, 14)?;
            Some(
                body[..6] == [0, 1, 8, 0, 6, 4]
                    && (1..=2).contains(&operation)
                    && body[8..14] == MAC.0
                    && (own4(allowed, sender) || (sender.is_unspecified() && operation == 1)),
            )
        }
        0x86dd => honest6(body, allowed),
        _ => Some(false),
    }
}

fn honest4(packet: &[u8], allowed: &[Prefix]) -> Option<bool> {
    let (source, target) = (addr4(packet, 12)?, addr4(packet, 16)?);
    let (protocol, fragment) = (packet[9], half(packet, 6)?);
    let payload = packet.get(usize::from(packet[0] & 15) * 4..).unwrap_or(&[]);
    let ports = payload.get(7).and_then(|_| Some((half(payload, 0)?, half(payload, 2)?)));
    if own4(allowed, source) {
        return Some(protocol != 17 || fragment & 0x1fff != 0 || ports.is_some_and(|(from, _)| from != 67));
    }
    let dhcp = protocol == 17 && fragment & 0x3fff == 0 && ports == Some((68, 67));
    Some(source.is_unspecified() && target == Ipv4Addr::BROADCAST && dhcp)
}

fn honest6(packet: &[u8], allowed: &[Prefix]) -> Option<bool> {
    let (source, payload) = (addr6(packet, 8)?, packet.get(40..)?);
    let report = || {
        payload.get(11)?;
        Some(payload[0] == 58 && payload[1] == 0 && [131, 132, 143].contains(&payload[8]))
    };
    if own6(allowed, source) {
        return match packet[6] {
            0 => report(),
            17 => payload.get(7).map(|_| half(payload, 0) != Some(547)),
            43 | 51 | 60 | 135 | 139 | 140 => Some(false),
            44 => {
                payload.get(15)?;
                let first = half(payload, 2)? & 0xfff8 == 0;
                Some(match payload[0] {
                    6 | 50 | 132 => true,
                    17 => !first || half(payload, 8) != Some(547),
                    58 => !first || [128, 129].contains(&payload[8]),
                    _ => false,
                })
            }
            58 => {
                payload.get(3)?;
                match payload[0] {
                    130 | 134 | 137 => Some(false),
                    133 => match half(packet, 4)? {
                        8 => Some(true),
                        16 => {
                            let option = payload.get(8..16)?;
                            Some(option[..2] == [1, 1] && option[2..] == MAC.0)
                        }
                        _ => Some(false),
                    },
                    135 => options(packet),
                    136 => Some(own6(allowed, addr6(payload, 8)?) && options(packet)?),
                    _ => Some(true),
                }
            }
            _ => Some(true),
        };
    }
    if !source.is_unspecified() {
        return Some(false);
    }
    match packet[6] {
        0 => report(),
        58 => {
            payload.get(7)?;
            match payload[0] {
                133 => Some(half(packet, 4)? == 8),
                135 => Some(own6(allowed, addr6(payload, 8)?) && options(packet)?),
                _ => Some(false),
            }
        }
        _ => Some(false),
    }
}

fn options(packet: &[u8]) -> Option<bool> {
    packet.get(40 + 23)?;
    match half(packet, 4)? {
        24 => Some(true),
        32 => {
            let option = packet.get(64..72)?;
            let (kind, mac) = ((option[0], option[1]), &option[2..]);
            Some(kind == (14, 1) || ([(1, 1), (2, 1)].contains(&kind) && mac == MAC.0))
        }
        _ => Some(false),
    }
}

fn ethernet(from: Mac, ethertype: u16, body: &[u8]) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend(from.0);
    frame.extend(ethertype.to_be_bytes());
    frame.extend(body);
    frame
}

fn arp(operation: u16, mac: Mac, sender: Ipv4Addr) -> Vec<u8> {
    let mut body = vec![0, 1, 8, 0, 6, 4];
    body.extend(operation.to_be_bytes());
    body.extend(mac.0);
    body.extend(sender.octets());
    body.extend([0; 10]);
    ethernet(MAC, 0x0806, &body)
}

fn ipv4(from: Ipv4Addr, to: Ipv4Addr, words: u8, fragment: u16, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut body = vec![0x40 | words, 0, 0, 60, 0, 1];
    body.extend(fragment.to_be_bytes());
    body.extend([64, protocol, 0, 0]);
    body.extend(from.octets());
    body.extend(to.octets());
    body.resize(body.len() + usize::from(words.saturating_sub(5)) * 4, 1);
    body.extend(payload);
    ethernet(MAC, 0x0800, &body)
}

fn ipv6(from: Ipv6Addr, next: u8, payload: &[u8]) -> Vec<u8> {
    let mut body = vec![0x60, 0, 0, 0];
    body.extend(u16::try_from(payload.len()).expect("short").to_be_bytes());
    body.extend([next, 255]);
    body.extend(from.octets());
    body.extend([0xff; 16]);
    body.extend(payload);
    ethernet(MAC, 0x86dd, &body)
}

fn neighbour(kind: u8, target: Ipv6Addr, option: Option<(u8, Mac)>) -> Vec<u8> {
    let mut payload = vec![kind, 0, 0, 0, 0, 0, 0, 0];
    payload.extend(target.octets());
    if let Some((option, mac)) = option {
        payload.extend([option, 1]);
        payload.extend(mac.0);
    }
    payload
}

fn a(text: &str) -> Ipv4Addr {
    text.parse().expect("an address")
}

fn b(text: &str) -> Ipv6Addr {
    text.parse().expect("an address")
}

/// A router solicitation with a link-layer address.
fn solicitation(mac: Mac) -> Vec<u8> {
    [&[133, 0, 0, 0, 0, 0, 0, 0, 1, 1][..], &mac.0].concat()
}

/// What it is, whether it is honest, and the frame.
type Case = (&'static str, bool, Vec<u8>);

fn cases_of_ipv4() -> Vec<Case> {
    let (dhcp, all) = ([0, 68, 0, 67, 0, 8, 0, 0], a("255.255.255.255"));
    vec![
        ("own IPv4", true, ipv4(a("10.77.0.5"), all, 5, 0, 6, &[0; 20])),
        ("in a range", true, ipv4(a("10.78.7.255"), all, 5, 0, 6, &[0; 20])),
        ("beyond the range", false, ipv4(a("10.78.8.0"), all, 5, 0, 6, &[0; 20])),
        ("another's IPv4", false, ipv4(a("10.77.0.6"), all, 5, 0, 6, &[0; 20])),
        ("the gateway's IPv4", false, ipv4(a("10.77.0.1"), all, 5, 0, 6, &[0; 20])),
        ("DHCP", true, ipv4(a("0.0.0.0"), all, 5, 0, 17, &dhcp)),
        ("DHCP with options in front", true, ipv4(a("0.0.0.0"), all, 8, 0, 17, &dhcp)),
        ("DHCP in pieces", false, ipv4(a("0.0.0.0"), all, 5, 0x2000, 17, &dhcp)),
        ("DHCP to one host", false, ipv4(a("0.0.0.0"), a("10.77.0.6"), 5, 0, 17, &dhcp)),
        ("0.0.0.0 with TCP", false, ipv4(a("0.0.0.0"), all, 5, 0, 6, &dhcp)),
        ("a DHCP server", false, ipv4(a("10.77.0.5"), all, 5, 0, 17, &[0, 67, 0, 68, 0, 8, 0, 0])),
        ("its later piece", true, ipv4(a("10.77.0.5"), all, 5, 9, 17, &[0, 67, 0, 68, 0, 8, 0, 0])),
        ("UDP without a header", false, ipv4(a("10.77.0.5"), all, 5, 0, 17, &[0, 1, 0, 1])),
        ("own ARP", true, arp(1, MAC, a("10.77.0.5"))),
        ("own answer", true, arp(2, MAC, a("10.77.0.5"))),
        ("a probe", true, arp(1, MAC, a("0.0.0.0"))),
        ("an answer from nobody", false, arp(2, MAC, a("0.0.0.0"))),
        ("another's ARP", false, arp(2, MAC, a("10.77.0.1"))),
        ("another's MAC in ARP", false, arp(2, OTHER_MAC, a("10.77.0.5"))),
        ("reverse ARP", false, arp(3, MAC, a("10.77.0.5"))),
        ("another MAC", false, {
            let mut frame = ipv4(a("10.77.0.5"), all, 5, 0, 6, &[0; 20]);
            frame[6..12].copy_from_slice(&OTHER_MAC.0);
            frame
        }),
    ]
}

fn cases_of_ipv6_and_others() -> Vec<Case> {
    let (us, any) = (b("fd77::5"), b("::"));
    vec![
        ("own IPv6", true, ipv6(us, 6, &[0; 20])),
        ("in a range", true, ipv6(b("fd78:0:0:1f::1"), 6, &[0; 20])),
        ("beyond the range", false, ipv6(b("fd78:0:0:20::1"), 6, &[0; 20])),
        ("another's IPv6", false, ipv6(b("fd77::6"), 6, &[0; 20])),
        ("own link-local", true, ipv6(b("fe80::11:22ff:fe33:4455"), 6, &[0; 20])),
        ("another link-local", false, ipv6(b("fe80::1"), 6, &[0; 20])),
        ("asking for a neighbour", true, ipv6(us, 58, &neighbour(135, b("fd77::1"), Some((1, MAC))))),
        ("asking as another", false, ipv6(us, 58, &neighbour(135, b("fd77::1"), Some((1, OTHER_MAC))))),
        ("own advertisement", true, ipv6(us, 58, &neighbour(136, us, Some((2, MAC))))),
        ("another's advertisement", false, ipv6(us, 58, &neighbour(136, b("fd77::1"), Some((2, MAC))))),
        ("own, to another's MAC", false, ipv6(us, 58, &neighbour(136, us, Some((2, OTHER_MAC))))),
        ("is my address free", true, ipv6(any, 58, &neighbour(135, us, None))),
        ("is it, with a nonce", true, ipv6(any, 58, &neighbour(135, us, Some((14, MAC))))),
        ("is another's free", false, ipv6(any, 58, &neighbour(135, b("fd77::6"), None))),
        ("nobody's advertisement", false, ipv6(any, 58, &neighbour(136, us, None))),
        ("is there a router", true, ipv6(any, 58, &[133, 0, 0, 0, 0, 0, 0, 0])),
        ("is there a router for me", true, ipv6(us, 58, &solicitation(MAC))),
        ("is there a router for another", false, ipv6(us, 58, &solicitation(OTHER_MAC))),
        ("I am the router", false, ipv6(us, 58, &[134, 0, 0, 0, 0, 0, 0, 0])),
        ("go there instead", false, ipv6(us, 58, &[137, 0, 0, 0, 0, 0, 0, 0])),
        ("ping", true, ipv6(us, 58, &[128, 0, 0, 0, 0, 0, 0, 0])),
        ("nobody pings", false, ipv6(any, 58, &[128, 0, 0, 0, 0, 0, 0, 0])),
        ("listening", true, ipv6(any, 0, &[58, 0, 5, 2, 0, 0, 0, 0, 143, 0, 0, 0, 0, 0, 0, 0])),
        ("who listens", false, ipv6(us, 0, &[58, 0, 5, 2, 0, 0, 0, 0, 130, 0, 0, 0, 0, 0, 0, 0])),
        ("hidden router", false, ipv6(us, 60, &[58, 0, 1, 4, 0, 0, 0, 0, 134, 0, 0, 0, 0, 0, 0, 0])),
        ("a router in pieces", false, ipv6(us, 44, &[58, 0, 0, 1, 0, 0, 0, 1, 134, 0, 0, 0, 0, 0, 0, 0])),
        ("ping in pieces", true, ipv6(us, 44, &[58, 0, 0, 1, 0, 0, 0, 1, 128, 0, 0, 0, 0, 0, 0, 0])),
        ("hidden in pieces", false, ipv6(us, 44, &[60, 0, 0, 1, 0, 0, 0, 1, 58, 0, 0, 0, 0, 0, 0, 0])),
        ("a DHCPv6 server", false, ipv6(us, 17, &[2, 35, 2, 34, 0, 8, 0, 0])),
        ("spanning tree", false, ethernet(MAC, 0x0026, &[0x42; 38])),
        ("another protocol", false, ethernet(MAC, 0x88cc, &[0; 46])),
        ("a second tag", false, ethernet(MAC, 0x8100, &[0; 46])),
    ]
}

/// The rules one by one, in words.
#[test]
fn what_is_honest_and_what_is_not() {
    let own = program(MAC, &allowed()).expect("it fits");
    let cases = [cases_of_ipv4(), cases_of_ipv6_and_others()].concat();
    for (name, good, frame) in &cases {
        assert_eq!(passes(&own, frame, false), *good, "{name}");
        assert_eq!(honest(frame, &allowed()).unwrap_or(false), *good, "{name}, in other words");
        assert!(!passes(&own, frame, true), "{name}, with a tag");
        for end in 0..frame.len().min(54) {
            assert!(!passes(&own, &frame[..end], false) || end >= 34, "{name}, cut at {end}");
        }
    }
    // Without any address only what finds one is left.
    let none = program(MAC, &[]).expect("it fits");
    let passing: Vec<_> =
        cases.iter().filter(|(_, _, f)| passes(&none, f, false)).map(|(n, ..)| *n).collect();
    assert_eq!(
        passing,
        ["DHCP", "DHCP with options in front", "a probe", "own link-local", "is there a router", "listening"]
    );
}

#[test]
fn as_many_prefixes_as_are_allowed_fit() {
    let many: Vec<Prefix> = (0..super::super::ALLOWED_MAX)
        .map(|n| format!("fd00::{n:x}/127").parse().expect("a prefix"))
        .collect();
    let long = program(MAC, &many).expect("it fits");
    println!("{} instructions", long.len() / 8);
    assert!(passes(&long, &ipv6(b("fd00::3e"), 6, &[0; 20]), false));
    assert!(!passes(&long, &ipv6(b("fd00::4f"), 6, &[0; 20]), false));
}

fn a_frame() -> impl Strategy<Value = Vec<u8>> {
    let v4 = prop::sample::select(vec![
        a("10.77.0.5"),
        a("10.77.0.6"),
        a("10.78.5.1"),
        a("192.0.2.8"),
        a("0.0.0.0"),
        a("255.255.255.255"),
    ]);
    let v6 = prop::sample::select(vec![
        b("fd77::5"),
        b("fd77::6"),
        b("fd78:0:0:15::1"),
        b("fe80::11:22ff:fe33:4455"),
        b("fe80::1"),
        b("::"),
    ]);
    let mac = prop::sample::select(vec![MAC, OTHER_MAC]);
    let ports = prop::sample::select(vec![[0, 68, 0, 67], [0, 67, 0, 68], [2, 35, 1, 1], [1, 1, 1, 1]]);
    let payload =
        (ports, prop::collection::vec(any::<u8>(), 0..40)).prop_map(|(p, rest)| [&p[..], &rest].concat());
    let fragment = prop::sample::select(vec![0_u16, 0x4000, 0x2000, 0x2001, 7]);
    let next = prop::sample::select(vec![0_u8, 6, 17, 43, 44, 50, 51, 58, 58, 58, 60, 135, 59]);
    let icmp = (
        prop::sample::select(vec![128_u8, 130, 131, 133, 134, 135, 135, 136, 136, 137, 143]),
        v6.clone(),
        prop::option::of((prop::sample::select(vec![1_u8, 2, 3, 14]), mac.clone())),
    )
        .prop_map(|(kind, target, option)| neighbour(kind, target, option));
    let extended = (
        prop::sample::select(vec![6_u8, 17, 44, 50, 58, 58, 60]),
        prop::sample::select(vec![[0_u8, 0, 0], [0, 0, 1], [0, 1, 0]]),
        icmp.clone(),
    )
        .prop_map(|(header, [x, y, z], inner)| [&[header, x, y, z, 0, 0, 0, 0], &inner[..]].concat());
    let router = (0_u8..3, mac.clone()).prop_map(|(kind, mac)| {
        let mut payload = solicitation(mac);
        payload[8] = kind;
        payload
    });
    let body6 = prop_oneof![4 => icmp, 4 => extended, 4 => payload.clone(), 1 => router];
    prop_oneof![
        (1_u16..4, mac, v4.clone()).prop_map(|(op, mac, from)| arp(op, mac, from)),
        (v4.clone(), v4, 4_u8..16, fragment, prop::sample::select(vec![1_u8, 6, 17]), payload)
            .prop_map(|(from, to, words, fragment, proto, p)| ipv4(from, to, words, fragment, proto, &p)),
        (v6.clone(), next, body6.clone()).prop_map(|(from, next, payload)| ipv6(from, next, &payload)),
        (v6, body6).prop_map(|(from, payload)| ipv6(from, 58, &payload)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(10_000))]

    /// Each frame whole, changed at one place, and cut, ten times over: 10⁵ frames and more.
    #[test]
    fn the_program_and_the_rules_agree(
        frame in a_frame(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 5),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 5),
    ) {
        thread_local!(static OWN: Vec<u8> = program(MAC, &allowed()).expect("it fits"));
        let agree = |frame: &[u8]| OWN.with(|own| {
            passes(own, frame, false) == honest(frame, &allowed()).unwrap_or(false)
        });
        prop_assert!(agree(&frame), "{frame:02x?}");
        for (at, value) in changes {
            let mut changed = frame.clone();
            changed[at.index(frame.len())] = value;
            prop_assert!(agree(&changed), "{changed:02x?}");
        }
        for cut in cuts {
            let short = &frame[..cut.index(frame.len())];
            prop_assert!(agree(short), "{short:02x?}");
        }
    }
}

fn a_prefix() -> impl Strategy<Value = Prefix> {
    prop_oneof![
        (any::<u32>(), 0_u8..=32).prop_map(|(bits, len)| Prefix { addr: Ipv4Addr::from(bits).into(), len }),
        (any::<u128>(), 0_u8..=128).prop_map(|(bits, len)| Prefix { addr: Ipv6Addr::from(bits).into(), len }),
    ]
}

proptest! {
    /// Addresses that differ from an allowed one in a single bit.
    #[test]
    fn prefixes_of_every_length_are_ranges(
        allowed in prop::collection::vec(a_prefix(), 1..9),
        which in any::<prop::sample::Index>(),
        bit in 0_u32..128,
    ) {
        let own = program(MAC, &allowed).expect("it fits");
        let (frame, expected) = match which.get(&allowed).addr {
            IpAddr::V4(addr) => {
                let near = Ipv4Addr::from(u32::from(addr) ^ 1 << (bit % 32));
                (ipv4(near, a("255.255.255.255"), 5, 0, 6, &[0; 20]), own4(&allowed, near))
            }
            IpAddr::V6(addr) => {
                let near = Ipv6Addr::from(u128::from(addr) ^ 1 << bit);
                (ipv6(near, 6, &[0; 20]), own6(&allowed, near))
            }
        };
        prop_assert_eq!(passes(&own, &frame, false), expected);
    }
}
