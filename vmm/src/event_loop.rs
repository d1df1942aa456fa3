//! The threads on which the machine's devices do their work.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use bantam_devices::EventLoop;
use bantam_devices::event_loop::Subscriber;
use event_manager::EventManager;

use crate::error::Error;
use crate::run_control::{EndOnPanic, RunControl};

/// A thread that does the work of devices.
pub(crate) struct EventLoopThread {
    pub(crate) handle: EventLoop,
    ending: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl EventLoopThread {
    /// Starts a loop on a thread called `name`.
    pub(crate) fn start(name: &str, control: Arc<RunControl>) -> Result<EventLoopThread, Error> {
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
                    // What a guest has asked for before it switched itself off is done.
                    let _ = manager.run_with_timeout(0);
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    use super::*;

    struct Device {
        doorbell: EventFd,
        served: Arc<AtomicUsize>,
    }

    impl MutEventSubscriber for Device {
        fn init(&mut self, operations: &mut EventOps<'_>) {
            let events = Events::new(&self.doorbell, EventSet::IN);
            operations.add(events).unwrap();
        }

        fn process(&mut self, _events: Events, _operations: &mut EventOps<'_>) {
            self.doorbell.read().unwrap();
            self.served.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn what_was_asked_for_before_the_end_is_done() {
        let control = Arc::new(RunControl::new().unwrap());
        for _ in 0..100 {
            let mut event_loop = EventLoopThread::start("test", control.clone()).unwrap();
            let doorbell = EventFd::new(EFD_NONBLOCK).unwrap();
            let served = Arc::new(AtomicUsize::new(0));
            let device = Device {
                doorbell: doorbell.try_clone().unwrap(),
                served: served.clone(),
            };
            event_loop.handle.add(Box::new(device)).unwrap();
            doorbell.write(1).unwrap();
            event_loop.end();
            assert_eq!(served.load(Ordering::SeqCst), 1);
        }
    }
}
