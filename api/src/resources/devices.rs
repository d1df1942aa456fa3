//! The devices of the machine.

use std::path::PathBuf;

use serde::{Deserialize, Deserializer, Serialize};

use super::{RateLimiter, TokenBucket};

/// Reads a field that clients may also say nothing of by null.
fn null_as_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// Body of `PUT /drives/{drive_id}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Drive {
    /// The drive's name.
    pub drive_id: String,
    /// Partition of this drive that is the root file system, if it is not the whole drive.
    #[serde(default)]
    pub partuuid: Option<String>,
    /// Whether the guest boots from it.
    pub is_root_device: bool,
    /// What a flush of the guest does.
    #[serde(default, deserialize_with = "null_as_default")]
    pub cache_type: CacheType,
    /// Whether the guest cannot write to it.
    #[serde(default, deserialize_with = "null_as_default")]
    pub is_read_only: bool,
    /// The image, in a file or block device.
    #[serde(default)]
    pub path_on_host: Option<PathBuf>,
    /// Limits of reads and writes.
    #[serde(default)]
    pub rate_limiter: Option<RateLimiter>,
    /// How requests are done; as is best for each, if not given.
    #[serde(default)]
    pub io_engine: Option<IoEngine>,
    /// Socket of a vhost-user backend, in place of an image.
    #[serde(default)]
    pub socket: Option<PathBuf>,
}

/// What a flush of the guest does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum CacheType {
    /// Nothing.
    #[default]
    Unsafe,
    /// Brings what was written to stable storage.
    Writeback,
}

/// How requests of a drive are done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum IoEngine {
    /// One after the other.
    Sync,
    /// By io_uring.
    Async,
}

/// Body of `PATCH /drives/{drive_id}`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DriveUpdate {
    /// Which drive.
    pub drive_id: String,
    /// The image that takes the place of the one there is.
    #[serde(default)]
    pub path_on_host: Option<PathBuf>,
    /// Limits, as far as they change.
    #[serde(default)]
    pub rate_limiter: Option<RateLimiter>,
}

/// Body of `PUT /network-interfaces/{iface_id}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkInterface {
    /// The interface's name.
    pub iface_id: String,
    /// The tap interface of the host.
    pub host_dev_name: String,
    /// The guest's MAC address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_mac: Option<String>,
    /// Largest packet that the guest is told to send.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Limits of what the guest receives.
    #[serde(default)]
    pub rx_rate_limiter: Option<RateLimiter>,
    /// Limits of what the guest sends.
    #[serde(default)]
    pub tx_rate_limiter: Option<RateLimiter>,
}

/// Body of `PATCH /network-interfaces/{iface_id}`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkInterfaceUpdate {
    /// Which interface.
    pub iface_id: String,
    /// Limits of what the guest receives, as far as they change.
    #[serde(default)]
    pub rx_rate_limiter: Option<RateLimiter>,
    /// Limits of what the guest sends, as far as they change.
    #[serde(default)]
    pub tx_rate_limiter: Option<RateLimiter>,
}

/// Body of `PUT /balloon`, and answer of `GET`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Balloon {
    /// Size wanted in MiB.
    pub amount_mib: u32,
    /// Whether the guest may take memory back when it has no other.
    pub deflate_on_oom: bool,
    /// Seconds between two reports of the guest's memory; none if zero.
    #[serde(default)]
    pub stats_polling_interval_s: u16,
    /// Whether the guest can be asked for hints of free pages.
    #[serde(default)]
    pub free_page_hinting: bool,
    /// Whether the guest reports pages that it does not use.
    #[serde(default)]
    pub free_page_reporting: bool,
}

/// Body of `PATCH /balloon`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonUpdate {
    /// See [`Balloon::amount_mib`].
    pub amount_mib: u32,
}

/// Body of `PATCH /balloon/hinting/start`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonHinting {
    /// Whether the guest can use the pages again as soon as it has named all of them.
    #[serde(default = "acknowledge")]
    pub acknowledge_on_stop: bool,
}

fn acknowledge() -> bool {
    true
}

impl Default for BalloonHinting {
    fn default() -> BalloonHinting {
        BalloonHinting {
            acknowledge_on_stop: acknowledge(),
        }
    }
}

/// Answer of `GET /balloon/hinting/status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct BalloonHintingStatus {
    /// What the guest is asked for: 0 for nothing yet, 1 for nothing any more, or the number of a request.
    pub host_cmd: u32,
    /// What the guest answered last, if it has: the number of a request, or 0 at its end.
    pub guest_cmd: Option<u32>,
}

/// Body of `PATCH /balloon/statistics`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonStatisticsUpdate {
    /// See [`Balloon::stats_polling_interval_s`].
    pub stats_polling_interval_s: u16,
}

/// Body of `PUT /vsock`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vsock {
    /// The guest's address.
    pub guest_cid: u32,
    /// The socket by which programs of the host reach the guest.
    pub uds_path: PathBuf,
    /// A name that is not used any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock_id: Option<String>,
}

/// Body of `PUT /entropy`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entropy {
    /// Limits of what the guest draws.
    #[serde(default)]
    pub rate_limiter: Option<RateLimiter>,
}

/// Body of `PUT /serial`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Serial {
    /// File or named pipe to which the guest's output goes, in place of standard output.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial_out_path: Option<PathBuf>,
    /// Limit of the bytes of output.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<TokenBucket>,
}
