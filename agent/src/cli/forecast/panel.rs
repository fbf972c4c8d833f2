//! One resource, fit to be drawn: which part of the past, on which scale, in which words.

use lathe_shard::{BitRate, Bytes, MilliCpu};

use crate::api::wire::forecast::{AheadView, CycleView, ForecastResource, ForecastView, RingView};
use crate::cli::output::{iops, permille, rate};

/// Most seconds that are drawn of the past: those of the longest ring.
const MOST_SEC: u64 = 30 * 86_400;
/// Fewest.
const LEAST_SEC: u64 = 60;
/// A grant that is more than so many times everything else is not drawn: there would be nothing else to see.
const FAR: u64 = 4;

/// How much of the past is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Seconds up to now.
    pub seconds: u64,
}

impl Span {
    /// So many seconds, a minute to 30 days.
    pub fn of(seconds: u64) -> Self {
        Self { seconds: seconds.clamp(LEAST_SEC, MOST_SEC) }
    }

    /// An hour, or ten minutes of a machine that has not been measured for longer.
    pub fn fitting(view: &ForecastView) -> Self {
        let minutes = view.resources.iter().map(|one| one.minutes.mean.len()).max().unwrap_or(0);
        Self::of(if minutes > 10 { 3600 } else { 600 })
    }

    fn ring(self, resource: &ForecastResource) -> &RingView {
        let (seconds, minutes) = (&resource.seconds, &resource.minutes);
        match self.seconds {
            0..=600 => seconds,
            601..=86_400 => minutes,
            _ => &resource.hours,
        }
    }
}

/// `10 min`, `1 h`, `2 d`.
pub fn time(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds / 60),
        3600..86_400 if seconds.is_multiple_of(3600) => format!("{} h", seconds / 3600),
        3600..86_400 => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{} d", seconds / 86_400),
    }
}

/// A step of the past.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// Seconds between its begin and now.
    pub age_sec: u64,
    /// Its length in seconds.
    pub length_sec: u64,
    /// What was asked for; `None`: not measured.
    pub amount: Option<u64>,
}

/// One resource.
#[derive(Clone, Debug)]
pub struct Panel {
    /// As the API writes it.
    pub resource: String,
    /// Oldest first.
    pub past: Vec<Step>,
    /// What is ahead, the nearest first.
    pub ahead: Vec<AheadView>,
    /// What is granted, where it is limited and fits the scale.
    pub grant: Option<u64>,
    /// Where the scale ends; it begins at 0.
    pub top: u64,
    /// Now and granted, in words.
    pub head: String,
    /// What is ahead, in words.
    pub next: String,
    /// How far it may be trusted, in words.
    pub trust: String,
    /// What comes back, and when next; empty where nothing does.
    pub back: String,
}

impl Panel {
    /// Of what lathed says at `now_sec` since the epoch.
    pub fn new(resource: &ForecastResource, span: Span, now_sec: u64) -> Self {
        let ring = span.ring(resource);
        let step = |(number, amount): (usize, &Option<u64>)| {
            let begins = ring.from_unix_sec.saturating_add(number as u64 * ring.step_sec);
            Step { age_sec: now_sec.saturating_sub(begins), length_sec: ring.step_sec, amount: *amount }
        };
        let past: Vec<_> = ring.mean.iter().enumerate().map(step).collect();
        let past: Vec<_> = past.into_iter().filter(|step| step.age_sec <= span.seconds).collect();
        let amounts = past.iter().filter_map(|step| step.amount);
        let largest = amounts.chain(resource.ahead.iter().map(|ahead| ahead.p95)).max().unwrap_or(0);
        let near = largest == 0 || resource.granted / FAR <= largest;
        let grant = Some(resource.granted).filter(|granted| *granted > 0 && near);
        Self {
            resource: resource.resource.clone(),
            ahead: resource.ahead.clone(),
            grant,
            top: round_up(&resource.resource, largest.max(grant.unwrap_or(0))),
            head: head(resource),
            next: next(resource),
            trust: trust(resource),
            back: resource
                .cycle
                .as_ref()
                .map_or_else(String::new, |cycle| back(&resource.resource, cycle, now_sec)),
            past,
        }
    }

    /// An amount in its unit.
    pub fn amount(&self, amount: u64) -> String {
        of(&self.resource, amount)
    }
}

fn of(resource: &str, amount: u64) -> String {
    match resource {
        "cpu" => MilliCpu(amount).to_string(),
        "memory" => Bytes(amount).to_string(),
        "net" => BitRate(amount).to_string(),
        _ => amount.to_string(),
    }
}

fn head(resource: &ForecastResource) -> String {
    let now = resource
        .now
        .map_or("not measured now".to_owned(), |now| format!("now {}", of(&resource.resource, now)));
    let granted = match resource.resource.as_str() {
        "net" => rate(resource.granted),
        "iops" => iops(resource.granted),
        other => of(other, resource.granted),
    };
    format!("{now}, granted {granted}")
}

fn next(resource: &ForecastResource) -> String {
    let Some(last) = resource.ahead.last() else {
        return "not measured of late: no forecast".to_owned();
    };
    let peak = |of: fn(&AheadView) -> u64| resource.ahead.iter().map(of).max().unwrap_or(0);
    let from = resource.ahead.first().map_or(0, |first| first.from_unix_sec);
    let by_hand = if resource.ahead.iter().any(|ahead| ahead.by_hand) { " (by hand)" } else { "" };
    format!(
        "{}: p50 {}, p95 {}{by_hand}",
        time(last.until_unix_sec.saturating_sub(from)),
        of(&resource.resource, peak(|ahead| ahead.p50)),
        of(&resource.resource, peak(|ahead| ahead.p95)),
    )
}

