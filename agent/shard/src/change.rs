//! A change of an amount as people write it: `1.5`, `+10%`, `-0.5`.

use std::str::FromStr;

use crate::amount::ParseAmountError;

/// A change of an amount of kind `T`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change<T> {
    /// Exactly this much.
    To(T),
    /// This much more.
    Up(T),
    /// This much less.
    Down(T),
    /// By hundredths of a percent of what it is, up or down.
    Percent {
        /// `true` for `+`.
        up: bool,
        /// 1,000 is 10 %.
        centipercent: u32,
    },
}

impl<T: FromStr<Err = ParseAmountError>> FromStr for Change<T> {
    type Err = ParseAmountError;

    fn from_str(text: &str) -> Result<Self, ParseAmountError> {
        let text = text.trim();
        let (sign, rest) = match text.as_bytes().first() {
            Some(b'+') => (Some(true), &text[1..]),
            Some(b'-') => (Some(false), &text[1..]),
            _ => (None, text),
        };
        match (sign, rest.strip_suffix('%')) {
            (Some(up), Some(percent)) => {
                // A percentage has the same two decimals as a CPU amount has three: read it as thousandths, drop one.
                let milli = percent.parse::<crate::MilliCpu>()?.0;
                let centipercent =
                    u32::try_from(milli / 10).map_err(|_| ParseAmountError::TooLarge(text.to_owned()))?;
                Ok(Self::Percent { up, centipercent })
            }
            (None, Some(_)) => {
                Err(ParseAmountError::NotANumber(format!("{text} (write +{text} or -{text})")))
            }
            (Some(true), None) => rest.parse().map(Self::Up),
            (Some(false), None) => rest.parse().map(Self::Down),
            (None, None) => rest.parse().map(Self::To),
        }
    }
}

impl<T> Change<T> {
    /// The amount after the change of `now`, in smallest units; `None` when it would not fit or fall below zero. A percentage is
    /// rounded down to a multiple of `step`.
    pub fn apply(&self, now: u64, step: u64, value: impl Fn(&T) -> u64) -> Option<u64> {
        match self {
            Self::To(to) => Some(value(to)),
            Self::Up(by) => now.checked_add(value(by)),
            Self::Down(by) => now.checked_sub(value(by)),
            Self::Percent { up, centipercent } => {
                let by = u128::from(now) * u128::from(*centipercent) / 10_000;
                let by = u64::try_from(by).ok()?;
                let to = if *up { now.checked_add(by)? } else { now.checked_sub(by)? };
                Some(to - to % step.max(1))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MilliCpu;

    fn apply(text: &str, now: u64) -> Option<u64> {
        text.parse::<Change<MilliCpu>>().unwrap().apply(now, 1, |amount| amount.0)
    }

    #[test]
    fn changes_are_absolute_relative_or_in_percent() {
        assert_eq!(apply("1.5", 500), Some(1500));
        assert_eq!(apply("+0.5", 500), Some(1000));
        assert_eq!(apply("-0.5", 500), Some(0));
        assert_eq!(apply("-0.6", 500), None, "below zero is no amount");
        assert_eq!(apply("+10%", 500), Some(550));
        assert_eq!(apply("-50%", 501), Some(251));
        assert!("10%".parse::<Change<MilliCpu>>().is_err(), "a bare percentage is ambiguous");
    }
}
