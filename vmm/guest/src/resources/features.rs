//! What this guest can follow of a change of shape: so that the host can say it before it begins.

use std::fs;
use std::path::Path;

use lathe_guest::protocol::{Features, NewMemory};

use super::{memory, parse_list};

/// Present state.
pub fn read() -> Features {
    read_in(Path::new("/"))
}

fn read_in(root: &Path) -> Features {
    let text = |path: &str| fs::read_to_string(root.join(path)).unwrap_or_default();
    let cpus = |name: &str| parse_list(&text(&format!("sys/devices/system/cpu/{name}"))).len() as u32;
    let bound = |driver: &str| has_device(&root.join("sys/bus/virtio/drivers").join(driver));
    let folder = root.join(memory::FOLDER.trim_start_matches('/'));
    let block_bytes = u64::from_str_radix(text("sys/devices/system/memory/block_size_bytes").trim(), 16);
    let block_bytes = block_bytes.unwrap_or_default();
    let states = memory::blocks(&folder).map(|blocks| {
        blocks.map(|state| fs::read_to_string(state).is_ok_and(|state| state.trim() == "online"))
    });
    let (online, offline): (Vec<bool>, Vec<bool>) = states.into_iter().flatten().partition(|online| *online);
    Features {
        cpus_possible: cpus("possible"),
        cpus_present: cpus("present"),
        cpus_online: cpus("online"),
        virtio_mem: bound("virtio_mem"),
        virtio_balloon: bound("virtio_balloon"),
        new_memory: match text("sys/devices/system/memory/auto_online_blocks").trim() {
            "online_movable" => NewMemory::Movable,
            "online" | "online_kernel" => NewMemory::Online,
            _ => NewMemory::Offline,
        },
        memory_block_bytes: block_bytes,
        memory_online_bytes: block_bytes.saturating_mul(online.len() as u64),
        memory_offline_bytes: block_bytes.saturating_mul(offline.len() as u64),
    }
}

/// Whether a virtio driver serves a device: its folder then has links named after them.
fn has_device(driver: &Path) -> bool {
    let entries = fs::read_dir(driver).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name()).any(|name| {
        let number = name.to_str().and_then(|name| name.strip_prefix("virtio"));
        number.is_some_and(|number| number.parse::<u32>().is_ok())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_is_told() {
        let root = tempfile::tempdir().unwrap();
        for (path, contents) in [
            ("sys/devices/system/cpu/possible", "0-7\n"),
            ("sys/devices/system/cpu/present", "0-3\n"),
            ("sys/devices/system/cpu/online", "0-1\n"),
            ("sys/bus/virtio/drivers/virtio_mem/virtio4", ""),
            ("sys/bus/virtio/drivers/virtio_balloon/uevent", ""),
            ("sys/devices/system/memory/auto_online_blocks", "online_movable\n"),
            ("sys/devices/system/memory/block_size_bytes", "8000000\n"),
            ("sys/devices/system/memory/memory0/state", "online\n"),
            ("sys/devices/system/memory/memory1/state", "online\n"),
            ("sys/devices/system/memory/memory32/state", "offline\n"),
        ] {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, contents).unwrap();
        }
        let expected = Features {
            cpus_possible: 8,
            cpus_present: 4,
            cpus_online: 2,
            virtio_mem: true,
            virtio_balloon: false,
            new_memory: NewMemory::Movable,
            memory_block_bytes: 128 << 20,
            memory_online_bytes: 256 << 20,
            memory_offline_bytes: 128 << 20,
        };
        assert_eq!(read_in(root.path()), expected);
        let nothing = tempfile::tempdir().unwrap();
        assert_eq!(read_in(nothing.path()), Features::default());
    }
}
