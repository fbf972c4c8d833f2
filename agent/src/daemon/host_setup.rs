//! `lathed host-setup`: what needs root once after boot. Run by `lathe-host-setup.service`.
//!
//! Loads the kernel modules that machines and their network need, and turns IP forwarding on. What is missing is said, and never
//! fatal: `lathe doctor` explains it when it matters.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::config::Config;

/// Modules of machines and of their network: tc-htb(8), tc-tbf(8), tc-fq_codel(8), tc-police(8), nft(8).
const MODULES: [&str; 13] = [
    "tun",
    "bridge",
    "ifb",
    "sch_htb",
    "sch_tbf",
    "sch_fq_codel",
    "sch_ingress",
    "cls_matchall",
    "act_mirred",
    "act_police",
    "nf_tables",
    "nft_masq",
    "nft_chain_nat",
];

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
    fn the_kvm_module_is_that_of_the_cpu() {
        assert_eq!(kvm_module("processor\t: 0\nflags\t\t: fpu vmx sse\n"), Some("kvm_intel"));
        assert_eq!(kvm_module("flags\t\t: fpu svm sse\n"), Some("kvm_amd"));
        assert_eq!(kvm_module("flags\t\t: fpu vmxoff\n"), None);
        assert_eq!(kvm_module(""), None);
    }
}
