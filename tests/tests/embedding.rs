//! The monitor as a library, used the way an embedding program uses it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{ErrorKind, PipeReader, Read};
use std::num::NonZeroU32;
use std::os::fd::AsFd;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use bantam_tests::{balloon_statistics, configured, device, device_metrics, payload, require_kvm};
use bantam_vmm::config::{DiskConfig, LimitConfig, MachineConfig, MetadataConfig, SerialConfig};
use bantam_vmm::{
    Answer, Command, Console, Controller, DeviceCommand, DeviceMetrics, Error, ExitReason,
    RateLimit, ShutDown, State, Stream,
};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// One test at a time: they examine resources of the whole process.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns a machine that runs the payload `hello` and then ends as `finish` says.
fn hello(finish: &str) -> MachineConfig {
    MachineConfig {
        append: Some(format!("finish={finish}")),
        ..MachineConfig::new(payload("hello"))
    }
}

/// Returns a console for a machine, and the end from which its output is read.
fn console() -> (Console, PipeReader) {
    let (reader, writer) = std::io::pipe().expect("there are pipes");
    for end in [reader.as_fd(), writer.as_fd()] {
        fcntl(end, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).expect("pipes can be non-blocking");
    }
    let console = Console {
        input: None,
        output: Some(writer.into()),
    };
    (console, reader)
}

fn started(config: &MachineConfig) -> (Controller, PipeReader) {
    let (console, reader) = console();
    let machine = configured(config.clone(), console);
    machine.start().unwrap_or_else(|error| panic!("{error}"));
    (machine, reader)
}

#[test]
fn a_console_that_could_block_all_devices_is_refused() {
    require_kvm!();
    let _alone = alone();
    let blocking = || std::io::pipe().expect("there are pipes");
    let ((reader, _writer), (_reader, writer)) = (blocking(), blocking());
    for (console, end) in [
        (
            Console {
                input: Some(reader.into()),
                output: None,
            },
            "input",
        ),
        (
            Console {
                input: None,
                output: Some(writer.into()),
            },
            "output",
        ),
    ] {
        let machine = configured(hello("poweroff"), console);
        let error = machine.start().expect_err("it could block").to_string();
        assert!(
            error.contains(end) && error.contains("O_NONBLOCK"),
            "{error}"
        );
        // It can be configured again.
        machine
            .set_console(Console::default())
            .expect("it is not started");
        machine
            .configure(hello("poweroff"))
            .expect("it is not started");
        machine.start().expect("it has no console");
        assert_eq!(machine.wait().expect("it ends"), ExitReason::PowerOff);
    }
    // A regular file blocks nobody.
    let file = tempfile::tempfile().expect("there is a folder for temporary files");
    let console = Console {
        input: None,
        output: Some(file.try_clone().expect("there are descriptors").into()),
    };
    let machine = configured(hello("poweroff"), console);
    machine.start().unwrap_or_else(|error| panic!("{error}"));
    machine.wait().expect("it ends");
    let size = file.metadata().expect("it is open").len();
    assert!(size > 0);
}

/// Returns the error of a machine that cannot be built. The machine stays configured.
fn start_error(config: &MachineConfig) -> Error {
    let machine = configured(config.clone(), Console::default());
    let error = machine.start().expect_err("it cannot be built");
    assert_eq!(machine.state(), State::Configured);
    error
}

/// Reads output until it contains `text`, or up to its end.
fn read_until(output: &mut PipeReader, text: &str) -> String {
    let deadline = Instant::now() + Duration::from_secs(30);
    let mut seen = Vec::new();
    loop {
        let mut bytes = [0; 4096];
        match output.read(&mut bytes) {
            Ok(0) => break,
            Ok(count) => seen.extend_from_slice(&bytes[..count]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                assert!(Instant::now() < deadline, "no '{text}' came in time");
                thread::sleep(Duration::from_millis(1));
            }
            Err(error) => panic!("cannot read the console: {error}"),
        }
        if String::from_utf8_lossy(&seen).contains(text) {
            break;
        }
    }
    String::from_utf8_lossy(&seen).into_owned()
}

fn has_ended(machine: &Controller) -> bool {
    let mut events = [PollFd::new(machine.exit_event(), PollFlags::POLLIN)];
    poll(&mut events, PollTimeout::ZERO).expect("it can be polled") == 1
}

