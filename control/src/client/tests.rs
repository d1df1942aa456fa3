use std::os::unix::net::UnixListener;
use std::thread;

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
