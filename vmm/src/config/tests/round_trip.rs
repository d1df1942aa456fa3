//! Tests that any configuration can be read back from the machine file that is written for it.

use std::ffi::OsString;
use std::fmt::Debug;
use std::net::SocketAddr;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bantam_devices::rate_limiter::RateLimit;
use proptest::collection::vec;
use proptest::option::of;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use serde_json::Value;

use super::super::*;

/// Any path, absolute, so that it is not relative to the file. Its bytes may be other than UTF-8.
fn path() -> impl Strategy<Value = PathBuf> {
    prop_oneof![
        "/[ -~é]{0,20}".prop_map(String::into_bytes),
        vec(1..=u8::MAX, 0..20)
    ]
    .prop_map(|mut bytes| {
        bytes.insert(0, b'/');
        OsString::from_vec(bytes).into()
    })
}

/// A value that is read from text.
fn parsed<T: FromStr<Err: Debug> + Debug>(pattern: &'static str) -> impl Strategy<Value = T> {
    pattern.prop_map(|text| text.parse().unwrap())
}

/// A value that is made from a number in this range.
fn number<T: TryFrom<i64, Error: Debug> + Debug>(
    range: std::ops::RangeInclusive<i64>,
) -> impl Strategy<Value = T> {
    range.prop_map(|number| T::try_from(number).unwrap())
}

fn limit() -> impl Strategy<Value = LimitConfig> {
    let quantity = || number::<Quantity>(1..=i64::MAX);
    let burst = of(quantity());
    let rate = (quantity(), burst).prop_map(|(per_second, burst)| LimitConfig::Rate {
        per_second: Some(per_second),
        burst,
    });
    let bucket = (any::<u64>(), any::<Duration>(), any::<u64>());
    let bucket = bucket.prop_map(|(size, refill_time, one_time_burst)| {
        LimitConfig::Bucket(RateLimit {
            size,
            refill_time,
            one_time_burst,
        })
    });
    prop_oneof![Just(LimitConfig::default()), rate, bucket]
}

fn limits() -> impl Strategy<Value = LimitsConfig> {
    (limit(), limit()).prop_map(|(bytes, operations)| LimitsConfig { bytes, operations })
}

fn end() -> impl Strategy<Value = SerialConfig> {
    prop_oneof![
        Just(SerialConfig::Stdio),
        Just(SerialConfig::Pty),
        path().prop_map(SerialConfig::File),
        path().prop_map(SerialConfig::Socket),
        Just(SerialConfig::None),
    ]
}

fn gdb() -> impl Strategy<Value = GdbConfig> {
    prop_oneof![
        any::<SocketAddr>().prop_map(|address| GdbConfig::Tcp(match address {
            // Text keeps neither the scope nor the flow of an address.
            SocketAddr::V6(address) => (*address.ip(), address.port()).into(),
            address => address,
        })),
        path().prop_map(GdbConfig::Unix),
    ]
}

prop_compose! {
    fn disk()(
        (path, readonly, id, name) in (path(), any::<bool>(), of("[ -~]{1,20}"), of(parsed("[a-z0-9._-]{1,64}"))),
        cache in prop_oneof![
            Just(CacheModeOption::Writeback),
            Just(CacheModeOption::Writethrough),
            Just(CacheModeOption::None),
            Just(CacheModeOption::Unsafe),
        ],
        engine in prop_oneof![
            Just(BlockEngineOption::Auto),
            Just(BlockEngineOption::IoUring),
            Just(BlockEngineOption::Sync),
        ],
        (format, block_size) in (
            of(prop_oneof![Just(DiskFormatOption::Raw), Just(DiskFormatOption::Qcow2)]),
            of(number(4096..=4096)),
        ),
        lock in prop_oneof![
            Just(DiskLockOption::On),
            Just(DiskLockOption::Warn),
            Just(DiskLockOption::Off),
            Just(DiskLockOption::WherePossible),
        ],
        (queues, iothread, poll, any_size, backing) in
            (of(number(1..=8)), any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>()),
        limits in limits(),
    ) -> DiskConfig {
        DiskConfig {
            path, readonly, id: id.map(|id| id.try_into().unwrap()), name, cache, engine, format,
            block_size, lock, queues, iothread, poll, limits, any_size, backing,
        }
    }
}

