//! Copies of named machines, templates, and their devices: `bantam clone`, `template`, `attach-disk`, `domifaddr` and others.

#![allow(clippy::unwrap_used, reason = "a test fails where the host does")]

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use bantam_tests::{Machines, check_image, files_below, pattern, qemu_img, require_kvm};
use nix::sys::signal::Signal;
use serde_json::Value;

const MIB: usize = 1 << 20;

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Writes an image with content that is not the same anywhere.
fn image(machines: &Machines, name: &str, size: usize) -> PathBuf {
    let path = machines.folder().join(name);
    fs::write(&path, pattern(name.len() as u64, 0, size)).unwrap();
    path
}

/// Returns where the image of a disk is.
fn source(machines: &Machines, name: &str, disk: usize) -> PathBuf {
    let source = machines.json(&["domblklist", name])[disk]["source"].clone();
    source.as_str().unwrap().into()
}

/// Checks that two images, with their backing files, are the same disk.
fn identical(images: [&Path; 2], formats: [&str; 2]) {
    qemu_img(&["compare", "-f", formats[0], "-F", formats[1]], &images);
}

#[test]
fn a_clone_has_disks_and_an_identity_of_its_own() {
    require_kvm!();
    let machines = Machines::new();
    let raw = image(&machines, "raw.img", 4 * MIB);
    let base = image(&machines, "base.img", 3 * MIB);
    let shared = image(&machines, "shared.img", MIB);
    let overlay = machines.folder().join("overlay.qcow2");
    qemu_img(
        &["create", "-f", "qcow2", "-F", "raw", "-b", text(&base)],
        &[&overlay],
    );
    let vsock = machines.folder().join("web.vsock");
    machines.create(
        "web",
        "hello",
        "finish=hang",
        &[
            "--disk",
            text(&raw),
            "--disk",
            text(&overlay),
            "--disk",
            &format!("{},ro", text(&shared)),
            "--net",
            "user,mac=52:54:00:00:00:01",
            "--vsock",
            &format!("cid=3,socket={}", text(&vsock)),
        ],
    );
    let cloned = machines.run(&["clone", "web", "copy"]);
    cloned.has_status(0);
    // A socket is for one machine.
    let moved = machines.of_machine("copy").join("web.vsock");
    assert!(cloned.stderr.contains(text(&moved)), "{cloned}");

    let folder = machines.of_machine("copy").join("disks");
    let copies = [0, 1].map(|disk| source(&machines, "copy", disk));
    assert!(copies.iter().all(|copy| copy.starts_with(&folder)));
    assert_eq!(source(&machines, "copy", 2), shared);
    assert_eq!(fs::read(&copies[0]).unwrap(), fs::read(&raw).unwrap());
    identical([&copies[1], &base], ["qcow2", "raw"]);
    check_image(&copies[1], false);
    let id = |name: &str| machines.json(&["dominfo", name])["id"].clone();
    assert_ne!(id("web"), id("copy"));
    assert!(!machines.machine_file("copy").contains("52:54"));

    // Both run at once, and the copy does without the other's images.
    machines.done(&["start", "web"]);
    machines.done(&["start", "copy"]);
    machines.done(&["destroy", "web"]);
    machines.done(&["destroy", "copy"]);
    machines.done(&["undefine", "web", "--remove-all-storage"]);
    assert!(!raw.exists() && !overlay.exists());
    fs::remove_file(&base).unwrap();
    machines.done(&["start", "copy"]);
    machines.done(&["destroy", "copy"]);
    machines.done(&["undefine", "copy"]);
    assert!(!folder.exists() && shared.exists());
}

