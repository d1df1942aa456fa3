//! The log of the program.

use std::fmt;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, mpsc};
use std::thread;
use std::time::Duration;

use anstream::{AutoStream, ColorChoice};
use bantam_api::Fault;
use bantam_api::ProgramLog;
use bantam_api::bodies::logger::{LogLevel, Logger};
use bantam_manager::ProcessLog;
use bantam_vmm::text::without_error_numbers;
use nix::libc;
use tracing::level_filters::LevelFilter;
use tracing::subscriber::Interest;
use tracing::{Event, Metadata, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, MakeWriter};
use tracing_subscriber::layer::{Context, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

use crate::message::{Stderr, say};
use crate::outlet::Outlet;
use crate::{signals, stopping};

/// How long the end of the process may wait for a reader of the log.
const FLUSH_TIME: Duration = Duration::from_secs(1);

/// Logs lines up to `level` on standard error, in color if it is a terminal whose user wants that.
/// The same environment variables decide it as for the help.
pub fn to_stderr(level: LevelFilter) {
    tracing_subscriber::fmt()
        .with_writer(|| LineWriter(None))
        .with_ansi(AutoStream::choice(&io::stderr()) != ColorChoice::Never)
        .with_max_level(level)
        .with_target(false)
        .with_timer(tracing_subscriber::fmt::time::uptime())
        .log_internal_errors(false)
        .init();
}

/// Logs lines up to level `Info`, with the time of day, on the standard error of the process of a named machine. The
/// result is to be given to [`keep_small`] when the process has its threads.
pub fn of_process(log: ProcessLog) -> LargeLog {
    let log = Arc::new(log);
    let (is_large, large) = mpsc::sync_channel(1);
    let large = LargeLog {
        log: log.clone(),
        large,
    };
    tracing_subscriber::fmt()
        .with_writer(move || ProcessLogWriter {
            log: log.clone(),
            is_large: is_large.clone(),
        })
        .with_ansi(false)
        .with_max_level(LevelFilter::INFO)
        .with_target(false)
        .log_internal_errors(false)
        .init();
    large
}

/// Hears when the log of a named machine has become large.
pub struct LargeLog {
    log: Arc<ProcessLog>,
    large: mpsc::Receiver<()>,
}

/// Starts the thread that puts the log of a named machine aside when it is large. A thread that logs may not be allowed
/// to open files.
pub fn keep_small(large: LargeLog) -> io::Result<()> {
    let thread = thread::Builder::new().name("bantam-log-file".into());
    // The main thread reads signals, even if it has not begun to yet.
    signals::while_blocked(|| {
        thread.spawn(move || large.large.iter().for_each(|()| large.log.renew()))
    })?
    .map(drop)
}

/// Writes lines to the log of a named machine.
struct ProcessLogWriter {
    log: Arc<ProcessLog>,
    is_large: mpsc::SyncSender<()>,
}

impl Write for ProcessLogWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = LineWriter(None).write(bytes)?;
        if self.log.wrote(written) {
            // It is full if the thread has been told already.
            let _ = self.is_large.try_send(());
        }
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Logs lines of the instance called `id` in Firecracker's format: up to level `Info` on standard
/// error, until a client changes that.
pub fn adjustable(id: &str) -> AdjustableLog {
    let log = AdjustableLog(Arc::new(RwLock::new(Settings {
        id: id.to_string(),
        level: LevelFilter::INFO,
        shows_level: false,
        shows_origin: false,
        module: None,
        file: None,
    })));
    let lines = tracing_subscriber::fmt::layer()
        .event_format(log.clone())
        .with_writer(log.clone())
        .with_ansi(false)
        .log_internal_errors(false);
    tracing_subscriber::registry()
        .with(lines)
        .with(log.clone())
        .init();
    log
}

/// A log that can be configured while the program runs. Clones are handles to the same log.
#[derive(Clone)]
pub struct AdjustableLog(Arc<RwLock<Settings>>);

struct Settings {
    id: String,
    level: LevelFilter,
    shows_level: bool,
    shows_origin: bool,
    module: Option<String>,
    /// Destination of the lines, if not standard error.
    file: Option<Arc<Outlet>>,
}

impl AdjustableLog {
    fn settings(&self) -> RwLockReadGuard<'_, Settings> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the lines for a file are written, for a short time at most.
    pub fn flush(&self) {
        let file = self.settings().file.clone();
        if let Some(file) = file {
            file.flush(stopping::time_left(FLUSH_TIME));
        }
    }
}

impl ProgramLog for AdjustableLog {
    fn set(&mut self, logger: &Logger) -> Result<(), Fault> {
        let open = |path: &PathBuf| {
            let file = OpenOptions::new()
                // Also for reading: otherwise a named pipe without a reader could not be opened.
                .read(true)
                .append(true)
                .create(true)
                .custom_flags(libc::O_NONBLOCK)
                .open(path)?;
            let shown = path.display().to_string();
            Outlet::start("bantam-log", file, move |errno| {
                let reason = errno.desc();
                say(format_args!(
                    "warning: cannot write the log to '{shown}': {reason}; lines are lost until it can be \
                     written"
                ));
            })
        };
        let file = match &logger.log_path {
            Some(path) => Some(open(path).map_err(|error| Fault::File {
                what: "log file",
                path: path.display().to_string(),
                reason: error.to_string(),
            })?),
            None => None,
        };
        let mut settings = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = file {
            settings.file = Some(Arc::new(file));
        }
        if let Some(level) = logger.level {
            settings.level = match level {
                LogLevel::Off => LevelFilter::OFF,
                LogLevel::Error => LevelFilter::ERROR,
                LogLevel::Warning => LevelFilter::WARN,
                LogLevel::Info => LevelFilter::INFO,
                LogLevel::Debug => LevelFilter::DEBUG,
                LogLevel::Trace => LevelFilter::TRACE,
            };
        }
        settings.shows_level = logger.show_level.unwrap_or(settings.shows_level);
        settings.shows_origin = logger.show_log_origin.unwrap_or(settings.shows_origin);
        if let Some(module) = &logger.module {
            settings.module = Some(module.clone());
        }
        drop(settings);
        // Lines that are not logged cost nothing, as each place in the code caches whether it is
        // enabled.
        tracing::callsite::rebuild_interest_cache();
        Ok(())
    }
}

impl<S: Subscriber> Layer<S> for AdjustableLog {
    fn register_callsite(&self, _: &'static Metadata<'static>) -> Interest {
        Interest::sometimes()
    }

    fn enabled(&self, metadata: &Metadata<'_>, _: Context<'_, S>) -> bool {
        let settings = self.settings();
        let module = metadata.module_path().unwrap_or_default();
        let is_wanted = |wanted: &String| module.starts_with(wanted.as_str());
        *metadata.level() <= settings.level && settings.module.as_ref().is_none_or(is_wanted)
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(self.settings().level)
    }
}

/// The format of Firecracker: `time [instance:thread:level:file:line] message`.
impl<S, N> FormatEvent<S, N> for AdjustableLog
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        SystemTime.format_time(&mut writer)?;
        let metadata = event.metadata();
        let settings = self.settings();
        let thread = thread::current();
        let thread = thread.name().unwrap_or("-");
        write!(writer, " [{}:{thread}", settings.id)?;
        if settings.shows_level {
            write!(writer, ":{}", metadata.level())?;
        }
        if settings.shows_origin {
            let (file, line) = (metadata.file(), metadata.line());
            write!(writer, ":{}:{}", file.unwrap_or("-"), line.unwrap_or(0))?;
        }
        write!(writer, "] ")?;
        context.format_fields(writer.by_ref(), event)?;
        writeln!(writer)
    }
}

impl<'a> MakeWriter<'a> for AdjustableLog {
    type Writer = LineWriter;

    fn make_writer(&'a self) -> LineWriter {
        LineWriter(self.settings().file.clone())
    }
}

/// Passes a line on to a file, or to standard error. Operating system errors are printed in words,
/// as everywhere else.
pub struct LineWriter(Option<Arc<Outlet>>);

impl Write for LineWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let line = without_error_numbers(String::from_utf8_lossy(bytes).into_owned());
        match &self.0 {
            Some(file) => file.push(line.as_bytes()),
            None => Stderr.write_all(line.as_bytes())?,
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
