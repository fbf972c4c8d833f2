//! Gives signs of life to the machine's watchdog, if it has one: a guest that stands still stops giving them.
//!
//! The driver's own time-out, 30 s, stands (Documentation/watchdog/watchdog-api.rst of the kernel).

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;
use std::time::Duration;

use super::modules;

/// Intel's 6300ESB, as configuration space has it.
const ID: [(&str, &str); 2] = [("vendor", "0x8086"), ("device", "0x25ab")];
const DRIVER: &str = "i6300esb";
const DEVICE: &str = "/dev/watchdog";
/// A third of what the driver allows.
const PACE: Duration = Duration::from_secs(10);

/// Whether the PCI bus has one.
pub fn is_there() -> bool {
    is_among(Path::new("/sys/bus/pci/devices"))
}

fn is_among(folder: &Path) -> bool {
    let is_one = |entry: fs::DirEntry| {
        ID.iter().all(|(file, id)| {
            fs::read_to_string(entry.path().join(file)).is_ok_and(|text| text.trim() == *id)
        })
    };
    fs::read_dir(folder).into_iter().flatten().flatten().any(is_one)
}

/// Loads the driver and feeds it from now on.
///
/// # Errors
/// The driver is not packed or does not load; the device cannot be opened or written.
pub fn feed() -> io::Result<()> {
    modules::load_by_name(Path::new(modules::FOLDER), DRIVER)?;
    let mut device = File::options().write(true).open(DEVICE)?;
    loop {
        device.write_all(b"\0")?;
        std::thread::sleep(PACE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_known_by_vendor_and_device() {
        let bus = tempfile::tempdir().unwrap();
        assert!(!is_among(&bus.path().join("none")));
        for (slot, vendor, device) in [("0", "0x8086", "0x1237"), ("1", "0x1af4", "0x25ab")] {
            fs::create_dir(bus.path().join(slot)).unwrap();
            fs::write(bus.path().join(slot).join("vendor"), format!("{vendor}\n")).unwrap();
            fs::write(bus.path().join(slot).join("device"), format!("{device}\n")).unwrap();
        }
        assert!(!is_among(bus.path()));
        fs::write(bus.path().join("1/vendor"), "0x8086\n").unwrap();
        assert!(is_among(bus.path()));
    }
}
