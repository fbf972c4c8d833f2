//! Turns a [`MachineConfig`] and the descriptors that came with it into a validated [`Definition`].
//!
//! Everything that can be refused without touching KVM is refused here, with numbers and limits; a descriptor is checked to be
//! of the right kind by fstat(2) and used at most once.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;

use super::wire::{DiskConfig, DiskRates, FdIndex, MachineConfig, NicConfig, OnPanic, OnReboot, Refusal};
use crate::arch::x86_64::layout::{CMDLINE_MAX, MIB};
use crate::pci::SLOTS;

/// vCPUs of a machine, at most.
pub const MAX_CPUS: u32 = 64;
/// Guest memory in bytes, at least.
pub const MIN_MEMORY: u64 = 64 * MIB;
/// Guest memory in bytes, at most: what 46 bits of physical address leave with room to spare.
pub const MAX_MEMORY: u64 = 16 << 40;
/// Guest memory comes in pieces of this size.
pub const MEMORY_STEP: u64 = 2 * MIB;
/// A disk's serial in bytes, at most (virtio 1.2, section 5.2.6).
pub const SERIAL_MAX: usize = 20;

/// PCI slots for devices that come while the machine runs, at most.
pub const MAX_HOTPLUG_SLOTS: u8 = 16;

/// A disk with its descriptor.
#[derive(Debug)]
pub struct Disk {
    /// Regular file or block device.
    pub file: File,
    /// Refuses writes.
    pub read_only: bool,
    /// Serial.
    pub serial: String,
}

/// A network card with its descriptor.
#[derive(Debug)]
pub struct Nic {
    /// The tap's queue.
    pub tap: OwnedFd,
    /// Address.
    pub mac: [u8; 6],
    /// MTU told to the guest.
    pub mtu: Option<u16>,
}

/// vsock with its descriptor.
#[derive(Debug)]
pub struct Vsock {
    /// The guest's context id.
    pub cid: u32,
    /// Listening stream socket.
    pub listener: Option<OwnedFd>,
}

/// The devices of a machine.
#[derive(Debug, Default)]
pub struct Devices {
    /// In PCI order.
    pub disks: Vec<Disk>,
    /// In PCI order.
    pub nics: Vec<Nic>,
    /// At most one.
    pub vsock: Option<Vsock>,
    /// Entropy.
    pub rng: bool,
    /// What all disks together may do.
    pub disk_rates: DiskRates,
}

/// A machine as it shall be, with everything it is made from.
#[derive(Debug)]
pub struct Definition {
    /// `/dev/kvm`.
    pub kvm: OwnedFd,
    /// vCPUs at boot.
    pub cpus: u32,
    /// Most vCPUs, at least as many.
    pub cpus_max: u32,
    /// Whether the number of vCPUs can change: a most was given.
    pub cpus_elastic: bool,
    /// Guest memory at boot.
    pub memory_bytes: u64,
    /// Most guest memory, at least as much.
    pub memory_max_bytes: u64,
    /// With a virtio-balloon device.
    pub balloon: bool,
    /// PCI slots for disks and nics to come.
    pub hotplug_slots: u8,
    /// Kernel image.
    pub kernel: File,
    /// Initial RAM disk.
    pub initrd: Option<File>,
    /// Kernel command line.
    pub cmdline: String,
    /// The console's stream.
    pub console: Option<OwnedFd>,
    /// Devices.
    pub devices: Devices,
    /// What a reset does.
    pub on_reboot: OnReboot,
    /// What a panic of the guest's kernel does.
    pub on_panic: OnPanic,
    /// With a watchdog, and what it does when it expires.
    pub watchdog: Option<OnPanic>,
}

fn bad_config(message: String) -> Refusal {
    Refusal { code: "bad-config".to_owned(), message }
}

fn bad_descriptor(message: String) -> Refusal {
    Refusal { code: "bad-descriptor".to_owned(), message }
}

