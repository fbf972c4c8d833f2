//! The forecast of one resource: minute after minute in, quantiles of the next minutes out, and how they held.
//!
//! A step is a minute. Shorter ones would see less far than the slowest resize takes; longer ones would have nothing to say in the first
//! hour. With minutes the first forecast is there after one of them, and the forecaster's own past reaches over a whole day.
//!
//! It learns from the ring and remembers how far it has come, so that it catches up after a restart on its own, and comes to the same as if
//! there had been none.

use lathe_forecast::{Blueprint, Config, Series};

use super::Resource;
use super::ring::{MINUTE, Rings};

/// Minutes that must have been measured before anybody is told of confidence.
pub const ENOUGH: usize = 10;
/// Where 0.5 stands in [`lathe_forecast::LEVELS`].
pub const P50: usize = 0;
/// The same of 0.95.
pub const P95: usize = 3;
/// The same of 0.99.
pub const P99: usize = 5;
/// Forecasts after which what held long ago counts half.
const JUDGED: u32 = 24 * 60;
/// How old a forecast may become, in minutes.
const FRESH: u64 = 2;

/// The forecaster of one resource.
#[derive(Clone, Debug)]
pub struct Forecaster {
    resource: Resource,
    series: Box<Series>,
    /// The last minute that was learnt from.
    pub(super) learnt: Option<u64>,
    /// Forecasts of the next minute whose minute has come.
    pub(super) judged: u32,
    /// Of these, how many times no more than the 95 % quantile was asked for.
    pub(super) held: u32,
}

/// A forecast, as it stands.
#[derive(Clone, Debug, PartialEq)]
pub struct Outlook {
    /// The first second that it is about, since the epoch.
    pub from_sec: u64,
    /// Quantiles in the ring's grain.
    pub blueprint: Blueprint,
}

impl Forecaster {
    /// Without a past. Equal series give equal forecasts.
    pub fn new(resource: Resource) -> Self {
        let config = Config { step_secs: MINUTE as u32, seed: 1 + resource as u64, ..Config::default() };
        Self { resource, series: Box::new(Series::new(config)), learnt: None, judged: 0, held: 0 }
    }

    /// Goes on where another left off.
    ///
    /// # Errors
    /// What is wrong with the state.
    pub fn restore(
        resource: Resource,
        state: &[u8],
        learnt: Option<u64>,
        (judged, held): (u32, u32),
    ) -> Result<Self, String> {
        let series = Series::restore(state).map_err(|cause| cause.to_string())?;
        if series.forecast().step_secs != MINUTE as u32 || held > judged || judged > JUDGED {
            return Err("the state of a forecaster contradicts itself".to_owned());
        }
        Ok(Self { resource, series: Box::new(series), learnt, judged, held })
    }

    /// Its state.
    pub fn save(&self) -> Vec<u8> {
        self.series.save()
    }

    /// Learns from the minutes that it has not seen. Takes some ten microseconds a minute, and at most some milliseconds.
    pub fn catch_up(&mut self, rings: &Rings) {
        let ring = rings.minutes.of(self.resource.forecast_of());
        let Some(newest) = ring.newest() else { return };
        // Where the clock was set back only the newest one is new.
        let learnt =
            self.learnt.map(|learnt| if learnt > newest { newest.saturating_sub(1) } else { learnt });
        let fresh = ring.iter().filter(|(minute, _)| learnt.is_none_or(|learnt| *minute > learnt));
        for (minute, amount) in fresh {
            let Some(amount) = amount else { continue };
            let next = self.learnt.is_some_and(|learnt| learnt + 1 == minute);
            if next {
                self.judge(amount as f32);
            }
            // What it makes of a late one is its own affair.
            let _ = self.series.observe(minute.saturating_mul(MINUTE), amount as f32);
            self.learnt = Some(minute);
        }
    }

    fn judge(&mut self, came: f32) {
        if self.judged == JUDGED {
            (self.judged, self.held) = (self.judged / 2, self.held / 2);
        }
        self.judged += 1;
        self.held += u32::from(came <= self.series.forecast().quantiles[0][P95]);
    }

    /// What is ahead at the second `now`; nothing when the last minute measured is long over.
    pub fn outlook(&self, now: u64) -> Option<Outlook> {
        let next = self.learnt?.saturating_add(1);
        let age = (now / MINUTE).checked_sub(next)?;
        let from_sec = next.saturating_mul(MINUTE);
        (age <= FRESH).then(|| Outlook { from_sec, blueprint: self.series.forecast() })
    }

