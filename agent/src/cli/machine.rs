//! Verbs about machines: run, list, show, start, stop, rm, logs; [`super::resize`] has one of its own.

use std::path::Path;
use std::time::{Duration, Instant};

use http_body_util::BodyExt;
use hyper::Method;
use lathe_shard::{BitRate, Bytes, Iops, MilliCpu};

use crate::api::wire::{
    Amounts, Cores, DiskSource, MachineList, MachineState, MachineView, OnTrouble, PlanView, Removed,
    RunRequest, StopRequest, Tier, Upload,
};
use crate::cli::args::{ListArgs, LogsArgs, Net, RmArgs, RunArgs, SortBy, StopArgs};
use crate::cli::client::Client;
use crate::cli::output::{self, Table, print, print_json, say};
use crate::cli::{Verdict, exit};
use crate::problem::{Kind, Problem};

/// How often a condition is looked at while waiting.
const POLL: Duration = Duration::from_millis(100);
/// Seconds to wait for the built-in guest's agent unless told otherwise.
const BUILT_IN_GUEST_WAIT_SEC: u32 = 60;

pub(super) fn machine_path(name: &str) -> Result<String, Problem> {
    let fine = !name.is_empty()
        && name.len() <= 64
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
    if fine {
        return Ok(format!("/v1/machines/{name}"));
    }
    Err(Problem::new(Kind::BadRequest, "bad-name", format!("`{name}` cannot be the name of a machine"))
        .detail("names have 1 to 28 of a-z 0-9 -, beginning with a letter"))
}

/// The uploads of one request: those that no machine is made from in the end are thrown away again.
pub(super) struct Uploads<'a> {
    client: &'a Client,
    ids: Vec<String>,
}

impl<'a> Uploads<'a> {
    pub(super) fn new(client: &'a Client) -> Self {
        Self { client, ids: Vec::new() }
    }

    async fn send(&mut self, file: &Path) -> Result<String, Problem> {
        let upload: Upload = self.client.upload("/v1/uploads", file).await?;
        self.ids.push(upload.id.clone());
        Ok(upload.id)
    }

    async fn send_if_any(&mut self, file: Option<&Path>) -> Result<Option<String>, Problem> {
        match file {
            Some(file) => self.send(file).await.map(Some),
            None => Ok(None),
        }
    }

    pub(super) async fn discard(self) {
        for id in self.ids {
            // What cannot be removed now, or is no more, lathed removes by age.
            let _: Result<Removed, Problem> = self.client.delete(&format!("/v1/uploads/{id}")).await;
        }
    }
}

/// `FILE|in-place:PATH[,ro]`.
pub(super) async fn disk(uploads: &mut Uploads<'_>, text: &str) -> Result<DiskSource, Problem> {
    if let Some(path) = text.strip_prefix("in-place:") {
        let (path, read_only) = path.strip_suffix(",ro").map_or((path, false), |path| (path, true));
        return Ok(DiskSource::Path { path: path.to_owned(), read_only });
    }
    Ok(DiskSource::Upload { id: uploads.send(Path::new(text)).await? })
}

/// What can be known to be wrong before anything is uploaded is refused here; the rest is lathed's to judge.
async fn run_request(uploads: &mut Uploads<'_>, args: &RunArgs) -> Result<RunRequest, Problem> {
    machine_path(&args.name)?;
    let mut disks = Vec::new();
    for text in &args.disk {
        disks.push(disk(uploads, text).await?);
    }
    Ok(RunRequest {
        name: args.name.clone(),
        cpu_milli: args.cpu.now.0,
        cpu_max_milli: args.cpu_max.or(args.cpu.max).map(|MilliCpu(milli)| milli),
        vcpus: args.vcpus,
        memory_bytes: args.memory.now.0,
        memory_max_bytes: args.memory_max.or(args.memory.max).map(|Bytes(bytes)| bytes),
        net_bit_per_sec: match args.net {
            Some(Net::Rate(rate)) => Some(rate.0),
            _ => None,
        },
        net: args.net != Some(Net::None),
        iops: args.iops.map(|Iops(iops)| iops),
        tier: args.tier.into(),
        cores: args.cores.into(),
        image: args.image.clone(),
        kernel: uploads.send_if_any(args.kernel.as_deref()).await?,
        initrd: uploads.send_if_any(args.initrd.as_deref()).await?,
        disks,
        disk_size_bytes: args.disk_size.map(|Bytes(bytes)| bytes),
        cmdline: args.cmdline.clone(),
        restart: args.restart.into(),
        on_panic: args.on_panic.into(),
        watchdog: args.watchdog.map(Into::into),
        autostart: args.autostart,
        cpu_min_milli: args.growth.cpu_min.map(|MilliCpu(milli)| milli),
        memory_min_bytes: args.growth.memory_min.map(|Bytes(bytes)| bytes),
        foresight: args.growth.foresight.map(Into::into),
        aggressiveness_permille: args.growth.aggressiveness.map(u64::from),
    })
}

