//! `lathe-forecast --stdio`: one series through standard input and output, a JSON line per sample.

use anyhow::{Context, bail};
use clap::Parser;
use lathe_forecast::{Config, Series};
use serde::{Deserialize, Serialize};
use std::io::{BufRead, Write};

/// Forecasts one series.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Read `{"t":0,"y":1.5}` lines, answer each with a line of quantiles
    #[arg(long)]
    stdio: bool,
    /// Seconds from one sample to the next; `t` counts such steps
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u32).range(1..=86_400))]
    step: u32,
}

#[derive(Deserialize)]
struct Sample {
    t: u64,
    y: Option<f64>,
}

#[derive(Serialize)]
struct Answer {
    q50: [f32; 6],
    q75: [f32; 6],
    q90: [f32; 6],
    q95: [f32; 6],
    q975: [f32; 6],
    q99: [f32; 6],
    q995: [f32; 6],
    confidence: f32,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    if !args.stdio {
        bail!("nothing to do\nfix: lathe-forecast --stdio < samples.jsonl");
    }
    let mut series = Series::new(Config { step_secs: args.step, ..Config::default() });
    let mut out = std::io::stdout().lock();
    for (i, line) in std::io::stdin().lock().lines().enumerate() {
        let line = line.context("standard input")?;
        let sample: Sample = serde_json::from_str(&line)
            .with_context(|| format!("line {}: want {{\"t\":STEP,\"y\":VALUE}}", i + 1))?;
        series
            .observe(sample.t.saturating_mul(u64::from(args.step)), sample.y.map_or(f32::NAN, |y| y as f32));
        let b = series.forecast();
        let level = |q: usize| std::array::from_fn(|h| b.quantiles[h][q]);
        let answer = Answer {
            q50: level(0),
            q75: level(1),
            q90: level(2),
            q95: level(3),
            q975: level(4),
            q99: level(5),
            q995: level(6),
            confidence: b.confidence,
        };
        serde_json::to_writer(&mut out, &answer)?;
        out.write_all(b"\n")?;
        out.flush()?;
    }
    Ok(())
}
