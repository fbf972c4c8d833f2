//! A machine's files: its folder, private disks, what is kept of it.
//!
//! ```text
//! STATE/uploads/ID            ──hard link──► STATE/machines/NAME/{kernel,initrd,disk….raw}
//! image's raw disk  ──reflink or sparse copy──► STATE/machines/NAME/disk….raw
//! rm, disk remove: STATE/machines/NAME/disk….raw ──rename──► STATE/kept/NAME-TIME/
//! ```
//! Uploads are linked, not moved, until the machine has run once: a run that fails leaves them where they were. Everything is
//! blocking and repeatable. Reflink: ioctl_ficlone(2); holes: lseek(2), `SEEK_DATA`.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::config::CoreConfig;
use super::record::{Disk, Drive, Initrd, Kernel, Record};
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

/// Where a disk of `machine` is.
pub fn disk_path(config: &CoreConfig, machine: &str, drive: &Drive) -> PathBuf {
    match &drive.disk {
        Disk::Path { path, .. } => PathBuf::from(path),
        Disk::Empty { .. } | Disk::Image { .. } | Disk::Upload { .. } => {
            config.machine_dir(machine).join(drive.file_name())
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
    for drive in &record.source.disks {
        make_disk(config, &record.name, drive)?;
    }
    sync_folder(&folder)
}

/// Makes the file of a private disk; whatever is in its place must be gone.
///
/// # Errors
/// `disk-full`, `no-such-upload`, `no-such-image`, `internal`.
fn make_disk(config: &CoreConfig, machine: &str, drive: &Drive) -> Result<(), Problem> {
    let path = disk_path(config, machine, drive);
    match &drive.disk {
        Disk::Path { .. } => return Ok(()),
        Disk::Empty { .. } => {
            let make = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
            make.map_err(failed(format!("cannot make {}", path.display())))?;
        }
        Disk::Upload { upload, .. } => link_upload(config, upload, &path)?,
        Disk::Image { image, .. } => {
            let source = config.images.open(image)?.path;
            copy(&source, &path)
                .map_err(failed(format!("cannot copy image {image} to {}", path.display())))?;
        }
    }
    set_size(&path, drive.disk.private_bytes().unwrap_or(0))
}

/// Makes the file of a disk that a machine is given later, durably.
///
/// # Errors
/// As [`prepare`].
pub fn add_disk(config: &CoreConfig, machine: &str, drive: &Drive) -> Result<(), Problem> {
    make_disk(config, machine, drive)?;
    sync_folder(&config.machine_dir(machine))
}

/// Takes a private disk's file out of the machine's folder, if it is there: to `STATE/kept/` unless `purge`. Answers where it is.
///
/// # Errors
/// `internal`.
pub fn take_disk(
    config: &CoreConfig,
    machine: &str,
    drive: &Drive,
    purge: bool,
    unix_sec: u64,
) -> Result<Option<PathBuf>, Problem> {
    let path = disk_path(config, machine, drive);
    if drive.disk.private_bytes().is_none() || !path.exists() {
        return Ok(None);
    }
    if purge {
        fs::remove_file(&path).map_err(failed(format!("cannot remove {}", path.display())))?;
        sync_folder(&config.machine_dir(machine))?;
        return Ok(None);
    }
    let name = drive.file_name();
    let shelves = config.state_dir.join("kept");
    // Two disks of one name may go within a second.
    let shelf = (unix_sec..)
        .map(|second| shelves.join(format!("{machine}-{second}")))
        .find(|shelf| !shelf.join(&name).exists());
    let shelf = shelf.unwrap_or(shelves);
    keep(&path, &shelf, &name)?;
    Ok(Some(shelf.join(name)))
}

/// Moves the file at `path` to `shelf`, under `name`.
fn keep(path: &Path, shelf: &Path, name: &str) -> Result<(), Problem> {
    let target = shelf.join(name);
    let what = format!("cannot keep {} as {}", path.display(), target.display());
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(shelf)
        .and_then(|()| fs::rename(path, &target))
        .map_err(failed(what))?;
    sync_folder(shelf)
}

/// Bytes of a regular file or a block device.
///
/// # Errors
/// `internal`.
pub fn size_of(path: &Path) -> Result<u64, Problem> {
    let size = File::open(path).and_then(|mut file| file.seek(SeekFrom::End(0)));
    size.map_err(failed(format!("cannot look at {}", path.display())))
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
    for upload in kernel.into_iter().chain(initrd) {
        // One that stays is removed by age.
        let _ = fs::remove_file(config.uploads_dir().join(upload));
    }
    for drive in &record.source.disks {
        forget_upload(config, drive);
    }
}

/// Removes the upload that a disk was made from.
pub fn forget_upload(config: &CoreConfig, drive: &Drive) {
    if let Disk::Upload { upload, .. } = &drive.disk {
        // As above.
        let _ = fs::remove_file(config.uploads_dir().join(upload));
    }
}

/// Makes a file this large if it is smaller, durably; what is added is a hole.
///
/// # Errors
/// `disk-full`, `internal`.
pub fn set_size(path: &Path, size_bytes: u64) -> Result<(), Problem> {
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
        for drive in &record.source.disks {
            let path = disk_path(config, &record.name, drive);
            if drive.disk.private_bytes().is_none() || !path.exists() {
                continue;
            }
            let shelf = config.state_dir.join("kept").join(format!("{}-{unix_sec}", record.name));
            keep(&path, &shelf, &drive.file_name())?;
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
        machine.source.disks =
            vec![Drive::first(0, Disk::Image { image: "x".to_owned(), size_bytes: 8 << 20 })];
        prepare(&config, &machine).unwrap();
        prepare(&config, &machine).unwrap();
        let disk = disk_path(&config, "demo", &machine.source.disks[0]);
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
    fn a_disk_that_is_taken_out_is_kept_once_and_never_over_another() {
        let folder = tempfile::tempdir().unwrap();
        let config = config(folder.path());
        fs::create_dir_all(config.machine_dir("demo")).unwrap();
        let name = "data1".to_owned();
        let drive = Drive { name, ..Drive::first(0, Disk::Empty { size_bytes: 4096 }) };
        let mut kept = Vec::new();
        for _ in 0..2 {
            add_disk(&config, "demo", &drive).unwrap();
            assert!(add_disk(&config, "demo", &drive).is_err(), "never over what is there");
            kept.push(take_disk(&config, "demo", &drive, false, 5).unwrap().unwrap());
            assert_eq!(take_disk(&config, "demo", &drive, false, 5).unwrap(), None, "twice is once");
        }
        assert!(
            kept[0].ends_with("kept/demo-5/disk-data1.raw")
                && kept[1].ends_with("kept/demo-6/disk-data1.raw")
        );
        assert!(kept.iter().all(|path| size_of(path).unwrap() == 4096));
        add_disk(&config, "demo", &drive).unwrap();
        assert_eq!(take_disk(&config, "demo", &drive, true, 5).unwrap(), None);
        assert_eq!(fs::read_dir(config.machine_dir("demo")).unwrap().count(), 0);
    }

    #[test]
    fn a_run_that_fails_leaves_its_uploads() {
        let folder = tempfile::tempdir().unwrap();
        let config = config(folder.path());
        fs::create_dir_all(config.uploads_dir()).unwrap();
        fs::write(config.uploads_dir().join("k1"), "kernel").unwrap();
        let mut machine = record("demo");
        machine.source.kernel = Kernel::Own { upload: "k1".to_owned() };
        machine.source.disks =
            vec![Drive::first(0, Disk::Upload { upload: "gone".to_owned(), size_bytes: 512 })];
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
