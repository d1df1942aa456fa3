//! `bantam virsh`, and Bantam under the name virsh: what it prints is laid out as virsh 9.0 does it.

#![allow(clippy::unwrap_used, reason = "a test fails where the host does")]

use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use bantam_tests::{Bantam, Ended, Terminal, payload, require_kvm};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

/// How long something may take that needs milliseconds, on a busy host.
const PATIENCE: Duration = Duration::from_secs(30);

/// The machines of a test, in folders of their own. They are destroyed with this.
struct Domains {
    folder: TempDir,
}

impl Domains {
    fn new() -> Domains {
        Domains {
            folder: tempfile::tempdir().unwrap(),
        }
    }

    fn variables(&self) -> Vec<String> {
        let folder = self.folder.path().display();
        vec![
            "env".to_owned(),
            "--unset=LIBVIRT_DEFAULT_URI".to_owned(),
            "--unset=VIRSH_DEFAULT_CONNECT_URI".to_owned(),
            "TZ=UTC".to_owned(),
            format!("BANTAM_STATE_DIR={folder}"),
            format!("BANTAM_NETWORK_ROOT={folder}/networks"),
        ]
    }

    fn run(&self, line: &str) -> Ended {
        let words = line.split(' ').filter(|word| !word.is_empty());
        Bantam::new(["virsh"].into_iter().chain(words))
            .launcher(self.variables())
            .finish()
    }

    /// Executes a command that has to succeed, and returns what it prints.
    #[track_caller]
    fn done(&self, line: &str) -> String {
        let ended = self.run(line);
        ended.has_status(0);
        assert_eq!(ended.stderr, "", "{ended}");
        ended.text()
    }

    /// Executes a command that has to succeed with a message, which an empty line comes after.
    #[track_caller]
    fn says(&self, line: &str, message: &str) {
        assert_eq!(self.done(line), format!("{message}\n\n"));
    }

    /// Executes a command that has to fail with one line, and returns that.
    #[track_caller]
    fn refused(&self, line: &str) -> String {
        let ended = self.run(line);
        ended.has_status(1);
        assert_eq!(ended.text().trim(), "", "{ended}");
        assert_eq!(ended.stderr.lines().count(), 1, "{ended}");
        ended.stderr.trim_end().to_owned()
    }

    /// Writes the machine file of a machine with a payload as its kernel, and returns its path.
    fn machine_file(&self, name: &str, payload_name: &str, words: &str) -> PathBuf {
        let disk = self.folder.path().join("disk.img");
        fs::write(&disk, vec![0; 1 << 20]).unwrap();
        let file = self.folder.path().join(format!("{name}.toml"));
        let text = format!(
            "kernel = {:?}\nappend = {words:?}\nmemory = \"32M\"\n[[disk]]\npath = {disk:?}\n[[net]]\nuser = true\n",
            payload(payload_name)
        );
        fs::write(&file, text).unwrap();
        file
    }

    /// Defines a machine whose guest does nothing.
    #[track_caller]
    fn define(&self, name: &str) {
        self.define_payload(name, "hello", "finish=hang");
    }

    #[track_caller]
    fn define_payload(&self, name: &str, payload_name: &str, words: &str) {
        let file = self.machine_file(name, payload_name, words);
        let file = file.display();
        self.says(
            &format!("define {file}"),
            &format!("Domain '{name}' defined from {file}"),
        );
    }

    #[track_caller]
    fn id(&self, name: &str) -> String {
        self.done(&format!("-q domid {name}")).trim().to_owned()
    }
}

impl Drop for Domains {
    fn drop(&mut self) {
        for name in self.run("-q list --name").text().lines() {
            self.run(&format!("destroy {name}"));
        }
    }
}

