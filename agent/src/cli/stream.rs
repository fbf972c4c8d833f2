//! `exec` and `console`: bytes between this terminal and a machine, through lathed.

use std::io::IsTerminal;
use std::os::fd::AsFd;

use hyper_util::rt::TokioIo;
use lathe_guest::protocol::{self, Exec, FrameKind, Request, Response, Tty};
use nix::sys::termios::{self, SetArg, Termios};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use crate::cli::args::ExecArgs;
use crate::cli::client::Client;
use crate::cli::output::say;
use crate::cli::{Verdict, exit};
use crate::problem::{Kind, Problem};

/// Standard input is read in pieces of this size, bytes.
const PIECE_BYTES: usize = 16 << 10;
/// Ctrl-], which leaves a console.
const LEAVE: u8 = 0x1d;

/// Puts the terminal into raw mode until dropped.
struct RawMode {
    before: Termios,
}

impl RawMode {
    fn enter() -> Result<Self, Problem> {
        let failed = |error| Problem::internal("cannot put the terminal into raw mode", error);
        let before = termios::tcgetattr(std::io::stdin().as_fd()).map_err(failed)?;
        let mut raw = before.clone();
        termios::cfmakeraw(&mut raw);
        termios::tcsetattr(std::io::stdin().as_fd(), SetArg::TCSANOW, &raw).map_err(failed)?;
        Ok(Self { before })
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // Nothing can be done about a terminal that is gone.
        let _gone = termios::tcsetattr(std::io::stdin().as_fd(), SetArg::TCSANOW, &self.before);
    }
}

pub(super) fn window_size() -> (u16, u16) {
    rustix::termios::tcgetwinsize(std::io::stdout())
        .map_or((80, 24), |size| (size.ws_col.max(1), size.ws_row.max(1)))
}

/// Standard input as a channel: reading it blocks, so a thread of its own does. An empty piece is the end of the file.
pub(super) fn standard_input() -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel(4);
    std::thread::spawn(move || {
        let mut buffer = vec![0; PIECE_BYTES];
        while let Ok(read) = std::io::Read::read(&mut std::io::stdin(), &mut buffer) {
            if sender.blocking_send(buffer[..read].to_vec()).is_err() || read == 0 {
                return;
            }
        }
    });
    receiver
}

/// `lathe exec`: ends with the command's own exit code.
pub async fn exec(client: &Client, args: ExecArgs) -> Verdict {
    let terminals = std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
    let with_tty = args.tty || (terminals && !args.no_tty);
    let tty = with_tty.then(|| {
        let (columns, rows) = window_size();
        Tty { columns, rows, term: std::env::var("TERM").unwrap_or_else(|_| "dumb".to_owned()) }
    });
    let stream = client.upgrade(&format!("/v1/machines/{}/exec", args.name), "lathe-guest").await?;
    let (reader, mut writer) = tokio::io::split(stream);
    let request = Request::Exec(Exec { argv: args.command, env: args.env, cwd: args.cwd, tty });
    send(&mut writer, FrameKind::Message, &message(&request)?).await?;
    let raw = if with_tty && std::io::stdin().is_terminal() { Some(RawMode::enter()?) } else { None };
    let code = converse(reader, writer, raw.is_some()).await;
    drop(raw);
    code
}

fn message(request: &Request) -> Result<Vec<u8>, Problem> {
    serde_json::to_vec(request).map_err(|error| Problem::internal("cannot write the request", error))
}

fn broke_off(error: std::io::Error) -> Problem {
    Problem::new(
        Kind::Unavailable,
        "guest-agent-unreachable",
        format!("the connection into the machine broke off: {}", super::client::plain(&error)),
    )
}

async fn send(
    writer: &mut (impl AsyncWrite + Unpin),
    kind: FrameKind,
    payload: &[u8],
) -> Result<(), Problem> {
    let frame = protocol::encode_frame(kind, payload).map_err(broke_off)?;
    writer.write_all(&frame).await.map_err(broke_off)?;
    writer.flush().await.map_err(broke_off)
}

async fn receive(reader: &mut (impl AsyncRead + Unpin)) -> Result<(FrameKind, Vec<u8>), Problem> {
    let mut header = [0; 5];
    reader.read_exact(&mut header).await.map_err(broke_off)?;
    let (kind, length) = protocol::decode_header(header).map_err(broke_off)?;
    let mut payload = vec![0; length];
    reader.read_exact(&mut payload).await.map_err(broke_off)?;
    Ok((kind, payload))
}

