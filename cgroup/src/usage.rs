//! Everything that a machine uses, in one reading. Counters only grow; rates are the reader's subtraction.

use std::path::Path;

use crate::cpu::{self, CpuUsage};
use crate::error::Error;
use crate::io::{self, IoUsage};
use crate::memory::{self, MemoryUsage};
use crate::pids;
use crate::pressure::{self, PressureUsage};

/// What a machine uses and has used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// CPU of all threads of the machine, against its wall.
    pub machine: CpuUsage,
    /// CPU of the vCPU threads.
    pub vcpu: CpuUsage,
    /// CPU of the monitor's other threads.
    pub vmm: CpuUsage,
    /// Memory of the whole machine.
    pub memory: MemoryUsage,
    /// Processes and threads of the whole machine.
    pub pids_current: u64,
    /// Block I/O of the whole machine.
    pub io: IoUsage,
    /// Stalls of the whole machine.
    pub pressure: PressureUsage,
}

pub(crate) fn read(machine: &Path, vcpu: &Path, vmm: &Path) -> Result<Usage, Error> {
    Ok(Usage {
        machine: cpu::read_usage(machine)?,
        vcpu: cpu::read_usage(vcpu)?,
        vmm: cpu::read_usage(vmm)?,
        memory: memory::read_usage(machine)?,
        pids_current: pids::read_current(machine)?,
        io: io::read_usage(machine)?,
        pressure: pressure::read_usage(machine)?,
    })
}
