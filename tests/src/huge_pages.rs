//! Huge pages of the host, set aside while a test uses them.

use std::fs;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

const COUNT: &str = "/proc/sys/vm/nr_hugepages";

/// Pages of 2 MiB that the host has set aside in addition to those it had. Dropping this gives them
/// back. Only one pool exists at a time: others wait.
pub struct HugePagePool {
    before: u64,
    _alone: MutexGuard<'static, ()>,
}

static ALONE: Mutex<()> = Mutex::new(());

impl HugePagePool {
    /// Sets `count` more pages aside.
    ///
    /// # Errors
    ///
    /// Why the host sets none aside.
    pub fn try_new(count: u64) -> Result<HugePagePool, String> {
        let failed = |error: io::Error| format!("cannot use {COUNT}: {error}");
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let before = read_count().map_err(failed)?;
        let pool = HugePagePool {
            before,
            _alone: alone,
        };
        let wanted = before + count;
        fs::write(COUNT, wanted.to_string()).map_err(failed)?;
        match read_count().map_err(failed)? {
            found if found >= wanted => Ok(pool),
            found => Err(format!(
                "the host has only {} huge pages left",
                found - before
            )),
        }
    }

    /// Sets `count` more pages aside, in a test that has made sure that the host can.
    ///
    /// # Panics
    ///
    /// If it cannot.
    pub fn new(count: u64) -> HugePagePool {
        HugePagePool::try_new(count).unwrap_or_else(|reason| panic!("{reason}"))
    }
}

impl Drop for HugePagePool {
    fn drop(&mut self) {
        if let Err(error) = fs::write(COUNT, self.before.to_string()) {
            eprintln!("cannot give huge pages back: {error}");
        }
    }
}

fn read_count() -> io::Result<u64> {
    let text = fs::read_to_string(COUNT)?;
    text.trim().parse().map_err(io::Error::other)
}
