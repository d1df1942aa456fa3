//! User networks: what a guest reaches by ordinary sockets of the monitor, and how it is reached.
//!
//! The "world" is the loopback interface of a network namespace that each test makes, so no packet leaves it.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use bantam_tests::{
    Bantam, HostTap, Kernel, accept, pattern, require_kvm, require_namespaces, require_taps,
    scripted_root, unprivileged,
};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::Signal;

/// Addresses of the world.
const SERVER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 7);
/// One that the guest may not reach.
const FORBIDDEN: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 8);
/// What the guest fetches.
const FILE_SIZE: usize = 1 << 20;

/// Runs `test` in a network namespace whose loopback interface has the addresses of the world, and in which users
/// may ping.
fn in_world(test: impl FnOnce() + Send + 'static) {
    let thread = thread::spawn(|| {
        // A thread has a namespace of its own, and passes it on to what it starts.
        unshare(CloneFlags::CLONE_NEWNET).expect("namespaces can be made");
        ip("link set lo up");
        for address in [SERVER, FORBIDDEN] {
            ip(&format!("address add {address}/32 dev lo"));
        }
        fs::write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647")
            .expect("the setting is that of the namespace");
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status();
    assert!(
        status.is_ok_and(|status| status.success()),
        "ip {arguments}"
    );
}

/// Answers every query for an IPv4 address with [`SERVER`], and others with nothing.
fn serve_names(socket: &UdpSocket) {
    let mut query = [0; 512];
    while let Ok((size, peer)) = socket.recv_from(&mut query) {
        let question = &query[12..size];
        let name_size = question.iter().position(|&byte| byte == 0);
        let name_size = name_size.expect("a name ends with an empty label") + 1;
        let asks_for_address = question[name_size..name_size + 2] == [0, 1];
        let mut answer = query[..2].to_vec();
        answer.extend([0x81, 0x80, 0, 1, 0, asks_for_address.into(), 0, 0, 0, 0]);
        answer.extend(&question[..name_size + 4]);
        if asks_for_address {
            answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 250, 0, 4]);
            answer.extend(SERVER.octets());
        }
        socket.send_to(&answer, peer).expect("the guest is there");
    }
}

/// Answers every request of HTTP with a file.
fn serve_file(listener: &TcpListener) {
    for stream in listener.incoming() {
        let mut stream = stream.expect("connections can be accepted");
        let mut request = Vec::new();
        let mut byte = [0];
        while !request.ends_with(b"\r\n\r\n") && matches!(stream.read(&mut byte), Ok(1)) {
            request.push(byte[0]);
        }
        let head = format!("HTTP/1.0 200 OK\r\nContent-Length: {FILE_SIZE}\r\n\r\n");
        let file = pattern(5, 0, FILE_SIZE);
        let sent = stream.write_all(&[head.as_bytes(), &file].concat());
        sent.expect("the guest takes all of it");
    }
}

/// What busybox's DHCP client calls.
const LEASE_SCRIPT: &str = "#!/bin/sh\n\
    case $1 in\n\
    deconfig) ifconfig eth0 up;;\n\
    bound)\n\
        ifconfig eth0 $ip netmask $subnet\n\
        route add default gw $router\n\
        echo nameserver $dns > /etc/resolv.conf\n\
        echo LEASE $ip $subnet $router $dns $domain $hostname $mtu;;\n\
    esac\n";

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
fn linux_is_on_a_network_of_passt() {
    require_kvm!();
    require_namespaces!();
    in_world(|| {
        // What passt shows the guest is the interface with the default route.
        ip("link add world type veth peer name other");
        ip("link set other up");
        ip("address add 198.51.100.2/24 dev world");
        ip("link set world up");
        ip("route add default via 198.51.100.1");
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
        let passt = Command::new("timeout")
            .args(["120", "passt", "--foreground", "--one-off", "--socket"])
            .arg(&socket)
            .stderr(Stdio::piped())
            .spawn();
        let mut passt = passt.expect("there is passt");
        let deadline = Instant::now() + Duration::from_secs(10);
        while !socket.exists() {
            assert!(Instant::now() < deadline, "passt does not start");
            thread::sleep(Duration::from_millis(10));
        }
        // It has given up root, and the monitor has no capabilities.
        fs::set_permissions(&socket, fs::Permissions::from_mode(0o777)).unwrap();
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

/// The MD5 sum of the file, by the same program as the guest's.
fn file_sum() -> String {
    let mut sum = Command::new("/bin/busybox")
        .arg("md5sum")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("there is busybox-static");
    let stdin = sum.stdin.take();
    let mut stdin = stdin.expect("it is a pipe");
    let written = stdin.write_all(&pattern(5, 0, FILE_SIZE));
    written.expect("all of it is read");
    drop(stdin);
    let output = sum.wait_with_output().expect("it ends");
    let text = String::from_utf8_lossy(&output.stdout);
    text.split(' ').next().unwrap_or_default().to_owned()
}

/// Reads everything from a server, which may take a moment to be there.
fn connect(address: &str) -> String {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let mut text = String::new();
        let read =
            TcpStream::connect(address).and_then(|mut stream| stream.read_to_string(&mut text));
        if read.is_ok() && !text.is_empty() {
            return text;
        }
        assert!(Instant::now() < deadline, "nobody answers: {read:?}");
        thread::sleep(Duration::from_millis(100));
    }
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

/// Bytes at a position of a stream, which differ from those at all others that are near.
fn block(number: u64) -> Vec<u8> {
    const WORDS: u64 = 1 << 16;
    let words = (0..WORDS).map(|word| (number * WORDS + word).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    words.flat_map(u64::to_le_bytes).collect()
}

/// The guest passes on what it gets by one connection to another.
#[test]
fn bytes_pass_through_a_linux_guest_unchanged() {
    // Linux is slow on hosts without hardware virtualization.
    const BLOCKS: u64 = (4 << 20) >> 19;
    require_kvm!();
    require_namespaces!();
    in_world(|| {
        let source = TcpListener::bind((SERVER, 7000)).unwrap();
        let target = TcpListener::bind((SERVER, 7001)).unwrap();
        let writer = thread::spawn(move || {
            let mut stream = accept(&source);
            for number in 0..BLOCKS {
                stream.write_all(&block(number)).unwrap();
            }
        });
        let reader = thread::spawn(move || {
            let mut stream = accept(&target);
            let mut bytes = vec![0; 1 << 19];
            for number in 0..BLOCKS {
                stream.read_exact(&mut bytes).unwrap();
                assert!(bytes == block(number), "block {number} is another one");
            }
            assert_eq!(stream.read(&mut bytes).unwrap(), 0);
        });
        let folder = tempfile::tempdir().unwrap();
        let script = format!(
            "#!/bin/sh\n\
             mount -t proc proc /proc\n\
             udhcpc -i eth0 -n -q -f -s /lease.sh\n\
             nc {SERVER} 7000 </dev/null | nc {SERVER} 7001\n\
             echo DONE\n\
             printf '\\000' | dd of=/dev/port bs=1 seek=1280\n"
        );
        let scripts = [("test.sh", script.as_str()), ("lease.sh", LEASE_SCRIPT)];
        let root = scripted_root(folder.path(), &scripts);
        let machine = Bantam::linux(Kernel::Small)
            .launcher(unprivileged())
            .disk(&root, "")
            .append("quiet init=/test.sh")
            .option("--net", "user")
            .start();
        reader.join().unwrap();
        writer.join().unwrap();
        machine.wait().succeeded().printed("DONE");
    });
}
