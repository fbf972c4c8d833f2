//! Worlds of the devices whose other end is no network: disk, entropy, balloon, pluggable memory.

use std::cell::RefCell;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::hostile::{World, bench, drive, readable, writable};
use super::memfd;
use super::source::Source;
use crate::control::wire::DiskRates;
use crate::hotmem::Region;
use crate::hotmem::testing::{BLOCK, BLOCKS, BYTES, Fake};
use crate::virtio::VirtioDevice;
use crate::virtio::balloon::Balloon;
use crate::virtio::block::{Block, Throttle};
use crate::virtio::mem::MemDevice;
use crate::virtio::rng::Rng;
use crate::virtio::testing::{Bench, Buffer, FakeReport};

/// Of what a device offers, what the input says.
pub fn some_of(offered: u64, source: &mut Source) -> u64 {
    match source.below(4) {
        0 => offered & source.qword(),
        _ => offered,
    }
}

const DISK_BYTES: u64 = 64 << 10;
const DISK_CONTENT: u8 = 0x11;

/// A disk with its file.
type Idle = (Block, File, bool);

thread_local! {
    /// Disks of earlier inputs: making a ring takes longer than an input, and so does giving it another file.
    static DISKS: RefCell<Vec<Idle>> = const { RefCell::new(Vec::new()) };
}

/// A disk of [`DISK_BYTES`] full of [`DISK_CONTENT`].
pub fn disk(read_only: bool) -> (Block, File) {
    let mut idle = DISKS.take();
    let place = idle.iter().position(|(_, _, other)| *other == read_only);
    let old = place.map(|place| idle.swap_remove(place));
    DISKS.set(idle);
    let (block, file) = match old {
        Some((block, file, _)) => (block, file),
        None => {
            let file = memfd();
            file.set_len(DISK_BYTES).unwrap();
            let fd = OwnedFd::from(file.try_clone().unwrap());
            (Block::new("block0", fd, read_only, "fuzz").unwrap_or_else(|error| panic!("{error}")), file)
        }
    };
    file.set_len(DISK_BYTES).unwrap();
    file.write_all_at(&[DISK_CONTENT; DISK_BYTES as usize], 0).unwrap();
    (block, file)
}

/// Keeps a disk that has been reset for the next input, if it has not grown.
pub fn keep_disk(block: Block, file: File, read_only: bool) {
    if block.bytes() == DISK_BYTES {
        DISKS.with_borrow_mut(|idle| idle.push((block, file, read_only)));
    }
}

struct Disk {
    bench: Bench<Block>,
    throttle: Arc<Throttle>,
    file: File,
    read_only: bool,
    /// The file was made shorter than the disk by somebody else, and is so still.
    cut: bool,
    /// It was so once: its content is another.
    damaged: bool,
}

impl World for Disk {
    type Device = Block;

    fn bench(&mut self) -> &mut Bench<Block> {
        &mut self.bench
    }

    fn features(&mut self, source: &mut Source) -> u64 {
        some_of(self.bench.device.features(), source)
    }

