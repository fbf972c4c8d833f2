//! Other hosts: finding them, trusting them, hearing what they have to spare.
//!
//! [`PeerRuntime::start`] gives a [`PeerHandle`], through which the rest of lathed asks and acts. Without a cluster it knows this host
//! only. `init` makes a cluster, `token` lets one more host in, `join` enters another's; after a restart the host is a member
//! again by itself.
//!
//! ```text
//!   PeerHandle ──► driver ──► lathe_gossip::Node      UDP, sealed with the gossip key
//!        │            └─────► api (server)            TCP, TLS 1.3; members only, but for /v1/join
//!        └── join, fetch_host ──► client              ──┘
//!   membership, token, store: what is kept in /var/lib/lathe/cluster
//! ```
//! | module | what it holds |
//! |---|---|
//! | `membership` | CA, certificates, cards, gossip keys |
//! | `token` | join tokens, both ends |
//! | `store` | the folder, written atomically |
//! | `tls` | who is believed on which ground |
//! | `api`, `client`, `wire` | the peer API |
//! | `address` | sockets, and which address to tell others |
//! | `driver`, `view` | the task that runs it all, and what it tells |
//! | `service` | the same for the local API |
//!
//! It never decides what a peer may have (the market does), never logs a secret, and takes no address or name from another host
//! on trust where a signature could say it.

mod address;
mod api;
mod client;
mod driver;
mod error;
mod membership;
mod service;
mod store;
#[cfg(test)]
mod tests;
mod tls;
mod token;
mod view;
mod wire;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

pub use lathe_gossip::{Amounts, Stats, Timing};
use serde::Serialize;
use tokio::sync::{Mutex, mpsc, oneshot, watch};

pub use self::error::PeerError;
pub use self::wire::HostInfo;

use self::driver::{Activation, Command, Driver, DriverParts, MAX_COMMANDS};
use self::membership::{ClusterFile, Membership, new_key, random, request, unix_now};
use self::store::Store;
use self::token::{Token, Tokens};

/// The port of gossip (UDP) and peer API (TCP).
pub const DEFAULT_PORT: u16 = 7946;
/// Longest life of a join token.
pub const MAX_TOKEN_TTL: Duration = Duration::from_secs(7 * 86_400);

/// How this host appears to others.
#[derive(Clone, Debug)]
pub struct PeerConfig {
    /// Host name: 1 to 63 of `a-z 0-9 - .`; upper case is lowered.
    pub name: String,
    /// Where to listen, UDP and TCP. Port 0: any that is free for both.
    pub listen: SocketAddr,
    /// What others dial; `None`: found from the routing table.
    pub advertise: Option<IpAddr>,
    /// At most 32 bytes; may be empty.
    pub region: String,
    /// Version of lathed, at most 32 bytes.
    pub version: String,
    /// How fast gossip goes.
    pub timing: Timing,
}

impl PeerConfig {
    /// The defaults for a host of this name.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            listen: SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), DEFAULT_PORT),
            advertise: None,
            region: String::new(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            timing: Timing::default(),
        }
    }
}

/// What this host has, as its books say.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct LocalShape {
    /// All there is.
    pub capacity: Amounts,
    /// Capacity − reserved − granted.
    pub free: Amounts,
    /// When measured; `None`: now.
    pub measured: Option<SystemTime>,
}

/// Whether this host is in a cluster.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum RuntimeState {
    /// It is in none.
    NoCluster,
    /// It is, and listens.
    Member,
    /// It is, but cannot listen; tried again every 5 s.
    Fault {
        /// Why.
        reason: String,
    },
}

/// State in short.
#[derive(Clone, Debug, Serialize)]
pub struct PeerStatus {
    /// Whether in a cluster.
    #[serde(flatten)]
    pub state: RuntimeState,
    /// This host's name.
    pub name: String,
    /// Its node identifier.
    pub node_id: Option<String>,
    /// Where others reach it.
    pub address: Option<SocketAddr>,
    /// The cluster's name.
    pub cluster: Option<String>,
    /// First 16 hex digits of the SHA-256 of the CA's certificate.
    pub cluster_id: Option<String>,
    /// Whether tokens can be made here.
    pub has_ca: bool,
    /// Members alive or suspect, without this one.
    pub peers_alive: usize,
    /// Counters of the gossip, if a member.
    pub stats: Option<Stats>,
}

/// What is thought of a peer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum PeerState {
    /// This host.
    #[serde(rename = "self")]
    Me,
    /// Answers.
    Alive,
    /// Did not answer for a moment.
    Suspect,
    /// Did not answer for long, or left, or not heard since this host's start.
    Dead,
}

