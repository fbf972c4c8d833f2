//! What the host has and lacks, with a command that helps for each lack.
//!
//! - [`machine`]: what running a machine needs: KVM, kernel, guest, cgroups, systemd
//! - [`net`]: what its network needs: tun, nft, shapers, forwarding, a prefix of its own
//! - [`comfort`]: what makes it better: pressure figures, swap, space, time
//!
//! Checks look and never change anything. They run as lathed's user inside lathed's unit, so that what they see is what counts.

pub mod comfort;
pub mod machine;
pub mod net;

use std::fs;
use std::path::{Path, PathBuf};

use crate::api::core::Doctor;
use crate::api::wire::{Check, DoctorReport, SCHEMA, Verdict};
use crate::config::Config;

/// Longest kernel file that is read, in bytes.
const MAX_FILE_BYTES: u64 = 16 << 20;

/// The doctor of this host.
#[derive(Debug)]
pub struct HostDoctor {
    root: PathBuf,
    config: Config,
}

/// What checks look at.
#[derive(Clone, Copy)]
pub struct Host<'a> {
    root: &'a Path,
    config: &'a Config,
    release: &'a str,
}

impl HostDoctor {
    /// `root` is `/` except in tests.
    pub fn new(root: &Path, config: &Config) -> Self {
        Self { root: root.to_owned(), config: config.clone() }
    }

    fn report(&self, release: &str) -> Vec<Check> {
        let host = Host { root: &self.root, config: &self.config, release };
        let checks: [fn(Host<'_>) -> Check; 19] = [
            machine::systemd,
            machine::cgroup,
            machine::units,
            machine::polkit,
            machine::kvm,
            machine::kernel,
            machine::modules,
            machine::guest,
            net::tun,
            net::bridge,
            net::prefix,
            net::nft,
            net::forwarding,
            net::shapers,
            net::sources,
            comfort::space,
            comfort::pressure,
            comfort::swap,
            comfort::time,
        ];
        checks.iter().map(|check| check(host)).collect()
    }
}

impl Doctor for HostDoctor {
    fn examine(&self) -> DoctorReport {
        let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        DoctorReport { schema: SCHEMA, checks: self.report(release.trim()) }
    }
}

impl<'a> Host<'a> {
    fn path(&self, absolute: impl AsRef<Path>) -> PathBuf {
        let path = absolute.as_ref();
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    fn exists(&self, absolute: &str) -> bool {
        self.path(absolute).exists()
    }

    /// A file's text; `None` when it is missing, too long or no text.
    fn read(&self, absolute: impl AsRef<Path>) -> Option<String> {
        let path = self.path(absolute);
        let size = fs::metadata(&path).ok()?.len();
        if size > MAX_FILE_BYTES { None } else { fs::read_to_string(path).ok() }
    }

    /// Whether a kernel module is loaded, built in, or there to be loaded.
    fn has_module(&self, name: &str) -> bool {
        if self.exists(&format!("/sys/module/{name}")) {
            return true;
        }
        let root = self.config.machines.modules_root.join(self.release);
        let listed = |file: &str| self.read(root.join(file)).is_some_and(|text| lists_module(&text, name));
        listed("modules.builtin") || listed("modules.dep")
    }

    /// Of these modules those that are nowhere.
    fn missing_modules(&self, names: &[&'a str]) -> Vec<&'a str> {
        names.iter().copied().filter(|name| !self.has_module(name)).collect()
    }
}

/// Whether `modules.dep` or `modules.builtin` (kmod(8)) has a module of this name; `-` and `_` are the same there.
fn lists_module(text: &str, name: &str) -> bool {
    text.lines().any(|line| {
        let path = line.split(':').next().unwrap_or(line);
        let file = path.rsplit('/').next().unwrap_or(path);
        file.split_once(".ko").is_some_and(|(module, _)| module.replace('-', "_") == name)
    })
}

fn ok(code: &str, message: impl Into<String>) -> Check {
    Check { code: code.to_owned(), verdict: Verdict::Ok, message: message.into(), fix: String::new() }
}

fn warn(code: &str, message: impl Into<String>, fix: impl Into<String>) -> Check {
    Check { code: code.to_owned(), verdict: Verdict::Warn, message: message.into(), fix: fix.into() }
}

fn fail(code: &str, message: impl Into<String>, fix: impl Into<String>) -> Check {
    Check { code: code.to_owned(), verdict: Verdict::Fail, message: message.into(), fix: fix.into() }
}

#[cfg(test)]
mod tests;
