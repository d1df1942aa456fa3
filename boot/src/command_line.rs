//! The kernel command line.

use std::fmt;

use vm_memory::GuestAddress;

/// Longest command line in bytes, without its NUL, that an x86 Linux kernel keeps
/// (`COMMAND_LINE_SIZE` less one); it drops the rest silently.
pub(crate) const LINUX_COMMAND_LINE_LIMIT: usize = 2047;

/// Why a command line is refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommandLineError {
    /// The kernel takes printable ASCII only.
    #[error(
        "the kernel command line holds {character:?} at byte {position}: \
         only printable ASCII characters and spaces are allowed"
    )]
    InvalidCharacter {
        /// The character refused.
        character: char,
        /// Its offset in the text, in bytes.
        position: usize,
    },
    /// The rest of the line would become part of the quoted value.
    #[error("the kernel command line has an unclosed double quote in '{text}'")]
    UnclosedQuote {
        /// The text with an odd number of double quotes.
        text: String,
    },
    /// The kernel would cut the end off.
    #[error(
        "the kernel command line is {length} bytes long, but this kernel takes at most {limit}: \
         shorten it by {}", .length - .limit
    )]
    TooLong {
        /// Length in bytes, with the words that the monitor added.
        length: usize,
        /// The kernel's limit in bytes, without the NUL.
        limit: usize,
    },
}

/// A kernel command line under construction: parameters for the kernel and, after a word `--`,
/// arguments for the guest's init.
///
/// Appended words go where they are read: kernel parameters always stay before the `--`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CommandLine {
    kernel_parameters: String,
    init_arguments: String,
}

impl CommandLine {
    /// Makes a command line that starts with `text`, which may contain a `--`.
    ///
    /// # Errors
    ///
    /// If `text` has a character that is not printable ASCII, or an unclosed double quote.
    pub fn new(text: &str) -> Result<Self, CommandLineError> {
        let mut command_line = Self::default();
        command_line.append(text)?;
        Ok(command_line)
    }

    /// Adds the kernel parameters of `text` after the present ones and, if `text` has a `--`, the
    /// words after it to the arguments of init.
    ///
    /// # Errors
    ///
    /// Those of [`CommandLine::new`]; the command line is then unchanged.
    pub fn append(&mut self, text: &str) -> Result<(), CommandLineError> {
        if let Some((position, character)) = text
            .char_indices()
            .find(|(_, character)| !matches!(character, ' '..='~'))
        {
            return Err(CommandLineError::InvalidCharacter {
                character,
                position,
            });
        }
        if !text.matches('"').count().is_multiple_of(2) {
            return Err(CommandLineError::UnclosedQuote {
                text: text.trim().to_owned(),
            });
        }
        let (kernel_parameters, init_arguments) = split_at_double_dash(text);
        append_words(&mut self.kernel_parameters, kernel_parameters);
        append_words(&mut self.init_arguments, init_arguments);
        Ok(())
    }

    /// Returns whether `word` is one of the kernel parameters.
    pub fn has_parameter(&self, word: &str) -> bool {
        self.kernel_parameters
            .split_ascii_whitespace()
            .any(|parameter| parameter == word)
    }

    /// Returns whether a kernel parameter is called `name`, with a value or without.
    pub fn names_parameter(&self, name: &str) -> bool {
        self.kernel_words().any(|word| word.name == name)
    }

