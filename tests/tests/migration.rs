//! Machines that move to others while they run.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use bantam_tests::counting::{
    Counters, STOP, config, counting, random_time, rounds, wait_until, wait_until_gone_on,
};
use bantam_tests::{
    Bantam, Ended, Running, Traveller, arrive, memory_folder, payload, qemu_img, require_kvm,
};
use bantam_vmm::config::{MachineConfig, SerialConfig, VsockConfig};
use bantam_vmm::{
    Arrival, AtTimeout, Controller, Error, ExitReason, MigrationConnection, MigrationOptions, State,
};
use nix::pty::openpty;
use nix::sys::signal::Signal;

/// How long anything may take that is waited for.
const PATIENCE: Duration = Duration::from_secs(20);

fn connection(stream: UnixStream) -> MigrationConnection {
    MigrationConnection::new(stream).expect("it is a socket")
}

/// Returns the configuration of a machine that runs `kernel`, with a disk in `folder`.
fn with_disk(kernel: &str, words: &str, folder: &Path, qcow2: bool, option: &str) -> MachineConfig {
    let image = folder.join(if qcow2 { "disk.qcow2" } else { "disk" });
    match qcow2 {
        true => {
            qemu_img(&["create", "-q", "-f", "qcow2"], &[&image, Path::new("4M")]);
        }
        false => {
            let made = File::create(&image).and_then(|file| file.set_len(4 << 20));
            made.expect("there is room");
        }
    }
    let mut config = MachineConfig::new(payload(kernel));
    config.memory = "32M".parse().expect("this is a size");
    config.append = Some(format!("{words} finish=poweroff"));
    let disk = format!("{}{option}", image.display());
    config.disks = vec![disk.parse().expect("it is a disk")];
    config
}

/// Lets a guest move from machine to machine, at random moments.
fn travel(traveller: &mut Traveller) {
    let options = MigrationOptions::default();
    while traveller.moves() < rounds() {
        let Some(migrated) = traveller.migrate_on(&options) else {
            break;
        };
        assert!(migrated.sent > 0 && migrated.rounds > 0, "{migrated:?}");
        thread::sleep(random_time());
    }
    let moves = traveller.moves();
    println!("{moves} moves, at most {:?}", traveller.longest_pause());
    assert!(moves > 2, "{moves}");
}

#[test]
fn requests_to_a_disk_are_neither_lost_nor_repeated() {
    require_kvm!();
    for (qcow2, option) in [
        (false, ""),
        (false, ",engine=io_uring"),
        (false, ",cache=none"),
        (true, ""),
        (true, ",engine=sync"),
    ] {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("there is room");
        let operations = rounds() * 6000;
        let words = format!(
            "test=block mode=mixed pattern=random verify seed=7 depth=256 operations={operations}"
        );
        let config = with_disk("load", &words, folder.path(), qcow2, option);
        let mut traveller = Traveller::start(config, folder.path());
        travel(&mut traveller);
        let text = traveller.passed();
        assert!(text.contains("\"errors\":0"), "{text}");
        if qcow2 {
            qemu_img(&["check", "-q"], &[&folder.path().join("disk.qcow2")]);
        }
    }
}

#[test]
fn a_driver_of_each_device_goes_on_in_another_machine() {
    require_kvm!();
    let folder = memory_folder();
    let words = format!("rounds={} block-test=write", rounds().div_ceil(2));
    let mut config = with_disk("devices", &words, folder.path(), false, "");
    config.console = SerialConfig::File(folder.path().join("console"));
    config.vsock = Some(VsockConfig {
        cid: 3.try_into().expect("a guest can have it"),
        socket: folder.path().join("vsock"),
    });
    config.balloon = Some("size=1M".parse().expect("it is a balloon"));
    let mut traveller = Traveller::start(config, folder.path());
    travel(&mut traveller);
    traveller.passed();
}

