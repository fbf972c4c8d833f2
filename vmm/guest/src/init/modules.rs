//! Kernel modules of the built-in guest: those that its devices need at boot, others when the kernel asks.
//!
//! `/lib/modules/order` was written with the image; a line is `FILE WHEN NEEDS`, dependencies first, WHEN being
//! `always`, `demand`, `virtio:TYPE`, `late-virtio:TYPE` or `late`, NEEDS `-` or module names in loading order, comma-separated. `aliases` maps
//! what the kernel asks for (`fs-ext4`) to modules. The kernel runs /sbin/modprobe for that, which is this program.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::path::Path;

use crate::sys;

/// Where modules are packed.
pub const FOLDER: &str = "/lib/modules";
const VIRTIO_DEVICES: &str = "/sys/bus/virtio/devices";

/// When a module is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum When {
    Always,
    Demand,
    Virtio(u32),
    LateVirtio(u32),
    Late,
}

/// Which modules to load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// What the way to the first request needs.
    Boot,
    /// All that the present devices need.
    Later,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Module {
    name: String,
    when: When,
    needs: Vec<String>,
}

/// What loading brought.
#[derive(Debug, Default)]
pub struct Loaded {
    /// Modules loaded now.
    pub count: usize,
    /// What did not work, in words.
    pub problems: Vec<String>,
}

fn parse(order: &str) -> Vec<Module> {
    order.lines().filter_map(parse_line).collect()
}

fn parse_line(line: &str) -> Option<Module> {
    let mut words = line.split_whitespace();
    let name = words.next()?.strip_suffix(".ko")?.to_owned();
    let when = match words.next()? {
        "always" => When::Always,
        "demand" => When::Demand,
        "late" => When::Late,
        other => match other.split_once(':')? {
            ("virtio", device) => When::Virtio(device.parse().ok()?),
            ("late-virtio", device) => When::LateVirtio(device.parse().ok()?),
            _ => return None,
        },
    };
    let needs = words.next()?;
    let needs = if needs == "-" { Vec::new() } else { needs.split(',').map(str::to_owned).collect() };
    Some(Module { name, when, needs })
}

/// Loads what is for always, then what the virtio devices need that have appeared by it. What is loaded already stays.
pub fn load_for_devices(folder: &Path, stage: Stage) -> Loaded {
    let mut loaded = Loaded::default();
    let order = match fs::read_to_string(folder.join("order")) {
        Ok(order) => parse(&order),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return loaded,
        Err(error) => {
            loaded.problems.push(format!("cannot read the list of modules: {error}"));
            return loaded;
        }
    };
    let mut done = BTreeSet::new();
    for module in order.iter().filter(|module| module.when == When::Always) {
        load(folder, module, &mut done, &mut loaded);
    }
    let present = virtio_devices(Path::new(VIRTIO_DEVICES));
    for module in &order {
        let wanted = match module.when {
            When::Virtio(device) => present.contains(&device),
            When::LateVirtio(device) => stage == Stage::Later && present.contains(&device),
            When::Late => stage == Stage::Later,
            When::Always | When::Demand => false,
        };
        if wanted {
            load(folder, module, &mut done, &mut loaded);
        }
    }
    loaded
}

/// Types of the virtio devices that the bus has.
fn virtio_devices(folder: &Path) -> BTreeSet<u32> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let device = |entry: fs::DirEntry| {
        let text = fs::read_to_string(entry.path().join("device")).ok()?;
        u32::from_str_radix(text.trim().trim_start_matches("0x"), 16).ok()
    };
    entries.filter_map(device).collect()
}

fn load(folder: &Path, module: &Module, done: &mut BTreeSet<String>, loaded: &mut Loaded) {
    for name in module.needs.iter().chain([&module.name]) {
        if !done.insert(name.clone()) {
            continue;
        }
        let path = folder.join(format!("{name}.ko"));
        match File::open(&path).and_then(|file| sys::finit_module(&file, c"")) {
            Ok(()) => loaded.count += 1,
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {}
            Err(error) => loaded.problems.push(format!("cannot load module {name}: {error}")),
        }
    }
}

/// What the kernel's `/sbin/modprobe -q -- NAME` does: loads a packed module by name or alias.
///
/// # Errors
/// `NotFound` when nothing of that name is packed; what the kernel says otherwise.
pub fn load_by_name(folder: &Path, asked: &str) -> io::Result<()> {
    let order = parse(&fs::read_to_string(folder.join("order"))?);
    let aliases = fs::read_to_string(folder.join("aliases")).unwrap_or_default();
    let names = resolve(&order, &aliases, asked);
    if names.is_empty() {
        return Err(io::Error::new(io::ErrorKind::NotFound, format!("no module {asked} is packed")));
    }
    let mut loaded = Loaded::default();
    let mut done = BTreeSet::new();
    for module in names {
        load(folder, module, &mut done, &mut loaded);
    }
    match loaded.problems.into_iter().next() {
        None => Ok(()),
        Some(problem) => Err(io::Error::other(problem)),
    }
}

/// Modules of that name, or that the alias stands for.
fn resolve<'a>(order: &'a [Module], aliases: &str, asked: &str) -> Vec<&'a Module> {
    let plain = asked.replace('-', "_");
    let aliased: Vec<&str> = aliases
        .lines()
        .filter_map(|line| line.split_once(' '))
        .filter(|(alias, _)| *alias == asked)
        .map(|(_, name)| name)
        .collect();
    order.iter().filter(|module| module.name == plain || aliased.contains(&module.name.as_str())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ORDER: &str = "virtio.ko demand -\nvirtio_pci.ko always virtio,virtio_ring\nvirtio_net.ko virtio:1 failover,net_failover\nvirtio_mem.ko late-virtio:24 -\nbroken\nx.ko sometimes -\n";

    #[test]
    fn the_order_is_read_and_broken_lines_are_not() {
        let modules = parse(ORDER);
        assert_eq!(modules.len(), 4);
        assert_eq!(modules[1].needs, ["virtio", "virtio_ring"]);
        assert_eq!(modules[2].when, When::Virtio(1));
        assert_eq!(modules[3].when, When::LateVirtio(24));
    }

    #[test]
    fn names_and_aliases_lead_to_modules() {
        let modules = parse(ORDER);
        let names = |asked| -> Vec<&str> {
            resolve(&modules, "net-pf-7 virtio_net\n", asked)
                .iter()
                .map(|module| module.name.as_str())
                .collect()
        };
        assert_eq!(names("virtio-pci"), ["virtio_pci"]);
        assert_eq!(names("net-pf-7"), ["virtio_net"]);
        assert!(names("net-pf").is_empty());
    }

    #[test]
    fn devices_are_told_by_type() {
        let folder = tempfile::tempdir().unwrap();
        for (name, device) in [("virtio0", "0x0001\n"), ("virtio1", "0x0013\n"), ("virtio2", "odd\n")] {
            fs::create_dir(folder.path().join(name)).unwrap();
            fs::write(folder.path().join(name).join("device"), device).unwrap();
        }
        assert_eq!(virtio_devices(folder.path()), BTreeSet::from([1, 19]));
    }

    #[test]
    fn a_guest_without_packed_modules_has_no_problem() {
        let folder = tempfile::tempdir().unwrap();
        let loaded = load_for_devices(folder.path(), Stage::Later);
        assert!(loaded.count == 0 && loaded.problems.is_empty());
        fs::write(folder.path().join("order"), "gone.ko always -\n").unwrap();
        let loaded = load_for_devices(folder.path(), Stage::Boot);
        assert!(loaded.problems[0].contains("gone"), "{:?}", loaded.problems);
    }
}
