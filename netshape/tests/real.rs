//! Bridge, taps, rates and NAT on a real kernel: each test in a network namespace of its own, which only root gets.
//! Prints why it is skipped otherwise. Two taps stand for two guests; this file is their monitor, and moves frames by
//! reading and writing the queues.

use std::error::Error;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::process::Command;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use lathe_netshape::{
    BitRate, Bridge, HostGuard, IfName, LinkKind, Mac, Nat, Netlink, Network, Outcome, Patch, PortFd,
    PortSpec, Prefix, Proto, Publish, RatePatch, RulesWatch, Shaping, Tap, TapError, mac_for,
};

mod common;

use common::{HEADER_BYTES, Tested, bridge, in_namespace};

/// A full Ethernet frame.
const FRAME_BYTES: usize = 1514;
/// Of local experimental use (IEEE 802): nobody answers it.
const ETHERTYPE: [u8; 2] = [0x88, 0xb5];

/// A measurement takes the machine's time, and a busy machine takes it from the measurement, so these tests assert what
/// holds on every machine: never more than asked plus a burst (5 %), in all attempts; and in one of so many at least a
/// quarter, which no wrong unit gives. That it is *exactly* what was asked is measured: `tests/run bench exactness`,
/// or these tests on a quiet machine with `LATHE_EXACT=1`, which asks for 95 %.
const ATTEMPTS: usize = 5;

/// Measures until enough is delivered; `measured` gives bit/s, none of them above the truth.
async fn expect_rate(
    rate: BitRate,
    mut measured: impl AsyncFnMut() -> Result<Vec<f64>, Box<dyn Error>>,
) -> Tested {
    let least = if std::env::var_os("LATHE_EXACT").is_some() { 0.95 } else { 0.25 };
    for _ in 0..ATTEMPTS {
        let shares: Vec<f64> = measured().await?.iter().map(|got| got / rate.0 as f64).collect();
        assert!(shares.iter().all(|share| *share <= 1.05), "asked {rate:?}, delivered {shares:?} of it");
        if shares.iter().all(|share| *share >= least) {
            return Ok(());
        }
    }
    Err(format!("less than {least} of {rate:?} in {ATTEMPTS} attempts").into())
}

/// Measurements run one after the other.
static MEASURING: std::sync::Mutex<()> = std::sync::Mutex::new(());

fn alone() -> std::sync::MutexGuard<'static, ()> {
    MEASURING.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// A guest: its tap's queue and its address.
struct Guest {
    tap: IfName,
    mac: Mac,
    queue: File,
}

impl Guest {
    fn share(&self) -> std::io::Result<Guest> {
        Ok(Guest { tap: self.tap.clone(), mac: self.mac, queue: self.queue.try_clone()? })
    }

    /// A frame to `to` that carries a number.
    fn frame(&self, to: Mac, number: u32) -> Vec<u8> {
        let mut frame = vec![0; HEADER_BYTES];
        frame.extend(to.0);
        frame.extend(self.mac.0);
        frame.extend(ETHERTYPE);
        frame.extend(number.to_be_bytes());
        frame.resize(HEADER_BYTES + FRAME_BYTES, 0);
        frame
    }

    /// Bytes of all frames that wait in the queue.
    fn receive_bytes(&mut self) -> Result<usize, std::io::Error> {
        let (mut sum, mut buffer) = (0, vec![0; 70_000]);
        loop {
            match self.queue.read(&mut buffer) {
                Ok(bytes) => sum += bytes.saturating_sub(HEADER_BYTES),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(sum),
                Err(error) => return Err(error),
            }
        }
    }

