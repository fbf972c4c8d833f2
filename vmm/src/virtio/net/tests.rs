use std::os::unix::net::UnixDatagram;

use proptest::prelude::*;

use super::super::testing::{Bench, Buffer};
use super::*;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const MERGEABLE: u64 = feature::MRG_RXBUF;
const HEADER: [u8; HEADER_BYTES] = [0; HEADER_BYTES];

/// A device on a socket that stands in for the tap, and the socket's other end.
fn stand_in(features: u64) -> (Bench<Net>, UnixDatagram) {
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    let net = Net::on_socket(ours.into(), MAC, Some(1500)).unwrap();
    (Bench::new(net, features), theirs)
}

fn frame(bytes: usize) -> Vec<u8> {
    [&HEADER[..], &(0..bytes).map(|i| (i % 253) as u8).collect::<Vec<_>>()].concat()
}

impl Bench<Net> {
    fn offer_rx(&mut self, sizes: &[u32]) -> Vec<Buffer> {
        let buffers: Vec<_> = sizes.iter().map(|size| self.queues[0].writable(*size)).collect();
        for buffer in &buffers {
            self.queues[0].push(&[*buffer]);
        }
        self.kick(0);
        buffers
    }

    fn counts(&self) -> NicStats {
        match self.device.stats() {
            DeviceStats::Nic(stats) => stats,
            other => panic!("{other:?}"),
        }
    }

    /// The first `bytes` of what a frame's buffers hold, with `num_buffers` taken out.
    fn joined(&self, buffers: &[Buffer], bytes: usize) -> (u16, Vec<u8>) {
        let mut data: Vec<u8> = buffers.iter().flat_map(|buffer| self.queues[0].read(*buffer)).collect();
        data.truncate(bytes);
        let count = u16::from_le_bytes([data[10], data[11]]);
        data[10..12].fill(0);
        (count, data)
    }
}

#[test]
fn a_frame_from_the_guest_reaches_the_tap_however_it_is_cut() {
    let (mut bench, tap) = stand_in(MERGEABLE);
    let sent = frame(1000);
    let parts: Vec<_> = sent.chunks(7).map(|part| bench.queues[1].readable(part)).collect();
    bench.queues[1].push(&parts);
    bench.kick(1);
    let mut received = vec![0; 2000];
    let count = tap.recv(&mut received).unwrap();
    assert_eq!(received[..count], sent);
    assert_eq!(bench.queues[1].used(), [(0, 0)]);
    assert_eq!((bench.counts().tx_packets, bench.counts().tx_bytes, bench.counts().tx_dropped), (1, 1000, 0));
}

#[test]
fn frames_to_the_guest_take_as_many_buffers_as_they_need() {
    let (mut bench, tap) = stand_in(MERGEABLE | feature::GUEST_TSO4);
    let buffers = bench.offer_rx(&[100; 6]);
    tap.send(&frame(20)).unwrap();
    tap.send(&frame(250)).unwrap();
    bench.settle();
    assert_eq!(bench.queues[0].used(), [(0, 32), (1, 100), (2, 100), (3, 62)]);
    assert_eq!(bench.joined(&buffers[..1], 32), (1, frame(20)));
    assert_eq!(bench.joined(&buffers[1..4], 262), (3, frame(250)));
    assert_eq!((bench.counts().rx_packets, bench.counts().rx_bytes), (2, 270));
}

#[test]
fn without_buffers_the_tap_is_left_alone() {
    let (mut bench, tap) = stand_in(MERGEABLE);
    tap.send(&frame(60)).unwrap();
    assert_eq!(bench.turn(), 0, "no event, so no busy loop");
    let buffers = bench.offer_rx(&[1600]);
    assert_eq!(bench.queues[0].used(), [(0, 72)]);
    assert_eq!(bench.joined(&buffers, 72), (1, frame(60)));
    tap.send(&frame(61)).unwrap();
    assert_eq!(bench.turn(), 0);
    bench.offer_rx(&[1600]);
    assert_eq!(bench.queues[0].used(), [(1, 73)]);
    assert_eq!(bench.counts().rx_dropped, 0);
}

