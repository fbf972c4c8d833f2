//! A driver that breaks every rule, for any device: chains proper and not, rings at odds, kicks, resets, registers.

use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::arena;
use super::source::Source;
use crate::virtio::VirtioDevice;
use crate::virtio::testing::{Bench, Buffer};

/// Most steps of one input.
const MAX_STEPS: usize = 200;
/// Rounds of the device thread's loop within which a device comes to rest: each handles a queue's size of chains, and there are
/// never more than a few queues full of them.
const MAX_TURNS: usize = 2000;
/// Where well-behaved buffers lie: in the first region, above all rings.
const DATA: u64 = 0x20_0000;

/// A device with everything around it.
pub trait World {
    /// The device.
    type Device: VirtioDevice;

    /// The driver can have the device throw its own rings away.
    const DISCARDS: bool = false;

    /// Device, queues and thread.
    fn bench(&mut self) -> &mut Bench<Self::Device>;

    /// Features that a driver agrees to after a reset.
    fn features(&mut self, source: &mut Source) -> u64;

    /// Fills buffers for a chain of `queue` that has a meaning.
    fn chain(&mut self, queue: usize, source: &mut Source) -> Vec<Buffer>;

    /// Something happens that is not the driver's doing.
    fn outside(&mut self, source: &mut Source);

    /// What must hold after every step.
    fn check(&mut self);
}

/// How much was offered and given back, by queue. Whoever can write to the used ring by another way could make these lie.
struct Account {
    offered: u64,
    index: u16,
    used: u64,
}

/// Sets a device up on guarded memory.
pub fn bench<D: VirtioDevice>(device: D, features: u64) -> Bench<D> {
    Bench::on(arena::fresh(), device, features)
}

/// A place for data in guest memory, seldom a bad one.
pub fn place(source: &mut Source) -> u64 {
    match source.below(24) {
        0 => source.number(),
        1 => arena::REGIONS[0].1 as u64 - u64::from(source.byte()),
        2 => arena::REGIONS[1].0 + u64::from(source.byte()),
        _ => DATA + u64::from(source.word()) * 16,
    }
}

/// A buffer anywhere, of any length.
pub fn anything(source: &mut Source) -> Buffer {
    let (addr, writable) = (place(source), source.byte() & 1 != 0);
    let len = match source.below(8) {
        0 => source.number() as u32,
        1 => 0,
        2 => 4096,
        3 => 65_536,
        _ => u32::from(source.word()) % 2000,
    };
    Buffer { addr, len, writable }
}

/// Writes `data` to a good place and makes a buffer of it.
pub fn readable<D: VirtioDevice>(bench: &Bench<D>, source: &mut Source, data: &[u8]) -> Buffer {
    let addr = DATA + u64::from(source.word()) * 16;
    bench.memory.memory().write_slice(data, GuestAddress(addr)).unwrap();
    Buffer { addr, len: data.len() as u32, writable: false }
}

/// Room at a good place.
pub fn writable(len: u32, source: &mut Source) -> Buffer {
    Buffer { addr: DATA + u64::from(source.word()) * 16, len, writable: true }
}

struct Hostile<W: World> {
    world: W,
    accounts: Vec<Account>,
    /// The driver, or the device at its behest, may have written to the used rings.
    tampered: bool,
}

/// Lets the input drive the device until it is used up. Gives the world back, its device reset.
pub fn drive<W: World>(world: W, source: &mut Source) -> W {
    let mut hostile = Hostile { world, accounts: Vec::new(), tampered: false };
    hostile.open_accounts();
    for _ in 0..MAX_STEPS {
        if source.is_empty() {
            break;
        }
        hostile.step(source);
        hostile.check();
    }
    hostile.settle();
    hostile.check();
    hostile.world.bench().device.reset();
    hostile.world.check();
    arena::check();
    hostile.world
}

impl<W: World> Hostile<W> {
    fn open_accounts(&mut self) {
        self.tampered = false;
        let queues = self.world.bench().queues.len();
        self.accounts = (0..queues).map(|_| Account { offered: 0, index: 0, used: 0 }).collect();
    }

