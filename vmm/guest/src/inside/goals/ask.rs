//! `lathe-guest goal`: says what is expected of an application, and how it stands.

use std::io::{self, Write};
use std::path::Path;
use std::time::Duration;

use lathe_guest::protocol::inside::{Goal, Pursued};

use super::super::command::{Options, is_help, talk};
use super::super::socket::SOCKET;
use super::super::wants::Ask;
use super::table::is_met;
use super::terms::{self, USUAL_PERMILLE, check_metric, check_name, parse_latency, percentile};
use super::{Answer, Question};

const HELP: &str = "\
usage: lathe-guest goal NAME --latency 'p95 < 20ms' --metrics WHERE [--metric METRIC]
       lathe-guest goal NAME --throughput high      --metrics WHERE [--metric METRIC]
       lathe-guest goal NAME --none
       lathe-guest goal

Tells the host what is expected of an application, and lets it follow the application's own metrics (Prometheus, OpenMetrics).
The host keeps to the bounds of the machine, and resizes it where its administrator lets it (see lathe forecast there).

  NAME               what the application is called, by whoever reads about it
  --latency GOAL     so many of its requests are answered in less time: p50, p90, p95, p99 or p99.9, and us, ms or s
  --throughput high  as many requests as it can: what more CPU makes faster gets it
  --metrics WHERE    http://127.0.0.1:PORT/PATH (localhost, [::1]), or the absolute path of a file that is written anew
                     at least once a minute
  --metric METRIC    name of the metric: for latency a histogram, summary or gauge, for throughput a counter, histogram
                     or summary [default: the only one of the application that fits]
  --none             nothing is expected any more
  -h, --help         print this

A goal takes the place of the one before of the same name, and is kept in /var/lib/lathe-guest/goals.json. Its metrics are read every
other second while the host asks for them. Without NAME it is shown how all goals stand. Root only.
Exit status: 0 done, 1 refused or the agent does not answer, 2 the words make no sense.
";

/// Carries the command out; gives its exit status.
///
/// # Errors
/// When the agent cannot be reached.
pub fn run(words: &[&str]) -> io::Result<u8> {
    if is_help(words) {
        io::stdout().write_all(HELP.as_bytes())?;
        return Ok(0);
    }
    let question = match parse(words) {
        Ok(question) => question,
        Err(wrong) => {
            eprintln!("lathe-guest goal: {wrong}\nsee: lathe-guest goal --help");
            return Ok(2);
        }
    };
    let answer: Answer = talk(Path::new(SOCKET), &Ask { goal: Some(question), ..Ask::default() })?;
    if let Some(wrong) = answer.wrong {
        eprintln!("lathe-guest goal: {wrong}");
        return Ok(1);
    }
    io::stdout().write_all(text(&answer).as_bytes())?;
    if let Some(unkept) = answer.unkept {
        eprintln!("lathe-guest goal: this holds until {unkept}");
    }
    if answer.unheard && !answer.goals.is_empty() {
        eprintln!(
            "lathe-guest goal: the host does not ask at present, and no metrics are read; it hears of goals when it asks again, if it is \
             not older than this and foresight is not off there"
        );
    }
    Ok(0)
}

fn text(answer: &Answer) -> String {
    match &answer.changed {
        Some(changed) => format!("{changed}\n"),
        None if answer.goals.is_empty() => "no goals\n".to_owned(),
        None => answer.goals.iter().map(line).collect(),
    }
}

