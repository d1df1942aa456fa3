//! The kernel that is installed with Bantam, and what a distribution does with it.

#![allow(clippy::unwrap_used, reason = "a test fails where the host does")]

use std::collections::HashSet;
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use bantam_tests::{
    Kernel, LinuxSlot, Machines, debian_root, linux_slot, partitioned_image, qemu_img, require_kvm,
    scripted_root,
};
use bantam_vmm::host::{Virtualization, virtualization};

/// How long a small Linux guest may take.
const LINUX_LIMIT: Duration = Duration::from_secs(400);

/// Returns the variable by which the kernel of this checkout is the installed one.
fn installed_kernel() -> Vec<String> {
    let kernel = Kernel::Distribution.vmlinux();
    vec![format!("BANTAM_KERNEL={}", kernel.display())]
}

/// Waits until a machine has ended by itself, and returns what its guest has printed to `output`.
#[track_caller]
fn output_at_end(host: &Machines, name: &str, output: &Path, limit: Duration) -> String {
    let begin = Instant::now();
    let text = || String::from_utf8_lossy(&fs::read(output).unwrap_or_default()).into_owned();
    while host.done(&["domstate", name]).trim() != "shut off" {
        assert!(begin.elapsed() < limit, "it goes on after\n{}", text());
        thread::sleep(Duration::from_millis(200));
    }
    text()
}

/// What a distribution finds in its kernel. `$?` of each command is printed after its name.
const LOOK_AROUND: &str = r#"#!/bin/sh
mount -t proc proc /proc
busybox mkdir -p /sys /mnt /cgroup /work /upper /lower /merged
mount -t sysfs sysfs /sys
echo "CMDLINE $(busybox cat /proc/cmdline)"
echo "RELEASE $(busybox uname -r)"
for type in autofs btrfs cgroup2 ext4 fuse iso9660 overlay squashfs tmpfs vfat virtiofs xfs; do
    busybox grep -qw $type /proc/filesystems && echo "FILESYSTEM $type"
done
for name in cgroup ipc mnt net pid user uts; do
    [ -e /proc/self/ns/$name ] && echo "NAMESPACE $name"
done
mount -t cgroup2 cgroup2 /cgroup && echo "CONTROLLERS $(busybox cat /cgroup/cgroup.controllers)"
mount -t vfat -o ro /dev/vdb /mnt && echo "SEED $(busybox ls /mnt)"
mount -t tmpfs tmpfs /work && busybox mkdir /work/u /work/w &&
    mount -t overlay -o lowerdir=/lower,upperdir=/work/u,workdir=/work/w overlay /merged && echo "OVERLAY mounted"
dd if=/dev/zero of=/swap bs=64k count=8 2>/dev/null
busybox mkswap /swap >/dev/null && busybox swapon /swap && echo "SWAP on"
ifconfig lo 127.0.0.1 up
echo "IPV6 $(busybox grep -c . /proc/net/if_inet6)"
echo "VENDOR $(busybox cat /sys/class/dmi/id/sys_vendor)"
echo "INPUT $(busybox cat /sys/class/input/event0/device/name)"
for name in vhost-vsock vsock fuse rtc0 net/tun hwrng loop-control; do
    [ -c /dev/$name ] && echo "DEVICE $name"
done
ping -c 1 -W 5 -6 ::1 >/dev/null && echo "PING6 answered"
sync
printf '\000' | dd of=/dev/port bs=1 seek=1280
"#;

