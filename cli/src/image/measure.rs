//! `bantam image measure`.

use anyhow::Context;
use bantam_storage::tools::{Format, open};
use serde::Serialize;

use super::args::{MeasureArgs, Output};
use super::output::{print, print_json};
use super::purpose;
use super::target::options;

/// Sizes in bytes, in QEMU's words and order.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Measured {
    required: u64,
    fully_allocated: u64,
}

/// Tells how large an image will be.
pub fn measure(args: MeasureArgs) -> anyhow::Result<()> {
    let size = match (args.size, &args.file) {
        (Some(size), _) => size,
        (None, file) => {
            let file = file.as_deref().context("there is no image to measure")?;
            open(file, args.format, purpose(args.force_share))?
                .image
                .size()
        }
    };
    if args.target_format != Format::Raw {
        anyhow::bail!(
            "images of the format {} cannot be measured",
            args.target_format
        );
    }
    let mut options = options(&args.options)?;
    // The size is the same, whatever is reserved in advance.
    options.take("preallocation");
    options.finish("raw")?;
    let required = size
        .checked_next_multiple_of(512)
        .context("the size is too large")?;
    let measured = Measured {
        required,
        fully_allocated: required,
    };
    match args.output {
        Output::Json => print_json(&measured),
        Output::Human => print(&format!(
            "required size: {required}\nfully allocated size: {required}\n"
        )),
    }
}
