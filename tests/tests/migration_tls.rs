//! Machines that move by TLS, and ends that do not know each other.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use bantam_tests::two_hosts::{Hosts, relay_tcp};
use bantam_tests::{Ended, Machines, Running, require_kvm};
use nix::sys::signal::Signal;

const KEY: &str = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
/// The start and the end of a time that is over.
const OVER: &str = "-startdate 20200101000000Z -enddate 20200102000000Z";

/// An authority in a folder of its own.
struct Authority(PathBuf);

impl Authority {
    fn new(folder: PathBuf) -> Authority {
        fs::create_dir(&folder).expect("there is room");
        let authority = Authority(folder);
        authority.openssl(&format!(
            "req -x509 {KEY} -keyout cakey.pem -out cacert.pem -days 1 -subj /CN=authority"
        ));
        authority.write(
            "authority.cnf",
            "[ca]\ndefault_ca = authority\n[authority]\ndatabase = index\nnew_certs_dir = .\ndefault_md = sha256\n\
             policy = policy\nrand_serial = yes\nunique_subject = no\n[policy]\ncommonName = supplied\n",
        );
        authority.write("index", "");
        authority
    }

    fn openssl(&self, arguments: &str) {
        let mut command = Command::new("openssl");
        command.args(arguments.split(' ')).current_dir(&self.0);
        let output = command.output().expect("openssl is installed");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments}: {errors}");
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.0.join(name), text).expect("there is room");
    }

    /// Makes a folder `name` with what an end, `client` or `server`, shows and expects. Its certificate is for `host` and the
    /// time that options of openssl say.
    fn issue(&self, name: &str, end: &str, host: &str, time: &str) -> PathBuf {
        let folder = self.0.join(name);
        fs::create_dir_all(&folder).expect("there is room");
        self.write(
            "extensions",
            &format!("subjectAltName = {host}\nextendedKeyUsage = {end}Auth\n"),
        );
        self.openssl(&format!(
            "req {KEY} -keyout {name}/{end}key.pem -out request -subj /CN={end}"
        ));
        self.openssl(&format!(
            "ca -batch -notext -config authority.cnf -cert cacert.pem -keyfile cakey.pem -in request {time} \
             -extfile extensions -out {name}/{end}cert.pem"
        ));
        fs::copy(self.0.join("cacert.pem"), folder.join("cacert.pem")).expect("there is room");
        folder
    }

    /// The same for a host at the loopback address, and one day.
    fn issue_good(&self, end: &str) -> PathBuf {
        self.issue(&format!("good-{end}"), end, "IP:127.0.0.1", "-days 1")
    }
}

/// Waits for a machine behind TLS. Returns the address.
fn receive(there: &Machines, folder: &Path) -> (Running, String) {
    let folder = folder.display().to_string();
    let arguments = ["migrate", "--receive", "tls://127.0.0.1:0", "--tls-dir"];
    let receiver = there.bantam(&[&arguments[..], &[&folder]].concat()).start();
    let said = receiver.wait_for_error("waiting at tls://127.0.0.1:");
    let address = said.split_whitespace().last().expect("it is not empty");
    let address = address.to_owned();
    (receiver, address)
}

fn migrate(hosts: &Hosts, address: &str, folder: &Path) -> Ended {
    let folder = folder.display().to_string();
    let arguments = ["migrate", "web", address, "--tls-dir", &folder];
    hosts.source.run(&arguments)
}

