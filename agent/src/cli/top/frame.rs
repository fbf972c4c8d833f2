//! One picture of the state, for a terminal of any size: pure.
//!
//! ```text
//! host, health              4 lines, fewer where there is no room
//! bars: CPU, memory, network
//!
//! machines, worst first     what is left; columns go one after the other where the terminal is too narrow
//! keys                      on a screen only
//! command that Enter runs
//! ```
//! Every line is printable ASCII and no wider than the terminal; words and signs say all that colours say. A bar shows `#` used, `|`
//! granted and not used, `.` free, `-` kept for the host.

use lathe_shard::{BitRate, Bytes, MilliCpu};

use super::state::{State, cpu_permille, net_permille, worst_permille};
use crate::api::wire::{HostAmounts, MachineState, MachineView};
use crate::cli::output;

/// Parts per thousand below which what is delivered is marked.
const SHORT_PERMILLE: u64 = 950;
/// Widest and narrowest bar, columns.
const BAR: std::ops::RangeInclusive<usize> = 6..=40;
/// Lines that a command or what it said may take.
const MAX_FOOT: usize = 3;
/// Lines of text that somebody else wrote are cut at this many columns before they compete for room.
const MAX_CELL: usize = 60;

/// How a line is to look, where the terminal shows it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Look {
    #[default]
    Plain,
    Bold,
    Reverse,
    Alarm,
}

/// A line of text without its end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Line {
    text: String,
    look: Look,
}

impl Line {
    fn new(text: impl Into<String>) -> Self {
        Self { text: text.into(), look: Look::Plain }
    }

    /// With SGR sequences (ECMA-48, 8.3.117).
    fn painted(&self) -> String {
        let code = match self.look {
            Look::Plain => return self.text.clone(),
            Look::Bold => "1",
            Look::Reverse => "7",
            Look::Alarm => "1;31",
        };
        format!("\x1b[{code}m{}\x1b[0m", self.text)
    }
}

/// The screen: lines of at most `width` columns, at most `height` of them, each ended by a line feed.
pub fn frame(state: &State, width: usize, height: usize) -> String {
    let mut top = head(state, width);
    let mut bottom = foot(state, width);
    // Machines get three lines at least, as long as there are any.
    while top.len() + bottom.len() + 3 > height && top.len() > 1 {
        top.pop();
    }
    // What Enter would run is not to be run unseen: it is the last to go.
    if bottom.len() + 2 > height {
        bottom.drain(..if state.pending.is_some() { 1 } else { bottom.len() });
        bottom.truncate(height);
    }
    let last = height - bottom.len();
    let room = last.saturating_sub(top.len());
    let mut lines = top;
    lines.extend(table(state, width, room));
    lines.truncate(last);
    if !bottom.is_empty() {
        lines.resize(last, Line::default());
    }
    lines.extend(bottom);
    render(lines, width, state.colour)
}

/// Everything, one below the other, for what is no terminal.
pub fn plain(state: &State, width: usize) -> String {
    let mut lines = head(state, width);
    lines.extend(table(&State { selected: None, ..state.clone() }, width, usize::MAX));
    render(lines, width, false)
}

fn render(lines: Vec<Line>, width: usize, colour: bool) -> String {
    let mut text = String::new();
    for mut line in lines {
        line.text = cut(&printable(&line.text), width);
        text.push_str(&if colour { line.painted() } else { line.text });
        text.push('\n');
    }
    text
}

/// Text as it may be shown: printable ASCII stays, anything else becomes `?`.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c == ' ' || c.is_ascii_graphic() { c } else { '?' }).collect()
}

/// At most `width` columns of ASCII text, without blanks at its end.
fn cut(text: &str, width: usize) -> String {
    text.get(..width).unwrap_or(text).trim_end().to_owned()
}

