//! One family of metrics, read from a page: what of it a goal is judged by, summed over all its label sets.
//!
//! ```text
//! page ─► lines of the family alone ─► Gathering: 64 buckets at most, a few sums ─► Reading, or what is wrong
//! ```
//! Counters are sums, quantiles and gauges the largest of all label sets. See <https://prometheus.io/docs/instrumenting/exposition_formats/>
//! and OpenMetrics 1.0, sections 5.1 to 5.5.

use super::Wrong;
use super::page::{Declared, Kind, Lines, Sample, declared, label, number, sample};

/// Most buckets of a histogram.
pub const MAX_BUCKETS: usize = 64;
/// Quantiles that differ by less are the same: some applications write 0.95 as 0.949999999.
const SAME_QUANTILE: f64 = 1e-6;

/// What is looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted<'a> {
    /// The family.
    pub metric: &'a str,
    /// The quantile, parts per thousand.
    pub permille: u32,
    /// Whether it must tell a latency; else it must tell a rate.
    pub latency: bool,
}

/// Requests that took so long at most.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bucket {
    /// In the family's unit; the last one's may be infinite.
    pub le: f64,
    /// How many, those of smaller buckets among them.
    pub count: f64,
}

/// What one page says.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Reading {
    /// Microseconds in the family's unit.
    pub unit_usec: f64,
    /// By their bounds, of a histogram.
    pub buckets: Vec<Bucket>,
    /// A latency that the application tells itself, in the family's unit.
    pub direct: Option<f64>,
    /// A counter of requests.
    pub count: Option<f64>,
}

/// Reads one family.
///
/// # Errors
/// When it is not there, or is of no use for what is wanted; in words without the place.
pub fn read(page: &[u8], wanted: &Wanted<'_>) -> Result<Reading, Wrong> {
    let mut gathering = Gathering::default();
    let metric = wanted.metric.as_bytes();
    for line in Lines::of(page) {
        if line.first() == Some(&b'#') {
            gathering.declare(line, metric);
        } else if line.starts_with(metric)
            && let Some(sample) = sample(line)
        {
            gathering.take(&sample, metric, wanted.permille);
        }
    }
    gathering.finish(wanted)
}

/// Microseconds in the unit that a family's name says; seconds where it says none.
pub fn unit_usec(metric: &[u8]) -> Option<f64> {
    let stem = metric.strip_suffix(b"_total").unwrap_or(metric);
    let units: [(&[u8], f64); 7] = [
        (b"_seconds", 1e6),
        (b"_milliseconds", 1e3),
        (b"_ms", 1e3),
        (b"_microseconds", 1.0),
        (b"_us", 1.0),
        (b"_nanoseconds", 1e-3),
        (b"_ns", 1e-3),
    ];
    units.iter().find(|(suffix, _)| stem.ends_with(suffix)).map(|(_, usec)| *usec)
}

/// The same of a unit that is declared.
pub fn declared_unit_usec(unit: &[u8]) -> Option<f64> {
    unit_usec(&[b"_", unit].concat())
}

/// A family of OpenMetrics leaves `_total` away that its samples carry.
pub fn same_family(one: &[u8], other: &[u8]) -> bool {
    one == other || one.strip_suffix(b"_total") == Some(other) || other.strip_suffix(b"_total") == Some(one)
}

#[derive(Debug, Default)]
struct Gathering {
    /// Of the family itself, or of the one that [is the same](same_family).
    kind: Option<(bool, Kind)>,
    unit_usec: Option<f64>,
    buckets: Vec<Bucket>,
    /// Where the next bucket is likely.
    next: usize,
    overfull: bool,
    /// The smallest quantile that is large enough, and its largest value.
    quantile: Option<(f64, Option<f64>)>,
    largest_quantile: Option<f64>,
    plain: Option<f64>,
    highest: Option<f64>,
    total: Option<f64>,
    count: Option<f64>,
}

impl Gathering {
    fn declare(&mut self, line: &[u8], metric: &[u8]) {
        match declared(line) {
            Some(Declared::Type(name, kind)) if name == metric => self.kind = Some((true, kind)),
            Some(Declared::Type(name, Kind::Counter)) if same_family(name, metric) && self.kind.is_none() => {
                self.kind = Some((false, Kind::Counter));
            }
            Some(Declared::Unit(name, unit)) if same_family(name, metric) => {
                self.unit_usec = declared_unit_usec(unit);
            }
            _ => {}
        }
    }

