//! The processors in ACPI: MADT entries, and for a machine whose number of vCPUs can change the devices by which Linux plugs them.
//!
//! ```text
//! \_SB.CPUS (ACPI0010)   region over the ports of `crate::cpu_hotplug`: S00_ … S3F_ (a byte each), NEXT, OST_
//!   SCAN   while NEXT has an event: CNTF(vCPU, 1 insert or 3 eject request)
//!   CNTF   Notify of the device with that number
//!   COST   packs the arguments of _OST into one dword
//!   C00_ … (ACPI0007)   _UID, _STA (reads Sxx_), _MAT (its MADT entry, enabled), _EJ0 (writes Sxx_), _OST
//! ```
//!
//! Possible vCPUs that are absent at boot are "online capable" in the MADT (ACPI 6.5, section 5.2.12.2): Linux drops entries that are
//! neither that nor enabled, and with them the room that it keeps for processors. `_MAT` says enabled even so, as
//! `acpi_get_phys_id` in drivers/acpi/processor_core.c wants it.

use acpi_tables::aml::{
    And, Arg, BufferData, Device, Equal, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule,
    If, Local, Method, MethodCall, Name, NotEqual, Notify, ONE, OpRegion, OpRegionSpace, Or, Path, Return,
    ShiftLeft, ShiftRight, Store, While, ZERO,
};
use acpi_tables::{Aml, AmlSink};

use super::layout;
use crate::cpu_hotplug;

/// MADT entry types (section 5.2.12).
const MADT_LAPIC: u8 = 0;
const MADT_X2APIC: u8 = 9;
const MADT_ENABLED: u32 = 1;
const MADT_ONLINE_CAPABLE: u32 = 2;
/// APIC ids from here on need an x2APIC entry.
const FIRST_X2APIC_ID: u32 = 255;
/// Notify values (section 5.6.6): what CNTF adds for an eject request, which is 3, to what it says for an insert, 1.
const NOTIFY_INSERT: u8 = 1;

/// The vCPUs that the tables describe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuShape {
    /// vCPUs from 0 on that are there when the guest boots.
    pub present: u32,
    /// Most that there can be.
    pub possible: u32,
    /// Whether their number can change, and the devices are needed.
    pub elastic: bool,
}

/// All MADT entries of processors.
pub fn madt_entries(shape: CpuShape) -> Vec<u8> {
    (0..shape.possible)
        .flat_map(|id| entry(id, if id < shape.present { MADT_ENABLED } else { MADT_ONLINE_CAPABLE }))
        .collect()
}

fn entry(id: u32, flags: u32) -> Vec<u8> {
    if id < FIRST_X2APIC_ID {
        let mut entry = vec![MADT_LAPIC, 8, id as u8, id as u8];
        entry.extend(flags.to_le_bytes());
        entry
    } else {
        let mut entry = vec![MADT_X2APIC, 16, 0, 0];
        [id, flags, id].into_iter().for_each(|word| entry.extend(word.to_le_bytes()));
        entry
    }
}

/// A name of four characters with the vCPU's number in it.
fn numbered(letter: char, id: u32) -> String {
    format!("{letter}{id:02X}_")
}

fn path(name: &str) -> Path {
    Path::new(name)
}

/// The container with one device per possible vCPU.
pub struct Processors {
    /// How many.
    pub possible: u32,
}

impl Processors {
    /// Registers, and names for what lies in them.
    fn registers(&self) -> [Box<dyn Aml>; 3] {
        let field = |access, fields| {
            let (lock, update) = (FieldLockRule::NoLock, FieldUpdateRule::WriteAsZeroes);
            Box::new(Field::new(path("CPUR"), access, lock, update, fields))
        };
        let reserved = |ports: u32| FieldEntry::Reserved(ports as usize * 8);
        let next = u32::from(cpu_hotplug::NEXT);
        let mut bytes: Vec<_> = (0..self.possible)
            .map(|id| {
                let mut name = [0; 4];
                name.copy_from_slice(numbered('S', id).as_bytes());
                FieldEntry::Named(name, 8)
            })
            .collect();
        if self.possible < next {
            bytes.push(reserved(next - self.possible));
        }
        bytes.push(FieldEntry::Named(*b"NEXT", 8));
        let words = vec![reserved(cpu_hotplug::OST.into()), FieldEntry::Named(*b"COSR", 32)];
        [
            Box::new(OpRegion::new(path("CPUR"), OpRegionSpace::SystemIO, &layout::CPU_PORT, &LENGTH)),
            field(FieldAccessType::Byte, bytes),
            field(FieldAccessType::DWord, words),
        ]
    }

