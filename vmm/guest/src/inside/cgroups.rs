//! Applications by control group: the leaf-most units of the tree (cgroup v2).
//!
//! A slice is never an application, what is in it is. A unit (`.service`, `.scope`) is one unless it has units or slices of its own, as a
//! user's manager has. What is neither, such as a container manager's folder, is one where nothing is below it. Files:
//! Documentation/admin-guide/cgroup-v2.rst of the kernel.
//!
//! The tree is walked some folders a look. CPU time is read of the most demanding at each look and of the others in turn; what costs more to
//! read, in turn as well.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use lathe_guest::protocol::inside::{Application, MAX_APPLICATIONS};

use super::choice::demand;
use super::files::{Files, field, stalled_usec};
use super::rate::Rate;

const FOLDER: &str = "sys/fs/cgroup";
/// Folders walked in a look.
const WALKED: usize = 32;
/// Entries of one folder that are looked at: some sixty files of the kernel's, and what is below.
const MAX_ENTRIES: usize = 1024;
/// Folders that wait to be walked.
const MAX_PENDING: usize = 2048;
/// Units below this depth belong to the one above them.
const MAX_DEPTH: usize = 8;
/// Between two walks.
const REST: Duration = Duration::from_secs(5);
/// Applications that are known at a time.
const MAX_GROUPS: usize = 256;
/// Of those that are not the most demanding, so many are read in a look.
const IN_TURN: usize = 32;
/// Of so many everything is read in a look: of the first of the most demanding always.
const ALWAYS: usize = 4;
/// Of so many others in turn.
const DETAILS_IN_TURN: usize = 8;
/// Most files read in a look: the CPU's, six others where everything is read, and the devices.
#[cfg(test)]
const MOST_FILES: usize = MAX_APPLICATIONS + IN_TURN + (ALWAYS + DETAILS_IN_TURN) * 6 + 1;
/// Block devices that are made of others: their operations would count twice (proc(5), /proc/devices).
const STACKED: [&str; 4] = ["device-mapper", "md", "loop", "zram"];

/// All that is known.
#[derive(Default)]
pub struct Cgroups {
    groups: BTreeMap<PathBuf, Group>,
    pending: Vec<(PathBuf, usize)>,
    walk: u64,
    walked_at: Option<Instant>,
    /// Those found in this walk that there was no room for, and those of the walk before.
    missed: (u32, u32),
    cursor: usize,
    detail_cursor: usize,
    stacked: Option<Vec<u64>>,
}

#[derive(Default)]
struct Group {
    walk: u64,
    told: Application,
    cpu: Rate,
    stalled: [Rate; 3],
    read: Rate,
    written: Rate,
    operations: Rate,
}

impl Cgroups {
    /// Whether there are no applications of this kind.
    pub fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    /// How many there are that are not looked at.
    pub fn unseen(&self) -> u32 {
        self.missed.1
    }

    /// What is known of each.
    pub fn told(&self) -> Vec<Application> {
        self.groups.values().map(|group| group.told.clone()).collect()
    }

    /// Looks a little further.
    pub fn look(&mut self, root: &Path, files: &mut Files, now: Instant) {
        let tree = root.join(FOLDER);
        self.walk(&tree, now);
        if self.groups.is_empty() {
            return;
        }
        if self.stacked.is_none() {
            self.stacked = files.read(&root.join("proc/devices")).map(stacked);
        }
        let mut paths: Vec<(u64, PathBuf)> =
            self.groups.iter().map(|(path, group)| (demand(&group.told, 1, 1 << 30), path.clone())).collect();
        paths.sort_by_key(|(demand, _)| std::cmp::Reverse(*demand));
        let paths: Vec<PathBuf> = paths.into_iter().map(|(_, path)| path).collect();
        let (leading, rest) = paths.split_at(paths.len().min(MAX_APPLICATIONS));
        let in_turn = turn(rest, &mut self.cursor, IN_TURN);
        for path in leading.iter().chain(in_turn) {
            self.read_cpu(&tree, files, path, now);
        }
        let (always, rest) = paths.split_at(paths.len().min(ALWAYS));
        for path in always.iter().chain(turn(rest, &mut self.detail_cursor, DETAILS_IN_TURN)) {
            self.read_details(&tree, files, path, now);
        }
    }