/// What lathed answers to a request for a machine.
enum Asked {
    Plan(PlanView),
    Machine(RunRequest, Box<MachineView>),
}

async fn ask_for_machine(uploads: &mut Uploads<'_>, args: &RunArgs) -> Result<Asked, Problem> {
    let client = uploads.client;
    let request = run_request(uploads, args).await?;
    if args.plan {
        let plan = client.send(Method::POST, "/v1/machines?plan=true", &request, None).await?;
        return Ok(Asked::Plan(plan));
    }
    let view = client.send(Method::POST, "/v1/machines", &request, None).await?;
    Ok(Asked::Machine(request, Box::new(view)))
}

/// `lathe run`.
pub async fn run(client: &Client, json: bool, args: Box<RunArgs>) -> Verdict {
    let begun = Instant::now();
    let mut uploads = Uploads::new(client);
    let asked = ask_for_machine(&mut uploads, &args).await;
    let (request, mut view) = match asked {
        Ok(Asked::Machine(request, view)) => (request, view),
        Ok(Asked::Plan(plan)) => {
            uploads.discard().await;
            return print_plan(&plan, json, args.exit_code);
        }
        Err(problem) => {
            uploads.discard().await;
            return Err(problem);
        }
    };
    let built_in = request.image.is_none()
        && request.kernel.is_none()
        && request.initrd.is_none()
        && request.disks.is_empty();
    let wait = args.wait.unwrap_or(if built_in { BUILT_IN_GUEST_WAIT_SEC } else { 0 });
    if !json {
        print(&format!("{}  {}\n", view.name, view.source));
        let unit = if view.unit.is_empty() {
            format!("pid {}", view.pid.unwrap_or_default())
        } else {
            format!("unit {}", view.unit)
        };
        print(&format!("{}  {unit}   running after {} ms\n", view.name, begun.elapsed().as_millis()));
    }
    let deadline = begun + Duration::from_secs(u64::from(wait));
    while wait > 0 && !view.guest_agent && view.state == MachineState::Running && Instant::now() < deadline {
        tokio::time::sleep(POLL).await;
        view = client.get(&machine_path(&args.name)?).await?;
    }
    let verdict = if wait > 0 && !view.guest_agent { exit::CONVERGING } else { exit::DONE };
    if json {
        print_json(&view)?;
        return Ok(verdict);
    }
    if view.state != MachineState::Running {
        return Err(Problem::new(
            Kind::Internal,
            "machine-ended",
            format!("{} is {}: {}", view.name, output::state(view.state), view.reason),
        )
        .fix(format!("lathe logs {}", view.name)));
    }
    let ready = if view.guest_agent {
        format!("READY in {}.{} s", begun.elapsed().as_secs(), begun.elapsed().subsec_millis() / 100)
    } else if wait > 0 {
        format!("its guest agent has not answered after {wait} s; see: lathe logs {}", view.name)
    } else {
        "no waiting for a guest agent".to_owned()
    };
    print(&format!(
        "{}  {}{ready}\n",
        view.name,
        view.addresses.first().map(|a| format!("{a}   ")).unwrap_or_default()
    ));
    say(&format!(
        "Run something inside: lathe exec {0} -- uname -a     Resize: lathe resize {0} --cpu {1}",
        view.name,
        MilliCpu(view.cpu.desired * 2)
    ));
    Ok(verdict)
}

