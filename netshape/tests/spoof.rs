//! Forged sources on a real kernel: what a guest sends with another's address does not arrive, what is its own does.

mod common;

use std::io::Write;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use common::*;
use lathe_netshape::{
    AntiSpoof, BitRate, Error, IfName, Mac, Network, Outcome, Patch, Prefix, RatePatch, Shaping, mac_for,
};

type Failed = Box<dyn std::error::Error>;

const OWN4: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 5);
const OTHER4: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 6);
const HOST4: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
const OWN6: Ipv6Addr = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 5);
const OTHER6: Ipv6Addr = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 6);
const HOST6: Ipv6Addr = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 1);

fn prefixes(texts: &[&str]) -> Result<Vec<Prefix>, Error> {
    texts.iter().map(|text| text.parse()).collect()
}

/// Frames by name: what is honest of a guest with [`OWN4`] and [`OWN6`], and what is forged.
struct Frames {
    honest: Vec<(&'static str, Vec<u8>)>,
    forged: Vec<(&'static str, Vec<u8>)>,
}

fn frames(a: Mac, b: Mac) -> Result<Frames, Failed> {
    let v4 = |from, to, ports| Ok::<_, Failed>(ethernet(b, a, IPV4, &ipv4(from, to, ports, b"data")?));
    let v6 =
        |from, next, body: &[u8]| Ok::<_, Failed>(ethernet(b, a, IPV6, &ipv6(from, OTHER6, next, body)?));
    let udp = [1, 2, 3, 4, 0, 12, 0, 0, 1, 2, 3, 4];
    let broadcast = Mac([0xff; 6]);
    let mut tagged = v4(OWN4, OTHER4, (1000, 2000))?;
    tagged.splice(12..12, [0x81, 0x00, 0x00, 0x07]);
    let honest = vec![
        ("IPv4", v4(OWN4, OTHER4, (1000, 2000))?),
        ("IPv6", v6(OWN6, 17, &udp)?),
        ("ARP", ethernet(broadcast, a, ARP, &arp(1, a, OWN4, OTHER4))),
        ("ARP answer", ethernet(b, a, ARP, &arp(2, a, OWN4, OTHER4))),
        ("ARP probe", ethernet(broadcast, a, ARP, &arp(1, a, Ipv4Addr::UNSPECIFIED, OWN4))),
        (
            "DHCP",
            ethernet(
                broadcast,
                a,
                IPV4,
                &ipv4(Ipv4Addr::UNSPECIFIED, Ipv4Addr::BROADCAST, (68, 67), b"discover")?,
            ),
        ),
        ("solicitation", v6(OWN6, 58, &neighbour(135, OTHER6, 1, a))?),
        ("advertisement", v6(OWN6, 58, &neighbour(136, OWN6, 2, a))?),
        ("duplicate detection", v6(Ipv6Addr::UNSPECIFIED, 58, &neighbour(135, OWN6, 14, a))?),
    ];
    let forged = vec![
        (
            "another's MAC",
            ethernet(b, mac_for(b"another"), IPV4, &ipv4(OWN4, OTHER4, (1000, 2000), b"data")?),
        ),
        ("another's IPv4", v4(OTHER4, OWN4, (1000, 2000))?),
        ("the host's IPv4", v4(HOST4, OTHER4, (1000, 2000))?),
        ("a DHCP server", v4(OWN4, OTHER4, (67, 68))?),
        ("a tag", tagged),
        ("another's IPv6", v6(OTHER6, 17, &udp)?),
        ("another link-local", v6("fe80::1".parse()?, 17, &udp)?),
        ("the host's ARP", ethernet(b, a, ARP, &arp(2, a, HOST4, OTHER4))),
        ("another's ARP", ethernet(b, a, ARP, &arp(1, a, OTHER4, HOST4))),
        ("another's MAC in ARP", ethernet(b, a, ARP, &arp(2, mac_for(b"another"), OWN4, OTHER4))),
        ("the host's advertisement", v6(OWN6, 58, &neighbour(136, HOST6, 2, a))?),
        ("another's MAC in an advertisement", v6(OWN6, 58, &neighbour(136, OWN6, 2, mac_for(b"another")))?),
        ("another's duplicate detection", v6(Ipv6Addr::UNSPECIFIED, 58, &neighbour(135, OTHER6, 14, a))?),
        ("a router", v6(OWN6, 58, &[134, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])?),
        ("a hidden router", v6(OWN6, 60, &[58, 0, 1, 4, 0, 0, 0, 0, 134, 0, 0, 0, 0, 0, 0, 0])?),
        ("another protocol", ethernet(b, a, 0x88cc, &[0; 46])),
    ];
    Ok(Frames { honest, forged })
}

/// Sends frames from `a` and says which of them reach `b`.
fn arriving<'n>(
    a: &mut Guest,
    b: &mut Guest,
    frames: &[(&'n str, Vec<u8>)],
    fence: &[u8],
) -> Result<Vec<&'n str>, Failed> {
    for (_, frame) in frames {
        a.send(frame)?;
    }
    a.send(fence)?;
    let got = b.receive_until(fence)?;
    Ok(frames.iter().filter(|(_, frame)| got.contains(frame)).map(|(name, _)| *name).collect())
}

fn names<'n>(frames: &[(&'n str, Vec<u8>)]) -> Vec<&'n str> {
    frames.iter().map(|(name, _)| *name).collect()
}

