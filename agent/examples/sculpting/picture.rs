//! A day of one machine as a picture: what it wanted, what it had, and what was forecast.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result};

use crate::fleet::{DAY, Load, MINUTE};

const WIDTH: f64 = 1000.0;
const HEIGHT: f64 = 320.0;
/// Room for the scales.
const LEFT: f64 = 52.0;
const TOP: f64 = 36.0;

/// Draws its eighth day, or the last where there are fewer.
///
/// # Errors
/// A file that cannot be written.
pub fn write(file: &Path, load: &Load, p95: &[f32], grants: &[u64]) -> Result<()> {
    let day = (load.demand.len() / DAY).clamp(1, 8) - 1;
    let of = |amounts: &[u64]| -> Vec<f64> {
        let day = amounts.iter().skip(day * DAY).take(DAY).copied().collect::<Vec<_>>();
        day.chunks(MINUTE).map(|minute| minute.iter().sum::<u64>() as f64 / minute.len() as f64).collect()
    };
    let (demand, grants) = (of(&load.demand), of(grants));
    // What was forecast after a minute is about the next one.
    let from = day * DAY / MINUTE;
    let p95: Vec<f64> = (from..from + demand.len())
        .map(|minute| p95.get(minute.saturating_sub(1)).map_or(0.0, |amount| f64::from(*amount)))
        .collect();
    let most = demand.iter().chain(&grants).copied().fold(1.0, f64::max) * 1.1;
    let svg = drawn(&load.name, load.p99 as f64, most, &demand, &p95, &grants);
    std::fs::write(file, svg).with_context(|| format!("cannot write {}", file.display()))
}

fn drawn(name: &str, p99: f64, most: f64, demand: &[f64], p95: &[f64], grants: &[f64]) -> String {
    let x = |at: usize| LEFT + WIDTH * at as f64 / demand.len().max(1) as f64;
    let y = |amount: f64| TOP + HEIGHT * (1.0 - amount.min(most) / most);
    let line = |amounts: &[f64]| {
        let points = amounts.iter().enumerate().map(|(at, amount)| format!("{:.1},{:.1}", x(at), y(*amount)));
        points.collect::<Vec<_>>().join(" ")
    };
    let (width, height, floor) = (LEFT + WIDTH + 16.0, TOP + HEIGHT + 32.0, TOP + HEIGHT);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n"
    );
    let mut put = |element: String| {
        // Writing to a string cannot fail.
        let _ = writeln!(svg, "{element}");
    };
    for hour in (0..=24).step_by(3) {
        let x = LEFT + WIDTH * f64::from(hour) / 24.0;
        put(format!("<line x1=\"{x:.1}\" y1=\"{TOP}\" x2=\"{x:.1}\" y2=\"{floor}\" stroke=\"#eee\"/>"));
        put(format!(
            "<text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"#666\">{hour}:00</text>",
            floor + 18.0
        ));
    }
    for part in 0..=4 {
        let amount = most * f64::from(part) / 4.0;
        put(format!(
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\" fill=\"#666\">{:.2}</text>",
            LEFT - 6.0,
            y(amount) + 4.0,
            amount / 1000.0
        ));
    }
    let area = format!("{LEFT},{floor} {} {:.1},{floor}", line(demand), x(demand.len().saturating_sub(1)));
    put(format!("<polygon points=\"{area}\" fill=\"#9ecae1\"/>"));
    put(format!(
        "<polyline points=\"{}\" fill=\"none\" stroke=\"#f0a030\" stroke-width=\"0.8\"/>",
        line(p95)
    ));
    put(format!(
        "<polyline points=\"{}\" fill=\"none\" stroke=\"#08519c\" stroke-width=\"2\"/>",
        line(grants)
    ));
    let (x2, y) = (LEFT + WIDTH, y(p99));
    put(format!(
        "<line x1=\"{LEFT}\" y1=\"{y:.1}\" x2=\"{x2}\" y2=\"{y:.1}\" stroke=\"#c33\" stroke-dasharray=\"6 4\"/>"
    ));
    let legend = [
        ("#222", format!("{name}, CPUs over a day:")),
        ("#5a9fc4", "demand".to_owned()),
        ("#f0a030", "p95 of the next minute".to_owned()),
        ("#08519c", "grant".to_owned()),
        ("#c33", "static p99".to_owned()),
    ];
    for (at, (colour, text)) in legend.iter().enumerate() {
        put(format!("<text x=\"{}\" y=\"20\" fill=\"{colour}\">{text}</text>", LEFT + 190.0 * at as f64));
    }
    svg + "</svg>\n"
}
