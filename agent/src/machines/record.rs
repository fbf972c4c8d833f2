//! What is stored of a machine, as one row: the only truth that survives lathed.
//!
//! Its JSON is a format of the store, versioned by the store's schema; fields are only ever added, with a default.

use serde::{Deserialize, Serialize};

use lathe_shard::{BitRate, Bytes, MilliCpu, Shape};

use super::life::Life;
use super::shape::{Ended, Holds, Operation};
use super::spec::MAX_VCPUS;
use crate::api::wire::foresight::ForesightMode;
use crate::api::wire::{Cores, OnTrouble, RestartPolicy, Tier};
use crate::foresight::{self, Mode};
use crate::host::books::Grant;

/// Operations that are over and still remembered.
pub const MAX_ENDED: usize = 16;
/// Name of the nic that a machine is made with.
pub const FIRST_NIC: &str = "net0";

/// Everything known of one machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Unique on the host.
    pub name: String,
    /// Grows by one with every change of what is desired.
    pub revision: u64,
    /// Where it is in its life; a state in between is an intent that must be finished or undone.
    pub life: Life,
    /// What was asked for last.
    pub desired: Desired,
    /// A resize that an earlier release had under way: what it goes to.
    #[serde(default)]
    pub resizing: Option<Desired>,
    /// The operation under way that leads to `desired`.
    #[serde(default)]
    pub operation: Option<Operation>,
    /// The last operations that are over, the newest last; at most [`MAX_ENDED`].
    #[serde(default)]
    pub ended: Vec<Ended>,
    /// Number of the last operation.
    #[serde(default)]
    pub operations: u64,
    /// What was desired before the last operation.
    #[serde(default)]
    pub undo: Option<Desired>,
    /// What it goes back to, and when.
    #[serde(default)]
    pub back: Option<Back>,
    /// What the books hold for it while it runs; `None`: what it was started with.
    #[serde(default)]
    pub holds: Option<Holds>,
    /// Most milliCPU that it may ever have; otherwise what the host has.
    #[serde(default)]
    pub cpu_max_milli: Option<u64>,
    /// Most bytes of memory that it may ever have; otherwise what the host has.
    #[serde(default)]
    pub memory_max_bytes: Option<u64>,
    /// Least milliCPU that lathed leaves it of its own accord; otherwise what any machine must have.
    #[serde(default)]
    pub cpu_min_milli: Option<u64>,
    /// The same of memory, bytes.
    #[serde(default)]
    pub memory_min_bytes: Option<u64>,
    /// What it has of its own about what is done of its future.
    #[serde(default)]
    pub foresight: Foresight,
    /// When somebody resized it last, milliseconds since the epoch; 0: never, or an earlier release.
    #[serde(default)]
    pub asked_unix_msec: u64,
    /// What its present monitor was started with; `None` while it is off.
    #[serde(default)]
    pub booted: Option<Booted>,
    /// What it boots.
    pub source: Source,
    /// The nic that it was made with, [`FIRST_NIC`]; its rate is [`Desired::net_bit_per_sec`].
    pub net: Option<Net>,
    /// Its other nics, in order; each has its own rate.
    #[serde(default)]
    pub nics: Vec<Net>,
    /// vsock context id, unique on the host.
    pub cid: u32,
    /// What to do when it ends by itself.
    pub restart: RestartPolicy,
    /// What it does when its kernel panics.
    #[serde(default)]
    pub on_panic: OnTrouble,
    /// What it does when its watchdog expires; `None`: it has none.
    #[serde(default)]
    pub watchdog: Option<OnTrouble>,
    /// Starts with the host.
    pub autostart: bool,
    /// vCPUs that were asked for; otherwise as few as carry its CPU.
    pub vcpus_asked: Option<u32>,
    /// Whether it has cores to itself, as many CPUs as it is promised.
    #[serde(default)]
    pub cores: Cores,
    /// How often its monitor was restarted by policy.
    #[serde(default)]
    pub restarts: u64,
}

/// What is done about a machine's future; what is absent is as the host is configured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Foresight {
    /// What is done.
    #[serde(default)]
    pub mode: Option<ForesightMode>,
    /// How close to what it asks for, 0..=1000.
    #[serde(default)]
    pub aggressiveness_permille: Option<u16>,
}

