//! `lathe-guest want`: asks the host for more, for a time.

use std::io::{self, Write};
use std::path::Path;

use lathe_guest::protocol::inside::{Amount, Wished};
use lathe_shard::{Bytes, Change, MilliCpu, ParseAmountError};

use super::command::{Options, is_help, talk};
use super::socket::SOCKET;
use super::wants::{Ask, Standing};

/// What is wanted without `--for`.
const DEFAULT_SEC: u32 = 600;

const HELP: &str = "\
usage: lathe-guest want [--cpu CHANGE] [--memory CHANGE] [--for TIME]
       lathe-guest want --none
       lathe-guest want

Tells the host that this machine wants more than it asks for at the moment, for a time; after that it is over by itself.
The host keeps to the bounds of the machine, and resizes it where its administrator lets it (see lathe forecast there).

  --cpu CHANGE      CPUs: +1, +50%, or 1.5 in all
  --memory CHANGE   memory: +512M, +50%, or 2G in all
  --for TIME        how long, to 24h: 90s, 10m, 1h [default: 10m]
  --none            nothing is wanted any more
  -h, --help        print this

A wish takes the place of the one before of the same resource. Without options what is wanted now is shown. Root only.
Exit status: 0 the host knows it, 1 it refuses it or does not answer, 2 the words make no sense.
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
    let ask = match parse(words) {
        Ok(ask) => ask,
        Err(wrong) => {
            eprintln!("lathe-guest want: {wrong}\nsee: lathe-guest want --help");
            return Ok(2);
        }
    };
    let standing: Standing = talk(Path::new(SOCKET), &ask)?;
    if let Some(wrong) = standing.wrong {
        eprintln!("lathe-guest want: {wrong}");
        return Ok(2);
    }
    io::stdout().write_all(text(&standing).as_bytes())?;
    if standing.unheard {
        eprintln!(
            "lathe-guest want: the host has not answered yet; it hears of it when it asks again, if it is not older than this and \
             foresight is not off there"
        );
    }
    Ok(u8::from(standing.unheard || standing.wants.iter().any(|line| line.refused)))
}

fn text(standing: &Standing) -> String {
    if standing.wants.is_empty() {
        return "nothing is wanted\n".to_owned();
    }
    let line = |line: &super::wants::Line| {
        let (resource, amount) = match line.resource {
            Wished::Cpu => ("cpu", line.amount.map(|milli| MilliCpu(milli).to_string())),
            Wished::Memory => ("memory", line.amount.map(|bytes| Bytes(bytes).to_string())),
        };
        let stands = match (amount, line.refused) {
            (Some(amount), _) => format!("{amount} wanted for {}", time(line.left_sec)),
            (None, true) => "refused".to_owned(),
            (None, false) => format!("not heard of yet, wanted for {}", time(line.left_sec)),
        };
        let words = if line.words.is_empty() { String::new() } else { format!("; {}", line.words) };
        format!("{resource:<8}{stands}{words}\n")
    };
    standing.wants.iter().map(line).collect()
}

fn time(seconds: u32) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        _ => format!("{} min", seconds.div_ceil(60)),
    }
}

fn parse(words: &[&str]) -> Result<Ask, String> {
    let mut ask = Ask { for_sec: DEFAULT_SEC, ..Ask::default() };
    let mut timed = false;
    let mut options = Options::new(words);
    while let Some(name) = options.next() {
        match name {
            "--cpu" => ask.cpu = Some(amount::<MilliCpu>(options.value()?, |cpu| cpu.0)?),
            "--memory" => ask.memory = Some(amount::<Bytes>(options.value()?, |bytes| bytes.0)?),
            "--for" => (ask.for_sec, timed) = (seconds(options.value()?)?, true),
            "--none" => {
                options.no_value()?;
                ask.none = true;
            }
            _ => return Err(format!("there is no option {name:?}")),
        }
    }
    let wants = ask.cpu.is_some() || ask.memory.is_some();
    match (ask.none, wants, timed) {
        (true, true, _) | (true, _, true) => Err("--none goes with no other option".to_owned()),
        (_, false, true) => Err("--for needs --cpu or --memory".to_owned()),
        _ => Ok(ask),
    }
}

fn amount<T>(text: &str, of: impl Fn(&T) -> u64) -> Result<Amount, String>
where
    T: std::str::FromStr<Err = ParseAmountError>,
{
    match text.parse::<Change<T>>().map_err(|error| error.to_string())? {
        Change::To(to) => Ok(Amount::To(of(&to))),
        Change::Up(by) => Ok(Amount::Up(of(&by))),
        Change::Percent { up: true, centipercent } => Ok(Amount::UpCentipercent(centipercent)),
        Change::Down(_) | Change::Percent { up: false, .. } => {
            Err(format!("{text} is less: only more can be wanted; --none takes back what was"))
        }
    }
}

fn seconds(text: &str) -> Result<u32, String> {
    let wrong = || format!("{text} is no time: write 90s, 10m or 1h");
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor = match unit {
        "" | "s" => 1,
        "m" | "min" => 60,
        "h" => 3600,
        _ => return Err(wrong()),
    };
    number.parse::<u32>().ok().and_then(|number| number.checked_mul(factor)).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::super::wants::Line;
    use super::*;

    #[test]
    fn words_become_a_question() {
        let expected = Ask { cpu: Some(Amount::Up(1000)), for_sec: 600, ..Ask::default() };
        assert_eq!(parse(&["--cpu", "+1", "--for", "10m"]), Ok(expected.clone()));
        assert_eq!(parse(&["--cpu=+1"]), Ok(expected));
        let memory = parse(&["--memory", "2G", "--for", "90"]).unwrap();
        assert_eq!((memory.memory, memory.for_sec), (Some(Amount::To(2 << 30)), 90));
        assert_eq!(parse(&["--cpu", "+50%"]).unwrap().cpu, Some(Amount::UpCentipercent(5000)));
        assert!(parse(&["--none"]).unwrap().none);
        assert!(parse(&[]).is_ok_and(|ask| ask.cpu.is_none() && !ask.none));
        for bad in [
            &["--cpu"][..],
            &["--cpu", "-1"],
            &["--cpu", "-50%"],
            &["--cpu", "many"],
            &["--for", "1h"],
            &["--none", "--cpu", "1"],
            &["--cpu", "1", "--for", "1w"],
            &["--cpu", "1", "--for", "4294967295h"],
            &["more"],
            &["--none=1"],
        ] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn how_it_stands_is_said_in_words() {
        let line = |resource, amount, refused, words: &str| Line {
            resource,
            amount,
            refused,
            left_sec: 600,
            words: words.into(),
        };
        let wants = vec![
            line(Wished::Cpu, Some(1500), false, "the host only observes"),
            line(Wished::Memory, None, true, "no"),
        ];
        let standing = Standing { wants, ..Standing::default() };
        assert_eq!(
            text(&standing),
            "cpu     1.50 wanted for 10 min; the host only observes\nmemory  refused; no\n"
        );
        assert_eq!(text(&Standing::default()), "nothing is wanted\n");
    }
}
