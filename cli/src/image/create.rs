//! `bantam image create`.

use anyhow::Context;
use bantam_storage::parse_size;
use bantam_storage::tools::{self, NewContent};

use super::args::CreateArgs;
use super::output::print;
use super::target::{NO_FILE, asks_for_help, open_backing, options, set_backing};

/// Creates an image.
pub fn create(args: CreateArgs) -> anyhow::Result<()> {
    if asks_for_help(&args.options) {
        return print(&tools::option_help(args.format));
    }
    let file = args.file.as_deref().context(NO_FILE)?;
    let mut options = options(&args.options)?;
    set_backing(&mut options, args.backing.as_deref(), args.backing_format);
    let mut size = match (args.size, options.take("size")) {
        (Some(size), _) => Some(size),
        (None, Some(size)) => Some(parse_size(&size).map_err(anyhow::Error::msg)?),
        (None, None) => None,
    };
    let backing = match args.unchecked {
        true => None,
        false => open_backing(file, &options)?,
    };
    if let Some(backing) = &backing {
        size = size.or(Some(backing.image.size()));
    }
    let name = file.display();
    let size = size.with_context(|| format!("cannot create '{name}': give it a size"))?;
    let content = NewContent {
        compress: false,
        backing: backing.map(|backing| backing.image),
    };
    let chosen = tools::describe_options(args.format, size, &options);
    let created = tools::create(file, args.format, size, options, content)?;
    let finished = created.target.finish(true);
    if finished.is_err() {
        created.remove();
    }
    finished.with_context(|| format!("cannot create '{name}'"))?;
    match args.quiet {
        true => Ok(()),
        false => print(&format!(
            "Formatting '{name}', fmt={}{chosen}\n",
            args.format
        )),
    }
}