#[test]
fn the_installed_kernel_boots_the_root_partition_of_an_image() {
    require_kvm!();
    let _slot = linux_slot();
    let host = Machines::new();
    let root = scripted_root(host.folder(), &[("sbin-init", LOOK_AROUND)]);
    let image = partitioned_image(host.folder(), &root);
    let output = host.folder().join("output");
    let serial = format!("file={}", output.display());
    let image = image.to_str().unwrap();
    let create = [
        "create",
        "web",
        "--image",
        image,
        "--append",
        "quiet init=/sbin-init",
        "--serial",
        &serial,
        "--start",
    ];
    host.bantam_with(&installed_kernel(), &create)
        .finish()
        .has_status(0);
    let text = output_at_end(&host, "web", &output, LINUX_LIMIT);
    for part in [
        "root=/dev/vda1 rw",
        "RELEASE 6.12.",
        "-bantam",
        "FILESYSTEM autofs",
        "FILESYSTEM btrfs",
        "FILESYSTEM cgroup2",
        "FILESYSTEM ext4",
        "FILESYSTEM fuse",
        "FILESYSTEM iso9660",
        "FILESYSTEM overlay",
        "FILESYSTEM squashfs",
        "FILESYSTEM vfat",
        "FILESYSTEM virtiofs",
        "FILESYSTEM xfs",
        "NAMESPACE cgroup",
        "NAMESPACE user",
        "CONTROLLERS cpuset cpu io memory",
        "SEED meta-data",
        "OVERLAY mounted",
        "SWAP on",
        "IPV6 1",
        "VENDOR Bantam",
        "INPUT Power Button",
        "DEVICE vsock",
        "DEVICE net/tun",
        "DEVICE rtc0",
        "PING6 answered",
    ] {
        assert!(text.contains(part), "'{part}' is not in\n{text}");
    }
    // It is found again at each start, and not the file that it was on the day of its creation.
    let file = host.machine_file("web");
    assert!(file.contains("kernel = "), "{file}");
}

#[test]
fn a_kernel_that_the_environment_names_wrongly_is_named() {
    let host = Machines::new();
    let disk = host.folder().join("disk.img");
    fs::write(&disk, [0; 4096]).unwrap();
    let arguments = ["run", "--disk", disk.to_str().unwrap()];
    let wrong = ["BANTAM_KERNEL=/nowhere/vmlinux".to_owned()];
    let ended = host.bantam_with(&wrong, &arguments).finish();
    let reason = ended.failed_with_one_line();
    assert!(
        reason.contains("cannot open kernel '/nowhere/vmlinux'"),
        "{reason}"
    );
}

/// Makes an image, in `folder`, of Debian's root file system with these files in it, each a path and its text, and with
/// these links, each a path and its target. Its partitions are those of [`partitioned_image`].
fn debian_image(folder: &Path, files: &[(&str, &str)], links: &[(String, &str)]) -> PathBuf {
    let raw = folder.join("root.ext4");
    let made = Command::new("/sbin/mke2fs")
        .args(["-q", "-t", "ext4", "-d"])
        .arg(debian_root())
        .arg(&raw)
        .arg("3G")
        .status();
    assert!(made.expect("there is e2fsprogs").success());
    let mut script = "mkdir /etc/systemd/system-generators\n".to_owned();
    for (number, (path, text)) in files.iter().enumerate() {
        let file = folder.join(format!("file{number}"));
        fs::write(&file, text).unwrap();
        script += &format!(
            "rm {path}\nwrite {} {path}\nsif {path} mode 0100755\n",
            file.display()
        );
    }
    for (path, target) in links {
        script += &format!("rm {path}\nsymlink {path} {target}\n");
    }
    let commands = folder.join("commands");
    fs::write(&commands, script).unwrap();
    let changed = Command::new("/sbin/debugfs")
        .args(["-w", "-f"])
        .args([&commands, &raw])
        .output();
    assert!(changed.expect("there is e2fsprogs").status.success());
    let image = partitioned_image(folder, &raw);
    fs::remove_file(raw).unwrap();
    image
}

/// Mounts what systemd would, and lets cloud-init do its work.
const INIT: &str = "#!/bin/sh\n\
    mount -t proc proc /proc\n\
    mount -t sysfs sysfs /sys\n\
    mount -t tmpfs tmpfs /run\n\
    mkdir -p /dev/pts /run/sshd\n\
    mount -t devpts devpts /dev/pts\n\
    ip link set lo up\n\
    exec python3 -u /first-boot.py\n";

/// Runs the four stages of cloud-init as its services do, and the services that they bring up. In one process, as Python
/// takes long to start if the kernel is emulated.
const FIRST_BOOT: &str = "\
import subprocess
from cloudinit.cmd.main import main

