//! What a machine reaches of the host, on a real kernel with a real `nft`.

mod common;

use std::io::ErrorKind;
use std::net::UdpSocket;
use std::time::Duration;

use common::*;
use lathe_netshape::{HostGuard, Mac, Nat, Outcome, Prefix, Proto, Service};

const NFT: &str = "/usr/sbin/nft";

/// The bridge's address; files of `/sys` would be those of another namespace.
fn gateway() -> Result<Option<Mac>, Box<dyn std::error::Error>> {
    let Some(shown) = output("ip", &["-br", "link", "show", "lathe0"])? else { return Ok(None) };
    let word = shown.split_whitespace().find(|word| word.len() == 17).ok_or("no address of the bridge")?;
    let bytes: Vec<u8> =
        word.split(':').map(|byte| u8::from_str_radix(byte, 16)).collect::<Result<_, _>>()?;
    Ok(Some(Mac(bytes.try_into().map_err(|_| "no address of the bridge")?)))
}

/// Whether a datagram from the guest's port arrives at the socket.
fn arrives(
    a: &mut Guest,
    gateway: Mac,
    socket: &UdpSocket,
    guest_port: u16,
) -> Result<bool, Box<dyn std::error::Error>> {
    let port = socket.local_addr()?.port();
    let packet = ipv4("10.77.0.5".parse()?, "10.77.0.1".parse()?, (guest_port, port), b"knock")?;
    a.send(&ethernet(gateway, a.mac, IPV4, &packet))?;
    // The frame is handled before the write returns; the time is for a busy machine.
    match socket.recv(&mut [0; 64]) {
        Ok(_) => Ok(true),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

#[test]
fn a_machine_reaches_what_is_named_and_answers_what_it_is_asked() -> Tested {
    in_namespace(async |nl| {
        if output(NFT, &["--version"])?.is_none() {
            return Ok(());
        }
        let (mut a, _b) = two_guests(&nl).await?;
        let Some(gateway) = gateway()? else { return Ok(()) };
        let bridge = bridge()?;
        let listen = |port| {
            let socket = UdpSocket::bind(("10.77.0.1", port))?;
            socket.set_read_timeout(Some(Duration::from_millis(300)))?;
            Ok::<_, std::io::Error>(socket)
        };
        let (named, other, asking) = (listen(5301)?, listen(5302)?, listen(5303)?);
        assert!(arrives(&mut a, gateway, &other, 1000)?, "without a guard everything is reached");
        let guard = HostGuard::new();
        let services = [Service { proto: Proto::Udp, port: 5301 }];
        output(NFT, &["add", "table", "inet", "other"])?;
        // Beside NAT, in whichever order, and repeated.
        let prefix: Prefix = "10.77.0.1/16".parse()?;
        guard.ensure(&bridge, &services)?;
        Nat::new().ensure(&bridge, &[prefix])?;
        guard.ensure(&bridge, &services)?;
        assert!(arrives(&mut a, gateway, &named, 1001)?);
        assert!(!arrives(&mut a, gateway, &other, 1002)?);
        // The host asks, the machine answers.
        assert!(!arrives(&mut a, gateway, &asking, 1003)?);
        let mac = a.mac.to_string();
        output("ip", &["neigh", "replace", "10.77.0.5", "lladdr", &mac, "dev", "lathe0"])?;
        asking.send_to(b"?", "10.77.0.5:1004")?;
        assert!(arrives(&mut a, gateway, &asking, 1004)?);
        assert!(!arrives(&mut a, gateway, &asking, 1005)?);
        // Another service is named instead.
        guard.ensure(&bridge, &[Service { proto: Proto::Udp, port: 5302 }])?;
        assert!(!arrives(&mut a, gateway, &named, 1006)?);
        assert!(arrives(&mut a, gateway, &other, 1007)?);
        assert_eq!(guard.remove()?, Outcome::Changed);
        assert_eq!(guard.remove()?, Outcome::Unchanged);
        assert!(arrives(&mut a, gateway, &named, 1008)?);
        let tables = output(NFT, &["list", "tables"])?.unwrap_or_default();
        assert!(tables.contains("inet other") && tables.contains("inet lathe"), "{tables}");
        Nat::new().remove()?;
        Ok(())
    })
}
