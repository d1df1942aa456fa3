//! A machine whose guest loads its devices, and which its test owns.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use bantam_vmm::config::{DiskConfig, MachineConfig, SerialConfig};
use bantam_vmm::{Console, Controller, DeviceAnswer, DeviceCommand, Error};
use serde_json::Value;
use tempfile::TempDir;

use crate::{configured, device, payload};

const LIMIT: Duration = Duration::from_secs(30);

/// A machine that runs the payload `load`.
pub struct Load {
    /// The machine.
    pub machine: Controller,
    log: PathBuf,
}

impl Load {
    /// Starts it with `words` for the payload in a machine that `configure` completes, and waits until the load begins.
    ///
    /// # Panics
    /// If the machine does not start, or the load does not begin.
    pub fn start(
        folder: &TempDir,
        words: &str,
        configure: impl FnOnce(&mut MachineConfig),
    ) -> Load {
        let log = folder.path().join("log");
        let _ = fs::remove_file(&log);
        let mut config = MachineConfig::new(payload("load"));
        config.append = Some(format!("{words} finish=poweroff"));
        config.serial = SerialConfig::File(log.clone());
        configure(&mut config);
        let machine = configured(config, Console::default());
        machine.start().unwrap_or_else(|error| panic!("{error}"));
        let load = Load { machine, log };
        load.wait_for("load: ready");
        load
    }

    /// Starts it with the image at `path` as its only disk; `kind` continues the option of the disk.
    ///
    /// # Panics
    /// As [`Load::start`].
    pub fn of_disk(folder: &TempDir, path: &Path, kind: &str, words: &str) -> Load {
        Load::start(folder, &format!("test=block {words}"), |config| {
            config.disks = vec![disk(path, kind)];
        })
    }

    /// What the payload has printed.
    pub fn text(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits until the payload has printed `wanted`.
    ///
    /// # Panics
    /// If it does not.
    pub fn wait_for(&self, wanted: &str) {
        let deadline = Instant::now() + LIMIT;
        while !self.text().contains(wanted) {
            assert!(
                Instant::now() < deadline,
                "no '{wanted}' in {}",
                self.text()
            );
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// The counters of the machine.
    ///
    /// # Panics
    /// If they cannot be read.
    pub fn metrics(&self) -> Value {
        let metrics = self.machine.metrics().expect("it was started");
        serde_json::to_value(metrics).expect("counters are numbers")
    }

    /// Puts `image` in the place of the disk's.
    ///
    /// # Errors
    /// As [`Controller::device`].
    pub fn replace(&self, image: &Path) -> Result<DeviceAnswer, Error> {
        let path = image.to_path_buf();
        device(
            &self.machine,
            "disk0",
            DeviceCommand::ReplaceImage { path, format: None },
        )
    }

    /// Waits for the end, which has to be a success, and returns the payload's report of its load.
    ///
    /// # Panics
    /// If it is not.
    pub fn finish(self) -> Value {
        self.machine.wait().expect("the guest powers off");
        let text = fs::read_to_string(&self.log).expect("there is a log");
        assert!(text.ends_with("PASS\n"), "{text}");
        let line = text.lines().find(|line| line.starts_with('{'));
        serde_json::from_str(line.expect("there is JSON")).expect("it is JSON")
    }
}

/// Describes a disk; `kind` continues its option.
fn disk(path: &Path, kind: &str) -> DiskConfig {
    let option = format!("{}{kind}", path.display());
    option.parse().expect("it is a disk")
}
