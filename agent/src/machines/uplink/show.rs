//! What is shown of the uplink: what is to be there beside what the kernel has.

use lathe_netshape::{ClassState, UplinkState};

use super::super::core::Core;
use super::plan::{self, Member};
use super::{Phase, Sharing, members};
use crate::api::wire::{SCHEMA, UplinkMachine, UplinkShare, UplinkView};

/// The uplink as it is now.
pub(super) async fn view(core: &Core, sharing: &Sharing) -> UplinkView {
    let mut view = UplinkView { schema: SCHEMA, ..UplinkView::default() };
    let Some(stored) = &sharing.stored else { return view };
    view.enabled = stored.phase != Phase::Disabling;
    view.device = stored.device.clone();
    view.capacity_bit_per_sec = stored.capacity_bit_per_sec;
    view.reserved_bit_per_sec = plan::reserved(stored.capacity_bit_per_sec);
    view.granted_bit_per_sec = core.with_books(|books| books.granted_net());
    view.before = stored.before.to_string();
    let read = core.uplinks.read(&stored.device).await;
    let problem = sharing.problem.as_ref().or(read.as_ref().err());
    if let Some(problem) = problem {
        (view.problem, view.fix) = (problem.message.clone(), problem.fix.clone());
    }
    let state = read.ok();
    view.host = state.as_ref().map(|state| share(&state.host));
    view.machines = members(core).iter().map(|member| machine(sharing, state.as_ref(), member)).collect();
    view.machines.sort_by(|one, other| one.machine.cmp(&other.machine));
    view
}

fn machine(sharing: &Sharing, state: Option<&UplinkState>, member: &Member) -> UplinkMachine {
    let class = member.class().and_then(|class| state?.machines.get(&class));
    let known = sharing.unsorted.get(&member.name).cloned();
    let problem = match class {
        None => known.unwrap_or_else(|| "it has no class: its packets go with the host's".to_owned()),
        Some(_) => known.unwrap_or_default(),
    };
    UplinkMachine { machine: member.name.clone(), share: class.map(share), problem }
}

fn share(class: &ClassState) -> UplinkShare {
    UplinkShare {
        rate_bit_per_sec: class.rate,
        ceil_bit_per_sec: class.ceil,
        sent_bytes: class.bytes,
        dropped_packets: class.drops,
        backlog_bytes: class.backlog_bytes,
    }
}
