//! Writes the metrics file: what the machine and the API have counted, a line of JSON each minute.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::fcntl::OFlag;
use serde_json::{Map, Value, json};

use crate::latencies;

/// Names of values that are states, not totals, or of groups of such values; they are written as they are.
const NOT_TOTALS: [&str; 5] = [
    latencies::GROUP,
    "min_us",
    "max_us",
    "process_startup_time_us",
    "process_startup_time_cpu_us",
];

/// How long the writing of a line is waited for.
const WRITE_TIME: Duration = Duration::from_secs(1);

/// Writes metrics to a file or named pipe, on a thread of its own because a file system may hang.
#[derive(Debug)]
pub struct MetricsFile {
    totals: Sender<Value>,
    results: Receiver<io::Result<()>>,
    /// Whether the thread still writes a line that is not waited for any more.
    is_busy: bool,
}

impl MetricsFile {
    /// Opens `path`, to which lines are appended. A named pipe does not need a reader yet.
    ///
    /// # Errors
    /// If it cannot be opened, or the host is out of threads.
    pub fn open(path: &Path) -> io::Result<MetricsFile> {
        let file = OpenOptions::new()
            // Also for reading, because a pipe without a reader is otherwise refused.
            .read(true)
            .append(true)
            .create(true)
            .custom_flags(OFlag::O_NONBLOCK.bits())
            .open(path)?;
        MetricsFile::start(file)
    }

    fn start(file: impl Write + Send + 'static) -> io::Result<MetricsFile> {
        let (totals, received) = mpsc::channel();
        let (sender, results) = mpsc::channel();
        let mut lines = Lines {
            file,
            unwritten: Vec::new(),
            written: Value::Null,
        };
        thread::Builder::new()
            .name("bantam-metrics".into())
            .spawn(move || {
                for totals in received {
                    if sender.send(lines.write(totals)).is_err() {
                        return;
                    }
                }
            })?;
        Ok(MetricsFile {
            totals,
            results,
            is_busy: false,
        })
    }

    /// Writes a line that says by how much each of `totals` has grown since the last line.
    ///
    /// # Errors
    /// If it cannot be written in time, or not at all, such as to a full pipe. The next line then includes
    /// the growth that this one would have had.
    pub fn write(&mut self, totals: Value) -> io::Result<()> {
        if self.is_busy {
            match self.results.try_recv() {
                Ok(_) => self.is_busy = false,
                Err(_) => return Err(io::ErrorKind::TimedOut.into()),
            }
        }
        let ended = |_| io::Error::other("the thread that writes has ended");
        self.totals.send(totals).map_err(|_| ended(()))?;
        match self.results.recv_timeout(WRITE_TIME) {
            Ok(result) => result,
            Err(RecvTimeoutError::Timeout) => {
                self.is_busy = true;
                Err(io::ErrorKind::TimedOut.into())
            }
            Err(RecvTimeoutError::Disconnected) => Err(ended(())),
        }
    }
}

/// Writes lines of metrics to `file`.
struct Lines<W> {
    file: W,
    /// The rest of a line whose beginning a pipe has taken.
    unwritten: Vec<u8>,
    /// The totals that were last written.
    written: Value,
}

impl<W: Write> Lines<W> {
    fn write(&mut self, totals: Value) -> io::Result<()> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let milliseconds = now.map_or(0, |time| time.as_millis() as u64);
        let mut line = Map::new();
        line.insert("utc_timestamp_ms".to_string(), json!(milliseconds));
        if let Value::Object(growth) = growth(&totals, &self.written) {
            line.extend(growth);
        }
        self.write_rest()?;
        let mut text = Value::Object(line).to_string();
        text.push('\n');
        let count = self.file.write(text.as_bytes())?;
        self.unwritten = text.into_bytes().split_off(count);
        self.written = totals;
        self.write_rest()
    }

    fn write_rest(&mut self) -> io::Result<()> {
        while !self.unwritten.is_empty() {
            let count = self.file.write(&self.unwritten)?;
            self.unwritten.drain(..count);
        }
        Ok(())
    }
}

fn growth(now: &Value, before: &Value) -> Value {
    match now {
        Value::Object(members) => {
            let growth_of = |(name, value): (&String, &Value)| {
                let before = match NOT_TOTALS.contains(&name.as_str()) {
                    true => &Value::Null,
                    false => before.get(name).unwrap_or(&Value::Null),
                };
                (name.clone(), growth(value, before))
            };
            Value::Object(members.iter().map(growth_of).collect())
        }
        Value::Array(items) => {
            let before = |index| before.get(index).unwrap_or(&Value::Null);
            let growth_of = |(index, value)| growth(value, before(index));
            Value::Array(items.iter().enumerate().map(growth_of).collect())
        }
        Value::Number(number) => match (number.as_u64(), before.as_u64()) {
            (Some(now), Some(before)) => json!(now.saturating_sub(before)),
            _ => now.clone(),
        },
        other => other.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_say_what_was_added_since_the_last() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics");
        let mut file = MetricsFile::open(&path).unwrap();
        for (count, most) in [(3, 7), (5, 9)] {
            let totals = json!({
                "block": {"read_count": count, "read_agg": {"max_us": most}},
                "vcpus": [{"exit_io_in": 1}, {"exit_io_in": count}],
            });
            file.write(totals).unwrap();
        }
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<Value> = text
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(lines.len(), 2);
        assert!(lines[0]["utc_timestamp_ms"].as_u64().unwrap() > 1_600_000_000_000);
        assert_eq!(lines[0]["block"]["read_count"], 3);
        assert_eq!(lines[1]["block"]["read_count"], 2);
        assert_eq!(lines[1]["block"]["read_agg"]["max_us"], 9);
        assert_eq!(lines[0]["vcpus"][1]["exit_io_in"], 3);
        assert_eq!(lines[1]["vcpus"][0]["exit_io_in"], 0);
        assert_eq!(lines[1]["vcpus"][1]["exit_io_in"], 2);
    }
    /// A file that takes a line only when it is told to.
    struct Hung(Receiver<()>, Sender<String>);

    impl Write for Hung {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.recv().map_err(io::Error::other)?;
            let line = String::from_utf8(bytes.to_vec()).unwrap();
            self.1.send(line).map_err(io::Error::other)?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_file_that_hangs_holds_up_nobody_for_long() {
        let (release, hung) = mpsc::channel();
        let (written, lines) = mpsc::channel();
        let mut file = MetricsFile::start(Hung(hung, written)).unwrap();
        for count in 1..=3 {
            let error = file.write(json!({"count": count})).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        }
        release.send(()).unwrap();
        let first: Value = serde_json::from_str(&lines.recv().unwrap()).unwrap();
        assert_eq!(first["count"], 1);

        // The other lines were lost, so the next line includes what they would have said.
        release.send(()).unwrap();
        while file.write(json!({"count": 7})).is_err() {}
        let next: Value = serde_json::from_str(&lines.recv().unwrap()).unwrap();
        assert_eq!(next["count"], 6);
    }
}
