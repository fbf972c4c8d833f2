//! Calls to the peer API of another host. One connection per call; every step has a time-out.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use serde::de::DeserializeOwned;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::error::PeerError;
use super::membership::Membership;
use super::tls;
use super::token::{Token, hex};
use super::wire::{HostInfo, JoinAnswer, JoinAsk, MAX_BODY, Refusal, SCHEMA};

/// For TCP to connect.
const CONNECT: Duration = Duration::from_secs(4);
/// For a whole call.
const CALL: Duration = Duration::from_secs(15);

/// One call.
struct Call<'a> {
    tls: Arc<ClientConfig>,
    address: SocketAddr,
    /// Node name of the other host.
    server: &'a str,
    method: Method,
    path: &'static str,
    body: Vec<u8>,
}

/// An answer, and from which own address the call went out.
struct Answer {
    status: StatusCode,
    body: Bytes,
    from: SocketAddr,
}

impl Call<'_> {
    async fn make(self) -> Result<Answer, PeerError> {
        let address = self.address;
        let limit = timeout(CALL, self.make_unlimited()).await;
        limit.unwrap_or_else(|_| Err(unreachable(address, format!("no answer within {} s", CALL.as_secs()))))
    }

    async fn make_unlimited(self) -> Result<Answer, PeerError> {
        let address = self.address;
        let stream = match timeout(CONNECT, TcpStream::connect(address)).await {
            Ok(connected) => connected.map_err(|error| unreachable(address, error))?,
            Err(_) => {
                return Err(unreachable(address, format!("no connection within {} s", CONNECT.as_secs())));
            }
        };
        let from = stream.local_addr().map_err(|error| unreachable(address, error))?;
        let connector = TlsConnector::from(self.tls);
        let stream = connector.connect(tls::server_name(self.server)?, stream).await;
        let stream = stream.map_err(|error| unreachable(address, format!("TLS: {error}")))?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| unreachable(address, error))?;
        let driver = tokio::spawn(connection);
        let request = Request::builder()
            .method(self.method)
            .uri(self.path)
            .header("host", self.server)
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(self.body)))
            .map_err(|error| PeerError::Internal(error.to_string()))?;
        let response = sender.send_request(request).await.map_err(|error| unreachable(address, error))?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_BODY).collect().await;
        driver.abort();
        let body = body.map_err(|error| protocol(address, format!("the answer cannot be read: {error}")))?;
        Ok(Answer { status, body: body.to_bytes(), from })
    }
}

/// Asks the cluster of the token to be let in. Gives the answer and the own address that reached it.
///
/// # Errors
/// What stands in the way; the token is spent only if this succeeds, or if the answer got lost.
pub async fn join(
    token: &Token,
    name: &str,
    request: &str,
) -> Result<(JoinAnswer, SocketAddr, SocketAddr), PeerError> {
    let mut last = PeerError::TokenMalformed("it names no address");
    for address in &token.addresses {
        match join_at(*address, token, name, request).await {
            Ok((answer, from)) => return Ok((answer, from, *address)),
            Err(error @ PeerError::Unreachable { .. }) => last = error,
            Err(other) => return Err(other),
        }
    }
    Err(last)
}

async fn join_at(
    address: SocketAddr,
    token: &Token,
    name: &str,
    request: &str,
) -> Result<(JoinAnswer, SocketAddr), PeerError> {
    let (tls, verifier) = tls::joiner(token.pin)?;
    let ask = JoinAsk {
        schema: SCHEMA,
        name: name.to_owned(),
        request: request.to_owned(),
        secret: BASE64_STANDARD.encode(token.secret),
    };
    let body = serde_json::to_vec(&ask).map_err(|error| PeerError::Internal(error.to_string()))?;
    let call = Call { tls, address, server: &token.server, method: Method::POST, path: "/v1/join", body };
    let made = call.make().await;
    if verifier.mismatch() {
        return Err(PeerError::PinMismatch { address, pin: hex(&token.pin[..8]) });
    }
    let answer = made?;
    if answer.status == StatusCode::OK {
        return Ok((decode(address, &answer.body)?, answer.from));
    }
    let refusal: Refusal = decode(address, &answer.body)?;
    Err(match refusal.error.code.as_str() {
        "peer-token-expired" => PeerError::TokenExpired { address },
        "peer-token-rejected" => {
            PeerError::TokenRejected { address, reason: limited(&refusal.error.message) }
        }
        "peer-name-taken" => PeerError::NameTaken(name.to_owned()),
        _ => protocol(address, format!("{}: {}", answer.status, limited(&refusal.error.message))),
    })
}

/// `GET /v1/host` of a member.
///
/// # Errors
/// [`PeerError::Unreachable`], [`PeerError::Protocol`].
pub async fn host(member: &Membership, address: SocketAddr, name: &str) -> Result<HostInfo, PeerError> {
    let tls = tls::client(member)?;
    let call = Call { tls, address, server: name, method: Method::GET, path: "/v1/host", body: Vec::new() };
    let answer = call.make().await?;
    if answer.status != StatusCode::OK {
        let refusal: Refusal = decode(address, &answer.body)?;
        return Err(protocol(address, format!("{}: {}", answer.status, limited(&refusal.error.message))));
    }
    decode(address, &answer.body)
}

fn decode<T: DeserializeOwned>(address: SocketAddr, body: &[u8]) -> Result<T, PeerError> {
    serde_json::from_slice(body).map_err(|error| protocol(address, limited(&error.to_string())))
}

/// What another host says goes to a terminal: one line, bounded, no control characters.
fn limited(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(200).collect()
}

fn unreachable(address: SocketAddr, reason: impl ToString) -> PeerError {
    PeerError::Unreachable { address, reason: reason.to_string() }
}

fn protocol(address: SocketAddr, what: String) -> PeerError {
    PeerError::Protocol { address, what }
}
