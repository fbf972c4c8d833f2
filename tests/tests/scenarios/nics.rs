//! Network cards that come, change and go through `lathe nic`, while the machine runs, while it is off, and with lathed killed in between.

use std::time::Duration;

use lathe_tests::scenario::{Group, Host, Hosts};
use serde_json::Value;

use crate::node::{READY, answers, away, boot_id, exec, make, settled, show};

/// On one host.
pub const GROUP: Group = Group {
    name: "nics",
    hosts: 1,
    lathe: true,
    bench: false,
    scenarios: &[
        ("a_nic_comes_changes_and_goes_while_the_guest_runs", a_nic_comes_changes_and_goes),
        ("a_guest_speaks_with_its_own_addresses_only", a_guest_speaks_with_its_own_addresses_only),
        ("a_guest_reaches_no_service_of_the_host", a_guest_reaches_no_service_of_the_host),
        ("a_machine_without_network_gets_a_nic", a_machine_without_network_gets_a_nic),
        ("nics_outlive_lathed_and_the_guests_power", nics_outlive_lathed_and_power),
        ("what_cannot_be_is_refused_and_changes_nothing", what_cannot_be_is_refused),
        ("a_guest_that_does_not_answer_keeps_its_nic", a_guest_that_does_not_answer),
    ],
};

/// From a command to the guest's deed, in an emulated and busy host.
const DEED_LIMIT: Duration = Duration::from_secs(60);
const KILL: &str = "systemctl kill --signal=KILL --kill-who=main lathed.service";

/// Bytes that the shaper of a link has let pass, as tc counts them: the tap's towards the guest, the ifb's from it.
const SHELL: &str = r#"passed() { tc -s -j qdisc show dev $1 root | jq '.[0].bytes'; }
    received() { cat /sys/class/net/$1/statistics/rx_bytes; }
    now() { date +%s%N; }
    rate() { echo rate=$((($2 - $1) * 8000000000 / ($4 - $3))); }"#;

/// The machine of this group with 50 Mbit/s, made when it is not there yet.
fn demo(hosts: &Hosts) -> Host<'_> {
    let host = hosts.host(1);
    if host.run("lathe show demo").status != 0 {
        make(&host, "demo", "--memory 256M --net 50mbit");
    }
    host
}

fn nics(host: &Host<'_>, name: &str) -> Vec<Value> {
    let list = host.run(&format!("lathe nic list {name} --json")).expect_ok().json();
    list["nics"].as_array().cloned().unwrap_or_default()
}

fn names(host: &Host<'_>, name: &str) -> Vec<String> {
    nics(host, name).iter().filter_map(|nic| nic["name"].as_str().map(str::to_owned)).collect()
}

/// A nic's IPv4 address without its prefix.
fn address(nic: &Value) -> String {
    let whole = nic["addresses"][0].as_str().unwrap_or_default();
    whole.split('/').next().unwrap_or_default().to_owned()
}

/// Waits until the guest agent has configured all nics of a machine.
fn configured(host: &Host<'_>, name: &str) {
    let line = format!(
        "lathe nic list {name} --json >/tmp/nics && jq -e 'all(.nics[]; .state == \"attached\" and .configured)' /tmp/nics || {{ cat /tmp/nics; false; }}"
    );
    host.wait_until("nics are configured", READY, &line);
}

/// The value of a word `key=value` in a text.
fn value(text: &str, key: &str) -> f64 {
    let words = text.split_whitespace().filter_map(|word| word.split_once('='));
    let found = words.filter(|(name, _)| *name == key).find_map(|(_, value)| value.parse().ok());
    found.unwrap_or_else(|| panic!("no {key}= in: {text}"))
}

/// More than asked never, a good deal less where the host has no time; how exactly is measured by `tests/run bench exactness`.
fn held(hosts: &Hosts, what: &str, text: &str, mbit: f64) {
    let rate = value(text, "rate") / 1e6;
    hosts.note(&format!("{what}: {rate:.2} of {mbit} Mbit/s"));
    assert!((0.4 * mbit..=1.06 * mbit).contains(&rate), "{what}: {text}");
}

