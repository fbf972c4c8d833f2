//! Small files of /proc and cgroupfs, read one after the other into the same memory.

use std::fs::File;
use std::io::Read;
use std::path::Path;

/// What is beyond in a file is not looked at: none that is read here is as long in an ordinary guest.
const MAX_BYTES: usize = 32 * 1024;

/// Reads files.
#[derive(Default)]
pub struct Files {
    buffer: Vec<u8>,
    /// How many have been opened, whether they were there or not.
    pub opened: u64,
}

impl Files {
    /// What is in the file, as far as it is UTF-8; `None` when it cannot be read.
    pub fn read(&mut self, path: &Path) -> Option<&str> {
        self.opened += 1;
        self.buffer.clear();
        let file = File::open(path).ok()?;
        file.take(MAX_BYTES as u64).read_to_end(&mut self.buffer).ok()?;
        let valid = match std::str::from_utf8(&self.buffer) {
            Ok(text) => text.len(),
            Err(error) => error.valid_up_to(),
        };
        std::str::from_utf8(&self.buffer[..valid]).ok()
    }

    /// The number that the file begins with.
    pub fn number(&mut self, path: &Path) -> Option<u64> {
        self.read(path)?.split_whitespace().next()?.parse().ok()
    }
}

/// The number behind `name` at the beginning of a line: `name 123`, `name: 123 kB`.
pub fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| {
        let rest = line.strip_prefix(name)?;
        let rest = rest.strip_prefix(':').unwrap_or(rest);
        rest.starts_with(char::is_whitespace).then_some(rest)
    })?;
    line.split_whitespace().next()?.parse().ok()
}

/// Microseconds in which some task waited, of a file of accounting/psi.rst: `some avg10=0.00 avg60=0.00 avg300=0.00 total=123`.
pub fn stalled_usec(text: &str) -> Option<u64> {
    let some = text.lines().find_map(|line| line.strip_prefix("some "))?;
    some.split_whitespace().find_map(|word| word.strip_prefix("total="))?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_whole_words() {
        let text = "anon 10\nanon_thp 20\nfile 30\nMemTotal:   40 kB\nfoo x\n";
        let fields = ["anon", "file", "MemTotal", "Mem", "foo", "bar"].map(|name| field(text, name));
        assert_eq!(fields, [Some(10), Some(30), Some(40), None, None, None]);
        assert_eq!(stalled_usec("some avg10=0.00 total=77\nfull avg10=0.00 total=5\n"), Some(77));
        assert_eq!(stalled_usec("full total=5\n"), None);
    }

    #[test]
    fn what_is_no_text_is_cut_before_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, b"12 \xff\xff").unwrap();
        let mut files = Files::default();
        assert_eq!(files.number(&path), Some(12));
        std::fs::write(&path, vec![b'7'; 2 * MAX_BYTES]).unwrap();
        assert_eq!(files.read(&path).map(str::len), Some(MAX_BYTES));
        assert_eq!(files.read(folder.path()), None);
        assert_eq!(files.opened, 3);
    }
}
