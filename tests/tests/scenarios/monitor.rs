//! `lathe-vmm` alone: no lathed, no units; one process, told by its command line what to boot.

use std::path::Path;
use std::time::Duration;

use lathe_tests::bench::programs;
use lathe_tests::scenario::{Group, Host, Hosts, Outcome, Running};

/// Everything that takes seconds.
pub const MONITOR: Group = Group {
    name: "monitor",
    hosts: 1,
    lathe: false,
    bench: false,
    scenarios: &[
        ("boots_every_kernel_in_every_form", boots_every_kernel_in_every_form),
        ("gives_the_guest_what_was_asked_for", gives_the_guest_what_was_asked_for),
        ("power_button_shuts_down_in_order", power_button_shuts_down_in_order),
        ("reboot_happens_in_place", reboot_happens_in_place),
        ("a_triple_fault_is_told", a_triple_fault_is_told),
        ("disk_keeps_flushes_and_discards", disk_keeps_flushes_and_discards),
        ("bad_input_gets_a_clear_error", bad_input_gets_a_clear_error),
        ("a_broken_initrd_is_the_guests_own_matter", a_broken_initrd_is_the_guests_own_matter),
        ("boots_debian_from_its_own_initrd_and_disk", boots_debian_6_12),
    ],
};

/// What takes minutes in an emulated host: `tests/run bench monitor-debian`.
pub const DEBIAN: Group = Group {
    name: "monitor-debian",
    hosts: 1,
    lathe: false,
    bench: true,
    scenarios: &[("debian_6_1", boots_debian_6_1), ("debian_6_12", boots_debian_6_12)],
};

pub const KERNELS: &str = "/usr/lib/lathe-test/kernels";
/// From the monitor's start to the built-in guest's word that it is ready, in an emulated and busy host.
const BOOT_LIMIT: Duration = Duration::from_secs(90);
/// From the monitor's start to a whole distribution's shell.
const DEBIAN_LIMIT: Duration = Duration::from_secs(300);

/// Puts programs and boot images into the host, once.
pub fn prepared<'a>(hosts: &'a Hosts) -> Host<'a> {
    let host = hosts.host(1);
    host.preparing(|| prepare(&host));
    host
}

fn prepare(host: &Host<'_>) {
    if host.run("test -e /root/kit/ready").status == 0 {
        return;
    }
    let built = |result: anyhow::Result<std::path::PathBuf>| match result {
        Ok(path) => path,
        Err(error) => panic!("{error:#}"),
    };
    host.push(&built(programs::monitor()), "/root/kit/lathe-vmm");
    host.push(&built(programs::guest()), "/root/kit/lathe-guest");
    host.push(Path::new(env!("CARGO_BIN_EXE_guest-exec")), "/root/kit/guest-exec");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scenarios/guest-image.sh");
    host.push(&script, "/root/kit/guest-image");
    for kernel in ["6.1", "6.12"] {
        host.run(&format!(
            "/root/kit/guest-image $(cat {KERNELS}/{kernel}/version) /root/kit/lathe-guest /root/kit/{kernel}.cpio"
        ))
        .expect_ok();
    }
    host.run("touch /root/kit/ready");
}

/// Puts a static program that is built with the harness into `/root/kit`, for guests.
pub fn push_beside(host: &Host<'_>, name: &str) {
    match programs::beside_harness(name) {
        Ok(path) => host.push(&path, &format!("/root/kit/{name}")),
        Err(error) => panic!("{error:#}"),
    }
}

/// One machine under way.
pub struct Machine<'a> {
    /// Where it runs.
    pub host: Host<'a>,
    /// Its files.
    pub folder: String,
    running: Running<'a>,
}

