//! `lathe-guest want`: asks the host for more, for a time.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use lathe_guest::protocol::inside::{Amount, Wished};
use lathe_shard::{Bytes, Change, MilliCpu, ParseAmountError};

use super::wants::{Ask, MAX_BYTES, SOCKET, Standing};

/// How long the agent may take to answer: longer than it gives the host.
const TIMEOUT: Duration = Duration::from_secs(12);
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
    if words.iter().any(|word| ["-h", "--help"].contains(word)) {
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
    let standing = talk(Path::new(SOCKET), &ask)?;
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

fn talk(socket: &Path, ask: &Ask) -> io::Result<Standing> {
    let reached = UnixStream::connect(socket).map_err(|error| {
        let hint = match error.kind() {
            io::ErrorKind::PermissionDenied => "root only",
            _ => "does the agent run? systemctl status lathe-guest",
        };
        io::Error::new(error.kind(), format!("{}: {error} ({hint})", socket.display()))
    });
    let mut stream = reached?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.write_all(&serde_json::to_vec(ask)?)?;
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut answer = Vec::new();
    stream.take(MAX_BYTES).read_to_end(&mut answer)?;
    Ok(serde_json::from_slice(&answer)?)
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
    let mut ask = Ask { cpu: None, memory: None, for_sec: DEFAULT_SEC, none: false };
    let mut timed = false;
    let mut words = words.iter();
    while let Some(word) = words.next() {
        let (name, value) = word.split_once('=').map_or((*word, None), |(name, value)| (name, Some(value)));
        if name == "--none" && value.is_none() {
            ask.none = true;
            continue;
        }
        let mut value = || {
            value.or_else(|| words.next().copied()).ok_or_else(|| format!("{name} wants a value behind it"))
        };
        match name {
            "--cpu" => ask.cpu = Some(amount::<MilliCpu>(value()?, |cpu| cpu.0)?),
            "--memory" => ask.memory = Some(amount::<Bytes>(value()?, |bytes| bytes.0)?),
            "--for" => (ask.for_sec, timed) = (seconds(value()?)?, true),
            _ => return Err(format!("there is no option {word:?}")),
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
        let expected = Ask { cpu: Some(Amount::Up(1000)), memory: None, for_sec: 600, none: false };
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

    #[test]
    fn who_does_not_reach_the_agent_hears_why() {
        let folder = tempfile::tempdir().unwrap();
        let ask = parse(&[]).unwrap();
        let error = talk(&folder.path().join("none.sock"), &ask).unwrap_err();
        assert!(error.to_string().contains("systemctl status lathe-guest"), "{error}");
    }
}
