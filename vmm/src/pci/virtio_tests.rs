//! Drives a function as a guest would, and as no guest should.

use super::*;
use crate::virtio::{ActivateError, DeviceKind};
use proptest::prelude::*;
use std::sync::atomic::AtomicU32;
use vm_memory::GuestMemoryAtomic;
use vmm_sys_util::epoll::{Epoll, EventSet};

#[derive(Default)]
struct Counters {
    activated: AtomicU32,
    reset: AtomicU32,
    connected: AtomicU32,
    fired: AtomicU32,
    complaints: Mutex<Vec<String>>,
}

struct Fake(Arc<Counters>, Option<Activation>);
impl VirtioDevice for Fake {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Rng
    }
    fn name(&self) -> &str {
        "fake"
    }
    fn features(&self) -> u64 {
        FEATURE_EVENT_IDX
    }
    fn queue_sizes(&self) -> &[u16] {
        &[256, 128]
    }
    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0xab);
    }
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        assert!(self.1.is_none(), "activated twice without a reset");
        if activation.queues[0].is_none() {
            return Err(ActivateError::MissingQueue(0));
        }
        self.0.activated.fetch_add(1, Ordering::Relaxed);
        self.1 = Some(activation);
        Ok(())
    }
    fn reset(&mut self) {
        self.0.reset.fetch_add(1, Ordering::Relaxed);
        self.1 = None;
    }
    fn on_event(&mut self, _token: u32, _events: EventSet) {}
}

