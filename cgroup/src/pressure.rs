//! Pressure stall information of one group: `cpu.pressure`, `memory.pressure`, `io.pressure`. Read only; triggers are
//! not set here.
//!
//! Kernel: `Documentation/accounting/psi.rst`. Files are missing, or answer EOPNOTSUPP, where the kernel was started
//! with PSI off (Debian: `psi=1` on the command line turns it on).

use std::path::Path;

use crate::error::Error;
use crate::file;

/// Stalls of one resource since the group was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pressure {
    /// Time in which at least one thread waited, microseconds.
    pub some_usec: u64,
    /// Time in which all threads waited, microseconds.
    pub full_usec: u64,
}

/// Stalls of a machine; `None` where the kernel does not tell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PressureUsage {
    /// Waiting for a CPU, its own quota included.
    pub cpu: Option<Pressure>,
    /// Waiting for memory.
    pub memory: Option<Pressure>,
    /// Waiting for a block device.
    pub io: Option<Pressure>,
}

/// Reads all three of one group.
pub(crate) fn read_usage(group: &Path) -> Result<PressureUsage, Error> {
    let read = |name| file::read_if_there(&group.join(name)).map(|content| content.map(|text| parse(&text)));
    Ok(PressureUsage {
        cpu: read("cpu.pressure")?,
        memory: read("memory.pressure")?,
        io: read("io.pressure")?,
    })
}

fn parse(content: &str) -> Pressure {
    let total = |kind: &str| {
        content
            .lines()
            .filter(|line| line.split(' ').next() == Some(kind))
            .find_map(|line| line.split(' ').find_map(|word| word.strip_prefix("total=")))
            .and_then(|text| text.parse().ok())
            .unwrap_or(0)
    };
    Pressure { some_usec: total("some"), full_usec: total("full") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn totals_are_read() {
        let got = parse(
            "some avg10=0.00 avg60=0.00 avg300=0.00 total=123\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=45\n",
        );
        assert_eq!(got, Pressure { some_usec: 123, full_usec: 45 });
        assert_eq!(parse("garbage"), Pressure::default());
    }
}