    /// Numbers of the test's own frames that wait in the queue.
    fn receive(&mut self) -> Result<Vec<u32>, std::io::Error> {
        let mut numbers = Vec::new();
        let mut buffer = vec![0; 70_000];
        loop {
            match self.queue.read(&mut buffer) {
                Ok(bytes)
                    if bytes >= HEADER_BYTES + 18
                        && buffer[HEADER_BYTES + 12..HEADER_BYTES + 14] == ETHERTYPE =>
                {
                    let number = &buffer[HEADER_BYTES + 14..HEADER_BYTES + 18];
                    numbers.push(number.iter().fold(0, |n, byte| n << 8 | u32::from(*byte)));
                }
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(numbers),
                Err(error) => return Err(error),
            }
        }
    }
}

async fn guest(nl: &Netlink, name: &str) -> Result<Guest, Box<dyn Error>> {
    let (tap, mac) = (IfName::tap_of(name), mac_for(name.as_bytes()));
    let bridge = bridge()?;
    let spec = PortSpec {
        tap: &tap,
        bridge: &bridge,
        owner: None,
        mtu: None,
        guest_mac: Some(mac),
        isolated: false,
    };
    match Network::ensure(nl, &spec).await?.fd {
        PortFd::Open(fd) => Ok(Guest { mac, queue: File::from(fd), tap }),
        PortFd::HeldElsewhere => Err("the queue of a new tap is held".into()),
    }
}

async fn two_guests(nl: &Netlink) -> Result<(Guest, Guest), Box<dyn Error>> {
    let address: Prefix = "10.77.0.1/16".parse()?;
    Bridge::ensure(nl, &bridge()?, &[address], None).await?;
    Ok((guest(nl, "a").await?, guest(nl, "b").await?))
}

#[test]
fn a_bridge_is_found_again_and_has_exactly_its_addresses() -> Tested {
    in_namespace(async |nl| {
        let name = bridge()?;
        let (v4, v6): (Prefix, Prefix) = ("10.77.0.1/16".parse()?, "fd77::1/64".parse()?);
        let index = Bridge::ensure(&nl, &name, &[v4, v6], Some(1400)).await?;
        assert_eq!(Bridge::ensure(&nl, &name, &[v4, v6], Some(1400)).await?, index);
        let other: Prefix = "10.78.0.1/16".parse()?;
        Bridge::ensure(&nl, &name, &[other], None).await?;
        let shown = Command::new("ip").args(["-br", "addr", "show", "lathe0"]).output();
        if let Ok(shown) = shown {
            let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
            assert!(
                shown.contains("10.78.0.1/16") && !shown.contains("10.77.0.1") && !shown.contains("fd77"),
                "{shown}"
            );
        }
        let lo = Bridge::ensure(&nl, &IfName::new("lo")?, &[], None).await;
        assert!(matches!(lo, Err(lathe_netshape::Error::Foreign { .. })), "{lo:?}");
        assert_eq!(Bridge::remove(&nl, &name).await?, Outcome::Changed);
        assert_eq!(Bridge::remove(&nl, &name).await?, Outcome::Unchanged);
        Ok(())
    })
}

#[test]
fn a_tap_outlives_its_monitor_and_is_removed_with_its_machine() -> Tested {
    in_namespace(async |nl| {
        let (a, b) = two_guests(&nl).await?;
        let bridge = bridge()?;
        let spec = PortSpec {
            tap: &a.tap,
            bridge: &bridge,
            owner: None,
            mtu: None,
            guest_mac: Some(a.mac),
            isolated: true,
        };
        // The agent starts again while the monitor holds the queue.
        assert!(matches!(Network::ensure(&nl, &spec).await?.fd, PortFd::HeldElsewhere));
        assert!(matches!(Tap::open(&a.tap), Err(TapError::Busy(_))));
        assert!(
            Network::list(&nl).await?.iter().any(|l| l.name == a.tap && l.held && l.kind == LinkKind::Tap)
        );
        // The monitor dies.
        let (tap, rates) =
            (a.tap.clone(), RatePatch { from_guest: Patch::Set(BitRate(1_000_000)), ..RatePatch::default() });
        Shaping::apply(&nl, &tap, &rates).await?;
        drop(a.queue);
        assert!(Network::list(&nl).await?.iter().any(|l| l.name == tap && !l.held));
        let fd: OwnedFd = Tap::open(&tap)?;
        assert!(Network::list(&nl).await?.iter().any(|l| l.name == tap && l.held));
        assert_eq!(Shaping::read(&nl, &tap).await?.from_guest.rate, Some(BitRate(1_000_000)));

        assert_eq!(Network::list(&nl).await?.len(), 3, "two taps and an ifb");
        assert_eq!(Network::remove(&nl, &tap).await?, Outcome::Changed);
        assert_eq!(Network::remove(&nl, &tap).await?, Outcome::Unchanged);
        drop(fd);
        Network::remove(&nl, &b.tap).await?;
        assert_eq!(Network::list(&nl).await?, []);
        assert!(matches!(Tap::open(&tap), Err(TapError::Missing(_))));
        Ok(())
    })
}

