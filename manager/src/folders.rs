//! Where machines are kept.

use std::env;
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

use nix::unistd::geteuid;

use crate::error::Error;
use crate::name::MachineName;

/// The folders of the machines of one user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Folders {
    /// The folder with a folder for each machine, which is kept when the host restarts.
    pub machines: PathBuf,
    /// The folder with a folder of sockets for each machine that runs, which need not be kept.
    pub runtime: PathBuf,
    /// The folder of the user's systemd units; `None` if there is none, as for a state folder of one's own.
    pub units: Option<PathBuf>,
}

impl Folders {
    /// Returns the folders of the user of this process. Root's are `/var/lib/bantam/machines` and `/run/bantam`; those of
    /// others are `$XDG_STATE_HOME/bantam/machines` (`~/.local/state`) and `$XDG_RUNTIME_DIR/bantam`.
    /// `BANTAM_STATE_DIR` in the environment takes the place of the former without `machines`, and `BANTAM_RUNTIME_DIR` of
    /// the latter.
    ///
    /// # Errors
    /// If the environment of a user other than root has neither of the variables nor `HOME`.
    pub fn of_user() -> Result<Folders, Error> {
        Folders::from_environment(|name| env::var_os(name), geteuid().is_root())
    }

    fn from_environment(
        variable: impl Fn(&str) -> Option<OsString>,
        is_root: bool,
    ) -> Result<Folders, Error> {
        // The specification of XDG has relative paths ignored.
        let path = |name| {
            let value = variable(name).map(PathBuf::from);
            value.filter(|path| path.is_absolute())
        };
        let given = path("BANTAM_STATE_DIR");
        let state = match &given {
            Some(state) => state.clone(),
            None if is_root => "/var/lib/bantam".into(),
            None => {
                let home = || Some(path("HOME")?.join(".local/state"));
                let state = path("XDG_STATE_HOME").or_else(home);
                let state = state.ok_or_else(|| {
                    let reason = "set HOME or BANTAM_STATE_DIR to an absolute path";
                    Error::io("find the folder of your machines")(io::Error::other(reason))
                })?;
                state.join("bantam")
            }
        };
        let usual_runtime = || match &given {
            Some(state) => state.join("run"),
            None if is_root => "/run/bantam".into(),
            None => path("XDG_RUNTIME_DIR").map_or(state.join("run"), |path| path.join("bantam")),
        };
        let units = match (&given, is_root) {
            (Some(_), _) => None,
            (None, true) => Some("/etc/systemd/system".into()),
            (None, false) => {
                let home = || Some(path("HOME")?.join(".config"));
                let config = path("XDG_CONFIG_HOME").or_else(home);
                config.map(|config| config.join("systemd/user"))
            }
        };
        Ok(Folders {
            runtime: path("BANTAM_RUNTIME_DIR").unwrap_or_else(usual_runtime),
            machines: state.join("machines"),
            units,
        })
    }

    /// Returns the folder of a machine.
    pub fn of_machine(&self, name: &MachineName) -> PathBuf {
        self.machines.join(name.as_str())
    }

    /// Returns the folder of images that machines are made of, beside that of the machines.
    pub fn images(&self) -> PathBuf {
        self.machines.with_file_name("images")
    }

    /// Returns the folder with the sockets of a machine.
    pub fn runtime_of(&self, name: &MachineName) -> PathBuf {
        self.runtime.join(name.as_str())
    }
}

/// Returns the name of the machine that has `folder`; `None` if it is not the folder of a machine.
pub(crate) fn name_of(folder: &Path) -> Option<MachineName> {
    folder.file_name()?.to_str()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folders(variables: &[(&str, &str)], is_root: bool) -> Result<[String; 3], Error> {
        let find = |name: &str| {
            let found = variables.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| OsString::from(value))
        };
        let folders = Folders::from_environment(find, is_root)?;
        let text = |path: PathBuf| path.display().to_string();
        Ok([
            text(folders.machines),
            text(folders.runtime),
            folders.units.map_or("none".to_owned(), text),
        ])
    }

    #[test]
    fn each_user_has_folders() {
        let home = ("HOME", "/home/u");
        assert_eq!(
            folders(&[home], true).unwrap(),
            [
                "/var/lib/bantam/machines",
                "/run/bantam",
                "/etc/systemd/system"
            ]
        );
        assert_eq!(
            folders(&[home, ("XDG_RUNTIME_DIR", "/run/user/7")], false).unwrap(),
            [
                "/home/u/.local/state/bantam/machines",
                "/run/user/7/bantam",
                "/home/u/.config/systemd/user"
            ]
        );
        assert_eq!(
            folders(&[home, ("XDG_STATE_HOME", "relative")], false).unwrap()[1],
            "/home/u/.local/state/bantam/run"
        );
        assert_eq!(
            folders(&[home, ("BANTAM_STATE_DIR", "/s")], false).unwrap(),
            ["/s/machines", "/s/run", "none"]
        );
        assert!(folders(&[], false).is_err());
    }
}
