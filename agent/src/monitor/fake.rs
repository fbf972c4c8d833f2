//! A monitor without a machine: a thread that speaks the control protocol as `lathe-vmm` does.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;

use lathe_vmm::control::wire::{
    Answer, Command, CpuStatus, DiskConfig, DiskRates, DiskStatus, DisksStatus, Event, ExitReason,
    MachineConfig, MemoryStatus, Message, NicConfig, NicStatus, NicsStatus, Phase, Refusal, Reply, Request,
    Stats, Status, VERSION,
};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendFlags,
    SocketAddrUnix, SocketFlags, SocketType,
};

/// What a fake does differently.
#[derive(Clone, Debug, Default)]
pub(crate) struct Script {
    /// Refuses `Define` with this code.
    pub refuse_define: Option<String>,
    /// So many times it does not react to the power button.
    pub ignored_presses: usize,
    /// Goes away at this command.
    pub die_at: Option<&'static str>,
    /// Speaks this protocol version; otherwise the newest.
    pub protocol: Option<u32>,
    /// The guest neither plugs nor ejects nor inflates.
    pub deaf_guest: bool,
    /// Refuses to attach disks and nics.
    pub refuse_disks: bool,
    /// So many plugged bytes cannot be moved.
    pub pinned_bytes: u64,
    /// So many bytes can go into the balloon; otherwise all.
    pub balloon_most_bytes: Option<u64>,
}

/// What it has been told.
#[derive(Debug)]
pub(crate) struct Told {
    pub phase: Phase,
    pub config: Option<MachineConfig>,
    pub descriptors: Vec<OwnedFd>,
    pub commands: Vec<String>,
    pub cpus: Option<CpuStatus>,
    pub memory: Option<MemoryStatus>,
    pub disk_rates: Option<DiskRates>,
    pub disks: Vec<FakeDisk>,
    pub panic: Option<String>,
    pub expired: bool,
    pub stats: Stats,
    disk_number: usize,
    pub nics: Vec<FakeNic>,
    nic_number: usize,
    clients: Vec<OwnedFd>,
    /// Clients that are listened to.
    serving: usize,
    alive: bool,
}

/// A disk that a fake has.
#[derive(Debug)]
pub(crate) struct FakeDisk {
    pub status: DiskStatus,
    /// The guest shall let it go.
    pub asked: bool,
    file: OwnedFd,
}

impl FakeDisk {
    fn bytes(file: &OwnedFd) -> u64 {
        std::fs::File::from(file.try_clone().unwrap()).metadata().unwrap().len()
    }
}

/// A nic that a fake has.
#[derive(Debug)]
pub(crate) struct FakeNic {
    pub status: NicStatus,
    /// The guest shall let it go.
    pub asked: bool,
}

/// A listening fake monitor; it lives until it is told to quit, or [`FakeMonitor::die`].
#[derive(Clone)]
pub(crate) struct FakeMonitor {
    path: PathBuf,
    told: Arc<Mutex<Told>>,
}

