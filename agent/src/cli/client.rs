//! HTTP over lathed's Unix socket.

use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use http_body_util::{BodyExt, Empty, Full, Limited, combinators::UnsyncBoxBody};
use hyper::body::{Bytes, Frame, Incoming, SizeHint};
use hyper::header::{CONTENT_TYPE, EXPECT, HOST, HeaderValue, IF_MATCH};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio::sync::oneshot;

use crate::api::wire::ErrorBody;
use crate::problem::{Kind, Problem};

/// Longest JSON answer that is read, bytes.
const MAX_ANSWER_BYTES: usize = 16 << 20;
/// Files are uploaded in pieces of this size, bytes.
const UPLOAD_PIECE_BYTES: usize = 256 << 10;

type Body = UnsyncBoxBody<Bytes, io::Error>;

/// A way to lathed. Each call opens a connection of its own.
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// For the socket at `socket`.
    pub fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    /// Reads something.
    ///
    /// # Errors
    /// lathed's own, or that it cannot be reached or understood.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Problem> {
        self.call(request(Method::GET, path, empty())?).await
    }

    /// Sends something.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub async fn send<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &impl Serialize,
        if_match: Option<u64>,
    ) -> Result<T, Problem> {
        let bytes =
            serde_json::to_vec(body).map_err(|error| Problem::internal("cannot write the request", error))?;
        let body = Full::new(Bytes::from(bytes)).map_err(|never| match never {}).boxed_unsync();
        let mut request = request(method, path, body)?;
        request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(revision) = if_match {
            request.headers_mut().insert(IF_MATCH, HeaderValue::from(revision));
        }
        self.call(request).await
    }

    /// Removes something.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub async fn delete<T: DeserializeOwned>(&self, path: &str) -> Result<T, Problem> {
        self.call(request(Method::DELETE, path, empty())?).await
    }

    /// Uploads a file's content, once lathed wants it: who is refused before has sent nothing, and hears why (RFC 9110, 10.1.1).
    ///
    /// # Errors
    /// When the file cannot be read; as [`Self::get`].
    pub async fn upload<T: DeserializeOwned>(&self, path: &str, file: &Path) -> Result<T, Problem> {
        let (wanted, when_wanted) = oneshot::channel();
        let body = FileBody::open(file, when_wanted)?.boxed_unsync();
        let mut request = request(Method::PUT, path, body)?;
        request.headers_mut().insert(EXPECT, HeaderValue::from_static("100-continue"));
        let wanted = Mutex::new(Some(wanted));
        hyper::ext::on_informational(&mut request, move |answer| {
            let wanted = wanted.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(wanted) = wanted.filter(|_| answer.status() == StatusCode::CONTINUE) {
                // Who no longer waits has been answered.
                let _ = wanted.send(());
            }
        });
        self.call(request).await
    }

    /// Starts a GET whose answer is read as it comes.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub async fn stream(&self, path: &str) -> Result<Incoming, Problem> {
        Ok(self.exchange(request(Method::GET, path, empty())?).await?.into_body())
    }

    /// Turns a connection into a raw stream of `protocol`.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub async fn upgrade(
        &self,
        path: &str,
        protocol: &'static str,
    ) -> Result<TokioIo<hyper::upgrade::Upgraded>, Problem> {
        let mut request = request(Method::POST, path, empty())?;
        request.headers_mut().insert(hyper::header::CONNECTION, HeaderValue::from_static("upgrade"));
        request.headers_mut().insert(hyper::header::UPGRADE, HeaderValue::from_static(protocol));
        let response = self.exchange(request).await?;
        let upgraded = hyper::upgrade::on(response).await;
        upgraded.map(TokioIo::new).map_err(|error| Problem::internal("lathed did not open the stream", error))
    }

    async fn call<T: DeserializeOwned>(&self, request: Request<Body>) -> Result<T, Problem> {
        let response = self.exchange(request).await?;
        let bytes = read_all(response.into_body()).await?;
        serde_json::from_slice(&bytes)
            .map_err(|error| Problem::internal("lathed answered what this lathe does not understand", error))
    }

    async fn exchange(&self, request: Request<Body>) -> Result<Response<Incoming>, Problem> {
        let stream = UnixStream::connect(&self.socket).await.map_err(|error| self.unreachable(&error))?;
        let broken = |error: hyper::Error| {
            Problem::new(
                Kind::Unavailable,
                "daemon-down",
                format!("lathed broke the connection off: {error}"),
            )
            .fix("journalctl -u lathed -n 20")
        };
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
        tokio::spawn(connection.with_upgrades());
        let response = sender.send_request(request).await.map_err(broken)?;
        if response.status().is_success() || response.status().as_u16() == 101 {
            return Ok(response);
        }
        let status = response.status().as_u16();
        Err(refusal(status, &read_all(response.into_body()).await?))
    }

    fn unreachable(&self, error: &io::Error) -> Problem {
        let socket = self.socket.display();
        match error.kind() {
            io::ErrorKind::PermissionDenied => Problem::new(
                Kind::NotPermitted,
                "not-permitted",
                format!("you may not speak to lathed at {socket}"),
            )
            .detail("members of group lathe may change things, members of lathe-view may look")
            .fix("sudo usermod -aG lathe $USER, then log in again; or use sudo"),
            _ => Problem::new(
                Kind::Unavailable,
                "daemon-down",
                format!("lathed is not running ({socket}: {})", plain(error)),
            )
            .detail(unit_state())
            .fix("sudo systemctl start lathed; journalctl -u lathed -n 20 says why it stopped"),
        }
    }
}

