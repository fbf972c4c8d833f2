//! `inside kexec KERNEL INITRD CMDLINE` and `inside reserve THREADS SECONDS`: what scenarios do as root inside guests, and busybox cannot.
//!
//! `kexec` loads another kernel and starts it at once, past firmware and init: kexec_file_load(2), `LINUX_REBOOT_CMD_KEXEC` of reboot(2). It
//! says so on its output in between, which has gone out by then if it is a terminal.
//! `reserve` holds 85 % of a CPU per thread by `SCHED_DEADLINE` (sched(7)) without using it; the kernel then refuses to take a CPU offline
//! whose share the rest could not carry (Documentation/scheduler/sched-deadline.rst, section 5).

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use nix::libc;

const LINUX_REBOOT_CMD_KEXEC: libc::c_int = 0x4558_4543;
const SCHED_DEADLINE: u32 = 6;
/// Of [`PERIOD_NSEC`], so that two fit on two CPUs, beside the 5 % of each that Linux 6.12 keeps for fair tasks, and not on one.
const RUNTIME_NSEC: u64 = 8_500_000;
const PERIOD_NSEC: u64 = 10_000_000;

/// `struct sched_attr` of linux/sched/types.h, first version.
#[repr(C)]
struct SchedAttr {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

fn check(result: libc::c_long) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn kexec(kernel: &str, initrd: &str, cmdline: &str) -> io::Result<()> {
    let (kernel, initrd) = (File::open(kernel)?, File::open(initrd)?);
    let cmdline = CString::new(cmdline)?;
    let length = cmdline.as_bytes_with_nul().len();
    // SAFETY: the descriptors are open and `cmdline` has `length` bytes; the call keeps neither.
    check(unsafe {
        libc::syscall(
            libc::SYS_kexec_file_load,
            kernel.as_raw_fd(),
            initrd.as_raw_fd(),
            length,
            cmdline.as_ptr(),
            0_u64,
        )
    })?;
    println!("inside: kexec");
    // What is no terminal has nothing to wait for.
    let _ = nix::sys::termios::tcdrain(io::stdout());
    // SAFETY: reads and writes no memory of this process; what becomes of the machine is what was asked for.
    check(libc::c_long::from(unsafe { libc::reboot(LINUX_REBOOT_CMD_KEXEC) }))
}

fn reserve_here() -> io::Result<()> {
    let attr = SchedAttr {
        size: size_of::<SchedAttr>() as u32,
        policy: SCHED_DEADLINE,
        flags: 0,
        nice: 0,
        priority: 0,
        runtime: RUNTIME_NSEC,
        deadline: PERIOD_NSEC,
        period: PERIOD_NSEC,
    };
    // SAFETY: `attr` is a whole structure of the size that it says; 0 is the calling thread.
    check(unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attr, 0) })
}

fn reserve(threads: usize, hold: Duration) -> io::Result<()> {
    let workers: Vec<_> = (0..threads)
        .map(|_| {
            std::thread::spawn(move || {
                reserve_here()?;
                println!("inside: reserved");
                std::thread::sleep(hold);
                io::Result::Ok(())
            })
        })
        .collect();
    for worker in workers {
        worker.join().map_err(|_| io::Error::other("a thread panicked"))??;
    }
    Ok(())
}

fn main() -> io::Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let number =
        |word: &str| word.parse::<u64>().map_err(|_| io::Error::other(format!("{word} is no number")));
    match words[..] {
        ["kexec", kernel, initrd, cmdline] => kexec(kernel, initrd, cmdline),
        ["reserve", threads, seconds] => {
            reserve(number(threads)? as usize, Duration::from_secs(number(seconds)?))
        }
        _ => Err(io::Error::other(
            "usage: inside kexec KERNEL INITRD CMDLINE | inside reserve THREADS SECONDS",
        )),
    }
}
