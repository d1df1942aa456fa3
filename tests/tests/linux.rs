//! Linux guests: the drivers of a real kernel work with the devices.
//!
//! A boot takes long on a host without hardware virtualization, so each guest does much.

use std::fs;
use std::io::{ErrorKind, PipeReader, Read, Write};
use std::net::{SocketAddrV4, TcpListener};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use bantam_tests::{
    Bantam, Ended, HostTap, Kernel, RootFileSystem, accept, after_random_work, answer,
    balloon_statistics, bzimages, configured, crc32, debian_kernel, device, device_metrics,
    first_difference, interface_exists, linux_slot, pattern, require_kvm, require_taps,
    scripted_root,
};
use bantam_vmm::config::{DiskConfig, MachineConfig};
use bantam_vmm::workarounds::guest_kernel_parameters;
use bantam_vmm::{
    BalloonStatistics, Console, Controller, DeviceAnswer, DeviceCommand, DeviceMetrics, ExitReason,
};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::Signal;
use tempfile::TempDir;

const MIB: usize = 1 << 20;

/// Returns a copy of the root file system, which a guest may write to.
fn root_disk(folder: &TempDir) -> PathBuf {
    let path = folder.path().join("root");
    fs::copy(RootFileSystem::new().ext4, &path).expect("there is room for a root file system");
    path
}

fn test_words(commands: &[&str]) -> String {
    format!("quiet bantam.mode=test bantam.test={}", commands.join(","))
}

/// Returns the value of `name=` among the details of an answer.
fn value<'a>(details: &'a str, name: &str) -> &'a str {
    details
        .split(' ')
        .find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
        .unwrap_or_else(|| panic!("no {name} in '{details}'"))
}

#[track_caller]
fn assert_words(details: &str, expected: &[&str]) {
    for word in expected {
        assert!(
            details.split(' ').any(|found| found == *word),
            "no {word} in '{details}'"
        );
    }
}

/// Init gets exactly the arguments of the options, in order, and its environment has only what a
/// host without hardware virtualization needs.
fn expected_arguments() -> String {
    let needed = guest_kernel_parameters().unwrap_or_default();
    let tunables = needed
        .split(' ')
        .find(|word| word.starts_with("GLIBC_TUNABLES="))
        .map(|word| format!(", {word:?}"))
        .unwrap_or_default();
    format!(
        "arguments=[\"/sbin/init\", \"one\", \"two words\", \"NAME=value\"] \
         environment=[\"HOME=/\", \"TERM=linux\"{tunables}]"
    )
}

// --- Time without the clock of KVM ----------------------------------------------------------------

/// Boots a kernel without KVM's clock, and checks that its time passes and its date is today's.
fn keep_time(words: &str) {
    let folder = tempfile::tempdir().expect("there is room for temporary files");
    let tests = test_words(&["clocksource", "time", "sleep:1000"]);
    let ended = Bantam::linux(Kernel::Full)
        .disk(&root_disk(&folder), "")
        .append(format!("{tests} no-kvmclock {words}"))
        .finish();
    ended.succeeded();
    let text = ended.text();
    assert_ne!(answer(&text, "clocksource"), "kvm-clock");
    assert_right_time(&answer(&text, "time"));
    answer(&text, "sleep:1000");
}

#[test]
fn linux_keeps_time_by_the_interval_timer_and_the_real_time_clock() {
    require_kvm!();
    keep_time("");
}

#[test]
fn linux_keeps_time_without_acpi() {
    require_kvm!();
    keep_time("acpi=off");
}

// --- Disks, entropy, time and the console -------------------------------------------------------

