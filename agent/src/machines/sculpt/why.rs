//! What was decided about a machine, as it is shown.

use super::kept::{Kept, Numbers, Sculpted};
use super::look::{Hold, SCULPTED, hold, is_timed, shown};
use crate::api::wire::foresight::{AskedBy, DecisionView, OptionView, QualityView, WeighingView, WhyView};
use crate::api::wire::{MachineState, SCHEMA, Tier};
use crate::foresight::account::Sums;
use crate::foresight::{Mode, Resource};
use crate::machines::core::{Core, Entry, unix_sec};
use crate::machines::view as machines;
use crate::problem::Problem;
use crate::sculptor::{Cause, Decision, Weighed, Weighing, Why};

/// The last decisions about a machine.
///
/// # Errors
/// `no-such-machine`.
pub(in crate::machines) fn view(core: &Core, name: &str) -> Result<WhyView, Problem> {
    let entry = core.entry(name)?;
    let now_unix_sec = unix_sec();
    let now = now(core, &entry);
    let foresight = entry.with(|shared| machines::foresight(&shared.record, entry.host_foresight));
    let held = entry
        .profile(|profile| Resource::ALL.map(|resource| Some(profile.track(resource)?.forecaster.held())));
    let (decisions, weighings, quality) = entry.sculpted(|sculpted| {
        let quality = |resource: Resource| {
            let day = sculpted.accounts[resource as usize].day(now_unix_sec);
            let held = held[resource as usize];
            (held.is_some() || day.seconds > 0).then(|| quality(resource, held.unwrap_or_default(), &day))
        };
        let quality = Resource::ALL.into_iter().filter_map(quality).collect();
        (decisions(sculpted), weighings(sculpted), quality)
    });
    let known = entry.sculpted(|sculpted| sculpted.since_sec);
    let started = now_unix_sec.saturating_sub(core.started.elapsed().as_secs());
    Ok(WhyView {
        schema: SCHEMA,
        name: name.to_owned(),
        foresight,
        now_unix_sec,
        now,
        since_unix_sec: known.map_or(started, |known| known.min(started)),
        decisions,
        weighings,
        quality,
    })
}

/// What is done with a machine now, and what keeps it from being resized.
fn now(core: &Core, entry: &Entry) -> String {
    let name = &entry.name;
    let mode = entry.foresight().mode;
    if mode == Mode::Off {
        return match core.config.foresight.mode {
            Mode::Off => "foresight is off on this host: nothing is profiled and nothing decided".to_owned(),
            _ => format!(
                "its mode is off: it is not profiled, and nothing is decided; lathe forecast {name} --mode observe"
            ),
        };
    }
    let now_msec = core.now_msec();
    let (doing, rests) = entry.sculpted(|sculpted| {
        (sculpted.doing, SCULPTED.map(|resource| sculpted.rests_until(resource, now_msec)))
    });
    let record = entry.with(|shared| shared.record.clone());
    let mut words = vec![match hold(&record, doing, now_msec) {
        Some(Hold::Still(state)) => {
            format!("it is {}: nothing is decided while it does not run", state_word(state))
        }
        Some(Hold::Doing) => "what was decided is being carried out".to_owned(),
        Some(Hold::UnderWay(AskedBy::Person)) => "a change that somebody asked for is under way".to_owned(),
        Some(Hold::UnderWay(_)) => "a change of its shape is under way".to_owned(),
        Some(Hold::Asked(until)) => {
            let seconds = until.saturating_sub(now_msec).div_ceil(1000);
            format!("somebody resized it: left as it is for {seconds} s more")
        }
        None => "looked at every 5 s, and when it asks for all that it has".to_owned(),
    }];
    for (resource, rest) in SCULPTED.into_iter().zip(rests) {
        if is_timed(&record, resource) {
            words.push(format!("what it has of {} was asked for a time, which is not over", resource.word()));
        }
        if let Some(until) = rest {
            let seconds = until.saturating_sub(now_msec).div_ceil(1000);
            let what = resource.word();
            words.push(format!(
                "the last change of {what} did not come about: not asked again for {seconds} s"
            ));
        }
    }
    if mode == Mode::Observe {
        words.push(format!(
            "mode is observe, nothing is changed; to have it done: lathe forecast {name} --mode on"
        ));
    }
    words.join("; ")
}

fn state_word(state: MachineState) -> String {
    format!("{state:?}").to_lowercase()
}

/// The cause in a sentence.
pub(super) fn sentence(decision: &Decision, numbers: &Numbers, tier: Tier) -> String {
    let show = |amount: u64| shown(decision.resource, amount);
    let from = show(decision.from);
    let chosen = decision.weighing.options.iter().find(|option| option.rejected.is_none());
    if let Some(back) = decision.weighing.recurrence {
        let (period, cycles) = (about(back.period_msec / 1000), back.cycles);
        return match decision.cause {
            Cause::Ahead => format!("it asks for that each {period}, {cycles} times so far, and soon again"),
            _ => format!(
                "it asks for no more until the next time: it has asked for that each {period}, {cycles} times so far"
            ),
        };
    }
    match decision.cause {
        Cause::Reached => {
            let asked = numbers.demand.map_or("all".to_owned(), show);
            format!("it asks for {asked} and has {from}")
        }
        Cause::Ahead => {
            let p95 = numbers.p95.map_or("more".to_owned(), show);
            format!("it is likely to ask for up to {p95} within {} s and has {from}", numbers.ahead_sec)
        }
        Cause::Wanted => {
            "so much was asked for from inside, for a goal of an application, or for an event that is near"
                .to_owned()
        }
        Cause::Bounds if decision.to > decision.from => {
            format!(
                "it cannot do with less than {}: its bounds, its working set and some room",
                show(decision.to)
            )
        }
        Cause::Bounds => format!("it may have {} at most", show(decision.to)),
        Cause::Idle => match chosen {
            Some(option) => {
                let minutes = option.look_msec / 60_000;
                format!(
                    "no more was needed for {minutes} min, and keeping the rest would cost more than the change"
                )
            }
            None => "the rest was not needed for long".to_owned(),
        },
        Cause::Short => format!("the host has not enough for all, and {} gives way", tier.word()),
    }
}

