//! The thread of a disk whose image is not raw.

use std::sync::Arc;
use std::thread::JoinHandle;

use bantam_devices::virtio::block::ImageWork;

use crate::error::Error;
use crate::hooks::{ThreadHook, ThreadRole};
use crate::run_control::{EndOnPanic, RunControl};
use crate::threads;

/// Does the work of an image on a thread of its own once it has been started.
pub(crate) struct ImageThread {
    name: String,
    role: ThreadRole,
    work: Arc<ImageWork>,
    thread: Option<JoinHandle<()>>,
}

impl ImageThread {
    /// Prepares a thread called `name` that does `role`.
    pub(crate) fn new(name: String, role: ThreadRole, work: Arc<ImageWork>) -> ImageThread {
        ImageThread {
            name,
            role,
            work,
            thread: None,
        }
    }

    /// Starts the thread, on which `hook` is called first.
    ///
    /// # Errors
    /// If the host is out of threads, or the hook refuses.
    pub(crate) fn start(
        &mut self,
        control: &Arc<RunControl>,
        hook: Option<&Arc<dyn ThreadHook>>,
    ) -> Result<(), Error> {
        let (work, control) = (self.work.clone(), control.clone());
        let thread = threads::spawn(&self.name, &self.role, hook, move || {
            let _end_on_panic = EndOnPanic(control);
            work.run();
        })?;
        self.thread = Some(thread);
        Ok(())
    }

    /// Ends the thread. Its disk has no request under way any more.
    pub(crate) fn end(&mut self) {
        self.work.end();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread of a disk panicked");
        }
    }
}

impl Drop for ImageThread {
    fn drop(&mut self) {
        self.end();
    }
}
