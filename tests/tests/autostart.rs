//! Machines that systemd starts with the host and ends with it. The systemd is that of Debian, as the first process of
//! namespaces.

#![allow(clippy::unwrap_used, reason = "a test fails where the host does")]

use std::fs;
use std::process::Command;

use bantam_tests::{debian_root, monitor, payload, require_kvm};

/// Makes the namespaces, and systemd their first process: `$1` is a folder of its own, `$2` a root file system that stays as it
/// is, `$3` the program, `$4` the kernel. Prints what the check has printed.
const HOST: &str = r#"
set -e
work=$1
name=bantam-test-$$
# What systemd does with control groups stays in one of its own in each hierarchy.
grep -E '^cgroup2? ' /proc/mounts > $work/groups
while read -r kind mount type options rest; do
    group=$mount/$name
    mkdir $group
    case $options in *cpuset*)
        cat $mount/cpuset.cpus > $group/cpuset.cpus
        cat $mount/cpuset.mems > $group/cpuset.mems
    esac
    echo $$ > $group/cgroup.procs
done < $work/groups
# This ends when systemd powers off.
timeout --signal=KILL 120 unshare --mount --pid --fork --uts --ipc --net --cgroup --kill-child bash -c '
    set -e
    work=$1
    root=$work/root
    mkdir $root $work/changes
    mount -t tmpfs tmpfs $work/changes
    mkdir $work/changes/upper $work/changes/work
    mount -t overlay -o lowerdir=$2,upperdir=$work/changes/upper,workdir=$work/changes/work overlay $root
    mount -t proc proc $root/proc
    mount -t sysfs sysfs $root/sys
    mount -t tmpfs tmpfs $root/run
    mount -t tmpfs tmpfs $root/tmp
    mount --rbind /dev $root/dev
    [ $(stat -f -c %T /sys/fs/cgroup) = cgroup2fs ] || mount -t tmpfs tmpfs $root/sys/fs/cgroup
    while read -r kind mount type options rest; do
        mkdir -p $root$mount
        case $type in
            cgroup2) mount -t cgroup2 cgroup2 $root$mount;;
            *) mount -t cgroup -o none,${options#*relatime,} cgroup $root$mount 2> /dev/null ||
                mount -t cgroup -o ${options#*relatime,} cgroup $root$mount;;
        esac
    done < $work/groups
    mkdir $root/opt/bantam $root/opt/result
    cp $3 $root/opt/bantam/bantam
    cp $4 $root/opt/bantam/kernel
    cp $work/check $root/opt/bantam/check
    mount --bind $work/result $root/opt/result
    mkdir $root/var/lib/bantam
    mount --bind $work/state $root/var/lib/bantam
    # Of the host, systemd is to start the machine alone.
    units=$root/etc/systemd/system
    for unit in systemd-journald.service systemd-journald.socket systemd-journald-dev-log.socket systemd-udevd.service \
        systemd-udevd-kernel.socket systemd-udevd-control.socket systemd-udev-trigger.service systemd-logind.service \
        systemd-networkd.service networking.service ssh.service cloud-init.service cloud-init-local.service \
        cloud-config.service cloud-final.service console-getty.service getty@tty1.service systemd-journal-flush.service; do
        ln -sf /dev/null $units/$unit
    done
    printf "%s\n" "[Unit]" "After=bantam-web.service" "[Service]" "StandardOutput=file:/opt/result/text" \
        "StandardError=inherit" "ExecStart=/bin/sh /opt/bantam/check" > $units/check.service
    mkdir -p $units/multi-user.target.wants
    ln -s ../check.service $units/multi-user.target.wants/check.service
    chroot $root /opt/bantam/bantam create web --kernel /opt/bantam/kernel --memory 32M
    chroot $root /opt/bantam/bantam autostart web
    chroot $root systemd-analyze verify --man=no /etc/systemd/system/bantam-web.service
    exec env -i container=bantam-test PATH=/usr/bin:/usr/sbin chroot $root /lib/systemd/systemd
' bash "$@" || true
cd /
while read -r kind mount type rest; do
    echo $$ > $mount/cgroup.procs
    find $mount/$name -depth -type d -exec rmdir {} +
done < $work/groups
cat $work/result/text
"#;

/// What is looked at while systemd runs. The machine has been started before.
const CHECK: &str = r#"
bantam() { /opt/bantam/bantam "$@"; }
state() { echo "$1: $(systemctl is-active bantam-web), $(bantam domstate web --reason)"; }
wait_until() { for i in $(seq 200); do [ "$(systemctl is-active bantam-web)" = $1 ] && break; sleep 0.05; done; }
until bantam domstate web | grep -q running; do sleep 0.1; done
wait_until active
state booted
process=$(bantam dominfo web --output json | sed 's/.*"process":\([0-9]*\).*/\1/')
grep -q bantam-web.service /proc/$process/cgroup && echo "its process is in the unit"
systemctl stop bantam-web
state stopped
systemctl start bantam-web
state started
bantam shutdown web --wait
wait_until inactive
state ended
systemctl start bantam-web
bantam managedsave web 2> /dev/null
wait_until inactive
state saved
systemctl start bantam-web
state restored
bantam destroy web
wait_until inactive
state destroyed
systemctl restart bantam-web
state restarted
kill -9 $(bantam dominfo web --output json | sed 's/.*"process":\([0-9]*\).*/\1/')
wait_until failed
state killed
systemctl reset-failed bantam-web
systemctl start bantam-web
state again
systemctl poweroff
"#;

#[test]
#[ignore = "it takes root and a root file system of Debian: make distribution"]
fn systemd_starts_a_machine_with_the_host_and_ends_it_with_it() {
    require_kvm!();
    let folder = tempfile::tempdir().unwrap();
    for name in ["result", "state"] {
        fs::create_dir(folder.path().join(name)).unwrap();
    }
    fs::write(folder.path().join("check"), CHECK).unwrap();
    let output = Command::new("bash")
        .args(["-c", HOST, "bash"])
        .arg(folder.path())
        .arg(debian_root())
        .arg(monitor())
        .arg(payload("button"))
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}{errors}");
    for line in [
        "booted: active, running (booted)",
        "its process is in the unit",
        "stopped: inactive, shut off (powered off)",
        "started: active, running (booted)",
        "ended: inactive, shut off (powered off)",
        "saved: inactive, shut off (saved)",
        "restored: active, running (restored)",
        "destroyed: inactive, shut off (destroyed)",
        "restarted: active, running (booted)",
        "killed: failed, shut off (killed)",
        "again: active, running (booted)",
    ] {
        assert!(text.contains(line), "no '{line}' in\n{text}\n{errors}");
    }
    // The last one has ended with the host.
    let run = folder.path().join("state/machines/web/run.json");
    let run = fs::read_to_string(run).unwrap();
    assert!(run.contains("\"powered-off\""), "{run}");
}
