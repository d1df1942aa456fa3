//! `bantam image` beside qemu-img: the same command lines give the same output, exit status and files.

mod chains;

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use bantam_tests::monitor;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use chains::chain;

const FILES: [(&str, &[&str]); 9] = [
    ("a.qcow2", &["qcow2"]),
    (
        "c.qcow2",
        &[
            "qcow2",
            "-c",
            "-o",
            "compression_type=zstd,cluster_size=128k",
        ],
    ),
    ("a.vmdk", &["vmdk"]),
    ("s.vmdk", &["vmdk", "-o", "subformat=streamOptimized"]),
    ("f.vmdk", &["vmdk", "-o", "subformat=twoGbMaxExtentFlat"]),
    ("a.vpc", &["vpc", "-o", "force_size=on"]),
    ("a.vhdx", &["vhdx"]),
    ("a.vdi", &["vdi"]),
    ("s.vdi", &["vdi", "-o", "static=on"]),
];

/// A folder with a sparse raw image `src.img`, and images of it in other formats.
fn folder() -> TempDir {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("it can be written to");
    let mut disk = vec![0; (9 << 20) + 1536];
    for (index, byte) in disk[70_000..200_000].iter_mut().enumerate() {
        *byte = (index * index / 7) as u8;
    }
    disk[(5 << 20)..(5 << 20) + 4096].fill(0x41);
    let source = folder.path().join("src.img");
    fs::write(&source, &disk).expect("there is room");
    // It was written without holes.
    run(
        folder.path(),
        "qemu-img",
        &["convert", "-O", "raw", "src.img", "sparse.img"],
    );
    fs::rename(folder.path().join("sparse.img"), source).expect("both are in one folder");
    for (name, options) in FILES {
        let arguments = [&["convert", "-f", "raw", "-O"], options, &["src.img", name]].concat();
        let output = run(folder.path(), "qemu-img", &arguments);
        assert!(output.status.success(), "{name}: {output:?}");
    }
    folder
}

fn run(folder: &Path, program: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new(program);
    command.current_dir(folder).args(arguments);
    command.output().expect("qemu-img is installed")
}

fn bantam(folder: &Path, arguments: &[&str]) -> Output {
    let program = monitor();
    let program = program.to_str().expect("the path is UTF-8");
    run(folder, program, &[&["image"], arguments].concat())
}

/// Runs a command line by both, with `new` as the file that it makes, if any.
fn assert_same(folder: &Path, line: &str) {
    let arguments: Vec<_> = line.split(' ').collect();
    let new = folder.join("new");
    let run_one = |run: &dyn Fn() -> Output| {
        let _ = fs::remove_file(&new);
        let output = run();
        let made = fs::read(&new).ok();
        (output, made)
    };
    let (expected, expected_file) = run_one(&|| run(folder, "qemu-img", &arguments));
    let (output, file) = run_one(&|| bantam(folder, &arguments));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert_eq!(
        text(&output.stdout),
        text(&expected.stdout),
        "{line}: {output:?}"
    );
    assert_eq!(
        output.status.code(),
        expected.status.code(),
        "{line}: {output:?}"
    );
    assert!(file == expected_file, "{line}: the files differ");
    if !expected.status.success() && line.contains("nosuch") {
        let error = text(&output.stderr);
        assert!(
            error.starts_with("bantam image: ") && error.lines().count() == 1,
            "{error}"
        );
    }
}

#[test]
fn information_is_that_of_qemu_img() {
    let folder = folder();
    for name in FILES.map(|(name, _)| name).into_iter().chain(["src.img"]) {
        for line in [
            "info",
            "info --output=json",
            "info --backing-chain --output=json -U",
        ] {
            assert_same(folder.path(), &format!("{line} {name}"));
        }
        // QEMU does not say where a VHDX image has its data.
        if name != "a.vhdx" {
            assert_same(folder.path(), &format!("map --output=json {name}"));
            assert_same(
                folder.path(),
                &format!("map --output=json -s 1M -l 5M {name}"),
            );
        }
        if !["a.vhdx", "c.qcow2", "s.vmdk"].contains(&name) {
            assert_same(folder.path(), &format!("map {name}"));
        }
        for line in [
            "compare -f raw src.img",
            "compare -q src.img",
            "compare -f raw src.img -U",
        ] {
            assert_same(folder.path(), &format!("{line} {name}"));
        }
        assert_same(folder.path(), &format!("measure {name}"));
    }
    for name in ["a.vmdk", "a.vdi", "a.vhdx", "src.img"] {
        assert_same(folder.path(), &format!("check {name}"));
        assert_same(folder.path(), &format!("check --output=json {name}"));
    }
    assert_same(folder.path(), "measure --output=json --size 1.5G");
    // An image tells what it is without its backing file.
    let missing = [
        "create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", "gone.img",
    ];
    let missing = [&missing[..], &["m.qcow2", "1M"]].concat();
    assert!(run(folder.path(), "qemu-img", &missing).status.success());
    assert_same(folder.path(), "info m.qcow2");
    assert_same(folder.path(), "info --output=json m.qcow2");
    for line in [
        "info nosuch",
        "map nosuch",
        "compare src.img nosuch",
        "convert nosuch new",
        "check nosuch",
    ] {
        assert_same(folder.path(), line);
    }
}