/// `lathe list`.
pub async fn list(client: &Client, json: bool, args: &ListArgs) -> Verdict {
    let mut list: MachineList = client.get("/v1/machines").await?;
    let key = |view: &MachineView| match args.sort {
        SortBy::Name => 0,
        SortBy::CpuGranted => view.cpu.granted,
        SortBy::CpuUsed => view.cpu.used,
        SortBy::MemoryGranted => view.memory.granted,
        SortBy::MemoryUsed => view.memory.used,
    };
    list.machines.sort_by_key(|view| std::cmp::Reverse(key(view)));
    if json {
        print_json(&list)?;
    } else if args.quiet {
        print(&list.machines.iter().map(|view| format!("{}\n", view.name)).collect::<String>());
    } else if list.machines.is_empty() {
        say("No machines yet. Make one from this host's own kernel: lathe run demo");
    } else {
        print(&list_table(&list.machines));
    }
    Ok(exit::DONE)
}

fn list_table(machines: &[MachineView]) -> String {
    // Most hosts limit no disks.
    let iops = machines.iter().any(|view| view.iops.desired > 0 || view.iops.actual > 0);
    let mut titles = vec!["NAME", "STATE", "CPU used/grant", "MEMORY used/grant", "NET"];
    titles.extend(iops.then_some("IOPS"));
    let tiers = machines.iter().any(|view| view.tier != Tier::Standard);
    titles.extend(tiers.then_some("TIER"));
    titles.extend(["VCPUS", "ADDRESS", "UP"]);
    let mut table = Table::new(&titles);
    for view in machines {
        let mut row = vec![
            view.name.clone(),
            output::state(view.state).to_owned(),
            output::cpu_cell(&view.cpu),
            output::memory_cell(&view.memory),
            if view.mac.is_empty() { String::new() } else { output::rate(view.net.granted) },
        ];
        let limited = Some(view.iops.granted).filter(|iops| *iops > 0);
        row.extend(iops.then(|| limited.map(|iops| iops.to_string()).unwrap_or_default()));
        row.extend(tiers.then(|| view.tier.word().to_owned()));
        row.extend([
            view.vcpus.to_string(),
            view.addresses.first().cloned().unwrap_or_default(),
            view.uptime_sec.map(output::duration).unwrap_or_default(),
        ]);
        table.row(row);
    }
    table.render()
}

/// `lathe show`.
pub async fn show(client: &Client, json: bool, name: &str) -> Verdict {
    let view: MachineView = client.get(&machine_path(name)?).await?;
    if json {
        print_json(&view)?;
        return Ok(exit::DONE);
    }
    let disks = super::disk::line(client, name).await?;
    let nics = super::nic::line(client, name).await?;
    print(&format!("{}{disks}{nics}", show_text(&view)));
    Ok(exit::DONE)
}

