//! The rates that all disks of a machine share, and one disk's place in front of them. The arithmetic is in [`super::pace`].
//!
//! A machine without rates pays for one relaxed load a request.

use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use super::pace::{Budget, Nsec};
use crate::control::wire::DiskRates;

/// See the module.
#[derive(Default)]
pub struct Throttle {
    limited: AtomicBool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    rates: DiskRates,
    budget: Budget,
    /// Number of the next place.
    places: u32,
}

/// CLOCK_MONOTONIC, as the timers have it.
fn now() -> Nsec {
    // It is always there (clock_gettime(2)).
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC);
    now.map_or(0, |time| Nsec::try_from(Duration::from(time).as_nanos()).unwrap_or(Nsec::MAX))
}

impl Throttle {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Other rates from now on. Disks that wait must be told to look again.
    pub fn set(&self, rates: DiskRates) {
        let mut state = self.lock();
        state.rates = rates;
        state.budget.set(now(), rates.iops, rates.bytes_per_sec);
        self.limited.store(rates != DiskRates::default(), Ordering::Relaxed);
    }

    /// What is in force.
    pub fn rates(&self) -> DiskRates {
        self.lock().rates
    }

    /// A place for one more disk.
    pub fn place(self: &Arc<Self>) -> Place {
        let mut state = self.lock();
        state.places = state.places.wrapping_add(1);
        Place { throttle: self.clone(), number: state.places }
    }
}

/// Where one disk stands, from its driver's start to its reset. Left when dropped.
pub struct Place {
    throttle: Arc<Throttle>,
    number: u32,
}

impl Place {
    /// Whether a request may start now.
    ///
    /// # Errors
    /// When to ask again.
    pub fn ask(&self) -> Result<(), Nsec> {
        if !self.throttle.limited.load(Ordering::Relaxed) {
            return Ok(());
        }
        self.throttle.lock().budget.ask(self.number, now())
    }

    /// A request that moves `bytes` starts now.
    pub fn take(&self, bytes: u64) {
        if self.throttle.limited.load(Ordering::Relaxed) {
            self.throttle.lock().budget.take(now(), bytes);
        }
    }

    /// The disk cannot start anything now, whatever the rates.
    pub fn leave(&self) {
        if self.throttle.limited.load(Ordering::Relaxed) {
            self.throttle.lock().budget.leave(self.number);
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.throttle.lock().budget.leave(self.number);
    }
}

/// Wakes a disk when its next request is due. Made before the process is filtered, like the ring.
pub struct Alarm {
    timer: TimerFd,
    set_for: Nsec,
}

impl Alarm {
    /// Not set.
    ///
    /// # Errors
    /// When there is no descriptor left.
    pub fn new() -> std::io::Result<Self> {
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        Ok(Self { timer: TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?, set_for: 0 })
    }

    /// Readable when the time has come.
    pub fn fd(&self) -> RawFd {
        self.timer.as_fd().as_raw_fd()
    }

    /// Sets it; says whether it is set.
    pub fn set(&mut self, at: Nsec) -> bool {
        if self.set_for == at {
            return true;
        }
        // Never zero, which would unset it: it lies in the future.
        let then = Expiration::OneShot(TimeSpec::from_duration(Duration::from_nanos(at.max(1))));
        let set = self.timer.set(then, TimerSetTimeFlags::TFD_TIMER_ABSTIME).is_ok();
        self.set_for = if set { at } else { 0 };
        set
    }

    /// It has gone off, or nobody waits for it any more.
    pub fn went_off(&mut self) {
        self.set_for = 0;
    }

    /// Not readable any more, unless it was set again.
    pub fn rest(&mut self) {
        if self.set_for == 0 {
            // Fails for no timer that exists.
            let _ = self.timer.unset();
        }
    }
}