/// A peer, or this host.
#[derive(Clone, Debug, Serialize)]
pub struct PeerInfo {
    /// Name, or the node identifier as long as its card was not heard.
    pub name: String,
    /// Where it is reached; `None` for this host without a cluster.
    pub address: Option<SocketAddr>,
    /// What is thought of it.
    pub state: PeerState,
    /// Milliseconds since a datagram came from it.
    pub last_heard_ms: Option<u64>,
    /// Round trip in microseconds.
    pub rtt_us: Option<u64>,
    /// What it says of itself.
    pub advert: Option<PeerAdvert>,
}

/// What a host says of itself.
#[derive(Clone, Debug, Serialize)]
pub struct PeerAdvert {
    /// Region, may be empty.
    pub region: String,
    /// Version of its lathed.
    pub version: String,
    /// All there is.
    pub capacity: Amounts,
    /// Capacity − reserved − granted.
    pub free: Amounts,
    /// Grows with each advert since its start; 0 for this host.
    pub revision: u64,
    /// When measured, by its clock, ms since 1970.
    pub measured_unix_ms: u64,
    /// Milliseconds since it was heard here.
    pub age_ms: u64,
}

/// Starts the peer runtime.
pub struct PeerRuntime;

impl PeerRuntime {
    /// Starts the tasks. `store_dir` is the cluster's folder, made if it is missing. Call inside a tokio runtime.
    ///
    /// # Errors
    /// [`PeerError::NameInvalid`]; [`PeerError::Store`] if the folder cannot be read or is corrupt. A port that cannot be
    /// opened is no error here: it shows in [`PeerHandle::status`] and is tried again.
    pub async fn start(
        mut config: PeerConfig,
        store_dir: PathBuf,
        shape: watch::Receiver<LocalShape>,
    ) -> Result<PeerHandle, PeerError> {
        config.name = config.name.to_ascii_lowercase();
        lathe_gossip::card::check_name(&config.name)?;
        let store = Store::open(&store_dir)?;
        let (sender, commands) = mpsc::channel(MAX_COMMANDS);
        let (config, tokens) = (Arc::new(config), Arc::new(Mutex::new(())));
        let driver = Driver::start(DriverParts {
            config: config.clone(),
            store: store.clone(),
            shape,
            commands,
            handle: sender.downgrade(),
            tokens: tokens.clone(),
        });
        tokio::spawn(driver.await?.run());
        Ok(PeerHandle { commands: sender, config, store, tokens, change: Arc::new(Mutex::new(())) })
    }
}

/// To ask and to act. Clones speak to the same runtime; when the last is dropped, it ends.
#[derive(Clone)]
pub struct PeerHandle {
    commands: mpsc::Sender<Command>,
    config: Arc<PeerConfig>,
    store: Store,
    tokens: Arc<Mutex<()>>,
    /// One init or join at a time.
    change: Arc<Mutex<()>>,
}

impl PeerHandle {
    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, PeerError> {
        let (to, answer) = oneshot::channel();
        self.commands.send(command(to)).await.map_err(|_| PeerError::Stopped)?;
        answer.await.map_err(|_| PeerError::Stopped)
    }

    /// State in short.
    ///
    /// # Errors
    /// [`PeerError::Stopped`].
    pub async fn status(&self) -> Result<PeerStatus, PeerError> {
        self.ask(Command::Status).await
    }

    /// This host, then all peers by name.
    ///
    /// # Errors
    /// [`PeerError::Stopped`].
    pub async fn peers(&self) -> Result<Vec<PeerInfo>, PeerError> {
        self.ask(Command::Peers).await
    }

    /// Makes a cluster of this host alone: CA, keys, certificate. `address` is what others dial, if it is not what is found.
    ///
    /// # Errors
    /// [`PeerError::AlreadyMember`], [`PeerError::NoAddress`], [`PeerError::Bind`], [`PeerError::Store`]; nothing is changed then.
    pub async fn init(&self, cluster: &str, address: Option<SocketAddr>) -> Result<PeerStatus, PeerError> {
        lathe_gossip::card::check_name(cluster)?;
        let _one_at_a_time = self.change.lock().await;
        self.need_no_cluster().await?;
        let ip = match address.map(|a| a.ip()).or(self.config.advertise) {
            Some(ip) => ip,
            None => address::own_ip(self.config.listen)?,
        };
        let sockets = address::bind(self.config.listen).await?;
        let file =
            ClusterFile { schema: 1, cluster: cluster.to_owned(), ip, port: address.map(|a| a.port()) };
        let (name, store) = (self.config.name.clone(), self.store.clone());
        let member = blocking(move || {
            let member = Membership::found(&name, file)?;
            member.save(&store)?;
            Ok(member)
        });
        let activation = Activation { member: Arc::new(member.await?), sockets, seeds: Vec::new() };
        self.ask(|to| Command::Activate(Box::new(activation), to)).await??;
        self.status().await
    }

