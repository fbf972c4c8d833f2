//! Cards beside the first: what is sent from a card's address goes out through that card, so that its rate and its counters are its own.
//!
//! ```text
//! first card   default routes in the main table
//! other cards  rule "from ADDRESS lookup TABLE", and in that table the card's network and its default routes
//! ```
//! All cards of a machine are on one link. Without the rules answers would leave by the first card, and without `arp_ignore` each card
//! would answer for the addresses of all (kernel: Documentation/networking/ip-sysctl.rst). Rules are known by their priority; those that
//! are not wanted any more are removed. A card's routes go with it.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::Path;

use super::netlink::{Body, Netlink, PLAIN, PUT, RTM_NEWROUTE, family, find_attribute, to_address};
use super::{Card, Cidr, RTA_DST, RTA_OIF, RTN_UNICAST, RTPROT_STATIC, route_body, to_u32};
use crate::failure::Failure;

const RTM_NEWRULE: u16 = 32;
const RTM_DELRULE: u16 = 33;
const RTM_GETRULE: u16 = 34;
/// struct fib_rule_hdr, linux/fib_rules.h.
const RULE_FIXED: usize = 12;
const FRA_SRC: u16 = 2;
const FRA_PRIORITY: u16 = 6;
const FRA_TABLE: u16 = 15;
const FR_ACT_TO_TBL: u8 = 1;
const RTA_PREFSRC: u16 = 7;
const RTA_TABLE: u16 = 15;
const RT_SCOPE_LINK: u8 = 253;
/// Of our rules; before the main table's 32766, and of nobody else's by agreement.
const PRIORITY: u32 = 20_077;
/// A card's table has this number and that of the card on top.
const FIRST_TABLE: u32 = 20_077_000;

/// What is sent from this address is looked up in this table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rule {
    from: IpAddr,
    table: u32,
}

/// Gives every card after the first its own way out, and takes back what is not wanted any more.
///
/// # Errors
/// `failed` with what the kernel says.
pub fn separate(netlink: &mut Netlink, cards: &[(Card, u32)]) -> Result<(), Failure> {
    route_apart(netlink, cards)?;
    if cards.len() < 2 {
        return Ok(());
    }
    for (_, index) in cards {
        answer_for_own(Path::new("/sys/class/net"), Path::new("/proc/sys/net/ipv4/conf"), *index)
            .map_err(|error| Failure::failed(format!("cannot keep cards' addresses apart: {error}")))?;
    }
    Ok(())
}

fn route_apart(netlink: &mut Netlink, cards: &[(Card, u32)]) -> Result<(), Failure> {
    let mut wanted = Vec::new();
    for (card, index) in cards.iter().skip(1) {
        let table = FIRST_TABLE + index;
        let failed = |what: &str| {
            let what = format!("cannot {what} in table {table}");
            move |error: io::Error| Failure::failed(format!("{what}: {error}"))
        };
        for cidr in &card.addresses {
            let body = network_body(*cidr, *index, table);
            netlink.change(RTM_NEWROUTE, PUT, &body).map_err(failed("route its network"))?;
            wanted.push(Rule { from: cidr.address, table });
        }
        for gateway in &card.gateways {
            let body = in_table(route_body(*gateway, *index), table);
            netlink.change(RTM_NEWROUTE, PUT, &body).map_err(failed("route"))?;
        }
    }
    for family in [libc::AF_INET, libc::AF_INET6] {
        let family = family as u8;
        let wanted: Vec<_> =
            wanted.iter().filter(|rule| super::family(rule.from) == family).copied().collect();
        match set_rules(netlink, family, &wanted) {
            // A kernel without such rules has none that could be too many.
            Err(_) if wanted.is_empty() => {}
            Err(error) => return Err(Failure::failed(format!("cannot set rules for routing: {error}"))),
            Ok(()) => {}
        }
    }
    Ok(())
}

