//! Reset of a system's identity in a helper machine: `bantam sysprep`, and `bantam clone` of templates. Tools of the host judge what
//! has become of disks that the tests have made.

#![allow(clippy::unwrap_used, reason = "a test fails where the host does")]

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use bantam_tests::{
    Bantam, Ended, Kernel, Machines, files_below, linux_slot, qemu_img, require_kvm, sysprep_initrd,
};
use nix::sys::signal::Signal;
use serde_json::Value;

const MIB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(300);
const LUKS: u32 = 4;

/// Runs a tool of the host, and returns what it prints.
#[track_caller]
fn tool(program: &str, arguments: &[&str], input: &str) -> String {
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .env("MTOOLS_SKIP_CHECK", "1");
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().unwrap_or_else(|error| {
        panic!("{program} is needed for this test (resources/install-packages.sh): {error}")
    });
    child
        .stdin
        .take()
        .unwrap()
        .write_all(input.as_bytes())
        .unwrap();
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {text}{errors}"
    );
    text
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn write(folder: &Path, path: &str, content: impl AsRef<[u8]>) {
    let path = folder.join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

/// A system on a disk with a GPT: a FAT partition for EFI, a swap area, an ext4 root, and an encrypted volume.
struct System {
    folder: PathBuf,
    disk: PathBuf,
}

/// The partitions by their numbers: name, size in MiB.
const PARTITIONS: [(&str, u64); 4] = [("EFI", 8), ("swap", 2), ("root", 24), ("secret", 2)];

/// Identifiers of a disk, by what they identify.
type Identifiers = BTreeMap<String, String>;

impl System {
    /// Makes the disk in `folder`, with what `add` puts into the root beside the usual files.
    fn make(folder: &Path, name: &str, add: impl FnOnce(&Path, &Identifiers)) -> System {
        let system = System {
            folder: folder.join(format!("{name}.work")),
            disk: folder.join(format!("{name}.img")),
        };
        let work = &system.folder;
        fs::create_dir_all(work).unwrap();
        let total: u64 = PARTITIONS.iter().map(|(_, size)| size).sum();
        File::create(&system.disk)
            .unwrap()
            .set_len((total + 2) * MIB)
            .unwrap();
        let mut layout = "label: gpt\n".to_owned();
        for (name, size) in PARTITIONS {
            let kind = if name == "EFI" { "U" } else { "L" };
            layout.push_str(&format!("size={size}MiB, type={kind}, name={name}\n"));
        }
        tool("sfdisk", &["--quiet", text(&system.disk)], &layout);

        let [efi, swap, root, secret] = [1, 2, 3, LUKS].map(|number| system.part(number));
        for (part, (_, size)) in [&efi, &swap, &root, &secret].into_iter().zip(PARTITIONS) {
            File::create(part).unwrap().set_len(size * MIB).unwrap();
        }
        tool("mkfs.vfat", &["-n", "EFI", text(&efi)], "");
        tool("mkswap", &[text(&swap)], "");
        File::options()
            .write(true)
            .open(&secret)
            .unwrap()
            .write_all_at(b"LUKS\xba\xbe", 0)
            .unwrap();
        system.put([1, 2, LUKS]);

        // The root names its own UUID, which is chosen before.
        let mut identifiers = system.identifiers();
        let uuid = tool("cat", &["/proc/sys/kernel/random/uuid"], "")
            .trim()
            .to_owned();
        identifiers.insert("ext4".to_owned(), uuid.clone());
        let id = |name: &str| identifiers[name].as_str();
        let entry = format!(
            "title Debian\noptions root=UUID={uuid} resume=UUID={}\n",
            id("swap")
        );
        write(work, "entry.conf", &entry);
        tool(
            "mmd",
            &["-i", text(&efi), "::/loader", "::/loader/entries"],
            "",
        );
        tool(
            "mcopy",
            &[
                "-i",
                text(&efi),
                text(&work.join("entry.conf")),
                "::/loader/entries/debian.conf",
            ],
            "",
        );
        system.put([1]);

        let tree = work.join("tree");
        write(&tree, "etc/os-release", "PRETTY_NAME=\"Test Linux 1\"\n");
        write(&tree, "etc/hostname", "base\n");
        write(
            &tree,
            "etc/hosts",
            "127.0.0.1 localhost\n127.0.1.1 base.example.org base\n",
        );
        let fstab = format!(
            "# the root\nUUID={uuid} / ext4 errors=remount-ro 0 1\nPARTUUID={} /boot/efi vfat umask=0077 0 2\nUUID={} none swap sw 0 0\n",
            id("partition 1"),
            id("swap")
        );
        write(&tree, "etc/fstab", fstab);
        write(
            &tree,
            "etc/machine-id",
            "0123456789abcdef0123456789abcdef\n",
        );
        fs::create_dir_all(tree.join("boot/efi")).unwrap();
        fs::create_dir_all(tree.join("var/lib/dbus")).unwrap();
        symlink("/etc/machine-id", tree.join("var/lib/dbus/machine-id")).unwrap();
        for file in ["rsa_key", "rsa_key.pub", "ed25519_key", "ed25519_key.pub"] {
            write(&tree, &format!("etc/ssh/ssh_host_{file}"), "a key");
        }
        write(&tree, "etc/ssh/sshd_config", "# a configuration");
        write(&tree, "usr/bin/ssh-keygen", "");
        write(&tree, "usr/lib/systemd/systemd", "");
        write(&tree, "var/lib/systemd/random-seed", "a seed");
        write(&tree, "var/lib/dhcp/dhclient.leases", "a lease");
        write(&tree, "etc/udev/rules.d/70-persistent-net.rules", "a rule");
        write(
            &tree,
            "var/lib/cloud/instances/i-1/user-data.txt",
            "#cloud-config",
        );
        symlink(
            "/var/lib/cloud/instances/i-1",
            tree.join("var/lib/cloud/instance"),
        )
        .unwrap();
        write(
            &tree,
            "boot/grub/grub.cfg",
            format!("search --fs-uuid --set=root {uuid}\nlinux /vmlinuz root=UUID={uuid} ro\n"),
        );
        write(
            &tree,
            "etc/default/grub",
            format!("GRUB_CMDLINE_LINUX=\"resume=UUID={}\"\n", id("swap")),
        );
        write(&tree, "var/log/syslog", "a log");
        write(&tree, "root/.bash_history", "a history");
        write(
            &tree,
            "usr/share/doc/uuids",
            format!("{uuid} is no more than text here"),
        );
        add(&tree, &identifiers);
        // As Debian 12 makes it.
        let features = "metadata_csum,64bit,^metadata_csum_seed,^orphan_file";
        tool(
            "mke2fs",
            &[
                "-q",
                "-F",
                "-t",
                "ext4",
                "-O",
                features,
                "-U",
                &uuid,
                "-d",
                text(&tree),
                text(&root),
            ],
            "",
        );
        system.put([3]);
        system
    }

    fn part(&self, number: u32) -> PathBuf {
        self.folder.join(format!("part{number}"))
    }

    /// Copies the files of partitions to their places on the disk.
    fn put<const N: usize>(&self, numbers: [u32; N]) {
        let disk = File::options().write(true).open(&self.disk).unwrap();
        for number in numbers {
            let part = fs::read(self.part(number)).unwrap();
            disk.write_all_at(&part, begin(number)).unwrap();
        }
    }

    /// Returns a view of another disk of the same layout, in `folder`.
    fn other(&self, disk: &Path, folder: &Path) -> System {
        fs::create_dir_all(folder).unwrap();
        let raw = folder.join("disk.raw");
        qemu_img(&["convert", "-O", "raw"], &[disk, &raw]);
        let other = System {
            folder: folder.to_path_buf(),
            disk: raw,
        };
        other.take();
        other
    }

    /// Copies the partitions of the disk to files.
    fn take(&self) {
        let disk = File::open(&self.disk).unwrap();
        for (number, (_, size)) in (1..).zip(PARTITIONS) {
            let mut part = vec![0; (size * MIB) as usize];
            disk.read_exact_at(&mut part, begin(number)).unwrap();
            fs::write(self.part(number), part).unwrap();
        }
    }

    /// Returns all identifiers, as tools of the host see them.
    fn identifiers(&self) -> Identifiers {
        let dump = tool("sfdisk", &["--json", text(&self.disk)], "");
        let dump: Value = serde_json::from_str(&dump).unwrap();
        let id = |value: &Value| value.as_str().unwrap().to_lowercase();
        let mut found =
            Identifiers::from([("table".to_owned(), id(&dump["partitiontable"]["id"]))]);
        for (number, partition) in
            (1..).zip(dump["partitiontable"]["partitions"].as_array().unwrap())
        {
            found.insert(format!("partition {number}"), id(&partition["uuid"]));
            let part = self.part(number);
            if number == LUKS || !part.exists() {
                continue;
            }
            let probe = Command::new("/usr/sbin/blkid")
                .args(["-p", "-o", "export", text(&part)])
                .output()
                .unwrap();
            let probe = String::from_utf8(probe.stdout).unwrap();
            let tag = |name: &str| {
                probe
                    .lines()
                    .find_map(|line| line.strip_prefix(name))
                    .map(str::to_owned)
            };
            if let (Some(kind), Some(uuid)) = (tag("TYPE="), tag("UUID=")) {
                found.insert(kind, uuid);
            }
        }
        found
    }

    /// Has tools of the host say that nothing is wrong.
    fn check(&self) {
        tool("e2fsck", &["-f", "-n", text(&self.part(3))], "");
        tool("fsck.vfat", &["-n", text(&self.part(1))], "");
        let verified = tool("sfdisk", &["--verify", text(&self.disk)], "");
        assert!(verified.contains("No errors detected"), "{verified}");
    }

    /// Returns the files of the root, and the boot loader's entry, by their paths.
    fn files(&self) -> BTreeMap<PathBuf, Option<Vec<u8>>> {
        let folder = self.folder.join("files");
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir(&folder).unwrap();
        let request = format!("rdump / {}", text(&folder));
        tool("debugfs", &["-R", &request, text(&self.part(3))], "");
        let _ = fs::remove_dir_all(folder.join("lost+found"));
        let mut files: BTreeMap<_, _> = all_below(&folder)
            .into_iter()
            .map(|path| {
                let content = match fs::symlink_metadata(&path).unwrap().is_symlink() {
                    true => Some(
                        fs::read_link(&path)
                            .unwrap()
                            .to_string_lossy()
                            .into_owned()
                            .into_bytes(),
                    ),
                    false => fs::read(&path).ok(),
                };
                (path.strip_prefix(&folder).unwrap().to_path_buf(), content)
            })
            .collect();
        let entry = tool(
            "mtype",
            &["-i", text(&self.part(1)), "::/loader/entries/debian.conf"],
            "",
        );
        files.insert("EFI entry".into(), Some(entry.into_bytes()));
        files
    }

    /// Returns the bytes of the disk.
    fn bytes(&self) -> Vec<u8> {
        fs::read(&self.disk).unwrap()
    }
}

fn begin(number: u32) -> u64 {
    let before = PARTITIONS.iter().take(number as usize - 1);
    MIB + before.map(|(_, size)| size * MIB).sum::<u64>()
}

/// Returns all below a folder; links are not followed.
fn all_below(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_dir() {
            found.extend(all_below(&entry.path()));
        }
        found.push(entry.path());
    }
    found
}