    fn take(&mut self, sample: &Sample<'_>, metric: &[u8], permille: u32) {
        let Some(tail) = sample.name.strip_prefix(metric) else { return };
        let value = sample.value;
        match tail {
            b"" => match label(sample.labels, b"quantile").and_then(number) {
                Some(quantile) => self.take_quantile(quantile, value, f64::from(permille) / 1000.0),
                None if value.is_nan() => {}
                None => {
                    add(&mut self.plain, value);
                    self.highest = Some(self.highest.map_or(value, |highest| highest.max(value)));
                }
            },
            b"_bucket" => {
                if let Some(le) = label(sample.labels, b"le").and_then(number) {
                    self.take_bucket(le, value);
                }
            }
            b"_total" => add(&mut self.total, value),
            b"_count" => add(&mut self.count, value),
            _ => {}
        }
    }

    fn take_bucket(&mut self, le: f64, count: f64) {
        if le.is_nan() || !is_count(count) {
            return;
        }
        // Label sets have the same bounds in the same order.
        let at = match self.buckets.get(self.next) {
            Some(bucket) if bucket.le == le => Some(self.next),
            _ => self.buckets.iter().position(|bucket| bucket.le == le),
        };
        let room = self.buckets.len() < MAX_BUCKETS;
        match at.and_then(|at| self.buckets.get_mut(at)) {
            Some(bucket) => bucket.count += count,
            None if room => self.buckets.push(Bucket { le, count }),
            None => self.overfull = true,
        }
        self.next = at.map_or(self.buckets.len(), |at| at + 1) % self.buckets.len().max(1);
    }

    fn take_quantile(&mut self, quantile: f64, value: f64, asked: f64) {
        if quantile.is_nan() {
            return;
        }
        self.largest_quantile = Some(self.largest_quantile.map_or(quantile, |largest| largest.max(quantile)));
        let value = Some(value).filter(|value| !value.is_nan());
        match &mut self.quantile {
            _ if quantile < asked - SAME_QUANTILE => {}
            Some((smallest, highest)) if (quantile - *smallest).abs() < SAME_QUANTILE => {
                *highest = match (*highest, value) {
                    (Some(one), Some(other)) => Some(one.max(other)),
                    (one, other) => one.or(other),
                };
            }
            Some((smallest, _)) if quantile > *smallest => {}
            kept => *kept = Some((quantile, value)),
        }
    }

    fn kind(&self) -> Option<Kind> {
        match self.kind {
            Some((_, kind)) if kind != Kind::Untyped => return Some(kind),
            _ => {}
        }
        if !self.buckets.is_empty() {
            Some(Kind::Histogram)
        } else if self.largest_quantile.is_some() {
            Some(Kind::Summary)
        } else if self.total.is_some() {
            Some(Kind::Counter)
        } else if self.plain.is_some() || self.kind.is_some() {
            Some(Kind::Untyped)
        } else {
            None
        }
    }

    fn finish(mut self, wanted: &Wanted<'_>) -> Result<Reading, Wrong> {
        let metric = wanted.metric;
        let kind = self.kind().ok_or_else(|| Wrong::of(format!("there is no metric {metric}")))?;
        if !fits(kind, wanted.latency) {
            return Err(unfit(metric, kind, wanted.latency));
        }
        if self.overfull && wanted.latency {
            let wrong = Wrong::of(format!("{metric} has more than {MAX_BUCKETS} buckets"));
            return Err(wrong.mend("let the application use fewer, or name another metric by --metric"));
        }
        let told = self.count.is_some() || self.largest_quantile.is_some();
        if kind == Kind::Summary && wanted.latency && self.quantile.is_none() && told {
            let most = self
                .largest_quantile
                .map_or("no quantiles".into(), |most| format!("quantiles up to {most} only"));
            let wrong = Wrong::of(format!("{metric} is a summary with {most}"));
            return Err(wrong.mend("ask for a smaller percentile, or name another metric by --metric"));
        }
        let by_name = || unit_usec(metric.as_bytes());
        let mut reading =
            Reading { unit_usec: self.unit_usec.or_else(by_name).unwrap_or(1e6), ..Reading::default() };
        match kind {
            Kind::Histogram => {
                if !self.overfull {
                    reading.buckets = self.sorted_buckets();
                }
                let all = reading.buckets.last().map(|bucket| bucket.count);
                // It may be declared, and have no label set before the first request.
                reading.count = self.count.or(all).or(Some(0.0));
            }
            Kind::Summary => {
                reading.direct = self.quantile.and_then(|(_, value)| value);
                reading.count = self.count.or_else(|| self.largest_quantile.is_none().then_some(0.0));
            }
            Kind::Counter => reading.count = self.total.or(self.plain).or(Some(0.0)),
            Kind::Untyped if !wanted.latency => reading.count = self.plain.or(Some(0.0)),
            _ => reading.direct = self.highest,
        }
        reading.count = reading.count.filter(|count| is_count(*count));
        Ok(reading)
    }

