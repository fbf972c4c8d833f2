//! Bodies in, errors out: JSON that is bounded and strict, and one shape for everything that goes wrong.

use std::time::Duration;

use axum::body::Body;
use axum::extract::{FromRequest, FromRequestParts, Path, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::de::DeserializeOwned;

use super::wire::ErrorBody;
use crate::nearest::{quoted, unknown_field};
use crate::problem::{Kind, Problem};

/// Longest JSON body in bytes.
pub const MAX_JSON_BYTES: usize = 64 * 1024;
/// How long a JSON body may take to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest name of a machine: its monitor's user is `vm-NAME`, and systemd allows users 31 bytes.
pub const MAX_NAME_BYTES: usize = 28;
/// Longest name of an image.
pub const MAX_IMAGE_NAME_BYTES: usize = 64;

/// A problem on its way to the client.
#[derive(Debug)]
pub struct ApiError(pub Problem);

impl From<Problem> for ApiError {
    fn from(problem: Problem) -> Self {
        Self(problem)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        if self.0.kind == Kind::Internal {
            tracing::error!(LATHE_ERROR_CODE = self.0.code, "{}", self.0);
        }
        let status = match self.0.code {
            "method-not-allowed" => StatusCode::METHOD_NOT_ALLOWED,
            "body-too-large" => StatusCode::PAYLOAD_TOO_LARGE,
            _ => StatusCode::from_u16(self.0.kind.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR),
        };
        (status, axum::Json(ErrorBody { error: self.0.view() })).into_response()
    }
}

/// What a handler answers.
pub type Answer<T> = Result<T, ApiError>;

fn bad(code: &'static str, message: impl Into<String>) -> Problem {
    Problem::new(Kind::BadRequest, code, message)
}

/// For a path that leads nowhere.
pub async fn no_such_route(method: Method, uri: Uri) -> ApiError {
    let message = format!("there is no {method} {} here", quoted(uri.path()));
    Problem::new(Kind::NotFound, "no-such-route", message)
        .fix("curl --unix-socket /run/lathe/lathe.sock http://l/v1/openapi.json")
        .into()
}

/// For a path that knows other methods.
pub async fn method_not_allowed(method: Method, uri: Uri) -> ApiError {
    bad("method-not-allowed", format!("{} knows no {method}", quoted(uri.path()))).into()
}

/// A JSON body: at most [`MAX_JSON_BYTES`], without unknown fields.
#[derive(Debug)]
pub struct Json<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Json<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        let kind = request
            .headers()
            .get(header::CONTENT_TYPE)
            .and_then(|kind| kind.to_str().ok())
            .unwrap_or("application/json");
        if kind.split(';').next().map(str::trim) != Some("application/json") {
            return Err(bad("bad-json", format!("the body is {}, not application/json", quoted(kind)))
                .fix("curl -H 'content-type: application/json' …")
                .into());
        }
        let bytes = read_bounded(request.into_body(), MAX_JSON_BYTES).await?;
        parse_json(&bytes).map(Self).map_err(ApiError)
    }
}

/// Reads a whole body of at most `limit` bytes.
async fn read_bounded(body: Body, limit: usize) -> Result<axum::body::Bytes, Problem> {
    let read = tokio::time::timeout(BODY_TIMEOUT, Limited::new(body, limit).collect()).await;
    let slow =
        || bad("body-too-slow", format!("the body did not arrive within {} s", BODY_TIMEOUT.as_secs()));
    let collected =
        read.map_err(|_| slow())?.map_err(|error| match error.downcast_ref::<LengthLimitError>() {
            Some(_) => bad("body-too-large", format!("the body is longer than {limit} bytes")),
            None => bad("body-broken", format!("the body broke off: {error}")),
        })?;
    Ok(collected.to_bytes())
}

/// Reads JSON, and says where it is wrong.
fn parse_json<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Problem> {
    let mut reader = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut reader).map_err(|error| {
        let path = error.path().to_string();
        let inner = error.inner();
        let message = inner.to_string();
        match unknown_field(&message) {
            Some(unknown) if message.starts_with("unknown field") => {
                bad("unknown-field", unknown.sentence("field"))
            }
            _ if inner.is_data() && path != "." => {
                bad("bad-value", format!("{path}: {}", without_position(&message)))
            }
            _ if inner.is_data() => bad("bad-value", without_position(&message)),
            _ => bad("bad-json", format!("the body is not JSON: {message}")),
        }
    })?;
    reader.end().map_err(|error| bad("bad-json", format!("the body is not JSON: {error}")))?;
    Ok(value)
}

/// serde_json's sentence without its line and column, with our quotes.
fn without_position(message: &str) -> String {
    let end = message.rfind(" at line ").unwrap_or(message.len());
    message[..end].replace('`', "\"")
}

