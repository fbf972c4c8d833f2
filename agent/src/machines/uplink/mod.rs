//! The host's uplink, shared between machines once somebody has asked for it: what is to be there, and that it stays so.
//!
//! ```text
//! lathe host uplink enable ─► books ─► stored (enabling, what was there) ─► HTB at the root ─► stored (enabled) ─► classes, marks
//!                    disable ─► stored (disabling) ─► what was there is put back, marks go ─► forgotten ─► books
//!
//! machine starts, stops, is resized, gets or loses a nic ─► follow ─► its class        its tap is made ─► join ─► class, then its mark
//! restart of lathed, each minute, each ten seconds while something fails ─► settle: device, classes, marks, all compared and mended
//! ```
//! **Before anything is changed it is stored**, with what was at the device's root: whenever lathed dies, the next one finds either nothing
//! to do, or an intent and what is needed to finish it. What was being enabled is completed, or put back where that fails; what was being
//! disabled is put back.
//!
//! **No machine fails for the uplink's sake**: what fails here is logged, shown by `lathe host uplink show` and tried again, and meanwhile the
//! machine's packets go in the host's class. What is *granted* is another matter: while the uplink is shared the books count the
//! network, and refuse what it does not have.
//!
//! | file | what |
//! |---|---|
//! | [`plan`] | which class has which rate, what may be replaced: pure |
//! | `change` | enable, disable |
//! | `show` | what is shown |

mod change;
pub mod plan;
mod show;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use lathe_netshape::RootQueue;
use tokio::time::{Instant, MissedTickBehavior, interval_at};

use self::plan::{Classes, Member};
use super::core::Core;
use super::record::Record;
use crate::network::uplinks::replaced_fix;
use crate::problem::{Kind, Problem};
use crate::store::Change;

/// Between two looks while something fails.
const RETRY: Duration = Duration::from_secs(10);
/// So many of them make a look when nothing does.
const LOOK_EVERY: u32 = 6;

/// What is stored of the uplink while it is shared, and while it is on its way there or back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// Its device.
    pub device: String,
    /// What it carries, bit/s.
    pub capacity_bit_per_sec: u64,
    /// What was at its root.
    pub before: RootQueue,
    /// How far it is.
    pub phase: Phase,
}

/// How far sharing is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// It begins: nobody was told that it is there.
    Enabling,
    /// It is there.
    Enabled,
    /// It ends.
    Disabling,
}

impl Phase {
    /// As it is stored.
    pub fn word(self) -> &'static str {
        match self {
            Self::Enabling => "enabling",
            Self::Enabled => "enabled",
            Self::Disabling => "disabling",
        }
    }

    /// What is stored as this word.
    pub fn of_word(word: &str) -> Option<Self> {
        [Self::Enabling, Self::Enabled, Self::Disabling].into_iter().find(|phase| phase.word() == word)
    }
}

/// What is known of the uplink now; whoever changes something of it holds its lock meanwhile.
#[derive(Clone, Default)]
pub struct Sharing {
    /// As stored.
    stored: Option<Stored>,
    /// Classes as they were set last.
    classes: Classes,
    /// Why not all is in force.
    problem: Option<Problem>,
    /// Machines whose packets go in the host's class, and why.
    unsorted: BTreeMap<String, String>,
}

impl Sharing {
    /// What is shared, while it is.
    fn shared(&self) -> Option<&Stored> {
        self.stored.as_ref().filter(|stored| stored.phase == Phase::Enabled)
    }
}

/// What the books count of a stored uplink: capacity and what is kept back, bit/s.
pub(super) fn booked(stored: Option<&Stored>) -> Option<(u64, u64)> {
    let capacity = stored?.capacity_bit_per_sec;
    Some((capacity, plan::reserved(capacity)))
}

/// Takes over what an earlier lathed has stored, and makes the device what it was to be; machines are not known yet.
pub(super) async fn begin(core: &Core, stored: Option<Stored>) {
    let mut sharing = core.uplink.lock().await;
    sharing.stored = stored;
    let done = go_on(core, &mut sharing).await;
    note(core, &mut sharing, done.err());
}

/// Looks again until lathed ends.
pub(super) async fn run(core: Arc<Core>) {
    let mut beat = interval_at(Instant::now() + RETRY, RETRY);
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    for round in 1_u32.. {
        beat.tick().await;
        let fails = {
            let sharing = core.uplink.lock().await;
            sharing.problem.is_some() || !sharing.unsorted.is_empty()
        };
        if fails || round.is_multiple_of(LOOK_EVERY) {
            look(&core).await;
        }
    }
}

