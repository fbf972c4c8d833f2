//! The smallest guest that shows when the kernel has reached user space: an initramfs of one program of some 170 bytes, written here
//! as machine code. It prints [`MARKER`] and then waits for ever, so that what is measured is the monitor and the kernel, not a guest.
//!
//! Formats: newc cpio (Documentation/driver-api/early-userspace/buffer-format.rst), ELF64.

use std::io::{self, Write};

/// What init prints, as a line of its own.
pub const MARKER: &str = "lathe-bench: init";

/// Address that the program is linked for.
const LOAD_ADDRESS: u64 = 0x40_0000;
const EHDR_BYTES: u64 = 64;
const PHDR_BYTES: u64 = 56;

const S_IFREG: u32 = 0o100_000;
const S_IFDIR: u32 = 0o040_000;
const S_IFCHR: u32 = 0o020_000;

/// write(1, MARKER + "\n"), then pause() for ever.
fn program() -> Vec<u8> {
    let message = format!("{MARKER}\n");
    let mut code = vec![
        0xb8,
        1,
        0,
        0,
        0, // mov eax, SYS_write
        0xbf,
        1,
        0,
        0,
        0, // mov edi, 1
        0x48,
        0x8d,
        0x35,
        16,
        0,
        0,
        0, // lea rsi, [rip + 16]: the message
        0xba,
        message.len() as u8,
        0,
        0,
        0, // mov edx, length
        0x0f,
        0x05, // syscall
        0xb8,
        34,
        0,
        0,
        0, // mov eax, SYS_pause
        0x0f,
        0x05, // syscall
        0xeb,
        0xf7, // jmp to the mov before
    ];
    code.extend_from_slice(message.as_bytes());
    let total = EHDR_BYTES + PHDR_BYTES + code.len() as u64;
    let entry = LOAD_ADDRESS + EHDR_BYTES + PHDR_BYTES;
    let mut elf = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    // ET_EXEC, EM_X86_64, version; entry, program headers, no sections; flags; sizes and counts.
    for half in [2u16, 62] {
        elf.extend_from_slice(&half.to_le_bytes());
    }
    elf.extend_from_slice(&1u32.to_le_bytes());
    for word in [entry, EHDR_BYTES, 0] {
        elf.extend_from_slice(&word.to_le_bytes());
    }
    elf.extend_from_slice(&0u32.to_le_bytes());
    for half in [EHDR_BYTES as u16, PHDR_BYTES as u16, 1, 0, 0, 0] {
        elf.extend_from_slice(&half.to_le_bytes());
    }
    // PT_LOAD, readable and executable; offset, addresses, sizes, alignment.
    for word in [1u32, 5] {
        elf.extend_from_slice(&word.to_le_bytes());
    }
    for word in [0, LOAD_ADDRESS, LOAD_ADDRESS, total, total, 0x1000] {
        elf.extend_from_slice(&word.to_le_bytes());
    }
    elf.extend_from_slice(&code);
    elf
}

/// One cpio member.
fn member(out: &mut impl Write, name: &str, mode: u32, device: (u32, u32), content: &[u8]) -> io::Result<()> {
    let fields =
        [0, mode, 0, 0, 1, 0, content.len() as u32, 0, 0, device.0, device.1, name.len() as u32 + 1, 0];
    write!(out, "070701")?;
    for field in fields {
        write!(out, "{field:08x}")?;
    }
    let pad = |length: usize| vec![0u8; length.next_multiple_of(4) - length];
    out.write_all(name.as_bytes())?;
    out.write_all(&[0])?;
    out.write_all(&pad(110 + name.len() + 1))?;
    out.write_all(content)?;
    out.write_all(&pad(content.len()))
}

/// Writes the initramfs, uncompressed.
///
/// # Errors
/// What the destination says.
pub fn write(out: &mut impl Write) -> io::Result<()> {
    member(out, "dev", S_IFDIR | 0o755, (0, 0), &[])?;
    member(out, "dev/console", S_IFCHR | 0o600, (5, 1), &[])?;
    member(out, "init", S_IFREG | 0o755, (0, 0), &program())?;
    member(out, "TRAILER!!!", 0, (0, 0), &[])
}

/// The same with another init, and modules in loading order.
///
/// # Errors
/// What the destination says.
pub fn write_with(out: &mut impl Write, init: &[u8], modules: &[Vec<u8>]) -> io::Result<()> {
    for folder in ["dev", "proc", "sys", "modules"] {
        member(out, folder, S_IFDIR | 0o755, (0, 0), &[])?;
    }
    member(out, "dev/console", S_IFCHR | 0o600, (5, 1), &[])?;
    member(out, "init", S_IFREG | 0o755, (0, 0), init)?;
    for (number, module) in modules.iter().enumerate() {
        member(out, &format!("modules/{number:02}.ko"), S_IFREG | 0o644, (0, 0), module)?;
    }
    member(out, "TRAILER!!!", 0, (0, 0), &[])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};
    use std::os::unix::fs::PermissionsExt;
    use std::process::{Command, Stdio};

    #[test]
    fn the_program_runs_and_says_its_line() {
        let directory = std::env::temp_dir().join(format!("lathe-bench-init-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let path = directory.join("init");
        std::fs::write(&path, program()).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
        let mut child = Command::new(&path).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        std::fs::remove_dir_all(&directory).unwrap();
        assert_eq!(line.trim_end(), MARKER);
    }

    #[test]
    fn the_archive_is_one_that_cpio_reads() {
        let mut archive = Vec::new();
        write(&mut archive).unwrap();
        assert_eq!(archive.len() % 4, 0);
        assert!(archive.starts_with(b"070701"));
        assert_eq!(archive.windows(6).filter(|window| window == b"070701").count(), 4);
    }
}
