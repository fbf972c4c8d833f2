//! Goals are kept in a file of the machine: they outlive the agent and the machine's restarts, unlike [wishes](super::super::wants).
//!
//! Written whole to a new file, which then takes the place of the old one: there is always one that is complete.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use lathe_guest::protocol::inside::MAX_GOALS;
use nix::sys::statfs::{FsType, TMPFS_MAGIC, statfs};
use serde::{Deserialize, Serialize};

use super::terms::{Terms, Written};

/// Where goals are kept.
pub const FOLDER: &str = "/var/lib/lathe-guest";
const FILE: &str = "goals.json";
const NEW: &str = "goals.json.new";
const DAMAGED: &str = "goals.json.damaged";
/// What an initramfs is (linux/magic.h).
const RAMFS_MAGIC: FsType = FsType(0x8584_58f6);
/// Longer than so many goals can be, bytes.
const MAX_FILE_BYTES: u64 = 64 * 1024;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Content {
    goals: Vec<Written>,
}

/// The file.
#[derive(Debug)]
pub struct Store {
    folder: PathBuf,
}

impl Store {
    /// In this folder, which need not be there.
    pub fn new(folder: &Path) -> Self {
        Self { folder: folder.to_owned() }
    }

    /// The file's path.
    pub fn path(&self) -> PathBuf {
        self.folder.join(FILE)
    }

    /// Whether what is kept here is in memory, and lost when the machine starts anew.
    pub fn is_in_memory(&self) -> bool {
        statfs(&self.folder).is_ok_and(|stat| [RAMFS_MAGIC, TMPFS_MAGIC].contains(&stat.filesystem_type()))
    }

    /// What was kept. A file that makes no sense is put aside, so that the next one can be written.
    ///
    /// # Errors
    /// In words, when there is a file that cannot be read or makes no sense.
    pub fn load(&self) -> Result<Vec<Terms>, String> {
        let path = self.path();
        let mut text = Vec::new();
        let read = File::open(&path).and_then(|file| file.take(MAX_FILE_BYTES).read_to_end(&mut text));
        match read {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(format!("{}: {error}", path.display())),
            Ok(_) => {}
        }
        parse(&text).map_err(|wrong| {
            let aside = self.folder.join(DAMAGED);
            match fs::rename(&path, &aside) {
                Ok(()) => format!("{}: {wrong}; it is {} now", path.display(), aside.display()),
                Err(error) => format!("{}: {wrong}; it cannot be put aside: {error}", path.display()),
            }
        })
    }

    /// Keeps these, and no others.
    ///
    /// # Errors
    /// When the file cannot be written; what was kept before is there still.
    pub fn save(&self, goals: &[Terms]) -> io::Result<()> {
        if !self.folder.is_dir() {
            if let Some(parent) = self.folder.parent() {
                fs::create_dir_all(parent)?;
            }
            DirBuilder::new().mode(0o700).create(&self.folder)?;
        }
        let content = Content { goals: goals.iter().map(Written::from).collect() };
        let new = self.folder.join(NEW);
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
        let mut file = options.open(&new)?;
        // One may be left from before, of whatever mode.
        file.set_permissions(Permissions::from_mode(0o600))?;
        file.write_all(&serde_json::to_vec_pretty(&content)?)?;
        file.write_all(b"\n")?;
        file.sync_all()?;
        fs::rename(&new, self.path())?;
        File::open(&self.folder)?.sync_all()
    }
}

fn parse(text: &[u8]) -> Result<Vec<Terms>, String> {
    let content: Content = serde_json::from_slice(text).map_err(|error| error.to_string())?;
    let goals: Vec<Terms> = content.goals.into_iter().map(Terms::try_from).collect::<Result<_, _>>()?;
    if goals.len() > MAX_GOALS {
        return Err(format!("{} goals, and {MAX_GOALS} may be", goals.len()));
    }
    let twice = |(at, terms): (usize, &Terms)| goals.iter().take(at).any(|other| other.name == terms.name);
    match goals.iter().enumerate().find(|pair| twice(*pair)) {
        Some((_, terms)) => Err(format!("{} is there twice", terms.name)),
        None => Ok(goals),
    }
}

#[cfg(test)]
mod tests {
    use lathe_guest::protocol::inside::Goal;

    use super::*;

    fn terms(name: &str) -> Terms {
        Terms {
            name: name.into(),
            goal: Goal::Latency { permille: 950, under_usec: 20_000 },
            place: "http://127.0.0.1:9100/metrics".parse().unwrap(),
            metric: "a_seconds".into(),
        }
    }

    #[test]
    fn goals_are_kept_for_root_alone() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(&folder.path().join("lib/lathe-guest"));
        assert_eq!(store.load(), Ok(vec![]));
        let goals = vec![terms("web"), Terms { goal: Goal::Throughput, ..terms("batch") }];
        store.save(&goals).unwrap();
        assert_eq!(store.load(), Ok(goals));
        let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o7777;
        assert_eq!((mode(&store.folder), mode(&store.path())), (0o700, 0o600));
        fs::write(store.folder.join(NEW), "left behind").unwrap();
        store.save(&[terms("web")]).unwrap();
        assert_eq!(store.load().map(|goals| goals.len()), Ok(1));
        assert!(!store.folder.join(NEW).exists());
        let text = fs::read_to_string(store.path()).unwrap();
        assert!(text.contains(r#""metrics": "http://127.0.0.1:9100/metrics""#), "{text}");
    }

    #[test]
    fn a_file_that_makes_no_sense_is_put_aside_once() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(folder.path());
        let one = serde_json::to_value(Written::from(&terms("web"))).unwrap();
        let many: Vec<_> = (0..=MAX_GOALS).map(|at| Written::from(&terms(&format!("web{at}")))).collect();
        for (damaged, why) in [
            ("{".to_owned(), "EOF"),
            (serde_json::json!({ "goals": [one, one] }).to_string(), "web is there twice"),
            (serde_json::json!({ "goals": many }).to_string(), "5 goals"),
            (serde_json::json!({ "goals": [{ "name": "a" }] }).to_string(), "missing field"),
        ] {
            fs::write(store.path(), &damaged).unwrap();
            let words = store.load().unwrap_err();
            assert!(words.contains(why) && words.contains("goals.json.damaged now"), "{words}");
            assert_eq!(fs::read_to_string(folder.path().join(DAMAGED)).unwrap(), damaged);
            assert_eq!(store.load(), Ok(vec![]));
        }
    }

    #[test]
    fn where_nothing_can_be_written_is_said() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(Store::new(&file.join("lathe-guest")).save(&[terms("web")]).is_err());
        assert!(!Store::new(Path::new("/nowhere")).is_in_memory());
        assert!(!Store::new(Path::new("/proc")).is_in_memory());
    }
}
