//! OpenMetrics at `/metrics`: prefix `lathe_`, base units (cores, bytes, seconds, bits per second), one unit per metric.

use std::fmt::Write;

use super::wire::{Amounts, DeliveredWindows, HostAmounts, HostView, MachineState, MachineView};
use crate::machines::SculptCounts;
use crate::machines::enforced::{BOUNDS_USEC, Limit, Took};

/// As the OpenMetrics specification 1.0 wants it.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What a metric of a machine is made of.
type Figure = fn(&MachineView) -> f64;
/// A resource of a machine: stem, unit, what it is, divisor to the base unit, and where it stands.
type Resource = (&'static str, &'static str, &'static str, f64, fn(&MachineView) -> Amounts);
/// One of a resource's amounts.
type Part = (&'static str, fn(&Amounts) -> u64);

/// Name, kind, unit and help of each metric that every machine has.
const MACHINE_METRICS: [(&str, &str, &str, &str, Figure); 13] = [
    ("lathe_machine_restarts", "counter", "", "Reboots of the guest and restarts of the monitor.", |m| {
        m.restarts as f64
    }),
    ("lathe_machine_vcpus", "gauge", "", "Virtual CPUs.", |m| f64::from(m.vcpus)),
    ("lathe_machine_cpu_seconds", "counter", "seconds", "CPU time of vCPUs and monitor.", |m| {
        seconds(m.cpu_usage_usec)
    }),
    (
        "lathe_machine_cpu_throttled_seconds",
        "counter",
        "seconds",
        "Time in which the machine's threads were held back by its quota.",
        |m| seconds(m.cpu_throttled_usec),
    ),
    ("lathe_machine_network_receive_bytes", "counter", "bytes", "Towards the guest.", |m| {
        m.net_rx_bytes as f64
    }),
    ("lathe_machine_network_transmit_bytes", "counter", "bytes", "From the guest.", |m| {
        m.net_tx_bytes as f64
    }),
    (
        "lathe_machine_disk_operations",
        "counter",
        "",
        "I/O operations of all disks, as the guest sent them.",
        |m| m.disk_operations as f64,
    ),
    ("lathe_machine_disk_read_bytes", "counter", "bytes", "Read from all disks.", |m| {
        m.disk_read_bytes as f64
    }),
    ("lathe_machine_disk_written_bytes", "counter", "bytes", "Written to all disks.", |m| {
        m.disk_written_bytes as f64
    }),
    ("lathe_machine_uptime_seconds", "gauge", "seconds", "Since it began to run; 0 when it does not.", |m| {
        m.uptime_sec.unwrap_or(0) as f64
    }),
    ("lathe_machine_guest_agent", "gauge", "", "1 when the guest agent answers.", |m| {
        f64::from(u8::from(m.guest_agent))
    }),
    ("lathe_machine_running", "gauge", "", "1 when guest code runs.", |m| {
        f64::from(u8::from(m.state == MachineState::Running))
    }),
    ("lathe_machine_revision", "gauge", "", "Grows with every change of what is desired.", |m| {
        m.revision as f64
    }),
];

/// Resources that every machine has.
const MACHINE_AMOUNTS: [Resource; 4] = [
    ("lathe_machine_cpu", "cores", "CPU", 1000.0, |m| m.cpu),
    ("lathe_machine_memory", "bytes", "Memory", 1.0, |m| m.memory),
    ("lathe_machine_network", "bits_per_second", "Bandwidth each way, 0 is unlimited", 1.0, |m| m.net),
    ("lathe_machine_io", "operations_per_second", "I/O operations, 0 is unlimited", 1.0, |m| m.iops),
];

/// The amounts of each.
const PARTS: [Part; 4] =
    [("desired", |a| a.desired), ("granted", |a| a.granted), ("actual", |a| a.actual), ("used", |a| a.used)];

fn seconds(usec: u64) -> f64 {
    usec as f64 / 1e6
}

/// Everything, as text.
pub fn render(
    host: &HostView,
    machines: &[MachineView],
    enforced: &[(Limit, Took)],
    sculpted: &SculptCounts,
) -> String {
    let mut text = String::new();
    family(&mut text, "lathe_build", "info", "", "Version of lathed.");
    line(&mut text, "lathe_build_info", &format!("version=\"{}\"", escaped(&host.version)), 1.0);
    host_metrics(&mut text, host);
    times_until_enforced(&mut text, enforced);
    sculptor(&mut text, sculpted);
    for (stem, unit, what, divisor, get) in MACHINE_AMOUNTS {
        for (part, pick) in PARTS {
            let name = format!("{stem}_{part}_{unit}");
            family(&mut text, &name, "gauge", unit, &format!("{what}: {part}."));
            for machine in machines {
                line(&mut text, &name, &label(machine), pick(&get(machine)) as f64 / divisor);
            }
        }
    }
    for (name, kind, unit, help, get) in MACHINE_METRICS {
        family(&mut text, name, kind, unit, help);
        let sample = if kind == "counter" { format!("{name}_total") } else { name.to_owned() };
        for machine in machines {
            line(&mut text, &sample, &label(machine), get(machine));
        }
    }
    let name = "lathe_machine_tier";
    family(&mut text, name, "gauge", "", "1 of the tier that was asked for last.");
    for machine in machines {
        line(&mut text, name, &format!("{},tier=\"{}\"", label(machine), machine.tier.word()), 1.0);
    }
    shares_of_machines(&mut text, machines);
    text.push_str("# EOF\n");
    text
}

/// What machines got of what they asked for, where they asked for something, and how much they stood waiting, where that is measured.
fn shares_of_machines(text: &mut String, machines: &[MachineView]) {
    let name = "lathe_machine_delivered_ratio";
    family(text, name, "gauge", "ratio", "Delivered of what was asked for within the grant.");
    for machine in machines {
        let delivered = &machine.delivered;
        let resources: [(&str, &Option<DeliveredWindows>); 3] = [
            ("cpu", &delivered.cpu),
            ("net-to-guest", &delivered.net_to_guest),
            ("net-from-guest", &delivered.net_from_guest),
        ];
        for (resource, windows) in resources {
            let Some(windows) = windows else { continue };
            for (window, share) in [("1s", windows.sec_1), ("10s", windows.sec_10), ("60s", windows.sec_60)] {
                let Some(permille) = share.permille else { continue };
                let labels = format!("{},resource=\"{resource}\",window=\"{window}\"", label(machine));
                line(text, name, &labels, permille as f64 / 1000.0);
            }
        }
    }
    let name = "lathe_machine_stalled_ratio";
    family(text, name, "gauge", "ratio", "Share of the last 10 s in which some thread waited.");
    for machine in machines {
        let stalls = [
            ("cpu", machine.stalls.cpu_centipercent),
            ("memory", machine.stalls.memory_centipercent),
            ("io", machine.stalls.io_centipercent),
        ];
        for (resource, share) in stalls {
            let Some(share) = share else { continue };
            let labels = format!("{},resource=\"{resource}\"", label(machine));
            line(text, name, &labels, f64::from(share) / 10_000.0);
        }
    }
}

/// From decisions to what is in force, as a histogram by resource.
fn times_until_enforced(text: &mut String, enforced: &[(Limit, Took)]) {
    let name = "lathe_enforce_seconds";
    family(text, name, "histogram", "seconds", "From the decision until it is in force and read back.");
    for (limit, took) in enforced {
        let labels = format!("resource=\"{}\"", limit.word());
        let mut count = 0;
        // As OpenMetrics wants them: `0.0001`, `1.0`.
        let bounds = BOUNDS_USEC.iter().map(|usec| format!("{:?}", seconds(*usec)));
        for (within, bound) in took.within.iter().zip(bounds.chain(["+Inf".to_owned()])) {
            count += within;
            line(text, &format!("{name}_bucket"), &format!("{labels},le=\"{bound}\""), count as f64);
        }
        line(text, &format!("{name}_count"), &labels, count as f64);
        line(text, &format!("{name}_sum"), &labels, took.sum.as_secs_f64());
    }
}

/// What was decided about machines' shapes, and what became of it.
fn sculptor(text: &mut String, sculpted: &SculptCounts) {
    let name = "lathe_sculptor_changes";
    family(
        text,
        name,
        "counter",
        "",
        "Decisions about machines' shapes by what became of them; observed: nothing was done.",
    );
    for (resource, outcome, count) in sculpted.all() {
        let labels = format!("resource=\"{}\",outcome=\"{outcome}\"", resource.word());
        line(text, &format!("{name}_total"), &labels, count as f64);
    }
}

fn host_metrics(text: &mut String, host: &HostView) {
    let resources: [(&str, &str, f64, HostAmounts); 3] = [
        ("lathe_host_cpu", "cores", 1000.0, host.resources.cpu),
        ("lathe_host_memory", "bytes", 1.0, host.resources.memory),
        ("lathe_host_disk", "bytes", 1.0, host.resources.disk),
    ];
    // Counted while the uplink is shared.
    let uplink = host.resources.net.map(|net| ("lathe_host_uplink", "bits_per_second", 1.0, net));
    for (stem, unit, divisor, amounts) in resources.into_iter().chain(uplink) {
        let parts = [
            ("capacity", amounts.capacity, "All there is"),
            ("reserved", amounts.reserved, "Kept back for the host"),
            ("granted", amounts.granted, "Booked for machines"),
            ("promised", amounts.promised, "Promised to machines, whatever their tier"),
            ("used", amounts.used, "Consumed now"),
            ("free", amounts.free, "Left to give"),
        ];
        for (part, value, help) in parts {
            single(text, &format!("{stem}_{part}_{unit}"), unit, &format!("{help}."), value as f64 / divisor);
        }
    }
    let pressure = [
        ("cpu", host.psi_cpu_centipercent),
        ("memory", host.psi_memory_centipercent),
        ("io", host.psi_io_centipercent),
    ];
    for (what, value) in pressure {
        let Some(value) = value else { continue };
        let help = format!("Share of the last 10 s in which some task waited for {what}.");
        single(
            text,
            &format!("lathe_host_{what}_stalled_ratio"),
            "ratio",
            &help,
            f64::from(value) / 10_000.0,
        );
    }
    single(text, "lathe_host_machines", "", "Machines, running or not.", host.machines as f64);
    single(text, "lathe_host_peers_alive", "", "Peers that answer.", host.peers_alive as f64);
    single(
        text,
        "lathe_host_healthy",
        "",
        "1 when nothing is wrong.",
        f64::from(u8::from(host.state == "healthy")),
    );
    single(text, "lathe_agent_uptime_seconds", "seconds", "Since lathed started.", host.uptime_sec as f64);
}

fn family(text: &mut String, name: &str, kind: &str, unit: &str, help: &str) {
    let _ = writeln!(text, "# TYPE {name} {kind}");
    if !unit.is_empty() {
        let _ = writeln!(text, "# UNIT {name} {unit}");
    }
    let _ = writeln!(text, "# HELP {name} {help}");
}

fn single(text: &mut String, name: &str, unit: &str, help: &str, value: f64) {
    family(text, name, "gauge", unit, help);
    line(text, name, "", value);
}

fn line(text: &mut String, name: &str, labels: &str, value: f64) {
    let _ = if labels.is_empty() {
        writeln!(text, "{name} {value}")
    } else {
        writeln!(text, "{name}{{{labels}}} {value}")
    };
}

fn label(machine: &MachineView) -> String {
    format!("machine=\"{}\"", escaped(&machine.name))
}

fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::tests::fake::{host, machine};
    use super::*;
    use crate::foresight::Resource;
    use crate::machines::SculptCame as Came;

    #[test]
    fn figures_are_in_base_units_and_well_formed() {
        let mut web = machine("web");
        web.cpu.desired = 1500;
        web.cpu_usage_usec = 2_500_000;
        let mut took = Took { sum: Duration::from_millis(31), ..Took::default() };
        (took.within[4], took.within[7], took.within[13]) = (98, 1, 1);
        let mut sculpted = SculptCounts::default();
        sculpted.add(Resource::Cpu, &Came::Applied);
        let text = render(&host(), &[web], &[(Limit::Iops, took)], &sculpted);
        for expected in [
            "lathe_machine_cpu_desired_cores{machine=\"web\"} 1.5\n",
            "lathe_machine_cpu_seconds_total{machine=\"web\"} 2.5\n",
            "lathe_machine_tier{machine=\"web\",tier=\"standard\"} 1\n",
            "# UNIT lathe_host_memory_free_bytes bytes\n",
            "lathe_host_cpu_capacity_cores 8\n",
            "lathe_build_info{version=\"0.1.0\"} 1\n",
            "# UNIT lathe_machine_delivered_ratio ratio\n",
            "lathe_machine_delivered_ratio{machine=\"web\",resource=\"cpu\",window=\"10s\"} 0.998\n",
            "lathe_machine_stalled_ratio{machine=\"web\",resource=\"memory\"} 0.0012\n",
            "lathe_sculptor_changes_total{resource=\"cpu\",outcome=\"applied\"} 1\n",
            "lathe_sculptor_changes_total{resource=\"memory\",outcome=\"observed\"} 0\n",
            "# TYPE lathe_enforce_seconds histogram\n",
            "lathe_enforce_seconds_bucket{resource=\"iops\",le=\"0.0001\"} 0\n",
            "lathe_enforce_seconds_bucket{resource=\"iops\",le=\"0.005\"} 98\n",
            "lathe_enforce_seconds_bucket{resource=\"iops\",le=\"1.0\"} 99\n",
            "lathe_enforce_seconds_bucket{resource=\"iops\",le=\"+Inf\"} 100\n",
            "lathe_enforce_seconds_count{resource=\"iops\"} 100\n",
            "lathe_enforce_seconds_sum{resource=\"iops\"} 0.031\n",
        ] {
            assert!(text.contains(expected), "{expected} is missing in\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
        assert!(!text.contains("net-from-guest"), "what nobody asked for has no ratio");
        check_families(&text);
    }

    /// Each sample belongs to the family declared last, each family is declared once, and its name ends in its unit.
    fn check_families(text: &str) {
        let mut seen = std::collections::HashSet::new();
        let (mut family, mut kind) = ("", "");
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                (family, kind) = rest.split_once(' ').unwrap();
                assert!(family.starts_with("lathe_") && seen.insert(family), "{family}");
            } else if let Some(rest) = line.strip_prefix("# UNIT ") {
                let (name, unit) = rest.split_once(' ').unwrap();
                assert!(name == family && name.ends_with(&format!("_{unit}")), "{line}");
            } else if !line.starts_with('#') {
                let name = line.split(['{', ' ']).next().unwrap();
                let suffixes: &[&str] = match kind {
                    "counter" => &["_total"],
                    "info" => &["_info"],
                    "histogram" => &["_bucket", "_count", "_sum"],
                    _ => &[""],
                };
                assert!(suffixes.iter().any(|suffix| name == format!("{family}{suffix}")), "{line}");
            }
        }
    }

    #[test]
    fn names_cannot_break_out_of_their_label() {
        assert_eq!(escaped("a\"b\\c\nd"), "a\\\"b\\\\c\\nd");
    }
}