#[test]
fn forged_sources_do_not_arrive_and_honest_ones_do() -> Tested {
    in_namespace(async |nl| {
        let (mut a, mut b) = two_guests(&nl).await?;
        let all = frames(a.mac, b.mac)?;
        let fence =
            |n: u16| Ok::<_, Failed>(ethernet(b.mac, a.mac, IPV4, &ipv4(OWN4, OTHER4, (9, n), b"last")?));
        let fences = [fence(1)?, fence(2)?, fence(3)?, fence(4)?];
        // Without protection they do arrive, but for another's MAC, which the bridge refuses.
        let before = arriving(&mut a, &mut b, &all.forged, &fences[0])?;
        println!("unprotected: {before:?}");
        assert!(before.len() + 2 >= all.forged.len() && before.contains(&"the host's ARP"), "{before:?}");

        let own = prefixes(&["10.77.0.5/32", "fd77::5/128"])?;
        assert_eq!(AntiSpoof::ensure(&nl, &a.tap, a.mac, &own).await?, Outcome::Changed);
        assert_eq!(AntiSpoof::ensure(&nl, &a.tap, a.mac, &own).await?, Outcome::Unchanged);
        assert_eq!(arriving(&mut a, &mut b, &all.honest, &fences[1])?, names(&all.honest));
        assert_eq!(arriving(&mut a, &mut b, &all.forged, &fences[2])?, Vec::<&str>::new());
        let state = AntiSpoof::read(&nl, &a.tap).await?;
        assert!(state.active && u32::try_from(all.forged.len())? == state.refused, "{state:?}");
        // The bridge has not learned from forged frames that the host is elsewhere.
        if let Some(shown) = output("bridge", &["fdb", "show", "dev", a.tap.as_str()])? {
            assert!(!shown.contains(&mac_for(b"another").to_string()), "{shown}");
        }

        assert_eq!(AntiSpoof::remove(&nl, &a.tap).await?, Outcome::Changed);
        assert_eq!(AntiSpoof::remove(&nl, &a.tap).await?, Outcome::Unchanged);
        assert!(!AntiSpoof::read(&nl, &a.tap).await?.active);
        assert_eq!(arriving(&mut a, &mut b, &all.forged, &fences[3])?, before);
        Ok(())
    })
}

/// Sends the two frames in turn until told to stop; gives how many pairs.
fn flood(mut from: Guest, frames: [Vec<u8>; 2], stop: Arc<AtomicBool>) -> JoinHandle<std::io::Result<u64>> {
    std::thread::spawn(move || {
        let mut pairs = 0;
        while !stop.load(Ordering::Relaxed) {
            for frame in &frames {
                from.send(frame)?;
            }
            pairs += 1;
        }
        Ok(pairs)
    })
}

