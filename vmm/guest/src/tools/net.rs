//! `blast` and `sink` measure bandwidth, `ip` shows addresses.
//!
//! The receiver's figures count. Goodput is the payload; the L2 rate comes from the counters of all cards but
//! loopback, so it includes headers and whatever else travels. `steady_bps` leaves the first second out, in which a
//! token bucket still hands out its burst. TCP is the default; UDP sends as fast as the socket takes it, or at a rate.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs, UdpSocket};
use std::time::{Duration, Instant};

use nix::sys::socket::sockopt::ReceiveTimeout;
use nix::sys::time::TimeVal;

use super::{number, usage};
use crate::usage::read as read_usage;

const DEFAULT_PORT: u16 = 5201;
/// Payload of a UDP datagram that fits into an Ethernet frame with IPv6, bytes.
const DATAGRAM_BYTES: usize = 1452;
const BUFFER_BYTES: usize = 128 * 1024;
const MAX_SECONDS: f64 = 86_400.0;
/// A UDP receiver that has heard nothing for this long takes the sender to be done.
const UDP_SILENCE: Duration = Duration::from_secs(2);
/// For the other side to appear at all.
const FIRST_TIMEOUT: Duration = Duration::from_secs(60);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Left out of the steady figure.
const SETTLE: Duration = Duration::from_secs(1);

/// Bytes over time, and without the start.
struct Meter {
    started: Instant,
    bytes: u64,
    settled: Option<(Instant, u64)>,
    cards: (u64, u64),
}

impl Meter {
    fn start() -> Self {
        let usage = read_usage();
        let cards = (usage.net_rx_bytes, usage.net_tx_bytes);
        Self { started: Instant::now(), bytes: 0, settled: None, cards }
    }

    fn add(&mut self, bytes: usize) {
        self.bytes += bytes as u64;
        if self.settled.is_none() && self.started.elapsed() >= SETTLE {
            self.settled = Some((Instant::now(), self.bytes));
        }
    }

    fn report(&self, ended: Instant) -> io::Result<()> {
        let usage = read_usage();
        let rate = |bytes: u64, since: Instant| {
            bytes as f64 * 8.0 / ended.saturating_duration_since(since).as_secs_f64().max(1e-9)
        };
        let steady = self.settled.filter(|(since, _)| ended > *since);
        let steady = steady.map_or(0.0, |(since, before)| rate(self.bytes - before, since));
        writeln!(
            io::stdout(),
            "bytes={} seconds={:.3} goodput_bps={:.0} steady_bps={steady:.0} l2_rx_bps={:.0} l2_tx_bps={:.0}",
            self.bytes,
            ended.saturating_duration_since(self.started).as_secs_f64(),
            rate(self.bytes, self.started),
            rate(usage.net_rx_bytes.saturating_sub(self.cards.0), self.started),
            rate(usage.net_tx_bytes.saturating_sub(self.cards.1), self.started),
        )
    }
}

/// `blast [-u] HOST [PORT] [SECONDS] [BITS_PER_SECOND]`: sends; the rate is for UDP.
pub fn blast(arguments: &[&str]) -> io::Result<u8> {
    let (udp, words) = udp_flag(arguments);
    let host = words.first().ok_or_else(|| usage("blast [-u] HOST [PORT] [SECONDS] [BITS_PER_SECOND]"))?;
    let port: u16 = number(words, 1, DEFAULT_PORT)?;
    let seconds: f64 = number(words, 2, 10.0)?;
    let rate: f64 = number(words, 3, 0.0)?;
    if !(0.0..=MAX_SECONDS).contains(&seconds) || !(0.0..=1e12).contains(&rate) {
        return Err(usage("a day and 1e12 bit/s at most"));
    }
    // Numbers only: a static program resolves no names.
    let host = host.parse().map_err(|_| usage(&format!("not an address: {host:?}")))?;
    let address = SocketAddr::new(host, port);
    let duration = Duration::from_secs_f64(seconds);
    if udp { blast_udp(address, duration, rate) } else { blast_tcp(address, duration) }
}

