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
    Answer, Command, CpuStatus, DiskConfig, DiskRates, Event, ExitReason, MachineConfig, OnPanic, OnReboot,
    Phase, Refusal, Status,
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
    define_with(kernel, |config| (config.cpus, config.on_reboot) = (cpus, on_reboot))
}

/// Likewise; `change` makes the configuration differ from that of a machine with one vCPU.
fn define_with(kernel: &[u8], change: impl FnOnce(&mut MachineConfig)) -> Option<(Monitor, UnixStream)> {
    let kvm = kvm()?;
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(LIMIT)).unwrap();
    let mut monitor = Monitor::new().unwrap();
    let mut config = MachineConfig {
        kvm: 0,
        cpus: 1,
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
        disk_rates: DiskRates::default(),
        nics: vec![],
        vsock: None,
        rng: true,
        on_reboot: OnReboot::Reboot,
        on_panic: OnPanic::Report,
        watchdog: None,
    };
    change(&mut config);
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

fn cpus(monitor: &mut Monitor, command: Command) -> CpuStatus {
    match do_now(monitor, command).unwrap() {
        Answer::Cpus(status) => status,
        other => panic!("{other:?}"),
    }
}

fn status(monitor: &mut Monitor) -> Status {
    match do_now(monitor, Command::Status {}).unwrap() {
        Answer::Status(status) => *status,
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
        let defined = define_with(&elf(&code), |config| {
            (config.on_reboot, config.on_panic) = (OnReboot::End, on_panic)
        });
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

/// Status port of vCPU 0; the others follow.
const CPU_STATUS: u16 = 0x640;
/// The register that names the next vCPU with an event.
const CPU_NEXT: u16 = 0x680;

/// `mov dx, port; in al, dx`
fn input(port: u16) -> Vec<u8> {
    let p = port.to_le_bytes();
    vec![0x66, 0xba, p[0], p[1], 0xec]
}

/// `cmp al, value; jne back by all of this and `body`'s length`: runs `body` until AL has the value.
fn until(value: u8, body: &[u8]) -> Vec<u8> {
    let back = -i8::try_from(body.len() + 4).unwrap();
    [body, &[0x3c, value, 0x75, back as u8]].concat()
}

/// `cmp al, value; jne` past power-off with nothing said, else go on.
fn expect(value: u8) -> Vec<u8> {
    let stop = out(POWER_OFF.0, POWER_OFF.1);
    [&[0x3c, value, 0x74, stop.len() as u8], stop.as_slice()].concat()
}

#[test]
fn a_vcpu_is_plugged_in_ejected_and_plugged_in_again_by_the_same_thread() {
    let code = [
        // All that there is to eject and was not asked for; ports that are not there.
        (0..16).flat_map(|id| out(CPU_STATUS + id, 1)).collect(),
        out(0x681, 1),
        out(0x687, 1),
        // Plugged in: an event, and then none.
        until(1, &input(CPU_NEXT)),
        input(CPU_NEXT),
        expect(0xff),
        input(CPU_STATUS + 1),
        expect(0x0f),
        out(CPU_STATUS + 1, 1),
        input(CPU_STATUS + 1),
        expect(0x0f),
        out(0x3f8, b'a'),
        // Asked back.
        until(0x41, &input(CPU_NEXT)),
        out(CPU_STATUS, 1),
        out(CPU_STATUS + 1, 1),
        input(CPU_STATUS + 1),
        expect(0),
        input(CPU_STATUS),
        expect(0x0f),
        out(0x3f8, b'b'),
        // And again.
        until(1, &input(CPU_NEXT)),
        out(0x3f8, b'c'),
        SPIN.to_vec(),
    ]
    .concat();
    let Some((mut monitor, mut console)) = define_with(&elf(&code), |config| config.cpus_max = Some(3))
    else {
        return;
    };
    let tids = start(&mut monitor, 1);
    let refusal = do_now(&mut monitor, Command::SetCpus { count: 4 }).unwrap_err();
    assert_eq!(
        (refusal.code.as_str(), refusal.message.as_str()),
        ("bad-request", "4 vCPUs; 1 to 3 are possible")
    );
    do_now(&mut monitor, Command::Go {}).unwrap();
    let prepared = cpus(&mut monitor, Command::PrepareCpus { count: 2 });
    assert_eq!((prepared.present, prepared.target, prepared.vcpu_tids.len()), (1, 1, 2));
    assert_eq!(prepared.vcpu_tids[0], tids[0]);
    let mut says = |expected: u8, monitor: &mut Monitor| {
        let mut byte = [0];
        console.read_exact(&mut byte).unwrap();
        assert_eq!(char::from(byte[0]), char::from(expected), "{:?}", status(monitor));
    };
    let plugged = cpus(&mut monitor, Command::SetCpus { count: 2 });
    assert_eq!((plugged.present, plugged.target, &plugged.vcpu_tids), (2, 2, &prepared.vcpu_tids));
    says(b'a', &mut monitor);
    cpus(&mut monitor, Command::SetCpus { count: 1 });
    says(b'b', &mut monitor);
    serve(&mut monitor, |m| {
        m.take_events().iter().any(|e| matches!(e, Event::CpusChanged(now) if now.present == 1))
    });
    do_now(&mut monitor, Command::Pause {}).unwrap();
    assert_eq!(cpus(&mut monitor, Command::SetCpus { count: 2 }).vcpu_tids, prepared.vcpu_tids);
    do_now(&mut monitor, Command::Resume {}).unwrap();
    says(b'c', &mut monitor);
    do_now(&mut monitor, Command::Quit {}).unwrap();
    assert_eq!(monitor.exit(), Some(&ExitReason::Quit));
}

/// In long mode: wakes vCPU 1 by INIT and SIPI through the APIC's registers at 0xfee00000, which the first GiB's page tables do not
/// map, so the guest maps them first.
fn wake_vcpu_1() -> Vec<u8> {
    // mov dword [address], value: the fourth GiB's page directory, at 0x11000, and its entry for the APIC: 2 MiB, present, writable.
    let mut code = Vec::new();
    for (address, value) in [(0xa018u32, 0x1_1003u32), (0x1_1fb8, 0xfee0_0083)] {
        code.extend([0xc7, 0x04, 0x25]);
        code.extend(address.to_le_bytes());
        code.extend(value.to_le_bytes());
    }
    // mov ebx, 0xfee00000 (zero-extends)
    code.extend([0xbb, 0, 0, 0xe0, 0xfe]);
    // Spurious vector register: APIC enabled.
    code.extend([0xc7, 0x83, 0xf0, 0, 0, 0, 0xff, 1, 0, 0]);
    // Interrupt commands to APIC 1: INIT; SIPI with vector 0x10 (address 0x10000).
    for command in [0x4500u32, 0x4610] {
        code.extend([0xc7, 0x83, 0x10, 3, 0, 0, 0, 0, 0, 1]);
        code.extend([0xc7, 0x83, 0, 3, 0, 0]);
        code.extend(command.to_le_bytes());
    }
    code
}

#[test]
fn a_spare_vcpu_runs_nothing_whatever_the_guest_sends_to_it() {
    // Real-mode code at 0x10000: writes an S to the console, then stays.
    let other = [0xba, 0xf8, 0x03, 0xb0, b'S', 0xee, 0xeb, 0xfe];
    let place: Vec<u8> = other
        .iter()
        .enumerate()
        .flat_map(|(at, byte)| [0xc6, 0x04, 0x25, at as u8, 0, 1, 0, *byte])
        .collect();
    let code = [
        place,
        wake_vcpu_1(),
        // Time for the other one to speak, then plugged in: wake it again.
        vec![0xb9, 0, 0, 1, 0, 0xff, 0xc9, 0x75, 0xfc],
        out(0x3f8, b'.'),
        until(1, &input(CPU_NEXT)),
        wake_vcpu_1(),
        SPIN.to_vec(),
    ]
    .concat();
    let Some((mut monitor, mut console)) = define_with(&elf(&code), |config| config.cpus_max = Some(2))
    else {
        return;
    };
    start(&mut monitor, 1);
    cpus(&mut monitor, Command::PrepareCpus { count: 2 });
    do_now(&mut monitor, Command::Go {}).unwrap();
    let mut byte = [0];
    console.read_exact(&mut byte).unwrap();
    assert_eq!(byte, *b".");
    cpus(&mut monitor, Command::SetCpus { count: 2 });
    console.read_exact(&mut byte).unwrap();
    assert_eq!(byte, *b"S");
    do_now(&mut monitor, Command::Quit {}).unwrap();
}

#[test]
fn a_reset_keeps_the_number_of_vcpus_that_was_asked_for_last() {
    // Speaks the status of vCPU 2, then waits for an event of any vCPU (cmp al, 0xff; je back), then resets.
    let code = [
        input(CPU_STATUS + 2),
        vec![0x04, b'0', 0x66, 0xba, 0xf8, 0x03, 0xee],
        input(CPU_NEXT),
        vec![0x3c, 0xff, 0x74, 0xf7],
        out(RESET.0, RESET.1),
        SPIN.to_vec(),
    ]
    .concat();
    let Some((mut monitor, mut console)) = define_with(&elf(&code), |config| config.cpus_max = Some(3))
    else {
        return;
    };
    start(&mut monitor, 1);
    // Before the first instruction a target is simply the shape.
    assert_eq!(cpus(&mut monitor, Command::SetCpus { count: 2 }).present, 2);
    do_now(&mut monitor, Command::Go {}).unwrap();
    let mut says = || {
        let mut byte = [0];
        console.read_exact(&mut byte).unwrap();
        byte[0] - b'0'
    };
    assert_eq!(says(), 0);
    cpus(&mut monitor, Command::SetCpus { count: 3 });
    serve(&mut monitor, |m| status(m).reboots == 1);
    assert_eq!(says(), 0x0f);
    // The guest does not eject it, but resets: it is gone then.
    cpus(&mut monitor, Command::SetCpus { count: 1 });
    serve(&mut monitor, |m| status(m).reboots == 2);
    assert_eq!(says(), 0);
    let now = status(&mut monitor).cpus.unwrap();
    assert_eq!((now.present, now.target, now.vcpu_tids.len()), (1, 1, 3));
    do_now(&mut monitor, Command::Quit {}).unwrap();
}

/// A machine with slots for what comes later, running; and so many disks that came.
fn with_disks(code: &[u8], count: usize) -> Option<Monitor> {
    let (mut monitor, _console) = define_with(&elf(code), |config| config.hotplug_slots = 4)?;
    start(&mut monitor, 1);
    do_now(&mut monitor, Command::Go {}).unwrap();
    for number in 0..count {
        let disk = DiskConfig { fd: 0, read_only: false, serial: String::new() };
        let attached = monitor.execute(Command::AttachDisk(disk), vec![image(&[0; 4096])]).unwrap();
        assert!(matches!(attached, Answer::Attached { device } if device == format!("block{number}")));
    }
    Some(monitor)
}

fn detach(monitor: &mut Monitor, device: &str) {
    do_now(monitor, Command::Detach { device: device.to_owned() }).unwrap();
}

/// Names of the devices that have gone since the last call.
fn gone(monitor: &mut Monitor) -> Vec<String> {
    let names = monitor.take_events().into_iter().filter_map(|event| match event {
        Event::DeviceDetached { device } => Some(device),
        _ => None,
    });
    names.collect()
}

#[test]
fn only_devices_that_were_asked_to_go_are_ejected() {
    // mov dx, EJECT; mov eax, -1; out dx, eax, for ever.
    let code = [0x66, 0xba, 0xa8, 0x06, 0xb8, 0xff, 0xff, 0xff, 0xff, 0xef, 0xeb, 0xfd];
    let Some(mut monitor) = with_disks(&code, 3) else { return };
    let exits = |monitor: &mut Monitor| match do_now(monitor, Command::Stats {}).unwrap() {
        Answer::Stats(stats) => stats.exits,
        other => panic!("{other:?}"),
    };
    let before = exits(&mut monitor);
    serve(&mut monitor, |m| exits(m) > before + 100);
    assert!(gone(&mut monitor).is_empty(), "the guest ejected what nobody asked for");
    detach(&mut monitor, "block1");
    let mut told = Vec::new();
    serve(&mut monitor, |m| {
        told.extend(gone(m));
        !told.is_empty()
    });
    assert_eq!(told, ["block1"]);
    let again = do_now(&mut monitor, Command::Detach { device: "block1".to_owned() });
    assert!(again.unwrap_err().message.contains("there is no device block1"));
    let grown = do_now(&mut monitor, Command::GrowDisk { device: "block2".to_owned() }).unwrap();
    assert!(matches!(grown, Answer::DiskSize { bytes: 4096 }));
}

#[test]
fn a_reset_ends_what_was_asked_to_go_and_keeps_the_rest() {
    // mov dx, DOWN; until it reads other than 0: in eax, dx. Then reset without having ejected anything.
    let mut code = vec![0x66, 0xba, 0xa4, 0x06, 0xed, 0x85, 0xc0, 0x74, 0xfb];
    code.extend(out(RESET.0, RESET.1));
    code.extend(SPIN);
    let Some(mut monitor) = with_disks(&code, 2) else { return };
    for (device, other) in [("block0", Some("block1")), ("block1", None)] {
        let before = status(&mut monitor).reboots;
        detach(&mut monitor, device);
        serve(&mut monitor, |m| status(m).reboots > before);
        assert_eq!(gone(&mut monitor), [device]);
        if let Some(other) = other {
            do_now(&mut monitor, Command::GrowDisk { device: other.to_owned() }).unwrap();
        }
    }
}

#[test]
fn an_event_waits_for_a_guest_that_has_no_driver_yet() {
    // sti; waits for the event, which must not come as an interrupt: there is nothing in the interrupt descriptor table.
    let code = [
        vec![0xfb],
        until(1, &input(CPU_NEXT)),
        vec![0xb9, 0, 0x10, 0, 0, 0xff, 0xc9, 0x75, 0xfc],
        out(0x3f8, b'k'),
        SPIN.to_vec(),
    ]
    .concat();
    let Some((mut monitor, mut console)) = define_with(&elf(&code), |config| config.cpus_max = Some(2))
    else {
        return;
    };
    start(&mut monitor, 1);
    do_now(&mut monitor, Command::Go {}).unwrap();
    cpus(&mut monitor, Command::SetCpus { count: 2 });
    let mut byte = [0];
    console.read_exact(&mut byte).unwrap();
    assert_eq!(byte, *b"k");
    monitor.on_notices();
    let exit = monitor.exit().cloned();
    assert_eq!((exit, status(&mut monitor).reboots), (None, 0));
    do_now(&mut monitor, Command::Quit {}).unwrap();
}

#[test]
fn devices_that_come_and_go_use_nothing_up() {
    let code = [0x66, 0xba, 0xa8, 0x06, 0xb8, 0xff, 0xff, 0xff, 0xff, 0xef, 0xeb, 0xfd];
    let Some(mut monitor) = with_disks(&code, 0) else { return };
    // Two interrupts each: more than the machine has, were they not given back. The same for rings and slots.
    for number in 0..600 {
        let disk = DiskConfig { fd: 0, read_only: false, serial: String::new() };
        let attached = monitor.execute(Command::AttachDisk(disk), vec![image(&[0; 512])]).unwrap();
        assert!(matches!(attached, Answer::Attached { device } if device == format!("block{number}")));
        detach(&mut monitor, &format!("block{number}"));
        serve(&mut monitor, |m| !gone(m).is_empty());
    }
}