/// What goes to an address of the guest passes by this nic alone, and so do its answers.
fn traffic_has_its_own_way(hosts: &Hosts, nic: &Value, mbit: f64, port: u16) {
    let address = address(nic);
    let text = hosts
        .host(1)
        .run(&format!(
            "{SHELL}
             lathe exec demo -- sink {port} >/tmp/sink &
             for attempt in $(seq 100); do
                 /usr/lib/lathe/lathe-guest blast {address} {port} 8 >/dev/null 2>/tmp/blast && break; sleep 0.1
             done &
             until ss -Htn state established dport = :{port} | grep -q .; do sleep 0.1; done; sleep 2
             begin=$(now) before=$(passed lt-demo_1) answers=$(received lt-demo_1) others=$(passed lt-demo) leaks=$(received lt-demo)
             sleep 4
             end=$(now) after=$(passed lt-demo_1)
             rate $before $after $begin $end
             echo answers=$(($(received lt-demo_1) - answers)) others=$(($(passed lt-demo) - others)) leaks=$(($(received lt-demo) - leaks))
             wait"
        ))
        .expect_ok()
        .stdout();
    held(hosts, "to the guest", &text, mbit);
    assert!(value(&text, "answers") > 10_000.0, "the guest answers by another nic: {text}");
    assert!(
        value(&text, "others") < 20_000.0 && value(&text, "leaks") < 20_000.0,
        "by the first nic: {text}"
    );
}

fn a_nic_comes_changes_and_goes(hosts: &Hosts) {
    let host = demo(hosts);
    let boot = boot_id(&host, "demo");
    host.run("lathe nic list demo").expect_ok().expect_out("net0").expect_out("lt-demo");
    host.run("lathe nic add demo --net 10mbit --plan --exit-code")
        .expect_status(11)
        .expect_out("net1 plugged in at once");
    assert!(names(&host, "demo") == ["net0"], "a plan changes nothing");
    let added = host.run("lathe nic add demo --net 10mbit --json").expect_ok();
    hosts.note(&format!("an added nic is configured in the guest after {:.1} s", added.took.as_secs_f32()));
    let nic = added.json();
    assert!(nic["name"] == "net1" && nic["state"] == "attached" && nic["configured"] == true, "{nic}");
    assert!(
        nic["to_guest_bit_per_sec"] == 10_000_000 && nic["from_guest_bit_per_sec"] == 10_000_000,
        "{nic}"
    );
    exec(&host, "demo", "lathe-guest ip")
        .expect_ok()
        .expect_out(&address(&nic))
        .expect_out(nic["mac"].as_str().unwrap_or("?"));
    host.run("lathe show demo").expect_ok().expect_out("nics      net0").expect_out("net1");
    traffic_has_its_own_way(hosts, &nic, 10.0, 5400);
    settled(&host).expect_agreement();

    host.run("lathe nic limit demo net1 +100%").expect_ok().expect_out("20 Mbit/s");
    host.run("lathe resize demo --net 40mbit").expect_ok();
    let rates: Vec<_> =
        nics(&host, "demo").iter().map(|nic| nic["from_guest_bit_per_sec"].as_u64()).collect();
    assert!(rates == [Some(40_000_000), Some(20_000_000)], "each has its own: {rates:?}");
    host.run(KILL).expect_ok();
    host.wait_until("lathed is back", Duration::from_secs(30), "lathe show demo");
    configured(&host, "demo");
    let after = nics(&host, "demo");
    assert!(
        after.len() == 2 && after[1]["mac"] == nic["mac"] && after[1]["bit_per_sec"] == 20_000_000,
        "{after:?}"
    );
    traffic_has_its_own_way(hosts, &nic, 20.0, 5401);

    let removed = host.run("lathe nic remove demo net1").expect_ok().expect_out("removed");
    hosts.note(&format!("a nic is removed after {:.1} s", removed.took.as_secs_f32()));
    let left = exec(&host, "demo", "lathe-guest ip").expect_ok().stdout();
    assert!(!left.contains(&address(&nic)), "{left}");
    host.run("ip -o link show | grep -c -e lt-demo_ -e li-demo_").expect_stdout("0");
    assert!(names(&host, "demo") == ["net0"]);
    assert!(boot_id(&host, "demo") == boot, "the guest has booted anew");
    settled(&host).expect_agreement();
}

