//! How machines end.

use std::fs;
use std::time::Duration;

use bantam_tests::{Bantam, STATUS_POWER_CUT, STATUS_REBOOT, elf_kernel, require_kvm};
use nix::sys::signal::Signal;

/// How long a user who stops a machine may have to wait.
const PROMPT: Duration = Duration::from_secs(3);

fn hello(finish: &str) -> Bantam {
    Bantam::payload("hello")
        .append(format!("finish={finish}"))
        .option("--log", "info")
}

#[test]
fn a_guest_switches_the_machine_off_by_acpi() {
    require_kvm!();
    let ended = hello("poweroff").finish();
    ended.passed().has_status(0);
    assert!(
        ended
            .stderr
            .contains("has ended: the guest has powered off"),
        "{ended}"
    );
}

#[test]
fn a_guest_resets_the_machine_by_the_keyboard_controller() {
    require_kvm!();
    let ended = hello("reset").finish();
    ended.passed().has_status(STATUS_REBOOT);
    assert!(
        ended.stderr.contains("has ended: the guest has rebooted"),
        "{ended}"
    );
}

#[test]
fn a_guest_resets_the_machine_by_the_acpi_reset_register() {
    require_kvm!();
    // The register and its value are those in the FADT.
    let code = [
        0x66, 0xba, 0x02, 0x06, // mov dx, 0x602
        0xb0, 0x01, // mov al, 1
        0xee, // out dx, al
        0xeb, 0xfe, // stay: jmp stay
    ];
    let folder = tempfile::tempdir().unwrap();
    let kernel = folder.path().join("kernel");
    fs::write(&kernel, elf_kernel(&code)).unwrap();
    let ended = Bantam::run(kernel).option("--log", "info").finish();
    ended.succeeded();
    assert!(
        ended.stderr.contains("has ended: the guest has rebooted"),
        "{ended}"
    );
}

#[test]
fn a_triple_fault_is_an_error() {
    require_kvm!();
    let ended = Bantam::payload("hello")
        .append("finish=triple-fault")
        .finish();
    let reason = ended.failed();
    assert!(reason.contains("triple fault of vCPU 0 at 0x"), "{ended}");
    ended.printed("PASS\n");
    // The registers, to find the fault.
    assert!(ended.stderr.contains("cr3="), "{ended}");
}

#[test]
fn an_instruction_that_kvm_cannot_emulate_is_an_error_with_its_place_and_a_remedy() {
    require_kvm!();
    let ended = Bantam::payload("hello")
        .append("finish=emulation-failure")
        .finish();
    let reason = ended.failed();
    let (place, rest) = reason
        .strip_prefix("KVM cannot emulate the instruction at 0x")
        .and_then(|rest| rest.split_once(" of vCPU 0, bytes "))
        .unwrap_or_else(|| panic!("{ended}"));
    assert!(u64::from_str_radix(place, 16).is_ok_and(|place| place != 0));
    let (bytes, remedy) = rest.split_once(": ").unwrap_or_else(|| panic!("{ended}"));
    let is_byte = |byte: &str| byte.len() == 2 && u8::from_str_radix(byte, 16).is_ok();
    assert!(
        bytes == "unknown" || bytes.split(' ').all(is_byte),
        "{ended}"
    );
    assert!(!remedy.is_empty());
}

#[test]
fn a_guest_that_hangs_is_stopped_by_signals() {
    require_kvm!();
    for signal in [
        Signal::SIGTERM,
        Signal::SIGINT,
        Signal::SIGHUP,
        Signal::SIGQUIT,
    ] {
        let machine = hello("hang").option("--cpus", "2").start();
        machine.wait_for_output("PASS\n");
        let asked = std::time::Instant::now();
        machine.signal(signal);
        let ended = machine.wait();
        assert!(asked.elapsed() < PROMPT, "{signal}: {ended}");
        ended.passed().has_status(STATUS_POWER_CUT);
        assert!(
            ended.stderr.contains("has ended: the power was cut"),
            "{ended}"
        );
    }
}

#[test]
fn a_guest_that_runs_without_end_is_stopped_by_a_signal() {
    require_kvm!();
    let folder = tempfile::tempdir().unwrap();
    let kernel = folder.path().join("kernel");
    // stay: jmp stay
    fs::write(&kernel, elf_kernel(&[0xeb, 0xfe])).unwrap();
    let machine = Bantam::run(kernel).option("--log", "info").start();
    machine.wait_for_error("kernel command line");
    let asked = std::time::Instant::now();
    machine.signal(Signal::SIGTERM);
    let ended = machine.wait();
    ended.succeeded();
    assert!(asked.elapsed() < PROMPT, "{ended}");
}
