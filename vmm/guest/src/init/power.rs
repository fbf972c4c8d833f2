//! The ACPI power button, through the kernel's generic netlink events: no input device, no extra module.
//!
//! Family `acpi_event`, group `acpi_mc_group` (drivers/acpi/event.c); button.ko reports `button/power`. Generic
//! netlink: linux/genetlink.h.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{self, AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType};

use crate::network::netlink::{Body, find_attribute};
use crate::{shutdown, sys};

const GENL_ID_CTRL: u16 = 16;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
const CTRL_ATTR_MCAST_GROUPS: u16 = 7;
const CTRL_ATTR_MCAST_GRP_ID: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
/// Netlink and generic netlink headers.
const HEADERS: usize = 16 + 4;
const ACPI_GENL_ATTR_EVENT: u16 = 1;
/// `struct acpi_genl_event`: class and bus id, 20 and 15 bytes, then two numbers.
const CLASS_BYTES: usize = 20;
const POWER_BUTTON: &[u8] = b"button/power";

/// Asks our own init to power off whenever the button is pressed.
///
/// # Errors
/// When the kernel has no ACPI events.
pub fn watch() -> io::Result<()> {
    let socket = subscribe()?;
    let mut buffer = [0; 4096];
    loop {
        let length = match socket::recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            Ok(length) => length,
            // Events were lost (ENOBUFS); the next press will be heard.
            Err(nix::errno::Errno::EINTR | nix::errno::Errno::ENOBUFS) => continue,
            Err(error) => return Err(error.into()),
        };
        if is_power_button(&buffer[..length]) {
            eprintln!("lathe-guest: power button");
            sys::kill(1, shutdown::SIGNAL_POWER_OFF)?;
        }
    }
}

fn is_power_button(message: &[u8]) -> bool {
    let class =
        find_attribute(message, HEADERS, ACPI_GENL_ATTR_EVENT).and_then(|event| event.get(..CLASS_BYTES));
    class.is_some_and(|class| class.starts_with(POWER_BUTTON))
}

fn subscribe() -> io::Result<OwnedFd> {
    let socket = socket::socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkGeneric,
    )?;
    socket::bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
    let body = Body::new(&[CTRL_CMD_GETFAMILY, 1, 0, 0]).attribute(CTRL_ATTR_FAMILY_NAME, b"acpi_event\0");
    let request = body.into_message(GENL_ID_CTRL, NLM_F_REQUEST, 1);
    socket::send(socket.as_raw_fd(), &request, MsgFlags::empty())?;
    let mut buffer = [0; 4096];
    let length = socket::recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
    let group = group(&buffer[..length])
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no ACPI events in this kernel"))?;
    sys::join_netlink_group(&socket, group)?;
    Ok(socket)
}

/// The only multicast group of the family.
fn group(answer: &[u8]) -> Option<u32> {
    let groups = find_attribute(answer, HEADERS, CTRL_ATTR_MCAST_GROUPS)?;
    let first = groups.get(4..)?;
    find_attribute(first, 0, CTRL_ATTR_MCAST_GRP_ID)?.try_into().ok().map(u32::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(class: &[u8]) -> Vec<u8> {
        let mut event = class.to_vec();
        event.resize(44, 0);
        Body::new(&[1, 1, 0, 0]).attribute(ACPI_GENL_ATTR_EVENT, &event).into_message(25, 0, 0)
    }

    #[test]
    fn only_the_power_button_powers_off() {
        let press = event(b"button/power");
        assert!(is_power_button(&press));
        assert!(!is_power_button(&event(b"button/lid")));
        for length in 0..press.len() {
            assert!(!is_power_button(&press[..length]), "cut at {length}");
        }
    }

    #[test]
    fn the_group_is_found_in_the_nested_answer() {
        let inner = Body::new(&[]).attribute(1, b"acpi_mc_group\0").attribute(2, &9u32.to_ne_bytes());
        let groups = Body::new(&[]).attribute(1, &inner.into_bytes());
        let answer = Body::new(&[1, 2, 0, 0])
            .attribute(CTRL_ATTR_FAMILY_NAME, b"acpi_event\0")
            .attribute(CTRL_ATTR_MCAST_GROUPS, &groups.into_bytes())
            .into_message(16, 0, 1);
        assert_eq!(group(&answer), Some(9));
        for length in 0..answer.len() - 4 {
            let _ = group(&answer[..length]);
        }
    }
}
