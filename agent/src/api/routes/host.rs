//! The host: its books, its health, its figures.

use axum::Json as Out;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};

use super::blocking;
use crate::api::answer::Answer;
use crate::api::wire::{DoctorReport, ErrorBody, HostView, SCHEMA, Version};
use crate::api::{App, metrics as figures, openapi as document};

/// Who answers.
#[utoipa::path(get, path = "/v1/version", tag = "host", responses((status = 200, body = Version)))]
pub async fn version() -> Out<Version> {
    Out(Version { schema: SCHEMA, version: env!("CARGO_PKG_VERSION").to_owned() })
}

/// The host's books.
#[utoipa::path(get, path = "/v1/host", tag = "host", responses((status = 200, body = HostView), (status = 403, body = ErrorBody)))]
pub async fn host(State(app): State<App>) -> Out<HostView> {
    Out(view(&app).await)
}

async fn view(app: &App) -> HostView {
    let mut view = app.core.host();
    view.peers_alive = app.cluster.alive().await;
    view
}

/// What the host has and lacks.
#[utoipa::path(get, path = "/v1/doctor", tag = "host", responses((status = 200, body = DoctorReport)))]
pub async fn doctor(State(app): State<App>) -> Answer<Out<DoctorReport>> {
    Ok(Out(blocking(move || Ok(app.doctor.examine())).await?))
}

/// This document.
#[utoipa::path(get, path = "/v1/openapi.json", tag = "host", responses((status = 200, content_type = "application/json")))]
pub async fn openapi() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], document::json()).into_response()
}

/// OpenMetrics.
#[utoipa::path(get, path = "/metrics", tag = "host", responses((status = 200, content_type = "application/openmetrics-text", body = String)))]
pub async fn metrics(State(app): State<App>) -> Response {
    let text = figures::render(&view(&app).await, &app.core.list().await);
    ([(header::CONTENT_TYPE, figures::CONTENT_TYPE)], text).into_response()
}
