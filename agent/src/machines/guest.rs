//! The host's side of the guest agent: connecting through the monitor's vsock listener, configuring the network, asking for a shutdown.
//!
//! Everything that comes from a guest is hostile: every read is bounded in length and time, and nothing that a guest says is trusted
//! beyond being shown.

use std::io;
use std::path::Path;
use std::time::Duration;

use lathe_guest::protocol::{self, FrameKind, Hello, Request, Response};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;

/// How long a guest agent may take to answer; a starved guest is slow.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// First pause between two attempts to reach it; doubled each time.
pub const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// Longest pause.
pub const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// Longest answer to `CONNECT`: `OK ` and a port.
const MAX_GREETING_BYTES: usize = 32;

/// Connects to the guest agent behind the monitor's listener at `path`.
///
/// # Errors
/// What the socket says; `ConnectionRefused` when nobody listens in the guest.
pub async fn connect(path: &Path) -> io::Result<UnixStream> {
    timeout(ANSWER_TIMEOUT, async {
        let mut stream = UnixStream::connect(path).await?;
        stream.write_all(format!("CONNECT {}\n", protocol::PORT).as_bytes()).await?;
        let mut greeting = Vec::with_capacity(MAX_GREETING_BYTES);
        // Byte by byte: what follows the line belongs to the stream.
        while greeting.last() != Some(&b'\n') {
            let mut byte = [0];
            if greeting.len() == MAX_GREETING_BYTES || stream.read(&mut byte).await? == 0 {
                return Err(io::ErrorKind::ConnectionRefused.into());
            }
            greeting.push(byte[0]);
        }
        if greeting.starts_with(b"OK ") { Ok(stream) } else { Err(io::ErrorKind::ConnectionRefused.into()) }
    })
    .await
    .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

/// Sends one request and reads its answer.
///
/// # Errors
/// `InvalidData` when the guest breaks the rules, `TimedOut`, or what the stream says.
pub async fn ask(stream: &mut UnixStream, request: &Request) -> io::Result<Response> {
    timeout(ANSWER_TIMEOUT, ask_patiently(stream, request))
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

/// Sends one request and reads its answer, however long that takes: a guest may be paused in between.
///
/// # Errors
/// As [`ask`], but for `TimedOut`.
pub async fn ask_patiently(stream: &mut UnixStream, request: &Request) -> io::Result<Response> {
    let frame = protocol::encode_frame(FrameKind::Message, &serde_json::to_vec(request)?)?;
    stream.write_all(&frame).await?;
    let mut header = [0; 5];
    stream.read_exact(&mut header).await?;
    let (kind, length) = protocol::decode_header(header)?;
    let mut payload = vec![0; length];
    stream.read_exact(&mut payload).await?;
    if kind != FrameKind::Message {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "expected a message"));
    }
    Ok(serde_json::from_slice(&payload)?)
}

/// Says hello.
///
/// # Errors
/// As [`ask`], and `InvalidData` when it speaks no common version.
pub async fn hello(stream: &mut UnixStream) -> io::Result<Hello> {
    match ask(stream, &Request::Hello { version: protocol::VERSION }).await? {
        Response::Hello(hello)
            if hello.version >= protocol::OLDEST_VERSION && hello.oldest_version <= protocol::VERSION =>
        {
            Ok(hello)
        }
        other => Err(io::Error::new(io::ErrorKind::InvalidData, format!("no hello: {other:?}"))),
    }
}

/// Asks for something that answers `Done`.
///
/// # Errors
/// As [`ask`], and `Other` with what the guest says went wrong.
pub async fn tell(stream: &mut UnixStream, request: &Request) -> io::Result<()> {
    match ask(stream, request).await? {
        Response::Done {} => Ok(()),
        Response::Error { code, message } => Err(io::Error::other(format!("{message} ({code})"))),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "an answer to something else")),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};
    use tokio::net::UnixListener;

    /// A guest agent behind a monitor's listener; remembers what it was asked.
    pub(crate) fn fake_guest(path: &Path) -> Arc<Mutex<Vec<Request>>> {
        let listener = UnixListener::bind(path).unwrap();
        serve_guest(listener)
    }

    pub(crate) fn serve_guest(listener: UnixListener) -> Arc<Mutex<Vec<Request>>> {
        let asked = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&asked);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, Arc::clone(&seen)));
            }
        });
        asked
    }

    async fn serve(mut stream: UnixStream, seen: Arc<Mutex<Vec<Request>>>) -> io::Result<()> {
        let mut line = [0; 13];
        stream.read_exact(&mut line).await?;
        assert_eq!(&line, b"CONNECT 1024\n");
        stream.write_all(b"OK 5\n").await?;
        loop {
            let mut header = [0; 5];
            stream.read_exact(&mut header).await?;
            let (_, length) = protocol::decode_header(header)?;
            let mut payload = vec![0; length];
            stream.read_exact(&mut payload).await?;
            let request: Request = serde_json::from_slice(&payload)?;
            let response = match request {
                Request::Hello { .. } => Response::Hello(Hello {
                    version: 1,
                    oldest_version: 1,
                    build: "fake".into(),
                    kernel: "6.1".into(),
                    os: "fake".into(),
                    boot_id: "b".into(),
                }),
                _ => Response::Done {},
            };
            seen.lock().unwrap().push(request);
            let bytes = serde_json::to_vec(&response)?;
            stream.write_all(&protocol::encode_frame(FrameKind::Message, &bytes)?).await?;
        }
    }

    #[tokio::test]
    async fn a_guest_agent_is_reached_and_asked() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vsock.sock");
        let asked = fake_guest(&path);
        let mut stream = connect(&path).await.unwrap();
        assert_eq!(hello(&mut stream).await.unwrap().kernel, "6.1");
        tell(&mut stream, &Request::MemoryOnline {}).await.unwrap();
        assert_eq!(asked.lock().unwrap().len(), 2);
    }

    #[tokio::test]
    async fn a_guest_that_breaks_the_rules_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vsock.sock");
        let listener = UnixListener::bind(&path).unwrap();
        tokio::spawn(async move {
            for answer in [&b""[..], &[b'x'; 100][..], &b"OK 5\n\x00\xff\xff\xff\xff"[..]] {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut line = [0; 13];
                stream.read_exact(&mut line).await.unwrap();
                stream.write_all(answer).await.unwrap();
                if answer.starts_with(b"OK") {
                    let _ = stream.read(&mut [0; 100]).await;
                }
            }
        });
        assert_eq!(connect(&path).await.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        assert_eq!(connect(&path).await.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        let mut stream = connect(&path).await.unwrap();
        assert_eq!(hello(&mut stream).await.unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
