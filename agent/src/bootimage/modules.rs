//! Which kernel modules the built-in guest needs, and in which order they load.
//!
//! Reads what depmod(8) left in `/lib/modules/RELEASE`: `modules.dep`, `modules.builtin`, `modules.alias`. Decides
//! nothing about the running host: the modules are for a guest that boots the same kernel.
//!
//! `order`, the list that is packed for the guest's init, has one line per module, dependencies first:
//! `FILE WHEN NEEDS`. WHEN is `always`, `demand` (on the kernel's request only), `virtio:N` (when a virtio device
//! of that type is there), `late-virtio:N` (the same, but boot does not wait for it) or `late`; NEEDS is `-` or the names of the modules to load before, comma-separated, in order.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::BootImageError;

/// When the guest loads a module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum When {
    /// At boot.
    Always,
    /// When the kernel asks by name or alias.
    Demand,
    /// When there is a virtio device of this type (virtio 1.2, section 5).
    Virtio(u32),
    /// The same, once the guest agent has been reached: boot does not wait for it.
    LateVirtio(u32),
    /// Once the guest agent has been reached.
    Late,
}

impl std::fmt::Display for When {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Always => formatter.write_str("always"),
            Self::Demand => formatter.write_str("demand"),
            Self::Virtio(device) => write!(formatter, "virtio:{device}"),
            Self::LateVirtio(device) => write!(formatter, "late-virtio:{device}"),
            Self::Late => formatter.write_str("late"),
        }
    }
}

struct Wanted {
    name: &'static str,
    when: When,
    required: bool,
}

const fn wanted(name: &'static str, when: When, required: bool) -> Wanted {
    Wanted { name, when, required }
}

/// What the built-in guest loads. Without the required ones a machine has no disk, network or exec.
const WANTED: &[Wanted] = &[
    wanted("virtio_pci", When::Always, true),
    wanted("button", When::Always, false),
    wanted("virtio_net", When::Virtio(1), true),
    wanted("virtio_blk", When::Virtio(2), true),
    wanted("virtio_console", When::Virtio(3), false),
    wanted("virtio_rng", When::Virtio(4), false),
    wanted("virtio_balloon", When::LateVirtio(5), false),
    wanted("vmw_vsock_virtio_transport", When::Virtio(19), true),
    wanted("virtio_mem", When::LateVirtio(24), false),
    wanted("pvpanic_mmio", When::Late, false),
    wanted("i6300esb", When::Demand, false),
    wanted("ext4", When::Demand, false),
    // ext4 asks for "crypto-crc32c" by alias only, which modules.dep does not show.
    wanted("crc32c_generic", When::Demand, false),
];

/// A module to pack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Module {
    /// With underscores, as /proc/modules has it.
    pub name: String,
    /// On the host.
    pub path: PathBuf,
    /// When the guest loads it.
    pub when: When,
    /// All modules that must be loaded before, in order.
    pub needs: Vec<String>,
}

/// The modules to pack, dependencies first, and the names of optional ones that this kernel lacks.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Resolved {
    pub modules: Vec<Module>,
    pub aliases: Vec<(String, String)>,
    pub missing: Vec<String>,
}

/// What depmod says about one kernel.
pub(super) struct Index {
    folder: PathBuf,
    /// Name → (path relative to the folder, names of dependencies).
    files: HashMap<String, (String, Vec<String>)>,
    builtin: BTreeSet<String>,
    aliases: Vec<(String, String)>,
}