/// Returns a command with what the helper machine starts from.
fn helped(machines: &Machines, arguments: &[&str]) -> Bantam {
    let state = format!("BANTAM_STATE_DIR={}", text(machines.folder()));
    let kernel = format!("BANTAM_KERNEL={}", text(&Kernel::Distribution.vmlinux()));
    let initrd = format!("BANTAM_SYSPREP_INITRD={}", text(&sysprep_initrd()));
    let launcher = ["env".to_owned(), state, kernel, initrd];
    Bantam::new(arguments).launcher(launcher).limit(LIMIT)
}

#[track_caller]
fn done(machines: &Machines, arguments: &[&str]) -> Ended {
    let _slot = linux_slot();
    let ended = helped(machines, arguments).finish();
    ended.has_status(0);
    ended
}

/// Returns the text of a file.
fn read(files: &BTreeMap<PathBuf, Option<Vec<u8>>>, path: &str) -> Option<String> {
    let content = files.get(Path::new(path))?.clone()?;
    Some(String::from_utf8(content).unwrap())
}

/// Checks that a system is a copy of `before` that has another identity and the host name `name`, and nothing else.
fn is_another(before: &System, after: &System, name: &str) {
    after.check();
    let (old, new) = (before.identifiers(), after.identifiers());
    let expected = [
        "table",
        "partition 1",
        "partition 2",
        "partition 3",
        "partition 4",
        "vfat",
        "swap",
        "ext4",
    ];
    for what in expected {
        assert_ne!(old[what], new[what], "{what}");
    }
    let followed = |text: String| {
        old.iter()
            .fold(text, |text, (what, id)| text.replace(id, &new[what]))
    };
    let (mut then, now) = (before.files(), after.files());
    for path in [
        "etc/fstab",
        "boot/grub/grub.cfg",
        "etc/default/grub",
        "EFI entry",
    ] {
        let expected = read(&then, path).map(followed);
        assert_eq!(read(&now, path), expected, "{path}");
        then.insert(path.into(), now[Path::new(path)].clone());
    }
    let mut set = |path: &str, content: &str| {
        then.insert(path.into(), Some(content.into()));
    };
    set("etc/hostname", &format!("{name}\n"));
    set(
        "etc/hosts",
        &format!("127.0.0.1 localhost\n127.0.1.1 {name}.example.org {name}\n"),
    );
    set("etc/machine-id", "");
    let unit = "etc/systemd/system/bantam-ssh-host-keys.service";
    let text = read(&now, unit).unwrap();
    assert!(text.contains("ssh-keygen -A"));
    set(unit, &text);
    let wants = "etc/systemd/system/multi-user.target.wants";
    set(
        &format!("{wants}/bantam-ssh-host-keys.service"),
        "../bantam-ssh-host-keys.service",
    );
    for folder in ["etc/systemd", "etc/systemd/system", wants] {
        then.insert(folder.into(), None);
    }
    for path in [
        "etc/ssh/ssh_host_rsa_key",
        "etc/ssh/ssh_host_rsa_key.pub",
        "etc/ssh/ssh_host_ed25519_key",
        "etc/ssh/ssh_host_ed25519_key.pub",
        "var/lib/systemd/random-seed",
        "var/lib/dhcp/dhclient.leases",
        "etc/udev/rules.d/70-persistent-net.rules",
        "var/lib/cloud/instance",
        "var/lib/cloud/instances",
        "var/lib/cloud/instances/i-1",
        "var/lib/cloud/instances/i-1/user-data.txt",
    ] {
        assert!(then.remove(Path::new(path)).is_some(), "{path}");
    }
    let paths = |files: &BTreeMap<PathBuf, _>| files.keys().cloned().collect::<Vec<_>>();
    assert_eq!(paths(&now), paths(&then));
    for (path, content) in &now {
        assert_eq!(content, &then[path], "{}", path.display());
    }
}

