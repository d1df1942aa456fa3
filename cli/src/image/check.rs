//! `bantam image check`.

use anyhow::Context;
use bantam_storage::tools::{Format, check_blocks, open};
use serde::Serialize;

use super::args::{CheckArgs, Output};
use super::interrupt::cancel_on_signal;
use super::output::{print, print_json};
use super::progress::Progress;
use crate::message::say;

const WHOLE: u8 = 0;
const DAMAGED: u8 = 2;
/// There is nothing to check in the format.
const NO_CHECKS: u8 = 63;

/// What was found, in QEMU's words and order.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Checked {
    #[serde(skip_serializing_if = "is_none")]
    corruptions: u64,
    check_errors: u64,
    filename: String,
    format: String,
}

fn is_none(count: &u64) -> bool {
    *count == 0
}

/// Looks for damage and returns the exit status.
pub fn check(args: &CheckArgs) -> anyhow::Result<u8> {
    let cancelled = cancel_on_signal()?;
    let opened = open(&args.file, args.format, false)?;
    if opened.format == Format::Raw {
        if !args.quiet {
            let name = args.file.display();
            say(format_args!(
                "bantam image: cannot check '{name}': the format {} has nothing to check",
                opened.format
            ));
        }
        return Ok(NO_CHECKS);
    }
    let progress = Progress::new(false);
    let job = bantam_storage::tools::Job {
        progress: &|share| progress.set(share),
        cancelled,
    };
    let corruptions = check_blocks(&*opened.image, opened.cluster_size, job)
        .with_context(|| format!("cannot check '{}'", args.file.display()))?;
    match args.output {
        Output::Json => print_json(&Checked {
            corruptions,
            check_errors: 0,
            filename: args.file.display().to_string(),
            format: opened.format.to_string(),
        })?,
        Output::Human if args.quiet => {}
        Output::Human if corruptions == 0 => print("No errors were found on the image.\n")?,
        Output::Human => print(&format!(
            "\n{corruptions} errors were found on the image.\nData may be corrupted, or further writes to the image \
             may corrupt it.\n"
        ))?,
    }
    Ok(if corruptions == 0 { WHOLE } else { DAMAGED })
}
