//! As much of rtnetlink as one network card needs, by hand: links up, addresses, default routes.
//!
//! Layouts: rtnetlink(7), linux/rtnetlink.h, linux/if_addr.h. The kernel is trusted, yet every length is checked.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    self, AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

pub const RTM_NEWLINK: u16 = 16;
pub const RTM_NEWADDR: u16 = 20;
pub const RTM_DELADDR: u16 = 21;
pub const RTM_GETADDR: u16 = 22;
pub const RTM_NEWROUTE: u16 = 24;
pub const RTM_DELROUTE: u16 = 25;
pub const RTM_GETROUTE: u16 = 26;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_DUMP: u16 = 0x300;
/// Create, or replace what is there.
pub const PUT: u16 = 0x400 | 0x100;
/// Nothing beyond an acknowledgement.
pub const PLAIN: u16 = 0;
const HEADER_BYTES: usize = 16;
/// The kernel's dumps come in portions of up to 32 KiB.
const RECEIVE_BYTES: usize = 64 * 1024;
/// Portions of one answer; with thousands of routes in each.
const MAX_PORTIONS: usize = 1024;
/// The kernel answers at once; this only keeps a lost answer from hanging a session.
const TIMEOUT_SECONDS: i64 = 5;

/// A message to the kernel under construction: fixed part, then attributes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Body(Vec<u8>);

impl Body {
    /// Starts with a fixed part, whose size is a multiple of 4.
    pub fn new(fixed: &[u8]) -> Self {
        Self(fixed.to_vec())
    }

    /// Adds an attribute.
    #[must_use]
    pub fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        self.0.extend((value.len() as u16 + 4).to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    /// The whole message with its header (netlink(7)).
    pub fn into_message(self, kind: u16, flags: u16, sequence: u32) -> Vec<u8> {
        let mut message = Vec::with_capacity(HEADER_BYTES + self.0.len());
        message.extend(((HEADER_BYTES + self.0.len()) as u32).to_ne_bytes());
        message.extend(kind.to_ne_bytes());
        message.extend(flags.to_ne_bytes());
        message.extend(sequence.to_ne_bytes());
        message.extend(0u32.to_ne_bytes());
        message.extend(self.0);
        message
    }

    /// The bytes so far.
    #[cfg(test)]
    pub fn into_bytes(self) -> Vec<u8> {
        self.0
    }

    /// Adds an address.
    #[must_use]
    pub fn address(self, kind: u16, address: IpAddr) -> Self {
        match address {
            IpAddr::V4(address) => self.attribute(kind, &address.octets()),
            IpAddr::V6(address) => self.attribute(kind, &address.octets()),
        }
    }
}

/// AF_INET or AF_INET6.
pub fn family(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => libc::AF_INET as u8,
        IpAddr::V6(_) => libc::AF_INET6 as u8,
    }
}

/// The attribute `kind` of those after a fixed part of `fixed` bytes.
pub fn find_attribute(message: &[u8], fixed: usize, kind: u16) -> Option<&[u8]> {
    let mut rest = message.get(fixed..)?;
    loop {
        let length = usize::from(u16::from_ne_bytes([*rest.first()?, *rest.get(1)?]));
        let found = u16::from_ne_bytes([*rest.get(2)?, *rest.get(3)?]);
        let value = rest.get(4..length)?;
        // The two highest bits are flags (NLA_F_NESTED, NLA_F_NET_BYTEORDER).
        if found & 0x3fff == kind {
            return Some(value);
        }
        rest = rest.get(length.next_multiple_of(4)..)?;
    }
}

/// An address attribute as an address.
pub fn to_address(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(octets) = <[u8; 4]>::try_from(bytes) {
        return Some(IpAddr::from(octets));
    }
    <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from)
}

/// A socket to the kernel's routing tables.
pub struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

impl Netlink {
    /// Opens one.
    pub fn new() -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let socket =
            socket::socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute)?;
        socket::bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        socket::setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::seconds(TIMEOUT_SECONDS))?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Carries out one change.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn change(&mut self, kind: u16, flags: u16, body: &Body) -> io::Result<()> {
        self.exchange(kind, NLM_F_REQUEST | NLM_F_ACK | flags, body).map(drop)
    }

    /// All objects of a kind, without headers.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn dump(&mut self, kind: u16, body: &Body) -> io::Result<Vec<Vec<u8>>> {
        self.exchange(kind, NLM_F_REQUEST | NLM_F_DUMP, body)
    }

    fn exchange(&mut self, kind: u16, flags: u16, body: &Body) -> io::Result<Vec<Vec<u8>>> {
        self.sequence = self.sequence.wrapping_add(1);
        let message = body.clone().into_message(kind, flags, self.sequence);
        socket::send(self.socket.as_raw_fd(), &message, MsgFlags::empty())?;
        let mut objects = Vec::new();
        let mut buffer = vec![0; RECEIVE_BYTES];
        for _ in 0..MAX_PORTIONS {
            let length = socket::recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
            if take_portion(&buffer[..length], self.sequence, &mut objects)? {
                return Ok(objects);
            }
        }
        Err(io::Error::other("the kernel's answer does not end"))
    }
}

/// Adds the objects of one portion; true at the end of the answer.
fn take_portion(mut rest: &[u8], sequence: u32, objects: &mut Vec<Vec<u8>>) -> io::Result<bool> {
    while let Some(header) = rest.first_chunk::<HEADER_BYTES>() {
        let length = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
        let kind = u16::from_ne_bytes([header[4], header[5]]);
        let answers = u32::from_ne_bytes([header[8], header[9], header[10], header[11]]);
        let Some(payload) = rest.get(HEADER_BYTES..length) else {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a netlink message is cut short"));
        };
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        match kind {
            _ if answers != sequence => {}
            NLMSG_DONE => return Ok(true),
            NLMSG_ERROR => {
                let code = payload.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
                return if code == 0 { Ok(true) } else { Err(io::Error::from_raw_os_error(-code)) };
            }
            _ => objects.push(payload.to_vec()),
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn attributes_are_found_again() {
        let body = Body::new(&[0; 8]).attribute(3, b"eth0\0").address(1, "192.0.2.1".parse().unwrap());
        assert_eq!(body.0.len() % 4, 0);
        assert_eq!(find_attribute(&body.0, 8, 3), Some(&b"eth0\0"[..]));
        assert_eq!(find_attribute(&body.0, 8, 1).and_then(to_address), "192.0.2.1".parse().ok());
        assert_eq!(find_attribute(&body.0, 8, 7), None);
    }

    #[test]
    fn loopback_is_in_the_dump() {
        let mut netlink = Netlink::new().unwrap();
        let addresses = netlink.dump(RTM_GETADDR, &Body::new(&[0; 8])).unwrap();
        let loopback = |message: &Vec<u8>| find_attribute(message, 8, 1).and_then(to_address);
        // A fresh network namespace may have no address at all; what there is must be readable.
        assert!(addresses.iter().all(|message| loopback(message).is_some()));
        let error = netlink.change(RTM_DELADDR, PLAIN, &Body::new(&[0; 8])).unwrap_err();
        assert!(error.raw_os_error().is_some());
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..100), fixed in 0usize..20) {
            find_attribute(&bytes, fixed, 1);
            let _ = take_portion(&bytes, 1, &mut Vec::new());
        }
    }
}
