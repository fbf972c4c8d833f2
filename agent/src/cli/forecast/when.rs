//! Times as people write them: `18:00`, `2026-11-24 18:00`, with `+01:00` behind where it is not UTC; and the other way round.

/// Seconds of a day.
pub const DAY: u64 = 86_400;

/// When something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
    /// Seconds since midnight, UTC.
    OfDay(u64),
    /// Seconds since the epoch.
    Once(u64),
}

/// `18:00`, `2026-11-24T18:00` or `2026-11-24 18:00`, with `Z` or `+01:00` behind if wanted; `24:00` is the end of a day.
///
/// # Errors
/// What it should look like.
pub fn parse(text: &str) -> Result<At, String> {
    let text = text.trim();
    let wrong = || format!("{text:?} is no time: write 18:00, 2026-11-24T18:00, or with +01:00 behind it");
    let (date, time) = match text.split_once(['T', ' ']) {
        Some((date, time)) => (Some(date), time),
        None => (None, text),
    };
    let (time, offset_sec) = zone(time).ok_or_else(wrong)?;
    let of_day = of_day(time).ok_or_else(wrong)? - offset_sec;
    match date {
        None => Ok(At::OfDay(of_day.rem_euclid(DAY as i64) as u64)),
        Some(date) => {
            let seconds = midnight(date).ok_or_else(wrong)? + of_day;
            u64::try_from(seconds).map(At::Once).map_err(|_| wrong())
        }
    }
}

/// What is before the zone, and how far it is ahead of UTC.
fn zone(time: &str) -> Option<(&str, i64)> {
    if let Some(time) = time.strip_suffix('Z') {
        return Some((time, 0));
    }
    let Some(at) = time.rfind(['+', '-']) else { return Some((time, 0)) };
    let (time, offset) = time.split_at(at);
    let seconds = of_day(&offset[1..]).filter(|seconds| *seconds <= 14 * 3600)?;
    Some((time, if offset.starts_with('-') { -seconds } else { seconds }))
}

/// Seconds of `HH:MM`.
fn of_day(time: &str) -> Option<i64> {
    let (hours, minutes) = time.split_once(':')?;
    let number = |digits: &str, most: i64| {
        let fine = digits.len() == 2 && digits.bytes().all(|byte| byte.is_ascii_digit());
        digits.parse::<i64>().ok().filter(|number| fine && *number <= most)
    };
    let seconds = number(hours, 24)? * 3600 + number(minutes, 59)? * 60;
    (seconds <= DAY as i64).then_some(seconds)
}

/// Seconds since the epoch at the beginning of `YYYY-MM-DD`.
fn midnight(date: &str) -> Option<i64> {
    let mut parts = date.split('-');
    let mut number = |digits: usize| {
        let part = parts.next().filter(|part| part.len() == digits)?;
        part.bytes().all(|byte| byte.is_ascii_digit()).then(|| part.parse::<i64>().ok())?
    };
    let (year, month, day) = (number(4)?, number(2)?, number(2)?);
    if parts.next().is_some() || !(1970..=9998).contains(&year) || !(1..=12).contains(&month) {
        return None;
    }
    // Days from a civil date: H. Hinnant, "chrono-Compatible Low-Level Date Algorithms". Years begin with March there.
    let days = |year: i64, month: i64, day: i64| {
        let year = year - i64::from(month <= 2);
        let (era, of_era) = (year / 400, year % 400);
        let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
        era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + day_of_year - 719_468
    };
    let (next_year, next_month) = if month == 12 { (year + 1, 1) } else { (year, month + 1) };
    let length = days(next_year, next_month, 1) - days(year, month, 1);
    (1..=length).contains(&day).then(|| days(year, month, day) * DAY as i64)
}

