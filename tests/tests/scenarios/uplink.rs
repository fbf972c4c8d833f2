//! The host's uplink shared between machines, on a link that leads nowhere: classes follow machines, what was at its root comes back, and
//! lathed is killed in between.

use std::time::Duration;

use lathe_tests::scenario::{Group, Host, Hosts};
use serde_json::Value;

use crate::node::{answers, away, boot_id, exec, make_small, settled};

/// On one host.
pub const GROUP: Group = Group {
    name: "uplink",
    hosts: 1,
    lathe: true,
    bench: false,
    scenarios: &[
        ("classes_follow_machines", classes_follow_machines),
        ("more_than_the_uplink_has_is_refused", more_than_the_uplink_has_is_refused),
        ("kills_leave_all_or_nothing", kills_leave_all_or_nothing),
        ("a_shaped_device_is_left_alone", a_shaped_device_is_left_alone),
    ],
};

/// Ends lathed in the middle of whatever it does; systemd starts it again.
pub const KILL: &str = "systemctl kill --signal=KILL --kill-who=main lathed.service";
/// What is at the root of `up0` before anything is shared: no default, and with options.
const QUEUE: &str = "fq_codel limit 777 target 7ms flows 64 noecn";
/// Its queues as tc tells them, without the count of references.
const SHOWN: &str = "tc qdisc show dev up0 | sed 's/ refcnt [0-9]*//'";
/// Where packets to nowhere go.
const NOWHERE: &str = "198.51.100.2";

/// The host with `up0`, a link whose packets vanish, and nothing shared. Answers what is at the root.
pub fn linked<'a>(hosts: &'a Hosts) -> (Host<'a>, String) {
    let host = hosts.host(1);
    host.preparing(|| {
        host.run("lathe host uplink disable; ip link del up0").stdout();
        host.run(&format!(
            "ip link add up0 type dummy && ip address add 198.51.100.1/24 dev up0 && ip link set up0 up && \
             tc qdisc replace dev up0 root handle 5: {QUEUE}"
        ))
        .expect_ok();
    });
    let before = host.run(SHOWN).expect_ok().expect_out("limit 777p").stdout();
    (host, before)
}

fn uplink(host: &Host<'_>) -> Value {
    host.run("lathe host uplink show --json").expect_ok().json()
}

/// A machine's rate on the uplink, bit/s, and what it has sent, bytes.
fn share(host: &Host<'_>, name: &str) -> Option<(u64, u64)> {
    let view = uplink(host);
    let machines = view["machines"].as_array()?;
    let share = &machines.iter().find(|machine| machine["machine"] == name)?["share"];
    Some((share["rate_bit_per_sec"].as_u64()?, share["sent_bytes"].as_u64()?))
}

fn rate(host: &Host<'_>, name: &str) -> Option<u64> {
    share(host, name).map(|(rate, _)| rate)
}

/// How many classes of machines and marks there are, as tc tells.
pub fn classes_and_marks(host: &Host<'_>) -> (String, String) {
    // 1a7e:1 and 1a7e:2 are the whole and the host's.
    let classes = host.run("tc class show dev up0 | grep -c 'htb 1a7e:.. '").stdout();
    let marks = host.run(
        "for tap in $(ls /sys/class/net | grep ^lt-); do tc filter show dev $tap ingress; done | grep -c 'skbedit.*mark'",
    );
    (classes.trim().to_owned(), marks.stdout().trim().to_owned())
}

fn numbers(classes: &str, marks: &str) -> (String, String) {
    (classes.to_owned(), marks.to_owned())
}