/// Query parameters, without unknown ones.
#[derive(Debug)]
pub struct Query<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Query<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        let parsed = axum::extract::Query::<T>::try_from_uri(&parts.uri);
        let axum::extract::Query(value) = parsed.map_err(|rejection| {
            let message = rejection.body_text();
            match unknown_field(&message) {
                Some(unknown) => bad("unknown-field", unknown.sentence("parameter")),
                None => bad(
                    "bad-value",
                    message.replace("Failed to deserialize query string: ", "").replace('`', "\""),
                ),
            }
        })?;
        Ok(Self(value))
    }
}

/// The `{name}` of a machine's path: 1 to 28 of `a-z 0-9 -`, beginning with a letter, not ending with `-`.
#[derive(Debug)]
pub struct Name(pub String);

/// The `{name}` of an image's path: 1 to 64 of `a-z A-Z 0-9 - _ .`, beginning with a letter or digit.
#[derive(Debug)]
pub struct ImageName(pub String);

/// The `{id}` of an operation's path: a machine's name, `-` and a number.
#[derive(Debug)]
pub struct OperationId(pub String);

/// The `{name}` and `{disk}` of a disk's path; whether there is one of that name, its machine knows.
#[derive(Debug)]
pub struct DiskName(pub String, pub String);

/// The `{name}` and `{nic}` of a nic's path; likewise.
#[derive(Debug)]
pub struct NicName(pub String, pub String);

/// The `{name}` and `{event}` of an event's path; likewise.
#[derive(Debug)]
pub struct EventName(pub String, pub String);

async fn path_name<S: Send + Sync>(parts: &mut Parts, state: &S) -> Result<String, Problem> {
    let path = Path::<String>::from_request_parts(parts, state).await;
    path.map(|Path(name)| name).map_err(|rejection| bad("bad-name", rejection.body_text()))
}

/// A machine's name and that of something of it.
async fn path_names<S: Send + Sync>(parts: &mut Parts, state: &S) -> Result<(String, String), Problem> {
    let path = Path::<(String, String)>::from_request_parts(parts, state).await;
    let Path((name, part)) = path.map_err(|rejection| bad("bad-name", rejection.body_text()))?;
    check_name(&name)?;
    Ok((name, part))
}

impl<S: Send + Sync> FromRequestParts<S> for Name {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let name = path_name(parts, state).await?;
        check_name(&name)?;
        Ok(Self(name))
    }
}

impl<S: Send + Sync> FromRequestParts<S> for ImageName {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let name = path_name(parts, state).await?;
        check_image_name(&name)?;
        Ok(Self(name))
    }
}

impl<S: Send + Sync> FromRequestParts<S> for DiskName {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let (name, disk) = path_names(parts, state).await?;
        Ok(Self(name, disk))
    }
}

impl<S: Send + Sync> FromRequestParts<S> for NicName {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let (name, nic) = path_names(parts, state).await?;
        Ok(Self(name, nic))
    }
}

impl<S: Send + Sync> FromRequestParts<S> for EventName {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let (name, event) = path_names(parts, state).await?;
        Ok(Self(name, event))
    }
}

impl<S: Send + Sync> FromRequestParts<S> for OperationId {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let id = path_name(parts, state).await?;
        let (name, number) = id.rsplit_once('-').unwrap_or((&id, ""));
        check_name(name)?;
        if number.parse::<u64>().is_err() {
            return Err(bad("bad-name", format!("{} cannot be an operation's id", quoted(&id))).into());
        }
        Ok(Self(id))
    }
}

/// Checks a machine's name.
///
/// # Errors
/// `bad-name` with the rule.
pub fn check_name(name: &str) -> Result<(), Problem> {
    let known = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    let good = (1..=MAX_NAME_BYTES).contains(&name.len())
        && name.bytes().all(known)
        && name.starts_with(|first: char| first.is_ascii_lowercase())
        && !name.ends_with('-');
    let rule =
        format!("1 to {MAX_NAME_BYTES} of a-z, 0-9 and '-', beginning with a letter, not ending with '-'");
    if good {
        Ok(())
    } else {
        Err(bad("bad-name", format!("{} cannot be a machine's name", quoted(name))).detail(rule))
    }
}

/// Checks an image's name.
///
/// # Errors
/// `bad-name` with the rule.
pub fn check_image_name(name: &str) -> Result<(), Problem> {
    let known = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let good = (1..=MAX_IMAGE_NAME_BYTES).contains(&name.len())
        && name.bytes().all(known)
        && name.starts_with(|first: char| first.is_ascii_alphanumeric());
    let rule = format!(
        "1 to {MAX_IMAGE_NAME_BYTES} of letters, digits, '-', '_' and '.', beginning with a letter or digit"
    );
    if good {
        Ok(())
    } else {
        Err(bad("bad-name", format!("{} cannot be an image's name", quoted(name))).detail(rule))
    }
}

