//! Goals of applications, and what their own metrics say: told to the host at each look, so that it knows whether more would help.
//!
//! ```text
//! lathe-guest goal ─► socket ─► answer ─► metrics read once ─► table ─► store: goals.json, for the next start
//!                                                               │ ▲
//!                                   the host looks ◄─ figures ──┘ └── thread: place ─► page ─► family ─► window
//! ```
//! | file | what |
//! |---|---|
//! | [`ask`] | the command |
//! | [`terms`], [`store`] | what a goal says, and the file that keeps it |
//! | [`table`] | which goal is read next, and what is told; pure |
//! | [`place`], [`http`] | a page from a file, or over HTTP |
//! | [`page`], [`family`], [`choice`] | lines of a page, one family of it, and which one is meant; pure |
//! | [`window`] | what the family has done over ten seconds: quantile and rate; pure |
//!
//! The thread sleeps while there is no goal or the host has not looked for five seconds, and takes at most one part in 300 of a CPU. A look
//! never waits for it. What a page says is an application's word: it is bounded everywhere, and nothing but goals comes of it.

pub mod ask;
mod choice;
mod family;
mod http;
mod page;
mod place;
#[cfg(test)]
mod samples;
mod store;
mod table;
mod terms;
#[cfg(test)]
mod tests;
mod window;

use std::fmt;
use std::io;
use std::path::Path;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use lathe_guest::protocol::inside::{Goal, Pursued};
use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use self::place::{Fetched, Place};
use self::store::Store;
use self::table::{Due, Job, Read, Table};
use self::terms::{Terms, check_goal, check_metric, check_name, wanted};

/// Stack of the thread that reads, bytes; only touched pages cost memory.
const STACK_BYTES: usize = 128 * 1024;
/// Memory for a page that is kept between two readings, bytes.
const KEPT_PAGE_BYTES: usize = 64 * 1024;

static GOALS: Goals = Goals::new();

/// What is asked about goals.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Question {
    /// How all stand.
    Show {},
    /// One is set, in the place of the one of its name.
    Set {
        /// Of which application.
        name: String,
        /// What is expected.
        goal: Goal,
        /// Where its metrics are: a URL of this machine, or the absolute path of a file.
        metrics: String,
        /// Which family of metrics; the only one that fits, when it is not said.
        #[serde(default)]
        metric: Option<String>,
    },
    /// One is taken back.
    None {
        /// Of which application.
        name: String,
    },
}

/// What is answered.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Answer {
    /// Why nothing is changed.
    pub wrong: Option<String>,
    /// What is changed.
    pub changed: Option<String>,
    /// Why it does not hold for ever.
    pub unkept: Option<String>,
    /// The host has not looked of late, and nothing is read.
    pub unheard: bool,
    /// How all stand.
    pub goals: Vec<Pursued>,
}

/// What is wrong with metrics, or with a question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wrong {
    /// What, and where.
    pub what: String,
    /// How to mend it; may be empty.
    pub mend: String,
}

impl Wrong {
    /// Without a way to mend it.
    pub fn of(what: String) -> Self {
        Self { what, mend: String::new() }
    }

    /// With one.
    pub fn mend(self, mend: impl Into<String>) -> Self {
        Self { mend: mend.into(), ..self }
    }
}

impl From<String> for Wrong {
    fn from(what: String) -> Self {
        Self::of(what)
    }
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)?;
        if self.mend.is_empty() { Ok(()) } else { write!(f, "; {}", self.mend) }
    }
}

/// Takes up the goals that were kept, and starts the thread that reads metrics.
///
/// # Errors
/// When the thread cannot be started.
pub fn start() -> io::Result<()> {
    GOALS.load(Store::new(Path::new(store::FOLDER)), Instant::now());
    std::thread::Builder::new()
        .name("goals".into())
        .stack_size(STACK_BYTES)
        .spawn(|| GOALS.read_for_ever())?;
    Ok(())
}

/// What the host is told of goals.
pub fn told(now: Instant) -> Vec<Pursued> {
    GOALS.look(now)
}

/// Answers a question about goals; waits for the metrics of a goal that is set.
pub fn answer(question: Question) -> Answer {
    GOALS.answer(question)
}

/// Goals with what they need.
struct Goals {
    table: Mutex<Table>,
    /// A goal has come, or the host looks again.
    changed: Condvar,
    /// Held by whoever changes goals, so that they do it one after the other and no look waits for a disk.
    store: Mutex<Option<Store>>,
}