/// An I/O error without Rust's `(os error N)`.
pub fn plain(error: &io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or_default().to_lowercase()
}

/// What systemd knows of lathed, in words; empty where there is no systemd.
fn unit_state() -> String {
    let output = Command::new("systemctl")
        .args(["show", "lathed", "-p", "ActiveState,Result,ExecMainStatus"])
        .output();
    let Ok(output) = output else { return String::new() };
    let text = String::from_utf8_lossy(&output.stdout);
    let value = |key: &str| {
        text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('=')).unwrap_or_default()
    };
    match value("ActiveState") {
        "" => String::new(),
        state => format!(
            "systemd says: {state}, result {}, last exit status {}",
            value("Result"),
            value("ExecMainStatus")
        ),
    }
}

fn empty() -> Body {
    Empty::new().map_err(|never| match never {}).boxed_unsync()
}

fn request(method: Method, path: &str, body: Body) -> Result<Request<Body>, Problem> {
    let request = Request::builder().method(method).uri(path).header(HOST, "lathed").body(body);
    request.map_err(|error| {
        Problem::new(Kind::BadRequest, "usage", format!("`{path}` cannot be asked for: {error}"))
    })
}

async fn read_all(body: Incoming) -> Result<Bytes, Problem> {
    let collected = Limited::new(body, MAX_ANSWER_BYTES).collect().await;
    collected
        .map(http_body_util::Collected::to_bytes)
        .map_err(|error| Problem::internal("cannot read lathed's answer", error))
}

/// An error answer as a [`Problem`].
fn refusal(status: u16, body: &[u8]) -> Problem {
    let kind = match status {
        400..=402 | 405..=408 | 411..=421 => Kind::BadRequest,
        403 => Kind::NotPermitted,
        404 => Kind::NotFound,
        409 | 410 => Kind::Conflict,
        422 => Kind::Impossible,
        503 => Kind::Unavailable,
        _ => Kind::Internal,
    };
    match serde_json::from_slice::<ErrorBody>(body) {
        Ok(ErrorBody { error }) => {
            // Codes come from lathed's own fixed list, so the leak is bounded by one per process.
            let code: &'static str = Box::leak(error.code.into_boxed_str());
            Problem { kind, code, message: error.message, detail: error.detail, fix: error.fix }
        }
        Err(_) => {
            Problem::internal(format!("lathed answered with status {status}"), String::from_utf8_lossy(body))
        }
    }
}

/// A file as a request body, read in pieces.
struct FileBody {
    file: std::fs::File,
    left: u64,
    gate: Gate,
}

/// Whether anything may be sent.
enum Gate {
    /// Not before lathed says that it wants it.
    Shut(oneshot::Receiver<()>),
    Open,
    /// It was refused, or there is nobody any more: who asked hears of that, and the connection may still ask for more.
    Refused,
}

impl Gate {
    fn poll_open(&mut self, context: &mut Context<'_>) -> Poll<()> {
        if let Self::Shut(when_wanted) = self {
            let wanted = ready!(Pin::new(when_wanted).poll(context)).is_ok();
            *self = if wanted { Self::Open } else { Self::Refused };
        }
        if matches!(self, Self::Open) { Poll::Ready(()) } else { Poll::Pending }
    }
}

impl FileBody {
    fn open(path: &Path, when_wanted: oneshot::Receiver<()>) -> Result<Self, Problem> {
        let cannot = |error: io::Error| {
            Problem::new(
                Kind::BadRequest,
                "no-such-file",
                format!("cannot read {}: {}", path.display(), plain(&error)),
            )
        };
        let file = std::fs::File::open(path).map_err(cannot)?;
        let metadata = file.metadata().map_err(cannot)?;
        if !metadata.is_file() {
            let problem = Problem::new(
                Kind::BadRequest,
                "no-such-file",
                format!("{} is not a regular file", path.display()),
            );
            let in_place = format!("a block device is used in place: --disk in-place:{}", path.display());
            let block_device = std::os::unix::fs::FileTypeExt::is_block_device(&metadata.file_type());
            return Err(if block_device { problem.fix(in_place) } else { problem });
        }
        Ok(Self { file, left: metadata.len(), gate: Gate::Shut(when_wanted) })
    }
}

impl hyper::body::Body for FileBody {
    type Data = Bytes;
    type Error = io::Error;

