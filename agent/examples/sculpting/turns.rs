//! The whole loop on series: minutes into forecasters, sights into the sculptor, its decisions into grants.

use lathe_agent::api::wire::Tier;
use lathe_agent::foresight::rhythm::{Cycle as Seen, Rhythms};
use lathe_agent::foresight::ring::Rings;
use lathe_agent::foresight::{Of, Resource};
use lathe_agent::sculptor::{Cycle, Decision, Host, Machine, Outlook, RESOURCES, Sculptor, Settings, Sight};
use lathe_forecast::{Blueprint, Config, Series};

use crate::fleet::{Load, MINUTE, TURN_SEC};
use crate::rules::{LAG, LEAST, STEP};

/// Where 0.95 stands in `lathe_forecast::LEVELS`.
const P95: usize = 3;
/// Forecasts after which what held long ago counts half.
const JUDGED: u32 = 1440;

/// Steps of a machine between two looks for what comes back, minutes.
const LOOK_MIN: usize = 10;

/// What was forecast after each minute of a machine, how many of the forecasts before it had held, and what was known to come back.
pub struct Foreseen {
    minutes: Vec<(Blueprint, (u32, u32))>,
    cycles: Vec<Option<Seen>>,
}

impl Foreseen {
    /// Minute after minute, as lathed does.
    pub fn of(load: &Load) -> Self {
        let mut series = Series::new(Config { step_secs: 60, ..Config::default() });
        let (mut held, mut judged) = (0, 0);
        let minute = |(minute, turns): (usize, &[u64])| {
            let mean = (turns.iter().sum::<u64>() / turns.len() as u64) as f32;
            if minute > 0 {
                if judged == JUDGED {
                    (held, judged) = (held / 2, judged / 2);
                }
                judged += 1;
                held += u32::from(mean <= series.forecast().quantiles[0][P95]);
            }
            let _ = series.observe(minute as u64 * 60, mean);
            (series.forecast(), (held, judged))
        };
        let minutes = load.demand.chunks(MINUTE).enumerate().map(minute).collect();
        Self { minutes, cycles: cycles(load) }
    }

    /// The 95 % quantile of the next minute after each minute, milliCPU.
    pub fn p95(&self) -> Vec<f32> {
        self.minutes.iter().map(|(blueprint, _)| blueprint.quantiles[0][P95]).collect()
    }
}

/// What was known to come back after each ten minutes. Their samples are of five minutes, so that there is nothing quick to be found.
fn cycles(load: &Load) -> Vec<Option<Seen>> {
    let (mut rings, mut rhythms) = (Rings::default(), Rhythms::default());
    let ten = |(ten, turns): (usize, &[u64])| {
        for (turn, demand) in turns.iter().enumerate() {
            let from = ((ten * LOOK_MIN * MINUTE + turn) as u64 + 1) * TURN_SEC;
            let grains = u32::try_from(*demand).unwrap_or(u32::MAX);
            (from..from + TURN_SEC).for_each(|second| rings.take(second, grains));
        }
        let now_sec = (ten as u64 + 1) * LOOK_MIN as u64 * 60 + TURN_SEC;
        rings.pass(now_sec);
        rhythms.look_slow(Of::Mean, &rings, now_sec);
        rhythms.cycle(now_sec).cloned()
    };
    load.demand.chunks(LOOK_MIN * MINUTE).enumerate().map(ten).collect()
}

/// How the loop is run.
#[derive(Clone, Copy, Debug, Default)]
pub struct Way {
    pub aggressiveness_permille: u32,
    /// Without outlooks: the reactive path alone.
    pub without_outlook: bool,
    /// Without what comes back.
    pub without_cycle: bool,
    /// What is wanted beyond the grant is not seen.
    pub blind: bool,
    /// What the host has, milliCPU; 0: more than enough.
    pub capacity: u64,
}

/// A machine in one turn.
struct Now {
    turn: usize,
    granted: u64,
    busy: bool,
}

