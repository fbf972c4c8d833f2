//! The state machine of one node: datagrams, timers and adverts in; datagrams, timers and events out.
//!
//! Membership and failure detection are foca's (SWIM with incarnations and suspicion). This module seals and opens, checks what
//! foca would take on trust (sender, bounds, addresses), and adds three things that run off one tick per second:
//! - **Joining and healing.** A node that hears nobody announces itself to the seeds and to whom it knew. One that has
//!   joined asks for members until answers bring nothing new.
//! - **Adverts.** Published at once when they change, but no faster than the cluster can carry, and again now and then.
//!   They spread as foca's custom broadcasts.
//! - **Repair.** A member whose advert is missing or stale is asked for it directly.
//!
//! The rates follow from the cluster's size, so that a node's traffic stays about the same in every cluster.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

use foca::{Foca, Header, Member, Message, PostcardCodec, State};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;

use crate::advert::{self, Advert, AdvertBook, AdvertError, SharedBook};
use crate::card::{NodeCard, NodeId, SecretKey};
use crate::exchange::{Direct, Effects, Word, decode_header, inspect};
use crate::identity::Identity;
use crate::interface::{
    Event, LocalAdvert, NodeConfig, NodeError, Output, PeerState, PeerView, Seed, Stats, Timer, TimerKind,
    Timing,
};
use crate::seal::{Opener, Reject, Sealer};

/// Members known at most; what names more is dropped.
pub const MAX_MEMBERS: usize = 4_096;
/// Seeds kept at most.
pub const MAX_SEEDS: usize = 64;

/// Members asked directly for their advert per tick, and such questions answered per tick.
const REPAIRS_PER_TICK: usize = 32;
/// Nodes announced to per tick while nobody is heard.
const ANNOUNCES_PER_TICK: usize = 3;
/// Quiet ticks after which a joined node no longer asks for members.
const DISCOVERY_QUIET_TICKS: u32 = 5;
/// Kinds of plaintext.
const KIND_MEMBERSHIP: u8 = 0;
const KIND_DIRECT: u8 = 1;

#[derive(Default)]
struct Record {
    last_heard: Option<Duration>,
    rtt: Option<Duration>,
    state: Option<State>,
    asked: Option<Duration>,
}

/// One node. See the module's text.
pub struct Node {
    card: NodeCard,
    secret: SecretKey,
    boot_epoch: u64,
    timing: Timing,
    foca: Foca<Identity, PostcardCodec, StdRng, SharedBook>,
    rng: StdRng,
    book: SharedBook,
    sealer: Sealer,
    opener: Opener,
    records: HashMap<NodeId, Record>,
    seeds: Vec<Seed>,
    connected: bool,
    left: bool,
    sized_for: usize,
    quiet_ticks: u32,
    members_before: usize,
    probe: Option<(NodeId, u8, Duration)>,
    local: Option<LocalAdvert>,
    published: Option<(Duration, LocalAdvert)>,
    counter: u64,
    answers: usize,
    stats: Stats,
}

impl Node {
    /// Makes a node. The seed drives foca's choices of members, nothing cryptographic.
    ///
    /// # Errors
    /// [`NodeError`], if card, key and CA do not belong together or the address is none.
    pub fn new(config: NodeConfig, seed: [u8; 32]) -> Result<Self, NodeError> {
        config.card.check(&config.ca)?;
        let id = config.card.id();
        let key = NodeId::of(&config.secret.public_key());
        if key != id {
            return Err(NodeError::KeyMismatch { key, card: id });
        }
        let identity = Identity { id, address: config.address, boot_epoch: config.boot_epoch, renewal: 0 };
        if !identity.is_plausible() {
            return Err(NodeError::Address(config.address));
        }
        let mut rng = StdRng::from_seed(seed);
        let book = SharedBook::new(AdvertBook::new(config.ca, id, MAX_MEMBERS));
        let foca_config = config.timing.foca(1);
        let foca = Foca::with_custom_broadcast(
            identity,
            foca_config,
            StdRng::from_rng(&mut rng),
            PostcardCodec,
            book.clone(),
        );
        Ok(Self {
            sealer: Sealer::new(&config.keys, id, config.boot_epoch).ok_or(NodeError::Keys)?,
            opener: Opener::new(&config.keys, id),
            card: config.card,
            secret: config.secret,
            boot_epoch: config.boot_epoch,
            timing: config.timing,
            foca,
            rng,
            book,
            records: HashMap::new(),
            seeds: Vec::new(),
            connected: false,
            left: false,
            sized_for: 1,
            quiet_ticks: 0,
            members_before: 0,
            probe: None,
            local: None,
            published: None,
            counter: 0,
            answers: 0,
            stats: Stats::default(),
        })
    }

