//! A root file system made of an archive, without root's privileges.
//!
//! ```text
//! archive ─▶ tar::Reader ─▶ Tree (what belongs where) + spool/N (contents, under numbers) ─▶ mke2fs, debugfs, e2fsck ─▶ ext4
//! ```
//!
//! Owners, devices and set-user-id bits exist only inside the ext4: on the host there are plain files with numbers for names, so that no
//! path of the archive can reach anything. debugfs(8) is told what to do by a script in which every name is quoted and free of control
//! characters; it reports errors as text only, so any text is an error, and e2fsck(8) has the last word. Extended attributes are left out.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::receive::{check_space, new_id};
use super::tar::{Entry, Kinds, Reader};
use crate::problem::{Kind, Problem};

/// Most entries of an archive.
const MAX_ENTRIES: usize = 1_000_000;
/// ext4's block in bytes.
const BLOCK_BYTES: u64 = 4096;
/// Free space in the file system when it is made, beyond a quarter of its contents, in bytes.
const SPARE_BYTES: u64 = 256 << 20;
/// Longest text of a tool that is repeated in a message.
const MAX_TOLD_CHARS: usize = 300;

/// What lies at a path.
#[derive(Debug)]
struct Node {
    entry: Entry,
    /// Number of the spooled file.
    spooled: Option<u64>,
    /// Names that this file has.
    links: u32,
}

/// Everything in the archive, by path. Parents come before their children.
#[derive(Debug, Default)]
struct Tree {
    nodes: BTreeMap<String, Node>,
    bytes: u64,
}

fn bad(message: String) -> Problem {
    Problem::new(Kind::BadRequest, "image-format", message)
}

fn failed(what: &Path) -> impl Fn(io::Error) -> Problem + '_ {
    move |error| Problem::internal(what.display(), error)
}

/// Removes a folder when dropped.
struct Spool(PathBuf);

impl Drop for Spool {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Makes an ext4 in a new file of `folder` from `archive`, leaving `reserve` bytes of the host's file system free. Blocks, for as long as
/// copying takes; the caller removes the file.
///
/// # Errors
/// `image-format`, `disk-full`, `internal`; nothing is left then.
pub fn make(archive: &Path, folder: &Path, reserve: u64) -> Result<PathBuf, Problem> {
    let spool = Spool(folder.join(format!("spool-{}", new_id()?)));
    fs::DirBuilder::new().mode(0o700).create(&spool.0).map_err(failed(&spool.0))?;
    let size = fs::metadata(archive).map_err(failed(archive))?.len();
    // Once spooled, once in the file system.
    check_space(folder, size.saturating_mul(2), reserve)?;
    let source = BufReader::new(File::open(archive).map_err(failed(archive))?);
    let tree = Tree::read(&mut Reader::new(source), &spool.0)?;
    let disk = folder.join(new_id()?);
    let made = tree.build(&spool.0, &disk);
    if made.is_err() {
        let _ = fs::remove_file(&disk);
    }
    made.map(|()| disk)
}

impl Tree {
    /// Reads all entries; contents go to `spool`.
    fn read<R: io::Read>(reader: &mut Reader<R>, spool: &Path) -> Result<Self, Problem> {
        let mut tree = Self::default();
        let mut number = 0;
        while let Some(entry) = reader.next_entry()? {
            if tree.nodes.len() >= MAX_ENTRIES {
                return Err(bad(format!("the archive has more than {MAX_ENTRIES} entries")));
            }
            let mut spooled = None;
            if let Kinds::File(size) = entry.kind {
                number += 1;
                let path = spool.join(number.to_string());
                let mut file = OpenOptions::new()
                    .write(true)
                    .create_new(true)
                    .mode(0o600)
                    .open(&path)
                    .map_err(failed(&path))?;
                let copied = io::copy(&mut reader.contents(), &mut file).map_err(failed(&path))?;
                if copied != size {
                    return Err(bad(format!("the archive ends within {}", entry.path)));
                }
                tree.bytes += size.next_multiple_of(BLOCK_BYTES);
                spooled = Some(number);
            }
            tree.put(entry, spooled)?;
        }
        if tree.nodes.is_empty() { Err(bad("the archive is empty".to_owned())) } else { Ok(tree) }
    }

    /// Puts an entry where it belongs; a later one replaces an earlier one of the same path.
    fn put(&mut self, entry: Entry, spooled: Option<u64>) -> Result<(), Problem> {
        self.make_parents(&entry.path)?;
        if let Kinds::HardLink(target) = &entry.kind {
            let target = self.nodes.get_mut(target).filter(|node| node.spooled.is_some());
            let target =
                target.ok_or_else(|| bad(format!("{} is a link to a file that is not there", entry.path)))?;
            target.links += 1;
        }
        if let Some(old) = self.nodes.get(&entry.path) {
            let folders = (old.entry.kind == Kinds::Folder, entry.kind == Kinds::Folder);
            if folders.0 != folders.1 {
                return Err(bad(format!("{} is there twice, as a folder and as something else", entry.path)));
            }
            if matches!(old.entry.kind, Kinds::HardLink(_)) || old.links > 1 {
                return Err(bad(format!("{} is there twice, once with links", entry.path)));
            }
        }
        self.nodes.insert(entry.path.clone(), Node { entry, spooled, links: 1 });
        Ok(())
    }

