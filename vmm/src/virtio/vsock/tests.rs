use std::io::{IoSliceMut, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

use nix::sys::socket::{AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, recvmsg, socketpair};
use proptest::prelude::*;

use super::super::testing::{Bench, Buffer};
use super::connection::BUFFER_BYTES;
use super::packet::{HOST_CID, Op, SHUTDOWN_BOTH, SHUTDOWN_SEND, TYPE_STREAM};
use super::*;
use crate::control::wire::VsockArrival;

const CID: u32 = 42;
const PORT: u32 = 1024;
const GUEST_PORT: u32 = 7777;
const GUEST_BUFFER: u32 = 4096;
const RX_BYTES: u32 = 1024;

struct World {
    bench: Bench<Vsock>,
    path: std::path::PathBuf,
    _dir: tempfile::TempDir,
    rx: Vec<Buffer>,
    acceptor: OwnedFd,
}

fn seqpacket() -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap()
}

impl World {
    fn new() -> Self {
        Self::ticking(Duration::from_secs(3600))
    }

    fn ticking(tick: Duration) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock");
        let listener = UnixListener::bind(&path).unwrap();
        let mut vsock = Vsock::new(CID, Some(listener.into())).unwrap_or_else(|error| panic!("{error}"));
        vsock.tick = tick;
        let (ours, acceptor) = seqpacket();
        vsock.listen(PORT, ours).unwrap();
        let bench = Bench::new(vsock, 0);
        Self { bench, path, _dir: dir, rx: Vec::new(), acceptor }
    }

    /// Offers `count` receive buffers.
    fn offer(&mut self, count: usize) {
        for _ in 0..count {
            let buffer = self.bench.queues[0].writable(RX_BYTES);
            self.bench.queues[0].push(&[buffer]);
            self.rx.push(buffer);
        }
        self.bench.kick(0);
    }

    /// Packets that came; each buffer used is in order.
    fn packets(&mut self) -> Vec<(Header, Vec<u8>)> {
        self.bench.settle();
        let used = self.bench.queues[0].used();
        let buffers: Vec<_> = self.rx.drain(..used.len()).collect();
        let read = |(buffer, (_, len)): (Buffer, &(u32, u32))| {
            let data = self.bench.queues[0].read(buffer);
            let header = Header::decode(data[..44].try_into().unwrap());
            assert_eq!(*len, 44 + header.len);
            (header, data[44..*len as usize].to_vec())
        };
        buffers.into_iter().zip(&used).map(read).collect()
    }

    /// The only packet that came.
    fn packet(&mut self) -> (Header, Vec<u8>) {
        let mut all = self.packets();
        assert_eq!(all.len(), 1, "{all:?}");
        all.remove(0)
    }

    fn send(&mut self, header: Header, data: &[u8]) {
        let queue = &mut self.bench.queues[1];
        let mut chain = vec![queue.readable(&header.encode())];
        if !data.is_empty() {
            chain.push(queue.readable(data));
        }
        queue.push(&chain);
        self.bench.kick(1);
        assert_eq!(self.bench.queues[1].used().len(), 1);
        self.bench.queues[1].recycle();
    }

    /// A packet of the guest in its connection from [`GUEST_PORT`] to `host` port.
    fn say(&mut self, host: u32, op: Op, data: &[u8], fwd_cnt: u32, flags: u32) {
        let header = Header { flags, fwd_cnt, ..guest_header(host, op, data.len()) };
        self.send(header, data);
    }

    fn accept(&self) -> Option<(VsockArrival, UnixStream)> {
        let mut text = [0; 200];
        let mut space = nix::cmsg_space!(RawFd);
        let mut pieces = [IoSliceMut::new(&mut text)];
        let message =
            recvmsg::<()>(self.acceptor.as_raw_fd(), &mut pieces, Some(&mut space), MsgFlags::MSG_DONTWAIT)
                .ok()?;
        let bytes = message.bytes;
        let Some(ControlMessageOwned::ScmRights(fds)) = message.cmsgs().unwrap().next() else { return None };
        // SAFETY: the descriptor has just been received, and nobody else owns it.
        let stream = unsafe { <UnixStream as std::os::fd::FromRawFd>::from_raw_fd(fds[0]) };
        stream.set_nonblocking(true).unwrap();
        Some((serde_json::from_slice(&text[..bytes]).unwrap(), stream))
    }

    /// A connection that the guest made.
    fn guest_connects(&mut self) -> UnixStream {
        self.say(PORT, Op::Request, b"", 0, 0);
        let (arrival, stream) = self.accept().unwrap();
        assert_eq!((arrival.port, arrival.guest_port), (PORT, GUEST_PORT));
        let (header, _) = self.packet();
        assert_eq!((header.op, header.buf_alloc), (Op::Response as u16, BUFFER_BYTES));
        stream
    }

    fn client(&mut self, greeting: &str) -> UnixStream {
        let mut client = UnixStream::connect(&self.path).unwrap();
        client.write_all(greeting.as_bytes()).unwrap();
        client.set_nonblocking(true).unwrap();
        self.bench.settle();
        client
    }
}

