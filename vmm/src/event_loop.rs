//! The threads on which the machine's devices do their work.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use bantam_devices::EventLoop;
use bantam_devices::activity::{Activity, Watched};
use bantam_devices::event_loop::Subscriber;
use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};

use crate::error::Error;
use crate::hooks::{ThreadHook, ThreadRole};
use crate::run_control::{EndOnPanic, RunControl};
use crate::threads;

/// An event loop of devices, which runs on a thread of its own once it has been started.
pub(crate) struct DeviceLoop {
    name: String,
    role: ThreadRole,
    handle: EventLoop,
    ending: Arc<AtomicBool>,
    stage: Stage,
}

enum Stage {
    /// The thread does not run yet, so subscribers can be added directly.
    Prepared(EventManager<Subscriber>),
    Running(JoinHandle<()>),
    Ended,
}

impl DeviceLoop {
    /// Creates a loop for a thread called `name` that does `role`.
    ///
    /// # Errors
    /// If the host is out of file descriptors.
    pub(crate) fn new(name: String, role: ThreadRole) -> Result<DeviceLoop, Error> {
        let manager = EventManager::new().map_err(|error| match error {
            event_manager::Error::Epoll(errno) => {
                Error::resource("an event loop")(io::Error::from_raw_os_error(errno.errno()))
            }
            other => other.into(),
        })?;
        Ok(DeviceLoop {
            name,
            role,
            handle: EventLoop::of(&manager),
            ending: Arc::new(AtomicBool::new(false)),
            stage: Stage::Prepared(manager),
        })
    }

    /// Returns a handle by which devices give the loop their workers once it runs.
    pub(crate) fn handle(&self) -> &EventLoop {
        &self.handle
    }

    /// Adds a part to a loop that has not been started. The part stays for as long as the loop runs, and
    /// `activity` shows when the thread works for it.
    pub(crate) fn add(&mut self, part: Box<dyn MutEventSubscriber + Send>, activity: Activity) {
        if let Stage::Prepared(manager) = &mut self.stage {
            let part = Watched::new(part, activity);
            manager.add_subscriber(Subscriber::Resident(Box::new(part)));
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
        let Stage::Prepared(mut manager) = std::mem::replace(&mut self.stage, Stage::Ended) else {
            return Ok(());
        };
        let (ending, control) = (self.ending.clone(), control.clone());
        let thread = threads::spawn(&self.name, &self.role, hook, move || {
            let _end_on_panic = EndOnPanic(control.clone());
            while !ending.load(Ordering::SeqCst) {
                if let Err(error) = manager.run() {
                    control.finish(Err(error.into()));
                    return;
                }
            }
            // Takes workers that have just been handed to the loop, and then finishes what the guest asked
            // for before it switched itself off.
            for _ in 0..2 {
                let _ = manager.run_with_timeout(0);
            }
        })?;
        self.stage = Stage::Running(thread);
        Ok(())
    }

    /// Ends the loop and drops all workers, which finish what they have begun.
    pub(crate) fn end(&mut self) {
        let Stage::Running(thread) = std::mem::replace(&mut self.stage, Stage::Ended) else {
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

impl Drop for DeviceLoop {
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
    use crate::events::EventSender;

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
        let control = Arc::new(RunControl::new(EventSender::default()).unwrap());
        for _ in 0..100 {
            let mut event_loop = DeviceLoop::new("test".to_owned(), ThreadRole::Devices).unwrap();
            let doorbell = EventFd::new(EFD_NONBLOCK).unwrap();
            let served = Arc::new(AtomicUsize::new(0));
            let device = Device {
                doorbell: doorbell.try_clone().unwrap(),
                served: served.clone(),
            };
            event_loop.add(Box::new(device), Activity::default());
            event_loop.start(&control, None).unwrap();
            doorbell.write(1).unwrap();
            event_loop.end();
            assert_eq!(served.load(Ordering::SeqCst), 1);
        }
    }
}