    fn sorted_buckets(&mut self) -> Vec<Bucket> {
        let mut buckets = std::mem::take(&mut self.buckets);
        buckets.sort_by(|one, other| one.le.total_cmp(&other.le));
        if let (Some(last), Some(count)) = (buckets.last().copied(), self.count)
            && last.le.is_finite()
        {
            buckets.push(Bucket { le: f64::INFINITY, count });
        }
        buckets
    }
}

/// Whether a family of this kind tells a latency, or a rate.
pub fn fits(kind: Kind, latency: bool) -> bool {
    match kind {
        Kind::Histogram | Kind::Summary | Kind::Untyped => true,
        Kind::Gauge => latency,
        Kind::Counter => !latency,
        Kind::Other => false,
    }
}

/// In words that it does not.
pub fn unfit(metric: &str, kind: Kind, latency: bool) -> Wrong {
    let (told, needs) = if latency {
        ("latency", "a histogram, a summary or a gauge")
    } else {
        ("throughput", "a counter, a histogram or a summary")
    };
    let article = match kind {
        Kind::Untyped | Kind::Other => "",
        _ => "a ",
    };
    Wrong::of(format!("{metric} is {article}{}, and {told} needs {needs}", kind.name()))
}

fn add(sum: &mut Option<f64>, value: f64) {
    if is_count(value) {
        *sum = Some(sum.unwrap_or(0.0) + value);
    }
}

