//! What people say of the future: a blueprint by hand, and events that are announced.
//!
//! - A **blueprint** says what a machine will ask for from when to when. Where it says something nothing else counts.
//! - An **event** says that it will ask for more than otherwise, by so much or by so many percent of what it asked for in the hour before the
//!   event; without numbers, for the most of the last thirty days. It only ever raises what is forecast.
//!
//! Both are once or daily; times are UTC. *Before the event* and not *before now*: while it goes on its own load must not raise it further. What
//! is said is held to bounds and to order when it is said and again when it is read back.

use lathe_forecast::{Blueprint, HORIZONS, LEVELS};
use serde::{Deserialize, Serialize};

use super::forecaster::{Outlook, P50, P95, P99};
use super::ring::{HOUR, MAX_AMOUNT, MINUTE, Rings};
use super::{Of, Resource};

/// Most steps of a blueprint.
pub const MAX_STEPS: usize = 384;
/// Most events of a machine.
pub const MAX_EVENTS: usize = 32;
/// Longest name of an event, characters.
pub const MAX_EVENT_NAME: usize = 40;
/// Longest time of something that happens once, seconds.
pub const MAX_ONCE_SEC: u64 = 31 * DAY;
/// What is further ahead is refused, seconds.
pub const MAX_AHEAD_SEC: u64 = 366 * DAY;
/// Largest raise, hundredths of a percent: a thousandfold.
pub const MAX_RAISE_CENTIPERCENT: u32 = 10_000_000;
/// How long before it is needed something is wanted, seconds: what a resize may take, and the minute's own grain.
pub const LEAD_SEC: u64 = 90;
/// How long what is over is still shown, seconds.
const SHOWN_SEC: u64 = DAY;
const DAY: u64 = 86_400;
/// Layout of what is stored.
const LAYOUT: u8 = 1;
/// Most bytes of it.
pub const MAX_BYTES: usize = 256 << 10;

/// When something is, in UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct When {
    /// Every day, or once.
    pub daily: bool,
    /// When it begins: seconds since the epoch, or since midnight.
    pub from_sec: u64,
    /// How long it is, seconds.
    pub for_sec: u64,
}

impl When {
    /// The time of it that goes on at `at_sec`, or the next one: begin and end in seconds since the epoch. `None`: it is over.
    pub fn next(&self, at_sec: u64) -> Option<(u64, u64)> {
        if !self.daily {
            let until = self.from_sec.saturating_add(self.for_sec);
            return (until > at_sec).then_some((self.from_sec, until));
        }
        let midnight = at_sec / DAY * DAY;
        // Yesterday's may reach over midnight.
        [midnight.saturating_sub(DAY), midnight, midnight.saturating_add(DAY)]
            .into_iter()
            .map(|day| day.saturating_add(self.from_sec))
            .map(|from| (from, from.saturating_add(self.for_sec)))
            .find(|(_, until)| *until > at_sec)
    }

    /// The time of it that shares a moment with `from_sec..until_sec`.
    fn meets(&self, from_sec: u64, until_sec: u64) -> Option<(u64, u64)> {
        self.next(from_sec).filter(|(begin, _)| *begin < until_sec)
    }

    /// Whether it shares a moment with another of its kind, ever.
    fn collides(&self, other: &Self) -> bool {
        if !self.daily {
            return self.meets(other.from_sec, other.from_sec.saturating_add(other.for_sec)).is_some();
        }
        // Both begin within one day and last no longer than one.
        let apart = |one: &Self, other: &Self| (other.from_sec + DAY - one.from_sec) % DAY >= one.for_sec;
        !apart(self, other) || !apart(other, self)
    }

    fn check(&self, now_sec: u64) -> Result<(), String> {
        let most = if self.daily { DAY } else { MAX_ONCE_SEC };
        if !(1..=most).contains(&self.for_sec) {
            return Err(format!("it lasts {} s, and may last 1 s to {} days", self.for_sec, most / DAY));
        }
        if self.daily && self.from_sec >= DAY {
            return Err(format!("a day has no second {}", self.from_sec));
        }
        if !self.daily && self.from_sec > now_sec.saturating_add(MAX_AHEAD_SEC) {
            return Err("it is more than a year ahead".to_owned());
        }
        Ok(())
    }
}

