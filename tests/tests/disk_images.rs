//! Which images can be a disk, in which units, and which other programs may use them meanwhile.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use bantam_tests::{
    ApiMachine, Bantam, LoopDevice, check_image, qemu_img, require_kvm, require_loop_devices,
    require_namespaces, with_mounts,
};
use nix::sys::signal::Signal;
use serde_json::json;
use tempfile::TempDir;

const SIZE: usize = 4 << 20;
const BLOCKS: usize = SIZE / 4096;
const CACHE_MODES: [&str; 4] = ["writeback", "writethrough", "none", "unsafe"];

fn image(folder: &Path, name: &str, size: usize) -> PathBuf {
    let path = folder.join(name);
    fs::write(&path, vec![0x5a; size]).expect("there is room");
    path
}

fn folder() -> TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("it can be written to")
}

// --- Format ---------------------------------------------------------------------------------------

#[test]
fn a_raw_disk_to_which_a_guest_wrote_a_header_still_starts() {
    require_kvm!();
    let folder = folder();
    let image = image(folder.path(), "disk.img", 1 << 20);
    let mut bytes = fs::read(&image).unwrap();
    bytes[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    fs::write(&image, bytes).unwrap();
    let ended = Bantam::payload("devices")
        .disk(&image, "")
        .append("block-test=write")
        .finish();
    ended.succeeded();
    let lines: Vec<_> = ended.stderr.lines().collect();
    assert_eq!(lines.len(), 1, "{ended}");
    assert!(lines[0].contains("is used as raw"), "{ended}");
    // No advice that makes a program detect the format itself.
    assert!(lines[0].contains("convert -f qcow2 -O raw"), "{ended}");
}

#[test]
fn a_file_named_for_another_format_is_raw_on_request() {
    require_kvm!();
    let folder = folder();
    let image = image(folder.path(), "disk.vmdk", 1 << 20);
    let ended = Bantam::payload("hello").disk(&image, "").finish();
    let line = ended.failed_with_one_line();
    assert!(line.contains("it is a vmdk image"), "{line}");
    let raw = Bantam::payload("hello")
        .disk(&image, ",format=raw")
        .finish();
    raw.passed();
    let config = folder.path().join("machine.toml");
    let text = format!("[[disk]]\npath = '{}'\nformat = 'raw'\n", image.display());
    fs::write(&config, text).unwrap();
    let ended = Bantam::payload("hello")
        .option("--config", &config)
        .finish();
    ended.passed();
}

// --- Sectors --------------------------------------------------------------------------------------

/// Runs all tests of a disk that the payloads have.
#[track_caller]
fn check_disk(image: &Path, kind: &str, sectors: u64) {
    let ended = Bantam::payload("devices")
        .disk(image, kind)
        .append("block-test=write")
        .finish();
    ended.passed().printed(&format!("block: {sectors} sectors"));
    for words in [
        format!("mode=write pattern=seq operations={BLOCKS}"),
        "mode=mixed pattern=random operations=500".into(),
    ] {
        let ended = Bantam::payload("load")
            .disk(image, kind)
            .append(format!("test=block verify seed=3 depth=64 {words}"))
            .finish();
        ended.passed();
    }
}

#[test]
fn a_file_has_sectors_of_512_bytes_on_every_file_system() {
    require_kvm!();
    let memory = tempfile::tempdir_in("/dev/shm").expect("it is there");
    for folder in [memory, folder()] {
        // Not a multiple of 4096.
        let image = image(folder.path(), "disk.img", SIZE + 512);
        for cache in CACHE_MODES {
            for engine in ["auto", "sync"] {
                let kind = format!(",cache={cache},engine={engine}");
                check_disk(&image, &kind, SIZE as u64 / 512 + 1);
            }
        }
    }
}

#[test]
fn storage_of_4096_byte_sectors_serves_disks_of_either_size() {
    require_kvm!();
    require_loop_devices!();
    let folder = folder();
    let image = image(folder.path(), "disk.img", SIZE);
    let device = LoopDevice::with_sectors(&image, 4096);
    for cache in CACHE_MODES {
        for block_size in ["", ",block-size=512", ",block-size=4096"] {
            let kind = format!(",cache={cache}{block_size}");
            check_disk(&device.path, &kind, SIZE as u64 / 512);
        }
    }
}

#[test]
fn a_qcow2_image_on_a_block_device_is_a_disk() {
    require_kvm!();
    require_loop_devices!();
    let folder = folder();
    for sector_size in [512, 4096] {
        let image = image(folder.path(), "device.img", 2 * SIZE);
        let device = LoopDevice::with_sectors(&image, sector_size);
        let size = SIZE.to_string();
        let path = device.path.to_str().expect("it is text");
        qemu_img(&["create", "-q", "-f", "qcow2", path, &size], &[]);
        for cache in CACHE_MODES {
            let kind = format!(",format=qcow2,cache={cache}");
            check_disk(&device.path, &kind, SIZE as u64 / 512);
            check_image(&device.path, false);
        }
    }
}

#[test]
fn a_qcow2_image_on_a_full_block_device_stays_whole() {
    require_kvm!();
    require_loop_devices!();
    let folder = folder();
    let image = image(folder.path(), "device.img", SIZE / 2);
    let device = LoopDevice::new(&image);
    let path = device.path.to_str().expect("it is text");
    qemu_img(
        &["create", "-q", "-f", "qcow2", path, &SIZE.to_string()],
        &[],
    );
    for cache in ["writeback", "none"] {
        let ended = Bantam::payload("load")
            .disk(&device.path, &format!(",format=qcow2,cache={cache}"))
            .append(format!(
                "test=block mode=write pattern=seq operations={BLOCKS}"
            ))
            .finish();
        assert!(ended.stderr.contains("No space left"), "{ended}");
        check_image(&device.path, false);
    }
}

#[test]
fn a_disk_needs_no_proc() {
    require_kvm!();
    require_namespaces!();
    let folder = folder();
    let image = image(folder.path(), "disk.img", SIZE);
    for kind in [
        ",cache=none",
        ",cache=none,block-size=4096",
        ",cache=none,ro",
    ] {
        let ended = Bantam::payload("devices")
            .disk(&image, kind)
            .append("block-test=write")
            .launcher(with_mounts("mount -t tmpfs tmpfs /proc"))
            .finish();
        ended.passed();
    }
}

// --- Sizes ----------------------------------------------------------------------------------------

#[test]
fn a_read_only_image_of_any_length_is_a_disk() {
    require_kvm!();
    let folder = folder();
    for cache in CACHE_MODES {
        let image = image(folder.path(), "root.squashfs", 300_100);
        let ended = Bantam::payload("devices")
            .disk(&image, &format!(",ro,cache={cache}"))
            .finish();
        ended.passed().printed("block: 587 sectors");
        assert_eq!(fs::metadata(&image).unwrap().len(), 300_100);
    }
}

#[test]
fn a_drive_of_any_length_is_put_and_started_as_firecracker_does_it() {
    require_kvm!();
    for (size, is_read_only, sectors) in [
        (300_100, false, 586),
        (300_100, true, 587),
        (100, true, 1),
        (512, false, 1),
    ] {
        let machine = ApiMachine::new();
        let image = machine.image("a.qcow2", size);
        let drive = json!({"drive_id": "a", "is_root_device": false, "path_on_host": image,
                           "is_read_only": is_read_only});
        machine.api.put("/drives/a", &drive);
        machine.boot("devices", "finish=hang");
        machine.api.act("InstanceStart");
        let text = machine.running.wait_for_output("PASS\n");
        let wanted = format!("block: {sectors} sectors");
        assert!(text.contains(&wanted), "{text}");
        if !is_read_only && size % 512 != 0 {
            machine.running.wait_for_error("the last 68 bytes");
        }
        machine.stop();
    }
    // An empty image is a placeholder for another one.
    let machine = ApiMachine::new();
    let empty = machine.image("empty", 0);
    let drive = json!({"drive_id": "a", "is_root_device": false, "path_on_host": empty});
    machine.api.put("/drives/a", &drive);
    machine.start_hello();
    let image = machine.image("image", 8192);
    let swap = json!({"drive_id": "a", "path_on_host": image});
    machine.api.patch("/drives/a", &swap);
    machine.stop();
}

#[test]
fn a_drive_that_cannot_be_started_is_refused_at_once() {
    require_kvm!();
    let machine = ApiMachine::new();
    for (path, reason) in [
        ("/dev/null".into(), "not a regular file or a block device"),
        (machine.path("."), "a directory"),
    ] {
        let drive = json!({"drive_id": "a", "is_root_device": false, "path_on_host": path});
        let told = machine.refused("PUT", "/drives/a", &drive);
        assert!(told.contains(reason), "{told}");
    }
    machine.stop();
}

// --- Locks ----------------------------------------------------------------------------------------

/// Runs a tool of QEMU, and returns whether it succeeded, and its output.
fn qemu(program: &str, words: &[&str], image: &Path) -> Result<(), String> {
    let output = Command::new(program)
        .args(words)
        .arg(image)
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("cannot run {program} of qemu-utils: {error}"));
    let text = [output.stdout, output.stderr].concat();
    match output.status.success() {
        true => Ok(()),
        false => Err(String::from_utf8_lossy(&text).into_owned()),
    }
}

