//! The ways in which a machine that goes on from a snapshot gets its memory.

use std::fs::{self, OpenOptions};
use std::io::PipeReader;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use bantam_memory::GuestBuffers;
use bantam_tests::counting::{
    Counters, STOP, config, configured, counting, read_on, wait_until, wait_until_gone_on,
};
use bantam_tests::page_server::{Conduct, PageServer, serve};
use bantam_tests::{ApiMachine, Bantam, HugePagePool, STATUS_ERROR, STATUS_POWER_CUT, require_kvm};
use bantam_vmm::config::{HugePages, MachineConfig};
use bantam_vmm::{
    Controller, Error, Event, ExitReason, MemoryLoad, Snapshot, SnapshotBase, SnapshotDisks,
    SnapshotFiles, SnapshotOptions, State,
};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

/// How long a machine may take to end when it has to at once.
const END_TIME: Duration = Duration::from_secs(2);
const PAGE: u64 = 4096;
/// Memory that the guest does not use, and what is there.
const FREE: GuestAddress = GuestAddress(12 << 20);
const MARK: [u8; 3 * PAGE as usize] = [0x5a; 3 * PAGE as usize];

/// The snapshot of a machine that counts, in a directory of its own.
struct Counting {
    folder: TempDir,
    counters: Counters,
}