#[test]
fn a_clone_is_another_instance_for_cloud_init() {
    require_kvm!();
    let machines = Machines::new();
    let base = image(&machines, "base.img", 2 * MIB);
    let first_boot = ["--image", text(&base), "--run", "true", "--net", "user"];
    machines.create("web", "hello", "finish=hang", &first_boot);
    machines.done(&["template", "web"]);
    machines.done(&["clone", "web", "copy", "--keep-identity"]);
    machines.done(&["clone", "copy", "third"]);
    let facts = |name: &str| {
        let id = machines.json(&["dominfo", name])["instance-id"].clone();
        let mac = machines.json(&["domiflist", name])[0]["mac"].clone();
        let seed = fs::read(source(&machines, name, 1)).unwrap();
        let said = |text: &str| {
            seed.windows(text.len())
                .any(|bytes| bytes == text.as_bytes())
        };
        let [id, mac] = [id, mac].map(|value| value.as_str().unwrap().to_owned());
        assert!(said(&id) && said(&mac));
        assert!(said(&format!("\"local-hostname\":\"{name}\"")));
        (id, mac)
    };
    let all = ["web", "copy", "third"].map(facts);
    let ids: HashSet<_> = all.iter().map(|(id, _)| id).collect();
    let macs: HashSet<_> = all.iter().map(|(_, mac)| mac).collect();
    assert_eq!((ids.len(), macs.len()), (3, 3), "{all:?}");
    identical([&source(&machines, "copy", 0), &base], ["qcow2", "raw"]);

    // One of them becomes another instance, and stays who it is otherwise.
    machines.done(&["start", "copy", "--new-instance"]);
    let line = machines.refused(&["start", "copy", "--new-instance"]);
    assert!(line.contains("it is running"), "{line}");
    machines.done(&["managedsave", "copy"]);
    let line = machines.refused(&["start", "copy", "--new-instance"]);
    assert!(line.contains("--force-boot"), "{line}");
    let (id, mac) = facts("copy");
    assert_ne!(id, all[1].0);
    assert_eq!(mac, all[1].1);
    machines.create("plain", "hello", "finish=hang", &[]);
    let line = machines.refused(&["start", "plain", "--new-instance"]);
    assert!(line.contains("without a disk for cloud-init"), "{line}");
}

#[test]
fn ten_clones_of_a_machine_that_does_not_run_are_made_at_once() {
    require_kvm!();
    let machines = Machines::new();
    let disk = image(&machines, "disk.img", 2 * MIB);
    machines.create("plain", "hello", "finish=hang", &["--disk", text(&disk)]);
    machines.done(&["clone", "plain", "base"]);
    machines.done(&["template", "base"]);
    for (original, more) in [("plain", &[][..]), ("base", &["--keep-identity"])] {
        // What a killed command has left is removed by one of them, or before any of them begins.
        let left = machines.of_machine(original).join("snapshots/.new-x");
        fs::create_dir_all(&left).unwrap();
        let names: Vec<_> = (0..10).map(|n| format!("{original}-{n}")).collect();
        thread::scope(|scope| {
            for name in &names {
                let machines = &machines;
                scope.spawn(move || {
                    machines.done(&[&["clone", original, name], more].concat());
                });
            }
        });
        assert!(!left.exists());
        for name in &names {
            identical(
                [&source(&machines, name, 0), &disk],
                [if original == "base" { "qcow2" } else { "raw" }, "raw"],
            );
        }
        let ids = names.iter().map(|name| {
            let id = machines.json(&["dominfo", name])["id"].clone();
            id.as_str().unwrap().to_owned()
        });
        assert_eq!(ids.collect::<HashSet<_>>().len(), names.len());
    }
}

#[test]
fn a_machine_that_is_copied_does_not_change() {
    require_kvm!();
    let machines = Machines::new();
    let disk = image(&machines, "disk.img", 64 * MIB);
    machines.create("web", "hello", "finish=hang", &["--disk", text(&disk)]);
    let copying = machines.bantam(&["clone", "web", "copy"]).start();
    let folder = machines.folder().join("machines/.new-copy");
    let begin = Instant::now();
    while !folder.exists() {
        assert!(begin.elapsed() < Duration::from_secs(20));
        thread::sleep(Duration::from_millis(1));
    }
    copying.signal(Signal::SIGSTOP);
    for arguments in [
        &["start", "web"][..],
        &["undefine", "web"],
        &["rename", "web", "other"],
        &["setvcpus", "web", "2"],
        &["template", "web"],
        &["snapshot", "create", "web"],
    ] {
        let line = machines.refused(arguments);
        assert!(line.contains("another command (clone, process "), "{line}");
    }
    machines.done(&["clone", "web", "second"]);
    copying.signal(Signal::SIGCONT);
    copying.wait().has_status(0);
    for name in ["copy", "second"] {
        identical([&source(&machines, name, 0), &disk], ["raw", "raw"]);
    }
    machines.done(&["undefine", "web"]);
}

