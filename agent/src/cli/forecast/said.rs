//! In words: what people have said of what is ahead, what is wanted now, and what goes on inside.

use hyper::Method;
use lathe_shard::{BitRate, Bytes, MilliCpu};

use super::panel::time;
use super::when::{self, DAY, clock};
use super::{blueprint, svg};
use crate::api::wire::by_hand::{
    AnnounceRequest, AnnouncedView, BlueprintStep, ByHandView, ForecastOf, Raise, RaiseView,
};
use crate::api::wire::forecast::ForecastView;
use crate::api::wire::inside::{ApplicationView, GoalView, InsideView, WantedView};
use crate::cli::args::ForecastArgs;
use crate::cli::client::Client;
use crate::cli::machine::machine_path;
use crate::cli::output::{Table, permille, print, print_json};
use crate::cli::{Verdict, exit};
use crate::problem::{Kind, Problem};

/// Length of an event for which no other is given, seconds.
const EVENT_SEC: u64 = 3600;

/// Carries out what is said by hand; `None`: nothing is.
pub async fn say(client: &Client, json: bool, args: &ForecastArgs, now_sec: u64) -> Option<Verdict> {
    let said = change(client, args, now_sec).await?;
    let shown = |view: ByHandView| {
        if json {
            print_json(&view)?;
        } else {
            print(&by_hand(&view, now_sec));
        }
        Ok(exit::DONE)
    };
    Some(said.and_then(shown))
}

async fn change(client: &Client, args: &ForecastArgs, now_sec: u64) -> Option<Result<ByHandView, Problem>> {
    let path = match machine_path(&args.name) {
        Ok(path) => format!("{path}/forecast"),
        Err(problem) => return Some(Err(problem)),
    };
    let by_hand = &args.by_hand;
    if let Some(file) = &by_hand.set {
        let request = match blueprint::read(file) {
            Ok(request) => request,
            Err(problem) => return Some(Err(problem)),
        };
        return Some(client.send(Method::PUT, &format!("{path}/blueprint"), &request, None).await);
    }
    if by_hand.unset {
        return Some(client.delete(&format!("{path}/blueprint")).await);
    }
    if let Some(name) = &by_hand.remove_event {
        return Some(client.delete(&format!("{path}/events/{}", encoded(name))).await);
    }
    let text = by_hand.event.as_deref()?;
    let for_sec = by_hand.for_time.map_or(EVENT_SEC, |time| time.as_secs());
    let (name, daily, from_sec) = match when::event(text, for_sec, now_sec) {
        Ok(event) => event,
        Err(message) => {
            let fix = format!("lathe forecast {} --event \"18:00 sale\" --for 2h --cpu +100%", args.name);
            return Some(Err(Problem::new(Kind::BadRequest, "bad-event", message).fix(fix)));
        }
    };
    let raises = [
        (ForecastOf::Cpu, by_hand.cpu),
        (ForecastOf::Memory, by_hand.memory),
        (ForecastOf::Net, by_hand.net),
        (ForecastOf::Iops, by_hand.iops),
    ];
    let raises =
        raises.into_iter().filter_map(|(resource, raise)| Some(RaiseView { resource, raise: raise? }));
    let request = AnnounceRequest { daily, from_sec, for_sec, raises: raises.collect() };
    Some(client.send(Method::PUT, &format!("{path}/events/{}", encoded(&name)), &request, None).await)
}

/// A name as part of a path (RFC 3986, section 2.1).
fn encoded(name: &str) -> String {
    let byte = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'~' => char::from(byte).to_string(),
        other => format!("%{other:02X}"),
    };
    name.bytes().map(byte).collect()
}