impl Foresight {
    /// What counts on this host: a host that is off has the last word.
    pub fn on(self, host: foresight::Settings) -> foresight::Settings {
        let own = self.mode.map_or(host.mode, Mode::from);
        foresight::Settings {
            mode: if host.mode == Mode::Off { Mode::Off } else { own },
            aggressiveness_permille: self.aggressiveness_permille.unwrap_or(host.aggressiveness_permille),
        }
    }
}

/// A shape that somebody asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Desired {
    /// milliCPU.
    pub cpu_milli: u64,
    /// Bytes.
    pub memory_bytes: u64,
    /// bit/s each way, 0 is unlimited.
    pub net_bit_per_sec: u64,
    /// I/O operations per second, 0 is unlimited.
    pub iops: u64,
    /// What happens to it when shards are short.
    #[serde(default)]
    pub tier: Tier,
}

/// The end of a change that was asked for a time: what was desired before of what it changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Back {
    /// Milliseconds since the epoch.
    pub at_unix_msec: u64,
    /// milliCPU.
    pub cpu_milli: Option<u64>,
    /// Bytes.
    pub memory_bytes: Option<u64>,
    /// bit/s.
    pub net_bit_per_sec: Option<u64>,
    /// I/O operations per second.
    #[serde(default)]
    pub iops: Option<u64>,
    /// How firmly it is promised.
    #[serde(default)]
    pub tier: Option<Tier>,
}

/// What a monitor was started with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Booted {
    /// vCPUs.
    pub vcpus: u32,
    /// Bytes.
    pub memory_bytes: u64,
    /// Id of the host's boot.
    pub host_boot_id: String,
    /// Seconds since the epoch.
    pub at_unix_sec: u64,
}

/// What a machine boots.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// Its kernel.
    pub kernel: Kernel,
    /// Its initial RAM disk.
    pub initrd: Initrd,
    /// Its disks, in order.
    pub disks: Vec<Drive>,
    /// Kernel command line, if one was given.
    pub cmdline: Option<String>,
    /// For people.
    pub text: String,
}

/// A kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kernel {
    /// The one that the host runs.
    Host,
    /// `kernel` in the machine's folder, once this upload.
    Own {
        /// Upload id.
        upload: String,
    },
}

/// An initial RAM disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Initrd {
    /// None.
    None,
    /// The built-in guest.
    BuiltIn,
    /// The one that belongs to the host's kernel.
    Host,
    /// `initrd` in the machine's folder, once this upload.
    Own {
        /// Upload id.
        upload: String,
    },
}

/// A disk of a machine, under its name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drive {
    /// What it is.
    #[serde(flatten)]
    pub disk: Disk,
    /// Unique in the machine, also its serial in the guest; empty in records of an earlier release, see [`Record::name_drives`].
    #[serde(default)]
    pub name: String,
    /// Refuse writes, whatever [`Disk::Path`] says.
    #[serde(default)]
    pub read_only: bool,
    /// Whether it comes or goes.
    #[serde(default)]
    pub link: Link,
}

/// Whether a disk comes or goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Link {
    /// It belongs to the machine.
    #[default]
    Here,
    /// It is being made; nobody was promised it yet.
    Adding,
    /// It goes as soon as the guest lets it.
    Removing {
        /// With its data.
        purge: bool,
    },
}

/// A disk's content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Disk {
    /// A file in the machine's folder, once empty.
    Empty {
        /// Bytes as the guest sees it.
        size_bytes: u64,
    },
    /// A file in the machine's folder, once a copy of an image.
    Image {
        /// The image.
        image: String,
        /// Bytes as the guest sees it.
        size_bytes: u64,
    },
    /// A file in the machine's folder, once an upload.
    Upload {
        /// Upload id.
        upload: String,
        /// Bytes as the guest sees it.
        size_bytes: u64,
    },
    /// Used in place.
    Path {
        /// Canonical.
        path: String,
        /// Refuse writes.
        read_only: bool,
    },
}

impl Disk {
    /// Bytes of a private disk: as the guest sees it, and as it occupies in the state directory at most. `None`: used in place.
    pub fn private_bytes(&self) -> Option<u64> {
        match self {
            Self::Empty { size_bytes } | Self::Image { size_bytes, .. } | Self::Upload { size_bytes, .. } => {
                Some(*size_bytes)
            }
            Self::Path { .. } => None,
        }
    }

