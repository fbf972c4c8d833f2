//! Amounts and patches. Plain numbers with their unit in the type; converted once, here or in the controller's file.

use std::fmt;

/// Thousandths of one CPU: 370 is 0.37 of a CPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MilliCpu(pub u64);

/// Bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bytes(pub u64);

impl fmt::Display for MilliCpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:03} CPU", self.0 / 1000, self.0 % 1000)
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0)
    }
}

/// One field of a change. Applying a patch twice equals applying it once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Patch<T> {
    /// Leave the kernel's value as it is.
    #[default]
    Keep,
    /// Write this value.
    Set(T),
    /// Write `max`.
    Unlimited,
}

impl<T: Copy> Patch<T> {
    /// What to write: `None` to keep, `Some(None)` for `max`.
    pub(crate) fn wanted(self) -> Option<Option<T>> {
        match self {
            Patch::Keep => None,
            Patch::Set(value) => Some(Some(value)),
            Patch::Unlimited => Some(None),
        }
    }
}
