//! `bantam image measure`.

use std::sync::atomic::AtomicBool;

use anyhow::Context;
use bantam_storage::Options;
use bantam_storage::tools::{Format, Job, Measured, Opened, measure_qcow2, open, qcow2_options};
use serde::Serialize;

use super::args::{MeasureArgs, Output};
use super::output::{print, print_json};
use super::purpose;
use super::snapshot::at_snapshot;
use super::target::options;

/// Sizes in bytes, in QEMU's words and order.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Sizes {
    #[serde(skip_serializing_if = "Option::is_none")]
    bitmaps: Option<u64>,
    required: u64,
    fully_allocated: u64,
}

/// Tells how large an image will be.
pub fn measure(args: MeasureArgs) -> anyhow::Result<()> {
    let source = match (args.size, &args.file) {
        (Some(_), _) => None,
        (None, file) => {
            let file = file.as_deref().context("there is no image to measure")?;
            let opened = open(file, args.format, purpose(args.force_share))?;
            Some(match &args.snapshot {
                Some(snapshot) => at_snapshot(opened, snapshot)?,
                None => opened,
            })
        }
    };
    let size = source.as_ref().map(|source| source.image.size());
    let size = size.or(args.size).unwrap_or_default();
    let options = options(&args.options)?;
    let measured = match args.target_format {
        Format::Raw => measure_raw(options, size)?,
        Format::Qcow2 => measure_as_qcow2(options, size, source.as_ref())?,
        format => anyhow::bail!("images of the format {format} cannot be measured"),
    };
    match args.output {
        Output::Json => print_json(&measured),
        Output::Human => {
            let mut text = format!(
                "required size: {}\nfully allocated size: {}\n",
                measured.required, measured.fully_allocated
            );
            if let Some(bitmaps) = measured.bitmaps {
                text.push_str(&format!("bitmaps size: {bitmaps}\n"));
            }
            print(&text)
        }
    }
}

fn measure_raw(mut options: Options, size: u64) -> anyhow::Result<Sizes> {
    // The size is the same, whatever is reserved in advance.
    options.take("preallocation");
    options.finish("raw")?;
    let size = size
        .checked_next_multiple_of(512)
        .context("the size is too large")?;
    Ok(Sizes {
        bitmaps: None,
        required: size,
        fully_allocated: size,
    })
}

fn measure_as_qcow2(options: Options, size: u64, source: Option<&Opened>) -> anyhow::Result<Sizes> {
    let options = qcow2_options(options, size)?;
    let job = Job {
        progress: &|_| {},
        cancelled: &AtomicBool::new(false),
    };
    let image = source.map(|source| &*source.image);
    let Measured {
        required,
        fully_allocated,
    } = measure_qcow2(&options, image, job)?
        .context("the disk is too large for clusters of this size")?;
    let header = source.and_then(|source| source.qcow2.as_ref());
    let header = header.map(|image| image.header());
    // Bitmaps of a source are not copied, and not measured.
    let takes_bitmaps =
        header.is_some_and(|it| it.version() >= 3 && options.version >= 3 && !it.has_bitmaps());
    Ok(Sizes {
        bitmaps: takes_bitmaps.then_some(0),
        required,
        fully_allocated,
    })
}
