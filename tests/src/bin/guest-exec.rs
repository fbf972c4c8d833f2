//! `guest-exec SOCKET COMMAND [ARG]…`: runs a command in a machine through the monitor's vsock socket, as lathed does, for scenarios
//! of the monitor alone. Streams come through; the exit status is the command's, 125 if the guest could not be reached or refused.

use std::error::Error;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use lathe_guest::protocol::{Exec, FrameKind, PORT, Request, Response, read_frame, write_frame};

/// Exit status: no command was run.
const UNREACHED: u8 = 125;
/// The longest answer to CONNECT, bytes.
const MAX_ANSWER: usize = 64;

fn connect(path: &str) -> Result<UnixStream, Box<dyn Error>> {
    let mut stream = UnixStream::connect(path)?;
    writeln!(stream, "CONNECT {PORT}")?;
    let mut answer = Vec::new();
    let mut byte = [0];
    while byte != *b"\n" && answer.len() < MAX_ANSWER {
        stream.read_exact(&mut byte)?;
        answer.push(byte[0]);
    }
    if !answer.starts_with(b"OK ") {
        return Err(format!("the monitor answers {:?}", String::from_utf8_lossy(&answer)).into());
    }
    Ok(stream)
}

fn run(socket: &str, argv: Vec<String>) -> Result<u8, Box<dyn Error>> {
    let mut stream = connect(socket)?;
    let request = Request::Exec(Exec { argv, env: Vec::new(), cwd: None, tty: None });
    write_frame(&mut stream, FrameKind::Message, &serde_json::to_vec(&request)?)?;
    write_frame(&mut stream, FrameKind::Stdin, &[])?;
    loop {
        let (kind, payload) = read_frame(&mut stream)?;
        match kind {
            FrameKind::Stdout => io::stdout().write_all(&payload)?,
            FrameKind::Stderr => io::stderr().write_all(&payload)?,
            FrameKind::Stdin => return Err("the guest sends input".into()),
            FrameKind::Message => match serde_json::from_slice(&payload)? {
                Response::Started { .. } => {}
                Response::Exited { code, .. } => return Ok(u8::try_from(code)?),
                other => return Err(format!("the guest answers {other:?}").into()),
            },
        }
    }
}

fn main() -> ExitCode {
    let mut words = std::env::args().skip(1);
    let Some(socket) = words.next() else {
        eprintln!("usage: guest-exec SOCKET COMMAND [ARG]...");
        return ExitCode::from(UNREACHED);
    };
    match run(&socket, words.collect()) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("guest-exec: {error}");
            ExitCode::from(UNREACHED)
        }
    }
}
