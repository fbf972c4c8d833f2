//! Reads an archive made by tar(1): POSIX ustar, pax extensions, GNU long names (tar(5)). What is hostile in it stays words: no path is
//! followed, nothing is created; [`super::rootfs`] decides what becomes of the entries.

use std::io::{self, Read};

use crate::nearest::quoted;
use crate::problem::{Kind, Problem};

/// tar's unit in bytes.
const BLOCK_BYTES: usize = 512;
/// Longest extension record (long name, pax header) in bytes.
const MAX_EXTENSION_BYTES: u64 = 64 * 1024;
/// Longest path in bytes.
pub const MAX_PATH_BYTES: usize = 1024;

/// What an entry is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kinds {
    /// A file with this many bytes, to be read from [`Reader::contents`] before the next entry.
    File(u64),
    /// The same file as another path.
    HardLink(String),
    /// Points to a path.
    SymLink(String),
    /// A folder.
    Folder,
    /// A character device.
    Char(u32, u32),
    /// A block device.
    Block(u32, u32),
    /// A named pipe.
    Pipe,
}

/// One entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Without leading `/` and `./`, without `..`; empty for the root itself.
    pub path: String,
    /// What it is.
    pub kind: Kinds,
    /// Permission bits, 0..=0o7777.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds since 1970.
    pub mtime: u32,
}

/// What the next header's fields are replaced with.
#[derive(Default)]
struct Overrides {
    path: Option<String>,
    link: Option<String>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
}

/// Reads entries one after the other.
pub struct Reader<R> {
    source: R,
    /// Bytes of the present entry that were not read yet, with padding.
    left: u64,
    /// Bytes of padding within `left`.
    padding: u64,
}

fn bad(message: impl Into<String>) -> Problem {
    Problem::new(
        Kind::BadRequest,
        "image-format",
        format!("that is no archive to make an image of: {}", message.into()),
    )
}

fn broken(error: io::Error) -> Problem {
    if error.kind() == io::ErrorKind::UnexpectedEof {
        bad("it ends early")
    } else {
        Problem::internal("reading the archive", error)
    }
}

impl<R: Read> Reader<R> {
    /// Begins at the source's beginning.
    pub fn new(source: R) -> Self {
        Self { source, left: 0, padding: 0 }
    }