    /// Makes the folders above `path` that no entry has named yet, as root's.
    fn make_parents(&mut self, path: &str) -> Result<(), Problem> {
        let ends = path.match_indices('/').map(|(at, _)| at);
        for end in ends {
            let parent = &path[..end];
            match self.nodes.get(parent) {
                Some(node) if node.entry.kind == Kinds::Folder => {}
                Some(_) => return Err(bad(format!("{path} lies in {parent}, which is no folder"))),
                None => {
                    let path = parent.to_owned();
                    let entry = Entry {
                        path: path.clone(),
                        kind: Kinds::Folder,
                        mode: 0o755,
                        uid: 0,
                        gid: 0,
                        mtime: 0,
                    };
                    self.nodes.insert(path, Node { entry, spooled: None, links: 1 });
                }
            }
        }
        Ok(())
    }

    /// Makes the file system.
    fn build(&self, spool: &Path, disk: &Path) -> Result<(), Problem> {
        let file =
            OpenOptions::new().write(true).create_new(true).mode(0o600).open(disk).map_err(failed(disk))?;
        let contents = self.bytes + self.nodes.len() as u64 * (BLOCK_BYTES + 256);
        let size = (contents + contents / 4 + SPARE_BYTES).next_multiple_of(1 << 20);
        file.set_len(size).map_err(failed(disk))?;
        let inodes = (self.nodes.len() + self.nodes.len() / 4 + 16_384).to_string();
        let script = spool.join("script");
        fs::write(&script, self.script(spool)).map_err(failed(&script))?;
        let (disk_name, script_name) = (disk.to_string_lossy(), script.to_string_lossy());
        tool(
            "mke2fs",
            &["-q", "-F", "-t", "ext4", "-m", "0", "-E", "root_owner=0:0", "-N", &inodes, &disk_name],
        )?;
        tool("debugfs", &["-w", "-f", &script_name, &disk_name])?;
        tool("e2fsck", &["-f", "-n", &disk_name])?;
        file.sync_all().map_err(failed(disk))
    }