    /// Makes a private disk this large.
    pub fn set_private_bytes(&mut self, bytes: u64) {
        match self {
            Self::Empty { size_bytes } | Self::Image { size_bytes, .. } | Self::Upload { size_bytes, .. } => {
                *size_bytes = bytes;
            }
            Self::Path { .. } => {}
        }
    }
}

/// Name of disk `index` of those that a machine is made with.
fn numbered(index: usize) -> String {
    format!("lathe-{index}")
}

impl Drive {
    /// Disk `index` of those that a machine is made with.
    pub fn first(index: usize, disk: Disk) -> Self {
        Self { disk, name: numbered(index), read_only: false, link: Link::Here }
    }

    /// Whether the guest cannot write to it.
    pub fn is_read_only(&self) -> bool {
        self.read_only || matches!(self.disk, Disk::Path { read_only: true, .. })
    }

    /// Name of its file in the machine's folder, if it is private.
    pub fn file_name(&self) -> String {
        match self.name.strip_prefix("lathe-").and_then(|number| number.parse::<u32>().ok()) {
            Some(number) => format!("disk{number}.raw"),
            None => format!("disk-{}.raw", self.name),
        }
    }
}

/// A network card.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Net {
    /// Its number in the prefixes, from which all addresses follow.
    pub index: u64,
    /// Its address on the link.
    pub mac: [u8; 6],
    /// Name of the tap.
    pub tap: String,
    /// `10.77.0.5/16`.
    pub addresses: Vec<String>,
    /// Unique in the machine: `net` and a number.
    #[serde(default = "first_nic")]
    pub name: String,
    /// bit/s each way, 0 is unlimited; not of [`FIRST_NIC`].
    #[serde(default)]
    pub bit_per_sec: u64,
    /// Whether it comes or goes.
    #[serde(default)]
    pub plug: Plug,
}

/// Whether a nic comes or goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Plug {
    /// It belongs to the machine.
    #[default]
    Here,
    /// It is being made; nobody was promised it yet.
    Adding,
    /// It goes as soon as the guest lets it.
    Removing,
}

fn first_nic() -> String {
    FIRST_NIC.to_owned()
}

impl Record {
    /// Addresses of all its nics, with their prefixes' lengths.
    pub fn all_addresses(&self) -> Vec<String> {
        self.all_nics().flat_map(|nic| nic.addresses.iter().cloned()).collect()
    }

    /// What the books must hold for it: an upper bound of what it has.
    pub fn held(&self) -> Shape {
        let booked = self.source.disks.iter().filter_map(|drive| drive.disk.private_bytes());
        let disk = Bytes(booked.fold(0_u64, u64::saturating_add));
        if !self.life.holds_shards() {
            return Shape { disk, ..Shape::default() };
        }
        let resizing = self.resizing.unwrap_or(self.desired);
        let booted = self.booted.as_ref().map_or(0, |booted| booted.memory_bytes);
        let holds = self.holds.unwrap_or(Holds { cpu_milli: 0, memory_bytes: booted });
        // What may lead back must find its way back free.
        let before = match &self.operation {
            Some(operation) if operation.deadline.is_some() => operation.before,
            _ => self.desired,
        };
        let most = |of: fn(&Desired) -> u64| of(&self.desired).max(of(&resizing)).max(of(&before));
        Shape {
            cpu: MilliCpu(most(|shape| shape.cpu_milli).max(holds.cpu_milli)),
            memory: Bytes(most(|shape| shape.memory_bytes).max(holds.memory_bytes)),
            net: self.limited_net(most(|shape| shape.net_bit_per_sec)),
            disk,
            ..Shape::default()
        }
    }

