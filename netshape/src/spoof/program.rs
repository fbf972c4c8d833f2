//! The program that tells honest frames from forged ones: pure, from addresses to instructions.
//!
//! ```text
//! source MAC, no VLAN tag ─► ARP   Ethernet/IPv4, sender's MAC and address are its own (or 0.0.0.0 in a probe)
//!                          ─► IPv4  source its own; or 0.0.0.0 for DHCP
//!                          ─► IPv6  source its own, or the link-local address of the MAC; or :: for DAD, RS, MLD
//!                          ─► else  refused
//! ```
//!
//! Beyond sources it refuses what would make others believe in an address or a gateway: neighbour advertisements for
//! other targets (RFC 4861), router advertisements, redirects, MLD queries, what a DHCP server sends; and extension
//! headers behind which such a message could hide from a look at fixed offsets (RFC 7113): all but fragments of TCP, UDP,
//! SCTP, ESP and echo, and the hop-by-hop header of MLD.

use std::net::IpAddr;

use crate::addr::{Mac, Prefix};
use crate::cbpf::{Assembler, Auxiliary, Label, Size};

/// `TC_ACT_SHOT`: dropped.
pub(super) const REFUSE: u32 = 2;
/// `TC_ACT_UNSPEC`: on to the next filter.
pub(super) const PASS: u32 = u32::MAX;

const ETHERNET_BYTES: u32 = 14;
const IPV4: u32 = 0x0800;
const ARP: u32 = 0x0806;
const IPV6: u32 = 0x86dd;

/// Of an Ethernet frame.
const SOURCE_MAC: u32 = 6;
const ETHERTYPE: u32 = 12;

/// Of ARP over Ethernet (RFC 826).
const ARP_BYTES: u32 = 28;
const ARP_KINDS: u32 = 14;
const ARP_LENGTHS: u32 = 18;
const ARP_OPERATION: u32 = 20;
const ARP_SENDER_MAC: u32 = 22;
const ARP_SENDER: u32 = 28;

/// Of IPv4 (RFC 791).
const IPV4_BYTES: u32 = 20;
const IPV4_FRAGMENT: u32 = 20;
const IPV4_PROTOCOL: u32 = 23;
const IPV4_SOURCE: u32 = 26;
const IPV4_DESTINATION: u32 = 30;
const FRAGMENT_OFFSET: u32 = 0x1fff;
const FRAGMENT_ANY: u32 = 0x3fff;

/// Of IPv6 (RFC 8200).
const IPV6_BYTES: u32 = 40;
const IPV6_PAYLOAD_BYTES: u32 = 18;
const IPV6_NEXT: u32 = 20;
const IPV6_SOURCE: u32 = 22;
const PAYLOAD6: u32 = ETHERNET_BYTES + IPV6_BYTES;
/// Of the 8 bytes of a fragment header; the same length has the hop-by-hop header of MLD.
const EXTENSION_BYTES: u32 = 8;
const FRAGMENT6_OFFSET: u32 = 0xfff8;

/// Of neighbour solicitations and advertisements (RFC 4861, 4.3 and 4.4).
const ND_TARGET: u32 = PAYLOAD6 + 8;
const ND_BYTES: u32 = 24;
const ND_OPTION: u32 = PAYLOAD6 + ND_BYTES;
const ND_OPTION_BYTES: u32 = 8;
/// Of router solicitations (4.1).
const RS_BYTES: u32 = 8;
const RS_OPTION: u32 = PAYLOAD6 + RS_BYTES;
const NONCE: u32 = 14;

const UDP: u32 = 17;
const ICMP6: u32 = 58;
const HOP_BY_HOP: u32 = 0;
const FRAGMENT: u32 = 44;
/// Headers behind which another one follows: routing, authentication, destination options, mobility, HIP, shim6.
const HIDING_HEADERS: [u32; 6] = [43, 51, 60, 135, 139, 140];
/// TCP, ESP and SCTP.
const FRAGMENTED: [u32; 3] = [6, 50, 132];
const DHCP_SERVER: u32 = 67;
const DHCP_CLIENT: u32 = 68;
const DHCP6_SERVER: u32 = 547;
const ECHO: [u32; 2] = [128, 129];
const MLD_QUERY: u32 = 130;
const MLD_REPORTS: [u32; 3] = [131, 132, 143];
const ROUTER_SOLICITATION: u32 = 133;
const ROUTER_ADVERTISEMENT: u32 = 134;
const NEIGHBOUR_SOLICITATION: u32 = 135;
const NEIGHBOUR_ADVERTISEMENT: u32 = 136;
const REDIRECT: u32 = 137;

