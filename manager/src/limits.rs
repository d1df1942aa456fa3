//! Control groups that limit what the processes of machines use.
//!
//! The process of a machine makes its group and removes it. The folders of the group are noted in the folder of the sockets, so
//! the next command removes the group of a process that was killed.

use std::ffi::OsStr;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use bantam_cgroup::{ControlGroup, CpuQuota, Limits};
use bantam_vmm::config::{CgroupConfig, Quantity};

use crate::error::Error;
use crate::files;
use crate::machine::Machine;

/// The file with the folders of the machine's control group, each with a zero byte after it.
const GROUPS: &str = "cgroups";
/// The period of a quota, in microseconds, if nothing is said.
const PERIOD: u64 = 100_000;
/// How long a process that has ended may still be in its group.
const EXIT_TIME: Duration = Duration::from_millis(200);
const INTERVAL: Duration = Duration::from_millis(2);

impl Machine {
    /// Moves this process into a control group with the limits of the machine file, if there are any.
    pub(crate) fn enter_control_group(&self) -> Result<Option<ControlGroup>, Error> {
        let Some(config) = self.config()?.cgroup else {
            return Ok(None);
        };
        let name = format!("bantam-{}-{}", self.name(), self.settings()?.id);
        let path = self.runtime().join(GROUPS);
        let mut options = OpenOptions::new();
        let options = options.append(true).create(true).mode(0o600);
        let mut note = |folder: &Path| -> io::Result<()> {
            let mut file = options.open(&path)?;
            file.write_all(&[folder.as_os_str().as_bytes(), b"\0"].concat())
        };
        Ok(Some(ControlGroup::enter(
            &name,
            &limits(&config),
            &mut note,
        )?))
    }

    /// Removes what only a machine that runs has: its sockets, and its control group if its process has left one.
    pub(crate) fn remove_runtime(&self) -> Result<(), Error> {
        self.remove_control_group();
        let runtime = self.runtime();
        files::remove_folder(runtime).map_err(Error::file("remove", runtime))
    }

    /// Removes the control group that a process which was killed has left.
    pub(crate) fn remove_control_group(&self) {
        let noted = fs::read(self.runtime().join(GROUPS)).unwrap_or_default();
        let folders = noted.split(|&byte| byte == 0).filter(|it| !it.is_empty());
        let begin = Instant::now();
        for folder in folders.map(|folder| Path::new(OsStr::from_bytes(folder))) {
            while let Err(error) = bantam_cgroup::remove(folder) {
                if begin.elapsed() >= EXIT_TIME {
                    tracing::warn!("control group '{}' stays: {error}", folder.display());
                    break;
                }
                thread::sleep(INTERVAL);
            }
        }
    }
}

fn limits(config: &CgroupConfig) -> Limits {
    let number = |quantity: Option<Quantity>| quantity.map(Quantity::get);
    Limits {
        cpu_shares: number(config.cpu_shares),
        cpu_quota: number(config.cpu_quota).map(|quota| CpuQuota {
            quota,
            period: number(config.cpu_period).unwrap_or(PERIOD),
        }),
        memory_max: number(config.memory_max),
        memory_high: number(config.memory_high),
    }
}
