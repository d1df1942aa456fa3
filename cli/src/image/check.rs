//! `bantam image check`.

use anyhow::Context;
use bantam_storage::qcow2::{Qcow2, Repair};
use bantam_storage::tools::{Format, Purpose, check_blocks, open, open_file_of_qcow2, probe};
use serde::Serialize;

use super::args::{CheckArgs, Output, Repairs};
use super::interrupt::cancel_on_signal;
use super::output::{print, print_json};
use super::progress::Progress;
use super::purpose;
use crate::message::say;

const WHOLE: u8 = 0;
const DAMAGED: u8 = 2;
const LEAKS: u8 = 3;
/// There is nothing to check in the format.
const NO_CHECKS: u8 = 63;

/// What was found, in QEMU's words and order.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Checked {
    #[serde(skip_serializing_if = "is_none")]
    corruptions: u64,
    #[serde(skip_serializing_if = "is_none")]
    leaks: u64,
    #[serde(skip_serializing_if = "is_none")]
    leaks_fixed: u64,
    #[serde(skip_serializing_if = "is_none")]
    corruptions_fixed: u64,
    check_errors: u64,
    filename: String,
    format: String,
}

fn is_none(count: &u64) -> bool {
    *count == 0
}

/// Looks for damage and returns the exit status.
pub fn check(args: &CheckArgs) -> anyhow::Result<u8> {
    if is_qcow2(args)? {
        return check_qcow2(args);
    }
    if args.repair.is_some() {
        anyhow::bail!("only qcow2 images can be repaired");
    }
    let cancelled = cancel_on_signal()?;
    let opened = open(&args.file, args.format, purpose(args.force_share))?;
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
            leaks: 0,
            leaks_fixed: 0,
            corruptions_fixed: 0,
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

fn is_qcow2(args: &CheckArgs) -> anyhow::Result<bool> {
    if let Some(format) = args.format {
        return Ok(format == Format::Qcow2);
    }
    let file = open_file_of_qcow2(&args.file, purpose(args.force_share))?;
    let format = probe(&*file);
    let format = format.with_context(|| format!("cannot read '{}'", args.file.display()))?;
    Ok(format == Format::Qcow2)
}

/// Checks an image with refcounts, and repairs it if that is asked for.
fn check_qcow2(args: &CheckArgs) -> anyhow::Result<u8> {
    let (repair, purpose) = match args.repair {
        None => (Repair::Nothing, purpose(args.force_share)),
        Some(Repairs::Leaks) => (Repair::Leaks, Purpose::Write),
        Some(Repairs::All) => (Repair::All, Purpose::Write),
    };
    let file = open_file_of_qcow2(&args.file, purpose)?;
    let report = Qcow2::check(file, repair);
    let report = report.with_context(|| format!("cannot check '{}'", args.file.display()))?;
    let status = match (report.corruptions, report.leaks) {
        (0, 0) => WHOLE,
        (0, _) => LEAKS,
        _ => DAMAGED,
    };
    if args.output == Output::Json {
        print_json(&Checked {
            corruptions: report.corruptions,
            leaks: report.leaks,
            leaks_fixed: report.leaks_fixed,
            corruptions_fixed: report.corruptions_fixed,
            check_errors: 0,
            filename: args.file.display().to_string(),
            format: Format::Qcow2.to_string(),
        })?;
        return Ok(status);
    }
    if args.quiet {
        return Ok(status);
    }
    for finding in &report.findings {
        say(format_args!("{finding}"));
    }
    if report.leaks_fixed > 0 || report.corruptions_fixed > 0 {
        print(&format!(
            "The following inconsistencies were found and repaired:\n\n    {} leaked clusters\n    {} \
             corruptions\n\n",
            report.leaks_fixed, report.corruptions_fixed
        ))?;
    }
    if status == WHOLE {
        print("No errors were found on the image.\n")?;
    }
    if report.corruptions > 0 {
        print(&format!(
            "\n{} errors were found on the image.\nData may be corrupted, or further writes to the image may \
             corrupt it.\n",
            report.corruptions
        ))?;
    }
    if report.leaks > 0 {
        print(&format!(
            "\n{} leaked clusters were found on the image.\nThis means waste of disk space, but no harm to \
             data.\n",
            report.leaks
        ))?;
    }
    Ok(status)
}
