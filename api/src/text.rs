//! The text of clients in messages.

/// Makes a client's text fit to be shown on a line.
pub(crate) fn printable(text: &str) -> String {
    const LONGEST: usize = 100;
    text.chars()
        .take(LONGEST)
        .flat_map(char::escape_debug)
        .collect()
}
