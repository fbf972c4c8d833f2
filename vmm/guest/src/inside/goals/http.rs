//! A page of metrics over HTTP/1.0 (RFC 1945), by hand: one GET, one second in all, one MiB at most, no redirect.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use super::Wrong;
use super::place::{MAX_PAGE_BYTES, too_long};

/// Longest head of an answer, bytes.
const MAX_HEAD_BYTES: usize = 16 * 1024;
/// Time for an answer, from the connection to the last byte.
const TIMEOUT: Duration = Duration::from_secs(1);
/// Bytes per read.
const READ_BYTES: usize = 16 * 1024;
/// What is understood, the better one first.
const ACCEPT: &str = "application/openmetrics-text; version=1.0.0, text/plain;version=0.0.4";

/// Asks for a page, of the first address that lets itself be connected to.
///
/// # Errors
/// When there is no whole page, in words without the place.
pub fn get(authority: &str, addresses: &[SocketAddr], path: &str, page: &mut Vec<u8>) -> Result<(), Wrong> {
    let until = Instant::now() + TIMEOUT;
    let mut refused = None;
    for address in addresses {
        match connect(address, until) {
            Ok(stream) => return exchange(stream, authority, path, page, until),
            // The first says most: a machine may have no addresses of version 6.
            Err(error) => _ = refused.get_or_insert(error),
        }
    }
    Err(refused.as_ref().map_or_else(|| Wrong::of("no address".to_owned()), http_error))
}

fn connect(address: &SocketAddr, until: Instant) -> io::Result<TcpStream> {
    TcpStream::connect_timeout(address, left(until)?)
}

fn exchange(
    mut stream: TcpStream,
    authority: &str,
    path: &str,
    page: &mut Vec<u8>,
    until: Instant,
) -> Result<(), Wrong> {
    let question = format!(
        "GET {path} HTTP/1.0\r\nHost: {authority}\r\nAccept: {ACCEPT}\r\nUser-Agent: lathe-guest\r\nConnection: close\r\n\r\n"
    );
    let asked = left(until).and_then(|left| {
        stream.set_write_timeout(Some(left))?;
        stream.write_all(question.as_bytes())
    });
    asked.map_err(|error| http_error(&error))?;
    let mut chunk = [0; READ_BYTES];
    let mut head = None;
    loop {
        let count = receive(&mut stream, &mut chunk, until).map_err(|error| http_error(&error))?;
        page.extend_from_slice(chunk.get(..count).unwrap_or_default());
        if head.is_none() {
            head = Head::take(page)?;
        }
        let length = head.as_ref().and_then(|head| head.length);
        if page.len() > MAX_PAGE_BYTES || length.is_some_and(|length| length > MAX_PAGE_BYTES as u64) {
            return Err(too_long());
        }
        // One that keeps the connection open has said how much there is.
        if head.is_some() && length.is_some_and(|length| page.len() as u64 >= length) {
            page.truncate(length.map_or(page.len(), |length| length as usize));
            return Ok(());
        }
        if count == 0 {
            return match (head, length) {
                (None, _) => Err(Wrong::of("no answer of HTTP".to_owned())),
                (Some(_), Some(length)) => {
                    Err(Wrong::of(format!("the answer ends after {} of {length} bytes", page.len())))
                }
                (Some(_), None) => Ok(()),
            };
        }
    }
}

fn receive(stream: &mut TcpStream, chunk: &mut [u8], until: Instant) -> io::Result<usize> {
    loop {
        stream.set_read_timeout(Some(left(until)?))?;
        match stream.read(chunk) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            read => return read,
        }
    }
}

fn left(until: Instant) -> io::Result<Duration> {
    let left = until.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

fn http_error(error: &io::Error) -> Wrong {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => {
            Wrong::of("connection refused".to_owned()).mend("does the application run, and listen there?")
        }
        io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => {
            Wrong::of(format!("no answer within {} s", TIMEOUT.as_secs()))
        }
        _ => Wrong::of(error.to_string()),
    }
}

/// The head of an answer.
#[derive(Debug, PartialEq, Eq)]
struct Head {
    /// Of what follows, bytes.
    length: Option<u64>,
}

impl Head {
    /// Takes the head off what has come, once it is there.
    fn take(answer: &mut Vec<u8>) -> Result<Option<Self>, Wrong> {
        let ends = [b"\r\n\r\n".as_slice(), b"\n\n"];
        let head = answer.get(..answer.len().min(MAX_HEAD_BYTES)).unwrap_or_default();
        let end = ends.iter().filter_map(|end| {
            head.windows(end.len()).position(|window| window == *end).map(|at| at + end.len())
        });
        let Some(end) = end.min() else {
            return match answer.len() {
                0..MAX_HEAD_BYTES => Ok(None),
                _ => Err(Wrong::of("no answer of HTTP".to_owned())),
            };
        };
        let head = Self::parse(answer.get(..end).unwrap_or_default());
        answer.drain(..end);
        head.map(Some)
    }

