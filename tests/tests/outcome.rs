//! The exit status for each end of a guest, and the handling of a guest that has failed.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use bantam_tests::{
    ApiMachine, Bantam, Ended, STATUS_ERROR, STATUS_POWER_CUT, STATUS_REBOOT,
    bare_metal_boot_source, elf_kernel, require_kvm,
};
use nix::sys::signal::Signal;
use serde_json::json;
use tempfile::TempDir;

const STATUS_PANIC: i32 = 121;
const STATUS_HALTED: i32 = 122;

/// How long a user who stops a machine may have to wait.
const PROMPT: Duration = Duration::from_secs(3);
/// How long a guest may take to be ready on a loaded host.
const PATIENCE: Duration = Duration::from_secs(60);

fn hello(words: &str) -> Bantam {
    Bantam::payload("hello").append(words)
}

/// Returns a guest that consists of these instructions.
fn code(folder: &TempDir, code: &[u8]) -> Bantam {
    let kernel = folder.path().join("kernel");
    fs::write(&kernel, elf_kernel(code)).expect("there is room for temporary files");
    Bantam::run(kernel)
}

// --- Panics and numbers ---------------------------------------------------------------------------

#[test]
fn a_panic_that_the_panic_device_reports_is_not_a_reboot() {
    require_kvm!();
    let ended = hello("finish=panic").finish();
    ended.has_status(STATUS_PANIC);
    assert_eq!(
        ended.stderr.matches("the guest has panicked").count(),
        1,
        "{ended}"
    );
}

#[test]
fn a_guest_that_hangs_after_a_panic_is_ended() {
    require_kvm!();
    hello("finish=panic-hang").finish().has_status(STATUS_PANIC);
}

#[test]
fn a_kernel_without_a_panic_device_tells_a_panic_by_the_warm_boot_word() {
    require_kvm!();
    hello("finish=panic-word").finish().has_status(STATUS_PANIC);
    // Without `panic_warm`, or with another mode after it, the word does not mean a panic.
    for line in ["reboot=k", "reboot=warm", "reboot=panic_warm,warm"] {
        let ended = Bantam::payload("hello")
            .option("--cmdline", format!("{line} finish=panic-word"))
            .finish();
        ended.has_status(STATUS_REBOOT);
    }
}

#[test]
fn a_guest_gives_its_own_number() {
    require_kvm!();
    for (number, status) in [(0, 0), (1, 1), (3, 3), (119, 119), (124, 124), (255, 255)] {
        let ended = hello(&format!("finish=number number={number}")).finish();
        ended.has_status(status);
    }
    for reserved in [
        STATUS_REBOOT,
        STATUS_PANIC,
        STATUS_HALTED,
        STATUS_POWER_CUT,
        STATUS_ERROR,
    ] {
        let ended = hello(&format!("finish=number number={reserved}")).finish();
        ended.has_status(255);
        assert!(
            ended.stderr.contains(&format!("the number {reserved}")),
            "{ended}"
        );
    }
}

#[test]
fn the_exit_status_can_be_about_the_monitor_alone() {
    require_kvm!();
    for words in ["finish=reset", "finish=panic", "finish=number number=3"] {
        let bantam = hello(words).option("--exit-status", "monitor");
        bantam.finish().has_status(0);
    }
    let bantam = hello("finish=triple-fault").option("--exit-status", "monitor");
    bantam.finish().has_status(1);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("machine.toml");
    fs::write(&file, "kernel = 'missing'\nexit-status = 'monitor'\n").unwrap();
    let bantam = Bantam::new(["run"]).option("--config", &file);
    bantam.finish().has_status(1);
}

// --- Restarts ---------------------------------------------------------------------------------------

