//! Tests of machine files, of how sources combine, and of what is valid together.

mod round_trip;

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use bantam_devices::rate_limiter::RateLimit;
use proptest::prelude::*;
use toml::Value;

use super::*;

fn table(text: &str) -> Result<MachineTable, String> {
    MachineTable::from_toml(text, Path::new("/vm/machine.toml")).map_err(|error| error.to_string())
}

fn config(text: &str) -> Result<MachineConfig, String> {
    table(text)?
        .into_config()
        .map_err(|error| error.to_string())
}

#[test]
fn a_kernel_is_enough() {
    assert_eq!(
        config("kernel = 'vmlinux'"),
        Ok(MachineConfig::new("/vm/vmlinux"))
    );
    let config = MachineConfig::new("/vm/vmlinux");
    assert_eq!((config.cpus.get(), config.memory.bytes()), (1, 256 << 20));
    assert_eq!(config.serial, SerialConfig::Stdio);
    assert!(config.rng.is_some() && config.host_workarounds);
}

#[test]
fn a_machine_file_says_everything_and_its_paths_are_relative_to_it() {
    let config = config(
        r#"
        kernel = "vmlinux"
        initrd = "/boot/initrd"
        cmdline = "console=ttyS0"
        append = "quiet"
        cpus = 2
        memory = "512M"
        huge-pages = "transparent"
        serial = "file=logs/serial.log"
        console = "socket=console.sock"
        rng = false
        boot-protocol = "linux64"
        on-reboot = "restart"
        restart-limit = 3
        shutdown-timeout = "500ms"
        exit-status = "monitor"
        on-halt = "exit"
        host-workarounds = false
        seccomp = "log"
        landlock = false
        coredump = true

        [[disk]]
        path = "root,1.img"
        readonly = true
        id = "root"

        [[disk]]
        path = "/data.img"

        [[net]]
        tap = "tap0"
        mac = "52:54:00:12:34:56"
        mtu = 1500
        queues = 2

        [[channel]]
        name = "org.example.agent"
        socket = "agent.sock"

        [[channel]]
        name = "log"
        pty = true

        [balloon]
        size = "64M"
        deflate-on-oom = true
        reporting = true
        statistics = 5

        [vsock]
        cid = 3
        socket = "v.sock"
        "#,
    );
    let expected = MachineConfig {
        kernel: "/vm/vmlinux".into(),
        initrd: Some("/boot/initrd".into()),
        cmdline: Some("console=ttyS0".into()),
        append: Some("quiet".into()),
        cpus: "2".parse().unwrap(),
        memory: "512M".parse().unwrap(),
        huge_pages: HugePages::Transparent,
        disks: vec![
            "/vm/root,,1.img,ro,id=root".parse().unwrap(),
            DiskConfig::new("/data.img"),
        ],
        nets: vec![
            "tap=tap0,mac=52:54:00:12:34:56,mtu=1500,queues=2"
                .parse()
                .unwrap(),
        ],
        vsock: Some("cid=3,socket=/vm/v.sock".parse().unwrap()),
        metadata: None,
        serial: SerialConfig::File("/vm/logs/serial.log".into()),
        console: SerialConfig::Socket("/vm/console.sock".into()),
        channels: vec![
            "name=org.example.agent,socket=/vm/agent.sock"
                .parse()
                .unwrap(),
            "name=log,pty".parse().unwrap(),
        ],
        rng: None,
        balloon: Some(
            "size=64M,deflate-on-oom=on,reporting=on,statistics=5"
                .parse()
                .unwrap(),
        ),
        boot_protocol: BootProtocolOption::Linux64,
        on_reboot: OnReboot::Restart,
        restart_limit: Some(3),
        shutdown_timeout: "500ms".parse().unwrap(),
        exit_status: ExitStatus::Monitor,
        on_halt: OnHalt::Exit,
        host_workarounds: false,
        seccomp: Seccomp::Log,
        landlock: false,
        coredump: true,
        ..MachineConfig::new("unused")
    };
    assert_eq!(config, Ok(expected));
}