#[test]
fn linux_uses_disks_entropy_clock_and_console() {
    require_kvm!();
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let before = pattern(11, 0, 8 * MIB);
    fs::write(&data, &before).unwrap();
    let read_only = folder.path().join("read-only");
    let precious = pattern(12, 0, MIB);
    fs::write(&read_only, &precious).unwrap();

    let commands = [
        "arguments",
        "cpus",
        "clocksource",
        "time",
        "entropy",
        "rng:4096",
        "disk-info:vda",
        "disk-info:vdb",
        "disk-checksum:vdb",
        "disk-write-verify:vdb:1M:2M:13",
        "disk-zeroout:vdb:4M:1M",
        "disk-discard:vdb:6M:1M",
        "disk-info:vdc",
        "disk-checksum:vdc",
        "disk-write-refused:vdc",
        "echo-line",
    ];
    let mut machine = Bantam::linux(Kernel::Small)
        .disk(&root_disk(&folder), "")
        .disk(&data, ",id=data")
        .disk(&read_only, ",ro")
        .option("--append", "-- one \"two words\"")
        .append(test_words(&commands))
        .option("--append", "-- NAME=value")
        .stdin(Stdio::piped())
        .option("--log", "info")
        .start();
    machine.wait_for_output("bantam: echo-line waiting");
    machine.send(b"the quick brown fox\n");
    let ended = machine.wait();
    ended.succeeded();
    assert!(
        ended.stderr.contains("by the 64-bit Linux protocol"),
        "{ended}"
    );
    // A kernel without ACPI cannot switch the machine off.
    assert!(
        ended.stderr.contains("has ended: the guest has rebooted"),
        "{ended}"
    );
    let text = ended.text();
    let answer = |command| answer(&text, command);

    assert_eq!(answer("arguments"), expected_arguments());
    assert_eq!(value(&answer("cpus"), "online"), "1");
    assert!(!answer("clocksource").is_empty());
    assert_right_time(&answer("time"));
    answer("entropy");
    assert!(answer("rng:4096").starts_with("source=virtio_rng"));
    assert_words(&answer("disk-info:vda"), &["ro=0", "serial=disk0"]);
    let size = format!("size={}", before.len());
    assert_words(
        &answer("disk-info:vdb"),
        &[&size, "ro=0", "serial=data", "logical=512"],
    );
    for limit in ["discard-max", "write-zeroes-max"] {
        assert_ne!(value(&answer("disk-info:vdb"), limit), "0", "{limit}");
    }
    let checksum = |bytes: &[u8]| format!("{:08x}", crc32(bytes));
    assert_eq!(
        value(&answer("disk-checksum:vdb"), "crc32"),
        checksum(&before)
    );
    answer("disk-write-verify:vdb:1M:2M:13");
    answer("disk-zeroout:vdb:4M:1M");
    answer("disk-discard:vdb:6M:1M");
    assert_words(&answer("disk-info:vdc"), &["ro=1"]);
    assert_eq!(
        value(&answer("disk-checksum:vdc"), "crc32"),
        checksum(&precious)
    );
    answer("disk-write-refused:vdc");
    assert_eq!(answer("echo-line"), "the quick brown fox");

    let mut expected = before;
    expected[MIB..3 * MIB].copy_from_slice(&pattern(13, 0, 2 * MIB));
    expected[4 * MIB..5 * MIB].fill(0);
    let mut after = fs::read(&data).unwrap();
    // Discarded blocks may read as before or as zeroes.
    after[6 * MIB..7 * MIB].copy_from_slice(&expected[6 * MIB..7 * MIB]);
    assert_eq!(after.len(), expected.len());
    let wrong = after.iter().zip(&expected).position(|(a, b)| a != b);
    assert_eq!(wrong, None, "the byte there is not what the guest wrote");
    assert!(fs::read(&read_only).unwrap() == precious);
}

