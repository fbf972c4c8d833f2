//! The task between the gossip core and the world: socket, clock, folder, and whoever asks.
//!
//! ```text
//!   PeerHandle ── Command ──►┐
//!   UDP datagrams ──────────►│ Driver ──► lathe_gossip::Node ──► datagrams, timers, events
//!   shape of this host ─────►│    └─────► peers.json now and then
//!   timers ─────────────────►┘
//! ```
//! It is in one of three modes: alone (no cluster), at fault (the port cannot be opened; tried again), or member.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use lathe_gossip::{Event, LocalAdvert, Node, NodeConfig, Output, PeerState as Known, PeerView, Seed, Timer};
use tokio::sync::{Mutex, mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};
use tracing::{debug, error, info, warn};

use super::address::{self, Sockets};
use super::api::{self, ApiState};
use super::error::PeerError;
use super::membership::{Membership, random, unix_now};
use super::store::{Store, file};
use super::view::measured;
use super::wire::KnownPeer;
use super::{LocalShape, PeerConfig, PeerInfo, PeerStatus};

/// Commands waiting at most.
pub const MAX_COMMANDS: usize = 32;
/// Members remembered and handed to joiners at most.
const MAX_KNOWN: usize = 64;
/// Time between two attempts to open the port.
const RETRY: Duration = Duration::from_secs(5);
/// Time between two writes of `peers.json`.
const SAVE_PAUSE: Duration = Duration::from_secs(5);
/// Bytes read of a datagram; longer than any that is heard, so that too long ones are noticed.
const RECEIVE: usize = 2_048;
/// Datagrams taken before anything else has its turn.
const BURST: usize = 64;
/// Timers kept at most, but for those that probing hangs on.
const MAX_TIMERS: usize = 65_536;
/// Timers run before anything else has its turn.
const TIMER_BURST: usize = 256;

/// What the driver is asked.
pub enum Command {
    /// All peers, this host first.
    Peers(oneshot::Sender<Vec<PeerInfo>>),
    /// State in short.
    Status(oneshot::Sender<PeerStatus>),
    /// Certificates and keys, if a member.
    Member(oneshot::Sender<Option<Arc<Membership>>>),
    /// This host just became a member.
    Activate(Box<Activation>, oneshot::Sender<Result<(), PeerError>>),
    /// Living members, this host first.
    Known(oneshot::Sender<Vec<KnownPeer>>),
    /// Say goodbye and end.
    Shutdown(oneshot::Sender<()>),
}

/// What it takes to go from alone to member.
pub struct Activation {
    /// Certificates and keys, stored already.
    pub member: Arc<Membership>,
    /// Open sockets.
    pub sockets: Sockets,
    /// Whom to gossip with first.
    pub seeds: Vec<KnownPeer>,
}

/// The driver.
pub struct Driver {
    pub(super) config: Arc<PeerConfig>,
    store: Store,
    pub(super) shape: watch::Receiver<LocalShape>,
    shape_open: bool,
    commands: mpsc::Receiver<Command>,
    handle: mpsc::WeakSender<Command>,
    tokens: Arc<Mutex<()>>,
    pub(super) remembered: Vec<KnownPeer>,
    begun: Instant,
    pub(super) mode: Mode,
}

pub(super) enum Mode {
    Alone,
    Fault { member: Arc<Membership>, reason: String, retry: Instant },
    Member(Box<Live>),
}

pub(super) struct Live {
    pub(super) member: Arc<Membership>,
    pub(super) node: Node,
    sockets: tokio::net::UdpSocket,
    pub(super) address: SocketAddr,
    api: JoinHandle<()>,
    timers: Timers,
    changed: bool,
    saved: Instant,
    saving: Option<JoinHandle<()>>,
}

enum Happened {
    Command(Option<Command>),
    Datagram(std::io::Result<(usize, SocketAddr)>),
    Timers,
    Retry,
    Shape(bool),
}

/// What a driver is made of.
pub struct DriverParts {
    /// This host's configuration.
    pub config: Arc<PeerConfig>,
    /// The cluster's folder.
    pub store: Store,
    /// What this host has.
    pub shape: watch::Receiver<LocalShape>,
    /// From the handles.
    pub commands: mpsc::Receiver<Command>,
    /// To itself, for the peer API.
    pub handle: mpsc::WeakSender<Command>,
    /// Guards the token file.
    pub tokens: Arc<Mutex<()>>,
}

