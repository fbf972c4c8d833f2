//! The cpuset controller: which CPUs and memory nodes threads may use.
//!
//! An empty `cpuset.cpus` means "as the parent", which is what [`Patch::Unlimited`] writes. The kernel refuses that to a group with threads
//! (ENOSPC); then what the parent has now is written, which does not follow the parent later. What holds is `cpuset.cpus.effective`: CPUs that
//! are offline, or that the parent lacks, are not in it, and the kernel refuses nothing for that.
//!
//! Kernel: cgroup-v2.rst "Cpuset Interface Files". The list format is that of `Documentation/admin-guide/kernel-parameters.rst`, "cpu lists".

use std::collections::BTreeSet;
use std::fmt::{self, Write as _};
use std::io::ErrorKind;
use std::path::Path;
use std::str::FromStr;

use crate::error::Error;
use crate::file;
use crate::units::Patch;

/// More CPUs or nodes than any kernel of ours can have (`NR_CPUS` of Debian's x86_64 is 8192).
const NUMBERS_MAX: u32 = 1 << 16;

/// Numbers of CPUs or of memory nodes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuList(pub BTreeSet<u32>);

impl FromIterator<u32> for CpuList {
    fn from_iter<I: IntoIterator<Item = u32>>(numbers: I) -> Self {
        Self(numbers.into_iter().collect())
    }
}

impl fmt::Display for CpuList {
    /// As the kernel writes it: `0-3,8`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = String::new();
        let mut numbers = self.0.iter().copied().peekable();
        while let Some(first) = numbers.next() {
            let mut last = first;
            while let Some(next) = numbers.next_if(|next| *next == last + 1) {
                last = next;
            }
            let comma = if text.is_empty() { "" } else { "," };
            match last {
                _ if last == first => write!(text, "{comma}{first}")?,
                _ => write!(text, "{comma}{first}-{last}")?,
            }
        }
        f.write_str(&text)
    }
}

/// Why a text is no list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a list such as 0-3,8 of numbers below {NUMBERS_MAX}")]
pub struct NoCpuList;

impl FromStr for CpuList {
    type Err = NoCpuList;

    fn from_str(text: &str) -> Result<Self, NoCpuList> {
        let number =
            |text: &str| text.parse::<u32>().ok().filter(|number| *number < NUMBERS_MAX).ok_or(NoCpuList);
        let mut list = BTreeSet::new();
        for part in text.trim().split(',').filter(|part| !part.is_empty()) {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last) = (number(first)?, number(last)?);
            if first > last {
                return Err(NoCpuList);
            }
            list.extend(first..=last);
        }
        Ok(Self(list))
    }
}

/// A change of one group.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpusetPatch {
    /// CPUs; `Unlimited`: as the parent, in a group with threads as the parent now.
    pub cpus: Patch<CpuList>,
    /// Memory nodes; `Unlimited`: as the parent. Pages that are there already are moved, which takes its time. Not in threaded groups.
    pub mems: Patch<CpuList>,
}

/// What the kernel lets a group use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cpuset {
    /// CPUs asked for; `None`: as the parent.
    pub cpus: Option<CpuList>,
    /// CPUs that threads really run on.
    pub effective: CpuList,
}

/// Applies a patch and reads back what holds.
pub(crate) fn set(group: &Path, patch: &CpusetPatch) -> Result<Cpuset, Error> {
    for (name, patch) in [("cpuset.cpus", &patch.cpus), ("cpuset.mems", &patch.mems)] {
        let wanted = match patch {
            Patch::Keep => continue,
            Patch::Set(list) if list.0.is_empty() => {
                return Err(Error::OutOfRange { field: name, asked: 0, range: "at least one" });
            }
            Patch::Set(list) => Some(list),
            Patch::Unlimited => None,
        };
        let path = group.join(name);
        match write(&path, wanted) {
            Err(Error::Write { source, .. })
                if wanted.is_none() && source.kind() == ErrorKind::StorageFull =>
            {
                let parent = group.parent().unwrap_or(group).join(format!("{name}.effective"));
                write(&path, read_list(&parent)?.as_ref())?;
            }
            written => written?,
        }
    }
    read(group)
}

