//! Goals, pursued on models of applications.

use proptest::prelude::*;

use super::*;

const LIMIT_USEC: u64 = 20_000;

fn goal(goal: Goal, latency_usec: Option<u64>, rate_milli: Option<u64>) -> Pursued {
    let over_msec = if latency_usec.or(rate_milli).is_some() { 10_000 } else { 0 };
    Pursued { name: "web".into(), goal, over_msec, latency_usec, rate_milli, wrong: None }
}

fn latency(usec: impl Into<Option<u64>>) -> Pursued {
    goal(Goal::Latency { permille: 950, under_usec: LIMIT_USEC }, usec.into(), None)
}

fn cpu(granted: u64, demand: u64) -> Having {
    let memory = Holding { granted: 1 << 30, most: 2 << 30, demand: 1 << 28 };
    Having { holdings: [Holding { granted, most: 4000, demand }, memory], ..Having::default() }
}

/// A host that grants what is wanted within `GIVES_SEC`, and otherwise `least`.
struct Host {
    goals: Goals,
    second: u64,
    granted: u64,
    wanted: Vec<(u64, u64)>,
    raises: u32,
}

const GIVES_SEC: u64 = 4;

impl Host {
    fn new(granted: u64) -> Self {
        Self { goals: Goals::default(), second: 0, granted, wanted: Vec::new(), raises: 0 }
    }

    /// Lets `seconds` pass; `application` tells its figures and what it asks for with what it has.
    fn pass(&mut self, seconds: u64, least: u64, application: impl Fn(u64) -> (Pursued, Having)) {
        for _ in 0..seconds {
            self.second += 1;
            let (pursued, having) = application(self.granted);
            self.goals.take(self.second * SEC, vec![pursued], &having);
            let wanted = self.goals.wanted(Resource::Cpu, self.second * SEC).unwrap_or(0).max(least);
            self.raises += u32::from(self.wanted.last().is_some_and(|(_, before)| wanted > *before));
            self.wanted.push((self.second, wanted));
            let since = self.second.saturating_sub(GIVES_SEC);
            self.granted =
                self.wanted.iter().rev().find(|(at, _)| *at <= since).map_or(self.granted, |found| found.1);
        }
    }

    fn stands(&self) -> Stands {
        self.goals.iter().next().unwrap().stands
    }
}

/// Requests wait as in a queue: the nearer the load is to what there is, the longer.
fn queue(load: u64) -> impl Fn(u64) -> (Pursued, Having) {
    move |granted| {
        let usec = if granted > load { 5000 * granted / (granted - load) } else { 10_000_000 };
        (latency(usec), cpu(granted, load.min(granted)))
    }
}

#[test]
fn a_goal_that_is_missed_is_met_and_the_rest_is_given_back() {
    let mut host = Host::new(500);
    host.pass(120, 500, queue(600));
    // 5 ms · c / (c - 600) is 20 ms at 800.
    assert_eq!(host.stands(), Stands::Met);
    assert!((800..=1200).contains(&host.granted), "{}", host.granted);
    let raises = host.raises;
    host.pass(3600, 500, queue(600));
    assert_eq!(host.stands(), Stands::Met);
    assert!(host.raises <= raises + 1, "it goes up and down: {} raises", host.raises);
    host.pass(3600, 500, queue(50));
    assert_eq!((host.stands(), host.granted), (Stands::Met, 500), "the load has gone");
}

#[test]
fn what_does_not_help_is_taken_back() {
    let mut host = Host::new(500);
    // It waits for somebody else, and is busy meanwhile.
    let elsewhere = |granted| (latency(50_000), cpu(granted, granted));
    host.pass(60, 500, elsewhere);
    assert_eq!((host.stands(), host.granted), (Stands::Futile, 500));
    let raises = host.raises;
    host.pass(540, 500, elsewhere);
    assert_eq!(host.raises, raises, "it rests");
    host.pass(600, 500, elsewhere);
    assert!((raises + 1..=2 * raises).contains(&host.raises), "and is tried again: {}", host.raises);
}

#[test]
fn nothing_is_wanted_where_nothing_is_short() {
    let mut host = Host::new(500);
    host.pass(60, 500, |granted| (latency(50_000), cpu(granted, 100)));
    assert_eq!((host.stands(), host.granted), (Stands::Elsewhere, 500));
    // Its quota ends before its bursts do, though it asks for little in the mean.
    host.pass(60, 500, |granted| {
        let held = Having { held_permille: 200, ..cpu(granted, 100) };
        (latency(10_000_000 / granted), held)
    });
    assert_eq!(host.stands(), Stands::Met);
    assert!((501..=800).contains(&host.granted), "{}", host.granted);
}

