//! The threads of a disk: one for images that are not raw, and one for a job.

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use bantam_devices::opener::Opener;
use bantam_devices::virtio::block::{DiskOwner, ImageWork};

use crate::config::DeviceName;
use crate::error::Error;
use crate::hooks::{ThreadHook, ThreadRole};
use crate::lock::lock;
use crate::machine::MachineContext;
use crate::run_control::{EndOnPanic, RunControl};
use crate::threads;

/// Starts the threads of a disk when they are needed. That for images that are not raw is there from the start of the
/// machine if the disk has such an image then, or else from the first one on; that for a job as long as the job.
pub(crate) struct DiskThreads {
    /// Place of the disk in the configuration.
    index: usize,
    disk: DeviceName,
    control: Arc<RunControl>,
    hook: Option<Arc<dyn ThreadHook>>,
    opener: Arc<dyn Opener>,
    stage: Mutex<Stage>,
}

enum Stage {
    /// The machine has not been started. The work is that of the first image, if it is not raw.
    Prepared(Option<Arc<ImageWork>>),
    /// The machine runs.
    Started(Threads),
    /// The machine has ended.
    Ended,
}

#[derive(Default)]
struct Threads {
    image: Option<(Arc<ImageWork>, JoinHandle<()>)>,
    job: Option<JoinHandle<()>>,
    /// Whether no more jobs begin, because the machine is about to end.
    refuses_jobs: bool,
}

impl DiskThreads {
    /// Prepares the threads of the disk at place `index`, with the work of its first image if that is not raw.
    pub(crate) fn new(
        index: usize,
        disk: DeviceName,
        context: &MachineContext,
        work: Option<Arc<ImageWork>>,
    ) -> DiskThreads {
        DiskThreads {
            index,
            disk,
            control: context.control.clone(),
            hook: context.thread_hook.clone(),
            opener: context.opener.clone(),
            stage: Mutex::new(Stage::Prepared(work)),
        }
    }

    /// Starts the thread of the first image if that is not raw.
    ///
    /// # Errors
    /// If the host is out of threads, or the program's hook refuses.
    pub(crate) fn start(&self) -> Result<(), Error> {
        let mut stage = lock(&self.stage);
        if let Stage::Prepared(work) = &mut *stage {
            let mut threads = Threads::default();
            if let Some(work) = work.take() {
                threads.image = Some(self.spawn_image_thread(work)?);
            }
            *stage = Stage::Started(threads);
        }
        Ok(())
    }

    fn spawn_image_thread(
        &self,
        work: Arc<ImageWork>,
    ) -> Result<(Arc<ImageWork>, JoinHandle<()>), Error> {
        let role = ThreadRole::Image(self.disk.clone());
        let own_work = work.clone();
        let thread = self.spawn("disk", &role, move || own_work.run())?;
        Ok((work, thread))
    }

    fn spawn(
        &self,
        kind: &str,
        role: &ThreadRole,
        work: impl FnOnce() + Send + 'static,
    ) -> Result<JoinHandle<()>, Error> {
        let name = format!("bantam-{kind}{}", self.index);
        let control = self.control.clone();
        threads::spawn(&name, role, self.hook.as_ref(), move || {
            let _end_on_panic = EndOnPanic(control);
            work();
        })
    }

    /// Refuses jobs from now on. One that has begun can be cancelled now.
    pub(crate) fn refuse_jobs(&self) {
        if let Stage::Started(threads) = &mut *lock(&self.stage) {
            threads.refuses_jobs = true;
        }
    }

    /// Ends the thread for images. The disk has no request under way any more. Its job, which is ended by its owner,
    /// is waited for.
    pub(crate) fn end(&self) {
        let stage = std::mem::replace(&mut *lock(&self.stage), Stage::Ended);
        let Stage::Started(Threads { image, job, .. }) = stage else {
            return;
        };
        if let Some((work, _)) = &image {
            work.end();
        }
        for thread in image.map(|(_, thread)| thread).into_iter().chain(job) {
            if thread.join().is_err() {
                tracing::error!("a thread of a disk panicked");
            }
        }
    }
}

impl DiskOwner for DiskThreads {
    fn start_image_thread(&self, work: Arc<ImageWork>) -> io::Result<()> {
        match &mut *lock(&self.stage) {
            Stage::Started(threads) => {
                let spawned = self.spawn_image_thread(work).map_err(reason)?;
                threads.image = Some(spawned);
                Ok(())
            }
            _ => Err(does_not_run()),
        }
    }

    fn start_job(&self, work: Box<dyn FnOnce() + Send>) -> io::Result<()> {
        match &mut *lock(&self.stage) {
            Stage::Started(threads) if !threads.refuses_jobs => {
                if let Some(former) = threads.job.take() {
                    // Its job is over, or it would not be replaced. A panic has ended the machine.
                    let _ = former.join();
                }
                let role = ThreadRole::Job(self.disk.clone());
                threads.job = Some(self.spawn("job", &role, work).map_err(reason)?);
                Ok(())
            }
            _ => Err(does_not_run()),
        }
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.opener.remove(path)
    }
}

fn does_not_run() -> io::Error {
    io::Error::other("the machine does not run")
}

/// Returns why a thread was not started.
fn reason(error: Error) -> io::Error {
    match error {
        Error::Thread { source, .. } => source,
        error => io::Error::other(error),
    }
}

impl Drop for DiskThreads {
    fn drop(&mut self) {
        self.end();
    }
}
