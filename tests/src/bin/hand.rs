//! `hand`: the init of a benchmark's guest, and the fastest possible hand in it. Brings hot-plugged CPUs online the moment the kernel
//! tells of them and says on the console when a task has run there; says how much memory there is when it changes; touches memory
//! on request.
//!
//! ```text
//! console in:  touch MIB · drop · online CPU · offline CPU · serve SECONDS WORK
//! console out: ready · cpu N · memory KIB · touched · dropped · offline N · served COUNT P50 P99 IDLE · error …
//! ```
//! `serve` is a request server on CPU 0: a hundred requests a second, each with so many rounds of work; idle work takes what it leaves. It
//! says how many it has served, two quantiles of their latency in microseconds, and the rounds of idle work.
//!
//! Uevents: kobject_uevent(7) by netlink, group 1, as the kernel sends them.

use std::fs;
use std::hint::black_box;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::libc;
use nix::mount::{MsFlags, mount};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};
use nix::sys::termios::{LocalFlags, SetArg, tcgetattr, tcsetattr};
use nix::unistd::Pid;

/// How often the amount of memory is looked at.
const LOOK: Duration = Duration::from_millis(2);
/// The same while requests are served: each look takes from the server.
const LOOK_SERVING: Duration = Duration::from_millis(50);
/// Between two requests.
const REQUEST: Duration = Duration::from_millis(10);
/// Rounds of idle work between two looks whether it shall go on.
const IDLE_ROUNDS: u64 = 1000;
/// Uevents of the kernel itself.
const KERNEL_GROUP: u32 = 1;
/// Where the modules lie, in loading order by name.
const MODULES: &str = "/modules";

fn say(line: &str) {
    // A console that does not take the line leaves nobody to tell.
    let _ = io::stdout().write_all(format!("{line}\n").as_bytes());
}

fn mount_all() -> io::Result<()> {
    for (what, target) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        mount(Some(what), target, Some(what), MsFlags::empty(), None::<&str>)?;
    }
    Ok(())
}

fn load_modules() -> io::Result<()> {
    let Ok(entries) = fs::read_dir(MODULES) else { return Ok(()) };
    let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    for path in paths {
        let file = fs::File::open(path)?;
        // SAFETY: the kernel reads from an open descriptor and an empty, terminated string.
        let loaded = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
        if loaded != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Runs a task on `cpu` and says so.
fn visit(cpu: usize) {
    let visited = thread::spawn(move || stay_on(cpu));
    match visited.join() {
        Ok(Ok(())) => say(&format!("cpu {cpu}")),
        other => say(&format!("error: nothing runs on CPU {cpu}: {other:?}")),
    }
}

fn switch(cpu: usize, online: bool) {
    let path = format!("/sys/devices/system/cpu/cpu{cpu}/online");
    match fs::write(&path, if online { "1" } else { "0" }) {
        Ok(()) if online => visit(cpu),
        Ok(()) => say(&format!("offline {cpu}")),
        Err(error) => say(&format!("error: {path}: {error}")),
    }
}

/// Keeps the calling thread on a CPU.
fn stay_on(cpu: usize) -> io::Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu)?;
    Ok(sched_setaffinity(Pid::from_raw(0), &set)?)
}

fn work(rounds: u64) {
    let mut state = 1u64;
    for _ in 0..rounds {
        state = black_box(state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1));
    }
}

/// Works when CPU 0 has nothing else to do, until told otherwise.
fn idle_work(done: &AtomicU64, serving: &AtomicBool) -> io::Result<()> {
    stay_on(0)?;
    let lowest = libc::sched_param { sched_priority: 0 };
    // SAFETY: the kernel reads one sched_param; 0 is the calling thread.
    if unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &lowest) } != 0 {
        return Err(io::Error::last_os_error());
    }
    while serving.load(Ordering::Relaxed) {
        work(IDLE_ROUNDS);
        done.fetch_add(IDLE_ROUNDS, Ordering::Relaxed);
    }
    Ok(())
}

/// Serves requests that come at fixed times: one that waits for those before it has waited since its own time.
fn serve_requests(seconds: u64, rounds: u64) -> io::Result<String> {
    let (idle, serving) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(true)));
    let idler = thread::spawn({
        let (idle, serving) = (idle.clone(), serving.clone());
        move || idle_work(&idle, &serving)
    });
    stay_on(0)?;
    let (begun, lasts) = (Instant::now(), Duration::from_secs(seconds));
    let (mut due, mut latencies) = (REQUEST, Vec::new());
    while due < lasts && begun.elapsed() < lasts {
        thread::sleep(due.saturating_sub(begun.elapsed()));
        work(rounds);
        latencies.push(begun.elapsed().saturating_sub(due));
        due += REQUEST;
    }
    thread::sleep(lasts.saturating_sub(begun.elapsed()));
    let idle = idle.load(Ordering::Relaxed);
    serving.store(false, Ordering::Relaxed);
    idler.join().map_err(|_| io::Error::other("the idle worker failed"))??;
    latencies.sort();
    let at = |percent: usize| latencies.get(latencies.len() * percent / 100).map_or(0, Duration::as_micros);
    Ok(format!("served {} {} {} {idle}", latencies.len(), at(50), at(99)))
}

