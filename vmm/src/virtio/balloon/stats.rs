//! What the driver says of the guest's memory (virtio 1.2, 5.5.6.3). None of it is trusted; it is handed on.

use crate::control::wire::GuestMemory;

/// `struct virtio_balloon_stat`: a tag and a value, packed.
const STAT_BYTES: usize = 10;
/// Most statistics of one buffer that are read; Linux 6.12 has 16.
pub const MAX_STATS: usize = 64;
/// Most bytes of one buffer that are read.
pub const MAX_BYTES: usize = MAX_STATS * STAT_BYTES;

/// Reads a buffer; unknown tags are skipped, of several with the same tag the last counts.
pub fn parse(buffer: &[u8]) -> GuestMemory {
    let mut memory = GuestMemory::default();
    for stat in buffer.chunks_exact(STAT_BYTES).take(MAX_STATS) {
        let Some((tag, value)) = stat.split_first_chunk::<2>() else { continue };
        let Some(value) = value.first_chunk::<8>() else { continue };
        let field = match u16::from_le_bytes(*tag) {
            0 => &mut memory.swap_in_bytes,
            1 => &mut memory.swap_out_bytes,
            2 => &mut memory.major_faults,
            4 => &mut memory.free_bytes,
            5 => &mut memory.total_bytes,
            6 => &mut memory.available_bytes,
            7 => &mut memory.disk_caches_bytes,
            // Linux, from 6.12 on.
            10 => &mut memory.oom_kills,
            _ => continue,
        };
        *field = u64::from_le_bytes(*value);
    }
    memory
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_tags_are_read_wherever_they_are() {
        let mut buffer = Vec::new();
        for (tag, value) in [(4u16, 1u64), (99, 2), (0, 3), (1, 4), (2, 5), (5, 6), (6, 7), (7, 8), (10, 9)] {
            buffer.extend(tag.to_le_bytes());
            buffer.extend(value.to_le_bytes());
        }
        buffer.extend([4, 0, 1]);
        let expected = GuestMemory {
            free_bytes: 1,
            total_bytes: 6,
            available_bytes: 7,
            disk_caches_bytes: 8,
            swap_in_bytes: 3,
            swap_out_bytes: 4,
            major_faults: 5,
            oom_kills: 9,
        };
        assert_eq!(parse(&buffer), expected);
        assert_eq!(parse(&[]), GuestMemory::default());
    }
}
