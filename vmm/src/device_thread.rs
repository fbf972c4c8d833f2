//! The device thread: one epoll loop over the console and all virtio devices.
//!
//! An event's 64 bits are the device's number in the [`Table`] and its own token ([`Watcher`]). The loop blocks until something happens; it has a
//! time-out only while console output waits for its stream.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::Duration;

use vmm_sys_util::epoll::{Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use crate::console::{Console, Input};
use crate::virtio::{VirtioDevice, Watcher};

/// Stack of the device thread in bytes; devices keep large buffers elsewhere.
const STACK_BYTES: usize = 256 * 1024;
/// Events taken from the kernel at once.
const EVENTS: usize = 32;
/// The loop's own "device".
const OWN: u32 = u32::MAX;
const TOKEN_EXIT: u32 = 0;
const TOKEN_CONSOLE_WAKE: u32 = 1;
const TOKEN_CONSOLE_INPUT: u32 = 2;

/// A running device thread.
pub struct DeviceThread {
    epoll: Arc<Epoll>,
    console: Arc<Console>,
    exit: EventFd,
    thread: Option<JoinHandle<()>>,
}

type Device = Arc<Mutex<dyn VirtioDevice>>;

/// The devices that the thread serves, by number. Numbers are not used again: an event of a device that has gone reaches nobody.
#[derive(Default)]
pub struct Table {
    devices: RwLock<BTreeMap<u32, Device>>,
    next: AtomicU32,
}

impl Table {
    /// Adds a device; `None` when the numbers are used up.
    pub fn add(&self, device: Device) -> Option<u32> {
        let taken = self.next.fetch_update(Ordering::AcqRel, Ordering::Acquire, |n| n.checked_add(1)).ok()?;
        self.devices.write().unwrap_or_else(PoisonError::into_inner).insert(taken, device);
        Some(taken)
    }

    /// Removes a device, which may be served for the last time right now.
    pub fn remove(&self, number: u32) {
        self.devices.write().unwrap_or_else(PoisonError::into_inner).remove(&number);
    }

    fn get(&self, number: u32) -> Option<Device> {
        self.devices.read().unwrap_or_else(PoisonError::into_inner).get(&number).cloned()
    }
}

impl DeviceThread {
    /// Starts it. Devices get their [`Watcher`]s for `epoll` by their number in `devices`.
    ///
    /// # Errors
    /// When there are no more descriptors or threads.
    pub fn start(epoll: Arc<Epoll>, devices: Arc<Table>, console: Arc<Console>) -> io::Result<Self> {
        let exit = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let own = Watcher::new(epoll.clone(), OWN);
        own.add(exit.as_raw_fd(), TOKEN_EXIT, EventSet::IN)?;
        own.add(console.wake.as_raw_fd(), TOKEN_CONSOLE_WAKE, EventSet::IN)?;
        let mut looped = Loop { epoll: epoll.clone(), own, devices, console: console.clone(), timeout: None };
        let thread = std::thread::Builder::new()
            .name("devices".to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || looped.run())?;
        let this = Self { epoll, console, exit, thread: Some(thread) };
        this.watch_console();
        Ok(this)
    }

    /// Starts to watch the console's stream for input, if it can be watched (a regular file cannot).
    pub fn watch_console(&self) {
        if let Some(fd) = self.console.stream_fd() {
            let _ = Watcher::new(self.epoll.clone(), OWN).add(fd, TOKEN_CONSOLE_INPUT, EventSet::IN);
        }
    }

    /// Stops to watch it.
    pub fn unwatch_console(&self) {
        if let Some(fd) = self.console.stream_fd() {
            let _ = Watcher::new(self.epoll.clone(), OWN).remove(fd);
        }
    }

    /// Ends the thread and waits for it.
    pub fn stop(&mut self) {
        let _ = self.exit.write(1);
        if let Some(thread) = self.thread.take() {
            // It cannot panic in release builds (abort), and in tests a panic has been printed.
            let _ = thread.join();
        }
    }
}

impl Drop for DeviceThread {
    fn drop(&mut self) {
        self.stop();
    }
}

struct Loop {
    epoll: Arc<Epoll>,
    own: Watcher,
    devices: Arc<Table>,
    console: Arc<Console>,
    timeout: Option<Duration>,
}

impl Loop {
    fn run(&mut self) {
        let mut events = vec![EpollEvent::default(); EVENTS];
        loop {
            let wait = self.timeout.map_or(-1, |t| i32::try_from(t.as_millis()).unwrap_or(i32::MAX));
            let count = match self.epoll.wait(wait, &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => return,
            };
            if count == 0 {
                self.timeout = self.console.tick();
            }
            for event in &events[..count] {
                let (device, token) = ((event.data() >> 32) as u32, event.data() as u32);
                if device == OWN {
                    if token == TOKEN_EXIT {
                        return;
                    }
                    self.own_event(token);
                } else if let Some(device) = self.devices.get(device) {
                    let mut device = device.lock().unwrap_or_else(PoisonError::into_inner);
                    device.on_event(token, event.event_set());
                }
            }
        }
    }

    fn own_event(&mut self, token: u32) {
        let Some(fd) = self.console.stream_fd() else {
            if token == TOKEN_CONSOLE_WAKE {
                self.timeout = self.console.tick();
            }
            return;
        };
        if token == TOKEN_CONSOLE_WAKE {
            self.timeout = self.console.tick();
            if !self.console.input_paused() {
                return;
            }
        }
        match self.console.input() {
            // Also when input goes on after a pause; adding twice fails and changes nothing.
            Input::More => drop(self.own.add(fd, TOKEN_CONSOLE_INPUT, EventSet::IN)),
            Input::Full | Input::Closed => drop(self.own.remove(fd)),
        }
    }
}
