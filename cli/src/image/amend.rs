//! `bantam image amend`.

use std::path::Path;

use anyhow::Context;
use bantam_storage::Image;
use bantam_storage::qcow2::{Amendment, Header};
use bantam_storage::tools::{Format, Purpose, amend_help, open};

use super::args::AmendArgs;
use super::output::print;
use super::progress::Progress;
use super::target::{NO_FILE, asks_for_help, options};

/// Changes options of an image.
pub fn amend(args: &AmendArgs) -> anyhow::Result<()> {
    if asks_for_help(&args.options) {
        let format = args.format.unwrap_or(Format::Qcow2);
        anyhow::ensure!(
            format == Format::Qcow2,
            "the format {format} has no options to amend"
        );
        return print(&amend_help());
    }
    let file = args.file.as_deref().context(NO_FILE)?;
    let progress = Progress::new(args.progress && !args.quiet);
    let amended = change(args, file);
    if amended.is_ok() {
        progress.set(1.0);
    }
    drop(progress);
    amended.with_context(|| format!("cannot amend '{}'", file.display()))
}

fn change(args: &AmendArgs, file: &Path) -> anyhow::Result<()> {
    let mut options = options(&args.options)?;
    let opened = open(file, args.format, Purpose::Write)?;
    let Some(image) = opened.qcow2 else {
        anyhow::bail!("the format {} has no options to amend", opened.format);
    };
    let header = image.header();
    let mut amendment = Amendment::default();
    if options.get("compat").is_some() {
        let versions = [("1.1", 3), ("v3", 3), ("0.10", 2), ("v2", 2)];
        amendment.version = Some(options.take_choice("compat", &versions)?);
    }
    if options.get("lazy_refcounts").is_some() {
        let switch = [("off", false), ("on", true)];
        amendment.lazy_refcounts = Some(options.take_choice("lazy_refcounts", &switch)?);
    }
    let size = options.take_size("size")?;
    check_unchanged(&header, options)?;
    if let Some(size) = size {
        image.resize(size)?;
    }
    image.amend(amendment)?;
    Ok(image.flush()?)
}

/// Refuses to change options that only a new image can have, and those that are changed by other commands.
fn check_unchanged(header: &Header, mut options: bantam_storage::Options) -> anyhow::Result<()> {
    let backing = header.backing();
    let name = backing.map(|backing| backing.name.clone());
    let format = backing.and_then(|backing| backing.format.clone());
    for (key, present) in [("backing_file", name), ("backing_fmt", format)] {
        let wanted = options.take(key);
        anyhow::ensure!(
            wanted.is_none() || wanted == present,
            "the backing file is changed by rebase"
        );
    }
    let bits = options.take("refcount_bits");
    anyhow::ensure!(
        bits.is_none_or(|bits| bits == header.refcount_bits().to_string()),
        "the width of refcounts is that of a new image: convert it"
    );
    Ok(options.finish("qcow2 that can be amended")?)
}