impl Driver {
    /// Reads what the last life left; becomes a member at once if there is a membership.
    ///
    /// # Errors
    /// [`PeerError::Store`] if the folder cannot be read or is corrupt.
    pub async fn start(parts: DriverParts) -> Result<Self, PeerError> {
        let member = Membership::load(&parts.store)?;
        let remembered = match parts.store.read_json::<Vec<KnownPeer>>(file::PEERS) {
            Ok(peers) => peers.unwrap_or_default(),
            Err(problem) => {
                warn!("starting without remembered peers: {problem}");
                Vec::new()
            }
        };
        let mut driver = Self {
            config: parts.config,
            store: parts.store,
            shape: parts.shape,
            shape_open: true,
            commands: parts.commands,
            handle: parts.handle,
            tokens: parts.tokens,
            remembered,
            begun: Instant::now(),
            mode: Mode::Alone,
        };
        if let Some(member) = member {
            driver.open(Arc::new(member)).await;
        }
        Ok(driver)
    }

    /// Runs until it is told to shut down, or nobody holds a handle any more.
    pub async fn run(mut self) {
        let mut buffer = vec![0; RECEIVE];
        loop {
            match self.next(&mut buffer).await {
                Happened::Command(Some(Command::Shutdown(done))) => {
                    self.close().await;
                    let _ = done.send(());
                    return;
                }
                Happened::Command(None) => return self.close().await,
                Happened::Command(Some(command)) => self.answer(command),
                Happened::Datagram(received) => self.receive(received, &mut buffer),
                Happened::Timers => self.run_timers(),
                Happened::Retry => self.retry().await,
                Happened::Shape(open) => {
                    self.shape_open = open;
                    self.advertise();
                }
            }
        }
    }

    async fn next(&mut self, buffer: &mut [u8]) -> Happened {
        match &self.mode {
            Mode::Alone => Happened::Command(self.commands.recv().await),
            Mode::Fault { retry, .. } => tokio::select! {
                command = self.commands.recv() => Happened::Command(command),
                () = sleep_until(*retry) => Happened::Retry,
            },
            Mode::Member(live) => tokio::select! {
                command = self.commands.recv() => Happened::Command(command),
                received = live.sockets.recv_from(buffer) => Happened::Datagram(received),
                () = sleep_until(live.timers.next()) => Happened::Timers,
                changed = self.shape.changed(), if self.shape_open => Happened::Shape(changed.is_ok()),
            },
        }
    }

    fn answer(&mut self, command: Command) {
        // Whoever asked may be gone by now; that is no fault.
        match command {
            Command::Peers(to) => drop(to.send(self.peers())),
            Command::Status(to) => drop(to.send(self.status())),
            Command::Member(to) => drop(to.send(self.member().cloned())),
            Command::Known(to) => drop(to.send(self.living())),
            Command::Activate(activation, to) => {
                let member = activation.member.clone();
                let done = self.activate(*activation);
                if let (Err(problem), Mode::Alone) = (&done, &self.mode) {
                    // The membership is stored already: as after a restart, the rest is tried again.
                    self.fault(member, problem);
                }
                drop(to.send(done));
            }
            Command::Shutdown(to) => drop(to.send(())),
        }
    }

    pub(super) fn now(&self) -> Duration {
        self.begun.elapsed()
    }

    pub(super) fn member(&self) -> Option<&Arc<Membership>> {
        match &self.mode {
            Mode::Alone => None,
            Mode::Fault { member, .. } => Some(member),
            Mode::Member(live) => Some(&live.member),
        }
    }

    async fn retry(&mut self) {
        if let Mode::Fault { member, .. } = &self.mode {
            let member = member.clone();
            self.open(member).await;
        }
    }

    /// Opens the port of a stored membership. What fails is tried again.
    async fn open(&mut self, member: Arc<Membership>) {
        let opened = match address::bind(self.config.listen).await {
            Ok(sockets) => {
                let seeds = self.remembered.clone();
                self.activate(Activation { member: member.clone(), sockets, seeds })
            }
            Err(problem) => Err(problem),
        };
        if let Err(problem) = opened {
            self.fault(member, &problem);
        }
    }

    fn fault(&mut self, member: Arc<Membership>, problem: &PeerError) {
        error!("cluster {}: {problem}; next attempt in {} s", member.file.cluster, RETRY.as_secs());
        self.mode = Mode::Fault { member, reason: problem.to_string(), retry: Instant::now() + RETRY };
    }

    /// What was given with `--address` stands; what was found is found again if the host has moved.
    fn own_ip(&self, member: &Membership) -> IpAddr {
        let file = &member.file;
        if file.port.is_some() || (self.config.advertise.is_none() && address::is_own(file.ip)) {
            return file.ip;
        }
        let found = self.config.advertise.map_or_else(|| address::own_ip(self.config.listen), Ok);
        found.unwrap_or(file.ip)
    }