    /// The contents of the entry that [`Reader::next_entry`] gave last.
    pub fn contents(&mut self) -> impl Read + '_ {
        Contents { reader: self }
    }

    /// The next entry; `None` at the end.
    ///
    /// # Errors
    /// `image-format` with what is wrong.
    pub fn next_entry(&mut self) -> Result<Option<Entry>, Problem> {
        let mut overrides = Overrides::default();
        loop {
            self.skip()?;
            let Some(header) = self.header()? else { return Ok(None) };
            let size = number(&header[124..136])?;
            match header[156] {
                b'L' => overrides.path = Some(text(&self.extension(size)?)?),
                b'K' => overrides.link = Some(text(&self.extension(size)?)?),
                b'x' => pax(&self.extension(size)?, &mut overrides)?,
                b'g' => drop(self.extension(size)?),
                _ => return self.entry(&header, overrides).map(Some),
            }
        }
    }

    /// Leaves what is unread of the present entry behind.
    fn skip(&mut self) -> Result<(), Problem> {
        let skipped = io::copy(&mut (&mut self.source).take(self.left), &mut io::sink()).map_err(broken)?;
        if skipped < self.left {
            return Err(bad("it ends early"));
        }
        (self.left, self.padding) = (0, 0);
        Ok(())
    }

    /// The next header; `None` at the end mark or the end of the file.
    fn header(&mut self) -> Result<Option<[u8; BLOCK_BYTES]>, Problem> {
        let mut block = [0; BLOCK_BYTES];
        match self.source.read_exact(&mut block) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            read => read.map_err(broken)?,
        }
        if block.iter().all(|&byte| byte == 0) {
            return Ok(None);
        }
        let blank = |at: usize| if (148..156).contains(&at) { b' ' } else { block[at] };
        let sum: u64 = (0..BLOCK_BYTES).map(|at| u64::from(blank(at))).sum();
        if number(&block[148..156])? != sum {
            return Err(bad("a header's check sum is wrong"));
        }
        Ok(Some(block))
    }

    /// The contents of an extension record.
    fn extension(&mut self, size: u64) -> Result<Vec<u8>, Problem> {
        if size > MAX_EXTENSION_BYTES {
            return Err(bad(format!("an extension of {size} bytes, more than {MAX_EXTENSION_BYTES}")));
        }
        self.begin(size);
        let mut bytes = Vec::new();
        self.contents().read_to_end(&mut bytes).map_err(broken)?;
        if bytes.len() as u64 == size { Ok(bytes) } else { Err(bad("it ends early")) }
    }

    fn begin(&mut self, size: u64) {
        self.padding = size.wrapping_neg() % BLOCK_BYTES as u64;
        self.left = size.saturating_add(self.padding);
    }

    fn entry(&mut self, header: &[u8; BLOCK_BYTES], overrides: Overrides) -> Result<Entry, Problem> {
        let path = match overrides.path {
            Some(path) => path,
            None => {
                let (prefix, name) = (text(&header[345..500])?, text(&header[..100])?);
                let posix = &header[257..263] == b"ustar\0" && !prefix.is_empty();
                if posix { format!("{prefix}/{name}") } else { name }
            }
        };
        let link = overrides.link.map_or_else(|| text(&header[157..257]), Ok)?;
        let size = overrides.size.map_or_else(|| number(&header[124..136]), Ok)?;
        let device = || -> Result<(u32, u32), Problem> {
            Ok((small(number(&header[329..337])?)?, small(number(&header[337..345])?)?))
        };
        let kind = match header[156] {
            b'0' | 0 | b'7' if path.ends_with('/') => Kinds::Folder,
            b'0' | 0 | b'7' => Kinds::File(size),
            b'1' => Kinds::HardLink(clean(&link)?),
            b'2' => Kinds::SymLink(checked(link)?),
            b'3' => device().map(|(major, minor)| Kinds::Char(major, minor))?,
            b'4' => device().map(|(major, minor)| Kinds::Block(major, minor))?,
            b'5' => Kinds::Folder,
            b'6' => Kinds::Pipe,
            other => {
                return Err(bad(format!(
                    "an entry of the unknown kind {}",
                    quoted(&char::from(other).to_string())
                )));
            }
        };
        self.begin(if matches!(kind, Kinds::File(_)) { size } else { 0 });
        Ok(Entry {
            path: clean(&path)?,
            kind,
            mode: small(number(&header[100..108])?)? & 0o7777,
            uid: small(overrides.uid.map_or_else(|| number(&header[108..116]), Ok)?)?,
            gid: small(overrides.gid.map_or_else(|| number(&header[116..124]), Ok)?)?,
            mtime: u32::try_from(number(&header[136..148])?).unwrap_or(u32::MAX),
        })
    }
}

struct Contents<'a, R> {
    reader: &'a mut Reader<R>,
}

impl<R: Read> Read for Contents<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.reader.left - self.reader.padding.min(self.reader.left);
        let count = (&mut self.reader.source).take(left).read(buffer)?;
        self.reader.left -= count as u64;
        Ok(count)
    }
}

/// Octal with blanks around, or GNU's base 256 (first bit set).
fn number(field: &[u8]) -> Result<u64, Problem> {
    if field.first().is_some_and(|first| first & 0x80 != 0) {
        let (head, tail) = field[1..].split_at((field.len() - 1).saturating_sub(8));
        if field[0] != 0x80 || head.iter().any(|&byte| byte != 0) {
            return Err(bad("a number below zero or beyond 64 bits"));
        }
        return Ok(tail.iter().fold(0, |value, &byte| value << 8 | u64::from(byte)));
    }
    let digits = field.split(|byte| *byte == 0).next().unwrap_or_default().trim_ascii();
    if digits.is_empty() {
        return Ok(0);
    }
    let text = std::str::from_utf8(digits).map_err(|_| bad("a number that is none"))?;
    u64::from_str_radix(text, 8).map_err(|_| bad(format!("{} is no octal number", quoted(text))))
}