/// Kinds of descriptors by what fstat(2) says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Character device.
    CharDevice,
    /// Regular file or block device.
    Storage,
    /// Regular file.
    Regular,
    /// Socket.
    Socket,
    /// Anything that bytes can be written to: socket, pipe, terminal, file.
    Stream,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::CharDevice => "a character device",
            Self::Storage => "a regular file or block device",
            Self::Regular => "a regular file",
            Self::Socket => "a socket",
            Self::Stream => "a socket, pipe, terminal or file",
        }
    }
}

/// The descriptors of one message, each to be taken once.
pub struct Fds(Vec<Option<OwnedFd>>);

impl Fds {
    /// From a message.
    pub fn new(fds: Vec<OwnedFd>) -> Self {
        Self(fds.into_iter().map(Some).collect())
    }

    /// Takes the descriptor of this index, if it is of this kind.
    ///
    /// # Errors
    /// `bad-descriptor` when there is none, it was taken before, or is something else.
    pub fn take(&mut self, what: &str, index: FdIndex, kind: Kind) -> Result<OwnedFd, Refusal> {
        let count = self.0.len();
        let slot = self.0.get_mut(usize::from(index)).ok_or_else(|| {
            bad_descriptor(format!("{what}: descriptor {index} of a message with {count} descriptors"))
        })?;
        let fd =
            slot.take().ok_or_else(|| bad_descriptor(format!("{what}: descriptor {index} is used twice")))?;
        let file = File::from(fd);
        let found = file
            .metadata()
            .map_err(|e| bad_descriptor(format!("{what}: descriptor {index}: {e}")))?
            .file_type();
        let regular = found.is_file();
        let fits = match kind {
            Kind::CharDevice => found.is_char_device(),
            Kind::Storage => regular || found.is_block_device(),
            Kind::Regular => regular,
            Kind::Socket => found.is_socket(),
            Kind::Stream => regular || found.is_socket() || found.is_fifo() || found.is_char_device(),
        };
        if !fits {
            return Err(bad_descriptor(format!("{what}: descriptor {index} is not {}", kind.name())));
        }
        Ok(file.into())
    }
}

fn check_access(what: &str, fd: &impl AsRawFd, write: bool) -> Result<(), Refusal> {
    // SAFETY: F_GETFL reads the flags of a descriptor that is open.
    let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
    let mode = flags & libc::O_ACCMODE;
    let fits = flags >= 0 && (mode == libc::O_RDWR || (!write && mode == libc::O_RDONLY));
    if fits {
        return Ok(());
    }
    let wanted = if write { "reading and writing" } else { "reading" };
    Err(bad_descriptor(format!("{what}: its descriptor is not open for {wanted}")))
}

fn check_numbers(config: &MachineConfig) -> Result<(), Refusal> {
    if !(1..=MAX_CPUS).contains(&config.cpus) {
        return Err(bad_config(format!("{} vCPUs; 1 to {MAX_CPUS} are possible", config.cpus)));
    }
    let memory = config.memory_bytes;
    if !(MIN_MEMORY..=MAX_MEMORY).contains(&memory) || !memory.is_multiple_of(MEMORY_STEP) {
        return Err(bad_config(format!(
            "{memory} bytes of memory; a multiple of {MEMORY_STEP} from {MIN_MEMORY} to {MAX_MEMORY} is possible"
        )));
    }
    let cpus_max = config.cpus_max.unwrap_or(config.cpus);
    if !(config.cpus..=MAX_CPUS).contains(&cpus_max) {
        let least = config.cpus;
        return Err(bad_config(format!("at most {cpus_max} vCPUs; {least} to {MAX_CPUS} are possible")));
    }
    let most = config.memory_max_bytes.unwrap_or(memory);
    if !(memory..=MAX_MEMORY).contains(&most) || !most.is_multiple_of(MEMORY_STEP) {
        return Err(bad_config(format!(
            "at most {most} bytes of memory; a multiple of {MEMORY_STEP} from {memory} to {MAX_MEMORY} is possible"
        )));
    }
    let length = config.cmdline.len();
    if length > CMDLINE_MAX || config.cmdline.contains('\0') {
        return Err(bad_config(format!(
            "a kernel command line of {length} bytes; at most {CMDLINE_MAX} without NUL are possible"
        )));
    }
    let devices = config.disks.len()
        + config.nics.len()
        + usize::from(config.vsock.is_some())
        + usize::from(config.rng)
        + usize::from(config.balloon)
        + usize::from(config.watchdog.is_some())
        + usize::from(most > memory);
    let slots = config.hotplug_slots;
    if slots > MAX_HOTPLUG_SLOTS {
        return Err(bad_config(format!("{slots} slots for later; 0 to {MAX_HOTPLUG_SLOTS} are possible")));
    }
    if devices + usize::from(slots) >= SLOTS {
        let most = SLOTS - 1;
        return Err(bad_config(format!(
            "{devices} devices and {slots} slots for later; at most {most} together are possible"
        )));
    }
    Ok(())
}

