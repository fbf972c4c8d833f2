//! The routes: each a few lines between the wire and the rest of lathed.

#![expect(unused_qualifications, reason = "utoipa's macros write qualified names")]

pub mod by_hand;
pub mod cluster;
pub mod disks;
pub mod files;
pub mod host;
pub mod machines;
pub mod nics;
pub mod streams;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::routing::{delete, get, patch, post, put};

use super::App;
use super::answer::ApiError;
use crate::problem::Problem;

/// The table of [`super::wire`].
pub fn all() -> Router<App> {
    let uploads = Router::new()
        .route("/v1/uploads", put(files::upload))
        .route("/v1/images/{name}", put(files::import_image).delete(files::remove_image))
        .layer(DefaultBodyLimit::disable());
    Router::new()
        .route("/v1/version", get(host::version))
        .route("/v1/host", get(host::host))
        .route("/v1/host/uplink", get(host::uplink).put(host::enable_uplink).delete(host::disable_uplink))
        .route("/v1/machines", get(machines::list).post(machines::run))
        .route("/v1/machines/{name}", get(machines::show).patch(machines::resize).delete(machines::remove))
        .route("/v1/machines/{name}/forecast", get(machines::forecast))
        .route("/v1/machines/{name}/foresight", patch(machines::set_foresight))
        .route("/v1/machines/{name}/why", get(machines::why))
        .route(
            "/v1/machines/{name}/forecast/blueprint",
            put(by_hand::set_blueprint).delete(by_hand::unset_blueprint),
        )
        .route(
            "/v1/machines/{name}/forecast/events/{event}",
            put(by_hand::announce).delete(by_hand::withdraw),
        )
        .route("/v1/machines/{name}/operations", get(machines::operations))
        .route("/v1/operations/{id}", get(machines::operation).delete(machines::cancel))
        .route("/v1/machines/{name}/stop", post(machines::stop))
        .route("/v1/machines/{name}/start", post(machines::start))
        .route("/v1/machines/{name}/pause", post(machines::pause))
        .route("/v1/machines/{name}/resume", post(machines::resume))
        .route("/v1/machines/{name}/disks", get(disks::list).post(disks::add))
        .route("/v1/machines/{name}/disks/{disk}", patch(disks::grow).delete(disks::remove))
        .route("/v1/machines/{name}/nics", get(nics::list).post(nics::add))
        .route("/v1/machines/{name}/nics/{nic}", patch(nics::limit).delete(nics::remove))
        .route("/v1/machines/{name}/logs", get(streams::logs))
        .route("/v1/machines/{name}/exec", post(streams::exec))
        .route("/v1/machines/{name}/console", post(streams::console))
        .route("/v1/uploads/{id}", delete(files::discard_upload))
        .route("/v1/images", get(files::list_images))
        .route("/v1/peers", get(cluster::peers))
        .route("/v1/cluster/init", post(cluster::init))
        .route("/v1/cluster/token", post(cluster::token))
        .route("/v1/cluster/join", post(cluster::join))
        .route("/v1/doctor", get(host::doctor))
        .route("/v1/events", get(streams::events))
        .route("/v1/openapi.json", get(host::openapi))
        .route("/metrics", get(host::metrics))
        .merge(uploads)
}

/// Carries a change to its end even if the client goes away meanwhile: half a change helps nobody.
async fn to_the_end<T: Send + 'static>(
    change: impl Future<Output = Result<T, Problem>> + Send + 'static,
) -> Result<T, ApiError> {
    match tokio::spawn(change).await {
        Ok(result) => result.map_err(ApiError),
        Err(error) => Err(Problem::internal("carrying out a change", error).into()),
    }
}

/// Does what blocks (files, accounts) where it may.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Problem> + Send + 'static,
) -> Result<T, ApiError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result.map_err(ApiError),
        Err(error) => Err(Problem::internal("working on files", error).into()),
    }
}
