//! The thread of a disk for images that are not raw.

use std::io;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use bantam_devices::virtio::block::ImageWork;

use crate::error::Error;
use crate::hooks::{ThreadHook, ThreadRole};
use crate::lock::lock;
use crate::run_control::{EndOnPanic, RunControl};
use crate::threads;

/// Does the work of the images of a disk on a thread of its own. The thread is there from the start of the machine
/// if the disk has an image then that is not raw, or else from the first such image on.
pub(crate) struct ImageThread {
    name: String,
    role: ThreadRole,
    control: Arc<RunControl>,
    hook: Option<Arc<dyn ThreadHook>>,
    stage: Mutex<Stage>,
}

enum Stage {
    /// The machine has not been started. The work is that of the first image, if it is not raw.
    Prepared(Option<Arc<ImageWork>>),
    /// The machine runs.
    Started(Option<(Arc<ImageWork>, JoinHandle<()>)>),
    /// The machine has ended.
    Ended,
}

impl ImageThread {
    /// Prepares a thread called `name` that does `role`, with the work of the first image if it is not raw.
    pub(crate) fn new(
        name: String,
        role: ThreadRole,
        control: Arc<RunControl>,
        hook: Option<Arc<dyn ThreadHook>>,
        work: Option<Arc<ImageWork>>,
    ) -> ImageThread {
        ImageThread {
            name,
            role,
            control,
            hook,
            stage: Mutex::new(Stage::Prepared(work)),
        }
    }

    /// Starts the thread if the first image is not raw.
    ///
    /// # Errors
    /// If the host is out of threads, or the hook refuses.
    pub(crate) fn start(&self) -> Result<(), Error> {
        let mut stage = lock(&self.stage);
        if let Stage::Prepared(work) = &mut *stage {
            let thread = work.take().map(|work| self.spawn(work)).transpose()?;
            *stage = Stage::Started(thread);
        }
        Ok(())
    }

    /// Starts the thread with `work`, the first of the disk while the machine runs.
    ///
    /// # Errors
    /// If the host is out of threads, the hook refuses, or the machine has ended.
    pub(crate) fn start_with(&self, work: Arc<ImageWork>) -> io::Result<()> {
        let mut stage = lock(&self.stage);
        let Stage::Started(thread @ None) = &mut *stage else {
            return Err(io::Error::other("the machine does not run"));
        };
        match self.spawn(work) {
            Ok(spawned) => {
                *thread = Some(spawned);
                Ok(())
            }
            Err(Error::Thread { source, .. }) => Err(source),
            Err(error) => Err(io::Error::other(error)),
        }
    }

    fn spawn(&self, work: Arc<ImageWork>) -> Result<(Arc<ImageWork>, JoinHandle<()>), Error> {
        let (control, own_work) = (self.control.clone(), work.clone());
        let thread = threads::spawn(&self.name, &self.role, self.hook.as_ref(), move || {
            let _end_on_panic = EndOnPanic(control);
            own_work.run();
        })?;
        Ok((work, thread))
    }

    /// Ends the thread. Its disk has no request under way any more.
    pub(crate) fn end(&self) {
        let stage = std::mem::replace(&mut *lock(&self.stage), Stage::Ended);
        if let Stage::Started(Some((work, thread))) = stage {
            work.end();
            if thread.join().is_err() {
                tracing::error!("the thread of a disk panicked");
            }
        }
    }
}

impl Drop for ImageThread {
    fn drop(&mut self) {
        self.end();
    }
}