    /// Returns the words before the `--`.
    pub(crate) fn kernel_words(&self) -> impl Iterator<Item = Word<'_>> {
        Words(&self.kernel_parameters)
    }

    /// Returns the words after the `--`, each of which is an argument of init.
    pub(crate) fn init_words(&self) -> impl Iterator<Item = Word<'_>> {
        Words(&self.init_arguments)
    }

    /// Returns the values of the kernel parameter `name`, in the order in which the kernel reads
    /// them.
    pub fn values_of(&self, name: &str) -> impl Iterator<Item = &str> {
        self.kernel_parameters
            .split_ascii_whitespace()
            .filter_map(move |parameter| parameter.strip_prefix(name)?.strip_prefix('='))
    }

    /// Adds a parameter that describes a virtio-mmio device to a kernel without ACPI or device
    /// tree: `size` bytes of registers at `address`, interrupting on `gsi` (Linux
    /// Documentation/admin-guide/kernel-parameters, `virtio_mmio.device`).
    pub fn add_virtio_mmio_device(&mut self, address: GuestAddress, size: u64, gsi: u32) {
        let size = match size {
            whole if whole % 1024 == 0 => format!("{}K", whole / 1024),
            bytes => bytes.to_string(),
        };
        append_words(
            &mut self.kernel_parameters,
            &format!("virtio_mmio.device={size}@{:#x}:{gsi}", address.0),
        );
    }

    /// Returns the command line as it is in guest memory: NUL-terminated, and at most `limit` bytes
    /// long without the NUL.
    pub(crate) fn to_bytes_with_nul(&self, limit: usize) -> Result<Vec<u8>, CommandLineError> {
        let mut bytes = self.to_string().into_bytes();
        if bytes.len() > limit {
            return Err(CommandLineError::TooLong {
                length: bytes.len(),
                limit,
            });
        }
        bytes.push(0);
        Ok(bytes)
    }
}

impl fmt::Display for CommandLine {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.kernel_parameters)?;
        if !self.init_arguments.is_empty() {
            if !self.kernel_parameters.is_empty() {
                formatter.write_str(" ")?;
            }
            write!(formatter, "-- {}", self.init_arguments)?;
        }
        Ok(())
    }
}

/// A word of a command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Word<'a> {
    /// The part before the first `=`, or the whole word, without the quotes around it.
    pub(crate) name: &'a str,
    /// Whether the word has a `=`.
    pub(crate) has_value: bool,
}

/// Splits a command line into words as `next_arg()` does (Linux lib/cmdline.c): spaces within
/// double quotes do not end a word, and a quote before a word is not part of it.
struct Words<'a>(&'a str);

impl<'a> Iterator for Words<'a> {
    type Item = Word<'a>;

    fn next(&mut self) -> Option<Word<'a>> {
        let text = self.0.trim_start_matches(' ');
        if text.is_empty() {
            return None;
        }
        let mut in_quotes = false;
        let ends_word = |character| {
            in_quotes ^= character == '"';
            character == ' ' && !in_quotes
        };
        let length = text.find(ends_word).unwrap_or(text.len());
        let (word, rest) = text.split_at(length);
        self.0 = rest;
        let unquoted = match word.strip_prefix('"') {
            Some(quoted) => quoted.strip_suffix('"').unwrap_or(quoted),
            None => word,
        };
        // The kernel looks for the `=` from the second character on.
        let sign = unquoted
            .char_indices()
            .skip(1)
            .find(|&(_, character)| character == '=');
        Some(Word {
            name: sign.map_or(unquoted, |(position, _)| &unquoted[..position]),
            has_value: sign.is_some(),
        })
    }
}

/// Splits at the first word `--`, in quotes or not, at which the kernel's `parse_args()` stops.
fn split_at_double_dash(text: &str) -> (&str, &str) {
    let mut words = Words(text);
    loop {
        let before = text.len() - words.0.len();
        match words.next() {
            Some(word) if word.name == "--" && !word.has_value => {
                return (&text[..before], words.0);
            }
            Some(_) => {}
            None => return (text, ""),
        }
    }
}