/// What one resource will be asked for, in its unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// Which one, by its number.
    #[serde(with = "number")]
    pub resource: Resource,
    /// When.
    pub when: When,
    /// Half of the time no more than this.
    pub p50: u64,
    /// In 95 of 100 cases.
    pub p95: u64,
    /// In 99 of 100 cases.
    pub p99: u64,
}

/// By how much an event raises what is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Raise {
    /// To so much, in the resource's unit.
    To(u64),
    /// By so much.
    Up(u64),
    /// By hundredths of a percent.
    UpCentipercent(u32),
}

/// Something that is announced.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Unique for the machine.
    pub name: String,
    /// When.
    pub when: When,
    /// What it raises, by resource; nothing at all: everything to the most of the last thirty days.
    #[serde(with = "raises")]
    pub raises: Vec<(Resource, Raise)>,
}

/// All that people have said of one machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ByHand {
    /// The blueprint; no two steps of a resource at the same time, but for daily ones under others.
    pub steps: Vec<Step>,
    /// How far it may be trusted, parts per thousand.
    pub confidence_permille: u32,
    /// Events, by name.
    pub events: Vec<Event>,
}

#[derive(Serialize, Deserialize)]
struct Stored {
    layout: u8,
    said: ByHand,
}

/// What is ahead, with what people say of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Merged {
    /// All of it.
    pub outlook: Outlook,
    /// Which steps people have said something of.
    pub by_hand: [bool; HORIZONS],
    /// A blueprint by hand is part of it, and the confidence is its own.
    pub blueprint: bool,
}