#[test]
fn a_clone_is_renamed_and_a_template_with_clones_is_not() {
    require_kvm!();
    let machines = Machines::new();
    let disk = image(&machines, "disk.img", MIB);
    machines.create("web", "hello", "finish=hang", &["--disk", text(&disk)]);
    machines.done(&["clone", "web", "copy"]);
    machines.done(&["rename", "copy", "other"]);
    assert!(source(&machines, "other", 0).starts_with(machines.of_machine("other")));
    machines.done(&["template", "other"]);
    machines.done(&["clone", "other", "linked", "--keep-identity"]);
    let line = machines.refused(&["rename", "other", "third"]);
    assert!(
        line.contains("other machines need its disks: linked; "),
        "{line}"
    );
    machines.done(&["rename", "linked", "fourth"]);
    machines.done(&["start", "fourth"]);

    // A snapshot below another that is deleted while the machine runs leaves a chain in the folder.
    machines.done(&["clone", "web", "chain"]);
    machines.done(&["start", "chain"]);
    machines.done(&["snapshot", "create", "chain", "one", "--disk-only"]);
    machines.done(&["snapshot", "create", "chain", "two", "--disk-only"]);
    machines.done(&["snapshot", "delete", "chain", "one"]);
    machines.done(&["destroy", "chain"]);
    let line = machines.refused(&["rename", "chain", "fifth"]);
    assert!(line.contains("its snapshots"), "{line}");
    machines.done(&["start", "chain"]);
    machines.done(&["snapshot", "delete", "chain", "two"]);
    machines.done(&["destroy", "chain"]);
    let line = machines.refused(&["rename", "chain", "fifth"]);
    assert!(line.contains("bantam clone"), "{line}");
}

#[test]
fn images_stay_apart_while_one_of_another_machine_cannot_be_read() {
    let machines = Machines::new();
    let disk = image(&machines, "disk.img", MIB);
    machines.create("web", "hello", "", &["--disk", text(&disk)]);
    let broken = image(&machines, "broken.qcow2", MIB);
    machines.create("other", "hello", "", &["--disk", text(&broken)]);
    machines.done(&["snapshot", "create", "web", "one"]);
    let overlay = source(&machines, "web", 0);
    machines.done(&["snapshot", "delete", "web", "one"]);
    assert_eq!(source(&machines, "web", 0), overlay);
    assert!(overlay.exists());
}

#[test]
fn a_machine_whose_settings_are_damaged_is_undefined() {
    let machines = Machines::new();
    machines.create("web", "hello", "", &[]);
    fs::write(machines.of_machine("web").join("settings.toml"), "id = ").unwrap();
    machines.done(&["undefine", "web"]);
    assert_eq!(machines.done(&["list", "--all", "--name"]), "");
}

#[test]
fn a_machine_that_cannot_be_cloned_says_why() {
    require_kvm!();
    let machines = Machines::new();
    machines.create_idle("web");
    machines.create_idle("other");
    let line = machines.refused(&["clone", "web", "OTHER"]);
    assert!(
        line.contains("there is a machine 'other' already"),
        "{line}"
    );
    let line = machines.refused(&["clone", "web", "new", "--linked"]);
    assert!(line.contains("bantam template web"), "{line}");
    machines.done(&["start", "web"]);
    machines.done(&["managedsave", "web"]);
    let line = machines.refused(&["clone", "web", "new"]);
    assert!(line.contains("managed save"), "{line}");

    // An image that is not there leaves nothing of the copy.
    let disk = image(&machines, "disk.img", MIB);
    machines.create("third", "hello", "finish=hang", &["--disk", text(&disk)]);
    fs::remove_file(&disk).unwrap();
    let before = files_below(machines.folder());
    let line = machines.refused(&["clone", "third", "new"]);
    assert!(line.contains("disk.img"), "{line}");
    assert_eq!(files_below(machines.folder()), before);
}

