//! The host's disk image: built once per content of `tests/image`, cached, never used half-built.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};

/// A built image.
#[derive(Clone, Debug)]
pub struct Image {
    /// Root file system, raw ext4. Only ever opened as the backing of a throw-away overlay.
    pub disk: PathBuf,
    /// Kernel, ELF.
    pub kernel: PathBuf,
}

/// Where images are cached: `$LATHE_TESTHOST_CACHE`, else `$XDG_CACHE_HOME/lathe-testhost`, else `~/.cache/…`.
pub fn cache_directory() -> PathBuf {
    if let Some(own) = std::env::var_os("LATHE_TESTHOST_CACHE") {
        return own.into();
    }
    let base = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).unwrap_or_else(|| {
        PathBuf::from(std::env::var_os("HOME").unwrap_or_else(|| "/root".into())).join(".cache")
    });
    base.join("lathe-testhost")
}

/// Finds the cached image for the recipe in `recipe` (the folder `tests/image`), or builds it aloud.
///
/// # Errors
/// The cache cannot be written, or the build fails; its last lines are on standard error then.
pub fn ensure(recipe: &Path) -> Result<Image> {
    let cache = cache_directory();
    fs::create_dir_all(&cache).with_context(|| format!("cannot make {}", cache.display()))?;
    let name = format!("image-{:016x}", hash_of(recipe).context("cannot read tests/image")?);
    let ready = cache.join(&name);
    if !ready.join("vmlinux").exists() {
        // Whoever comes second waits for the first builder and finds its image.
        let lock = File::create(cache.join("build.lock"))?;
        let _held = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, error)| error)?;
        if !ready.join("vmlinux").exists() {
            build(recipe, &cache, &ready)?;
        }
    }
    Ok(Image { disk: ready.join("host.ext4"), kernel: ready.join("vmlinux") })
}

fn build(recipe: &Path, cache: &Path, ready: &Path) -> Result<()> {
    let begun = Instant::now();
    eprintln!(
        "testhost: building the host image (Debian 12, two kernels, a guest disk); once, about 3 minutes"
    );
    let part = cache.join("image.part");
    if part.exists() {
        fs::remove_dir_all(&part).context("cannot remove a half-built image")?;
    }
    let status = Command::new(recipe.join("build"))
        .arg(&part)
        .stdin(Stdio::null())
        .stdout(io::stderr().as_fd().try_clone_to_owned()?)
        .status()
        .context("cannot start tests/image/build")?;
    if !status.success() {
        bail!("building the host image failed ({status}); logs in {}", part.display());
    }
    for old in fs::read_dir(cache)?.flatten().filter(|old| is_stale_image(&old.file_name().to_string_lossy()))
    {
        // A host that still runs on it keeps its open file.
        let _ = fs::remove_dir_all(old.path());
    }
    fs::rename(&part, ready).context("cannot put the image in place")?;
    eprintln!("testhost: image built in {} s", begun.elapsed().as_secs());
    Ok(())
}

fn is_stale_image(name: &str) -> bool {
    name.starts_with("image-")
}

/// Hash over names and contents of the recipe's files, in the order of their names.
fn hash_of(recipe: &Path) -> io::Result<u64> {
    let mut files: Vec<PathBuf> =
        fs::read_dir(recipe)?.map(|entry| entry.map(|entry| entry.path())).collect::<io::Result<_>>()?;
    files.sort();
    let mut hasher = DefaultHasher::new();
    for file in files {
        file.file_name().hash(&mut hasher);
        fs::read(&file)?.hash(&mut hasher);
    }
    Ok(hasher.finish())
}
