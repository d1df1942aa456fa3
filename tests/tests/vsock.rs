//! The socket device, with guests that use it to talk to programs of the host.

#![allow(clippy::unwrap_used, reason = "a test fails where the host does")]

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use bantam_tests::{
    Bantam, Kernel, RootFileSystem, Running, answer, first_difference, pattern, require_kvm,
};

/// Bytes after which the pattern of the payload `vsock` repeats itself.
const PATTERN_SIZE: usize = 65_521;
/// How long a program of the host waits for the guest.
const LIMIT: Duration = Duration::from_secs(60);

/// How long a guest may take until it connects.
const BOOT_LIMIT: Duration = Duration::from_secs(240);

/// Ports of the payload.
mod port {
    pub const EXCHANGE: u32 = 1;
    pub const STALL: u32 = 2;
    pub const RESET: u32 = 3;
    pub const RESET_DEVICE: u32 = 4;
    pub const FINISH: u32 = 5;
    /// One that it does not have.
    pub const NONE: u32 = 99;
}

fn machine(socket: &Path, words: &str) -> Bantam {
    Bantam::payload("vsock")
        .option("--vsock", format!("cid=5,socket={}", socket.display()))
        .append(words)
}

fn start(socket: &Path, words: &str) -> Running {
    let machine = machine(socket, words).start();
    let text = machine.wait_for_output("ready\n");
    assert!(text.contains("cid 5\n"), "{text}");
    machine
}

fn socket(folder: &tempfile::TempDir) -> PathBuf {
    folder.path().join("vsock")
}

/// A stream on which `CONNECT` has been written.
fn ask(socket: &Path, port: u32) -> UnixStream {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.set_write_timeout(Some(LIMIT)).unwrap();
    stream
        .write_all(format!("CONNECT {port}\n").as_bytes())
        .unwrap();
    stream
}

/// A connection to a port of the guest, and the host's port that it has.
fn connect(socket: &Path, port: u32) -> (UnixStream, u32) {
    let mut stream = ask(socket, port);
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        line.extend(byte);
    }
    let line = String::from_utf8(line).unwrap();
    let port = line.trim_end().strip_prefix("OK ").unwrap();
    (stream, port.parse().unwrap())
}

/// Accepts the next connection of the guest.
fn accept(listener: &UnixListener) -> UnixStream {
    let deadline = Instant::now() + BOOT_LIMIT;
    listener.set_nonblocking(true).unwrap();
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false).unwrap();
                stream.set_read_timeout(Some(LIMIT)).unwrap();
                stream.set_write_timeout(Some(LIMIT)).unwrap();
                return stream;
            }
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                assert!(Instant::now() < deadline, "the guest does not connect");
                thread::sleep(Duration::from_millis(1));
            }
        }
    }
}

fn payload_pattern() -> Vec<u8> {
    let byte = |index: usize| {
        let index = index % PATTERN_SIZE;
        (index * 7 + index / 251) as u8
    };
    (0..2 * PATTERN_SIZE).map(byte).collect()
}

/// Sends that many bytes of the pattern, and checks that the same number arrives and that the guest
/// has received all that was sent.
fn exchange(mut stream: UnixStream, length: usize, pattern: &[u8]) {
    let mut writer = stream.try_clone().unwrap();
    thread::scope(|scope| {
        scope.spawn(move || {
            let mut sent = 0;
            while sent < length {
                let start = sent % PATTERN_SIZE;
                let size = PATTERN_SIZE.min(length - sent);
                writer.write_all(&pattern[start..start + size]).unwrap();
                sent += size;
            }
            writer.shutdown(Shutdown::Write).unwrap();
        });
        let mut chunk = vec![0; PATTERN_SIZE];
        let mut received = 0;
        while received < length {
            let most = chunk.len().min(length - received);
            let count = stream.read(&mut chunk[..most]).unwrap();
            assert_ne!(count, 0, "after {received} bytes");
            let start = received % PATTERN_SIZE;
            assert!(chunk[..count] == pattern[start..start + count]);
            received += count;
        }
        let mut verdict = [0; 8];
        stream.read_exact(&mut verdict).unwrap();
        assert_eq!(u64::from_le_bytes(verdict), length as u64);
        assert_eq!(stream.read(&mut chunk).unwrap(), 0, "the end");
    });
}

