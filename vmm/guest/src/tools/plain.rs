//! The plain tools: `cat`, `echo`, `ls`, …

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::time::Duration;

use super::{number, usage};
use crate::resources::parse_list;

/// Longest sleep in seconds, some 136 years.
const MAX_SLEEP_SECONDS: f64 = u32::MAX as f64;

pub fn succeed(_: &[&str]) -> io::Result<u8> {
    Ok(0)
}

pub fn fail(_: &[&str]) -> io::Result<u8> {
    Ok(1)
}

/// Files, or the standard input.
pub fn cat(arguments: &[&str]) -> io::Result<u8> {
    let mut out = io::stdout().lock();
    if arguments.is_empty() {
        io::copy(&mut io::stdin().lock(), &mut out)?;
    }
    for path in arguments {
        if *path == "-" {
            io::copy(&mut io::stdin().lock(), &mut out)?;
            continue;
        }
        let named = |error: io::Error| io::Error::new(error.kind(), format!("{path}: {error}"));
        io::copy(&mut File::open(path).map_err(named)?, &mut out)?;
    }
    out.flush()?;
    Ok(0)
}

pub fn echo(arguments: &[&str]) -> io::Result<u8> {
    let (words, end) = match arguments.split_first() {
        Some((&"-n", rest)) => (rest, ""),
        _ => (arguments, "\n"),
    };
    write!(io::stdout(), "{}{end}", words.join(" "))?;
    Ok(0)
}

pub fn env(_: &[&str]) -> io::Result<u8> {
    for (name, value) in std::env::vars_os() {
        writeln!(io::stdout(), "{}={}", name.to_string_lossy(), value.to_string_lossy())?;
    }
    Ok(0)
}

pub fn sleep(arguments: &[&str]) -> io::Result<u8> {
    let seconds: f64 = number(arguments, 0, 0.0)?;
    if !(0.0..=MAX_SLEEP_SECONDS).contains(&seconds) {
        return Err(usage("seconds are 0 or more"));
    }
    std::thread::sleep(Duration::from_secs_f64(seconds));
    Ok(0)
}

pub fn sync(_: &[&str]) -> io::Result<u8> {
    nix::unistd::sync();
    Ok(0)
}

pub fn nproc(_: &[&str]) -> io::Result<u8> {
    let online = fs::read_to_string("/sys/devices/system/cpu/online")?;
    writeln!(io::stdout(), "{}", parse_list(&online).len())?;
    Ok(0)
}

pub fn uname(arguments: &[&str]) -> io::Result<u8> {
    let name = nix::sys::utsname::uname()?;
    let parts = [name.sysname(), name.nodename(), name.release(), name.version(), name.machine()];
    let [system, node, release, _, machine] = parts.map(|part| part.to_string_lossy().into_owned());
    let line = match arguments.first() {
        None | Some(&"-s") => system,
        Some(&"-n") => node,
        Some(&"-r") => release,
        Some(&"-m") => machine,
        Some(&"-a") => parts.map(|part| part.to_string_lossy()).join(" "),
        Some(_) => return Err(usage("-s, -n, -r, -m or -a")),
    };
    writeln!(io::stdout(), "{line}")?;
    Ok(0)
}

pub fn uptime(_: &[&str]) -> io::Result<u8> {
    let (uptime, load) = (fs::read_to_string("/proc/uptime")?, fs::read_to_string("/proc/loadavg")?);
    let seconds = uptime.split_whitespace().next().unwrap_or("?");
    writeln!(io::stdout(), "up {seconds} s, load {}", load.trim())?;
    Ok(0)
}

pub fn free(_: &[&str]) -> io::Result<u8> {
    let wanted = ["MemTotal", "MemFree", "MemAvailable", "Buffers", "Cached", "SwapTotal", "SwapFree"];
    for line in fs::read_to_string("/proc/meminfo")?.lines() {
        if line.split_once(':').is_some_and(|(name, _)| wanted.contains(&name)) {
            writeln!(io::stdout(), "{line}")?;
        }
    }
    Ok(0)
}

/// One name per line, with mode, owner and size under `-l`.
pub fn ls(arguments: &[&str]) -> io::Result<u8> {
    let long = arguments.iter().any(|word| word.starts_with('-') && word.contains('l'));
    let mut folders: Vec<&str> = arguments.iter().copied().filter(|word| !word.starts_with('-')).collect();
    if folders.is_empty() {
        folders.push(".");
    }
    for folder in folders {
        let named = |error: io::Error| io::Error::new(error.kind(), format!("{folder}: {error}"));
        if !fs::symlink_metadata(folder).map_err(named)?.is_dir() {
            show(folder, &fs::symlink_metadata(folder)?, long)?;
            continue;
        }
        let mut entries: Vec<_> = fs::read_dir(folder).map_err(named)?.flatten().collect();
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            if let Ok(metadata) = entry.metadata() {
                show(&entry.file_name().to_string_lossy(), &metadata, long)?;
            }
        }
    }
    Ok(0)
}

fn show(name: &str, metadata: &fs::Metadata, long: bool) -> io::Result<()> {
    if !long {
        return writeln!(io::stdout(), "{name}");
    }
    let kind = metadata.file_type();
    let letter = match () {
        () if kind.is_dir() => 'd',
        () if kind.is_symlink() => 'l',
        () if kind.is_char_device() => 'c',
        () if kind.is_block_device() => 'b',
        () if kind.is_socket() => 's',
        () if kind.is_fifo() => 'p',
        () => '-',
    };
    let (mode, user, group) = (metadata.mode() & 0o7777, metadata.uid(), metadata.gid());
    writeln!(io::stdout(), "{letter}{mode:04o} {user:>5} {group:>5} {:>12} {name}", metadata.len())
}
