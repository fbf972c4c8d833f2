//! Balloon device (virtio 1.2, section 5.5): the guest gives pages away, those that it is asked for and those that it does not use.
//!
//! ```text
//! set_target ─▶ configuration interrupt ─▶ driver ─▶ inflate: page frames ─▶ sorted, joined ─▶ madvise
//! free page reporting, always on:          driver ─▶ free ranges, 2 MiB and more           ─▶ madvise
//! ```
//!
//! - MUST_TELL_HOST is offered so that pages may go back a little after the driver has been answered (`later`); without it they go
//!   before. With DEFLATE_ON_OOM the guest takes pages back rather than kill a process. What the balloon holds is what the driver says
//!   that it holds.
//! - FREE_PAGE_HINT is not offered: the device may discard a hinted page after the guest has begun to use it again. Reporting has no
//!   such race, for the guest does not touch a reported page until it has been answered.
//! - PAGE_POISON is not offered: Linux then does without reporting if it fills free pages with a pattern (`init_on_free`,
//!   `page_poison`), as it must.
//! - Statistics: the driver leaves a buffer here and fills it anew when it gets it back. It gets it back when somebody asks for
//!   statistics and the last ones are older than [`FRESH`], so a machine that nobody looks at does no work.
//!
//! Queues after the first two are numbered as the specification has it or, by Linux, as if those not negotiated were not there.

mod later;
mod pages;
mod stats;
#[cfg(test)]
mod tests;

use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use self::later::{Later, MAX_FRAMES};
use self::pages::FRAME_BYTES;
use super::chain::{Chain, ChainError, Half};
use super::served::ServedQueue;
use super::{
    ActivateError, Activation, ActiveQueue, DeviceKind, Interrupt, Memory, MemoryReport, Unread,
    VIRTIO_F_RING_EVENT_IDX, VIRTIO_F_RING_INDIRECT_DESC, VirtioDevice, Watcher,
};
use crate::control::wire::GuestMemory;

const VIRTIO_BALLOON_F_MUST_TELL_HOST: u64 = 1 << 0;
const VIRTIO_BALLOON_F_STATS_VQ: u64 = 1 << 1;
const VIRTIO_BALLOON_F_DEFLATE_ON_OOM: u64 = 1 << 2;
const VIRTIO_BALLOON_F_REPORTING: u64 = 1 << 5;

/// Inflate, deflate, statistics, (free page hints), reporting.
const QUEUE_SIZES: [u16; 5] = [128; 5];
const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
const STATS: u16 = 2;
/// Token of the request for statistics.
const TOKEN_ASK: u32 = 16;
/// Token of the timer for pages left over.
const TOKEN_LATER: u32 = 17;
/// Statistics that are younger are not asked for again.
pub const FRESH: Duration = Duration::from_secs(1);

const CONFIG_BYTES: usize = 16;
const CONFIG_TARGET: u64 = 0;
const CONFIG_ACTUAL: u64 = 4;
/// Most page frames of one chain; Linux sends 256.
const MAX_CHAIN_FRAMES: usize = 1 << 16;

/// A watch that ends when dropped.
struct Watch {
    fd: RawFd,
    watcher: Watcher,
}

impl Watch {
    fn new(fd: RawFd, token: u32, watcher: &Watcher) -> Result<Self, ActivateError> {
        watcher.add(fd, token, EventSet::IN).map_err(ActivateError::Watch)?;
        Ok(Self { fd, watcher: watcher.clone() })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = self.watcher.remove(self.fd);
    }
}

struct Running {
    inflate: ServedQueue,
    deflate: ServedQueue,
    stats: Option<ServedQueue>,
    reporting: Option<(u16, ServedQueue)>,
    /// The driver's statistics buffer, while it is here.
    held: Option<u16>,
    memory: Memory,
    interrupt: Arc<dyn Interrupt>,
    /// Pages may go back after the driver has been answered.
    deferred: bool,
    _watches: [Watch; 2],
}

/// The device.
pub struct Balloon {
    target: u32,
    unread: Unread,
    actual: u32,
    guest: Option<GuestMemory>,
    asked: Option<Instant>,
    ask: EventFd,
    running: Option<Running>,
    chain: Chain,
    later: Later,
    timer: TimerFd,
    report: Arc<dyn MemoryReport>,
}

