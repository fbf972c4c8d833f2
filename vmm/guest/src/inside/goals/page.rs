//! A page of metrics, line by line: Prometheus' text format 0.0.4 and OpenMetrics 1.0, whichever it is.
//!
//! ```text
//! # TYPE web_seconds histogram                              ─► Declared::Type
//! web_seconds_bucket{path="/",le="0.1"} 17 # {id="x"} 0.07  ─► Sample: name, labels, value; exemplars and times are not looked at
//! # EOF                                                     ─► the end
//! ```
//! Pure, and tolerant of what neither format allows: what makes no sense is passed over. Nothing is allocated; a name that nobody asked for
//! costs its line's end. No library parses it here: this binary is 1 MiB in guests that pay for it.

use std::io::BufRead;

/// Lines of a page without blanks and line ends around them, until `# EOF`.
pub struct Lines<'a> {
    rest: &'a [u8],
}

impl<'a> Lines<'a> {
    /// Of this page.
    pub fn of(page: &'a [u8]) -> Self {
        Self { rest: page }
    }
}

impl<'a> Iterator for Lines<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        let before = self.rest;
        // Of a slice it fails never; it finds the line's end by memchr(3).
        let length = self.rest.skip_until(b'\n').unwrap_or(0);
        let line = before.get(..length).filter(|line| !line.is_empty())?.trim_ascii();
        if line == b"# EOF" { None } else { Some(line) }
    }
}

/// What a line beginning with `#` declares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Declared<'a> {
    /// The kind of a family of metrics.
    Type(&'a [u8], Kind),
    /// The unit of a family of metrics.
    Unit(&'a [u8], &'a [u8]),
}

/// Kinds of families.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only grows.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Counts in buckets.
    Histogram,
    /// Tells quantiles.
    Summary,
    /// Not said.
    Untyped,
    /// None that a goal can use.
    Other,
}

impl Kind {
    fn of(word: &[u8]) -> Self {
        match word {
            b"counter" => Self::Counter,
            b"gauge" => Self::Gauge,
            b"histogram" => Self::Histogram,
            b"summary" => Self::Summary,
            b"untyped" | b"unknown" => Self::Untyped,
            _ => Self::Other,
        }
    }

    /// As it is called.
    pub fn name(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
            Self::Summary => "summary",
            Self::Untyped => "of no declared type",
            Self::Other => "of a type without use here",
        }
    }
}

/// What this line declares, if it does.
pub fn declared(line: &[u8]) -> Option<Declared<'_>> {
    let mut words = line.strip_prefix(b"#")?.split(|byte| is_blank(*byte)).filter(|word| !word.is_empty());
    let keyword = words.next()?;
    let name = words.next().filter(|name| is_name(name))?;
    match (keyword, words.next()?) {
        (b"TYPE", word) => Some(Declared::Type(name, Kind::of(word))),
        (b"UNIT", word) => Some(Declared::Unit(name, word)),
        _ => None,
    }
}

/// One number.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample<'a> {
    /// Of a valid form.
    pub name: &'a [u8],
    /// What is between the braces.
    pub labels: &'a [u8],
    /// What it is.
    pub value: f64,
}

/// The number on this line, if there is one.
pub fn sample(line: &[u8]) -> Option<Sample<'_>> {
    let end = line.iter().position(|byte| *byte == b'{' || is_blank(*byte))?;
    let (name, rest) = line.split_at_checked(end).filter(|(name, _)| is_name(name))?;
    let rest = rest.trim_ascii_start();
    let (labels, rest) = match rest.strip_prefix(b"{") {
        Some(inner) => {
            let (labels, rest) = inner.split_at_checked(closing(inner)?)?;
            (labels, rest.strip_prefix(b"}")?.trim_ascii_start())
        }
        None => (&b""[..], rest),
    };
    let value = rest.split(|byte| is_blank(*byte)).next()?;
    Some(Sample { name, labels, value: number(value)? })
}

/// The value of a label as it is written, escapes included; numbers have none.
pub fn label<'a>(mut labels: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    loop {
        labels = labels.trim_ascii_start();
        if let Some(rest) = labels.strip_prefix(b",") {
            labels = rest;
            continue;
        }
        let (key, rest) = split(labels, b'=')?;
        let quoted = rest.trim_ascii_start().strip_prefix(b"\"")?;
        let (value, rest) = quoted.split_at_checked(unescaped(quoted, b'"')?)?;
        if key.trim_ascii() == name {
            return Some(value);
        }
        labels = rest.strip_prefix(b"\"")?;
    }
}

/// A number as either format writes it: `1`, `1e-3`, `+Inf`, `NaN`.
pub fn number(text: &[u8]) -> Option<f64> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// Whether this is a name of a metric: nothing that does strange things to whoever prints it.
pub fn is_name(name: &[u8]) -> bool {
    let letter = |byte: &u8| byte.is_ascii_alphanumeric() || [b'_', b':'].contains(byte);
    name.first().is_some_and(|first| !first.is_ascii_digit()) && name.iter().all(letter)
}

fn is_blank(byte: u8) -> bool {
    byte == b' ' || byte == b'\t'
}