fn write(path: &Path, wanted: Option<&CpuList>) -> Result<(), Error> {
    if read_list(path)?.as_ref() == wanted {
        return Ok(());
    }
    let text = wanted.map(CpuList::to_string).unwrap_or_default();
    // A write of no bytes would be none.
    file::write(path, &format!("{text}\n"))?;
    let shows = read_list(path)?;
    if shows.as_ref() == wanted {
        return Ok(());
    }
    let shows = shows.map(|list| list.to_string()).unwrap_or_default();
    Err(Error::ReadBack { file: path.into(), wrote: text, shows })
}

/// `None`: empty.
fn read_list(path: &Path) -> Result<Option<CpuList>, Error> {
    let Some(content) = file::read_if_there(path)? else {
        let check = "the cpuset controller in cgroup.subtree_control of the parent";
        return Err(Error::Lacks { file: path.into(), check });
    };
    let list: CpuList =
        content.parse().map_err(|_| file::unexpected(path, &content, "a list such as 0-3,8"))?;
    Ok(Some(list).filter(|list| !list.0.is_empty()))
}

/// CPUs that threads of any group may really run on, such as of the parent of machines' units; `None` where the group or its controller is not.
///
/// # Errors
/// [`Error::Read`], [`Error::Content`].
pub fn effective(group: &Path) -> Result<Option<CpuList>, Error> {
    match read_list(&group.join("cpuset.cpus.effective")) {
        Err(Error::Lacks { .. }) => Ok(None),
        read => read,
    }
}

/// Reads one group.
pub(crate) fn read(group: &Path) -> Result<Cpuset, Error> {
    Ok(Cpuset {
        cpus: read_list(&group.join("cpuset.cpus"))?,
        effective: read_list(&group.join("cpuset.cpus.effective"))?.unwrap_or_default(),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::{Fixture, content};

    fn list(text: &str) -> CpuList {
        text.parse().expect("a list")
    }

    #[test]
    fn lists_are_the_kernels() {
        for text in ["", "0", "0-3", "0-3,8", "1,3,5-6"] {
            assert_eq!(list(text).to_string(), text);
        }
        assert_eq!(list("3,1-2,2\n").to_string(), "1-3");
        for text in ["a", "1-", "-1", "3-1", "65536", "0-4294967295", "1 2"] {
            assert_eq!(text.parse::<CpuList>(), Err(NoCpuList), "{text}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(numbers in proptest::collection::btree_set(0..300u32, 0..40)) {
            let list = CpuList(numbers);
            prop_assert_eq!(list.to_string().parse::<CpuList>().expect("its own"), list);
        }
    }

    #[test]
    fn set_keep_as_the_parent() {
        let fixture = Fixture::new();
        let group = fixture.vcpu();
        let cpus = |cpus| CpusetPatch { cpus, ..CpusetPatch::default() };
        let got = set(&group, &cpus(Patch::Set(list("0-1")))).expect("set");
        assert_eq!(got, Cpuset { cpus: Some(list("0-1")), effective: list("0-7") });
        assert_eq!(set(&group, &cpus(Patch::Keep)).expect("kept"), got);
        assert_eq!(set(&group, &cpus(Patch::Unlimited)).expect("as the parent").cpus, None);
        assert_eq!(content(&group.join("cpuset.cpus")), "");
        assert!(matches!(set(&group, &cpus(Patch::Set(CpuList::default()))), Err(Error::OutOfRange { .. })));
    }

    #[test]
    fn what_is_effective_is_told_of_any_group() {
        let fixture = Fixture::new();
        assert_eq!(effective(&fixture.unit()).expect("readable"), Some(list("0-7")));
        assert_eq!(effective(&fixture.unit().join("nobody")).expect("an answer"), None);
    }

    #[test]
    fn a_delegation_without_cpuset_is_named() {
        let fixture = Fixture::new();
        std::fs::remove_file(fixture.vcpu().join("cpuset.cpus")).expect("removed");
        let error = set(&fixture.vcpu(), &CpusetPatch { cpus: Patch::Unlimited, ..CpusetPatch::default() })
            .expect_err("no such file");
        assert!(error.to_string().contains("cpuset.cpus is missing"), "{error}");
    }
}
