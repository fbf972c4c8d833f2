//! Entropy device (virtio 1.2, section 5.4): fills what the driver offers with getrandom(2).
//!
//! The host's generator never blocks once it is seeded, and is not depleted, so the only bound needed is on work: at
//! most [`MAX_REQUEST_BYTES`] per request (the rest of the buffer stays untouched, as 5.4.6.2 allows) and a queue's size
//! of requests per event.

use vm_memory::{GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use super::chain::{Chain, ChainError};
use super::served::ServedQueue;
use super::{ActivateError, Activation, DeviceKind, Memory, VIRTIO_F_RING_EVENT_IDX, VirtioDevice};

/// Most bytes given per request; the Linux driver asks for at most 64 at a time.
pub const MAX_REQUEST_BYTES: usize = 1024;
/// One queue; the driver has one request outstanding.
const QUEUE_SIZES: [u16; 1] = [16];

struct Running {
    queue: ServedQueue,
    memory: Memory,
    interrupt: std::sync::Arc<dyn super::Interrupt>,
}

/// The device.
#[derive(Default)]
pub struct Rng {
    running: Option<Running>,
    chain: Chain,
}

impl Rng {
    /// A device that waits for its driver.
    pub fn new() -> Self {
        Self::default()
    }
}

/// Fills up to [`MAX_REQUEST_BYTES`] of the chain; returns how many.
fn fill(chain: &Chain, memory: &GuestMemoryMmap) -> Result<u32, ChainError> {
    let mut data = [0u8; MAX_REQUEST_BYTES];
    let want = usize::try_from(chain.writable_bytes()).unwrap_or(usize::MAX).min(data.len());
    // SAFETY: the pointer and length are those of a live array of ours.
    let got = unsafe { libc::getrandom(data.as_mut_ptr().cast(), want, libc::GRND_NONBLOCK) };
    // Only an unseeded host fails here; the driver then gets an empty answer and asks again.
    let got = usize::try_from(got).unwrap_or(0);
    chain.write(memory, 0, &data[..got])?;
    Ok(got as u32)
}

impl Running {
    fn serve(&mut self, chain: &mut Chain) -> Result<(), ChainError> {
        let memory = self.memory.memory();
        for _ in 0..self.queue.size() {
            if !self.queue.pop(&memory, chain)? {
                if self.queue.enable_notification(&memory)? {
                    continue;
                }
                return self.queue.signal(&memory);
            }
            let written = fill(chain, &memory)?;
            self.queue.push(&memory, chain.head(), written)?;
        }
        self.queue.look_again();
        self.queue.signal(&memory)
    }
}

impl VirtioDevice for Rng {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Rng
    }

    fn name(&self) -> &str {
        "rng"
    }

    fn features(&self) -> u64 {
        VIRTIO_F_RING_EVENT_IDX
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, queues, interrupt, watcher, .. } = activation;
        let queue = ServedQueue::new(queues.into_iter().next().flatten(), 0, &watcher, &interrupt)?;
        self.running = Some(Running { queue, memory, interrupt });
        Ok(())
    }

    fn reset(&mut self) {
        self.running = None;
    }

    fn on_event(&mut self, _token: u32, _events: EventSet) {
        let Some(running) = &mut self.running else { return };
        running.queue.take_notification();
        if let Err(error) = running.serve(&mut self.chain) {
            running.interrupt.needs_reset(&error.to_string());
            self.running = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Bench, Buffer};
    use super::*;

    #[test]
    fn buffers_are_filled_with_something_random_within_the_bound() {
        let mut bench = Bench::new(Rng::new(), 0);
        let (small, large) = (bench.queues[0].writable(64), bench.queues[0].writable(4096));
        bench.queues[0].push(&[small]);
        bench.queues[0].push(&[large]);
        bench.kick(0);
        assert_eq!(bench.queues[0].used(), [(0, 64), (1, 1024)]);
        assert_ne!(bench.queues[0].read(small), [0; 64]);
        let data = bench.queues[0].read(large);
        assert_ne!(data[960..1024], [0; 64]);
        assert_eq!(data[1024..], [0; 3072]);
        assert!(bench.interrupts.queue_count(0) > 0);
        assert_eq!(bench.interrupts.broken(), None);
    }

    #[test]
    fn a_bad_address_stops_the_device_until_it_is_reset() {
        let mut bench = Bench::new(Rng::new(), 0);
        bench.queues[0].push(&[Buffer { addr: 1 << 40, len: 8, writable: true }]);
        bench.kick(0);
        assert!(bench.interrupts.broken().unwrap().contains("outside memory"));
        let good = bench.queues[0].writable(8);
        bench.queues[0].push(&[good]);
        bench.kick(0);
        assert_eq!(bench.queues[0].used(), []);
        bench.restart(0);
        let good = bench.queues[0].writable(8);
        bench.queues[0].push(&[good]);
        bench.kick(0);
        assert_eq!(bench.queues[0].used(), [(0, 8)]);
    }

    #[test]
    fn an_index_that_runs_ahead_stops_the_device() {
        let mut bench = Bench::new(Rng::new(), 0);
        bench.queues[0].set_available_index(999);
        bench.kick(0);
        assert!(bench.interrupts.broken().unwrap().contains("runs ahead"));
    }
}