#[test]
fn linux_keeps_its_data_with_every_engine_and_cache_mode() {
    const SIZE: usize = 3 * MIB;
    const OPERATIONS: u32 = 8;
    require_kvm!();
    // On this folder's file system, as cache=none needs O_DIRECT.
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mut bantam = Bantam::linux(Kernel::Small).disk(&root_disk(&folder), "");
    let mut paths = Vec::new();
    for engine in ["auto", "io_uring", "sync"] {
        for cache in ["writeback", "writethrough", "none", "unsafe"] {
            let path = folder.path().join(format!("{engine}-{cache}"));
            fs::write(&path, pattern(paths.len() as u64, 0, SIZE)).unwrap();
            bantam = bantam.disk(&path, &format!(",engine={engine},cache={cache}"));
            paths.push(path);
        }
    }
    let names: Vec<_> = ('b'..)
        .take(paths.len())
        .map(|c| format!("vd{c}"))
        .collect();
    let command = format!("disk-verify-random:{}:0:{OPERATIONS}", names.join("+"));
    let ended = bantam.append(test_words(&[&command])).finish();
    let details = answer(&ended.succeeded().text(), &command);
    let block_sizes: Vec<usize> = value(&details, "block-sizes")
        .split('+')
        .map(|size| size.parse().expect("it is a number"))
        .collect();
    assert_eq!(block_sizes.len(), paths.len());
    for (seed, (path, block_size)) in (0..).zip(paths.iter().zip(block_sizes)) {
        let expected = after_random_work(seed, OPERATIONS, block_size, SIZE);
        let found = fs::read(path).unwrap();
        assert_eq!(found.len(), SIZE);
        let wrong = found.iter().zip(&expected).position(|(a, b)| a != b);
        assert_eq!(wrong, None, "the byte there of '{}'", path.display());
    }
}

/// Checks that the guest knows the time of day, within the duration of a boot.
#[track_caller]
fn assert_right_time(details: &str) {
    let wall: u64 = value(details, "wall").parse().expect("it is a number");
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .expect("it is after 1970");
    let difference = now.as_secs().abs_diff(wall);
    assert!(difference < 300, "the guest's clock is {difference} s off");
}

// --- The network --------------------------------------------------------------------------------

#[test]
fn linux_exchanges_data_with_the_host_by_tcp() {
    const LENGTH: usize = 4 * MIB;
    require_taps!();
    let tap = HostTap::new();
    let listen = || TcpListener::bind(SocketAddrV4::new(tap.host, 0)).unwrap();
    let (sink, source) = (listen(), listen());
    let port = |listener: &TcpListener| listener.local_addr().unwrap().port();

    let net = format!("net:eth0:{}/{}:{}", tap.guest, HostTap::PREFIX, tap.host);
    let send = format!("net-tcp-send:{}:{}:{LENGTH}:21", tap.host, port(&sink));
    let receive = format!("net-tcp-receive:{}:{}:{LENGTH}:22", tap.host, port(&source));
    let commands = [&net, "net-info:eth0", &send, &receive];
    let machine = Bantam::linux(Kernel::Small)
        .option("--initrd", RootFileSystem::new().initrd)
        .option("--net", format!("tap={},mac=52:54:00:12:34:56", tap.name))
        .append(test_words(&commands))
        .start();
    machine.wait_for_output(&format!("bantam: {net} ok"));

    let mut received = Vec::new();
    accept(&sink).read_to_end(&mut received).unwrap();
    assert_eq!(received.len(), LENGTH);
    assert_eq!(first_difference(21, 0, &received), None);
    accept(&source).write_all(&pattern(22, 0, LENGTH)).unwrap();

    let ended = machine.wait();
    let text = ended.succeeded().text();
    assert_words(
        &answer(&text, "net-info:eth0"),
        &["mac=52:54:00:12:34:56", "mtu=1500"],
    );
    for command in [&send, &receive] {
        assert_eq!(value(&answer(&text, command), "bytes"), LENGTH.to_string());
    }
    assert!(interface_exists(&tap.name));
}

// --- SMP and ACPI -------------------------------------------------------------------------------

