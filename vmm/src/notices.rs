//! What vCPU and device threads have to say to the main thread.
//!
//! The first thing that ends or restarts the machine wins and is kept apart; device complaints are bounded.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

/// Complaints kept until they are fetched; more are dropped.
const MAX_COMPLAINTS: usize = 32;

/// The guest's memory changes as often as the guest likes; it is told once in this time.
const MEMORY_PACE: Duration = Duration::from_millis(50);

/// Something that stops all vCPUs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Halt {
    /// The guest switched itself off.
    PowerOff,
    /// The guest reset.
    Reset,
    /// A vCPU met a fault while it handled a double fault: a reset as well, but seldom one that somebody wanted.
    TripleFault,
    /// It cannot go on; why.
    Crash(String),
}

/// A device that waits for a reset by its driver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Complaint {
    /// Name of the device.
    pub device: String,
    /// What its driver did.
    pub reason: String,
}

#[derive(Default)]
struct State {
    halt: Option<Halt>,
    complaints: VecDeque<Complaint>,
    cpus: bool,
    memory: bool,
    memory_told: Option<Instant>,
    devices: bool,
    panicked: bool,
    watch: Watch,
    /// The watchdog has expired, and the guest has not forgotten it.
    expired: bool,
}

/// Where the watchdog's time is.
#[derive(Clone, Copy, Default)]
enum Watch {
    #[default]
    Off,
    Until(Instant),
    /// The guest stands still; so much was left.
    Held(Duration),
}

impl State {
    /// How long it takes until the watchdog expires.
    fn watch_due(&self) -> Option<Duration> {
        match self.watch {
            Watch::Until(deadline) => Some(deadline.saturating_duration_since(Instant::now())),
            Watch::Off | Watch::Held(_) => None,
        }
    }

    fn take_expiry(&mut self) -> bool {
        let expired = self.watch_due() == Some(Duration::ZERO);
        if expired {
            (self.watch, self.expired) = (Watch::Off, true);
        }
        expired
    }

    /// How long it takes until what is known of memory may be told; `None` when there is nothing.
    fn memory_due(&self) -> Option<Duration> {
        let since = self.memory_told.map_or(MEMORY_PACE, |told| told.elapsed());
        self.memory.then(|| MEMORY_PACE.saturating_sub(since))
    }

    fn take_memory(&mut self) -> bool {
        let due = self.memory_due() == Some(Duration::ZERO);
        if due {
            (self.memory, self.memory_told) = (false, Some(Instant::now()));
        }
        due
    }
}

/// What [`Notices::take`] fetches.
#[derive(Debug, Default)]
pub struct Taken {
    /// What stops the machine.
    pub halt: Option<Halt>,
    /// Devices that wait for a reset.
    pub complaints: Vec<Complaint>,
    /// vCPUs were plugged in or ejected.
    pub cpus: bool,
    /// Memory was plugged, unplugged, inflated or deflated, or a driver came or went.
    pub memory: bool,
    /// The guest has ejected a device.
    pub devices: bool,
    /// The guest's kernel has panicked.
    pub panicked: bool,
    /// The guest's watchdog has expired.
    pub expired: bool,
}

/// See the module.
pub struct Notices {
    state: Mutex<State>,
    wake: EventFd,
}

/// Readable while there is something to fetch.
impl AsFd for Notices {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the eventfd stays open as long as `self`, which the result borrows.
        unsafe { BorrowedFd::borrow_raw(self.wake.as_raw_fd()) }
    }
}

