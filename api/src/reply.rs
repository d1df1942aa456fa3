//! Answers to requests that were executed.

use serde::Serialize;
use serde_json::Value;

use crate::fault::Fault;

/// How a request was answered.
#[derive(Debug)]
pub enum Reply {
    /// It was executed, and there is nothing to return.
    Done,
    /// What was asked for.
    Value(Value),
}

impl Reply {
    pub(crate) fn value(value: &impl Serialize) -> Result<Reply, Fault> {
        let value = serde_json::to_value(value).map_err(|error| Fault::Value {
            what: "answer",
            reason: error.to_string(),
        })?;
        Ok(Reply::Value(value))
    }
}