#[test]
fn errors_in_a_machine_file_name_the_line() {
    for (text, expected) in [
        (
            "kernel = 'k'\nmemroy = 5",
            "/vm/machine.toml:2: unknown option 'memroy', expected one of 'kernel', 'initrd', \
             'cmdline', 'append', 'cpus', 'smt', 'cpu', 'memory', 'huge-pages', 'disk', 'net', \
             'vsock', 'metadata', 'smbios', 'serial', 'serial-limit', 'console', 'channel', 'rng', \
             'balloon', 'boot-protocol', 'on-reboot', 'restart-limit', 'shutdown-timeout', 'exit-status', \
             'on-halt', 'host-workarounds', 'boot-timer', 'track-dirty-pages', 'seccomp', \
             'landlock', 'coredump', 'cgroup', 'gdb'",
        ),
        (
            "[[disk]]\npath = 'a'\n\n[[disk]]\npath = 'b'\nsize = 1",
            "/vm/machine.toml:6: unknown option 'size', expected one of 'path', 'readonly', 'ro', \
             'id', 'name', 'cache', 'engine', 'format', 'backing', 'block-size', 'lock', 'queues', 'iothread', \
             'poll', 'burst-bytes', 'burst-operations', 'bytes-per-second', 'limits', \
             'operations-per-second', 'any-size'",
        ),
        (
            "\n[[disk]]\nreadonly = true",
            "/vm/machine.toml:2: missing option 'path'",
        ),
        (
            "[[net]]\ntap = 't'\nmtu = 5",
            "/vm/machine.toml:3: mtu 5 is out of range: 68 to 65521",
        ),
        (
            "[vsock]\ncid = 2\nsocket = 'v'",
            "/vm/machine.toml:2: cid 2 is out of range: 3 to 4294967294",
        ),
        (
            "cpus = 1000",
            "/vm/machine.toml:1: invalid number of vCPUs '1000': expected 1 to 32",
        ),
        (
            "cpus = 'two'",
            "/vm/machine.toml:1: invalid type: string \"two\", expected a whole number",
        ),
        (
            "memory = '1M'",
            "/vm/machine.toml:1: memory size 1M is out of range: 16M to 1023G",
        ),
        (
            "memory = -1",
            "/vm/machine.toml:1: memory size -1M is out of range: 16M to 1023G",
        ),
        (
            "memory = 1.5",
            "/vm/machine.toml:1: invalid type: floating point `1.5`, expected a memory size such \
             as \"512M\"",
        ),
        (
            "\n[balloon]\nreporting = true",
            "/vm/machine.toml:2: missing option 'size'",
        ),
        (
            "balloon = '64M'",
            "/vm/machine.toml:1: invalid type: string \"64M\", expected a table: [balloon] and below \
             it its keys",
        ),
        (
            "[balloon]\nsize = -1",
            "/vm/machine.toml:2: invalid balloon size '-1': expected whole MiB, such as 64M or 0",
        ),
        (
            "kernel = 'k'\n\n[disk]\npath = 'a'",
            "/vm/machine.toml:3: there can be several of these tables: write [[disk]] in place of \
             [disk]",
        ),
        (
            "disk = 'a.img'",
            "/vm/machine.toml:1: invalid type: string \"a.img\", expected a table for each: \
             [[disk]] and below it path = \"disk.img\"",
        ),
        (
            "disk = ['a.img']",
            "/vm/machine.toml:1: invalid type: string \"a.img\", expected a disk: a table with a \
             path",
        ),
        (
            "[net]\ntap = 't'",
            "/vm/machine.toml:1: there can be several of these tables: write [[net]] in place of \
             [net]",
        ),
        (
            "[[vsock]]\ncid = 3\nsocket = 's'",
            "/vm/machine.toml:1: there can be one of these tables: write [vsock] in place of \
             [[vsock]]",
        ),
        (
            "[[balloon]]\nsize = 3",
            "/vm/machine.toml:1: there can be one of these tables: write [balloon] in place of \
             [[balloon]]",
        ),
        (
            "append = 3",
            "/vm/machine.toml:1: invalid type: integer `3`, expected a string or a list of strings",
        ),
        (
            "append = ['a', 3]",
            "/vm/machine.toml:1: invalid type: integer `3`, expected a string",
        ),
        (
            "rng = 'on'",
            "/vm/machine.toml:1: invalid type: string \"on\", expected a boolean",
        ),
        (
            "[rng]\nlimit = 5",
            "/vm/machine.toml:2: unknown option 'limit', expected one of 'burst-bytes', \
             'burst-operations', 'bytes-per-second', 'limits', 'operations-per-second'",
        ),
        (
            "[[disk]]\npath = 'a'\nburst-bytes = 0",
            "/vm/machine.toml:3: invalid quantity '0': expected a number from 1 on, such as 500 or 10M",
        ),
        (
            "[[disk]]\npath = 'a'\nlimits = 5",
            "/vm/machine.toml:3: invalid type: integer `5`, expected limits: a table with bytes and \
             operations",
        ),
        (
            "[[disk]]\npath = 'a'\nburst-bytes = 5\n[disk.limits.operations]\nper-second = 5",
            "/vm/machine.toml:1: both burst-bytes and limits are given: give all limits of the device \
             in one way",
        ),
        (
            "[[net]]\ntap = 'a'\n[net.limits.receive]\nbytes = { size = 5, per-second = 5 }",
            "/vm/machine.toml:4: a limit is per-second, perhaps with burst, or size with refill-time, \
             perhaps with one-time-burst: give one of the two",
        ),
        (
            "serial-limit = { size = 5, refill-time = '5' }",
            "/vm/machine.toml:1: invalid time '5' to refill: expected one such as 100ms, 1s or 250us",
        ),
        (
            "[[net]]\ntap = 'a'\nname = 'a b'",
            "/vm/machine.toml:3: invalid device name 'a b': expected 1 to 64 letters, digits and '.', \
             '-', '_'",
        ),
        (
            "\n[metadata]\nnets = ['net0']\ncontents = '{'",
            "/vm/machine.toml:4: the metadata is not JSON: EOF while parsing an object at line 1 \
             column 1",
        ),
        (
            "[cpu]\nmsrs = [{ index = 0x10a, mask = '0x1g', value = 0 }]",
            "/vm/machine.toml:2: invalid number '0x1g': expected one of 64 bits, such as 500 or \
             0xffffffffffffffff",
        ),
        (
            "on-reboot = 'stop'",
            "/vm/machine.toml:1: unknown variant 'stop', expected 'exit' or 'restart'",
        ),
    ] {
        assert_eq!(table(text).unwrap_err(), expected.replace('`', "'"));
    }
    let broken = table("kernel = 'k'\ncpus =\n").unwrap_err();
    assert!(broken.starts_with("/vm/machine.toml:2: "), "{broken}");
    assert!(!broken.contains('\n'), "{broken}");
}

