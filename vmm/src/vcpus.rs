//! The vCPUs of a machine: made when they are first needed, parked when the guest has given them back, never unmade.
//!
//! ```text
//! possible ──prepare──▶ spare (KVM vCPU, thread, parked) ──renew, plug──▶ the guest's ──eject──▶ spare
//! ```
//!
//! KVM cannot destroy a vCPU (`KVM_CREATE_VCPU` answers EEXIST for ever), and joining a thread takes a time that the guest has a
//! say in: so an ejected one keeps both and is used again. What is only possible costs nothing here.
//!
//! A spare vCPU runs no guest code whatever the guest sends to its APIC; before each use it goes through its reset state.

use std::io;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use crate::arch::x86_64::{cpuid, regs, tsc};
use crate::gate::{Wish, first};
use crate::machine::{MachineError, host, kvm};
use crate::vcpu::{STACK_BYTES, Shared, Vcpu};

#[derive(Default)]
struct Made {
    threads: Vec<JoinHandle<()>>,
    /// Of vCPU 0, 1, …
    tids: Vec<i32>,
    /// The next one, whose thread could not be started: KVM would not make it again.
    unfinished: Option<VcpuFd>,
}

/// See the module.
pub struct Vcpus {
    vm: Arc<VmFd>,
    template: cpuid::Template,
    shared: Arc<Shared>,
    made: Mutex<Made>,
}

impl Vcpus {
    /// None is made yet.
    ///
    /// # Errors
    /// When KVM does not say what it supports.
    pub fn new(system: &Kvm, vm: &Arc<VmFd>, shared: &Arc<Shared>) -> Result<Self, MachineError> {
        let template = cpuid::Template::new(system, shared.bus.cpus.possible())
            .map_err(kvm("say what CPUID it supports"))?;
        Ok(Self { vm: vm.clone(), template, shared: shared.clone(), made: Mutex::default() })
    }

    fn made(&self) -> MutexGuard<'_, Made> {
        self.made.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Thread ids by vCPU number.
    pub fn tids(&self) -> Vec<i32> {
        self.made().tids.clone()
    }

    /// Makes vCPUs `0..count` as far as they are not there. Those that were made before a failure stay.
    ///
    /// # Errors
    /// When KVM or the host refuses.
    pub fn prepare(&self, count: u32) -> Result<(), MachineError> {
        let mut made = self.made();
        while made.tids.len() < count as usize {
            let id = made.tids.len() as u32;
            let vcpu = self.create(id, &mut made)?;
            let (thread, tid) = self.spawn(vcpu, &mut made)?;
            self.shared.kicker.set(id, tid);
            made.threads.push(thread);
            made.tids.push(tid);
        }
        Ok(())
    }

    fn create(&self, id: u32, made: &mut Made) -> Result<Vcpu, MachineError> {
        let fd = match made.unfinished.take() {
            Some(fd) => fd,
            None => self.vm.create_vcpu(u64::from(id)).map_err(kvm("create a vCPU"))?,
        };
        let reset = fd
            .set_cpuid2(&self.template.for_vcpu(id))
            .map_err(kvm("set CPUID"))
            .and_then(|()| regs::ResetState::capture(&fd, id).map_err(kvm("read a vCPU's state")));
        match reset {
            Ok(reset) => {
                // The first one's is that of all.
                self.shared.tsc_offset.get_or_init(|| tsc::offset(&fd));
                Ok(Vcpu { id, fd, reset })
            }
            Err(error) => {
                made.unfinished = Some(fd);
                Err(error)
            }
        }
    }

    fn spawn(&self, vcpu: Vcpu, made: &mut Made) -> Result<(JoinHandle<()>, i32), MachineError> {
        let id = vcpu.id;
        let (started, tid) = channel();
        let shared = self.shared.clone();
        // Handed over by way of this, so that it comes back if there is no thread.
        let handed = Arc::new(Mutex::new(Some(vcpu)));
        let taken = handed.clone();
        self.shared.gate.expect(id);
        let thread =
            std::thread::Builder::new().name(format!("vcpu{id}")).stack_size(STACK_BYTES).spawn(move || {
                let vcpu = taken.lock().unwrap_or_else(PoisonError::into_inner).take();
                if let Some(vcpu) = vcpu {
                    vcpu.live(&shared, &started);
                }
            });
        let failed = match thread {
            Ok(thread) => match tid.recv() {
                Ok(tid) => return Ok((thread, tid)),
                Err(error) => io::Error::other(error),
            },
            Err(error) => error,
        };
        self.shared.gate.forget(id);
        made.unfinished =
            handed.lock().unwrap_or_else(PoisonError::into_inner).take().map(|vcpu: Vcpu| vcpu.fd);
        Err(host("start a vCPU thread")(failed))
    }

    /// Brings those of vCPUs `0..count` that the guest does not have into their reset state, ready to be plugged in, and says which they
    /// are, as a bit mask.
    ///
    /// # Errors
    /// As [`Vcpus::prepare`]; [`MachineError::Stuck`] when they do not get there within `limit`.
    pub fn renew(&self, count: u32, limit: Duration) -> Result<u64, MachineError> {
        self.prepare(count)?;
        let spare = first(count) & !self.shared.bus.cpus.census().present;
        self.shared.gate.renew(spare);
        if self.shared.gate.renewed_within(spare, limit) { Ok(spare) } else { Err(MachineError::Stuck) }
    }

    /// Ends all threads; there is nothing to be done with the vCPUs any more.
    pub fn end(&self) {
        self.shared.gate.wish(Wish::Leave);
        self.shared.kicker.kick_all();
        for thread in self.made().threads.drain(..) {
            // A thread that panicked has said so itself.
            let _ = thread.join();
        }
    }
}