#[test]
fn a_reboot_restarts_the_machine_up_to_the_limit() {
    require_kvm!();
    let ended = hello("finish=reset")
        .option("--on-reboot", "restart")
        .option("--restart-limit", "3")
        .finish();
    ended.passed().has_status(STATUS_REBOOT);
    assert_eq!(
        ended.text().matches("hello from ring 3").count(),
        4,
        "{ended}"
    );
    // One line for each restart at the default level, and one for the end.
    for (count, soon) in [(1, "again ("), (2, "in 0.1 s ("), (3, "in 0.2 s (")] {
        let line = format!("{soon}restart {count} of 3)");
        assert!(ended.stderr.contains(&line), "{ended}");
    }
    assert!(ended.stderr.contains("the last restart allowed"), "{ended}");
    assert_eq!(ended.stderr.lines().count(), 4, "{ended}");
}

#[test]
fn a_restart_after_a_panic_names_the_panic() {
    require_kvm!();
    let ended = hello("finish=panic-word")
        .option("--on-reboot", "restart")
        .option("--restart-limit", "1")
        .finish();
    ended.has_status(STATUS_PANIC);
    assert!(
        ended.stderr.contains("the guest has panicked after"),
        "{ended}"
    );
}

#[test]
fn a_guest_that_ends_otherwise_is_not_started_again() {
    require_kvm!();
    for words in ["finish=poweroff", "finish=number number=7"] {
        let ended = hello(words).option("--on-reboot", "restart").finish();
        assert_eq!(
            ended.text().matches("hello from ring 3").count(),
            1,
            "{ended}"
        );
        assert!(matches!(ended.status.code(), Some(0 | 7)), "{ended}");
    }
}

#[test]
fn a_signal_ends_a_machine_that_waits_for_its_restart() {
    require_kvm!();
    let machine = hello("finish=reset")
        .option("--on-reboot", "restart")
        .start();
    // By then it waits for longer than a user would.
    machine.wait_for_error("in 6.4 s (restart 8)");
    let asked = std::time::Instant::now();
    machine.signal(Signal::SIGTERM);
    let ended = machine.wait();
    assert!(asked.elapsed() < PROMPT, "{ended}");
    ended.has_status(STATUS_POWER_CUT);
    // Without delays there would be hundreds.
    assert_eq!(
        ended.text().matches("hello from ring 3").count(),
        8,
        "{ended}"
    );
}

// --- Shutting down ------------------------------------------------------------------------------------

fn button(words: &str) -> Bantam {
    Bantam::payload("button").append(words)
}

fn shut_down(bantam: Bantam, signals: &[Signal]) -> Ended {
    let machine = bantam.start();
    machine.wait_for_output("ready\n");
    for &signal in signals {
        machine.signal(signal);
        machine.wait_for_error("asking the guest");
    }
    machine.wait()
}

#[test]
fn a_signal_asks_the_guest_to_shut_down_first() {
    require_kvm!();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        let ended = shut_down(button("finish=poweroff"), &[signal]);
        ended.passed().has_status(0);
        assert!(ended.stderr.contains("by the power button"), "{ended}");
    }
    // A guest that takes no power button interrupt, but keys. It restarts, which ends the machine.
    let keyboard = Bantam::payload("keyboard").append("mode=interrupt");
    let ended = shut_down(
        keyboard.option("--on-reboot", "restart"),
        &[Signal::SIGTERM],
    );
    ended.passed().has_status(0);
    assert!(ended.stderr.contains("by Ctrl-Alt-Del"), "{ended}");
    assert_eq!(ended.text().matches("ready").count(), 1, "{ended}");
}

#[test]
fn a_guest_that_does_not_shut_down_in_time_has_its_power_cut() {
    require_kvm!();
    let bantam = button("ignore").option("--shutdown-timeout", "200ms");
    let ended = shut_down(bantam, &[Signal::SIGTERM]);
    ended.printed("pressed\n").has_status(STATUS_POWER_CUT);
}

#[test]
fn a_second_signal_cuts_the_power_at_once() {
    require_kvm!();
    for second in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGQUIT] {
        let bantam = button("ignore").option("--shutdown-timeout", "10m");
        let machine = bantam.start();
        machine.wait_for_output("ready\n");
        machine.signal(Signal::SIGTERM);
        machine.wait_for_output("pressed\n");
        machine.signal(second);
        machine.wait().has_status(STATUS_POWER_CUT);
    }
}