fn line(pursued: &Pursued) -> String {
    let name = &pursued.name;
    let wrong = pursued.wrong.as_deref();
    if pursued.over_msec == 0 {
        let why = wrong.unwrap_or("its metrics have not been read twice of late");
        return format!("{name:<8}{}: not known: {why}\n", expected(pursued.goal));
    }
    let latency = pursued.latency_usec.map(terms::time);
    let rate = pursued.rate_milli.map(|milli| format!("{} requests/s", rate(milli)));
    let figures = match pursued.goal {
        Goal::Latency { permille, .. } => {
            let told = latency.unwrap_or_else(|| "not known".to_owned());
            let verdict = match is_met(pursued) {
                Some(true) => "met",
                Some(false) => "missed",
                None => "nothing was asked of it",
            };
            let goal = expected(pursued.goal);
            let rate = rate.map(|rate| format!("; {rate}")).unwrap_or_default();
            format!("{} {told}, {goal}: {verdict}{rate}", percentile(permille))
        }
        Goal::Throughput | Goal::Other => {
            let told = rate.unwrap_or_else(|| "rate not known".to_owned());
            let latency = latency.map(|latency| format!("; {} {latency}", percentile(USUAL_PERMILLE)));
            format!("{told}, {}{}", expected(pursued.goal), latency.unwrap_or_default())
        }
    };
    let over = Duration::from_millis(pursued.over_msec.into()).as_secs_f64();
    let wrong = wrong.map(|wrong| format!("; now {wrong}")).unwrap_or_default();
    format!("{name:<8}{figures}, over the last {over:.0} s{wrong}\n")
}

/// `goal under 20.0 ms`, `goal as many as can be`.
fn expected(goal: Goal) -> String {
    match goal {
        Goal::Latency { under_usec, .. } => format!("goal under {}", terms::time(under_usec)),
        Goal::Throughput => "goal as many as can be".to_owned(),
        Goal::Other => "goal of a later version".to_owned(),
    }
}

fn rate(milli: u64) -> String {
    let rate = milli as f64 / 1e3;
    match milli {
        0 => "0".to_owned(),
        1..10_000 => format!("{rate:.2}"),
        10_000..100_000 => format!("{rate:.1}"),
        _ => format!("{rate:.0}"),
    }
}

