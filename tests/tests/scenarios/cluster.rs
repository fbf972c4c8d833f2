//! Hosts that find each other: tokens, membership, what each sees of the other.

use std::time::Duration;

use lathe_tests::scenario::{Group, Host, Hosts};

use crate::node::away;

/// On two hosts.
pub const GROUP: Group = Group {
    name: "cluster",
    hosts: 2,
    lathe: true,
    bench: false,
    scenarios: &[
        ("wrong_tokens_are_refused", wrong_tokens_are_refused),
        ("two_hosts_see_each_others_free_shards", two_hosts_see_each_others_free_shards),
        ("whoever_has_no_key_is_not_heard", whoever_has_no_key_is_not_heard),
        ("membership_outlives_the_agent", membership_outlives_the_agent),
        ("a_dead_peer_is_noticed", a_dead_peer_is_noticed),
    ],
};

/// How long news may take from host to host, in emulated and busy hosts.
const NEWS: Duration = Duration::from_secs(60);

fn token(host: &Host<'_>, options: &str) -> String {
    host.run(&format!("lathe cluster token {options} 2>/dev/null")).expect_ok().stdout()
}

/// Waits until `host` sees one other peer for which the jq condition holds.
fn sees(host: &Host<'_>, what: &str, condition: &str) {
    let line = format!(
        "lathe peers --json >/tmp/peers && jq -e '[.peers[] | select(.state != \"self\") | select({condition})] | length == 1' /tmp/peers >/dev/null || {{ cat /tmp/peers; false; }}"
    );
    host.wait_until(what, NEWS, &line);
}

fn wrong_tokens_are_refused(hosts: &Hosts) {
    let (one, two) = (hosts.host(1), hosts.host(2));
    two.run("lathe cluster token").expect_status(6).expect_err("error[peer-no-cluster]").expect_err("fix:");
    one.run("lathe cluster init testers --address 10.77.0.1:7946").expect_ok().expect_out("testers");
    one.run("lathe cluster init again").expect_status(9).expect_err("error[peer-already-member]");
    two.run("lathe cluster join nonsense").expect_failure().expect_err("error[peer-token-malformed]");
    two.run("lathe cluster join - </dev/null").expect_status(2).expect_err("error[usage]").expect_err("fix:");
    let good = token(&one, "");
    let spoilt: String = good.chars().rev().collect();
    two.run(&format!("lathe cluster join '{spoilt}'")).expect_failure().expect_err("error[peer-token-");
    one.run("lathe cluster token --ttl 1").expect_status(2);
    two.run(
        "lathe peers --json >/tmp/shown && jq -e '.cluster == \"\" and (.peers | length) == 1' /tmp/shown",
    )
    .expect_ok();
    two.run(&format!("printf '%s\\n' '{good}' | lathe cluster join - --address 10.77.0.2:7946"))
        .expect_ok()
        .expect_out("testers");
    two.run(&format!("lathe cluster join '{good}'"))
        .expect_failure()
        .expect_err("error[peer-already-member]");
}

fn two_hosts_see_each_others_free_shards(hosts: &Hosts) {
    let (one, two) = joined(hosts);
    for (host, other) in [(&one, &two), (&two, &one)] {
        let free = other.run("lathe host --json | jq .cpu.free").expect_ok().stdout();
        sees(host, "peers see what is free", &format!(".state == \"alive\" and .cpu.free == {free}"));
        host.run("lathe peers")
            .expect_ok()
            .expect_out("alive")
            .expect_out("self")
            .expect_out(&other.address());
        host.run("lathe host --json >/tmp/shown && jq -e '.peers_alive == 1' /tmp/shown").expect_ok();
    }
    one.run("lathe run web --cpu 0.5 --memory 128M --wait 0").expect_ok();
    let free = one.run("lathe host --json | jq .cpu.free").expect_ok().stdout();
    sees(&two, "what a machine takes is told", &format!(".cpu.free == {free}"));
    away(&one, &["web"]);
    let free = one.run("lathe host --json | jq .cpu.free").expect_ok().stdout();
    sees(&two, "what it gives back is told", &format!(".cpu.free == {free}"));
}

