//! Many nodes in virtual time on a network that delays, loses, duplicates and parts.

#![allow(dead_code, clippy::unwrap_used, reason = "each test file uses a part; tests may panic")]

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use lathe_gossip::{
    Amounts, CaPublicKey, Event, GossipKey, Keyring, LocalAdvert, Node, NodeCard, NodeConfig, NodeId, Output,
    PeerState, SecretKey, Seed, Timer, Timing,
};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

pub const CA_SEED: [u8; 32] = [200; 32];
pub const CLUSTER_KEY: [u8; 32] = [7; 32];

pub fn address(index: usize) -> SocketAddr {
    let [_, _, high, low] = u32::try_from(index + 1).unwrap().to_be_bytes();
    (Ipv4Addr::new(10, 0, high, low), 7946).into()
}

pub fn node_seed(index: usize) -> [u8; 32] {
    let mut seed = [42; 32];
    seed[..8].copy_from_slice(&(index as u64).to_le_bytes());
    seed
}

pub fn id(index: usize) -> NodeId {
    NodeId::of(&SecretKey::from_seed(&node_seed(index)).unwrap().public_key())
}

pub fn config(index: usize, boot_epoch: u64, key: [u8; 32]) -> NodeConfig {
    let ca = SecretKey::from_seed(&CA_SEED).unwrap();
    let secret = SecretKey::from_seed(&node_seed(index)).unwrap();
    NodeConfig {
        card: NodeCard::issue(&format!("host-{index}"), secret.public_key(), &ca).unwrap(),
        secret,
        ca: CaPublicKey(ca.public_key()),
        keys: Keyring::new(GossipKey::new(key)),
        address: address(index),
        boot_epoch,
        timing: Timing::default(),
    }
}

pub fn local(index: usize, free_cpu: u64) -> LocalAdvert {
    let amounts = |cpu_milli| Amounts {
        cpu_milli,
        memory_bytes: 1 << 34,
        net_bit_s: 1_000_000_000,
        disk_bytes: 1 << 40,
    };
    LocalAdvert {
        api: address(index),
        region: "eu-1".into(),
        version: "0.1.0".into(),
        measured_unix_ms: 1,
        capacity: amounts(8_000),
        free: amounts(free_cpu),
    }
}

enum What {
    Datagram { from: usize, to: SocketAddr, bytes: Vec<u8> },
    Timer { node: usize, life: u64, timer: Timer },
}

struct Due {
    at: Duration,
    number: u64,
    what: What,
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

pub struct World {
    pub now: Duration,
    pub nodes: Vec<Option<Node>>,
    pub loss: f64,
    /// Nodes below this index cannot talk to the others.
    pub parted_at: Option<usize>,
    pub largest: usize,
    pub recorded: Vec<(SocketAddr, Vec<u8>)>,
    pub record: bool,
    lives: Vec<u64>,
    queue: BinaryHeap<Reverse<Due>>,
    number: u64,
    rng: StdRng,
}

impl World {
    pub fn new(loss: f64, seed: u64) -> Self {
        Self {
            now: Duration::from_secs(1),
            nodes: Vec::new(),
            loss,
            parted_at: None,
            largest: 0,
            recorded: Vec::new(),
            record: false,
            lives: Vec::new(),
            queue: BinaryHeap::new(),
            number: 0,
            rng: StdRng::seed_from_u64(seed),
        }
    }

    /// Starts a node, or a new life of it, that knows the given ones.
    pub fn start(&mut self, index: usize, seeds: &[usize]) {
        let boot_epoch = self.lives.get(index).copied().unwrap_or(0) + 1;
        self.insert(index, config(index, boot_epoch, CLUSTER_KEY), seeds);
    }

    pub fn insert(&mut self, index: usize, config: NodeConfig, seeds: &[usize]) {
        if self.nodes.len() <= index {
            self.nodes.resize_with(index + 1, || None);
            self.lives.resize(index + 1, 0);
        }
        self.lives[index] += 1;
        let mut node = Node::new(config, node_seed(index)).unwrap();
        let seeds: Vec<Seed> =
            seeds.iter().map(|seed| Seed { id: id(*seed), address: address(*seed) }).collect();
        node.set_advert(self.now, local(index, 1_000 + index as u64)).unwrap();
        let mut outputs = node.start(self.now);
        outputs.append(&mut node.join(self.now, &seeds));
        self.nodes[index] = Some(node);
        self.carry_out(index, outputs);
    }

    pub fn kill(&mut self, index: usize) {
        self.nodes[index] = None;
    }

    pub fn leave(&mut self, index: usize) {
        let outputs = self.nodes[index].as_mut().unwrap().leave(self.now);
        self.carry_out(index, outputs);
        self.nodes[index] = None;
    }