#[test]
fn a_machine_ends_with_the_reason_that_its_guest_gives() {
    require_kvm!();
    let _alone = alone();
    for (finish, reason) in [
        ("poweroff", ExitReason::PowerOff),
        ("reset", ExitReason::Reboot),
        ("panic", ExitReason::Panic),
        ("panic-word", ExitReason::Panic),
        ("number number=120", ExitReason::Number(120)),
    ] {
        let (machine, mut output) = started(&hello(finish));
        assert_eq!(machine.wait().unwrap(), reason);
        assert!(read_until(&mut output, "PASS\n").ends_with("PASS\n"));
    }
    let (machine, _output) = started(&hello("triple-fault"));
    let error = machine.wait().unwrap_err();
    assert!(
        matches!(*error, Error::TripleFault { vcpu: 0, .. }),
        "{error}"
    );
}

#[test]
fn threads_of_cores_start_as_vcpus_do() {
    require_kvm!();
    let _alone = alone();
    let config = MachineConfig {
        cpus: "4".parse().unwrap(),
        smt: true,
        append: Some("expect=4 require=both".to_string()),
        ..MachineConfig::new(payload("cpus"))
    };
    let (machine, mut output) = started(&config);
    let text = read_until(&mut output, "PASS\n");
    assert!(text.contains("4 processors run"), "{text}");
    machine.wait().unwrap();
}

#[test]
fn a_machine_is_stopped_from_outside_and_signals_its_event() {
    require_kvm!();
    let _alone = alone();
    let (machine, mut output) = started(&hello("hang"));
    read_until(&mut output, "PASS\n");
    assert!(!has_ended(&machine));
    machine.stop();
    assert!(has_ended(&machine));
    assert_eq!(machine.wait().unwrap(), ExitReason::Stopped);
}

#[test]
fn a_guest_is_asked_to_shut_down_in_the_way_that_it_listens_to() {
    require_kvm!();
    let _alone = alone();
    let long = Duration::from_secs(600);
    for (name, words, asked, reason) in [
        (
            "button",
            "finish=poweroff",
            ShutDown::PowerButton,
            ExitReason::PowerOff,
        ),
        (
            "keyboard",
            "mode=interrupt",
            ShutDown::CtrlAltDel,
            ExitReason::Reboot,
        ),
        ("serial", "bytes=1", ShutDown::PowerCut, ExitReason::Stopped),
    ] {
        let config = MachineConfig {
            append: Some(words.to_string()),
            ..MachineConfig::new(payload(name))
        };
        let (machine, mut output) = started(&config);
        read_until(&mut output, "ready\n");
        let answer = machine
            .execute(Command::ShutDown {
                timeout: Some(long),
            })
            .unwrap();
        assert!(
            matches!(answer, Answer::ShutDown(how) if how == asked),
            "{answer:?}"
        );
        assert_eq!(machine.wait().unwrap(), reason);
    }
}

#[test]
fn a_guest_that_cannot_be_asked_and_has_all_the_time_goes_on() {
    require_kvm!();
    let _alone = alone();
    for (name, words, is_paused) in [
        ("serial", "bytes=1", false),
        ("button", "finish=poweroff", true),
    ] {
        let config = MachineConfig {
            append: Some(words.to_string()),
            ..MachineConfig::new(payload(name))
        };
        let (machine, mut output) = started(&config);
        read_until(&mut output, "ready\n");
        let state = if is_paused {
            machine.pause().unwrap();
            State::Paused
        } else {
            State::Running
        };
        assert_eq!(machine.shut_down(None), ShutDown::Unheard);
        assert_eq!(machine.state(), state);
        if is_paused {
            machine.resume().unwrap();
            assert_eq!(machine.shut_down(None), ShutDown::PowerButton);
            assert_eq!(machine.wait().unwrap(), ExitReason::PowerOff);
        } else {
            machine.stop();
            assert_eq!(machine.wait().unwrap(), ExitReason::Stopped);
        }
        assert_eq!(machine.shut_down(None), ShutDown::PowerCut);
    }
}

