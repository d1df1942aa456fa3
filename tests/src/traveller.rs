//! A guest that goes from machine to machine, by snapshots or by migrations.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use bantam_vmm::config::{MachineConfig, SerialConfig};
use bantam_vmm::{
    Arrival, Console, Controller, Error, ExitReason, Migrated, MigrationConnection,
    MigrationOptions, Snapshot, SnapshotFiles, SnapshotOptions, State,
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
    /// Those of a bridge, between which migrations alternate; the first machine has the first.
    pub taps: Option<[String; 2]>,
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
            taps: None,
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

    /// Moves to another machine of this process while it runs, and returns how. Returns `None` if the guest has ended before.
    ///
    /// # Panics
    /// If that fails.
    pub fn migrate_on(&mut self, options: &MigrationOptions) -> Option<Migrated> {
        let (ours, theirs) = UnixStream::pair().expect("there are descriptors");
        let [ours, theirs] =
            [ours, theirs].map(|it| MigrationConnection::new(it).expect("it is a socket"));
        let (folder, number) = (self.folder.clone(), self.moves + 1);
        let tap = self.taps.as_ref().map(|taps| taps[number % 2].clone());
        let receiver = thread::spawn(move || arrive(theirs, &folder, number, tap));
        let migrated = self.machine.migrate(ours, options);
        let arrived = receiver.join().expect("the receiver does not panic");
        let migrated = match migrated {
            Ok(migrated) => migrated,
            Err(_) if self.machine.state() == State::Stopped => return None,
            Err(error) => panic!("{error}; the receiver: {:?}", arrived.err()),
        };
        let left = self.machine.wait();
        assert_eq!(
            left.unwrap_or_else(|error| panic!("{error}")),
            ExitReason::Moved
        );
        self.machine = arrived.unwrap_or_else(|error| panic!("{error}"));
        self.moves += 1;
        self.longest_pause = self.longest_pause.max(migrated.downtime);
        Some(migrated)
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

/// Receives a machine, the one with this number in `folder`, and lets it go on, with another tap if one is given.
///
/// # Errors
/// If it cannot be received.
pub fn arrive(
    connection: MigrationConnection,
    folder: &Path,
    number: usize,
    tap: Option<String>,
) -> Result<Controller, Error> {
    let arrival = Arrival::new(connection)?;
    let mut config = arrival.config().clone();
    // The ends of the machine before are still in use.
    config.serial = SerialConfig::File(log(folder, number));
    if let SerialConfig::File(path) = &mut config.console {
        *path = folder.join(format!("console{number}"));
    }
    if let Some(vsock) = &mut config.vsock {
        vsock.socket = vsock_of(folder, number);
    }
    if let Some(tap) = tap {
        let net = config.nets.first_mut().expect("it has a network card");
        net.tap = Some(tap.try_into().expect("it is a name"));
    }
    let machine = configured(config, Console::default());
    arrival.receive(&machine)?;
    Ok(machine)
}

/// Where the socket of the machine with this number is, if it was moved there.
pub fn vsock_of(folder: &Path, number: usize) -> PathBuf {
    folder.join(format!("vsock{number}"))
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
