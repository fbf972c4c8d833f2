//! One series: samples in, a blueprint out, with everything that is known of it in one bounded state.

use crate::blueprint::Blueprint;
use crate::calibrate::Calibration;
use crate::experts::{EXPERTS, Experts};
use crate::mix::Mix;
use crate::past::{KEPT, Past};
use crate::quantile::{HORIZONS, HUGE, LEVELS, Quantiles};
use crate::trust::Trust;
use serde::{Deserialize, Serialize};

/// Layout of a saved state.
const VERSION: u16 = 1;
const MAGIC: [u8; 4] = *b"LFCS";
/// The most bytes that a saved state may take.
pub const MAX_STATE: usize = 32 * 1024;
/// Missing steps that are forecast through; a longer gap is passed over.
const BRIDGED: u64 = 12;
/// Samples in a row from the past after which the clock is taken to have been set back.
const SET_BACK: u8 = 12;

/// What a series is told at its start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// Length of a step in seconds, 1..=86,400.
    pub step_secs: u32,
    /// Seed of all that is random.
    pub seed: u64,
    /// A bit per expert (see [`crate::NAMES`]) that takes part; the first always does.
    pub experts: u32,
}

impl Default for Config {
    /// Steps of 5 minutes, all experts.
    fn default() -> Self {
        Self { step_secs: 300, seed: 1, experts: u32::MAX }
    }
}

/// What became of a sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was learnt from.
    Learned,
    /// It was learnt from, after so many steps without a sample.
    AfterGap(u64),
    /// It is not a number: its step counts as one without a sample.
    Unusable,
    /// Its step has a sample already, or is past.
    Late,
}

/// Why a saved state was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    /// Not a state of this crate, or cut short.
    #[error("{len} bytes are no saved series (most: {MAX_STATE})")]
    NotAState {
        /// Its size in bytes.
        len: usize,
    },
    /// Saved by another version.
    #[error("state has layout {found}, this program reads {VERSION}")]
    Version {
        /// The layout found.
        found: u16,
    },
    /// Read, but it contradicts itself.
    #[error("state contradicts itself")]
    Unsound,
}

/// One series. Equal samples, seed and configuration give equal forecasts, bit by bit.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Series {
    config: Config,
    /// Number of the step of the newest sample.
    newest: Option<u64>,
    late: u8,
    past: Past,
    experts: Experts,
    mix: Mix,
    calibration: Calibration,
    trust: Trust,
    made: Quantiles,
}

impl Series {
    /// Starts without a past. A step outside 1..=86,400 s is cut to that range.
    pub fn new(config: Config) -> Self {
        let config =
            Config { step_secs: config.step_secs.clamp(1, 86_400), experts: config.experts | 1, ..config };
        Self {
            newest: None,
            late: 0,
            past: Past::new(),
            experts: Experts::new(config.step_secs, config.seed, config.experts),
            mix: Mix::new(config.experts),
            calibration: Calibration::new(),
            trust: Trust::new(),
            made: [[0.0; LEVELS.len()]; HORIZONS],
            config,
        }
    }

    /// Takes the demand `y` at `t` seconds (of any epoch, as long as it is the same).
    ///
    /// Negative demand counts as 0, beyond 1e15 as 1e15; what is no number as missing. Samples belong into steps; the first
    /// of a step is taken.
    pub fn observe(&mut self, t: u64, y: f32) -> Outcome {
        let step = t / u64::from(self.config.step_secs);
        let gap = match self.newest {
            None => 0,
            Some(newest) if step > newest => step - newest - 1,
            Some(_) if self.late < SET_BACK => {
                self.late += 1;
                return Outcome::Late;
            }
            Some(_) => KEPT as u64,
        };
        self.late = 0;
        self.newest = Some(step);
        self.pass(gap);
        if !y.is_finite() {
            self.pass(1);
            return Outcome::Unusable;
        }
        let y = y.clamp(0.0, HUGE);
        self.past.push(y);
        let now = self.past.now();
        if self.past.run() > HORIZONS as u64 {
            self.mix.resolve(now, y);
            self.calibration.resolve(now, y);
            self.trust.learn(y, self.made[0][3]);
        }
        self.forecast_from_here(true);
        if gap > 0 { Outcome::AfterGap(gap) } else { Outcome::Learned }
    }

    /// Steps without a sample: the last value stands in for them, and nothing is learnt.
    fn pass(&mut self, steps: u64) {
        if steps == 0 {
            return;
        }
        self.trust.miss(steps);
        let held = self.past.near(0);
        if steps > BRIDGED {
            for _ in 0..(steps - BRIDGED).min(KEPT as u64) {
                self.past.push(held);
                self.experts.fill(&self.past);
            }
            self.past.skip((steps - BRIDGED).saturating_sub(KEPT as u64));
            self.past.broke();
        }
        for _ in 0..steps.min(BRIDGED) {
            self.past.push(held);
            self.forecast_from_here(false);
        }
    }

    fn forecast_from_here(&mut self, learn: bool) {
        let mut experts = [[[0.0; LEVELS.len()]; HORIZONS]; EXPERTS];
        self.experts.step(self.config.step_secs, &self.past, learn, &mut experts);
        let mut made = [[0.0; LEVELS.len()]; HORIZONS];
        let now = self.past.now();
        self.mix.issue(now, &experts, &mut made);
        self.calibration.issue(now, &mut made);
        let y = self.past.near(0);
        for v in made.iter_mut().flatten() {
            // A flat series must not be forecast a rounding error too low.
            let near = (*v - y).abs() <= 4e-6 * y;
            *v = if near || !v.is_finite() { y } else { v.clamp(0.0, 10.0 * HUGE) };
        }
        for row in &mut made {
            row.sort_unstable_by(f32::total_cmp);
        }
        self.made = made;
    }

    /// The forecast from the newest sample.
    pub fn forecast(&self) -> Blueprint {
        Blueprint {
            step_secs: self.config.step_secs,
            quantiles: self.made,
            confidence: self.trust.confidence(),
        }
    }

    /// The state as bytes, at most [`MAX_STATE`].
    pub fn save(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(VERSION.to_le_bytes());
        postcard::to_extend(self, bytes).unwrap_or_default() // writing to memory cannot fail
    }

    /// A series that goes on exactly where [`Series::save`] left it.
    ///
    /// # Errors
    /// Bytes that are no state, of another version, or whose numbers could not have come about.
    pub fn restore(bytes: &[u8]) -> Result<Self, RestoreError> {
        let refused = RestoreError::NotAState { len: bytes.len() };
        let (head, body) = bytes.split_at_checked(6).ok_or(refused.clone())?;
        if bytes.len() > MAX_STATE || head[..4] != MAGIC {
            return Err(refused);
        }
        let found = u16::from_le_bytes([head[4], head[5]]);
        if found != VERSION {
            return Err(RestoreError::Version { found });
        }
        let (mut series, rest) = postcard::take_from_bytes::<Self>(body).map_err(|_| refused.clone())?;
        if !rest.is_empty() {
            return Err(refused);
        }
        if !series.sound() {
            return Err(RestoreError::Unsound);
        }
        series.experts.restored(&series.past);
        Ok(series)
    }

    fn sound(&self) -> bool {
        (1..=86_400).contains(&self.config.step_secs)
            && self.past.sound()
            && self.experts.sound(self.config.step_secs)
            && self.mix.sound()
            && self.calibration.sound()
            && self.trust.sound()
            && self.made.iter().flatten().all(|v| v.is_finite() && *v >= 0.0)
            && self.made.iter().all(|row| row.is_sorted())
    }
}
