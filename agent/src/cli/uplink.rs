//! `lathe host uplink`: the host's uplink, shared between machines.

use hyper::Method;
use lathe_shard::{BitRate, Bytes};

use crate::api::wire::{PlanView, UplinkRequest, UplinkShare, UplinkView};
use crate::cli::args::{UplinkEnableArgs, UplinkVerb};
use crate::cli::client::Client;
use crate::cli::machine::print_plan;
use crate::cli::output::{Table, print, print_json, say};
use crate::cli::{Verdict, exit};
use crate::problem::Problem;

const PATH: &str = "/v1/host/uplink";

/// `lathe host uplink …`.
pub async fn uplink(client: &Client, json: bool, verb: UplinkVerb) -> Verdict {
    match verb {
        UplinkVerb::Show => show(&client.get(PATH).await?, json),
        UplinkVerb::Enable(args) => enable(client, json, &args).await,
        UplinkVerb::Disable => show(&client.delete(PATH).await?, json),
    }
}

async fn enable(client: &Client, json: bool, args: &UplinkEnableArgs) -> Verdict {
    let capacity_bit_per_sec = args.capacity.map(|rate| rate.0);
    let request = UplinkRequest { device: args.device.clone(), capacity_bit_per_sec };
    if args.plan {
        let plan: PlanView = client.send(Method::PUT, &format!("{PATH}?plan=true"), &request, None).await?;
        return print_plan(&plan, json, args.exit_code);
    }
    let view: UplinkView = client.send(Method::PUT, PATH, &request, None).await?;
    show(&view, json)?;
    Ok(if is_whole(&view) { exit::DONE } else { exit::CONVERGING })
}

/// Whether all is in force.
fn is_whole(view: &UplinkView) -> bool {
    view.problem.is_empty() && view.machines.iter().all(|machine| machine.problem.is_empty())
}

fn show(view: &UplinkView, json: bool) -> Result<u8, Problem> {
    if json {
        print_json(view)?;
        return Ok(exit::DONE);
    }
    print(&text(view));
    if !view.enabled && view.device.is_empty() {
        say("Machines share the uplink as it comes. Promise each its rate: lathe host uplink enable");
    }
    Ok(exit::DONE)
}

fn text(view: &UplinkView) -> String {
    if view.device.is_empty() {
        return "uplink   off\n".to_owned();
    }
    let state = if view.enabled { "shared" } else { "being put back" };
    let mut text = format!(
        "{}   {state}   {} granted of {}, {} kept for the host   before: {}\n",
        view.device,
        BitRate(view.granted_bit_per_sec),
        BitRate(view.capacity_bit_per_sec),
        BitRate(view.reserved_bit_per_sec),
        view.before,
    );
    let mut table = Table::new(&["NAME", "RATE", "AT MOST", "SENT", "DROPPED", "WAITING"]);
    table.row(row("(host)", view.host.as_ref()));
    for machine in &view.machines {
        table.row(row(&machine.machine, machine.share.as_ref()));
    }
    text.push_str(&table.render());
    for machine in view.machines.iter().filter(|machine| !machine.problem.is_empty()) {
        text.push_str(&format!("# {}: {}\n", machine.machine, machine.problem));
    }
    if !view.problem.is_empty() {
        text.push_str(&format!("# not in force: {}; it is tried again\n", view.problem));
        if !view.fix.is_empty() {
            text.push_str(&format!("#   fix: {}\n", view.fix));
        }
    }
    text
}

fn row(name: &str, share: Option<&UplinkShare>) -> Vec<String> {
    let mut cells = vec![name.to_owned()];
    match share {
        Some(share) => cells.extend([
            BitRate(share.rate_bit_per_sec).to_string(),
            BitRate(share.ceil_bit_per_sec).to_string(),
            Bytes(share.sent_bytes).to_string(),
            share.dropped_packets.to_string(),
            Bytes(share.backlog_bytes).to_string(),
        ]),
        None => cells.extend([const { String::new() }; 5]),
    }
    cells
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::tests::fake;
    use crate::api::wire::UplinkMachine;

    #[test]
    fn off_is_one_word_and_on_says_who_has_what() {
        assert_eq!(text(&UplinkView::default()), "uplink   off\n");
        let mut view = fake::uplink();
        let expected = "\
eth0   shared   40 Mbit/s granted of 1 Gbit/s, 50 Mbit/s kept for the host   before: mq 1:
NAME    RATE       AT MOST     SENT   DROPPED  WAITING
(host)  40 Mbit/s  1 Gbit/s    3 MiB  2        1.5 KiB
web     40 Mbit/s  960 Mbit/s  3 MiB  2        1.5 KiB
";
        assert_eq!(text(&view), expected);
        assert!(is_whole(&view));
        let problem = "it has no class".to_owned();
        view.machines.push(UplinkMachine { machine: "db".to_owned(), share: None, problem });
        (view.problem, view.fix) = ("eth0 is gone".to_owned(), "ip link".to_owned());
        let shown = text(&view);
        let end =
            "# db: it has no class\n# not in force: eth0 is gone; it is tried again\n#   fix: ip link\n";
        assert!(shown.ends_with(end) && shown.contains("\ndb      -"), "{shown}");
        assert!(!is_whole(&view));
    }
}
