//! Hundreds of nodes in virtual time: joining, loss, death, partition, restart. Prints what it measured.

mod common;

use std::time::{Duration, Instant};

use common::{World, id};
use lathe_gossip::PeerState;

const NODES: usize = 200;
const LOSS: f64 = 0.05;

fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

#[test]
fn two_hundred_nodes_find_each_other_notice_death_and_heal() {
    let begun = Instant::now();
    let mut world = World::new(LOSS, 1);
    (0..NODES).for_each(|index| world.start(index, &[0]));
    let all: Vec<usize> = (0..NODES).collect();
    let joined = world.run_until("all see all", secs(30), |w| w.see_each_other(&all));
    let known = world.run_until("all know all adverts", secs(60), World::everybody_knows_every_advert);

    let (sent_before, time_before) = (total_sent(&world), world.now);
    world.run_for(secs(10));
    let per_second = (world.now - time_before).as_secs_f64() * NODES as f64;
    let (datagrams, bytes) = total_sent(&world);
    let rate = ((datagrams - sent_before.0) as f64 / per_second, (bytes - sent_before.1) as f64 / per_second);

    world.advertise(17, 123);
    let spread =
        world.run_until("a changed advert is known to all", secs(30), |w| w.all_know_free_cpu(17, 123));

    world.kill(3);
    let third = id(3);
    let noticed = world.run_until("the dead one is noticed by all", secs(40), |w| {
        w.alive().into_iter().all(|at| {
            w.nodes[at]
                .as_ref()
                .unwrap()
                .peer_states()
                .any(|(id, state)| id == third && state == PeerState::Dead)
        })
    });
    let wrongly: usize = world.alive().into_iter().map(|at| world.count(at, PeerState::Dead) - 1).sum();
    assert_eq!(wrongly, 0, "living nodes counted dead");

    world.start(3, &[0]);
    let back = world.run_until("a restarted one is back", secs(30), |w| w.see_each_other(&all));
    println!(
        "{NODES} nodes, {:.0} % loss: all see all {joined:?}, all adverts known +{known:?}, idle traffic per node {:.1} datagrams/s {:.0} B/s, \
         change known to all {spread:?}, death known to all {noticed:?}, restarted one back {back:?}; largest datagram {} B; real time {:.1?}",
        LOSS * 100.0,
        rate.0,
        rate.1,
        world.largest,
        begun.elapsed()
    );
    assert!(world.largest <= lathe_gossip::MAX_DATAGRAM);
}

fn total_sent(world: &World) -> (u64, u64) {
    world
        .nodes
        .iter()
        .flatten()
        .map(|n| n.stats())
        .fold((0, 0), |sum, s| (sum.0 + s.sent, sum.1 + s.sent_bytes))
}

#[test]
fn a_parted_cluster_becomes_one_again() {
    let mut world = World::new(LOSS, 2);
    const SIZE: usize = 60;
    (0..SIZE).for_each(|index| world.start(index, &[0]));
    let all: Vec<usize> = (0..SIZE).collect();
    world.run_until("all see all", secs(30), |w| w.see_each_other(&all));
    world.parted_at = Some(SIZE / 3);
    let parted = world.run_until("each side counts the other dead", secs(90), |w| {
        (0..SIZE)
            .all(|at| w.count(at, PeerState::Dead) == if at < SIZE / 3 { SIZE - SIZE / 3 } else { SIZE / 3 })
    });
    world.parted_at = None;
    let healed = world.run_until("all see all again", secs(90), |w| w.see_each_other(&all));
    println!("{SIZE} nodes, {:.0} % loss: parted after {parted:?}, healed after {healed:?}", LOSS * 100.0);
}

#[test]
fn two_nodes_find_each_other_again_from_both_orders_of_start() {
    let mut world = World::new(0.0, 3);
    world.start(0, &[1]);
    world.run_for(secs(5));
    world.start(1, &[0]);
    let joined = world.run_until("they see each other", secs(5), |w| w.see_each_other(&[0, 1]));
    let known = world.run_until("and their adverts", secs(5), World::everybody_knows_every_advert);
    world.run_until("and measure the way", secs(5), |w| {
        w.nodes[0].as_ref().unwrap().peers(w.now).iter().all(|peer| peer.rtt.is_some_and(|rtt| rtt < secs(1)))
    });
    world.parted_at = Some(1);
    world.run_until("each thinks the other dead", secs(20), |w| {
        w.count(0, PeerState::Dead) == 1 && w.count(1, PeerState::Dead) == 1
    });
    world.parted_at = None;
    let healed = world.run_until("they see each other again", secs(20), |w| w.see_each_other(&[0, 1]));
    world.leave(1);
    let left = world.run_until("one left", secs(3), |w| w.count(0, PeerState::Dead) == 1);
    world.start(1, &[0]);
    let back = world.run_until("and came back", secs(5), |w| w.see_each_other(&[0, 1]));
    println!(
        "2 nodes: joined {joined:?}, adverts +{known:?}, healed {healed:?}, leaving known {left:?}, back {back:?}"
    );
}

#[test]
fn a_late_comer_learns_of_everybody() {
    let mut world = World::new(LOSS, 4);
    const SIZE: usize = 120;
    (0..SIZE).for_each(|index| world.start(index, &[0]));
    world.run_until("all see all", secs(30), |w| w.see_each_other(&(0..SIZE).collect::<Vec<_>>()));
    world.run_for(secs(60));
    world.start(SIZE, &[5]);
    let everybody = world.run_until("it sees all", secs(30), |w| w.count(SIZE, PeerState::Alive) == SIZE);
    let adverts = world.run_until("and all adverts are known", secs(30), World::everybody_knows_every_advert);
    println!("late comer to {SIZE}: sees all after {everybody:?}, adverts +{adverts:?}");
}
