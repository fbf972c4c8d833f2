//! The host: its books, its health, its figures.

use std::sync::Arc;

use axum::Json as Out;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};

use super::machines::Plan;
use super::{blocking, to_the_end};
use crate::api::answer::{Answer, Json, Query};
use crate::api::wire::{
    DoctorReport, ErrorBody, HostView, PlanView, SCHEMA, UplinkRequest, UplinkView, Version,
};
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

/// The host's uplink and what machines have of it.
#[utoipa::path(get, path = "/v1/host/uplink", tag = "host", responses((status = 200, body = UplinkView), (status = 403, body = ErrorBody)))]
pub async fn uplink(State(app): State<App>) -> Out<UplinkView> {
    Out(app.core.uplink().await)
}

/// Shares the uplink between machines, or gives it another capacity. What was at the root of its device is kept, and put back by `DELETE`.
#[utoipa::path(put, path = "/v1/host/uplink", tag = "host", params(Plan), request_body = UplinkRequest,
    responses((status = 200, description = "With plan=true a PlanView", body = UplinkView),
        (status = 400, body = ErrorBody), (status = 403, body = ErrorBody), (status = 404, body = ErrorBody),
        (status = 409, body = ErrorBody), (status = 422, body = ErrorBody)))]
pub async fn enable_uplink(
    State(app): State<App>,
    Query(query): Query<Plan>,
    Json(request): Json<UplinkRequest>,
) -> Answer<Response> {
    if query.plan {
        let plan: PlanView = app.core.plan_uplink(&request).await?;
        return Ok(Out(plan).into_response());
    }
    let core = Arc::clone(&app.core);
    let view = to_the_end(async move { core.enable_uplink(request).await }).await?;
    Ok(Out(view).into_response())
}

/// Ends sharing of the uplink: what was at the root of its device comes back.
#[utoipa::path(delete, path = "/v1/host/uplink", tag = "host",
    responses((status = 200, body = UplinkView), (status = 403, body = ErrorBody), (status = 500, body = ErrorBody)))]
pub async fn disable_uplink(State(app): State<App>) -> Answer<Out<UplinkView>> {
    let core = Arc::clone(&app.core);
    Ok(Out(to_the_end(async move { core.disable_uplink().await }).await?))
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
    let text = figures::render(
        &view(&app).await,
        &app.core.list().await,
        &app.core.enforced(),
        &app.core.sculpted(),
    );
    ([(header::CONTENT_TYPE, figures::CONTENT_TYPE)], text).into_response()
}