    /// This node's identifier.
    pub fn id(&self) -> NodeId {
        self.card.id()
    }

    /// This node's card.
    pub fn card(&self) -> &NodeCard {
        &self.card
    }

    /// Counters since the start.
    pub fn stats(&self) -> Stats {
        self.stats
    }

    /// The name of a peer, once its card was heard.
    pub fn name_of(&self, id: &NodeId) -> Option<String> {
        self.book.lock().get(id).map(|heard| heard.card.name().to_owned())
    }

    /// Members counted alive or suspect, without this one.
    pub fn members_active(&self) -> usize {
        self.foca.num_members()
    }

    /// Sets the first timer. Call once.
    pub fn start(&mut self, now: Duration) -> Vec<Output> {
        self.tick(now)
    }

    /// Adds nodes to join through, up to [`MAX_SEEDS`], and announces this one to them.
    pub fn join(&mut self, now: Duration, seeds: &[Seed]) -> Vec<Output> {
        let id = self.id();
        for seed in seeds.iter().filter(|seed| seed.id != id) {
            self.seeds.retain(|known| known.id != seed.id);
            if self.seeds.len() < MAX_SEEDS {
                self.seeds.push(*seed);
            }
        }
        let mut effects = Effects::default();
        self.announce(&mut effects);
        self.carry_out(now, effects)
    }

    /// Tells the others that this node goes. Nothing is sent or heard afterwards.
    pub fn leave(&mut self, now: Duration) -> Vec<Output> {
        let mut effects = Effects::default();
        if !self.left && self.foca.leave_cluster(&mut effects).is_err() {
            self.stats.malformed += 1;
        }
        let outputs = self.carry_out(now, effects);
        self.left = true;
        outputs
    }

    /// Says what this host has to spare: with the next datagrams if it differs from what was said last and that was not
    /// just now, else when the pause between adverts is over.
    ///
    /// # Errors
    /// [`AdvertError::Word`] if region or version are too long.
    pub fn set_advert(&mut self, now: Duration, local: LocalAdvert) -> Result<(), AdvertError> {
        if local.region.len() > advert::MAX_WORD || local.version.len() > advert::MAX_WORD {
            return Err(AdvertError::Word(self.card.name().to_owned()));
        }
        self.local = Some(local);
        self.publish_if_due(now)
    }

    /// Takes a datagram, whatever it is.
    pub fn handle_datagram(&mut self, now: Duration, from: SocketAddr, datagram: &[u8]) -> Vec<Output> {
        // The address is not trusted for anything: members are answered where they said they are.
        let _ = from;
        if self.left {
            return Vec::new();
        }
        let opened = match self.opener.open(datagram) {
            Ok(opened) => opened,
            Err(reject) => {
                self.count(reject);
                return Vec::new();
            }
        };
        self.stats.heard += 1;
        self.book.lock().set_time(now);
        let mut effects = Effects::default();
        let understood = match opened.plaintext.split_first() {
            Some((&KIND_MEMBERSHIP, payload)) => {
                self.membership(now, opened.sender, opened.boot_epoch, payload, &mut effects)
            }
            Some((&KIND_DIRECT, payload)) => self.direct(now, opened.sender, payload),
            _ => None,
        };
        let mut outputs = understood.unwrap_or_else(|| {
            self.stats.malformed += 1;
            Vec::new()
        });
        outputs.append(&mut self.carry_out(now, effects));
        outputs
    }

