//! Mistakes of users and refusals of the host: each is one line that says what to do.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Permissions};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use bantam_tests::{
    Bantam, BzImage, Compression, elf_kernel, payload, require_kvm, require_namespaces,
    unprivileged, with_devices,
};
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use tempfile::TempDir;

/// Files of one test.
struct Files(TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("there is a folder for temporary files"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn create(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, bytes).expect("the folder can be written to");
        path
    }
}

/// Checks that the monitor fails with one line that contains all `parts`, in that order.
#[track_caller]
fn refused(bantam: Bantam, parts: &[&str]) {
    let ended = bantam.finish();
    let reason = ended.failed_with_one_line();
    let mut rest = reason;
    for part in parts {
        match rest.split_once(part) {
            Some((_, after)) => rest = after,
            None => panic!("no '{part}' where it belongs in: {reason}"),
        }
    }
}

fn quoted(path: &Path) -> String {
    format!("'{}'", path.display())
}

// --- The host ---------------------------------------------------------------------------------

#[test]
fn a_host_without_kvm_gets_a_remedy() {
    require_namespaces!();
    let bantam = Bantam::payload("hello").launcher(with_devices("true"));
    refused(
        bantam,
        &["cannot open /dev/kvm: No such file or directory", ": "],
    );
}

#[test]
fn a_user_who_may_not_use_kvm_gets_a_remedy() {
    require_namespaces!();
    let forbidden = ": >/dev/kvm && chmod 0 /dev/kvm";
    let bantam = Bantam::payload("hello").launcher(with_devices(forbidden));
    refused(
        bantam,
        &[
            "cannot open /dev/kvm: Permission denied",
            "its mode is 0000",
            "setfacl",
        ],
    );
}

#[test]
fn a_device_that_is_not_kvm_is_refused() {
    require_namespaces!();
    let bantam = Bantam::payload("hello").launcher(with_devices(": >/dev/kvm"));
    refused(
        bantam,
        &["KVM has API version -1, but version 12 is needed"],
    );
}

// --- Kernels ----------------------------------------------------------------------------------

#[test]
fn a_run_without_a_kernel_is_refused() {
    refused(
        Bantam::new(["run"]),
        &["no kernel given: add '--kernel FILE'"],
    );
}

#[test]
fn a_missing_kernel_is_named() {
    require_kvm!();
    refused(
        Bantam::run("/nowhere/vmlinux"),
        &["cannot open kernel '/nowhere/vmlinux': No such file"],
    );
}

#[test]
fn files_that_are_not_kernels_are_refused_by_their_type() {
    require_kvm!();
    let files = Files::new();
    let mut aarch64 = elf_kernel(&[0xf4]);
    // e_machine: EM_AARCH64.
    aarch64[18..20].copy_from_slice(&[183, 0]);
    for (kernel, reason) in [
        (files.create("empty", ""), "the file is empty"),
        (files.create("text", "#!/bin/sh\n"), "a text file"),
        (files.create("zeros", [0; 4096]), "starts with zeros"),
        (
            files.create("aarch64", aarch64),
            "this machine runs 64-bit x86",
        ),
        (files.path(""), "it is a directory"),
        (PathBuf::from("/dev/null"), "it is a pipe, socket or device"),
    ] {
        let quoted = quoted(&kernel);
        refused(
            Bantam::run(&kernel),
            &["cannot load kernel ", &quoted, reason],
        );
    }
}

#[test]
fn a_truncated_kernel_is_refused_wherever_it_ends() {
    require_kvm!();
    let files = Files::new();
    let elf = fs::read(payload("hello")).unwrap();
    let bzimage = BzImage {
        payload: Compression::Gzip.compress(&elf),
        ..BzImage::default()
    };
    let bzimage = bzimage.build();
    for (name, image, ends) in [
        (
            "elf",
            &elf,
            vec![3, 4, 20, 63, 64, 100, 4096, elf.len() / 4],
        ),
        (
            "bzimage",
            &bzimage,
            vec![
                1,
                0x1ff,
                0x202,
                0x206,
                0x250,
                0x267,
                0x400,
                0x601,
                bzimage.len() - 16,
            ],
        ),
    ] {
        for end in ends {
            let kernel = files.create(&format!("{name}-{end}"), &image[..end]);
            refused(
                Bantam::run(&kernel),
                &["cannot load kernel ", &quoted(&kernel)],
            );
        }
    }
}

