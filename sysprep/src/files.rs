//! Operations on files of the system.

use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::FileType;

use crate::operation::Operation;
use crate::root::Root;
use crate::task::{Report, Task};

/// Where a folder may be that holds a boot loader's files: the root of its file system may be mounted at any of them.
pub(crate) const BOOT_FOLDERS: [&str; 4] = ["/boot", "/efi", "/boot/efi", "/boot/firmware"];

/// Makes SSH host keys that are missing, for systems that have no unit of their own for it.
const KEY_UNIT: &str = "\
[Unit]
Description=Make SSH host keys that are missing
Before=ssh.service ssh.socket sshd.service sshd.socket

[Service]
Type=oneshot
ExecStart=/usr/bin/ssh-keygen -A

[Install]
WantedBy=multi-user.target
";
const KEY_UNIT_NAME: &str = "bantam-ssh-host-keys.service";
/// Units by which distributions make the keys themselves.
const KEY_UNITS_OF_SYSTEMS: [&str; 4] = [
    "sshd-keygen@.service",
    "sshd-keygen.service",
    "sshdgenkeys.service",
    "regenerate_ssh_host_keys.service",
];

/// Folders with files of DHCP clients, and how the names of these files end.
const DHCP_FILES: [(&str, &[&str]); 6] = [
    ("/var/lib/dhcp", &[".leases"]),
    ("/var/lib/dhclient", &[".leases", ".lease"]),
    (
        "/var/lib/NetworkManager",
        &[".lease", "secret_key", "timestamps"],
    ),
    ("/var/lib/dhcpcd", &[".lease", ".lease6", "duid", "secret"]),
    ("/var/lib/wicked", &["duid.xml", ".xml"]),
    ("/etc", &["dhcpcd.duid", "dhcpcd.secret"]),
];

const SEEDS: [&str; 4] = [
    "/var/lib/systemd/random-seed",
    "/var/lib/urandom/random-seed",
    "/var/lib/random-seed",
    "/var/lib/misc/random-seed",
];

const CLOUD_INIT: [&str; 4] = [
    "/var/lib/cloud/instance",
    "/var/lib/cloud/instances",
    "/var/lib/cloud/data",
    "/var/lib/cloud/sem",
];

const HISTORIES: [&str; 5] = [
    ".bash_history",
    ".ash_history",
    ".sh_history",
    ".zsh_history",
    ".python_history",
];

/// Does the operations of a task that are about files alone.
pub(crate) fn reset(root: &Root, task: &Task, report: &mut Report) {
    for operation in Operation::ALL {
        if !task.operations.contains(operation) {
            continue;
        }
        let mut files = Files {
            root,
            operation,
            report,
        };
        match operation {
            Operation::Hostname => files.set_host_name(task.host_name.as_deref()),
            Operation::MachineId => files.clear_machine_id(),
            Operation::SshHostkeys => files.remove_host_keys(),
            Operation::RandomSeed => files.remove_seeds(),
            Operation::DhcpClientState => files.remove_leases(),
            Operation::UdevPersistentNet => {
                files.remove("/etc/udev/rules.d/70-persistent-net.rules");
            }
            Operation::CloudInit => {
                for path in CLOUD_INIT {
                    files.remove(path);
                }
            }
            Operation::Logfiles => files.empty_logs(),
            Operation::ShellHistory => files.remove_histories(),
            Operation::FsUuids | Operation::PartitionUuids => {}
        }
    }
}

/// Removes the seed of a boot loader in a file system that is not mounted in the system.
pub(crate) fn remove_boot_seed(root: &Root, report: &mut Report) {
    let mut files = Files {
        root,
        operation: Operation::RandomSeed,
        report,
    };
    files.remove("/loader/random-seed");
}

struct Files<'a> {
    root: &'a Root,
    operation: Operation,
    report: &'a mut Report,
}

