//! Talks to a server over its socket, also wrongly. No KVM needed: machines are not started here.

use super::*;
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, SockFlag, SockType, UnixAddr, bind, connect, listen, sendmsg,
    socket,
};
use std::io::IoSlice;
use std::thread::JoinHandle;

struct Peer(OwnedFd);

impl Peer {
    fn send(&self, bytes: &[u8], fds: &[i32]) {
        let rights = [ControlMessage::ScmRights(fds)];
        let control = if fds.is_empty() { &rights[..0] } else { &rights[..] };
        sendmsg::<()>(self.0.as_raw_fd(), &[IoSlice::new(bytes)], control, MsgFlags::empty(), None).unwrap();
    }

    fn receive(&self) -> Message {
        let mut buffer = vec![0; MAX_MESSAGE_BYTES];
        let count = nix::unistd::read(&self.0, &mut buffer).unwrap();
        serde_json::from_slice(&buffer[..count]).unwrap()
    }

    fn ask(&self, bytes: &[u8], fds: &[i32]) -> Result<Answer, Refusal> {
        self.send(bytes, fds);
        loop {
            if let Message::Reply(reply) = self.receive() {
                return reply.result;
            }
        }
    }

    fn code(&self, bytes: &[u8], fds: &[i32]) -> String {
        self.ask(bytes, fds).unwrap_err().code
    }
}

fn server() -> (tempfile::TempDir, UnixAddr, JoinHandle<ExitReason>) {
    let folder = tempfile::tempdir().unwrap();
    let address = UnixAddr::new(&folder.path().join("control")).unwrap();
    let listener = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
    bind(listener.as_raw_fd(), &address).unwrap();
    listen(&listener, Backlog::new(8).unwrap()).unwrap();
    let server = Server::new(Monitor::new().unwrap(), Some(listener)).unwrap();
    (folder, address, std::thread::spawn(move || server.run().unwrap()))
}

fn peer(address: &UnixAddr) -> Peer {
    let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
    connect(fd.as_raw_fd(), address).unwrap();
    Peer(fd)
}

const HELLO: &[u8] = br#"{"v":1,"id":7,"command":{"hello":{}}}"#;
const QUIT: &[u8] = br#"{"v":1,"id":8,"command":{"quit":{}}}"#;

#[test]
fn malformed_messages_are_refused_and_the_server_goes_on() {
    let (_folder, address, thread) = server();
    let peer = peer(&address);
    for (message, code) in [
        (&b"\xff\x00"[..], "bad-request"),
        (b"[]", "bad-request"),
        (b"{\"v\":9,\"id\":1,\"command\":{}}", "unsupported-version"),
        (b"{\"v\":1,\"id\":1,\"command\":{\"explode\":{}}}", "bad-request"),
        (b"{\"v\":1,\"id\":1,\"command\":{\"hello\":{\"x\":1}}}", "bad-request"),
        (b"{\"v\":1,\"id\":1,\"command\":{\"start\":{}}}", "wrong-phase"),
        (b"{\"v\":1,\"id\":1,\"command\":{\"vsock_listen\":{\"port\":1,\"fd\":0}}}", "wrong-phase"),
    ] {
        assert_eq!(peer.code(message, &[]), code, "{message:?}");
    }
    assert_eq!(peer.code(&vec![b' '; MAX_MESSAGE_BYTES + 1], &[]), "bad-request");
    assert_eq!(peer.code(HELLO, &[0; MAX_MESSAGE_FDS + 1]), "bad-request");
    assert!(matches!(peer.ask(HELLO, &[0, 0]), Ok(Answer::Hello { phase: Phase::Empty, .. })));
    peer.send(QUIT, &[]);
    assert_eq!(thread.join().unwrap(), ExitReason::Quit);
}

#[test]
fn a_wrong_descriptor_changes_nothing_and_all_clients_hear_of_the_end() {
    let (_folder, address, thread) = server();
    let (one, two) = (peer(&address), peer(&address));
    let define = br#"{"v":1,"id":1,"command":{"define":{"kvm":0,"cpus":1,"memory_bytes":67108864,
        "kernel":1,"initrd":null,"cmdline":"","console":null,"vsock":null}}}"#;
    let null = std::fs::File::open("/dev/null").unwrap();
    assert_eq!(one.code(define, &[null.as_raw_fd(), null.as_raw_fd()]), "bad-descriptor");
    assert!(matches!(two.ask(HELLO, &[]), Ok(Answer::Hello { phase: Phase::Empty, .. })));
    let kernel = tempfile::tempfile().unwrap();
    assert!(one.ask(define, &[null.as_raw_fd(), kernel.as_raw_fd()]).is_ok());
    assert!(matches!(two.receive(), Message::Event(Event::Phase(Phase::Defined))));
    let start = br#"{"v":1,"id":2,"command":{"start":{}}}"#;
    assert_eq!(one.code(start, &[]), "kvm", "/dev/null is not KVM");
    one.send(QUIT, &[]);
    let mut last = Vec::new();
    while last.len() < 3 {
        last.push(two.receive());
    }
    assert!(matches!(last[0], Message::Event(Event::Phase(Phase::Empty))));
    assert!(matches!(last[2], Message::Event(Event::Ended(ExitReason::Quit))));
    assert_eq!(thread.join().unwrap(), ExitReason::Quit);
}

#[test]
fn a_client_that_does_not_read_is_dropped_and_the_others_are_served() {
    let (_folder, address, thread) = server();
    let (lazy, other) = (peer(&address), peer(&address));
    let (_guard, mut refused) = ((), false);
    for _ in 0..100_000 {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        match send(lazy.0.as_raw_fd(), HELLO, flags) {
            Err(Errno::EPIPE | Errno::ECONNRESET) => {
                refused = true;
                break;
            }
            _ => std::thread::yield_now(),
        }
    }
    assert!(refused, "the client was never dropped");
    assert!(other.ask(HELLO, &[]).is_ok());
    other.send(QUIT, &[]);
    assert_eq!(thread.join().unwrap(), ExitReason::Quit);
}

#[test]
fn a_refusal_that_repeats_what_was_asked_fits_into_a_message() {
    let request = format!(r#"{{"v":2,"id":1,"command":{{"{}":{{}}}}}}"#, "\u{e9}".repeat(32_700));
    assert!(request.len() <= MAX_MESSAGE_BYTES);
    let (id, command) = parse(request.as_bytes());
    let reply = Message::Reply(Reply { v: VERSION, id, result: command.map(|_| Answer::Done {}) });
    assert!(serde_json::to_vec(&reply).unwrap().len() > MAX_MESSAGE_BYTES);
    let Message::Reply(reply) = serde_json::from_slice(&encode(&reply)).unwrap() else { panic!("no reply") };
    assert!(reply.result.unwrap_err().message.starts_with("unknown variant `\u{e9}"));
}
