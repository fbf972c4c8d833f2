//! The units of shards: how people write them, how they are shown.
//!
//! People write decimal fractions with a unit (`0.37`, `370m`, `1.5G`, `40mbit`); the value must come out as a whole number of the
//! smallest unit, otherwise it is refused with the nearest values that would do. `K M G T` and `KiB MiB GiB TiB` are powers of 1,024
//! for bytes, as with systemd; `kbit mbit gbit` are powers of 1,000, as with tc.

use std::fmt;
use std::str::FromStr;

/// Smallest grant of memory: one huge page, 2 MiB.
pub const MEMORY_SHARD: Bytes = Bytes(2 << 20);
/// Smallest grant of bandwidth: 1 kbit/s.
pub const RATE_SHARD: BitRate = BitRate(1000);

/// Thousandths of a CPU: 1,000 is one logical CPU of the host, all the time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MilliCpu(pub u64);

/// Bytes of memory or disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bytes(pub u64);

/// Bits per second of L2 frames, as tc counts them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BitRate(pub u64);

/// I/O operations per second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Iops(pub u64);

/// Why a text is not an amount.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseAmountError {
    /// Nothing there.
    #[error("an amount is missing")]
    Empty,
    /// No number at the beginning.
    #[error("`{0}` is not a number")]
    NotANumber(String),
    /// The part behind the number is unknown here.
    #[error("`{found}` is not a unit of {kind}; known: {known}")]
    UnknownUnit {
        /// What stood there.
        found: String,
        /// Of what.
        kind: &'static str,
        /// What may stand there.
        known: &'static str,
    },
    /// Finer than the smallest unit.
    #[error("{text} is finer than the smallest step of {kind}, {step}")]
    TooFine {
        /// As written.
        text: String,
        /// Of what.
        kind: &'static str,
        /// Smallest step, for people.
        step: &'static str,
    },
    /// More than 64 bits hold.
    #[error("{0} is too large")]
    TooLarge(String),
}

/// A decimal number as written, exact: `digits / 10^scale`.
fn split_number(text: &str) -> Result<(u128, u32, &str), ParseAmountError> {
    let text = text.trim();
    if text.is_empty() {
        return Err(ParseAmountError::Empty);
    }
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let not_a_number = || ParseAmountError::NotANumber(text.to_owned());
    if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') {
        return Err(not_a_number());
    }
    if whole.len() + fraction.len() > 30 {
        return Err(ParseAmountError::TooLarge(text.to_owned()));
    }
    let digits = format!("{whole}{fraction}").parse::<u128>().map_err(|_| not_a_number())?;
    Ok((digits, fraction.len() as u32, unit.trim()))
}

/// `number × multiplier` as a whole number of smallest units.
fn scale(
    text: &str,
    number: (u128, u32),
    multiplier: u128,
    kind: &'static str,
    step: &'static str,
) -> Result<u64, ParseAmountError> {
    let too_large = || ParseAmountError::TooLarge(text.to_owned());
    let product = number.0.checked_mul(multiplier).ok_or_else(too_large)?;
    let divisor = 10_u128.pow(number.1);
    if !product.is_multiple_of(divisor) {
        return Err(ParseAmountError::TooFine { text: text.to_owned(), kind, step });
    }
    u64::try_from(product / divisor).map_err(|_| too_large())
}

/// `units` lists `(lower-case suffix, multiplier)`.
fn parse(
    text: &str,
    kind: &'static str,
    step: &'static str,
    known: &'static str,
    units: &[(&str, u128)],
) -> Result<u64, ParseAmountError> {
    let (digits, fraction, unit) = split_number(text)?;
    let lower = unit.to_ascii_lowercase();
    let multiplier = units.iter().find(|(suffix, _)| *suffix == lower).map(|(_, multiplier)| *multiplier);
    let Some(multiplier) = multiplier else {
        return Err(ParseAmountError::UnknownUnit { found: unit.to_owned(), kind, known });
    };
    scale(text.trim(), (digits, fraction), multiplier, kind, step)
}

impl FromStr for MilliCpu {
    type Err = ParseAmountError;

    fn from_str(text: &str) -> Result<Self, ParseAmountError> {
        parse(text, "cpu", "0.001", "m (thousandths), or none", &[("", 1000), ("m", 1)]).map(Self)
    }
}

impl FromStr for Bytes {
    type Err = ParseAmountError;

    fn from_str(text: &str) -> Result<Self, ParseAmountError> {
        const K: u128 = 1 << 10;
        const UNITS: &[(&str, u128)] = &[
            ("", 1),
            ("b", 1),
            ("k", K),
            ("kib", K),
            ("m", K * K),
            ("mib", K * K),
            ("g", K * K * K),
            ("gib", K * K * K),
            ("t", K * K * K * K),
            ("tib", K * K * K * K),
        ];
        parse(text, "bytes", "1 byte", "K M G T, KiB MiB GiB TiB", UNITS).map(Self)
    }
}

impl FromStr for BitRate {
    type Err = ParseAmountError;

