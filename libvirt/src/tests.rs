//! Tests of whole domains.

use std::fmt::Write;
use std::path::Path;

use bantam_manager::{RestartPolicy, parse_machine_file};
use bantam_vmm::config::{MachineConfig, Quantity, SerialConfig};
use proptest::prelude::*;

use crate::{Boot, Definition, Machine, is_xml, write_domain};

/// Domains that virt-install 4.1 has printed, by the names of their files, apart from those that need more than Bantam has.
const FIXTURES: [(&str, &str); 6] = [
    (
        "debian-generic",
        include_str!("../fixtures/debian-generic.xml"),
    ),
    ("debian11", include_str!("../fixtures/debian11.xml")),
    (
        "debian11-more",
        include_str!("../fixtures/debian11-more.xml"),
    ),
    (
        "fedora-detect-off",
        include_str!("../fixtures/fedora-detect-off.xml"),
    ),
    ("fedora37", include_str!("../fixtures/fedora37.xml")),
    (
        "fedora37-defined",
        include_str!("../fixtures/fedora37-defined.xml"),
    ),
];

const ID: &str = "6695eb01-f6a4-8304-79aa-97f2502e193f";

fn boot() -> Option<Boot> {
    Some(Boot::Given {
        kernel: "/k".into(),
        initrd: None,
        append: None,
    })
}

/// Reads a domain with these elements beside those that it has to have.
fn parse(elements: &str, devices: &str) -> Result<Definition, String> {
    let text = format!(
        "<domain type='kvm'><name>web</name><memory>65536</memory><os><type>hvm</type><kernel>/k</kernel></os>\
         {elements}<devices>{devices}</devices></domain>"
    );
    Definition::parse(&text, None).map_err(|error| error.to_string())
}

fn config(devices: &str) -> MachineConfig {
    parse("", devices).unwrap().config
}

fn machine<'a>(config: &'a MachineConfig, restart: RestartPolicy) -> Machine<'a> {
    Machine {
        name: "web",
        id: ID,
        title: None,
        restart,
        config,
        folder: Path::new("/m"),
    }
}

/// Gives relative sockets their places, as the manager does, and MAC addresses.
fn placed(config: &MachineConfig) -> MachineConfig {
    let mut config = config.clone();
    config.rebase_paths(Path::new("/m"));
    for (place, net) in config.nets.iter_mut().enumerate() {
        net.mac
            .get_or_insert(format!("02:00:00:00:00:{place:02x}").parse().unwrap());
    }
    config
}

#[test]
fn domains_of_virt_install_come_back_as_they_were() {
    for (name, text) in FIXTURES {
        let boot = (name == "debian11").then(boot).flatten();
        let definition =
            Definition::parse(text, boot).unwrap_or_else(|error| panic!("{name}: {error}"));
        let config = placed(&definition.config);
        let first = definition
            .document(&machine(&config, definition.restart))
            .unwrap();
        let again =
            Definition::parse(&first, None).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(placed(&again.config), config, "{name}");
        assert_eq!(again.restart, definition.restart, "{name}");
        // What is kept stays, and nothing comes twice.
        let second = again.document(&machine(&config, again.restart)).unwrap();
        assert_eq!(first, second, "{name}");
        for kept in ["<emulator>", "<timer name='rtc'", "<pm>"] {
            assert_eq!(first.matches(kept).count(), 1, "{name}: {kept}\n{first}");
        }
    }
}

#[test]
fn a_domain_that_boots_from_its_disk_gets_the_default_kernel() {
    let default = || Some(Boot::Default("/default".into()));
    let debian = FIXTURES[1].1;
    let config = Definition::parse(debian, default()).unwrap().config;
    assert_eq!(config.kernel, Path::new("/default"));
    let own = Definition::parse(FIXTURES[2].1, None).unwrap().config;
    let config = Definition::parse(FIXTURES[2].1, default()).unwrap().config;
    assert_eq!(config.kernel, own.kernel);
}

