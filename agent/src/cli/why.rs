//! `lathe why NAME`: what was decided about a machine's shape, with the numbers, and how good forecasts and grants were.

use hyper::Method;
use lathe_shard::{BitRate, Bytes, MilliCpu};

use crate::api::wire::MachineView;
use crate::api::wire::foresight::{
    DecisionView, ForesightRequest, ForesightView, OptionView, QualityView, WhyView,
};
use crate::cli::args::WhyArgs;
use crate::cli::args::foresight::SettingArgs;
use crate::cli::client::Client;
use crate::cli::forecast::panel::time;
use crate::cli::machine::machine_path;
use crate::cli::output::{self, print, print_json};
use crate::cli::{Verdict, exit};

/// `lathe why`.
pub async fn why(client: &Client, json: bool, args: &WhyArgs) -> Verdict {
    let mut view: WhyView = client.get(&format!("{}/why", machine_path(&args.name)?)).await?;
    view.decisions.truncate(args.last.unwrap_or(usize::MAX));
    if json {
        print_json(&view)?;
    } else {
        print(&text(&view));
    }
    Ok(exit::DONE)
}

/// `lathe forecast NAME --mode …`.
pub async fn set(client: &Client, json: bool, name: &str, args: &SettingArgs) -> Verdict {
    let request = ForesightRequest {
        mode: args.mode.map(Into::into),
        aggressiveness_permille: args.aggressiveness.map(u64::from),
    };
    let path = format!("{}/foresight", machine_path(name)?);
    let view: MachineView = client.send(Method::PATCH, &path, &request, None).await?;
    if json {
        print_json(&view)?;
    } else {
        print(&format!("{}   {}\n", view.name, settings(&view.foresight)));
    }
    Ok(exit::DONE)
}

/// `foresight on (its own)   aggressiveness 0.500 (the host's)`.
pub(super) fn settings(view: &ForesightView) -> String {
    let mode = view.mode.word();
    let whose = match view.own_mode {
        Some(own) if own != view.mode => "the host's, which counts",
        Some(_) => "its own",
        None => "the host's",
    };
    let aggressiveness = view.aggressiveness_permille;
    let (whole, thousandths) = (aggressiveness / 1000, aggressiveness % 1000);
    let of = if view.own_aggressiveness_permille.is_some() { "its own" } else { "the host's" };
    format!("foresight {mode} ({whose})   aggressiveness {whole}.{thousandths:03} ({of})")
}

fn amount(resource: &str, amount: u64) -> String {
    match resource {
        "cpu" => MilliCpu(amount).to_string(),
        "memory" => Bytes(amount).to_string(),
        "net" => BitRate(amount).to_string(),
        _ => amount.to_string(),
    }
}

fn text(view: &WhyView) -> String {
    let mut text = format!("{}   {}\nnow   {}\n", view.name, settings(&view.foresight), view.now);
    let since = time(view.now_unix_sec.saturating_sub(view.since_unix_sec));
    if view.decisions.is_empty() {
        text.push_str(&format!("no decision in the last {since}\n"));
    }
    view.decisions.iter().for_each(|decision| text.push_str(&decision_text(decision, view.now_unix_sec)));
    view.quality.iter().for_each(|quality| text.push_str(&quality_text(quality)));
    text
}

