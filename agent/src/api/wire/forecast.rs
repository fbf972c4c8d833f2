//! What a machine asked for over time, and what it is likely to ask for next.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::by_hand::ByHandView;
use super::inside::{InsideView, WantedView};

/// The past and the future of a machine's demand, as `lathe forecast NAME --json` prints it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ForecastView {
    /// Always 1.
    pub schema: u32,
    /// Machine name.
    pub name: String,
    /// `observe`: nothing is resized for it; `on`: it is.
    pub mode: String,
    /// When this was said, seconds since the epoch.
    pub now_unix_sec: u64,
    /// cpu, memory, net, iops: those of which anything was ever measured.
    pub resources: Vec<ForecastResource>,
    /// What is wanted of it now, from inside or by hand.
    #[serde(default)]
    pub wanted: Vec<WantedView>,
    /// What people say of what is ahead; it is part of `ahead`.
    #[serde(default)]
    pub by_hand: ByHandView,
    /// What its guest agent tells; absent without one that is young enough to be asked, or while it does not answer.
    #[serde(default)]
    pub inside: Option<InsideView>,
}

/// One resource.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ForecastResource {
    /// cpu (milliCPU), memory (bytes), net (bit/s, the busier direction of its first nic), iops (I/O operations per second).
    pub resource: String,
    /// Granted now; 0 of net and iops is unlimited.
    pub granted: u64,
    /// Asked for in the last second; absent when that is not known, as of a machine that is off.
    pub now: Option<u64>,
    /// Which number of each minute is forecast: `mean` or `max`.
    pub of: String,
    /// Minutes of the last day that were measured.
    pub measured_min: u64,
    /// How far the forecast has earned trust, parts per thousand; absent with less than 10 minutes measured.
    pub confidence_permille: Option<u64>,
    /// Forecasts for the minute after that were checked against what came; earlier days count half.
    pub judged: u64,
    /// Of these, no more than the 95 % quantile was asked for so often; 950 in a thousand are wanted.
    pub held: u64,
    /// The next minutes, the nearest first; empty when nothing was measured of late.
    pub ahead: Vec<AheadView>,
    /// What comes back, where something does.
    #[serde(default)]
    pub cycle: Option<CycleView>,
    /// The last 10 minutes, a second each; their `max` is empty.
    pub seconds: RingView,
    /// The last day, a minute each.
    pub minutes: RingView,
    /// The last 30 days, an hour each.
    pub hours: RingView,
}

/// A demand that comes back.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CycleView {
    /// From one time to the next, seconds.
    pub period_sec: u64,
    /// How many in a row were alike.
    pub cycles: u64,
    /// When the first of `ahead` begins, seconds since the epoch.
    pub from_unix_sec: u64,
    /// Length of its steps, seconds.
    pub step_sec: u64,
    /// What the steps of the next time ask for at most, in the resource's unit.
    pub ahead: Vec<u64>,
}

/// A minute to come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AheadView {
    /// When it begins, seconds since the epoch.
    pub from_unix_sec: u64,
    /// When it is over.
    pub until_unix_sec: u64,
    /// Half of the time it asks for no more than this.
    pub p50: u64,
    /// In 95 of 100 cases.
    pub p95: u64,
    /// In 99 of 100 cases.
    pub p99: u64,
    /// People have said something of it: a blueprint by hand, or an event.
    #[serde(default)]
    pub by_hand: bool,
}

/// Consecutive steps of the past.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RingView {
    /// Length of a step in seconds.
    pub step_sec: u64,
    /// When the first step began, seconds since the epoch; 0 without any.
    pub from_unix_sec: u64,
    /// Mean of each step, oldest first; null where it was not measured.
    pub mean: Vec<Option<u64>>,
    /// Largest second of each step.
    pub max: Vec<Option<u64>>,
}