    fn activate(&mut self, activation: Activation) -> Result<(), PeerError> {
        if let Mode::Member(live) = &self.mode {
            return Err(PeerError::AlreadyMember { cluster: live.member.file.cluster.clone() });
        }
        let Activation { member, sockets, seeds } = activation;
        let address = SocketAddr::new(self.own_ip(&member), member.file.port.unwrap_or(sockets.port));
        let boot_epoch = self.store.next_boot_epoch(unix_now())?;
        let config = NodeConfig {
            card: member.card.clone(),
            secret: member.secret()?,
            ca: member.ca_public_key()?,
            keys: member.keys.clone(),
            address,
            boot_epoch,
            timing: self.config.timing,
        };
        let node =
            Node::new(config, random()?).map_err(|problem| PeerError::Internal(problem.to_string()))?;
        let state = Arc::new(ApiState {
            config: self.config.clone(),
            store: self.store.clone(),
            member: member.clone(),
            shape: self.shape.clone(),
            commands: self.handle.clone(),
            tokens: self.tokens.clone(),
        });
        let tcp = sockets.tcp;
        let api = tokio::spawn(async move {
            if let Err(problem) = api::serve(tcp, state).await {
                error!("peer API: {problem}");
            }
        });
        info!("member of cluster {} as {} at {address}", member.file.cluster, member.card.name());
        let now = Instant::now();
        let (timers, sockets) = (Timers::default(), sockets.udp);
        let live =
            Live { member, node, sockets, address, api, timers, changed: true, saved: now, saving: None };
        self.mode = Mode::Member(Box::new(live));
        let unknown = seeds.iter().filter(|seed| self.remembered.iter().all(|known| known.id != seed.id));
        let mut unknown: Vec<KnownPeer> = unknown.cloned().collect();
        self.remembered.append(&mut unknown);
        self.begin(&seeds);
        Ok(())
    }

    fn begin(&mut self, seeds: &[KnownPeer]) {
        let now = self.now();
        let Mode::Member(live) = &mut self.mode else { return };
        let parse = |peer: &KnownPeer| Some(Seed { id: peer.id.parse().ok()?, address: peer.address });
        let seeds: Vec<Seed> = seeds.iter().filter_map(parse).collect();
        let mut outputs = live.node.join(now, &seeds);
        outputs.append(&mut live.node.start(now));
        live.carry_out(outputs);
        self.advertise();
    }

    fn advertise(&mut self) {
        let now = self.now();
        let shape = *self.shape.borrow_and_update();
        let Mode::Member(live) = &mut self.mode else { return };
        let advert = LocalAdvert {
            api: live.address,
            region: self.config.region.clone(),
            version: self.config.version.clone(),
            measured_unix_ms: measured(&shape),
            capacity: shape.capacity,
            free: shape.free,
        };
        if let Err(problem) = live.node.set_advert(now, advert) {
            error!("{problem}");
        }
    }

