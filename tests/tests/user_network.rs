//! User networks: what a guest reaches by ordinary sockets of the monitor, and how it is reached.
//!
//! The "world" is the loopback interface of a network namespace that each test makes, so no packet leaves it.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use bantam_tests::world::{
    FORBIDDEN, LEASE_SCRIPT, SERVER, connect, file_sum, in_world, serve_file, serve_names,
};
use bantam_tests::{
    Bantam, Kernel, accept, require_kvm, require_namespaces, scripted_root, unprivileged,
};
use nix::sys::signal::Signal;

#[test]
fn linux_gets_an_address_resolves_a_name_fetches_pings_and_serves() {
    require_kvm!();
    require_namespaces!();
    in_world(|| {
        let names = UdpSocket::bind("127.0.0.53:53").unwrap();
        thread::spawn(move || serve_names(&names));
        for address in [SERVER, FORBIDDEN] {
            let files = TcpListener::bind((address, 80)).unwrap();
            thread::spawn(move || serve_file(&files));
        }
        // The host's own resolver stub is what the guest's queries reach; its loopback is not.
        let local = TcpListener::bind("127.0.0.1:81").unwrap();
        local.set_nonblocking(true).unwrap();

        let folder = tempfile::tempdir().unwrap();
        let script = format!(
            "#!/bin/sh\n\
             mount -t proc proc /proc\n\
             udhcpc -i eth0 -n -q -f -s /lease.sh\n\
             wget -q -O - http://{SERVER}/ && echo UNNAMED\n\
             nslookup files.test\n\
             ping -c 1 -W 5 {SERVER}\n\
             wget -q -O - http://files.test/ | md5sum\n\
             nc -w 5 10.0.2.2 81 </dev/null && echo REACHED\n\
             wget -q -O - http://{FORBIDDEN}/ && echo FORBIDDEN\n\
             echo SERVING; echo the guest answers | nc -l -p 7000\n\
             echo AGAIN; echo to IPv4 all the same | nc -l -p 7000\n\
             echo DONE\n\
             printf '\\000' | dd of=/dev/port bs=1 seek=1280\n"
        );
        let scripts = [("test.sh", script.as_str()), ("lease.sh", LEASE_SCRIPT)];
        let root = scripted_root(folder.path(), &scripts);
        let machine = Bantam::linux(Kernel::Small)
            .launcher(unprivileged())
            .disk(&root, "")
            .append("quiet init=/test.sh")
            .option(
                "--net",
                "user,dns=127.0.0.53,domain=example.test,hostname=one,forward=7070:7000,\
                 forward=[::1]:7070:7000,allow=*.test,deny=192.0.2.8",
            )
            .start();
        let text = machine.wait_for_output("SERVING");
        let answer = connect("127.0.0.1:7070");
        assert_eq!(answer, "the guest answers\n", "{text}");
        machine.wait_for_output("AGAIN");
        assert_eq!(connect("[::1]:7070"), "to IPv4 all the same\n");
        let ended = machine.wait();
        ended.printed("LEASE 10.0.2.15 255.255.255.0 10.0.2.2 10.0.2.3 example.test one 65520");
        ended.printed("DONE");
        let refusal = format!("the guest may not reach tcp port {FORBIDDEN}:80");
        let text = ended.succeeded().text();
        assert!(ended.stderr.contains(&refusal), "{}\n{text}", ended.stderr);
        let sum = format!("{}  -", file_sum());
        assert!(text.contains(&sum), "{text}");
        assert!(text.contains("1 packets received"), "{text}");
        for word in ["UNNAMED", "REACHED", "FORBIDDEN"] {
            assert!(!text.contains(word), "{word}: {text}");
        }
        assert!(local.accept().is_err(), "the host's loopback was reached");
    });
}

#[test]
fn a_driver_exchanges_frames_with_a_user_network() {
    require_kvm!();
    for words in ["", "offloads"] {
        let ended = Bantam::payload("devices")
            .option("--net", "user")
            .append(format!("net-arp=10.0.2.15,10.0.2.2 {words}"))
            .finish();
        ended
            .passed()
            .printed("ok: net resolves 10.0.2.15,10.0.2.2")
            .printed("ok: net sends");
    }
}

#[test]
fn a_port_that_is_taken_is_refused_before_the_guest_starts() {
    require_kvm!();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let ended = Bantam::payload("hello")
        .option("--net", format!("user,forward={port}:80"))
        .finish();
    let reason = ended.failed_with_one_line();
    assert!(
        reason.contains(&format!("tcp port 127.0.0.1:{port} of the host")),
        "{reason}"
    );
    drop(taken);
    Bantam::payload("hello")
        .option("--net", format!("user,forward={port}:80"))
        .finish()
        .passed();
}

#[test]
fn the_port_that_the_host_chose_is_told() {
    require_kvm!();
    let machine = Bantam::payload("hello")
        .option("--net", "user,forward=0:80")
        .append("finish=hang")
        .start();
    let text = machine.wait_for_error("leads to port 80 of the guest");
    let port = text.split("127.0.0.1:").nth(1).unwrap();
    let port = port.split(' ').next().unwrap();
    // The guest has no driver, but the connection waits for one.
    TcpStream::connect(format!("127.0.0.1:{port}")).unwrap();
    machine.signal(Signal::SIGTERM);
    machine.wait().succeeded();
}

