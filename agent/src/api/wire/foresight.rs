//! What is done about a machine's future, and why.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::foresight::Mode;

/// What is done about a machine's future.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ForesightMode {
    /// It is not profiled.
    Off,
    /// It is profiled and forecast, and it is said what would be done.
    #[default]
    Observe,
    /// It is resized so.
    On,
}

impl ForesightMode {
    /// As it is written.
    pub fn word(self) -> &'static str {
        Mode::from(self).word()
    }
}

impl From<ForesightMode> for Mode {
    fn from(mode: ForesightMode) -> Self {
        match mode {
            ForesightMode::Off => Self::Off,
            ForesightMode::Observe => Self::Observe,
            ForesightMode::On => Self::On,
        }
    }
}

impl From<Mode> for ForesightMode {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Off => Self::Off,
            Mode::Observe => Self::Observe,
            Mode::On => Self::On,
        }
    }
}

/// What a machine is to have of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ForesightChoice {
    /// Nothing: it follows the host, in its aggressiveness too unless that is told beside it.
    Host,
    /// It is not profiled.
    Off,
    /// It is profiled and forecast, and it is said what would be done.
    Observe,
    /// It is resized so.
    On,
}

/// Another say of a machine about its future. What is absent stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ForesightRequest {
    /// What is done.
    #[serde(default)]
    pub mode: Option<ForesightChoice>,
    /// 0 (careful: keeps more and changes seldom) to 1000 (close to what it asks for).
    #[serde(default)]
    pub aggressiveness_permille: Option<u64>,
}

/// What is done about a machine's future, and who says so.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ForesightView {
    /// What counts: `off` where the host says so, otherwise the machine's own, otherwise the host's.
    pub mode: ForesightMode,
    /// What counts, 0 (careful) to 1000 (close to what it asks for).
    pub aggressiveness_permille: u64,
    /// The machine's own; `null`: it follows the host.
    pub own_mode: Option<ForesightMode>,
    /// The machine's own; `null`: it follows the host.
    pub own_aggressiveness_permille: Option<u64>,
}

/// Who asked for a change of shape.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum AskedBy {
    /// Somebody, through the API.
    #[default]
    Person,
    /// lathed: the time of an earlier change is over, or the host is short of memory and harvest gives way.
    Lathed,
    /// The sculptor, because of what the machine asks for or is likely to; see `lathe why`.
    Sculptor,
}

/// The last decisions about a machine's shape, as `lathe why NAME --json` prints it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct WhyView {
    /// Always 1.
    pub schema: u32,
    /// Machine name.
    pub name: String,
    /// What is done about its future.
    pub foresight: ForesightView,
    /// When this was said, seconds since the epoch.
    pub now_unix_sec: u64,
    /// In words, what is done with it now, and what keeps it from being resized.
    pub now: String,
    /// Since when decisions are remembered, seconds since the epoch: when lathed started, or the oldest that one before it has stored; a day at
    /// most of how grants met demand.
    pub since_unix_sec: u64,
    /// The newest first, at most 32.
    pub decisions: Vec<DecisionView>,
    /// What was weighed when it was looked at last, of what may change.
    #[serde(default)]
    pub weighings: Vec<WeighingView>,
    /// How good its forecasts and its grants were: cpu, memory, net, iops, those of which anything was measured.
    pub quality: Vec<QualityView>,
}

/// One decision about one resource.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DecisionView {
    /// When it was first made, milliseconds since the epoch.
    pub at_unix_msec: u64,
    /// When it, or nearly the same, was made last: what is only observed is decided again and again.
    pub until_unix_msec: u64,
    /// How often it was made.
    pub times: u64,
    /// cpu (milliCPU), memory (bytes), net (bit/s), iops (I/O operations per second); amounts below are of it.
    pub resource: String,
    /// What was granted.
    pub from: u64,
    /// What was decided.
    pub to: u64,
    /// One word for the cause: `reached` (demand has reached the grant), `ahead` (it is likely to), `wanted`, `bounds`, `idle`, `short` (the
    /// host is).
    pub cause: String,
    /// The cause in a sentence.
    pub why: String,
    /// Asked for in the last second.
    pub demand: Option<u64>,
    /// The most that was asked for in a second of the last 10.
    pub recent: Option<u64>,
    /// The median of what is ahead, at its highest; absent without a forecast.
    pub p50: Option<u64>,
    /// The 95 % quantile, likewise.
    pub p95: Option<u64>,
    /// The 99 % quantile, likewise.
    pub p99: Option<u64>,
    /// How much time the forecast covers, seconds.
    pub ahead_sec: u64,
    /// How far the forecast has earned trust, parts per thousand.
    pub confidence_permille: Option<u64>,
    /// Whether that was enough for the forecast to count; otherwise only what was asked for did.
    pub forecast_counts: bool,
    /// Length of the cycle by which it was decided, seconds; absent where none counted.
    #[serde(default)]
    pub cycle_sec: Option<u64>,
    /// How many of these in a row were alike.
    #[serde(default)]
    pub cycles: Option<u64>,
    /// Changes of this resource in the day before.
    pub changes_a_day: u64,
    /// What was weighed against each other, the chosen one first.
    pub options: Vec<OptionView>,
    /// `observed` (nothing was done), `under-way`, `applied`, `partial`, `failed`, `refused`; `unknown` of what was under way when lathed ended.
    pub outcome: String,
    /// In words, for `partial`, `failed`, `refused` and `unknown`.
    pub reason: String,
    /// The operation that carried it out.
    pub operation: Option<String>,
}

/// An amount that was weighed, with what it costs; of the costs the smallest sum wins.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct OptionView {
    /// The amount.
    pub amount: u64,
    /// Over how much time that is looked at, seconds; costs are means over it, in the unit of the resource.
    pub over_sec: u64,
    /// For demand that it is likely not to serve.
    pub unserved: u64,
    /// For what is likely not to be used.
    pub slack: u64,
    /// For changing at all.
    pub change: u64,
    /// All of it.
    pub total: u64,
    /// In words, why it was not chosen; absent of the one that was.
    pub rejected: Option<String>,
}

/// What was weighed of one resource when the machine was looked at last.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct WeighingView {
    /// cpu, memory.
    pub resource: String,
    /// What it had.
    pub granted: u64,
    /// What it was to have; as granted, when it was to stay as it is.
    pub amount: u64,
    /// Least that covers what it asked for.
    pub need: u64,
    /// Whether its forecast had earned enough trust to count.
    pub forecast_counts: bool,
    /// Changes of this resource in the day before.
    pub changes_a_day: u64,
    /// What was weighed against each other, the chosen one first.
    pub options: Vec<OptionView>,
}

/// How good forecasts and grants of one resource were.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct QualityView {
    /// cpu, memory, net, iops.
    pub resource: String,
    /// Forecasts for the minute after that were checked against what came; earlier days count half.
    pub judged: u64,
    /// Of these, no more than the 95 % quantile was asked for so often; 950 in a thousand are wanted.
    pub held: u64,
    /// Seconds of the last 24 hours of which grant and demand are known, since lathed started; what follows is of these.
    pub measured_sec: u64,
    /// What was granted, on average.
    pub granted: u64,
    /// What was asked for, on average.
    pub asked: u64,
    /// Of what was granted, so much was not asked for, parts per thousand.
    pub slack_permille: u64,
    /// Of what was asked for, so much was more than granted, parts per thousand.
    pub shortfall_permille: u64,
    /// Seconds in which more was asked for than granted.
    pub short_sec: u64,
}
