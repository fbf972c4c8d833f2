//! Names of interfaces. All that Lathe makes for machines begins with `lt-` (tap) or `li-` (ifb), so that everything is
//! found after a crash; and both are told from others' links of the same beginning by their kind.
//!
//! The kernel allows 15 bytes (`IFNAMSIZ` − 1). A machine's name that fits is used as it is; a longer or odd one is
//! cut and gets a hash of 8 digits behind an underscore, which plain names never contain, so the two forms cannot meet. Further nics of a
//! machine have their number, which is shorter than a hash, behind the underscore; or are hashed with it.

use std::fmt;

use crate::error::Error;

/// `IFNAMSIZ` less the final zero.
const NAME_BYTES_MAX: usize = 15;
const TAP: &str = "lt-";
const IFB: &str = "li-";
/// Of a machine's name that does not fit, so much is kept.
const KEPT_BYTES: usize = 3;
/// Numbers of nics below this are shorter than the hash.
const NUMBERS: u32 = 1_000_000;

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
        if machine.len() <= NAME_BYTES_MAX - TAP.len() && is_plain(machine) {
            return IfName(format!("{TAP}{machine}"));
        }
        hashed(machine)
    }

    /// The tap of a machine's nic of this number; 0 is [`IfName::tap_of`]. Two nics may meet where a name is hashed: whoever makes taps looks
    /// whether the name is taken.
    pub fn nic_of(machine: &str, number: u32) -> IfName {
        if number == 0 {
            return Self::tap_of(machine);
        }
        let plain = format!("{TAP}{machine}_{number}");
        if number < NUMBERS && plain.len() <= NAME_BYTES_MAX && is_plain(machine) {
            return IfName(plain);
        }
        // Machines' names have no slash.
        hashed(&format!("{machine}/{number}"))
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

/// Whether a machine's name can be part of an interface's as it is.
fn is_plain(machine: &str) -> bool {
    !machine.is_empty() && machine.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
}

/// A tap's name that begins as `name` does and is told from others by a hash.
fn hashed(name: &str) -> IfName {
    let kept: String =
        name.chars().filter(|c| c.is_ascii_lowercase() || c.is_ascii_digit()).take(KEPT_BYTES).collect();
    IfName(format!("{TAP}{kept}_{:08x}", fnv1a(name.as_bytes()) >> 32))
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
    fn further_nics_have_names_of_their_own() {
        assert_eq!(IfName::nic_of("web", 0), IfName::tap_of("web"));
        assert_eq!(IfName::nic_of("web", 1).as_str(), "lt-web_1");
        assert_eq!(IfName::nic_of("ten-chars-", 9).as_str(), "lt-ten-chars-_9");
        assert_eq!(IfName::nic_of("ten-chars-", 10).as_str().len(), 15);
        let long = IfName::nic_of("twelve-chars", 1);
        assert!(long.as_str().starts_with("lt-twe_") && long.as_str().len() == 15, "{long}");
        assert_ne!(long, IfName::nic_of("twelve-chars", 2));
        assert_ne!(IfName::nic_of("web", u32::MAX), IfName::nic_of("web", u32::MAX - 1));
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

        #[test]
        fn every_nic_has_a_valid_tap_of_its_own(machine in "[a-z][a-z0-9-]{0,11}", other in "[a-z][a-z0-9-]{0,11}", number in 1_u32..1000) {
            let tap = IfName::nic_of(&machine, number);
            prop_assert!(IfName::new(tap.as_str()).is_ok());
            prop_assert!(IfName::ifb_of(&tap).is_ok_and(|ifb| ifb.is_ifb()));
            prop_assert_ne!(&tap, &IfName::tap_of(&machine));
            prop_assert_ne!(&tap, &IfName::tap_of(&other));
        }
    }
}
