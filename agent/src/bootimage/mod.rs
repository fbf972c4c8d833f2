//! The built-in guest's initramfs: `lathe-guest` as init, the virtio modules of one kernel, nothing else.
//!
//! So a machine runs on a bare host with nothing downloaded: the kernel is the host's own, and this archive is made
//! from the host's `/lib/modules`. It is deterministic (sorted, times and owners 0), made once per set of inputs
//! (their hash is its first entry) and replaced atomically. It is left uncompressed by default, because the guest
//! would pay for the decompression at each boot. It never opens devices, runs programs or depends on the rest of
//! the agent.
//!
//! ```text
//! /lib/modules/RELEASE/modules.dep ─► modules ─► compression ─┐
//! lathe-guest, busybox (optional) ────────────────────────────┴─► cpio ─► out
//! ```

mod compression;
pub mod cpio;
mod modules;

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use cpio::{Cpio, Meta};
use modules::{Index, Resolved};
use ring::digest::{Context, SHA256};

/// Changed whenever the same inputs would give another archive.
const FORMAT: &str = "lathe boot image 2";
/// First entry of an archive; holds [`FORMAT`] and the hash of the inputs.
const STAMP_PATH: &str = ".lathe-boot-image";
/// Largest program that is packed, bytes.
const MAX_PROGRAM_BYTES: u64 = 64 << 20;
/// Folders of the archive, parents first.
const FOLDERS: &[&str] =
    &["bin", "dev", "etc", "lib", "lib/modules", "mnt", "proc", "root", "run", "sbin", "sys", "tmp"];
/// Names by which `lathe-guest` is called in the guest.
const GUEST_LINKS: &[&str] = &[
    "bin/blast",
    "bin/bursts",
    "bin/iops",
    "bin/lathe-guest",
    "bin/nproc",
    "bin/sink",
    "bin/spin",
    "sbin/modprobe",
    "sbin/poweroff",
    "sbin/reboot",
];
/// Names that `lathe-guest` serves unless busybox does it better.
const SHARED_LINKS: &[&str] = &[
    "bin/cat",
    "bin/echo",
    "bin/env",
    "bin/false",
    "bin/free",
    "bin/ip",
    "bin/ls",
    "bin/sleep",
    "bin/sync",
    "bin/true",
    "bin/uname",
    "bin/uptime",
];
/// What a person expects of a shell; all in Debian's busybox-static.
const BUSYBOX_LINKS: &[&str] = &[
    "ash",
    "awk",
    "base64",
    "basename",
    "chmod",
    "chown",
    "clear",
    "cmp",
    "cp",
    "cut",
    "date",
    "dd",
    "df",
    "diff",
    "dirname",
    "dmesg",
    "du",
    "expr",
    "find",
    "grep",
    "gunzip",
    "gzip",
    "head",
    "hexdump",
    "hostname",
    "id",
    "kill",
    "killall",
    "less",
    "ln",
    "mkdir",
    "mkfifo",
    "mknod",
    "mktemp",
    "more",
    "mount",
    "mv",
    "nc",
    "nslookup",
    "od",
    "pgrep",
    "pidof",
    "ping",
    "pkill",
    "printf",
    "ps",
    "pwd",
    "readlink",
    "renice",
    "rm",
    "rmdir",
    "sed",
    "seq",
    "sh",
    "sha256sum",
    "sort",
    "stat",
    "stty",
    "tail",
    "tar",
    "tee",
    "test",
    "time",
    "timeout",
    "top",
    "touch",
    "tr",
    "tty",
    "umount",
    "uniq",
    "usleep",
    "vi",
    "watch",
    "wc",
    "wget",
    "which",
    "whoami",
    "xargs",
    "yes",
];

/// What goes into a boot image.
#[derive(Clone, Debug)]
pub struct BootImageSpec<'a> {
    /// `uname -r` of the kernel that the guest boots.
    pub kernel_release: &'a str,
    /// Usually `/lib/modules`.
    pub modules_root: &'a Path,
    /// The static `lathe-guest`.
    pub guest_binary: &'a Path,
    /// A static busybox, for a shell in the guest.
    pub busybox: Option<PathBuf>,
    /// Names of modules to load at boot besides the built-in guest's own.
    pub extra_modules: &'a [String],
    /// Where the archive goes.
    pub out: &'a Path,
}

/// Whether an archive was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was made now.
    Built,
    /// The one that was there had the same inputs.
    Unchanged,
}

/// A boot image on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootImage {
    /// Where it is.
    pub path: PathBuf,
    /// SHA-256 of its inputs, hexadecimal; names the image, whose bytes follow from it.
    pub inputs_sha256: String,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Optional modules that this kernel has neither built in nor as a file.
    pub missing_modules: Vec<String>,
    /// Made now, or found.
    pub outcome: Outcome,
}

