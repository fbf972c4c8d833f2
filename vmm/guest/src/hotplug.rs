//! Follows what is plugged in while the guest runs: the kernel's events over netlink, as udev has them.
//!
//! A new CPU is brought online (`SUBSYSTEM=cpu`), as the udev rules of some distributions do; a new virtio device gets its module where
//! there is no udev. Format: lib/kobject_uevent.c of the kernel, `add@PATH`, then `NAME=VALUE`, each ended by a zero. Events that user
//! space made the kernel repeat (`udevadm trigger`) are not plugging, and are left alone.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{self, AddressFamily, NetlinkAddr, SockFlag, SockProtocol, SockType};

use crate::resources::cpus;

/// The kernel's own multicast group; udev speaks in the next.
const KERNEL_GROUP: u32 = 1;
/// UEVENT_BUFFER_SIZE of the kernel is 2 KiB, the path in front of it comes on top.
const BUFFER_BYTES: usize = 8 * 1024;

/// What is of interest here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Plug {
    CpuAdded(u32),
    CpuRemoved,
    VirtioAdded,
}

/// The kernel's events from the moment of its making on.
pub struct Events(OwnedFd);

impl Events {
    /// Listens.
    ///
    /// # Errors
    /// When the kernel has no hotplug.
    pub fn new() -> io::Result<Self> {
        let socket = socket::socket(
            AddressFamily::Netlink,
            SockType::Datagram,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkKObjectUEvent,
        )?;
        socket::bind(socket.as_raw_fd(), &NetlinkAddr::new(0, KERNEL_GROUP))?;
        Ok(Self(socket))
    }

    /// Follows them for ever; `on_virtio` is told of new virtio devices.
    ///
    /// # Errors
    /// What the socket says.
    pub fn follow(&self, on_virtio: impl Fn()) -> io::Result<()> {
        let mut buffer = [0; BUFFER_BYTES];
        loop {
            let (length, sender) = match socket::recvfrom::<NetlinkAddr>(self.0.as_raw_fd(), &mut buffer) {
                Ok(received) => received,
                // Events were lost (ENOBUFS): what the host needs it asks for besides.
                Err(Errno::EINTR | Errno::ENOBUFS) => continue,
                Err(error) => return Err(error.into()),
            };
            if sender.is_none_or(|sender| sender.pid() != 0) {
                continue;
            }
            match parse(&buffer[..length.min(BUFFER_BYTES)]) {
                Some(Plug::CpuAdded(cpu)) => {
                    if let Err(error) = cpus::added(cpu) {
                        eprintln!("lathe-guest: CPU {cpu} was plugged in and does not come online: {error}");
                    }
                }
                Some(Plug::CpuRemoved) => cpus::removed(),
                Some(Plug::VirtioAdded) => on_virtio(),
                None => {}
            }
        }
    }
}

fn parse(event: &[u8]) -> Option<Plug> {
    let mut fields = event.split(|byte| *byte == 0).filter_map(|field| std::str::from_utf8(field).ok());
    let (action, path) = fields.next()?.split_once('@')?;
    let mut subsystem = None;
    for field in fields {
        match field.split_once('=') {
            Some(("SUBSYSTEM", name)) => subsystem = Some(name),
            Some(("SYNTH_UUID", _)) => return None,
            _ => {}
        }
    }
    match (subsystem?, action) {
        ("cpu", "add") => path.rsplit('/').next()?.strip_prefix("cpu")?.parse().ok().map(Plug::CpuAdded),
        ("cpu", "remove") => Some(Plug::CpuRemoved),
        ("virtio", "add") => Some(Plug::VirtioAdded),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn plugging_is_told_from_everything_else() {
        let cpu = b"add@/devices/system/cpu/cpu12\0ACTION=add\0DEVPATH=/devices/system/cpu/cpu12\0SUBSYSTEM=cpu\0SEQNUM=9\0";
        assert_eq!(parse(cpu), Some(Plug::CpuAdded(12)));
        for length in 0..cpu.len() - b"u\0SEQNUM=9\0".len() {
            assert_eq!(parse(&cpu[..length]), None, "cut at {length}");
        }
        let events: [(&[u8], Option<Plug>); 6] = [
            (b"remove@/devices/system/cpu/cpu12\0SUBSYSTEM=cpu\0", Some(Plug::CpuRemoved)),
            (b"add@/devices/pci0000:00/0000:00:05.0/virtio3\0SUBSYSTEM=virtio\0", Some(Plug::VirtioAdded)),
            (b"add@/devices/system/cpu/cpu12\0SUBSYSTEM=cpu\0SYNTH_UUID=0\0", None),
            (b"add@/devices/system/cpu/cpufreq\0SUBSYSTEM=cpu\0", None),
            (b"online@/devices/system/cpu/cpu12\0SUBSYSTEM=cpu\0", None),
            (b"libudev\0\xfe\xed\xca\xfe", None),
        ];
        for (event, expected) in events {
            assert_eq!(parse(event), expected, "{}", String::from_utf8_lossy(event));
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(event in prop::collection::vec(any::<u8>(), 0..300)) {
            parse(&event);
        }
    }
}