def stage(*arguments):
    print('STAGE', *arguments)
    main(['cloud-init', *arguments])

stage('init', '--local')
subprocess.run(['ifup', '-a'])
stage('init')
stage('modules', '--mode=config')
stage('modules', '--mode=final')
subprocess.run(['/report'])
subprocess.run(['/usr/sbin/sshd', '-D', '-e'])
";

/// Only what the test asks for, and keys that do not take long to make.
const CLOUD_CONFIG: &str = "\
datasource_list: [NoCloud, None]
ssh_genkeytypes: [ed25519]
cloud_init_modules: [write-files, set_hostname, users-groups, ssh]
cloud_config_modules: [runcmd]
cloud_final_modules: [scripts-user]
";

const REPORT: &str = r#"#!/bin/sh
echo "CMDLINE $(cat /proc/cmdline)"
echo "HOST NAME $(hostname) $(cat /etc/hostname)"
echo "USER $(id ada)"
echo "AUTHORIZED $(cat /home/ada/.ssh/authorized_keys)"
echo "HOST KEY $(ssh-keygen -l -f /etc/ssh/ssh_host_ed25519_key.pub)"
echo "WRITTEN $(cat /written)"
echo "RAN $(cat /ran)"
echo "ADDRESS $(ip -4 -o address show dev eth0)"
echo "SOURCE $(cat /run/cloud-init/status.json | tr -d '\n ' | grep -o '"datasource":"[^"]*"')"
echo "REPORT ENDS"
"#;

const FILES: [(&str, &str); 4] = [
    ("/init-first-boot", INIT),
    ("/first-boot.py", FIRST_BOOT),
    ("/report", REPORT),
    ("/etc/cloud/cloud.cfg.d/99-test.cfg", CLOUD_CONFIG),
];

/// How long cloud-init may take in a machine whose kernel is emulated, beside another one.
const CLOUD_INIT_LIMIT: Duration = Duration::from_secs(1200);

/// What the guests are told beside user and key.
const USER_DATA: &str = "\
write_files: [{path: /written, content: 'by cloud-init'}]
runcmd: ['echo \"$(id -un) on $(hostname)\" > /ran']
";

#[test]
#[ignore = "it takes root, a root file system of Debian and minutes: make distribution"]
fn cloud_init_sets_up_a_machine_from_a_seed_in_fat_and_in_iso_9660() {
    require_kvm!();
    let host = Machines::new();
    let folder = host.folder();
    let image = debian_image(folder, &FILES, &[]);
    let key = folder.join("key");
    let made = Command::new("ssh-keygen")
        .args(["-q", "-t", "ed25519", "-N", "", "-C", "me@host", "-f"])
        .arg(&key)
        .status();
    assert!(made.expect("there is openssh-client").success());
    let public = fs::read_to_string(folder.join("key.pub")).unwrap();
    let public = public.trim();
    let user = format!(
        "#cloud-config\nusers: [{{name: ada, shell: /bin/bash, ssh_authorized_keys: ['{public}']}}]\n{USER_DATA}"
    );

    // The seed that Bantam makes.
    let data = folder.join("user-data.yaml");
    fs::write(&data, &user).unwrap();
    let fat = Guest::create(
        &host,
        "fat",
        &[
            "--image",
            image.to_str().unwrap(),
            "--cloud-init",
            data.to_str().unwrap(),
        ],
    );
    // A seed that the user has made.
    let seed = folder.join("seed");
    fs::create_dir(&seed).unwrap();
    fs::write(seed.join("user-data"), &user).unwrap();
    fs::write(
        seed.join("meta-data"),
        "instance-id: iso-1\nlocal-hostname: iso\ndsmode: local\n",
    )
    .unwrap();
    fs::write(
        seed.join("network-config"),
        "version: 2\nethernets: {eth0: {match: {macaddress: '52:54:00:00:00:07'}, dhcp4: true}}\n",
    )
    .unwrap();
    let iso = folder.join("seed.iso");
    let made = Command::new("xorriso")
        .args([
            "-as",
            "genisoimage",
            "-quiet",
            "-volid",
            "CIDATA",
            "-joliet",
            "-rock",
            "-output",
        ])
        .args([&iso, &seed])
        .status();
    assert!(made.expect("there is xorriso").success());
    let overlay = folder.join("overlay.qcow2");
    qemu_img(
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-F",
            "qcow2",
            "-b",
            image.to_str().unwrap(),
        ],
        &[&overlay],
    );
    let iso = Guest::create(
        &host,
        "iso",
        &[
            "--disk",
            overlay.to_str().unwrap(),
            "--disk",
            &format!("{},ro", iso.display()),
        ],
    );

    let mut host_keys = HashSet::new();
    for guest in [&fat, &iso] {
        let text = guest.output_with("REPORT ENDS", CLOUD_INIT_LIMIT);
        let name = guest.name;
        let authorized = format!("AUTHORIZED {public}");
        let host_name = format!("HOST NAME {name} {name}");
        let ran = format!("RAN root on {name}");
        for part in [
            "root=/dev/vda1 rw",
            &host_name,
            "USER uid=1000(ada)",
            &authorized,
            "WRITTEN by cloud-init",
            &ran,
            "ADDRESS ",
            " inet 10.0.2.15/24",
            "DataSourceNoCloud[seed=/dev/vdb]",
        ] {
            assert!(text.contains(part), "{name}: '{part}' is not in\n{text}");
        }
        let host_key = text.lines().find(|line| line.starts_with("HOST KEY 256"));
        host_keys.insert(
            host_key
                .unwrap_or_else(|| panic!("no key in\n{text}"))
                .to_owned(),
        );
        assert_eq!(
            guest.ssh(&key, "whoami; cat /etc/hostname"),
            format!("ada\n{name}\n")
        );
        println!("{name}: {} s", guest.begin.elapsed().as_secs());
        host.done(&["destroy", name]);
    }
    assert_eq!(host_keys.len(), 2);
}

