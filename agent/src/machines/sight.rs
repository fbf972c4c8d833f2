//! Delivered ÷ asked: whether a machine gets what it is granted while it wants it, over 1 s, 10 s and 1 min.
//!
//! ```text
//! cpu.stat, schedstat, taps' queues ──► sample (once a second) ──► Sight::observe ──► rings of 60 ──► view, metrics, top
//! ```
//! Pure: counters and times come in, integers go out. What *delivered* means is plain: what the counters grew by. What a machine
//! *asked* for is never more than its grant, and is put together from what the kernel knows:
//!
//! **CPU**, all of the machine against its grant `g`. cpu.stat counts the enforcement periods in which the machine had used up its
//! quota and stood still, and those in which its vCPUs had used up what the monitor leaves them of it: in those it asked for all of `g`. A
//! period may be of both kinds, so the larger number of the two is taken. (The time that it stood still, `throttled_usec`, is none that it was
//! granted.) In the rest of the second it asked for what it used, and for the time in which its vCPUs were ready and waited for a CPU
//! that somebody else had. Waiting that has room in the periods used up is taken to have been there, where it cost nothing:
//! ```text
//! full   = periods used up × period × g
//! room   = vCPU threads × periods used up × period - full - throttled time
//! waited = waiting of the vCPU threads - throttled time - room - 100 µs for each turn
//! asked  = full + min(rest of the second × g, rest of what it used + waited)
//! ```
//! A spinning guest asks for `g`, a short burst for no more than it is. Waking a thread up takes some microseconds each time, which is
//! latency and not demand: hence the 100 µs. vCPUs of one machine that share a CPU count each other's turns as waiting, so that with
//! more vCPUs than the host has CPUs the ratio comes out low rather than high. The waiting comes from `/proc/TID/schedstat`
//! (`Documentation/scheduler/sched-stats.rst`, `/proc/PID/schedstat`; what KVM tells guests as steal time), because pressure stall
//! information is off by default on Debian, and of several threads it tells only that some waited. A kernel without it shows no waiting.
//!
//! **Network**, each direction of the first nic: its shaper sends at the granted rate whenever something waits. Where packets waited at
//! both ends of the second and the shaper held some back in between, it asked for all of the rate; otherwise for what went through and
//! what has begun to wait. One burst that was queued for a moment is no demand for a whole second.
//!
//! **Disks**: monitors count operations, not those that they held back, so nothing is said of what was asked.
//!
//! A grant that changes within a second bounds it by the larger of both, and a full demand is one of the smaller. Where a counter runs
//! backwards, or a reading comes so late that it is no second any more, nothing is known of that time: it is left out, and
//! `measured_msec` tells how much a window has.

/// Slots that are kept: one a second.
const SLOTS: usize = 60;
/// Time between two readings above which they tell nothing of any second, microseconds.
const MAX_SPAN_USEC: u64 = 3_000_000;
/// A reading may come this much late or early without counting as another second, microseconds.
const JITTER_USEC: u64 = 500_000;
/// What waking a thread up may take, microseconds.
const TURN_USEC: u64 = 100;
/// Whoever asks for less than one in this many parts of its grant is not rated.
const RATED_PART: u64 = 100;

/// A second.
pub const SEC_1: u64 = 1_000_000;
/// Ten of them.
pub const SEC_10: u64 = 10_000_000;
/// A minute.
pub const SEC_60: u64 = 60_000_000;

/// CPU of a machine; cumulative, and read together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cpu {
    /// When, microseconds on a clock that does not go backwards.
    pub at_usec: u64,
    /// What it is granted, milliCPU.
    pub granted_milli: u64,
    /// CPU time of vCPUs and monitor, microseconds.
    pub used_usec: u64,
    /// Time that its threads were held back by a quota, summed over CPUs, microseconds.
    pub throttled_usec: u64,
    /// Enforcement periods in which the whole machine used its quota up.
    pub wall_periods: u64,
    /// Enforcement periods in which the vCPUs used up what they may take of it.
    pub vcpu_periods: u64,
    /// How long a period is, microseconds.
    pub period_usec: u64,
    /// What the vCPU threads have waited; `None` where the kernel does not tell.
    pub wait: Option<Wait>,
}

