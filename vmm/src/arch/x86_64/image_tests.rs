//! Kernels and initial RAM disks, whole, cut and corrupt.

use super::*;
use proptest::prelude::*;
use std::io::Write;
use vm_memory::Bytes;

const MEMORY: u64 = 64 * layout::MIB;

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap()
}

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// One segment of `length` bytes at 16 MiB, with `more` bytes of zeroes after it.
fn elf(length: u64, more: u64) -> Vec<u8> {
    let mut out = vec![0u8; 0x1000];
    let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x02\x01\x01");
    put(18, &62u16.to_le_bytes());
    put(24, &0x100_0010u64.to_le_bytes());
    put(32, &64u64.to_le_bytes());
    put(54, &56u16.to_le_bytes());
    put(56, &1u16.to_le_bytes());
    for (at, value) in [(64, 1), (72, 0x1000), (88, 0x100_0000), (96, length), (104, length + more)] {
        put(at, &u64::to_le_bytes(value));
    }
    out.extend((0..length).map(|i| i as u8));
    out
}

/// A bzImage with `payload` bytes after one sector of setup code.
fn bzimage(payload: usize) -> Vec<u8> {
    let mut out = vec![0u8; 1024 + payload];
    let header = setup_header {
        setup_sects: 1,
        syssize: (payload as u32).div_ceil(16),
        header: HDRS,
        version: 0x20f,
        loadflags: LOADED_HIGH,
        xloadflags: XLF_KERNEL_64,
        pref_address: 0x100_0000,
        init_size: 0x20_0000,
        initrd_addr_max: 0x7fff_ffff,
        ..setup_header::default()
    };
    out[0x1f1..0x1f1 + header.as_slice().len()].copy_from_slice(header.as_slice());
    out[1024..].fill(0x5a);
    out
}

fn load(bytes: &[u8]) -> Result<Kernel, ImageError> {
    load_kernel(&memory(), MEMORY, &file(bytes))
}

#[test]
fn both_formats_are_loaded_where_they_belong() {
    let memory = memory();
    let kernel = load_kernel(&memory, MEMORY, &file(&elf(0x2000, 0x5000))).unwrap();
    assert_eq!((kernel.entry, kernel.end), (0x100_0010, 0x100_7000));
    assert_eq!(memory.read_obj::<u8>(GuestAddress(0x100_0005)).unwrap(), 5);
    let kernel = load_kernel(&memory, MEMORY, &file(&bzimage(5000))).unwrap();
    assert_eq!((kernel.entry, kernel.end), (0x100_0200, 0x120_0000));
    assert_eq!(memory.read_obj::<u8>(GuestAddress(0x100_0000 + 4999)).unwrap(), 0x5a);
}

#[test]
fn what_is_wrong_is_said() {
    let says = |bytes: &[u8], text: &str| {
        let message = load(bytes).unwrap_err().to_string();
        assert!(message.contains(text), "{message}");
    };
    let whole = elf(0x2000, 0);
    says(&whole[..0x2000], "truncated");
    says(&elf(0x2000, 64 * layout::MIB), "does not fit");
    says(&bzimage(50_000)[..30_000], "truncated");
    let mut stub = bzimage(0x2000);
    stub[0x1f4..0x1f8].copy_from_slice(&0x20u32.to_le_bytes());
    says(&stub, "the 64-bit entry is at 512");
    says(&[0xab; 0x2000], "neither");
    let mut other = whole.clone();
    other[18] = 183;
    says(&other, "machine 183");
    let mut outside = whole;
    outside[24..32].copy_from_slice(&0x200_0000u64.to_le_bytes());
    says(&outside, "in no segment");
}

#[test]
fn an_initrd_lies_at_the_end_of_memory_and_never_in_the_kernel() {
    let memory = memory();
    let kernel = load_kernel(&memory, MEMORY, &file(&elf(0x2000, 0))).unwrap();
    let (at, size) = load_initrd(&memory, MEMORY, &kernel, &file(&[7; 5000])).unwrap();
    assert_eq!((at, size), (MEMORY - 0x2000, 5000));
    let huge = file(&[]);
    huge.set_len(MEMORY - 0x100_0000).unwrap();
    assert!(matches!(
        load_initrd(&memory, MEMORY, &kernel, &huge),
        Err(ImageError::TooBig { what: "initrd", .. })
    ));
}

proptest! {
    /// Whatever the headers say, loading ends with an answer and an entry inside of what was loaded.
    #[test]
    fn corrupt_headers_never_panic(
        is_elf in any::<bool>(),
        changes in proptest::collection::vec((0usize..0x268, any::<u8>()), 1..12)
    ) {
        let mut bytes = if is_elf { elf(0x2000, 0x100) } else { bzimage(0x2000) };
        for (at, value) in changes {
            bytes[at] = value;
        }
        if let Ok(kernel) = load(&bytes) {
            prop_assert!(kernel.entry >= layout::HIGH_RAM_START && kernel.entry < kernel.end);
            prop_assert!(kernel.end <= MEMORY);
        }
    }
}