fn a_guest_speaks_with_its_own_addresses_only(hosts: &Hosts) {
    let host = demo(hosts);
    answers(&host, "demo");
    let shown = host.run("ip -4 -o address show lathe0 | awk '{print $4; exit}'").expect_ok().stdout();
    let (gateway, bits) = shown.split_once('/').unwrap_or_else(|| panic!("no address of lathe0: {shown}"));
    // The last but one of the prefix: nobody has it.
    let forged = gateway.rsplit_once('.').map(|(network, _)| format!("{network}.254")).unwrap_or_default();
    let refused = || {
        let line =
            "tc -s -j qdisc show dev lt-demo clsact | jq '[.[] | select(.kind == \"clsact\")][0].drops'";
        host.run(line).expect_ok().stdout().parse::<u64>().unwrap_or_else(|_| panic!("tc shows no drops"))
    };
    let ping = |options: &str| exec(&host, "demo", &format!("busybox ping -c 2 -W 10 {options} {gateway}"));
    ping("").expect_ok();
    let before = refused();
    exec(&host, "demo", &format!("busybox ip address add {forged}/{bits} dev eth0")).expect_ok();
    ping(&format!("-I {forged}")).expect_status(1);
    let after = refused();
    hosts.note(&format!("{} frames with a forged address were refused", after - before));
    assert!(after > before, "{before} and {after} refused");
    exec(&host, "demo", &format!("busybox ip address del {forged}/{bits} dev eth0")).expect_ok();
    // What a second nic has is the machine's own on the first as well, as long as it has it.
    let nic = host.run("lathe nic add demo --json").expect_ok().json();
    let address = address(&nic);
    let ping_from_second = || {
        exec(&host, "demo", &format!("busybox ip address add {address}/{bits} dev eth0")).expect_ok();
        let status = ping(&format!("-I {address}")).status;
        exec(&host, "demo", &format!("busybox ip address del {address}/{bits} dev eth0")).expect_ok();
        status
    };
    let counted = refused();
    ping_from_second();
    assert!(refused() == counted, "an address of its own was refused");
    host.run("lathe nic remove demo net1").expect_ok();
    assert!(ping_from_second() == 1 && refused() > counted, "the address of a nic that has gone");
    ping("").expect_ok();
}

/// Nothing but what is configured, whichever of the host's addresses it asks; and from one restart to the next.
fn a_guest_reaches_no_service_of_the_host(hosts: &Hosts) {
    const OPEN: &str = "/etc/lathe/lathe.d/90-open.toml";
    let host = demo(hosts);
    answers(&host, "demo");
    let gateway = "$(ip -4 -o address show lathe0 | awk '{sub(\"/.*\", \"\", $4); print $4; exit}')";
    let reached = |address: &str, port: u16| {
        let line = format!(
            "/usr/lib/lathe/lathe-guest sink {port} >/dev/null & sink=$!
             until ss -Hltn sport = :{port} | grep -q .; do sleep 0.1; done
             lathe exec demo -- blast {address} {port} 0.1; status=$?; kill $sink; wait $sink; exit $status"
        );
        host.run(&line).status == 0
    };
    assert!(reached(gateway, 5330), "what is named is reached");
    assert!(!reached(gateway, 5340), "what is not named is not");
    assert!(!reached("10.77.0.1", 5340), "nor at another address of the host");
    exec(&host, "demo", &format!("ping -c 1 -W 5 {gateway}")).expect_ok();
    host.run(&format!("echo '[network]\nguard_host = false' >{OPEN} && systemctl restart lathed"))
        .expect_ok();
    assert!(reached(gateway, 5340), "without a guard all is reached");
    host.run(&format!("rm {OPEN} && systemctl restart lathed")).expect_ok();
    assert!(!reached(gateway, 5340), "it is guarded again");
    // Who loads a firewall takes the tables of others away first.
    let rules = "nft --stateless --terse list table inet lathe";
    let before = host.run(rules).expect_ok().stdout();
    for change in ["nft flush ruleset", "nft insert rule inet lathe input accept"] {
        host.run(change).expect_ok();
        let back = format!("test \"$({rules} 2>&1)\" = '{before}'");
        host.wait_until("the rules are back", Duration::from_secs(20), &back);
    }
    assert!(!reached(gateway, 5340), "and it is still guarded");
    // What is no service is told before lathed is started anew.
    host.run(&format!("echo '[network]\nhost_services = [\"53\"]' >{OPEN}")).expect_ok();
    host.run("lathed --check").expect_failure().expect_err("\"53\" is no service");
    host.run(&format!("rm {OPEN}")).expect_ok();
}

