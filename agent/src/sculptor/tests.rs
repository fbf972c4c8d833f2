use proptest::prelude::*;

use super::*;

const SEC: u64 = 1000;
const MINUTE: u64 = 60 * SEC;

fn sight(granted: u64, demand: u64) -> Sight {
    Sight { granted, min: 100, max: 4000, step: 10, demand, recent: demand, ..Sight::default() }
}

fn machine(name: &str, tier: Tier, cpu: Sight) -> Machine {
    Machine {
        name: name.to_owned(),
        tier,
        aggressiveness_permille: 500,
        busy: false,
        sights: [Some(cpu), None, None, None],
    }
}

/// Carries decisions out for one machine over a time; answers the grants after each turn.
fn run(
    sculptor: &mut Sculptor,
    from_msec: u64,
    granted: &mut u64,
    demands: impl IntoIterator<Item = u64>,
) -> Vec<u64> {
    let mut grants = Vec::new();
    for (turn, demand) in demands.into_iter().enumerate() {
        let now = from_msec + turn as u64 * 5 * SEC;
        let one = machine("one", Tier::Standard, sight(*granted, demand));
        for decision in sculptor.decide(now, &Host::default(), &[one]) {
            assert_eq!(decision.from, *granted);
            *granted = decision.to;
        }
        grants.push(*granted);
    }
    grants
}

#[test]
fn a_step_is_covered_in_the_turn_that_sees_it() {
    let (mut sculptor, mut granted) = (Sculptor::default(), 500);
    let grants = run(&mut sculptor, 0, &mut granted, [300, 300, 2000, 2000, 2000]);
    assert_eq!(grants[1], 500);
    assert!(grants[2] >= 2000 && grants[2] <= 2600, "{grants:?}");
    assert_eq!(grants[2], grants[4]);
    assert_eq!(sculptor.weighing("one", Resource::Cpu).unwrap().changes, 1);
}

#[test]
fn a_small_lack_waits_and_is_covered_when_it_lasts() {
    let (mut sculptor, mut granted) = (Sculptor::default(), 1000);
    let grants = run(&mut sculptor, 0, &mut granted, [&[900; 12][..], &[1080; 2], &[900; 12]].concat());
    assert!(grants.iter().all(|grant| *grant == 1000), "a moment: {grants:?}");
    let grants = run(&mut sculptor, 26 * 5 * SEC, &mut granted, [1080; 120]);
    assert_eq!(grants[1], 1000);
    assert!(*grants.last().unwrap() >= 1080, "{grants:?}");
}

#[test]
fn where_demand_is_hidden_it_grows_by_more_each_time() {
    let mut sculptor = Sculptor::default();
    let (mut granted, mut grants) = (400, Vec::new());
    for turn in 0..4 {
        let mut cpu = sight(granted, granted.min(2500));
        cpu.hidden = true;
        let decisions =
            sculptor.decide(turn * 5 * SEC, &Host::default(), &[machine("one", Tier::Standard, cpu)]);
        granted = decisions.first().map_or(granted, |decision| decision.to);
        grants.push(granted);
    }
    assert_eq!(grants, [600, 1200, 2400, 4000]);
}

#[test]
fn what_is_idle_is_given_back_with_patience_and_once() {
    let (mut sculptor, mut granted) = (Sculptor::default(), 4000);
    let grants = run(&mut sculptor, 0, &mut granted, vec![300; 12 * 60 * 48]);
    let first = grants.iter().position(|grant| *grant < 4000).unwrap() as u64 * 5 * SEC;
    assert!((10 * MINUTE..=60 * MINUTE).contains(&first), "after {first} msec");
    assert!((300..=330).contains(&granted), "{granted}");
    let changes = grants.windows(2).filter(|pair| pair[0] != pair[1]).count();
    assert!(changes <= 2, "{changes}");
    assert!(grants[12 * 60 * 24..].iter().all(|grant| *grant == granted), "it has settled");
}

#[test]
fn what_is_recalled_counts_for_patience() {
    let first = |minutes: usize| {
        let mut sculptor = Sculptor::default();
        let minutes = vec![Some(300); minutes];
        sculptor.recall(5, "one", [minutes.clone(), minutes, Vec::new(), Vec::new()]);
        let (mut granted, mut turn) = (4000, 0);
        while granted == 4000 {
            run(&mut sculptor, 5 + turn * 5 * SEC, &mut granted, [300]);
            turn += 1;
        }
        turn
    };
    assert_eq!(first(24 * 60), 1, "it has been idle for a day");
    assert!(first(0) >= 12 * 10, "nothing is known: {}", first(0));
}

