//! A decision becomes a resize like any other: with a deadline, in the books, shown as an operation, and it can be cancelled.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;

use super::kept::Came;
use crate::api::wire::foresight::AskedBy;
use crate::api::wire::{ResizeOutcome, ResizeRequest, ResizeView};
use crate::foresight::Resource;
use crate::machines::actor::Ask;
use crate::machines::core::{Core, Entry};
use crate::machines::view;
use crate::problem::Problem;

/// Until an operation ends whatever is in force: a turn comes every few seconds, and what is late goes on in the background.
const DEADLINE: Duration = Duration::from_secs(30);
/// Beyond which its end is not waited for: the machine may be gone.
const PATIENCE: Duration = Duration::from_secs(40);

/// One resource of one machine that is to change.
pub struct Task {
    /// The decision.
    pub id: u64,
    /// Which.
    pub resource: Resource,
    /// From what it has, in its unit.
    pub from: u64,
    /// To this.
    pub to: u64,
}

/// While it lives, no other change of the machine is begun.
struct Doing(Arc<Entry>);

impl Drop for Doing {
    fn drop(&mut self) {
        self.0.sculpted(|sculpted| sculpted.doing = false);
    }
}

/// Carries them out, one after the other, in a task of its own: what grows first, and CPU before memory, which takes its time.
pub fn begin(core: &Arc<Core>, entry: Arc<Entry>, revision: u64, mut tasks: Vec<Task>) {
    tasks.sort_by_key(|task| (task.to < task.from, task.resource));
    entry.sculpted(|sculpted| sculpted.doing = true);
    let (core, doing) = (Arc::clone(core), Doing(entry));
    tokio::spawn(async move {
        let mut revision = revision;
        for task in tasks {
            let (came, operation) = match resize(&doing.0, &task, revision).await {
                Ok(view) => {
                    revision = view.revision;
                    (came(&view), Some(view.operation))
                }
                Err(problem) => (Came::Refused(problem.message), None),
            };
            if !came.reason().is_empty() {
                let (name, what) = (&doing.0.name, task.resource.word());
                tracing::info!(
                    machine = name,
                    resource = what,
                    outcome = came.word(),
                    "{what} of {name} was sculpted {}: {}",
                    came.word(),
                    came.reason()
                );
            }
            core.sculpting.count(task.resource, &came);
            let now_msec = core.now_msec();
            doing.0.sculpted(|sculpted| sculpted.ended(now_msec, task.id, task.resource, came, operation));
        }
    });
}

fn came(view: &ResizeView) -> Came {
    match view.outcome {
        ResizeOutcome::Applied | ResizeOutcome::Unchanged => Came::Applied,
        ResizeOutcome::Failed => Came::Failed(view.reason.clone()),
        ResizeOutcome::Partial => Came::Partial(view.reason.clone()),
        ResizeOutcome::UnderWay => Came::Partial("it has not ended in time".to_owned()),
    }
}

async fn resize(entry: &Entry, task: &Task, revision: u64) -> Result<ResizeView, Problem> {
    let request = request(task);
    let (reply, result) = oneshot::channel();
    let gone = || super::super::gone(&entry.name);
    let asked = entry.asks.send(Ask::Resize(AskedBy::Sculptor, request, Some(revision), reply)).await;
    asked.map_err(|_| gone())?;
    let view = result.await.map_err(|_| gone())??;
    let Some((_, number)) = view::parse_operation_id(&view.operation) else { return Ok(view) };
    if view.outcome != ResizeOutcome::UnderWay {
        return Ok(view);
    }
    let mut ended = entry.ended.subscribe();
    let end = ended.wait_for(|last| *last >= number);
    // Where it has not ended by then, that is told.
    let _ = tokio::time::timeout(PATIENCE, end).await.is_ok();
    Ok(view::resized(entry, number, None))
}

fn request(task: &Task) -> ResizeRequest {
    let deadline_msec = u64::try_from(DEADLINE.as_millis()).ok();
    let mut request = ResizeRequest { deadline_msec, ..ResizeRequest::default() };
    let amount = match task.resource {
        Resource::Cpu => &mut request.cpu_milli,
        Resource::Memory => &mut request.memory_bytes,
        Resource::Net => &mut request.net_bit_per_sec,
        Resource::Iops => &mut request.iops,
    };
    *amount = Some(task.to);
    request
}
