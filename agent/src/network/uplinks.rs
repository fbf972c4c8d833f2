//! The host's uplink as policy needs it: [`Uplinks`], and [`KernelUplinks`] over `lathe-netshape`.
//!
//! Which device, which rates, and when anything is retried is decided in `machines::uplink`.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use lathe_netshape::{
    ClassSpec, Error, IfName, Marking, Netlink, RootQueue, Uplink, UplinkClass, UplinkSpec, UplinkState,
};
use lathe_shard::BitRate;

use super::boxed;
use crate::launcher::Pending;
use crate::problem::{Kind, Problem};

/// Where the kernel tells a link's speed (`Documentation/ABI/testing/sysfs-class-net`, `speed`).
const LINKS: &str = "/sys/class/net";

/// Changes of classes: set, or remove.
pub type ClassChanges = BTreeMap<UplinkClass, Option<ClassSpec>>;

/// Links that can be shared between machines, and marks at machines' taps. See [`lathe_netshape::Uplink`].
///
/// Problems: `no-such-device`, `uplink-queue`, `uplink-replaced`, `net-over-capacity`, `bad-amount`, `bad-name`, `internal`.
pub trait Uplinks: Send + Sync {
    /// The device of the IPv4 default route.
    fn default_device(&self) -> Pending<'_, Result<Option<String>, Problem>>;
    /// Its speed in bit/s; `None` where the link does not tell, as virtual ones and those that are down do not.
    fn speed(&self, device: &str) -> Option<u64>;
    /// What is at the root; `None` if that is ours already.
    fn found<'a>(&'a self, device: &'a str) -> Pending<'a, Result<Option<RootQueue>, Problem>>;
    /// Shares the device, or changes its capacity in place; twice is once.
    fn enable<'a>(&'a self, device: &'a str, spec: UplinkSpec) -> Pending<'a, Result<(), Problem>>;
    /// Sets and removes classes; twice is once.
    fn apply<'a>(&'a self, device: &'a str, changes: &'a ClassChanges) -> Pending<'a, Result<(), Problem>>;
    /// What is in force.
    fn read<'a>(&'a self, device: &'a str) -> Pending<'a, Result<UplinkState, Problem>>;
    /// Puts back what was there; what somebody else has put there meanwhile stays.
    fn disable<'a>(&'a self, device: &'a str, before: &'a RootQueue) -> Pending<'a, Result<(), Problem>>;
    /// Marks everything that comes in at a tap; `None` marks nothing any more. A tap that is not there is `no-such-device`.
    fn mark<'a>(&'a self, tap: &'a str, mark: Option<u32>) -> Pending<'a, Result<(), Problem>>;
}

/// The host's kernel.
pub struct KernelUplinks {
    netlink: Netlink,
}

impl KernelUplinks {
    /// Connects to rtnetlink; needs CAP_NET_ADMIN for everything that changes something.
    ///
    /// # Errors
    /// `internal` when netlink is not there.
    pub fn connect() -> Result<Self, Problem> {
        let (netlink, connection) = Netlink::connect().map_err(problem)?;
        tokio::spawn(connection);
        Ok(Self { netlink })
    }
}

/// In the words of who shares an uplink.
fn problem(cause: Error) -> Problem {
    match cause {
        Error::NoLink(link) => {
            Problem::new(Kind::NotFound, "no-such-device", format!("this host has no network device {link}"))
                .fix("ip -br link")
        }
        Error::RootQueue { link, found } => {
            let message = format!("{link} has the queue {found}, which could not be put back later");
            Problem::new(Kind::Conflict, "uplink-queue", message)
                .detail("somebody shapes this device already; nothing was changed")
                .fix(format!(
                    "tc qdisc show dev {link}        and if nobody needs it: sudo tc qdisc del dev {link} root"
                ))
        }
        Error::NotShared(link) => {
            let message = format!("{link} is not shared any more: somebody has replaced its root queue");
            Problem::new(Kind::Conflict, "uplink-replaced", message).fix(replaced_fix(link.as_str()))
        }
        Error::Overbooked { link, asked, capacity } => {
            let (asked, capacity) = (BitRate(asked), BitRate(capacity));
            let message = format!("{asked} would be promised on {link}, whose capacity is {capacity}");
            Problem::new(Kind::Impossible, "net-over-capacity", message).fix("lathe host uplink show")
        }
        Error::Rate { asked, least, most } => {
            let [asked, least, most] = [asked, least, most].map(BitRate);
            Problem::new(Kind::BadRequest, "bad-amount", format!("{asked}: between {least} and {most}"))
        }
        Error::Name(name) => {
            let name: String = name.chars().take(64).collect();
            Problem::new(Kind::BadRequest, "bad-name", format!("{name:?} cannot be a network device's name"))
                .fix("ip -br link")
        }
        cause => Problem::internal("the uplink", cause).fix("lathe doctor"),
    }
}

