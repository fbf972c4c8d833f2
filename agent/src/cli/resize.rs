//! `lathe resize`: asks for a change of shape, follows it, undoes and cancels it.

use std::time::{Duration, Instant};

use hyper::Method;
use lathe_shard::{BitRate, Bytes, Change, Iops, MEMORY_SHARD, MilliCpu, RATE_SHARD};

use crate::api::wire::{
    DeadlineAction, MachineView, OperationView, PlanView, ResizeOutcome, ResizeRequest, ResizeView, SCHEMA,
    Tier,
};
use crate::cli::args::{AtDeadline, Limit, ResizeArgs};
use crate::cli::client::Client;
use crate::cli::machine::{machine_path, print_plan};
use crate::cli::output::{self, print, print_json, say};
use crate::cli::{Verdict, exit};
use crate::problem::{Kind, Problem};

/// How long one request waits for the end before the way there is shown.
const FIRST_WAIT: Duration = Duration::from_secs(2);
/// How often an operation under way is looked at.
const POLL: Duration = Duration::from_millis(250);
/// Between two lines about the way there.
const PROGRESS: Duration = Duration::from_secs(2);

/// `now` changed as asked, in smallest units.
fn changed<T: Copy>(
    what: &str,
    change: Change<T>,
    now: u64,
    step: u64,
    value: impl Fn(&T) -> u64,
) -> Result<u64, Problem> {
    change.apply(now, step, value).ok_or_else(|| {
        Problem::new(
            Kind::BadRequest,
            "bad-amount",
            format!("{what}: the change leads below zero or beyond what can be counted"),
        )
    })
}

/// The same of a limit, where 0 is none: a change that leads to or from nothing would take a limit away, or leave it away.
pub(super) fn limited<T: Copy>(
    what: &str,
    limit: Limit<T>,
    now: u64,
    step: u64,
    value: impl Fn(&T) -> u64,
) -> Result<u64, Problem> {
    let Limit::Change(change) = limit else { return Ok(0) };
    let result = changed(what, change, now, step, value)?;
    if matches!(change, Change::To(_)) || (now != 0 && result != 0) {
        return Ok(result);
    }
    let message = if now == 0 {
        format!("{what}: it is unlimited, and there is nothing to change by an amount")
    } else {
        format!("{what}: the change leads to nothing, which would be unlimited")
    };
    Err(Problem::new(Kind::BadRequest, "bad-amount", message)
        .fix(format!("--{what} AMOUNT, or --{what} unlimited")))
}

fn resize_request(args: &ResizeArgs, now: &MachineView) -> Result<ResizeRequest, Problem> {
    let net = |limit| limited("net", limit, now.net.desired, RATE_SHARD.0, |rate: &BitRate| rate.0);
    let iops = |limit| limited("iops", limit, now.iops.desired, 1, |iops: &Iops| iops.0);
    let request = ResizeRequest {
        cpu_milli: args
            .cpu
            .map(|change| changed("cpu", change, now.cpu.desired, 1, |cpu: &MilliCpu| cpu.0))
            .transpose()?,
        memory_bytes: args
            .memory
            .map(|change| {
                changed("memory", change, now.memory.desired, MEMORY_SHARD.0, |bytes: &Bytes| bytes.0)
            })
            .transpose()?,
        net_bit_per_sec: args.net.map(net).transpose()?,
        iops: args.iops.map(iops).transpose()?,
        tier: args.tier.map(Into::into),
        ..ResizeRequest::default()
    };
    if request == ResizeRequest::default() && !args.undo {
        return Err(Problem::new(
            Kind::BadRequest,
            "usage",
            "nothing to change: none of --cpu --memory --net --iops --tier is given",
        )
        .fix(format!("lathe resize {} --cpu +0.5", args.name)));
    }
    let msec = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    Ok(ResizeRequest {
        for_sec: args.r#for.map(|duration| duration.as_secs()),
        undo: args.undo,
        deadline_msec: args.deadline.map(msec),
        deadline_action: match args.deadline_action {
            AtDeadline::Keep => DeadlineAction::Keep,
            AtDeadline::Revert => DeadlineAction::Revert,
        },
        wait_msec: Some(msec(args.wait.map_or(FIRST_WAIT, |wait| wait.min(FIRST_WAIT)))),
        ..request
    })
}

