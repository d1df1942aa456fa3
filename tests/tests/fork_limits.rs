//! Forks on a host that is out of descriptors. This is a program of its own, as the limit is that of a process.

#![allow(clippy::unwrap_used, reason = "a test fails where the host does")]

use std::fs;

use bantam_tests::counting::{config, configured, counting, wait_until_gone_on};
use bantam_tests::require_kvm;
use bantam_vmm::SnapshotDisks;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

#[test]
fn without_descriptors_a_fork_fails_with_one_line_and_works_later() {
    require_kvm!();
    let (parent, _reader, counters) = counting(&config(1, "timer=local"));
    let (snapshot, _) = parent.fork(&SnapshotDisks::Overlays).unwrap();
    let (child, _child_reader) = configured(snapshot.config());
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let open = fs::read_dir("/proc/self/fd").unwrap().count() as u64;
    let is_refusal = |error: &str| {
        assert!(error.contains("Too many open files"), "{error}");
        assert!(!error.contains('\n'), "{error}");
    };
    let mut refusals = 0;
    // The host runs out of them at each of the places where the child needs one.
    for more in 0..64 {
        setrlimit(Resource::RLIMIT_NOFILE, open + more, hard).unwrap();
        let restored = child.restore(&snapshot);
        let forked = parent.fork(&SnapshotDisks::Overlays);
        setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
        if let Err(error) = &forked {
            is_refusal(&error.to_string());
        }
        match restored {
            Ok(()) => break,
            Err(error) => is_refusal(&error.to_string()),
        }
        refusals += 1;
    }
    assert!(refusals > 5, "{refusals}");
    child.resume().unwrap();
    for machine in [&parent, &child] {
        let memory = machine.memory().unwrap();
        let before = counters.processors(&memory, 1);
        wait_until_gone_on(counters, &memory, &before);
    }
}
