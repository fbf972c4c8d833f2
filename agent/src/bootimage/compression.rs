//! Kernel modules as distributions ship them (`.ko`, `.ko.xz`, `.ko.gz`, `.ko.zst`), decompressed.
//!
//! Modules are packed decompressed, so that the guest spends no time on it and needs no decompressor. All pure Rust:
//! the agent links no C for it. Not every `.xz` file in the world is read, only what kbuild makes (LZMA2 alone, no
//! filters: scripts/Makefile.modinst).

use std::io::{self, Read};
use std::path::Path;

/// Largest module in bytes after decompression; amdgpu with debug information stays below it.
pub const MAX_MODULE_BYTES: u64 = 256 << 20;

/// Contents of a file of the archive: of a module when it came from `path`, otherwise as they are.
pub fn decompress_packed(path: &Path, packed: Vec<u8>) -> io::Result<Vec<u8>> {
    if path.as_os_str().is_empty() { Ok(packed) } else { decompress(path, packed) }
}

/// Contents of the module `path`, whose bytes on disk are `packed`.
///
/// # Errors
/// `InvalidData` for a damaged file, an unknown suffix, or more than [`MAX_MODULE_BYTES`].
fn decompress(path: &Path, packed: Vec<u8>) -> io::Result<Vec<u8>> {
    let suffix = path.extension().and_then(|suffix| suffix.to_str()).unwrap_or_default();
    match suffix {
        "ko" => Ok(packed),
        "xz" => {
            let mut plain = Bounded(Vec::new());
            lzma_rs::xz_decompress(&mut &packed[..], &mut plain).map_err(|error| damaged(&error))?;
            Ok(plain.0)
        }
        "gz" => bounded_read(flate2::read::MultiGzDecoder::new(&packed[..])),
        "zst" => {
            let decoder =
                ruzstd::decoding::StreamingDecoder::new(&packed[..]).map_err(|error| damaged(&error))?;
            bounded_read(decoder)
        }
        other => Err(damaged(&format!("compression .{other} is not known; known are .xz, .gz, .zst"))),
    }
}

struct Bounded(Vec<u8>);

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() as u64 + bytes.len() as u64 > MAX_MODULE_BYTES {
            return Err(damaged(&format!("more than {MAX_MODULE_BYTES} bytes")));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn bounded_read(from: impl Read) -> io::Result<Vec<u8>> {
    let mut plain = Vec::new();
    from.take(MAX_MODULE_BYTES + 1).read_to_end(&mut plain)?;
    if plain.len() as u64 > MAX_MODULE_BYTES {
        return Err(damaged(&format!("more than {MAX_MODULE_BYTES} bytes")));
    }
    Ok(plain)
}

fn damaged(error: &dyn std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    // `printf 'lathe lathe lathe lathe\n' | xz --check=crc32 --lzma2=dict=1MiB`, `| gzip -n`, `| zstd`
    const XZ: &str = "fd377a585a0000016922de360200210110000000a8708e86e00017000d5d0036184aef2acf83cdeb8ad38000000000003d8e54cf000125189afd19db9042990d010000000001595a";
    const GZ: &str = "1f8b0800000000000003cb492cc94855c84127b9003d8e54cf18000000";
    const ZST: &str = "28b52ffd04586d0000386c61746865200a0100994b11743b46e9";

    fn bytes(hex: &str) -> Vec<u8> {
        (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
    }

    #[test]
    fn every_format_gives_the_same_bytes() {
        for (name, hex) in [("m.ko.xz", XZ), ("m.ko.gz", GZ), ("m.ko.zst", ZST)] {
            let plain = decompress(Path::new(name), bytes(hex)).unwrap();
            assert_eq!(plain, b"lathe lathe lathe lathe\n", "{name}");
        }
        assert_eq!(decompress(Path::new("m.ko"), b"x".to_vec()).unwrap(), b"x");
    }

    #[test]
    fn damage_is_an_error_everywhere() {
        for (name, hex) in [("m.ko.xz", XZ), ("m.ko.gz", GZ), ("m.ko.zst", ZST)] {
            let whole = bytes(hex);
            for length in 0..whole.len() - 4 {
                assert!(
                    decompress(Path::new(name), whole[..length].to_vec()).is_err(),
                    "{name} cut at {length}"
                );
            }
        }
        assert!(decompress(Path::new("m.ko.lz4"), Vec::new()).is_err());
    }
}
