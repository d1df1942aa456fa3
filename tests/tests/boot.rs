//! How bare-metal kernels are loaded and entered, and the machine that they find.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use bantam_tests::{
    Bantam, BzImage, Compression, Ended, elf_kernel, monitor, payload, require_kvm,
};
use bantam_vmm::workarounds::guest_kernel_parameters;
use tempfile::TempDir;

/// Returns a folder with a file that holds `bytes`.
fn file_with(bytes: &[u8]) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("there is a folder for temporary files");
    let path = folder.path().join("kernel");
    fs::write(&path, bytes).expect("it can be written to");
    (folder, path)
}

#[track_caller]
fn entered_by(ended: &Ended, protocol: &str) {
    ended
        .passed()
        .printed(&format!("hello from ring 3 via {protocol}\n"));
}

#[test]
fn check_says_that_machines_can_run_here() {
    require_kvm!();
    let output = Command::new(monitor()).arg("check").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}");
    assert!(text.contains("/dev/kvm"), "{text}");
}

#[test]
fn an_elf_with_a_pvh_note_is_entered_by_pvh() {
    require_kvm!();
    entered_by(&Bantam::payload("hello").finish(), "pvh");
}

#[test]
fn an_elf_is_entered_by_the_protocol_asked_for() {
    require_kvm!();
    for (option, protocol) in [("pvh", "pvh"), ("linux64", "linux64")] {
        let bantam = Bantam::payload("hello").option("--boot-protocol", option);
        entered_by(&bantam.finish(), protocol);
    }
}

#[test]
fn an_elf_without_a_pvh_note_is_entered_by_linux64() {
    require_kvm!();
    let (_folder, kernel) = file_with(&elf_kernel(&print_and_reset("by 64-bit entry\n")));
    let ended = Bantam::run(kernel).finish();
    ended.succeeded();
    assert_eq!(ended.text(), "by 64-bit entry\n");
}

#[test]
fn a_bzimage_is_decompressed_by_the_monitor_whatever_its_compression() {
    require_kvm!();
    let elf = fs::read(payload("hello")).unwrap();
    for compression in Compression::ALL {
        // Its entry code is empty: a machine that runs it would not print anything.
        let image = BzImage {
            payload: compression.compress(&elf),
            ..BzImage::default()
        };
        let (_folder, kernel) = file_with(&image.build());
        for (option, protocol) in [("auto", "pvh"), ("linux64", "linux64")] {
            let ended = Bantam::run(&kernel)
                .option("--boot-protocol", option)
                .option("--log", "info")
                .finish();
            entered_by(&ended, protocol);
            let format = format!("bzImage ({})", format!("{compression:?}").to_lowercase());
            assert!(ended.stderr.contains(&format), "{ended}");
        }
    }
}

#[test]
fn a_bzimage_of_unknown_compression_decompresses_itself() {
    require_kvm!();
    let image = BzImage {
        payload: b"packed in a way that nobody knows".to_vec(),
        entry_code: print_and_reset("unpacking\n"),
    };
    let (_folder, kernel) = file_with(&image.build());
    let ended = Bantam::run(kernel).finish();
    ended.succeeded();
    assert_eq!(ended.text(), "unpacking\n", "{ended}");
    assert!(ended.stderr.contains("decompress itself"), "{ended}");
}

/// Returns position-independent 64-bit machine code that prints a text of at most 127 bytes on the
/// serial port and resets the machine by the keyboard controller.
fn print_and_reset(text: &str) -> Vec<u8> {
    let size = u8::try_from(text.len()).expect("the text is short");
    let mut code = vec![
        0xfc, // cld
        0x48, 0x8d, 0x35, 0x13, 0, 0, 0, // lea rsi, [rip + text]
        0xb9, size, 0, 0, 0, // mov ecx, size
        0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0xac, // next: lodsb
        0xee, // out dx, al
        0xe2, 0xfc, // loop next
        0xb0, 0xfe, // mov al, 0xfe
        0xe6, 0x64, // out 0x64, al
        0xeb, 0xfe, // stay: jmp stay
    ];
    code.extend(text.bytes());
    code
}

#[test]
fn memory_of_any_size_is_where_the_map_says() {
    require_kvm!();
    // On both sides of the hole for devices, which starts at 3 GiB, and without memory above it.
    for mib in [16, 64, 3072, 3584, 5120] {
        for protocol in ["pvh", "linux64"] {
            let ended = Bantam::payload("memory")
                .option("--memory", format!("{mib}M"))
                .option("--boot-protocol", protocol)
                .append(format!("expect-mib={mib}"))
                .finish();
            ended.passed();
        }
    }
}

#[test]
fn a_wrong_amount_of_memory_would_be_noticed() {
    require_kvm!();
    let ended = Bantam::payload("memory")
        .option("--memory", "64M")
        .append("expect-mib=65")
        .finish();
    ended.succeeded().printed("FAIL: the RAM adds up to 65 MiB");
}

#[test]
fn every_vcpu_is_listed_and_starts() {
    require_kvm!();
    for count in [1, 2, 5, 32] {
        let ended = Bantam::payload("cpus")
            .option("--cpus", count.to_string())
            .append(format!("expect={count} require=both"))
            .finish();
        ended.passed().printed(&format!("{count} processors run"));
    }
}

#[test]
fn the_command_line_is_the_default_one_with_what_is_appended() {
    require_kvm!();
    let ended = Bantam::payload("hello").append("one  two=2").finish();
    let line = command_line(&ended);
    assert!(
        line.starts_with("reboot=panic_warm,k panic=-1 console=ttyS0 one  two=2"),
        "{line}"
    );
    // The entropy device.
    assert!(line.contains("virtio_mmio.device="), "{line}");
}

#[test]
fn the_command_line_can_be_replaced() {
    require_kvm!();
    let ended = Bantam::payload("hello")
        .option("--cmdline", "alone")
        .option("--rng", "off")
        .option("--host-workarounds", "off")
        .finish();
    assert_eq!(command_line(&ended), "alone");
}

#[test]
fn host_workarounds_are_left_out_on_request() {
    require_kvm!();
    let workaround = "clearcpuid=";
    let without = Bantam::payload("hello").option("--host-workarounds", "off");
    assert!(!command_line(&without.finish()).contains(workaround));

    let needed = guest_kernel_parameters().is_some();
    let with = command_line(&Bantam::payload("hello").finish());
    assert_eq!(with.contains(workaround), needed, "{with}");
}

fn command_line(ended: &Ended) -> String {
    let text = ended.passed().text();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("command line: "));
    line.unwrap_or_else(|| panic!("no command line in\n{ended}"))
        .to_owned()
}