/// Moves a machine that counts in registers, memory, by a device and by interrupts from machine to machine.
fn count_on(config: &MachineConfig) {
    let folder = memory_folder();
    let (mut machine, _reader, counters) = counting(config);
    let cpus = u64::from(config.cpus.get());
    for number in 1..=rounds() {
        let memory = machine.memory().expect("it runs");
        let before = counters.processors(&memory, cpus);
        wait_until_gone_on(counters, &memory, &before);
        drop(memory);
        thread::sleep(random_time());
        let (source, receiver) = both_ends(&machine, folder.path(), number);
        let moved = source.join().expect("it does not panic");
        moved.unwrap_or_else(|error| panic!("{error}"));
        machine = receiver
            .join()
            .expect("it does not panic")
            .unwrap_or_else(|error| panic!("{error}"));
        let memory = machine.memory().expect("it runs");
        let arrived = counters.processors(&memory, cpus);
        for (now, before) in arrived.iter().zip(&before) {
            assert!(now.is_at_or_after(before), "{now:?} {before:?}");
        }
        wait_until_gone_on(counters, &memory, &arrived);
    }
    counters.set(&machine.memory().expect("it runs"), STOP);
    let reason = machine.wait().unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(reason, ExitReason::PowerOff);
    let text = fs::read_to_string(folder.path().join(format!("log{}", rounds())));
    assert!(text.expect("it was written").ends_with("PASS\n"));
}

type Ends = (
    JoinHandle<Result<(), Error>>,
    JoinHandle<Result<Controller, Error>>,
);

/// Begins to move `machine` to another one of this process.
fn both_ends(machine: &Controller, folder: &Path, number: usize) -> Ends {
    let (ours, theirs) = UnixStream::pair().expect("there are descriptors");
    ends_of(machine, ours, theirs, folder, number)
}

fn ends_of(
    machine: &Controller,
    ours: UnixStream,
    theirs: UnixStream,
    folder: &Path,
    number: usize,
) -> Ends {
    let (machine, folder) = (machine.clone(), folder.to_path_buf());
    let send = move || {
        let moved = machine.migrate(connection(ours), &MigrationOptions::default());
        moved.map(drop)
    };
    let receive = move || arrive(connection(theirs), &folder, number, None);
    (thread::spawn(send), thread::spawn(receive))
}

#[test]
fn a_machine_counts_on() {
    require_kvm!();
    count_on(&config(1, "timer=deadline pages=256"));
}

#[test]
fn a_machine_with_four_processors_counts_on() {
    require_kvm!();
    count_on(&config(4, "timer=local second=at-once others=3 pages=64"));
}

/// Passes on what comes from `from`, but at most `limit` bytes, and then cuts both connections.
fn relay(mut from: UnixStream, mut to: UnixStream, limit: usize) -> JoinHandle<usize> {
    thread::spawn(move || {
        let mut bytes = [0; 1 << 16];
        let mut passed = 0;
        while passed < limit {
            let room = bytes.len().min(limit - passed);
            match from.read(&mut bytes[..room]) {
                Ok(count) if count > 0 && to.write_all(&bytes[..count]).is_ok() => passed += count,
                _ => break,
            }
        }
        let _ = from.shutdown(Shutdown::Both);
        let _ = to.shutdown(Shutdown::Both);
        passed
    })
}

/// Passes on what comes from `from`, a few MiB a second.
fn slow_relay(from: UnixStream, to: UnixStream) -> JoinHandle<()> {
    relay_chunks(from, to, 1 << 14)
}