#[test]
fn a_created_domain_vanishes_when_it_has_ended() {
    require_kvm!();
    let domains = Domains::new();
    let disk = domains.folder.path().join("disk.img");
    fs::write(&disk, vec![7; 1 << 20]).unwrap();
    let xml = |words: &str| {
        format!(
            "<domain type='kvm'><name>web</name><metadata>\
             <bantam:machine xmlns:bantam='urn:bantam:machine'>seccomp = 'kill'</bantam:machine></metadata>\
             <memory unit='MiB'>32</memory><os><type>hvm</type><kernel>{}</kernel>\
             <cmdline>{words}</cmdline></os><devices><disk type='file'><driver type='raw'/><source file='{}'/>\
             <target dev='vda'/></disk><serial type='pty'/><memballoon model='none'/></devices></domain>",
            payload("hello").display(),
            disk.display()
        )
    };
    let file = domains.folder.path().join("web.xml");
    let create = || format!("create {}", file.display());
    let created = || {
        domains.says(
            &create(),
            &format!("Domain 'web' created from {}", file.display()),
        );
    };
    let fact = |name: &str| {
        let text = domains.done("dominfo web");
        let line = text.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_once(':').unwrap().1.trim().to_owned()
    };
    let left = || {
        let machines = fs::read_dir(domains.folder.path().join("machines")).unwrap();
        let names = machines.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name != ".lock").collect::<Vec<_>>()
    };
    fs::write(&file, xml("finish=hang")).unwrap();
    created();
    assert_eq!(fact("Persistent"), "no");
    for (option, listed) in [("--transient", "web\n"), ("--persistent", "")] {
        assert_eq!(domains.done(&format!("-q list --name {option}")), listed);
    }
    for (command, reason) in [
        ("managedsave web", "it is transient"),
        ("snapshot-create-as web one", "it is transient"),
        ("autostart web", "it is transient"),
        ("undefine web", "domain is running"),
    ] {
        let line = domains.refused(command);
        assert!(line.contains(reason), "{line}");
    }
    let line = domains.refused(&create());
    assert!(line.contains("there is a machine 'web' already"), "{line}");
    // A reset is not its end.
    domains.says("reset web", "Domain 'web' was reset");
    assert_eq!(fact("State"), "running");
    domains.says("destroy web", "Domain 'web' destroyed");
    assert!(domains.refused("dominfo web").contains("web"));
    let nothing_is_left = || {
        let begin = Instant::now();
        while !left().is_empty() {
            assert!(begin.elapsed() < PATIENCE, "{:?}", left());
            thread::sleep(Duration::from_millis(10));
        }
    };
    nothing_is_left();

    // The end may also be that of the guest, or of the process.
    fs::write(&file, xml("finish=poweroff")).unwrap();
    created();
    nothing_is_left();
    fs::write(&file, xml("finish=hang")).unwrap();
    created();
    let process: i32 = domains.id("web").parse().unwrap();
    kill(Pid::from_raw(process), Signal::SIGKILL).unwrap();
    let begin = Instant::now();
    while domains.done("-q list --all --name").contains("web") {
        assert!(begin.elapsed() < PATIENCE);
        thread::sleep(Duration::from_millis(10));
    }
    assert!(domains.refused("start web").contains("web"));
    created();
    // One that is defined meanwhile stays.
    domains.says(
        &format!("define {}", file.display()),
        &format!("Domain 'web' defined from {}", file.display()),
    );
    assert_eq!(fact("Persistent"), "yes");
    domains.says("destroy web", "Domain 'web' destroyed");
    assert_eq!(left(), ["web"]);
    domains.says("undefine web", "Domain 'web' has been undefined");

    // One that does not start is not there.
    fs::write(&file, xml("finish=hang").replace("/hello<", "/nowhere<")).unwrap();
    let line = domains.refused(&create());
    assert!(
        line.starts_with("error: Failed to create domain from "),
        "{line}"
    );
    assert!(left().is_empty(), "{:?}", left());
    assert_eq!(fs::read(&disk).unwrap(), vec![7; 1 << 20]);
}