#[test]
fn a_frame_waits_for_buffers_and_is_dropped_when_they_never_suffice() {
    let (mut bench, tap) = stand_in(MERGEABLE | feature::GUEST_TSO4);
    let mut buffers = bench.offer_rx(&[1000]);
    tap.send(&frame(3000)).unwrap();
    bench.settle();
    assert_eq!(bench.queues[0].used(), []);
    buffers.extend(bench.offer_rx(&[1000, 1000]));
    assert_eq!(bench.queues[0].used(), []);
    buffers.extend(bench.offer_rx(&[1000]));
    assert_eq!(bench.queues[0].used(), [(0, 1000), (1, 1000), (2, 1000), (3, 12)]);
    assert_eq!(bench.joined(&buffers, 3012), (4, frame(3000)));

    bench.offer_rx(&[1000]);
    tap.send(&frame(60000)).unwrap();
    tap.send(&frame(50)).unwrap();
    bench.settle();
    for _ in 0..16 {
        bench.kick(0);
    }
    assert_eq!(bench.counts().rx_dropped, 1);
    assert_eq!(bench.queues[0].used(), [(4, 62)]);
}

#[test]
fn without_mergeable_buffers_a_frame_has_one_chain() {
    let (mut bench, tap) = stand_in(0);
    let queue = &mut bench.queues[0];
    let (head, body) = (queue.writable(12), queue.writable(1518));
    queue.push(&[head, body]);
    queue.push(&[head, body]);
    bench.kick(0);
    tap.send(&frame(9000)).unwrap();
    tap.send(&frame(1514)).unwrap();
    bench.settle();
    assert_eq!(bench.counts().rx_dropped, 1);
    assert_eq!(bench.queues[0].used(), [(0, 1526)]);
    assert_eq!(bench.joined(&[head, body], 1526), (1, frame(1514)));
}

#[test]
fn a_flood_is_handled_in_turns() {
    let (mut bench, tap) = stand_in(MERGEABLE);
    bench.offer_rx(&[1600; 100]);
    let mut sent = 0;
    while sent < 100 {
        while sent < 100 && tap.send(&frame(60)).is_ok() {
            sent += 1;
        }
        bench.turn();
        assert!(bench.counts().rx_packets <= sent);
    }
    bench.settle();
    assert_eq!(bench.counts().rx_packets, 100);
    for _ in 0..600 {
        let part = bench.queues[1].readable(&frame(60));
        bench.queues[1].push(&[part]);
        if bench.queues[1].outstanding() >= 200 {
            bench.kick(1);
            while tap.recv(&mut [0; 100]).is_ok() {}
            bench.queues[1].used();
        }
    }
    bench.kick(1);
    let counts = bench.counts();
    assert_eq!(counts.tx_packets + counts.tx_dropped, 600);
}

#[test]
fn the_driver_is_interrupted_only_where_it_asked_to_be() {
    let (mut bench, tap) = stand_in(MERGEABLE | VIRTIO_F_RING_EVENT_IDX);
    bench.offer_rx(&[100; 20]);
    bench.queues[0].set_used_event(3);
    for _ in 0..3 {
        tap.send(&frame(20)).unwrap();
        bench.settle();
    }
    assert_eq!(bench.interrupts.queue_count(0), 0);
    // This one takes three buffers: the wish lies in their middle.
    tap.send(&frame(250)).unwrap();
    bench.settle();
    assert_eq!(bench.interrupts.queue_count(0), 1);
    tap.send(&frame(20)).unwrap();
    bench.settle();
    assert_eq!(bench.interrupts.queue_count(0), 1);
    assert_eq!(bench.queues[0].used().len(), 7);
}

