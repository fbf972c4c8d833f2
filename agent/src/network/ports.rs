//! [`Ports`] over `lathe-netshape`.

use std::os::fd::OwnedFd;
use std::time::Duration;

use lathe_netshape::{
    AntiSpoof, BitRate, Bridge, Direction, HostGuard, IfName, LinkKind, Mac, Nat, NatError, Netlink, Network,
    Patch, PortFd, PortSpec, Prefix, RatePatch, RulesWatch, Shaping, ShapingState,
};
use tokio::sync::Mutex;

use super::{NetworkConfig, PortBytes, PortLimited, PortQueue, PortQueues, PortState, Ports, boxed};
use crate::launcher::Pending;
use crate::problem::Problem;

/// The host's kernel.
pub struct KernelPorts {
    netlink: Netlink,
    bridge: IfName,
    config: NetworkConfig,
    /// What our table was when we had set it up. Whoever changes or looks at it has this locked.
    rules: Mutex<Option<String>>,
}

/// What fails when rules cannot be read.
const LIST: &str = "cannot read the rules of the machines' network";
/// How often rules are set until they stay.
const RULES_TRIES: usize = 5;
/// After a change of rules is heard of, until ours are looked at.
const RULES_SETTLE: Duration = Duration::from_millis(200);
/// After ours were put back, until they are looked at again.
const RULES_REST: Duration = Duration::from_secs(5);

fn failed(what: String) -> impl FnOnce(lathe_netshape::Error) -> Problem {
    move |cause| Problem::internal(what, cause)
}

fn link(tap: &str) -> Result<IfName, Problem> {
    IfName::new(tap).map_err(failed(format!("tap {tap}")))
}

impl KernelPorts {
    /// Connects to rtnetlink; needs CAP_NET_ADMIN for everything that changes something.
    ///
    /// # Errors
    /// `internal` when the bridge's name is bad or netlink is not there.
    pub fn connect(config: NetworkConfig) -> Result<Self, Problem> {
        let bridge = link(&config.bridge)?;
        let (netlink, connection) =
            Netlink::connect().map_err(failed("cannot reach rtnetlink".to_owned()))?;
        tokio::spawn(connection);
        Ok(Self { netlink, bridge, config, rules: Mutex::default() })
    }

    /// Nobody else's addresses come from this tap, if it is configured so.
    async fn check_sources(&self, tap: &IfName, mac: Mac, addresses: &[String]) -> Result<(), Problem> {
        let done = if self.config.check_sources {
            let own = addresses.iter().map(|address| own_address(address)).collect::<Result<Vec<_>, _>>()?;
            AntiSpoof::ensure(&self.netlink, tap, mac, &own).await
        } else {
            AntiSpoof::remove(&self.netlink, tap).await
        };
        done.map(drop).map_err(|cause| {
            let fix = "sudo modprobe cls_bpf; or set [network] check_sources = false";
            Problem::internal(format!("cannot check what {tap} sends"), cause).fix(fix)
        })
    }

    async fn make_bridge(&self) -> Result<(), Problem> {
        let prefixes = self.prefixes();
        let made = Bridge::ensure(&self.netlink, &self.bridge, &prefixes, None).await;
        made.map_err(failed(format!("cannot make bridge {}", self.bridge)))?;
        self.set_rules(&mut *self.rules.lock().await).await
    }

    fn prefixes(&self) -> Vec<Prefix> {
        [Some(self.config.ipv4), self.config.ipv6].into_iter().flatten().collect()
    }

    /// Sets the rules of our table, and takes in what it is then, where anything is configured that needs one.
    async fn set_rules(&self, rules: &mut Option<String>) -> Result<(), Problem> {
        let (bridge, prefixes, config) = (self.bridge.clone(), self.prefixes(), self.config.clone());
        let known = rules.clone();
        let set = move || {
            let nat = Nat::new();
            let set = || {
                if config.nat {
                    nat.ensure(&bridge, &prefixes).map_err(no_rules("cannot set up NAT"))?;
                }
                guard_host(&bridge, &config)
            };
            if !config.nat && !config.guard_host {
                return set().map(|()| None);
            }
            agreed(known, || set().and_then(|()| nat.rules().map_err(no_rules(LIST)))).map(Some)
        };
        let set = tokio::task::spawn_blocking(set).await;
        *rules = set.map_err(|cause| Problem::internal("cannot set up the machines' network", cause))??;
        Ok(())
    }

