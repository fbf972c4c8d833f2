//! What is parsed: control messages, kernel images, frames of the guest agent.

use std::fs::File;
use std::io::{Cursor, IoSlice};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use lathe_guest::protocol::{self, FrameKind, MAX_FRAME_BYTES};
use linux_loader::loader::bootparam::setup_header;
use nix::sys::socket::{AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryMmap};

use super::memfd;
use super::source::Source;
use crate::arch::x86_64::{image, layout, params};
use crate::control::server::{Received, encode, parse, receive};
use crate::control::wire::{
    Command, DiskConfig, DiskRates, MAX_MESSAGE_BYTES, MAX_MESSAGE_FDS, MachineConfig, Message, NicConfig,
    OnPanic, OnReboot, Phase, Reply, Request, VERSION, VsockConfig,
};
use crate::monitor::Monitor;

/// Most messages of one input.
const MAX_MESSAGES: usize = 40;

fn text(source: &mut Source) -> String {
    let count = if source.once_in(16) { 3000 } else { source.below(24) };
    String::from_utf8_lossy(source.bytes(count)).into_owned()
}

fn machine(source: &mut Source) -> MachineConfig {
    let disks = (0..source.below(3)).map(|_| disk(source)).collect();
    let nics = (0..source.below(3)).map(|_| nic(source)).collect();
    let memory = |source: &mut Source| if source.once_in(4) { source.number() } else { 256 << 20 };
    MachineConfig {
        kvm: source.byte() & 3,
        cpus: u32::from(source.byte()) % 70,
        cpus_max: source.once_in(2).then(|| u32::from(source.byte()) % 70),
        memory_bytes: memory(source),
        memory_max_bytes: source.once_in(2).then(|| memory(source)),
        balloon: source.once_in(2),
        kernel: source.byte() & 3,
        initrd: source.once_in(2).then(|| source.byte() & 7),
        hotplug_slots: source.byte() % 20,
        cmdline: text(source),
        console: source.once_in(4).then(|| source.byte() & 7),
        disks,
        nics,
        vsock: source
            .once_in(2)
            .then(|| VsockConfig { cid: source.number() as u32, listener: Some(source.byte() & 7) }),
        rng: source.once_in(2),
        on_reboot: OnReboot::default(),
        on_panic: OnPanic::default(),
        disk_rates: if source.once_in(2) { rates(source) } else { DiskRates::default() },
        watchdog: source.once_in(2).then(OnPanic::default),
    }
}

fn rates(source: &mut Source) -> DiskRates {
    DiskRates { iops: source.number(), bytes_per_sec: source.number() }
}

fn disk(source: &mut Source) -> DiskConfig {
    DiskConfig { fd: source.byte() & 7, read_only: source.once_in(2), serial: text(source) }
}

fn nic(source: &mut Source) -> NicConfig {
    let mac = [source.byte(), 0, 0, 0, 0, 1];
    NicConfig { tap: source.byte() & 7, mac, mtu: source.once_in(2).then(|| source.word()) }
}

fn command(source: &mut Source) -> Command {
    match source.below(24) {
        0..3 => Command::Define(Box::new(machine(source))),
        3 => Command::Start {},
        4 => Command::Go {},
        5 => Command::Pause {},
        6 => Command::Resume {},
        7 => Command::PowerButton {},
        8 => Command::Status {},
        9 => Command::Stats {},
        10 | 11 => Command::VsockListen { port: source.number() as u32, fd: source.byte() & 7 },
        12 => Command::PrepareCpus { count: source.number() as u32 },
        13 => Command::SetCpus { count: source.number() as u32 },
        14 => Command::SetPlugged { bytes: source.number() },
        15 => Command::SetBalloon { bytes: source.number() },
        16 => Command::AttachDisk(disk(source)),
        17 => Command::AttachNic(nic(source)),
        18 => Command::Detach { device: text(source) },
        19 => Command::GrowDisk { device: text(source) },
        20 => Command::ConsoleAttach { fd: source.once_in(2).then(|| source.byte() & 7) },
        21 => Command::ConsoleTail {},
        23 if source.once_in(2) => Command::SetDiskRates(rates(source)),
        22 if source.once_in(4) => Command::Quit {},
        _ => Command::Hello {},
    }
}