/// The program for a machine with this MAC and these addresses; `None` if it would be too long.
pub(super) fn program(mac: Mac, allowed: &[Prefix]) -> Option<Vec<u8>> {
    let mut asm = Assembler::default();
    let (pass, refuse) = (asm.label(), asm.label());
    let rules = Rules { mac, allowed, pass, refuse };
    let (arp, ipv4, ipv6) = (asm.label(), asm.label(), asm.label());
    asm.load_auxiliary(Auxiliary::VlanTagPresent);
    asm.unless_equal(0, refuse);
    asm.need(ETHERNET_BYTES, refuse);
    rules.own_mac(&mut asm, SOURCE_MAC);
    asm.load(Size::Half, ETHERTYPE);
    asm.if_equal(IPV4, ipv4);
    asm.if_equal(IPV6, ipv6);
    asm.if_equal(ARP, arp);
    asm.jump(refuse);
    asm.place(arp);
    rules.arp(&mut asm);
    asm.place(ipv4);
    rules.ipv4(&mut asm);
    asm.place(ipv6);
    rules.ipv6(&mut asm);
    asm.place(pass);
    asm.give(PASS);
    asm.place(refuse);
    asm.give(REFUSE);
    asm.finish()
}

/// The link-local address of a MAC (RFC 4291, appendix A).
pub(super) fn link_local(mac: Mac) -> Prefix {
    let [a, b, c, d, e, f] = mac.0;
    let bytes = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f];
    Prefix { addr: IpAddr::from(bytes), len: 128 }
}

struct Rules<'a> {
    mac: Mac,
    allowed: &'a [Prefix],
    pass: Label,
    refuse: Label,
}

