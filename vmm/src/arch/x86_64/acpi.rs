//! Hardware-reduced ACPI tables (ACPI 6.5, section 4.1): no fixed hardware, everything is a device in the DSDT.
//!
//! ```text
//! RSDP ─▶ XSDT ─▶ FADT ─▶ DSDT   \_SB: PWRB (power button), GED (events), PEVT (panics), COM1, PCI0, MBRD (ECAM), CPUS, \_S5
//!              ├▶ MADT           one LAPIC or x2APIC per possible vCPU, the IOAPIC
//!              └▶ MCFG           the ECAM
//! ```

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Equal, Field,
    FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Local, Memory32Fixed,
    Method, MethodCall, Name, Notify, ONE, OpRegion, OpRegionSpace, Or, Package, Path, ResourceTemplate,
    Return, Scope, Store, Uuid, ZERO,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace as GasSpace, GAS};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::acpi_cpus::{CpuShape, Processors, madt_entries};
use super::acpi_slots::{self, HotSlots};
use super::layout;
use crate::power;

const OEM_ID: [u8; 6] = *b"LATHE ";
const OEM_TABLE: [u8; 8] = *b"LATHEVMM";
const OEM_REVISION: u32 = 1;
/// IA-PC boot flags: no VGA, no CMOS clock (section 5.2.9.3); no 8042 follows from its bit being clear.
const BOOT_FLAGS_NO_VGA_NO_CMOS: u16 = (1 << 2) | (1 << 5);
/// MADT entry type (section 5.2.12).
const MADT_IOAPIC: u8 = 1;
/// _OSC: of what the guest wants to control it gets the PCI Express capability structure only.
const OSC_GRANTED: u8 = 0x10;

/// Writes all tables into guest memory and returns how many bytes they take. `hot_slots` are the PCI slots whose device can come
/// and go, bit n for slot n.
///
/// # Errors
/// When guest memory is smaller than the layout needs, which a validated configuration excludes.
pub fn write(memory: &GuestMemoryMmap, cpus: CpuShape, hot_slots: u32) -> Result<u64, GuestMemoryError> {
    let mut next = layout::ACPI_TABLES + 64;
    let mut place = |table: &[u8]| -> Result<u64, GuestMemoryError> {
        let address = next;
        next = (next + table.len() as u64 + 15) & !15;
        memory.write_slice(table, GuestAddress(address)).map(|()| address)
    };
    let dsdt = place(dsdt(cpus, hot_slots).as_slice())?;
    let fadt = place(&bytes(&fadt(dsdt)))?;
    let madt = place(madt(cpus).as_slice())?;
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE, OEM_REVISION);
    mcfg.add_ecam(layout::ECAM, 0, 0, 0);
    let mcfg = place(&bytes(&mcfg))?;
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE, OEM_REVISION);
    for table in [fadt, madt, mcfg] {
        xsdt.add_entry(table);
    }
    let xsdt = place(&bytes(&xsdt))?;
    memory.write_slice(&bytes(&Rsdp::new(OEM_ID, xsdt)), GuestAddress(layout::ACPI_TABLES))?;
    Ok(next - layout::ACPI_TABLES)
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut out = Vec::new();
    table.to_aml_bytes(&mut out);
    out
}

fn port(offset: u16) -> GAS {
    GAS::new(GasSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(layout::POWER_PORT + offset))
}

fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        // No fixed power and sleep buttons: the power button is a device.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = BOOT_FLAGS_NO_VGA_NO_CMOS.into();
    fadt.reset_reg = port(power::RESET);
    fadt.reset_value = power::RESET_VALUE;
    fadt.sleep_control_reg = port(power::SLEEP_CONTROL);
    fadt.sleep_status_reg = port(power::SLEEP_STATUS);
    fadt.finalize()
}

fn madt(cpus: CpuShape) -> Sdt {
    let mut madt = Sdt::new(*b"APIC", 44, 6, OEM_ID, OEM_TABLE, OEM_REVISION);
    madt.write_u32(36, layout::LAPIC);
    madt.append_slice(&madt_entries(cpus));
    madt.append_slice(&[MADT_IOAPIC, 12, 0, 0]);
    madt.append_slice(&layout::IOAPIC.to_le_bytes());
    madt.append_slice(&0u32.to_le_bytes());
    madt
}

fn dsdt(cpus: CpuShape, hot_slots: u32) -> Sdt {
    let mut aml = Vec::new();
    let events = EventDevice { cpus: cpus.elastic, slots: hot_slots != 0 };
    let (pci, processors) = (PciRoot { slots: HotSlots(hot_slots) }, Processors { possible: cpus.possible });
    let mut devices: Vec<&dyn Aml> = vec![&PowerButton, &events, &Panics, &SerialPort, &pci, &Motherboard];
    if cpus.elastic {
        devices.push(&processors);
    }
    Scope::new(Path::new("\\_SB_"), devices).to_aml_bytes(&mut aml);
    Name::new(Path::new("\\_S5_"), &Package::new(vec![&power::SLEEP_TYPE_OFF])).to_aml_bytes(&mut aml);
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM_ID, OEM_TABLE, OEM_REVISION);
    dsdt.append_slice(&aml);
    dsdt
}

