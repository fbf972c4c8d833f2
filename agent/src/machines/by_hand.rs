//! What people say of the future of a machine: taken in, kept with it, shown.

use super::core::{Core, Entry, unix_sec};
use super::foresee;
use crate::api::wire::by_hand::{
    AnnounceRequest, AnnouncedView, BlueprintRequest, BlueprintStep, ByHandView, ForecastOf,
    Raise as RaiseWord, RaiseView,
};
use crate::foresight::Resource;
use crate::foresight::by_hand::{ByHand, Event, Raise, Step, When};
use crate::problem::{Kind, Problem};
use crate::store::{Change, Past};

impl From<ForecastOf> for Resource {
    fn from(of: ForecastOf) -> Self {
        match of {
            ForecastOf::Cpu => Self::Cpu,
            ForecastOf::Memory => Self::Memory,
            ForecastOf::Net => Self::Net,
            ForecastOf::Iops => Self::Iops,
        }
    }
}

impl From<Resource> for ForecastOf {
    fn from(resource: Resource) -> Self {
        match resource {
            Resource::Cpu => Self::Cpu,
            Resource::Memory => Self::Memory,
            Resource::Net => Self::Net,
            Resource::Iops => Self::Iops,
        }
    }
}

impl From<BlueprintStep> for Step {
    fn from(step: BlueprintStep) -> Self {
        let BlueprintStep { resource, daily, from_sec, for_sec, p50, p95, p99 } = step;
        Self { resource: resource.into(), when: When { daily, from_sec, for_sec }, p50, p95, p99 }
    }
}

impl From<RaiseWord> for Raise {
    fn from(raise: RaiseWord) -> Self {
        match raise {
            RaiseWord::To(to) => Self::To(to),
            RaiseWord::Up(by) => Self::Up(by),
            RaiseWord::UpCentipercent(by) => Self::UpCentipercent(by),
        }
    }
}

impl From<Raise> for RaiseWord {
    fn from(raise: Raise) -> Self {
        match raise {
            Raise::To(to) => Self::To(to),
            Raise::Up(by) => Self::Up(by),
            Raise::UpCentipercent(by) => Self::UpCentipercent(by),
        }
    }
}

/// Changes what is said of a machine, and keeps it before it counts.
async fn change(
    core: &Core,
    name: &str,
    code: &'static str,
    edit: impl FnOnce(&mut ByHand) -> Result<(), Problem>,
) -> Result<ByHandView, Problem> {
    let _one_at_a_time = core.saying.lock().await;
    let entry = core.entry(name)?;
    foresee::is_on(core, &entry)?;
    let now = unix_sec();
    let mut said = entry.profile(|profile| profile.by_hand.clone());
    said.tidy(now);
    edit(&mut said)?;
    let wrong = |what: String| Problem::new(Kind::BadRequest, code, what).fix("lathe forecast --help");
    said.check(now).map_err(wrong)?;
    keep(core, &entry, &said).await?;
    let view = view(&said, now);
    entry.profile(|profile| profile.by_hand = said);
    Ok(view)
}

async fn keep(core: &Core, entry: &Entry, said: &ByHand) -> Result<(), Problem> {
    let past = Past { name: entry.name.clone(), by_hand: Some(said.save()), ..Past::default() };
    core.store.apply(Change::Pasts(vec![past])).await
}

/// Sets the blueprint, or takes it back.
///
/// # Errors
/// `no-such-machine`, `foresight-off`, `bad-blueprint`.
pub(super) async fn set(
    core: &Core,
    name: &str,
    request: Option<BlueprintRequest>,
) -> Result<ByHandView, Problem> {
    change(core, name, "bad-blueprint", |said| {
        let Some(BlueprintRequest { confidence_permille, steps }) = request else {
            (said.steps, said.confidence_permille) = (Vec::new(), 0);
            return Ok(());
        };
        if steps.is_empty() {
            let message = format!("the blueprint for {name} has no steps");
            return Err(Problem::new(Kind::BadRequest, "bad-blueprint", message)
                .fix(format!("to take it back: lathe forecast {name} --unset")));
        }
        said.steps = steps.into_iter().map(Step::from).collect();
        said.confidence_permille = confidence_permille;
        Ok(())
    })
    .await
}

/// Announces an event.
///
/// # Errors
/// `no-such-machine`, `foresight-off`, `bad-event`.
pub(super) async fn announce(
    core: &Core,
    name: &str,
    event: String,
    request: AnnounceRequest,
) -> Result<ByHandView, Problem> {
    let AnnounceRequest { daily, from_sec, for_sec, raises } = request;
    let raises = raises.into_iter().map(|raise| (raise.resource.into(), raise.raise.into())).collect();
    let announced = Event { name: event, when: When { daily, from_sec, for_sec }, raises };
    if announced.when.next(unix_sec()).is_none() {
        let message = format!("event {:?} for {name}: it is over already", announced.name);
        return Err(Problem::new(Kind::BadRequest, "bad-event", message)
            .fix("times are UTC; write one that is to come"));
    }
    change(core, name, "bad-event", |said| {
        said.events.retain(|event| event.name != announced.name);
        said.events.push(announced);
        said.events.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(())
    })
    .await
}

/// Takes an event back.
///
/// # Errors
/// `no-such-machine`, `foresight-off`, `no-such-event`.
pub(super) async fn withdraw(core: &Core, name: &str, event: &str) -> Result<ByHandView, Problem> {
    change(core, name, "bad-event", |said| {
        let before = said.events.len();
        said.events.retain(|other| other.name != event);
        if said.events.len() < before {
            return Ok(());
        }
        let shown: String = event.chars().take(64).collect();
        Err(Problem::new(Kind::NotFound, "no-such-event", format!("{name} has no event {shown:?}"))
            .fix(format!("lathe forecast {name}")))
    })
    .await
}

/// What was stored; what cannot be read is said once and lost.
pub(super) fn read_back(name: &str, bytes: &[u8]) -> ByHand {
    ByHand::restore(bytes, unix_sec()).unwrap_or_else(|cause| {
        tracing::error!(machine = name, "what was said by hand of what it will ask for is lost: {cause}");
        ByHand::default()
    })
}

/// What is said, as it is shown.
pub(super) fn view(said: &ByHand, now_sec: u64) -> ByHandView {
    let step = |step: &Step| BlueprintStep {
        resource: step.resource.into(),
        daily: step.when.daily,
        from_sec: step.when.from_sec,
        for_sec: step.when.for_sec,
        p50: step.p50,
        p95: step.p95,
        p99: step.p99,
    };
    let event = |event: &Event| {
        let next = event.when.next(now_sec);
        let raise = |(resource, raise): &(Resource, Raise)| RaiseView {
            resource: (*resource).into(),
            raise: (*raise).into(),
        };
        AnnouncedView {
            name: event.name.clone(),
            daily: event.when.daily,
            from_sec: event.when.from_sec,
            for_sec: event.when.for_sec,
            raises: event.raises.iter().map(raise).collect(),
            next_unix_sec: next.map(|(from, _)| from),
            now: next.is_some_and(|(from, until)| (from..until).contains(&now_sec)),
        }
    };
    ByHandView {
        confidence_permille: said.confidence_permille,
        steps: said.steps.iter().map(step).collect(),
        events: said.events.iter().map(event).collect(),
    }
}