#[test]
fn linux_runs_on_four_vcpus_reacts_to_its_owner_and_reboots() {
    require_kvm!();
    let folder = tempfile::tempdir().unwrap();
    let root = root_disk(&folder);
    let commands = [
        "cpus",
        "time",
        "platform-driver:vmgenid",
        "power-button",
        "ctrl-alt-del",
        "disk-info:vda",
        "reboot",
    ];
    let config = MachineConfig {
        cpus: "4".parse().unwrap(),
        disks: vec![DiskConfig::new(&root)],
        append: Some(test_words(&commands)),
        ..MachineConfig::new(Kernel::Full.vmlinux())
    };
    let _slot = linux_slot();
    let (machine, mut output) = started(config);
    // A guest that boots notices no pause.
    for _ in 0..5 {
        thread::sleep(Duration::from_millis(300));
        machine.pause().unwrap();
        thread::sleep(Duration::from_millis(100));
        machine.resume().unwrap();
    }
    let mut text = String::new();
    read_until(&mut output, &mut text, "bantam: power-button waiting");
    let larger = fs::metadata(&root).unwrap().len() + MIB as u64;
    fs::OpenOptions::new()
        .write(true)
        .open(&root)
        .unwrap()
        .set_len(larger)
        .unwrap();
    let updated = device(&machine, "disk0", DeviceCommand::UpdateSize);
    assert_eq!(updated.unwrap(), DeviceAnswer::Size(larger));
    assert!(device(&machine, "disk1", DeviceCommand::UpdateSize).is_err());
    machine.press_power_button().unwrap();
    read_until(&mut output, &mut text, "bantam: ctrl-alt-del waiting");
    // The kernel looks for the keyboard in the background.
    let deadline = Instant::now() + Duration::from_secs(30);
    while let Err(error) = machine.press_ctrl_alt_del() {
        assert!(Instant::now() < deadline, "{error}\n{text}");
        thread::sleep(Duration::from_millis(100));
    }
    read_until(&mut output, &mut text, "bantam: done");
    assert_eq!(machine.wait().unwrap(), ExitReason::Reboot);

    let cpus = answer(&text, "cpus");
    assert_words(&cpus, &["online=4", "packages=1"]);
    for number in 0..4 {
        // Each is a separate core.
        let topology = value(&cpus, &format!("cpu{number}"));
        assert_eq!(
            topology,
            format!("package:0;core:{number};siblings:{number}")
        );
    }
    assert_right_time(&answer(&text, "time"));
    assert_words(
        &answer(&text, "platform-driver:vmgenid"),
        &["devices=BNTM0001:00"],
    );
    answer(&text, "power-button");
    answer(&text, "ctrl-alt-del");
    assert_words(
        &answer(&text, "disk-info:vda"),
        &[&format!("size={larger}")],
    );
    answer(&text, "reboot");
}

// --- What becomes of a guest --------------------------------------------------------------------

#[test]
fn linux_without_acpi_reports_a_panic_and_a_number() {
    require_kvm!();
    let folder = tempfile::tempdir().unwrap();
    // The kernel panics when its first process ends.
    let script = "#!/bin/sh\n\
        if [ ! -e /second ]; then : >/second; sync; exit 9; fi\n\
        status=3; printf \"\\\\$(printf %o \"$status\")\" | dd of=/dev/port bs=1 seek=1280\n";
    let ended = Bantam::linux(Kernel::Small)
        .disk(&scripted_root(folder.path(), &[("test.sh", script)]), "")
        .append("quiet init=/test.sh")
        .option("--on-reboot", "restart")
        .option("--restart-limit", "1")
        .finish();
    ended.printed("Attempted to kill init! exitcode=0x00000900");
    assert!(
        ended.stderr.contains("the guest has panicked after"),
        "{ended}"
    );
    ended.has_status(3);
}