/// A kernel may refuse a second dump on the socket before all of the first is read. Linux 6.12 does so with a handful of machines; 6.18 has
/// answered even these at once, so that there this shows no more than that they do not disturb each other.
#[test]
fn many_machines_change_at_once() -> Tested {
    const MACHINES: usize = 24;
    in_namespace(async |nl| {
        let (_a, _b) = two_guests(&nl).await?;
        let mut guests = Vec::new();
        for number in 0..MACHINES {
            guests.push(guest(&nl, &format!("m{number}")).await?);
        }
        for round in 1..=2 {
            let rate = |number: usize| BitRate(8_000_000 * (round + number as u64));
            let changes = guests.iter().enumerate().map(|(number, guest)| {
                let nl = nl.clone();
                async move {
                    let set = || Patch::Set(rate(number));
                    let patch = RatePatch { to_guest: set(), from_guest: set() };
                    let (changed, read) =
                        (Shaping::apply(&nl, &guest.tap, &patch).await, Shaping::read(&nl, &guest.tap).await);
                    (number, changed, read)
                }
            });
            for (number, changed, read) in join_all(changes).await {
                for state in [changed?, read?] {
                    assert_eq!(state.to_guest.rate, Some(rate(number)), "machine {number}");
                    assert_eq!(state.from_guest.rate, Some(rate(number)), "machine {number}");
                }
            }
        }
        Ok(())
    })
}

#[test]
fn only_the_guests_own_address_enters_the_bridge() -> Tested {
    in_namespace(async |nl| {
        let (mut a, mut b) = two_guests(&nl).await?;
        let frame = a.frame(b.mac, 1);
        a.queue.write_all(&frame)?;
        let mut forged = a.frame(b.mac, 2);
        forged[HEADER_BYTES + 6..HEADER_BYTES + 12].copy_from_slice(&mac_for(b"someone else").0);
        a.queue.write_all(&forged)?;
        let frame = a.frame(b.mac, 3);
        a.queue.write_all(&frame)?;
        assert_eq!(collect(&mut b, 2, Duration::from_secs(5))?, [1, 3]);
        Ok(())
    })
}

/// A TCP segment of 59 KiB with a virtio header that asks the kernel to cut it up (virtio 1.2, 5.1.6).
fn large_segment(from: Mac, to: Mac) -> Vec<u8> {
    const PAYLOAD_BYTES: u16 = 41 * 1448;
    let mut frame = vec![1, 1];
    for field in [54_u16, 1448, 34, 16, 0] {
        frame.extend(field.to_le_bytes());
    }
    frame.extend(to.0);
    frame.extend(from.0);
    frame.extend([0x08, 0x00]);
    let mut ip = [0x4500, 40 + PAYLOAD_BYTES, 1, 0x4000, 0x4006, 0, 0x0a4d, 2, 0x0a4d, 3];
    // Hosts with br_netfilter check the header's sum (RFC 1071) also of bridged frames.
    let sum: u32 = ip.iter().map(|word| u32::from(*word)).sum();
    ip[5] = !u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap_or(0);
    frame.extend(ip.iter().flat_map(|word| word.to_be_bytes()));
    frame.extend([0x10, 0, 0x10, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0]);
    frame.resize(frame.len() + usize::from(PAYLOAD_BYTES), 0);
    frame
}

