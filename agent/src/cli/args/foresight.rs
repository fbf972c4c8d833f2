//! Options about a machine's future.

use clap::{Args, ValueEnum};
use lathe_shard::{Bytes, MilliCpu};

use crate::api::wire::foresight::{ForesightChoice, ForesightMode};
use crate::foresight::MAX_AGGRESSIVENESS;

/// `--foresight`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ModeWord {
    /// It is not profiled
    Off,
    /// It is profiled and forecast, and lathe why says what would be done
    Observe,
    /// It is resized so
    On,
}

impl From<ModeWord> for ForesightMode {
    fn from(word: ModeWord) -> Self {
        match word {
            ModeWord::Off => Self::Off,
            ModeWord::Observe => Self::Observe,
            ModeWord::On => Self::On,
        }
    }
}

/// `--mode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ChoiceWord {
    /// As the host is configured, its aggressiveness too
    Host,
    /// It is not profiled
    Off,
    /// It is profiled and forecast, and lathe why says what would be done
    Observe,
    /// It is resized so
    On,
}

impl From<ChoiceWord> for ForesightChoice {
    fn from(word: ChoiceWord) -> Self {
        match word {
            ChoiceWord::Host => Self::Host,
            ChoiceWord::Off => Self::Off,
            ChoiceWord::Observe => Self::Observe,
            ChoiceWord::On => Self::On,
        }
    }
}

/// Options of `lathe run` about what it becomes by itself.
#[derive(Debug, Args)]
pub struct GrowthArgs {
    /// CPUs that lathed leaves it at least of its own accord [default: 0.05]
    #[arg(long, value_name = "CPUS")]
    pub cpu_min: Option<MilliCpu>,
    /// Memory that lathed leaves it at least of its own accord [default: 64M]
    #[arg(long, value_name = "BYTES")]
    pub memory_min: Option<Bytes>,
    /// What is done about its future [default: as the host is configured]
    #[arg(long, value_enum, value_name = "MODE")]
    pub foresight: Option<ModeWord>,
    /// 0 (keeps more and changes seldom) to 1 (close to what it asks for) [default: as the host is configured]
    #[arg(long, value_name = "0..1", value_parser = aggressiveness)]
    pub aggressiveness: Option<u16>,
}

/// Options of `lathe forecast` that change something.
#[derive(Debug, Args)]
pub struct SettingArgs {
    /// Change what is done about its future, and draw nothing
    #[arg(long, value_enum, conflicts_with_all = ["over", "svg"])]
    pub mode: Option<ChoiceWord>,
    /// Change how close it is kept to what it asks for, 0 (keeps more and changes seldom) to 1, and draw nothing
    #[arg(long, value_name = "0..1", value_parser = aggressiveness, conflicts_with_all = ["over", "svg"])]
    pub aggressiveness: Option<u16>,
}

/// Thousandths of a number between 0 and 1 with at most three decimals.
fn aggressiveness(text: &str) -> Result<u16, String> {
    let wrong = || format!("{text} is not between 0 and 1 in steps of 0.001, such as 0.5");
    let (whole, decimals) = text.trim().split_once('.').unwrap_or((text.trim(), "0"));
    let digits =
        |part: &str| !part.is_empty() && part.len() <= 3 && part.bytes().all(|byte| byte.is_ascii_digit());
    if !digits(whole) || !digits(decimals) {
        return Err(wrong());
    }
    let number = |digits: &str| digits.parse::<u32>().map_err(|_| wrong());
    let permille = number(whole)? * 1000 + number(&format!("{decimals:0<3}"))?;
    u16::try_from(permille).ok().filter(|permille| *permille <= MAX_AGGRESSIVENESS).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aggressiveness_is_counted_in_thousandths() {
        let good = ["0", "1", "1.0", "0.5", "0.05", "0.125", " 0.7 "];
        assert_eq!(good.map(|text| aggressiveness(text).unwrap()), [0, 1000, 1000, 500, 50, 125, 700]);
        for text in ["", "-0.1", "1.001", "0.1234", ".5", "0.", "1e0", "nan", "0,5", "2", "999999"] {
            assert!(aggressiveness(text).is_err(), "{text}");
        }
    }
}