#[test]
fn copies_are_those_of_qemu_img() {
    let folder = folder();
    for name in FILES.map(|(name, _)| name).into_iter().chain(["src.img"]) {
        assert_same(folder.path(), &format!("convert -O raw {name} new"));
        assert_same(folder.path(), &format!("convert -S 0 -t none {name} new"));
        assert_same(
            folder.path(),
            &format!("dd bs=1000 count=4000 skip=60 if={name} of=new"),
        );
    }
    assert_same(folder.path(), "convert src.img a.vdi a.qcow2 new");
    for format in ["qcow2", "vmdk", "vpc", "vhdx", "vdi"] {
        let output = bantam(
            folder.path(),
            &["convert", "-f", "raw", "-O", format, "src.img", "new"],
        );
        assert!(output.status.success(), "{format}: {output:?}");
        let compared = run(
            folder.path(),
            "qemu-img",
            &["compare", "-f", "raw", "-F", format, "src.img", "new"],
        );
        assert!(compared.status.success(), "{format}: {compared:?}");
        let checked = run(folder.path(), "qemu-img", &["check", "-f", format, "new"]);
        assert!(
            matches!(checked.status.code(), Some(0 | 63)),
            "{format}: {checked:?}"
        );
    }
    for options in [
        "compression_type=zlib",
        "compression_type=zstd,cluster_size=2M",
        "extended_l2=on",
    ] {
        let arguments = [
            "convert", "-c", "-O", "qcow2", "-o", options, "a.vdi", "new",
        ];
        let output = bantam(folder.path(), &arguments);
        assert!(output.status.success(), "{options}: {output:?}");
        let compared = run(folder.path(), "qemu-img", &["compare", "src.img", "new"]);
        assert!(compared.status.success(), "{options}: {compared:?}");
        let checked = run(folder.path(), "qemu-img", &["check", "new"]);
        assert!(checked.status.success(), "{options}: {checked:?}");
    }
}

#[test]
fn images_are_created_and_resized_as_by_qemu_img() {
    let folder = folder();
    for line in [
        "create new 10M",
        "create -f raw new 1.5k",
        "create new 1000",
        "create -o preallocation=full,size=1M new",
        "create -q new 1M",
        "create new",
        "create -o nosuch=1 -q new 1M",
    ] {
        assert_same(folder.path(), line);
    }
    // The bytes differ: identifiers are random, tables have other places.
    for line in [
        "create -f qcow2 new 10M",
        "create -f qcow2 -o compat=0.10,cluster_size=4k new 1M",
        "create -f qcow2 -b src.img -F raw new",
        "create -f qcow2 -u -b nosuch -F raw new 1G",
        "create -f vmdk new 10M",
        "create -f vpc -o subformat=fixed new 10M",
        "create -f vhdx -o block_size=1M new 10M",
        "create -f vdi new 10M",
    ] {
        let arguments: Vec<_> = line.split(' ').collect();
        let expected = run(folder.path(), "qemu-img", &arguments);
        let output = bantam(folder.path(), &arguments);
        assert_eq!(output.stdout, expected.stdout, "{line}: {output:?}");
        assert!(output.status.success(), "{line}: {output:?}");
        if !line.contains("nosuch") {
            let info = run(
                folder.path(),
                "qemu-img",
                &["info", "-f", arguments[2], "new"],
            );
            assert!(info.status.success(), "{line}: {info:?}");
        }
    }
    for (file, format) in [("src.img", "raw"), ("a.qcow2", "qcow2")] {
        for (change, success) in [("+1M", true), ("-5M", false), ("20M", true), ("1M", false)] {
            let output = bantam(folder.path(), &["resize", "-f", format, file, change]);
            assert_eq!(
                output.status.success(),
                success,
                "{file} {change}: {output:?}"
            );
        }
        let output = bantam(
            folder.path(),
            &["resize", "--shrink", "-f", format, file, "-15M"],
        );
        assert!(output.status.success(), "{output:?}");
        assert_same(folder.path(), &format!("info {file}"));
    }
    let checked = run(folder.path(), "qemu-img", &["check", "a.qcow2"]);
    assert!(checked.status.success(), "{checked:?}");
}

