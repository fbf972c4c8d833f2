//! The guest's own usage figures, from /proc and /sys.
//!
//! Each figure is 0 (or `None`) when its file is not there: a guest with less in its kernel still answers. Formats:
//! proc(5), Documentation/admin-guide/iostats.rst and accounting/psi.rst of the kernel.

use std::fs;
use std::path::Path;

use lathe_guest::protocol::Usage;

use crate::resources::parse_list;

/// USER_HZ, which the kernel fixes at 100 for user space on x86.
const TICK_USEC: u64 = 10_000;
/// Unit of /proc/diskstats, whatever the disk's own sectors are.
const SECTOR_BYTES: u64 = 512;

/// Present figures.
pub fn read() -> Usage {
    read_in(Path::new("/"))
}

fn read_in(root: &Path) -> Usage {
    let text = |path: &str| fs::read_to_string(root.join(path)).unwrap_or_default();
    let mut usage = Usage::default();
    cpu(&text("proc/stat"), &mut usage);
    memory(&text("proc/meminfo"), &mut usage);
    network(&text("proc/net/dev"), &mut usage);
    disks(&text("proc/diskstats"), |name| root.join("sys/block").join(name).exists(), &mut usage);
    usage.uptime_msec = thousandths(&text("proc/uptime"));
    usage.load1_milli = thousandths(&text("proc/loadavg"));
    usage.cpus_online = parse_list(&text("sys/devices/system/cpu/online")).len() as u32;
    usage.cpus_present = parse_list(&text("sys/devices/system/cpu/present")).len() as u32;
    usage.psi_memory_some_centipercent = pressure(&text("proc/pressure/memory"));
    usage.psi_cpu_some_centipercent = pressure(&text("proc/pressure/cpu"));
    usage.psi_io_some_centipercent = pressure(&text("proc/pressure/io"));
    usage
}

/// `12.34…` as 12340: the first word of the text, in thousandths.
fn thousandths(text: &str) -> u64 {
    let word = text.split_whitespace().next().unwrap_or_default();
    decimal(word, 3).unwrap_or_default()
}

/// A decimal number in units of 10^-digits, cut, not rounded.
fn decimal(word: &str, digits: usize) -> Option<u64> {
    let (whole, fraction) = word.split_once('.').unwrap_or((word, ""));
    let fraction: String = fraction.chars().chain(std::iter::repeat('0')).take(digits).collect();
    whole.parse::<u64>().ok()?.checked_mul(10u64.pow(digits as u32))?.checked_add(fraction.parse().ok()?)
}

fn cpu(stat: &str, usage: &mut Usage) {
    let Some(line) = stat.lines().find_map(|line| line.strip_prefix("cpu ")) else { return };
    let ticks: Vec<u64> = line.split_whitespace().map_while(|word| word.parse().ok()).collect();
    let tick = |index: usize| ticks.get(index).copied().unwrap_or_default();
    // user nice system idle iowait irq softirq steal
    let busy = [0, 1, 2, 5, 6].map(tick).into_iter().fold(0, u64::saturating_add);
    usage.cpu_busy_usec = busy.saturating_mul(TICK_USEC);
    usage.cpu_steal_usec = tick(7).saturating_mul(TICK_USEC);
}

fn memory(meminfo: &str, usage: &mut Usage) {
    let bytes = |name: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
    };
    usage.memory_total_bytes = bytes("MemTotal").unwrap_or_default();
    usage.memory_available_bytes = bytes("MemAvailable").unwrap_or_default();
}

fn network(dev: &str, usage: &mut Usage) {
    for (name, figures) in dev.lines().filter_map(|line| line.split_once(':')) {
        let figures: Vec<u64> = figures.split_whitespace().map_while(|word| word.parse().ok()).collect();
        if name.trim() != "lo" && figures.len() >= 9 {
            usage.net_rx_bytes = usage.net_rx_bytes.saturating_add(figures[0]);
            usage.net_tx_bytes = usage.net_tx_bytes.saturating_add(figures[8]);
        }
    }
}

