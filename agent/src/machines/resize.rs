//! Changing a machine's shape: the hands of [`super::shape`].
//!
//! ```text
//! ask ─► reserve in the books ─► store the intent ─► decide ─┬─► host: at once, here ──────────┐
//!                                     ▲                      ├─► monitor, guest: a task each ──┤
//!                                     └── what came of it ◄──┴─────────────────────────────────┘
//!        end ─► store ─► release in the books ─► whoever waits
//! ```
//! What the host refuses before anybody else knows of the change undoes it as if it had not been asked for. An intent that is stored is
//! gone on with after a restart of lathed, until its deadline.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use lathe_cgroup::{Bytes as CgroupBytes, MachineTree, MemoryPatch, MemoryUsage, Patch};
use lathe_guest::protocol::Request as GuestRequest;
use lathe_shard::{BitRate, Bytes, Iops, MilliCpu};
use lathe_vmm::control::wire::{Answer, Command, DiskRates, Phase};

use super::actor::{Actor, Ask};
use super::core::unix_sec;
use super::enforced::Limit;
use super::launch::{self, OVERHEAD_BYTES};
use super::record::{Back, Booted, Desired, Record};
use super::shape::{
    self, AtDeadline, Effect, Ended, Event, Force, Holds, Operation, Outcome, Report, Standing, Step,
};
use super::{cores, guest, iomax, sample, spec, view};
use crate::api::wire::foresight::AskedBy;
use crate::api::wire::{
    Cores, DeadlineAction, MachineState, OperationView, ResizeOutcome, ResizeRequest, ResizeView, Tier,
};
use crate::monitor::MonitorError;
use crate::problem::{Kind, Problem};
use crate::store::Change;

/// Until an operation ends whatever is in force, unless told otherwise.
const DEADLINE: Duration = Duration::from_secs(30);
/// Longest deadline and longest wait, milliseconds.
pub const MAX_DEADLINE_MSEC: u64 = 24 * 3600 * 1000;
/// Longest time that a change may be asked for, seconds.
pub const MAX_FOR_SEC: u64 = 365 * 24 * 3600;
/// How long the guest agent may take over one step, connection included.
const GUEST_TIMEOUT: Duration = Duration::from_secs(8);
/// Between two attempts to go back to what was before a change that was asked for a time.
const BACK_PAUSE: Duration = Duration::from_secs(30);
/// First protocol version of monitors that can change vCPUs and memory.
const ELASTIC_VERSION: u32 = 2;

/// A machine's shape, and when to look at it again.
pub(super) struct Shaper {
    state: shape::State,
    /// The record before a change that nobody knows of yet.
    unpublished: Option<Box<Record>>,
    /// Steps that the monitor has been told, by the id of the command.
    told: BTreeMap<u64, Told>,
    /// No attempt to go back before.
    back_not_before: Instant,
}

/// A step that the monitor has been told.
#[derive(Clone, Copy)]
struct Told {
    number: u64,
    /// When another rate of disks was decided, if it is that.
    rate_decided: Option<Instant>,
}

impl Shaper {
    pub(super) fn new(record: &Record) -> Self {
        let mut state = shape::State::new(
            record.desired,
            record.vcpus_asked.unwrap_or(1),
            record.operation.clone(),
            record.operations,
        );
        state.books = record.holds.unwrap_or_default();
        Self { state, unpublished: None, told: BTreeMap::new(), back_not_before: Instant::now() }
    }
}

/// A CPU quota is one vCPU's worth at most for each vCPU.
pub fn carried_milli(cpu_milli: u64, vcpus: u32) -> u64 {
    cpu_milli.min(u64::from(vcpus).saturating_mul(1000))
}

/// Refuses when somebody else has changed the machine meanwhile.
///
/// # Errors
/// `revision`.
pub fn check_revision(record: &Record, wanted: Option<u64>) -> Result<(), Problem> {
    match wanted {
        Some(wanted) if wanted != record.revision => {
            let name = &record.name;
            let message =
                format!("{name} is at revision {}, the change was made for {wanted}", record.revision);
            Err(Problem::new(Kind::Conflict, "revision", message).fix(format!("lathe show {name}")))
        }
        _ => Ok(()),
    }
}

