//! Tests against taps of this host, if this user may create them.

use super::*;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sched::{CloneFlags, unshare};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

const ONE: QueueCount = QueueCount::Exactly(1);

/// A name that no other test and no other process of tests uses.
fn name(suffix: char) -> String {
    format!("btest{}{suffix}", std::process::id())
}

/// Reads an attribute of an interface from sysfs; `None` if there is no such interface.
fn attribute(name: &str, attribute: &str) -> Option<String> {
    let path: PathBuf = ["/sys/class/net", name, attribute].iter().collect();
    Some(std::fs::read_to_string(path).ok()?.trim().to_string())
}

fn is_up(name: &str) -> bool {
    let flags = attribute(name, "flags").unwrap();
    u32::from_str_radix(flags.trim_start_matches("0x"), 16).unwrap() & libc::IFF_UP as u32 != 0
}

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status();
    assert!(status.unwrap().success(), "ip {arguments}");
}

/// Taps can be created only by root, and only if the host has the driver.
fn may_create_taps() -> bool {
    let may = nix::unistd::geteuid().is_root() && std::fs::exists(CONTROL_DEVICE).unwrap();
    if !may {
        eprintln!("skipped: this user cannot create taps here");
    }
    may
}

#[test]
fn a_created_tap_is_up_and_vanishes() {
    if !may_create_taps() {
        return;
    }
    let name = name('a');
    let tap = Tap::open(&name, Some(1400), ONE).unwrap();
    assert!(tap.created());
    assert_eq!(tap.name(), name);
    assert!(is_up(&name));
    assert_eq!(attribute(&name, "mtu").unwrap(), "1400");

    let error = Tap::open(&name, None, ONE).unwrap_err().to_string();
    assert!(error.contains("in use by another machine"), "{error}");
    let all = Offloads {
        checksum: true,
        tcp4_segmentation: true,
        tcp6_segmentation: true,
        ecn: true,
        udp_segmentation: tap.offloads().udp_segmentation,
    };
    tap.set_offloads(all).unwrap();
    tap.set_offloads(Offloads {
        checksum: false,
        ..all
    })
    .unwrap();
    drop(tap);
    // A child process that another test is starting has the tap open until it execs.
    let deadline = Instant::now() + Duration::from_secs(10);
    while attribute(&name, "mtu").is_some() {
        assert!(Instant::now() < deadline, "the tap is still there");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Opens a tap that this test has just closed. A child process that another test is starting has it open
/// until it execs.
fn open_once_free(name: &str, mtu: Option<u16>, queues: QueueCount) -> Tap {
    retry(|| match Tap::open(name, mtu, queues) {
        Err(TapError::InUse { .. }) => None,
        result => Some(result.unwrap()),
    })
}

fn retry<T>(mut attempt: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        if let Some(result) = attempt() {
            return result;
        }
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_tap_has_the_queues_that_it_was_made_with() {
    if !may_create_taps() {
        return;
    }
    let (single, many) = (name('h'), name('i'));
    ip(&format!("tuntap add dev {single} mode tap"));
    ip(&format!("tuntap add dev {many} mode tap multi_queue"));
    let error = Tap::open(&single, None, QueueCount::Exactly(2)).unwrap_err();
    assert!(matches!(error, TapError::SingleQueue { .. }), "{error}");
    assert!(error.to_string().contains("multi_queue"), "{error}");
    for (name, queues, expected) in [
        (&single, QueueCount::Exactly(1), 1),
        (&single, QueueCount::AtMost(4), 1),
        (&many, QueueCount::Exactly(1), 1),
        (&many, QueueCount::AtMost(4), 4),
        (&many, QueueCount::Exactly(8), 8),
    ] {
        let tap = open_once_free(name, None, queues);
        assert_eq!(tap.queues().len(), expected, "{queues:?}");
        tap.use_queues(expected).unwrap();
        let error = Tap::open(name, None, queues).unwrap_err().to_string();
        assert!(error.contains("in use by another machine"), "{error}");
        tap.use_queues(1).unwrap();
        let error = Tap::open(name, None, queues).unwrap_err().to_string();
        assert!(error.contains("in use by another machine"), "{error}");
    }
    ip(&format!("link del {single}"));
    ip(&format!("link del {many}"));
    let created = Tap::open(&many, None, QueueCount::Exactly(3)).unwrap();
    assert!(created.created());
    assert_eq!(created.queues().len(), 3);
}

#[test]
fn an_existing_tap_is_left_as_it_is() {
    if !may_create_taps() {
        return;
    }
    let name = name('b');
    ip(&format!("tuntap add dev {name} mode tap"));
    for mtu in [None, Some(1500), Some(9000)] {
        let tap = open_once_free(&name, mtu, ONE);
        assert!(!tap.created());
        assert!(!is_up(&name));
        let expected = mtu.unwrap_or(1500).to_string();
        assert_eq!(attribute(&name, "mtu").unwrap(), expected);
        drop(tap);
        assert_eq!(attribute(&name, "mtu").unwrap(), "1500");
    }
    let error = Tap::open(&name, Some(40), ONE).unwrap_err().to_string();
    assert!(error.contains("a tap takes 68 to 65521"), "{error}");
    let tap = open_once_free(&name, Some(9000), ONE);
    ip(&format!("link set {name} mtu 1400"));
    drop(tap);
    assert_eq!(attribute(&name, "mtu").unwrap(), "1400", "not ours to undo");
    let tap = open_once_free(&name, Some(9000), ONE);
    ip(&format!("link del {name}"));
    drop(tap);
}

#[test]
fn the_next_user_of_a_tap_finds_the_usual_header_size() {
    if !may_create_taps() {
        return;
    }
    let (single, many) = (name('j'), name('k'));
    ip(&format!("tuntap add dev {single} mode tap"));
    ip(&format!("tuntap add dev {many} mode tap multi_queue"));
    let header_size = |name: &str| {
        let mut size = 0;
        let is_attached = |file: &File| attach_queue(file, name, name == many).is_ok();
        let file = retry(|| Some(open_control_device().unwrap()).filter(is_attached));
        // SAFETY: the request writes an int to the place it is given.
        unsafe { request::get_header_size(file.as_raw_fd(), &mut size) }.unwrap();
        size
    };
    let usual = header_size(&single);
    assert_ne!(usual, PACKET_HEADER_SIZE as c_int);
    for (name, mtu, queues) in [
        (&single, None, QueueCount::Exactly(1)),
        (&single, None, QueueCount::Exactly(2)),
        (&single, Some(40), QueueCount::Exactly(1)),
        (&many, Some(9000), QueueCount::Exactly(2)),
    ] {
        let _ = Tap::open(name, mtu, queues);
        assert_eq!(header_size(name), usual, "{mtu:?} {queues:?}");
    }
    ip(&format!("link del {single}"));
    ip(&format!("link del {many}"));
}

/// sysfs still shows the taps outside, as it does for a program that `nsenter --net` has started.
#[test]
fn only_taps_of_the_network_namespace_count() {
    if !may_create_taps() {
        return;
    }
    let (inside, outside) = (name('l'), name('m'));
    let queues = QueueCount::Exactly(2);
    let _used_outside = Tap::open(&outside, None, queues).unwrap();
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        for name in [inside, outside] {
            ip(&format!("tuntap add dev {name} mode tap multi_queue"));
            let tap = Tap::open(&name, Some(1400), queues).unwrap();
            assert!(!tap.created());
            let error = Tap::open(&name, None, queues).unwrap_err();
            assert!(matches!(error, TapError::InUse { .. }), "{error}");
            // A queue that is attached but not in use counts too.
            tap.use_queues(2).unwrap();
            tap.use_queues(1).unwrap();
            assert_eq!(link::attached_queues(&name).unwrap(), Some(2));
            drop(tap);
            let mtu = Interface::new(&name).unwrap().set_mtu_temporarily(1500);
            assert!(mtu.unwrap().is_none(), "it is 1500 again");
        }
    });
    thread.join().unwrap();
}

#[test]
fn a_tap_that_its_user_is_giving_up_is_waited_for() {
    if !may_create_taps() {
        return;
    }
    for (name, queues) in [(name('n'), 1), (name('o'), 2)] {
        let queues = QueueCount::Exactly(queues);
        let used = Tap::open(&name, None, queues).unwrap();
        let user = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            drop(used);
        });
        let start = Instant::now();
        let next = Tap::open(&name, None, queues).unwrap();
        assert!(start.elapsed() >= Duration::from_millis(50));
        assert_eq!(next.queues().len(), queues.get());
        user.join().unwrap();
    }
}

