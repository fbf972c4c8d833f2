//! What people say of the future, beside what is forecast.

use proptest::prelude::*;

use super::*;

/// 2026-11-22 00:00 UTC.
const MIDNIGHT: u64 = 1_795_305_600;

fn once(from_sec: u64, for_sec: u64) -> When {
    When { daily: false, from_sec, for_sec }
}

fn daily(from_sec: u64, for_sec: u64) -> When {
    When { daily: true, from_sec, for_sec }
}

fn step(when: When, amount: u64) -> Step {
    Step { resource: Resource::Cpu, when, p50: amount / 2, p95: amount, p99: amount * 2 }
}

fn event(when: When, raise: Option<Raise>) -> Event {
    let raises = raise.map(|raise| (Resource::Cpu, raise)).into_iter().collect();
    Event { name: "sale".into(), when, raises }
}

fn events(event: Event) -> ByHand {
    ByHand { events: vec![event], ..ByHand::default() }
}

/// Rings with so many minutes before `end_sec`, the oldest first.
fn rings(end_sec: u64, amounts: &[u32]) -> Rings {
    let mut rings = Rings::default();
    let begin = end_sec - amounts.len() as u64 * MINUTE;
    for (at, amount) in amounts.iter().enumerate() {
        for second in 0..MINUTE {
            rings.take(begin + at as u64 * MINUTE + second, *amount);
        }
    }
    rings.pass(end_sec);
    rings
}

fn learnt(from_sec: u64, amount: f32) -> Outlook {
    let quantiles = [[amount; LEVELS.len()]; HORIZONS];
    Outlook { from_sec, blueprint: Blueprint { step_secs: MINUTE as u32, quantiles, confidence: 0.25 } }
}

fn p95(merged: &Merged) -> [f32; HORIZONS] {
    merged.outlook.blueprint.quantiles.map(|levels| levels[P95])
}

#[test]
fn the_next_time_is_found_over_midnight_too() {
    let night = daily(23 * HOUR, 2 * HOUR);
    assert_eq!(night.next(MIDNIGHT + HOUR / 2), Some((MIDNIGHT - HOUR, MIDNIGHT + HOUR)));
    assert_eq!(night.next(MIDNIGHT + HOUR), Some((MIDNIGHT + 23 * HOUR, MIDNIGHT + 25 * HOUR)));
    assert_eq!(daily(0, DAY).next(MIDNIGHT), Some((MIDNIGHT, MIDNIGHT + DAY)));
    assert_eq!(once(MIDNIGHT, 60).next(MIDNIGHT + 59), Some((MIDNIGHT, MIDNIGHT + 60)));
    assert_eq!(once(MIDNIGHT, 60).next(MIDNIGHT + 60), None);
}

#[test]
fn what_contradicts_itself_is_refused_with_its_place() {
    let two = |one: When, other: When| {
        ByHand { steps: vec![step(one, 1), step(other, 1)], ..ByHand::default() }.check(MIDNIGHT)
    };
    assert_eq!(two(daily(0, HOUR), daily(HOUR, HOUR)), Ok(()));
    assert_eq!(two(daily(0, HOUR), once(MIDNIGHT, HOUR)), Ok(()), "one day may be another than the others");
    for (one, other) in [
        (daily(0, HOUR), daily(HOUR - 1, HOUR)),
        (daily(23 * HOUR, 2 * HOUR), daily(HOUR / 2, 60)),
        (daily(HOUR / 2, 60), daily(23 * HOUR, 2 * HOUR)),
        (daily(0, DAY), daily(DAY - 1, 1)),
        (once(MIDNIGHT, HOUR), once(MIDNIGHT + HOUR - 1, HOUR)),
    ] {
        let wrong = two(one, other).unwrap_err();
        assert_eq!(wrong, "step 2 of the blueprint: it is at the same time as step 1");
    }
    let refused = |step: Step| ByHand { steps: vec![step], ..ByHand::default() }.check(MIDNIGHT).is_err();
    assert!(refused(Step { p50: 2, p95: 1, ..step(daily(0, 60), 1) }));
    assert!(refused(Step { p95: 9, ..step(daily(0, 60), 1) }));
    assert!(refused(step(daily(0, 60), u64::MAX / 2)));
    assert!(
        refused(step(daily(0, 0), 1))
            && refused(step(daily(DAY, 60), 1))
            && refused(step(daily(0, DAY + 1), 1))
    );
    assert!(refused(step(once(MIDNIGHT + 400 * DAY, 60), 1)));
    assert!(refused(step(once(u64::MAX, u64::MAX), 1)));
    let many = vec![step(daily(0, 1), 1); MAX_STEPS + 1];
    assert!(ByHand { steps: many, ..ByHand::default() }.check(MIDNIGHT).unwrap_err().contains("385 steps"));
    for name in ["", " sale", "a/b", "a\nb", &"x".repeat(41)] {
        let event = Event { name: name.into(), ..event(daily(0, 60), None) };
        assert!(events(event).check(MIDNIGHT).is_err(), "{name:?}");
    }
    assert!(events(event(daily(0, 60), Some(Raise::UpCentipercent(u32::MAX)))).check(MIDNIGHT).is_err());
    assert_eq!(events(event(daily(0, 60), Some(Raise::UpCentipercent(10_000)))).check(MIDNIGHT), Ok(()));
}

