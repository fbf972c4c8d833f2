//! lathed from its first second to its last: puts the parts together, speaks with systemd, ends in order.
//!
//! ```text
//! configuration ─▶ lock ─▶ socket ─▶ images ─▶ machines (adopts what runs) ─▶ peers ─▶ READY ─▶ tick … ─▶ shutdown
//!                                                                                    ▲
//!                     heartbeat of the control loop ─▶ watchdog;  SIGHUP, SIGTERM ───┘
//! ```
//!
//! - [`parts`]: configuration into what each part wants
//! - [`system`]: systemd: readiness, watchdog, status, whether the host goes down
//! - [`host_setup`]: `lathed host-setup`, what needs root once
//! - [`helper`]: `lathed helper …`, what units run
//!
//! The watchdog is fed from the control loop itself: when that stands still, systemd starts lathed anew, and machines run on.

pub mod helper;
pub mod host_setup;
pub mod parts;
pub mod system;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Semaphore, watch};

use crate::api::access::Access;
use crate::api::server::{self, Lock};
use crate::api::wire::HostResources;
use crate::api::{App, MAX_STREAMS};
use crate::config::Config;
use crate::doctor::HostDoctor;
use crate::images::{Images, Uploads, uploads};
use crate::machines::{Machines, Shutdown};
use crate::peer::{LocalShape, PeerHandle, PeerRuntime};
use crate::problem::Problem;

use self::system::Systemd;

/// How often the status line is written anew.
const STATUS_EVERY: Duration = Duration::from_secs(15);

/// Where a configuration is read from, once more when asked.
pub type Reload = Box<dyn Fn() -> Result<Config, String> + Send>;

/// Everything that runs.
struct Daemon {
    machines: Machines,
    peers: PeerHandle,
    uploads: Arc<Uploads>,
    config: Config,
    systemd: Systemd,
    _lock: Lock,
}

/// Runs lathed until it is told to end.
///
/// # Errors
/// What keeps it from starting.
pub async fn run(
    config: Config,
    reload: Reload,
    set_log_level: impl Fn(&str) -> Result<(), String>,
) -> Result<(), Problem> {
    parts::make_folders(&config)?;
    let lock = Lock::take(&config.host.state_dir)?;
    let listener = server::listener(&config.api.socket)?;
    let systemd = Systemd::from_environment();
    systemd.status("looking for machines that run");
    let images = Arc::new(Images::open(&config.host.state_dir, config.reserve.disk.0)?);
    let machines = Machines::start(parts::core_config(&config, Arc::clone(&images) as _)?).await?;
    let uploads = Arc::new(Uploads::open(machines.uploads_dir())?);
    let peers = start_peers(&config, &machines).await?;
    let daemon = Daemon { machines, peers, uploads, config, systemd, _lock: lock };
    let (stop, stopped) = watch::channel(false);
    let api = tokio::spawn(server::serve(listener, daemon.app(images), stopped));
    daemon.ready();
    let ended = daemon.tick(reload, set_log_level).await;
    daemon.end().await;
    let _ = stop.send(true);
    let _ = api.await;
    ended
}

/// Starts gossip, fed from the books.
async fn start_peers(config: &Config, machines: &Machines) -> Result<PeerHandle, Problem> {
    let mut books = machines.local_shape();
    let (sender, shape) = watch::channel(local_shape(&books.borrow()));
    tokio::spawn(async move {
        while books.changed().await.is_ok() {
            let now = local_shape(&books.borrow_and_update());
            if sender.send(now).is_err() {
                return;
            }
        }
    });
    let store = config.host.state_dir.join("cluster");
    Ok(PeerRuntime::start(parts::peer_config(config)?, store, shape).await?)
}

fn local_shape(books: &HostResources) -> LocalShape {
    let amounts = |cpu_milli, memory_bytes, disk_bytes| crate::peer::Amounts {
        cpu_milli,
        memory_bytes,
        net_bit_s: 0,
        disk_bytes,
    };
    LocalShape {
        capacity: amounts(books.cpu.capacity, books.memory.capacity, books.disk.capacity),
        free: amounts(books.cpu.free, books.memory.free, books.disk.free),
        measured: None,
    }
}