fn show_text(view: &MachineView) -> String {
    let reason = if view.reason.is_empty() { String::new() } else { format!("   {}", view.reason) };
    let up = view.uptime_sec.map(|up| format!("   up {}", output::duration(up))).unwrap_or_default();
    let mut text =
        format!("{}   {}{reason}{up}   revision {}\n", view.name, output::state(view.state), view.revision);
    let mut table = Table::new(&["", "desired", "granted", "actual", "used"]);
    let mut row = |label: &str, amounts: &Amounts, show: &dyn Fn(u64) -> String| {
        // A limit of 0 is none; nothing used is 0.
        let used = if label == "iops" { amounts.used.to_string() } else { show(amounts.used) };
        let cells = [amounts.desired, amounts.granted, amounts.actual].map(show);
        table.row([vec![label.to_owned()], cells.to_vec(), vec![used]].concat());
    };
    row("cpu", &view.cpu, &|milli| MilliCpu(milli).to_string());
    row("memory", &view.memory, &|bytes| Bytes(bytes).to_string());
    if !view.mac.is_empty() {
        let used = view.net.used;
        row("net", &view.net, &|bits| {
            if bits == used && bits == 0 { BitRate(0).to_string() } else { output::rate(bits) }
        });
    }
    if view.iops.desired > 0 || view.iops.actual > 0 || view.disk_operations > 0 {
        row("iops", &view.iops, &output::iops);
    }
    text.push_str(&table.render());
    text.push_str(&delivered_lines(view));
    text.push_str(&super::forecast::said::wanted(&view.wanted));
    text.push_str(&tier_line(view));
    text.push_str(&cores_line(view));
    text.push_str(&future_line(view));
    text.push_str(&format!("source    {}\n", view.source));
    text.push_str(&format!(
        "vcpus     {}   held back {} in all\n",
        view.vcpus,
        output::took(view.cpu_throttled_usec)
    ));
    if !view.mac.is_empty() {
        text.push_str(&format!("network   {}   mac {}\n", view.addresses.join(", "), view.mac));
    }
    if let Some(operation) = &view.operation {
        text.push_str(&super::resize::operation_line(operation));
    }
    text.push_str(&back_line(view, output::unix_msec()));
    let agent = if view.guest_agent { "answers" } else { "does not answer" };
    let restart = format!("{:?}", view.restart).to_lowercase().replace("onfailure", "on-failure");
    text.push_str(&format!(
        "guest     agent {agent}   restart {restart}   autostart {}   restarts {}\n",
        if view.autostart { "yes" } else { "no" },
        view.restarts
    ));
    if view.on_panic != OnTrouble::Report || view.watchdog.is_some() {
        let word = |action: OnTrouble| format!("{action:?}").to_lowercase();
        let watchdog = view.watchdog.map_or("none".to_owned(), word);
        text.push_str(&format!("trouble   on panic {}   watchdog {watchdog}\n", word(view.on_panic)));
    }
    if let Some(pid) = view.pid {
        text.push_str(&format!("monitor   pid {pid}   {}\n", view.unit));
    }
    text
}

/// Until when it has what it was given for a time.
fn back_line(view: &MachineView, now_unix_msec: u64) -> String {
    let Some(at) = view.back_unix_msec else { return String::new() };
    match at.saturating_sub(now_unix_msec).div_ceil(1000) {
        0 => "back      now: what was asked for a time is over\n".to_owned(),
        left => format!("back      in {}: what was asked for a time is over then\n", output::duration(left)),
    }
}

/// Its tier, and what is in force where that is another.
fn tier_line(view: &MachineView) -> String {
    let running = view.uptime_sec.is_some();
    let but = match view.tier_actual {
        Some(actual) if actual != view.tier => format!("   {} is in force", actual.word()),
        None if running => "   not in force among other machines".to_owned(),
        _ => String::new(),
    };
    format!("tier      {}{but}\n", view.tier.word())
}

/// What is done about its future, and how small or large it may become of it.
fn future_line(view: &MachineView) -> String {
    let bounds = |least: Option<String>, most: Option<String>, what: &str| match (least, most) {
        (None, None) => String::new(),
        (Some(least), None) => format!("   {what} {least} or more"),
        (None, Some(most)) => format!("   {what} up to {most}"),
        (Some(least), Some(most)) => format!("   {what} {least} to {most}"),
    };
    let milli = |amount: Option<u64>| amount.map(|milli| MilliCpu(milli).to_string());
    let bytes = |amount: Option<u64>| amount.map(|bytes| Bytes(bytes).to_string());
    format!(
        "future    {}{}{}\n",
        super::why::settings(&view.foresight),
        bounds(milli(view.cpu_min_milli), milli(view.cpu_max_milli), "cpu"),
        bounds(bytes(view.memory_min_bytes), bytes(view.memory_max_bytes), "memory")
    )
}

/// The cores that it has to itself, and what there is to say of where it runs.
fn cores_line(view: &MachineView) -> String {
    let cpus = &view.cpus;
    match (cpus.cores, &cpus.actual, cpus.problem.as_str()) {
        (Cores::Shared, _, "") => String::new(),
        (cores, _, problem) if !problem.is_empty() => format!("cores     {}   but {problem}\n", cores.word()),
        (cores, Some(actual), _) => format!("cores     {}   CPUs {actual} of the host\n", cores.word()),
        (cores, None, _) => format!("cores     {}\n", cores.word()),
    }
}

