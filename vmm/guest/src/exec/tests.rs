//! Commands over a socket pair that stands for vsock.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use lathe_guest::protocol::{Exec, FrameKind, Request, Response, Tty, read_frame, write_frame};

use crate::connection::Connection;
use crate::serve;

struct Host {
    stream: UnixStream,
    server: JoinHandle<std::io::Result<()>>,
}

#[derive(Debug, Default)]
struct Seen {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    messages: Vec<Response>,
}

fn shell(script: &str) -> Exec {
    Exec { argv: vec!["/bin/sh".into(), "-c".into(), script.into()], env: Vec::new(), cwd: None, tty: None }
}

impl Host {
    fn exec(exec: Exec) -> Self {
        let (stream, guest) = UnixStream::pair().unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let server = std::thread::spawn(move || serve::session(&mut Connection::new(guest.into()).unwrap()));
        let mut host = Self { stream, server };
        host.message(&Request::Exec(exec));
        host
    }

    fn message(&mut self, request: &Request) {
        write_frame(&mut self.stream, FrameKind::Message, &serde_json::to_vec(request).unwrap()).unwrap();
    }

    fn stdin(&mut self, bytes: &[u8]) {
        write_frame(&mut self.stream, FrameKind::Stdin, bytes).unwrap();
    }

    /// Reads until `done` says so or the connection ends.
    fn until(&mut self, seen: &mut Seen, done: impl Fn(&Seen) -> bool) {
        while !done(seen) {
            let Ok((kind, payload)) = read_frame(&mut self.stream) else { return };
            match kind {
                FrameKind::Stdout => seen.stdout.extend(payload),
                FrameKind::Stderr => seen.stderr.extend(payload),
                FrameKind::Message => seen.messages.push(serde_json::from_slice(&payload).unwrap()),
                FrameKind::Stdin => panic!("a guest sends no input"),
            }
        }
    }

    fn finish(mut self) -> Seen {
        let mut seen = Seen::default();
        self.until(&mut seen, |_| false);
        self.server.join().unwrap().unwrap();
        seen
    }
}

fn exited(seen: &Seen) -> (i32, Option<i32>) {
    match seen.messages.last() {
        Some(Response::Exited { code, signal }) => (*code, *signal),
        other => panic!("not an end: {other:?}"),
    }
}

fn error_code(seen: &Seen) -> &str {
    match &seen.messages[..] {
        [Response::Error { code, .. }] => code,
        other => panic!("not one error: {other:?}"),
    }
}

#[test]
fn streams_and_status_come_apart() {
    let seen = Host::exec(shell("echo out; echo err >&2; exit 7")).finish();
    assert_eq!((&seen.stdout[..], &seen.stderr[..]), (&b"out\n"[..], &b"err\n"[..]));
    assert!(matches!(seen.messages[0], Response::Started { pid } if pid > 1));
    assert_eq!(exited(&seen), (7, None));
}

#[test]
fn a_signal_ends_a_command_and_is_reported() {
    let mut host = Host::exec(shell("echo ready; exec sleep 60"));
    let mut seen = Seen::default();
    host.until(&mut seen, |seen| !seen.stdout.is_empty());
    host.message(&Request::Signal { number: 34 });
    host.until(&mut seen, |seen| seen.messages.len() == 2);
    assert_eq!(exited(&seen), (128 + 34, Some(34)), "real-time signals too");
}

#[test]
fn input_passes_through_in_full_with_a_slow_reader() {
    let mut host = Host::exec(shell("cat"));
    let mut writer = host.stream.try_clone().unwrap();
    let sent: Vec<u8> = (0..3_000_000u32).map(|at| (at % 251) as u8).collect();
    let copy = sent.clone();
    let feeder = std::thread::spawn(move || {
        for part in copy.chunks(50_000) {
            write_frame(&mut writer, FrameKind::Stdin, part).unwrap();
        }
        write_frame(&mut writer, FrameKind::Stdin, b"").unwrap();
    });
    let mut seen = Seen::default();
    host.until(&mut seen, |seen| seen.messages.len() == 2);
    feeder.join().unwrap();
    assert_eq!(seen.stdout.len(), sent.len());
    assert!(seen.stdout == sent);
    assert_eq!(exited(&seen), (0, None));
}

#[test]
fn a_command_that_ignores_its_input_still_ends() {
    let mut host = Host::exec(shell("exec 0<&-; echo closed; read x < /dev/null; exit 3"));
    let mut seen = Seen::default();
    host.until(&mut seen, |seen| !seen.stdout.is_empty());
    // The command may have gone already; then so has the connection.
    let _ = host.stream.write_all(&[1, 1, 0, 0, 0, b'x']);
    host.until(&mut seen, |seen| seen.messages.len() == 2);
    assert_eq!(exited(&seen), (3, None));
}

