//! A machine's files: its folder, private disks, what is kept of it.
//!
//! ```text
//! STATE/uploads/ID            ──hard link──► STATE/machines/NAME/{kernel,initrd,diskN.raw}
//! image's raw disk  ──reflink or sparse copy──► STATE/machines/NAME/diskN.raw
//! rm: STATE/machines/NAME/diskN.raw ──rename──► STATE/kept/NAME-TIME/
//! ```
//! Uploads are linked, not moved, until the machine has run once: a run that fails leaves them where they were. Everything is
//! blocking and repeatable. Reflink: ioctl_ficlone(2); holes: lseek(2), `SEEK_DATA`.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::config::CoreConfig;
use super::record::{Disk, Initrd, Kernel, Record};
use crate::problem::{Kind, Problem};

/// Bytes that are copied at once.
const COPY_CHUNK: usize = 1 << 20;

fn failed(what: String) -> impl FnOnce(io::Error) -> Problem {
    move |cause| match cause.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            let message = format!("{what}: no space left on the file system");
            Problem::new(Kind::Impossible, "disk-full", message).fix("df -h /var/lib/lathe")
        }
        _ => Problem::internal(what, cause),
    }
}

/// Where disk `index` of a machine is.
pub fn disk_path(config: &CoreConfig, record: &Record, index: usize) -> PathBuf {
    match &record.source.disks[index] {
        Disk::Path { path, .. } => PathBuf::from(path),
        Disk::Image { .. } | Disk::Upload { .. } => {
            config.machine_dir(&record.name).join(format!("disk{index}.raw"))
        }
    }
}

/// Makes the machine's folder with all that it boots; what is there from an earlier attempt is replaced.
///
/// # Errors
/// `disk-full`, `no-such-upload`, `no-such-image`, `internal`.
pub fn prepare(config: &CoreConfig, record: &Record) -> Result<(), Problem> {
    let folder = config.machine_dir(&record.name);
    remove_folder(&folder)?;
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&folder)
        .map_err(failed(format!("cannot make {}", folder.display())))?;
    if let Kernel::Own { upload } = &record.source.kernel {
        link_upload(config, upload, &folder.join("kernel"))?;
    }
    if let Initrd::Own { upload } = &record.source.initrd {
        link_upload(config, upload, &folder.join("initrd"))?;
    }
    for (index, disk) in record.source.disks.iter().enumerate() {
        let path = disk_path(config, record, index);
        match disk {
            Disk::Path { .. } => {}
            Disk::Upload { upload, size_bytes } => {
                link_upload(config, upload, &path)?;
                set_size(&path, *size_bytes)?;
            }
            Disk::Image { image, size_bytes } => {
                let source = config.images.open(image)?.path;
                copy(&source, &path)
                    .map_err(failed(format!("cannot copy image {image} to {}", path.display())))?;
                set_size(&path, *size_bytes)?;
            }
        }
    }
    sync_folder(&folder)
}

fn link_upload(config: &CoreConfig, upload: &str, to: &Path) -> Result<(), Problem> {
    let from = config.uploads_dir().join(upload);
    fs::hard_link(&from, to).map_err(|cause| match cause.kind() {
        io::ErrorKind::NotFound => {
            Problem::new(Kind::NotFound, "no-such-upload", format!("upload {upload} is no more"))
        }
        _ => Problem::internal(format!("cannot link upload {upload} to {}", to.display()), cause),
    })
}

/// Removes the uploads that a machine has taken over, now that it has run.
pub fn forget_uploads(config: &CoreConfig, record: &Record) {
    let kernel = match &record.source.kernel {
        Kernel::Own { upload } => Some(upload),
        Kernel::Host => None,
    };
    let initrd = match &record.source.initrd {
        Initrd::Own { upload } => Some(upload),
        _ => None,
    };
    let disks = record.source.disks.iter().filter_map(|disk| match disk {
        Disk::Upload { upload, .. } => Some(upload),
        _ => None,
    });
    for upload in kernel.into_iter().chain(initrd).chain(disks) {
        // One that stays is removed by age.
        let _ = fs::remove_file(config.uploads_dir().join(upload));
    }
}

fn set_size(path: &Path, size_bytes: u64) -> Result<(), Problem> {
    let resize = || {
        let file = OpenOptions::new().write(true).open(path)?;
        if file.metadata()?.len() < size_bytes {
            file.set_len(size_bytes)?;
        }
        file.sync_all()
    };
    resize().map_err(failed(format!("cannot enlarge {}", path.display())))
}

