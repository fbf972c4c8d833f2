//! Experts by least squares: ARMA by recursive least squares, and a ridge regression refitted online.

use super::Frame;
use crate::past::Past;
use crate::quantile::{HORIZONS, Points};
use serde::{Deserialize, Serialize};

const P: usize = 6;
const Q: usize = 2;
const N: usize = 1 + P + Q;

/// ARMA(6,2) by extended recursive least squares (Ljung and Söderström 1983), iterated ahead.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Arma {
    cov: Vec<f64>,
    coef: [f64; N],
    errors: [f64; Q],
    size: f64,
}

const FORGET: f64 = 0.9985;

impl Arma {
    pub(crate) fn new() -> Self {
        let mut cov = vec![0.0; N * N];
        (0..N).for_each(|i| cov[i * N + i] = 10.0);
        let mut coef = [0.0; N];
        coef[1] = 1.0;
        Self { cov, coef, errors: [0.0; Q], size: 0.0 }
    }

    pub(crate) fn sound(&self) -> bool {
        self.cov.len() == N * N
            && self
                .cov
                .iter()
                .chain(&self.coef)
                .chain(&self.errors)
                .chain([&self.size])
                .all(|v| v.is_finite())
    }

    fn regressors(unit: f64, centre: f64, past: &Past, from: usize, errors: &[f64; Q]) -> [f64; N] {
        std::array::from_fn(|i| match i {
            0 => 0.1,
            i if i <= P => (f64::from(past.near(from + i - 1)) - centre) / unit,
            i => errors[i - P - 1],
        })
    }

    /// `past` ends with the new sample; `frame` says where the series lives, `bounds` what a forecast may be.
    pub(crate) fn step(&mut self, past: &Past, frame: Frame, bounds: (f32, f32), learn: bool) -> Points {
        let (centre, unit) = (f64::from(frame.centre), f64::from(frame.unit));
        if learn {
            self.learn(past, centre, unit);
        } else {
            self.errors = [0.0, self.errors[0]];
        }
        let mut x = Self::regressors(unit, centre, past, 0, &self.errors);
        let low = (f64::from(bounds.0) - centre) / unit;
        let high = (f64::from(bounds.1) - centre) / unit;
        std::array::from_fn(|_| {
            let made = dot(&x, &self.coef).clamp(low, high);
            x.copy_within(1..P, 2);
            x[1] = made;
            x.copy_within(1 + P..N - 1, 2 + P);
            x[1 + P] = 0.0;
            (made * unit + centre) as f32
        })
    }

    fn learn(&mut self, past: &Past, centre: f64, unit: f64) {
        let x = Self::regressors(unit, centre, past, 1, &self.errors);
        let y = (f64::from(past.near(0)) - centre) / unit;
        let e = y - dot(&x, &self.coef);
        self.size += 0.01 * (e.abs().min(100.0) - self.size);
        // A spike must not teach more than four usual errors.
        let e = e.clamp(-4.0 * self.size, 4.0 * self.size);
        let cx: [f64; N] = std::array::from_fn(|i| dot(&self.cov[i * N..(i + 1) * N], &x));
        let gain = 1.0 / (FORGET + dot(&x, &cx));
        for i in 0..N {
            self.coef[i] = (self.coef[i] + cx[i] * gain * e).clamp(-4.0, 4.0);
            for j in 0..N {
                self.cov[i * N + j] =
                    ((self.cov[i * N + j] - cx[i] * cx[j] * gain) / FORGET).clamp(-1e6, 1e6);
            }
        }
        self.errors = [e, self.errors[0]];
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

const F: usize = 20;
/// Steps between two refits.
const REFIT: u64 = 12;

/// Direct ridge autoregression with seasonal features: one normal matrix, one right side per step ahead.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Ridge {
    gram: Vec<f64>,
    sides: Vec<f64>,
    coef: Vec<f32>,
    waiting: Vec<f32>,
    means: [f32; 3],
}

impl Ridge {
    pub(crate) fn new() -> Self {
        Self {
            gram: vec![0.0; F * (F + 1) / 2],
            sides: vec![0.0; HORIZONS * F],
            coef: vec![0.0; HORIZONS * F],
            waiting: vec![0.0; HORIZONS * F],
            means: [0.0; 3],
        }
    }

