//! What must hold of every series, whatever it is fed.

mod support;

use lathe_forecast::{Blueprint, Config, MAX_STATE, NAMES, Outcome, RestoreError, Series};
use proptest::prelude::*;
use support::regimes::{self, KINDS};

/// All experts but the LSTM, which takes most of the time in a debug build.
const CLASSICAL: u32 = (1 << (NAMES.len() - 1)) - 1;

fn classical() -> Config {
    Config { experts: CLASSICAL, ..Config::default() }
}

fn feed(series: &mut Series, from: u64, y: &[f32]) -> Vec<Blueprint> {
    y.iter()
        .enumerate()
        .map(|(i, v)| {
            series.observe((from + i as u64) * 300, *v);
            series.forecast()
        })
        .collect()
}

fn assert_sane(b: &Blueprint) {
    assert!((0.0..=1.0).contains(&b.confidence), "{}", b.confidence);
    for row in &b.quantiles {
        assert!(row.iter().all(|v| v.is_finite() && *v >= 0.0), "{row:?}");
        assert!(row.is_sorted(), "{row:?}");
    }
}

#[test]
fn a_flat_series_is_forecast_exactly() {
    let mut series = Series::new(classical());
    let last = feed(&mut series, 0, &[30.123; 600]).pop().unwrap();
    assert!(last.quantiles.iter().flatten().all(|v| *v == 30.123), "{last:?}");
}

#[test]
fn every_regime_is_forecast_sanely_and_with_coverage() {
    for (kind, name) in KINDS.iter().enumerate().skip(1) {
        let y = regimes::make(kind, 7, 1600);
        let made = feed(&mut Series::new(classical()), 0, &y);
        made.iter().for_each(assert_sane);
        let made = made.iter().map(|b| b.quantiles).collect();
        let coverage = support::score::score(&y, &made).coverage;
        assert!((0.92..=0.99).contains(&coverage[2]), "{name}: {coverage:?}");
    }
}

#[test]
fn the_mix_is_better_than_the_last_value_with_its_residuals() {
    for kind in [1, 4, 6, 12] {
        let y = regimes::make(kind, 3, 1600);
        let made = feed(&mut Series::new(classical()), 0, &y).iter().map(|b| b.quantiles).collect();
        let (own, reference) =
            (support::score::score(&y, &made), support::score::score(&y, &support::score::reference(&y)));
        assert!(own.wql[2] < 0.9 * reference.wql[2], "{}: {own:?} {reference:?}", KINDS[kind]);
    }
}

#[test]
fn a_load_that_repeats_is_met_from_the_third_cycle_on() {
    let y: Vec<f32> = (0..130).map(|t| if t % 26 < 13 { 4.0 } else { 80.0 }).collect();
    let made = feed(&mut Series::new(classical()), 0, &y);
    // At the last low step of the fifth cycle the next step is known to be high.
    assert!(made[26 * 4 + 12].quantiles[0][3] > 40.0, "{:?}", made[26 * 4 + 12].quantiles[0]);
}

#[test]
fn confidence_is_low_at_the_start_and_after_a_break_and_grows_back() {
    let y = regimes::make(1, 5, 900);
    let mut series = Series::new(classical());
    let made = feed(&mut series, 0, &y);
    assert!(made[0].confidence < 0.05);
    let settled = made[899].confidence;
    assert!(settled > 0.6, "{settled}");
    let jumped: Vec<f32> = y.iter().map(|v| v + 300.0).collect();
    let after = feed(&mut series, 900, &jumped);
    assert!(after[2].confidence < 0.5 * settled, "{} {settled}", after[2].confidence);
    assert!(after[800].confidence > 0.6, "{}", after[800].confidence);
}

#[test]
fn a_saved_series_goes_on_bit_by_bit() {
    let y = regimes::make(5, 9, 700);
    let mut one = Series::new(Config::default());
    feed(&mut one, 0, &y[..500]);
    let saved = one.save();
    let mut other = Series::restore(&saved).unwrap();
    assert_eq!(feed(&mut one, 500, &y[500..]), feed(&mut other, 500, &y[500..]));
    assert_eq!(one.save(), other.save());
}