/// What of a [`Balloon`] there is to see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BalloonState {
    /// What it shall hold, bytes.
    pub target: u64,
    /// What it holds by the driver's account, bytes.
    pub actual: u64,
    /// A driver is there.
    pub driver: bool,
    /// What the balloon shall hold has changed since it read that.
    pub unread: bool,
    /// The last statistics.
    pub guest: Option<GuestMemory>,
}

impl Balloon {
    /// An empty balloon.
    ///
    /// # Errors
    /// When there is no descriptor left.
    pub fn new(report: Arc<dyn MemoryReport>) -> std::io::Result<Self> {
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        Ok(Self {
            target: 0,
            unread: Unread::default(),
            actual: 0,
            guest: None,
            asked: None,
            ask: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            running: None,
            chain: Chain::default(),
            later: Later::default(),
            timer: TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?,
            report,
        })
    }

    /// What there is to see. Asks the driver for statistics, if the last ones are not fresh; they are there at a later call.
    pub fn look(&mut self) -> BalloonState {
        if self.running.is_some() && self.asked.is_none_or(|asked| asked.elapsed() > FRESH) {
            self.asked = Some(Instant::now());
            // Guest memory is the device thread's alone. A full counter means that it has been asked.
            let _ = self.ask.write(1);
        }
        BalloonState {
            target: u64::from(self.target) * FRAME_BYTES,
            actual: u64::from(self.actual) * FRAME_BYTES,
            driver: self.running.is_some(),
            unread: self.running.is_some() && self.unread.get(),
            guest: self.guest,
        }
    }

    /// Asks the guest to have `bytes` in the balloon; without a driver it is remembered.
    ///
    /// # Errors
    /// A sentence, when it is no multiple of a page or more than page numbers can say.
    pub fn set_target(&mut self, bytes: u64) -> Result<(), String> {
        let frames = u32::try_from(bytes / FRAME_BYTES).ok().filter(|_| bytes.is_multiple_of(FRAME_BYTES));
        let frames = frames.ok_or_else(|| {
            format!("{bytes} bytes in the balloon; a multiple of {FRAME_BYTES} below 16 TiB is possible")
        })?;
        let before = std::mem::replace(&mut self.target, frames);
        if let Some(running) = &self.running {
            self.unread.set(self.unread.get() || before != frames);
            running.interrupt.config();
        }
        Ok(())
    }

    /// The machine starts anew: the balloon is empty, what it shall hold stays. The device must have been reset.
    pub fn forget(&mut self) {
        (self.actual, self.guest, self.asked) = (0, None, None);
    }

    fn config(&self) -> [u8; CONFIG_BYTES] {
        let mut config = [0; CONFIG_BYTES];
        config[..4].copy_from_slice(&self.target.to_le_bytes());
        config[4..8].copy_from_slice(&self.actual.to_le_bytes());
        config
    }

    fn work(&mut self, running: &mut Running, token: u32) -> Result<(), ChainError> {
        let memory = running.memory.memory();
        match token {
            TOKEN_ASK => {
                let _ = self.ask.read();
                return running.return_stats(&memory);
            }
            TOKEN_LATER => {
                let _ = self.timer.unset();
                if self.later.is_empty() {
                    self.later.split_some(&memory);
                } else {
                    self.later.discard_all(&memory);
                }
                self.split_later();
                return Ok(());
            }
            _ => {}
        }
        match u16::try_from(token).unwrap_or(u16::MAX) {
            INFLATE => {
                running.inflate.take_notification();
                let inflated = self.inflate(running, &memory);
                self.put_off(running.deferred, &memory);
                self.split_later();
                inflated
            }
            DEFLATE => {
                running.deflate.take_notification();
                // Once it is answered the driver may use the pages.
                self.later.discard_all(&memory);
                self.split_later();
                deflate(&mut running.deflate, &memory, &mut self.chain, &mut self.later)
            }
            queue => match (&mut running.stats, &mut running.reporting) {
                (_, Some((index, reporting))) if *index == queue => {
                    reporting.take_notification();
                    report(reporting, &memory, &mut self.chain)
                }
                (Some(stats), _) if queue == STATS => {
                    stats.take_notification();
                    self.take_stats(running, &memory)
                }
                _ => Ok(()),
            },
        }
    }

