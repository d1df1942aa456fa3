//! Networks that other programs provide: passt, its like, and taps that are passed on.

#![allow(clippy::unwrap_used, reason = "a test fails where the host does")]

use std::fs;
use std::net::TcpListener;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use bantam_tests::world::{LEASE_SCRIPT, SERVER, file_sum, in_world, ip, serve_file};
use bantam_tests::{
    Bantam, HostTap, Kernel, require_kvm, require_namespaces, require_taps, scripted_root,
    unprivileged,
};

/// Has passt listen on a socket, to which anyone may connect.
fn start_passt(socket: &Path, options: &[&str]) -> Child {
    // It removes what another one has left.
    let _ = fs::remove_file(socket);
    let passt = Command::new("timeout")
        .args(["--kill-after=1", "120", "passt", "--foreground", "--socket"])
        .arg(socket)
        .args(options)
        .stderr(Stdio::piped())
        .spawn();
    let passt = passt.expect("there is passt");
    let deadline = Instant::now() + Duration::from_secs(10);
    while !socket.exists() {
        assert!(Instant::now() < deadline, "passt does not start");
        thread::sleep(Duration::from_millis(10));
    }
    // It has given up root, and the monitor has no capabilities.
    fs::set_permissions(socket, fs::Permissions::from_mode(0o777)).unwrap();
    passt
}

/// Gives the world an interface with a default route, which is what passt shows the guest.
fn add_interface() {
    ip("link add world type veth peer name other");
    ip("link set other up");
    ip("address add 198.51.100.2/24 dev world");
    ip("link set world up");
    ip("route add default via 198.51.100.1");
}

#[test]
fn linux_is_on_a_network_of_passt() {
    require_kvm!();
    require_namespaces!();
    in_world(|| {
        add_interface();
        let files = TcpListener::bind((SERVER, 80)).unwrap();
        thread::spawn(move || serve_file(&files));
        let folder = tempfile::tempdir().unwrap();
        // It gives up root.
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let socket = folder.path().join("passt");
        let missing = Bantam::payload("hello")
            .option("--net", format!("passt={}", socket.display()))
            .finish();
        let reason = missing.failed_with_one_line();
        assert!(reason.contains("so start passt"), "{reason}");
        let mut passt = start_passt(&socket, &["--one-off"]);
        let script = format!(
            "#!/bin/sh\n\
             udhcpc -i eth0 -n -q -f -s /lease.sh\n\
             wget -q -O - http://{SERVER}/ | md5sum\n\
             printf '\\000' | dd of=/dev/port bs=1 seek=1280\n"
        );
        let scripts = [("test.sh", script.as_str()), ("lease.sh", LEASE_SCRIPT)];
        let root = scripted_root(folder.path(), &scripts);
        let ended = Bantam::linux(Kernel::Small)
            .launcher(unprivileged())
            .disk(&root, "")
            .append("quiet init=/test.sh")
            .option("--net", format!("passt={}", socket.display()))
            .finish();
        // With `--one-off` it ends with its guest.
        passt.wait().unwrap();
        ended.printed("LEASE 198.51.100.2 255.255.255.0 198.51.100.1");
        ended.printed(&format!("{}  -", file_sum())).succeeded();
    });
}

#[test]
fn the_link_is_down_until_passt_is_there_again() {
    require_kvm!();
    require_namespaces!();
    in_world(|| {
        add_interface();
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let socket = folder.path().join("passt");
        for confinement in [["--seccomp", "off"], ["--seccomp", "kill"]] {
            let mut passt = start_passt(&socket, &[]);
            let mut machine = Bantam::payload("devices")
                .launcher(unprivileged())
                .option("--net", format!("passt={}", socket.display()))
                .append("net-arp=198.51.100.2,198.51.100.1 net-link=2");
            for word in confinement {
                machine = machine.argument(word);
            }
            let machine = machine.start();
            for round in ["the first time", "the second time"] {
                machine.wait_for_output(&format!("net: waits for a loss of its link {round}"));
                kill(&mut passt);
                machine.wait_for_output(&format!("ok: net loses its link {round}"));
                passt = start_passt(&socket, &[]);
                machine.wait_for_output(&format!("ok: net resolves with a new link {round}"));
            }
            let ended = machine.wait();
            ended.passed();
            let losses = ended.stderr.matches("has ended the connection").count();
            assert_eq!(losses, 2, "{}", ended.stderr);
            kill(&mut passt);
        }
    });
}

/// Ends a process that `timeout` has started, at once.
fn kill(timeout: &mut Child) {
    let pid = nix::unistd::Pid::from_raw(timeout.id() as i32);
    let children = format!("/proc/{pid}/task/{pid}/children");
    let children = fs::read_to_string(children).unwrap();
    for child in children.split_whitespace() {
        let child = nix::unistd::Pid::from_raw(child.parse().unwrap());
        nix::sys::signal::kill(child, nix::sys::signal::Signal::SIGKILL).unwrap();
    }
    timeout.wait().unwrap();
}

mod request {
    nix::ioctl_write_ptr_bad!(attach, libc::TUNSETIFF, libc::ifreq);
}

#[test]
fn a_tap_that_another_program_has_opened_is_used() {
    require_taps!();
    let tap = HostTap::new();
    let opened = fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun");
    let opened = opened.unwrap();
    // SAFETY: it consists of integers and pointers, all of which may be zero.
    let mut attachment: libc::ifreq = unsafe { std::mem::zeroed() };
    for (target, byte) in attachment.ifr_name.iter_mut().zip(tap.name.bytes()) {
        *target = byte as libc::c_char;
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    attachment.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: the request reads an ifreq and writes the name back to it; it is our own.
    unsafe { request::attach(opened.as_raw_fd(), &attachment) }.unwrap();
    // The monitor has it as descriptor 9.
    let pass_on = ["sh", "-c", "exec 9<&0 </dev/null; exec \"$@\"", "sh"];
    let launcher = pass_on.into_iter().chain(unprivileged());
    let ended = Bantam::payload("devices")
        .launcher(launcher)
        .stdin(opened)
        .option("--net", "fd=9")
        .append(format!("net-arp={},{} offloads", tap.guest, tap.host))
        .finish();
    ended
        .passed()
        .printed(&format!("ok: net resolves {},{}", tap.guest, tap.host));
    let refused = Bantam::payload("hello").option("--net", "fd=999").finish();
    assert_eq!(
        refused.failed_with_one_line(),
        "cannot use descriptor 999 as a tap: no such descriptor is open"
    );
}
