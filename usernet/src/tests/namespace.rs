//! Network namespaces, in which tests may use any address and port.

use std::process::Command;
use std::thread;

use nix::sched::{CloneFlags, unshare};

/// Runs `test` in a network namespace of its own, which has a loopback interface. Without the right to make one,
/// the test is skipped.
pub(super) fn in_namespace(test: impl FnOnce() + Send + 'static) {
    let thread = thread::spawn(|| {
        // A thread has a namespace of its own, and passes it on to what it starts.
        if let Err(error) = unshare(CloneFlags::CLONE_NEWNET) {
            eprintln!("skipped, as this user may not make network namespaces: {error}");
            return;
        }
        ip(&["link", "set", "lo", "up"]);
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

pub(super) fn ip(arguments: &[&str]) {
    let status = Command::new("ip").args(arguments).status();
    assert!(
        matches!(&status, Ok(status) if status.success()),
        "'ip {}' failed: {status:?}",
        arguments.join(" ")
    );
}
