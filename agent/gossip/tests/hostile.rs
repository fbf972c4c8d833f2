//! Who has no key is not heard; who has one cannot forge adverts; nothing that arrives ends the process.

mod common;

use std::time::Duration;

use common::{CA_SEED, CLUSTER_KEY, World, address, config, local};
use lathe_gossip::{
    CaPublicKey, CardError, GossipKey, MAX_DATAGRAM, Node, NodeCard, NodeConfig, NodeError, Output,
    SecretKey, Seed,
};
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

fn pair() -> World {
    let mut world = World::new(0.0, 1);
    world.start(0, &[]);
    world.start(1, &[0]);
    world.run_until("they see each other", Duration::from_secs(5), |w| w.see_each_other(&[0, 1]));
    world.run_until("and their adverts", Duration::from_secs(5), World::everybody_knows_every_advert);
    world
}

#[test]
fn a_node_with_another_key_is_not_heard() {
    let mut world = pair();
    world.insert(2, config(2, 1, [8; 32]), &[0, 1]);
    world.run_for(Duration::from_secs(30));
    for at in [0, 1] {
        let node = world.nodes[at].as_ref().unwrap();
        assert_eq!(node.peers(world.now).len(), 1, "the stranger was noticed");
        assert!(node.stats().unknown_key > 0);
    }
    assert!(world.nodes[2].as_ref().unwrap().peers(world.now).is_empty());
}

#[test]
fn a_member_without_this_cas_card_has_no_advert() {
    let mut world = pair();
    let other_ca = SecretKey::from_seed(&[77; 32]).unwrap();
    let good = config(2, 9, CLUSTER_KEY);
    let card = NodeCard::issue("host-0", good.secret.public_key(), &other_ca).unwrap();
    let forged = NodeConfig { card, ca: CaPublicKey(other_ca.public_key()), ..good };
    world.insert(2, forged, &[0, 1]);
    world.run_for(Duration::from_secs(30));
    assert_eq!(world.free_cpu(0, 2), None);
    let node = world.nodes[0].as_ref().unwrap();
    assert!(node.stats().malformed > 0);
    assert!(node.peers(world.now).iter().all(|peer| peer.name.as_deref() != Some("host-0")));
    assert_eq!(world.free_cpu(0, 1), Some(1_001), "the others are heard as before");
}

#[test]
fn what_was_recorded_is_not_heard_again() {
    let mut world = pair();
    world.record = true;
    world.advertise(1, 5);
    world.run_for(Duration::from_secs(5));
    world.advertise(1, 6);
    world.run_for(Duration::from_secs(5));
    world.record = false;
    let recorded = std::mem::take(&mut world.recorded);
    assert!(recorded.len() > 20);
    let heard = |world: &World| world.nodes[0].as_ref().unwrap().stats().heard;
    let before = heard(&world);
    for (_, bytes) in &recorded {
        world.inject(0, bytes);
    }
    assert_eq!(heard(&world), before);
    assert_eq!(world.free_cpu(0, 1), Some(6));

    world.kill(1);
    world.start(0, &[]);
    for (to, bytes) in &recorded {
        if *to == address(0) {
            world.inject(0, bytes);
        }
    }
    assert_eq!(world.free_cpu(0, 1), None, "a restarted node takes nothing from recorded datagrams");
}

#[test]
fn mutilated_and_random_datagrams_change_nothing() {
    let mut world = pair();
    world.record = true;
    world.run_for(Duration::from_secs(10));
    world.record = false;
    let recorded = std::mem::take(&mut world.recorded);
    let mut rng = StdRng::seed_from_u64(3);
    let mut count = 0;
    for round in 0..20_000 {
        let (_, bytes) = &recorded[rng.random_range(0..recorded.len())];
        let mut bytes = bytes.clone();
        match round % 4 {
            0 => bytes.truncate(rng.random_range(0..bytes.len())),
            1 => bytes.extend((0..rng.random_range(1..2_000)).map(|_| rng.random::<u8>())),
            2 => (0..rng.random_range(1..8)).for_each(|_| {
                let at = rng.random_range(0..bytes.len());
                bytes[at] ^= rng.random_range(1..=255u8);
            }),
            _ => bytes = (0..rng.random_range(0..2_000)).map(|_| rng.random()).collect(),
        }
        world.inject(0, &bytes);
        count += 1;
    }
    let stats = world.nodes[0].as_ref().unwrap().stats();
    println!("{count} bad datagrams: {stats:?}");
    assert_eq!(stats.malformed + stats.over_capacity, 0, "none of them may open");
    assert!(stats.forged > 1_000 && stats.bad_size > 1_000);
    world.run_for(Duration::from_secs(20));
    assert!(world.see_each_other(&[0, 1]));
    assert_eq!(world.nodes[0].as_ref().unwrap().peers(world.now).len(), 1);
}

