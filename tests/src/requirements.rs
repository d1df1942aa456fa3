//! What the host must offer to a test.

use std::env;
use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use bantam_vmm::host;

use crate::huge_pages::HugePagePool;
use crate::loop_device::LoopDevice;
use crate::process::with_devices;
use crate::stalling_storage::StallingStorage;

/// Returns whether there is no usable `/dev/kvm` and the user wants to skip tests then.
///
/// # Panics
///
/// If there is none and the user has not asked to skip tests.
pub fn lacks_kvm() -> bool {
    let reason = open_for_update("/dev/kvm").err();
    skip_or_fail(reason, "BANTAM_SKIP_KVM_TESTS")
}

/// Returns whether this process cannot create tap interfaces and the user wants to skip tests then.
///
/// # Panics
///
/// If it cannot and the user has not asked to skip tests.
pub fn lacks_taps() -> bool {
    let reason = if host::can_administer_network() {
        open_for_update("/dev/net/tun").err()
    } else {
        Some("creating network interfaces takes CAP_NET_ADMIN".to_owned())
    };
    skip_or_fail(reason, "BANTAM_SKIP_TAP_TESTS")
}

/// Returns whether this process cannot give a program its own `/dev` or file system, as
/// [`with_devices`] and [`with_mounts`](crate::with_mounts) do, and the user wants to skip tests
/// then.
///
/// # Panics
///
/// If it cannot and the user has not asked to skip tests.
pub fn lacks_namespaces() -> bool {
    let words = with_devices("true");
    let (program, arguments) = words.split_first().expect("a launcher has a program");
    let mut probe = Command::new(program);
    probe.args(arguments).arg("/bin/true").stdin(Stdio::null());
    let reason = match probe.output() {
        Ok(output) if output.status.success() => None,
        Ok(output) => {
            let message = String::from_utf8_lossy(&output.stderr);
            Some(format!("no mount namespace: {}", message.trim()))
        }
        Err(error) => Some(format!("cannot run {program}: {error}")),
    };
    skip_or_fail(reason, "BANTAM_SKIP_NAMESPACE_TESTS")
}

/// Returns whether this process cannot make a [`LoopDevice`] and the user wants to skip tests then.
///
/// # Panics
///
/// If it cannot and the user has not asked to skip tests.
pub fn lacks_loop_devices() -> bool {
    let file = tempfile::NamedTempFile::new().expect("there is room for temporary files");
    file.as_file().set_len(1 << 20).expect("sizes can be set");
    let reason = LoopDevice::try_new(file.path()).err();
    skip_or_fail(reason, "BANTAM_SKIP_LOOP_TESTS")
}

/// Returns whether this process cannot mount a [`StallingStorage`] and the user wants to skip tests
/// then.
///
/// # Panics
///
/// If it cannot and the user has not asked to skip tests.
pub fn lacks_fuse() -> bool {
    skip_or_fail(StallingStorage::try_new().err(), "BANTAM_SKIP_FUSE_TESTS")
}

/// Returns whether the host sets no huge pages aside for this process, and prints the reason. Many
/// hosts have a good one: fragmented memory, or settings that their own guests may not change.
pub fn lacks_huge_pages() -> bool {
    let reason = HugePagePool::try_new(16).err();
    reason.inspect(|reason| say_skipped(reason)).is_some()
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
    say_skipped(&reason);
    true
}

fn say_skipped(reason: &str) {
    let test = std::thread::current();
    let line = format!("skipped {}: {reason}\n", test.name().unwrap_or("a test"));
    // Not by a macro: the test harness would capture the output of one.
    let _ = io::stderr().write_all(line.as_bytes());
}
