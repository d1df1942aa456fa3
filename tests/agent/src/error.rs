// SPDX-License-Identifier: Apache-2.0

use std::fmt;

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A reason, printed on one line.
#[derive(Debug, PartialEq, Eq)]
pub struct Error(String);

impl Error {
    pub fn new(reason: impl Into<String>) -> Self {
        Self(reason.into())
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Adds to the error of an operation what was being done.
pub trait Context<T> {
    fn context(self, doing: impl fmt::Display) -> Result<T>;
}

impl<T, E: fmt::Display> Context<T> for Result<T, E> {
    fn context(self, doing: impl fmt::Display) -> Result<T> {
        self.map_err(|cause| Error(format!("{doing}: {cause}")))
    }
}
