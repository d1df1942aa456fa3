use super::*;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixDatagram;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use vmm_sys_util::tempdir::TempDir;

/// Leaves a socket at `path`, as a killed process does.
fn abandon(path: &Path) {
    drop(UnixListener::bind(path).unwrap());
}

fn names(folder: &TempDir) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(folder.as_path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[track_caller]
fn assert_no_client(socket: &ListeningSocket) {
    let error = socket.accept().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
}

#[test]
fn a_socket_is_there_while_it_listens_and_nothing_beside_it() {
    let folder = TempDir::new().unwrap();
    let path = folder.as_path().join("socket");
    let socket = ListeningSocket::bind(&path).unwrap();
    assert_eq!(names(&folder), ["socket"]);
    UnixStream::connect(&path).unwrap();
    socket.accept().unwrap();
    drop(socket);
    assert_eq!(names(&folder), [""; 0]);
}

#[test]
fn a_private_socket_is_for_its_user_alone_from_its_first_moment() {
    let folder = TempDir::new().unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    let path = folder.as_path().join("socket");
    let socket = ListeningSocket::bind_private(&path).unwrap();
    assert_eq!(mode(&path), 0o600);
    UnixStream::connect(&path).unwrap();
    socket.accept().unwrap();
    drop(socket);
    assert_eq!(names(&folder), [""; 0]);
    let staged = stage(&path, Clients::OfUser).unwrap();
    assert_eq!(mode(&staged.path), 0o600);
    let direct = folder.as_path().join("direct");
    let _listener = listen_directly(&direct, Clients::OfUser).unwrap();
    assert_eq!(mode(&direct), 0o600);
}

#[test]
fn an_abandoned_socket_is_replaced_and_one_in_use_gets_no_client() {
    let folder = TempDir::new().unwrap();
    let path = folder.as_path().join("socket");
    abandon(&path);
    let socket = ListeningSocket::bind(&path).unwrap();
    let error = ListeningSocket::bind(&path).unwrap_err();
    assert!(matches!(error, ListenError::InUse), "{error}");
    assert_no_client(&socket);
    UnixStream::connect(&path).unwrap();
    socket.accept().unwrap();
}

#[test]
fn sockets_of_other_kinds_are_in_use_too() {
    let folder = TempDir::new().unwrap();
    let path = folder.as_path().join("datagrams");
    let receiver = UnixDatagram::bind(&path).unwrap();
    assert!(!is_abandoned(&path).unwrap());
    let other = folder.as_path().join("other");
    let _other = UnixDatagram::bind(&other).unwrap();
    receiver.connect(&other).unwrap();
    assert!(!is_abandoned(&path).unwrap());
    drop(receiver);
    assert!(is_abandoned(&path).unwrap());

    // A socket that does not listen yet.
    let path = folder.as_path().join("early");
    let early = socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::empty(),
        None,
    )
    .unwrap();
    nix::sys::socket::bind(early.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
    assert!(!is_abandoned(&path).unwrap());
}

#[test]
fn a_socket_whose_process_is_ending_is_waited_for() {
    let folder = TempDir::new().unwrap();
    let path = folder.as_path().join("socket");
    let ending = UnixListener::bind(&path).unwrap();
    thread::scope(|scope| {
        scope.spawn(move || {
            thread::sleep(Duration::from_millis(30));
            drop(ending);
        });
        ListeningSocket::bind(&path).unwrap();
    });
}

#[test]
fn what_has_taken_its_place_stays() {
    let folder = TempDir::new().unwrap();
    let path = folder.as_path().join("socket");
    let first = ListeningSocket::bind(&path).unwrap();
    fs::remove_file(&path).unwrap();
    let second = ListeningSocket::bind(&path).unwrap();
    drop(first);
    UnixStream::connect(&path).unwrap();
    drop(second);
    assert!(!path.exists());

    let socket = ListeningSocket::bind(&path).unwrap();
    fs::remove_file(&path).unwrap();
    fs::write(&path, "data").unwrap();
    drop(socket);
    assert_eq!(fs::read(&path).unwrap(), b"data");
}

#[test]
fn of_many_that_start_at_once_one_gets_an_abandoned_socket() {
    const STARTERS: usize = 16;
    let folder = TempDir::new().unwrap();
    for round in 0..20 {
        let path = folder.as_path().join(format!("socket{round}"));
        abandon(&path);
        let start = Barrier::new(STARTERS);
        let results: Vec<_> = thread::scope(|scope| {
            let starters: Vec<_> = (0..STARTERS)
                .map(|_| {
                    scope.spawn(|| {
                        start.wait();
                        take_path(&path, Clients::OfUmask)
                    })
                })
                .collect();
            starters
                .into_iter()
                .map(|starter| starter.join().unwrap())
                .collect()
        });
        let (winners, others): (Vec<_>, Vec<_>) = results.into_iter().partition(Result::is_ok);
        assert_eq!(winners.len(), 1);
        for other in others {
            let error = other.unwrap_err();
            assert!(matches!(error, ListenError::InUse), "{error}");
        }
        let winner = winners.into_iter().next().unwrap().unwrap();
        UnixStream::connect(&path).unwrap();
        winner.accept().unwrap();
        assert_no_client(&winner);
    }
    assert_eq!(names(&folder), [""; 0]);
}

#[test]
fn those_that_end_take_nothing_from_those_that_start() {
    const STARTERS: usize = 4;
    let folder = TempDir::new().unwrap();
    let path = folder.as_path().join("socket");
    let deadline = Instant::now() + Duration::from_secs(60);
    thread::scope(|scope| {
        for _ in 0..STARTERS {
            scope.spawn(|| {
                let mut count = 0;
                while count < 50 && Instant::now() < deadline {
                    match take_path(&path, Clients::OfUmask) {
                        Ok(socket) => {
                            // The owner of the path can be reached there until it removes the file.
                            UnixStream::connect(&path).unwrap();
                            socket.accept().unwrap();
                            count += 1;
                        }
                        Err(error) => assert!(matches!(error, ListenError::InUse), "{error}"),
                    }
                }
                assert_eq!(count, 50);
            });
        }
    });
    assert_eq!(names(&folder), [""; 0]);
}

#[test]
fn a_file_that_appears_can_be_connected_to() {
    let folder = TempDir::new().unwrap();
    let path = folder.as_path().join("socket");
    for _ in 0..200 {
        thread::scope(|scope| {
            let client = scope.spawn(|| {
                while !path.exists() {
                    std::hint::spin_loop();
                }
                UnixStream::connect(&path)
            });
            let socket = ListeningSocket::bind(&path).unwrap();
            client.join().unwrap().unwrap();
            drop(socket);
        });
    }
}

#[test]
fn what_a_killed_starter_has_left_is_no_hindrance() {
    let folder = TempDir::new().unwrap();
    let path = folder.as_path().join("socket");
    abandon(&path);
    abandon(&with_suffix(&path, STAGING_SUFFIX));
    fs::write(folder.as_path().join("socket.bantam-lock"), "").unwrap();
    drop(ListeningSocket::bind(&path).unwrap());
    assert_eq!(names(&folder), [""; 0]);
    // A file that is not such a remnant stays.
    fs::write(with_suffix(&path, STAGING_SUFFIX), "data").unwrap();
    drop(ListeningSocket::bind(&path).unwrap());
    assert_eq!(names(&folder), ["socket.new"]);
}

#[test]
fn a_path_may_be_as_long_as_an_address() {
    let folder = TempDir::new().unwrap();
    let prefix = folder.as_path().as_os_str().len() + 1;
    for size in MAX_PATH_SIZE - 6..=MAX_PATH_SIZE {
        let path = folder.as_path().join("s".repeat(size - prefix));
        abandon(&path);
        let socket = ListeningSocket::bind(&path).unwrap();
        UnixStream::connect(&path).unwrap();
        socket.accept().unwrap();
    }
    let path = folder
        .as_path()
        .join("s".repeat(MAX_PATH_SIZE + 1 - prefix));
    let error = ListeningSocket::bind(&path).unwrap_err();
    assert!(error.to_string().contains("108 bytes"), "{error}");
    assert_eq!(names(&folder), [""; 0]);
}

#[test]
fn each_error_has_its_own_remedy() {
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.as_path().join(name);
    let text = |path: &Path| ListeningSocket::bind(path).unwrap_err().to_string();
    fs::write(at("file"), "data").unwrap();
    symlink(at("nowhere"), at("link")).unwrap();
    fs::create_dir(at("folder")).unwrap();
    for name in ["file", "link", "folder"] {
        assert!(text(&at(name)).starts_with("a file that is not a socket"));
    }
    assert_eq!(fs::read(at("file")).unwrap(), b"data");
    assert!(text(&at("nowhere/socket")).starts_with("its folder does not exist"));
    assert!(text(&at("file/socket")).starts_with("Not a directory"));
    for path in ["", "/", "..", "a\0b"] {
        let text = text(Path::new(path));
        assert_eq!(text, "a socket cannot have such a path", "{path:?}");
    }
    // The superuser is denied nothing.
    if !nix::unistd::geteuid().is_root() {
        fs::set_permissions(at("folder"), fs::Permissions::from_mode(0o500)).unwrap();
        assert!(text(&at("folder/socket")).starts_with("permission denied"));
    }
}
