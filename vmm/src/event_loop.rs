//! The threads on which the machine's devices do their work.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use bantam_devices::EventLoop;
use bantam_devices::event_loop::Subscriber;
use event_manager::EventManager;

use crate::control::{Control, EndOnPanic};
use crate::error::Error;

/// A thread that does the work of devices.
pub(crate) struct EventLoopThread {
    pub(crate) handle: EventLoop,
    ending: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl EventLoopThread {
    /// Starts a loop on a thread called `name`.
    pub(crate) fn start(name: &str, control: Arc<Control>) -> Result<EventLoopThread, Error> {
        let mut manager: EventManager<Subscriber> = EventManager::new()?;
        let handle = EventLoop::of(&manager);
        let ending = Arc::new(AtomicBool::new(false));
        let thread = thread::Builder::new()
            .name(name.to_string())
            .spawn({
                let ending = ending.clone();
                move || {
                    let _end_on_panic = EndOnPanic(control.clone());
                    while !ending.load(Ordering::SeqCst) {
                        if let Err(error) = manager.run() {
                            control.finish(Err(error.into()));
                            return;
                        }
                    }
                }
            })
            .map_err(Error::resource("a thread of the devices"))?;
        Ok(EventLoopThread {
            handle,
            ending,
            thread: Some(thread),
        })
    }

    /// Ends the loop. All workers are dropped, and finish what they have begun as they are.
    pub(crate) fn end(&mut self) {
        let Some(thread) = self.thread.take() else {
            return;
        };
        self.ending.store(true, Ordering::SeqCst);
        if let Err(error) = self.handle.wake() {
            tracing::error!("cannot end the device event loop: {error}");
            return;
        }
        if thread.join().is_err() {
            tracing::error!("a thread of the devices panicked");
        }
    }
}

impl Drop for EventLoopThread {
    fn drop(&mut self) {
        self.end();
    }
}
