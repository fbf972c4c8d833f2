//! Where vCPU threads wait, and how they are stopped and started together without a race.
//!
//! ```text
//!            Hold ──▶ Run ──▶ Hold …        set by the main thread; a vCPU that asks for a reset or an end holds all too
//!              └────▶ Apply ─▶ Hold         every vCPU puts itself into its reset state, once
//!            any ───▶ Leave                 threads end
//! ```
//!
//! A stop is a broadcast and then one wait: the wish is stored first, then every thread is kicked by a signal whose handler sets
//! `immediate_exit` in its own `kvm_run`, so a thread about to enter the guest comes straight back out.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What vCPU threads shall do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Wish {
    /// Wait.
    Hold = 0,
    /// Run guest code.
    Run = 1,
    /// Go (back) to the reset state, then wait.
    Apply = 2,
    /// End.
    Leave = 3,
}

struct State {
    wish: Wish,
    /// Counts wishes, so that a thread carries each `Apply` out once.
    generation: u64,
    /// Threads that hold and have nothing left to do for this generation.
    settled: u32,
}

/// Shared by all vCPU threads of a machine.
pub struct Gate {
    state: Mutex<State>,
    changed: Condvar,
    /// The wish once more, for a look without the lock on the way into the guest.
    fast: AtomicU8,
    threads: u32,
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

impl Gate {
    /// For `threads` vCPUs; they hold.
    pub fn new(threads: u32) -> Self {
        Self {
            state: Mutex::new(State { wish: Wish::Hold, generation: 0, settled: 0 }),
            changed: Condvar::new(),
            fast: AtomicU8::new(Wish::Hold as u8),
            threads,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
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
        self.fast.store(wish as u8, Ordering::Release);
        self.changed.notify_all();
    }

    /// Whether to run guest code; cheap.
    pub fn runs(&self) -> bool {
        self.fast.load(Ordering::Acquire) == Wish::Run as u8
    }

    /// Called by a vCPU thread: waits until there is something to do. `seen` is the thread's own, 0 at first.
    pub fn pass(&self, seen: &mut u64) -> Pass {
        let mut state = self.lock();
        let mut counted = None;
        loop {
            match state.wish {
                Wish::Run => return Pass::Run,
                Wish::Leave => return Pass::Leave,
                Wish::Apply if *seen != state.generation => {
                    *seen = state.generation;
                    return Pass::Apply;
                }
                Wish::Hold | Wish::Apply => {}
            }
            if counted != Some(state.generation) {
                counted = Some(state.generation);
                state.settled += 1;
                self.changed.notify_all();
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits until all threads have settled with the present wish (`Hold` or `Apply`), or `limit` is over; says whether they have.
    pub fn settled_within(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        let mut state = self.lock();
        while state.settled < self.threads {
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

    const LIMIT: Duration = Duration::from_secs(20);

    #[test]
    fn each_apply_is_carried_out_once_per_thread_and_holds_settle() {
        let gate = Arc::new(Gate::new(4));
        let (applied, ran) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
        let threads: Vec<_> = (0..4)
            .map(|_| {
                let (gate, applied, ran) = (gate.clone(), applied.clone(), ran.clone());
                std::thread::spawn(move || {
                    let mut seen = 0;
                    loop {
                        match gate.pass(&mut seen) {
                            Pass::Run => {
                                ran.fetch_add(1, Ordering::Relaxed);
                                std::thread::yield_now();
                            }
                            Pass::Apply => {
                                applied.fetch_add(1, Ordering::Relaxed);
                            }
                            Pass::Leave => return,
                        }
                    }
                })
            })
            .collect();
        for round in 1..=50 {
            gate.wish(Wish::Hold);
            assert!(gate.settled_within(LIMIT));
            let before = ran.load(Ordering::Relaxed);
            gate.wish(Wish::Apply);
            assert!(gate.settled_within(LIMIT));
            assert_eq!(applied.load(Ordering::Relaxed), 4 * round);
            assert_eq!(ran.load(Ordering::Relaxed), before, "a thread ran while it should hold");
            gate.wish(Wish::Run);
        }
        gate.wish(Wish::Leave);
        threads.into_iter().for_each(|t| t.join().unwrap());
    }

    #[test]
    fn leaving_is_final() {
        let gate = Gate::new(1);
        gate.wish(Wish::Leave);
        gate.wish(Wish::Run);
        assert_eq!(gate.pass(&mut 0), Pass::Leave);
    }
}