#[test]
fn a_blueprint_counts_where_it_says_something() {
    let now = MIDNIGHT + 3 * HOUR;
    let steps = vec![step(daily(0, DAY), 1000), step(once(now + 120, 60), 4000)];
    let said = ByHand { steps, confidence_permille: 900, events: Vec::new() };
    let merged = said.merge(Resource::Cpu, Some(learnt(now, 5000.0)), None, now).unwrap();
    assert_eq!(p95(&merged), [1000.0, 1000.0, 4000.0, 1000.0, 1000.0, 1000.0]);
    assert_eq!((merged.by_hand, merged.outlook.blueprint.confidence), ([true; HORIZONS], 0.9));
    let levels = merged.outlook.blueprint.quantiles[0];
    assert!(levels.is_sorted() && levels[P50] == 500.0 && levels[P99] == 2000.0, "{levels:?}");
    assert_eq!(said.wanted(Resource::Cpu, None, now), Some(1000));
    assert_eq!(said.wanted(Resource::Cpu, None, now + 120 - LEAD_SEC), Some(1000));
    assert_eq!(said.wanted(Resource::Cpu, None, now + 121 - LEAD_SEC), Some(4000), "before it is needed");
    assert_eq!(said.wanted(Resource::Memory, None, now), None);
    let other = said.merge(Resource::Memory, Some(learnt(now, 5.0)), None, now).unwrap();
    assert_eq!((p95(&other), other.by_hand), ([5.0; HORIZONS], [false; HORIZONS]));
}

#[test]
fn an_event_raises_what_was_before_it_and_not_itself() {
    let begin = MIDNIGHT + 18 * HOUR;
    let doubled = events(event(once(begin, HOUR), Some(Raise::UpCentipercent(10_000))));
    let before = rings(begin - 180, &[300; 60]);
    let ahead =
        doubled.merge(Resource::Cpu, Some(learnt(begin - 180, 310.0)), Some(&before), begin - 180).unwrap();
    assert_eq!(p95(&ahead), [310.0, 310.0, 310.0, 600.0, 600.0, 600.0]);
    assert_eq!(ahead.by_hand, [false, false, false, true, true, true]);
    assert_eq!(
        ahead.outlook.blueprint.confidence, 0.25,
        "who announces an event does not know the rest better"
    );
    // Half an hour into it the load has doubled, and so has what is forecast.
    let mut amounts = vec![300; 60];
    amounts.extend([640; 30]);
    let during = rings(begin + 1800, &amounts);
    let now = begin + 1800;
    let ahead = doubled.merge(Resource::Cpu, Some(learnt(now, 640.0)), Some(&during), now).unwrap();
    assert_eq!(p95(&ahead), [640.0; HORIZONS], "not 1280");
    assert_eq!(doubled.wanted(Resource::Cpu, Some(&during), now), Some(600));
    assert_eq!(doubled.wanted(Resource::Cpu, Some(&during), begin + HOUR), None, "it is over");
    let more = events(event(once(begin, HOUR), Some(Raise::Up(1000))));
    assert_eq!(more.wanted(Resource::Cpu, Some(&during), now), Some(1300));
    assert_eq!(more.wanted(Resource::Cpu, None, now), Some(1000), "of a machine that was never measured");
    assert_eq!(doubled.wanted(Resource::Cpu, None, now), None);
    let to = events(event(once(begin, HOUR), Some(Raise::To(2000))));
    assert_eq!(to.wanted(Resource::Cpu, None, begin - LEAD_SEC + 1), Some(2000));
    assert_eq!(to.wanted(Resource::Cpu, None, begin - LEAD_SEC), None);
}

#[test]
fn an_event_without_numbers_is_as_the_busiest_time() {
    let begin = MIDNIGHT + 18 * HOUR;
    let mut amounts = vec![100; 300];
    amounts[20] = 2500;
    let rings = rings(begin, &amounts);
    let said = events(event(daily(18 * HOUR, HOUR), None));
    assert_eq!(said.wanted(Resource::Cpu, Some(&rings), begin - 60), Some(2500));
    assert_eq!(said.wanted(Resource::Cpu, None, begin - 60), None, "nobody knows");
}