fn classes_follow_machines(hosts: &Hosts) {
    let (host, before) = linked(hosts);
    make_small(&host, "demo", "--net 50mbit");
    let boot = boot_id(&host, "demo");
    host.run("lathe host uplink show").expect_ok().expect_out("off").expect_err("lathe host uplink enable");
    host.run("lathe host uplink enable --device up0")
        .expect_status(1)
        .expect_err("error[uplink-capacity-unknown]");
    host.run("lathe host uplink enable --device up0 --capacity 1gbit --plan --exit-code")
        .expect_status(11)
        .expect_out("fq_codel 5:");
    assert!(host.run(SHOWN).stdout() == before, "a plan changes nothing");

    let enabled = host.run("lathe host uplink enable --device up0 --capacity 1gbit --json").expect_ok();
    hosts.note(&format!("sharing begins within {:.0} ms", enabled.took.as_secs_f64() * 1000.0));
    host.run("lathe host").expect_ok().expect_out("uplink").expect_out("1 Gbit/s");
    host.run("tc class show dev up0").expect_ok().expect_out("rate 50Mbit ceil 960Mbit");
    assert!(classes_and_marks(&host) == numbers("1", "1"), "{:?}", classes_and_marks(&host));
    assert!(rate(&host, "demo") == Some(50_000_000), "{}", uplink(&host));

    // What it sends into the world is counted in its class, whatever its address is after the NAT.
    let sent = share(&host, "demo").map_or(0, |(_, sent)| sent);
    exec(&host, "demo", &format!("ping -c 5 -W 1 {NOWHERE}")).stdout();
    let after = share(&host, "demo").map_or(0, |(_, sent)| sent);
    assert!(after >= sent + 5 * 98, "{sent} before five pings, {after} after");

    host.run("lathe resize demo --net 80mbit").expect_ok();
    assert!(rate(&host, "demo") == Some(80_000_000), "{}", uplink(&host));
    host.run("lathe nic add demo --net 20mbit").expect_ok();
    assert!(rate(&host, "demo") == Some(100_000_000), "{}", uplink(&host));
    assert!(classes_and_marks(&host) == numbers("1", "2"), "{:?}", classes_and_marks(&host));
    host.run("lathe nic limit demo net1 30mbit && lathe resize demo --net unlimited").expect_ok();
    assert!(
        rate(&host, "demo") == Some(40_000_000),
        "a hundredth for the one without limit: {}",
        uplink(&host)
    );
    make_small(&host, "other", "--net 5mbit");
    assert!(rate(&host, "other") == Some(5_000_000), "{}", uplink(&host));

    // A restart finds all again, also what was changed and what is too much meanwhile.
    host.run("systemctl stop lathed.socket lathed.service").expect_ok();
    host.run("tc class add dev up0 parent 1a7e:1 classid 1a7e:99 htb rate 1mbit && tc filter del dev lt-other ingress pref 2")
        .expect_ok();
    host.run("systemctl start lathed.socket lathed.service").expect_ok();
    answers(&host, "demo");
    assert!(classes_and_marks(&host) == numbers("2", "3"), "{:?}", classes_and_marks(&host));
    host.run("lathe stop other --timeout 60").expect_ok();
    assert!(classes_and_marks(&host) == numbers("1", "2"), "{:?}", classes_and_marks(&host));
    host.run("lathe start other").expect_ok();
    assert!(rate(&host, "other") == Some(5_000_000), "{}", uplink(&host));

    host.run("lathe host uplink disable").expect_ok().expect_out("off");
    assert!(host.run(SHOWN).stdout() == before, "what was there is back");
    assert!(classes_and_marks(&host) == numbers("0", "0"), "{:?}", classes_and_marks(&host));
    assert!(boot_id(&host, "demo") == boot, "the machine has run all the time");
    settled(&host).expect_agreement();
    away(&host, &["demo", "other"]);
}

fn more_than_the_uplink_has_is_refused(hosts: &Hosts) {
    let (host, before) = linked(hosts);
    make_small(&host, "demo", "--net 50mbit");
    host.run("lathe host uplink enable --device up0 --capacity 50mbit")
        .expect_status(1)
        .expect_err("error[net-over-capacity]");
    assert!(host.run(SHOWN).stdout() == before, "nothing was changed");
    host.run("lathe host uplink enable --device up0 --capacity 100mbit").expect_ok();
    let refused = |line: &str| {
        host.run(line).expect_status(1).expect_err("error[net-over-capacity]").expect_err("fix: ");
    };
    refused("lathe resize demo --net 96mbit");
    refused("lathe resize demo --net 96mbit --plan");
    refused("lathe nic add demo --net 46mbit");
    refused("lathe run second --net 46mbit");
    host.run("lathe show second").expect_status(8);
    assert!(rate(&host, "demo") == Some(50_000_000), "{}", uplink(&host));
    host.run("lathe resize demo --net 95mbit").expect_ok();
    host.run("lathe host uplink enable --capacity 99mbit")
        .expect_status(1)
        .expect_err("error[net-over-capacity]");
    host.run("lathe host uplink enable --capacity 200mbit").expect_ok().expect_out("200 Mbit/s");
    host.run("lathe resize demo --net 150mbit").expect_ok();
    host.run("lathe host uplink disable").expect_ok();
    host.run("lathe resize demo --net 900mbit").expect_ok();
    settled(&host).expect_agreement();
    away(&host, &["demo"]);
}

/// Ends lathed `after` this long of `change`, from the same shell: nothing else takes time in between. Whether the change was acknowledged.
fn killed_after(host: &Host<'_>, change: &str, after: Duration) -> bool {
    let script = format!(
        "pid=$(systemctl show --property=MainPID --value lathed.service); {change} & change=$!; sleep {:.4}; \
         kill -KILL $pid; wait $change",
        after.as_secs_f64()
    );
    let acknowledged = host.run(&script).status == 0;
    host.wait_until("lathed is back", Duration::from_secs(30), "lathe show demo");
    acknowledged
}

/// How long `change` takes when nobody interrupts it, as its own shell sees it.
fn duration(host: &Host<'_>, change: &str) -> Duration {
    let nanoseconds =
        host.run(&format!("begun=$(date +%s%N); {change} >/dev/null && echo $(($(date +%s%N) - begun))"));
    Duration::from_nanos(nanoseconds.expect_ok().stdout().trim().parse().expect("a number of nanoseconds"))
}