#[test]
fn what_is_added_to_a_disk_is_allocated_in_advance() {
    let folder = folder();
    for how in ["off", "metadata", "falloc", "full"] {
        let line = "create -q -f qcow2 new 10M";
        let created = bantam(folder.path(), &line.split(' ').collect::<Vec<_>>());
        assert!(created.status.success(), "{created:?}");
        let option = format!("--preallocation={how}");
        let output = bantam(folder.path(), &["resize", &option, "new", "20M"]);
        assert!(output.status.success(), "{output:?}");
        let checked = run(folder.path(), "qemu-img", &["check", "new"]);
        assert!(checked.status.success(), "{how}: {checked:?}");
        let map = run(folder.path(), "qemu-img", &["map", "--output=json", "new"]);
        let map: serde_json::Value = serde_json::from_slice(&map.stdout).unwrap();
        let allocated = map.as_array().unwrap().iter();
        let allocated = allocated.filter(|part| part["offset"].is_u64());
        let allocated: u64 = allocated.map(|part| part["length"].as_u64().unwrap()).sum();
        assert_eq!(allocated, if how == "off" { 0 } else { 10 << 20 }, "{how}");
        let blocks = fs::metadata(folder.path().join("new")).unwrap().blocks();
        let is_reserved = blocks * 512 > 10 << 20;
        assert_eq!(is_reserved, matches!(how, "falloc" | "full"), "{how}");
        let shrunk = bantam(folder.path(), &["resize", "--shrink", &option, "new", "1M"]);
        assert_eq!(shrunk.status.success(), how == "off", "{shrunk:?}");
    }
    let output = bantam(
        folder.path(),
        &[
            "resize",
            "--preallocation=metadata",
            "-f",
            "raw",
            "src.img",
            "+1M",
        ],
    );
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(error.contains("cannot resize 'src.img'"), "{error}");
    assert!(error.contains("off, falloc and full"), "{error}");
}

#[test]
fn options_are_listed_as_by_qemu_img() {
    let folder = folder();
    let lines = |output: Output| -> Vec<String> {
        assert!(output.status.success(), "{output:?}");
        let text = String::from_utf8(output.stdout).unwrap();
        text.lines().map(str::to_owned).collect()
    };
    for words in [
        &["create", "-f", "qcow2", "-o", "help"][..],
        &["create", "-f", "qcow2", "-o", "compat=v3,?", "new"],
        &["create", "-f", "vmdk", "-o", "help"],
        &["create", "-f", "vpc", "-o", "help"],
        &["create", "-f", "vhdx", "-o", "help"],
        &["convert", "-O", "vdi", "-o", "help"],
        &["amend", "-f", "qcow2", "-o", "help"],
    ] {
        let expected = lines(run(folder.path(), "qemu-img", words));
        let listed = lines(bantam(folder.path(), words));
        if !words.contains(&"new") {
            assert_eq!(listed[0], expected[0]);
        }
        assert!(listed.len() > 2);
        for line in &listed[1..] {
            let (option, _) = line.split_once(" - ").unwrap();
            let is_known = expected
                .iter()
                .any(|line| line.starts_with(option.trim_end()));
            assert!(is_known, "{words:?}: {line}");
        }
    }
    assert!(!folder.path().join("new").exists());
    let output = bantam(folder.path(), &["create", "-f", "qcow2", "-o", "compat=v3"]);
    assert!(!output.status.success());
}

