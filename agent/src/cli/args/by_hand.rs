//! Options of `lathe forecast` by which people say what is ahead.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use lathe_shard::{BitRate, Bytes, Change, Iops, MilliCpu, ParseAmountError};

use crate::api::wire::by_hand::Raise;

/// What people say, and what goes on inside.
#[derive(Debug, Default, Args)]
pub struct ByHandArgs {
    /// Show the applications inside instead, those that ask for most first, and how their goals stand, as its guest agent tells them
    #[arg(long)]
    pub apps: bool,
    /// Say by hand what it will ask for, in place of what is forecast: CSV with the columns from, until, resource, p95 and, if wanted, p50 and
    /// p99, or the same as JSON: {"confidence": 0.9, "steps": [{"from": …}]}. Times are HH:MM, which is daily, or 2026-11-24T18:00, in UTC
    /// unless they end with +01:00; amounts are written as everywhere (0.5, 512M, 40mbit, 300iops). `-` is the standard input
    #[arg(long, value_name = "FILE|-", conflicts_with_all = ["unset", "event", "remove_event", "apps"])]
    pub set: Option<PathBuf>,
    /// Take back what was said with --set
    #[arg(long, conflicts_with_all = ["event", "remove_event", "apps"])]
    pub unset: bool,
    /// Announce an event: "18:00 sale", "daily 18:00 sale", "2026-11-24 18:00 sale" or "now sale", in UTC unless the time ends with +01:00. Without
    /// an amount all that is measured is raised to the most of the last 30 days. One of the same name is replaced
    #[arg(long, value_name = "[daily|DATE] TIME NAME", conflicts_with_all = ["remove_event", "apps"])]
    pub event: Option<String>,
    /// With --event: how long it is, to 31d, a daily one to 24h [default: 1h]
    #[arg(long = "for", value_name = "TIME", requires = "event", value_parser = super::time)]
    pub for_time: Option<Duration>,
    /// With --event: CPUs: +100% or x2 of what it asked for in the hour before, +1 more, or 2 in all
    #[arg(long, value_name = "CHANGE", requires = "event", value_parser = cpu)]
    pub cpu: Option<Raise>,
    /// With --event: memory: +100%, x2, +512M, 2G
    #[arg(long, value_name = "CHANGE", requires = "event", value_parser = memory)]
    pub memory: Option<Raise>,
    /// With --event: bandwidth of its nic net0: +100%, x2, +20mbit, 40mbit
    #[arg(long, value_name = "CHANGE", requires = "event", value_parser = net)]
    pub net: Option<Raise>,
    /// With --event: I/O operations per second of all its disks: +100%, x2, +100iops, 300iops
    #[arg(long, value_name = "CHANGE", requires = "event", value_parser = iops)]
    pub iops: Option<Raise>,
    /// Take an event back
    #[arg(long, value_name = "NAME", conflicts_with = "apps")]
    pub remove_event: Option<String>,
}

fn cpu(text: &str) -> Result<Raise, String> {
    raise(text, |cpu: &MilliCpu| cpu.0)
}

fn memory(text: &str) -> Result<Raise, String> {
    raise(text, |memory: &Bytes| memory.0)
}

fn net(text: &str) -> Result<Raise, String> {
    raise(text, |rate: &BitRate| rate.0)
}

fn iops(text: &str) -> Result<Raise, String> {
    raise(text, |iops: &Iops| iops.0)
}

fn raise<T>(text: &str, of: impl Fn(&T) -> u64) -> Result<Raise, String>
where
    T: std::str::FromStr<Err = ParseAmountError>,
{
    if let Some(times) = text.strip_prefix(['x', '×']) {
        let wrong = || format!("{text} is no factor: write x2 or x1.5");
        let milli = times.parse::<MilliCpu>().map_err(|_| wrong())?.0;
        let more = milli.checked_sub(1000).ok_or_else(|| format!("{text} is less: an event only raises"))?;
        return u32::try_from(more.saturating_mul(10)).map(Raise::UpCentipercent).map_err(|_| wrong());
    }
    match text.parse::<Change<T>>().map_err(|error| error.to_string())? {
        Change::To(to) => Ok(Raise::To(of(&to))),
        Change::Up(by) => Ok(Raise::Up(of(&by))),
        Change::Percent { up: true, centipercent } => Ok(Raise::UpCentipercent(centipercent)),
        Change::Down(_) | Change::Percent { up: false, .. } => {
            Err(format!("{text} is less: an event only raises"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn raises_are_percent_factors_or_amounts() {
        assert_eq!(cpu("+100%"), Ok(Raise::UpCentipercent(10_000)));
        assert_eq!(
            [cpu("x2"), cpu("×1.5")],
            [Ok(Raise::UpCentipercent(10_000)), Ok(Raise::UpCentipercent(5000))]
        );
        assert_eq!((cpu("+1"), memory("2G")), (Ok(Raise::Up(1000)), Ok(Raise::To(2 << 30))));
        assert_eq!((net("+20mbit"), iops("300iops")), (Ok(Raise::Up(20_000_000)), Ok(Raise::To(300))));
        for bad in ["-1", "-10%", "x0.5", "x", "x99999999", "50%", ""] {
            assert!(cpu(bad).is_err(), "{bad}");
        }
    }
}