fn begin_serving(words: &str, serving: Arc<AtomicBool>) {
    let mut numbers = words.split_ascii_whitespace().filter_map(|word| word.parse().ok());
    let (Some(seconds), Some(rounds)) = (numbers.next(), numbers.next()) else {
        return say("error: serve SECONDS WORK");
    };
    serving.store(true, Ordering::Relaxed);
    thread::spawn(move || {
        let served = serve_requests(seconds, rounds);
        serving.store(false, Ordering::Relaxed);
        say(&served.unwrap_or_else(|error| format!("error: cannot serve: {error}")));
    });
}

fn uevents() -> io::Result<OwnedFd> {
    let fd = socket(
        AddressFamily::Netlink,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkKObjectUEvent,
    )?;
    bind(fd.as_raw_fd(), &NetlinkAddr::new(0, KERNEL_GROUP))?;
    Ok(fd)
}

/// `add@/devices/system/cpu/cpu3` → 3.
fn added_cpu(event: &[u8]) -> Option<usize> {
    let head = event.split(|byte| *byte == 0).next()?;
    std::str::from_utf8(head).ok()?.strip_prefix("add@/devices/system/cpu/cpu")?.parse().ok()
}

fn memory_kib() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    text.split_ascii_whitespace().nth(1).and_then(|word| word.parse().ok()).unwrap_or(0)
}

/// Memory that was touched and is kept, and whether requests are being served.
#[derive(Default)]
struct Held {
    memory: Vec<u8>,
    serving: Arc<AtomicBool>,
}

impl Held {
    fn obey(&mut self, line: &str) {
        let (verb, words) = line.split_once(' ').unwrap_or((line, "0"));
        let number: usize = words.trim().parse().unwrap_or(0);
        match verb {
            "touch" => {
                self.memory = vec![1; number << 20];
                say("touched");
            }
            "drop" => {
                self.memory = Vec::new();
                say("dropped");
            }
            "serve" => begin_serving(words, self.serving.clone()),
            "online" => switch(number, true),
            "offline" => switch(number, false),
            _ => say(&format!("error: what is {line:?}?")),
        }
    }
}

/// Lines are not sent back: each byte on the serial line costs an exit.
fn no_echo() -> io::Result<()> {
    let input = io::stdin();
    let mut settings = tcgetattr(&input)?;
    settings.local_flags.remove(LocalFlags::ECHO);
    Ok(tcsetattr(&input, SetArg::TCSANOW, &settings)?)
}

fn serve() -> io::Result<()> {
    no_echo()?;
    let events = uevents()?;
    // SAFETY: descriptor 0 is the console, opened by the kernel for init and used by nobody else here.
    let mut console = unsafe { fs::File::from_raw_fd(0) };
    let mut held = Held::default();
    let mut line = Vec::new();
    let mut memory = memory_kib();
    say(&format!("ready\nmemory {memory}"));
    loop {
        let look = if held.serving.load(Ordering::Relaxed) { LOOK_SERVING } else { LOOK };
        let timeout = PollTimeout::try_from(look).unwrap_or(PollTimeout::NONE);
        let mut fds =
            [PollFd::new(events.as_fd(), PollFlags::POLLIN), PollFd::new(console.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, timeout)?;
        let [event, input] = fds.map(|fd| fd.any().unwrap_or(false));
        if event {
            let mut buffer = [0; 8192];
            let count = recv(events.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT).unwrap_or(0);
            if let Some(cpu) = added_cpu(&buffer[..count]) {
                switch(cpu, true);
            }
        }
        if input {
            let mut byte = [0];
            if console.read(&mut byte)? == 1 && byte != *b"\n" {
                line.push(byte[0]);
            } else {
                held.obey(&String::from_utf8_lossy(&std::mem::take(&mut line)));
            }
        }
        let now = memory_kib();
        if now != memory {
            memory = now;
            say(&format!("memory {memory}"));
        }
    }
}

fn main() {
    let ended = mount_all().and_then(|()| load_modules()).and_then(|()| serve());
    say(&format!("error: {ended:?}"));
    loop {
        thread::park();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_says_what_it_has_done() {
        let said = serve_requests(1, 1000).unwrap();
        let numbers: Vec<u64> =
            said.strip_prefix("served ").unwrap().split(' ').map(|word| word.parse().unwrap()).collect();
        let [count, p50, p99, idle] = numbers[..] else { panic!("{said}") };
        assert!(count > 0 && count < 100 && p50 <= p99 && idle % IDLE_ROUNDS == 0, "{said}");
    }

    #[test]
    fn an_added_cpu_is_read_from_its_event() {
        assert_eq!(added_cpu(b"add@/devices/system/cpu/cpu3\0ACTION=add\0"), Some(3));
        assert_eq!(added_cpu(b"remove@/devices/system/cpu/cpu3\0"), None);
    }
}
