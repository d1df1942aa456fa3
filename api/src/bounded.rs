//! Work on the host that may never end, such as opening a file on a server that does not answer.

use std::io;
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use bantam_serving::lock;

/// Holds something whose use may hang. A thread of its own uses it, and is waited for only for a limited
/// time. The thread holds the other reference while it works.
pub(crate) struct Bounded<T>(Arc<Mutex<T>>);

impl<T: Send + 'static> Bounded<T> {
    pub(crate) fn new(subject: T) -> Bounded<T> {
        Bounded(Arc::new(Mutex::new(subject)))
    }

    /// Runs `work` and returns its result. If that takes longer than `limit`, `work` goes on and its result
    /// is lost.
    ///
    /// # Errors
    /// If it takes too long, the host is out of threads, or `work` panics. Also at once while earlier work
    /// still goes on, so that there is at most one thread.
    pub(crate) fn run<R: Send + 'static>(
        &mut self,
        limit: Duration,
        work: impl FnOnce(&mut T) -> R + Send + 'static,
    ) -> io::Result<R> {
        if Arc::get_mut(&mut self.0).is_none() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let subject = self.0.clone();
        let (sender, receiver) = mpsc::sync_channel(1);
        thread::Builder::new()
            .name("bantam-api-file".into())
            .spawn(move || {
                // Even after a panic, the subject is released before the result arrives.
                let (sender, subject) = (sender, subject);
                let result = work(&mut lock(&subject));
                drop(subject);
                // This fails if the result is not waited for any more.
                let _ = sender.send(result);
            })?;
        receiver.recv_timeout(limit).map_err(|error| match error {
            mpsc::RecvTimeoutError::Timeout => io::ErrorKind::TimedOut.into(),
            mpsc::RecvTimeoutError::Disconnected => io::Error::other("the API has failed at it"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_that_hangs_is_given_up_and_is_not_begun_twice() {
        const LONG: Duration = Duration::from_secs(60);
        let mut bounded = Bounded::new(0);
        let (release, hung) = mpsc::channel::<()>();
        let error = bounded.run(Duration::from_millis(1), move |count| {
            *count += 1;
            hung.recv().unwrap();
        });
        assert_eq!(error.unwrap_err().kind(), io::ErrorKind::TimedOut);
        let error = bounded.run(LONG, |count| *count += 1).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);

        release.send(()).unwrap();
        let count = loop {
            match bounded.run(LONG, |count| *count) {
                Ok(count) => break count,
                Err(_) => thread::yield_now(),
            }
        };
        assert_eq!(count, 1);
        assert!(bounded.run(LONG, |count| assert_eq!(*count, 2)).is_err());
        assert_eq!(bounded.run(LONG, |count| *count).unwrap(), 1);
    }
}