fn a_machine_without_network_gets_a_nic(hosts: &Hosts) {
    let host = hosts.host(1);
    make(&host, "bare", "--cpu 0.7 --memory 256M --net none");
    host.run("lathe nic list bare").expect_ok().expect_err("lathe nic add bare");
    host.run("lathe resize bare --net 5mbit")
        .expect_status(1)
        .expect_err("error[no-network]")
        .expect_err("fix: lathe nic add bare");
    let nic = host.run("lathe nic add bare --net 10mbit --json").expect_ok().json();
    assert!(nic["configured"] == true, "{nic}");
    assert!(show(&host, "bare")["addresses"] == nic["addresses"], "{}", show(&host, "bare"));
    // Its default route is by this nic: what leaves for the host does so at its rate.
    let text = host
        .run(&format!(
            "{SHELL}
             gateway=$(ip -4 -o address show lathe0 | awk '{{sub(\"/.*\", \"\", $4); print $4; exit}}')
             /usr/lib/lathe/lathe-guest sink 5310 >/tmp/sink & until ss -Hltn sport = :5310 | grep -q .; do sleep 0.1; done
             lathe exec bare -- blast $gateway 5310 8 >/dev/null &
             until ss -Htn state established sport = :5310 | grep -q .; do sleep 0.1; done; sleep 2
             begin=$(now) before=$(passed li-bare_1); sleep 4; end=$(now) after=$(passed li-bare_1)
             rate $before $after $begin $end; wait"
        ))
        .expect_ok()
        .stdout();
    held(hosts, "from the guest", &text, 10.0);
    host.run("lathe resize bare --net 5mbit").expect_status(1).expect_err("fix: lathe nic limit bare net1");
    settled(&host).expect_agreement();
    // Nothing stays of a machine that goes with its nic.
    away(&host, &["bare"]);
    host.run("ip -o link show | grep -c -e lt-bare -e li-bare").expect_stdout("0");
    settled(&host).expect_agreement();
}

fn nics_outlive_lathed_and_power(hosts: &Hosts) {
    let host = demo(hosts);
    host.run("lathe nic add demo --net 10mbit").expect_ok().expect_err("configured");
    host.run("lathe stop demo --timeout 60").expect_ok();
    host.run("ip -o link show | grep -c -e lt-demo -e li-demo").expect_stdout("0");
    host.run("lathe nic add demo --net 5mbit --id net4").expect_ok().expect_out("detached");
    host.run("lathe nic limit demo net4 6mbit").expect_ok();
    host.run(KILL).expect_ok();
    host.wait_until("lathed is back", Duration::from_secs(30), "lathe start demo");
    answers(&host, "demo");
    configured(&host, "demo");
    let there = nics(&host, "demo");
    let rates: Vec<_> = there.iter().map(|nic| nic["to_guest_bit_per_sec"].as_u64()).collect();
    assert!(rates[1..] == [Some(10_000_000), Some(6_000_000)], "{there:?}");
    let seen = exec(&host, "demo", "lathe-guest ip").expect_ok().stdout();
    assert!(there.iter().all(|nic| seen.contains(&address(nic))), "{there:?}\n{seen}");
    // A guest that boots anew is told again.
    let boot = boot_id(&host, "demo");
    exec(&host, "demo", "reboot");
    host.wait_until(
        "the guest has booted anew",
        READY,
        &format!("lathe exec demo -- cat /proc/sys/kernel/random/boot_id | grep -v {boot} | grep -q ."),
    );
    configured(&host, "demo");
    // Ten kills around changes: what was acknowledged is there, and nothing else.
    for round in 0..10 {
        let delay = f64::from(round) * 0.03;
        let adding = host.start("lathe nic add demo --net 3mbit --id net9 --json");
        host.run(&format!("sleep {delay}; {KILL}")).expect_ok();
        let acknowledged = adding.finish().status == 0;
        host.wait_until("lathed is back", Duration::from_secs(30), "lathe show demo");
        configured(&host, "demo");
        let there = names(&host, "demo").contains(&"net9".to_owned());
        assert!(there || !acknowledged, "round {round}: acknowledged and lost");
        settled(&host).expect_agreement();
        if there {
            host.run("lathe nic remove demo net9").expect_ok();
        }
        host.run("ip -o link show | grep -c lt-demo_9").expect_stdout("0");
    }
    // One from its start goes like any other; with the first one goes the default route, which the next one gets.
    host.run("lathe nic remove demo net4 && lathe nic remove demo net0").expect_ok();
    let gateway = "$(ip -4 -o address show lathe0 | awk '{sub(\"/.*\", \"\", $4); print $4; exit}')";
    host.run(&format!("lathe exec demo -- ping -c 1 -W 5 {gateway}")).expect_ok();
    assert!(names(&host, "demo") == ["net1"]);
    settled(&host).expect_agreement();
    away(&host, &["demo"]);
    host.run("ip -o link show | grep -c -e lt-demo -e li-demo").expect_stdout("0");
}

