//! Machines that are made of images, and what their guests are told at the first boot.

#![allow(clippy::unwrap_used, reason = "a test fails where the host does")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use bantam_tests::{Kernel, Machines, linux_slot, qemu_img, require_kvm, scripted_root};
use serde_json::Value;

/// How long a Linux guest may take.
const LINUX_LIMIT: Duration = Duration::from_secs(250);

const KEY: &str =
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIB5MFlRbGeGhoBxV6H7u0ND0PVLPfWA4nYgEZTlxwWtG me@host";

/// Writes a file, and returns its path.
fn write_file(host: &Machines, name: &str, content: impl AsRef<[u8]>) -> String {
    let path = host.folder().join(name);
    fs::write(&path, content).unwrap();
    path.to_str().unwrap().to_owned()
}

/// Makes an empty qcow2 image of 8 MiB, and returns its path.
fn make_image(host: &Machines, name: &str) -> String {
    let path = host.folder().join(name);
    qemu_img(&["create", "-q", "-f", "qcow2"], &[&path, Path::new("8M")]);
    path.to_str().unwrap().to_owned()
}

/// Returns a file of a seed.
fn file_of_seed(seed: &Path, name: &str) -> String {
    let read = Command::new("mtype")
        .arg("-i")
        .arg(seed)
        .arg(format!("::{name}"))
        .output()
        .expect("there is mtools");
    assert!(read.status.success(), "{read:?}");
    String::from_utf8(read.stdout).unwrap()
}

/// Returns a file of a seed that was made, which is JSON after a first line of cloud-init.
fn json_of_seed(seed: &Path, name: &str) -> Value {
    let text = file_of_seed(seed, name);
    serde_json::from_str(text.trim_start_matches("#cloud-config\n")).unwrap()
}

#[test]
fn a_machine_of_an_image_finds_its_seed_and_leaves_the_image_alone() {
    require_kvm!();
    let _slot = linux_slot();
    let host = Machines::new();
    let script = "#!/bin/sh\n\
         mount -t proc proc /proc\n\
         echo LABEL $(dd if=/dev/vdb bs=1 skip=43 count=6)\n\
         busybox grep -a -o '\"local-hostname\":\"[a-z]*\"' /dev/vdb\n\
         md5sum /dev/vdb\n\
         echo READ-ONLY $(busybox blockdev --getro /dev/vdb)\n\
         echo SIZE $(busybox blockdev --getsize64 /dev/vda)\n\
         printf written > /mark; sync\n\
         printf '\\000' | dd of=/dev/port bs=1 seek=1280\n";
    let image = scripted_root(host.folder(), &[("first.sh", script)]);
    let before = fs::read(&image).unwrap();
    let kernel = Kernel::Small.vmlinux();
    let output = host.folder().join("output");
    let serial = format!("file={}", output.display());
    host.done(&[
        "create",
        "web",
        "--kernel",
        kernel.to_str().unwrap(),
        "--append",
        "quiet init=/first.sh",
        "--serial",
        &serial,
        "--image",
        image.to_str().unwrap(),
        "--size",
        "24M",
        "--start",
    ]);
    let begin = Instant::now();
    while host.done(&["domstate", "web"]).trim() != "shut off" {
        assert!(
            begin.elapsed() < LINUX_LIMIT,
            "{:?}",
            fs::read_to_string(&output)
        );
        thread::sleep(Duration::from_millis(50));
    }
    let text = fs::read_to_string(&output).unwrap();
    let seed = host.of_machine("web").join("seed.img");
    let sum = Command::new("md5sum").arg(&seed).output().unwrap();
    let sum = String::from_utf8(sum.stdout).unwrap();
    let sum = sum.split(' ').next().unwrap();
    for part in [
        "LABEL CIDATA",
        "\"local-hostname\":\"web\"",
        sum,
        "READ-ONLY 1",
        "SIZE 25165824",
    ] {
        assert!(text.contains(part), "'{part}' is not in\n{text}");
    }
    assert_eq!(fs::read(&image).unwrap(), before);
    // What the guest has written is in the overlay.
    let result = host.folder().join("result");
    let overlay = host.of_machine("web").join("disk.qcow2");
    qemu_img(&["convert", "-O", "raw"], &[&overlay, &result]);
    let result = fs::read(&result).unwrap();
    assert_eq!(result.len(), 24 << 20);
    assert_ne!(result[..before.len()], before);
}