/// Kills spread over all that a change takes, and a little beyond.
fn kills_leave_all_or_nothing(hosts: &Hosts) {
    const ROUNDS: u32 = 12;
    let enable = "lathe host uplink enable --device up0 --capacity 1gbit";
    let disable = "lathe host uplink disable";
    let (host, before) = linked(hosts);
    make_small(&host, "demo", "--net 50mbit");
    let boot = boot_id(&host, "demo");
    let (enabling, disabling) = (duration(&host, enable), duration(&host, disable));
    let (mut shared_after, mut interrupted) = (0, 0);
    for round in 0..ROUNDS {
        let part = |whole: Duration| whole * (round + 1) / (ROUNDS - 1);
        let acknowledged = killed_after(&host, enable, part(enabling));
        interrupted += u32::from(!acknowledged);
        let view = uplink(&host);
        let shared = view["enabled"] == true;
        assert!(shared || !acknowledged, "round {round}: acknowledged and lost: {view}");
        if shared {
            shared_after += 1;
            assert!(
                view["problem"] == "" && rate(&host, "demo") == Some(50_000_000),
                "round {round}: {view}"
            );
            assert!(
                classes_and_marks(&host) == numbers("1", "1"),
                "round {round}: {:?}",
                classes_and_marks(&host)
            );
            interrupted += u32::from(!killed_after(&host, disable, part(disabling)));
            host.run(disable).expect_ok();
        }
        let now = host.run(SHOWN).stdout();
        assert!(now == before, "round {round}: before:\n{before}\nnow:\n{now}");
        assert!(
            classes_and_marks(&host) == numbers("0", "0"),
            "round {round}: {:?}",
            classes_and_marks(&host)
        );
    }
    hosts.note(&format!(
        "enabling takes {} ms, disabling {} ms; {interrupted} changes were interrupted, {shared_after} of {ROUNDS} shared after it",
        enabling.as_millis(),
        disabling.as_millis()
    ));
    assert!(interrupted > 0, "no kill came in the middle of a change");
    assert!(boot_id(&host, "demo") == boot, "the machine has run all the time");
    // After a power cut the link is a new one, and it is shared again as soon as it is there.
    host.run("lathe host uplink enable --device up0 --capacity 1gbit").expect_ok();
    host.run("ip link del up0").expect_ok();
    host.wait_until(
        "it is told",
        Duration::from_secs(90),
        "lathe host uplink show | grep 'no network device up0'",
    );
    host.run("ip link add up0 type dummy && ip link set up0 up").expect_ok();
    host.wait_until(
        "it is shared again",
        Duration::from_secs(120),
        "lathe host uplink show --json >/tmp/shown && jq -e '.problem == \"\" and .before == \"default\"' /tmp/shown",
    );
    assert!(rate(&host, "demo") == Some(50_000_000), "{}", uplink(&host));
    host.run("lathe host uplink disable").expect_ok();
    settled(&host).expect_agreement();
    away(&host, &["demo"]);
}

fn a_shaped_device_is_left_alone(hosts: &Hosts) {
    let (host, _) = linked(hosts);
    host.run("tc qdisc replace dev up0 root handle 1: tbf rate 10mbit burst 32k limit 64k").expect_ok();
    let before = host.run(SHOWN).expect_ok().stdout();
    host.run("lathe host uplink enable --device up0 --capacity 1gbit")
        .expect_status(9)
        .expect_err("error[uplink-queue]")
        .expect_err("tbf 1:")
        .expect_err("tc qdisc del dev up0 root");
    for (options, status, code) in [
        ("--device nowhere --capacity 1gbit", 8, "no-such-device"),
        ("--device lathe0 --capacity 1gbit", 2, "bad-name"),
        ("--device up0/x --capacity 1gbit", 2, "bad-name"),
    ] {
        let refused = host.run(&format!("lathe host uplink enable {options}"));
        refused.expect_status(status).expect_err(&format!("error[{code}]"));
    }
    assert!(host.run(SHOWN).stdout() == before, "nothing was changed");
    // Somebody shapes the device after it is shared: that stays, machines run on, and it is said.
    host.run("tc qdisc del dev up0 root && lathe host uplink enable --device up0 --capacity 1gbit")
        .expect_ok();
    host.run("tc qdisc replace dev up0 root handle 1: tbf rate 10mbit burst 32k limit 64k").expect_ok();
    make_small(&host, "demo", "--net 50mbit");
    host.run("lathe host uplink show").expect_ok().expect_out("not in force").expect_out("# demo: ");
    host.run("lathe host uplink disable").expect_ok();
    assert!(host.run(SHOWN).stdout() == before, "it is still somebody's");
    away(&host, &["demo"]);
    host.run("ip link del up0").expect_ok();
}