fn blast_tcp(address: SocketAddr, duration: Duration) -> io::Result<u8> {
    let mut stream = TcpStream::connect_timeout(&address, CONNECT_TIMEOUT)?;
    stream.set_write_timeout(Some(duration.max(CONNECT_TIMEOUT)))?;
    let bytes = vec![0x5a; BUFFER_BYTES];
    let mut meter = Meter::start();
    while meter.started.elapsed() < duration {
        meter.add(stream.write(&bytes)?);
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    // The receiver closes when it has everything, so that what lies in buffers is not counted as sent in no time.
    stream.set_read_timeout(Some(FIRST_TIMEOUT))?;
    let _ = stream.read(&mut [0])?;
    meter.report(Instant::now())?;
    Ok(0)
}

fn blast_udp(address: SocketAddr, duration: Duration, rate: f64) -> io::Result<u8> {
    let local = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(local)?;
    socket.connect(address)?;
    let bytes = [0x5a; DATAGRAM_BYTES];
    let mut meter = Meter::start();
    while meter.started.elapsed() < duration {
        match socket.send(&bytes) {
            Ok(sent) => meter.add(sent),
            // A full queue, or nobody there yet: datagrams get lost, that is their nature.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOBUFS | libc::ECONNREFUSED)) => {}
            Err(error) => return Err(error),
        }
        if rate > 0.0 {
            let due = Duration::from_secs_f64(meter.bytes as f64 * 8.0 / rate);
            std::thread::sleep(due.saturating_sub(meter.started.elapsed()));
        }
    }
    meter.report(Instant::now())?;
    Ok(0)
}

/// `sink [-u] [PORT]`: receives from one sender, prints, ends.
pub fn sink(arguments: &[&str]) -> io::Result<u8> {
    let (udp, words) = udp_flag(arguments);
    let port: u16 = number(words, 0, DEFAULT_PORT)?;
    if udp { sink_udp(port) } else { sink_tcp(port) }
}

/// Both families on one socket, or IPv4 where the kernel has no IPv6.
fn any(port: u16) -> Vec<SocketAddr> {
    let both = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
    both.to_socket_addrs().into_iter().flatten().chain([SocketAddr::from(([0, 0, 0, 0], port))]).collect()
}

fn sink_tcp(port: u16) -> io::Result<u8> {
    let listener = TcpListener::bind(&any(port)[..])?;
    // Also how long accept waits (socket(7)).
    let patience = TimeVal::new(FIRST_TIMEOUT.as_secs() as i64, 0);
    nix::sys::socket::setsockopt(&listener, ReceiveTimeout, &patience)?;
    let (mut stream, _) = listener.accept()?;
    stream.set_read_timeout(Some(FIRST_TIMEOUT))?;
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut meter = Meter::start();
    loop {
        match stream.read(&mut buffer)? {
            0 => break,
            count => meter.add(count),
        }
    }
    meter.report(Instant::now())?;
    Ok(0)
}

fn sink_udp(port: u16) -> io::Result<u8> {
    let socket = UdpSocket::bind(&any(port)[..])?;
    let mut buffer = [0; 65_536];
    socket.set_read_timeout(Some(FIRST_TIMEOUT))?;
    let (first, _) = socket.recv_from(&mut buffer)?;
    socket.set_read_timeout(Some(UDP_SILENCE))?;
    let mut meter = Meter::start();
    meter.add(first);
    let mut last = Instant::now();
    loop {
        match socket.recv_from(&mut buffer) {
            Ok((count, _)) => {
                meter.add(count);
                last = Instant::now();
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                break;
            }
            Err(error) => return Err(error),
        }
    }
    meter.report(last)?;
    Ok(0)
}

fn udp_flag<'a>(arguments: &'a [&'a str]) -> (bool, &'a [&'a str]) {
    match arguments.split_first() {
        Some((&"-u", rest)) => (true, rest),
        _ => (false, arguments),
    }
}

/// Cards with MAC, MTU and state, then addresses.
pub fn addresses(_: &[&str]) -> io::Result<u8> {
    let mut out = io::stdout().lock();
    let mut cards: Vec<_> = fs::read_dir("/sys/class/net")?.flatten().collect();
    cards.sort_by_key(fs::DirEntry::file_name);
    for card in cards {
        let read = |name| fs::read_to_string(card.path().join(name)).unwrap_or_default().trim().to_owned();
        let name = card.file_name();
        let (mac, mtu, state) = (read("address"), read("mtu"), read("operstate"));
        writeln!(out, "{} {mac} mtu {mtu} {state}", name.to_string_lossy())?;
        for entry in nix::ifaddrs::getifaddrs()?.filter(|entry| name.to_str() == Some(&entry.interface_name))
        {
            let prefix = entry.netmask.as_ref().and_then(prefix);
            if let (Some(address), Some(prefix)) = (entry.address.as_ref().and_then(text), prefix) {
                writeln!(out, "    {address}/{prefix}")?;
            }
        }
    }
    Ok(0)
}

fn text(address: &nix::sys::socket::SockaddrStorage) -> Option<String> {
    let v4 = address.as_sockaddr_in().map(|address| address.ip().to_string());
    v4.or_else(|| address.as_sockaddr_in6().map(|address| address.ip().to_string()))
}

fn prefix(mask: &nix::sys::socket::SockaddrStorage) -> Option<u32> {
    let v4 = mask.as_sockaddr_in().map(|mask| u32::from(mask.ip()).count_ones());
    v4.or_else(|| mask.as_sockaddr_in6().map(|mask| u128::from(mask.ip()).count_ones()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_blasted_arrives() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let sender = std::thread::spawn(move || blast_tcp(address, Duration::from_millis(20)));
        let (mut stream, _) = listener.accept().unwrap();
        let received = io::copy(&mut stream, &mut io::sink()).unwrap();
        drop(stream);
        assert_eq!(sender.join().unwrap().unwrap(), 0);
        assert!(received > 0);
    }

    #[test]
    fn wrong_words_are_refused() {
        for words in [&[][..], &["example.org"], &["127.0.0.1", "70000"], &["127.0.0.1", "1", "-1"]] {
            assert_eq!(blast(words).unwrap_err().kind(), io::ErrorKind::InvalidInput, "{words:?}");
        }
    }
}
