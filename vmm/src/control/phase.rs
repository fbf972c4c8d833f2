//! Which command is allowed in which phase: one pure function.

use super::wire::{Command, Phase, Refusal};

/// The phase after `command` succeeds in `phase`; the same one when it changes nothing.
///
/// # Errors
/// `wrong-phase`, with the phase and what the command needs.
pub fn after(phase: Phase, command: &Command) -> Result<Phase, Refusal> {
    use Phase::{Defined, Empty, Ended, Paused, Ready, Running};
    let (name, allowed, next): (_, &[Phase], _) = match command {
        Command::Hello {} => return Ok(phase),
        Command::Status {} => return Ok(phase),
        Command::Quit {} => ("quit", &[Empty, Defined, Ready, Running, Paused, Ended], Ended),
        Command::Define(_) => ("define", &[Empty], Defined),
        Command::Start {} => ("start", &[Defined], Ready),
        Command::Go {} => ("go", &[Ready], Running),
        Command::Pause {} => ("pause", &[Running], Paused),
        Command::Resume {} => ("resume", &[Paused], Running),
        Command::PowerButton {} => ("power_button", &[Running], Running),
        Command::PrepareCpus { .. } => ("prepare_cpus", &[Ready, Running, Paused], phase),
        Command::SetCpus { .. } => ("set_cpus", &[Ready, Running, Paused], phase),
        Command::SetPlugged { .. } => ("set_plugged", &[Ready, Running, Paused], phase),
        Command::SetBalloon { .. } => ("set_balloon", &[Ready, Running, Paused], phase),
        Command::AttachDisk(_) => ("attach_disk", &[Ready, Running, Paused], phase),
        Command::AttachNic(_) => ("attach_nic", &[Ready, Running, Paused], phase),
        Command::Detach { .. } => ("detach", &[Ready, Running, Paused], phase),
        Command::GrowDisk { .. } => ("grow_disk", &[Ready, Running, Paused], phase),
        Command::SetDiskRates(_) => ("set_disk_rates", &[Ready, Running, Paused], phase),
        Command::Stats {} => ("stats", &[Ready, Running, Paused], phase),
        Command::ConsoleTail {} => ("console_tail", &[Ready, Running, Paused], phase),
        Command::VsockListen { .. } => ("vsock_listen", &[Defined, Ready, Running, Paused], phase),
        Command::ConsoleAttach { .. } => ("console_attach", &[Defined, Ready, Running, Paused], phase),
    };
    if allowed.contains(&phase) {
        return Ok(next);
    }
    Err(Refusal {
        code: "wrong-phase".to_owned(),
        message: format!(
            "{name} is not possible while the machine is {phase:?}; it must be one of {allowed:?}"
        )
        .to_lowercase(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_life_in_order() {
        let mut phase = Phase::Empty;
        for (command, expected) in [
            (Command::Start {}, None),
            (Command::VsockListen { port: 1, fd: 0 }, None),
            (Command::Hello {}, Some(Phase::Empty)),
        ] {
            assert_eq!(after(phase, &command).ok(), expected);
        }
        phase = Phase::Defined;
        for (command, expected) in [
            (Command::Start {}, Phase::Ready),
            (Command::Go {}, Phase::Running),
            (Command::Pause {}, Phase::Paused),
            (Command::Stats {}, Phase::Paused),
            (Command::Resume {}, Phase::Running),
            (Command::PowerButton {}, Phase::Running),
            (Command::Quit {}, Phase::Ended),
        ] {
            phase = after(phase, &command).unwrap();
            assert_eq!(phase, expected);
        }
        assert_eq!(after(phase, &Command::Go {}).unwrap_err().code, "wrong-phase");
    }
}
