//! Networks of the host beside firewalls that drop what they do not know: each with its real rules.
//!
//! A machine is a network namespace here, whose end of a veth is on the bridge: it gets its address by DHCP, asks for a
//! name, and fetches a file from the world.

use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command, Stdio};

use bantam_tests::virtual_host::{
    OUTSIDE, UPLINK, World, bantam, json, network, on_host, succeed, wait_until,
};
use bantam_tests::{require_kvm, require_taps};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// What busybox's DHCP client calls.
const LEASE_SCRIPT: &str = "#!/bin/sh\n\
    test $1 = bound || exit 0\n\
    ip addr add $ip/$mask dev eth0\n\
    ip route add default via $router\n\
    echo $dns > /run/dns\n";

/// A bus on which everybody may do everything.
const BUS: &str = "<!DOCTYPE busconfig PUBLIC '-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN' \
    'http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd'>\n\
    <busconfig><type>system</type><listen>unix:path=/run/dbus/system_bus_socket</listen>\n\
    <policy context='default'><allow user='*'/><allow own='*'/><allow send_type='method_call'/>\n\
    <allow send_destination='*'/><allow receive_sender='*'/></policy></busconfig>\n";

/// Runs `test` on a host that has a way to the world.
fn on_connected_host(test: impl FnOnce() + Send + 'static) {
    on_host(|| {
        let web = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 80)).expect("nobody else listens");
        let _world = World::new(web);
        succeed("ip link set lo up");
        test();
    });
}

/// A process that is ended with this.
struct Program(Child);

impl Program {
    fn start(program: &str, arguments: &[&str]) -> Program {
        let mut command = Command::new(program);
        let command = command.args(arguments).stdin(Stdio::null());
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        Program(child.unwrap_or_else(|error| panic!("{program}: {error}")))
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // Asked to, it takes its rules with it.
        let pid = i32::try_from(self.0.id()).expect("it is one of the host's");
        let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        let _ = self.0.wait();
    }
}

/// What stands for a machine.
struct Machine {
    keeper: Child,
}

impl Machine {
    /// Puts one on the bridge.
    fn new() -> Machine {
        let mut keeper = Command::new("unshare");
        keeper.args(["--net", "sh", "-c", "echo && cat"]);
        let keeper = keeper.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut keeper = keeper.expect("the host allows it");
        let mut line = [0];
        let stdout = keeper.stdout.as_mut().expect("it is a pipe");
        std::io::Read::read_exact(stdout, &mut line).expect("it is in its namespace");
        let machine = Machine { keeper };
        succeed(&format!(
            "ip link add v0 type veth peer name eth0 netns {} && ip link set v0 master bantam0 && ip link set v0 up",
            machine.keeper.id()
        ));
        assert!(machine.runs("ip link set lo up && ip link set eth0 up"));
        machine
    }

    /// Runs a command in the machine, and returns whether it succeeds.
    fn runs(&self, command: &str) -> bool {
        let pid = self.keeper.id().to_string();
        let mut nsenter = Command::new("nsenter");
        let nsenter = nsenter.args(["--target", &pid, "--net", "sh", "-c", command]);
        let output = nsenter.output().expect("there is nsenter");
        output.status.success()
    }

    /// Whether it gets an address.
    fn has_dhcp(&self) -> bool {
        // The server first sees for three seconds whether anybody else has the address.
        let script = "/run/lease.sh";
        fs::write(script, LEASE_SCRIPT).expect("it is ours");
        fs::set_permissions(script, fs::Permissions::from_mode(0o755)).expect("it is ours");
        assert!(self.runs("ip addr flush dev eth0"));
        self.runs(&format!(
            "busybox udhcpc -i eth0 -n -q -f -t 10 -T 1 -s {script}"
        ))
    }

    /// Whether the name server answers.
    fn has_names(&self) -> bool {
        self.runs("busybox timeout 4 busybox nslookup -type=a files.test $(cat /run/dns)")
    }

    /// Whether it reaches the world, under the host's address.
    fn has_a_way_out(&self) -> bool {
        self.runs(&format!(
            "busybox timeout 4 busybox wget -q -O - http://{OUTSIDE}/ | grep 'FETCHED by {UPLINK}'"
        ))
    }

    #[track_caller]
    fn has_everything(&self) {
        assert!(
            self.has_dhcp(),
            "no address: {}",
            succeed("nft list ruleset")
        );
        assert!(
            self.has_names(),
            "no names: {}",
            succeed("nft list ruleset")
        );
        assert!(
            self.has_a_way_out(),
            "no way out: {}",
            succeed("nft list ruleset")
        );
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        drop(self.keeper.stdin.take());
        let _ = self.keeper.wait();
    }
}

/// Starts the network for machines, and returns what it says.
fn start() -> String {
    let started = bantam(&["network", "start", "default"], "");
    let said = String::from_utf8_lossy(&started.stderr).into_owned();
    assert!(started.status.success(), "{said}");
    said
}