fn decision_text(decision: &DecisionView, now_unix_sec: u64) -> String {
    let show = |units: u64| amount(&decision.resource, units);
    let known = |units: Option<u64>| units.map_or("-".to_owned(), show);
    let age = |msec: u64| time(now_unix_sec.saturating_sub(msec / 1000));
    let mut when = format!("{} ago", age(decision.at_unix_msec));
    if decision.times > 1 {
        when.push_str(&format!(", {} times until {} ago", decision.times, age(decision.until_unix_msec)));
    }
    let reason = if decision.reason.is_empty() { String::new() } else { format!(": {}", decision.reason) };
    let operation = decision.operation.as_ref().map(|id| format!("   {id}")).unwrap_or_default();
    let (from, to) = (show(decision.from), show(decision.to));
    let mut text = format!(
        "\n{when}   {} {from} -> {to}   {}{reason}{operation}\n  why       {}: {}\n  asked     {} in the last second, {} at most in 10 s\n",
        decision.resource,
        decision.outcome,
        decision.cause,
        decision.why,
        known(decision.demand),
        known(decision.recent),
    );
    if decision.p95.is_some() {
        text.push_str(&format!(
            "  ahead     p50 {}   p95 {}   p99 {} at most within {}   confidence {}\n",
            known(decision.p50),
            known(decision.p95),
            known(decision.p99),
            time(decision.ahead_sec),
            output::permille(decision.confidence_permille)
        ));
    }
    for option in &decision.options {
        text.push_str(&option_text(option, &show(option.amount)));
    }
    text
}

fn option_text(option: &OptionView, amount: &str) -> String {
    let (mark, why) = match &option.rejected {
        None => ("chosen", String::new()),
        Some(why) => ("rejected", format!("   {why}")),
    };
    let OptionView { unserved, slack, change, total, .. } = option;
    format!(
        "  {mark:<8}  {amount}   costs {total}: unserved {unserved}, slack {slack}, change {change}{why}\n"
    )
}

fn quality_text(quality: &QualityView) -> String {
    let show = |units: u64| amount(&quality.resource, units);
    let mut text = format!("\n{}\n", quality.resource);
    let share = quality.held.saturating_mul(1000).checked_div(quality.judged);
    text.push_str(&match share {
        Some(share) => format!(
            "  forecast  p95 held {} of the time in {} forecasts (want 95 %)\n",
            output::permille(Some(share)),
            quality.judged
        ),
        None => "  forecast  none has been checked yet\n".to_owned(),
    });
    if quality.measured_sec > 0 {
        text.push_str(&format!(
            "  grant     {} on average for {} asked; {} of it idle, {} of what was asked missing ({} short) in {}\n",
            show(quality.granted),
            show(quality.asked),
            output::permille(Some(quality.slack_permille)),
            output::permille(Some(quality.shortfall_permille)),
            time(quality.short_sec),
            time(quality.measured_sec),
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::tests::fake;

    #[test]
    fn a_decision_is_told_with_its_numbers() {
        let expected = "\
web   foresight on (its own)   aggressiveness 0.500 (the host's)
now   it is looked at every 5 s

30 s ago   cpu 0.30 -> 0.50   applied   web-7
  why       reached: it asked for 0.30 cpu of 0.30
  asked     0.30 in the last second, 0.30 at most in 10 s
  ahead     p50 0.12   p95 0.28   p99 0.41 at most within 6 min   confidence 29.0 %
  chosen    0.50   costs 260: unserved 40, slack 200, change 20
  rejected  0.30   costs 900: unserved 900, slack 0, change 0   it would be short

19 min ago, 220 times until 50 s ago   memory 512 MiB -> 256 MiB   observed
  why       idle: no more than 198 MiB is likely to be asked for
  asked     180 MiB in the last second, 181 MiB at most in 10 s

cpu
  forecast  p95 held 94.7 % of the time in 1000 forecasts (want 95 %)
  grant     0.40 on average for 0.25 asked; 38.0 % of it idle, 0.4 % of what was asked missing (12 s short) in 2 h
";
        assert_eq!(text(&fake::why("web")), expected);
    }

    #[test]
    fn who_was_never_decided_about_says_so() {
        let view = WhyView {
            name: "new".to_owned(),
            now: "it is off".to_owned(),
            now_unix_sec: 90,
            since_unix_sec: 30,
            ..WhyView::default()
        };
        let expected = "new   foresight observe (the host's)   aggressiveness 0.000 (the host's)\nnow   it is off\nno decision in the last 1 min\n";
        assert_eq!(text(&view), expected);
    }
}
