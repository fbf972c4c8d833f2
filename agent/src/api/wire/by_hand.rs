//! What people say of the future of a machine. Times are UTC.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What is forecast of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ForecastOf {
    /// milliCPU.
    Cpu,
    /// Bytes.
    Memory,
    /// bit/s, the busier direction of its first nic.
    Net,
    /// I/O operations per second of all its disks.
    Iops,
}

/// A blueprint by hand, which takes the place of the one before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BlueprintRequest {
    /// How far it may be trusted, parts per thousand.
    #[serde(default = "certain")]
    pub confidence_permille: u32,
    /// 1 to 384 steps; of a resource no two at the same time, but for daily ones, which yield to those that are once.
    pub steps: Vec<BlueprintStep>,
}

fn certain() -> u32 {
    1000
}

/// What one resource will be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BlueprintStep {
    /// Which one.
    pub resource: ForecastOf,
    /// Every day, or once.
    #[serde(default)]
    pub daily: bool,
    /// When it begins: seconds since the epoch; of a daily one since midnight.
    pub from_sec: u64,
    /// How long it is, seconds; a day at most of a daily one, else 31 days.
    pub for_sec: u64,
    /// Half of the time it asks for no more than this, in the resource's unit.
    pub p50: u64,
    /// In 95 of 100 cases.
    pub p95: u64,
    /// In 99 of 100 cases.
    pub p99: u64,
}

/// An event that raises what is forecast.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AnnounceRequest {
    /// Every day, or once.
    #[serde(default)]
    pub daily: bool,
    /// When it begins: seconds since the epoch; of a daily one since midnight.
    pub from_sec: u64,
    /// How long it is, seconds; a day at most of a daily one, else 31 days.
    pub for_sec: u64,
    /// What it raises, each resource once; with none, all that is measured to the most of the last 30 days.
    #[serde(default)]
    pub raises: Vec<RaiseView>,
}

/// By how much an event raises a resource.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RaiseView {
    /// Which one.
    pub resource: ForecastOf,
    /// To so much, by so much, or by so many hundredths of a percent of what was asked for in the hour before.
    pub raise: Raise,
}

/// How much.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Raise {
    /// At least so much, in the resource's unit.
    To(u64),
    /// So much more.
    Up(u64),
    /// So many hundredths of a percent more.
    UpCentipercent(u32),
}

/// What people have said of a machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ByHandView {
    /// How far the blueprint may be trusted, parts per thousand.
    pub confidence_permille: u32,
    /// The blueprint by hand; empty without one.
    pub steps: Vec<BlueprintStep>,
    /// Events that are announced, by name; what is over is shown for a day.
    pub events: Vec<AnnouncedView>,
}

/// An event that is announced.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AnnouncedView {
    /// Unique for the machine.
    pub name: String,
    /// Every day, or once.
    pub daily: bool,
    /// When it begins: seconds since the epoch; of a daily one since midnight.
    pub from_sec: u64,
    /// How long it is, seconds.
    pub for_sec: u64,
    /// What it raises; nothing: all that is measured, to the most of the last 30 days.
    pub raises: Vec<RaiseView>,
    /// When it begins next, or began if it goes on now, seconds since the epoch; absent when it is over.
    pub next_unix_sec: Option<u64>,
    /// It goes on now.
    pub now: bool,
}