#[test]
fn a_chain_is_not_made_longer_than_one_that_can_be_opened() {
    let folder = folder();
    let create = |options: &[&str], below: &str, name: &str| {
        let words = [
            &["create", "-q", "-f", "qcow2"],
            options,
            &["-F", "qcow2", "-b", below, name, "1M"],
        ];
        bantam(folder.path(), &words.concat())
    };
    let first = bantam(
        folder.path(),
        &["create", "-q", "-f", "qcow2", "1.qcow2", "1M"],
    );
    assert!(first.status.success(), "{first:?}");
    for number in 2..65 {
        let [below, name] = [number - 1, number].map(|number| format!("{number}.qcow2"));
        let created = create(&["-u"], &below, &name);
        assert!(created.status.success(), "{created:?}");
    }
    let opened = bantam(folder.path(), &["map", "64.qcow2"]);
    assert!(opened.status.success(), "{opened:?}");
    let refused = create(&[], "64.qcow2", "65.qcow2");
    let error = String::from_utf8_lossy(&refused.stderr);
    assert!(error.contains("a chain has 64 at most"), "{error}");
    assert!(!folder.path().join("65.qcow2").exists());
}

#[test]
fn an_image_is_not_its_own_backing_file() {
    let folder = folder();
    let fails = |words: &[&str], reason: &str| {
        let output = bantam(folder.path(), words);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(
            !output.status.success() && error.contains(reason),
            "{error}"
        );
        assert_eq!(error.lines().count(), 1, "{error}");
    };
    let path = |name| folder.path().join(name);
    fs::hard_link(path("a.qcow2"), path("b.qcow2")).unwrap();
    for words in [
        &["rebase", "-F", "qcow2", "-b", "a.qcow2", "a.qcow2"][..],
        &["rebase", "-F", "qcow2", "-b", "b.qcow2", "a.qcow2"],
        &["rebase", "-u", "-F", "qcow2", "-b", "b.qcow2", "a.qcow2"],
    ] {
        fails(
            words,
            "cannot rebase 'a.qcow2': it cannot be its own backing file",
        );
    }
    let words = "rebase -u -F qcow2 -b b.qcow2 a.qcow2";
    let rebased = run(
        folder.path(),
        "qemu-img",
        &words.split(' ').collect::<Vec<_>>(),
    );
    assert!(rebased.status.success(), "{rebased:?}");
    fails(&["info", "--backing-chain", "a.qcow2"], "form a loop");
}

#[test]
fn snapshots_are_those_of_qemu_img() {
    let folder = folder();
    let ok = |arguments: &[&str]| {
        let output = bantam(folder.path(), arguments);
        assert!(output.status.success(), "{arguments:?}: {output:?}");
    };
    assert_same(folder.path(), "snapshot -l a.qcow2");
    ok(&["snapshot", "-c", "first", "a.qcow2"]);
    run(
        folder.path(),
        "qemu-img",
        &["snapshot", "-c", "second", "a.qcow2"],
    );
    assert_same(folder.path(), "snapshot -l a.qcow2");
    assert_same(folder.path(), "info a.qcow2");
    assert_same(folder.path(), "info --output=json a.qcow2");
    ok(&["snapshot", "-a", "first", "a.qcow2"]);
    ok(&["snapshot", "-d", "first", "a.qcow2"]);
    assert_same(folder.path(), "snapshot -l a.qcow2");
    assert_same(folder.path(), "snapshot -d nosuch a.qcow2");
    assert_same(folder.path(), "compare src.img a.qcow2");
    let checked = run(folder.path(), "qemu-img", &["check", "a.qcow2"]);
    assert!(checked.status.success(), "{checked:?}");
}

#[test]
fn an_overlay_is_converted_to_another_overlay() {
    let folder = folder();
    let qemu = |program: &str, arguments: &[&str]| {
        let output = run(folder.path(), program, arguments);
        assert!(output.status.success(), "{arguments:?}: {output:?}");
    };
    qemu(
        "qemu-img",
        &[
            "create",
            "-f",
            "qcow2",
            "-b",
            "src.img",
            "-F",
            "raw",
            "over.qcow2",
        ],
    );
    let writes = [
        "-c",
        "write -P 9 100k 3k",
        "-c",
        "write -z 64k 64k",
        "over.qcow2",
    ];
    qemu("qemu-io", &writes);
    for compress in [&[][..], &["-c"]] {
        let arguments = [
            &["convert", "-O", "qcow2", "-B", "src.img", "-F", "raw"],
            compress,
            &["over.qcow2", "new"],
        ];
        let output = bantam(folder.path(), &arguments.concat());
        assert!(output.status.success(), "{output:?}");
        qemu("qemu-img", &["compare", "over.qcow2", "new"]);
        qemu("qemu-img", &["check", "new"]);
        let size = fs::metadata(folder.path().join("new")).unwrap().len();
        assert!(size < 1 << 20, "{size}");
        assert_same(folder.path(), "info --backing-chain over.qcow2");
    }
}

