//! Brings the memory of a snapshot back, while the machine that goes on from it runs.
//!
//! Memory that is mapped from the memory file needs nothing more. All else is done by threads of a [`MemoryService`]: they read
//! the file ahead, fill pages when they are touched, watch a program that does so, or record which pages were touched.

mod fill;
mod prefetch;
mod record;
mod server;

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bantam_memory::{Backing, GuestMemory, MissingPages, PageSet};
use bantam_snapshot::{Facts, MemoryFile};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::error::Error;
use crate::events::{Event, EventSender};
use crate::hooks::{ThreadHook, ThreadRole};
use crate::lock::lock;
use crate::machine::MachineContext;
use crate::run_control::RunControl;
use crate::threads;

use fill::Filler;
pub use server::MemoryServerError;
use server::Server;

/// How long what a machine has under way when it ends may take to get the pages that it needs. Then it ends without.
const END_TIME: Duration = Duration::from_millis(500);

/// How a machine gets its memory from the memory file of a snapshot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MemoryLoad {
    /// The file is mapped, and read where the guest touches its memory.
    #[default]
    Lazy,
    /// The same, and all of it is read in the background.
    Prefetch,
    /// What the guest touches is copied from the file. If the file cannot be read any more, the machine ends with an error,
    /// while an access to a mapping would end the process.
    Copy,
    /// The same, and all else is copied in the background. The file is not needed any more when that is done.
    CopyAll,
}

impl MemoryLoad {
    /// Whether pages are filled by a program, and not by the host from a mapping.
    pub(crate) fn copies(self) -> bool {
        matches!(self, MemoryLoad::Copy | MemoryLoad::CopyAll)
    }

    /// Whether all pages are read, whatever the guest touches.
    pub(crate) fn reads_all(self) -> bool {
        matches!(self, MemoryLoad::Prefetch | MemoryLoad::CopyAll)
    }
}

/// Where a machine gets its memory from, and what it does beside.
pub(crate) struct Plan<'a> {
    pub(crate) file: &'a Arc<MemoryFile>,
    pub(crate) load: MemoryLoad,
    /// The pages that are needed first.
    pub(crate) working_set: Option<&'a PageSet>,
    /// Where the working set of the snapshot with these facts is recorded.
    pub(crate) record: Option<(&'a Path, &'a Facts)>,
}

/// The threads that bring the memory of a machine back. Dropping it ends them.
pub(crate) struct MemoryService {
    link: Arc<Link>,
    threads: Vec<JoinHandle<()>>,
}

/// What these threads share with the machine.
struct Link {
    memory: Arc<GuestMemory>,
    control: Arc<RunControl>,
    events: EventSender,
    /// Readable when the threads are to end.
    end_event: EventFd,
    is_ending: AtomicBool,
    failure: Mutex<Failure>,
}

/// What becomes of an error of these threads.
enum Failure {
    /// Whoever builds the machine gets it.
    Building(Option<Error>),
    /// It ends the machine.
    Running,
}

/// What has happened during [`Link::wait`].
struct Ready {
    /// The thread is to end.
    ends: bool,
    /// The last source is ready.
    last: bool,
}

/// How long a thread goes on after the end of its machine.
#[derive(Default)]
struct Patience {
    deadline: Option<Instant>,
}

/// What a thread that serves a machine is to do next.
#[derive(Debug, PartialEq, Eq)]
enum Turn {
    /// End.
    End,
    /// Give up, as the machine ends, and those who wait for pages have had their time.
    GiveUp,
    /// Look at what it watches.
    Ready,
    /// Go on: time has passed, or the machine has begun to end.
    Other,
}

