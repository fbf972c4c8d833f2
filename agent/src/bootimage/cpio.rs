//! A writer of "newc" cpio archives, the format of an initramfs.
//!
//! The same entries give the same bytes: inode numbers count up from 1, times and owners are what the caller says
//! (0 by default), hard links are not used. Reading archives is not its business. Format: the kernel's
//! Documentation/driver-api/early-userspace/buffer-format.rst.

use std::io::{self, Read, Write};

/// Longest path in an archive, bytes, with the closing zero; the kernel refuses more (PATH_MAX).
const MAX_PATH_BYTES: usize = 4096;
const TYPE_DIRECTORY: u32 = 0o040_000;
const TYPE_CHARACTER: u32 = 0o020_000;
const TYPE_FILE: u32 = 0o100_000;
const TYPE_SYMLINK: u32 = 0o120_000;
/// Last entry of an archive.
const TRAILER: &str = "TRAILER!!!";
/// Archives are padded to this, as cpio(1) does.
const BLOCK_BYTES: u64 = 512;

/// Owner, permissions and time of an entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Meta {
    /// Permission bits, 0..=0o7777.
    pub mode: u32,
    /// Numeric user.
    pub uid: u32,
    /// Numeric group.
    pub gid: u32,
    /// Modification time, seconds since 1970.
    pub mtime: u32,
}

impl Meta {
    /// Root's, time 0.
    #[must_use]
    pub fn mode(mode: u32) -> Self {
        Self { mode, ..Self::default() }
    }
}

/// Writes an archive entry by entry, parents before children.
#[derive(Debug)]
pub struct Cpio<W> {
    out: W,
    written: u64,
    inode: u32,
}

struct Header<'a> {
    path: &'a str,
    kind: u32,
    meta: Meta,
    size: u32,
    device: (u32, u32),
}

impl<W: Write> Cpio<W> {
    /// Starts an empty archive.
    pub fn new(out: W) -> Self {
        Self { out, written: 0, inode: 0 }
    }

    /// Adds a directory.
    ///
    /// # Errors
    /// `InvalidInput` for a path of the wrong form; otherwise what the sink says. So for all entries.
    pub fn directory(&mut self, path: &str, meta: Meta) -> io::Result<()> {
        self.header(&Header { path, kind: TYPE_DIRECTORY, meta, size: 0, device: (0, 0) })
    }

    /// Adds a file with these contents.
    ///
    /// # Errors
    /// As [`Self::directory`]; `InvalidInput` for 4 GiB or more.
    pub fn file(&mut self, path: &str, meta: Meta, contents: &[u8]) -> io::Result<()> {
        self.file_from(path, meta, contents.len() as u64, &mut &contents[..])
    }