#[test]
fn equal_input_gives_equal_output() {
    let y = regimes::make(7, 2, 300);
    let run = || feed(&mut Series::new(Config::default()), 0, &y);
    assert_eq!(run(), run());
}

#[test]
fn a_full_state_keeps_its_bound() {
    let mut series = Series::new(Config::default());
    for kind in 0..KINDS.len() {
        feed(&mut series, kind as u64 * 200, &regimes::make(kind, 1, 200));
    }
    let saved = series.save().len();
    assert!((20_000..=MAX_STATE).contains(&saved), "{saved} bytes");
}

#[test]
fn late_samples_and_gaps_are_told() {
    let mut series = Series::new(classical());
    assert_eq!(series.observe(3000, 1.0), Outcome::Learned);
    assert_eq!(series.observe(3100, 1.0), Outcome::Late);
    assert_eq!(series.observe(300, 1.0), Outcome::Late);
    assert_eq!(series.observe(3300, f32::NAN), Outcome::Unusable);
    assert_eq!(series.observe(4200, 1.0), Outcome::AfterGap(2));
    // A clock that has been set back is believed in the end.
    let heard = (0..20).map(|i| series.observe(i * 300, 1.0)).filter(|o| *o != Outcome::Late).count();
    assert!(heard >= 5, "{heard}");
}

#[test]
fn a_long_gap_lowers_confidence() {
    let mut series = Series::new(classical());
    let before = feed(&mut series, 0, &regimes::make(1, 5, 900))[899].confidence;
    assert_eq!(series.observe(5_000_000_000, 30.0), Outcome::AfterGap(16_666_666 - 900));
    assert!(series.forecast().confidence < 0.2 * before);
    assert_sane(&series.forecast());
}

#[test]
fn foreign_bytes_are_refused() {
    assert_eq!(Series::restore(&[]).unwrap_err(), RestoreError::NotAState { len: 0 });
    let saved = Series::new(Config::default()).save();
    assert!(Series::restore(&saved[..saved.len() - 1]).is_err());
    let mut newer = saved.clone();
    newer[4] = 9;
    assert_eq!(Series::restore(&newer).unwrap_err(), RestoreError::Version { found: 9 });
    let mut longer = saved;
    longer.push(0);
    assert!(Series::restore(&longer).is_err());
}

fn hostile() -> impl Strategy<Value = f32> {
    prop_oneof![
        4 => 0.0_f32..100.0,
        1 => Just(f32::NAN),
        1 => Just(f32::INFINITY),
        1 => Just(f32::MAX),
        1 => Just(-1e30_f32),
        1 => Just(1e-40_f32),
        1 => Just(0.0_f32),
        1 => Just(1e15_f32),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn nonsense_is_forecast_sanely(y in prop::collection::vec((hostile(), 0_u64..2000), 1..150), seed: u64, steps in 1_u32..100_000) {
        let mut series = Series::new(Config { seed, step_secs: steps, ..Config::default() });
        let mut t = 0;
        for (v, jump) in y {
            t += if jump > 1900 { jump * 300 } else { u64::from(steps) };
            series.observe(t, v);
            assert_sane(&series.forecast());
        }
        let restored = Series::restore(&series.save());
        prop_assert!(restored.is_ok(), "{:?}", restored.err());
    }

    #[test]
    fn a_damaged_state_is_refused_or_sane(at in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6), cut in any::<prop::sample::Index>()) {
        let mut series = Series::new(Config::default());
        feed(&mut series, 0, &regimes::make(4, 1, 60));
        let mut bytes = series.save();
        for (i, b) in at {
            let i = i.index(bytes.len());
            bytes[i] = b;
        }
        if cut.index(4) == 0 {
            bytes.truncate(cut.index(bytes.len()));
        }
        if let Ok(mut series) = Series::restore(&bytes) {
            for b in feed(&mut series, 60, &regimes::make(4, 1, 40)) {
                assert_sane(&b);
            }
        }
    }
}
