//! Machines with tiny guests of a few instructions, on this machine's own `/dev/kvm`, driven by the commands that a client sends.
//!
//! Where there is no usable KVM the tests say so and pass: the same ground is covered by the scenarios on the test host.

#![allow(clippy::unwrap_used, reason = "a test that cannot set up may panic")]

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use lathe_vmm::control::wire::{
    Answer, Command, Event, ExitReason, MachineConfig, OnPanic, OnReboot, Phase, Refusal, Status,
};
use lathe_vmm::monitor::Monitor;
use nix::poll::{PollFd, PollFlags, poll};
use std::os::fd::AsFd;

const LIMIT: Duration = Duration::from_secs(30);
const LOAD_ADDRESS: u64 = 0x10_0000;

/// An ELF kernel with one segment of code, entered in long mode.
fn elf(code: &[u8]) -> Vec<u8> {
    let mut file = vec![0u8; 0x1000];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x02\x01\x01");
    put(16, &2u16.to_le_bytes());
    put(18, &62u16.to_le_bytes());
    put(24, &LOAD_ADDRESS.to_le_bytes());
    put(32, &64u64.to_le_bytes());
    put(54, &56u16.to_le_bytes());
    put(56, &1u16.to_le_bytes());
    put(64, &1u32.to_le_bytes());
    put(72, &0x1000u64.to_le_bytes());
    put(88, &LOAD_ADDRESS.to_le_bytes());
    put(96, &(code.len() as u64).to_le_bytes());
    put(104, &0x1000u64.to_le_bytes());
    file.extend_from_slice(code);
    file
}

/// `mov dx, port; mov al, value; out dx, al`
fn out(port: u16, value: u8) -> Vec<u8> {
    let p = port.to_le_bytes();
    vec![0x66, 0xba, p[0], p[1], 0xb0, value, 0xee]
}

const SPIN: [u8; 2] = [0xeb, 0xfe];
const POWER_OFF: (u16, u8) = (0x600, 0x34);
const RESET: (u16, u8) = (0x602, 1);
const PANIC: (u16, u8) = (0x505, 1);

fn kvm() -> Option<File> {
    match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(file) => Some(file),
        Err(error) => {
            println!("skipped: /dev/kvm: {error}");
            None
        }
    }
}

fn image(bytes: &[u8]) -> OwnedFd {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file.into()
}

/// A defined machine and the other end of its console.
fn define(kernel: &[u8], on_reboot: OnReboot, cpus: u32) -> Option<(Monitor, UnixStream)> {
    define_for_panic(kernel, on_reboot, OnPanic::Report, cpus)
}

fn define_for_panic(
    kernel: &[u8],
    on_reboot: OnReboot,
    on_panic: OnPanic,
    cpus: u32,
) -> Option<(Monitor, UnixStream)> {
    let kvm = kvm()?;
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(LIMIT)).unwrap();
    let mut monitor = Monitor::new().unwrap();
    let config = MachineConfig {
        kvm: 0,
        cpus,
        cpus_max: None,
        memory_bytes: 64 << 20,
        memory_max_bytes: None,
        balloon: false,
        hotplug_slots: 0,
        kernel: 1,
        initrd: None,
        cmdline: "hello".to_owned(),
        console: Some(2),
        disks: vec![],
        nics: vec![],
        vsock: None,
        rng: true,
        on_reboot,
        on_panic,
    };
    let fds = vec![kvm.into(), image(kernel), theirs.into()];
    monitor.execute(Command::Define(Box::new(config)), fds).unwrap();
    Some((monitor, ours))
}

fn do_now(monitor: &mut Monitor, command: Command) -> Result<Answer, Refusal> {
    monitor.execute(command, vec![])
}

fn start(monitor: &mut Monitor, cpus: usize) -> Vec<i32> {
    match do_now(monitor, Command::Start {}).unwrap() {
        Answer::Started { vcpu_tids } => {
            assert_eq!(vcpu_tids.len(), cpus);
            vcpu_tids
        }
        other => panic!("{other:?}"),
    }
}

