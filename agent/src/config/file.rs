//! One configuration file: what may stand in it, each value checked as it is read. `None` means not set here.

use std::fmt::Display;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use lathe_netshape::{Prefix, Service};
use lathe_shard::{Bytes, MilliCpu};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

use super::{Api, Cluster, Config, ConfigError, Host, Launcher, Machines, Network, Overcommit, Reserve};
use crate::foresight::{self, MAX_AGGRESSIVENESS, Mode};

/// Longest a machine may take to power off when the host goes down; the units' `TimeoutStopSec` is above it.
const MAX_SHUTDOWN_TIMEOUT_SEC: u32 = 300;
/// Longest region name, in bytes: it travels in every advert.
const MAX_REGION_BYTES: usize = 32;
/// Rules that every packet to the host is held against.
const MAX_SERVICES: usize = 64;

/// Every shard promised once.
const MIN_FACTOR_PERMILLE: u32 = 1000;
/// Most machines that share a shard; beyond that it is a mistake.
const MAX_FACTOR_PERMILLE: u32 = 16_000;

/// Declares a section whose fields are all optional, and how a later file overrides it.
macro_rules! section {
    ($name:ident { $($field:ident : $type:ty $(, $with:literal)?;)* }) => {
        #[derive(Clone, Debug, Default, Deserialize)]
        #[serde(default, deny_unknown_fields)]
        pub(super) struct $name {
            $($(#[serde(deserialize_with = $with)])? $field: Option<$type>,)*
        }

        impl $name {
            fn overridden_by(self, later: Self) -> Self {
                Self { $($field: later.$field.or(self.$field),)* }
            }
        }
    };
}

section!(HostFile {
    name: String, "host_name";
    state_dir: PathBuf, "absolute";
    runtime_dir: PathBuf, "absolute";
    launcher: Launcher, "launcher";
    direct_cgroup: PathBuf, "absolute_or_empty";
});
section!(ApiFile {
    socket: PathBuf, "absolute";
    group: String, "not_empty";
    view_group: String, "not_empty";
});
section!(ReserveFile {
    cpu: MilliCpu, "parsed";
    memory: Bytes, "parsed";
    disk: Bytes, "parsed";
});
section!(OvercommitFile {
    cpu: u32, "factor";
    memory: u32, "factor";
    disk: u32, "factor";
});
section!(NetworkFile {
    enabled: bool;
    bridge: String, "link_name";
    ipv4: Prefix, "ipv4_prefix";
    ipv6: Option<Prefix>, "ipv6_prefix";
    nat: bool;
    isolated: bool;
    check_sources: bool;
    guard_host: bool;
    host_services: Vec<Service>, "services";
});
section!(DisksFile { allowed: Vec<PathBuf>, "all_absolute"; });
section!(MachinesFile {
    kernel: PathBuf, "absolute_or_empty";
    shutdown_timeout_sec: u32, "shutdown_timeout";
    monitor: PathBuf, "absolute";
    guest: PathBuf, "absolute";
    modules_root: PathBuf, "absolute";
});
section!(ForesightFile {
    mode: Mode, "foresight_mode";
    aggressiveness: u16, "aggressiveness";
});
section!(ClusterFile {
    listen: SocketAddr, "parsed";
    advertise: Option<IpAddr>, "parsed_or_empty";
    region: String, "region";
});
section!(LogFile { level: String, "not_empty"; });

/// One file, or several merged.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct File {
    host: HostFile,
    api: ApiFile,
    reserve: ReserveFile,
    overcommit: OvercommitFile,
    network: NetworkFile,
    disks: DisksFile,
    machines: MachinesFile,
    foresight: ForesightFile,
    cluster: ClusterFile,
    log: LogFile,
}

impl File {
    /// What `later` sets counts.
    pub(super) fn overridden_by(self, later: Self) -> Self {
        Self {
            host: self.host.overridden_by(later.host),
            api: self.api.overridden_by(later.api),
            reserve: self.reserve.overridden_by(later.reserve),
            overcommit: self.overcommit.overridden_by(later.overcommit),
            network: self.network.overridden_by(later.network),
            disks: self.disks.overridden_by(later.disks),
            machines: self.machines.overridden_by(later.machines),
            foresight: self.foresight.overridden_by(later.foresight),
            cluster: self.cluster.overridden_by(later.cluster),
            log: self.log.overridden_by(later.log),
        }
    }

    /// With the defaults, which `systemd/lathe.toml` repeats for people.
    pub(super) fn merged(self) -> Config {
        let not_empty = |path: PathBuf| (!path.as_os_str().is_empty()).then_some(path);
        let or_path = |path: Option<PathBuf>, default: &str| path.unwrap_or_else(|| default.into());
        let or_text = |text: Option<String>, default: &str| text.unwrap_or_else(|| default.to_owned());
        Config {
            host: Host {
                name: self.host.name.filter(|name| !name.is_empty()),
                state_dir: or_path(self.host.state_dir, "/var/lib/lathe"),
                runtime_dir: or_path(self.host.runtime_dir, "/run/lathe"),
                launcher: self.host.launcher.unwrap_or(Launcher::Auto),
                direct_cgroup: self.host.direct_cgroup.and_then(not_empty),
            },
            api: Api {
                socket: or_path(self.api.socket, "/run/lathe/lathe.sock"),
                group: or_text(self.api.group, "lathe"),
                view_group: or_text(self.api.view_group, "lathe-view"),
            },
            reserve: Reserve {
                cpu: self.reserve.cpu.unwrap_or(MilliCpu(250)),
                memory: self.reserve.memory.unwrap_or(Bytes(512 << 20)),
                disk: self.reserve.disk.unwrap_or(Bytes(1 << 30)),
            },
            overcommit: Overcommit {
                cpu_permille: self.overcommit.cpu.unwrap_or(MIN_FACTOR_PERMILLE),
                memory_permille: self.overcommit.memory.unwrap_or(MIN_FACTOR_PERMILLE),
                disk_permille: self.overcommit.disk.unwrap_or(MIN_FACTOR_PERMILLE),
            },
            network: Network {
                enabled: self.network.enabled.unwrap_or(true),
                bridge: or_text(self.network.bridge, "lathe0"),
                ipv4: self.network.ipv4.unwrap_or(Prefix { addr: IpAddr::from([10, 127, 0, 1]), len: 16 }),
                ipv6: self.network.ipv6.flatten(),
                nat: self.network.nat.unwrap_or(true),
                isolated: self.network.isolated.unwrap_or(false),
                check_sources: self.network.check_sources.unwrap_or(true),
                guard_host: self.network.guard_host.unwrap_or(true),
                host_services: self.network.host_services.unwrap_or_default(),
            },
            allowed_disks: self.disks.allowed.unwrap_or_default(),
            machines: Machines {
                kernel: self.machines.kernel.and_then(not_empty),
                shutdown_timeout_sec: self.machines.shutdown_timeout_sec.unwrap_or(60),
                monitor: or_path(self.machines.monitor, "/usr/lib/lathe/lathe-vmm"),
                guest: or_path(self.machines.guest, "/usr/lib/lathe/lathe-guest"),
                modules_root: or_path(self.machines.modules_root, "/lib/modules"),
            },
            foresight: foresight::Settings {
                mode: self.foresight.mode.unwrap_or_default(),
                aggressiveness_permille: self
                    .foresight
                    .aggressiveness
                    .unwrap_or(foresight::Settings::default().aggressiveness_permille),
            },
            cluster: Cluster {
                listen: self.cluster.listen.unwrap_or_else(|| SocketAddr::from(([0, 0, 0, 0], 7946))),
                advertise: self.cluster.advertise.flatten(),
                region: self.cluster.region.unwrap_or_default(),
            },
            log_level: or_text(self.log.level, "info"),
        }
    }
}

/// Reads one file's text.
pub(super) fn parse(path: &Path, text: &str) -> Result<File, ConfigError> {
    toml::from_str(text).map_err(|error| {
        let offset = error.span().map_or(0, |span| span.start).min(text.len());
        let line = text.as_bytes()[..offset].iter().filter(|&&byte| byte == b'\n').count() + 1;
        ConfigError::Wrong { path: path.to_owned(), line, message: explained(error.message()) }
    })
}

/// Turns serde's sentence about an unknown key into ours.
fn explained(message: &str) -> String {
    match crate::nearest::unknown_field(message) {
        Some(unknown) => unknown.sentence("key"),
        None => message.replace('\n', "; ").replace('`', "\""),
    }
}

fn text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let text = String::deserialize(deserializer)?;
    if text.contains('\0') { Err(D::Error::custom("a zero byte in a text")) } else { Ok(text) }
}