#[test]
fn a_node_needs_its_own_card_key_and_address() {
    let make = |config| Node::new(config, [0; 32]).err();
    let good = || config(0, 1, CLUSTER_KEY);
    assert_eq!(make(good()), None);
    let other = config(1, 1, CLUSTER_KEY);
    assert!(matches!(
        make(NodeConfig { secret: other.secret, ..good() }),
        Some(NodeError::KeyMismatch { .. })
    ));
    let foreign = NodeConfig { ca: CaPublicKey([3; 32]), ..good() };
    assert_eq!(make(foreign), Some(NodeError::Card(CardError::Signature)));
    for bad in ["0.0.0.0:7946", "10.0.0.1:0", "224.0.0.1:7946", "[::]:7946"] {
        let address = bad.parse().unwrap();
        assert_eq!(make(NodeConfig { address, ..good() }), Some(NodeError::Address(address)));
    }
    assert!(SecretKey::from_pkcs8(b"junk").is_err());
    assert_eq!(CA_SEED.len(), 32);
}

#[test]
fn words_that_are_too_long_are_refused() {
    let mut node = Node::new(config(0, 1, CLUSTER_KEY), [0; 32]).unwrap();
    let mut advert = local(0, 1);
    advert.region = "x".repeat(33);
    assert!(node.set_advert(Duration::ZERO, advert).is_err());
}

/// A datagram of a member that seals whatever it likes: from a node whose sealer is reached through its `join`.
fn sealed_by_member(payload: &[u8]) -> Vec<u8> {
    lathe_gossip::seal::seal_for_tests(&GossipKey::new(CLUSTER_KEY), member_id(), 1, payload)
}

fn member_id() -> lathe_gossip::NodeId {
    config(5, 1, CLUSTER_KEY).card.id()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]
    /// With the key in hand, any plaintext may come: no panic, nothing sent to nowhere, bounded memory.
    #[test]
    fn a_hostile_member_ends_nobody(kind in 0u8..3, body in proptest::collection::vec(any::<u8>(), 0..1_300)) {
        let mut node = Node::new(config(0, 1, CLUSTER_KEY), [0; 32]).unwrap();
        node.start(Duration::ZERO);
        let plaintext = [&[kind][..], &body].concat();
        let outputs = node.handle_datagram(Duration::from_secs(1), address(5), &sealed_by_member(&plaintext));
        for output in outputs {
            if let Output::Send { to, bytes } = output {
                prop_assert!(to.port() != 0 && bytes.len() <= MAX_DATAGRAM);
            }
        }
        prop_assert!(node.peers(Duration::from_secs(1)).len() <= 64);
    }
}

#[test]
fn truncated_and_altered_plaintexts_of_a_member_end_nobody() {
    let mut world = pair();
    let mut rng = StdRng::seed_from_u64(11);
    let plaintexts = lathe_gossip::seal::open_all_for_tests(&GossipKey::new(CLUSTER_KEY), {
        world.record = true;
        world.advertise(1, 9);
        world.run_for(Duration::from_secs(6));
        world.record = false;
        world.recorded.iter().map(|(_, bytes)| bytes.clone()).collect()
    });
    assert!(plaintexts.len() > 10);
    let mut node = Node::new(config(0, 1, CLUSTER_KEY), [0; 32]).unwrap();
    node.start(Duration::ZERO);
    let seed = Seed { id: member_id(), address: address(5) };
    node.join(Duration::ZERO, &[seed]);
    for epoch in 1..3_000u64 {
        let mut plaintext = plaintexts[rng.random_range(0..plaintexts.len())].clone();
        for _ in 0..rng.random_range(0..4) {
            let at = rng.random_range(0..plaintext.len());
            plaintext[at] ^= rng.random_range(1..=255u8);
        }
        plaintext.truncate(rng.random_range(1..=plaintext.len()));
        let sender = world.nodes[1].as_ref().unwrap().id();
        let datagram =
            lathe_gossip::seal::seal_for_tests(&GossipKey::new(CLUSTER_KEY), sender, epoch, &plaintext);
        node.handle_datagram(Duration::from_millis(epoch), address(1), &datagram);
    }
    assert!(node.stats().malformed > 1_000);
    assert!(node.members_active() < 64);
}
