//! What a program that owns a machine learns of it, and where it has its say.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bantam_devices::tap::{QueueCount, Tap, TapError};
use bantam_tests::{HostTap, configured, device, payload, require_kvm, require_taps};
use bantam_vmm::config::{DeviceName, MachineConfig, MetadataConfig, SerialConfig};
use bantam_vmm::{
    Console, Controller, ControllerOptions, DeviceCommand, Error, Event, Events, ExitReason,
    FileAccess, FileOpener, HostOpener, Limits, ListenError, ListeningSocket, Opener, RateLimit,
    State, ThreadHook, ThreadRole,
};
use serde_json::json;
use tempfile::TempDir;

const LIMIT: Duration = Duration::from_secs(30);

fn hello(words: &str) -> MachineConfig {
    let mut config = MachineConfig::new(payload("hello"));
    config.append = Some(format!("finish={words}"));
    config.serial = SerialConfig::None;
    config
}

/// A machine with a disk that a guest reads without end.
fn reader(folder: &TempDir, words: &str) -> (MachineConfig, PathBuf) {
    let image = folder.path().join("disk.img");
    fs::write(&image, vec![0; 4 << 20]).expect("it is a folder for tests");
    let mut config = MachineConfig::new(payload("load"));
    config.append = Some(format!("test=block mode=read {words}"));
    config.serial = SerialConfig::File(folder.path().join("log"));
    let option = format!("{}", image.display());
    config.disks = vec![option.parse().expect("it is a disk")];
    (config, image)
}

/// Receives events until one is as `wanted` says.
fn await_event(events: &Events, wanted: impl Fn(&Event) -> bool) -> Event {
    let deadline = Instant::now() + LIMIT;
    let mut seen = Vec::new();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match events.next_within(left) {
            Some(event) if wanted(&event) => return event,
            Some(event) => seen.push(event),
            None => panic!("it never came: {seen:?}"),
        }
    }
}

fn all(events: &Events) -> Vec<Event> {
    std::iter::from_fn(|| events.try_next()).collect()
}

#[test]
fn an_owner_hears_of_each_state_and_of_the_devices() {
    require_kvm!();
    let machine = Controller::new().unwrap();
    let events = machine.subscribe().unwrap();
    machine.configure(hello("hang")).unwrap();
    machine.start().unwrap();
    machine.pause().unwrap();
    machine.save_processors().unwrap();
    machine.resume().unwrap();
    machine.stop();
    machine.wait().unwrap();
    let state = |state| Event::State { state };
    let [serial, rng] = ["serial", "rng"].map(|name| name.parse::<DeviceName>().unwrap());
    let attached = |device: &DeviceName| Event::Attached {
        device: device.clone(),
    };
    let detached = |device: &DeviceName| Event::Detached {
        device: device.clone(),
    };
    assert_eq!(
        all(&events),
        [
            state(State::Configured),
            state(State::Starting),
            attached(&serial),
            attached(&rng),
            state(State::Running),
            state(State::Pausing),
            state(State::Paused),
            // The processors are saved.
            state(State::Pausing),
            state(State::Paused),
            state(State::Resuming),
            state(State::Running),
            state(State::Stopped),
            detached(&serial),
            detached(&rng),
        ]
    );
}

#[test]
fn an_owner_hears_of_a_machine_that_ends_by_itself() {
    require_kvm!();
    let machine = configured(hello("poweroff"), Console::default());
    let events = machine.subscribe().unwrap();
    machine.start().unwrap();
    let stopped = Event::State {
        state: State::Stopped,
    };
    await_event(&events, |event| *event == stopped);
    assert_eq!(machine.wait().unwrap(), ExitReason::PowerOff);
}

#[test]
fn a_disk_that_fails_is_an_event() {
    require_kvm!();
    let folder = tempfile::tempdir().unwrap();
    let (config, image) = reader(&folder, "depth=4 seconds=60");
    let machine = configured(config, Console::default());
    let events = machine.subscribe().unwrap();
    machine.start().unwrap();
    File::options()
        .write(true)
        .open(&image)
        .unwrap()
        .set_len(0)
        .unwrap();
    let event = await_event(&events, |event| matches!(event, Event::HostError { .. }));
    let Event::HostError { device, text } = event else {
        unreachable!("it was matched")
    };
    assert_eq!(device.as_str(), "disk0");
    assert!(text.contains("request"), "{text}");
    machine.stop();
    machine.wait().unwrap();
}

