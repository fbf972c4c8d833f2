//! `hostile SECONDS SEED` and `hostile balloon SECONDS`: a guest that lies, as root in Linux.
//!
//! The first goes past the drivers: random and half-right writes to the virtio registers (queues anywhere in memory, statuses in any order,
//! doorbells), to configuration space (BARs that move, MSI-X that leads nowhere) and to the ports of vCPU and slot hot-plug; whatever it
//! reads it writes back elsewhere. What becomes of the guest is its own matter.
//!
//! The second resets the balloon under its driver, which hears of nothing any more, and obeys in words: what it is asked to hold it says at
//! once that it holds, and gives no page away. The guest works on meanwhile. (Linux 6.12 falls over its own list of queues when the driver
//! is unbound and the device has no free page hints.)
//!
//! Registers: virtio 1.2, sections 4.1.4 and 5.5.4; ports: `layout.rs` of the monitor.

use std::arch::asm;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use lathe_tests::dice::Dice;
use nix::libc;

const VENDOR_VIRTIO: &str = "0x1af4";
const CAPABILITY_VENDOR: u8 = 9;
/// vCPU registers, slot registers, pvpanic, EVENTS of the power registers. The way to switch off is left out: that would be allowed.
const PORTS: [(u16, u16); 4] = [(0x640, 0x48), (0x6a0, 0x0c), (0x505, 1), (0x604, 4)];
/// A balloon: 0x1040 and its number (virtio 1.2, 4.1.2.1).
const DEVICE_BALLOON: &str = "0x1045";
/// Where the liar's empty rings are. Linux leaves the first MiB alone since 5.13, and nothing but zeros was ever here.
const RINGS: u64 = 0x4_0000;
const RING_BYTES: u64 = 0x1000;
/// How often the liar looks at what it is asked for.
const PACE: Duration = Duration::from_millis(50);
const STATUS_DRIVER_OK: u64 = 15;
/// Below this lie most guests' memory and everything that a queue may be said to be in.
const ADDRESSES: u64 = 1 << 30;

/// One virtio function: its configuration space and BAR 0.
struct Function {
    config: File,
    bar: *mut u8,
    length: u64,
    /// Offsets of common and notification registers and of the device's own in the BAR.
    common: u64,
    notify: u64,
    device: u64,
    replay: u32,
}

impl Function {
    fn open(folder: &Path) -> io::Result<Option<Self>> {
        if fs::read_to_string(folder.join("vendor"))?.trim() != VENDOR_VIRTIO {
            return Ok(None);
        }
        let both = |name: &str| File::options().read(true).write(true).open(folder.join(name));
        let (config, resource) = (both("config")?, both("resource0")?);
        let length = resource.metadata()?.len();
        // SAFETY: a new mapping of an open file; nothing of Rust lies in it, and it is never unmapped.
        let bar = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                resource.as_raw_fd(),
                0,
            )
        };
        if bar == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let (mut common, mut notify, mut device) = (0, 0, 0);
        let mut space = [0; 256];
        config.read_exact_at(&mut space, 0)?;
        let mut at = usize::from(space[0x34]);
        while at != 0 && at < 240 {
            if space[at] == CAPABILITY_VENDOR {
                let offset =
                    u32::from_le_bytes([space[at + 8], space[at + 9], space[at + 10], space[at + 11]]);
                match space[at + 3] {
                    1 => common = u64::from(offset),
                    2 => notify = u64::from(offset),
                    4 => device = u64::from(offset),
                    _ => {}
                }
            }
            at = usize::from(space[at + 1]);
        }
        Ok(Some(Self { config, bar: bar.cast(), length, common, notify, device, replay: 0 }))
    }

    fn read(&self, offset: u64) -> u32 {
        let offset = offset % (self.length - 8);
        // SAFETY: within the mapping, whose length is that of the file.
        let place = unsafe { self.bar.add(offset as usize) };
        let read: u32;
        // SAFETY: as above; 4 bytes fit there, and the device behind it takes any alignment.
        unsafe { asm!("mov {:e}, [{}]", out(reg) read, in(reg) place) };
        read
    }

    fn write(&mut self, offset: u64, bytes: u64, value: u64) {
        let offset = offset % (self.length - 8);
        // SAFETY: within the mapping, whose length is that of the file.
        let place = unsafe { self.bar.add(offset as usize) };
        match bytes {
            // SAFETY: as above; 8 bytes fit there, and the device behind it takes any width and alignment.
            1 => unsafe { asm!("mov [{}], {}", in(reg) place, in(reg_byte) value as u8) },
            // SAFETY: likewise.
            2 => unsafe { asm!("mov [{}], {:x}", in(reg) place, in(reg) value as u16) },
            // SAFETY: likewise.
            4 => unsafe { asm!("mov [{}], {:e}", in(reg) place, in(reg) value as u32) },
            // SAFETY: likewise.
            _ => unsafe { asm!("mov [{}], {}", in(reg) place, in(reg) value) },
        }
        let read = self.read(offset);
        // It goes somewhere else the next time.
        self.replay ^= read;
    }

    /// Set up as by a driver that asks for no feature, with `queues` queues in which nothing is ever available.
    fn set_up_idle(&mut self, queues: u64) {
        let common = self.common;
        for status in [0, 1, 3] {
            self.write(common + 0x14, 1, status);
        }
        // VIRTIO_F_VERSION_1 only.
        for select in [0, 1] {
            self.write(common + 0x08, 4, select);
            self.write(common + 0x0c, 4, select);
        }
        self.write(common + 0x14, 1, 11);
        for queue in 0..queues {
            self.write(common + 0x16, 2, queue);
            for (place, ring) in (3 * queue..).zip([0x20, 0x28, 0x30]) {
                self.write(common + ring, 4, RINGS + place * RING_BYTES);
                self.write(common + ring + 4, 4, 0);
            }
            self.write(common + 0x1c, 2, 1);
        }
        self.write(common + 0x14, 1, STATUS_DRIVER_OK);
    }

    /// A queue set up almost as a driver does, in memory that holds something else.
    fn set_up(&mut self, dice: &mut Dice) {
        let common = self.common;
        for status in [0, 1, 3] {
            self.write(common + 0x14, 1, status);
        }
        for select in [0, 1] {
            self.write(common + 0x08, 4, select);
            self.write(common + 0x0c, 4, if dice.below(2) == 0 { u64::MAX } else { select });
        }
        self.write(common + 0x14, 1, 11);
        for queue in 0..dice.below(4) {
            self.write(common + 0x16, 2, queue);
            self.write(common + 0x18, 2, 1 << dice.below(9));
            self.write(common + 0x1a, 2, dice.below(5));
            for ring in [0x20, 0x28, 0x30] {
                let address = dice.below(ADDRESSES) & !0xfff;
                self.write(common + ring, 4, address);
                self.write(common + ring + 4, 4, u64::from(dice.below(16) == 0));
            }
            self.write(common + 0x1c, 2, 1);
        }
        self.write(common + 0x14, 1, 15);
        self.ring(dice);
    }

    fn ring(&mut self, dice: &mut Dice) {
        for _ in 0..=dice.below(200) {
            let queue = dice.below(4);
            self.write(self.notify + queue * 4, 2, queue);
        }
    }

    fn act(&mut self, dice: &mut Dice) {
        let (offset, value) = (dice.roll(), dice.roll() ^ u64::from(self.replay));
        match dice.below(16) {
            0 => self.set_up(dice),
            1..=4 => self.ring(dice),
            5..=8 => self.write(self.common + offset % 64, 1 << dice.below(4), value),
            9 => {
                let at = [0x04, 0x10, 0x10, 0x3c, offset % 256][dice.below(5) as usize];
                // What may not be written is not.
                let _ = self.config.write_all_at(&value.to_le_bytes()[..1 << dice.below(3)], at);
                // Without decoding nothing more would arrive.
                let _ = self.config.write_all_at(&[6, 0], 4);
            }
            _ => self.write(offset, 1 << dice.below(4), value),
        }
    }
}