/// A line for each resource that it asked for lately, and one for what it stood waiting for.
fn delivered_lines(view: &MachineView) -> String {
    let delivered = &view.delivered;
    let mut text = String::new();
    let resources = [
        ("cpu", &delivered.cpu),
        ("net to guest", &delivered.net_to_guest),
        ("net from guest", &delivered.net_from_guest),
    ];
    for (resource, windows) in resources {
        let Some(windows) = windows else { continue };
        let shares = [windows.sec_1, windows.sec_10, windows.sec_60].map(|share| share.permille);
        if shares.iter().all(Option::is_none) {
            continue;
        }
        let [second, ten, minute] = shares.map(output::permille);
        text.push_str(&format!(
            "delivered {resource} {second} of what it asked for in 1 s, {ten} in 10 s, {minute} in 1 min\n"
        ));
    }
    let stalls = [
        ("cpu", view.stalls.cpu_centipercent),
        ("memory", view.stalls.memory_centipercent),
        ("io", view.stalls.io_centipercent),
    ];
    let known: Vec<_> = stalls
        .iter()
        .filter_map(|(what, share)| share.map(|share| format!("{what} {}", output::centipercent(share))))
        .collect();
    if !known.is_empty() {
        text.push_str(&format!("stalled   {} of the last 10 s\n", known.join("   ")));
    }
    text
}

pub(super) fn print_plan(plan: &PlanView, json: bool, exit_code: bool) -> Verdict {
    if json {
        print_json(plan)?;
    } else if plan.steps.is_empty() {
        print(&format!("{}   nothing to do   revision {}\n", plan.name, plan.revision));
    } else {
        print(&plan_text(plan));
    }
    Ok(if exit_code && !plan.steps.is_empty() { exit::CHANGES } else { exit::DONE })
}

/// A tier by its number in plans.
fn tier_of(rank: u64) -> String {
    let tier = Tier::ALL.into_iter().find(|tier| tier.rank() == rank);
    tier.map_or_else(|| rank.to_string(), |tier| tier.word().to_owned())
}

fn plan_text(plan: &PlanView) -> String {
    let mut text = format!("{}   revision {}\n", plan.name, plan.revision);
    for step in &plan.steps {
        let show = |amount: u64| match step.resource.as_str() {
            "cpu" => MilliCpu(amount).to_string(),
            "memory" | "disk" => Bytes(amount).to_string(),
            "net" => output::rate(amount),
            "iops" => output::iops(amount),
            "tier" => tier_of(amount),
            _ => amount.to_string(),
        };
        let amounts = if step.resource == "machine" {
            String::new()
        } else {
            format!("{} -> {}", show(step.from), show(step.to))
        };
        text.push_str(&format!("  {:<8} {amounts:<22} {}\n", step.resource, step.how));
    }
    let after = &plan.host_after;
    text.push_str(&format!(
        "host after: cpu {} of {} granted, memory {} of {}{}\n",
        MilliCpu(after.cpu.granted),
        MilliCpu(after.cpu.capacity.saturating_sub(after.cpu.reserved)),
        Bytes(after.memory.granted),
        Bytes(after.memory.capacity.saturating_sub(after.memory.reserved)),
        after.net.map(uplink_after).unwrap_or_default()
    ));
    text
}

fn uplink_after(net: crate::api::wire::HostAmounts) -> String {
    let most = BitRate(net.capacity.saturating_sub(net.reserved));
    format!(", uplink {} of {most}", BitRate(net.granted))
}

/// `lathe start`, `lathe pause`, `lathe resume`: what has nothing to say but the machine's name.
pub async fn change(client: &Client, json: bool, name: &str, verb: &str) -> Verdict {
    let path = format!("{}/{verb}", machine_path(name)?);
    let view: MachineView = client.send(Method::POST, &path, &serde_json::json!({}), None).await?;
    print_state(&view, json)
}

fn print_state(view: &MachineView, json: bool) -> Verdict {
    if json {
        print_json(view)?;
    } else {
        let reason = if view.reason.is_empty() { String::new() } else { format!("   {}", view.reason) };
        print(&format!("{}   {}{reason}\n", view.name, output::state(view.state)));
    }
    Ok(exit::DONE)
}