fn guest_header(host: u32, op: Op, len: usize) -> Header {
    Header {
        src_cid: u64::from(CID),
        dst_cid: HOST_CID,
        src_port: GUEST_PORT,
        dst_port: host,
        len: len as u32,
        kind: TYPE_STREAM,
        op: op as u16,
        flags: 0,
        buf_alloc: GUEST_BUFFER,
        fwd_cnt: 0,
    }
}

fn read_some(stream: &mut UnixStream) -> Vec<u8> {
    let mut data = vec![0; 1 << 20];
    let count = stream.read(&mut data).unwrap();
    data.truncate(count);
    data
}

fn would_block(stream: &mut UnixStream) -> bool {
    matches!(stream.read(&mut [0]), Err(error) if error.kind() == std::io::ErrorKind::WouldBlock)
}

#[test]
fn the_guest_connects_and_both_sides_talk() {
    let mut world = World::new();
    world.offer(8);
    let mut stream = world.guest_connects();
    world.say(PORT, Op::ReadWrite, b"hello host", 0, 0);
    assert_eq!(read_some(&mut stream), b"hello host");
    stream.write_all(b"hello guest").unwrap();
    let (header, data) = world.packet();
    assert_eq!((header.op, data.as_slice()), (Op::ReadWrite as u16, &b"hello guest"[..]));
    assert_eq!((header.src_cid, header.dst_cid, header.src_port, header.dst_port), (2, 42, PORT, GUEST_PORT));
    assert_eq!(header.fwd_cnt, 10);
    assert_eq!(world.bench.device.connections(), 1);
}

#[test]
fn a_client_connects_to_the_guest() {
    let mut world = World::new();
    world.offer(8);
    let mut client = world.client("CONNECT 7777\nearly");
    let (request, _) = world.packet();
    assert_eq!((request.op, request.dst_port, request.dst_cid), (Op::Request as u16, GUEST_PORT, 42));
    assert!(would_block(&mut client));
    world.say(request.src_port, Op::Response, b"", 0, 0);
    assert_eq!(read_some(&mut client), format!("OK {}\n", request.src_port).as_bytes());
    assert_eq!(world.packet().1, b"early");
    world.say(request.src_port, Op::ReadWrite, b"answer", 0, 0);
    assert_eq!(read_some(&mut client), b"answer");
}

#[test]
fn a_greeting_in_pieces_is_understood_and_nonsense_is_not() {
    let mut world = World::new();
    world.offer(16);
    let mut client = world.client("CONN");
    assert_eq!(world.packets(), []);
    client.write_all(b"ECT 1\n").unwrap();
    assert_eq!(world.packet().0.dst_port, 1);
    for nonsense in [
        "\n",
        "CONNECT\n",
        "CONNECT x\n",
        "CONNECT -1\n",
        "CONNECT +1\n",
        "CONNECT 4294967296\n",
        "connect 1\n",
        "GET / HTTP/1.1\r\n",
        "CONNECT 000000000000000000000001\n",
    ] {
        let mut client = world.client(nonsense);
        // Closed with unread bytes may show as a reset.
        assert!(matches!(client.read(&mut [0]), Ok(0) | Err(_)) && !would_block(&mut client), "{nonsense:?}");
    }
    assert_eq!(world.packets(), []);
    assert_eq!(world.bench.device.connections(), 1);
}