/// Waiting of threads for a CPU; cumulative.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wait {
    /// Time in which they were ready and did not run, their quota included, microseconds.
    pub waited_usec: u64,
    /// How often one of them got a CPU.
    pub turns: u64,
    /// How many they are now.
    pub threads: u64,
}

/// One direction of a nic; cumulative but for what says otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Net {
    /// When, microseconds on the same clock.
    pub at_usec: u64,
    /// What it is granted, bit/s; 0 is unlimited.
    pub granted_bit_per_sec: u64,
    /// Bytes that went through its tap.
    pub bytes: u64,
    /// Its shaper, where it has one that was looked at.
    pub queue: Option<Queue>,
}

/// A shaper's queue; cumulative but for what says otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Queue {
    /// L2 bytes sent, each segment with its own header, which is what the rate is of.
    pub bytes: u64,
    /// How often a packet had to wait for the rate.
    pub overlimits: u64,
    /// Bytes that wait now.
    pub backlog_bytes: u64,
}

/// Stalls of a machine (PSI, `some`): CPU, memory, I/O; cumulative microseconds, `None` where the kernel does not tell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stalls {
    /// When, microseconds on the same clock.
    pub at_usec: u64,
    /// CPU, memory, I/O.
    pub some_usec: [Option<u64>; 3],
}

/// What was read of a machine in one second; what could not be read is `None`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Observation {
    /// When, microseconds on the same clock.
    pub at_usec: u64,
    /// CPU.
    pub cpu: Option<Cpu>,
    /// Towards the guest.
    pub to_guest: Option<Net>,
    /// From the guest.
    pub from_guest: Option<Net>,
    /// Stalls.
    pub stalls: Option<Stalls>,
}

/// What a window holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Window {
    /// How much time of it was measured, microseconds.
    pub measured_usec: u64,
    /// What was asked for, per second: milliCPU, bit/s.
    pub asked: u64,
    /// What was delivered, likewise.
    pub delivered: u64,
    /// Parts per thousand that were delivered of what was asked; `None` where that was less than a hundredth of the grant.
    pub permille: Option<u64>,
}

/// What was granted, asked for and delivered in some time: microseconds of CPU time, or bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Share {
    granted: u64,
    asked: u64,
    delivered: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Slot<T> {
    end_usec: u64,
    span_usec: u64,
    what: T,
}

/// The last minute.
#[derive(Clone, Debug)]
struct Ring<T> {
    slots: [Slot<T>; SLOTS],
    next: usize,
    filled: usize,
}

impl<T: Copy + Default> Default for Ring<T> {
    fn default() -> Self {
        Self { slots: [Slot::default(); SLOTS], next: 0, filled: 0 }
    }
}

impl<T: Copy> Ring<T> {
    fn push(&mut self, slot: Slot<T>) {
        self.slots[self.next] = slot;
        self.next = (self.next + 1) % SLOTS;
        self.filled = (self.filled + 1).min(SLOTS);
    }

    /// The slots of a window that ends at `now_usec`, the newest first.
    fn window(&self, now_usec: u64, window_usec: u64) -> impl Iterator<Item = &Slot<T>> {
        let newest = (self.next + SLOTS - 1) % SLOTS;
        let slots = (0..self.filled).map(move |back| &self.slots[(newest + SLOTS - back) % SLOTS]);
        // The newest slot has ended a moment ago: what is long over is not now.
        let end = self.slots[newest].end_usec;
        let fresh = now_usec.saturating_sub(end) <= MAX_SPAN_USEC;
        slots.enumerate().map_while(move |(back, slot)| {
            let age = end.saturating_sub(slot.end_usec).saturating_add(slot.span_usec);
            (fresh && (back == 0 || age <= window_usec.saturating_add(JITTER_USEC))).then_some(slot)
        })
    }
}

/// One machine's last minute.
#[derive(Clone, Debug, Default)]
pub struct Sight {
    now_usec: u64,
    last: Observation,
    cpu: Ring<Share>,
    to_guest: Ring<Share>,
    from_guest: Ring<Share>,
    stalls: Ring<[u64; 3]>,
}

