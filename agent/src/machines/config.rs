//! What the core of lathed has to be told.

use std::path::PathBuf;
use std::sync::Arc;

use crate::foresight;
pub use crate::host::books::{Overcommit, Reserve};
pub use crate::network::NetworkConfig;
use crate::problem::{Kind, Problem};

/// Everything that [`super::Machines::start`] needs.
#[derive(Clone)]
pub struct CoreConfig {
    /// `/var/lib/lathe`: the store, machines' folders, uploads, kept data.
    pub state_dir: PathBuf,
    /// `/run/lathe`: sockets.
    pub runtime_dir: PathBuf,
    /// This host's name.
    pub host_name: String,
    /// Who starts monitors.
    pub launcher: LauncherKind,
    /// `lathe-vmm`, for the direct launcher.
    pub monitor_binary: PathBuf,
    /// The static `lathe-guest`.
    pub guest_binary: PathBuf,
    /// The default guest kernel; otherwise `/boot/vmlinuz-$(uname -r)`.
    pub kernel: Option<PathBuf>,
    /// `/lib/modules`.
    pub modules_root: PathBuf,
    /// The machines' network; none without.
    pub network: Option<NetworkConfig>,
    /// What the host keeps.
    pub reserve: Reserve,
    /// How often it promises the same.
    pub overcommit: Overcommit,
    /// Files and folders that a request may name as disks.
    pub allowed_disks: Vec<PathBuf>,
    /// What is done about the future.
    pub foresight: foresight::Settings,
    /// Imported images.
    pub images: Arc<dyn ImageSource>,
}

/// Who starts monitors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LauncherKind {
    /// systemd, as units.
    Systemd,
    /// lathed itself.
    Direct {
        /// A cgroup v2 folder that is delegated to us; without one nothing is limited.
        cgroup: Option<PathBuf>,
    },
}

/// Where images come from.
pub trait ImageSource: Send + Sync {
    /// The raw disk of an image; it must never change afterwards.
    ///
    /// # Errors
    /// `no-such-image`.
    fn open(&self, name: &str) -> Result<ImageFile, Problem>;
}

/// An image's raw disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageFile {
    /// Where it is.
    pub path: PathBuf,
    /// Bytes.
    pub size_bytes: u64,
}

/// An image source without images.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoImages;

impl ImageSource for NoImages {
    fn open(&self, name: &str) -> Result<ImageFile, Problem> {
        Err(Problem::new(Kind::NotFound, "no-such-image", format!("there is no image {name:?}"))
            .fix("lathe image list"))
    }
}

impl CoreConfig {
    /// Where uploads wait.
    pub fn uploads_dir(&self) -> PathBuf {
        self.state_dir.join("uploads")
    }

    /// A machine's folder.
    pub fn machine_dir(&self, name: &str) -> PathBuf {
        self.state_dir.join("machines").join(name)
    }

    /// A machine's folder of sockets.
    pub fn socket_dir(&self, name: &str) -> PathBuf {
        self.runtime_dir.join("machines").join(name)
    }

    /// Where control sockets are.
    pub fn control_dir(&self) -> PathBuf {
        self.runtime_dir.join("vm")
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::api::wire::{Cores, OnTrouble, RestartPolicy, RunRequest, Tier};
    use std::path::Path;

    pub(crate) fn config(folder: &Path) -> CoreConfig {
        CoreConfig {
            state_dir: folder.join("state"),
            runtime_dir: folder.join("run"),
            host_name: "test".to_owned(),
            launcher: LauncherKind::Direct { cgroup: None },
            monitor_binary: "/nowhere/lathe-vmm".into(),
            guest_binary: "/nowhere/lathe-guest".into(),
            kernel: None,
            modules_root: folder.join("modules"),
            network: None,
            reserve: Reserve { cpu_milli: 0, memory_bytes: 0, disk_bytes: 0 },
            overcommit: Overcommit::default(),
            allowed_disks: Vec::new(),
            foresight: foresight::Settings::default(),
            images: Arc::new(NoImages),
        }
    }

    pub(crate) fn run_request(name: &str) -> RunRequest {
        RunRequest {
            name: name.to_owned(),
            cpu_milli: 500,
            cpu_max_milli: None,
            vcpus: None,
            memory_bytes: 64 << 20,
            memory_max_bytes: None,
            net_bit_per_sec: None,
            net: false,
            iops: None,
            tier: Tier::Standard,
            foresight: None,
            aggressiveness_permille: None,
            cpu_min_milli: None,
            memory_min_bytes: None,
            cores: Cores::Shared,
            image: None,
            kernel: None,
            initrd: None,
            disks: Vec::new(),
            disk_size_bytes: None,
            cmdline: None,
            restart: RestartPolicy::No,
            on_panic: OnTrouble::Report,
            watchdog: None,
            autostart: false,
        }
    }
}
