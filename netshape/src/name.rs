//! Names of interfaces. All that Lathe makes for machines begins with `lt-` (tap) or `li-` (ifb), so that everything is
//! found after a crash; and both are told from others' links of the same beginning by their kind.
//!
//! The kernel allows 15 bytes (`IFNAMSIZ` − 1). A machine's name that fits is used as it is; a longer or odd one is
//! cut and gets a hash behind an underscore, which plain names never contain, so the two forms cannot meet.

use std::fmt;

use crate::error::Error;

/// `IFNAMSIZ` less the final zero.
const NAME_BYTES_MAX: usize = 15;
const TAP: &str = "lt-";
const IFB: &str = "li-";
/// Of a machine's name that does not fit, so much is kept.
const KEPT_BYTES: usize = 3;

/// A valid interface name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IfName(String);

impl IfName {
    /// Checks a name; stricter than the kernel, so that it is safe in every tool's text.
    ///
    /// # Errors
    /// [`Error::Name`].
    pub fn new(name: &str) -> Result<IfName, Error> {
        let good = (1..=NAME_BYTES_MAX).contains(&name.len())
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
            && name != "."
            && name != "..";
        if good { Ok(IfName(name.into())) } else { Err(Error::Name(name.into())) }
    }

    /// The tap of a machine; the same name gives the same tap for ever.
    pub fn tap_of(machine: &str) -> IfName {
        let plain = (1..=NAME_BYTES_MAX - TAP.len()).contains(&machine.len())
            && machine.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        if plain {
            return IfName(format!("{TAP}{machine}"));
        }
        let kept: String = machine
            .chars()
            .filter(|c| c.is_ascii_lowercase() || c.is_ascii_digit())
            .take(KEPT_BYTES)
            .collect();
        IfName(format!("{TAP}{kept}_{:08x}", fnv1a(machine.as_bytes()) >> 32))
    }

    /// The ifb beside a machine's tap.
    ///
    /// # Errors
    /// [`Error::Name`] if `tap` does not begin as a tap of ours.
    pub fn ifb_of(tap: &IfName) -> Result<IfName, Error> {
        let rest = tap.0.strip_prefix(TAP).ok_or_else(|| Error::Name(tap.0.clone()))?;
        IfName::new(&format!("{IFB}{rest}"))
    }

    /// Whether the name is of the form of a machine's tap.
    pub fn is_tap(&self) -> bool {
        self.0.len() > TAP.len() && self.0.starts_with(TAP)
    }

    /// Whether the name is of the form of a machine's ifb.
    pub fn is_ifb(&self) -> bool {
        self.0.len() > IFB.len() && self.0.starts_with(IFB)
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for IfName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// FNV-1a, 64 bits: stable over releases, which the standard library's hasher is not.
pub(crate) fn fnv1a(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn plain_names_are_kept_and_others_hashed() {
        assert_eq!(IfName::tap_of("web").as_str(), "lt-web");
        assert_eq!(IfName::tap_of("twelve-chars").as_str(), "lt-twelve-chars");
        let long = IfName::tap_of("thirteen-char");
        assert!(long.as_str().starts_with("lt-thi_"), "{long}");
        assert_ne!(long, IfName::tap_of("thirteen-chas"));
        assert_eq!(IfName::ifb_of(&IfName::tap_of("web")).expect("a tap").as_str(), "li-web");
        assert!(IfName::ifb_of(&IfName::new("eth0").expect("a name")).is_err());
    }

    #[test]
    fn bad_names_are_refused() {
        for bad in ["", ".", "..", "a/b", "a b", "sixteen-bytes-ab", "é", "a;b", "\"", "a\n"] {
            assert!(IfName::new(bad).is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn every_machine_has_a_valid_tap(machine in "\\PC{0,80}") {
            let tap = IfName::tap_of(&machine);
            prop_assert!(IfName::new(tap.as_str()).is_ok());
            prop_assert!(tap.is_tap() && !tap.is_ifb());
            prop_assert!(IfName::ifb_of(&tap).is_ok_and(|ifb| ifb.is_ifb()));
        }
    }
}