/// `amount × by ÷ parts`, without overflow on the way; 0 parts make 0.
fn scaled(amount: u64, by: u64, parts: u64) -> u64 {
    let product = u128::from(amount) * u128::from(by);
    u64::try_from(product.checked_div(u128::from(parts)).unwrap_or(0)).unwrap_or(u64::MAX)
}

/// Time between two readings, unless it is none or too long to tell anything.
fn span(before_usec: u64, now_usec: u64) -> Option<u64> {
    now_usec.checked_sub(before_usec).filter(|span| (1..=MAX_SPAN_USEC).contains(span))
}

impl Cpu {
    /// What was asked for and delivered since an earlier reading; `None` where counters began anew.
    fn since(&self, earlier: &Self) -> Option<Slot<Share>> {
        let span_usec = span(earlier.at_usec, self.at_usec)?;
        let delivered = self.used_usec.checked_sub(earlier.used_usec)?;
        let throttled_usec = self.throttled_usec.checked_sub(earlier.throttled_usec)?;
        let wall = self.wall_periods.checked_sub(earlier.wall_periods)?;
        let used_up = wall.max(self.vcpu_periods.checked_sub(earlier.vcpu_periods)?);
        let smaller = self.granted_milli.min(earlier.granted_milli);
        let larger = self.granted_milli.max(earlier.granted_milli);
        // Another grant may have brought another period.
        let period_usec = match earlier.period_usec {
            0 => self.period_usec,
            before => self.period_usec.min(before),
        };
        let full_usec = used_up.saturating_mul(period_usec).min(span_usec);
        let full = scaled(full_usec, smaller, 1000);
        let granted = scaled(span_usec, larger, 1000);
        let threads = self.wait.map_or(0, |wait| wait.threads);
        let room = full_usec.saturating_mul(threads).saturating_sub(full).saturating_sub(throttled_usec);
        let waited = self.waited_since(earlier).saturating_sub(throttled_usec).saturating_sub(room);
        let rest = delivered.saturating_sub(full).saturating_add(waited);
        let asked = full + rest.min(granted.saturating_sub(full));
        let what = Share { granted, asked, delivered };
        Some(Slot { end_usec: self.at_usec, span_usec, what })
    }

    /// Microseconds that its threads have waited, turns taken off; a thread that has gone took its waiting along.
    fn waited_since(&self, earlier: &Self) -> u64 {
        let (Some(now), Some(before)) = (self.wait, earlier.wait) else { return 0 };
        let waited = now.waited_usec.saturating_sub(before.waited_usec);
        waited.saturating_sub(now.turns.saturating_sub(before.turns).saturating_mul(TURN_USEC))
    }
}

impl Net {
    fn since(&self, earlier: &Self) -> Option<Slot<Share>> {
        let span_usec = span(earlier.at_usec, self.at_usec)?;
        let queues = earlier.queue.zip(self.queue);
        let bytes = match queues {
            Some((before, now)) => now.bytes.checked_sub(before.bytes)?,
            None => self.bytes.checked_sub(earlier.bytes)?,
        };
        let delivered = bytes.saturating_mul(8);
        let bits = |bit_per_sec| scaled(span_usec, bit_per_sec, SEC_1);
        let (one, other) = (earlier.granted_bit_per_sec, self.granted_bit_per_sec);
        // Without a limit at either end it had none.
        if one == 0 || other == 0 {
            let what = Share { granted: 0, asked: delivered, delivered };
            return Some(Slot { end_usec: self.at_usec, span_usec, what });
        }
        let granted = bits(one.max(other));
        let (full, queued) = queues.map_or((false, 0), |(before, now)| {
            let waits = before.backlog_bytes > 0 && now.backlog_bytes > 0;
            let queued = now.backlog_bytes.saturating_sub(before.backlog_bytes).saturating_mul(8);
            (waits && now.overlimits > before.overlimits, queued)
        });
        let asked = if full { bits(one.min(other)).max(delivered) } else { delivered.saturating_add(queued) };
        let what = Share { granted, asked: asked.min(granted), delivered };
        Some(Slot { end_usec: self.at_usec, span_usec, what })
    }
}