#[test]
fn a_clone_that_is_killed_leaves_a_machine_or_nothing() {
    let machines = Machines::new();
    let disk = image(&machines, "disk.img", 16 * MIB);
    machines.create("web", "hello", "finish=hang", &["--disk", text(&disk)]);
    let before = files_below(&machines.folder().join("machines"));
    for round in 0..12 {
        let clone = machines.bantam(&["clone", "web", "copy"]).start();
        thread::sleep(Duration::from_millis(round * 4));
        clone.signal(Signal::SIGKILL);
        clone.wait();
        if machines.done(&["list", "--all", "--name"]) == "web\n" {
            machines.done(&["clone", "web", "copy"]);
        }
        let copy = fs::read(source(&machines, "copy", 0)).unwrap();
        assert!(copy == fs::read(&disk).unwrap());
        machines.done(&["undefine", "copy"]);
        assert_eq!(files_below(&machines.folder().join("machines")), before);
    }
}

#[test]
fn a_machine_that_runs_outlives_a_clone_that_is_killed() {
    require_kvm!();
    let machines = Machines::new();
    let disk = image(&machines, "disk.img", 16 * MIB);
    machines.create("web", "hello", "finish=hang", &["--disk", text(&disk)]);
    machines.done(&["start", "web"]);
    for round in 0..12 {
        let clone = machines.bantam(&["clone", "web", "copy"]).start();
        thread::sleep(Duration::from_millis(round * 6));
        clone.signal(Signal::SIGKILL);
        clone.wait();
        // The next one takes away what it has left.
        if machines.done(&["list", "--all", "--name"]) != "web\n" {
            machines.done(&["undefine", "copy"]);
        }
        machines.done(&["clone", "web", "copy"]);
        let kept = machines.json(&["snapshot", "list", "web"]);
        assert!(kept.as_array().unwrap().is_empty(), "round {round}: {kept}");
        assert_eq!(source(&machines, "web", 0), disk, "round {round}");
        let copy = fs::read(source(&machines, "copy", 0)).unwrap();
        assert!(copy == fs::read(&disk).unwrap());
        machines.done(&["undefine", "copy"]);
    }
    assert_eq!(machines.state("web"), "running (booted)");
}

#[test]
fn other_commands_leave_a_machine_alone_that_is_being_cloned() {
    require_kvm!();
    let machines = Machines::new();
    let disk = machines.folder().join("disk.img");
    fs::write(&disk, vec![7; 384 * MIB]).unwrap();
    machines.create("web", "hello", "finish=hang", &["--disk", text(&disk)]);
    let clone = machines.bantam(&["clone", "web", "copy"]).start();
    let new = machines.folder().join("machines/.new-copy/disks");
    let begin = Instant::now();
    while !new.exists() && begin.elapsed() < Duration::from_secs(20) {
        thread::sleep(Duration::from_millis(1));
    }
    // These take the lock that removes what killed commands have left.
    machines.create_idle("third");
    let second = machines.run(&["clone", "third", "copy"]);
    let start = machines.run(&["start", "web"]);
    clone.wait().has_status(0);
    assert!(fs::read(source(&machines, "copy", 0)).unwrap() == fs::read(&disk).unwrap());
    // A host that is very fast has copied before.
    if !start.status.success() {
        assert!(start.stderr.contains("another command (clone"), "{start}");
    }
    assert!(second.stderr.contains("already"), "{second}");
}

