//! The private segment: a small Ethernet switch between test hosts, on Unix datagram sockets.
//!
//! ```text
//! host 1: -netdev dgram  net-1.sock ◀──▶ hub-1.sock ─┐
//! host 2: -netdev dgram  net-2.sock ◀──▶ hub-2.sock ─┼─ learns source addresses, floods what it does not know
//! ```
//!
//! Nothing leaves the machine: there is no socket of the network in it. A destination that does not take a frame
//! within `PATIENCE` loses it, as on a real wire.

use std::collections::HashMap;
use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

/// The largest frame: 64 KiB of segmentation offload and its headers.
const MAX_FRAME: usize = 68 * 1024;
/// How long a full receiver holds up a sender before the frame is dropped.
const PATIENCE: Duration = Duration::from_millis(50);
/// The most addresses that the switch remembers; beyond that it floods.
const MAX_ADDRESSES: usize = 4096;

type Address = [u8; 6];

struct Port {
    socket: UnixDatagram,
    peer: PathBuf,
}

/// The switch. Its threads end with the process.
#[derive(Debug)]
pub struct Hub;

/// Path of host `number`'s own socket.
pub fn host_socket(directory: &Path, number: usize) -> PathBuf {
    directory.join(format!("net-{number}.sock"))
}

/// Path of the switch's socket towards host `number`.
pub fn hub_socket(directory: &Path, number: usize) -> PathBuf {
    directory.join(format!("hub-{number}.sock"))
}

impl Hub {
    /// Opens a port for each host and starts forwarding.
    ///
    /// # Errors
    /// A socket cannot be made in `directory`.
    pub fn start(directory: &Path, hosts: usize) -> io::Result<Self> {
        let mut ports = Vec::new();
        for number in 1..=hosts {
            let socket = UnixDatagram::bind(hub_socket(directory, number))?;
            socket.set_write_timeout(Some(PATIENCE))?;
            ports.push(Port { socket, peer: host_socket(directory, number) });
        }
        let ports = Arc::new(ports);
        let learned: Arc<Mutex<HashMap<Address, usize>>> = Arc::default();
        for number in 0..hosts {
            let (ports, learned) = (Arc::clone(&ports), Arc::clone(&learned));
            thread::Builder::new()
                .name(format!("hub-{number}"))
                .spawn(move || forward(number, &ports, &learned))?;
        }
        Ok(Self)
    }
}

fn forward(from: usize, ports: &[Port], learned: &Mutex<HashMap<Address, usize>>) {
    let mut frame = vec![0; MAX_FRAME];
    loop {
        let Ok(length) = ports[from].socket.recv(&mut frame) else { return };
        let Some((destination, source)) = addresses(&frame[..length]) else { continue };
        let target = {
            let mut learned = learned.lock().unwrap_or_else(PoisonError::into_inner);
            if learned.len() < MAX_ADDRESSES || learned.contains_key(&source) {
                learned.insert(source, from);
            }
            learned.get(&destination).copied()
        };
        for (number, port) in ports.iter().enumerate() {
            if number != from && target.is_none_or(|target| target == number) {
                // A host that is not there or does not keep up loses the frame.
                let _ = port.socket.send_to(&frame[..length], &port.peer);
            }
        }
    }
}

/// Destination and source of an Ethernet frame.
fn addresses(frame: &[u8]) -> Option<(Address, Address)> {
    Some((frame.get(..6)?.try_into().ok()?, frame.get(6..12)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(to: u8, from: u8) -> Vec<u8> {
        let mut bytes = vec![2, 0, 0, 0, 0, to, 2, 0, 0, 0, 0, from];
        bytes.extend_from_slice(b"payload");
        bytes
    }

    fn receive(socket: &UnixDatagram) -> Vec<u8> {
        let mut buffer = [0; 64];
        let length = socket.recv(&mut buffer).unwrap();
        buffer[..length].to_vec()
    }

    #[test]
    fn floods_until_it_has_learned() {
        let directory = std::env::temp_dir().join(format!("lathe-hub-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let hosts: Vec<_> =
            (1..=3).map(|k| UnixDatagram::bind(host_socket(&directory, k)).unwrap()).collect();
        Hub::start(&directory, 3).unwrap();
        let send = |k: usize, bytes: &[u8]| hosts[k - 1].send_to(bytes, hub_socket(&directory, k)).unwrap();

        send(1, &frame(2, 1));
        assert_eq!((receive(&hosts[1]), receive(&hosts[2])), (frame(2, 1), frame(2, 1)));
        send(2, &frame(1, 2));
        assert_eq!(receive(&hosts[0]), frame(1, 2));
        // Host 3 has heard nothing of that: the next thing it hears is the frame that is meant for it.
        send(3, &frame(9, 3));
        assert_eq!((receive(&hosts[0]), receive(&hosts[1])), (frame(9, 3), frame(9, 3)));
        send(1, &frame(3, 1));
        assert_eq!(receive(&hosts[2]), frame(3, 1));
        std::fs::remove_dir_all(&directory).unwrap();
    }
}