impl Stalls {
    fn since(&self, earlier: &Self) -> Option<Slot<[u64; 3]>> {
        let span_usec = span(earlier.at_usec, self.at_usec)?;
        let mut what = [0; 3];
        for (more, (now, before)) in what.iter_mut().zip(self.some_usec.iter().zip(earlier.some_usec)) {
            *more = now.unwrap_or(0).checked_sub(before.unwrap_or(0))?;
        }
        Some(Slot { end_usec: self.at_usec, span_usec, what })
    }
}

impl Sight {
    /// Takes in what was read; to be called about once a second.
    pub fn observe(&mut self, seen: Observation) {
        let last = std::mem::replace(&mut self.last, seen);
        self.now_usec = self.now_usec.max(seen.at_usec);
        let cpu = seen.cpu.zip(last.cpu).and_then(|(now, before)| now.since(&before));
        cpu.into_iter().for_each(|slot| self.cpu.push(slot));
        let to_guest = seen.to_guest.zip(last.to_guest).and_then(|(now, before)| now.since(&before));
        to_guest.into_iter().for_each(|slot| self.to_guest.push(slot));
        let from_guest = seen.from_guest.zip(last.from_guest).and_then(|(now, before)| now.since(&before));
        from_guest.into_iter().for_each(|slot| self.from_guest.push(slot));
        let stalls = seen.stalls.zip(last.stalls).and_then(|(now, before)| now.since(&before));
        stalls.into_iter().for_each(|slot| self.stalls.push(slot));
    }

    /// What was read last.
    pub fn last(&self) -> &Observation {
        &self.last
    }

    /// CPU over a window: milliCPU. `None` where nothing was measured.
    pub fn cpu(&self, window_usec: u64) -> Option<Window> {
        // 1,000 milliCPU are a microsecond of CPU time in a microsecond.
        self.shown(&self.cpu, window_usec, 1000)
    }

    /// Towards the guest over a window: bit/s.
    pub fn net_to_guest(&self, window_usec: u64) -> Option<Window> {
        self.shown(&self.to_guest, window_usec, SEC_1)
    }

    /// From the guest over a window: bit/s.
    pub fn net_from_guest(&self, window_usec: u64) -> Option<Window> {
        self.shown(&self.from_guest, window_usec, SEC_1)
    }

    fn shown(&self, ring: &Ring<Share>, window_usec: u64, unit: u64) -> Option<Window> {
        let (mut measured_usec, mut sum) = (0_u64, Share::default());
        for slot in ring.window(self.now_usec, window_usec) {
            measured_usec = measured_usec.saturating_add(slot.span_usec);
            sum.granted = sum.granted.saturating_add(slot.what.granted);
            sum.asked = sum.asked.saturating_add(slot.what.asked);
            sum.delivered = sum.delivered.saturating_add(slot.what.delivered);
        }
        let rated = sum.asked > 0 && sum.asked >= sum.granted / RATED_PART;
        // Rounded to nearest.
        let permille = rated.then(|| scaled(sum.delivered, 2000, sum.asked).saturating_add(1) / 2);
        (measured_usec > 0).then(|| Window {
            measured_usec,
            asked: scaled(sum.asked, unit, measured_usec),
            delivered: scaled(sum.delivered, unit, measured_usec),
            permille,
        })
    }

