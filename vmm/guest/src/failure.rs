//! Why a request failed, with the codes of the protocol.

use lathe_guest::protocol::Response;

/// A failed request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    code: &'static str,
    message: String,
}

impl Failure {
    /// The request itself is wrong; nothing was changed.
    pub fn bad_request(message: String) -> Self {
        Self { code: "bad-request", message }
    }

    /// What the request names is not there.
    pub fn not_found(message: String) -> Self {
        Self { code: "not-found", message }
    }

    /// The guest does not allow it.
    pub fn not_permitted(message: String) -> Self {
        Self { code: "not-permitted", message }
    }

    /// It was tried and did not work.
    pub fn failed(message: String) -> Self {
        Self { code: "failed", message }
    }

    /// This guest cannot do it at all.
    pub fn unsupported(message: String) -> Self {
        Self { code: "unsupported", message }
    }

    /// As the host sees it.
    pub fn response(self) -> Response {
        Response::Error { code: self.code.into(), message: self.message }
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.message)
    }
}
