//! A Linux guest moves from machine to machine, while it works on a disk with two processors, sends by TCP, has what it sends
//! by the socket device returned, and watches its clocks.

use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use bantam_tests::conversation::{self, COMPLAINTS};
use bantam_tests::{
    BusyLinux, HostBridge, HostTap, Traveller, linux_slot, require_kvm, require_taps, vsock_of,
};
use bantam_vmm::config::{NetConfig, VsockConfig};
use bantam_vmm::{MigrationOptions, State};

const SIZE: usize = 24 << 20;
const SEED: u64 = 9;
/// Steps of each of the guest's threads.
const OPERATIONS: u32 = 300;
/// How long the guest works between two moves.
const WORK_TIME: Duration = Duration::from_millis(1000);
/// How often the guest moves.
const MOVES: usize = 20;
/// More than the guest sends.
const TCP_LENGTH: u64 = 1 << 30;
const TCP_SEED: u64 = 12;
const VSOCK_PORT: u32 = 52;

#[test]
fn a_busy_linux_moves_while_it_runs() {
    require_kvm!();
    require_taps!();
    let _slot = linux_slot();
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("it can be written to");
    let guest = BusyLinux::new(folder.path(), &[], SIZE, SEED, OPERATIONS);
    let bridge = HostBridge::new();
    let listener = TcpListener::bind((bridge.host, 0)).expect("the host has the address");
    let peer = listener.local_addr().expect("it is bound");

    let others =
        format!("&net-tcp-send:{peer}:{TCP_LENGTH}:{TCP_SEED}&vsock-echo:{VSOCK_PORT}&watch:200");
    let mut config = guest.config(&others);
    config.cpus = 2.try_into().expect("a machine can have them");
    let net = format!(
        "net:eth0:{}/{}:{}",
        bridge.guest,
        HostTap::PREFIX,
        bridge.host
    );
    let append = config.append.take().expect("it has one");
    config.append = Some(append.replace("bantam.test=", &format!("bantam.test={net},")));
    let interface = bridge.taps[0].clone().try_into().expect("it is a name");
    config.nets = vec![NetConfig::new(interface)];
    // The card keeps its address at another tap.
    config.nets[0].mac = Some("02:00:00:00:00:12".parse().expect("it is an address"));
    config.vsock = Some(VsockConfig {
        cid: 3.try_into().expect("a guest can have it"),
        socket: vsock_of(folder.path(), 0),
    });
    let mut traveller = Traveller::start(config, folder.path());
    traveller.taps = Some(bridge.taps.clone());
    BusyLinux::wait_until_it_works(|| traveller.text());
    let moves = Arc::new(AtomicUsize::new(0));
    let received = conversation::receive(listener, TCP_SEED);
    let announced = conversation::announcements(bridge.name(), bridge.guest);
    let echoed = conversation::echo(
        {
            let (moves, folder) = (moves.clone(), folder.path().to_path_buf());
            move || vsock_of(&folder, moves.load(Ordering::Relaxed))
        },
        VSOCK_PORT,
    );

    let started = Instant::now();
    let answer = format!("bantam: {} ", guest.work());
    let mut counts = Vec::new();
    let options = MigrationOptions::default();
    for _ in 0..MOVES {
        thread::sleep(WORK_TIME);
        let state = traveller.machine.state();
        assert_eq!(state, State::Running, "{}", traveller.last_text());
        counts.push((received.count(), echoed.count()));
        let migrated = traveller.migrate_on(&options).expect("the guest runs");
        println!("{migrated:?}");
        moves.store(traveller.moves(), Ordering::Relaxed);
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
        "{} moves in {:?}, at most {:?} still; bytes by TCP and by the socket device {counts:?}",
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