/// Adds up whole disks; partitions and devices that are made of disks would count twice.
fn disks(diskstats: &str, is_whole: impl Fn(&str) -> bool, usage: &mut Usage) {
    for line in diskstats.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [_, _, name, _, _, read, _, _, _, written, ..] = words[..] else { continue };
        let stacked = ["loop", "ram", "dm-", "md", "zram"].iter().any(|prefix| name.starts_with(prefix));
        let (Ok(read), Ok(written)) = (read.parse::<u64>(), written.parse::<u64>()) else { continue };
        if !stacked && !name.contains('/') && is_whole(name) {
            usage.disk_read_bytes = usage.disk_read_bytes.saturating_add(read.saturating_mul(SECTOR_BYTES));
            usage.disk_written_bytes =
                usage.disk_written_bytes.saturating_add(written.saturating_mul(SECTOR_BYTES));
        }
    }
}

/// `some avg10=1.23 …` as 123.
fn pressure(text: &str) -> Option<u32> {
    let some = text.lines().find_map(|line| line.strip_prefix("some "))?;
    let average = some.split_whitespace().find_map(|word| word.strip_prefix("avg10="))?;
    u32::try_from(decimal(average, 2)?).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FILES: &[(&str, &str)] = &[
        ("proc/stat", "cpu  100 2 30 4000 5 6 7 80 0 0\ncpu0 100 2 30 4000 5 6 7 80 0 0\nintr 1\n"),
        (
            "proc/meminfo",
            "MemTotal:         245760 kB\nMemFree:           1 kB\nMemAvailable:     200000 kB\n",
        ),
        (
            "proc/net/dev",
            "Inter-|   Receive                                                |  Transmit\n face |bytes    packets errs\n    lo:     999 9 0 0 0 0 0 0 999 9 0 0 0 0 0 0\n  eth0: 1000 9 0 0 0 0 0 0 2000 9 0 0 0 0 0 0\n  eth1:10 9 0 0 0 0 0 0 20 9 0 0 0 0 0 0\n",
        ),
        (
            "proc/diskstats",
            " 254 0 vda 10 0 100 5 20 0 200 6 0 1 1 0 0 0 0 0 0\n 254 1 vda1 10 0 90 5 20 0 190 6 0 1 1 0 0 0 0\n 7 0 loop0 1 0 8 0 1 0 8 0 0 0 0\nbroken line\n",
        ),
        ("proc/uptime", "12.34 20.00\n"),
        ("proc/loadavg", "0.52 0.58 0.59 1/127 1234\n"),
        (
            "proc/pressure/memory",
            "some avg10=1.23 avg60=0.00 avg300=0.00 total=99\nfull avg10=0.50 avg60=0.00 avg300=0.00 total=1\n",
        ),
        ("sys/devices/system/cpu/online", "0-1\n"),
        ("sys/devices/system/cpu/present", "0-3\n"),
        ("sys/block/vda/size", "1\n"),
        ("sys/block/loop0/size", "1\n"),
    ];

    #[test]
    fn figures_come_from_the_right_columns() {
        let root = tempfile::tempdir().unwrap();
        for (path, contents) in FILES {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, contents).unwrap();
        }
        let expected = Usage {
            uptime_msec: 12_340,
            cpus_online: 2,
            cpus_present: 4,
            cpu_busy_usec: 1_450_000,
            cpu_steal_usec: 800_000,
            memory_total_bytes: 245_760 << 10,
            memory_available_bytes: 200_000 << 10,
            net_rx_bytes: 1010,
            net_tx_bytes: 2020,
            disk_read_bytes: 51_200,
            disk_written_bytes: 102_400,
            load1_milli: 520,
            psi_memory_some_centipercent: Some(123),
            psi_cpu_some_centipercent: None,
            psi_io_some_centipercent: None,
        };
        assert_eq!(read_in(root.path()), expected);
    }

    #[test]
    fn a_guest_with_nothing_answers_zeros() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(read_in(root.path()), Usage::default());
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in "[a-z0-9 .:=\\n-]{0,200}") {
            let mut usage = Usage::default();
            for prefix in ["", "cpu ", "MemTotal:", "eth0:", "some avg10="] {
                let text = format!("{prefix}{text}");
                cpu(&text, &mut usage);
                memory(&text, &mut usage);
                network(&text, &mut usage);
                disks(&text, |_| true, &mut usage);
                pressure(&text);
                thousandths(&text);
            }
        }
    }
}
