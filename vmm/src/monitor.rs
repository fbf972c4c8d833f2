//! Carries commands out and keeps the machine's phase: what is behind the control socket and the command line alike.
//!
//! ```text
//! Command + descriptors ─▶ phase::after ─▶ Machine ─▶ Answer | Refusal
//! Notices (vCPUs, devices) ───────────────▶ Machine ─▶ Events
//! ```
//!
//! Runs on the main thread only. Until `Start` the process has no other thread.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::arch::x86_64::image::ImageError;
use crate::control::definition::{Definition, Disk, Fds, Kind, Nic};
use crate::control::phase;
use crate::control::wire::{
    Answer, Command, DiskConfig, Event, ExitReason, NicConfig, OLDEST_VERSION, OnPanic, OnReboot, Phase,
    Refusal, Stats, Status, VERSION,
};
use crate::machine::{Machine, MachineError};
use crate::notices::{Halt, Notices, Taken};
use crate::panic;
use crate::sandbox::{self, Extra};

/// vsock listeners kept between `Define` and `Start`.
const MAX_EARLY_LISTENERS: usize = 64;

/// See the module.
pub struct Monitor {
    phase: Phase,
    exit: Option<ExitReason>,
    definition: Option<Definition>,
    machine: Option<Machine>,
    listeners: Vec<(u32, OwnedFd)>,
    notices: Arc<Notices>,
    on_reboot: OnReboot,
    on_panic: OnPanic,
    on_expiry: OnPanic,
    /// What the guest's kernel said when it panicked, until the next reset.
    panic: Option<String>,
    /// It was paused because its watchdog expired, until it goes on.
    expired: bool,
    reboots: u64,
    go_monotonic_nsec: u64,
    events: Vec<Event>,
    sandbox: Option<Extra>,
}

fn refusal(code: &str, message: impl ToString) -> Refusal {
    Refusal { code: code.to_owned(), message: message.to_string() }
}

impl From<MachineError> for Refusal {
    fn from(error: MachineError) -> Self {
        let code = match &error {
            MachineError::Kvm { .. } | MachineError::NotKvm(_) | MachineError::Memory(_) => "kvm",
            MachineError::Image(ImageError::TooBig { .. }) => "memory-too-small",
            MachineError::Image(_) => "kernel-image",
            MachineError::Host { .. } | MachineError::Stuck => "host",
            MachineError::Tables(_) | MachineError::Device(_) => "device",
            MachineError::Impossible(_) => "bad-request",
        };
        refusal(code, error)
    }
}

fn monotonic_nsec() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC);
    now.map_or(0, |t| t.tv_sec() as u64 * 1_000_000_000 + t.tv_nsec() as u64)
}

