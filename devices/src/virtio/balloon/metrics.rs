//! The counters of a balloon.

use bantam_metrics::Counter;
use serde::Serialize;

/// The work of a balloon.
#[derive(Debug, Default, Serialize)]
pub struct BalloonMetrics {
    /// Requests to inflate.
    pub inflate_count: Counter,
    /// Requests to deflate.
    pub deflate_count: Counter,
    /// Times that the driver gave statistics.
    pub stats_updates_count: Counter,
    /// Statistics with an incomplete entry.
    pub stats_update_fails: Counter,
    /// Times that the driver broke the rules, or that the host could not take back memory in the balloon.
    pub event_fails: Counter,
    /// Reports of free pages.
    pub free_page_report_count: Counter,
    /// Bytes that were given back to the host because they were reported free.
    pub free_page_report_freed: Counter,
    /// Reported ranges that the host did not take back.
    pub free_page_report_fails: Counter,
    /// Hints of free pages.
    pub free_page_hint_count: Counter,
    /// Bytes that were given back to the host because of hints.
    pub free_page_hint_freed: Counter,
    /// Hinted ranges that the host did not take back.
    pub free_page_hint_fails: Counter,
    /// Failed activations.
    pub activate_fails: Counter,
}
