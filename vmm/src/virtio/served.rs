//! A queue in service: what every device does with a queue between DRIVER_OK and reset.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::chain::{Chain, ChainError};
use super::{ActivateError, ActiveQueue, Interrupt, Watcher};

/// `VIRTQ_AVAIL_F_NO_INTERRUPT`.
const NO_INTERRUPT: u16 = 1;
const OUTSIDE: ChainError = ChainError::Ring("it lies outside memory");

/// A queue whose notifications arrive at `on_event` with the token given to [`ServedQueue::new`], until it is dropped.
pub struct ServedQueue {
    queue: Queue,
    notify: EventFd,
    index: u16,
    watcher: Watcher,
    interrupt: Arc<dyn Interrupt>,
    /// Used index when the driver was last told, or decided not to be.
    signalled: u16,
}

impl ServedQueue {
    /// Watches the queue's notifications with its index as token, and looks at it once by itself.
    ///
    /// # Errors
    /// When the queue is missing or its descriptor cannot be watched.
    pub fn new(
        active: Option<ActiveQueue>,
        index: u16,
        watcher: &Watcher,
        interrupt: &Arc<dyn Interrupt>,
    ) -> Result<Self, ActivateError> {
        use std::os::fd::AsRawFd;
        let ActiveQueue { queue, notify } = active.ok_or(ActivateError::MissingQueue(index))?;
        super::set_nonblocking(&notify).map_err(ActivateError::Watch)?;
        watcher.add(notify.as_raw_fd(), u32::from(index), EventSet::IN).map_err(ActivateError::Watch)?;
        let signalled = queue.next_used();
        let served =
            Self { queue, notify, index, signalled, watcher: watcher.clone(), interrupt: interrupt.clone() };
        served.look_again();
        Ok(served)
    }

    /// Size that the driver chose.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Consumes the pending notification.
    pub fn take_notification(&self) {
        // The descriptor does not block, and an event that was already consumed is nothing to worry about.
        let _ = self.notify.read();
    }

    /// Has `on_event` called again for this queue, after others had their turn.
    pub fn look_again(&self) {
        // Fails only if the counter is full, and then the event is pending anyway.
        let _ = self.notify.write(1);
    }

    /// Takes the next available chain; `false` when there is none.
    ///
    /// # Errors
    /// When the ring or the chain breaks the rules.
    pub fn pop(&mut self, memory: &GuestMemoryMmap, chain: &mut Chain) -> Result<bool, ChainError> {
        let mut available = self.queue.iter(memory).map_err(|error| ring_error(&error))?;
        match available.next() {
            Some(source) => chain.load(source).map(|()| true),
            None => Ok(false),
        }
    }

    /// Puts back the last `count` chains taken.
    pub fn unpop(&mut self, count: usize) {
        for _ in 0..count {
            self.queue.go_to_previous_position();
        }
    }

    /// Asks for notifications; `true` when chains came meanwhile and must be looked at now.
    ///
    /// # Errors
    /// When a ring is outside memory.
    pub fn enable_notification(&mut self, memory: &GuestMemoryMmap) -> Result<bool, ChainError> {
        self.queue.enable_notification(memory).map_err(|error| ring_error(&error))
    }

    /// Gives a chain back with `written` bytes in its writable part.
    ///
    /// # Errors
    /// When the ring is outside memory or the driver never had such a chain.
    pub fn push(&mut self, memory: &GuestMemoryMmap, head: u16, written: u32) -> Result<(), ChainError> {
        self.queue.add_used(memory, head, written).map_err(|error| ring_error(&error))
    }

    /// Gives several chains back that the driver must see together (5.1.6.4: the buffers of one frame).
    ///
    /// # Errors
    /// As [`ServedQueue::push`].
    pub fn push_together(&mut self, memory: &GuestMemoryMmap, used: &[(u16, u32)]) -> Result<(), ChainError> {
        let Some((&(last_head, last_len), rest)) = used.split_last() else { return Ok(()) };
        let (first, size) = (self.queue.next_used(), self.queue.size());
        let mut index = first;
        for (head, len) in rest {
            let slot = self.queue.used_ring() + 4 + 8 * u64::from(index % size);
            let element = u64::from(*head) | u64::from(*len) << 32;
            memory.write_obj(element.to_le(), GuestAddress(slot)).map_err(|_| OUTSIDE)?;
            index = index.wrapping_add(1);
        }
        self.queue.set_next_used(index);
        self.push(memory, last_head, last_len)
    }

    /// Interrupts the driver if it wants to hear of what was given back since the last call (2.7.7, 2.7.10).
    ///
    /// # Errors
    /// When the ring is outside memory.
    pub fn signal(&mut self, memory: &GuestMemoryMmap) -> Result<(), ChainError> {
        let (new, old) = (self.queue.next_used(), self.signalled);
        if new == old {
            return Ok(());
        }
        self.signalled = new;
        // The used index must be visible before the driver's wish is read (the driver does the reverse).
        fence(Ordering::SeqCst);
        let read = |offset: u64| -> Result<u16, ChainError> {
            let addr = GuestAddress(self.queue.avail_ring() + offset);
            memory.load(addr, Ordering::Relaxed).map(u16::from_le).map_err(|_| OUTSIDE)
        };
        let wanted = if self.queue.event_idx_enabled() {
            let event = read(4 + 2 * u64::from(self.queue.size()))?;
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            read(0)? & NO_INTERRUPT == 0
        };
        if wanted {
            self.interrupt.queue(self.index);
        }
        Ok(())
    }
}

impl Drop for ServedQueue {
    fn drop(&mut self) {
        use std::os::fd::AsRawFd;
        // The transport may hold a duplicate, so closing ours would not end the watch.
        let _ = self.watcher.remove(self.notify.as_raw_fd());
    }
}

fn ring_error(error: &virtio_queue::Error) -> ChainError {
    use virtio_queue::Error;
    ChainError::Ring(match error {
        Error::InvalidAvailRingIndex => "the available index runs ahead of the ring's size",
        Error::InvalidDescriptorIndex => "a chain's index is beyond the descriptor table",
        Error::QueueNotReady => "it is not ready",
        _ => return OUTSIDE,
    })
}
