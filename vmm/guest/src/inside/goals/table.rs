//! Which goal's metrics are read next, and what they said; decides alone, and reads nothing.
//!
//! ```text
//!         no goal, or the host has not looked for 5 s
//! Sleep ◄──────────────────────────────────────────── due ──► Read ──► done: figures, or what is wrong
//!   └── the host looks, a goal comes ───────────────────▲ └──► Until the next is due
//! ```
//! What reading costs sets the pace: over a round of all goals at most one part in 300 of a CPU.

use std::time::{Duration, Instant};

use lathe_guest::protocol::inside::{Goal, MAX_GOALS, MAX_WORDS_BYTES, Pursued};

use super::super::choice::cut;
use super::Wrong;
use super::family::Reading;
use super::place::{Place, Version};
use super::terms::{Terms, permille};
use super::window::{Figures, WINDOW, Window};

/// The host asks once a second; when it has not for so long, nobody wants to know.
const LOOKED: Duration = Duration::from_secs(5);
/// Between two readings of a file.
const FILE_PACE: Duration = Duration::from_secs(1);
/// Between two questions to an application.
const HTTP_PACE: Duration = Duration::from_secs(2);
/// Rest after a reading, as many times the CPU time that it took.
const REST: u32 = 300;
/// Longest rest; also the longest time between two writings of a file after which it is still alive.
const MAX_PACE: Duration = Duration::from_secs(60);

/// What comes next.
#[derive(Debug, PartialEq)]
pub enum Due {
    /// Nothing until something changes.
    Sleep,
    /// Nothing until then.
    Until(Instant),
    /// These are read.
    Read(Job),
}

/// What is read.
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    /// Which goal; never used again.
    pub id: u64,
    /// What it says.
    pub terms: Terms,
    /// The file that is known already.
    pub known: Option<Version>,
}

/// What was read.
#[derive(Clone, Debug, PartialEq)]
pub struct Read {
    /// When it was written.
    pub at: Instant,
    /// What it said.
    pub reading: Reading,
    /// Of a file.
    pub version: Option<Version>,
}

#[derive(Debug)]
struct Watch {
    id: u64,
    terms: Terms,
    window: Window,
    version: Option<Version>,
    next: Instant,
    rest: Duration,
    wrong: Option<String>,
}

/// All goals.
#[derive(Debug)]
pub struct Table {
    ids: u64,
    watches: Vec<Watch>,
    looked: Option<Instant>,
}

impl Table {
    /// Without goals.
    pub const fn new() -> Self {
        Self { ids: 0, watches: Vec::new(), looked: None }
    }

    /// What is expected.
    pub fn terms(&self) -> Vec<Terms> {
        self.watches.iter().map(|watch| watch.terms.clone()).collect()
    }

    /// Names of all goals.
    pub fn names(&self) -> String {
        self.watches.iter().map(|watch| watch.terms.name.as_str()).collect::<Vec<_>>().join(", ")
    }

    /// Whether one of this name can be taken.
    ///
    /// # Errors
    /// When there are too many, in words.
    pub fn room(&self, name: &str) -> Result<(), Wrong> {
        if self.watches.len() < MAX_GOALS || self.watches.iter().any(|watch| watch.terms.name == name) {
            return Ok(());
        }
        let wrong = Wrong::of(format!(
            "there are {MAX_GOALS} goals already, the most there may be: {}",
            self.names()
        ));
        Err(wrong.mend("take one back: lathe-guest goal NAME --none"))
    }

    /// Takes a goal in, with what was read of it; it takes the place of the one of its name.
    ///
    /// # Errors
    /// As [`room`](Self::room).
    pub fn put(&mut self, terms: Terms, read: Option<Read>, now: Instant) -> Result<(), Wrong> {
        self.room(&terms.name)?;
        self.ids += 1;
        let (version, mut window) = (read.as_ref().and_then(|read| read.version), Window::default());
        let next = if read.is_some() { now + pace(&terms.place) } else { now };
        if let Some(read) = read {
            window.push(read.at, read.reading);
        }
        let watch = Watch { id: self.ids, terms, window, version, next, rest: Duration::ZERO, wrong: None };
        match self.watches.iter_mut().find(|held| held.terms.name == watch.terms.name) {
            Some(held) => *held = watch,
            None => self.watches.push(watch),
        }
        Ok(())
    }

    /// Takes a goal back.
    ///
    /// # Errors
    /// When there is none of this name, in words.
    pub fn remove(&mut self, name: &str) -> Result<(), Wrong> {
        let before = self.watches.len();
        self.watches.retain(|watch| watch.terms.name != name);
        if self.watches.len() < before {
            return Ok(());
        }
        let wrong = Wrong::of(format!("there is no goal {name}"));
        Err(if before == 0 { wrong } else { wrong.mend(format!("there are: {}", self.names())) })
    }

    /// What is to be read next.
    pub fn due(&self, now: Instant) -> Due {
        let Some(watch) =
            self.watches.iter().min_by_key(|watch| watch.next).filter(|_| self.is_looked_at(now))
        else {
            return Due::Sleep;
        };
        if watch.next > now {
            return Due::Until(watch.next);
        }
        Due::Read(Job { id: watch.id, terms: watch.terms.clone(), known: watch.version })
    }

