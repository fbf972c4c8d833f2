//! What the screen shows, and what keys do to it: pure, nothing is carried out here.

use std::cmp::Reverse;

use super::keys::Key;
use crate::api::wire::{DeliveredWindows, HostView, MachineState, MachineView};

/// Everything that a frame is made of.
#[derive(Clone, Debug)]
pub struct State {
    /// The host.
    pub host: HostView,
    /// Its machines, worst delivered first.
    pub machines: Vec<MachineView>,
    /// Name of the machine that keys are about; one of them, unless there is none.
    pub selected: Option<String>,
    /// What Enter runs.
    pub pending: Option<Vec<String>>,
    /// It is being run.
    pub running: bool,
    /// What came of the last one.
    pub said: String,
    /// Why this is not of now; empty when it is.
    pub trouble: String,
    /// `lathe`, or with the socket that it is to speak to, as typed into a shell.
    pub program: String,
    /// The terminal shows weights and colours.
    pub colour: bool,
}

/// What a key leads to beyond the screen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing.
    None,
    /// These arguments of `lathe` are to be run.
    Run(Vec<String>),
    /// The end.
    Quit,
}

/// The worst of a machine's resources over 10 s, parts per thousand; `None` where it asked for next to nothing.
pub fn worst_permille(view: &MachineView) -> Option<u64> {
    [cpu_permille(view), net_permille(view)].into_iter().flatten().min()
}

/// The same of its CPU.
pub fn cpu_permille(view: &MachineView) -> Option<u64> {
    ten_seconds(view.delivered.cpu.as_ref())
}

/// The same of the worse direction of its network.
pub fn net_permille(view: &MachineView) -> Option<u64> {
    let delivered = &view.delivered;
    let directions = [&delivered.net_to_guest, &delivered.net_from_guest];
    directions.into_iter().filter_map(|direction| ten_seconds(direction.as_ref())).min()
}

fn ten_seconds(windows: Option<&DeliveredWindows>) -> Option<u64> {
    windows.and_then(|windows| windows.sec_10.permille)
}

/// Failed machines first, then those that get least of what they ask for, then those that ask for nothing, then those that are off.
pub fn sort_worst_first(machines: &mut [MachineView]) {
    let group = |view: &MachineView| match view.state {
        MachineState::Failed => 0,
        MachineState::Stopped | MachineState::Creating | MachineState::Removing => 3,
        _ if worst_permille(view).is_some() => 1,
        _ => 2,
    };
    machines.sort_by(|one, other| {
        let key = |view: &MachineView| (group(view), worst_permille(view), Reverse(view.cpu.used));
        key(one).cmp(&key(other)).then_with(|| one.name.cmp(&other.name))
    });
}

impl State {
    /// Of a host and its machines as they were just read.
    pub fn new(host: HostView, machines: Vec<MachineView>) -> Self {
        let mut state = Self {
            host,
            machines: Vec::new(),
            selected: None,
            pending: None,
            running: false,
            said: String::new(),
            trouble: String::new(),
            program: "lathe".to_owned(),
            colour: false,
        };
        state.replace_machines(machines);
        state
    }

    /// Takes a newer reading in; who was selected stays selected.
    pub fn take(&mut self, host: HostView, machines: Vec<MachineView>) {
        self.host = host;
        self.trouble.clear();
        self.replace_machines(machines);
    }

    fn replace_machines(&mut self, mut machines: Vec<MachineView>) {
        let before = self.position();
        sort_worst_first(&mut machines);
        self.machines = machines;
        if self.position().is_none() {
            // It has gone: the one in its place, and nothing is run on that by mistake.
            let place = before.unwrap_or(0).min(self.machines.len().saturating_sub(1));
            self.selected = self.machines.get(place).map(|view| view.name.clone());
            self.pending = None;
        }
    }

    /// Where the selected machine stands.
    pub fn position(&self) -> Option<usize> {
        let selected = self.selected.as_ref()?;
        self.machines.iter().position(|view| view.name == *selected)
    }

    /// What Enter runs, as typed into a shell.
    pub fn command(&self) -> Option<String> {
        self.pending.as_ref().map(|args| format!("{} {}", self.program, args.join(" ")))
    }

    /// A key was pressed.
    pub fn press(&mut self, key: Key) -> Action {
        match key {
            Key::Interrupt | Key::Character('q') => return Action::Quit,
            Key::Up | Key::Character('k') => self.select(|place, _| place.saturating_sub(1)),
            Key::Down | Key::Character('j') => self.select(|place, last| (place + 1).min(last)),
            Key::Home | Key::Character('g') => self.select(|_, _| 0),
            Key::End | Key::Character('G') => self.select(|_, last| last),
            Key::Escape => self.pending = None,
            Key::Enter if !self.running => {
                if let Some(args) = self.pending.clone() {
                    self.running = true;
                    self.said.clear();
                    return Action::Run(args);
                }
            }
            Key::Character(character) if !self.running => {
                if let Some(args) = self.command_of(character) {
                    self.pending = Some(args);
                    self.said.clear();
                }
            }
            Key::Enter | Key::Character(_) => {}
        }
        Action::None
    }

    /// A command has ended.
    pub fn ended(&mut self, said: String) {
        self.running = false;
        self.pending = None;
        self.said = said;
    }