/// `lathe forecast NAME --apps`.
pub fn applications(json: bool, view: &ForecastView) -> Verdict {
    let Some(inside) = &view.inside else {
        let message = format!("{}: its guest agent tells nothing of what goes on inside", view.name);
        return Err(Problem::new(Kind::Unavailable, "guest-tells-nothing", message)
            .detail("it does not run, has no lathe-guest, or one of an earlier release")
            .fix(format!(
                "lathe show {}        then install lathe-guest of this release inside",
                view.name
            )));
    };
    if json {
        print_json(inside)?;
    } else {
        print(&table(inside));
    }
    Ok(exit::DONE)
}

fn table(inside: &InsideView) -> String {
    let name = if inside.kind == "sessions" { "SESSION" } else { "UNIT" };
    let mut table =
        Table::new(&[name, "CPU", "MEMORY", "WORKING", "READ/s", "WRITTEN/s", "OPS/s", "WAITS cpu/mem/io"]);
    let row = |name: String, one: &ApplicationView| {
        let share = |share: Option<u32>| share.map_or("-".to_owned(), |share| permille(Some(share.into())));
        let waits = [one.cpu_some_permille, one.memory_some_permille, one.io_some_permille].map(share);
        vec![
            name,
            MilliCpu(one.cpu_milli).to_string(),
            Bytes(one.memory_bytes).to_string(),
            Bytes(one.working_set_bytes).to_string(),
            Bytes(one.read_bytes_per_sec).to_string(),
            Bytes(one.written_bytes_per_sec).to_string(),
            one.operations_per_sec.map(|operations| operations.to_string()).unwrap_or_default(),
            waits.join(" / "),
        ]
    };
    inside.applications.iter().for_each(|one| table.row(row(one.name.clone(), one)));
    if let Some(others) = &inside.others {
        table.row(row(format!("{} others", inside.others_count), others));
    }
    let mut text = table.render();
    let waits = [inside.cpu_some_permille, inside.memory_some_permille, inside.io_some_permille];
    let words = ["cpu", "memory", "io"].into_iter().zip(waits);
    let words = words.filter_map(|(word, share)| Some(format!("{word} {}", permille(Some(share?.into())))));
    let words: Vec<String> = words.collect();
    if !words.is_empty() {
        text.push_str(&format!("some task waited for  {}\n", words.join("   ")));
    }
    text.push_str(&format!(
        "whole machine         received {}   sent {}   swapped out {}\n",
        BitRate(inside.net_rx_bit_per_sec),
        BitRate(inside.net_tx_bit_per_sec),
        Bytes(inside.swap_used_bytes)
    ));
    text.extend(inside.goals.iter().map(goal));
    text
}

/// A line about what is expected of an application.
fn goal(view: &GoalView) -> String {
    let rate = view.rate_milli.map(|milli| format!("{}.{}/s", milli / 1000, milli % 1000 / 100));
    let quantile = |permille: u32| match (permille / 10, permille % 10) {
        (whole, 0) => format!("p{whole}"),
        (whole, tenth) => format!("p{whole}.{tenth}"),
    };
    let (expected, latency) = match (view.permille, view.under_usec) {
        (Some(permille), Some(under)) => {
            (format!("{} under {}", quantile(permille), short_time(under)), view.latency_usec.map(short_time))
        }
        _ => {
            ("throughput high".to_owned(), view.latency_usec.map(|usec| format!("p95 {}", short_time(usec))))
        }
    };
    let figures: Vec<String> = latency.into_iter().chain(rate).collect();
    let figures = match (figures.is_empty(), view.wrong.as_str()) {
        (false, _) => format!("{} over {} s", figures.join(", "), (view.over_msec + 500) / 1000),
        (true, "") => "its metrics have told nothing yet".to_owned(),
        (true, wrong) => format!("its metrics cannot be read: {wrong}"),
    };
    let stands = match view.stands.as_str() {
        "unknown" => String::new(),
        "met" => "; met".to_owned(),
        "missed" => "; missed".to_owned(),
        "wanting" => "; missed, more is wanted than is granted".to_owned(),
        "trying" => "; missed, more was granted, and whether that helps is seen within seconds".to_owned(),
        "elsewhere" => "; missed, but neither CPU nor memory is short: more would not help".to_owned(),
        "bounded" => "; missed, and the machine has all that it may have".to_owned(),
        "futile" => "; missed, more did not help and is tried again later".to_owned(),
        other => format!("; {other}"),
    };
    let wanted = [("cpu", view.cpu_milli), ("memory", view.memory_bytes)];
    let wanted =
        wanted.into_iter().filter_map(|(word, amount)| Some(format!("{word} {}", of(word, amount?))));
    let wanted: Vec<String> = wanted.collect();
    let wanted =
        if wanted.is_empty() { String::new() } else { format!("; {} at least for it", wanted.join(", ")) };
    format!("goal      {}   {expected}: {figures}{stands}{wanted}\n", view.name)
}