#[test]
fn a_template_is_not_started_but_cloned() {
    require_kvm!();
    let machines = Machines::new();
    let disk = image(&machines, "disk.img", 2 * MIB);
    machines.create("base", "hello", "finish=hang", &["--disk", text(&disk)]);
    machines.done(&["template", "base"]);
    assert_eq!(machines.json(&["dominfo", "base"])["template"], true);
    let line = machines.refused(&["start", "base"]);
    assert!(line.contains("it is a template"), "{line}");
    assert!(line.contains("bantam clone base"), "{line}");

    machines.done(&["clone", "base", "one", "--keep-identity", "--start"]);
    machines.done(&["clone", "base", "two", "--keep-identity", "--full"]);
    assert_eq!(machines.state("one"), "running (booted)");
    let overlay = source(&machines, "one", 0);
    machines.done(&["destroy", "one"]);
    identical([&overlay, &disk], ["qcow2", "raw"]);
    assert!(fs::metadata(&overlay).unwrap().len() < MIB as u64);
    assert_eq!(
        fs::read(source(&machines, "two", 0)).unwrap(),
        fs::read(&disk).unwrap()
    );
    assert_eq!(machines.json(&["dominfo", "one"])["template"], false);

    // What others need stays. A copy needs nothing.
    for command in [
        &["undefine", "base"][..],
        &["undefine", "base", "--remove-all-storage"],
        &["template", "base", "--off"],
    ] {
        let line = machines.refused(command);
        assert!(
            line.contains("other machines need its disks: one; "),
            "{line}"
        );
    }
    machines.done(&["undefine", "one"]);
    machines.done(&["template", "base", "--off"]);
    machines.done(&["start", "base"]);
    machines.done(&["destroy", "base"]);
    machines.done(&["undefine", "base", "--remove-all-storage"]);
    assert!(!disk.exists());
    machines.done(&["start", "two"]);
}

#[test]
fn devices_are_attached_and_detached_for_the_next_start() {
    require_kvm!();
    let machines = Machines::new();
    machines.create_idle("web");
    let first = image(&machines, "first.img", MIB);
    let second = image(&machines, "second.img", MIB);
    machines.done(&["attach-disk", "web", &format!("{},id=data", text(&first))]);
    machines.done(&["attach-interface", "web", "user,name=lan"]);
    let names = |list: Value| -> Vec<String> {
        let names = list.as_array().unwrap().iter();
        names
            .map(|it| it["name"].as_str().unwrap().to_owned())
            .collect()
    };
    machines.done(&["start", "web"]);
    assert_eq!(names(machines.json(&["domblklist", "web"])), ["data"]);
    assert_eq!(names(machines.json(&["domiflist", "web"])), ["lan"]);

    // A machine that runs keeps what it has.
    let detached = machines.run(&["detach-disk", "web", "data"]);
    detached.has_status(0);
    assert!(detached.stderr.contains("started again"), "{detached}");
    machines.done(&["detach-interface", "web", "lan"]);
    assert_eq!(names(machines.json(&["domblklist", "web"])), ["data"]);
    machines.done(&["destroy", "web"]);
    machines.done(&["start", "web"]);
    assert!(names(machines.json(&["domblklist", "web"])).is_empty());
    assert!(names(machines.json(&["domiflist", "web"])).is_empty());
    machines.done(&["destroy", "web"]);

    // A network device keeps its address when one before it goes.
    machines.done(&["attach-interface", "web", "user,name=first"]);
    machines.done(&["attach-interface", "web", "user,name=second"]);
    let address = machines.json(&["domiflist", "web"])[1]["mac"].clone();
    machines.done(&["detach-interface", "web", "first"]);
    assert_eq!(machines.json(&["domiflist", "web"])[0]["mac"], address);

    let line = machines.refused(&["detach-disk", "web", "data"]);
    assert!(line.contains("bantam domblklist web"), "{line}");
    machines.done(&[
        "attach-disk",
        "web",
        &format!("{},id=data,ro", text(&first)),
    ]);
    let line = machines.refused(&["attach-disk", "web", &format!("{},id=data", text(&second))]);
    assert!(line.contains("data"), "{line}");
    machines.done(&["change-media", "web", "data", text(&second)]);
    machines.done(&["start", "web"]);
    assert_eq!(source(&machines, "web", 0), second);
    machines.done(&["change-media", "web", "data", text(&first)]);
    assert_eq!(source(&machines, "web", 0), first);
    assert!(machines.machine_file("web").contains("first.img"));
    let missing = machines.folder().join("missing.img");
    machines.refused(&["change-media", "web", "data", text(&missing)]);
    assert!(machines.machine_file("web").contains("first.img"));
}

