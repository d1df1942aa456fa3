//! The Linux of this host as the guest: a tap in a network namespace of its own, whose frames go to the network.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::guest::{Bytes, MAC, MTU, next_frame};
use super::namespace::{enter_namespace, ip};
use super::pattern;
use crate::{UserNetwork, UserNetworkOptions};

nix::ioctl_write_ptr_bad!(attach, libc::TUNSETIFF, libc::ifreq);

/// Opens a tap in the namespace of this thread; `None` if this user may not.
fn open_tap() -> Option<File> {
    let mut options = File::options();
    options
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK);
    let tap = options.open("/dev/net/tun").ok()?;
    // SAFETY: it consists of integers and pointers, all of which may be zero.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (target, byte) in request.ifr_name.iter_mut().zip(b"eth0") {
        *target = *byte as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: the request reads an ifreq and writes the name back to it; it is our own.
    unsafe { attach(tap.as_raw_fd(), &request) }.ok()?;
    Some(tap)
}

/// Runs a command of the guest. Returns what it has printed, if it has succeeded.
fn run(words: &str) -> Option<String> {
    let mut words = words.split(' ');
    let output = Command::new(words.next()?).args(words).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    output.status.success().then_some(text)
}

#[track_caller]
fn wait_for<T>(mut attempt: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        if let Some(result) = attempt() {
            return result;
        }
        assert!(Instant::now() < deadline, "it takes too long");
        thread::sleep(Duration::from_millis(20));
    }
}

/// Passes frames on in both directions until `is_over`.
fn pump(mut tap: File, mut network: UserNetwork, is_over: &AtomicBool) {
    let mut bytes = vec![0; 1 << 17];
    while !is_over.load(Ordering::Relaxed) {
        let mut is_idle = true;
        match tap.read(&mut bytes) {
            Ok(size) => {
                network.send(&mut Bytes(bytes[..size].to_vec()));
                is_idle = false;
            }
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock, "{error}"),
        }
        while let Some(frame) = next_frame(&mut network) {
            // A tap that is down takes none.
            let _ = tap.write(&frame);
            is_idle = false;
        }
        if is_idle {
            thread::sleep(Duration::from_micros(100));
        }
    }
}