#[test]
fn a_domain_lives_from_define_to_undefine() {
    require_kvm!();
    let domains = Domains::new();
    let empty = " Id   Name   State\n--------------------\n\n";
    assert_eq!(domains.done("list --all"), empty);
    domains.define("web");
    assert_eq!(
        domains.done("list --all"),
        " Id   Name   State\n-----------------------\n -    web    shut off\n\n"
    );
    assert_eq!(domains.done("list"), empty);
    domains.says("domstate web --reason", "shut off (unknown)");
    domains.says("start web", "Domain 'web' started");
    assert_eq!(
        domains.refused("start --domain web"),
        "error: Domain is already active"
    );
    let id = domains.id("web");
    let width = id.len();
    assert_eq!(
        domains.done("list"),
        format!(
            " {:<width$}   Name   State\n{}\n {id}   web    running\n\n",
            "Id",
            "-".repeat(width + 20)
        )
    );
    domains.says(&format!("domname {id}"), "web");
    let uuid = domains.done("-q domuuid web");
    domains.says(&format!("domid --domain={uuid}").replace('\n', ""), &id);
    domains.says("suspend web", "Domain 'web' suspended");
    domains.says("domstate web --reason", "paused (user)");
    domains.says("resume web", "Domain 'web' resumed");
    domains.says("reset web", "Domain 'web' was reset");
    assert_eq!(domains.done("setvcpus web 2 --config"), "\n");
    domains.says(
        "blockresize web disk0 2M",
        "Block device 'disk0' is resized",
    );
    let shutdown = domains.refused("shutdown web");
    assert!(
        shutdown.starts_with("error: Failed to shutdown domain 'web': "),
        "{shutdown}"
    );
    domains.says("destroy web", "Domain 'web' destroyed");
    assert_eq!(
        domains.refused("destroy web"),
        "error: Failed to destroy domain 'web': domain is not running"
    );
    domains.says("domstate web --reason", "shut off (destroyed)");
    domains.says("domrename web www", "Domain successfully renamed");
    let disk = domains.folder.path().join("disk.img");
    domains.says(
        "undefine www --remove-all-storage --nvram",
        &format!(
            "Domain 'www' has been undefined\nVolume 'disk0'({}) removed.",
            disk.display()
        ),
    );
    assert!(!disk.exists());
    assert_eq!(domains.done("list --all"), empty);
}

#[test]
fn a_guest_that_listens_is_shut_down() {
    require_kvm!();
    let domains = Domains::new();
    domains.define_payload("web", "button", "finish=poweroff");
    domains.says("start web", "Domain 'web' started");
    let begin = Instant::now();
    let until = |line: &str, expected: &str| {
        while domains.run(line).text() != format!("{expected}\n\n") {
            assert!(begin.elapsed() < PATIENCE, "{line}");
            thread::sleep(Duration::from_millis(10));
        }
    };
    // It takes a moment until the guest listens.
    until("shutdown web --mode acpi", "Domain 'web' is being shutdown");
    until("domstate web --reason", "shut off (shutdown)");
}

#[test]
fn facts_and_devices_are_laid_out_as_by_virsh() {
    require_kvm!();
    let domains = Domains::new();
    domains.define("web");
    let uuid = domains.done("-q domuuid web");
    let uuid = uuid.trim();
    assert_eq!(
        domains.done("dominfo web"),
        format!(
            "Id:             -\nName:           web\nUUID:           {uuid}\nOS Type:        hvm\n\
             State:          shut off\nCPU(s):         1\nMax memory:     32768 KiB\n\
             Used memory:    32768 KiB\nPersistent:     yes\nAutostart:      disable\n\
             Managed save:   no\nSecurity model: none\nSecurity DOI:   0\n\n"
        )
    );
    let disk = domains.folder.path().join("disk.img");
    let disk = disk.display().to_string();
    assert_eq!(
        domains.done("domblklist web"),
        format!(
            " Target   Source\n{}\n disk0    {disk}\n\n",
            "-".repeat(9 + disk.len() + 3)
        )
    );
    assert_eq!(
        domains.done("-q domblklist web --details"),
        format!(" file   disk   disk0   {disk}\n")
    );
    let interfaces = domains.done("domiflist web");
    // The address derives from the id of the machine.
    let mac = interfaces.split_whitespace().last().unwrap();
    assert!(mac.starts_with("02:") && mac.len() == 17, "{interfaces}");
    assert_eq!(
        interfaces,
        format!(
            " Interface   Type   Source   Model    MAC\n{}\n \
             -           user   -        virtio   {mac}\n\n",
            "-".repeat(57)
        )
    );
    assert_eq!(
        domains.done("domstats web --state --vcpu"),
        "Domain: 'web'\n  state.state=5\n  state.reason=0\n  vcpu.current=1\n  vcpu.maximum=1\n\n"
    );
    assert_eq!(
        domains.done("net-list --all"),
        " Name   State   Autostart   Persistent\n----------------------------------------\n\n"
    );
    let keys: Vec<_> = domains
        .done("nodeinfo")
        .lines()
        .map(|line| line.chars().take(21).collect::<String>())
        .collect();
    assert_eq!(
        keys,
        [
            "CPU model:           ",
            "CPU(s):              ",
            "CPU frequency:       ",
            "CPU socket(s):       ",
            "Core(s) per socket:  ",
            "Thread(s) per core:  ",
            "NUMA cell(s):        ",
            "Memory size:         ",
            "",
        ]
    );
}

