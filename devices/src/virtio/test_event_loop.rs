//! An event loop on a thread of its own, for tests.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use event_manager::EventManager;

use crate::EventLoop;
use crate::event_loop::Subscriber;

/// An event loop that runs until this is dropped.
pub struct TestEventLoop {
    pub handle: EventLoop,
    ending: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl TestEventLoop {
    pub fn start() -> TestEventLoop {
        let mut manager: EventManager<Subscriber> = EventManager::new().unwrap();
        let handle = EventLoop::of(&manager);
        let ending = Arc::new(AtomicBool::new(false));
        let thread = std::thread::spawn({
            let ending = ending.clone();
            move || {
                while !ending.load(Ordering::SeqCst) {
                    manager.run().unwrap();
                }
            }
        });
        TestEventLoop {
            handle,
            ending,
            thread: Some(thread),
        }
    }
}

impl Drop for TestEventLoop {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::SeqCst);
        self.handle.wake().unwrap();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}
