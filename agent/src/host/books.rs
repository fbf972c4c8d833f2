//! The books: what the host has, keeps back, and has promised to machines.
//!
//! They are an upper bound of what is held: an amount is entered before it is given, and struck out after it came back.
//! Sums are exact and checked; nothing here knows a machine beyond its name.

use std::collections::BTreeMap;

use lathe_shard::{Bytes, MilliCpu, Shape};

use super::Capacity;
use crate::api::wire::{HostAmounts, HostResources};
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

/// The books of one host.
#[derive(Clone, Debug, Default)]
pub struct Books {
    capacity: Shape,
    reserved: Shape,
    granted: BTreeMap<String, Shape>,
    revision: u64,
}

impl Books {
    /// Empty books of a host with `capacity` that keeps `reserve` back.
    pub fn new(capacity: Capacity, reserve: Reserve) -> Self {
        let shape = |cpu, memory, disk| Shape {
            cpu: MilliCpu(cpu),
            memory: Bytes(memory),
            disk: Bytes(disk),
            ..Shape::default()
        };
        Self {
            capacity: shape(capacity.cpu_milli, capacity.memory_bytes, capacity.disk_bytes),
            reserved: shape(reserve.cpu_milli, reserve.memory_bytes, reserve.disk_bytes),
            granted: BTreeMap::new(),
            revision: 1,
        }
    }

    /// What all machines together hold.
    fn total(&self) -> Shape {
        let sum = |of: fn(&Shape) -> u64| {
            self.granted.values().fold(0_u64, |sum, shape| sum.saturating_add(of(shape)))
        };
        Shape {
            cpu: MilliCpu(sum(|shape| shape.cpu.0)),
            memory: Bytes(sum(|shape| shape.memory.0)),
            disk: Bytes(sum(|shape| shape.disk.0)),
            ..Shape::default()
        }
    }

    /// What `name` holds.
    pub fn held(&self, name: &str) -> Shape {
        self.granted.get(name).copied().unwrap_or_default()
    }

    /// Grows with every change.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// Enters that `name` holds exactly `shape`, if the host has it. A resource of which it takes no more than it held is never refused,
    /// even on a host that has shrunk below its promises.
    ///
    /// # Errors
    /// `cpu-over-capacity`, `memory-over-capacity`, `disk-over-capacity` with the numbers; then nothing changed.
    pub fn set(&mut self, name: &str, shape: Shape) -> Result<(), Problem> {
        self.check(name, shape)?;
        self.enter(name, shape);
        Ok(())
    }

    /// Whether [`Books::set`] would succeed.
    ///
    /// # Errors
    /// As [`Books::set`].
    pub fn check(&self, name: &str, shape: Shape) -> Result<(), Problem> {
        let held = self.held(name);
        let cpu = self.line(|s| s.cpu.0, name);
        if shape.cpu > held.cpu && shape.cpu.0 > cpu.at_most {
            return Err(over_cpu(name, shape.cpu, &cpu));
        }
        let memory = self.line(|s| s.memory.0, name);
        if shape.memory > held.memory && shape.memory.0 > memory.at_most {
            return Err(over_bytes("memory", name, shape.memory, &memory));
        }
        let disk = self.line(|s| s.disk.0, name);
        if shape.disk > held.disk && shape.disk.0 > disk.at_most {
            return Err(over_bytes("disk", name, shape.disk, &disk));
        }
        Ok(())
    }

    /// Enters what `name` is known to hold, asking nothing: for adoption.
    pub fn enter(&mut self, name: &str, shape: Shape) {
        if self.held(name) != shape {
            self.revision += 1;
        }
        if shape == Shape::default() {
            self.granted.remove(name);
        } else {
            self.granted.insert(name.to_owned(), shape);
        }
    }

    fn line(&self, of: fn(&Shape) -> u64, name: &str) -> Line {
        let (capacity, reserved, granted) = (of(&self.capacity), of(&self.reserved), of(&self.total()));
        let own = of(&self.held(name));
        let free = capacity.saturating_sub(reserved).saturating_sub(granted);
        Line { capacity, reserved, granted, own, free, at_most: own.saturating_add(free) }
    }

