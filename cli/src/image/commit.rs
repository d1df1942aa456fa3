//! `bantam image commit`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use anyhow::Context;
use bantam_storage::job::{CommitJob, CopyJob, JobError, JobState};
use bantam_storage::tools::{Format, ToolError, probe};
use bantam_storage::{
    Disk, DiskError, DiskLayer, DiskOptions, HostFile, HostOpener, ImageFormat, LockMode,
};

use super::args::CommitArgs;
use super::interrupt::cancel_on_signal;
use super::output::print;
use super::progress::Progress;

/// How often a copy is looked at.
const INTERVAL: Duration = Duration::from_millis(20);

/// Copies what an image holds into one of its backing files.
pub fn commit(args: &CommitArgs) -> anyhow::Result<()> {
    let cancelled = cancel_on_signal()?;
    let name = args.file.display();
    let format = match args.format {
        Some(format) => format,
        None => probe_path(&args.file).with_context(|| format!("cannot open '{name}'"))?,
    };
    anyhow::ensure!(
        format == Format::Qcow2,
        "'{name}' has no backing file: it is {format}"
    );
    let options = DiskOptions {
        format: Some(ImageFormat::Qcow2),
        backing: true,
        lock: LockMode::WherePossible,
        any_size: true,
        ..DiskOptions::default()
    };
    let disk = Disk::open_by(&HostOpener, &args.file, &options).map_err(without_hint)?;
    let disk = disk.to_formatted(&HostOpener)?;
    let layers = disk.layers();
    anyhow::ensure!(layers.len() > 1, "'{name}' has no backing file");
    let depth = match &args.base {
        None => 1,
        Some(base) => find(layers, base).with_context(|| {
            format!(
                "'{}' is not among the backing files of '{name}'",
                base.display()
            )
        })?,
    };
    let job = CommitJob::open(&HostOpener, &disk, depth).map_err(|error| match error {
        JobError::Disk(error) => without_hint(error),
        error => error.into(),
    })?;
    let progress = Progress::new(args.progress && !args.quiet);
    let copied = copy(job.copy(), &progress, || cancelled.load(Ordering::Relaxed));
    drop(progress);
    copied.with_context(|| format!("cannot commit '{name}'"))?;
    // Only now does nothing need what the image holds.
    if args.base.is_none() && !args.keep {
        disk.empty()
            .with_context(|| format!("cannot empty '{name}'"))?;
    }
    match args.quiet {
        true => Ok(()),
        false => print("Image committed.\n"),
    }
}

/// Copies, until the copy is on stable storage.
fn copy(job: &CopyJob, progress: &Progress, is_cancelled: impl Fn() -> bool) -> anyhow::Result<()> {
    let state = thread::scope(|scope| {
        let watcher = thread::current();
        let copying = scope.spawn(move || {
            let state = job.run();
            watcher.unpark();
            state
        });
        while !copying.is_finished() {
            if is_cancelled() {
                job.control().cancel();
            }
            let now = job.control().progress();
            progress.set(now.done as f64 / now.total.max(1) as f64);
            thread::park_timeout(INTERVAL);
        }
        copying
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    });
    match state {
        JobState::Cancelled => return Err(ToolError::Cancelled.into()),
        JobState::Failed(reason) => anyhow::bail!(reason),
        JobState::Copying | JobState::Ready => {}
    }
    progress.set(1.0);
    job.begin_switch().context("cannot write the backing file")
}

/// Says why an image cannot be opened, without what helps if it is the disk of a machine.
fn without_hint(error: DiskError) -> anyhow::Error {
    match error {
        DiskError::Open { path, source, .. } => {
            anyhow::anyhow!("cannot open '{}': {source}", path.display())
        }
        DiskError::InUse { path } => anyhow::anyhow!(
            "cannot open '{}': another program or machine uses it",
            path.display()
        ),
        error => error.into(),
    }
}

fn probe_path(path: &Path) -> io::Result<Format> {
    probe(&HostFile::new(fs::File::open(path)?))
}

/// Finds a layer by its path, which is relative to the folder of the image that has it as its backing file.
fn find(layers: &[DiskLayer], wanted: &Path) -> Option<usize> {
    let same = |path: PathBuf, layer: &DiskLayer| {
        path == layer.path
            || matches!(
                (fs::canonicalize(path), fs::canonicalize(&layer.path)),
                (Ok(path), Ok(layer)) if path == layer
            )
    };
    (1..layers.len()).find(|&number| {
        let folder = layers[number - 1].path.parent();
        let path = folder.unwrap_or(Path::new("")).join(wanted);
        same(path, &layers[number])
    })
}