fn small(value: u64) -> Result<u32, Problem> {
    u32::try_from(value).map_err(|_| bad(format!("{value} is beyond 32 bits")))
}

/// Text up to the first zero byte.
fn text(field: &[u8]) -> Result<String, Problem> {
    let bytes = field.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8(bytes.to_vec())
        .map_err(|_| bad(format!("the name {} is not UTF-8", quoted(&String::from_utf8_lossy(bytes)))))
}

/// Names that debugfs(8) can be told: printable, not too long, without quotes.
fn checked(name: String) -> Result<String, Problem> {
    if name.len() > MAX_PATH_BYTES {
        return Err(bad(format!("a path of {} bytes, more than {MAX_PATH_BYTES}", name.len())));
    }
    if name.chars().any(|c| c.is_control() || c == '"') {
        return Err(bad(format!("the name {} has control characters or quotes", quoted(&name))));
    }
    Ok(name)
}

/// A path without `.`, doubled and leading slashes; `..` is refused.
fn clean(path: &str) -> Result<String, Problem> {
    let parts: Vec<_> = path.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    if parts.contains(&"..") {
        return Err(bad(format!("the path {} leads out of it", quoted(path))));
    }
    if let Some(long) = parts.iter().find(|part| part.len() > 255) {
        return Err(bad(format!("a name of {} bytes, more than 255", long.len())));
    }
    checked(parts.join("/"))
}