fn finish(socket: &Path, machine: Running) -> bantam_tests::Ended {
    let _asked = ask(socket, port::FINISH);
    let ended = machine.wait();
    ended.passed();
    assert!(!socket.exists());
    ended
}

#[test]
fn a_hundred_connections_carry_a_gibibyte() {
    const CONNECTIONS: usize = 50;
    // Each way on each of twice as many.
    const LENGTH: usize = (1 << 30) / (4 * CONNECTIONS);
    require_kvm!();
    let folder = tempfile::tempdir().unwrap();
    let socket = socket(&folder);
    let listener = UnixListener::bind(folder.path().join("vsock_7000")).unwrap();
    let machine = start(&socket, &format!("length={LENGTH} connect={CONNECTIONS}"));
    let began = Instant::now();
    let pattern = payload_pattern();
    thread::scope(|scope| {
        let (socket, pattern) = (&socket, &pattern);
        for _ in 0..CONNECTIONS {
            let stream = accept(&listener);
            scope.spawn(move || exchange(stream, LENGTH, pattern));
            scope.spawn(move || {
                let (stream, host_port) = connect(socket, port::EXCHANGE);
                assert!(host_port >= 1 << 30);
                exchange(stream, LENGTH, pattern);
            });
        }
    });
    let time = began.elapsed();
    println!("1 GiB on {} connections in {time:?}", 2 * CONNECTIONS);
    let ended = finish(&socket, machine);
    ended.printed(&format!("{} exchanges", 2 * CONNECTIONS));
    assert!(!ended.text().contains("was reset"), "{ended}");
}

/// Exchanges data until the stream is cut, and checks that what has arrived until then is right. Adds it to `received`.
fn exchange_until_cut(mut stream: UnixStream, pattern: &[u8], received: &AtomicUsize) {
    let mut writer = stream.try_clone().unwrap();
    thread::scope(|scope| {
        scope.spawn(move || while writer.write_all(&pattern[..PATTERN_SIZE]).is_ok() {});
        let mut chunk = vec![0; PATTERN_SIZE];
        let mut position = 0;
        while let Ok(count @ 1..) = stream.read(&mut chunk) {
            let start = position % PATTERN_SIZE;
            assert!(chunk[..count] == pattern[start..start + count]);
            position += count;
            received.fetch_add(count, Ordering::Relaxed);
        }
    });
}

#[test]
fn a_snapshot_cuts_streams_and_the_next_machine_has_others() {
    const CONNECTIONS: usize = 8;
    const LENGTH: usize = 32 << 20;
    require_kvm!();
    let folder = tempfile::tempdir().unwrap();
    let socket = socket(&folder);
    let control = folder.path().join("control");
    let directory = folder.path().join("snapshot");
    let pattern = payload_pattern();
    let machine = machine(&socket, &format!("length={LENGTH}"))
        .option("--control", &control)
        .start();
    machine.wait_for_output("ready\n");
    let received = AtomicUsize::new(0);
    thread::scope(|scope| {
        let (received, pattern) = (&received, &pattern);
        for _ in 0..CONNECTIONS {
            let (stream, _) = connect(&socket, port::EXCHANGE);
            scope.spawn(move || exchange_until_cut(stream, pattern, received));
        }
        let deadline = Instant::now() + LIMIT;
        while received.load(Ordering::Relaxed) < LENGTH / 4 {
            assert!(Instant::now() < deadline, "nothing arrives");
            thread::sleep(Duration::from_millis(1));
        }
        let taken = Bantam::new(["snapshot", "--stop"])
            .argument(&control)
            .argument(&directory)
            .finish();
        taken.succeeded();
    });
    drop(machine);
    let received = received.into_inner();
    println!("{received} bytes before the snapshot");
    assert!(received < CONNECTIONS * LENGTH, "it came too late");

    let socket = folder.path().join("other");
    let machine = Bantam::new(["restore"])
        .argument(&directory)
        .option("--vsock", &socket)
        .start();
    let deadline = Instant::now() + LIMIT;
    while !socket.exists() {
        assert!(Instant::now() < deadline, "there is no socket");
        thread::sleep(Duration::from_millis(1));
    }
    for _ in 0..2 {
        exchange(connect(&socket, port::EXCHANGE).0, LENGTH, &pattern);
    }
    finish(&socket, machine);
}