fn what_cannot_be_is_refused(hosts: &Hosts) {
    let host = demo(hosts);
    host.run("lathe nic add demo --net 10mbit").expect_ok();
    let before = show(&host, "demo")["revision"].as_u64();
    for (line, status, code) in [
        ("add demo --id net1", 9, "nic-name-taken"),
        ("add demo --id net0", 2, "bad-name"),
        ("add demo --id eth1", 2, "bad-name"),
        ("add demo --net 10bit", 2, "bad-amount"),
        ("add none", 8, "no-such-machine"),
        ("limit demo net0 5mbit", 9, "nic-rate-elsewhere"),
        ("limit demo net7 5mbit", 8, "no-such-nic"),
        ("limit demo net1 -100%", 2, "bad-amount"),
        ("remove demo net7", 8, "no-such-nic"),
        ("remove demo a/b", 2, "bad-name"),
        ("list none", 8, "no-such-machine"),
    ] {
        host.run(&format!("lathe nic {line}")).expect_status(status).expect_err(&format!("error[{code}]"));
    }
    assert!(show(&host, "demo")["revision"].as_u64() == before, "{}", show(&host, "demo"));
    settled(&host).expect_agreement();
    // Disks and nics have the same slots.
    host.run("lathe disk add demo --size 1M && lathe nic add demo && lathe nic add demo").expect_ok();
    host.run("lathe nic add demo")
        .expect_status(9)
        .expect_err("error[no-nic-slot]")
        .expect_err("fix: lathe nic remove demo NIC");
    host.run("lathe disk add demo --size 1M").expect_status(9).expect_err("error[no-disk-slot]");
    host.run("lathe nic remove demo net3 && lathe disk remove demo data1 --purge").expect_ok();
    host.run("lathe pause demo").expect_ok();
    host.run("lathe nic remove demo net1").expect_status(9).expect_err("error[machine-paused]");
    host.run("lathe nic add demo").expect_ok().expect_err("paused");
    host.run("lathe resume demo").expect_ok();
    configured(&host, "demo");
    settled(&host).expect_agreement();
    away(&host, &["demo"]);
}

fn a_guest_that_does_not_answer(hosts: &Hosts) {
    let host = hosts.host(1);
    make(&host, "deaf", "--memory 128M --net none --cmdline 'console=ttyS0 panic=-1 acpiphp.disable=1'");
    // Its kernel does not see the card, which its agent says.
    host.run("lathe nic add deaf --net 10mbit")
        .expect_ok()
        .expect_out("attached")
        .expect_err("not configured");
    let nic = nics(&host, "deaf").remove(0);
    let reason = nic["reason"].as_str().unwrap_or_default();
    assert!(nic["configured"] == false && reason.contains("no network card"), "{nic}");
    host.run("lathe nic remove deaf net1 --timeout 3")
        .expect_status(9)
        .expect_err("error[nic-not-released]")
        .expect_err("it stays");
    assert!(nics(&host, "deaf")[0]["state"] == "attached");
    settled(&host).expect_agreement();
    // Its power goes before its patience: then it has let go.
    let removing = host.start("lathe nic remove deaf net1 --timeout 600 --json");
    host.wait_until(
        "the nic is to go",
        DEED_LIMIT,
        "lathe nic list deaf --json >/tmp/nics && jq -e '.nics[0].state == \"removing\"' /tmp/nics",
    );
    host.run(KILL).expect_ok();
    host.wait_until("lathed is back", Duration::from_secs(30), "lathe show deaf");
    removing.finish();
    assert!(nics(&host, "deaf")[0]["state"] == "removing");
    host.run("lathe stop deaf --force").expect_ok();
    assert!(nics(&host, "deaf").is_empty());
    host.run("ip -o link show | grep -c -e lt-deaf -e li-deaf").expect_stdout("0");
    away(&host, &["deaf"]);
}
