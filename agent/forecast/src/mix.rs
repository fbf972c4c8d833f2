//! Mixing the experts, per level and pair of steps ahead, by what they lost of late.
//!
//! Two rules run side by side, and each cell leans to the one that lost less:
//! - **by loss**: weights fall exponentially with the discounted pinball loss, relative to the least, over half a day or so
//!   and over a week; finds the one good expert fast;
//! - **BOA**: Bernstein online aggregation (Wintenberger 2017) on linearised losses with a learning rate per expert and
//!   discounting; its guarantee is against the best convex combination, which often beats every single expert.

use crate::experts::EXPERTS;
use crate::math::{exp, sigmoid};
use crate::quantile::{HORIZONS, LEVELS, OPEN, Quantiles, open_at, pinball};
use serde::{Deserialize, Serialize};

const L: usize = LEVELS.len();
/// Steps ahead that share their weights; all are scored, a load that swings from step to step needs it.
const PAIR: usize = 2;
const CELLS: usize = HORIZONS / PAIR * L;
/// Steps over which the two discounted losses forget.
const FAST: f32 = 200.0;
const SLOW: f32 = 1500.0;
/// Steepness of the weights in the loss relative to the least.
const STEEP_FAST: f32 = 8.0;
const STEEP_SLOW: f32 = 12.0;
/// Share of regret that BOA keeps each step.
const KEEP: f32 = 1.0 - 1.0 / 1500.0;
/// Largest regret of one step, in usual losses of the cell.
const CUT: f32 = 10.0;
/// Steepness of the choice between the rules.
const LEAN: f32 = 40.0;

type PerExpert = [f32; EXPERTS];

/// What a cell remembers of each expert and of the two rules.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Cell {
    fast: PerExpert,
    slow: PerExpert,
    regret: PerExpert,
    spread: PerExpert,
    /// Loss of the mixture, of the rule by loss, of BOA.
    own: [f32; 3],
    /// Largest regret of late.
    top: f32,
}

/// The mixture's state.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Mix {
    cells: Vec<Cell>,
    /// Forecasts still open: of each expert, and of mixture and both rules.
    open: Vec<PerExpert>,
    rules: Vec<[f32; 3]>,
    seen: u32,
    active: u32,
}

impl Cell {
    /// Weights by loss and by BOA; `off` is 0 for an expert that takes part, huge for the others.
    fn weights(&self, off: &PerExpert) -> (PerExpert, PerExpert) {
        let least = |v: &PerExpert| (0..EXPERTS).fold(f32::MAX, |m, k| m.min(v[k] + off[k]));
        let (fast, slow) = (least(&self.fast), least(&self.slow));
        let (a, b) = (STEEP_FAST / fast.max(1e-12), STEEP_SLOW / slow.max(1e-12));
        let (mut by_loss, mut boa) = ([0.0; EXPERTS], [0.0; EXPERTS]);
        let most = self.most();
        for k in 0..EXPERTS {
            by_loss[k] = exp(-a * (self.fast[k] - fast) - b * (self.slow[k] - slow) - off[k]);
            let rate = self.rate(k, most);
            boa[k] = rate * exp((rate * self.regret[k]).clamp(-40.0, 40.0) - off[k]);
        }
        for w in [&mut by_loss, &mut boa] {
            let sum = 1.0 / w.iter().sum::<f32>().max(1e-30);
            w.iter_mut().for_each(|w| *w *= sum);
        }
        (by_loss, boa)
    }

    fn most(&self) -> f32 {
        0.5 / self.top.max(0.1)
    }

    fn rate(&self, k: usize, most: f32) -> f32 {
        const LN_K: f32 = 2.5;
        (LN_K / (1.0 + self.spread[k])).sqrt().min(most)
    }

