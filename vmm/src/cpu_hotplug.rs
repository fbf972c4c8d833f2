//! Plugging vCPUs in and out while the guest runs: the register block behind the processor devices of the DSDT.
//!
//! ```text
//! +0x00+n  STATUS n   byte; reads what `_STA` of vCPU n says (0x0f there, 0 not); a write of 1 ejects it
//! +0x40    NEXT       byte; reads one event and forgets it: 0xff none, else vCPU number, and bit 6 for an eject request
//! +0x44    OST        dword; a write is `_OST`: bits 0..8 vCPU, 8..16 event, 16..32 status (ACPI 6.5, section 6.3.5)
//! ```
//!
//! Each vCPU has a status port of its own, so there is no selector, and no lock in the guest around it. NEXT gives the guest the
//! vCPUs that have an event, and those only: a change of one vCPU among 64 costs two exits.
//!
//! Events of one vCPU in its life, as the host's wish and the guest's deeds take turns:
//!
//! ```text
//!           plug                     ask back                  eject (asked for)
//! absent ─────────▶ plugged, event ───────────▶ asked, event ────────────────────▶ absent: parked, kicked
//!                        ▲                          │                                 │
//!                        └────────── wanted again ──┘      plug again, if still wanted ◀──┘
//! ```
//!
//! A guest can be half-way through with a request when the vCPU is wanted again. The eject that it comes with then is obeyed, and the
//! vCPU plugged in once more: Linux takes a refused eject badly ("Eject incomplete"; from 6.10 on the processor stays offline and
//! without any further event). It looks whether the eject has worked, by `_STA`, so nothing is plugged in again before it has looked.
//!
//! The guest is believed nothing: only what it was asked for is ejected, once, never vCPU 0, and an ejected vCPU's thread is sent to the
//! [`Gate`] where it waits, parked, for its next use. Nothing here waits for anybody. Events outlive the guest's inattention: they
//! stay until NEXT is read, and the interrupt stays up until EVENTS of [`crate::power`] is.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::control::definition::MAX_CPUS;
use crate::gate::{Gate, first};
use crate::notices::Notices;
use crate::power::{self, PowerRegisters};
use crate::vcpu::Kicker;

/// Offset of NEXT.
pub const NEXT: u16 = 0x40;
/// Offset of OST.
pub const OST: u16 = 0x44;
/// Ports that the registers take.
pub const LENGTH: u16 = 0x48;
/// NEXT: there is no event.
pub const NO_EVENT: u8 = 0xff;
/// NEXT: the event is an eject request; otherwise the vCPU was plugged in.
pub const NEXT_EJECT: u8 = 1 << 6;
/// STATUS: what is written to eject.
pub const EJECT: u8 = 1;
/// STATUS: present, enabled, shown and working (ACPI 6.5, section 6.3.7).
const PRESENT: u8 = 0x0f;

/// `_OST` events: bus check, device check, eject request.
const OST_BUS_CHECK: u8 = 0;
const OST_DEVICE_CHECK: u8 = 1;
const OST_EJECT_REQUEST: u8 = 3;
/// `_OST` status: done; an eject is under way.
const OST_SUCCESS: u16 = 0;
const OST_EJECT_IN_PROGRESS: u16 = 0x84;

/// What there is of vCPUs now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Census {
    /// What the guest was last asked to have.
    pub target: u32,
    /// The vCPUs that it has, a bit mask.
    pub present: u64,
    /// Those that it has given back although they are wanted by now, and that can be plugged in again; likewise.
    pub missing: u64,
    /// How many of those that it was asked to give back it has refused to.
    pub refused: u32,
}

/// What has to be done after an access, outside of the lock's reach.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Effects {
    /// vCPUs that must stop running, a bit mask.
    park: u64,
    /// There are new events for the guest.
    raise: bool,
    /// The main thread should look.
    notify: bool,
}

