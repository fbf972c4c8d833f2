//! What goes wrong, as people and programs need it: one type from where it happens to the terminal.
//!
//! A [`Problem`] is made where the facts are known, with numbers and units, and travels unchanged: the API turns its
//! [`Kind`] into a status code, the command into an exit code.

use std::fmt;

use crate::api::wire::ErrorView;

/// What class of problem it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The request makes no sense (400).
    BadRequest,
    /// Whoever asked may not (403).
    NotPermitted,
    /// No such thing (404).
    NotFound,
    /// Something stands in the way: name taken, revision, in use, wrong state (409).
    Conflict,
    /// More than there is, or not possible for this guest (422).
    Impossible,
    /// Our fault, or the host's (500).
    Internal,
    /// Not now (503).
    Unavailable,
}

impl Kind {
    /// The HTTP status code.
    pub fn status(self) -> u16 {
        match self {
            Self::BadRequest => 400,
            Self::NotPermitted => 403,
            Self::NotFound => 404,
            Self::Conflict => 409,
            Self::Impossible => 422,
            Self::Internal => 500,
            Self::Unavailable => 503,
        }
    }
}

/// One problem; nothing was changed unless `detail` says so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Its class.
    pub kind: Kind,
    /// Stable, kebab-case; listed in `man lathe-errors`.
    pub code: &'static str,
    /// What, with both numbers and their units.
    pub message: String,
    /// Why or where; may be empty.
    pub detail: String,
    /// A command that can be pasted; may be empty.
    pub fix: String,
}

impl Problem {
    /// A problem without detail and fix.
    pub fn new(kind: Kind, code: &'static str, message: impl Into<String>) -> Self {
        Self { kind, code, message: message.into(), detail: String::new(), fix: String::new() }
    }

    /// Something inside or below lathed failed: `what` in words, then what the cause says.
    pub fn internal(what: impl fmt::Display, cause: impl fmt::Display) -> Self {
        Self::new(Kind::Internal, "internal", format!("{what}: {cause}"))
    }

    /// Adds why or where.
    #[must_use]
    pub fn detail(mut self, detail: impl Into<String>) -> Self {
        self.detail = detail.into();
        self
    }

    /// Adds a command that helps.
    #[must_use]
    pub fn fix(mut self, fix: impl Into<String>) -> Self {
        self.fix = fix.into();
        self
    }

    /// As it travels.
    pub fn view(&self) -> ErrorView {
        ErrorView {
            code: self.code.to_owned(),
            message: self.message.clone(),
            detail: self.detail.clone(),
            fix: self.fix.clone(),
            docs: "man lathe-errors".to_owned(),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}: {}", self.code, self.message)?;
        if self.detail.is_empty() { Ok(()) } else { write!(formatter, " ({})", self.detail) }
    }
}

impl std::error::Error for Problem {}