/// Offers twice the rate in large segments; returns what the kernel counted and what arrived, in bit/s.
async fn measure_segments(
    nl: &Netlink,
    from: &mut Guest,
    to: &mut Guest,
    rate: BitRate,
) -> Result<(f64, f64), Box<dyn Error>> {
    let segment = large_segment(from.mac, to.mac);
    let (start, time) = (Instant::now(), Duration::from_secs(3));
    let (mut sent, mut received, mut since) = (0, 0, None);
    while start.elapsed() < time {
        if (sent as f64) < start.elapsed().as_secs_f64() * rate.0 as f64 / 4.0 {
            from.queue.write_all(&segment)?;
            sent += segment.len();
        }
        // What is counted lies within what is timed.
        let now = Instant::now();
        let arrived = to.receive_bytes()?;
        if since.is_some() {
            received += arrived;
        } else if start.elapsed() > time / 3 {
            since = Some((now, Shaping::read(nl, &from.tap).await?.from_guest.bytes));
        }
    }
    let (since, counted) = since.ok_or("no time")?;
    let counted = Shaping::read(nl, &from.tap).await?.from_guest.bytes - counted;
    let seconds = since.elapsed().as_secs_f64();
    Ok((counted as f64 * 8.0 / seconds, (received * 8) as f64 / seconds))
}

#[test]
fn large_segments_are_charged_with_all_their_headers() -> Tested {
    let _alone = alone();
    in_namespace(async |nl| {
        let (mut a, mut b) = two_guests(&nl).await?;
        for mbit in [10, 50] {
            let rate = BitRate(mbit * 1_000_000);
            let patch = RatePatch { from_guest: Patch::Set(rate), ..RatePatch::default() };
            Shaping::apply(&nl, &a.tap, &patch).await?;
            expect_rate(rate, async || {
                let (counted, arrived) = measure_segments(&nl, &mut a, &mut b, rate).await?;
                println!(
                    "asked {mbit} Mbit/s in large segments, {:.3} counted, {:.3} arrived",
                    counted / 1e6,
                    arrived / 1e6
                );
                Ok(vec![counted, arrived])
            })
            .await?;
        }
        Ok(())
    })
}

/// A guest with a network stack of its own: a namespace whose tap is joined to the machine's by two copying threads.
mod stack {
    use std::fs::File;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;
    use std::process::Command;
    use std::thread;
    use std::time::{Duration, Instant};

    use super::{Guest, IfName, Tap};

    type Failure = Box<dyn std::error::Error + Send + Sync>;