impl Disk {
    /// Takes one disk's descriptor and checks everything; `what` names it in errors.
    ///
    /// # Errors
    /// `bad-config` or `bad-descriptor`.
    pub fn take(what: &str, config: &DiskConfig, fds: &mut Fds) -> Result<Self, Refusal> {
        if config.serial.len() > SERIAL_MAX || !config.serial.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(bad_config(format!(
                "{what}: serial {:?}; at most {SERIAL_MAX} printable ASCII bytes are possible",
                config.serial
            )));
        }
        let file = File::from(fds.take(what, config.fd, Kind::Storage)?);
        check_access(what, &file, !config.read_only)?;
        Ok(Self { file, read_only: config.read_only, serial: config.serial.clone() })
    }
}

impl Nic {
    /// Takes one nic's descriptor and checks everything; `what` names it in errors.
    ///
    /// # Errors
    /// `bad-config` or `bad-descriptor`.
    pub fn take(what: &str, config: &NicConfig, fds: &mut Fds) -> Result<Self, Refusal> {
        if config.mac[0] & 1 != 0 || config.mac == [0; 6] {
            return Err(bad_config(format!("{what}: {:02x?} is no unicast address", config.mac)));
        }
        if config.mtu.is_some_and(|mtu| mtu < 68) {
            return Err(bad_config(format!("{what}: MTU {:?}; 68 to 65535 are possible", config.mtu)));
        }
        let tap = fds.take(what, config.tap, Kind::CharDevice)?;
        Ok(Self { tap, mac: config.mac, mtu: config.mtu })
    }
}

fn take_disks(config: &MachineConfig, fds: &mut Fds) -> Result<Vec<Disk>, Refusal> {
    let numbered = config.disks.iter().enumerate();
    numbered.map(|(number, disk)| Disk::take(&format!("disk {number}"), disk, fds)).collect()
}

fn take_nics(config: &MachineConfig, fds: &mut Fds) -> Result<Vec<Nic>, Refusal> {
    let numbered = config.nics.iter().enumerate();
    numbered.map(|(number, nic)| Nic::take(&format!("nic {number}"), nic, fds)).collect()
}

