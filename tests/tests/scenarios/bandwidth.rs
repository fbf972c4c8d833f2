//! What a nic delivers of what was asked, with TCP and UDP, both ways, one and eight flows, and what a ping notices meanwhile:
//! `tests/run bench bandwidth`.
//!
//! The rate is that of frames, as the shaper counts them: on the tap towards the guest, on the ifb from it. Senders want more than they get
//! all the time. A rate of which an unlimited nic does not carry a good deal more is not measurable here: there is nothing to hold back.

use lathe_tests::scenario::{Group, Host, Hosts};

use crate::exactness::value;
use crate::node::{answers, away, make, show};

/// On one host.
pub const GROUP: Group = Group {
    name: "bandwidth",
    hosts: 1,
    lathe: true,
    bench: true,
    scenarios: &[("rates_are_exact_and_pings_short", rates_are_exact_and_pings_short)],
};

/// Asked, Mbit/s.
const RATES: [f64; 4] = [5.0, 20.0, 100.0, 500.0];
/// What an unlimited nic must carry of a rate that is measured.
const ROOM: f64 = 1.3;
/// Off by at most so much, percent.
const TARGET_PERCENT: f64 = 2.0;
/// A ping's p99 grows by at most so much, from this rate on.
const TARGET_PING_MSEC: f64 = 10.0;
const PING_FROM_MBIT: f64 = 20.0;
/// A figure that is off is measured once more: an emulated host loses time that it cannot see.
const ATTEMPTS: usize = 2;
/// How long is measured, seconds, and how long senders send before that and in all.
const MEASURED_SEC: u32 = 5;
const SETTLE_SEC: u32 = 2;
const SENT_SEC: u32 = 10;
/// Where the host's receivers listen: guests reach them there.
const FIRST_PORT: u16 = *lathe_tests::workspace::HOST_PORTS.start();

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    ToGuest,
    FromGuest,
}

/// What is sent.
#[derive(Clone, Copy, Debug)]
struct Load {
    way: Way,
    udp: bool,
    flows: u16,
}

impl Load {
    fn name(self) -> String {
        let way = if self.way == Way::ToGuest { "to the guest" } else { "from the guest" };
        format!("{} {way}, {} flow(s)", if self.udp { "UDP" } else { "TCP" }, self.flows)
    }

    fn all() -> impl Iterator<Item = Self> {
        let ways = [Way::ToGuest, Way::FromGuest].into_iter();
        let kinds = [(false, 1), (false, 8), (true, 1), (true, 8)];
        ways.flat_map(move |way| kinds.map(|(udp, flows)| Self { way, udp, flows }))
    }

    /// A line of shell that receives, on the receiver's side, in the background: one process for each flow.
    fn receive(self) -> String {
        let last = FIRST_PORT + self.flows - 1;
        format!("for port in $(seq {FIRST_PORT} {last}); do $guest sink $port >/dev/null & done")
    }

    /// A line of shell that sends, on the sender's side, and waits for its end.
    fn send(self, to: &str, mbit: f64) -> String {
        let last = FIRST_PORT + self.flows - 1;
        let (udp, rate) = if self.udp {
            // A third more than gets through.
            ("-u", format!(" {:.0}", mbit * 1e6 * ROOM / f64::from(self.flows)))
        } else {
            ("", String::new())
        };
        format!(
            "for port in $(seq {FIRST_PORT} {last}); do
                 (for attempt in 1 2 3 4 5 6 7 8 9 10; do
                      $guest blast {udp} {to} $port {SENT_SEC}{rate} >/dev/null 2>&1 && break; sleep 0.2
                  done) &
             done; wait"
        )
    }
}

/// The machine, where it is reached, and where it reaches its host.
struct Ends<'a> {
    host: Host<'a>,
    guest: String,
    gateway: String,
}

