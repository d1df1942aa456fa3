//! The state of processors, saved from one machine and set in another.
//!
//! The payload `count` counts in memory and in registers. Each round pauses a machine at a random
//! moment, and lets another go on from its state.

use std::fs::File;
use std::io::{ErrorKind, PipeReader, Read};
use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

use bantam_tests::{payload, require_kvm};
use bantam_vmm::config::{MachineConfig, VcpuCount};
use bantam_vmm::{
    Console, Controller, Error, ExitReason, GuestMemory, RestoreError, Section, State,
};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use vm_memory::{Bytes, GuestAddress};

const ROUNDS: usize = 20;
const PATIENCE: Duration = Duration::from_secs(20);

/// The payload's state of one of its processors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Processor {
    count: u64,
    faults: u64,
    accesses: u64,
    interrupts: u64,
}

impl Processor {
    fn has_gone_on_since(&self, before: &Processor) -> bool {
        self.count > before.count
            && self.accesses > before.accesses
            && self.interrupts > before.interrupts
    }

    fn is_at_or_after(&self, before: &Processor) -> bool {
        self.count >= before.count
            && self.accesses >= before.accesses
            && self.interrupts >= before.interrupts
    }
}

/// Words of the payload's counters.
const WORDS_OF_A_PROCESSOR: u64 = 4;
const START_SECOND: u64 = 2 * WORDS_OF_A_PROCESSOR;
const STOP: u64 = START_SECOND + 1;

/// Address of the counters.
#[derive(Clone, Copy)]
struct Counters(u64);

impl Counters {
    fn word(self, memory: &GuestMemory, word: u64) -> u64 {
        let address = GuestAddress(self.0 + word * 8);
        memory
            .read_obj(address)
            .expect("the counters are in memory")
    }

    fn set(self, memory: &GuestMemory, word: u64) {
        let address = GuestAddress(self.0 + word * 8);
        memory
            .write_obj(1_u64, address)
            .expect("the counters are in memory");
    }

    fn processors(self, memory: &GuestMemory, count: u64) -> Vec<Processor> {
        (0..count)
            .map(|index| self.processor(memory, index))
            .collect()
    }

    fn processor(self, memory: &GuestMemory, index: u64) -> Processor {
        let word = |word| self.word(memory, index * WORDS_OF_A_PROCESSOR + word);
        Processor {
            count: word(0),
            faults: word(1),
            accesses: word(2),
            interrupts: word(3),
        }
    }
}

fn config(cpus: u8, append: &str) -> MachineConfig {
    let mut config = MachineConfig::new(payload("count"));
    config.memory = "16M".parse().expect("this is a size");
    config.cpus = VcpuCount::try_from(i64::from(cpus)).expect("a machine can have them");
    config.append = Some(format!("{append} finish=poweroff"));
    config
}

fn configured(config: &MachineConfig) -> (Controller, PipeReader) {
    let (reader, writer) = std::io::pipe().expect("there are pipes");
    for end in [reader.as_fd(), writer.as_fd()] {
        fcntl(end, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).expect("pipes can be non-blocking");
    }
    let console = Console {
        input: None,
        output: Some(writer.into()),
    };
    let machine = bantam_tests::configured(config.clone(), console);
    (machine, reader)
}

/// Appends the available output to `text`.
fn read_on(reader: &mut PipeReader, text: &mut String) {
    let mut bytes = [0; 4096];
    loop {
        match reader.read(&mut bytes) {
            Ok(0) => return,
            Ok(count) => text.push_str(&String::from_utf8_lossy(&bytes[..count])),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return,
            Err(error) => panic!("{error}"),
        }
    }
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "{what} within {PATIENCE:?}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// A machine that counts, and the address of its counters.
fn counting(config: &MachineConfig) -> (Controller, PipeReader, Counters) {
    let (machine, mut reader) = configured(config);
    machine.start().unwrap_or_else(|error| panic!("{error}"));
    let mut text = String::new();
    let mut address = None;
    wait_until("the guest counts", || {
        read_on(&mut reader, &mut text);
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix("counting at 0x"));
        address = line
            .filter(|_| text.ends_with('\n'))
            .and_then(|address| u64::from_str_radix(address.trim(), 16).ok());
        address.is_some()
    });
    (machine, reader, Counters(address.expect("it was found")))
}