    fn chain(&mut self, _queue: usize, source: &mut Source) -> Vec<Buffer> {
        let kind = source.pick(&[0u32, 1, 0, 1, 4, 8, 11, 13, 77]);
        let sector = if source.once_in(8) { source.number() } else { u64::from(source.byte()) };
        let header = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
        let mut chain = vec![readable(&self.bench, source, &header)];
        match kind {
            11 | 13 => {
                let (start, flags) = (u64::from(source.byte()), u32::from(source.byte()) & 3);
                let count = if source.once_in(8) { source.dword() } else { u32::from(source.byte()) & 31 };
                let range = [&start.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat();
                chain.push(readable(&self.bench, source, &range));
            }
            1 => {
                let sectors = source.below(9);
                chain.push(readable(&self.bench, source, &vec![kind as u8; 512 * sectors]));
            }
            _ => {
                let sectors = source.below(9) as u32;
                chain.push(writable(if source.once_in(8) { 20 } else { 512 * sectors }, source));
            }
        }
        chain.push(writable(1, source));
        chain
    }

    fn outside(&mut self, source: &mut Source) {
        match source.below(5) {
            4 => {
                self.throttle.set(DiskRates { iops: source.number(), bytes_per_sec: source.number() });
                self.bench.device.rates_changed();
            }
            0 => {
                let bytes = DISK_BYTES + 512 * u64::from(source.byte());
                let before = self.file.metadata().unwrap().len();
                self.file.set_len(bytes.max(before)).unwrap();
                self.cut &= bytes.max(before) < self.bench.device.bytes();
            }
            1 => {
                self.file.set_len(u64::from(source.word())).unwrap();
                (self.cut, self.damaged) = (true, true);
            }
            _ => {
                let before = self.bench.device.bytes();
                // A file that has become shorter is refused.
                let grown = self.bench.device.grow();
                assert!(self.bench.device.bytes() >= before, "a disk never shrinks: {grown:?}");
            }
        }
    }

    fn check(&mut self) {
        let mut config = [0; 8];
        self.bench.device.read_config(0, &mut config);
        assert_eq!(u64::from_le_bytes(config) * 512, self.bench.device.bytes());
        let length = self.file.metadata().unwrap().len();
        assert!(self.cut || length >= self.bench.device.bytes(), "the guest cut its disk to {length} bytes");
        assert!(length <= DISK_BYTES + 512 * 256, "the guest made its disk {length} bytes long");
        if self.read_only && !self.damaged {
            let mut first = [0; 512];
            self.file.read_exact_at(&mut first, 0).unwrap();
            assert!(first == [DISK_CONTENT; 512], "a disk to read from was written to");
        }
    }
}

/// A disk on io_uring: its file keeps its length, and its content if it is read-only.
pub fn block(data: &[u8]) {
    let source = &mut Source::new(data);
    let read_only = source.byte() & 7 == 7;
    let (device, file) = disk(read_only);
    let throttle = Arc::<Throttle>::default();
    let device = device.within(&throttle);
    let features = some_of(device.features(), source);
    let world =
        Disk { throttle, bench: bench(device, features), file, read_only, cut: false, damaged: false };
    let Disk { bench, file, .. } = drive(world, source);
    keep_disk(bench.device, file, read_only);
}

struct Entropy(Bench<Rng>);

impl World for Entropy {
    type Device = Rng;

    fn bench(&mut self) -> &mut Bench<Rng> {
        &mut self.0
    }

    fn features(&mut self, source: &mut Source) -> u64 {
        some_of(self.0.device.features(), source)
    }

    fn chain(&mut self, _queue: usize, source: &mut Source) -> Vec<Buffer> {
        (0..=source.below(4)).map(|_| writable(u32::from(source.word()) % 2000, source)).collect()
    }

    fn outside(&mut self, _source: &mut Source) {}

    fn check(&mut self) {}
}

/// The entropy device.
pub fn rng(data: &[u8]) {
    let source = &mut Source::new(data);
    let features = some_of(Rng::new().features(), source);
    drop(drive(Entropy(bench(Rng::new(), features)), source));
}

const FRAME: u64 = 4096;
/// Pages with known content, at the end of memory, where nothing else is.
const WATCHED: std::ops::Range<u64> = (15 << 20) / FRAME..(15 << 20) / FRAME + 32;

struct Inflated {
    bench: Bench<Balloon>,
    /// The guest has not named these pages.
    kept: Vec<u64>,
}

impl World for Inflated {
    type Device = Balloon;
    const DISCARDS: bool = true;

    fn bench(&mut self) -> &mut Bench<Balloon> {
        &mut self.bench
    }

    fn features(&mut self, source: &mut Source) -> u64 {
        some_of(self.bench.device.features(), source)
    }

    fn chain(&mut self, queue: usize, source: &mut Source) -> Vec<Buffer> {
        match queue {
            0 | 1 => {
                let frames: Vec<u32> = (0..source.below(40))
                    .map(|_| match source.below(8) {
                        0 => source.number() as u32,
                        _ => (WATCHED.start + u64::from(source.byte()) % 32) as u32,
                    })
                    .collect();
                self.kept.retain(|frame| !frames.contains(&(*frame as u32)));
                let bytes: Vec<u8> = frames.iter().flat_map(|frame| frame.to_le_bytes()).collect();
                vec![readable(&self.bench, source, &bytes)]
            }
            2 => {
                let count = source.below(80) * 10;
                let stats = source.bytes(count).to_vec();
                vec![readable(&self.bench, source, &stats)]
            }
            _ => {
                let start =
                    (WATCHED.start + u64::from(source.byte()) % 40) * FRAME + u64::from(source.byte());
                let len = if source.once_in(8) { source.number() as u32 } else { source.dword() % 40_000 };
                let end = start + u64::from(len);
                self.kept.retain(|frame| (frame + 1) * FRAME <= start || frame * FRAME >= end);
                vec![Buffer { addr: start, len, writable: true }]
            }
        }
    }

    fn outside(&mut self, source: &mut Source) {
        match source.below(2) {
            0 => {
                let bytes = source.number();
                let fits = bytes.is_multiple_of(FRAME) && bytes / FRAME <= u64::from(u32::MAX);
                assert_eq!(self.bench.device.set_target(bytes).is_ok(), fits);
            }
            _ => drop(self.bench.device.look()),
        }
    }

