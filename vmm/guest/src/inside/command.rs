//! What the commands that speak with the agent have in common: their options, and the question itself.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde::de::DeserializeOwned;

use super::socket::MAX_BYTES;
use super::wants::Ask;

/// How long the agent may take to answer: longer than it gives the host.
const TIMEOUT: Duration = Duration::from_secs(12);

/// Words of a command line, options with their values: `--cpu +1` and `--cpu=+1` are the same.
pub struct Options<'a> {
    words: std::slice::Iter<'a, &'a str>,
    name: &'a str,
    value: Option<&'a str>,
}

impl<'a> Options<'a> {
    /// Of these words.
    pub fn new(words: &'a [&'a str]) -> Self {
        Self { words: words.iter(), name: "", value: None }
    }

    /// The next option's name, or the next word that is no option.
    pub fn next(&mut self) -> Option<&'a str> {
        let word = *self.words.next()?;
        (self.name, self.value) = match word.split_once('=') {
            Some((name, value)) if name.starts_with('-') => (name, Some(value)),
            _ => (word, None),
        };
        Some(self.name)
    }

    /// The value of the option that came last.
    ///
    /// # Errors
    /// When there is none, in words.
    pub fn value(&mut self) -> Result<&'a str, String> {
        let value = self.value.take().or_else(|| self.words.next().copied());
        value.ok_or_else(|| format!("{} wants a value behind it", self.name))
    }

    /// The option that came last takes no value.
    ///
    /// # Errors
    /// When it was given one, in words.
    pub fn no_value(&self) -> Result<(), String> {
        match self.value {
            Some(_) => Err(format!("{} takes no value", self.name)),
            None => Ok(()),
        }
    }
}

/// Whether these words ask for help.
pub fn is_help(words: &[&str]) -> bool {
    words.iter().any(|word| ["-h", "--help"].contains(word))
}

/// Asks the agent.
///
/// # Errors
/// When it cannot be reached, does not answer in time, or says what nobody understands.
pub fn talk<Answer: DeserializeOwned>(socket: &Path, ask: &Ask) -> io::Result<Answer> {
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

#[cfg(test)]
mod tests {
    use super::super::wants::Standing;
    use super::*;

    #[test]
    fn options_come_with_their_values() {
        let mut options = Options::new(&["web=1", "--a=b=c", "--a", "d", "--none=1", "--last"]);
        assert_eq!(options.next(), Some("web=1"));
        assert_eq!((options.next(), options.value()), (Some("--a"), Ok("b=c")));
        assert_eq!((options.next(), options.value()), (Some("--a"), Ok("d")));
        assert_eq!((options.next(), options.no_value().is_err()), (Some("--none"), true));
        assert_eq!((options.next(), options.no_value()), (Some("--last"), Ok(())));
        assert_eq!(options.value(), Err("--last wants a value behind it".into()));
        assert_eq!(options.next(), None);
    }

    #[test]
    fn who_does_not_reach_the_agent_hears_why() {
        let folder = tempfile::tempdir().unwrap();
        let error = talk::<Standing>(&folder.path().join("none.sock"), &Ask::default()).unwrap_err();
        assert!(error.to_string().contains("systemctl status lathe-guest"), "{error}");
    }
}