fn set_rules(netlink: &mut Netlink, family: u8, wanted: &[Rule]) -> io::Result<()> {
    let mut header = [0; RULE_FIXED];
    header[0] = family;
    let messages = netlink.dump(RTM_GETRULE, &Body::new(&header))?;
    let present: Vec<_> = messages.iter().filter_map(|message| own_rule(message)).collect();
    for rule in present.iter().filter(|rule| !wanted.contains(rule)) {
        netlink.change(RTM_DELRULE, PLAIN, &rule_body(*rule))?;
    }
    for rule in wanted.iter().filter(|rule| !present.contains(rule)) {
        netlink.change(RTM_NEWRULE, PUT, &rule_body(*rule))?;
    }
    Ok(())
}

fn own_rule(message: &[u8]) -> Option<Rule> {
    let attribute = |kind| find_attribute(message, RULE_FIXED, kind);
    if attribute(FRA_PRIORITY).and_then(to_u32) != Some(PRIORITY) {
        return None;
    }
    Some(Rule { from: to_address(attribute(FRA_SRC)?)?, table: to_u32(attribute(FRA_TABLE)?)? })
}

fn rule_body(rule: Rule) -> Body {
    let mut fixed = [0; RULE_FIXED];
    fixed[0] = family(rule.from);
    fixed[2] = if rule.from.is_ipv4() { 32 } else { 128 };
    fixed[7] = FR_ACT_TO_TBL;
    Body::new(&fixed)
        .address(FRA_SRC, rule.from)
        .attribute(FRA_PRIORITY, &PRIORITY.to_ne_bytes())
        .attribute(FRA_TABLE, &rule.table.to_ne_bytes())
}

/// A route's body for this table instead of the one in its header.
fn in_table(body: Body, table: u32) -> Body {
    body.attribute(RTA_TABLE, &table.to_ne_bytes())
}

/// The network of an address is behind its card.
fn network_body(cidr: Cidr, index: u32, table: u32) -> Body {
    let mut fixed = [0; super::ROUTE_FIXED];
    fixed[0] = family(cidr.address);
    fixed[1] = cidr.prefix;
    fixed[5] = RTPROT_STATIC;
    fixed[7] = RTN_UNICAST;
    let mut body = Body::new(&fixed);
    if cidr.address.is_ipv4() {
        // IPv6 has no scopes of routes.
        fixed[6] = RT_SCOPE_LINK;
        body = Body::new(&fixed).address(RTA_PREFSRC, cidr.address);
    }
    in_table(body.address(RTA_DST, cidr.network()).attribute(RTA_OIF, &index.to_ne_bytes()), table)
}