/// What a request leads to.
///
/// # Errors
/// `bad-amount`, `no-network`, `over-bound`, `nothing-to-undo`.
pub fn target(record: &Record, request: &ResizeRequest) -> Result<Desired, Problem> {
    let bad = |message: String| Problem::new(Kind::BadRequest, "bad-amount", message);
    if request.for_sec.is_some_and(|seconds| seconds == 0 || seconds > MAX_FOR_SEC) {
        return Err(bad(format!("for_sec: between 1 and {MAX_FOR_SEC}")));
    }
    if request.deadline_msec.is_some_and(|msec| msec == 0 || msec > MAX_DEADLINE_MSEC) {
        return Err(bad(format!("deadline_msec: between 1 and {MAX_DEADLINE_MSEC}")));
    }
    if !request.undo {
        return spec::resized(record, request);
    }
    let amounts =
        [request.cpu_milli, request.memory_bytes, request.net_bit_per_sec, request.iops, request.for_sec];
    if amounts.iter().any(Option::is_some) || request.tier.is_some() {
        return Err(bad("undo goes with no amounts and no tier".to_owned()));
    }
    record.undo.ok_or_else(|| {
        let message = format!("{} has not been resized yet", record.name);
        Problem::new(Kind::Conflict, "nothing-to-undo", message)
    })
}

/// What a change that was asked for a time goes back to, if `request` is made of `record`.
fn back_after(record: &Record, request: &ResizeRequest, now: u64) -> Option<Back> {
    if request.undo {
        return None;
    }
    let earlier = record.back.unwrap_or_default();
    fn merged<T>(timed: bool, asked: Option<T>, earlier: Option<T>, before: T) -> Option<T> {
        match (asked, timed) {
            (Some(_), true) => Some(earlier.unwrap_or(before)),
            (Some(_), false) => None,
            (None, _) => earlier,
        }
    }
    let timed = request.for_sec.is_some();
    let merge = |asked, earlier, before| merged::<u64>(timed, asked, earlier, before);
    let back = Back {
        at_unix_msec: request
            .for_sec
            .map_or(earlier.at_unix_msec, |seconds| now.saturating_add(seconds.saturating_mul(1000))),
        cpu_milli: merge(request.cpu_milli, earlier.cpu_milli, record.desired.cpu_milli),
        memory_bytes: merge(request.memory_bytes, earlier.memory_bytes, record.desired.memory_bytes),
        net_bit_per_sec: merge(
            request.net_bit_per_sec,
            earlier.net_bit_per_sec,
            record.desired.net_bit_per_sec,
        ),
        iops: merge(request.iops, earlier.iops, record.desired.iops),
        tier: merged(timed, request.tier, earlier.tier, record.desired.tier),
    };
    let amounts = [back.cpu_milli, back.memory_bytes, back.net_bit_per_sec, back.iops];
    (back.tier.is_some() || amounts.iter().any(Option::is_some)).then_some(back)
}

/// Begins a resize; when this returns its host's part has ended, and all of it if no guest has a part in it.
///
/// # Errors
/// `revision`, `machine-busy`, `bad-amount`, `…-over-capacity`, `store`; then nothing changed.
pub(super) async fn resize(
    actor: &mut Actor,
    by: AskedBy,
    request: &ResizeRequest,
    revision: Option<u64>,
) -> Result<ResizeView, Problem> {
    let begin = Instant::now();
    let record = actor.entry.with(|shared| shared.record.clone());
    let target = target(&record, request)?;
    if by == AskedBy::Sculptor {
        check_undisturbed(&record, request)?;
    }
    // The same again, perhaps because the first answer got lost, joins what is under way.
    if let Some(operation) = &record.operation
        && operation.deadline.is_some()
        && operation.target == target
        && revision.is_none_or(|wanted| wanted == operation.base_revision || wanted == record.revision)
    {
        return Ok(view::under_way(&actor.entry));
    }
    check_revision(&record, revision)?;
    if !record.life.is_settled() {
        let message = format!("{} is neither running nor off at the moment", record.name);
        return Err(Problem::new(Kind::Conflict, "machine-busy", message).fix("try again in a moment"));
    }
    let short = actor.shape.state.shortfalls(actor.core.now_msec());
    if target == record.desired && record.operation.is_none() && short.iter().all(|short| short.until_restart)
    {
        // That it is to stay so is a word of theirs, too.
        noted(actor, by);
        let (reason, number) = (shape::words(&short), record.operations);
        return Ok(view::resize(&actor.entry, number, ResizeOutcome::Unchanged, reason, begin.elapsed()));
    }
    let before = lower_ceiling(actor, target.cpu_milli);
    let intent = match intend(actor, by, &record, request, target).await {
        Ok(intent) => intent,
        Err(problem) => {
            if let Some(before) = before {
                raise_ceiling(actor, before);
            }
            return Err(problem);
        }
    };
    let Some(operation) = intent.operation.clone() else {
        return Err(Problem::internal("resizing", "an intent without operation"));
    };
    let number = operation.number;
    if record.cores == Cores::Dedicated
        && let Err(failures) = cores::keep(&actor.core)
    {
        // It is tried again every second.
        tracing::warn!("machines do not run where they shall: {failures}");
    }
    actor.entry.with(|shared| shared.record = Record { revision: record.revision, ..intent.clone() });
    actor.shape.unpublished = Some(Box::new(record));
    happen(actor, Event::Asked(operation)).await?;
    Ok(view::resized(&actor.entry, number, Some(begin.elapsed())))
}