#[test]
fn a_machine_moves_by_tls() {
    require_kvm!();
    let hosts = Hosts::new();
    hosts.start("web");
    let authority = Authority::new(hosts.path("authority"));
    let (client, server) = (
        authority.issue_good("client"),
        authority.issue_good("server"),
    );
    // The names that QEMU gives these files.
    for (from, to) in [
        ("servercert.pem", "server-cert.pem"),
        ("serverkey.pem", "server-key.pem"),
        ("cacert.pem", "ca-cert.pem"),
    ] {
        fs::rename(server.join(from), server.join(to)).expect("it is there");
    }
    let (receiver, address) = receive(&hosts.receiver, &server);
    let folder = client.display().to_string();
    let dry = [
        "migrate",
        "--dry-run",
        "web",
        &address,
        "--tls-dir",
        &folder,
    ];
    assert_eq!(hosts.source.done(&dry), "the machine could run there\n");
    let arguments = ["migrate", "web", &address, "--tls-dir", &folder];
    let moved = [&arguments[..], &["--connections", "3"]].concat();
    let moved = hosts.source.run(&moved);
    assert!(moved.succeeded().text().contains("moved in"), "{moved}");
    assert_eq!(moved.stderr, "");
    let arrived = receiver.wait();
    let text = arrived.succeeded().text();
    assert!(text.contains("machine 'web' has arrived"), "{arrived}");
    hosts.one_runs(&moved, &arrived);
}

#[test]
fn ends_that_do_not_know_each_other_are_refused_with_the_reason() {
    require_kvm!();
    let hosts = Hosts::new();
    let (source, there) = (&hosts.source, &hosts.receiver);
    hosts.start("web");
    let own = Authority::new(hosts.path("own"));
    let foreign = Authority::new(hosts.path("foreign"));
    let (client, server) = (own.issue_good("client"), own.issue_good("server"));

    let refused = |address: &str, folder: &Path, reason: &str| {
        let refused = migrate(&hosts, address, folder);
        let error = refused.failed_with_one_line();
        assert!(error.contains(reason), "{error}");
        assert_eq!(source.state("web").split(' ').next(), Some("running"));
    };
    let missing = source.refused(&["migrate", "web", "tls://127.0.0.1:9"]);
    assert!(missing.contains("--tls-dir"), "{missing}");
    let folder = client.display().to_string();
    let plain = ["migrate", "web", "tcp://127.0.0.1:9", "--tls-dir", &folder];
    let plain = source.refused(&plain);
    assert!(plain.contains("--tls-dir is for tls://"), "{plain}");
    refused("tls://127.0.0.1:9", &server, "clientcert.pem");
    refused(
        "tls://127.0.0.1:9",
        &client,
        "start 'bantam migrate --receive'",
    );

    let (receiver, address) = receive(there, &server);
    // A source that does not know the receiver.
    refused(&address, &foreign.issue_good("client"), "one authority");
    // Sources that the receiver does not know.
    let strange = foreign.issue("strange", "client", "DNS:client", "-days 1");
    fs::copy(own.0.join("cacert.pem"), strange.join("cacert.pem")).expect("it is there");
    refused(&address, &strange, "it refuses the certificate of this end");
    let expired = own.issue("expired", "client", "DNS:client", OVER);
    refused(&address, &expired, "this end has expired");
    let of_server = own.issue("wrong", "server", "DNS:client", "-days 1");
    for name in ["cert", "key"] {
        let to = of_server.join(format!("client{name}.pem"));
        fs::rename(of_server.join(format!("server{name}.pem")), to).expect("it is there");
    }
    refused(
        &address,
        &of_server,
        "it refuses the certificate of this end",
    );
    // One that does not encrypt, and none at all.
    let plain = source.refused(&["migrate", "web", &address.replace("tls://", "tcp://")]);
    assert!(plain.contains("speaks TLS"), "{plain}");
    let mut openssl = Command::new("openssl");
    openssl.args(["s_client", "-connect", &address.replace("tls://", "")]);
    openssl.stdin(std::process::Stdio::null());
    let shown = openssl.output().expect("openssl is installed");
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    assert!(!shown.contains("BANTAM"), "{shown}");
    receiver.wait_for_error("it does not speak TLS");
    let said = receiver.wait_for_error("it has not shown a certificate");
    for reason in [
        "has not signed its certificate",
        "its certificate has expired",
    ] {
        assert!(said.contains(reason), "{said}");
    }
    // One that says nothing does not hold others up.
    let silent = std::net::TcpStream::connect(address.replace("tls://", ""));
    let moved = migrate(&hosts, &address, &client);
    hosts.one_runs(moved.succeeded(), &receiver.wait());
    drop(silent);
}

