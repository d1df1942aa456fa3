//! A Linux guest with IPv6 on a user network, and what it does with many connections.

use std::env;
use std::io::{Read, Write};
use std::net::{TcpListener, UdpSocket};
use std::thread;
use std::time::Duration;

use bantam_tests::world::{
    LEASE_SCRIPT, SERVER, SERVER_V6, connect, file_sum, in_world, serve_file, serve_names,
};
use bantam_tests::{Bantam, Kernel, require_kvm, require_namespaces, scripted_root, unprivileged};
use nix::sys::socket::{setsockopt, sockopt};

/// How many connections the guest has at once.
const CROWD: usize = 500;

/// Bytes of a [`block`].
const BLOCK_SIZE: usize = 1 << 19;

/// Bytes at a position of a stream, which differ from those at all others that are near.
fn block(number: u64) -> Vec<u8> {
    const WORDS: u64 = BLOCK_SIZE as u64 / 8;
    let words = (0..WORDS).map(|word| (number * WORDS + word).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    words.flat_map(u64::to_le_bytes).collect()
}

/// Returns how many MiB pass through the guest: `BANTAM_NETWORK_MIB`, or 1. Linux is slow on hosts without hardware
/// virtualization.
fn transfer_size() -> u64 {
    let size = env::var("BANTAM_NETWORK_MIB").ok();
    size.map_or(1, |size| size.parse().expect("it is a number"))
}

/// What the guest does. It has no program that takes the name server from the router's advertisement.
fn script() -> String {
    format!(
        r#"#!/bin/sh
mount -t proc proc /proc
busybox mkdir -p /tmp
mount -t tmpfs tmpfs /tmp
udhcpc -i eth0 -n -q -f -s /lease.sh
until busybox grep 'fd62616e0a000200.* 40 00 00 ' /proc/net/if_inet6; do sleep 1; done
echo "ROUTE $(busybox ip -6 route show default)"
echo nameserver fd62:616e:a00:200::3 > /etc/resolv.conf
(until [ -e /tmp/over ]; do sleep 1; done; echo late) | nc {SERVER} 7400 > /tmp/idle &

nslookup six.test
echo "FILE $(wget -q -O - http://six.test/ | md5sum)"
for target in {SERVER_V6} fd62:616e:a00:200::2; do
    ping -6 -c 1 -W 5 $target > /dev/null && echo "PINGED $target"
done
echo SERVING
nc -l -p 7000 -e /peers.sh

nc {SERVER_V6} 7001 < /dev/null | nc {SERVER} 7002
echo "ANSWER $(echo question | nc {SERVER} 7500)"
wget -q -O - http://{SERVER}:7200/ > /dev/null || echo "RESET seen"
nc {SERVER} 7300 < /dev/null | busybox head -c 1 > /dev/null
agent net-tcp-crowd:{SERVER}:7100:{CROWD}
echo > /tmp/over
wait
echo "IDLE $(busybox cat /tmp/idle)"
printf '\000' | dd of=/dev/port bs=1 seek=1280
"#
    )
}

#[test]
fn linux_uses_ipv6_and_many_connections() {
    require_kvm!();
    require_namespaces!();
    in_world(|| {
        let size = transfer_size();
        let blocks = (size << 20) / BLOCK_SIZE as u64;
        let names = UdpSocket::bind("127.0.0.53:53").unwrap();
        thread::spawn(move || serve_names(&names));
        let files = TcpListener::bind((SERVER_V6, 80)).unwrap();
        thread::spawn(move || serve_file(&files));
        let source = TcpListener::bind((SERVER_V6, 7001)).unwrap();
        let serve = |port| TcpListener::bind((SERVER, port)).unwrap();
        let [target, crowd, resetting, abandoned, idle, question] =
            [7002, 7100, 7200, 7300, 7400, 7500].map(serve);
        let servers = [
            thread::spawn(move || {
                let mut stream = source.accept().unwrap().0;
                for number in 0..blocks {
                    stream.write_all(&block(number)).unwrap();
                }
            }),
            thread::spawn(move || {
                let mut stream = target.accept().unwrap().0;
                let mut bytes = vec![0; BLOCK_SIZE];
                for number in 0..blocks {
                    stream.read_exact(&mut bytes).unwrap();
                    assert!(bytes == block(number), "block {number} is another one");
                }
                assert_eq!(stream.read(&mut bytes).unwrap(), 0);
            }),
            thread::spawn(move || {
                // None is served before all are there.
                let streams: Vec<_> = (0..CROWD).map(|_| crowd.accept().unwrap().0).collect();
                for (number, mut stream) in streams.into_iter().enumerate() {
                    writeln!(stream, "{number}").unwrap();
                }
            }),
            thread::spawn(move || {
                let mut stream = resetting.accept().unwrap().0;
                let head = b"HTTP/1.0 200 OK\r\nContent-Length: 1000\r\n\r\nhalf of it";
                stream.write_all(head).unwrap();
                let at_once = libc::linger {
                    l_onoff: 1,
                    l_linger: 0,
                };
                setsockopt(&stream, sockopt::Linger, &at_once).unwrap();
            }),
            thread::spawn(move || {
                let mut stream = abandoned.accept().unwrap().0;
                // The guest does not read that much.
                let sent = stream.write_all(&vec![0; 64 << 20]);
                assert!(sent.is_err(), "nobody has reset it");
            }),
            thread::spawn(move || {
                let mut stream = idle.accept().unwrap().0;
                let mut text = String::new();
                stream.read_to_string(&mut text).unwrap();
                assert_eq!(text, "late\n");
                stream.write_all(b"still here").unwrap();
            }),
            thread::spawn(move || {
                let mut stream = question.accept().unwrap().0;
                let mut text = String::new();
                // It ends when the guest has closed its half.
                stream.read_to_string(&mut text).unwrap();
                assert_eq!(text, "question\n");
                stream.write_all(b"of the other half").unwrap();
            }),
        ];

        let folder = tempfile::tempdir().unwrap();
        let script = script();
        let scripts = [
            ("test.sh", script.as_str()),
            ("lease.sh", LEASE_SCRIPT),
            ("peers.sh", "#!/bin/sh\nbusybox cat /proc/net/tcp6\n"),
        ];
        let root = scripted_root(folder.path(), &scripts);
        let machine = Bantam::linux(Kernel::Distribution)
            .launcher(unprivileged())
            .limit(Duration::from_secs(400 + 60 * size))
            .option("--memory", "512M")
            .disk(&root, "")
            .append("quiet init=/test.sh")
            .option("--net", "user,dns=127.0.0.53,forward=[::1]:7070:7000")
            .start();
        machine.wait_for_output("SERVING");
        let peers = connect("[::1]:7070");
        let ended = machine.wait();
        // The gateway, in words of the host's order.
        let gateway = "6E6162FD0002000A0000000002000000:";
        assert!(peers.contains(gateway), "{peers}");
        let text = ended.succeeded().text();
        for line in [
            "ROUTE default via fe80::2 dev eth0".to_owned(),
            format!("Address: {SERVER_V6}"),
            format!("FILE {}  -", file_sum()),
            format!("PINGED {SERVER_V6}"),
            "PINGED fd62:616e:a00:200::2".to_owned(),
            "ANSWER of the other half".to_owned(),
            "RESET seen".to_owned(),
            format!("net-tcp-crowd:{SERVER}:7100:{CROWD} ok lines={CROWD}"),
            "IDLE still here".to_owned(),
        ] {
            assert!(text.contains(&line), "{line}: {text}");
        }
        for server in servers {
            server.join().unwrap();
        }
    });
}
