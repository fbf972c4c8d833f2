//! `lathe nic`: network cards of a machine that are added, limited, listed and removed.

use hyper::Method;
use lathe_shard::{BitRate, RATE_SHARD};
use serde::Serialize;

use crate::api::wire::{NicAddRequest, NicLimitRequest, NicList, NicState, NicView, PlanView, Removed};
use crate::cli::args::{NicAddArgs, NicLimitArgs, NicRemoveArgs, NicVerb};
use crate::cli::client::Client;
use crate::cli::machine::{machine_path, print_plan};
use crate::cli::output::{self, Table, print, print_json, say};
use crate::cli::resize::limited;
use crate::cli::{Verdict, exit};
use crate::problem::{Kind, Problem};

fn nics_path(machine: &str) -> Result<String, Problem> {
    Ok(format!("{}/nics", machine_path(machine)?))
}

fn nic_path(machine: &str, nic: &str) -> Result<String, Problem> {
    let fine = (1..=16).contains(&nic.len()) && nic.bytes().all(|byte| byte.is_ascii_alphanumeric());
    if fine {
        return Ok(format!("{}/{nic}", nics_path(machine)?));
    }
    Err(Problem::new(Kind::BadRequest, "bad-name", format!("`{nic}` cannot be the name of a nic"))
        .detail("names are net0 to net9")
        .fix(format!("lathe nic list {machine}")))
}

/// `lathe nic …`.
pub async fn nic(client: &Client, json: bool, verb: NicVerb) -> Verdict {
    match verb {
        NicVerb::Add(args) => add(client, json, &args).await,
        NicVerb::List { machine } => list(client, json, &machine).await,
        NicVerb::Limit(args) => limit(client, json, &args).await,
        NicVerb::Remove(args) => remove(client, json, &args).await,
    }
}

/// Asks for a change, or with `plan` for what it would do.
async fn ask(
    client: &Client,
    method: Method,
    path: &str,
    body: &impl Serialize,
    plan: bool,
) -> Result<Result<NicView, PlanView>, Problem> {
    if plan {
        return client.send(method, &format!("{path}?plan=true"), body, None).await.map(Err);
    }
    client.send(method, path, body, None).await.map(Ok)
}

async fn add(client: &Client, json: bool, args: &NicAddArgs) -> Verdict {
    let path = nics_path(&args.machine)?;
    let request = NicAddRequest { name: args.id.clone(), bit_per_sec: args.net.map(|rate| rate.0) };
    match ask(client, Method::POST, &path, &request, args.plan).await? {
        Err(plan) => print_plan(&plan, json, args.exit_code),
        Ok(view) => {
            print_nic(&view, json)?;
            if !json {
                say(&in_guest(&view));
            }
            Ok(exit::DONE)
        }
    }
}

/// What became of a nic in the guest.
fn in_guest(view: &NicView) -> String {
    let (mac, addresses) = (&view.mac, view.addresses.join(", "));
    match view.state {
        NicState::Attached if view.configured => {
            format!("In the guest: the card with address {mac}, configured")
        }
        NicState::Attached => {
            let reason = &view.reason;
            format!(
                "In the guest, not configured: {reason}. Until then give its card {mac} {addresses} yourself"
            )
        }
        _ => format!("In the guest after its next start: the card with address {mac}"),
    }
}

fn print_nic(view: &NicView, json: bool) -> Result<(), Problem> {
    if json {
        return print_json(view);
    }
    let words = [
        &view.machine,
        &view.name,
        &view.addresses.join(", "),
        &output::rate(view.bit_per_sec),
        state(view.state),
    ];
    print(&format!("{}\n", words.join("   ")));
    Ok(())
}

fn state(state: NicState) -> &'static str {
    match state {
        NicState::Attached => "attached",
        NicState::Detached => "detached",
        NicState::Adding => "adding",
        NicState::Removing => "removing",
    }
}

/// One line with the nics of a machine for `lathe show`; empty when its first one, which is shown anyway, says all.
pub async fn line(client: &Client, machine: &str) -> Result<String, Problem> {
    let list: NicList = client.get(&nics_path(machine)?).await?;
    Ok(line_of(&list.nics))
}

fn line_of(nics: &[NicView]) -> String {
    let one = |view: &NicView| {
        let state = if view.state == NicState::Attached { "" } else { state(view.state) };
        let rate = output::rate(view.bit_per_sec);
        let bare = view.state == NicState::Attached && !view.configured;
        let words = format!("{} {} {rate} {state}", view.name, view.addresses.join(" "));
        format!("{}{}", words.trim_end(), if bare { " not configured" } else { "" })
    };
    match nics {
        [] => String::new(),
        [only] if only.name == "net0" && only.state != NicState::Removing => String::new(),
        nics => format!("nics      {}\n", nics.iter().map(one).collect::<Vec<_>>().join(", ")),
    }
}