/// Two simultaneous starts may both be refused at first, but not both for long.
#[test]
fn one_of_several_starts_at_once_gets_the_tap() {
    if !may_create_taps() {
        return;
    }
    let name = name('p');
    ip(&format!("tuntap add dev {name} mode tap multi_queue"));
    let open = || Tap::open(&name, None, QueueCount::AtMost(2));
    for _ in 0..5 {
        retry(|| {
            let taps: Vec<_> = std::thread::scope(|scope| {
                let starts: Vec<_> = (0..3).map(|_| scope.spawn(open)).collect();
                let joined = starts.into_iter().map(|start| start.join().unwrap());
                joined.collect()
            });
            let opened = taps.iter().filter(|tap| tap.is_ok()).count();
            assert!(opened <= 1, "{taps:?}");
            (opened == 1).then_some(())
        });
    }
    ip(&format!("link del {name}"));
}

#[test]
fn a_removed_tap_is_gone() {
    if !may_create_taps() {
        return;
    }
    let name = name('c');
    let tap = Tap::open(&name, None, ONE).unwrap();
    ip(&format!("link del {name}"));
    let error = (&tap.queues()[0].0).read(&mut [0; 64]).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EBADFD));
    tap.discard_queued();
    assert!(tap.set_offloads(Offloads::default()).is_err());
}