/// A person has had a word about its shape; stored with the next change.
fn noted(actor: &Actor, by: AskedBy) {
    if by == AskedBy::Person {
        let now = actor.core.now_msec();
        actor.entry.with(|shared| shared.record.asked_unix_msec = now);
    }
}

/// What lathed makes of a forecast waits for what somebody asked for: an operation under way, and what goes back at some time.
///
/// # Errors
/// `machine-busy`.
fn check_undisturbed(record: &Record, request: &ResizeRequest) -> Result<(), Problem> {
    let busy = |what: &str| {
        let message = format!("{} is not sculpted now: {what}", record.name);
        Problem::new(Kind::Conflict, "machine-busy", message)
    };
    if record.life.state() != MachineState::Running {
        return Err(busy("it does not run"));
    }
    let own = |operation: &Operation| operation.by == AskedBy::Sculptor && operation.deadline.is_none();
    if record.operation.as_ref().is_some_and(|operation| !own(operation)) {
        return Err(busy("a change of its shape is under way"));
    }
    let back = record.back.unwrap_or_default();
    let timed = [
        (request.cpu_milli, back.cpu_milli),
        (request.memory_bytes, back.memory_bytes),
        (request.net_bit_per_sec, back.net_bit_per_sec),
        (request.iops, back.iops),
    ];
    if timed.iter().any(|(asked, back)| asked.is_some() && back.is_some()) {
        return Err(busy("what it has was asked for a time"));
    }
    Ok(())
}

/// A quota that falls does so before the intent is stored, which takes longer than all else: nobody else was promised what it frees yet, and
/// after a death in between it is found lower than recorded, and corrected. Answers what it was, if it was to fall.
fn lower_ceiling(actor: &Actor, cpu_milli: u64) -> Option<(u64, u32)> {
    let before = actor.shape.state.force.as_ref()?.quota?;
    if cpu_milli >= before.0 {
        return None;
    }
    if let Err(problem) = write_ceiling(actor, (cpu_milli, before.1)) {
        // The step tries again, and fails with it.
        tracing::warn!(machine = actor.entry.name, %problem, "a quota has not fallen ahead of its change");
    }
    Some(before)
}

/// The change that a quota has fallen for is refused: it goes back, now or with the next step.
fn raise_ceiling(actor: &mut Actor, before: (u64, u32)) {
    if let Err(problem) = write_ceiling(actor, before) {
        tracing::error!(machine = actor.entry.name, %problem, "a quota has fallen for a change that was refused; it is tried again");
        if let Some(force) = &mut actor.shape.state.force {
            force.quota = None;
        }
    }
}

fn write_ceiling(actor: &Actor, (cpu_milli, vcpus): (u64, u32)) -> Result<(), Problem> {
    let decided = Instant::now();
    let Some(tree) = actor.live().and_then(|live| live.launched.tree.as_ref()) else { return Ok(()) };
    limit_cpu(actor, tree, (cpu_milli, vcpus), decided)
}

/// Puts a quota in force.
fn limit_cpu(
    actor: &Actor,
    tree: &MachineTree,
    (cpu_milli, vcpus): (u64, u32),
    decided: Instant,
) -> Result<(), Problem> {
    let at_usec = sample::usec(&actor.core, Instant::now());
    let quota = actor.core.walls.limit(tree, cpu_milli, vcpus, at_usec)?;
    let before = actor.entry.with(|shared| std::mem::replace(&mut shared.quota_milli, quota.milli));
    // What is found after a restart of lathed is no change.
    if before.is_some() && before != quota.milli {
        actor.core.enforced.after(Limit::Cpu, quota.at.saturating_duration_since(decided));
    }
    Ok(())
}