#[test]
fn what_the_guest_is_told_follows_from_the_options() {
    let host = Machines::new();
    let image = make_image(&host, "debian.qcow2");
    let key = write_file(&host, "id.pub", KEY);
    let password = write_file(&host, "password", "$6$saltsalt$abcdefgh\n");
    host.done(&[
        "create",
        "Web_1",
        "--kernel",
        "/k",
        "--net",
        "user",
        "--net",
        "user",
        "--image",
        &image,
        "--ssh-key",
        &key,
        "--user",
        "ada",
        "--password-file",
        &password,
        "--package",
        "nginx",
        "--run",
        "echo 'a: b'",
        "--disk",
        "/data.img",
    ]);
    let seed = host.of_machine("Web_1").join("seed.img");
    assert_eq!(
        fs::metadata(&seed).unwrap().permissions().mode() & 0o777,
        0o600
    );
    let id = host.json(&["dominfo", "Web_1"])["instance-id"].clone();
    let meta_data = json_of_seed(&seed, "meta-data");
    assert_eq!(meta_data["instance-id"], id);
    assert_eq!(meta_data["local-hostname"], "Web-1");
    let user_data = json_of_seed(&seed, "user-data");
    assert_eq!(user_data["ssh_authorized_keys"][0], KEY);
    assert_eq!(user_data["user"]["name"], "ada");
    assert_eq!(user_data["user"]["hashed_passwd"], "$6$saltsalt$abcdefgh");
    assert_eq!(user_data["packages"][0], "nginx");
    assert_eq!(user_data["runcmd"][0], "echo 'a: b'");
    let config = json_of_seed(&seed, "network-config");
    let nets = host.json(&["domiflist", "Web_1"]);
    for place in 0..2 {
        let mac = nets[place]["mac"].as_str().unwrap();
        let told = &config["ethernets"][format!("eth{place}")]["match"]["macaddress"];
        assert_eq!(told, &mac.to_ascii_lowercase());
    }
    let disks = host.json(&["domblklist", "Web_1"]);
    let names: Vec<_> = (0..3)
        .map(|place| disks[place]["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["disk0", "disk1", "cidata"]);
    // The id and the disks are the same under another name, and after the machine file was written anew.
    host.done(&["setvcpus", "Web_1", "2"]);
    host.done(&["rename", "Web_1", "db"]);
    assert_eq!(host.json(&["dominfo", "db"])["instance-id"], id);
    let source = host.json(&["domblklist", "db"])[2]["source"].clone();
    assert_eq!(
        source.as_str().unwrap(),
        host.of_machine("db").join("seed.img").to_str().unwrap()
    );
    host.done(&["undefine", "db"]);
    assert!(!host.of_machine("db").exists());
}

#[test]
fn what_a_user_has_written_for_cloud_init_is_taken_as_it_is() {
    let host = Machines::new();
    let own = "#cloud-config\nruncmd: [ 'true' ]  # mine\n";
    let file = write_file(&host, "mine.yaml", own);
    host.done(&[
        "create",
        "a",
        "--kernel",
        "/k",
        "--cloud-init",
        &file,
        "--hostname",
        "one.test",
    ]);
    let seed = host.of_machine("a").join("seed.img");
    assert_eq!(file_of_seed(&seed, "user-data"), own);
    assert_eq!(
        json_of_seed(&seed, "meta-data")["local-hostname"],
        "one.test"
    );

    let folder = host.folder().join("mine");
    fs::create_dir(&folder).unwrap();
    write_file(&host, "mine/user-data", own);
    write_file(&host, "mine/meta-data", "instance-id: mine-1\n");
    write_file(&host, "mine/network-config", "version: 2\n");
    host.done(&[
        "create",
        "b",
        "--kernel",
        "/k",
        "--cloud-init",
        folder.to_str().unwrap(),
    ]);
    let seed = host.of_machine("b").join("seed.img");
    assert_eq!(file_of_seed(&seed, "network-config"), "version: 2\n");
    assert_eq!(host.json(&["dominfo", "b"])["instance-id"], "mine-1");
}

#[test]
fn images_are_kept_as_long_as_a_machine_needs_them() {
    let host = Machines::new();
    let image = make_image(&host, "debian.qcow2");
    let sum = Command::new("sha256sum").arg(&image).output().unwrap();
    let sum = String::from_utf8(sum.stdout).unwrap();
    let sum = sum.split(' ').next().unwrap();
    let wrong = "0".repeat(64);
    let reason = host.refused(&["images", "add", &image, "--sha256", &wrong]);
    assert!(reason.contains("checksum"), "{reason}");
    host.done(&["images", "add", &image, "--sha256", sum]);
    let reason = host.refused(&["images", "add", &image]);
    assert!(reason.contains("--name"), "{reason}");
    let raw = write_file(&host, "small.img", vec![0; 1 << 20]);
    host.done(&["images", "add", &raw, "--name", "small"]);
    assert_eq!(
        host.done(&["images", "list"]),
        "NAME     FORMAT   SIZE\ndebian   qcow2    8 MiB\nsmall    raw      1 MiB\n"
    );
    let images = host.json(&["images", "list"]);
    let path = images[0]["path"].as_str().unwrap();
    assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o222, 0);
    // Nothing is left of what was refused.
    let files = fs::read_dir(host.folder().join("images")).unwrap();
    assert_eq!(files.count(), 2);

    host.done(&["create", "web", "--kernel", "/k", "--image", "debian"]);
    host.done(&["snapshot", "create", "web", "before"]);
    let remove = ["images", "remove", "debian"];
    assert!(host.refused(&remove).contains("machine 'web' needs it"));
    host.done(&["images", "remove", "small"]);
    host.done(&["undefine", "web", "--snapshots"]);
    host.done(&remove);
    assert!(host.refused(&remove).contains("there is none"));
    assert!(Path::new(&image).exists());
}

#[test]
fn what_cannot_be_used_is_said_and_leaves_nothing() {
    let host = Machines::new();
    let image = make_image(&host, "debian.qcow2");
    let misnamed = make_image(&host, "debian.img");
    let overlay = host.folder().join("overlay.qcow2");
    qemu_img(
        &["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", &image],
        &[&overlay],
    );
    let private = write_file(&host, "id", "-----BEGIN OPENSSH PRIVATE KEY-----\n");
    let list = write_file(&host, "list", "#cloud-config\n- a\n");
    let nothing = write_file(&host, "nothing", "");
    let overlay = overlay.to_str().unwrap();
    for (options, part) in [
        (["--image", "absent"], "bantam images list"),
        (["--image", &misnamed], "looks like qcow2"),
        (["--ssh-key", &private], "private key"),
        (["--cloud-init", &list], "not a YAML mapping"),
        (["--password-file", &nothing], "empty"),
        (["--hostname", "a b"], "not a host name"),
        (["--user", "Ada"], "not a user name"),
        (["--size", "1G"], "--image"),
    ] {
        let reason = host.refused(&[&["create", "web", "--kernel", "/k"], &options[..]].concat());
        assert!(reason.contains(part), "{reason}");
    }
    let create = [
        "create", "web", "--kernel", "/k", "--image", &image, "--size", "1M",
    ];
    assert!(host.refused(&create).contains("cannot be smaller"));
    let reason = host.refused(&["images", "add", overlay]);
    assert!(reason.contains("backing file"), "{reason}");
    assert!(!host.of_machine("web").exists());
    host.done(&[
        "create",
        "web",
        "--kernel",
        "/k",
        "--image",
        &misnamed,
        "--image-format",
        "qcow2",
    ]);
}

/// What executes cloud-init in Debian's root file system `$1` with the seed `$2`, and then `$3`. It runs in namespaces of its
/// own, and writes to an overlay in memory. There is a network device with the MAC address `$4`.
///
/// The files of the seed are copied, as not every host can mount them; that the disk is found by its label is a matter of
/// `blkid`, which unit tests ask.
const CLOUD_INIT: &str = r#"set -eu
mount -t tmpfs tmpfs /mnt
mkdir /mnt/upper /mnt/work /mnt/root
mount -t overlay -o "lowerdir=$1,upperdir=/mnt/upper,workdir=/mnt/work" overlay /mnt/root
cd /mnt/root
mount -t proc proc proc
mount -t sysfs sysfs sys
mount --bind /dev dev
mount -t tmpfs tmpfs run
ip link set lo up
ip link add eth0 address "$4" type veth peer name peer0
files=var/lib/cloud/seed/nocloud
mkdir -p $files
for file in $(mdir -b -i "$2" ::); do mcopy -i "$2" "$file" $files/; done
cat > etc/cloud/cloud.cfg.d/99-test.cfg <<END
datasource_list: [NoCloud, None]
locale: false
resize_rootfs: false
ssh_genkeytypes: [ed25519]
END
exec chroot . /bin/sh -c "
    cloud-init schema -c /$files/user-data && echo SCHEMA
    cloud-init init --local && cloud-init init &&
        cloud-init modules --mode=config && cloud-init modules --mode=final
    grep -i warning /var/log/cloud-init.log
    $3"
"#;

/// Has cloud-init set a machine up, and returns what `questions` print afterwards.
fn set_up(host: &Machines, name: &str, questions: &str) -> String {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../resources/guest/debian-root.sh");
    let root = Command::new(script).output().unwrap();
    let root = String::from_utf8(root.stdout).unwrap();
    let mac = host.json(&["domiflist", name])[0]["mac"].clone();
    let ended = Command::new("unshare")
        .args([
            "--mount",
            "--uts",
            "--net",
            "--pid",
            "--fork",
            "--mount-proc",
        ])
        .args(["sh", "-c", CLOUD_INIT, "sh", root.trim()])
        .arg(host.of_machine(name).join("seed.img"))
        .args([questions, mac.as_str().unwrap()])
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&ended.stderr);
    format!("{}\n{errors}", String::from_utf8_lossy(&ended.stdout))
}

