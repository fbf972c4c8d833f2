//! Bad input of every kind: a clear error, the right exit code, and nothing changed.

use std::time::Duration;

use lathe_tests::scenario::{Group, Host, Hosts};

use crate::node::{View, away, boot_id, make_small, settled};

/// On one host.
pub const GROUP: Group = Group {
    name: "mistakes",
    hosts: 1,
    lathe: true,
    bench: false,
    scenarios: &[
        ("absurd_amounts_are_refused", absurd_amounts_are_refused),
        ("unknown_fields_are_refused", unknown_fields_are_refused),
        ("names_are_checked", names_are_checked),
        ("kernels_and_images_are_checked", kernels_and_images_are_checked),
        ("a_disk_has_one_user", a_disk_has_one_user),
        ("only_who_may_can", only_who_may_can),
        ("noise_on_sockets_changes_nothing", noise_on_sockets_changes_nothing),
        ("one_agent_at_a_time", one_agent_at_a_time),
    ],
};

/// The host with a running machine `web`, whatever an earlier scenario has left.
fn prepared<'a>(hosts: &'a Hosts) -> Host<'a> {
    let host = hosts.host(1);
    if host.run("lathe show web --json >/tmp/shown && jq -e .guest_agent /tmp/shown").status != 0 {
        host.run("lathe rm web --force --purge 2>/dev/null");
        make_small(&host, "web", "");
    }
    host
}

/// One mistake.
struct Mistake {
    line: &'static str,
    status: i32,
    /// What standard error must contain.
    says: &'static [&'static str],
}

