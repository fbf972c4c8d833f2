//! Memory blocks brought online.
//!
//! Documentation/admin-guide/mm/memory-hotplug.rst of the kernel. New memory joins the movable zone where possible, the one that it
//! can be taken back from.

use std::fs;
use std::path::Path;

use crate::failure::Failure;

pub(super) const FOLDER: &str = "/sys/devices/system/memory";

/// Lets the kernel bring new blocks online by itself, where they can be taken back, so that growth needs nobody. The kernels'
/// own defaults are `offline` or `online` (CONFIG_MEMORY_HOTPLUG_DEFAULT_ONLINE); what somebody chose on the kernel's command line
/// or has written since stays.
pub fn bring_online_automatically() {
    let chosen = fs::read_to_string("/proc/cmdline").is_ok_and(|line| line.contains("memhp_default_state="));
    if !chosen {
        bring_online_automatically_in(Path::new(FOLDER));
    }
}

fn bring_online_automatically_in(folder: &Path) {
    let file = folder.join("auto_online_blocks");
    // Kernels without memory hotplug lack the file.
    if fs::read_to_string(&file).is_ok_and(|policy| ["offline", "online"].contains(&policy.trim()))
        && let Err(error) = fs::write(&file, "online_movable")
    {
        eprintln!("lathe-guest: new memory cannot be taken back again: {error}");
    }
}

/// Brings every offline memory block online, movable where the kernel agrees, so that it can be taken back.
///
/// # Errors
/// `unsupported` without memory hotplug; `failed` with the number of blocks that stayed offline.
pub fn bring_online() -> Result<(), Failure> {
    bring_online_in(Path::new(FOLDER))
}

fn bring_online_in(folder: &Path) -> Result<(), Failure> {
    let blocks = blocks(folder)
        .map_err(|error| Failure::unsupported(format!("no memory hotplug in this kernel: {error}")))?;
    let (mut refused, mut last) = (0, None);
    for state in blocks {
        if !fs::read_to_string(&state).is_ok_and(|state| state.trim() == "offline") {
            continue;
        }
        let switched = fs::write(&state, "online_movable").or_else(|_| fs::write(&state, "online"));
        if let Err(error) = switched {
            refused += 1;
            last = Some(error);
        }
    }
    match last {
        None => Ok(()),
        Some(error) => Err(Failure::failed(format!("{refused} memory blocks stayed offline: {error}"))),
    }
}

/// The `state` files of all blocks.
pub(super) fn blocks(folder: &Path) -> std::io::Result<impl Iterator<Item = std::path::PathBuf>> {
    let is_block =
        |name: &str| name.strip_prefix("memory").is_some_and(|number| number.parse::<u64>().is_ok());
    let entries = fs::read_dir(folder)?.flatten();
    Ok(entries
        .filter(move |entry| entry.file_name().to_str().is_some_and(is_block))
        .map(|entry| entry.path().join("state")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offline_blocks_come_online_movable() {
        let folder = tempfile::tempdir().unwrap();
        for (name, state) in [("memory0", "online\n"), ("memory32", "offline\n"), ("power", "offline\n")] {
            fs::create_dir(folder.path().join(name)).unwrap();
            fs::write(folder.path().join(name).join("state"), state).unwrap();
        }
        bring_online_in(folder.path()).unwrap();
        let state = |name: &str| fs::read_to_string(folder.path().join(name).join("state")).unwrap();
        assert_eq!((state("memory0").as_str(), state("memory32").as_str()), ("online\n", "online_movable"));
        assert_eq!(state("power"), "offline\n");
    }

    #[test]
    fn a_policy_that_somebody_chose_stays() {
        let folder = tempfile::tempdir().unwrap();
        bring_online_automatically_in(folder.path());
        let file = folder.path().join("auto_online_blocks");
        assert!(!file.exists());
        for (before, after) in [
            ("offline\n", "online_movable"),
            ("online\n", "online_movable"),
            ("online_kernel\n", "online_kernel\n"),
        ] {
            fs::write(&file, before).unwrap();
            bring_online_automatically_in(folder.path());
            assert_eq!(fs::read_to_string(&file).unwrap(), after);
        }
    }
}
