//! Scores the forecaster on CSV files or on generated regimes, beside the reference.
//!
//! ```text
//! cargo run --release --example score -- [--each] [--seed N] [--half even|odd] [--without EXPERT] [FILE.csv ...]
//! ```
//! Without files it scores every generated regime. `--half` takes every other series, so that one half can be held out.

#[path = "../tests/support/mod.rs"]
mod support;

use lathe_forecast::{Config, Series};
use std::path::Path;
use std::time::Instant;
use support::{csv, regimes, score};

/// Steps of a generated series: two weeks.
const LENGTH: usize = 4032;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let value = |name: &str| args.iter().position(|a| a == name).and_then(|i| args.get(i + 1)).cloned();
    let files: Vec<&String> = args.iter().filter(|a| a.ends_with(".csv")).collect();
    let seed = value("--seed").and_then(|s| s.parse().ok()).unwrap_or(1);
    let mut fleet: Vec<(String, Vec<f32>)> = if files.is_empty() {
        (0..regimes::KINDS.len() * 2)
            .map(|i| {
                let kind = i / 2;
                (
                    format!("{} {}", regimes::KINDS[kind], i % 2),
                    regimes::make(kind, seed * 2 + i as u64 % 2, LENGTH),
                )
            })
            .collect()
    } else {
        files
            .iter()
            .map(|f| {
                let name =
                    Path::new(f).file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
                (name, csv::load(Path::new(f), 300).expect("a CSV file"))
            })
            .collect()
    };
    if let Some(half) = value("--half") {
        let keep = usize::from(half == "odd");
        let mut i = 0;
        fleet.retain(|_| {
            i += 1;
            (i - 1) % 2 == keep
        });
    }
    let left_out = value("--without").and_then(|s| s.parse::<u32>().ok()).map_or(0, |i| 1 << i);
    let only = value("--experts").and_then(|s| u32::from_str_radix(&s, 16).ok()).unwrap_or(u32::MAX);
    let experts = only & !left_out;
    let each = args.iter().any(|a| a == "--each");
    let results = in_parallel(&fleet, experts);
    let (mut scores, mut references, mut micros) = (Vec::new(), Vec::new(), 0.0);
    println!("{:34} rel50  rel90  rel95 | cov50 cov90 cov95 | slack  short  F@30  chg/d", "");
    for ((name, _), (s, r, us)) in fleet.iter().zip(results) {
        micros += us / fleet.len() as f64;
        if each {
            print_row(name, &score::fleet(std::slice::from_ref(&s), std::slice::from_ref(&r)));
        }
        scores.push(s);
        references.push(r);
    }
    print_row("reference", &score::fleet(&references, &references));
    print_row("lathe-forecast", &score::fleet(&scores, &references));
    println!("{micros:.1} us a step by the clock on the wall");
}

type Scored = (score::Score, score::Score, f64);

fn in_parallel(fleet: &[(String, Vec<f32>)], experts: u32) -> Vec<Scored> {
    let next = std::sync::atomic::AtomicUsize::new(0);
    let done = std::sync::Mutex::new(vec![None; fleet.len()]);
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                loop {
                    let i = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    let Some((_, y)) = fleet.get(i) else { return };
                    let scored = one(y, experts);
                    done.lock().expect("no scorer panicked")[i] = Some(scored);
                }
            });
        }
    });
    done.into_inner().expect("no scorer panicked").into_iter().map(|s| s.expect("scored")).collect()
}

fn one(y: &[f32], experts: u32) -> Scored {
    let mut series = Series::new(Config { experts, ..Config::default() });
    let start = Instant::now();
    let made = score::run(y, |t, v| {
        series.observe(t as u64 * 300, v);
        series.forecast()
    });
    let us = start.elapsed().as_secs_f64() * 1e6 / y.len() as f64;
    (score::score(y, &made), score::score(y, &score::reference(y)), us)
}

fn print_row(name: &str, f: &score::Fleet) {
    println!(
        "{name:34} {:.3}  {:.3}  {:.3} | {:5.1} {:5.1} {:5.1} | {:5.1}  {:5.2}  {:5.2}  {:5.1}",
        f.rel[0],
        f.rel[1],
        f.rel[2],
        f.coverage[0],
        f.coverage[1],
        f.coverage[2],
        f.slack,
        f.short,
        f.f30,
        f.changes
    );
}