/// A time that is not known to the second.
fn about(seconds: u64) -> String {
    if seconds < 600 { format!("{seconds} s") } else { format!("{} min", (seconds + 30) / 60) }
}

fn rejection(why: Why) -> &'static str {
    match why {
        Why::Dearer => "another one costs less",
        Why::Needed => "more was asked for a short time ago",
        Why::Expected => "more is expected",
        Why::Changes => "the changes of the day are used up, but for growing",
        Why::Small => "hardly another amount",
    }
}

fn option(weighed: &Weighed) -> OptionView {
    OptionView {
        amount: weighed.amount,
        over_sec: weighed.look_msec / 1000,
        unserved: weighed.unserved,
        slack: weighed.slack,
        change: weighed.change,
        total: weighed.total,
        rejected: weighed.rejected.map(|why| rejection(why).to_owned()),
    }
}

/// The one that was taken first, then those that were not, the cheapest first.
fn options(weighing: &Weighing) -> Vec<OptionView> {
    let mut options: Vec<_> = weighing.options.iter().map(option).collect();
    options.sort_by_key(|option| (option.rejected.is_some(), option.total));
    options
}

/// What was weighed at the last look, of what may change.
fn weighings(sculpted: &Sculpted) -> Vec<WeighingView> {
    let of = |resource: Resource| {
        let weighing = sculpted.weighings[resource as usize].as_ref()?;
        Some(WeighingView {
            resource: resource.word().to_owned(),
            granted: weighing.granted,
            amount: weighing.amount,
            need: weighing.need,
            forecast_counts: weighing.trusted,
            changes_a_day: weighing.changes.into(),
            options: options(weighing),
        })
    };
    SCULPTED.into_iter().filter_map(of).collect()
}

/// All that are remembered, the newest first.
pub(super) fn decisions(sculpted: &Sculpted) -> Vec<DecisionView> {
    sculpted.decisions().map(decision).chain(sculpted.before().iter().cloned()).collect()
}

fn decision(kept: &Kept) -> DecisionView {
    let Kept { decision, numbers, .. } = kept;
    let recurrence = decision.weighing.recurrence;
    DecisionView {
        at_unix_msec: kept.at_msec,
        until_unix_msec: kept.until_msec,
        times: kept.times,
        resource: decision.resource.word().to_owned(),
        from: decision.from,
        to: decision.to,
        cause: decision.cause.word().to_owned(),
        why: kept.why.clone(),
        demand: numbers.demand,
        recent: numbers.recent,
        p50: numbers.p50,
        p95: numbers.p95,
        p99: numbers.p99,
        ahead_sec: numbers.ahead_sec,
        confidence_permille: numbers.confidence_permille,
        forecast_counts: decision.weighing.trusted,
        cycle_sec: recurrence.map(|cycle| cycle.period_msec / 1000),
        cycles: recurrence.map(|cycle| cycle.cycles.into()),
        changes_a_day: decision.weighing.changes.into(),
        options: options(&decision.weighing),
        outcome: kept.came.word().to_owned(),
        reason: kept.came.reason().to_owned(),
        operation: kept.operation.clone(),
    }
}

fn quality(resource: Resource, (held, judged): (u32, u32), day: &Sums) -> QualityView {
    let mean = |sum: u64| sum / day.seconds.max(1);
    QualityView {
        resource: resource.word().to_owned(),
        judged: judged.into(),
        held: held.into(),
        measured_sec: day.seconds,
        granted: mean(day.granted),
        asked: mean(day.asked),
        slack_permille: Sums::permille(day.unused, day.granted),
        shortfall_permille: Sums::permille(day.missing, day.asked),
        short_sec: day.short_seconds,
    }
}

#[cfg(test)]
mod tests {
    use super::super::kept::tests as kept;
    use super::*;
    use crate::sculptor::Recurrence;

    #[test]
    fn what_comes_back_is_the_reason_with_its_numbers() {
        let mut of = kept::decision(Resource::Cpu, 900);
        of.weighing.recurrence = Some(Recurrence { period_msec: 180_000, cycles: 4 });
        of.cause = Cause::Ahead;
        let say = |of: &Decision| sentence(of, &Numbers::default(), Tier::Standard);
        assert_eq!(say(&of), "it asks for that each 180 s, 4 times so far, and soon again");
        of.cause = Cause::Idle;
        of.weighing.recurrence = Some(Recurrence { period_msec: 3_570_000, cycles: 2 });
        assert!(say(&of).ends_with("it has asked for that each 60 min, 2 times so far"), "{}", say(&of));

        let mut sculpted = Sculpted::default();
        sculpted.keep(1, of, Numbers::default(), String::new(), super::super::Came::UnderWay);
        let view = sculpted.decisions().map(decision).next().unwrap();
        assert_eq!((view.cycle_sec, view.cycles), (Some(3570), Some(2)));
    }
}
