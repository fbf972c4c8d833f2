//! One machine: puts memory, interrupt controllers, devices and vCPUs together, and starts, stops and restarts them.
//!
//! ```text
//! start ─▶ (vCPU threads wait) ─go─▶ running ⇄ paused ─▶ stop
//!                                       └─ restart: devices reset, memory dropped, images read again, same threads
//! ```
//!
//! Everything comes from a [`Definition`]: nothing is opened here. The caller keeps the phases in order (`crate::control::phase`).

mod elastic;

use std::io;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use kvm_ioctls::{Kvm, VmFd};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryError};
use vmm_sys_util::epoll::Epoll;
use vmm_sys_util::eventfd::EventFd;

use crate::arch::x86_64::acpi_cpus::CpuShape;
use crate::arch::x86_64::image::{self, ImageError};
use crate::arch::x86_64::irq::{self, ControllerState};
use crate::arch::x86_64::{acpi, layout, params, regs};
use crate::bus::Bus;
use crate::console::Console;
use crate::control::definition::{Definition, Devices, Disk, Nic};
use crate::control::wire::{CpuStatus, DisksStatus, MemoryStatus, NicsStatus, Stats};
use crate::cpu_hotplug::{self, CpuHotplug};
use crate::device_thread::DeviceThread;
use crate::devices::{DeviceSet, MemoryDevices};
use crate::gate::{Gate, Wish};
use crate::memory::{self, MemoryError};
use crate::notices::Notices;
use crate::power::{self, PowerRegisters};
use crate::slots::{self, Slots};
use crate::vcpu::{Kicker, Shared};
use crate::vcpus::Vcpus;
use crate::virtio::{DeviceStats, Memory, VirtioDevice};

/// How long vCPU threads may take to stop or to be reset. They need microseconds, unless the host is badly overloaded.
const SETTLE_LIMIT: Duration = Duration::from_secs(30);
/// The version of KVM's interface, unchanged since 2007.
const KVM_API_VERSION: i32 = 12;

/// Why a machine could not be started or restarted.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// KVM refuses something.
    #[error("KVM cannot {what}: {source}")]
    Kvm {
        /// What was asked.
        what: &'static str,
        /// What it said.
        source: kvm_ioctls::Error,
    },
    /// The descriptor given as `/dev/kvm` is something else.
    #[error("the descriptor given as /dev/kvm has interface version {0}; {KVM_API_VERSION} is needed")]
    NotKvm(i32),
    /// The host gives no descriptor, thread or the like.
    #[error("the host cannot {what}: {source}")]
    Host {
        /// What was asked.
        what: &'static str,
        /// What it said.
        source: io::Error,
    },
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Guest memory is smaller than the boot protocol needs.
    #[error("boot tables do not fit into guest memory: {0}")]
    Tables(#[from] GuestMemoryError),
    /// Kernel or initial RAM disk.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A device.
    #[error("{0}")]
    Device(String),
    /// It is asked for more, or less, than there can be.
    #[error("{0}")]
    Impossible(String),
    /// vCPU threads did not stop.
    #[error("the vCPU threads did not stop within {} s", SETTLE_LIMIT.as_secs())]
    Stuck,
}

pub(crate) fn kvm(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> MachineError {
    move |source| MachineError::Kvm { what, source }
}

pub(crate) fn host(what: &'static str) -> impl Fn(io::Error) -> MachineError {
    move |source| MachineError::Host { what, source }
}

/// What the guest boots from, read again at each restart.
struct BootImages {
    kernel: std::fs::File,
    initrd: Option<std::fs::File>,
    cmdline: String,
    memory_bytes: u64,
    /// The number of vCPUs can change.
    elastic: bool,
    hot_slots: u32,
}

impl BootImages {
    /// Fills guest memory and returns the kernel's entry.
    fn load(&self, memory: &Memory, cpus: CpuShape) -> Result<u64, MachineError> {
        let memory = memory.memory();
        let kernel = image::load_kernel(&memory, self.memory_bytes, &self.kernel)?;
        let initrd = self
            .initrd
            .as_ref()
            .map(|file| image::load_initrd(&memory, self.memory_bytes, &kernel, file))
            .transpose()?;
        params::write(&memory, self.memory_bytes, &kernel, initrd, &self.cmdline)?;
        regs::write_boot_tables(&memory)?;
        acpi::write(&memory, cpus, self.hot_slots)?;
        Ok(kernel.entry)
    }
}

fn eventfd() -> Result<EventFd, MachineError> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(host("make an eventfd"))
}