#[test]
fn what_only_a_machine_file_says_reaches_the_machine() {
    let config = config(
        r#"
        kernel = "vmlinux"
        cpus = 2
        smt = true
        serial-limit = { per-second = "1K" }
        boot-timer = true
        gdb = "unix:gdb.sock"

        [[disk]]
        path = "a.img"
        name = "root"
        any-size = true
        lock = "where-possible"
        limits.bytes = { size = 5, refill-time = "1m", one-time-burst = "0xffffffffffffffff" }
        limits.operations = { per-second = 10, burst = 20 }

        [[net]]
        tap = "tap0"
        tx-packets-per-second = 7

        [vsock]
        cid = { unchecked = 1 }
        socket = "v"

        [rng]
        bytes-per-second = "4K"

        [metadata]
        nets = ["net0"]
        version = "v2"
        address = "169.254.1.1"
        imds-compat = true
        size-limit = 1000
        contents = '{"a": null}'

        [cpu]
        cpuid = [{ leaf = 1, register = "ecx", mask = 2, value = 0 }]
        msrs = [{ index = 0x10a, mask = "0x8000000000000000", value = 0 }]
        required-capabilities = [121]
        "#,
    );
    let rate = |per_second: i64, burst: Option<i64>| LimitConfig::Rate {
        per_second: Some(per_second.try_into().unwrap()),
        burst: burst.map(|burst| burst.try_into().unwrap()),
    };
    let mut net = NetConfig::new("tap0".to_owned().try_into().unwrap());
    net.limits.transmit.operations = rate(7, None);
    let mut metadata = MetadataConfig::new(vec!["net0".parse().unwrap()]);
    metadata.version = MetadataVersion::V2;
    metadata.address = std::net::Ipv4Addr::new(169, 254, 1, 1).try_into().unwrap();
    metadata.imds_compat = true;
    metadata.size_limit = 1000;
    metadata.contents = Some(serde_json::json!({"a": null}));
    let expected = MachineConfig {
        cpus: "2".parse().unwrap(),
        smt: true,
        cpu: CpuModifiers {
            cpuid: vec![CpuidModifier {
                leaf: 1,
                subleaf: 0,
                flags: 0,
                register: CpuidRegister::Ecx,
                mask: 2,
                value: 0,
            }],
            msrs: vec![MsrModifier {
                index: 0x10a,
                mask: 1 << 63,
                value: 0,
            }],
            required_capabilities: vec![121],
        },
        disks: vec![DiskConfig {
            name: Some("root".parse().unwrap()),
            lock: DiskLockOption::WherePossible,
            any_size: true,
            limits: LimitsConfig {
                bytes: LimitConfig::Bucket(RateLimit {
                    size: 5,
                    refill_time: Duration::from_secs(60),
                    one_time_burst: u64::MAX,
                }),
                operations: rate(10, Some(20)),
            },
            ..DiskConfig::new("/vm/a.img")
        }],
        nets: vec![net],
        vsock: Some(VsockConfig {
            cid: GuestCid::unchecked(1),
            socket: "/vm/v".into(),
        }),
        metadata: Some(metadata),
        serial_limit: rate(1024, None),
        rng: Some(LimitedDevice {
            limits: LimitsConfig {
                bytes: rate(4096, None),
                operations: LimitConfig::default(),
            },
        }),
        boot_timer: true,
        gdb: Some(GdbConfig::Unix("/vm/gdb.sock".into())),
        ..MachineConfig::new("/vm/vmlinux")
    };
    assert_eq!(config, Ok(expected));
}

