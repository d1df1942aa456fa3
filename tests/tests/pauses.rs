//! Machines that are paused and resumed again and again while their devices are under load.

use std::fs::File;
use std::io::{PipeReader, Read};
use std::thread;
use std::time::{Duration, Instant};

use bantam_tests::{HostTap, Traffic, configured, payload, require_kvm, require_taps};
use bantam_vmm::config::{BlockEngineOption, DiskConfig, MachineConfig, NetConfig};
use bantam_vmm::{Console, Controller, State};
use nix::fcntl::{FcntlArg, OFlag, fcntl};

/// How long a load may take, including pauses.
const LIMIT: Duration = Duration::from_secs(120);
const DISK_SIZE: u64 = 4 << 20;

/// A machine that loads its devices, and its output.
struct Loaded {
    machine: Controller,
    output: PipeReader,
}

impl Loaded {
    fn start(mut config: MachineConfig, words: &str) -> Loaded {
        config.append = Some(words.to_owned());
        let (output, writer) = std::io::pipe().expect("there are pipes");
        fcntl(&writer, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).expect("pipes can be non-blocking");
        let console = Console {
            input: None,
            output: Some(writer.into()),
        };
        let machine = configured(config, console);
        machine.start().expect("the host has what it takes");
        Loaded { machine, output }
    }

    /// Pauses the machine over and over, for longer and shorter times, until its guest has ended.
    /// Returns how long each pause took to begin, in ascending order.
    fn pause_until_the_end(mut self) -> Vec<Duration> {
        let begin = Instant::now();
        let mut times = Vec::new();
        for round in 0_u64.. {
            thread::sleep(Duration::from_micros(500 + round * 7919 % 5_000));
            let start = Instant::now();
            if self.machine.pause().is_err() {
                break;
            }
            times.push(start.elapsed());
            thread::sleep(Duration::from_micros(round * 104_729 % 5_000));
            if self.machine.resume().is_err() {
                break;
            }
            assert!(begin.elapsed() < LIMIT, "the load does not end");
        }
        assert_eq!(self.machine.state(), State::Stopped);
        self.machine.wait().expect("it has ended by itself");
        let mut text = String::new();
        self.output.read_to_string(&mut text).expect("it is text");
        assert!(
            text.contains("\"errors\":0") && text.contains("PASS"),
            "{text}"
        );
        assert!(!times.is_empty(), "it was over before the first pause");
        times.sort_unstable();
        eprintln!(
            "{} pauses: half of them began within {:?}, all within {:?}",
            times.len(),
            times[times.len() / 2],
            times[times.len() - 1]
        );
        times
    }
}

#[test]
fn no_request_to_a_disk_is_lost_or_repeated() {
    require_kvm!();
    let folder = tempfile::tempdir().expect("there is room for temporary files");
    for engine in [
        BlockEngineOption::Auto,
        BlockEngineOption::IoUring,
        BlockEngineOption::Sync,
    ] {
        let path = folder.path().join("disk");
        let file = File::create(&path).unwrap();
        file.set_len(DISK_SIZE).unwrap();
        for words in [
            "mode=write pattern=seq operations=30000",
            "mode=mixed pattern=random operations=60000",
        ] {
            let mut config = MachineConfig::new(payload("load"));
            config.disks = vec![DiskConfig {
                engine,
                ..DiskConfig::new(&path)
            }];
            let words = format!("test=block verify seed=7 depth=32 {words}");
            Loaded::start(config, &words).pause_until_the_end();
        }
    }
}

#[test]
fn no_frame_is_lost() {
    require_taps!();
    let tap = HostTap::new();
    for words in [
        "packet-size=64 depth=64 operations=40000",
        "packet-size=1514 depth=8 operations=10000 completion=interrupt",
    ] {
        let _echo = Traffic::echo(&tap.name);
        let mut config = MachineConfig::new(payload("load"));
        config.nets = vec![NetConfig::new(tap.name.clone().try_into().unwrap())];
        let words = format!("test=net mode=round-trip {words}");
        Loaded::start(config, &words).pause_until_the_end();
    }
}