    /// How many of so many forecasts of the next minute held at the 95 % quantile.
    pub fn held(&self) -> (u32, u32) {
        (self.held, self.judged)
    }
}

#[cfg(test)]
mod tests {
    use lathe_forecast::LEVELS;

    use super::*;

    #[test]
    fn levels_are_where_they_are_looked_for() {
        assert_eq!([P50, P95, P99].map(|place| LEVELS[place]), [0.5, 0.95, 0.99]);
    }

    const BEGIN: u64 = 1_790_000_040 / MINUTE * MINUTE;

    /// `minutes` minutes of the given amounts, each second alike.
    fn past(rings: &mut Rings, from_minute: u64, minutes: u64, amount: impl Fn(u64) -> u32) {
        for minute in from_minute..from_minute + minutes {
            for second in 0..MINUTE {
                rings.take(BEGIN + minute * MINUTE + second, amount(minute));
            }
        }
        rings.pass(BEGIN + (from_minute + minutes) * MINUTE);
    }

    #[test]
    fn a_steady_load_is_forecast_as_it_is_and_holds() {
        let (mut rings, mut forecaster) = (Rings::default(), Forecaster::new(Resource::Cpu));
        assert_eq!(forecaster.outlook(BEGIN), None);
        past(&mut rings, 0, 40, |_| 300);
        forecaster.catch_up(&rings);
        let outlook = forecaster.outlook(BEGIN + 40 * MINUTE).expect("forty minutes are enough");
        assert_eq!(outlook.from_sec, BEGIN + 40 * MINUTE);
        assert!(outlook.blueprint.quantiles.iter().flatten().all(|amount| (295.0..400.0).contains(amount)));
        assert_eq!(forecaster.held(), (39, 39));
        assert!((0.1..0.5).contains(&outlook.blueprint.confidence), "{}", outlook.blueprint.confidence);
        assert_eq!(forecaster.outlook(BEGIN + 43 * MINUTE + 1), None, "it is old by then");
        past(&mut rings, 40, 1, |_| 900);
        forecaster.catch_up(&rings);
        assert_eq!(forecaster.held(), (39, 40), "that was more than forecast");
    }

    #[test]
    fn what_catches_up_comes_to_the_same_as_what_went_along() {
        let load = |minute| 100 + (minute * 37 % 11) as u32 * 20;
        let (mut rings, mut along) = (Rings::default(), Forecaster::new(Resource::Memory));
        past(&mut rings, 0, 30, load);
        along.catch_up(&rings);
        let state = along.save();
        let mut restored =
            Forecaster::restore(Resource::Memory, &state, along.learnt, (along.judged, along.held)).unwrap();
        for minute in 30..50 {
            past(&mut rings, minute, 1, load);
            along.catch_up(&rings);
        }
        restored.catch_up(&rings);
        let now = BEGIN + 50 * MINUTE;
        assert_eq!(restored.outlook(now), along.outlook(now));
        assert_eq!(restored.held(), along.held());
    }

    #[test]
    fn what_is_no_state_is_refused() {
        let forecaster = Forecaster::new(Resource::Cpu);
        let state = forecaster.save();
        assert!(Forecaster::restore(Resource::Cpu, &state[..100], None, (0, 0)).is_err());
        assert!(Forecaster::restore(Resource::Cpu, &state, None, (1, 2)).is_err(), "more held than were");
        let other = Series::new(Config::default()).save();
        assert!(Forecaster::restore(Resource::Cpu, &other, None, (0, 0)).is_err(), "another step");
    }

    #[test]
    fn a_clock_that_is_set_back_stops_nothing() {
        let (mut rings, mut forecaster) = (Rings::default(), Forecaster::new(Resource::Cpu));
        past(&mut rings, 100, 30, |_| 300);
        forecaster.catch_up(&rings);
        for minute in 60..90 {
            past(&mut rings, minute, 1, |_| 500);
            forecaster.catch_up(&rings);
        }
        let outlook = forecaster.outlook(BEGIN + 90 * MINUTE).expect("it goes on");
        assert!(outlook.blueprint.quantiles.iter().flatten().all(|amount| (250.0..2000.0).contains(amount)));
    }
}