/// An announced event as people write it: its name, whether it is daily, and when it begins.
///
/// # Errors
/// What it should look like.
pub fn event(text: &str, for_sec: u64, now_sec: u64) -> Result<(String, bool, u64), String> {
    let wrong = || {
        format!(
            "{text:?} announces nothing: write \"18:00 sale\", \"daily 18:00 sale\" or \"2026-11-24 18:00 sale\""
        )
    };
    let (first, rest) = text.trim().split_once(' ').ok_or_else(wrong)?;
    let named = |name: &str| {
        let name = name.trim().to_owned();
        if name.is_empty() { Err(wrong()) } else { Ok(name) }
    };
    if first == "now" {
        return Ok((named(rest)?, false, now_sec));
    }
    if first.contains(':') {
        let at = parse(first)?;
        return match at {
            At::Once(at) => Ok((named(rest)?, false, at)),
            At::OfDay(of_day) => {
                // Today's, as long as it is not over.
                let today = now_sec / DAY * DAY + of_day;
                let yesterday = today.saturating_sub(DAY);
                let begins =
                    [yesterday, today, today + DAY].into_iter().find(|begins| begins + for_sec > now_sec);
                Ok((named(rest)?, false, begins.unwrap_or(today)))
            }
        };
    }
    let (time, name) = rest.trim().split_once(' ').ok_or_else(wrong)?;
    if first == "daily" {
        return match parse(time)? {
            At::OfDay(of_day) => Ok((named(name)?, true, of_day)),
            At::Once(_) => Err(wrong()),
        };
    }
    match parse(&format!("{first}T{time}"))? {
        At::Once(at) => Ok((named(name)?, false, at)),
        At::OfDay(_) => Err(wrong()),
    }
}

/// `18:00`.
pub fn clock(of_day_sec: u64) -> String {
    format!("{:02}:{:02}", of_day_sec % DAY / 3600, of_day_sec % 3600 / 60)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::svg;
    use super::*;

    /// 2026-11-22 00:00 UTC.
    const MIDNIGHT: u64 = 1_795_305_600;

    #[test]
    fn times_are_read_as_written() {
        assert_eq!(parse("18:30"), Ok(At::OfDay(66_600)));
        assert_eq!(parse("00:30+01:00"), Ok(At::OfDay(DAY - 1800)));
        assert_eq!(parse("24:00"), Ok(At::OfDay(0)));
        assert_eq!(parse("2026-11-22T00:00"), Ok(At::Once(MIDNIGHT)));
        assert_eq!(parse("2026-11-22 01:00+02:00"), Ok(At::Once(MIDNIGHT - 3600)));
        assert_eq!(parse("2000-02-29T00:00Z"), Ok(At::Once(951_782_400)));
        for bad in [
            "",
            "8:00",
            "25:00",
            "24:01",
            "12:60",
            "2026-02-29T00:00",
            "2026-13-01T00:00",
            "2026-1-1T00:00",
            "2026-01-00T00:00",
            "1969-12-31T00:00",
            "18:00+15:00",
            "18:00+",
            "+01:00",
            "a:bb",
            "18:00Zx",
            "1970-01-01T00:00+01:00",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn events_are_today_unless_they_are_over() {
        let noon = MIDNIGHT + DAY / 2;
        let at = |text: &str| event(text, 3600, noon).unwrap();
        assert_eq!(at("18:00 big sale"), ("big sale".into(), false, MIDNIGHT + 18 * 3600));
        assert_eq!(at("11:30 sale").2, MIDNIGHT + 41_400, "it goes on");
        assert_eq!(at("11:00 sale").2, MIDNIGHT + DAY + 39_600, "tomorrow");
        assert_eq!(
            event("23:00 sale", 7200, MIDNIGHT + 60).unwrap().2,
            MIDNIGHT - 3600,
            "it goes on since yesterday"
        );
        assert_eq!(at("daily 18:00 sale"), ("sale".into(), true, 18 * 3600));
        assert_eq!(at("2026-11-24 18:00 sale").2, MIDNIGHT + 2 * DAY + 18 * 3600);
        assert_eq!(at("2026-11-24T18:00 sale").2, MIDNIGHT + 2 * DAY + 18 * 3600);
        assert_eq!(at("now sale"), ("sale".into(), false, noon));
        for bad in
            ["", "sale", "18:00", "18:00  ", "daily sale", "daily 2026-11-24T18:00 x", "tomorrow 18:00 sale"]
        {
            assert!(event(bad, 3600, noon).is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(minutes in 0_u64..100_000_000) {
            let at = minutes * 60;
            prop_assert_eq!(parse(&svg::date(at)), Ok(At::Once(at)));
        }

        #[test]
        fn any_text_is_survived(text in "[0-9a-zäT: +-]{0,30}") {
            let _ = parse(&text);
            let _ = event(&text, 60, 0);
        }
    }
}