/// Reserves and stores what is about to happen; nothing has happened when this fails.
async fn intend(
    actor: &Actor,
    by: AskedBy,
    record: &Record,
    request: &ResizeRequest,
    target: Desired,
) -> Result<Record, Problem> {
    let now = actor.core.now_msec();
    let deadline = request.deadline_msec.unwrap_or(u64::try_from(DEADLINE.as_millis()).unwrap_or(u64::MAX));
    let mut intent = record.clone();
    intent.desired = target;
    intent.revision += 1;
    intent.operations += 1;
    match by {
        // Undone is what somebody asked for, not what was made of it since.
        AskedBy::Sculptor => {}
        AskedBy::Lathed => intent.undo = Some(record.desired),
        AskedBy::Person => (intent.undo, intent.asked_unix_msec) = (Some(record.desired), now),
    }
    intent.back = back_after(record, request, now);
    intent.operation = Some(Operation {
        number: intent.operations,
        target,
        before: record.desired,
        base_revision: record.revision,
        by,
        began: now,
        deadline: Some(now.saturating_add(deadline)),
        at_deadline: match request.deadline_action {
            DeadlineAction::Keep => AtDeadline::Keep,
            DeadlineAction::Revert => AtDeadline::Revert,
        },
    });
    actor.core.with_books(|books| books.set(&record.name, intent.booking()))?;
    if let Err(problem) = actor.core.store.apply(Change::Put(Box::new(intent.clone()))).await {
        actor.core.with_books(|books| books.enter(&record.name, record.booking()));
        return Err(problem);
    }
    Ok(intent)
}

/// Ends the operation of this number as if it had not been asked for.
///
/// # Errors
/// `no-such-operation`, `operation-ended`, `…-over-capacity` when what was before is no longer there to have.
pub(super) async fn cancel(actor: &mut Actor, number: u64) -> Result<OperationView, Problem> {
    let record = actor.entry.with(|shared| shared.record.clone());
    let Some(operation) = record.operation.as_ref().filter(|operation| operation.number == number) else {
        view::operation(&actor.entry, number)?;
        let message = format!("operation {}-{number} is over", record.name);
        return Err(Problem::new(Kind::Conflict, "operation-ended", message)
            .fix(format!("lathe resize {} --undo", record.name)));
    };
    let mut back = record.clone();
    back.resizing = Some(operation.before);
    actor.core.with_books(|books| books.set(&record.name, back.booking()))?;
    noted(actor, AskedBy::Person);
    happen(actor, Event::Cancel).await?;
    view::operation(&actor.entry, number)
}

/// Looks again because time has passed.
pub(super) async fn tick(actor: &mut Actor) {
    let back = actor.entry.with(|shared| {
        let due = |back: &Back| back.at_unix_msec <= actor.core.now_msec();
        shared.record.back.filter(due).filter(|_| shared.record.life.is_settled())
    });
    if let Some(back) = back
        && actor.shape.back_not_before <= Instant::now()
    {
        go_back(actor, back).await;
    }
    take_in(actor, Event::Tick).await;
}

/// The time that a change was asked for is over.
async fn go_back(actor: &mut Actor, back: Back) {
    let Back { cpu_milli, memory_bytes, net_bit_per_sec, iops, tier, at_unix_msec: _ } = back;
    let request =
        ResizeRequest { cpu_milli, memory_bytes, net_bit_per_sec, iops, tier, ..ResizeRequest::default() };
    let name = actor.entry.name.clone();
    match resize(actor, AskedBy::Lathed, &request, None).await {
        Ok(_) => {
            actor.core.tell("resize-back", &name, format!("{name}: the time of its last change is over"));
            // Nothing to change: then nothing has forgotten it either.
            let mut record = actor.entry.with(|shared| shared.record.clone());
            if record.back == Some(back) {
                record.back = None;
                put(actor, record).await;
            }
        }
        Err(problem) => {
            actor.shape.back_not_before = Instant::now() + BACK_PAUSE;
            actor.core.tell("resize-back", &name, format!("{name} cannot go back yet: {}", problem.message));
        }
    }
}

async fn put(actor: &Actor, record: Record) {
    if let Err(problem) = actor.core.store.apply(Change::Put(Box::new(record.clone()))).await {
        // After a restart of lathed it is tried once more.
        tracing::error!(machine = record.name, %problem, "cannot store that a machine went back");
    }
    actor.entry.with(|shared| shared.record = record);
}

/// When [`tick`] is due; `None`: not until something happens.
pub(super) fn wake(actor: &Actor) -> Option<Instant> {
    let now = actor.core.now_msec();
    let at = |msec: u64| Instant::now() + Duration::from_millis(msec.saturating_sub(now));
    let back = actor.entry.with(|shared| shared.record.back);
    let back = back.map(|back| at(back.at_unix_msec).max(actor.shape.back_not_before));
    [actor.shape.state.wake(now).map(at), back].into_iter().flatten().min()
}

