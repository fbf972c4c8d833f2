//! `lathe-vmm run`: opens the files itself, then goes the very way that lathed goes: define, start, go.

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicU32, Ordering};

use lathe_vmm::control::server::Server;
use lathe_vmm::control::wire::{
    Command, DiskConfig, DiskRates, Event, FdIndex, MachineConfig, NicConfig, OnReboot, VsockConfig,
};
use lathe_vmm::monitor::Monitor;
use lathe_vmm::sandbox::Extra;

use super::terminal::Terminal;
use super::{Failure, RunOptions, Unlink, listen, outcome};

/// TUNSETIFF and TUNSETVNETHDRSZ (linux/if_tun.h).
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const VNET_HEADER_BYTES: libc::c_int = 12;

/// The descriptors of one message in the making.
#[derive(Default)]
struct Handed(Vec<OwnedFd>);

impl Handed {
    fn add(&mut self, fd: impl Into<OwnedFd>) -> FdIndex {
        self.0.push(fd.into());
        (self.0.len() - 1) as FdIndex
    }
}

/// How often something is said: a guest that resets itself for ever neither fills a log nor blocks the monitor on a pipe that nobody reads.
const MAX_TOLD: u32 = 20;

/// Says on standard error what a person would wonder about otherwise. The guest's console may have the terminal in raw mode.
fn tell(event: &Event) {
    static TOLD: AtomicU32 = AtomicU32::new(0);
    let words = match event {
        Event::TripleFault {} => "the guest reset itself by a triple fault".to_owned(),
        Event::WatchdogExpired {} => "the guest's watchdog expired".to_owned(),
        Event::GuestPanicked { message } => format!("the guest's kernel panicked: {message}"),
        _ => return,
    };
    let told = TOLD.fetch_add(1, Ordering::Relaxed) + 1;
    if told > MAX_TOLD {
        return;
    }
    let last = if told == MAX_TOLD { "; no more is said of such things" } else { "" };
    let end = if io::stderr().is_terminal() { "\r\n" } else { "\n" };
    // Whoever closed standard error does not want to know.
    let _ = write!(io::stderr(), "lathe-vmm: {words}{last}{end}");
}

/// Opens a file, or says what is wrong with it.
pub fn open(what: &str, path: &str, write: bool) -> Result<File, Failure> {
    OpenOptions::new().read(true).write(write).open(path).map_err(|error| {
        let failure = Failure::new("cannot-open", format!("{what} {path}: {error}"));
        match (error.kind(), path) {
            (io::ErrorKind::PermissionDenied, "/dev/kvm") => {
                failure.fix("sudo usermod -aG kvm $USER, then log in again")
            }
            (io::ErrorKind::NotFound, "/dev/kvm") => {
                failure.fix("sudo modprobe kvm_intel || sudo modprobe kvm_amd")
            }
            (io::ErrorKind::PermissionDenied, _) => failure.fix(format!("ls -l {path}")),
            (io::ErrorKind::NotFound, _) if what == "disk" => {
                failure.fix(format!("truncate -s 10G {path}    makes an empty one"))
            }
            (io::ErrorKind::NotFound, _) => failure.fix("ls /boot    shows what this host boots from"),
            _ => failure,
        }
    })
}

/// `512M`, `2G`, `1048576`: bytes.
fn parse_amount(text: &str) -> Option<u64> {
    let (digits, shift) = match text.as_bytes().last()? {
        b'K' | b'k' => (&text[..text.len() - 1], 10),
        b'M' | b'm' => (&text[..text.len() - 1], 20),
        b'G' | b'g' => (&text[..text.len() - 1], 30),
        b'T' | b't' => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// Opens a queue of an existing tap.
pub fn open_tap(name: &str) -> Result<File, Failure> {
    let failed = |error: io::Error| {
        Failure::new("tap", format!("{name}: {error}")).fix(format!(
            "sudo ip tuntap add {name} mode tap vnet_hdr user $USER && sudo ip link set {name} up"
        ))
    };
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")
        .map_err(failed)?;
    // SAFETY: an all-zero ifreq is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(Failure::new("tap", format!("{name}: at most 15 bytes are possible")));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one ifreq.
    if unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request) } < 0 {
        return Err(failed(io::Error::last_os_error()));
    }
    let header = VNET_HEADER_BYTES;
    // SAFETY: TUNSETVNETHDRSZ reads one int.
    if unsafe { libc::ioctl(file.as_raw_fd(), TUNSETVNETHDRSZ, &raw const header) } < 0 {
        return Err(failed(io::Error::last_os_error()));
    }
    Ok(file)
}

/// A locally administered address that stays the same for the same tap.
fn mac_of(tap: &str) -> [u8; 6] {
    let hash =
        tap.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    let bytes = hash.to_le_bytes();
    [0x02, bytes[0], bytes[1], bytes[2], bytes[3], bytes[4]]
}

