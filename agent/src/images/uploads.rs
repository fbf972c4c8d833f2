//! Uploads: files that a client sent to make a machine from. A run moves them into the machine; what nobody uses is removed after
//! [`KEPT`].

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::receive::{Received, new_id};
use super::store::sync_folder;
use crate::api::wire::Upload;
use crate::problem::{Kind, Problem};

/// How long an upload is kept that no machine uses.
pub const KEPT: Duration = Duration::from_secs(3600);
/// How often [`Uploads::expire`] wants to be called.
pub const EXPIRE_EVERY: Duration = Duration::from_secs(300);
/// Most uploads that wait to be used.
const MAX_WAITING: usize = 256;

/// The uploads of this host.
#[derive(Debug)]
pub struct Uploads {
    folder: PathBuf,
}

impl Uploads {
    /// Opens the folder, and makes it if it is missing.
    ///
    /// # Errors
    /// `internal` when it cannot be made.
    pub fn open(folder: PathBuf) -> Result<Self, Problem> {
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder);
        made.map_err(|error| Problem::internal(folder.display(), error))?;
        Ok(Self { folder })
    }

    /// Refuses when too many wait already, before bytes travel for nothing.
    ///
    /// # Errors
    /// `too-many-uploads`.
    pub fn check_room(&self) -> Result<(), Problem> {
        let waiting = fs::read_dir(&self.folder)
            .map_err(|error| Problem::internal(self.folder.display(), error))?
            .count();
        if waiting < MAX_WAITING {
            return Ok(());
        }
        Err(Problem::new(
            Kind::Unavailable,
            "too-many-uploads",
            format!("{waiting} uploads wait to be used, at most {MAX_WAITING} may"),
        )
        .detail("each is removed one hour after it came"))
    }

    /// Keeps what was received under a new id. Blocks.
    ///
    /// # Errors
    /// `internal`.
    pub fn add(&self, received: &Received) -> Result<Upload, Problem> {
        let id = new_id()?;
        let path = self.folder.join(&id);
        let failed = |error: io::Error| Problem::internal(path.display(), error);
        fs::set_permissions(received.path(), Permissions::from_mode(0o600)).map_err(failed)?;
        fs::rename(received.path(), &path).map_err(failed)?;
        sync_folder(&self.folder)?;
        Ok(Upload { id, size_bytes: received.size_bytes })
    }

    /// Throws an upload away that nobody will use.
    ///
    /// # Errors
    /// `no-such-upload`, `internal`.
    pub fn discard(&self, id: &str) -> Result<(), Problem> {
        let missing = || Problem::new(Kind::NotFound, "no-such-upload", "there is no such upload");
        if id.is_empty() || !id.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(missing());
        }
        fs::remove_file(self.folder.join(id)).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => missing(),
            _ => Problem::internal(format!("cannot remove upload {id}"), error),
        })
    }

    /// Removes what is older than [`KEPT`]; says how many. A file that cannot be looked at is left.
    pub fn expire(&self, now: SystemTime) -> usize {
        let Ok(entries) = fs::read_dir(&self.folder) else { return 0 };
        let old = |path: &Path| {
            let modified = fs::metadata(path).and_then(|metadata| metadata.modified());
            modified.is_ok_and(|modified| now.duration_since(modified).is_ok_and(|age| age > KEPT))
        };
        let paths = entries.filter_map(Result::ok).map(|entry| entry.path());
        paths.filter(|path| old(path) && fs::remove_file(path).is_ok()).count()
    }
}

#[cfg(test)]
mod tests {
    use axum::body::Body;

    use super::super::receive::receive;
    use super::*;

    #[tokio::test]
    async fn an_upload_is_kept_for_an_hour() {
        let dir = tempfile::tempdir().unwrap();
        let uploads = Uploads::open(dir.path().join("uploads")).unwrap();
        let received = receive(Body::from("kernel"), dir.path().to_owned(), 0, None).await.unwrap();
        let upload = uploads.add(&received).unwrap();
        drop(received);
        let path = dir.path().join("uploads").join(&upload.id);
        assert_eq!(upload.size_bytes, 6);
        assert_eq!(fs::read(&path).unwrap(), b"kernel");
        assert_eq!(uploads.expire(SystemTime::now() + KEPT / 2), 0);
        assert!(path.exists());
        assert_eq!(uploads.expire(SystemTime::now() + KEPT * 2), 1);
        assert!(!path.exists());
    }

    #[test]
    fn uploads_that_nobody_uses_are_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let uploads = Uploads::open(dir.path().to_owned()).unwrap();
        for number in 0..MAX_WAITING {
            uploads.check_room().unwrap();
            fs::write(dir.path().join(number.to_string()), "").unwrap();
        }
        assert_eq!(uploads.check_room().unwrap_err().code, "too-many-uploads");
    }
}
