//! The process of a machine: what it gets from the command that starts it, and what it leaves behind.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use bantam_cgroup::ControlGroup;
use bantam_vmm::config::{MachineConfig, SerialConfig};
use bantam_vmm::{ExitReason, Snapshot};
use nix::unistd::{dup2_stderr, dup2_stdout, setsid};

use crate::definition::RestartPolicy;
use crate::error::Error;
use crate::files;
use crate::folders::Folders;
use crate::history::{EndReason, Run, RunEnd, RunOrigin};
use crate::lock::{self, Purpose};
use crate::machine::{Machine, file};
use crate::manager::Manager;
use crate::name::MachineName;

/// The command of the program that is the process of a machine.
pub const PROCESS_COMMAND: &str = "machine-process";
/// What the process says when the guest runs.
pub(crate) const RUNNING: &str = "running";
/// What it says before the reason if the machine cannot be started.
pub(crate) const FAILED: &str = "failed ";
/// The size from which a log is put aside.
const LOG_SIZE: u64 = 1 << 20;

/// The process of a machine, seen from within. Its standard input is the lock file, which it has locked; its standard
/// output leads to the command that has started it, until it has said that the guest runs; its standard error is the log.
#[derive(Debug)]
pub struct MachineProcess {
    machine: Machine,
    group: Option<ControlGroup>,
    policy: RestartPolicy,
    run: Mutex<Run>,
    has_answered: Mutex<bool>,
}

impl MachineProcess {
    /// Makes this process the one of the machine called `name`, in a session of its own.
    ///
    /// # Errors
    /// If it was not started by the manager, or the settings of the machine cannot be read.
    pub fn enter(
        folders: &Folders,
        name: MachineName,
        origin: RunOrigin,
    ) -> Result<MachineProcess, Error> {
        let machine = Machine::at(folders, name.clone());
        let present = match origin {
            RunOrigin::Migrated => Machine::arriving(folders, name),
            _ => machine.clone(),
        };
        let input = io::stdin();
        let input = std::os::fd::AsFd::as_fd(&input).try_clone_to_owned();
        let input = input.map_err(Error::io("use the lock of the machine"))?;
        // This is the same open file, so it is no change if the caller has the lock.
        let is_owner = lock::try_lock(&input.into(), Purpose::Life);
        if !is_owner.unwrap_or(false) || !present.is_active()? {
            let reason = format!("start it by `bantam start {}`", machine.name());
            return Err(machine.refused("run", reason));
        }
        // It fails only for a process that has a session of its own already.
        let _ = setsid();
        let run = Run::new(origin);
        let policy = present.settings()?.restart;
        if origin != RunOrigin::Migrated {
            machine.write_run(&run)?;
        }
        Ok(MachineProcess {
            machine,
            group: None,
            policy,
            run: Mutex::new(run),
            has_answered: Mutex::new(false),
        })
    }

    /// Returns the machine.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Returns the machine in the folder that it has now, which is another one until it has arrived.
    fn present(&self) -> Machine {
        let machine = &self.machine;
        match machine.exists() {
            true => machine.clone(),
            false => Machine::arriving(&machine.folders, machine.name().clone()),
        }
    }

    /// Moves this process into a control group with the limits of the machine file, if there are any.
    ///
    /// # Errors
    /// If the machine file cannot be read, or the host does not let the process be limited so.
    pub fn limit(&mut self) -> Result<(), Error> {
        self.group = self.present().enter_control_group()?;
        Ok(())
    }

    /// Tells the command that waits for it that the guest runs. Only the first call does anything.
    pub fn say_running(&self) {
        let run = self.run.lock().unwrap_or_else(PoisonError::into_inner);
        if run.origin == RunOrigin::Migrated {
            self.write(&run);
        }
        drop(run);
        self.answer(format_args!("{RUNNING}"));
    }

    /// Tells the command that waits for it, and the history, that the machine has failed.
    pub fn say_failed(&self, reason: &str) {
        self.answer(format_args!("{FAILED}{}", reason.replace('\n', " ")));
        self.end(EndReason::HostError, Some(reason.to_owned()));
    }