    /// Makes a join token: one line, good once, for `ttl` (at most 7 days). A secret.
    ///
    /// # Errors
    /// [`PeerError::NoCluster`], [`PeerError::NoCa`], [`PeerError::Store`].
    pub async fn token(&self, ttl: Duration) -> Result<String, PeerError> {
        let member = self.member().await?;
        if !member.has_ca() {
            return Err(PeerError::NoCa { cluster: member.file.cluster.clone() });
        }
        let address = self.status().await?.address.ok_or(PeerError::NoCluster)?;
        let token = Token {
            addresses: vec![address],
            server: member.card.name().to_owned(),
            pin: member.pin(),
            secret: random()?,
        };
        let text = token.text()?;
        let _one_at_a_time = self.tokens.lock().await;
        let store = self.store.clone();
        blocking(move || {
            let now = unix_now();
            Tokens::load(&store)?.give(&token.secret, now, now + ttl.min(MAX_TOKEN_TTL).as_secs())
        })
        .await?;
        Ok(text)
    }

    /// Enters the cluster that made the token. `address` is what others dial, if it is not the own end of the connection to it.
    ///
    /// # Errors
    /// What stands in the way; this host is in no cluster then.
    pub async fn join(&self, token: &str, address: Option<SocketAddr>) -> Result<PeerStatus, PeerError> {
        let token = Token::parse(token)?;
        let _one_at_a_time = self.change.lock().await;
        self.need_no_cluster().await?;
        let sockets = address::bind(self.config.listen).await?;
        let key = new_key()?;
        let name = self.config.name.clone();
        let (answer, own_end, server) = client::join(&token, &name, &request(&name, &key)?).await?;
        let own_ip = self.config.advertise.unwrap_or(own_end.ip());
        let file = ClusterFile {
            schema: 1,
            cluster: answer.issued.cluster.clone(),
            ip: address.map_or(own_ip, |a| a.ip()),
            port: address.map(|a| a.port()),
        };
        let (store, issued, seeds) = (self.store.clone(), answer.issued, answer.seeds.clone());
        let member = blocking(move || {
            let member = Membership::from_issued(&name, &issued, file, key, &token.pin)
                .map_err(|what| PeerError::Protocol { address: server, what })?;
            store.write_json(store::file::PEERS, &seeds)?;
            member.save(&store)?;
            Ok(member)
        });
        let activation = Activation { member: Arc::new(member.await?), sockets, seeds: answer.seeds };
        self.ask(|to| Command::Activate(Box::new(activation), to)).await??;
        self.status().await
    }

    /// What a living peer says of itself when asked directly, over mutual TLS.
    ///
    /// # Errors
    /// [`PeerError::UnknownPeer`], [`PeerError::NoCluster`], [`PeerError::Unreachable`], [`PeerError::Protocol`].
    pub async fn fetch_host(&self, name: &str) -> Result<HostInfo, PeerError> {
        let member = self.member().await?;
        let living = |peer: &PeerInfo| {
            peer.name == name && matches!(peer.state, PeerState::Alive | PeerState::Suspect)
        };
        let peer = self.peers().await?.into_iter().find(living);
        let address =
            peer.and_then(|peer| peer.address).ok_or_else(|| PeerError::UnknownPeer(name.to_owned()))?;
        client::host(&member, address, name).await
    }

    /// Says goodbye to the peers, closes the port, ends the tasks. Returns when that is done.
    pub async fn shutdown(&self) {
        // An error means that it has ended already.
        let _ = self.ask(Command::Shutdown).await;
    }

    async fn member(&self) -> Result<Arc<Membership>, PeerError> {
        self.ask(Command::Member).await?.ok_or(PeerError::NoCluster)
    }

    async fn need_no_cluster(&self) -> Result<(), PeerError> {
        match self.ask(Command::Member).await? {
            Some(member) => Err(PeerError::AlreadyMember { cluster: member.file.cluster.clone() }),
            None => Ok(()),
        }
    }
}

/// Files and keys are made off the async threads.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, PeerError> + Send + 'static,
) -> Result<T, PeerError> {
    tokio::task::spawn_blocking(work).await.map_err(|_| PeerError::Stopped)?
}
