//! Where an application's metrics are: a port of this very machine, or a file that the application writes anew now and then.
//!
//! Nothing but this machine is asked, and nothing but a regular file is opened.

use std::fmt;
use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::str::FromStr;
use std::time::{Instant, SystemTime};

use super::{Wrong, http};

/// Longest place, bytes.
const MAX_PLACE_BYTES: usize = 512;
/// Longest page, bytes.
pub const MAX_PAGE_BYTES: usize = 1 << 20;
/// Where metrics are by custom.
const DEFAULT_PATH: &str = "/metrics";

/// Where metrics are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A port of this machine.
    Http {
        /// As it was written: 127.0.0.1:8080.
        authority: String,
        /// All that the name stands for, in turn.
        addresses: Vec<SocketAddr>,
        /// With the query, if there is one.
        path: String,
    },
    /// A file, by its absolute path.
    File(String),
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.len() > MAX_PLACE_BYTES {
            return Err(format!("a place of metrics is at most {MAX_PLACE_BYTES} bytes long"));
        }
        if text.chars().any(|c| c.is_control()) {
            return Err(format!("{text:?} has control characters in it"));
        }
        if text.starts_with('/') {
            return Ok(Self::File(text.to_owned()));
        }
        let wrong = |why: &str| {
            format!("{text:?} {why}: write http://127.0.0.1:PORT/PATH, or the absolute path of a file")
        };
        let Some(rest) = text.strip_prefix("http://") else {
            return Err(wrong("is no place of metrics"));
        };
        if text.contains(|c: char| c.is_whitespace() || !c.is_ascii() || ['#', '@'].contains(&c)) {
            return Err(wrong("has signs in it that no such address has"));
        }
        let (authority, path) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
        let addresses = addresses(authority).map_err(wrong)?;
        let path = match path.chars().next() {
            None => DEFAULT_PATH.to_owned(),
            Some('/') => path.to_owned(),
            Some(_) => format!("/{path}"),
        };
        Ok(Self::Http { authority: authority.to_owned(), addresses, path })
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Http { authority, path, .. } => write!(f, "http://{authority}{path}"),
            Self::File(path) => f.write_str(path),
        }
    }
}

fn addresses(authority: &str) -> Result<Vec<SocketAddr>, &'static str> {
    // An address of version 6 has colons of its own.
    let host_end = authority.rfind(']').map_or(0, |at| at + 1);
    let port_at = authority.get(host_end..).and_then(|rest| rest.find(':')).map(|at| host_end + at);
    let (host, port) = match port_at {
        Some(at) => (authority.get(..at), authority.get(at + 1..)),
        None => (Some(authority), Some("80")),
    };
    let port = port
        .and_then(|port| port.parse().ok())
        .filter(|port: &u16| *port > 0)
        .ok_or("has no port from 1 to 65535")?;
    let four = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let six = IpAddr::V6(Ipv6Addr::LOCALHOST);
    let hosts = match host.unwrap_or_default() {
        "localhost" => vec![four, six],
        "[::1]" => vec![six],
        host => match host.parse::<Ipv4Addr>() {
            Ok(address) if address.is_loopback() => vec![IpAddr::V4(address)],
            _ => return Err("is not on this machine, and only its own metrics are read"),
        },
    };
    Ok(hosts.into_iter().map(|host| SocketAddr::new(host, port)).collect())
}

/// What a file was when it was read last: it is not read again before it is another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Version {
    inode: u64,
    bytes: u64,
    written: (i64, i64),
}

/// What came of reading.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fetched {
    /// The page is in the buffer.
    Page {
        /// When it was written.
        at: Instant,
        /// Of a file.
        version: Option<Version>,
    },
    /// It is the one that is known.
    Same,
}

impl Place {
    /// Reads the page into the buffer, unless it is a file that is `known`.
    ///
    /// # Errors
    /// When it cannot be read, in words.
    pub fn fetch(&self, known: Option<Version>, page: &mut Vec<u8>) -> Result<Fetched, Wrong> {
        page.clear();
        match self {
            Self::Http { authority, addresses, path } => {
                http::get(authority, addresses, path, page).map_err(|wrong| self.at(wrong))?;
                Ok(Fetched::Page { at: Instant::now(), version: None })
            }
            Self::File(path) => read_file(Path::new(path), known, page).map_err(|wrong| self.at(wrong)),
        }
    }

    /// Says where it is wrong.
    pub fn at(&self, wrong: Wrong) -> Wrong {
        Wrong { what: format!("{} at {self}", wrong.what), ..wrong }
    }
}

fn read_file(path: &Path, known: Option<Version>, page: &mut Vec<u8>) -> Result<Fetched, Wrong> {
    // Before it is opened: opening a device may do something.
    let metadata = path.symlink_metadata().map_err(|error| file_error(&error))?;
    regular(&metadata)?;
    if known == Some(version(&metadata)) {
        return Ok(Fetched::Same);
    }
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW | libc::O_NOCTTY);
    let file: File = options.open(path).map_err(|error| file_error(&error))?;
    let metadata = file.metadata().map_err(|error| file_error(&error))?;
    regular(&metadata)?;
    file.take(MAX_PAGE_BYTES as u64 + 1).read_to_end(page).map_err(|error| file_error(&error))?;
    if page.len() > MAX_PAGE_BYTES {
        return Err(too_long());
    }
    let now = Instant::now();
    // By the clock that files have; one that was written in the future was written now.
    let age = metadata.modified().ok().and_then(|at| SystemTime::now().duration_since(at).ok());
    let at = age.and_then(|age| now.checked_sub(age)).unwrap_or(now);
    Ok(Fetched::Page { at, version: Some(version(&metadata)) })
}

