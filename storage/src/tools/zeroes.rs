//! Looks for zeroes.

/// Whether all bytes are zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    // Most data are not zero from the start. Blocks of a fixed size become vector instructions.
    let (blocks, rest) = bytes.as_chunks::<128>();
    let nonzero = |block: &[u8]| block.iter().fold(0, |all, byte| all | byte) != 0;
    !blocks.iter().any(|block| nonzero(block)) && !nonzero(rest)
}

/// Splits `bytes` into runs of units that are all zeroes and runs of others: whether a run is zeroes, and where
/// it ends. The last unit can be shorter.
pub fn runs(bytes: &[u8], unit: usize) -> impl Iterator<Item = (bool, usize)> {
    let mut position = 0;
    // Whether the unit at `position` is zeroes, once that is known.
    let mut known = None;
    std::iter::from_fn(move || {
        if position == bytes.len() {
            return None;
        }
        let unit_at = |start: usize| &bytes[start..bytes.len().min(start + unit)];
        let zero = known.unwrap_or_else(|| is_zero(unit_at(position)));
        position += unit_at(position).len();
        while position < bytes.len() {
            let next = is_zero(unit_at(position));
            if next != zero {
                known = Some(next);
                break;
            }
            position += unit_at(position).len();
        }
        Some((zero, position))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_that_is_not_zero_is_found_anywhere() {
        let mut bytes = [0; 777];
        for end in [0, 1, 127, 128, 129, 777] {
            assert!(is_zero(&bytes[..end]));
        }
        for at in 0..bytes.len() {
            bytes[at] = 1;
            assert!(!is_zero(&bytes));
            bytes[at] = 0;
        }
    }

    #[test]
    fn runs_alternate() {
        let mut bytes = [0; 1000];
        bytes[250] = 1;
        bytes[350] = 1;
        bytes[999] = 1;
        let found: Vec<_> = runs(&bytes, 100).collect();
        assert_eq!(
            found,
            [(true, 200), (false, 400), (true, 900), (false, 1000)]
        );
        assert_eq!(runs(&[], 100).count(), 0);
        assert_eq!(runs(&[0; 150], 100).collect::<Vec<_>>(), [(true, 150)]);
    }
}
