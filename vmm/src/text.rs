//! The text of errors.

/// Removes the numbers that the standard library appends to the text of an operating system error. In place of
/// those that say that there are too many open files, it puts the remedy: any part of the program can run out
/// of descriptors.
pub fn without_error_numbers(mut text: String) -> String {
    const START: &str = " (os error ";
    while let Some(start) = text.find(START)
        && let Some(len) = text[start..].find(')')
    {
        let remedy = match text[start + START.len()..start + len].parse() {
            Ok(libc::EMFILE) => ": raise the limit (ulimit -n)",
            Ok(libc::ENFILE) => ": raise the host's limit (sysctl fs.file-max)",
            _ => "",
        };
        text.replace_range(start..=start + len, remedy);
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
        let full = |number| format!("no {}", io::Error::from_raw_os_error(number));
        assert_eq!(
            without_error_numbers(full(24)),
            "no Too many open files: raise the limit (ulimit -n)"
        );
        assert_eq!(
            without_error_numbers(full(23)),
            "no Too many open files in system: raise the host's limit (sysctl fs.file-max)"
        );
        for text in ["", " (os error ", "(os error 2)", " (os error 2"] {
            assert_eq!(without_error_numbers(text.to_string()), text);
        }
    }
}
