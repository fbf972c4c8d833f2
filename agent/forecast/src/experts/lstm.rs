//! A small LSTM with quantile outputs, trained online on windows of the kept past.
//!
//! ```text
//!   8 inputs (asinh of level, extremes, the same time yesterday) ──► LSTM, 8 cells ──┐
//!        └────────────────────────── linear shortcut ─────────────────────────────────┴──► 6 steps × 7 levels
//! ```
//! Quantiles are learnt of `asinh((y - centre) / unit)`: they pass through a monotone map unchanged, and a spike then costs
//! no more than its order of magnitude. Each step trains one window by truncated back-propagation through time, half of
//! the time the newest, else one drawn from the past kept. The step sizes come from factored second moments (Shazeer and
//! Stern, "Adafactor", 2018), which need a number per row and column where Adam needs two per weight.

use super::Frame;
use crate::math::{sigmoid, tanh};
use crate::past::Past;
use crate::quantile::{HORIZONS, LEVELS, Quantiles};
use serde::{Deserialize, Serialize};

const INPUTS: usize = 8;
const CELLS: usize = 8;
const GATES: usize = 4 * CELLS;
/// What the gates see: inputs, own output, one.
const SEEN: usize = INPUTS + CELLS + 1;
const OUTPUTS: usize = HORIZONS * LEVELS.len();
/// Steps of a training window, and those of its start that only fill the state.
const WINDOW: usize = 16;
const WARM: usize = 6;
/// Relative step sizes at the start, and the least later.
const RATE: f32 = 0.02;
const LEAST_RATE: f32 = 0.003;

/// A matrix stored by input (`rows` inputs, `cols` outputs) with the factors of its gradients' second moments.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Layer {
    cols: usize,
    w: Vec<f32>,
    by_row: Vec<f32>,
    by_col: Vec<f32>,
}

impl Layer {
    fn new(rows: usize, cols: usize) -> Self {
        Self { cols, w: vec![0.0; rows * cols], by_row: vec![0.0; rows], by_col: vec![0.0; cols] }
    }

    fn sound(&self, rows: usize, cols: usize) -> bool {
        self.cols == cols
            && self.w.len() == rows * cols
            && self.by_row.len() == rows
            && self.by_col.len() == cols
            && self.w.iter().all(|v| v.is_finite())
            && self.by_row.iter().chain(&self.by_col).all(|v| v.is_finite() && *v >= 0.0)
    }

    fn forward<const N: usize>(&self, x: &[f32]) -> [f32; N] {
        let mut out = [0.0; N];
        for (x, w) in x.iter().zip(self.w.chunks_exact(N)) {
            for (o, w) in out.iter_mut().zip(w) {
                *o += x * w;
            }
        }
        out
    }

    fn backward<const N: usize>(&self, dout: &[f32; N], x: &[f32], grad: &mut [f32], dx: &mut [f32]) {
        for (((x, dx), w), g) in x.iter().zip(dx).zip(self.w.chunks_exact(N)).zip(grad.chunks_exact_mut(N)) {
            let mut sum = 0.0;
            for ((d, w), g) in dout.iter().zip(w).zip(g) {
                sum += d * w;
                *g += x * d;
            }
            *dx += sum;
        }
    }

    fn learn(&mut self, grad: &[f32], rate: f32, keep: f32) {
        let rows = self.by_row.len();
        let mut cols = vec![0.0_f32; self.cols];
        for (r, g) in grad.chunks_exact(self.cols).enumerate() {
            let mut sum = 0.0;
            for (c, g) in cols.iter_mut().zip(g) {
                let sq = g * g + 1e-12;
                *c += sq;
                sum += sq;
            }
            self.by_row[r] = keep * self.by_row[r] + (1.0 - keep) * sum / self.cols as f32;
        }
        for (v, c) in self.by_col.iter_mut().zip(&cols) {
            *v = keep * *v + (1.0 - keep) * c / rows as f32;
        }
        let mean = self.by_row.iter().sum::<f32>() / rows as f32;
        for (r, (w, g)) in self.w.chunks_exact_mut(self.cols).zip(grad.chunks_exact(self.cols)).enumerate() {
            let row = mean / self.by_row[r].max(1e-20);
            for ((w, g), c) in w.iter_mut().zip(g).zip(&self.by_col) {
                let step = g * (row / c.max(1e-20)).sqrt();
                *w = (*w - rate * step.clamp(-3.0, 3.0)).clamp(-20.0, 20.0);
            }
        }
    }
}

