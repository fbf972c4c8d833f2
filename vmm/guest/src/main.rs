//! `lathe-guest`: the agent inside a machine.
//!
//! As PID 1 (or `init`) it is the whole user space of the built-in guest; as `lathe-guest serve` it is a service of
//! a distribution; under other names it is a few small tools, because the built-in guest has no others.
//!
//! - [`serve`]: vsock, sessions, requests; [`connection`] frames, [`failure`] errors
//! - [`exec`]: commands with streams or a terminal; [`children`] who waits for processes
//! - [`inside`]: what goes on inside, told to the host, and what applications want of it
//! - [`network`], [`resources`], [`usage`], [`shutdown`]: what requests do; [`hotplug`]: what the kernel's events do
//! - [`init`]: PID 1 and modules
//! - [`tools`]: `spin`, `bursts`, `iops`, `blast`, `sink`, `cat`, …
//! - [`sys`]: all unsafe code

mod children;
mod connection;
mod exec;
mod failure;
mod hotplug;
mod init;
mod inside;
mod network;
mod resources;
mod serve;
mod shutdown;
mod sys;
mod tools;
mod usage;

use std::path::Path;
use std::process::ExitCode;

const USAGE: &str = "\
usage: lathe-guest serve           answer the host over vsock
       lathe-guest want CHANGE...  ask the host for more, for a time; see lathe-guest want --help
       lathe-guest goal NAME ...   say what is expected of an application; see lathe-guest goal --help
       lathe-guest TOOL [ARG]...   one of: ";

fn main() -> ExitCode {
    sys::small_heap();
    let arguments: Vec<String> =
        std::env::args_os().map(|argument| argument.to_string_lossy().into_owned()).collect();
    let name = arguments.first().and_then(|path| path.rsplit('/').next()).unwrap_or_default().to_owned();
    if std::process::id() == 1 || name == "init" {
        return finish("init", init::run().map(|()| 1));
    }
    let words: Vec<&str> = arguments.iter().map(String::as_str).skip(1).collect();
    // Under another name, or as the first argument.
    let (name, words) = match words.split_first() {
        Some((first, rest)) if name.starts_with("lathe-guest") => (*first, rest),
        _ => (name.as_str(), &words[..]),
    };
    match name {
        "serve" => finish(name, serve::run().map(|()| 0)),
        "--version" => {
            println!("lathe-guest {}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
        "want" => finish(name, inside::ask::run(words)),
        "goal" => finish(name, inside::goals::ask::run(words)),
        "modprobe" => modprobe(words),
        _ => {
            if let Some((_, signal)) = init::SIGNALS.iter().find(|(command, _)| *command == name) {
                return finish(name, init::signal_init(*signal).map(|()| 0));
            }
            match tools::run(name, words) {
                Some(result) => finish(name, result),
                None => {
                    eprintln!("{USAGE}{}", tools::names().join(" "));
                    ExitCode::from(2)
                }
            }
        }
    }
}

/// Called by the kernel as `modprobe -q -- NAME`.
fn modprobe(words: &[&str]) -> ExitCode {
    let quiet = words.contains(&"-q");
    let names = words.iter().filter(|word| !word.starts_with('-'));
    let failed =
        names.filter_map(|name| init::modules::load_by_name(Path::new(init::modules::FOLDER), name).err());
    let failed: Vec<_> = failed.collect();
    for error in failed.iter().filter(|_| !quiet) {
        eprintln!("modprobe: {error}");
    }
    ExitCode::from(u8::from(!failed.is_empty()))
}

fn finish(name: &str, result: std::io::Result<u8>) -> ExitCode {
    match result {
        Ok(code) => ExitCode::from(code),
        // The reader of a pipe has had enough.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => ExitCode::from(141),
        Err(error) => {
            eprintln!("{name}: {error}");
            ExitCode::FAILURE
        }
    }
}
