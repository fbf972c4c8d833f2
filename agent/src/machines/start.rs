//! How the core begins: store, books, launcher, network, then every machine that was there before.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::sync::oneshot;

use super::actor::{Actor, Ask};
use super::config::{CoreConfig, LauncherKind};
use super::core::{Core, Parts};
use super::life::Life;
use super::record::Record;
use super::{files, foresee, relief, sample, sculpt, uplink};
use crate::host::Probe;
use crate::host::books::{Books, Reserve};
use crate::launcher::Launcher;
use crate::launcher::direct::DirectLauncher;
use crate::launcher::systemd::SystemdLauncher;
use crate::network::Ports;
use crate::network::ports::KernelPorts;
use crate::network::uplinks::{KernelUplinks, Uplinks};
use crate::problem::Problem;
use crate::store::{Change, Contents, Store};

/// Opens everything and finds every machine again.
///
/// # Errors
/// `store`, `internal`.
pub(super) async fn start(config: CoreConfig) -> Result<Arc<Core>, Problem> {
    let launcher: Box<dyn Launcher> = match &config.launcher {
        LauncherKind::Systemd => Box::new(SystemdLauncher::connect(config.control_dir()).await?),
        LauncherKind::Direct { cgroup } => {
            Box::new(DirectLauncher::new(config.monitor_binary.clone(), config.control_dir(), cgroup.clone()))
        }
    };
    let ports: Option<Box<dyn Ports>> = match &config.network {
        Some(network) => Some(Box::new(KernelPorts::connect(network.clone())?)),
        None => None,
    };
    let uplinks = Box::new(KernelUplinks::connect()?);
    start_with(config, launcher, ports, uplinks, PathBuf::from("/dev/kvm")).await
}

/// The same with other hands.
pub(super) async fn start_with(
    config: CoreConfig,
    launcher: Box<dyn Launcher>,
    ports: Option<Box<dyn Ports>>,
    uplinks: Box<dyn Uplinks>,
    kvm: PathBuf,
) -> Result<Arc<Core>, Problem> {
    for folder in ["machines", "uploads", "kept", "boot"] {
        make_folder(&config.state_dir.join(folder))?;
    }
    make_folder(&config.runtime_dir.join("machines"))?;
    let (store, mut contents) = Store::open(&config.state_dir)?;
    let probe = Probe::new("/", &config.state_dir);
    let boot_id = probe.boot_id()?;
    let kernel_release = probe.kernel_release()?;
    let books = books(&config, &probe, &contents)?;
    let reboot = contents.boot_id.as_ref().is_some_and(|earlier| *earlier != boot_id);
    let core = Core::new(Parts {
        config,
        launcher,
        ports,
        uplinks,
        store,
        probe,
        books,
        boot_id,
        kernel_release,
        kvm,
    });
    if let Some(ports) = &core.ports {
        // Machines without network must not suffer from a host that cannot have one.
        if let Err(problem) = ports.prepare().await {
            tracing::error!(%problem, "the machines' network is not ready");
        }
    }
    uplink::begin(&core, contents.uplink.take()).await;
    remove_strays(&core, &contents).await;
    let pasts = std::mem::take(&mut contents.pasts);
    resume_all(&core, contents, reboot).await;
    foresee::restore(&core, pasts);
    uplink::look(&core).await;
    // Only now: a crash in between must still know that the host has booted.
    core.store.apply(Change::Fact("boot_id", core.boot_id.clone())).await?;
    tokio::spawn(sample::run(Arc::clone(&core)));
    tokio::spawn(uplink::run(Arc::clone(&core)));
    tokio::spawn(foresee::run(Arc::clone(&core)));
    tokio::spawn(relief::run(Arc::clone(&core)));
    tokio::spawn(sculpt::run(Arc::clone(&core)));
    let network = Arc::clone(&core);
    tokio::spawn(async move {
        if let Some(ports) = &network.ports {
            ports.keep().await;
        }
    });
    Ok(core)
}