    /// Puts our rules back if they are no longer what they were; answers whether it had to.
    async fn mend_rules(&self) -> Result<bool, Problem> {
        let mut rules = self.rules.lock().await;
        let shown = tokio::task::spawn_blocking(|| Nat::new().rules().map_err(no_rules(LIST))).await;
        if shown.map_err(|cause| Problem::internal(LIST, cause))?? == *rules {
            return Ok(false);
        }
        self.set_rules(&mut rules).await?;
        Ok(true)
    }

    /// Looks at our rules whenever somebody has changed some.
    async fn keep_rules(&self) {
        if !self.config.nat && !self.config.guard_host {
            return;
        }
        let watch = match RulesWatch::new() {
            Ok(watch) => watch,
            Err(cause) => {
                return tracing::warn!(%cause, "rules that others take away from the nftables table inet lathe are not noticed");
            }
        };
        let mut trouble = String::new();
        loop {
            // Who loads a ruleset changes much at once; while changes cannot be heard of, it is looked all the same.
            let heard = watch.changed().await;
            tokio::time::sleep(if heard.is_ok() { RULES_SETTLE } else { RULES_REST }).await;
            let deaf = heard.err().map(|cause| format!("cannot hear of changes of nftables: {cause}"));
            let mended = self.mend_rules().await;
            if let Ok(true) = mended {
                tracing::warn!(
                    "somebody has changed the nftables table inet lathe, or removed it; its rules are back"
                );
            }
            let said = mended.as_ref().err().map(|problem| problem.to_string()).or(deaf).unwrap_or_default();
            // Said when it changes.
            if !said.is_empty() && said != trouble {
                tracing::error!("the rules of the machines' network are not as they should be: {said}");
            }
            trouble = said;
            if !matches!(mended, Ok(false)) {
                // Nobody fights over it more often than so.
                tokio::time::sleep(RULES_REST).await;
            }
        }
    }
}

/// Sets rules until what is there afterwards is what was there the time before, or what is `known` to be ours: who changes them in the moment
/// between would be believed otherwise.
fn agreed(
    known: Option<String>,
    mut set: impl FnMut() -> Result<Option<String>, Problem>,
) -> Result<String, Problem> {
    let mut before = known;
    for _ in 0..RULES_TRIES {
        let shown = set()?;
        if let Some(shown) = &shown
            && before.as_ref() == Some(shown)
        {
            return Ok(shown.clone());
        }
        before = shown;
    }
    let cause = format!("somebody changed them {RULES_TRIES} times while they were set");
    Err(Problem::internal("cannot set the rules of the machines' network", cause).fix("see: nft monitor"))
}

fn no_rules(what: &str) -> impl FnOnce(NatError) -> Problem {
    move |cause| Problem::internal(what, cause).fix("lathe doctor")
}

/// Machines reach of the host what is configured. Blocks.
fn guard_host(bridge: &IfName, config: &NetworkConfig) -> Result<(), Problem> {
    let guard = HostGuard::new();
    if config.guard_host {
        return guard.ensure(bridge, &config.host_services).map_err(|cause| {
            let fix = "sudo apt install nftables; or set [network] guard_host = false";
            Problem::internal("cannot keep machines from the host's services", cause).fix(fix)
        });
    }
    match guard.remove() {
        Ok(_) => Ok(()),
        // Without nft there are no rules either.
        Err(NatError::Run { .. }) if !config.nat => Ok(()),
        Err(cause) => Err(no_rules("cannot open the host's services to machines")(cause)),
    }
}

/// The machine's own of its network: `10.77.0.5/16` is one address, and the link it is on.
fn own_address(address: &str) -> Result<Prefix, Problem> {
    let prefix: Prefix = address.parse().map_err(failed(format!("address {address}")))?;
    Ok(Prefix { len: if prefix.addr.is_ipv4() { 32 } else { 128 }, ..prefix })
}

fn port_state(state: &ShapingState) -> PortState {
    PortState {
        to_guest: state.to_guest.rate.map(|rate| rate.0),
        from_guest: state.from_guest.rate.map(|rate| rate.0),
    }
}