/// Why there is no boot image.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BootImageError {
    /// Not the name of a kernel.
    #[error("{0:?} is not a kernel release as uname -r prints it")]
    Release(String),
    /// The kernel's modules are not installed, or depmod has not run.
    #[error("no modules of kernel {release}: {}/modules.dep is missing; install linux-image-{release}, or run: depmod {release}", folder.display())]
    NoModules {
        /// Where they should be.
        folder: PathBuf,
        /// `uname -r`.
        release: String,
    },
    /// A kernel without what a machine needs.
    #[error("module {name} is neither built in nor in {}; the built-in guest needs it: install the distribution's complete kernel (linux-image-amd64, linux-image-cloud-amd64), or name another with --kernel", folder.display())]
    NoModule {
        /// The module.
        name: String,
        /// Where it was looked for.
        folder: PathBuf,
    },
    /// A module could not be decompressed.
    #[error("module {} is damaged; reinstall the kernel's package", path.display())]
    Module {
        /// The file.
        path: PathBuf,
        /// What the decompressor says.
        source: io::Error,
    },
    /// Not a program for the guest.
    #[error("{} cannot run in the guest: {reason}; {fix}", path.display())]
    Program {
        /// The file.
        path: PathBuf,
        /// Why not.
        reason: &'static str,
        /// What to install.
        fix: &'static str,
    },
    /// A file could not be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel says.
        source: io::Error,
    },
    /// The archive could not be written.
    #[error("cannot write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the kernel says.
        source: io::Error,
    },
}

/// Makes the boot image, unless `spec.out` already is the one of these inputs.
///
/// Blocking: reads and writes a few MiB.
///
/// # Errors
/// [`BootImageError`]; what was at `spec.out` stays.
pub fn build(spec: &BootImageSpec<'_>) -> Result<BootImage, BootImageError> {
    let resolved = Index::read(spec.modules_root, spec.kernel_release)?.resolve(spec.extra_modules)?;
    let entries = collect(spec, &resolved)?;
    let inputs_sha256 = hash(spec, &entries);
    let stamp = format!("{FORMAT}\n{inputs_sha256}\nkernel {}\n", spec.kernel_release);
    let image = |size_bytes, outcome| BootImage {
        path: spec.out.into(),
        inputs_sha256: inputs_sha256.clone(),
        size_bytes,
        missing_modules: resolved.missing.clone(),
        outcome,
    };
    if let Some(size_bytes) = same_stamp(spec.out, &stamp) {
        return Ok(image(size_bytes, Outcome::Unchanged));
    }
    let failed = |source| BootImageError::Write { path: spec.out.into(), source };
    let archive = archive(&stamp, entries, spec)?;
    replace(spec.out, &archive).map_err(failed)?;
    Ok(image(archive.len() as u64, Outcome::Built))
}

/// A file of the archive before decompression.
struct Packed {
    source: PathBuf,
    contents: Vec<u8>,
    mode: u32,
}

/// Everything of the archive but folders, links and devices, by path.
fn collect(
    spec: &BootImageSpec<'_>,
    resolved: &Resolved,
) -> Result<BTreeMap<String, Packed>, BootImageError> {
    let mut entries = BTreeMap::new();
    let fix = "build it with: RUSTFLAGS='-C target-feature=+crt-static' cargo build --release --target x86_64-unknown-linux-gnu -p lathe-guest";
    entries.insert("init".into(), program(spec.guest_binary, fix)?);
    if let Some(busybox) = &spec.busybox {
        entries.insert("bin/busybox".into(), program(busybox, "install busybox-static")?);
    }
    for module in &resolved.modules {
        let contents = read(&module.path, compression::MAX_MODULE_BYTES)?;
        let packed = Packed { source: module.path.clone(), contents, mode: 0o644 };
        entries.insert(format!("lib/modules/{}.ko", module.name), packed);
    }
    let text =
        |contents: String| Packed { source: PathBuf::new(), contents: contents.into_bytes(), mode: 0o644 };
    entries.insert("lib/modules/order".into(), text(modules::order(&resolved.modules)));
    let aliases = resolved.aliases.iter().map(|(alias, name)| format!("{alias} {name}\n")).collect();
    entries.insert("lib/modules/aliases".into(), text(aliases));
    entries.insert("etc/passwd".into(), text("root:x:0:0:root:/root:/bin/sh\n".into()));
    entries.insert("etc/group".into(), text("root:x:0:\n".into()));
    entries.insert("etc/hosts".into(), text("127.0.0.1 localhost\n::1 localhost\n".into()));
    Ok(entries)
}

