//! State files of the present format, which are kept in the tree: what an earlier program has written must be read, or refused
//! by the version of a section.
//!
//! If this fails, the form of saved state has changed. Increase `VERSION` of the types that have changed, and make the files
//! anew: `BANTAM_WRITE_FIXTURES=1 cargo test -p bantam-tests --test state_fixtures`.

use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use bantam_snapshot::{MemoryWriter, StateFile, put_in_place};
use bantam_state::{SavedState, Section};
use bantam_tests::{configured, payload, require_kvm};
use bantam_vmm::config::{MachineConfig, SerialConfig, VsockConfig};
use bantam_vmm::{
    Console, Controller, Error, RestoreError, Snapshot, SnapshotBase, SnapshotDescription,
    SnapshotDisks, SnapshotFiles, SnapshotOptions, State,
};
use serde::{Deserialize, Serialize};

const NAMES: [&str; 2] = ["full", "differential"];
/// Where the machine of the fixtures has its files. It need not exist.
const FOLDER: &str = "/var/tmp/bantam-fixture";
const NOTE: &str = "made for a test";
const MEMORY: u64 = 16 << 20;

/// The folder of a fixture.
fn fixture(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/state");
    folder.join(name)
}

/// A device, as its section has it.
#[derive(Debug, Serialize, Deserialize)]
struct DeviceState {
    name: String,
    is_virtio: bool,
    state: Section,
}

impl SavedState for DeviceState {
    const KIND: &'static str = "device";
    const VERSION: u16 = 1;
}

/// The host, as its section has it.
#[derive(Debug, Serialize, Deserialize)]
struct Host {
    kernel: String,
    architecture: String,
    name: String,
}

impl SavedState for Host {
    const KIND: &'static str = "host";
    const VERSION: u16 = 1;
}

fn host() -> Host {
    Host {
        kernel: "6.18.0".to_owned(),
        architecture: "x86_64".to_owned(),
        name: "fixture".to_owned(),
    }
}

fn config(folder: &Path) -> MachineConfig {
    let place = |name: &str| folder.join(name);
    let mut config = MachineConfig::new(place("kernel"));
    config.memory = "16M".parse().expect("this is a size");
    config.cpus = 2.try_into().expect("a machine can have them");
    config.append = Some("test=block seconds=60 finish=poweroff".to_owned());
    config.serial = SerialConfig::File(place("serial.log"));
    config.console = SerialConfig::File(place("console.log"));
    config.track_dirty_pages = true;
    let disk = place("disk.img").display().to_string();
    config.disks = vec![disk.parse().expect("it is a disk")];
    config.vsock = Some(VsockConfig {
        cid: 3.try_into().expect("a guest can have it"),
        socket: place("vsock"),
    });
    config.balloon = Some("size=1M".parse().expect("it is a balloon"));
    config
}

/// Makes the files that the machine of a fixture has.
fn make_files(folder: &Path) {
    fs::create_dir_all(folder).expect("there is room");
    fs::copy(payload("load"), folder.join("kernel")).expect("it was built");
    let disk = File::create(folder.join("disk.img")).and_then(|file| file.set_len(1 << 20));
    disk.expect("there is room");
}

/// Makes the fixtures anew.
fn write_fixtures() {
    let folder = Path::new(FOLDER);
    make_files(folder);
    let machine = configured(config(folder), Console::default());
    machine.start().unwrap_or_else(|error| panic!("{error}"));
    let log = folder.join("serial.log");
    while !fs::read_to_string(&log).is_ok_and(|text| text.contains("load: ready")) {
        std::thread::yield_now();
    }
    let files = NAMES.map(|name| {
        let directory = folder.join(name);
        fs::create_dir_all(&directory).expect("there is room");
        SnapshotFiles::in_directory(&directory)
    });
    for (index, files) in files.iter().enumerate() {
        let taken = machine.snapshot(SnapshotOptions {
            base: (index > 0).then_some(SnapshotBase::Last),
            note: Some(NOTE.to_owned()),
            disks: match index {
                0 => SnapshotDisks::Unprotected,
                _ => SnapshotDisks::Overlays,
            },
            stop: index > 0,
            ..SnapshotOptions::new(files.clone())
        });
        taken.unwrap_or_else(|error| panic!("{error}"));
    }
    for (name, files) in NAMES.iter().zip(files) {
        let state = StateFile::open(&files.state).unwrap_or_else(|error| panic!("{error}"));
        // It is of no interest where they were made.
        let sections = state.sections().iter().map(|section| match section.kind() {
            Host::KIND => Section::of(&host()).expect("it can be encoded"),
            _ => section.clone(),
        });
        fs::create_dir_all(fixture(name)).expect("there is room");
        let path = SnapshotFiles::in_directory(&fixture(name)).state;
        let pages = state.pages().cloned();
        let file = StateFile::new(&path, state.facts().clone(), pages, sections.collect())
            .with_witnesses(state.witnesses().to_vec());
        let written = file.write().and_then(|file| put_in_place([file]));
        written.unwrap_or_else(|error| panic!("{error}"));
    }
    fs::remove_dir_all(folder).expect("it was made above");
}

