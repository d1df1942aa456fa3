//! Hosts with networks of their own, for tests of networks: namespaces in which no packet leaves them.

use std::fs;
use std::io::Write;
use std::net::TcpListener;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::world::read_request;
use crate::{Bantam, Ended, Running, monitor};

/// The host's address in the world.
pub const UPLINK: &str = "203.0.113.2";
/// The world's router, name server and web server.
pub const OUTSIDE: &str = "203.0.113.1";

/// What busybox's DHCP client calls.
pub const LEASE_SCRIPT: &str = "#!/bin/sh\n\
    case $1 in\n\
    deconfig) ifconfig eth0 up;;\n\
    bound)\n\
        ifconfig eth0 $ip netmask $subnet\n\
        test -n \"$router\" && route add default gw $router\n\
        echo search $domain > /etc/resolv.conf\n\
        echo nameserver $dns >> /etc/resolv.conf\n\
        echo LEASE $ip $domain;;\n\
    esac\n";

/// Runs `test` on a host of its own.
pub fn on_host(test: impl FnOnce() + Send + 'static) {
    let thread = thread::spawn(|| {
        // A thread has namespaces of its own, and passes them on to what it starts.
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)
            .expect("namespaces can be made");
        succeed(
            "mount --make-rprivate / && mount -t tmpfs none /run && mkdir /run/dpkg && mount --bind /var/lib/dpkg /run/dpkg && mount -t tmpfs none /var/lib && mkdir /var/lib/dpkg && mount --bind /run/dpkg /var/lib/dpkg",
        );
        succeed("ip link set lo up");
        test();
        for line in run(&["network", "list", "--output", "json"], "").lines() {
            assert!(
                !line.contains("\"is-started\": true"),
                "a network is left: {line}"
            );
        }
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// A namespace that stands for the world outside the host. Dropping this ends it.
pub struct World {
    keeper: Child,
    names: Child,
}

impl World {
    /// Makes it, with a router, a name server that knows `files.test`, and `web`, which answers requests of HTTP.
    pub fn new(web: TcpListener) -> World {
        thread::spawn(move || serve(&web));
        let mut keeper = Command::new("cat");
        let keeper = keeper.stdin(Stdio::piped()).stdout(Stdio::null()).spawn();
        let keeper = keeper.expect("the host allows it");
        unshare(CloneFlags::CLONE_NEWNET).expect("namespaces can be made");
        let pid = keeper.id();
        let inside = format!("nsenter --target {pid} --net");
        for command in [
            "ip link set lo up".to_owned(),
            format!("ip link add eth0 type veth peer name eth0 netns {pid}"),
            format!("ip addr add {UPLINK}/24 dev eth0"),
            "ip link set eth0 up".to_owned(),
            format!("{inside} ip addr add {OUTSIDE}/24 dev eth0"),
            format!("{inside} ip link set eth0 up"),
            format!("{inside} ip link set lo up"),
            format!("ip route add default via {OUTSIDE}"),
        ] {
            succeed(&command);
        }
        fs::write("/run/resolv.conf", format!("nameserver {OUTSIDE}\n")).expect("it is ours");
        succeed("mount --bind /run/resolv.conf /etc/resolv.conf");
        let names = Command::new("nsenter")
            .args([
                "--target",
                &pid.to_string(),
                "--net",
                "dnsmasq",
                "--keep-in-foreground",
            ])
            .args([
                "--conf-file=/dev/null",
                "--no-resolv",
                "--no-hosts",
                "--pid-file",
            ])
            .arg(format!("--address=/files.test/{OUTSIDE}"))
            .spawn();
        World {
            keeper,
            names: names.expect("the host allows it"),
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = self.names.kill();
        let _ = self.names.wait();
        drop(self.keeper.stdin.take());
        let _ = self.keeper.wait();
    }
}

/// Answers each request of HTTP with the address that it comes from.
fn serve(listener: &TcpListener) {
    for stream in listener.incoming() {
        let mut stream = stream.expect("connections can be accepted");
        read_request(&mut stream);
        let peer = stream.peer_addr().expect("it is connected").ip();
        let _ = write!(stream, "HTTP/1.0 200 OK\r\n\r\nFETCHED by {peer}\n");
    }
}

/// Runs a command of the shell, which must succeed, and returns its output.
#[track_caller]
pub fn succeed(command: &str) -> String {
    let output = Command::new("sh")
        .args(["-c", command])
        .output()
        .expect("there is a shell");
    assert!(
        output.status.success(),
        "{command}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs the program with `folder` before the search path.
pub fn bantam(arguments: &[&str], folder: &str) -> Output {
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new(monitor());
    command
        .args(arguments)
        .env("PATH", format!("{folder}:{path}"));
    command.output().expect("the program can be run")
}

/// Runs the program, which must succeed, and returns its output.
#[track_caller]
pub fn run(arguments: &[&str], folder: &str) -> String {
    let output = bantam(arguments, folder);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {error}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs the program, which must fail, and returns the line that it says.
#[track_caller]
pub fn refused(arguments: &[&str]) -> String {
    let output = bantam(arguments, "");
    assert!(!output.status.success(), "{arguments:?}");
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(error.lines().count(), 1, "{error}");
    error
}

/// Runs `bantam network`, which must succeed, and returns its output.
pub fn network(arguments: &str) -> String {
    let words: Vec<_> = ["network"]
        .into_iter()
        .chain(arguments.split(' '))
        .collect();
    run(&words, "")
}

/// Does the same for output in JSON.
pub fn json(arguments: &str) -> Value {
    let text = network(&format!("{arguments} --output json"));
    serde_json::from_str(&text).expect("it is JSON")
}

/// Lists the interfaces of the host.
pub fn interfaces() -> String {
    succeed("ip -brief link")
}

/// Starts a machine whose payload has used its devices and stays.
pub fn hanging(net: &str) -> Running {
    let machine = Bantam::payload("devices")
        .option("--net", net)
        .append("finish=hang")
        .start();
    machine.wait_for_output("PASS\n");
    machine
}

/// Has a machine end.
pub fn end(machine: Running) -> Ended {
    machine.signal(Signal::SIGTERM);
    machine.wait()
}

/// Kills a machine's process.
pub fn kill(machine: Running) {
    machine.signal(Signal::SIGKILL);
    machine.wait();
}

/// Waits until something is so, which must not take long.
#[track_caller]
pub fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !is_so() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        thread::sleep(Duration::from_millis(10));
    }
}