    /// Takes back a timer whose time has come.
    pub fn handle_timer(&mut self, now: Duration, timer: Timer) -> Vec<Output> {
        if self.left {
            return Vec::new();
        }
        self.book.lock().set_time(now);
        match timer.0 {
            TimerKind::Tick => self.tick(now),
            TimerKind::Foca(timer) => {
                let mut effects = Effects::default();
                if self.foca.handle_timer(*timer, &mut effects).is_err() {
                    // A probe cycle that was cut short by a change of identity; foca starts the next one by itself.
                    self.probe = None;
                }
                self.carry_out(now, effects)
            }
        }
    }

    /// What is thought of each peer, in no order; without this node. Cheaper than [`Node::peers`].
    pub fn peer_states(&self) -> impl Iterator<Item = (NodeId, PeerState)> {
        self.foca.iter_membership_state().map(|member| (member.id().id, state_of(member)))
    }

    /// All peers known, in no order; without this node.
    pub fn peers(&self, now: Duration) -> Vec<PeerView> {
        let book = self.book.lock();
        let view = |member: &Member<Identity>| {
            let id = member.id().id;
            let record = self.records.get(&id);
            let heard = book.get(&id);
            PeerView {
                id,
                name: heard.map(|h| h.card.name().to_owned()),
                address: member.id().address,
                state: state_of(member),
                last_heard: record.and_then(|r| r.last_heard).map(|at| now.saturating_sub(at)),
                rtt: record.and_then(|r| r.rtt),
                advert: heard.map(|h| (h.advert.clone(), now.saturating_sub(h.at))),
            }
        };
        self.foca.iter_membership_state().filter(|member| member.id().id != self.id()).map(view).collect()
    }

    fn count(&mut self, reject: Reject) {
        let counter = match reject {
            Reject::Size => &mut self.stats.bad_size,
            Reject::Version | Reject::UnknownKey => &mut self.stats.unknown_key,
            Reject::Forged => &mut self.stats.forged,
            Reject::FromSelf | Reject::Replay => &mut self.stats.replayed,
        };
        *counter += 1;
    }

    /// None: malformed.
    fn membership(
        &mut self,
        now: Duration,
        sender: NodeId,
        boot_epoch: u64,
        payload: &[u8],
        effects: &mut Effects,
    ) -> Option<Vec<Output>> {
        let (header, mut named) = inspect(payload)?;
        if header.src.id != sender || header.src.boot_epoch != boot_epoch {
            return None;
        }
        named.push(header.src.id);
        if self.records.len() + named.len() > MAX_MEMBERS {
            named.retain(|id| !self.records.contains_key(id));
            if self.records.len() + named.len() > MAX_MEMBERS {
                self.stats.over_capacity += 1;
                return Some(Vec::new());
            }
        }
        let handled = self.foca.handle_data(payload, &mut *effects);
        let me = self.id();
        for id in named.into_iter().filter(|id| *id != me) {
            self.records.entry(id).or_default();
        }
        if let Some(record) = self.records.get_mut(&sender) {
            record.last_heard = Some(now);
            if let (Message::Ack(number), Some((probed, probe_number, sent))) = (&header.message, self.probe)
                && probed == sender
                && probe_number == *number
            {
                let sample = now.saturating_sub(sent);
                record.rtt = Some(record.rtt.map_or(sample, |rtt| (rtt * 3 + sample) / 4));
                self.probe = None;
            }
        }
        handled.ok().map(|()| Vec::new())
    }