#[test]
fn a_device_whose_driver_breaks_the_rules_is_an_event() {
    require_kvm!();
    let mut config = MachineConfig::new(payload("hostile"));
    config.append = Some("seed=1".to_owned());
    config.serial = SerialConfig::None;
    let machine = configured(config, Console::default());
    let events = machine.subscribe().unwrap();
    machine.start().unwrap();
    let event = await_event(&events, |event| matches!(event, Event::NeedsReset { .. }));
    let Event::NeedsReset { device, reason } = event else {
        unreachable!("it was matched")
    };
    assert_eq!(device.as_str(), "rng");
    assert!(!reason.is_empty());
    machine.stop();
    machine.wait().unwrap();
}

#[test]
fn a_configuration_has_what_was_changed_since_the_start() {
    require_kvm!();
    let folder = tempfile::tempdir().unwrap();
    let (mut config, image) = reader(&folder, "depth=1 seconds=60");
    config.balloon = Some("size=0,statistics=10".parse().unwrap());
    let other = folder.path().join("other.img");
    fs::copy(&image, &other).unwrap();
    let machine = configured(config.clone(), Console::default());
    assert_eq!(machine.configuration().unwrap(), config);
    machine.start().unwrap();
    assert_eq!(machine.configuration().unwrap(), config);
    let limits = Limits {
        bytes: None,
        operations: Some(RateLimit {
            size: 7,
            refill_time: Duration::from_millis(300),
            one_time_burst: 2,
        }),
    };
    let path = other.clone();
    for (name, command) in [
        ("disk0", DeviceCommand::ReplaceImage { path, format: None }),
        ("disk0", DeviceCommand::SetLimits(limits)),
        ("balloon", DeviceCommand::SetBalloonTarget { mib: 3 }),
    ] {
        device(&machine, name, command).unwrap();
    }
    // What is refused changes nothing.
    let path = folder.path().join("missing.img");
    device(
        &machine,
        "disk0",
        DeviceCommand::ReplaceImage { path, format: None },
    )
    .unwrap_err();
    device(&machine, "rng", DeviceCommand::SetBalloonTarget { mib: 1 }).unwrap_err();
    let changed = machine.configuration().unwrap();
    assert_eq!(changed.disks[0].path, other);
    machine.stop();
    machine.wait().unwrap();
    assert_eq!(machine.configuration().unwrap(), changed);

    let again = configured(changed.clone(), Console::default());
    again.start().unwrap();
    assert_eq!(again.configuration().unwrap(), changed);
    again.stop();
    again.wait().unwrap();
}

/// What an opener and a hook have been asked for, in order.
#[derive(Default)]
struct Record(Mutex<Vec<Step>>);

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Step {
    Opened(PathBuf),
    Entered(String),
}

impl Record {
    fn add(&self, step: Step) {
        self.0.lock().expect("nobody panics with it").push(step);
    }

    fn steps(&self) -> Vec<Step> {
        self.0.lock().expect("nobody panics with it").clone()
    }
}

impl FileOpener for Record {
    fn file(&self, path: &Path, access: FileAccess) -> io::Result<File> {
        self.add(Step::Opened(path.to_path_buf()));
        HostOpener.file(path, access)
    }
}

impl Opener for Record {
    fn listen(&self, path: &Path) -> Result<ListeningSocket, ListenError> {
        self.add(Step::Opened(path.to_path_buf()));
        HostOpener.listen(path)
    }

    fn tap(&self, name: &str, mtu: Option<u16>, queues: QueueCount) -> Result<Tap, TapError> {
        self.add(Step::Opened(name.into()));
        HostOpener.tap(name, mtu, queues)
    }
}

impl ThreadHook for Record {
    fn enter(&self, role: &ThreadRole) -> io::Result<()> {
        let thread = std::thread::current();
        let name = thread.name().unwrap_or_default();
        self.add(Step::Entered(format!("{name}: {role:?}")));
        Ok(())
    }
}