    /// [`Record::held`], and how firmly: every state that it is in, goes to or may be led back to.
    pub fn booking(&self) -> Grant {
        let held = self.held();
        let before = self.operation.as_ref().filter(|operation| operation.deadline.is_some());
        let states = [Some(self.desired), self.resizing, before.map(|operation| operation.before)];
        let states = || states.into_iter().flatten();
        let firmest = states().map(|state| state.tier).max().unwrap_or_default();
        let foreseen = states().map(|state| MilliCpu(state.cpu_milli)).max().unwrap_or_default();
        let nothing = Shape { cpu: MilliCpu(0), ..held };
        let grant = states().fold(Grant::new(nothing, firmest), |grant, state| {
            grant.or(state.tier, MilliCpu(state.cpu_milli).min(held.cpu))
        });
        // More in force than any of these: nobody knows as what.
        let grant = if held.cpu > foreseen { grant.or(firmest, held.cpu) } else { grant };
        match self.cores {
            Cores::Dedicated => grant.alone(held.cpu.0.div_ceil(1000)),
            Cores::Shared => grant,
        }
    }

    /// Gives the disks of an earlier release their names.
    pub fn name_drives(&mut self) {
        for (index, drive) in self.source.disks.iter_mut().enumerate() {
            if drive.name.is_empty() {
                drive.name = numbered(index);
            }
        }
    }

    /// Its disk of this name.
    pub fn drive(&self, name: &str) -> Option<&Drive> {
        self.source.disks.iter().find(|drive| drive.name == name)
    }

    /// The same, to change it.
    pub fn drive_mut(&mut self, name: &str) -> Option<&mut Drive> {
        self.source.disks.iter_mut().find(|drive| drive.name == name)
    }

    /// Whether it boots from its disk of this name: the first, unless it is the built-in guest.
    pub fn boots_from(&self, name: &str) -> bool {
        self.source.initrd != Initrd::BuiltIn
            && name == numbered(0)
            && self.source.disks.first().is_some_and(|drive| drive.name == name)
    }

    /// Puts one more disk behind the others, or before them if it is what the machine boots from.
    pub fn insert_drive(&mut self, drive: Drive) {
        let index = if drive.name == numbered(0) { 0 } else { self.source.disks.len() };
        self.source.disks.insert(index, drive);
    }

    /// All its nics, in order.
    pub fn all_nics(&self) -> impl Iterator<Item = &Net> {
        self.net.iter().chain(&self.nics)
    }

    /// Its nic of this name.
    pub fn nic(&self, name: &str) -> Option<&Net> {
        self.all_nics().find(|nic| nic.name == name)
    }

    /// The same, to change it.
    pub fn nic_mut(&mut self, name: &str) -> Option<&mut Net> {
        self.net.iter_mut().chain(&mut self.nics).find(|nic| nic.name == name)
    }

    /// Puts one more nic among the others, in the order of their names.
    pub fn insert_nic(&mut self, nic: Net) {
        let index = self.nics.partition_point(|other| other.name < nic.name);
        self.nics.insert(index, nic);
    }

    /// Takes a nic out.
    pub fn take_nic(&mut self, name: &str) {
        self.net = self.net.take().filter(|nic| nic.name != name);
        self.nics.retain(|nic| nic.name != name);
    }

    /// bit/s each way of a nic, 0 is unlimited.
    pub fn rate_of(&self, nic: &Net) -> u64 {
        if nic.name == FIRST_NIC { self.desired.net_bit_per_sec } else { nic.bit_per_sec }
    }

    /// The rates of its nics together, `first` being that of [`FIRST_NIC`]; those without limit are promised nothing.
    fn limited_net(&self, first: u64) -> BitRate {
        let rate = |nic: &Net| if nic.name == FIRST_NIC { first } else { nic.bit_per_sec };
        BitRate(self.all_nics().map(rate).fold(0, u64::saturating_add))
    }

    /// vCPUs for its next start.
    pub fn vcpus(&self) -> u32 {
        let needed = vcpus_for(self.desired.cpu_milli).min(MAX_VCPUS);
        self.vcpus_asked.unwrap_or(needed).max(needed)
    }

    /// vCPUs that it may have while it runs, on a host that has `host_milli` to give.
    pub fn vcpus_max(&self, host_milli: u64) -> u32 {
        vcpus_for(self.cpu_max_milli.unwrap_or(host_milli)).min(MAX_VCPUS).max(self.vcpus())
    }

    /// Remembers an operation that is over.
    pub fn remember(&mut self, ended: Ended) {
        self.ended.push(ended);
        let surplus = self.ended.len().saturating_sub(MAX_ENDED);
        self.ended.drain(..surplus);
    }
}