impl Notices {
    /// Empty.
    ///
    /// # Errors
    /// When there is no descriptor left.
    pub fn new() -> std::io::Result<Self> {
        let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        Ok(Self { state: Mutex::default(), wake })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn signal(&self) {
        // Fails only when the counter is full, and then the main thread has been woken.
        let _ = self.wake.write(1);
    }

    /// Reports what stops the machine; says whether it was the first.
    pub fn halt(&self, halt: Halt) -> bool {
        let mut state = self.lock();
        let first = state.halt.is_none();
        if first {
            state.halt = Some(halt);
            self.signal();
        }
        first
    }

    /// Reports a device.
    pub fn complain(&self, device: &str, reason: &str) {
        let mut state = self.lock();
        if state.complaints.len() < MAX_COMPLAINTS {
            state.complaints.push_back(Complaint { device: device.to_owned(), reason: reason.to_owned() });
            self.signal();
        }
    }

    /// Reports that vCPUs were plugged in or ejected. However often before it is fetched, it is one notice.
    pub fn cpus_changed(&self) {
        let mut state = self.lock();
        if !std::mem::replace(&mut state.cpus, true) {
            self.signal();
        }
    }

    /// Reports that the guest's memory changed; likewise, and it waits until the last one is a while ago ([`Notices::due`]).
    pub fn memory_changed(&self) {
        let mut state = self.lock();
        if !std::mem::replace(&mut state.memory, true) {
            self.signal();
        }
    }

    /// Reports that the guest has ejected a device; likewise.
    pub fn devices_changed(&self) {
        let mut state = self.lock();
        if !std::mem::replace(&mut state.devices, true) {
            self.signal();
        }
    }

    /// Reports that the guest's kernel has panicked; likewise.
    pub fn panicked(&self) {
        let mut state = self.lock();
        if !std::mem::replace(&mut state.panicked, true) {
            self.signal();
        }
    }

    /// The watchdog expires after this, from now on, unless it is called again; `None` stops it.
    pub fn watch(&self, allowed: Option<Duration>) {
        let mut state = self.lock();
        let earlier = match (state.watch, allowed) {
            // Somebody who sleeps until later has to know; who sleeps until earlier looks again then.
            (Watch::Until(deadline), Some(allowed)) => Instant::now() + allowed < deadline,
            (Watch::Off | Watch::Held(_), Some(_)) => true,
            (_, None) => false,
        };
        state.watch = allowed.map_or(Watch::Off, |allowed| Watch::Until(Instant::now() + allowed));
        if earlier {
            self.signal();
        }
    }

    /// The guest stands still, and with it its watchdog.
    pub fn hold_watch(&self) {
        let mut state = self.lock();
        if let Watch::Until(deadline) = state.watch {
            state.watch = Watch::Held(deadline.saturating_duration_since(Instant::now()));
        }
    }

    /// The guest goes on.
    pub fn release_watch(&self) {
        let mut state = self.lock();
        if let Watch::Held(left) = state.watch {
            state.watch = Watch::Until(Instant::now() + left);
        }
    }

    /// Whether the watchdog has expired since the guest last forgot it.
    pub fn has_expired(&self) -> bool {
        self.lock().expired
    }

    /// The guest has seen that the watchdog had expired.
    pub fn forget_expiry(&self) {
        self.lock().expired = false;
    }

    /// When to fetch again although the descriptor is not readable.
    pub fn due(&self) -> Option<Duration> {
        let state = self.lock();
        [state.memory_due(), state.watch_due()].into_iter().flatten().min()
    }

    /// Fetches all that there is.
    pub fn take(&self) -> Taken {
        // Cleared first: what comes later signals again.
        let _ = self.wake.read();
        let mut state = self.lock();
        Taken {
            halt: state.halt.take(),
            complaints: state.complaints.drain(..).collect(),
            cpus: std::mem::take(&mut state.cpus),
            memory: state.take_memory(),
            devices: std::mem::take(&mut state.devices),
            panicked: std::mem::take(&mut state.panicked),
            expired: state.take_expiry(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_of_memory_are_told_at_once_and_then_at_their_pace() {
        let notices = Notices::new().unwrap();
        assert_eq!(notices.due(), None);
        notices.memory_changed();
        assert!(notices.take().memory, "the first one at once");
        let begun = Instant::now();
        notices.memory_changed();
        while !notices.take().memory {
            assert!(notices.due().is_some_and(|due| due <= MEMORY_PACE), "it would be forgotten");
        }
        assert!(begun.elapsed() + Duration::from_millis(1) >= MEMORY_PACE);
        assert_eq!(notices.due(), None);
    }
}
