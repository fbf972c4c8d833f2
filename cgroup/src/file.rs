//! Reading and writing one kernel file. Never creates a file: on cgroupfs there is nothing to create, and a file that
//! is not there is an answer.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::Path;

use crate::error::{Error, check_for};

/// Largest file that is read whole. `memory.stat` has about 2 KiB, `cgroup.threads` 8 bytes for each thread.
const FILE_BYTES_MAX: u64 = 256 * 1024;
/// Of an unexpected content, so much is quoted in the error.
const QUOTE_CHARS: usize = 60;

/// The whole file.
pub(crate) fn read(file: &Path) -> Result<String, Error> {
    let mut content = String::new();
    File::open(file)
        .and_then(|f| f.take(FILE_BYTES_MAX).read_to_string(&mut content))
        .map_err(|source| read_error(file, source))?;
    Ok(content)
}

/// The whole file, or `None` where this kernel has no such file.
pub(crate) fn read_if_there(file: &Path) -> Result<Option<String>, Error> {
    match read(file) {
        Ok(content) => Ok(Some(content)),
        Err(Error::Read { source, .. }) if absent(&source) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Writes with one write(2), as the kernel wants it.
pub(crate) fn write(file: &Path, value: &str) -> Result<(), Error> {
    OpenOptions::new()
        .write(true)
        .truncate(true)
        .open(file)
        .and_then(|mut f| f.write_all(value.as_bytes()))
        .map_err(|source| write_error(file, value, source))
}

pub(crate) fn write_error(file: &Path, value: &str, source: io::Error) -> Error {
    Error::Write { file: file.into(), value: value.into(), check: check_for(&source), source }
}

pub(crate) fn read_error(file: &Path, source: io::Error) -> Error {
    Error::Read { file: file.into(), check: check_for(&source), source }
}

/// One number. `max` is no number: see [`read_max`].
pub(crate) fn read_u64(file: &Path) -> Result<u64, Error> {
    let content = read(file)?;
    content.trim().parse().map_err(|_| unexpected(file, &content, "one number"))
}

/// One number, or `None` for `max`.
pub(crate) fn read_max(file: &Path) -> Result<Option<u64>, Error> {
    let content = read(file)?;
    parse_max(content.trim()).ok_or_else(|| unexpected(file, &content, "a number or `max`"))
}

/// `max` or a number; `None` if it is neither.
pub(crate) fn parse_max(text: &str) -> Option<Option<u64>> {
    if text == "max" { Some(None) } else { text.parse().ok().map(Some) }
}

/// A flat keyed file (`KEY VALUE` lines): the value of one key, 0 where the kernel does not have it.
pub(crate) fn keyed(content: &str, key: &str) -> u64 {
    content
        .lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(k, _)| *k == key)
        .and_then(|(_, value)| value.trim().parse().ok())
        .unwrap_or(0)
}

/// One number for each line: pids or tids.
pub(crate) fn read_ids(file: &Path) -> Result<Vec<u32>, Error> {
    let content = read(file)?;
    content
        .lines()
        .map(|line| line.trim().parse().map_err(|_| unexpected(file, line, "one id for each line")))
        .collect()
}

pub(crate) fn unexpected(file: &Path, content: &str, expected: &'static str) -> Error {
    Error::Content { file: file.into(), content: content.chars().take(QUOTE_CHARS).collect(), expected }
}

/// The file is not there: an older kernel, PSI off (EOPNOTSUPP), or a removed cgroup.
fn absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::Unsupported)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_file_is_not_created() {
        let dir = tempfile::tempdir().expect("a folder");
        let file = dir.path().join("cpu.max");
        let error = write(&file, "1000 10000").expect_err("nothing to write to");
        assert!(!file.exists());
        assert!(error.to_string().contains("cpu.max") && error.to_string().contains("1000 10000"), "{error}");
    }

    #[test]
    fn keyed_values_are_found_exactly() {
        let content = "usage_usec 12\nuser_usec 7\nnr_throttled 3\n";
        assert_eq!(keyed(content, "usage_usec"), 12);
        assert_eq!(keyed(content, "usec"), 0);
        assert_eq!(keyed(content, "nr_throttled"), 3);
    }

    #[test]
    fn max_is_not_a_number() {
        assert_eq!(parse_max("max"), Some(None));
        assert_eq!(parse_max("17"), Some(Some(17)));
        assert_eq!(parse_max("-1"), None);
        assert_eq!(parse_max(""), None);
    }
}