#[test]
fn tools_of_qemu_read_a_disk_in_use_and_do_not_write_it() {
    require_kvm!();
    let folder = folder();
    let image = image(folder.path(), "disk.img", SIZE);
    let copy = folder.path().join("copy.img");
    let convert = |options: &[&str]| {
        let words = [&["convert", "-f", "raw", "-O", "raw"][..], options].concat();
        let output = Command::new("qemu-img")
            .args(words)
            .args([&image, &copy])
            .output();
        output.expect("qemu-utils is installed").status.success()
    };
    let raw = ["-f", "raw"];
    for kind in ["", ",cache=none"] {
        let machine = Bantam::payload("hello")
            .disk(&image, kind)
            .append("finish=hang")
            .start();
        machine.wait_for_output("PASS");
        qemu("qemu-img", &["info", "-U"], &image).unwrap();
        assert!(convert(&["-U"]));
        assert!(fs::read(&copy).unwrap() == fs::read(&image).unwrap());
        let read = [&raw[..], &["-r", "-U", "-c", "read 0 4096"]].concat();
        qemu("qemu-io", &read, &image).unwrap();

        assert!(!convert(&[]));
        let write = [&raw[..], &["-c", "write 0 4096"]].concat();
        let told = qemu("qemu-io", &write, &image).unwrap_err();
        assert!(told.contains("\"write\" lock"), "{told}");
        let resize = ["-c", "qemu-img resize -f raw \"$0\" +1M"];
        let told = qemu("sh", &resize, &image).unwrap_err();
        assert!(told.contains("\"write\" lock"), "{told}");
        machine.signal(Signal::SIGTERM);
        machine.wait();
        qemu("qemu-io", &write, &image).unwrap();
    }
    // A read-only disk lets others read, but nobody write.
    let machine = Bantam::payload("hello")
        .disk(&image, ",ro")
        .append("finish=hang")
        .start();
    machine.wait_for_output("PASS");
    assert!(convert(&[]));
    Bantam::payload("hello")
        .disk(&image, ",ro")
        .finish()
        .passed();
    let write = ["-f", "raw", "-c", "write 0 4096"];
    qemu("qemu-io", &write, &image).unwrap_err();
    let ended = Bantam::payload("hello").disk(&image, "").finish();
    let line = ended.failed_with_one_line();
    assert!(line.contains("it is in use"), "{line}");
    machine.signal(Signal::SIGTERM);
    machine.wait();
}

#[test]
fn a_disk_that_qemu_writes_is_refused() {
    require_kvm!();
    let folder = folder();
    let image = image(folder.path(), "disk.img", SIZE);
    let mut qemu_io = Command::new("qemu-io")
        .args(["-f", "raw"])
        .arg(&image)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("qemu-utils is installed");
    // It prompts for a command when the image is open.
    let mut prompt = [0; 1];
    let stdout = qemu_io.stdout.as_mut().expect("it is piped");
    std::io::Read::read_exact(stdout, &mut prompt).unwrap();
    for suffix in ["", ",ro"] {
        let ended = Bantam::payload("hello").disk(&image, suffix).finish();
        let line = ended.failed_with_one_line();
        assert!(line.contains("it is in use"), "{line}");
    }
    let warned = Bantam::payload("hello").disk(&image, ",lock=warn").finish();
    assert!(
        warned.succeeded().stderr.contains("without a lock"),
        "{warned}"
    );
    Bantam::payload("hello")
        .disk(&image, ",lock=off")
        .finish()
        .passed();
    drop(qemu_io.stdin.take());
    qemu_io.wait().unwrap();
    Bantam::payload("hello").disk(&image, "").finish().passed();
}