    fn from_str(text: &str) -> Result<Self, ParseAmountError> {
        const UNITS: &[(&str, u128)] = &[
            ("bit", 1),
            ("bit/s", 1),
            ("kbit", 1_000),
            ("kbit/s", 1_000),
            ("mbit", 1_000_000),
            ("mbit/s", 1_000_000),
            ("gbit", 1_000_000_000),
            ("gbit/s", 1_000_000_000),
        ];
        parse(text, "bandwidth", "1 bit/s", "bit kbit mbit gbit", UNITS).map(Self)
    }
}

impl FromStr for Iops {
    type Err = ParseAmountError;

    fn from_str(text: &str) -> Result<Self, ParseAmountError> {
        parse(
            text,
            "I/O operations",
            "1",
            "iops, k (thousands), or none",
            &[("", 1), ("iops", 1), ("k", 1000), ("kiops", 1000)],
        )
        .map(Self)
    }
}

impl fmt::Display for MilliCpu {
    /// `0.37`, `1.50`: two decimals, three where they are needed.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (whole, milli) = (self.0 / 1000, self.0 % 1000);
        let text = if milli.is_multiple_of(10) {
            format!("{whole}.{:02}", milli / 10)
        } else {
            format!("{whole}.{milli:03}")
        };
        f.pad(&text)
    }
}

/// One decimal, rounded to nearest, without floating point: `value / unit`.
fn one_decimal(value: u64, unit: u64) -> String {
    let tenths = (u128::from(value) * 10 + u128::from(unit) / 2) / u128::from(unit);
    if tenths.is_multiple_of(10) {
        format!("{}", tenths / 10)
    } else {
        format!("{}.{}", tenths / 10, tenths % 10)
    }
}

impl fmt::Display for Bytes {
    /// `512 MiB`, `1.5 GiB`, at most one decimal.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [("TiB", 1_u64 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
        let text = match units.iter().find(|(_, size)| self.0 >= *size) {
            Some((unit, size)) => format!("{} {unit}", one_decimal(self.0, *size)),
            None => format!("{} B", self.0),
        };
        f.pad(&text)
    }
}

impl fmt::Display for BitRate {
    /// `40 Mbit/s`, at most one decimal.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [("Gbit/s", 1_000_000_000_u64), ("Mbit/s", 1_000_000), ("kbit/s", 1000)];
        let text = match units.iter().find(|(_, size)| self.0 >= *size) {
            Some((unit, size)) => format!("{} {unit}", one_decimal(self.0, *size)),
            None => format!("{} bit/s", self.0),
        };
        f.pad(&text)
    }
}

impl fmt::Display for Iops {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{} iops", self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn people_write_amounts_in_many_ways() {
        assert_eq!("0.37".parse(), Ok(MilliCpu(370)));
        assert_eq!("370m".parse(), Ok(MilliCpu(370)));
        assert_eq!(".5".parse(), Ok(MilliCpu(500)));
        assert_eq!("512M".parse(), Ok(Bytes(512 << 20)));
        assert_eq!("1.5G".parse(), Ok(Bytes(3 << 29)));
        assert_eq!("2 GiB".parse(), Ok(Bytes(2 << 30)));
        assert_eq!("40mbit".parse(), Ok(BitRate(40_000_000)));
        assert_eq!("0.5Gbit/s".parse(), Ok(BitRate(500_000_000)));
        assert_eq!("300iops".parse(), Ok(Iops(300)));
    }

    #[test]
    fn nonsense_is_refused_with_what_and_why() {
        let message = |text: &str| text.parse::<MilliCpu>().unwrap_err().to_string();
        assert_eq!(message(""), "an amount is missing");
        assert_eq!(message("half"), "`half` is not a number");
        assert_eq!(message("1.2.3"), "`1.2.3` is not a number");
        assert_eq!(message("-1"), "`-1` is not a number");
        assert_eq!(message("2 cores"), "`cores` is not a unit of cpu; known: m (thousandths), or none");
        assert_eq!(message("0.0005"), "0.0005 is finer than the smallest step of cpu, 0.001");
        assert_eq!(message("99999999999999999999"), "99999999999999999999 is too large");
        assert!("40".parse::<BitRate>().is_err(), "a bandwidth without a unit is ambiguous");
        assert!(message(&"9".repeat(400)).contains("too large"));
    }

    #[test]
    fn amounts_are_shown_short_and_exact_enough() {
        assert_eq!(MilliCpu(1500).to_string(), "1.50");
        assert_eq!(MilliCpu(375).to_string(), "0.375");
        assert_eq!(Bytes(3 << 29).to_string(), "1.5 GiB");
        assert_eq!(Bytes(1023).to_string(), "1023 B");
        assert_eq!(BitRate(40_000_000).to_string(), "40 Mbit/s");
        assert_eq!(Bytes(u64::MAX).to_string(), "16777216 TiB");
    }

    proptest! {
        #[test]
        fn any_text_parses_or_is_refused(text in ".{0,40}") {
            let _ = text.parse::<MilliCpu>();
            let _ = text.parse::<Bytes>();
            let _ = text.parse::<BitRate>();
            let _ = text.parse::<Iops>();
        }

        #[test]
        fn a_cpu_amount_reads_back_as_shown(milli in 0..u64::MAX / 1000) {
            prop_assert_eq!(MilliCpu(milli).to_string().parse::<MilliCpu>(), Ok(MilliCpu(milli)));
        }
    }
}
