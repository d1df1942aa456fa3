//! `bantam image map`.

use std::io::{self, BufWriter, Write};

use anyhow::Context;
use bantam_storage::tools::{self, Format, Job, MapEntry, open};

use super::args::{MapArgs, Output};
use super::interrupt::cancel_on_signal;
use super::purpose;

/// Lists which parts of a disk are allocated.
pub fn map(args: &MapArgs) -> anyhow::Result<()> {
    let cancelled = cancel_on_signal()?;
    let opened = open(&args.file, args.format, purpose(args.force_share))?;
    let size = opened.image.size();
    let start = args.start_offset.min(size);
    let length = args.max_length.unwrap_or(u64::MAX);
    let range = start..start.saturating_add(length).min(size);
    let job = Job {
        progress: &|_| {},
        cancelled,
    };
    // The last backing file of a qcow2 image is most often raw.
    let is_raw = !matches!(opened.format, Format::Foreign(_));
    let mut output = BufWriter::new(io::stdout().lock());
    match args.output {
        Output::Human => {
            let columns = ("Offset", "Length", "Mapped to", "File");
            let (offset, length, mapped, file) = columns;
            writeln!(output, "{offset:<16}{length:<16}{mapped:<16}{file}")?;
            tools::map(&*opened.image, range, is_raw, job, |entry| {
                if !entry.data || entry.zero {
                    return Ok(());
                }
                let (file, offset) = entry.offset.with_context(|| {
                    let name = args.file.display();
                    format!("cannot show where '{name}' has its data: it is compressed; use --output=json")
                })?;
                let numbers = [entry.start, entry.len, offset].map(hexadecimal);
                let [start, len, offset] = &numbers;
                let name = opened.files[file].display();
                writeln!(output, "{start:<16}{len:<16}{offset:<16}{name}")?;
                anyhow::Ok(())
            })?;
        }
        Output::Json => {
            write!(output, "[")?;
            let mut separator = "";
            tools::map(&*opened.image, range, is_raw, job, |entry| {
                write!(output, "{separator}{}", json(entry))?;
                separator = ",\n";
                anyhow::Ok(())
            })?;
            writeln!(output, "]")?;
        }
    }
    output.flush()?;
    Ok(())
}

/// Formats a number as `printf("%#x")` does.
fn hexadecimal(number: u64) -> String {
    match number {
        0 => "0".to_owned(),
        number => format!("{number:#x}"),
    }
}

fn json(entry: &MapEntry) -> String {
    let MapEntry {
        start,
        len,
        depth,
        present,
        zero,
        data,
        offset,
    } = entry;
    let offset = offset.map_or(String::new(), |(_, offset)| {
        format!(", \"offset\": {offset}")
    });
    format!(
        "{{ \"start\": {start}, \"length\": {len}, \"depth\": {depth}, \"present\": {present}, \
         \"zero\": {zero}, \"data\": {data}{offset}}}"
    )
}