/// Counts the two frames until told to stop and nothing more comes.
fn count(
    mut to: Guest,
    frames: [Vec<u8>; 2],
    stop: Arc<AtomicBool>,
) -> JoinHandle<std::io::Result<[u64; 2]>> {
    std::thread::spawn(move || {
        let mut counts = [0; 2];
        loop {
            let stopping = stop.load(Ordering::Relaxed);
            let got = to.receive()?;
            if stopping && got.is_empty() {
                return Ok(counts);
            }
            for (count, frame) in counts.iter_mut().zip(&frames) {
                *count += got.iter().filter(|one| *one == frame).map(|_| 1).sum::<u64>();
            }
            std::thread::yield_now();
        }
    })
}

#[test]
fn addresses_change_without_a_gap() -> Tested {
    in_namespace(async |nl| {
        let (a, b) = two_guests(&nl).await?;
        let udp = |from| Ok::<_, Failed>(ethernet(b.mac, a.mac, IPV4, &ipv4(from, OTHER4, (7, 7), b"data")?));
        let frames = [udp(OWN4)?, udp(HOST4)?];
        let (tap, to, mac) = (a.tap.clone(), b.tap.clone(), a.mac);
        let sets =
            [prefixes(&["10.77.0.5/32", "10.78.0.0/16"])?, prefixes(&["fd77::5/128", "10.77.0.4/31"])?];
        AntiSpoof::ensure(&nl, &tap, mac, &sets[1]).await?;
        let before = Network::stats(&nl, &to).await?.to_guest_drops;
        let (sending, receiving) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let counting = count(b, frames.clone(), receiving.clone());
        let flooding = flood(a, frames, sending.clone());
        for round in 0..100 {
            assert_eq!(AntiSpoof::ensure(&nl, &tap, mac, &sets[round % 2]).await?, Outcome::Changed);
        }
        sending.store(true, Ordering::Relaxed);
        let pairs = flooding.join().map_err(|_| "the sender")??;
        receiving.store(true, Ordering::Relaxed);
        let [honest, forged] = counting.join().map_err(|_| "the receiver")??;
        let dropped = Network::stats(&nl, &to).await?.to_guest_drops - before;
        let refused = u64::from(AntiSpoof::read(&nl, &tap).await?.refused);
        println!(
            "{pairs} pairs: {honest} honest arrived and {dropped} found no room, {refused} forged were refused"
        );
        assert_eq!((forged, refused), (0, pairs));
        // What the host itself multicasts may find no room either.
        assert!(honest <= pairs && honest + dropped >= pairs);
        Ok(())
    })
}

#[test]
fn an_address_that_is_taken_away_is_forged() -> Tested {
    in_namespace(async |nl| {
        let (mut a, mut b) = two_guests(&nl).await?;
        let from =
            |addr, n| Ok::<_, Failed>(ethernet(b.mac, a.mac, IPV4, &ipv4(addr, HOST4, (7, n), b"data")?));
        let fence = |n: u8| {
            ethernet(b.mac, a.mac, ARP, &arp(1, a.mac, Ipv4Addr::UNSPECIFIED, Ipv4Addr::new(10, 77, 9, n)))
        };
        let (old, new) = (("old", from(OWN4, 1)?), ("new", from(OTHER4, 2)?));
        let (both, fences) = ([old, new], [fence(1), fence(2), fence(3)]);
        AntiSpoof::ensure(&nl, &a.tap, a.mac, &prefixes(&["10.77.0.5/32"])?).await?;
        assert_eq!(arriving(&mut a, &mut b, &both, &fences[0])?, ["old"]);
        AntiSpoof::ensure(&nl, &a.tap, a.mac, &prefixes(&["10.77.0.6/32"])?).await?;
        assert_eq!(arriving(&mut a, &mut b, &both, &fences[1])?, ["new"]);
        AntiSpoof::ensure(&nl, &a.tap, a.mac, &prefixes(&["10.77.0.6/32", "10.77.0.4/31"])?).await?;
        assert_eq!(arriving(&mut a, &mut b, &both, &fences[2])?, ["old", "new"]);
        let many: Vec<Prefix> =
            (0..65).map(|n| format!("10.1.1.{n}/32").parse()).collect::<Result<_, _>>()?;
        let refused = AntiSpoof::ensure(&nl, &a.tap, a.mac, &many).await;
        assert!(matches!(refused, Err(Error::TooManyAddresses { most: 64, .. })), "{refused:?}");
        let nobody = AntiSpoof::ensure(&nl, &IfName::tap_of("nobody"), a.mac, &[]).await;
        assert!(matches!(nobody, Err(Error::NoLink(_))), "{nobody:?}");
        Ok(())
    })
}

