//! The judge of disk images.

use std::path::Path;
use std::process::{Command, Output};
use std::thread;
use std::time::{Duration, Instant};

/// How long the lock of a monitor that was killed can stay.
const LOCK_LIMIT: Duration = Duration::from_secs(10);
/// The status of a check that has found clusters that nothing uses, and no other fault.
const STATUS_LEAKS: i32 = 3;

fn output(words: &[&str], paths: &[&Path]) -> Output {
    let output = Command::new("qemu-img").args(words).args(paths).output();
    output.expect("qemu-img is installed")
}

/// Runs qemu-img with `words` and then `paths`, and returns what it prints.
///
/// # Panics
/// If it fails.
#[track_caller]
pub fn qemu_img(words: &[&str], paths: &[&Path]) -> String {
    let output = output(words, paths);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{words:?}: {text}{errors}");
    text
}

/// Checks a qcow2 image that no monitor uses any more. If one was killed, clusters may be leaked.
///
/// # Panics
/// If the image is damaged, or has clusters that nothing uses and `may_leak` is not set.
#[track_caller]
pub fn check_image(image: &Path, may_leak: bool) {
    let check = || output(&["check", "-f", "qcow2"], &[image]);
    let mut output = check();
    let deadline = Instant::now() + LOCK_LIMIT;
    // The kernel closes the files of an io_uring some time after its process has ended.
    while String::from_utf8_lossy(&output.stderr).contains("lock") && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(5));
        output = check();
    }
    let is_good = match output.status.code() {
        Some(0) => true,
        Some(STATUS_LEAKS) => may_leak,
        _ => false,
    };
    // Each leaked cluster has a line.
    let text = String::from_utf8_lossy(&output.stdout);
    let faults: Vec<_> = text
        .lines()
        .filter(|line| line.starts_with("ERROR"))
        .collect();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(is_good, "{}: {faults:#?} {errors}", output.status);
}
