use std::io;

use proptest::prelude::*;

use super::super::testing::{Bench, Buffer, FakeReport};
use super::*;
use crate::hotmem::{Host, RangeSet};

const START: u64 = 1 << 32;
const LIMIT: u64 = 32 * BLOCK_BYTES;
const BYTES: u64 = 64 * BLOCK_BYTES;

/// A host on which everything works until it does not.
#[derive(Default)]
struct Yielding {
    fails_at: Option<u64>,
}

impl Host for Yielding {
    fn open(&mut self, range: &Range<u64>) -> io::Result<()> {
        match self.fails_at {
            Some(at) if range.contains(&at) => Err(io::Error::from_raw_os_error(libc::ENOMEM)),
            _ => Ok(()),
        }
    }

    fn close(&mut self, _range: &Range<u64>) -> io::Result<()> {
        Ok(())
    }

    fn discard(&mut self, _range: &Range<u64>) -> io::Result<()> {
        Ok(())
    }

    fn add_slot(&mut self, _slot: u64, _range: &Range<u64>) -> io::Result<()> {
        Ok(())
    }

    fn remove_slot(&mut self, _slot: u64) -> io::Result<()> {
        Ok(())
    }

    fn publish(&mut self, _plugged: &RangeSet) -> io::Result<()> {
        Ok(())
    }
}

fn bench_on(host: Yielding) -> (Bench<MemDevice>, Arc<FakeReport>) {
    let report = Arc::new(FakeReport::default());
    let device = MemDevice::new(Region::new(BYTES, Box::new(host)), START, LIMIT, report.clone());
    (Bench::new(device, VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE), report)
}

fn bench() -> Bench<MemDevice> {
    bench_on(Yielding::default()).0
}

/// Sends a request; the reply and the state.
fn ask(bench: &mut Bench<MemDevice>, kind: u16, address: u64, blocks: u16) -> (u16, u16) {
    let mut request = [0; REQUEST_BYTES];
    request[..2].copy_from_slice(&kind.to_le_bytes());
    request[8..16].copy_from_slice(&address.to_le_bytes());
    request[16..18].copy_from_slice(&blocks.to_le_bytes());
    let queue = &mut bench.queues[0];
    queue.recycle();
    let (request, response) = (queue.readable(&request), queue.writable(RESPONSE_BYTES as u32));
    let head = queue.push(&[request, response]);
    bench.kick(0);
    assert_eq!(bench.queues[0].used(), [(u32::from(head), RESPONSE_BYTES as u32)]);
    let answer = bench.queues[0].read(response);
    (u16::from_le_bytes([answer[0], answer[1]]), u16::from_le_bytes([answer[8], answer[9]]))
}

fn reply(bench: &mut Bench<MemDevice>, kind: u16, address: u64, blocks: u16) -> u16 {
    ask(bench, kind, address, blocks).0
}

/// Reads what is requested, as Linux does between two runs: in two halves, from below.
fn look(bench: &mut Bench<MemDevice>) -> u64 {
    let mut requested = [0; 8];
    bench.device.read_config(CONFIG_REQUESTED, &mut requested[..4]);
    bench.device.read_config(CONFIG_REQUESTED + 4, &mut requested[4..]);
    u64::from_le_bytes(requested)
}

const ACK: u16 = Reply::Ack as u16;
const NACK: u16 = Reply::Nack as u16;
const BUSY: u16 = Reply::Busy as u16;
const ERROR: u16 = Reply::Error as u16;

#[test]
fn a_driver_plugs_what_is_requested_and_no_more() {
    let mut bench = bench();
    assert_eq!(reply(&mut bench, PLUG, START, 1), NACK, "nothing is requested");
    bench.device.set_requested(4 * BLOCK_BYTES).unwrap();
    assert_eq!(bench.interrupts.config_count(), 1);
    assert_eq!(reply(&mut bench, PLUG, START, 5), NACK);
    assert_eq!(reply(&mut bench, PLUG, START + BLOCK_BYTES, 4), ACK);
    assert_eq!(reply(&mut bench, PLUG, START, 1), NACK);
    assert_eq!(ask(&mut bench, STATE, START, 1), (ACK, STATE_UNPLUGGED));
    assert_eq!(ask(&mut bench, STATE, START, 2), (ACK, STATE_MIXED));
    assert_eq!(ask(&mut bench, STATE, START + BLOCK_BYTES, 4), (ACK, STATE_PLUGGED));
    assert_eq!(look(&mut bench), 4 * BLOCK_BYTES);
    assert_eq!(reply(&mut bench, UNPLUG, START + BLOCK_BYTES, 1), ACK);
    assert_eq!(reply(&mut bench, UNPLUG, START + BLOCK_BYTES, 2), ERROR, "it has the second only");
    let (requested, plugged) = (4 * BLOCK_BYTES, 3 * BLOCK_BYTES);
    let state = MemState { limit: LIMIT, requested, plugged, driver: true, unread: false };
    assert_eq!(bench.device.state(), state);
    assert_eq!(reply(&mut bench, UNPLUG_ALL, 7, 9), ACK);
    assert_eq!(bench.device.state().plugged, 0);
}

