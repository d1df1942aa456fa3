//! The balloon, driven by a bare-metal guest: the memory that the host gets back.

use std::fs;
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use bantam_tests::{Bantam, Running, memory_folder, require_kvm};

const MIB: u64 = 1 << 20;
const BALLOON: u64 = 64 * MIB;
/// How much the monitor's own memory may vary.
const TOLERANCE: u64 = 2 * MIB;

/// Returns the private memory of the process in bytes.
fn private_memory(pid: impl std::fmt::Display) -> u64 {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = fs::read_to_string(path).expect("the process is there");
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("Private_Dirty:"))
        .expect("it has private memory");
    let kib = line.trim().trim_end_matches(" kB");
    1024 * kib.parse::<u64>().expect("it is a number")
}

/// Lets the guest go on to its next step, and returns the memory of the monitor after it.
fn step(machine: &mut Running, name: &str) -> u64 {
    machine.wait_for_output(name);
    let memory = private_memory(machine.pid());
    machine.send(b"\n");
    memory
}

fn balloon(options: &str) -> Bantam {
    Bantam::payload("balloon")
        .option("--memory", "128M")
        .option("--balloon", format!("size={}M{options}", BALLOON / MIB))
        .stdin(Stdio::piped())
}

#[test]
fn nothing_is_reported_unless_asked_for() {
    require_kvm!();
    let mut machine = balloon(",deflate-on-oom=on").start();
    let steps = ["filled", "inflated", "refilled", "reported"];
    let [.., refilled, reported] = steps.map(|name| step(&mut machine, name));
    machine.wait().passed();
    assert!(reported >= refilled - TOLERANCE, "{refilled} {reported}");
}

#[test]
fn pages_in_the_balloon_and_reported_ones_belong_to_the_host() {
    require_kvm!();
    let mut machine = balloon(",reporting=on").start();
    let steps = ["filled", "inflated", "refilled", "reported"];
    let [filled, inflated, refilled, reported] = steps.map(|name| step(&mut machine, name));
    machine.wait().passed();
    assert!(filled >= BALLOON, "{filled}");
    assert!(
        inflated <= filled - BALLOON + TOLERANCE,
        "{filled} {inflated}"
    );
    assert!(
        refilled >= inflated + BALLOON - TOLERANCE,
        "{inflated} {refilled}"
    );
    assert!(
        reported <= refilled - BALLOON + TOLERANCE,
        "{refilled} {reported}"
    );
}

#[test]
fn a_balloon_that_inflates_goes_on_in_another_machine() {
    require_kvm!();
    let folder = memory_folder();
    let (control, directory) = (
        folder.path().join("control"),
        folder.path().join("snapshot"),
    );
    let mut before = 0;
    for milliseconds in [0, 2, 8] {
        let mut machine = balloon(",reporting=on")
            .option("--control", &control)
            .start();
        machine.wait_for_output("filled");
        machine.send(b"\n");
        thread::sleep(Duration::from_millis(milliseconds));
        let taken = Bantam::new(["snapshot", "--stop"])
            .argument(&control)
            .argument(&directory)
            .finish();
        taken.succeeded();
        let text = machine.wait().text();
        let mut machine = Bantam::new(["restore"])
            .argument(&directory)
            .stdin(Stdio::piped())
            .start();
        if !text.contains("inflated") {
            before += 1;
            machine.wait_for_output("inflated");
        }
        machine.send(b"\n");
        step(&mut machine, "refilled");
        step(&mut machine, "reported");
        machine.wait().passed();
    }
    println!("{before} snapshots came before the balloon was inflated");
    assert!(before > 0, "all came too late");
}