/// A machine that cloud-init sets up.
struct Guest {
    name: &'static str,
    output: PathBuf,
    port: u16,
    begin: Instant,
    _slot: LinuxSlot,
}

impl Guest {
    /// Makes and starts a machine with these options.
    fn create(host: &Machines, name: &'static str, options: &[&str]) -> Guest {
        let slot = linux_slot();
        let output = host.folder().join(format!("{name}.output"));
        // Another program could take it meanwhile, but hardly does.
        let port = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = port.local_addr().unwrap().port();
        let serial = format!("file={}", output.display());
        let net = format!("user,mac=52:54:00:00:00:07,forward=tcp:127.0.0.1:{port}:22");
        let create = [
            "create",
            name,
            "--memory",
            "512M",
            "--net",
            &net,
            "--serial",
            &serial,
            "--append",
            "quiet init=/init-first-boot",
            "--start",
        ];
        let arguments = [&create, options].concat();
        host.bantam_with(&installed_kernel(), &arguments)
            .finish()
            .has_status(0);
        Guest {
            name,
            output,
            port,
            begin: Instant::now(),
            _slot: slot,
        }
    }

    /// Waits until the guest has printed this, and returns all that it has printed.
    #[track_caller]
    fn output_with(&self, awaited: &str, limit: Duration) -> String {
        loop {
            let text = fs::read(&self.output).unwrap_or_default();
            let text = String::from_utf8_lossy(&text).into_owned();
            if text.contains(awaited) {
                return text;
            }
            let is_late = self.begin.elapsed() > limit;
            assert!(!is_late, "{}: '{awaited}' is not in\n{text}", self.name);
            thread::sleep(Duration::from_millis(200));
        }
    }

