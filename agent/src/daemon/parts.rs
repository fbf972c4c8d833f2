//! The configuration, turned into what each part of lathed wants.

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::sync::Arc;

use crate::config::{Config, Launcher};
use crate::machines::{CoreConfig, ImageSource, LauncherKind, NetworkConfig, Overcommit, Reserve};
use crate::peer::PeerConfig;
use crate::problem::Problem;

/// Name of this host: the configured one, otherwise its own, in lower case.
///
/// # Errors
/// `internal` when the kernel's name is not text.
pub fn host_name(config: &Config) -> Result<String, Problem> {
    let name = match &config.host.name {
        Some(name) => name.clone(),
        None => {
            let name =
                nix::unistd::gethostname().map_err(|error| Problem::internal("the host's name", error))?;
            name.into_string()
                .map_err(|name| Problem::internal("the host's name", format!("{name:?} is not text")))?
        }
    };
    Ok(name.to_ascii_lowercase())
}

/// What the machines want.
///
/// # Errors
/// As [`host_name`].
pub fn core_config(config: &Config, images: Arc<dyn ImageSource>) -> Result<CoreConfig, Problem> {
    let network = config.network.enabled.then(|| NetworkConfig {
        bridge: config.network.bridge.clone(),
        ipv4: config.network.ipv4,
        ipv6: config.network.ipv6,
        nat: config.network.nat,
        isolated: config.network.isolated,
        check_sources: config.network.check_sources,
        guard_host: config.network.guard_host,
        host_services: config.network.host_services.clone(),
    });
    Ok(CoreConfig {
        state_dir: config.host.state_dir.clone(),
        runtime_dir: config.host.runtime_dir.clone(),
        host_name: host_name(config)?,
        launcher: launcher(config, sd_notify::booted().unwrap_or(false)),
        monitor_binary: config.machines.monitor.clone(),
        guest_binary: config.machines.guest.clone(),
        kernel: config.machines.kernel.clone(),
        modules_root: config.machines.modules_root.clone(),
        network,
        reserve: Reserve {
            cpu_milli: config.reserve.cpu.0,
            memory_bytes: config.reserve.memory.0,
            disk_bytes: config.reserve.disk.0,
        },
        overcommit: Overcommit {
            cpu_permille: config.overcommit.cpu_permille.into(),
            memory_permille: config.overcommit.memory_permille.into(),
            disk_permille: config.overcommit.disk_permille.into(),
        },
        allowed_disks: config.allowed_disks.clone(),
        foresight: config.foresight,
        images,
    })
}

/// Who starts monitors, on a host that systemd has booted or not.
fn launcher(config: &Config, booted_by_systemd: bool) -> LauncherKind {
    match (config.host.launcher, booted_by_systemd) {
        (Launcher::Systemd, _) | (Launcher::Auto, true) => LauncherKind::Systemd,
        (Launcher::Direct, _) | (Launcher::Auto, false) => {
            LauncherKind::Direct { cgroup: config.host.direct_cgroup.clone() }
        }
    }
}

/// What gossip wants.
///
/// # Errors
/// As [`host_name`].
pub fn peer_config(config: &Config) -> Result<PeerConfig, Problem> {
    let mut peers = PeerConfig::new(host_name(config)?);
    peers.listen = config.cluster.listen;
    peers.advertise = config.cluster.advertise;
    peers.region.clone_from(&config.cluster.region);
    Ok(peers)
}

/// Makes the folders that systemd makes where it runs.
///
/// # Errors
/// `state-dir`.
pub fn make_folders(config: &Config) -> Result<(), Problem> {
    for (folder, mode) in [(&config.host.state_dir, 0o700), (&config.host.runtime_dir, 0o755)] {
        DirBuilder::new().recursive(true).mode(mode).create(folder).map_err(|error| {
            Problem::new(
                crate::problem::Kind::Internal,
                "state-dir",
                format!("{}: {error}", folder.display()),
            )
            .fix("sudo systemd-tmpfiles --create lathe.conf")
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::foresight::Mode;
    use crate::machines::NoImages;

    #[test]
    fn the_launcher_follows_the_host_unless_it_is_configured() {
        let mut config = Config::default();
        let direct = LauncherKind::Direct { cgroup: None };
        assert_eq!(
            (launcher(&config, true), launcher(&config, false)),
            (LauncherKind::Systemd, direct.clone())
        );
        config.host.launcher = Launcher::Direct;
        assert_eq!(launcher(&config, true), direct);
        config.host.launcher = Launcher::Systemd;
        assert_eq!(launcher(&config, false), LauncherKind::Systemd);
    }

    #[test]
    fn what_is_configured_reaches_the_parts() {
        let mut config = Config::default();
        config.host.name = Some("Web-03".to_owned());
        config.reserve.cpu = lathe_shard::MilliCpu(700);
        config.cluster.region = "attic".to_owned();
        config.foresight.mode = Mode::Off;
        let core = core_config(&config, Arc::new(NoImages)).unwrap();
        assert_eq!((core.host_name.as_str(), core.reserve.cpu_milli), ("web-03", 700));
        assert_eq!((core.network.unwrap().bridge.as_str(), core.foresight.mode), ("lathe0", Mode::Off));
        let peers = peer_config(&config).unwrap();
        assert_eq!((peers.name.as_str(), peers.region.as_str()), ("web-03", "attic"));
        config.network.enabled = false;
        assert!(core_config(&config, Arc::new(NoImages)).unwrap().network.is_none());
    }
}
