//! What does not end with one answer: exec and console (the connection becomes a byte stream), followed logs, events.
//!
//! ```text
//! client ◀─ 101 ─▶ lathed ◀─ bytes, both ways ─▶ guest agent (frames of the guest protocol) or serial console (as it is)
//! ```
//! lathed looks at none of these bytes. Each stream takes one of [`crate::api::MAX_STREAMS`] places.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use hyper::body::Frame;
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional, split};
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use utoipa::IntoParams;

use crate::api::answer::{Answer, ApiError, Name, Query};
use crate::api::core::Console;
use crate::api::wire::{ErrorBody, EventView, SCHEMA};
use crate::api::{App, MAX_STREAMS};
use crate::nearest::quoted;
use crate::problem::{Kind, Problem};

/// Frames that wait for a slow reader of logs or events; whoever is slower misses some, and is told.
const QUEUE_FRAMES: usize = 64;
/// How often a quiet event stream says that it lives.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// Most lines of a log at once.
const MAX_LINES: usize = 100_000;
/// Bytes read from a client's console at once.
const CONSOLE_CHUNK_BYTES: usize = 4096;

/// `?lines=…&follow=…`.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct Logs {
    /// The last so many lines; at most 100,000.
    #[serde(default = "default_lines")]
    lines: usize,
    /// Then go on with what comes.
    #[serde(default)]
    follow: bool,
}

fn default_lines() -> usize {
    1000
}

/// A place among the open streams.
fn place(app: &App) -> Result<OwnedSemaphorePermit, Problem> {
    std::sync::Arc::clone(&app.streams).try_acquire_owned().map_err(|_| {
        let message = format!("{MAX_STREAMS} streams are open, which is the most there may be");
        Problem::new(Kind::Unavailable, "too-many-streams", message)
            .detail("exec, console, followed logs and events count")
    })
}

/// The console's output.
#[utoipa::path(get, path = "/v1/machines/{name}/logs", tag = "machines", params(("name" = String, Path), Logs),
    responses((status = 200, content_type = "text/plain", body = String), (status = 404, body = ErrorBody)))]
pub async fn logs(State(app): State<App>, Name(name): Name, Query(query): Query<Logs>) -> Answer<Response> {
    let text = [(header::CONTENT_TYPE, "text/plain; charset=utf-8")];
    let lines = query.lines.min(MAX_LINES);
    if !query.follow {
        return Ok((text, app.core.logs(&name, lines).await?).into_response());
    }
    let place = place(&app)?;
    let (past, output) = app.core.logs_follow(&name, lines).await?;
    let (sender, body) = Frames::body();
    tokio::spawn(follow(past, output, sender, place));
    Ok((text, body).into_response())
}

/// Sends what the console said and says until it ends or the client goes.
async fn follow(
    past: String,
    mut output: Receiver<Vec<u8>>,
    sender: mpsc::Sender<Bytes>,
    _place: OwnedSemaphorePermit,
) {
    if sender.send(past.into()).await.is_err() {
        return;
    }
    loop {
        let data = tokio::select! {
            received = output.recv() => match received {
                Ok(data) => data,
                Err(RecvError::Lagged(lost)) => format!("\n[{lost} pieces of output were lost: the reader is too slow]\n").into_bytes(),
                Err(RecvError::Closed) => return,
            },
            () = sender.closed() => return,
        };
        if sender.send(data.into()).await.is_err() {
            return;
        }
    }
}

/// A body that lasts as long as somebody holds its sender.
struct Frames(mpsc::Receiver<Bytes>);

impl Frames {
    fn body() -> (mpsc::Sender<Bytes>, Body) {
        let (sender, receiver) = mpsc::channel(QUEUE_FRAMES);
        (sender, Body::new(Self(receiver)))
    }
}

impl hyper::body::Body for Frames {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0.poll_recv(context).map(|data| data.map(|data| Ok(Frame::data(data))))
    }
}

/// What happens, as server-sent events.
#[utoipa::path(get, path = "/v1/events", tag = "host",
    responses((status = 200, description = "Each `data:` is an EventView", content_type = "text/event-stream", body = EventView)))]
pub async fn events(State(app): State<App>) -> Answer<Response> {
    let place = place(&app)?;
    let (sender, body) = Frames::body();
    tokio::spawn(send_events(app.core.events(), sender, place));
    let headers = [(header::CONTENT_TYPE, "text/event-stream"), (header::CACHE_CONTROL, "no-store")];
    Ok((headers, body).into_response())
}

async fn send_events(
    mut events: Receiver<EventView>,
    sender: mpsc::Sender<Bytes>,
    _place: OwnedSemaphorePermit,
) {
    let mut beat = tokio::time::interval(KEEP_ALIVE);
    loop {
        let text = tokio::select! {
            received = events.recv() => match received {
                Ok(event) => event_text(&event),
                Err(RecvError::Lagged(lost)) => {
                    let message = format!("{lost} events were lost: the reader is too slow");
                    event_text(&EventView { schema: SCHEMA, kind: "events-lost".to_owned(), name: String::new(), message })
                }
                Err(RecvError::Closed) => return,
            },
            _ = beat.tick() => ":\n\n".to_owned(),
            () = sender.closed() => return,
        };
        if sender.send(text.into()).await.is_err() {
            return;
        }
    }
}

fn event_text(event: &EventView) -> String {
    let data = serde_json::to_string(event).unwrap_or_default();
    format!("event: {}\ndata: {data}\n\n", event.kind.replace(['\n', '\r'], " "))
}

