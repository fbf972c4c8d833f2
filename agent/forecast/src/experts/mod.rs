//! The experts: each turns the past into quantiles, none knows of the others.
//!
//! Point forecasters get their quantiles from their own residuals ([`level::Pointed`]); the others are distributions as they are.

pub(crate) mod analog;
pub(crate) mod level;
pub(crate) mod lstm;
pub(crate) mod regress;
pub(crate) mod season;

use crate::math::{asinh, sinh};
use crate::past::Past;
use crate::quantile::{HORIZONS, HUGE, LEVELS, Points, Quantiles, Window};
use level::Pointed;
use serde::{Deserialize, Serialize};

/// Number of experts.
pub const EXPERTS: usize = 12;

/// Their names, by the number of their bit in [`crate::Config::experts`].
pub const NAMES: [&str; EXPERTS] = [
    "last value",
    "Holt-Winters, day",
    "ARMA(6,2)",
    "ridge autoregression",
    "largest of 12 steps",
    "window of 72 steps",
    "window of 288 steps",
    "same time of other days",
    "analogs",
    "analogs, moved",
    "learnt season",
    "LSTM",
];

/// The first so many forecast points.
const POINTED: usize = 4;
const LSTM: usize = EXPERTS - 1;
const WINDOWS: [usize; 2] = [72, 288];
/// Steps over which the centre and the unit of a series are averaged.
const FRAMED: f32 = 576.0;

/// Where a series lives and how far it usually strays: what learnt models see it through.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Frame {
    pub(crate) centre: f32,
    /// Above 0.
    pub(crate) unit: f32,
}

impl Frame {
    /// The map under which the LSTM sees values: linear near the centre, logarithmic far from it.
    pub(crate) fn enter(self, y: f32) -> f32 {
        asinh((y - self.centre) / self.unit).clamp(-12.0, 12.0)
    }

    pub(crate) fn leave(self, z: f32) -> f32 {
        self.centre + self.unit * sinh(z.clamp(-12.0, 12.0))
    }
}

/// All experts of one series.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Experts {
    pointed: Vec<Pointed>,
    winters: season::HoltWinters,
    arma: regress::Arma,
    ridge: regress::Ridge,
    /// Not saved: the past holds the samples.
    #[serde(skip)]
    windows: [Window; WINDOWS.len()],
    analog: analog::Analog,
    finder: season::Finder,
    profiles: [season::Profile; 2],
    lstm: lstm::Lstm,
    active: u32,
    centre: f32,
    unit: f32,
}

/// Steps of a day; where a day is longer than a season may be, the day is left to coarser series, and where it is
/// shorter than the forecast, a week stands in for it.
fn day_of(step_secs: u32) -> usize {
    let day = 86_400 / step_secs as usize;
    if day > crate::past::KEPT / 5 {
        crate::past::KEPT / 5
    } else if day < 8 {
        7 * day.max(2)
    } else {
        day
    }
}

impl Experts {
    pub(crate) fn new(step_secs: u32, seed: u64, active: u32) -> Self {
        Self {
            pointed: vec![Pointed::new(); POINTED],
            winters: season::HoltWinters::new(day_of(step_secs)),
            arma: regress::Arma::new(),
            ridge: regress::Ridge::new(),
            windows: WINDOWS.map(Window::new),
            analog: analog::Analog::new(),
            finder: season::Finder::new(),
            profiles: [season::Profile::new(), season::Profile::new()],
            lstm: lstm::Lstm::new(seed),
            active,
            centre: 0.0,
            unit: 0.0,
        }
    }

    /// Puts back together what is not saved.
    pub(crate) fn restored(&mut self, past: &Past) {
        self.windows = WINDOWS.map(|n| Window::of(n, past.newest(n)));
    }

    /// A step that is passed over: only what must stay aligned with the past follows it.
    pub(crate) fn fill(&mut self, past: &Past) {
        for (w, n) in self.windows.iter_mut().zip(WINDOWS) {
            w.push(past.near(0), past.ago(n));
        }
    }

    /// Forecasts from the end of `past`; where `learn`, learns first from the sample that it ends with.
    pub(crate) fn step(&mut self, step_secs: u32, past: &Past, learn: bool, out: &mut [Quantiles; EXPERTS]) {
        let (y, now, day) = (past.near(0), past.now(), day_of(step_secs));
        self.fill(past);
        if learn {
            let a = (1.0 / (now as f32 + 1.0)).max(1.0 / FRAMED);
            self.centre += a * (y - self.centre);
            self.unit += a * ((y - self.centre).abs() - self.unit);
            if past.run() > HORIZONS as u64 {
                self.pointed.iter_mut().for_each(|p| p.resolve(now, y));
            }
        }
        let frame = Frame { centre: self.centre, unit: self.unit.max(y.abs() * 1e-3).max(1e-6) };
        let (low, high) = (self.windows[1].quantile(0.0), self.windows[1].quantile(1.0));
        let span = high - low;
        let bounds = ((low - 0.2 * span).max(0.0), (high + 0.5 * span).min(2.0 * HUGE));
        let points: [Points; POINTED] = [
            [y; HORIZONS],
            self.winters.step(now, y),
            self.arma.step(past, frame, bounds, learn),
            self.ridge.step(past, day, frame.unit, learn),
        ];
        for ((p, pointed), out) in points.iter().zip(&mut self.pointed).zip(out.iter_mut()) {
            pointed.issue(now, &p.map(|v| if v.is_finite() { v.clamp(bounds.0, bounds.1) } else { y }), out);
        }
        self.distributions(past, day, frame, learn, out);
    }

    fn distributions(
        &mut self,
        past: &Past,
        day: usize,
        frame: Frame,
        learn: bool,
        out: &mut [Quantiles; EXPERTS],
    ) {
        let top = past.newest(12).iter().fold(0.0_f32, |m, v| m.max(*v));
        out[POINTED] = [[top; LEVELS.len()]; HORIZONS];
        for (w, out) in self.windows.iter().zip(&mut out[POINTED + 1..]) {
            *out = [LEVELS.map(|q| w.quantile(q)); HORIZONS];
        }
        let [.., short, long, daily, asis, moved, learnt, lstm] = out;
        let [own, found] = &mut self.profiles;
        if !own.step(past, day, 7, 2, daily) {
            *daily = *long;
        }
        if !self.analog.step(past, frame.unit, asis, moved) {
            *asis = *short;
            *moved = *short;
        }
        let period = self.finder.step(past, self.unit);
        if !period.is_some_and(|p| found.step(past, p, 12, 1, learnt)) {
            *learnt = *short;
        }
        let on = self.active >> LSTM & 1 == 1;
        if !on || !self.lstm.step(past, day, frame, learn, lstm) {
            *lstm = *short;
        }
    }

    pub(crate) fn sound(&self, step_secs: u32) -> bool {
        self.pointed.len() == POINTED
            && self.pointed.iter().all(Pointed::sound)
            && self.winters.sound(day_of(step_secs))
            && self.arma.sound()
            && self.ridge.sound()
            && self.analog.sound()
            && self.finder.sound()
            && self.profiles.iter().all(season::Profile::sound)
            && self.lstm.sound()
            && self.centre.is_finite()
            && self.unit.is_finite()
            && self.unit >= 0.0
    }
}