fn status(monitor: &mut Monitor) -> Status {
    match do_now(monitor, Command::Status {}).unwrap() {
        Answer::Status(status) => status,
        other => panic!("{other:?}"),
    }
}

/// Serves the machine until `done`.
fn serve(monitor: &mut Monitor, mut done: impl FnMut(&mut Monitor) -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !done(monitor) {
        assert!(Instant::now() < deadline, "nothing came within {LIMIT:?}");
        let ready = poll(&mut [PollFd::new(monitor.notices().as_fd(), PollFlags::POLLIN)], 100u16).unwrap();
        if ready > 0 {
            monitor.on_notices();
        }
    }
}

fn ended(monitor: &mut Monitor) -> bool {
    monitor.exit().is_some()
}

#[test]
fn a_guest_speaks_on_the_console_and_switches_itself_off() {
    let code =
        [out(0x3f8, b'H'), out(0x3f8, b'i'), out(0x3f8, b'\n'), out(POWER_OFF.0, POWER_OFF.1), SPIN.to_vec()];
    let Some((mut monitor, mut console)) = define(&elf(&code.concat()), OnReboot::Reboot, 1) else { return };
    let tids = start(&mut monitor, 1);
    assert!(std::path::Path::new(&format!("/proc/self/task/{}", tids[0])).exists());
    assert_eq!(do_now(&mut monitor, Command::Pause {}).unwrap_err().code, "wrong-phase");
    do_now(&mut monitor, Command::Go {}).unwrap();
    serve(&mut monitor, ended);
    assert_eq!(monitor.exit(), Some(&ExitReason::PowerOff));
    let mut text = String::new();
    drop(monitor);
    console.read_to_string(&mut text).unwrap();
    assert_eq!(text, "Hi\n");
}

#[test]
fn a_guest_that_resets_boots_again_with_fresh_memory_and_the_same_threads() {
    // inc byte [0x200000]; add '0' to it and print that; reset. The count is 1 every time because memory is new.
    let mut code = vec![0xfe, 0x04, 0x25, 0, 0, 0x20, 0];
    code.extend([0x8a, 0x04, 0x25, 0, 0, 0x20, 0, 0x04, b'0', 0x66, 0xba, 0xf8, 0x03, 0xee]);
    code.extend(out(0x3f8, b'\n'));
    code.extend(out(RESET.0, RESET.1));
    code.extend(SPIN);
    let Some((mut monitor, mut console)) = define(&elf(&code), OnReboot::Reboot, 2) else { return };
    let tids = start(&mut monitor, 2);
    do_now(&mut monitor, Command::Go {}).unwrap();
    serve(&mut monitor, |m| status(m).reboots >= 5);
    assert_eq!(status(&mut monitor).vcpu_tids, tids);
    assert!(monitor.take_events().iter().any(|e| matches!(e, Event::Rebooted {})));
    do_now(&mut monitor, Command::Quit {}).unwrap();
    assert_eq!(monitor.phase(), Phase::Ended);
    drop(monitor);
    let mut text = String::new();
    console.read_to_string(&mut text).unwrap();
    assert!(text.starts_with("1\n1\n1\n1\n1\n") && !text.contains('2'), "{text:?}");
}

#[test]
fn a_reset_ends_the_machine_where_that_is_asked_for() {
    let code = [out(0x64, 0xfe), SPIN.to_vec()].concat();
    let Some((mut monitor, _console)) = define(&elf(&code), OnReboot::End, 1) else { return };
    start(&mut monitor, 1);
    do_now(&mut monitor, Command::Go {}).unwrap();
    serve(&mut monitor, ended);
    assert_eq!(monitor.exit(), Some(&ExitReason::Reboot));
}