impl Daemon {
    fn app(&self, images: Arc<Images>) -> App {
        App {
            core: Arc::new(self.machines.clone()),
            cluster: Arc::new(self.peers.clone()),
            doctor: Arc::new(HostDoctor::new(Path::new("/"), &self.config)),
            images,
            uploads: Arc::clone(&self.uploads),
            access: Arc::new(Access::of_host(&self.config.api.group, &self.config.api.view_group)),
            streams: Arc::new(Semaphore::new(MAX_STREAMS)),
        }
    }

    fn ready(&self) {
        let host = self.machines.host();
        tracing::info!("lathed {} is ready on {}: {}", host.version, host.name, headline(&self.machines));
        self.systemd.ready(&headline(&self.machines));
    }

    /// Feeds the watchdog, keeps the status line true, obeys signals; until SIGTERM or SIGINT.
    async fn tick(
        &self,
        reload: Reload,
        set_log_level: impl Fn(&str) -> Result<(), String>,
    ) -> Result<(), Problem> {
        let mut signals = Signals::new()?;
        let mut heartbeat = self.machines.heartbeat();
        let mut fed = Instant::now();
        let mut status = tokio::time::interval(STATUS_EVERY);
        let mut expire = tokio::time::interval(uploads::EXPIRE_EVERY);
        loop {
            tokio::select! {
                _ = signals.terminate.recv() => return Ok(()),
                _ = signals.interrupt.recv() => return Ok(()),
                _ = signals.hangup.recv() => self.reload(&reload, &set_log_level),
                beat = heartbeat.changed() => {
                    if beat.is_err() {
                        return Err(Problem::internal("the control loop", "it ended by itself"));
                    }
                    if fed.elapsed() >= self.systemd.feed_every() {
                        self.systemd.alive();
                        fed = Instant::now();
                    }
                }
                _ = status.tick() => self.systemd.status(&headline(&self.machines)),
                _ = expire.tick() => self.expire_uploads(),
            }
        }
    }

    fn expire_uploads(&self) {
        let uploads = Arc::clone(&self.uploads);
        tokio::task::spawn_blocking(move || {
            let removed = uploads.expire(SystemTime::now());
            if removed > 0 {
                tracing::info!("{removed} uploads that nobody used were removed");
            }
        });
    }

    /// Takes over what can change while lathed runs, and says what cannot.
    fn reload(&self, reload: &Reload, set_log_level: impl Fn(&str) -> Result<(), String>) {
        self.systemd.reloading();
        match reload() {
            Ok(new) => {
                if let Err(error) = set_log_level(&new.log_level) {
                    tracing::error!("[log] level: {error}");
                }
                let unchanged = Config { log_level: self.config.log_level.clone(), ..new };
                if unchanged == self.config {
                    tracing::info!("the configuration was read again");
                } else {
                    tracing::warn!(
                        "the configuration changed; all but [log] counts after: systemctl restart lathed"
                    );
                }
            }
            Err(error) => tracing::error!("the configuration was left as it is: {error}"),
        }
        self.systemd.ready(&headline(&self.machines));
    }

    /// Ends in order: machines are powered off if the host goes down, and run on otherwise.
    async fn end(&self) {
        self.systemd.stopping();
        let reason = if self.systemd.host_goes_down().await {
            let timeout = Duration::from_secs(self.config.machines.shutdown_timeout_sec.into());
            tracing::info!("the host goes down: machines have {} s to power off", timeout.as_secs());
            Shutdown::HostGoesDown { timeout }
        } else {
            tracing::info!("lathed ends, machines run on");
            Shutdown::Restart
        };
        self.machines.shutdown(reason).await;
        self.peers.shutdown().await;
    }
}

/// The signals that lathed obeys.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    fn new() -> Result<Self, Problem> {
        let on = |kind| signal(kind).map_err(|error| Problem::internal("installing signal handlers", error));
        Ok(Self {
            terminate: on(SignalKind::terminate())?,
            interrupt: on(SignalKind::interrupt())?,
            hangup: on(SignalKind::hangup())?,
        })
    }
}

/// `healthy; 3 machines; 3.50 CPU and 14.2 GiB free`.
fn headline(machines: &Machines) -> String {
    let host = machines.host();
    let plural = if host.machines == 1 { "" } else { "s" };
    let free = &host.resources;
    format!(
        "{}; {} machine{plural}; {} CPU and {} free",
        host.state,
        host.machines,
        lathe_shard::MilliCpu(free.cpu.free),
        lathe_shard::Bytes(free.memory.free)
    )
}
