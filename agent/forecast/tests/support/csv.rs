//! `timestamp,value` files on a regular grid: means of each step, short gaps interpolated, long ones held.

use std::path::Path;

/// Longest run of missing steps that is interpolated; what is left of a longer gap repeats the value before it.
const INTERPOLATED: usize = 3;

/// Reads a CSV file with a header line and `YYYY-MM-DD HH:MM:SS,value` rows.
///
/// # Errors
/// A file that cannot be read or has no usable row.
pub fn load(path: &Path, step_secs: i64) -> Result<Vec<f32>, String> {
    let text = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
    let mut rows: Vec<(i64, f64)> = text.lines().skip(1).filter_map(row).collect();
    rows.sort_by_key(|r| r.0);
    rows.dedup_by_key(|r| r.0);
    let (Some(first), Some(last)) = (rows.first(), rows.last()) else {
        return Err(format!("{}: no row of the form YYYY-MM-DD HH:MM:SS,value", path.display()));
    };
    let start = first.0.div_euclid(step_secs);
    let len = usize::try_from(last.0.div_euclid(step_secs) - start + 1).map_err(|e| e.to_string())?;
    let mut sums = vec![(0.0_f64, 0_u32); len];
    for (t, y) in &rows {
        let slot = &mut sums[(t.div_euclid(step_secs) - start) as usize];
        *slot = (slot.0 + y, slot.1 + 1);
    }
    Ok(fill(&sums.iter().map(|(s, n)| (*n > 0).then(|| s / f64::from(*n))).collect::<Vec<_>>()))
}

fn row(line: &str) -> Option<(i64, f64)> {
    let (stamp, value) = line.split_once(',')?;
    let n = |from: usize, to: usize| stamp.get(from..to)?.parse::<i64>().ok();
    let (y, m, d) = (n(0, 4)?, n(5, 7)?, n(8, 10)?);
    // Days since 1970 of the proleptic Gregorian calendar (H. Hinnant, "days_from_civil").
    let y2 = if m <= 2 { y - 1 } else { y };
    let era = y2.div_euclid(400);
    let yoe = y2 - era * 400;
    let doy = (153 * (m + if m > 2 { -3 } else { 9 }) + 2) / 5 + d - 1;
    let days = era * 146_097 + yoe * 365 + yoe / 4 - yoe / 100 + doy - 719_468;
    let secs = days * 86_400 + n(11, 13)? * 3600 + n(14, 16)? * 60 + n(17, 19).unwrap_or(0);
    Some((secs, value.trim().parse().ok()?))
}

fn fill(grid: &[Option<f64>]) -> Vec<f32> {
    let mut out: Vec<f64> = Vec::with_capacity(grid.len());
    for (i, cell) in grid.iter().enumerate() {
        let value = cell.unwrap_or_else(|| {
            let back = (1..=i).find(|&k| grid[i - k].is_some()).unwrap_or(i);
            let from = grid[i - back].unwrap_or(0.0);
            match (back <= INTERPOLATED)
                .then(|| (1..grid.len() - i).find(|&k| grid[i + k].is_some()))
                .flatten()
            {
                Some(ahead) => {
                    let to = grid[i + ahead].unwrap_or(from);
                    from + (to - from) * back as f64 / (back + ahead) as f64
                }
                None => out.last().copied().unwrap_or(0.0),
            }
        });
        out.push(value);
    }
    out.iter().map(|v| *v as f32).collect()
}