#[test]
fn a_guest_that_does_not_shut_down_is_stopped_by_the_earliest_time_given() {
    require_kvm!();
    let _alone = alone();
    let config = MachineConfig {
        append: Some("ignore".to_string()),
        ..MachineConfig::new(payload("button"))
    };
    let (machine, mut output) = started(&config);
    read_until(&mut output, "ready\n");
    for timeout in [
        Duration::MAX,
        Duration::from_millis(100),
        Duration::from_secs(600),
    ] {
        assert_eq!(machine.shut_down(Some(timeout)), ShutDown::PowerButton);
    }
    assert_eq!(machine.wait().unwrap(), ExitReason::Stopped);
    assert_eq!(machine.shut_down(Some(Duration::MAX)), ShutDown::PowerCut);

    // A paused guest cannot, and a machine that was not started has no guest to ask.
    let (machine, mut output) = started(&config);
    read_until(&mut output, "ready\n");
    machine.pause().unwrap();
    machine.shut_down(Some(Duration::from_millis(100)));
    assert_eq!(machine.wait().unwrap(), ExitReason::Stopped);
    let machine = configured(config.clone(), Console::default());
    assert_eq!(machine.shut_down(Some(Duration::MAX)), ShutDown::PowerCut);
    assert_eq!(machine.wait().unwrap(), ExitReason::Stopped);
}

#[test]
fn ctrl_alt_del_reaches_a_keyboard_driver() {
    require_kvm!();
    let _alone = alone();
    for mode in ["polled", "interrupt"] {
        let config = MachineConfig {
            append: Some(format!("mode={mode}")),
            ..MachineConfig::new(payload("keyboard"))
        };
        let (machine, mut output) = started(&config);
        let text = read_until(&mut output, "ready\n");
        assert!(text.contains("ready\n"), "{text}");
        let pressed = machine.execute(Command::PressCtrlAltDel).unwrap();
        assert!(matches!(pressed, Answer::Done));
        let text = read_until(&mut output, "PASS\n");
        assert!(text.contains("ok: Ctrl-Alt-Del"), "{mode}: {text}");
        machine.wait().unwrap();
    }
}

#[test]
fn keys_are_not_pressed_without_a_driver() {
    require_kvm!();
    let _alone = alone();
    let (machine, mut output) = started(&hello("hang"));
    read_until(&mut output, "PASS\n");
    let error = machine.press_ctrl_alt_del().unwrap_err();
    assert!(matches!(error, Error::Keyboard(_)), "{error}");
    machine.stop();
    let error = machine.press_ctrl_alt_del().unwrap_err();
    assert!(matches!(error, Error::WrongState { .. }), "{error}");
}

#[test]
fn output_beyond_the_limit_of_the_serial_port_is_dropped_and_counted() {
    const PRINTED: u64 = 8 << 10;
    require_kvm!();
    let _alone = alone();
    let config = MachineConfig {
        append: Some("print-kib=8".to_string()),
        serial_limit: LimitConfig::Bucket(RateLimit {
            size: 1000,
            refill_time: Duration::from_secs(3600),
            one_time_burst: 24,
        }),
        ..MachineConfig::new(payload("serial"))
    };
    let (machine, mut output) = started(&config);
    let metrics = machine.metrics().unwrap();
    machine.wait().unwrap();
    let mut text = Vec::new();
    output.read_to_end(&mut text).unwrap();
    // A byte may begin within the limit and end beyond it.
    assert!((1024..=1025).contains(&text.len()), "{}", text.len());
    let dropped = metrics.uart.rate_limiter_dropped_bytes.total();
    assert!(dropped >= PRINTED - 1025, "{dropped}");
}

#[test]
fn the_first_reason_of_an_end_counts() {
    require_kvm!();
    let _alone = alone();
    let (machine, _output) = started(&hello("poweroff"));
    while !has_ended(&machine) {
        thread::sleep(Duration::from_millis(1));
    }
    machine.stop();
    assert_eq!(machine.wait().unwrap(), ExitReason::PowerOff);
}

