//! What is wanted of the host from inside: kept until its time is over, told at each look, settled by the host's answer.
//!
//! One wish of each resource; a newer one takes its place. Whoever asks is kept waiting until the host has said what it makes of it, one
//! after the other, so that the host hears no more than it asks for. All of it ends with the guest agent: a wish is no promise.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use lathe_guest::protocol::inside::{Amount, MAX_WANT_SEC, MAX_WANTS, Settled, Want, Wished};
use serde::{Deserialize, Serialize};

use super::goals;

/// How long the host may take; it asks once a second, and may be busy.
const HOST_TIMEOUT: Duration = Duration::from_secs(8);
/// Longest words of the host that are passed on, bytes.
const MAX_WORDS_BYTES: usize = 512;

static TABLE: Mutex<Table> = Mutex::new(Table::new());
static SETTLED: Condvar = Condvar::new();

/// What is asked on the [socket](super::socket).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ask {
    /// milliCPU.
    #[serde(default)]
    pub cpu: Option<Amount>,
    /// Bytes.
    #[serde(default)]
    pub memory: Option<Amount>,
    /// How long.
    #[serde(default)]
    pub for_sec: u32,
    /// Nothing is wanted any more.
    #[serde(default)]
    pub none: bool,
    /// About goals instead; whatever else is asked is not looked at then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub goal: Option<goals::Question>,
}

/// How it stands.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Standing {
    /// What is wrong with the question.
    pub wrong: Option<String>,
    /// The host has not said anything yet.
    pub unheard: bool,
    /// What is wanted.
    pub wants: Vec<Line>,
}

/// One thing that is wanted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    /// Of which resource.
    pub resource: Wished,
    /// What the host makes of it, in the resource's unit.
    pub amount: Option<u64>,
    /// The host refused it.
    pub refused: bool,
    /// Until it is over.
    pub left_sec: u32,
    /// What the host says about it.
    pub words: String,
}

#[derive(Clone, Debug)]
struct Held {
    id: u64,
    resource: Wished,
    amount: Amount,
    settled: Option<u64>,
    refused: bool,
    words: String,
    until: Instant,
}

struct Table {
    ids: u64,
    held: Vec<Held>,
}

impl Table {
    const fn new() -> Self {
        Self { ids: 0, held: Vec::new() }
    }

    fn tidy(&mut self, now: Instant) {
        self.held.retain(|held| held.until > now);
    }

    /// Takes a question in; gives the numbers of what the host has yet to settle.
    fn take(&mut self, ask: &Ask, now: Instant) -> Result<Vec<u64>, String> {
        self.tidy(now);
        if ask.none {
            self.held.clear();
            return Ok(Vec::new());
        }
        let changes = [(Wished::Cpu, ask.cpu), (Wished::Memory, ask.memory)];
        let changes: Vec<_> =
            changes.into_iter().filter_map(|(resource, amount)| Some((resource, amount?))).collect();
        if !changes.is_empty() && !(1..=MAX_WANT_SEC).contains(&ask.for_sec) {
            return Err(format!("{} s is no time to want something for: 1 s to 24 h", ask.for_sec));
        }
        let mut fresh = Vec::new();
        for (resource, amount) in changes {
            self.ids += 1;
            self.held.retain(|held| held.resource != resource);
            let until = now + Duration::from_secs(ask.for_sec.into());
            let (id, words) = (self.ids, String::new());
            self.held.push(Held { id, resource, amount, settled: None, refused: false, words, until });
            fresh.push(id);
        }
        self.held.sort_by_key(|held| held.resource);
        Ok(fresh)
    }

    fn settle(&mut self, settled: &[Settled]) {
        for answer in settled {
            let Some(held) = self.held.iter_mut().find(|held| held.id == answer.id) else { continue };
            held.settled = answer.amount;
            held.refused = answer.amount.is_none();
            held.words = answer.words.chars().take(MAX_WORDS_BYTES / 4).collect();
        }
    }

    fn told(&mut self, now: Instant) -> Vec<Want> {
        self.tidy(now);
        let want = |held: &Held| Want {
            id: held.id,
            resource: held.resource,
            amount: held.amount,
            settled: held.settled,
            left_sec: left_sec(held, now),
        };
        self.held.iter().filter(|held| !held.refused).map(want).take(MAX_WANTS).collect()
    }

