//! `bantam image rebase`.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::Context;
use bantam_storage::qcow2::{BackingName, Qcow2};
use bantam_storage::tools::{
    Format, Job, Opened, Purpose, copy_differences, open, open_file_of_qcow2, probe,
};

use super::args::RebaseArgs;
use super::interrupt::cancel_on_signal;
use super::progress::Progress;
use super::purpose;
use super::target::check_depth;

/// Gives an image another backing file, or none.
pub fn rebase(args: &RebaseArgs) -> anyhow::Result<()> {
    let cancelled = cancel_on_signal()?;
    let name = args.file.display();
    let new = args.backing.as_deref().filter(|new| !new.is_empty());
    anyhow::ensure!(
        args.backing.is_some() || args.unsafe_mode,
        "give the backing file by -b, where \"\" stands for none"
    );
    let backing = new.map(|new| -> anyhow::Result<BackingName> {
        let format = args.backing_format;
        let format = format.context("give the format of the backing file: -F")?;
        Ok(BackingName {
            name: new.to_owned(),
            format: Some(format.to_string()),
        })
    });
    let backing = backing.transpose()?;
    let folder = args.file.parent().unwrap_or(Path::new(""));
    if let Some(new) = new {
        anyhow::ensure!(
            !is_same_file(&folder.join(new), &args.file),
            "cannot rebase '{name}': it cannot be its own backing file"
        );
    }
    let progress = Progress::new(args.progress && !args.quiet);
    let job = Job {
        progress: &|share| progress.set(share),
        cancelled,
    };
    let rebased = match args.unsafe_mode {
        true => rename(args, backing),
        false => copy_and_rename(args, backing, job),
    };
    if rebased.is_ok() {
        progress.set(1.0);
    }
    drop(progress);
    rebased.with_context(|| format!("cannot rebase '{name}'"))
}

/// Only changes the name of the backing file.
fn rename(args: &RebaseArgs, backing: Option<BackingName>) -> anyhow::Result<()> {
    let file = open_file_of_qcow2(&args.file, Purpose::Write)?;
    let format = args.format.map_or_else(|| probe(&*file), Ok)?;
    check_format(format)?;
    Ok(Qcow2::rename_backing(file, backing)?)
}

/// Copies what the two backing files have not in common, and then changes the name.
fn copy_and_rename(
    args: &RebaseArgs,
    backing: Option<BackingName>,
    job: Job<'_>,
) -> anyhow::Result<()> {
    let opened = open(&args.file, args.format, Purpose::Write)?;
    check_format(opened.format)?;
    let image = opened.qcow2.as_ref().context("it is not a qcow2 image")?;
    anyhow::ensure!(
        image.snapshots()?.is_empty(),
        "its snapshots need the present backing file; delete them first, or use -u if they do not"
    );
    let folder = args.file.parent().unwrap_or(Path::new(""));
    let new = match &backing {
        None => None,
        Some(backing) => {
            let path = folder.join(&backing.name);
            let format = args.backing_format;
            let opened = open(&path, format, purpose(args.force_share))?;
            check_depth(&opened)?;
            Some((opened, path))
        }
    };
    let shared = new.as_ref().and_then(|(_, path)| find(&opened, path));
    let new = new.as_ref().map(|(new, _)| &*new.image);
    copy_differences(image, new, shared, job)?;
    Ok(image.rebase(backing)?)
}

fn is_same_file(one: &Path, other: &Path) -> bool {
    let identity = |path| fs::metadata(path).map(|file| (file.dev(), file.ino()));
    matches!((identity(one), identity(other)), (Ok(one), Ok(other)) if one == other)
}

fn check_format(format: Format) -> anyhow::Result<()> {
    anyhow::ensure!(
        format == Format::Qcow2,
        "an image of the format {format} has no backing file"
    );
    Ok(())
}

/// Returns how many layers of an image lie above the file at `path`, if it is one of its backing files.
fn find(opened: &Opened, path: &Path) -> Option<usize> {
    let path = fs::canonicalize(path).ok()?;
    let mut files = opened.files.iter();
    files.position(|file| fs::canonicalize(file).is_ok_and(|file| file == path))
}
