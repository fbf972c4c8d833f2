//! Verbs about this host and its peers: host, peers, doctor, events.

use http_body_util::BodyExt;
use lathe_shard::{BitRate, Bytes, MilliCpu};

use crate::api::wire::foresight::ForesightMode;
use crate::api::wire::{
    DoctorReport, HostAmounts, HostView, PeerList, PeerView, Verdict as CheckVerdict, WorstDelivered,
};
use crate::cli::client::Client;
use crate::cli::output::{self, Table, print, print_json, say};
use crate::cli::{Verdict, exit};
use crate::problem::Problem;

/// `lathe host`.
pub async fn host(client: &Client, json: bool) -> Verdict {
    let view: HostView = client.get("/v1/host").await?;
    if json {
        print_json(&view)?;
    } else {
        print(&host_text(&view));
    }
    Ok(exit::DONE)
}

fn stalled(centipercent: Option<u32>) -> String {
    centipercent.map(output::centipercent).unwrap_or_default()
}

fn host_text(view: &HostView) -> String {
    let mut text = format!(
        "{}   {}   lathed {}   up {}\n",
        view.name,
        view.state,
        view.version,
        output::duration(view.uptime_sec)
    );
    let mut table =
        Table::new(&["RESOURCE", "CAPACITY", "RESERVED", "GRANTED", "USED", "FREE", "STALLED 10 s"]);
    let mut row = |label: &str, amounts: &HostAmounts, show: &dyn Fn(u64) -> String, stall: String| {
        let cells =
            [amounts.capacity, amounts.reserved, amounts.granted, amounts.used, amounts.free].map(show);
        table.row([vec![label.to_owned()], cells.to_vec(), vec![stall]].concat());
    };
    row("cpu", &view.resources.cpu, &|milli| MilliCpu(milli).to_string(), stalled(view.psi_cpu_centipercent));
    row(
        "memory",
        &view.resources.memory,
        &|bytes| Bytes(bytes).to_string(),
        stalled(view.psi_memory_centipercent),
    );
    row("disk", &view.resources.disk, &|bytes| Bytes(bytes).to_string(), stalled(view.psi_io_centipercent));
    if let Some(net) = &view.resources.net {
        row("uplink", net, &|rate| BitRate(rate).to_string(), String::new());
    }
    text.push_str(&table.render());
    text.push_str(&format!("{} machines. Peers alive: {}.\n", view.machines, view.peers_alive));
    text.push_str(&worst_line(&view.worst_delivered));
    text.push_str(&foresight_line(view));
    text
}

/// Whether machines are resized by themselves.
fn foresight_line(view: &HostView) -> String {
    let (all, sculpted) = (view.machines, view.machines_sculpted);
    match (view.foresight, sculpted) {
        (ForesightMode::Off, _) => "Foresight off: machines are not profiled.\n".to_owned(),
        (mode, 0) => format!("Foresight {}: no machine is resized by itself.\n", mode.word()),
        (mode, _) => {
            format!(
                "Foresight {}: {sculpted} of {all} machines are resized ahead of what they ask for.\n",
                mode.word()
            )
        }
    }
}

/// Who gets least of what it asks for.
fn worst_line(worst: &[WorstDelivered]) -> String {
    let of = |worst: &WorstDelivered| {
        format!("{} {} {}", worst.resource, worst.machine, output::permille(Some(worst.permille)))
    };
    match worst {
        [] => String::new(),
        worst => {
            let all: Vec<_> = worst.iter().map(of).collect();
            format!("Least delivered of what was asked for in 10 s: {}.\n", all.join(", "))
        }
    }
}

/// `lathe peers`.
pub async fn peers(client: &Client, json: bool) -> Verdict {
    let list: PeerList = client.get("/v1/peers").await?;
    if json {
        print_json(&list)?;
        return Ok(exit::DONE);
    }
    print(&peers_table(&list.peers));
    if list.cluster.is_empty() {
        say(
            "No cluster yet. Here: lathe cluster init     or, with a token of another host: lathe cluster join -",
        );
    } else if list.peers.len() < 2 {
        say("No peers yet. A token for another host: lathe cluster token");
    }
    Ok(exit::DONE)
}

fn peers_table(peers: &[PeerView]) -> String {
    let mut table = Table::new(&["NAME", "ADDRESS", "STATE", "RTT", "FREE CPU", "FREE MEMORY", "HEARD"]);
    for peer in peers {
        let own = peer.state == "self";
        // An advert may come a moment after its sender: until then there is nothing to tell.
        let known = own || (peer.state == "alive" && peer.cpu.capacity > 0);
        let free = |text: String| if known { text } else { "?".to_owned() };
        table.row(vec![
            if own { format!("{} *", peer.name) } else { peer.name.clone() },
            peer.address.clone(),
            peer.state.clone(),
            peer.rtt_usec.map(output::took).unwrap_or_default(),
            free(MilliCpu(peer.cpu.free).to_string()),
            free(Bytes(peer.memory.free).to_string()),
            peer.heard_msec
                .map(|msec| format!("{}.{} s", msec / 1000, msec % 1000 / 100))
                .unwrap_or_default(),
        ]);
    }
    table.render()
}

/// `lathe doctor`.
pub async fn doctor(client: &Client, json: bool) -> Verdict {
    let report: DoctorReport = client.get("/v1/doctor").await?;
    let count = |verdict| report.checks.iter().filter(|check| check.verdict == verdict).count();
    let (ok, warn, fail) = (count(CheckVerdict::Ok), count(CheckVerdict::Warn), count(CheckVerdict::Fail));
    if json {
        print_json(&report)?;
    } else {
        print(&doctor_text(&report));
        let s = if warn == 1 { "" } else { "s" };
        print(&format!("{} checks: {ok} ok, {warn} warning{s}, {fail} failed.\n", report.checks.len()));
    }
    Ok(if fail > 0 { exit::FAILED } else { exit::DONE })
}

fn doctor_text(report: &DoctorReport) -> String {
    let mut text = String::new();
    for check in &report.checks {
        let word = match check.verdict {
            CheckVerdict::Ok => "ok",
            CheckVerdict::Warn => "warn",
            CheckVerdict::Fail => "fail",
        };
        text.push_str(&format!("{word:<5} {}\n", check.message));
        if check.verdict != CheckVerdict::Ok && !check.fix.is_empty() {
            text.push_str(&format!("      fix: {}\n", check.fix));
        }
    }
    text
}

/// `lathe events`: one line of JSON per event, until interrupted.
pub async fn events(client: &Client) -> Verdict {
    let mut body = client.stream("/v1/events").await?;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| Problem::internal("the events broke off", error))?;
        let text =
            frame.data_ref().map(|data| String::from_utf8_lossy(data).into_owned()).unwrap_or_default();
        for line in text.lines().filter_map(|line| line.strip_prefix("data:")) {
            print(&format!("{}\n", line.trim_start()));
        }
    }
    Ok(exit::DONE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::tests::fake;

    #[test]
    fn the_host_names_who_gets_least() {
        let mut host = fake::host();
        let line = "Least delivered of what was asked for in 10 s: cpu web 99.8 %.\n";
        assert!(host_text(&host).contains(line));
        host.worst_delivered.clear();
        assert!(
            host_text(&host)
                .ends_with("Peers alive: 0.\nForesight observe: no machine is resized by itself.\n")
        );
        (host.machines_sculpted, host.foresight) = (1, ForesightMode::On);
        assert!(
            host_text(&host)
                .ends_with("Foresight on: 1 of 1 machines are resized ahead of what they ask for.\n")
        );
    }
}