/// Checks that the client wants to upgrade to `protocol`.
fn wants_upgrade(headers: &HeaderMap, protocol: &str) -> Result<(), Problem> {
    let says = |name: header::HeaderName, word: &str| {
        let values = headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
        values.flat_map(|value| value.split(',')).any(|token| token.trim().eq_ignore_ascii_case(word))
    };
    if says(header::CONNECTION, "upgrade") && says(header::UPGRADE, protocol) {
        return Ok(());
    }
    let found = headers.get(header::UPGRADE).and_then(|value| value.to_str().ok()).unwrap_or("none");
    Err(Problem::new(
        Kind::BadRequest,
        "upgrade-needed",
        format!("this needs an upgrade to {protocol}, not to {}", quoted(found)),
    )
    .detail(format!("send: Connection: upgrade, Upgrade: {protocol}")))
}

/// Switches protocols; `use_it` gets the connection once the client has been told.
fn switch<F>(
    request: Request,
    protocol: &'static str,
    use_it: impl FnOnce(TokioIo<Upgraded>) -> F + Send + 'static,
) -> Response
where
    F: Future<Output = ()> + Send + 'static,
{
    let upgrade: OnUpgrade = hyper::upgrade::on(request);
    tokio::spawn(async move {
        match upgrade.await {
            Ok(upgraded) => use_it(TokioIo::new(upgraded)).await,
            Err(error) => tracing::debug!("upgrade to {protocol}: {error}"),
        }
    });
    let headers = [
        (header::CONNECTION, HeaderValue::from_static("upgrade")),
        (header::UPGRADE, HeaderValue::from_static(protocol)),
    ];
    (StatusCode::SWITCHING_PROTOCOLS, headers).into_response()
}

/// A stream to the guest agent: then frames of the guest protocol, first an `Exec` request.
#[utoipa::path(post, path = "/v1/machines/{name}/exec", tag = "machines", params(("name" = String, Path)),
    responses((status = 101, description = "Upgrade: lathe-guest"), (status = 403, body = ErrorBody), (status = 404, body = ErrorBody),
        (status = 409, body = ErrorBody), (status = 503, body = ErrorBody)))]
pub async fn exec(State(app): State<App>, Name(name): Name, request: Request) -> Answer<Response> {
    const PROTOCOL: &str = "lathe-guest";
    wants_upgrade(request.headers(), PROTOCOL)?;
    let place = place(&app)?;
    let mut guest = app.core.guest_stream(&name).await?;
    Ok(switch(request, PROTOCOL, async move |mut client| {
        let _place = place;
        if let Err(error) = copy_bidirectional(&mut client, &mut guest).await {
            tracing::debug!(LATHE_WORKLOAD = name, "exec: {error}");
        }
    }))
}

/// The serial console: then raw bytes both ways.
#[utoipa::path(post, path = "/v1/machines/{name}/console", tag = "machines", params(("name" = String, Path)),
    responses((status = 101, description = "Upgrade: lathe-console"), (status = 403, body = ErrorBody), (status = 404, body = ErrorBody),
        (status = 409, body = ErrorBody)))]
pub async fn console(
    State(app): State<App>,
    Name(name): Name,
    request: Request,
) -> Result<Response, ApiError> {
    const PROTOCOL: &str = "lathe-console";
    wants_upgrade(request.headers(), PROTOCOL)?;
    let place = place(&app)?;
    let console = app.core.console(&name).await?;
    Ok(switch(request, PROTOCOL, async move |client| {
        let _place = place;
        if let Err(error) = attach(client, console).await {
            tracing::debug!(LATHE_WORKLOAD = name, "console: {error}");
        }
    }))
}

/// Carries bytes between a client and a console until either ends.
async fn attach(client: TokioIo<Upgraded>, mut console: Console) -> std::io::Result<()> {
    let (mut from_client, mut to_client) = split(client);
    to_client.write_all(&console.backlog).await?;
    let mut typed = vec![0; CONSOLE_CHUNK_BYTES];
    loop {
        tokio::select! {
            output = console.output.recv() => match output {
                Ok(data) => to_client.write_all(&data).await?,
                Err(RecvError::Lagged(_)) => to_client.write_all(b"\r\n[output was lost: too slow]\r\n").await?,
                Err(RecvError::Closed) => return to_client.shutdown().await,
            },
            count = from_client.read(&mut typed) => match count? {
                0 => return to_client.shutdown().await,
                count => if console.input.send(typed[..count].to_vec()).await.is_err() {
                    return to_client.shutdown().await;
                },
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_record_whatever_it_says() {
        let event =
            EventView { schema: 1, kind: "a\nb".into(), name: "web".into(), message: "two\nlines".into() };
        let text = event_text(&event);
        assert_eq!(text.matches('\n').count(), 3, "{text:?}");
        assert!(text.starts_with("event: a b\ndata: {\"schema\":1,") && text.ends_with("}\n\n"), "{text:?}");
    }

    #[test]
    fn upgrades_are_asked_for_by_both_headers() {
        let headers = |pairs: &[(header::HeaderName, &'static str)]| {
            pairs
                .iter()
                .map(|(name, value)| (name.clone(), HeaderValue::from_static(value)))
                .collect::<HeaderMap>()
        };
        let good = headers(&[(header::CONNECTION, "keep-alive, Upgrade"), (header::UPGRADE, "lathe-guest")]);
        assert_eq!(wants_upgrade(&good, "lathe-guest"), Ok(()));
        assert_eq!(wants_upgrade(&good, "lathe-console").unwrap_err().code, "upgrade-needed");
        assert!(wants_upgrade(&headers(&[(header::UPGRADE, "lathe-guest")]), "lathe-guest").is_err());
        assert!(wants_upgrade(&HeaderMap::new(), "lathe-guest").is_err());
    }
}
