//! Keeps the hosts of `testhost up` alive in the background and lets other processes use them.
//!
//! The holder owns a [`HostSet`] and listens on `ctl.sock` in the set's directory. A client sends one line of JSON
//! (a [`Request`]) and gets one back (a [`Reply`]). After `attach` the connection is a command channel to that host:
//!
//! ```text
//! testhost exec ──ctl.sock──▶ relay: client's command ids ◀─▶ host's command ids ──▶ agent in the host
//! ```

use std::collections::HashMap;
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};

use crate::channel::Channel;
use crate::frame::{Frame, Kind};
use crate::hosts::HostSet;

/// The longest request or reply.
const MAX_LINE: usize = 4096;

/// What a client wants.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// How many hosts there are.
    Status,
    /// Turn this connection into the command channel of a host.
    Attach {
        /// Its number, from 1.
        host: usize,
    },
    /// Reboot a host in order.
    Reboot {
        /// Its number, from 1.
        host: usize,
    },
    /// Cut a host's power and switch it on again.
    Reset {
        /// Its number, from 1.
        host: usize,
    },
    /// Save journals and consoles.
    Save {
        /// The directory that receives them.
        target: PathBuf,
    },
    /// End all hosts.
    Down,
}

/// The answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reply {
    /// How many hosts the set has.
    pub hosts: usize,
    /// What went wrong, if anything did.
    pub error: Option<String>,
}

/// Path of a set's control socket.
pub fn control_socket(directory: &Path) -> PathBuf {
    directory.join("ctl.sock")
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Serves `hosts` until a client asks for their end; then removes their directory.
///
/// # Errors
/// The socket cannot be made.
pub fn serve(hosts: HostSet, listener: &UnixListener) -> Result<()> {
    let hosts = Arc::new(hosts);
    for client in listener.incoming() {
        let mut client = client?;
        // A client that says nothing sensible is dropped.
        let Ok(request) = receive::<Request>(&mut client) else { continue };
        if matches!(request, Request::Down) {
            let directory = hosts.directory().to_owned();
            hosts.end();
            fs::remove_dir_all(&directory).context("cannot remove the set's directory")?;
            return answer(&mut client, hosts.len(), Ok(()));
        }
        let hosts = Arc::clone(&hosts);
        thread::spawn(move || {
            // The client sees the connection end.
            let _ = handle(client, request, &hosts);
        });
    }
    Ok(())
}

fn handle(mut client: UnixStream, request: Request, hosts: &HostSet) -> Result<()> {
    let result = match request {
        Request::Attach { host } => {
            let channel = hosts.channel(host);
            answer(
                &mut client,
                hosts.len(),
                channel.as_ref().map(|_| ()).map_err(|error| anyhow!("{error}")),
            )?;
            return channel.map_or(Ok(()), |channel| relay(client, &channel).map_err(Into::into));
        }
        Request::Status | Request::Down => Ok(()),
        Request::Reboot { host } => hosts.reboot(host),
        Request::Reset { host } => hosts.reset(host),
        Request::Save { target } => hosts.save(&target),
    };
    answer(&mut client, hosts.len(), result)
}

fn answer(client: &mut UnixStream, hosts: usize, result: Result<()>) -> Result<()> {
    send(client, &Reply { hosts, error: result.err().map(|error| format!("{error:#}")) })
}

/// Asks the holder of the set in `directory`.
///
/// # Errors
/// There is none, or it answers with an error.
pub fn ask(directory: &Path, request: &Request) -> Result<(UnixStream, Reply)> {
    let mut stream = UnixStream::connect(control_socket(directory)).context("no such hosts are up")?;
    send(&mut stream, request)?;
    let reply: Reply = receive(&mut stream).context("the hosts' holder does not answer")?;
    match reply.error {
        Some(error) => bail!(error),
        None => Ok((stream, reply)),
    }
}

/// Opens the command channel of host `host` of the set in `directory`.
///
/// # Errors
/// There is no such set or host.
pub fn attach(directory: &Path, host: usize) -> Result<Channel> {
    let (stream, _) = ask(directory, &Request::Attach { host })?;
    Ok(Channel::new(stream)?)
}

fn send(stream: &mut UnixStream, message: &impl Serialize) -> Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    Ok(stream.write_all(&line)?)
}

/// Reads one line byte by byte, because frames may follow it.
fn receive<T: for<'a> Deserialize<'a>>(stream: &mut UnixStream) -> Result<T> {
    let mut line = Vec::new();
    let mut byte = [0];
    while line.len() < MAX_LINE {
        stream.read_exact(&mut byte)?;
        if byte[0] == b'\n' {
            return Ok(serde_json::from_slice(&line)?);
        }
        line.push(byte[0]);
    }
    bail!("a message of more than {MAX_LINE} bytes")
}

/// Passes frames between a client and a host until the client goes; what it has left running is killed.
fn relay(client: UnixStream, host: &Channel) -> io::Result<()> {
    let mut reader = client.try_clone()?;
    let writer = Arc::new(Mutex::new(client));
    Frame::new(Kind::Hello, 0, b"relay").write(&mut *lock(&writer))?;
    let ids: Arc<Mutex<HashMap<u32, u32>>> = Arc::default();
    let result = loop {
        match Frame::read(&mut reader) {
            Ok(frame) => relay_frame(frame, host, &writer, &ids)?,
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => break Ok(()),
            Err(error) => break Err(error),
        }
    };
    for (_, id) in lock(&ids).drain() {
        host.close(id);
    }
    result
}

type Ids = Arc<Mutex<HashMap<u32, u32>>>;

fn relay_frame(frame: Frame, host: &Channel, writer: &Arc<Mutex<UnixStream>>, ids: &Ids) -> io::Result<()> {
    if frame.kind == Kind::Exec {
        return match host.open() {
            Ok((id, frames)) => {
                lock(ids).insert(frame.id, id);
                let back = Back { client_id: frame.id, id, host: host.clone(), ids: Arc::clone(ids) };
                let writer = Arc::clone(writer);
                thread::spawn(move || back.run(&frames, &writer));
                host.send(&Frame { id, ..frame })
            }
            Err(error) => {
                Frame::new(Kind::Lost, frame.id, error.to_string().as_bytes()).write(&mut *lock(writer))
            }
        };
    }
    let known = lock(ids).get(&frame.id).copied();
    match known {
        Some(id) if frame.kind == Kind::Close => {
            lock(ids).remove(&frame.id);
            host.close(id);
            Ok(())
        }
        Some(id) => host.send(&Frame { id, ..frame }),
        None => Ok(()),
    }
}

/// The way back of one command.
struct Back {
    client_id: u32,
    id: u32,
    host: Channel,
    ids: Ids,
}

impl Back {
    fn run(self, frames: &Receiver<Frame>, writer: &Mutex<UnixStream>) {
        for frame in frames {
            let last = matches!(frame.kind, Kind::Exit | Kind::Lost);
            if last {
                lock(&self.ids).remove(&self.client_id);
                self.host.forget(self.id);
            }
            // A client that has gone is noticed by the reader, which closes the command.
            if (Frame { id: self.client_id, ..frame }).write(&mut *lock(writer)).is_err() || last {
                return;
            }
        }
    }
}