impl FakeMonitor {
    pub(crate) fn listen(path: &Path, script: Script) -> Self {
        let listener =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .unwrap();
        let _ = std::fs::remove_file(path);
        rustix::net::bind(&listener, &SocketAddrUnix::new(path).unwrap()).unwrap();
        rustix::net::listen(&listener, 8).unwrap();
        let told = Told {
            phase: Phase::Empty,
            config: None,
            descriptors: Vec::new(),
            commands: Vec::new(),
            cpus: None,
            memory: None,
            disk_rates: None,
            disks: Vec::new(),
            panic: None,
            expired: false,
            stats: Stats::default(),
            disk_number: 0,
            nics: Vec::new(),
            nic_number: 0,
            clients: Vec::new(),
            serving: 0,
            alive: true,
        };
        let fake = Self { path: path.to_owned(), told: Arc::new(Mutex::new(told)) };
        let serving = fake.clone();
        thread::spawn(move || {
            // The one process of a monitor: clients one after the other would block, so each has a thread.
            while let Ok(client) = rustix::net::accept(&listener) {
                let mut told = serving.told.lock().unwrap();
                if !told.alive {
                    break;
                }
                told.clients.push(client.try_clone().unwrap());
                told.serving += 1;
                drop(told);
                let (fake, script) = (serving.clone(), script.clone());
                thread::spawn(move || {
                    fake.serve(&client, &script);
                    fake.told(|told| told.serving -= 1);
                });
            }
        });
        fake
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn told<T>(&self, look: impl FnOnce(&mut Told) -> T) -> T {
        look(&mut self.told.lock().unwrap())
    }

    pub(crate) fn is_alive(&self) -> bool {
        self.told(|told| told.alive)
    }

    /// Whether everything that clients said before they went has been carried out.
    pub(crate) fn has_heard_all(&self) -> bool {
        self.told(|told| told.serving == 0)
    }

    /// As `kill -9`: every connection ends, nothing is said.
    pub(crate) fn die(&self) {
        let _ = std::fs::remove_file(&self.path);
        self.told(|told| {
            told.alive = false;
            told.phase = Phase::Ended;
            told.descriptors.clear();
            told.disks.clear();
            told.nics.clear();
            for client in told.clients.drain(..) {
                let _ = rustix::net::shutdown(&client, rustix::net::Shutdown::Both);
            }
        });
    }

    /// Ends in order, as a machine that was powered off.
    pub(crate) fn end(&self, reason: ExitReason) {
        self.event(&Event::Ended(reason));
        self.die();
    }

    pub(crate) fn event(&self, event: &Event) {
        let packet = serde_json::to_vec(&Message::Event(event.clone())).unwrap();
        self.told(|told| {
            for client in &told.clients {
                send(client, &packet);
            }
        });
    }

    /// The guest of a fake does at once what it is asked to, as far as it can.
    pub(crate) fn guest_follows(&self, script: &Script) {
        let events = self.told(|told| {
            let mut events = Vec::new();
            if script.deaf_guest || told.phase != Phase::Running {
                return events;
            }
            if let Some(cpus) = &mut told.cpus
                && cpus.target < cpus.present
            {
                cpus.present = cpus.target;
                events.push(Event::CpusChanged(cpus.clone()));
            }
            if let Some(memory) = &mut told.memory {
                let before = *memory;
                let least = script.pinned_bytes.min(memory.plugged_bytes);
                memory.plugged_bytes = memory.requested_bytes.max(least);
                let most = script.balloon_most_bytes.unwrap_or(u64::MAX);
                memory.balloon_bytes = memory.balloon_target_bytes.min(most);
                (memory.plug_unread, memory.balloon_unread) = (false, false);
                if *memory != before {
                    events.push(Event::MemoryChanged(*memory));
                }
            }
            let gone = told.disks.extract_if(.., |disk| disk.asked);
            events.extend(gone.map(|disk| Event::DeviceDetached { device: disk.status.device }));
            let gone = told.nics.extract_if(.., |nic| nic.asked);
            events.extend(gone.map(|nic| Event::DeviceDetached { device: nic.status.device }));
            events
        });
        for event in &events {
            self.event(event);
        }
    }

    fn serve(&self, client: &OwnedFd, script: &Script) {
        let mut buffer = vec![0; 64 * 1024];
        loop {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(32))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::CMSG_CLOEXEC;
            let mut slices = [IoSliceMut::new(&mut buffer)];
            let Ok(received) = rustix::net::recvmsg(client, &mut slices, &mut ancillary, flags) else {
                return;
            };
            if received.bytes == 0 {
                return;
            }
            let mut descriptors = Vec::new();
            for message in ancillary.drain() {
                if let RecvAncillaryMessage::ScmRights(rights) = message {
                    descriptors.extend(rights);
                }
            }
            let request: Request = serde_json::from_slice(&buffer[..received.bytes]).unwrap();
            let name = name_of(&request.command);
            self.told(|told| told.commands.push(name.clone()));
            if script.die_at == Some(name.as_str()) {
                self.die();
                return;
            }
            let pressed =
                |told: &mut Told| told.commands.iter().filter(|name| *name == "power_button").count();
            let off = name == "power_button" && self.told(pressed) > script.ignored_presses;
            let quit = matches!(request.command, Command::Quit {});
            let result = self.told(|told| carry_out(told, request.command, descriptors, script));
            let reply = Message::Reply(Reply { v: 1, id: request.id, result });
            send(client, &serde_json::to_vec(&reply).unwrap());
            self.guest_follows(script);
            if off || quit {
                self.end(if quit { ExitReason::Quit } else { ExitReason::PowerOff });
                return;
            }
        }
    }
}

fn send(client: &OwnedFd, packet: &[u8]) {
    let mut ancillary = SendAncillaryBuffer::default();
    let _ =
        rustix::net::sendmsg(client.as_fd(), &[IoSlice::new(packet)], &mut ancillary, SendFlags::NOSIGNAL);
}

fn name_of(command: &Command) -> String {
    let value = serde_json::to_value(command).unwrap();
    value.as_object().unwrap().keys().next().unwrap().clone()
}