/// Compares device, classes and marks with what they are to be, and mends what differs.
pub(super) async fn look(core: &Core) {
    let mut sharing = core.uplink.lock().await;
    settle(core, &mut sharing).await;
}

/// Machines have come, gone or changed: classes follow.
pub(super) async fn follow(core: &Core) {
    let mut sharing = core.uplink.lock().await;
    catch_up(core, &mut sharing).await;
}

/// A machine's taps have been made, and nothing has been sent yet: its class first, then its mark on them.
pub(super) async fn join(core: &Core, record: &Record, taps: Vec<String>) {
    let mut sharing = core.uplink.lock().await;
    catch_up(core, &mut sharing).await;
    mark(core, &mut sharing, &record.name, record.cid, &taps).await;
}

/// The machines that have a part, by context id.
fn members(core: &Core) -> Vec<Member> {
    let member = |record: &Record| Member {
        name: record.name.clone(),
        cid: record.cid,
        granted: record.held().net.0,
        open: record.all_nics().any(|nic| record.rate_of(nic) == 0),
        taps: record.all_nics().map(|nic| nic.tap.clone()).collect(),
    };
    let entries = core.entries();
    let known = entries.iter().filter_map(|entry| {
        entry.with(|shared| {
            let record = &shared.record;
            let has_part = record.life.holds_shards() && record.all_nics().next().is_some();
            has_part.then(|| member(record))
        })
    });
    let mut members: Vec<Member> = known.collect();
    members.sort_by_key(|member| member.cid);
    members
}

/// Goes on with what is stored, as far as the device goes.
async fn go_on(core: &Core, sharing: &mut Sharing) -> Result<(), Problem> {
    match sharing.stored.as_ref().map(|stored| stored.phase) {
        None => Ok(()),
        Some(Phase::Enabled) => secure(core, sharing).await,
        Some(Phase::Disabling) => put_back(core, sharing).await,
        Some(Phase::Enabling) => match secure(core, sharing).await {
            Ok(()) => Ok(()),
            Err(problem) => {
                tracing::error!(%problem, "the uplink cannot be shared as an earlier lathed was about to");
                put_back(core, sharing).await
            }
        },
    }
}

async fn settle(core: &Core, sharing: &mut Sharing) {
    let done = match go_on(core, sharing).await {
        Ok(()) => fill(core, sharing).await,
        Err(problem) => Err(problem),
    };
    note(core, sharing, done.err());
}

/// Makes the device what is stored: ours at the root, with this capacity.
async fn secure(core: &Core, sharing: &mut Sharing) -> Result<(), Problem> {
    let Some(mut stored) = sharing.stored.clone() else { return Ok(()) };
    if let Some(found) = core.uplinks.found(&stored.device).await? {
        if !plan::may_replace(stored.phase, &stored.before, &found) {
            return Err(replaced(&stored.device, &found));
        }
        sharing.classes.clear();
        if found != stored.before {
            stored.before = found;
            store(core, sharing, stored.clone()).await?;
        }
    }
    core.uplinks.enable(&stored.device, plan::spec(stored.capacity_bit_per_sec)).await?;
    if stored.phase == Phase::Enabled {
        return Ok(());
    }
    store(core, sharing, Stored { phase: Phase::Enabled, ..stored }).await
}

fn replaced(device: &str, found: &RootQueue) -> Problem {
    let message = format!("{device} is not shared any more: somebody has put {found} at its root");
    Problem::new(Kind::Conflict, "uplink-replaced", message).fix(replaced_fix(device))
}

/// Sets all classes, whatever there is, and removes those of machines that are gone.
async fn set_all(core: &Core, sharing: &mut Sharing) -> Result<(), Problem> {
    let Some(stored) = sharing.shared().cloned() else { return Ok(()) };
    let there: BTreeSet<_> = core.uplinks.read(&stored.device).await?.machines.into_keys().collect();
    let wanted = plan::classes(stored.capacity_bit_per_sec, &members(core));
    core.uplinks.apply(&stored.device, &plan::all_anew(&there, &wanted)).await?;
    sharing.classes = wanted;
    Ok(())
}

/// Sets all classes and marks all taps.
async fn fill(core: &Core, sharing: &mut Sharing) -> Result<(), Problem> {
    if sharing.shared().is_none() {
        return Ok(());
    }
    set_all(core, sharing).await?;
    sharing.unsorted.clear();
    let taps: BTreeSet<String> = match &core.ports {
        Some(ports) => ports.list().await?.into_iter().collect(),
        None => BTreeSet::new(),
    };
    for member in members(core) {
        let own: Vec<String> = member.taps.into_iter().filter(|tap| taps.contains(tap)).collect();
        mark(core, sharing, &member.name, member.cid, &own).await;
    }
    Ok(())
}