#[test]
fn interfaces_are_listed_with_their_addresses() {
    require_kvm!();
    let machines = Machines::new();
    let nets = [
        "--net",
        "user,subnet=10.7.0.0/24,forward=tcp:127.0.0.1:2222:22",
        "--net",
        "tap=none0,mac=52:54:00:00:00:01",
    ];
    machines.create("web", "hello", "finish=hang", &nets);
    let list = machines.json(&["domiflist", "web"]);
    assert_eq!(list[0]["type"], "user");
    assert_eq!(list[1]["type"], "ethernet");
    assert_eq!(list[1]["source"], "none0");
    assert_eq!(list[1]["mac"], "52:54:00:00:00:01");
    let addresses = machines.json(&["domifaddr", "web"]);
    assert_eq!(addresses.as_array().unwrap().len(), 1);
    assert_eq!(addresses[0]["address"], "10.7.0.15");
    assert_eq!(addresses[0]["mac"], list[0]["mac"]);
    let table = machines.done(&["domifaddr", "web"]);
    assert!(table.starts_with("Name"), "{table}");
    assert!(table.contains("10.7.0.15"), "{table}");
}

#[test]
fn ssh_is_started_with_the_address_of_the_machine() {
    let machines = Machines::new();
    let bin = machines.folder().join("bin");
    fs::create_dir(&bin).unwrap();
    let ssh = bin.join("ssh");
    fs::write(&ssh, "#!/bin/sh\necho \"$@\"\n").unwrap();
    fs::set_permissions(&ssh, fs::Permissions::from_mode(0o755)).unwrap();
    let run = |arguments: &[&str]| {
        let path = format!("PATH={}:/usr/bin:/bin", bin.display());
        let state = format!("BANTAM_STATE_DIR={}", machines.folder().display());
        machines
            .bantam(arguments)
            .launcher(["env".to_owned(), path, state])
            .finish()
    };
    let net = "user,forward=tcp:127.0.0.1:8080:80,forward=tcp:127.0.0.1:2222:22";
    machines.create("web", "hello", "finish=hang", &["--net", net]);
    let ended = run(&["ssh", "admin@web", "-v", "uname", "-a"]);
    ended.has_status(0);
    let words = "-p 2222 -l admin -o HostKeyAlias=bantam-web 127.0.0.1 -v uname -a\n";
    assert_eq!(ended.text(), words);
    machines.create("closed", "hello", "finish=hang", &["--net", "user"]);
    let line = machines.refused(&["ssh", "closed"]);
    assert!(line.contains("forward=tcp:2222:22"), "{line}");
    machines.create_idle("alone");
    let line = machines.refused(&["ssh", "alone"]);
    assert!(line.contains("no address"), "{line}");
}

/// Writes 64 KiB of a byte to a qcow2 image.
fn write_to(image: &Path, byte: u8, offset: usize) {
    let write = format!("write -P {byte} {offset} 64k");
    let written = Command::new("qemu-io")
        .args(["-f", "qcow2", "-c", &write])
        .arg(image)
        .output()
        .unwrap();
    assert!(written.status.success(), "{written:?}");
}

