//! The state of processors, saved from one machine and set in another.
//!
//! The payload `count` counts in memory and in registers. Each round pauses a machine at a random
//! moment, and lets another go on from its state.

use std::thread;

use bantam_tests::counting::{
    START_SECOND, STOP, config, configured, counting, random_time, read_on, rounds,
    wait_until_gone_on,
};
use bantam_tests::{copy_memory, require_kvm};
use bantam_vmm::config::MachineConfig;
use bantam_vmm::{Controller, Error, ExitReason, GuestMemory, RestoreError, Section, State};

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

/// Pauses `machine`, and returns its state.
fn save(machine: &Controller) -> (GuestMemory, Vec<Section>) {
    machine.pause().unwrap_or_else(|error| panic!("{error}"));
    let saved = machine.save_processors();
    let saved = saved.unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(machine.state(), State::Paused);
    let memory = machine.memory().expect("it has not ended");
    (copy_memory(&memory), through_a_file(&saved))
}

/// Lets a machine count, another go on from its state, and so on. The second vCPU, if there is one,
/// has to count from round `second_from` on, when it is told to.
fn go_on_from_machine_to_machine(config: &MachineConfig, second_from: usize) {
    let (mut machine, mut reader, counters) = counting(config);
    let cpus = u64::from(config.cpus.get());
    let mut memory = machine.memory().expect("it runs");
    for round in 0..rounds() {
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
    go_on_from_machine_to_machine(&config(2, "timer=local second=told"), rounds() / 2);
}

#[test]
fn a_processor_that_waits_for_its_start_up_interrupt_gets_it_afterwards() {
    require_kvm!();
    go_on_from_machine_to_machine(&config(2, "timer=local second=reset"), rounds() / 2);
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
        match machine.start_from(copy_memory(&saved), processors) {
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