#[test]
fn a_command_in_the_wrong_state_is_a_typed_error() {
    require_kvm!();
    let _alone = alone();
    let machine = Controller::new().unwrap();
    let refused_in = |state: State, commands: Vec<Command>| {
        assert_eq!(machine.state(), state);
        for command in commands {
            let what = format!("{command:?}");
            let error = machine.execute(command).expect_err(&what);
            let is_told = matches!(error, Error::WrongState { state: told, .. } if told == state);
            assert!(is_told, "{what}: {error}");
        }
        assert_eq!(machine.state(), state);
    };
    let configure = || Command::Configure(Box::new(hello("hang")));
    let of_device = |name: &str, command| Command::Device {
        name: name.parse().unwrap(),
        command,
    };
    let of_running = || {
        vec![
            Command::Pause,
            Command::Resume,
            Command::PressPowerButton,
            of_device("disk0", DeviceCommand::UpdateSize),
            of_device("balloon", DeviceCommand::BalloonStatistics),
        ]
    };
    refused_in(State::NotConfigured, of_running());
    refused_in(State::NotConfigured, vec![Command::Start, Command::Metrics]);
    let error = machine.wait().unwrap_err();
    assert!(matches!(*error, Error::WrongState { .. }), "{error}");

    // The last configuration counts.
    machine.execute(configure()).unwrap();
    machine.execute(configure()).unwrap();
    refused_in(State::Configured, of_running());
    assert!(machine.wait().is_err());

    machine.execute(Command::Start).unwrap();
    refused_in(
        State::Running,
        vec![configure(), Command::Start, Command::Resume],
    );
    machine.execute(Command::Pause).unwrap();
    refused_in(
        State::Paused,
        vec![configure(), Command::Start, Command::Pause],
    );
    machine.execute(Command::PressPowerButton).unwrap();
    let answer = machine.execute(Command::Query).unwrap();
    assert!(matches!(answer, Answer::State(State::Paused)), "{answer:?}");

    machine.execute(Command::Stop).unwrap();
    refused_in(State::Stopped, of_running());
    refused_in(State::Stopped, vec![configure(), Command::Start]);
    machine.execute(Command::Stop).unwrap();
    machine.execute(Command::Metrics).unwrap();
    assert_eq!(machine.wait().unwrap(), ExitReason::Stopped);
    refused_in(State::Stopped, vec![configure(), Command::Start]);
    assert_eq!(machine.wait().unwrap(), ExitReason::Stopped);
}

#[test]
fn a_machine_that_was_never_started_can_be_stopped() {
    let _alone = alone();
    let machine = configured(hello("hang"), Console::default());
    machine.stop();
    assert_eq!(machine.wait().unwrap(), ExitReason::Stopped);
    let error = machine.start().unwrap_err();
    assert!(matches!(error, Error::WrongState { .. }), "{error}");
}

#[test]
fn a_paused_guest_stands_still_and_goes_on_where_it_was() {
    require_kvm!();
    let _alone = alone();
    let mut config = MachineConfig::new(payload("serial"));
    config.append = Some("print-kib=16384 finish=hang".to_owned());
    let (machine, mut output) = started(&config);
    read_until(&mut output, "0123456789");
    let mut bytes = vec![0; 1 << 20];
    for _ in 0..3 {
        machine.pause().unwrap();
        let exits = || {
            let metrics = machine.metrics().unwrap();
            metrics
                .vcpus
                .iter()
                .map(|vcpu| vcpu.exit_io_out.total())
                .sum::<u64>()
        };
        let before = exits();
        thread::sleep(Duration::from_millis(100));
        assert_eq!(exits(), before);
        // Only the guest's output from before arrives.
        while output.read(&mut bytes).is_ok() {
            thread::sleep(Duration::from_millis(10));
        }
        machine.resume().unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        while output.read(&mut bytes).is_err() {
            assert!(Instant::now() < deadline, "the guest does not go on");
            thread::sleep(Duration::from_millis(1));
        }
        // The first output may be what the port still had from before the pause.
        while exits() <= before {
            assert!(Instant::now() < deadline, "the guest does not go on");
            thread::sleep(Duration::from_millis(1));
        }
    }
    machine.pause().unwrap();
    // The power can be cut during a pause.
    machine.stop();
    assert_eq!(machine.wait().unwrap(), ExitReason::Stopped);
}

#[test]
fn pauses_from_many_threads_disturb_no_vcpu() {
    require_kvm!();
    let _alone = alone();
    let mut config = MachineConfig::new(payload("cpus"));
    config.cpus = "4".parse().unwrap();
    config.append = Some("expect=4 finish=poweroff".to_owned());
    for _ in 0..5 {
        let (machine, mut output) = started(&config);
        let threads: Vec<_> = (0..2)
            .map(|_| {
                let machine = machine.clone();
                thread::spawn(move || {
                    let mut pauses = 0;
                    while machine.state() != State::Stopped {
                        // Another thread may have been first in either case.
                        pauses += u32::from(machine.pause().is_ok());
                        let _ = machine.resume();
                    }
                    pauses
                })
            })
            .collect();
        assert_eq!(machine.wait().unwrap(), ExitReason::PowerOff);
        let text = read_until(&mut output, "PASS\n");
        assert!(text.ends_with("PASS\n"), "{text}");
        let pauses: u32 = threads.into_iter().map(|it| it.join().unwrap()).sum();
        assert!(pauses > 0);
    }
}

