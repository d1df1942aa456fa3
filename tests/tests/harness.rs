//! The harness itself: a failing test gives its reason and leaves nothing behind.

use std::fs;
use std::time::{Duration, Instant};

use bantam_tests::Bantam;

/// A shell in place of the monitor, which it gets as an argument.
fn shell(script: &str) -> Bantam {
    Bantam::new(["unused"]).launcher(["sh", "-c", script, "sh"])
}

#[test]
fn output_and_exit_status_are_captured() {
    let ended = shell("cat; echo problem >&2; exit 3").finish();
    assert_eq!(ended.text(), "");
    assert_eq!(ended.stderr, "problem\n");
    assert_eq!(ended.status.code(), Some(3));
}

#[test]
#[should_panic(expected = "so far so good")]
fn a_process_that_takes_too_long_fails_with_its_output() {
    shell("echo so far so good; sleep 60 & wait")
        .limit(Duration::from_millis(300))
        .finish();
}

#[test]
#[should_panic(expected = "before it printed 'more'")]
fn output_that_does_not_come_fails() {
    shell("echo less").start().wait_for_output("more");
}

#[test]
#[should_panic(expected = "before it printed 'more'")]
fn output_that_comes_too_late_fails() {
    shell("echo less; sleep 60")
        .limit(Duration::from_millis(300))
        .start()
        .wait_for_output("more");
}

#[test]
fn a_process_and_its_children_end_when_they_are_dropped() {
    let running = shell("sleep 60 & echo child $!; wait").start();
    let text = running.wait_for_output("\n");
    let child = text.trim().strip_prefix("child ").unwrap();
    let is_alive = |pid: &str| {
        fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
    };
    let shell = running.pid().to_string();
    assert!(is_alive(child) && is_alive(&shell));
    drop(running);
    let deadline = Instant::now() + Duration::from_secs(5);
    while is_alive(child) || is_alive(&shell) {
        assert!(Instant::now() < deadline, "they still live");
        std::thread::sleep(Duration::from_millis(1));
    }
}