fn head(state: &State, width: usize) -> Vec<Line> {
    let host = &state.host;
    let s = if host.machines == 1 { "" } else { "s" };
    let first = if state.trouble.is_empty() {
        let pieces = [
            host.name.clone(),
            host.state.clone(),
            format!("{} machine{s}", host.machines),
            format!("peers alive {}", host.peers_alive),
            format!("up {}", output::duration(host.uptime_sec)),
            format!("lathed {}", host.version),
        ];
        Line { text: as_many(&pieces, width), look: Look::Bold }
    } else {
        Line { text: format!("{}   not of now: {}", host.name, state.trouble), look: Look::Alarm }
    };
    let cpu = |milli: u64| MilliCpu(milli).to_string();
    let bytes = |bytes: u64| Bytes(bytes).to_string();
    let gauges = [
        host_gauge("CPU", host.resources.cpu, &cpu, host.psi_cpu_centipercent),
        host_gauge("MEM", host.resources.memory, &bytes, host.psi_memory_centipercent),
        net_gauge(&state.machines),
    ];
    let mut lines = vec![first];
    lines.extend(with_bars(&gauges, width));
    lines.push(Line::default());
    lines
}

/// As many pieces as fit, three blanks apart.
fn as_many(pieces: &[String], width: usize) -> String {
    let mut text = String::new();
    for piece in pieces {
        if !text.is_empty() && text.len() + 3 + piece.len() > width {
            break;
        }
        text.push_str(if text.is_empty() { "" } else { "   " });
        text.push_str(piece);
    }
    text
}

/// A resource with a bar.
struct Gauge {
    label: &'static str,
    amounts: HostAmounts,
    /// What is said of it, the longest first.
    texts: Vec<String>,
}

fn host_gauge(
    label: &'static str,
    amounts: HostAmounts,
    show: &dyn Fn(u64) -> String,
    stalled: Option<u32>,
) -> Gauge {
    let [capacity, reserved, granted, used, free] =
        [amounts.capacity, amounts.reserved, amounts.granted, amounts.used, amounts.free].map(show);
    let stalled =
        stalled.map(|value| format!("  stalled {}", output::centipercent(value))).unwrap_or_default();
    let full = format!("used {used}  granted {granted}  reserved {reserved}  free {free}  of {capacity}");
    let short = format!("used {used}  granted {granted}  of {capacity}");
    let shortest = format!("used {used}  of {capacity}");
    Gauge { label, amounts, texts: vec![format!("{full}{stalled}"), full, short, shortest] }
}

/// All machines together; what the host's own links could carry is not known here.
fn net_gauge(machines: &[MachineView]) -> Gauge {
    let sum = |of: fn(&MachineView) -> u64| machines.iter().map(of).fold(0, u64::saturating_add);
    let (used, granted) = (sum(|view| view.net.used), sum(|view| view.net.granted));
    let free = machines.iter().filter(|view| !view.mac.is_empty() && view.net.granted == 0).count();
    let short = format!("used {}  granted {}", BitRate(used), BitRate(granted));
    let unlimited = if free == 0 { String::new() } else { format!("  {free} without limit") };
    let amounts = HostAmounts { capacity: granted, granted, used, ..HostAmounts::default() };
    Gauge { label: "NET", amounts, texts: vec![format!("{short}{unlimited}"), short] }
}

/// One line each, with the longest text that leaves room for a bar, all bars alike; without bars where one has no room.
fn with_bars(gauges: &[Gauge], width: usize) -> Vec<Line> {
    // Label, blank, brackets, blank.
    let room = |gauge: &Gauge, text: &String| width.saturating_sub(gauge.label.len() + 4 + text.len());
    let chosen: Option<Vec<_>> = gauges
        .iter()
        .map(|gauge| {
            let text = gauge.texts.iter().find(|text| room(gauge, text) >= *BAR.start())?;
            Some((gauge, text))
        })
        .collect();
    let Some(chosen) = chosen else {
        let fitting = gauges.iter().map(|gauge| {
            let fits = gauge.texts.iter().find(|text| gauge.label.len() + 1 + text.len() <= width);
            let text = fits.or(gauge.texts.last()).map_or("", String::as_str);
            Line::new(format!("{} {text}", gauge.label))
        });
        return fitting.collect();
    };
    let columns = chosen.iter().map(|(gauge, text)| room(gauge, text)).fold(*BAR.end(), usize::min);
    let line = |(gauge, text): &(&Gauge, &String)| {
        Line::new(format!("{} [{}] {text}", gauge.label, bar(&gauge.amounts, columns)))
    };
    chosen.iter().map(line).collect()
}

