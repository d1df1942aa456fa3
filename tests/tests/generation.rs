//! What tells a guest that its machine goes on from saved state.

use std::io::{ErrorKind, PipeReader, Read};
use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

use bantam_tests::{configured, copy_memory, payload, require_kvm};
use bantam_vmm::config::MachineConfig;
use bantam_vmm::{Console, Controller, ExitReason, GuestMemory, Section};
use nix::fcntl::{FcntlArg, OFlag, fcntl};

const PATIENCE: Duration = Duration::from_secs(20);

/// What the payload prints of a generation.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Generation {
    id: String,
    /// The sequence number of the VMClock page.
    sequence: u64,
    /// Its markers of disruption and generation.
    markers: [u64; 2],
}

/// A machine whose guest follows its generations, and what the guest has printed.
struct Machine {
    controller: Controller,
    output: PipeReader,
    text: String,
}

impl Machine {
    /// Makes a machine that has not been started, whose guest finishes after `changes`.
    fn new(changes: u32) -> Machine {
        let mut config = MachineConfig::new(payload("generation"));
        config.memory = "16M".parse().expect("this is a size");
        config.append = Some(format!("changes={changes} finish=poweroff"));
        let (output, writer) = std::io::pipe().expect("there are pipes");
        for end in [output.as_fd(), writer.as_fd()] {
            fcntl(end, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).expect("pipes can be non-blocking");
        }
        let console = Console {
            input: None,
            output: Some(writer.into()),
        };
        Machine {
            controller: configured(config, console),
            output,
            text: String::new(),
        }
    }

    fn booted(changes: u32) -> Machine {
        let machine = Machine::new(changes);
        let started = machine.controller.start();
        started.unwrap_or_else(|error| panic!("{error}"));
        machine
    }

    fn restored(changes: u32, memory: GuestMemory, processors: &[Section]) -> Machine {
        let machine = Machine::new(changes);
        let started = machine.controller.start_from(memory, processors);
        started.unwrap_or_else(|error| panic!("{error}"));
        machine
    }

    /// Waits for the next generation that the guest prints.
    fn generation(&mut self) -> Generation {
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.read_on();
            while let Some((line, rest)) = self.text.split_once('\n') {
                let generation = line.trim_end().strip_prefix("generation ").map(parse);
                self.text = rest.to_owned();
                if let Some(generation) = generation {
                    return generation;
                }
            }
            assert!(
                Instant::now() < deadline,
                "no generation within {PATIENCE:?}"
            );
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn read_on(&mut self) {
        let mut bytes = [0; 4096];
        loop {
            match self.output.read(&mut bytes) {
                Ok(0) => return,
                Ok(count) => self.text += &String::from_utf8_lossy(&bytes[..count]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// Pauses the machine, and returns its state.
    fn save(&self) -> (GuestMemory, Vec<Section>) {
        let paused = self.controller.pause();
        paused.unwrap_or_else(|error| panic!("{error}"));
        let processors = self.controller.save_processors();
        let processors = processors.unwrap_or_else(|error| panic!("{error}"));
        let memory = self.controller.memory().expect("it has not ended");
        (copy_memory(&memory), processors)
    }
}

fn parse(words: &str) -> Generation {
    let words: Vec<_> = words.split(' ').collect();
    let [id, sequence, disruption, generation] = words[..] else {
        panic!("{words:?}");
    };
    let number = |word: &str| word.parse().expect("it is a number");
    Generation {
        id: id.to_owned(),
        sequence: number(sequence),
        markers: [number(disruption), number(generation)],
    }
}

#[test]
fn each_machine_that_goes_on_from_saved_state_is_another_generation() {
    require_kvm!();
    let mut machine = Machine::booted(2);
    let first = machine.generation();
    assert_eq!((first.sequence, first.markers), (0, [0, 0]));
    let (memory, processors) = machine.save();
    drop(machine);

    // Two machines that go on from one state differ.
    let memory_of_twin = copy_memory(&memory);
    let mut machine = Machine::restored(2, memory, &processors);
    let second = machine.generation();
    assert_eq!(second.sequence, 2);
    let mut twin = Machine::restored(2, memory_of_twin, &processors);
    let of_twin = twin.generation();
    drop(twin);

    let (memory, processors) = machine.save();
    drop(machine);
    let mut machine = Machine::restored(2, memory, &processors);
    let third = machine.generation();
    assert_eq!(third.sequence, 4);
    let reason = machine.controller.wait();
    let reason = reason.unwrap_or_else(|error| panic!("{error}"));
    machine.read_on();
    assert_eq!(reason, ExitReason::PowerOff, "{}", machine.text);
    assert!(machine.text.ends_with("PASS\n"), "{}", machine.text);

    let all = [first, second, of_twin, third];
    for (index, one) in all.iter().enumerate() {
        for other in &all[..index] {
            assert_ne!(one.id, other.id);
            assert_ne!(one.markers[0], other.markers[0]);
            assert_ne!(one.markers[1], other.markers[1]);
        }
    }
}

#[test]
fn a_pause_is_not_a_new_generation_but_a_boot_is() {
    require_kvm!();
    let mut machine = Machine::booted(1);
    let first = machine.generation();
    let paused = machine.controller.pause();
    paused.unwrap_or_else(|error| panic!("{error}"));
    let resumed = machine.controller.resume();
    resumed.unwrap_or_else(|error| panic!("{error}"));
    thread::sleep(Duration::from_millis(200));
    machine.read_on();
    assert_eq!(machine.text, "");
    assert_ne!(Machine::booted(1).generation().id, first.id);
}
