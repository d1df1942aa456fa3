//! What a machine that goes on from a snapshot uses of its host in the place of what it used before.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::Path;

use bantam_tests::counting::wait_until;
use bantam_tests::{Bantam, HostTap, STATUS_POWER_CUT, require_kvm, require_taps};

/// Takes a snapshot of a machine into `folder/snap`, with these arguments and the payload `hello`.
fn take(folder: &Path, arguments: &[String]) {
    let socket = folder.join("first.sock");
    let mut machine = Bantam::payload("hello")
        .append("finish=hang")
        .option("--control", &socket);
    for argument in arguments {
        machine = machine.argument(argument);
    }
    let running = machine.start();
    running.wait_for_output("PASS");
    Bantam::new(["snapshot"])
        .argument(&socket)
        .argument(folder.join("snap"))
        .argument("--stop")
        .finish()
        .succeeded();
    running.wait().has_status(STATUS_POWER_CUT);
}

fn restore(folder: &Path) -> Bantam {
    Bantam::new(["restore"])
        .argument(folder.join("snap"))
        .option("--control", folder.join("control.sock"))
}

fn control(folder: &Path, command: &[&str]) -> String {
    let mut client = Bantam::new(["control"]).argument(folder.join("control.sock"));
    for word in command {
        client = client.argument(word);
    }
    client.finish().succeeded().text()
}

#[test]
fn channels_lead_elsewhere() {
    require_kvm!();
    let folder = tempfile::tempdir().expect("there is room");
    let folder = folder.path();
    let before = folder.join("before.sock");
    let channel = format!(
        "--channel=name=org.example.agent,socket={}",
        before.display()
    );
    take(folder, &[channel]);
    assert!(!before.exists());

    let after = folder.join("after.sock");
    let running = restore(folder)
        .option(
            "--channel",
            format!("org.example.agent=socket={}", after.display()),
        )
        .start();
    wait_until("it runs", || UnixStream::connect(&after).is_ok());
    assert!(!before.exists());
    control(folder, &["stop"]);
    running.wait().has_status(STATUS_POWER_CUT);

    for (channel, reason) in [
        ("other=pty", "has no channel 'other'"),
        ("org.example.agent=none", "cannot lead nowhere"),
        ("org.example.agent", "where it leads"),
        ("org.example.agent=tcp:80", "tcp:80"),
    ] {
        let ended = restore(folder).option("--channel", channel).finish();
        let line = ended.failed_with_one_line();
        assert!(line.contains(reason), "{line}");
    }
}

#[test]
fn forks_have_channels_of_their_own() {
    require_kvm!();
    let folder = tempfile::tempdir().expect("there is room");
    let folder = folder.path();
    let socket = folder.join("control.sock");
    let running = Bantam::payload("hello")
        .append("finish=hang")
        .option("--control", &socket)
        .option(
            "--channel",
            format!("name=agent,socket={}", folder.join("agent.sock").display()),
        )
        .start();
    running.wait_for_output("PASS");
    Bantam::new(["fork"])
        .argument(&socket)
        .argument(folder.join("forks"))
        .option("--count", "2")
        .finish()
        .succeeded();
    for number in ["1", "2"] {
        let child = folder.join("forks").join(number);
        UnixStream::connect(child.join("channel-agent.sock")).expect("the channel has a socket");
        control(&child, &["stop"]);
    }
    control(folder, &["stop"]);
    running.wait().has_status(STATUS_POWER_CUT);
}

#[test]
fn the_guest_gets_other_metadata() {
    require_taps!();
    let folder = tempfile::tempdir().expect("there is room");
    let folder = folder.path();
    let tap = HostTap::new();
    let file = |name: &str, content: &str| {
        let path = folder.join(name);
        fs::write(&path, content).expect("there is room");
        path
    };
    let machine = format!(
        "[[net]]\ntap = \"{}\"\n[metadata]\nnets = [\"net0\"]\ncontents = '{{\"name\":\"first\"}}'\n",
        tap.name
    );
    let machine = file("machine.toml", &machine);
    take(folder, &[format!("--config={}", machine.display())]);

    for (contents, expected) in [(None, "first"), (Some(r#"{"name":"second"}"#), "second")] {
        let mut restored = restore(folder);
        if let Some(contents) = contents {
            restored = restored.option("--metadata", file("metadata.json", contents));
        }
        let running = restored.start();
        wait_until("it is there", || folder.join("control.sock").exists());
        wait_until("it runs", || {
            control(folder, &["query"]).contains("running")
        });
        let found = control(folder, &["json", "\"metadata\""]);
        assert!(found.contains(expected), "{found}");
        control(folder, &["stop"]);
        running.wait().has_status(STATUS_POWER_CUT);
    }
    for (path, reason) in [
        (folder.join("none.json"), "No such file"),
        (file("bad.json", "{"), "bad.json"),
    ] {
        let ended = restore(folder).option("--metadata", path).finish();
        let line = ended.failed_with_one_line();
        assert!(line.contains(reason), "{line}");
    }
}
