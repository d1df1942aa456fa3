//! A machine that goes on from its own snapshots, one after another.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bantam_vmm::config::{MachineConfig, SerialConfig};
use bantam_vmm::{
    Console, Controller, ExitReason, Snapshot, SnapshotFiles, SnapshotOptions, State,
};

use crate::configured;

/// A guest that goes from machine to machine. The serial port of each leads to a file of its own.
pub struct Traveller {
    /// The machine that it is in.
    pub machine: Controller,
    folder: PathBuf,
    /// How many there have been before.
    moves: usize,
    longest_pause: Duration,
}

impl Traveller {
    /// Starts a machine, which keeps what it prints and its snapshots in `folder`.
    ///
    /// # Panics
    /// If it does not start.
    pub fn start(mut config: MachineConfig, folder: &Path) -> Traveller {
        config.serial = SerialConfig::File(log(folder, 0));
        let machine = configured(config, Console::default());
        machine.start().unwrap_or_else(|error| panic!("{error}"));
        Traveller {
            machine,
            folder: folder.to_path_buf(),
            moves: 0,
            longest_pause: Duration::ZERO,
        }
    }

    /// Ends the machine with a snapshot, and goes on from that in another. Returns `false` if the guest has ended before.
    ///
    /// # Panics
    /// If that fails.
    pub fn move_on(&mut self) -> bool {
        self.move_on_after(|_| ())
    }

    /// Does the same, and has `look` see the snapshot before another machine goes on from it.
    ///
    /// # Panics
    /// If that fails.
    pub fn move_on_after(&mut self, look: impl FnOnce(&Snapshot)) -> bool {
        let directory = self.folder.join(format!("snapshot{}", self.moves));
        fs::create_dir(&directory).expect("there is room");
        let taken = self.machine.snapshot(SnapshotOptions {
            stop: true,
            ..SnapshotOptions::new(SnapshotFiles::in_directory(&directory))
        });
        match taken {
            Ok(taken) => self.longest_pause = self.longest_pause.max(taken.paused_for),
            Err(_) if self.machine.state() == State::Stopped => return false,
            Err(error) => panic!("{error}"),
        }
        assert_eq!(self.machine.state(), State::Stopped);
        let snapshot = Snapshot::open(&directory).unwrap_or_else(|error| panic!("{error}"));
        look(&snapshot);
        self.moves += 1;
        self.machine = gone_on(&snapshot, snapshot.config().clone(), &self.log(self.moves));
        fs::remove_dir_all(&directory).expect("it is there");
        true
    }

    /// How many machines it has left.
    pub fn moves(&self) -> usize {
        self.moves
    }

    /// For how long it has stood still at most, without the time that the snapshot was written.
    pub fn longest_pause(&self) -> Duration {
        self.longest_pause
    }

    fn log(&self, number: usize) -> PathBuf {
        log(&self.folder, number)
    }

    /// What it has printed in the machine that it is in.
    pub fn last_text(&self) -> String {
        fs::read_to_string(self.log(self.moves)).unwrap_or_default()
    }

    /// What it has printed in all machines.
    pub fn text(&self) -> String {
        let texts = (0..=self.moves).map(|number| fs::read_to_string(self.log(number)));
        texts.map(Result::unwrap_or_default).collect()
    }

    /// Waits until the payload has powered off, which has to have passed, and returns all that it has printed.
    ///
    /// # Panics
    /// If it has not.
    pub fn passed(self) -> String {
        let reason = self.machine.wait();
        let text = self.text();
        let reason = reason.unwrap_or_else(|error| panic!("{error}\n{text}"));
        assert_eq!(reason, ExitReason::PowerOff, "{text}");
        assert!(text.ends_with("PASS\n") && !text.contains("FAIL"), "{text}");
        text
    }
}

/// Where a machine's serial port leads to.
fn log(folder: &Path, number: usize) -> PathBuf {
    folder.join(format!("log{number}"))
}

/// Goes on from `snapshot` in a machine of `config`, whose serial port leads to `log`.
///
/// # Panics
/// If the machine does not go on.
pub fn gone_on(snapshot: &Snapshot, mut config: MachineConfig, log: &Path) -> Controller {
    config.serial = SerialConfig::File(log.to_path_buf());
    let machine = configured(config, Console::default());
    machine
        .restore(snapshot)
        .unwrap_or_else(|error| panic!("{error}"));
    machine.resume().unwrap_or_else(|error| panic!("{error}"));
    machine
}
