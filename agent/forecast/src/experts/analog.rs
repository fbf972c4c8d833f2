//! What came after the moments of the past that look most like now.

use crate::past::Past;
use crate::quantile::{HORIZONS, LEVELS, Quantiles, quantile_of};
use serde::{Deserialize, Serialize};

/// Weights of the samples compared, newest first.
const SHAPE: [f32; 8] = [1.0, 0.8, 0.6, 0.5, 0.45, 0.45, 0.4, 0.4];
const FEWEST: usize = 24;
const MOST: usize = 48;

/// The bound on the distance that lately let the wanted number through.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Analog {
    bound: f32,
}

impl Analog {
    pub(crate) fn new() -> Self {
        Self { bound: 1.0 }
    }

    pub(crate) fn sound(&self) -> bool {
        self.bound.is_finite() && self.bound >= 0.0
    }

    /// Quantiles of what followed: as it was, and moved to start at the last sample. False while the past is too short.
    pub(crate) fn step(
        &mut self,
        past: &Past,
        unit: f32,
        asis: &mut Quantiles,
        moved: &mut Quantiles,
    ) -> bool {
        let all = past.all();
        let back = SHAPE.len() - 1;
        let Some(n) = all.len().checked_sub(back + HORIZONS + 1).filter(|n| *n >= 288) else {
            return false;
        };
        let mut far = [0.0_f32; crate::past::KEPT + 128];
        let far = &mut far[..n];
        let shape: [f32; SHAPE.len()] = std::array::from_fn(|lag| past.near(lag));
        for (d, v) in far.iter_mut().zip(all.windows(SHAPE.len())) {
            let mut sum = 0.0;
            for lag in 0..SHAPE.len() {
                sum += SHAPE[lag] * (v[back - lag] - shape[lag]).abs();
            }
            *d = sum;
        }
        let mut hits = [0_u16; MOST];
        let mut bound = self.bound.max(unit * 1e-3);
        let mut count = 0;
        for _ in 0..8 {
            count = 0;
            // Newest first: where too many are alike, the newest are taken.
            for i in (0..n).rev() {
                if far[i] <= bound {
                    hits[count] = i as u16;
                    count += 1;
                    if count == MOST {
                        break;
                    }
                }
            }
            if count < FEWEST {
                bound *= 1.6;
            } else {
                break;
            }
        }
        self.bound = if count >= MOST { bound * 0.9 } else { bound };
        if count < FEWEST / 2 {
            return false;
        }
        let y = past.near(0);
        let mut values = [0; MOST];
        for h in 0..HORIZONS {
            for (v, i) in values.iter_mut().zip(&hits[..count]) {
                *v = ordered(all[*i as usize + back + 1 + h]);
            }
            fill(&mut values[..count], &mut asis[h]);
            for (v, i) in values.iter_mut().zip(&hits[..count]) {
                let i = *i as usize + back;
                *v = ordered(y + all[i + 1 + h] - all[i]);
            }
            fill(&mut values[..count], &mut moved[h]);
        }
        true
    }
}

/// An integer that compares as the number does: integers sort without branches.
fn ordered(v: f32) -> i32 {
    let bits = v.to_bits() as i32;
    bits ^ ((bits >> 31) & i32::MAX)
}

fn fill(values: &mut [i32], row: &mut [f32; LEVELS.len()]) {
    values.sort_unstable();
    let mut sorted = [0.0; MOST];
    for (s, v) in sorted.iter_mut().zip(&*values) {
        *s = f32::from_bits((v ^ ((v >> 31) & i32::MAX)) as u32);
    }
    for (o, q) in row.iter_mut().zip(LEVELS) {
        *o = quantile_of(&sorted[..values.len()], q);
    }
}
