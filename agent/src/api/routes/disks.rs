//! Disks of machines: listed, added, grown, removed.

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
use crate::api::answer::{Answer, DiskName, Json, Name, Query};
use crate::api::wire::{DiskAddRequest, DiskGrowRequest, DiskList, DiskView, ErrorBody, PlanView, Removed};
use crate::machines::{DiskChange, DiskChanged};

/// `?purge=…&timeout_sec=…&plan=…`.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct Removal {
    /// Delete its data too; otherwise a private disk is kept aside.
    #[serde(default)]
    purge: bool,
    /// Seconds that a running guest has to let it go, 1..=3600; 30 unless given.
    timeout_sec: Option<u32>,
    /// Only say what would happen.
    #[serde(default)]
    plan: bool,
}

/// Carries a change out, or says what it would do.
async fn change(
    app: App,
    name: String,
    change: DiskChange,
    plan: bool,
    done: StatusCode,
) -> Answer<Response> {
    if plan {
        return Ok(Out(app.core.plan_disk(&name, &change).await?).into_response());
    }
    let core = Arc::clone(&app.core);
    match to_the_end(async move { core.change_disk(&name, change).await }).await? {
        DiskChanged::Disk(view) => Ok((done, Out(view)).into_response()),
        DiskChanged::Removed(removed) => Ok((done, Out(removed)).into_response()),
    }
}

/// The disks of a machine.
#[utoipa::path(get, path = "/v1/machines/{name}/disks", tag = "disks", params(("name" = String, Path)),
    responses((status = 200, body = DiskList), (status = 403, body = ErrorBody), (status = 404, body = ErrorBody)))]
pub async fn list(State(app): State<App>, Name(name): Name) -> Answer<Out<DiskList>> {
    Ok(Out(app.core.disks(&name).await?))
}

/// Adds a disk: plugged in at once if the machine runs, otherwise at its next start.
#[utoipa::path(post, path = "/v1/machines/{name}/disks", tag = "disks", params(("name" = String, Path), Plan), request_body = DiskAddRequest,
    responses((status = 201, body = DiskView), (status = 200, description = "With plan=true", body = PlanView),
        (status = 400, body = ErrorBody), (status = 403, body = ErrorBody), (status = 404, body = ErrorBody),
        (status = 409, body = ErrorBody), (status = 422, body = ErrorBody)))]
pub async fn add(
    State(app): State<App>,
    Name(name): Name,
    Query(query): Query<Plan>,
    Json(request): Json<DiskAddRequest>,
) -> Answer<Response> {
    change(app, name, DiskChange::Add(request), query.plan, StatusCode::CREATED).await
}

/// Grows a disk, which a running guest sees at once. Disks never shrink.
#[utoipa::path(patch, path = "/v1/machines/{name}/disks/{disk}", tag = "disks",
    params(("name" = String, Path), ("disk" = String, Path), Plan), request_body = DiskGrowRequest,
    responses((status = 200, description = "With plan=true a PlanView", body = DiskView),
        (status = 400, body = ErrorBody), (status = 403, body = ErrorBody), (status = 404, body = ErrorBody),
        (status = 409, body = ErrorBody), (status = 422, body = ErrorBody)))]
pub async fn grow(
    State(app): State<App>,
    DiskName(name, disk): DiskName,
    Query(query): Query<Plan>,
    Json(request): Json<DiskGrowRequest>,
) -> Answer<Response> {
    let grow = DiskChange::Grow { disk, size_bytes: request.size_bytes };
    change(app, name, grow, query.plan, StatusCode::OK).await
}

/// Removes a disk; answers when a running guest has let it go, or with 409 when it has not and the disk stays.
#[utoipa::path(delete, path = "/v1/machines/{name}/disks/{disk}", tag = "disks",
    params(("name" = String, Path), ("disk" = String, Path), Removal),
    responses((status = 200, description = "With plan=true a PlanView", body = Removed),
        (status = 400, body = ErrorBody), (status = 403, body = ErrorBody), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub async fn remove(
    State(app): State<App>,
    DiskName(name, disk): DiskName,
    Query(query): Query<Removal>,
) -> Answer<Response> {
    let Removal { purge, timeout_sec, plan } = query;
    change(app, name, DiskChange::Remove { disk, purge, timeout_sec }, plan, StatusCode::OK).await
}