impl Ends<'_> {
    /// Runs `measure`, a line of shell, in the middle of `load`. Answers what it printed.
    fn during(&self, load: Load, mbit: f64, measure: &str) -> String {
        let here = |line: &str| format!("guest=/usr/lib/lathe/lathe-guest; {line}");
        let inside = |line: &str| {
            format!(
                "lathe exec net -- sh -c '{}'",
                format!("guest=lathe-guest; {line}").replace('\'', "'\\''")
            )
        };
        let (receive, send) = match load.way {
            Way::ToGuest => {
                (inside(&format!("{}; wait", load.receive())), here(&load.send(&self.guest, mbit)))
            }
            Way::FromGuest => {
                (here(&format!("{}; wait", load.receive())), inside(&load.send(&self.gateway, mbit)))
            }
        };
        let receive = if load.udp { String::new() } else { format!("({receive}) >/dev/null 2>&1 &") };
        let line = format!(
            "at() {{ tc -s -j qdisc show dev $1 root | jq '.[0].bytes'; }}
             {receive}
             ({send}) >/dev/null 2>&1 & sender=$!
             sleep {SETTLE_SEC}; {measure}
             wait $sender; pkill -f 'lathe-guest [s]ink'; lathe exec net -- busybox pkill -f 'lathe-guest [s]ink'; wait; true"
        );
        self.host.run(&line).expect_ok().stdout()
    }

    /// Mbit/s of frames.
    fn rate(&self, load: Load, mbit: f64) -> f64 {
        let link = if load.way == Way::ToGuest { "lt-net" } else { "li-net" };
        let text = self.during(
            load,
            mbit,
            &format!(
                "before=$(at {link}) begun=$(date +%s%N); sleep {MEASURED_SEC}; after=$(at {link}) ended=$(date +%s%N)
                 echo bytes=$((after - before)) nsec=$((ended - begun))"
            ),
        );
        value(&text, "bytes") * 8e3 / value(&text, "nsec")
    }

    /// Milliseconds that 99 of 100 pings of the guest take at most.
    fn ping(&self, during: Option<(Load, f64)>) -> f64 {
        let line = format!(
            "ping -n -i 0.02 -c 200 -W 2 {} | sed -n 's/.*time=\\([0-9.]*\\) ms/\\1/p' | sort -n | \
             awk '{{ all[NR] = $1 }} END {{ print \"p99=\" all[int(NR * 0.99)] }}'",
            self.guest
        );
        let text = match during {
            Some((load, mbit)) => self.during(load, mbit, &line),
            None => self.host.run(&line).expect_ok().stdout(),
        };
        value(&text, "p99")
    }
}

fn set(host: &Host<'_>, rate: &str) {
    host.run(&format!("lathe resize net --net {rate}")).expect_ok();
}

fn rates_are_exact_and_pings_short(hosts: &Hosts) {
    let host = hosts.host(1);
    make(&host, "net", "--memory 256M --cpu 1.5 --net 1gbit");
    answers(&host, "net");
    let shown = show(&host, "net")["addresses"][0].as_str().unwrap_or_default().to_owned();
    let guest = shown.split('/').next().unwrap_or_default().to_owned();
    let gateway = "ip -4 -o address show lathe0 | awk '{sub(\"/.*\", \"\", $4); print $4; exit}'";
    let ends = Ends { guest, gateway: host.run(gateway).expect_ok().stdout(), host: host.clone() };
    let (mut measured, mut missed) = (0, Vec::new());
    let idle = ends.ping(None);
    hosts.note(&format!("ping, idle: p99 {idle:.2} ms"));
    for load in Load::all() {
        set(&host, "10gbit");
        let carried = ends.rate(load, 1000.0);
        hosts.note(&format!("{}: carried without a limit: {carried:.1} Mbit/s", load.name()));
        for asked in RATES {
            if carried < asked * ROOM {
                hosts.note(&format!("  {asked} Mbit/s: not measurable here"));
                continue;
            }
            set(&host, &format!("{asked}mbit"));
            let mut off = 0.0;
            for attempt in 1..=ATTEMPTS {
                let delivered = ends.rate(load, asked);
                off = 100.0 * (delivered / asked - 1.0);
                hosts.note(&format!(
                    "  {asked} Mbit/s: delivered {delivered:.3} ({off:+.2} %), attempt {attempt}"
                ));
                if off.abs() <= TARGET_PERCENT {
                    break;
                }
            }
            measured += 1;
            if off.abs() > TARGET_PERCENT {
                missed.push(format!("{} at {asked} Mbit/s: {off:+.2} %", load.name()));
            }
            if asked >= PING_FROM_MBIT && load.flows == 1 {
                let loaded = ends.ping(Some((load, asked)));
                let longer = loaded - idle;
                hosts.note(&format!("  {asked} Mbit/s: ping p99 {loaded:.2} ms, {longer:+.2} ms"));
                measured += 1;
                if longer > TARGET_PING_MSEC {
                    missed.push(format!("{} at {asked} Mbit/s: ping p99 {longer:+.2} ms", load.name()));
                }
            }
        }
    }
    hosts.note(&format!(
        "RESULT {} of {measured} figures within ±{TARGET_PERCENT} % of the rate, +{TARGET_PING_MSEC} ms of p99",
        measured - missed.len()
    ));
    away(&host, &["net"]);
    hosts.expecting();
    assert!(measured > 0, "nothing could be measured here");
    assert!(missed.is_empty(), "missed: {}", missed.join("; "));
}