/// A large packet of TCP that the kernel cuts up; the guest says how many bytes of it are headers, and may lie, so that
/// they lie in another piece of memory.
#[test]
fn large_packets_are_looked_at_too() -> Tested {
    const PAYLOAD_BYTES: u16 = 40 * 1448;
    in_namespace(async |nl| {
        let (mut a, mut b) = two_guests(&nl).await?;
        AntiSpoof::ensure(&nl, &a.tap, a.mac, &prefixes(&["10.77.0.5/32"])?).await?;
        let (to, mac) = (b.mac, a.mac);
        let tcp = |from: Ipv4Addr| {
            let mut packet = ipv4(from, OTHER4, (0, 0), &vec![0; 12 + usize::from(PAYLOAD_BYTES)])?;
            // UDP becomes TCP: protocol, sum of the header (11 less, so 11 more), ports, offset and flags.
            packet[9] = 6;
            let sum = u16::from_be_bytes([packet[10], packet[11]]);
            let (sum, carry) = sum.overflowing_add(11);
            packet[10..12].copy_from_slice(&(sum + u16::from(carry)).to_be_bytes());
            packet[20..40]
                .copy_from_slice(&[16, 0, 16, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0]);
            Ok::<_, Failed>(ethernet(to, mac, IPV4, &packet))
        };
        let segments_of = |frames: &[Vec<u8>], from: Ipv4Addr| {
            frames
                .iter()
                .filter(|f| f.get(23) == Some(&6) && f.get(26..30) == Some(&from.octets()[..]))
                .count()
        };
        for (number, header_bytes) in [(1, 54_u16), (2, 14), (3, 20)] {
            for from in [OTHER4, OWN4] {
                // virtio 1.2, 5.1.6: sum needed, TCPv4, lengths of headers and segments, where the sum is and goes.
                let mut bytes = vec![1, 1];
                for field in [header_bytes, 1448, 34, 16, 0] {
                    bytes.extend(field.to_le_bytes());
                }
                bytes.extend(tcp(from)?);
                a.queue.write_all(&bytes)?;
            }
            let fence = ethernet(b.mac, a.mac, IPV4, &ipv4(OWN4, OTHER4, (9, number), b"last")?);
            a.send(&fence)?;
            let got = b.receive_until(&fence)?;
            let counts = (segments_of(&got, OWN4), segments_of(&got, OTHER4));
            assert_eq!(counts, (40, 0), "with {header_bytes} bytes of headers");
        }
        assert_eq!(AntiSpoof::read(&nl, &a.tap).await?.refused, 3);
        Ok(())
    })
}