    /// Adds a file of `size` bytes that are read from `contents`.
    ///
    /// # Errors
    /// As [`Self::file`]; `UnexpectedEof` when `contents` ends early. Then the archive is unusable.
    pub fn file_from(
        &mut self,
        path: &str,
        meta: Meta,
        size: u64,
        contents: &mut impl Read,
    ) -> io::Result<()> {
        let small = u32::try_from(size).map_err(|_| {
            invalid(format!("{path} has {size} bytes, an initramfs holds files below 4294967296"))
        })?;
        self.header(&Header { path, kind: TYPE_FILE, meta, size: small, device: (0, 0) })?;
        let copied = io::copy(&mut contents.take(size), &mut self.out)?;
        self.written += copied;
        if copied < size {
            let message = format!("{path} ended after {copied} of {size} bytes");
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, message));
        }
        self.pad(4)
    }

    /// Adds a symbolic link to `target`.
    ///
    /// # Errors
    /// As [`Self::directory`].
    pub fn symlink(&mut self, path: &str, target: &str) -> io::Result<()> {
        if target.is_empty() || target.len() >= MAX_PATH_BYTES || target.contains('\0') {
            return Err(invalid(format!("{path}: not a link target: {target:?}")));
        }
        let meta = Meta::mode(0o777);
        self.header(&Header { path, kind: TYPE_SYMLINK, meta, size: target.len() as u32, device: (0, 0) })?;
        self.put(target.as_bytes())?;
        self.pad(4)
    }

    /// Adds a character device.
    ///
    /// # Errors
    /// As [`Self::directory`].
    pub fn character_device(&mut self, path: &str, meta: Meta, major: u32, minor: u32) -> io::Result<()> {
        self.header(&Header { path, kind: TYPE_CHARACTER, meta, size: 0, device: (major, minor) })
    }

    /// Ends the archive and gives the sink back, unflushed.
    ///
    /// # Errors
    /// What the sink says.
    pub fn finish(mut self) -> io::Result<W> {
        self.inode = 0;
        let trailer = Header { path: TRAILER, kind: 0, meta: Meta::default(), size: 0, device: (0, 0) };
        self.raw_header(&trailer)?;
        self.pad(BLOCK_BYTES)?;
        Ok(self.out)
    }

    /// Gives the sink back without ending the archive.
    pub fn into_inner(self) -> W {
        self.out
    }

    fn header(&mut self, header: &Header<'_>) -> io::Result<()> {
        let path = header.path.trim_start_matches('/');
        let odd = path.split('/').any(|part| part.is_empty() || part == "." || part == "..");
        if odd || path.contains('\0') || path.len() >= MAX_PATH_BYTES || path == TRAILER {
            return Err(invalid(format!("not a path for an archive: {path:?}")));
        }
        self.inode = self.inode.checked_add(1).ok_or_else(|| invalid("too many files".into()))?;
        self.raw_header(&Header { path, ..*header })
    }

    /// Writes a header under the present inode number.
    fn raw_header(&mut self, header: &Header<'_>) -> io::Result<()> {
        let Header { path, kind, meta, size, device: (major, minor) } = *header;
        let links = if kind == TYPE_DIRECTORY { 2 } else { 1 };
        let name_size = path.len() as u32 + 1;
        let mode = kind | (meta.mode & 0o7777);
        let (uid, gid, mtime, inode) = (meta.uid, meta.gid, meta.mtime, self.inode);
        let fields = [inode, mode, uid, gid, links, mtime, size, 0, 0, major, minor, name_size, 0];
        let mut head = String::from("070701");
        for field in fields {
            head.push_str(&format!("{field:08X}"));
        }
        self.put(head.as_bytes())?;
        self.put(path.as_bytes())?;
        self.put(&[0])?;
        self.pad(4)
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(bytes)?;
        self.written += bytes.len() as u64;
        Ok(())
    }

    fn pad(&mut self, alignment: u64) -> io::Result<()> {
        const ZEROS: [u8; BLOCK_BYTES as usize] = [0; BLOCK_BYTES as usize];
        let missing = (alignment - self.written % alignment) % alignment;
        self.put(&ZEROS[..missing as usize])
    }
}

fn invalid(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Vec<u8> {
        let mut cpio = Cpio::new(Vec::new());
        cpio.directory("/dev", Meta::mode(0o755)).unwrap();
        cpio.character_device("dev/console", Meta::mode(0o600), 5, 1).unwrap();
        cpio.file("init", Meta::mode(0o755), b"hello").unwrap();
        cpio.symlink("sh", "init").unwrap();
        cpio.finish().unwrap()
    }

    #[test]
    fn headers_are_as_the_kernel_reads_them() {
        let archive = sample();
        assert_eq!(archive.len() % 512, 0);
        assert_eq!(&archive[..6], b"070701");
        assert_eq!(&archive[6..14], b"00000001", "inode");
        assert_eq!(&archive[14..22], b"000041ED", "directory, 0755");
        assert_eq!(&archive[94..102], b"00000004", "name with its zero");
        assert_eq!(&archive[110..114], b"dev\0");
        // Header and name are padded to four bytes together: 110 + 4 = 114 -> 116.
        assert_eq!(&archive[116..122], b"070701");
        assert_eq!(&archive[116 + 78..116 + 94], b"0000000500000001", "device 5:1");
        assert!(archive.windows(10).any(|window| window == b"TRAILER!!!"));
    }

    #[test]
    fn same_entries_give_the_same_bytes() {
        assert_eq!(sample(), sample());
    }

    #[test]
    fn bad_paths_and_short_files_are_refused() {
        let mut cpio = Cpio::new(Vec::new());
        for path in ["", "/", "a//b", "../x", "a/./b", "a\0b", "TRAILER!!!", &"x/".repeat(3000)] {
            assert!(cpio.directory(path, Meta::default()).is_err(), "{path}");
        }
        let short = cpio.file_from("f", Meta::default(), 9, &mut &b"four"[..]).unwrap_err();
        assert_eq!(short.kind(), io::ErrorKind::UnexpectedEof);
        assert!(cpio.file_from("f", Meta::default(), 1 << 32, &mut &b""[..]).is_err());
    }

    #[test]
    fn the_archive_is_what_cpio_reads() {
        let Ok(mut child) = std::process::Command::new("cpio")
            .args(["--list", "--quiet"])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
        else {
            return; // No cpio(1) here; the header test above stands alone.
        };
        child.stdin.take().unwrap().write_all(&sample()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success());
        assert_eq!(String::from_utf8(output.stdout).unwrap(), "dev\ndev/console\ninit\nsh\n");
    }
}