/// A machine's name in the fleet.
fn name(at: usize) -> String {
    format!("{at:04}")
}

/// Grants of each machine in each turn.
pub fn run(loads: &[Load], foreseen: &[Foreseen], settings: Settings, way: Way) -> Vec<Vec<u64>> {
    let mut sculptor = Sculptor::new(settings);
    let turns = loads.iter().map(|load| load.demand.len()).max().unwrap_or(0);
    let mut granted: Vec<u64> = loads.iter().map(|load| load.p99).collect();
    let mut grants: Vec<Vec<u64>> = loads.iter().map(|load| Vec::with_capacity(load.demand.len())).collect();
    let mut under_way: Vec<(usize, Decision)> = Vec::new();
    for turn in 0..turns {
        for (_, decision) in under_way.extract_if(.., |(due, _)| *due <= turn) {
            let at: usize = decision.machine.parse().expect("a number");
            granted[at] = decision.to;
        }
        for (at, load) in loads.iter().enumerate().filter(|(_, load)| turn < load.demand.len()) {
            grants[at].push(granted[at]);
            debug_assert_eq!(grants[at].len(), turn + 1, "{}", load.name);
        }
        let machines: Vec<Machine> = (0..loads.len())
            .filter(|at| turn < loads[*at].demand.len())
            .map(|at| {
                let busy = under_way.iter().any(|(_, decision)| decision.machine == name(at));
                machine(at, &loads[at], &foreseen[at], &Now { turn, granted: granted[at], busy }, way)
            })
            .collect();
        let mut host = Host::default();
        if way.capacity > 0 {
            let taken: u64 = granted.iter().sum();
            let growing =
                under_way.iter().map(|(_, decision)| decision.to.saturating_sub(decision.from)).sum::<u64>();
            host.free[0] = way.capacity.saturating_sub(taken + growing);
        }
        let now_msec = (turn as u64 + 1) * TURN_SEC * 1000;
        let decided = sculptor.decide(now_msec, &host, &machines);
        under_way.extend(decided.into_iter().map(|decision| (turn + LAG, decision)));
    }
    grants
}

fn machine(at: usize, load: &Load, foreseen: &Foreseen, now: &Now, way: Way) -> Machine {
    let Now { turn, granted, busy } = *now;
    let seen = |turn: usize| {
        let demand = load.demand[turn];
        if way.blind { demand.min(granted) } else { demand }
    };
    let recent = seen(turn).max(seen(turn.saturating_sub(1)));
    // The minute that is not over yet has not been learnt from.
    let minutes = (turn + 1) / MINUTE;
    let learnt = minutes.checked_sub(1).map(|last| &foreseen.minutes[last]).filter(|_| !way.without_outlook);
    let outlook = learnt.and_then(|(blueprint, _)| {
        let steps = blueprint.quantiles.iter().map(|row| row.map(|amount| amount.ceil() as u64)).collect();
        Outlook::new(60, steps, blueprint.confidence)
    });
    let ten = ((turn + 1) / (LOOK_MIN * MINUTE)).checked_sub(1).filter(|_| !way.without_cycle);
    let now_sec = (turn as u64 + 2) * TURN_SEC;
    let known = ten.and_then(|ten| foreseen.cycles[ten].as_ref());
    let cycle = known.and_then(|known| Cycle::of(known, Resource::Cpu, now_sec));
    let sight = Sight {
        granted,
        min: LEAST,
        max: u64::MAX,
        step: STEP,
        demand: seen(turn),
        recent,
        hidden: way.blind,
        outlook,
        cycle,
        held: learnt.map_or((0, 0), |(_, held)| *held),
        ..Sight::default()
    };
    let mut sights: [Option<Sight>; RESOURCES] = Default::default();
    sights[0] = Some(sight);
    let aggressiveness_permille = way.aggressiveness_permille;
    Machine { name: name(at), tier: Tier::Standard, aggressiveness_permille, busy, sights }
}