fn parse(words: &[&str]) -> Result<Question, String> {
    let (mut name, mut none, mut expected) = (None, false, None);
    let (mut metrics, mut metric) = (None, None);
    let mut options = Options::new(words);
    while let Some(word) = options.next() {
        match word {
            "--latency" | "--throughput" => {
                let goal = match (word, options.value()?) {
                    ("--latency", text) => parse_latency(text)?,
                    (_, "high") => Goal::Throughput,
                    (_, other) => {
                        return Err(format!("{other:?} is no goal of throughput: only high is one"));
                    }
                };
                if expected.replace(goal).is_some() {
                    return Err("a goal is one of --latency and --throughput".to_owned());
                }
            }
            "--metrics" => metrics = Some(options.value()?.to_owned()),
            "--metric" => metric = Some(options.value()?.to_owned()),
            "--none" => {
                options.no_value()?;
                none = true;
            }
            _ if word.starts_with('-') => return Err(format!("there is no option {word:?}")),
            _ => {
                check_name(word)?;
                if let Some(other) = name.replace(word.to_owned()) {
                    return Err(format!("one goal at a time: {other} or {word}"));
                }
            }
        }
    }
    metric.as_deref().map_or(Ok(()), check_metric)?;
    let alone = expected.is_none() && metrics.is_none() && metric.is_none();
    match (name, none, expected, metrics) {
        (None, false, ..) if alone => Ok(Question::Show {}),
        (None, ..) => Err("say of which application: lathe-guest goal NAME ...".to_owned()),
        (Some(name), true, ..) if alone => Ok(Question::None { name }),
        (Some(_), true, ..) => Err("--none goes with no other option".to_owned()),
        (Some(_), false, None, _) => {
            Err("say what is expected: --latency 'p95 < 20ms' or --throughput high; or --none".to_owned())
        }
        (Some(_), false, Some(_), None) => {
            Err("say where its metrics are: --metrics http://127.0.0.1:PORT/PATH, or the path of a file"
                .to_owned())
        }
        (Some(name), false, Some(goal), Some(metrics)) => Ok(Question::Set { name, goal, metrics, metric }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LATENCY: Goal = Goal::Latency { permille: 950, under_usec: 20_000 };

    #[test]
    fn words_become_a_question() {
        let place = "http://127.0.0.1:9100/metrics?a=b";
        let expected = Question::Set {
            name: "web".into(),
            goal: LATENCY,
            metrics: place.into(),
            metric: Some("web_seconds".into()),
        };
        let words = ["web", "--latency", "p95 < 20ms", "--metrics", place, "--metric", "web_seconds"];
        assert_eq!(parse(&words), Ok(expected.clone()));
        let together = format!("--metrics={place}");
        assert_eq!(parse(&["--metric=web_seconds", "--latency=p95<20ms", &together, "web"]), Ok(expected));
        let batch = parse(&["batch", "--throughput", "high", "--metrics", "/run/batch.prom"]).unwrap();
        assert!(matches!(batch, Question::Set { goal: Goal::Throughput, metric: None, .. }));
        assert_eq!(parse(&["web", "--none"]), Ok(Question::None { name: "web".into() }));
        assert_eq!(parse(&[]), Ok(Question::Show {}));
    }

    #[test]
    fn words_that_make_no_sense_are_refused() {
        let place = ["--metrics", "/x"];
        for (bad, why) in [
            (&["web"][..], "say what is expected"),
            (&["web", "--latency", "p95 < 20ms"], "say where its metrics are"),
            (&["web", "--latency", "p95", "<"], "in quotes because of the <"),
            (&["web", "--latency"], "--latency wants a value behind it"),
            (&["web", "--throughput", "low"], "only high is one"),
            (&["web", "--throughput", "high", "--latency", "p95<1s"], "is one of --latency and --throughput"),
            (&["web", "--none", "--throughput", "high"], "--none goes with no other option"),
            (&["web", "--none", place[0], place[1]], "--none goes with no other option"),
            (&["web", "--none=1"], "--none takes no value"),
            (&["web", place[0], place[1]], "say what is expected"),
            (&["--none"], "say of which application"),
            (&["--throughput", "high", place[0], place[1]], "say of which application"),
            (&["web", "more"], "one goal at a time: web or more"),
            (&["w/b", "--none"], "no name of a goal"),
            (&["web", "--fast"], "there is no option \"--fast\""),
            (&["web", "--metric", "a{b=\"c\"}"], "no name of a metric"),
        ] {
            let wrong = parse(bad).unwrap_err();
            assert!(wrong.contains(why), "{bad:?}: {wrong}");
        }
    }

    #[test]
    fn how_it_stands_is_one_line_each() {
        let met = Pursued {
            name: "web".into(),
            goal: LATENCY,
            over_msec: 10_004,
            latency_usec: Some(18_240),
            rate_milli: Some(412_300),
            wrong: None,
        };
        let none = Pursued { over_msec: 0, latency_usec: None, rate_milli: None, ..met.clone() };
        let refused = Some("connection refused at http://127.0.0.1:1/metrics".to_owned());
        let batch = Pursued { name: "batch".into(), goal: Goal::Throughput, ..met.clone() };
        let goals = vec![
            met.clone(),
            Pursued { latency_usec: Some(20_000), rate_milli: None, ..met.clone() },
            Pursued { latency_usec: None, rate_milli: Some(0), ..met.clone() },
            Pursued { wrong: refused.clone(), ..met },
            Pursued { wrong: refused, ..none.clone() },
            none,
            batch.clone(),
            Pursued { latency_usec: None, rate_milli: Some(2_346), ..batch },
        ];
        assert_eq!(
            text(&Answer { goals, ..Answer::default() }),
            "\
web     p95 18.2 ms, goal under 20.0 ms: met; 412 requests/s, over the last 10 s
web     p95 20.0 ms, goal under 20.0 ms: missed, over the last 10 s
web     p95 not known, goal under 20.0 ms: nothing was asked of it; 0 requests/s, over the last 10 s
web     p95 18.2 ms, goal under 20.0 ms: met; 412 requests/s, over the last 10 s; now connection refused at http://127.0.0.1:1/metrics
web     goal under 20.0 ms: not known: connection refused at http://127.0.0.1:1/metrics
web     goal under 20.0 ms: not known: its metrics have not been read twice of late
batch   412 requests/s, goal as many as can be; p95 18.2 ms, over the last 10 s
batch   2.35 requests/s, goal as many as can be, over the last 10 s
"
        );
        assert_eq!(text(&Answer::default()), "no goals\n");
        let changed = Some("web     goal taken back".to_owned());
        assert_eq!(text(&Answer { changed, ..Answer::default() }), "web     goal taken back\n");
    }
}