    /// As it is shown, `used` as given.
    pub fn view(&self, used: Shape) -> HostResources {
        let amounts = |of: fn(&Shape) -> u64| {
            let line = self.line(of, "");
            HostAmounts {
                capacity: line.capacity,
                reserved: line.reserved,
                granted: line.granted,
                used: of(&used),
                free: line.free,
            }
        };
        HostResources {
            cpu: amounts(|s| s.cpu.0),
            memory: amounts(|s| s.memory.0),
            disk: amounts(|s| s.disk.0),
        }
    }
}

/// The numbers of one resource.
struct Line {
    capacity: u64,
    reserved: u64,
    granted: u64,
    own: u64,
    free: u64,
    at_most: u64,
}

fn over_cpu(name: &str, wanted: MilliCpu, line: &Line) -> Problem {
    let cpu = |milli| MilliCpu(milli).to_string();
    let message = format!(
        "{name} cannot have {wanted} cpu: {} in the host, {} granted, {} kept for the host",
        cpu(line.capacity),
        cpu(line.granted),
        cpu(line.reserved)
    );
    let problem = Problem::new(Kind::Impossible, "cpu-over-capacity", message).detail(format!(
        "at most {} now (its {} and {} free)",
        cpu(line.at_most),
        cpu(line.own),
        cpu(line.free)
    ));
    problem.fix(fix("cpu", name, line, MilliCpu(line.at_most).to_string()))
}

fn over_bytes(resource: &'static str, name: &str, wanted: Bytes, line: &Line) -> Problem {
    let message = format!(
        "{name} cannot have {wanted} of {resource}: {} in the host, {} granted, {} kept for the host",
        Bytes(line.capacity),
        Bytes(line.granted),
        Bytes(line.reserved)
    );
    let code = if resource == "disk" { "disk-over-capacity" } else { "memory-over-capacity" };
    Problem::new(Kind::Impossible, code, message)
        .detail(format!(
            "at most {} now (its {} and {} free)",
            Bytes(line.at_most),
            Bytes(line.own),
            Bytes(line.free)
        ))
        .fix(fix(resource, name, line, format!("{}M", line.at_most >> 20)))
}

fn fix(resource: &str, name: &str, line: &Line, at_most: String) -> String {
    match (line.own, resource) {
        (_, "disk") => "lathe list        to see what can be removed with lathe rm --purge".to_owned(),
        (0, _) => format!("lathe run {name} --{resource} {at_most}        or see who has it: lathe list"),
        _ => format!("lathe resize {name} --{resource} {at_most}        or see who has it: lathe list"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn books() -> Books {
        let capacity = Capacity { cpu_milli: 8000, memory_bytes: 8 << 30, disk_bytes: 100 << 30 };
        Books::new(capacity, Reserve { cpu_milli: 500, memory_bytes: 1 << 30, disk_bytes: 1 << 30 })
    }

    fn cpu(milli: u64) -> Shape {
        Shape { cpu: MilliCpu(milli), ..Shape::default() }
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
    fn absurd_amounts_do_not_overflow() {
        let mut books = books();
        books.set("a", cpu(1)).unwrap();
        assert_eq!(books.set("b", cpu(u64::MAX)).unwrap_err().code, "cpu-over-capacity");
        let shape = Shape { memory: Bytes(u64::MAX), ..Shape::default() };
        assert_eq!(books.set("b", shape).unwrap_err().code, "memory-over-capacity");
    }

    #[test]
    fn a_shrunken_host_still_lets_machines_shrink() {
        let mut books = books();
        books.enter("big", cpu(20_000));
        books.set("big", cpu(10_000)).unwrap();
        assert!(books.set("big", cpu(10_001)).is_err());
    }

    proptest! {
        #[test]
        fn promises_never_exceed_the_host(steps in prop::collection::vec((0_u8..6, 0_u64..9000, 0_u64..(9 << 30)), 0..60)) {
            let mut books = books();
            for (machine, milli, bytes) in steps {
                let shape = Shape { cpu: MilliCpu(milli), memory: Bytes(bytes), ..Shape::default() };
                let before = books.held(&machine.to_string());
                let done = books.set(&machine.to_string(), shape);
                prop_assert_eq!(books.held(&machine.to_string()), if done.is_ok() { shape } else { before });
                let view = books.view(Shape::default());
                prop_assert!(view.cpu.granted + view.cpu.reserved <= view.cpu.capacity);
                prop_assert!(view.memory.granted + view.memory.reserved <= view.memory.capacity);
                prop_assert_eq!(view.cpu.free, view.cpu.capacity - view.cpu.reserved - view.cpu.granted);
            }
        }
    }
}