fn parsed<'de, D: Deserializer<'de>, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    T: FromStr,
    T::Err: Display,
{
    let text = text(deserializer)?;
    text.parse().map(Some).map_err(|error: T::Err| D::Error::custom(format!("\"{text}\": {error}")))
}

#[expect(clippy::option_option, reason = "set to nothing differs from not set")]
fn parsed_or_empty<'de, D: Deserializer<'de>, T>(deserializer: D) -> Result<Option<Option<T>>, D::Error>
where
    T: FromStr,
    T::Err: Display,
{
    let text = text(deserializer)?;
    if text.is_empty() {
        return Ok(Some(None));
    }
    text.parse()
        .map(|value| Some(Some(value)))
        .map_err(|error: T::Err| D::Error::custom(format!("\"{text}\": {error}")))
}

fn checked<'de, D: Deserializer<'de>>(
    deserializer: D,
    rule: &str,
    holds: impl Fn(&str) -> bool,
) -> Result<Option<String>, D::Error> {
    let text = text(deserializer)?;
    if holds(&text) { Ok(Some(text)) } else { Err(D::Error::custom(format!("\"{text}\": {rule}"))) }
}

fn not_empty<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    checked(deserializer, "must not be empty", |text| !text.is_empty())
}

fn host_name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    checked(
        deserializer,
        "must be at most 63 of a-z, 0-9, '-' and '.', beginning with a letter or digit",
        |text| {
            let known = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'.';
            text.is_empty()
                || (text.len() <= 63 && text.bytes().all(known) && text.as_bytes()[0].is_ascii_alphanumeric())
        },
    )
}

