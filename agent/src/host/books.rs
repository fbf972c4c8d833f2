//! The books: what the host has, keeps back, and has promised to machines.
//!
//! They are an upper bound of what is held: an amount is entered before it is given, and struck out after it came back.
//! Sums are exact and checked; nothing here knows a machine beyond its name.
//!
//! What a promise takes of a resource depends on its tier. With G, S and H for what the machines of each tier were promised, f for the
//! configured overcommit (at least 1), and rounding up:
//!
//! | resource | booked | because |
//! |---|---|---|
//! | CPU | G + S ÷ f | what was lent can be taken back at any moment; harvest is promised none |
//! | memory, disk | (S + H) ÷ f while G = 0, else G + S + H | what somebody has written cannot be taken back when a guarantee needs it |
//! | network | G + S + H, while the uplink is shared | a class of the uplink is sure of its rate, whatever the tier |
//!
//! Whole cores that a machine has to itself are guaranteed CPU, and something that [`placement`] can find a place for, beside all others'.
//!
//! Booked ≤ capacity − reserve after every promise, so G never exceeds that: no sequence of promises breaks a guarantee or touches the reserve.

use std::collections::BTreeMap;

use lathe_cgroup::CpuList;
use lathe_shard::{BitRate, Bytes, MilliCpu, Shape};

use super::Capacity;
use super::placement::{self, Placement, Wish};
use super::topology::Topology;
use crate::api::wire::{HostAmounts, HostResources, Tier};
use crate::problem::{Kind, Problem};

/// What the host keeps for itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reserve {
    /// milliCPU.
    pub cpu_milli: u64,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Bytes of the state directory's file system.
    pub disk_bytes: u64,
}

impl Default for Reserve {
    /// A quarter of a CPU, 512 MiB of memory, 1 GiB of disk.
    fn default() -> Self {
        Self { cpu_milli: 250, memory_bytes: 512 << 20, disk_bytes: 1 << 30 }
    }
}

/// How often the same shard may be promised to machines without a guarantee, in thousandths; at least [`Overcommit::NONE`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overcommit {
    /// Of CPU.
    pub cpu_permille: u64,
    /// Of memory.
    pub memory_permille: u64,
    /// Of disk.
    pub disk_permille: u64,
}

impl Overcommit {
    /// Every shard once.
    pub const NONE: u64 = 1000;
}

impl Default for Overcommit {
    fn default() -> Self {
        Self { cpu_permille: Self::NONE, memory_permille: Self::NONE, disk_permille: Self::NONE }
    }
}

/// What a machine was promised: while it changes, an upper bound of what it had, has and shall have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Grant {
    /// The most of each resource.
    shape: Shape,
    /// The firmest of its tiers: memory that somebody has written is as firm as that.
    tier: Tier,
    /// The most CPU as each tier: what is lent is never both much and firm because it was one and shall be the other.
    cpu: [MilliCpu; 3],
    /// CPUs that it has to itself, in whole cores.
    alone: u64,
}

impl Grant {
    /// This much, this firmly.
    pub fn new(shape: Shape, tier: Tier) -> Self {
        Self { shape, tier, cpu: [MilliCpu(0); 3], alone: 0 }.or(tier, shape.cpu)
    }

    /// Or this much CPU, this firmly; of all else no more than was said.
    pub fn or(mut self, tier: Tier, cpu: MilliCpu) -> Self {
        self.tier = self.tier.max(tier);
        self.shape.cpu = self.shape.cpu.max(cpu);
        let most = &mut self.cpu[place(tier)];
        *most = cpu.max(*most);
        self
    }

    /// And so many CPUs to itself.
    pub fn alone(mut self, cpus: u64) -> Self {
        self.alone = cpus;
        self
    }

    /// CPUs that it has to itself.
    pub fn cpus_alone(&self) -> u64 {
        self.alone
    }

    /// The most of each resource.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// What books the most of a resource, whatever is promised beside it: compared without rounding, which depends on what that is.
    fn heaviest(&self, resource: Resource, permille: u64) -> (Tier, u64) {
        if !resource.lent {
            return (self.tier, (resource.of)(&self.shape));
        }
        let weight = |tier, amount| match tier {
            Tier::Guaranteed => u128::from(amount) * u128::from(permille.max(Overcommit::NONE)),
            Tier::Standard => u128::from(amount) * u128::from(Overcommit::NONE),
            Tier::Harvest => 0,
        };
        TIERS
            .map(|tier| (tier, self.cpu[place(tier)].0))
            .into_iter()
            .filter(|&(_, amount)| amount > 0)
            .max_by_key(|&(tier, amount)| (weight(tier, amount), tier))
            .unwrap_or((self.tier, 0))
    }
}

const TIERS: [Tier; 3] = [Tier::Guaranteed, Tier::Standard, Tier::Harvest];

fn place(tier: Tier) -> usize {
    match tier {
        Tier::Guaranteed => 0,
        Tier::Standard => 1,
        Tier::Harvest => 2,
    }
}