/// What a dead agent, or an earlier one, left on the tap.
#[test]
fn rates_and_protection_leave_each_other_alone() -> Tested {
    in_namespace(async |nl| {
        let (mut a, mut b) = two_guests(&nl).await?;
        let all = frames(a.mac, b.mac)?;
        let fence = |n| Ok::<_, Failed>(ethernet(b.mac, a.mac, IPV4, &ipv4(OWN4, OTHER4, (9, n), b"last")?));
        let fences = [fence(1)?, fence(2)?, fence(3)?, fence(4)?];
        let own = prefixes(&["10.77.0.5/32", "fd77::5/128"])?;
        let rate = Some(BitRate(80_000_000));
        let limit = RatePatch { from_guest: Patch::Set(BitRate(80_000_000)), ..RatePatch::default() };
        AntiSpoof::ensure(&nl, &a.tap, a.mac, &own).await?;
        Shaping::apply(&nl, &a.tap, &limit).await?;
        assert_eq!(arriving(&mut a, &mut b, &all.forged, &fences[0])?, Vec::<&str>::new());
        assert_eq!(arriving(&mut a, &mut b, &all.honest, &fences[1])?, names(&all.honest));
        let state = Shaping::read(&nl, &a.tap).await?.from_guest;
        assert!(state.rate == rate && state.packets > 8, "{state:?}");
        // A program of a dead agent, for other addresses.
        AntiSpoof::ensure(&nl, &a.tap, a.mac, &[]).await?;
        assert_eq!(AntiSpoof::ensure(&nl, &a.tap, a.mac, &own).await?, Outcome::Changed);
        AntiSpoof::remove(&nl, &a.tap).await?;
        assert_eq!(Shaping::read(&nl, &a.tap).await?.from_guest.rate, rate);

        // An earlier agent had the redirect where the protection is now, and an administrator has a filter of his own.
        let (ifb, tap) = (IfName::ifb_of(&a.tap)?, a.tap.to_string());
        let filter =
            ["filter", "add", "dev", &tap, "ingress", "protocol", "all", "u32", "match", "u32", "0", "0"];
        let redirect = ["prio", "1", "action", "mirred", "egress", "redirect", "dev", ifb.as_str()];
        let tc = |tail: &[&str]| output("tc", &[&filter[..5], &tail[..2], &filter[5..], &tail[2..]].concat());
        if output("tc", &["filter", "del", "dev", &tap, "ingress"])?.is_none() {
            return Ok(());
        }
        tc(&redirect)?;
        tc(&["prio", "77", "flowid", "1:1"])?;
        assert_eq!(Shaping::read(&nl, &a.tap).await?.from_guest.rate, rate);
        assert_eq!(AntiSpoof::ensure(&nl, &a.tap, a.mac, &own).await?, Outcome::Changed);
        assert_eq!(Shaping::apply(&nl, &a.tap, &limit).await?.from_guest.rate, rate);
        assert_eq!(arriving(&mut a, &mut b, &all.forged, &fences[2])?, Vec::<&str>::new());
        let sent = Shaping::read(&nl, &a.tap).await?.from_guest.packets;
        assert_eq!(arriving(&mut a, &mut b, &all.honest, &fences[3])?, names(&all.honest));
        assert!(Shaping::read(&nl, &a.tap).await?.from_guest.packets > sent, "the rate is in force");
        let shown = output("tc", &["filter", "show", "dev", &tap, "ingress"])?.unwrap_or_default();
        assert!(shown.contains("pref 77") && shown.matches("mirred").count() == 1, "{shown}");
        Ok(())
    })
}

/// Prints what the program costs; asserts nothing of it. The best of many short rounds, which others disturb least.
#[test]
fn the_cost_is_told() -> Tested {
    const ROUNDS: u32 = 60;
    const FRAMES: u32 = 500;
    in_namespace(async |nl| {
        let (mut a, mut b) = two_guests(&nl).await?;
        let (tap, mac) = (a.tap.clone(), a.mac);
        let frame = ethernet(b.mac, a.mac, IPV4, &ipv4(OWN4, OTHER4, (7, 7), &[0; 18])?);
        let mut measure = |what: &str| -> Tested {
            let mut best = f64::INFINITY;
            for _ in 0..ROUNDS {
                b.receive()?;
                let start = Instant::now();
                for _ in 0..FRAMES {
                    a.send(&frame)?;
                }
                best = best.min(start.elapsed().as_secs_f64() / f64::from(FRAMES));
            }
            println!("{what}: {:.0} ns per frame", best * 1e9);
            Ok(())
        };
        measure("no protection")?;
        AntiSpoof::ensure(&nl, &tap, mac, &prefixes(&["10.77.0.5/32", "fd77::5/128"])?).await?;
        measure("two addresses")?;
        let mut many: Vec<Prefix> =
            (0..63).map(|n| format!("10.1.1.{n}/32").parse()).collect::<Result<_, _>>()?;
        AntiSpoof::ensure(&nl, &tap, mac, &many).await?;
        measure("refused, after 63 addresses")?;
        AntiSpoof::ensure(&nl, &tap, mac, &[]).await?;
        measure("refused at once")?;
        many.extend(prefixes(&["10.77.0.5/32"])?);
        AntiSpoof::ensure(&nl, &tap, mac, &many).await?;
        measure("the last of 64 addresses")?;
        AntiSpoof::remove(&nl, &tap).await?;
        measure("no protection")?;
        let fast = RatePatch { from_guest: Patch::Set(BitRate(100_000_000_000)), ..RatePatch::default() };
        Shaping::apply(&nl, &tap, &fast).await?;
        measure("no protection, through the ifb")?;
        Ok(())
    })
}
