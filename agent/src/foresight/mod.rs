//! What machines ask for over time, seen from outside, and what they will ask for.
//!
//! ```text
//! cgroup, tap, monitor ─► Reading ─► Demand ─► rings: 1 s × 10 min, 1 min × 24 h, 1 h × 30 d ─► lathe_forecast ─► quantiles
//!     (sample, 1 s)       (demand)              │ (ring)              │ a minute at a time       (forecaster)
//!                                               └──── kept: once a minute, what is new of it ◄────────────┘
//! ```
//! | file | what |
//! |---|---|
//! | [`demand`] | from two readings of counters to what was asked for in between |
//! | [`ring`] | the past in three resolutions |
//! | [`forecaster`] | the forecast of one resource, and how it held |
//! | [`rhythm`] | what comes back: cycles of minutes and of hours |
//! | [`profile`] | all of that of one machine |
//! | [`inside`] | what a guest says of itself and wants, made fit to be used |
//! | [`goal`] | what its applications are expected to achieve, and what that takes |
//! | [`by_hand`] | what people say: a blueprint, events |
//! | [`kept`] | the same as bytes, for the store |
//! | [`account`] | how grants met what was asked for, over a day |
//!
//! Pure: times and readings come in. It decides nothing about machines; whoever does (`machines::foresee`) finds here what they need.

pub mod account;
pub mod by_hand;
pub mod demand;
pub mod forecaster;
pub mod goal;
pub mod inside;
pub mod kept;
pub mod profile;
pub mod rhythm;
pub mod ring;

pub use self::profile::Profile;

/// What lathed does about the future.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Nothing is profiled.
    Off,
    /// Machines are profiled and forecast, and it is said what would be done; nothing is changed for it.
    #[default]
    Observe,
    /// Machines are resized ahead of what they are likely to ask for.
    On,
}

/// What a host does about the future of machines that have no say of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// What is done.
    pub mode: Mode,
    /// 0: careful, keeps more and changes seldom; 1000: close to what is asked for.
    pub aggressiveness_permille: u16,
}

impl Default for Settings {
    fn default() -> Self {
        Self { mode: Mode::default(), aggressiveness_permille: 500 }
    }
}

/// Largest aggressiveness.
pub const MAX_AGGRESSIVENESS: u16 = 1000;

impl Mode {
    /// As the configuration and the API write it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Observe => "observe",
            Self::On => "on",
        }
    }
}

/// What is profiled of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Resource {
    /// CPU time, milliCPU.
    Cpu,
    /// Memory, bytes.
    Memory,
    /// The busier direction of its first nic, bit/s.
    Net,
    /// I/O operations per second of all its disks.
    Iops,
}

impl Resource {
    /// All of them, in the order in which they are shown.
    pub const ALL: [Self; 4] = [Self::Cpu, Self::Memory, Self::Net, Self::Iops];

    /// As the API and the command write it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Memory => "memory",
            Self::Net => "net",
            Self::Iops => "iops",
        }
    }

    /// Smallest difference that a ring keeps: 1 milliCPU, 4 KiB, 1 kbit/s, one operation per second.
    pub fn grain(self) -> u64 {
        match self {
            Self::Cpu | Self::Iops => 1,
            Self::Memory => 4096,
            Self::Net => 1000,
        }
    }

    /// Which number of a minute is forecast.
    ///
    /// A second without enough CPU, network or disk is a second that takes longer, so that what has to be there is the minute's mean, and
    /// what passes within a minute is for whoever reacts. Memory that is short for a second is swapped or kills: there it is the maximum.
    pub fn forecast_of(self) -> Of {
        match self {
            Self::Memory => Of::Max,
            Self::Cpu | Self::Net | Self::Iops => Of::Mean,
        }
    }
}

/// A number of a minute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Of {
    /// Mean of its seconds.
    Mean,
    /// Largest of its seconds.
    Max,
}

impl Of {
    /// As the API writes it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Mean => "mean",
            Self::Max => "max",
        }
    }
}