/// Three figures of a time.
fn short_time(usec: u64) -> String {
    match usec {
        0..1000 => format!("{usec} us"),
        1000..100_000 => format!("{}.{} ms", usec / 1000, usec % 1000 / 100),
        100_000..1_000_000 => format!("{} ms", usec / 1000),
        _ => format!("{}.{:02} s", usec / 1_000_000, usec % 1_000_000 / 10_000),
    }
}

/// A line for each thing that is wanted.
pub fn wanted(wanted: &[WantedView]) -> String {
    let line = |one: &WantedView| {
        let source = match (one.source.as_str(), one.left_sec) {
            ("inside", Some(left)) => format!("from inside, for {} more", time(left)),
            ("inside", None) => "from inside".to_owned(),
            ("goal", _) => "for a goal of an application".to_owned(),
            _ => "by hand".to_owned(),
        };
        format!("wanted    {} {}   {source}\n", one.resource, of(&one.resource, one.amount))
    };
    wanted.iter().map(line).collect()
}

/// What people have said.
pub fn by_hand(view: &ByHandView, now_sec: u64) -> String {
    let mut text = String::new();
    if !view.steps.is_empty() {
        let mut resources: Vec<&str> = Vec::new();
        for step in &view.steps {
            let word = word(step.resource);
            if !resources.contains(&word) {
                resources.push(word);
            }
        }
        let steps = match view.steps.len() {
            1 => "1 step".to_owned(),
            many => format!("{many} steps"),
        };
        text.push_str(&format!(
            "by hand   {steps} of {}   confidence {} %\n",
            resources.join(", "),
            view.confidence_permille / 10
        ));
        text.extend(view.steps.iter().filter(|step| is_now(step, now_sec)).map(now_line));
    }
    text.extend(view.events.iter().map(|event| event_line(event, now_sec)));
    if text.is_empty() { "nothing is said by hand\n".to_owned() } else { text }
}

fn is_now(step: &BlueprintStep, now_sec: u64) -> bool {
    let begun = if step.daily {
        (now_sec % DAY + DAY - step.from_sec) % DAY
    } else {
        now_sec.wrapping_sub(step.from_sec)
    };
    begun < step.for_sec
}

fn now_line(step: &BlueprintStep) -> String {
    let [p50, p95] = [step.p50, step.p95].map(|amount| of(word(step.resource), amount));
    format!("          now {}: p50 {p50}, p95 {p95}\n", word(step.resource))
}

fn event_line(event: &AnnouncedView, now_sec: u64) -> String {
    let when = match (event.daily, event.from_sec) {
        (true, of_day) => format!("daily {} UTC", clock(of_day)),
        (false, at) => format!("{} UTC", svg::date(at)),
    };
    let stands = match event.next_unix_sec {
        _ if event.now => "goes on now".to_owned(),
        Some(next) => format!("begins in {}", time(next.saturating_sub(now_sec))),
        None => "is over".to_owned(),
    };
    let raises: Vec<String> = event.raises.iter().map(raise_words).collect();
    let raises = if raises.is_empty() { "as at the busiest time".to_owned() } else { raises.join(", ") };
    format!("event     {}   {when} for {}   {raises}   {stands}\n", event.name, time(event.for_sec))
}