/// See the module.
pub struct Machine {
    vm: Arc<VmFd>,
    memory: Memory,
    images: BootImages,
    controllers: ControllerState,
    shared: Arc<Shared>,
    vcpus: Vcpus,
    /// Guest code has run since the start or the last restart.
    ran: AtomicBool,
    devices: DeviceSet,
    slots: Slots,
    device_thread: DeviceThread,
    stopped: bool,
}

impl Machine {
    /// Makes everything; vCPU threads exist afterwards and wait for [`Machine::run`]. The definition is used up.
    ///
    /// # Errors
    /// When KVM, the host, an image or a device refuses; nothing is left then but memory mappings.
    pub fn start(definition: Definition, notices: Arc<Notices>) -> Result<Self, MachineError> {
        crate::vcpu::install_kick_handler().map_err(host("install a signal handler"))?;
        let shape = boot_shape(&definition);
        let kvm_system = open_kvm(definition.kvm)?;
        let vm = Arc::new(kvm_system.create_vm().map_err(kvm("create a machine"))?);
        let memory = boot_memory(&vm, definition.memory_bytes)?;
        irq::create_controllers(&vm).map_err(kvm("create interrupt controllers"))?;
        let parts = elastic::Parts { kvm: &kvm_system, vm: &vm, memory: &memory, notices: &notices };
        let (boot, most) = (definition.memory_bytes, definition.memory_max_bytes);
        let elastic = parts.devices(boot, most - boot, definition.balloon)?;
        let devices = make_devices(definition.devices, elastic, definition.hotplug_slots)?;
        let hot_slots = slots::hot_mask(&devices.all(), definition.hotplug_slots);
        let images = BootImages {
            kernel: definition.kernel,
            initrd: definition.initrd,
            cmdline: definition.cmdline,
            memory_bytes: definition.memory_bytes,
            elastic: definition.cpus_elastic,
            hot_slots,
        };
        let entry = images.load(&memory, shape)?;
        let epoll = Arc::new(Epoll::new().map_err(host("make an epoll descriptor"))?);
        let mut slots = Slots::new(&vm, memory.clone(), epoll.clone(), &notices);
        let pci = slots.bus(devices.all(), definition.watchdog.is_some(), hot_slots)?;
        let console = serial_console(&vm, definition.console)?;
        let (gate, kicker) = (Arc::new(Gate::default()), Arc::new(Kicker::default()));
        let power = Arc::new(PowerRegisters::new(event_line(vm.clone())));
        let parts = cpu_hotplug::Parts {
            gate: gate.clone(),
            kicker: kicker.clone(),
            power: power.clone(),
            notices: notices.clone(),
        };
        let bus = Bus {
            console,
            power,
            cpus: CpuHotplug::new(parts, shape.present, shape.possible),
            pci,
            pci_address: AtomicU32::new(0),
            notices: notices.clone(),
        };
        let device_thread = DeviceThread::start(epoll, slots.table(), bus.console.clone())
            .map_err(host("start the device thread"))?;
        let shared = Arc::new(Shared {
            gate,
            kicker,
            bus,
            notices,
            tsc_offset: OnceLock::new(),
            entry: AtomicU64::new(entry),
            exits: AtomicU64::new(0),
        });
        let controllers = ControllerState::capture(&vm).map_err(kvm("read interrupt controllers"))?;
        let vcpus = Vcpus::new(&kvm_system, &vm, &shared)?;
        let machine = Self {
            vm,
            memory,
            images,
            controllers,
            shared,
            vcpus,
            ran: AtomicBool::new(false),
            devices,
            slots,
            device_thread,
            stopped: false,
        };
        machine.vcpus.prepare(shape.present)?;
        machine.apply_reset_state()?;
        Ok(machine)
    }

