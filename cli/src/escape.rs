//! Commands that a user types on a terminal whose other keys go to the guest.

/// The key that starts a command.
pub const CTRL_A: u8 = 0x01;

/// The list of commands, for a user who asks for it.
pub const HELP: &str = "\
Ctrl-A x   quit
Ctrl-A h   this help
Ctrl-A a   send Ctrl-A to the guest (also Ctrl-A Ctrl-A)";

/// The meaning of a typed byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// The first half of a command: nothing yet.
    Prefix,
    /// This byte is for the guest.
    Guest(u8),
    /// It did not complete a command: Ctrl-A and this byte are for the guest.
    NoCommand(u8),
    /// The user wants to quit.
    Quit,
    /// The user wants the list of commands.
    Help,
}

/// Finds commands among the bytes typed.
#[derive(Debug, Default)]
pub struct EscapeFilter {
    after_prefix: bool,
}

impl EscapeFilter {
    /// Takes the next byte typed.
    pub fn next(&mut self, byte: u8) -> Key {
        let after_prefix = std::mem::take(&mut self.after_prefix);
        match byte {
            CTRL_A if !after_prefix => {
                self.after_prefix = true;
                Key::Prefix
            }
            byte if !after_prefix => Key::Guest(byte),
            b'x' => Key::Quit,
            b'h' => Key::Help,
            b'a' | CTRL_A => Key::Guest(CTRL_A),
            byte => Key::NoCommand(byte),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn keys(typed: &[u8]) -> Vec<Key> {
        let mut filter = EscapeFilter::default();
        typed
            .iter()
            .map(|&byte| filter.next(byte))
            .filter(|&key| key != Key::Prefix)
            .collect()
    }

    #[test]
    fn commands_start_with_ctrl_a() {
        assert_eq!(keys(b"x\x01x"), [Key::Guest(b'x'), Key::Quit]);
        assert_eq!(keys(b"\x01hh"), [Key::Help, Key::Guest(b'h')]);
    }

    #[test]
    fn ctrl_a_itself_can_be_sent() {
        assert_eq!(keys(b"\x01ax"), [Key::Guest(CTRL_A), Key::Guest(b'x')]);
        assert_eq!(keys(b"\x01\x01x"), [Key::Guest(CTRL_A), Key::Guest(b'x')]);
    }

    #[test]
    fn other_keys_after_ctrl_a_are_not_lost() {
        assert_eq!(keys(b"\x01bx"), [Key::NoCommand(b'b'), Key::Guest(b'x')]);
    }

    proptest! {
        #[test]
        fn bytes_without_ctrl_a_pass_unchanged(typed in proptest::collection::vec(2u8.., 0..100)) {
            let expected: Vec<_> = typed.iter().copied().map(Key::Guest).collect();
            prop_assert_eq!(keys(&typed), expected);
        }
    }
}