impl<'a> Machine<'a> {
    /// Starts the monitor with these options, in a folder of its own with `console`, `control`, `vsock` and `said`, its own words.
    pub fn start(host: &Host<'a>, options: &str) -> Self {
        let folder = host.run("mktemp -d /root/machine-XXXXXX").expect_ok().stdout();
        // What it says is kept in the host as well, for whoever wonders what became of the guest.
        let running = host.start(&format!(
            "cd {folder} && {{ /root/kit/lathe-vmm run --console console --control control --vsock 3,vsock {options} 2>said; \
             status=$?; cat said >&2; exit $status; }}"
        ));
        Self { host: host.clone(), folder, running }
    }

    /// Starts the built-in guest on a kernel and waits until it is ready.
    pub fn boot(host: &Host<'a>, kernel: &str, form: &str, options: &str) -> Self {
        let options =
            format!("--kernel {KERNELS}/{kernel}/{form} --initrd /root/kit/{kernel}.cpio {options}");
        host.preparing(|| {
            let machine = Self::start(host, &options);
            machine.wait_ready(1);
            machine
        })
    }

    /// Waits until the built-in guest has said `times` times that it is ready.
    pub fn wait_ready(&self, times: usize) {
        // A guest whose kernel has given up is not waited for.
        let line = format!(
            "[ $(grep -c 'lathe-guest: ready' {0}/console) -ge {times} ] || grep -q 'end Kernel panic' {0}/console || {{ cat {0}/console; false; }}",
            self.folder
        );
        self.host.wait_until("the guest is ready", BOOT_LIMIT, &line);
        let panicked = self.host.run(&format!("grep -B 30 'end Kernel panic' {}/console", self.folder));
        // That is an answer, and a wrong one.
        panicked.expect_failure();
    }

    /// Runs a command in the guest.
    pub fn exec(&self, command: &str) -> Outcome<'a> {
        self.host.run(&format!("/root/kit/guest-exec {}/vsock {command}", self.folder))
    }

    /// Runs a line of shell in the guest.
    pub fn shell(&self, line: &str) -> Outcome<'a> {
        self.exec(&format!("sh -c '{line}'"))
    }

    /// Sends a command to the control socket.
    pub fn ask(&self, command: &str) -> Outcome<'a> {
        self.host.run(&format!("/root/kit/lathe-vmm ask {}/control '{command}'", self.folder))
    }

    /// Waits for the monitor's own end.
    pub fn ends(self) -> Outcome<'a> {
        self.running.finish_within(BOOT_LIMIT)
    }

    /// Shuts the guest down from inside and expects that the monitor ends well.
    pub fn powers_off(self) {
        // The command's own end and the guest's race.
        self.exec("poweroff");
        self.ends().expect_ok();
    }
}

fn boots_every_kernel_in_every_form(hosts: &Hosts) {
    let host = prepared(hosts);
    for kernel in ["6.1", "6.12"] {
        let release = host.run(&format!("cat {KERNELS}/{kernel}/version")).expect_ok().stdout();
        for form in ["bzImage", "vmlinux"] {
            let begun = std::time::Instant::now();
            let machine = Machine::boot(&host, kernel, form, "--memory 256M");
            let took = begun.elapsed().as_secs_f32();
            machine.exec("uname -r").expect_ok().expect_stdout(&release);
            machine.shell("exit 7").expect_status(7);
            machine.powers_off();
            hosts.note(&format!("{kernel} {form}: ready and answering after {took:.1} s"));
        }
    }
}

