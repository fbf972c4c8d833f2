//! "Did you mean": the known word nearest to an unknown one, and serde's sentence about unknown fields taken apart.

/// How similar a word must be to be suggested, 0 to 1 (Jaro-Winkler).
const MIN_SIMILARITY: f64 = 0.75;
/// Longest piece of foreign text that is repeated in a message, in characters.
const MAX_QUOTED_CHARS: usize = 64;

/// A field that nobody knows.
#[derive(Debug, PartialEq, Eq)]
pub struct Unknown<'a> {
    /// As it was written.
    pub field: &'a str,
    /// What may stand there.
    pub known: Vec<&'a str>,
}

impl Unknown<'_> {
    /// `unknown key "rate_mbits" (did you mean "rate_mbit"?)`; `what` is `key` or `field`.
    pub fn sentence(&self, what: &str) -> String {
        let field = quoted(self.field);
        match nearest(self.field, &self.known) {
            Some(near) => format!("unknown {what} {field} (did you mean \"{near}\"?)"),
            None if self.known.is_empty() => format!("unknown {what} {field}; there are none here"),
            None => format!("unknown {what} {field}; known: {}", self.known.join(", ")),
        }
    }
}

/// Takes serde's "unknown field `a`, expected `b` or `c`" apart; `None` for any other sentence.
pub fn unknown_field(message: &str) -> Option<Unknown<'_>> {
    let rest = message.split_once("unknown field `").or_else(|| message.split_once("unknown variant `"))?.1;
    let (field, rest) = rest.split_once("`, ").unwrap_or((rest.trim_end_matches('`'), ""));
    let known = rest.split('`').skip(1).step_by(2).collect();
    Some(Unknown { field, known })
}

/// The most similar of `known`, if any is similar at all.
pub fn nearest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    let similar = known.iter().map(|candidate| (strsim::jaro_winkler(word, candidate), *candidate));
    let best = similar.max_by(|left, right| left.0.total_cmp(&right.0))?;
    (best.0 >= MIN_SIMILARITY).then_some(best.1)
}

/// Foreign text in quotes: printable, and not longer than anybody wants to read.
pub fn quoted(text: &str) -> String {
    let mut shown: String = text.chars().take(MAX_QUOTED_CHARS).flat_map(char::escape_default).collect();
    if text.chars().count() > MAX_QUOTED_CHARS {
        shown.push('…');
    }
    format!("\"{shown}\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_fields_are_answered_with_the_nearest_known_one() {
        let unknown =
            unknown_field("unknown field `memry`, expected one of `cpu`, `memory`, `disk`").unwrap();
        assert_eq!(unknown, Unknown { field: "memry", known: vec!["cpu", "memory", "disk"] });
        assert_eq!(unknown.sentence("key"), "unknown key \"memry\" (did you mean \"memory\"?)");
    }

    #[test]
    fn a_field_unlike_all_others_gets_the_list() {
        let unknown =
            unknown_field("unknown field `colour`, expected `cpu` or `disk` at line 1 column 9").unwrap();
        assert_eq!(unknown.sentence("field"), "unknown field \"colour\"; known: cpu, disk");
        assert_eq!(unknown_field("missing field `cpu`"), None);
        let none = unknown_field("unknown field `x`, there are no fields").unwrap();
        assert_eq!(none.sentence("field"), "unknown field \"x\"; there are none here");
    }

    #[test]
    fn quoting_bounds_and_escapes() {
        assert_eq!(quoted("a\u{1b}[31m"), "\"a\\u{1b}[31m\"");
        assert!(quoted(&"x".repeat(10_000)).len() < 100);
    }
}