#[test]
fn a_cycle_of_an_hour_does_not_use_up_more_changes_than_a_day_has() {
    let (mut sculptor, mut granted) = (Sculptor::default(), 2000);
    let load = |turn: usize| if (turn / 360).is_multiple_of(2) { 300 } else { 2000 };
    let grants = run(&mut sculptor, 0, &mut granted, (0..12 * 60 * 24 * 3).map(load));
    for day in grants.chunks(12 * 60 * 24) {
        assert!(day.windows(2).filter(|pair| pair[0] != pair[1]).count() <= 12);
    }
}

#[test]
fn it_keeps_what_it_cannot_do_without_and_what_was_asked_for() {
    let mut sculptor = Sculptor::default();
    let mut of = |granted, floor, wanted, max| {
        let cpu = Sight { floor, wanted, max, ..sight(granted, 200) };
        let decisions = sculptor.decide(0, &Host::default(), &[machine("one", Tier::Standard, cpu)]);
        decisions.first().map(|decision| (decision.to, decision.cause))
    };
    assert_eq!(of(500, 805, None, 4000), Some((810, Cause::Bounds)));
    assert_eq!(of(500, 0, Some(1201), 4000), Some((1210, Cause::Wanted)));
    assert_eq!(of(500, 0, Some(9000), 4000), Some((4000, Cause::Wanted)));
    assert_eq!(of(500, 0, None, 300), Some((300, Cause::Bounds)));
    assert_eq!(of(500, 9000, None, 500), None, "a bound that somebody set counts more");
    assert_eq!(of(u64::MAX, 0, None, 500), None, "without a limit there is nothing to shape");
}

/// Everything that comes is `amount`, with this confidence.
fn outlook(amount: u64, confidence: f32) -> Option<Outlook> {
    Outlook::new(60, vec![[amount; lathe_forecast::LEVELS.len()]; 6], confidence)
}

#[test]
fn it_grows_ahead_of_what_is_sure_to_come_and_only_where_the_outlook_is_trusted() {
    let of = |outlook, held| {
        let cpu = Sight { outlook, held, ..sight(500, 300) };
        let decisions =
            Sculptor::default().decide(0, &Host::default(), &[machine("one", Tier::Standard, cpu)]);
        decisions.first().map(|decision| (decision.to, decision.cause))
    };
    assert_eq!(of(outlook(2000, 0.9), (0, 0)), Some((2000, Cause::Ahead)));
    assert_eq!(of(outlook(2000, 0.2), (0, 0)), None, "little confidence");
    assert_eq!(of(outlook(2000, 0.9), (70, 100)), None, "it has not held of late");
    assert_eq!(of(outlook(2000, 0.9), (95, 100)), Some((2000, Cause::Ahead)));
    assert_eq!(of(outlook(400, 0.9), (95, 100)), None);
}

#[test]
fn an_outlook_keeps_it_from_shrinking_but_never_from_growing() {
    let mut sculptor = Sculptor::default();
    let turn = |sculptor: &mut Sculptor, at: u64, demand| {
        let cpu = Sight { outlook: outlook(3000, 0.9), ..sight(3000, demand) };
        sculptor.decide(at * 5 * SEC, &Host::default(), &[machine("one", Tier::Standard, cpu)])
    };
    for at in 0..12 * 60 * 6 {
        assert_eq!(turn(&mut sculptor, at, 300), []);
    }
    let low = Sight { outlook: outlook(100, 1.0), ..sight(3000, 3900) };
    let decisions = sculptor.decide(0, &Host::default(), &[machine("one", Tier::Standard, low)]);
    assert_eq!(decisions[0].cause, Cause::Reached);
}

