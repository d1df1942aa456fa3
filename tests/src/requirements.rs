//! What the host must offer to a test.

use std::env;
use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use nix::unistd::geteuid;

/// Whether there is no usable `/dev/kvm` and the user has said to skip tests then.
///
/// # Panics
///
/// When there is none and the user has not said so.
pub fn lacks_kvm() -> bool {
    let reason = open_for_update("/dev/kvm").err();
    skip_or_fail(reason, "BANTAM_SKIP_KVM_TESTS")
}

/// Whether this process cannot create tap interfaces and the user has said to skip tests then.
///
/// # Panics
///
/// When it cannot and the user has not said so.
pub fn lacks_taps() -> bool {
    let reason = if geteuid().is_root() {
        open_for_update("/dev/net/tun").err()
    } else {
        Some("only root can create network interfaces".to_owned())
    };
    skip_or_fail(reason, "BANTAM_SKIP_TAP_TESTS")
}

fn open_for_update(path: &str) -> Result<(), String> {
    match File::options().read(true).write(true).open(Path::new(path)) {
        Ok(_) => Ok(()),
        Err(error) => Err(format!("cannot open {path}: {error}")),
    }
}

fn skip_or_fail(reason: Option<String>, variable: &str) -> bool {
    let Some(reason) = reason else {
        return false;
    };
    if env::var_os(variable).is_none_or(|value| value != "1") {
        panic!("this test cannot run here: {reason}; {variable}=1 skips such tests");
    }
    let test = std::thread::current();
    let line = format!("skipped {}: {reason}\n", test.name().unwrap_or("a test"));
    // Not by a macro: the test harness would keep what these print to itself.
    let _ = io::stderr().write_all(line.as_bytes());
    true
}
