//! Whole runtimes on the loopback: forming a cluster, being refused, misbehaving, coming back.

use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio_rustls::TlsConnector;

use super::store::file;
use super::token::{Token, sha256};
use super::*;

const WAIT: Duration = Duration::from_secs(15);
const HOUR: Duration = Duration::from_secs(3600);

struct Host {
    handle: PeerHandle,
    shape: watch::Sender<LocalShape>,
    dir: TempDir,
    config: PeerConfig,
}

fn config(name: &str) -> PeerConfig {
    PeerConfig {
        listen: "127.0.0.1:0".parse().unwrap(),
        region: "eu-1".into(),
        timing: Timing::fast(),
        ..PeerConfig::new(name)
    }
}

fn shape(cpu_milli: u64) -> LocalShape {
    let amounts = |cpu_milli| Amounts {
        cpu_milli,
        memory_bytes: 1 << 34,
        net_bit_s: 1_000_000_000,
        disk_bytes: 1 << 40,
    };
    LocalShape { capacity: amounts(8_000), free: amounts(cpu_milli), measured: None }
}

async fn host(name: &str, free_cpu: u64) -> Host {
    let dir = tempfile::tempdir().unwrap();
    start(dir, config(name), free_cpu).await
}

async fn start(dir: TempDir, config: PeerConfig, free_cpu: u64) -> Host {
    let (sender, receiver) = watch::channel(shape(free_cpu));
    let handle = PeerRuntime::start(config.clone(), dir.path().to_owned(), receiver).await.unwrap();
    Host { handle, shape: sender, dir, config }
}

impl Host {
    /// Ends this life; the next one listens where this one did.
    async fn restart(self, free_cpu: u64) -> Self {
        let address = self.address().await;
        self.handle.shutdown().await;
        start(self.dir, PeerConfig { listen: address, ..self.config }, free_cpu).await
    }

    async fn address(&self) -> SocketAddr {
        self.handle.status().await.unwrap().address.unwrap()
    }

    async fn sees(&self, name: &str, state: PeerState, free_cpu: Option<u64>) -> bool {
        let peers = self.handle.peers().await.unwrap();
        peers.iter().any(|peer| {
            let says = peer.advert.as_ref().map(|advert| advert.free.cpu_milli);
            peer.name == name && peer.state == state && (free_cpu.is_none() || says == free_cpu)
        })
    }