/// The revision in `If-Match`, if there is one: `7` or `"7"`; `*` is any.
///
/// # Errors
/// `bad-value` for anything else.
pub fn if_match(headers: &HeaderMap) -> Result<Option<u64>, Problem> {
    let Some(value) = headers.get(header::IF_MATCH) else { return Ok(None) };
    let text = value.to_str().unwrap_or("?").trim();
    if text == "*" {
        return Ok(None);
    }
    let number = text
        .trim_matches('"')
        .parse()
        .map_err(|_| bad("bad-value", format!("If-Match: {} is no revision", quoted(text))))?;
    Ok(Some(number))
}

#[cfg(test)]
mod tests {
    use super::super::wire::{DiskSource, ResizeRequest, RunRequest, StopRequest};
    use super::*;

    fn problem_of<T: DeserializeOwned + std::fmt::Debug>(text: &str) -> (&'static str, String) {
        let problem = parse_json::<T>(text.as_bytes()).unwrap_err();
        (problem.code, problem.message)
    }

    #[test]
    fn bad_bodies_are_refused_with_the_field_and_the_reason() {
        let cases = [
            (
                r#"{"cpu_mili": 5}"#,
                "unknown-field",
                "unknown field \"cpu_mili\" (did you mean \"cpu_milli\"?)",
            ),
            (r#"{"cpu_milli": -5}"#, "bad-value", "cpu_milli: invalid value: integer \"-5\", expected u64"),
            (
                r#"{"cpu_milli": 0.5}"#,
                "bad-value",
                "cpu_milli: invalid type: floating point \"0.5\", expected u64",
            ),
            (r#"{"cpu_milli": 99999999999999999999}"#, "bad-value", "cpu_milli: "),
            (r#"{"cpu_milli": "5"}"#, "bad-value", "cpu_milli: invalid type: string \"5\", expected u64"),
            (r#"{"cpu_milli": 5"#, "bad-json", "the body is not JSON: "),
            (r#"{"cpu_milli": 5} x"#, "bad-json", "the body is not JSON: "),
            ("", "bad-json", "the body is not JSON: "),
            ("[]", "bad-value", "invalid length 0"),
        ];
        for (text, code, message) in cases {
            let found = problem_of::<ResizeRequest>(text);
            assert_eq!(found.0, code, "{text}: {}", found.1);
            assert!(found.1.replace("\\\"", "\"").starts_with(message), "{text}: {}", found.1);
        }
        assert_eq!(problem_of::<StopRequest>("{\"timeout_sec\": 5}").1, "missing field \"force\"");
    }

    #[test]
    fn nested_values_are_named_by_their_path() {
        let text = r#"{"name":"a","cpu_milli":1,"memory_bytes":2,"net":true,"disks":[{"path":{"path":"/a","readonly":true}}]}"#;
        assert_eq!(
            problem_of::<RunRequest>(text).1,
            "unknown field \"readonly\" (did you mean \"read_only\"?)"
        );
        let text = r#"{"name":"a","cpu_milli":1,"memory_bytes":2,"net":true,"disks":[{"upload":{"id":7}}]}"#;
        assert!(
            problem_of::<RunRequest>(text).1.starts_with("disks[0]"),
            "{:?}",
            problem_of::<RunRequest>(text)
        );
        let text = r#"{"upload":{"id":"7"}}"#;
        assert_eq!(parse_json::<DiskSource>(text.as_bytes()).unwrap(), DiskSource::Upload { id: "7".into() });
    }

    #[test]
    fn deep_nesting_ends_in_an_error() {
        assert_eq!(problem_of::<serde_json::Value>(&"[".repeat(60_000)).0, "bad-json");
    }

    #[test]
    fn names() {
        for good in ["a", "web", "web-1", "a234567890123456789012345678"] {
            assert_eq!(check_name(good), Ok(()), "{good}");
        }
        let long = "a".repeat(29);
        for bad in ["", "1a", "-a", "a-", "A", "a_b", "a.b", "..", "a/b", "a\0", "ä", "a b", long.as_str()] {
            assert_eq!(check_name(bad).unwrap_err().code, "bad-name", "{bad}");
        }
        assert!(check_image_name("12.5_Debian-x").is_ok());
        for bad in ["", "..", ".a", "a/b", "a b", "ä", &"a".repeat(65)] {
            assert_eq!(check_image_name(bad).unwrap_err().code, "bad-name", "{bad}");
        }
    }

    #[test]
    fn revisions_in_if_match() {
        let with = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::IF_MATCH, text.parse().unwrap());
            if_match(&headers)
        };
        assert_eq!(if_match(&HeaderMap::new()), Ok(None));
        assert_eq!(with("7"), Ok(Some(7)));
        assert_eq!(with("\"7\""), Ok(Some(7)));
        assert_eq!(with("*"), Ok(None));
        assert_eq!(with("-7").unwrap_err().code, "bad-value");
        assert_eq!(with("W/\"7\"").unwrap_err().code, "bad-value");
    }
}