impl ByHand {
    /// Whether nobody has said anything.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty() && self.events.is_empty()
    }

    /// Whether it can be meant.
    ///
    /// # Errors
    /// What is wrong with it, and where.
    pub fn check(&self, now_sec: u64) -> Result<(), String> {
        if self.steps.len() > MAX_STEPS {
            return Err(format!("the blueprint has {} steps, {MAX_STEPS} at most", self.steps.len()));
        }
        if self.confidence_permille > 1000 {
            return Err(format!("confidence {} is more than 1000 in a thousand", self.confidence_permille));
        }
        for (at, step) in self.steps.iter().enumerate() {
            let wrong = |what: String| format!("step {} of the blueprint: {what}", at + 1);
            step.when.check(now_sec).map_err(wrong)?;
            if step.p50 > step.p95 || step.p95 > step.p99 {
                return Err(wrong(format!(
                    "p50 {}, p95 {}, p99 {} are not in order",
                    step.p50, step.p95, step.p99
                )));
            }
            fits(step.resource, step.p99).map_err(wrong)?;
            let earlier = self.steps[..at].iter().position(|earlier| {
                earlier.resource == step.resource
                    && earlier.when.daily == step.when.daily
                    && earlier.when.collides(&step.when)
            });
            if let Some(earlier) = earlier {
                return Err(wrong(format!("it is at the same time as step {}", earlier + 1)));
            }
        }
        if self.events.len() > MAX_EVENTS {
            return Err(format!("{} events are announced, {MAX_EVENTS} at most", self.events.len()));
        }
        self.events.iter().try_for_each(|event| event.check(now_sec))
    }

    /// Forgets what has been over for a day.
    pub fn tidy(&mut self, now_sec: u64) {
        let since = now_sec.saturating_sub(SHOWN_SEC);
        self.steps.retain(|step| step.when.next(since).is_some());
        self.events.retain(|event| event.when.next(since).is_some());
    }

    /// As bytes, for the store.
    pub fn save(&self) -> Vec<u8> {
        // Writing to memory cannot fail.
        serde_json::to_vec(&Stored { layout: LAYOUT, said: self.clone() }).unwrap_or_default()
    }

    /// Reads back what was stored.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn restore(bytes: &[u8], now_sec: u64) -> Result<Self, String> {
        if bytes.len() > MAX_BYTES {
            return Err(format!("{} bytes, at most {MAX_BYTES} are expected", bytes.len()));
        }
        let stored: Stored = serde_json::from_slice(bytes).map_err(|cause| cause.to_string())?;
        if stored.layout != LAYOUT {
            return Err(format!("layout {} is not known", stored.layout));
        }
        let mut said = stored.said;
        said.tidy(now_sec);
        said.check(now_sec)?;
        Ok(said)
    }

    /// The step of the blueprint that says something of `from_sec..until_sec`: one of its own day before a daily one.
    fn step(&self, resource: Resource, from_sec: u64, until_sec: u64) -> Option<&Step> {
        let said = |daily: bool| {
            let steps = self.steps.iter().filter(move |step| step.resource == resource);
            let steps = steps.filter(move |step| step.when.daily == daily);
            // Of two that follow each other within it the one that asks for more.
            steps
                .filter(move |step| step.when.meets(from_sec, until_sec).is_some())
                .max_by_key(|step| step.p95)
        };
        said(false).or_else(|| said(true))
    }

    /// What events make of a resource in `from_sec..until_sec`: median and 95 % quantile; `None` without any.
    fn raised(
        &self,
        resource: Resource,
        rings: Option<&Rings>,
        (from_sec, until_sec): (u64, u64),
        now_sec: u64,
    ) -> Option<(u64, u64)> {
        let of = |event: &Event| {
            let (begin, _) = event.when.meets(from_sec, until_sec)?;
            event.raised(resource, rings, begin.min(now_sec))
        };
        self.events.iter().filter_map(of).reduce(|one, other| (one.0.max(other.0), one.1.max(other.1)))
    }

    /// What is ahead of a resource, `learnt` being what is forecast of it. `None` where neither people nor the past say anything of some
    /// minute.
    pub fn merge(
        &self,
        resource: Resource,
        learnt: Option<Outlook>,
        rings: Option<&Rings>,
        now_sec: u64,
    ) -> Option<Merged> {
        let mut by_hand = [false; HORIZONS];
        if self.is_empty() {
            return learnt.map(|outlook| Merged { outlook, by_hand, blueprint: false });
        }
        let from_sec = learnt.as_ref().map_or(now_sec / MINUTE * MINUTE, |outlook| outlook.from_sec);
        let grain = resource.grain();
        let recent = recent(resource, rings, now_sec);
        let mut quantiles = [[0.0; LEVELS.len()]; HORIZONS];
        let mut said = false;
        for (at, levels) in quantiles.iter_mut().enumerate() {
            let begin = from_sec.saturating_add(at as u64 * MINUTE);
            let minute = (begin, begin.saturating_add(MINUTE));
            let step = self.step(resource, minute.0, minute.1);
            let raised = self.raised(resource, rings, minute, now_sec);
            by_hand[at] = step.is_some() || raised.is_some();
            said |= step.is_some();
            *levels = match (step, &learnt, recent, raised) {
                (Some(step), ..) => levels_of(step.p50, step.p95, step.p99, grain),
                (None, Some(learnt), ..) => learnt.blueprint.quantiles[at],
                (None, None, Some(recent), _) => levels_of(recent, recent, recent, grain),
                (None, None, None, Some((p50, p95))) => levels_of(p50, p95, p95, grain),
                (None, None, None, None) => return None,
            };
            if let Some((p50, p95)) = raised {
                let raised = levels_of(p50, p95, p95, grain);
                for (level, raised) in levels.iter_mut().zip(raised) {
                    *level = level.max(raised);
                }
            }
        }
        if learnt.is_none() && by_hand == [false; HORIZONS] {
            return None;
        }
        let learnt_confidence = learnt.as_ref().map_or(0.0, |outlook| outlook.blueprint.confidence);
        let confidence = if said { self.confidence_permille as f32 / 1000.0 } else { learnt_confidence };
        let blueprint = Blueprint { step_secs: MINUTE as u32, quantiles, confidence };
        Some(Merged { outlook: Outlook { from_sec, blueprint }, by_hand, blueprint: said })
    }

    /// What people say that a resource will be asked for by [`LEAD_SEC`] from now, in its unit: at least this should be there.
    pub fn wanted(&self, resource: Resource, rings: Option<&Rings>, now_sec: u64) -> Option<u64> {
        let soon = (now_sec, now_sec.saturating_add(LEAD_SEC));
        let step = self.step(resource, soon.0, soon.1).map(|step| step.p95);
        step.max(self.raised(resource, rings, soon, now_sec).map(|(_, p95)| p95))
    }
}