/// The books of one host.
#[derive(Clone, Debug, Default)]
pub struct Books {
    capacity: Shape,
    reserved: Shape,
    overcommit: Overcommit,
    granted: BTreeMap<String, Grant>,
    /// As configured; more is kept back while machines may not use all CPUs.
    reserve_cpu: MilliCpu,
    topology: Topology,
    revision: u64,
}

/// One resource as the books count it.
#[derive(Clone, Copy)]
struct Resource {
    name: &'static str,
    of: fn(&Shape) -> u64,
    /// What was lent comes back at any moment.
    lent: bool,
    overcommit: fn(&Overcommit) -> u64,
    show: fn(u64) -> String,
}

const CPU: Resource = Resource {
    name: "cpu",
    of: |shape| shape.cpu.0,
    lent: true,
    overcommit: |factors| factors.cpu_permille,
    show: |amount| MilliCpu(amount).to_string(),
};
const MEMORY: Resource = Resource {
    name: "memory",
    of: |shape| shape.memory.0,
    lent: false,
    overcommit: |factors| factors.memory_permille,
    show: |amount| Bytes(amount).to_string(),
};
const DISK: Resource = Resource {
    name: "disk",
    of: |shape| shape.disk.0,
    lent: false,
    overcommit: |factors| factors.disk_permille,
    show: |amount| Bytes(amount).to_string(),
};
const NET: Resource = Resource {
    name: "net",
    of: |shape| shape.net.0,
    lent: false,
    overcommit: |_| Overcommit::NONE,
    show: |amount| BitRate(amount).to_string(),
};

/// What all machines of each tier were promised of one resource.
#[derive(Clone, Copy, Debug, Default)]
struct Promised {
    guaranteed: u64,
    standard: u64,
    harvest: u64,
}

impl Promised {
    fn add(&mut self, tier: Tier, amount: u64) {
        let sum = match tier {
            Tier::Guaranteed => &mut self.guaranteed,
            Tier::Standard => &mut self.standard,
            Tier::Harvest => &mut self.harvest,
        };
        *sum = sum.saturating_add(amount);
    }

    fn with(mut self, tier: Tier, amount: u64) -> Self {
        self.add(tier, amount);
        self
    }

    fn all(self) -> u64 {
        self.guaranteed.saturating_add(self.standard).saturating_add(self.harvest)
    }

    /// What that takes of the resource.
    fn booked(self, resource: Resource, permille: u64) -> u64 {
        match (resource.lent, self.guaranteed) {
            (true, guaranteed) => guaranteed.saturating_add(shared(self.standard, permille)),
            (false, 0) => shared(self.standard.saturating_add(self.harvest), permille),
            (false, _) => self.all(),
        }
    }

    /// The most that one more machine of `tier` could be promised beside these, of `usable`.
    fn room(self, resource: Resource, permille: u64, usable: u64, tier: Tier) -> u64 {
        let beside_guarantees = usable.saturating_sub(self.guaranteed);
        let room = match (resource.lent, tier) {
            (true, Tier::Harvest) => usable,
            (true, Tier::Standard) => stretched(beside_guarantees, permille).saturating_sub(self.standard),
            (true, Tier::Guaranteed) => beside_guarantees.saturating_sub(shared(self.standard, permille)),
            (false, Tier::Standard | Tier::Harvest) if self.guaranteed == 0 => {
                stretched(usable, permille).saturating_sub(self.all())
            }
            (false, _) => usable.saturating_sub(self.all()),
        };
        // What is there can be promised to several machines, but none gets more than there is.
        room.min(usable)
    }
}

/// `amount` ÷ f, rounded up.
fn shared(amount: u64, permille: u64) -> u64 {
    let scaled = (u128::from(amount) * u128::from(Overcommit::NONE))
        .div_ceil(u128::from(permille.max(Overcommit::NONE)));
    u64::try_from(scaled).unwrap_or(u64::MAX)
}

/// `amount` × f, rounded down.
fn stretched(amount: u64, permille: u64) -> u64 {
    let scaled =
        u128::from(amount) * u128::from(permille.max(Overcommit::NONE)) / u128::from(Overcommit::NONE);
    u64::try_from(scaled).unwrap_or(u64::MAX)
}

impl Books {
    /// Empty books of a host with `capacity` that keeps `reserve` back.
    pub fn new(capacity: Capacity, reserve: Reserve, overcommit: Overcommit) -> Self {
        let shape = |cpu, memory, disk| Shape {
            cpu: MilliCpu(cpu),
            memory: Bytes(memory),
            disk: Bytes(disk),
            ..Shape::default()
        };
        Self {
            capacity: shape(capacity.cpu_milli, capacity.memory_bytes, capacity.disk_bytes),
            reserved: shape(reserve.cpu_milli, reserve.memory_bytes, reserve.disk_bytes),
            overcommit,
            granted: BTreeMap::new(),
            reserve_cpu: MilliCpu(reserve.cpu_milli),
            topology: Topology::default(),
            revision: 1,
        }
    }