#[test]
fn what_was_queued_is_discarded() {
    if !may_create_taps() {
        return;
    }
    let name = name('d');
    let tap = Tap::open(&name, None, ONE).unwrap();
    ip(&format!("addr add 198.51.100.1/24 dev {name}"));
    // Nothing answers the address resolution that this starts.
    let socket = std::net::UdpSocket::bind("198.51.100.1:0").unwrap();
    socket.send_to(b"hello", "198.51.100.2:9").unwrap();
    let mut readable = [PollFd::new(tap.queues()[0].as_fd(), PollFlags::POLLIN)];
    assert_eq!(poll(&mut readable, 5000u16).unwrap(), 1);
    tap.discard_queued();
    // Packets that the interface sends by itself because it has come up may follow at any time.
    let mut packet = [0; 2048];
    while (&tap.queues()[0].0).read(&mut packet).is_ok() {
        let protocol = &packet[PACKET_HEADER_SIZE + 12..][..2];
        assert_ne!(protocol, [8, 6], "the address resolution");
    }
}

#[test]
fn another_user_is_told_what_root_can_do() {
    const NOBODY: u32 = 65534;
    if !may_create_taps() {
        return;
    }
    let (others, own) = (name('e'), name('f'));
    ip(&format!("tuntap add dev {others} mode tap user 1"));
    ip(&format!("tuntap add dev {own} mode tap user {NOBODY}"));
    // The host may keep other users from opening the control device, so it is opened before the user is
    // changed.
    let attempts =
        [name('g'), others.clone(), own.clone()].map(|name| (open_control_device().unwrap(), name));
    let thread = std::thread::spawn(move || {
        // SAFETY: the system call, unlike the function of the C library, changes the user of
        // this thread alone, and takes plain numbers.
        let result = unsafe { libc::syscall(libc::SYS_setresuid, NOBODY, NOBODY, NOBODY) };
        assert_eq!(result, 0);
        attempts.map(|(file, name)| {
            Tap::attach(file, &name, Some(1400), ONE).map_err(|error| error.to_string())
        })
    });
    let [new, others_result, own_result] = thread.join().unwrap();
    for name in [others, own] {
        ip(&format!("link del {name}"));
    }
    let error = new.unwrap_err();
    assert!(
        error.contains("run as root, or have root create it by"),
        "{error}"
    );
    let error = others_result.unwrap_err();
    assert!(error.contains("it belongs to another user"), "{error}");
    let error = own_result.unwrap_err();
    assert!(
        error.contains("it is 1500, and as root 'ip link set"),
        "{error}"
    );
}

#[test]
fn what_is_no_tap_is_refused() {
    for (name, reason) in [
        ("", "has a name"),
        ("sixteen-bytes-xx", "at most 15 bytes"),
        ("tap%d", "no '/', ':', '%'"),
        ("a b", "white space"),
        ("a\0b", "white space"),
        ("..", "cannot be called so"),
    ] {
        let error = Tap::open(name, None, ONE).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
    }
    if may_create_taps() {
        let error = Tap::open("lo", None, ONE).unwrap_err().to_string();
        assert!(error.contains("it is not a tap"), "{error}");
    }
}