#[test]
fn images_of_deleted_snapshots_are_merged() {
    require_kvm!();
    let machines = Machines::new();
    let disk = image(&machines, "disk.img", 2 * MIB);
    let mut expected = fs::read(&disk).unwrap();
    machines.create("web", "hello", "finish=hang", &["--disk", text(&disk)]);
    for (name, byte) in [("one", 0x11), ("two", 0x22)] {
        machines.done(&["snapshot", "create", "web", name]);
        let offset = usize::from(byte) << 14;
        write_to(&source(&machines, "web", 0), byte, offset);
        expected[offset..offset + (64 << 10)].fill(byte);
    }
    let content = machines.folder().join("expected.img");
    fs::write(&content, &expected).unwrap();
    // What a snapshot keeps stays as it is.
    let of_two = source(&machines, "web", 0);
    machines.done(&["snapshot", "delete", "web", "two"]);
    let of_one = source(&machines, "web", 0);
    assert!(!of_two.exists() && of_one != disk);
    check_image(&of_one, false);
    identical([&of_one, &content], ["qcow2", "raw"]);
    machines.done(&["start", "web"]);
    machines.done(&["destroy", "web"]);

    // Another machine reads the first image.
    machines.create(
        "reader",
        "hello",
        "",
        &["--disk", &format!("{},ro", text(&disk))],
    );
    let before = fs::read(&disk).unwrap();
    machines.done(&["snapshot", "create", "web", "three"]);
    machines.done(&["snapshot", "delete", "web", "one"]);
    machines.done(&["snapshot", "delete", "web", "three"]);
    assert_eq!(source(&machines, "web", 0), of_one);
    assert!(fs::read(&disk).unwrap() == before);
    machines.done(&["undefine", "reader"]);

    // With one layer, the machine ends where it began.
    machines.done(&["undefine", "web"]);
    machines.create("web", "hello", "finish=hang", &["--disk", text(&disk)]);
    machines.done(&["snapshot", "create", "web", "one"]);
    write_to(&source(&machines, "web", 0), 0x33, 0);
    machines.done(&["snapshot", "delete", "web", "one"]);
    assert_eq!(source(&machines, "web", 0), disk);
    assert!(!machines.of_machine("web").join("disks").exists());
    let after = fs::read(&disk).unwrap();
    assert!(after[..64 << 10].iter().all(|&byte| byte == 0x33));
    assert!(after[64 << 10..] == before[64 << 10..]);
    machines.done(&["start", "web"]);
}

#[test]
fn a_machine_that_runs_merges_the_overlay_of_a_deleted_snapshot() {
    require_kvm!();
    let machines = Machines::new();
    let disk = image(&machines, "disk.img", MIB);
    let content = fs::read(&disk).unwrap();
    machines.create("web", "hello", "finish=hang", &["--disk", text(&disk)]);
    machines.done(&["start", "web"]);
    machines.done(&["snapshot", "create", "web", "one", "--disk-only"]);
    machines.done(&["snapshot", "create", "web", "two", "--disk-only"]);
    let overlays = [source(&machines, "web", 0), disk.clone()];
    // The image below is that of the other snapshot.
    machines.done(&["snapshot", "delete", "web", "one"]);
    assert_eq!(source(&machines, "web", 0), overlays[0]);
    machines.done(&["snapshot", "delete", "web", "two"]);
    let merged = source(&machines, "web", 0);
    assert_ne!(merged, overlays[0]);
    assert!(!overlays[0].exists());
    assert_eq!(machines.state("web"), "running (booted)");
    machines.done(&["destroy", "web"]);
    machines.done(&["start", "web"]);
    machines.done(&["snapshot", "create", "web", "three"]);
    machines.done(&["snapshot", "delete", "web", "three"]);
    assert_eq!(source(&machines, "web", 0), merged);
    machines.done(&["destroy", "web"]);
    assert!(fs::read(&disk).unwrap() == content);
}

#[test]
fn a_machine_that_runs_is_cloned_and_goes_on_with_its_own_disks() {
    require_kvm!();
    let machines = Machines::new();
    let raw = image(&machines, "raw.img", 4 * MIB);
    let other = image(&machines, "other.img", 2 * MIB);
    let disks = ["--disk", text(&raw), "--disk", text(&other)];
    machines.create("web", "hello", "finish=hang", &disks);
    machines.done(&["start", "web"]);
    machines.done(&["clone", "web", "copy"]);
    assert_eq!(source(&machines, "web", 0), raw);
    assert_eq!(source(&machines, "web", 1), other);
    assert!(
        machines
            .json(&["snapshot", "list", "web"])
            .as_array()
            .unwrap()
            .is_empty()
    );
    for (place, image) in [&raw, &other].into_iter().enumerate() {
        let copy = source(&machines, "copy", place);
        assert!(copy.starts_with(machines.of_machine("copy")), "{copy:?}");
        assert!(fs::read(&copy).unwrap() == fs::read(image).unwrap());
    }
    assert_eq!(machines.state("web"), "running (booted)");
    machines.done(&["start", "copy"]);
}