impl Definition {
    /// Checks everything.
    ///
    /// # Errors
    /// `bad-config` or `bad-descriptor`, with what is wrong and what would be right.
    pub fn new(config: &MachineConfig, mut fds: Fds) -> Result<Self, Refusal> {
        check_numbers(config)?;
        let kvm = fds.take("kvm", config.kvm, Kind::CharDevice)?;
        let kernel = File::from(fds.take("kernel", config.kernel, Kind::Regular)?);
        check_access("kernel", &kernel, false)?;
        let initrd = match config.initrd {
            Some(index) => Some(File::from(fds.take("initrd", index, Kind::Regular)?)),
            None => None,
        };
        let console = match config.console {
            Some(index) => Some(fds.take("console", index, Kind::Stream)?),
            None => None,
        };
        let vsock = match &config.vsock {
            Some(vsock) => {
                if !(3..=0xffff_fffe).contains(&vsock.cid) {
                    return Err(bad_config(format!(
                        "vsock: cid {}; 3 to 4294967294 are possible",
                        vsock.cid
                    )));
                }
                let listener = match vsock.listener {
                    Some(index) => Some(fds.take("vsock", index, Kind::Socket)?),
                    None => None,
                };
                Some(Vsock { cid: vsock.cid, listener })
            }
            None => None,
        };
        let devices = Devices {
            disks: take_disks(config, &mut fds)?,
            nics: take_nics(config, &mut fds)?,
            vsock,
            rng: config.rng,
            disk_rates: config.disk_rates,
        };
        Ok(Self {
            kvm,
            cpus: config.cpus,
            cpus_max: config.cpus_max.unwrap_or(config.cpus),
            cpus_elastic: config.cpus_max.is_some(),
            memory_bytes: config.memory_bytes,
            memory_max_bytes: config.memory_max_bytes.unwrap_or(config.memory_bytes),
            balloon: config.balloon,
            hotplug_slots: config.hotplug_slots,
            kernel,
            initrd,
            cmdline: config.cmdline.clone(),
            console,
            devices,
            on_reboot: config.on_reboot,
            on_panic: config.on_panic,
            watchdog: config.watchdog,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::wire::DiskConfig;

    fn fd(path: &str) -> OwnedFd {
        File::open(path).unwrap().into()
    }

    fn config() -> MachineConfig {
        MachineConfig {
            kvm: 0,
            cpus: 1,
            cpus_max: None,
            memory_bytes: MIN_MEMORY,
            memory_max_bytes: None,
            balloon: false,
            hotplug_slots: 0,
            kernel: 1,
            initrd: None,
            cmdline: String::new(),
            console: None,
            disks: vec![],
            disk_rates: DiskRates::default(),
            nics: vec![],
            vsock: None,
            rng: false,
            on_reboot: OnReboot::Reboot,
            on_panic: OnPanic::Report,
            watchdog: None,
        }
    }

    fn refusal(config: &MachineConfig) -> Refusal {
        let fds = Fds::new(vec![fd("/dev/null"), tempfile::tempfile().unwrap().into()]);
        Definition::new(config, fds).unwrap_err()
    }

    #[test]
    fn numbers_out_of_range_are_refused_with_the_range() {
        assert!(refusal(&MachineConfig { cpus: 65, ..config() }).message.contains("65 vCPUs; 1 to 64"));
        assert_eq!(refusal(&MachineConfig { cpus: 0, ..config() }).code, "bad-config");
        for memory_bytes in [0, MIN_MEMORY - MEMORY_STEP, MIN_MEMORY + 1, u64::MAX] {
            assert_eq!(refusal(&MachineConfig { memory_bytes, ..config() }).code, "bad-config");
        }
        assert_eq!(refusal(&MachineConfig { cmdline: "x".repeat(2048), ..config() }).code, "bad-config");
        assert!(
            refusal(&MachineConfig { hotplug_slots: 17, ..config() }).message.contains("17 slots for later")
        );
        let disk = DiskConfig { fd: 1, read_only: true, serial: String::new() };
        let crowded = MachineConfig { hotplug_slots: 16, disks: vec![disk; 16], ..config() };
        assert!(refusal(&crowded).message.contains("16 devices and 16 slots for later; at most 31 together"));
    }

    #[test]
    fn descriptors_of_the_wrong_kind_missing_or_used_twice_are_refused() {
        assert!(refusal(&MachineConfig { kernel: 0, ..config() }).message.contains("used twice"));
        assert!(refusal(&MachineConfig { kernel: 9, ..config() }).message.contains("with 2 descriptors"));
        assert!(
            refusal(&MachineConfig { kvm: 1, kernel: 0, ..config() }).message.contains("kvm: descriptor 1")
        );
        let disk = DiskConfig { fd: 1, read_only: false, serial: String::new() };
        let fds = Fds::new(vec![fd("/dev/null"), fd("/etc/hostname"), fd("/etc/hostname")]);
        let wrong = MachineConfig { kernel: 2, disks: vec![disk], ..config() };
        assert!(
            Definition::new(&wrong, fds).unwrap_err().message.contains("not open for reading and writing")
        );
    }
}
