//! Two hosts between which named machines move, and connections that are cut on the way.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::counting::wait_until;
use crate::{Ended, Machines, Running};

const WORDS: &str = "timer=deadline pages=16 finish=poweroff";

/// Two state folders, as of two hosts, and a folder for what both share.
pub struct Hosts {
    /// The machines of the source.
    pub source: Machines,
    /// The machines of the receiver.
    pub receiver: Machines,
    shared: TempDir,
}

impl Default for Hosts {
    fn default() -> Hosts {
        Hosts::new()
    }
}

impl Hosts {
    /// Makes the folders.
    pub fn new() -> Hosts {
        Hosts {
            source: Machines::new(),
            receiver: Machines::new(),
            shared: tempfile::tempdir().expect("there is room"),
        }
    }

    /// Starts a machine with a disk that both ends see.
    pub fn start(&self, name: &str) {
        self.start_with(name, &[]);
    }

    /// Does the same with more options.
    pub fn start_with(&self, name: &str, options: &[&str]) {
        let image = self.path("disk");
        let made = File::create(&image).and_then(|file| file.set_len(1 << 20));
        made.expect("there is room");
        let disk = image.display().to_string();
        let more = ["--disk", &disk, "--restart", "on-failure"];
        self.source
            .create(name, "count", WORDS, &[&more, options].concat());
        self.source.done(&["start", name]);
    }

    /// Returns the path of a shared file.
    pub fn path(&self, name: &str) -> PathBuf {
        self.shared.path().join(name)
    }

    /// Returns the address of a shared socket.
    pub fn address(&self, name: &str) -> String {
        format!("unix:{}", self.path(name).display())
    }

    /// Has one end wait for a machine at `socket`, which is new.
    pub fn receive(&self, at: &Machines, socket: &str, more: &[&str]) -> Running {
        let address = self.address(socket);
        let arguments = [&["migrate", "--receive", &address], more].concat();
        let receiver = at.bantam(&arguments).start();
        wait_until("it listens", || self.path(socket).exists());
        receiver
    }

    /// Moves a machine to who waits at `socket`.
    pub fn migrate(&self, from: &Machines, name: &str, socket: &str) -> Ended {
        from.run(&["migrate", name, &self.address(socket)])
    }

    /// Checks that machine `web` runs at exactly one end after `moved` and `arrived`, the commands of both ends, have ended.
    /// If the source does not know whether it has moved, it is taken back.
    #[track_caller]
    pub fn one_runs(&self, moved: &Ended, arrived: &Ended) {
        let (source, there) = (&self.source, &self.receiver);
        let here = source.state("web");
        let here = here.split(' ').next().expect("it is not empty");
        if arrived.text().contains("has arrived") {
            assert_eq!(there.state("web"), "running (migrated)");
            assert_eq!(there.folders(), ["web"]);
            // Either it knows that it has moved, or it stands still.
            match moved.status.success() {
                true => source.wait_for_state("web", "shut off (migrated)"),
                false => assert_eq!(here, "paused", "{moved}"),
            }
            return;
        }
        assert_eq!(there.folders(), <[&str; 0]>::default(), "{arrived}");
        if here == "paused" {
            source.done(&["migrate", "--take-back", "web"]);
        }
        let begin = Instant::now();
        while source.state("web").split(' ').next() != Some("running") {
            assert!(begin.elapsed() < Duration::from_secs(5), "{moved}");
        }
    }
}

impl Machines {
    /// Returns the folders of machines, with those that are not complete, in alphabetical order.
    pub fn folders(&self) -> Vec<String> {
        let entries = fs::read_dir(self.folder().join("machines"));
        let names = entries.into_iter().flatten().flatten();
        let mut names: Vec<_> = names
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .filter(|name| name != ".lock")
            .collect();
        names.sort();
        names
    }
}

/// Relays what comes at a new socket at `from` to the one at `to`, as [`relay_between`].
pub fn relay(from: &Path, to: &Path, limits: [usize; 2], pause: Duration) -> Arc<[AtomicUsize; 2]> {
    let [passed] = relay_in_turn(from, to, [limits], pause);
    passed
}

/// Does the same for each of several connections, with the limits of each.
pub fn relay_each<const N: usize>(
    from: &Path,
    to: &Path,
    limits: [[usize; 2]; N],
) -> [Arc<[AtomicUsize; 2]>; N] {
    relay_in_turn(from, to, limits, Duration::ZERO)
}

fn relay_in_turn<const N: usize>(
    from: &Path,
    to: &Path,
    limits: [[usize; 2]; N],
    pause: Duration,
) -> [Arc<[AtomicUsize; 2]>; N] {
    let listener = Arc::new(UnixListener::bind(from).expect("it is a new path"));
    // They come in the order of their limits.
    let turn = Arc::new(AtomicUsize::new(0));
    let mut index = 0;
    limits.map(|limits| {
        let (listener, turn, to) = (listener.clone(), turn.clone(), to.to_path_buf());
        let number = index;
        index += 1;
        let connect = move || {
            while turn.load(Ordering::SeqCst) != number {
                thread::sleep(Duration::from_millis(1));
            }
            let (near, _) = listener.accept().expect("the source connects");
            let far = UnixStream::connect(to).expect("the receiver listens");
            turn.store(number + 1, Ordering::SeqCst);
            [near, far]
        };
        relay_between(connect, limits, pause)
    })
}

/// Relays what comes at a new port to the one at `to`, as [`relay_between`]. Returns the address of the new port too.
pub fn relay_tcp(to: &str, limits: [usize; 2]) -> (String, Arc<[AtomicUsize; 2]>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("there are ports");
    let from = listener.local_addr().expect("it is bound");
    let to = to.to_owned();
    let connect = move || {
        let (near, _) = listener.accept().expect("the source connects");
        let far = TcpStream::connect(to).expect("the receiver listens");
        // Any stream socket can be read, written and shut down like one of these.
        [near, far].map(|it| UnixStream::from(OwnedFd::from(it)))
    };
    (
        from.to_string(),
        relay_between(connect, limits, Duration::ZERO),
    )
}

/// Relays what comes from each of two sockets to the other, with a pause before each piece, and cuts both connections after a
/// number of bytes in each direction. Returns how many have passed.
fn relay_between(
    connect: impl FnOnce() -> [UnixStream; 2] + Send + 'static,
    limits: [usize; 2],
    pause: Duration,
) -> Arc<[AtomicUsize; 2]> {
    let passed = Arc::<[AtomicUsize; 2]>::default();
    let counts = passed.clone();
    thread::spawn(move || {
        let [near, far] = connect();
        let clone = |it: &UnixStream| it.try_clone().expect("there are descriptors");
        for (index, (mut from, mut to)) in [(clone(&near), clone(&far)), (far, near)]
            .into_iter()
            .enumerate()
        {
            let (counts, limit) = (counts.clone(), limits[index]);
            thread::spawn(move || {
                let mut bytes = [0; 1 << 14];
                let mut passed = 0;
                while passed < limit {
                    let room = bytes.len().min(limit - passed);
                    thread::sleep(pause);
                    match from.read(&mut bytes[..room]) {
                        Ok(count) if count > 0 && to.write_all(&bytes[..count]).is_ok() => {
                            passed += count;
                            counts[index].store(passed, Ordering::SeqCst);
                        }
                        _ => break,
                    }
                }
                let _ = from.shutdown(Shutdown::Both);
                let _ = to.shutdown(Shutdown::Both);
            });
        }
    });
    passed
}