/// What helps when somebody else's queue is where ours was.
pub fn replaced_fix(device: &str) -> String {
    format!("tc qdisc show dev {device}        then: lathe host uplink disable && lathe host uplink enable")
}

fn link(name: &str) -> Result<IfName, Problem> {
    IfName::new(name).map_err(problem)
}

/// Mbit/s as the kernel writes them, -1 where it does not know.
fn speed_of(text: &str) -> Option<u64> {
    text.trim().parse::<u64>().ok().filter(|mbit| *mbit > 0)?.checked_mul(1_000_000)
}

impl Uplinks for KernelUplinks {
    fn default_device(&self) -> Pending<'_, Result<Option<String>, Problem>> {
        boxed(async move {
            let device = Uplink::default_device(&self.netlink).await.map_err(problem)?;
            Ok(device.map(|device| device.to_string()))
        })
    }

    fn speed(&self, device: &str) -> Option<u64> {
        let device = IfName::new(device).ok()?;
        let file = Path::new(LINKS).join(device.as_str()).join("speed");
        speed_of(&fs::read_to_string(file).ok()?)
    }

    fn found<'a>(&'a self, device: &'a str) -> Pending<'a, Result<Option<RootQueue>, Problem>> {
        boxed(async move { Uplink::found(&self.netlink, &link(device)?).await.map_err(problem) })
    }

    fn enable<'a>(&'a self, device: &'a str, spec: UplinkSpec) -> Pending<'a, Result<(), Problem>> {
        boxed(
            async move { Uplink::enable(&self.netlink, &link(device)?, &spec).await.map(drop).map_err(problem) },
        )
    }

    fn apply<'a>(&'a self, device: &'a str, changes: &'a ClassChanges) -> Pending<'a, Result<(), Problem>> {
        boxed(async move {
            Uplink::apply(&self.netlink, &link(device)?, changes).await.map(drop).map_err(problem)
        })
    }

    fn read<'a>(&'a self, device: &'a str) -> Pending<'a, Result<UplinkState, Problem>> {
        boxed(async move { Uplink::read(&self.netlink, &link(device)?).await.map_err(problem) })
    }

    fn disable<'a>(&'a self, device: &'a str, before: &'a RootQueue) -> Pending<'a, Result<(), Problem>> {
        boxed(async move {
            Uplink::disable(&self.netlink, &link(device)?, before).await.map(drop).map_err(problem)
        })
    }

    fn mark<'a>(&'a self, tap: &'a str, mark: Option<u32>) -> Pending<'a, Result<(), Problem>> {
        boxed(async move {
            let tap = link(tap)?;
            let done = match mark {
                Some(mark) => Marking::ensure(&self.netlink, &tap, mark).await,
                None => Marking::remove(&self.netlink, &tap).await,
            };
            done.map(drop).map_err(problem)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_speed_is_told_in_mbit_or_not_at_all() {
        assert_eq!(speed_of("1000\n"), Some(1_000_000_000));
        for unknown in ["-1\n", "0", "", "fast"] {
            assert_eq!(speed_of(unknown), None, "{unknown:?}");
        }
    }

    #[test]
    fn somebody_elses_queue_is_named_with_what_helps() {
        let link = IfName::new("eth0").expect("a name");
        let problem = problem(Error::RootQueue { link, found: "cake 8001:".to_owned() });
        assert_eq!((problem.kind, problem.code), (Kind::Conflict, "uplink-queue"));
        assert!(
            problem.message.contains("cake 8001:") && problem.fix.contains("tc qdisc del dev eth0 root"),
            "{problem}"
        );
    }
}
