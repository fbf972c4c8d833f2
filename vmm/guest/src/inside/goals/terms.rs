//! What a goal says: its name, what is expected, and by which metrics it is judged.

use lathe_guest::protocol::inside::{Goal, MAX_NAME_BYTES};
use serde::{Deserialize, Serialize};

use super::choice::MAX_METRIC_BYTES;
use super::family::Wanted;
use super::page::is_name;
use super::place::Place;

/// The quantile that is told beside a throughput, parts per thousand.
pub const USUAL_PERMILLE: u32 = 950;
/// Longest time that requests may take by a goal, microseconds: an hour.
const MAX_UNDER_USEC: u64 = 3_600_000_000;
/// Percentiles as they are written, and parts per thousand.
const PERCENTILES: [(&str, u32); 5] =
    [("p50", 500), ("p90", 900), ("p95", 950), ("p99", 990), ("p99.9", 999)];

/// A goal that is held.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Terms {
    /// Of which application.
    pub name: String,
    /// What is expected.
    pub goal: Goal,
    /// Where its metrics are.
    pub place: Place,
    /// Which of them it is judged by.
    pub metric: String,
}

/// The same as it is kept in a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Written {
    /// Of which application; at most [`MAX_NAME_BYTES`] long.
    pub name: String,
    /// What is expected.
    pub goal: Goal,
    /// A [`Place`].
    pub metrics: String,
    /// A family of metrics there; at most [`MAX_METRIC_BYTES`] long.
    pub metric: String,
}

impl TryFrom<Written> for Terms {
    type Error = String;

    fn try_from(written: Written) -> Result<Self, String> {
        check_name(&written.name)?;
        check_goal(written.goal)?;
        check_metric(&written.metric)?;
        let place = written.metrics.parse()?;
        Ok(Self { name: written.name, goal: written.goal, place, metric: written.metric })
    }
}

impl From<&Terms> for Written {
    fn from(terms: &Terms) -> Self {
        Self {
            name: terms.name.clone(),
            goal: terms.goal,
            metrics: terms.place.to_string(),
            metric: terms.metric.clone(),
        }
    }
}

/// What is looked for on the page of a goal.
pub fn wanted(goal: Goal, metric: &str) -> Wanted<'_> {
    Wanted { metric, permille: permille(goal), latency: matches!(goal, Goal::Latency { .. }) }
}

/// The quantile that a goal is about, or the usual one; parts per thousand.
pub fn permille(goal: Goal) -> u32 {
    match goal {
        Goal::Latency { permille, .. } => permille,
        Goal::Throughput | Goal::Other => USUAL_PERMILLE,
    }
}

/// Whether a goal can have this name.
///
/// # Errors
/// In words, when it cannot.
pub fn check_name(name: &str) -> Result<(), String> {
    let fine = |c: char| c.is_ascii_alphanumeric() || ['.', '_', '-', '@', ':'].contains(&c);
    if name.is_empty() || name.starts_with('-') || name.len() > MAX_NAME_BYTES || !name.chars().all(fine) {
        return Err(format!(
            "{name:?} is no name of a goal: up to {MAX_NAME_BYTES} letters, digits and . _ - @ : make one"
        ));
    }
    Ok(())
}

/// Whether a metric can be called so.
///
/// # Errors
/// In words, when it cannot.
pub fn check_metric(metric: &str) -> Result<(), String> {
    if metric.len() > MAX_METRIC_BYTES || !is_name(metric.as_bytes()) {
        return Err(format!(
            "{metric:?} is no name of a metric: letters, digits, _ and : make one, no labels"
        ));
    }
    Ok(())
}

/// Whether this can be expected.
///
/// # Errors
/// In words, when it cannot.
pub fn check_goal(goal: Goal) -> Result<(), String> {
    match goal {
        Goal::Latency { permille: 1..1000, under_usec: 1..=MAX_UNDER_USEC } | Goal::Throughput => Ok(()),
        Goal::Latency { .. } => {
            Err("a goal of latency is of p0.1 to p99.9, and under 1 us to 3600 s".to_owned())
        }
        Goal::Other => Err("this kind of goal is of a later version".to_owned()),
    }
}

/// `p95 < 20ms`, with or without blanks.
///
/// # Errors
/// In words, when it is anything else.
pub fn parse_latency(text: &str) -> Result<Goal, String> {
    let Some((percentile, time)) = text.split_once('<') else {
        return Err(format!(
            "{text:?} is no goal of latency: write 'p95 < 20ms', in quotes because of the <"
        ));
    };
    let percentile = percentile.trim();
    let found = PERCENTILES.iter().find(|(name, _)| *name == percentile);
    let known = PERCENTILES.map(|(name, _)| name).join(", ");
    let permille =
        found.ok_or_else(|| format!("{percentile:?} is no percentile that is known here: {known}"))?.1;
    let goal = Goal::Latency { permille, under_usec: usec(time.trim())? };
    check_goal(goal).map(|()| goal)
}