#[test]
fn without_a_forecast_people_and_the_last_minute_speak() {
    let now = MIDNIGHT + HOUR;
    let said =
        ByHand { steps: vec![step(once(now + 180, 60), 800)], confidence_permille: 1000, events: Vec::new() };
    assert_eq!(
        said.merge(Resource::Cpu, None, None, now),
        None,
        "of the minutes before nobody knows anything"
    );
    let past = rings(now, &[100; 3]);
    let merged = said.merge(Resource::Cpu, None, Some(&past), now).unwrap();
    assert_eq!(p95(&merged), [100.0, 100.0, 100.0, 800.0, 100.0, 100.0]);
    assert_eq!(said.merge(Resource::Cpu, None, Some(&past), now + DAY), None);
    assert_eq!(ByHand::default().merge(Resource::Cpu, None, Some(&past), now), None);
}

#[test]
fn what_was_stored_is_read_back_and_what_is_damaged_is_refused() {
    let said = ByHand {
        steps: vec![step(daily(0, 60), 1), step(once(MIDNIGHT, 60), 1)],
        confidence_permille: 500,
        events: vec![event(daily(0, 60), Some(Raise::Up(7)))],
    };
    assert_eq!(ByHand::restore(&said.save(), MIDNIGHT), Ok(said.clone()));
    let later = ByHand::restore(&said.save(), MIDNIGHT + 60 + DAY).unwrap();
    assert_eq!(
        (later.steps.len(), later.events.len()),
        (1, 1),
        "what is over is forgotten, what is daily never is"
    );
    for damaged in [&b""[..], b"{}", b"{\"layout\":9,\"said\":null}", &[b'['; MAX_BYTES + 1]] {
        assert!(ByHand::restore(damaged, MIDNIGHT).is_err());
    }
    let text = String::from_utf8(said.save()).unwrap();
    assert!(ByHand::restore(text.replace("\"resource\":0", "\"resource\":9").as_bytes(), MIDNIGHT).is_err());
    assert!(ByHand::restore(text.replace("\"for_sec\":60", "\"for_sec\":0").as_bytes(), MIDNIGHT).is_err());
}

fn whens() -> impl Strategy<Value = When> {
    let daily = (0..DAY, 1..=DAY).prop_map(|(from_sec, for_sec)| daily(from_sec, for_sec));
    let once = (0..4000_u64, 1..4000_u64).prop_map(|(from, for_sec)| once(MIDNIGHT + from, for_sec));
    prop_oneof![daily, once]
}

fn raises() -> impl Strategy<Value = Option<Raise>> {
    let raise = prop_oneof![
        any::<u64>().prop_map(Raise::To),
        any::<u64>().prop_map(Raise::Up),
        any::<u32>().prop_map(Raise::UpCentipercent),
    ];
    proptest::option::of(raise)
}

proptest! {
    #[test]
    fn whatever_is_said_the_outlook_is_one(
        when in whens(),
        raise in raises(),
        other in whens(),
        amounts in (any::<u64>(), any::<u64>(), any::<u64>()),
        has_past in any::<bool>(),
        has_learnt in any::<bool>(),
        now in MIDNIGHT..MIDNIGHT + 2 * DAY,
    ) {
        let step = Step { resource: Resource::Cpu, when: other, p50: amounts.0, p95: amounts.1, p99: amounts.2 };
        let said = ByHand { steps: vec![step], confidence_permille: 700, events: vec![event(when, raise)] };
        let past = rings(now / MINUTE * MINUTE, &[7, 9, 8]);
        let past = has_past.then_some(&past);
        let learnt = has_learnt.then(|| learnt(now / MINUTE * MINUTE, 11.0));
        let wanted = said.wanted(Resource::Cpu, past, now);
        let merged = said.merge(Resource::Cpu, learnt.clone(), past, now);
        prop_assert!(merged.is_some() || !has_learnt);
        if said.check(now).is_ok() {
            prop_assert_eq!(ByHand::restore(&said.save(), now).map(|read| read.events), Ok(said.events.clone()));
            for levels in merged.iter().flat_map(|merged| merged.outlook.blueprint.quantiles) {
                prop_assert!(levels.is_sorted() && levels.iter().all(|level| level.is_finite() && *level >= 0.0));
            }
        }
        // An event alone never makes less of what is learnt.
        let only = events(event(when, raise));
        if let (Some(merged), Some(learnt)) = (only.merge(Resource::Cpu, learnt.clone(), past, now), learnt) {
            let pairs = merged.outlook.blueprint.quantiles.into_iter().flatten().zip(learnt.blueprint.quantiles.into_iter().flatten());
            prop_assert!(pairs.into_iter().all(|(merged, learnt)| merged >= learnt));
        }
        prop_assert!(wanted.is_none_or(|_| said.wanted(Resource::Memory, past, now).is_none() || said.events[0].raises.is_empty()));
    }
}
