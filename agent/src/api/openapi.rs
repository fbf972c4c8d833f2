//! The OpenAPI 3.1 document, generated from the routes and the wire types; `agent/openapi.json` is its copy in the tree.

use utoipa::OpenApi;

use super::routes::{by_hand, cluster, disks, files, host, machines, nics, streams};

/// What the document says of itself.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "Lathe agent",
        description = "The API of lathed on its Unix socket. Amounts are integers: milliCPU, bytes, bit/s, I/O operations per second."
    ),
    paths(
        host::version,
        host::host,
        host::uplink,
        host::enable_uplink,
        host::disable_uplink,
        host::doctor,
        host::openapi,
        host::metrics,
        machines::list,
        machines::show,
        machines::run,
        machines::resize,
        machines::forecast,
        machines::set_foresight,
        machines::why,
        by_hand::set_blueprint,
        by_hand::unset_blueprint,
        by_hand::announce,
        by_hand::withdraw,
        machines::operations,
        machines::operation,
        machines::cancel,
        machines::stop,
        machines::start,
        machines::pause,
        machines::resume,
        machines::remove,
        disks::list,
        disks::add,
        disks::grow,
        disks::remove,
        nics::list,
        nics::add,
        nics::limit,
        nics::remove,
        streams::logs,
        streams::exec,
        streams::console,
        streams::events,
        files::list_images,
        files::import_image,
        files::remove_image,
        files::upload,
        files::discard_upload,
        cluster::peers,
        cluster::init,
        cluster::token,
        cluster::join,
    )
)]
struct Document;

/// The document.
pub fn json() -> String {
    let mut text = Document::openapi().to_pretty_json().unwrap_or_default();
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `LATHE_BLESS=1 cargo test -p lathe-agent openapi` writes the copy anew.
    #[test]
    fn the_copy_in_the_tree_is_what_the_code_says() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/openapi.json");
        if std::env::var_os("LATHE_BLESS").is_some() {
            std::fs::write(path, json()).unwrap();
        }
        assert!(std::fs::read_to_string(path).unwrap() == json(), "agent/openapi.json is out of date");
    }

    #[test]
    fn every_route_is_in_it() {
        let document: serde_json::Value = serde_json::from_str(&json()).unwrap();
        assert_eq!(document["openapi"], "3.1.0");
        let routes = include_str!("routes/mod.rs");
        let paths: Vec<_> =
            routes.split(".route(\"").skip(1).filter_map(|rest| rest.split('"').next()).collect();
        assert!(paths.len() > 20, "the routes are written otherwise");
        for path in paths {
            assert!(document["paths"].get(path).is_some(), "{path} is not in the document");
        }
    }
}
