//! A request's body becomes a file: sparse where it is zero, hashed, synced, bounded by the space that the host can spare.
//!
//! Frames are handed to a blocking thread over a short queue, so that a slow disk slows the client down instead of filling memory.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use axum::body::{Body, Bytes};
use http_body_util::BodyExt;
use ring::digest;
use ring::rand::{SecureRandom, SystemRandom};
use tokio::sync::mpsc;

use super::format::HEAD_BYTES;
use crate::problem::{Kind, Problem};

/// Frames that wait for the disk.
const QUEUE_FRAMES: usize = 16;
/// Longest silence of a client.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(60);
/// Grain in which zeroes become holes, in bytes.
const HOLE_BYTES: usize = 4096;
/// How often the free space is looked at, in bytes.
const SPACE_CHECK_BYTES: u64 = 16 << 20;

/// A file that arrived, still under a name of its own; removed when dropped unless it was moved away.
#[derive(Debug)]
pub struct Received {
    path: PathBuf,
    /// Bytes that arrived.
    pub size_bytes: u64,
    /// SHA-256 of them, lower-case hex.
    pub sha256: String,
    /// The first of them, at most [`HEAD_BYTES`].
    pub head: Vec<u8>,
}

impl Received {
    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Received {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// A new id: 32 hex digits nobody can guess.
///
/// # Errors
/// `internal` when the kernel gives no randomness.
pub fn new_id() -> Result<String, Problem> {
    let mut bytes = [0; 16];
    SystemRandom::new().fill(&mut bytes).map_err(|_| Problem::internal("making an id", "no randomness"))?;
    Ok(hex(&bytes))
}

/// Lower-case hex.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Bytes free for us below `folder` (`f_bavail`).
///
/// # Errors
/// `internal` when it cannot be told.
pub fn free_bytes(folder: &Path) -> Result<u64, Problem> {
    let stat = rustix::fs::statvfs(folder)
        .map_err(|error| Problem::internal(format!("space below {}", folder.display()), error))?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Refuses what would leave less than `reserve` bytes free.
///
/// # Errors
/// `disk-full` with the numbers.
pub fn check_space(folder: &Path, wanted: u64, reserve: u64) -> Result<(), Problem> {
    let free = free_bytes(folder)?;
    if free.saturating_sub(reserve) >= wanted {
        return Ok(());
    }
    let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
    let message =
        format!("no room for {}: {} free, {} kept for the host", mib(wanted), mib(free), mib(reserve));
    Err(Problem::new(Kind::Impossible, "disk-full", message)
        .detail(format!("below {}", folder.display()))
        .fix("lathe image list"))
}

/// Receives `body` into a file in `folder`, leaving `reserve` bytes of the file system free. `announced` is its length if the client
/// told it.
///
/// # Errors
/// `disk-full`, `body-too-slow`, `body-broken`, `internal`; nothing is left then.
pub async fn receive(
    body: Body,
    folder: PathBuf,
    reserve: u64,
    announced: Option<u64>,
) -> Result<Received, Problem> {
    if let Some(length) = announced {
        check_space(&folder, length, reserve)?;
    }
    let (frames, queue) = mpsc::channel(QUEUE_FRAMES);
    let writer = tokio::task::spawn_blocking(move || write(queue, &folder, reserve));
    let sent = send(body, frames).await;
    let written = writer.await.map_err(|error| Problem::internal("receiving a file", error))?;
    match (sent, written) {
        (_, Err(problem)) => Err(problem),
        (Err(problem), Ok(_)) => Err(problem),
        (Ok(()), Ok(received)) => Ok(received),
    }
}

/// Hands the body's frames to the writer.
async fn send(mut body: Body, frames: mpsc::Sender<Bytes>) -> Result<(), Problem> {
    loop {
        let frame = tokio::time::timeout(SILENCE_TIMEOUT, body.frame()).await.map_err(|_| {
            let message = format!("the client was silent for {} s", SILENCE_TIMEOUT.as_secs());
            Problem::new(Kind::BadRequest, "body-too-slow", message)
        })?;
        let frame = match frame {
            None => return Ok(()),
            Some(Ok(frame)) => frame,
            Some(Err(error)) => {
                return Err(Problem::new(
                    Kind::BadRequest,
                    "body-broken",
                    format!("the body broke off: {error}"),
                ));
            }
        };
        let Ok(data) = frame.into_data() else { continue };
        if frames.send(data).await.is_err() {
            return Ok(()); // the writer gave up and says why
        }
    }
}

/// Writes frames until there are no more.
fn write(mut queue: mpsc::Receiver<Bytes>, folder: &Path, reserve: u64) -> Result<Received, Problem> {
    let path = folder.join(new_id()?);
    let failed = |error: io::Error| {
        let kind = if error.kind() == io::ErrorKind::StorageFull { Kind::Impossible } else { Kind::Internal };
        let code = if kind == Kind::Impossible { "disk-full" } else { "internal" };
        Problem::new(kind, code, format!("writing below {}: {error}", folder.display()))
    };
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).map_err(failed)?;
    let mut received = Received { path, size_bytes: 0, sha256: String::new(), head: Vec::new() };
    let mut sparse = Sparse::new(file);
    let mut hash = digest::Context::new(&digest::SHA256);
    let mut unchecked = 0;
    while let Some(data) = queue.blocking_recv() {
        unchecked += data.len() as u64;
        if unchecked >= SPACE_CHECK_BYTES {
            check_space(folder, unchecked, reserve)?;
            unchecked = 0;
        }
        hash.update(&data);
        let missing = HEAD_BYTES - received.head.len();
        received.head.extend_from_slice(&data[..data.len().min(missing)]);
        sparse.write(&data).map_err(failed)?;
        received.size_bytes += data.len() as u64;
    }
    sparse.finish().map_err(failed)?;
    received.sha256 = hex(hash.finish().as_ref());
    Ok(received)
}

/// A file in which blocks of zeroes are left out.
struct Sparse {
    file: File,
    /// Where the next byte belongs.
    at: u64,
    /// What does not fill a block yet.
    rest: Vec<u8>,
}

impl Sparse {
    fn new(file: File) -> Self {
        Self { file, at: 0, rest: Vec::with_capacity(HOLE_BYTES) }
    }

    fn write(&mut self, mut data: &[u8]) -> io::Result<()> {
        if !self.rest.is_empty() {
            let (fill, more) = data.split_at(data.len().min(HOLE_BYTES - self.rest.len()));
            self.rest.extend_from_slice(fill);
            data = more;
            if self.rest.len() < HOLE_BYTES {
                return Ok(());
            }
            let block = std::mem::take(&mut self.rest);
            self.blocks(&block)?;
        }
        let whole = data.len() - data.len() % HOLE_BYTES;
        self.blocks(&data[..whole])?;
        self.rest.extend_from_slice(&data[whole..]);
        Ok(())
    }

    /// Writes whole blocks, runs of equal kind at once.
    fn blocks(&mut self, data: &[u8]) -> io::Result<()> {
        let mut data = data;
        while !data.is_empty() {
            let zero = is_zero(&data[..HOLE_BYTES]);
            let same = data.chunks(HOLE_BYTES).take_while(|block| is_zero(block) == zero).count();
            let (run, more) = data.split_at(same * HOLE_BYTES);
            if zero {
                self.file.seek(SeekFrom::Current(run.len() as i64))?;
            } else {
                self.file.write_all(run)?;
            }
            self.at += run.len() as u64;
            data = more;
        }
        Ok(())
    }

    /// Writes what is left and waits for the disk.
    fn finish(mut self) -> io::Result<()> {
        self.file.write_all(&self.rest)?;
        let length = self.at + self.rest.len() as u64;
        self.file.set_len(length)?;
        self.file.sync_all()
    }
}

/// Whether a block of at most [`HOLE_BYTES`] is all zeroes; as one comparison of memory.
fn is_zero(block: &[u8]) -> bool {
    const ZEROES: [u8; HOLE_BYTES] = [0; HOLE_BYTES];
    block == &ZEROES[..block.len()]
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn body_of(frames: Vec<Vec<u8>>) -> Body {
        let (mut sender, channel) = http_body_util::channel::Channel::<Bytes>::new(1);
        tokio::spawn(async move {
            for frame in frames {
                let _ = sender.send_data(frame.into()).await;
            }
        });
        Body::new(channel)
    }

    #[tokio::test]
    async fn what_is_sent_is_what_lies_there_whatever_the_frames() {
        let dir = tempfile::tempdir().unwrap();
        let mut content = vec![7; 5000];
        content.extend(vec![0; 3 << 20]);
        content.extend(vec![9; 100]);
        content.extend(vec![0; 9000]);
        for grain in [1000, 4096, 65_537, 10 << 20] {
            let frames = content.chunks(grain).map(<[u8]>::to_vec).collect();
            let received = receive(body_of(frames), dir.path().to_owned(), 0, None).await.unwrap();
            assert!(fs::read(received.path()).unwrap() == content, "frames of {grain}");
            assert_eq!(received.size_bytes, content.len() as u64);
            assert_eq!(received.sha256, hex(digest::digest(&digest::SHA256, &content).as_ref()));
            assert_eq!(received.head, content[..HEAD_BYTES]);
        }
    }

    #[tokio::test]
    async fn zeroes_take_no_space() {
        let dir = tempfile::tempdir().unwrap();
        let received =
            receive(body_of(vec![vec![0; 8 << 20]]), dir.path().to_owned(), 0, None).await.unwrap();
        let metadata = fs::metadata(received.path()).unwrap();
        assert_eq!(metadata.len(), 8 << 20);
        assert!(metadata.blocks() * 512 < 1 << 20, "{} blocks", metadata.blocks());
    }

    #[tokio::test]
    async fn what_does_not_fit_is_refused_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().to_owned();
        let announced = receive(Body::from("x"), folder.clone(), 0, Some(u64::MAX)).await.unwrap_err();
        assert_eq!(announced.code, "disk-full");
        let frames = vec![vec![1; SPACE_CHECK_BYTES as usize + 1], vec![1; 10]];
        let silent = receive(body_of(frames), folder, u64::MAX, None).await.unwrap_err();
        assert_eq!(silent.code, "disk-full");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn a_body_that_breaks_off_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (mut sender, channel) = http_body_util::channel::Channel::<Bytes, io::Error>::new(1);
        tokio::spawn(async move {
            let _ = sender.send_data(Bytes::from_static(b"half")).await;
            sender.abort(io::ErrorKind::ConnectionReset.into());
        });
        let problem = receive(Body::new(channel), dir.path().to_owned(), 0, None).await.unwrap_err();
        assert_eq!(problem.code, "body-broken");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
