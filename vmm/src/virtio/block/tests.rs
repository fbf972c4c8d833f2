use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;

use proptest::prelude::*;

use super::super::testing::{Bench, Buffer};
use super::*;
use crate::control::wire::DiskRates;

const DISK_BYTES: u64 = 1 << 20;
const FLUSHED: u64 = VIRTIO_BLK_F_FLUSH;

fn disk(read_only: bool) -> (Bench<Block>, std::fs::File) {
    let mut file = tempfile::tempfile().unwrap();
    let pattern: Vec<u8> = (0..DISK_BYTES).map(|i| (i / 512) as u8).collect();
    file.write_all(&pattern).unwrap();
    let fd = OwnedFd::from(file.try_clone().unwrap());
    let block = Block::new("block0", fd, read_only, "serial-1").unwrap_or_else(|error| panic!("{error}"));
    (Bench::new(block, FLUSHED), file)
}

fn in_flight(bench: &Bench<Block>) -> usize {
    bench.device.running.as_ref().map_or(0, |running| running.engine.in_flight())
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

impl Bench<Block> {
    /// Sends one request and waits for its answer: status, used length, and what is in `room`.
    fn ask(&mut self, kind: u32, sector: u64, data: &[u8], room: u32) -> (u8, u32, Vec<u8>) {
        let queue = &mut self.queues[0];
        let mut chain = vec![queue.readable(&header(kind, sector))];
        if !data.is_empty() {
            chain.push(queue.readable(data));
        }
        let (room, status) = (queue.writable(room), queue.writable(1));
        if room.len > 0 {
            chain.push(room);
        }
        chain.push(status);
        queue.push(&chain);
        self.kick(0);
        let used = self.until_used(0, 1);
        (self.queues[0].read(status)[0], used[0].1, self.queues[0].read(room))
    }

    fn disk_stats(&self) -> DiskStats {
        match self.device.stats() {
            DeviceStats::Disk(stats) => stats,
            other => panic!("{other:?}"),
        }
    }
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

#[test]
fn what_is_written_is_read_back_and_in_the_file() {
    let (mut bench, mut file) = disk(false);
    let data: Vec<u8> = (0..4096).map(|i| (i * 7) as u8).collect();
    assert_eq!(bench.ask(1, 8, &data, 0), (0, 1, vec![]));
    let (status, used, read) = bench.ask(0, 8, &[], 4096);
    assert_eq!((status, used), (0, 4097));
    assert_eq!(read, data);
    let mut on_disk = vec![0; 4096];
    file.seek(SeekFrom::Start(8 * 512)).unwrap();
    file.read_exact(&mut on_disk).unwrap();
    assert_eq!(on_disk, data);
    assert_eq!(bench.ask(4, 0, &[], 0), (0, 1, vec![]));
    let stats = bench.disk_stats();
    assert_eq!((stats.reads, stats.writes, stats.flushes, stats.errors), (1, 1, 1, 0));
    assert_eq!((stats.read_bytes, stats.written_bytes), (4096, 4096));
}

#[test]
fn the_configuration_tells_size_and_limits() {
    let (bench, _file) = disk(false);
    let mut config = [0xff; 64];
    bench.device.read_config(0, &mut config);
    assert_eq!(config[..8], (DISK_BYTES / 512).to_le_bytes());
    assert_eq!(config[12..16], 126u32.to_le_bytes());
    assert_eq!(config[20..24], 512u32.to_le_bytes());
    assert_eq!(config[60..], [0; 4]);
    bench.device.read_config(u64::MAX, &mut config);
    assert_eq!(config, [0; 64]);
    assert_eq!(bench.device.features() & VIRTIO_BLK_F_RO, 0);
}

#[test]
fn the_serial_is_told() {
    let (mut bench, _file) = disk(false);
    let (status, used, id) = bench.ask(8, 0, &[], 20);
    assert_eq!((status, used), (0, 21));
    assert_eq!(id, b"serial-1\0\0\0\0\0\0\0\0\0\0\0\0");
}

#[test]
fn beyond_the_end_and_between_sectors_is_an_error() {
    let (mut bench, _file) = disk(false);
    let last = DISK_BYTES / 512 - 1;
    assert_eq!(bench.ask(0, last, &[], 512).0, 0);
    for (kind, sector, data, room) in [
        (0, last, 0, 1024),
        (0, last + 1, 0, 512),
        (0, u64::MAX, 0, 512),
        (0, u64::MAX / 512, 0, 512),
        (0, 0, 0, 511),
        (1, last, 1024, 0),
        (1, 0, 513, 0),
    ] {
        assert_eq!(bench.ask(kind, sector, &vec![1; data], room).0, 1, "{kind} {sector} {data} {room}");
    }
    assert_eq!(bench.ask(77, 0, &[], 0).0, 2);
    assert_eq!(bench.disk_stats().errors, 8);
    assert_eq!(bench.interrupts.broken(), None);
}

#[test]
fn a_discard_frees_space_and_zeroes_are_zeroes() {
    let (mut bench, file) = disk(false);
    file.sync_all().unwrap();
    let before = file.metadata().unwrap().blocks();
    assert_eq!(bench.ask(11, 0, &range(0, 1024, 0), 0).0, 0);
    file.sync_all().unwrap();
    assert!(file.metadata().unwrap().blocks() < before, "space was given back");
    assert_eq!(bench.ask(13, 0, &range(1030, 8, 0), 0).0, 0);
    assert_eq!(bench.ask(13, 0, &range(1040, 8, 1), 0).0, 0);
    let (_, _, data) = bench.ask(0, 1029, &[], 512 * 20);
    let sectors: Vec<u8> = data.chunks(512).map(|sector| sector[0]).collect();
    let expected: Vec<u8> = (1029..1049u32)
        .map(|i| if (1030..1038).contains(&i) || (1040..1048).contains(&i) { 0 } else { i as u8 })
        .collect();
    assert_eq!(sectors, expected);
    assert_eq!(file.metadata().unwrap().len(), DISK_BYTES);
    assert_eq!(bench.disk_stats().discards, 3);
    assert_eq!(bench.ask(11, 0, &range(0, 8, 1), 0).0, 2, "unmap flag in a discard");
    assert_eq!(bench.ask(13, 0, &range(0, 8, 2), 0).0, 2, "unknown flag");
    assert_eq!(bench.ask(11, 0, &range(2048, 8, 0), 0).0, 1, "beyond the end");
    assert_eq!(bench.ask(11, 0, &[range(0, 8, 0), range(8, 8, 0)].concat(), 0).0, 1, "too many ranges");
}

#[test]
fn a_read_only_disk_refuses_changes() {
    let (mut bench, mut file) = disk(true);
    assert_ne!(bench.device.features() & VIRTIO_BLK_F_RO, 0);
    assert_eq!(bench.ask(1, 1, &[9; 512], 0).0, 1);
    assert_eq!(bench.ask(11, 0, &range(0, 8, 0), 0).0, 1);
    assert_eq!(bench.ask(13, 0, &range(0, 8, 0), 0).0, 1);
    let (status, _, data) = bench.ask(0, 1, &[], 512);
    assert_eq!((status, data), (0, vec![1; 512]));
    let mut all = Vec::new();
    file.seek(SeekFrom::Start(0)).unwrap();
    file.read_to_end(&mut all).unwrap();
    assert!(all.chunks(512).enumerate().all(|(i, sector)| sector[0] == i as u8));
}

#[test]
fn requests_with_many_pieces_come_as_tables() {
    let (mut bench, _file) = disk(false);
    assert_ne!(bench.device.features() & VIRTIO_F_RING_INDIRECT_DESC, 0);
    let queue = &mut bench.queues[0];
    let pieces: Vec<_> = (0..SEG_MAX).map(|_| queue.writable(512)).collect();
    let (head, status) = (queue.readable(&header(0, 10)), queue.writable(1));
    queue.push_indirect(&[&[head], pieces.as_slice(), &[status]].concat());
    bench.kick(0);
    assert_eq!(bench.until_used(0, 1), [(0, SEG_MAX * 512 + 1)]);
    for (sector, piece) in (10..).zip(&pieces) {
        assert_eq!(bench.queues[0].read(*piece), [sector; 512]);
    }
}

#[test]
fn a_full_queue_is_served_although_heads_repeat() {
    let (mut bench, _file) = disk(false);
    let queue = &mut bench.queues[0];
    let (head, data, status) = (queue.readable(&header(0, 3)), queue.writable(512), queue.writable(1));
    let first = queue.push(&[head, data, status]);
    for _ in 1..128 {
        queue.offer(first);
    }
    bench.kick(0);
    assert_eq!(bench.until_used(0, 128), vec![(u32::from(first), 513); 128]);
    assert_eq!(bench.queues[0].read(data), [3; 512]);
}

#[test]
fn reset_leaves_nothing_in_flight_and_the_disk_works_again() {
    let (mut bench, _file) = disk(false);
    for round in 0..3 {
        let queue = &mut bench.queues[0];
        let data = queue.writable(64 * 1024);
        for sector in 0..8 {
            let (head, status) = (queue.readable(&header(0, sector)), queue.writable(1));
            queue.push(&[head, data, status]);
        }
        // Only the notification is handled: completions are still to come.
        bench.device.on_event(TOKEN_QUEUE, EventSet::IN);
        assert!(in_flight(&bench) > 0, "round {round}");
        bench.restart(FLUSHED);
        assert_eq!(in_flight(&bench), 0);
    }
    assert_eq!(bench.ask(0, 5, &[], 512).2, [5; 512]);
}

#[test]
fn another_thread_can_reset_while_the_submitter_waits() {
    let (mut bench, _file) = disk(false);
    let queue = &mut bench.queues[0];
    for sector in 0..32 {
        let status = queue.writable(1);
        let (write, data) = (queue.readable(&header(1, sector)), queue.readable(&[3; 512]));
        queue.push(&[write, data, status]);
        let flush = queue.readable(&header(4, 0));
        queue.push(&[flush, status]);
    }
    bench.device.on_event(TOKEN_QUEUE, EventSet::IN);
    assert!(in_flight(&bench) > 0);
    let device = &mut bench.device;
    std::thread::scope(|scope| scope.spawn(|| device.reset()).join()).unwrap();
    assert_eq!(in_flight(&bench), 0);
    let given_back = bench.queues[0].used().len();
    assert_eq!(bench.turn(), 0);
    assert_eq!(
        bench.queues[0].used().len(),
        0,
        "nothing is given back after the reset ({given_back} before)"
    );
}

#[test]
fn without_flush_every_write_is_written_through() {
    let (mut bench, _file) = disk(false);
    bench.restart(0);
    assert!(bench.device.running.as_ref().unwrap().write_through);
    assert_eq!(bench.ask(1, 8, &[5; 1024], 0).0, 0);
    assert_eq!(bench.ask(0, 8, &[], 1024).2, [5; 1024]);
}

#[test]
fn a_chain_without_room_for_an_answer_stops_the_device() {
    for build in [
        (|q| vec![q.readable(&header(0, 0))]) as fn(&mut super::super::testing::Driver) -> Vec<Buffer>,
        |q| vec![q.readable(&[0; 15]), q.writable(513)],
        |q| vec![q.writable(513)],
        |q| vec![q.readable(&header(0, 0)), Buffer { addr: 1 << 45, len: 513, writable: true }],
        |q| vec![Buffer { addr: u64::MAX - 7, len: 16, writable: false }, q.writable(513)],
        |q| {
            vec![
                q.readable(&header(0, 0)),
                Buffer { addr: (4 << 20) - 512, len: 1024, writable: true },
                q.writable(1),
            ]
        },
    ] {
        let (mut bench, _file) = disk(false);
        let chain = build(&mut bench.queues[0]);
        bench.queues[0].push(&chain);
        bench.kick(0);
        assert!(bench.interrupts.broken().is_some());
        bench.restart(FLUSHED);
        assert_eq!(bench.ask(0, 5, &[], 512).2, [5; 512]);
    }
}

#[test]
fn a_file_that_shrank_answers_with_an_error() {
    let (mut bench, file) = disk(false);
    file.set_len(4096).unwrap();
    assert_eq!(bench.ask(0, 7, &[], 1024).0, 1);
    assert_eq!(bench.ask(0, 7, &[], 512).0, 0);
}

#[test]
fn direct_io_works_with_crooked_buffers() {
    use std::os::unix::fs::OpenOptionsExt;
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let path = dir.path().join("disk");
    let pattern: Vec<u8> = (0..DISK_BYTES).map(|i| (i / 4096) as u8).collect();
    std::fs::write(&path, pattern).unwrap();
    let mut options = std::fs::File::options();
    let opened = options.read(true).write(true).custom_flags(libc::O_DIRECT).open(&path);
    let file = opened.expect("/var/tmp is on a file system with O_DIRECT");
    let block = Block::new("block0", file.into(), false, "").unwrap();
    assert!(block.backend.memory_align > 1);
    let mut bench = Bench::new(block, FLUSHED);
    let queue = &mut bench.queues[0];
    // Three bytes off, and longer than one bounce.
    let data: Vec<u8> = (0..200 * 1024 + 16).map(|i| (i % 251) as u8).collect();
    let mut payload = queue.readable(&data);
    (payload.addr, payload.len) = (payload.addr + 3, 192 * 1024);
    let (head, status) = (queue.readable(&header(1, 64)), queue.writable(1));
    queue.push(&[head, payload, status]);
    bench.kick(0);
    bench.until_used(0, 1);
    assert_eq!(bench.queues[0].read(status), [0]);
    let queue = &mut bench.queues[0];
    let mut room = queue.writable(200 * 1024);
    (room.addr, room.len) = (room.addr + 5, 192 * 1024);
    let head = queue.readable(&header(0, 64));
    queue.push(&[head, room, status]);
    bench.kick(0);
    bench.until_used(0, 1);
    assert!(bench.queues[0].read(room) == data[3..3 + 192 * 1024]);
    assert!(std::fs::read(&path).unwrap()[64 * 512..][..192 * 1024] == data[3..3 + 192 * 1024]);
}

/// A loop device; detached when dropped.
struct Loop(String);

impl Loop {
    /// `None` where loop devices cannot be had (not root, or a container).
    fn attach(file: &std::path::Path) -> Option<Self> {
        let output = std::process::Command::new("losetup").args(["--show", "-f"]).arg(file).output().ok()?;
        let name = String::from_utf8(output.stdout).ok()?.trim().to_owned();
        output.status.success().then_some(Self(name))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = std::process::Command::new("losetup").args(["-d", &self.0]).status();
    }
}

#[test]
fn a_block_device_is_a_disk_too() {
    use std::os::unix::fs::OpenOptionsExt;
    let file = tempfile::NamedTempFile::new_in("/var/tmp").unwrap();
    std::fs::write(file.path(), vec![7; DISK_BYTES as usize]).unwrap();
    let Some(device) = Loop::attach(file.path()) else {
        println!("no loop device: block devices were not tried");
        return;
    };
    for flags in [0, libc::O_DIRECT] {
        let opened =
            std::fs::File::options().read(true).write(true).custom_flags(flags).open(&device.0).unwrap();
        let block = Block::new("block0", opened.into(), false, "").unwrap_or_else(|error| panic!("{error}"));
        assert_eq!((block.bytes(), block.backend.is_device), (DISK_BYTES, true));
        let mut bench = Bench::new(block, FLUSHED);
        assert_eq!(bench.ask(1, 8, &[9; 4096], 0).0, 0);
        assert_eq!(bench.ask(4, 0, &[], 0).0, 0);
        assert_eq!(bench.ask(0, 8, &[], 4096).2, [9; 4096]);
        assert_eq!(bench.ask(11, 0, &range(64, 64, 0), 0).0, 0, "discard");
        assert_eq!(bench.ask(13, 0, &range(16, 8, 0), 0).0, 0, "zeroes");
        assert_eq!(bench.ask(13, 0, &range(24, 8, 1), 0).0, 0, "zeroes and unmap");
        assert_eq!(bench.ask(0, 16, &[], 8192).2, [0; 8192]);
        assert_eq!(bench.ask(0, 32, &[], 512).2, [7; 512]);
    }
}

#[test]
fn descriptors_that_cannot_be_a_disk_are_refused() {
    let message = |file: OwnedFd, read_only, serial: &str| {
        Block::new("block3", file, read_only, serial).err().map(|error| error.to_string()).unwrap_or_default()
    };
    let file = tempfile::NamedTempFile::new().unwrap();
    let open = || OwnedFd::from(std::fs::File::open(file.path()).unwrap());
    let write = || OwnedFd::from(std::fs::File::options().read(true).write(true).open(file.path()).unwrap());
    assert!(message(write(), false, "").contains("block3: its size of 0 bytes"));
    file.as_file().set_len(1000).unwrap();
    assert!(message(write(), false, "").contains("1000 bytes"));
    file.as_file().set_len(1024).unwrap();
    assert!(message(open(), false, "").contains("for reading only"));
    assert_eq!(message(open(), true, ""), "");
    assert!(message(write(), false, "123456789012345678901").contains("serial"));
    assert!(message(write(), false, "a\n").contains("serial"));
    let (pipe, _other) = nix::unistd::pipe().unwrap();
    assert!(message(pipe, true, "").contains("neither a regular file nor a block device"));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    #[test]
    fn no_chain_makes_it_panic_or_leave_the_disk(
        descriptors in prop::collection::vec((any::<u16>(), 0u64..3, any::<u32>(), 0u16..8, any::<u16>()), 1..20),
        kind in 0u32..16, sector in 0u64..4096, heads in prop::collection::vec(any::<u16>(), 1..8),
    ) {
        let (mut bench, file) = disk(false);
        let queue = &mut bench.queues[0];
        let head = queue.readable(&header(kind, sector));
        for (at, place, len, flags, next) in descriptors {
            let buffer = match place {
                0 => head,
                1 => Buffer { addr: 0x20_0000 + u64::from(at), len: len % 5000, writable: flags & 2 != 0 },
                _ => Buffer { addr: u64::from(at) << 24, len, writable: flags & 2 != 0 },
            };
            queue.push_raw(&[(buffer, flags, Some(next % 24))]);
        }
        for head in heads {
            queue.offer(head % 160);
        }
        bench.kick(0);
        bench.device.reset();
        prop_assert_eq!(file.metadata().unwrap().len(), DISK_BYTES);
    }
}

#[test]
fn a_disk_grows_with_its_file_tells_the_driver_and_never_shrinks() {
    let (mut bench, file) = disk(false);
    let sectors = |bench: &Bench<Block>| {
        let mut bytes = [0; 8];
        bench.device.read_config(0, &mut bytes);
        u64::from_le_bytes(bytes)
    };
    assert_eq!(bench.device.grow().unwrap(), DISK_BYTES);
    assert_eq!(bench.interrupts.config_count(), 0, "nothing to tell");
    file.set_len(2 * DISK_BYTES).unwrap();
    assert_eq!((sectors(&bench), bench.ask(0, DISK_BYTES / 512, &[], 512).0), (DISK_BYTES / 512, 1));
    assert_eq!(bench.device.grow().unwrap(), 2 * DISK_BYTES);
    assert_eq!((sectors(&bench), bench.interrupts.config_count()), (2 * DISK_BYTES / 512, 1));
    assert_eq!(bench.ask(0, DISK_BYTES / 512, &[], 512), (0, 513, vec![0; 512]));
    for bytes in [DISK_BYTES, 2 * DISK_BYTES + 1, 0] {
        file.set_len(bytes).unwrap();
        assert!(bench.device.grow().is_err(), "{bytes}");
        assert_eq!((bench.device.bytes(), sectors(&bench)), (2 * DISK_BYTES, 2 * DISK_BYTES / 512));
    }
}

#[test]
fn a_closed_disk_gives_its_ring_to_the_next_one() {
    let (mut bench, other) = disk(false);
    assert_eq!(bench.ask(0, 5, &[], 512).2, [5; 512]);
    let mut spares: Vec<Engine> = bench.device.close().into_iter().collect();
    assert_eq!(spares.len(), 1);
    assert!(bench.device.close().is_none(), "once only");
    let file = || OwnedFd::from(tempfile::tempfile().unwrap());
    assert!(Block::with_spare("block1", file(), false, "", &mut spares).is_err(), "an empty file");
    assert_eq!(spares.len(), 1, "what is refused takes no ring");
    let grown = file();
    nix::unistd::ftruncate(&grown, 4096).unwrap();
    let next = Block::with_spare("block2", grown, false, "", &mut spares).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(Bench::new(next, FLUSHED).ask(0, 0, &[], 512), (0, 513, vec![0; 512]));
    let error = Block::with_spare("block3", OwnedFd::from(other), false, "", &mut spares);
    assert!(error.is_err_and(|e| e.to_string().contains("block3: no ring is left")));
}

/// A disk within rates that others may share.
fn paced(throttle: &Arc<Throttle>) -> Bench<Block> {
    let file = tempfile::tempfile().unwrap();
    file.set_len(DISK_BYTES).unwrap();
    let block = Block::new("block0", file.into(), false, "").unwrap_or_else(|error| panic!("{error}"));
    Bench::new(block.within(throttle), FLUSHED)
}

/// After the first request that moves anything, the next is due in hours.
const ONE_BYTE: DiskRates = DiskRates { iops: 0, bytes_per_sec: 1 };

impl Bench<Block> {
    /// Offers a read of 4 KiB and handles what is ready.
    fn offer_read(&mut self) {
        let queue = &mut self.queues[0];
        let chain = [queue.readable(&header(0, 8)), queue.writable(4096), queue.writable(1)];
        queue.push(&chain);
        self.kick(0);
    }

    fn set_rates(&mut self, throttle: &Throttle, rates: DiskRates) {
        throttle.set(rates);
        self.device.rates_changed();
    }
}

#[test]
fn a_request_waits_for_its_time_and_goes_when_the_rate_is_another() {
    let throttle = Arc::default();
    let mut bench = paced(&throttle);
    throttle.set(ONE_BYTE);
    assert_eq!(bench.ask(8, 0, &[], 20).0, 0);
    assert_eq!(bench.ask(77, 0, &[], 0).0, 2);
    // Neither the serial nor a refusal was paid for.
    assert_eq!(bench.ask(0, 8, &[], 4096).0, 0);
    for _ in 0..3 {
        bench.offer_read();
    }
    // It settles: what waits is not looked at, also by a driver that notifies all the time.
    for _ in 0..100 {
        bench.kick(0);
    }
    assert_eq!((bench.queues[0].used().len(), in_flight(&bench), bench.turn()), (0, 0, 0));
    bench.set_rates(&throttle, DiskRates::default());
    assert_eq!(bench.until_used(0, 3).len(), 3);
    assert_eq!(bench.interrupts.broken(), None);
}

#[test]
fn all_that_waits_goes_by_itself_whatever_it_is() {
    let throttle = Arc::default();
    let mut bench = paced(&throttle);
    throttle.set(DiskRates { iops: 200, bytes_per_sec: 100 << 20 });
    let queue = &mut bench.queues[0];
    for _ in 0..3 {
        let read = [queue.readable(&header(0, 8)), queue.writable(4096), queue.writable(1)];
        queue.push(&read);
        let write = [queue.readable(&header(1, 16)), queue.readable(&[5; 4096]), queue.writable(1)];
        queue.push(&write);
        for kind in [11, 13] {
            let change = [queue.readable(&header(kind, 0)), queue.readable(&range(64, 8, 0))];
            let status = queue.writable(1);
            queue.push(&[change[0], change[1], status]);
        }
        let flush = [queue.readable(&header(4, 0)), queue.writable(1)];
        queue.push(&flush);
    }
    bench.kick(0);
    assert_eq!(bench.until_used(0, 15).len(), 15);
    let stats = bench.disk_stats();
    assert_eq!((stats.reads, stats.writes, stats.flushes, stats.discards, stats.errors), (3, 3, 3, 6, 0));
    // Nothing is left that would wake the device.
    bench.settle();
}

#[test]
fn a_reset_forgets_what_waits_and_what_others_may_do_is_as_before() {
    let throttle: Arc<Throttle> = Arc::default();
    let (mut one, mut other) = (paced(&throttle), paced(&throttle));
    throttle.set(ONE_BYTE);
    assert_eq!(one.ask(0, 8, &[], 4096).0, 0);
    other.offer_read();
    one.offer_read();
    for _ in 0..3 {
        other.restart(FLUSHED);
        assert_eq!(other.queues[0].used().len(), 0);
        other.offer_read();
        assert_eq!(other.queues[0].used().len(), 0, "a reset buys no time");
    }
    // It was in front of the line, and goes.
    let ring = other.device.close().unwrap();
    one.set_rates(&throttle, DiskRates { iops: 1_000_000, bytes_per_sec: 1 << 40 });
    one.until_used(0, 1);
    // Its timer does not wake the disk that gets its ring.
    let file = tempfile::tempfile().unwrap();
    file.set_len(DISK_BYTES).unwrap();
    let block = Block::with_spare("block2", file.into(), false, "", &mut vec![ring]).unwrap();
    let mut next = Bench::new(block.within(&throttle), FLUSHED);
    assert_eq!((next.ask(0, 8, &[], 512).0, next.turn()), (0, 0));
}
