//! `bantam image dd`.

use std::path::PathBuf;

use anyhow::Context;
use bantam_storage::Options;
use bantam_storage::tools::{Job, open};

use super::args::DdArgs;
use super::interrupt::cancel_on_signal;
use super::purpose;
use super::target::{Copying, Part, check_not_source, copy_to_new};
use bantam_storage::parse_size;

/// What the operands say.
#[derive(Debug, PartialEq, Eq)]
pub struct Operands {
    input: PathBuf,
    output: PathBuf,
    block: u64,
    count: Option<u64>,
    skip: u64,
}

impl Operands {
    /// Reads `if=FILE of=FILE bs=SIZE count=BLOCKS skip=BLOCKS`.
    pub fn parse(operands: &[String]) -> anyhow::Result<Operands> {
        let (mut input, mut output, mut count) = (None, None, None);
        let (mut block, mut skip) = (512, 0);
        for operand in operands {
            let number = |text| {
                let number = parse_size(text).map_err(anyhow::Error::msg);
                number.with_context(|| format!("invalid operand '{operand}'"))
            };
            match operand.split_once('=') {
                Some(("if", file)) => input = Some(file.into()),
                Some(("of", file)) => output = Some(file.into()),
                Some(("bs", text)) => block = number(text)?,
                Some(("count", text)) => count = Some(number(text)?),
                Some(("skip", text)) => skip = number(text)?,
                _ => anyhow::bail!(
                    "unknown operand '{operand}'; the operands are if, of, bs, count and skip"
                ),
            }
        }
        anyhow::ensure!(block > 0, "the block size bs must not be 0");
        Ok(Operands {
            input: input.context("give a source: if=FILE")?,
            output: output.context("give a target: of=FILE")?,
            block,
            count,
            skip,
        })
    }
}

/// Copies a part of a disk.
pub fn dd(args: &DdArgs) -> anyhow::Result<()> {
    let cancelled = cancel_on_signal()?;
    let operands = Operands::parse(&args.operands)?;
    let sources = [open(
        &operands.input,
        args.format,
        purpose(args.force_share),
    )?];
    check_not_source(&sources, &operands.output)?;
    let size = sources[0].image.size();
    let start = operands.skip.saturating_mul(operands.block);
    anyhow::ensure!(
        start <= size,
        "cannot skip {start} bytes: '{}' has {size}",
        operands.input.display()
    );
    // Skipped blocks are among those that are counted, as in qemu-img and unlike in other dd.
    let counted = operands
        .count
        .map_or(size, |count| count.saturating_mul(operands.block));
    let part = Part {
        source: &sources[0],
        start,
        end: counted.clamp(start, size),
    };
    let how = Copying {
        sparse: Some(4096),
        sync: true,
        compress: false,
    };
    let job = Job {
        progress: &|_| {},
        cancelled,
    };
    let format = args.target_format;
    copy_to_new(
        &[part],
        &operands.output,
        format,
        Options::default(),
        &how,
        job,
    )
    .with_context(|| format!("cannot copy to '{}'", operands.output.display()))
}
