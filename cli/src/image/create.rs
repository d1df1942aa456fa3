//! `bantam image create`.

use anyhow::Context;
use bantam_storage::tools;

use super::args::CreateArgs;
use super::output::print;
use super::target::options;
use bantam_storage::parse_size;

/// Creates an image.
pub fn create(args: CreateArgs) -> anyhow::Result<()> {
    let mut options = options(&args.options)?;
    let size = match (args.size, options.take("size")) {
        (Some(size), _) => Some(size),
        (None, Some(size)) => Some(parse_size(&size).map_err(anyhow::Error::msg)?),
        (None, None) => None,
    };
    let name = args.file.display();
    let size = size.with_context(|| format!("cannot create '{name}': give it a size"))?;
    let chosen = tools::describe_options(args.format, &options);
    let created = tools::create(&args.file, args.format, size, options)?;
    let finished = created.target.finish(true);
    if finished.is_err() {
        created.remove();
    }
    finished.with_context(|| format!("cannot create '{name}'"))?;
    match args.quiet {
        true => Ok(()),
        false => print(&format!(
            "Formatting '{name}', fmt={} size={size}{chosen}\n",
            args.format
        )),
    }
}
