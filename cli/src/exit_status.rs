//! The exit status of `bantam run`.

use std::process::ExitCode;

use bantam_vmm::ExitReason;
use bantam_vmm::config::ExitStatus;

use crate::main_loop::EndedBy;

/// The guest asked for a restart, and is not started again.
const REBOOT: u8 = 120;
/// The guest's kernel panicked.
const PANIC: u8 = 121;
/// All vCPUs had halted for good.
const HALTED: u8 = 122;
/// The user cut the power.
const POWER_CUT: u8 = 123;
/// There was an error: the status that `env`, `timeout` and container programs use for their own
/// errors.
pub const ERROR: u8 = 125;
/// Replaces a guest's number that is one of the above.
const RESERVED_NUMBER: u8 = 255;

/// The end of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ending {
    pub by: EndedBy,
    pub reason: ExitReason,
}

impl Ending {
    /// Returns the exit status of this end, about the guest or the monitor as `of` says.
    pub fn status(self, of: ExitStatus) -> u8 {
        if of == ExitStatus::Monitor {
            return 0;
        }
        match self.reason {
            ExitReason::PowerOff | ExitReason::Moved => 0,
            // A guest that was asked to end, by keys that ask for a restart, has done so.
            ExitReason::Reboot if self.by == EndedBy::User => 0,
            ExitReason::Reboot => REBOOT,
            ExitReason::Panic => PANIC,
            ExitReason::Number(number @ (REBOOT | PANIC | HALTED | POWER_CUT | ERROR)) => {
                tracing::warn!(
                    "the guest has ended with the number {number}, which is a status of bantam: the exit \
                     status is {RESERVED_NUMBER}"
                );
                RESERVED_NUMBER
            }
            ExitReason::Number(number) => number,
            ExitReason::Halted => HALTED,
            ExitReason::Stopped => POWER_CUT,
            // A reason that this program does not know.
            _ => ERROR,
        }
    }
}

/// Returns the status of an error of `bantam run`.
pub fn of_error(of: ExitStatus) -> ExitCode {
    match of {
        ExitStatus::Guest => ExitCode::from(ERROR),
        ExitStatus::Monitor => ExitCode::FAILURE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(by: EndedBy, reason: ExitReason) -> u8 {
        Ending { by, reason }.status(ExitStatus::Guest)
    }

    #[test]
    fn no_other_end_looks_like_success_or_like_a_number_of_the_guest() {
        let ends = [
            ExitReason::Reboot,
            ExitReason::Panic,
            ExitReason::Halted,
            ExitReason::Stopped,
        ];
        let mut own: Vec<u8> = ends.map(|end| status(EndedBy::Guest, end)).into();
        own.push(ERROR);
        for number in 0..=u8::MAX {
            let status = status(EndedBy::Guest, ExitReason::Number(number));
            assert!(!own.contains(&status), "{number}");
            assert_eq!(status == 0, number == 0);
            assert!(status == number || own.contains(&number), "{number}");
        }
        own.sort_unstable();
        own.dedup();
        assert_eq!(own.len(), 5);
    }

    #[test]
    fn a_guest_that_ends_when_it_is_asked_to_has_not_failed() {
        for reason in [ExitReason::PowerOff, ExitReason::Reboot] {
            assert_eq!(status(EndedBy::User, reason), 0);
        }
        assert_eq!(status(EndedBy::User, ExitReason::Panic), PANIC);
        assert_eq!(status(EndedBy::User, ExitReason::Stopped), POWER_CUT);
        assert_eq!(status(EndedBy::User, ExitReason::Number(3)), 3);
    }

    #[test]
    fn a_status_of_the_monitor_is_0_however_the_guest_ends() {
        for reason in [
            ExitReason::Reboot,
            ExitReason::Panic,
            ExitReason::Number(3),
            ExitReason::Stopped,
        ] {
            let by = EndedBy::Guest;
            assert_eq!(Ending { by, reason }.status(ExitStatus::Monitor), 0);
        }
    }
}
