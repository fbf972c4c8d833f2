//! Interrupt controllers: KVM's own LAPICs, IOAPIC and PIC, and the routing of global interrupts (GSIs).
//!
//! GSIs 0..24 are the IOAPIC's pins; the PIC is there because KVM makes the three together, but nothing is routed to it.
//! From 24 on each GSI carries one message-signalled interrupt: [`Router`] hands them out and keeps KVM's table, which can
//! only be replaced as a whole.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry, kvm_irqchip,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;

use super::layout;

/// Message-signalled interrupts of all devices together; KVM's table holds 4096 entries.
pub const MAX_MSI: u32 = 1024;

/// Makes the interrupt controllers. Before the first vCPU.
///
/// # Errors
/// What KVM says.
pub fn create_controllers(vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)?;
    vm.set_tss_address(layout::KVM_TSS)?;
    vm.create_irq_chip()?;
    // KVM's own table sends the lower GSIs to the PIC as well. Nobody has masked it when the guest starts, and its vectors begin at 0:
    // an event raised before the guest's driver is there would come as an exception.
    write_routes(vm, &BTreeMap::new())
}

/// Replaces KVM's table: the pins, then these messages.
fn write_routes(vm: &VmFd, messages: &BTreeMap<u32, Message>) -> Result<(), kvm_ioctls::Error> {
    let mut entries = Vec::with_capacity(layout::IOAPIC_PINS as usize + messages.len());
    for pin in 0..layout::IOAPIC_PINS {
        let mut entry =
            kvm_irq_routing_entry { gsi: pin, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
        entry.u.irqchip.irqchip = KVM_IRQCHIP_IOAPIC;
        entry.u.irqchip.pin = pin;
        entries.push(entry);
    }
    for (&gsi, message) in messages {
        let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
        entry.u.msi.address_lo = message.address as u32;
        entry.u.msi.address_hi = (message.address >> 32) as u32;
        entry.u.msi.data = message.data;
        entries.push(entry);
    }
    let table = KvmIrqRouting::from_entries(&entries).map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))?;
    vm.set_gsi_routing(&table)
}

/// What the controllers shared by all vCPUs hold just after creation.
pub struct ControllerState(Vec<kvm_irqchip>);

impl ControllerState {
    /// Reads it.
    ///
    /// # Errors
    /// What KVM says.
    pub fn capture(vm: &VmFd) -> Result<Self, kvm_ioctls::Error> {
        let mut chips = Vec::with_capacity(3);
        for chip_id in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC] {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            vm.get_irqchip(&mut chip)?;
            chips.push(chip);
        }
        Ok(Self(chips))
    }

    /// Restores it, when the guest has reset.
    ///
    /// # Errors
    /// What KVM says.
    pub fn restore(&self, vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
        self.0.iter().try_for_each(|chip| vm.set_irqchip(chip))
    }
}

/// Address and data of a message-signalled interrupt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Message {
    /// Where it is written to.
    pub address: u64,
    /// What is written.
    pub data: u32,
}

struct Routes {
    next: u32,
    /// Given back, below `next`.
    free: Vec<u32>,
    messages: BTreeMap<u32, Message>,
}

/// Hands out GSIs for message-signalled interrupts and keeps KVM's table of them.
pub struct Router {
    vm: Arc<VmFd>,
    routes: Mutex<Routes>,
}

impl Router {
    /// For a machine whose controllers exist.
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self {
            vm,
            routes: Mutex::new(Routes {
                next: layout::IOAPIC_PINS,
                free: Vec::new(),
                messages: BTreeMap::new(),
            }),
        }
    }

    /// A GSI of its own, until [`Router::release`]; `None` when all are taken.
    pub fn allocate(&self) -> Option<u32> {
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(gsi) = routes.free.pop() {
            return Some(gsi);
        }
        let gsi = routes.next;
        (gsi < layout::IOAPIC_PINS + MAX_MSI).then(|| {
            routes.next += 1;
            gsi
        })
    }

    /// Lets `fd` raise `message` as `gsi`. When this is the first message of the GSI, `fd` is connected to it.
    ///
    /// # Errors
    /// What KVM says.
    pub fn route(&self, gsi: u32, message: Message, fd: &EventFd) -> Result<(), kvm_ioctls::Error> {
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        match routes.messages.insert(gsi, message) {
            Some(old) if old == message => Ok(()),
            Some(_) => write_routes(&self.vm, &routes.messages),
            None => {
                write_routes(&self.vm, &routes.messages)?;
                self.vm.register_irqfd(fd, gsi)
            }
        }
    }

    /// Gives a GSI back. If it was connected, it was with `fd`, which is disconnected. KVM's table forgets it with the next change.
    pub fn release(&self, gsi: u32, fd: &EventFd) {
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        if routes.messages.remove(&gsi).is_some() {
            // It was registered so; if KVM thinks otherwise there is nothing left to undo.
            let _ = self.vm.unregister_irqfd(fd, gsi);
        }
        routes.free.push(gsi);
    }
}