fn regular(metadata: &Metadata) -> Result<(), Wrong> {
    if metadata.file_type().is_symlink() {
        Err(Wrong::of("a link is not followed".to_owned()).mend("name the file that it leads to"))
    } else if metadata.is_file() {
        Ok(())
    } else {
        Err(Wrong::of("no regular file".to_owned())
            .mend("name a file that the application writes its metrics to"))
    }
}

fn version(metadata: &Metadata) -> Version {
    let written = (metadata.mtime(), metadata.mtime_nsec());
    Version { inode: metadata.ino(), bytes: metadata.len(), written }
}

fn file_error(error: &io::Error) -> Wrong {
    match error.kind() {
        io::ErrorKind::NotFound => {
            Wrong::of("no such file".to_owned()).mend("has the application written it already?")
        }
        _ => Wrong::of(error.to_string()),
    }
}

/// That a page is.
pub fn too_long() -> Wrong {
    let wrong = Wrong::of(format!("the page is longer than {} MiB", MAX_PAGE_BYTES >> 20));
    wrong.mend("let the application tell less there")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use std::time::Duration;

    use super::*;

    #[test]
    fn only_this_machine_is_a_place() {
        for (text, shown) in [
            ("http://127.0.0.1:9100/metrics", "http://127.0.0.1:9100/metrics"),
            ("http://127.1.2.3:9100", "http://127.1.2.3:9100/metrics"),
            ("http://localhost/", "http://localhost/"),
            ("http://[::1]:80/a?b=c", "http://[::1]:80/a?b=c"),
            ("http://localhost:1?a", "http://localhost:1/?a"),
            ("/var/lib/web/metrics.prom", "/var/lib/web/metrics.prom"),
        ] {
            assert_eq!(text.parse::<Place>().map(|place| place.to_string()), Ok(shown.to_owned()));
        }
        let Ok(Place::Http { addresses, .. }) = "http://localhost:7/".parse() else { panic!("not HTTP") };
        assert_eq!(addresses, ["127.0.0.1:7".parse().unwrap(), "[::1]:7".parse().unwrap()]);
        for (bad, why) in [
            ("http://example.org/metrics", "is not on this machine"),
            ("http://10.0.0.1:80/", "is not on this machine"),
            ("http://127.0.0.1.example.org/", "is not on this machine"),
            ("http://[::2]:80/", "is not on this machine"),
            ("http://::1/", "has no port"),
            ("http:///metrics", "is not on this machine"),
            ("http://127.0.0.1:0/", "has no port"),
            ("http://127.0.0.1:65536/", "has no port"),
            ("http://127.0.0.1@example.org/", "has signs in it"),
            ("http://127.0.0.1:80/a b", "has signs in it"),
            ("http://127.0.0.1:80/a\r\nX: y", "control characters"),
            ("https://127.0.0.1/", "is no place of metrics"),
            ("metrics.prom", "is no place of metrics"),
            ("", "is no place of metrics"),
        ] {
            let words = bad.parse::<Place>().unwrap_err();
            assert!(words.contains(why), "{bad}: {words}");
        }
        assert!(format!("/{}", "a".repeat(MAX_PLACE_BYTES)).parse::<Place>().is_err());
    }

    #[test]
    fn files_are_read_when_they_are_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("web.prom");
        let place = |path: &Path| path.to_str().unwrap().parse::<Place>().unwrap();
        let mut page = Vec::new();
        assert_eq!(
            place(&path).fetch(None, &mut page).unwrap_err().what,
            format!("no such file at {}", path.display())
        );
        std::fs::write(&path, "a 1\n").unwrap();
        let Ok(Fetched::Page { at, version }) = place(&path).fetch(None, &mut page) else {
            panic!("not read")
        };
        assert!(page == b"a 1\n" && at <= Instant::now() && version.is_some());
        assert_eq!(place(&path).fetch(version, &mut page), Ok(Fetched::Same));
        std::fs::write(&path, "a 22\n").unwrap();
        assert!(matches!(place(&path).fetch(version, &mut page), Ok(Fetched::Page { .. })));
        let hour = SystemTime::now() + Duration::from_secs(3600);
        File::options().write(true).open(&path).unwrap().set_modified(hour).unwrap();
        let Ok(Fetched::Page { at, .. }) = place(&path).fetch(version, &mut page) else { panic!("not read") };
        assert!(at <= Instant::now(), "nothing is written in the future");
        std::fs::write(&path, vec![b'x'; MAX_PAGE_BYTES + 1]).unwrap();
        assert!(
            place(&path)
                .fetch(version, &mut page)
                .unwrap_err()
                .what
                .starts_with("the page is longer than 1 MiB")
        );
    }

    #[test]
    fn nothing_but_regular_files_is_opened() {
        let folder = tempfile::tempdir().unwrap();
        let fifo = folder.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let link = folder.path().join("link");
        std::os::unix::fs::symlink("/etc/passwd", &link).unwrap();
        for (path, why) in [
            (fifo.as_path(), "no regular file at "),
            (folder.path(), "no regular file at "),
            (Path::new("/dev/zero"), "no regular file at "),
            (&link, "a link is not followed at "),
        ] {
            let place: Place = path.to_str().unwrap().parse().unwrap();
            let wrong = place.fetch(None, &mut Vec::new()).unwrap_err();
            assert!(wrong.what.starts_with(why) && !wrong.mend.is_empty(), "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn a_place_is_read_as_it_is_shown(text in "(http://(127\\.0\\.0\\.1|localhost|\\[::1\\])(:[1-9][0-9]{0,3})?(/[a-z?=&]{0,10})?|/[ -~]{1,20})") {
            let place: Place = text.parse().unwrap();
            prop_assert_eq!(place.to_string().parse::<Place>(), Ok(place));
        }
    }
}
