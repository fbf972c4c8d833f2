//! Where vCPU threads wait, and how they are stopped and started, together and one by one, without a race.
//!
//! ```text
//!            Hold ──▶ Run ──▶ Hold …        set by the main thread; a vCPU that asks for a reset or an end holds all too
//!              └────▶ Apply ─▶ Hold         every vCPU puts itself into its reset state, once
//!            any ───▶ Leave                 threads end
//! ```
//!
//! A stop is a broadcast and then one wait: the wish is stored first, then every thread is kicked by a signal whose handler sets
//! `immediate_exit` in its own `kvm_run`, so a thread about to enter the guest comes straight back out.
//!
//! Beside the wish for all there is a state for each: a *parked* vCPU (spare, or ejected by the guest) does everything that the
//! others do except running guest code, and a vCPU that has been told to *renew* itself passes through its reset state first. Sets
//! of vCPUs are bit masks by number.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::control::definition::MAX_CPUS;

/// The vCPUs `0..count`; no more than [`MAX_CPUS`] fit.
pub fn first(count: u32) -> u64 {
    u64::MAX.checked_shr(MAX_CPUS.saturating_sub(count)).unwrap_or(0)
}

const _: () = assert!(MAX_CPUS == u64::BITS, "a set of vCPUs is 64 bits");

/// What vCPU threads shall do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// Wait.
    Hold,
    /// Run guest code.
    Run,
    /// Go (back) to the reset state, then wait.
    Apply,
    /// End.
    Leave,
}

struct State {
    wish: Wish,
    /// Counts wishes, so that a thread carries each `Apply` out once.
    generation: u64,
    /// vCPUs that have a thread.
    threads: u64,
    /// vCPUs that run no guest code.
    parked: u64,
    /// vCPUs that shall go to the reset state before anything else.
    renew: u64,
    /// vCPUs that hold and have nothing left to do for this generation.
    settled: u64,
}

/// Shared by all vCPU threads of a machine.
pub struct Gate {
    state: Mutex<State>,
    changed: Condvar,
    /// The vCPUs that may run guest code, for a look without the lock on the way into the guest.
    running: AtomicU64,
}

/// What a thread that came to the gate does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// Runs guest code.
    Run,
    /// Puts its vCPU into the reset state and comes back.
    Apply,
    /// Ends.
    Leave,
}

impl Default for Gate {
    /// Nobody is there, all are to hold, and all are parked.
    fn default() -> Self {
        let state =
            State { wish: Wish::Hold, generation: 0, threads: 0, parked: u64::MAX, renew: 0, settled: 0 };
        Self { state: Mutex::new(state), changed: Condvar::new(), running: AtomicU64::new(0) }
    }
}

impl Gate {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn refresh(&self, state: &State) {
        let running = if state.wish == Wish::Run { !state.parked & !state.renew } else { 0 };
        self.running.store(running, Ordering::Release);
    }

    /// Tells the threads of a new state.
    fn publish(&self, state: &State) {
        self.refresh(state);
        self.changed.notify_all();
    }

    /// A thread will come for vCPU `id`. Before it does, so that nobody stops waiting too early.
    pub fn expect(&self, id: u32) {
        self.lock().threads |= 1 << id;
    }

    /// The thread of vCPU `id` could not be started after all.
    pub fn forget(&self, id: u32) {
        let mut state = self.lock();
        state.threads &= !(1 << id);
        self.changed.notify_all();
    }

    /// Stores what threads shall do. Whoever calls it kicks the threads afterwards unless they hold already. A machine that leaves
    /// does nothing else any more.
    pub fn wish(&self, wish: Wish) {
        let mut state = self.lock();
        if state.wish == Wish::Leave {
            return;
        }
        state.wish = wish;
        state.generation += 1;
        state.settled = 0;
        self.publish(&state);
    }

    /// Keeps these vCPUs from running guest code. Whoever calls it kicks them afterwards.
    pub fn park(&self, cpus: u64) {
        let mut state = self.lock();
        state.parked |= cpus;
        self.publish(&state);
    }

    /// Lets these vCPUs run guest code whenever the wish is to run.
    pub fn unpark(&self, cpus: u64) {
        let mut state = self.lock();
        state.parked &= !cpus;
        self.publish(&state);
    }

    /// Sends these vCPUs, parked ones, to the reset state; [`Gate::renewed_within`] waits until they are there.
    pub fn renew(&self, cpus: u64) {
        let mut state = self.lock();
        state.renew |= cpus;
        state.settled &= !cpus;
        self.publish(&state);
    }

    /// Whether vCPU `id` is to run guest code; cheap.
    pub fn runs(&self, id: u32) -> bool {
        self.running.load(Ordering::Acquire) & (1 << id) != 0
    }