#[test]
fn everything_is_opened_by_the_opener_before_the_first_thread_starts() {
    require_kvm!();
    let folder = tempfile::tempdir().unwrap();
    let (mut config, image) = reader(&folder, "depth=1 seconds=60");
    config.disks[0].iothread = true;
    config.cpus = "2".parse().unwrap();
    let socket = folder.path().join("v.sock");
    let option = format!("cid=3,socket={}", socket.display());
    config.vsock = Some(option.parse().unwrap());
    let record = Arc::new(Record::default());
    let machine = Controller::with(ControllerOptions {
        opener: record.clone(),
        thread_hook: Some(record.clone()),
        ..ControllerOptions::default()
    });
    let machine = machine.unwrap();
    machine.configure(config.clone()).unwrap();
    machine.start().unwrap();
    let steps = record.steps();
    let is_opened = |step: &Step| matches!(step, Step::Opened(_));
    assert!(steps.is_sorted_by_key(|step| !is_opened(step)), "{steps:?}");
    let expected: BTreeSet<Step> = [
        Path::new("/dev/kvm"),
        &config.kernel,
        &image,
        &socket,
        Path::new("/dev/urandom"),
        &folder.path().join("log"),
    ]
    .map(|path| Step::Opened(path.to_path_buf()))
    .into_iter()
    .chain(
        [
            "bantam-devices: Devices",
            "bantam-io0: Device(DeviceName(\"disk0\"))",
            "bantam-vcpu0: Vcpu(0)",
            "bantam-vcpu1: Vcpu(1)",
        ]
        .map(|entered| Step::Entered(entered.to_owned())),
    )
    .collect();
    assert_eq!(steps.into_iter().collect::<BTreeSet<_>>(), expected);

    // So is what is opened later.
    let path = folder.path().join("other.img");
    fs::copy(&image, &path).unwrap();
    let opened = Step::Opened(path.clone());
    device(
        &machine,
        "disk0",
        DeviceCommand::ReplaceImage { path, format: None },
    )
    .unwrap();
    assert_eq!(record.steps().last(), Some(&opened));
    machine.stop();
    machine.wait().unwrap();
}

/// Refuses vCPU 1 its thread, after a time in which a guest that ran would have printed.
struct Refusal;

impl ThreadHook for Refusal {
    fn enter(&self, role: &ThreadRole) -> io::Result<()> {
        match role {
            ThreadRole::Vcpu(1) => {
                std::thread::sleep(Duration::from_millis(300));
                Err(io::Error::other("one is enough"))
            }
            _ => Ok(()),
        }
    }
}

#[test]
fn a_machine_that_gets_no_thread_tells_all_who_wait_for_it() {
    require_kvm!();
    let machine = Controller::with(ControllerOptions {
        thread_hook: Some(Arc::new(Refusal)),
        ..ControllerOptions::default()
    });
    let machine = machine.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let (log, socket) = (folder.path().join("log"), folder.path().join("v.sock"));
    let mut config = hello("hang");
    config.cpus = "2".parse().unwrap();
    config.serial = SerialConfig::File(log.clone());
    let option = format!("cid=3,socket={}", socket.display());
    config.vsock = Some(option.parse().unwrap());
    let (mut output, console) = std::io::pipe().unwrap();
    let console = Console {
        input: None,
        output: Some(console.into()),
    };
    machine.set_console(console).unwrap();
    machine.configure(config).unwrap();
    let events = machine.subscribe().unwrap();
    let expected = "cannot start thread 'bantam-vcpu1': one is enough";
    let waiting = {
        let machine = machine.clone();
        std::thread::spawn(move || {
            // It may ask before the start, when nothing says that there will be one.
            loop {
                match machine.wait() {
                    Err(error) if matches!(*error, Error::WrongState { .. }) => {}
                    ended => return ended.unwrap_err().to_string(),
                }
            }
        })
    };
    let error = machine.start().unwrap_err();
    assert_eq!(error.to_string(), expected);
    assert_eq!(waiting.join().unwrap(), expected);
    assert_eq!(machine.wait().unwrap_err().to_string(), expected);
    assert_eq!(machine.state(), State::Stopped);
    // No instruction of the guest was executed, and nothing of the machine is left.
    assert_eq!(fs::read_to_string(&log).unwrap(), "");
    assert!(!socket.exists());
    let mut text = String::new();
    output.read_to_string(&mut text).unwrap();
    assert_eq!(text, "");
    let detached = all(&events)
        .into_iter()
        .filter(|event| matches!(event, Event::Detached { .. }))
        .count();
    assert_eq!(detached, 3);
}

#[test]
fn metadata_of_a_machine_that_has_ended_is_in_its_configuration() {
    require_taps!();
    let tap = HostTap::new();
    let mut config = hello("hang");
    config.nets = vec![format!("tap={}", tap.name).parse().unwrap()];
    config.metadata = Some(MetadataConfig::new(vec!["net0".parse().unwrap()]));
    let machine = configured(config, Console::default());
    machine.start().unwrap();
    machine.put_metadata(json!({"a": 1, "b": 2})).unwrap();
    machine.patch_metadata(json!({"b": null})).unwrap();
    machine.stop();
    machine.wait().unwrap();
    let metadata = machine.configuration().unwrap().metadata.unwrap();
    assert_eq!(metadata.contents, Some(json!({"a": 1})));
}

#[test]
fn a_wait_for_events_can_be_as_long_as_a_duration() {
    let machine = Controller::new().unwrap();
    let events = machine.subscribe().unwrap();
    machine.configure(hello("hang")).unwrap();
    let configured = Event::State {
        state: State::Configured,
    };
    assert_eq!(events.next_within(Duration::MAX), Some(configured));
}
