//! The freezer: every thread of a machine stands still, its monitor's among them, until it is thawed. A killed process dies also while frozen.
//!
//! Kernel: cgroup-v2.rst "Core Interface Files", `cgroup.freeze`. Freezing takes a moment; `is_frozen` says when it is complete.

use std::path::Path;

use crate::error::Error;
use crate::file;

/// Begins to freeze one group and all below, or lets them go.
pub(crate) fn set(group: &Path, frozen: bool) -> Result<(), Error> {
    let (path, wanted) = (group.join("cgroup.freeze"), u64::from(frozen));
    if file::read_u64(&path)? == wanted {
        return Ok(());
    }
    file::write(&path, &wanted.to_string())
}

/// Whether every thread stands still.
pub(crate) fn is_frozen(group: &Path) -> Result<bool, Error> {
    Ok(file::keyed(&file::read(&group.join("cgroup.events"))?, "frozen") != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Fixture, content};

    #[test]
    fn frozen_and_thawed() {
        let fixture = Fixture::new();
        set(&fixture.machine(), true).expect("frozen");
        assert_eq!(content(&fixture.machine().join("cgroup.freeze")), "1");
        assert!(!is_frozen(&fixture.machine()).expect("read"), "the kernel says when it is");
        set(&fixture.machine(), false).expect("thawed");
        assert_eq!(content(&fixture.machine().join("cgroup.freeze")), "0");
    }
}