    /// What debugfs(8) is told.
    fn script(&self, spool: &Path) -> String {
        let mut script = String::new();
        let mut inside = None;
        let is_link = |node: &Node| matches!(node.entry.kind, Kinds::HardLink(_));
        // A link's target must be there before it: links last.
        let (links, others): (Vec<_>, Vec<_>) = self.nodes.iter().partition(|(_, node)| is_link(node));
        for (path, node) in others.into_iter().chain(links) {
            let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
            if inside != Some(parent) {
                let _ = writeln!(script, "cd \"/{parent}\"");
                inside = Some(parent);
            }
            let entry = &node.entry;
            let _ = match &entry.kind {
                Kinds::File(_) => {
                    writeln!(
                        script,
                        "write \"{}\" \"{name}\"",
                        spool.join(node.spooled.unwrap_or(0).to_string()).display()
                    )
                }
                Kinds::HardLink(target) => {
                    let _ = writeln!(script, "ln \"/{target}\" \"{name}\"");
                    continue;
                }
                Kinds::SymLink(target) => writeln!(script, "symlink \"{name}\" \"{target}\""),
                Kinds::Folder if path.is_empty() || path == "lost+found" => Ok(()),
                Kinds::Folder => writeln!(script, "mkdir \"{name}\""),
                Kinds::Char(major, minor) => writeln!(script, "mknod \"{name}\" c {major} {minor}"),
                Kinds::Block(major, minor) => writeln!(script, "mknod \"{name}\" b {major} {minor}"),
                Kinds::Pipe => writeln!(script, "mknod \"{name}\" p"),
            };
            attributes(&mut script, path, node);
        }
        script
    }
}

/// Owner, permissions, time and number of names (`struct ext4_inode`; owners have two halves there).
fn attributes(script: &mut String, path: &str, node: &Node) {
    let entry = &node.entry;
    let kind = match entry.kind {
        Kinds::File(_) | Kinds::HardLink(_) => 0o100_000,
        Kinds::SymLink(_) => 0o120_000,
        Kinds::Folder => 0o040_000,
        Kinds::Char(..) => 0o020_000,
        Kinds::Block(..) => 0o060_000,
        Kinds::Pipe => 0o010_000,
    };
    let mode = if matches!(entry.kind, Kinds::SymLink(_)) { 0o777 } else { entry.mode };
    let mut set = |field: &str, value: String| {
        let _ = writeln!(script, "sif \"/{path}\" {field} {value}");
    };
    set("mode", format!("0{:o}", kind | mode));
    set("uid", entry.uid.to_string());
    set("gid", entry.gid.to_string());
    set("mtime", format!("@{}", entry.mtime));
    if node.links > 1 {
        set("links_count", node.links.to_string());
    }
}

/// Runs one of e2fsprogs' tools; anything it says on standard error, its name and version aside, is an error.
fn tool(name: &str, arguments: &[&str]) -> Result<(), Problem> {
    let mut command = Command::new(Path::new("/usr/sbin").join(name));
    // Standard output is one line for each command: nobody wants to read it.
    let output =
        command.args(arguments).env("LC_ALL", "C").stdin(Stdio::null()).stdout(Stdio::null()).output();
    let output = output.map_err(|error| {
        Problem::internal(format!("/usr/sbin/{name}"), error).fix("sudo apt install e2fsprogs")
    })?;
    let text = String::from_utf8_lossy(&output.stderr);
    let said: Vec<_> = text
        .lines()
        .filter(|line| !line.starts_with(&format!("{name} 1.")) && !line.trim().is_empty())
        .collect();
    if output.status.success() && said.is_empty() {
        return Ok(());
    }
    let told: String = said.join("; ").chars().take(MAX_TOLD_CHARS).collect();
    Err(Problem::internal(format!("making a file system: {name} ({})", output.status), told))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An archive made by tar(1) of what `shell` makes in an empty folder.
    fn archive(dir: &Path, shell: &str) -> PathBuf {
        let (tree, archive) = (dir.join("tree"), dir.join("archive"));
        fs::create_dir_all(&tree).unwrap();
        let script = format!("cd \"$0\" && umask 022 && {shell} && tar --owner=0 --group=0 -cf \"$1\" .");
        let status = Command::new("sh").args(["-ec", &script]).arg(&tree).arg(&archive).status().unwrap();
        assert!(status.success());
        archive
    }

    /// What debugfs says to a question.
    fn ask(disk: &Path, question: &str) -> String {
        let output = Command::new("/usr/sbin/debugfs").args(["-R", question]).arg(disk).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    #[test]
    fn the_tree_is_in_the_file_system_with_owners_and_modes() {
        let dir = tempfile::tempdir().unwrap();
        let shell = "mkdir -p etc usr/bin 'odd name' && echo hello > etc/motd && printf x > usr/bin/su && chmod 4755 usr/bin/su \
             && ln -s usr/bin bin && ln usr/bin/su a-link && mkfifo pipe && echo y > 'odd name/<2>' && seq 100000 > big";
        let archive = archive(dir.path(), shell);
        let disk = make(&archive, dir.path(), 0).unwrap();
        assert_eq!(ask(&disk, "cat /etc/motd"), "hello\n");
        assert_eq!(ask(&disk, "cat \"/odd name/<2>\""), "y\n");
        assert_eq!(ask(&disk, "cat /big").lines().count(), 100_000);
        let su = ask(&disk, "stat /usr/bin/su");
        assert!(su.contains("Mode:  04755") && su.contains("Links: 2") && su.contains("User:     0"), "{su}");
        assert!(ask(&disk, "stat /bin").contains("Fast link dest: \"usr/bin\""));
        assert!(ask(&disk, "stat /pipe").contains("Type: FIFO"));
        assert_eq!(
            fs::read_dir(dir.path()).unwrap().count(),
            3,
            "nothing is left but tree, archive and disk"
        );
    }

    fn entry(path: &str, kind: Kinds) -> Entry {
        Entry { path: path.to_owned(), kind, mode: 0o644, uid: 1000, gid: 1000, mtime: 0 }
    }

    #[test]
    fn nothing_is_put_behind_a_link() {
        let mut tree = Tree::default();
        tree.put(entry("a", Kinds::SymLink("/etc".to_owned())), None).unwrap();
        assert!(
            tree.put(entry("a/passwd", Kinds::File(0)), Some(1))
                .unwrap_err()
                .message
                .contains("a, which is no folder")
        );
        assert!(tree.put(entry("b", Kinds::HardLink("a".to_owned())), None).is_err());
        assert!(tree.put(entry("a", Kinds::Folder), None).is_err());
    }

    #[test]
    fn missing_folders_are_made_and_later_entries_win() {
        let mut tree = Tree::default();
        tree.put(entry("x/y/z", Kinds::File(0)), Some(1)).unwrap();
        tree.put(entry("x/y/z", Kinds::File(0)), Some(2)).unwrap();
        tree.put(entry("x", Kinds::Folder), None).unwrap();
        assert_eq!(tree.nodes.keys().collect::<Vec<_>>(), ["x", "x/y", "x/y/z"]);
        let script = tree.script(Path::new("/spool"));
        assert!(script.contains("write \"/spool/2\" \"z\"") && !script.contains("/spool/1"), "{script}");
    }

    #[test]
    fn what_is_no_archive_is_refused_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        for content in [vec![1; 2000], Vec::new()] {
            fs::write(&path, content).unwrap();
            assert_eq!(make(&path, dir.path(), 0).unwrap_err().code, "image-format");
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