fn disk(handed: &mut Handed, text: &str) -> Result<DiskConfig, Failure> {
    let (path, read_only) = text.strip_suffix(",ro").map_or((text, false), |path| (path, true));
    Ok(DiskConfig { fd: handed.add(open("disk", path, !read_only)?), read_only, serial: String::new() })
}

fn vsock(handed: &mut Handed, text: &str) -> Result<(VsockConfig, String), Failure> {
    let usage = || {
        Failure::new("usage", format!("--vsock {text}: it must be CID,PATH")).fix("--vsock 3,/tmp/web.vsock")
    };
    let (cid, path) = text.split_once(',').ok_or_else(usage)?;
    let cid = cid.parse().map_err(|_| usage())?;
    let listener = UnixListener::bind(path)
        .map_err(|e| Failure::new("vsock", format!("cannot listen at {path}: {e}")))?;
    Ok((VsockConfig { cid, listener: Some(handed.add(listener)) }, path.to_owned()))
}

fn console(handed: &mut Handed, text: &str) -> Result<(Option<FdIndex>, Option<Terminal>), Failure> {
    match text {
        "none" => Ok((None, None)),
        "stdio" => {
            let (terminal, stream) = Terminal::open().map_err(|e| Failure::new("console", e))?;
            Ok((Some(handed.add(stream)), Some(terminal)))
        }
        path => {
            let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path);
            let file = file.map_err(|e| Failure::new("cannot-open", format!("console {path}: {e}")))?;
            Ok((Some(handed.add(file)), None))
        }
    }
}

/// See the module.
pub fn run(options: &RunOptions) -> Result<(), Failure> {
    let host = |error: io::Error| Failure::new("host", error);
    let amount = |option: &str, text: &str| {
        parse_amount(text).ok_or_else(|| {
            Failure::new("usage", format!("{option} {text}: no amount of memory"))
                .fix(format!("{option} 512M"))
        })
    };
    let memory_bytes = amount("--memory", &options.memory)?;
    let memory_max_bytes =
        options.memory_max.as_ref().map(|text| amount("--memory-max", text)).transpose()?;
    let mut handed = Handed::default();
    let kvm = handed.add(open("kvm", "/dev/kvm", true)?);
    let kernel = handed.add(open("kernel", &options.kernel, false)?);
    let initrd = match &options.initrd {
        Some(path) => Some(handed.add(open("initrd", path, false)?)),
        None => None,
    };
    let disks = options.disks.iter().map(|text| disk(&mut handed, text)).collect::<Result<_, _>>()?;
    let mut nics = Vec::with_capacity(options.taps.len());
    for tap in &options.taps {
        nics.push(NicConfig { tap: handed.add(open_tap(tap)?), mac: mac_of(tap), mtu: None });
    }
    let vsock = options.vsock.as_ref().map(|text| vsock(&mut handed, text)).transpose()?;
    let (vsock, vsock_path) = vsock.map_or((None, None), |(config, path)| (Some(config), Some(path)));
    let _unlink_vsock = Unlink(vsock_path);
    let listener = options.control.as_deref().map(listen).transpose()?;
    let _unlink_control = Unlink(options.control.clone());
    // Signals are blocked here, before the first thread: they belong to the server.
    let monitor = Monitor::new().map_err(host)?.sandboxed(Extra::Unlink);
    let mut server = Server::new(monitor, listener).map_err(host)?.telling(tell);
    let (console, mut terminal) = console(&mut handed, &options.console)?;
    let config = MachineConfig {
        kvm,
        cpus: options.cpus,
        cpus_max: options.cpus_max,
        memory_bytes,
        memory_max_bytes,
        balloon: options.balloon,
        hotplug_slots: options.hotplug_slots,
        kernel,
        initrd,
        cmdline: options.cmdline.clone(),
        console,
        disks,
        disk_rates: DiskRates::default(),
        nics,
        vsock,
        rng: true,
        on_reboot: if options.no_reboot { OnReboot::End } else { OnReboot::Reboot },
        on_panic: options.on_panic,
        watchdog: options.watchdog,
    };
    server.execute(Command::Define(Box::new(config)), handed.0)?;
    server.execute(Command::Start {}, Vec::new())?;
    server.execute(Command::Go {}, Vec::new())?;
    let reason = server.run().map_err(host)?;
    if let Some(terminal) = &mut terminal {
        terminal.finish();
    }
    outcome(&reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts() {
        assert_eq!(parse_amount("512M"), Some(512 << 20));
        assert_eq!(parse_amount("2G"), Some(2 << 30));
        assert_eq!(parse_amount("1048576"), Some(1 << 20));
        for wrong in ["", "M", "1.5G", "-1", "99999999T"] {
            assert_eq!(parse_amount(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn addresses_are_unicast_and_stable() {
        assert_eq!(mac_of("tap0"), mac_of("tap0"));
        assert_ne!(mac_of("tap0"), mac_of("tap1"));
        assert_eq!(mac_of("tap0")[0], 2);
    }
}