#[test]
fn a_rate_is_a_bucket_of_a_tenth_of_a_second_or_of_its_burst() {
    let limit = |text: &str| {
        let disk: DiskConfig = text.parse().unwrap();
        disk.limits.bytes.rate_limit()
    };
    assert_eq!(limit("a"), None);
    assert_eq!(
        limit("a,bytes-per-second=1000"),
        Some(RateLimit::per_second(1000, None))
    );
    assert_eq!(
        limit("a,burst-bytes=5,bytes-per-second=1000"),
        Some(RateLimit::per_second(1000, Some(5)))
    );
}

#[test]
fn devices_have_names_of_their_own() {
    let names = |text: &str| {
        let config = config(&format!("kernel = 'k'\n{text}"))?;
        let names = config.disk_names().chain(config.net_names());
        Ok::<_, String>(names.map(|name| name.to_string()).collect::<Vec<_>>())
    };
    let devices = "[[disk]]\npath = 'a'\nid = 'root'\n[[disk]]\npath = 'b'\n[[net]]\ntap = 't'\n";
    assert_eq!(
        names(devices),
        Ok(vec!["root".into(), "disk1".into(), "net0".into()])
    );
    for (name, error) in [
        ("root", "device name 'root' is given twice: "),
        (
            "disk1",
            "device name 'disk1' is what another device is called by its place: ",
        ),
        (
            "rng",
            "device name 'rng' is that of another kind of device: ",
        ),
    ] {
        let refused = names(&format!("{devices}name = '{name}'")).unwrap_err();
        assert!(refused.starts_with(error), "{refused}");
    }
}

#[test]
fn only_files_that_are_the_same_need_a_look_at_the_file_system() {
    let twice = ["/dev/null", "/dev/../dev/null"].map(DiskConfig::new);
    let config = MachineConfig {
        disks: twice.to_vec(),
        ..MachineConfig::new("k")
    };
    config.validate_values().unwrap();
    assert!(matches!(
        config.validate_files(),
        Err(ConfigError::RepeatedDisk { .. })
    ));
}

#[test]
fn a_name_of_a_place_that_two_devices_are_given_is_given_twice() {
    let twice = ["a", "b"].map(|path| DiskConfig {
        name: Some("disk7".parse().unwrap()),
        ..DiskConfig::new(path)
    });
    let config = MachineConfig {
        disks: twice.to_vec(),
        ..MachineConfig::new("k")
    };
    let error = config.validate_values().unwrap_err().to_string();
    assert!(error.contains("'disk7' is given twice"), "{error}");
}