/// Sets of vCPUs, all bit masks.
#[derive(Debug, Default)]
struct State {
    target: u32,
    /// The guest has them: `_STA` says so.
    present: u64,
    /// Insert events that NEXT has not given out.
    insert: u64,
    /// Eject requests that NEXT has not given out.
    eject: u64,
    /// Asked back, so an eject is obeyed.
    asked: u64,
    /// Ejected, and the guest has not looked since.
    leaving: u64,
    /// The guest has said that it has taken them.
    taken: u64,
    /// The guest has said that it does not give them back.
    refused: u64,
    /// By vCPU: eject requests that NEXT has given out and that the guest has not answered. For each an eject is obeyed even when
    /// the vCPU is wanted again.
    told: Told,
}

#[derive(Debug)]
struct Told([u8; MAX_CPUS as usize]);

impl Default for Told {
    fn default() -> Self {
        Self([0; MAX_CPUS as usize])
    }
}

impl Told {
    fn add(&mut self, id: u32) {
        if let Some(count) = self.0.get_mut(id as usize) {
            *count = count.saturating_add(1);
        }
    }

    /// One request is answered; says whether there was one.
    fn take(&mut self, id: u32) -> bool {
        let Some(count) = self.0.get_mut(id as usize).filter(|count| **count > 0) else { return false };
        *count -= 1;
        true
    }
}

impl State {
    /// Present from the start, with no events.
    fn adopt(&mut self, target: u32) {
        *self = Self { target, present: first(target), taken: first(target), ..Self::default() };
    }

    /// A new target: what is missing is plugged in if it is among those that are `ready`, what is too much asked back. Returns what
    /// was plugged in.
    fn aim(&mut self, target: u32, ready: u64) -> u64 {
        let wanted = first(target);
        self.target = target;
        let plugged = self.plug(ready);
        self.asked = self.present & !wanted;
        self.eject = self.asked;
        self.insert |= wanted & self.present & !self.taken;
        self.refused = 0;
        plugged
    }

    /// Plugs in what is missing and ready, and returns it.
    fn plug(&mut self, ready: u64) -> u64 {
        let plugged = self.missing() & ready;
        self.present |= plugged;
        self.insert |= plugged;
        plugged
    }

    /// What can be plugged in.
    fn missing(&self) -> u64 {
        first(self.target) & !self.present & !self.leaving
    }

    fn has_events(&self) -> bool {
        self.insert | self.eject != 0
    }

    /// One event: inserts first and from below, eject requests from above.
    fn next(&mut self) -> u8 {
        if self.insert != 0 {
            let id = self.insert.trailing_zeros();
            self.insert &= !(1 << id);
            id as u8
        } else if self.eject != 0 {
            let id = self.eject.ilog2();
            self.eject &= !(1 << id);
            self.told.add(id);
            id as u8 | NEXT_EJECT
        } else {
            NO_EVENT
        }
    }

    fn status(&mut self, id: u16) -> (u8, Effects) {
        let value = if self.present & (1 << id) != 0 { PRESENT } else { 0 };
        (value, self.left(1 << id))
    }

    /// The guest knows that they are gone.
    fn left(&mut self, cpus: u64) -> Effects {
        let before = self.missing();
        self.leaving &= !cpus;
        Effects { notify: self.missing() != before, ..Effects::default() }
    }

    fn ejected(&mut self, id: u16) -> Effects {
        let (bit, told) = (1u64 << id, self.told.take(id.into()));
        if id == 0 || self.present & bit == 0 {
            return Effects::default();
        }
        if told || self.asked & bit != 0 {
            for set in [
                &mut self.present,
                &mut self.asked,
                &mut self.eject,
                &mut self.insert,
                &mut self.refused,
                &mut self.taken,
            ] {
                *set &= !bit;
            }
            self.leaving |= bit;
            return Effects { park: bit, notify: true, raise: false };
        }
        // Its own idea. Before Linux 6.10 it has let go of the vCPU all the same, and takes it again.
        self.insert |= bit;
        self.taken &= !bit;
        Effects { raise: true, ..Effects::default() }
    }