impl Goals {
    const fn new() -> Self {
        Self { table: Mutex::new(Table::new()), changed: Condvar::new(), store: Mutex::new(None) }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn load(&self, store: Store, now: Instant) {
        let mut held = self.store.lock().unwrap_or_else(PoisonError::into_inner);
        match store.load() {
            Ok(goals) => {
                let mut table = self.table();
                for terms in goals {
                    if let Err(wrong) = table.put(terms, None, now) {
                        eprintln!("lathe-guest: a goal is not taken up: {wrong}");
                    }
                }
            }
            Err(wrong) => eprintln!("lathe-guest: goals are not taken up: {wrong}"),
        }
        *held = Some(store);
        self.changed.notify_all();
    }

    fn look(&self, now: Instant) -> Vec<Pursued> {
        let (wakes, told) = self.table().look(now);
        if wakes {
            self.changed.notify_all();
        }
        told
    }

    fn answer(&self, question: Question) -> Answer {
        let done = match question {
            Question::Show {} => Ok(Answer::default()),
            Question::Set { name, goal, metrics, metric } => {
                self.set(name, goal, &metrics, metric.as_deref())
            }
            Question::None { name } => self.remove(&name),
        };
        let answer =
            done.unwrap_or_else(|wrong| Answer { wrong: Some(wrong.to_string()), ..Answer::default() });
        let (table, now) = (self.table(), Instant::now());
        Answer { unheard: !table.is_looked_at(now), goals: table.pursued(now), ..answer }
    }

    fn set(&self, name: String, goal: Goal, metrics: &str, metric: Option<&str>) -> Result<Answer, Wrong> {
        check_name(&name)?;
        check_goal(goal)?;
        metric.map_or(Ok(()), check_metric)?;
        let place: Place = metrics.parse()?;
        let store = self.store.lock().unwrap_or_else(PoisonError::into_inner);
        self.table().room(&name)?;
        let mut page = Vec::new();
        let fetched = place.fetch(None, &mut page)?;
        let (metric, reading) = choice::choose(&page, goal, metric).map_err(|wrong| place.at(wrong))?;
        let changed = format!("{name:<8}goal taken: {}, by {metric} at {place}", terms::goal(goal));
        let read = match fetched {
            Fetched::Page { at, version } => Some(Read { at, reading, version }),
            Fetched::Same => None,
        };
        self.table().put(Terms { name, goal, place, metric }, read, Instant::now())?;
        self.changed.notify_all();
        Ok(self.keep(store.as_ref(), changed))
    }

    fn remove(&self, name: &str) -> Result<Answer, Wrong> {
        let store = self.store.lock().unwrap_or_else(PoisonError::into_inner);
        self.table().remove(name)?;
        Ok(self.keep(store.as_ref(), format!("{name:<8}goal taken back")))
    }

    fn keep(&self, store: Option<&Store>, changed: String) -> Answer {
        let goals = self.table().terms();
        let unkept = match store {
            None => Some("the agent's end: it keeps nothing yet".to_owned()),
            Some(store) => match store.save(&goals) {
                Ok(()) if store.is_in_memory() => {
                    Some(format!("the machine's next start: {} is in memory", store.path().display()))
                }
                Ok(()) => None,
                Err(error) => Some(format!("the agent's end: {}: {error}", store.path().display())),
            },
        };
        Answer { changed: Some(changed), unkept, ..Answer::default() }
    }

    fn read_for_ever(&self) {
        let mut page = Vec::new();
        loop {
            let job = self.wait_for_job();
            let begin = cpu_time();
            let read = read(&job, &mut page);
            let cost = cpu_time().saturating_sub(begin);
            page.clear();
            page.shrink_to(KEPT_PAGE_BYTES);
            self.table().done(job.id, read, cost, Instant::now());
        }
    }

    fn wait_for_job(&self) -> Job {
        let mut table = self.table();
        loop {
            let now = Instant::now();
            table = match table.due(now) {
                Due::Read(job) => return job,
                Due::Sleep => self.changed.wait(table).unwrap_or_else(PoisonError::into_inner),
                Due::Until(at) => {
                    let waited = self.changed.wait_timeout(table, at.saturating_duration_since(now));
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }
}

fn read(job: &Job, page: &mut Vec<u8>) -> Result<Option<Read>, Wrong> {
    let (terms, place) = (&job.terms, &job.terms.place);
    match place.fetch(job.known, page)? {
        Fetched::Same => Ok(None),
        Fetched::Page { at, version } => {
            let reading = family::read(page, &wanted(terms.goal, &terms.metric));
            reading.map(|reading| Some(Read { at, reading, version })).map_err(|wrong| place.at(wrong))
        }
    }
}

/// What this thread has used.
fn cpu_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}