/// One message: proper, proper with some bytes changed, or anything; and whether it is proper.
fn message(source: &mut Source) -> (Vec<u8>, bool) {
    match source.below(8) {
        0 => {
            let count = usize::from(source.word());
            (source.bytes(count).to_vec(), false)
        }
        1 => (vec![source.byte(); usize::from(source.word()) + 1], false),
        2 => {
            let name = "x".repeat(usize::from(source.word()) % 65_480);
            (format!("{{\"v\":2,\"id\":1,\"command\":{{\"{name}\":{{}}}}}}").into_bytes(), false)
        }
        kind => {
            let v = if source.once_in(8) { source.number() as u32 } else { VERSION };
            let request = Request { v, id: source.qword(), command: command(source) };
            let mut bytes = serde_json::to_vec(&request).unwrap();
            if kind == 3 {
                for _ in 0..source.below(8) {
                    let at = usize::from(source.word()) % bytes.len();
                    bytes[at] = source.byte();
                }
            }
            (bytes, kind != 3)
        }
    }
}

/// Descriptors of any kind but KVM's.
fn descriptor(source: &mut Source) -> OwnedFd {
    match source.below(6) {
        0 | 1 => File::options().read(true).write(true).open("/dev/null").unwrap().into(),
        2 | 3 => memfd().into(),
        4 => File::open("/").unwrap().into(),
        _ => pair().0,
    }
}

fn pair() -> (OwnedFd, OwnedFd) {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap()
}

/// Control messages with their descriptors, over a socket, up to a monitor that gets no KVM: every one is answered within the
/// bounds of the protocol, and a proper one is understood.
pub fn control(data: &[u8]) {
    let source = &mut Source::new(data);
    let mut monitor = Monitor::new().unwrap();
    let (client, ours) = pair();
    let mut buffer = vec![0; MAX_MESSAGE_BYTES];
    for _ in 0..MAX_MESSAGES {
        if source.is_empty() {
            return;
        }
        let (bytes, proper) = message(source);
        let count = if source.once_in(16) { source.below(254) } else { source.below(8) };
        let fds: Vec<_> = if count < 8 {
            (0..count).map(|_| descriptor(source)).collect()
        } else {
            let one = descriptor(source);
            (0..count).map(|_| one.try_clone().unwrap()).collect()
        };
        let raw: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() { &rights[..0] } else { &rights[..] };
        if sendmsg::<()>(client.as_raw_fd(), &[IoSlice::new(&bytes)], control, MsgFlags::empty(), None)
            .is_err()
        {
            continue;
        }
        let (id, result) = match receive(&ours, &mut buffer) {
            Received::Message(bytes, fds) => {
                let (id, command) = parse(&bytes);
                assert!(
                    !proper || command.is_ok() || command.is_err_and(|r| r.code == "unsupported-version")
                );
                let (id, command) = (id, parse(&bytes).1);
                (id, command.and_then(|command| monitor.execute(command, fds)))
            }
            Received::Broken(_) => {
                assert!(bytes.len() > MAX_MESSAGE_BYTES || count > MAX_MESSAGE_FDS);
                continue;
            }
            Received::Closed => {
                assert!(bytes.is_empty(), "a message was taken for the end of the connection");
                continue;
            }
            Received::Nothing => panic!("a message was lost"),
        };
        let reply = encode(&Message::Reply(Reply { v: VERSION, id, result }));
        assert!(reply.len() <= MAX_MESSAGE_BYTES, "an answer of {} bytes", reply.len());
        for event in monitor.take_events() {
            assert!(encode(&Message::Event(event)).len() <= MAX_MESSAGE_BYTES);
        }
        assert!(!matches!(monitor.phase(), Phase::Ready | Phase::Running | Phase::Paused));
    }
}

const MEMORY: u64 = 64 * layout::MIB;

