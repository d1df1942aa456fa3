//! Filters of system calls.

use std::io;
use std::process;

use seccompiler::{BpfProgram, SeccompAction, apply_filter};

use crate::FilterError;
use crate::compile::{allowing, answering};
use crate::role::{Networks, Role};
use crate::table;

/// What happens when a thread makes a system call that its filter does not allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Violation {
    /// The thread gets SIGSYS, which ends the process, and [`report_violations`](crate::report_violations) says why.
    Kill,
    /// The call is made, and the kernel's audit log gets a line.
    Log,
}

/// A filter of the system calls of threads in one role.
#[derive(Debug)]
pub struct Filter {
    programs: Vec<BpfProgram>,
}

impl Filter {
    /// Makes the filter of a role. It is for threads of this process only.
    pub fn new(role: Role, networks: Networks, violation: Violation) -> Filter {
        let refusal = match violation {
            Violation::Kill => SeccompAction::Trap,
            Violation::Log => SeccompAction::Log,
        };
        let rules = table::rules(role, networks);
        let allowed = allowing(rules, refusal, process::id());
        let answered = table::answered(role);
        let mut programs: Vec<_> = answered
            .iter()
            .map(|(calls, errno)| answering(calls, *errno))
            .collect();
        programs.push(allowed);
        let programs = programs.into_iter().collect::<Result<_, _>>();
        Filter {
            programs: programs.expect("the rules of the table fit into a program"),
        }
    }

    /// Returns whether the kernel has filters.
    pub fn are_available() -> bool {
        let action = libc::SECCOMP_RET_TRAP;
        // SAFETY: the kernel reads the number of an action, which lives until the call returns.
        let answer = unsafe {
            libc::syscall(
                libc::SYS_seccomp,
                libc::SECCOMP_GET_ACTION_AVAIL,
                0,
                &raw const action,
            )
        };
        answer == 0
    }

    /// Confines the calling thread, and the threads that it starts from now on, to what this filter allows. The
    /// process cannot gain privileges by executing programs any more.
    ///
    /// # Errors
    /// If the kernel refuses. The thread may be confined in part then.
    pub fn apply(&self) -> Result<(), FilterError> {
        for program in &self.programs {
            apply_filter(program).map_err(|error| {
                FilterError::Install(match error {
                    seccompiler::Error::Prctl(error) | seccompiler::Error::Seccomp(error) => error,
                    other => io::Error::other(other),
                })
            })?;
        }
        Ok(())
    }
}
