//! A tap's queue: the tun ioctls, which rtnetlink has no words for. The only unsafe code of this crate.
//!
//! The tap is **persistent**: its link, queues and rates stay when its descriptor is closed, so a monitor that starts
//! again finds them. It has one queue, and **one open file holds it at a time** (`tun_attach` answers EBUSY to a second,
//! Linux `drivers/net/tun.c`). The order of things follows:
//!
//! - at start, the agent opens the queue and passes the descriptor to the monitor (SCM_RIGHTS);
//! - the monitor keeps it, also in systemd's descriptor store. An agent that starts again **needs no descriptor**: it
//!   sees [`TapError::Busy`], which says that the machine runs on;
//! - when the monitor is gone, the queue is free (the link's carrier falls), and is opened again for the next one.
//!
//! Frames carry the 12-byte virtio header (`struct virtio_net_hdr_v1`, `IFF_VNET_HDR`). Offloads (`TUNSETOFFLOAD`) are the
//! monitor's, who knows what its guest negotiated: that ioctl needs no capability on an open queue.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use crate::name::IfName;

/// Where the kernel hands out queues.
const DEVICE: &str = "/dev/net/tun";
/// `struct virtio_net_hdr_v1`: with `num_buffers`, as virtio 1.x always has it (virtio 1.2, 5.1.6).
pub const VNET_HEADER_BYTES: i32 = 12;

/// A queue that was not opened.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The device cannot be opened.
    #[error("cannot open {DEVICE}; check: the tun module, and DeviceAllow= of this service")]
    Device(#[source] io::Error),
    /// Another process has the queue: the machine's monitor runs.
    #[error("the queue of {0} is held by another process")]
    Busy(IfName),
    /// There is no such tap.
    #[error("there is no tap {0}")]
    Missing(IfName),
    /// The kernel refused a step.
    #[error(
        "cannot {step} of {tap}; check: CAP_NET_ADMIN, and that no other kind of interface has this name"
    )]
    Step {
        /// The ioctl in words.
        step: &'static str,
        /// The tap.
        tap: IfName,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// Opens queues.
pub struct Tap;

impl Tap {
    /// Makes the tap if there is none, and opens its queue: persistent, non-blocking, closed on exec. `owner` may open it
    /// again without a capability.
    ///
    /// # Errors
    /// [`TapError::Busy`] if it exists and a process holds it.
    pub fn create(name: &IfName, owner: Option<u32>) -> Result<OwnedFd, TapError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(DEVICE)
            .map_err(TapError::Device)?;
        let step = |step| move |source| TapError::Step { step, tap: name.clone(), source };
        sys::attach(&file, name).map_err(|source| match source.raw_os_error() {
            Some(libc::EBUSY) => TapError::Busy(name.clone()),
            _ => TapError::Step { step: "open the queue", tap: name.clone(), source },
        })?;
        sys::set_header_size(&file, VNET_HEADER_BYTES).map_err(step("set the header size"))?;
        if let Some(uid) = owner {
            sys::set_owner(&file, uid).map_err(step("set the owner"))?;
        }
        sys::set_persistent(&file).map_err(step("make persistent the queue"))?;
        Ok(file.into())
    }

    /// Opens the queue of an existing tap, never makes one.
    ///
    /// # Errors
    /// [`TapError::Missing`], [`TapError::Busy`].
    pub fn open(name: &IfName) -> Result<OwnedFd, TapError> {
        if nix::net::if_::if_nametoindex(name.as_str()).is_err() {
            return Err(TapError::Missing(name.clone()));
        }
        Tap::create(name, None)
    }
}

/// The ioctls, each a safe function over an open file.
mod sys {
    use super::{AsRawFd, File, IfName, io};

    const TUN: u8 = b'T';
    const INT_BYTES: usize = size_of::<libc::c_int>();

    // `include/uapi/linux/if_tun.h`: all are declared with the size of an int, whatever they carry.
    nix::ioctl_write_ptr_bad!(tunsetiff, nix::request_code_write!(TUN, 202, INT_BYTES), libc::ifreq);
    nix::ioctl_write_int_bad!(tunsetpersist, nix::request_code_write!(TUN, 203, INT_BYTES));
    nix::ioctl_write_int_bad!(tunsetowner, nix::request_code_write!(TUN, 204, INT_BYTES));
    nix::ioctl_write_ptr_bad!(tunsetvnethdrsz, nix::request_code_write!(TUN, 216, INT_BYTES), libc::c_int);

    /// TUNSETIFF: makes the tap, or attaches to it.
    pub(super) fn attach(file: &File, name: &IfName) -> io::Result<()> {
        let mut ifr_name = [0; libc::IFNAMSIZ];
        // A name has at most 15 bytes, so the last byte stays zero.
        for (to, from) in ifr_name.iter_mut().zip(name.as_str().bytes()) {
            *to = from.cast_signed();
        }
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        let flags = libc::c_short::try_from(flags).map_err(io::Error::other)?;
        let request = libc::ifreq { ifr_name, ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: flags } };
        // SAFETY: TUNSETIFF reads and writes one `struct ifreq`; `request` is one, initialised, and outlives the call;
        // `file` keeps the descriptor open. The kernel reads `ifr_name`, terminated above, and `ifru_flags` only.
        unsafe { tunsetiff(file.as_raw_fd(), &raw const request) }?;
        Ok(())
    }

    /// TUNSETVNETHDRSZ.
    pub(super) fn set_header_size(file: &File, bytes: libc::c_int) -> io::Result<()> {
        // SAFETY: TUNSETVNETHDRSZ reads one int; `bytes` is one on this stack and outlives the call.
        unsafe { tunsetvnethdrsz(file.as_raw_fd(), &raw const bytes) }?;
        Ok(())
    }

    /// TUNSETOWNER.
    pub(super) fn set_owner(file: &File, uid: u32) -> io::Result<()> {
        // SAFETY: TUNSETOWNER takes its argument by value and touches no memory of this process.
        unsafe { tunsetowner(file.as_raw_fd(), uid.cast_signed()) }?;
        Ok(())
    }

    /// TUNSETPERSIST.
    pub(super) fn set_persistent(file: &File) -> io::Result<()> {
        // SAFETY: TUNSETPERSIST takes its argument by value and touches no memory of this process.
        unsafe { tunsetpersist(file.as_raw_fd(), 1) }?;
        Ok(())
    }
}
