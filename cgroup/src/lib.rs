//! Cgroup v2 mechanism of Lathe, one file per controller.
//!
//! Everything here works below **one delegated cgroup**, whose path is an argument. Nothing above it is read for a
//! decision but what [`cpuset::effective`] tells, nothing of it written but the few files that [`standing`] names, no policy is known (what share, which tier: the agent's business), nothing is remembered: the
//! kernel's files are the state, so that an agent that was restarted finds everything again.
//!
//! ```text
//! lathe.slice/lathe-vm@web.service      the unit's cgroup: systemd's and root's, never the monitor's; four files of it ours
//! ├─ .control                           systemd's control processes (ExecStartPost= and the like), left alone
//! └─ machine/        "domain threaded": memory, io, pids, and the wall of all its CPU   ┐
//!    ├─ vcpu/        threaded: what the vCPU threads may take of that                   ├ owned by user `lathe`
//!    └─ vmm/         threaded: what all other threads may take                          ┘
//! ```
//! A quota holds for everything below its cgroup, so the wall in `machine` is what a machine can never be above, whoever of its threads runs;
//! what stands in `vcpu` and `vmm` only divides it.
//!
//! | file | what |
//! |---|---|
//! | [`tree`] | the tree above: prepared by the root helper, opened by the agent, removed |
//! | [`cpu`], [`cpuset`], [`memory`], [`io`], [`pids`], [`pressure`], `freezer` | one kernel controller each |
//! | [`standing`] | what a machine gets when it and its siblings want the same |
//! | [`usage`] | everything that a machine uses, in one reading |
//! | `file`, `hierarchy`, `error` | the only code that touches files; cgroups-rs rooted at our path; what went wrong, where, and what to check |
//!
//! Kernel: `Documentation/admin-guide/cgroup-v2.rst` ("Threads", "No Internal Process Constraint", "Delegation").

pub mod cpu;
pub mod cpuset;
mod error;
mod file;
mod freezer;
mod hierarchy;
pub mod io;
pub mod memory;
pub mod pids;
pub mod pressure;
pub mod standing;
#[cfg(test)]
mod testing;
pub mod tree;
pub mod units;
pub mod usage;

pub use cpu::{CpuDivision, CpuGroup, CpuLimits, CpuPatch, CpuUsage};
pub use cpuset::{CpuList, Cpuset, CpusetPatch};
pub use error::Error;
pub use io::{Device, IoLimits, IoPatch, IoUsage};
pub use memory::{MemoryEvents, MemoryLimits, MemoryPatch, MemoryUsage};
pub use pressure::{Pressure, PressureUsage, Resource, Stall, Trigger};
pub use standing::{CpuTurn, Protection, Reach, Standing};
pub use tree::{MachineTree, Owner, Removal};
pub use units::{Bytes, MilliCpu, Patch};
pub use usage::Usage;