    fn answer(&self, line: std::fmt::Arguments<'_>) {
        let mut has_answered = self
            .has_answered
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if std::mem::replace(&mut *has_answered, true) {
            return;
        }
        let mut stdout = io::stdout();
        // The command may have been killed; the machine goes on.
        let _ = writeln!(stdout, "{line}").and_then(|()| stdout.flush());
        // The other end waits until the pipe is closed.
        match OpenOptions::new().write(true).open("/dev/null") {
            Ok(null) => {
                if let Err(errno) = dup2_stdout(&null) {
                    tracing::warn!("cannot close the pipe to the start: {}", errno.desc());
                }
            }
            Err(error) => tracing::warn!("cannot open '/dev/null': {error}"),
        }
    }

    /// Notes why the machine has ended.
    pub fn ended(&self, reason: ExitReason) {
        self.end(EndReason::of(reason), None);
    }

    fn end(&self, reason: EndReason, detail: Option<String>) {
        let mut run = self.run.lock().unwrap_or_else(PoisonError::into_inner);
        run.end = Some(RunEnd::now(reason, detail));
        // One that has not arrived has no history.
        if self.machine.exists() {
            self.write(&run);
        }
    }

    /// Notes that the machine is started again.
    pub fn restarted(&self) {
        let mut run = self.run.lock().unwrap_or_else(PoisonError::into_inner);
        run.restarts = run.restarts.saturating_add(1);
        run.end = None;
        self.write(&run);
    }

    fn write(&self, run: &Run) {
        if let Err(error) = self.machine.write_run(run) {
            tracing::warn!("{error}");
        }
    }

    /// Returns whether a machine that nobody has told to end is started again after this end.
    pub fn restarts_after(&self, reason: ExitReason, restarts_on_reboot: bool) -> bool {
        match (reason, self.policy) {
            // One that has moved must not run twice.
            (ExitReason::Stopped | ExitReason::Moved, _) => false,
            (ExitReason::Reboot, _) if restarts_on_reboot => true,
            (_, RestartPolicy::Never) => false,
            (_, RestartPolicy::Always) => true,
            (reason, RestartPolicy::OnFailure) => EndReason::of(reason).is_failure(),
        }
    }

    /// Returns whether a machine that has run, and that an error of the monitor has ended, is started again.
    pub fn restarts_after_error(&self) -> bool {
        let has_run = *self
            .has_answered
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        has_run && self.policy != RestartPolicy::Never
    }

    /// Removes what only a running machine has. The lock goes with the process.
    pub fn leave(mut self) {
        if let Some(Err(error)) = self.group.take().map(ControlGroup::leave) {
            // It is removed by the next command, or with the group that it is in.
            tracing::info!("the control group of the machine stays: {error}");
            return;
        }
        let machine = &self.machine;
        if !machine.exists() {
            self.present().forget_arrival();
        }
        let runtime = machine.runtime();
        let removed = files::remove_folder(runtime).map_err(Error::file("remove", runtime));
        let removed = removed.and_then(|()| match machine.is_transient() {
            true => Manager::new(machine.folders.clone()).remove_transient(machine),
            false => Ok(()),
        });
        if let Err(error) = removed {
            tracing::warn!("{error}");
        }
    }
}

impl Machine {
    /// Returns the configuration for a machine that goes on from `snapshot`: that of the snapshot, with the taps and sockets
    /// that the machine has now, and if it goes back to a snapshot, the images.
    fn config_for(&self, snapshot: &Snapshot, goes_back: bool) -> Result<MachineConfig, Error> {
        let now = self.process_config()?;
        let mut config = snapshot.config().clone();
        let is_console = |end: &SerialConfig| *end != SerialConfig::None;
        let mut disks = config.disks.iter().zip(&now.disks);
        let has_other_images = !goes_back && disks.any(|(disk, now)| disk.path != now.path);
        if has_other_images
            || config.disks.len() != now.disks.len()
            || config.nets.len() != now.nets.len()
            || config.channels.len() != now.channels.len()
            || is_console(&config.console) != is_console(&now.console)
        {
            let reason = "its machine file has other disks, network devices, consoles or channels than the saved state; \
                          take the change back, or start it anew (bantam start --force-boot)";
            return Err(self.refused("restore", reason));
        }
        // Those of a machine that goes back to a snapshot are overlays of the images there.
        for (disk, now) in config.disks.iter_mut().zip(&now.disks) {
            disk.path.clone_from(&now.path);
            disk.format = now.format;
            disk.backing = now.backing;
        }
        for (net, now) in config.nets.iter_mut().zip(&now.nets) {
            net.tap.clone_from(&now.tap);
        }
        for (channel, now) in config.channels.iter_mut().zip(&now.channels) {
            channel.end.clone_from(&now.end);
        }
        if let (Some(vsock), Some(now)) = (&mut config.vsock, &now.vsock) {
            vsock.socket.clone_from(&now.socket);
        }
        config.serial = now.serial;
        config.console = now.console;
        config.on_reboot = now.on_reboot;
        config.cgroup = now.cgroup;
        config.restart_limit = now.restart_limit;
        config.shutdown_timeout = now.shutdown_timeout;
        Ok(config)
    }

