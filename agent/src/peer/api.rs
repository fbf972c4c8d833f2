//! The peer API's server: HTTP/JSON over TLS on the cluster's TCP port.
//!
//! `POST /v1/join` is open to anybody with a token's secret; everything else needs a certificate of the cluster's CA.
//! Connections, their number, duration and sizes are bounded; a caller that misbehaves is dropped and costs nobody else anything.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{DefaultBodyLimit, Extension, Request, State};
use axum::http::{Method, StatusCode};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tracing::{debug, info, warn};

use super::driver::Command;
use super::error::PeerError;
use super::membership::{Issued, Membership, unix_now};
use super::store::Store;
use super::token::{Tokens, Verdict};
use super::wire::{HostInfo, JoinAnswer, JoinAsk, KnownPeer, MAX_BODY, Refusal, RefusalBody, SCHEMA};
use super::{LocalShape, PeerConfig, tls};

/// Connections served at once; more wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 64;
/// For the TLS handshake.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// For the request's head.
const HEAD: Duration = Duration::from_secs(5);
/// For a whole connection.
const CONNECTION: Duration = Duration::from_secs(30);

/// What the handlers need.
pub struct ApiState {
    /// This host's configuration.
    pub config: Arc<PeerConfig>,
    /// The cluster's folder.
    pub store: Store,
    /// Certificates and keys.
    pub member: Arc<Membership>,
    /// What this host has.
    pub shape: watch::Receiver<LocalShape>,
    /// To the driver.
    pub commands: mpsc::WeakSender<Command>,
    /// One token file, one writer.
    pub tokens: Arc<Mutex<()>>,
}

/// Whether the caller showed a certificate of the CA.
#[derive(Clone, Copy)]
struct IsMember(bool);

