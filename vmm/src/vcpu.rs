//! vCPU threads: each owns one KVM vCPU, runs it while the [`Gate`] says so, and carries out its exits.
//!
//! ```text
//! Gate ──Run──▶ KVM_RUN ──exit──▶ Bus        ──power off, reset, crash──▶ Notices (main thread)
//!   ▲                │
//!   └──── kicked ────┘   signal ─▶ handler sets immediate_exit of its own thread
//! ```
//!
//! A thread exists from `Start` on, so that it can be put into a cgroup by its id, and runs guest code only after `Go`.

use std::cell::Cell;
use std::io;
use std::sync::atomic::{AtomicI32, AtomicU8, AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, OnceLock};

use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::arch::x86_64::regs::ResetState;
use crate::bus::Bus;
use crate::control::definition::MAX_CPUS;
use crate::gate::{Gate, Pass, Wish};
use crate::notices::{Halt, Notices};
use crate::power::PowerAction;

/// Stack of a vCPU thread in bytes; exits are shallow.
pub const STACK_BYTES: usize = 128 * 1024;

thread_local! {
    /// `immediate_exit` of the vCPU that this thread runs.
    static IMMEDIATE_EXIT: Cell<*const AtomicU8> = const { Cell::new(std::ptr::null()) };
}

fn kick_signal() -> i32 {
    libc::SIGRTMIN()
}

extern "C" fn on_kick(_signal: libc::c_int) {
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: the pointer was set by this very thread from its vCPU's kvm_run, which stays mapped until the thread has cleared
        // the pointer again; an atomic store is async-signal-safe.
        unsafe { (*flag).store(1, Ordering::Relaxed) };
    }
}

/// Installs the handler of the kick signal. Once per process, before the first thread.
///
/// # Errors
/// What sigaction(2) says.
pub fn install_kick_handler() -> io::Result<()> {
    vmm_sys_util::signal::register_signal_handler(kick_signal(), handler)
        .map_err(|e| io::Error::from_raw_os_error(e.errno()))
}

extern "C" fn handler(signal: libc::c_int, _info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    on_kick(signal);
}

/// Interrupts vCPU threads. Known threads only, so a reused thread id cannot be hit: threads live until the process ends or have
/// been joined, after which nobody kicks any more.
pub struct Kicker {
    /// By vCPU number; 0 while there is no thread.
    tids: [AtomicI32; MAX_CPUS as usize],
}

impl Default for Kicker {
    fn default() -> Self {
        Self { tids: [const { AtomicI32::new(0) }; MAX_CPUS as usize] }
    }
}

impl Kicker {
    /// Tells the thread of vCPU `id`.
    pub fn set(&self, id: u32, tid: i32) {
        if let Some(slot) = self.tids.get(id as usize) {
            slot.store(tid, Ordering::Release);
        }
    }

    /// Makes the threads of a set of vCPUs, a bit mask, come out of the guest and look at the gate.
    pub fn kick(&self, cpus: u64) {
        // SAFETY: getpid has no preconditions.
        let pid = unsafe { libc::getpid() };
        for (id, slot) in self.tids.iter().enumerate() {
            let tid = slot.load(Ordering::Acquire);
            if cpus & (1 << id) != 0 && tid != 0 {
                // SAFETY: a signal to a thread of our own process whose handler is installed; a thread that has ended gives ESRCH.
                unsafe { libc::syscall(libc::SYS_tgkill, pid, tid, kick_signal()) };
            }
        }
    }

    /// Likewise every thread that there is.
    pub fn kick_all(&self) {
        self.kick(u64::MAX);
    }
}

/// What all vCPU threads of a machine share.
pub struct Shared {
    /// Where they wait.
    pub gate: Arc<Gate>,
    /// Interrupts them.
    pub kicker: Arc<Kicker>,
    /// Where accesses go.
    pub bus: Bus,
    /// To the main thread.
    pub notices: Arc<Notices>,
    /// What every vCPU's time stamp counter is ahead of the host's by, so that one that comes later agrees with the others; `None`
    /// where KVM does not say it (before Linux 5.16).
    pub tsc_offset: OnceLock<Option<u64>>,
    /// Address of the kernel's entry; set before each `Apply`.
    pub entry: AtomicU64,
    /// Exits to user space of all vCPUs.
    pub exits: AtomicU64,
}

impl Shared {
    /// Stops all vCPUs without waiting for them.
    pub fn hold(&self) {
        self.gate.wish(Wish::Hold);
        self.kicker.kick_all();
    }

    fn halt(&self, halt: Halt) {
        self.notices.halt(halt);
        self.hold();
    }
}

