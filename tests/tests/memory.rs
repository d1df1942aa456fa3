//! The pages that guest memory is made of.

use std::fs;

use bantam_tests::{Bantam, HugePagePool, Running, require_huge_pages, require_kvm};
use nix::sys::signal::Signal;

/// Returns whether a mapping of the process, of at least 16 MiB, has this flag of the kernel.
fn has_mapping(machine: &Running, flag: &str) -> bool {
    let path = format!("/proc/{}/smaps", machine.pid());
    let maps = fs::read_to_string(path).expect("a process can be looked at");
    let mut size = 0;
    maps.lines().any(|line| {
        if let Some(text) = line.strip_prefix("Size:") {
            size = text.trim_end_matches("kB").trim().parse().unwrap_or(0);
        }
        size >= 16 << 10
            && line
                .strip_prefix("VmFlags:")
                .is_some_and(|flags| flags.split(' ').any(|found| found == flag))
    })
}

fn hanging(pages: &str) -> Running {
    let machine = Bantam::payload("hello")
        .append("finish=hang")
        .option("--memory", "16M")
        .option("--huge-pages", pages)
        .start();
    machine.wait_for_output("PASS\n");
    machine
}

#[test]
fn guests_run_on_pages_of_2_mib_that_were_set_aside() {
    require_huge_pages!();
    let _pool = HugePagePool::new(8);
    let machine = hanging("2M");
    assert!(has_mapping(&machine, "ht"));
    machine.signal(Signal::SIGTERM);
    machine.wait().succeeded();

    // Every part of memory exists.
    let ended = Bantam::payload("memory")
        .option("--memory", "16M")
        .option("--huge-pages", "2M")
        .append("expect-mib=16")
        .finish();
    ended.passed();
}

#[test]
fn too_few_huge_pages_are_an_error_at_the_start_that_says_how_many_it_takes() {
    require_huge_pages!();
    let _pool = HugePagePool::new(1);
    // More than any host has set aside.
    let ended = Bantam::payload("hello")
        .option("--memory", "1000G")
        .option("--huge-pages", "2M")
        .finish();
    let reason = ended.failed_with_one_line();
    for part in [
        "cannot reserve 1024000 MiB of guest memory in pages of 2 MiB",
        "it takes 512000 pages",
        "sysctl vm.nr_hugepages=51",
    ] {
        assert!(reason.contains(part), "{ended}");
    }
}

#[test]
fn pages_that_another_machine_has_are_not_promised_again() {
    require_huge_pages!();
    let _pool = HugePagePool::new(16);
    let machine = hanging("2M");
    // The first machine has touched few of them, but has reserved all.
    let free: u64 = fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    assert!(free > 0);
    let mib = (free * 2).max(16);
    let ended = Bantam::payload("hello")
        .option("--memory", format!("{mib}M"))
        .option("--huge-pages", "2M")
        .finish();
    let reason = ended.failed_with_one_line();
    assert!(reason.contains("sysctl vm.nr_hugepages="), "{ended}");
    machine.signal(Signal::SIGTERM);
    machine.wait().succeeded();
}

#[test]
fn guests_run_on_transparent_huge_pages() {
    require_kvm!();
    let machine = hanging("transparent");
    assert!(has_mapping(&machine, "hg"));
    machine.signal(Signal::SIGTERM);
    machine.wait().succeeded();
    let machine = hanging("none");
    assert!(!has_mapping(&machine, "hg") && !has_mapping(&machine, "ht"));
    machine.signal(Signal::SIGTERM);
    machine.wait().succeeded();
}