fn copy(memory: &GuestMemory) -> GuestMemory {
    let ranges: Vec<_> = memory
        .regions()
        .map(|region| (region.start, region.len as usize))
        .collect();
    let copy = GuestMemory::from_ranges(&ranges).expect("there is memory");
    for (address, len) in ranges {
        let mut bytes = vec![0; len];
        memory
            .read_slice(&mut bytes, address)
            .expect("it is memory");
        copy.write_slice(&bytes, address).expect("it is memory");
    }
    copy
}

/// Returns `sections` as written to a file and read back.
fn through_a_file(sections: &[Section]) -> Vec<Section> {
    let mut bytes = Vec::new();
    for section in sections {
        section.write_to(&mut bytes).expect("a vector takes all");
    }
    let mut reader = bytes.as_slice();
    let read = sections.iter().map(|_| Section::read_from(&mut reader));
    let read = read.collect::<Result<_, _>>().expect("it was written");
    assert!(reader.is_empty());
    read
}

/// Returns a few milliseconds, different each time.
fn random_time() -> Duration {
    let mut byte = [0; 2];
    File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut byte))
        .expect("there are random bytes");
    Duration::from_micros(u64::from(u16::from_le_bytes(byte)) / 4)
}

/// Pauses `machine`, and returns its state.
fn save(machine: &Controller) -> (GuestMemory, Vec<Section>) {
    machine.pause().unwrap_or_else(|error| panic!("{error}"));
    let saved = machine.save_processors();
    let saved = saved.unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(machine.state(), State::Paused);
    let memory = machine.memory().expect("it has not ended");
    (copy(&memory), through_a_file(&saved))
}

/// Lets a machine count, another go on from its state, and so on. The second vCPU, if there is one,
/// has to count from round `second_from` on, when it is told to.
fn go_on_from_machine_to_machine(config: &MachineConfig, second_from: usize) {
    let (mut machine, mut reader, counters) = counting(config);
    let cpus = u64::from(config.cpus.get());
    let mut memory = machine.memory().expect("it runs");
    for round in 0..ROUNDS {
        let counting = if round < second_from {
            1
        } else {
            cpus as usize
        };
        let before = counters.processors(&memory, cpus);
        wait_until_gone_on(counters, &memory, &before[..counting]);
        thread::sleep(random_time());
        let (saved, processors) = save(&machine);
        let before = counters.processors(&saved, cpus);
        drop(memory);
        drop(machine);

        (machine, reader) = configured(config);
        let started = machine.start_from(saved, &processors);
        started.unwrap_or_else(|error| panic!("round {round}: {error}"));
        memory = machine.memory().expect("it runs");
        let now = counters.processors(&memory, cpus);
        for (before, now) in before.iter().zip(&now) {
            assert!(now.is_at_or_after(before), "{before:?}, then {now:?}");
        }
        if round + 1 == second_from {
            counters.set(&memory, START_SECOND);
        }
        wait_until_gone_on(counters, &memory, &before[..counting]);
    }
    counters.set(&memory, STOP);
    let reason = machine.wait().unwrap_or_else(|error| panic!("{error}"));
    let mut text = String::new();
    read_on(&mut reader, &mut text);
    assert_eq!(reason, ExitReason::PowerOff, "{text}");
    assert!(text.ends_with("PASS\n"), "{text}");
}

