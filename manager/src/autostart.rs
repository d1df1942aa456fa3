//! Machines that are started with the host: a systemd unit for each.

use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::{env, fs};

use nix::unistd::geteuid;

use crate::error::Error;
use crate::files;
use crate::machine::Machine;
use crate::name::MachineName;

/// How long the guest may take to shut down with the host.
const SHUTDOWN_SECONDS: u32 = 60;
/// The exit status of the machine's process if the user has cut the power or saved the state, which is no failure.
const POWER_CUT: u8 = 123;

impl Machine {
    /// Returns whether the machine is started with the host, or with the session of its user.
    pub fn is_autostarted(&self) -> bool {
        self.link().is_some_and(|link| link.exists())
    }

    /// Has systemd start the machine with the host, and shut it down with it, or not any more. It is the user's systemd if
    /// the user is not root: it runs while the user is logged in, or always after `loginctl enable-linger`.
    ///
    /// # Errors
    /// If the unit cannot be written or removed, or there is no folder of units.
    pub fn set_autostart(&self, is_on: bool) -> Result<(), Error> {
        if is_on {
            self.require_persistent("autostart")?;
        }
        let (Some(unit), Some(link)) = (self.unit(), self.link()) else {
            return match is_on {
                true => {
                    let reason =
                        "machines in a folder of your own (BANTAM_STATE_DIR) have no systemd units";
                    Err(self.refused("autostart", reason))
                }
                false => Ok(()),
            };
        };
        if !is_on && fs::symlink_metadata(&unit).is_err() && fs::symlink_metadata(&link).is_err() {
            return Ok(());
        }
        if is_on {
            let program = env::current_exe().map_err(Error::io("find this program"))?;
            let text = unit_text(&program, self.name());
            for path in [&unit, &link] {
                if let Some(folder) = path.parent() {
                    fs::create_dir_all(folder).map_err(Error::file("create", folder))?;
                }
            }
            files::replace(&unit, &text).map_err(Error::file("write", &unit))?;
            match symlink(&unit, &link) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                made => made.map_err(Error::file("create", &link))?,
            }
        } else {
            for path in [&link, &unit] {
                files::remove_file(path).map_err(Error::file("remove", path))?;
            }
        }
        reload();
        Ok(())
    }

    fn unit(&self) -> Option<PathBuf> {
        let units = self.folders.units.as_ref()?;
        Some(units.join(format!("bantam-{}.service", self.name())))
    }

    fn link(&self) -> Option<PathBuf> {
        let unit = self.unit()?;
        let target = match geteuid().is_root() {
            true => "multi-user.target.wants",
            false => "default.target.wants",
        };
        Some(unit.parent()?.join(target).join(unit.file_name()?))
    }
}

/// Returns a unit (systemd.service(5)) whose processes are those of the machine. Its control group is delegated, so that the
/// machine can have one of its own in it. The command that ends the machine may fail, as it is also executed when the machine
/// has ended already.
fn unit_text(program: &Path, name: &MachineName) -> String {
    // A percent sign begins a specifier, and a quoted argument has escapes.
    let program = program.display().to_string();
    let program = program.replace('\\', "\\\\").replace('"', "\\\"");
    let program = program.replace('%', "%%");
    format!(
        "[Unit]\n\
         Description=Bantam machine {name}\n\
         Documentation=man:bantam-autostart(1)\n\
         After=network-online.target\n\
         Wants=network-online.target\n\
         \n\
         [Service]\n\
         Type=forking\n\
         Delegate=yes\n\
         ExecStart=\"{program}\" start {name}\n\
         ExecStop=-\"{program}\" shutdown {name} --wait --timeout {SHUTDOWN_SECONDS}\n\
         SuccessExitStatus={POWER_CUT}\n\
         TimeoutStopSec={}\n\
         \n\
         [Install]\n\
         WantedBy=multi-user.target default.target\n",
        SHUTDOWN_SECONDS + 30
    )
}

/// Has systemd read its units again, where it runs.
fn reload() {
    let mut command = Command::new("systemctl");
    if !geteuid().is_root() {
        command.arg("--user");
    }
    command.arg("daemon-reload");
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    // A host without systemd, or a container, reads the unit when systemd starts.
    let _ = command.status();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::folders::Folders;

    #[test]
    fn a_unit_is_installed_and_removed_as_a_whole() {
        let folder = tempfile::tempdir().unwrap();
        let units = folder.path().join("units");
        let folders = Folders {
            machines: folder.path().join("machines"),
            runtime: folder.path().join("run"),
            units: Some(units.clone()),
        };
        let machine = Machine::at(&folders, "web".parse().unwrap());
        assert!(!machine.is_autostarted());
        machine.set_autostart(false).unwrap();
        assert!(!units.exists());
        machine.set_autostart(true).unwrap();
        machine.set_autostart(true).unwrap();
        assert!(machine.is_autostarted());
        let text = fs::read_to_string(units.join("bantam-web.service")).unwrap();
        assert!(text.contains(" start web\n"), "{text}");
        assert!(
            text.contains(" shutdown web --wait --timeout 60\n"),
            "{text}"
        );
        machine.set_autostart(false).unwrap();
        assert!(!machine.is_autostarted());
        assert!(!units.join("bantam-web.service").exists());
    }

    #[test]
    fn nothing_in_a_path_has_a_meaning_in_a_unit() {
        let text = unit_text(Path::new("/a b/%n\"\\"), &"web".parse().unwrap());
        assert!(
            text.contains("ExecStart=\"/a b/%%n\\\"\\\\\" start web\n"),
            "{text}"
        );
    }
}