impl Files<'_> {
    fn changed(&mut self, path: impl AsRef<Path>, detail: impl Into<String>) {
        let path = path.as_ref().to_string_lossy().into_owned();
        self.report.changed(self.operation, path, detail);
    }

    fn left(&mut self, path: impl AsRef<Path>, reason: impl ToString) {
        let path = path.as_ref().to_string_lossy().into_owned();
        self.report.left(self.operation, path, reason.to_string());
    }

    /// Removes a file, or a folder with all that is in it.
    fn remove(&mut self, path: impl AsRef<Path>) {
        match self.root.remove_all(&path) {
            Ok(true) => self.changed(path, "removed"),
            Ok(false) => {}
            Err(error) => self.left(path, error),
        }
    }

    /// Removes the files of a folder whose names are wanted. Returns how many there were.
    fn remove_files(&mut self, folder: &str, is_wanted: impl Fn(&str) -> bool) -> usize {
        let entries = self.root.list(folder).unwrap_or_else(|error| {
            self.left(folder, error);
            Vec::new()
        });
        let wanted = entries.iter().filter(|entry| {
            entry.kind != FileType::Directory && is_wanted(&entry.name.to_string_lossy())
        });
        let paths: Vec<_> = wanted
            .map(|entry| Path::new(folder).join(&entry.name))
            .collect();
        for path in &paths {
            self.remove(path);
        }
        paths.len()
    }

    fn set_host_name(&mut self, new: Option<&str>) {
        const PATH: &str = "/etc/hostname";
        let Some(new) = new else {
            return self.left(PATH, "no host name is given (--hostname)");
        };
        let old = self.root.read(PATH).ok().flatten().unwrap_or_default();
        let old = String::from_utf8_lossy(&old);
        let mut lines = old.lines().map(str::trim);
        let old = lines.find(|line| !line.is_empty() && !line.starts_with('#'));
        let old = old.filter(|old| old.len() <= 255).unwrap_or_default();
        let text = format!("{new}\n");
        let written = self
            .root
            .overwrite(PATH, text.as_bytes())
            .and_then(|is_there| {
                match is_there {
                    true => Ok(()),
                    // A link that leads nowhere is in the place of a file.
                    false => self
                        .root
                        .remove(PATH)
                        .and_then(|_| self.root.create(PATH, text.as_bytes())),
                }
            });
        match written {
            Ok(()) if old.is_empty() => self.changed(PATH, format!("'{new}'")),
            Ok(()) => self.changed(PATH, format!("'{old}' is now '{new}'")),
            Err(error) => return self.left(PATH, error),
        }
        self.change_hosts(old, new);
    }

    fn change_hosts(&mut self, old: &str, new: &str) {
        const PATH: &str = "/etc/hosts";
        let hosts = match self.root.read(PATH) {
            Ok(Some(hosts)) => hosts,
            Ok(None) => return,
            Err(error) => return self.left(PATH, error),
        };
        if let Some(changed) = hosts_with(&hosts, old, new) {
            match self.root.overwrite(PATH, changed.as_bytes()) {
                Ok(_) => self.changed(PATH, format!("'{old}' is now '{new}'")),
                Err(error) => self.left(PATH, error),
            }
        }
    }

    fn clear_machine_id(&mut self) {
        const SYSTEMD: &str = "/etc/machine-id";
        const DBUS: &str = "/var/lib/dbus/machine-id";
        let is_link = |path| {
            self.root
                .kind(path)
                .map(|kind| kind == Some(FileType::Symlink))
        };
        if !self.has_systemd() {
            // D-Bus makes the file if there is none, and takes no empty one. A link stays, and what it leads to goes.
            for path in [SYSTEMD, DBUS] {
                match is_link(path) {
                    Ok(false) => self.remove(path),
                    Ok(true) => {}
                    Err(error) => self.left(path, error),
                }
            }
            return;
        }
        // If either is a link to the other, the link stays.
        match self.root.overwrite(SYSTEMD, b"") {
            Ok(true) => self.changed(SYSTEMD, "emptied: the next boot makes another"),
            Ok(false) => {}
            Err(error) => self.left(SYSTEMD, error),
        }
        match (is_link(DBUS), is_link(SYSTEMD)) {
            (Ok(false), Ok(false)) => self.remove(DBUS),
            (Err(error), _) => self.left(DBUS, error),
            _ => {}
        }
    }

    fn has_systemd(&self) -> bool {
        ["/usr/lib/systemd/systemd", "/lib/systemd/systemd"]
            .iter()
            .any(|path| self.root.has(path))
    }

    fn remove_host_keys(&mut self) {
        let is_key = |name: &str| {
            name.starts_with("ssh_host_")
                && ["_key", "_key.pub", "_key-cert.pub"]
                    .iter()
                    .any(|end| name.ends_with(end))
        };
        let removed = self.remove_files("/etc/ssh", is_key);
        // Dropbear makes its keys when they are needed.
        self.remove_files("/etc/dropbear", |name| {
            name.starts_with("dropbear_") && name.ends_with("_host_key")
        });
        if removed > 0
            && let Err(error) = self.have_keys_made()
        {
            self.left(
                "/etc/systemd/system",
                format!("nothing makes SSH host keys again: {error}"),
            );
        }
    }

    /// Sees to it that the next boot makes SSH host keys.
    fn have_keys_made(&mut self) -> io::Result<()> {
        let folders = [
            "/usr/lib/systemd/system",
            "/lib/systemd/system",
            "/etc/systemd/system",
        ];
        let has_unit = |name: &str| {
            folders
                .iter()
                .any(|folder| self.root.has(Path::new(folder).join(name)))
        };
        let is_openrc = self.root.has("/etc/init.d/sshd") && self.root.has("/sbin/openrc");
        if is_openrc || KEY_UNITS_OF_SYSTEMS.into_iter().any(has_unit) {
            return Ok(());
        }
        if !self.has_systemd() || !self.root.has("/usr/bin/ssh-keygen") {
            let reason = "the system has neither systemd nor another way that is known; run ssh-keygen -A in it";
            return Err(io::Error::other(reason));
        }
        let folder = Path::new("/etc/systemd/system");
        let wants = folder.join("multi-user.target.wants");
        let unit = folder.join(KEY_UNIT_NAME);
        if self.root.has(&unit) {
            return Ok(());
        }
        self.root.create_folder("/etc/systemd")?;
        self.root.create_folder(folder)?;
        self.root.create(&unit, KEY_UNIT.as_bytes())?;
        self.root.create_folder(&wants)?;
        self.root
            .link(&format!("../{KEY_UNIT_NAME}"), wants.join(KEY_UNIT_NAME))?;
        self.changed(
            unit,
            "added: makes SSH host keys that are missing at each boot",
        );
        Ok(())
    }

    fn remove_seeds(&mut self) {
        for path in SEEDS {
            self.remove(path);
        }
        for folder in BOOT_FOLDERS {
            self.remove(Path::new(folder).join("loader/random-seed"));
        }
    }

    fn remove_leases(&mut self) {
        for (folder, ends) in DHCP_FILES {
            self.remove_files(folder, |name| ends.iter().any(|end| name.ends_with(end)));
        }
    }

    fn empty_logs(&mut self) {
        const FOLDER: &str = "/var/log";
        let files = match self.root.files_below(Path::new(FOLDER)) {
            Ok(files) => files,
            Err(error) => return self.left(FOLDER, error),
        };
        let mut count = 0;
        for path in files {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let done = match is_rotated(&name) {
                true => self.root.remove(&path),
                // Some programs only write to a log that exists.
                false => self.root.overwrite(&path, b""),
            };
            match done {
                Ok(_) => count += 1,
                Err(error) => self.left(&path, error),
            }
        }
        if count > 0 {
            self.changed(FOLDER, format!("{count} files emptied or removed"));
        }
    }

    fn remove_histories(&mut self) {
        let homes = self.root.list("/home").unwrap_or_else(|error| {
            self.left("/home", error);
            Vec::new()
        });
        let homes = homes
            .into_iter()
            .map(|entry| Path::new("/home").join(entry.name));
        let homes: Vec<PathBuf> = [PathBuf::from("/root")].into_iter().chain(homes).collect();
        for home in homes {
            for name in HISTORIES {
                self.remove(home.join(name));
            }
        }
    }
}

