//! Starting a machine: its process is made, and the command that makes it waits until the guest runs.

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::{env, fs};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};

use crate::error::Error;
use crate::files;
use crate::history::RunOrigin;
use crate::machine::{Change, Machine, file};
use crate::process::{FAILED, PROCESS_COMMAND, RUNNING, rotate_log};

/// How a machine is started.
#[derive(Clone, Copy, Debug, Default)]
pub struct StartOptions {
    /// Boots the kernel although there is a managed save, which is removed.
    pub force_boot: bool,
    /// Gives the guest another instance id before it boots, so that cloud-init sets it up anew.
    pub new_instance: bool,
}

/// What the process of a machine is told on its command line.
#[derive(Debug, Default)]
pub(crate) struct Launch<'a> {
    /// The directory of the state that it goes on from, and what that is.
    pub(crate) from: Option<(&'a Path, RunOrigin)>,
    /// The connections by which it arrives.
    pub(crate) connections: Vec<OwnedFd>,
}

impl Machine {
    /// Starts the machine, and returns when its guest runs. It goes on from its managed save if it has one, which is
    /// removed then. The machine's process is not a child to be waited for: it lives in a session of its own, and goes on
    /// when the caller ends.
    ///
    /// # Errors
    /// If it runs already, another command is at work on it, or it cannot run: the error has the reason that its process
    /// gives.
    pub fn start(&self, options: &StartOptions) -> Result<RunOrigin, Error> {
        let change = self.change("start")?;
        self.mend(&change)?;
        if self.settings()?.template {
            let name = self.name();
            let reason = format!(
                "it is a template; start a copy of it (bantam clone {name} NEW), or make it an ordinary machine again \
                 (bantam template {name} --off)"
            );
            return Err(self.refused("start", reason));
        }
        self.start_with(&change, options)
    }

    /// The same for a command that has the right to change the machine.
    pub(crate) fn start_with(
        &self,
        change: &Change,
        options: &StartOptions,
    ) -> Result<RunOrigin, Error> {
        let save = self.file(file::SAVE);
        let has_save = self.has_managed_save();
        let goes_on = has_save && !options.force_boot;
        if options.new_instance {
            if goes_on {
                let reason = "its guest goes on from a managed save, and is the instance that it was; boot it with --force-boot";
                return Err(self.refused("start", reason));
            }
            self.require_shut_off("start")?;
            self.renew_instance()?;
        }
        self.launch(
            change,
            &Launch {
                from: goes_on.then_some((save.as_path(), RunOrigin::Restored)),
                ..Launch::default()
            },
        )?;
        if has_save {
            // Its memory is mapped by now. It is of no use any more, as the guest changes its disks.
            files::remove_folder(&save).map_err(Error::file("remove", &save))?;
        }
        Ok(match goes_on {
            true => RunOrigin::Restored,
            false => RunOrigin::Booted,
        })
    }

    /// Starts the machine's process, and waits until the guest runs.
    pub(crate) fn launch(&self, _change: &Change, launch: &Launch<'_>) -> Result<(), Error> {
        let name = self.name();
        let lock = self.take_life()?;
        // Nothing of an earlier process that was killed is left, as its lock was free.
        let runtime = self.runtime();
        self.remove_runtime()?;
        files::create_folders(runtime).map_err(Error::file("create", runtime))?;
        let path = self.log();
        rotate_log(&path).map_err(Error::file("rotate", &path))?;
        let mut options = OpenOptions::new();
        options.create(true).append(true).mode(0o600);
        let log = options.open(&path).map_err(Error::file("open", &path))?;
        let (mut answer, answering) =
            io::pipe().map_err(Error::io("create a pipe for the start"))?;
        let spawned = self.spawn(launch, lock.into(), answering.into(), log.into());
        let mut child = spawned.map_err(Error::io("start a process for the machine"))?;
        // The process has the lock from now on. All other ends of the pipe are closed.
        let mut text = String::new();
        let read = (&mut answer)
            .take(64 << 10)
            .read_to_string(&mut text)
            .map(|_| text.trim_end());
        let reason = match read {
            Ok(RUNNING) => {
                reap_later(child);
                return Ok(());
            }
            Ok(text) => match text.strip_prefix(FAILED) {
                Some(reason) => reason.trim().to_owned(),
                None => format!("its process has ended; see '{}'", path.display()),
            },
            Err(error) => format!("no answer of its process: {error}"),
        };
        // It ends by itself; a zombie of it would be left to a caller that lives on.
        let _ = child.wait();
        let name = name.clone();
        Err(Error::Start { name, reason })
    }

    fn spawn(
        &self,
        launch: &Launch<'_>,
        lock: Stdio,
        answering: Stdio,
        log: Stdio,
    ) -> io::Result<Child> {
        let mut command = Command::new(program()?);
        command.arg0("bantam");
        command.arg(PROCESS_COMMAND).arg(self.name().as_str());
        command.arg("--machines").arg(&self.folders.machines);
        command.arg("--runtime").arg(&self.folders.runtime);
        if let Some((directory, origin)) = launch.from {
            command.arg("--from").arg(directory);
            if origin == RunOrigin::Reverted {
                command.arg("--reverted");
            }
        }
        for connection in &launch.connections {
            // The process closes all other descriptors that it inherits.
            fcntl(connection, FcntlArg::F_SETFD(FdFlag::empty()))?;
            let number = connection.as_raw_fd().to_string();
            command.arg("--connection").arg(number);
        }
        command.stdin(lock).stdout(answering).stderr(log);
        command.current_dir("/");
        command.spawn()
    }
}

/// Waits for a child in the background, for callers that live longer than the machine.
fn reap_later(mut child: Child) {
    // Without a thread, it is a zombie until the caller ends, which most do soon.
    let _ = std::thread::Builder::new()
        .name("bantam-reap".into())
        .stack_size(64 << 10)
        .spawn(move || child.wait());
}

/// Returns the program that machines are started with: this one, even if its file has been replaced since.
fn program() -> io::Result<PathBuf> {
    let path = env::current_exe()?;
    Ok(match fs::metadata(&path) {
        Ok(_) => path,
        Err(_) => OsString::from("/proc/self/exe").into(),
    })
}