/// As [`happen`], for what nobody asked for: what cannot be stored is logged, and stored with the next change.
pub(super) async fn take_in(actor: &mut Actor, event: Event) {
    if let Err(problem) = happen(actor, event).await {
        tracing::error!(machine = actor.entry.name, %problem, "cannot store a machine's shape");
    }
}

/// Something happened to the machine's shape: decides, does what the host can do at once, begins the rest, stores what is to be known.
///
/// # Errors
/// `store`; the books then hold the larger of before and after.
async fn happen(actor: &mut Actor, event: Event) -> Result<(), Problem> {
    let mut queue = VecDeque::from([event]);
    let mut store = false;
    while let Some(event) = queue.pop_front() {
        let decided = Instant::now();
        let decision = shape::decide(&actor.shape.state, actor.core.now_msec(), event);
        actor.shape.state = decision.state;
        let (books, rest): (Vec<_>, Vec<_>) =
            decision.effects.into_iter().partition(|effect| matches!(effect, Effect::Books(_)));
        // The books first: who reads that an operation has ended reads what is held after it, too.
        for effect in books.into_iter().chain(rest) {
            match effect {
                Effect::Step(number, step) => queue.extend(take_step(actor, number, step, decided).await),
                Effect::Books(holds) => actor.entry.with(|shared| shared.record.holds = Some(holds)),
                Effect::Progress => progress(actor),
                Effect::Desire(_) | Effect::Begun(_) | Effect::Ended(_) => {
                    store = true;
                    note(actor, effect);
                }
            }
        }
    }
    let force = actor.shape.state.force.clone();
    let short = shape::words(&actor.shape.state.shortfalls(actor.core.now_msec()));
    let before = actor.shape.unpublished.take();
    let record = actor.entry.with(|shared| {
        shared.force = force;
        shared.short = short;
        if let Some(before) = before {
            shared.record.revision = before.revision + 1;
        }
        shared.record.clone()
    });
    if store {
        actor.core.store.apply(Change::Put(Box::new(record.clone()))).await?;
    }
    actor.core.with_books(|books| books.enter(&record.name, record.booking()));
    let last = record.ended.last().map_or(0, |ended| ended.operation.number);
    super::uplink::follow(&actor.core).await;
    actor.entry.ended.send_if_modified(|known| {
        let news = last > *known;
        *known = last.max(*known);
        news
    });
    Ok(())
}

/// What is to be remembered of a decision.
fn note(actor: &mut Actor, effect: Effect) {
    let name = actor.entry.name.clone();
    match effect {
        Effect::Desire(desired) => {
            let before = actor.shape.unpublished.take();
            actor.entry.with(|shared| {
                shared.record.desired = desired;
                match before {
                    // As if it had not been asked for.
                    Some(before) => {
                        (shared.record.undo, shared.record.back) = (before.undo, before.back);
                    }
                    None => shared.record.revision += 1,
                }
            });
        }
        Effect::Begun(operation) => {
            let number = operation.number;
            actor.entry.with(|shared| {
                shared.record.operations = number;
                shared.record.operation = Some(operation);
            });
            actor.core.tell(
                "resize-progress",
                &name,
                format!("{name}-{number}: {name} goes on in the background"),
            );
        }
        Effect::Ended(ended) => {
            tell_end(actor, &ended);
            actor.entry.with(|shared| {
                // One that replaces it is there already.
                let number = ended.operation.number;
                shared.record.operation = shared.record.operation.take().filter(|now| now.number != number);
                shared.record.remember(*ended);
            });
        }
        Effect::Step(..) | Effect::Books(_) | Effect::Progress => {}
    }
}

fn tell_end(actor: &Actor, ended: &Ended) {
    let name = &actor.entry.name;
    let number = ended.operation.number;
    let shape = describe(&ended.operation.target);
    let message = match ended.outcome {
        Outcome::Applied => format!("{name} is resized: {shape}"),
        Outcome::Partial => format!("{name} is resized in part: {shape}: {}", ended.reason),
        Outcome::Failed => format!("{name} is not resized to {shape}: {}", ended.reason),
    };
    actor.core.tell("resize-ended", name, format!("{name}-{number}: {message}"));
    if ended.outcome != Outcome::Failed {
        actor.core.tell("machine-resized", name, message);
    }
}

fn progress(actor: &Actor) {
    let name = &actor.entry.name;
    let state = &actor.shape.state;
    let (Some(operation), Some(force)) = (&state.operation, &state.force) else { return };
    let message = format!(
        "{name}-{}: {name} has {} vCPUs and {} of memory on its way to {}",
        operation.number,
        force.present(),
        Bytes(force.held_bytes()),
        describe(&operation.target)
    );
    actor.core.tell("resize-progress", name, message);
}

