//! Files into and out of a running host, through its command channel (about 10 MB/s when emulated).

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::channel::{Captured, Channel, Sink};
use crate::frame::ExecSpec;

/// How long one transfer may take.
const LIMIT: Duration = Duration::from_secs(600);

/// Copies a file or the content of a folder into a host. A target that ends in `/` is a folder to copy a file into.
///
/// # Errors
/// The source cannot be read, or the host cannot write the target.
pub fn push(channel: &Channel, source: &Path, target: &str) -> Result<()> {
    let metadata = fs::metadata(source).with_context(|| format!("cannot push {}", source.display()))?;
    if metadata.is_dir() {
        return push_folder(channel, source, target);
    }
    let mut target = target.to_owned();
    if target.ends_with('/') {
        target += &source.file_name().context("the file to push has no name")?.to_string_lossy();
    }
    let mode = format!("{:o}", metadata.permissions().mode() & 0o7777);
    // A new file that is renamed: the target may be a program that runs.
    let script = "set -e; mkdir -p \"$(dirname \"$1\")\"; cat >\"$1.part\"; chmod \"$2\" \"$1.part\"; mv \"$1.part\" \"$1\"";
    let process = channel.begin(&shell(script, &[&target, &mode]))?;
    process.feed(File::open(source)?);
    let mut output = Captured::default();
    let status = process.wait(&mut output, Some(LIMIT))?;
    accept(status, &output, || format!("cannot push {} to {target}", source.display()))
}

fn push_folder(channel: &Channel, source: &Path, target: &str) -> Result<()> {
    let mut tar = Command::new("tar")
        .args(["--create", "--owner=0", "--group=0", "--numeric-owner", "-C"])
        .arg(source)
        .arg(".")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run tar")?;
    let process = channel.begin(&shell("set -e; mkdir -p \"$1\"; tar -x -C \"$1\"", &[target]))?;
    process.feed(tar.stdout.take().context("tar has no output")?);
    let mut output = Captured::default();
    let status = process.wait(&mut output, Some(LIMIT))?;
    if !tar.wait()?.success() {
        bail!("tar could not read {}", source.display());
    }
    accept(status, &output, || format!("cannot push {} to {target}", source.display()))
}

/// Copies a file or a folder out of a host. A folder's content lands in `target`.
///
/// # Errors
/// The host cannot read the source, or the target cannot be written.
pub fn pull(channel: &Channel, source: &str, target: &Path) -> Result<()> {
    let mut probe = Captured::default();
    let process = channel.begin(&shell("test -d \"$1\"", &[source]))?;
    let folder = process.wait(&mut probe, Some(LIMIT))? == 0;
    if !folder {
        let into = if target.is_dir() {
            target.join(Path::new(source).file_name().context("the file to pull has no name")?)
        } else {
            target.to_owned()
        };
        let mut file = File::create(&into).with_context(|| format!("cannot write {}", into.display()))?;
        return pull_to(channel, "exec cat \"$1\"", source, &mut file);
    }
    fs::create_dir_all(target)?;
    let mut tar = Command::new("tar")
        .args(["--extract", "-C"])
        .arg(target)
        .stdin(Stdio::piped())
        .spawn()
        .context("cannot run tar")?;
    let mut input = tar.stdin.take().context("tar has no input")?;
    let result = pull_to(channel, "exec tar -c -C \"$1\" .", source, &mut input);
    drop(input);
    if !tar.wait()?.success() {
        bail!("tar could not write {}", target.display());
    }
    result
}

fn pull_to(channel: &Channel, script: &str, source: &str, out: &mut dyn Write) -> Result<()> {
    let process = channel.begin(&shell(script, &[source]))?;
    process.end_input()?;
    let mut sink = Split { out, errors: Captured::default() };
    let status = process.wait(&mut sink, Some(LIMIT))?;
    accept(status, &sink.errors, || format!("cannot pull {source}"))
}

/// Standard output to a file, standard error kept.
struct Split<'a> {
    out: &'a mut dyn Write,
    errors: Captured,
}

impl Sink for Split<'_> {
    fn stdout(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(bytes)
    }
    fn stderr(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.errors.stderr(bytes)
    }
}

fn accept(status: i32, output: &Captured, what: impl Fn() -> String) -> Result<()> {
    if status != 0 {
        bail!("{}: {}", what(), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

fn shell(script: &str, arguments: &[&str]) -> ExecSpec {
    let words = ["sh", "-c", script, "sh"].into_iter().chain(arguments.iter().copied());
    ExecSpec { argv: words.map(str::to_owned).collect(), ..ExecSpec::default() }
}