    fn apply_reset_state(&self) -> Result<(), MachineError> {
        self.shared.gate.wish(Wish::Apply);
        if self.shared.gate.settled_within(SETTLE_LIMIT) { Ok(()) } else { Err(MachineError::Stuck) }
    }

    /// Thread ids of the vCPUs, in order, spare ones too.
    pub fn tids(&self) -> Vec<i32> {
        self.vcpus.tids()
    }

    /// Lets the vCPUs run guest code.
    pub fn run(&self) {
        self.ran.store(true, Ordering::Release);
        self.shared.notices.release_watch();
        self.shared.gate.wish(Wish::Run);
    }

    /// Stops the vCPUs between two instructions, and waits until they stand still.
    ///
    /// # Errors
    /// [`MachineError::Stuck`].
    pub fn hold(&self) -> Result<(), MachineError> {
        self.shared.hold();
        self.shared.notices.hold_watch();
        if self.shared.gate.settled_within(SETTLE_LIMIT) { Ok(()) } else { Err(MachineError::Stuck) }
    }

    /// Brings the machine back to the state before its first instruction; [`Machine::run`] starts it again. Devices that were
    /// attached stay, those that were asked to go are gone: what is to be told to [`Machine::collect`].
    ///
    /// # Errors
    /// When the images cannot be read any more, or KVM refuses.
    pub fn restart(&self) -> Result<(), MachineError> {
        self.hold()?;
        self.shared.bus.pci.eject_asked();
        self.shared.bus.pci.reset();
        self.shared.bus.power.reset();
        self.devices.withdraw_memory().map_err(|e| MachineError::Device(e.to_string()))?;
        memory::discard(&self.memory.memory()).map_err(host("drop guest memory"))?;
        // What was asked for holds from here on, whether the guest had answered or not.
        self.shared.bus.cpus.adopt(self.shared.bus.cpus.census().target);
        let entry = self.images.load(&self.memory, self.cpu_shape())?;
        self.shared.entry.store(entry, Ordering::Release);
        self.controllers.restore(&self.vm).map_err(kvm("reset interrupt controllers"))?;
        self.ran.store(false, Ordering::Release);
        self.apply_reset_state()
    }

    /// Presses the power button.
    ///
    pub fn press_power_button(&self) {
        self.shared.bus.power.raise(power::EVENT_POWER_BUTTON);
    }

    fn cpu_shape(&self) -> CpuShape {
        let cpus = &self.shared.bus.cpus;
        CpuShape { present: cpus.census().target, possible: cpus.possible(), elastic: self.images.elastic }
    }

    /// vCPUs now.
    pub fn cpu_status(&self) -> CpuStatus {
        let cpus = &self.shared.bus.cpus;
        let cpu_hotplug::Census { target, present, refused, .. } = cpus.census();
        let (possible, vcpu_tids) = (cpus.possible(), self.vcpus.tids());
        CpuStatus { possible, target, present: present.count_ones(), refused, vcpu_tids }
    }

    /// Memory now.
    pub fn memory_status(&self) -> MemoryStatus {
        let mut status = MemoryStatus { boot_bytes: self.images.memory_bytes, ..MemoryStatus::default() };
        self.devices.memory_status(&mut status);
        status
    }

    /// Makes the threads of vCPUs `0..count`; the guest is not told.
    ///
    /// # Errors
    /// [`MachineError::Impossible`] beyond what there can be; when KVM or the host refuses.
    pub fn prepare_cpus(&self, count: u32) -> Result<CpuStatus, MachineError> {
        self.check_cpus(count)?;
        self.vcpus.prepare(count)?;
        Ok(self.cpu_status())
    }

