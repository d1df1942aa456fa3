//! Text from clients in messages.

/// Makes a client's text safe to show on one line.
pub(crate) fn printable(text: &str) -> String {
    const LONGEST: usize = 100;
    text.chars()
        .take(LONGEST)
        .flat_map(char::escape_debug)
        .collect()
}