#[test]
fn ten_machines_run_at_once_and_apart() {
    require_kvm!();
    let _alone = alone();
    let running: Vec<_> = (0..10)
        .map(|number| {
            let mut config = hello("hang");
            config.append = Some(format!("number={number}. finish=hang"));
            started(&config)
        })
        .collect();
    let mut machines = Vec::new();
    for (number, (machine, mut output)) in running.into_iter().enumerate() {
        let text = read_until(&mut output, "PASS\n");
        assert!(text.contains(&format!("number={number}.")), "{text}");
        machines.push((machine, output));
    }
    // The end of one machine ends no other.
    let (first, _output) = machines.remove(0);
    first.stop();
    first.wait().unwrap();
    for (machine, _output) in machines {
        assert!(!has_ended(&machine));
        machine.stop();
        assert_eq!(machine.wait().unwrap(), ExitReason::Stopped);
    }
}

#[test]
fn a_balloon_follows_its_owner() {
    require_kvm!();
    let _alone = alone();
    let mut config = MachineConfig::new(payload("balloon"));
    config.append = Some("follow".to_owned());
    config.memory = "64M".parse().unwrap();
    config.balloon = Some("size=4M,statistics=3600".parse().unwrap());
    let (machine, mut output) = started(&config);
    for (mib, pages) in [(4, 1024), (20, 5120), (8, 2048), (0, 0), (1, 256)] {
        device(&machine, "balloon", DeviceCommand::SetBalloonTarget { mib }).unwrap();
        read_until(&mut output, &format!("actual {pages}\n"));
        let statistics = balloon_statistics(&machine);
        assert_eq!((statistics.target_mib, statistics.actual_mib), (mib, mib));
        assert_eq!(statistics.actual_pages, pages);
    }
    let too_much = DeviceCommand::SetBalloonTarget { mib: 65 };
    let error = device(&machine, "balloon", too_much);
    let error = error.unwrap_err().to_string();
    assert!(error.contains("does not fit"), "{error}");

    // The first statistics arrive by themselves, the next ones with each change of the interval.
    for given in 1..=3 {
        let deadline = Instant::now() + Duration::from_secs(30);
        let statistics = || balloon_statistics(&machine);
        while statistics().guest.free_memory != Some(given) {
            assert!(Instant::now() < deadline, "{:?}", statistics());
            thread::sleep(Duration::from_millis(1));
        }
        let seconds = NonZeroU32::new(3600).unwrap();
        let interval = DeviceCommand::SetStatisticsInterval { seconds };
        device(&machine, "balloon", interval).unwrap();
    }
    let DeviceMetrics::Balloon(metrics) = device_metrics(&machine, "balloon") else {
        panic!("it is a balloon");
    };
    assert!(metrics.inflate_count.total() > 0 && metrics.deflate_count.total() > 0);
    assert_eq!(metrics.event_fails.total(), 0);
    machine.stop();
    assert_eq!(machine.wait().unwrap(), ExitReason::Stopped);
}

#[test]
fn a_configuration_that_asks_for_too_much_is_a_typed_error() {
    require_kvm!();
    let _alone = alone();
    let missing = MachineConfig::new("/nowhere/vmlinux");
    let error = start_error(&missing);
    assert!(matches!(error, Error::OpenKernel { .. }), "{error}");

    let mut config = hello("reset");
    config.disks = vec![DiskConfig::new("/nowhere/disk")];
    let error = start_error(&config);
    assert!(matches!(error, Error::Disk(_)), "{error}");

    let mut config = hello("reset");
    config.nets = vec!["tap=none".parse().unwrap()];
    let mut metadata = MetadataConfig::new(vec!["net0".parse().unwrap()]);
    metadata.size_limit = 1;
    metadata.contents = Some(serde_json::json!({}));
    config.metadata = Some(metadata);
    let error = start_error(&config);
    assert!(matches!(error, Error::Metadata(_)), "{error}");
}