/// `lathe resize`.
pub async fn resize(client: &Client, json: bool, args: &ResizeArgs) -> Verdict {
    let begun = Instant::now();
    let path = machine_path(&args.name)?;
    let now: MachineView = client.get(&path).await?;
    if args.cancel {
        return cancel(client, json, &now).await;
    }
    let request = resize_request(args, &now)?;
    // A relative change holds only for the amounts that it was computed from.
    let relative = [
        args.cpu.is_some_and(|change| !matches!(change, Change::To(_))),
        args.memory.is_some_and(|change| !matches!(change, Change::To(_))),
    ];
    let relative_limit = matches!(args.net, Some(Limit::Change(change)) if !matches!(change, Change::To(_)))
        || matches!(args.iops, Some(Limit::Change(change)) if !matches!(change, Change::To(_)));
    let if_match =
        args.if_revision.or_else(|| (relative.contains(&true) || relative_limit).then_some(now.revision));
    if args.plan {
        let plan: PlanView =
            client.send(Method::PATCH, &format!("{path}?plan=true"), &request, if_match).await?;
        let verdict = print_plan(&plan, json, args.exit_code)?;
        if !json && !plan.steps.is_empty() {
            print(&format!("Apply exactly this: {}\n", apply_line(&args.name, &request, plan.revision)));
        }
        return Ok(verdict);
    }
    let view: ResizeView = client.send(Method::PATCH, &path, &request, if_match).await?;
    let view = follow(client, &path, view, args.wait.map(|wait| begun + wait), json).await?;
    if json {
        print_json(&view)?;
    } else {
        print(&resize_text(&request, &now, &view));
    }
    Ok(match view.outcome {
        ResizeOutcome::Unchanged | ResizeOutcome::Applied => exit::DONE,
        ResizeOutcome::Partial | ResizeOutcome::UnderWay => exit::CONVERGING,
        ResizeOutcome::Failed => exit::FAILED,
    })
}

/// Waits for the end of what is under way, or for `until`, and says from time to time how it stands.
async fn follow(
    client: &Client,
    path: &str,
    mut view: ResizeView,
    until: Option<Instant>,
    json: bool,
) -> Result<ResizeView, Problem> {
    let mut told = (Instant::now(), String::new());
    while view.outcome == ResizeOutcome::UnderWay && until.is_none_or(|until| Instant::now() < until) {
        tokio::time::sleep(POLL).await;
        let operation: OperationView = client.get(&format!("/v1/operations/{}", view.operation)).await?;
        let machine: MachineView = client.get(path).await?;
        if !json && operation.outcome == ResizeOutcome::UnderWay && told.0.elapsed() >= PROGRESS {
            let (cpu, memory) = (MilliCpu(machine.cpu.actual), Bytes(machine.memory.actual));
            let line = format!("{}   {cpu} cpu, {memory}   {}", view.name, operation.reason);
            if line != told.1 {
                say(&line);
            }
            told = (Instant::now(), line);
        }
        view = resized(operation, machine);
    }
    Ok(view)
}

fn resized(operation: OperationView, machine: MachineView) -> ResizeView {
    let ended = operation.ended_unix_msec.unwrap_or_else(output::unix_msec);
    ResizeView {
        schema: SCHEMA,
        operation: operation.operation,
        outcome: operation.outcome,
        reason: operation.reason,
        took_usec: ended.saturating_sub(operation.began_unix_msec).saturating_mul(1000),
        name: machine.name,
        state: machine.state,
        revision: machine.revision,
        cpu: machine.cpu,
        memory: machine.memory,
        net: machine.net,
        iops: machine.iops,
        tier: machine.tier,
        tier_actual: machine.tier_actual,
    }
}

/// `lathe resize --cancel`.
async fn cancel(client: &Client, json: bool, now: &MachineView) -> Verdict {
    let Some(operation) = &now.operation else {
        let message = format!("{} is not being resized", now.name);
        return Err(Problem::new(Kind::Conflict, "operation-ended", message)
            .fix(format!("lathe resize {} --undo", now.name)));
    };
    let cancelled: OperationView = client.delete(&format!("/v1/operations/{}", operation.operation)).await?;
    if json {
        print_json(&cancelled)?;
    } else {
        print(&format!(
            "{}   {} cancelled, back to {}\n",
            now.name,
            cancelled.operation,
            shape(&cancelled.from)
        ));
    }
    Ok(exit::DONE)
}

fn shape(shape: &crate::api::wire::ShapeView) -> String {
    format!("{} cpu, {}", MilliCpu(shape.cpu_milli), Bytes(shape.memory_bytes))
}

/// For `lathe show`: what is under way.
pub fn operation_line(operation: &OperationView) -> String {
    let when = match operation.deadline_unix_msec {
        Some(deadline) => {
            format!("ends within {} s", deadline.saturating_sub(output::unix_msec()).div_ceil(1000))
        }
        None => "in the background".to_owned(),
    };
    let why = if operation.reason.is_empty() { String::new() } else { format!("   {}", operation.reason) };
    format!("resize    {}   to {}   {when}{why}\n", operation.operation, shape(&operation.to))
}

