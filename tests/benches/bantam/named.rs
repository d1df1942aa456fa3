//! Named machines, beside virsh with QEMU where libvirt's daemon is installed.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use bantam_tests::payload;
use nix::unistd::{Pid, sync};

use crate::memory::MonitorMemory;
use crate::monitors::{Guest, Monitor, Monitors};
use crate::process::Process;
use crate::report::{Goal, Peer, Report, Row};
use crate::statistics::Samples;

const RUNS: usize = 7;
const LIMIT: Duration = Duration::from_secs(60);
const MIB: u64 = 1 << 20;
/// Memory of a machine that is saved, and how much of it is not zero.
const MEMORY_MIB: u64 = 128;
const FILLED_MIB: u64 = 100;
/// Machines that a list shows, and how many of them run.
const DEFINED: usize = 200;
const RUNNING: usize = 20;
/// Machines that are started at the same time.
const TOGETHER: usize = 50;
const VIRSH: &str = "virsh";

/// Adds the rows.
pub fn measure(monitors: &Monitors, report: &mut Report) {
    let folder = monitors.folder().join("named");
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).expect("the folder can be written to");
    let bantam = Bantam {
        program: monitors.bantam(),
        state: folder.join("state"),
    };
    let virsh = Virsh::start(&folder);
    if virsh.is_none() {
        eprintln!("not beside virsh here: that takes root, virsh, libvirtd and its QEMU driver");
    }
    lifecycle(&bantam, virsh.as_ref(), &folder, report);
    lists(&bantam, virsh.as_ref(), report);
    copies(&bantam, &folder, report);
    memory(monitors, &bantam, report);
    together(&bantam, report);
    drop(virsh);
    fs::remove_dir_all(&folder).expect("it was made above");
}

/// The program with machines of its own.
struct Bantam<'a> {
    program: &'a Path,
    state: PathBuf,
}

impl Bantam<'_> {
    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(self.program);
        command.args(words).env("BANTAM_STATE_DIR", &self.state);
        command
    }

    /// Returns the milliseconds that a command takes, which has to succeed.
    fn time(&self, words: &[&str]) -> f64 {
        milliseconds(Process::start(self.command(words)).wait(LIMIT).wall)
    }

    fn create(&self, name: &str, memory: &str, more: &[&str]) {
        let kernel = payload("hello");
        let kernel = kernel.to_str().expect("the path of the payloads is text");
        let words = ["create", name, "--kernel", kernel, "--memory", memory];
        self.time(&[&words[..], &["--cmdline", "finish=hang"], more].concat());
    }
}

/// libvirt's daemon and its client, with a state that nobody else sees.
struct Virsh {
    daemon: Child,
    folder: PathBuf,
}

/// In a mount namespace of its own: the folders of libvirt are empty, and the user exists that QEMU would have. The
/// daemon ends with this, whose process is killed.
const DAEMON: &str = r#"
set -e
for folder in /run/libvirt /var/lib/libvirt /var/log/libvirt /var/cache/libvirt /etc/libvirt; do
    mkdir -p $folder
    mount -t tmpfs tmpfs $folder
done
for file in passwd group; do
    { cat /etc/$file; echo 'libvirt-qemu:x:64055:64055::/:/bin/false'; } > /run/libvirt/$file
    mount --bind /run/libvirt/$file /etc/$file
done
cat > /etc/libvirt/qemu.conf <<END
user = "root"
group = "root"
security_driver = "none"
namespaces = []
cgroup_controllers = []
stdio_handler = "file"
END
exec libvirtd --pid-file /run/libvirt/pid 2>/dev/null
"#;

impl Virsh {
    /// Returns nothing if the daemon cannot run here.
    fn start(folder: &Path) -> Option<Virsh> {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c", DAEMON]);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let daemon = command.spawn().ok()?;
        let folder = folder.to_owned();
        let virsh = Virsh { daemon, folder };
        let started = Instant::now();
        while started.elapsed() < Duration::from_secs(15) {
            let output = virsh.command(&["version"]).output().ok()?;
            if output.status.success() {
                return Some(virsh);
            }
            thread::sleep(Duration::from_millis(100));
        }
        None
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--mount=/proc/{}/ns/mnt", self.daemon.id()));
        command
            .args([VIRSH, "-q", "-c", "qemu:///system"])
            .args(words);
        command
    }

