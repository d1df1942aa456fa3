//! A Linux guest goes from machine to machine by snapshots, while it works on a disk with four processors and four queues,
//! sends by TCP, has what it sends by the socket device returned, and watches its clocks.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use bantam_tests::{
    BusyLinux, HostTap, PacketSocket, Traveller, accept, first_difference, gone_on, linux_slot,
    pattern, require_kvm, require_taps,
};
use bantam_vmm::config::{NetConfig, VsockConfig};
use bantam_vmm::{Snapshot, State};

const SIZE: usize = 24 << 20;
const SEED: u64 = 7;
/// Steps of each of the guest's threads.
const OPERATIONS: u32 = 300;
/// How long the guest works between two snapshots.
const WORK_TIME: Duration = Duration::from_millis(1000);
/// How often the guest goes to another machine.
const MACHINES: usize = 20;
/// The move after which another machine goes on from the same snapshot.
const TWIN: usize = 2;
/// How long that one and the other may take to print a random number.
const TWIN_LIMIT: Duration = Duration::from_secs(60);
/// More than the guest sends.
const TCP_LENGTH: u64 = 1 << 30;
const TCP_SEED: u64 = 11;
const VSOCK_PORT: u32 = 52;
/// What Linux says about a processor or a task that has not gone on, and the agent about a command that has failed.
const COMPLAINTS: [&str; 7] = [
    "lockup",
    "stall",
    "blocked for more than",
    "Marking clocksource",
    "I/O error",
    "Call Trace",
    " failed ",
];