    fn blocking(file: &File) -> Result<(), Failure> {
        nix::fcntl::fcntl(file.as_fd(), nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::empty()))?;
        Ok(())
    }

    /// Copies until one side is removed.
    fn copy(mut from: File, mut to: File) {
        let mut buffer = vec![0; 70_000];
        while let Ok(bytes) = from.read(&mut buffer) {
            if to.write_all(&buffer[..bytes]).is_err() {
                return;
            }
        }
    }

    /// Runs in a thread of its own: brings the stack up and sends or receives for `time` over one TCP connection to
    /// the host; returns the bytes received and the seconds, of the last three quarters.
    pub(super) fn run(guest: &Guest, port: u16, sends: bool, time: Duration) -> Result<(u64, f64), Failure> {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)?;
        let queue = File::from(Tap::create(&IfName::new("g0")?, None)?);
        let mac = guest.mac.to_string();
        for arguments in [
            vec!["link", "set", "g0", "address", &mac, "up"],
            vec!["addr", "add", "10.77.0.2/16", "dev", "g0"],
        ] {
            assert!(Command::new("ip").args(arguments).status()?.success());
        }
        let machine = guest.queue.try_clone()?;
        blocking(&queue)?;
        blocking(&machine)?;
        let (queue2, machine2) = (queue.try_clone()?, machine.try_clone()?);
        thread::spawn(move || copy(queue, machine));
        thread::spawn(move || copy(machine2, queue2));
        let stream = TcpStream::connect(("10.77.0.1", port))?;
        if sends { send(stream, time) } else { receive(stream, time) }
    }

    pub(super) fn send(mut stream: TcpStream, time: Duration) -> Result<(u64, f64), Failure> {
        stream.set_write_timeout(Some(time))?;
        let (start, chunk) = (Instant::now(), vec![0; 16_384]);
        while start.elapsed() < time {
            stream.write_all(&chunk)?;
        }
        Ok((0, 0.0))
    }

    pub(super) fn receive(mut stream: TcpStream, time: Duration) -> Result<(u64, f64), Failure> {
        stream.set_read_timeout(Some(time * 2))?;
        let (start, mut chunk) = (Instant::now(), vec![0; 65_536]);
        let (mut bytes, mut since) = (0_u64, None);
        while start.elapsed() < time {
            let got = u64::try_from(stream.read(&mut chunk)?)?;
            if got == 0 {
                break;
            }
            if since.is_some() {
                bytes += got;
            } else if start.elapsed() >= time / 4 {
                since = Some(Instant::now());
            }
        }
        Ok((bytes, since.ok_or("no time")?.elapsed().as_secs_f64()))
    }

    pub(super) fn accept(listener: &TcpListener, sends: bool, time: Duration) -> Result<(u64, f64), Failure> {
        let (stream, _) = listener.accept()?;
        if sends { send(stream, time) } else { receive(stream, time) }
    }
}

/// One TCP connection of four seconds between a guest's own stack and the host; returns goodput and L2 rate in bit/s.
async fn measure_tcp(nl: &Netlink, rate: BitRate, guest_sends: bool) -> Result<(f64, f64), Box<dyn Error>> {
    let a = guest(nl, "a").await?;
    Shaping::apply(nl, &a.tap, &RatePatch { to_guest: Patch::Set(rate), from_guest: Patch::Set(rate) })
        .await?;
    let listener = std::net::TcpListener::bind(("10.77.0.1", 0))?;
    let (port, time) = (listener.local_addr()?.port(), Duration::from_secs(4));
    let shared = a.share()?;
    let inside = std::thread::spawn(move || stack::run(&shared, port, guest_sends, time));
    let outside = std::thread::spawn(move || stack::accept(&listener, !guest_sends, time));
    let counted = async || {
        let state = Shaping::read(nl, &a.tap).await?;
        Ok::<_, lathe_netshape::Error>(if guest_sends {
            state.from_guest.bytes
        } else {
            state.to_guest.bytes
        })
    };
    tokio::time::sleep(time * 2 / 5).await;
    let begun = Instant::now();
    let before = counted().await?;
    tokio::time::sleep(time * 2 / 5).await;
    let bytes = counted().await? - before;
    let l2 = (bytes * 8) as f64 / begun.elapsed().as_secs_f64();
    let inside = inside.join().map_err(|_| "the guest's thread")?;
    let outside = outside.join().map_err(|_| "the host's thread")?;
    let received = if guest_sends { outside } else { inside };
    let (bytes, seconds) = received.map_err(|error| error.to_string())?;
    Network::remove(nl, &a.tap).await?;
    Ok(((bytes * 8) as f64 / seconds, l2))
}

#[test]
fn tcp_gets_its_rate_in_both_directions() -> Tested {
    let _alone = alone();
    in_namespace(async |nl| {
        let address: Prefix = "10.77.0.1/16".parse()?;
        Bridge::ensure(&nl, &bridge()?, &[address], None).await?;
        for (mbit, guest_sends) in [(10, false), (10, true), (50, false), (50, true)] {
            let rate = BitRate(mbit * 1_000_000);
            expect_rate(rate, async || {
                let (goodput, l2) = measure_tcp(&nl, rate, guest_sends).await?;
                let direction = if guest_sends { "from" } else { "to" };
                println!(
                    "asked {mbit} Mbit/s {direction} the guest, TCP goodput {:.3}, L2 {:.3} Mbit/s",
                    goodput / 1e6,
                    l2 / 1e6
                );
                // What the application gets comes in lumps: it is told, and the counters are judged.
                Ok(vec![l2])
            })
            .await?;
        }
        Ok(())
    })
}

