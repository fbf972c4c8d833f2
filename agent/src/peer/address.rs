//! Where others can reach this host: sockets, and which address to tell.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket as StdUdpSocket};

use nix::ifaddrs::getifaddrs;
use nix::net::if_::InterfaceFlags;
use tokio::net::{TcpListener, UdpSocket};

use super::error::PeerError;

/// Own bridge; its addresses are of use to machines only.
const OWN_BRIDGE: &str = "lathe";
/// Attempts to find a port that is free for both protocols, if any will do.
const PORT_ATTEMPTS: u32 = 16;

/// The cluster's port, both protocols.
#[derive(Debug)]
pub struct Sockets {
    /// Gossip.
    pub udp: UdpSocket,
    /// Peer API.
    pub tcp: TcpListener,
    /// The port of both.
    pub port: u16,
}

/// Opens both sockets on one port; port 0 means any that is free for both.
///
/// # Errors
/// [`PeerError::Bind`].
pub async fn bind(listen: SocketAddr) -> Result<Sockets, PeerError> {
    let failed = |error: std::io::Error| PeerError::Bind { address: listen, reason: error.to_string() };
    let mut attempt = 0;
    loop {
        attempt += 1;
        let tcp = TcpListener::bind(listen).await.map_err(failed)?;
        let port = tcp.local_addr().map_err(failed)?.port();
        match UdpSocket::bind(SocketAddr::new(listen.ip(), port)).await {
            Ok(udp) => return Ok(Sockets { udp, tcp, port }),
            Err(_) if listen.port() == 0 && attempt < PORT_ATTEMPTS => {}
            Err(error) => return Err(failed(error)),
        }
    }
}

/// The address to tell others: that listened on if it is one, else that of the default route, else the first of an interface that is up.
///
/// # Errors
/// [`PeerError::NoAddress`].
pub fn own_ip(listen: SocketAddr) -> Result<IpAddr, PeerError> {
    if !listen.ip().is_unspecified() {
        return Ok(listen.ip());
    }
    if let Some(ip) = by_default_route() {
        return Ok(ip);
    }
    by_interfaces()
}

/// Whether this host has the address now.
pub fn is_own(ip: IpAddr) -> bool {
    StdUdpSocket::bind((ip, 0)).is_ok()
}

/// Connecting a UDP socket sends nothing; it only makes the kernel choose a route. 192.0.2.1 is TEST-NET-1 (RFC 5737).
fn by_default_route() -> Option<IpAddr> {
    let socket = StdUdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
    socket.connect((Ipv4Addr::new(192, 0, 2, 1), 9)).ok()?;
    let ip = socket.local_addr().ok()?.ip();
    (!ip.is_unspecified() && !ip.is_loopback()).then_some(ip)
}

fn by_interfaces() -> Result<IpAddr, PeerError> {
    let interfaces = getifaddrs().map_err(|errno| PeerError::NoAddress(errno.desc().to_owned()))?;
    let usable = interfaces.filter(|interface| {
        let flags = interface.flags;
        flags.contains(InterfaceFlags::IFF_UP)
            && !flags.contains(InterfaceFlags::IFF_LOOPBACK)
            && !interface.interface_name.starts_with(OWN_BRIDGE)
    });
    let mut ips: Vec<IpAddr> = usable
        .filter_map(|interface| {
            let address = interface.address?;
            let v4 = address.as_sockaddr_in().map(|sin| IpAddr::V4(sin.ip()));
            v4.or_else(|| address.as_sockaddr_in6().map(|sin| IpAddr::V6(sin.ip())))
        })
        .filter(|ip| match ip {
            IpAddr::V4(ip) => !ip.is_link_local(),
            IpAddr::V6(ip) => !ip.is_unicast_link_local(),
        })
        .collect();
    ips.sort_by_key(IpAddr::is_ipv6);
    ips.first().copied().ok_or_else(|| PeerError::NoAddress("no interface but the loopback has one".into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_taken_port_is_told() {
        let sockets = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let again = bind(SocketAddr::new("127.0.0.1".parse().unwrap(), sockets.port)).await.unwrap_err();
        assert_eq!(again.code(), "peer-bind");
        assert!(again.to_string().contains(&sockets.port.to_string()), "{again}");
    }

    #[test]
    fn own_addresses_are_told_from_others() {
        assert!(is_own(Ipv4Addr::LOCALHOST.into()));
        assert!(!is_own(Ipv4Addr::new(192, 0, 2, 7).into()));
    }

    #[test]
    fn a_given_address_is_told_as_it_is() {
        assert_eq!(own_ip("10.1.2.3:7946".parse().unwrap()).unwrap(), "10.1.2.3".parse::<IpAddr>().unwrap());
    }
}