#[test]
fn clones_of_a_template_are_systems_of_their_own() {
    require_kvm!();
    let machines = Machines::new();
    let system = System::make(machines.folder(), "base", |_, _| {});
    let root = system.identifiers()["partition 3"].clone();
    let disk = text(&system.disk);
    machines.create(
        "base",
        "hello",
        &format!("finish=hang root=PARTUUID={root}"),
        &["--disk", disk],
    );
    machines.done(&["template", "base"]);
    let before = system.bytes();

    let names = ["one", "two"];
    thread::scope(|scope| {
        for name in names {
            let machines = &machines;
            scope.spawn(move || done(machines, &["clone", "base", name]));
        }
    });
    let mut seen = HashSet::new();
    for name in names {
        let overlay = machines.of_machine(name).join("disks/disk0.qcow2");
        let clone = system.other(&overlay, &machines.folder().join(name));
        is_another(&system, &clone, name);
        let identifiers = clone.identifiers();
        // The command line of the kernel follows.
        let file = machines.machine_file(name);
        assert!(
            file.contains(&identifiers["partition 3"]) && !file.contains(&root),
            "{file}"
        );
        assert!(identifiers.into_values().all(|id| seen.insert(id)));
        // Nothing of the helper machine is left.
        let files: HashSet<_> = files_below(&machines.of_machine(name))
            .into_iter()
            .collect();
        assert!(
            files.iter().all(|path| !text(path).contains("exchange")),
            "{files:?}"
        );
        machines.done(&["start", name]);
    }
    assert_eq!(system.bytes(), before);
    let refused = helped(&machines, &["sysprep", "base"]).finish();
    let line = refused.failed();
    assert!(line.contains("other machines need its disks"), "{line}");
}