/// Waits until `count` of the test's frames are there, or the time is over.
fn collect(guest: &mut Guest, count: usize, time: Duration) -> Result<Vec<u32>, std::io::Error> {
    let start = Instant::now();
    let mut numbers = Vec::new();
    while numbers.len() < count && start.elapsed() < time {
        numbers.extend(guest.receive()?);
    }
    Ok(numbers)
}

/// Sends as fast as about twice `rate` from one guest to the other, and returns what arrives in bit/s, after a moment in
/// which the burst is used up.
fn measure(from: &mut Guest, to: &mut Guest, rate: BitRate, time: Duration) -> Result<f64, Box<dyn Error>> {
    let frame = from.frame(to.mac, 7);
    let bits = u64::try_from(FRAME_BYTES * 8)?;
    let settle = time / 4;
    let start = Instant::now();
    let (mut sent, mut received, mut since) = (0, 0_u64, None);
    while start.elapsed() < time {
        let due = u64::try_from(start.elapsed().as_micros())? * (rate.0 * 2) / bits / 1_000_000;
        while sent < due {
            from.queue.write_all(&frame)?;
            sent += 1;
        }
        // What is counted lies within what is timed.
        let now = Instant::now();
        let arrived = u64::try_from(to.receive()?.len())?;
        if since.is_some() {
            received += arrived;
        } else if start.elapsed() >= settle {
            since = Some(now);
        }
    }
    let elapsed = since.ok_or("no time")?.elapsed().as_secs_f64();
    Ok((received * bits) as f64 / elapsed)
}

#[test]
fn rates_are_delivered_in_both_directions() -> Tested {
    let _alone = alone();
    in_namespace(async |nl| {
        let (mut a, mut b) = two_guests(&nl).await?;
        for mbit in [10, 50] {
            let rate = BitRate(mbit * 1_000_000);
            for (tap, patch, what) in [
                (
                    b.tap.clone(),
                    RatePatch { to_guest: Patch::Set(rate), ..RatePatch::default() },
                    "to the guest",
                ),
                (
                    a.tap.clone(),
                    RatePatch { from_guest: Patch::Set(rate), ..RatePatch::default() },
                    "from the guest",
                ),
            ] {
                Shaping::apply(&nl, &tap, &patch).await?;
                expect_rate(rate, async || {
                    let got = measure(&mut a, &mut b, rate, Duration::from_secs(2))?;
                    println!("asked {mbit} Mbit/s {what}, delivered {:.3} Mbit/s", got / 1e6);
                    Ok(vec![got])
                })
                .await?;
                let free = RatePatch { to_guest: Patch::Unlimited, from_guest: Patch::Unlimited };
                let state = Shaping::apply(&nl, &tap, &free).await?;
                assert_eq!((state.to_guest.rate, state.from_guest.rate), (None, None));
            }
        }
        Ok(())
    })
}

