//! What running a machine needs.

use std::fs::File;
use std::process::Command;

use kvm_ioctls::Kvm;

use super::{Host, fail, ok, warn};
use crate::api::wire::Check;

/// Oldest systemd that this was proven on.
const SYSTEMD: u32 = 252;
/// Controllers that limits need.
const CONTROLLERS: [&str; 5] = ["cpu", "cpuset", "io", "memory", "pids"];
/// Modules that the built-in guest is packed with.
const GUEST_MODULES: [&str; 4] = ["virtio_pci", "virtio_blk", "virtio_net", "vmw_vsock_virtio_transport"];
/// Where distributions keep polkit's daemon.
const POLKITD: [&str; 2] = ["/usr/lib/polkit-1/polkitd", "/usr/libexec/polkitd"];

/// systemd is there, and new enough.
pub fn systemd(host: Host<'_>) -> Check {
    if !host.exists("/run/systemd/system") {
        return fail(
            "systemd",
            "systemd does not run here: machines are started by lathed itself and end with it",
            "man lathed",
        );
    }
    let output = Command::new("systemctl").arg("--version").output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    match version(&text) {
        Some(found) if found >= SYSTEMD => ok("systemd", format!("systemd {found}")),
        Some(found) => warn(
            "systemd",
            format!("systemd {found} is older than {SYSTEMD}, which this was proven on"),
            "sudo apt upgrade systemd",
        ),
        None => warn("systemd", "systemd does not say its version", "systemctl --version"),
    }
}

/// `systemd 252 (252.38-1~deb12u1)`.
pub(super) fn version(text: &str) -> Option<u32> {
    text.lines().next()?.strip_prefix("systemd ")?.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// cgroup v2 with all controllers.
pub fn cgroup(host: Host<'_>) -> Check {
    let fix = "add systemd.unified_cgroup_hierarchy=1 to the kernel's command line and reboot";
    let Some(text) = host.read("/sys/fs/cgroup/cgroup.controllers") else {
        return fail("cgroup", "there is no cgroup v2 at /sys/fs/cgroup: nothing can be limited", fix);
    };
    let missing: Vec<_> = CONTROLLERS
        .iter()
        .filter(|wanted| !text.split_whitespace().any(|found| found == **wanted))
        .copied()
        .collect();
    if missing.is_empty() {
        return ok("cgroup", format!("cgroup v2, controllers {}", CONTROLLERS.join(" ")));
    }
    fail(
        "cgroup",
        format!("cgroup v2 lacks {}: what they limit has no limit", missing.join(", ")),
        "man cgroups",
    )
}

/// The units of machines are installed.
pub fn units(host: Host<'_>) -> Check {
    let folders =
        ["/etc/systemd/system", "/run/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system"];
    let missing = ["lathe-vm@.service", "lathe-vm@.socket", "lathe.slice"];
    let missing: Vec<_> = missing
        .iter()
        .filter(|unit| !folders.iter().any(|folder| host.exists(&format!("{folder}/{unit}"))))
        .copied()
        .collect();
    if missing.is_empty() {
        return ok("units", "units lathe-vm@.service and lathe-vm@.socket are installed");
    }
    fail("units", format!("not installed: {}", missing.join(", ")), "sudo apt install --reinstall lathe")
}

/// polkit lets lathed start machines.
pub fn polkit(host: Host<'_>) -> Check {
    if !POLKITD.iter().any(|path| host.exists(path)) {
        return fail(
            "polkit",
            "polkit is not installed: systemd will not start machines for lathed",
            "sudo apt install polkitd",
        );
    }
    if !host.exists("/usr/share/polkit-1/rules.d/50-lathe.rules") {
        let message = "polkit has no rule for lathed: systemd will not start machines for it";
        return fail("polkit", message, "sudo apt install --reinstall lathe");
    }
    ok("polkit", "polkit lets lathed start and stop lathe-vm@ units")
}

/// KVM is there, ours to use, and makes a machine.
pub fn kvm(host: Host<'_>) -> Check {
    let path = host.path("/dev/kvm");
    if !path.exists() {
        let fix = "sudo systemctl restart lathe-host-setup, then turn virtualization on in the firmware or hypervisor";
        return fail("kvm", "/dev/kvm is missing: no machine can run", fix);
    }
    if let Err(error) = File::options().read(true).write(true).open(&path) {
        let message = format!("/dev/kvm cannot be opened ({error}): no machine can run");
        return fail("kvm", message, "sudo usermod -aG kvm lathe && sudo systemctl restart lathed");
    }
    if let Err(error) = Kvm::new().and_then(|kvm| kvm.create_vm()) {
        return fail("kvm", format!("/dev/kvm opens but makes no machine ({error})"), "journalctl -k -g kvm");
    }
    let cpuinfo = host.read("/proc/cpuinfo").unwrap_or_default();
    let flags = cpuinfo.lines().find_map(|line| line.strip_prefix("flags")).unwrap_or_default();
    if flags.split_whitespace().any(|flag| flag == "vmx" || flag == "svm") {
        return ok("kvm", "/dev/kvm works, with hardware virtualization");
    }
    warn(
        "kvm",
        "/dev/kvm works, but the CPU shows no hardware virtualization: stock Linux guests may not boot",
        "grep -E -o -m1 'vmx|svm' /proc/cpuinfo",
    )
}

/// The kernel that machines boot by default can be read.
pub fn kernel(host: Host<'_>) -> Check {
    let default = format!("/boot/vmlinuz-{}", host.release).into();
    let path = host.config.machines.kernel.as_ref().unwrap_or(&default);
    match File::open(host.path(path)) {
        Ok(_) => ok("kernel", format!("machines boot {} by default", path.display())),
        Err(error) => {
            let message = format!("{}: {error}: machines need --kernel", path.display());
            fail("kernel", message, format!("sudo chmod a+r {}, or set [machines] kernel", path.display()))
        }
    }
}

/// The modules of the built-in guest.
pub fn modules(host: Host<'_>) -> Check {
    let root = host.config.machines.modules_root.join(host.release);
    let fix = format!("sudo apt install linux-image-{}", host.release);
    if !host.path(&root).join("modules.dep").exists() {
        return fail(
            "modules",
            format!("{} has no modules: the built-in guest cannot be made", root.display()),
            fix,
        );
    }
    let listed = |name: &&str| {
        let lists = ["modules.dep", "modules.builtin"];
        lists
            .iter()
            .any(|file| host.read(root.join(file)).is_some_and(|text| super::lists_module(&text, name)))
    };
    let missing: Vec<_> = GUEST_MODULES.iter().filter(|name| !listed(name)).copied().collect();
    if missing.is_empty() {
        return ok("modules", format!("the built-in guest finds its modules in {}", root.display()));
    }
    fail("modules", format!("{} lacks {}", root.display(), missing.join(", ")), fix)
}

/// The guest agent that the built-in guest is made of.
pub fn guest(host: Host<'_>) -> Check {
    let path = &host.config.machines.guest;
    match File::open(host.path(path)) {
        Ok(_) => ok("guest", format!("the built-in guest is made of {}", path.display())),
        Err(error) => fail(
            "guest",
            format!("{}: {error}: there is no built-in guest", path.display()),
            "sudo apt install --reinstall lathe",
        ),
    }
}
