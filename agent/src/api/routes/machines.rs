//! Machines: made, looked at, reshaped, stopped, removed.

use std::sync::Arc;

use axum::Json as Out;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use utoipa::IntoParams;

use super::to_the_end;
use crate::api::App;
use crate::api::answer::{Answer, Json, Name, OperationId, Query, check_name, if_match};
use crate::api::wire::forecast::ForecastView;
use crate::api::wire::foresight::{ForesightRequest, WhyView};
use crate::api::wire::{
    ErrorBody, MachineList, MachineView, OperationList, OperationView, PlanView, Removed, ResizeOutcome,
    ResizeRequest, ResizeView, RunRequest, SCHEMA, StopRequest,
};
use crate::problem::{Kind, Problem};

/// Longest time that a guest may be given to power off, in seconds.
const MAX_STOP_SEC: u32 = 3600;

/// `?plan=true`.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct Plan {
    /// Only say what would happen.
    #[serde(default)]
    pub(super) plan: bool,
}

/// `?purge=…&force=…`.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct Removal {
    /// Delete its disks too.
    #[serde(default)]
    purge: bool,
    /// Also while it runs: the power is cut.
    #[serde(default)]
    force: bool,
}

/// A machine with its revision as `ETag`.
fn tagged(status: StatusCode, view: MachineView) -> Response {
    let mut response = (status, Out(&view)).into_response();
    if let Ok(tag) = HeaderValue::from_str(&format!("\"{}\"", view.revision)) {
        response.headers_mut().insert(header::ETAG, tag);
    }
    response
}

/// All machines.
#[utoipa::path(get, path = "/v1/machines", tag = "machines", responses((status = 200, body = MachineList), (status = 403, body = ErrorBody)))]
pub async fn list(State(app): State<App>) -> Out<MachineList> {
    Out(MachineList { schema: SCHEMA, machines: app.core.list().await })
}

/// One machine.
#[utoipa::path(get, path = "/v1/machines/{name}", tag = "machines", params(("name" = String, Path)),
    responses((status = 200, body = MachineView, headers(("ETag" = String, description = "The revision"))), (status = 404, body = ErrorBody)))]
pub async fn show(State(app): State<App>, Name(name): Name) -> Answer<Response> {
    Ok(tagged(StatusCode::OK, app.core.show(&name).await?))
}

/// Makes a machine and starts it; answers when it runs.
#[utoipa::path(post, path = "/v1/machines", tag = "machines", params(Plan), request_body = RunRequest,
    responses((status = 201, body = MachineView), (status = 200, description = "With plan=true", body = PlanView),
        (status = 400, body = ErrorBody), (status = 403, body = ErrorBody), (status = 409, body = ErrorBody), (status = 422, body = ErrorBody)))]
pub async fn run(
    State(app): State<App>,
    Query(query): Query<Plan>,
    Json(request): Json<RunRequest>,
) -> Answer<Response> {
    check_name(&request.name)?;
    if query.plan {
        return Ok(Out(app.core.plan_run(&request).await?).into_response());
    }
    let core = Arc::clone(&app.core);
    let view = to_the_end(async move { core.run(request).await }).await?;
    Ok(tagged(StatusCode::CREATED, view))
}

/// Changes a machine's shape while it runs.
#[utoipa::path(patch, path = "/v1/machines/{name}", tag = "machines",
    params(("name" = String, Path), Plan, ("If-Match" = Option<String>, Header, description = "Only if this is still the revision")),
    request_body = ResizeRequest,
    responses((status = 200, description = "All of it is in force; with plan=true a PlanView", body = ResizeView),
        (status = 202, description = "Some of it is in force, the rest is worked on", body = ResizeView),
        (status = 400, body = ErrorBody), (status = 403, body = ErrorBody), (status = 404, body = ErrorBody),
        (status = 409, body = ErrorBody), (status = 422, body = ErrorBody)))]
pub async fn resize(
    State(app): State<App>,
    Name(name): Name,
    Query(query): Query<Plan>,
    headers: HeaderMap,
    Json(request): Json<ResizeRequest>,
) -> Answer<Response> {
    let revision = if_match(&headers)?;
    if query.plan {
        return Ok(Out(app.core.plan_resize(&name, &request, revision).await?).into_response());
    }
    let core = Arc::clone(&app.core);
    let view = to_the_end(async move { core.resize(&name, request, revision).await }).await?;
    let goes_on = matches!(view.outcome, ResizeOutcome::Partial | ResizeOutcome::UnderWay);
    let status = if goes_on { StatusCode::ACCEPTED } else { StatusCode::OK };
    Ok((status, Out(view)).into_response())
}

/// What a machine asked for over time, and what it is likely to ask for next.
#[utoipa::path(get, path = "/v1/machines/{name}/forecast", tag = "machines", params(("name" = String, Path)),
    responses((status = 200, body = ForecastView), (status = 403, body = ErrorBody), (status = 404, body = ErrorBody),
        (status = 409, description = "Foresight is off", body = ErrorBody)))]
pub async fn forecast(State(app): State<App>, Name(name): Name) -> Answer<Out<ForecastView>> {
    Ok(Out(app.core.forecast(&name).await?))
}

/// Changes what a machine has of its own about its future: whether it is resized for it, and how close to what it asks for.
#[utoipa::path(patch, path = "/v1/machines/{name}/foresight", tag = "machines", params(("name" = String, Path)), request_body = ForesightRequest,
    responses((status = 200, body = MachineView), (status = 400, body = ErrorBody), (status = 403, body = ErrorBody), (status = 404, body = ErrorBody)))]