/// A header of either format from decisions, so that mutations do not have to guess magic numbers.
fn image_bytes(source: &mut Source) -> Vec<u8> {
    let mut out = vec![0u8; 0x1000];
    let address = |source: &mut Source| {
        if source.once_in(4) { source.number() } else { 0x10_0000 * u64::from(source.byte() & 0x3f) }
    };
    match source.below(3) {
        0 => {
            let header = setup_header {
                setup_sects: source.byte(),
                syssize: if source.once_in(4) { source.dword() } else { u32::from(source.word()) },
                header: 0x5372_6448,
                version: if source.once_in(8) { source.word() } else { 0x20f },
                loadflags: if source.once_in(8) { source.byte() } else { 1 },
                xloadflags: if source.once_in(8) { source.word() } else { 1 },
                pref_address: address(source),
                init_size: source.number() as u32,
                initrd_addr_max: source.number() as u32,
                ..setup_header::default()
            };
            out[0x1f1..0x1f1 + header.as_slice().len()].copy_from_slice(header.as_slice());
        }
        1 => {
            out[..6].copy_from_slice(b"\x7fELF\x02\x01");
            out[18] = 62;
            out[24..32].copy_from_slice(&address(source).to_le_bytes());
            let table = if source.once_in(8) { source.number() } else { 64 };
            out[32..40].copy_from_slice(&table.to_le_bytes());
            out[54] = if source.once_in(16) { source.byte() } else { 56 };
            let count = source.below(8);
            out[56..58].copy_from_slice(&(count as u16).to_le_bytes());
            for segment in 0..count {
                let at = 64 + 56 * segment;
                out[at] = if source.once_in(4) { source.byte() } else { 1 };
                let fields = [source.number(), 0, address(source), source.number(), source.number()];
                for (index, value) in fields.iter().enumerate() {
                    out[at + 8 + 8 * index..at + 16 + 8 * index].copy_from_slice(&value.to_le_bytes());
                }
            }
        }
        _ => out.clear(),
    }
    for _ in 0..source.below(4) {
        let (at, value) = (usize::from(source.word()) % 0x268, source.byte());
        if let Some(byte) = out.get_mut(at) {
            *byte = value;
        }
    }
    out.extend_from_slice(source.rest());
    out
}

/// Kernels and initial RAM disks: what is loaded lies where nothing else is, with an entry inside of it.
pub fn image(data: &[u8]) {
    let source = &mut Source::new(data);
    let extra = u64::from(source.word()) * 16;
    let initrd_bytes =
        if source.once_in(4) { source.number() % (2 * MEMORY) } else { u64::from(source.word()) };
    let bytes = image_bytes(source);
    let (file, initrd) = (memfd(), memfd());
    file.write_all_at(&bytes, 0).unwrap();
    file.set_len(bytes.len() as u64 + extra).unwrap();
    initrd.set_len(initrd_bytes).unwrap();
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap();
    let Ok(kernel) = image::load_kernel(&memory, MEMORY, &file) else { return };
    assert!(kernel.entry >= layout::HIGH_RAM_START && kernel.entry < kernel.end, "{kernel:x?}");
    assert!(kernel.end <= MEMORY);
    let mut low = vec![0; layout::HIGH_RAM_START as usize];
    memory.read_slice(&mut low, GuestAddress(0)).unwrap();
    assert!(low == vec![0; low.len()], "a kernel was loaded below 1 MiB");
    let placed = image::load_initrd(&memory, MEMORY, &kernel, &initrd).ok();
    if let Some((at, size)) = placed {
        assert!(at >= kernel.end && at + size <= MEMORY && at + size <= kernel.initrd_max.saturating_add(1));
    }
    params::write(&memory, MEMORY, &kernel, placed, "console=ttyS0").unwrap();
}

/// Frames of the guest agent, as the host reads them, and what they carry.
pub fn frames(data: &[u8]) {
    let mut stream = Cursor::new(data);
    loop {
        let before = stream.position();
        let Ok((kind, payload)) = protocol::read_frame(&mut stream) else { return };
        assert!(payload.len() <= MAX_FRAME_BYTES);
        let again = protocol::encode_frame(kind, &payload).unwrap();
        assert_eq!(again, data[before as usize..stream.position() as usize]);
        if kind != FrameKind::Message {
            continue;
        }
        if let Ok(response) = serde_json::from_slice::<protocol::Response>(&payload) {
            let bytes = serde_json::to_vec(&response).unwrap();
            assert_eq!(serde_json::from_slice::<protocol::Response>(&bytes).unwrap(), response);
        }
        if let Ok(request) = serde_json::from_slice::<protocol::Request>(&payload) {
            let bytes = serde_json::to_vec(&request).unwrap();
            assert_eq!(serde_json::from_slice::<protocol::Request>(&bytes).unwrap(), request);
        }
    }
}