    /// Gives every event to the device concerned. It ends because the monitor forgets an event when it is read.
    fn scan() -> Vec<u8> {
        aml(&Method::new(
            path("SCAN"),
            0,
            true,
            vec![
                &Store::new(&Local(0), &path("NEXT")),
                &While::new(
                    &NotEqual::new(&Local(0), &cpu_hotplug::NO_EVENT),
                    vec![
                        // Bit 6 becomes bit 1: 1 is an insert, 3 an eject request.
                        &ShiftRight::new(&Local(1), &Local(0), &6u8),
                        &ShiftLeft::new(&Local(1), &Local(1), &ONE),
                        &Or::new(&Local(1), &Local(1), &NOTIFY_INSERT),
                        &And::new(&Local(0), &Local(0), &(cpu_hotplug::NEXT_EJECT - 1)),
                        &MethodCall::new(path("CNTF"), vec![&Local(0), &Local(1)]),
                        &Store::new(&Local(0), &path("NEXT")),
                    ],
                ),
            ],
        ))
    }

    fn notify(&self) -> Vec<u8> {
        let branches: Vec<Raw> = (0..self.possible)
            .map(|id| {
                let device = path(&numbered('C', id));
                let (number, notify) = (id as u8, Notify::new(&device, &Arg(1)));
                Raw(aml(&If::new(&Equal::new(&Arg(0), &number), vec![&notify, &Return::new(&ZERO)])))
            })
            .collect();
        aml(&Method::new(path("CNTF"), 2, true, branches.iter().map(|raw| raw as &dyn Aml).collect()))
    }

    fn ost() -> Vec<u8> {
        let low = |argument| And::new(&Local(0), argument, &0xffu8);
        aml(&Method::new(
            path("COST"),
            3,
            true,
            vec![
                &low(&Arg(1)),
                &ShiftLeft::new(&Local(0), &Local(0), &8u8),
                &Or::new(&Local(0), &Local(0), &Arg(0)),
                &ShiftLeft::new(&Local(1), &Arg(2), &16u8),
                &Or::new(&Local(0), &Local(0), &Local(1)),
                &Store::new(&path("COSR"), &Local(0)),
            ],
        ))
    }
}

const LENGTH: u8 = cpu_hotplug::LENGTH as u8;

fn aml(term: &dyn Aml) -> Vec<u8> {
    let mut out = Vec::new();
    term.to_aml_bytes(&mut out);
    out
}

/// AML that has been made before.
struct Raw(Vec<u8>);
impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

impl Aml for Processors {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let devices: Vec<Processor> = (0..self.possible).map(Processor).collect();
        let registers = self.registers();
        let methods = [Raw(Self::scan()), Raw(self.notify()), Raw(Self::ost())];
        let (hid, uid) = (Name::new(path("_HID"), &"ACPI0010"), Name::new(path("_UID"), &ZERO));
        let mut children: Vec<&dyn Aml> = vec![&hid, &uid];
        children.extend(registers.iter().map(|term| &**term));
        children.extend(methods.iter().map(|term| term as &dyn Aml));
        children.extend(devices.iter().map(|term| term as &dyn Aml));
        Device::new(path("CPUS"), children).to_aml_bytes(sink);
    }
}

/// The device of one vCPU.
struct Processor(u32);
impl Aml for Processor {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let (number, status) = (self.0 as u8, numbered('S', self.0));
        Device::new(
            path(&numbered('C', self.0)),
            vec![
                &Name::new(path("_HID"), &"ACPI0007"),
                &Name::new(path("_UID"), &number),
                &Name::new(path("_MAT"), &BufferData::new(entry(self.0, MADT_ENABLED))),
                &Method::new(path("_STA"), 0, false, vec![&Return::new(&path(&status))]),
                &Method::new(path("_EJ0"), 1, false, vec![&Store::new(&path(&status), &cpu_hotplug::EJECT)]),
                &Method::new(
                    path("_OST"),
                    3,
                    false,
                    vec![&MethodCall::new(path("COST"), vec![&number, &Arg(0), &Arg(1)])],
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}