impl MemoryService {
    /// Starts the threads that memory needs which has, or is to get, the content of a memory file; `None` if it needs none.
    ///
    /// # Errors
    /// If the host does not let pages be filled, or is out of threads.
    pub(crate) fn of_file(
        plan: &Plan<'_>,
        memory: &Arc<GuestMemory>,
        context: &MachineContext,
    ) -> Result<Option<MemoryService>, Error> {
        let mut service = MemoryService::new(memory, context)?;
        let hook = context.thread_hook.as_ref();
        let first = plan.working_set.filter(|_| plan.record.is_none());
        let is_mapped = memory.backing() == Backing::PrivateFile;
        if plan.load.copies() {
            let pages = MissingPages::of(memory.clone(), &plan.file.layers())?;
            let fills_one = plan.record.is_some();
            let filler = Filler::new(
                service.link.clone(),
                pages,
                plan.file.clone(),
                first.cloned(),
                plan.load.reads_all(),
                fills_one,
            );
            service.spawn(&ThreadRole::Memory, hook, move || filler.run())?;
        } else if is_mapped && (plan.load.reads_all() || first.is_some()) {
            let (link, file, first) = (service.link.clone(), plan.file.clone(), first.cloned());
            let reads_all = plan.load.reads_all();
            service.spawn(&ThreadRole::Memory, hook, move || {
                prefetch::prefetch(&link, &file, first, reads_all);
            })?;
        }
        if let Some((path, facts)) = plan.record {
            let (link, path, facts) = (service.link.clone(), path.to_path_buf(), facts.clone());
            service.spawn(&ThreadRole::Recorder, hook, move || {
                record::record(&link, &path, &facts);
            })?;
        }
        Ok((!service.threads.is_empty()).then_some(service))
    }

    /// Has the program that listens on `socket` fill `memory`, which nothing has touched yet, and watches it.
    ///
    /// # Errors
    /// If the host does not let pages be filled, or no program takes the request.
    pub(crate) fn of_server(
        socket: PathBuf,
        memory: &Arc<GuestMemory>,
        context: &MachineContext,
    ) -> Result<MemoryService, Error> {
        let mut service = MemoryService::new(memory, context)?;
        let pages = MissingPages::of(memory.clone(), &[])?;
        let server = Server::connect(socket, pages)?;
        let link = service.link.clone();
        let hook = context.thread_hook.as_ref();
        service.spawn(&ThreadRole::Memory, hook, move || server.watch(&link))?;
        Ok(service)
    }

    fn new(memory: &Arc<GuestMemory>, context: &MachineContext) -> Result<MemoryService, Error> {
        MemoryService::with(memory, &context.control, &context.events)
    }

    fn with(
        memory: &Arc<GuestMemory>,
        control: &Arc<RunControl>,
        events: &EventSender,
    ) -> Result<MemoryService, Error> {
        let end_event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        Ok(MemoryService {
            link: Arc::new(Link {
                memory: memory.clone(),
                control: control.clone(),
                events: events.clone(),
                end_event: end_event.map_err(Error::resource("an event"))?,
                is_ending: AtomicBool::new(false),
                failure: Mutex::new(Failure::Building(None)),
            }),
            threads: Vec::new(),
        })
    }

    fn spawn(
        &mut self,
        role: &ThreadRole,
        hook: Option<&Arc<dyn ThreadHook>>,
        work: impl FnOnce() + Send + 'static,
    ) -> Result<(), Error> {
        let name = match role {
            ThreadRole::Recorder => "bantam-record",
            _ => "bantam-memory",
        };
        let thread = threads::spawn(name, role, hook, work)?;
        self.threads.push(thread);
        Ok(())
    }

    /// Has failures end the machine from now on.
    ///
    /// # Errors
    /// If there was one before.
    pub(crate) fn begin(&self) -> Result<(), Error> {
        match std::mem::replace(&mut *lock(&self.link.failure), Failure::Running) {
            Failure::Building(Some(error)) => Err(error),
            Failure::Building(None) | Failure::Running => Ok(()),
        }
    }

    /// Ends the threads. Nobody may touch memory any more that is still missing.
    pub(crate) fn end(&mut self) {
        self.link.is_ending.store(true, Ordering::SeqCst);
        // The counter has room for this one.
        let _ = self.link.end_event.write(1);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread that brings memory back panicked");
            }
        }
    }
}