    /// Takes in what reading brought, which is over `now`, and the CPU time that it took; `None` was read of a file that is as it was.
    pub fn done(&mut self, id: u64, read: Result<Option<Read>, Wrong>, cost: Duration, now: Instant) {
        let Some(watch) = self.watches.iter_mut().find(|watch| watch.id == id) else { return };
        watch.rest = cost.saturating_mul(REST).min(MAX_PACE);
        watch.wrong = None;
        match read {
            Ok(Some(read)) => {
                watch.version = read.version;
                watch.window.push(read.at, read.reading);
            }
            Ok(None) => {}
            Err(wrong) => {
                watch.version = None;
                watch.wrong = Some(wrong.what);
            }
        }
        let rests = self.rests();
        if let Some(watch) = self.watches.iter_mut().find(|watch| watch.id == id) {
            watch.next = now + pace(&watch.terms.place).max(rests);
        }
    }

    /// The host looks; gives whether it had not for long, and what it is told.
    pub fn look(&mut self, now: Instant) -> (bool, Vec<Pursued>) {
        let wakes = !self.is_looked_at(now);
        self.looked = Some(now);
        if wakes {
            for watch in &mut self.watches {
                // What was then says nothing of now.
                watch.window.clear();
                (watch.version, watch.wrong, watch.next) = (None, None, now);
            }
        }
        (wakes, self.pursued(now))
    }

    /// Whether the host wants to know.
    pub fn is_looked_at(&self, now: Instant) -> bool {
        self.looked.is_some_and(|looked| now.saturating_duration_since(looked) <= LOOKED)
    }

    /// How all goals stand.
    pub fn pursued(&self, now: Instant) -> Vec<Pursued> {
        let rests = self.rests();
        self.watches.iter().map(|watch| watch.pursued(rests, now)).collect()
    }

    fn rests(&self) -> Duration {
        self.watches.iter().map(|watch| watch.rest).sum::<Duration>().min(MAX_PACE)
    }
}

impl Watch {
    fn pursued(&self, rests: Duration, now: Instant) -> Pursued {
        let age = self.window.newest().map(|newest| now.saturating_duration_since(newest));
        let written = self.window.interval().map_or(Duration::ZERO, |interval| interval.min(MAX_PACE));
        let interval = pace(&self.terms.place).max(rests).max(written);
        let old = age.filter(|age| *age > WINDOW + interval);
        let figures = match old {
            None => self.window.figures(permille(self.terms.goal)),
            Some(_) => Figures::default(),
        };
        let mut wrong = match (&self.wrong, old, &self.terms.place) {
            (Some(wrong), ..) => Some(wrong.clone()),
            (None, Some(age), Place::File(path)) => {
                Some(format!("not written for {} s: {path}", age.as_secs()))
            }
            _ => None,
        };
        if let Some(wrong) = &mut wrong {
            cut(wrong, MAX_WORDS_BYTES);
        }
        Pursued {
            name: self.terms.name.clone(),
            goal: self.terms.goal,
            over_msec: u32::try_from(figures.over.as_millis()).unwrap_or(u32::MAX),
            latency_usec: figures.latency_usec,
            rate_milli: figures.rate_milli,
            wrong,
        }
    }
}

fn pace(place: &Place) -> Duration {
    match place {
        Place::Http { .. } => HTTP_PACE,
        Place::File(_) => FILE_PACE,
    }
}