    /// Reading blocks: the command has nothing else to do meanwhile.
    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        let body = self.get_mut();
        if body.left == 0 {
            return Poll::Ready(None);
        }
        ready!(body.gate.poll_open(context));
        let mut piece =
            vec![0; UPLOAD_PIECE_BYTES.min(usize::try_from(body.left).unwrap_or(UPLOAD_PIECE_BYTES))];
        match io::Read::read(&mut body.file, &mut piece) {
            Ok(0) => Poll::Ready(Some(Err(io::Error::other("the file became shorter while it was read")))),
            Ok(read) => {
                body.left -= read as u64;
                piece.truncate(read);
                Poll::Ready(Some(Ok(Frame::data(piece.into()))))
            }
            Err(error) => Poll::Ready(Some(Err(error))),
        }
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_answer_becomes_the_same_problem_again() {
        let problem = Problem::new(Kind::Conflict, "name-taken", "there is a machine `web` already")
            .fix("lathe rm web");
        let body = serde_json::to_vec(&ErrorBody { error: problem.view() }).unwrap();
        assert_eq!(refusal(409, &body), problem);
        assert_eq!(refusal(502, b"<html>").kind, Kind::Internal);
    }

    /// The connection asks once more for a body that nobody wants when other answers wake it.
    #[test]
    fn a_body_that_nobody_wants_may_be_asked_for_again_and_sends_nothing() {
        use hyper::body::Body as _;
        let (folder, mut context) =
            (tempfile::tempdir().unwrap(), Context::from_waker(std::task::Waker::noop()));
        let file = folder.path().join("file");
        std::fs::write(&file, b"something").unwrap();
        let (wanted, when_wanted) = oneshot::channel();
        let mut body = FileBody::open(&file, when_wanted).unwrap();
        assert!(Pin::new(&mut body).poll_frame(&mut context).is_pending());
        drop(wanted);
        for _ in 0..3 {
            assert!(Pin::new(&mut body).poll_frame(&mut context).is_pending());
        }
    }

    /// A lathed of one connection: reads the head, says `answer`, then all there is to read, and closes. What it has read.
    fn says(socket: &Path, answer: Vec<u8>, then: Vec<u8>) -> std::thread::JoinHandle<Vec<u8>> {
        use io::{Read, Write};
        let listener = std::os::unix::net::UnixListener::bind(socket).unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let (mut seen, mut piece) = (Vec::new(), [0; 4096]);
            while !seen.ends_with(b"\r\n\r\n") {
                let read = stream.read(&mut piece).unwrap();
                assert!(read > 0, "the head is whole");
                seen.extend_from_slice(&piece[..read]);
            }
            stream.write_all(&answer).unwrap();
            if !then.is_empty() {
                while !seen.ends_with(b"the end") {
                    let read = stream.read(&mut piece).unwrap();
                    assert!(read > 0, "the body is whole");
                    seen.extend_from_slice(&piece[..read]);
                }
                stream.write_all(&then).unwrap();
            }
            seen
        })
    }

    fn answer(status: &str, body: &[u8]) -> Vec<u8> {
        let head = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n", body.len());
        [head.as_bytes(), body].concat()
    }

    #[tokio::test]
    async fn who_is_refused_before_sending_hears_why() {
        let folder = tempfile::tempdir().unwrap();
        let (socket, file) = (folder.path().join("sock"), folder.path().join("disk"));
        std::fs::write(&file, vec![7; 8 << 20]).unwrap();
        let taken = Problem::new(Kind::Conflict, "image-exists", "there is an image `web` already");
        let body = serde_json::to_vec(&ErrorBody { error: taken.view() }).unwrap();
        let lathed = says(&socket, answer("409 Conflict", &body), Vec::new());
        let refused = Client::new(socket).upload::<serde_json::Value>("/v1/images/web", &file).await;
        assert_eq!(refused.unwrap_err(), taken);
        assert!(lathed.join().unwrap().ends_with(b"\r\n\r\n"), "not a byte of the file was sent");
    }

    #[tokio::test]
    async fn a_file_is_sent_once_it_is_wanted() {
        let folder = tempfile::tempdir().unwrap();
        let (socket, file) = (folder.path().join("sock"), folder.path().join("disk"));
        std::fs::write(&file, [vec![7; 1 << 20], b"the end".to_vec()].concat()).unwrap();
        let go = b"HTTP/1.1 100 Continue\r\n\r\n".to_vec();
        let lathed = says(&socket, go, answer("200 OK", b"{\"got\": true}"));
        let view: serde_json::Value = Client::new(socket).upload("/v1/uploads", &file).await.unwrap();
        assert_eq!(view["got"], true);
        assert!(lathed.join().unwrap().len() > 1 << 20);
    }

    #[test]
    fn system_errors_are_told_in_words() {
        assert_eq!(plain(&io::Error::from_raw_os_error(111)), "connection refused");
    }
}
