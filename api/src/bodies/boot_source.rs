//! The kernel.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::fault::Fault;
use crate::host_files::check_readable;

/// The kernel command line if the client gives none, as in Firecracker.
const DEFAULT_BOOT_ARGS: &str = "reboot=k panic=1 nomodule 8250.nr_uarts=0 i8042.noaux i8042.nomux \
                                 i8042.dumbkbd swiotlb=noforce";

/// Longest kernel command line in bytes, as in Firecracker: 2048 with the NUL at its end.
const LONGEST_BOOT_ARGS: usize = 2047;

/// Body of `PUT /boot-source`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootSource {
    /// The kernel image.
    pub kernel_image_path: PathBuf,
    /// The initial RAM disk.
    #[serde(default)]
    pub initrd_path: Option<PathBuf>,
    /// The kernel command line, in place of the default one.
    #[serde(default)]
    pub boot_args: Option<String>,
}

impl BootSource {
    /// Checks that the files can be read, and that the command line is not too long.
    pub(crate) fn check(&self) -> Result<(), Fault> {
        check_readable("kernel image", &self.kernel_image_path)?;
        if let Some(path) = &self.initrd_path {
            check_readable("initrd", path)?;
        }
        let length = self.boot_args.as_ref().map_or(0, String::len);
        if length > LONGEST_BOOT_ARGS {
            return Err(Fault::Value {
                what: "boot_args",
                reason: format!("they have {length} bytes; {LONGEST_BOOT_ARGS} is the most"),
            });
        }
        Ok(())
    }

    /// The kernel command line, without the words that belong to devices.
    pub(crate) fn cmdline(&self) -> String {
        let boot_args = self.boot_args.as_deref();
        boot_args.unwrap_or(DEFAULT_BOOT_ARGS).to_string()
    }
}
