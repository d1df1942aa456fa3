//! `bantam image convert`.

use std::path::PathBuf;

use anyhow::Context;
use bantam_storage::tools::{Job, Opened, open, option_help};

use super::args::{CacheMode, ConvertArgs};
use super::interrupt::cancel_on_signal;
use super::output::print;
use super::progress::Progress;
use super::purpose;
use super::snapshot::at_snapshot;
use super::target::{
    Copying, NO_FILE, Part, asks_for_help, check_not_source, copy_to_new, copy_to_old, options,
    set_backing,
};

/// Copies disks to an image.
pub fn convert(args: &ConvertArgs) -> anyhow::Result<()> {
    if asks_for_help(&args.options) {
        return print(&option_help(args.target_format));
    }
    let cancelled = cancel_on_signal()?;
    let (target, sources) = args.files.split_last().context(NO_FILE)?;
    anyhow::ensure!(
        args.snapshot.is_none() || sources.len() == 1,
        "a snapshot can be copied from one source only"
    );
    let open_source = |source: &PathBuf| {
        let opened = open(source, args.format, purpose(args.force_share))?;
        match &args.snapshot {
            Some(snapshot) => at_snapshot(opened, snapshot),
            None => Ok(opened),
        }
    };
    let sources: Vec<Opened> = sources
        .iter()
        .map(open_source)
        .collect::<anyhow::Result<_>>()?;
    check_not_source(&sources, target)?;
    let parts: Vec<_> = sources
        .iter()
        .map(|source| Part {
            source,
            start: 0,
            end: source.image.size(),
        })
        .collect();
    let how = Copying {
        sparse: (args.sparse > 0).then_some(args.sparse),
        sync: args.cache != CacheMode::Unsafe,
        compress: args.compress,
    };
    let progress = Progress::new(args.progress && !args.quiet);
    let job = Job {
        progress: &|share| progress.set(share),
        cancelled,
    };
    let format = args.target_format;
    let converted = match args.no_create {
        true => copy_to_old(&parts, target, format, &how, args.target_is_zero, job),
        false => {
            let mut options = options(&args.options)?;
            set_backing(&mut options, args.backing.as_deref(), args.backing_format);
            copy_to_new(&parts, target, format, options, &how, job)
        }
    };
    drop(progress);
    converted.with_context(|| format!("cannot convert to '{}'", target.display()))
}