/// The same if `firewall-cmd` has to be waited for, which takes long if the host is busy.
fn start_beside_firewalld() {
    wait_until("nothing is in the way", || start().is_empty());
}

/// Returns the rules of the host, without counters.
fn rules() -> String {
    succeed("nft --stateless list ruleset")
}

#[test]
#[ignore = "it needs firewalld, which is a firewall of this host as soon as it is installed"]
fn a_network_has_everything_beside_firewalld() {
    require_kvm!();
    require_taps!();
    on_connected_host(|| {
        fs::create_dir("/run/dbus").expect("it is ours");
        fs::write("/run/bus.conf", BUS).expect("it is ours");
        let _bus = Program::start("dbus-daemon", &["--config-file=/run/bus.conf", "--nofork"]);
        let is_there = || std::path::Path::new("/run/dbus/system_bus_socket").exists();
        wait_until("there is a bus", is_there);
        let firewalld = || {
            let firewalld = Program::start(
                "firewalld",
                &["--nofork", "--nopid", "--log-target=console"],
            );
            wait_until("firewalld runs", || {
                let state = Command::new("firewall-cmd").arg("--state").output();
                state.expect("firewalld is installed").status.success()
            });
            firewalld
        };
        let running = firewalld();
        start_beside_firewalld();
        let machine = Machine::new();
        machine.has_everything();
        let is_trusted = || {
            let zones = succeed("firewall-cmd --get-active-zones");
            zones.contains("trusted\n  interfaces: bantam0")
        };
        assert!(is_trusted());
        succeed("firewall-cmd --zone=trusted --remove-interface=bantam0");
        assert!(!machine.has_dhcp());
        start_beside_firewalld();

        // It forgets what was not written to its files when it loads its rules again, or is started again.
        succeed("firewall-cmd --reload");
        assert!(!is_trusted());
        start_beside_firewalld();
        assert!(is_trusted());
        drop(running);
        let running = firewalld();
        assert!(!is_trusted());
        start_beside_firewalld();
        machine.has_everything();

        drop(machine);
        network("stop default");
        assert!(!rules().contains("bantam0"), "{}", rules());
        drop(running);
        assert_eq!(rules(), "");
    });
}

#[test]
fn a_network_has_everything_beside_ufw() {
    require_kvm!();
    require_taps!();
    on_connected_host(|| {
        // It is enabled here only.
        succeed("cp -a /etc/ufw /run/ufw && mount --bind /run/ufw /etc/ufw");
        succeed("ufw --force enable");
        assert!(rules().contains("ufw-before-input"), "{}", rules());
        assert_eq!(start(), "");
        let machine = Machine::new();
        machine.has_everything();
        assert_eq!(json("info default")["warnings"], serde_json::json!([]));

        succeed("iptables -D INPUT -i bantam0 -p udp --dport 67 -j ACCEPT");
        assert!(!machine.has_dhcp());
        succeed("iptables -D INPUT -i bantam0 -p udp --dport 53 -j ACCEPT");
        assert!(!machine.has_names());
        succeed("iptables -D FORWARD -i bantam0 -j ACCEPT");
        assert!(!machine.has_a_way_out());
        assert_eq!(start(), "");
        machine.has_everything();
        // It leaves the rules of others alone.
        succeed("ufw reload");
        machine.has_everything();
        drop(machine);
        network("stop default");
        assert!(!rules().contains("bantam0"), "{}", rules());
        succeed("ufw disable && nft flush ruleset");
    });
}

#[test]
fn a_network_has_everything_beside_iptables_that_drop() {
    require_kvm!();
    require_taps!();
    on_connected_host(|| {
        succeed("iptables -P FORWARD DROP && iptables -P INPUT DROP");
        succeed("iptables -A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT");
        let before = rules();
        assert_eq!(start(), "");
        let machine = Machine::new();
        machine.has_everything();
        succeed("iptables -F FORWARD");
        assert!(!machine.has_a_way_out());
        assert_eq!(start(), "");
        machine.has_everything();
        drop(machine);
        network("stop default");
        assert_eq!(rules(), before);
    });
}

#[test]
fn what_a_table_of_the_administrators_needs_is_said() {
    require_kvm!();
    require_taps!();
    on_connected_host(|| {
        succeed(
            "nft 'table inet mine {
                chain in { type filter hook input priority 0; policy drop; ct state established,related accept; }
                chain through { type filter hook forward priority 0; policy drop; }
            }'",
        );
        let said = start();
        assert_eq!(said.lines().count(), 2, "{said}");
        let machine = Machine::new();
        assert!(!machine.has_dhcp());
        // What it says is what helps.
        for line in said.lines() {
            let chain = line.split('\'').nth(1).expect("it names the chain");
            let rules = line.split(": add ").nth(1).expect("it says what to add");
            for rule in rules.split('\'').skip(1).step_by(2) {
                succeed(&format!("nft 'add rule inet mine {chain} {rule}'"));
            }
        }
        machine.has_everything();
        drop(machine);
        network("stop default");
    });
}
