//! The image that a command writes.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use bantam_storage::qcow2::MAX_DEPTH;
use bantam_storage::tools::{
    CopyOptions, Created, Format, Job, NewContent, Opened, Purpose, ToolError, copy, create, open,
    open_target,
};
use bantam_storage::{OptionError, Options, Target};

/// What is missing on a command line that has options of a format.
pub const NO_FILE: &str = "give the name of the image";

/// Whether options of a format ask for a list of them.
pub fn asks_for_help(texts: &[String]) -> bool {
    texts.iter().any(|text| Options::asks_for_help(text))
}

/// Reads the options of a format.
pub fn options(texts: &[String]) -> Result<Options, OptionError> {
    let mut options = Options::default();
    for text in texts {
        options.add(text)?;
    }
    Ok(options)
}

/// Names the backing file in the options of an image.
pub fn set_backing(options: &mut Options, backing: Option<&str>, format: Option<Format>) {
    if let (Some(backing), Some(format)) = (backing, format) {
        options.set("backing_file", backing);
        options.set("backing_fmt", &format.to_string());
    }
}

/// Opens the backing file that the options of the image `path` name. A relative name is relative to its folder.
pub fn open_backing(path: &Path, options: &Options) -> anyhow::Result<Option<Opened>> {
    let Some(backing) = options.get("backing_file") else {
        return Ok(None);
    };
    let format = options.get("backing_fmt");
    let format = format.context("give the format of the backing file: -F")?;
    let folder = path.parent().unwrap_or(Path::new(""));
    let opened = open(&folder.join(backing), Some(format.parse()?), Purpose::Read)?;
    check_depth(&opened)?;
    Ok(Some(opened))
}

/// Makes sure that an image over `backing` can be opened.
pub fn check_depth(backing: &Opened) -> anyhow::Result<()> {
    anyhow::ensure!(
        backing.files.len() < MAX_DEPTH,
        "the backing file has {} files below it, and a chain has {MAX_DEPTH} at most; merge some by commit or rebase",
        backing.files.len() - 1
    );
    Ok(())
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
    let backing = open_backing(path, &options)?;
    let has_backing = backing.is_some();
    let content = NewContent {
        compress: how.compress,
        backing: backing.map(|backing| backing.image),
    };
    let created = create(path, format, size, options, content)?;
    let copying = CopyOptions {
        sparse: how.sparse,
        target_is_zero: created.reads_as_zeroes,
        // What the images below the source have, the backing file has too.
        layers: has_backing.then_some(1),
    };
    let result = copy_all(parts, &*created.target, how, copying, job);
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
    let copying = CopyOptions {
        sparse: how.sparse,
        target_is_zero: is_zero,
        layers: None,
    };
    Ok(copy_all(parts, &*target, how, copying, job)?)
}

fn copy_all(
    parts: &[Part<'_>],
    target: &dyn Target,
    how: &Copying,
    options: CopyOptions,
    job: Job<'_>,
) -> Result<(), ToolError> {
    let total: u64 = parts.iter().map(|part| part.end - part.start).sum();
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