pub async fn set_foresight(
    State(app): State<App>,
    Name(name): Name,
    Json(request): Json<ForesightRequest>,
) -> Answer<Response> {
    let core = Arc::clone(&app.core);
    let view = to_the_end(async move { core.set_foresight(&name, request).await }).await?;
    Ok(tagged(StatusCode::OK, view))
}

/// The last decisions about a machine's shape with the numbers behind them, and how good its forecasts were.
#[utoipa::path(get, path = "/v1/machines/{name}/why", tag = "machines", params(("name" = String, Path)),
    responses((status = 200, body = WhyView), (status = 403, body = ErrorBody), (status = 404, body = ErrorBody)))]
pub async fn why(State(app): State<App>, Name(name): Name) -> Answer<Out<WhyView>> {
    Ok(Out(app.core.why(&name).await?))
}

/// The changes of a machine's shape that are remembered, the newest last.
#[utoipa::path(get, path = "/v1/machines/{name}/operations", tag = "machines", params(("name" = String, Path)),
    responses((status = 200, body = OperationList), (status = 403, body = ErrorBody), (status = 404, body = ErrorBody)))]
pub async fn operations(State(app): State<App>, Name(name): Name) -> Answer<Out<OperationList>> {
    Ok(Out(app.core.operations(&name).await?))
}

/// One change of a machine's shape, under way or over.
#[utoipa::path(get, path = "/v1/operations/{id}", tag = "machines", params(("id" = String, Path)),
    responses((status = 200, body = OperationView), (status = 403, body = ErrorBody), (status = 404, body = ErrorBody)))]
pub async fn operation(State(app): State<App>, OperationId(id): OperationId) -> Answer<Out<OperationView>> {
    Ok(Out(app.core.operation(&id).await?))
}

/// Ends a change of a machine's shape as if it had not been asked for; answers when what was before is on its way back.
#[utoipa::path(delete, path = "/v1/operations/{id}", tag = "machines", params(("id" = String, Path)),
    responses((status = 200, body = OperationView), (status = 403, body = ErrorBody), (status = 404, body = ErrorBody),
        (status = 409, body = ErrorBody), (status = 422, body = ErrorBody)))]
pub async fn cancel(State(app): State<App>, OperationId(id): OperationId) -> Answer<Out<OperationView>> {
    let core = Arc::clone(&app.core);
    Ok(Out(to_the_end(async move { core.cancel(&id).await }).await?))
}

/// Powers a machine off.
#[utoipa::path(post, path = "/v1/machines/{name}/stop", tag = "machines", params(("name" = String, Path)), request_body = StopRequest,
    responses((status = 200, body = MachineView), (status = 403, body = ErrorBody), (status = 404, body = ErrorBody)))]
pub async fn stop(
    State(app): State<App>,
    Name(name): Name,
    Json(request): Json<StopRequest>,
) -> Answer<Response> {
    if request.timeout_sec > MAX_STOP_SEC {
        let message = format!("timeout_sec: {} s is more than {MAX_STOP_SEC} s", request.timeout_sec);
        return Err(Problem::new(Kind::BadRequest, "bad-value", message).into());
    }
    let core = Arc::clone(&app.core);
    let view = to_the_end(async move { core.stop(&name, request).await }).await?;
    Ok(tagged(StatusCode::OK, view))
}

/// Starts a stopped machine.
#[utoipa::path(post, path = "/v1/machines/{name}/start", tag = "machines", params(("name" = String, Path)),
    responses((status = 200, body = MachineView), (status = 403, body = ErrorBody), (status = 404, body = ErrorBody), (status = 422, body = ErrorBody)))]
pub async fn start(State(app): State<App>, Name(name): Name) -> Answer<Response> {
    let core = Arc::clone(&app.core);
    let view = to_the_end(async move { core.start(&name).await }).await?;
    Ok(tagged(StatusCode::OK, view))
}

/// Stops a machine's vCPUs between two instructions. It keeps its memory and everything else of its shape.
#[utoipa::path(post, path = "/v1/machines/{name}/pause", tag = "machines", params(("name" = String, Path)),
    responses((status = 200, body = MachineView), (status = 403, body = ErrorBody), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub async fn pause(State(app): State<App>, Name(name): Name) -> Answer<Response> {
    let core = Arc::clone(&app.core);
    let view = to_the_end(async move { core.pause(&name).await }).await?;
    Ok(tagged(StatusCode::OK, view))
}

/// Lets a paused machine go on.
#[utoipa::path(post, path = "/v1/machines/{name}/resume", tag = "machines", params(("name" = String, Path)),
    responses((status = 200, body = MachineView), (status = 403, body = ErrorBody), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub async fn resume(State(app): State<App>, Name(name): Name) -> Answer<Response> {
    let core = Arc::clone(&app.core);
    let view = to_the_end(async move { core.resume(&name).await }).await?;
    Ok(tagged(StatusCode::OK, view))
}

/// Removes a machine.
#[utoipa::path(delete, path = "/v1/machines/{name}", tag = "machines", params(("name" = String, Path), Removal),
    responses((status = 200, body = Removed), (status = 403, body = ErrorBody), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub async fn remove(
    State(app): State<App>,
    Name(name): Name,
    Query(query): Query<Removal>,
) -> Answer<Out<Removed>> {
    let core = Arc::clone(&app.core);
    Ok(Out(to_the_end(async move { core.remove(&name, query.purge, query.force).await }).await?))
}