#[test]
fn a_panic_is_told_once_and_does_what_is_configured() {
    let text = b"Kernel panic - not syncing: no init\n";
    let mut code: Vec<u8> = text.iter().flat_map(|byte| out(0x3f8, *byte)).collect();
    // Again and again, as a hostile guest would: jmp back over the write of seven bytes.
    code.extend(out(PANIC.0, PANIC.1));
    code.extend([0xeb, 0xf7]);
    for on_panic in [OnPanic::Report, OnPanic::Pause, OnPanic::Reboot, OnPanic::End] {
        let defined = define_for_panic(&elf(&code), OnReboot::End, on_panic, 1);
        let Some((mut monitor, _console)) = defined else { return };
        start(&mut monitor, 1);
        do_now(&mut monitor, Command::Go {}).unwrap();
        let mut told = Vec::new();
        serve(&mut monitor, |m| {
            told.extend(m.take_events());
            m.exit().is_some()
                || m.phase() == Phase::Paused
                || status(m).panic.is_some()
                || status(m).reboots > 0
        });
        told.extend(monitor.take_events());
        let panics =
            told.iter().filter(|e| matches!(e, Event::GuestPanicked { message } if message == "no init"));
        assert_eq!(panics.count(), 1, "{on_panic:?} {told:?}");
        match on_panic {
            OnPanic::Report => assert_eq!(monitor.phase(), Phase::Running),
            OnPanic::Pause => assert_eq!(monitor.phase(), Phase::Paused),
            OnPanic::Reboot => {
                assert!(status(&mut monitor).reboots > 0 && status(&mut monitor).panic.is_none())
            }
            OnPanic::End => {
                assert_eq!(monitor.exit(), Some(&ExitReason::Panic { message: "no init".to_owned() }));
            }
        }
    }
}

#[test]
fn a_triple_fault_is_told_from_a_reset() {
    // ud2, without a handler for anything.
    let code = [0x0f, 0x0b];
    let Some((mut monitor, _console)) = define(&elf(&code), OnReboot::End, 1) else { return };
    start(&mut monitor, 1);
    do_now(&mut monitor, Command::Go {}).unwrap();
    serve(&mut monitor, ended);
    assert_eq!(monitor.exit(), Some(&ExitReason::TripleFault));
    let Some((mut monitor, _console)) = define(&elf(&code), OnReboot::Reboot, 1) else { return };
    start(&mut monitor, 1);
    do_now(&mut monitor, Command::Go {}).unwrap();
    serve(&mut monitor, |m| status(m).reboots > 0);
    assert!(monitor.take_events().iter().any(|e| matches!(e, Event::TripleFault {})));
}

#[test]
fn pause_and_resume_do_not_lose_a_spinning_guest() {
    let Some((mut monitor, _console)) = define(&elf(&SPIN), OnReboot::Reboot, 1) else { return };
    start(&mut monitor, 1);
    do_now(&mut monitor, Command::Go {}).unwrap();
    for _ in 0..100 {
        do_now(&mut monitor, Command::Pause {}).unwrap();
        assert_eq!(monitor.phase(), Phase::Paused);
        do_now(&mut monitor, Command::Resume {}).unwrap();
    }
    do_now(&mut monitor, Command::PowerButton {}).unwrap();
    do_now(&mut monitor, Command::Quit {}).unwrap();
    assert_eq!(monitor.exit(), Some(&ExitReason::Quit));
}

#[test]
fn a_corrupt_kernel_is_refused_at_start_and_another_one_can_be_defined() {
    let whole = elf(&SPIN);
    for (kernel, says) in [
        (b"not a kernel at all".repeat(400), "neither a bzImage nor an ELF"),
        (vec![0x7f; 10], "only 10 bytes"),
        (whole[..0x1000].to_vec(), "truncated"),
    ] {
        let Some((mut monitor, _console)) = define(&kernel, OnReboot::Reboot, 1) else { return };
        let refusal = do_now(&mut monitor, Command::Start {}).unwrap_err();
        assert_eq!(refusal.code, "kernel-image");
        assert!(refusal.message.contains(says), "{}", refusal.message);
        assert_eq!(monitor.phase(), Phase::Empty);
    }
}
