//! The image that a command writes.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use bantam_storage::tools::{
    CopyOptions, Created, Format, Job, Opened, ToolError, copy, create, open_target,
};
use bantam_storage::{OptionError, Options, Target};

/// Reads the options of a format.
pub fn options(texts: &[String]) -> Result<Options, OptionError> {
    let mut options = Options::default();
    for text in texts {
        options.add(text)?;
    }
    Ok(options)
}

/// Makes sure that no source would be overwritten.
pub fn check_not_source(sources: &[Opened], target: &Path) -> anyhow::Result<()> {
    let Ok(target_file) = fs::metadata(target) else {
        return Ok(());
    };
    let is_target = |path: &&PathBuf| {
        let same =
            |file: fs::Metadata| (file.dev(), file.ino()) == (target_file.dev(), target_file.ino());
        fs::metadata(path).is_ok_and(same)
    };
    let mut files = sources.iter().flat_map(|source| &source.files);
    match files.find(is_target) {
        Some(_) => anyhow::bail!(
            "'{}' is a source too, and would be overwritten",
            target.display()
        ),
        None => Ok(()),
    }
}

/// A part of an image, to be copied.
pub struct Part<'a> {
    /// The image.
    pub source: &'a Opened,
    /// Where the part begins.
    pub start: u64,
    /// Where it ends.
    pub end: u64,
}

/// How parts are copied.
pub struct Copying {
    /// The fewest zeroes that are not written as data.
    pub sparse: Option<u64>,
    /// Whether the target is brought to stable storage.
    pub sync: bool,
    /// Whether what is written is compressed.
    pub compress: bool,
}

/// Copies parts to an image that is created, one after the other, and removes it again if that fails.
pub fn copy_to_new(
    parts: &[Part<'_>],
    path: &Path,
    format: Format,
    options: Options,
    how: &Copying,
    job: Job<'_>,
) -> anyhow::Result<()> {
    let size = parts.iter().map(|part| part.end - part.start).sum();
    let created = create(path, format, size, options, how.compress)?;
    let result = copy_all(parts, &*created.target, how, created.reads_as_zeroes, job);
    if result.is_err() {
        Created::remove(created);
    }
    Ok(result?)
}

/// Copies parts to an image that is there.
pub fn copy_to_old(
    parts: &[Part<'_>],
    path: &Path,
    format: Format,
    how: &Copying,
    is_zero: bool,
    job: Job<'_>,
) -> anyhow::Result<()> {
    let (opened, target) = open_target(path, format)?;
    let size: u64 = parts.iter().map(|part| part.end - part.start).sum();
    let target_size = opened.image.size();
    if target_size < size {
        anyhow::bail!(
            "'{}' has {target_size} bytes, fewer than the {size} of the source",
            path.display()
        );
    }
    Ok(copy_all(parts, &*target, how, is_zero, job)?)
}

fn copy_all(
    parts: &[Part<'_>],
    target: &dyn Target,
    how: &Copying,
    target_is_zero: bool,
    job: Job<'_>,
) -> Result<(), ToolError> {
    let total: u64 = parts.iter().map(|part| part.end - part.start).sum();
    let options = CopyOptions {
        sparse: how.sparse,
        target_is_zero,
        layers: None,
    };
    let mut done = 0;
    for part in parts {
        let length = part.end - part.start;
        let progress = |share: f64| {
            let share = (done as f64 + share * length as f64) / total.max(1) as f64;
            (job.progress)(share);
        };
        let job = Job {
            progress: &progress,
            cancelled: job.cancelled,
        };
        let image = &*part.source.image;
        copy(image, part.start..part.end, target, done, options, job)?;
        done += length;
    }
    let finished = target.finish(how.sync);
    finished.map_err(|error| ToolError::Write {
        offset: total,
        error,
    })
}