fn describe(shape: &Desired) -> String {
    let mut text = format!("{} cpu, {}", MilliCpu(shape.cpu_milli), Bytes(shape.memory_bytes));
    if shape.net_bit_per_sec != 0 {
        text = format!("{text}, {}", BitRate(shape.net_bit_per_sec));
    }
    if shape.iops != 0 {
        text = format!("{text}, {}", Iops(shape.iops));
    }
    if shape.tier != Tier::Standard {
        text = format!("{text}, {}", shape.tier.word());
    }
    text
}

/// How a monitor's machine was found.
pub(super) enum Found {
    /// It has just been started with what is desired, this many vCPU threads are where they belong, and it stands like this among others.
    Started(usize, Standing),
    /// It ran on without lathed: what is in force is not known.
    Again,
}

/// The machine runs: from now on its shape is looked after.
pub(super) async fn up(actor: &mut Actor, found: Found) {
    let record = actor.entry.with(|shared| shared.record.clone());
    let Some(booted) = record.booted.clone() else { return };
    let mut force = Force {
        boot_cpus: booted.vcpus,
        boot_bytes: booted.memory_bytes,
        quota: None,
        net_bit_per_sec: None,
        iops: None,
        standing: None,
        wall_bytes: None,
        cpus: None,
        placed: 0,
        online: None,
        memory: None,
        agent: actor.entry.with(|shared| shared.guest_agent),
        paused: false,
    };
    if let Found::Started(placed, standing) = found {
        force.quota = Some((record.desired.cpu_milli, booted.vcpus));
        force.net_bit_per_sec = Some(record.desired.net_bit_per_sec);
        force.wall_bytes = Some(booted.memory_bytes);
        force.standing = Some(standing);
        force.placed = placed;
        force.online = Some(booted.vcpus);
    }
    if let Some(live) = actor.live()
        && live.monitor.version() >= ELASTIC_VERSION
    {
        match live.monitor.status().await {
            Ok(status) => {
                (force.cpus, force.memory) = (status.cpus, status.memory);
                force.iops = status.disk_rates.map(|rates| rates.iops);
                force.paused = status.phase == Phase::Paused;
            }
            Err(problem) => tracing::warn!(machine = record.name, %problem, "its shape is not known"),
        }
    }
    actor.shape.state.desired = record.desired;
    actor.shape.state.books = record
        .holds
        .unwrap_or(Holds { cpu_milli: record.desired.cpu_milli, memory_bytes: booted.memory_bytes });
    take_in(actor, Event::Up(Box::new(force))).await;
}

/// Its monitor is over.
pub(super) async fn down(actor: &mut Actor) {
    actor.shape.told.clear();
    if actor.shape.state.force.is_some() || actor.shape.state.operation.is_some() {
        take_in(actor, Event::Down).await;
    }
}

/// After adoption: goes on with what was under way, and corrects every limit that is another than desired.
pub(super) async fn settle(actor: &mut Actor) {
    let mut record = actor.entry.with(|shared| shared.record.clone());
    if record.booted.is_none() {
        // `Go` was acknowledged, but lathed died before it could write down what it had started.
        record.booted = Some(Booted {
            vcpus: record.vcpus(),
            memory_bytes: record.desired.memory_bytes,
            host_boot_id: actor.core.boot_id.clone(),
            at_unix_sec: unix_sec(),
        });
    }
    if let Some(target) = record.resizing.take() {
        record.desired = target;
        record.revision += 1;
    }
    if let Err(problem) = actor.core.store.apply(Change::Put(Box::new(record.clone()))).await {
        tracing::error!(machine = record.name, %problem, "cannot store an adopted machine");
    }
    actor.entry.with(|shared| shared.record = record);
    up(actor, Found::Again).await;
}

/// The guest has reset: what it has now is the monitor's to say.
pub(super) async fn rebooted(actor: &mut Actor) {
    take_in(actor, Event::Rebooted).await;
    let Some(live) = actor.live() else { return };
    if live.monitor.version() < ELASTIC_VERSION {
        return;
    }
    if let Err(problem) = live.monitor.begin(Command::Status {}).await {
        tracing::warn!(machine = actor.entry.name, %problem, "what it has after its reboot is not known");
    }
}

