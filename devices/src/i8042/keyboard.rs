//! The keyboard: its answers to commands, and the codes of its keys.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::KeyboardError;

/// How many bytes of scan codes the keyboard remembers.
const KEY_BUFFER_SIZE: usize = 16;

/// Prefix of the code of a released key in scan code set 2.
const BREAK: u8 = 0xf0;
/// Bit in the code of a released key in set 1.
const BREAK_BIT: u8 = 0x80;

const ALT: u8 = 0x11;
const CTRL: u8 = 0x14;
const DEL: u8 = 0x71;
/// Prefix of the codes of keys that the first keyboards did not have, such as Del.
const EXTENDED: u8 = 0xe0;

#[rustfmt::skip]
const CTRL_ALT_DEL: [u8; 11] = [
    CTRL, ALT, EXTENDED, DEL,
    EXTENDED, BREAK, DEL, BREAK, ALT, BREAK, CTRL,
];

mod command {
    pub(super) const SET_LEDS: u8 = 0xed;
    pub(super) const ECHO: u8 = 0xee;
    pub(super) const SCAN_CODE_SET: u8 = 0xf0;
    pub(super) const IDENTIFY: u8 = 0xf2;
    pub(super) const SET_REPEAT: u8 = 0xf3;
    pub(super) const ENABLE_SCANNING: u8 = 0xf4;
    pub(super) const DISABLE_SCANNING: u8 = 0xf5;
    pub(super) const SET_DEFAULTS: u8 = 0xf6;
    pub(super) const RESET: u8 = 0xff;
}

const ACKNOWLEDGE: u8 = 0xfa;
/// The answer to a command that the keyboard does not know.
const RESEND: u8 = 0xfe;
const SELF_TEST_PASSED: u8 = 0xaa;
/// An AT keyboard.
const IDENTITY: [u8; 2] = [0xab, 0x83];
/// Most bytes of an answer.
const MAX_ANSWER_SIZE: usize = 3;
/// The only scan code set that is supported.
const SCAN_CODE_SET_2: u8 = 2;

/// A keyboard that has the keys Ctrl, Alt and Del, in scan code set 2.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Keyboard {
    is_scanning: bool,
    /// Codes of keys, at most [`KEY_BUFFER_SIZE`] bytes.
    keys: VecDeque<u8>,
    /// The rest of the answer to the last command. It is sent before any keys.
    answer: VecDeque<u8>,
    /// The command whose argument is the next byte.
    awaited: Option<u8>,
}

impl Default for Keyboard {
    /// Makes a keyboard as after power-on.
    fn default() -> Keyboard {
        Keyboard {
            is_scanning: true,
            keys: VecDeque::new(),
            answer: VecDeque::new(),
            awaited: None,
        }
    }
}

impl Keyboard {
    /// Checks a keyboard that was restored. The error says what is impossible about it.
    pub(super) fn validate(&self) -> Result<(), String> {
        if self.keys.len() > KEY_BUFFER_SIZE {
            return Err(format!("it has {} bytes of keys", self.keys.len()));
        }
        if self.answer.len() > MAX_ANSWER_SIZE {
            return Err(format!("its answer has {} bytes", self.answer.len()));
        }
        match self.awaited {
            None | Some(command::SET_LEDS | command::SCAN_CODE_SET | command::SET_REPEAT) => Ok(()),
            Some(command) => Err(format!("command {command:#x} has no argument")),
        }
    }

    pub(super) fn press_ctrl_alt_del(&mut self) -> Result<(), KeyboardError> {
        if !self.is_scanning {
            return Err(KeyboardError::Disabled);
        }
        if self.keys.len() + CTRL_ALT_DEL.len() > KEY_BUFFER_SIZE {
            return Err(KeyboardError::Full);
        }
        self.keys.extend(CTRL_ALT_DEL);
        Ok(())
    }

    /// Whether it has something to send.
    pub(super) fn has_bytes(&self) -> bool {
        !self.answer.is_empty() || !self.keys.is_empty()
    }

    /// Handles a byte that the guest sends to the keyboard.
    pub(super) fn command(&mut self, value: u8) {
        let answer: &[u8] = match (self.awaited.take(), value) {
            (Some(command::SCAN_CODE_SET), 0) => &[ACKNOWLEDGE, SCAN_CODE_SET_2],
            (Some(command::SCAN_CODE_SET), SCAN_CODE_SET_2) => &[ACKNOWLEDGE],
            (Some(command::SCAN_CODE_SET), _) => &[RESEND],
            (Some(_), _) => &[ACKNOWLEDGE],
            (None, command::SET_LEDS | command::SCAN_CODE_SET | command::SET_REPEAT) => {
                self.awaited = Some(value);
                &[ACKNOWLEDGE]
            }
            (None, command::ECHO) => &[command::ECHO],
            (None, command::IDENTIFY) => &[ACKNOWLEDGE, IDENTITY[0], IDENTITY[1]],
            (
                None,
                command::ENABLE_SCANNING | command::DISABLE_SCANNING | command::SET_DEFAULTS,
            ) => {
                self.keys.clear();
                match value {
                    command::ENABLE_SCANNING => self.is_scanning = true,
                    command::DISABLE_SCANNING => self.is_scanning = false,
                    _ => {}
                }
                &[ACKNOWLEDGE]
            }
            (None, command::RESET) => {
                *self = Keyboard::default();
                &[ACKNOWLEDGE, SELF_TEST_PASSED]
            }
            (None, _) => &[RESEND],
        };
        self.answer.clear();
        self.answer.extend(answer);
    }

    /// Returns the next byte for the controller, translated to set 1 if `translate` is set.
    pub(super) fn next_byte(&mut self, translate: bool) -> Option<u8> {
        let translated = |byte| if translate { set_1(byte) } else { byte };
        if let Some(byte) = self.answer.pop_front() {
            return Some(translated(byte));
        }
        match self.keys.pop_front()? {
            BREAK if translate => self.keys.pop_front().map(|code| set_1(code) | BREAK_BIT),
            byte => Some(translated(byte)),
        }
    }
}

/// Translates a byte as controllers do, whether it is a scan code or not. Of the bytes that this keyboard
/// sends, only these change.
fn set_1(byte: u8) -> u8 {
    match byte {
        SCAN_CODE_SET_2 => 0x41,
        ALT => 0x38,
        CTRL => 0x1d,
        DEL => 0x53,
        0x83 => 0x41,
        _ => byte,
    }
}

#[cfg(test)]
impl Keyboard {
    /// Queues a byte of a key without checking for room.
    pub(super) fn push_key(&mut self, byte: u8) {
        self.keys.push_back(byte);
    }

    /// Queues an answer of `len` bytes.
    pub(super) fn push_answer(&mut self, len: usize) {
        self.answer.extend(vec![ACKNOWLEDGE; len]);
    }

    /// Makes the next byte the argument of `command`.
    pub(super) fn await_argument(&mut self, command: u8) {
        self.awaited = Some(command);
    }
}
