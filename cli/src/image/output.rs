//! Answers in JSON, as QEMU lays it out.

use std::io::{self, Write};

use serde::Serialize;
use serde_json::ser::{PrettyFormatter, Serializer};

/// Prints `value` as JSON, with four spaces for each level.
pub fn print_json(value: &impl Serialize) -> anyhow::Result<()> {
    let mut text = Vec::new();
    let formatter = PrettyFormatter::with_indent(b"    ");
    value.serialize(&mut Serializer::with_formatter(&mut text, formatter))?;
    text.push(b'\n');
    io::stdout().write_all(&text)?;
    Ok(())
}

/// Prints text.
pub fn print(text: &str) -> anyhow::Result<()> {
    io::stdout().write_all(text.as_bytes())?;
    Ok(())
}
