//! The commands of `docs/networking.md`, unchanged, on a host with Docker's firewall rules and in a
//! Linux guest.

use std::fs;
use std::io::Write;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command, Stdio};
use std::thread;

use bantam_tests::{Bantam, Kernel, RootFileSystem, Running, accept, require_kvm, require_taps};
use nix::sched::{CloneFlags, unshare};
use tempfile::TempDir;

const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/networking.md");

// Addresses reserved for documentation (RFC 5737), in namespaces that no packet leaves.
const UPLINK: &str = "203.0.113.2";
const OUTSIDE: &str = "203.0.113.1";

/// The rules of Docker 28 on a host without containers when it turns forwarding on.
const DOCKER_RULES: &str = "\
*filter
:INPUT ACCEPT
:FORWARD DROP
:OUTPUT ACCEPT
:DOCKER -
:DOCKER-BRIDGE -
:DOCKER-CT -
:DOCKER-FORWARD -
:DOCKER-USER -
-A FORWARD -j DOCKER-USER
-A FORWARD -j DOCKER-FORWARD
-A DOCKER ! -i docker0 -o docker0 -j DROP
-A DOCKER-BRIDGE -o docker0 -j DOCKER
-A DOCKER-CT -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A DOCKER-FORWARD -j DOCKER-CT
-A DOCKER-FORWARD -j DOCKER-BRIDGE
-A DOCKER-FORWARD -i docker0 -j ACCEPT
COMMIT
*nat
:POSTROUTING ACCEPT
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
COMMIT
";

const FIREWALL: &str = "Where a firewall is in the way";

#[test]
fn a_guest_reaches_the_outside_by_what_the_page_says() {
    require_kvm!();
    require_taps!();
    let page = fs::read_to_string(PAGE).unwrap();
    let host = Host::new();
    let says = |heading: &str, number: usize| host.run(&block(&page, heading, number));

    assert!(says("Addresses", 0).contains(" via "));
    says("The tap", 0);
    says("Host and guest only", 0);
    says("To the outside by NAT", 0);
    let chains = says(FIREWALL, 0);
    assert!(chains.contains("policy drop"), "{chains}");
    assert!(chains.contains("-P FORWARD DROP"), "{chains}");

    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("root");
    fs::copy(RootFileSystem::new().ext4, &root).unwrap();
    let machine = Bantam::linux(Kernel::Small)
        .disk(&root, "")
        .option("--net", "tap=tap0")
        .append("quiet")
        .stdin(Stdio::piped())
        .start();
    machine.wait_for_output("bantam:/root# ");
    let mut guest = Guest {
        machine,
        commands: 0,
    };
    for heading in ["Host and guest only", "To the outside by NAT"] {
        for line in block(&page, heading, 1).lines() {
            assert!(guest.succeeds(line), "{line}");
        }
    }
    assert!(guest.succeeds("ping -c 1 -W 5 10.213.7.1"));
    let connect = format!("nc -w 3 {OUTSIDE} {}", host.port);
    assert!(!guest.succeeds(&connect), "the rules drop nothing");

    says(FIREWALL, 1);
    assert!(guest.succeeds(&connect));
    guest.machine.wait_for_output("hello from outside");
    guest.machine.send(b"reboot\n");
    guest.machine.wait().succeeded();

    // In a chain whose policy is to drop.
    host.run("iptables-restore < /dev/null; iptables -F; iptables -P FORWARD DROP");
    says(FIREWALL, 2);
    let rules = host.run("iptables -S FORWARD");
    assert_eq!(rules.matches("-j ACCEPT").count(), 2, "{rules}");
}

/// A guest's shell.
struct Guest {
    machine: Running,
    commands: usize,
}

impl Guest {
    /// Returns whether the guest's `command` exits with status 0.
    fn succeeds(&mut self, command: &str) -> bool {
        self.commands += 1;
        let number = self.commands;
        // The shell echoes its input; only its output has no quotes.
        let typed = format!("{command} && echo \"yes-\"{number}.; echo \"end-\"{number}.\n");
        self.machine.send(typed.as_bytes());
        let output = self.machine.wait_for_output(&format!("end-{number}."));
        output.contains(&format!("yes-{number}."))
    }
}

/// Returns the text of a section's code block, counted from 0.
fn block(page: &str, heading: &str, number: usize) -> String {
    let section = page
        .split("\n#")
        .find(|section| {
            section
                .lines()
                .next()
                .expect("text has a first part")
                .ends_with(heading)
        })
        .unwrap_or_else(|| panic!("there is no section '{heading}'"));
    let text = section.split("```sh\n").nth(number + 1);
    let text = text.unwrap_or_else(|| panic!("'{heading}' has no block {number}"));
    text.split("```")
        .next()
        .expect("text has a first part")
        .to_owned()
}

/// This thread, in a network namespace that stands for a host with Docker. Another namespace, which
/// stands for the outside world, greets its clients, and has no route to guests.
struct Host {
    /// The listener of the outside world.
    port: u16,
    /// Keeps the namespace of the outside world.
    outside: Child,
    /// A folder of programs.
    tools: TempDir,
}

impl Host {
    fn new() -> Host {
        unshare(CloneFlags::CLONE_NEWNET).expect("the host allows it");
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).expect("the host allows it");
        let port = listener.local_addr().expect("the host allows it").port();
        let mut keeper = Command::new("cat");
        keeper.stdin(Stdio::piped()).stdout(Stdio::null());
        let outside = keeper.spawn().expect("the host allows it");

        unshare(CloneFlags::CLONE_NEWNET).expect("the host allows it");
        let tools = tempfile::tempdir().expect("the host allows it");
        let sudo = tools.path().join("sudo");
        fs::write(&sudo, "#!/bin/sh\nexec \"$@\"\n").expect("the host allows it");
        fs::set_permissions(&sudo, fs::Permissions::from_mode(0o755)).expect("the host allows it");
        let host = Host {
            port,
            outside,
            tools,
        };
        let pid = host.outside.id();
        host.run(&format!(
            "ip link add eth0 type veth peer name eth0 netns {pid}
             ip addr add {UPLINK}/24 dev eth0
             ip link set eth0 up
             nsenter --target {pid} --net ip addr add {OUTSIDE}/24 dev eth0
             nsenter --target {pid} --net ip link set eth0 up
             ip route add default via {OUTSIDE}"
        ));
        let rules = host.tools.path().join("rules");
        fs::write(&rules, DOCKER_RULES).expect("the host allows it");
        host.run(&format!("iptables-restore {}", rules.display()));
        thread::spawn(move || {
            let mut guest = accept(&listener);
            assert_eq!(
                guest
                    .peer_addr()
                    .expect("the host allows it")
                    .ip()
                    .to_string(),
                UPLINK
            );
            guest
                .write_all(b"hello from outside\n")
                .expect("the host allows it");
        });
        host
    }

    /// Runs `commands`, each of which must succeed, and returns their output.
    fn run(&self, commands: &str) -> String {
        let path = std::env::var("PATH").unwrap_or_default();
        let output = Command::new("sh")
            .args(["-euxc", commands])
            .env("USER", "root")
            .env("PATH", format!("{}:{path}", self.tools.path().display()))
            .stderr(Stdio::inherit())
            .output()
            .expect("the host allows it");
        assert!(output.status.success(), "{commands}");
        String::from_utf8(output.stdout).expect("the host allows it")
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        drop(self.outside.stdin.take());
        let _ = self.outside.wait();
    }
}