impl Monitor {
    /// Nothing defined yet.
    ///
    /// # Errors
    /// When there is no descriptor left.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self {
            phase: Phase::Empty,
            exit: None,
            definition: None,
            machine: None,
            listeners: Vec::new(),
            notices: Arc::new(Notices::new()?),
            on_reboot: OnReboot::default(),
            on_panic: OnPanic::default(),
            on_expiry: OnPanic::default(),
            panic: None,
            expired: false,
            reboots: 0,
            go_monotonic_nsec: 0,
            events: Vec::new(),
            sandbox: None,
        })
    }

    /// Filters the process's system calls from the end of `Start` on.
    #[must_use]
    pub fn sandboxed(mut self, extra: Extra) -> Self {
        self.sandbox = Some(extra);
        self
    }

    /// Where the machine is.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Why it is over, once it is.
    pub fn exit(&self) -> Option<&ExitReason> {
        self.exit.as_ref()
    }

    /// What vCPUs and devices say; its descriptor is readable when [`Monitor::on_notices`] should be called.
    pub fn notices(&self) -> &Notices {
        &self.notices
    }

    /// Events since the last call, in order.
    pub fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    fn enter(&mut self, phase: Phase) {
        if self.phase != phase {
            self.phase = phase;
            self.events.push(Event::Phase(phase));
        }
    }

    fn end(&mut self, reason: ExitReason) {
        if let Some(machine) = &mut self.machine {
            machine.stop();
        }
        self.enter(Phase::Ended);
        self.events.push(Event::Ended(reason.clone()));
        self.exit = Some(reason);
    }

    /// Carries one command out.
    ///
    /// # Errors
    /// Why not; nothing was changed then, except that a failed `Start` goes back to `Empty` because the descriptors are used up.
    pub fn execute(&mut self, command: Command, fds: Vec<OwnedFd>) -> Result<Answer, Refusal> {
        let next = phase::after(self.phase, &command)?;
        let mut fds = Fds::new(fds);
        let answer = match command {
            Command::Hello {} => self.hello(),
            Command::Status {} => Answer::Status(Box::new(self.status())),
            Command::Stats {} => {
                Answer::Stats(self.machine.as_ref().map_or_else(Stats::default, Machine::stats))
            }
            Command::ConsoleTail {} => {
                Answer::Console { text: self.machine.as_ref().map(Machine::console_tail).unwrap_or_default() }
            }
            Command::Define(config) => {
                let definition = Definition::new(&config, fds)?;
                self.on_reboot = definition.on_reboot;
                self.on_panic = definition.on_panic;
                self.on_expiry = definition.watchdog.unwrap_or_default();
                self.definition = Some(definition);
                Answer::Done {}
            }
            Command::Start {} => self.start()?,
            Command::Go {} | Command::Resume {} => {
                if self.go_monotonic_nsec == 0 {
                    self.go_monotonic_nsec = monotonic_nsec();
                }
                self.machine()?.run();
                self.expired = false;
                Answer::Done {}
            }
            Command::Pause {} => {
                self.machine()?.hold()?;
                Answer::Done {}
            }
            Command::PowerButton {} => {
                self.machine()?.press_power_button();
                Answer::Done {}
            }
            Command::PrepareCpus { count } => Answer::Cpus(self.machine()?.prepare_cpus(count)?),
            Command::SetCpus { count } => Answer::Cpus(self.machine()?.set_cpus(count)?),
            Command::SetPlugged { bytes } => Answer::Memory(self.machine()?.set_plugged(bytes)?),
            Command::SetBalloon { bytes } => Answer::Memory(self.machine()?.set_balloon(bytes)?),
            Command::AttachDisk(config) => self.attach_disk(&config, &mut fds)?,
            Command::AttachNic(config) => self.attach_nic(&config, &mut fds)?,
            Command::Detach { device } => {
                self.machine()?.detach(&device)?;
                Answer::Done {}
            }
            Command::GrowDisk { device } => self.grow_disk(&device)?,
            Command::SetDiskRates(rates) => {
                self.machine()?.devices().set_disk_rates(rates);
                Answer::DiskRates(rates)
            }
            Command::VsockListen { port, fd } => {
                let socket = fds.take("vsock listener", fd, Kind::Socket)?;
                self.listen(port, socket)?;
                Answer::Done {}
            }
            Command::ConsoleAttach { fd } => {
                let stream = fd.map(|index| fds.take("console", index, Kind::Stream)).transpose()?;
                self.attach_console(stream);
                Answer::Done {}
            }
            Command::Quit {} => {
                if self.exit.is_none() {
                    self.end(ExitReason::Quit);
                }
                Answer::Done {}
            }
        };
        self.enter(next);
        Ok(answer)
    }

    fn machine(&self) -> Result<&Machine, Refusal> {
        self.machine.as_ref().ok_or_else(|| refusal("wrong-phase", "there is no machine"))
    }

    fn machine_mut(&mut self) -> Result<&mut Machine, Refusal> {
        self.machine.as_mut().ok_or_else(|| refusal("wrong-phase", "there is no machine"))
    }

    fn attach_disk(&mut self, config: &DiskConfig, fds: &mut Fds) -> Result<Answer, Refusal> {
        let disk = Disk::take("disk", config, fds)?;
        Ok(Answer::Attached { device: self.machine_mut()?.attach_disk(disk)? })
    }

    fn attach_nic(&mut self, config: &NicConfig, fds: &mut Fds) -> Result<Answer, Refusal> {
        let nic = Nic::take("nic", config, fds)?;
        Ok(Answer::Attached { device: self.machine_mut()?.attach_nic(nic)? })
    }

    fn grow_disk(&self, device: &str) -> Result<Answer, Refusal> {
        let grown = self.machine()?.devices().grow_disk(device);
        Ok(Answer::DiskSize { bytes: grown.map_err(|e| refusal("device", e))? })
    }

    /// Ends the devices that the guest has let go, and tells.
    fn collect(&mut self) {
        let gone = self.machine.as_mut().map(Machine::collect).unwrap_or_default();
        self.events.extend(gone.into_iter().map(|device| Event::DeviceDetached { device }));
    }

    fn hello(&self) -> Answer {
        Answer::Hello {
            version: VERSION,
            oldest_version: OLDEST_VERSION,
            build: env!("CARGO_PKG_VERSION").to_owned(),
            phase: self.phase,
        }
    }

    fn status(&self) -> Status {
        Status {
            phase: self.phase,
            exit: self.exit.clone(),
            vcpu_tids: self.machine.as_ref().map(Machine::tids).unwrap_or_default(),
            reboots: self.reboots,
            panic: self.panic.clone(),
            watchdog_expired: self.expired,
            go_monotonic_nsec: self.go_monotonic_nsec,
            cpus: self.machine.as_ref().map(Machine::cpu_status),
            memory: self.machine.as_ref().map(Machine::memory_status),
            disk_rates: self.machine.as_ref().map(|machine| machine.devices().disk_rates()),
            disks: self.machine.as_ref().map(Machine::disks_status),
            nics: self.machine.as_ref().map(Machine::nics_status),
        }
    }

    fn start(&mut self) -> Result<Answer, Refusal> {
        let Some(definition) = self.definition.take() else {
            return Err(refusal("wrong-phase", "no machine is defined"));
        };
        let started = Machine::start(definition, self.notices.clone())
            .map_err(Refusal::from)
            .and_then(|machine| self.confine(machine));
        match started {
            Ok(machine) => {
                let vcpu_tids = machine.tids();
                self.machine = Some(machine);
                Ok(Answer::Started { vcpu_tids })
            }
            Err(refusal) => {
                self.listeners.clear();
                self.enter(Phase::Empty);
                Err(refusal)
            }
        }
    }

    /// What is left to do between the start and the first instruction of the guest.
    fn confine(&mut self, machine: Machine) -> Result<Machine, Refusal> {
        for (port, socket) in self.listeners.drain(..) {
            machine.devices().listen(port, socket).map_err(|e| refusal("device", e))?;
        }
        if let Some(extra) = self.sandbox {
            sandbox::enter(extra).map_err(|e| refusal("host", e))?;
        }
        Ok(machine)
    }

    fn listen(&mut self, port: u32, socket: OwnedFd) -> Result<(), Refusal> {
        if port == 0 || port == u32::MAX {
            return Err(refusal("bad-config", format!("vsock port {port}; 1 to 4294967294 are possible")));
        }
        if let Some(machine) = &self.machine {
            return machine.devices().listen(port, socket).map_err(|e| refusal("device", e));
        }
        self.listeners.retain(|(known, _)| *known != port);
        if self.listeners.len() >= MAX_EARLY_LISTENERS {
            let message = format!("more than {MAX_EARLY_LISTENERS} vsock listeners before the start");
            return Err(refusal("bad-config", message));
        }
        self.listeners.push((port, socket));
        Ok(())
    }

    fn attach_console(&mut self, stream: Option<OwnedFd>) {
        match (&self.machine, &mut self.definition) {
            (Some(machine), _) => machine.attach_console(stream),
            (None, Some(definition)) => definition.console = stream,
            (None, None) => {}
        }
    }

    /// Does what vCPUs and devices have asked for.
    pub fn on_notices(&mut self) {
        let Taken { halt, complaints, cpus, memory, devices, panicked, expired } = self.notices.take();
        if let Some(machine) = &self.machine {
            self.events.extend(cpus.then(|| Event::CpusChanged(machine.cpu_status())));
            self.events.extend(memory.then(|| Event::MemoryChanged(machine.memory_status())));
        }
        if devices {
            self.collect();
        }
        for complaint in complaints {
            self.events.push(Event::DeviceNeedsReset { device: complaint.device, reason: complaint.reason });
        }
        if self.exit.is_some() {
            return;
        }
        if panicked && self.panic.is_none() && self.on_guest_panic() {
            return;
        }
        if expired && halt.is_none() {
            self.expired = self.on_expiry == OnPanic::Pause;
            self.events.push(Event::WatchdogExpired {});
            if self.act(self.on_expiry, ExitReason::Watchdog) {
                return;
            }
        }
        // A reset plugs in what is missing by itself.
        let plugged =
            self.machine.as_ref().filter(|_| cpus && halt.is_none()).map(Machine::plug_missing_cpus);
        if let Some(Err(error)) = plugged {
            return self.end(ExitReason::Crash { message: format!("cannot plug a vCPU in again: {error}") });
        }
        match halt {
            None => {}
            Some(Halt::PowerOff) => self.end(ExitReason::PowerOff),
            Some(Halt::Crash(message)) => self.end(ExitReason::Crash { message }),
            Some(Halt::Reset) if self.on_reboot == OnReboot::End => self.end(ExitReason::Reboot),
            Some(Halt::Reset) => self.reboot(),
            Some(Halt::TripleFault) if self.on_reboot == OnReboot::End => self.end(ExitReason::TripleFault),
            Some(Halt::TripleFault) => {
                self.events.push(Event::TripleFault {});
                self.reboot();
            }
        }
    }

    /// Tells of the panic, once until the next reset however often the guest repeats it, and does what is configured. Says whether that
    /// was the end of the guest's present life, so that what it has done since counts no more.
    fn on_guest_panic(&mut self) -> bool {
        let Some(machine) = &self.machine else { return false };
        let message = panic::last_words(&machine.console_tail());
        self.panic = Some(message.clone());
        self.events.push(Event::GuestPanicked { message: message.clone() });
        self.act(self.on_panic, ExitReason::Panic { message })
    }

    /// Does what is configured for a guest in trouble; says whether that was the end of its present life.
    fn act(&mut self, what: OnPanic, reason: ExitReason) -> bool {
        let held = match what {
            OnPanic::Pause if self.phase == Phase::Running => self.machine.as_ref().map(Machine::hold),
            OnPanic::Report | OnPanic::Pause => None,
            OnPanic::Reboot => {
                self.reboot();
                return true;
            }
            OnPanic::End => {
                self.end(reason);
                return true;
            }
        };
        match held {
            None => false,
            Some(Ok(())) => {
                self.enter(Phase::Paused);
                false
            }
            Some(Err(error)) => {
                self.end(ExitReason::Crash { message: format!("cannot pause: {error}") });
                true
            }
        }
    }

    fn reboot(&mut self) {
        match self.machine.as_ref().map(Machine::restart) {
            None => {}
            Some(Ok(())) => {
                self.reboots += 1;
                self.collect();
                (self.panic, self.expired) = (None, false);
                self.events.push(Event::Rebooted {});
                // What happened while the vCPUs were being stopped belongs to the life before.
                let _ = self.notices.take();
                if let (Phase::Running, Some(machine)) = (self.phase, &self.machine) {
                    machine.run();
                }
            }
            Some(Err(error)) => {
                self.end(ExitReason::Crash { message: format!("cannot reboot: {error}") });
            }
        }
    }
}