/// Module name of a file: its stem with `_` for `-`.
fn name_of(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

impl Index {
    /// Reads the index of kernel `release` below `root`.
    pub fn read(root: &Path, release: &str) -> Result<Self, BootImageError> {
        if release.is_empty() || release.contains('/') || release.starts_with('.') {
            return Err(BootImageError::Release(release.into()));
        }
        let folder = root.join(release);
        let dependencies = folder.join("modules.dep");
        let text = fs::read_to_string(&dependencies).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => {
                BootImageError::NoModules { folder: folder.clone(), release: release.into() }
            }
            _ => BootImageError::Read { path: dependencies.clone(), source },
        })?;
        let builtin = read_optional(&folder.join("modules.builtin"))?;
        let aliases = read_optional(&folder.join("modules.alias"))?;
        Ok(Self {
            files: parse_dependencies(&text),
            builtin: builtin.lines().map(name_of).collect(),
            aliases: parse_aliases(&aliases),
            folder,
        })
    }

    /// The built-in guest's modules, and `extra` ones, which load at boot and must exist.
    pub fn resolve(&self, extra: &[String]) -> Result<Resolved, BootImageError> {
        let mut resolved = Resolved::default();
        let mut seen = BTreeMap::new();
        let standard = WANTED.iter().map(|wanted| (wanted.name.to_owned(), wanted.when, wanted.required));
        let extra = extra.iter().map(|name| (name_of(name), When::Always, true));
        for (name, when, required) in standard.chain(extra) {
            if self.builtin.contains(&name) {
                continue;
            }
            if !self.files.contains_key(&name) {
                if required {
                    return Err(BootImageError::NoModule { name, folder: self.folder.clone() });
                }
                resolved.missing.push(name);
                continue;
            }
            self.visit(&name, &mut seen, &mut resolved.modules)?;
            if let Some(module) = resolved.modules.iter_mut().find(|module| module.name == name) {
                module.when = if module.when == When::Always { When::Always } else { when };
            }
        }
        let packed: BTreeSet<&str> = resolved.modules.iter().map(|module| module.name.as_str()).collect();
        resolved.aliases =
            self.aliases.iter().filter(|(_, name)| packed.contains(name.as_str())).cloned().collect();
        Ok(resolved)
    }

    /// Adds a module and before it what it depends on; every name is entered once, so a cycle ends too.
    fn visit(
        &self,
        name: &str,
        seen: &mut BTreeMap<String, Vec<String>>,
        modules: &mut Vec<Module>,
    ) -> Result<Vec<String>, BootImageError> {
        if let Some(needs) = seen.get(name) {
            return Ok(needs.clone());
        }
        seen.insert(name.into(), Vec::new());
        let Some((file, dependencies)) = self.files.get(name) else {
            if self.builtin.contains(name) {
                return Ok(Vec::new());
            }
            return Err(BootImageError::NoModule { name: name.into(), folder: self.folder.clone() });
        };
        let mut needs: Vec<String> = Vec::new();
        // depmod lists the nearest dependency first.
        for dependency in dependencies.iter().rev().filter(|dependency| !self.builtin.contains(*dependency)) {
            for need in self.visit(dependency, seen, modules)?.into_iter().chain([dependency.clone()]) {
                if !needs.contains(&need) && need != name {
                    needs.push(need);
                }
            }
        }
        seen.insert(name.into(), needs.clone());
        let path = self.folder.join(file);
        modules.push(Module { name: name.into(), path, when: When::Demand, needs: needs.clone() });
        Ok(needs)
    }
}

/// The packed list, see the module's documentation.
pub(super) fn order(modules: &[Module]) -> String {
    let line = |module: &Module| {
        let needs = if module.needs.is_empty() { "-".into() } else { module.needs.join(",") };
        format!("{}.ko {} {needs}\n", module.name, module.when)
    };
    modules.iter().map(line).collect()
}

fn read_optional(path: &Path) -> Result<String, BootImageError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(text),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        Err(source) => Err(BootImageError::Read { path: path.into(), source }),
    }
}

fn parse_dependencies(text: &str) -> HashMap<String, (String, Vec<String>)> {
    text.lines()
        .filter_map(|line| line.split_once(':'))
        // Absolute paths and `..` do not come from depmod and would leave the folder.
        .filter(|(file, _)| !file.starts_with('/') && !file.split('/').any(|part| part == ".."))
        .map(|(file, needs)| {
            (name_of(file), (file.to_owned(), needs.split_whitespace().map(name_of).collect()))
        })
        .collect()
}

