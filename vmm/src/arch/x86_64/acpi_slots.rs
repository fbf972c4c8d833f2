//! PCI slots whose device can come and go, as children of the PCI root (ACPI 6.5, sections 6.1.1, 6.1.8 and 6.3.3; the registers
//! behind them are `crate::pci::hotplug`'s).
//!
//! ```text
//! PCI0   SLUP SLDN SLEJ     the registers
//!        SCAN               on an event: what has come gets a device check, what shall go an eject request
//!        S.. per slot       _ADR, _SUN, _EJ0; whether there is a device the guest sees in its configuration space
//! ```

use acpi_tables::aml::{
    And, Arg, Device, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, If, Local, Method,
    MethodCall, Name, Notify, OpRegion, OpRegionSpace, Path, Store,
};
use acpi_tables::{Aml, AmlSink};

use super::layout;
use crate::pci::{SLOTS, hotplug};

/// Notifications: device check, eject request (section 5.6.6).
const DEVICE_CHECK: u8 = 1;
const EJECT_REQUEST: u8 = 3;

/// The method that looks for what has happened.
pub const SCAN: &str = "\\_SB_.PCI0.SCAN";

/// The slots of this mask, bit n for slot n. Nothing at all when it is empty.
pub struct HotSlots(pub u32);

impl HotSlots {
    fn slots(&self) -> impl Iterator<Item = u8> {
        let mask = self.0;
        (0..SLOTS as u8).filter(move |slot| mask & (1 << slot) != 0)
    }
}

fn name_of(slot: u8) -> Path {
    Path::new(&format!("S{slot:03}"))
}

impl Aml for HotSlots {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        if self.0 == 0 {
            return;
        }
        let length = hotplug::LENGTH as u8;
        OpRegion::new(Path::new("SLTR"), OpRegionSpace::SystemIO, &layout::SLOT_PORT, &length)
            .to_aml_bytes(sink);
        let fields = [b"SLUP", b"SLDN", b"SLEJ"].map(|name| FieldEntry::Named(*name, 32)).into();
        let (access, lock, update) =
            (FieldAccessType::DWord, FieldLockRule::NoLock, FieldUpdateRule::WriteAsZeroes);
        Field::new(Path::new("SLTR"), access, lock, update, fields).to_aml_bytes(sink);
        for slot in self.slots() {
            HotSlot(slot).to_aml_bytes(sink);
        }
        let branches: Vec<Branch> = self.slots().map(Branch).collect();
        let branches = branches.iter().map(|branch| branch as &dyn Aml).collect();
        Method::new(Path::new("SNTF"), 2, true, branches).to_aml_bytes(sink);
        let scan = |register, event| Scan { register: Path::new(register), event };
        let (up, down) = (scan("SLUP", DEVICE_CHECK), scan("SLDN", EJECT_REQUEST));
        Method::new(Path::new("SCAN"), 0, true, vec![&up, &down]).to_aml_bytes(sink);
    }
}

/// Gives what a register says to SNTF.
struct Scan {
    register: Path,
    event: u8,
}
impl Aml for Scan {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        Store::new(&Local(0), &self.register).to_aml_bytes(sink);
        MethodCall::new(Path::new("SNTF"), vec![&Local(0), &self.event]).to_aml_bytes(sink);
    }
}

/// In SNTF: notifies one slot, if its bit is in the first argument.
struct Branch(u8);
impl Aml for Branch {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let bit = 1u32 << self.0;
        And::new(&Local(0), &Arg(0), &bit).to_aml_bytes(sink);
        If::new(&Local(0), vec![&Notify::new(&name_of(self.0), &Arg(1))]).to_aml_bytes(sink);
    }
}

/// The device of one slot.
struct HotSlot(u8);
impl Aml for HotSlot {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let (number, address, bit) = (self.0, u32::from(self.0) << 16, 1u32 << self.0);
        Device::new(
            name_of(number),
            vec![
                &Name::new(Path::new("_ADR"), &address),
                &Name::new(Path::new("_SUN"), &number),
                &Method::new(Path::new("_EJ0"), 1, true, vec![&Store::new(&Path::new("SLEJ"), &bit)]),
            ],
        )
        .to_aml_bytes(sink);
    }
}