#[test]
fn pvh_is_refused_for_a_kernel_without_its_note() {
    require_kvm!();
    let files = Files::new();
    let kernel = files.create("kernel", elf_kernel(&[0xf4]));
    refused(
        Bantam::run(kernel).option("--boot-protocol", "pvh"),
        &["it has no PVH entry point", "CONFIG_PVH=y"],
    );
    let bzimage = BzImage {
        payload: b"packed in a way that nobody knows".to_vec(),
        entry_code: vec![0xf4],
    };
    let kernel = files.create("bzimage", bzimage.build());
    refused(
        Bantam::run(kernel).option("--boot-protocol", "pvh"),
        &["PVH needs the ELF inside this bzImage", "unknown"],
    );
}

#[test]
fn a_command_line_that_is_too_long_is_refused() {
    require_kvm!();
    let words = "x".repeat(4096);
    refused(Bantam::payload("hello").append(words), &["command line"]);
}

// --- Memory, initrd and vCPUs -----------------------------------------------------------------

#[test]
fn an_initrd_larger_than_memory_is_refused_with_the_memory_it_needs() {
    require_kvm!();
    let files = Files::new();
    let initrd = files.create("initrd", "");
    File::options()
        .write(true)
        .open(&initrd)
        .unwrap()
        .set_len(64 << 20)
        .unwrap();
    refused(
        Bantam::payload("hello")
            .option("--memory", "32M")
            .option("--initrd", &initrd),
        &[
            "cannot load initrd ",
            &quoted(&initrd),
            "give the machine at least",
        ],
    );
}

#[test]
fn a_missing_initrd_is_named() {
    require_kvm!();
    refused(
        Bantam::payload("hello").option("--initrd", "/nowhere/initrd"),
        &["cannot open initrd '/nowhere/initrd': No such file"],
    );
}

#[test]
fn sizes_of_memory_that_no_machine_has_are_refused() {
    for (size, reason) in [
        ("0", "out of range: 16M to 1023G"),
        ("1M", "out of range: 16M to 1023G"),
        ("1024T", "out of range: 16M to 1023G"),
        ("99999999999999999999G", "out of range: 16M to 1023G"),
        ("1P", "expected a number with an optional unit"),
        ("-1", "expected a number with an optional unit"),
        ("much", "expected a number with an optional unit"),
        ("16385K", "not a multiple of 4K"),
    ] {
        refused(
            Bantam::payload("hello").option("--memory", size),
            &["--memory", reason],
        );
    }
}

#[test]
fn numbers_of_vcpus_that_no_machine_has_are_refused() {
    for count in ["0", "33", "1000", "-1", "two", ""] {
        refused(
            Bantam::payload("hello").option("--cpus", count),
            &["--cpus", "expected 1 to 32"],
        );
    }
}

// --- Disks ------------------------------------------------------------------------------------

#[test]
fn files_that_are_not_disks_are_refused_by_their_type() {
    require_kvm!();
    let files = Files::new();
    for (disk, reason) in [
        (files.path("missing"), "No such file or directory"),
        (files.path("."), "directory"),
        (files.create("empty", ""), "there is nothing in it"),
        (
            files.create("a.vmdk", [0; 1024]),
            "'format=raw' gives the guest the bytes of the file as they are",
        ),
        (files.create("a.qcow2", [0; 1024]), "not a qcow2 image"),
        (
            PathBuf::from("/dev/null"),
            "not a regular file or a block device",
        ),
    ] {
        let quoted = quoted(&disk);
        for suffix in ["", ",ro"] {
            let bantam = Bantam::payload("hello").disk(&disk, suffix);
            refused(bantam, &["disk ", &quoted, reason]);
        }
    }
}

#[test]
fn a_disk_that_ends_within_a_sector_is_refused_unless_it_is_read_only() {
    require_kvm!();
    let files = Files::new();
    let disk = files.create("odd", [0; 1000]);
    refused(
        Bantam::payload("hello").disk(&disk, ""),
        &[&quoted(&disk), "1000 bytes", "'truncate --size=%512 FILE'"],
    );
    Bantam::payload("hello")
        .disk(&disk, ",ro")
        .finish()
        .passed();
}

#[test]
fn a_disk_that_may_only_be_read_is_refused_unless_it_is_read_only() {
    require_kvm!();
    let files = Files::new();
    let disk = files.create("disk", [0; 512]);
    fs::set_permissions(&disk, Permissions::from_mode(0o444)).unwrap();
    let bantam = |suffix| {
        Bantam::payload("hello")
            .launcher(unprivileged())
            .disk(&disk, suffix)
    };
    refused(
        bantam(""),
        &[
            "cannot open disk ",
            "for reading and writing: Permission denied",
            "ro",
        ],
    );
    bantam(",ro").finish().passed();
}

