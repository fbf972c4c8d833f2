//! A machine's console: one end of a stream whose other end the monitor holds.
//!
//! What the guest prints is appended to `console.log` (at most 1 MiB, rotated once to `console.log.1`) and given to everybody attached; whoever
//! is too slow misses something instead of holding the guest up. What attached people type goes to the guest.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{broadcast, mpsc};

/// A log longer than this is rotated.
const LOG_BYTES: u64 = 1 << 20;
/// Pieces of output that an attached client may lag behind.
const OUTPUT_QUEUE: usize = 256;
/// Pieces of input that wait for the guest.
const INPUT_QUEUE: usize = 64;
/// Read at once.
const CHUNK: usize = 4096;
/// What somebody who attaches sees of before, bytes.
const BACKLOG_BYTES: u64 = 16 << 10;
/// Most that `logs` answers, bytes.
const TAIL_BYTES: u64 = 512 << 10;
/// So much of the log's end is looked for in what a monitor has kept, to find where we were cut off.
const OVERLAP_BYTES: u64 = 64;

/// An attached client.
#[derive(Debug)]
pub struct ConsoleHandle {
    /// The last output before it was attached.
    pub backlog: Vec<u8>,
    /// Output from then on.
    pub output: broadcast::Receiver<Vec<u8>>,
    /// Input to the guest.
    pub input: mpsc::Sender<Vec<u8>>,
}

/// One machine's console, attached to a monitor or not.
#[derive(Debug)]
pub struct Console {
    log: PathBuf,
    output: broadcast::Sender<Vec<u8>>,
    input: Mutex<Option<mpsc::Sender<Vec<u8>>>>,
}

impl Console {
    /// The console whose log is in `folder`.
    pub fn new(folder: &Path) -> Self {
        let (output, _) = broadcast::channel(OUTPUT_QUEUE);
        Self { log: folder.join("console.log"), output, input: Mutex::new(None) }
    }

    /// Starts to read and write `stream`; the tasks end with the stream. An earlier one is let go.
    pub fn attach(self: &std::sync::Arc<Self>, stream: UnixStream) {
        let (mut reader, mut writer) = stream.into_split();
        let (sender, mut input) = mpsc::channel::<Vec<u8>>(INPUT_QUEUE);
        *self.input.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(sender);
        tokio::spawn(async move {
            while let Some(bytes) = input.recv().await {
                if writer.write_all(&bytes).await.is_err() {
                    break;
                }
            }
        });
        let console = std::sync::Arc::clone(self);
        tokio::spawn(async move {
            let mut buffer = [0; CHUNK];
            while let Ok(length @ 1..) = reader.read(&mut buffer).await {
                console.take(&buffer[..length]);
            }
        });
    }

    /// Lets go of the monitor.
    pub fn detach(&self) {
        self.input.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
    }

    fn take(&self, bytes: &[u8]) {
        if let Err(cause) = append(&self.log, bytes) {
            tracing::warn!(log = %self.log.display(), %cause, "cannot write a console's log");
        }
        // Nobody may be attached.
        let _ = self.output.send(bytes.to_vec());
    }

    /// Adds what a monitor printed while nobody listened, from what it has kept.
    pub fn catch_up(&self, kept: &str) {
        let end = tail(&self.log, OVERLAP_BYTES).unwrap_or_default();
        let end = String::from_utf8_lossy(&end);
        let seen = if end.is_empty() { None } else { kept.rfind(end.as_ref()) };
        let missed = seen.map_or(kept, |at| &kept[at + end.len()..]);
        if !missed.is_empty() {
            self.take(missed.as_bytes());
        }
    }

    /// Attaches a client; `None` while there is no monitor.
    pub fn handle(&self) -> Option<ConsoleHandle> {
        let input = self.input.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()?;
        let output = self.output.subscribe();
        Some(ConsoleHandle { backlog: tail(&self.log, BACKLOG_BYTES).unwrap_or_default(), output, input })
    }

    /// Output from now on.
    pub fn follow(&self) -> broadcast::Receiver<Vec<u8>> {
        self.output.subscribe()
    }

    /// The last `lines` lines, lossily as UTF-8; empty when nothing was ever printed.
    pub fn lines(&self, lines: usize) -> String {
        let mut bytes = tail(&self.log, TAIL_BYTES).unwrap_or_default();
        if (bytes.len() as u64) < TAIL_BYTES {
            let mut older = tail(&rotated(&self.log), TAIL_BYTES - bytes.len() as u64).unwrap_or_default();
            older.append(&mut bytes);
            bytes = older;
        }
        let text = String::from_utf8_lossy(&bytes);
        let body = text.strip_suffix('\n').unwrap_or(&text);
        let start = body.rmatch_indices('\n').nth(lines.saturating_sub(1)).map_or(0, |(at, _)| at + 1);
        if lines == 0 { String::new() } else { text[start..].to_owned() }
    }
}

fn rotated(log: &Path) -> PathBuf {
    log.with_extension("log.1")
}

fn append(log: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().append(true).create(true).mode(0o600).open(log)?;
    if file.metadata()?.len() + bytes.len() as u64 > LOG_BYTES {
        fs::rename(log, rotated(log))?;
        file = OpenOptions::new().append(true).create(true).mode(0o600).open(log)?;
    }
    file.write_all(bytes)
}

fn tail(log: &Path, most: u64) -> io::Result<Vec<u8>> {
    let mut file = File::open(log)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(most)))?;
    let mut bytes = Vec::new();
    file.take(most).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[tokio::test]
    async fn output_is_kept_and_shared_and_input_reaches_the_guest() {
        let folder = tempfile::tempdir().unwrap();
        let console = Arc::new(Console::new(folder.path()));
        assert!(console.handle().is_none());
        let (ours, mut guest) = UnixStream::pair().unwrap();
        console.attach(ours);
        let mut client = console.handle().unwrap();
        guest.write_all(b"login: ").await.unwrap();
        assert_eq!(client.output.recv().await.unwrap(), b"login: ");
        client.input.send(b"root\n".to_vec()).await.unwrap();
        let mut typed = [0; 5];
        guest.read_exact(&mut typed).await.unwrap();
        assert_eq!(&typed, b"root\n");
        assert_eq!(console.handle().unwrap().backlog, b"login: ");
    }

    #[test]
    fn the_log_is_bounded_and_its_last_lines_are_found_across_the_rotation() {
        let folder = tempfile::tempdir().unwrap();
        let console = Console::new(folder.path());
        let line = format!("{}\n", "x".repeat(99));
        for _ in 0..30_000 {
            console.take(line.as_bytes());
        }
        let size = |name: &str| fs::metadata(folder.path().join(name)).unwrap().len();
        assert!(size("console.log") <= LOG_BYTES && size("console.log.1") <= LOG_BYTES);
        console.take(b"one\ntwo\nthree\n");
        assert_eq!(console.lines(2), "two\nthree\n");
        assert_eq!(console.lines(4).len(), 100 + 14);
        assert_eq!(console.lines(0), "");
    }

    #[test]
    fn what_was_printed_while_lathed_was_away_is_added_once() {
        let folder = tempfile::tempdir().unwrap();
        let console = Console::new(folder.path());
        console.take(b"boot\nready\n");
        console.catch_up("boot\nready\nwhile away\n");
        assert_eq!(console.lines(9), "boot\nready\nwhile away\n");
        console.catch_up("boot\nready\nwhile away\n");
        assert_eq!(console.lines(9), "boot\nready\nwhile away\n");
    }
}
