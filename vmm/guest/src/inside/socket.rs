//! The socket on which whoever is root inside this machine asks the agent: for more, or for what its goals do.

use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use super::goals;
use super::wants::{self, Ask, Standing};

/// Where it is; root only.
pub const SOCKET: &str = "/run/lathe-guest.sock";
/// Longest question and answer, bytes.
pub const MAX_BYTES: u64 = 16 * 1024;
/// How long whoever asks may take to say it.
const ASK_TIMEOUT: Duration = Duration::from_secs(2);

/// Takes up the goals that were kept, then answers whoever asks inside this machine, one after the other, for ever.
///
/// # Errors
/// When the socket cannot be made.
pub fn serve() -> io::Result<()> {
    goals::start()?;
    match std::fs::remove_file(SOCKET) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(SOCKET)?;
    // Whatever the mask: who may grow the machine is root's to say.
    std::fs::set_permissions(SOCKET, std::fs::Permissions::from_mode(0o600))?;
    loop {
        match listener.accept() {
            // Who breaks off hears nothing; what was wanted stays.
            Ok((stream, _)) => drop(answer(stream)),
            Err(_) => std::thread::sleep(Duration::from_millis(100)),
        }
    }
}

fn answer(mut stream: UnixStream) -> io::Result<()> {
    stream.set_read_timeout(Some(ASK_TIMEOUT))?;
    stream.set_write_timeout(Some(ASK_TIMEOUT))?;
    let mut question = Vec::new();
    (&stream).take(MAX_BYTES).read_to_end(&mut question)?;
    let answer = match serde_json::from_slice::<Ask>(&question) {
        Ok(Ask { goal: Some(question), .. }) => serde_json::to_vec(&goals::answer(question)),
        Ok(ask) => serde_json::to_vec(&wants::stand(&ask)),
        Err(error) => {
            let wrong = Some(format!("no question: {error}"));
            serde_json::to_vec(&Standing { wrong, ..Standing::default() })
        }
    };
    stream.write_all(&answer?)
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use lathe_guest::protocol::inside::Settled;
    use serde::de::DeserializeOwned;

    use super::super::command;
    use super::*;

    fn talk<Answer: DeserializeOwned>(question: &[u8]) -> Answer {
        let (mut one, other) = UnixStream::pair().unwrap();
        one.write_all(question).unwrap();
        one.shutdown(std::net::Shutdown::Write).unwrap();
        let server = std::thread::spawn(move || answer(other));
        let mut text = Vec::new();
        one.read_to_end(&mut text).unwrap();
        server.join().unwrap().unwrap();
        serde_json::from_slice(&text).unwrap()
    }

    #[test]
    fn whoever_asks_hears_what_the_host_made_of_it() {
        assert!(talk::<Standing>(b"nonsense").wrong.is_some());
        assert!(talk::<Standing>(br#"{"cpu":{"up":1},"for_sec":1,"more":1}"#).wrong.is_some());
        let host = std::thread::spawn(|| {
            // As if the host had asked and answered.
            let want = loop {
                if let Some(want) = wants::told(Instant::now()).first().copied() {
                    break want;
                }
                std::thread::yield_now();
            };
            wants::settle(&[Settled { id: want.id, amount: Some(700), words: "until then".into() }]);
        });
        let standing: Standing = talk(br#"{"cpu":{"up":200},"for_sec":60}"#);
        host.join().unwrap();
        assert_eq!((standing.unheard, standing.wants[0].amount), (false, Some(700)));
        assert_eq!(talk::<Standing>(br#"{"none":true}"#).wants, []);
    }

    #[test]
    fn questions_about_goals_are_told_from_wishes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("guest.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let server = std::thread::spawn(move || {
            for stream in listener.incoming().take(2) {
                answer(stream.unwrap()).unwrap();
            }
        });
        let ask = |question| {
            let ask = Ask { goal: Some(question), ..Ask::default() };
            command::talk::<goals::Answer>(&path, &ask).unwrap()
        };
        let answer = ask(goals::Question::Show {});
        assert_eq!((answer.wrong, answer.unheard, answer.goals), (None, true, vec![]));
        let answer = ask(goals::Question::None { name: "web".into() });
        assert_eq!(answer.wrong.as_deref(), Some("there is no goal web"));
        server.join().unwrap();
        assert!(talk::<goals::Answer>(br#"{"goal":{"dance":{}}}"#).wrong.is_some());
    }
}
