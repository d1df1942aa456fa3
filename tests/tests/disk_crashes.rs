//! qcow2 images under a guest whose monitor is killed, or whose storage fails: the image stays whole, and
//! what the guest has flushed is there.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use bantam_tests::{
    Bantam, StallingStorage, check_image, qemu_img, require_fuse, require_kvm, require_namespaces,
    with_mounts,
};
use nix::sys::signal::Signal;
use tempfile::TempDir;

const DISK_SIZE: u64 = 32 << 20;
/// What the disk has where the guest has written nothing, if it has a backing file or a snapshot.
const FILL: u8 = 0x5a;

fn folder() -> TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("it can be written to")
}

/// Images that allocate clusters in different ways.
#[derive(Debug, Clone, Copy)]
enum Kind {
    Empty,
    SmallClusters,
    Overlay,
    Subclusters,
    Snapshot,
    LazyRefcounts,
}

const KINDS: [Kind; 6] = [
    Kind::Empty,
    Kind::SmallClusters,
    Kind::Overlay,
    Kind::Subclusters,
    Kind::Snapshot,
    Kind::LazyRefcounts,
];

impl Kind {
    /// Returns what the disk has in the beginning.
    fn fill(self) -> u8 {
        match self {
            Kind::Empty | Kind::SmallClusters | Kind::LazyRefcounts => 0,
            Kind::Overlay | Kind::Subclusters | Kind::Snapshot => FILL,
        }
    }

    /// Makes an image. `base` is a raw image filled with [`FILL`].
    fn create(self, base: &Path, path: &Path) {
        let size = DISK_SIZE.to_string();
        let base = base.to_str().expect("the path is text");
        let create = ["create", "-q", "-f", "qcow2"];
        let over_base = ["-F", "raw", "-b", base];
        match self {
            Kind::Empty => run(&create, &["-o", "preallocation=off"], path, &size),
            Kind::SmallClusters => run(&create, &["-o", "cluster_size=4096"], path, &size),
            Kind::LazyRefcounts => run(&create, &["-o", "lazy_refcounts=on"], path, &size),
            Kind::Overlay => run(&create, &over_base, path, &size),
            Kind::Subclusters => {
                let options = ["-o", "extended_l2=on", "-F", "raw", "-b", base];
                run(&create, &options, path, &size);
            }
            Kind::Snapshot => {
                qemu_img(&["convert", "-f", "raw", "-O", "qcow2", base], &[path]);
                qemu_img(&["snapshot", "-c", "before"], &[path]);
            }
        }
    }
}

fn run(command: &[&str], options: &[&str], path: &Path, size: &str) {
    qemu_img(&[command, options].concat(), &[path, Path::new(size)]);
}

fn base(folder: &Path) -> PathBuf {
    let base = folder.join("base.img");
    fs::write(&base, vec![FILL; DISK_SIZE as usize]).expect("there is room");
    base
}

fn guest(path: &Path, seed: u64, words: &str) -> Bantam {
    Bantam::payload("durable")
        .disk(path, ",format=qcow2")
        .append(format!("seed={seed} {words}"))
}

/// Asserts that rounds up to `flushed` are on the disk, in a machine of its own.
fn verify(path: &Path, seed: u64, flushed: u64, fill: u8) {
    let words = format!("mode=verify flushed={flushed} untouched={fill}");
    guest(path, seed, &words).finish().passed();
}

/// Returns the last round that `output` calls flushed.
fn last_flushed(output: &str) -> u64 {
    let mut rounds = output.lines().filter_map(|line| {
        let round = line.strip_prefix("flushed ")?;
        round.trim_end().parse().ok()
    });
    rounds.next_back().unwrap_or(0)
}

#[test]
fn a_monitor_that_is_killed_leaves_a_whole_image_with_all_that_was_flushed() {
    require_kvm!();
    let folder = folder();
    let base = base(folder.path());
    let path = folder.path().join("disk.qcow2");
    let mut rounds = 0;
    for seed in 0..102 {
        let kind = KINDS[seed as usize % KINDS.len()];
        kind.create(&base, &path);
        let machine = guest(&path, seed, "").start();
        machine.wait_for_output("flushed 1\n");
        // Spread over the first quarter of a second.
        thread::sleep(Duration::from_micros(seed * 7919 % 250_000));
        machine.signal(Signal::SIGKILL);
        let output = machine.wait().text();
        let flushed = last_flushed(&output);
        assert!(flushed > 0, "{kind:?}: {output}");
        rounds += flushed;
        check_image(&path, true);
        verify(&path, seed, flushed, kind.fill());
        // It reads the image and adds nothing.
        check_image(&path, true);
        fs::remove_file(&path).unwrap();
    }
    assert!(rounds > 102 * 5, "{rounds} rounds are too few to tell");
}

#[test]
fn a_full_file_system_leaves_a_whole_image_with_all_that_was_flushed() {
    require_kvm!();
    require_namespaces!();
    for (seed, kind) in KINDS.into_iter().enumerate() {
        let folder = folder();
        let base = base(folder.path());
        let template = folder.path().join("template.qcow2");
        kind.create(&base, &template);
        let small = folder.path().join("small");
        fs::create_dir(&small).unwrap();
        let path = small.join("disk.qcow2");
        let size = fs::metadata(&template).unwrap().len() + (8 << 20);
        let (from, to) = (template.display(), path.display());
        // The image is judged where it is, as the file system is gone with the machine.
        let setup = format!(
            "mount -t tmpfs -o size={size} tmpfs '{}' && cp '{from}' '{to}'",
            small.display()
        );
        let script = format!("\"$@\"; s=$?; cp '{to}' '{from}'; exit $s");
        let launcher = with_mounts(&setup)
            .into_iter()
            .chain(["sh", "-c", &script, "sh"].map(str::to_owned));
        let seed = seed as u64;
        let words = format!("untouched={}", kind.fill());
        let ended = guest(&path, seed, &words).launcher(launcher).finish();
        ended.passed().printed("stopped in round");
        let text = ended.text();
        check_image(&template, true);
        verify(&template, seed, last_flushed(&text), kind.fill());
    }
}

#[test]
fn storage_that_refuses_writes_leaves_a_whole_image_with_all_that_was_flushed() {
    require_kvm!();
    require_fuse!();
    for (seed, kind) in KINDS.into_iter().enumerate() {
        let seed = seed as u64;
        let folder = folder();
        let base = base(folder.path());
        let path = folder.path().join("disk.qcow2");
        kind.create(&base, &path);
        let storage = StallingStorage::new();
        fs::copy(&path, storage.path()).unwrap();
        let words = format!("untouched={}", kind.fill());
        let machine = guest(&storage.path(), seed, &words).start();
        machine.wait_for_output("flushed 20\n");
        storage.refuse_writes(true);
        machine.wait_for_output("stopped in round");
        storage.refuse_writes(false);
        let ended = machine.wait();
        // The guest has found all that it had flushed. The image takes no more writes, so it cannot be
        // flushed at the end.
        let reason = ended.printed("PASS\n").failed();
        let refused = "takes writes when it is opened again";
        assert!(reason.contains(refused), "{ended}");
        fs::copy(storage.path(), &path).unwrap();
        check_image(&path, true);
        verify(&path, seed, last_flushed(&ended.text()), kind.fill());
    }
}
