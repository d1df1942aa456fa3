use std::io::{IoSlice, Read};
use std::os::unix::net::UnixListener;
use std::thread;

use bantam_vmm::SnapshotDisks;
use nix::sys::socket::{ControlMessage, sendmsg};

use super::*;

#[test]
fn each_error_of_connecting_has_its_own_remedy() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let error = || ControlClient::connect(&path).unwrap_err();
    assert!(matches!(error(), ControlError::NoSocket));
    fs::write(&path, "").unwrap();
    assert!(matches!(error(), ControlError::NotASocket));
    fs::remove_file(&path).unwrap();
    drop(UnixListener::bind(&path).unwrap());
    assert!(matches!(error(), ControlError::Abandoned));
}

/// Returns why a client does not accept a server that says `first` and closes the connection.
fn refused(first: &'static str) -> ControlError {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let serving = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(first.as_bytes()).unwrap();
    });
    let error = ControlClient::connect(&path).unwrap_err();
    serving.join().unwrap();
    error
}

#[test]
fn only_a_control_socket_is_accepted() {
    for first in ["login: \n", "{}\n", "{\"id\":1,\"answer\":\"done\"}\n"] {
        let error = refused(first);
        assert!(matches!(error, ControlError::Foreign { .. }), "{error}");
    }
    let error = refused("{\"greeting\":{\"protocol\":9,\"version\":\"9.0\"}}\n");
    assert!(
        matches!(error, ControlError::Version { found: 9 }),
        "{error}"
    );
    let error = refused("{\"error\":{\"kind\":\"busy\",\"message\":\"later\"}}\n");
    assert!(matches!(error, ControlError::Refused(_)), "{error}");
    assert!(matches!(refused(""), ControlError::Ended));
}

#[test]
fn descriptors_come_with_the_answer_that_they_belong_to() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let serving = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream
            .write_all(&Message::Greeting(Greeting::new()).to_line())
            .unwrap();
        let mut request = [0; 1024];
        let _ = stream.read(&mut request).unwrap();
        let (reader, writer) = std::io::pipe().unwrap();
        let numbers = [reader.as_raw_fd(), writer.as_raw_fd()];
        let event = "{\"event\":{\"event\":\"missed\",\"count\":1}}\n";
        stream.write_all(event.as_bytes()).unwrap();
        let answer =
            "{\"id\":1,\"answer\":{\"forked\":{\"paused-for\":{\"secs\":0,\"nanos\":1}}}}\n";
        let parts = [IoSlice::new(answer.as_bytes())];
        let rights = [ControlMessage::ScmRights(&numbers)];
        sendmsg::<()>(stream.as_raw_fd(), &parts, &rights, MsgFlags::empty(), None).unwrap();
        stream
    });
    let mut client = ControlClient::connect(&path).unwrap();
    let answer = client.execute(Command::Fork(SnapshotDisks::Overlays));
    let Ok(Answer::Forked(forked)) = answer else {
        panic!("{answer:?}");
    };
    drop(serving.join().unwrap());
    let [reader, writer] = forked.snapshot.0.as_slice() else {
        panic!("{forked:?}");
    };
    let mut writer = fs::File::from(writer.try_clone().unwrap());
    writer.write_all(b"passed").unwrap();
    let mut text = [0; 6];
    let mut reader = fs::File::from(reader.try_clone().unwrap());
    reader.read_exact(&mut text).unwrap();
    assert_eq!(text, *b"passed");
}