fn open(name: &str) -> StateFile {
    let path = SnapshotFiles::in_directory(&fixture(name)).state;
    StateFile::open(&path).unwrap_or_else(|error| panic!("{error}"))
}

#[test]
fn state_files_of_the_present_format_are_read() {
    if env::var_os("BANTAM_WRITE_FIXTURES").is_some() {
        write_fixtures();
    }
    let [full, differential] = NAMES.map(open);
    assert_eq!(full.facts().base, None);
    assert_eq!(differential.facts().base, Some(full.facts().id));
    assert!(full.pages().is_none() && full.witnesses().is_empty());
    let pages = differential.pages().expect("it lists its pages").len() as u64;
    assert!((1..MEMORY / 4096).contains(&pages), "{pages}");
    assert!(!differential.witnesses().is_empty());

    for (name, changed_pages) in [("full", None), ("differential", Some(pages))] {
        let file = open(name);
        let facts = file.facts();
        assert_eq!(facts.program_version, "0.1.0");
        assert_eq!(facts.regions, [(0, MEMORY)]);
        assert!(facts.taken_at > 1_700_000_000);
        let files = SnapshotFiles::in_directory(&fixture(name));
        let found = SnapshotDescription::read(&files).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(found.facts, *facts);
        assert_eq!(found.changed_pages, changed_pages);
        let expected = host();
        assert_eq!(found.host.kernel, expected.kernel);
        assert_eq!(found.host.architecture, expected.architecture);
        assert_eq!(found.host.name, expected.name);
        assert_eq!(found.config, config(Path::new(FOLDER)));
        assert_eq!(found.disks.len(), usize::from(name == "differential"));

        let kinds: Vec<_> = file.sections().iter().map(Section::kind).collect();
        let count = |kind: &str| kinds.iter().filter(|it| **it == kind).count();
        assert_eq!(count("vcpu"), 2, "{kinds:?}");
        let devices = file.sections().iter().filter(|it| it.kind() == "device");
        let devices: Vec<DeviceState> = devices
            .map(|section| section.decode().expect("it is a device"))
            .collect();
        let names: Vec<_> = devices
            .iter()
            .map(|it| (it.name.as_str(), it.is_virtio, it.state.kind()))
            .collect();
        println!("{names:?}");
        for expected in ["disk0", "vsock", "console", "rng", "balloon"] {
            let mut names = names.iter();
            assert!(names.any(|it| it.0 == expected && it.1), "{expected}");
        }
        assert!(names.iter().any(|it| it.0 == "serial" && !it.1));
    }
}

/// Every part of a machine takes its state from the fixture. Only a host with another processor refuses it.
#[test]
fn a_machine_takes_the_state_of_a_fixture() {
    require_kvm!();
    let folder = tempfile::tempdir().expect("there is room");
    make_files(folder.path());
    let state = open("full");
    let files = SnapshotFiles {
        state: SnapshotFiles::in_directory(&fixture("full")).state,
        memory: folder.path().join("memory"),
    };
    // The guest is not to run, so it needs no memory.
    let memory = MemoryWriter::create(&files.memory, state.facts())
        .and_then(MemoryWriter::finish)
        .and_then(|file| put_in_place([file]));
    memory.unwrap_or_else(|error| panic!("{error}"));
    let mut snapshot = Snapshot::open_files(&files).unwrap_or_else(|error| panic!("{error}"));
    snapshot.take_changed_disks();
    assert_eq!(snapshot.note(), Some(NOTE));
    let machine = Controller::new().expect("there are descriptors");
    let configured = machine.configure(config(folder.path()));
    configured.unwrap_or_else(|error| panic!("{error}"));
    match machine.restore(&snapshot) {
        Ok(()) => assert_eq!(machine.state(), State::Paused),
        Err(Error::Restore(RestoreError::Host { .. })) => println!("KVM refuses it here"),
        Err(Error::Restore(RestoreError::Invalid { kind, reason })) if kind == "vcpu" => {
            println!("{reason}");
        }
        Err(error) => panic!("{error}"),
    }
}
