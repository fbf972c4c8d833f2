//! The agent's API: HTTP/1.1 and JSON on a Unix socket.
//!
//! ```text
//! connection ─▶ server (limits, who is it) ─▶ access (may they) ─▶ routes ─▶ core: machines, cluster, images, doctor
//! ```
//!
//! - [`wire`]: what travels; the table of routes stands there
//! - [`server`]: accepts connections, bounds them, learns from the kernel who is at the other end
//! - [`access`]: who may do what
//! - [`answer`]: every error is an [`wire::ErrorBody`], every body is bounded and strict
//! - [`core`]: what the API needs of the rest of lathed, as traits
//! - [`routes`], [`metrics`], [`openapi`]: the answers
//!
//! It keeps no state of its own, decides nothing about machines, and never opens a path that a client names.

pub mod access;
pub mod answer;
pub mod core;
pub mod metrics;
pub mod openapi;
pub mod routes;
pub mod server;
pub mod wire;

use std::sync::Arc;

use axum::Router;
use axum::middleware;

use self::access::Access;
use self::core::{Cluster, Core, Doctor};
use crate::images::{Images, Uploads};

/// Everything that answers need; cheap to clone.
#[derive(Clone)]
pub struct App {
    /// Machines and the host's books.
    pub core: Arc<dyn Core>,
    /// Peers.
    pub cluster: Arc<dyn Cluster>,
    /// What the host has and lacks.
    pub doctor: Arc<dyn Doctor>,
    /// The image store.
    pub images: Arc<Images>,
    /// Files that clients send.
    pub uploads: Arc<Uploads>,
    /// Who may do what.
    pub access: Arc<Access>,
    /// How many streams (exec, console, logs, events) may be open at once.
    pub streams: Arc<tokio::sync::Semaphore>,
}

/// Most streams (exec, console, followed logs, events) open at once.
pub const MAX_STREAMS: usize = 128;

/// All routes, with authorisation in front of each.
///
/// A request must carry a [`access::Peer`] among its extensions, as [`server::serve`] puts it there; without one it is refused.
pub fn router(app: App) -> Router {
    routes::all()
        .fallback(answer::no_such_route)
        .method_not_allowed_fallback(answer::method_not_allowed)
        .layer(middleware::from_fn_with_state(app.clone(), access::authorise))
        .with_state(app)
}

#[cfg(test)]
pub(crate) mod tests;
