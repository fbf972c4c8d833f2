//! The manual keeps up with the code.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Codes that the page explains: the first words of its tagged paragraphs.
fn explained() -> BTreeSet<String> {
    let page = include_str!("../../../../systemd/man/lathe-errors.7");
    let lines: Vec<_> = page.lines().collect();
    let tags =
        lines.windows(2).filter(|pair| pair[0] == ".TP").filter_map(|pair| pair[1].strip_prefix(".B "));
    tags.flat_map(|tag| tag.split(", ")).map(|code| code.replace("\\-", "-")).collect()
}

fn sources(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { sources(&path) } else { vec![path] }).collect()
}

/// The string literal that `text` begins with, if it is a code.
fn code(text: &str) -> Option<String> {
    let code = text.trim_start().strip_prefix('"')?.split('"').next()?;
    let kebab = !code.is_empty() && code.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-');
    kebab.then(|| code.to_owned())
}

/// Codes of problems: what follows a kind, what `bad(` begins with, what ends in `-over-capacity`, and the peers' own.
fn used() -> BTreeSet<String> {
    let mut codes = BTreeSet::new();
    for path in sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src")) {
        if path.components().any(|part| part.as_os_str() == "tests") {
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        for (at, _) in text.match_indices("Kind::") {
            let rest = &text[at + 6..];
            codes.extend(
                rest.split_once(',').filter(|(kind, _)| kind.len() < 16).and_then(|(_, rest)| code(rest)),
            );
        }
        for mark in ["bad(", "kind, ", "error[", "Refusal::new(", "=> "] {
            let found = text.match_indices(mark).filter_map(|(at, _)| code(&text[at + mark.len()..]));
            codes.extend(found.filter(|code| mark != "=> " || code.starts_with("peer-")));
        }
        codes.extend(
            text.split('"')
                .filter(|word| word.ends_with("-over-capacity"))
                .filter_map(|word| code(&format!("\"{word}\""))),
        );
    }
    codes
}

#[test]
fn every_error_code_is_explained_in_the_manual() {
    let (explained, used) = (explained(), used());
    let missing: Vec<_> = used.difference(&explained).collect();
    assert!(missing.is_empty(), "systemd/man/lathe-errors.7 does not explain {missing:?}");
    assert!(used.len() > 50, "the search finds too little: {used:?}");
}

#[test]
fn the_manual_explains_nothing_that_is_gone() {
    let used = used();
    let printed_otherwise = ["config"];
    let gone: Vec<_> = explained()
        .into_iter()
        .filter(|code| !used.contains(code) && !printed_otherwise.contains(&code.as_str()))
        .collect();
    assert!(gone.is_empty(), "systemd/man/lathe-errors.7 explains {gone:?}, which nothing says");
}