/// Grants of a machine that is busy for `busy` of each `period` turns and whose cycle is known from its third time on.
fn recurring(period: usize, busy: usize, times: usize, aggressiveness_permille: u32) -> Vec<u64> {
    let demand = |turn: usize| if turn % period >= period - busy { 900 } else { 120 };
    let (mut sculptor, mut granted, mut grants) = (Sculptor::default(), 930, Vec::new());
    for turn in 0..period * times {
        // As it is found: a step of two turns, and each reaches over those beside it.
        let near = |step: usize| {
            (0..6).map(|near| demand((step * 2 + near + period - 2) % period)).max().unwrap_or(0)
        };
        let first = turn / 2;
        let steps = (first..first + period / 2).map(|step| near(step % (period / 2))).collect();
        let over_msec = (turn % 2) as u64 * 5 * SEC;
        let cycle = Cycle { step_msec: 10 * SEC, over_msec, steps, cycles: (turn / period) as u32 };
        let cpu = Sight { cycle: (turn >= 2 * period).then_some(cycle), ..sight(granted, demand(turn)) };
        let cpu = Sight { recent: demand(turn).max(demand((turn + period - 1) % period)), ..cpu };
        let mut one = machine("one", Tier::Standard, cpu);
        one.aggressiveness_permille = aggressiveness_permille;
        for decision in sculptor.decide(turn as u64 * 5 * SEC, &Host::default(), &[one]) {
            granted = decision.to;
        }
        grants.push(granted);
    }
    grants
}

#[test]
fn what_comes_back_is_met_before_it_comes_and_given_back_after_it() {
    // Four minutes, of which it is busy for one and a half.
    let grants = recurring(48, 18, 12, 1000);
    for time in 2..11 {
        let rise = time * 48 + 30;
        assert!(
            grants[rise - 3..rise + 18].iter().all(|grant| *grant >= 900),
            "{:?}",
            &grants[rise - 6..rise]
        );
        let after = &grants[rise + 18 + 6..rise + 48 - 8];
        assert!(after.iter().all(|grant| *grant <= 150), "{after:?}");
    }
    // A burst of a minute that is nowhere a whole minute: up once and down once each time.
    let grants = recurring(36, 12, 12, 1000);
    let changes = grants[3 * 36..].windows(2).filter(|pair| pair[0] != pair[1]).count();
    assert!((16..=18).contains(&changes), "{changes}: {grants:?}");
    // At leisure it is left as it is: going down and up each few minutes costs more.
    assert!(recurring(48, 18, 12, 500).iter().all(|grant| *grant == 930));
}

#[test]
fn a_batch_of_every_hour_is_met_without_hurry_too() {
    let grants = recurring(720, 120, 6, 500);
    for time in 3..5 {
        let rise = time * 720 + 600;
        assert!(grants[rise - 3..rise + 120].iter().all(|grant| *grant >= 900), "before");
        assert!(grants[rise + 130..rise + 700].iter().all(|grant| *grant <= 200), "after");
    }
    let changes = grants.windows(2).filter(|pair| pair[0] != pair[1]).count();
    assert!(changes <= 12, "{changes}");
}

#[test]
fn memory_is_there_before_it_is_wanted_again_and_not_taken_in_between() {
    let of = |granted: u64, over_msec: u64| {
        let steps = vec![100, 100, 100, 900, 900, 900];
        let cycle = Some(Cycle { step_msec: 10 * SEC, over_msec, steps, cycles: 9 });
        let memory = Sight { cycle, ..sight(granted, 100) };
        let mut one = machine("one", Tier::Standard, sight(500, 400));
        one.sights = [None, Some(memory), None, None];
        one.aggressiveness_permille = 1000;
        let decisions = Sculptor::default().decide(0, &Host::default(), &[one]);
        decisions.first().map(|decision| (decision.to, decision.cause))
    };
    assert_eq!(of(1000, 0), None);
    assert_eq!(of(200, 0), None, "thirty seconds are left");
    assert_eq!(of(200, 9 * SEC), None);
    // Ten seconds are left.
    let steps = vec![100, 900, 900, 900, 100, 100];
    let cycle = Some(Cycle { step_msec: 10 * SEC, over_msec: 0, steps, cycles: 9 });
    let mut one = machine("one", Tier::Standard, sight(500, 400));
    one.sights = [None, Some(Sight { cycle, ..sight(200, 100) }), None, None];
    let decisions = Sculptor::default().decide(0, &Host::default(), &[one]);
    assert!(decisions[0].to >= 900 && decisions[0].cause == Cause::Ahead, "{decisions:?}");
}