fn is_count(value: f64) -> bool {
    value.is_finite() && value >= 0.0
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::samples;
    use super::*;

    fn latency(metric: &str) -> Wanted<'_> {
        Wanted { metric, permille: 950, latency: true }
    }

    fn throughput(metric: &str) -> Wanted<'_> {
        Wanted { latency: false, ..latency(metric) }
    }

    fn wrong(page: &str, wanted: &Wanted<'_>) -> String {
        read(page.as_bytes(), wanted).unwrap_err().what
    }

    #[test]
    fn a_histogram_is_summed_over_its_label_sets() {
        for page in [samples::PROMETHEUS, samples::OPENMETRICS] {
            let reading = read(page.as_bytes(), &latency("http_request_duration_seconds")).unwrap();
            let buckets: Vec<_> = reading.buckets.iter().map(|bucket| (bucket.le, bucket.count)).collect();
            assert_eq!(buckets, [(0.01, 110.0), (0.025, 150.0), (0.1, 160.0), (f64::INFINITY, 161.0)]);
            assert_eq!((reading.unit_usec, reading.count, reading.direct), (1e6, Some(161.0), None));
        }
    }

    #[test]
    fn a_summary_tells_the_next_larger_quantile_of_the_slowest() {
        let read = |permille| read(samples::PROMETHEUS.as_bytes(), &Wanted { permille, ..latency("rpc_ms") });
        assert_eq!(read(950).unwrap().direct, Some(48.5), "0.99, NaN passed over");
        assert_eq!(read(500).unwrap().direct, Some(9.0));
        assert_eq!(read(900).unwrap().unit_usec, 1e3);
        assert_eq!(read(500).unwrap().count, Some(300.0));
        let words = read(999).unwrap_err().what;
        assert_eq!(words, "rpc_ms is a summary with quantiles up to 0.99 only");
        let bare = "# TYPE a_seconds summary\na_seconds_count 3\na_seconds_sum 1\n";
        assert_eq!(wrong(bare, &latency("a_seconds")), "a_seconds is a summary with no quantiles");
        let nothing = "a{quantile=\"0.99\"} NaN\na_count 0\n";
        let reading = super::read(nothing.as_bytes(), &latency("a")).unwrap();
        assert_eq!((reading.direct, reading.count), (None, Some(0.0)));
    }

    #[test]
    fn counters_are_found_with_and_without_their_ending() {
        for (page, metric) in [
            (samples::PROMETHEUS, "jobs_done_total"),
            (samples::PROMETHEUS, "jobs_done"),
            (samples::OPENMETRICS, "jobs_done"),
            (samples::OPENMETRICS, "jobs_done_total"),
        ] {
            let reading = read(page.as_bytes(), &throughput(metric)).unwrap();
            assert_eq!(reading.count, Some(1_030.0), "{metric}");
            assert!(wrong(page, &latency(metric)).contains("is a counter, and latency needs"));
        }
        assert_eq!(read(b"# TYPE a counter\na 7\n", &throughput("a")).unwrap().count, Some(7.0));
        assert_eq!(read(b"a 7\n", &throughput("a")).unwrap().count, Some(7.0), "of no type");
        assert_eq!(read(b"# TYPE a_total counter\n", &throughput("a_total")).unwrap().count, Some(0.0));
        let both = "# TYPE a_total counter\na_total 7\n# TYPE a gauge\na 3\n";
        assert!(wrong(both, &throughput("a")).contains("a is a gauge"));
        assert_eq!(read(both.as_bytes(), &throughput("a_total")).unwrap().count, Some(7.0));
    }

    #[test]
    fn gauges_and_units() {
        let page =
            "# TYPE lag gauge\n# UNIT lag milliseconds\nlag{a=\"1\"} 3\nlag{a=\"2\"} 5\nlag{a=\"3\"} NaN\n";
        let reading = read(page.as_bytes(), &latency("lag")).unwrap();
        assert_eq!((reading.direct, reading.unit_usec, reading.count), (Some(5.0), 1e3, None));
        let units = ["a_seconds", "a_seconds_total", "a_ms", "a_us", "a_ns", "a"]
            .map(|name| unit_usec(name.as_bytes()));
        assert_eq!(units, [Some(1e6), Some(1e6), Some(1e3), Some(1.0), Some(1e-3), None]);
    }

    #[test]
    fn what_is_of_no_use_is_said() {
        let page = samples::OPENMETRICS;
        assert_eq!(wrong(page, &latency("http")), "there is no metric http");
        assert!(
            wrong(page, &throughput("queue_length"))
                .contains("queue_length is a gauge, and throughput needs")
        );
        assert!(wrong(page, &throughput("build")).contains("build is of a type without use here"));
        let many: String = (0..=MAX_BUCKETS).map(|le| format!("a_bucket{{le=\"{le}\"}} 1\n")).collect();
        assert_eq!(wrong(&many, &latency("a")), "a has more than 64 buckets");
        let reading = read(many.as_bytes(), &throughput("a")).unwrap();
        assert_eq!(reading.buckets, [], "a rate is known even so");
    }

    #[test]
    fn a_histogram_without_its_last_bucket_has_it_from_its_count() {
        let page =
            "a_bucket{le=\"2\"} 5\na_bucket{le=\"1\"} 4\na_bucket{le=\"x\"} 9\na_bucket 9\na_count 7\n";
        let buckets = read(page.as_bytes(), &latency("a")).unwrap().buckets;
        let counts: Vec<_> = buckets.iter().map(|bucket| (bucket.le, bucket.count)).collect();
        assert_eq!(counts, [(1.0, 4.0), (2.0, 5.0), (f64::INFINITY, 7.0)]);
    }

    /// What a page costs is told, not bounded: `cargo test -p lathe-guest --release -- --nocapture a_page_costs`.
    #[test]
    fn a_page_costs_little_to_read() {
        const TIMES: u32 = 20;
        let clock = || {
            let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID);
            std::time::Duration::from(now.unwrap())
        };
        for (what, name) in [("all of the family", "http_seconds"), ("none of it", "other_seconds")] {
            let page = samples::large(100 * 1024, name);
            let begin = clock();
            for _ in 0..TIMES {
                let read = read(&page, &latency("http_seconds"));
                assert_eq!(read.is_ok_and(|reading| reading.buckets.len() == 12), name == "http_seconds");
            }
            println!(
                "{} KiB, {what}: {} µs of CPU",
                page.len() / 1024,
                ((clock() - begin) / TIMES).as_micros()
            );
        }
    }

    proptest! {
        #[test]
        fn no_page_is_too_strange(page in samples::strange()) {
            for latency in [true, false] {
                if let Ok(reading) = read(page.as_bytes(), &Wanted { metric: "a", permille: 950, latency }) {
                    prop_assert!(reading.buckets.len() <= MAX_BUCKETS + 1);
                }
            }
        }

        #[test]
        fn no_damage_to_a_page_is_too_strange(
            openmetrics in any::<bool>(),
            damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), any::<bool>()), 0..30),
        ) {
            let page = if openmetrics { samples::OPENMETRICS } else { samples::PROMETHEUS };
            let mut page = page.as_bytes().to_vec();
            for (at, byte, insert) in damage {
                let at = at.index(page.len());
                if insert { page.insert(at, byte) } else { page[at] = byte }
            }
            for metric in ["http_request_duration_seconds", "rpc_ms", "jobs_done", "queue_length"] {
                if let Ok(reading) = read(&page, &latency(metric)) {
                    prop_assert!(reading.buckets.is_sorted_by(|one, other| one.le < other.le));
                    prop_assert!(reading.count.is_none_or(is_count));
                }
            }
        }
    }
}