    /// Takes the pages of what is available, and answers: before they go back to the host or after.
    fn inflate(&mut self, running: &mut Running, memory: &GuestMemoryMmap) -> Result<(), ChainError> {
        let queue = &mut running.inflate;
        let frames = self.later.frames();
        let (mut heads, mut more) = (Vec::with_capacity(usize::from(queue.size())), true);
        while heads.len() < usize::from(queue.size()) && frames.len() < MAX_FRAMES {
            if !queue.pop(memory, &mut self.chain)? {
                if queue.enable_notification(memory)? {
                    continue;
                }
                more = false;
                break;
            }
            add_frames(memory, &self.chain, frames)?;
            heads.push(self.chain.head());
        }
        if !running.deferred {
            self.later.discard_all(memory);
        }
        for head in heads {
            queue.push(memory, head, 0)?;
        }
        if more {
            queue.look_again();
        }
        queue.signal(memory)
    }

    /// Discards what can go at once; the rest when the driver pauses.
    fn put_off(&mut self, deferred: bool, memory: &GuestMemoryMmap) {
        if deferred {
            self.later.discard_whole(memory);
        }
        if self.later.is_empty() {
            return;
        }
        let pause = Expiration::OneShot(later::PAUSE.into());
        if !deferred || self.timer.set(pause, TimerSetTimeFlags::empty()).is_err() {
            self.later.discard_all(memory);
        }
    }

    /// Splits huge pages when the driver has paused, if nothing else comes first.
    fn split_later(&mut self) {
        if self.later.is_empty() && self.later.has_broken() {
            // Without a timer, which cannot fail, they would stay with the host as they do with every other monitor.
            let _ =
                self.timer.set(Expiration::OneShot(later::SPLIT_PAUSE.into()), TimerSetTimeFlags::empty());
        }
    }

    /// Takes the driver's buffer and reads it. The driver has one; if it sends another, the first goes back.
    fn take_stats(&mut self, running: &mut Running, memory: &GuestMemoryMmap) -> Result<(), ChainError> {
        let Some(stats) = &mut running.stats else { return Ok(()) };
        let mut rounds = 0..stats.size();
        while rounds.next().is_some() {
            if !stats.pop(memory, &mut self.chain)? {
                if stats.enable_notification(memory)? {
                    continue;
                }
                return stats.signal(memory);
            }
            let length = usize::try_from(self.chain.readable_bytes()).unwrap_or(usize::MAX);
            let mut buffer = [0; stats::MAX_BYTES];
            let buffer = &mut buffer[..length.min(stats::MAX_BYTES)];
            self.chain.read(memory, 0, buffer)?;
            self.guest = Some(stats::parse(buffer));
            if let Some(head) = running.held.replace(self.chain.head()) {
                stats.push(memory, head, 0)?;
            }
        }
        stats.look_again();
        stats.signal(memory)
    }
}

impl Running {
    /// Gives the statistics buffer back, which asks for new ones.
    fn return_stats(&mut self, memory: &GuestMemoryMmap) -> Result<(), ChainError> {
        if let (Some(stats), Some(head)) = (&mut self.stats, self.held.take()) {
            stats.push(memory, head, 0)?;
            stats.signal(memory)?;
        }
        Ok(())
    }
}

/// Reads a chain's page frame numbers.
fn add_frames(memory: &GuestMemoryMmap, chain: &Chain, frames: &mut Vec<u32>) -> Result<(), ChainError> {
    let count = usize::try_from(chain.readable_bytes() / 4).unwrap_or(usize::MAX);
    if count > MAX_CHAIN_FRAMES {
        return Err(ChainError::TooLong { head: chain.head() });
    }
    let mut buffer = [0; 1024];
    for first in (0..count).step_by(buffer.len() / 4) {
        let part = (4 * (count - first)).min(buffer.len());
        let part = &mut buffer[..part];
        chain.read(memory, 4 * first as u64, part)?;
        frames.extend(part.as_chunks::<4>().0.iter().map(|bytes| u32::from_le_bytes(*bytes)));
    }
    Ok(())
}

/// Answers: pages come back by being used.
fn deflate(
    queue: &mut ServedQueue,
    memory: &GuestMemoryMmap,
    chain: &mut Chain,
    later: &mut Later,
) -> Result<(), ChainError> {
    let mut frames = Vec::new();
    serve(queue, memory, chain, |chain| {
        frames.clear();
        // What cannot be read are pages of which nothing is known: they come back all the same.
        if later.has_split() && add_frames(memory, chain, &mut frames).is_ok() {
            later.leave(memory, &frames);
        }
    })
}

