//! All scenarios and benchmarks. `tests/run scenario NAME…` and `tests/run bench NAME…` choose among them.

mod bandwidth;
mod bench;
mod books;
mod cluster;
mod devices;
mod disks;
mod elastic;
mod enforced;
mod exactness;
mod foresight;
mod harvest;
mod hostile;
mod hotplug;
mod inside;
mod jail;
mod machines;
mod mistakes;
mod monitor;
mod nics;
mod node;
mod placement;
mod promises;
mod repeating;
mod shape;
mod sight;
mod steps;
mod survival;
mod testbed;
mod tiers;
mod uplink;
mod whole_machine;

use std::process::ExitCode;

use lathe_tests::scenario::{Group, run_all};

/// In the order in which they run: what the others stand on first, then what nobody could do without. Groups on the same hosts follow each
/// other.
const GROUPS: &[Group] = &[
    testbed::ALONE,
    testbed::TOGETHER,
    monitor::MONITOR,
    elastic::GROUP,
    hotplug::GROUP,
    devices::GROUP,
    hostile::GROUP,
    cluster::GROUP,
    machines::GROUP,
    survival::GROUP,
    shape::GROUP,
    tiers::GROUP,
    placement::GROUP,
    jail::GROUP,
    mistakes::GROUP,
    disks::GROUP,
    nics::GROUP,
    uplink::GROUP,
    sight::GROUP,
    foresight::GROUP,
    monitor::DEBIAN,
    exactness::GROUP,
    bandwidth::GROUP,
    steps::GROUP,
    sight::NET,
    promises::GROUP,
    repeating::GROUP,
    harvest::GROUP,
    enforced::GROUP,
    whole_machine::GROUP,
    books::GROUP,
    bench::MONITOR,
];

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if words.first().is_some_and(|word| word == "--list") {
        for group in GROUPS {
            group.scenarios.iter().for_each(|(name, _)| println!("{}::{name}: test", group.name));
        }
        return ExitCode::SUCCESS;
    }
    match run_all(GROUPS, &words) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("scenarios: {error:#}");
            ExitCode::FAILURE
        }
    }
}