    /// Opens the state that a process is started from.
    ///
    /// # Errors
    /// If it cannot be read or is damaged, or the images of disks are not as they were.
    pub fn open_state(
        &self,
        directory: &Path,
        origin: RunOrigin,
    ) -> Result<(Snapshot, MachineConfig), Error> {
        let snapshot = Snapshot::open(directory)?;
        let config = self.config_for(&snapshot, origin == RunOrigin::Reverted)?;
        // The images of the snapshot itself, which may be backing files now.
        snapshot.check_disks(snapshot.config())?;
        Ok((snapshot, config))
    }
}

/// The log of a machine's process, which is its standard error.
#[derive(Debug)]
pub struct ProcessLog {
    path: PathBuf,
    size: AtomicU64,
}

impl ProcessLog {
    /// Returns the log of the process of `machine`.
    pub fn of(machine: &Machine) -> ProcessLog {
        let path = machine.log();
        let size = fs::metadata(&path).map_or(0, |file| file.len());
        let size = AtomicU64::new(size);
        ProcessLog { path, size }
    }

    /// Notes that `count` bytes are written to standard error, and returns whether the log is large.
    pub fn wrote(&self, count: usize) -> bool {
        let before = self.size.fetch_add(count as u64, Ordering::Relaxed);
        before.saturating_add(count as u64) >= LOG_SIZE
    }

    /// Puts the log aside, and has standard error lead to a new one.
    pub fn renew(&self) {
        self.size.store(0, Ordering::Relaxed);
        let mut options = OpenOptions::new();
        options.create(true).append(true).mode(0o600);
        let renewed = rotate_log(&self.path)
            .and_then(|()| options.open(&self.path))
            .and_then(|file| Ok(dup2_stderr(&file)?));
        // There is no other place to tell it: the log goes on in the old file.
        let _ = renewed;
    }
}

/// Puts a log aside that has become large, in the place of the one that was put aside before.
pub(crate) fn rotate_log(path: &Path) -> io::Result<()> {
    let mut aside = path.as_os_str().to_owned();
    aside.push(".1");
    match fs::metadata(path) {
        Ok(file) if file.len() >= LOG_SIZE / 2 => fs::rename(path, aside),
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

impl Machine {
    /// Notes why the last run has ended, for a command that has ended it and knows more than the machine's process.
    pub(crate) fn note_end(&self, reason: EndReason) -> Result<(), Error> {
        let path = self.file(file::RUN);
        if let Some(mut run) = Run::read(&path) {
            run.end = Some(RunEnd::now(reason, None));
            run.write(&path).map_err(Error::file("write", &path))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_log_is_put_aside_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        rotate_log(&path).unwrap();
        fs::write(&path, "short").unwrap();
        rotate_log(&path).unwrap();
        assert!(path.exists());
        for round in 0..2 {
            fs::write(&path, vec![b'0' + round; LOG_SIZE as usize]).unwrap();
            rotate_log(&path).unwrap();
        }
        assert!(!path.exists());
        let names: Vec<_> = fs::read_dir(folder.path()).unwrap().collect();
        assert_eq!(names.len(), 1);
        assert_eq!(fs::read(folder.path().join("log.1")).unwrap()[0], b'1');
    }
}
