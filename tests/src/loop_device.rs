//! Block devices of the host.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

/// A block device over a file, which exists until this is dropped.
pub struct LoopDevice {
    /// The device.
    pub path: PathBuf,
}

impl LoopDevice {
    /// Makes a device of `file`. That takes `CAP_SYS_ADMIN`.
    ///
    /// # Panics
    ///
    /// If it cannot be made.
    pub fn new(file: &Path) -> Self {
        Self::with_sectors(file, 512)
    }

    /// Makes a device of `file` with sectors of `size` bytes; see [`LoopDevice::new`].
    ///
    /// # Panics
    ///
    /// If it cannot be made.
    pub fn with_sectors(file: &Path, size: u32) -> Self {
        Self::try_with_sectors(file, size)
            .unwrap_or_else(|reason| panic!("no loop device: {reason}"))
    }

    pub(crate) fn try_new(file: &Path) -> Result<Self, String> {
        Self::try_with_sectors(file, 512)
    }

    fn try_with_sectors(file: &Path, size: u32) -> Result<Self, String> {
        let mut losetup = Command::new("losetup");
        losetup.args(["--find", "--show", "--sector-size"]);
        losetup.arg(size.to_string()).arg(file);
        let output = losetup
            .stdin(Stdio::null())
            .output()
            .map_err(|error| format!("cannot run losetup: {error}"))?;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).trim().to_owned());
        }
        let path = String::from_utf8(output.stdout).expect("paths are text");
        Ok(Self {
            path: path.trim_end().into(),
        })
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let detached = Command::new("losetup")
            .arg("--detach")
            .arg(&self.path)
            .status()
            .is_ok_and(|status| status.success());
        if !detached && !thread::panicking() {
            panic!("cannot detach {}", self.path.display());
        }
    }
}