    fn ost(&mut self, value: u32) -> Effects {
        let [id, event, ..] = value.to_le_bytes();
        let (bit, status) = (1u64.checked_shl(id.into()).unwrap_or(0), (value >> 16) as u16);
        let (set, members) = match (event, status) {
            (OST_BUS_CHECK | OST_DEVICE_CHECK, OST_SUCCESS) => (&mut self.taken, self.present),
            (OST_EJECT_REQUEST, OST_EJECT_IN_PROGRESS) => return Effects::default(),
            (OST_EJECT_REQUEST, OST_SUCCESS) => return self.left(bit),
            (OST_EJECT_REQUEST, _) => {
                self.told.take(id.into());
                (&mut self.refused, self.asked)
            }
            _ => return Effects::default(),
        };
        let news = bit & members & !*set;
        *set |= news;
        // Once per vCPU and request, however often it says so.
        Effects { notify: news != 0, ..Effects::default() }
    }

    fn census(&self) -> Census {
        let (refused, missing) = (self.refused.count_ones(), self.missing());
        Census { target: self.target, present: self.present, missing, refused }
    }
}

/// See the module.
pub struct CpuHotplug {
    state: Mutex<State>,
    possible: u32,
    gate: Arc<Gate>,
    kicker: Arc<Kicker>,
    power: Arc<PowerRegisters>,
    notices: Arc<Notices>,
}

/// Whom the register block acts on.
pub struct Parts {
    /// Where vCPUs are parked.
    pub gate: Arc<Gate>,
    /// Gets them there.
    pub kicker: Arc<Kicker>,
    /// Tells the guest of events.
    pub power: Arc<PowerRegisters>,
    /// Tells the main thread.
    pub notices: Arc<Notices>,
}

impl CpuHotplug {
    /// For `possible` vCPUs, of which the guest finds `target` at boot.
    pub fn new(parts: Parts, target: u32, possible: u32) -> Self {
        let Parts { gate, kicker, power, notices } = parts;
        let cpus = Self { state: Mutex::default(), possible, gate, kicker, power, notices };
        cpus.adopt(target);
        cpus
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// vCPUs that there can be.
    pub fn possible(&self) -> u32 {
        self.possible
    }

    /// What there is now.
    pub fn census(&self) -> Census {
        self.lock().census()
    }

    /// Makes `target` vCPUs the ones that the guest finds when it boots. Only while all vCPUs hold.
    pub fn adopt(&self, target: u32) {
        let mut state = self.lock();
        state.adopt(target);
        self.gate.park(!state.present);
        self.gate.unpark(state.present);
    }

    /// Asks the guest to have `target` vCPUs. Those that are `ready`, a bit mask, are in their reset state and stand still. What is
    /// missing and not ready is reported to the main thread.
    pub fn aim(&self, target: u32, ready: u64) {
        let mut state = self.lock();
        let plugged = state.aim(target, ready);
        self.plugged(&state, plugged);
    }

    /// Plugs in again what the guest has ejected although it is wanted by now, likewise.
    pub fn plug(&self, ready: u64) {
        let mut state = self.lock();
        let plugged = state.plug(ready);
        self.plugged(&state, plugged);
    }

    fn plugged(&self, state: &State, cpus: u64) {
        self.gate.unpark(cpus);
        if state.has_events() {
            self.power.raise(power::EVENT_CPUS);
        }
        if state.missing() != 0 {
            self.notices.cpus_changed();
        }
    }

    /// The guest reads a register.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        data.fill(0);
        let Some(first) = data.first_mut() else { return };
        *first = match offset {
            0..NEXT => {
                let (status, effects) = self.lock().status(offset);
                if effects.notify {
                    self.notices.cpus_changed();
                }
                status
            }
            NEXT => self.lock().next(),
            _ => 0,
        };
    }

    /// The guest writes a register.
    pub fn write(&self, offset: u16, data: &[u8]) {
        let mut state = self.lock();
        let effects = match (offset, data) {
            (0..NEXT, [EJECT, ..]) => state.ejected(offset),
            (OST, &[a, b, c, d]) => state.ost(u32::from_le_bytes([a, b, c, d])),
            _ => Effects::default(),
        };
        // Under the lock, so that a new target, which lets vCPUs go, comes wholly before or after.
        if effects.park != 0 {
            self.gate.park(effects.park);
            self.kicker.kick(effects.park);
        }
        if effects.raise {
            self.power.raise(power::EVENT_CPUS);
        }
        if effects.notify {
            self.notices.cpus_changed();
        }
    }
}

#[cfg(test)]
#[path = "cpu_hotplug_tests.rs"]
mod tests;
