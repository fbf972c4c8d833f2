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
fn what_is_idle_is_given_back_with_patience_and_once() {
    let (mut sculptor, mut granted) = (Sculptor::default(), 4000);
    let grants = run(&mut sculptor, 0, &mut granted, vec![300; 12 * 60 * 24]);
    let first = grants.iter().position(|grant| *grant < 4000).unwrap() as u64 * 5 * SEC;
    assert!((10 * MINUTE..=60 * MINUTE).contains(&first), "after {first} msec");
    assert_eq!(granted, 330);
    let changes = grants.windows(2).filter(|pair| pair[0] != pair[1]).count();
    assert_eq!(changes, 1);
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