/// A card answers for its own addresses only, and asks with them.
fn answer_for_own(cards: &Path, settings: &Path, index: u32) -> io::Result<()> {
    for card in fs::read_dir(cards)?.flatten() {
        let found = fs::read_to_string(card.path().join("ifindex")).unwrap_or_default();
        if found.trim() == index.to_string() {
            let folder = settings.join(card.file_name());
            fs::write(folder.join("arp_ignore"), "1")?;
            fs::write(folder.join("arp_announce"), "2")?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_rules_are_recognised_and_others_left_alone() {
        for from in ["192.0.2.7", "2001:db8::7"] {
            let rule = Rule { from: from.parse().unwrap(), table: FIRST_TABLE + 3 };
            let message = rule_body(rule).into_bytes();
            assert_eq!(own_rule(&message), Some(rule));
            for length in 0..message.len() {
                assert_eq!(own_rule(&message[..length]), None, "cut at {length}");
            }
        }
        let other = Body::new(&[0; RULE_FIXED]).attribute(FRA_PRIORITY, &32_766_u32.to_ne_bytes());
        assert_eq!(own_rule(&other.into_bytes()), None);
    }

    #[test]
    fn a_table_has_the_network_and_the_card() {
        let cidr = Cidr::parse("10.77.1.44/16").unwrap();
        let body = network_body(cidr, 5, FIRST_TABLE + 5).into_bytes();
        let find = |kind| find_attribute(&body, super::super::ROUTE_FIXED, kind);
        assert_eq!(body[1], 16);
        assert_eq!(find(RTA_DST).and_then(to_address), "10.77.0.0".parse().ok());
        assert_eq!(find(RTA_OIF).and_then(to_u32), Some(5));
        assert_eq!(find(RTA_TABLE).and_then(to_u32), Some(FIRST_TABLE + 5));
        let networks =
            [("2001:db8::7/64", "2001:db8::"), ("192.0.2.7/32", "192.0.2.7"), ("10.1.2.3/0", "0.0.0.0")];
        for (text, network) in networks {
            assert_eq!(Cidr::parse(text).unwrap().network(), network.parse::<IpAddr>().unwrap());
        }
    }

    fn ip(line: &str) -> Option<String> {
        let output = std::process::Command::new("ip").args(line.split(' ')).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn card(last: u8) -> Card {
        let cidr = |text: String| Cidr::parse(&text).unwrap();
        Card {
            mac: [2, 0, 0, 0, 0, last],
            addresses: vec![cidr(format!("10.77.0.{last}/16"))],
            gateways: vec!["10.77.0.1".parse().unwrap()],
            mtu: None,
        }
    }

    #[test]
    fn the_kernel_takes_it_twice_and_takes_it_back() {
        if let Err(error) = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET) {
            println!("skipped: no network namespace of its own: {error}");
            return;
        }
        let made = ["a", "b"].iter().all(|name| ip(&format!("link add card-{name} type ifb")).is_some());
        if !made {
            println!("skipped: ip makes no links here");
            return;
        }
        let index = |name: &str| nix::net::if_::if_nametoindex(name).unwrap();
        let mut netlink = Netlink::new().unwrap();
        let (first, second) = ((card(2), index("card-a")), (card(3), index("card-b")));
        let table = FIRST_TABLE + second.1;
        let both = [first, second];
        for _ in 0..2 {
            for (position, (card, index)) in both.iter().enumerate() {
                let gateways = if position == 0 { card.gateways.as_slice() } else { &[] };
                super::super::configure(&mut netlink, card, gateways, *index).unwrap();
            }
            route_apart(&mut netlink, &both).unwrap();
            let rules = ip("rule").unwrap();
            assert_eq!(rules.matches(&format!("from 10.77.0.3 lookup {table}")).count(), 1, "{rules}");
            let main = ip("route show default").unwrap();
            assert!(main.contains("card-a") && !main.contains("card-b"), "{main}");
            let other = ip("route get 192.0.2.1 from 10.77.0.3").unwrap();
            assert!(other.contains("via 10.77.0.1 dev card-b"), "{other}");
        }
        // The first goes, and the other is the first.
        ip("link del card-a").unwrap();
        let [_, (card, index)] = both;
        super::super::configure(&mut netlink, &card, &card.gateways, index).unwrap();
        route_apart(&mut netlink, &[(card, index)]).unwrap();
        let rules = ip("rule").unwrap();
        assert!(!rules.contains("10.77.0.3"), "{rules}");
        assert!(ip("route show default").unwrap().contains("card-b"));
    }

    #[test]
    fn a_card_answers_for_its_own_addresses() {
        let folder = tempfile::tempdir().unwrap();
        let (cards, settings) = (folder.path().join("net"), folder.path().join("conf"));
        for (name, index) in [("eth0", "2\n"), ("eth1", "3\n")] {
            fs::create_dir_all(cards.join(name)).unwrap();
            fs::create_dir_all(settings.join(name)).unwrap();
            fs::write(cards.join(name).join("ifindex"), index).unwrap();
        }
        answer_for_own(&cards, &settings, 3).unwrap();
        assert_eq!(fs::read_to_string(settings.join("eth1/arp_ignore")).unwrap(), "1");
        assert_eq!(fs::read_to_string(settings.join("eth1/arp_announce")).unwrap(), "2");
        assert!(!settings.join("eth0/arp_ignore").exists());
    }
}