    async fn until_sees(&self, name: &str, state: PeerState, free_cpu: Option<u64>) {
        let begun = Instant::now();
        while !self.sees(name, state, free_cpu).await {
            let peers = self.handle.peers().await.unwrap();
            assert!(begun.elapsed() < WAIT, "{name} {state:?} {free_cpu:?} not seen: {peers:?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    async fn refused(&self, token: &str) -> PeerError {
        let error = self.handle.join(token, None).await.unwrap_err();
        assert_eq!(self.handle.status().await.unwrap().state, RuntimeState::NoCluster, "{error}");
        error
    }
}

async fn pair() -> (Host, Host) {
    let (one, two) = (host("web-03", 1_000).await, host("db-02", 2_000).await);
    one.handle.init("lab", None).await.unwrap();
    let token = one.handle.token(HOUR).await.unwrap();
    two.handle.join(&token, None).await.unwrap();
    one.until_sees("db-02", PeerState::Alive, Some(2_000)).await;
    two.until_sees("web-03", PeerState::Alive, Some(1_000)).await;
    (one, two)
}

#[tokio::test]
async fn three_hosts_find_each_other_and_hear_of_changes() {
    let (one, two) = pair().await;
    let three = host("Build-01", 3_000).await;
    let status = three.handle.join(&one.handle.token(HOUR).await.unwrap(), None).await.unwrap();
    assert_eq!(
        (status.state, status.cluster.as_deref(), status.has_ca),
        (RuntimeState::Member, Some("lab"), false)
    );
    for (host, others) in
        [(&one, ["db-02", "build-01"]), (&two, ["web-03", "build-01"]), (&three, ["web-03", "db-02"])]
    {
        for other in others {
            host.until_sees(other, PeerState::Alive, None).await;
        }
    }
    two.shape.send(shape(123)).unwrap();
    one.until_sees("db-02", PeerState::Alive, Some(123)).await;
    three.until_sees("db-02", PeerState::Alive, Some(123)).await;

    let peers = one.handle.peers().await.unwrap();
    let names: Vec<&str> = peers.iter().map(|peer| peer.name.as_str()).collect();
    assert_eq!(names, ["web-03", "build-01", "db-02"]);
    assert_eq!(peers[0].state, PeerState::Me);

    let info = three.handle.fetch_host("db-02").await.unwrap();
    assert_eq!((info.name.as_str(), info.region.as_str(), info.free.cpu_milli), ("db-02", "eu-1", 123));
    assert_eq!(three.handle.fetch_host("nobody").await.unwrap_err().code(), "peer-unknown");
}

#[tokio::test]
async fn without_a_cluster_there_is_only_this_host() {
    let alone = host("web-03", 1_000).await;
    let peers = alone.handle.peers().await.unwrap();
    assert_eq!(peers.len(), 1);
    assert_eq!((peers[0].state, peers[0].address), (PeerState::Me, None));
    assert_eq!(peers[0].advert.as_ref().unwrap().free.cpu_milli, 1_000);
    assert_eq!(alone.handle.status().await.unwrap().state, RuntimeState::NoCluster);
    assert_eq!(alone.handle.token(HOUR).await.unwrap_err().code(), "peer-no-cluster");
    assert_eq!(alone.handle.init("No Name", None).await.unwrap_err().code(), "peer-name-invalid");
    alone.handle.shutdown().await;
    assert_eq!(alone.handle.status().await.unwrap_err().code(), "peer-stopped");
}

#[tokio::test]
async fn bad_tokens_are_refused_and_change_nothing() {
    let one = host("web-03", 1_000).await;
    one.handle.init("lab", None).await.unwrap();
    let other = host("far-01", 1_000).await;
    other.handle.init("other", None).await.unwrap();
    let joiner = host("db-02", 2_000).await;

    assert_eq!(joiner.refused("hello").await.code(), "peer-token-malformed");
    let good = Token::parse(&one.handle.token(HOUR).await.unwrap()).unwrap();
    let wrong_secret = Token { secret: [0; 20], ..good.clone() }.text().unwrap();
    let error = joiner.refused(&wrong_secret).await;
    assert_eq!(error.code(), "peer-token-rejected");
    assert!(error.to_string().contains("no such token"), "{error}");
    let expired = one.handle.token(Duration::ZERO).await.unwrap();
    assert_eq!(joiner.refused(&expired).await.code(), "peer-token-expired");
    let wrong_pin = Token { pin: sha256(b"x"), ..good.clone() }.text().unwrap();
    assert_eq!(joiner.refused(&wrong_pin).await.code(), "peer-pin-mismatch");
    let misled = Token { addresses: vec![other.address().await], ..good.clone() }.text().unwrap();
    assert_eq!(joiner.refused(&misled).await.code(), "peer-pin-mismatch");
    let nobody = Token { addresses: vec!["127.0.0.1:1".parse().unwrap()], ..good.clone() }.text().unwrap();
    let error = joiner.refused(&nobody).await;
    assert_eq!(error.code(), "peer-unreachable");
    assert!(error.fix().unwrap().contains("1/tcp"), "{error}");

    let namesake = host("web-03", 1_000).await;
    assert_eq!(namesake.refused(&good.text().unwrap()).await.code(), "peer-name-taken");
    joiner.handle.join(&good.text().unwrap(), None).await.expect("none of these attempts spent the token");
    let late = host("build-01", 1_000).await;
    let error = late.refused(&good.text().unwrap()).await;
    assert!(error.to_string().contains("used already, by db-02"), "{error}");

    assert_eq!(
        joiner.handle.join(&good.text().unwrap(), None).await.unwrap_err().code(),
        "peer-already-member"
    );
    assert_eq!(joiner.handle.init("lab", None).await.unwrap_err().code(), "peer-already-member");
    assert_eq!(joiner.handle.token(HOUR).await.unwrap_err().code(), "peer-no-ca");
}

/// Speaks HTTP by hand over a TLS connection without a certificate of its own. None: refused before HTTP.
async fn raw(address: SocketAddr, pin: [u8; 32], request: &str) -> Option<String> {
    let (config, _) = tls::joiner(pin).unwrap();
    let stream = TcpStream::connect(address).await.unwrap();
    let mut stream =
        TlsConnector::from(config).connect(tls::server_name("web-03").unwrap(), stream).await.ok()?;
    stream.write_all(request.as_bytes()).await.ok()?;
    let mut answer = Vec::new();
    // The server may close without a goodbye; what came until then counts.
    let _ = stream.read_to_end(&mut answer).await;
    Some(String::from_utf8_lossy(&answer).into_owned())
}

#[tokio::test]
async fn strangers_may_only_knock() {
    let one = host("web-03", 1_000).await;
    one.handle.init("lab", None).await.unwrap();
    let token = Token::parse(&one.handle.token(HOUR).await.unwrap()).unwrap();
    let address = token.addresses[0];
    let head = "HTTP/1.1\r\nhost: x\r\nconnection: close\r\n";
    for (request, expected) in [
        (format!("GET /v1/host {head}\r\n"), "401"),
        (format!("GET /v1/join {head}\r\n"), "401"),
        (format!("GET /etc/passwd {head}\r\n"), "401"),
        (format!("POST /v1/host {head}content-length: 0\r\n\r\n"), "401"),
        (
            format!("POST /v1/join {head}content-type: application/json\r\ncontent-length: 2\r\n\r\n{{}}"),
            "422",
        ),
        (
            format!("POST /v1/join {head}content-type: application/json\r\ncontent-length: 4\r\n\r\njunk"),
            "400",
        ),
        (
            format!(
                "POST /v1/join {head}content-type: application/json\r\ncontent-length: 40000\r\n\r\n{:40000}",
                ""
            ),
            "413",
        ),
        ("\0\0\0\0\r\n\r\n".to_owned(), "400"),
    ] {
        let answer = raw(address, token.pin, &request).await.unwrap();
        assert!(answer.starts_with(&format!("HTTP/1.1 {expected}")), "{request:?}: {answer}");
    }
    let mut plain = TcpStream::connect(address).await.unwrap();
    plain.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    let _ = plain.read_to_end(&mut answer).await;
    assert!(!answer.starts_with(b"HTTP"), "no plain HTTP");

    let foreign = Membership::found(
        "web-03",
        ClusterFile { schema: 1, cluster: "other".into(), ip: address.ip(), port: None },
    );
    let error = client::host(&foreign.unwrap(), address, "web-03").await.unwrap_err();
    assert_eq!(error.code(), "peer-unreachable", "a member of another cluster is no member: {error}");
    assert_eq!(one.handle.status().await.unwrap().state, RuntimeState::Member);
}

#[tokio::test]
async fn malformed_and_oversize_datagrams_are_counted_and_ignored() {
    let (one, two) = pair().await;
    let address = one.address().await;
    let stranger = UdpSocket::bind("127.0.0.1:0").unwrap();
    for size in [0, 1, 36, 53, 54, 500, 1_400, 1_401, 9_000, 65_000] {
        for fill in [0, 1, 255] {
            stranger.send_to(&vec![fill; size], address).unwrap();
        }
    }
    let begun = Instant::now();
    loop {
        let stats = one.handle.status().await.unwrap().stats.unwrap();
        if stats.bad_size >= 15 && stats.unknown_key >= 9 {
            assert_eq!(stats.malformed + stats.over_capacity, 0);
            break;
        }
        assert!(begun.elapsed() < WAIT, "{stats:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    two.shape.send(shape(77)).unwrap();
    one.until_sees("db-02", PeerState::Alive, Some(77)).await;
    assert_eq!(one.handle.peers().await.unwrap().len(), 2);
}

#[tokio::test]
async fn a_restarted_host_is_a_member_again_by_itself() {
    let (one, two) = pair().await;
    let two = two.restart(2_500).await;
    two.until_sees("web-03", PeerState::Alive, Some(1_000)).await;
    one.until_sees("db-02", PeerState::Alive, Some(2_500)).await;

    two.handle.shutdown().await;
    one.until_sees("db-02", PeerState::Dead, None).await;
    let one = one.restart(1_500).await;
    one.until_sees("db-02", PeerState::Dead, None).await;
    let two = start(two.dir, two.config, 2_600).await;
    one.until_sees("db-02", PeerState::Alive, Some(2_600)).await;
    two.until_sees("web-03", PeerState::Alive, Some(1_500)).await;
    one.handle.token(HOUR).await.expect("the CA is still here");
}

#[tokio::test]
async fn a_taken_port_is_a_fault_that_is_told() {
    let one = host("web-03", 1_000).await;
    one.handle.init("lab", None).await.unwrap();
    let address = one.address().await;
    one.handle.shutdown().await;
    let squatter = UdpSocket::bind(address).unwrap();
    let one = start(one.dir, PeerConfig { listen: address, ..one.config }, 1_000).await;
    let RuntimeState::Fault { reason } = one.handle.status().await.unwrap().state else { panic!("no fault") };
    assert!(reason.contains(&address.to_string()), "{reason}");
    let joiner = PeerConfig { listen: address, ..config("db-02") };
    let joiner = start(tempfile::tempdir().unwrap(), joiner, 1).await;
    assert_eq!(joiner.handle.init("lab", None).await.unwrap_err().code(), "peer-bind");
    drop(squatter);
}

#[tokio::test]
async fn a_corrupt_folder_is_told_by_file() {
    let one = host("web-03", 1_000).await;
    one.handle.init("lab", None).await.unwrap();
    one.handle.shutdown().await;
    let again = || async {
        let (_sender, receiver) = watch::channel(LocalShape::default());
        PeerRuntime::start(one.config.clone(), one.dir.path().to_owned(), receiver).await.map(|_| ())
    };
    std::fs::write(one.dir.path().join(file::PEERS), "junk").unwrap();
    again().await.expect("remembered peers are not worth failing for");
    for name in [file::CLUSTER, file::NODE_KEY, file::GOSSIP_KEYS, file::CA_CERT] {
        let path = one.dir.path().join(name);
        let good = std::fs::read(&path).unwrap();
        std::fs::write(&path, "junk").unwrap();
        let error = again().await.unwrap_err();
        assert_eq!(error.code(), "peer-store");
        assert!(error.to_string().contains(name), "{error}");
        std::fs::write(&path, good).unwrap();
    }
}