impl Event {
    fn check(&self, now_sec: u64) -> Result<(), String> {
        let name = &self.name;
        let wrong = |what: String| format!("event {name:?}: {what}");
        let fine = |character: char| !character.is_control() && !['/', '"', '\\'].contains(&character);
        let length = name.chars().count();
        if !(1..=MAX_EVENT_NAME).contains(&length) || name.trim() != name || !name.chars().all(fine) {
            let what =
                format!("a name has 1 to {MAX_EVENT_NAME} characters, no / \" \\ and no blanks around it");
            return Err(wrong(what));
        }
        self.when.check(now_sec).map_err(wrong)?;
        for (at, (resource, raise)) in self.raises.iter().enumerate() {
            if self.raises[..at].iter().any(|(earlier, _)| earlier == resource) {
                return Err(wrong(format!("{} is raised twice", resource.word())));
            }
            match *raise {
                Raise::To(amount) | Raise::Up(amount) => fits(*resource, amount).map_err(wrong)?,
                Raise::UpCentipercent(by) if by > MAX_RAISE_CENTIPERCENT => {
                    return Err(wrong(format!("+{} % is more than a thousandfold", by / 100)));
                }
                Raise::UpCentipercent(_) => {}
            }
        }
        Ok(())
    }

    /// Median and 95 % quantile while it goes on, from what was asked for before `before_sec`.
    fn raised(&self, resource: Resource, rings: Option<&Rings>, before_sec: u64) -> Option<(u64, u64)> {
        if self.raises.is_empty() {
            let most = most(resource, rings?, before_sec)?;
            return Some((most, most));
        }
        let raise = self.raises.iter().find(|(of, _)| *of == resource).map(|(_, raise)| *raise)?;
        let (p50, p95) = match rings.and_then(|rings| hour_before(resource, rings, before_sec)) {
            Some(base) => base,
            // Of nothing no percentage can be told.
            None if matches!(raise, Raise::UpCentipercent(_)) => return None,
            None => (0, 0),
        };
        let raised = |base: u64| match raise {
            Raise::To(to) => to,
            Raise::Up(by) => base.saturating_add(by),
            Raise::UpCentipercent(by) => {
                let by = u128::from(base) * u128::from(by) / 10_000;
                base.saturating_add(u64::try_from(by).unwrap_or(u64::MAX))
            }
        };
        Some((raised(p50), raised(p95)))
    }
}

/// Whether the rings could hold as much.
fn fits(resource: Resource, amount: u64) -> Result<(), String> {
    let most = u64::from(MAX_AMOUNT).saturating_mul(resource.grain());
    if amount <= most {
        return Ok(());
    }
    Err(format!("{amount} of {} is more than any machine has, {most} at most", resource.word()))
}

/// All levels, of which three are known: straight lines in between.
fn levels_of(p50: u64, p95: u64, p99: u64, grain: u64) -> [f32; LEVELS.len()] {
    let [p50, p95, p99] = [p50, p95, p99].map(|amount| amount as f32 / grain as f32);
    LEVELS.map(|level| {
        let ((low, below), (high, above)) =
            if level <= LEVELS[P95] { ((P50, p50), (P95, p95)) } else { ((P95, p95), (P99, p99)) };
        let part = (level - LEVELS[low]) / (LEVELS[high] - LEVELS[low]);
        // Both ends exactly, whatever rounding makes of the rest.
        (below + (above - below) * part.clamp(0.0, 1.0)).clamp(below, above.max(below))
    })
}