/// Copies `from` to `to`: the same blocks where the file system can share them, else data without holes.
fn copy(from: &Path, to: &Path) -> io::Result<()> {
    let source = File::open(from)?;
    let target = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(to)?;
    if rustix::fs::ioctl_ficlone(&target, &source).is_ok() {
        return Ok(());
    }
    target.set_len(source.metadata()?.len())?;
    copy_data(&source, &target)
}

fn copy_data(mut source: &File, target: &File) -> io::Result<()> {
    let length = source.metadata()?.len();
    let mut buffer = vec![0; COPY_CHUNK];
    let mut at = 0;
    while at < length {
        // ENXIO: nothing but a hole behind `at`.
        let start = match rustix::fs::seek(source, rustix::fs::SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => break,
            Err(cause) => return Err(cause.into()),
        };
        let end = rustix::fs::seek(source, rustix::fs::SeekFrom::Hole(start))?;
        at = start;
        while at < end {
            let wanted = usize::try_from(end - at).unwrap_or(COPY_CHUNK).min(COPY_CHUNK);
            source.read_exact_at(&mut buffer[..wanted], at)?;
            target.write_all_at(&buffer[..wanted], at)?;
            at += wanted as u64;
        }
    }
    source.seek(SeekFrom::Start(0))?;
    Ok(())
}

/// Removes the machine's folder; private disks go to `STATE/kept/` unless `purge`. Answers where they are.
///
/// # Errors
/// `internal`.
pub fn erase(
    config: &CoreConfig,
    record: &Record,
    purge: bool,
    unix_sec: u64,
) -> Result<Option<PathBuf>, Problem> {
    let folder = config.machine_dir(&record.name);
    let mut kept = None;
    if !purge {
        for index in 0..record.source.disks.len() {
            let path = disk_path(config, record, index);
            if !path.starts_with(&folder) || !path.exists() {
                continue;
            }
            let shelf = config.state_dir.join("kept").join(format!("{}-{unix_sec}", record.name));
            let target = shelf.join(format!("disk{index}.raw"));
            let what = format!("cannot keep {} as {}", path.display(), target.display());
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&shelf)
                .and_then(|()| fs::rename(&path, &target))
                .map_err(failed(what))?;
            sync_folder(&shelf)?;
            kept = Some(shelf);
        }
    }
    remove_folder(&folder)?;
    remove_folder(&config.socket_dir(&record.name))?;
    Ok(kept)
}

/// Removes a folder with everything in it, if it is there.
///
/// # Errors
/// `internal`.
pub fn remove_folder(folder: &Path) -> Result<(), Problem> {
    match fs::remove_dir_all(folder) {
        Err(cause) if cause.kind() != io::ErrorKind::NotFound => {
            Err(failed(format!("cannot remove {}", folder.display()))(cause))
        }
        _ => Ok(()),
    }
}

fn sync_folder(folder: &Path) -> Result<(), Problem> {
    let synced = File::open(folder).and_then(|folder| folder.sync_all());
    synced.map_err(failed(format!("cannot make {} durable", folder.display())))
}

/// Opens and locks a disk. The lock belongs to the open file description (fcntl_locking(2), `F_OFD_SETLK`), which the monitor
/// gets too: it lasts until both have closed it. Writers exclude everybody, readers exclude writers.
///
/// # Errors
/// `disk-in-use`, `internal`.
pub fn open_disk(path: &Path, read_only: bool) -> Result<File, Problem> {
    let opening = |cause| Problem::internal(format!("cannot open {}", path.display()), cause);
    let open = |more: OFlag| {
        let flags = OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | more;
        OpenOptions::new().read(true).write(!read_only).custom_flags(flags.bits()).open(path)
    };
    // Past the page cache: the guest has one of its own, and one of its requests is one of the host's. Some file systems cannot.
    let file = match open(OFlag::O_DIRECT) {
        Err(cause) if cause.kind() == io::ErrorKind::InvalidInput => open(OFlag::empty()),
        opened => opened,
    };
    let file = file.map_err(opening)?;
    let kind = if read_only { nix::libc::F_RDLCK } else { nix::libc::F_WRLCK };
    let lock = nix::libc::flock {
        l_type: kind as i16,
        l_whence: nix::libc::SEEK_SET as i16,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    match fcntl(&file, FcntlArg::F_OFD_SETLK(&lock)) {
        Ok(_) => Ok(file),
        Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EACCES) => {
            let message = format!("{} is in use by somebody else", path.display());
            Err(Problem::new(Kind::Conflict, "disk-in-use", message).detail("another program has it locked"))
        }
        Err(cause) => Err(opening(cause.into())),
    }
}

