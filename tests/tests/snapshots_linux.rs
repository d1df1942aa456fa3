//! A Linux guest goes from machine to machine by snapshots, while it works on a disk with four processors and four queues,
//! sends by TCP, has what it sends by the socket device returned, and watches its clocks.

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use bantam_tests::conversation::{self, COMPLAINTS};
use bantam_tests::{BusyLinux, HostTap, Traveller, gone_on, linux_slot, require_kvm, require_taps};
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
    let received = conversation::receive(listener, TCP_SEED);
    let announced = conversation::announcements(&tap.name, tap.guest);
    let echoed = conversation::echo(move || socket.clone(), VSOCK_PORT);

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