/// The network and its running state.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Lstm {
    gates: Layer,
    head: Layer,
    hidden: [f32; CELLS],
    cell: [f32; CELLS],
    dice: u64,
    trained: u32,
}

/// What one step of a window must remember for its way back.
#[derive(Clone, Copy)]
struct Trace {
    seen: [f32; SEEN],
    /// Input, forget, output gates and candidate, after their activation.
    gates: [f32; GATES],
    cell: [f32; CELLS],
    tanh: [f32; CELLS],
}

impl Lstm {
    pub(crate) fn new(seed: u64) -> Self {
        let mut lstm = Self {
            gates: Layer::new(SEEN, GATES),
            head: Layer::new(INPUTS + CELLS + 1, OUTPUTS),
            hidden: [0.0; CELLS],
            cell: [0.0; CELLS],
            dice: seed | 1,
            trained: 0,
        };
        for i in 0..lstm.gates.w.len() {
            lstm.gates.w[i] = 0.4 * (lstm.draw() - 0.5);
        }
        // Gates start open to the past; outputs start at the last value.
        let bias = (SEEN - 1) * GATES;
        lstm.gates.w[bias + CELLS..bias + 2 * CELLS].fill(1.0);
        lstm.head.w[..OUTPUTS].fill(1.0);
        lstm
    }

    pub(crate) fn sound(&self) -> bool {
        self.gates.sound(SEEN, GATES)
            && self.head.sound(INPUTS + CELLS + 1, OUTPUTS)
            && self.hidden.iter().chain(&self.cell).all(|v| v.is_finite())
    }

    fn draw(&mut self) -> f32 {
        self.dice ^= self.dice << 13;
        self.dice ^= self.dice >> 7;
        self.dice ^= self.dice << 17;
        (self.dice >> 40) as f32 / (1_u64 << 24) as f32
    }

    /// What is known at `all[at]`.
    fn inputs(all: &[f32], at: usize, day: usize, frame: Frame) -> [f32; INPUTS] {
        let back = |n: usize| &all[at.saturating_sub(n - 1)..=at];
        let mean = |s: &[f32]| s.iter().sum::<f32>() / s.len().max(1) as f32;
        let max = |s: &[f32]| s.iter().fold(0.0_f32, |m, v| m.max(*v));
        // The same six steps of days before, or the last value.
        let days = |n: usize| match (at + 1).checked_sub(n * day) {
            Some(from) => &all[from..(from + HORIZONS).min(all.len())],
            None => &all[at..=at],
        };
        [
            all[at],
            all[at.saturating_sub(1)],
            mean(back(12)),
            max(back(6)),
            max(back(36)),
            mean(days(1)),
            max(days(1)),
            mean(days(2)),
        ]
        .map(|v| frame.enter(v))
    }

    fn forward(&self, x: &[f32; INPUTS], hidden: &mut [f32; CELLS], cell: &mut [f32; CELLS]) -> Trace {
        let mut seen = [1.0; SEEN];
        seen[..INPUTS].copy_from_slice(x);
        seen[INPUTS..INPUTS + CELLS].copy_from_slice(hidden);
        let before = *cell;
        let mut gates: [f32; GATES] = self.gates.forward(&seen);
        let (ifo, candidate) = gates.split_at_mut(3 * CELLS);
        ifo.iter_mut().for_each(|g| *g = sigmoid(*g));
        candidate.iter_mut().for_each(|g| *g = tanh(*g));
        for k in 0..CELLS {
            cell[k] = gates[CELLS + k] * before[k] + gates[k] * gates[3 * CELLS + k];
        }
        let tanh = cell.map(tanh);
        for k in 0..CELLS {
            hidden[k] = gates[2 * CELLS + k] * tanh[k];
        }
        Trace { seen, gates, cell: before, tanh }
    }

    fn head_inputs(x: &[f32; INPUTS], hidden: &[f32; CELLS]) -> [f32; INPUTS + CELLS + 1] {
        let mut v = [1.0; INPUTS + CELLS + 1];
        v[..INPUTS].copy_from_slice(x);
        v[INPUTS..INPUTS + CELLS].copy_from_slice(hidden);
        v
    }