/// Gives free ranges back to the host, then answers.
fn report(queue: &mut ServedQueue, memory: &GuestMemoryMmap, chain: &mut Chain) -> Result<(), ChainError> {
    serve(queue, memory, chain, |chain| {
        for (start, len) in chain.ranges(Half::Writable) {
            pages::discard(memory, &pages::whole_frames(start.0, u64::from(len)));
        }
    })
}

/// Answers what is available, within a queue's size of chains.
fn serve(
    queue: &mut ServedQueue,
    memory: &GuestMemoryMmap,
    chain: &mut Chain,
    mut act: impl FnMut(&Chain),
) -> Result<(), ChainError> {
    let mut rounds = 0..queue.size();
    while rounds.next().is_some() {
        if !queue.pop(memory, chain)? {
            if queue.enable_notification(memory)? {
                continue;
            }
            return queue.signal(memory);
        }
        act(chain);
        queue.push(memory, chain.head(), 0)?;
    }
    queue.look_again();
    queue.signal(memory)
}

/// Which of the queues is for reporting: 4 by the specification, the next after those negotiated by Linux.
fn reporting_index(features: u64, queues: &[Option<ActiveQueue>]) -> Option<u16> {
    if features & VIRTIO_BALLOON_F_REPORTING == 0 {
        return None;
    }
    let packed = if features & VIRTIO_BALLOON_F_STATS_VQ == 0 { STATS } else { STATS + 1 };
    [4, packed].into_iter().find(|index| queues.get(usize::from(*index)).is_some_and(Option::is_some))
}

impl VirtioDevice for Balloon {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Balloon
    }

    fn name(&self) -> &str {
        "balloon"
    }

    fn features(&self) -> u64 {
        VIRTIO_BALLOON_F_MUST_TELL_HOST
            | VIRTIO_BALLOON_F_STATS_VQ
            | VIRTIO_BALLOON_F_DEFLATE_ON_OOM
            | VIRTIO_BALLOON_F_REPORTING
            | VIRTIO_F_RING_EVENT_IDX
            | VIRTIO_F_RING_INDIRECT_DESC
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        super::read_config_bytes(&self.config(), offset, data);
        let news = self.unread.read(offset, data, CONFIG_TARGET);
        // Otherwise it will soon be told with what the driver does about it.
        if news && self.actual == self.target {
            self.report.memory_changed();
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        // Linux writes it as one word, the specification's only way (4.1.3.1).
        if let (CONFIG_ACTUAL, Ok(word)) = (offset, <[u8; 4]>::try_from(data)) {
            let actual = u32::from_le_bytes(word);
            if std::mem::replace(&mut self.actual, actual) != actual {
                self.report.memory_changed();
            }
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, mut queues, features, interrupt, watcher } = activation;
        // Of a device that stopped because of its driver something may be left.
        self.later.forget(&memory.memory());
        let reporting = reporting_index(features, &queues);
        let mut queue = |index: u16| {
            let active = queues.get_mut(usize::from(index)).and_then(Option::take);
            ServedQueue::new(active, index, &watcher, &interrupt)
        };
        let (inflate, deflate) = (queue(INFLATE)?, queue(DEFLATE)?);
        let stats = (features & VIRTIO_BALLOON_F_STATS_VQ != 0).then(|| queue(STATS)).transpose()?;
        let reporting = reporting.map(|index| queue(index).map(|queue| (index, queue))).transpose()?;
        let _watches = [
            Watch::new(self.ask.as_raw_fd(), TOKEN_ASK, &watcher)?,
            Watch::new(self.timer.as_fd().as_raw_fd(), TOKEN_LATER, &watcher)?,
        ];
        let deferred = features & VIRTIO_BALLOON_F_MUST_TELL_HOST != 0;
        let held = None;
        self.running =
            Some(Running { inflate, deflate, stats, reporting, held, memory, interrupt, deferred, _watches });
        self.report.memory_changed();
        Ok(())
    }

    fn reset(&mut self) {
        self.unread.set(false);
        if let Some(running) = self.running.take() {
            self.later.forget(&running.memory.memory());
            self.forget();
            self.report.memory_changed();
        }
    }

    fn on_event(&mut self, token: u32, _events: EventSet) {
        let Some(mut running) = self.running.take() else { return };
        match self.work(&mut running, token) {
            Ok(()) => self.running = Some(running),
            Err(error) => {
                running.interrupt.needs_reset(&error.to_string());
                self.report.memory_changed();
            }
        }
    }
}