#[test]
fn a_dry_run_says_what_would_change_and_a_killed_one_changes_nothing() {
    require_kvm!();
    let machines = Machines::new();
    let system = System::make(machines.folder(), "disk", |_, _| {});
    let disk = text(&system.disk);
    let before = system.bytes();
    let below = files_below(machines.folder());
    let arguments = [
        "sysprep",
        disk,
        "--operations",
        "all",
        "--hostname",
        "web",
        "--dry-run",
        "--output",
        "json",
    ];
    let ended = done(&machines, &arguments);
    let report: Value = serde_json::from_str(&ended.text()).unwrap();
    assert!(
        report["system"]
            .as_str()
            .unwrap()
            .starts_with("Test Linux 1 on disk.img partition 3"),
        "{report}"
    );
    let operations: HashSet<_> = report["changes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|it| it["operation"].as_str().unwrap())
        .collect();
    assert_eq!(operations.len(), 11, "{report}");
    let left = &report["left"][0];
    assert_eq!(left["object"], "disk.img partition 4");
    assert!(left["reason"].as_str().unwrap().contains("LUKS"));
    assert_eq!(system.bytes(), before);
    assert_eq!(files_below(machines.folder()), below);

    // As if the host had lost its power while the helper machine works.
    {
        let _slot = linux_slot();
        let running = helped(&machines, &["sysprep", disk]).start();
        let overlay = machines.folder().join(".disk.img.sysprep/sysprep/0.qcow2");
        let begin = Instant::now();
        let written = || fs::metadata(&overlay).is_ok_and(|file| file.len() > MIB);
        while !written() && begin.elapsed() < LIMIT {
            thread::sleep(Duration::from_millis(1));
        }
        running.signal(Signal::SIGKILL);
        running.wait();
    }
    assert_eq!(system.bytes(), before);
    // The next command does it, on the disk itself.
    let original = system.other(&system.disk, &machines.folder().join("original"));
    done(&machines, &["sysprep", disk, "--hostname", "web"]);
    assert!(!machines.folder().join(".disk.img.sysprep").exists());
    let now = system.other(&system.disk, &machines.folder().join("now"));
    is_another(&original, &now, "web");
}

#[test]
fn a_hostile_system_changes_nothing_but_itself() {
    require_kvm!();
    let machines = Machines::new();
    let system = System::make(machines.folder(), "disk", |tree, identifiers| {
        // The helper machine has these paths too.
        for (path, target) in [
            ("etc/hostname", "/../../../proc/sys/kernel/hostname"),
            ("etc/hosts", "hosts"),
            ("etc/machine-id", "/dev/vda"),
            ("var/lib/systemd/random-seed", "/init"),
            (
                "etc/udev/rules.d/70-persistent-net.rules",
                "../../../../../../../init",
            ),
        ] {
            fs::remove_file(tree.join(path)).unwrap();
            symlink(target, tree.join(path)).unwrap();
        }
        fs::remove_dir_all(tree.join("etc/ssh")).unwrap();
        symlink("/", tree.join("etc/ssh")).unwrap();
        fs::remove_dir_all(tree.join("var/log")).unwrap();
        symlink("/proc", tree.join("var/log")).unwrap();
        let fstab = format!(
            "PARTUUID={} /../../dev vfat defaults 0 0\n",
            identifiers["partition 1"]
        );
        let file = File::create(tree.join("etc/fstab")).unwrap();
        file.write_all_at(fstab.as_bytes(), 0).unwrap();
        file.set_len(100 * MIB).unwrap();
    });
    let before = system.identifiers();
    let arguments = [
        "sysprep",
        text(&system.disk),
        "--operations",
        "all",
        "--hostname",
        "web",
        "--output",
        "json",
    ];
    let report: Value = serde_json::from_str(&done(&machines, &arguments).text()).unwrap();
    let left: Vec<_> = report["left"]
        .as_array()
        .unwrap()
        .iter()
        .map(|it| it["object"].as_str().unwrap())
        .collect();
    for object in ["/etc/hosts", "/etc/fstab"] {
        assert!(left.contains(&object), "{object} {report}");
    }
    // What names the UUIDs cannot follow, so they stay.
    let now = system.other(&system.disk, &machines.folder().join("now"));
    now.check();
    assert_eq!(now.identifiers(), before);
    let files = now.files();
    assert_eq!(read(&files, "etc/hostname").as_deref(), Some("web\n"));
    assert_eq!(read(&files, "etc/hosts").as_deref(), Some("hosts"));
    assert!(!files.contains_key(Path::new("var/lib/systemd/random-seed")));
}

#[test]
fn two_systems_are_refused_and_nothing_changes() {
    require_kvm!();
    let machines = Machines::new();
    let [one, two] = ["one", "two"].map(|name| System::make(machines.folder(), name, |_, _| {}));
    let before = [one.bytes(), two.bytes()];
    machines.create(
        "both",
        "hello",
        "finish=hang",
        &["--disk", text(&one.disk), "--disk", text(&two.disk)],
    );
    let slot = linux_slot();
    let ended = helped(&machines, &["clone", "both", "copy", "--reset-identity"]).finish();
    let line = ended.failed_with_one_line();
    assert!(
        line.contains("several systems") && line.contains("disk1 partition 3"),
        "{line}"
    );
    drop(slot);
    assert_eq!(machines.done(&["list", "--all", "--name"]), "both\n");
    assert_eq!([one.bytes(), two.bytes()], before);
}

#[test]
fn what_cannot_be_done_is_refused_with_the_remedy() {
    require_kvm!();
    let machines = Machines::new();
    let disk = machines.folder().join("disk.img");
    File::create(&disk).unwrap().set_len(MIB).unwrap();
    machines.create("base", "hello", "finish=hang", &["--disk", text(&disk)]);
    machines.create("empty", "hello", "finish=hang", &[]);
    machines.done(&["template", "base"]);
    // The program that is tested is not installed.
    let line = machines.refused(&["clone", "base", "copy"]);
    assert!(
        line.contains("--keep-identity") && line.contains("BANTAM_KERNEL"),
        "{line}"
    );
    let line = machines.refused(&["sysprep", text(&disk)]);
    assert!(line.contains("no kernel is installed"), "{line}");
    machines.done(&["clone", "base", "copy", "--keep-identity"]);
    let failed = |arguments: &[&str]| {
        helped(&machines, arguments)
            .finish()
            .failed_with_one_line()
            .to_owned()
    };
    for (arguments, reason) in [
        (
            &["sysprep", "absent"][..],
            "neither a machine nor a disk image",
        ),
        (
            &["sysprep", "copy", "--operations", "hostnames"],
            "'hostnames'",
        ),
        (
            &["sysprep", "copy", "--format", "raw"],
            "--format is for a disk image",
        ),
        (&["sysprep", "empty"], "no disk that it can write to"),
        (&["sysprep", "base"], "other machines need its disks"),
        (&["sysprep", "/dev/null"], "it is not a file"),
    ] {
        let line = failed(arguments);
        assert!(line.contains(reason), "{line}");
    }
    machines.done(&["start", "copy"]);
    let line = failed(&["sysprep", "copy"]);
    assert!(line.contains("it is running"), "{line}");
    let listed = machines.done(&["sysprep", "--list"]);
    assert!(
        listed
            .lines()
            .any(|line| line.starts_with("machine-id") && line.contains("yes")),
        "{listed}"
    );
    let listed = machines.json(&["sysprep", "--list"]);
    assert_eq!(listed.as_array().unwrap().len(), 11);
}
