//! The file of metrics.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize, Serializer};

/// Body of `PUT /metrics`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Metrics {
    /// File or named pipe to which metrics are written, one line of JSON at a time.
    #[serde(serialize_with = "serialize_path")]
    pub metrics_path: PathBuf,
}

/// Shows a path, which may not be UTF-8 if it came from the command line.
fn serialize_path<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&path.display())
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    #[test]
    fn a_path_that_is_not_utf_8_can_be_shown() {
        let metrics = Metrics {
            metrics_path: OsStr::from_bytes(b"m\xe9").into(),
        };
        assert_eq!(
            serde_json::to_value(metrics).unwrap(),
            serde_json::json!({"metrics_path": "m\u{fffd}"})
        );
    }
}
