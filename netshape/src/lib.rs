//! Network mechanism of Lathe: bridge, tap, rates, sources, uplink, NAT. Over rtnetlink and the tun ioctls; NAT by `nft`.
//!
//! No policy (which rate, which address: the agent's business) and no runtime of its own: the async functions run on
//! the caller's tokio. **The kernel is the state**: every `ensure` finds what is there, changes only what differs, and
//! gives the same result the second time, so an agent that was killed half-way simply asks again.
//!
//! ```text
//!              ┌───────────── host ───────────────────────────────────────────┐
//!  guest ◄──►  tap lt-web  ── root qdisc: HTB 1:1 (rate to the guest) + leaf  │
//!              │    └─ clsact ingress: bpf refuses forged sources             │
//!              │             ─► mark of the machine ─► mirred redirect        │
//!              │             li-web (ifb) ── root qdisc: HTB 1:1 (rate from   │
//!              │    ┌──────────────┘ the guest) + leaf; then back to the tap  │
//!              │  bridge lathe0, addresses, NAT in nftables table `lathe`     │
//!              │    └─► uplink ── opt-in: HTB 1a7e:, a class per mark + leaf  │ ─► world
//!              └──────────────────────────────────────────────────────────────┘
//! ```
//!
//! | file | what |
//! |---|---|
//! | [`bridge`], [`tap`], [`port`] | the host's bridge; a tap's queue; a machine's place on the bridge |
//! | [`spoof`], [`mark`], `ingress` | whose addresses a machine may use; whose its packets are; the order of a tap's filters |
//! | [`shape`], [`uplink`], `htb` | rates in both directions, in place, and what went through; sharing of the uplink; both |
//! | [`nat`], [`guard`], `nft` | masquerading and published ports; which services of the host machines reach; both |
//! | [`watch`] | that somebody has changed nftables |
//! | [`rate`], [`name`], [`addr`] | amounts, interface names, addresses |
//! | [`codec`], `cbpf` | what netlink-packet-route lacks of traffic control; an assembler of classic BPF |
//! | `netlink` | the only folder that knows rtnetlink |
//!
//! Unsafe code is in `tap` only.

#![deny(unsafe_code)]

pub mod addr;
pub mod bridge;
mod cbpf;
pub mod codec;
mod error;
pub mod guard;
mod htb;
mod ingress;
pub mod mark;
pub mod name;
pub mod nat;
mod netlink;
mod nft;
pub mod port;
pub mod rate;
pub mod shape;
pub mod spoof;
#[allow(unsafe_code, reason = "the tun ioctls")]
pub mod tap;
pub mod uplink;
pub mod watch;

pub use addr::{Mac, Prefix, mac_for};
pub use bridge::Bridge;
pub use error::{Error, Outcome};
pub use guard::{HostGuard, Service};
pub use mark::Marking;
pub use name::IfName;
pub use nat::{Nat, Proto, Publish};
pub use netlink::Netlink;
pub use nft::NatError;
pub use port::{FoundLink, LinkKind, LinkStats, Network, Port, PortFd, PortSpec};
pub use rate::{BitRate, Patch, RatePatch};
pub use shape::{Applied, Direction, Shaping, ShapingState};
pub use spoof::{AntiSpoof, AntiSpoofState};
pub use tap::{Tap, TapError};
pub use uplink::{
    ClassSpec, ClassState, FqCodelOptions, RootQueue, Uplink, UplinkClass, UplinkSpec, UplinkState,
};
pub use watch::RulesWatch;