/// As few vCPUs as carry `cpu_milli`.
pub fn vcpus_for(cpu_milli: u64) -> u32 {
    u32::try_from(cpu_milli.div_ceil(1000)).unwrap_or(u32::MAX).max(1)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::api::wire::foresight::AskedBy;
    use crate::machines::shape::AtDeadline;

    pub(crate) fn record(name: &str) -> Record {
        let desired = Desired {
            cpu_milli: 500,
            memory_bytes: 512 << 20,
            net_bit_per_sec: 0,
            iops: 0,
            tier: Tier::Standard,
        };
        Record {
            name: name.to_owned(),
            revision: 1,
            life: Life::Running,
            desired,
            resizing: None,
            operation: None,
            ended: Vec::new(),
            operations: 0,
            undo: None,
            back: None,
            holds: None,
            cpu_max_milli: None,
            memory_max_bytes: None,
            cpu_min_milli: None,
            memory_min_bytes: None,
            foresight: Foresight::default(),
            asked_unix_msec: 0,
            booted: None,
            source: Source {
                kernel: Kernel::Host,
                initrd: Initrd::BuiltIn,
                disks: vec![Drive::first(0, Disk::Image { image: "debian".to_owned(), size_bytes: 1 << 30 })],
                cmdline: None,
                text: "built-in guest".to_owned(),
            },
            net: None,
            nics: Vec::new(),
            cid: 3,
            restart: RestartPolicy::No,
            on_panic: OnTrouble::Report,
            watchdog: None,
            autostart: false,
            vcpus_asked: None,
            cores: Cores::Shared,
            restarts: 0,
        }
    }

    #[test]
    fn cores_are_booked_while_a_machine_holds_shards_and_as_many_as_it_may_have() {
        let mut machine = record("demo");
        assert_eq!(machine.booking().cpus_alone(), 0);
        machine.cores = Cores::Dedicated;
        machine.desired = Desired { cpu_milli: 1000, tier: Tier::Guaranteed, ..machine.desired };
        machine.resizing = Some(Desired { cpu_milli: 2000, ..machine.desired });
        assert_eq!(machine.booking().cpus_alone(), 2);
        machine.life = Life::Stopped { reason: String::new() };
        assert_eq!(machine.booking().cpus_alone(), 0);
        let text = serde_json::to_string(&machine).unwrap().replace("\"cores\":\"dedicated\",", "");
        assert_eq!(
            serde_json::from_str::<Record>(&text).unwrap().cores,
            Cores::Shared,
            "of an earlier release"
        );
    }

    #[test]
    fn a_record_of_an_earlier_release_is_of_the_standard_tier() {
        let machine = record("demo");
        let text = serde_json::to_string(&machine).unwrap().replace(",\"tier\":\"standard\"", "");
        assert!(!text.contains("tier"), "{text}");
        assert_eq!(serde_json::from_str::<Record>(&text).unwrap(), machine);
    }

    #[test]
    fn the_books_hold_the_firmer_tier_while_an_operation_may_lead_back() {
        let mut machine = record("demo");
        let before = Desired { tier: Tier::Guaranteed, ..machine.desired };
        let operation = |deadline| Operation {
            number: 1,
            target: machine.desired,
            before,
            base_revision: 1,
            by: AskedBy::default(),
            began: 0,
            deadline,
            at_deadline: AtDeadline::Revert,
        };
        let (foreground, background) = (operation(Some(1000)), operation(None));
        machine.desired.tier = Tier::Harvest;
        assert_eq!(machine.booking(), Grant::new(machine.held(), Tier::Harvest));
        machine.operation = Some(foreground);
        let either = Grant::new(machine.held(), Tier::Guaranteed).or(Tier::Harvest, machine.held().cpu);
        assert_eq!(machine.booking(), either);
        machine.operation = Some(background);
        assert_eq!(machine.booking(), Grant::new(machine.held(), Tier::Harvest));
    }

    #[test]
    fn the_books_hold_the_larger_of_before_and_after() {
        let mut machine = record("demo");
        machine.resizing = Some(Desired { cpu_milli: 2000, memory_bytes: 256 << 20, ..machine.desired });
        assert_eq!(machine.held().cpu, MilliCpu(2000));
        assert_eq!(machine.held().memory, Bytes(512 << 20));
        machine.life = Life::Stopped { reason: String::new() };
        assert_eq!(machine.held().cpu, MilliCpu(0));
        assert_eq!(machine.held().disk, Bytes(1 << 30), "its disk stays");
    }

    #[test]
    fn a_machine_has_its_own_say_unless_its_host_is_off() {
        let host = |mode| foresight::Settings { mode, aggressiveness_permille: 300 };
        let own = |mode| Foresight { mode, aggressiveness_permille: None };
        let mode = |of: Option<ForesightMode>, on| own(of).on(host(on)).mode;
        assert_eq!(mode(None, Mode::On), Mode::On);
        assert_eq!(mode(Some(ForesightMode::Observe), Mode::On), Mode::Observe);
        assert_eq!(mode(Some(ForesightMode::On), Mode::Observe), Mode::On);
        assert_eq!(mode(Some(ForesightMode::On), Mode::Off), Mode::Off);
        let eager = Foresight { aggressiveness_permille: Some(0), ..own(None) };
        assert_eq!(eager.on(host(Mode::On)).aggressiveness_permille, 0);
        assert_eq!(own(None).on(host(Mode::On)).aggressiveness_permille, 300);
    }

    #[test]
    fn a_record_reads_back() {
        let machine = record("demo");
        let text = serde_json::to_string(&machine).unwrap();
        assert_eq!(serde_json::from_str::<Record>(&text).unwrap(), machine);
    }

    #[test]
    fn a_nic_of_an_earlier_release_is_the_first_and_keeps_its_rate() {
        let mut machine = record("demo");
        machine.desired.net_bit_per_sec = 5_000;
        let mut json = serde_json::to_value(&machine).unwrap();
        json["net"] =
            serde_json::json!({"index": 2, "mac": [2, 0, 0, 0, 0, 1], "tap": "lt-demo", "addresses": []});
        json.as_object_mut().unwrap().remove("nics");
        machine = serde_json::from_value(json).unwrap();
        let first = machine.nic(FIRST_NIC).cloned().unwrap();
        assert_eq!((first.plug, machine.rate_of(&first)), (Plug::Here, 5_000));
        for (name, bit_per_sec) in [("net2", 7_000), ("net1", 0)] {
            machine.insert_nic(Net { name: name.to_owned(), bit_per_sec, ..first.clone() });
        }
        let names: Vec<_> = machine.all_nics().map(|nic| (nic.name.as_str(), machine.rate_of(nic))).collect();
        assert_eq!(names, [("net0", 5_000), ("net1", 0), ("net2", 7_000)]);
        machine.take_nic("net0");
        machine.take_nic("net2");
        assert!(machine.net.is_none() && machine.nics.len() == 1);
    }

    #[test]
    fn disks_of_an_earlier_release_get_the_names_that_their_guests_know() {
        let mut machine = record("demo");
        let mut json = serde_json::to_value(&machine).unwrap();
        json["source"]["disks"] = serde_json::json!([
            {"image": {"image": "debian", "size_bytes": 1024}},
            {"path": {"path": "/dev/sdb", "read_only": true}},
        ]);
        machine = serde_json::from_value(json).unwrap();
        machine.name_drives();
        let drives: Vec<_> =
            machine.source.disks.iter().map(|drive| (drive.name.as_str(), drive.file_name())).collect();
        assert_eq!(drives, [("lathe-0", "disk0.raw".to_owned()), ("lathe-1", "disk1.raw".to_owned())]);
        assert!(machine.source.disks[1].is_read_only());
        assert_eq!(machine.held().disk, Bytes(1024));
        let link = Link::Removing { purge: true };
        machine.insert_drive(Drive {
            link,
            ..Drive { name: "data1".to_owned(), ..machine.source.disks[0].clone() }
        });
        let text = serde_json::to_string(&machine).unwrap();
        assert_eq!(serde_json::from_str::<Record>(&text).unwrap(), machine);
    }

    #[test]
    fn as_few_vcpus_as_carry_the_cpu() {
        assert_eq!([1, 250, 1000, 1001, 4000].map(vcpus_for), [1, 1, 1, 2, 4]);
    }
}