#[test]
fn broken_rules_stop_the_device() {
    let breaks: [fn(&mut Bench<Net>); 5] = [
        |bench| {
            let part = bench.queues[1].readable(&[0; 11]);
            bench.queues[1].push(&[part]);
            bench.kick(1);
        },
        |bench| {
            bench.queues[1].push(&[Buffer { addr: 1 << 50, len: 100, writable: false }]);
            bench.kick(1);
        },
        |bench| {
            bench.offer_rx(&[11]);
        },
        |bench| {
            bench.queues[0].push(&[Buffer { addr: u64::MAX - 20, len: 100, writable: true }]);
            bench.kick(0);
        },
        |bench| {
            bench.queues[0].set_available_index(300);
            bench.kick(0);
        },
    ];
    for break_it in breaks {
        let (mut bench, tap) = stand_in(MERGEABLE);
        break_it(&mut bench);
        assert!(bench.interrupts.broken().is_some());
        bench.restart(MERGEABLE);
        bench.offer_rx(&[1600]);
        tap.send(&frame(60)).unwrap();
        bench.settle();
        assert_eq!(bench.queues[0].used(), [(0, 72)]);
    }
}

#[test]
fn an_absurd_frame_is_dropped() {
    let (mut bench, _tap) = stand_in(MERGEABLE);
    bench.queues[1].push(&[Buffer { addr: 5 << 20, len: 70_000, writable: false }]);
    bench.kick(1);
    assert_eq!(bench.queues[1].used(), [(0, 0)]);
    assert_eq!((bench.counts().tx_packets, bench.counts().tx_dropped), (0, 1));
    assert_eq!(bench.interrupts.broken(), None);
}

#[test]
fn reset_gives_up_held_buffers() {
    let (mut bench, tap) = stand_in(MERGEABLE);
    let old = bench.offer_rx(&[1600; 4]);
    bench.device.reset();
    tap.send(&frame(60)).unwrap();
    assert_eq!(bench.turn(), 0);
    assert_eq!(bench.queues[0].read(old[0]), [0; 1600]);
}

#[test]
fn a_changed_memory_map_is_followed() {
    let (mut bench, tap) = stand_in(MERGEABLE | feature::GUEST_TSO4);
    let buffers = bench.offer_rx(&[100; 3]);
    let map = (*bench.memory.memory()).clone();
    bench.memory.lock().unwrap().replace(map);
    tap.send(&frame(150)).unwrap();
    bench.settle();
    assert_eq!(bench.queues[0].used(), [(0, 100), (1, 62)]);
    assert_eq!(bench.joined(&buffers, 162), (2, frame(150)));
}

#[test]
fn the_configuration_is_told() {
    let (bench, _tap) = stand_in(0);
    let mut config = [0xff; 14];
    bench.device.read_config(0, &mut config);
    assert_eq!(config, [2, 0, 0, 0, 0, 1, 1, 0, 1, 0, 0xdc, 0x05, 0, 0]);
    assert_ne!(bench.device.features() & feature::MTU, 0);
}

mod real_tap {
    use super::*;
    use std::process::Command;

    nix::ioctl_write_ptr_bad!(tun_set_iff, libc::TUNSETIFF, libc::ifreq);

    fn ip(arguments: &str) {
        let status = Command::new("ip").args(arguments.split(' ')).status().unwrap();
        assert!(status.success(), "ip {arguments}");
    }

    fn open(flags: i32) -> OwnedFd {
        let tun = std::fs::File::options().read(true).write(true).open("/dev/net/tun").unwrap();
        let mut request = std::mem::MaybeUninit::<libc::ifreq>::zeroed();
        // SAFETY: zeroed bytes are a valid ifreq.
        let request = unsafe { request.assume_init_mut() };
        for (target, byte) in request.ifr_name.iter_mut().zip(b"tap0") {
            *target = *byte as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = flags as libc::c_short;
        // SAFETY: the kernel reads one ifreq behind the pointer.
        unsafe { tun_set_iff(tun.as_raw_fd(), request) }.unwrap();
        tun.into()
    }

    /// Moves this thread to a fresh network namespace; `false` where that is not allowed.
    fn isolated() -> bool {
        let allowed = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).is_ok();
        if !allowed {
            println!("not root: the real tap was not tried");
        }
        allowed
    }