impl Counting {
    fn snapshot(config: &MachineConfig) -> Counting {
        let folder = tempfile::tempdir().expect("there is room");
        let (machine, _reader, counters) = counting(config);
        let memory = machine.memory().expect("it runs");
        memory.write_slice(&MARK, FREE).expect("it is memory");
        let counting = Counting { folder, counters };
        counting.take(&machine, "snap", None, true);
        counting
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn directory(&self) -> PathBuf {
        self.path("snap")
    }

    fn memory_file(&self) -> PathBuf {
        self.path("snap/memory")
    }

    /// Takes a snapshot into a directory, and returns how many pages it has.
    fn take(&self, machine: &Controller, name: &str, base: Option<&str>, stop: bool) -> u64 {
        let directory = self.path(name);
        fs::create_dir_all(&directory).expect("there is room");
        let base = base.map(|base| SnapshotFiles::in_directory(&self.path(base)));
        let options = SnapshotOptions {
            base: base.map(SnapshotBase::Files),
            stop,
            ..SnapshotOptions::new(SnapshotFiles::in_directory(&directory))
        };
        let taken = machine.snapshot(options);
        taken.unwrap_or_else(|error| panic!("{error}")).pages
    }

    fn open(&self, name: &str, load: MemoryLoad) -> Snapshot {
        let snapshot = Snapshot::open(&self.path(name));
        let mut snapshot = snapshot.unwrap_or_else(|error| panic!("{error}"));
        snapshot.set_memory_load(load);
        snapshot
    }

    fn open_served(&self, socket: &Path) -> Snapshot {
        let snapshot = Snapshot::open_served(&self.path("snap/state"), socket);
        snapshot.unwrap_or_else(|error| panic!("{error}"))
    }

    fn server(&self, conduct: Conduct) -> (PageServer, PathBuf) {
        let socket = self.path("pages.sock");
        let _ = fs::remove_file(&socket);
        let server = PageServer::start(&socket, &self.memory_file(), conduct);
        (server, socket)
    }

    /// Lets a machine that is paused go on, and waits until it has counted.
    fn goes_on(&self, machine: &Controller) {
        let memory = machine.memory().expect("it is paused");
        let before = self.counters.processors(&memory, 1);
        machine.resume().unwrap_or_else(|error| panic!("{error}"));
        wait_until_gone_on(self.counters, &memory, &before);
    }

    /// Ends a machine, whose guest has found no error, and whose memory is what it should be.
    fn ends_well(&self, machine: &Controller, reader: &mut PipeReader) {
        let memory = machine.memory().expect("it runs");
        let mut found = vec![0; MARK.len()];
        memory.read_slice(&mut found, FREE).expect("it is memory");
        assert!(found == MARK, "memory differs");
        self.counters.set(&memory, STOP);
        let reason = machine.wait().unwrap_or_else(|error| panic!("{error}"));
        let mut text = String::new();
        read_on(reader, &mut text);
        assert_eq!(reason, ExitReason::PowerOff, "{text}");
        assert!(text.ends_with("PASS\n"), "{text}");
    }
}

/// Returns a paused machine that goes on from `snapshot`, configured by `change`.
fn restored_with(
    snapshot: &Snapshot,
    change: impl FnOnce(&mut MachineConfig),
) -> Result<(Controller, PipeReader), Error> {
    let mut config = snapshot.config().clone();
    change(&mut config);
    let (machine, reader) = configured(&config);
    machine.restore(snapshot)?;
    assert_eq!(machine.state(), State::Paused);
    Ok((machine, reader))
}

fn restored(snapshot: &Snapshot) -> (Controller, PipeReader) {
    restored_with(snapshot, |_| {}).unwrap_or_else(|error| panic!("{error}"))
}

/// Discards a page, as a balloon does.
fn discard(machine: &Controller, address: GuestAddress) {
    let memory = machine.memory().expect("it runs");
    let mut buffers = GuestBuffers::new(memory);
    buffers.push(address, PAGE as u32).expect("it is memory");
    let discarded = buffers.discard_front(usize::MAX);
    assert_eq!(discarded.expect("the host discards"), PAGE as usize);
}

#[test]
#[ignore = "it is the process of a page server"]
fn page_server() {
    serve();
}

const LOADS: [MemoryLoad; 4] = [
    MemoryLoad::Lazy,
    MemoryLoad::Prefetch,
    MemoryLoad::Copy,
    MemoryLoad::CopyAll,
];

#[test]
fn a_machine_goes_on_however_it_gets_its_memory() {
    require_kvm!();
    let first = Counting::snapshot(&config(1, "timer=deadline"));
    for load in LOADS {
        let (machine, mut reader) = restored(&first.open("snap", load));
        first.goes_on(&machine);
        // The next machine goes on from this one.
        first.take(&machine, "next", None, false);
        first.ends_well(&machine, &mut reader);
        for next in LOADS {
            let (machine, mut reader) = restored(&first.open("next", next));
            first.goes_on(&machine);
            first.ends_well(&machine, &mut reader);
        }
    }
}

#[test]
fn memory_that_is_copied_is_discarded_saved_and_forked_like_any_other() {
    require_kvm!();
    let first = Counting::snapshot(&config(1, "timer=deadline"));
    for (load, tracks) in [
        (MemoryLoad::Copy, false),
        (MemoryLoad::Copy, true),
        (MemoryLoad::CopyAll, false),
    ] {
        let snapshot = first.open("snap", load);
        let tracking = |config: &mut MachineConfig| config.track_dirty_pages = tracks;
        let (machine, mut reader) =
            restored_with(&snapshot, tracking).unwrap_or_else(|error| panic!("{error}"));
        first.goes_on(&machine);
        let beyond = GuestAddress(FREE.0 + MARK.len() as u64);
        let memory = machine.memory().expect("it runs");
        memory.write_slice(&MARK, beyond).expect("it is memory");
        discard(&machine, beyond);
        assert_eq!(memory.read_obj::<u64>(beyond).expect("it is memory"), 0);
        let pages = first.take(&machine, "diff", Some("snap"), false);
        assert!(pages > 0 && pages < (16 << 20) / PAGE, "{pages} pages");
        bantam_vmm::merge_snapshots(
            &SnapshotFiles::in_directory(&first.directory()),
            &[SnapshotFiles::in_directory(&first.path("diff"))],
            &SnapshotFiles::in_directory(&{
                let merged = first.path("merged");
                fs::create_dir_all(&merged).expect("there is room");
                merged
            }),
        )
        .unwrap_or_else(|error| panic!("{error}"));
        let (merged, mut merged_reader) = restored(&first.open("merged", MemoryLoad::Lazy));
        let mut found = vec![0; MARK.len()];
        let memory = merged.memory().expect("it is paused");
        memory.read_slice(&mut found, beyond).expect("it is memory");
        assert!(found[..PAGE as usize].iter().all(|byte| *byte == 0));
        assert!(found[PAGE as usize..] == MARK[PAGE as usize..]);
        first.goes_on(&merged);
        first.ends_well(&merged, &mut merged_reader);

        let (forked, _) = machine
            .fork(&SnapshotDisks::Overlays)
            .unwrap_or_else(|error| panic!("{error}"));
        let (child, mut child_reader) = restored(&forked);
        first.goes_on(&child);
        first.ends_well(&child, &mut child_reader);
        first.ends_well(&machine, &mut reader);
    }
}

#[test]
fn the_file_is_not_needed_any_more_when_all_has_been_copied() {
    require_kvm!();
    let first = Counting::snapshot(&config(1, "timer=deadline"));
    let (machine, mut reader) = restored(&first.open("snap", MemoryLoad::CopyAll));
    let memory = machine.memory().expect("it is paused");
    wait_until("all is copied", || !memory.is_missing_pages());
    let file = OpenOptions::new().write(true).open(first.memory_file());
    file.and_then(|file| file.set_len(0)).expect("it is a file");
    first.goes_on(&machine);
    first.ends_well(&machine, &mut reader);
}

#[test]
fn a_memory_file_that_is_cut_ends_the_machine_and_not_the_process() {
    require_kvm!();
    let first = Counting::snapshot(&config(1, "timer=deadline"));
    let (machine, _reader) = restored(&first.open("snap", MemoryLoad::Copy));
    let events = machine.subscribe().expect("there are descriptors");
    let file = OpenOptions::new().write(true).open(first.memory_file());
    file.and_then(|file| file.set_len(PAGE))
        .expect("it is a file");
    let begin = Instant::now();
    machine.resume().unwrap_or_else(|error| panic!("{error}"));
    let memory = machine.memory();
    let _ = memory.map(|memory| memory.read_obj::<u8>(FREE));
    let error = machine.wait().expect_err("it has no memory").to_string();
    assert!(begin.elapsed() < END_TIME);
    let path = first.memory_file().display().to_string();
    assert!(
        error.starts_with("the machine cannot go on without its memory: ") && error.contains(&path),
        "{error}"
    );
    let lost = std::iter::from_fn(|| events.try_next())
        .find(|event| matches!(event, Event::MemoryLost { .. }));
    assert_eq!(lost, Some(Event::MemoryLost { reason: error }));
}

#[test]
fn a_working_set_is_recorded_and_read_ahead() {
    require_kvm!();
    let first = Counting::snapshot(&config(1, "timer=deadline"));
    let file = first.path("snap/working-set");
    let mut sizes = Vec::new();
    for load in [MemoryLoad::Lazy, MemoryLoad::Copy] {
        let mut snapshot = first.open("snap", load);
        snapshot.record_working_set().expect("it has a directory");
        let (machine, mut reader) = restored(&snapshot);
        first.goes_on(&machine);
        let touched = machine.memory().expect("it runs").present_pages();
        first.ends_well(&machine, &mut reader);
        sizes.push(touched.expect("the host says it").len());
        assert!(file.exists());
        assert_eq!(first.open("snap", load).facts(), snapshot.facts());
    }
    // The pages of the second recording are those that the guest has touched.
    assert!(sizes[1] < 400, "{sizes:?} pages");
    for load in LOADS {
        let (machine, mut reader) = restored(&first.open("snap", load));
        let memory = machine.memory().expect("it is paused");
        wait_until("the working set is read", || {
            let present = memory.present_pages().expect("the host says it");
            present.len() >= sizes[1]
        });
        first.goes_on(&machine);
        first.ends_well(&machine, &mut reader);
    }
    // What is not the working set of this snapshot is left alone.
    for content in [&b"BANTAMSW"[..], b"", &[0xff; 5000]] {
        fs::write(&file, content).expect("it is a file");
        let (machine, mut reader) = restored(&first.open("snap", MemoryLoad::Lazy));
        first.goes_on(&machine);
        first.ends_well(&machine, &mut reader);
    }
    let mut snapshot = first.open("snap", MemoryLoad::Prefetch);
    snapshot.record_working_set().expect("it has a directory");
    let refused = restored_with(&snapshot, |_| {}).map(drop).unwrap_err();
    assert!(matches!(refused, Error::WorkingSet(_)), "{refused}");
}

#[test]
fn memory_of_huge_pages_is_filled_in_whole_pages() {
    require_kvm!();
    let first = Counting::snapshot(&config(1, "timer=deadline"));
    let pool = HugePagePool::try_new(8);
    for huge_pages in [HugePages::Transparent, HugePages::TwoMib] {
        if let (HugePages::TwoMib, Err(reason)) = (huge_pages, &pool) {
            eprintln!("skipped: {reason}");
            continue;
        }
        let (_server, socket) = first.server(Conduct::Serves);
        for snapshot in [
            first.open("snap", MemoryLoad::Copy),
            first.open("snap", MemoryLoad::CopyAll),
            first.open_served(&socket),
        ] {
            let change = |config: &mut MachineConfig| config.huge_pages = huge_pages;
            let (machine, mut reader) =
                restored_with(&snapshot, change).unwrap_or_else(|error| panic!("{error}"));
            first.goes_on(&machine);
            first.ends_well(&machine, &mut reader);
        }
    }
}

#[test]
fn another_program_serves_the_memory() {
    require_kvm!();
    let first = Counting::snapshot(&config(1, "timer=deadline"));
    for conduct in [Conduct::Serves, Conduct::HangsUp, Conduct::Talks] {
        for tracks in [false, true] {
            let (server, socket) = first.server(conduct);
            let tracking = |config: &mut MachineConfig| config.track_dirty_pages = tracks;
            let (machine, mut reader) = restored_with(&first.open_served(&socket), tracking)
                .unwrap_or_else(|error| panic!("{error}"));
            first.goes_on(&machine);
            let beyond = GuestAddress(FREE.0 + MARK.len() as u64);
            discard(&machine, beyond);
            let memory = machine.memory().expect("it runs");
            assert_eq!(memory.read_obj::<u64>(beyond).expect("it is memory"), 0);
            first.take(&machine, "diff", Some("snap"), false);
            first.take(&machine, "full", None, false);
            let (next, mut next_reader) = restored(&first.open("full", MemoryLoad::Lazy));
            first.goes_on(&next);
            first.ends_well(&next, &mut next_reader);
            let (forked, _) = machine
                .fork(&SnapshotDisks::Overlays)
                .unwrap_or_else(|error| panic!("{error}"));
            // All of its memory is elsewhere now.
            drop(server);
            let (child, mut child_reader) = restored(&forked);
            first.goes_on(&child);
            first.ends_well(&child, &mut child_reader);
            first.ends_well(&machine, &mut reader);
        }
    }
}

#[test]
fn a_machine_ends_when_the_program_that_serves_its_memory_does() {
    require_kvm!();
    let first = Counting::snapshot(&config(1, "timer=deadline"));
    for (conduct, goes_on) in [
        (Conduct::Serves, true),
        (Conduct::HangsUp, true),
        (Conduct::Serves, false),
    ] {
        let (server, socket) = first.server(conduct);
        let (machine, _reader) = restored(&first.open_served(&socket));
        let events = machine.subscribe().expect("there are descriptors");
        if goes_on {
            first.goes_on(&machine);
        }
        let begin = Instant::now();
        server.signal(Signal::SIGKILL);
        let error = machine.wait().expect_err("it has no memory").to_string();
        assert!(begin.elapsed() < END_TIME, "{:?}", begin.elapsed());
        let expected = format!("the program at '{}' has ended", socket.display());
        assert!(error.starts_with(&expected), "{error}");
        let lost = std::iter::from_fn(|| events.try_next())
            .find(|event| matches!(event, Event::MemoryLost { .. }));
        assert_eq!(lost, Some(Event::MemoryLost { reason: error }));
    }

    // It dies before it has filled the first page.
    let (server, socket) = first.server(Conduct::Takes);
    let snapshot = first.open_served(&socket);
    let restoring = thread::spawn(move || restored_with(&snapshot, |_| {}).map(drop));
    thread::sleep(Duration::from_millis(300));
    assert!(!restoring.is_finished());
    server.signal(Signal::SIGKILL);
    let error = restoring.join().expect("it does not panic");
    let error = error.expect_err("it has no memory").to_string();
    assert!(error.contains("has ended"), "{error}");
}

#[test]
fn a_machine_whose_memory_does_not_come_can_be_stopped() {
    require_kvm!();
    let first = Counting::snapshot(&config(1, "timer=deadline"));
    let (server, socket) = first.server(Conduct::Serves);
    let (machine, _reader) = restored(&first.open_served(&socket));
    server.signal(Signal::SIGSTOP);
    machine.resume().unwrap_or_else(|error| panic!("{error}"));
    thread::sleep(Duration::from_millis(300));
    assert_eq!(machine.state(), State::Running);
    machine.configuration().expect("this needs no memory");
    let begin = Instant::now();
    machine.stop();
    let reason = machine.wait_within(END_TIME).expect("it has not failed");
    assert_eq!(reason, Some(ExitReason::Stopped), "{:?}", begin.elapsed());

    // The same while the machine is being built.
    let (_server, socket) = first.server(Conduct::Takes);
    let (machine, _reader) = configured(first.open("snap", MemoryLoad::Lazy).config());
    let restoring = {
        let (machine, snapshot) = (machine.clone(), first.open_served(&socket));
        thread::spawn(move || drop(machine.restore(&snapshot)))
    };
    thread::sleep(Duration::from_millis(300));
    assert_eq!(machine.state(), State::Starting);
    machine.stop();
    let reason = machine.wait_within(END_TIME).expect("it has not failed");
    assert_eq!(reason, Some(ExitReason::Stopped));
    restoring.join().expect("it does not panic");
}

#[test]
fn a_program_that_does_not_take_the_request_is_named() {
    require_kvm!();
    let first = Counting::snapshot(&config(1, "timer=deadline"));
    let refused = |socket: &Path| {
        let begin = Instant::now();
        let refused = restored_with(&first.open_served(socket), |_| {}).map(drop);
        let error = refused.expect_err("nobody serves its memory");
        assert!(begin.elapsed() < Duration::from_secs(8));
        error.to_string()
    };
    let none = first.path("none.sock");
    let start = format!("cannot connect to '{}'", none.display());
    let error = refused(&none);
    assert!(
        error.starts_with(&start) && error.ends_with("start that program first"),
        "{error}"
    );
    // Nobody listens any more.
    drop(UnixListener::bind(&none).expect("the name is free"));
    let error = refused(&none);
    assert!(
        error.starts_with(&start) && error.contains("refused"),
        "{error}"
    );
    let (_server, socket) = first.server(Conduct::Ignores);
    let error = refused(&socket);
    assert!(error.contains("has not taken the request"), "{error}");
}

#[test]
fn the_command_line_offers_all_ways() {
    require_kvm!();
    let first = Counting::snapshot(&config(1, "timer=deadline"));
    let restore = |how: &str| {
        Bantam::new(["restore"])
            .argument(first.directory())
            .option("--memory-load", how)
    };
    let control = |command: &str| {
        let mut arguments = vec!["control".to_owned()];
        arguments.push(first.path("control.sock").display().to_string());
        arguments.push(command.to_owned());
        Bantam::new(arguments).finish()
    };
    let (_server, socket) = first.server(Conduct::Serves);
    let uffd = format!("uffd={}", socket.display());
    for how in ["lazy", "prefetch", "copy", "copy-all", &uffd] {
        let running = restore(how)
            .option("--control", first.path("control.sock"))
            .start();
        wait_until("it runs", || first.path("control.sock").exists());
        wait_until("it runs", || control("query").text().contains("running"));
        control("stop").succeeded();
        running.wait().has_status(STATUS_POWER_CUT);
    }
    // A program that stalls.
    let (server, socket) = first.server(Conduct::Serves);
    let uffd = format!("uffd={}", socket.display());
    let running = restore(&uffd)
        .option("--control", first.path("control.sock"))
        .argument("--paused")
        .start();
    wait_until("it is there", || first.path("control.sock").exists());
    wait_until("it is paused", || {
        control("query").text().contains("paused")
    });
    server.signal(Signal::SIGSTOP);
    control("resume").succeeded();
    control("query").succeeded().printed("running");
    let begin = Instant::now();
    control("stop").succeeded();
    running.wait().has_status(STATUS_POWER_CUT);
    assert!(begin.elapsed() < END_TIME + Duration::from_secs(1));
    let (_server, socket) = first.server(Conduct::Takes);
    let running = restore(&format!("uffd={}", socket.display())).start();
    thread::sleep(Duration::from_millis(500));
    let begin = Instant::now();
    running.signal(Signal::SIGTERM);
    running.wait().has_status(STATUS_POWER_CUT);
    assert!(begin.elapsed() < END_TIME + Duration::from_secs(1));

    let ended = restore(&format!("uffd={}", first.path("none").display())).finish();
    let line = ended.has_status(STATUS_ERROR).failed_with_one_line();
    assert!(line.contains("start that program first"), "{line}");
    let ended = restore("quickly").finish();
    assert!(
        ended
            .failed_with_one_line()
            .contains("copy-all or uffd=SOCKET")
    );
    let ended = restore(&uffd).argument("--record-working-set").finish();
    assert!(
        ended
            .failed_with_one_line()
            .contains("another program serves")
    );
}

#[test]
fn the_api_loads_memory_that_another_program_serves() {
    require_kvm!();
    let folder = tempfile::tempdir().expect("there is room");
    let path = |name: &str| folder.path().join(name);
    let machine = ApiMachine::new();
    machine.boot("hello", "finish=hang");
    machine.api.act("InstanceStart");
    machine.running.wait_for_output("PASS");
    machine.api.patch("/vm", &json!({"state": "Paused"}));
    let create = json!({"snapshot_path": path("state"), "mem_file_path": path("memory")});
    machine.api.put("/snapshot/create", &create);
    machine.kill();

    let load = |socket: &Path| -> Value {
        let backend = json!({"backend_type": "Uffd", "backend_path": socket});
        json!({"snapshot_path": path("state"), "mem_backend": backend, "resume_vm": true})
    };
    let socket = path("pages.sock");
    let machine = ApiMachine::new();
    let refused = machine.refused("PUT", "/snapshot/load", &load(&socket));
    let expected = format!(
        "Load snapshot error: Failed to restore from snapshot: Failed to load guest memory: Error creating guest memory \
         from uffd: cannot connect to '{}'",
        socket.display()
    );
    assert!(refused.starts_with(&expected), "{refused}");
    // It can be loaded all the same.
    let server = PageServer::start(&socket, &path("memory"), Conduct::Serves);
    machine.api.put("/snapshot/load", &load(&socket));
    assert_eq!(machine.api.get("/")["state"], "Running");
    machine.api.patch("/vm", &json!({"state": "Paused"}));
    let create = json!({
        "snapshot_type": "Diff", "snapshot_path": path("state2"), "mem_file_path": path("memory2"),
    });
    machine.api.put("/snapshot/create", &create);
    machine.api.patch("/vm", &json!({"state": "Resumed"}));
    server.signal(Signal::SIGKILL);
    let ended = machine.running.wait();
    let error = ended.failed();
    assert!(
        error.contains("has ended, and guest memory with it"),
        "{error}"
    );
}
