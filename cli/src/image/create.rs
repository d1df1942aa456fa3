//! `bantam image create`.

use std::path::Path;

use anyhow::Context;
use bantam_storage::tools::{self, Purpose};

use super::args::CreateArgs;
use super::output::print;
use super::target::options;
use bantam_storage::parse_size;

/// Creates an image.
pub fn create(args: CreateArgs) -> anyhow::Result<()> {
    let mut options = options(&args.options)?;
    if let (Some(backing), Some(format)) = (&args.backing, args.backing_format) {
        options.set("backing_file", backing);
        options.set("backing_fmt", &format.to_string());
    }
    let mut size = match (args.size, options.take("size")) {
        (Some(size), _) => Some(size),
        (None, Some(size)) => Some(parse_size(&size).map_err(anyhow::Error::msg)?),
        (None, None) => None,
    };
    if let Some(backing) = options.get("backing_file").filter(|_| !args.unchecked) {
        let format = options
            .get("backing_fmt")
            .context("give the format of the backing file: -F")?;
        let folder = args.file.parent().unwrap_or(Path::new(""));
        let backing = tools::open(&folder.join(backing), Some(format.parse()?), Purpose::Read)?;
        size = size.or(Some(backing.image.size()));
    }
    let name = args.file.display();
    let size = size.with_context(|| format!("cannot create '{name}': give it a size"))?;
    let chosen = tools::describe_options(args.format, size, &options);
    let created = tools::create(&args.file, args.format, size, options, false)?;
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