    fn time(&self, words: &[&str]) -> f64 {
        milliseconds(Process::start(self.command(words)).wait(LIMIT).wall)
    }

    fn define(&self, name: &str, disk: &Path, initrd: Option<&Path>) {
        let initrd = initrd.map(|path| format!("<initrd>{}</initrd>", path.display()));
        let text = format!(
            "<domain type='kvm'><name>{name}</name><memory unit='MiB'>{MEMORY_MIB}</memory><vcpu>1</vcpu>\
             <os><type arch='x86_64' machine='q35'>hvm</type><kernel>{}</kernel>{}<cmdline>finish=hang</cmdline></os>\
             <features><acpi/></features><cpu mode='host-passthrough'/><devices>\
             <emulator>/usr/bin/qemu-system-x86_64</emulator>\
             <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{}'/>\
             <target dev='vda' bus='virtio'/></disk><serial type='file'><source path='{}'/></serial>\
             <controller type='usb' model='none'/><memballoon model='none'/></devices></domain>",
            payload("hello").display(),
            initrd.unwrap_or_default(),
            disk.display(),
            self.folder.join(format!("{name}.serial")).display(),
        );
        let file = self.folder.join(format!("{name}.xml"));
        fs::write(&file, text).expect("the folder can be written to");
        self.time(&["define", &file.to_string_lossy()]);
    }
}