/// A thread of the host that counts what it gets from the guest, until it is dropped.
struct Counting {
    count: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Counting {
    fn start(work: impl FnOnce(&AtomicU64, &AtomicBool) + Send + 'static) -> Counting {
        let (count, stop) = (Arc::<AtomicU64>::default(), Arc::<AtomicBool>::default());
        let thread = thread::spawn({
            let (count, stop) = (count.clone(), stop.clone());
            move || work(&count, &stop)
        });
        Counting {
            count,
            stop,
            thread: Some(thread),
        }
    }

    fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// Ends the thread, which fails if it has found a fault, and returns what it has counted.
    fn end(mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().expect("it ends once");
        thread.join().expect("it has found no fault");
        self.count()
    }
}

/// Counts bytes of the guest's stream, which go on as if nothing had happened.
fn receive(listener: TcpListener) -> Counting {
    Counting::start(move |count, stop| {
        let mut stream: TcpStream = accept(&listener);
        let timeout = Some(Duration::from_millis(100));
        stream.set_read_timeout(timeout).expect("sockets can be");
        let mut bytes = vec![0; 1 << 16];
        while !stop.load(Ordering::Relaxed) {
            // Nothing comes for a while.
            let Ok(size) = stream.read(&mut bytes) else {
                continue;
            };
            assert_ne!(size, 0, "the guest has ended its stream");
            let offset = count.fetch_add(size as u64, Ordering::Relaxed);
            assert_eq!(first_difference(TCP_SEED, offset, &bytes[..size]), None);
        }
    })
}

/// Counts announcements of the guest's address.
fn announcements(tap: &HostTap) -> Counting {
    let socket = PacketSocket::open(&tap.name);
    let address = tap.guest.octets();
    Counting::start(move |count, stop| {
        // RFC 5227: sender and target have the same address.
        let is_announcement = |frame: &[u8]| {
            frame.get(12..14) == Some(&[8, 6])
                && frame.get(28..32) == Some(&address)
                && frame.get(38..42) == Some(&address)
        };
        while !stop.load(Ordering::Relaxed) {
            let frame = socket.receive(Duration::from_millis(100), is_announcement);
            count.fetch_add(u64::from(frame.is_some()), Ordering::Relaxed);
        }
    })
}

/// Sends by the socket device in each machine anew, and counts the bytes that come back.
fn echo(socket: PathBuf) -> Counting {
    const CHUNK: usize = 4096;
    Counting::start(move |count, stop| {
        let exchange = || -> std::io::Result<()> {
            let mut stream = UnixStream::connect(&socket)?;
            stream.set_read_timeout(Some(Duration::from_secs(5)))?;
            writeln!(stream, "CONNECT {VSOCK_PORT}")?;
            let mut byte = [0];
            while byte != *b"\n" {
                stream.read_exact(&mut byte)?;
            }
            for offset in (0..).step_by(CHUNK) {
                if stop.load(Ordering::Relaxed) {
                    return Ok(());
                }
                stream.write_all(&pattern(SEED, offset, CHUNK))?;
                let mut bytes = [0; CHUNK];
                stream.read_exact(&mut bytes)?;
                assert_eq!(first_difference(SEED, offset, &bytes), None);
                count.fetch_add(CHUNK as u64, Ordering::Relaxed);
            }
            Ok(())
        };
        while !stop.load(Ordering::Relaxed) {
            // The machine has ended, and the next one is not there yet or has reset the device.
            if exchange().is_err() {
                thread::sleep(Duration::from_millis(10));
            }
        }
    })
}

/// The random numbers that the guest has printed.
fn random_numbers(text: &str) -> Vec<String> {
    // The last line may be incomplete.
    let complete = text.rsplit_once('\n').map_or("", |(complete, _)| complete);
    let numbers = complete.lines().filter_map(|line| {
        let (_, number) = line.split_once("bantam: random ")?;
        Some(number.trim().to_owned())
    });
    numbers.collect()
}

/// Returns the random numbers of another machine that goes on from the snapshot, with a disk, a tap and a socket of its own.
fn numbers_of_twin(snapshot: &Snapshot, image: &Path, folder: &Path) -> Vec<String> {
    let tap = HostTap::new();
    let mut config = snapshot.config().clone();
    let disk = folder.join("twin.qcow2");
    fs::copy(image, &disk).expect("there is room");
    config.disks[0].path = disk;
    config.nets[0].tap = Some(tap.name.clone().try_into().expect("it is a name"));
    let vsock = config.vsock.as_mut().expect("it has one");
    vsock.socket = folder.join("twin.sock");
    let log = folder.join("twin.log");
    let machine = gone_on(snapshot, config, &log);
    let numbers = wait_for_numbers(|| fs::read_to_string(&log).unwrap_or_default());
    machine.stop();
    machine.wait().expect("its disk is flushed");
    numbers
}

/// Waits until a guest has printed several random numbers, and returns them.
fn wait_for_numbers(text: impl Fn() -> String) -> Vec<String> {
    let deadline = Instant::now() + TWIN_LIMIT;
    loop {
        let numbers = random_numbers(&text());
        if numbers.len() >= 3 {
            return numbers;
        }
        assert!(Instant::now() < deadline, "it prints nothing");
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_busy_linux_goes_from_machine_to_machine() {
    require_kvm!();
    require_taps!();
    let _slot = linux_slot();
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("it can be written to");
    let guest = BusyLinux::new(folder.path(), &[], SIZE, SEED, OPERATIONS);
    let tap = HostTap::new();
    let listener = TcpListener::bind((tap.host, 0)).expect("the host has the address");
    let peer = listener.local_addr().expect("it is bound");
    let socket = folder.path().join("vsock");

    let others =
        format!("&net-tcp-send:{peer}:{TCP_LENGTH}:{TCP_SEED}&vsock-echo:{VSOCK_PORT}&watch:200");
    let mut config = guest.config(&others);
    let net = format!("net:eth0:{}/{}:{}", tap.guest, HostTap::PREFIX, tap.host);
    let append = config.append.take().expect("it has one");
    config.append = Some(append.replace("bantam.test=", &format!("bantam.test={net},")));
    let interface = tap.name.clone().try_into().expect("it is a name");
    config.nets = vec![NetConfig::new(interface)];
    config.vsock = Some(VsockConfig {
        cid: 3.try_into().expect("a guest can have it"),
        socket: socket.clone(),
    });
    let mut traveller = Traveller::start(config, folder.path());
    BusyLinux::wait_until_it_works(|| traveller.text());
    let received = receive(listener);
    let announced = announcements(&tap);
    let echoed = echo(socket);

    let started = Instant::now();
    let answer = format!("bantam: {} ", guest.work());
    let mut counts = Vec::new();
    for number in 0..MACHINES {
        thread::sleep(WORK_TIME);
        let state = traveller.machine.state();
        assert_eq!(state, State::Running, "{}", traveller.last_text());
        counts.push((received.count(), echoed.count()));
        let mut twin = Vec::new();
        assert!(traveller.move_on_after(|snapshot| {
            if number == TWIN {
                twin = numbers_of_twin(snapshot, &guest.image(), folder.path());
            }
        }));
        if number == TWIN {
            let numbers = wait_for_numbers(|| traveller.last_text());
            println!("random numbers {numbers:?}, of the twin {twin:?}");
            // The first may have been taken before the snapshot, and is printed by both.
            assert!(numbers[1..].iter().all(|number| !twin.contains(number)));
        }
    }
    while !traveller.text().contains(&answer) {
        assert!(
            started.elapsed() < BusyLinux::LIMIT,
            "the guest does not end: {}",
            traveller.text()
        );
        thread::sleep(Duration::from_millis(10));
    }
    println!(
        "{} machines in {:?}, read in at most {:?}; bytes by TCP and by the socket device {counts:?}",
        traveller.moves(),
        started.elapsed(),
        traveller.longest_pause()
    );
    traveller.machine.stop();
    traveller.machine.wait().expect("the disk is flushed");
    let (received, echoed, announced) = (received.end(), echoed.end(), announced.end());
    println!("{received} bytes by TCP, {echoed} returned, {announced} announcements");
    assert!(received > counts[0].0, "{counts:?}, {received}");
    assert!(echoed > counts[0].1, "{counts:?}, {echoed}");
    assert!(announced > 0);

    let said = traveller.text();
    assert!(said.contains(&format!("{answer}ok")), "{said}");
    for complaint in COMPLAINTS {
        assert!(!said.contains(complaint), "{complaint}:\n{said}");
    }
    drop(traveller);
    guest.check_disk(&guest.image());
}