/// Whether a log is one that was put aside, or a journal, which must not be empty.
fn is_rotated(name: &str) -> bool {
    let ends = [
        ".gz",
        ".xz",
        ".zst",
        ".bz2",
        ".old",
        ".journal",
        ".journal~",
    ];
    ends.iter().any(|end| name.ends_with(end))
        || name.rsplit_once(['.', '-']).is_some_and(|(_, end)| {
            !end.is_empty() && end.bytes().all(|byte| byte.is_ascii_digit())
        })
}

/// Returns the text of a hosts file in which the host has another name; `None` if it does not have the old one.
fn hosts_with(hosts: &[u8], old: &str, new: &str) -> Option<String> {
    let short = old.split('.').next().unwrap_or_default();
    if short.is_empty() || short.eq_ignore_ascii_case("localhost") {
        return None;
    }
    let new_short = new.split('.').next().unwrap_or(new);
    let renamed = |name: &str| -> Option<String> {
        let (first, domain) = match name.split_once('.') {
            Some((first, domain)) => (first, Some(domain)),
            None => (name, None),
        };
        first.eq_ignore_ascii_case(short).then(|| match domain {
            None => new_short.to_owned(),
            Some(_) if new.contains('.') => new.to_owned(),
            Some(domain) => format!("{new}.{domain}"),
        })
    };
    let hosts = str::from_utf8(hosts).ok()?;
    let mut text = String::with_capacity(hosts.len());
    let mut is_changed = false;
    for line in hosts.split_inclusive('\n') {
        let (names, comment) = line.split_at(line.find('#').unwrap_or(line.len()));
        let mut words = 0;
        for part in names.split_inclusive(char::is_whitespace) {
            let word = part.trim_end();
            let blank = &part[word.len()..];
            // The first word is the address.
            words += usize::from(!word.is_empty());
            match renamed(word).filter(|_| words > 1) {
                Some(new) => {
                    is_changed = true;
                    text.push_str(&new);
                }
                None => text.push_str(word),
            }
            text.push_str(blank);
        }
        text.push_str(comment);
    }
    is_changed.then_some(text)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, symlink};

    use proptest::prelude::*;
    use tempfile::TempDir;

    use super::*;

    fn tree(files: &[(&str, &str)]) -> TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        folder
    }

    fn reset_all(folder: &TempDir) -> Report {
        let task = Task {
            operations: "all".parse().unwrap(),
            host_name: Some("web2".to_owned()),
            disks: Vec::new(),
        };
        let mut report = Report::default();
        reset(&Root::open(folder.path()).unwrap(), &task, &mut report);
        report
    }

    fn read(folder: &TempDir, path: &str) -> String {
        fs::read_to_string(folder.path().join(path)).unwrap()
    }

    #[test]
    fn the_host_name_changes_where_it_is_a_name() {
        let hosts = "127.0.0.1\tlocalhost web\n127.0.1.1 web.example.org web # web\n10.0.0.1 webserver other.web\n";
        let expected = "127.0.0.1\tlocalhost web2\n127.0.1.1 web2.example.org web2 # web\n10.0.0.1 webserver other.web\n";
        assert_eq!(
            hosts_with(hosts.as_bytes(), "web", "web2").unwrap(),
            expected
        );
        assert_eq!(
            hosts_with(hosts.as_bytes(), "web.example.org", "web2").unwrap(),
            expected
        );
        assert_eq!(
            hosts_with(b"127.0.1.1 web.a web", "web", "w.b").unwrap(),
            "127.0.1.1 w.b w"
        );
        assert_eq!(hosts_with(b"web", "web", "web2"), None);
        assert_eq!(hosts_with(b"::1 localhost", "localhost", "web2"), None);
        assert_eq!(hosts_with(b"::1 x", "", "web2"), None);
    }

    #[test]
    fn files_keep_their_owner_and_mode() {
        let folder = tree(&[
            ("etc/hostname", "# a comment\nweb\n"),
            ("etc/hosts", "::1 web\n"),
        ]);
        let inode = |path: &str| fs::metadata(folder.path().join(path)).unwrap().ino();
        let before = [inode("etc/hostname"), inode("etc/hosts")];
        let report = reset_all(&folder);
        assert_eq!(read(&folder, "etc/hostname"), "web2\n");
        assert_eq!(read(&folder, "etc/hosts"), "::1 web2\n");
        assert_eq!([inode("etc/hostname"), inode("etc/hosts")], before);
        assert_eq!(report.left, []);
        assert_eq!(report.changes[0].detail, "'web' is now 'web2'");
    }

    #[test]
    fn machine_ids_are_cleared_however_they_are_linked() {
        for has_systemd in [true, false] {
            for (link, target) in [
                (None, ""),
                (Some("var/lib/dbus/machine-id"), "/etc/machine-id"),
                (Some("etc/machine-id"), "/var/lib/dbus/machine-id"),
            ] {
                let folder = tree(&[
                    ("etc/machine-id", "0123456789abcdef0123456789abcdef\n"),
                    (
                        "var/lib/dbus/machine-id",
                        "0123456789abcdef0123456789abcdef\n",
                    ),
                ]);
                if has_systemd {
                    fs::create_dir_all(folder.path().join("lib/systemd")).unwrap();
                    fs::write(folder.path().join("lib/systemd/systemd"), "").unwrap();
                }
                if let Some(link) = link {
                    fs::remove_file(folder.path().join(link)).unwrap();
                    symlink(target, folder.path().join(link)).unwrap();
                }
                let report = reset_all(&folder);
                assert_eq!(report.left, [], "{link:?}");
                let root = Root::open(folder.path()).unwrap();
                for path in ["/etc/machine-id", "/var/lib/dbus/machine-id"] {
                    let id = root.read(path).unwrap();
                    assert!(
                        id.is_none_or(|id| id.is_empty() && has_systemd),
                        "{path} {link:?}"
                    );
                }
                if let Some(link) = link {
                    assert_eq!(root.kind(link).unwrap(), Some(FileType::Symlink));
                }
                let is_there = root.read("/etc/machine-id").unwrap().is_some();
                assert_eq!(is_there, has_systemd, "{link:?}");
            }
        }
    }

    #[test]
    fn host_keys_are_removed_and_made_again_at_the_next_boot() {
        let keys = [
            ("etc/ssh/ssh_host_rsa_key", "x"),
            ("etc/ssh/ssh_host_rsa_key.pub", "x"),
            ("etc/ssh/sshd_config", "x"),
            ("etc/ssh/moduli", "x"),
        ];
        let debian = [("usr/bin/ssh-keygen", ""), ("usr/lib/systemd/systemd", "")];
        let unit = "etc/systemd/system/bantam-ssh-host-keys.service";
        let wanted = "etc/systemd/system/multi-user.target.wants/bantam-ssh-host-keys.service";

        let folder = tree(&[&keys[..], &debian].concat());
        let report = reset_all(&folder);
        assert_eq!(report.left, []);
        let mut names: Vec<_> = fs::read_dir(folder.path().join("etc/ssh"))
            .unwrap()
            .map(|it| it.unwrap().file_name())
            .collect();
        names.sort();
        assert_eq!(names, ["moduli", "sshd_config"]);
        assert_eq!(read(&folder, unit), KEY_UNIT);
        assert_eq!(read(&folder, wanted), KEY_UNIT);

        let own = [("usr/lib/systemd/system/sshd-keygen@.service", "")];
        let folder = tree(&[&keys[..], &debian, &own].concat());
        reset_all(&folder);
        assert!(!folder.path().join(unit).exists());

        let folder = tree(&keys);
        let report = reset_all(&folder);
        assert!(
            report.left[0].reason.contains("ssh-keygen -A"),
            "{report:?}"
        );
    }

    #[test]
    fn state_logs_and_histories_are_removed_and_nothing_else_is() {
        let removed = [
            "var/lib/systemd/random-seed",
            "boot/loader/random-seed",
            "var/lib/dhcp/dhclient.eth0.leases",
            "var/lib/NetworkManager/internal-1-eth0.lease",
            "etc/udev/rules.d/70-persistent-net.rules",
            "var/lib/cloud/instances/i-1/sem/x",
            "var/log/journal/0123/system.journal",
            "var/log/syslog.1",
            "var/log/dpkg.log.2.gz",
            "home/me/.bash_history",
        ];
        let emptied = ["var/log/syslog", "var/log/wtmp", "var/log/apt/history.log"];
        let kept = [
            "var/lib/dhcp/README",
            "var/lib/NetworkManager/NetworkManager.state",
            "etc/udev/rules.d/70-other.rules",
            "var/lib/cloud/seed/nocloud/meta-data",
            "home/me/.bashrc",
        ];
        let all = [&removed[..], &emptied, &kept].concat();
        let folder = tree(&all.iter().map(|path| (*path, "x")).collect::<Vec<_>>());
        let report = reset_all(&folder);
        assert_eq!(report.left, []);
        for path in removed {
            assert!(!folder.path().join(path).exists(), "{path}");
        }
        for path in emptied {
            assert_eq!(read(&folder, path), "", "{path}");
        }
        for path in kept {
            assert_eq!(read(&folder, path), "x", "{path}");
        }
    }

    #[test]
    fn a_hostile_tree_is_left_with_the_reason() {
        let folder = tree(&[("elsewhere/hostname", "x")]);
        symlink("etc", folder.path().join("etc")).unwrap();
        let report = reset_all(&folder);
        let left: Vec<_> = report
            .left
            .iter()
            .map(|left| left.object.as_str())
            .collect();
        assert!(left.contains(&"/etc/hostname"), "{left:?}");
        let folder = tree(&[("etc/hosts", "::1 x")]);
        let huge = fs::File::create(folder.path().join("etc/hostname")).unwrap();
        huge.set_len(100 << 20).unwrap();
        reset_all(&folder);
        assert_eq!(read(&folder, "etc/hostname"), "web2\n");
    }

    proptest! {
        #[test]
        fn any_hosts_file_is_read(hosts: Vec<u8>, old in "[a-z.]{0,5}", new in "[a-z]{1,5}") {
            hosts_with(&hosts, &old, &new);
        }
    }
}