#[test]
fn a_refusal_by_the_guest_ends_the_client() {
    let mut world = World::new();
    world.offer(4);
    let mut client = world.client("CONNECT 5\n");
    let (request, _) = world.packet();
    world.send(Header { src_port: 5, ..guest_header(request.src_port, Op::Reset, 0) }, b"");
    assert_eq!(read_some(&mut client), b"");
    assert_eq!(world.bench.device.connections(), 0);
}

#[test]
fn a_silent_guest_and_a_silent_client_are_given_up() {
    let mut world = World::ticking(Duration::from_millis(5));
    world.offer(8);
    let mut asked = world.client("CONNECT 5\n");
    let mut silent = world.client("");
    world.bench.until("both given up", |bench| bench.device.connections() == 0);
    assert_eq!(read_some(&mut asked), b"");
    assert_eq!(read_some(&mut silent), b"");
    let ops: Vec<_> = world.packets().iter().map(|(header, _)| header.op).collect();
    assert_eq!(ops, [Op::Request as u16, Op::Reset as u16]);
    assert!(!world.bench.device.running.as_ref().unwrap().ticking, "the timer rests");
}

#[test]
fn nobody_listening_means_a_refusal() {
    let mut world = World::new();
    world.offer(8);
    world.say(99, Op::Request, b"", 0, 0);
    let (header, _) = world.packet();
    assert_eq!((header.op, header.src_port, header.dst_port), (Op::Reset as u16, 99, GUEST_PORT));
    world.acceptor = seqpacket().0;
    world.say(PORT, Op::Request, b"", 0, 0);
    assert_eq!(world.packet().0.op, Op::Reset as u16);
    let (ours, theirs) = seqpacket();
    world.bench.device.listen(PORT, ours).unwrap();
    world.acceptor = theirs;
    world.guest_connects();
}

#[test]
fn the_guests_credit_is_respected_and_refilled() {
    let mut world = World::new();
    world.offer(16);
    let mut stream = world.guest_connects();
    let data: Vec<u8> = (0..10_000).map(|i| (i % 251) as u8).collect();
    stream.write_all(&data).unwrap();
    let packets = world.packets();
    let (last, sent) = packets.split_last().unwrap();
    let received: Vec<u8> = sent.iter().flat_map(|(_, data)| data.clone()).collect();
    assert!(received == data[..GUEST_BUFFER as usize]);
    assert_eq!(last.0.op, Op::CreditRequest as u16);
    assert_eq!(world.bench.turn(), 0, "no spinning without credit");
    world.say(PORT, Op::CreditUpdate, b"", 1000, 0);
    let more = world.packets();
    assert!(more[0].1 == data[4096..5076] && more[1].1 == data[5076..5096]);
    world.say(PORT, Op::CreditUpdate, b"", 5096, 0);
    world.offer(16);
    let rest: Vec<u8> = world.packets().iter().flat_map(|(_, data)| data.clone()).collect();
    assert!(rest == data[5096..5096 + 4096]);
}

#[test]
fn without_receive_buffers_data_waits_in_the_socket() {
    let mut world = World::new();
    world.offer(1);
    let mut stream = world.guest_connects();
    stream.write_all(b"later").unwrap();
    assert_eq!(world.packets(), []);
    assert_eq!(world.bench.turn(), 0);
    world.offer(1);
    assert_eq!(world.packet().1, b"later");
}

#[test]
fn the_hosts_credit_bounds_the_guest() {
    let mut world = World::new();
    world.offer(64);
    let mut stream = world.guest_connects();
    // The reader sleeps: the socket's buffer fills, then ours.
    let chunk = vec![7u8; 16 * 1024];
    let (mut sent, mut told) = (0u32, 0u32);
    loop {
        for (header, _) in world.packets() {
            told = header.fwd_cnt;
        }
        if sent - told + 16 * 1024 > BUFFER_BYTES {
            break;
        }
        world.say(PORT, Op::ReadWrite, &chunk, 0, 0);
        sent += 16 * 1024;
        assert!(sent < 1 << 23, "the socket takes everything");
    }
    let mut received = 0;
    while received < sent {
        received += read_some(&mut stream).len() as u32;
        world.bench.settle();
    }
    assert!(
        world
            .packets()
            .iter()
            .any(|(header, _)| header.fwd_cnt > told && header.op == Op::CreditUpdate as u16)
    );
    // And beyond the credit the connection ends.
    let mut world = World::new();
    world.offer(64);
    let _stream = world.guest_connects();
    let mut ended = false;
    for _ in 0..200 {
        world.say(PORT, Op::ReadWrite, &chunk, 0, 0);
        ended |= world.packets().iter().any(|(header, _)| header.op == Op::Reset as u16);
    }
    assert!(ended);
    assert_eq!(world.bench.device.connections(), 0);
    assert_eq!(world.bench.interrupts.broken(), None);
}

