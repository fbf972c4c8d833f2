//! `lathe top` on a terminal of its own, against a lathed that answers what the golden files say.

#![allow(clippy::unwrap_used, reason = "whatever fails here fails a test")]

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::pty::openpty;
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{Termios, tcgetattr};
use nix::unistd::Pid;
use rustix::termios::{Winsize, tcsetwinsize};

/// Far more than anything here takes.
const PATIENCE: Duration = Duration::from_secs(120);
const ENTER: &str = "\x1b[?1049h";
const LEAVE: &str = "\x1b[?25h\x1b[?1049l";

fn until(what: &str, mut there: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !there() {
        assert!(begun.elapsed() < PATIENCE, "{what} does not come");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn golden(name: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)).unwrap()
}

/// Answers, and remembers what it was asked to change.
struct Lathed {
    folder: tempfile::TempDir,
    changes: Arc<Mutex<Vec<String>>>,
}

impl Lathed {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("sock")).unwrap();
        let changes: Arc<Mutex<Vec<String>>> = Arc::default();
        let heard = Arc::clone(&changes);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                answer(stream.unwrap(), &heard);
            }
        });
        Self { folder, changes }
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("sock")
    }

    fn lathe(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lathe"));
        command.args(args).env("LATHE_SOCKET", self.socket()).env("TERM", "xterm");
        command.env_remove("NO_COLOR").env_remove("COLUMNS");
        command
    }

    fn changes(&self) -> Vec<String> {
        self.changes.lock().unwrap().clone()
    }
}

/// One request; only its head matters.
fn answer(mut stream: UnixStream, changes: &Mutex<Vec<String>>) {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        if stream.read(&mut byte).unwrap_or(0) == 0 {
            return;
        }
        head.push(byte[0]);
    }
    let line = String::from_utf8_lossy(&head).lines().next().unwrap_or_default().to_owned();
    let body = match line.split(' ').take(2).collect::<Vec<_>>()[..] {
        ["GET", "/v1/host"] => golden("host.json"),
        ["GET", "/v1/machines"] => golden("machines.json"),
        ["GET", "/v1/machines/web"] => golden("machine.json"),
        ["PATCH", path] => {
            changes.lock().unwrap().push(path.to_owned());
            golden("resize.json")
        }
        _ => panic!("nobody expects {line}"),
    };
    let length = body.len();
    let head = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n"
    );
    // Whoever asked may have gone.
    let _ = stream.write_all((head + &body).as_bytes());
}

/// `lathe top` and its terminal.
struct Terminal {
    keys: File,
    side: OwnedFd,
    before: Termios,
    shown: Arc<Mutex<String>>,
    child: Child,
}

impl Terminal {
    fn start(mut command: Command) -> Self {
        let pty = openpty(None, None).unwrap();
        let size = Winsize { ws_col: 100, ws_row: 30, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&pty.master, size).unwrap();
        let before = tcgetattr(&pty.slave).unwrap();
        let side = || Stdio::from(pty.slave.try_clone().unwrap());
        let child = command.stdin(side()).stdout(side()).stderr(side()).spawn().unwrap();
        let shown: Arc<Mutex<String>> = Arc::default();
        let (mut reader, seen) = (File::from(pty.master.try_clone().unwrap()), Arc::clone(&shown));
        std::thread::spawn(move || {
            let mut piece = [0; 4096];
            while let Ok(count @ 1..) = reader.read(&mut piece) {
                seen.lock().unwrap().push_str(&String::from_utf8_lossy(&piece[..count]));
            }
        });
        Self { keys: File::from(pty.master), side: pty.slave, before, shown, child }
    }

    fn shows(&self, text: &str) {
        until(text, || self.shown.lock().unwrap().contains(text));
    }

    fn press(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).unwrap();
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(i32::try_from(self.child.id()).unwrap()), signal).unwrap();
    }

    fn end(&mut self) -> ExitStatus {
        let mut status = None;
        until("the end", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }
}

#[test]
fn keys_run_what_stands_at_the_bottom_after_enter_and_the_terminal_is_as_before() {
    let lathed = Lathed::start();
    let mut terminal = Terminal::start(lathed.lathe(&["top"]));
    terminal.shows(ENTER);
    terminal.shows(">web");
    terminal.press("+");
    terminal.shows("$ lathe resize web --cpu +10%   <- Enter runs it");
    assert_eq!(lathed.changes(), [""; 0], "nothing runs before Enter");
    terminal.press("\r");
    until("the change", || lathed.changes() == ["/v1/machines/web"]);
    // Of another size, and another one.
    terminal.shown.lock().unwrap().clear();
    tcsetwinsize(&terminal.side, Winsize { ws_col: 40, ws_row: 10, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
    terminal.signal(Signal::SIGWINCH);
    terminal.shows("\x1b[2J");
    terminal.shows("\x1b[10;1H");
    terminal.press("q");
    assert!(terminal.end().success());
    terminal.shows(LEAVE);
    assert_eq!(tcgetattr(&terminal.side).unwrap(), terminal.before);
    assert_eq!(lathed.changes().len(), 1);
}

#[test]
fn a_signal_gives_the_terminal_back() {
    let lathed = Lathed::start();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        let mut terminal = Terminal::start(lathed.lathe(&["top"]));
        terminal.shows(">web");
        assert_ne!(tcgetattr(&terminal.side).unwrap(), terminal.before, "keys come one by one");
        terminal.signal(signal);
        assert!(terminal.end().success());
        terminal.shows(LEAVE);
        assert_eq!(tcgetattr(&terminal.side).unwrap(), terminal.before);
    }
}

#[test]
fn a_lathed_that_goes_is_told_and_the_last_picture_stays() {
    let lathed = Lathed::start();
    let mut terminal = Terminal::start(lathed.lathe(&["top"]));
    terminal.shows(">web");
    std::fs::remove_file(lathed.socket()).unwrap();
    terminal.shows("not of now: lathed is not running");
    terminal.press("\x03");
    assert!(terminal.end().success());
}

fn output(command: &mut Command) -> Output {
    command.stdin(Stdio::null()).output().unwrap()
}

#[test]
fn without_a_terminal_there_is_one_plain_picture() {
    let lathed = Lathed::start();
    let plain = output(&mut lathed.lathe(&["top"]));
    let text = String::from_utf8(plain.stdout).unwrap();
    assert!(plain.status.success() && text.contains("NAME") && text.contains(" web "), "{text}");
    assert!(!text.contains('\x1b') && !text.contains("quit"), "{text}");
    let json = output(&mut lathed.lathe(&["top", "--json"]));
    let view: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!((&view["schema"], &view["machines"][0]["name"]), (&1.into(), &"web".into()));
    assert_eq!(view["host"]["name"], "web-03");
    for (args, term) in [(&["top", "--once"][..], "xterm"), (&["top"][..], "dumb")] {
        let mut command = lathed.lathe(args);
        command.env("TERM", term);
        let mut terminal = Terminal::start(command);
        assert!(terminal.end().success());
        terminal.shows(" web ");
        assert!(!terminal.shown.lock().unwrap().contains('\x1b'));
    }
    let nobody = output(lathed.lathe(&["top"]).env("LATHE_SOCKET", lathed.folder.path().join("none")));
    assert_eq!(nobody.status.code(), Some(7), "lathed is not running");
}
