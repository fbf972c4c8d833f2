//! How results look: aligned tables, amounts, errors of at most four lines.

use std::io::{IsTerminal, Write};
use std::time::{SystemTime, UNIX_EPOCH};

use lathe_shard::{BitRate, Bytes, MilliCpu};
use serde::Serialize;

use crate::api::wire::{Amounts, MachineState};
use crate::problem::Problem;

/// Rows of cells; the first row is the heading.
#[derive(Default)]
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// With this heading.
    pub fn new(heading: &[&str]) -> Self {
        Self { rows: vec![heading.iter().map(|cell| (*cell).to_owned()).collect()] }
    }

    /// Adds a row. Empty cells are shown as `-`, so that columns can be counted.
    pub fn row(&mut self, cells: Vec<String>) {
        self.rows.push(
            cells.into_iter().map(|cell| if cell.is_empty() { "-".to_owned() } else { cell }).collect(),
        );
    }

    /// As text, columns two spaces apart.
    pub fn render(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            self.rows
                .iter()
                .filter_map(|row| row.get(column))
                .map(|cell| cell.chars().count())
                .max()
                .unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = String::new();
        for row in &self.rows {
            let line: Vec<String> =
                row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
            text.push_str(line.join("  ").trim_end());
            text.push('\n');
        }
        text
    }
}

/// Prints data to standard output. A closed pipe ends the program quietly, as with other commands.
pub fn print(text: &str) {
    let mut out = std::io::stdout().lock();
    if out.write_all(text.as_bytes()).and_then(|()| out.flush()).is_err() {
        std::process::exit(0);
    }
}

/// Prints `value` as JSON, one line to programs, indented to people.
///
/// # Errors
/// Never for the wire types.
pub fn print_json(value: &impl Serialize) -> Result<(), Problem> {
    let text = if std::io::stdout().is_terminal() {
        serde_json::to_string_pretty(value)
    } else {
        serde_json::to_string(value)
    };
    print(&(text.map_err(|error| Problem::internal("cannot write JSON", error))? + "\n"));
    Ok(())
}

/// Talk for people, to standard error.
pub fn say(text: &str) {
    eprintln!("{text}");
}

/// An error as people read it: at most four lines.
pub fn problem_text(problem: &Problem) -> String {
    let mut text = format!("error[{}]: {}", problem.code, problem.message);
    if !problem.detail.is_empty() {
        text.push_str("\n  ");
        text.push_str(&problem.detail);
    }
    if !problem.fix.is_empty() {
        text.push_str("\n  fix: ");
        text.push_str(&problem.fix);
    }
    text
}

/// Prints an error: text to people, `{"error": …}` to programs, both on standard error.
pub fn print_problem(problem: &Problem, json: bool) {
    if json {
        let body = crate::api::wire::ErrorBody { error: problem.view() };
        say(&serde_json::to_string(&body).unwrap_or_else(|_| problem_text(problem)));
    } else {
        say(&problem_text(problem));
    }
}

/// `0.21/0.50`: used and granted.
pub fn cpu_cell(cpu: &Amounts) -> String {
    format!("{}/{}", MilliCpu(cpu.used), MilliCpu(cpu.granted))
}

/// `103 MiB/512 MiB`: used and granted.
pub fn memory_cell(memory: &Amounts) -> String {
    format!("{}/{}", Bytes(memory.used), Bytes(memory.granted))
}

/// `40 Mbit/s`, `unlimited`.
pub fn rate(bit_per_sec: u64) -> String {
    if bit_per_sec == 0 { "unlimited".to_owned() } else { BitRate(bit_per_sec).to_string() }
}

/// `300`, `unlimited`.
pub fn iops(iops: u64) -> String {
    if iops == 0 { "unlimited".to_owned() } else { iops.to_string() }
}

/// `99.8 %`; `-` where there is nothing to tell.
pub fn permille(permille: Option<u64>) -> String {
    permille.map_or("-".to_owned(), |permille| format!("{}.{} %", permille / 10, permille % 10))
}

/// `0.4 %`, of hundredths of a percent.
pub fn centipercent(share: u32) -> String {
    format!("{}.{} %", share / 100, share % 100 / 10)
}

/// State in words.
pub fn state(state: MachineState) -> &'static str {
    match state {
        MachineState::Creating => "creating",
        MachineState::Starting => "starting",
        MachineState::Running => "running",
        MachineState::Paused => "paused",
        MachineState::Stopping => "stopping",
        MachineState::Stopped => "stopped",
        MachineState::Failed => "failed",
        MachineState::Removing => "removing",
    }
}

/// Now by the wall clock, milliseconds since the epoch.
pub fn unix_msec() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |elapsed| u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX))
}

/// `3 d 4 h`, `5 min`, `12 s`.
pub fn duration(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds / 60),
        3600..86_400 => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{} d {} h", seconds / 86_400, seconds % 86_400 / 3600),
    }
}

/// Microseconds for people: `420 us`, `3.1 ms`, `2.4 s`.
pub fn took(usec: u64) -> String {
    match usec {
        0..1000 => format!("{usec} us"),
        1000..1_000_000 => format!("{}.{} ms", usec / 1000, usec % 1000 / 100),
        _ => format!("{}.{} s", usec / 1_000_000, usec % 1_000_000 / 100_000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::problem::Kind;

    #[test]
    fn columns_line_up_and_empty_cells_are_dashes() {
        let mut table = Table::new(&["NAME", "ADDRESS", "STATE"]);
        table.row(vec!["web".into(), String::new(), "running".into()]);
        table.row(vec!["database".into(), "10.0.0.2/24".into(), "stopped".into()]);
        let expected =
            "NAME      ADDRESS      STATE\nweb       -            running\ndatabase  10.0.0.2/24  stopped\n";
        assert_eq!(table.render(), expected);
    }

    #[test]
    fn an_error_has_what_why_and_fix() {
        let problem = Problem::new(Kind::Impossible, "cpu-over-capacity", "demo cannot have 6.00 cpu")
            .detail("at most 2.00 now")
            .fix("lathe resize demo --cpu 2");
        let expected = "error[cpu-over-capacity]: demo cannot have 6.00 cpu\n  at most 2.00 now\n  fix: lathe resize demo --cpu 2";
        assert_eq!(problem_text(&problem), expected);
    }

    #[test]
    fn times_are_short() {
        assert_eq!(duration(59), "59 s");
        assert_eq!(duration(93_600), "1 d 2 h");
        assert_eq!(took(3_140), "3.1 ms");
    }
}
