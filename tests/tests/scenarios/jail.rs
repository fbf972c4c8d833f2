//! A monitor that its guest has taken over: what it could do with its identity, tried from inside its namespaces. The filter of system
//! calls is left out of the attempts, so that what is behind it is seen to hold alone; that it is there is read from the process.

use lathe_tests::scenario::{Group, Host, Hosts};

use crate::node::{away, make_small, show};

/// On one host.
pub const GROUP: Group = Group {
    name: "jail",
    hosts: 1,
    lathe: true,
    bench: false,
    scenarios: &[
        ("the_monitor_has_no_privilege", the_monitor_has_no_privilege),
        ("its_limits_are_out_of_its_reach", its_limits_are_out_of_its_reach),
        ("it_opens_no_file_of_the_host", it_opens_no_file_of_the_host),
        ("it_reaches_no_network", it_reaches_no_network),
        ("its_filter_forbids_what_it_never_needs", its_filter_forbids_what_it_never_needs),
        ("it_touches_no_other_machine", it_touches_no_other_machine),
    ],
};

/// The host with machines `inside` and `other`, and the first one's monitor.
fn prepared<'a>(hosts: &'a Hosts) -> (Host<'a>, Monitor<'a>) {
    let host = hosts.host(1);
    for name in ["inside", "other"] {
        if host.run(&format!("lathe show {name} --json >/tmp/shown && jq -e .guest_agent /tmp/shown")).status
            != 0
        {
            host.run(&format!("lathe rm {name} --force --purge 2>/dev/null"));
            make_small(&host, name, "");
        }
    }
    let pid = show(&host, "inside")["pid"].to_string();
    let ids = host.run(&format!("awk '/^[UG]id:/ {{ print $2 }}' /proc/{pid}/status")).expect_ok().stdout();
    let (uid, gid) = ids.split_once('\n').unwrap_or_default();
    let monitor = Monitor { hosts, host: host.clone(), pid, uid: uid.to_owned(), gid: gid.to_owned() };
    (host, monitor)
}

/// What a refusal looks like.
const REFUSALS: [&str; 9] = [
    "Permission denied",
    "Operation not permitted",
    "must be superuser",
    "Read-only file system",
    "No such file",
    "No such process",
    "nonexistent",
    "Network is unreachable",
    "Protocol not supported",
];

/// The monitor of machine `inside`.
struct Monitor<'a> {
    hosts: &'a Hosts,
    host: Host<'a>,
    pid: String,
    uid: String,
    gid: String,
}

impl Monitor<'_> {
    /// A line of shell in the monitor's namespaces, cgroup and root directory, with its user and no capability.
    fn line(&self, line: &str) -> String {
        let Self { pid, uid, gid, .. } = self;
        let quoted = line.replace('\'', r"'\''");
        format!(
            "setpriv --clear-groups nsenter --target {pid} --all setpriv --reuid {uid} --regid {gid} --keep-groups --bounding-set=-all --inh-caps=-all --no-new-privs sh -c '{quoted}'"
        )
    }

    /// Every attempt is refused with one of these words.
    fn is_refused(&self, attempts: &[&str]) {
        let wrong = attempts.iter().filter_map(|attempt| {
            let outcome = self.host.run(&self.line(attempt));
            let told = outcome.stderr();
            let refused = outcome.status != 0 && REFUSALS.iter().any(|words| told.contains(words));
            (!refused).then(|| outcome.story())
        });
        let wrong: Vec<_> = wrong.collect();
        self.hosts.expecting();
        assert!(wrong.is_empty(), "not refused, or for another reason:\n{}", wrong.join("\n\n"));
    }

    /// It can do this, so that refusals mean something.
    fn can(&self, line: &str) -> String {
        self.host.run(&self.line(line)).expect_ok().stdout()
    }
}