fn append_words(line: &mut String, words: &str) {
    let words = words.trim();
    if !line.is_empty() && !words.is_empty() {
        line.push(' ');
    }
    line.push_str(words);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn kernel_parameters_stay_before_init_arguments() {
        let mut line = CommandLine::new("console=ttyS0 -- single -v").unwrap();
        line.append("quiet").unwrap();
        line.append("panic=1 -- last").unwrap();
        line.add_virtio_mmio_device(GuestAddress(0xd000_0000), 0x1000, 6);
        assert_eq!(
            line.to_string(),
            "console=ttyS0 quiet panic=1 virtio_mmio.device=4K@0xd0000000:6 -- single -v last"
        );
    }

    #[test]
    fn double_dash_counts_only_as_an_unquoted_word() {
        for text in ["a=-- b", "a \"x -- y\" b", "a--", "--a", "--=", "\"-- \""] {
            let mut line = CommandLine::new(text).unwrap();
            line.append("added").unwrap();
            assert_eq!(line.to_string(), format!("{text} added"));
        }
        let mut line = CommandLine::new("-- init").unwrap();
        assert_eq!(line.to_string(), "-- init");
        line.append("added").unwrap();
        assert_eq!(line.to_string(), "added -- init");
        assert_eq!(CommandLine::new("quiet --").unwrap().to_string(), "quiet");
    }

    #[test]
    fn a_double_dash_in_quotes_ends_the_kernel_parameters_too() {
        let mut line = CommandLine::new("quiet \"--\" -c \"echo a; echo b\"").unwrap();
        line.append("added").unwrap();
        assert_eq!(line.to_string(), "quiet added -- -c \"echo a; echo b\"");
    }

    #[test]
    fn words_are_those_of_the_kernel() {
        let words = |text| -> Vec<_> {
            Words(text)
                .map(|word| (word.name, word.has_value))
                .collect()
        };
        assert_eq!(
            words(" quiet  a.b=1 c=\"d e=f\" \"g=h i\" \"j k\" =l m\"n o\" "),
            [
                ("quiet", false),
                ("a.b", true),
                ("c", true),
                ("g", true),
                ("j k", false),
                ("=l", false),
                ("m\"n o\"", false),
            ]
        );
        assert!(words("  ").is_empty());
    }

    #[test]
    fn a_parameter_is_known_by_its_name() {
        let line = CommandLine::new("a=1 \"b=2 3\" c -- d=4").unwrap();
        assert!(["a", "b", "c"].map(|name| line.names_parameter(name)) == [true; 3]);
        assert!(["d", "a=1", ""].map(|name| line.names_parameter(name)) == [false; 3]);
    }

    #[test]
    fn a_parameter_is_a_whole_word_before_the_double_dash() {
        let line = CommandLine::new("acpi=off  not-quiet loud=quiet -- quiet").unwrap();
        assert!(line.has_parameter("acpi=off") && line.has_parameter("loud=quiet"));
        assert!(!line.has_parameter("quiet") && !line.has_parameter("acpi"));
    }

    #[test]
    fn virtio_mmio_size_is_exact() {
        let mut line = CommandLine::default();
        line.add_virtio_mmio_device(GuestAddress(0x1000), 0x200, 31);
        assert_eq!(line.to_string(), "virtio_mmio.device=512@0x1000:31");
    }

    #[test]
    fn characters_the_kernel_would_misread_are_refused() {
        for (text, character, position) in [("a\0b", '\0', 1), ("a\n", '\n', 1), ("ttyé", 'é', 3)]
        {
            assert_eq!(
                CommandLine::new(text),
                Err(CommandLineError::InvalidCharacter {
                    character,
                    position
                })
            );
        }
        let mut line = CommandLine::new("quiet").unwrap();
        assert!(matches!(
            line.append("init=\"/bin/sh"),
            Err(CommandLineError::UnclosedQuote { .. })
        ));
        assert_eq!(line.to_string(), "quiet");
    }

    #[test]
    fn length_is_checked_without_the_nul() {
        let line = CommandLine::new(&"x".repeat(100)).unwrap();
        assert_eq!(line.to_bytes_with_nul(100).unwrap().len(), 101);
        let error = line.to_bytes_with_nul(99).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the kernel command line is 100 bytes long, but this kernel takes at most 99: \
             shorten it by 1"
        );
    }

    proptest! {
        #[test]
        fn appended_words_are_kernel_parameters(text in "[ -~]{0,80}") {
            if let Ok(mut line) = CommandLine::new(&text) {
                line.append("added").unwrap();
                let line = line.to_string();
                let (kernel_parameters, _) = split_at_double_dash(&line);
                prop_assert!(kernel_parameters.trim_end().ends_with("added"), "{}", line);
            }
        }

        #[test]
        fn any_text_is_accepted_or_refused(text in any::<String>()) {
            if let Ok(line) = CommandLine::new(&text) {
                prop_assert!(line.to_string().is_ascii());
            }
        }
    }
}
