//! Rates, and what follows from a rate: burst, quantum, length of the queue.
//!
//! Rates are L2 bytes as tc counts them: from the Ethernet header to the end of the payload, each segment of a large
//! GSO packet with its own header; without preamble and checksum.

use std::fmt;

use crate::error::Error;

/// Bit/s.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BitRate(pub u64);

/// The least rate: one full frame in 1.5 s.
pub const RATE_MIN: BitRate = BitRate(8_000);
/// The largest rate that counts as a limit.
pub const RATE_MAX: BitRate = BitRate(800_000_000_000);
/// "Unlimited" on a device that is shaped already: replacing the queue by none would drop what is in it.
pub(crate) const UNLIMITED: BitRate = BitRate(8_000_000_000_000);

/// Time that may be caught up on at once: covers a late timer (a tick of 4 ms, a busy or emulated host's hiccups), and is
/// 0.4 % of ten seconds.
const BURST_USEC: u64 = 40_000;
/// At least two full frames with a VLAN tag.
const BURST_BYTES_MIN: u64 = 2 * 1518;
/// Length of a plain leaf queue in time, where the kernel has no fq_codel.
const QUEUE_USEC: u64 = 50_000;
/// At least one largest GSO packet and a few frames.
const QUEUE_BYTES_MIN: u64 = 2 * GSO_BYTES;
/// At most what a tap's own ring could hold.
const QUEUE_BYTES_MAX: u64 = 16 << 20;
/// A largest GSO packet.
const GSO_BYTES: u64 = 65_536;
/// A full frame.
const FRAME_BYTES: u64 = 1514;

impl BitRate {
    /// # Errors
    /// [`Error::Rate`] outside [`RATE_MIN`] to [`RATE_MAX`].
    pub(crate) fn check(self) -> Result<BitRate, Error> {
        if (RATE_MIN..=RATE_MAX).contains(&self) {
            Ok(self)
        } else {
            Err(Error::Rate { asked: self.0, least: RATE_MIN.0, most: RATE_MAX.0 })
        }
    }

    /// Bytes/s; exact, because the kernel's unit is one byte and rates are rounded up to it.
    pub(crate) fn bytes_per_sec(self) -> u64 {
        self.0.div_ceil(8)
    }

    fn bytes_in(self, usec: u64) -> u64 {
        let bytes = u128::from(self.bytes_per_sec()) * u128::from(usec) / 1_000_000;
        u64::try_from(bytes).unwrap_or(u64::MAX)
    }

    /// What may be sent at once after a pause.
    pub(crate) fn burst_bytes(self) -> u64 {
        self.bytes_in(BURST_USEC).max(BURST_BYTES_MIN)
    }

    /// Byte limit of a plain leaf queue.
    pub(crate) fn queue_bytes(self) -> u32 {
        let bytes = self.bytes_in(QUEUE_USEC).clamp(QUEUE_BYTES_MIN, QUEUE_BYTES_MAX);
        u32::try_from(bytes).unwrap_or(u32::MAX)
    }

    /// CoDel's target in microseconds: 5 ms, but at least what one largest GSO packet and a frame take. HTB passes such
    /// a packet whole, so at 10 Mbit/s it waits 54 ms for itself; a smaller target (RFC 8289, 4.3 thinks of single frames)
    /// would drop whole packets of 45 segments and cost the flow a part of its rate. Other flows have queues of their own.
    pub(crate) fn codel_target_usec(self) -> u32 {
        let packet = (GSO_BYTES + FRAME_BYTES) * 1_000_000 / self.bytes_per_sec().max(1);
        u32::try_from(packet.max(5_000)).unwrap_or(u32::MAX)
    }
}

impl fmt::Display for BitRate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bit/s", self.0)
    }
}

/// One field of a change. Applying a patch twice equals applying it once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Patch<T> {
    /// Leave the kernel's value as it is.
    #[default]
    Keep,
    /// Set this value.
    Set(T),
    /// No limit.
    Unlimited,
}

/// A change of a machine's rates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RatePatch {
    /// What the guest may receive.
    pub to_guest: Patch<BitRate>,
    /// What the guest may send.
    pub from_guest: Patch<BitRate>,
}

impl RatePatch {
    /// # Errors
    /// [`Error::Rate`].
    pub(crate) fn check(&self) -> Result<(), Error> {
        for patch in [self.to_guest, self.from_guest] {
            if let Patch::Set(rate) = patch {
                rate.check()?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bursts_are_small_against_ten_seconds() {
        for mbit in [1, 10, 50, 1000] {
            let rate = BitRate(mbit * 1_000_000);
            assert!(rate.burst_bytes() * 100 <= rate.bytes_per_sec() * 10, "{rate}");
            assert!(rate.burst_bytes() >= BURST_BYTES_MIN);
        }
    }

    #[test]
    fn a_target_is_above_one_largest_packet() {
        assert_eq!(BitRate(1_000_000_000).codel_target_usec(), 5_000);
        assert_eq!(BitRate(10_000_000).codel_target_usec(), 53_640);
        assert_eq!(BitRate(10_000_000).queue_bytes(), 131_072);
    }

    #[test]
    fn zero_and_absurd_rates_are_refused() {
        for asked in [0, 7_999, u64::MAX] {
            let patch = RatePatch { from_guest: Patch::Set(BitRate(asked)), ..RatePatch::default() };
            assert!(patch.check().is_err(), "{asked}");
        }
        assert!(
            RatePatch { to_guest: Patch::Set(RATE_MIN), from_guest: Patch::Set(RATE_MAX) }.check().is_ok()
        );
    }
}