#[test]
#[ignore = "it takes root and a root file system of Debian: make distribution"]
fn cloud_init_of_debian_does_what_it_is_told() {
    let host = Machines::new();
    let key = write_file(&host, "id.pub", KEY);
    let password = write_file(&host, "password", "a \"b\": c\n");
    let hash = "$6$saltsalt$qFmFH.bQmmtXzyBY0s9v7Oicd2z4XSIecDzlB5KiA2/jctKu9YterLp8wwnSq.qc.eoxqOmSuNp2xS0ktL3nh/";
    let hash_file = write_file(&host, "hash", hash);
    let create = ["--kernel", "/k", "--net", "user", "--ssh-key", &key];
    let run = [
        "--run",
        "printf 'ran as %s: %s' \"$(id -un)\" \"$(hostname)\" > /ran",
    ];
    let options = ["--user", "ada", "--password-file", &password];
    host.done(&[&["create", "web"], &create[..], &options, &run].concat());
    let text = set_up(
        &host,
        "web",
        "cat /ran /etc/network/interfaces.d/* /home/ada/.ssh/authorized_keys; getent shadow ada; id ada; getent passwd debian",
    );
    let id = host.json(&["dominfo", "web"])["instance-id"].clone();
    for part in [
        "SCHEMA",
        "ran as root: web",
        "iface eth0 inet dhcp",
        KEY,
        "ada:$",
        "(sudo)",
    ] {
        assert!(text.contains(part), "'{part}' is not in\n{text}");
    }
    assert!(!text.contains("ada:!"), "{text}");
    assert!(!text.contains("debian:x"), "{text}");

    let options = [
        "--password-file",
        &hash_file,
        "--hostname",
        "db.example.org",
    ];
    host.done(&[&["create", "db"], &create[..], &options].concat());
    let text = set_up(
        &host,
        "db",
        "hostname; cat /home/debian/.ssh/authorized_keys /var/lib/cloud/data/instance-id; getent shadow debian",
    );
    let other_id = host.json(&["dominfo", "db"])["instance-id"].clone();
    assert_ne!(other_id, id);
    let hashed = format!("debian:{hash}:");
    for part in ["SCHEMA", "db\n", KEY, &hashed, other_id.as_str().unwrap()] {
        assert!(text.contains(part), "'{part}' is not in\n{text}");
    }

    let own = "#cloud-config\nwrite_files: [{path: /mine, content: written}]\n";
    let file = write_file(&host, "mine.yaml", own);
    host.done(&[
        "create",
        "own",
        "--kernel",
        "/k",
        "--net",
        "user",
        "--cloud-init",
        &file,
    ]);
    let text = set_up(&host, "own", "cat /mine; hostname");
    assert!(text.contains("written") && text.contains("own\n"), "{text}");
}
