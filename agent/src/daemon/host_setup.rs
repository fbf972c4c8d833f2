//! `lathed host-setup`: what needs root once after boot. Run by `lathe-host-setup.service`.
//!
//! Loads the kernel modules that machines and their network need, turns IP forwarding on, and has systemd weigh all machines together
//! against the host's own services so that each side gets what the books give it when both want everything. What is missing is said, and never
//! fatal: `lathe doctor` explains it when it matters.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::config::Config;

/// Modules of machines and of their network: tc-htb(8), tc-tbf(8), tc-fq_codel(8), tc-police(8), tc-bpf(8), tc-skbedit(8), nft(8).
const MODULES: [&str; 15] = [
    "tun",
    "bridge",
    "ifb",
    "sch_htb",
    "sch_tbf",
    "sch_fq_codel",
    "sch_ingress",
    "cls_matchall",
    "cls_bpf",
    "act_mirred",
    "act_police",
    "act_skbedit",
    "nf_tables",
    "nft_masq",
    "nft_chain_nat",
];

/// `CPUWeight=` of a slice for which nobody set one (systemd.resource-control(5)).
const SIBLING_WEIGHT: u64 = 100;
/// Where systemd writes what [`weigh`] asks for, until the next boot.
const WEIGHT_FILE: &str = "/run/systemd/system.control/lathe.slice.d/50-CPUWeight.conf";
/// The largest weight that there is.
const MAX_WEIGHT: u64 = 10_000;

/// Does it; says on standard output what was done, on standard error what was not.
pub fn run(config: &Config) {
    let kvm = fs::read_to_string("/proc/cpuinfo").map(|cpuinfo| kvm_module(&cpuinfo)).unwrap_or_default();
    for module in kvm.into_iter().chain(MODULES) {
        load(module);
    }
    if config.network.enabled && config.network.nat {
        set("/proc/sys/net/ipv4/ip_forward", "1");
        if config.network.ipv6.is_some() {
            set("/proc/sys/net/ipv6/conf/all/forwarding", "1");
        }
    }
    let cpus = std::thread::available_parallelism().map_or(1, |cpus| cpus.get() as u64);
    weigh(slice_weight(cpus.saturating_mul(1000), config.reserve.cpu.0));
    if !Path::new("/dev/kvm").exists() {
        eprintln!(
            "/dev/kvm is missing: no machine can run here (is virtualization on in the firmware, or nested by the hypervisor?)"
        );
    }
}

/// The KVM module of this CPU; none without virtualization.
fn kvm_module(cpuinfo: &str) -> Option<&'static str> {
    let flags = cpuinfo.lines().find_map(|line| line.strip_prefix("flags"))?;
    let has = |flag| flags.split_whitespace().any(|word| word == flag);
    match (has("vmx"), has("svm")) {
        (true, _) => Some("kvm_intel"),
        (_, true) => Some("kvm_amd"),
        _ => None,
    }
}

/// `CPUWeight=` of lathe.slice on a host of `capacity_milli` that keeps `reserve_milli` for itself. Beside it are system.slice and user.slice
/// with 100 each: while one of them wants everything, machines get capacity − reserve, and the host never less than its reserve. 1 to 10000.
fn slice_weight(capacity_milli: u64, reserve_milli: u64) -> u64 {
    let machines = capacity_milli.saturating_sub(reserve_milli).saturating_mul(SIBLING_WEIGHT);
    machines.checked_div(reserve_milli).unwrap_or(MAX_WEIGHT).clamp(1, MAX_WEIGHT)
}

/// Has systemd give lathe.slice this weight until the next boot, unless an administrator has given it one: asked for at run time, ours would hold
/// against theirs, wherever that is written, until the next `daemon-reload`.
fn weigh(weight: u64) {
    let show = ["show", "--property=CPUWeight", "--value", crate::machines::SLICE];
    let shown = match Command::new("systemctl").args(show).output() {
        Ok(output) => String::from_utf8_lossy(&output.stdout).trim().to_owned(),
        Err(error) => return eprintln!("systemctl: {error}"),
    };
    // Missing until this has run once.
    let ours = fs::read_to_string(WEIGHT_FILE).unwrap_or_default();
    if is_administrators(&shown, &ours) {
        return println!("lathe.slice keeps CPUWeight={shown}, which an administrator has set");
    }
    let setting = format!("CPUWeight={weight}");
    match Command::new("systemctl").args(["set-property", "--runtime", "lathe.slice", &setting]).status() {
        Ok(status) if status.success() => println!("lathe.slice {setting}"),
        Ok(_) => {
            eprintln!("lathe.slice keeps its weight among the host's slices: systemctl refused {setting}")
        }
        Err(error) => eprintln!("systemctl: {error}"),
    }
}

/// Whether the weight that systemd shows is neither its own nor the one of our earlier drop-in, whose text is `ours`.
fn is_administrators(shown: &str, ours: &str) -> bool {
    let is_set = !shown.is_empty() && shown != "[not set]";
    is_set && !ours.lines().any(|line| line.strip_prefix("CPUWeight=") == Some(shown))
}

/// Loads one module. `ifb` makes two links by itself unless told not to.
fn load(module: &str) {
    let arguments: &[&str] = if module == "ifb" { &["-q", "ifb", "numifbs=0"] } else { &["-q", module] };
    match Command::new("/sbin/modprobe").args(arguments).status() {
        Ok(status) if status.success() => {}
        Ok(_) => eprintln!("kernel module {module} cannot be loaded"),
        Err(error) => eprintln!("/sbin/modprobe: {error}"),
    }
}

/// Sets a kernel setting if it is not so already.
fn set(path: &str, value: &str) {
    if fs::read_to_string(path).is_ok_and(|now| now.trim() == value) {
        return;
    }
    match fs::write(path, value) {
        Ok(()) => println!("{path} = {value}"),
        Err(error) => eprintln!("{path}: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machines_weigh_what_the_books_may_give_them() {
        assert_eq!(slice_weight(2000, 250), 700);
        assert_eq!(slice_weight(8000, 4000), 100);
        assert_eq!(slice_weight(64_000, 250), 10_000);
        assert_eq!(slice_weight(2000, 0), 10_000);
        assert_eq!(slice_weight(1000, 2000), 1);
    }

    #[test]
    fn a_weight_that_an_administrator_has_set_stays() {
        let ours = "# This is a drop-in unit file extension\n[Slice]\nCPUWeight=700\n";
        for (shown, written, theirs) in [
            ("[not set]", "", false),
            ("", "", false),
            ("50", "", true),
            ("100", "", true),
            ("idle", "", true),
            ("700", ours, false),
            ("70", ours, true),
            ("7000", ours, true),
        ] {
            assert_eq!(is_administrators(shown, written), theirs, "{shown:?} {written:?}");
        }
    }

    #[test]
    fn the_kvm_module_is_that_of_the_cpu() {
        assert_eq!(kvm_module("processor\t: 0\nflags\t\t: fpu vmx sse\n"), Some("kvm_intel"));
        assert_eq!(kvm_module("flags\t\t: fpu svm sse\n"), Some("kvm_amd"));
        assert_eq!(kvm_module("flags\t\t: fpu vmxoff\n"), None);
        assert_eq!(kvm_module(""), None);
    }
}