#[test]
fn the_end_of_one_direction_leaves_the_other_open() {
    let mut world = World::new();
    world.offer(8);
    let mut stream = world.guest_connects();
    world.say(PORT, Op::ReadWrite, b"question", 0, 0);
    world.say(PORT, Op::Shutdown, b"", 0, SHUTDOWN_SEND);
    let mut question = String::new();
    stream.set_nonblocking(false).unwrap();
    stream.read_to_string(&mut question).unwrap();
    assert_eq!(question, "question");
    stream.write_all(b"answer").unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let packets = world.packets();
    assert_eq!(packets[0].1, b"answer");
    // With that, both directions are over.
    assert_eq!((packets[1].0.op, packets[1].0.flags), (Op::Shutdown as u16, SHUTDOWN_BOTH));
    world.say(PORT, Op::Shutdown, b"", 6, SHUTDOWN_BOTH);
    assert_eq!(world.packet().0.op, Op::Reset as u16);
    assert_eq!(world.bench.device.connections(), 0);
}

#[test]
fn a_host_that_closes_ends_both_directions_after_its_data() {
    let mut world = World::ticking(Duration::from_millis(5));
    world.offer(8);
    let mut stream = world.guest_connects();
    stream.write_all(b"last words").unwrap();
    drop(stream);
    let packets = world.packets();
    let data: Vec<u8> = packets.iter().flat_map(|(_, data)| data.clone()).collect();
    assert_eq!(data, b"last words");
    let ends = packets.iter().filter(|(header, _)| header.op == Op::Shutdown as u16);
    assert_eq!(ends.fold(0, |all, (header, _)| all | header.flags), SHUTDOWN_BOTH);
    assert_eq!(packets.last().unwrap().0.flags, SHUTDOWN_BOTH);
    // The guest does not react: the connection is given up.
    world.bench.until("the end", |bench| bench.device.connections() == 0);
    assert_eq!(world.packet().0.op, Op::Reset as u16);
}

#[test]
fn what_the_guest_sent_before_an_orderly_end_is_delivered() {
    let mut world = World::new();
    world.offer(64);
    let mut stream = world.guest_connects();
    let chunk = vec![7u8; 16 * 1024];
    let (mut sent, mut told) = (0u32, 0u32);
    while sent - told + 16 * 1024 <= BUFFER_BYTES {
        world.say(PORT, Op::ReadWrite, &chunk, 0, 0);
        sent += 16 * 1024;
        for (header, _) in world.packets() {
            told = header.fwd_cnt;
        }
    }
    world.say(PORT, Op::Shutdown, b"", 0, SHUTDOWN_BOTH);
    world.say(PORT, Op::Reset, b"", 0, 0);
    assert_eq!(world.bench.device.connections(), 1, "kept for the reader");
    let mut received = 0;
    loop {
        match read_some(&mut stream).len() as u32 {
            0 => break,
            count => received += count,
        }
        world.bench.settle();
    }
    assert_eq!(received, sent);
    assert_eq!(world.bench.device.connections(), 0);
}

#[test]
fn hostile_packets_end_connections_and_nothing_else() {
    let good = guest_header(PORT, Op::ReadWrite, 0);
    for (what, header) in [
        ("unknown op", Header { op: 99, ..good }),
        ("op 0", Header { op: 0, ..good }),
        ("a second request", Header { op: Op::Request as u16, ..good }),
        ("a response out of place", Header { op: Op::Response as u16, ..good }),
        ("credit for what was never sent", Header { fwd_cnt: 1, ..good }),
        ("credit in the past", Header { fwd_cnt: u32::MAX, ..good }),
    ] {
        let mut world = World::new();
        world.offer(4);
        let mut stream = world.guest_connects();
        world.send(header, b"");
        assert_eq!(world.packet().0.op, Op::Reset as u16, "{what}");
        assert_eq!(read_some(&mut stream), b"", "{what}");
        assert_eq!(world.bench.device.connections(), 0, "{what}");
        world.guest_connects();
        assert_eq!(world.bench.interrupts.broken(), None);
    }
}