    /// Share of a window in which some thread waited for CPU, memory, I/O: hundredths of a percent.
    pub fn stalls(&self, window_usec: u64) -> [Option<u32>; 3] {
        let told = self.last.stalls.map(|stalls| stalls.some_usec).unwrap_or_default();
        let (mut measured_usec, mut sums) = (0_u64, [0_u64; 3]);
        for slot in self.stalls.window(self.now_usec, window_usec) {
            measured_usec = measured_usec.saturating_add(slot.span_usec);
            sums.iter_mut().zip(slot.what).for_each(|(sum, more)| *sum = sum.saturating_add(more));
        }
        std::array::from_fn(|which| {
            let hundredths = scaled(sums[which], 10_000, measured_usec).min(10_000);
            told[which].filter(|_| measured_usec > 0).and_then(|_| u32::try_from(hundredths).ok())
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A machine whose quota is counted in periods of 10 ms, one second after the other.
    #[derive(Default)]
    struct Machine {
        sight: Sight,
        cpu: Cpu,
    }

    impl Machine {
        fn new(granted_milli: u64) -> Self {
            let cpu = Cpu {
                granted_milli,
                period_usec: 10_000,
                wait: Some(Wait { threads: 1, ..Wait::default() }),
                ..Cpu::default()
            };
            let mut machine = Self { sight: Sight::default(), cpu };
            machine.read();
            machine
        }

        fn read(&mut self) {
            let at_usec = self.cpu.at_usec;
            self.sight.observe(Observation { at_usec, cpu: Some(self.cpu), ..Observation::default() });
        }

        /// A second in which it used `used_msec`, was held back by its quota at the end of `used_up` of 100 periods for
        /// `throttled_msec` in all, and its threads waited for `waited_msec`.
        fn second(&mut self, used_msec: u64, used_up: u64, throttled_msec: u64, waited_msec: u64) {
            let wait = self.cpu.wait.unwrap_or_default();
            self.cpu = Cpu {
                at_usec: self.cpu.at_usec + SEC_1,
                used_usec: self.cpu.used_usec + used_msec * 1000,
                throttled_usec: self.cpu.throttled_usec + throttled_msec * 1000,
                wall_periods: self.cpu.wall_periods + used_up,
                wait: Some(Wait { waited_usec: wait.waited_usec + waited_msec * 1000, ..wait }),
                ..self.cpu
            };
            self.read();
        }

        fn last(&self) -> (u64, u64, Option<u64>) {
            let window = self.sight.cpu(SEC_1).expect("measured");
            (window.asked, window.delivered, window.permille)
        }
    }

    #[test]
    fn a_spinning_guest_asks_for_its_grant() {
        let mut machine = Machine::new(500);
        machine.second(500, 100, 500, 500);
        assert_eq!(machine.last(), (500, 500, Some(1000)));
        machine.second(450, 100, 550, 550);
        assert_eq!(machine.last(), (500, 450, Some(900)), "the kernel gave less");
        machine.second(560, 100, 440, 440);
        assert_eq!(machine.last(), (500, 560, Some(1120)), "or more");
    }

    #[test]
    fn a_burst_asks_for_what_it_is() {
        let mut machine = Machine::new(500);
        // 10 ms of work from one second to the next take two periods.
        machine.second(10, 1, 5, 5);
        assert_eq!(machine.last(), (10, 10, Some(1000)));
        machine.second(300, 0, 0, 0);
        assert_eq!(machine.last(), (300, 300, Some(1000)));
        // As measured: 8 bursts of 3 ms at a tenth of a CPU, each refill noticed a moment later because of others.
        let mut machine = Machine::new(100);
        machine.second(24, 17, 126, 147);
        assert_eq!(machine.last(), (24, 24, Some(1000)));
    }

    #[test]
    fn waiting_for_a_cpu_that_others_have_is_asking() {
        let mut machine = Machine::new(500);
        machine.second(300, 0, 0, 700);
        assert_eq!(machine.last(), (500, 300, Some(600)), "a spinner beside others");
        machine.second(100, 0, 0, 100);
        assert_eq!(machine.last(), (200, 100, Some(500)), "a light one");
        // Half a second beside others, half a second alone.
        machine.second(350, 50, 250, 650);
        assert_eq!(machine.last(), (500, 350, Some(700)));
        // 1,000 turns of 100 us are what waking up takes.
        machine.cpu.wait.as_mut().expect("told").turns += 1000;
        machine.second(100, 0, 0, 100);
        assert_eq!(machine.last(), (100, 100, Some(1000)));
        machine.cpu.wait = None;
        machine.read();
        machine.second(100, 0, 0, 900);
        assert_eq!(machine.last().1, 100);
    }

    #[test]
    fn who_asks_for_next_to_nothing_is_not_rated() {
        let mut machine = Machine::new(1000);
        machine.second(3, 0, 0, 6);
        assert_eq!(machine.last(), (9, 3, None));
        machine.second(0, 0, 0, 0);
        assert_eq!(machine.last(), (0, 0, None));
        assert_eq!(machine.sight.cpu(SEC_10).map(|window| window.measured_usec), Some(2 * SEC_1));
    }

    #[test]
    fn a_grant_that_changes_within_a_second_bounds_it_on_both_sides() {
        let mut machine = Machine::new(500);
        machine.cpu.granted_milli = 1000;
        machine.second(750, 60, 0, 250);
        let (asked, delivered, _) = machine.last();
        assert!((500..=1000).contains(&asked) && delivered == 750, "{asked}");
        machine.cpu.granted_milli = 500;
        machine.second(750, 50, 250, 250);
        assert_eq!(machine.last(), (750, 750, Some(1000)), "it was granted more at first");
        machine.second(750, 100, 250, 250);
        assert_eq!(machine.last(), (500, 750, Some(1500)));
    }

    #[test]
    fn windows_hold_their_seconds_and_no_more() {
        let mut machine = Machine::new(1000);
        for second in 1..=100 {
            machine.second(if second > 95 { 100 } else { 900 }, 0, 0, 0);
        }
        let delivered =
            |window| machine.sight.cpu(window).map(|window| (window.measured_usec, window.delivered));
        assert_eq!(delivered(SEC_1), Some((SEC_1, 100)));
        assert_eq!(delivered(SEC_10), Some((SEC_10, 500)));
        assert_eq!(delivered(SEC_60), Some((SEC_60, (55 * 900 + 5 * 100) / 60)));
    }

    #[test]
    fn what_is_not_known_is_left_out() {
        let mut machine = Machine::new(1000);
        machine.second(900, 0, 0, 0);
        machine.cpu.used_usec = 0;
        machine.second(100, 0, 0, 0);
        assert_eq!(machine.last().1, 900, "a counter that begins anew tells nothing");
        machine.second(300, 0, 0, 0);
        assert_eq!(machine.last().1, 300);
        machine.cpu.at_usec += 30 * SEC_1;
        machine.second(0, 0, 0, 0);
        assert_eq!(machine.sight.cpu(SEC_60), None, "nobody looked for half a minute: nothing is of now");
        machine.second(200, 0, 0, 0);
        assert_eq!(machine.last().1, 200);
        let minute = machine.sight.cpu(SEC_60).expect("measured");
        assert_eq!((minute.measured_usec, minute.delivered), (3 * SEC_1, (900 + 300 + 200) / 3));
        for _ in 0..4 {
            let at_usec = machine.sight.now_usec + SEC_1;
            machine.sight.observe(Observation { at_usec, ..Observation::default() });
        }
        assert_eq!(machine.sight.cpu(SEC_60), None, "it cannot be read any more");
    }

    fn net(at_sec: u64, mbit: u64, sent: u64, queue: Option<(u64, u64)>) -> Net {
        let queue = queue.map(|(overlimits, backlog_bytes)| Queue { bytes: sent, overlimits, backlog_bytes });
        Net { at_usec: at_sec * SEC_1, granted_bit_per_sec: mbit * 1_000_000, bytes: sent, queue }
    }

    fn rated(seconds: &[Net]) -> (u64, u64, Option<u64>) {
        let mut sight = Sight::default();
        for net in seconds {
            let seen = Observation { at_usec: net.at_usec, to_guest: Some(*net), ..Observation::default() };
            sight.observe(seen);
        }
        assert_eq!(sight.net_from_guest(SEC_10), None);
        let window = sight.net_to_guest(SEC_10).expect("measured");
        (window.asked, window.delivered, window.permille)
    }

    #[test]
    fn a_queue_that_stays_asks_for_the_whole_rate() {
        let backlog = |overlimits| Some((overlimits, 9_000));
        let full = [net(0, 8, 0, backlog(0)), net(1, 8, 980_000, backlog(70))];
        assert_eq!(rated(&full), (8_000_000, 7_840_000, Some(980)));
        let burst = [net(0, 8, 0, Some((0, 0))), net(1, 8, 100_000, Some((5, 0)))];
        assert_eq!(rated(&burst), (800_000, 800_000, Some(1000)), "it was queued for a moment");
        let begun = [net(0, 8, 0, Some((0, 0))), net(1, 8, 100_000, Some((5, 25_000)))];
        assert_eq!(rated(&begun), (1_000_000, 800_000, Some(800)));
        let unlimited = [net(0, 0, 0, None), net(1, 0, 1_000_000, None)];
        assert_eq!(rated(&unlimited), (8_000_000, 8_000_000, Some(1000)));
        let first_look = [net(0, 8, 0, None), net(1, 8, 1_000_000, backlog(5))];
        assert_eq!(rated(&first_look), (8_000_000, 8_000_000, Some(1000)));
    }

    #[test]
    fn stalls_are_shares_of_time() {
        let mut sight = Sight::default();
        for second in 0..=20 {
            let some_usec = [Some(second * 100_000), None, Some(0)];
            let stalls = Stalls { at_usec: second * SEC_1, some_usec };
            sight.observe(Observation {
                at_usec: second * SEC_1,
                stalls: Some(stalls),
                ..Observation::default()
            });
        }
        assert_eq!(sight.stalls(SEC_10), [Some(1000), None, Some(0)]);
    }

    #[test]
    fn a_period_in_which_both_quotas_were_used_up_counts_once() {
        let cpu = |wall_periods, vcpu_periods| {
            let now = Cpu { at_usec: SEC_1, granted_milli: 500, period_usec: 10_000, ..Cpu::default() };
            let cpu = Cpu { wall_periods, vcpu_periods, ..now };
            cpu.since(&Cpu { at_usec: 0, granted_milli: 500, ..Cpu::default() }).expect("a second").what.asked
        };
        assert_eq!([cpu(40, 0), cpu(0, 40), cpu(40, 40), cpu(10, 40)], [200_000; 4]);
    }

    fn cpus() -> impl Strategy<Value = Cpu> {
        let wild = || prop_oneof![4 => 0_u64..4_000_000, 1 => any::<u64>()];
        let waits = (wild(), 0_u64..2_000_000, wild());
        let waits = waits.prop_map(|(waited_usec, turns, threads)| Wait { waited_usec, turns, threads });
        let counters = (wild(), wild(), (wild(), wild()));
        let all = (wild(), wild(), counters, wild(), prop::option::of(waits));
        all.prop_map(|(at_usec, granted_milli, counters, period_usec, wait)| {
            let (used_usec, throttled_usec, (wall_periods, vcpu_periods)) = counters;
            let cpu = Cpu { at_usec, granted_milli, used_usec, throttled_usec, ..Cpu::default() };
            Cpu { wall_periods, vcpu_periods, period_usec, wait, ..cpu }
        })
    }

    proptest! {
        #[test]
        fn whatever_counters_say_nobody_asks_for_more_than_the_grant(readings in prop::collection::vec(cpus(), 1..80)) {
            let mut sight = Sight::default();
            for cpu in &readings {
                sight.observe(Observation { at_usec: cpu.at_usec, cpu: Some(*cpu), ..Observation::default() });
            }
            for pair in readings.windows(2) {
                if let Some(slot) = pair[1].since(&pair[0]) {
                    prop_assert!(slot.what.asked <= slot.what.granted);
                    prop_assert!((1..=MAX_SPAN_USEC).contains(&slot.span_usec));
                }
            }
            for window in [SEC_1, SEC_10, SEC_60] {
                if let Some(shown) = sight.cpu(window) {
                    prop_assert!(shown.measured_usec > 0);
                    prop_assert!(shown.measured_usec <= window + JITTER_USEC || window == SEC_1);
                }
            }
        }

        /// Steady seconds, however late each reading: windows say the same as all counters together, to rounding.
        #[test]
        fn late_readings_change_no_sum(milli in 50_u64..4000, spans in prop::collection::vec(900_000_u64..1_100_000, 61..120)) {
            let mut sight = Sight::default();
            let mut cpu = Cpu { granted_milli: 4000, ..Cpu::default() };
            for span in spans {
                cpu.at_usec += span;
                cpu.used_usec += span * milli / 1000;
                sight.observe(Observation { at_usec: cpu.at_usec, cpu: Some(cpu), ..Observation::default() });
            }
            for window in [SEC_1, SEC_10, SEC_60] {
                let shown = sight.cpu(window).expect("measured");
                prop_assert!(shown.delivered.abs_diff(milli) <= 1 && shown.asked == shown.delivered);
                prop_assert!(shown.measured_usec.abs_diff(window) <= window / 10 + JITTER_USEC, "{} of {window}", shown.measured_usec);
                prop_assert_eq!(shown.permille, Some(1000));
            }
        }
    }
}