#[test]
fn all_that_a_machine_has_is_read_of_a_domain() {
    let text = FIXTURES[2].1;
    let definition = Definition::parse(text, None).unwrap();
    assert_eq!(definition.name, "web");
    assert_eq!(definition.title.as_deref(), Some("A web server"));
    assert_eq!(
        definition.id.unwrap().to_string(),
        "95092573-288e-40a5-893c-4732cd8beae0"
    );
    assert_eq!(definition.restart, RestartPolicy::OnFailure);
    let expected = "
        kernel = '/boot/vmlinuz'
        initrd = '/boot/initrd.img'
        cpus = 4
        smt = true
        memory = '2G'
        serial = 'file=/var/log/web.log'
        on-reboot = 'restart'
        rng = { bytes-per-second = 4096 }
        balloon.size = '1G'
        vsock = { cid = 3, socket = 'vsock.sock' }
        smbios = { manufacturer = 'Example', serial = '42', asset-tag = 'shelf' }
        [[disk]]
        path = '/var/lib/libvirt/images/debian.img'
        id = 'root'
        name = 'vda'
        format = 'raw'
        cache = 'none'
        [[net]]
        macvtap = 'eth0'
        mac = '52:54:00:4e:67:4a'
        mtu = 1400
        [[net]]
        network = 'lab'
        mac = '52:54:00:f1:ae:da'
        [[channel]]
        name = 'org.qemu.guest_agent.0'
        socket = 'channel-org.qemu.guest_agent.0.sock'
        [cgroup]
        cpu-shares = 512
        memory-max = '4G'
    ";
    assert_eq!(
        definition.config,
        MachineConfig::from_toml(expected).unwrap()
    );
    for line in [
        "<devices/controller> is kept and has no effect (16 times)",
        "the empty drive 'sda' is kept and has no effect",
    ] {
        assert!(
            definition.notes.iter().any(|it| it == line),
            "{line}: {:#?}",
            definition.notes
        );
    }
}

#[test]
fn limits_of_the_host_are_those_of_the_whole_machine() {
    let memory = "<memtune><hard_limit unit='GiB'>1</hard_limit><soft_limit>524288</soft_limit>\
                  <swap_hard_limit>9</swap_hard_limit></memtune>";
    let processor = "<cputune><shares>2048</shares><global_period>50000</global_period>\
                     <global_quota>25000</global_quota><quota>1000</quota></cputune>";
    let definition = parse(&format!("{memory}{processor}"), "").unwrap();
    let limits = definition.config.cgroup.unwrap();
    let number = |limit: Option<Quantity>| limit.unwrap().get();
    assert_eq!(number(limits.memory_max), 1 << 30);
    assert_eq!(number(limits.memory_high), 512 << 20);
    assert_eq!(number(limits.cpu_shares), 2048);
    assert_eq!(number(limits.cpu_quota), 25_000);
    assert_eq!(number(limits.cpu_period), 50_000);
    for line in [
        "<memtune/swap_hard_limit> is kept and has no effect",
        "<cputune/quota> is kept and has no effect",
    ] {
        assert!(definition.notes.iter().any(|it| it == line), "{line}");
    }
    // What is kept stays when the limits go.
    let mut config = definition.config.clone();
    config.cgroup = None;
    let text = definition
        .document(&machine(&config, RestartPolicy::Never))
        .unwrap();
    assert!(
        text.contains("<quota>1000</quota>") && !text.contains("<shares>"),
        "{text}"
    );
    assert_eq!(Definition::parse(&text, None).unwrap().config.cgroup, None);
    let none = "<memtune><hard_limit>9007199254740991</hard_limit></memtune>\
                <cputune><global_quota>-1</global_quota><global_period>1000</global_period></cputune>";
    assert_eq!(parse(none, "").unwrap().config.cgroup, None);
    let error = parse("<cputune><shares>1</shares></cputune>", "").unwrap_err();
    assert!(error.contains("cpu-shares of [cgroup] is 1"), "{error}");
}