    pub fn advertise(&mut self, index: usize, free_cpu: u64) {
        let now = self.now;
        self.nodes[index].as_mut().unwrap().set_advert(now, local(index, free_cpu)).unwrap();
    }

    fn push(&mut self, at: Duration, what: What) {
        self.number += 1;
        self.queue.push(Reverse(Due { at, number: self.number, what }));
    }

    fn carry_out(&mut self, index: usize, outputs: Vec<Output>) {
        for output in outputs {
            match output {
                Output::Send { to, bytes } => {
                    self.largest = self.largest.max(bytes.len());
                    if self.record {
                        self.recorded.push((to, bytes.clone()));
                    }
                    if self.rng.random_bool(self.loss) {
                        continue;
                    }
                    let delay = Duration::from_micros(self.rng.random_range(200..2_000));
                    self.push(self.now + delay, What::Datagram { from: index, to, bytes });
                }
                Output::SetTimer { after, timer } => {
                    let life = self.lives[index];
                    self.push(self.now + after, What::Timer { node: index, life, timer });
                }
                Output::Event(event) => {
                    if let Event::PeerUp(id) | Event::PeerDown(id) | Event::PeerSuspect(id) = event {
                        assert_ne!(Some(id), self.nodes[index].as_ref().map(Node::id));
                    }
                }
            }
        }
    }

    fn index_of(&self, to: SocketAddr) -> Option<usize> {
        let IpAddr::V4(ip) = to.ip() else { return None };
        let index = usize::try_from(u32::from(ip) & 0xffff).unwrap().checked_sub(1)?;
        (index < self.nodes.len()).then_some(index)
    }

    /// Gives any bytes to a node, as from the network.
    pub fn inject(&mut self, to: usize, bytes: &[u8]) {
        let now = self.now;
        if let Some(node) = &mut self.nodes[to] {
            let outputs = node.handle_datagram(now, address(9_999), bytes);
            self.carry_out(to, outputs);
        }
    }

    pub fn run_for(&mut self, time: Duration) {
        let end = self.now + time;
        while self.queue.peek().is_some_and(|Reverse(due)| due.at <= end) {
            let Some(Reverse(due)) = self.queue.pop() else { break };
            self.now = due.at;
            match due.what {
                What::Datagram { from, to, bytes } => {
                    let Some(to) = self.index_of(to) else { continue };
                    if self.parted_at.is_some_and(|at| (from < at) != (to < at)) {
                        continue;
                    }
                    let Some(node) = &mut self.nodes[to] else { continue };
                    let outputs = node.handle_datagram(self.now, address(from), &bytes);
                    self.carry_out(to, outputs);
                }
                What::Timer { node: index, life, timer } => {
                    if self.lives[index] != life {
                        continue;
                    }
                    let Some(node) = &mut self.nodes[index] else { continue };
                    let outputs = node.handle_timer(self.now, timer);
                    self.carry_out(index, outputs);
                }
            }
        }
        self.now = end;
    }

    /// Runs until the condition holds, at most so long. Gives the time that it took, to a quarter second.
    pub fn run_until(&mut self, what: &str, most: Duration, condition: impl Fn(&Self) -> bool) -> Duration {
        let begin = self.now;
        while !condition(self) {
            assert!(self.now - begin < most, "not within {most:?}: {what}");
            self.run_for(Duration::from_millis(250));
        }
        self.now - begin
    }

    pub fn alive(&self) -> Vec<usize> {
        (0..self.nodes.len()).filter(|index| self.nodes[*index].is_some()).collect()
    }

    /// Whether each node in the list sees all the others in it alive.
    pub fn see_each_other(&self, indices: &[usize]) -> bool {
        indices.iter().rev().all(|index| self.count(*index, PeerState::Alive) >= indices.len() - 1)
    }

    pub fn count(&self, index: usize, state: PeerState) -> usize {
        let Some(node) = &self.nodes[index] else { return 0 };
        node.peer_states().filter(|(_, known)| *known == state).count()
    }

    /// Whether all know the advert of `of` to say this.
    pub fn all_know_free_cpu(&self, of: usize, free_cpu: u64) -> bool {
        self.alive()
            .into_iter()
            .filter(|index| *index != of)
            .all(|index| self.free_cpu(index, of) == Some(free_cpu))
    }

    pub fn free_cpu(&self, at: usize, of: usize) -> Option<u64> {
        let peers = self.nodes[at].as_ref()?.peers(self.now);
        let peer = peers.into_iter().find(|peer| peer.address == address(of))?;
        Some(peer.advert?.0.free.cpu_milli)
    }

    pub fn everybody_knows_every_advert(&self) -> bool {
        let alive = self.alive();
        alive.iter().all(|at| {
            let peers = self.nodes[*at].as_ref().unwrap().peers(self.now);
            peers.iter().filter(|p| p.state == PeerState::Alive && p.advert.is_some()).count()
                == alive.len() - 1
        })
    }
}
