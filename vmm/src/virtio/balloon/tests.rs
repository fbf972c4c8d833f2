use vm_memory::{Bytes, GuestAddress};

use super::super::testing::{Bench, Buffer, FakeReport};
use super::*;

const ALL: u64 = VIRTIO_BALLOON_F_STATS_VQ | VIRTIO_BALLOON_F_REPORTING | VIRTIO_BALLOON_F_DEFLATE_ON_OOM;
/// Where no queue of the bench is: from 8 MiB to 16 MiB.
const FREE: u64 = 8 << 20;
const REPORTING: usize = 4;

fn bench() -> (Bench<Balloon>, Arc<FakeReport>) {
    let report = Arc::new(FakeReport::default());
    (Bench::new(Balloon::new(report.clone()).unwrap(), ALL), report)
}

fn fill(bench: &Bench<Balloon>, start: u64, len: u64) {
    bench.memory.memory().write_slice(&vec![7; len as usize], GuestAddress(start)).unwrap();
}

/// Whether the page at `at` is empty.
fn empty(bench: &Bench<Balloon>, at: u64) -> bool {
    let byte: u8 = bench.memory.memory().read_obj(GuestAddress(at)).unwrap();
    byte == 0
}

fn frame_bytes(addresses: &[u64]) -> Vec<u8> {
    addresses.iter().flat_map(|at| ((at / FRAME_BYTES) as u32).to_le_bytes()).collect()
}

#[test]
fn inflating_returns_the_pages_named_and_no_others() {
    let (mut bench, _) = bench();
    fill(&bench, FREE, 16 * FRAME_BYTES);
    // In two chains, in disorder, one twice, and two that do not exist: in the hole and beyond memory.
    let first = frame_bytes(&[FREE + 3 * FRAME_BYTES, FREE + FRAME_BYTES, 4 << 20, 1 << 40]);
    let second = frame_bytes(&[FREE + 2 * FRAME_BYTES, FREE + 5 * FRAME_BYTES, FREE + FRAME_BYTES]);
    for frames in [first, second] {
        let buffer = bench.queues[0].readable(&frames);
        bench.queues[0].push(&[buffer]);
    }
    bench.kick(0);
    assert_eq!(bench.queues[0].used(), [(0, 0), (1, 0)]);
    let gone: Vec<u64> = (0..16).filter(|index| empty(&bench, FREE + index * FRAME_BYTES)).collect();
    assert_eq!(gone, [1, 2, 3, 5]);
    assert_eq!(bench.interrupts.broken(), None);
    let buffer = bench.queues[1].readable(&frame_bytes(&[FREE + FRAME_BYTES]));
    bench.queues[1].push(&[buffer]);
    bench.kick(1);
    assert_eq!(bench.queues[1].used(), [(0, 0)]);
}

#[test]
fn pages_that_go_back_later_have_gone_when_the_driver_pauses_or_deflates() {
    let (mut bench, _) = bench();
    bench.restart(ALL | VIRTIO_BALLOON_F_MUST_TELL_HOST);
    fill(&bench, FREE, 4 * FRAME_BYTES);
    let inflate = |bench: &mut Bench<Balloon>, page: u64| {
        let buffer = bench.queues[0].readable(&frame_bytes(&[FREE + page * FRAME_BYTES]));
        bench.queues[0].push(&[buffer]);
        bench.kick(0);
        assert_eq!(bench.queues[0].used().len(), 1, "answered at once");
    };
    inflate(&mut bench, 0);
    bench.until("the pause is over", |bench| empty(bench, FREE));
    inflate(&mut bench, 1);
    let buffer = bench.queues[1].readable(&frame_bytes(&[FREE + FRAME_BYTES]));
    bench.queues[1].push(&[buffer]);
    bench.kick(1);
    assert!(empty(&bench, FREE + FRAME_BYTES));
    fill(&bench, FREE + FRAME_BYTES, 1);
    inflate(&mut bench, 2);
    bench.device.reset();
    assert!(!empty(&bench, FREE + FRAME_BYTES) && !empty(&bench, FREE + 2 * FRAME_BYTES));
}

