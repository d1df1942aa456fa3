//! Named machines of a test: in folders of their own, and destroyed with it.

use std::collections::HashSet;
use std::fs;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

use crate::{Bantam, Ended, payload};

/// How long something may take that needs milliseconds, on a busy host.
const PATIENCE: Duration = Duration::from_secs(30);

/// The machines of a test, in folders of their own. They are destroyed with this.
pub struct Machines {
    folder: TempDir,
}

impl Default for Machines {
    fn default() -> Machines {
        Machines::new()
    }
}

impl Machines {
    /// Returns the folder in which everything is.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Makes folders for machines.
    pub fn new() -> Machines {
        Machines {
            folder: tempfile::tempdir().expect("there is room for temporary files"),
        }
    }

    /// Returns a command of the program.
    pub fn bantam(&self, arguments: &[&str]) -> Bantam {
        self.bantam_with(&[], arguments)
    }

    /// Returns a command of the program with these variables in its environment, each a `NAME=VALUE`.
    pub fn bantam_with(&self, variables: &[String], arguments: &[&str]) -> Bantam {
        let folder = format!("BANTAM_STATE_DIR={}", self.folder.path().display());
        let launcher = ["env".to_owned(), folder].into_iter();
        Bantam::new(arguments).launcher(launcher.chain(variables.iter().cloned()))
    }

    /// Executes a command.
    pub fn run(&self, arguments: &[&str]) -> Ended {
        self.bantam(arguments).finish()
    }

    /// Executes a command that has to succeed, and returns what it prints.
    #[track_caller]
    pub fn done(&self, arguments: &[&str]) -> String {
        let ended = self.run(arguments);
        ended.has_status(0);
        ended.text()
    }

    /// Executes a command that has to fail, and returns the line with the reason.
    #[track_caller]
    pub fn refused(&self, arguments: &[&str]) -> String {
        self.run(arguments).failed_with_one_line().to_owned()
    }

    /// Executes a command that has to succeed, and returns the JSON that it prints.
    #[track_caller]
    pub fn json(&self, arguments: &[&str]) -> Value {
        let mut arguments = arguments.to_vec();
        arguments.extend(["--output", "json"]);
        serde_json::from_str(&self.done(&arguments)).expect("it is JSON")
    }

    /// Defines a machine with a payload as its kernel.
    #[track_caller]
    pub fn create(&self, name: &str, payload_name: &str, words: &str, more: &[&str]) {
        let kernel = payload(payload_name);
        let kernel = kernel.to_str().expect("the host does it");
        let mut arguments = vec!["create", name, "--kernel", kernel, "--memory", "32M"];
        if !words.is_empty() {
            arguments.extend(["--append", words]);
        }
        arguments.extend(more);
        self.done(&arguments);
    }

    /// Defines a machine whose guest does nothing.
    #[track_caller]
    pub fn create_idle(&self, name: &str) {
        self.create(name, "hello", "finish=hang", &[]);
    }

    /// Returns the state of a machine, with the reason.
    #[track_caller]
    pub fn state(&self, name: &str) -> String {
        self.done(&["domstate", name, "--reason"]).trim().to_owned()
    }

    /// Returns the process of a machine that runs.
    #[track_caller]
    pub fn process(&self, name: &str) -> Pid {
        let process = self.json(&["dominfo", name])["process"].as_i64();
        Pid::from_raw(
            process
                .expect("it runs")
                .try_into()
                .expect("the host does it"),
        )
    }

    /// Returns the folder of a machine.
    pub fn of_machine(&self, name: &str) -> PathBuf {
        self.folder.path().join("machines").join(name)
    }

    /// Returns the folder of the sockets of a machine.
    pub fn runtime(&self, name: &str) -> PathBuf {
        self.folder.path().join("run").join(name)
    }

    /// Returns the text of a machine file.
    pub fn machine_file(&self, name: &str) -> String {
        fs::read_to_string(self.of_machine(name).join("machine.toml")).expect("the host does it")
    }

    /// Waits for a state of a machine.
    #[track_caller]
    pub fn wait_for_state(&self, name: &str, awaited: &str) {
        let begin = Instant::now();
        loop {
            let state = self.state(name);
            if state == awaited {
                return;
            }
            assert!(begin.elapsed() < PATIENCE, "it is {state}, not {awaited}");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Connects to the console of a machine and reads until its output contains `text`.
    #[track_caller]
    pub fn console_until(&self, name: &str, text: &str) -> (UnixStream, String) {
        let mut stream =
            UnixStream::connect(self.runtime(name).join("console.sock")).expect("the host does it");
        let output = read_until(&mut stream, text);
        (stream, output)
    }
}

impl Drop for Machines {
    fn drop(&mut self) {
        let names = self.bantam(&["list", "--name"]).finish().text();
        for name in names.lines() {
            self.bantam(&["destroy", name]).finish();
        }
    }
}

/// Reads until the output contains `text`, and returns all of it.
///
/// # Panics
/// If the output ends before, or does not come in time.
#[track_caller]
pub fn read_until(stream: &mut UnixStream, text: &str) -> String {
    stream
        .set_read_timeout(Some(PATIENCE))
        .expect("the host does it");
    let mut output = String::new();
    let mut chunk = [0; 4096];
    while !output.contains(text) {
        let count = stream.read(&mut chunk).unwrap_or_else(|error| {
            panic!("{error} before '{text}' in\n{output}");
        });
        assert!(count > 0, "it has ended before '{text}' in\n{output}");
        output.push_str(&String::from_utf8_lossy(&chunk[..count]));
    }
    output
}

/// Returns all files and folders below `folder`.
///
/// # Panics
/// If one cannot be read.
pub fn files_below(folder: &Path) -> HashSet<PathBuf> {
    let mut found = HashSet::new();
    let mut waiting = vec![folder.to_path_buf()];
    while let Some(folder) = waiting.pop() {
        for entry in fs::read_dir(&folder).expect("the host does it") {
            let path = entry.expect("the host does it").path();
            if path.is_dir() {
                waiting.push(path.clone());
            }
            found.insert(path);
        }
    }
    found
}
