//! The network namespace that stands for the host, from which no packet leaves.

use std::fs;
use std::net::Ipv4Addr;
use std::process::{Command, ExitStatus};
use std::thread;

use nix::sched::{CloneFlags, unshare};

/// The address of the servers.
pub const SERVER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 7);

/// Calls `work` in a namespace of its own: a loopback interface with the address of the servers, and an interface
/// with a default route, which passt wants, and which leads nowhere.
///
/// # Panics
/// If the host does not allow it.
pub fn inside(work: impl FnOnce() + Send) {
    thread::scope(|scope| {
        // A thread has namespaces of its own, and passes them on to what it starts.
        let thread = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("root can make namespaces");
            for command in [
                "ip link set lo up",
                "ip address add 192.0.2.7/32 dev lo",
                "ip link add outside type veth peer name nowhere",
                "ip address add 198.51.100.2/24 dev outside",
                "ip link set outside up",
                "ip link set nowhere up",
                "ip route add default via 198.51.100.1",
            ] {
                let words: Vec<&str> = command.split(' ').collect();
                let status = Command::new(words[0]).args(&words[1..]).status();
                let succeeded = status.as_ref().is_ok_and(ExitStatus::success);
                assert!(succeeded, "'{command}' failed: {status:?}");
            }
            work();
        });
        if let Err(panic) = thread.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

/// Returns how many datagrams have come to a socket in this namespace, whether there was room for them or not
/// (`udpInDatagrams` and `udpInErrors` of RFC 4113).
///
/// # Panics
/// If the kernel does not say.
pub fn datagrams_received() -> f64 {
    let text = fs::read_to_string("/proc/thread-self/net/snmp").expect("the kernel counts");
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("Udp: "));
    let names = lines.next().expect("it counts datagrams");
    let values = lines.next().expect("it counts datagrams");
    names
        .split(' ')
        .zip(values.split(' '))
        .filter(|(name, _)| matches!(*name, "InDatagrams" | "InErrors"))
        .map(|(_, value)| value.parse::<f64>().expect("it is a number"))
        .sum()
}