/// pax records: `LENGTH KEY=VALUE\n`, LENGTH counting itself.
fn pax(records: &[u8], overrides: &mut Overrides) -> Result<(), Problem> {
    let wrong = || bad("a pax header that is none");
    let mut rest = records;
    while !rest.is_empty() {
        let blank = rest.iter().position(|&byte| byte == b' ').ok_or_else(wrong)?;
        let length: usize = std::str::from_utf8(&rest[..blank])
            .ok()
            .and_then(|length| length.parse().ok())
            .ok_or_else(wrong)?;
        if length <= blank + 1 || length > rest.len() || rest[length - 1] != b'\n' {
            return Err(wrong());
        }
        let record = &rest[blank + 1..length - 1];
        rest = &rest[length..];
        let equals = record.iter().position(|&byte| byte == b'=').ok_or_else(wrong)?;
        let value = &record[equals + 1..];
        let integer =
            || std::str::from_utf8(value).ok().and_then(|value| value.parse().ok()).ok_or_else(wrong);
        match &record[..equals] {
            b"path" => overrides.path = Some(text(value)?),
            b"linkpath" => overrides.link = Some(text(value)?),
            b"size" => overrides.size = Some(integer()?),
            b"uid" => overrides.uid = Some(integer()?),
            b"gid" => overrides.gid = Some(integer()?),
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn entries(archive: &[u8]) -> Result<Vec<Entry>, Problem> {
        let mut reader = Reader::new(archive);
        let mut entries = Vec::new();
        while let Some(entry) = reader.next_entry()? {
            entries.push(entry);
        }
        Ok(entries)
    }

    /// A header with a right check sum.
    pub(in crate::images) fn header(path: &str, kind: u8, size: u64, link: &str) -> Vec<u8> {
        let mut block = vec![0; BLOCK_BYTES];
        block[..path.len()].copy_from_slice(path.as_bytes());
        block[100..107].copy_from_slice(b"0000755");
        block[108..115].copy_from_slice(b"0000012");
        block[116..123].copy_from_slice(b"0000013");
        block[124..135].copy_from_slice(format!("{size:011o}").as_bytes());
        block[156] = kind;
        block[157..157 + link.len()].copy_from_slice(link.as_bytes());
        block[257..265].copy_from_slice(b"ustar\x0000");
        block[148..156].copy_from_slice(b"        ");
        let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        block
    }

    #[test]
    fn what_tar_writes_is_read_in_every_format() {
        let dir = tempfile::tempdir().unwrap();
        let long = "d/".repeat(60) + &"n".repeat(120);
        let file = dir.path().join("t").join(&long);
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(&file, vec![7; 1000]).unwrap();
        std::os::unix::fs::symlink(format!("/{long}"), dir.path().join("t/link")).unwrap();
        for format in ["gnu", "posix"] {
            let output = Command::new("tar")
                .args([
                    "-C",
                    dir.path().join("t").to_str().unwrap(),
                    "--owner=7",
                    "--group=8",
                    "-c",
                    "--format",
                    format,
                    ".",
                ])
                .output()
                .unwrap();
            let found = entries(&output.stdout).unwrap();
            let entry = found.iter().find(|entry| entry.path == long).unwrap();
            assert_eq!((&entry.kind, entry.uid, entry.gid), (&Kinds::File(1000), 7, 8), "{format}");
            let link = found.iter().find(|entry| entry.path == "link").unwrap();
            assert_eq!(link.kind, Kinds::SymLink(format!("/{long}")));
            assert_eq!((found[0].path.as_str(), &found[0].kind), ("", &Kinds::Folder));
        }
    }

    #[test]
    fn contents_end_where_they_should() {
        let mut archive = header("a", b'0', 3, "");
        archive.extend([b"abc".as_slice(), &[0; 509]].concat());
        archive.extend(header("dev/null", b'3', 0, ""));
        let mut reader = Reader::new(archive.as_slice());
        reader.next_entry().unwrap();
        let mut contents = String::new();
        reader.contents().read_to_string(&mut contents).unwrap();
        assert_eq!(contents, "abc");
        let next = reader.next_entry().unwrap().unwrap();
        assert_eq!((next.path.as_str(), next.kind, next.mode), ("dev/null", Kinds::Char(0, 0), 0o755));
        assert!(reader.next_entry().unwrap().is_none());
    }

    #[test]
    fn hostile_archives_are_refused() {
        let mut wrong_sum = header("a", b'0', 0, "");
        wrong_sum[0] = b'b';
        let pax = [header("x", b'x', 9, ""), [b"99 path=x".as_slice(), &[0; 503]].concat()].concat();
        let cases = [
            header("../etc/passwd", b'0', 0, ""),
            header("a/../../b", b'5', 0, ""),
            header("a", b'1', 0, "../b"),
            header("a\nb", b'0', 0, ""),
            header("a\"b", b'0', 0, ""),
            header("a", b'L', 1 << 30, ""),
            header("a", b'Z', 0, ""),
            header("a", b'0', 10_000, "").into_iter().chain([0; 512]).collect(),
            wrong_sum,
            pax,
        ];
        for (number, archive) in cases.iter().enumerate() {
            assert_eq!(
                entries(archive).map_err(|problem| problem.code),
                Err("image-format"),
                "case {number}"
            );
        }
    }

    #[test]
    fn numbers() {
        assert_eq!(number(b"0000755\0"), Ok(0o755));
        assert_eq!(number(b"   17 \0"), Ok(0o17));
        assert_eq!(number(b"\0\0\0\0"), Ok(0));
        assert_eq!(number(&[0x80, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0]), Ok(2 << 32));
        assert!(number(b"9").is_err() && number(&[0xff; 12]).is_err() && number(b"-1").is_err());
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_whatever_break_it(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..3000)) {
            let _ = entries(&bytes);
            let mut archive = header("a", b'x', bytes.len() as u64, "");
            archive.extend(&bytes);
            let _ = entries(&archive);
        }
    }
}
