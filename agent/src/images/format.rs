//! What the first bytes of a file say it is. Only raw disks boot; for the others a command that helps is known.

use crate::problem::{Kind, Problem};

/// How many bytes [`refuse_foreign`] wants to see.
pub const HEAD_BYTES: usize = 512;

/// Signature, name, and the command that makes a raw disk of it.
const FOREIGN: [(&[u8], &str, &str); 9] = [
    (b"QFI\xfb", "a qcow2 disk", "qemu-img convert -O raw FILE disk.raw"),
    (b"KDMV", "a VMDK disk", "qemu-img convert -O raw FILE disk.raw"),
    (b"vhdxfile", "a VHDX disk", "qemu-img convert -O raw FILE disk.raw"),
    (b"conectix", "a VHD disk", "qemu-img convert -O raw FILE disk.raw"),
    (b"\x1f\x8b", "compressed by gzip", "gunzip FILE"),
    (b"\xfd7zXZ\0", "compressed by xz", "unxz FILE"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", "unzstd FILE"),
    (b"BZh", "compressed by bzip2", "bunzip2 FILE"),
    (b"PK\x03\x04", "a zip archive", "unzip FILE"),
];

/// Refuses what is known not to be a raw disk.
///
/// # Errors
/// `image-format` with the command that helps.
pub fn refuse_foreign(head: &[u8]) -> Result<(), Problem> {
    let bad = |what: &str, fix: &str| {
        let message = format!("that is no raw disk: it is {what}");
        Err(Problem::new(Kind::BadRequest, "image-format", message).fix(fix))
    };
    if let Some((_, what, fix)) = FOREIGN.iter().find(|(signature, ..)| head.starts_with(signature)) {
        return bad(what, &format!("{fix}, then import that"));
    }
    if head.get(257..262) == Some(b"ustar") {
        return bad("a tar archive", "lathe image import NAME FILE --format tar");
    }
    Ok(())
}

/// The problem of an archive that is compressed or something else entirely; `None` when it may be one.
pub fn compressed(head: &[u8]) -> Option<Problem> {
    let (_, what, fix) = FOREIGN.iter().find(|(signature, ..)| head.starts_with(signature))?;
    let message = format!("that is no plain archive: it is {what}");
    Some(Problem::new(Kind::BadRequest, "image-format", message).fix(format!("{fix}, then import that")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_formats_are_refused_with_a_remedy() {
        for (head, word) in
            [(&b"QFI\xfb\0\0\0\x03"[..], "qcow2"), (b"\x1f\x8b\x08", "gzip"), (b"\xfd7zXZ\0\0", "xz")]
        {
            let problem = refuse_foreign(head).unwrap_err();
            assert_eq!(problem.code, "image-format");
            assert!(problem.message.contains(word) && !problem.fix.is_empty(), "{problem:?}");
        }
        let mut tar = vec![0; 512];
        tar[257..262].copy_from_slice(b"ustar");
        assert!(refuse_foreign(&tar).unwrap_err().message.contains("tar"));
    }

    #[test]
    fn disks_pass() {
        let mut mbr = vec![0; 512];
        mbr[510..].copy_from_slice(&[0x55, 0xaa]);
        for head in [&[0; 512][..], &mbr, b"short", b""] {
            assert_eq!(refuse_foreign(head), Ok(()));
        }
    }
}