    /// What all machines but `name` were promised.
    fn promised_beside(&self, resource: Resource, name: &str) -> Promised {
        let mut promised = Promised::default();
        let permille = (resource.overcommit)(&self.overcommit);
        for (_, grant) in self.granted.iter().filter(|(machine, _)| *machine != name) {
            let (tier, amount) = grant.heaviest(resource, permille);
            promised.add(tier, amount);
        }
        promised
    }

    /// From now on the network counts: the capacity that machines share, and what of it is kept back, bit/s. `None`: it does not.
    pub fn set_net(&mut self, net: Option<(u64, u64)>) {
        let (capacity, reserved) = net.unwrap_or_default();
        let before = (self.capacity.net, self.reserved.net);
        (self.capacity.net, self.reserved.net) = (BitRate(capacity), BitRate(reserved));
        self.revision += u64::from(before != (self.capacity.net, self.reserved.net));
    }

    /// The host has these CPUs now: capacity is what is online, and what machines may not use of it is the host's. What is promised stays
    /// promised.
    pub fn set_topology(&mut self, topology: Topology) {
        let milli = |cpus: u64| MilliCpu(cpus.saturating_mul(1000));
        let before = (self.capacity.cpu, self.reserved.cpu);
        self.capacity.cpu = milli(topology.online());
        self.reserved.cpu = self.reserve_cpu.max(milli(topology.outside));
        self.topology = topology;
        self.revision += u64::from(before != (self.capacity.cpu, self.reserved.cpu));
    }

    /// The CPUs that machines may use.
    pub fn cpus(&self) -> CpuList {
        self.topology.cpus()
    }

    /// How many CPUs are online.
    pub fn online(&self) -> u64 {
        self.topology.online()
    }

    /// Where machines that have cores to themselves find them; `now` is where they stand.
    pub fn place(&self, now: &BTreeMap<String, CpuList>) -> Placement {
        let wishes = self.wishes(|name| now.get(name).cloned());
        placement::place(&self.topology, self.reserve_cpu.0, &wishes)
    }

    fn wishes(&self, now: impl Fn(&str) -> Option<CpuList>) -> BTreeMap<String, Wish> {
        let alone = self.granted.iter().filter(|(_, grant)| grant.alone > 0);
        alone.map(|(name, grant)| (name.clone(), Wish { cpus: grant.alone, now: now(name) })).collect()
    }

    /// What takes no more cores than before is never refused.
    ///
    /// # Errors
    /// `cores-over-capacity`.
    fn check_cores(&self, name: &str, grant: Grant) -> Result<(), Problem> {
        if grant.alone <= self.held(name).alone {
            return Ok(());
        }
        let mut wishes = self.wishes(|_| None);
        wishes.insert(name.to_owned(), Wish { cpus: grant.alone, now: None });
        if placement::place(&self.topology, self.reserve_cpu.0, &wishes).refused.is_empty() {
            return Ok(());
        }
        wishes.remove(name);
        let most = placement::dedicable_cpus(&self.topology, self.reserve_cpu.0);
        let taken: u64 = wishes.values().map(|wish| wish.cpus).sum();
        let all = self.topology.cpus().0.len() as u64;
        let message = format!(
            "{name} cannot have {} CPUs to itself: {all} in the host for machines, {taken} taken as whole cores, {} kept for all others",
            grant.alone,
            all.saturating_sub(most),
        );
        let thread = self.topology.cores.iter().map(|core| core.cpus.0.len() as u64).max().unwrap_or(1);
        let free = most.saturating_sub(taken);
        let detail = match thread {
            1 => format!("at most {free} now"),
            _ => format!("at most {free} now; a core has {thread} CPUs, which go to one machine or to none"),
        };
        Err(Problem::new(Kind::Impossible, "cores-over-capacity", message)
            .detail(detail)
            .fix("--cores shared        or see who has them: lathe list"))
    }

    /// bit/s that all machines together hold.
    pub fn granted_net(&self) -> u64 {
        self.granted.values().fold(0, |sum, grant| sum.saturating_add(grant.shape.net.0))
    }

    fn counts_net(&self) -> bool {
        self.capacity.net.0 > 0
    }

    /// What `name` holds.
    pub fn held(&self, name: &str) -> Grant {
        self.granted.get(name).copied().unwrap_or_default()
    }

    /// Grows with every change.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// Enters that `name` holds exactly `grant`, if the host has it. What books no more of a resource and guarantees no more of it than before
    /// is never refused, even on a host that has shrunk below its promises.
    ///
    /// # Errors
    /// `cpu-over-capacity`, `memory-over-capacity`, `disk-over-capacity`, `cores-over-capacity`, and `net-over-capacity` while the uplink is shared, with the
    /// numbers; then nothing changed.
    pub fn set(&mut self, name: &str, grant: Grant) -> Result<(), Problem> {
        self.check(name, grant)?;
        self.enter(name, grant);
        Ok(())
    }