fn gives_the_guest_what_was_asked_for(hosts: &Hosts) {
    let host = prepared(hosts);
    let machine = Machine::boot(&host, "6.12", "vmlinux", "--cpus 2 --memory 384M");
    machine.exec("nproc").expect_ok().expect_stdout("2");
    machine.exec("cat /sys/devices/system/cpu/online").expect_ok().expect_stdout("0-1");
    let memory = machine.shell("grep MemTotal /proc/meminfo | tr -dc 0-9").expect_ok().stdout();
    let total_kib: u64 = memory.parse().unwrap_or_default();
    assert!(
        (300 << 10..=384 << 10).contains(&total_kib),
        "384 MiB were asked for, the guest has {total_kib} KiB"
    );
    machine.exec("cat /sys/class/misc/hw_random/rng_current").expect_ok().expect_out("virtio_rng");
    let random = "dd if=/dev/hwrng bs=64 count=1 2>/dev/null | sha256sum";
    let (first, second) =
        (machine.shell(random).expect_ok().stdout(), machine.shell(random).expect_ok().stdout());
    assert_ne!(first, second, "the entropy device repeats itself");
    assert_ne!(
        first,
        host.run("head -c 0 /dev/null | sha256sum").stdout(),
        "the entropy device gives nothing"
    );
    machine.powers_off();
}