#[test]
fn what_a_guest_would_rely_on_is_refused_by_name() {
    let disk = |inner: &str| {
        format!("<disk type='file'><source file='/d'/><target dev='vda'/>{inner}</disk>")
    };
    let net = |inner: &str| format!("<interface type='user'>{inner}</interface>");
    for (elements, devices, name) in [
        (
            "",
            "<hostdev mode='subsystem' type='pci'/>".to_owned(),
            "<devices/hostdev>",
        ),
        (
            "",
            "<filesystem type='mount'/>".to_owned(),
            "<devices/filesystem>",
        ),
        ("", "<tpm model='tpm-tis'/>".to_owned(), "<devices/tpm>"),
        (
            "<launchSecurity type='sev'/>",
            String::new(),
            "<launchSecurity>",
        ),
        (
            "<cpu mode='custom'><model>Penryn</model></cpu>",
            String::new(),
            "mode='custom'",
        ),
        (
            "<cpu mode='host-passthrough'><feature policy='disable' name='vmx'/></cpu>",
            String::new(),
            "vmx",
        ),
        ("<clock offset='localtime'/>", String::new(), "localtime"),
        ("<on_crash>preserve</on_crash>", String::new(), "preserve"),
        (
            "<on_poweroff>restart</on_poweroff>",
            String::new(),
            "on_poweroff",
        ),
        (
            "<q:commandline xmlns:q='http://libvirt.org/schemas/domain/qemu/1.0'/>",
            String::new(),
            "<q:commandline>",
        ),
        (
            "<memoryBacking><hugepages><page size='1' unit='G'/></hugepages></memoryBacking>",
            String::new(),
            "2 MiB",
        ),
        ("", disk("<transient/>"), "<devices/disk/transient>"),
        ("", disk("<driver type='vmdk'/>"), "'vmdk'"),
        ("", disk("<driver cache='directsync'/>"), "directsync"),
        ("", disk("").replace("vda", "sda"), "disk 'sda' on the bus"),
        (
            "",
            disk("").replace("<target dev='vda'/>", "<target dev='vda' bus='ide'/>"),
            "'ide'",
        ),
        (
            "",
            disk("").replace("'file'>", "'network'>"),
            "type 'network'",
        ),
        ("", disk("").replace("'/d'", "'d'"), "begins with '/'"),
        ("", net("<model type='e1000'/>"), "'e1000'"),
        (
            "",
            net("<filterref filter='clean-traffic'/>"),
            "<devices/interface/filterref>",
        ),
        ("", net("<link state='down'/>"), "down"),
        ("", net("<portForward proto='tcp'/>"), "<portForward>"),
        ("", net("").replace("user", "vhostuser"), "'vhostuser'"),
        ("", "<serial type='tcp'/>".to_owned(), "'tcp'"),
        (
            "",
            "<serial type='pty'/><serial type='pty'/>".to_owned(),
            "second <serial>",
        ),
        (
            "",
            "<rng model='virtio'><backend model='egd'/></rng>".to_owned(),
            "'egd'",
        ),
    ] {
        let error = parse(elements, &devices).unwrap_err();
        assert!(error.contains(name), "{elements}{devices}: {error}");
        assert!(!error.contains('\n'), "{error}");
    }
    let generic = include_str!("../fixtures/debian-generic-ide.xml");
    let error = Definition::parse(generic, boot()).unwrap_err().to_string();
    assert!(
        error.starts_with("disk 'hda' on the bus 'ide' is not supported by Bantam; "),
        "{error}"
    );
    let error = Definition::parse(FIXTURES[1].1, None)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("has no <kernel>") && error.contains("--kernel"),
        "{error}"
    );
    let diskless = "<domain type='kvm'><memory>65536</memory><os><type>hvm</type></os></domain>";
    let error = Definition::parse(diskless, Some(Boot::Default("/k".into())));
    assert!(error.unwrap_err().to_string().contains("has no <kernel>"));
}

