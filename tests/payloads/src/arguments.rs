//! The words of the command line.

use core::str::FromStr;

use crate::BootInfo;

/// The value of the last `name=value` word.
pub fn value(name: &str) -> Option<&'static str> {
    BootInfo::get()
        .command_line
        .split_whitespace()
        .filter_map(|word| word.strip_prefix(name)?.strip_prefix('='))
        .next_back()
}

/// The value of the last `name=value` word as another type.
///
/// # Panics
///
/// If the value is not of that type, which fails the payload.
pub fn parsed<T: FromStr>(name: &str) -> Option<T> {
    value(name).map(|text| match text.parse() {
        Ok(value) => value,
        Err(_) => panic!("argument '{name}={text}' cannot be understood"),
    })
}

/// Whether the word `name` stands alone on the command line.
pub fn flag(name: &str) -> bool {
    BootInfo::get()
        .command_line
        .split_whitespace()
        .any(|word| word == name)
}

/// A virtio-mmio device that the command line names: `virtio_mmio.device=SIZE@ADDRESS:GSI`.
#[derive(Clone, Copy)]
pub struct VirtioMmioWindow {
    /// Guest-physical address of the registers.
    pub address: u64,
    /// Size of the window in bytes.
    pub size: u64,
    /// Global system interrupt.
    pub gsi: u32,
}

/// The virtio-mmio devices in the order of the command line.
///
/// # Panics
///
/// If one cannot be parsed, which fails the payload.
pub fn virtio_mmio_windows() -> impl Iterator<Item = VirtioMmioWindow> {
    BootInfo::get()
        .command_line
        .split_whitespace()
        .filter_map(|word| word.strip_prefix("virtio_mmio.device="))
        .map(|text| match parse_window(text) {
            Some(window) => window,
            None => panic!("virtio-mmio device '{text}' cannot be understood"),
        })
}

fn parse_window(text: &str) -> Option<VirtioMmioWindow> {
    let (size, rest) = text.split_once('@')?;
    let mut rest = rest.split(':');
    Some(VirtioMmioWindow {
        size: parse_number(size)?,
        address: parse_number(rest.next()?)?,
        gsi: rest.next()?.parse().ok()?,
    })
}

/// Parses a number as Linux writes sizes: decimal or hexadecimal, perhaps with a suffix K, M or G.
/// `None` if it is not a number, or too large.
pub fn parse_number(text: &str) -> Option<u64> {
    let (digits, shift) = match text.as_bytes().last()? {
        b'K' | b'k' => (&text[..text.len() - 1], 10),
        b'M' | b'm' => (&text[..text.len() - 1], 20),
        b'G' | b'g' => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let number = match digits.strip_prefix("0x") {
        Some(hexadecimal) => u64::from_str_radix(hexadecimal, 16).ok()?,
        None => digits.parse().ok()?,
    };
    number.checked_mul(1 << shift)
}
