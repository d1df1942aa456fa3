//! Overlays of a machine that does not run, which are merged within a chain of images when a snapshot is deleted. The judges
//! are qemu-img and qemu-io.

#![allow(clippy::unwrap_used, reason = "a test fails where the host does")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use bantam_tests::{Machines, check_image, pattern, qemu_img};
use nix::sys::signal::Signal;

const MIB: usize = 1 << 20;
const SNAPSHOTS: [&str; 4] = ["one", "two", "three", "four"];

/// A machine with a disk and snapshots, between which the disk was written to, and what the disk was at each.
struct Chain {
    machines: Machines,
    disk: PathBuf,
    contents: Vec<PathBuf>,
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Has qemu-io execute a command on an image.
fn write(image: &Path, command: &str) {
    let output = Command::new("qemu-io")
        .args(["-f", "qcow2", "-c", command])
        .arg(image)
        .output()
        .expect("qemu-io is installed with qemu-img");
    assert!(output.status.success(), "{output:?}");
}

impl Chain {
    /// Each time `mib` MiB of the disk are written to.
    fn new(mib: usize) -> Chain {
        let machines = Machines::new();
        let disk = machines.folder().join("disk.img");
        fs::write(&disk, pattern(1, 0, 4 * mib * MIB)).unwrap();
        machines.create("web", "hello", "finish=hang", &["--disk", text(&disk)]);
        let mut chain = Chain {
            machines,
            disk,
            contents: Vec::new(),
        };
        for (number, name) in SNAPSHOTS.into_iter().enumerate() {
            chain.keep();
            chain.machines.done(&["snapshot", "create", "web", name]);
            // Each overlaps with the one before.
            let begin = number * mib / 2;
            write(
                &chain.image(),
                &format!("write -P {} {begin}M {mib}M", number + 1),
            );
        }
        chain.keep();
        chain
    }

    /// The image of the disk now.
    fn image(&self) -> PathBuf {
        let disks = self.machines.json(&["domblklist", "web"]);
        disks[0]["source"].as_str().unwrap().into()
    }

    /// Keeps what the disk is now.
    fn keep(&mut self) {
        let copy = format!("content-{}", self.contents.len());
        let copy = self.machines.folder().join(copy);
        qemu_img(&["convert", "-O", "raw"], &[&self.image(), &copy]);
        self.contents.push(copy);
    }

    /// Checks that the disk is what it was when this was kept, and how many images it has.
    #[track_caller]
    fn is(&self, place: usize, length: usize) {
        let image = self.image();
        let images = qemu_img(&["info", "--backing-chain"], &[&image]);
        assert_eq!(
            images.matches("\nfile format: ").count(),
            length,
            "{images}"
        );
        let format = if length == 1 { "raw" } else { "qcow2" };
        if length > 1 {
            check_image(&image, false);
        }
        qemu_img(
            &["compare", "-f", format, "-F", "raw"],
            &[&image, &self.contents[place]],
        );
    }

    /// Goes back to a snapshot, and checks the disk.
    #[track_caller]
    fn reverts_to(&self, name: &str, length: usize) {
        self.machines.done(&["snapshot", "revert", "web", name]);
        let place = SNAPSHOTS.iter().position(|it| *it == name).unwrap();
        self.is(place, length);
    }

    fn overlays(&self) -> usize {
        let folder = self.machines.of_machine("web").join("disks");
        fs::read_dir(folder).map_or(0, Iterator::count)
    }
}

#[test]
fn snapshots_are_deleted_in_any_order_and_leave_no_layer() {
    for order in [[0, 1, 2, 3], [1, 2, 0, 3], [2, 0, 3, 1], [3, 1, 0, 2]] {
        let chain = Chain::new(1);
        chain.is(4, 5);
        let mut left: Vec<_> = SNAPSHOTS.to_vec();
        for deleted in order {
            let name = SNAPSHOTS[deleted];
            chain.machines.done(&["snapshot", "delete", "web", name]);
            left.retain(|it| *it != name);
            chain.is(4, left.len() + 1);
            assert_eq!(chain.overlays(), left.len());
        }
        assert_eq!(chain.image(), chain.disk);
    }
}

#[test]
fn other_snapshots_are_as_they_were_after_a_merge_below_them() {
    let chain = Chain::new(1);
    chain.machines.done(&["snapshot", "delete", "web", "two"]);
    chain.is(4, 4);
    chain.reverts_to("one", 2);
    chain.reverts_to("three", 3);
    chain.reverts_to("four", 4);
    // Both overlays of the image that the oldest one keeps stay, as both are needed.
    chain.machines.done(&["snapshot", "delete", "web", "four"]);
    chain.is(3, 4);
    chain.reverts_to("one", 2);
    chain.machines.done(&["snapshot", "delete", "web", "one"]);
    chain.is(0, 2);
    chain.reverts_to("three", 3);
}

#[test]
fn an_image_that_something_else_needs_stays() {
    let chain = Chain::new(1);
    // Another machine has the image that the overlay of the second snapshot would be merged into.
    let needed =
        chain.machines.json(&["snapshot", "info", "web", "two"])["disks"][0]["image"].clone();
    let needed = needed.as_str().unwrap();
    let disk = format!("{needed},ro,format=qcow2");
    chain
        .machines
        .create("other", "hello", "", &["--disk", &disk]);
    chain.machines.done(&["snapshot", "delete", "web", "two"]);
    chain.is(4, 5);
    qemu_img(
        &["compare", "-f", "qcow2", "-F", "raw"],
        &[Path::new(needed), &chain.contents[1]],
    );
}

#[test]
fn a_merge_that_is_killed_is_finished_by_the_next_command() {
    for round in 0..16 {
        let chain = Chain::new(4);
        let arguments = ["snapshot", "delete", "web", "two"];
        let delete = chain.machines.bantam(&arguments).start();
        thread::sleep(Duration::from_millis(round * 4));
        delete.signal(Signal::SIGKILL);
        delete.wait();
        // The disk is right at every moment, and so is what remains of the snapshots.
        qemu_img(
            &["compare", "-f", "qcow2", "-F", "raw"],
            &[&chain.image(), &chain.contents[4]],
        );
        let left = chain.machines.json(&["snapshot", "list", "web"]);
        if left.as_array().unwrap().len() == SNAPSHOTS.len() {
            chain.machines.done(&arguments);
        }
        // This finishes what is left.
        chain.machines.done(&["template", "web", "--off"]);
        chain.is(4, 4);
        assert_eq!(chain.overlays(), 3, "round {round}");
        chain.reverts_to("three", 3);
        chain.reverts_to("one", 2);
    }
}