/// `###||||......--`.
fn bar(amounts: &HostAmounts, columns: usize) -> String {
    let of = |amount: u64| match amounts.capacity {
        0 => 0,
        capacity => {
            let share = u128::from(amount) * columns as u128;
            // Rounded to nearest, and no more than there is.
            usize::try_from((share + u128::from(capacity) / 2) / u128::from(capacity))
                .map_or(columns, |filled| filled.min(columns))
        }
    };
    let (used, granted, reserved) = (of(amounts.used), of(amounts.granted), of(amounts.reserved));
    let signs = (0..columns).map(|column| match column {
        column if column < used => '#',
        column if column < granted => '|',
        column if column >= columns - reserved => '-',
        _ => '.',
    });
    signs.collect()
}

/// `99.6 %`, marked where it is too little.
fn delivered(permille: Option<u64>) -> String {
    let Some(permille) = permille else { return String::new() };
    let mark = if permille < SHORT_PERMILLE { " !" } else { "" };
    format!("{}{mark}", output::permille(Some(permille)))
}

/// A column: its title, what stands in it, and how soon it goes when there is no room; 0 stays.
struct Column {
    title: &'static str,
    goes: u8,
    cell: fn(&MachineView) -> String,
}

const fn column(title: &'static str, goes: u8, cell: fn(&MachineView) -> String) -> Column {
    Column { title, goes, cell }
}

const COLUMNS: [Column; 10] = [
    column("NAME", 0, |view| view.name.clone()),
    column("STATE", 2, |view| output::state(view.state).to_owned()),
    column("GOT CPU", 1, |view| delivered(cpu_permille(view))),
    column("GOT NET", 4, |view| delivered(net_permille(view))),
    column("CPU used/grant", 3, |view| output::cpu_cell(&view.cpu)),
    column("MEMORY used/grant", 5, |view| output::memory_cell(&view.memory)),
    column("NET used/grant", 7, net_cell),
    column("CPU STALL", 6, |view| view.stalls.cpu_centipercent.map(output::centipercent).unwrap_or_default()),
    column("MEM STALL", 8, |view| {
        view.stalls.memory_centipercent.map(output::centipercent).unwrap_or_default()
    }),
    column("REASON", 9, |view| cut(&printable(&view.reason), MAX_CELL)),
];

fn net_cell(view: &MachineView) -> String {
    if view.mac.is_empty() {
        return String::new();
    }
    format!("{}/{}", BitRate(view.net.used), output::rate(view.net.granted))
}

/// The machines in at most `room` lines, with a mark at the selected one, which is always among them.
fn table(state: &State, width: usize, room: usize) -> Vec<Line> {
    if state.machines.is_empty() {
        let hint = ["No machines yet. Make one:", "  lathe run demo"].map(Line::new);
        return hint.into_iter().take(room).collect();
    }
    let (heading, rows) = columns(&state.machines, width);
    let mut lines = vec![Line { text: heading, look: Look::Bold }];
    let (from, to) = shown(rows.len(), state.position().unwrap_or(0), room.saturating_sub(1));
    let selected = state.position();
    for (place, row) in rows.iter().enumerate().take(to).skip(from) {
        let mark = if selected == Some(place) { '>' } else { ' ' };
        let view = &state.machines[place];
        let short = worst_permille(view).is_some_and(|permille| permille < SHORT_PERMILLE);
        let look = match (selected == Some(place), short || view.state == MachineState::Failed) {
            (true, _) => Look::Reverse,
            (false, true) => Look::Alarm,
            (false, false) => Look::Plain,
        };
        lines.push(Line { text: format!("{mark}{row}"), look });
    }
    if from > 0 || to < rows.len() {
        let text = format!(" machines {} to {to} of {}", from + 1, rows.len());
        lines.push(Line::new(text));
    }
    lines.truncate(room);
    lines
}

