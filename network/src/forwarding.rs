//! The host as a router.

use std::fs;
use std::path::{Path, PathBuf};

use crate::NetworkError;

/// Where the settings of the kernel's network are.
const SETTINGS: &str = "/proc/sys/net";

/// Has the host forward IPv4 packets.
///
/// # Errors
/// If the setting cannot be changed.
pub(crate) fn enable() -> Result<(), NetworkError> {
    set(&setting("ipv4/ip_forward"), "1")
}

/// Has the host forward IPv6 packets. Interfaces that learn their addresses from routers go on doing so, which they
/// otherwise would not.
///
/// # Errors
/// If a setting cannot be changed.
pub(crate) fn enable_ipv6() -> Result<(), NetworkError> {
    let all = setting("ipv6/conf/all/forwarding");
    if value(&all).as_deref() == Some("1") {
        return Ok(());
    }
    let interfaces = fs::read_dir(setting("ipv6/conf"))
        .into_iter()
        .flatten()
        .flatten();
    for interface in interfaces {
        let accepts = interface.path().join("accept_ra");
        if interface.file_name() != "all" && value(&accepts).as_deref() == Some("1") {
            set(&accepts, "2")?;
        }
    }
    set(&all, "1")
}

/// Whether the host has IPv6.
pub(crate) fn has_ipv6() -> bool {
    setting("ipv6/conf/all").exists()
        && value(&setting("ipv6/conf/all/disable_ipv6")).as_deref() == Some("0")
}

/// Keeps the machines on a bridge from telling the host about routers.
///
/// # Errors
/// If a setting cannot be changed.
pub(crate) fn ignore_routers(bridge: &str) -> Result<(), NetworkError> {
    for key in ["accept_ra", "autoconf"] {
        set(&setting(&format!("ipv6/conf/{bridge}/{key}")), "0")?;
    }
    Ok(())
}

fn setting(name: &str) -> PathBuf {
    Path::new(SETTINGS).join(name)
}

fn value(setting: &Path) -> Option<String> {
    let text = fs::read_to_string(setting).ok()?;
    Some(text.trim().to_owned())
}

fn set(setting: &Path, wanted: &str) -> Result<(), NetworkError> {
    if value(setting).as_deref() == Some(wanted) {
        return Ok(());
    }
    fs::write(setting, wanted).map_err(NetworkError::file("change", setting))
}
