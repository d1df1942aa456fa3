use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender};
use std::time::Instant;

use bantam_devices::opener::Opener;
use bantam_devices::tap::{QueueCount, Tap, TapError};
use bantam_vmm::config::MachineConfig;
use bantam_vmm::{
    Answer, Command, Controller, ControllerOptions, Event, FileAccess, FileOpener, HostOpener,
    ListenError, State,
};
use tempfile::TempDir;

use super::*;
use crate::protocol::{ErrorKind, MAX_LINE_SIZE, Message, Refusal, Reply};
use crate::{ControlClient, ControlError};

/// How long an answer may take on a busy host, if nothing is waited for.
const SOON: Duration = Duration::from_secs(5);

/// A server, and a folder for its socket.
struct Served {
    server: ControlServer,
    machine: PresentMachine,
    folder: TempDir,
}

impl Served {
    fn new() -> Served {
        Served::of(Controller::new().unwrap())
    }

    fn of(controller: Controller) -> Served {
        let folder = tempfile::tempdir().unwrap();
        let machine = PresentMachine::new(controller).unwrap();
        let socket = ListeningSocket::bind_private(&folder.path().join("socket")).unwrap();
        let server = ControlServer::start(socket, machine.clone()).unwrap();
        Served {
            server,
            machine,
            folder,
        }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    fn client(&self) -> ControlClient {
        ControlClient::connect(&self.path()).unwrap()
    }

    /// Connects, and reads the greeting.
    fn raw(&self) -> BufReader<UnixStream> {
        let mut stream = raw(&self.path());
        assert!(matches!(message(&mut stream), Message::Greeting(_)));
        stream
    }

    /// Returns a configuration that can be validated.
    fn config(&self) -> Box<MachineConfig> {
        let kernel = self.folder.path().join("kernel");
        fs::write(&kernel, "").unwrap();
        Box::new(MachineConfig::new(kernel))
    }
}

fn raw(path: &Path) -> BufReader<UnixStream> {
    let stream = UnixStream::connect(path).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    BufReader::new(stream)
}

/// Sends a line without its line feed.
fn send(stream: &mut BufReader<UnixStream>, line: &str) {
    writeln!(stream.get_mut(), "{line}").unwrap();
}

fn message(stream: &mut BufReader<UnixStream>) -> Message {
    let mut line = String::new();
    stream.read_line(&mut line).unwrap();
    serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"))
}

fn state(stream: &mut BufReader<UnixStream>, id: u64, expected: State) {
    let reply = Reply {
        id: Some(id),
        result: Ok(Answer::State(expected)),
    };
    assert_eq!(message(stream), Message::Reply(reply));
}

fn refusal(stream: &mut BufReader<UnixStream>) -> Refusal {
    match message(stream) {
        Message::Reply(Reply {
            result: Err(refusal),
            ..
        }) => refusal,
        other => panic!("{other:?}"),
    }
}

fn has_ended(stream: &mut BufReader<UnixStream>) -> bool {
    let mut rest = Vec::new();
    // A reset is an end too: the server has not read all that it was sent.
    stream.read_to_end(&mut rest).is_err() || rest.is_empty()
}

/// Returns what a machine answers that is not what it was asked for.
#[track_caller]
fn refused(result: Result<Answer, ControlError>) -> Refusal {
    match result {
        Err(ControlError::Refused(refusal)) => refusal,
        other => panic!("{other:?}"),
    }
}

/// Opens files only when it is told to, and then none.
struct HungOpener {
    begun: Mutex<Sender<()>>,
    release: Mutex<Receiver<()>>,
}

impl FileOpener for HungOpener {
    fn file(&self, _: &Path, _: FileAccess) -> io::Result<File> {
        // Both fail if the test no longer waits.
        let _ = self.begun.lock().unwrap().send(());
        let _ = self.release.lock().unwrap().recv();
        Err(io::ErrorKind::NotFound.into())
    }
}

impl Opener for HungOpener {
    fn listen(&self, path: &Path) -> Result<ListeningSocket, ListenError> {
        HostOpener.listen(path)
    }