    fn check_cpus(&self, count: u32) -> Result<(), MachineError> {
        let most = self.shared.bus.cpus.possible();
        let least = if self.images.elastic { 1 } else { most };
        if (least..=most).contains(&count) {
            return Ok(());
        }
        Err(MachineError::Impossible(match self.images.elastic {
            true => format!("{count} vCPUs; 1 to {most} are possible"),
            false => format!("{count} vCPUs; the machine was made with {most} for good"),
        }))
    }

    /// Asks the guest to have vCPUs `0..count`.
    ///
    /// # Errors
    /// As [`Machine::prepare_cpus`].
    pub fn set_cpus(&self, count: u32) -> Result<CpuStatus, MachineError> {
        self.check_cpus(count)?;
        let ready = self.vcpus.renew(count, SETTLE_LIMIT)?;
        if self.ran.load(Ordering::Acquire) {
            self.shared.bus.cpus.aim(count, ready);
        } else {
            self.shared.bus.cpus.adopt(count);
            acpi::write(&self.memory.memory(), self.cpu_shape(), self.images.hot_slots)?;
        }
        Ok(self.cpu_status())
    }

    /// Plugs those vCPUs in again that the guest has ejected although they are wanted by now.
    ///
    /// # Errors
    /// As [`Machine::set_cpus`].
    pub fn plug_missing_cpus(&self) -> Result<(), MachineError> {
        let cpus = &self.shared.bus.cpus;
        let census = cpus.census();
        if census.missing != 0 {
            cpus.plug(self.vcpus.renew(census.target, SETTLE_LIMIT)?);
        }
        Ok(())
    }

    /// Asks the guest to plug this much.
    ///
    /// # Errors
    /// [`MachineError::Impossible`].
    pub fn set_plugged(&self, bytes: u64) -> Result<MemoryStatus, MachineError> {
        self.devices.set_plugged(bytes).map_err(MachineError::Impossible)?;
        Ok(self.memory_status())
    }

    /// Asks the guest to put this much into its balloon.
    ///
    /// # Errors
    /// [`MachineError::Impossible`].
    pub fn set_balloon(&self, bytes: u64) -> Result<MemoryStatus, MachineError> {
        let status = self.memory_status();
        let has = status.boot_bytes + status.plugged_bytes;
        if bytes >= has {
            let message = format!("{bytes} bytes in the balloon; the guest has {has}");
            return Err(MachineError::Impossible(message));
        }
        self.devices.set_balloon(bytes).map_err(MachineError::Impossible)?;
        Ok(self.memory_status())
    }

    fn attach(&mut self, device: Arc<Mutex<dyn VirtioDevice>>) -> Result<String, MachineError> {
        let name = device.lock().unwrap_or_else(PoisonError::into_inner).name().to_owned();
        if let Err(error) = self.slots.attach(&self.shared.bus.pci, device) {
            self.devices.remove(&name);
            return Err(error);
        }
        self.shared.bus.power.raise(power::EVENT_SLOTS);
        Ok(name)
    }

    /// Plugs a disk in; returns its name.
    ///
    /// # Errors
    /// When it cannot be a disk, or there is no slot or no ring for it.
    pub fn attach_disk(&mut self, disk: Disk) -> Result<String, MachineError> {
        let device = self.devices.add_disk(disk).map_err(MachineError::Device)?;
        self.attach(device)
    }

    /// Plugs a nic in; returns its name.
    ///
    /// # Errors
    /// When it cannot be a nic, or there is no slot for it.
    pub fn attach_nic(&mut self, nic: Nic) -> Result<String, MachineError> {
        let device = self.devices.add_nic(nic).map_err(MachineError::Device)?;
        self.attach(device)
    }

    /// Asks the guest to let a device go, again if need be.
    ///
    /// # Errors
    /// [`MachineError::Impossible`].
    pub fn detach(&self, name: &str) -> Result<(), MachineError> {
        self.slots.ask(&self.shared.bus.pci, name)?;
        self.shared.bus.power.raise(power::EVENT_SLOTS);
        Ok(())
    }

