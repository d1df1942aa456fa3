//! Backing files that are committed to and exchanged, and options that are changed, by Bantam beside qemu-img.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use bantam_tests::monitor;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{bantam, run};

/// Makes a chain of images: `base.img`, which is raw, `mid.qcow2`, `top.qcow2`, which is larger, and `old.qcow2`, which is
/// of version 2 and lies over `other.img`.
pub fn chain(folder: &Path) {
    for line in [
        "create -q -f raw base.img 3M",
        "create -q -f raw other.img 5M",
        "create -q -f qcow2 -b base.img -F raw mid.qcow2",
        "create -q -f qcow2 -o cluster_size=4k -b mid.qcow2 -F qcow2 top.qcow2 6M",
        "create -q -f qcow2 -o compat=0.10 -b other.img -F raw old.qcow2 5M",
    ] {
        let arguments: Vec<_> = line.split(' ').collect();
        assert!(run(folder, "qemu-img", &arguments).status.success());
    }
    for (format, file, writes) in [
        ("raw", "base.img", ["write -P 1 0 1M", "write -P 2 2M 1M"]),
        ("raw", "other.img", ["write -P 1 0 1M", "write -P 9 3M 2M"]),
        (
            "qcow2",
            "mid.qcow2",
            ["write -P 3 512k 1M", "write -z 2M 192k"],
        ),
        (
            "qcow2",
            "top.qcow2",
            ["write -P 4 700k 9k", "write -z 128k 64k"],
        ),
        (
            "qcow2",
            "top.qcow2",
            ["write -P 5 5M 64k", "discard 2560k 64k"],
        ),
        (
            "qcow2",
            "old.qcow2",
            ["write -P 6 100k 1k", "write -P 7 4M 64k"],
        ),
    ] {
        let arguments = [
            &["-f", format],
            &["-c", writes[0], "-c", writes[1]][..],
            &[file],
        ]
        .concat();
        assert!(run(folder, "qemu-io", &arguments).status.success());
    }
}

/// Has qemu-img and Bantam execute `lines` on the same images, and compares what they print and make of `images`.
fn assert_same_changes(lines: &[&str], images: &[&str]) {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("it can be written to");
    let (theirs, ours) = (folder.path().join("theirs"), folder.path().join("ours"));
    for folder in [&theirs, &ours] {
        fs::create_dir(folder).expect("it is new");
        chain(folder);
    }
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    for line in lines {
        let arguments: Vec<_> = line
            .split(' ')
            .map(|it| if it == "NONE" { "" } else { it })
            .collect();
        let expected = run(&theirs, "qemu-img", &arguments);
        let output = bantam(&ours, &arguments);
        assert_eq!(
            output.status.code(),
            expected.status.code(),
            "{line}: {output:?} {expected:?}"
        );
        // How often the progress is shown depends on the time.
        let last = |bytes: &[u8]| {
            text(bytes)
                .rsplit('\r')
                .next()
                .unwrap_or_default()
                .to_owned()
        };
        assert_eq!(
            last(&output.stdout),
            last(&expected.stdout),
            "{line}: {output:?}"
        );
        if !expected.status.success() {
            let error = text(&output.stderr);
            let is_line = error.starts_with("bantam image: ") && error.lines().count() == 1;
            // A command line that is not possible is explained.
            assert!(is_line || error.starts_with("error: "), "{error}");
        }
        for image in images {
            let what = |folder: &Path| {
                let info = text(&run(folder, "qemu-img", &["info", image]).stdout);
                let lines = info.lines().filter(|line| !line.starts_with("disk size"));
                lines.map(str::to_owned).collect::<Vec<_>>()
            };
            assert_eq!(what(&ours), what(&theirs), "{line}, {image}");
            let (theirs, ours) = (format!("theirs/{image}"), format!("ours/{image}"));
            let arguments = ["compare", &theirs, &ours];
            let compared = run(folder.path(), "qemu-img", &arguments);
            assert!(compared.status.success(), "{line}, {image}: {compared:?}");
            if image.ends_with("qcow2") {
                let checked = run(folder.path(), "qemu-img", &["check", &ours]);
                assert!(checked.status.success(), "{line}, {image}: {checked:?}");
            }
        }
    }
}

const CHAIN: [&str; 5] = [
    "base.img",
    "mid.qcow2",
    "top.qcow2",
    "other.img",
    "old.qcow2",
];

#[test]
fn images_are_committed_as_by_qemu_img() {
    assert_same_changes(
        &[
            "commit top.qcow2",
            "commit -q mid.qcow2",
            "commit old.qcow2",
        ],
        &CHAIN,
    );
    assert_same_changes(
        &["commit -d -p -t none top.qcow2", "commit top.qcow2"],
        &CHAIN,
    );
    assert_same_changes(
        &[
            "commit -b nosuch top.qcow2",
            "commit -b base.img -f qcow2 top.qcow2",
        ],
        &["base.img", "top.qcow2"],
    );
    assert_same_changes(
        &[
            "commit nosuch",
            "commit -f raw base.img",
            "commit -f raw top.qcow2",
        ],
        &CHAIN,
    );
}