fn usec(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is no time: write 500us, 20ms or 1.5s");
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let digits = match unit.trim_start() {
        "us" => 0,
        "ms" => 3,
        "s" => 6,
        _ => return Err(wrong()),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    // What is smaller than a microsecond cannot be asked for.
    let fraction = fraction.trim_end_matches('0');
    if fraction.len() > digits || (number.contains('.') && !number.ends_with(|c: char| c.is_ascii_digit())) {
        return Err(wrong());
    }
    let fraction = format!("{fraction:0<digits$}");
    let part = if fraction.is_empty() { Some(0) } else { fraction.parse::<u64>().ok() };
    let whole = whole.parse::<u64>().ok().and_then(|whole| whole.checked_mul(10_u64.pow(digits as u32)));
    whole.zip(part).and_then(|(whole, part)| whole.checked_add(part)).ok_or_else(wrong)
}

/// The quantile, as it is called: p95, p99.9.
pub fn percentile(permille: u32) -> String {
    match (permille / 10, permille % 10) {
        (percent, 0) => format!("p{percent}"),
        (percent, tenth) => format!("p{percent}.{tenth}"),
    }
}

/// A time in its likely unit.
pub fn time(usec: u64) -> String {
    match usec {
        0..1_000 => format!("{usec} us"),
        1_000..1_000_000 => format!("{:.1} ms", usec as f64 / 1e3),
        _ => format!("{:.2} s", usec as f64 / 1e6),
    }
}

/// What is expected, in words.
pub fn goal(goal: Goal) -> String {
    match goal {
        Goal::Latency { permille, under_usec } => {
            format!("{} under {}", percentile(permille), time(under_usec))
        }
        Goal::Throughput => "throughput high".to_owned(),
        Goal::Other => "of a later version".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_latency_is_written_in_few_ways() {
        for (text, permille, under_usec) in [
            ("p95 < 20ms", 950, 20_000),
            ("p95<20ms", 950, 20_000),
            (" p99.9  <  1.5 s ", 999, 1_500_000),
            ("p50<1us", 500, 1),
            ("p90 < 0.25ms", 900, 250),
            ("p99 < 3600s", 990, 3_600_000_000),
            ("p99 < 1.50ms", 990, 1_500),
        ] {
            assert_eq!(parse_latency(text), Ok(Goal::Latency { permille, under_usec }), "{text}");
        }
        for (bad, why) in [
            ("20ms", "write 'p95 < 20ms', in quotes"),
            ("p95", "write 'p95 < 20ms', in quotes"),
            ("p95 > 20ms", "write 'p95 < 20ms', in quotes"),
            ("p96 < 20ms", "p50, p90, p95, p99, p99.9"),
            ("< 20ms", "\"\" is no percentile"),
            ("p95 < 20", "\"20\" is no time"),
            ("p95 < 20 min", "is no time"),
            ("p95 <= 20ms", "\"= 20ms\" is no time"),
            ("p95 < -1ms", "is no time"),
            ("p95 < ms", "is no time"),
            ("p95 < .5ms", "is no time"),
            ("p95 < 1.ms", "is no time"),
            ("p95 < 1.2.3ms", "is no time"),
            ("p95 < 0.5us", "is no time"),
            ("p95 < 99999999999999999999s", "is no time"),
            ("p95 < 18446744073709551s", "is no time"),
            ("p95 < 18446744073709s", "under 1 us to 3600 s"),
            ("p95 < 0ms", "under 1 us to 3600 s"),
            ("p95 < 3601s", "under 1 us to 3600 s"),
        ] {
            let words = parse_latency(bad).unwrap_err();
            assert!(words.contains(why), "{bad}: {words}");
        }
    }

    #[test]
    fn what_is_expected_is_said_in_words() {
        assert_eq!(goal(parse_latency("p99.9<1.5s").unwrap()), "p99.9 under 1.50 s");
        assert_eq!(goal(parse_latency("p50<999us").unwrap()), "p50 under 999 us");
        assert_eq!(goal(parse_latency("p95<20ms").unwrap()), "p95 under 20.0 ms");
    }

    #[test]
    fn what_is_written_down_is_checked_when_it_is_read() {
        let written = Written {
            name: "web".into(),
            goal: Goal::Throughput,
            metrics: "/run/web.prom".into(),
            metric: "a_total".into(),
        };
        let terms = Terms::try_from(written.clone()).unwrap();
        assert_eq!(Written::from(&terms), written);
        for bad in [
            Written { name: "a b".into(), ..written.clone() },
            Written { name: "a".repeat(MAX_NAME_BYTES + 1), ..written.clone() },
            Written { name: String::new(), ..written.clone() },
            Written { name: "--none".into(), ..written.clone() },
            Written { goal: Goal::Other, ..written.clone() },
            Written { goal: Goal::Latency { permille: 1000, under_usec: 1 }, ..written.clone() },
            Written { metrics: "http://10.0.0.1/".into(), ..written.clone() },
            Written { metric: "a{b=\"c\"}".into(), ..written.clone() },
            Written { metric: String::new(), ..written },
        ] {
            assert!(Terms::try_from(bad.clone()).is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn no_words_are_too_strange(text in "(p95<)?[0-9.]{0,25}(us|ms|s|.{0,3})") {
            if let Ok(goal) = parse_latency(&text) {
                prop_assert!(check_goal(goal).is_ok());
            }
        }
    }
}
