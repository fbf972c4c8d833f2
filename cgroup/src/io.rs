//! The io controller, read only for now: the sums of `io.stat`. Limits of a machine's disks are the device model's and
//! `io.max`'s business.
//!
//! Kernel: cgroup-v2.rst "IO Interface Files". A line that has other keys, or only a device number, is no error.

use std::path::Path;

use crate::error::Error;
use crate::file;
use crate::units::Bytes;

/// What a machine did to all block devices together since its group was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IoUsage {
    /// Bytes read.
    pub read: Bytes,
    /// Bytes written.
    pub written: Bytes,
    /// Reads.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
}

/// Reads one group; zero where the io controller is not enabled.
pub(crate) fn read_usage(group: &Path) -> Result<IoUsage, Error> {
    Ok(file::read_if_there(&group.join("io.stat"))?.map_or_else(IoUsage::default, |content| parse(&content)))
}

fn parse(content: &str) -> IoUsage {
    let mut sum = IoUsage::default();
    for (key, value) in
        content.lines().flat_map(str::split_whitespace).filter_map(|word| word.split_once('='))
    {
        let value = value.parse().unwrap_or(0);
        match key {
            "rbytes" => sum.read.0 = sum.read.0.saturating_add(value),
            "wbytes" => sum.written.0 = sum.written.0.saturating_add(value),
            "rios" => sum.reads = sum.reads.saturating_add(value),
            "wios" => sum.writes = sum.writes.saturating_add(value),
            _ => {}
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_summed_and_odd_lines_survive() {
        let got = parse(
            "259:0 rbytes=4096 wbytes=8192 rios=1 wios=2 dbytes=0 dios=0\n8:1048575 rbytes=1 wbytes=2 rios=3 wios=4 cost.usage=9\n7:0 \n",
        );
        assert_eq!(got, IoUsage { read: Bytes(4097), written: Bytes(8194), reads: 4, writes: 6 });
    }
}