#[test]
fn a_disk_given_twice_is_refused_unless_both_are_read_only() {
    require_kvm!();
    let files = Files::new();
    let disk = files.create("disk", [0; 512]);
    let alias = files.path("alias");
    std::os::unix::fs::symlink(&disk, &alias).unwrap();
    let hard_link = files.path("link");
    fs::hard_link(&disk, &hard_link).unwrap();
    for other in [&disk, &alias, &hard_link] {
        let bantam = Bantam::payload("hello").disk(&disk, "").disk(other, "");
        refused(bantam, &["disk ", &quoted(other), "is given twice"]);
    }
    let bantam = Bantam::payload("hello")
        .disk(&disk, "")
        .disk(&hard_link, ",ro");
    refused(bantam, &["disk ", &quoted(&hard_link), "is given twice"]);
    let bantam = Bantam::payload("hello")
        .disk(&disk, ",ro")
        .disk(&alias, ",ro")
        .disk(&hard_link, ",ro");
    bantam.finish().passed();
}

#[test]
fn a_disk_of_a_running_machine_is_refused_unless_both_only_read() {
    require_kvm!();
    let files = Files::new();
    let disk = files.create("disk", [0; 512]);
    let with_disk = |suffix| Bantam::payload("hello").disk(&disk, suffix);
    let occupied = ["cannot lock disk ", "in use by another machine"];

    let writer = with_disk("").append("finish=hang").start();
    writer.wait_for_output("PASS\n");
    refused(with_disk(""), &occupied);
    refused(with_disk(",ro"), &occupied);
    writer.signal(Signal::SIGTERM);
    writer.wait().succeeded();

    let reader = with_disk(",ro").append("finish=hang").start();
    reader.wait_for_output("PASS\n");
    refused(with_disk(""), &occupied);
    with_disk(",ro").finish().passed();
    drop(reader);
    with_disk("").finish().passed();
}

#[test]
fn more_devices_than_interrupts_are_refused() {
    let mut bantam = Bantam::payload("hello");
    for number in 0..18 {
        bantam = bantam.option("--disk", format!("disk{number}"));
    }
    refused(bantam, &["too many devices: 19", "room for 18"]);
}

// --- Options ----------------------------------------------------------------------------------

#[test]
fn an_unknown_option_is_named() {
    refused(
        Bantam::payload("hello").argument("--kernle"),
        &["unexpected argument '--kernle'", "--kernel"],
    );
    refused(
        Bantam::new(["runn"]),
        &["unrecognized subcommand 'runn'", "run"],
    );
}

#[test]
fn values_that_an_option_does_not_have_are_refused_with_those_it_has() {
    for (option, value, expected) in [
        ("--boot-protocol", "bios", "auto, pvh, linux64"),
        ("--on-reboot", "stop", "exit, restart"),
        (
            "--serial",
            "tty",
            "stdio, pty, file=PATH, socket=PATH or none",
        ),
        ("--disk", "a.img,rw", "PATH[,ro][,id=NAME]"),
        ("--vsock", "cid=3", "cid=N,socket=PATH"),
        ("--net", "tun=tap0", "tap=NAME, bridge=NAME"),
        (
            "--net",
            "tap=tap0,mac=ff:ff:ff:ff:ff:ff",
            "first byte must be even",
        ),
        ("--balloon", "64M", "size=SIZE[,deflate-on-oom=on]"),
    ] {
        refused(
            Bantam::payload("hello").option(option, value),
            &[option, expected],
        );
    }
}

#[test]
fn a_balloon_larger_than_memory_is_refused() {
    refused(
        Bantam::payload("hello")
            .option("--memory", "64M")
            .option("--balloon", "size=65M"),
        &["a balloon of 65M does not fit into the 64M of guest memory"],
    );
}

#[test]
fn a_mistake_in_a_machine_file_is_named_with_its_line() {
    let files = Files::new();
    for (text, line, reason) in [
        (
            "kernel = 'k'\n\nmemroy = '1G'\n",
            3,
            "unknown option 'memroy'",
        ),
        ("kernel = 'k'\ncpus = 0\n", 2, "expected 1 to 32"),
        (
            "kernel = 'k'\n[[disk]]\npath = 'd'\nrw = true\n",
            4,
            "unknown option 'rw'",
        ),
        ("kernel = 'k'\n= 1\n", 2, ""),
    ] {
        let file = files.create("machine.toml", text);
        let place = format!("{}:{line}: ", file.display());
        refused(
            Bantam::new(["run"]).option("--config", &file),
            &[&place, reason],
        );
    }
    refused(
        Bantam::new(["run", "--config", "/nowhere/machine.toml"]),
        &["cannot read machine file '/nowhere/machine.toml': No such file"],
    );
}