fn the_monitor_has_no_privilege(hosts: &Hosts) {
    let (host, monitor) = prepared(hosts);
    let status = host.run(&format!("cat /proc/{}/status", monitor.pid)).expect_ok();
    let status = [
        "CapInh:\t0000000000000000",
        "CapPrm:\t0000000000000000",
        "CapEff:\t0000000000000000",
        "CapBnd:\t0000000000000000",
        "CapAmb:\t0000000000000000",
        "NoNewPrivs:\t1",
        "Seccomp:\t2",
    ]
    .into_iter()
    .fold(status, |status, words| status.expect_out(words));
    assert!(monitor.uid != "0" && !status.stdout().contains("Uid:\t0"), "{}", status.story());
    host.run("id -u lathe").expect_ok();
    assert!(host.run("id -u lathe").stdout() != monitor.uid, "the monitor is the agent's user");
    let other = show(&host, "other")["pid"].to_string();
    host.run(&format!("awk '/^Uid:/ {{ print $2 }}' /proc/{other}/status | grep -vx {}", monitor.uid))
        .expect_ok();
    // Every thread, the vCPUs' too.
    host.run(&format!(
        "grep -h -E '^(CapEff|Seccomp|NoNewPrivs):' /proc/{}/task/*/status | sort -u",
        monitor.pid
    ))
    .expect_ok()
    .expect_stdout("CapEff:\t0000000000000000\nNoNewPrivs:\t1\nSeccomp:\t2");
    for space in ["mnt", "net", "ipc", "user"] {
        host.run(&format!(
            "[ $(readlink /proc/{}/ns/{space}) != $(readlink /proc/1/ns/{space}) ]",
            monitor.pid
        ))
        .expect_ok();
    }
    let report = host.run("systemd-analyze security --no-pager lathe-vm@inside.service lathed.service 2>/dev/null | grep -i 'overall exposure'");
    hosts.note(report.stdout().replace("→ ", "").trim());
    assert!(monitor.can("id -u") == monitor.uid);
}

fn its_limits_are_out_of_its_reach(hosts: &Hosts) {
    let (host, monitor) = prepared(hosts);
    let unit = "/sys/fs/cgroup/lathe.slice/lathe-vm@inside.service";
    let limits =
        format!("cd {unit}/machine && grep -H . cpu.max vmm/cpu.max memory.max memory.high pids.max");
    let before = host.run(&limits).expect_ok().stdout();
    monitor.is_refused(&[
        &format!("echo max >{unit}/machine/cpu.max"),
        &format!("echo max >{unit}/machine/vcpu/cpu.max"),
        &format!("echo max >{unit}/machine/vmm/cpu.max"),
        &format!("echo max >{unit}/machine/memory.max"),
        &format!("echo max >{unit}/machine/pids.max"),
        &format!("echo 10000 >{unit}/cpu.weight"),
        &format!("echo 0 >{unit}/cpu.idle"),
        &format!("echo max >{unit}/memory.min"),
        "echo max >/sys/fs/cgroup/lathe.slice/memory.min",
        &format!("echo $$ >{unit}/cgroup.procs"),
        &format!("echo $$ >{unit}/machine/cgroup.procs"),
        &format!("echo $$ >{unit}/machine/vmm/cgroup.threads"),
        "echo $$ >/sys/fs/cgroup/cgroup.procs",
        &format!("mkdir {unit}/machine/mine"),
        &format!("mkdir {unit}/mine"),
        &format!("chmod 777 {unit}/machine/vcpu"),
        "mount -t cgroup2 none /tmp",
        "umount /sys/fs/cgroup",
    ]);
    assert!(host.run(&limits).stdout() == before);
    // Nothing in the whole tree belongs to the monitor's user.
    host.run(&format!("find {unit} -uid {} | grep .", monitor.uid)).expect_status(1);
}

fn it_opens_no_file_of_the_host(hosts: &Hosts) {
    let (host, monitor) = prepared(hosts);
    host.run("echo secret >/var/tmp/secret; chmod 644 /var/tmp/secret; echo secret >/root/secret; echo secret >/srv/secret").expect_ok();
    monitor.is_refused(&[
        "cat /etc/shadow",
        "cat /root/secret",
        "cat /srv/secret",
        "cat /var/tmp/secret",
        "ls /var/lib/lathe/",
        "cat /etc/lathe/lathe.toml",
        "ls /boot/",
        "ls /run/lathe/",
        "cat /dev/kvm",
        "cat /dev/net/tun",
        "cat /dev/vda",
        "cat /dev/mem",
        "mknod /tmp/disk b 254 0",
        "touch /usr/mine",
        "touch /etc/mine",
        "touch /run/mine",
        "echo 1 >/proc/sys/kernel/sysrq",
        "echo b >/proc/sysrq-trigger",
        "ls /proc/1/fd/",
    ]);
    let devices = monitor.can("ls /dev");
    for device in ["kvm", "tun", "vda", "mem", "kmsg", "vhost-vsock", "fuse"] {
        assert!(!devices.split_whitespace().any(|found| found == device), "/dev has {device}: {devices}");
    }
    let suid = monitor.can("unshare -Ur id -u 2>&1 || true");
    hosts.note(&format!(
        "a user namespace of its own without the filter: {}",
        suid.lines().next().unwrap_or_default()
    ));
}

