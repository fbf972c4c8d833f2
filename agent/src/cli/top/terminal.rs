//! The terminal as a screen: raw, on its alternate screen, without a cursor; as it was before when dropped, and when something panics.
//!
//! Sequences: xterm's "ctlseqs", DECSET 1049 (alternate screen), 25 (cursor), 7 (wrapping), and CUP, EL of ECMA-48.

use std::io::{IsTerminal, Write};
use std::os::fd::AsFd;
use std::sync::{Mutex, PoisonError};

use nix::sys::termios::{self, SetArg, Termios};

use crate::problem::Problem;

const ENTER: &str = "\x1b[?1049h\x1b[?25l\x1b[?7l\x1b[2J";
const LEAVE: &str = "\x1b[0m\x1b[?7h\x1b[?25h\x1b[?1049l";

/// What is to be put back: the terminal's settings, where keys are read from one.
static BEFORE: Mutex<Option<Option<Termios>>> = Mutex::new(None);

/// The screen; one at a time.
pub struct Screen {
    /// What stands there now, line by line.
    shown: Vec<String>,
}

impl Screen {
    /// Takes the terminal.
    ///
    /// # Errors
    /// `internal` when its settings cannot be changed.
    pub fn enter() -> Result<Self, Problem> {
        let failed = |error| Problem::internal("cannot put the terminal into raw mode", error);
        let stdin = std::io::stdin();
        let mut before = None;
        if stdin.is_terminal() {
            let settings = termios::tcgetattr(stdin.as_fd()).map_err(failed)?;
            let mut raw = settings.clone();
            termios::cfmakeraw(&mut raw);
            termios::tcsetattr(stdin.as_fd(), SetArg::TCSANOW, &raw).map_err(failed)?;
            before = Some(settings);
        }
        *BEFORE.lock().unwrap_or_else(PoisonError::into_inner) = Some(before);
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            restore();
            usual(panic);
        }));
        write(ENTER);
        Ok(Self { shown: Vec::new() })
    }

    /// Shows lines; only those that have changed are written.
    pub fn show(&mut self, frame: &str) {
        let lines: Vec<String> = frame.lines().map(str::to_owned).collect();
        let mut text = String::new();
        for place in 0..lines.len().max(self.shown.len()) {
            let (old, new) = (self.shown.get(place), lines.get(place));
            if old != new {
                let new = new.map_or("", String::as_str);
                text.push_str(&format!("\x1b[{};1H\x1b[2K{new}", place + 1));
            }
        }
        if !text.is_empty() {
            write(&text);
        }
        self.shown = lines;
    }

    /// Forgets what stands there: the terminal has another size, and may have moved it.
    pub fn forget(&mut self) {
        self.shown.clear();
        write("\x1b[2J");
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        restore();
    }
}

/// Puts the terminal back, once.
fn restore() {
    // Whoever panics may hold it: then there is nothing to wait for.
    let Ok(mut before) = BEFORE.try_lock() else { return };
    let Some(settings) = before.take() else { return };
    write(LEAVE);
    if let Some(settings) = settings {
        // Nothing can be done about a terminal that is gone.
        let _gone = termios::tcsetattr(std::io::stdin().as_fd(), SetArg::TCSANOW, &settings);
    }
}

/// Nothing can be done about a terminal that is gone; its end comes as a signal.
fn write(text: &str) {
    let mut out = std::io::stdout().lock();
    let _gone = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}