impl Drop for Virsh {
    fn drop(&mut self) {
        if let Ok(output) = self.command(&["list", "--name"]).output() {
            for name in String::from_utf8_lossy(&output.stdout).split_whitespace() {
                let _ = self.command(&["destroy", name]).output();
            }
        }
        // It is in the place of the shell and of unshare.
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

fn add(report: &mut Report, name: &str, bantam: Samples, virsh: Option<Samples>, goal: Goal) {
    let goal = match (goal, &virsh) {
        (Goal::RatioAtMost(_), None) => Goal::None,
        (goal, _) => goal,
    };
    report.add(Row {
        name: format!("named: {name}"),
        unit: "ms",
        bantam,
        peer: virsh.map(|samples| Peer::named(VIRSH, samples)),
        goal,
    });
}

/// The command that is timed, and the one that comes after it.
type Turn<'a> = [&'a [&'a str]; 2];

/// Has both do the same in turns. What virsh has written is in its file system only when that is synchronized, so that
/// counts, as Bantam does it too; what others have written before must not.
fn turns(
    bantam: &Bantam<'_>,
    virsh: Option<&Virsh>,
    of_bantam: &[Turn<'_>],
    of_virsh: &[Turn<'_>],
) -> Vec<(Samples, Option<Samples>)> {
    let mut times = vec![(Vec::new(), Vec::new()); of_bantam.len()];
    for _ in 0..RUNS {
        for (turn, times) in of_bantam.iter().zip(&mut times) {
            sync();
            times.0.push(bantam.time(turn[0]));
            if !turn[1].is_empty() {
                bantam.time(turn[1]);
            }
        }
        let Some(virsh) = virsh else { continue };
        for (turn, times) in of_virsh.iter().zip(&mut times) {
            sync();
            let time = virsh.time(turn[0]);
            let started = Instant::now();
            sync();
            times.1.push(time + milliseconds(started.elapsed()));
            if !turn[1].is_empty() {
                virsh.time(turn[1]);
            }
        }
    }
    let samples = times.into_iter().map(|(bantam, virsh)| {
        (
            Samples::new(bantam),
            (!virsh.is_empty()).then(|| Samples::new(virsh)),
        )
    });
    samples.collect()
}

/// Start, save, restore, snapshot and revert.
fn lifecycle(bantam: &Bantam<'_>, virsh: Option<&Virsh>, folder: &Path, report: &mut Report) {
    let initrd = folder.join("initrd");
    let file = File::create(&initrd).expect("the folder can be written to");
    for mib in 0..FILLED_MIB {
        let bytes: Vec<u8> = (0..MIB).map(|index| (index * 7 + mib) as u8 | 1).collect();
        file.write_all_at(&bytes, mib * MIB)
            .expect("there is room for it");
    }
    let image = |name: &str| {
        let path = folder.join(name);
        let words = ["image", "create", "-q", "-f", "qcow2"];
        let path_text = path.to_str().expect("the benchmarks chose the name");
        bantam.time(&[&words[..], &[path_text, "64M"]].concat());
        path
    };
    let disk = |path: &Path| path.display().to_string();
    let memory = format!("{MEMORY_MIB}M");
    let initrd_text = initrd.to_str().expect("the benchmarks chose the name");
    bantam.create("web", &memory, &["--disk", &disk(&image("web.qcow2"))]);
    let of_full = [
        "--initrd",
        initrd_text,
        "--disk",
        &disk(&image("full.qcow2")),
    ];
    bantam.create("full", &memory, &of_full);
    if let Some(virsh) = virsh {
        virsh.define("web", &image("virsh-web.qcow2"), None);
        virsh.define("full", &image("virsh-full.qcow2"), Some(&initrd));
    }

    let start = [[&["start", "web"][..], &["destroy", "web"][..]]];
    let started = turns(bantam, virsh, &start, &start);
    for (times, of_virsh) in started {
        add(
            report,
            "start, until the guest runs",
            times.clone(),
            None,
            Goal::AtMost(25.0),
        );
        add(
            report,
            "start, beside virsh",
            times,
            of_virsh,
            Goal::RatioAtMost(0.08),
        );
    }

    let saved = folder.join("saved");
    let saved = saved.to_str().expect("the benchmarks chose the name");
    bantam.time(&["start", "full"]);
    if let Some(virsh) = virsh {
        virsh.time(&["start", "full"]);
    }
    let nothing: &[&str] = &[];
    let of_bantam = [
        [&["managedsave", "full"][..], nothing],
        [&["start", "full"][..], nothing],
        [&["snapshot", "create", "full", "one"][..], nothing],
        [
            &["snapshot", "revert", "full", "one"][..],
            &["snapshot", "delete", "full", "one"][..],
        ],
    ];
    let of_virsh = [
        [&["save", "full", saved][..], nothing],
        [&["restore", saved][..], nothing],
        [&["snapshot-create-as", "full", "one"][..], nothing],
        [
            &["snapshot-revert", "full", "one"][..],
            &["snapshot-delete", "full", "one"][..],
        ],
    ];
    let names = [
        "save",
        "go on from that",
        "snapshot create",
        "snapshot revert",
    ];
    for (name, (times, of_virsh)) in names
        .iter()
        .zip(turns(bantam, virsh, &of_bantam, &of_virsh))
    {
        let name = format!("{name}, {MEMORY_MIB} MiB, {FILLED_MIB} MiB of them filled");
        add(report, &name, times, of_virsh, Goal::RatioAtMost(0.25));
    }
    bantam.time(&["destroy", "full"]);
    for name in ["web", "full"] {
        bantam.time(&["undefine", name, "--remove-all-storage"]);
    }
    if let Some(virsh) = virsh {
        virsh.time(&["destroy", "full"]);
    }
}

/// Listings, with many machines; virsh has two.
fn lists(bantam: &Bantam<'_>, virsh: Option<&Virsh>, report: &mut Report) {
    let names: Vec<_> = (0..DEFINED).map(|index| format!("many-{index}")).collect();
    for name in &names {
        bantam.create(name, "16M", &[]);
    }
    for name in &names[..RUNNING] {
        bantam.time(&["start", name]);
    }
    let of_bantam: [Turn<'_>; 2] = [[&["list", "--all"], &[]], [&["dominfo", &names[0]], &[]]];
    let of_virsh: [Turn<'_>; 2] = [[&["list", "--all"], &[]], [&["dominfo", "web"], &[]]];
    let rows = [
        (
            format!("list --all of {DEFINED}, {RUNNING} running; virsh's of two"),
            15.0,
        ),
        ("dominfo".to_owned(), 6.0),
    ];
    let measured = turns(bantam, virsh, &of_bantam, &of_virsh);
    for ((name, limit), (times, of_virsh)) in rows.iter().zip(measured) {
        add(report, name, times, of_virsh, Goal::AtMost(*limit));
    }
    for (index, name) in names.iter().enumerate() {
        if index < RUNNING {
            bantam.time(&["destroy", name]);
        }
        bantam.time(&["undefine", name]);
    }
}

/// Machines of an image, and linked clones.
fn copies(bantam: &Bantam<'_>, folder: &Path, report: &mut Report) {
    let image = folder.join("image.raw");
    let file = File::create(&image).expect("the folder can be written to");
    file.set_len(2 << 30).expect("files can be that large");
    let image = image.to_str().expect("the benchmarks chose the name");
    let (mut created, mut cloned) = (Vec::new(), Vec::new());
    let kernel = payload("hello");
    let kernel = kernel.to_str().expect("the path of the payloads is text");
    for run in 0..RUNS {
        let [web, copy] = ["web", "copy"].map(|name| format!("{name}-{run}"));
        let words = [
            "create", &web, "--kernel", kernel, "--image", image, "--run", "true",
        ];
        created.push(bantam.time(&words));
        bantam.time(&["template", &web]);
        cloned.push(bantam.time(&["clone", &web, &copy, "--keep-identity"]));
        for name in [&copy, &web] {
            bantam.time(&["undefine", name, "--remove-all-storage"]);
        }
    }
    let name = "create, of an image of 2 GiB, with a seed";
    add(
        report,
        name,
        Samples::new(created),
        None,
        Goal::AtMost(50.0),
    );
    let name = "linked clone of a template";
    add(report, name, Samples::new(cloned), None, Goal::AtMost(50.0));
}

/// What a named machine takes more than one of `bantam run`.
fn memory(monitors: &Monitors, bantam: &Bantam<'_>, report: &mut Report) {
    let memory = MEMORY_MIB << 20;
    let run = || {
        let guest = Guest {
            kernel: payload("hello"),
            command_line: "finish=hang".to_owned(),
            memory_mib: MEMORY_MIB,
            ..Guest::default()
        };
        let mut process = Process::start(monitors.command(Monitor::Bantam, &guest));
        process.wait_for("PASS", LIMIT);
        let of_run = MonitorMemory::of(process.pid(), memory).proportional;
        process.stop(LIMIT);
        of_run
    };
    bantam.create("web", &format!("{MEMORY_MIB}M"), &[]);
    let named = || {
        bantam.time(&["start", "web"]);
        thread::sleep(Duration::from_millis(200));
        let of_named = MonitorMemory::of(process_of("web"), memory).proportional;
        bantam.time(&["destroy", "web"]);
        of_named
    };
    let difference = |_| (named() as f64 - run() as f64) / MIB as f64;
    let samples: Samples = (0..RUNS).map(difference).collect();
    bantam.time(&["undefine", "web"]);
    report.add(Row {
        name: "named: memory above that of bantam run, Pss".to_owned(),
        unit: "MiB",
        bantam: samples,
        peer: None,
        goal: Goal::AtMost(1.5),
    });
}

/// Returns the process of a machine that runs. To ask the machine would have it execute code that it does not need otherwise.
fn process_of(name: &str) -> Pid {
    let wanted = format!("\0machine-process\0{name}\0");
    let entries = fs::read_dir("/proc").expect("/proc is there");
    let process = entries.flatten().find_map(|entry| {
        let words = fs::read(entry.path().join("cmdline")).ok()?;
        let is_it = words
            .windows(wanted.len())
            .any(|it| it == wanted.as_bytes());
        is_it.then(|| entry.file_name().to_str()?.parse().ok())?
    });
    Pid::from_raw(process.expect("it runs"))
}

/// Many machines that are started at the same time.
fn together(bantam: &Bantam<'_>, report: &mut Report) {
    let names: Vec<_> = (0..TOGETHER)
        .map(|index| format!("together-{index}"))
        .collect();
    for name in &names {
        bantam.create(name, "32M", &[]);
    }
    let (mut one, mut all) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        one.push(bantam.time(&["start", &names[0]]) * TOGETHER as f64);
        bantam.time(&["destroy", &names[0]]);
        let started = Instant::now();
        let processes: Vec<_> = names
            .iter()
            .map(|name| Process::start(bantam.command(&["start", name])))
            .collect();
        for process in processes {
            process.wait(LIMIT);
        }
        all.push(milliseconds(started.elapsed()));
        for name in &names {
            bantam.time(&["destroy", name]);
        }
    }
    report.add(Row {
        name: format!("named: {TOGETHER} machines started together"),
        unit: "ms",
        bantam: Samples::new(all),
        peer: Some(Peer::named("50 times one", Samples::new(one))),
        goal: Goal::RatioAtMost(1.0),
    });
    for name in &names {
        bantam.time(&["undefine", name]);
    }
}
