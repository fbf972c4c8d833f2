//! The pids controller: `pids.max`, `pids.current`. A limit below what runs kills nothing; it refuses the next fork.
//!
//! Kernel: cgroup-v2.rst "PID Interface Files".

use std::path::Path;

use cgroups_rs::fs::MaxValue;
use cgroups_rs::fs::pid::PidController;

use crate::error::Error;
use crate::file;
use crate::hierarchy;
use crate::units::Patch;

/// `PID_MAX_LIMIT` of a 64-bit kernel.
const PIDS_MAX: u64 = 4 * 1024 * 1024;

/// Applies a patch to `root`/`name`; returns what the kernel shows, `None` for unlimited.
pub(crate) fn set(root: &Path, name: &'static str, patch: Patch<u64>) -> Result<Option<u64>, Error> {
    let path = root.join(name).join("pids.max");
    let shown = file::read_max(&path)?;
    let Some(wanted) = patch.wanted().filter(|wanted| *wanted != shown) else { return Ok(shown) };
    let value = match wanted {
        None => MaxValue::Max,
        Some(tasks) => MaxValue::Value(
            i64::try_from(tasks).ok().filter(|_| tasks < PIDS_MAX).ok_or(Error::OutOfRange {
                field: "pids.max",
                asked: tasks,
                range: "0 to 4194303",
            })?,
        ),
    };
    let text = value.to_string();
    let loaded = hierarchy::load(root, name);
    let pids: &PidController =
        loaded.controller_of().ok_or(Error::Lacks { file: path.clone(), check: "the pids controller" })?;
    pids.set_pid_max(value).map_err(|error| hierarchy::refused(&path, &text, &error))?;
    let shows = file::read_max(&path)?;
    if shows == wanted {
        Ok(shows)
    } else {
        Err(Error::ReadBack { file: path, wrote: text, shows: format!("{shows:?}") })
    }
}

/// The limit of one group, `None` for unlimited.
pub(crate) fn read(group: &Path) -> Result<Option<u64>, Error> {
    file::read_max(&group.join("pids.max"))
}

/// Processes and threads in one group and below.
pub(crate) fn read_current(group: &Path) -> Result<u64, Error> {
    file::read_u64(&group.join("pids.current"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Fixture;

    #[test]
    fn set_keep_unlimited() {
        let fixture = Fixture::new();
        assert_eq!(set(&fixture.unit(), "machine", Patch::Set(64)).expect("set"), Some(64));
        assert_eq!(set(&fixture.unit(), "machine", Patch::Keep).expect("kept"), Some(64));
        assert_eq!(set(&fixture.unit(), "machine", Patch::Unlimited).expect("unlimited"), None);
        assert!(matches!(
            set(&fixture.unit(), "machine", Patch::Set(u64::MAX)),
            Err(Error::OutOfRange { .. })
        ));
    }
}
