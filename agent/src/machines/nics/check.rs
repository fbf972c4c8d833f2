//! What a change of a machine's nics leads to, and whether that can be: nothing is made or told here.

use lathe_netshape::IfName;
use lathe_shard::BitRate;

use super::super::config::NetworkConfig;
use super::super::core::{Core, Entry, Taken};
use super::super::disks::{check_settled, release_time};
use super::super::record::{FIRST_NIC, Net, Plug, Record};
use super::super::{spec, view};
use super::NicChange;
use crate::api::wire::{MachineState, NicAddRequest, NicState, NicView, PlanStep, SCHEMA};
use crate::network::allot::{self, Range};
use crate::problem::{Kind, Problem};

/// Highest number of a nic: more names than nics, so that one can be chosen.
const LAST_NUMBER: u32 = 9;

/// The record after a change, and the step that leads there.
pub(super) fn planned(
    core: &Core,
    record: &Record,
    change: &NicChange,
) -> Result<(Record, Option<PlanStep>), Problem> {
    check_settled(record)?;
    let on = record.life.has_monitor();
    let mut after = record.clone();
    let step =
        |resource: &str, from, to, how| Some(PlanStep { resource: resource.to_owned(), from, to, how });
    match change {
        NicChange::Add(request) => {
            let nic = new_nic(core, record, request)?;
            let when = if on { "plugged in at once" } else { "at its next start" };
            let how = format!("{} {when}, {} at its tap {}", nic.name, rate_text(nic.bit_per_sec), nic.tap);
            after.insert_nic(nic);
            Ok((after, step("nic", 0, 1, how)))
        }
        NicChange::Limit { nic, bit_per_sec } => {
            let from = check_limit(record, nic, *bit_per_sec)?.bit_per_sec;
            if from == *bit_per_sec {
                return Ok((after, None));
            }
            if let Some(nic) = after.nic_mut(nic) {
                nic.bit_per_sec = *bit_per_sec;
            }
            let when = if on { "both directions at its tap, at once" } else { "at its next start" };
            Ok((after, step("net", from, *bit_per_sec, format!("{nic}: {when}"))))
        }
        NicChange::Remove { nic, timeout_sec } => {
            check_removal(record, nic)?;
            let seconds = release_time(*timeout_sec)?.as_secs();
            let how = if on {
                format!("{nic}: the guest is asked to let it go within {seconds} s")
            } else {
                format!("{nic} goes with its addresses")
            };
            after.take_nic(nic);
            Ok((after, step("nic", 1, 0, how)))
        }
    }
}

fn rate_text(bit_per_sec: u64) -> String {
    if bit_per_sec == 0 { "no limit".to_owned() } else { format!("{} each way", BitRate(bit_per_sec)) }
}

/// A nic as it is; rate and counters are read back.
pub(super) async fn view_of(core: &Core, entry: &Entry, record: &Record, nic: &Net) -> NicView {
    let (plugged, configured, agent, words) = entry.with(|shared| {
        let has = shared.nics.contains(&nic.name);
        let configured = has && shared.guest_agent && shared.configured.contains(&nic.name);
        (has, configured, shared.guest_agent, shared.not_configured.clone())
    });
    let state = match nic.plug {
        Plug::Adding => NicState::Adding,
        Plug::Removing => NicState::Removing,
        Plug::Here if plugged => NicState::Attached,
        Plug::Here => NicState::Detached,
    };
    let reason = match (state, configured) {
        (NicState::Attached, false) if !agent => "its guest agent does not answer".to_owned(),
        (NicState::Attached, false) => words,
        _ => String::new(),
    };
    let ports = core.ports.as_ref().filter(|_| plugged);
    let (port, bytes) = match ports {
        Some(ports) => (ports.read(&nic.tap).await.ok(), ports.bytes(&nic.tap).await.unwrap_or_default()),
        None => Default::default(),
    };
    NicView {
        schema: SCHEMA,
        machine: record.name.clone(),
        name: nic.name.clone(),
        state,
        mac: view::mac_text(nic.mac),
        addresses: nic.addresses.clone(),
        tap: nic.tap.clone(),
        bit_per_sec: record.rate_of(nic),
        to_guest_bit_per_sec: port.map(|port| port.to_guest.unwrap_or(0)),
        from_guest_bit_per_sec: port.map(|port| port.from_guest.unwrap_or(0)),
        rx_bytes: bytes.to_guest,
        tx_bytes: bytes.from_guest,
        configured,
        reason,
    }
}