#[test]
fn a_receiver_has_to_be_the_host_that_was_named() {
    require_kvm!();
    let hosts = Hosts::new();
    hosts.start("web");
    let authority = Authority::new(hosts.path("authority"));
    let client = authority.issue_good("client");
    for (name, host, time, reason) in [
        (
            "other",
            "IP:192.0.2.1,DNS:localhost",
            "-days 1",
            "subjectAltName",
        ),
        ("expired", "IP:127.0.0.1", OVER, "has expired; renew it"),
    ] {
        let server = authority.issue(name, "server", host, time);
        let (receiver, address) = receive(&hosts.receiver, &server);
        let refused = migrate(&hosts, &address, &client);
        let error = refused.failed_with_one_line();
        assert!(error.contains(reason), "{error}");
        if name == "other" {
            let named = address.replace("127.0.0.1", "localhost");
            let arguments = ["migrate", "--dry-run", "web", &named, "--tls-dir"];
            let folder = client.display().to_string();
            hosts.source.done(&[&arguments[..], &[&folder]].concat());
        }
        receiver.signal(Signal::SIGTERM);
        receiver.wait();
    }
    // A receiver that does not encrypt.
    let arguments = ["migrate", "--receive", "tcp://127.0.0.1:0"];
    let receiver = hosts.receiver.bantam(&arguments).start();
    let said = receiver.wait_for_error("waiting at tcp://127.0.0.1:");
    let address = said.split_whitespace().last().expect("it is not empty");
    let refused = migrate(&hosts, &address.replace("tcp://", "tls://"), &client);
    let error = refused.failed_with_one_line();
    assert!(error.contains("use tls:// at both ends"), "{error}");
    let ended = receiver.wait();
    assert!(ended.failed().contains("speaks TLS"), "{ended}");
}

/// Moves a machine by TLS over a connection that is cut. Returns how many bytes have passed in each direction.
fn move_over_cut(authority: &[PathBuf; 2], limits: [usize; 2]) -> [usize; 2] {
    let hosts = Hosts::new();
    hosts.start("web");
    let [client, server] = authority;
    let (receiver, address) = receive(&hosts.receiver, server);
    let (cut, passed) = relay_tcp(&address.replace("tls://", ""), limits);
    let moved = migrate(&hosts, &format!("tls://{cut}"), client);
    let begin = Instant::now();
    while !moved.status.success() && begin.elapsed() < Duration::from_secs(5) {
        let said = receiver.error_text();
        // It waits for another source if this one has not shown who it is.
        if said.contains("refused a connection") {
            receiver.signal(Signal::SIGTERM);
            break;
        }
        if said.contains("error:") {
            break;
        }
        thread::sleep(Duration::from_millis(5));
    }
    hosts.one_runs(&moved, &receiver.wait());
    [0, 1].map(|it| passed[it].load(Ordering::SeqCst))
}

#[test]
fn wherever_tls_is_cut_exactly_one_machine_runs() {
    require_kvm!();
    let folder = tempfile::tempdir().expect("there is room");
    let authority = Authority::new(folder.path().join("authority"));
    let ends = ["client", "server"].map(|end| authority.issue_good(end));
    let all = move_over_cut(&ends, [usize::MAX; 2]);
    for part in 0..6 {
        move_over_cut(&ends, [all[0] * part / 6, usize::MAX]);
        move_over_cut(&ends, [usize::MAX, all[1] * part / 6]);
    }
    // The last records are the one that hands the machine over, its confirmation, and the ends of TLS.
    for less in [1, 20, 40, 60] {
        move_over_cut(&ends, [all[0] - less, usize::MAX]);
        move_over_cut(&ends, [usize::MAX, all[1] - less]);
    }
}