/// Frames from the guest as a channel, so that waiting for one can be given up without losing half of it.
fn frames(
    mut reader: impl AsyncRead + Unpin + Send + 'static,
) -> mpsc::Receiver<Result<(FrameKind, Vec<u8>), Problem>> {
    let (sender, receiver) = mpsc::channel(4);
    tokio::spawn(async move {
        loop {
            let frame = receive(&mut reader).await;
            let last = frame.is_err();
            if sender.send(frame).await.is_err() || last {
                return;
            }
        }
    });
    receiver
}

async fn converse(
    reader: impl AsyncRead + Unpin + Send + 'static,
    mut writer: impl AsyncWrite + Unpin,
    raw: bool,
) -> Verdict {
    let mut input = standard_input();
    let mut input_open = true;
    let mut frames = frames(reader);
    let mut resized = signal(SignalKind::window_change())
        .map_err(|error| Problem::internal("cannot watch the window's size", error))?;
    loop {
        tokio::select! {
            frame = frames.recv() => {
                let Some(frame) = frame else { return Err(broke_off(std::io::ErrorKind::UnexpectedEof.into())) };
                let (kind, payload) = frame?;
                if let Some(code) = take(kind, &payload)? {
                    return Ok(code);
                }
            }
            piece = input.recv(), if input_open => {
                let piece = piece.unwrap_or_default();
                input_open = !piece.is_empty();
                send(&mut writer, FrameKind::Stdin, &piece).await?;
            }
            _ = resized.recv(), if raw => {
                let (columns, rows) = window_size();
                send(&mut writer, FrameKind::Message, &message(&Request::WindowSize { columns, rows })?).await?;
            }
        }
    }
}

/// Deals with one frame of the guest; the exit code when it was the last.
fn take(kind: FrameKind, payload: &[u8]) -> Result<Option<u8>, Problem> {
    let written = match kind {
        FrameKind::Stdout => write_out(std::io::stdout(), payload),
        FrameKind::Stderr => write_out(std::io::stderr(), payload),
        FrameKind::Stdin => return Err(broke_off(std::io::ErrorKind::InvalidData.into())),
        FrameKind::Message => return answer(payload),
    };
    written.map_err(|error| Problem::internal("cannot write the command's output", error))?;
    Ok(None)
}

/// Writing blocks: the command has nothing better to do than wait for its reader.
fn write_out(mut out: impl std::io::Write, payload: &[u8]) -> std::io::Result<()> {
    out.write_all(payload)?;
    out.flush()
}

fn answer(payload: &[u8]) -> Result<Option<u8>, Problem> {
    match serde_json::from_slice(payload) {
        Ok(Response::Exited { code, .. }) => {
            Ok(Some(u8::try_from(code.clamp(0, 255)).unwrap_or(exit::FAILED)))
        }
        Ok(Response::Error { code, message }) => {
            let (kind, what) = match code.as_str() {
                "not-found" => (Kind::NotFound, "command-not-found"),
                _ => (Kind::Internal, "exec-failed"),
            };
            Err(Problem::new(kind, what, format!("inside the machine: {message}")))
        }
        Ok(_) => Ok(None),
        Err(error) => {
            Err(Problem::internal("the guest agent answered what this lathe does not understand", error))
        }
    }
}

/// `lathe console`: raw bytes both ways until Ctrl-] or the machine ends.
pub async fn console(client: &Client, name: &str) -> Verdict {
    let stream: TokioIo<_> = client.upgrade(&format!("/v1/machines/{name}/console"), "lathe-console").await?;
    let (mut reader, mut writer) = tokio::io::split(stream);
    let raw = if std::io::stdin().is_terminal() {
        say(&format!("Console of {name}. Leave it with Ctrl-]"));
        Some(RawMode::enter()?)
    } else {
        None
    };
    let mut input = standard_input();
    let mut input_open = true;
    let mut buffer = vec![0; PIECE_BYTES];
    loop {
        tokio::select! {
            read = reader.read(&mut buffer) => match read {
                Ok(0) => break,
                Ok(read) => write_out(std::io::stdout(), &buffer[..read]).map_err(broke_off)?,
                Err(error) => return Err(broke_off(error)),
            },
            piece = input.recv(), if input_open => {
                let piece = piece.unwrap_or_default();
                input_open = !piece.is_empty();
                let leave = piece.iter().position(|byte| *byte == LEAVE);
                writer.write_all(&piece[..leave.unwrap_or(piece.len())]).await.map_err(broke_off)?;
                if leave.is_some() && raw.is_some() {
                    break;
                }
            }
        }
    }
    drop(raw);
    say("");
    Ok(exit::DONE)
}