#[test]
fn refusals_say_what_helps() {
    for (name, errno, remedy) in [
        ("lo", Errno::EPERM, "belongs to another user"),
        (
            "no-such-tap",
            Errno::EPERM,
            "ip tuntap add dev no-such-tap mode tap",
        ),
        (
            "no-such-tap",
            Errno::ENFILE,
            "cannot attach to tap 'no-such-tap': ",
        ),
    ] {
        let error = attach_error(name, errno).to_string();
        assert!(error.contains(remedy), "{error}");
    }
    for (errno, remedy) in [
        (libc::ENOENT, "modprobe tun"),
        (libc::EACCES, "run as root"),
        (
            libc::EMFILE,
            "cannot open /dev/net/tun for tap 'x': Too many open files",
        ),
    ] {
        let error = control_error("x", io::Error::from_raw_os_error(errno)).to_string();
        assert!(error.contains(remedy), "{error}");
    }
}

#[test]
fn offloads_without_their_foundation_are_not_asked_for() {
    let all = Offloads {
        checksum: true,
        tcp4_segmentation: true,
        tcp6_segmentation: true,
        ecn: true,
        udp_segmentation: true,
    };
    assert_eq!(all.bits(), 0x6f);
    assert_eq!(
        Offloads {
            checksum: false,
            ..all
        }
        .bits(),
        0
    );
    let ecn_alone = Offloads {
        checksum: true,
        ecn: true,
        ..Offloads::default()
    };
    assert_eq!(ecn_alone.bits(), libc::TUN_F_CSUM);
}

/// Attaches to a tap as another program would. It is not persistent, so it vanishes with the file.
fn attached(name: &str, flags: c_int) -> File {
    let file = open_control_device().unwrap();
    let mut attachment = interface_request(name);
    attachment.ifr_ifru.ifru_flags = flags as c_short;
    // SAFETY: the request reads an ifreq and writes the name back to it; it is our own.
    unsafe { request::attach(file.as_raw_fd(), &attachment) }.unwrap();
    file
}

#[test]
fn a_tap_that_another_program_has_opened_is_used() {
    if !may_create_taps() {
        return;
    }
    let name = name('q');
    let file = attached(&name, libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR);
    let tap = Tap::adopt(file.as_raw_fd()).unwrap();
    assert_eq!((tap.name(), tap.created()), (name.as_str(), false));
    assert!(tap.offloads().checksum && tap.offloads().tcp4_segmentation);
    assert_eq!(tap.header_size(), Ok(PACKET_HEADER_SIZE as c_int));
    tap.forget_driver().unwrap();
    drop(tap);
    // The descriptor stays open, and can be used again, as after a reboot.
    let tap = Tap::adopt(file.as_raw_fd()).unwrap();
    assert_eq!(tap.found_header_size, Some(10));
}

#[test]
fn descriptors_of_something_else_are_refused() {
    let refusal = |fd| Tap::adopt(fd).unwrap_err().to_string();
    let file = File::open("/dev/null").unwrap();
    let fd = file.as_raw_fd();
    let expected = format!("cannot use descriptor {fd} as a tap: it is not that of a tap");
    assert_eq!(refusal(fd), expected);
    assert_eq!(
        refusal(-1),
        "cannot use descriptor -1 as a tap: no such descriptor is open"
    );
    if !may_create_taps() {
        return;
    }
    // One that is not attached to anything.
    let file = open_control_device().unwrap();
    let error = refusal(file.as_raw_fd());
    assert!(error.ends_with("it is not that of a tap"), "{error}");
    let (tun, bare) = (name('r'), name('s'));
    let file = attached(&tun, libc::IFF_TUN | libc::IFF_NO_PI);
    let error = refusal(file.as_raw_fd());
    assert!(error.ends_with("it is a tun"), "{error}");
    let file = attached(&bare, libc::IFF_TAP | libc::IFF_NO_PI);
    let error = refusal(file.as_raw_fd());
    assert!(error.contains("IFF_VNET_HDR"), "{error}");
}
