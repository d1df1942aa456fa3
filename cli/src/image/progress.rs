//! How far a command is, as qemu-img shows it.

use std::io::{self, Write};
use std::sync::{Mutex, PoisonError};

/// A line with a percentage, which is written again whenever that has grown by one.
#[derive(Debug)]
pub struct Progress {
    /// The percentage that is shown. `None` if nothing is shown at all.
    shown: Option<Mutex<f64>>,
}

impl Progress {
    /// Shows 0 percent, if it is `enabled`.
    pub fn new(enabled: bool) -> Progress {
        if enabled {
            show(0.0);
        }
        Progress {
            shown: enabled.then(|| Mutex::new(0.0)),
        }
    }

    /// Shows that a share, from 0 to 1, is done.
    pub fn set(&self, share: f64) {
        if let Some(shown) = &self.shown {
            let mut shown = shown.lock().unwrap_or_else(PoisonError::into_inner);
            let percent = share * 100.0;
            if percent >= *shown + 1.0 || (percent >= 100.0 && *shown < 100.0) {
                *shown = percent;
                show(percent);
            }
        }
    }
}

impl Drop for Progress {
    /// Ends the line.
    fn drop(&mut self) {
        if self.shown.is_some() {
            // The result of the command counts, not who watches it.
            let _ = writeln!(io::stdout());
        }
    }
}

fn show(percent: f64) {
    let mut output = io::stdout().lock();
    let _ = write!(output, "    ({percent:.2}/100%)\r");
    let _ = output.flush();
}