#[test]
fn backing_files_are_changed_as_by_qemu_img() {
    for (other, format) in [
        ("base.img", "raw"),
        ("other.img", "raw"),
        ("old.qcow2", "qcow2"),
    ] {
        let there = format!("rebase -p -F {format} -b {other} top.qcow2");
        assert_same_changes(
            &[
                &there,
                "rebase -b NONE top.qcow2",
                "rebase -F qcow2 -b mid.qcow2 top.qcow2",
            ],
            &CHAIN,
        );
    }
    assert_same_changes(
        &[
            "rebase -b mid.qcow2 -F qcow2 old.qcow2",
            "rebase -b NONE old.qcow2",
        ],
        &CHAIN,
    );
    assert_same_changes(
        &[
            "rebase top.qcow2",
            "rebase -b base.img top.qcow2",
            "rebase -u -b base.img top.qcow2",
            "rebase -b nosuch -F raw top.qcow2",
            "rebase -b base.img -F nosuch top.qcow2",
            "rebase -b base.img -F raw -f raw other.img",
        ],
        &CHAIN,
    );
    assert_same_changes(
        &[
            "rebase -u -b base.img -F raw top.qcow2",
            "rebase -q -u top.qcow2",
            "rebase -u -p -b ../ours/mid.qcow2 -F qcow2 top.qcow2",
            "rebase -u -b NONE old.qcow2",
        ],
        &CHAIN,
    );
}

#[test]
fn options_are_amended_as_by_qemu_img() {
    assert_same_changes(
        &[
            "amend -o compat=0.10 top.qcow2",
            "amend -o compat=v3,lazy_refcounts=on top.qcow2",
            "amend -p -o lazy_refcounts=off top.qcow2",
            "amend -o size=20M -f qcow2 top.qcow2",
            "amend -o size=5M top.qcow2",
            "amend -o compat=1.1 old.qcow2",
            "amend -o compat=0.10 mid.qcow2",
            "amend -o backing_file=mid.qcow2,backing_fmt=qcow2 top.qcow2",
            "rebase -b NONE top.qcow2",
            "amend -o compat=0.10 top.qcow2",
        ],
        &["mid.qcow2", "top.qcow2", "old.qcow2"],
    );
    assert_same_changes(
        &[
            "amend top.qcow2",
            "amend -o compat=2 top.qcow2",
            "amend -o nosuch=1 top.qcow2",
            "amend -o cluster_size=4k top.qcow2",
            "amend -o backing_file=base.img top.qcow2",
            "amend -o lazy_refcounts=on old.qcow2",
            "amend -f raw -o size=1M base.img",
        ],
        &CHAIN,
    );
}

#[test]
fn an_interruption_changes_no_byte_of_a_disk() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("it can be written to");
    let folder = folder.path();
    let qemu = |program: &str, arguments: &[&str]| {
        let output = run(folder, program, arguments);
        assert!(output.status.success(), "{arguments:?}: {output:?}");
    };
    let mut interrupted = 0;
    for (number, line) in ["rebase -b NONE top.qcow2", "commit top.qcow2"]
        .iter()
        .enumerate()
    {
        for (turn, signal) in [Signal::SIGINT, Signal::SIGKILL].into_iter().enumerate() {
            chain(folder);
            // Enough that it takes some time.
            let write = format!("write -P {} 0 192M", 10 + number);
            qemu(
                "qemu-img",
                &["resize", "-q", "-f", "raw", "base.img", "256M"],
            );
            qemu("qemu-img", &["resize", "-q", "mid.qcow2", "256M"]);
            qemu("qemu-img", &["resize", "-q", "top.qcow2", "256M"]);
            qemu(
                "qemu-io",
                &["-c", &write, ["mid.qcow2", "top.qcow2"][number]],
            );
            qemu("qemu-img", &["convert", "-O", "raw", "top.qcow2", "before"]);
            let arguments = line.split(' ').map(|it| if it == "NONE" { "" } else { it });
            let mut child = Command::new(monitor())
                .current_dir(folder)
                .arg("image")
                .args(arguments)
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            std::thread::sleep(Duration::from_millis(40 + 30 * turn as u64));
            // It may have ended.
            let _ = kill(Pid::from_raw(child.id() as i32), signal);
            match child.wait().unwrap().code() {
                Some(0) => {}
                code => {
                    interrupted += 1;
                    let expected = (signal == Signal::SIGINT).then_some(130);
                    assert_eq!(code, expected, "{line}");
                }
            }
            qemu(
                "qemu-img",
                &["compare", "-f", "raw", "-F", "qcow2", "before", "top.qcow2"],
            );
            for image in ["mid.qcow2", "top.qcow2"] {
                // 3 is for leaks.
                let checked = run(folder, "qemu-img", &["check", image]);
                assert!(
                    matches!(checked.status.code(), Some(0 | 3)),
                    "{line}: {checked:?}"
                );
            }
            // It can be repeated.
            let again: Vec<_> = line
                .split(' ')
                .map(|it| if it == "NONE" { "" } else { it })
                .collect();
            let again = bantam(folder, &again);
            assert!(again.status.success(), "{again:?}");
            qemu(
                "qemu-img",
                &["compare", "-f", "raw", "-F", "qcow2", "before", "top.qcow2"],
            );
        }
    }
    assert!(interrupted > 0);
}
