//! What a guest says of itself, made fit to be used: cut to bounds, names cleaned, wishes settled.
//!
//! All of it is a guest's word. It is shown as such, and where it counts, the machine's own bounds hold: a guest that lies gets no more than
//! one that really works as hard.

use lathe_guest::protocol::inside::{
    Amount, Application, ApplicationKind, Goal, Inside, MAX_APPLICATIONS, MAX_GOALS, MAX_NAME_BYTES,
    MAX_WANT_SEC, MAX_WANTS, MAX_WORDS_BYTES, Pursued, Settled, Want, Whole, Wished,
};

use super::Resource;

/// How long a guest's word counts, microseconds: it is asked each second.
pub const FRESH_USEC: u64 = 5 * SEC;
/// More CPU no guest has, milliCPU.
const MOST_MILLI: u64 = 8192 * 1000;
/// More of anything else no guest has: bytes, bytes or bits a second, operations a second.
const MOST: u64 = 1 << 50;
/// Nothing takes longer, microseconds.
const LONGEST_USEC: u64 = 3600 * SEC;
const SEC: u64 = 1_000_000;

/// What a machine may have of a resource that can be wanted, in its unit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bound {
    /// What it is granted.
    pub granted: u64,
    /// The most that it may ever have.
    pub most: u64,
}

/// Bounds of all resources that can be wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bounds {
    /// milliCPU.
    pub cpu: Bound,
    /// Bytes.
    pub memory: Bound,
}

/// What a guest lacks by its own account, beside what it uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pressed {
    /// Share of time in which some task waited for a CPU, parts per thousand.
    pub cpu_some_permille: u64,
    /// The same for memory.
    pub memory_some_permille: u64,
    /// What it has swapped out, bytes.
    pub swapped_bytes: u64,
}

/// Something that is wanted from inside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Its guest's number of it.
    id: u64,
    /// Of which resource.
    pub resource: Resource,
    /// In its unit, within the machine's bounds.
    pub amount: u64,
    /// When it is over, on the clock of readings.
    pub until_usec: u64,
}

/// What a guest has said last.
#[derive(Clone, Debug, Default)]
pub struct Word {
    told: Option<(u64, Box<Inside>)>,
    wanted: Vec<Wanted>,
}

impl Word {
    /// Takes in what it says at `at_usec`; gives what it is to hear about what it wants, `note` being added to it.
    pub fn take(&mut self, at_usec: u64, inside: Inside, bounds: &Bounds, note: &str) -> Vec<Settled> {
        let mut settled = Vec::new();
        let mut wanted: Vec<Wanted> = Vec::new();
        for want in inside.wants.iter().take(MAX_WANTS) {
            let (resource, bound) = match want.resource {
                Wished::Cpu => (Resource::Cpu, bounds.cpu),
                Wished::Memory => (Resource::Memory, bounds.memory),
            };
            if wanted.iter().any(|other| other.resource == resource) {
                continue;
            }
            // What was made of it once stays, or each look would add to what the last one had added.
            let known = self.wanted.iter().find(|known| known.id == want.id && known.resource == resource);
            let asked =
                want.settled.or(known.map(|known| known.amount)).unwrap_or_else(|| asked(want, bound));
            let amount = asked.min(bound.most);
            let left_usec = u64::from(want.left_sec.min(MAX_WANT_SEC)).saturating_mul(SEC);
            let until_usec = at_usec.saturating_add(left_usec);
            wanted.push(Wanted { id: want.id, resource, amount, until_usec });
            if want.settled.is_none() {
                let bounded =
                    if asked > amount { "no more is within the bounds of this machine" } else { "" };
                let words: Vec<&str> =
                    [bounded, note].into_iter().filter(|words| !words.is_empty()).collect();
                settled.push(Settled { id: want.id, amount: Some(amount), words: words.join("; ") });
            }
        }
        self.wanted = wanted;
        self.told = Some((at_usec, Box::new(clean(inside))));
        settled
    }

    /// It cannot be asked now. What it wants stays until its time is over: it may only be restarting its agent.
    pub fn lose(&mut self) {
        self.told = None;
    }

    /// Its guest has ended, and with it whoever wanted something.
    pub fn forget(&mut self) {
        *self = Self::default();
    }