#[test]
fn a_restored_guest_finds_its_connections_reset_and_opens_others() {
    require_kvm!();
    require_namespaces!();
    in_world(|| {
        let first = TcpListener::bind((SERVER, 90)).unwrap();
        let second = TcpListener::bind((SERVER, 91)).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let script = format!(
            "#!/bin/sh\n\
             ifconfig eth0 10.0.2.15\n\
             route add default gw 10.0.2.2\n\
             while :; do echo tick; sleep 1; done | nc {SERVER} 90\n\
             echo ENDED; echo again | nc {SERVER} 91\n\
             printf '\\000' | dd of=/dev/port bs=1 seek=1280\n"
        );
        let root = scripted_root(folder.path(), &[("test.sh", &script)]);
        let (socket, snapshot) = (folder.path().join("socket"), folder.path().join("snapshot"));
        let machine = Bantam::linux(Kernel::Small)
            .disk(&root, "")
            .append("quiet init=/test.sh")
            .option("--net", "user,forward=7070:7000")
            .option("--control", &socket)
            .start();
        let (mut stream, _) = first.accept().unwrap();
        stream.read_exact(&mut [0; 5]).unwrap();
        let words = [Path::new("snapshot"), &socket, &snapshot];
        Bantam::new(words).finish().succeeded();
        machine.signal(Signal::SIGKILL);
        machine.wait();
        let server = thread::spawn(move || {
            let mut text = String::new();
            second
                .accept()
                .unwrap()
                .0
                .read_to_string(&mut text)
                .unwrap();
            text
        });
        let words = [Path::new("restore"), &snapshot];
        let ended = Bantam::new(words).limit(Duration::from_secs(120)).finish();
        ended.succeeded();
        ended.printed("ENDED");
        assert_eq!(server.join().unwrap(), "again\n");
    });
}

/// Runs a load of TCP or UDP to a server in the world.
fn load(words: &str) -> Bantam {
    Bantam::payload("load")
        .option("--net", "user")
        .option("--memory", "64M")
        .append(words)
}

#[test]
fn a_load_of_tcp_arrives_whole() {
    require_kvm!();
    require_namespaces!();
    in_world(|| {
        let listener = TcpListener::bind((SERVER, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let peer = format!("test=tcp peer={SERVER}:{port}");
        const SIZE: usize = (16 << 20) + 1;

        let machine = load(&format!("{peer} mode=send operations={SIZE}")).start();
        let mut stream = accept(&listener);
        let size = std::io::copy(&mut stream, &mut std::io::sink()).unwrap();
        assert_eq!(size, SIZE as u64);
        drop(stream);
        machine.wait().passed();

        let machine = load(&format!("{peer} mode=receive operations={SIZE}")).start();
        let mut stream = accept(&listener);
        // More than the guest wants: the rest is lost with the guest.
        let _ = stream.write_all(&vec![0; 2 * SIZE]);
        machine.wait().passed();

        let machine = load(&format!("{peer} mode=connect depth=8 operations=100")).start();
        for _ in 0..100 {
            accept(&listener);
        }
        machine.wait().passed();

        let machine = load(&format!("{peer} mode=round-trip operations=100")).start();
        let mut stream = accept(&listener);
        let mut byte = [0];
        let mut count = 0;
        while stream.read(&mut byte).unwrap() == 1 {
            stream.write_all(&byte).unwrap();
            count += 1;
        }
        assert_eq!(count, 100);
        machine.wait().passed();
    });
}

/// A guest that opens connections as quickly as it can is held back by a limit of its packets.
#[test]
fn a_limit_of_packets_is_one_of_new_connections() {
    require_kvm!();
    require_namespaces!();
    in_world(|| {
        let listener = TcpListener::bind((SERVER, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let machine = Bantam::payload("load")
            .option("--net", "user,tx-packets-per-second=200")
            .option("--memory", "64M")
            .append(format!(
                "test=tcp peer={SERVER}:{port} mode=connect depth=8 operations=200"
            ))
            .start();
        accept(&listener);
        let begin = Instant::now();
        for _ in 1..200 {
            accept(&listener);
        }
        // Each takes three packets or more, and a second of them can be sent at once.
        let elapsed = begin.elapsed();
        assert!(elapsed >= Duration::from_millis(1500), "{elapsed:?}");
        machine.wait().passed();
    });
}

#[test]
fn a_load_of_udp_arrives_in_datagrams() {
    require_kvm!();
    require_namespaces!();
    in_world(|| {
        let server = UdpSocket::bind((SERVER, 0)).unwrap();
        let peer = server.local_addr().unwrap();
        server
            .set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        // As many as its buffer has room for.
        let words = format!("test=udp packet-size=142 peer={peer} operations=150");
        let machine = load(&words).start();
        for _ in 0..150 {
            let mut bytes = [1; 200];
            assert_eq!(server.recv(&mut bytes).unwrap(), 100);
            assert!(bytes[..100].iter().all(|&byte| byte == 0));
        }
        machine.wait().passed();
    });
}