    fn step(&mut self, source: &mut Source) {
        let queues = self.accounts.len();
        let (kind, queue) = (source.below(16), source.below(queues));
        match kind {
            0..5 => {
                let chain = self.world.chain(queue, source);
                self.push(queue, &chain, source.once_in(8));
            }
            5 => {
                let mut chain: Vec<_> = (0..source.below(5) + 1).map(|_| anything(source)).collect();
                chain.sort_by_key(|buffer| buffer.writable);
                self.push(queue, &chain, source.once_in(4));
            }
            6 => self.push_raw(queue, source),
            7 => {
                let head = if source.once_in(4) { source.word() } else { u16::from(source.byte()) % 16 };
                self.world.bench().queues[queue].offer(head);
            }
            8 => {
                let index = match source.below(4) {
                    0 => source.word(),
                    _ => self.accounts[queue].index.wrapping_add(u16::from(source.byte() % 20)),
                };
                self.world.bench().queues[queue].set_available_index(index);
            }
            9 => self.world.bench().queues[queue].set_used_event(source.word()),
            10 => self.scribble(source),
            11 => self.config(source),
            12 if source.once_in(2) => {
                let features = self.world.features(source);
                self.world.bench().restart(features);
                self.open_accounts();
            }
            13 => self.world.bench().device.on_event(u32::from(source.byte()) % 24, event_set(source)),
            _ => self.world.outside(source),
        }
        self.follow(queue);
        if source.byte() & 3 != 0 {
            self.world.bench().notify(queue);
            self.settle();
        }
    }

    fn push(&mut self, queue: usize, chain: &[Buffer], indirect: bool) {
        self.watch(chain);
        let driver = &mut self.world.bench().queues[queue];
        driver.recycle();
        // The tables of the fourth queue would lie in the hole.
        if indirect && !chain.is_empty() && queue != 3 {
            driver.push_indirect(chain);
        } else if !chain.is_empty() {
            driver.push(chain);
        }
    }

    fn push_raw(&mut self, queue: usize, source: &mut Source) {
        let count = source.below(5) + 1;
        let descriptors: Vec<_> = (0..count)
            .map(|_| {
                let next = if source.once_in(4) { source.word() } else { u16::from(source.byte()) % 16 };
                (anything(source), u16::from(source.byte()) & 7, Some(next))
            })
            .collect();
        let chain: Vec<_> = descriptors.iter().map(|(buffer, ..)| *buffer).collect();
        self.watch(&chain);
        self.world.bench().queues[queue].push_raw(&descriptors);
    }

    /// Rings lie below the data; a buffer that reaches there may be written over the used ring.
    fn watch(&mut self, chain: &[Buffer]) {
        self.tampered |= chain.iter().any(|buffer| buffer.addr < DATA);
    }

    /// Writes to any memory, rings too.
    fn scribble(&mut self, source: &mut Source) {
        let at = if source.once_in(2) { u64::from(source.dword()) % 0x6_0000 } else { place(source) };
        self.tampered |= at < DATA;
        let count = source.below(24) + 1;
        let data = source.bytes(count);
        let map = self.world.bench().memory.memory();
        // Outside of memory there is nothing to write to.
        let _ = map.write(data, GuestAddress(at));
    }

    fn config(&mut self, source: &mut Source) {
        let offset = if source.once_in(8) { source.number() } else { u64::from(source.byte()) % 72 };
        let length = source.below(9);
        let device = &mut self.world.bench().device;
        let data = source.bytes(length).to_vec();
        device.write_config(offset, &data);
        let mut data = vec![0xee; length];
        device.read_config(offset, &mut data);
        let mut beyond = [0xee; 8];
        device.read_config(4096, &mut beyond);
        assert_eq!(beyond, [0; 8], "beyond its end the configuration reads as zeroes");
    }

    /// Notes how far the available index has gone.
    fn follow(&mut self, queue: usize) {
        let index = self.world.bench().queues[queue].available_index();
        let account = &mut self.accounts[queue];
        account.offered += u64::from(index.wrapping_sub(account.index));
        account.index = index;
    }

    fn settle(&mut self) {
        for _ in 0..MAX_TURNS {
            if self.world.bench().turn() == 0 {
                return;
            }
        }
        panic!("the device is busy after {MAX_TURNS} rounds of its thread");
    }

    fn check(&mut self) {
        self.world.check();
        if self.tampered || W::DISCARDS {
            return;
        }
        let bench = self.world.bench();
        for (queue, (driver, account)) in bench.queues.iter_mut().zip(&mut self.accounts).enumerate() {
            account.used += driver.used().len() as u64;
            assert!(
                account.used <= account.offered,
                "queue {queue}: {} chains were given back, {} were offered",
                account.used,
                account.offered
            );
        }
    }
}

fn event_set(source: &mut Source) -> vmm_sys_util::epoll::EventSet {
    vmm_sys_util::epoll::EventSet::from_bits_truncate(u32::from(source.word()))
}