#[test]
fn nonsense_is_an_error_and_changes_nothing() {
    let mut bench = bench();
    bench.device.set_requested(LIMIT).unwrap();
    for kind in [PLUG, UNPLUG, STATE] {
        for (address, blocks) in [
            (START, 0),
            (START + 4096, 1),
            (START - BLOCK_BYTES, 1),
            (0, 1),
            (START + BYTES, 1),
            (START + BYTES - BLOCK_BYTES, 2),
            (START, u16::MAX),
            (!(BLOCK_BYTES - 1), 2),
        ] {
            assert_eq!(reply(&mut bench, kind, address, blocks), ERROR, "{kind} {address:#x} {blocks}");
        }
    }
    assert_eq!(reply(&mut bench, 4, START, 1), ERROR);
    assert_eq!(reply(&mut bench, PLUG, START, 2), ACK);
    assert_eq!(reply(&mut bench, PLUG, START + BLOCK_BYTES, 2), ERROR, "it has the first already");
    assert_eq!(bench.device.state().plugged, 2 * BLOCK_BYTES);
}

#[test]
fn a_host_that_cannot_is_busy() {
    let (mut bench, report) = bench_on(Yielding { fails_at: Some(BLOCK_BYTES) });
    bench.device.set_requested(LIMIT).unwrap();
    let before = report.changes();
    assert_eq!(reply(&mut bench, PLUG, START, 2), BUSY);
    assert_eq!((bench.device.state().plugged, report.changes()), (0, before));
    assert_eq!(reply(&mut bench, PLUG, START, 1), ACK);
    assert_eq!(report.changes(), before + 1);
}

#[test]
fn a_reset_keeps_what_is_plugged_and_a_withdrawal_keeps_what_is_requested() {
    let mut bench = bench();
    bench.device.set_requested(LIMIT).unwrap();
    assert_eq!(reply(&mut bench, PLUG, START, 3), ACK);
    bench.restart(VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE);
    assert_eq!(ask(&mut bench, STATE, START, 3), (ACK, STATE_PLUGGED));
    bench.device.reset();
    assert!(!bench.device.state().driver);
    bench.device.withdraw().unwrap();
    let state = MemState { limit: LIMIT, requested: LIMIT, plugged: 0, driver: false, unread: false };
    assert_eq!(bench.device.state(), state);
}

#[test]
fn a_run_for_an_earlier_size_ends_at_the_new_one() {
    let mut bench = bench();
    bench.device.set_requested(8 * BLOCK_BYTES).unwrap();
    assert_eq!(look(&mut bench), 8 * BLOCK_BYTES);
    assert_eq!(reply(&mut bench, PLUG, START, 8), ACK);
    bench.device.set_requested(2 * BLOCK_BYTES).unwrap();
    assert_eq!(look(&mut bench), 2 * BLOCK_BYTES);
    assert_eq!(reply(&mut bench, UNPLUG, START + 7 * BLOCK_BYTES, 1), ACK);
    // While it is at it.
    bench.device.set_requested(6 * BLOCK_BYTES).unwrap();
    assert_eq!(reply(&mut bench, UNPLUG, START + 6 * BLOCK_BYTES, 1), ACK);
    let state = bench.device.state();
    assert!(state.plugged == state.requested && state.unread, "it may only be passing");
    assert_eq!(reply(&mut bench, UNPLUG, START + 5 * BLOCK_BYTES, 1), BUSY);
    assert_eq!(reply(&mut bench, UNPLUG, START + 6 * BLOCK_BYTES, 1), ERROR, "it does not have that");
    assert_eq!(bench.device.state(), state);
    assert_eq!(look(&mut bench), 6 * BLOCK_BYTES);
    assert_eq!(bench.device.state(), MemState { unread: false, ..state });
    // A block that it cannot use after all goes back, even if all is as requested.
    assert_eq!(reply(&mut bench, UNPLUG, START + 5 * BLOCK_BYTES, 1), ACK);
    bench.device.set_requested(7 * BLOCK_BYTES).unwrap();
    assert_eq!(reply(&mut bench, UNPLUG, START, 1), BUSY);
    assert_eq!(reply(&mut bench, UNPLUG_ALL, 0, 0), ACK, "it begins anew");
}