/// Aliases by which the kernel asks for filesystems, protocols and algorithms; patterns are for devices.
fn parse_aliases(text: &str) -> Vec<(String, String)> {
    text.lines()
        .filter_map(|line| line.strip_prefix("alias ")?.split_once(' '))
        .filter(|(alias, _)| !alias.contains(['*', '?', '[']) && !alias.contains(':'))
        .map(|(alias, name)| (alias.to_owned(), name.trim().replace('-', "_")))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(in super::super) const DEPENDENCIES: &str = "\
kernel/drivers/virtio/virtio.ko:
kernel/drivers/virtio/virtio_ring.ko: kernel/drivers/virtio/virtio.ko
kernel/drivers/virtio/virtio_pci.ko.xz: kernel/drivers/virtio/virtio_ring.ko kernel/drivers/virtio/virtio.ko
kernel/drivers/net/virtio_net.ko: kernel/drivers/net/net_failover.ko kernel/net/core/failover.ko kernel/drivers/virtio/virtio_ring.ko kernel/drivers/virtio/virtio.ko
kernel/drivers/net/net_failover.ko: kernel/net/core/failover.ko
kernel/net/core/failover.ko:
kernel/drivers/block/virtio_blk.ko: kernel/drivers/virtio/virtio_ring.ko kernel/drivers/virtio/virtio.ko
kernel/drivers/char/hw_random/virtio-rng.ko: kernel/drivers/char/hw_random/rng-core.ko
kernel/net/vmw_vsock/vmw_vsock_virtio_transport.ko: kernel/net/vmw_vsock/vsock.ko
kernel/net/vmw_vsock/vsock.ko:
kernel/fs/ext4/ext4.ko:
/etc/evil.ko:
kernel/../../evil2.ko:
";

    fn index(dependencies: &str, builtin: &str) -> Index {
        Index {
            folder: "/m".into(),
            files: parse_dependencies(dependencies),
            builtin: builtin.lines().map(name_of).collect(),
            aliases: parse_aliases(
                "alias fs-ext4 ext4\nalias net-pf-40 vsock\nalias virtio:d00000001v* virtio_net\nalias fs-xfs xfs\n",
            ),
        }
    }

    #[test]
    fn dependencies_come_first_and_builtin_ones_never() {
        let resolved =
            index(DEPENDENCIES, "kernel/drivers/char/hw_random/rng-core.ko\n").resolve(&[]).unwrap();
        let list = order(&resolved.modules);
        assert_eq!(
            list,
            "virtio.ko demand -\n\
             virtio_ring.ko demand virtio\n\
             virtio_pci.ko always virtio,virtio_ring\n\
             failover.ko demand -\n\
             net_failover.ko demand failover\n\
             virtio_net.ko virtio:1 virtio,virtio_ring,failover,net_failover\n\
             virtio_blk.ko virtio:2 virtio,virtio_ring\n\
             virtio_rng.ko virtio:4 -\n\
             vsock.ko demand -\n\
             vmw_vsock_virtio_transport.ko virtio:19 vsock\n\
             ext4.ko demand -\n"
        );
        assert!(resolved.missing.contains(&"virtio_mem".to_owned()));
        let aliases = [("fs-ext4".to_owned(), "ext4".to_owned()), ("net-pf-40".into(), "vsock".into())];
        assert_eq!(resolved.aliases, aliases);
    }

    #[test]
    fn a_missing_required_module_is_named() {
        let without = DEPENDENCIES.replace("virtio_blk", "virtio_klb");
        let error = index(&without, "").resolve(&[]).unwrap_err().to_string();
        assert!(error.contains("virtio_blk") && error.contains("/m"), "{error}");
        let error = index(DEPENDENCIES, "kernel/drivers/char/hw_random/rng-core.ko")
            .resolve(&["nft-log".into()])
            .unwrap_err()
            .to_string();
        assert!(error.contains("nft_log"), "{error}");
    }

    #[test]
    fn a_cycle_ends() {
        let looped = format!(
            "{DEPENDENCIES}kernel/a.ko: kernel/b.ko\nkernel/b.ko: kernel/a.ko\nkernel/drivers/char/hw_random/rng-core.ko:\n"
        );
        let resolved = index(&looped, "").resolve(&["a".into()]).unwrap();
        assert_eq!(resolved.modules.iter().filter(|module| module.name == "a").count(), 1);
    }

    #[test]
    fn files_outside_the_folder_are_not_taken() {
        let files = parse_dependencies(DEPENDENCIES);
        assert!(!files.contains_key("evil") && !files.contains_key("evil2"));
        assert!(matches!(Index::read(Path::new("/lib/modules"), "../x"), Err(BootImageError::Release(_))));
    }
}