    pub(crate) fn sound(&self) -> bool {
        self.gram.len() == F * (F + 1) / 2
            && self.sides.len() == HORIZONS * F
            && self.coef.len() == HORIZONS * F
            && self.waiting.len() == HORIZONS * F
            && self.gram.iter().chain(&self.sides).all(|v| v.is_finite())
            && self.coef.iter().chain(&self.waiting).chain(&self.means).all(|v| v.is_finite())
    }

    fn features(&mut self, now: u64, past: &Past, day: usize, unit: f32) -> [f32; F] {
        let y = past.near(0);
        for (m, a) in self.means.iter_mut().zip([6.0_f32, 36.0, 144.0]) {
            *m += (y - *m) / a.min(now as f32 + 1.0);
        }
        let max = |n: usize| past.newest(n).iter().fold(0.0_f32, |m, v| m.max(*v));
        let same = (1..7).map(|k| past.near(day * k - 3)).sum::<f32>() / 6.0;
        let turn = std::f32::consts::TAU * (now % day as u64) as f32 / day as f32;
        let raw: [f32; F - 3] = [
            past.near(1),
            past.near(2),
            past.near(3),
            past.near(4),
            past.near(5),
            past.near(8),
            past.near(11),
            self.means[0],
            self.means[1],
            self.means[2],
            max(12),
            max(72),
            past.near(day - 1),
            past.near(day - 3),
            past.near(day - 6),
            same,
            past.near(day),
        ];
        std::array::from_fn(|i| match i {
            0 => 1.0,
            1 => turn.sin(),
            2 => turn.cos(),
            i => ((raw[i - 3] - y) / unit).clamp(-50.0, 50.0),
        })
    }

    pub(crate) fn step(&mut self, past: &Past, day: usize, unit: f32, learn: bool) -> Points {
        let now = past.now();
        let unit = unit.max(1e-9);
        let slot = (now % HORIZONS as u64) as usize * F;
        if learn && past.run() > HORIZONS as u64 {
            let x: [f64; F] = std::array::from_fn(|i| f64::from(self.waiting[slot + i]));
            let origin = past.near(HORIZONS);
            for h in 0..HORIZONS {
                let target = f64::from(((past.near(HORIZONS - 1 - h) - origin) / unit).clamp(-50.0, 50.0));
                for (b, x) in self.sides[h * F..(h + 1) * F].iter_mut().zip(&x) {
                    *b = *b * KEEP + x * target;
                }
            }
            let mut at = 0;
            for i in 0..F {
                for j in 0..=i {
                    self.gram[at] = self.gram[at] * KEEP + x[i] * x[j];
                    at += 1;
                }
            }
        }
        let x = self.features(now, past, day, unit);
        self.waiting[slot..slot + F].copy_from_slice(&x);
        if learn && now.is_multiple_of(REFIT) && past.run() > 24 {
            self.refit();
        }
        std::array::from_fn(|h| {
            let made: f32 = self.coef[h * F..(h + 1) * F].iter().zip(&x).map(|(c, x)| c * x).sum();
            past.near(0) + made * unit
        })
    }

    /// Solves by Cholesky; coefficients stay as they were where the matrix is not positive definite.
    fn refit(&mut self) {
        let mut l = self.gram.clone();
        let row = |i: usize| i * (i + 1) / 2;
        let mean = (0..F).map(|i| l[row(i) + i]).sum::<f64>() / F as f64;
        for i in 0..F {
            l[row(i) + i] += 1e-3 * mean + 1.0;
        }
        for i in 0..F {
            for j in 0..=i {
                let s = l[row(i) + j] - dot(&l[row(i)..row(i) + j], &l[row(j)..row(j) + j]);
                if i == j {
                    if s <= 0.0 {
                        return;
                    }
                    l[row(i) + i] = s.sqrt();
                } else {
                    l[row(i) + j] = s / l[row(j) + j];
                }
            }
        }
        for h in 0..HORIZONS {
            let mut v: [f64; F] = std::array::from_fn(|i| self.sides[h * F + i]);
            for i in 0..F {
                v[i] = (v[i] - dot(&l[row(i)..row(i) + i], &v[..i])) / l[row(i) + i];
            }
            for i in (0..F).rev() {
                let s: f64 = (i + 1..F).map(|k| l[row(k) + i] * v[k]).sum();
                v[i] = (v[i] - s) / l[row(i) + i];
            }
            for (c, v) in self.coef[h * F..].iter_mut().zip(v) {
                *c = v as f32;
            }
        }
    }
}

const KEEP: f64 = 1.0 - 1.0 / 2500.0;