#[test]
fn states_are_saved_and_snapshots_gone_back_to() {
    require_kvm!();
    let domains = Domains::new();
    domains.define("web");
    domains.says("start web", "Domain 'web' started");
    domains.says(
        "snapshot-create-as web s1 --atomic",
        "Domain snapshot s1 created",
    );
    let list = domains.done("snapshot-list web");
    let lines: Vec<_> = list.lines().collect();
    assert_eq!(lines[0], " Name   Creation Time               State");
    assert_eq!(lines[1], "-".repeat(45));
    assert!(lines[2].starts_with(" s1     20"), "{list}");
    assert!(lines[2].ends_with(" +0000   running"), "{list}");
    assert_eq!(
        domains.done("snapshot-info web --current"),
        "Name:           s1\nDomain:         web\nCurrent:        yes\nState:          running\n\
         Location:       external\nParent:         -\nChildren:       0\nDescendants:    0\n\
         Metadata:       yes\n\n"
    );
    domains.says("snapshot-current web --name", "s1");
    domains.says("snapshot-revert web s1", "Domain snapshot s1 reverted");
    domains.says("domstate web --reason", "running (from snapshot)");
    domains.says(
        "snapshot-delete web --snapshotname s1",
        "Domain snapshot s1 deleted",
    );
    assert_eq!(
        domains.refused("snapshot-info web s1"),
        "error: Domain snapshot not found: no domain snapshot with matching name 's1'"
    );
    domains.says("managedsave web", "\nDomain 'web' state saved by Bantam");
    domains.says("domstate web --reason", "shut off (saved)");
    let undefine = domains.refused("undefine web");
    assert!(undefine.contains("--managed-save"), "{undefine}");
    domains.says("start web", "Domain 'web' started");
    domains.says("domstate web --reason", "running (restored)");
    let directory = domains.folder.path().join("state");
    let directory = directory.display();
    domains.says(
        &format!("save web {directory}"),
        &format!("\nDomain 'web' saved to {directory}"),
    );
    domains.says(
        &format!("restore {directory}"),
        &format!("Domain restored from {directory}"),
    );
    domains.says(
        "managedsave-remove web",
        "Domain 'web' has no manage save image; removal skipped",
    );
}

