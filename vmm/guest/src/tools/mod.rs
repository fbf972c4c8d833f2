//! Small programs for a guest that has no others: enough to look around and to measure.
//!
//! They follow the names and the plainest behaviour of coreutils and iproute2, and no more: busybox in the image
//! replaces them. `spin`, `bursts`, `iops`, `blast` and `sink` print `name=value` words, stable for scripts.

mod bursts;
mod iops;
mod net;
mod plain;
mod spin;

use std::io;

type Tool = fn(&[&str]) -> io::Result<u8>;

const TOOLS: &[(&str, Tool)] = &[
    ("blast", net::blast),
    ("bursts", bursts::bursts),
    ("cat", plain::cat),
    ("echo", plain::echo),
    ("env", plain::env),
    ("false", plain::fail),
    ("free", plain::free),
    ("iops", iops::iops),
    ("ip", net::addresses),
    ("ls", plain::ls),
    ("nproc", plain::nproc),
    ("sink", net::sink),
    ("sleep", plain::sleep),
    ("spin", spin::spin),
    ("sync", plain::sync),
    ("true", plain::succeed),
    ("uname", plain::uname),
    ("uptime", plain::uptime),
];

/// Runs a tool; `None` when there is none of this name. The result is the exit status.
pub fn run(name: &str, arguments: &[&str]) -> Option<io::Result<u8>> {
    TOOLS.iter().find(|(tool, _)| *tool == name).map(|(_, tool)| tool(arguments))
}

/// All tools.
pub fn names() -> Vec<&'static str> {
    TOOLS.iter().map(|(name, _)| *name).collect()
}

/// The argument at `index`, or a default.
fn number<T: std::str::FromStr>(arguments: &[&str], index: usize, default: T) -> io::Result<T> {
    match arguments.get(index) {
        None => Ok(default),
        Some(word) => word.parse().map_err(|_| usage(&format!("not a number in range: {word:?}"))),
    }
}

fn usage(message: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tools_are_found_by_name_only() {
        assert!(matches!(run("true", &[]), Some(Ok(0))));
        assert!(matches!(run("false", &[]), Some(Ok(1))));
        assert!(run("rm", &[]).is_none());
        assert!(names().is_sorted());
        assert!(matches!(run("sleep", &["x"]), Some(Err(_))));
    }
}
