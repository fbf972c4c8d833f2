//! How firmly a machine is promised what it has.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What happens to a machine when shards are short. In the order of what it is promised.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Tier {
    /// It takes CPU that nobody else wants, up to its grant, and is promised none.
    Harvest,
    /// It shares with other machines of its tier what is left beside the guaranteed ones.
    #[default]
    Standard,
    /// It gets its grant always.
    Guaranteed,
}

impl Tier {
    /// As people and JSON write it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Harvest => "harvest",
            Self::Standard => "standard",
            Self::Guaranteed => "guaranteed",
        }
    }

    /// Its number in plans, 0 to 2.
    pub fn rank(self) -> u64 {
        match self {
            Self::Harvest => 0,
            Self::Standard => 1,
            Self::Guaranteed => 2,
        }
    }

    /// All of them, by rank.
    pub const ALL: [Self; 3] = [Self::Harvest, Self::Standard, Self::Guaranteed];
}

/// Whether a machine has the host's cores to itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Cores {
    /// It runs on whatever CPU is free, but for those that other machines have to themselves.
    #[default]
    Shared,
    /// It runs on whole cores on which no other machine runs, as many as its CPU.
    Dedicated,
}

impl Cores {
    /// As people and JSON write it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Shared => "shared",
            Self::Dedicated => "dedicated",
        }
    }
}

/// The host's CPUs that a machine runs on, as lists such as `0-3,8`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CpusView {
    /// What was asked for when it was made.
    pub cores: Cores,
    /// What it shall run on; `null` while it is off, and while there is no place for the cores that it shall have to itself.
    pub wanted: Option<String>,
    /// What its vCPUs run on, read back; `null` while it is off, and where the host cannot say.
    pub actual: Option<String>,
    /// Why it does not have what it was promised, empty while it has.
    pub problem: String,
}