fn whoever_has_no_key_is_not_heard(hosts: &Hosts) {
    let (one, two) = joined(hosts);
    let agent = one.run("systemctl show lathed --property MainPID --value").expect_ok().stdout();
    // A real datagram of the cluster, recorded, then changed and replayed; and plain noise.
    two.run(
        "for i in $(seq 40); do head -c $((i * 30)) /dev/urandom | socat -u - UDP:10.77.0.1:7946; done
         for i in 1 2 3; do head -c 2000 /dev/urandom | timeout 2 socat -u - TCP:10.77.0.1:7946; done
         printf 'GET /v1/peers HTTP/1.1\\r\\n\\r\\n' | timeout 2 socat - TCP:10.77.0.1:7946; true",
    )
    .expect_ok();
    let strange = two.run("curl -sk --max-time 5 https://10.77.0.1:7946/v1/peers");
    assert!(!strange.stdout().contains("\"peers\""), "{}", strange.story());
    one.run("systemctl show lathed --property MainPID --value").expect_stdout(&agent);
    one.run("lathe peers --json >/tmp/shown && jq -e '.peers | length == 2' /tmp/shown").expect_ok();
    sees(&one, "the peer is still alive", ".state == \"alive\"");
    one.run("journalctl -b --no-pager -u lathed | grep -i panicked").expect_status(1);
}

fn membership_outlives_the_agent(hosts: &Hosts) {
    let (one, two) = joined(hosts);
    two.run("systemctl restart lathed").expect_ok();
    sees(&two, "a restarted agent finds its peer", ".state == \"alive\"");
    sees(&one, "and is found", ".state == \"alive\"");
    two.run("systemctl kill --signal=KILL --kill-who=main lathed").expect_ok();
    sees(&two, "a killed agent finds its peer", ".state == \"alive\"");
    two.reboot();
    sees(&two, "a rebooted host finds its peer", ".state == \"alive\"");
    sees(&one, "and is found", ".state == \"alive\"");
}

fn a_dead_peer_is_noticed(hosts: &Hosts) {
    let (one, two) = joined(hosts);
    two.run("systemctl stop lathed.socket lathed.service").expect_ok();
    sees(&one, "an agent that is gone is noticed", ".state == \"dead\" or .state == \"left\"");
    one.run("lathe host --json >/tmp/shown && jq -e '.peers_alive == 0' /tmp/shown").expect_ok();
    two.run("systemctl start lathed.socket lathed.service").expect_ok();
    sees(&one, "its return is noticed", ".state == \"alive\"");
    two.run("systemctl kill --signal=STOP --kill-who=main lathed").expect_ok();
    sees(&one, "silence is noticed", ".state == \"dead\"");
    two.run("systemctl kill --signal=CONT --kill-who=main lathed").expect_ok();
    sees(&one, "its voice is heard again", ".state == \"alive\"");
}

/// Both hosts in one cluster, whatever an earlier scenario has left.
fn joined<'a>(hosts: &'a Hosts) -> (Host<'a>, Host<'a>) {
    let (one, two) = (hosts.host(1), hosts.host(2));
    if one.run("lathe peers --json >/tmp/shown && jq -e '.cluster != \"\"' /tmp/shown").status != 0 {
        one.run("lathe cluster init testers --address 10.77.0.1:7946").expect_ok();
    }
    if two.run("lathe peers --json >/tmp/shown && jq -e '.cluster != \"\"' /tmp/shown").status != 0 {
        let token = token(&one, "");
        two.run(&format!("lathe cluster join {token} --address 10.77.0.2:7946")).expect_ok();
    }
    sees(&one, "host 1 sees host 2", ".state == \"alive\"");
    sees(&two, "host 2 sees host 1", ".state == \"alive\"");
    (one, two)
}