/// Which of `count` rows are shown in `room` lines so that `selected` is; where not all are, one line says so.
fn shown(count: usize, selected: usize, room: usize) -> (usize, usize) {
    if count <= room {
        return (0, count);
    }
    let room = room.saturating_sub(1).max(1);
    let from = selected.saturating_sub(room - 1).min(count.saturating_sub(room));
    (from, (from + room).min(count))
}

/// Heading and rows of as many columns as fit.
fn columns(machines: &[MachineView], width: usize) -> (String, Vec<String>) {
    let cells = |column: &Column| -> Vec<String> {
        let cell = |view| {
            let cell = printable(&(column.cell)(view));
            if cell.is_empty() { "-".to_owned() } else { cell }
        };
        std::iter::once(column.title.to_owned()).chain(machines.iter().map(cell)).collect()
    };
    let mut kept: Vec<(u8, usize, Vec<String>)> = COLUMNS
        .iter()
        .map(|column| {
            let cells = cells(column);
            (column.goes, cells.iter().map(String::len).max().unwrap_or(0), cells)
        })
        // A column that nobody has anything in tells nothing.
        .filter(|(goes, _, cells)| *goes < 4 || cells.iter().skip(1).any(|cell| cell != "-"))
        .collect();
    // Two blanks between columns, one for the mark.
    while kept.len() > 1 && kept.iter().map(|(_, wide, _)| wide + 2).sum::<usize>() > width + 1 {
        let last = kept.iter().map(|(goes, ..)| *goes).max();
        kept.retain(|(goes, ..)| Some(*goes) != last);
    }
    let line = |row: usize| {
        let cells: Vec<_> = kept.iter().map(|(_, wide, cells)| format!("{:<wide$}", cells[row])).collect();
        cells.join("  ").trim_end().to_owned()
    };
    (format!(" {}", line(0)), (1..=machines.len()).map(line).collect())
}

/// What keys do, as much of it as there is room for.
const KEYS: [&str; 2] = [
    "j k select   + - cpu   ] [ memory   u undo   p pause   s stop or start   q quit",
    "jk select  +- cpu  ][ mem  u p s  q quit",
];

