//! Benchmark `ceiling`: from a PATCH on lathed's socket to the new `cpu.max` in the machine's cgroup, while the guest does not answer: its
//! vCPUs stand still, so that it never lets the second one go. A client's start is in no figure: this program speaks HTTP itself.
//!
//! The same program then changes the quota as fast as lathed lets it, and as fast as the kernel does: what durability and books cost.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::rates::busy_sec;
use super::stats::{Series, verdict};

const SOCKET: &str = "/run/lathe/lathe.sock";
const CGROUPS: &str = "/sys/fs/cgroup";
/// Most milliseconds.
const TARGET_MSEC: f64 = 10.0;
/// What the machine has at first, and what it falls to: one vCPU too many for it, milliCPU.
const ABOVE: u64 = 1500;
const BELOW: u64 = 500;
/// Between two measurements: lathed has nothing left to do of the one before.
const REST: Duration = Duration::from_millis(200);
const LIMIT: Duration = Duration::from_secs(10);
/// Between two looks at the limit.
const LOOK: Duration = Duration::from_micros(200);
/// Changes made as fast as they go.
const CHANGES: usize = 200;

/// One connection to lathed, kept open.
struct Agent {
    stream: UnixStream,
    answers: BufReader<UnixStream>,
    path: String,
}

impl Agent {
    fn connect(machine: &str) -> Result<Self> {
        let stream = UnixStream::connect(SOCKET).context(SOCKET)?;
        stream.set_read_timeout(Some(LIMIT))?;
        let answers = BufReader::new(stream.try_clone()?);
        Ok(Self { stream, answers, path: format!("/v1/machines/{machine}") })
    }

    /// Asks for a share of the CPU; does not wait for the answer.
    fn ask(&mut self, cpu_milli: u64) -> Result<()> {
        let body = json!({ "cpu_milli": cpu_milli, "wait_msec": 0 }).to_string();
        let request = format!(
            "PATCH {} HTTP/1.1\r\nHost: lathe\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            self.path,
            body.len()
        );
        Ok(self.stream.write_all(request.as_bytes())?)
    }

    fn answer(&mut self) -> Result<Value> {
        let (mut status, mut length) = (String::new(), 0);
        self.answers.read_line(&mut status)?;
        loop {
            let mut line = String::new();
            if self.answers.read_line(&mut line)? == 0 {
                bail!("lathed hung up");
            }
            let Some((name, value)) = line.trim_end().split_once(':') else { break };
            if name.eq_ignore_ascii_case("content-length") {
                length = value.trim().parse()?;
            }
        }
        let mut body = vec![0; length];
        self.answers.read_exact(&mut body)?;
        let text = String::from_utf8_lossy(&body);
        if !status.starts_with("HTTP/1.1 2") {
            bail!("{}: {text}", status.trim_end());
        }
        serde_json::from_str(&text).with_context(|| text.into_owned())
    }
}

/// Waits until the quota of `limit` is `cpu_milli`.
fn in_force(limit: &Path, cpu_milli: u64) -> Result<()> {
    let begun = Instant::now();
    loop {
        let text = fs::read_to_string(limit).with_context(|| limit.display().to_string())?;
        let (quota, period) = text.trim().split_once(' ').with_context(|| text.clone())?;
        let (quota, period): (u64, u64) = (quota.parse().unwrap_or(u64::MAX), period.parse()?);
        if quota.checked_mul(1000) == Some(cpu_milli * period) {
            return Ok(());
        }
        if begun.elapsed() > LIMIT {
            bail!("{}: not {cpu_milli} milliCPU within {} s but {text}", limit.display(), LIMIT.as_secs());
        }
        thread::sleep(LOOK);
    }
}

/// Milliseconds until the limit is in force, and until lathed has answered.
fn lower(agent: &mut Agent, limit: &Path, from: u64, to: u64) -> Result<[f64; 2]> {
    agent.ask(from)?;
    agent.answer()?;
    in_force(limit, from)?;
    thread::sleep(REST);
    let begun = Instant::now();
    agent.ask(to)?;
    in_force(limit, to)?;
    let enforced = begun.elapsed();
    agent.answer()?;
    Ok([enforced, begun.elapsed()].map(|took| took.as_secs_f64() * 1e3))
}

/// A cgroup that nobody is in, for this benchmark only.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Self> {
        let path = Path::new(CGROUPS).join("lathe-bench-quota");
        fs::create_dir_all(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // One that stays is empty and is used again.
        let _ = fs::remove_dir(&self.0);
    }
}

/// Changes per second, and per second of a busy core.
fn as_fast_as(count: usize, mut change: impl FnMut(u64) -> Result<()>) -> Result<[f64; 2]> {
    let (begun, busy) = (Instant::now(), busy_sec()?);
    for number in 0..count {
        change(if number % 2 == 0 { 1000 } else { 1500 })?;
    }
    Ok([count as f64 / begun.elapsed().as_secs_f64(), count as f64 / (busy_sec()? - busy)])
}

fn rates(agent: &mut Agent, limit: &Path) -> Result<()> {
    for name in ["through lathed", "through lathed, again"] {
        let [second, core] = as_fast_as(CHANGES, |cpu_milli| {
            agent.ask(cpu_milli)?;
            agent.answer()?;
            in_force(limit, cpu_milli)
        })?;
        println!("  RESULT quota {name}: {second:.0} a second, {core:.0} a second of a busy core");
    }
    let scratch = Scratch::new()?;
    let raw = scratch.0.join("cpu.max");
    let [second, core] = as_fast_as(CHANGES * 50, |cpu_milli| {
        fs::write(&raw, format!("{} 20000", cpu_milli * 20)).with_context(|| raw.display().to_string())
    })?;
    println!(
        "  RESULT quota written by hand, which is all that there is for QEMU: {second:.0} a second, {core:.0} a second of a busy core"
    );
    Ok(())
}

/// Measures `rounds` falls of the quota of `machine`, whose vCPUs stand still, and prints the result. Returns whether the target is met.
///
/// # Errors
/// lathed refuses, or the limit is never in force.
pub fn run(machine: &str, rounds: usize) -> Result<bool> {
    println!("ceiling: {machine}, {rounds} falls from {ABOVE} to {BELOW} milliCPU, milliseconds");
    let limit = Path::new(CGROUPS).join(format!("lathe.slice/lathe-vm@{machine}.service/machine/cpu.max"));
    let mut agent = Agent::connect(machine)?;
    let mut series: [[Series; 2]; 2] = Default::default();
    for number in 0..rounds {
        let took = lower(&mut agent, &limit, ABOVE, BELOW)?;
        let of = &mut series[number % 2];
        of.iter_mut().zip(took).for_each(|(series, took)| series.push(took));
    }
    let [[first, first_answer], [second, second_answer]] = series;
    println!("  {:18} {:>8} {:>8} {:>8} {:>8} {:>8}", "", "median", "min", "q1", "q3", "max");
    println!("  {:18} {}", "limit in force", first.joined(&second));
    println!("  {:18} {}", "lathed has answered", first_answer.joined(&second_answer));
    let (median, noise) = (first.joined(&second).median(), second.median() - first.median());
    let (met, word) = verdict(median, TARGET_MSEC, noise, TARGET_MSEC);
    println!(
        "  RESULT ceiling enforced after {median:.2} ms, target ≤ {TARGET_MSEC} ms, every other one against the rest {noise:+.2}: {word}"
    );
    rates(&mut agent, &limit)?;
    Ok(met)
}
