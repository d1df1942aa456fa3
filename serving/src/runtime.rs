//! The threads of a server.

use std::io;
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};

/// How long a thread for work waits for more before it ends.
const WORK_THREAD_TIME: Duration = Duration::from_secs(1);

/// Makes the runtime of a server. All clients are served on the thread that blocks on it. Work that may take
/// long is done by at most `work_threads` more, which have the name `work_name` and end a second after the last
/// work.
///
/// # Errors
/// If the host is out of descriptors.
pub fn runtime(work_name: &str, work_threads: usize) -> io::Result<Runtime> {
    Builder::new_current_thread()
        .enable_all()
        .thread_name(work_name)
        .max_blocking_threads(work_threads)
        .thread_keep_alive(WORK_THREAD_TIME)
        .build()
}
