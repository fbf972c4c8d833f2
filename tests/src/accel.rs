//! How hosts are run here: accelerated where nested virtualization truly works, else emulated.
//!
//! A `/dev/kvm` that opens proves nothing (there are software ones that boot no stock kernel), so the machine must
//! have the CPU feature and nesting switched on, and one trial host must boot a kernel inside itself. The verdict is
//! cached per CPU model and kernel.

use std::fs::{self, OpenOptions};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, bail};

use crate::hosts::{HostSet, Plan, capture};
use crate::image::{Image, cache_directory};
use crate::qemu::Accel;

/// Decides, and says so in one line. `$LATHE_TESTHOST_ACCEL` (`kvm` or `tcg`) overrides.
///
/// # Errors
/// The override is neither.
pub fn choose(trial: impl FnOnce() -> Result<()>) -> Result<Accel> {
    let (accel, why) = match std::env::var("LATHE_TESTHOST_ACCEL").ok().as_deref() {
        Some("kvm") => (Accel::Kvm, "LATHE_TESTHOST_ACCEL says so".to_owned()),
        Some("tcg") => (Accel::Tcg, "LATHE_TESTHOST_ACCEL says so".to_owned()),
        Some(other) => bail!("LATHE_TESTHOST_ACCEL is {other}, but can only be kvm or tcg"),
        None => match obstacle() {
            Some(obstacle) => (Accel::Tcg, obstacle),
            None => tried(trial),
        },
    };
    match accel {
        Accel::Kvm => eprintln!("testhost: hosts are accelerated by KVM: {why}"),
        Accel::Tcg => eprintln!("testhost: hosts are emulated (slow, ratios only): {why}"),
    }
    Ok(accel)
}

/// What stands against nested virtualization before anything is tried.
fn obstacle() -> Option<String> {
    let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let (module, name) = if has_flag(&flags, "vmx") {
        ("kvm_intel", "VMX")
    } else if has_flag(&flags, "svm") {
        ("kvm_amd", "SVM")
    } else {
        return Some("the CPU shows neither VMX nor SVM".into());
    };
    let nested = fs::read_to_string(format!("/sys/module/{module}/parameters/nested")).unwrap_or_default();
    if !matches!(nested.trim(), "Y" | "1") {
        return Some(format!("{module} has nesting switched off"));
    }
    let device = OpenOptions::new().read(true).write(true).open("/dev/kvm");
    device.err().map(|error| format!("{name} is there, but /dev/kvm does not open: {error}"))
}

fn has_flag(cpuinfo: &str, flag: &str) -> bool {
    let line = cpuinfo.lines().find(|line| line.starts_with("flags"));
    line.is_some_and(|line| line.split_whitespace().any(|word| word == flag))
}

fn tried(trial: impl FnOnce() -> Result<()>) -> (Accel, String) {
    let memory = cache_directory().join(format!("accel-{:016x}", fingerprint()));
    match fs::read_to_string(&memory).ok().as_deref() {
        Some("kvm") => return (Accel::Kvm, "a trial host booted a machine".into()),
        Some("tcg") => return (Accel::Tcg, format!("a trial under KVM failed, see {}", memory.display())),
        _ => {}
    }
    eprintln!("testhost: trying nested virtualization once");
    let (word, accel, why) = match trial() {
        Ok(()) => ("kvm", Accel::Kvm, "a trial host booted a machine".to_owned()),
        Err(error) => ("tcg", Accel::Tcg, format!("a trial under KVM failed: {error:#}")),
    };
    // Without the memory the trial is only repeated.
    let _ = fs::write(&memory, word);
    (accel, why)
}

fn fingerprint() -> u64 {
    let mut hasher = DefaultHasher::new();
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    cpuinfo.lines().find(|line| line.starts_with("model name")).hash(&mut hasher);
    fs::read_to_string("/proc/version").unwrap_or_default().hash(&mut hasher);
    hasher.finish()
}

/// Boots one host under KVM and a kernel inside it.
///
/// # Errors
/// Either does not come up.
pub fn trial(image: &Image, directory: &Path) -> Result<()> {
    let plan = Plan { hosts: 1, cpus: 2, memory_mib: 2048, accel: Accel::Kvm };
    let hosts = HostSet::boot(&plan, image, directory)?;
    let script = "timeout 30 qemu-system-x86_64 -accel kvm -M microvm -m 256 -nodefaults -display none -no-reboot \
                  -serial stdio -kernel /usr/lib/lathe-test/kernels/6.12/bzImage \
                  -append 'console=ttyS0 panic=-1' </dev/null | grep -q 'Linux version'";
    let (status, output) = capture(&hosts.channel(1)?, &["sh", "-c", script], Duration::from_secs(60))?;
    if status != 0 {
        bail!("no kernel boots inside: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