#[test]
fn sizes_are_those_of_qemu_img() {
    let folder = folder();
    chain(folder.path());
    for line in [
        "--size 10G",
        "--size 0",
        "--size 1000",
        "-o cluster_size=4k,refcount_bits=64 --size 10G",
        "-o cluster_size=2M,extended_l2=on --size 1T",
        "-o compat=0.10 a.qcow2",
        "-o preallocation=falloc c.qcow2",
        "-o preallocation=metadata a.vmdk",
        "-o backing_file=base.img,backing_fmt=raw top.qcow2",
        "--size 1E",
        "top.qcow2",
        "mid.qcow2",
        "old.qcow2",
        "-f raw base.img",
        "src.img",
        "c.qcow2",
        "nosuch",
    ] {
        assert_same(folder.path(), &format!("measure -O qcow2 {line}"));
        assert_same(
            folder.path(),
            &format!("measure -O qcow2 --output=json {line}"),
        );
    }
}

#[test]
fn a_snapshot_is_converted_as_by_qemu_img() {
    let folder = folder();
    chain(folder.path());
    for file in ["a.qcow2", "top.qcow2"] {
        run(
            folder.path(),
            "qemu-img",
            &["snapshot", "-c", "first", file],
        );
        let writes = ["-c", "write -P 8 64k 1M", file];
        assert!(run(folder.path(), "qemu-io", &writes).status.success());
        run(
            folder.path(),
            "qemu-img",
            &["snapshot", "-c", "second", file],
        );
        for snapshot in [
            "first",
            "second",
            "2",
            "snapshot.id=1",
            "snapshot.name=second",
            "nosuch",
            "snapshot.id=2,snapshot.name=second",
            "snapshot.id=1,snapshot.name=second",
        ] {
            assert_same(folder.path(), &format!("convert -l {snapshot} {file} new"));
            assert_same(
                folder.path(),
                &format!("measure -O qcow2 -l {snapshot} {file}"),
            );
        }
    }
    assert_same(folder.path(), "convert -l first src.img new");
    assert_same(folder.path(), "convert -l first a.qcow2 top.qcow2 new");
}

#[test]
fn a_source_is_not_overwritten() {
    let folder = folder();
    let before = fs::read(folder.path().join("src.img")).unwrap();
    symlink("src.img", folder.path().join("link.img")).unwrap();
    for target in ["src.img", "./src.img", "link.img"] {
        let output = bantam(folder.path(), &["convert", "a.vdi", "src.img", target]);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
    }
    let extent = bantam(
        folder.path(),
        &["convert", "-O", "raw", "f.vmdk", "f-f001.vmdk"],
    );
    assert_eq!(extent.status.code(), Some(1), "{extent:?}");
    assert!(fs::read(folder.path().join("src.img")).unwrap() == before);
}

#[test]
fn a_link_named_qemu_img_takes_the_same_commands() {
    let folder = folder();
    symlink(monitor(), folder.path().join("qemu-img")).unwrap();
    let link = folder.path().join("qemu-img");
    let output = run(folder.path(), link.to_str().unwrap(), &["info", "a.vdi"]);
    let expected = run(folder.path(), "qemu-img", &["info", "a.vdi"]);
    assert_eq!(output.stdout, expected.stdout);
    let output = run(folder.path(), link.to_str().unwrap(), &["--version"]);
    let version = String::from_utf8_lossy(&output.stdout);
    assert!(
        version.starts_with("qemu-img version 7.2.0 (Bantam "),
        "{version}"
    );
}

#[test]
fn an_interrupted_copy_leaves_no_target() {
    let folder = folder();
    let source = fs::File::create(folder.path().join("large.img")).unwrap();
    source.set_len(64 << 30).unwrap();
    let mut child = Command::new(monitor())
        .current_dir(folder.path())
        .args([
            "image",
            "convert",
            "-S",
            "0",
            "-c",
            "-O",
            "qcow2",
            "large.img",
            "new",
        ])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let started = Instant::now();
    while !folder.path().join("new").exists() {
        assert!(started.elapsed() < Duration::from_secs(10));
        std::thread::sleep(Duration::from_millis(10));
    }
    kill(Pid::from_raw(child.id() as i32), Signal::SIGINT).unwrap();
    let status = child.wait().unwrap();
    assert_eq!(status.code(), Some(130));
    assert!(!folder.path().join("new").exists());
    assert_eq!(source.metadata().unwrap().len(), 64 << 30);
}