/// The monitor has answered a step, or says how the machine stands.
pub(super) async fn answered(actor: &mut Actor, id: u64, result: Result<Answer, MonitorError>) {
    let told = actor.shape.told.remove(&id);
    if let (Some(decided), Ok(Answer::DiskRates(_))) = (told.and_then(|told| told.rate_decided), &result) {
        actor.core.enforced.after(Limit::Iops, decided.elapsed());
    }
    let step = told.map(|told| told.number);
    let event = match (step, result) {
        (Some(step), Ok(Answer::Cpus(status))) => Event::Done(step, Report::Cpus(status)),
        (Some(step), Ok(Answer::Memory(status))) => Event::Done(step, Report::Memory(status)),
        (Some(step), Ok(Answer::DiskRates(rates))) => Event::Done(step, Report::Iops(rates.iops)),
        (Some(step), Ok(_)) => Event::Failed(step, "its monitor answered something unexpected".to_owned()),
        (Some(step), Err(MonitorError::Refused { message, .. })) => {
            Event::Failed(step, format!("its monitor refused: {message}"))
        }
        (Some(step), Err(problem)) => Event::Failed(step, problem.to_string()),
        (None, Ok(Answer::Status(status))) => {
            if let Some(cpus) = status.cpus {
                take_in(actor, Event::Cpus(cpus)).await;
            }
            match status.memory {
                Some(memory) => Event::Memory(memory),
                None => return,
            }
        }
        (None, _) => return,
    };
    take_in(actor, event).await;
}

/// Takes a step. The host's answer is there at once; a monitor's comes as a notice, a guest's as an ask.
async fn take_step(actor: &mut Actor, number: u64, step: Step, decided: Instant) -> Option<Event> {
    let rate_decided = matches!(step, Step::SetIops(_)).then_some(decided);
    let command = match step {
        Step::SetQuota { .. }
        | Step::SetRates(_)
        | Step::SetTier { .. }
        | Step::SetWall(_)
        | Step::Place(_) => {
            return Some(match host_step(actor, step, decided).await {
                Ok(report) => Event::Done(number, report),
                Err(problem) => Event::Failed(number, problem.message),
            });
        }
        Step::GuestCpus(online) => {
            ask_guest(actor, number, GuestRequest::Cpus { online });
            return None;
        }
        Step::GuestMemory => {
            ask_guest(actor, number, GuestRequest::MemoryOnline {});
            return None;
        }
        Step::SetIops(iops) => {
            iomax::make_room(&actor.core, &actor.entry, iops);
            Command::SetDiskRates(DiskRates { iops, bytes_per_sec: 0 })
        }
        Step::PrepareCpus(count) => Command::PrepareCpus { count },
        Step::SetCpus(count) => Command::SetCpus { count },
        Step::SetPlugged(bytes) => Command::SetPlugged { bytes },
        Step::SetBalloon(bytes) => Command::SetBalloon { bytes },
    };
    let Some(live) = actor.live() else {
        return Some(Event::Failed(number, "its monitor is gone".to_owned()));
    };
    match live.monitor.begin(command).await {
        Ok(id) => {
            actor.shape.told.insert(id, Told { number, rate_decided });
            None
        }
        Err(problem) => Some(Event::Failed(number, problem.to_string())),
    }
}

fn ask_guest(actor: &Actor, number: u64, request: GuestRequest) {
    let socket = actor.core.config.socket_dir(&actor.entry.name).join("vsock.sock");
    let asks = actor.entry.asks.clone();
    tokio::spawn(async move {
        let asked = async {
            let mut stream = guest::connect(&socket).await?;
            guest::tell(&mut stream, &request).await
        };
        let event = match tokio::time::timeout(GUEST_TIMEOUT, asked).await {
            Ok(Ok(())) => Event::Done(number, Report::Done),
            Ok(Err(cause)) => Event::GuestRefused(number, view::printable(&cause.to_string())),
            Err(_) => {
                let message = format!("its guest agent has not answered for {} s", GUEST_TIMEOUT.as_secs());
                Event::GuestRefused(number, message)
            }
        };
        // The machine may be gone meanwhile.
        let _ = asks.send(Ask::Shape(event)).await;
    });
}

