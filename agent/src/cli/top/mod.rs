//! `lathe top`: the host and its machines, worst delivered first, once a second.
//!
//! ```text
//! lathed ──GET /v1/host, /v1/machines──► State ──frame──► terminal
//! keys ──► State::press ──► the command at the bottom ──Enter──► a lathe of its own runs exactly that
//! ```
//! | file | what |
//! |---|---|
//! | [`state`] | what is shown and what keys do to it, pure |
//! | [`frame`] | the picture of it in a given size, pure |
//! | [`keys`] | keys from the bytes of a terminal |
//! | `terminal` | the terminal as a screen, given back however this ends |
//!
//! Nothing is changed by looking: whatever changes something is a command that stands at the bottom, and runs after Enter.

pub mod frame;
pub mod keys;
pub mod state;
mod terminal;

use std::future::{Future, pending};
use std::io::IsTerminal;
use std::path::Path;
use std::pin::Pin;
use std::process::Stdio;
use std::time::Duration;

use serde::Serialize;
use tokio::process::Command;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, timeout};

use self::keys::Keys;
use self::state::{Action, State, sort_worst_first};
use self::terminal::Screen;
use super::args::{DEFAULT_SOCKET, TopArgs};
use super::output::{print, print_json};
use super::stream::{standard_input, window_size};
use crate::api::wire::{HostView, MachineList, MachineView, SCHEMA};
use crate::cli::client::Client;
use crate::cli::{Verdict, exit};
use crate::problem::{Kind, Problem};

/// Between two readings.
const INTERVAL: Duration = Duration::from_secs(1);
/// How long lathed may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// What belongs to an Escape follows within this time.
const SEQUENCE_TIMEOUT: Duration = Duration::from_millis(50);
/// Columns where there is no terminal and `COLUMNS` does not tell.
const PLAIN_COLUMNS: usize = 120;
/// What is shown of what a command said, characters.
const MAX_SAID: usize = 400;

/// `lathe top --json`.
#[derive(Debug, Serialize)]
struct TopView {
    /// Always [`SCHEMA`].
    schema: u32,
    /// As `lathe host --json`.
    host: HostView,
    /// As `lathe list --json`, worst delivered first.
    machines: Vec<MachineView>,
}

/// `lathe top`.
pub async fn top(client: &Client, json: bool, socket: &Path, args: &TopArgs) -> Verdict {
    let (host, mut machines) = read(client).await?;
    if json {
        sort_worst_first(&mut machines);
        print_json(&TopView { schema: SCHEMA, host, machines })?;
        return Ok(exit::DONE);
    }
    let mut state = State::new(host, machines);
    let out = std::io::stdout();
    let set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    let dumb = std::env::var_os("TERM").is_none_or(|term| term.is_empty() || term == "dumb");
    if args.once || dumb || !out.is_terminal() {
        print(&frame::plain(&state, plain_columns(out.is_terminal())));
        return Ok(exit::DONE);
    }
    state.colour = !set("NO_COLOR");
    if socket != Path::new(DEFAULT_SOCKET) && !set("LATHE_SOCKET") {
        state.program = format!("lathe --socket {}", quoted(&socket.to_string_lossy()));
    }
    watch(client, socket, state).await
}

/// A word of a command line, fit to be pasted into a shell.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-".contains(c);
    if word.chars().all(plain) { word.to_owned() } else { format!("'{}'", word.replace('\'', r"'\''")) }
}

fn plain_columns(terminal: bool) -> usize {
    let told = std::env::var("COLUMNS").ok().and_then(|columns| columns.parse().ok());
    told.unwrap_or_else(|| if terminal { usize::from(window_size().0) } else { PLAIN_COLUMNS })
}

async fn read(client: &Client) -> Result<(HostView, Vec<MachineView>), Problem> {
    let both = async {
        let host = client.get("/v1/host").await?;
        let list: MachineList = client.get("/v1/machines").await?;
        Ok((host, list.machines))
    };
    timeout(ANSWER_TIMEOUT, both).await.unwrap_or_else(|_| {
        let message = format!("lathed has not answered for {} s", ANSWER_TIMEOUT.as_secs());
        Err(Problem::new(Kind::Unavailable, "daemon-down", message).fix("journalctl -u lathed -n 20"))
    })
}

type Reading = Result<(HostView, Vec<MachineView>), Problem>;
/// A command that is being run; its end is what it said.
type Running = Pin<Box<dyn Future<Output = String>>>;

/// What ends it, and a terminal of another size.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hang_up: Signal,
    resized: Signal,
}

impl Signals {
    fn new() -> Result<Self, Problem> {
        let watch = |kind| signal(kind).map_err(|error| Problem::internal("cannot watch a signal", error));
        Ok(Self {
            interrupt: watch(SignalKind::interrupt())?,
            terminate: watch(SignalKind::terminate())?,
            hang_up: watch(SignalKind::hangup())?,
            resized: watch(SignalKind::window_change())?,
        })
    }
}

/// Reads once a second, as long as somebody takes it.
async fn feed(client: &Client, readings: mpsc::Sender<Reading>) {
    let mut beat = tokio::time::interval(INTERVAL);
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // The first has been read already.
    beat.tick().await;
    loop {
        beat.tick().await;
        if readings.send(read(client).await).await.is_err() {
            pending::<()>().await;
        }
    }
}