#[test]
fn a_size_is_unread_until_its_driver_has_read_it_and_a_reminder_changes_nothing() {
    let report = Arc::new(FakeReport::default());
    let region = Region::new(BYTES, Box::new(Yielding::default()));
    let device = MemDevice::new(region, START, LIMIT, report.clone());
    let mut bench = Bench::new(device, VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE);
    let unread = |bench: &Bench<MemDevice>| bench.device.state().unread;
    assert!(!unread(&bench), "it will read it");
    bench.device.set_requested(BLOCK_BYTES).unwrap();
    bench.device.set_requested(0).unwrap();
    assert!(unread(&bench));
    let before = report.changes();
    bench.device.read_config(0, &mut [0; CONFIG_REQUESTED as usize]);
    bench.device.read_config(CONFIG_REQUESTED + 4, &mut [0; 8]);
    assert!(unread(&bench) && report.changes() == before, "that is something else");
    look(&mut bench);
    assert!(!unread(&bench) && report.changes() == before + 1, "it has nothing and knows that it shall not");
    look(&mut bench);
    bench.device.set_requested(0).unwrap();
    assert!(!unread(&bench) && report.changes() == before + 1);
    bench.device.set_requested(BLOCK_BYTES).unwrap();
    assert!(unread(&bench));
    look(&mut bench);
    assert!(
        !unread(&bench) && report.changes() == before + 1,
        "what it does now is worth telling, this is not"
    );
    bench.restart(VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE);
    bench.device.set_requested(2 * BLOCK_BYTES).unwrap();
    assert!(unread(&bench));
    bench.device.reset();
    bench.device.set_requested(3 * BLOCK_BYTES).unwrap();
    assert!(!unread(&bench), "nobody is on the way to anything");
    bench.restart(VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE);
    assert!(!unread(&bench));
}

#[test]
fn the_configuration_tells_where_and_how_much() {
    let mut bench = bench();
    bench.device.set_requested(6 * BLOCK_BYTES).unwrap();
    assert_eq!(reply(&mut bench, PLUG, START, 3), ACK);
    let mut config = [0xff; CONFIG_BYTES + 8];
    bench.device.read_config(0, &mut config);
    let word = |at: usize| u64::from_le_bytes(config[at..at + 8].try_into().unwrap());
    let words: Vec<u64> = (0..8).map(|index| word(8 * index)).collect();
    assert_eq!(words, [BLOCK_BYTES, 0, START, BYTES, BYTES, 3 * BLOCK_BYTES, 6 * BLOCK_BYTES, 0]);
    assert!(bench.device.set_requested(LIMIT + BLOCK_BYTES).unwrap_err().contains("up to"));
    assert!(bench.device.set_requested(4096).is_err());
}

#[test]
fn broken_chains_stop_the_device_and_a_driver_that_touches_anything_is_not_served() {
    let mut bench = bench();
    let short = bench.queues[0].readable(&[0; REQUEST_BYTES - 1]);
    let response = bench.queues[0].writable(RESPONSE_BYTES as u32);
    bench.queues[0].push(&[short, response]);
    bench.kick(0);
    assert!(bench.interrupts.broken().unwrap().contains("23 bytes"));
    assert!(!bench.device.state().driver);

    bench.restart(VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE);
    bench.device.set_requested(LIMIT).unwrap();
    let mut plug = [0; REQUEST_BYTES];
    plug[8..16].copy_from_slice(&START.to_le_bytes());
    plug[16] = 1;
    let (request, response) = (bench.queues[0].readable(&plug), Buffer { len: 9, ..response });
    bench.queues[0].push(&[request, response]);
    bench.kick(0);
    assert!(bench.interrupts.broken().is_some());
    assert_eq!(bench.device.state().plugged, 0, "what cannot be answered is not done");

    bench.device.reset();
    let activation = Activation {
        memory: bench.memory.clone(),
        queues: vec![],
        features: 0,
        interrupt: bench.interrupts.clone(),
        watcher: super::super::Watcher::new(Arc::new(vmm_sys_util::epoll::Epoll::new().unwrap()), 0),
    };
    assert!(bench.device.activate(activation).unwrap_err().to_string().contains("5.16"));
}