/// Whether figures meet what is expected; `None` when they do not tell, or it cannot be said at all.
pub fn is_met(pursued: &Pursued) -> Option<bool> {
    match (pursued.goal, pursued.latency_usec) {
        (Goal::Latency { under_usec, .. }, Some(usec)) => Some(usec < under_usec),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LATENCY: Goal = Goal::Latency { permille: 950, under_usec: 20_000 };

    fn terms(name: &str, place: &str) -> Terms {
        Terms { name: name.into(), goal: LATENCY, place: place.parse().unwrap(), metric: "a".into() }
    }

    fn read(at: Instant, count: f64) -> Read {
        let reading =
            Reading { direct: Some(0.018), unit_usec: 1e6, count: Some(count), ..Reading::default() };
        Read { at, reading, version: None }
    }

    fn job(due: Due) -> Job {
        match due {
            Due::Read(job) => job,
            other => panic!("nothing to read: {other:?}"),
        }
    }

    #[test]
    fn nothing_is_read_unless_there_is_a_goal_and_the_host_looks() {
        let (mut table, begin) = (Table::new(), Instant::now());
        let second = |at| begin + Duration::from_secs(at);
        assert_eq!(table.look(begin), (true, vec![]));
        assert_eq!(table.due(begin), Due::Sleep, "no goal");
        table.put(terms("web", "/run/web.prom"), None, begin).unwrap();
        let first = job(table.due(begin));
        table.done(first.id, Ok(Some(read(begin, 0.0))), Duration::ZERO, begin);
        assert_eq!(table.due(begin), Due::Until(second(1)));
        table.done(first.id, Ok(Some(read(second(5), 50.0))), Duration::ZERO, second(5));
        assert!(matches!(table.due(second(5)), Due::Until(_)));
        let told = table.pursued(second(5));
        assert_eq!(
            (told[0].over_msec, told[0].latency_usec, told[0].rate_milli),
            (5000, Some(18_000), Some(10_000))
        );
        assert_eq!(is_met(&told[0]), Some(true));
        assert_eq!(table.due(second(6)), Due::Sleep, "the host looks no more");
        let (wakes, told) = table.look(second(60));
        assert!(wakes && told[0].over_msec == 0, "what was a minute ago is over: {told:?}");
        assert_eq!(job(table.due(second(60))).terms.name, "web");
        assert!(!table.look(second(65)).0);
    }

    #[test]
    fn what_costs_much_is_read_seldom() {
        let (mut table, now) = (Table::new(), Instant::now());
        table.look(now);
        table.put(terms("web", "http://127.0.0.1:1/"), None, now).unwrap();
        table.put(terms("file", "/run/web.prom"), None, now).unwrap();
        let msec = Duration::from_millis;
        let (web, file) = (1, 2);
        for (id, cost, pause) in [
            (web, msec(0), msec(2000)),
            (file, msec(0), msec(1000)),
            (web, msec(5), msec(2000)),
            (file, msec(5), msec(3000)),
            (web, msec(10), msec(4500)),
            (web, msec(1000), msec(60_000)),
            (file, Duration::MAX, msec(60_000)),
        ] {
            table.done(id, Ok(None), cost, now);
            let next = table.watches.iter().find(|watch| watch.id == id).unwrap().next;
            assert_eq!(next - now, pause, "{id} {cost:?}");
        }
        table.done(9, Ok(None), Duration::ZERO, now);
    }

    #[test]
    fn old_figures_are_told_no_more() {
        let (mut table, begin) = (Table::new(), Instant::now());
        let second = |at| begin + Duration::from_secs(at);
        table.look(begin);
        table.put(terms("web", "http://127.0.0.1:1/"), Some(read(begin, 0.0)), begin).unwrap();
        table.put(terms("file", "/run/web.prom"), Some(read(begin, 0.0)), begin).unwrap();
        for id in [1, 2] {
            table.done(id, Ok(Some(read(second(2), 10.0))), Duration::ZERO, second(2));
        }
        table.done(1, Err(Wrong::of("ä".repeat(300))), Duration::ZERO, second(4));
        let told = table.pursued(second(14));
        assert_eq!(told[0].over_msec, 2000, "one reading that fails takes nothing away");
        let words = told[0].wrong.as_ref().unwrap();
        assert!(words.len() <= MAX_WORDS_BYTES && words.starts_with('ä'), "{words}");
        assert_eq!((told[1].over_msec, told[1].wrong.as_deref()), (2000, None));
        let told = table.pursued(second(15));
        assert_eq!((told[0].over_msec, told[0].rate_milli, told[0].latency_usec), (0, None, None));
        assert_eq!(
            (told[1].over_msec, told[1].wrong.as_deref()),
            (0, Some("not written for 13 s: /run/web.prom"))
        );
        table.done(1, Ok(Some(read(second(15), 20.0))), Duration::ZERO, second(15));
        assert_eq!(table.pursued(second(15))[0].wrong, None);
    }

    #[test]
    fn a_file_that_is_written_every_quarter_of_a_minute_is_followed() {
        let (mut table, begin) = (Table::new(), Instant::now());
        let second = |at| begin + Duration::from_secs(at);
        table.put(terms("file", "/run/web.prom"), Some(read(begin, 0.0)), begin).unwrap();
        table.done(1, Ok(Some(read(second(15), 150.0))), Duration::ZERO, second(16));
        for at in 17..=40 {
            table.done(1, Ok(None), Duration::ZERO, second(at));
            let told = &table.pursued(second(at))[0];
            assert_eq!((told.over_msec, told.rate_milli), (15_000, Some(10_000)), "{at}");
        }
        assert_eq!(table.pursued(second(41))[0].over_msec, 0);
    }

    #[test]
    fn there_are_so_many_goals_at_most() {
        let (mut table, now) = (Table::new(), Instant::now());
        assert_eq!(table.remove("web").unwrap_err().to_string(), "there is no goal web");
        for name in ["a", "b", "c", "d"] {
            table.put(terms(name, "/x"), None, now).unwrap();
        }
        let words = table.put(terms("e", "/x"), None, now).unwrap_err().to_string();
        assert_eq!(
            words,
            "there are 4 goals already, the most there may be: a, b, c, d; take one back: lathe-guest goal NAME --none"
        );
        table.put(terms("b", "/y"), None, now).unwrap();
        assert_eq!(table.terms()[1].place.to_string(), "/y", "one of a name");
        assert_eq!(table.remove("e").unwrap_err().to_string(), "there is no goal e; there are: a, b, c, d");
        table.remove("a").unwrap();
        table.put(terms("e", "/x"), None, now).unwrap();
        assert_eq!(table.names(), "b, c, d, e");
    }
}