    /// Whether [`Books::set`] would succeed.
    ///
    /// # Errors
    /// As [`Books::set`].
    pub fn check(&self, name: &str, grant: Grant) -> Result<(), Problem> {
        let counted = [CPU, MEMORY, DISK].into_iter().chain(self.counts_net().then_some(NET));
        for resource in counted {
            if !self.fits(resource, name, grant) {
                return Err(self.over(resource, name, grant));
            }
        }
        self.check_cores(name, grant)
    }

    fn fits(&self, resource: Resource, name: &str, grant: Grant) -> bool {
        let permille = (resource.overcommit)(&self.overcommit);
        let usable = (resource.of)(&self.capacity).saturating_sub((resource.of)(&self.reserved));
        let held = self.held(name);
        let others = self.promised_beside(resource, name);
        let ((tier_before, own), (tier, amount)) =
            (held.heaviest(resource, permille), grant.heaviest(resource, permille));
        let (before, after) = (others.with(tier_before, own), others.with(tier, amount));
        let booked = after.booked(resource, permille);
        let fits = booked <= usable
            || (booked <= before.booked(resource, permille) && after.guaranteed <= before.guaranteed);
        // However often a shard is promised, no machine gets more than there are.
        let (before, amount) = ((resource.of)(&held.shape), (resource.of)(&grant.shape));
        fits && (amount <= usable || amount <= before)
    }

    /// Enters what `name` is known to hold, asking nothing: for adoption.
    pub fn enter(&mut self, name: &str, grant: Grant) {
        if self.held(name) != grant {
            self.revision += 1;
        }
        if grant.shape == Shape::default() {
            self.granted.remove(name);
        } else {
            self.granted.insert(name.to_owned(), grant);
        }
    }

    fn line(&self, resource: Resource, name: &str, tier: Tier) -> Line {
        let permille = (resource.overcommit)(&self.overcommit);
        let (capacity, reserved) = ((resource.of)(&self.capacity), (resource.of)(&self.reserved));
        let usable = capacity.saturating_sub(reserved);
        let held = self.held(name);
        let (held_tier, own) = held.heaviest(resource, permille);
        let others = self.promised_beside(resource, name);
        let all = others.with(held_tier, own);
        let granted = all.booked(resource, permille);
        let room = others.room(resource, permille, usable, tier);
        Line {
            capacity,
            reserved,
            granted,
            promised: all.all(),
            own,
            free: usable.saturating_sub(granted),
            at_most: if held_tier == tier { room.max(own) } else { room },
            no_overcommit: !resource.lent
                && permille > Overcommit::NONE
                && (others.guaranteed > 0 || tier == Tier::Guaranteed),
        }
    }

    /// As it is shown, `used` as given.
    pub fn view(&self, used: Shape) -> HostResources {
        let amounts = |resource: Resource| {
            let line = self.line(resource, "", Tier::Standard);
            HostAmounts {
                capacity: line.capacity,
                reserved: line.reserved,
                granted: line.granted,
                promised: line.promised,
                used: (resource.of)(&used),
                free: line.free,
            }
        };
        HostResources {
            cpu: amounts(CPU),
            memory: amounts(MEMORY),
            disk: amounts(DISK),
            net: self.counts_net().then(|| amounts(NET)),
        }
    }

    fn over(&self, resource: Resource, name: &str, grant: Grant) -> Problem {
        let (tier, wanted) = grant.heaviest(resource, (resource.overcommit)(&self.overcommit));
        let line = self.line(resource, name, tier);
        let show = resource.show;
        let wanted = show(wanted);
        let (what, place) = match resource.name {
            "cpu" => (format!("{wanted} cpu"), "in the host"),
            "net" => (format!("{wanted} of network"), "on the uplink"),
            other => (format!("{wanted} of {other}"), "in the host"),
        };
        let how = match tier {
            Tier::Standard => "",
            Tier::Guaranteed => " guaranteed",
            Tier::Harvest => " to harvest",
        };
        let message = format!(
            "{name} cannot have {what}{how}: {} {place}, {} granted, {} kept for the host",
            show(line.capacity),
            show(line.granted),
            show(line.reserved)
        );
        let (code, at_most) = match resource.name {
            "cpu" => ("cpu-over-capacity", show(line.at_most)),
            "memory" => ("memory-over-capacity", format!("{}M", line.at_most >> 20)),
            "net" => ("net-over-capacity", format!("{}kbit", line.at_most / 1000)),
            _ => ("disk-over-capacity", String::new()),
        };
        let free = line.at_most.saturating_sub(line.own);
        let mut detail =
            format!("at most {} now (its {} and {} free)", show(line.at_most), show(line.own), show(free));
        if line.no_overcommit {
            detail.push_str(&format!("; beside a guarantee no {} is promised twice", resource.name));
        }
        let known = self.granted.get(name).map(|held| held.tier);
        let verb = if known.is_some() { "resize" } else { "run" };
        // Less of it is of use only in the tier that was asked for.
        let tier = match known.unwrap_or_default() == grant.tier {
            true => String::new(),
            false => format!(" --tier {}", grant.tier.word()),
        };
        let smaller = format!("lathe {verb} {name} --{} {at_most}{tier}", resource.name);
        Problem::new(Kind::Impossible, code, message).detail(detail).fix(fix(resource, &line, &smaller))
    }
}