fn hash(spec: &BootImageSpec<'_>, entries: &BTreeMap<String, Packed>) -> String {
    let mut context = Context::new(&SHA256);
    for text in [FORMAT, env!("CARGO_PKG_VERSION"), spec.kernel_release] {
        context.update(text.as_bytes());
        context.update(&[0]);
    }
    for (path, entry) in entries {
        context.update(path.as_bytes());
        context.update(&[0]);
        context.update(&(entry.contents.len() as u64).to_le_bytes());
        context.update(&entry.contents);
    }
    context.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

fn archive(
    stamp: &str,
    entries: BTreeMap<String, Packed>,
    spec: &BootImageSpec<'_>,
) -> Result<Vec<u8>, BootImageError> {
    let failed = |source| BootImageError::Write { path: spec.out.into(), source };
    let mut cpio = Cpio::new(Vec::new());
    cpio.file(STAMP_PATH, Meta::mode(0o444), stamp.as_bytes()).map_err(failed)?;
    for folder in FOLDERS {
        cpio.directory(folder, Meta::mode(0o755)).map_err(failed)?;
    }
    // The kernel opens /dev/console before init runs, and so before devtmpfs is mounted.
    cpio.character_device("dev/console", Meta::mode(0o600), 5, 1).map_err(failed)?;
    cpio.character_device("dev/null", Meta::mode(0o666), 1, 3).map_err(failed)?;
    for (path, entry) in entries {
        let contents = compression::decompress_packed(&entry.source, entry.contents)
            .map_err(|source| BootImageError::Module { path: entry.source.clone(), source })?;
        cpio.file(&path, Meta::mode(entry.mode), &contents).map_err(failed)?;
    }
    for (path, target) in links(spec.busybox.is_some()) {
        cpio.symlink(&path, target).map_err(failed)?;
    }
    cpio.finish().map_err(failed)
}

fn links(busybox: bool) -> BTreeMap<String, &'static str> {
    let own = GUEST_LINKS.iter().map(|path| ((*path).to_owned(), "/init"));
    let shared =
        SHARED_LINKS.iter().map(|path| ((*path).to_owned(), if busybox { "busybox" } else { "/init" }));
    let applets = BUSYBOX_LINKS.iter().filter(|_| busybox).map(|name| (format!("bin/{name}"), "busybox"));
    // Last wins: ours over busybox's.
    applets.chain(shared).chain(own).collect()
}

fn read(path: &Path, limit: u64) -> Result<Vec<u8>, BootImageError> {
    let failed = |source| BootImageError::Read { path: path.into(), source };
    let mut contents = Vec::new();
    fs::File::open(path).and_then(|file| file.take(limit + 1).read_to_end(&mut contents)).map_err(failed)?;
    if contents.len() as u64 > limit {
        return Err(failed(io::Error::new(io::ErrorKind::FileTooLarge, format!("more than {limit} bytes"))));
    }
    Ok(contents)
}

/// Reads a program and looks whether it runs where there is no dynamic linker.
fn program(path: &Path, fix: &'static str) -> Result<Packed, BootImageError> {
    let contents = read(path, MAX_PROGRAM_BYTES)?;
    match unfit(&contents) {
        Some(reason) => Err(BootImageError::Program { path: path.into(), reason, fix }),
        None => Ok(Packed { source: PathBuf::new(), contents, mode: 0o755 }),
    }
}

/// Why this is no static x86-64 ELF program, if it is none (elf(5)).
fn unfit(program: &[u8]) -> Option<&'static str> {
    const PT_INTERP: u32 = 3;
    const MACHINE_X86_64: u16 = 62;
    let word = |at: usize| Some(u16::from_le_bytes(program.get(at..at + 2)?.try_into().ok()?));
    if program.get(..5) != Some(b"\x7fELF\x02") || word(18) != Some(MACHINE_X86_64) {
        return Some("it is no 64-bit x86 ELF program");
    }
    let table = program.get(32..40).and_then(|bytes| bytes.try_into().ok()).map(u64::from_le_bytes);
    let (Some(table), Some(size), Some(count)) = (table, word(54), word(56)) else {
        return Some("its ELF header is cut short");
    };
    for index in 0..u64::from(count) {
        let at = table.saturating_add(index * u64::from(size));
        let kind = usize::try_from(at).ok().and_then(|at| program.get(at..at.checked_add(4)?));
        match kind.and_then(|bytes| bytes.try_into().ok()).map(u32::from_le_bytes) {
            None => return Some("its ELF program headers are cut short"),
            Some(PT_INTERP) => return Some("it is linked dynamically"),
            Some(_) => {}
        }
    }
    None
}

/// Size of the archive at `path` if it carries this stamp; anything else is built anew.
fn same_stamp(path: &Path, stamp: &str) -> Option<u64> {
    let mut cpio = Cpio::new(Vec::new());
    cpio.file(STAMP_PATH, Meta::mode(0o444), stamp.as_bytes()).ok()?;
    // The first entry and its padding, without a trailer.
    let expected = cpio.into_inner();
    let mut file = fs::File::open(path).ok()?;
    let mut start = vec![0; expected.len()];
    file.read_exact(&mut start).ok()?;
    (start == expected).then(|| file.metadata().ok().map(|metadata| metadata.len()))?
}

/// Writes `contents` to `path` so that either the old or the new is there, also after a power cut.
fn replace(path: &Path, contents: &[u8]) -> io::Result<()> {
    let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    let name = path.file_name().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "no file name"))?;
    let temporary = folder.join(format!(".{}.{}.new", name.to_string_lossy(), std::process::id()));
    let written = fs::File::create(&temporary).and_then(|mut file| {
        file.write_all(contents)?;
        file.sync_all()
    });
    let renamed = written.and_then(|()| fs::rename(&temporary, path));
    if renamed.is_err() {
        // The first error is what counts; a left-over is overwritten next time.
        let _ = fs::remove_file(&temporary);
    }
    renamed?;
    fs::File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests;