/// A vCPU on its way into its thread.
pub struct Vcpu {
    /// Its number.
    pub id: u32,
    /// KVM's vCPU with CPUID set.
    pub fd: VcpuFd,
    /// What a reset goes back to.
    pub reset: ResetState,
}

impl Vcpu {
    /// What the vCPU's thread does: lives behind the gate. Its id is sent to `started` when it has come up.
    pub fn live(mut self, shared: &Shared, started: &Sender<i32>) {
        let flag = std::ptr::from_mut(&mut self.fd.get_kvm_run().immediate_exit).cast_const();
        IMMEDIATE_EXIT.set(flag.cast());
        // SAFETY: gettid has no preconditions.
        let tid = unsafe { libc::gettid() };
        // Nobody waits any more where the start was given up.
        let _ = started.send(tid);
        self.serve(shared);
        IMMEDIATE_EXIT.set(std::ptr::null());
    }

    fn serve(&mut self, shared: &Shared) {
        let mut seen = 0;
        loop {
            match shared.gate.pass(self.id, &mut seen) {
                Pass::Leave => return,
                Pass::Apply => self.apply(shared),
                Pass::Run => {
                    while shared.gate.runs(self.id) {
                        self.run_once(shared);
                    }
                }
            }
        }
    }

    fn apply(&mut self, shared: &Shared) {
        // Completes an access that was under way: KVM would otherwise finish it on top of the new state.
        self.fd.set_kvm_immediate_exit(1);
        let _ = self.fd.run();
        self.fd.set_kvm_immediate_exit(0);
        let offset = shared.tsc_offset.get().copied().flatten();
        if let Err(error) = self.reset.apply(&self.fd, shared.entry.load(Ordering::Acquire), offset) {
            shared.halt(Halt::Crash(format!("vCPU {} cannot be reset: {error}", self.id)));
        }
    }

    /// Runs guest code until the next exit and carries that out.
    fn run_once(&mut self, shared: &Shared) {
        let bus = &shared.bus;
        let action = match self.fd.run() {
            Ok(VcpuExit::IoOut(port, data)) => bus.port_write(port, data),
            Ok(VcpuExit::IoIn(port, data)) => {
                bus.port_read(port, data);
                PowerAction::None
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                bus.memory_read(address, data);
                PowerAction::None
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                bus.memory_write(address, data);
                PowerAction::None
            }
            Ok(VcpuExit::Shutdown) => return shared.halt(Halt::TripleFault),
            Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::Hlt) => PowerAction::None,
            // Newer kernels say where, older ones fail the call.
            Ok(VcpuExit::MemoryFault { gpa, .. }) => {
                return shared.halt(self.touched_unplugged(&format!(" at {gpa:#x}")));
            }
            Ok(other) => {
                let message = format!("vCPU {} cannot go on: {}", self.id, in_words(&other));
                return shared.halt(Halt::Crash(message));
            }
            Err(error) => return self.interrupted(shared, error),
        };
        shared.exits.fetch_add(1, Ordering::Relaxed);
        match action {
            PowerAction::None => {}
            PowerAction::PowerOff => shared.halt(Halt::PowerOff),
            PowerAction::Reset => shared.halt(Halt::Reset),
            PowerAction::Panicked => shared.notices.panicked(),
        }
    }

    /// KVM cannot reach what the guest has accessed, which is so with closed memory only (`crate::hotmem`).
    fn touched_unplugged(&self, place: &str) -> Halt {
        Halt::Crash(format!("the guest touched memory that it had unplugged{place} (vCPU {})", self.id))
    }

    fn interrupted(&mut self, shared: &Shared, error: kvm_ioctls::Error) {
        match error.errno() {
            // Cleared before the gate is looked at: a kick that comes in between sets it again.
            libc::EINTR => self.fd.set_kvm_immediate_exit(0),
            libc::EAGAIN => {}
            libc::EFAULT => shared.halt(self.touched_unplugged("")),
            _ => shared.halt(Halt::Crash(format!("vCPU {} cannot run: {error}", self.id))),
        }
    }
}

/// An exit that ends the machine, for people (Documentation/virt/kvm/api.rst of the kernel, section 5).
fn in_words(exit: &VcpuExit<'_>) -> String {
    match exit {
        VcpuExit::FailEntry(reason, _) => {
            format!("the processor refuses to enter the guest (hardware reason {reason:#x})")
        }
        VcpuExit::InternalError => "KVM cannot emulate what the guest did (internal error)".to_owned(),
        VcpuExit::SystemEvent(kind, _) => format!("KVM reports system event {kind}"),
        VcpuExit::Exception => "KVM reports an exception that nobody asked for".to_owned(),
        VcpuExit::Unknown => "KVM does not know why it stopped".to_owned(),
        other => format!("an exit that no machine of this kind has ({other:?})"),
    }
}