#[test]
fn xml_that_is_none_or_too_much_is_refused_in_a_line() {
    let nested = |count: usize| "<a>".repeat(count) + &"</a>".repeat(count);
    let (deep, deepest) = (nested(1000), nested(100_000));
    let large = format!("<domain>{}</domain>", " ".repeat(1 << 20));
    let many = format!("<domain>{}</domain>", "<a/>".repeat(100_001));
    let attributes: String = (0..2000)
        .map(|number| format!(" a{number} = '1'"))
        .collect();
    let attributes = format!("<domain{attributes}/>");
    let laughs = "<!DOCTYPE d [<!ENTITY a 'aaaa'><!ENTITY b '&a;&a;'>]><domain>&b;</domain>";
    let external = "<!DOCTYPE d [<!ENTITY a SYSTEM 'file:///etc/passwd'>]><domain>&a;</domain>";
    for (text, reason) in [
        (deep.as_str(), "deep"),
        (&deepest, "more than 100000"),
        (&large, "larger than 1 MiB"),
        (&many, "more than 100000"),
        (&attributes, "more than 1000 attributes"),
        (laughs, "document type"),
        (external, "document type"),
        ("<domain>&unknown;</domain>", ""),
        ("<domain", ""),
        ("", ""),
        ("<network/>", "XML of <network>"),
        ("<domain type='xen'/>", "'xen'"),
    ] {
        let error = Definition::parse(text, None).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
        assert_eq!(error.lines().count(), 1, "{error}");
        assert!(error.len() < 400, "{error}");
    }
    assert!(is_xml("\u{feff}\n  <domain/>") && !is_xml("kernel = \"<\""));
}

#[test]
fn a_cd_is_a_read_only_disk_after_the_disks() {
    let cd = "<disk type='file' device='cdrom'><driver type='raw'/><source file='/cd.iso'/><target dev='hda' bus='ide'/></disk>";
    let disk = |name: &str| {
        format!(
            "<disk type='file'><driver type='qcow2'/><source file='/{name}'/><target dev='{name}' bus='virtio'/></disk>"
        )
    };
    let definition = parse("", &format!("{cd}{}{}", disk("vdb"), disk("vda"))).unwrap();
    let paths: Vec<_> = definition
        .config
        .disks
        .iter()
        .map(|it| it.path.to_str().unwrap())
        .collect();
    assert_eq!(paths, ["/vda", "/vdb", "/cd.iso"]);
    assert!(definition.config.disks[2].readonly);
    assert!(definition.notes[0].starts_with("disk 'hda': the CD is a read-only virtio disk"));
    let text = definition
        .document(&machine(&definition.config, RestartPolicy::Never))
        .unwrap();
    assert!(
        text.contains("device='cdrom'") && text.contains("<target dev='hda' bus='ide'/>"),
        "{text}"
    );
    assert_eq!(
        Definition::parse(&text, None).unwrap().config,
        definition.config
    );
    // A medium that is taken out leaves its drive.
    let mut without = definition.config.clone();
    without.disks.pop();
    let text = write_domain(&machine(&without, RestartPolicy::Never), Some(&text)).unwrap();
    assert!(
        text.contains("device='cdrom'") && !text.contains("/cd.iso"),
        "{text}"
    );
    assert_eq!(Definition::parse(&text, None).unwrap().config, without);
}

#[test]
fn changes_of_the_machine_show_beside_what_is_kept() {
    let definition = Definition::parse(FIXTURES[5].1, None).unwrap();
    let mut config = placed(&definition.config);
    let text = definition
        .document(&machine(&config, definition.restart))
        .unwrap();
    let kept = "<address type='pci' domain='0x0000' bus='0x01' slot='0x00' function='0x0'/>";
    assert!(
        text.contains(kept) && text.contains("bridge='br0'"),
        "{text}"
    );
    config.nets.clear();
    config.cpus = 3.try_into().unwrap();
    config.disks.push("/new.img".parse().unwrap());
    config.balloon = None;
    let text = write_domain(&machine(&config, RestartPolicy::Always), Some(&text)).unwrap();
    for there in [
        "<vcpu placement='static'>3</vcpu>",
        "<source file='/new.img'/>",
        "<target dev='vdb' bus='virtio'/>",
        "<on_poweroff>restart</on_poweroff>",
        "<memballoon model='none'>",
        "<type arch='x86_64' machine='pc-q35-7.2'>hvm</type>",
        "<input type='mouse' bus='ps2'/>",
    ] {
        assert!(text.contains(there), "{there}\n{text}");
    }
    assert!(!text.contains("br0") && !text.contains(kept), "{text}");
    let again = Definition::parse(&text, None).unwrap();
    assert_eq!(again.restart, RestartPolicy::Always);
    assert_eq!(again.config.disks.len(), 2);
}