#[test]
fn the_group_ends_with_the_connection() {
    let mut host = Host::exec(shell("trap '' HUP; sleep 60 & echo $!; wait"));
    let mut seen = Seen::default();
    host.until(&mut seen, |seen| seen.stdout.ends_with(b"\n"));
    let background: i32 = String::from_utf8(seen.stdout).unwrap().trim().parse().unwrap();
    assert!(crate::sys::kill(background, 0).is_ok());
    drop(host.stream);
    host.server.join().unwrap().unwrap();
    // Killed: it dies when it is next scheduled, and whoever adopts it may not have collected it yet.
    let begun = Instant::now();
    loop {
        let status = std::fs::read_to_string(format!("/proc/{background}/stat")).unwrap_or_default();
        if status.is_empty() || status.contains(") Z") || status.contains(") X") {
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(20), "{status}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_background_process_does_not_hold_the_end_up() {
    let seen = Host::exec(shell("echo now; sleep 20 &")).finish();
    assert_eq!(seen.stdout, b"now\n");
    assert_eq!(exited(&seen), (0, None));
}

#[test]
fn a_terminal_has_a_size_an_echo_and_control_keys() {
    let tty = Tty { columns: 91, rows: 23, term: "vt100".into() };
    let script = "tty >/dev/null || exit 9; stty size; echo $TERM; read line; echo got $line; exec cat";
    let mut host = Host::exec(Exec { tty: Some(tty), ..shell(script) });
    let mut seen = Seen::default();
    let text = |seen: &Seen| String::from_utf8_lossy(&seen.stdout).into_owned();
    host.until(&mut seen, |seen| text(seen).contains("vt100"));
    assert!(text(&seen).contains("23 91"), "{}", text(&seen));
    host.stdin(b"hello\n");
    host.until(&mut seen, |seen| text(seen).contains("got hello"));
    host.stdin(b"\x03");
    host.until(&mut seen, |seen| seen.messages.len() == 2);
    assert_eq!(exited(&seen), (130, Some(2)), "{}", text(&seen));
}

#[test]
fn a_terminal_can_change_its_size() {
    let tty = Tty { columns: 80, rows: 24, term: "vt100".into() };
    let script = "trap 'stty size; exit 4' WINCH; echo ready; while :; do sleep 0.05; done";
    let mut host = Host::exec(Exec { tty: Some(tty), ..shell(script) });
    let mut seen = Seen::default();
    host.until(&mut seen, |seen| seen.stdout.starts_with(b"ready"));
    host.message(&Request::WindowSize { columns: 132, rows: 50 });
    host.until(&mut seen, |seen| seen.messages.len() == 2);
    assert!(String::from_utf8_lossy(&seen.stdout).contains("50 132"));
    assert_eq!(exited(&seen), (4, None));
}

#[test]
fn the_environment_is_made_new() {
    let mut exec = shell("env");
    exec.env = vec!["FOO=a=b".into()];
    let text = String::from_utf8(Host::exec(exec).finish().stdout).unwrap();
    assert!(text.contains("FOO=a=b\n") && text.contains("HOME=/root\n"));
    assert!(!text.contains("CARGO"), "{text}");
}

#[test]
fn what_cannot_run_is_said() {
    let program =
        |argv: &[&str]| Exec { argv: argv.iter().map(|word| (*word).into()).collect(), ..shell("") };
    assert_eq!(error_code(&Host::exec(program(&[])).finish()), "bad-request");
    assert_eq!(error_code(&Host::exec(program(&["/no/such"])).finish()), "not-found");
    assert_eq!(error_code(&Host::exec(program(&["/"])).finish()), "not-permitted");
    assert_eq!(error_code(&Host::exec(program(&["a\0b"])).finish()), "bad-request");
    let exec = Exec { env: vec!["=x".into()], ..shell("") };
    assert_eq!(error_code(&Host::exec(exec).finish()), "bad-request");
    let exec = Exec { cwd: Some("/no/such".into()), ..shell("") };
    assert_eq!(error_code(&Host::exec(exec).finish()), "not-found");
}

#[test]
fn a_host_that_breaks_the_rules_loses_its_command() {
    let mut host = Host::exec(shell("echo ready; exec sleep 60"));
    let mut seen = Seen::default();
    host.until(&mut seen, |seen| !seen.stdout.is_empty());
    host.message(&Request::Usage {});
    host.until(&mut seen, |_| false);
    assert_eq!(seen.messages.len(), 1);
    assert!(host.server.join().unwrap().is_err());
}