/// Passes on what comes from `from`, at most `size` bytes in a millisecond.
fn relay_chunks(mut from: UnixStream, mut to: UnixStream, size: usize) -> JoinHandle<()> {
    thread::spawn(move || {
        let mut bytes = vec![0; size];
        while let Ok(count @ 1..) = from.read(&mut bytes) {
            thread::sleep(Duration::from_millis(1));
            if to.write_all(&bytes[..count]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Both);
    })
}

/// Waits until the machine counts, or fails.
fn counts(machine: &Controller, counters: Counters) {
    let memory = machine.memory().expect("it is there");
    let before = counters.processors(&memory, 1);
    wait_until_gone_on(counters, &memory, &before);
}

/// Moves a machine over a connection that is cut after a number of bytes in each direction. Returns those that have
/// passed, and whether the machine has moved.
fn move_over_cut(limits: [usize; 2]) -> ([usize; 2], bool) {
    let folder = memory_folder();
    let image = folder.path().join("disk");
    let made = File::create(&image).and_then(|file| file.set_len(1 << 20));
    made.expect("there is room");
    let mut config = config(1, "timer=deadline");
    config.disks = vec![image.display().to_string().parse().expect("it is a disk")];
    let (machine, _reader, counters) = counting(&config);
    let (ours, near) = UnixStream::pair().expect("there are descriptors");
    let (theirs, far) = UnixStream::pair().expect("there are descriptors");
    let clone = |it: &UnixStream| it.try_clone().expect("there are descriptors");
    let relays = [
        relay(clone(&near), clone(&far), limits[0]),
        relay(far, near, limits[1]),
    ];
    let (source, receiver) = ends_of(&machine, ours, theirs, folder.path(), 1);
    let moved = source.join().expect("it does not panic");
    let arrived = receiver.join().expect("it does not panic");
    let passed = relays.map(|it| it.join().expect("it does not panic"));
    match (moved, arrived) {
        (Ok(()), Ok(there)) => {
            counts(&there, counters);
            assert_eq!(machine.state(), State::Stopped);
            (passed, true)
        }
        (Err(Error::HandOver(_)), Ok(there)) => {
            counts(&there, counters);
            // Nobody lets the other go on as long as this one has the disk.
            assert_eq!(machine.state(), State::Paused);
            let refused = machine.resume().expect_err("it may run elsewhere");
            assert!(matches!(refused, Error::HandedOver { .. }), "{refused}");
            let refused = machine.take_back().expect_err("the disk is in use");
            assert!(refused.to_string().contains("disk"), "{refused}");
            (passed, true)
        }
        (Err(Error::HandOver(_)), Err(_)) => {
            assert_eq!(machine.state(), State::Paused);
            machine
                .take_back()
                .unwrap_or_else(|error| panic!("{error}"));
            counts(&machine, counters);
            (passed, false)
        }
        (Err(_), Err(_)) => {
            assert_eq!(machine.state(), State::Running);
            counts(&machine, counters);
            (passed, false)
        }
        (moved, arrived) => panic!("{moved:?} {:?}", arrived.err()),
    }
}

#[test]
fn wherever_the_connection_is_cut_exactly_one_machine_runs() {
    require_kvm!();
    let (all, moved) = move_over_cut([usize::MAX; 2]);
    assert!(moved);
    println!("{all:?} bytes");
    // Answers are short: each byte of them.
    for limit in 0..all[1] {
        let (_, moved) = move_over_cut([usize::MAX, limit]);
        // Without all answers before the last, of which there are more if there are more rounds, the source keeps it.
        assert!(!moved || limit + 8 >= all[1], "{limit}");
    }
    // What the source sends varies, as the machine runs. Its last message has 9 bytes.
    let points = (0..40).chain((1..20).map(|part| all[0] * part / 20));
    for limit in points.chain(all[0].saturating_sub(30)..all[0]) {
        move_over_cut([limit, usize::MAX]);
    }
}

#[test]
fn a_machine_that_cannot_run_at_the_other_end_goes_on_where_it_is() {
    require_kvm!();
    let folder = memory_folder();
    let (machine, _reader, counters) = counting(&config(1, "timer=deadline"));
    let (ours, theirs) = UnixStream::pair().expect("there are descriptors");
    let refuse = thread::spawn(move || {
        let arrival = Arrival::new(connection(theirs)).expect("it is offered");
        arrival.refuse("there is no room");
    });
    let refused = machine
        .migrate(connection(ours), &MigrationOptions::default())
        .expect_err("it is refused");
    assert!(
        refused.to_string().contains("there is no room"),
        "{refused}"
    );
    refuse.join().expect("it does not panic");
    counts(&machine, counters);

    // A machine of another size.
    let (ours, theirs) = UnixStream::pair().expect("there are descriptors");
    let receive = thread::spawn(move || {
        let arrival = Arrival::new(connection(theirs)).expect("it is offered");
        let mut config = arrival.config().clone();
        config.memory = "33M".parse().expect("it is a size");
        config.serial = SerialConfig::None;
        let there = Controller::new().expect("there are descriptors");
        there.configure(config).expect("it is valid");
        (arrival.receive(&there), there.state())
    });
    let refused = machine
        .migrate(connection(ours), &MigrationOptions::default())
        .expect_err("it is refused");
    let (received, state) = receive.join().expect("it does not panic");
    let reason = received.expect_err("it does not fit").to_string();
    assert!(reason.contains("33 MiB"), "{reason}");
    assert!(refused.to_string().contains("33 MiB"), "{refused}");
    assert_eq!(state, State::Stopped);
    counts(&machine, counters);

    // It can be moved all the same.
    let (source, receiver) = both_ends(&machine, folder.path(), 1);
    source.join().expect("it does not panic").expect("it moves");
    let there = receiver
        .join()
        .expect("it does not panic")
        .expect("it arrives");
    counts(&there, counters);
}

#[test]
fn a_migration_is_cancelled_at_any_moment() {
    require_kvm!();
    let (machine, _reader, counters) = counting(&config(1, "timer=deadline"));
    for wait in [0, 1, 5, 20] {
        // The other end greets, and then takes nothing.
        let (ours, theirs) = UnixStream::pair().expect("there are descriptors");
        let mut greeting = b"BANTAMMG".to_vec();
        greeting.extend(3_u32.to_le_bytes());
        (&theirs).write_all(&greeting).expect("there is room");
        let source = thread::spawn({
            let machine = machine.clone();
            move || machine.migrate(connection(ours), &MigrationOptions::default())
        });
        thread::sleep(Duration::from_millis(wait));
        let begun = Instant::now();
        while !source.is_finished() {
            assert!(begun.elapsed() < PATIENCE, "it goes on");
            machine.cancel_migration();
            thread::sleep(Duration::from_millis(1));
        }
        let error = source
            .join()
            .expect("it does not panic")
            .expect_err("it is cancelled");
        assert!(error.to_string().contains("cancelled"), "{error}");
        counts(&machine, counters);
    }
}

#[test]
fn a_paused_machine_arrives_paused() {
    require_kvm!();
    let folder = memory_folder();
    let (machine, _reader, counters) = counting(&config(1, "timer=deadline"));
    machine.pause().expect("it can be paused");
    let (source, receiver) = both_ends(&machine, folder.path(), 1);
    source.join().expect("it does not panic").expect("it moves");
    let there = receiver
        .join()
        .expect("it does not panic")
        .expect("it arrives");
    assert_eq!(there.state(), State::Paused);
    there.resume().expect("it can go on");
    counts(&there, counters);
}

#[test]
fn a_guest_that_writes_faster_than_it_is_copied_stays_or_stands_still() {
    require_kvm!();
    let folder = memory_folder();
    let (machine, _reader, counters) = counting(&config(1, "timer=deadline pages=256"));
    let mut options = MigrationOptions {
        downtime: Duration::ZERO,
        timeout: Duration::from_millis(200),
        max_throttle: 0,
        ..MigrationOptions::default()
    };
    let attempt = |options: &MigrationOptions, number| {
        let (ours, near) = UnixStream::pair().expect("there are descriptors");
        let (theirs, far) = UnixStream::pair().expect("there are descriptors");
        let clone = |it: &UnixStream| it.try_clone().expect("there are descriptors");
        slow_relay(clone(&near), clone(&far));
        slow_relay(far, near);
        let folder = folder.path().to_path_buf();
        let receiver = thread::spawn(move || arrive(connection(theirs), &folder, number, None));
        let moved = machine.migrate(connection(ours), options);
        (moved, receiver.join().expect("it does not panic"))
    };
    let (stays, refused) = attempt(&options, 1);
    let error = stays.expect_err("there is always something left");
    assert!(matches!(error, Error::Converge { .. }), "{error}");
    let reason = refused.err().expect("it stays").to_string();
    assert!(reason.contains("writes to its memory"), "{reason}");
    counts(&machine, counters);
    options.at_timeout = AtTimeout::Stop;
    let (moved, there) = attempt(&options, 2);
    assert!(moved.expect("it moves").rounds > 1);
    counts(&there.unwrap_or_else(|error| panic!("{error}")), counters);
}

#[test]
fn others_see_how_far_a_migration_is() {
    require_kvm!();
    let folder = memory_folder();
    let (machine, _reader, counters) = counting(&config(1, "timer=deadline pages=64"));
    assert_eq!(machine.migration_progress(), None);
    let (ours, near) = UnixStream::pair().expect("there are descriptors");
    let (theirs, far) = UnixStream::pair().expect("there are descriptors");
    let clone = |it: &UnixStream| it.try_clone().expect("there are descriptors");
    slow_relay(clone(&near), clone(&far));
    slow_relay(far, near);
    let (source, receiver) = ends_of(&machine, ours, theirs, folder.path(), 1);
    let mut seen = Vec::new();
    while !source.is_finished() {
        seen.extend(machine.migration_progress());
        thread::sleep(Duration::from_millis(2));
    }
    source.join().expect("it does not panic").expect("it moves");
    assert_eq!(machine.migration_progress(), None);
    let there = receiver.join().expect("it does not panic");
    counts(&there.unwrap_or_else(|error| panic!("{error}")), counters);

    assert!(seen.len() > 2, "{seen:?}");
    for pair in seen.windows(2) {
        assert!(pair[0].time <= pair[1].time, "{pair:?}");
        assert!(pair[0].rounds <= pair[1].rounds, "{pair:?}");
        assert!(pair[0].sent <= pair[1].sent, "{pair:?}");
        if pair[0].rounds == pair[1].rounds {
            assert!(pair[0].remaining >= pair[1].remaining, "{pair:?}");
        }
    }
    assert!(seen.iter().all(|it| it.remaining <= 16 << 20), "{seen:?}");
    let is_sending = |it: &&bantam_vmm::MigrationProgress| it.rounds > 0 && it.remaining > 0;
    assert!(seen.iter().any(|it| is_sending(&it)), "{seen:?}");
    let last = seen.last().expect("there are some");
    assert!(last.sent > 1 << 18 && last.rate > 1 << 16, "{last:?}");
    assert!(last.expected_downtime.is_some(), "{last:?}");
}

/// Moves `machine` to another, and has `look` see the kind of each message of the receiver before the source gets it.
fn both_ends_watched(
    machine: &Controller,
    folder: &Path,
    number: usize,
    mut look: impl FnMut(u32) + Send + 'static,
) -> Ends {
    let (ours, mut near) = UnixStream::pair().expect("there are descriptors");
    let (theirs, mut far) = UnixStream::pair().expect("there are descriptors");
    let clone = |it: &UnixStream| it.try_clone().expect("there are descriptors");
    relay(clone(&near), clone(&far), usize::MAX);
    thread::spawn(move || -> std::io::Result<()> {
        let mut greeting = [0; 12];
        far.read_exact(&mut greeting)?;
        near.write_all(&greeting)?;
        loop {
            let mut head = [0; 8];
            far.read_exact(&mut head)?;
            look(u32::from_le_bytes([head[0], head[1], head[2], head[3]]));
            near.write_all(&head)?;
        }
    });
    ends_of(machine, ours, theirs, folder, number)
}

const ACCEPTED: u32 = 2;
const READY: u32 = 8;

#[test]
fn nobody_lets_a_machine_run_between_its_last_state_and_its_hand_over() {
    require_kvm!();
    let folder = memory_folder();
    let (mut machine, _reader, counters) = counting(&config(1, "timer=deadline"));
    let mut refusals = 0;
    for number in 1..=rounds() {
        let (tell, told) = mpsc::channel();
        let look = move |kind| {
            if kind == READY {
                // The test may have ended.
                let _ = tell.send(());
                thread::sleep(Duration::from_millis(1));
            }
        };
        let (source, receiver) = both_ends_watched(&machine, folder.path(), number, look);
        told.recv_timeout(PATIENCE).expect("it arrives");
        while !source.is_finished() {
            let refused = machine.resume();
            assert!(refused.is_err(), "it runs at both ends");
            refusals += 1;
        }
        let moved = source.join().expect("it does not panic");
        moved.unwrap_or_else(|error| panic!("{error}"));
        let there = receiver.join().expect("it does not panic");
        machine = there.unwrap_or_else(|error| panic!("{error}"));
        counts(&machine, counters);
    }
    assert!(refusals > rounds(), "{refusals}");
}

#[test]
fn a_machine_that_is_resumed_while_it_is_offered_arrives_with_all_pages() {
    require_kvm!();
    let folder = memory_folder();
    let (machine, _reader, counters) = counting(&config(1, "timer=deadline pages=256"));
    let memory = machine.memory().expect("it runs");
    machine.pause().expect("it can be paused");
    let look = {
        let machine = machine.clone();
        move |kind| {
            if kind == ACCEPTED {
                machine.resume().expect("it is paused");
                counts(&machine, counters);
            }
        }
    };
    let (source, receiver) = both_ends_watched(&machine, folder.path(), 1, look);
    let moved = source.join().expect("it does not panic");
    moved.unwrap_or_else(|error| panic!("{error}"));
    let there = receiver.join().expect("it does not panic");
    let there = there.unwrap_or_else(|error| panic!("{error}"));
    let arrived = there.memory().expect("it is there");
    assert_eq!(
        counters.processors(&arrived, 1),
        counters.processors(&memory, 1)
    );
    there.resume().expect("it arrives as it was: paused");
    // Each page has what its counter says, or this fails.
    counts(&there, counters);
}

/// Returns how often a machine with one processor counts in a second.
fn speed(machine: &Controller, counters: Counters) -> f64 {
    let memory = machine.memory().expect("it runs");
    let count = || counters.processors(&memory, 1)[0].count;
    let (begun, before) = (Instant::now(), count());
    thread::sleep(Duration::from_millis(100));
    (count() - before) as f64 / begun.elapsed().as_secs_f64()
}

#[test]
fn a_guest_that_writes_too_fast_is_slowed_down_until_it_can_move() {
    require_kvm!();
    let folder = memory_folder();
    let (machine, _reader, counters) = counting(&config(1, "timer=deadline pages=256"));
    let begin = |downtime, size, number| {
        let (ours, near) = UnixStream::pair().expect("there are descriptors");
        let (theirs, far) = UnixStream::pair().expect("there are descriptors");
        let clone = |it: &UnixStream| it.try_clone().expect("there are descriptors");
        relay_chunks(clone(&near), clone(&far), size);
        relay_chunks(far, near, size);
        let folder = folder.path().to_path_buf();
        let receiver = thread::spawn(move || arrive(connection(theirs), &folder, number, None));
        let options = MigrationOptions {
            downtime,
            ..MigrationOptions::default()
        };
        let machine = machine.clone();
        let source = thread::spawn(move || machine.migrate(connection(ours), &options));
        (source, receiver)
    };
    // The host may be busy: the fastest that it was seen before, and the slowest that it is afterwards.
    let speeds = || [(); 4].map(|()| speed(&machine, counters));
    let before = speeds().into_iter().fold(0.0, f64::max);
    // A round takes so long that the guest writes to all its pages even if it runs for a tenth of the time.
    let (source, receiver) = begin(Duration::ZERO, 1 << 12, 1);
    wait_until("it is slow", || {
        let progress = machine.migration_progress();
        progress.is_some_and(|it| it.throttle >= 70)
    });
    let slowed = speeds().into_iter().fold(f64::MAX, f64::min);
    assert!(slowed < 0.5 * before, "{slowed} of {before}");
    // A machine that is slowed down can be paused.
    machine.pause().expect("it runs");
    machine.resume().expect("it is paused");
    machine.cancel_migration();
    let cancelled = source.join().expect("it does not panic");
    cancelled.expect_err("it is cancelled");
    drop(receiver.join().expect("it does not panic"));
    assert_eq!(machine.migration_progress(), None);
    counts(&machine, counters);
    wait_until("it has all its time again", || {
        speed(&machine, counters) > 2.0 * slowed
    });

    let (source, receiver) = begin(Duration::from_millis(30), 1 << 14, 2);
    let migrated = source.join().expect("it does not panic");
    let migrated = migrated.unwrap_or_else(|error| panic!("{error}"));
    assert!((20..=99).contains(&migrated.throttle), "{migrated:?}");
    let there = receiver.join().expect("it does not panic");
    let there = there.unwrap_or_else(|error| panic!("{error}"));
    counts(&there, counters);
}

/// A machine in a process of its own, whose guest ends well once it has moved.
struct Source {
    running: Running,
    folder: tempfile::TempDir,
}

impl Source {
    fn start(bantam: Bantam) -> Source {
        Source::start_until("generation ", bantam)
    }

    /// The same for a guest that prints `text` when it is ready.
    fn start_until(text: &str, bantam: Bantam) -> Source {
        let folder = tempfile::tempdir().expect("there is room");
        let socket = folder.path().join("source.sock");
        let running = bantam.option("--control", &socket).start();
        running.wait_for_output(text);
        Source { running, folder }
    }

    fn receive(&self, address: &str) -> Bantam {
        Bantam::new(["migrate", "--receive", address])
    }

    fn migrate(&self, address: &str) -> Ended {
        Bantam::new(["migrate"])
            .argument(self.folder.path().join("source.sock"))
            .argument(address)
            .finish()
    }
}

#[test]
fn a_machine_moves_to_another_process() {
    require_kvm!();
    let source = Source::start(Bantam::payload("generation"));
    let socket = source.folder.path().join("move.sock");
    let address = format!("unix:{}", socket.display());
    let nobody = source.migrate(&address);
    let error = nobody.failed_with_one_line();
    assert!(error.contains("bantam migrate --receive"), "{error}");

    let receiver = source.receive("tcp://127.0.0.1:0").start();
    let line = receiver.wait_for_error("waiting at tcp://127.0.0.1:");
    let address = line.split_whitespace().last().expect("it is not empty");
    let moved = source.migrate(address);
    moved.has_status(0);
    assert!(
        moved.text().contains("the guest stood still for"),
        "{moved}"
    );
    source.running.wait().has_status(0);
    receiver.wait().passed();
}

/// Passes what comes at one Unix socket on to another, a few MiB a second, once.
fn slow_relay_between(from: &Path, to: &Path) {
    let listener = UnixListener::bind(from).expect("it is a new path");
    let to = to.to_path_buf();
    thread::spawn(move || {
        let (near, _) = listener.accept().expect("the source connects");
        let far = UnixStream::connect(to).expect("the receiver listens");
        let clone = |it: &UnixStream| it.try_clone().expect("there are descriptors");
        slow_relay(clone(&near), clone(&far));
        slow_relay(far, near);
    });
}

#[test]
fn a_terminal_shows_how_far_a_migration_is() {
    require_kvm!();
    let guest = Bantam::payload("count").append("timer=deadline pages=256");
    let source = Source::start_until("counting at ", guest);
    let path = |name: &str| source.folder.path().join(name);
    let receiver = source.receive(&format!("unix:{}", path("move.sock").display()));
    let receiver = receiver.start();
    wait_until("it listens", || path("move.sock").exists());
    slow_relay_between(&path("slow.sock"), &path("move.sock"));
    let ask = || {
        Bantam::new(["migrate", "--progress", "--output", "json"])
            .argument(path("source.sock"))
            .finish()
    };
    assert_eq!(ask().text(), "null\n");
    let terminal = openpty(None, None).expect("there are pseudoterminals");
    let migration = Bantam::new(["migrate", "--output", "json", "--downtime", "1ms"])
        .option("--timeout", "1s")
        .option("--at-timeout", "stop")
        .argument(path("source.sock"))
        .argument(format!("unix:{}", path("slow.sock").display()))
        .stderr(terminal.slave)
        .start();
    let mut progress = serde_json::Value::Null;
    wait_until("memory is sent", || {
        let asked = ask();
        progress = serde_json::from_str(&asked.text()).expect("it is JSON");
        progress["sent"].as_u64() > Some(0)
    });
    assert!(progress["rounds"].as_u64() > Some(0), "{progress}");
    let migrated = migration.wait();
    let summary: serde_json::Value = serde_json::from_str(&migrated.text()).expect("it is JSON");
    for key in ["time", "downtime", "sent", "rounds"] {
        assert!(!summary[key].is_null(), "{summary}");
    }
    let mut shown = [0; 1 << 14];
    let count = nix::unistd::read(&terminal.master, &mut shown).expect("it was written to");
    let shown = String::from_utf8_lossy(&shown[..count]);
    assert!(shown.contains("MiB/s"), "{shown:?}");
    assert!(shown.ends_with("\r\u{1b}[K"), "{shown:?}");
    source.running.wait().has_status(0);
    receiver.signal(Signal::SIGTERM);
    receiver.wait();
}

#[test]
fn a_machine_stays_if_the_receiver_cannot_run_it_or_is_killed() {
    require_kvm!();
    let folder = tempfile::tempdir().expect("there is room");
    let image = folder.path().join("disk");
    let made = File::create(&image).and_then(|file| file.set_len(1 << 20));
    made.expect("there is room");
    let bantam = Bantam::payload("generation").disk(&image, "");
    let source = Source::start(bantam);
    let address = format!("unix:{}", source.folder.path().join("move.sock").display());
    let is_there = || source.folder.path().join("move.sock").exists();

    let receiver = source.receive(&address);
    let receiver = receiver.option("--disk", "disk0=/nowhere/disk").start();
    wait_until("it listens", is_there);
    let error = source.migrate(&address);
    let error = error.failed_with_one_line();
    assert!(
        error.contains("cannot find disk '/nowhere/disk'"),
        "{error}"
    );
    let ended = receiver.wait();
    let error = ended.failed_with_one_line();
    assert!(
        error.contains("cannot find disk '/nowhere/disk'"),
        "{error}"
    );

    let receiver = source.receive(&address);
    let receiver = receiver.option("--disk", "disk7=/nowhere/disk").start();
    wait_until("it listens", is_there);
    let error = source.migrate(&address);
    let error = error.failed_with_one_line();
    assert!(error.contains("has no disk 'disk7', but disk0"), "{error}");
    receiver.wait().failed_with_one_line();

    let receiver = source.receive(&address).start();
    wait_until("it listens", is_there);
    receiver.signal(Signal::SIGKILL);
    drop(receiver);
    source.migrate(&address).failed_with_one_line();

    let receiver = source.receive(&address).start();
    wait_until("it listens", || {
        UnixStream::connect(source.folder.path().join("move.sock")).is_ok()
    });
    // That was not a machine.
    let error = receiver.wait();
    let error = error.failed_with_one_line();
    assert!(error.contains("closed the connection"), "{error}");

    let receiver = source.receive(&address).start();
    wait_until("it listens", is_there);
    source.migrate(&address).has_status(0);
    source.running.wait().has_status(0);
    receiver.wait().passed();
}

#[test]
fn a_dry_run_asks_and_changes_nothing() {
    require_kvm!();
    let folder = tempfile::tempdir().expect("there is room");
    let image = folder.path().join("disk");
    let made = File::create(&image).and_then(|file| file.set_len(1 << 20));
    made.expect("there is room");
    let source = Source::start(Bantam::payload("generation").disk(&image, ""));
    let path = |name: &str| source.folder.path().join(name);
    let address = format!("unix:{}", path("move.sock").display());
    let ask = |address: &str| {
        Bantam::new(["migrate", "--dry-run"])
            .argument(path("source.sock"))
            .argument(address)
            .finish()
    };
    ask(&address).failed_with_one_line();
    let receiver = source.receive(&address);
    let receiver = receiver.option("--disk", "disk0=/nowhere/disk").start();
    wait_until("it listens", || path("move.sock").exists());
    for _ in 0..2 {
        let refused = ask(&address);
        let error = refused.failed_with_one_line();
        assert!(
            error.contains("cannot find disk '/nowhere/disk'"),
            "{error}"
        );
    }
    // It goes on waiting, now for the disk that it is to have.
    let answers = ["a machine could not run here", "cannot find disk"];
    assert!(
        answers
            .iter()
            .all(|it| receiver.wait_for_error(it).contains(it))
    );
    receiver.signal(Signal::SIGKILL);
    drop(receiver);

    let address = format!("unix:{}", path("next.sock").display());
    let receiver = source.receive(&address).start();
    wait_until("it listens", || path("next.sock").exists());
    for _ in 0..2 {
        assert_eq!(
            ask(&address).succeeded().text(),
            "the machine could run there\n"
        );
    }
    source.migrate(&address).has_status(0);
    source.running.wait().has_status(0);
    receiver.wait().passed();
}

#[test]
fn memory_crosses_a_network_only_if_that_is_allowed() {
    require_kvm!();
    let ended = Bantam::new(["migrate", "--receive", "tcp://0.0.0.0:0"]).finish();
    let error = ended.failed_with_one_line();
    assert!(
        error.contains("tls://") && error.contains("--insecure"),
        "{error}"
    );
    let source = Source::start(Bantam::payload("generation"));
    let refused = source.migrate("tcp://192.0.2.1:9");
    let error = refused.failed_with_one_line();
    assert!(error.contains("--insecure"), "{error}");
    let back = Bantam::new(["migrate", "--take-back"])
        .argument(source.folder.path().join("source.sock"))
        .finish();
    let error = back.failed_with_one_line();
    assert!(error.contains("nothing to take back"), "{error}");
}