    /// Called by the thread of vCPU `id`: waits until there is something to do. `seen` is the thread's own, 0 at first.
    pub fn pass(&self, id: u32, seen: &mut u64) -> Pass {
        let bit = 1u64 << id;
        let mut state = self.lock();
        loop {
            let parked = state.parked & bit != 0;
            match state.wish {
                Wish::Leave => return Pass::Leave,
                Wish::Apply if *seen != state.generation => {
                    *seen = state.generation;
                    state.renew &= !bit;
                    self.refresh(&state);
                    return Pass::Apply;
                }
                _ if state.renew & bit != 0 => {
                    state.renew &= !bit;
                    self.refresh(&state);
                    return Pass::Apply;
                }
                Wish::Run if !parked => {
                    state.settled &= !bit;
                    return Pass::Run;
                }
                Wish::Hold | Wish::Apply | Wish::Run => {}
            }
            if state.settled & bit == 0 {
                state.settled |= bit;
                self.changed.notify_all();
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits until all threads have settled with the present wish (`Hold` or `Apply`), or `limit` is over; says whether they have.
    pub fn settled_within(&self, limit: Duration) -> bool {
        self.waits_until(limit, |state| state.threads & !state.settled == 0)
    }

    /// Waits until these vCPUs have gone to the reset state and stand still, likewise.
    pub fn renewed_within(&self, cpus: u64, limit: Duration) -> bool {
        self.waits_until(limit, |state| cpus & (state.renew | !state.settled) == 0)
    }

    fn waits_until(&self, limit: Duration, done: impl Fn(&State) -> bool) -> bool {
        let deadline = Instant::now() + limit;
        let mut state = self.lock();
        while !done(&state) {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else { return false };
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::AtomicU32;
    use std::thread::JoinHandle;

    const LIMIT: Duration = Duration::from_secs(20);

    /// What the threads of a machine without KVM do.
    #[derive(Default)]
    struct Crew {
        gate: Gate,
        applied: [AtomicU32; 8],
        ran: [AtomicU32; 8],
    }

    fn spawn(crew: &Arc<Crew>, id: u32) -> JoinHandle<()> {
        crew.gate.expect(id);
        let crew = crew.clone();
        std::thread::spawn(move || {
            let (mut seen, index) = (0, id as usize);
            loop {
                match crew.gate.pass(id, &mut seen) {
                    Pass::Run => {
                        while crew.gate.runs(id) {
                            crew.ran[index].fetch_add(1, Ordering::Relaxed);
                            std::thread::yield_now();
                        }
                    }
                    Pass::Apply => {
                        crew.applied[index].fetch_add(1, Ordering::Relaxed);
                    }
                    Pass::Leave => return,
                }
            }
        })
    }

    fn counts(of: &[AtomicU32; 8]) -> Vec<u32> {
        of.iter().map(|count| count.load(Ordering::Relaxed)).collect()
    }

    fn waits_for_work(crew: &Crew, id: usize) {
        let (before, deadline) = (counts(&crew.ran)[id], Instant::now() + LIMIT);
        while counts(&crew.ran)[id] == before {
            assert!(Instant::now() < deadline, "vCPU {id} does not run");
            std::thread::yield_now();
        }
    }

    #[test]
    fn each_apply_is_carried_out_once_per_thread_and_holds_settle() {
        let crew = Arc::new(Crew::default());
        let threads: Vec<_> = (0..4).map(|id| spawn(&crew, id)).collect();
        crew.gate.unpark(first(3));
        for round in 1..=50 {
            crew.gate.wish(Wish::Hold);
            assert!(crew.gate.settled_within(LIMIT));
            let before = counts(&crew.ran);
            crew.gate.wish(Wish::Apply);
            assert!(crew.gate.settled_within(LIMIT));
            assert_eq!(counts(&crew.applied)[..4], [round; 4], "parked ones too");
            assert_eq!(counts(&crew.ran), before, "a thread ran while it should hold");
            crew.gate.wish(Wish::Run);
        }
        assert_eq!(counts(&crew.ran)[3], 0, "a parked vCPU ran");
        crew.gate.wish(Wish::Leave);
        threads.into_iter().for_each(|t| t.join().unwrap());
    }

    #[test]
    fn a_vcpu_is_parked_renewed_and_let_go_again_while_others_run_and_pause() {
        let crew = Arc::new(Crew::default());
        let mut threads = vec![spawn(&crew, 0)];
        crew.gate.unpark(1);
        crew.gate.wish(Wish::Run);
        threads.extend((1..8).map(|id| spawn(&crew, id)));
        let others = first(8) & !1;
        for round in 1..=50 {
            if round % 3 == 0 {
                crew.gate.wish(Wish::Hold);
            }
            crew.gate.renew(others);
            assert!(crew.gate.renewed_within(others, LIMIT));
            assert_eq!(counts(&crew.applied)[1..], [round; 7]);
            crew.gate.unpark(others);
            crew.gate.wish(Wish::Run);
            waits_for_work(&crew, 7);
            crew.gate.park(others);
            if round % 2 == 0 {
                crew.gate.wish(Wish::Hold);
                assert!(crew.gate.settled_within(LIMIT), "parked vCPUs count as settled");
                crew.gate.wish(Wish::Run);
            }
            waits_for_work(&crew, 0);
        }
        assert_eq!(counts(&crew.applied)[0], 0);
        crew.gate.wish(Wish::Leave);
        threads.into_iter().for_each(|t| t.join().unwrap());
    }

    #[test]
    fn leaving_is_final() {
        let gate = Gate::default();
        gate.wish(Wish::Leave);
        gate.wish(Wish::Run);
        assert_eq!(gate.pass(0, &mut 0), Pass::Leave);
    }

    #[test]
    fn sets_of_vcpus() {
        assert_eq!((first(0), first(1), first(3), first(64)), (0, 1, 7, u64::MAX));
    }
}