    /// Walks some folders of the tree; when all were walked, what was not there is gone.
    fn walk(&mut self, tree: &Path, now: Instant) {
        if self.pending.is_empty() {
            if self.walked_at.is_some_and(|at| now.saturating_duration_since(at) < REST) {
                return;
            }
            self.walk += 1;
            self.missed.0 = 0;
            self.pending.push((PathBuf::new(), 0));
        }
        for _ in 0..WALKED {
            let Some((path, depth)) = self.pending.pop() else { break };
            self.visit(tree, path, depth);
        }
        if self.pending.is_empty() {
            let walk = self.walk;
            self.groups.retain(|_, group| group.walk == walk);
            self.missed.1 = self.missed.0;
            self.walked_at = Some(now);
        }
    }

    fn visit(&mut self, tree: &Path, path: PathBuf, depth: usize) {
        let Ok(entries) = fs::read_dir(tree.join(&path)) else { return };
        let folders = entries.take(MAX_ENTRIES).flatten();
        let folders = folders.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        let name = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned());
        let own = name(&path).unwrap_or_default();
        let below = folders.map(|entry| path.join(entry.file_name()));
        let below: Vec<PathBuf> = if is_unit(&own) {
            below.filter(|path| name(path).is_some_and(|name| is_unit(&name) || is_slice(&name))).collect()
        } else {
            below.collect()
        };
        let leads_on = depth < MAX_DEPTH && !below.is_empty();
        if leads_on {
            let room = MAX_PENDING.saturating_sub(self.pending.len());
            self.pending.extend(below.into_iter().take(room).map(|path| (path, depth + 1)));
        } else if depth > 0 && !is_slice(&own) {
            self.found(path);
        }
    }

    fn found(&mut self, path: PathBuf) {
        let full = self.groups.len() >= MAX_GROUPS;
        match self.groups.entry(path) {
            Entry::Occupied(mut known) => known.get_mut().walk = self.walk,
            Entry::Vacant(_) if full => self.missed.0 = self.missed.0.saturating_add(1),
            Entry::Vacant(place) => {
                let told = Application { name: title(place.key()), ..Application::default() };
                place.insert(Group { walk: self.walk, told, ..Group::default() });
            }
        }
    }

    fn read_cpu(&mut self, tree: &Path, files: &mut Files, path: &Path, now: Instant) {
        let Some(group) = self.groups.get_mut(path) else { return };
        match files.read(&tree.join(path).join("cpu.stat")) {
            Some(text) => {
                group.cpu.take(now, field(text, "usage_usec").unwrap_or(0));
                group.told.cpu_milli = group.cpu.milli();
            }
            None => {
                self.groups.remove(path);
            }
        }
    }

    fn read_details(&mut self, tree: &Path, files: &mut Files, path: &Path, now: Instant) {
        let Some(group) = self.groups.get_mut(path) else { return };
        let folder = tree.join(path);
        if let Some(bytes) = files.number(&folder.join("memory.current")) {
            group.told.memory_bytes = bytes;
        }
        if let Some(text) = files.read(&folder.join("memory.stat")) {
            let of = |name| field(text, name).unwrap_or(0);
            group.told.anon_bytes = of("anon");
            group.told.file_bytes = of("file");
            group.told.working_set_bytes = group.told.memory_bytes.saturating_sub(of("inactive_file"));
        }
        if let Some(text) = files.read(&folder.join("io.stat")) {
            let [read, written, operations] = io(text, self.stacked.as_deref().unwrap_or_default());
            group.read.take(now, read);
            group.written.take(now, written);
            group.operations.take(now, operations);
            group.told.read_bytes_per_sec = group.read.per_sec;
            group.told.written_bytes_per_sec = group.written.per_sec;
            group.told.operations_per_sec = Some(group.operations.per_sec);
        }
        for (rate, name) in group.stalled.iter_mut().zip(["cpu.pressure", "memory.pressure", "io.pressure"]) {
            if let Some(usec) = files.read(&folder.join(name)).and_then(stalled_usec) {
                rate.take(now, usec);
            }
        }
        let told = &mut group.told;
        [told.cpu_some_permille, told.memory_some_permille, told.io_some_permille] =
            group.stalled.map(|rate| rate.permille());
    }
}