impl Rules<'_> {
    /// Refuses unless the six bytes there are the machine's MAC.
    fn own_mac(&self, asm: &mut Assembler, at: u32) {
        let [a, b, c, d, e, f] = self.mac.0;
        asm.load(Size::Word, at);
        asm.unless_equal(u32::from_be_bytes([a, b, c, d]), self.refuse);
        asm.load(Size::Half, at + 4);
        asm.unless_equal(u16::from_be_bytes([e, f]).into(), self.refuse);
    }

    /// Jumps if the IPv4 address there is allowed.
    fn if_own_ipv4(&self, asm: &mut Assembler, at: u32, own: Label) {
        for prefix in self.allowed.iter().map(Prefix::network) {
            let IpAddr::V4(addr) = prefix.addr else { continue };
            asm.load(Size::Word, at);
            asm.and(u32::MAX.checked_shl(32 - u32::from(prefix.len.min(32))).unwrap_or(0));
            asm.if_equal(addr.into(), own);
        }
    }

    /// Jumps if the IPv6 address there is allowed or the link-local one.
    fn if_own_ipv6(&self, asm: &mut Assembler, at: u32, own: Label) {
        let link_local = link_local(self.mac);
        for prefix in self.allowed.iter().chain([&link_local]).map(Prefix::network) {
            let IpAddr::V6(addr) = prefix.addr else { continue };
            let other = asm.label();
            let mut bits = u32::from(prefix.len.min(128));
            for (word, at) in addr.octets().chunks_exact(4).zip((at..).step_by(4)) {
                let here = bits.min(32);
                bits -= here;
                if here == 0 {
                    break;
                }
                asm.load(Size::Word, at);
                asm.and(u32::MAX << (32 - here));
                asm.unless_equal(word.iter().fold(0, |n, b| n << 8 | u32::from(*b)), other);
            }
            asm.jump(own);
            asm.place(other);
        }
    }

    fn arp(&self, asm: &mut Assembler) {
        let (known, own) = (asm.label(), asm.label());
        asm.need(ETHERNET_BYTES + ARP_BYTES, self.refuse);
        // Ethernet and IPv4, with addresses of 6 and 4 bytes.
        asm.load(Size::Word, ARP_KINDS);
        asm.unless_equal(0x0001_0800, self.refuse);
        asm.load(Size::Half, ARP_LENGTHS);
        asm.unless_equal(0x0604, self.refuse);
        asm.load(Size::Half, ARP_OPERATION);
        asm.if_equal(1, known);
        asm.unless_equal(2, self.refuse);
        asm.place(known);
        self.own_mac(asm, ARP_SENDER_MAC);
        self.if_own_ipv4(asm, ARP_SENDER, own);
        // A probe (RFC 5227) asks with sender 0.0.0.0.
        asm.load(Size::Word, ARP_SENDER);
        asm.unless_equal(0, self.refuse);
        asm.load(Size::Half, ARP_OPERATION);
        asm.unless_equal(1, self.refuse);
        asm.place(own);
        asm.jump(self.pass);
    }

    fn ipv4(&self, asm: &mut Assembler) {
        let own = asm.label();
        asm.need(ETHERNET_BYTES + IPV4_BYTES, self.refuse);
        self.if_own_ipv4(asm, IPV4_SOURCE, own);
        // 0.0.0.0 asks a DHCP server (RFC 2131, 4.1), whole and by broadcast.
        asm.load(Size::Word, IPV4_SOURCE);
        asm.unless_equal(0, self.refuse);
        asm.load(Size::Word, IPV4_DESTINATION);
        asm.unless_equal(u32::MAX, self.refuse);
        asm.load(Size::Byte, IPV4_PROTOCOL);
        asm.unless_equal(UDP, self.refuse);
        asm.load(Size::Half, IPV4_FRAGMENT);
        asm.if_any_bit(FRAGMENT_ANY, self.refuse);
        asm.need_at_x(ETHERNET_BYTES, ETHERNET_BYTES + 8, self.refuse);
        asm.load_at_x(Size::Half, ETHERNET_BYTES);
        asm.unless_equal(DHCP_CLIENT, self.refuse);
        asm.load_at_x(Size::Half, ETHERNET_BYTES + 2);
        asm.unless_equal(DHCP_SERVER, self.refuse);
        asm.jump(self.pass);
        // From its own address everything but what a DHCP server sends.
        asm.place(own);
        asm.load(Size::Byte, IPV4_PROTOCOL);
        asm.unless_equal(UDP, self.pass);
        asm.load(Size::Half, IPV4_FRAGMENT);
        asm.if_any_bit(FRAGMENT_OFFSET, self.pass);
        asm.need_at_x(ETHERNET_BYTES, ETHERNET_BYTES + 8, self.refuse);
        asm.load_at_x(Size::Half, ETHERNET_BYTES);
        asm.if_equal(DHCP_SERVER, self.refuse);
        asm.jump(self.pass);
    }

    fn ipv6(&self, asm: &mut Assembler) {
        let (own, nobody, udp, fragment, mld, icmp) =
            (asm.label(), asm.label(), asm.label(), asm.label(), asm.label(), asm.label());
        asm.need(PAYLOAD6, self.refuse);
        self.if_own_ipv6(asm, IPV6_SOURCE, own);
        for word in 0..4 {
            asm.load(Size::Word, IPV6_SOURCE + 4 * word);
            asm.unless_equal(0, self.refuse);
        }
        asm.jump(nobody);
        asm.place(own);
        asm.load(Size::Byte, IPV6_NEXT);
        asm.if_equal(ICMP6, icmp);
        asm.if_equal(UDP, udp);
        asm.if_equal(FRAGMENT, fragment);
        asm.if_equal(HOP_BY_HOP, mld);
        HIDING_HEADERS.iter().for_each(|header| asm.if_equal(*header, self.refuse));
        asm.jump(self.pass);
        asm.place(udp);
        asm.need(PAYLOAD6 + 8, self.refuse);
        asm.load(Size::Half, PAYLOAD6);
        asm.if_equal(DHCP6_SERVER, self.refuse);
        asm.jump(self.pass);
        asm.place(fragment);
        self.fragment6(asm);
        asm.place(nobody);
        let solicitation = asm.label();
        asm.load(Size::Byte, IPV6_NEXT);
        asm.if_equal(HOP_BY_HOP, mld);
        asm.unless_equal(ICMP6, self.refuse);
        asm.need(PAYLOAD6 + 8, self.refuse);
        asm.load(Size::Byte, PAYLOAD6);
        asm.if_equal(NEIGHBOUR_SOLICITATION, solicitation);
        asm.unless_equal(ROUTER_SOLICITATION, self.refuse);
        asm.load(Size::Half, IPV6_PAYLOAD_BYTES);
        asm.unless_equal(RS_BYTES, self.refuse);
        asm.jump(self.pass);
        asm.place(mld);
        self.mld(asm);
        asm.place(icmp);
        self.neighbours(asm, solicitation);
    }

    /// Reports of multicast listeners, behind a hop-by-hop header of 8 bytes (RFC 3810, 5).
    fn mld(&self, asm: &mut Assembler) {
        asm.need(PAYLOAD6 + EXTENSION_BYTES + 4, self.refuse);
        asm.load(Size::Half, PAYLOAD6);
        asm.unless_equal(ICMP6 << 8, self.refuse);
        asm.load(Size::Byte, PAYLOAD6 + EXTENSION_BYTES);
        MLD_REPORTS.iter().for_each(|report| asm.if_equal(*report, self.pass));
        asm.jump(self.refuse);
    }

    /// A fragment says in each part which header is in it.
    fn fragment6(&self, asm: &mut Assembler) {
        let (icmp, udp) = (asm.label(), asm.label());
        asm.need(PAYLOAD6 + EXTENSION_BYTES + 8, self.refuse);
        asm.load(Size::Byte, PAYLOAD6);
        FRAGMENTED.iter().for_each(|header| asm.if_equal(*header, self.pass));
        asm.if_equal(UDP, udp);
        asm.if_equal(ICMP6, icmp);
        asm.jump(self.refuse);
        asm.place(udp);
        asm.load(Size::Half, PAYLOAD6 + 2);
        asm.if_any_bit(FRAGMENT6_OFFSET, self.pass);
        asm.load(Size::Half, PAYLOAD6 + EXTENSION_BYTES);
        asm.if_equal(DHCP6_SERVER, self.refuse);
        asm.jump(self.pass);
        asm.place(icmp);
        asm.load(Size::Half, PAYLOAD6 + 2);
        asm.if_any_bit(FRAGMENT6_OFFSET, self.pass);
        asm.load(Size::Byte, PAYLOAD6 + EXTENSION_BYTES);
        ECHO.iter().for_each(|echo| asm.if_equal(*echo, self.pass));
        asm.jump(self.refuse);
    }

    /// ICMPv6 from its own address; and from nobody a solicitation for its own address, which is how it finds out
    /// whether the address is free (RFC 4862, 5.4). Options that could bind an address to another MAC are looked at: at
    /// most one, which is all that RFC 4861 and RFC 7527 have for these messages.
    fn neighbours(&self, asm: &mut Assembler, solicitation_of_nobody: Label) {
        let (options, one_option, advertisement) = (asm.label(), asm.label(), asm.label());
        asm.need(PAYLOAD6 + 4, self.refuse);
        asm.load(Size::Byte, PAYLOAD6);
        for refused in [ROUTER_ADVERTISEMENT, REDIRECT, MLD_QUERY] {
            asm.if_equal(refused, self.refuse);
        }
        asm.if_equal(NEIGHBOUR_SOLICITATION, options);
        asm.if_equal(NEIGHBOUR_ADVERTISEMENT, advertisement);
        asm.unless_equal(ROUTER_SOLICITATION, self.pass);
        asm.load(Size::Half, IPV6_PAYLOAD_BYTES);
        asm.if_equal(RS_BYTES, self.pass);
        asm.unless_equal(RS_BYTES + ND_OPTION_BYTES, self.refuse);
        asm.need(RS_OPTION + ND_OPTION_BYTES, self.refuse);
        asm.load(Size::Half, RS_OPTION);
        asm.unless_equal(0x0101, self.refuse);
        self.own_mac(asm, RS_OPTION + 2);
        asm.jump(self.pass);
        asm.place(solicitation_of_nobody);
        asm.place(advertisement);
        asm.need(PAYLOAD6 + ND_BYTES, self.refuse);
        self.if_own_ipv6(asm, ND_TARGET, options);
        asm.jump(self.refuse);
        asm.place(options);
        asm.need(PAYLOAD6 + ND_BYTES, self.refuse);
        asm.load(Size::Half, IPV6_PAYLOAD_BYTES);
        asm.if_equal(ND_BYTES, self.pass);
        asm.if_equal(ND_BYTES + ND_OPTION_BYTES, one_option);
        asm.jump(self.refuse);
        asm.place(one_option);
        let bound = asm.label();
        asm.need(ND_OPTION + ND_OPTION_BYTES, self.refuse);
        asm.load(Size::Half, ND_OPTION);
        asm.if_equal(NONCE << 8 | 1, self.pass);
        // Link-layer address of the source, of the target; each 8 bytes long.
        asm.if_equal(0x0101, bound);
        asm.unless_equal(0x0201, self.refuse);
        asm.place(bound);
        self.own_mac(asm, ND_OPTION + 2);
        asm.jump(self.pass);
    }
}

#[cfg(test)]
#[path = "program_tests.rs"]
mod tests;
