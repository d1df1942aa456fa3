//! `bantam image resize`.

use bantam_storage::tools::{self, Purpose};

use super::args::ResizeArgs;
use super::output::print;

/// Changes the size of a disk.
pub fn resize(args: &ResizeArgs) -> anyhow::Result<()> {
    let opened = tools::open(&args.file, args.format, Purpose::Write)?;
    let (format, size) = (opened.format, opened.image.size());
    drop(opened);
    let new = args.size.apply(size)?;
    if new < size && !args.shrink {
        anyhow::bail!(
            "'{}' has {size} bytes, and would lose what is beyond {new}; --shrink allows that",
            args.file.display()
        );
    }
    tools::resize(&args.file, Some(format), new, args.preallocation)?;
    match args.quiet {
        true => Ok(()),
        false => print("Image resized.\n"),
    }
}