prop_compose! {
    fn net()(
        tap in "[a-z0-9]{1,15}",
        mac in of(any::<[u8; 6]>()),
        mtu in of(number(68..=65_521)),
        queues in of(number(1..=8)),
        iothread: bool,
        name in of(parsed("[a-z0-9._-]{1,64}")),
        (receive, transmit) in (limits(), limits()),
        host in of(0..5),
        netns in of("[a-z]{1,9}|/proc/1/ns/net"),
        user in of((
            prop::collection::vec(parsed("(tcp:|udp:)?127[.]0[.]0[.]1:[1-9][0-9]{0,3}:80"), 0..3),
            any::<(bool, bool)>(),
            of(parsed("10[.][0-9][.]0[.]0/16")),
            prop::collection::vec(any::<std::net::IpAddr>(), 0..3),
            of(parsed("[a-z]{1,9}([.][a-z]{1,9})?")),
            of(parsed("[a-z]{1,9}([.][a-z]{1,9})?")),
            prop::collection::vec(parsed("([*][.])?[a-z]{1,9}(:[1-9][0-9]{0,3})?"), 0..3),
            prop::collection::vec(parsed("192[.]0[.]2[.]0/24(:[1-9][0-9]{0,3})?"), 0..3),
        )),
    ) -> NetConfig {
        if let Some((forward, (restrict, host_loopback), subnet, dns, domain, hostname, allow, deny)) = user {
            return NetConfig {
                mac: mac.and_then(|bytes| bytes.try_into().ok()),
                mtu, iothread, name, forward, restrict, host_loopback, subnet, dns, domain, hostname, allow, deny,
                limits: NetLimitsConfig { receive, transmit },
                ..NetConfig::user()
            };
        }
        let mac = mac.and_then(|bytes| bytes.try_into().ok());
        let limits = NetLimitsConfig { receive, transmit };
        if let Some(kind) = host {
            let base = NetConfig { user: false, ..NetConfig::user() };
            let interface = || tap.clone().try_into().unwrap();
            let host = match kind {
                0 => NetConfig { nat: true, filter: Some(iothread), ..base },
                1 => NetConfig { hostonly: true, ..base },
                2 => NetConfig { network: Some(tap.parse().unwrap()), hostname: tap.parse().ok(), ..base },
                3 => NetConfig { bridge: Some(interface()), ..base },
                _ => NetConfig { macvtap: Some(interface()), ..base },
            };
            return NetConfig { mac, mtu, queues, iothread, name, limits, ..host };
        }
        let netns = netns.map(|name| name.try_into().unwrap());
        NetConfig { mac, mtu, queues, iothread, name, limits, netns, ..NetConfig::new(tap.try_into().unwrap()) }
    }
}

prop_compose! {
    fn channel()(name in parsed("[a-z0-9._-]{1,20}"), end in end()) -> ChannelConfig {
        ChannelConfig { name, end }
    }
}

prop_compose! {
    fn balloon()(
        mib: u32, deflate_on_oom: bool, reporting: bool, hinting: bool, statistics: u32,
    ) -> BalloonConfig {
        let size = BalloonSize::from_mib(mib);
        BalloonConfig { size, deflate_on_oom, reporting, hinting, statistics }
    }
}

prop_compose! {
    fn smbios()(
        texts in vec(of(parsed::<SmbiosText>("[ -~]{1,64}")), 7),
        uuid in of(parsed("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")),
    ) -> SmbiosConfig {
        let [manufacturer, product, version, serial, sku, family, asset_tag] = texts.try_into().unwrap();
        SmbiosConfig { manufacturer, product, version, serial, uuid, sku, family, asset_tag }
    }
}

prop_compose! {
    fn cgroup()(
        cpu_shares in of(number(2..=262_144)),
        quota in of((number(1000..=1 << 30), of(number(1000..=1_000_000)))),
        (memory_max, memory_high) in (of(number(1 << 20..=i64::MAX)), of(number(1 << 20..=i64::MAX))),
    ) -> CgroupConfig {
        let (cpu_quota, cpu_period) = quota.unzip();
        CgroupConfig { cpu_shares, cpu_quota, cpu_period: cpu_period.flatten(), memory_max, memory_high }
    }
}