/// `lathe stop`.
pub async fn stop(client: &Client, json: bool, args: &StopArgs) -> Verdict {
    let path = machine_path(&args.name)?;
    if args.plan {
        let view: MachineView = client.get(&path).await?;
        let how = match view.state {
            MachineState::Stopped | MachineState::Failed => "nothing to do".to_owned(),
            _ if args.force => "cut the power at once".to_owned(),
            _ => format!("press the power button, wait up to {} s, then cut the power", args.timeout),
        };
        print(&format!("{}   {how}\n", view.name));
        return Ok(exit::DONE);
    }
    let request = StopRequest { timeout_sec: args.timeout, force: args.force };
    let view: MachineView = client.send(Method::POST, &format!("{path}/stop"), &request, None).await?;
    print_state(&view, json)
}

/// `lathe rm`.
pub async fn remove(client: &Client, json: bool, args: &RmArgs) -> Verdict {
    let path = machine_path(&args.name)?;
    if args.plan {
        let view: MachineView = client.get(&path).await?;
        let data = if args.purge { "delete its private disks" } else { "keep its private disks' data" };
        let power = if matches!(view.state, MachineState::Running | MachineState::Paused) {
            if args.force { "cut its power, " } else { "refuse, because it runs (--force); else " }
        } else {
            ""
        };
        print(&format!("{}   {power}remove it from the books, give back its addresses, {data}\n", view.name));
        return Ok(exit::DONE);
    }
    let removed: Removed =
        client.delete(&format!("{path}?purge={}&force={}", args.purge, args.force)).await?;
    if json {
        print_json(&removed)?;
    } else {
        let kept = removed.kept.map(|kept| format!("   data kept in {kept}")).unwrap_or_default();
        print(&format!("{}   removed{kept}\n", removed.name));
    }
    Ok(exit::DONE)
}

/// `lathe logs`.
pub async fn logs(client: &Client, args: &LogsArgs) -> Verdict {
    let path = format!("{}/logs?lines={}&follow={}", machine_path(&args.name)?, args.lines, args.follow);
    let mut body = client.stream(&path).await?;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| Problem::internal("the log broke off", error))?;
        if let Some(data) = frame.data_ref() {
            print(&String::from_utf8_lossy(data));
        }
    }
    Ok(exit::DONE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::tests::fake;

    #[test]
    fn what_was_delivered_is_told_where_something_was_asked_for() {
        let view = fake::machine("web");
        let expected = "\
delivered cpu 100.0 % of what it asked for in 1 s, 99.8 % in 10 s, 99.8 % in 1 min
delivered net to guest - of what it asked for in 1 s, 100.0 % in 10 s, 100.0 % in 1 min
stalled   memory 0.1 % of the last 10 s
";
        assert_eq!(delivered_lines(&view), expected);
        assert!(show_text(&view).contains(expected));
        let silent = MachineView { delivered: Default::default(), stalls: Default::default(), ..view };
        assert_eq!(delivered_lines(&silent), "");
    }

    #[test]
    fn a_change_for_a_time_says_when_it_ends() {
        let back =
            |at: Option<u64>| back_line(&MachineView { back_unix_msec: at, ..fake::machine("web") }, 60_000);
        assert_eq!(back(None), "");
        assert_eq!(
            back(Some(60_000 + 2_520_000)),
            "back      in 42 min: what was asked for a time is over then\n"
        );
        assert_eq!(back(Some(60_001)), "back      in 1 s: what was asked for a time is over then\n");
        assert_eq!(back(Some(60_000)), "back      now: what was asked for a time is over\n");
        let given = MachineView { back_unix_msec: Some(u64::MAX), ..fake::machine("web") };
        assert!(show_text(&given).contains("\nback      in "));
    }

    #[test]
    fn names_that_would_change_the_path_are_refused() {
        assert!(machine_path("web-1").is_ok());
        for name in ["", "a/b", "..%2f", "a?b", "a b"] {
            assert!(machine_path(name).is_err(), "{name}");
        }
    }
}