#[test]
fn reported_ranges_go_back_as_far_as_they_are_whole_pages_of_memory() {
    let (mut bench, _) = bench();
    fill(&bench, FREE, 8 << 20);
    fill(&bench, (4 << 20) - FRAME_BYTES, FRAME_BYTES);
    let range = |addr: u64, len: u64| Buffer { addr, len: len as u32, writable: true };
    bench.queues[REPORTING].push(&[
        range(FREE + 2 * FRAME_BYTES, 2 << 20),
        range((4 << 20) - FRAME_BYTES, 3 << 20),
        range(u64::MAX - 4096, 8192),
        range(FREE + (4 << 20) + 1, 2 * FRAME_BYTES),
    ]);
    bench.kick(REPORTING);
    assert_eq!(bench.queues[REPORTING].used(), [(0, 0)]);
    assert!(!empty(&bench, FREE + FRAME_BYTES) && empty(&bench, FREE + 2 * FRAME_BYTES));
    assert!(!empty(&bench, FREE + (2 << 20) + 2 * FRAME_BYTES), "its end");
    assert!(empty(&bench, (4 << 20) - FRAME_BYTES), "up to the hole");
    assert!(!empty(&bench, FREE + (4 << 20)) && empty(&bench, FREE + (4 << 20) + FRAME_BYTES));
    assert!(!empty(&bench, FREE + (4 << 20) + 2 * FRAME_BYTES));
    assert_eq!(bench.interrupts.broken(), None);
}

#[test]
fn target_and_account_meet_in_the_configuration() {
    let (mut bench, report) = bench();
    bench.device.set_target(3 * FRAME_BYTES).unwrap();
    assert_eq!(bench.interrupts.config_count(), 1);
    let before = report.changes();
    bench.device.write_config(4, &2u32.to_le_bytes());
    bench.device.write_config(4, &2u32.to_le_bytes());
    bench.device.write_config(0, &9u32.to_le_bytes());
    assert_eq!(report.changes(), before + 1);
    let mut config = [0xff; 16];
    bench.device.read_config(0, &mut config);
    assert_eq!(config, [3, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let state = bench.device.look();
    assert_eq!((state.target, state.actual, state.driver), (3 * FRAME_BYTES, 2 * FRAME_BYTES, true));
    bench.device.reset();
    let state = bench.device.look();
    assert_eq!((state.target, state.actual, state.driver), (3 * FRAME_BYTES, 0, false));
    assert!(bench.device.set_target(1).is_err());
    assert!(bench.device.set_target(16 << 40).is_err());
}

#[test]
fn a_target_is_unread_until_its_driver_has_read_it() {
    let (mut bench, report) = bench();
    let look = |bench: &Bench<Balloon>| bench.device.read_config(CONFIG_TARGET, &mut [0; 4]);
    assert!(!bench.device.look().unread, "it will read it");
    bench.device.set_target(3 * FRAME_BYTES).unwrap();
    assert!(bench.device.look().unread);
    look(&bench);
    bench.device.write_config(CONFIG_ACTUAL, &2u32.to_le_bytes());
    // While it is at it: what it holds is what it shall hold, but it does not know and goes on.
    bench.device.set_target(2 * FRAME_BYTES).unwrap();
    let state = bench.device.look();
    assert!(state.actual == state.target && state.unread);
    let before = report.changes();
    bench.device.read_config(CONFIG_ACTUAL, &mut [0; 4]);
    assert!(bench.device.look().unread && report.changes() == before, "that is something else");
    look(&bench);
    look(&bench);
    assert!(!bench.device.look().unread && report.changes() == before + 1);
    bench.device.set_target(2 * FRAME_BYTES).unwrap();
    assert!(!bench.device.look().unread, "a reminder");
    bench.device.set_target(4 * FRAME_BYTES).unwrap();
    assert!(bench.device.look().unread);
    bench.restart(ALL);
    assert!(!bench.device.look().unread, "nobody is on the way to anything");
}

#[test]
fn statistics_come_when_they_are_asked_for() {
    let (mut bench, _) = bench();
    let send = |bench: &mut Bench<Balloon>, free: u64| {
        let stat = [&4u16.to_le_bytes()[..], &free.to_le_bytes()].concat();
        let buffer = bench.queues[2].readable(&stat);
        bench.queues[2].push(&[buffer]);
        bench.kick(2);
    };
    send(&mut bench, 11);
    assert_eq!(bench.queues[2].used(), [], "the buffer stays until somebody asks");
    assert_eq!(bench.device.look().guest.unwrap().free_bytes, 11);
    bench.settle();
    assert_eq!(bench.queues[2].used(), [(0, 0)]);
    send(&mut bench, 12);
    assert_eq!(bench.device.look().guest.unwrap().free_bytes, 12);
    bench.settle();
    assert_eq!(bench.queues[2].used(), [], "they are fresh");
    send(&mut bench, 13);
    assert_eq!(bench.queues[2].used(), [(1, 0)], "there can be one");
}

#[test]
fn a_chain_beyond_all_measure_stops_the_device() {
    let (mut bench, _) = bench();
    let huge = Buffer { addr: 5 << 20, len: 4 * MAX_CHAIN_FRAMES as u32 + 4, writable: false };
    bench.queues[0].push(&[huge]);
    bench.kick(0);
    assert!(bench.interrupts.broken().is_some());
    assert!(!bench.device.look().driver);
}
