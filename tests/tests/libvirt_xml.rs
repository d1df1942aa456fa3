//! Machines that are defined by libvirt's domain XML, and written as such XML. The judges are libvirt itself, by its test
//! driver, and its schema.

#![allow(clippy::unwrap_used, reason = "a test fails where the host does")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use bantam_tests::{Bantam, Ended, Machines, payload, qemu_img, require_kvm};

/// Domains that virt-install 4.1 has printed, and whether they have a kernel.
const DOMAINS: [(&str, &str, bool); 6] = [
    (
        "debian",
        include_str!("../../libvirt/fixtures/debian-generic.xml"),
        true,
    ),
    (
        "debian11",
        include_str!("../../libvirt/fixtures/debian11.xml"),
        false,
    ),
    (
        "web",
        include_str!("../../libvirt/fixtures/debian11-more.xml"),
        true,
    ),
    (
        "fedora",
        include_str!("../../libvirt/fixtures/fedora-detect-off.xml"),
        true,
    ),
    (
        "fedora37",
        include_str!("../../libvirt/fixtures/fedora37.xml"),
        true,
    ),
    (
        "fedora37",
        include_str!("../../libvirt/fixtures/fedora37-defined.xml"),
        true,
    ),
];

/// Runs a tool that judges XML.
#[track_caller]
fn judge(program: &str, package: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output();
    let output = output.unwrap_or_else(|error| {
        panic!("{program} cannot be started ({error}); resources/install-packages.sh installs {package}")
    });
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{program}: {errors}\n{}",
        fs::read_to_string(arguments.last().unwrap()).unwrap_or_default()
    );
}