#[test]
fn linux_with_acpi_reports_to_the_panic_device() {
    require_kvm!();
    let folder = tempfile::tempdir().unwrap();
    // It would stop after a panic, and leaves nothing in memory.
    let ended = Bantam::linux(Kernel::Full)
        .disk(&root_disk(&folder), "")
        .append(format!(
            "panic=0 reboot=k {}",
            test_words(&["cpus", "panic"])
        ))
        .option("--cmdline", "console=ttyS0 root=/dev/vda rw")
        .finish();
    ended.printed("Attempted to kill init!").has_status(121);
    assert!(ended.stderr.contains("the guest has panicked"), "{ended}");
}

// --- The balloon --------------------------------------------------------------------------------

#[test]
fn linux_gives_memory_back_and_reports_how_much_it_has() {
    require_kvm!();
    let folder = tempfile::tempdir().unwrap();
    let config = MachineConfig {
        disks: vec![DiskConfig::new(root_disk(&folder))],
        // Linux reports free memory only while it has more than 128 MiB of it.
        memory: "256M".parse().unwrap(),
        balloon: Some("size=16M,reporting=on,statistics=1".parse().unwrap()),
        append: Some(test_words(&["memory", "sleep:240000"])),
        ..MachineConfig::new(Kernel::Small.vmlinux())
    };
    let _slot = linux_slot();
    let (machine, mut output) = started(config);
    let mut text = String::new();
    read_until(&mut output, &mut text, "bantam: memory ok");
    let DeviceMetrics::Balloon(metrics) = device_metrics(&machine, "balloon") else {
        panic!("it is a balloon");
    };
    let wait_for = |what: &str, is_so: &dyn Fn(&BalloonStatistics) -> bool| {
        let deadline = Instant::now() + Duration::from_secs(120);
        loop {
            let statistics = balloon_statistics(&machine);
            if is_so(&statistics) {
                return statistics;
            }
            assert!(
                Instant::now() < deadline,
                "{what} never came: {statistics:?}"
            );
            thread::sleep(Duration::from_millis(20));
        }
    };
    let mut totals = Vec::new();
    for mib in [16, 40, 8] {
        device(&machine, "balloon", DeviceCommand::SetBalloonTarget { mib }).unwrap();
        wait_for("the balloon's size", &|now| now.actual_mib == mib);
        // Reports under way may be older.
        let seen = metrics.stats_updates_count.total();
        let after = wait_for("statistics", &|_| {
            metrics.stats_updates_count.total() >= seen + 2
        });
        // Memory in the balloon does not count as memory of the guest.
        totals.push(after.guest.total_memory.expect("Linux says it"));
        let free = after.guest.free_memory.expect("Linux says it");
        assert!(free > 0 && free <= totals[0], "{after:?}");
    }
    assert_eq!(totals[0] - totals[1], 24 * MIB as u64);
    assert_eq!(totals[2] - totals[1], 32 * MIB as u64);
    let freed = || metrics.free_page_report_freed.total();
    wait_for("a report of free pages", &|_| freed() > 0);
    assert_eq!(metrics.event_fails.total(), 0);
    machine.stop();
    assert_eq!(machine.wait().unwrap(), ExitReason::Stopped);
}

// --- What the tests share -----------------------------------------------------------------------

fn started(config: MachineConfig) -> (Controller, PipeReader) {
    let (output, writer) = std::io::pipe().expect("there are pipes");
    for end in [output.as_fd(), writer.as_fd()] {
        fcntl(end, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).expect("pipes can be non-blocking");
    }
    let console = Console {
        input: None,
        output: Some(writer.into()),
    };
    let machine = configured(config, console);
    machine.start().unwrap_or_else(|error| panic!("{error}"));
    (machine, output)
}

fn read_until(output: &mut impl Read, text: &mut String, wanted: &str) {
    let deadline = Instant::now() + Duration::from_secs(240);
    while !text.contains(wanted) {
        let mut bytes = [0; 4096];
        match output.read(&mut bytes) {
            Ok(count @ 1..) => text.push_str(&String::from_utf8_lossy(&bytes[..count])),
            Err(error) if error.kind() == ErrorKind::WouldBlock && Instant::now() < deadline => {
                thread::sleep(Duration::from_millis(20));
            }
            other => panic!("no '{wanted}' came ({other:?}) but\n{text}"),
        }
    }
}

