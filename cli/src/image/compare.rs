//! `bantam image compare`.

use bantam_storage::tools::{self, Difference, Job, open};

use super::args::CompareArgs;
use super::interrupt::cancel_on_signal;
use super::output::print;
use super::progress::Progress;
use super::purpose;
use super::{DIFFERENT, SAME};

/// Compares two disks and returns the exit status.
pub fn compare(args: &CompareArgs) -> anyhow::Result<u8> {
    let cancelled = cancel_on_signal()?;
    let first = open(&args.first, args.format, purpose(args.force_share))?;
    let second = open(&args.second, args.second_format, purpose(args.force_share))?;
    let tell = |text: &str| match args.quiet {
        true => Ok(()),
        false => print(text),
    };
    let (size, other_size) = (first.image.size(), second.image.size());
    if args.strict && size != other_size {
        tell("Strict mode: Image size mismatch!\n")?;
        return Ok(DIFFERENT);
    }
    let progress = Progress::new(args.progress && !args.quiet);
    let job = Job {
        progress: &|share| progress.set(share),
        cancelled,
    };
    let difference = tools::compare(&*first.image, &*second.image, args.strict, job)?;
    let common = size.min(other_size);
    let is_in_common = |difference| match difference {
        Difference::Content(offset) | Difference::Allocation(offset) => offset < common,
    };
    if size != other_size && !difference.is_some_and(is_in_common) {
        tell("Warning: Image size mismatch!\n")?;
    }
    let status = match difference {
        None => {
            tell("Images are identical.\n")?;
            SAME
        }
        Some(Difference::Content(offset)) => {
            tell(&format!("Content mismatch at offset {offset}!\n"))?;
            DIFFERENT
        }
        Some(Difference::Allocation(offset)) => {
            tell(&format!(
                "Strict mode: Offset {offset} block status mismatch!\n"
            ))?;
            DIFFERENT
        }
    };
    Ok(status)
}
