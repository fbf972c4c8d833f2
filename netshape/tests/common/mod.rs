//! What tests on a real kernel share: a network namespace of their own, which only root gets, and guests, which are
//! taps whose queues the test reads and writes.

#![allow(dead_code, reason = "not every test needs all")]

use std::error::Error;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::process::Command;
use std::time::{Duration, Instant};

use lathe_netshape::{Bridge, IfName, Mac, Netlink, Network, PortFd, PortSpec, Prefix, mac_for};

pub type Tested = Result<(), Box<dyn Error>>;

/// `struct virtio_net_hdr_v1`.
pub const HEADER_BYTES: usize = 12;
pub const IPV4: u16 = 0x0800;
pub const ARP: u16 = 0x0806;
pub const IPV6: u16 = 0x86dd;

pub fn in_namespace(test: impl AsyncFnOnce(Netlink) -> Tested) -> Tested {
    if let Err(error) = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET) {
        println!("skipped: no network namespace of its own: {error}");
        return Ok(());
    }
    if !std::path::Path::new("/dev/net/tun").exists() {
        println!("skipped: no /dev/net/tun");
        return Ok(());
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (nl, connection) = Netlink::connect()?;
        tokio::spawn(connection);
        test(nl).await
    })
}

/// What a program prints; `None`, and the reason, without it.
pub fn output(program: &str, arguments: &[&str]) -> Result<Option<String>, Box<dyn Error>> {
    match Command::new(program).args(arguments).output() {
        Err(error) => {
            println!("skipped: no {program}: {error}");
            Ok(None)
        }
        Ok(output) if output.status.success() => Ok(Some(String::from_utf8(output.stdout)?)),
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            Err(format!("{program} {arguments:?}: {said}").into())
        }
    }
}

/// A guest: its tap's queue and its address.
pub struct Guest {
    pub tap: IfName,
    pub mac: Mac,
    pub queue: File,
}

impl Guest {
    /// Sends a frame, with the header that says "no offload".
    pub fn send(&mut self, frame: &[u8]) -> Result<(), std::io::Error> {
        let mut bytes = vec![0; HEADER_BYTES];
        bytes.extend(frame);
        self.queue.write_all(&bytes)
    }

    /// Frames that wait in the queue.
    pub fn receive(&mut self) -> Result<Vec<Vec<u8>>, std::io::Error> {
        let (mut frames, mut buffer) = (Vec::new(), vec![0; 70_000]);
        loop {
            match self.queue.read(&mut buffer) {
                Ok(bytes) => frames.push(buffer[HEADER_BYTES.min(bytes)..bytes].to_vec()),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(frames),
                Err(error) => return Err(error),
            }
        }
    }

    /// Frames until this one has come.
    pub fn receive_until(&mut self, last: &[u8]) -> Result<Vec<Vec<u8>>, Box<dyn Error>> {
        let (mut frames, start) = (Vec::new(), Instant::now());
        while start.elapsed() < Duration::from_secs(20) {
            frames.extend(self.receive()?);
            if frames.iter().any(|frame| frame == last) {
                return Ok(frames);
            }
            std::thread::yield_now();
        }
        Err("the last frame did not come".into())
    }
}

pub fn bridge() -> Result<IfName, lathe_netshape::Error> {
    IfName::new("lathe0")
}

pub async fn guest(nl: &Netlink, name: &str) -> Result<Guest, Box<dyn Error>> {
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

pub async fn two_guests(nl: &Netlink) -> Result<(Guest, Guest), Box<dyn Error>> {
    let addresses: [Prefix; 2] = ["10.77.0.1/16".parse()?, "fd77::1/64".parse()?];
    Bridge::ensure(nl, &bridge()?, &addresses, None).await?;
    Ok((guest(nl, "a").await?, guest(nl, "b").await?))
}

/// The sum of the internet (RFC 1071), over big-endian words.
fn sum(bytes: &[u8]) -> u16 {
    let mut sum: u32 =
        bytes.chunks(2).map(|two| u32::from(two[0]) << 8 | u32::from(*two.get(1).unwrap_or(&0))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(0)
}

pub fn ethernet(to: Mac, from: Mac, ethertype: u16, body: &[u8]) -> Vec<u8> {
    [&to.0[..], &from.0, &ethertype.to_be_bytes(), body].concat()
}

/// A packet of UDP; hosts with br_netfilter check the header's sum also of what is bridged.
pub fn ipv4(
    from: Ipv4Addr,
    to: Ipv4Addr,
    ports: (u16, u16),
    payload: &[u8],
) -> Result<Vec<u8>, Box<dyn Error>> {
    let udp_bytes = u16::try_from(8 + payload.len())?;
    let mut packet = vec![0x45, 0];
    packet.extend((20 + udp_bytes).to_be_bytes());
    packet.extend([0, 1, 0, 0, 64, 17, 0, 0]);
    packet.extend(from.octets());
    packet.extend(to.octets());
    let header_sum = sum(&packet).to_be_bytes();
    packet[10..12].copy_from_slice(&header_sum);
    for field in [ports.0, ports.1, udp_bytes, 0] {
        packet.extend(field.to_be_bytes());
    }
    packet.extend(payload);
    Ok(packet)
}

pub fn ipv6(from: Ipv6Addr, to: Ipv6Addr, next: u8, payload: &[u8]) -> Result<Vec<u8>, Box<dyn Error>> {
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend(u16::try_from(payload.len())?.to_be_bytes());
    packet.extend([next, 255]);
    packet.extend(from.octets());
    packet.extend(to.octets());
    packet.extend(payload);
    Ok(packet)
}

pub fn arp(operation: u16, mac: Mac, sender: Ipv4Addr, target: Ipv4Addr) -> Vec<u8> {
    let mut body = vec![0, 1, 8, 0, 6, 4];
    body.extend(operation.to_be_bytes());
    body.extend(mac.0);
    body.extend(sender.octets());
    body.extend([0; 6]);
    body.extend(target.octets());
    body
}

/// A neighbour solicitation (135) or advertisement (136) with one link-layer address.
pub fn neighbour(kind: u8, target: Ipv6Addr, option: u8, mac: Mac) -> Vec<u8> {
    let mut payload = vec![kind, 0, 0, 0, 0, 0, 0, 0];
    payload.extend(target.octets());
    payload.extend([option, 1]);
    payload.extend(mac.0);
    payload
}
