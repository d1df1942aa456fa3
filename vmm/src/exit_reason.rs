//! Why a machine has ended.

use std::fmt;

use bantam_arch::layout;
use bantam_boot::CommandLine;
use bantam_memory::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

/// Why a machine has ended, if its guest or its owner ended it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ExitReason {
    /// The guest switched it off.
    PowerOff,
    /// The guest asked for a restart.
    Reboot,
    /// The guest's kernel panicked, whether or not it restarted afterwards.
    Panic,
    /// The guest ended it by writing this number to the port [`layout::EXIT_PORT`].
    Number(u8),
    /// All its vCPUs had halted with interrupts off, and [`OnHalt::Exit`](crate::config::OnHalt) was
    /// asked for.
    Halted,
    /// Its power was cut from outside, by [`Command::Stop`](crate::Command::Stop) or at the end of the
    /// time that [`Command::ShutDown`](crate::Command::ShutDown) gave the guest.
    Stopped,
    /// It has moved to another process or host, and goes on there.
    Moved,
}

impl fmt::Display for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => f.write_str("the guest has powered off"),
            Self::Reboot => f.write_str("the guest has rebooted"),
            Self::Panic => f.write_str("the guest has panicked"),
            Self::Number(number) => write!(f, "the guest has ended with the number {number}"),
            Self::Halted => f.write_str("the guest has halted"),
            Self::Stopped => f.write_str("the power was cut"),
            Self::Moved => f.write_str("the machine has moved"),
        }
    }
}

/// The value that a guest leaves at [`layout::WARM_BOOT_WORD`] when it restarts after a panic, but not when
/// it restarts of its own accord.
///
/// Before Linux resets a PC, it writes there which of two ways of booting it wants the firmware to take, and
/// it can be told to use a different one after a panic
/// (`Documentation/admin-guide/kernel-parameters.txt`, `reboot=`). There is no firmware here to read the
/// word, so it is free to tell the two apart in a kernel that has no driver for a panic device.
const PANIC_WORD: u16 = 0x1234;

/// The parameter that has Linux (since 5.2) leave [`PANIC_WORD`] after a panic. It goes before any other
/// value of `reboot=`, because older kernels take its first letter for a way to reset the machine.
pub(crate) const PANIC_PARAMETER: &str = "panic_warm";

/// Whether a kernel with this command line leaves [`PANIC_WORD`] after a panic, and only then.
pub(crate) fn tells_panics(line: &CommandLine) -> bool {
    let (mut normal, mut panic) = (None, None);
    for value in line.values_of("reboot") {
        for word in value.split(',') {
            // The kernel looks only at the first letter of each, and the last one counts.
            let (mode, word) = match word.strip_prefix("panic_") {
                Some(word) => (&mut panic, word),
                None => (&mut normal, word),
            };
            if let Some(letter @ ('w' | 'c' | 'h' | 's' | 'g')) = word.chars().next() {
                *mode = Some(letter);
            }
        }
    }
    panic == Some('w') && normal != Some('w')
}

/// Whether the guest has left [`PANIC_WORD`].
pub(crate) fn has_told_panic(memory: &GuestMemory) -> bool {
    let word = memory.read_obj::<u16>(GuestAddress(layout::WARM_BOOT_WORD));
    word.is_ok_and(|word| u16::from_le(word) == PANIC_WORD)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_word_that_means_a_panic_counts_as_one() {
        for (line, tells) in [
            ("", false),
            ("reboot=k", false),
            ("panic=-1 reboot=panic_warm,k", true),
            ("reboot=k,panic_warm console=ttyS0", true),
            ("reboot=panic_w", true),
            ("reboot=panic_warm reboot=t", true),
            ("reboot=panic_warm reboot=panic_cold", false),
            ("reboot=panic_warm,warm", false),
            ("reboot=warm reboot=panic_warm,cold", true),
            ("reboot=warm", false),
            ("-- reboot=panic_warm", false),
        ] {
            let line = CommandLine::new(line).unwrap();
            assert_eq!(tells_panics(&line), tells, "{line}");
        }
    }
}