#[test]
fn a_machine_comes_through_a_pipe() {
    require_kvm!();
    let kernel = payload("hello");
    let machine = format!("kernel = {kernel:?}\nappend = ['one', 'two']\nrng = false\n");
    let (reader, mut writer) = std::io::pipe().unwrap();
    writer.write_all(machine.as_bytes()).unwrap();
    drop(writer);
    let ended = Bantam::new(["run", "--config", "/dev/stdin", "--append", "three"])
        .stdin(reader)
        .finish();
    ended.passed().printed("console=ttyS0 three");
}

#[test]
fn a_pipe_that_nobody_writes_to_is_not_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let pipe = folder.path().join("pipe");
    mkfifo(&pipe, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
    let api = |option| {
        Bantam::api(&folder.path().join("socket"))
            .option("--level", "Error")
            .option(option, &pipe)
    };
    for (bantam, what) in [
        (
            Bantam::new(["run"]).option("--config", &pipe),
            "machine file",
        ),
        (api("--config-file"), "configuration file"),
        (api("--metadata"), "metadata file"),
    ] {
        let expected = format!("cannot read {what} {}: it is a pipe", quoted(&pipe));
        refused(bantam, &[&expected]);
    }
    for (option, what) in [("--kernel", "kernel"), ("--initrd", "initrd")] {
        let bantam = match option {
            "--kernel" => Bantam::run(&pipe),
            _ => Bantam::payload("hello").option(option, &pipe),
        };
        refused(bantam, &[what, &quoted(&pipe), "copy it to a regular file"]);
    }
}

#[test]
fn paths_are_bytes_and_all_else_is_utf_8() {
    require_kvm!();
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &[u8]| folder.path().join(OsStr::from_bytes(name));
    let disk = path(b"d\xe9,.img");
    fs::write(&disk, [0; 4096]).unwrap();
    let mut disk_option = folder.path().join("d").into_os_string();
    disk_option.push(OsStr::from_bytes(b"\xe9,,.img,ro"));
    let mut serial = OsString::from("file=");
    serial.push(path(b"s\xe9"));
    let mut vsock = OsString::from("cid=3,socket=");
    vsock.push(path(b"v\xe9"));
    let ended = Bantam::payload("hello")
        .option("--disk", disk_option)
        .option("--serial", serial)
        .option("--vsock", vsock)
        .finish();
    ended.succeeded();
    let output = fs::read_to_string(path(b"s\xe9")).unwrap();
    assert!(output.contains("PASS"), "{output}");

    let missing = Bantam::payload("hello").option("--disk", path(b"missing\xe9"));
    refused(missing, &["missing\u{fffd}", "No such file or directory"]);
    let cpus = Bantam::payload("hello").option("--cpus", OsStr::from_bytes(b"\xe9"));
    refused(cpus, &["the value '\u{fffd}' of '--cpus' is not UTF-8"]);
    let id = Bantam::payload("hello").option("--disk", OsStr::from_bytes(b"a,id=\xe9"));
    refused(id, &["--disk", "the value '\u{fffd}' of 'id' is not UTF-8"]);
}

#[test]
fn a_machine_file_describes_a_machine() {
    require_kvm!();
    let files = Files::new();
    fs::copy(payload("cpus"), files.path("kernel")).unwrap();
    let text = "kernel = 'kernel'\ncpus = 3\nappend = 'expect=3'\nrng = false\n";
    let file = files.create("machine.toml", text);
    Bantam::new(["run"])
        .option("--config", &file)
        .finish()
        .passed();
}

// --- The serial port --------------------------------------------------------------------------

#[test]
fn a_socket_in_use_is_refused_and_an_abandoned_one_is_replaced() {
    require_kvm!();
    for (option, words, whose) in [
        ("--serial", "", "for the serial port: another process"),
        (
            "--vsock",
            "cid=3,",
            "for the socket device: another process",
        ),
    ] {
        let files = Files::new();
        let path = files.path("socket");
        let value = format!("{words}socket={}", path.display());
        let bantam = || Bantam::payload("hello").option(option, &value);
        let listener = UnixListener::bind(&path).unwrap();
        let expected = ["cannot listen on ", whose, "uses it", "choose another path"];
        refused(bantam(), &expected);
        drop(listener);
        bantam().finish().succeeded();
        assert!(!path.exists(), "the socket has outlived its machine");

        files.create("socket", "precious");
        refused(
            bantam(),
            &["cannot listen on ", "not a socket", "choose another path"],
        );
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }
}