#[test]
fn the_console_of_a_machine_is_libvirts_pseudoterminal() {
    let end = |devices: &str| {
        let config = config(devices);
        (config.serial, config.console)
    };
    let pty = "<serial type='pty'/><console type='pty'><target type='serial'/></console>";
    let virtio = "<console type='pty'><target type='virtio'/></console>";
    assert_eq!(end(""), (SerialConfig::None, SerialConfig::None));
    assert_eq!(end(pty), (SerialConfig::Stdio, SerialConfig::None));
    assert_eq!(
        end("<console type='pty'/>"),
        (SerialConfig::Stdio, SerialConfig::None)
    );
    assert_eq!(end(virtio), (SerialConfig::None, SerialConfig::Stdio));
    assert_eq!(
        end(&format!("{pty}{virtio}")),
        (SerialConfig::Stdio, SerialConfig::Pty)
    );
    let unix = "<serial type='unix'><source mode='bind' path='/s'/></serial>";
    assert_eq!(end(unix).0, SerialConfig::Socket("/s".into()));
    let connect = unix.replace("bind", "connect");
    assert!(
        parse("", &connect)
            .unwrap_err()
            .contains("connects to a socket")
    );
}

#[test]
fn texts_are_kept_to_the_character() {
    let elements = "<title>a &lt; b &amp; 'c' \"d\"</title><description>\n  two\n  lines</description>\
                    <metadata><x:y xmlns:x='urn:x' x:z='&#10;&#9;é'><x:w/>text<x:w> </x:w></x:y></metadata>";
    let definition = parse(elements, "").unwrap();
    let title = definition.title.clone();
    assert_eq!(title.as_deref(), Some("a < b & 'c' \"d\""));
    let described = Machine {
        title: title.as_deref(),
        ..machine(&definition.config, RestartPolicy::Never)
    };
    let text = definition.document(&described).unwrap();
    for there in [
        "<title>a &lt; b &amp; 'c' \"d\"</title>",
        "<description>\n  two\n  lines</description>",
        "<x:y xmlns:x='urn:x' x:z='&#10;&#9;é'><x:w/>text<x:w> </x:w></x:y>",
    ] {
        assert!(text.contains(there), "{there}\n{text}");
    }
}

#[test]
fn options_that_are_wrong_are_refused_and_orphans_reported() {
    let with = |options: &str| {
        let metadata = format!(
            "<metadata><b:machine xmlns:b='urn:bantam:machine'>{options}</b:machine></metadata>"
        );
        parse(&metadata, "")
    };
    for options in ["nope = 1", "cpus = 99", "disk = 1", "disk.a = 1", "= ="] {
        let error = with(options).unwrap_err();
        assert!(
            error.starts_with("Bantam's options in <metadata> are wrong: "),
            "{error}"
        );
        assert_eq!(error.lines().count(), 1, "{error}");
    }
    let definition = with("on-halt = 'exit'\ndisk.vdz.poll = true").unwrap();
    assert_eq!(definition.config.on_halt.to_string(), "exit");
    assert!(
        definition.notes[0].contains("the disk 'vdz' are dropped"),
        "{:?}",
        definition.notes
    );
}