async fn watch(client: &Client, socket: &Path, mut state: State) -> Verdict {
    // First: from here on a signal is no end without giving the terminal back.
    let mut signals = Signals::new()?;
    let mut screen = Screen::enter()?;
    let (sender, mut readings) = mpsc::channel(1);
    let mut feed = std::pin::pin!(feed(client, sender));
    // Without a terminal there are no keys; signals end it.
    let open = std::io::stdin().is_terminal();
    let mut input = if open { standard_input() } else { mpsc::channel(1).1 };
    let mut keys = Keys::default();
    let mut running: Option<Running> = None;
    loop {
        let (columns, rows) = window_size();
        screen.show(&frame::frame(&state, columns.into(), rows.into()));
        let mut pressed = Vec::new();
        tokio::select! {
            () = &mut feed => {}
            reading = readings.recv() => match reading {
                Some(Ok((host, machines))) => state.take(host, machines),
                Some(Err(problem)) => state.trouble = problem.message,
                None => {}
            },
            piece = input.recv(), if open => {
                let piece = piece.unwrap_or_default();
                if piece.is_empty() {
                    break;
                }
                pressed = keys.feed(&piece);
            }
            () = tokio::time::sleep(SEQUENCE_TIMEOUT), if keys.waits() => pressed.extend(keys.give_up()),
            said = end_of(&mut running), if running.is_some() => {
                running = None;
                state.ended(said);
            }
            _ = signals.resized.recv() => screen.forget(),
            _ = signals.interrupt.recv() => break,
            _ = signals.terminate.recv() => break,
            _ = signals.hang_up.recv() => break,
        }
        for key in pressed {
            match state.press(key) {
                Action::None => {}
                Action::Run(args) => running = Some(Box::pin(run(socket.to_owned(), args))),
                Action::Quit => return Ok(exit::DONE),
            }
        }
    }
    Ok(exit::DONE)
}

async fn end_of(running: &mut Option<Running>) -> String {
    match running {
        Some(running) => running.as_mut().await,
        None => pending().await,
    }
}

/// Runs this very program with `args`; what it said, on one line. It goes on by itself should nobody wait any more.
async fn run(socket: std::path::PathBuf, args: Vec<String>) -> String {
    let program = std::env::current_exe().unwrap_or_else(|_| "lathe".into());
    let done = Command::new(program)
        .args(&args)
        .env("LATHE_SOCKET", socket)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .output()
        .await;
    match done {
        Ok(output) => said(&output.stdout, &output.stderr),
        Err(cause) => format!("cannot run lathe: {}", super::client::plain(&cause)),
    }
}

fn said(out: &[u8], error: &[u8]) -> String {
    let text = [error, out].map(String::from_utf8_lossy).concat();
    let lines: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    if lines.is_empty() { "done".to_owned() } else { lines.join("   ").chars().take(MAX_SAID).collect() }
}

#[cfg(test)]
pub(crate) mod fixture {
    //! Hosts and machines to be drawn.

    use super::state::State;
    use crate::api::tests::fake;
    use crate::api::wire::{Delivered, DeliveredShare, DeliveredWindows, HostView, MachineView};

    pub(crate) fn host() -> HostView {
        fake::host()
    }

    /// A machine whose CPU and network get this much of what they ask for over 10 s.
    pub(crate) fn rated(name: &str, cpu: Option<u64>, net: Option<u64>) -> MachineView {
        let share = |permille| DeliveredShare { measured_msec: 10_000, asked: 500, delivered: 400, permille };
        let windows = |permille| {
            Some(DeliveredWindows { sec_1: share(None), sec_10: share(permille), sec_60: share(None) })
        };
        let delivered =
            Delivered { cpu: windows(cpu), net_to_guest: windows(net), net_from_guest: windows(None) };
        MachineView { delivered, ..fake::machine(name) }
    }

    /// So many machines, the first well served and each of the next a little less, up to half.
    pub(crate) fn state(count: u64) -> State {
        let one = |number: u64| {
            let mut view = rated(&format!("web-{number}"), Some(1000 - number % 20 * 25), None);
            view.stalls.memory_centipercent = Some(12);
            if number % 3 == 1 {
                view.reason = "guest panicked: out of memory".to_owned();
            }
            view
        };
        let mut host = host();
        host.machines = count;
        State::new(host, (0..count).map(one).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_command_said_stands_on_one_line() {
        assert_eq!(said(b"web   cpu 0.50 -> 0.55\n\n", b""), "web   cpu 0.50 -> 0.55");
        assert_eq!(said(b"", b"error[x]: no\n  fix: yes\n"), "error[x]: no   fix: yes");
        assert_eq!(said(b"", b""), "done");
        assert_eq!(said(&b"x".repeat(9999), b"").len(), MAX_SAID);
    }

    #[test]
    fn a_socket_s_path_can_be_pasted() {
        assert_eq!(quoted("/run/lathe/lathe.sock"), "/run/lathe/lathe.sock");
        assert_eq!(quoted("/tmp/a b's"), r"'/tmp/a b'\''s'");
    }
}