    fn parse(head: &[u8]) -> Result<Self, Wrong> {
        let text = String::from_utf8_lossy(head);
        let mut lines = text.lines();
        let status = lines.next().and_then(|line| line.strip_prefix("HTTP/1."));
        let status =
            status.and_then(|rest| rest.split_whitespace().nth(1)).and_then(|word| word.parse::<u16>().ok());
        match status {
            Some(200) => {}
            Some(status) => {
                return Err(
                    Wrong::of(format!("HTTP status {status}")).mend("name the path where the metrics are")
                );
            }
            None => return Err(Wrong::of("no answer of HTTP".to_owned())),
        }
        let mut length = None;
        for (name, value) in lines.filter_map(|line| line.split_once(':')) {
            let (name, value) = (name.trim().to_ascii_lowercase(), value.trim());
            match name.as_str() {
                "content-length" => length = value.parse().ok(),
                "transfer-encoding" | "content-encoding" if !value.eq_ignore_ascii_case("identity") => {
                    return Err(Wrong::of("the answer is coded in a way that was not asked for".to_owned()));
                }
                _ => {}
            }
        }
        Ok(Self { length })
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::thread::JoinHandle;

    use proptest::prelude::*;

    use super::super::place::Place;
    use super::*;

    /// Answers one question so; gives the question.
    fn server(answer: Vec<u8>) -> (Place, JoinHandle<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let place = format!("http://{}/metrics", listener.local_addr().unwrap()).parse().unwrap();
        let serve = move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut question = Vec::new();
            while !question.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                stream.read_exact(&mut byte).unwrap();
                question.extend(byte);
            }
            // Who has read enough closes.
            let _ = stream.write_all(&answer);
            let _ = stream.shutdown(std::net::Shutdown::Write);
            let _ = stream.read(&mut [0]);
            String::from_utf8(question).unwrap()
        };
        (place, std::thread::spawn(serve))
    }

    fn fetch(answer: &[u8]) -> Result<Vec<u8>, String> {
        let (place, server) = server(answer.to_vec());
        let mut page = b"of before".to_vec();
        let fetched = place.fetch(None, &mut page);
        let question = server.join().unwrap();
        assert!(question.starts_with("GET /metrics HTTP/1.0\r\n") && question.contains(ACCEPT), "{question}");
        fetched.map(|_| page).map_err(|wrong| wrong.what)
    }

    #[test]
    fn pages_come_over_http() {
        assert_eq!(fetch(b"HTTP/1.0 200 OK\r\n\r\na 1\n").unwrap(), b"a 1\n");
        assert_eq!(fetch(b"HTTP/1.1 200\ncontent-length: 4\n\na 1\nmore").unwrap(), b"a 1\n");
        assert_eq!(fetch(b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n").unwrap(), b"");
        let mut long = b"HTTP/1.0 200 OK\r\n\r\n".to_vec();
        long.resize(19 + MAX_PAGE_BYTES, b'x');
        assert_eq!(fetch(&long).unwrap().len(), MAX_PAGE_BYTES);
        long.push(b'x');
        for (answer, why) in [
            (&long[..], "the page is longer than 1 MiB at http://127.0.0.1:"),
            (b"HTTP/1.0 404 Not Found\r\n\r\n", "HTTP status 404 at "),
            (b"HTTP/1.0 301 Moved\r\nLocation: /\r\n\r\n", "HTTP status 301 at "),
            (b"HTTP/1.0 200 OK\r\nContent-Length: 9\r\n\r\na 1", "the answer ends after 3 of 9 bytes"),
            (b"HTTP/1.0 200 OK\r\nContent-Length: 99999999\r\n\r\n", "the page is longer"),
            (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", "the answer is coded in a way"),
            (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "no answer of HTTP"),
            (b"HTTP/1.0 200 OK\r\n", "no answer of HTTP"),
            (b"", "no answer of HTTP"),
            (&[b'x'; MAX_HEAD_BYTES + 1], "no answer of HTTP"),
        ] {
            let words = fetch(answer).unwrap_err();
            assert!(words.starts_with(why), "{words}");
        }
    }

    #[test]
    fn who_does_not_answer_is_not_waited_for() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let place: Place = format!("http://{}/", listener.local_addr().unwrap()).parse().unwrap();
        let begin = Instant::now();
        let words = place.fetch(None, &mut Vec::new()).unwrap_err().what;
        assert!(
            words.starts_with("no answer within 1 s at http://127.0.0.1:") && begin.elapsed() >= TIMEOUT,
            "{words}"
        );
        drop(listener);
        let words = place.fetch(None, &mut Vec::new()).unwrap_err().what;
        assert_eq!(words, format!("connection refused at {place}"));
    }

    proptest! {
        #[test]
        fn no_head_is_too_strange(answer in prop::collection::vec(any::<u8>(), 0..200), ok in any::<bool>()) {
            let mut answer = if ok { [b"HTTP/1.0 200 OK\r\n".to_vec(), answer].concat() } else { answer };
            let before = answer.len();
            let _ = Head::take(&mut answer);
            prop_assert!(answer.len() <= before);
        }
    }
}