    fn receive(&mut self, received: std::io::Result<(usize, SocketAddr)>, buffer: &mut [u8]) {
        let now = self.now();
        let Mode::Member(live) = &mut self.mode else { return };
        let mut next = received;
        for _ in 0..BURST {
            match next {
                Ok((length, from)) => {
                    let outputs =
                        live.node.handle_datagram(now, from, buffer.get(..length).unwrap_or_default());
                    live.carry_out(outputs);
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return,
                // Linux reports here that an earlier datagram was refused; the failure detector will see to it.
                Err(error) => debug!("gossip: receive: {error}"),
            }
            next = live.sockets.try_recv_from(buffer);
        }
    }

    fn run_timers(&mut self) {
        let now = self.now();
        let Mode::Member(live) = &mut self.mode else { return };
        for _ in 0..TIMER_BURST {
            let Some(timer) = live.timers.take_due(Instant::now()) else { break };
            let outputs = live.node.handle_timer(now, timer);
            live.carry_out(outputs);
        }
        self.save_peers();
    }

    /// Living members, this host first.
    fn living(&self) -> Vec<KnownPeer> {
        let Mode::Member(live) = &self.mode else { return Vec::new() };
        let me = KnownPeer {
            id: live.node.id().to_string(),
            name: live.member.card.name().to_owned(),
            address: live.address,
        };
        std::iter::once(me).chain(self.seen(|state| state != Known::Dead)).take(MAX_KNOWN).collect()
    }

    fn seen(&self, wanted: impl Fn(Known) -> bool) -> Vec<KnownPeer> {
        let Mode::Member(live) = &self.mode else { return Vec::new() };
        let peers = live.node.peers(self.now()).into_iter().filter(|peer| wanted(peer.state));
        let known = |peer: PeerView| {
            let name = peer.name.or_else(|| self.remembered_name(&peer.id)).unwrap_or_default();
            KnownPeer { id: peer.id.to_string(), name, address: peer.address }
        };
        peers.map(known).collect()
    }

    /// Now and then, if something changed.
    fn save_peers(&mut self) {
        let due = matches!(&self.mode, Mode::Member(live) if live.changed && live.saved.elapsed() >= self.save_pause());
        if !due {
            return;
        }
        self.merge_known();
        let (store, peers) = (self.store.clone(), self.remembered.clone());
        let Mode::Member(live) = &mut self.mode else { return };
        if live.saving.as_ref().is_some_and(|task| !task.is_finished()) {
            return;
        }
        live.changed = false;
        live.saved = Instant::now();
        live.saving = Some(tokio::task::spawn_blocking(move || write_peers(&store, &peers)));
    }

    fn save_pause(&self) -> Duration {
        SAVE_PAUSE.min(self.config.timing.tick * 5)
    }

    /// The living first, then the dead, then those of earlier lives, as far as there is room.
    fn merge_known(&mut self) {
        let mut known = self.seen(|state| state != Known::Dead);
        known.append(&mut self.seen(|state| state == Known::Dead));
        for peer in &self.remembered {
            if !known.iter().any(|k| k.id == peer.id) {
                known.push(peer.clone());
            }
        }
        known.truncate(MAX_KNOWN);
        self.remembered = known;
    }

    async fn close(&mut self) {
        let now = self.now();
        self.merge_known();
        let remembered = std::mem::take(&mut self.remembered);
        let Mode::Member(live) = &mut self.mode else { return };
        let outputs = live.node.leave(now);
        live.carry_out(outputs);
        live.api.abort();
        if let Some(task) = live.saving.take() {
            let _ = task.await;
        }
        let store = self.store.clone();
        let _ = tokio::task::spawn_blocking(move || write_peers(&store, &remembered)).await;
        self.mode = Mode::Alone;
    }
}

impl Live {
    fn carry_out(&mut self, outputs: Vec<Output>) {
        for output in outputs {
            match output {
                Output::Send { to, bytes } => {
                    // A datagram that cannot be sent now is a lost one: the protocol is made for that.
                    if let Err(error) = self.sockets.try_send_to(&bytes, to) {
                        debug!("gossip: to {to}: {error}");
                    }
                }
                Output::SetTimer { after, timer } => self.timers.set(Instant::now() + after, timer),
                Output::Event(event) => {
                    self.changed = true;
                    let name = |id| self.node.name_of(&id).unwrap_or_else(|| id.to_string());
                    match event {
                        Event::PeerUp(id) => info!("peer {} is up", name(id)),
                        Event::PeerSuspect(id) => info!("peer {} does not answer", name(id)),
                        Event::PeerDown(id) => warn!("peer {} is counted dead", name(id)),
                        Event::AdvertUpdated(id) => debug!("peer {} has a new advert", name(id)),
                    }
                }
            }
        }
    }
}

fn write_peers(store: &Store, peers: &[KnownPeer]) {
    if let Err(problem) = store.write_json(file::PEERS, &peers) {
        warn!("peers not remembered: {problem}");
    }
}

/// Timers by time. A few per member, and one for a day after each death: members that die all the time are forgotten late then.
#[derive(Default)]
struct Timers {
    heap: BinaryHeap<Reverse<Due>>,
    number: u64,
}

struct Due {
    at: Instant,
    number: u64,
    timer: Timer,
}

impl Timers {
    fn set(&mut self, at: Instant, timer: Timer) {
        if self.heap.len() >= MAX_TIMERS && timer.is_cleanup() {
            return;
        }
        self.number += 1;
        self.heap.push(Reverse(Due { at, number: self.number, timer }));
    }

    fn next(&self) -> Instant {
        const LONG: Duration = Duration::from_secs(3600);
        self.heap.peek().map_or_else(|| Instant::now() + LONG, |Reverse(due)| due.at)
    }

    fn take_due(&mut self, now: Instant) -> Option<Timer> {
        if self.next() > now {
            return None;
        }
        self.heap.pop().map(|Reverse(due)| due.timer)
    }
}

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.number) == (other.at, other.number)
    }
}

impl Eq for Due {}

impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Due {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.number).cmp(&(other.at, other.number))
    }
}