    /// What it said last and how long ago, microseconds, while that counts.
    pub fn told(&self, at_usec: u64) -> Option<(&Inside, u64)> {
        let (told_usec, inside) = self.told.as_ref()?;
        let age = at_usec.saturating_sub(*told_usec);
        (age <= FRESH_USEC).then_some((&**inside, age))
    }

    /// What it lacks.
    pub fn pressed(&self, at_usec: u64) -> Option<Pressed> {
        let (inside, _) = self.told(at_usec)?;
        let machine = &inside.machine;
        let share = |share: Option<u32>| u64::from(share.unwrap_or(0));
        Some(Pressed {
            cpu_some_permille: share(machine.cpu_some_permille),
            memory_some_permille: share(machine.memory_some_permille),
            swapped_bytes: machine.swap_used_bytes,
        })
    }

    /// What it wants.
    pub fn wanted(&self, at_usec: u64) -> impl Iterator<Item = &Wanted> {
        self.wanted.iter().filter(move |wanted| wanted.until_usec > at_usec)
    }
}

fn asked(want: &Want, bound: Bound) -> u64 {
    match want.amount {
        Amount::To(to) => to,
        Amount::Up(by) => bound.granted.saturating_add(by),
        Amount::UpCentipercent(by) => {
            let by = u128::from(bound.granted) * u128::from(by) / 10_000;
            bound.granted.saturating_add(u64::try_from(by).unwrap_or(u64::MAX))
        }
    }
}

/// Cut to what can be.
fn clean(mut inside: Inside) -> Inside {
    inside.wants = Vec::new();
    inside.goals = goals(inside.goals);
    inside.applications.truncate(MAX_APPLICATIONS);
    inside.applications.iter_mut().chain(&mut inside.others).for_each(clean_application);
    if let Some(others) = &mut inside.others {
        others.name = String::new();
    }
    if inside.kind == ApplicationKind::Other {
        inside.kind = ApplicationKind::Units;
    }
    let Whole {
        cpu_milli,
        cpu_some_permille,
        memory_some_permille,
        io_some_permille,
        memory_total_bytes,
        memory_available_bytes,
        swap_used_bytes,
        net_rx_bit_per_sec,
        net_tx_bit_per_sec,
    } = &mut inside.machine;
    *cpu_milli = (*cpu_milli).min(MOST_MILLI);
    shares([cpu_some_permille, memory_some_permille, io_some_permille]);
    let amounts =
        [memory_total_bytes, memory_available_bytes, swap_used_bytes, net_rx_bit_per_sec, net_tx_bit_per_sec];
    amounts.into_iter().for_each(|amount| *amount = (*amount).min(MOST));
    inside
}

/// Goals that there can be, each name once, and figures that can be.
fn goals(told: Vec<Pursued>) -> Vec<Pursued> {
    let mut fine: Vec<Pursued> = Vec::new();
    for mut pursued in told.into_iter().take(MAX_GOALS) {
        pursued.name = clean_name(&pursued.name);
        match &mut pursued.goal {
            Goal::Latency { permille, under_usec } => {
                (*permille, *under_usec) = ((*permille).clamp(1, 999), (*under_usec).clamp(1, LONGEST_USEC));
            }
            Goal::Throughput => {}
            Goal::Other => continue,
        }
        if fine.iter().any(|other| other.name == pursued.name) {
            continue;
        }
        pursued.latency_usec = pursued.latency_usec.map(|usec| usec.min(LONGEST_USEC));
        pursued.rate_milli = pursued.rate_milli.map(|milli| milli.min(MOST));
        pursued.wrong = pursued.wrong.map(|words| plain(&words, MAX_WORDS_BYTES));
        fine.push(pursued);
    }
    fine
}

fn clean_application(application: &mut Application) {
    let Application {
        name,
        cpu_milli,
        memory_bytes,
        anon_bytes,
        file_bytes,
        working_set_bytes,
        read_bytes_per_sec,
        written_bytes_per_sec,
        operations_per_sec,
        cpu_some_permille,
        memory_some_permille,
        io_some_permille,
    } = application;
    *name = clean_name(name);
    *cpu_milli = (*cpu_milli).min(MOST_MILLI);
    let amounts =
        [memory_bytes, anon_bytes, file_bytes, working_set_bytes, read_bytes_per_sec, written_bytes_per_sec];
    amounts.into_iter().chain(operations_per_sec).for_each(|amount| *amount = (*amount).min(MOST));
    shares([cpu_some_permille, memory_some_permille, io_some_permille]);
}