fn apply_line(name: &str, request: &ResizeRequest, revision: u64) -> String {
    let mut line = format!("lathe resize {name}");
    if let Some(milli) = request.cpu_milli {
        line.push_str(&format!(" --cpu {}", MilliCpu(milli)));
    }
    if let Some(bytes) = request.memory_bytes {
        line.push_str(&format!(" --memory {bytes}"));
    }
    for (option, amount, unit) in [("net", request.net_bit_per_sec, "bit"), ("iops", request.iops, "iops")] {
        match amount {
            Some(0) => line.push_str(&format!(" --{option} unlimited")),
            Some(amount) => line.push_str(&format!(" --{option} {amount}{unit}")),
            None => {}
        }
    }
    if let Some(tier) = request.tier {
        line.push_str(&format!(" --tier {}", tier.word()));
    }
    format!("{line} --if-revision {revision}")
}

fn resize_text(request: &ResizeRequest, before: &MachineView, after: &ResizeView) -> String {
    let outcome = match after.outcome {
        ResizeOutcome::Unchanged => "unchanged",
        ResizeOutcome::Applied => "applied",
        ResizeOutcome::Partial => "partial",
        ResizeOutcome::Failed => "failed",
        ResizeOutcome::UnderWay => "under way",
    };
    let mut text = format!(
        "{}   {outcome} in {}   revision {}\n",
        after.name,
        output::took(after.took_usec),
        after.revision
    );
    let mut line =
        |label: &str, was: String, is: String| text.push_str(&format!("  {label:<8}{was} -> {is}\n"));
    if request.cpu_milli.is_some() || request.undo {
        line("cpu", MilliCpu(before.cpu.actual).to_string(), MilliCpu(after.cpu.actual).to_string());
    }
    if request.memory_bytes.is_some() || request.undo {
        line("memory", Bytes(before.memory.actual).to_string(), Bytes(after.memory.actual).to_string());
    }
    if request.net_bit_per_sec.is_some() || (request.undo && before.net.actual != after.net.actual) {
        line("net", output::rate(before.net.actual), output::rate(after.net.actual));
    }
    if request.iops.is_some() || (request.undo && before.iops.actual != after.iops.actual) {
        line("iops", output::iops(before.iops.actual), output::iops(after.iops.actual));
    }
    if request.tier.is_some() || (request.undo && before.tier_actual != after.tier_actual) {
        let word = |tier: Option<Tier>| tier.map_or("-", Tier::word).to_owned();
        line("tier", word(before.tier_actual), word(after.tier_actual));
    }
    if !after.reason.is_empty() {
        text.push_str(&format!("  why     {}\n", after.reason));
    }
    match after.outcome {
        ResizeOutcome::UnderWay => text.push_str(
            "  next    the wait is over, the operation is not: lathed goes on until its deadline, then in the background\n",
        ),
        ResizeOutcome::Partial => text.push_str("  next    it stays desired; lathe show says how far it is\n"),
        ResizeOutcome::Unchanged | ResizeOutcome::Applied | ResizeOutcome::Failed => return text,
    }
    text.push_str(&format!("  undo    lathe resize {} --undo\n", after.name));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_change_by_an_amount_takes_a_limit_away_or_makes_one() {
        let iops = |text: &str, now| {
            let limit = match text {
                "unlimited" => Limit::Unlimited,
                change => Limit::Change(change.parse().unwrap()),
            };
            limited("iops", limit, now, 1, |iops: &Iops| iops.0).map_err(|problem| problem.message)
        };
        assert_eq!(iops("300iops", 0), Ok(300));
        assert_eq!(iops("+10%", 300), Ok(330));
        assert_eq!(iops("unlimited", 300), Ok(0));
        assert!(iops("+10%", 0).is_err_and(|message| message.contains("it is unlimited")));
        assert!(iops("-300", 300).is_err_and(|message| message.contains("which would be unlimited")));
        assert!(iops("-301", 300).is_err_and(|message| message.contains("below zero")));
    }

    #[test]
    fn the_line_to_apply_a_plan_can_be_pasted() {
        let request =
            ResizeRequest { cpu_milli: Some(1500), net_bit_per_sec: Some(0), ..ResizeRequest::default() };
        assert_eq!(
            apply_line("demo", &request, 7),
            "lathe resize demo --cpu 1.50 --net unlimited --if-revision 7"
        );
        let request = ResizeRequest { tier: Some(Tier::Harvest), ..ResizeRequest::default() };
        assert_eq!(apply_line("demo", &request, 7), "lathe resize demo --tier harvest --if-revision 7");
    }
}