#[test]
fn the_guest_cannot_write_what_it_boots_from() {
    let with = |readonly, initrd: Option<&str>, kernel| MachineConfig {
        disks: vec![DiskConfig {
            readonly,
            ..DiskConfig::new("/dev/../dev/null")
        }],
        initrd: initrd.map(Into::into),
        ..MachineConfig::new(kernel)
    };
    for (config, what) in [
        (with(false, None, "/dev/null"), "kernel"),
        (with(false, Some("/dev/null"), "k"), "initrd"),
    ] {
        let error = config.validate_files().unwrap_err().to_string();
        assert!(
            error.starts_with(&format!("the {what} '/dev/null' is also a disk")),
            "{error}"
        );
    }
    with(true, Some("/dev/null"), "/dev/null")
        .validate_files()
        .unwrap();
}

#[test]
fn numbers_out_of_range_are_told_their_range() {
    for (text, message) in [
        (
            "kernel = [300]",
            "300 is not a byte: a list of numbers from 0 to 255 is a path that is not UTF-8",
        ),
        (
            "restart-limit = -1",
            "expected a number from 0 to 4294967295",
        ),
    ] {
        let error = config(text).unwrap_err();
        assert!(error.contains(message), "{error}");
    }
}

#[test]
fn a_socket_leads_to_one_device() {
    let config = MachineConfig {
        vsock: Some(VsockConfig {
            cid: GuestCid::unchecked(3),
            socket: "/tmp/../tmp/bantam-none.socket".into(),
        }),
        serial: SerialConfig::Socket("/tmp/bantam-none.socket".into()),
        ..MachineConfig::new("k")
    };
    let error = config.validate_files().unwrap_err();
    assert!(matches!(error, ConfigError::RepeatedEnd { .. }), "{error}");
}

#[test]
fn a_kernel_without_a_name_is_none() {
    for text in ["", "kernel = ''"] {
        let error = config(text).unwrap_err();
        assert!(error.starts_with("no kernel given"), "{error}");
    }
}

#[test]
fn texts_to_append_keep_arguments_of_init_behind_kernel_parameters() {
    let append = |text: &str| {
        let text = format!("kernel = 'k'\n{text}");
        config(&text).map(|config| config.append)
    };
    assert_eq!(append("append = 'quiet'"), Ok(Some("quiet".to_owned())));
    assert_eq!(
        append("append = ['a -- b', 'c', '-- \"d e\"']"),
        Ok(Some("a c -- b \"d e\"".to_owned()))
    );
    let unclosed = append("append = ['\"a', 'b\"']").unwrap_err();
    assert!(unclosed.contains("unclosed double quote"), "{unclosed}");
}