/// Amounts of the ring that is forecast of a resource, by the second in which each minute begins.
fn minutes(resource: Resource, rings: &Rings) -> impl DoubleEndedIterator<Item = (u64, u64)> + '_ {
    let ring = match resource.forecast_of() {
        Of::Mean => &rings.minutes.mean,
        Of::Max => &rings.minutes.max,
    };
    let grain = resource.grain();
    ring.iter().filter_map(move |(minute, amount)| {
        Some((minute.saturating_mul(MINUTE), u64::from(amount?).saturating_mul(grain)))
    })
}

/// What was asked for in the last minute that is known, if that is not long over.
fn recent(resource: Resource, rings: Option<&Rings>, now_sec: u64) -> Option<u64> {
    let (from_sec, amount) = minutes(resource, rings?).next_back()?;
    (now_sec.saturating_sub(from_sec) <= 5 * MINUTE).then_some(amount)
}

/// Median and largest of the hour before `before_sec`; of what is known before that where nothing was measured then.
fn hour_before(resource: Resource, rings: &Rings, before_sec: u64) -> Option<(u64, u64)> {
    let before =
        || minutes(resource, rings).filter(|(from_sec, _)| from_sec.saturating_add(MINUTE) <= before_sec);
    let hour: Vec<u64> = before()
        .filter(|(from_sec, _)| from_sec.saturating_add(HOUR) >= before_sec)
        .map(|(_, amount)| amount)
        .collect();
    let mut known = if hour.is_empty() { before().map(|(_, amount)| amount).collect() } else { hour };
    known.sort_unstable();
    Some((*known.get(known.len() / 2)?, *known.last()?))
}

/// The most that was asked for in any minute or hour before `before_sec` that is remembered.
fn most(resource: Resource, rings: &Rings, before_sec: u64) -> Option<u64> {
    let minute =
        minutes(resource, rings).filter(|(from_sec, _)| *from_sec < before_sec).map(|(_, amount)| amount);
    let ring = match resource.forecast_of() {
        Of::Mean => &rings.hours.mean,
        Of::Max => &rings.hours.max,
    };
    let grain = resource.grain();
    let hours = ring.iter().filter(|(hour, _)| hour.saturating_mul(HOUR) < before_sec);
    let hours = hours.filter_map(|(_, amount)| Some(u64::from(amount?).saturating_mul(grain)));
    minute.chain(hours).max()
}

/// A resource by its number.
mod number {
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

    use crate::foresight::Resource;

    pub fn of<E: Error>(number: u8) -> Result<Resource, E> {
        let resource = Resource::ALL.get(usize::from(number)).copied();
        resource.ok_or_else(|| E::custom(format_args!("there is no resource {number}")))
    }

    pub fn serialize<S: Serializer>(resource: &Resource, serializer: S) -> Result<S::Ok, S::Error> {
        (*resource as u8).serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Resource, D::Error> {
        of(u8::deserialize(deserializer)?)
    }
}

/// The same of several.
mod raises {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use super::{Raise, number};
    use crate::foresight::Resource;

    pub fn serialize<S: Serializer>(raises: &[(Resource, Raise)], serializer: S) -> Result<S::Ok, S::Error> {
        let numbers: Vec<(u8, Raise)> = raises.iter().map(|(of, raise)| (*of as u8, *raise)).collect();
        numbers.serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<(Resource, Raise)>, D::Error> {
        let numbers = Vec::<(u8, Raise)>::deserialize(deserializer)?;
        numbers.into_iter().map(|(of, raise)| Ok((number::of(of)?, raise))).collect()
    }
}

#[cfg(test)]
#[path = "by_hand_tests.rs"]
mod tests;