/// Sets and removes what differs from what was set last.
async fn catch_up(core: &Core, sharing: &mut Sharing) {
    let Some(stored) = sharing.shared().cloned() else { return };
    let members = members(core);
    sharing.unsorted.retain(|name, _| members.iter().any(|member| member.name == *name));
    let wanted = plan::classes(stored.capacity_bit_per_sec, &members);
    let changes = plan::changes(&sharing.classes, &wanted);
    if changes.is_empty() {
        return;
    }
    if core.uplinks.apply(&stored.device, &changes).await.is_ok() {
        sharing.classes = wanted;
        return;
    }
    // Some may have changed, or what another machine has just given back was not seen yet: all of them, then.
    if let Err(problem) = set_all(core, sharing).await {
        note(core, sharing, Some(problem));
    }
}

/// Marks what a machine sends, or notes why it is not sorted.
async fn mark(core: &Core, sharing: &mut Sharing, name: &str, cid: u32, taps: &[String]) {
    if sharing.shared().is_none() || taps.is_empty() {
        return;
    }
    let class = plan::class_of(cid);
    let mut why = match (class, &sharing.problem) {
        (Some(class), _) if sharing.classes.contains_key(&class) => None,
        (_, Some(problem)) => Some(format!("its class is not there: {}", problem.message)),
        (_, None) => Some("no class is left for it on the uplink".to_owned()),
    };
    for tap in taps {
        let Some(class) = class else { break };
        if let Err(problem) = core.uplinks.mark(tap, Some(class.mark())).await {
            why = Some(format!("what {tap} sends is not marked: {problem}"));
        }
    }
    match why {
        None => {
            sharing.unsorted.remove(name);
        }
        Some(why) => {
            tracing::warn!(machine = name, why, "a machine is not sorted on the uplink");
            sharing.unsorted.insert(name.to_owned(), why);
        }
    }
}

/// Puts back what was there and forgets it. What cannot be put back stays stored, and is tried again.
async fn put_back(core: &Core, sharing: &mut Sharing) -> Result<(), Problem> {
    let Some(stored) = sharing.stored.clone() else { return Ok(()) };
    if stored.phase != Phase::Disabling {
        store(core, sharing, Stored { phase: Phase::Disabling, ..stored.clone() }).await?;
    }
    match core.uplinks.disable(&stored.device, &stored.before).await {
        // A device that is gone has taken everything with it.
        Err(problem) if problem.code == "no-such-device" => {
            tracing::warn!(device = stored.device, "an uplink that was shared is gone");
        }
        done => done?,
    }
    unmark(core).await;
    core.store.apply(Change::Uplink(None)).await?;
    core.with_books(|books| books.set_net(None));
    *sharing = Sharing::default();
    core.tell("uplink-put-back", &stored.device, format!("{} is as it was before", stored.device));
    Ok(())
}

/// Marks go from all taps; one that stays marks for nobody.
async fn unmark(core: &Core) {
    let Some(ports) = &core.ports else { return };
    let taps = ports.list().await.unwrap_or_else(|problem| {
        tracing::warn!(%problem, "marks stay on taps");
        Vec::new()
    });
    for tap in taps {
        if let Err(problem) = core.uplinks.mark(&tap, None).await {
            tracing::warn!(tap, %problem, "a mark stays");
        }
    }
}

async fn store(core: &Core, sharing: &mut Sharing, stored: Stored) -> Result<(), Problem> {
    core.store.apply(Change::Uplink(Some(Box::new(stored.clone())))).await?;
    sharing.stored = Some(stored);
    Ok(())
}

/// Notes whether all is in force, and says so when that has changed.
fn note(core: &Core, sharing: &mut Sharing, problem: Option<Problem>) {
    let device = sharing.stored.as_ref().map(|stored| stored.device.clone()).unwrap_or_default();
    match (&sharing.problem, &problem) {
        (_, Some(now)) if sharing.problem.as_ref() != Some(now) => {
            core.tell("uplink-fails", &device, format!("the uplink is not as it should be: {now}"));
        }
        (Some(_), None) => core.tell("uplink-works", &device, "the uplink is as it should be again"),
        _ => {}
    }
    sharing.problem = problem;
}