#[test]
fn a_rise_that_no_cycle_told_of_is_covered_as_ever() {
    let cycle = Some(Cycle { step_msec: 10 * SEC, over_msec: 0, steps: vec![120; 24], cycles: 9 });
    let cpu = Sight { cycle, ..sight(150, 800) };
    let decisions = Sculptor::default().decide(0, &Host::default(), &[machine("one", Tier::Standard, cpu)]);
    assert!(decisions[0].to >= 800 && decisions[0].cause == Cause::Reached, "{decisions:?}");
}

#[test]
fn a_busy_machine_is_left_as_it_is() {
    let mut sculptor = Sculptor::default();
    let mut one = machine("one", Tier::Standard, sight(500, 3000));
    one.busy = true;
    assert_eq!(sculptor.decide(0, &Host::default(), std::slice::from_ref(&one)), []);
    one.busy = false;
    let decisions = sculptor.decide(SEC, &Host::default(), std::slice::from_ref(&one));
    assert_eq!((decisions[0].cause, decisions[0].again), (Cause::Reached, false));
    assert!(sculptor.decide(SEC, &Host::default(), &[one])[0].again, "nothing has come of it");
}

#[test]
fn where_the_host_is_short_harvest_yields_first_and_guaranteed_never() {
    let host = Host { free: [100; RESOURCES], ..Host::default() };
    let machines = |demand| {
        [
            machine("guaranteed", Tier::Guaranteed, sight(1000, demand)),
            machine("standard", Tier::Standard, sight(1000, 700)),
            machine("harvest", Tier::Harvest, sight(1000, 900)),
        ]
    };
    let mut sculptor = Sculptor::default();
    let of = |decisions: &[Decision], name: &str| {
        decisions
            .iter()
            .find(|decision| decision.machine == name)
            .map(|decision| (decision.to, decision.cause))
    };
    let decisions = sculptor.decide(0, &host, &machines(1600));
    assert_eq!(of(&decisions, "guaranteed"), Some((1100, Cause::Reached)), "what is free, now");
    let (left, cause) = of(&decisions, "harvest").unwrap();
    assert_eq!(cause, Cause::Short);
    assert!((440..=460).contains(&left), "what the guaranteed one needs: {left}");
    assert_eq!(of(&decisions, "standard"), None);
    let decisions = Sculptor::default().decide(0, &host, &machines(2600));
    assert_eq!(of(&decisions, "harvest"), Some((100, Cause::Short)), "all but its least");
    assert!(of(&decisions, "standard").is_some_and(|(to, cause)| to < 740 && cause == Cause::Short));
}

#[test]
fn equals_share_what_is_left_by_what_they_need() {
    let host = Host { free: [300; RESOURCES], ..Host::default() };
    let machines = [("one", 1300), ("two", 1500)]
        .map(|(name, demand)| machine(name, Tier::Standard, sight(1000, demand)));
    let decisions = Sculptor::default().decide(0, &host, &machines);
    let to: Vec<u64> = decisions.iter().map(|decision| decision.to).collect();
    assert!(to[0] < to[1] && to.iter().sum::<u64>() <= 2300, "{to:?}");
}

#[test]
fn a_clock_that_jumps_stops_nothing() {
    let (mut sculptor, mut granted) = (Sculptor::default(), 1000);
    for (at, demand) in [(u64::MAX, 500), (0, 1500), (u64::MAX / 2, 2500), (7, 3500)] {
        run(&mut sculptor, at, &mut granted, [demand]);
        assert!(granted >= demand, "{granted} for {demand}");
    }
    run(&mut sculptor, 10_000, &mut granted, vec![300; 12 * 60 * 12]);
    assert!(granted < 400, "{granted}");
}

fn amounts() -> impl Strategy<Value = u64> {
    prop_oneof![0..5000_u64, Just(0), any::<u64>()]
}

fn cycles() -> impl Strategy<Value = Cycle> {
    let amount = amounts().prop_map(|amount| amount.min(outlook::MAX_AMOUNT));
    (1..100_000_u64, 0..100_000_u64, proptest::collection::vec(amount, 1..40), any::<u32>()).prop_map(
        |(step_msec, over_msec, steps, cycles)| Cycle {
            step_msec,
            over_msec: over_msec % step_msec,
            steps,
            cycles,
        },
    )
}