/// One request of a driver that does as it likes, or a change of what is requested.
#[derive(Clone, Debug)]
enum Move {
    Ask { kind: u16, address: u64, blocks: u16 },
    Request(u64),
    Look,
}

fn moves() -> impl Strategy<Value = Move> {
    let near = (0..70u64, prop::bool::weighted(0.05))
        .prop_map(|(block, off)| START - BLOCK_BYTES + block * BLOCK_BYTES + u64::from(off));
    let address = prop_oneof![9 => near, 1 => any::<u64>()];
    let blocks = prop_oneof![9 => 0..12u16, 1 => any::<u16>()];
    prop_oneof![
        6 => (prop_oneof![Just(PLUG), Just(PLUG), Just(UNPLUG), Just(STATE), any::<u16>()], address, blocks)
            .prop_map(|(kind, address, blocks)| Move::Ask { kind, address, blocks }),
        1 => (0..=LIMIT / BLOCK_BYTES).prop_map(|blocks| Move::Request(blocks * BLOCK_BYTES)),
        1 => Just(Move::Look),
    ]
}

/// The blocks of a request, if it names any, by their places in a model.
fn named(address: u64, blocks: u16) -> Option<Range<usize>> {
    let first = address.checked_sub(START).filter(|at| at.is_multiple_of(BLOCK_BYTES))? / BLOCK_BYTES;
    let range = first..first + u64::from(blocks);
    (blocks > 0 && range.end <= BYTES / BLOCK_BYTES).then_some(range.start as usize..range.end as usize)
}

proptest! {
    /// Whatever it asks for: it has what it was told, never more than was requested when it got it, and while it does not know what is
    /// requested it goes no further below that.
    #[test]
    fn a_hostile_driver_gets_what_the_rules_give(steps in prop::collection::vec(moves(), 1..60)) {
        let mut bench = bench();
        let (mut has, mut requested, mut knows) = (vec![false; (BYTES / BLOCK_BYTES) as usize], 0, true);
        for step in steps {
            match step {
                Move::Request(bytes) => {
                    bench.device.set_requested(bytes).unwrap();
                    knows &= requested == bytes;
                    requested = bytes;
                }
                Move::Look => {
                    prop_assert_eq!(look(&mut bench), requested);
                    knows = true;
                }
                Move::Ask { kind, address, blocks } => {
                    let count = |has: &[bool]| has.iter().filter(|b| **b).count() as u64 * BLOCK_BYTES;
                    let (said, state) = ask(&mut bench, kind, address, blocks);
                    let expected = match (kind, named(address, blocks)) {
                        (UNPLUG_ALL, _) => {
                            has.fill(false);
                            ACK
                        }
                        (PLUG | UNPLUG | STATE, None) => ERROR,
                        (PLUG, Some(_)) if count(&has) + u64::from(blocks) * BLOCK_BYTES > requested => NACK,
                        (PLUG | UNPLUG, Some(range)) if has[range.clone()].contains(&(kind == PLUG)) => ERROR,
                        (UNPLUG, Some(range)) if !knows && count(&has) < requested + range.len() as u64 * BLOCK_BYTES => BUSY,
                        (PLUG | UNPLUG, Some(range)) => {
                            has[range].fill(kind == PLUG);
                            ACK
                        }
                        (STATE, Some(range)) => {
                            let all = has[range.clone()].iter().all(|b| *b);
                            let any = has[range].contains(&true);
                            prop_assert_eq!(state, if all { STATE_PLUGGED } else if any { STATE_MIXED } else { STATE_UNPLUGGED });
                            ACK
                        }
                        _ => ERROR,
                    };
                    prop_assert_eq!(said, expected);
                    prop_assert_eq!(bench.device.state().plugged, count(&has));
                    prop_assert_eq!(bench.device.state().unread, !knows);
                }
            }
        }
    }
}