fn split(bytes: &[u8], at: u8) -> Option<(&[u8], &[u8])> {
    let end = bytes.iter().position(|byte| *byte == at)?;
    Some((bytes.get(..end)?, bytes.get(end + 1..)?))
}

/// Where the first such byte is that no backslash stands before.
fn unescaped(bytes: &[u8], wanted: u8) -> Option<usize> {
    let mut escaped = false;
    bytes.iter().position(|byte| {
        let found = *byte == wanted && !escaped;
        escaped = *byte == b'\\' && !escaped;
        found
    })
}

/// Where the brace is that closes the labels: not in quotes.
fn closing(bytes: &[u8]) -> Option<usize> {
    let (mut quoted, mut escaped) = (false, false);
    bytes.iter().position(|byte| {
        let (was_quoted, was_escaped) = (quoted, escaped);
        quoted ^= *byte == b'"' && !was_escaped;
        escaped = was_quoted && *byte == b'\\' && !was_escaped;
        *byte == b'}' && !was_quoted
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lines_end_in_either_way_and_the_page_at_its_end() {
        let lines = |page: &'static [u8]| Lines::of(page).collect::<Vec<_>>();
        assert_eq!(lines(b"a 1\r\n\n  b 2\nc 3"), [&b"a 1"[..], b"", b"b 2", b"c 3"]);
        assert_eq!(lines(b"a 1\n# EOF\nb 2\n"), [b"a 1"]);
        assert!(lines(b"").is_empty());
    }

    #[test]
    fn declarations() {
        let of = |line: &'static [u8]| declared(line);
        assert_eq!(of(b"# TYPE a_total counter"), Some(Declared::Type(b"a_total", Kind::Counter)));
        assert_eq!(of(b"#\tTYPE  a:b   histogram "), Some(Declared::Type(b"a:b", Kind::Histogram)));
        assert_eq!(of(b"# TYPE a gaugehistogram"), Some(Declared::Type(b"a", Kind::Other)));
        assert_eq!(of(b"# UNIT a seconds"), Some(Declared::Unit(b"a", b"seconds")));
        for nothing in
            [&b"# HELP a counter"[..], b"# TYPE a", b"# TYPE \x1b[2J counter", b"#", b"", b"TYPE a counter"]
        {
            assert_eq!(declared(nothing), None, "{}", nothing.escape_ascii());
        }
    }

    #[test]
    fn samples_of_either_format() {
        let of = |line: &'static [u8]| sample(line).map(|sample| (sample.name, sample.labels, sample.value));
        assert_eq!(of(b"a 1"), Some((&b"a"[..], &b""[..], 1.0)));
        assert_eq!(of(b"a{} 1.5e3 1700000000000"), Some((&b"a"[..], &b""[..], 1500.0)));
        let exemplar = b"a_bucket{le=\"0.1\"} 8 1700.5 # {trace=\"x} 9\"} 0.07 1700.1";
        assert_eq!(of(exemplar), Some((&b"a_bucket"[..], &b"le=\"0.1\""[..], 8.0)));
        let escaped = br#"a { path = "/\"}{\\" , le="+Inf", } +Inf"#;
        assert_eq!(of(escaped).map(|(_, _, value)| value), Some(f64::INFINITY));
        assert_eq!(of(escaped).and_then(|(_, labels, _)| label(labels, b"le")), Some(&b"+Inf"[..]));
        assert_eq!(of(escaped).and_then(|(_, labels, _)| label(labels, b"path")), Some(&br#"/\"}{\\"#[..]));
        assert_eq!(of(escaped).and_then(|(_, labels, _)| label(labels, b"e")), None);
        assert!(of(b"a NaN").is_some_and(|(_, _, value)| value.is_nan()));
        for nothing in
            [&b"a"[..], b"a ", b"a{", b"a{b=\"} 1", b"a x", b"1a 1", b"\xff 1", b"{} 1", b"a{b=\"\\\"} 1"]
        {
            assert_eq!(sample(nothing), None, "{}", nothing.escape_ascii());
        }
        for nothing in [&b"le"[..], b"le=", b"le=1", b"le=\"1", b"a=\"1\"x", b",,,", b""] {
            assert_eq!(label(nothing, b"le"), None, "{}", nothing.escape_ascii());
        }
    }

    proptest! {
        #[test]
        fn whatever_a_page_says_it_is_read_to_its_end(page in prop::collection::vec(any::<u8>(), 0..300)) {
            for line in Lines::of(&page) {
                let (_, sample) = (declared(line), sample(line));
                if let Some(sample) = sample {
                    prop_assert!(is_name(sample.name));
                    label(sample.labels, b"le");
                }
            }
        }

        #[test]
        fn labels_are_found_whatever_the_others_are(other in ".{0,40}", le in "[0-9]{1,5}") {
            let written = other.replace('\\', r"\\").replace('"', r#"\""#).replace('\n', r"\n");
            let line = format!("a_bucket{{other=\"{written}\",le=\"{le}\"}} 7 # {{x=\"{written}\"}} 1");
            let sample = sample(line.as_bytes()).unwrap();
            prop_assert_eq!(sample.value, 7.0);
            prop_assert_eq!(label(sample.labels, b"le"), Some(le.as_bytes()));
            prop_assert_eq!(label(sample.labels, b"other"), Some(written.as_bytes()));
        }
    }
}