/// What `root=` should be for a raw disk: itself when it holds an ext file system (magic 0xef53 at 1080), else its first partition.
pub fn root_device(path: &Path) -> &'static str {
    let mut magic = [0; 2];
    let read = File::open(path).and_then(|file| file.read_exact_at(&mut magic, 1080));
    if read.is_ok() && u16::from_le_bytes(magic) == 0xef53 { "/dev/vda" } else { "/dev/vda1" }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machines::config::tests::config;
    use crate::machines::config::{ImageFile, ImageSource};
    use crate::machines::record::tests::record;
    use std::sync::Arc;

    struct OneImage(PathBuf);

    impl ImageSource for OneImage {
        fn open(&self, _: &str) -> Result<ImageFile, Problem> {
            Ok(ImageFile { path: self.0.clone(), size_bytes: 4 << 20 })
        }
    }

    /// 4 MiB with data in the third.
    fn image(folder: &Path) -> PathBuf {
        let path = folder.join("image.raw");
        let file = File::create(&path).unwrap();
        file.set_len(4 << 20).unwrap();
        file.write_all_at(&[7; 4096], 2 << 20).unwrap();
        path
    }

    #[test]
    fn a_private_disk_is_a_sparse_enlarged_copy_and_is_kept() {
        use std::os::unix::fs::MetadataExt;
        let folder = tempfile::tempdir().unwrap();
        let mut config = config(folder.path());
        config.images = Arc::new(OneImage(image(folder.path())));
        let mut machine = record("demo");
        machine.source.disks = vec![Disk::Image { image: "x".to_owned(), size_bytes: 8 << 20 }];
        prepare(&config, &machine).unwrap();
        prepare(&config, &machine).unwrap();
        let disk = disk_path(&config, &machine, 0);
        let bytes = fs::read(&disk).unwrap();
        assert_eq!(bytes.len(), 8 << 20);
        assert!(bytes[2 << 20..(2 << 20) + 4096].iter().all(|byte| *byte == 7));
        assert_eq!(bytes.iter().filter(|byte| **byte != 0).count(), 4096);
        assert!(fs::metadata(&disk).unwrap().blocks() * 512 < 1 << 20, "holes stay holes");
        let kept = erase(&config, &machine, false, 5).unwrap().unwrap();
        assert!(kept.ends_with("kept/demo-5"));
        assert!(kept.join("disk0.raw").exists());
        assert!(!config.machine_dir("demo").exists());
        assert_eq!(erase(&config, &machine, false, 6).unwrap(), None, "twice is once");
    }

    #[test]
    fn a_run_that_fails_leaves_its_uploads() {
        let folder = tempfile::tempdir().unwrap();
        let config = config(folder.path());
        fs::create_dir_all(config.uploads_dir()).unwrap();
        fs::write(config.uploads_dir().join("k1"), "kernel").unwrap();
        let mut machine = record("demo");
        machine.source.kernel = Kernel::Own { upload: "k1".to_owned() };
        machine.source.disks = vec![Disk::Upload { upload: "gone".to_owned(), size_bytes: 512 }];
        assert_eq!(prepare(&config, &machine).unwrap_err().code, "no-such-upload");
        erase(&config, &machine, true, 1).unwrap();
        assert!(config.uploads_dir().join("k1").exists());
        machine.source.disks.clear();
        prepare(&config, &machine).unwrap();
        forget_uploads(&config, &machine);
        assert!(!config.uploads_dir().join("k1").exists());
        assert_eq!(fs::read(config.machine_dir("demo").join("kernel")).unwrap(), b"kernel");
    }

    #[test]
    fn a_disk_has_one_writer_or_many_readers() {
        let folder = tempfile::tempdir().unwrap();
        let path = image(folder.path());
        let writer = open_disk(&path, false).unwrap();
        assert_eq!(open_disk(&path, false).unwrap_err().code, "disk-in-use");
        assert_eq!(open_disk(&path, true).unwrap_err().code, "disk-in-use");
        let passed_on = writer.try_clone().unwrap();
        drop(writer);
        assert!(open_disk(&path, false).is_err(), "the monitor still has it");
        drop(passed_on);
        let _one = open_disk(&path, true).unwrap();
        let _two = open_disk(&path, true).unwrap();
    }
}