    fn tap(&self, name: &str, mtu: Option<u16>, queues: QueueCount) -> Result<Tap, TapError> {
        HostOpener.tap(name, mtu, queues)
    }
}

/// Returns a machine whose start hangs, what tells that it does, and what lets it fail.
fn hung_machine() -> (Controller, Receiver<()>, Sender<()>) {
    let (begun, has_begun) = mpsc::channel();
    let (release, hung) = mpsc::channel();
    let opener = HungOpener {
        begun: Mutex::new(begun),
        release: Mutex::new(hung),
    };
    let controller = Controller::with(ControllerOptions {
        opener: Arc::new(opener),
        ..ControllerOptions::default()
    });
    (controller.unwrap(), has_begun, release)
}

#[test]
fn commands_are_executed_and_refused_by_the_machine() {
    let served = Served::new();
    let mut client = served.client();
    assert_eq!(client.greeting().version, env!("CARGO_PKG_VERSION"));
    let query = |client: &mut ControlClient| client.execute(Command::Query).unwrap();
    assert_eq!(query(&mut client), Answer::State(State::NotConfigured));
    let refusal = refused(client.execute(Command::Pause));
    assert_eq!(refusal.kind, ErrorKind::WrongState);
    assert!(refusal.message.contains("configure it first"));
    let config = served.config();
    let configured = client.execute(Command::Configure(config.clone()));
    assert_eq!(configured.unwrap(), Answer::Done);
    assert_eq!(
        client.execute(Command::Configuration).unwrap(),
        Answer::Configuration(config)
    );
    assert!(!served.machine.is_end_asked());
    assert_eq!(client.execute(Command::Stop).unwrap(), Answer::Done);
    assert_eq!(query(&mut client), Answer::State(State::Stopped));
    assert!(served.machine.is_end_asked());
}

#[test]
fn a_command_that_hangs_holds_up_no_question_and_no_end() {
    let (controller, has_begun, release) = hung_machine();
    let served = Served::of(controller);
    let mut stream = served.raw();
    let config = serde_json::to_string(&served.config()).unwrap();
    send(
        &mut stream,
        &format!(r#"{{"id":1,"command":{{"configure":{config}}}}}"#),
    );
    assert!(matches!(message(&mut stream), Message::Reply(_)));
    send(&mut stream, r#"{"id":2,"command":"start"}"#);
    has_begun.recv().unwrap();
    let begin = Instant::now();
    // From the same client and from another.
    send(&mut stream, r#"{"id":3,"command":"query"}"#);
    state(&mut stream, 3, State::Starting);
    let mut other = served.client();
    assert_eq!(
        other.execute(Command::Query).unwrap(),
        Answer::State(State::Starting)
    );
    // One that changes something waits for its turn.
    other.set_answer_time(Duration::from_millis(50));
    let late = other.execute(Command::Resume);
    assert!(
        matches!(late, Err(ControlError::TimedOut { .. })),
        "{late:?}"
    );
    // The reply to that one is passed over when it comes.
    other.set_answer_time(Duration::from_secs(60));
    assert_eq!(other.execute(Command::Stop).unwrap(), Answer::Done);
    assert!(begin.elapsed() < SOON);
    release.send(()).unwrap();
    match message(&mut stream) {
        Message::Reply(Reply {
            id: Some(2),
            result: Err(_),
        }) => {}
        other => panic!("{other:?}"),
    }
    assert_eq!(
        refused(other.execute(Command::Pause)).kind,
        ErrorKind::WrongState
    );
}

#[test]
fn a_command_is_executed_even_if_its_client_leaves_and_too_many_are_refused() {
    let (controller, has_begun, release) = hung_machine();
    let served = Served::of(controller);
    let mut client = served.client();
    client.execute(Command::Configure(served.config())).unwrap();
    let mut first = served.raw();
    send(&mut first, r#"{"id":1,"command":"start"}"#);
    has_begun.recv().unwrap();
    let mut stream = served.raw();
    let mut other = served.config();
    other.cpus = "2".parse().unwrap();
    let config = serde_json::to_string(&other).unwrap();
    send(
        &mut stream,
        &format!(r#"{{"id":1,"command":{{"configure":{config}}}}}"#),
    );
    for id in 2..MAX_COMMANDS + 1 {
        send(&mut stream, &format!(r#"{{"id":{id},"command":"pause"}}"#));
    }
    let Message::Reply(reply) = message(&mut stream) else {
        panic!("it is not a reply");
    };
    assert_eq!(reply.id, Some(MAX_COMMANDS as u64));
    assert_eq!(reply.result.unwrap_err().kind, ErrorKind::Busy);
    drop((first, stream));
    release.send(()).unwrap();
    let begin = Instant::now();
    while refused(client.execute(Command::Pause)).kind == ErrorKind::Busy {
        assert!(begin.elapsed() < SOON, "the commands are not executed");
    }
    assert_eq!(
        client.execute(Command::Configuration).unwrap(),
        Answer::Configuration(other)
    );
    // Nothing is left of those whose clients have gone.
    for _ in 0..2 * MAX_COMMANDS {
        let kind = refused(client.execute(Command::Pause)).kind;
        assert_eq!(kind, ErrorKind::WrongState);
    }
}

#[test]
fn garbage_is_refused_line_by_line_and_a_long_line_ends_the_connection() {
    let served = Served::new();
    let mut stream = served.raw();
    for line in [
        "GET / HTTP/1.1",
        "\u{0}\u{1}",
        "{}",
        r#"{"id":1,"command":1}"#,
    ] {
        send(&mut stream, line);
        assert_eq!(refusal(&mut stream).kind, ErrorKind::InvalidRequest);
    }
    // Blank lines are passed over, and more requests than one may come at once.
    send(
        &mut stream,
        "\n \r\n{\"id\":1,\"command\":\"query\"}\r\n{\"id\":2,\"command\":\"query\"}",
    );
    state(&mut stream, 1, State::NotConfigured);
    state(&mut stream, 2, State::NotConfigured);
    // The server may have closed the connection before it has read everything.
    let _ = stream.get_mut().write_all(&vec![b' '; 2 * MAX_LINE_SIZE]);
    let mut line = String::new();
    if stream.read_line(&mut line).is_ok() && !line.is_empty() {
        assert!(line.contains("longer than"), "{line}");
    }
    assert!(has_ended(&mut stream));
    served.client().execute(Command::Query).unwrap();
}

#[test]
fn requests_that_were_sent_before_the_end_of_the_input_are_answered() {
    const COUNT: u64 = 20_000;
    let served = Served::new();
    let mut stream = served.raw();
    let mut writer = stream.get_ref().try_clone().unwrap();
    let writing = thread::spawn(move || {
        let lines: String = (0..COUNT)
            .map(|id| format!("{{\"id\":{id},\"command\":\"query\"}}\n"))
            .collect();
        writer.write_all(lines.as_bytes()).unwrap();
        // An incomplete line is not a request.
        writer.write_all(br#"{"id":1,"command":"stop"}"#).unwrap();
        writer.shutdown(std::net::Shutdown::Write).unwrap();
    });
    for id in 0..COUNT {
        state(&mut stream, id, State::NotConfigured);
    }
    assert!(has_ended(&mut stream));
    writing.join().unwrap();
    assert!(!served.machine.is_end_asked());
}

#[test]
fn a_subscriber_gets_the_events_of_one_machine_after_another() {
    let mut owned = Controller::new().unwrap();
    let served = Served::of(owned.clone());
    let mut client = served.client();
    client.subscribe().unwrap();
    let config = served.config();
    for _ in 0..3 {
        client.execute(Command::Configure(config.clone())).unwrap();
        owned.stop();
        owned = Controller::new().unwrap();
        served.machine.replace(owned.clone());
        // A machine that is configured again does not change its state.
        owned.configure((*config).clone()).unwrap();
    }
    let [configured, stopped] =
        [State::Configured, State::Stopped].map(|state| Some(Event::State { state }));
    for _ in 0..3 {
        assert_eq!(client.next_event(Some(SOON)).unwrap(), configured);
        assert_eq!(client.next_event(Some(SOON)).unwrap(), stopped);
    }
    assert_eq!(client.next_event(Some(SOON)).unwrap(), configured);
    assert_eq!(client.next_event(Some(Duration::ZERO)).unwrap(), None);
    // It can unsubscribe.
    let mut stream = served.raw();
    send(&mut stream, r#"{"id":1,"subscribe":true}"#);
    send(&mut stream, r#"{"id":2,"subscribe":true}"#);
    send(&mut stream, r#"{"id":3,"subscribe":false}"#);
    send(&mut stream, r#"{"id":4,"command":"stop"}"#);
    send(&mut stream, r#"{"id":5,"command":"query"}"#);
    for _ in 1..5 {
        assert!(matches!(message(&mut stream), Message::Reply(_)));
    }
    state(&mut stream, 5, State::Stopped);
}

#[test]
fn the_last_events_and_replies_come_before_the_end_and_the_socket_goes() {
    let served = Served::new();
    let mut client = served.client();
    client.subscribe().unwrap();
    client.execute(Command::Stop).unwrap();
    let path = served.path();
    let begin = Instant::now();
    served.server.end(SOON);
    assert!(begin.elapsed() < SOON);
    assert!(!path.exists());
    let ended = loop {
        match client.next_event(Some(SOON)) {
            Ok(Some(_)) => {}
            other => break other,
        }
    };
    assert!(matches!(ended, Err(ControlError::Ended)), "{ended:?}");
    let error = ControlClient::connect(&path).unwrap_err();
    assert!(matches!(error, ControlError::NoSocket), "{error}");
}

#[test]
fn clients_that_do_nothing_give_up_their_places_and_those_that_wait_keep_them() {
    let served = Served::new();
    let mut idle: Vec<_> = (0..MAX_CLIENTS).map(|_| served.client()).collect();
    for client in &mut idle {
        client.execute(Command::Query).unwrap();
    }
    served.client().execute(Command::Query).unwrap();
    drop(idle);
    let mut followers: Vec<_> = (0..MAX_CLIENTS).map(|_| served.client()).collect();
    for follower in &mut followers {
        follower.subscribe().unwrap();
    }
    match ControlClient::connect(&served.path()) {
        Err(ControlError::Refused(refusal)) => assert_eq!(refusal.kind, ErrorKind::Busy),
        other => panic!("{other:?}"),
    }
    for follower in &mut followers {
        follower.execute(Command::Query).unwrap();
    }
    followers.pop();
    let begin = Instant::now();
    while ControlClient::connect(&served.path()).is_err() {
        assert!(begin.elapsed() < SOON, "its place is not free");
    }
}

#[test]
fn a_client_that_does_not_receive_holds_up_nobody_and_is_dropped() {
    let served = Served::new();
    // The server stops receiving when it has too much to send.
    let stalled = || {
        let mut stream = served.raw();
        let time = Some(Duration::from_millis(200));
        stream.get_ref().set_write_timeout(time).unwrap();
        let lines = "{\"id\":1,\"command\":\"query\"}\n".repeat(4096);
        while stream.get_mut().write_all(lines.as_bytes()).is_ok() {}
        stream
    };
    let mut dropped = stalled();
    let begin = Instant::now();
    served.client().execute(Command::Query).unwrap();
    assert!(begin.elapsed() < SOON);
    // The server gives it up, so what it has been sent has an end.
    thread::sleep(Duration::from_secs(11));
    let read = dropped.read_to_end(&mut Vec::new());
    let is_waiting = |error: &io::Error| error.kind() == io::ErrorKind::WouldBlock;
    assert!(!read.as_ref().is_err_and(is_waiting), "{read:?}");
    let _stalled = stalled();
    // Nor does it hold up the end.
    let begin = Instant::now();
    let path = served.path();
    served.server.end(SOON);
    assert!(begin.elapsed() < SOON);
    assert!(!path.exists());
}