fn power_button_shuts_down_in_order(hosts: &Hosts) {
    let host = prepared(hosts);
    for kernel in ["6.1", "6.12"] {
        let machine = Machine::boot(&host, kernel, "bzImage", "");
        machine.ask(r#"{"power_button":{}}"#).expect_ok();
        let folder = machine.folder.clone();
        machine.ends().expect_ok();
        host.run(&format!("test ! -e {folder}/control && test ! -e {folder}/vsock")).expect_ok();
    }
}

fn reboot_happens_in_place(hosts: &Hosts) {
    let host = prepared(hosts);
    let machine = Machine::boot(&host, "6.12", "vmlinux", "--cpus 2");
    let boot_id = || machine.exec("cat /proc/sys/kernel/random/boot_id").expect_ok().stdout();
    let before = boot_id();
    machine.exec("reboot");
    machine.wait_ready(2);
    assert_ne!(before, boot_id(), "the guest has not rebooted");
    machine.exec("nproc").expect_ok().expect_stdout("2");
    machine.ask(r#"{"status":{}}"#).expect_ok().expect_out(r#""reboots":1"#);
    machine.powers_off();

    let once = Machine::boot(&host, "6.12", "vmlinux", "--no-reboot");
    once.exec("reboot");
    once.ends().expect_ok();
}

fn a_triple_fault_is_told(hosts: &Hosts) {
    let host = prepared(hosts);
    hosts.guests_lie();
    // This is how the guest's kernel resets.
    let machine =
        Machine::boot(&host, "6.12", "vmlinux", "--cpus 1 --cmdline 'console=ttyS0 quiet reboot=triple'");
    machine.exec("reboot");
    machine.wait_ready(2);
    let said = format!("cat {}/said", machine.folder);
    host.run(&said).expect_ok().expect_stdout("lathe-vmm: the guest reset itself by a triple fault");
    machine.powers_off();
}

fn disk_keeps_flushes_and_discards(hosts: &Hosts) {
    let host = prepared(hosts);
    host.run(
        "cd /root/kit && head -c 33554432 /dev/urandom >source && truncate -s 64M disk && cp source only-read
         cp source whole && truncate -s 64M whole",
    )
    .expect_ok();
    let options = "--disk /root/kit/disk --disk /root/kit/whole --disk /root/kit/only-read,ro";
    let machine = Machine::boot(&host, "6.12", "vmlinux", options);

    // What the guest reads is what the file holds, and what it writes and flushes is in the file at once.
    let sum = host.run("sha256sum </root/kit/source").expect_ok().stdout();
    machine.shell("dd if=/dev/vdb bs=1M count=32 2>/dev/null | sha256sum").expect_ok().expect_stdout(&sum);
    machine.shell("dd if=/dev/vdb of=/dev/vda bs=1M count=32 conv=fsync 2>/dev/null").expect_ok();
    host.run("head -c 33554432 /root/kit/disk | sha256sum").expect_ok().expect_stdout(&sum);

    // Discarded space goes back to the host and reads as zero.
    machine.exec("blkdiscard /dev/vdb").expect_ok();
    let blocks: u64 = host.run("stat -c %b /root/kit/whole").expect_ok().stdout().parse().unwrap_or(u64::MAX);
    assert!(blocks * 512 < 1 << 20, "after the discard the file still has {blocks} blocks");
    let zeros = host.run("head -c 33554432 /dev/zero | sha256sum").expect_ok().stdout();
    machine.shell("dd if=/dev/vdb bs=1M count=32 2>/dev/null | sha256sum").expect_ok().expect_stdout(&zeros);

    // Read-only is read-only, and readable.
    machine.exec("cat /sys/block/vdc/ro").expect_ok().expect_stdout("1");
    machine.shell("dd if=/dev/vdc bs=1M 2>/dev/null | sha256sum").expect_ok().expect_stdout(&sum);
    machine.shell("dd if=/dev/zero of=/dev/vdc bs=4k count=1 conv=fsync").expect_failure();
    machine.powers_off();
    host.run("cmp /root/kit/source /root/kit/only-read").expect_ok();
}

/// Options, and what the message must contain. Each is due a `fix:` as well.
const MISTAKES: &[(&str, &str)] = &[
    ("--kernel /root/kit/no-such-file", "/root/kit/no-such-file"),
    ("--kernel /root/kit/noise", "neither a bzImage nor an ELF file"),
    ("--kernel /root/kit/empty", "0 bytes"),
    ("--kernel /root/kit/cut-bzImage", "truncated"),
    ("--kernel /root/kit/cut-vmlinux", "truncated"),
    ("--kernel /root/kit", "kernel"),
    ("--kernel K --initrd /root/kit/no-such-file", "/root/kit/no-such-file"),
    ("--kernel K --initrd /root/kit/huge --memory 128M", "initrd of 209715200 bytes does not fit"),
    ("--kernel K --memory 64M", "does not fit into the 67108864 bytes"),
    ("--kernel K --disk /root/kit/no-such-file", "/root/kit/no-such-file"),
    ("--kernel K --memory banana", "banana"),
    ("--kernel K --memory -1", "--memory -1"),
    ("--kernel K --memory 1M", "1048576"),
    ("--kernel K --memory 99999G", "107373108658176"),
    ("--kernel K --cpus 0", "0 vCPUs; 1 to"),
    ("--kernel K --cpus 5000", "5000 vCPUs; 1 to"),
    ("--kernel K --vsock nonsense", "nonsense"),
];

fn bad_input_gets_a_clear_error(hosts: &Hosts) {
    let host = prepared(hosts);
    host.run(&format!(
        "cd /root/kit && head -c 4000000 /dev/urandom >noise && : >empty && truncate -s 200M huge
         head -c 100000 {KERNELS}/6.12/bzImage >cut-bzImage; head -c 100000 {KERNELS}/6.12/vmlinux >cut-vmlinux"
    ))
    .expect_ok();
    let mut complaints = Vec::new();
    for (options, word) in MISTAKES {
        let options = options.replace("--kernel K", &format!("--kernel {KERNELS}/6.12/vmlinux"));
        let line = format!("timeout 20 /root/kit/lathe-vmm run --console none {options} </dev/null");
        let outcome = host.run(&line);
        let said = outcome.stderr();
        let clear = said.starts_with("error[")
            && said.contains(word)
            && said.contains("  fix: ")
            && said.lines().count() <= 4;
        if outcome.status != 1 || !clear {
            complaints.push(outcome.story());
        }
    }
    hosts.expecting();
    assert!(
        complaints.is_empty(),
        "{} of {} errors are not clear:\n{}",
        complaints.len(),
        MISTAKES.len(),
        complaints.join("\n")
    );
}

fn a_broken_initrd_is_the_guests_own_matter(hosts: &Hosts) {
    let host = prepared(hosts);
    host.run("head -c 30000 /root/kit/6.12.cpio >/root/kit/cut.cpio").expect_ok();
    let options = format!(
        "--kernel {KERNELS}/6.12/vmlinux --initrd /root/kit/cut.cpio --no-reboot \
         --cmdline 'console=ttyS0 quiet panic=-1'"
    );
    let machine = Machine::start(&host, &options);
    let folder = machine.folder.clone();
    // The kernel panics and resets, which ends the monitor; it must neither hang nor crash.
    machine.ends().expect_ok();
    host.run(&format!("cat {folder}/console")).expect_out("Kernel panic");
}

fn boots_debian_6_1(hosts: &Hosts) {
    boots_debian(hosts, "6.1");
}

fn boots_debian_6_12(hosts: &Hosts) {
    boots_debian(hosts, "6.12");
}

/// A copy of the distribution's disk with what installing the kernel's and the agent's package would add to it.
fn debian_disk(host: &Host<'_>, kernel: &str) {
    let unit = Path::new(env!("CARGO_MANIFEST_DIR")).join("../vmm/guest/lathe-guest.service");
    host.push(&unit, "/root/kit/lathe-guest.service");
    host.run_within(
        DEBIAN_LIMIT,
        &format!(
            "set -e; cp --sparse=always /usr/lib/lathe-test/debian.ext4 /root/debian.ext4
             mkdir -p /root/debian && mount -o loop /root/debian.ext4 /root/debian && cd /root/debian
             mkdir -p usr/lib/modules && cp -r /lib/modules/$(cat {KERNELS}/{kernel}/version) usr/lib/modules/
             install -m 755 /root/kit/lathe-guest usr/bin/lathe-guest
             install -m 644 /root/kit/lathe-guest.service usr/lib/systemd/system/
             ln -s /usr/lib/systemd/system/lathe-guest.service etc/systemd/system/multi-user.target.wants/
             cd / && umount /root/debian"
        ),
    )
    .expect_ok();
}

fn boots_debian(hosts: &Hosts, kernel: &str) {
    let host = prepared(hosts);
    debian_disk(&host, kernel);
    let begun = std::time::Instant::now();
    let machine = Machine::start(
        &host,
        &format!(
            "--kernel {KERNELS}/{kernel}/bzImage --initrd {KERNELS}/{kernel}/initrd.img --disk /root/debian.ext4 \
             --memory 512M --cpus 2 --cmdline 'console=ttyS0 quiet root=/dev/vda rw'"
        ),
    );
    let shell = format!("grep -q 'root@' {}/console || {{ tail -n 5 {0}/console; false; }}", machine.folder);
    host.wait_until("a shell on Debian's console", DEBIAN_LIMIT, &shell);
    hosts.note(&format!("Debian with {kernel}: shell after {:.0} s", begun.elapsed().as_secs_f32()));
    let exec = format!("/root/kit/guest-exec {}/vsock systemctl is-system-running --wait", machine.folder);
    host.wait_until("systemd in the guest has settled", DEBIAN_LIMIT, &exec).expect_stdout("running");
    hosts.note(&format!("Debian with {kernel}: settled after {:.0} s", begun.elapsed().as_secs_f32()));
    machine.exec("findmnt -no SOURCE,FSTYPE /").expect_ok().expect_out("/dev/vda").expect_out("ext4");
    machine.exec("nproc").expect_ok().expect_stdout("2");
    // A button that is pressed while nobody watches it has no effect, and udev finds it late.
    let watched = "journalctl -b -u systemd-logind | grep -q \"Watching system buttons\"";
    let watched = format!("/root/kit/guest-exec {}/vsock sh -c '{watched}'", machine.folder);
    host.wait_until("somebody watches the power button", DEBIAN_LIMIT, &watched);
    machine.ask(r#"{"power_button":{}}"#).expect_ok();
    machine.running.finish_within(DEBIAN_LIMIT).expect_ok();
    host.run("dumpe2fs -h /root/debian.ext4 2>/dev/null | grep 'Filesystem state'").expect_out("clean");
    host.run("e2fsck -fn /root/debian.ext4").expect_ok();
}
