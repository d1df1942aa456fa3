//! The key that leaves a console.

use std::fmt;
use std::str::FromStr;

use anyhow::anyhow;

/// A key: one that is typed with Ctrl, or a character.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Escape {
    /// The key with this letter or sign, from `@` to `_`, and Ctrl.
    Control(u8),
    /// The key with this character of ASCII.
    Plain(u8),
}

impl Escape {
    /// Returns the byte that the terminal sends for the key.
    pub fn byte(self) -> u8 {
        match self {
            Escape::Control(letter) => letter & 0x1f,
            Escape::Plain(byte) => byte,
        }
    }
}

impl Default for Escape {
    fn default() -> Escape {
        Escape::Control(b']')
    }
}

impl FromStr for Escape {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Escape> {
        let invalid = || anyhow!("Invalid string '{text}' for escape sequence");
        match text.as_bytes() {
            [b'^', letter] => match letter.to_ascii_uppercase() {
                letter @ b'@'..=b'_' => Ok(Escape::Control(letter)),
                _ => Err(invalid()),
            },
            [byte] if byte.is_ascii() && *byte != b'^' => Ok(Escape::Plain(*byte)),
            _ => Err(invalid()),
        }
    }
}

impl fmt::Display for Escape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Escape::Control(letter) => {
                let letter = char::from(letter);
                write!(f, "^{letter} (Ctrl + {letter})")
            }
            Escape::Plain(byte) => write!(f, "{}", char::from(byte)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_read_and_shown_as_virsh_does() {
        for (text, byte, shown) in [
            ("^]", 0x1d, "^] (Ctrl + ])"),
            ("^x", 0x18, "^X (Ctrl + X)"),
            ("q", b'q', "q"),
        ] {
            let escape: Escape = text.parse().unwrap();
            assert_eq!(escape.byte(), byte);
            assert_eq!(escape.to_string(), shown);
        }
        assert_eq!("^]".parse::<Escape>().unwrap(), Escape::default());
        for text in ["", "^", "^1", "ab", "^ab", "é"] {
            assert!(text.parse::<Escape>().is_err(), "{text}");
        }
    }
}