    /// None: malformed.
    fn direct(&mut self, now: Duration, sender: NodeId, payload: &[u8]) -> Option<Vec<Output>> {
        let (direct, rest): (Direct<'_>, _) = postcard::take_from_bytes(payload).ok()?;
        if !rest.is_empty() || direct.to != self.id() || direct.to_epoch != self.boot_epoch {
            return None;
        }
        if let Some(record) = self.records.get_mut(&sender) {
            record.last_heard = Some(now);
        }
        match direct.what {
            Word::Advert(bytes) => self.book.lock().take(bytes).ok().map(|_| Vec::new()),
            Word::AdvertWanted => {
                if self.answers >= REPAIRS_PER_TICK {
                    return Some(Vec::new());
                }
                self.answers += 1;
                let member = self.foca.iter_members().map(|m| *m.id()).find(|m| m.id == sender);
                let (Some(member), Some((_, local))) = (member, self.published.clone()) else {
                    return Some(Vec::new());
                };
                let bytes = self.signed(&local).ok()?;
                Some(self.send_direct(&member, Word::Advert(&bytes)).into_iter().collect())
            }
        }
    }

    fn send_direct(&mut self, to: &Identity, what: Word<'_>) -> Option<Output> {
        let direct = Direct { to: to.id, to_epoch: to.boot_epoch, what };
        let plaintext = postcard::to_extend(&direct, vec![KIND_DIRECT]).ok()?;
        self.seal(to.address, &plaintext)
    }

    fn seal(&mut self, to: SocketAddr, plaintext: &[u8]) -> Option<Output> {
        let bytes = self.sealer.seal(plaintext)?;
        self.stats.sent += 1;
        self.stats.sent_bytes += bytes.len() as u64;
        Some(Output::Send { to, bytes })
    }

    fn carry_out(&mut self, now: Duration, effects: Effects) -> Vec<Output> {
        let mut outputs = Vec::new();
        for (to, data) in effects.send {
            if let Ok(Header { message: Message::Ping(number), .. }) = decode_header(&mut &data[..]) {
                self.probe = Some((to.id, number, now));
            }
            let mut plaintext = Vec::with_capacity(1 + data.len());
            plaintext.push(KIND_MEMBERSHIP);
            plaintext.extend_from_slice(&data);
            outputs.extend(self.seal(to.address, &plaintext));
        }
        for (after, timer) in effects.timers {
            outputs.push(Output::SetTimer { after, timer: Timer(TimerKind::Foca(Box::new(timer))) });
        }
        outputs.extend(effects.events.into_iter().map(Output::Event));
        let updated = self.book.lock().take_updated();
        outputs.extend(updated.into_iter().map(|id| Output::Event(Event::AdvertUpdated(id))));
        if let Some(connected) = effects.connected {
            self.connected = connected;
            self.quiet_ticks = 0;
        }
        outputs
    }

    fn tick(&mut self, now: Duration) -> Vec<Output> {
        self.answers = 0;
        let mut effects = Effects::default();
        if !self.connected {
            self.announce(&mut effects);
        } else if self.quiet_ticks < DISCOVERY_QUIET_TICKS {
            self.discover(&mut effects);
        }
        // A word that is too long was refused by set_advert already.
        let _ = self.publish_if_due(now);
        let mut outputs = self.carry_out(now, effects);
        outputs.append(&mut self.repair(now));
        self.notice_suspects(&mut outputs);
        self.fit_to_size();
        outputs.push(Output::SetTimer { after: self.timing.tick, timer: Timer(TimerKind::Tick) });
        outputs
    }

    /// To seeds and to all ever known, some at a time.
    fn announce(&mut self, effects: &mut Effects) {
        let known = self.foca.iter_membership_state().map(|member| *member.id());
        let seeds =
            self.seeds.iter().map(|s| Identity { id: s.id, address: s.address, boot_epoch: 0, renewal: 0 });
        let me = self.id();
        let targets: Vec<Identity> = seeds.chain(known).filter(|target| target.id != me).collect();
        let chosen: Vec<Identity> = targets.sample(&mut self.rng, ANNOUNCES_PER_TICK).copied().collect();
        for target in chosen {
            if self.foca.announce(target, &mut *effects).is_err() {
                self.stats.malformed += 1;
            }
        }
    }

    /// Asks some members for the members they know, until that brings nothing new.
    fn discover(&mut self, effects: &mut Effects) {
        let members = self.foca.num_members();
        self.quiet_ticks = if members > self.members_before { 0 } else { self.quiet_ticks + 1 };
        self.members_before = members;
        let all: Vec<Identity> = self.foca.iter_members().map(|member| *member.id()).collect();
        let chosen: Vec<Identity> = all.sample(&mut self.rng, ANNOUNCES_PER_TICK).copied().collect();
        for target in chosen {
            if self.foca.announce(target, &mut *effects).is_err() {
                self.stats.malformed += 1;
            }
        }
    }

    fn publish_if_due(&mut self, now: Duration) -> Result<(), AdvertError> {
        let Some(local) = self.local.clone() else { return Ok(()) };
        let members = self.foca.num_members();
        let due = self.published.as_ref().is_none_or(|(at, said)| {
            let pause = if said.says_the_same(&local) {
                self.timing.readvertise_every(members)
            } else {
                self.timing.advert_pause(members)
            };
            now.saturating_sub(*at) >= pause
        });
        if !due {
            return Ok(());
        }
        self.counter += 1;
        let bytes = self.signed(&local)?;
        self.published = Some((now, local));
        if self.foca.add_broadcast(&bytes).is_err() {
            self.stats.malformed += 1;
        }
        Ok(())
    }

    fn signed(&self, local: &LocalAdvert) -> Result<Vec<u8>, AdvertError> {
        let advert = Advert {
            boot_epoch: self.boot_epoch,
            counter: self.counter,
            api: local.api,
            region: local.region.clone(),
            version: local.version.clone(),
            measured_unix_ms: local.measured_unix_ms,
            capacity: local.capacity,
            free: local.free,
        };
        advert::encode(&self.card, &advert, &self.secret)
    }

    /// Asks members directly whose advert is missing or stale.
    fn repair(&mut self, now: Duration) -> Vec<Output> {
        let stale = self.timing.readvertise_every(self.foca.num_members()) * 2;
        let again = self.timing.tick * 3;
        let lacking: Vec<Identity> = {
            let book = self.book.lock();
            let lacks = |id: &NodeId| book.get(id).is_none_or(|heard| now.saturating_sub(heard.at) > stale);
            let may = |id: &NodeId| {
                self.records.get(id).and_then(|r| r.asked).is_none_or(|at| now.saturating_sub(at) >= again)
            };
            self.foca.iter_members().map(|m| *m.id()).filter(|m| lacks(&m.id) && may(&m.id)).collect()
        };
        let chosen: Vec<Identity> = lacking.sample(&mut self.rng, REPAIRS_PER_TICK).copied().collect();
        let mut outputs = Vec::new();
        for member in chosen {
            self.records.entry(member.id).or_default().asked = Some(now);
            outputs.extend(self.send_direct(&member, Word::AdvertWanted));
        }
        outputs
    }

    fn notice_suspects(&mut self, outputs: &mut Vec<Output>) {
        let mut states = HashMap::new();
        for member in self.foca.iter_membership_state() {
            states.insert(member.id().id, member.state());
        }
        self.records.retain(|id, _| states.contains_key(id));
        self.book.lock().retain(|id| states.contains_key(id));
        for (id, state) in states {
            let record = self.records.entry(id).or_default();
            let before = record.state.replace(state);
            if state == State::Suspect && before != Some(State::Suspect) {
                outputs.push(Output::Event(Event::PeerSuspect(id)));
            }
        }
    }

    /// Dissemination and patience grow with the logarithm of the size.
    fn fit_to_size(&mut self) {
        let members = self.foca.num_members().max(1);
        if (members > self.sized_for * 5 / 4 || members < self.sized_for / 2)
            && self.foca.set_config(self.timing.foca(members)).is_ok()
        {
            self.sized_for = members;
        }
    }
}

fn state_of(member: &Member<Identity>) -> PeerState {
    match member.state() {
        State::Alive => PeerState::Alive,
        State::Suspect => PeerState::Suspect,
        State::Down => PeerState::Dead,
    }
}
