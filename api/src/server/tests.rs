use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::Instant;

use bantam_vmm::Controller;

use super::*;
use crate::bodies::logger::Logger;
use crate::fault::Fault;
use crate::instance::{InstanceOptions, ProgramLog};
use crate::resources::new_instance;
use crate::startup_times::StartupTimes;

/// How long an answer may take on a busy host, if nothing is waited for.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);

/// A log whose file opens only when it is told to.
struct HungLog {
    begun: Sender<()>,
    release: Receiver<()>,
}

impl ProgramLog for HungLog {
    fn set(&mut self, logger: &Logger) -> Result<(), Fault> {
        if logger.log_path.is_some() {
            // Both fail if the test no longer waits.
            let _ = self.begun.send(());
            let _ = self.release.recv();
        }
        Ok(())
    }
}

/// Sends a request on a connection of its own, and returns the status and how long that took.
fn ask(socket: &Path, method: &str, path: &str, body: &str) -> (u16, Duration) {
    let asked = Instant::now();
    let mut stream = UnixStream::connect(socket).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    let size = body.len();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nConnection: close\r\nContent-Length: {size}\r\n\r\n{body}"
    );
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
    (status, asked.elapsed())
}

#[test]
fn a_request_that_hangs_holds_up_none_that_reads_and_no_other_for_ever() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("socket");
    let (begun, has_begun) = mpsc::channel();
    let (release, hung) = mpsc::channel();
    let options = InstanceOptions {
        id: "test".to_string(),
        log: Box::new(HungLog {
            begun,
            release: hung,
        }),
        log_path: None,
        startup_times: StartupTimes::default(),
        on_start: Box::new(|| ()),
        boot_timer: false,
        metadata_size: 1000,
    };
    let instance = new_instance(Controller::new().unwrap(), options);
    let listener = ListeningSocket::bind(&socket).unwrap();
    let server = Server::new(instance, Some(listener), ServerLimits::default());
    let ending = server.ending();
    let serving = thread::spawn(move || server.run());

    let with_file = r#"{"log_path": "a"}"#;
    let stuck = thread::spawn({
        let socket = socket.clone();
        move || ask(&socket, "PUT", "/logger", with_file)
    });
    has_begun.recv().unwrap();
    for (path, expected) in [
        ("/", 200),
        ("/version", 200),
        ("/vm/config", 200),
        ("/machine-config", 200),
        ("/mmds", 200),
        ("/balloon", 400),
        ("/balloon/statistics", 400),
        ("/balloon/hinting/status", 400),
    ] {
        let (status, time) = ask(&socket, "GET", path, "");
        assert_eq!(status, expected, "{path}");
        assert!(time < ANSWER_LIMIT, "{path} took {time:?}");
    }
    assert!(!stuck.is_finished());

    // The others wait for it no longer than it may take.
    let (status, _) = ask(&socket, "PUT", "/entropy", "{}");
    assert_eq!(status, 204);
    assert_eq!(stuck.join().unwrap().0, 400);
    let (status, time) = ask(&socket, "PUT", "/logger", with_file);
    assert_eq!(status, 400);
    assert!(time < ANSWER_LIMIT, "{time:?}");

    release.send(()).unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while ask(&socket, "PUT", "/logger", r#"{"level": "Info"}"#).0 != 204 {
        assert!(Instant::now() < deadline, "the log cannot be set any more");
    }
    ending.notify_one();
    serving.join().unwrap().unwrap();
}