    /// Disks now, and how many more can come.
    pub fn disks_status(&self) -> DisksStatus {
        let (disks, spares) = self.devices.disks_status();
        let free = spares.min(self.shared.bus.pci.free_slots());
        DisksStatus { disks, free: u32::try_from(free).unwrap_or(u32::MAX) }
    }

    /// Nics now, and how many more can come.
    pub fn nics_status(&self) -> NicsStatus {
        let free = self.shared.bus.pci.free_slots();
        NicsStatus { nics: self.devices.nics_status(), free: u32::try_from(free).unwrap_or(u32::MAX) }
    }

    /// Ends the devices that the guest has let go; returns their names.
    pub fn collect(&mut self) -> Vec<String> {
        let gone = self.slots.collect(&self.shared.bus.pci);
        gone.iter().for_each(|name| self.devices.remove(name));
        gone
    }

    /// The console's last output.
    pub fn console_tail(&self) -> String {
        self.shared.bus.console.tail()
    }

    /// Replaces the console's stream.
    pub fn attach_console(&self, stream: Option<OwnedFd>) {
        self.device_thread.unwatch_console();
        self.shared.bus.console.attach(stream);
        self.device_thread.watch_console();
    }

    /// The devices.
    pub fn devices(&self) -> &DeviceSet {
        &self.devices
    }

    /// Counters of devices and vCPUs.
    pub fn stats(&self) -> Stats {
        let mut stats = Stats { exits: self.shared.exits.load(Ordering::Relaxed), ..Stats::default() };
        for device in self.devices.stats() {
            match device {
                DeviceStats::Disk(disk) => stats.disks.push(disk),
                DeviceStats::Nic(nic) => stats.nics.push(nic),
                DeviceStats::None => {}
            }
        }
        stats
    }

    /// Ends all threads. Devices are reset first, so that what is in flight is finished.
    pub fn stop(&mut self) {
        self.stopped = true;
        self.vcpus.end();
        self.device_thread.stop();
        self.shared.bus.pci.reset();
        self.shared.bus.console.finish();
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if !self.stopped {
            self.stop();
        }
    }
}

/// The level of the event device's interrupt.
fn event_line(vm: Arc<VmFd>) -> power::Line {
    Box::new(move |high| {
        // Fails only without an interrupt controller, and it was made before.
        let _ = vm.set_irq_line(layout::GED_IRQ, high);
    })
}

fn open_kvm(fd: OwnedFd) -> Result<Kvm, MachineError> {
    // SAFETY: the descriptor is open and given up by its owner here; whether it is KVM's is asked next.
    let system = unsafe { Kvm::from_raw_fd(fd.into_raw_fd()) };
    match system.get_api_version() {
        KVM_API_VERSION => Ok(system),
        other => Err(MachineError::NotKvm(other)),
    }
}

fn boot_shape(definition: &Definition) -> CpuShape {
    CpuShape { present: definition.cpus, possible: definition.cpus_max, elastic: definition.cpus_elastic }
}

fn boot_memory(vm: &VmFd, bytes: u64) -> Result<Memory, MemoryError> {
    let memory = memory::create(&layout::ram_ranges(bytes))?;
    memory::register(vm, &memory)?;
    Ok(GuestMemoryAtomic::new(memory))
}

fn make_devices(devices: Devices, elastic: MemoryDevices, slots: u8) -> Result<DeviceSet, MachineError> {
    let mut devices = DeviceSet::new(devices, elastic).map_err(MachineError::Device)?;
    devices.prepare(slots);
    Ok(devices)
}

fn serial_console(vm: &VmFd, stream: Option<OwnedFd>) -> Result<Arc<Console>, MachineError> {
    let interrupt = eventfd()?;
    vm.register_irqfd(&interrupt, layout::SERIAL_IRQ).map_err(kvm("connect an interrupt"))?;
    Console::new(interrupt, stream).map(Arc::new).map_err(host("make an eventfd"))
}