async fn host_step(actor: &mut Actor, step: Step, decided: Instant) -> Result<Report, Problem> {
    let tree = actor.live().and_then(|live| live.launched.tree.clone());
    match step {
        Step::SetQuota { cpu_milli, vcpus } => {
            if let Some(tree) = &tree {
                limit_cpu(actor, tree, (cpu_milli, vcpus), decided)?;
            }
            Ok(Report::Done)
        }
        Step::SetRates(rate) => {
            let net = actor.entry.with(|shared| shared.record.net.clone());
            if let (Some(ports), Some(net)) = (&actor.core.ports, net) {
                let port = actor.entry.with(|shared| shared.port);
                let wanted = Some(rate).filter(|rate| *rate != 0);
                if (port.to_guest, port.from_guest) != (wanted, wanted) {
                    let limited = ports.limit(&net.tap, rate).await?;
                    let took = limited.since.saturating_duration_since(decided);
                    actor.core.enforced.after(Limit::Net, took);
                    actor.entry.with(|shared| shared.port = limited.state);
                }
            }
            Ok(Report::Done)
        }
        Step::SetTier { tier, memory_bytes } => {
            let standing = match &tree {
                Some(tree) => {
                    actor.core.walls.set_tier(tree, tier)?;
                    actor.core.standings.enforce(tree, tier, memory_bytes)?
                }
                None => Standing { tier, memory_bytes, among_others: true },
            };
            Ok(Report::Standing(standing))
        }
        Step::SetWall(bytes) => match &tree {
            Some(tree) => set_wall(tree, bytes).map(Report::Wall),
            None => Ok(Report::Wall(bytes)),
        },
        Step::Place(tids) => {
            if let Some(tree) = &tree {
                launch::place(tree, &tids)?;
            }
            Ok(Report::Done)
        }
        Step::SetIops(_)
        | Step::PrepareCpus(_)
        | Step::SetCpus(_)
        | Step::GuestCpus(_)
        | Step::SetPlugged(_)
        | Step::SetBalloon(_)
        | Step::GuestMemory => Ok(Report::Done),
    }
}

/// Bytes charged that cannot be dropped: everything but page cache. A disk that is used without O_DIRECT fills the cgroup with cache, which
/// would otherwise keep its limit where it is for ever.
fn undroppable(memory: &MemoryUsage) -> u64 {
    let cache = memory.file.0.saturating_sub(memory.shmem.0);
    memory.current.0.saturating_sub(cache)
}

/// A limit that follows what is charged is a multiple of this, lest each page move it.
const GRAIN_BYTES: u64 = 2 << 20;
/// Room that such a limit leaves above what is charged: the monitor and the kernel for it go on allocating a little.
const ROOM_BYTES: u64 = 16 << 20;

/// Sets the limit of the machine's cgroup to this much guest memory and what a monitor needs besides. It falls no lower than what is
/// charged and cannot be dropped: a limit below that would kill.
fn set_wall(tree: &MachineTree, bytes: u64) -> Result<u64, Problem> {
    let failed =
        |cause| Problem::internal(format!("cannot limit memory of {}", tree.unit().display()), cause);
    let wanted = bytes.saturating_add(OVERHEAD_BYTES);
    let now = tree.memory().map_err(failed)?.max.map(|max| max.0);
    if now == Some(wanted) {
        return Ok(bytes);
    }
    let falls = now.is_none_or(|now| now > wanted);
    let charged = if falls { undroppable(&tree.usage().map_err(failed)?.memory) } else { 0 };
    let limit = limit_for(now, wanted, charged);
    if now != Some(limit) {
        let patch = MemoryPatch { max: Patch::Set(CgroupBytes(limit)), ..MemoryPatch::default() };
        tree.set_memory(&patch).map_err(failed)?;
    }
    Ok(limit.saturating_sub(OVERHEAD_BYTES))
}

/// The limit that comes nearest to what is wanted: downwards no further than what is charged and some room, for below that the kernel
/// would kill, and what is about to be given back is charged for a moment yet.
fn limit_for(now: Option<u64>, wanted: u64, charged: u64) -> u64 {
    if charged <= wanted {
        return wanted;
    }
    let least = charged.saturating_add(ROOM_BYTES).next_multiple_of(GRAIN_BYTES);
    now.map_or(least, |now| now.min(least))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_cache_does_not_hold_a_limit_up_but_shared_memory_does() {
        let bytes = CgroupBytes;
        let memory = MemoryUsage {
            current: bytes(500),
            anon: bytes(200),
            file: bytes(250),
            shmem: bytes(50),
            ..MemoryUsage::default()
        };
        assert_eq!(undroppable(&memory), 300);
        assert_eq!(limit_for(Some(900), 500, 400), 500, "what fits is set");
        assert_eq!(limit_for(Some(300), 500, 0), 500, "upwards at once");
        let mib = |count: u64| count << 20;
        assert_eq!(limit_for(Some(mib(512)), mib(128), mib(201)), mib(218), "never down to what is charged");
        assert_eq!(limit_for(None, mib(128), mib(201)), mib(218));
        assert_eq!(limit_for(Some(mib(210)), mib(128), mib(201)), mib(210), "nor up from where it is");
        let torn = MemoryUsage { current: bytes(100), ..memory };
        assert_eq!(undroppable(&torn), 0, "figures of two moments do not underflow");
    }
}