impl Host for Counters {
    fn connect_notify(&self, _fd: &EventFd, _address: u64) -> std::io::Result<()> {
        self.connected.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
    fn disconnect_notify(&self, _fd: &EventFd, _address: u64) {
        self.connected.fetch_sub(1, Ordering::Relaxed);
    }
    fn device_needs_reset(&self, device: &str, reason: &str) {
        self.complaints.lock().unwrap().push(format!("{device}: {reason}"));
    }
}

struct Vectors(Arc<Counters>);
impl VectorHost for Vectors {
    fn route(&self, _vector: u16, _message: Message) -> bool {
        true
    }
    fn fire(&self, _vector: u16) {
        self.0.fired.fetch_add(1, Ordering::Relaxed);
    }
}

const BAR: u32 = 0xc000_8000;

fn function() -> (VirtioFunction, Arc<Counters>, Arc<Mutex<Fake>>) {
    let counters = Arc::new(Counters::default());
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let device = Arc::new(Mutex::new(Fake(counters.clone(), None)));
    let function = VirtioFunction::new(FunctionParts {
        device: device.clone(),
        memory: GuestMemoryAtomic::new(memory),
        watcher: Watcher::new(Arc::new(Epoll::new().unwrap()), 0),
        host: counters.clone(),
        vectors: Box::new(Vectors(counters.clone())),
        bar: BAR,
    });
    (function, counters, device)
}

fn bring_up(f: &mut VirtioFunction, descriptors: u64) {
    f.write_config(4, &[6, 0]);
    f.write_bar(0x14, &[3]);
    for (select, features) in [(0u32, FEATURE_EVENT_IDX as u32), (1, 1)] {
        f.write_bar(0x08, &select.to_le_bytes());
        f.write_bar(0x0c, &features.to_le_bytes());
    }
    f.write_bar(0x14, &[0xb]);
    f.write_bar(0x16, &0u16.to_le_bytes());
    f.write_bar(0x18, &64u16.to_le_bytes());
    f.write_bar(0x1a, &1u16.to_le_bytes());
    f.write_bar(0x20, &descriptors.to_le_bytes());
    f.write_bar(0x28, &0x2000u64.to_le_bytes());
    f.write_bar(0x30, &0x3000u64.to_le_bytes());
    f.write_bar(0x1c, &1u16.to_le_bytes());
    f.write_bar(0x14, &[0xf]);
}

fn status(f: &mut VirtioFunction) -> u8 {
    let mut byte = [0];
    f.read_bar(0x14, &mut byte);
    byte[0]
}

#[test]
fn a_driver_brings_the_device_up_is_interrupted_and_resets_it() {
    let (mut f, counters, device) = function();
    bring_up(&mut f, 0x1000);
    assert_eq!((status(&mut f), counters.activated.load(Ordering::Relaxed)), (0xf, 1));
    assert_eq!(counters.connected.load(Ordering::Relaxed), 1);
    let msix = f.offsets.msix as u16;
    f.write_config(msix + 2, &CONTROL_ENABLE.to_le_bytes());
    f.write_bar(MSIX_TABLE + 16, &0xfee0_0000u32.to_le_bytes());
    f.write_bar(MSIX_TABLE + 28, &0u32.to_le_bytes());
    device.lock().unwrap().1.as_ref().unwrap().interrupt.queue(0);
    assert_eq!(counters.fired.load(Ordering::Relaxed), 1);
    let mut isr = [0];
    f.read_bar(ISR, &mut isr);
    assert_eq!(isr, [1]);
    f.write_bar(NOTIFY, &0u32.to_le_bytes());
    let notified = device.lock().unwrap().1.as_ref().unwrap().queues[0].as_ref().unwrap().notify.read();
    assert_eq!(notified.unwrap(), 1);
    f.write_bar(0x14, &[0]);
    assert_eq!((status(&mut f), counters.connected.load(Ordering::Relaxed)), (0, 0));
    bring_up(&mut f, 0x1000);
    assert_eq!(counters.activated.load(Ordering::Relaxed), 2);
}

#[test]
fn without_bus_mastering_nothing_of_the_device_goes_on() {
    let (mut f, counters, device) = function();
    bring_up(&mut f, 0x1000);
    let interrupt = device.lock().unwrap().1.as_ref().unwrap().interrupt.clone();
    let msix = f.offsets.msix as u16;
    f.write_config(msix + 2, &CONTROL_ENABLE.to_le_bytes());
    f.write_bar(MSIX_TABLE + 16, &0xfee0_0000u32.to_le_bytes());
    f.write_bar(MSIX_TABLE + 28, &0u32.to_le_bytes());
    interrupt.queue(0);
    assert_eq!(counters.fired.load(Ordering::Relaxed), 1);
    // Other bits, and the same again.
    f.write_config(4, &[6, 4]);
    f.write_config(5, &[0]);
    assert_eq!((status(&mut f), counters.reset.load(Ordering::Relaxed)), (0xf, 0));
    f.write_config(4, &[2]);
    assert_eq!((status(&mut f), counters.reset.load(Ordering::Relaxed)), (0, 1));
    assert!(device.lock().unwrap().1.is_none() && counters.connected.load(Ordering::Relaxed) == 0);
    interrupt.queue(0);
    assert_eq!(counters.fired.load(Ordering::Relaxed), 1, "an interrupt is a write, too");
    f.write_config(4, &[2]);
    assert_eq!(counters.reset.load(Ordering::Relaxed), 1);
    bring_up(&mut f, 0x1000);
    assert_eq!((status(&mut f), counters.activated.load(Ordering::Relaxed)), (0xf, 2));
}

#[test]
fn a_ring_outside_of_memory_stops_the_device_until_it_is_reset() {
    let (mut f, counters, _device) = function();
    bring_up(&mut f, 0xffff_ffff_ffff_0000);
    assert_eq!(status(&mut f), 0x4f);
    assert_eq!(counters.activated.load(Ordering::Relaxed), 0);
    assert_eq!(
        counters.complaints.lock().unwrap().as_slice(),
        ["fake: queue 0: its rings lie outside of memory"]
    );
    f.write_bar(0x14, &[0]);
    assert_eq!(status(&mut f), 0);
}

#[test]
fn notifications_follow_a_bar_that_moves() {
    let (mut f, counters, _device) = function();
    bring_up(&mut f, 0x1000);
    f.write_config(0x10, &0xd000_0000u32.to_le_bytes());
    assert_eq!(f.bar(), Some(0xd000_0000));
    assert_eq!(f.active[0].1, 0xd000_0000 + NOTIFY);
    assert_eq!(counters.connected.load(Ordering::Relaxed), 1);
}

#[test]
fn the_window_reaches_the_bar() {
    let (mut f, _counters, _device) = function();
    let at = f.offsets.window as u16;
    f.write_config(at + 8, &(DEVICE_CONFIG as u32).to_le_bytes());
    f.write_config(at + 12, &2u32.to_le_bytes());
    let mut data = [0; 2];
    f.read_config(at + 16, &mut data);
    assert_eq!(data, [0xab; 2]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    /// Anything may be written anywhere; afterwards a reset brings a working device.
    #[test]
    fn random_accesses_never_break_the_function(
        steps in proptest::collection::vec(
            (0u8..6, any::<u64>(), proptest::collection::vec(any::<u8>(), 1..9)), 0..200)
    ) {
        let (mut f, counters, device) = function();
        bring_up(&mut f, 0x1000);
        for (kind, at, mut data) in steps {
            match kind {
                0 => f.write_config(at as u16 % 512, &data),
                1 => f.read_config(at as u16 % 512, &mut data),
                2 => f.write_bar(at % BAR_SIZE, &data),
                3 => f.write_bar(at % COMMON_LENGTH, &data),
                4 => f.read_bar(at % BAR_SIZE, &mut data),
                _ => if let Some(active) = &device.lock().unwrap().1 {
                    active.interrupt.queue(at as u16);
                    active.interrupt.config();
                },
            }
        }
        f.reset();
        prop_assert_eq!(counters.connected.load(Ordering::Relaxed), 0);
        bring_up(&mut f, 0x1000);
        prop_assert_eq!(status(&mut f), 0xf);
    }
}