fn shares(shares: [&mut Option<u32>; 3]) {
    shares.into_iter().flatten().for_each(|share| *share = (*share).min(1000));
}

/// Nothing in a name that a terminal, a browser or an eye could take for something else.
fn clean_name(name: &str) -> String {
    let fine = |character: char| character.is_ascii_alphanumeric() || "-_.@:/[]+ ".contains(character);
    let mark = |character: char| if fine(character) { character } else { '?' };
    let name: String = name.chars().take(MAX_NAME_BYTES).map(mark).collect();
    if name.trim().is_empty() { "?".to_owned() } else { name }
}

/// Words that go to a terminal as they are.
fn plain(words: &str, most_bytes: usize) -> String {
    let mark = |character: char| if matches!(character, ' '..='~') { character } else { '?' };
    words.chars().take(most_bytes).map(mark).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BOUNDS: Bounds =
        Bounds { cpu: Bound { granted: 500, most: 2000 }, memory: Bound { granted: 1 << 30, most: 2 << 30 } };

    fn cpu(id: u64, amount: Amount, settled: Option<u64>, left_sec: u32) -> Inside {
        let want = Want { id, resource: Wished::Cpu, amount, settled, left_sec };
        Inside { wants: vec![want], ..Inside::default() }
    }

    fn amounts(word: &Word, at_usec: u64) -> Vec<(Resource, u64)> {
        word.wanted(at_usec).map(|wanted| (wanted.resource, wanted.amount)).collect()
    }

    #[test]
    fn a_wish_is_settled_once_within_bounds() {
        let mut word = Word::default();
        let settled = word.take(SEC, cpu(7, Amount::Up(1000), None, 60), &BOUNDS, "only observed");
        assert_eq!(settled, [Settled { id: 7, amount: Some(1500), words: "only observed".into() }]);
        assert_eq!(amounts(&word, SEC), [(Resource::Cpu, 1500)]);
        // It has grown meanwhile, and the answer is still under way: nothing is added to what was added.
        let grown = Bounds { cpu: Bound { granted: 1500, most: 2000 }, ..BOUNDS };
        let again = word.take(2 * SEC, cpu(7, Amount::Up(1000), None, 59), &grown, "");
        assert_eq!((again[0].amount, amounts(&word, 2 * SEC)), (Some(1500), vec![(Resource::Cpu, 1500)]));
        // Another lathed, which knows nothing.
        let mut word = Word::default();
        assert_eq!(word.take(SEC, cpu(7, Amount::Up(1000), Some(1500), 58), &grown, ""), []);
        assert_eq!(amounts(&word, SEC), [(Resource::Cpu, 1500)]);
        assert_eq!(amounts(&word, 60 * SEC), [], "its time is over");
        let much = word.take(SEC, cpu(8, Amount::UpCentipercent(u32::MAX), None, 60), &BOUNDS, "");
        assert_eq!(much[0].amount, Some(2000));
        assert!(much[0].words.contains("bounds"), "{much:?}");
        word.take(SEC, cpu(9, Amount::To(1), Some(u64::MAX), u32::MAX), &BOUNDS, "");
        assert_eq!(amounts(&word, SEC), [(Resource::Cpu, 2000)], "a lie is bounded too");
        assert_eq!(amounts(&word, (u64::from(MAX_WANT_SEC) + 1) * SEC), []);
        word.take(SEC, Inside::default(), &BOUNDS, "");
        assert_eq!(amounts(&word, SEC), [], "it does not want it any more");
    }

    #[test]
    fn what_was_said_counts_while_it_is_fresh() {
        let mut word = Word::default();
        let machine = Whole { cpu_some_permille: Some(400), swap_used_bytes: 9, ..Whole::default() };
        word.take(SEC, Inside { machine, ..Inside::default() }, &BOUNDS, "");
        let pressed = Pressed { cpu_some_permille: 400, memory_some_permille: 0, swapped_bytes: 9 };
        assert_eq!(word.pressed(2 * SEC), Some(pressed));
        assert_eq!(word.pressed(SEC + FRESH_USEC + 1), None);
        word.lose();
        assert_eq!(word.pressed(2 * SEC), None);
    }

    #[test]
    fn what_is_wanted_outlives_the_agent_and_not_the_guest() {
        let mut word = Word::default();
        word.take(SEC, cpu(7, Amount::To(700), None, 60), &BOUNDS, "");
        word.lose();
        assert_eq!(amounts(&word, 2 * SEC), [(Resource::Cpu, 700)]);
        word.forget();
        assert_eq!(amounts(&word, 2 * SEC), []);
    }

    #[test]
    fn goals_are_those_that_there_can_be() {
        let pursued = |name: &str, goal| Pursued {
            name: name.into(),
            goal,
            over_msec: 1,
            latency_usec: Some(u64::MAX),
            rate_milli: Some(u64::MAX),
            wrong: Some("no\u{1b}[2J".into()),
        };
        let least = Goal::Latency { permille: 0, under_usec: 0 };
        let all = vec![
            pursued("a", least),
            pursued("later", Goal::Other),
            pursued("a", Goal::Throughput),
            pursued("b", Goal::Throughput),
            pursued("fifth", Goal::Throughput),
        ];
        let fine = goals(all);
        let said: Vec<_> = fine.iter().map(|one| (one.name.as_str(), one.goal)).collect();
        assert_eq!(
            said,
            [("a", Goal::Latency { permille: 1, under_usec: 1 }), ("b", Goal::Throughput)],
            "the first of a name, and of four"
        );
        assert_eq!((fine[0].latency_usec, fine[0].rate_milli), (Some(LONGEST_USEC), Some(MOST)));
        assert_eq!(fine[0].wrong.as_deref(), Some("no?[2J"));
    }

    #[test]
    fn names_are_what_they_look_like() {
        assert_eq!(clean_name("user@1000.service/app[7]"), "user@1000.service/app[7]");
        assert_eq!(clean_name("a\u{1b}[31mb\u{202e}\n"), "a?[31mb??");
        assert_eq!((clean_name("  ").as_str(), clean_name(&"ä".repeat(500)).len()), ("?", 64));
    }

    fn anything() -> impl Strategy<Value = Inside> {
        let amount = prop_oneof![any::<u64>().prop_map(Amount::To), any::<u64>().prop_map(Amount::Up)];
        let want = (any::<u64>(), any::<bool>(), amount, proptest::option::of(any::<u64>()), any::<u32>());
        let want = want.prop_map(|(id, cpu, amount, settled, left_sec)| {
            let resource = if cpu { Wished::Cpu } else { Wished::Memory };
            Want { id, resource, amount, settled, left_sec }
        });
        let application = (".{0,80}", any::<u64>(), proptest::option::of(any::<u32>()));
        let application = application.prop_map(|(name, amount, share)| Application {
            name,
            cpu_milli: amount,
            working_set_bytes: amount,
            operations_per_sec: Some(amount),
            io_some_permille: share,
            ..Application::default()
        });
        let lists = (prop::collection::vec(application, 0..40), prop::collection::vec(want, 0..5));
        (lists, any::<u64>(), any::<u32>()).prop_map(|((applications, wants), bytes, share)| Inside {
            machine: Whole { swap_used_bytes: bytes, cpu_some_permille: Some(share), ..Whole::default() },
            others: applications.first().cloned(),
            applications,
            wants,
            ..Inside::default()
        })
    }

    proptest! {
        #[test]
        fn whatever_a_guest_says_is_bounded(one in anything(), other in anything(), at in any::<u64>()) {
            let mut word = Word::default();
            for inside in [one, other] {
                let settled = word.take(at, inside, &BOUNDS, "");
                prop_assert!(settled.len() <= MAX_WANTS);
                prop_assert!(word.wanted(at).count() <= MAX_WANTS);
                for wanted in word.wanted(at) {
                    let most = if wanted.resource == Resource::Cpu { BOUNDS.cpu.most } else { BOUNDS.memory.most };
                    prop_assert!(wanted.amount <= most);
                }
                let (told, _) = word.told(at).unwrap();
                prop_assert!(told.applications.len() <= MAX_APPLICATIONS && told.machine.swap_used_bytes <= MOST);
                prop_assert!(told.machine.cpu_some_permille <= Some(1000));
                for application in told.applications.iter().chain(&told.others) {
                    prop_assert!(application.name.is_ascii() && application.name.len() <= MAX_NAME_BYTES);
                    prop_assert!(application.cpu_milli <= MOST_MILLI && application.operations_per_sec <= Some(MOST));
                }
            }
        }
    }
}