fn foot(state: &State, width: usize) -> Vec<Line> {
    let keys = KEYS.iter().find(|keys| keys.len() <= width).unwrap_or(&"q quit");
    let command = match (state.command(), state.running) {
        (Some(command), true) => format!("$ {command}   is being run"),
        (Some(command), false) => format!("$ {command}   <- Enter runs it, Esc drops it"),
        (None, _) => state.said.clone(),
    };
    let look = if state.pending.is_some() { Look::Bold } else { Look::Plain };
    let command = printable(&command);
    let lines = command
        .as_bytes()
        .chunks(width.max(1))
        .take(MAX_FOOT)
        .map(|piece| Line { text: String::from_utf8_lossy(piece).into_owned(), look });
    let mut foot = vec![Line::new(*keys)];
    foot.extend(lines);
    foot.resize(foot.len().max(2), Line::default());
    foot
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;

    use super::*;
    use crate::cli::top::fixture::{host, rated, state};
    use crate::cli::top::keys::Key;

    /// `LATHE_BLESS=1` writes the golden files anew.
    fn golden(name: &str, text: &str) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
        if std::env::var_os("LATHE_BLESS").is_some() {
            std::fs::write(&path, text).unwrap();
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap(), text, "{}", path.display());
    }

    /// Lines and columns of a picture without its sequences.
    fn check(text: &str, width: usize, height: usize) {
        assert!(text.lines().count() <= height, "{height} lines:\n{text}");
        for line in text.lines() {
            assert!(
                line.len() <= width && line.bytes().all(|byte| (0x20..0x7f).contains(&byte)),
                "{width}: {line}"
            );
        }
    }

    #[test]
    fn pictures_of_some_sizes() {
        for (width, height) in [(40, 12), (80, 24), (120, 30)] {
            for count in [0, 1, 40] {
                let mut state = state(count);
                for _ in 0..count.min(5) {
                    state.press(Key::Down);
                }
                state.press(Key::Character('+'));
                let text = frame(&state, width, height);
                check(&text, width, height);
                golden(&format!("top-{width}-{count}.txt"), &text);
            }
        }
        golden("top-plain.txt", &plain(&state(3), 120));
    }

    #[test]
    fn the_selected_machine_is_in_the_picture() {
        let mut state = state(40);
        for _ in 0..40 {
            let text = frame(&state, 80, 20);
            let name = format!(">{} ", state.selected.clone().unwrap());
            assert!(text.lines().any(|line| line.starts_with(&name)), "{name} is not in\n{text}");
            state.press(Key::Down);
        }
    }

    #[test]
    fn what_enter_would_run_is_seen_whole() {
        let mut state = State::new(host(), vec![rated(&"n".repeat(28), Some(500), None)]);
        state.press(Key::Character('+'));
        let command = format!("$ {}", state.command().unwrap());
        for (width, height) in [(40, 10), (40, 3), (30, 2), (80, 1), (200, 50)] {
            let text = frame(&state, width, height);
            check(&text, width, height);
            assert!(text.replace('\n', "").contains(&command), "{width} {height}:\n{text}");
        }
    }

    #[test]
    fn what_others_wrote_cannot_move_the_cursor() {
        let mut machine = rated("web", Some(900), None);
        machine.reason = "\x1b[2J\u{9b}31m\r\nkernel panic \u{202e}\u{4e2d}\t".repeat(9);
        let mut odd = host();
        odd.name = "\x07host".to_owned();
        let mut state = State::new(odd, vec![machine]);
        state.said = "error\n\x1b]0;title\x07".to_owned();
        for width in [20, 200] {
            check(&frame(&state, width, 30), width, 30);
        }
        assert!(frame(&state, 200, 30).contains("?[2J?31m??kernel panic ??"));
    }

    #[test]
    fn colours_say_nothing_that_words_do_not() {
        let mut state = state(4);
        let without = frame(&state, 100, 20);
        assert!(!without.contains('\x1b') && without.contains(" !"));
        state.colour = true;
        let with = frame(&state, 100, 20);
        let mut stripped = with.clone();
        for code in ["1", "7", "1;31", "0"] {
            stripped = stripped.replace(&format!("\x1b[{code}m"), "");
        }
        assert!(with.contains("\x1b[7m>") && with != without);
        assert_eq!(stripped, without);
    }

    #[test]
    fn a_bar_has_all_its_parts() {
        let amounts =
            HostAmounts { capacity: 100, reserved: 10, granted: 50, used: 30, free: 40, promised: 50 };
        assert_eq!(bar(&amounts, 20), "######||||........--");
        assert_eq!(bar(&HostAmounts { used: 200, ..amounts }, 4), "####", "more than there is");
        assert_eq!(bar(&HostAmounts::default(), 4), "....");
    }

    proptest! {
        #[test]
        fn no_size_breaks_the_picture(width in 0_usize..200, height in 0_usize..60, count in 0_u64..50, downs in 0_usize..50, wild in any::<u64>()) {
            let mut state = state(count);
            (0..downs).for_each(|_| { state.press(Key::Down); });
            if let Some(view) = state.machines.first_mut() {
                view.cpu.used = wild;
                view.memory.granted = wild;
                view.net.used = wild;
            }
            state.host.resources.cpu.used = wild;
            state.host.resources.memory.capacity = wild;
            check(&frame(&state, width, height), width, height);
            check(&plain(&state, width), width, usize::MAX);
        }
    }
}