/// A machine file with any of what a machine can have.
fn machine_file() -> impl Strategy<Value = String> {
    let disk = (
        "(/[a-z<&'\u{e9}\u{1}]{1,8}|/dev/[a-z]{3})(\\.qcow2|\\.img)?",
        proptest::option::of("vd[a-c]|root|a\\.b|disk7"),
        any::<[bool; 4]>(),
        0..4_usize,
    );
    let disk = disk.prop_map(|(path, name, [readonly, backing, poll, limits], cache)| {
        let mut text = format!("[[disk]]\npath = {}\n", toml::Value::String(path));
        if let Some(name) = name {
            writeln!(text, "name = '{name}'").unwrap();
        }
        let cache = ["writeback", "writethrough", "none", "unsafe"][cache];
        writeln!(
            text,
            "cache = '{cache}'\nreadonly = {readonly}\nbacking = {backing}\npoll = {poll}"
        )
        .unwrap();
        if limits {
            text += "bytes-per-second = '1M'\noperations-per-second = 5\nburst-operations = 9\n";
        }
        text
    });
    let net = prop_oneof![
        Just("user = true\nforward = ['2222:22']"),
        Just("nat = true"),
        Just("hostonly = true\nhostname = 'web'\nfilter = false"),
        Just("network = 'lab'\nmtu = 1400"),
        Just("bridge = 'br0'\nqueues = 2\niothread = true"),
        Just("macvtap = 'eth0'\nname = 'lan'"),
        Just("passt = '/p'"),
        Just("fd = 5\nname = 'a.b'"),
    ];
    let other = prop_oneof![
        Just("cpus = 4\nsmt = true"),
        Just("cmdline = 'a \u{1f} <b>'\nappend = 'c'\ninitrd = '/i'"),
        Just("serial = 'pty'"),
        Just("serial = 'none'\nconsole = 'stdio'"),
        Just("console = 'socket=/c'"),
        Just("rng = false"),
        Just("rng = { operations-per-second = 3 }"),
        Just("balloon = { size = '8M', hinting = true, statistics = 5, reporting = true }"),
        Just("huge-pages = '2M'"),
        Just("huge-pages = 'transparent'"),
        Just("vsock = { cid = 7, socket = '/v' }"),
        Just("vsock = { cid = 3, socket = 'vsock.sock' }"),
        Just("smbios = { serial = 'ds=nocloud', uuid = '123e4567-e89b-12d3-a456-426614174000' }"),
        Just("on-reboot = 'exit'\non-halt = 'exit'\nexit-status = 'monitor'"),
        Just("channel = [{ name = 'a', pty = true }, { name = 'b', socket = 'channel-b.sock' }]"),
        Just("channel = [{ name = 'a', stdio = true }]\nserial = 'none'"),
    ];
    let other = proptest::collection::hash_set(other, 0..3);
    let disks = proptest::collection::vec(disk, 0..4);
    let nets = proptest::collection::vec(net, 0..3);
    (other, disks, nets).prop_map(|(other, disks, nets)| {
        let mut text = "kernel = '/k'\nmemory = '32M'\n".to_owned();
        other.iter().for_each(|it| writeln!(text, "{it}").unwrap());
        disks.iter().for_each(|it| text.push_str(it));
        nets.iter()
            .for_each(|it| writeln!(text, "[[net]]\n{it}").unwrap());
        text
    })
}

proptest! {
    #[test]
    fn a_machine_is_the_same_after_a_way_through_xml(text in machine_file()) {
        // Some combinations are no machine file, such as two disks of one name.
        let Ok(config) = parse_machine_file(&text, Path::new("/m/machine.toml")) else {
            return Ok(());
        };
        let config = placed(&config);
        let xml = write_domain(&machine(&config, RestartPolicy::OnFailure), None).unwrap();
        let read = Definition::parse(&xml, None);
        let read = read.unwrap_or_else(|error| panic!("{error}\n{xml}"));
        let mut expected = config.clone();
        crate::disk::say_formats(&mut expected.disks);
        prop_assert_eq!(placed(&read.config), expected, "{}", xml);
        prop_assert_eq!(read.restart, RestartPolicy::OnFailure);
        let again = read.document(&machine(&config, read.restart)).unwrap();
        prop_assert_eq!(xml, again);
    }

    #[test]
    fn any_change_of_a_domain_is_read_or_refused_in_a_line(
        place in 0..FIXTURES.len(),
        cut in any::<proptest::sample::Index>(),
        length in 0..40_usize,
        put in "[a-z<>/='\"& 0-9]{0,12}",
    ) {
        let text = FIXTURES[place].1;
        let from = cut.index(text.len());
        let to = (from + length).min(text.len());
        if let (Some(before), Some(after)) = (text.get(..from), text.get(to..)) {
            match Definition::parse(&format!("{before}{put}{after}"), boot()) {
                Ok(definition) => {
                    let config = placed(&definition.config);
                    let document = definition.document(&machine(&config, definition.restart));
                    prop_assert!(document.is_ok(), "{:?}", document);
                }
                Err(error) => prop_assert_eq!(error.to_string().lines().count(), 1),
            }
        }
    }
}

#[test]
fn no_bytes_are_a_panic() {
    bolero::check!().for_each(|bytes: &[u8]| {
        let text = String::from_utf8_lossy(bytes);
        let _ = Definition::parse(&text, boot());
    });
}