/// Waits until all processors that were as in `before` have counted, accessed a device and been interrupted.
fn wait_until_gone_on(counters: Counters, memory: &GuestMemory, before: &[Processor]) {
    for (index, before) in (0..).zip(before) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let now = counters.processor(memory, index);
            assert_eq!(now.faults, 0, "processor {index}");
            if now.has_gone_on_since(before) {
                break;
            }
            assert!(
                Instant::now() < deadline,
                "processor {index} stands still: {before:?}, {now:?}"
            );
            thread::sleep(Duration::from_millis(1));
        }
    }
}

#[test]
fn a_machine_goes_on_with_the_local_timer() {
    require_kvm!();
    go_on_from_machine_to_machine(&config(1, "timer=local"), 0);
}

#[test]
fn a_machine_goes_on_with_the_tsc_deadline() {
    require_kvm!();
    go_on_from_machine_to_machine(&config(1, "timer=deadline"), 0);
}

#[test]
fn a_machine_goes_on_with_the_interval_timer() {
    require_kvm!();
    go_on_from_machine_to_machine(&config(1, "timer=interval"), 0);
}

#[test]
fn a_machine_with_two_processors_goes_on() {
    require_kvm!();
    go_on_from_machine_to_machine(&config(2, "timer=deadline second=at-once"), 0);
}

#[test]
fn a_processor_that_was_not_started_can_be_started_afterwards() {
    require_kvm!();
    go_on_from_machine_to_machine(&config(2, "timer=local second=told"), ROUNDS / 2);
}

#[test]
fn a_processor_that_waits_for_its_start_up_interrupt_gets_it_afterwards() {
    require_kvm!();
    go_on_from_machine_to_machine(&config(2, "timer=local second=reset"), ROUNDS / 2);
}

#[test]
fn only_a_paused_machine_is_saved() {
    require_kvm!();
    let config = config(1, "timer=local");
    let (machine, _reader) = configured(&config);
    let refused = |expected: State| match machine.save_processors() {
        Err(Error::WrongState { state, .. }) => assert_eq!(state, expected),
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("it is not paused"),
    };
    refused(State::Configured);
    machine.start().unwrap_or_else(|error| panic!("{error}"));
    refused(State::Running);
    machine.stop();
    refused(State::Stopped);
}

#[test]
fn a_machine_goes_on_after_it_was_saved() {
    require_kvm!();
    let (machine, _reader, counters) = counting(&config(1, "timer=local"));
    let (saved, processors) = save(&machine);
    assert_eq!(processors.len(), 2);
    machine.resume().unwrap_or_else(|error| panic!("{error}"));
    let memory = machine.memory().expect("it runs");
    wait_until_gone_on(counters, &memory, &counters.processors(&saved, 1));
}

#[test]
fn the_state_of_another_machine_is_refused() {
    require_kvm!();
    let config_of_one = config(1, "timer=local");
    let (machine, _reader, _) = counting(&config_of_one);
    let (saved, processors) = save(&machine);
    let refused = |config: &MachineConfig, processors: &[Section], expected: &str| {
        let (machine, _reader) = configured(config);
        match machine.start_from(copy(&saved), processors) {
            Err(Error::Restore(RestoreError::Invalid { kind, .. })) => assert_eq!(kind, expected),
            Err(Error::Restore(RestoreError::Kind { found, .. })) => assert_eq!(found, expected),
            Err(error) => panic!("{error}"),
            Ok(()) => panic!("it is another machine"),
        }
        assert_eq!(machine.state(), State::Configured);
    };
    refused(&config(2, "timer=local"), &processors, "vcpu");
    refused(&config_of_one, &[], "vm");
    refused(&config_of_one, &processors[..1], "vcpu");
    let turned = [processors[1].clone(), processors[0].clone()];
    refused(&config_of_one, &turned, "vcpu");
    let mut larger = config_of_one.clone();
    larger.memory = "32M".parse().expect("this is a size");
    refused(&larger, &processors, "memory");
}