fn enter(told: &mut Told, phase: Phase) -> Result<Answer, Refusal> {
    told.phase = phase;
    Ok(Answer::Done {})
}

/// Has what this protocol version knows of.
fn start(told: &mut Told, script: &Script) -> Answer {
    told.phase = Phase::Ready;
    let config = told.config.clone().unwrap();
    for disk in &config.disks {
        let file = told.descriptors[usize::from(disk.fd)].try_clone().unwrap();
        plug(told, disk, file);
    }
    for nic in &config.nics {
        plug_nic(told, nic);
    }
    if script.protocol.unwrap_or(VERSION) >= 2 {
        told.cpus = Some(CpuStatus {
            possible: config.cpus_max.unwrap_or(config.cpus),
            target: config.cpus,
            present: config.cpus,
            refused: 0,
            vcpu_tids: vec![std::process::id() as i32; config.cpus as usize],
        });
        let memory_max = config.memory_max_bytes.unwrap_or(config.memory_bytes);
        told.memory = Some(MemoryStatus {
            boot_bytes: config.memory_bytes,
            pluggable_bytes: memory_max - config.memory_bytes,
            plug_driver: true,
            balloon_driver: true,
            ..MemoryStatus::default()
        });
    }
    if script.protocol.unwrap_or(VERSION) >= 3 {
        told.disk_rates = Some(config.disk_rates);
    }
    Answer::Started { vcpu_tids: vec![std::process::id() as i32] }
}

fn carry_out(
    told: &mut Told,
    command: Command,
    descriptors: Vec<OwnedFd>,
    script: &Script,
) -> Result<Answer, Refusal> {
    let refuse = |code: &str| Err(Refusal { code: code.to_owned(), message: format!("refused: {code}") });
    match (command, told.phase) {
        (Command::Hello {}, phase) => {
            let version = script.protocol.unwrap_or(VERSION);
            Ok(Answer::Hello { version, oldest_version: 1, build: "fake".to_owned(), phase })
        }
        (Command::Define(_), Phase::Empty) if script.refuse_define.is_some() => {
            refuse(script.refuse_define.as_deref().unwrap())
        }
        (Command::Define(config), Phase::Empty) => {
            told.phase = Phase::Defined;
            told.config = Some(*config);
            told.descriptors = descriptors;
            Ok(Answer::Done {})
        }
        (Command::Start {}, Phase::Defined) => Ok(start(told, script)),
        (Command::Go {}, Phase::Ready) => enter(told, Phase::Running),
        (Command::Pause {}, Phase::Running) => enter(told, Phase::Paused),
        (Command::Resume {}, Phase::Paused) => enter(told, Phase::Running),
        (Command::PowerButton {}, Phase::Paused) => refuse("wrong-phase"),
        (Command::Status {}, phase) => Ok(Answer::Status(Box::new(Status {
            phase,
            exit: None,
            vcpu_tids: vec![std::process::id() as i32],
            reboots: 0,
            panic: told.panic.clone(),
            watchdog_expired: told.expired,
            go_monotonic_nsec: 1,
            cpus: told.cpus.clone(),
            memory: told.memory,
            disk_rates: told.disk_rates,
            disks: (script.protocol.unwrap_or(VERSION) >= 3).then(|| disks_status(told)),
            nics: (script.protocol.unwrap_or(VERSION) >= 4).then(|| nics_status(told)),
        }))),
        (
            command @ (Command::AttachDisk(_)
            | Command::AttachNic(_)
            | Command::Detach { .. }
            | Command::GrowDisk { .. }),
            Phase::Running | Phase::Paused,
        ) => {
            let refused = Refusal { code: "device".to_owned(), message: "refused: device".to_owned() };
            change_devices(told, command, descriptors, script).ok_or(refused)
        }
        (
            command @ (Command::PrepareCpus { .. }
            | Command::SetCpus { .. }
            | Command::SetPlugged { .. }
            | Command::SetBalloon { .. }),
            Phase::Running | Phase::Paused,
        ) => reshape(told, command).ok_or_else(|| refuse("bad-request").unwrap_err()),
        (Command::SetDiskRates(rates), Phase::Running | Phase::Paused) if told.disk_rates.is_some() => {
            told.disk_rates = Some(rates);
            Ok(Answer::DiskRates(rates))
        }
        (Command::Stats {}, _) => Ok(Answer::Stats(told.stats.clone())),
        (Command::ConsoleTail {}, _) => Ok(Answer::Console { text: String::new() }),
        (Command::ConsoleAttach { .. }, phase) if phase != Phase::Empty => {
            told.descriptors.extend(descriptors);
            Ok(Answer::Done {})
        }
        (Command::PowerButton {} | Command::Quit {}, _) => Ok(Answer::Done {}),
        _ => refuse("wrong-phase"),
    }
}