#[test]
fn linux_configures_itself_and_uses_ipv6() {
    // This thread's namespace is the outside; another's is the guest.
    if !enter_namespace() {
        return;
    }
    for address in ["192.0.2.7/32", "2001:db8::7/128"] {
        let mut words = vec!["address", "add", address, "dev", "lo"];
        if address.contains(':') {
            words.push("nodad");
        }
        ip(&words);
    }
    std::fs::write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647").unwrap();
    let listener = TcpListener::bind("[2001:db8::7]:80").unwrap();
    let datagrams = UdpSocket::bind("[2001:db8::7]:53").unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let stream = stream.unwrap();
            thread::spawn(move || std::io::copy(&mut &stream, &mut &stream));
        }
    });
    thread::spawn(move || {
        let mut bytes = vec![0; 1 << 16];
        while let Ok((size, peer)) = datagrams.recv_from(&mut bytes) {
            datagrams.send_to(&bytes[..size], peer).unwrap();
        }
    });
    let options = UserNetworkOptions {
        forwards: vec!["[::1]:0:7000".parse().unwrap()],
        ..UserNetworkOptions::default()
    };
    let network = UserNetwork::open(&options, MAC, MTU).unwrap();
    let forwarded = network.forwarded_ports().unwrap()[0].host;
    let (send_tap, take_tap) = std::sync::mpsc::channel();
    let is_over = Arc::new(AtomicBool::new(false));
    let served = Arc::new(AtomicBool::new(false));
    let is_served = served.clone();
    let guest = thread::spawn(move || {
        assert!(enter_namespace());
        let Some(tap) = open_tap() else {
            eprintln!("skipped, as this user may not make taps");
            return;
        };
        send_tap.send(tap).unwrap();
        ip(&["link", "set", "eth0", "mtu", "65520", "up"]);
        let address = wait_for(|| {
            let text = run("ip -6 address show dev eth0 scope global")?;
            let is_ready = text.contains("fd62:616e:a00:200:") && !text.contains("tentative");
            is_ready.then_some(text)
        });
        assert!(address.contains("/64"), "{address}");
        let route = run("ip -6 route show default").unwrap();
        assert!(route.contains("via fe80::2 dev eth0 proto ra"), "{route}");
        for target in ["fd62:616e:a00:200::3", "2001:db8::7"] {
            let ping = format!("busybox ping -c 1 -W 5 {target}");
            assert!(run(&ping).is_some(), "{target}");
        }
        let mut stream = TcpStream::connect("[2001:db8::7]:80").unwrap();
        let bytes = pattern(3 << 20);
        let mut sender = stream.try_clone().unwrap();
        let sent = bytes.clone();
        let sending = thread::spawn(move || sender.write_all(&sent).unwrap());
        let mut received = vec![0; bytes.len()];
        stream.read_exact(&mut received).unwrap();
        sending.join().unwrap();
        assert!(received == bytes, "bytes are wrong");
        // One of these is larger than the MTU, and goes in parts.
        let socket = UdpSocket::bind("[::]:0").unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        for size in [0, 1000, 65_000] {
            socket.send_to(&bytes[..size], "[2001:db8::7]:53").unwrap();
            let mut answer = vec![0; 1 << 16];
            let (count, _) = socket.recv_from(&mut answer).unwrap();
            assert!(answer[..count] == bytes[..size], "{count} of {size} bytes");
        }
        ip(&["link", "set", "eth0", "mtu", "1400"]);
        let socket = UdpSocket::bind("[::]:0").unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        socket.send_to(&bytes[..5000], "[2001:db8::7]:53").unwrap();
        let mut answer = vec![0; 1 << 16];
        let (count, _) = socket.recv_from(&mut answer).unwrap();
        assert!(answer[..count] == bytes[..5000], "{count} bytes");
        // What is not there is refused at once: the host has no way, and the guest may not.
        for target in [
            "[2001:db8::99]:80",
            "[fd62:616e:a00:200::2]:80",
            "[fd00:ec2::254]:80",
        ] {
            let start = Instant::now();
            assert!(TcpStream::connect(target).is_err(), "{target}");
            assert!(start.elapsed() < Duration::from_secs(1), "{target}");
        }
        let listener = TcpListener::bind("[::]:7000").unwrap();
        is_served.store(true, Ordering::Relaxed);
        let (mut stream, peer) = listener.accept().unwrap();
        assert_eq!(peer.ip().to_string(), "fd62:616e:a00:200::2");
        stream.write_all(b"the guest answers").unwrap();
    });
    // The network's sockets are those of this namespace.
    let Ok(tap) = take_tap.recv() else {
        guest.join().unwrap();
        return;
    };
    thread::scope(|scope| {
        let is_over = &is_over;
        scope.spawn(move || pump(tap, network, is_over));
        let client = scope.spawn(|| {
            while !served.load(Ordering::Relaxed) && !is_over.load(Ordering::Relaxed) {
                thread::sleep(Duration::from_millis(20));
            }
            let mut text = String::new();
            if !is_over.load(Ordering::Relaxed) {
                let mut stream = TcpStream::connect(forwarded).unwrap();
                stream.read_to_string(&mut text).unwrap();
            }
            text
        });
        let ended = guest.join();
        let text = match ended {
            Ok(()) => client.join().unwrap(),
            Err(_) => String::new(),
        };
        is_over.store(true, Ordering::Relaxed);
        if let Err(panic) = ended {
            std::panic::resume_unwind(panic);
        }
        assert_eq!(text, "the guest answers");
    });
}
