//! Network namespaces.

use std::fs::File;
use std::io;
use std::thread;

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};

use crate::config::Namespace;
use crate::error::Error;

/// Calls `open` in a network namespace. What it opens belongs to that namespace for good; the calling thread does not
/// enter it.
///
/// # Errors
/// If there is no such namespace, this user may not enter it, and those of `open`.
pub(super) fn inside<T: Send>(
    namespace: &Namespace,
    open: impl FnOnce() -> Result<T, Error> + Send,
) -> Result<T, Error> {
    let path = namespace.path();
    let error = |source: io::Error| Error::Namespace {
        remedy: match source.raw_os_error().map(Errno::from_raw) {
            Some(Errno::ENOENT) => "; 'ip netns' lists those with names",
            Some(Errno::EPERM | Errno::EACCES) => "; run as root",
            Some(Errno::EINVAL) => ": it is not a network namespace",
            _ => "",
        },
        path: path.clone(),
        source,
    };
    let file = File::open(&path).map_err(error)?;
    // A thread of its own, as this one may not be able to go back.
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("bantam-netns".to_owned());
        let thread = thread.spawn_scoped(scope, || {
            setns(&file, CloneFlags::CLONE_NEWNET).map_err(|errno| error(errno.into()))?;
            open()
        });
        let thread = thread.map_err(Error::resource("a thread"))?;
        match thread.join() {
            Ok(opened) => opened,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}