impl Drop for MemoryService {
    fn drop(&mut self) {
        self.end();
    }
}

impl Link {
    /// Whether nothing has to be read in the background any more.
    fn is_over(&self) -> bool {
        self.is_ending.load(Ordering::SeqCst) || self.control.is_stopping()
    }

    /// Ends the machine because of `error`: its memory cannot be had any more.
    fn fail(&self, error: Error) {
        let reason = || Event::MemoryLost {
            reason: error.to_string(),
        };
        self.events.send(reason);
        let failure = &mut *lock(&self.failure);
        match failure {
            Failure::Building(first) => {
                first.get_or_insert(error);
            }
            Failure::Running => self.control.finish(Err(error)),
        }
    }

    /// Lets those who wait for `pages` go on without their content, until the thread is to end. Nothing that the machine does
    /// after that counts.
    fn give_up(&self, pages: &MissingPages) {
        pages.give_up();
        // Someone who began to discard pages before that waits until the event is taken.
        while !self.wait(&[(pages.as_fd(), PollFlags::POLLIN)], None).ends {
            if pages.take_events().is_err() {
                return;
            }
        }
    }

    /// Waits until one of `sources` is ready, the thread is to end, or `time` has passed.
    fn wait(&self, sources: &[(BorrowedFd<'_>, PollFlags)], time: Option<Duration>) -> Ready {
        // SAFETY: the event is open as long as it is borrowed.
        let end_event = unsafe { BorrowedFd::borrow_raw(self.end_event.as_raw_fd()) };
        let all = [(end_event, PollFlags::POLLIN)];
        let all = all.iter().chain(sources);
        let mut fds: Vec<_> = all.map(|(fd, flags)| PollFd::new(*fd, *flags)).collect();
        let timeout = time.map_or(PollTimeout::NONE, |time| {
            // Rounded up, so that this does not spin at the end.
            let time = match time.is_zero() {
                true => time,
                false => time + Duration::from_micros(999),
            };
            PollTimeout::try_from(time).unwrap_or(PollTimeout::MAX)
        });
        let polled = poll(&mut fds, timeout);
        if let Err(error) = polled
            && error != Errno::EINTR
        {
            tracing::error!("cannot wait for events of guest memory: {error}");
        }
        let ready = |fd: &PollFd<'_>| polled.is_ok() && fd.any().unwrap_or(true);
        Ready {
            ends: fds.first().is_some_and(ready) || polled.is_err_and(|it| it != Errno::EINTR),
            last: fds.last().is_some_and(ready),
        }
    }
}

impl Patience {
    /// Waits like [`Link::wait`], and says what is to be done. When the machine ends, those who wait for pages have
    /// [`END_TIME`].
    fn wait(
        &mut self,
        link: &Link,
        source: BorrowedFd<'_>,
        flags: PollFlags,
        time: Option<Duration>,
    ) -> Turn {
        let left = self
            .deadline
            .map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            return Turn::GiveUp;
        }
        let time = [left, time].into_iter().flatten().min();
        let source = (source, flags);
        let ready = match left {
            Some(_) => link.wait(&[source], time),
            None => link.wait(
                &[(link.control.exit_event(), PollFlags::POLLIN), source],
                time,
            ),
        };
        if left.is_none() && link.control.is_stopping() {
            self.deadline = Some(Instant::now() + END_TIME);
        }
        match ready {
            Ready { ends: true, .. } => Turn::End,
            Ready { last: true, .. } => Turn::Ready,
            Ready { .. } => Turn::Other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the service of a machine without processors.
    pub(super) fn service(memory: &Arc<GuestMemory>) -> MemoryService {
        let events = EventSender::default();
        let control = Arc::new(RunControl::new(events.clone()).unwrap());
        MemoryService::with(memory, &control, &events).unwrap()
    }
}