#[test]
fn the_most_is_the_most_and_a_host_that_gives_nothing_is_waited_for() {
    let mut goals = Goals::default();
    for second in 1..60 {
        goals.take(second * SEC, vec![latency(90_000)], &cpu(500, 500));
    }
    let wanted = goals.wanted(Resource::Cpu, 60 * SEC);
    assert_eq!((goals.iter().next().unwrap().stands, wanted), (Stands::Wanting, Some(750)), "asked for once");
    for second in 60..70 {
        goals.take(second * SEC, vec![latency(19_000)], &cpu(500, 500));
    }
    assert_eq!(goals.iter().next().unwrap().stands, Stands::Met);
    let mut goals = Goals::default();
    for second in 1..60 {
        goals.take(second * SEC, vec![latency(90_000)], &cpu(4000, 4000));
    }
    assert_eq!(
        (goals.iter().next().unwrap().stands, goals.wanted(Resource::Cpu, 60 * SEC)),
        (Stands::Bounded, None)
    );
}

#[test]
fn throughput_grows_while_more_helps() {
    let mut host = Host::new(500);
    // It can make use of 1.6 CPUs.
    let application = |granted: u64| {
        let used = granted.min(1600);
        (goal(Goal::Throughput, None, Some(used * 100)), cpu(granted, used))
    };
    host.pass(600, 500, application);
    assert_eq!(host.stands(), Stands::Met);
    assert!((1600..=2600).contains(&host.granted), "{}", host.granted);
    host.pass(3600, 500, |granted| (goal(Goal::Throughput, None, Some(1)), cpu(granted, 10)));
    assert_eq!(host.granted, 500);
}

#[test]
fn who_waits_for_memory_gets_memory() {
    let mut goals = Goals::default();
    let having = Having { memory_waits_permille: 300, ..cpu(500, 500) };
    for second in 1..30 {
        goals.take(second * SEC, vec![latency(90_000)], &having);
    }
    assert_eq!(goals.wanted(Resource::Memory, 30 * SEC), Some((1 << 30) + (1 << 28)));
    assert_eq!(goals.wanted(Resource::Cpu, 30 * SEC), None);
    assert_eq!(goals.wanted(Resource::Net, 30 * SEC), None);
}

#[test]
fn what_was_found_outlives_silence_for_a_time_and_not_the_goal() {
    let mut goals = Goals::default();
    let at = |second| second * SEC;
    for second in 1..10 {
        goals.take(at(second), vec![latency(90_000)], &cpu(500, 500));
    }
    assert_eq!(goals.wanted(Resource::Cpu, at(10)), Some(750));
    goals.take(at(10), vec![latency(None)], &cpu(750, 500));
    assert_eq!(
        (goals.iter().next().unwrap().stands, goals.wanted(Resource::Cpu, at(300))),
        (Stands::Unknown, Some(750))
    );
    assert_eq!(goals.wanted(Resource::Cpu, at(310)), None, "also without a word from its agent");
    goals.take(at(400), vec![latency(None)], &cpu(750, 500));
    assert_eq!(goals.iter().next().unwrap().wants, [None; 2]);
    for second in 401..410 {
        goals.take(at(second), vec![latency(90_000)], &cpu(500, 500));
    }
    let other = Goal::Latency { permille: 950, under_usec: 1_000_000 };
    goals.take(at(410), vec![goal(other, Some(90_000), None)], &cpu(500, 500));
    assert_eq!(goals.wanted(Resource::Cpu, at(410)), None, "it is another goal by now");
    goals.take(at(411), Vec::new(), &cpu(500, 500));
    assert_eq!(goals.iter().count(), 0);
}

proptest! {
    /// Whatever is told: nothing overflows, nothing beyond the most is wanted.
    #[test]
    fn no_word_wants_too_much(
        told in prop::collection::vec((any::<u64>(), any::<u64>(), any::<u32>(), 0_u8..4), 1..60),
        amounts in prop::collection::vec(any::<u64>(), 8),
        limit in 1..u64::MAX,
    ) {
        let mut goals = Goals::default();
        let mut at = 0_u64;
        for (figure, step, over, kind) in told {
            at = at.saturating_add(step % (1 << 40));
            let which = if kind & 1 == 0 { Goal::Throughput } else { Goal::Latency { permille: 1, under_usec: limit } };
            let pursued = Pursued { over_msec: over, ..goal(which, Some(figure), Some(figure)) };
            let holding = |place: usize| Holding { granted: amounts[place], most: amounts[place].max(amounts[place + 1]), demand: amounts[place + 2] };
            let having = Having {
                holdings: [holding(0), holding(3)],
                cpu_waits_permille: amounts[6],
                held_permille: amounts[7],
                memory_waits_permille: figure,
            };
            goals.take(at, vec![pursued], &having);
            for (which, resource) in SERVED.into_iter().enumerate() {
                prop_assert!(goals.wanted(resource, at) <= Some(having.holdings[which].most));
            }
        }
    }
}