#[test]
fn connections_are_refused_reset_and_stalled_each_for_itself() {
    const LENGTH: usize = 1 << 20;
    require_kvm!();
    let folder = tempfile::tempdir().unwrap();
    let socket = socket(&folder);
    let machine = start(&socket, &format!("length={LENGTH} connect=1"));
    let pattern = payload_pattern();
    let exchange = || exchange(connect(&socket, port::EXCHANGE).0, LENGTH, &pattern);

    // Nothing listens to port 7000 of the host, or to this port of the guest.
    machine.wait_for_output("was reset");
    let mut refused = ask(&socket, port::NONE);
    assert_eq!(refused.read(&mut [0; 1]).unwrap(), 0);

    let (mut reset, _) = connect(&socket, port::RESET);
    reset.write_all(b"x").unwrap();
    assert_eq!(reset.read(&mut [0; 1]).unwrap(), 0);

    let (mut stalled, _) = connect(&socket, port::STALL);
    stalled.set_nonblocking(true).unwrap();
    let mut quiet_since = Instant::now();
    let mut sent = 0;
    while quiet_since.elapsed() < Duration::from_millis(200) {
        match stalled.write(&pattern) {
            Ok(count) => {
                sent += count;
                quiet_since = Instant::now();
            }
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                thread::sleep(Duration::from_millis(1));
            }
        }
    }
    // The guest's credit, and the buffers of the host's kernel.
    assert!((256 << 10..2 << 20).contains(&sent), "{sent}");
    exchange();
    exchange();
    drop(stalled);
    exchange();

    // A reset of the device ends all of them, and the device works again after it.
    let (mut lost, _) = connect(&socket, port::STALL);
    let _asked = ask(&socket, port::RESET_DEVICE);
    machine.wait_for_output("reset\n");
    assert_eq!(lost.read(&mut [0; 1]).unwrap(), 0);
    exchange();
    finish(&socket, machine);
}

/// Sends the seed and its pattern, and checks that the pattern of the next seed arrives.
fn exchange_with_linux(mut stream: UnixStream, seed: u64, length: usize) {
    let mut writer = stream.try_clone().unwrap();
    thread::scope(|scope| {
        scope.spawn(move || {
            writer.write_all(&seed.to_le_bytes()).unwrap();
            writer.write_all(&pattern(seed, 0, length)).unwrap();
            writer.shutdown(Shutdown::Write).unwrap();
        });
        let mut received = Vec::new();
        stream.read_to_end(&mut received).unwrap();
        assert_eq!(received.len(), length);
        assert_eq!(first_difference(seed + 1, 0, &received), None);
    });
}

#[test]
fn linux_connects_to_programs_of_the_host_and_they_to_it() {
    const CONNECTIONS: usize = 4;
    const LENGTH: usize = (16 << 20) / (2 * CONNECTIONS);
    require_kvm!();
    let folder = tempfile::tempdir().unwrap();
    let socket = socket(&folder);
    let listener = UnixListener::bind(folder.path().join("vsock_7000")).unwrap();
    let connects = format!("vsock-connect:7000:{CONNECTIONS}:{LENGTH}");
    let listens = format!("vsock-listen:52:{CONNECTIONS}:{LENGTH}");
    let nobody = "vsock-connect:7001:1:1";
    let commands = [&connects[..], &listens, nobody].join(",");
    let machine = Bantam::linux(Kernel::Full)
        .option("--initrd", RootFileSystem::new().initrd)
        .option("--vsock", format!("cid=3,socket={}", socket.display()))
        .append(format!("quiet bantam.mode=test bantam.test={commands}"))
        .start();
    thread::scope(|scope| {
        for seed in 0..CONNECTIONS {
            let stream = accept(&listener);
            scope.spawn(move || exchange_with_linux(stream, seed as u64, LENGTH));
        }
    });
    machine.wait_for_output(&format!("bantam: {listens} waiting"));
    thread::scope(|scope| {
        for seed in 0..CONNECTIONS {
            let (stream, _) = connect(&socket, 52);
            scope.spawn(move || exchange_with_linux(stream, 100 + seed as u64, LENGTH));
        }
    });
    machine.wait_for_output("bantam: done");
    let ended = machine.wait();
    let text = ended.succeeded().text();
    println!("{}; {}", answer(&text, &connects), answer(&text, &listens));
    let refused = format!("bantam: {nobody} failed connection 0 to port 7001: Connection reset");
    ended.printed(&refused);
}