#[test]
fn mistakes_and_what_is_lacking_are_one_line() {
    let domains = Domains::new();
    let xml = domains.folder.path().join("web.xml");
    fs::write(&xml, "<domain type='kvm'/>").unwrap();
    for (line, error) in [
        ("domstate nope", "failed to get domain 'nope'"),
        ("domstate ../x", "failed to get domain '../x'"),
        ("net-info nope", "failed to get network 'nope'"),
        ("start", "command 'start' requires <domain> option"),
        (
            "start web --paused",
            "command 'start' doesn't support option --paused",
        ),
        ("list extra", "unexpected data 'extra'"),
        ("xyz", "unknown command: 'xyz'"),
        (
            "migrate-setspeed web 10",
            "command 'migrate-setspeed' is not supported by Bantam",
        ),
        (
            "event",
            "command 'event' is not supported by Bantam; use 'bantam events'",
        ),
        (
            "-r destroy web",
            "operation forbidden: read only access prevents 'destroy'",
        ),
        ("--nope list", "unsupported option '--nope'. See --help."),
    ] {
        assert_eq!(domains.refused(line), format!("error: {error}"));
    }
    let script = Bantam::new(["virsh", "uri; xyz"]).launcher(domains.variables());
    let ended = script.finish();
    ended.has_status(1);
    assert_eq!(
        ended.text(),
        "",
        "nothing of a script with a mistake is executed"
    );
    let line = format!("define {}", xml.display());
    assert!(
        domains
            .refused(&line)
            .contains("write <type arch='x86_64'>hvm</type>")
    );
    for uri in ["test:///default", "qemu+ssh://host/system"] {
        let error = domains.refused(&format!("-c {uri} list"));
        assert!(
            error.contains(&format!("failed to connect to the hypervisor '{uri}'")),
            "{error}"
        );
    }
    assert_eq!(
        domains.done("--connect=qemu:///session uri"),
        "qemu:///session\n\n"
    );
}

#[test]
fn the_console_is_at_the_terminal_until_its_escape_key() {
    require_kvm!();
    let domains = Domains::new();
    domains.define_payload("web", "serial", "bytes=1000 mode=polled");
    let line = domains.refused("console web");
    assert_eq!(line, "error: The domain is not running");
    domains.says("start web", "Domain 'web' started");
    let line = domains.refused("console web");
    assert_eq!(
        line,
        "error: Cannot run interactive console without a controlling TTY"
    );
    for (options, escape, key) in [
        (&[][..], "^] (Ctrl + ])", b"\x1d"),
        (&["-e", "^x"], "^X (Ctrl + X)", b"\x18"),
        (&["--escape=q"], "q", b"q"),
    ] {
        let mut terminal = Terminal::new();
        let arguments = [&["virsh"], options, &["console", "web"]].concat();
        let bantam = Bantam::new(arguments).launcher(domains.variables());
        let console = terminal.at(bantam).start();
        // What the guest has printed before comes after this.
        let greeting = format!("Connected to domain 'web'\r\nEscape character is {escape}\r\n");
        let shown = terminal.wait_for("ready");
        assert!(shown.starts_with(&greeting), "{shown}");
        terminal.assert_raw();
        // Keys of Bantam's own are for the guest here, which sends them back.
        terminal.type_keys(b"\x01d[]");
        terminal.wait_for("\x01d[]");
        terminal.type_keys(key);
        console.wait().has_status(0);
        terminal.assert_restored();
    }
    // It also ends with the machine.
    let mut terminal = Terminal::new();
    let bantam = Bantam::new(["virsh", "-q", "console", "web"]).launcher(domains.variables());
    let console = terminal.at(bantam).start();
    let shown = terminal.wait_for("ready");
    assert!(!shown.contains("Connected"), "{shown}");
    domains.says("destroy web", "Domain 'web' destroyed");
    console.wait().has_status(0);
    terminal.assert_restored();
}

#[test]
fn the_name_virsh_is_enough() {
    let domains = Domains::new();
    let mut launcher = domains.variables();
    let script = "exec -a /usr/local/bin/virsh \"$@\"";
    launcher.extend(["bash", "-c", script, "bash"].map(str::to_owned));
    let run = |arguments: &[&str]| {
        let bantam = Bantam::new(arguments).launcher(launcher.clone());
        let ended = bantam.finish();
        ended.has_status(0);
        ended.text()
    };
    let empty = " Id   Name   State\n--------------------\n";
    assert_eq!(run(&["list", "--all"]), format!("{empty}\n"));
    assert_eq!(
        run(&["-c", "qemu:///system", "list; uri"]),
        format!("{empty}\nqemu:///system\n\n")
    );
    assert!(run(&["--help"]).contains("    snapshot-create-as "));
    assert!(run(&["help", "start"]).contains("start <domain> [--console]"));
    assert!(run(&["start", "--help"]).contains("start <domain> [--console]"));
    assert_eq!(run(&["--version"]).lines().count(), 1);
}