#[test]
fn relative_paths_of_a_pipe_are_relative_to_the_current_folder() {
    let (reader, mut writer) = std::io::pipe().unwrap();
    std::io::Write::write_all(&mut writer, "\u{feff}kernel = 'k'".as_bytes()).unwrap();
    drop(writer);
    let path = format!("/dev/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&reader));
    let table = MachineTable::from_file(Path::new(&path)).unwrap();
    assert_eq!(table.into_config().unwrap().kernel, Path::new("k"));
}

#[test]
fn an_integer_memory_size_counts_mebibytes() {
    assert_eq!(
        config("kernel = 'k'\nmemory = 512").unwrap().memory.bytes(),
        512 << 20
    );
}

#[test]
fn the_first_source_wins_and_lists_are_not_mixed() {
    let file = table(
        "kernel = 'file'\ncpus = 4\nrng = false\n[[disk]]\npath = '/a'\n[[net]]\ntap = 'tap0'",
    )
    .unwrap();
    let command_line = HashMap::from([
        ("kernel", Value::from("line")),
        ("rng", Value::from(true)),
        (
            "disk",
            Value::try_from(vec![DiskConfig::new("/b")]).unwrap(),
        ),
    ]);
    let command_line = MachineTable::from_options(&command_line).unwrap();
    let config = command_line.over(file).into_config().unwrap();
    assert_eq!(config.kernel, Path::new("line"));
    assert_eq!(config.cpus.get(), 4);
    assert!(config.rng.is_some());
    assert_eq!(config.disks, [DiskConfig::new("/b")]);
    assert_eq!(config.nets.len(), 1);
}

#[test]
fn a_missing_kernel_or_machine_file_is_reported() {
    let error = MachineTable::default()
        .into_config()
        .unwrap_err()
        .to_string();
    assert!(error.starts_with("no kernel given"), "{error}");
    let error = MachineTable::from_file(Path::new("/nonexistent.toml"))
        .unwrap_err()
        .to_string();
    assert_eq!(
        error,
        "cannot read machine file '/nonexistent.toml': No such file or directory (os error 2)"
    );
    let error = MachineTable::from_file(Path::new("/dev/zero"))
        .unwrap_err()
        .to_string();
    assert_eq!(
        error,
        "cannot read machine file '/dev/zero': it is larger than 1 MiB"
    );
}

#[test]
fn memory_is_whole_huge_pages() {
    for (memory, huge_pages, valid) in [
        ("64M", HugePages::TwoMib, true),
        ("65M", HugePages::TwoMib, false),
        ("65M", HugePages::Transparent, true),
    ] {
        let config = MachineConfig {
            memory: memory.parse().unwrap(),
            huge_pages,
            ..MachineConfig::new("k")
        };
        let result = config.validate().map_err(|error| error.to_string());
        let error = "memory size 65M is not a multiple of 2M, which the huge pages have";
        assert_eq!(
            result,
            if valid {
                Ok(())
            } else {
                Err(error.to_string())
            }
        );
    }
}

#[test]
fn threads_of_a_core_come_in_pairs() {
    for (count, smt, valid) in [
        (1, true, true),
        (4, true, true),
        (3, true, false),
        (3, false, true),
    ] {
        let config = MachineConfig {
            cpus: VcpuCount::try_from(count).unwrap(),
            smt,
            ..MachineConfig::new("k")
        };
        let refused = matches!(
            config.validate(),
            Err(ConfigError::UnpairedVcpu { count: 3 })
        );
        assert_eq!(refused, !valid, "{count} vCPUs, {smt}");
    }
}

fn with_disks(disks: &[&str]) -> Result<(), String> {
    let disks = disks.iter().map(|disk| disk.parse().unwrap()).collect();
    let config = MachineConfig {
        disks,
        ..MachineConfig::new("k")
    };
    config.validate().map_err(|error| error.to_string())
}

#[test]
fn a_file_is_not_two_disks_unless_read_only() {
    // The same existing file under two names, and a file that does not exist.
    for [one, other] in [
        ["/dev/null", "/dev/../dev/null"],
        ["missing.img", "missing.img"],
    ] {
        let expected = format!(
            "disk '{other}' is given twice: \
             give each device a file of its own, or make both read-only"
        );
        assert_eq!(with_disks(&[one, other]), Err(expected.clone()));
        assert_eq!(with_disks(&[&format!("{one},ro"), other]), Err(expected));
        assert_eq!(
            with_disks(&[&format!("{one},ro"), &format!("{other},ro")]),
            Ok(())
        );
    }
}

#[test]
fn hard_links_are_the_same_file() {
    let folder = temporary_folder("hard-links");
    let [one, other] = ["one.img", "other.img"].map(|name| folder.join(name));
    std::fs::write(&one, "x").unwrap();
    std::fs::hard_link(&one, &other).unwrap();
    let names = [&one, &other].map(|path| path.to_str().unwrap());
    assert!(with_disks(&names).unwrap_err().contains("given twice"));

    std::fs::remove_file(&other).unwrap();
    std::fs::write(&other, "x").unwrap();
    assert_eq!(with_disks(&names), Ok(()));
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn mac_addresses_are_not_repeated() {
    let nets = |first: &str, second: &str| {
        config(&format!(
            "kernel = 'k'\n[[net]]\ntap = 't0'\n{first}\n[[net]]\ntap = 't1'\n{second}"
        ))
        .map(|config| config.nets.len())
    };
    assert_eq!(nets("", ""), Ok(2));
    assert_eq!(
        nets("mac = '52:54:00:00:00:01'", "mac = '52:54:00:00:00:02'"),
        Ok(2)
    );
    let same = "the network devices on tap 't0' and tap 't1' have the same MAC address \
                52:54:00:00:00:0a: give each an address of its own";
    assert_eq!(
        nets("mac = '52:54:00:00:00:0A'", "mac = '52:54:00:00:00:0a'").unwrap_err(),
        same
    );
    // An address that is derived from the name of its tap counts as well.
    let made = NetConfig::new("t0".to_owned().try_into().unwrap()).mac_address(0);
    let error = nets("", &format!("mac = '{made}'")).unwrap_err();
    assert!(error.contains("the same MAC address 02:"), "{error}");
}

#[test]
fn a_burst_needs_its_limit() {
    for (device, limits, error) in [
        ("disk", "burst-bytes = 5\nbytes-per-second = 5", None),
        (
            "disk",
            "burst-bytes = 5\noperations-per-second = 5",
            Some("burst-bytes of disk '/vm/d' does nothing without bytes-per-second: "),
        ),
        (
            "disk",
            "burst-operations = 5",
            Some("burst-operations of disk '/vm/d' does nothing without operations-per-second: "),
        ),
        (
            "net",
            "tx-burst-packets = 5\nrx-packets-per-second = 5\ntx-bytes-per-second = 5",
            Some(
                "tx-burst-packets of the network device on tap 'd' does nothing without \
                 tx-packets-per-second: give both, or neither",
            ),
        ),
    ] {
        let place = if device == "disk" { "path" } else { "tap" };
        let result = config(&format!(
            "kernel = 'k'\n[[{device}]]\n{place} = 'd'\n{limits}"
        ));
        match error {
            None => assert!(result.is_ok()),
            Some(text) => {
                let error = result.unwrap_err();
                assert!(error.starts_with(text), "{error}");
            }
        }
    }
}

#[test]
fn ids_and_taps_are_not_repeated() {
    assert_eq!(with_disks(&["a,id=x", "b,id=y", "c"]), Ok(()));
    assert_eq!(
        with_disks(&["a,id=x", "b,id=x"]).unwrap_err(),
        "disk id 'x' is given to two disks: give each an id of its own"
    );
    let net: NetConfig = "tap=t".parse().unwrap();
    let config = MachineConfig {
        nets: vec![net.clone(), net],
        ..MachineConfig::new("k")
    };
    assert_eq!(
        config.validate().unwrap_err().to_string(),
        "tap interface 't' is given twice: give each network device one of its own"
    );
}

#[test]
fn devices_have_an_interrupt_each() {
    let disks: Vec<_> = (0..18)
        .map(|index| DiskConfig::new(format!("{index}.img")))
        .collect();
    let mut config = MachineConfig {
        disks,
        rng: None,
        ..MachineConfig::new("k")
    };
    config.validate().unwrap();
    config.rng = Some(LimitedDevice::default());
    assert_eq!(
        config.validate().unwrap_err().to_string(),
        "too many devices: 19 disks, network devices and others, but a machine has room for 18"
    );
    config.rng = None;
    config.balloon = Some("size=0".parse().unwrap());
    assert!(matches!(
        config.validate(),
        Err(ConfigError::TooManyDevices { count: 19 })
    ));
}

#[test]
fn a_balloon_fits_into_memory() {
    let mut config = MachineConfig {
        memory: "100M".parse().unwrap(),
        balloon: Some("size=100M".parse().unwrap()),
        ..MachineConfig::new("k")
    };
    config.validate().unwrap();
    config.huge_pages = HugePages::TwoMib;
    assert!(matches!(
        config.validate(),
        Err(ConfigError::BalloonOfHugePages)
    ));
    config.huge_pages = HugePages::Transparent;
    config.validate().unwrap();
    config.memory = "102396K".parse().unwrap();
    assert_eq!(
        config.validate().unwrap_err().to_string(),
        "a balloon of 100M does not fit into the 102396K of guest memory: give it a smaller size"
    );
}

#[test]
fn choices_read_what_they_display() {
    for choice in [
        BootProtocolOption::Auto,
        BootProtocolOption::Pvh,
        BootProtocolOption::Linux64,
    ] {
        assert_eq!(
            choice.to_string().parse::<BootProtocolOption>().unwrap(),
            choice
        );
    }
    for choice in [HugePages::None, HugePages::Transparent, HugePages::TwoMib] {
        assert_eq!(choice.to_string().parse::<HugePages>().unwrap(), choice);
    }
    for choice in [OnReboot::Exit, OnReboot::Restart] {
        assert_eq!(choice.to_string().parse::<OnReboot>().unwrap(), choice);
    }
    assert!("PVH".parse::<BootProtocolOption>().is_err());
    assert!("".parse::<OnReboot>().is_err());
}

proptest! {
    #[test]
    fn any_machine_file_is_read_or_refused(text in "(?s).*|([a-z]{1,8} = ['0-9a-z]{1,8}\n){0,4}") {
        if let Err(error) = table(&text) {
            prop_assert!(!error.contains('\n'), "{}", error);
        }
    }
}

#[test]
fn the_serial_port_writes_to_no_file_that_the_machine_reads() {
    let folder = temporary_folder("serial-file");
    let file = folder.join("image");
    std::fs::write(&file, "x").unwrap();
    let other_name = folder.join(".").join("image");
    let mut config = MachineConfig::new(&file);
    config.serial = SerialConfig::File(other_name);
    let error = config.validate().unwrap_err().to_string();
    assert!(error.contains("choose another file"), "{error}");

    config.kernel = "vmlinux".into();
    config.validate().unwrap();
    config.disks.push(DiskConfig::new(&file));
    assert!(config.validate().is_err());

    let hard_link = folder.join("link");
    std::fs::hard_link(&file, &hard_link).unwrap();
    config.disks = vec![DiskConfig::new(hard_link)];
    assert!(config.validate().is_err());
    config.disks.clear();
    config.initrd = Some(file);
    assert!(config.validate().is_err());
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn one_stream_leads_to_standard_input_and_output() {
    let config = |text: &str| config(&format!("kernel = 'k'\n{text}"));
    let at_stdio = config("console = 'stdio'").unwrap();
    assert_eq!(at_stdio.serial, SerialConfig::None);
    assert_eq!(at_stdio.console, SerialConfig::Stdio);
    let channel = config("[[channel]]\nname = 'a'\nstdio = true").unwrap();
    assert_eq!(channel.serial, SerialConfig::None);
    assert!(channel.uses_stdio());
    let elsewhere = config("console = 'pty'").unwrap();
    assert_eq!(elsewhere.serial, SerialConfig::Stdio);
    assert!(!config("serial = 'pty'").unwrap().uses_stdio());
    assert_eq!(
        config("serial = 'stdio'\nconsole = 'stdio'").unwrap_err(),
        "both the serial port and the console lead to standard input and output: give one of them \
         another end"
    );
}

#[test]
fn streams_have_ends_and_names_of_their_own() {
    let config = |text: &str| config(&format!("kernel = 'k'\n{text}"));
    assert_eq!(
        config("serial = 'file=/a'\nconsole = 'file=/a'").unwrap_err(),
        "the console leads to '/a', and so does another: give each an end of its own"
    );
    assert_eq!(
        config("console = 'socket=/vm/k'").unwrap_err(),
        "the output of the console would go to '/vm/k', which the machine uses otherwise: choose \
         another file"
    );
    let channel = "[[channel]]\nname = 'a'\npty = true\n";
    assert_eq!(
        config(&channel.repeat(2)).unwrap_err(),
        "channel 'a' is given twice: give each channel a name of its own"
    );
    let channels: String = (0..17)
        .map(|index| format!("[[channel]]\nname = '{index}'\npty = true\n"))
        .collect();
    assert_eq!(
        config(&channels).unwrap_err(),
        "too many channels: 17, but a machine has room for 16"
    );
}

/// Creates a folder for the test of this name.
fn temporary_folder(test: &str) -> PathBuf {
    let folder = std::env::temp_dir().join(format!("bantam-{test}-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

#[test]
fn metadata_needs_network_devices_that_there_are() {
    let mut config = MachineConfig::new("vmlinux");
    config.nets = vec!["tap=tap0".parse().unwrap(), "tap=tap1".parse().unwrap()];
    for (nets, error) in [
        (vec!["net0", "net1"], None),
        (vec!["net1"], None),
        (
            vec![],
            Some("metadata is served over no network device: name one"),
        ),
        (
            vec!["net0", "net2"],
            Some(
                "cannot serve metadata over 'net2': the machine has no network device of that name",
            ),
        ),
    ] {
        let nets = nets.into_iter().map(|name| name.parse().unwrap());
        config.metadata = Some(MetadataConfig::new(nets.collect()));
        let result = config.validate().map_err(|error| error.to_string());
        assert_eq!(result.err().as_deref(), error);
    }
}