fn sights() -> impl Strategy<Value = Sight> {
    let step = prop_oneof![Just(0), Just(10), 1..5000_u64];
    let row = proptest::array::uniform7(amounts());
    let outlook = (any::<u64>(), proptest::collection::vec(row, 0..7), any::<f32>());
    let numbers = (amounts(), amounts(), amounts(), step, amounts(), amounts(), amounts());
    let rest = (proptest::option::of(amounts()), outlook, any::<(u32, u32)>(), any::<bool>());
    (numbers, rest, proptest::option::of(cycles())).prop_map(|(numbers, rest, cycle)| {
        let (wanted, (step_sec, steps, confidence), held, hidden) = rest;
        let (granted, min, max, step, demand, recent, floor) = numbers;
        let outlook = Outlook::new(step_sec, steps, confidence);
        Sight { granted, min, max, step, demand, hidden, recent, floor, wanted, outlook, cycle, held }
    })
}

fn hosts() -> impl Strategy<Value = Vec<Machine>> {
    let tier = prop_oneof![Just(Tier::Harvest), Just(Tier::Standard), Just(Tier::Guaranteed)];
    let one = (tier, any::<u32>(), any::<bool>(), proptest::array::uniform4(proptest::option::of(sights())));
    proptest::collection::vec(one, 0..5).prop_map(|machines| {
        let of = |(at, (tier, aggressiveness_permille, busy, sights))| {
            let name = format!("{at}");
            Machine { name, tier, aggressiveness_permille, busy, sights }
        };
        machines.into_iter().enumerate().map(of).collect()
    })
}

proptest! {
    #[test]
    fn whatever_comes_is_answered_within_bounds(
        turns in proptest::collection::vec((any::<u64>(), hosts()), 1..6),
        free in proptest::array::uniform4(amounts()),
        missing in proptest::array::uniform4(amounts()),
        price_permille in proptest::array::uniform4(amounts()),
    ) {
        let host = Host { free, missing, price_permille };
        let (mut one, mut other) = (Sculptor::default(), Sculptor::default());
        for (now_msec, machines) in turns {
            let decisions = one.decide(now_msec, &host, &machines);
            prop_assert_eq!(&decisions, &other.decide(now_msec, &host, &machines), "equal input, equal output");
            let mut grown = [0_u64; RESOURCES];
            for decision in &decisions {
                let machine = machines.iter().find(|machine| machine.name == decision.machine).unwrap();
                let sight = machine.sights[decision.resource as usize].as_ref().unwrap();
                let step = sight.step.max(1);
                let upper = sight.max.min(outlook::MAX_AMOUNT) / step * step;
                let lower = sight.min.max(sight.floor).min(upper);
                prop_assert!(!machine.busy && decision.from == sight.granted && decision.to != decision.from);
                prop_assert!(decision.to <= upper.max(decision.from), "{decision:?} of {sight:?}");
                prop_assert!(decision.to >= lower.min(decision.from), "{decision:?} of {sight:?}");
                prop_assert!(decision.to % step == 0 || decision.cause == Cause::Short, "{decision:?} of {sight:?}");
                let grown = &mut grown[decision.resource as usize];
                *grown = grown.saturating_add(decision.to.saturating_sub(decision.from));
            }
            prop_assert!(grown.iter().zip(free).all(|(grown, free)| *grown <= free));
        }
    }

    #[test]
    fn a_constant_demand_is_left_in_peace(demand in 0..4000_u64, granted in 10..400_u64, aggressiveness in 0..1001_u32) {
        let mut sculptor = Sculptor::default();
        let (mut granted, mut changes) = (granted * 10, Vec::new());
        for turn in 0..2 * 24 * 60 {
            let mut one = machine("one", Tier::Standard, sight(granted, demand));
            one.aggressiveness_permille = aggressiveness;
            for decision in sculptor.decide(turn * MINUTE, &Host::default(), &[one]) {
                changes.push((turn, decision.from, decision.to, decision.cause));
                granted = decision.to;
            }
        }
        // What is hardly short waits until that has cost as much as a change, which may be days.
        let late: Vec<_> = changes.iter().filter(|(at, ..)| *at >= 25 * 60).collect();
        let covers = |(_, _, to, cause): &(u64, u64, u64, Cause)| *cause == Cause::Reached && *to <= demand * 6 / 5 + 10;
        prop_assert!(changes.len() <= 3 && late.len() <= 1 && late.into_iter().all(covers), "{changes:?}");
        prop_assert!(granted >= demand.min(4000));
    }
}
