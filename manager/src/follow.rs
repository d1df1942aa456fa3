//! The events of all machines.

use std::collections::HashSet;
use std::sync::mpsc;
use std::thread;

use bantam_vmm::Event;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

use crate::error::Error;
use crate::files;
use crate::machine::Machine;
use crate::manager::Manager;
use crate::name::MachineName;

/// How many events may wait for whoever follows them; the machines keep more for a while.
const CAPACITY: usize = 64;

/// What the threads report.
enum Report {
    /// A machine may have been started.
    Changed,
    /// Something has happened to a machine.
    Event(Machine, Event),
    /// A machine has ended.
    Ended(MachineName),
    /// Nobody tells of new machines any more.
    Failed(Error),
}

impl Manager {
    /// Calls `take` for each event of any machine from now on, without end. A machine that is started later is followed from
    /// when its process listens, which is before its guest runs.
    ///
    /// # Errors
    /// If the host does not tell what happens in the folder of the sockets, and those of `take`.
    pub fn follow<E: From<Error>>(
        &self,
        mut take: impl FnMut(&Machine, &Event) -> Result<(), E>,
    ) -> Result<(), E> {
        let runtime = &self.folders().runtime;
        files::create_folders(runtime).map_err(Error::file("create", runtime))?;
        let (reports, received) = mpsc::sync_channel(CAPACITY);
        let notify = Inotify::init(InitFlags::IN_CLOEXEC)
            .and_then(|notify| {
                let flags = AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO;
                notify.add_watch(runtime, flags)?;
                Ok(notify)
            })
            .map_err(std::io::Error::from)
            .map_err(Error::file("watch", runtime))?;
        let watching = reports.clone();
        spawn(move || {
            loop {
                let report = match notify.read_events() {
                    Ok(_) => Report::Changed,
                    Err(nix::errno::Errno::EINTR) => continue,
                    Err(errno) => {
                        let error = Error::io("watch for machines")(errno.into());
                        Report::Failed(error)
                    }
                };
                let is_last = matches!(report, Report::Failed(_));
                if watching.send(report).is_err() || is_last {
                    return;
                }
            }
        })?;
        let mut followed = HashSet::new();
        self.follow_new(&mut followed, &reports)?;
        loop {
            // It never ends, as this has a sender.
            let Ok(report) = received.recv() else {
                return Ok(());
            };
            match report {
                Report::Changed => self.follow_new(&mut followed, &reports)?,
                Report::Event(machine, event) => take(&machine, &event)?,
                Report::Ended(name) => {
                    followed.remove(&name);
                    // It may have been started again already.
                    self.follow_new(&mut followed, &reports)?;
                }
                Report::Failed(error) => return Err(error.into()),
            }
        }
    }

    /// Follows the machines that have a process and are not followed yet.
    fn follow_new(
        &self,
        followed: &mut HashSet<MachineName>,
        reports: &mpsc::SyncSender<Report>,
    ) -> Result<(), Error> {
        for machine in self.machines()? {
            let is_new = !followed.contains(machine.name()) && machine.is_active().unwrap_or(false);
            if is_new {
                followed.insert(machine.name().clone());
                let reports = reports.clone();
                spawn(move || {
                    // It ends when the machine does, or nobody listens.
                    let _ = machine.follow::<Stop>(|event| {
                        let report = Report::Event(machine.clone(), event.clone());
                        reports.send(report).map_err(|_| Stop)
                    });
                    let _ = reports.send(Report::Ended(machine.name().clone()));
                })?;
            }
        }
        Ok(())
    }
}

/// Ends a thread that nobody listens to.
struct Stop;

impl From<Error> for Stop {
    fn from(_: Error) -> Stop {
        Stop
    }
}

fn spawn(work: impl FnOnce() + Send + 'static) -> Result<(), Error> {
    let thread = thread::Builder::new().name("bantam-events".into());
    thread
        .stack_size(128 << 10)
        .spawn(work)
        .map(drop)
        .map_err(Error::io("start a thread for events"))
}