fn link_name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    checked(deserializer, "must be a link's name: 1 to 15 of letters, digits, '-', '_' and '.'", |text| {
        let known = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        (1..=15).contains(&text.len()) && text.bytes().all(known) && text != "." && text != ".."
    })
}

fn region<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    checked(deserializer, "must be at most 32 bytes", |text| text.len() <= MAX_REGION_BYTES)
}

fn absolute<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<PathBuf>, D::Error> {
    Ok(checked(deserializer, "must be an absolute path", is_absolute)?.map(PathBuf::from))
}

fn absolute_or_empty<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<PathBuf>, D::Error> {
    let holds = |text: &str| text.is_empty() || is_absolute(text);
    Ok(checked(deserializer, "must be an absolute path or empty", holds)?.map(PathBuf::from))
}

fn all_absolute<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<PathBuf>>, D::Error> {
    let paths = Vec::<String>::deserialize(deserializer)?;
    match paths.iter().find(|path| !is_absolute(path)) {
        Some(path) => Err(D::Error::custom(format!("\"{path}\": must be an absolute path"))),
        None => Ok(Some(paths.into_iter().map(PathBuf::from).collect())),
    }
}

fn services<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<Service>>, D::Error> {
    let texts = Vec::<String>::deserialize(deserializer)?;
    if texts.len() > MAX_SERVICES {
        return Err(D::Error::custom(format!("{} services: at most {MAX_SERVICES}", texts.len())));
    }
    texts.iter().map(|text| text.parse().map_err(D::Error::custom)).collect::<Result<_, _>>().map(Some)
}

fn is_absolute(text: &str) -> bool {
    text.starts_with('/') && !text.contains('\0') && !text.split('/').any(|part| part == "..")
}

fn launcher<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Launcher>, D::Error> {
    match text(deserializer)?.as_str() {
        "auto" => Ok(Some(Launcher::Auto)),
        "systemd" => Ok(Some(Launcher::Systemd)),
        "direct" => Ok(Some(Launcher::Direct)),
        other => Err(D::Error::custom(format!("\"{other}\": must be auto, systemd or direct"))),
    }
}

fn foresight_mode<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Mode>, D::Error> {
    match text(deserializer)?.as_str() {
        "off" => Ok(Some(Mode::Off)),
        "observe" => Ok(Some(Mode::Observe)),
        "on" => Ok(Some(Mode::On)),
        other => Err(D::Error::custom(format!("\"{other}\": must be off, observe or on"))),
    }
}

/// A number of at most three decimals, in thousandths.
fn aggressiveness<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u16>, D::Error> {
    let number = f64::deserialize(deserializer)?;
    let permille = (number * 1000.0).round();
    if !(0.0..=f64::from(MAX_AGGRESSIVENESS)).contains(&permille) {
        return Err(D::Error::custom(format!("{number}: must be 0.0 (careful) to 1.0 (close to demand)")));
    }
    // In that range, and whole.
    Ok(Some(permille as u16))
}

fn shutdown_timeout<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u32>, D::Error> {
    let seconds = i64::deserialize(deserializer)?;
    match u32::try_from(seconds) {
        Ok(seconds @ 1..=MAX_SHUTDOWN_TIMEOUT_SEC) => Ok(Some(seconds)),
        _ => Err(D::Error::custom(format!("{seconds} seconds: must be 1 to {MAX_SHUTDOWN_TIMEOUT_SEC}"))),
    }
}

/// A number of at most three decimals, in thousandths.
fn factor<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u32>, D::Error> {
    let number = f64::deserialize(deserializer)?;
    let permille = (number * 1000.0).round();
    let range = f64::from(MIN_FACTOR_PERMILLE)..=f64::from(MAX_FACTOR_PERMILLE);
    if !range.contains(&permille) {
        return Err(D::Error::custom(format!("{number}: must be 1.0 (nothing twice) to 16.0")));
    }
    // In that range, and whole.
    Ok(Some(permille as u32))
}

fn ipv4_prefix<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Prefix>, D::Error> {
    let prefix: Option<Prefix> = parsed(deserializer)?;
    match prefix {
        Some(Prefix { addr: IpAddr::V4(_), len }) if len > 30 => {
            Err(D::Error::custom(format!("a prefix of {len} bits has no room for machines: at most 30")))
        }
        Some(Prefix { addr: IpAddr::V6(addr), .. }) => Err(D::Error::custom(format!("{addr} is not IPv4"))),
        other => Ok(other),
    }
}

#[expect(clippy::option_option, reason = "set to nothing differs from not set")]
fn ipv6_prefix<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Option<Prefix>>, D::Error> {
    let prefix: Option<Option<Prefix>> = parsed_or_empty(deserializer)?;
    match prefix.flatten() {
        Some(Prefix { addr: IpAddr::V4(addr), .. }) => Err(D::Error::custom(format!("{addr} is not IPv6"))),
        other => Ok(Some(other)),
    }
}