/// `most` of them from where the last turn ended.
fn turn<'a>(all: &'a [PathBuf], cursor: &mut usize, most: usize) -> Vec<&'a PathBuf> {
    let begin = if *cursor < all.len() { *cursor } else { 0 };
    let taken: Vec<_> = all.iter().skip(begin).take(most).collect();
    *cursor = begin + taken.len();
    taken
}

fn is_slice(name: &str) -> bool {
    name.ends_with(".slice")
}

fn is_unit(name: &str) -> bool {
    [".service", ".scope", ".socket", ".mount", ".swap"].iter().any(|kind| name.ends_with(kind))
}

/// What it is called: its path without slices.
fn title(path: &Path) -> String {
    let names = path.iter().map(|name| name.to_string_lossy());
    names.filter(|name| !is_slice(name)).collect::<Vec<_>>().join("/")
}

/// Numbers of block drivers whose devices are made of others.
fn stacked(devices: &str) -> Vec<u64> {
    let blocks = devices.split_once("Block devices:").map_or("", |(_, blocks)| blocks);
    let drivers = blocks.lines().filter_map(|line| line.trim().split_once(' '));
    drivers.filter(|(_, name)| STACKED.contains(name)).filter_map(|(number, _)| number.parse().ok()).collect()
}

/// Bytes read, bytes written and operations: `254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0`.
fn io(text: &str, stacked: &[u64]) -> [u64; 3] {
    let mut sums = [0_u64; 3];
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let major = words.next().and_then(|device| device.split_once(':')?.0.parse::<u64>().ok());
        if major.is_none_or(|major| stacked.contains(&major)) {
            continue;
        }
        for (name, value) in words.filter_map(|word| word.split_once('=')) {
            let place = match name {
                "rbytes" => 0,
                "wbytes" => 1,
                "rios" | "wios" => 2,
                _ => continue,
            };
            sums[place] = sums[place].saturating_add(value.parse().unwrap_or(0));
        }
    }
    sums
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    struct Tree(tempfile::TempDir);

    impl Tree {
        fn new() -> Self {
            let tree = Self(tempfile::tempdir().unwrap());
            fs::create_dir_all(tree.0.path().join(FOLDER)).unwrap();
            tree
        }

        fn group(&self, path: &str, usec: u64, memory: u64) {
            let folder = self.0.path().join(FOLDER).join(path);
            fs::create_dir_all(&folder).unwrap();
            let write = |name: &str, text: String| fs::write(folder.join(name), text).unwrap();
            write("cpu.stat", format!("usage_usec {usec}\nuser_usec 0\n"));
            write("memory.current", format!("{memory}\n"));
            write("memory.stat", format!("anon {}\nfile 20\ninactive_file 10\n", memory / 2));
            write("io.stat", "254:0 rbytes=4096 wbytes=0 rios=1 wios=2\n7:0 rbytes=9 rios=9\n".into());
            write("cpu.pressure", format!("some avg10=0.00 total={}\n", usec / 2));
        }
    }

    #[test]
    fn leaf_most_units_are_applications() {
        let tree = Tree::new();
        for path in [
            "init.scope",
            "system.slice/nginx.service",
            "system.slice/docker.service",
            "system.slice/docker.service/payload/inner",
            "system.slice/empty.slice",
            "user.slice/user-1000.slice/user@1000.service/app.slice/editor.service",
            "user.slice/user-1000.slice/user@1000.service/init.scope",
            "kubepods/pod1/container1",
            "kubepods/pod1/container2",
        ] {
            tree.group(path, 0, 1000);
        }
        fs::create_dir_all(tree.0.path().join("proc")).unwrap();
        let devices = "Character devices:\n  7 vcs\n\nBlock devices:\n  7 loop\n254 virtblk\n";
        fs::write(tree.0.path().join("proc/devices"), devices).unwrap();
        let (mut cgroups, mut files, now) = (Cgroups::default(), Files::default(), Instant::now());
        let second = |at| now + Duration::from_secs(at);
        for at in 0..2 {
            cgroups.look(tree.0.path(), &mut files, second(at));
        }
        let names: Vec<_> = cgroups.told().into_iter().map(|told| told.name).collect();
        assert_eq!(
            names,
            [
                "init.scope",
                "kubepods/pod1/container1",
                "kubepods/pod1/container2",
                "docker.service",
                "nginx.service",
                "user@1000.service/editor.service",
                "user@1000.service/init.scope",
            ]
        );
        tree.group("system.slice/nginx.service", 3_000_000, 5000);
        cgroups.look(tree.0.path(), &mut files, second(3));
        cgroups.look(tree.0.path(), &mut files, second(4));
        tree.group("system.slice/nginx.service", 4_500_000, 5000);
        cgroups.look(tree.0.path(), &mut files, second(5));
        let nginx = cgroups.told().into_iter().find(|told| told.name == "nginx.service").unwrap();
        assert_eq!((nginx.cpu_milli, nginx.memory_bytes, nginx.anon_bytes), (1500, 5000, 2500));
        assert_eq!((nginx.working_set_bytes, nginx.cpu_some_permille), (4990, Some(750)));
        assert_eq!((nginx.operations_per_sec, nginx.memory_some_permille), (Some(0), None));

        fs::remove_dir_all(tree.0.path().join(FOLDER).join("system.slice/nginx.service")).unwrap();
        cgroups.look(tree.0.path(), &mut files, second(6));
        assert!(cgroups.told().iter().all(|told| told.name != "nginx.service"));
    }

    #[test]
    fn a_thousand_units_cost_no_more_than_a_hundred() {
        let tree = Tree::new();
        for at in 0..1000 {
            tree.group(&format!("system.slice/s{at}.service"), at, 1000);
        }
        let (mut cgroups, mut files, now) = (Cgroups::default(), Files::default(), Instant::now());
        for at in 0..60 {
            let before = files.opened;
            cgroups.look(tree.0.path(), &mut files, now + Duration::from_secs(at));
            assert!(files.opened - before <= MOST_FILES as u64);
        }
        assert_eq!((cgroups.told().len(), cgroups.unseen()), (MAX_GROUPS, 1000 - MAX_GROUPS as u32));
        assert!(cgroups.told().iter().all(|told| told.memory_bytes == 1000), "everyone has had a turn");
    }

    #[test]
    fn operations_of_stacked_devices_count_once() {
        let text = "254:0 rbytes=4096 wbytes=512 rios=1 wios=2 dios=9\n7:0 rbytes=9 rios=9\nnonsense\n";
        assert_eq!(io(text, &[7]), [4096, 512, 3]);
        assert_eq!(stacked("Character devices:\n  9 st\nBlock devices:\n  9 md\n254 virtblk\n"), [9]);
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in "[a-z0-9 .:=\\n-]{0,200}") {
            io(&text, &[]);
            io(&format!("1:1 {text}"), &[]);
            stacked(&format!("Block devices:{text}"));
        }
    }
}