async fn list(client: &Client, json: bool, machine: &str) -> Verdict {
    let list: NicList = client.get(&nics_path(machine)?).await?;
    if json {
        print_json(&list)?;
    } else if list.nics.is_empty() {
        say(&format!("{machine} has no nics. Give it one: lathe nic add {machine}"));
    } else {
        print(&table(&list.nics));
    }
    Ok(exit::DONE)
}

fn table(nics: &[NicView]) -> String {
    let mut table = Table::new(&["NAME", "ADDRESSES", "MAC", "RATE", "STATE", "GUEST", "TAP"]);
    for nic in nics {
        let guest = match (nic.configured, nic.reason.as_str()) {
            (true, _) => "configured",
            (false, reason) => reason,
        };
        table.row(vec![
            nic.name.clone(),
            nic.addresses.join(", "),
            nic.mac.clone(),
            output::rate(nic.bit_per_sec),
            state(nic.state).to_owned(),
            guest.to_owned(),
            nic.tap.clone(),
        ]);
    }
    table.render()
}

async fn limit(client: &Client, json: bool, args: &NicLimitArgs) -> Verdict {
    let path = nic_path(&args.machine, &args.nic)?;
    let list: NicList = client.get(&nics_path(&args.machine)?).await?;
    let now = list.nics.iter().find(|nic| nic.name == args.nic).map(|nic| nic.bit_per_sec);
    // One that is not there is lathed's to refuse.
    let bit_per_sec = match now {
        Some(now) => {
            limited("net", args.rate, now, RATE_SHARD.0, |rate: &BitRate| rate.0).map_err(|problem| {
                problem.fix(format!("lathe nic limit {} {} RATE, or unlimited", args.machine, args.nic))
            })?
        }
        None => 0,
    };
    match ask(client, Method::PATCH, &path, &NicLimitRequest { bit_per_sec }, args.plan).await? {
        Err(plan) => print_plan(&plan, json, args.exit_code),
        Ok(view) => print_nic(&view, json).map(|()| exit::DONE),
    }
}

async fn remove(client: &Client, json: bool, args: &NicRemoveArgs) -> Verdict {
    let path = nic_path(&args.machine, &args.nic)?;
    let path = format!("{path}?timeout_sec={}", args.timeout);
    if args.plan {
        let plan: PlanView = client.delete(&format!("{path}&plan=true")).await?;
        return print_plan(&plan, json, args.exit_code);
    }
    let removed: Removed = client.delete(&path).await?;
    if json {
        print_json(&removed)?;
    } else {
        print(&format!("{}   {}   removed\n", args.machine, removed.name));
    }
    Ok(exit::DONE)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view() -> NicView {
        NicView {
            schema: 1,
            machine: "web".to_owned(),
            name: "net1".to_owned(),
            state: NicState::Attached,
            mac: "2e:ce:87:e6:69:92".to_owned(),
            addresses: vec!["10.77.0.6/16".to_owned()],
            tap: "lt-web_1".to_owned(),
            bit_per_sec: 20_000_000,
            to_guest_bit_per_sec: Some(20_000_000),
            from_guest_bit_per_sec: Some(20_000_000),
            rx_bytes: 0,
            tx_bytes: 0,
            configured: true,
            reason: String::new(),
        }
    }

    #[test]
    fn a_nic_is_a_row() {
        let expected = "NAME  ADDRESSES     MAC                RATE       STATE     GUEST       TAP\n\
                        net1  10.77.0.6/16  2e:ce:87:e6:69:92  20 Mbit/s  attached  configured  lt-web_1\n";
        assert_eq!(table(&[view()]), expected);
        let first = NicView { name: "net0".to_owned(), bit_per_sec: 0, ..view() };
        assert_eq!(line_of(std::slice::from_ref(&first)), "", "shown as the machine's network");
        let reason = "its guest agent does not answer".to_owned();
        let bare = NicView { configured: false, reason, ..view() };
        assert_eq!(
            line_of(&[first, bare.clone()]),
            "nics      net0 10.77.0.6/16 unlimited, net1 10.77.0.6/16 20 Mbit/s not configured\n"
        );
        assert!(in_guest(&bare).contains("its guest agent does not answer"), "{}", in_guest(&bare));
        let off = NicView { state: NicState::Detached, configured: false, ..view() };
        assert_eq!(line_of(&[off]), "nics      net1 10.77.0.6/16 20 Mbit/s detached\n");
    }

    #[test]
    fn names_that_would_change_the_path_are_refused() {
        assert_eq!(nic_path("web", "net1").unwrap(), "/v1/machines/web/nics/net1");
        for name in ["", "a/b", "..", "a?b", "a b"] {
            assert!(nic_path("web", name).is_err(), "{name}");
        }
    }
}