/// Serves until it is aborted.
pub async fn serve(listener: TcpListener, state: Arc<ApiState>) -> Result<(), PeerError> {
    let acceptor = TlsAcceptor::from(tls::server(&state.member)?);
    let router = router(state);
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(slot) = slots.clone().acquire_owned().await else { return Err(PeerError::Stopped) };
        match listener.accept().await {
            Ok((stream, from)) => {
                tokio::spawn(connection(stream, from, slot, acceptor.clone(), router.clone()));
            }
            Err(error) => {
                warn!("peer API: accept: {error}");
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

fn router(state: Arc<ApiState>) -> Router {
    Router::new()
        .route("/v1/join", post(join))
        .route("/v1/host", get(host))
        .layer(middleware::from_fn(members_only))
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(state)
}

async fn connection(
    stream: TcpStream,
    from: SocketAddr,
    slot: OwnedSemaphorePermit,
    acceptor: TlsAcceptor,
    router: Router,
) {
    let served = timeout(CONNECTION, async {
        let stream = match timeout(HANDSHAKE, acceptor.accept(stream)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return debug!("peer API: {from}: TLS: {error}"),
            Err(_) => return debug!("peer API: {from}: no TLS handshake within {HANDSHAKE:?}"),
        };
        let is_member =
            IsMember(stream.get_ref().1.peer_certificates().is_some_and(|chain| !chain.is_empty()));
        let service = TowerToHyperService::new(router.layer(Extension(is_member)));
        let mut builder = http1::Builder::new();
        builder.timer(TokioTimer::new()).header_read_timeout(HEAD).max_buf_size(MAX_BODY);
        if let Err(error) = builder.serve_connection(TokioIo::new(stream), service).await {
            debug!("peer API: {from}: {error}");
        }
    });
    if served.await.is_err() {
        debug!("peer API: {from}: dropped after {CONNECTION:?}");
    }
    drop(slot);
}

async fn members_only(request: Request, next: Next) -> Response {
    let joining = request.method() == Method::POST && request.uri().path() == "/v1/join";
    let is_member = request.extensions().get::<IsMember>().is_some_and(|caller| caller.0);
    if joining || is_member {
        return next.run(request).await;
    }
    refuse(StatusCode::UNAUTHORIZED, "peer-unauthenticated", "a certificate of this cluster's CA is needed")
}

fn refuse(status: StatusCode, code: &str, message: impl Into<String>) -> Response {
    let error = RefusalBody { code: code.to_owned(), message: message.into() };
    (status, Json(Refusal { error })).into_response()
}

async fn host(State(state): State<Arc<ApiState>>) -> Json<HostInfo> {
    let shape = *state.shape.borrow();
    Json(HostInfo {
        schema: SCHEMA,
        name: state.member.card.name().to_owned(),
        version: state.config.version.clone(),
        region: state.config.region.clone(),
        capacity: shape.capacity,
        free: shape.free,
    })
}

async fn join(State(state): State<Arc<ApiState>>, Json(ask): Json<JoinAsk>) -> Response {
    let name = ask.name.chars().take(64).collect::<String>();
    match admit(&state, ask).await {
        Ok(answer) => {
            info!("{name} joined cluster {}", state.member.file.cluster);
            Json(answer).into_response()
        }
        Err((status, code, message)) => {
            warn!("{name:?} was not let into the cluster: {message}");
            refuse(status, code, message)
        }
    }
}

type Refused = (StatusCode, &'static str, String);

/// The secret is spent only when nothing else stands in the way, and before the answer leaves.
async fn admit(state: &Arc<ApiState>, ask: JoinAsk) -> Result<JoinAnswer, Refused> {
    let bad = |what: String| (StatusCode::BAD_REQUEST, "peer-protocol", what);
    if ask.schema != SCHEMA {
        return Err(bad(format!("schema {} is not spoken here, only {SCHEMA}", ask.schema)));
    }
    let secret = BASE64_STANDARD.decode(&ask.secret).map_err(|_| bad("the secret is not base64".into()))?;
    lathe_gossip::card::check_name(&ask.name)
        .map_err(|error| (StatusCode::UNPROCESSABLE_ENTITY, "peer-name-invalid", error.to_string()))?;
    let _one_at_a_time = state.tokens.lock().await;
    let seeds = seeds(state, &ask.name).await?;
    let (worker, name) = (state.clone(), ask.name);
    let issued =
        tokio::task::spawn_blocking(move || issue(&worker, &name, &ask.request, &secret, unix_now()));
    let issued = issued.await.map_err(|_| failed(&PeerError::Stopped))??;
    Ok(JoinAnswer { schema: SCHEMA, issued, seeds })
}

/// Who to gossip with first; refuses a name that a living host has.
async fn seeds(state: &ApiState, name: &str) -> Result<Vec<KnownPeer>, Refused> {
    let (answer, members) = tokio::sync::oneshot::channel();
    let Some(commands) = state.commands.upgrade() else { return Err(failed(&PeerError::Stopped)) };
    commands.send(Command::Known(answer)).await.map_err(|_| failed(&PeerError::Stopped))?;
    let members = members.await.map_err(|_| failed(&PeerError::Stopped))?;
    if name == state.member.card.name() || members.iter().any(|member| member.name == name) {
        let taken = PeerError::NameTaken(name.to_owned());
        return Err((StatusCode::CONFLICT, taken.code(), taken.to_string()));
    }
    Ok(members)
}

fn issue(state: &ApiState, name: &str, request: &str, secret: &[u8], now: u64) -> Result<Issued, Refused> {
    let mut tokens = Tokens::load(&state.store).map_err(|error| failed(&error))?;
    let forbidden = |code, message: &str| Err((StatusCode::FORBIDDEN, code, message.to_owned()));
    match tokens.verdict(secret, now) {
        Verdict::Good => {}
        Verdict::Expired => return forbidden("peer-token-expired", "the token has expired"),
        Verdict::Unknown => return forbidden("peer-token-rejected", "no such token was given out here"),
        Verdict::Used(by) => {
            return forbidden("peer-token-rejected", &format!("it was used already, by {by}"));
        }
    }
    let issued = state.member.issue(name, request).map_err(|error| match error {
        PeerError::Internal(what) => (StatusCode::BAD_REQUEST, "peer-protocol", what),
        other => failed(&other),
    })?;
    tokens.spend(secret, name).map_err(|error| failed(&error))?;
    Ok(issued)
}

fn failed(error: &PeerError) -> Refused {
    (StatusCode::INTERNAL_SERVER_ERROR, error.code(), error.to_string())
}
