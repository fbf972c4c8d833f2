//! `iops [--write] FILE [SECONDS] [DEPTH]`: random 4 KiB requests past the page cache, as many at once as there are threads.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::time::{Duration, Instant};

use super::{number, usage};

const MAX_SECONDS: f64 = 86_400.0;
const MAX_DEPTH: usize = 256;
/// Size and alignment of each request, on the disk and in memory.
const BLOCK_BYTES: usize = 4096;
const USAGE: &str =
    "iops [--write] FILE [SECONDS] [DEPTH], a file of 4 KiB or more, a day and a depth of 256 at most";

/// What one thread did.
#[derive(Clone, Copy, Debug, Default)]
struct Done {
    requests: u64,
    longest: Duration,
}

/// Prints `requests= seconds= iops= longest_msec=`, all threads together. With `--write` it overwrites the file.
pub fn iops(arguments: &[&str]) -> io::Result<u8> {
    let (write, words) = match arguments.split_first() {
        Some((&"--write", rest)) => (true, rest),
        _ => (false, arguments),
    };
    let path = words.first().ok_or_else(|| usage(USAGE))?;
    let seconds: f64 = number(words, 1, 10.0)?;
    let depth: usize = number(words, 2, 1)?;
    if !(0.0..=MAX_SECONDS).contains(&seconds) || !(1..=MAX_DEPTH).contains(&depth) {
        return Err(usage(USAGE));
    }
    let named = |error: io::Error| io::Error::new(error.kind(), format!("{path}: {error}"));
    let mut options = OpenOptions::new();
    options.read(true).write(write).custom_flags(libc::O_DIRECT);
    let mut file = options.open(path).map_err(named)?;
    // A block device has its size only here.
    let blocks = file.seek(SeekFrom::End(0)).map_err(named)? / BLOCK_BYTES as u64;
    if blocks == 0 {
        return Err(usage(USAGE));
    }
    let started = Instant::now();
    let until = started + Duration::from_secs_f64(seconds);
    let all = std::thread::scope(|scope| {
        let file = &file;
        let workers: Vec<_> = (1..=depth)
            .map(|seed| scope.spawn(move || one(file, blocks, write, seed as u64, until)))
            .collect();
        workers.into_iter().try_fold(Done::default(), |all, worker| -> io::Result<Done> {
            let done = worker.join().map_err(|_| io::Error::other("a thread failed"))?.map_err(named)?;
            Ok(Done { requests: all.requests + done.requests, longest: all.longest.max(done.longest) })
        })
    })?;
    let wall = started.elapsed().as_secs_f64();
    writeln!(
        io::stdout(),
        "requests={} seconds={wall:.3} iops={:.2} longest_msec={:.1}",
        all.requests,
        all.requests as f64 / wall.max(f64::MIN_POSITIVE),
        all.longest.as_secs_f64() * 1e3
    )?;
    Ok(0)
}

fn one(file: &File, blocks: u64, write: bool, seed: u64, until: Instant) -> io::Result<Done> {
    let mut space = vec![0x5a; 2 * BLOCK_BYTES];
    let start = space.as_ptr().addr().wrapping_neg() % BLOCK_BYTES;
    let block = &mut space[start..start + BLOCK_BYTES];
    let (mut done, mut random) = (Done::default(), seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let mut last = Instant::now();
    while last < until {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let at = (random >> 33) % blocks * BLOCK_BYTES as u64;
        if write {
            file.write_all_at(block, at)?
        } else {
            file.read_exact_at(block, at)?
        }
        done.requests += 1;
        let now = Instant::now();
        done.longest = done.longest.max(now - last);
        last = now;
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_made_within_the_file_and_counted() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[1; 3 * BLOCK_BYTES]).unwrap();
        let until = Instant::now() + Duration::from_millis(20);
        assert!(one(&file, 3, false, 1, until).unwrap().requests > 0);
        assert!(one(&file, 3, true, 2, until + Duration::from_millis(20)).unwrap().requests > 0);
        assert_eq!(file.metadata().unwrap().len(), 3 * BLOCK_BYTES as u64);
    }

    #[test]
    fn absurd_words_are_refused() {
        for words in
            [&[][..], &["/dev/null", "1", "0"], &["/dev/null", "-1"], &["/nonexistent"], &["/dev/null"]]
        {
            assert!(iops(words).is_err(), "{words:?}");
        }
    }
}