fn trust(resource: &ForecastResource) -> String {
    let Some(confidence) = resource.confidence_permille else {
        return format!("{} min of history: no confidence yet", resource.measured_min);
    };
    let confidence = format!("confidence {} %", confidence / 10);
    match (resource.held * 1000).checked_div(resource.judged) {
        Some(held) => {
            let held = permille(Some(held));
            format!("{confidence}; p95 held {held} of the time in {} min (want 95 %)", resource.judged)
        }
        None => confidence,
    }
}

/// What comes back, and when next. Nothing where a cycle has no steps.
fn back(resource: &str, cycle: &CycleView, now_sec: u64) -> String {
    let most = cycle.ahead.iter().max().copied().unwrap_or(0);
    let least = cycle.ahead.iter().min().copied().unwrap_or(0);
    let Some(steps) = cycle.ahead.iter().position(|amount| *amount > least + (most - least) / 2) else {
        return String::new();
    };
    let from_sec = cycle.from_unix_sec.saturating_add((steps as u64).saturating_mul(cycle.step_sec));
    let when = match from_sec.saturating_sub(now_sec) {
        0 => "now".to_owned(),
        left => format!("in {}", time(left)),
    };
    format!(
        "every {}, {} times so far; up to {} {when}",
        period(cycle.period_sec),
        cycle.cycles,
        of(resource, most)
    )
}

/// The length of a cycle, which is not known to the second.
fn period(seconds: u64) -> String {
    if seconds < 600 { format!("{seconds} s") } else { time(seconds + 30) }
}

/// The next round number, of which the half is one as well.
fn round_up(resource: &str, amount: u64) -> u64 {
    let steps: &[u64] = if resource == "memory" { &[4, 6] } else { &[10, 20, 40, 50, 60, 80] };
    let factor = if resource == "memory" { 2 } else { 10 };
    let mut unit = 1_u64;
    loop {
        if let Some(round) = steps.iter().map(|step| step.saturating_mul(unit)).find(|round| *round >= amount)
        {
            return round;
        }
        unit = unit.saturating_mul(factor);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resource(amounts: &[Option<u64>], granted: u64) -> ForecastResource {
        let minutes =
            RingView { step_sec: 60, from_unix_sec: 6000, mean: amounts.to_vec(), max: amounts.to_vec() };
        ForecastResource { resource: "cpu".to_owned(), granted, minutes, ..ForecastResource::default() }
    }

    #[test]
    fn the_scale_holds_all_and_the_grant_where_it_is_near() {
        let panel = |amounts: &[Option<u64>], granted| {
            Panel::new(&resource(amounts, granted), Span::of(3600), 6000 + 240)
        };
        let near = panel(&[Some(100), None, Some(310)], 1000);
        assert_eq!((near.top, near.grant), (1000, Some(1000)));
        assert_eq!(near.past[2], Step { age_sec: 120, length_sec: 60, amount: Some(310) });
        let far = panel(&[Some(100)], 8000);
        assert_eq!((far.top, far.grant), (100, None));
        assert_eq!((panel(&[], 500).top, panel(&[Some(0)], 0).top), (500, 10));
        assert_eq!(Panel::new(&resource(&[Some(1), Some(2)], 0), Span::of(3600), 6000 + 3650).past.len(), 1);
    }

    #[test]
    fn round_numbers_have_round_halves() {
        assert_eq!(round_up("cpu", 301), 400);
        assert_eq!(round_up("memory", 300 << 20), 384 << 20);
        assert_eq!(round_up("memory", u64::MAX), u64::MAX);
        assert_eq!(round_up("net", u64::MAX), u64::MAX);
    }

    #[test]
    fn words_are_honest() {
        let mut young = resource(&[Some(100)], 500);
        young.measured_min = 3;
        assert_eq!(trust(&young), "3 min of history: no confidence yet");
        assert_eq!(next(&young), "not measured of late: no forecast");
        assert_eq!(head(&young), "not measured now, granted 0.50");
        young.confidence_permille = Some(314);
        assert_eq!(trust(&young), "confidence 31 %");
        (young.judged, young.held) = (200, 189);
        assert_eq!(trust(&young), "confidence 31 %; p95 held 94.5 % of the time in 200 min (want 95 %)");
    }

    #[test]
    fn what_comes_back_is_told_with_the_next_time() {
        let cycle =
            |ahead: Vec<u64>| CycleView { period_sec: 240, cycles: 3, from_unix_sec: 0, step_sec: 10, ahead };
        assert_eq!(
            back("cpu", &cycle(vec![60, 60, 60, 470]), 4),
            "every 240 s, 3 times so far; up to 0.47 in 26 s"
        );
        assert_eq!(back("cpu", &cycle(vec![470, 60]), 4), "every 240 s, 3 times so far; up to 0.47 now");
        assert_eq!(back("cpu", &cycle(Vec::new()), 4), "");
    }

    #[test]
    fn spans_choose_the_ring_that_has_them() {
        let mut one = resource(&[], 0);
        (one.seconds.step_sec, one.hours.step_sec) = (1, 3600);
        let step = |seconds| Span::of(seconds).ring(&one).step_sec;
        assert_eq!([step(5), step(600), step(601), step(86_400), step(86_401)], [1, 1, 60, 60, 3600]);
        assert_eq!(Span::of(u64::MAX).seconds, 2_592_000);
        assert_eq!(
            [time(59), time(600), time(3600), time(5400), time(172_800)],
            ["59 s", "10 min", "1 h", "1 h 30 min", "2 d"]
        );
    }
}
