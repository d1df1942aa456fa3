//! A monitor that serves the API, and the machine that its clients configure.

use std::fs;
use std::path::{Path, PathBuf};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::api::ApiClient;
use crate::artefacts::payload;
use crate::process::{Bantam, Ended, Running};

/// A monitor that serves the API, a client of it, and a folder for files of the machine.
pub struct ApiMachine {
    /// The monitor.
    pub running: Running,
    /// The client.
    pub api: ApiClient,
    folder: TempDir,
}

impl ApiMachine {
    /// Starts a monitor without further options.
    pub fn new() -> ApiMachine {
        ApiMachine::with(|bantam, _| bantam)
    }

    /// Starts a monitor after `prepare`, which gets the folder, has added to its command line.
    ///
    /// # Panics
    ///
    /// If it cannot be started.
    pub fn with(prepare: impl FnOnce(Bantam, &Path) -> Bantam) -> ApiMachine {
        let folder = tempfile::tempdir().expect("there is room for temporary files");
        let socket = folder.path().join("api.socket");
        let running = prepare(Bantam::api(&socket), folder.path()).start();
        ApiMachine {
            running,
            api: ApiClient::new(&socket),
            folder,
        }
    }

    /// Returns the path of a file in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Makes a file in the folder, with `size` zeroes.
    ///
    /// # Panics
    ///
    /// If there is no room for it.
    pub fn image(&self, name: &str, size: usize) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, vec![0; size]).expect("there is room for temporary files");
        path
    }

    /// Adds a drive on an empty image with the drive's name, and with the given other members.
    ///
    /// # Panics
    ///
    /// If it is refused.
    #[track_caller]
    pub fn add_drive(&self, id: &str, members: &Value) {
        let image = self.image(id, 8192);
        let mut drive = json!({"drive_id": id, "is_root_device": false, "path_on_host": image});
        for (name, value) in members.as_object().into_iter().flatten() {
            drive[name] = value.clone();
        }
        self.api.put(&format!("/drives/{id}"), &drive);
    }

    /// Puts a bare-metal guest with this command line into the boot source.
    ///
    /// # Panics
    ///
    /// If it is refused.
    #[track_caller]
    pub fn boot(&self, guest: &str, boot_args: &str) {
        let boot_source = bare_metal_boot_source(guest, boot_args);
        self.api.put("/boot-source", &boot_source);
    }

    /// Starts the payload `hello`, which then does nothing.
    ///
    /// # Panics
    ///
    /// If it does not run.
    #[track_caller]
    pub fn start_hello(&self) {
        self.boot("hello", "finish=hang");
        self.api.act("InstanceStart");
        self.running.wait_for_output("PASS\n");
    }

    /// Sends a request that has to be refused, and returns the reason.
    ///
    /// # Panics
    ///
    /// In the cases of [`ApiClient::refused`].
    #[track_caller]
    pub fn refused(&self, method: &str, path: &str, body: &Value) -> String {
        self.api.refused(method, path, &body.to_string())
    }

    /// Waits until the guest has ended the process, and checks that it has succeeded and left
    /// nothing behind.
    ///
    /// # Panics
    ///
    /// If that is not so.
    #[track_caller]
    pub fn ended_well(self) -> Ended {
        let ended = self.running.wait();
        ended.succeeded();
        assert!(!self.folder.path().join("api.socket").exists(), "{ended}");
        ended
    }

    /// Ends the process by a signal, and checks that it has succeeded and left nothing behind.
    ///
    /// # Panics
    ///
    /// In the cases of [`ApiMachine::ended_well`].
    #[track_caller]
    pub fn stop(self) -> Ended {
        self.running.signal(Signal::SIGTERM);
        self.ended_well()
    }
}

impl ApiMachine {
    /// Kills the process as if by `kill -9`, and returns the folder with its files when it is gone.
    pub fn kill(self) -> TempDir {
        self.running.signal(Signal::SIGKILL);
        self.running.wait();
        self.folder
    }
}

impl Default for ApiMachine {
    fn default() -> ApiMachine {
        ApiMachine::new()
    }
}

/// Returns the body of `PUT /boot-source` for a bare-metal guest.
pub fn bare_metal_boot_source(guest: &str, boot_args: &str) -> Value {
    json!({"kernel_image_path": payload(guest), "boot_args": boot_args})
}