    fn is_settled(&self, ids: &[u64]) -> bool {
        let open = |held: &Held| ids.contains(&held.id) && held.settled.is_none() && !held.refused;
        !self.held.iter().any(open)
    }

    /// How it stands; what was refused is forgotten with it.
    fn standing(&mut self, unheard: bool, now: Instant) -> Standing {
        self.tidy(now);
        let line = |held: &Held| Line {
            resource: held.resource,
            amount: held.settled,
            refused: held.refused,
            left_sec: left_sec(held, now),
            words: held.words.clone(),
        };
        let wants = self.held.iter().map(line).collect();
        self.held.retain(|held| !held.refused);
        Standing { wrong: None, unheard, wants }
    }
}

fn left_sec(held: &Held, now: Instant) -> u32 {
    // Rounded up: a wish that is there is wanted for a second at least.
    let left = held.until.saturating_duration_since(now).as_millis().div_ceil(1000);
    u32::try_from(left).unwrap_or(MAX_WANT_SEC)
}

fn table() -> MutexGuard<'static, Table> {
    TABLE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What is wanted now.
pub fn told(now: Instant) -> Vec<Want> {
    table().told(now)
}

/// Takes in what the host made of what was wanted.
pub fn settle(settled: &[Settled]) {
    if !settled.is_empty() {
        table().settle(settled);
        SETTLED.notify_all();
    }
}

/// Takes a question in and waits until the host has settled it, or has had its time.
pub fn stand(ask: &Ask) -> Standing {
    let mut held = table();
    let fresh = match held.take(ask, Instant::now()) {
        Ok(fresh) => fresh,
        Err(wrong) => return Standing { wrong: Some(wrong), ..Standing::default() },
    };
    let waited = SETTLED.wait_timeout_while(held, HOST_TIMEOUT, |table| !table.is_settled(&fresh));
    let (mut held, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
    held.standing(timeout.timed_out(), Instant::now())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(cpu: Option<Amount>, for_sec: u32) -> Ask {
        Ask { cpu, for_sec, ..Ask::default() }
    }

    #[test]
    fn a_wish_is_told_until_its_time_is_over() {
        let (mut table, now) = (Table::new(), Instant::now());
        let second = |at| now + Duration::from_secs(at);
        let fresh = table.take(&ask(Some(Amount::Up(1000)), 60), now).unwrap();
        assert!(!table.is_settled(&fresh));
        let want = table.told(second(10))[0];
        assert_eq!((want.amount, want.settled, want.left_sec), (Amount::Up(1000), None, 50));
        table.settle(&[Settled { id: want.id, amount: Some(1500), words: "fine".into() }]);
        assert!(table.is_settled(&fresh));
        assert_eq!(table.told(second(59))[0].settled, Some(1500));
        assert_eq!(table.standing(false, second(59)).wants[0].words, "fine");
        assert_eq!(table.told(second(60)), []);
    }

    #[test]
    fn the_newest_of_a_resource_counts_and_what_was_refused_is_forgotten() {
        let (mut table, now) = (Table::new(), Instant::now());
        table.take(&ask(Some(Amount::To(1)), 60), now).unwrap();
        let first = table.told(now)[0].id;
        let both = Ask { memory: Some(Amount::To(5)), ..ask(Some(Amount::To(2)), 60) };
        table.take(&both, now).unwrap();
        let told = table.told(now);
        assert_eq!(told.len(), MAX_WANTS);
        assert!(told.iter().all(|want| want.id != first), "numbers are used once");
        // What came too late for the one before says nothing of this one.
        table.settle(&[Settled { id: first, amount: None, words: String::new() }]);
        assert_eq!(table.told(now).len(), 2);
        table.settle(&[Settled { id: told[0].id, amount: None, words: "no".repeat(1000) }]);
        assert_eq!(table.told(now).len(), 1);
        let standing = table.standing(false, now);
        assert!(standing.wants[0].refused && standing.wants[0].words.len() <= MAX_WORDS_BYTES);
        assert_eq!(table.standing(false, now).wants.len(), 1);
        table.take(&Ask { none: true, ..ask(None, 0) }, now).unwrap();
        assert_eq!(table.told(now), []);
        assert!(table.take(&ask(Some(Amount::To(1)), 0), now).is_err());
        assert!(table.take(&ask(Some(Amount::To(1)), MAX_WANT_SEC + 1), now).is_err());
    }
}
