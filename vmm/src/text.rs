//! The text of errors.

/// Removes the numbers that the standard library appends to the text of an operating system error.
pub fn without_error_numbers(mut text: String) -> String {
    while let Some(start) = text.find(" (os error ")
        && let Some(len) = text[start..].find(')')
    {
        text.replace_range(start..=start + len, "");
    }
    text
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn errors_of_the_system_are_told_in_words() {
        let error = io::Error::from_raw_os_error(2);
        let text = format!("cannot open 'a': {error}; cannot open 'b': {error}");
        assert_eq!(
            without_error_numbers(text),
            "cannot open 'a': No such file or directory; cannot open 'b': No such file or directory"
        );
        for text in ["", " (os error ", "(os error 2)", " (os error 2"] {
            assert_eq!(without_error_numbers(text.to_string()), text);
        }
    }
}