fn raise_words(raise: &RaiseView) -> String {
    let word = word(raise.resource);
    match raise.raise {
        Raise::To(to) => format!("{word} {}", of(word, to)),
        Raise::Up(by) => format!("{word} +{}", of(word, by)),
        Raise::UpCentipercent(by) if by % 100 == 0 => format!("{word} +{} %", by / 100),
        Raise::UpCentipercent(by) => format!("{word} +{}.{:02} %", by / 100, by % 100),
    }
}

fn word(resource: ForecastOf) -> &'static str {
    match resource {
        ForecastOf::Cpu => "cpu",
        ForecastOf::Memory => "memory",
        ForecastOf::Net => "net",
        ForecastOf::Iops => "iops",
    }
}

fn of(resource: &str, amount: u64) -> String {
    match resource {
        "cpu" => MilliCpu(amount).to_string(),
        "memory" => Bytes(amount).to_string(),
        "net" => BitRate(amount).to_string(),
        _ => amount.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::tests::fake;

    #[test]
    fn words_say_what_was_said() {
        let view = fake::forecast("web");
        let text = format!("{}{}", wanted(&view.wanted), by_hand(&view.by_hand, view.now_unix_sec));
        assert_eq!(
            text,
            "wanted    cpu 1.50   from inside, for 9 min more\n\
             by hand   1 step of memory   confidence 90 %\n          \
             now memory: p50 256 MiB, p95 512 MiB\n\
             event     backup   daily 03:00 UTC for 2 h   as at the busiest time   begins in 9 h 54 min\n\
             event     sale   2026-11-22 17:00 UTC for 2 h   cpu +100 %, memory +256 MiB   goes on now\n"
        );
        assert_eq!(by_hand(&ByHandView::default(), 0), "nothing is said by hand\n");
    }

    #[test]
    fn applications_are_a_table() {
        let view = fake::forecast("web");
        let text = table(view.inside.as_ref().unwrap());
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].starts_with("UNIT") && lines[1].starts_with("nginx.service  0.31"), "{text}");
        assert!(
            lines[3].starts_with("7 others") && lines[4].starts_with("some task waited for  cpu 4.1 %"),
            "{text}"
        );
        let silent = ForecastView { inside: None, ..view };
        assert_eq!(applications(false, &silent).unwrap_err().code, "guest-tells-nothing");
    }

    #[test]
    fn goals_stand_in_a_line() {
        let view = fake::forecast("web").inside.unwrap().goals.remove(0);
        assert_eq!(
            goal(&view),
            "goal      web   p95 under 20.0 ms: 31.4 ms, 412.3/s over 10 s; missed, more was granted, and whether that \
             helps is seen within seconds; cpu 0.75 at least for it\n"
        );
        let silent = GoalView {
            latency_usec: None,
            rate_milli: None,
            wrong: "connection refused".to_owned(),
            stands: "unknown".to_owned(),
            cpu_milli: None,
            ..view
        };
        assert_eq!(
            goal(&silent),
            "goal      web   p95 under 20.0 ms: its metrics cannot be read: connection refused\n"
        );
        let most = GoalView {
            kind: "throughput".to_owned(),
            permille: None,
            under_usec: None,
            rate_milli: Some(1_250),
            stands: "met".to_owned(),
            ..silent
        };
        assert_eq!(goal(&most), "goal      web   throughput high: 1.2/s over 10 s; met\n");
        assert_eq!(
            [999, 9_949, 250_400, 61_000_000].map(short_time),
            ["999 us", "9.9 ms", "250 ms", "61.00 s"]
        );
    }

    #[test]
    fn names_are_fit_for_a_path() {
        assert_eq!(encoded("big sale.2/ä"), "big%20sale%2E2%2F%C3%A4");
    }
}
