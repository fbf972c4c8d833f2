//! The microVM monitor of Lathe: one process per machine, on KVM.
//!
//! ```text
//! client ── control::server ── monitor ── machine ─┬─ vcpu (a thread each, behind gate) ── bus ─┬─ console, power
//!                (main thread)        notices ◀────┤                                            └─ pci ── virtio
//!                                                  └─ device_thread (one for all devices) ──────────────────┘
//! ```
//!
//! - [`control`]: the control socket, by which everything (descriptors too) reaches the monitor
//! - [`monitor`]: carries commands out, keeps the phase
//! - [`machine`]: memory, controllers, devices and vCPUs put together
//! - [`memory`], [`hotmem`], [`devices`], [`notices`]: its parts
//! - [`vcpu`], [`gate`]: vCPU threads and how they stop and start
//! - [`vcpus`], [`cpu_hotplug`]: vCPUs that come and go
//! - [`slots`]: PCI slots, whose devices come and go likewise
//! - [`device_thread`]: the loop that devices run in
//! - [`bus`], [`power`], [`mod@panic`], [`console`], [`pci`]: what the guest reaches outside of its memory
//! - [`virtio`]: the models of virtio devices
//! - [`sandbox`]: the system call filter
//! - [`mod@arch`]: all that depends on the processor architecture
//!
//! Mechanism only: it knows no policy, opens no file, reads no configuration and holds no privilege.

pub mod arch;
pub mod bus;
pub mod console;
pub mod control;
pub mod cpu_hotplug;
pub mod device_thread;
pub mod devices;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzz;
pub mod gate;
pub mod hotmem;
pub mod machine;
pub mod memory;
pub mod monitor;
pub mod notices;
pub mod panic;
pub mod pci;
pub mod power;
pub mod sandbox;
pub mod slots;
pub mod vcpu;
pub mod vcpus;
pub mod virtio;
