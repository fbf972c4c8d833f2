//! Which family of a page a goal is judged by: the one that is named, or the only one that fits.

use std::collections::BTreeMap;

use lathe_guest::protocol::inside::Goal;

use super::Wrong;
use super::family::{self, Reading, Wanted, declared_unit_usec, fits, unit_usec};
use super::page::{Declared, Kind, Lines, declared, label, sample};
use super::terms::wanted;

/// Most families that are told apart.
const MAX_FAMILIES: usize = 2000;
/// Most families that an error lists.
const MAX_LISTED: usize = 8;
/// Longest name of a family, bytes.
pub const MAX_METRIC_BYTES: usize = 200;
/// Families of the run time of languages, which every page has; they are meant only by name.
const RUN_TIME: [&[u8]; 7] = [b"process_", b"go_", b"python_", b"jvm_", b"nodejs_", b"promhttp_", b"scrape_"];

/// Gives the family's name, and what it says now.
///
/// # Errors
/// When there is no such family, it is of no use, or it is not clear which; with those that there are.
pub fn choose(page: &[u8], goal: Goal, metric: Option<&str>) -> Result<(String, Reading), Wrong> {
    let families = Families::of(page);
    let latency = matches!(goal, Goal::Latency { .. });
    let metric = match metric {
        Some(metric) => metric.to_owned(),
        None => families.only(latency)?,
    };
    let wanted: Wanted<'_> = wanted(goal, &metric);
    match family::read(page, &wanted) {
        Ok(reading) => Ok((metric, reading)),
        Err(wrong) if wrong.mend.is_empty() => Err(wrong.mend(families.fitting(latency))),
        Err(wrong) => Err(wrong),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Family {
    kind: Kind,
    /// Whether it is in a unit of time.
    timed: bool,
}

/// The families of a page by their names.
struct Families<'a>(BTreeMap<&'a [u8], Family>);

impl<'a> Families<'a> {
    fn of(page: &'a [u8]) -> Self {
        let mut families = Self(BTreeMap::new());
        for line in Lines::of(page) {
            match declared(line) {
                Some(Declared::Type(name, kind)) => families.add(name, kind),
                Some(Declared::Unit(name, unit)) => {
                    if let Some(family) = families.0.get_mut(name) {
                        family.timed |= declared_unit_usec(unit).is_some();
                    }
                }
                None => families.add_undeclared(line),
            }
        }
        families
    }

    fn add(&mut self, name: &'a [u8], kind: Kind) {
        if self.0.len() < MAX_FAMILIES && name.len() <= MAX_METRIC_BYTES {
            let timed = unit_usec(name).is_some();
            let family = self.0.entry(name).or_insert(Family { kind, timed });
            if family.kind == Kind::Untyped {
                family.kind = kind;
            }
        }
    }

    /// Of a sample: the family that it belongs to, if that is not declared.
    fn add_undeclared(&mut self, line: &'a [u8]) {
        let Some(sample) = sample(line) else { return };
        let without = |suffix: &[u8]| sample.name.strip_suffix(suffix);
        let stems = [b"_bucket".as_slice(), b"_count", b"_sum", b"_total", b"_created", b"_info", b""];
        let declared =
            stems.iter().filter_map(|suffix| without(suffix)).find(|stem| self.0.contains_key(stem));
        if declared.is_some_and(|stem| self.0.get(stem).is_some_and(|family| family.kind != Kind::Untyped)) {
            return;
        }
        match without(b"_bucket").filter(|_| label(sample.labels, b"le").is_some()) {
            Some(stem) => self.add(stem, Kind::Histogram),
            None if label(sample.labels, b"quantile").is_some() => self.add(sample.name, Kind::Summary),
            None if sample.name.ends_with(b"_total") => self.add(sample.name, Kind::Counter),
            None if declared.is_none() => self.add(sample.name, Kind::Untyped),
            None => {}
        }
    }

    /// The only one that was made for such a goal.
    fn only(&self, latency: bool) -> Result<String, Wrong> {
        let meant = |(name, family): &(&&[u8], &Family)| {
            let made = match family.kind {
                Kind::Histogram | Kind::Summary => family.timed || !latency,
                Kind::Counter => !latency,
                _ => false,
            };
            made && !RUN_TIME.iter().any(|prefix| name.starts_with(prefix))
        };
        let mut found = self.0.iter().filter(meant);
        match (found.next(), found.next()) {
            (Some((name, _)), None) => Ok(String::from_utf8_lossy(name).into_owned()),
            (Some(_), Some(_)) => {
                let listed = list(self.0.iter().filter(meant));
                let wrong = Wrong::of("more than one metric fits".to_owned());
                Err(wrong.mend(format!("name one of them by --metric: {listed}")))
            }
            (None, _) => {
                let told = if latency { "a latency" } else { "a throughput" };
                Err(Wrong::of(format!("no metric tells {told} by its name and type"))
                    .mend(self.fitting(latency)))
            }
        }
    }

    /// What could be named, in words.
    fn fitting(&self, latency: bool) -> String {
        let useful = |(_, family): &(&&[u8], &Family)| fits(family.kind, latency);
        if self.0.is_empty() {
            "there are no metrics at all: is this the right place?".to_owned()
        } else if self.0.iter().any(|pair| useful(&pair)) {
            format!("by --metric one of these can be named: {}", list(self.0.iter().filter(useful)))
        } else {
            format!("nor is there another of use: {}", list(self.0.iter()))
        }
    }
}

fn list<'a>(families: impl Iterator<Item = (&'a &'a [u8], &'a Family)>) -> String {
    let mut families: Vec<_> = families.collect();
    // Those of the application first.
    families.sort_by_key(|(name, _)| RUN_TIME.iter().any(|prefix| name.starts_with(prefix)));
    let one = |(name, family): &(&&[u8], &Family)| {
        let name = String::from_utf8_lossy(name.get(..MAX_METRIC_BYTES).unwrap_or(name));
        format!("{name} ({})", family.kind.name())
    };
    let mut text = families.iter().take(MAX_LISTED).map(one).collect::<Vec<_>>().join(", ");
    if families.len() > MAX_LISTED {
        text.push_str(&format!(" and {} more", families.len() - MAX_LISTED));
    }
    text
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::samples;
    use super::*;

    const LATENCY: Goal = Goal::Latency { permille: 950, under_usec: 20_000 };

    fn chosen(page: &str, goal: Goal, metric: Option<&str>) -> Result<String, String> {
        choose(page.as_bytes(), goal, metric).map(|(metric, _)| metric).map_err(|wrong| wrong.to_string())
    }

    #[test]
    fn the_only_one_that_fits_is_meant() {
        let page = samples::OPENMETRICS;
        assert_eq!(chosen(page, LATENCY, None).unwrap(), "http_request_duration_seconds");
        let bytes = "# TYPE a_bytes histogram\n# TYPE b summary\n# UNIT b ms\n# TYPE c_total counter\n";
        assert_eq!(chosen(bytes, LATENCY, None).unwrap(), "b");
        let counter = "process_cpu_seconds_total 3\n# TYPE jobs counter\njobs_total 7\n# TYPE x gauge\nx 1\n";
        assert_eq!(chosen(counter, Goal::Throughput, None).unwrap(), "jobs");
        let undeclared = "a_seconds_bucket{le=\"1\"} 1\na_seconds_sum 1\na_seconds_count 1\nup 1\n";
        assert_eq!(chosen(undeclared, LATENCY, None).unwrap(), "a_seconds");
    }

    #[test]
    fn what_is_not_clear_is_listed() {
        assert_eq!(
            chosen(samples::PROMETHEUS, LATENCY, None).unwrap_err(),
            "more than one metric fits; name one of them by --metric: http_request_duration_seconds (histogram), rpc_ms (summary)"
        );
        assert_eq!(
            chosen(samples::OPENMETRICS, Goal::Throughput, Some("queue_length")).unwrap_err(),
            "queue_length is a gauge, and throughput needs a counter, a histogram or a summary; by --metric one of these can be named: \
             http_request_duration_seconds (histogram), jobs_done (counter)"
        );
        assert_eq!(
            chosen("# TYPE a gauge\na 1\n", Goal::Throughput, None).unwrap_err(),
            "no metric tells a throughput by its name and type; nor is there another of use: a (gauge)"
        );
        assert_eq!(
            chosen("<html>\n<body> 1\n", LATENCY, Some("a")).unwrap_err(),
            "there is no metric a; there are no metrics at all: is this the right place?"
        );
        let many: String = (0..30).map(|at| format!("# TYPE {}_{at} counter\n", "a".repeat(300))).collect();
        assert!(
            chosen(&many, Goal::Throughput, None).unwrap_err().contains("no metrics at all"),
            "names too long"
        );
        let many: String = (0..3000).map(|at| format!("# TYPE {}_{at} counter\n", "a".repeat(100))).collect();
        let words = chosen(&many, Goal::Throughput, None).unwrap_err();
        assert!(words.ends_with(" (counter) and 1992 more") && words.len() < 1500, "{words}");
    }

    proptest! {
        #[test]
        fn whatever_a_page_says_something_comes_of_it(page in samples::strange()) {
            for metric in [None, Some("a")] {
                if let Err(wrong) = choose(page.as_bytes(), Goal::Throughput, metric) {
                    prop_assert!(wrong.to_string().len() < 3000);
                }
            }
        }
    }
}