#[test]
fn a_rate_changes_without_losing_a_frame() -> Tested {
    in_namespace(async |nl| {
        let (mut a, mut b) = two_guests(&nl).await?;
        let to = |bits| RatePatch { to_guest: Patch::Set(BitRate(bits)), ..RatePatch::default() };
        let from = |bits| RatePatch { from_guest: Patch::Set(BitRate(bits)), ..RatePatch::default() };
        Shaping::apply(&nl, &b.tap, &to(200_000)).await?;
        Shaping::apply(&nl, &a.tap, &from(200_000)).await?;
        for number in 0..60 {
            let frame = a.frame(b.mac, number);
            a.queue.write_all(&frame)?;
        }
        let waiting = Shaping::read(&nl, &a.tap).await?.from_guest;
        assert!(waiting.queued_packets > 30 && waiting.backlog_bytes > 45_000, "{waiting:?}");
        for bits in [300_000, 100_000, 50_000_000] {
            let state = Shaping::apply(&nl, &a.tap, &from(bits)).await?;
            assert_eq!(state.from_guest.rate, Some(BitRate(bits)));
        }
        // Now all waits on the other side.
        let state = Shaping::apply(&nl, &b.tap, &to(100_000)).await?;
        assert_eq!(state.to_guest.rate, Some(BitRate(100_000)));
        let mut numbers = b.receive()?;
        Shaping::apply(&nl, &b.tap, &to(50_000_000)).await?;
        let drained = async || {
            let (sent, got) = (Shaping::read(&nl, &a.tap).await?, Shaping::read(&nl, &b.tap).await?);
            Ok::<_, lathe_netshape::Error>((sent.from_guest, got.to_guest))
        };
        let start = Instant::now();
        let (sent, got) = loop {
            let (sent, got) = drained().await?;
            if sent.queued_packets + got.queued_packets == 0 || start.elapsed() > Duration::from_secs(20) {
                break (sent, got);
            }
        };
        let dropped = usize::try_from(sent.drops + got.drops)?;
        numbers.extend(collect(&mut b, 60 - dropped - numbers.len(), Duration::from_secs(20))?);
        // Frames wait far longer than CoDel likes, so it may drop some, and counts them. A queue that is replaced loses
        // what is in it and counts nothing.
        println!("{} frames arrived, CoDel dropped {dropped}", numbers.len());
        assert_eq!(numbers.len() + dropped, 60);
        assert!(numbers.len() > 30 && numbers.is_sorted(), "{numbers:?}");
        assert_eq!(sent.queued_packets, 0);
        assert!(sent.packets > 30 && sent.bytes > 30 * 1514, "{sent:?}");
        assert!(Network::stats(&nl, &a.tap).await?.from_guest_bytes >= 60 * 1514);
        Ok(())
    })
}

#[test]
fn applying_twice_is_applying_once() -> Tested {
    in_namespace(async |nl| {
        let (a, _b) = two_guests(&nl).await?;
        assert_eq!(Shaping::read(&nl, &a.tap).await?.to_guest.rate, None);
        let free = RatePatch { to_guest: Patch::Unlimited, from_guest: Patch::Unlimited };
        Shaping::apply(&nl, &a.tap, &free).await?;
        assert_eq!(Network::list(&nl).await?.len(), 2, "free directions need no ifb");
        let patch = RatePatch {
            to_guest: Patch::Set(BitRate(10_000_000)),
            from_guest: Patch::Set(BitRate(20_000_000)),
        };
        let once = Shaping::apply(&nl, &a.tap, &patch).await?;
        let twice = Shaping::apply(&nl, &a.tap, &patch).await?;
        assert_eq!(
            (once.to_guest.rate, once.from_guest.rate),
            (Some(BitRate(10_000_000)), Some(BitRate(20_000_000)))
        );
        assert_eq!((twice.to_guest.rate, twice.from_guest.rate), (once.to_guest.rate, once.from_guest.rate));
        let kept = Shaping::apply(&nl, &a.tap, &RatePatch::default()).await?;
        assert_eq!(kept.from_guest.rate, Some(BitRate(20_000_000)));
        let absurd = RatePatch { to_guest: Patch::Set(BitRate(0)), ..RatePatch::default() };
        assert!(matches!(
            Shaping::apply(&nl, &a.tap, &absurd).await,
            Err(lathe_netshape::Error::Rate { .. })
        ));
        let nobody = Shaping::read(&nl, &IfName::tap_of("nobody")).await;
        assert!(matches!(nobody, Err(lathe_netshape::Error::NoLink(_))), "{nobody:?}");
        Ok(())
    })
}