#[test]
fn strange_addresses_are_refused_or_ignored() {
    let mut world = World::new();
    world.offer(8);
    let good = guest_header(PORT, Op::Request, 0);
    world.send(Header { src_cid: 43, ..good }, b"");
    assert_eq!(world.packets(), []);
    world.send(Header { dst_cid: 9, ..good }, b"");
    assert_eq!((world.packet().0.op, world.accept().is_none()), (Op::Reset as u16, true));
    world.send(Header { kind: 2, ..good }, b"");
    let (header, _) = world.packet();
    assert_eq!((header.op, header.kind), (Op::Reset as u16, 2));
    world.send(Header { op: Op::ReadWrite as u16, ..good }, b"");
    assert_eq!(world.packet().0.op, Op::Reset as u16, "data without a connection");
    world.send(Header { op: Op::Reset as u16, ..good }, b"");
    assert_eq!(world.packets(), [], "RST is never answered");
}

#[test]
fn a_flood_of_refusals_is_bounded() {
    let mut world = World::new();
    for _ in 0..2000 {
        world.say(99, Op::ReadWrite, b"", 0, 0);
    }
    let mut count = 0;
    for _ in 0..40 {
        world.offer(64);
        count += world.packets().len();
    }
    assert_eq!(count, 1024);
}

#[test]
fn connections_that_the_guest_makes_and_resets_leave_nothing_behind() {
    let mut world = World::new();
    for _ in 0..50 {
        world.say(PORT, Op::Request, b"", 0, 0);
        world.say(PORT, Op::Reset, b"", 0, 0);
        while world.accept().is_some() {}
        world.bench.device.check();
    }
    assert_eq!(world.bench.device.connections(), 0);
    world.offer(4);
    world.guest_connects();
}

#[test]
fn connections_are_bounded() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    // Both ends of each connection are in this process.
    let needed = 3 * muxer::MAX_CONNECTIONS as u64;
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    if soft < needed {
        setrlimit(Resource::RLIMIT_NOFILE, needed, hard.max(needed)).expect("3069 descriptors may be open");
    }
    let mut world = World::new();
    let mut clients = Vec::new();
    for _ in 0..muxer::MAX_CONNECTIONS {
        clients.push(UnixStream::connect(&world.path).unwrap());
        if clients.len() % 32 == 0 {
            world.bench.settle();
        }
    }
    world.bench.settle();
    assert_eq!(world.bench.device.connections(), muxer::MAX_CONNECTIONS);
    assert_eq!(read_some(&mut world.client("")), b"");
    world.offer(2);
    world.say(PORT, Op::Request, b"", 0, 0);
    assert_eq!(world.packet().0.op, Op::Reset as u16);
    clients.pop();
    world.bench.settle();
    assert_eq!(world.bench.device.connections(), muxer::MAX_CONNECTIONS - 1);
    world.client("CONNECT 1\n");
    assert_eq!(world.packet().0.op, Op::Request as u16);
}

#[test]
fn reset_closes_all_connections_and_keeps_the_ports() {
    let mut world = World::new();
    world.offer(4);
    let mut stream = world.guest_connects();
    world.bench.restart(0);
    world.rx.clear();
    assert_eq!(read_some(&mut stream), b"");
    assert_eq!(world.bench.device.connections(), 0);
    world.offer(4);
    let _stream = world.guest_connects();
    let client = world.client("CONNECT 9\n");
    assert_eq!(world.packet().0.op, Op::Request as u16);
    drop(client);
    assert_eq!(world.packet().0.op, Op::Reset as u16);
}

