//! The image store: `STATE/images/NAME/{disk.raw, meta.json}`, each made once and never changed.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::format::{compressed, refuse_foreign};
use super::receive::{Received, new_id};
use super::rootfs;
use crate::api::answer::check_image_name;
use crate::api::wire::{ImageView, Removed, SCHEMA};
use crate::machines::{ImageFile, ImageSource};
use crate::problem::{Kind, Problem};

/// A disk's sector in bytes: an image is made a multiple of it.
const SECTOR_BYTES: u64 = 512;
/// Version of `meta.json`.
const META_VERSION: u32 = 1;
/// Longest `meta.json` in bytes.
const MAX_META_BYTES: u64 = 64 * 1024;

/// All images of the host.
#[derive(Debug)]
pub struct Images {
    folder: PathBuf,
    incoming: PathBuf,
    reserve_bytes: u64,
}

/// What is kept beside the disk.
#[derive(Debug, Serialize, Deserialize)]
struct Meta {
    version: u32,
    format: String,
    sha256: String,
}

fn failed(what: &Path) -> impl Fn(io::Error) -> Problem + '_ {
    move |error| Problem::internal(what.display(), error)
}

impl Images {
    /// Opens `STATE/images`, makes it if it is missing, and throws away what was left half received.
    ///
    /// # Errors
    /// `internal` when the folders cannot be made.
    pub fn open(state_dir: &Path, reserve_bytes: u64) -> Result<Self, Problem> {
        let (folder, incoming) = (state_dir.join("images"), state_dir.join("incoming"));
        match fs::remove_dir_all(&incoming) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(&incoming)(error)),
            _ => {}
        }
        for folder in [&folder, &incoming] {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(failed(folder))?;
        }
        Ok(Self { folder, incoming, reserve_bytes })
    }

    /// Where files are received, on the same file system.
    pub fn incoming(&self) -> &Path {
        &self.incoming
    }

    /// Bytes of the file system that are kept for the host.
    pub fn reserve_bytes(&self) -> u64 {
        self.reserve_bytes
    }

    /// Refuses a name that is taken, before bytes travel for nothing.
    ///
    /// # Errors
    /// `image-exists`.
    pub fn check_free(&self, name: &str) -> Result<(), Problem> {
        if fs::symlink_metadata(self.folder.join(name)).is_err() {
            return Ok(());
        }
        Err(Problem::new(
            Kind::Conflict,
            "image-exists",
            format!("there is an image {name} already, and images never change"),
        )
        .fix(format!("lathe image rm {name}, or choose another name")))
    }

    /// Makes an image of a raw disk that was received. Blocks.
    ///
    /// # Errors
    /// `bad-name`, `image-exists`, `image-format`, `internal`; nothing is changed then.
    pub fn add_raw(&self, name: &str, received: &Received) -> Result<ImageView, Problem> {
        if received.size_bytes < SECTOR_BYTES {
            let message =
                format!("a disk of {} bytes: at least {SECTOR_BYTES} are needed", received.size_bytes);
            return Err(Problem::new(Kind::BadRequest, "image-format", message));
        }
        refuse_foreign(&received.head)?;
        let file = OpenOptions::new().write(true).open(received.path()).map_err(failed(received.path()))?;
        let whole_sectors = received.size_bytes.next_multiple_of(SECTOR_BYTES);
        file.set_len(whole_sectors).and_then(|()| file.sync_all()).map_err(failed(received.path()))?;
        self.add(name, "raw", &received.sha256, received.path())
    }

    /// Makes an image of an archive of a root file system. Blocks.
    ///
    /// # Errors
    /// `bad-name`, `image-exists`, `image-format`, `disk-full`, `internal`; nothing is changed then.
    pub fn add_tar(&self, name: &str, received: &Received) -> Result<ImageView, Problem> {
        check_image_name(name)?;
        if let Some(problem) = compressed(&received.head) {
            return Err(problem);
        }
        let disk = rootfs::make(received.path(), &self.incoming, self.reserve_bytes)?;
        let added = self.add(name, "tar", &received.sha256, &disk);
        if added.is_err() {
            let _ = fs::remove_file(&disk);
        }
        added
    }

    /// Makes an image of the file `disk`, which is moved away.
    pub(super) fn add(
        &self,
        name: &str,
        format: &str,
        sha256: &str,
        disk: &Path,
    ) -> Result<ImageView, Problem> {
        check_image_name(name)?;
        self.check_free(name)?;
        let made = self.incoming.join(format!("image-{}", new_id()?));
        let result = self.assemble(&made, name, format, sha256, disk);
        if result.is_err() {
            let _ = fs::remove_dir_all(&made);
        }
        result?;
        self.view(name)
    }

    fn assemble(
        &self,
        made: &Path,
        name: &str,
        format: &str,
        sha256: &str,
        disk: &Path,
    ) -> Result<(), Problem> {
        fs::DirBuilder::new().mode(0o700).create(made).map_err(failed(made))?;
        let meta = Meta { version: META_VERSION, format: format.to_owned(), sha256: sha256.to_owned() };
        let text = serde_json::to_vec_pretty(&meta).map_err(|error| Problem::internal("meta.json", error))?;
        let meta_path = made.join("meta.json");
        fs::write(&meta_path, text).map_err(failed(&meta_path))?;
        File::open(&meta_path).and_then(|file| file.sync_all()).map_err(failed(&meta_path))?;
        let disk_path = made.join("disk.raw");
        fs::rename(disk, &disk_path).map_err(failed(disk))?;
        fs::set_permissions(&disk_path, Permissions::from_mode(0o400)).map_err(failed(&disk_path))?;
        sync_folder(made)?;
        let path = self.folder.join(name);
        // Renaming onto a folder that is not empty fails: of two imports of one name the first wins.
        fs::rename(made, &path).map_err(|error| match error.kind() {
            io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists => {
                self.check_free(name).err().unwrap_or_else(|| Problem::internal(path.display(), error))
            }
            _ => Problem::internal(path.display(), error),
        })?;
        sync_folder(&self.folder)
    }

    /// All images, by name. One that cannot be read is left out and named in the journal.
    ///
    /// # Errors
    /// `internal` when the folder cannot be read.
    pub fn list(&self) -> Result<Vec<ImageView>, Problem> {
        let mut images = Vec::new();
        for entry in fs::read_dir(&self.folder).map_err(failed(&self.folder))? {
            let name = entry.map_err(failed(&self.folder))?.file_name();
            let Some(name) = name.to_str().filter(|name| check_image_name(name).is_ok()) else { continue };
            match self.view(name) {
                Ok(view) => images.push(view),
                Err(problem) => tracing::warn!("image {name}: {problem}"),
            }
        }
        images.sort_by(|left, right| left.name.cmp(&right.name));
        Ok(images)
    }

    /// One image.
    ///
    /// # Errors
    /// `no-such-image`, `internal`.
    pub fn view(&self, name: &str) -> Result<ImageView, Problem> {
        let path = self.disk(name)?;
        let disk = fs::metadata(&path).map_err(failed(&path))?;
        let meta_path = self.folder.join(name).join("meta.json");
        let size = fs::metadata(&meta_path).map_err(failed(&meta_path))?.len();
        if size > MAX_META_BYTES {
            return Err(Problem::internal(
                meta_path.display(),
                format!("{size} bytes, more than {MAX_META_BYTES}"),
            ));
        }
        let text = fs::read(&meta_path).map_err(failed(&meta_path))?;
        let meta: Meta =
            serde_json::from_slice(&text).map_err(|error| Problem::internal(meta_path.display(), error))?;
        Ok(ImageView {
            schema: SCHEMA,
            name: name.to_owned(),
            format: meta.format,
            size_bytes: disk.len(),
            occupied_bytes: disk.blocks() * 512,
            sha256: meta.sha256,
        })
    }

    /// Removes an image. Machines made from it have disks of their own.
    ///
    /// # Errors
    /// `no-such-image`, `internal`.
    pub fn remove(&self, name: &str) -> Result<Removed, Problem> {
        self.disk(name)?;
        let path = self.folder.join(name);
        let doomed = self.incoming.join(format!("removed-{}", new_id()?));
        fs::rename(&path, &doomed).map_err(failed(&path))?;
        sync_folder(&self.folder)?;
        fs::remove_dir_all(&doomed).map_err(failed(&doomed))?;
        Ok(Removed { schema: SCHEMA, name: name.to_owned(), kept: None })
    }

    /// Where an image's disk lies.
    ///
    /// # Errors
    /// `no-such-image`.
    pub fn disk(&self, name: &str) -> Result<PathBuf, Problem> {
        let missing = || {
            Problem::new(
                Kind::NotFound,
                "no-such-image",
                format!("there is no image {}", crate::nearest::quoted(name)),
            )
        };
        check_image_name(name)?;
        let path = self.folder.join(name).join("disk.raw");
        if path.is_file() { Ok(path) } else { Err(missing().fix("lathe image list")) }
    }
}