struct PowerButton;
impl Aml for PowerButton {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        Device::new(
            Path::new("PWRB"),
            vec![
                &Name::new(Path::new("_HID"), &EISAName::new("PNP0C0C")),
                &Name::new(Path::new("_UID"), &ZERO),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// Generic event device (section 5.6.9): one interrupt, whose method reads what happened and notifies the device concerned.
struct EventDevice {
    /// There are processor devices.
    cpus: bool,
    /// There are PCI slots whose device can come and go.
    slots: bool,
}
impl Aml for EventDevice {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let offset = layout::POWER_PORT + power::EVENTS;
        let (button, cpus) = (Path::new("\\_SB_.PWRB"), Path::new("\\_SB_.CPUS.SCAN"));
        let (pressed, cpus) = (Notify::new(&button, &0x80u8), MethodCall::new(cpus, vec![]));
        let slots = MethodCall::new(Path::new(acpi_slots::SCAN), vec![]);
        let mut handled = vec![Handled { event: power::EVENT_POWER_BUTTON, by: &pressed }];
        if self.cpus {
            handled.push(Handled { event: power::EVENT_CPUS, by: &cpus });
        }
        if self.slots {
            handled.push(Handled { event: power::EVENT_SLOTS, by: &slots });
        }
        let register = Path::new("EVTS");
        let fetch = Store::new(&Local(0), &register);
        let mut method: Vec<&dyn Aml> = vec![&fetch];
        method.extend(handled.iter().map(|handled| handled as &dyn Aml));
        Device::new(
            Path::new("GED_"),
            vec![
                &Name::new(Path::new("_HID"), &"ACPI0013"),
                &Name::new(Path::new("_UID"), &ZERO),
                &Name::new(
                    Path::new("_CRS"),
                    &ResourceTemplate::new(vec![&Interrupt::new(true, false, false, false, layout::GED_IRQ)]),
                ),
                &OpRegion::new(Path::new("GEDR"), OpRegionSpace::SystemIO, &offset, &ONE),
                &Field::new(
                    Path::new("GEDR"),
                    FieldAccessType::Byte,
                    FieldLockRule::NoLock,
                    FieldUpdateRule::WriteAsZeroes,
                    vec![FieldEntry::Named(*b"EVTS", 8)],
                ),
                &Method::new(Path::new("_EVT"), 1, true, method),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// What `_EVT` does about one event bit.
struct Handled<'a> {
    event: u8,
    by: &'a dyn Aml,
}
impl Aml for Handled<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        And::new(&Local(1), &Local(0), &self.event).to_aml_bytes(sink);
        If::new(&Equal::new(&Local(1), &self.event), vec![self.by]).to_aml_bytes(sink);
    }
}

/// pvpanic; see `crate::panic`. Linux takes it for present only with a status (section 6.3.7: present, enabled, shown, functioning).
struct Panics;
impl Aml for Panics {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        Device::new(
            Path::new("PEVT"),
            vec![
                &Name::new(Path::new("_HID"), &"QEMU0001"),
                &Name::new(Path::new("_UID"), &ZERO),
                &Name::new(Path::new("_STA"), &0xfu8),
                &Name::new(
                    Path::new("_CRS"),
                    &ResourceTemplate::new(vec![&IO::new(layout::PANIC_PORT, layout::PANIC_PORT, 1, 1)]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

struct SerialPort;
impl Aml for SerialPort {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        Device::new(
            Path::new("COM1"),
            vec![
                &Name::new(Path::new("_HID"), &EISAName::new("PNP0501")),
                &Name::new(Path::new("_UID"), &ZERO),
                &Name::new(
                    Path::new("_CRS"),
                    &ResourceTemplate::new(vec![
                        &IO::new(layout::SERIAL_PORT, layout::SERIAL_PORT, 1, 8),
                        &Interrupt::new(true, true, false, false, layout::SERIAL_IRQ),
                    ]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// The PCI Express root: one bus, the window that BARs lie in, and a plain answer to `_OSC` (PCI Firmware 3.3, section 4.5).
struct PciRoot {
    slots: HotSlots,
}
impl Aml for PciRoot {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let window = AddressSpace::new_memory(
            AddressSpaceCacheable::NotCacheable,
            true,
            layout::HOLE_START as u32,
            (layout::PCI_WINDOW_END - 1) as u32,
            None,
        );
        Device::new(
            Path::new("PCI0"),
            vec![
                &Name::new(Path::new("_HID"), &EISAName::new("PNP0A08")),
                &Name::new(Path::new("_CID"), &EISAName::new("PNP0A03")),
                &Name::new(Path::new("_SEG"), &ZERO),
                &Name::new(Path::new("_BBN"), &ZERO),
                &Name::new(Path::new("_UID"), &ZERO),
                &Name::new(Path::new("_CCA"), &ONE),
                &Name::new(
                    Path::new("_CRS"),
                    &ResourceTemplate::new(vec![&AddressSpace::new_bus_number(0u16, 0u16), &window]),
                ),
                &Method::new(
                    Path::new("_OSC"),
                    4,
                    true,
                    vec![
                        &CreateDWordField::new(&Path::new("CDW1"), &Arg(3), &ZERO),
                        &If::new(
                            &Equal::new(&Arg(0), &Uuid::new("33DB4D5B-1FF7-401C-9657-7441C03DD766")),
                            vec![
                                &CreateDWordField::new(&Path::new("CDW3"), &Arg(3), &8u8),
                                &And::new(&Path::new("CDW3"), &Path::new("CDW3"), &OSC_GRANTED),
                                &Return::new(&Arg(3)),
                            ],
                        ),
                        &Or::new(&Path::new("CDW1"), &Path::new("CDW1"), &4u8),
                        &Return::new(&Arg(3)),
                    ],
                ),
                &self.slots,
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// Reserves the ECAM, without which Linux does not use it.
struct Motherboard;
impl Aml for Motherboard {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        Device::new(
            Path::new("MBRD"),
            vec![
                &Name::new(Path::new("_HID"), &EISAName::new("PNP0C02")),
                &Name::new(Path::new("_UID"), &ZERO),
                &Name::new(
                    Path::new("_CRS"),
                    &ResourceTemplate::new(vec![&Memory32Fixed::new(
                        true,
                        layout::ECAM as u32,
                        layout::ECAM_SIZE as u32,
                    )]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestMemoryMmap;

    fn table(memory: &GuestMemoryMmap, at: u64) -> Vec<u8> {
        let length: u32 = memory.read_obj(GuestAddress(at + 4)).unwrap();
        let mut out = vec![0; length as usize];
        memory.read_slice(&mut out, GuestAddress(at)).unwrap();
        out
    }

    const ELASTIC: CpuShape = CpuShape { present: 3, possible: 64, elastic: true };

    #[test]
    fn every_table_can_be_reached_and_has_a_right_checksum() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
        let size = write(&memory, ELASTIC, 0xfffe).unwrap();
        assert!(layout::ACPI_TABLES + size <= layout::ACPI_TABLES_END, "{size}");
        let mut rsdp = [0u8; 36];
        memory.read_slice(&mut rsdp, GuestAddress(layout::ACPI_TABLES)).unwrap();
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        let xsdt = table(&memory, u64::from_le_bytes(rsdp[24..32].try_into().unwrap()));
        let mut names = Vec::new();
        for entry in xsdt[36..].chunks(8) {
            let found = table(&memory, u64::from_le_bytes(entry.try_into().unwrap()));
            assert_eq!(found.iter().fold(0u8, |a, b| a.wrapping_add(*b)), 0);
            names.push(String::from_utf8(found[..4].to_vec()).unwrap());
            if names.last().unwrap() == "FACP" {
                let dsdt = table(&memory, u64::from_le_bytes(found[140..148].try_into().unwrap()));
                assert_eq!(&dsdt[..4], b"DSDT");
                assert_eq!(dsdt.iter().fold(0u8, |a, b| a.wrapping_add(*b)), 0);
            }
        }
        assert_eq!(names, ["FACP", "APIC", "MCFG"]);
    }

    #[test]
    fn absent_vcpus_are_online_capable_and_each_has_a_device_where_their_number_can_change() {
        let flags = |shape| -> Vec<u8> { madt_entries(shape).chunks(8).map(|entry| entry[4]).collect() };
        let devices = |shape: CpuShape| {
            dsdt(shape, 0).as_slice().windows(8).filter(|bytes| bytes == b"ACPI0007").count() as u32
        };
        assert_eq!(flags(CpuShape { possible: 5, ..ELASTIC }), [1, 1, 1, 2, 2]);
        assert_eq!(devices(ELASTIC), 64);
        let fixed = CpuShape { present: 4, possible: 4, elastic: false };
        assert_eq!((flags(fixed), devices(fixed)), (vec![1; 4], 0));
        let (small, large) = (dsdt(fixed, 0).as_slice().len(), dsdt(ELASTIC, 0).as_slice().len());
        assert!(large - small <= 64 * 128, "{} bytes per vCPU", (large - small) / 64);
    }

    #[test]
    fn slots_are_described_only_where_devices_can_come_and_go_and_cost_little() {
        let (fixed, few, many) = (dsdt(ELASTIC, 0), dsdt(ELASTIC, 0x3), dsdt(ELASTIC, 0xffff_0000));
        let ejects = |table: &Sdt| {
            let total = table.as_slice().windows(4).filter(|name| name == b"_EJ0").count();
            total - ELASTIC.possible as usize
        };
        assert_eq!((ejects(&fixed), ejects(&few), ejects(&many)), (0, 2, 16));
        assert!((many.as_slice().len() - few.as_slice().len()) / 14 <= 80);
    }
}
