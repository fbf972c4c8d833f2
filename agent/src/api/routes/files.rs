//! Images and uploads: bodies that become files.

use std::sync::Arc;

use axum::Json as Out;
use axum::body::Body;
use axum::extract::{Path as UrlPath, State};
use axum::http::{HeaderMap, header};
use serde::Deserialize;
use utoipa::{IntoParams, ToSchema};

use super::blocking;
use crate::api::App;
use crate::api::answer::{Answer, ImageName, Query};
use crate::api::wire::{ErrorBody, ImageList, ImageView, Removed, SCHEMA, Upload};
use crate::images::receive::{Received, receive};
use crate::problem::Problem;

/// What an image is imported from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// A raw disk.
    #[default]
    Raw,
    /// An archive of a root file system.
    Tar,
}

/// `?format=…`.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct Import {
    /// What the body is.
    #[serde(default)]
    #[param(inline)]
    format: Format,
}

/// All images.
#[utoipa::path(get, path = "/v1/images", tag = "images", responses((status = 200, body = ImageList)))]
pub async fn list_images(State(app): State<App>) -> Answer<Out<ImageList>> {
    let images = blocking(move || app.images.list()).await?;
    Ok(Out(ImageList { schema: SCHEMA, images }))
}

/// Receives a body into a file.
async fn received(app: &App, headers: &HeaderMap, body: Body) -> Result<Received, Problem> {
    let announced = headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
    receive(body, app.images.incoming().to_owned(), app.images.reserve_bytes(), announced).await
}

/// Imports an image.
#[utoipa::path(put, path = "/v1/images/{name}", tag = "images", params(("name" = String, Path), Import),
    request_body(content_type = "application/octet-stream", description = "The file"),
    responses((status = 200, body = ImageView), (status = 400, body = ErrorBody), (status = 403, body = ErrorBody),
        (status = 409, body = ErrorBody), (status = 422, body = ErrorBody)))]
pub async fn import_image(
    State(app): State<App>,
    ImageName(name): ImageName,
    Query(query): Query<Import>,
    headers: HeaderMap,
    body: Body,
) -> Answer<Out<ImageView>> {
    app.images.check_free(&name)?;
    let received = received(&app, &headers, body).await?;
    let images = Arc::clone(&app.images);
    let view = blocking(move || match query.format {
        Format::Raw => images.add_raw(&name, &received),
        Format::Tar => images.add_tar(&name, &received),
    });
    Ok(Out(view.await?))
}

/// Removes an image.
#[utoipa::path(delete, path = "/v1/images/{name}", tag = "images", params(("name" = String, Path)),
    responses((status = 200, body = Removed), (status = 403, body = ErrorBody), (status = 404, body = ErrorBody)))]
pub async fn remove_image(State(app): State<App>, ImageName(name): ImageName) -> Answer<Out<Removed>> {
    Ok(Out(blocking(move || app.images.remove(&name)).await?))
}

/// Throws an upload away that no machine was made from.
#[utoipa::path(delete, path = "/v1/uploads/{id}", tag = "images", params(("id" = String, Path)),
    responses((status = 200, body = Removed), (status = 403, body = ErrorBody), (status = 404, body = ErrorBody)))]
pub async fn discard_upload(State(app): State<App>, UrlPath(id): UrlPath<String>) -> Answer<Out<Removed>> {
    let uploads = Arc::clone(&app.uploads);
    let name = id.clone();
    blocking(move || uploads.discard(&id)).await?;
    Ok(Out(Removed { schema: SCHEMA, name, kept: None }))
}

/// Receives a file that a machine is to be made from.
#[utoipa::path(put, path = "/v1/uploads", tag = "images", request_body(content_type = "application/octet-stream", description = "The file"),
    responses((status = 200, body = Upload), (status = 403, body = ErrorBody), (status = 422, body = ErrorBody)))]
pub async fn upload(State(app): State<App>, headers: HeaderMap, body: Body) -> Answer<Out<Upload>> {
    app.uploads.check_room()?;
    let received = received(&app, &headers, body).await?;
    Ok(Out(blocking(move || app.uploads.add(&received)).await?))
}