impl ImageSource for Images {
    fn open(&self, name: &str) -> Result<ImageFile, Problem> {
        let path = self.disk(name)?;
        let size_bytes = fs::metadata(&path).map_err(failed(&path))?.len();
        Ok(ImageFile { path, size_bytes })
    }
}

/// Waits until the names in a folder are on the disk.
pub(super) fn sync_folder(folder: &Path) -> Result<(), Problem> {
    File::open(folder).and_then(|file| file.sync_all()).map_err(failed(folder))
}

#[cfg(test)]
mod tests {
    use axum::body::Body;

    use super::super::receive::receive;
    use super::*;

    async fn received(images: &Images, content: Vec<u8>) -> Received {
        receive(Body::from(content), images.incoming().to_owned(), 0, None).await.unwrap()
    }

    fn incoming_is_empty(images: &Images) -> bool {
        fs::read_dir(images.incoming()).unwrap().next().is_none()
    }

    #[tokio::test]
    async fn an_image_is_made_listed_opened_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let images = Images::open(dir.path(), 0).unwrap();
        let disk = received(&images, vec![3; 1000]).await;
        let view = images.add_raw("debian-12", &disk).unwrap();
        drop(disk);
        assert_eq!((view.size_bytes, view.format.as_str(), view.sha256.len()), (1024, "raw", 64));
        let again = Images::open(dir.path(), 0).unwrap();
        assert_eq!(again.list().unwrap().len(), 1);
        let path = again.disk("debian-12").unwrap();
        assert_eq!(fs::read(&path).unwrap()[..1000], [3; 1000]);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o400);
        again.remove("debian-12").unwrap();
        assert_eq!(again.disk("debian-12").unwrap_err().code, "no-such-image");
        assert!(again.list().unwrap().is_empty() && incoming_is_empty(&again));
    }

    #[tokio::test]
    async fn a_name_is_given_once() {
        let dir = tempfile::tempdir().unwrap();
        let images = Images::open(dir.path(), 0).unwrap();
        images.add_raw("a", &received(&images, vec![1; 512]).await).unwrap();
        let problem = images.add_raw("a", &received(&images, vec![2; 512]).await).unwrap_err();
        assert_eq!((problem.kind, problem.code), (Kind::Conflict, "image-exists"));
        assert_eq!(fs::read(images.disk("a").unwrap()).unwrap(), [1; 512]);
        assert!(incoming_is_empty(&images));
    }

    #[tokio::test]
    async fn what_is_no_disk_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let images = Images::open(dir.path(), 0).unwrap();
        for content in [b"QFI\xfb".repeat(200), vec![1; 100], Vec::new()] {
            assert_eq!(
                images.add_raw("a", &received(&images, content).await).unwrap_err().code,
                "image-format"
            );
        }
        assert_eq!(
            images.add_raw("../a", &received(&images, vec![1; 512]).await).unwrap_err().code,
            "bad-name"
        );
        assert!(images.list().unwrap().is_empty() && incoming_is_empty(&images));
    }

    #[test]
    fn what_a_crash_left_half_received_is_thrown_away() {
        let dir = tempfile::tempdir().unwrap();
        let images = Images::open(dir.path(), 0).unwrap();
        fs::write(images.incoming().join("half"), "x").unwrap();
        assert!(incoming_is_empty(&Images::open(dir.path(), 0).unwrap()));
    }
}