fn it_reaches_no_network(hosts: &Hosts) {
    let (host, monitor) = prepared(hosts);
    assert!(monitor.can("ip -o link | cut -d: -f2 | tr -d ' '").split_whitespace().all(|link| link == "lo"));
    let gateway = host
        .run("ip -4 -o address show lathe0 | awk '{sub(\"/.*\", \"\", $4); print $4; exit}'")
        .expect_ok()
        .stdout();
    let server = host.start("timeout 60 socat TCP-LISTEN:4444,fork,reuseaddr STDIO");
    host.wait_until(
        "somebody listens",
        std::time::Duration::from_secs(10),
        "ss -Hltn sport = :4444 | grep .",
    );
    host.run(&format!("socat -u /dev/null TCP:{gateway}:4444")).expect_ok();
    monitor.is_refused(&[
        &format!("socat -u /dev/null TCP:{gateway}:4444"),
        &format!("echo | socat -u - UDP:{gateway}:4444"),
        "echo | socat -u - UDP6:[2001:db8::1]:4444",
        "socat - UNIX-CONNECT:/run/lathe/lathe.sock </dev/null",
        "socat - UNIX-CONNECT:/run/dbus/system_bus_socket </dev/null",
        "socat - UNIX-CONNECT:/run/systemd/private </dev/null",
        "ip link add mine type dummy",
    ]);
    drop(server);
}

fn it_touches_no_other_machine(hosts: &Hosts) {
    let (host, monitor) = prepared(hosts);
    let other = show(&host, "other")["pid"].to_string();
    monitor.is_refused(&[
        &format!("kill -9 {other}"),
        &format!("kill -STOP {other}"),
        &format!("cat /proc/{other}/mem"),
        &format!("ls /proc/{other}/fd/"),
        &format!("ls /proc/{other}/root/"),
        "socat - UNIX-CONNECT:/run/lathe/vm/other.sock,type=5 </dev/null",
        "socat - UNIX-CONNECT:/run/lathe/machines/other/vsock.sock </dev/null",
        "kill -9 $(cat /run/lathe/lathed.pid 2>/dev/null || echo 1)",
        "echo max >/sys/fs/cgroup/lathe.slice/lathe-vm@other.service/machine/cpu.max",
    ]);
    host.run("lathe show other --json | jq .pid").expect_ok().expect_stdout(&other);
    away(&host, &["inside", "other"]);
}

/// The unit of a machine with another program in it: its user, its sandbox, its filter.
fn its_filter_forbids_what_it_never_needs(hosts: &Hosts) {
    let host = hosts.host(1);
    let attempts = [
        "socat -u /dev/null TCP:127.0.0.1:4444",
        "echo | socat -u - UDP:127.0.0.1:4444",
        "ip -o link",
        "unshare -Ur true",
        "unshare -n true",
        "mount -t tmpfs none /tmp",
        "chroot /tmp true",
        "dmesg",
        "kill -9 1",
        "cat /etc/shadow",
        "ls /var/lib",
        "ls /dev/kvm",
    ];
    let tries: String = attempts
        .iter()
        .map(|attempt| format!("{attempt} >/dev/null 2>&1 && echo 'it can: {attempt}'\n"))
        .collect();
    let script = format!("id -u >/dev/null && echo 'it runs'\n{tries}echo 'that was all'\n");
    host.run(&format!(
        "mkdir -p /run/systemd/system/lathe-vm@probe.service.d /usr/lib/lathe-probe
         cat >/usr/lib/lathe-probe/script <<'END'\n{script}END
         printf '[Service]\\nType=oneshot\\nExecStart=\\nExecStart=/bin/sh /usr/lib/lathe-probe/script\\nExecStartPost=\\nStandardOutput=journal\\n' \
             >/run/systemd/system/lathe-vm@probe.service.d/probe.conf
         systemctl daemon-reload; systemctl start lathe-vm@probe.service"
    ))
    .expect_ok();
    let told = host
        .run("journalctl --sync; journalctl -b --no-pager -o cat -t sh")
        .expect_ok()
        .expect_out("it runs")
        .expect_out("that was all");
    host.run("systemctl stop lathe-vm@probe.socket; rm -r /run/systemd/system/lathe-vm@probe.service.d /usr/lib/lathe-probe; systemctl daemon-reload");
    assert!(!told.stdout().contains("it can:"), "{}", told.stdout());
}