#[test]
fn nat_is_one_table_and_leaves_others_alone() -> Tested {
    in_namespace(async |_nl| {
        let nft = |arguments: &[&str]| Command::new("/usr/sbin/nft").args(arguments).output();
        if nft(&["--version"]).is_err() {
            println!("skipped: no nft");
            return Ok(());
        }
        nft(&["add", "table", "inet", "other"])?;
        let nat = Nat::new();
        let (bridge, prefix): (IfName, Prefix) = (bridge()?, "10.77.0.1/16".parse()?);
        assert_eq!(nat.published()?, []);
        nat.ensure(&bridge, &[prefix])?;
        let web = Publish { proto: Proto::Tcp, host_port: 8080, addr: Ipv4Addr::new(10, 77, 0, 5), port: 80 };
        nat.publish(&web)?;
        nat.publish(&Publish { proto: Proto::Udp, ..web })?;
        let moved = Publish { addr: Ipv4Addr::new(10, 77, 0, 6), ..web };
        nat.publish(&moved)?;
        nat.publish(&moved)?;
        nat.ensure(&bridge, &[prefix])?;
        let published = nat.published()?;
        assert!(published.len() == 2 && published.contains(&moved), "{published:?}");
        assert_eq!(nat.unpublish(Proto::Udp, 8080)?, Outcome::Changed);
        assert_eq!(nat.unpublish(Proto::Udp, 8080)?, Outcome::Unchanged);
        assert_eq!(nat.published()?, [moved]);
        let listed = nft(&["list", "chain", "inet", "lathe", "postrouting"])?;
        let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
        assert_eq!(listed.matches("masquerade").count(), 1, "{listed}");
        assert_eq!(nat.remove()?, Outcome::Changed);
        assert_eq!(nat.remove()?, Outcome::Unchanged);
        let tables = String::from_utf8_lossy(&nft(&["list", "tables"])?.stdout).into_owned();
        assert_eq!(tables.trim(), "table inet other");
        Ok(())
    })
}

#[test]
fn a_change_of_rules_is_heard_and_seen() -> Tested {
    in_namespace(async |_nl| {
        let nft = |arguments: &[&str]| Command::new("/usr/sbin/nft").args(arguments).output();
        if nft(&["--version"]).is_err() {
            println!("skipped: no nft");
            return Ok(());
        }
        let (nat, bridge, prefix): (_, IfName, Prefix) = (Nat::new(), bridge()?, "10.77.0.1/16".parse()?);
        assert_eq!(nat.rules()?, None);
        let ours = || {
            nat.ensure(&bridge, &[prefix])?;
            HostGuard::new().ensure(&bridge, &[])?;
            nat.rules()
        };
        let rules = ours()?;
        assert!(rules.as_ref().is_some_and(|rules| rules.contains("masquerade") && rules.contains("drop")));
        let watch = RulesWatch::new()?;
        let silent =
            async || tokio::time::timeout(Duration::from_millis(300), watch.changed()).await.is_err();
        assert!(silent().await, "what was before is not told");
        nat.publish(&Publish {
            proto: Proto::Tcp,
            host_port: 1,
            addr: Ipv4Addr::new(10, 77, 0, 5),
            port: 1,
        })?;
        assert_eq!(nat.rules()?, rules, "published ports are no rules");
        tokio::time::timeout(Duration::from_secs(10), watch.changed()).await??;
        while !silent().await {}
        for change in [
            &["flush", "ruleset"][..],
            &["flush", "chain", "inet", "lathe", "input"],
            &["delete", "table", "inet", "lathe"],
            &["insert", "rule", "inet", "lathe", "input", "accept"],
        ] {
            assert!(nft(change)?.status.success(), "{change:?}");
            tokio::time::timeout(Duration::from_secs(10), watch.changed()).await??;
            assert_ne!(nat.rules()?, rules, "{change:?}");
            assert_eq!(ours()?, rules, "{change:?}");
        }
        Ok(())
    })
}
