//! Nics of machines: listed, added, limited, removed.

use std::sync::Arc;

use axum::Json as Out;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use utoipa::IntoParams;

use super::machines::Plan;
use super::to_the_end;
use crate::api::App;
use crate::api::answer::{Answer, Json, Name, NicName, Query};
use crate::api::wire::{ErrorBody, NicAddRequest, NicLimitRequest, NicList, NicView, PlanView, Removed};
use crate::machines::{NicChange, NicChanged};

/// `?timeout_sec=…&plan=…`.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct Unplugging {
    /// Seconds that a running guest has to let it go, 1..=3600; 30 unless given.
    timeout_sec: Option<u32>,
    /// Only say what would happen.
    #[serde(default)]
    plan: bool,
}

/// Carries a change out, or says what it would do.
async fn change(app: App, name: String, change: NicChange, plan: bool, done: StatusCode) -> Answer<Response> {
    if plan {
        return Ok(Out(app.core.plan_nic(&name, &change).await?).into_response());
    }
    let core = Arc::clone(&app.core);
    match to_the_end(async move { core.change_nic(&name, change).await }).await? {
        NicChanged::Nic(view) => Ok((done, Out(view)).into_response()),
        NicChanged::Removed(removed) => Ok((done, Out(removed)).into_response()),
    }
}

/// The nics of a machine.
#[utoipa::path(get, path = "/v1/machines/{name}/nics", tag = "nics", params(("name" = String, Path)),
    responses((status = 200, body = NicList), (status = 403, body = ErrorBody), (status = 404, body = ErrorBody)))]
pub async fn list(State(app): State<App>, Name(name): Name) -> Answer<Out<NicList>> {
    Ok(Out(app.core.nics(&name).await?))
}

/// Adds a nic: plugged in at once and configured by the guest agent if the machine runs, otherwise at its next start.
#[utoipa::path(post, path = "/v1/machines/{name}/nics", tag = "nics", params(("name" = String, Path), Plan), request_body = NicAddRequest,
    responses((status = 201, body = NicView), (status = 200, description = "With plan=true", body = PlanView),
        (status = 400, body = ErrorBody), (status = 403, body = ErrorBody), (status = 404, body = ErrorBody),
        (status = 409, body = ErrorBody), (status = 422, body = ErrorBody)))]
pub async fn add(
    State(app): State<App>,
    Name(name): Name,
    Query(query): Query<Plan>,
    Json(request): Json<NicAddRequest>,
) -> Answer<Response> {
    change(app, name, NicChange::Add(request), query.plan, StatusCode::CREATED).await
}

/// Gives a nic another rate, at once. That of `net0` is part of the machine's shape.
#[utoipa::path(patch, path = "/v1/machines/{name}/nics/{nic}", tag = "nics",
    params(("name" = String, Path), ("nic" = String, Path), Plan), request_body = NicLimitRequest,
    responses((status = 200, description = "With plan=true a PlanView", body = NicView),
        (status = 400, body = ErrorBody), (status = 403, body = ErrorBody), (status = 404, body = ErrorBody),
        (status = 409, body = ErrorBody)))]
pub async fn limit(
    State(app): State<App>,
    NicName(name, nic): NicName,
    Query(query): Query<Plan>,
    Json(request): Json<NicLimitRequest>,
) -> Answer<Response> {
    let limit = NicChange::Limit { nic, bit_per_sec: request.bit_per_sec };
    change(app, name, limit, query.plan, StatusCode::OK).await
}

/// Removes a nic; answers when a running guest has let it go, or with 409 when it has not and the nic stays.
#[utoipa::path(delete, path = "/v1/machines/{name}/nics/{nic}", tag = "nics",
    params(("name" = String, Path), ("nic" = String, Path), Unplugging),
    responses((status = 200, description = "With plan=true a PlanView", body = Removed),
        (status = 400, body = ErrorBody), (status = 403, body = ErrorBody), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub async fn remove(
    State(app): State<App>,
    NicName(name, nic): NicName,
    Query(query): Query<Unplugging>,
) -> Answer<Response> {
    let Unplugging { timeout_sec, plan } = query;
    change(app, name, NicChange::Remove { nic, timeout_sec }, plan, StatusCode::OK).await
}