/// JSON of a few levels.
fn json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".*".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..4).prop_map(Value::from),
            proptest::collection::hash_map(".*", inner, 0..4)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

prop_compose! {
    /// Metadata, and which of the network devices it is served over.
    fn metadata()(
        places in vec(any::<prop::sample::Index>(), 1..3),
        version in prop_oneof![Just(MetadataVersion::V1), Just(MetadataVersion::V2)],
        address in (1..=254_u8, any::<u8>()),
        imds_compat: bool,
        size_limit: usize,
        contents in of(json()),
    ) -> (Vec<prop::sample::Index>, MetadataConfig) {
        let address = std::net::Ipv4Addr::new(169, 254, address.0, address.1);
        let metadata = MetadataConfig {
            nets: Vec::new(),
            version,
            address: address.try_into().unwrap(),
            imds_compat, size_limit, contents,
        };
        (places, metadata)
    }
}

prop_compose! {
    fn cpu()(
        cpuid in vec((any::<[u32; 5]>(), 0..4_usize), 0..3),
        msrs in vec((any::<u32>(), any::<u64>(), any::<u64>()), 0..3),
        required_capabilities in vec(any::<u32>(), 0..3),
    ) -> CpuModifiers {
        let registers = [
            CpuidRegister::Eax,
            CpuidRegister::Ebx,
            CpuidRegister::Ecx,
            CpuidRegister::Edx,
        ];
        let cpuid = cpuid.into_iter().map(|([leaf, subleaf, flags, mask, value], register)| {
            CpuidModifier { leaf, subleaf, flags, register: registers[register], mask, value }
        });
        let msrs = msrs.into_iter().map(|(index, mask, value)| MsrModifier { index, mask, value });
        CpuModifiers { cpuid: cpuid.collect(), msrs: msrs.collect(), required_capabilities }
    }
}

prop_compose! {
    /// Any configuration, most of them valid.
    fn machine()(
        (kernel, initrd, cmdline) in (path(), of(path()), of(".*")),
        append in of("( ?[a-z=]{1,8})*( -- [a-z ]*)?"),
        (cpus, smt, cpu) in (number::<VcpuCount>(1..=32), any::<bool>(), cpu()),
        memory_pages in 4096..=262_144_u64,
        huge_pages in prop_oneof![Just(HugePages::None), Just(HugePages::Transparent), Just(HugePages::TwoMib)],
        (disks, nets) in (vec(disk(), 0..4), vec(net(), 0..3)),
        vsock in of((any::<u32>(), path())),
        (metadata, smbios) in (of(metadata()), of(smbios())),
        (serial, serial_limit, console, channels) in (end(), limit(), end(), vec(channel(), 0..3)),
        (rng, balloon) in (of(limits().prop_map(|limits| LimitedDevice { limits })), of(balloon())),
        boot_protocol in prop_oneof![
            Just(BootProtocolOption::Auto),
            Just(BootProtocolOption::Pvh),
            Just(BootProtocolOption::Linux64),
        ],
        (on_reboot, on_halt, exit_status) in (
            prop_oneof![Just(OnReboot::Exit), Just(OnReboot::Restart)],
            prop_oneof![Just(OnHalt::Wait), Just(OnHalt::Exit)],
            prop_oneof![Just(ExitStatus::Guest), Just(ExitStatus::Monitor)],
        ),
        restart_limit in of(any::<u32>()),
        shutdown_timeout in 0..=3_600_000_u32,
        (host_workarounds, boot_timer, track_dirty_pages) in any::<(bool, bool, bool)>(),
        seccomp in prop_oneof![Just(Seccomp::Kill), Just(Seccomp::Log), Just(Seccomp::Off)],
        (landlock, coredump) in any::<(bool, bool)>(),
        (cgroup, gdb) in (of(cgroup()), of(gdb())),
    ) -> MachineConfig {
        let mut config = MachineConfig {
            kernel, initrd, cmdline, append, cpus, smt, cpu,
            memory: MemorySize::from_bytes(memory_pages * 4096).unwrap(),
            huge_pages, disks, nets,
            vsock: vsock.map(|(cid, socket)| VsockConfig { cid: GuestCid::unchecked(cid), socket }),
            metadata: None,
            smbios,
            serial, serial_limit, console, channels, rng, balloon, boot_protocol, on_reboot,
            restart_limit,
            shutdown_timeout: format!("{shutdown_timeout}ms").parse().unwrap(),
            exit_status, on_halt, host_workarounds, boot_timer, track_dirty_pages, seccomp,
            landlock, coredump, cgroup, gdb,
        };
        if !config.nets.is_empty() {
            let names: Vec<_> = config.net_names().collect();
            config.metadata = metadata.map(|(places, metadata)| MetadataConfig {
                nets: places.iter().map(|place| place.get(&names).clone()).collect(),
                ..metadata
            });
        }
        config
    }
}

