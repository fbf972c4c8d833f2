//! Worlds of the devices with a network behind them: network card and vsock.

use std::io::{IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, socketpair,
};

use super::devices::some_of;
use super::hostile::{World, bench, drive, readable, writable};
use super::source::Source;
use crate::control::wire::VsockArrival;
use crate::virtio::VirtioDevice;
use crate::virtio::net::Net;
use crate::virtio::testing::{Bench, Buffer};
use crate::virtio::vsock::Vsock;
use crate::virtio::vsock::packet::Header;

struct Card {
    bench: Bench<Net>,
    /// The tap's other side, until it is deleted.
    tap: Option<UnixDatagram>,
}

impl World for Card {
    type Device = Net;

    fn bench(&mut self) -> &mut Bench<Net> {
        &mut self.bench
    }

    fn features(&mut self, source: &mut Source) -> u64 {
        some_of(self.bench.device.features(), source)
    }

    fn chain(&mut self, queue: usize, source: &mut Source) -> Vec<Buffer> {
        let pieces = source.below(4) + 1;
        (0..pieces)
            .map(|_| {
                let len = source.pick(&[12u32, 64, 128, 1526, 4096, 65_562]);
                match queue {
                    0 => writable(len, source),
                    _ => readable(&self.bench, source, &vec![0x33; len as usize]),
                }
            })
            .collect()
    }

    fn outside(&mut self, source: &mut Source) {
        let Some(tap) = &self.tap else { return };
        match source.below(8) {
            0 => self.tap = None,
            1 | 2 => {
                let mut frame = [0; 2048];
                while tap.recv(&mut frame).is_ok() {}
            }
            _ => {
                let len = source.pick(&[0usize, 11, 12, 72, 1526, 9000, 65_565, 70_000]);
                // A socket that is full loses it, as a tap does.
                let _ = tap.send(&vec![0x44; len]);
            }
        }
    }

    fn check(&mut self) {}
}

/// The network card, on a socket that stands in for the tap.
pub fn net(data: &[u8]) {
    let source = &mut Source::new(data);
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    let device = Net::on_socket(ours.into(), [2, 0, 0, 0, 0, 1], Some(1500)).unwrap();
    let features = some_of(device.features(), source);
    drop(drive(Card { bench: bench(device, features), tap: Some(theirs) }, source));
}

const CID: u32 = 42;
const PORT: u32 = 1024;
/// Host's ends kept open.
const MAX_STREAMS: usize = 8;

struct Switchboard {
    bench: Bench<Vsock>,
    address: SocketAddr,
    acceptor: Option<OwnedFd>,
    streams: Vec<UnixStream>,
}

impl Switchboard {
    /// Takes what the guest has connected to.
    fn accept(&mut self) {
        let Some(acceptor) = &self.acceptor else { return };
        let mut text = [0; 200];
        let mut space = nix::cmsg_space!(RawFd);
        let mut pieces = [IoSliceMut::new(&mut text)];
        let flags = MsgFlags::MSG_DONTWAIT;
        let Ok(message) = recvmsg::<()>(acceptor.as_raw_fd(), &mut pieces, Some(&mut space), flags) else {
            return;
        };
        let bytes = message.bytes;
        let Some(ControlMessageOwned::ScmRights(fds)) = message.cmsgs().unwrap().next() else { return };
        // SAFETY: the descriptor has just been received, and nobody else owns it.
        let stream = unsafe { UnixStream::from_raw_fd(fds[0]) };
        let arrival: VsockArrival = serde_json::from_slice(&text[..bytes]).unwrap();
        assert_eq!(arrival.port, PORT);
        self.keep(stream);
    }

    fn keep(&mut self, stream: UnixStream) {
        stream.set_nonblocking(true).unwrap();
        if self.streams.len() < MAX_STREAMS {
            self.streams.push(stream);
        }
    }

    fn client(&mut self, greeting: &[u8]) {
        let mut client = UnixStream::connect_addr(&self.address).unwrap();
        // One that was refused is closed already.
        let _ = client.write_all(greeting);
        self.keep(client);
    }
}

impl World for Switchboard {
    type Device = Vsock;

    fn bench(&mut self) -> &mut Bench<Vsock> {
        &mut self.bench
    }

    fn features(&mut self, source: &mut Source) -> u64 {
        some_of(self.bench.device.features(), source)
    }

    fn chain(&mut self, queue: usize, source: &mut Source) -> Vec<Buffer> {
        if queue == 0 {
            return vec![writable(source.pick(&[44u32, 45, 1000, 4096, 65_580]), source)];
        }
        let len = source.pick(&[0u32, 0, 1, 100, 5000, 65_536]);
        let header = Header {
            src_cid: if source.once_in(16) { source.number() } else { u64::from(CID) },
            dst_cid: if source.once_in(16) { source.number() } else { 2 },
            src_port: u32::from(source.byte()) & 7,
            // The ports of the host's clients follow each other from here.
            dst_port: source.pick(&[PORT, PORT, 1 << 30, (1 << 30) + 1, 5]),
            len: if source.once_in(16) { source.dword() } else { len },
            kind: if source.once_in(16) { source.word() } else { 1 },
            op: u16::from(source.byte()) % 9,
            flags: u32::from(source.byte()) & 3,
            buf_alloc: source.pick(&[0u32, 1, 4096, 1 << 18, u32::MAX]),
            fwd_cnt: if source.once_in(8) { source.dword() } else { 0 },
        };
        let mut chain = vec![readable(&self.bench, source, &header.encode())];
        if len > 0 {
            chain.push(readable(&self.bench, source, &vec![0x55; len as usize]));
        }
        chain
    }

    fn outside(&mut self, source: &mut Source) {
        let which = source.byte() as usize % self.streams.len().max(1);
        match (source.below(12), self.streams.get_mut(which)) {
            (0, _) => self.client(b"CONNECT 7\n"),
            (1, _) => {
                let count = source.below(40);
                self.client(source.bytes(count));
            }
            (2, _) => self.bench.device.tick(),
            (3, Some(_)) => drop(self.streams.swap_remove(which)),
            (4, Some(stream)) => drop(stream.shutdown(std::net::Shutdown::Write)),
            (5 | 6, Some(stream)) => {
                let len = source.pick(&[1usize, 100, 5000, 70_000]);
                // A full socket or a closed one takes less.
                let _ = stream.write(&vec![0x66; len]);
            }
            (7, Some(stream)) => drop(stream.read(&mut [0; 70_000])),
            (8, _) if source.once_in(8) => self.acceptor = None,
            _ => self.accept(),
        }
    }

    fn check(&mut self) {
        self.bench.device.check();
    }
}

/// The socket device between a guest that says anything and clients that do anything.
pub fn vsock(data: &[u8]) {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let source = &mut Source::new(data);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let name = format!("lathe-fuzz-{}-{number}", std::process::id());
    let address = SocketAddr::from_abstract_name(name).unwrap();
    let listener = UnixListener::bind_addr(&address).unwrap();
    let mut device = Vsock::new(CID, Some(listener.into())).unwrap_or_else(|error| panic!("{error}"));
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let (ours, acceptor) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
    device.listen(PORT, ours).unwrap();
    let features = some_of(device.features(), source);
    let bench = bench(device, features);
    drop(drive(Switchboard { bench, address, acceptor: Some(acceptor), streams: Vec::new() }, source));
}