    fn check(&mut self) {
        let state = self.bench.device.look();
        let mut config = [0; 8];
        self.bench.device.read_config(0, &mut config);
        let words = config.as_chunks::<4>().0.iter().map(|word| u64::from(u32::from_le_bytes(*word)) * FRAME);
        assert_eq!(words.collect::<Vec<_>>(), [state.target, state.actual]);
    }
}

/// The balloon with statistics and free page reporting: the content of no page goes that the guest has not named.
pub fn balloon(data: &[u8]) {
    let source = &mut Source::new(data);
    let device = Balloon::new(Arc::new(FakeReport::default())).unwrap();
    let features = some_of(device.features(), source);
    let bench = bench(device, features);
    let memory = bench.memory.clone();
    for frame in WATCHED {
        memory.memory().write_obj(!frame, GuestAddress(frame * FRAME)).unwrap();
    }
    let mut world = Inflated { bench, kept: WATCHED.collect() };
    // Chains made of anything may name any page: the content is followed while all chains are proper ones.
    let proper = source.byte() & 1 == 0;
    if proper {
        inflate_properly(&mut world, source);
        let map = memory.memory();
        for frame in &world.kept {
            let content: u64 = map.read_obj(GuestAddress(frame * FRAME)).unwrap();
            assert_eq!(content, !frame, "page {frame} was thrown away and nobody had named it");
        }
        super::arena::check();
    } else {
        drop(drive(world, source));
    }
}

/// Only chains with a meaning.
fn inflate_properly(world: &mut Inflated, source: &mut Source) {
    while !source.is_empty() {
        let queue = source.below(5);
        let chain = world.chain(queue, source);
        world.bench.queues[queue].push(&chain);
        world.bench.kick(queue);
        if source.once_in(4) {
            world.outside(source);
        }
        world.check();
    }
    world.bench.device.reset();
}

const START: u64 = 1 << 32;
const LIMIT: u64 = BYTES / 2;

struct Plugged {
    bench: Bench<MemDevice>,
    host: Fake,
}

impl World for Plugged {
    type Device = MemDevice;

    fn bench(&mut self) -> &mut Bench<MemDevice> {
        &mut self.bench
    }

    fn features(&mut self, _source: &mut Source) -> u64 {
        // Without them it refuses to start, which the transport's target tries.
        self.bench.device.features()
    }

    fn chain(&mut self, _queue: usize, source: &mut Source) -> Vec<Buffer> {
        let kind = if source.once_in(16) { source.word() } else { u16::from(source.byte()) & 3 };
        let block = START + BLOCK * (u64::from(source.byte()) % (BLOCKS + 2));
        let address = if source.once_in(8) { source.number() } else { block };
        let count = if source.once_in(16) { source.word() } else { u16::from(source.byte()) % 40 };
        let parts = [&kind.to_le_bytes()[..], &[0; 6], &address.to_le_bytes(), &count.to_le_bytes(), &[0; 6]];
        vec![readable(&self.bench, source, &parts.concat()), writable(10, source)]
    }

    fn outside(&mut self, source: &mut Source) {
        match source.below(4) {
            0 => {
                self.bench.device.reset();
                self.host.fail(u32::MAX, 0);
                self.bench.device.withdraw().unwrap();
                assert_eq!(self.bench.device.state().plugged, 0);
                let features = self.bench.device.features();
                self.bench.restart(features);
            }
            1 => self.host.fail(u32::from(source.byte()) & 7, 1),
            _ => {
                let bytes =
                    if source.once_in(4) { source.number() } else { BLOCK * u64::from(source.byte()) };
                let fits = bytes <= LIMIT && bytes.is_multiple_of(BLOCK);
                assert_eq!(self.bench.device.set_requested(bytes).is_ok(), fits);
            }
        }
    }

    fn check(&mut self) {
        let state = self.bench.device.state();
        assert!(state.plugged <= LIMIT && state.requested <= LIMIT, "{state:?}");
        self.host.check(state.plugged, &self.host.published());
    }
}

/// Pluggable memory: what is reported is what is mapped, for devices and for the guest, never more than the limit.
pub fn mem(data: &[u8]) {
    let source = &mut Source::new(data);
    let host = Fake::new();
    let region = Region::new(BYTES, Box::new(host.clone()));
    let device = MemDevice::new(region, START, LIMIT, Arc::new(FakeReport::default()));
    let features = device.features();
    drop(drive(Plugged { bench: bench(device, features), host }, source));
}