fn read(text: &str) -> Result<MachineTable, TestCaseError> {
    let table = MachineTable::from_toml(text, Path::new("/elsewhere/machine.toml"));
    table.map_err(|error| TestCaseError::fail(format!("{error} in\n{text}")))
}

/// Makes a configuration valid by leaving out what does not fit.
fn mended(mut config: MachineConfig) -> MachineConfig {
    config.smt &= config.cpus.get().is_multiple_of(2);
    if config.huge_pages == HugePages::TwoMib {
        config.huge_pages = HugePages::Transparent;
    }
    config
        .channels
        .retain(|channel| !matches!(channel.end, SerialConfig::None | SerialConfig::Stdio));
    if config.console == SerialConfig::Stdio {
        config.serial = SerialConfig::None;
    }
    config.balloon = config
        .balloon
        .filter(|it| it.size.bytes() <= config.memory.bytes());
    config
}

proptest! {
    #[test]
    fn a_machine_file_that_is_written_describes_the_same_machine(config in machine()) {
        let config = mended(config);
        let text = config.to_toml();
        // Ends and names may still be repeated; then both refuse them.
        match (read(&text)?.into_config(), config.validate()) {
            (Ok(read), Ok(())) => prop_assert_eq!(read, config, "{}", text),
            (Err(read), Err(error)) => prop_assert_eq!(read.to_string(), error.to_string()),
            (read, validated) => prop_assert!(false, "{:?} {:?} in\n{}", read.err(), validated, text),
        }
    }

    #[test]
    fn json_of_a_configuration_describes_the_same_machine(config in machine()) {
        let config = mended(config);
        prop_assume!(config.validate().is_ok());
        let text = serde_json::to_string(&config).unwrap();
        prop_assert_eq!(serde_json::from_str::<MachineConfig>(&text).unwrap(), config, "{}", text);
    }
}

#[test]
fn most_configurations_of_the_test_above_are_valid() {
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let valid = (0..100)
        .map(|_| machine().new_tree(&mut runner).unwrap().current())
        .filter(|config| mended(config.clone()).validate().is_ok())
        .count();
    assert!(valid > 60, "{valid} of 100");
}

#[test]
fn a_machine_file_that_is_written_has_what_is_not_default() {
    assert_eq!(
        MachineConfig::new("/vmlinux").to_toml(),
        "kernel = \"/vmlinux\"\n"
    );
    let config = MachineConfig {
        memory: "1G".parse().unwrap(),
        disks: vec![
            "/a.img,ro,bytes-per-second=10M,burst-bytes=1M"
                .parse()
                .unwrap(),
        ],
        rng: None,
        serial_limit: LimitConfig::Bucket(RateLimit {
            size: 5,
            refill_time: Duration::from_millis(1500),
            one_time_burst: 0,
        }),
        ..MachineConfig::new("/vmlinux")
    };
    let expected = r#"kernel = "/vmlinux"
memory = "1G"
rng = false

[[disk]]
path = "/a.img"
readonly = true

[disk.limits.bytes]
burst = 1048576
per-second = 10485760

[serial-limit]
refill-time = "1500ms"
size = 5
"#;
    assert_eq!(config.to_toml(), expected);
}
