//! Network namespaces, in which tests may use any address and port.

use std::process::Command;
use std::thread;

use nix::sched::{CloneFlags, unshare};

/// Runs `test` in a network namespace of its own, which has a loopback interface. Without the right to make one,
/// the test is skipped.
pub(super) fn in_namespace(test: impl FnOnce() + Send + 'static) {
    let thread = thread::spawn(|| {
        if enter_namespace() {
            test();
        }
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Makes a namespace for the calling thread, and for what it starts. `false` if this user may not.
pub(super) fn enter_namespace() -> bool {
    if let Err(error) = unshare(CloneFlags::CLONE_NEWNET) {
        eprintln!("skipped, as this user may not make network namespaces: {error}");
        return false;
    }
    ip(&["link", "set", "lo", "up"]);
    true
}

pub(super) fn ip(arguments: &[&str]) {
    let status = Command::new("ip").args(arguments).status();
    assert!(
        matches!(&status, Ok(status) if status.success()),
        "'ip {}' failed: {status:?}",
        arguments.join(" ")
    );
}