    /// Executes a command over SSH as the user `ada`, and returns what it prints.
    #[track_caller]
    fn ssh(&self, key: &Path, command: &str) -> String {
        let options = [
            "BatchMode=yes",
            "ConnectTimeout=120",
            "StrictHostKeyChecking=no",
            "UserKnownHostsFile=/dev/null",
        ];
        loop {
            let ended = Command::new("ssh")
                .arg("-i")
                .arg(key)
                .args(options.iter().flat_map(|option| ["-o", option]))
                .args(["-p", &self.port.to_string(), "ada@127.0.0.1", command])
                .output()
                .expect("there is openssh-client");
            if ended.status.success() {
                return String::from_utf8_lossy(&ended.stdout).into_owned();
            }
            let is_late = self.begin.elapsed() > CLOUD_INIT_LIMIT;
            assert!(!is_late, "{}: {ended:?}", self.name);
            thread::sleep(Duration::from_secs(1));
        }
    }
}

/// Units that need minutes if the kernel is emulated, and the generators, which are all programs of their own.
const SLOW_UNITS: [&str; 22] = [
    "apt-daily-upgrade.timer",
    "apt-daily.timer",
    "dbus.service",
    "dbus.socket",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "networking.service",
    "ssh.service",
    "systemd-journal-flush.service",
    "systemd-journald-audit.socket",
    "systemd-journald-dev-log.socket",
    "systemd-journald.service",
    "systemd-journald.socket",
    "systemd-logind.service",
    "systemd-tmpfiles-setup-dev.service",
    "systemd-tmpfiles-setup.service",
    "systemd-udev-trigger.service",
    "systemd-udevd-control.socket",
    "systemd-udevd-kernel.socket",
    "systemd-udevd.service",
];
const GENERATORS: [&str; 13] = [
    "cloud-init-generator",
    "systemd-cryptsetup-generator",
    "systemd-debug-generator",
    "systemd-fstab-generator",
    "systemd-getty-generator",
    "systemd-gpt-auto-generator",
    "systemd-hibernate-resume-generator",
    "systemd-integritysetup-generator",
    "systemd-rc-local-generator",
    "systemd-run-generator",
    "systemd-system-update-generator",
    "systemd-sysv-generator",
    "systemd-veritysetup-generator",
];

/// How long Debian may take to its login prompt if the kernel is emulated.
const LOGIN_LIMIT: Duration = Duration::from_secs(1800);

#[test]
#[ignore = "it takes root, a root file system of Debian and many minutes: make test-distribution"]
fn debian_reaches_its_login_prompt_under_systemd() {
    require_kvm!();
    let slot = linux_slot();
    let host = Machines::new();
    let mut links = Vec::new();
    let mut words = "quiet".to_owned();
    if let Virtualization::Pvm | Virtualization::None = virtualization() {
        let system = "/etc/systemd/system";
        let units = SLOW_UNITS.iter().map(|unit| format!("{system}/{unit}"));
        let generators = GENERATORS
            .iter()
            .map(|it| format!("{system}-generators/{it}"));
        links.extend(units.chain(generators).map(|path| (path, "/dev/null")));
        // Needs no udev, as that of the serial port does.
        let getty = "console-getty.service";
        links.push((
            format!("{system}/multi-user.target.wants/{getty}"),
            "/lib/systemd/system/console-getty.service",
        ));
        // systemd does not pass its own environment on.
        words += " systemd.setenv=GLIBC_TUNABLES=glibc.cpu.hwcaps=-AVX,-AVX2,-AVX512F,-AVX512VL,-AVX512BW,\
                  -AVX_Fast_Unaligned_Load";
    }
    let image = debian_image(host.folder(), &[], &links);
    let output = host.folder().join("output");
    let serial = format!("file={}", output.display());
    let create = [
        "create",
        "debian",
        "--image",
        image.to_str().unwrap(),
        "--memory",
        "512M",
        "--serial",
        &serial,
        "--append",
        &words,
        "--start",
    ];
    host.bantam_with(&installed_kernel(), &create)
        .finish()
        .has_status(0);
    let guest = Guest {
        name: "debian",
        output,
        port: 0,
        begin: Instant::now(),
        _slot: slot,
    };
    let text = guest.output_with("login:", LOGIN_LIMIT);
    assert!(text.contains("Debian GNU/Linux 12"), "{text}");
    println!("{} s to the login prompt", guest.begin.elapsed().as_secs());
}