    fn select(&mut self, to: impl FnOnce(usize, usize) -> usize) {
        let (Some(place), Some(last)) = (self.position(), self.machines.len().checked_sub(1)) else { return };
        let to = to(place, last).min(last);
        if to != place && !self.running {
            self.selected = Some(self.machines[to].name.clone());
            // What was to be run was about another.
            self.pending = None;
        }
    }

    /// What a key would run on the selected machine.
    fn command_of(&self, character: char) -> Option<Vec<String>> {
        let view = &self.machines[self.position()?];
        let off = matches!(view.state, MachineState::Stopped | MachineState::Failed);
        let (verb, options): (_, &[&str]) = match character {
            '+' | '=' => ("resize", &["--cpu", "+10%"]),
            '-' => ("resize", &["--cpu", "-10%"]),
            ']' => ("resize", &["--memory", "+10%"]),
            '[' => ("resize", &["--memory", "-10%"]),
            'u' => ("resize", &["--undo"]),
            'p' if view.state == MachineState::Paused => ("resume", &[]),
            'p' => ("pause", &[]),
            's' if off => ("start", &[]),
            's' => ("stop", &[]),
            _ => return None,
        };
        let words = [verb, &view.name].into_iter().chain(options.iter().copied());
        Some(words.map(str::to_owned).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::top::fixture::{host, rated, state};

    fn order(state: &State) -> Vec<&str> {
        state.machines.iter().map(|view| view.name.as_str()).collect()
    }

    #[test]
    fn the_worst_stands_first_and_those_that_are_off_last() {
        let mut off = rated("off", Some(10), None);
        off.state = MachineState::Stopped;
        let mut failed = rated("failed", None, None);
        failed.state = MachineState::Failed;
        let state = State::new(
            host(),
            vec![
                off,
                rated("fine", Some(1000), None),
                rated("idle", None, None),
                rated("slow-net", Some(999), Some(400)),
                failed,
                rated("slow", Some(730), None),
            ],
        );
        assert_eq!(order(&state), ["failed", "slow-net", "slow", "fine", "idle", "off"]);
    }

    #[test]
    fn keys_show_a_command_and_enter_runs_it_once() {
        let mut state = state(3);
        let name = state.selected.clone().unwrap();
        assert_eq!(state.press(Key::Enter), Action::None, "nothing to run");
        assert_eq!(state.press(Key::Character('+')), Action::None);
        assert_eq!(state.command(), Some(format!("lathe resize {name} --cpu +10%")));
        let args = ["resize", &name, "--cpu", "+10%"].map(str::to_owned).to_vec();
        assert_eq!(state.press(Key::Enter), Action::Run(args));
        assert_eq!(state.press(Key::Enter), Action::None, "it is under way");
        assert_eq!(state.press(Key::Character('s')), Action::None);
        assert_eq!(state.command(), Some(format!("lathe resize {name} --cpu +10%")));
        state.ended("done".to_owned());
        assert_eq!((state.command(), state.press(Key::Enter)), (None, Action::None));
        assert_eq!(state.press(Key::Character('q')), Action::Quit);
        assert_eq!(state.press(Key::Interrupt), Action::Quit);
    }

    #[test]
    fn another_selection_drops_the_command() {
        let mut state = state(3);
        state.press(Key::Character('s'));
        state.press(Key::Up);
        assert!(state.command().is_some(), "the first is the first");
        state.press(Key::Down);
        assert_eq!((state.position(), state.command()), (Some(1), None));
        state.press(Key::Character('G'));
        assert_eq!(state.position(), Some(2));
        state.press(Key::Character('j'));
        assert_eq!(state.position(), Some(2));
        state.press(Key::Character(']'));
        state.press(Key::Escape);
        assert_eq!(state.command(), None);
    }

    #[test]
    fn a_machine_that_goes_takes_its_command_along() {
        let mut state = state(3);
        state.press(Key::Down);
        let gone = state.selected.clone().unwrap();
        state.press(Key::Character('s'));
        let rest: Vec<_> = state.machines.iter().filter(|view| view.name != gone).cloned().collect();
        state.take(host(), rest);
        assert_eq!((state.position(), state.command()), (Some(1), None));
        state.press(Key::Character('s'));
        let (kept, wanted) = (state.selected.clone(), state.command());
        let machines = state.machines.iter().rev().cloned().collect();
        state.take(host(), machines);
        assert_eq!((state.selected.clone(), state.command()), (kept, wanted));
        state.take(host(), Vec::new());
        assert_eq!((state.selected.clone(), state.command()), (None, None));
        for key in [Key::Down, Key::Character('+'), Key::Enter, Key::End] {
            assert_eq!(state.press(key), Action::None);
        }
    }

    #[test]
    fn keys_follow_the_machine_s_state() {
        let mut state = state(1);
        for (machine, key, verb) in [
            (MachineState::Running, 'p', "pause"),
            (MachineState::Paused, 'p', "resume"),
            (MachineState::Running, 's', "stop"),
            (MachineState::Failed, 's', "start"),
            (MachineState::Running, 'u', "resize"),
        ] {
            state.machines[0].state = machine;
            state.press(Key::Character(key));
            assert_eq!(state.pending.as_ref().map(|args| args[0].as_str()), Some(verb));
        }
    }
}