#[test]
fn linux_boots_from_an_initrd_and_switches_the_machine_off() {
    require_kvm!();
    let ended = Bantam::linux(Kernel::Full)
        .option("--initrd", RootFileSystem::new().initrd)
        .option("--memory", "128M")
        .option("--boot-protocol", "pvh")
        .append(test_words(&["first-line", "memory", "poweroff"]))
        .option("--log", "info")
        .finish();
    let text = ended.succeeded().text();
    answer(&text, "first-line");
    let memory = answer(&text, "memory");
    let kib: u64 = value(&memory, "total")
        .trim_end_matches("kB")
        .parse()
        .unwrap();
    assert!((90 << 10..128 << 10).contains(&kib), "{memory}");
    assert!(!text.contains("PCI: Fatal"), "{text}");
    assert!(ended.stderr.contains("by PVH"), "{ended}");
    assert!(
        ended
            .stderr
            .contains("has ended: the guest has powered off"),
        "{ended}"
    );
}

/// Without the monitor's seed they are ready only long after the first are used.
#[test]
fn linux_has_good_random_numbers_from_the_start() {
    require_kvm!();
    let _slot = linux_slot();
    let machine = Bantam::run(Kernel::Small.vmlinux())
        .append("earlyprintk=ttyS0")
        .start();
    machine.wait_for_output("Kernel command line:");
    machine.signal(Signal::SIGTERM);
    let ended = machine.wait();
    ended.succeeded().printed("random: crng init done");
}

/// With one word more than init has room for, the kernel panics as the log warned.
#[test]
fn more_words_than_linux_init_takes_are_warned_of() {
    require_kvm!();
    let words: String = (0..33).map(|number| format!("word{number} ")).collect();
    let ended = Bantam::linux(Kernel::Small).append(words).finish();
    // The kernel panics.
    ended
        .has_status(121)
        .printed("Too many boot init vars at `word32'");
    let warning = "more than 32 words without a value";
    assert!(ended.stderr.contains(warning), "{ended}");
}

// --- Kernel images ------------------------------------------------------------------------------

/// Boots a kernel up to its first line, and stops it.
fn first_line(kernel: &Path) -> Ended {
    let _slot = linux_slot();
    let machine = Bantam::run(kernel)
        .append("earlyprintk=ttyS0")
        .option("--log", "info")
        .start();
    machine.wait_for_output("Linux version ");
    machine.wait_for_output("\n");
    machine.signal(Signal::SIGTERM);
    let ended = machine.wait();
    ended.succeeded();
    ended
}

#[test]
fn linux_bzimages_of_every_compression_start() {
    require_kvm!();
    let images = bzimages();
    assert_eq!(images.len(), 7);
    for image in images {
        let ended = first_line(&image);
        let compression = image.extension().unwrap().to_str().unwrap();
        let format = format!("bzImage ({compression})");
        assert!(ended.stderr.contains(&format), "{ended}");
        ended.printed("Linux version 6.12.");
    }
}

#[test]
fn the_kernel_that_debian_ships_starts() {
    require_kvm!();
    first_line(&debian_kernel()).printed("Linux version 6.1.");
}

#[test]
fn linux_knows_its_machine_by_smbios() {
    require_kvm!();
    let _slot = linux_slot();
    // The project's own kernels do without.
    let machine = Bantam::run(debian_kernel())
        .append("earlyprintk=ttyS0")
        .option(
            "--smbios",
            "manufacturer=Maker,product=Box,uuid=123e4567-e89b-12d3-a456-426614174000",
        )
        .start();
    machine.wait_for_output("SMBIOS 3.2.0 present");
    machine.wait_for_output("DMI: Maker Box, BIOS ");
    machine.signal(Signal::SIGTERM);
    machine.wait().succeeded();
}