    #[test]
    fn the_kernel_answers_over_a_real_tap_until_it_is_deleted() {
        if !isolated() {
            return;
        }
        let tap = open(libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR);
        ip("address add 10.9.0.1/24 dev tap0");
        ip("link set tap0 up");
        let net = Net::new("net0", tap, MAC, None).unwrap_or_else(|error| panic!("{error}"));
        let all = net.features();
        let mut bench = Bench::new(net, all);
        bench.offer_rx(&[4096; 64]);
        bench.queues[0].set_used_event(0);
        let request: &[&[u8]] = &[
            &HEADER,
            &[0xff; 6],
            &MAC,
            &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1],
            &MAC,
            &[10, 9, 0, 2],
            &[0; 6],
            &[10, 9, 0, 1],
        ];
        let request = bench.queues[1].readable(&request.concat());
        bench.queues[1].push(&[request]);
        bench.kick(1);
        assert_eq!(bench.counts().tx_packets, 1);
        let mut next = 0;
        bench.until("an ARP reply", |bench| {
            let used = bench.queues[0].used();
            next += used.len();
            let base = next - used.len();
            (base..next).any(|index| {
                let data = bench.queues[0].read(Buffer {
                    addr: 0x10_0000 + 4096 * index as u64,
                    len: 64,
                    writable: true,
                });
                data[12..18] == MAC
                    && data[24..26] == [8, 6]
                    && data[32..34] == [0, 2]
                    && data[40..44] == [10, 9, 0, 1]
            })
        });
        ip("link delete tap0");
        bench.until("the link's end", |bench| bench.interrupts.config_count() > 0);
        bench.settle();
        let mut status = [0xff; 2];
        bench.device.read_config(6, &mut status);
        assert_eq!(status, [0, 0]);
    }

    #[test]
    fn other_descriptors_are_refused() {
        let message = |fd: OwnedFd, mac, mtu| {
            Net::new("net1", fd, mac, mtu).err().map(|e| e.to_string()).unwrap_or_default()
        };
        let file = || OwnedFd::from(tempfile::tempfile().unwrap());
        assert!(message(file(), MAC, None).contains("TUNGETIFF"));
        if !isolated() {
            return;
        }
        assert!(message(open(libc::IFF_TAP | libc::IFF_NO_PI), MAC, None).contains("IFF_VNET_HDR"));
        let good = || open(libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR);
        assert!(message(good(), [1, 0, 0, 0, 0, 0], None).contains("unicast"));
        assert!(message(good(), MAC, Some(67)).contains("67"));
        assert_eq!(message(good(), MAC, Some(68)), "");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    #[test]
    fn no_chains_make_it_panic(
        descriptors in prop::collection::vec((0usize..2, any::<u16>(), 0u64..3, any::<u32>(), 0u16..8, any::<u16>()), 1..40),
        frames in prop::collection::vec(0usize..5000, 0..8),
        features in prop::sample::select(vec![0, MERGEABLE, MERGEABLE | feature::GUEST_TSO4, VIRTIO_F_RING_EVENT_IDX]),
    ) {
        let (mut bench, tap) = stand_in(features);
        for bytes in frames {
            let _ = tap.send(&frame(bytes));
        }
        for (queue, at, place, len, flags, next) in descriptors {
            let buffer = match place {
                0 | 1 => Buffer { addr: 0x20_0000 + u64::from(at), len: len % 3000, writable: flags & 2 != 0 },
                _ => Buffer { addr: u64::from(at) << 24, len, writable: flags & 2 != 0 },
            };
            bench.queues[queue].push_raw(&[(buffer, flags, Some(next % 24))]);
            bench.kick(queue);
        }
        bench.device.reset();
    }
}