fn port_write(port: u16, bytes: u64, value: u64) {
    let (port, value) = (port, value as u32);
    match bytes {
        // SAFETY: iopl(3) is in force, and none of the ports reaches memory.
        1 => unsafe { asm!("out dx, al", in("dx") port, in("eax") value) },
        // SAFETY: likewise.
        2 => unsafe { asm!("out dx, ax", in("dx") port, in("eax") value) },
        // SAFETY: likewise.
        _ => unsafe { asm!("out dx, eax", in("dx") port, in("eax") value) },
    }
}

/// Everything on the PCI bus.
fn folders() -> io::Result<Vec<PathBuf>> {
    Ok(fs::read_dir("/sys/bus/pci/devices")?.flatten().map(|entry| entry.path()).collect())
}

fn lie_about_the_balloon(seconds: u64) -> io::Result<()> {
    let is_balloon = |folder: &PathBuf| {
        fs::read_to_string(folder.join("device")).is_ok_and(|text| text.trim() == DEVICE_BALLOON)
    };
    let missing = || io::Error::other("there is no balloon");
    let folder = folders()?.into_iter().find(is_balloon).ok_or_else(missing)?;
    let name = folder.file_name().ok_or_else(missing)?.to_string_lossy().into_owned();
    let mut balloon = Function::open(&folder)?.ok_or_else(missing)?;
    balloon.set_up_idle(2);
    println!("hostile: {name} is a balloon that lies");
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut said = 0;
    while Instant::now() < end {
        let asked = balloon.read(balloon.device);
        if asked != said {
            balloon.write(balloon.device + 4, 4, u64::from(asked));
            println!("hostile: it holds {asked} pages");
            said = asked;
        }
        let status = u64::from(balloon.read(balloon.common + 0x14) & 0xff);
        if status != STATUS_DRIVER_OK {
            return Err(io::Error::other(format!("the device's status is {status:#x}")));
        }
        std::thread::sleep(PACE);
    }
    Ok(())
}

fn main() -> io::Result<()> {
    let mut words = std::env::args().skip(1).peekable();
    let balloon = words.next_if(|word| word == "balloon").is_some();
    let mut numbers = words.map(|word| word.parse::<u64>().map_err(io::Error::other));
    let seconds = numbers.next().unwrap_or(Ok(10))?;
    if balloon {
        return lie_about_the_balloon(seconds);
    }
    attack(seconds, Dice(numbers.next().unwrap_or(Ok(1))?))
}

fn attack(seconds: u64, mut dice: Dice) -> io::Result<()> {
    let mut functions = Vec::new();
    for folder in folders()? {
        functions.extend(Function::open(&folder)?);
    }
    // SAFETY: raises this process's I/O privilege, nothing else.
    if unsafe { libc::iopl(3) } != 0 {
        return Err(io::Error::last_os_error());
    }
    println!("hostile: {} functions", functions.len());
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut acts = 0_u64;
    while Instant::now() < end {
        acts += 1;
        if dice.below(8) == 0 {
            let (first, length) = PORTS[dice.below(PORTS.len() as u64) as usize];
            port_write(first + dice.below(u64::from(length)) as u16, 1 << dice.below(3), dice.roll());
        } else if !functions.is_empty() {
            let index = dice.below(functions.len() as u64) as usize;
            functions[index].act(&mut dice);
        }
    }
    println!("hostile: {acts} acts");
    Ok(())
}
