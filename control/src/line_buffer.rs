//! Cuts a stream of bytes into lines.

/// Capacity that a buffer without content keeps.
const KEPT_CAPACITY: usize = 16 << 10;

/// Bytes that were received and are not a complete line yet, or lines that nobody has taken yet.
#[derive(Debug)]
pub(crate) struct LineBuffer {
    bytes: Vec<u8>,
    /// Where the next line begins.
    start: usize,
    /// Up to where no line feed follows the start.
    searched: usize,
    max_size: usize,
}

/// A line has more bytes than it may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LineTooLong;

impl LineBuffer {
    /// Creates a buffer for lines of up to `max_size` bytes, with the line feed at their end.
    pub(crate) fn new(max_size: usize) -> LineBuffer {
        LineBuffer {
            bytes: Vec::new(),
            start: 0,
            searched: 0,
            max_size,
        }
    }

    /// Adds bytes that were received. The caller takes all lines before it receives more.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.bytes.drain(..self.start);
        self.searched -= self.start;
        self.start = 0;
        if self.bytes.is_empty() {
            self.bytes.shrink_to(KEPT_CAPACITY);
        }
        self.bytes.extend_from_slice(bytes);
    }

    /// Returns the next line without its line feed, if all of it is there. Lines of white space are passed over.
    ///
    /// # Errors
    /// If it is too long. There are no lines after that.
    pub(crate) fn next_line(&mut self) -> Result<Option<&[u8]>, LineTooLong> {
        loop {
            let unsearched = self.bytes.get(self.searched..).unwrap_or_default();
            let found = unsearched.iter().position(|&byte| byte == b'\n');
            let end = self.searched + found.unwrap_or(unsearched.len());
            self.searched = end;
            let size = end - self.start;
            // The line feed is either there or to come.
            if size >= self.max_size {
                return Err(LineTooLong);
            }
            if found.is_none() {
                return Ok(None);
            }
            let line = self.start..end;
            self.start = end + 1;
            self.searched = self.start;
            let is_blank = self.bytes.get(line.clone()).unwrap_or_default();
            if !is_blank.trim_ascii().is_empty() {
                return Ok(self.bytes.get(line));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MAX_SIZE: usize = 8;

    /// Returns the lines of `bytes`, which come in pieces of these sizes, and whether one is too long.
    fn lines(bytes: &[u8], sizes: &[usize]) -> (Vec<Vec<u8>>, bool) {
        let mut buffer = LineBuffer::new(MAX_SIZE);
        let mut lines = Vec::new();
        let mut rest = bytes;
        let mut sizes = sizes.iter().cycle();
        while !rest.is_empty() {
            let (piece, after) = rest.split_at((*sizes.next().unwrap()).clamp(1, rest.len()));
            buffer.push(piece);
            rest = after;
            loop {
                match buffer.next_line() {
                    Ok(Some(line)) => lines.push(line.to_vec()),
                    Ok(None) => break,
                    Err(LineTooLong) => return (lines, true),
                }
            }
            assert!(buffer.bytes.len() <= MAX_SIZE + piece.len());
        }
        (lines, false)
    }

    #[test]
    fn a_line_ends_with_a_line_feed_and_has_a_limit() {
        assert_eq!(lines(b"ab", &[1]), (vec![], false));
        assert_eq!(lines(b"ab\n\n \r\n\tc\n", &[1]).0, [&b"ab"[..], b"\tc"]);
        assert_eq!(lines(b"1234567\n", &[3]), (vec![b"1234567".into()], false));
        assert_eq!(lines(b"a\n12345678", &[3]), (vec![b"a".into()], true));
        assert_eq!(lines(b"12345678\n", &[9]), (vec![], true));
    }

    proptest! {
        #[test]
        fn pieces_of_any_size_make_the_same_lines(
            bytes in prop::collection::vec(prop::sample::select(&b"a \n"[..]), 0..64),
            sizes in prop::collection::vec(1..20_usize, 1..8),
        ) {
            let (found, is_too_long) = lines(&bytes, &sizes);
            let complete = match bytes.iter().rposition(|&byte| byte == b'\n') {
                Some(last) => &bytes[..last],
                None => &[],
            };
            let expected: Vec<&[u8]> = complete
                .split(|&byte| byte == b'\n')
                .take_while(|line| line.len() < MAX_SIZE)
                .filter(|line| !line.trim_ascii().is_empty())
                .collect();
            prop_assert_eq!(found, expected);
            let exceeds = bytes.split(|&byte| byte == b'\n').any(|line| line.len() >= MAX_SIZE);
            prop_assert_eq!(is_too_long, exceeds);
        }
    }
}