/// A nic of this number for a machine: address, MAC and a tap that no other has.
///
/// # Errors
/// `addresses-exhausted`, `bad-prefix`.
pub(in crate::machines) fn allot(
    network: &NetworkConfig,
    host: &str,
    machine: &str,
    number: u32,
    taken: &Taken,
) -> Result<Net, Problem> {
    let prefixes = [Some(network.ipv4), network.ipv6].into_iter().flatten();
    let ranges = prefixes.map(|prefix| Range::new(prefix.addr, prefix.len)).collect::<Result<Vec<_>, _>>()?;
    let index = allot::lowest_free(&ranges, &taken.indices)?;
    let seed = match number {
        0 => format!("{host}/{machine}"),
        _ => format!("{host}/{machine}/{number}"),
    };
    // Names that are hashed may meet; there are fewer taps than numbers.
    let mut names = (0..u32::MAX / 16).map(|round| IfName::nic_of(machine, number + 16 * round).to_string());
    let tap = names.find(|tap| !taken.taps.contains(tap)).unwrap_or_default();
    Ok(Net {
        index,
        mac: lathe_netshape::mac_for(seed.as_bytes()).0,
        tap,
        addresses: ranges.iter().map(|range| range.address(index)).collect(),
        name: format!("net{number}"),
        bit_per_sec: 0,
        plug: Plug::Here,
    })
}

/// What a request for one more nic leads to; nothing is made yet.
pub(super) fn new_nic(core: &Core, record: &Record, request: &NicAddRequest) -> Result<Net, Problem> {
    let machine = &record.name;
    let network = core.config.network.as_ref().ok_or_else(spec::no_host_network)?;
    let bit_per_sec = spec::check_net(request.bit_per_sec.unwrap_or(0))?;
    let number = match &request.name {
        Some(name) => number_of(record, name)?,
        // There are fewer nics than numbers.
        None => (1..=LAST_NUMBER).find(|number| record.nic(&format!("net{number}")).is_none()).unwrap_or(1),
    };
    if record.all_nics().count() >= spec::MAX_NICS {
        let message = format!("{machine} has {} nics, and no machine has more", spec::MAX_NICS);
        return Err(Problem::new(Kind::Impossible, "no-nic-slot", message)
            .fix(format!("lathe nic remove {machine} NIC")));
    }
    let nic = allot(network, &core.config.host_name, machine, number, &core.taken())?;
    Ok(Net { bit_per_sec, plug: Plug::Adding, ..nic })
}

fn number_of(record: &Record, name: &str) -> Result<u32, Problem> {
    let machine = &record.name;
    let number = name.strip_prefix("net").and_then(|number| number.parse().ok());
    let Some(number) = number.filter(|number| *name == format!("net{number}") && *number <= LAST_NUMBER)
    else {
        let message = format!("{:?} cannot be a nic's name", view::printable(name));
        return Err(Problem::new(Kind::BadRequest, "bad-name", message)
            .detail(format!("net1 to net{LAST_NUMBER}"))
            .fix(format!("lathe nic add {machine}        which finds a name")));
    };
    if number == 0 {
        let message = format!("{FIRST_NIC} is the nic that {machine} is made with, and no other");
        return Err(Problem::new(Kind::BadRequest, "bad-name", message)
            .fix(format!("lathe nic add {machine}        which finds a name")));
    }
    if record.nic(name).is_some() {
        let message = format!("{machine} already has a nic {name}");
        return Err(Problem::new(Kind::Conflict, "nic-name-taken", message)
            .fix(format!("lathe nic list {machine}        or leave --id out")));
    }
    Ok(number)
}

/// There is none of this name.
pub(super) fn no_such(record: &Record, name: &str) -> Problem {
    let (machine, shown) = (&record.name, view::printable(name));
    Problem::new(Kind::NotFound, "no-such-nic", format!("{machine} has no nic {shown:?}"))
        .fix(format!("lathe nic list {machine}"))
}

/// The machine's nic of this name, if it neither comes nor goes.
fn check_here<'a>(record: &'a Record, name: &str) -> Result<&'a Net, Problem> {
    let machine = &record.name;
    let nic = record.nic(name).ok_or_else(|| no_such(record, name))?;
    let busy = match nic.plug {
        Plug::Here => return Ok(nic),
        Plug::Adding => "is still being made",
        Plug::Removing => "is being removed",
    };
    Err(Problem::new(Kind::Conflict, "nic-busy", format!("nic {name} of {machine} {busy}"))
        .fix(format!("lathe nic list {machine}")))
}

/// The nic that gets another rate.
pub(super) fn check_limit<'a>(record: &'a Record, name: &str, bit_per_sec: u64) -> Result<&'a Net, Problem> {
    let nic = check_here(record, name)?;
    spec::check_net(bit_per_sec)?;
    if name == FIRST_NIC {
        let machine = &record.name;
        let rate = if bit_per_sec == 0 { "unlimited".to_owned() } else { format!("{bit_per_sec}bit") };
        let message = format!("the rate of {FIRST_NIC} is part of the shape of {machine}");
        return Err(Problem::new(Kind::Conflict, "nic-rate-elsewhere", message)
            .fix(format!("lathe resize {machine} --net {rate}")));
    }
    Ok(nic)
}

/// The nic to be removed.
pub(super) fn check_removal<'a>(record: &'a Record, name: &str) -> Result<&'a Net, Problem> {
    let nic = check_here(record, name)?;
    if record.life.state() == MachineState::Paused {
        let machine = &record.name;
        let message = format!("{machine} is paused: it cannot let its nic {name} go");
        return Err(
            Problem::new(Kind::Conflict, "machine-paused", message).fix(format!("lathe resume {machine}"))
        );
    }
    Ok(nic)
}
