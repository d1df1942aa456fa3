//! The outside of networks without rights: a network namespace, and servers in it.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener, TcpStream, UdpSocket};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};

use crate::pattern;

/// An address of the world.
pub const SERVER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 7);
/// The same server's address of IPv6.
pub const SERVER_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 7);
/// One that the guest may not reach.
pub const FORBIDDEN: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 8);
/// What the guest fetches.
pub const FILE_SIZE: usize = 1 << 20;

/// Runs `test` in a network namespace whose loopback interface has the addresses of the world, and in which users
/// may ping.
///
/// # Panics
/// If it cannot be made, or the test fails.
pub fn in_world(test: impl FnOnce() + Send + 'static) {
    let thread = thread::spawn(|| {
        // A thread has a namespace of its own, and passes it on to what it starts.
        unshare(CloneFlags::CLONE_NEWNET).expect("namespaces can be made");
        ip("link set lo up");
        for address in [SERVER, FORBIDDEN] {
            ip(&format!("address add {address}/32 dev lo"));
        }
        ip(&format!("address add {SERVER_V6}/128 dev lo nodad"));
        fs::write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647")
            .expect("the setting is that of the namespace");
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Has `ip` change the namespace of this thread.
///
/// # Panics
/// If it fails.
pub fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status();
    assert!(
        status.is_ok_and(|status| status.success()),
        "ip {arguments}"
    );
}

/// Answers queries for the addresses of names: `six.test` has [`SERVER_V6`] only, and every other one [`SERVER`] only.
///
/// # Panics
/// If a query is not one, or the guest is gone.
pub fn serve_names(socket: &UdpSocket) {
    let mut query = [0; 512];
    while let Ok((size, peer)) = socket.recv_from(&mut query) {
        let question = &query[12..size];
        let name_size = question.iter().position(|&byte| byte == 0);
        let name_size = name_size.expect("a name ends with an empty label") + 1;
        let kind = &question[name_size..name_size + 2];
        let address = match question.starts_with(b"\x03six") {
            true => (kind == [0, 28]).then(|| SERVER_V6.octets().to_vec()),
            false => (kind == [0, 1]).then(|| SERVER.octets().to_vec()),
        };
        let mut answer = query[..2].to_vec();
        answer.extend([0x81, 0x80, 0, 1, 0, address.is_some().into(), 0, 0, 0, 0]);
        answer.extend(&question[..name_size + 4]);
        if let Some(address) = address {
            answer.extend([0xc0, 12, kind[0], kind[1], 0, 1, 0, 0, 0, 250]);
            answer.extend([0, address.len() as u8]);
            answer.extend(address);
        }
        socket.send_to(&answer, peer).expect("the guest is there");
    }
}

/// Reads a request of HTTP without a body.
pub(crate) fn read_request(stream: &mut TcpStream) {
    let mut request = Vec::new();
    let mut byte = [0];
    while !request.ends_with(b"\r\n\r\n") && matches!(stream.read(&mut byte), Ok(1)) {
        request.push(byte[0]);
    }
}

/// Answers every request of HTTP with a file.
///
/// # Panics
/// If a client does not take all of it.
pub fn serve_file(listener: &TcpListener) {
    for stream in listener.incoming() {
        let mut stream = stream.expect("connections can be accepted");
        read_request(&mut stream);
        let head = format!("HTTP/1.0 200 OK\r\nContent-Length: {FILE_SIZE}\r\n\r\n");
        let file = pattern(5, 0, FILE_SIZE);
        let sent = stream.write_all(&[head.as_bytes(), &file].concat());
        sent.expect("the guest takes all of it");
    }
}

/// What busybox's DHCP client calls.
pub const LEASE_SCRIPT: &str = "#!/bin/sh\n\
    case $1 in\n\
    deconfig) ifconfig eth0 up;;\n\
    bound)\n\
        ifconfig eth0 $ip netmask $subnet\n\
        route add default gw $router\n\
        echo nameserver $dns > /etc/resolv.conf\n\
        echo LEASE $ip $subnet $router $dns $domain $hostname $mtu;;\n\
    esac\n";

/// The MD5 sum of the file, by the same program as the guest's.
///
/// # Panics
/// If there is no busybox.
pub fn file_sum() -> String {
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
///
/// # Panics
/// If it is not there after a minute.
pub fn connect(address: &str) -> String {
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