#[test]
fn broken_chains_stop_the_device() {
    let breaks: [fn(&mut World); 4] = [
        |world| {
            let part = world.bench.queues[1].readable(&[0; 43]);
            world.bench.queues[1].push(&[part]);
            world.bench.kick(1);
        },
        |world| {
            let header = guest_header(PORT, Op::ReadWrite, 100_000);
            let part = world.bench.queues[1].readable(&header.encode());
            world.bench.queues[1].push(&[part]);
            world.bench.kick(1);
        },
        |world| {
            world.offer(1);
            let _stream = world.guest_connects();
            let part = world.bench.queues[1].readable(&guest_header(PORT, Op::ReadWrite, 100).encode());
            world.bench.queues[1].push(&[part, Buffer { addr: 1 << 50, len: 100, writable: false }]);
            world.bench.kick(1);
        },
        |world| {
            let part = world.bench.queues[0].writable(43);
            world.bench.queues[0].push(&[part]);
            world.client("CONNECT 1\n");
        },
    ];
    for break_it in breaks {
        let mut world = World::new();
        break_it(&mut world);
        assert!(world.bench.interrupts.broken().is_some());
        world.bench.restart(0);
        world.rx.clear();
        world.offer(4);
        while world.accept().is_some() {}
        world.guest_connects();
    }
}

#[test]
fn wrong_descriptors_and_numbers_are_refused() {
    let message =
        |result: Result<Vsock, VsockError>| result.err().map(|error| error.to_string()).unwrap_or_default();
    for cid in [0, 1, 2, u32::MAX] {
        assert!(message(Vsock::new(cid, None)).contains(&cid.to_string()));
    }
    let (stream, other) = UnixStream::pair().unwrap();
    assert!(message(Vsock::new(3, Some(stream.into()))).contains("listening stream"));
    assert!(message(Vsock::new(3, Some(tempfile::tempfile().unwrap().into()))).contains("listening stream"));
    let mut vsock = Vsock::new(3, None).unwrap_or_else(|error| panic!("{error}"));
    assert!(vsock.listen(1, other.into()).is_err());
    assert!(vsock.listen(0, seqpacket().0).is_err());
    for port in 1..=MAX_LISTENERS as u32 {
        vsock.listen(port, seqpacket().0).unwrap();
    }
    vsock.listen(1, seqpacket().0).unwrap();
    assert!(vsock.listen(1000, seqpacket().0).is_err());
    let mut config = [0xff; 10];
    vsock.read_config(0, &mut config);
    assert_eq!(config, [3, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    #[test]
    fn no_packets_make_it_panic(
        packets in prop::collection::vec(
            (0u16..9, 0u16..3, 0u32..4, any::<u32>(), any::<u32>(), 0usize..3000, 0u32..5, 0u8..8), 1..60),
    ) {
        let mut world = World::new();
        world.offer(4);
        let mut streams = Vec::new();
        for (op, kind, port, buf_alloc, fwd_cnt, len, flags, action) in packets {
            let data = vec![op as u8; len];
            let credit = if fwd_cnt % 4 == 0 { fwd_cnt } else { 0 };
            let header = Header {
                op, kind: kind.max(1), flags, buf_alloc, fwd_cnt: credit, src_port: port,
                ..guest_header(PORT, Op::ReadWrite, len)
            };
            world.send(header, &data);
            streams.extend(world.accept().map(|(_, stream)| stream));
            match (action, streams.len()) {
                (0, 1..) => drop(streams.pop()),
                (1, 1..) => { let _ = streams[0].write(&data); }
                (2, 1..) => { let _ = streams[0].read(&mut [0; 5000]); }
                (3, 1..) => { let _ = streams[0].shutdown(std::net::Shutdown::Write); }
                (4, _) => streams.push(world.client("CONNECT 1\n")),
                (5, _) => world.offer(2),
                _ => {}
            }
            world.packets();
            prop_assert_eq!(world.bench.interrupts.broken(), None);
        }
        world.bench.device.reset();
    }

    #[test]
    fn no_chains_make_it_panic(
        descriptors in prop::collection::vec((0usize..3, any::<u16>(), 0u64..3, any::<u32>(), 0u16..8, any::<u16>()), 1..40),
    ) {
        let mut world = World::new();
        world.client("CONNECT 1\n");
        for (queue, at, place, len, flags, next) in descriptors {
            let buffer = match place {
                0 | 1 => Buffer { addr: 0x20_0000 + u64::from(at), len: len % 3000, writable: flags & 2 != 0 },
                _ => Buffer { addr: u64::from(at) << 24, len, writable: flags & 2 != 0 },
            };
            world.bench.queues[queue].push_raw(&[(buffer, flags, Some(next % 10))]);
            world.bench.kick(queue);
        }
        world.bench.device.reset();
    }
}