/// Has libvirt's schema and libvirt itself accept domain XML.
#[track_caller]
fn judge_domain(folder: &Path, xml: &str) {
    let file = folder.join("judged.xml");
    fs::write(&file, xml).unwrap();
    let file = file.to_str().unwrap();
    let schema = "/usr/share/libvirt/schemas/domain.rng";
    assert!(
        Path::new(schema).exists(),
        "{schema} is not there; resources/install-packages.sh installs libvirt-clients"
    );
    judge(
        "xmllint",
        "libxml2-utils",
        &["--noout", "--relaxng", schema, file],
    );
    judge(
        "virsh",
        "libvirt-clients",
        &["-c", "test:///default", "define", "--validate", file],
    );
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn write(machines: &Machines, name: &str, text: &str) -> PathBuf {
    let path = machines.folder().join(name);
    fs::write(&path, text).unwrap();
    path
}

/// Executes a command of `bantam virsh` with an editor.
fn virsh(machines: &Machines, editor: &str, arguments: &[&str]) -> Ended {
    let launcher = [
        "env".to_owned(),
        "--unset=VISUAL".to_owned(),
        "--unset=LIBVIRT_DEFAULT_URI".to_owned(),
        "--unset=VIRSH_DEFAULT_CONNECT_URI".to_owned(),
        format!("EDITOR={editor}"),
        format!("BANTAM_STATE_DIR={}", machines.folder().display()),
    ];
    let arguments = ["virsh"].iter().chain(arguments).copied();
    Bantam::new(arguments).launcher(launcher).finish()
}

#[track_caller]
fn virsh_done(machines: &Machines, arguments: &[&str]) -> String {
    let ended = virsh(machines, "false", arguments);
    ended.has_status(0);
    ended.text()
}

/// Defines a machine by XML, and returns what is said of it.
#[track_caller]
fn define(machines: &Machines, xml: &str, more: &[&str]) -> String {
    let file = write(machines, "domain.xml", xml);
    let arguments: Vec<_> = ["define", file.to_str().unwrap()]
        .iter()
        .chain(more)
        .copied()
        .collect();
    let ended = machines.run(&arguments);
    ended.has_status(0);
    ended.stderr.clone()
}

/// A domain with a payload as its kernel, whose guest does nothing.
fn idle_domain(machines: &Machines, name: &str, more: &str, devices: &str) -> String {
    let disk = machines.folder().join("disk.img");
    fs::write(&disk, vec![0; 1 << 20]).unwrap();
    format!(
        "<domain type='kvm'>\n<name>{name}</name>{more}<memory unit='MiB'>32</memory>\n\
         <os><type>hvm</type><kernel>{}</kernel><cmdline>finish=hang</cmdline></os>\n<devices>\n\
         <disk type='file'><driver type='raw'/><source file='{}'/><target dev='vda'/></disk>\n\
         <interface type='user'/>\n<serial type='pty'/>\n<video><model type='virtio'/></video>\n{devices}</devices></domain>\n",
        payload("hello").display(),
        disk.display()
    )
}

#[test]
fn a_domain_lives_from_define_to_undefine() {
    require_kvm!();
    let machines = Machines::new();
    let id = "9a1b2c3d-0000-4000-8000-0123456789ab";
    let more = format!("<uuid>{}</uuid><title>A title</title>", id.to_uppercase());
    let said = define(&machines, &idle_domain(&machines, "web", &more, ""), &[]);
    assert_eq!(said, "note: <devices/video> is kept and has no effect\n");
    machines.done(&["start", "web"]);
    let (_, output) = machines.console_until("web", "finish=hang");
    assert!(output.contains("finish=hang"), "{output}");
    assert_eq!(virsh_done(&machines, &["-q", "domuuid", "web"]).trim(), id);
    assert!(virsh_done(&machines, &["list", "--title"]).contains("A title"));
    let xml = machines.done(&["dumpxml", "web"]);
    assert!(
        xml.contains("<model type='virtio'/>\n    </video>"),
        "{xml}"
    );
    assert_eq!(virsh_done(&machines, &["-q", "dumpxml", "web"]), xml);
    judge_domain(machines.folder(), &xml);
    // The guest is to give memory back, until it is started again.
    machines.done(&["setmem", "web", "24M"]);
    let changed = xml.replace(
        "<currentMemory unit='KiB'>32768<",
        "<currentMemory unit='KiB'>24576<",
    );
    assert_eq!(machines.done(&["dumpxml", "web"]), changed);
    assert_eq!(machines.done(&["dumpxml", "web", "--inactive"]), xml);
    assert_eq!(
        virsh_done(&machines, &["-q", "dumpxml", "--inactive", "web"]),
        xml
    );
    machines.done(&["destroy", "web"]);
    machines.done(&["undefine", "web"]);
    assert_eq!(machines.done(&["list", "--all", "--name"]), "");
    // The same by virsh's spellings.
    let file = write(&machines, "again.xml", &xml);
    let file = file.to_str().unwrap();
    assert_eq!(
        virsh_done(&machines, &["define", file]),
        format!("Domain 'web' defined from {file}\n\n")
    );
    virsh_done(&machines, &["start", "web"]);
    virsh_done(&machines, &["destroy", "web"]);
    virsh_done(&machines, &["undefine", "web"]);
}

#[test]
fn domains_of_virt_install_are_defined_and_edited_and_come_back() {
    for (name, xml, has_kernel) in DOMAINS {
        let machines = Machines::new();
        let kernel = ["--kernel", "/boot/vmlinuz"];
        let said = define(&machines, xml, if has_kernel { &[] } else { &kernel });
        assert!(said.contains("note: <devices/emulator> is kept"), "{said}");
        let dumped = machines.done(&["dumpxml", name]);
        judge_domain(machines.folder(), &dumped);
        // Into another name, with another UUID.
        let id = machines.json(&["dominfo", name])["id"]
            .as_str()
            .unwrap()
            .to_owned();
        let other = dumped
            .replace(&format!("<name>{name}<"), "<name>other<")
            .replace(&id, "00000000-1111-4222-8333-444455556666");
        define(&machines, &other, &[]);
        let folder = |name: &str| machines.of_machine(name).display().to_string();
        let expected = machines.machine_file(name);
        let found = machines.machine_file("other");
        assert_eq!(found.replace(&folder("other"), &folder(name)), expected);
        // What is kept is there again too.
        let again = machines.done(&["dumpxml", "other"]);
        assert_eq!(again, other);
        let editor = "sed -i 's/static.>[24]</static\\x27>3</; /<topology/d'";
        let edited = virsh(&machines, editor, &["edit", "other"]);
        edited.has_status(0);
        assert_eq!(edited.stderr, "");
        assert_eq!(
            edited.text(),
            "Domain 'other' XML configuration edited.\n\n"
        );
        assert!(machines.machine_file("other").contains("cpus = 3"));
        let edited = machines.done(&["dumpxml", "other"]);
        assert!(edited.contains("<emulator>") && edited.contains("<timer name='rtc'"));
    }
}

#[test]
fn a_machine_with_a_disk_boots_the_kernel_that_is_installed() {
    require_kvm!();
    let machines = Machines::new();
    let disk = machines.folder().join("debian.qcow2");
    qemu_img(&["create", "-f", "qcow2"], &[&disk, Path::new("16M")]);
    let (name, xml, _) = DOMAINS[1];
    let xml = xml
        .replace("/var/lib/libvirt/images", text(machines.folder()))
        .replace("type=\"network\"", "type=\"user\"")
        .replace("<source network=\"default\"/>", "")
        .replace("<boot dev=\"hd\"/>", "<cmdline>finish=hang</cmdline>")
        .replace("2097152", "65536");
    let domain = write(&machines, "domain.xml", &xml);
    let file = "disk = [{ path = 'debian.qcow2' }]\nmemory = '64M'\ncmdline = 'finish=hang'";
    let file = write(&machines, "file.toml", file);
    let kernel = [format!("BANTAM_KERNEL={}", payload("hello").display())];
    for (name, file) in [(name, &domain), ("file", &file)] {
        for program in [&[][..], &["virsh", "-q"]] {
            let defined = [program, &["define", text(file)]].concat();
            machines.bantam_with(&kernel, &defined).finish().succeeded();
            machines.done(&["start", name]);
            let (_, output) = machines.console_until(name, "finish=hang");
            assert!(output.contains("finish=hang"), "{output}");
            machines.done(&["destroy", name]);
            machines.done(&["undefine", name]);
        }
    }
    let without_disk = write(&machines, "empty.toml", "memory = '64M'");
    let defined = machines.bantam_with(&kernel, &["define", text(&without_disk)]);
    let line = defined.finish().failed_with_one_line().to_owned();
    assert!(line.contains("kernel"), "{line}");
}

#[test]
fn changes_by_other_commands_are_written() {
    let machines = Machines::new();
    define(&machines, &idle_domain(&machines, "web", "", ""), &[]);
    let disk = machines.folder().join("other.img");
    fs::write(&disk, vec![0; 1 << 20]).unwrap();
    let disk = format!("{},poll=on,bytes-per-second=1M", disk.display());
    machines.done(&["attach-disk", "web", &disk]);
    machines.done(&["attach-interface", "web", "nat"]);
    machines.done(&["setvcpus", "web", "2"]);
    machines.done(&["rename", "web", "www"]);
    let xml = machines.done(&["dumpxml", "www"]);
    for there in [
        "<name>www</name>",
        "<vcpu placement='static'>2</vcpu>",
        "<target dev='vdb' bus='virtio'/>",
        "<total_bytes_sec>1048576</total_bytes_sec>",
        "[disk.disk1]\npoll = true",
        "<source network='default'/>",
        "<video>",
    ] {
        assert!(xml.contains(there), "{there}\n{xml}");
    }
    judge_domain(machines.folder(), &xml);
    machines.done(&["detach-disk", "www", "vda"]);
    machines.done(&["clone", "www", "copy"]);
    let xml = machines.done(&["dumpxml", "copy"]);
    assert!(
        !xml.contains("disk.img") && xml.contains("<video>"),
        "{xml}"
    );
    judge_domain(machines.folder(), &xml);
}

#[test]
fn a_machine_of_all_options_is_accepted_by_libvirt_and_comes_back() {
    let machines = Machines::new();
    let text = "
        kernel = '/boot/vmlinux'
        append = 'quiet <&>'
        cpus = 4
        smt = true
        memory = '1G'
        serial = 'none'
        console = 'stdio'
        on-reboot = 'exit'
        on-halt = 'exit'
        boot-protocol = 'pvh'
        balloon = { size = '64M', deflate-on-oom = true, reporting = true, hinting = true, statistics = 5 }
        rng = { bytes-per-second = 1000 }
        vsock = { cid = 7, socket = '/run/web.vsock' }
        cgroup = { cpu-shares = 512, cpu-quota = 50000, memory-max = 2147483649, memory-high = '1G' }
        smbios = { manufacturer = 'Example', serial = 'ds=nocloud', asset-tag = 'shelf' }
        channel = [{ name = 'agent', socket = '/run/agent.sock' }, { name = 'log', file = '/var/log/web' }]
        [[disk]]
        path = '/dev/vg/root'
        id = 'root'
        cache = 'none'
        engine = 'io_uring'
        queues = 2
        [[disk]]
        path = '/images/data.qcow2'
        name = 'data.1'
        readonly = true
        backing = false
        block-size = 4096
        operations-per-second = 100
        burst-operations = 500
        [[net]]
        tap = 'tap0'
        mtu = 1400
        queues = 2
        [[net]]
        user = true
        forward = ['2222:22']
        name = 'lan'
        [[net]]
        bridge = 'br0'
        [[net]]
        macvtap = 'eth0'
        [[net]]
        network = 'lab'
        filter = false
        [[net]]
        passt = '/run/passt.sock'
    ";
    let file = write(&machines, "web.toml", text);
    let file = file.to_str().unwrap();
    machines.done(&["define", file, "--restart", "always"]);
    let xml = machines.done(&["dumpxml", "web"]);
    judge_domain(machines.folder(), &xml);
    let before = machines.machine_file("web");
    assert_eq!(define(&machines, &xml, &[]), "");
    // The formats that names say are said.
    let after = machines.machine_file("web");
    let without_formats = |text: &str| {
        let lines = text.lines().filter(|line| !line.starts_with("format = "));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(without_formats(&after), without_formats(&before));
    assert_eq!(machines.done(&["dumpxml", "web"]), xml);
}

#[test]
fn what_cannot_be_is_refused_in_a_line_and_changes_nothing() {
    let machines = Machines::new();
    let id = "9a1b2c3d-0000-4000-8000-0123456789ab";
    let uuid = format!("<uuid>{id}</uuid>");
    define(&machines, &idle_domain(&machines, "web", &uuid, ""), &[]);
    let kept = machines.machine_file("web");
    let generic = include_str!("../../libvirt/fixtures/debian-generic-ide.xml");
    let laughs =
        "<!DOCTYPE d [<!ENTITY a 'ha'><!ENTITY b '&a;&a;&a;'>]>\n<domain>&b;</domain>".to_owned();
    let hostdev = "<hostdev mode='subsystem' type='pci'/>";
    for (xml, reason) in [
        (
            idle_domain(&machines, "other", &uuid, ""),
            "is that of machine 'web'; remove <uuid>",
        ),
        (
            idle_domain(&machines, "web", &uuid.replace("9a", "9b"), ""),
            "there is one with the UUID 9a1b2c3d-",
        ),
        (idle_domain(&machines, "a/b", "", ""), "'a/b' is not a name"),
        (
            idle_domain(&machines, "WEB", "", ""),
            "there is a machine 'web' already",
        ),
        (
            idle_domain(&machines, "new", "", hostdev),
            "<devices/hostdev>",
        ),
        (generic.to_owned(), "disk 'hda' on the bus 'ide'"),
        (laughs, "whose entities are not expanded"),
        (
            format!("<domain>{}", " ".repeat(10 << 20)),
            "it is larger than 1 MiB",
        ),
    ] {
        let file = write(&machines, "refused.xml", &xml);
        let error = machines.refused(&["define", file.to_str().unwrap()]);
        assert!(error.contains(reason), "{error}");
        let error = virsh(&machines, "false", &["define", file.to_str().unwrap()]);
        error.has_status(1);
        assert_eq!(error.stderr.lines().count(), 1, "{error}");
        assert!(
            error
                .stderr
                .starts_with("error: Failed to define domain from "),
            "{error}"
        );
    }
    for (editor, reason) in [
        ("sed -i s/hvm/xen/", "type 'xen'"),
        ("sed -i s/web/www/", "domrename"),
        ("sed -i s/bus=.virtio/bus=\\'ide/", "'ide'"),
        ("sed -i s/domain/d/", "XML of <d>"),
        ("sed -i 1d", "it is not XML"),
        ("false", "has failed"),
    ] {
        let ended = virsh(&machines, editor, &["edit", "web"]);
        ended.has_status(1);
        assert!(ended.stderr.contains(reason), "{editor}: {ended}");
        assert_eq!(ended.stderr.lines().count(), 1, "{ended}");
    }
    let unchanged = virsh(&machines, "true", &["edit", "web"]);
    assert_eq!(
        unchanged.text(),
        "Domain 'web' XML configuration not changed.\n\n"
    );
    assert_eq!(machines.machine_file("web"), kept);
    assert_eq!(machines.done(&["list", "--all", "--name"]), "web\n");
}