    /// Learns what experts and rules lost who forecast `made` and `rules` at level `q` where `y` came as sample number `n`.
    fn learn(&mut self, q: f32, y: f32, made: [&PerExpert; PAIR], rules: [&[f32; 3]; PAIR], n: f32) {
        const SHARE: f32 = 1.0 / PAIR as f32;
        let (fast, slow) = ((1.0 / n).max(1.0 / FAST), (1.0 / n).max(1.0 / SLOW));
        for (r, own) in self.own.iter_mut().enumerate() {
            let loss: f32 = rules.iter().map(|rules| SHARE * pinball(q, y, rules[r])).sum();
            *own += (1.0 / n).max(1.0 / 500.0) * (loss - *own);
        }
        let unit = SHARE / self.own[0].max(1e-9);
        let slope = rules.map(|rules| if y <= rules[0] { unit * (1.0 - q) } else { unit * -q });
        self.top *= KEEP;
        let most = self.most();
        let mut regrets = [0.0; EXPERTS];
        for k in 0..EXPERTS {
            let (mut loss, mut r) = (0.0, 0.0);
            for i in 0..PAIR {
                loss += SHARE * pinball(q, y, made[i][k]);
                r += slope[i] * (rules[i][0] - made[i][k]);
            }
            let r = r.clamp(-CUT, CUT);
            self.fast[k] += fast * (loss - self.fast[k]);
            self.slow[k] += slow * (loss - self.slow[k]);
            let rate = self.rate(k, most);
            self.spread[k] = self.spread[k] * KEEP + r * r;
            self.regret[k] = self.regret[k] * KEEP + r * (1.0 - rate * r);
            regrets[k] = r.abs();
        }
        self.top = regrets.iter().fold(self.top, |m, r| m.max(*r));
    }
}

impl Mix {
    pub(crate) fn new(active: u32) -> Self {
        let zero = [0.0; EXPERTS];
        let cell = Cell { fast: zero, slow: zero, regret: zero, spread: zero, own: [0.0; 3], top: 0.0 };
        Self {
            cells: vec![cell; CELLS],
            open: vec![zero; OPEN * L],
            rules: vec![[0.0; 3]; OPEN * L],
            seen: 0,
            active,
        }
    }

    pub(crate) fn sound(&self) -> bool {
        let finite = |v: &PerExpert| v.iter().all(|v| v.is_finite());
        self.cells.len() == CELLS
            && self.open.len() == OPEN * L
            && self.rules.len() == OPEN * L
            && self.active & 1 == 1
            && self.open.iter().all(finite)
            && self.rules.iter().flatten().all(|v| v.is_finite())
            && self.cells.iter().all(|c| {
                [&c.fast, &c.slow, &c.regret, &c.spread].into_iter().all(finite)
                    && c.spread.iter().chain(&c.own).chain([&c.top]).all(|v| v.is_finite() && *v >= 0.0)
            })
    }

    /// Learns from the sample `y` of step `now` what the open forecasts lost.
    pub(crate) fn resolve(&mut self, now: u64, y: f32) {
        self.seen = self.seen.saturating_add(1);
        let n = self.seen as f32;
        for (c, cell) in self.cells.iter_mut().enumerate() {
            let (pair, l) = (c / L, c % L);
            let at: [usize; PAIR] = std::array::from_fn(|i| open_at(now, pair * PAIR + i) * L + l);
            cell.learn(LEVELS[l], y, at.map(|at| &self.open[at]), at.map(|at| &self.rules[at]), n);
        }
    }

    /// Mixes what the experts forecast at step `now`.
    pub(crate) fn issue(&mut self, now: u64, experts: &[Quantiles; EXPERTS], out: &mut Quantiles) {
        let off: PerExpert = std::array::from_fn(|k| if self.active >> k & 1 == 1 { 0.0 } else { 1e30 });
        for (c, cell) in self.cells.iter().enumerate() {
            let (pair, l) = (c / L, c % L);
            let (by_loss, boa) = cell.weights(&off);
            let lean = LEAN * (cell.own[1] - cell.own[2]) / cell.own[0].max(1e-12);
            let lean = sigmoid(lean);
            for h in pair * PAIR..(pair + 1) * PAIR {
                let at = open_at(now, h) * L + l;
                let made: PerExpert = std::array::from_fn(|k| experts[k][h][l]);
                // Sums of differences: where all agree, the mixture is exact.
                let base = made[0];
                let (mut a, mut b) = (0.0, 0.0);
                for k in 0..EXPERTS {
                    a += by_loss[k] * (made[k] - base);
                    b += boa[k] * (made[k] - base);
                }
                out[h][l] = base + a + lean * (b - a);
                self.open[at] = made;
                self.rules[at] = [out[h][l], base + a, base + b];
            }
        }
    }
}
