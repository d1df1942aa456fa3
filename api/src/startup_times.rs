//! The time that the process took to start.

use serde::Serialize;

/// The time that the process took to start, for the metrics. A time that is not known is 0.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct StartupTimes {
    /// Time from the start of the process, in microseconds.
    #[serde(rename = "process_startup_time_us")]
    pub wall_us: u64,
    /// CPU time that the process and its parent have used for it, in microseconds.
    #[serde(rename = "process_startup_time_cpu_us")]
    pub cpu_us: u64,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn times_are_named_as_others_name_them() {
        let times = StartupTimes {
            wall_us: 3,
            cpu_us: 7,
        };
        let expected = json!({"process_startup_time_us": 3, "process_startup_time_cpu_us": 7});
        assert_eq!(serde_json::to_value(times).unwrap(), expected);
    }
}
