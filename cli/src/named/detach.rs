//! Keys by which a user detaches from a console whose other keys go to the guest.

/// The key that starts a command.
const CTRL_A: u8 = 0x01;
/// The key that detaches by itself, as in virsh and telnet: Ctrl-].
const CTRL_BRACKET: u8 = 0x1d;

/// The list of keys, for a user who asks for it.
pub const HELP: &str = "\
Ctrl-]     detach; the machine goes on
Ctrl-A d   detach
Ctrl-A h   this help
Ctrl-A a   send Ctrl-A to the guest (also Ctrl-A Ctrl-A)";

/// What the user wants beside typing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// To detach. Keys after that are not for the guest.
    Detach,
    /// The list of keys.
    Help,
}

/// Which keys are not for the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Keys {
    /// Ctrl-], and those that Ctrl-A begins.
    #[default]
    Own,
    /// One that detaches.
    Escape(u8),
}

/// Finds commands among the bytes typed.
#[derive(Debug, Default)]
pub struct DetachFilter {
    keys: Keys,
    after_prefix: bool,
}

impl DetachFilter {
    /// Returns a filter that finds these keys.
    pub fn new(keys: Keys) -> DetachFilter {
        DetachFilter {
            keys,
            after_prefix: false,
        }
    }

    /// Takes bytes that were typed, adds those for the guest to `keys`, and returns what the user wants.
    pub fn take(&mut self, typed: &[u8], keys: &mut Vec<u8>) -> Option<Wish> {
        if let Keys::Escape(escape) = self.keys {
            let end = typed.iter().position(|&byte| byte == escape);
            keys.extend(typed.iter().take(end.unwrap_or(typed.len())));
            return end.map(|_| Wish::Detach);
        }
        let mut wish = None;
        for &byte in typed {
            let after_prefix = std::mem::take(&mut self.after_prefix);
            match byte {
                CTRL_BRACKET => return Some(Wish::Detach),
                CTRL_A if !after_prefix => self.after_prefix = true,
                byte if !after_prefix => keys.push(byte),
                b'd' => return Some(Wish::Detach),
                b'h' => wish = Some(Wish::Help),
                b'a' | CTRL_A => keys.push(CTRL_A),
                byte => keys.extend([CTRL_A, byte]),
            }
        }
        wish
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn taken(typed: &[u8]) -> (Vec<u8>, Option<Wish>) {
        let mut keys = Vec::new();
        let wish = DetachFilter::default().take(typed, &mut keys);
        (keys, wish)
    }

    #[test]
    fn two_ways_lead_out_and_all_else_is_for_the_guest() {
        assert_eq!(taken(b"ls\x1dx"), (b"ls".to_vec(), Some(Wish::Detach)));
        assert_eq!(taken(b"ls\x01dx"), (b"ls".to_vec(), Some(Wish::Detach)));
        assert_eq!(taken(b"d\x01a\x01\x01"), (b"d\x01\x01".to_vec(), None));
        assert_eq!(taken(b"\x01h"), (Vec::new(), Some(Wish::Help)));
        assert_eq!(taken(b"\x01b"), (b"\x01b".to_vec(), None));
    }

    #[test]
    fn with_one_escape_key_all_others_are_for_the_guest() {
        let mut filter = DetachFilter::new(Keys::Escape(b'x'));
        let mut keys = Vec::new();
        assert_eq!(filter.take(b"\x01d\x1d", &mut keys), None);
        assert_eq!(filter.take(b"ax\x01", &mut keys), Some(Wish::Detach));
        assert_eq!(keys, b"\x01d\x1da");
    }

    #[test]
    fn a_command_may_come_in_two_pieces() {
        let mut filter = DetachFilter::default();
        let mut keys = Vec::new();
        assert_eq!(filter.take(b"\x01", &mut keys), None);
        assert_eq!(filter.take(b"d", &mut keys), Some(Wish::Detach));
        assert!(keys.is_empty());
    }

    proptest! {
        #[test]
        fn bytes_without_commands_pass_unchanged(typed in proptest::collection::vec(0x20_u8.., 0..100)) {
            prop_assert_eq!(taken(&typed), (typed, None));
        }
    }
}