/// A change of disks or nics; `None` when it makes no sense.
fn change_devices(
    told: &mut Told,
    command: Command,
    descriptors: Vec<OwnedFd>,
    script: &Script,
) -> Option<Answer> {
    let find =
        |told: &mut Told, device: String| told.disks.iter_mut().position(|disk| disk.status.device == device);
    match command {
        Command::AttachDisk(config) if !script.refuse_disks && disks_status(told).free > 0 => {
            Some(Answer::Attached { device: plug(told, &config, descriptors.into_iter().next()?) })
        }
        Command::AttachNic(config)
            if !script.refuse_disks && free_slots(told) > 0 && !descriptors.is_empty() =>
        {
            Some(Answer::Attached { device: plug_nic(told, &config) })
        }
        Command::Detach { device } if device.starts_with("net") => {
            told.nics.iter_mut().find(|nic| nic.status.device == device)?.asked = true;
            Some(Answer::Done {})
        }
        Command::Detach { device } => {
            let index = find(told, device)?;
            told.disks[index].asked = true;
            Some(Answer::Done {})
        }
        Command::GrowDisk { device } => {
            let index = find(told, device)?;
            let disk = &mut told.disks[index];
            disk.status.bytes = FakeDisk::bytes(&disk.file);
            Some(Answer::DiskSize { bytes: disk.status.bytes })
        }
        _ => None,
    }
}

/// A disk is there; answers what it is called.
fn plug(told: &mut Told, config: &DiskConfig, file: OwnedFd) -> String {
    let device = format!("block{}", told.disk_number);
    told.disk_number += 1;
    let (serial, bytes) = (config.serial.clone(), FakeDisk::bytes(&file));
    let status = DiskStatus { device: device.clone(), serial, bytes };
    told.disks.push(FakeDisk { status, asked: false, file });
    device
}

/// A nic is there; answers what it is called.
fn plug_nic(told: &mut Told, config: &NicConfig) -> String {
    let device = format!("net{}", told.nic_number);
    told.nic_number += 1;
    let status = NicStatus { device: device.clone(), mac: config.mac };
    told.nics.push(FakeNic { status, asked: false });
    device
}

fn free_slots(told: &Told) -> u32 {
    let slots =
        |config: &MachineConfig| config.disks.len() + config.nics.len() + usize::from(config.hotplug_slots);
    let most = told.config.as_ref().map_or(0, slots);
    most.saturating_sub(told.disks.len() + told.nics.len()) as u32
}

fn disks_status(told: &Told) -> DisksStatus {
    DisksStatus { disks: told.disks.iter().map(|disk| disk.status.clone()).collect(), free: free_slots(told) }
}

fn nics_status(told: &Told) -> NicsStatus {
    NicsStatus { nics: told.nics.iter().map(|nic| nic.status.clone()).collect(), free: free_slots(told) }
}

/// A change of shape; `None` when it makes no sense.
fn reshape(told: &mut Told, command: Command) -> Option<Answer> {
    match command {
        Command::PrepareCpus { count } => {
            let cpus = told.cpus.as_mut().filter(|cpus| (1..=cpus.possible).contains(&count))?;
            let threads = cpus.vcpu_tids.len().max(count as usize);
            cpus.vcpu_tids.resize(threads, std::process::id() as i32);
            Some(Answer::Cpus(cpus.clone()))
        }
        Command::SetCpus { count } => {
            let cpus = told.cpus.as_mut().filter(|cpus| (1..=cpus.possible).contains(&count))?;
            cpus.target = count;
            cpus.present = cpus.present.max(count);
            Some(Answer::Cpus(cpus.clone()))
        }
        Command::SetPlugged { bytes } => {
            let memory = told.memory.as_mut().filter(|memory| bytes <= memory.pluggable_bytes)?;
            memory.plug_unread |= memory.requested_bytes != bytes;
            memory.requested_bytes = bytes;
            bytes.is_multiple_of(2 << 20).then_some(Answer::Memory(*memory))
        }
        Command::SetBalloon { bytes } => {
            let memory = told.memory.as_mut()?;
            memory.balloon_unread |= memory.balloon_target_bytes != bytes;
            memory.balloon_target_bytes = bytes;
            (bytes < memory.boot_bytes + memory.plugged_bytes).then_some(Answer::Memory(*memory))
        }
        _ => None,
    }
}
