//! The tap queue (linux/Documentation/networking/tuntap.rst, drivers/net/tun.c).

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use super::super::iovecs::IoVecs;
use super::{HEADER_BYTES, feature};

/// Why a card cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// A system call on the descriptor failed.
    #[error("{device}: {call} failed on the tap descriptor: {source}")]
    Call {
        /// Name of the device.
        device: String,
        /// Which call.
        call: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// A tun/tap queue of another kind.
    #[error(
        "{device}: the tap has flags {flags:#06x}, but needs IFF_TAP, IFF_NO_PI and IFF_VNET_HDR ({NEEDED_FLAGS:#06x})"
    )]
    Flags {
        /// Name of the device.
        device: String,
        /// `ifr_flags`.
        flags: u16,
    },
    /// Not an address of one station.
    #[error("{device}: {mac:02x?} is no unicast address")]
    Mac {
        /// Name of the device.
        device: String,
        /// What was asked for.
        mac: [u8; 6],
    },
    /// Below what IPv4 demands.
    #[error("{device}: an MTU of {mtu} bytes is below 68")]
    Mtu {
        /// Name of the device.
        device: String,
        /// What was asked for.
        mtu: u16,
    },
}

const NEEDED_FLAGS: u16 = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as u16;
const USO: u32 = libc::TUN_F_USO4 | libc::TUN_F_USO6;

nix::ioctl_read_bad!(tun_get_iff, libc::TUNGETIFF, libc::ifreq);
nix::ioctl_write_ptr_bad!(tun_set_header_size, libc::TUNSETVNETHDRSZ, libc::c_int);
nix::ioctl_write_int_bad!(tun_set_offload, libc::TUNSETOFFLOAD);

/// One queue of a tap interface.
pub struct Tap {
    fd: OwnedFd,
    uso: bool,
    /// False where a socket stands in for it.
    real: bool,
}

impl Tap {
    /// Checks and sets up `fd`.
    ///
    /// # Errors
    /// When it is no tap queue of the needed kind.
    pub fn new(device: &str, fd: OwnedFd) -> Result<Self, NetError> {
        let failed = |call| {
            let device = device.to_owned();
            move |source: nix::Error| NetError::Call { device, call, source: source.into() }
        };
        let mut request = std::mem::MaybeUninit::<libc::ifreq>::zeroed();
        // SAFETY: the kernel writes one ifreq behind the pointer.
        unsafe { tun_get_iff(fd.as_raw_fd(), request.as_mut_ptr()) }.map_err(failed("TUNGETIFF"))?;
        // SAFETY: zeroed bytes are a valid ifreq, and so is what the kernel wrote over them.
        let request = unsafe { request.assume_init() };
        // SAFETY: the flags are what TUNGETIFF fills in; any bits are a valid c_short.
        let flags = unsafe { request.ifr_ifru.ifru_flags } as u16;
        if flags & NEEDED_FLAGS != NEEDED_FLAGS {
            return Err(NetError::Flags { device: device.to_owned(), flags });
        }
        let size = HEADER_BYTES as libc::c_int;
        // SAFETY: the kernel reads one int behind the pointer.
        unsafe { tun_set_header_size(fd.as_raw_fd(), &raw const size) }.map_err(failed("TUNSETVNETHDRSZ"))?;
        let set = super::super::set_nonblocking(&fd);
        set.map_err(|source| NetError::Call { device: device.to_owned(), call: "F_SETFL", source })?;
        let mut tap = Self { fd, uso: false, real: true };
        // USO came with Linux 6.2; older kernels refuse the unknown bits.
        tap.uso = tap.offload(libc::TUN_F_CSUM | USO).is_ok();
        tap.offload(0).map_err(failed("TUNSETOFFLOAD"))?;
        Ok(tap)
    }

    /// A datagram or packet socket that stands in for a tap: carries vnet headers and frames, ignores offloads.
    #[cfg(any(test, fuzzing))]
    #[allow(clippy::unwrap_used, reason = "whatever fails here fails a test")]
    pub fn stand_in(fd: OwnedFd) -> Self {
        super::super::set_nonblocking(&fd).unwrap();
        Self { fd, uso: false, real: false }
    }

    /// Whether UDP segmentation is known here.
    pub fn has_uso(&self) -> bool {
        self.uso
    }

    fn offload(&self, bits: u32) -> nix::Result<()> {
        if self.real {
            // SAFETY: the argument is an integer; no memory is touched.
            unsafe { tun_set_offload(self.fd.as_raw_fd(), bits as libc::c_int) }?;
        }
        Ok(())
    }

    /// Lets the tap hand over what the driver can take by the negotiated features.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn set_offload(&self, features: u64) -> nix::Result<()> {
        let pairs = [
            (feature::GUEST_TSO4, libc::TUN_F_TSO4),
            (feature::GUEST_TSO6, libc::TUN_F_TSO6),
            (feature::GUEST_ECN, libc::TUN_F_TSO_ECN),
            (feature::GUEST_USO4, libc::TUN_F_USO4),
            (feature::GUEST_USO6, libc::TUN_F_USO6),
        ];
        // Segmentation needs checksum offload (5.1.3.1), and ECN one of the TSOs.
        let checksum = features & feature::GUEST_CSUM != 0;
        let tso = features & (feature::GUEST_TSO4 | feature::GUEST_TSO6) != 0;
        let chosen =
            pairs.iter().filter(|(bit, _)| features & bit != 0 && (*bit != feature::GUEST_ECN || tso));
        let bits = chosen.fold(libc::TUN_F_CSUM, |bits, (_, tun)| bits | tun);
        self.offload(if checksum { bits } else { 0 })
    }

    /// Sends one frame with its header.
    ///
    /// # Errors
    /// What the kernel says; the frame is then lost.
    pub fn write(&self, pieces: &IoVecs) -> io::Result<()> {
        let pieces = pieces.as_slice();
        // SAFETY: the pieces are mapped guest memory (invariant of the list), which the kernel only reads.
        let sent = unsafe { libc::writev(self.fd.as_raw_fd(), pieces.as_ptr(), pieces.len() as libc::c_int) };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Receives one frame with its header into the pieces; returns its length, at most theirs.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn read(&self, pieces: &[libc::iovec]) -> io::Result<usize> {
        // SAFETY: the pieces are guest memory that its driver offered for writing, and the caller's spill buffer, all mapped
        // until the call returns.
        let got = unsafe { libc::readv(self.fd.as_raw_fd(), pieces.as_ptr(), pieces.len() as libc::c_int) };
        usize::try_from(got).map_err(|_| io::Error::last_os_error())
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}