const fn mistake(line: &'static str, status: i32, says: &'static [&'static str]) -> Mistake {
    Mistake { line, status, says }
}

/// Our errors have at most four lines; those about the command line end with the usage.
const MOST_LINES: usize = 8;

/// Makes each mistake and expects that machines, books and what the kernel shows are as before.
fn try_all(host: &Host<'_>, mistakes: &[Mistake]) {
    let before = settled(host).essence();
    let mut wrong = Vec::new();
    for Mistake { line, status, says } in mistakes {
        let outcome = host.run(line);
        let told = outcome.stderr();
        let clear = told.lines().count() <= MOST_LINES && !told.contains("panicked");
        if outcome.status != *status || !clear || !says.iter().all(|words| told.contains(words)) {
            wrong.push(format!("expected status {status} and {says:?}\n{}", outcome.story()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
    let after = settled(host);
    assert!(after.essence() == before, "before:\n{before}\nafter:\n{}", after.essence());
    after.expect_agreement();
}

fn absurd_amounts_are_refused(hosts: &Hosts) {
    let host = prepared(hosts);
    try_all(
        &host,
        &[
            mistake("lathe run new --cpu -1", 2, &["-1"]),
            mistake("lathe run new --cpu=-1", 2, &["-1"]),
            mistake("lathe run new --cpu many", 2, &["many"]),
            mistake("lathe run new --cpu NaN", 2, &["NaN"]),
            mistake("lathe run new --cpu 0.01", 2, &["error[bad-amount]", "0.05"]),
            mistake("lathe run new --cpu 99999999999999999999", 2, &["99999999999999999999"]),
            mistake("lathe run new --cpu 64", 1, &["error[cpu-over-capacity]", "64.00", "2.00", "fix:"]),
            mistake(
                "lathe run new --cpu 0.25 --memory 1000G",
                1,
                &["error[memory-over-capacity]", "1000 GiB", "fix:"],
            ),
            mistake("lathe run new --memory 1M", 2, &["error[bad-amount]", "64 MiB"]),
            mistake("lathe run new --memory 0", 2, &["error[bad-amount]"]),
            mistake("lathe run new --memory 100000001", 2, &["error[bad-amount]", "nearest"]),
            mistake("lathe run new --net 1bit", 2, &["error[bad-amount]"]),
            mistake("lathe run new --vcpus 0", 2, &["error[bad-amount]"]),
            mistake("lathe run new --cpu 1.5 --vcpus 1", 2, &["error[bad-amount]", "fix: --vcpus 2"]),
            mistake("lathe run new --cpu 2..1", 2, &["2..1"]),
            mistake("lathe resize web", 2, &["error[usage]", "fix: lathe resize web"]),
            mistake("lathe resize web --cpu -9", 2, &["error[bad-amount]", "below zero"]),
            mistake("lathe resize web --cpu 0", 2, &["error[bad-amount]"]),
            mistake("lathe resize web --cpu 6", 1, &["error[cpu-over-capacity]", "6.00"]),
            mistake("lathe resize web --memory 1000G", 1, &["error["]),
            mistake("lathe resize web --cpu 0.5 --net 1bit", 2, &["error[bad-amount]"]),
            mistake(
                "lathe resize web --cpu 0.5 --if-revision 77",
                9,
                &["error[revision]", "77", "fix: lathe show web"],
            ),
            mistake("lathe stop web --timeout 99999", 2, &["99999"]),
        ],
    );
}

fn unknown_fields_are_refused(hosts: &Hosts) {
    let host = prepared(hosts);
    let before = settled(&host).essence();
    let api =
        "curl -s -w ' %{http_code}' --unix-socket /run/lathe/lathe.sock -H 'Content-Type: application/json'";
    let new = r#"{"name":"new","cpu_milli":100,"memory_bytes":134217728,"net":true"#;
    for (request, says, code) in [
        (format!("-X POST -d '{new},\"cpus\":3}}' http://l/v1/machines"), "unknown-field", 400),
        (format!("-X POST -d '{new}' http://l/v1/machines"), "bad-json", 400),
        (format!("-X POST -d '{}' http://l/v1/machines", new.replace("100", "-5") + "}"), "bad-value", 400),
        (format!("-X POST -d '{}' http://l/v1/machines", new.replace("100", "1e30") + "}"), "bad-", 400),
        (
            format!(
                "-X POST -d '{},\"disks\":[{{\"path\":{{\"path\":\"/etc/shadow\"}}}}]}}' http://l/v1/machines",
                new
            ),
            "disk-not-allowed",
            403,
        ),
        ("-X PATCH -d '{\"cpu\":2}' http://l/v1/machines/web".to_owned(), "unknown-field", 400),
        (
            "-X PATCH -d '{\"cpu_milli\":300}' -H 'If-Match: soon' http://l/v1/machines/web".to_owned(),
            "bad-value",
            400,
        ),
        ("-X PATCH -d '{\"cpu_milli\":300}' http://l/v1/machines/nobody".to_owned(), "no-such-machine", 404),
        (
            "-X POST -d '{\"timeout_sec\":1,\"force\":true,\"gently\":true}' http://l/v1/machines/web/stop"
                .to_owned(),
            "unknown-field",
            400,
        ),
        ("http://l/v1/machines/..%2f..%2fetc%2fshadow".to_owned(), "error", 400),
        ("http://l/v2/machines".to_owned(), "no-such-route", 404),
        ("-X PUT http://l/v1/machines".to_owned(), "method-not-allowed", 405),
        ("-X POST -d @/usr/bin/python3 http://l/v1/machines".to_owned(), "error", 400),
    ] {
        let outcome =
            host.run(&format!("{api} {request}")).expect_ok().expect_out("\"error\"").expect_out(says);
        let status: i32 =
            outcome.stdout().rsplit(' ').next().and_then(|word| word.parse().ok()).unwrap_or_default();
        // A body that is too large is one kind of bad request.
        assert!(status == code || (code == 400 && status == 413), "expected {code}\n{}", outcome.story());
    }
    assert!(settled(&host).essence() == before);
}

fn names_are_checked(hosts: &Hosts) {
    let host = prepared(hosts);
    try_all(
        &host,
        &[
            mistake("lathe run web", 9, &["error[name-taken]", "web", "fix:"]),
            mistake("lathe run ''", 2, &["error[bad-name]"]),
            mistake("lathe run ../etc", 2, &["error[bad-name]"]),
            mistake("lathe run 'a b'", 2, &["error[bad-name]"]),
            mistake("lathe run Web", 2, &["error[bad-name]", "a-z"]),
            mistake("lathe run web-", 2, &["error[bad-name]"]),
            mistake("lathe run 9lives", 2, &["error[bad-name]"]),
            mistake("lathe run abcdefghijklmnopqrstuvwxyzabcdefg", 2, &["error[bad-name]"]),
            mistake("lathe run 'x%i$HOME'", 2, &["error[bad-name]"]),
            mistake("lathe show nobody", 8, &["error[no-such-machine]", "nobody"]),
            mistake("lathe resize nobody --cpu 1", 8, &["error[no-such-machine]"]),
            mistake("lathe stop nobody", 8, &["error[no-such-machine]"]),
            mistake("lathe start nobody", 8, &["error[no-such-machine]"]),
            mistake("lathe rm nobody", 8, &["error[no-such-machine]"]),
            mistake("lathe exec nobody -- true", 8, &["error[no-such-machine]"]),
            mistake("lathe logs nobody", 8, &["error[no-such-machine]"]),
            mistake("lathe console nobody </dev/null", 8, &["error[no-such-machine]"]),
            mistake("lathe rm web", 9, &["error[machine-running]", "fix: lathe stop web"]),
            mistake("lathe --json show nobody", 8, &["{\"error\":{\"code\":\"no-such-machine\""]),
            mistake("lathe frobnicate", 2, &["frobnicate"]),
        ],
    );
}

fn kernels_and_images_are_checked(hosts: &Hosts) {
    let host = prepared(hosts);
    let good = "/usr/lib/lathe-test/kernels/6.1";
    host.run(&format!(
        "head -c 100000 {good}/bzImage >/root/cut; head -c 100000 {good}/vmlinux >/root/cut-elf; head -c 500000 /dev/urandom >/root/noise; : >/root/empty; cp {good}/vmlinux /root/broken-elf; head -c 400 /dev/zero | tr '\\0' '\\377' | dd of=/root/broken-elf bs=1 seek=24 conv=notrunc status=none"
    ))
    .expect_ok();
    try_all(
        &host,
        &[
            mistake(
                "lathe run new --memory 128M --cpu 0.25 --kernel /root/not-there",
                2,
                &["error[no-such-file]", "/root/not-there"],
            ),
            mistake(
                "lathe run new --memory 128M --cpu 0.25 --kernel /root",
                2,
                &["error[no-such-file]", "/root"],
            ),
            mistake(
                "lathe run new --memory 128M --cpu 0.25 --kernel /root/noise",
                1,
                &["error[kernel-image]", "fix:"],
            ),
            mistake(
                "lathe run new --memory 128M --cpu 0.25 --kernel /root/empty",
                1,
                &["error[kernel-image]"],
            ),
            mistake("lathe run new --memory 128M --cpu 0.25 --kernel /root/cut", 1, &["error[kernel-image]"]),
            mistake(
                "lathe run new --memory 128M --cpu 0.25 --kernel /root/cut-elf",
                1,
                &["error[kernel-image]"],
            ),
            mistake(
                "lathe run new --memory 128M --cpu 0.25 --kernel /root/broken-elf",
                1,
                &["error[kernel-image]"],
            ),
            mistake(
                "lathe run new --memory 128M --cpu 0.25 --image nothing",
                8,
                &["error[no-such-image]", "nothing"],
            ),
            mistake("lathe run new --memory 128M --cpu 0.25 --disk-size 1G", 2, &["error[bad-request]"]),
            mistake("lathe image import new /root/noise --format tar", 2, &["error[image-format]"]),
            mistake("lathe image import ../new /root/noise --format raw", 2, &["error[bad-name]"]),
            mistake("lathe image rm nothing", 8, &["error[no-such-image]"]),
        ],
    );
    host.run("lathe image list --json >/tmp/shown && jq -e '.images == []' /tmp/shown").expect_ok();
    View::of(&host).expect_no_uploads();
    host.run("rm -f /root/cut /root/cut-elf /root/noise /root/broken-elf").expect_ok();
}

fn a_disk_has_one_user(hosts: &Hosts) {
    let host = prepared(hosts);
    host.run(
        "mkdir -p /srv/disks /etc/lathe/lathe.d; truncate -s 8M /srv/disks/one.raw /root/elsewhere.raw; chown -R lathe: /srv/disks
         printf '[disks]\\nallowed = [\"/srv/disks\"]\\n' >/etc/lathe/lathe.d/50-test.toml
         mkdir -p /etc/systemd/system/lathed.service.d
         printf '[Service]\\nReadWritePaths=/srv/disks\\n' >/etc/systemd/system/lathed.service.d/test.conf
         systemctl daemon-reload; systemctl restart lathed",
    )
    .expect_ok();
    host.run(
        "lathe run owner --memory 128M --cpu 0.25 --wait 0 --kernel /boot/vmlinuz-$(uname -r) \
         --initrd $(find /var/lib/lathe/boot -type f | head -n 1) --disk in-place:/srv/disks/one.raw",
    )
    .expect_ok();
    try_all(
        &host,
        &[
            mistake(
                "lathe run new --memory 128M --cpu 0.25 --disk in-place:/srv/disks/one.raw",
                9,
                &["error[disk-in-use]", "owner", "fix: lathe stop owner"],
            ),
            mistake(
                "ln -sf one.raw /srv/disks/link.raw; lathe run new --memory 128M --cpu 0.25 --disk in-place:/srv/disks/link.raw",
                9,
                &["error[disk-in-use]", "owner"],
            ),
            mistake(
                "ln -f /srv/disks/one.raw /srv/disks/hard.raw; lathe run new --memory 128M --cpu 0.25 --disk in-place:/srv/disks/hard.raw,ro",
                9,
                &["error[disk-in-use]"],
            ),
            mistake(
                "lathe run new --memory 128M --cpu 0.25 --disk in-place:/root/elsewhere.raw",
                4,
                &["error[disk-not-allowed]", "fix:"],
            ),
            mistake(
                "lathe run new --memory 128M --cpu 0.25 --disk in-place:/srv/disks/../../root/elsewhere.raw",
                4,
                &["error[disk-not-allowed]"],
            ),
            mistake(
                "ln -sf /root/elsewhere.raw /srv/disks/out.raw; lathe run new --memory 128M --cpu 0.25 --disk in-place:/srv/disks/out.raw",
                4,
                &["error[disk-not-allowed]"],
            ),
        ],
    );
    away(&host, &["owner"]);
    host.run("rm -r /etc/lathe/lathe.d/50-test.toml /etc/systemd/system/lathed.service.d/test.conf; systemctl daemon-reload; systemctl restart lathed; ls /srv/disks/one.raw")
        .expect_ok();
}

fn only_who_may_can(hosts: &Hosts) {
    let host = prepared(hosts);
    host.run("id viewer >/dev/null 2>&1 || useradd -M -G lathe-view viewer").expect_ok();
    host.run("id changer >/dev/null 2>&1 || useradd -M -G lathe changer").expect_ok();
    try_all(
        &host,
        &[
            mistake(
                "setpriv --reuid nobody --regid nogroup --clear-groups lathe list",
                4,
                &["error[not-permitted]", "nobody", "fix: sudo usermod -aG lathe-view nobody"],
            ),
            mistake(
                "setpriv --reuid nobody --regid nogroup --clear-groups lathe rm web --force",
                4,
                &["error[not-permitted]", "fix: sudo usermod -aG lathe nobody"],
            ),
            mistake(
                "setpriv --reuid viewer --regid viewer --init-groups lathe resize web --cpu 0.5",
                4,
                &["error[not-permitted]", "fix: sudo usermod -aG lathe viewer"],
            ),
            mistake(
                "setpriv --reuid viewer --regid viewer --init-groups lathe exec web -- true",
                4,
                &["error[not-permitted]"],
            ),
            mistake(
                "setpriv --reuid viewer --regid viewer --init-groups lathe cluster token",
                4,
                &["error[not-permitted]"],
            ),
            mistake(
                "setpriv --reuid viewer --regid viewer --init-groups lathe run new",
                4,
                &["error[not-permitted]"],
            ),
        ],
    );
    for verb in ["list", "show web", "host", "logs web", "peers", "doctor"] {
        host.run(&format!("setpriv --reuid viewer --regid viewer --init-groups lathe {verb}")).expect_ok();
    }
    host.run("setpriv --reuid changer --regid changer --init-groups lathe resize web --cpu 0.5").expect_ok();
    host.run("lathe resize web --cpu 0.25").expect_ok();
}

fn noise_on_sockets_changes_nothing(hosts: &Hosts) {
    let host = prepared(hosts);
    let boot = boot_id(&host, "web");
    let agent = host.run("systemctl show lathed --property MainPID --value").expect_ok().stdout();
    let before = settled(&host).essence();
    // The agent's HTTP socket, the monitor's control socket, and what a cluster would listen on.
    host.run("lathe cluster init noise --address 127.0.0.1:7946").expect_ok();
    host.run(
        "for i in 1 2 3 4 5 6 7 8; do
             head -c $((i * 150)) /dev/urandom | socat -u - UDP:127.0.0.1:7946
             head -c $((i * 150)) /dev/urandom | timeout 2 socat -u - TCP:127.0.0.1:7946 2>/dev/null
             head -c $((i * 1500)) /dev/urandom | timeout 2 socat - UNIX-CONNECT:/run/lathe/lathe.sock >/dev/null 2>&1
             head -c $((i * 150)) /dev/urandom | timeout 2 socat -u - UNIX-CONNECT:/run/lathe/vm/web.sock,type=5 2>/dev/null
         done
         head -c 60000 /dev/zero | socat -u -b 60000 - UDP:127.0.0.1:7946
         printf '{}' | timeout 2 socat - UNIX-CONNECT:/run/lathe/vm/web.sock,type=5
         printf '{\"v\":99,\"id\":1,\"command\":{\"quit\":{}}}' | timeout 2 socat - UNIX-CONNECT:/run/lathe/vm/web.sock,type=5
         printf '{\"v\":1,\"id\":1,\"command\":{\"explode\":{}}}' | timeout 2 socat - UNIX-CONNECT:/run/lathe/vm/web.sock,type=5
         true",
    )
    .expect_ok();
    assert!(boot_id(&host, "web") == boot, "the guest has booted anew");
    assert!(settled(&host).essence() == before);
    host.run("systemctl show lathed --property MainPID --value").expect_stdout(&agent);
    // A panic of ours: that of a guest's kernel is told in other words.
    host.run("journalctl -b --no-pager -u lathed -u 'lathe-vm@*' | grep 'panicked at'").expect_status(1);
    host.run("lathe resize web --cpu 0.3 && lathe resize web --cpu 0.25").expect_ok();
    host.run("lathe peers --json >/tmp/shown && jq -e '.peers | length == 1' /tmp/shown").expect_ok();
}

fn one_agent_at_a_time(hosts: &Hosts) {
    let host = prepared(hosts);
    let before = settled(&host).essence();
    host.run("timeout 20 setpriv --reuid lathe --regid lathe --init-groups /usr/lib/lathe/lathed")
        .expect_status(1)
        .expect_err("error[already-running]");
    host.run("printf '[host]\\nnmae = \"x\"\\n' >/etc/lathe/lathe.d/90-wrong.toml; lathed --check")
        .expect_status(78)
        .expect_err("90-wrong.toml")
        .expect_err("nmae");
    host.run("rm /etc/lathe/lathe.d/90-wrong.toml; lathed --check").expect_ok().expect_out("ok");
    assert!(settled(&host).essence() == before);
    // Socket units would start it again at once.
    host.run("systemctl stop lathed.socket lathed.service").expect_ok();
    host.run("lathe list").expect_status(7).expect_err("error[daemon-down]").expect_err("fix:");
    host.run("lathe --json list").expect_status(7).expect_err("\"code\":\"daemon-down\"");
    host.run("pgrep -xc lathe-vmm").expect_ok().expect_stdout("1");
    host.run("systemctl start lathed.socket && lathe list").expect_ok().expect_out("running");
    host.wait_until(
        "the machine is found again",
        Duration::from_secs(30),
        "lathe show web --json >/tmp/shown && jq -e .guest_agent /tmp/shown",
    );
    assert!(View::of(&host).essence() == before);
    away(&host, &["web"]);
}
