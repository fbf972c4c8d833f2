//! Tests of the whole boot image, on a made-up modules folder.

use super::*;

/// A program header table with one entry of `kind`.
fn elf(kind: u32) -> Vec<u8> {
    let mut program = vec![0; 120];
    program[..5].copy_from_slice(b"\x7fELF\x02");
    program[18] = 62;
    program[32] = 64;
    program[54] = 56;
    program[56] = 1;
    program[64..68].copy_from_slice(&kind.to_le_bytes());
    program
}

struct Fixture {
    folder: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let modules = folder.path().join("modules/6.1.0-test");
        let names = ["virtio_pci", "virtio_net", "virtio_blk", "vmw_vsock_virtio_transport"];
        let mut dependencies = String::new();
        fs::create_dir_all(modules.join("kernel")).unwrap();
        for name in names {
            dependencies.push_str(&format!("kernel/{name}.ko:\n"));
            fs::write(modules.join(format!("kernel/{name}.ko")), name).unwrap();
        }
        fs::write(modules.join("modules.dep"), dependencies).unwrap();
        fs::write(folder.path().join("guest"), elf(1)).unwrap();
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn build(&self) -> Result<BootImage, BootImageError> {
        build(&BootImageSpec {
            kernel_release: "6.1.0-test",
            modules_root: &self.path("modules"),
            guest_binary: &self.path("guest"),
            busybox: None,
            extra_modules: &[],
            out: &self.path("out/initramfs"),
        })
    }
}

#[test]
fn an_image_is_built_once_and_again_when_an_input_changes() {
    let fixture = Fixture::new();
    let first = fixture.build().unwrap();
    assert_eq!(first.outcome, Outcome::Built);
    let bytes = fs::read(&first.path).unwrap();
    assert_eq!(bytes.len() as u64, first.size_bytes);
    assert!(first.missing_modules.contains(&"ext4".to_owned()));

    let second = fixture.build().unwrap();
    assert_eq!(second, BootImage { outcome: Outcome::Unchanged, ..first.clone() });

    fs::write(fixture.path("modules/6.1.0-test/kernel/virtio_net.ko"), "newer").unwrap();
    let third = fixture.build().unwrap();
    assert_eq!(third.outcome, Outcome::Built);
    assert_ne!(third.inputs_sha256, first.inputs_sha256);

    fs::write(fixture.path("modules/6.1.0-test/kernel/virtio_net.ko"), "virtio_net").unwrap();
    fixture.build().unwrap();
    assert_eq!(fs::read(&first.path).unwrap(), bytes, "the same inputs give the same bytes");
    assert_eq!(fs::read_dir(fixture.path("out")).unwrap().count(), 1, "no temporary file is left");
}

#[test]
fn what_is_wrong_is_named_with_a_way_out() {
    let fixture = Fixture::new();
    fs::write(fixture.path("guest"), elf(3)).unwrap();
    let error = fixture.build().unwrap_err().to_string();
    assert!(error.contains("dynamically") && error.contains("crt-static"), "{error}");

    fs::write(fixture.path("guest"), elf(1)).unwrap();
    fs::remove_file(fixture.path("modules/6.1.0-test/kernel/virtio_net.ko")).unwrap();
    let error = fixture.build().unwrap_err().to_string();
    assert!(error.contains("virtio_net.ko"), "{error}");

    fs::remove_file(fixture.path("modules/6.1.0-test/modules.dep")).unwrap();
    let error = fixture.build().unwrap_err().to_string();
    assert!(error.contains("install linux-image-6.1.0-test"), "{error}");
    assert!(!fixture.path("out").exists());
}

#[test]
fn a_damaged_elf_is_refused_without_a_panic() {
    let whole = elf(1);
    assert_eq!(unfit(&whole), None);
    for length in 0..68 {
        assert!(unfit(&whole[..length]).is_some(), "cut at {length}");
    }
    let mut far = whole.clone();
    far[32..40].fill(0xff);
    assert!(unfit(&far).is_some());
}

#[test]
fn own_tools_win_over_busybox() {
    let with = links(true);
    assert_eq!(with["bin/sh"], "busybox");
    assert_eq!(with["bin/cat"], "busybox");
    assert_eq!(with["sbin/modprobe"], "/init");
    assert_eq!(links(false)["bin/cat"], "/init");
    assert!(!links(false).contains_key("bin/sh"));
}