    /// Trains on the past and forecasts from its end. False where there is too little past to have learnt from.
    pub(crate) fn step(
        &mut self,
        past: &Past,
        day: usize,
        frame: Frame,
        learn: bool,
        out: &mut Quantiles,
    ) -> bool {
        let all = past.all();
        let Some(newest) = all.len().checked_sub(1) else { return false };
        let x = Self::inputs(all, newest, day, frame);
        let (mut hidden, mut cell) = (self.hidden, self.cell);
        self.forward(&x, &mut hidden, &mut cell);
        (self.hidden, self.cell) = (hidden, cell);
        let room = WINDOW + HORIZONS;
        if all.len() < 2 * room {
            return false;
        }
        if learn {
            let last = all.len() - room;
            let drawn = self.draw();
            let start =
                if self.trained.is_multiple_of(2) { last } else { (drawn * (last + 1) as f32) as usize };
            self.train(all, start.min(last), day, frame);
        }
        let z: [f32; OUTPUTS] = self.head.forward(&Self::head_inputs(&x, &hidden));
        for (o, z) in out.iter_mut().flatten().zip(z) {
            *o = frame.leave(z);
        }
        self.trained > 64
    }

    fn train(&mut self, all: &[f32], start: usize, day: usize, frame: Frame) {
        let mut traces =
            [Trace { seen: [0.0; SEEN], gates: [0.0; GATES], cell: [0.0; CELLS], tanh: [0.0; CELLS] };
                WINDOW];
        let (mut hidden, mut cell) = ([0.0; CELLS], [0.0; CELLS]);
        let mut dhidden = [[0.0_f32; CELLS]; WINDOW];
        let mut head = [0.0_f32; SEEN * OUTPUTS];
        let scale = 1.0 / (WINDOW - WARM) as f32;
        for s in 0..WINDOW {
            let x = Self::inputs(&all[..start + s + 1], start + s, day, frame);
            traces[s] = self.forward(&x, &mut hidden, &mut cell);
            if s < WARM {
                continue;
            }
            let seen = Self::head_inputs(&x, &hidden);
            let made: [f32; OUTPUTS] = self.head.forward(&seen);
            let mut dout = [0.0_f32; OUTPUTS];
            for h in 0..HORIZONS {
                let y = frame.enter(all[start + s + 1 + h]);
                for (l, q) in LEVELS.iter().enumerate() {
                    let i = h * LEVELS.len() + l;
                    // Smoothed at zero, so that a flat series settles.
                    let e = ((y - made[i]) * 50.0).clamp(-1.0, 1.0);
                    dout[i] = -scale * if e > 0.0 { q * e } else { (1.0 - q) * e };
                }
            }
            let mut dseen = [0.0; SEEN];
            self.head.backward(&dout, &seen, &mut head, &mut dseen);
            dhidden[s].copy_from_slice(&dseen[INPUTS..INPUTS + CELLS]);
        }
        let gates = self.back(&traces, &dhidden);
        self.trained = self.trained.saturating_add(1);
        let n = self.trained as f32;
        let keep = (1.0 - 1.0 / n).min(0.995);
        let rate = (RATE / (1.0 + n / 300.0).sqrt()).max(LEAST_RATE);
        self.gates.learn(&gates, rate, keep);
        self.head.learn(&head, rate, keep);
    }

    fn back(&self, traces: &[Trace; WINDOW], dhidden: &[[f32; CELLS]; WINDOW]) -> [f32; SEEN * GATES] {
        let mut grad = [0.0_f32; SEEN * GATES];
        let (mut dh, mut dc) = ([0.0_f32; CELLS], [0.0_f32; CELLS]);
        for (t, own) in traces.iter().zip(dhidden).rev() {
            let mut dgates = [0.0_f32; GATES];
            for k in 0..CELLS {
                let (i, f, o, g) =
                    (t.gates[k], t.gates[CELLS + k], t.gates[2 * CELLS + k], t.gates[3 * CELLS + k]);
                let dh = dh[k] + own[k];
                dc[k] += dh * o * (1.0 - t.tanh[k] * t.tanh[k]);
                dgates[k] = dc[k] * g * i * (1.0 - i);
                dgates[CELLS + k] = dc[k] * t.cell[k] * f * (1.0 - f);
                dgates[2 * CELLS + k] = dh * t.tanh[k] * o * (1.0 - o);
                dgates[3 * CELLS + k] = dc[k] * i * (1.0 - g * g);
                dc[k] *= f;
            }
            let mut dseen = [0.0; SEEN];
            self.gates.backward(&dgates, &t.seen, &mut grad, &mut dseen);
            dh.copy_from_slice(&dseen[INPUTS..INPUTS + CELLS]);
        }
        grad
    }
}