impl Ports for KernelPorts {
    fn prepare(&self) -> Pending<'_, Result<(), Problem>> {
        boxed(self.make_bridge())
    }

    fn keep(&self) -> Pending<'_, ()> {
        Box::pin(self.keep_rules())
    }

    fn ensure<'a>(
        &'a self,
        tap: &'a str,
        mac: [u8; 6],
        addresses: &'a [String],
    ) -> Pending<'a, Result<Option<OwnedFd>, Problem>> {
        boxed(async move {
            let name = link(tap)?;
            let spec = PortSpec {
                tap: &name,
                bridge: &self.bridge,
                owner: None,
                mtu: None,
                guest_mac: Some(Mac(mac)),
                isolated: self.config.isolated,
            };
            let port = Network::ensure(&self.netlink, &spec).await;
            let port = port.map_err(failed(format!("cannot make tap {tap}")))?;
            // Before anybody can send.
            self.check_sources(&name, Mac(mac), addresses).await?;
            match port.fd {
                PortFd::Open(queue) => Ok(Some(queue)),
                PortFd::HeldElsewhere => Ok(None),
            }
        })
    }

    fn remove<'a>(&'a self, tap: &'a str) -> Pending<'a, Result<(), Problem>> {
        boxed(async move {
            let removed = Network::remove(&self.netlink, &link(tap)?).await;
            removed.map(|_| ()).map_err(failed(format!("cannot remove tap {tap}")))
        })
    }

    fn limit<'a>(&'a self, tap: &'a str, bit_per_sec: u64) -> Pending<'a, Result<PortLimited, Problem>> {
        boxed(async move {
            let patch = || if bit_per_sec == 0 { Patch::Unlimited } else { Patch::Set(BitRate(bit_per_sec)) };
            let patch = RatePatch { to_guest: patch(), from_guest: patch() };
            let applied = Shaping::apply_timed(&self.netlink, &link(tap)?, &patch).await;
            let applied = applied.map_err(failed(format!("cannot set the rate of tap {tap}")))?;
            Ok(PortLimited { state: port_state(&applied.state), since: applied.since })
        })
    }

    fn read<'a>(&'a self, tap: &'a str) -> Pending<'a, Result<PortState, Problem>> {
        boxed(async move {
            let state = Shaping::read(&self.netlink, &link(tap)?).await;
            state
                .map(|state| port_state(&state))
                .map_err(failed(format!("cannot read the rate of tap {tap}")))
        })
    }

    fn bytes<'a>(&'a self, tap: &'a str) -> Pending<'a, Result<PortBytes, Problem>> {
        boxed(async move {
            let stats = Network::stats(&self.netlink, &link(tap)?).await;
            let stats = stats.map_err(failed(format!("cannot read the counters of tap {tap}")))?;
            Ok(PortBytes { to_guest: stats.to_guest_bytes, from_guest: stats.from_guest_bytes })
        })
    }

    fn queues<'a>(&'a self, tap: &'a str) -> Pending<'a, Result<PortQueues, Problem>> {
        boxed(async move {
            let state = Shaping::read(&self.netlink, &link(tap)?).await;
            let state = state.map_err(failed(format!("cannot read the queues of tap {tap}")))?;
            let queue = |direction: Direction| {
                direction.rate.map(|_| PortQueue {
                    bytes: direction.bytes,
                    overlimits: direction.overlimits,
                    backlog_bytes: direction.backlog_bytes,
                })
            };
            Ok(PortQueues { to_guest: queue(state.to_guest), from_guest: queue(state.from_guest) })
        })
    }

    fn list(&self) -> Pending<'_, Result<Vec<String>, Problem>> {
        boxed(async move {
            let found = Network::list(&self.netlink).await.map_err(failed("cannot list taps".to_owned()))?;
            let taps = found.into_iter().filter(|link| matches!(link.kind, LinkKind::Tap));
            Ok(taps.map(|link| link.name.to_string()).collect())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_ours_when_they_are_the_same_twice() {
        let shows = |shown: &'static [Option<&'static str>]| {
            let mut shown = shown.iter();
            move || Ok(shown.next().expect("asked no further").map(str::to_owned))
        };
        let ours = || Some("ours".to_owned());
        assert_eq!(agreed(ours(), shows(&[Some("ours")])).unwrap(), "ours");
        assert_eq!(agreed(None, shows(&[Some("ours"), Some("ours")])).unwrap(), "ours");
        // Somebody was in between, at the first look and when it was known already.
        assert_eq!(agreed(None, shows(&[Some("theirs"), Some("ours"), Some("ours")])).unwrap(), "ours");
        assert_eq!(agreed(ours(), shows(&[Some("theirs"), Some("ours"), Some("ours")])).unwrap(), "ours");
        assert_eq!(agreed(ours(), shows(&[None, Some("ours"), Some("ours")])).unwrap(), "ours");
        let fights = [Some("1"), Some("2"), Some("3"), None, None];
        assert!(agreed(ours(), shows(Box::leak(Box::new(fights)))).is_err());
        assert!(agreed(None, || Err(Problem::internal("nft", "no"))).is_err());
    }
}