fn make_folder(folder: &Path) -> Result<(), Problem> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .map_err(|cause| Problem::internal(format!("cannot make {}", folder.display()), cause))
}

/// The books before the first decision: what every stored machine may hold.
fn books(config: &CoreConfig, probe: &Probe, contents: &Contents) -> Result<Books, Problem> {
    let capacity = probe.capacity()?;
    let occupied = probe.consumption()?.disk_bytes.saturating_sub(occupied_by_machines(config));
    // What others have on the file system already is not ours to give.
    let disk_bytes = config.reserve.disk_bytes.saturating_add(occupied);
    let mut books = Books::new(capacity, Reserve { disk_bytes, ..config.reserve }, config.overcommit);
    books.set_topology(probe.topology(&probe.online()?, None));
    for record in &contents.machines {
        books.enter(&record.name, record.booking());
    }
    books.set_net(uplink::booked(contents.uplink.as_ref()));
    Ok(books)
}

/// Bytes really occupied by machines' folders.
fn occupied_by_machines(config: &CoreConfig) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let folders = fs::read_dir(config.state_dir.join("machines")).into_iter().flatten().flatten();
    let files = folders.flat_map(|folder| fs::read_dir(folder.path()).into_iter().flatten().flatten());
    files.filter_map(|file| file.metadata().ok()).map(|metadata| metadata.blocks() * 512).sum()
}

/// Names of what is in a folder, less `suffix`.
fn names_in(folder: &Path, suffix: &str) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    names.filter_map(|name| name.strip_suffix(suffix).map(str::to_owned)).collect()
}

/// Removes what belongs to no machine: remains of a removal that was cut off.
async fn remove_strays(core: &Core, contents: &Contents) {
    let known: BTreeSet<&str> = contents.machines.iter().map(|record| record.name.as_str()).collect();
    for name in names_in(&core.config.control_dir(), ".sock") {
        if !known.contains(name.as_str()) && super::spec::check_name(&name).is_ok() {
            report(&name, "monitor", core.launcher.end(&name).await);
        }
    }
    for folder in [core.config.state_dir.join("machines"), core.config.runtime_dir.join("machines")] {
        for name in names_in(&folder, "") {
            if !known.contains(name.as_str()) {
                report(&name, "folder", files::remove_folder(&folder.join(&name)));
            }
        }
    }
    let Some(ports) = &core.ports else { return };
    let taps: BTreeSet<&str> =
        contents.machines.iter().flat_map(Record::all_nics).map(|nic| nic.tap.as_str()).collect();
    for tap in ports.list().await.unwrap_or_default() {
        if !taps.contains(tap.as_str()) {
            report(&tap, "tap", ports.remove(&tap).await);
        }
    }
}

fn report(name: &str, what: &str, result: Result<(), Problem>) {
    match result {
        Ok(()) => tracing::info!(name, what, "removed something that belonged to no machine"),
        Err(problem) => tracing::warn!(name, what, %problem, "cannot remove what belongs to no machine"),
    }
}

/// Starts the task of every stored machine, and waits until each has decided how to go on.
async fn resume_all(core: &Arc<Core>, contents: Contents, reboot: bool) {
    let mut decisions = Vec::new();
    for record in contents.machines {
        // A row of a machine that is gone is never written; if one were, there would be nothing to do.
        if record.life == Life::Gone {
            continue;
        }
        let (entry, asks) = core.new_entry(record);
        core.add(Arc::clone(&entry));
        Actor::spawn(Arc::clone(core), Arc::clone(&entry), asks, Vec::new());
        let (decided, decision) = oneshot::channel();
        if entry.asks.send(Ask::Resume { reboot, decided }).await.is_ok() {
            decisions.push(decision);
        }
    }
    for decision in decisions {
        // An actor that ended has decided as well.
        let _ = decision.await;
    }
}