/// The numbers of one resource.
struct Line {
    capacity: u64,
    reserved: u64,
    granted: u64,
    promised: u64,
    own: u64,
    free: u64,
    at_most: u64,
    /// The configured overcommit is suspended.
    no_overcommit: bool,
}

fn fix(resource: Resource, line: &Line, smaller: &str) -> String {
    match resource.name {
        "disk" => "lathe list        to see what can be removed with lathe rm --purge".to_owned(),
        "net" if line.at_most < 1000 => "lathe host uplink show        to see who has it".to_owned(),
        "cpu" | "memory" if line.at_most == 0 => "lathe list        to see who has it".to_owned(),
        _ => format!("{smaller}        or see who has it: lathe list"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::topology::HostCore;
    use proptest::prelude::*;

    fn books_with(overcommit: Overcommit) -> Books {
        let capacity = Capacity { cpu_milli: 8000, memory_bytes: 8 << 30, disk_bytes: 100 << 30 };
        let reserve = Reserve { cpu_milli: 500, memory_bytes: 1 << 30, disk_bytes: 1 << 30 };
        Books::new(capacity, reserve, overcommit)
    }

    fn books() -> Books {
        books_with(Overcommit::default())
    }

    fn cpu_of(tier: Tier, milli: u64) -> Grant {
        Grant::new(Shape { cpu: MilliCpu(milli), ..Shape::default() }, tier)
    }

    fn cpu(milli: u64) -> Grant {
        cpu_of(Tier::Standard, milli)
    }

    fn memory_of(tier: Tier, bytes: u64) -> Grant {
        Grant::new(Shape { memory: Bytes(bytes), ..Shape::default() }, tier)
    }

    /// Cores of two CPUs each, all but `outside` CPUs.
    fn topology(cores: u32, outside: u64) -> Topology {
        let core = |number: u32| HostCore {
            cpus: [2 * number, 2 * number + 1].into_iter().collect(),
            cache: 0,
            node: 0,
            whole: true,
        };
        Topology { cores: (0..cores).map(core).collect(), outside }
    }

    #[test]
    fn cores_are_whole_promised_once_and_never_the_last() {
        let capacity = Capacity { cpu_milli: 4000, memory_bytes: 1 << 30, disk_bytes: 1 << 30 };
        let reserve = Reserve { cpu_milli: 0, memory_bytes: 0, disk_bytes: 0 };
        let mut books = Books::new(capacity, reserve, Overcommit::default());
        let alone = |cpus: u64| cpu_of(Tier::Guaranteed, cpus * 1000).alone(cpus);
        books.set_topology(topology(2, 0));
        let problem = books.set("web", alone(4)).unwrap_err();
        assert_eq!(problem.code, "cores-over-capacity");
        assert_eq!(
            problem.message,
            "web cannot have 4 CPUs to itself: 4 in the host for machines, 0 taken as whole cores, 2 kept for all others"
        );
        assert_eq!(books.check("web", alone(1)).unwrap_err().code, "cores-over-capacity", "half a core");
        books.set("web", alone(2)).unwrap();
        assert_eq!(books.place(&BTreeMap::new()).places["web"].to_string(), "2-3");
        assert_eq!(books.check("db", alone(2)).unwrap_err().code, "cores-over-capacity");
        books.set("db", cpu(2000)).unwrap();
        books.set("web", alone(2)).unwrap();
        // CPUs that go leave promises that cannot be kept, and no room for more of them.
        let revision = books.revision();
        books.set_topology(topology(1, 1));
        assert!(books.revision() > revision);
        let view = books.view(Shape::default()).cpu;
        assert_eq!((view.capacity, view.reserved, view.free), (3000, 1000, 0));
        assert!(books.place(&BTreeMap::new()).refused.contains("web"));
        books.set("web", alone(2)).unwrap();
        books.enter("web", Grant::default());
        assert_eq!(books.check("web", alone(2)).unwrap_err().code, "cpu-over-capacity");
    }

    #[test]
    fn more_than_the_host_has_is_refused_with_the_numbers() {
        let mut books = books();
        books.set("other", cpu(5500)).unwrap();
        books.set("demo", cpu(500)).unwrap();
        let problem = books.set("demo", cpu(6000)).unwrap_err();
        assert_eq!(problem.code, "cpu-over-capacity");
        assert_eq!(
            problem.message,
            "demo cannot have 6.00 cpu: 8.00 in the host, 6.00 granted, 0.50 kept for the host"
        );
        assert_eq!(problem.detail, "at most 2.00 now (its 0.50 and 1.50 free)");
        assert!(problem.fix.starts_with("lathe resize demo --cpu 2.00"));
        assert_eq!(books.held("demo"), cpu(500), "nothing changed");
        books.set("demo", cpu(2000)).unwrap();
        assert_eq!(books.view(Shape::default()).cpu.free, 0);
    }

    #[test]
    fn what_helps_is_a_command_in_the_tier_that_was_asked_for() {
        let mut books = books();
        books.set("other", cpu(5500)).unwrap();
        let firm = |milli| cpu_of(Tier::Guaranteed, milli);
        let fix_of = |books: &mut Books, name, grant| books.set(name, grant).unwrap_err().fix;
        let fix = fix_of(&mut books, "demo", firm(2001));
        assert!(fix.starts_with("lathe run demo --cpu 2.00 --tier guaranteed  "), "{fix}");
        let fix = fix_of(&mut books, "demo", cpu(2001));
        assert!(fix.starts_with("lathe run demo --cpu 2.00  "), "{fix}");
        books.set("demo", cpu(2000)).unwrap();
        let fix = fix_of(&mut books, "demo", firm(2001));
        assert!(fix.starts_with("lathe resize demo --cpu 2.00 --tier guaranteed  "), "{fix}");
        assert_eq!(fix_of(&mut books, "third", cpu(100)), "lathe list        to see who has it");
        // One without limit on its network is there already.
        books.set_net(Some((1_000_000_000, 0)));
        let shape = Shape { net: BitRate(2_000_000_000), ..cpu(2000).shape };
        let fix = fix_of(&mut books, "demo", Grant { shape, ..cpu(2000) });
        assert!(fix.starts_with("lathe resize demo --net 1000000kbit  "), "{fix}");
    }

    #[test]
    fn the_network_counts_while_the_uplink_is_shared() {
        let mut books = books();
        let net_of =
            |tier, mbit: u64| Grant::new(Shape { net: BitRate(mbit * 1_000_000), ..Shape::default() }, tier);
        let net = |mbit| net_of(Tier::Standard, mbit);
        books.set("demo", net(5000)).unwrap();
        assert_eq!(books.view(Shape::default()).net, None);
        books.set("demo", net(100)).unwrap();
        let before = books.revision();
        books.set_net(Some((1_000_000_000, 50_000_000)));
        assert_eq!((books.revision(), books.granted_net()), (before + 1, 100_000_000));
        books.set("other", net(800)).unwrap();
        let problem = books.set("demo", net(200)).unwrap_err();
        assert_eq!(problem.code, "net-over-capacity");
        assert_eq!(
            problem.message,
            "demo cannot have 200 Mbit/s of network: 1 Gbit/s on the uplink, 900 Mbit/s granted, 50 Mbit/s kept for the host"
        );
        assert_eq!(problem.detail, "at most 150 Mbit/s now (its 100 Mbit/s and 50 Mbit/s free)");
        assert!(problem.fix.starts_with("lathe resize demo --net 150000kbit"), "{}", problem.fix);
        let harvest = Grant { tier: Tier::Harvest, ..net(60) };
        assert_eq!(
            books.set("idle", harvest).unwrap_err().code,
            "net-over-capacity",
            "sure of its rate, too"
        );
        let view = books.view(Shape::default()).net.unwrap();
        assert_eq!((view.granted, view.free), (900_000_000, 50_000_000));
        books.set_net(None);
        books.set("demo", net(2000)).unwrap();
    }

    #[test]
    fn absurd_amounts_do_not_overflow() {
        let absurd = Overcommit { cpu_permille: u64::MAX, memory_permille: u64::MAX, disk_permille: 0 };
        for overcommit in [Overcommit::default(), absurd] {
            for tier in TIERS {
                let mut books = books_with(overcommit);
                books.set("a", cpu_of(tier, 1)).unwrap();
                assert_eq!(books.set("b", cpu_of(tier, u64::MAX)).unwrap_err().code, "cpu-over-capacity");
                let code = books.set("b", memory_of(tier, u64::MAX)).unwrap_err().code;
                assert_eq!(code, "memory-over-capacity");
            }
        }
    }

    #[test]
    fn a_shrunken_host_still_lets_machines_shrink() {
        let mut books = books();
        books.enter("big", cpu(20_000));
        books.set("big", cpu(10_000)).unwrap();
        assert!(books.set("big", cpu(10_001)).is_err());
        assert!(books.set("big", cpu_of(Tier::Guaranteed, 9000)).is_err(), "that would be a new promise");
        books.set("big", cpu_of(Tier::Harvest, 9000)).unwrap();
    }

    #[test]
    fn standard_machines_share_what_guaranteed_ones_leave() {
        let twice = Overcommit { cpu_permille: 2000, ..Overcommit::default() };
        let mut books = books_with(twice);
        books.set("sure", cpu_of(Tier::Guaranteed, 3500)).unwrap();
        books.set("one", cpu(4000)).unwrap();
        let problem = books.set("two", cpu(4001)).unwrap_err();
        assert_eq!(problem.detail, "at most 4.00 now (its 0.00 and 4.00 free)");
        books.set("two", cpu(4000)).unwrap();
        let full = books.view(Shape::default()).cpu;
        assert_eq!((full.granted, full.promised, full.free), (7500, 11_500, 0));
        let problem = books.set("one", cpu_of(Tier::Guaranteed, 4000)).unwrap_err();
        assert!(problem.message.starts_with("one cannot have 4.00 cpu guaranteed: "), "{}", problem.message);
        assert_eq!(problem.detail, "at most 2.00 now (its 4.00 and 0.00 free)");
    }

    #[test]
    fn harvest_books_no_cpu_and_never_more_than_the_host_can_give() {
        let mut books = books();
        books.set("sure", cpu_of(Tier::Guaranteed, 7500)).unwrap();
        books.set("idle", cpu_of(Tier::Harvest, 7500)).unwrap();
        books.set("more", cpu_of(Tier::Harvest, 7500)).unwrap();
        let problem = books.set("idle", cpu_of(Tier::Harvest, 7501)).unwrap_err();
        assert!(
            problem.message.starts_with("idle cannot have 7.501 cpu to harvest: "),
            "{}",
            problem.message
        );
        assert_eq!(books.set("idle", cpu(1)).unwrap_err().code, "cpu-over-capacity", "a promise after all");
        assert_eq!(books.view(Shape::default()).cpu.granted, 7500);
    }

    #[test]
    fn what_was_much_and_shall_be_firm_is_never_both() {
        let mut books = books();
        books.set("sure", cpu_of(Tier::Guaranteed, 7000)).unwrap();
        books.set("idle", cpu_of(Tier::Harvest, 7500)).unwrap();
        let changing = cpu_of(Tier::Harvest, 7500).or(Tier::Standard, MilliCpu(500));
        books.set("idle", changing).unwrap();
        let cpu_now = books.view(Shape::default()).cpu;
        assert_eq!((cpu_now.granted, cpu_now.free), (7500, 0));
        let problem = books.set("idle", changing.or(Tier::Standard, MilliCpu(501))).unwrap_err();
        assert!(problem.message.starts_with("idle cannot have 0.501 cpu: "), "{}", problem.message);
        books.set("idle", cpu(500)).unwrap();
    }

    /// Alone, 501 that are sure book as much as 1001 that are promised twice; beside one more, they book more.
    #[test]
    fn a_machine_that_changes_is_weighed_without_rounding() {
        let mut books = books_with(Overcommit { cpu_permille: 2000, ..Overcommit::default() });
        books.set("other", cpu(1)).unwrap();
        let changing = cpu_of(Tier::Guaranteed, 501).or(Tier::Standard, MilliCpu(1001));
        books.set("changing", changing).unwrap();
        let booked = books.view(Shape::default()).cpu.granted;
        assert_eq!(booked, 502);
        let mut states = [cpu_of(Tier::Guaranteed, 501), cpu(1001)].map(|state| {
            let mut books = books.clone();
            books.set("changing", state).unwrap();
            books.view(Shape::default()).cpu.granted
        });
        states.sort_unstable();
        assert_eq!(states, [501, 502]);
    }

    #[test]
    fn memory_is_promised_twice_only_where_nothing_is_guaranteed() {
        let mut books = books_with(Overcommit { memory_permille: 1500, ..Overcommit::default() });
        books.set("one", memory_of(Tier::Standard, 7 << 30)).unwrap();
        let problem = books.set("sure", memory_of(Tier::Guaranteed, 1 << 30)).unwrap_err();
        assert!(
            problem.detail.ends_with("beside a guarantee no memory is promised twice"),
            "{}",
            problem.detail
        );
        books.set("two", memory_of(Tier::Harvest, 7 << 29)).unwrap();
        assert!(books.set("three", memory_of(Tier::Standard, 1)).is_err());
        books.enter("two", Grant::default());
        books.set("one", memory_of(Tier::Standard, 6 << 30)).unwrap();
        books.set("sure", memory_of(Tier::Guaranteed, 1 << 30)).unwrap();
        assert!(books.set("two", memory_of(Tier::Standard, 1)).is_err());
    }

    #[derive(Clone, Debug)]
    struct Ask {
        machine: u8,
        tier: Tier,
        milli: u64,
        bytes: u64,
        disk: u64,
    }

    fn asks() -> impl Strategy<Value = Vec<Ask>> {
        let ask = (0_u8..6, 0_usize..3, 0_u64..9000, 0_u64..(9 << 30), 0_u64..(110 << 30));
        let ask = ask.prop_map(|(machine, tier, milli, bytes, disk)| {
            let [milli, bytes, disk] =
                [milli, bytes, disk].map(|amount| if amount % 3 == 0 { 0 } else { amount });
            Ask { machine, tier: TIERS[tier], milli, bytes, disk }
        });
        prop::collection::vec(ask, 0..80)
    }

    /// What each tier was promised, counted anew from what the books say of each machine.
    fn counted(books: &Books, of: fn(&Shape) -> u64) -> [u64; 3] {
        let grants: Vec<_> = (0..6_u8).map(|machine| books.held(&machine.to_string())).collect();
        TIERS.map(|tier| grants.iter().filter(|grant| grant.tier == tier).map(|grant| of(&grant.shape)).sum())
    }

    /// Whether `[G, S, H]` is within what may be promised of `usable`, `permille` times: in the words of the table above, not the code's.
    fn is_kept(lent: bool, [g, s, h]: [u64; 3], usable: u64, permille: u64) -> bool {
        let (g, s, h) = (u128::from(g), u128::from(s), u128::from(h));
        let (usable, permille) = (u128::from(usable), u128::from(permille));
        match (lent, g) {
            (true, _) => g <= usable && s * 1000 <= (usable - g) * permille,
            (false, 0) => (s + h) * 1000 <= usable * permille,
            (false, _) => g + s + h <= usable,
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// Small amounts and factors: what rounding does is seen there.
        #[test]
        fn a_machine_that_changes_books_no_less_than_any_of_its_states(
            others in prop::collection::vec((0_usize..3, 0_u64..6), 0..3),
            states in prop::collection::vec((0_usize..3, 0_u64..6), 1..4),
            factor in prop_oneof![Just(1000_u64), Just(2000), Just(3000), 1000_u64..4000],
        ) {
            let booked_with = |grant| {
                let mut books = books_with(Overcommit { cpu_permille: factor, ..Overcommit::default() });
                for (place, (tier, milli)) in others.iter().enumerate() {
                    books.set(&place.to_string(), cpu_of(TIERS[*tier], *milli)).unwrap();
                }
                books.set("changing", grant).unwrap();
                books.view(Shape::default()).cpu.granted
            };
            let all = states.iter().fold(Grant::default(), |all, &(tier, milli)| all.or(TIERS[tier], MilliCpu(milli)));
            let alone = states.iter().map(|&(tier, milli)| booked_with(cpu_of(TIERS[tier], milli)));
            prop_assert_eq!(Some(booked_with(all)), alone.max());
        }
    }

    proptest! {
        #[test]
        fn no_sequence_of_promises_breaks_a_guarantee(
            steps in asks(),
            factors in (1000_u64..4000, 1000_u64..4000, 1000_u64..4000),
        ) {
            let overcommit =
                Overcommit { cpu_permille: factors.0, memory_permille: factors.1, disk_permille: factors.2 };
            let mut books = books_with(overcommit);
            for ask in steps {
                let name = ask.machine.to_string();
                let shape = Shape {
                    cpu: MilliCpu(ask.milli),
                    memory: Bytes(ask.bytes),
                    disk: Bytes(ask.disk),
                    ..Shape::default()
                };
                let wanted = Grant::new(shape, ask.tier);
                let before = books.held(&name);
                let asked = books.set(&name, wanted);
                let after = if asked.is_ok() { wanted } else { before };
                prop_assert_eq!(books.held(&name).shape, after.shape);
                let view = books.view(Shape::default());
                let resources = [
                    (true, CPU.of, view.cpu, factors.0),
                    (false, MEMORY.of, view.memory, factors.1),
                    (false, DISK.of, view.disk, factors.2),
                ];
                for (lent, of, amounts, permille) in resources {
                    let tiers = counted(&books, of);
                    prop_assert!(is_kept(lent, tiers, amounts.capacity - amounts.reserved, permille), "{tiers:?}");
                    prop_assert_eq!(amounts.promised, tiers.iter().sum::<u64>());
                    prop_assert_eq!(amounts.free, amounts.capacity - amounts.reserved - amounts.granted);
                    if permille == 1000 {
                        let harvest = if lent { tiers[2] } else { 0 };
                        prop_assert_eq!(amounts.granted, amounts.promised - harvest);
                    }
                }
            }
        }

        #[test]
        fn the_most_that_a_refusal_names_is_to_be_had_and_no_more(
            steps in asks(),
            tier in 0_usize..3,
            factor in 1000_u64..4000,
        ) {
            let overcommit = Overcommit { cpu_permille: factor, memory_permille: factor, disk_permille: factor };
            let mut books = books_with(overcommit);
            for ask in steps {
                let shape = Shape { cpu: MilliCpu(ask.milli), memory: Bytes(ask.bytes), ..Shape::default() };
                // Some do not fit.
                let _ = books.set(&ask.machine.to_string(), Grant::new(shape, ask.tier));
            }
            let tier = TIERS[tier];
            let most = books.line(CPU, "new", tier).at_most;
            prop_assert!(books.check("new", cpu_of(tier, most)).is_ok());
            prop_assert!(books.check("new", cpu_of(tier, most + 1)).is_err());
            let most = books.line(MEMORY, "new", tier).at_most;
            prop_assert!(most == 0 || books.check("new", memory_of(tier, most)).is_ok());
            prop_assert!(books.check("new", memory_of(tier, most + 1)).is_err());
        }
    }
}
