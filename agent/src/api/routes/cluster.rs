//! Peers, and how to become one.

use std::sync::Arc;

use axum::Json as Out;
use axum::extract::State;

use super::to_the_end;
use crate::api::App;
use crate::api::answer::{Answer, Json};
use crate::api::wire::{ClusterInit, ClusterView, ErrorBody, JoinRequest, PeerList, TokenRequest, TokenView};
use crate::problem::{Kind, Problem};

/// How long a token may be good for, in seconds.
const TOKEN_SEC: std::ops::RangeInclusive<u64> = 60..=604_800;
/// Longest token in bytes.
const MAX_TOKEN_BYTES: usize = 4096;

fn bad(message: String) -> Problem {
    Problem::new(Kind::BadRequest, "bad-value", message)
}

/// All peers, this host first.
#[utoipa::path(get, path = "/v1/peers", tag = "cluster", responses((status = 200, body = PeerList), (status = 403, body = ErrorBody)))]
pub async fn peers(State(app): State<App>) -> Answer<Out<PeerList>> {
    Ok(Out(app.cluster.peers().await?))
}

/// Makes a cluster of this host alone.
#[utoipa::path(post, path = "/v1/cluster/init", tag = "cluster", request_body = ClusterInit,
    responses((status = 200, body = ClusterView), (status = 403, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub async fn init(State(app): State<App>, Json(request): Json<ClusterInit>) -> Answer<Out<ClusterView>> {
    let cluster = Arc::clone(&app.cluster);
    Ok(Out(to_the_end(async move { cluster.init(request).await }).await?))
}

/// A token with which one more host can join; a secret.
#[utoipa::path(post, path = "/v1/cluster/token", tag = "cluster", request_body = TokenRequest,
    responses((status = 200, body = TokenView), (status = 403, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub async fn token(State(app): State<App>, Json(request): Json<TokenRequest>) -> Answer<Out<TokenView>> {
    if !TOKEN_SEC.contains(&request.ttl_sec) {
        let (least, most) = TOKEN_SEC.into_inner();
        return Err(
            bad(format!("ttl_sec: {} s is not between {least} s and {most} s", request.ttl_sec)).into()
        );
    }
    Ok(Out(app.cluster.token(request.ttl_sec).await?))
}

/// Joins the cluster that made the token.
#[utoipa::path(post, path = "/v1/cluster/join", tag = "cluster", request_body = JoinRequest,
    responses((status = 200, body = ClusterView), (status = 403, body = ErrorBody), (status = 409, body = ErrorBody), (status = 503, body = ErrorBody)))]
pub async fn join(State(app): State<App>, Json(request): Json<JoinRequest>) -> Answer<Out<ClusterView>> {
    if request.token.len() > MAX_TOKEN_BYTES {
        return Err(bad(format!("token: {} bytes, more than {MAX_TOKEN_BYTES}", request.token.len())).into());
    }
    let cluster = Arc::clone(&app.cluster);
    Ok(Out(to_the_end(async move { cluster.join(request).await }).await?))
}
