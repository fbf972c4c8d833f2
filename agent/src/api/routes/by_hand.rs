//! What people say of the future of a machine: a blueprint by hand, and events.

use std::sync::Arc;

use axum::Json as Out;
use axum::extract::State;

use super::to_the_end;
use crate::api::App;
use crate::api::answer::{Answer, EventName, Json, Name};
use crate::api::wire::ErrorBody;
use crate::api::wire::by_hand::{AnnounceRequest, BlueprintRequest, ByHandView};

/// Says by hand what a machine will ask for, in place of what was said before.
#[utoipa::path(put, path = "/v1/machines/{name}/forecast/blueprint", tag = "machines", params(("name" = String, Path)),
    request_body = BlueprintRequest,
    responses((status = 200, body = ByHandView), (status = 400, body = ErrorBody), (status = 403, body = ErrorBody),
        (status = 404, body = ErrorBody), (status = 409, description = "Foresight is off", body = ErrorBody)))]
pub async fn set_blueprint(
    State(app): State<App>,
    Name(name): Name,
    Json(request): Json<BlueprintRequest>,
) -> Answer<Out<ByHandView>> {
    let core = Arc::clone(&app.core);
    Ok(Out(to_the_end(async move { core.set_blueprint(&name, request).await }).await?))
}

/// Takes back what was said by hand; what is measured counts again.
#[utoipa::path(delete, path = "/v1/machines/{name}/forecast/blueprint", tag = "machines", params(("name" = String, Path)),
    responses((status = 200, body = ByHandView), (status = 403, body = ErrorBody), (status = 404, body = ErrorBody),
        (status = 409, description = "Foresight is off", body = ErrorBody)))]
pub async fn unset_blueprint(State(app): State<App>, Name(name): Name) -> Answer<Out<ByHandView>> {
    let core = Arc::clone(&app.core);
    Ok(Out(to_the_end(async move { core.unset_blueprint(&name).await }).await?))
}

/// Announces an event, in place of one of the same name.
#[utoipa::path(put, path = "/v1/machines/{name}/forecast/events/{event}", tag = "machines",
    params(("name" = String, Path), ("event" = String, Path, description = "1 to 40 characters, no / \" \\")),
    request_body = AnnounceRequest,
    responses((status = 200, body = ByHandView), (status = 400, body = ErrorBody), (status = 403, body = ErrorBody),
        (status = 404, body = ErrorBody), (status = 409, description = "Foresight is off", body = ErrorBody)))]
pub async fn announce(
    State(app): State<App>,
    EventName(name, event): EventName,
    Json(request): Json<AnnounceRequest>,
) -> Answer<Out<ByHandView>> {
    let core = Arc::clone(&app.core);
    Ok(Out(to_the_end(async move { core.announce(&name, event, request).await }).await?))
}

/// Takes an event back.
#[utoipa::path(delete, path = "/v1/machines/{name}/forecast/events/{event}", tag = "machines",
    params(("name" = String, Path), ("event" = String, Path)),
    responses((status = 200, body = ByHandView), (status = 403, body = ErrorBody), (status = 404, body = ErrorBody),
        (status = 409, description = "Foresight is off", body = ErrorBody)))]
pub async fn withdraw(State(app): State<App>, EventName(name, event): EventName) -> Answer<Out<ByHandView>> {
    let core = Arc::clone(&app.core);
    Ok(Out(to_the_end(async move { core.withdraw(&name, &event).await }).await?))
}