#[test]
fn a_guest_is_not_asked_without_time_or_a_driver() {
    require_kvm!();
    let at_once = [
        (
            button("ignore").option("--shutdown-timeout", "0"),
            Signal::SIGTERM,
        ),
        (button("ignore"), Signal::SIGQUIT),
        (Bantam::payload("serial").append("bytes=1"), Signal::SIGTERM),
    ];
    for (bantam, signal) in at_once {
        let machine = bantam.stdin(std::process::Stdio::piped()).start();
        machine.wait_for_output("ready");
        machine.signal(signal);
        let ended = machine.wait();
        ended.has_status(STATUS_POWER_CUT);
        assert!(!ended.stderr.contains("asking the guest"), "{ended}");
    }
}

#[test]
fn the_api_asks_first_if_it_is_told_to() {
    require_kvm!();
    let cases = [
        (None, true, "the power was cut"),
        (Some("10m"), true, "the guest has powered off"),
        (Some("10m"), false, "the guest has powered off"),
    ];
    for (timeout, has_console, reason) in cases {
        let machine = ApiMachine::with(|bantam, folder| {
            let mut config = json!({
                "boot-source": bare_metal_boot_source("button", "finish=poweroff"),
                "machine-config": {"vcpu_count": 1, "mem_size_mib": 64},
            });
            if !has_console {
                config["serial"] = json!({"serial_out_path": folder.join("serial")});
            }
            let file = folder.join("config.json");
            fs::write(&file, config.to_string()).unwrap();
            let bantam = bantam.option("--config-file", file);
            match timeout {
                Some(timeout) => bantam.option("--shutdown-timeout", timeout),
                None => bantam,
            }
        });
        if has_console {
            machine.running.wait_for_output("ready\n");
        } else {
            let serial = machine.path("serial");
            let deadline = Instant::now() + PATIENCE;
            while !fs::read_to_string(&serial).is_ok_and(|output| output.contains("ready\n")) {
                assert!(Instant::now() < deadline, "the guest is not ready");
                thread::sleep(Duration::from_millis(1));
            }
        }
        let ended = machine.stop();
        ended.has_status(0);
        assert!(
            ended.stderr.contains(&format!("has ended: {reason}")),
            "{ended}"
        );
    }
}

// --- Halts --------------------------------------------------------------------------------------------

#[test]
fn a_guest_that_has_halted_for_good_is_ended_if_asked_for() {
    require_kvm!();
    for cpus in ["1", "3"] {
        let ended = hello("finish=hang")
            .option("--cpus", cpus)
            .option("--on-halt", "exit")
            .finish();
        ended.has_status(STATUS_HALTED);
        assert_eq!(ended.text().lines().next_back(), Some("PASS"), "{ended}");
    }
}

#[test]
fn a_guest_that_has_halted_for_good_is_reported_once() {
    require_kvm!();
    let machine = hello("finish=hang").start();
    let line = "the guest has halted for good";
    machine.wait_for_error(line);
    machine.signal(Signal::SIGTERM);
    let ended = machine.wait();
    ended.has_status(STATUS_POWER_CUT);
    assert_eq!(ended.stderr.matches(line).count(), 1, "{ended}");
}

#[test]
fn a_guest_that_an_interrupt_can_wake_has_not_halted_for_good() {
    require_kvm!();
    let folder = tempfile::tempdir().unwrap();
    // again: sti; hlt; jmp again
    let machine = code(&folder, &[0xfb, 0xf4, 0xeb, 0xfc])
        .option("--on-halt", "exit")
        .option("--log", "debug")
        .start();
    // Logged when the vCPUs have been checked.
    machine.wait_for_error("the vCPUs are idle");
    machine.signal(Signal::SIGTERM);
    let ended = machine.wait();
    ended.has_status(STATUS_POWER_CUT);
    assert!(!ended.stderr.contains("Halted"), "{ended}");
}