/// Resources that machines could leave behind in the process.
#[derive(Debug, PartialEq, Eq)]
struct Traces {
    /// The target of each descriptor.
    descriptors: BTreeMap<String, String>,
    /// Threads that the library names.
    threads: Vec<String>,
    /// Masks of signals: blocked by this thread, ignored and caught by the process.
    signals: Vec<String>,
}

impl Traces {
    fn now() -> Self {
        let signals = ["SigBlk:", "SigIgn:", "SigCgt:"];
        let status = fs::read_to_string("/proc/thread-self/status").expect("there is a /proc");
        Self {
            descriptors: descriptors(),
            threads: library_threads(),
            signals: status
                .lines()
                .filter(|line| signals.iter().any(|signal| line.starts_with(signal)))
                .map(str::to_owned)
                .collect(),
        }
    }
}

fn descriptors() -> BTreeMap<String, String> {
    let folder = fs::read_dir("/proc/self/fd").expect("there is a /proc");
    folder
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            // The descriptor of this very read is gone by now.
            let target = fs::read_link(&path).ok()?;
            let target = target.to_string_lossy().into_owned();
            (!target.ends_with("/fd")).then(|| (path.to_string_lossy().into_owned(), target))
        })
        .collect()
}

fn library_threads() -> Vec<String> {
    let folder = fs::read_dir("/proc/self/task").expect("there is a /proc");
    folder
        .filter_map(|entry| fs::read_to_string(entry.ok()?.path().join("comm")).ok())
        .filter(|name| name.starts_with("bantam"))
        .collect()
}

/// Returns the size of the process's address space in bytes.
fn address_space() -> u64 {
    let pages = fs::read_to_string("/proc/self/statm").expect("there is a /proc");
    let pages = pages.split(' ').next().and_then(|pages| pages.parse().ok());
    pages.map_or(0, |pages: u64| pages * 4096)
}

#[test]
fn a_machine_leaves_no_trace_in_the_process() {
    require_kvm!();
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk");
    fs::write(&disk, [0; 4096]).unwrap();
    let mut config = hello("hang");
    config.cpus = "2".parse().unwrap();
    config.disks = vec![DiskConfig::new(&disk)];
    // What the first machine initializes once for the process is not a leak.
    drop(started(&config));
    let before = Traces::now();
    let size_before = address_space();

    let (machine, mut output) = started(&config);
    read_until(&mut output, "PASS\n");
    // A thread gives itself its name when it first runs, which a busy host may put off.
    let deadline = Instant::now() + Duration::from_secs(10);
    while library_threads().len() < 3 && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(1));
    }
    let during = Traces::now();
    assert!(during.descriptors.len() > before.descriptors.len());
    assert_eq!(during.threads.len(), 3, "{:?}", during.threads);
    assert_eq!(during.signals, before.signals);
    machine.stop();
    machine.wait().unwrap();
    drop((machine, output));
    assert_eq!(Traces::now(), before);

    for round in 0..20 {
        let (machine, output) = started(&config);
        match round % 3 {
            0 => drop(machine),
            1 => {
                machine.stop();
                machine.wait().unwrap();
            }
            // Paused.
            _ => {
                machine.pause().unwrap();
                drop(machine);
            }
        }
        drop(output);
    }
    // Machines that cannot be built.
    config.serial = SerialConfig::File(folder.path().join("log"));
    config.initrd = Some("/nowhere/initrd".into());
    for _ in 0..5 {
        start_error(&config);
    }
    assert_eq!(Traces::now(), before);
    // Twenty times 256 MiB would be 5 GiB. Allocators keep the rest for threads.
    let growth = address_space().saturating_sub(size_before);
    assert!(growth < 2 << 30, "{} MiB more", growth >> 20);
}

#[test]
fn a_console_file_holds_all_output_when_the_machine_has_ended() {
    require_kvm!();
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("log");
    let mut config = MachineConfig::new(payload("serial"));
    config.append = Some("print-kib=64".to_owned());
    config.serial = SerialConfig::File(path.clone());
    let machine = configured(config.clone(), Console::default());
    machine.start().unwrap();
    assert_eq!(
        machine.stream_path(&Stream::Serial).unwrap(),
        Some(path.clone())
    );
    machine.wait().unwrap();
    let mut text = String::new();
    File::open(&path)
        .unwrap()
        .read_to_string(&mut text)
        .unwrap();
    assert!(
        text.len() > 64 << 10 && text.ends_with("PASS\n"),
        "{} bytes",
        text.len()
    );
}
