//! Shows how far a migration is, in a line on the terminal that is written again and again.

use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use bantam_vmm::{Answer, Command, MigrationProgress};

use crate::control::connect;

/// The time between two looks.
const INTERVAL: Duration = Duration::from_millis(200);
/// Returns to the beginning of the line, and erases it.
const ERASE: &str = "\r\x1b[K";

/// The line, which is erased when this is dropped.
pub struct ProgressLine {
    /// Dropped to end the thread.
    end: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl ProgressLine {
    /// Shows how far the migration of `machine` is, if standard error is a terminal.
    pub fn show(machine: &Path) -> Option<ProgressLine> {
        if !io::stderr().is_terminal() {
            return None;
        }
        let (end, ended) = mpsc::channel();
        let machine: PathBuf = machine.to_path_buf();
        let thread = thread::Builder::new()
            .name("progress".into())
            .spawn(move || {
                while ended.recv_timeout(INTERVAL) == Err(RecvTimeoutError::Timeout) {
                    // The command itself reports what is wrong.
                    let Ok(Some(progress)) = ask(&machine) else {
                        continue;
                    };
                    let _ = write!(io::stderr(), "{ERASE}{}", describe(&progress));
                }
                let _ = write!(io::stderr(), "{ERASE}");
            });
        Some(ProgressLine {
            end: Some(end),
            thread: thread.ok(),
        })
    }
}

impl Drop for ProgressLine {
    fn drop(&mut self) {
        self.end = None;
        if let Some(thread) = self.thread.take() {
            // A panic of it has been reported.
            let _ = thread.join();
        }
    }
}

/// Asks how far the migration of `machine` is; `None` if there is none.
pub fn ask(machine: &Path) -> anyhow::Result<Option<MigrationProgress>> {
    match connect(machine)?.execute(Command::MigrationProgress)? {
        Answer::MigrationProgress(progress) => Ok(progress),
        _ => anyhow::bail!("the machine does not say how far the migration is"),
    }
}

/// Describes how far a migration is, in one line.
pub fn describe(progress: &MigrationProgress) -> String {
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    if progress.rounds == 0 {
        return "the other end checks whether it can run the machine".to_owned();
    }
    let downtime = progress.expected_downtime.map_or_else(String::new, |it| {
        let ms = it.as_secs_f64() * 1000.0;
        format!(", it would stand still for {ms:.0} ms")
    });
    let throttle = match progress.throttle {
        0 => String::new(),
        share => format!(", slowed down by {share} %"),
    };
    format!(
        "round {}: {:.1} MiB sent in {:.1} s, {:.1} MiB/s, {:.1} MiB left{downtime}{throttle}",
        progress.rounds,
        mib(progress.sent),
        progress.time.as_secs_f64(),
        mib(progress.rate),
        mib(progress.remaining),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_one_line() {
        let mut progress = MigrationProgress::default();
        assert!(describe(&progress).contains("checks whether"));
        progress = MigrationProgress {
            time: Duration::from_millis(1500),
            rounds: 2,
            sent: 3 << 20,
            rate: 2 << 20,
            remaining: 1 << 19,
            expected_downtime: None,
            throttle: 0,
        };
        assert_eq!(
            describe(&progress),
            "round 2: 3.0 MiB sent in 1.5 s, 2.0 MiB/s, 0.5 MiB left"
        );
        progress.expected_downtime = Some(Duration::from_millis(70));
        assert!(describe(&progress).ends_with("left, it would stand still for 70 ms"));
        progress.throttle = 30;
        assert!(describe(&progress).ends_with("70 ms, slowed down by 30 %"));
    }
}
