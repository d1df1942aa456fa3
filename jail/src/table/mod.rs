//! The table of the system calls that each role makes.
//!
//! A role has the calls of [`every_thread::CALLS`] and its own, and sockets by what its machine needs of networks. Whatever is
//! not here is refused.

mod every_thread;
mod kvm;
mod other_roles;
mod program;
mod requests;

use libc::c_long;

use crate::role::{Networks, Role};

/// A system call that is allowed.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Rule {
    /// With any arguments.
    Call(c_long),
    /// If the argument of this index is one of these values. Its lower 32 bits count.
    Among(c_long, u8, &'static [u64]),
    /// If the bits `set` of an argument are set, and the bits `clear` are not.
    Bits {
        call: c_long,
        argument: u8,
        set: u64,
        clear: u64,
    },
    /// If the first argument is the number of this process.
    ToItself(c_long),
}

impl Rule {
    /// Returns the number of the call.
    pub(crate) fn call(&self) -> c_long {
        match *self {
            Rule::Call(call)
            | Rule::Among(call, ..)
            | Rule::Bits { call, .. }
            | Rule::ToItself(call) => call,
        }
    }
}

/// Returns what is allowed to a role.
pub(crate) fn rules(role: Role, networks: Networks) -> impl Iterator<Item = &'static Rule> {
    let own: &[&[Rule]] = match role {
        Role::Program => &[
            program::CALLS,
            program::THREADS,
            program::RINGS,
            other_roles::JOB,
            kvm::BUILD,
            kvm::VCPU,
            other_roles::VCPU,
            other_roles::DEVICES,
            other_roles::IMAGE,
            other_roles::MEMORY,
            other_roles::DEBUGGER,
        ],
        Role::Vcpu => &[kvm::VCPU, other_roles::VCPU],
        Role::Devices => &[other_roles::DEVICES, other_roles::IMAGE],
        Role::Image => &[other_roles::IMAGE],
        Role::Job => &[
            other_roles::IMAGE,
            program::THREADS,
            program::RINGS,
            other_roles::JOB,
        ],
        Role::Memory => &[other_roles::MEMORY],
        Role::Debugger => &[other_roles::DEBUGGER],
        Role::Writer => &[],
    };
    let of_networks = sockets(role, networks);
    let all = [every_thread::CALLS].into_iter();
    all.chain(own.iter().copied()).chain(of_networks).flatten()
}

/// Returns the sockets that are allowed to a role.
fn sockets(role: Role, networks: Networks) -> impl Iterator<Item = &'static [Rule]> {
    let is_program = role == Role::Program;
    let is_server = is_program || role == Role::Devices;
    let some = [
        (
            is_server && networks.user || is_program && networks.program,
            other_roles::IP_SOCKETS,
        ),
        (is_program && networks.interfaces, other_roles::INTERFACES),
        (is_server && networks.user, other_roles::NAME_SERVERS),
        (
            (is_server || role == Role::Debugger) && networks.sockets,
            other_roles::SOCKET_FILES,
        ),
        (is_program && networks.namespace, other_roles::NAMESPACE),
        (
            is_program || is_server && networks.streams,
            other_roles::UNIX_SOCKETS,
        ),
    ];
    some.into_iter()
        .filter_map(|(is_needed, rules)| is_needed.then_some(rules))
}

/// Calls that are answered by an error, with that error: those for which there is a way without them.
pub(crate) fn answered(role: Role) -> &'static [(&'static [c_long], i32)] {
    match role {
        // Its flags are in memory, which a filter cannot see. The C library then takes clone.
        Role::Program | Role::Job => &[(&[libc::SYS_clone3], libc::ENOSYS)],
        // A worker whose ring has failed goes on without one.
        Role::Devices => &[(&[libc::SYS_io_uring_setup], libc::EPERM)],
        _ => &[],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_may_do_what_the_threads_do_that_it_starts() {
        for bits in 0..64_u8 {
            let networks = Networks {
                user: bits & 1 != 0,
                program: bits & 2 != 0,
                interfaces: bits & 4 != 0,
                namespace: bits & 8 != 0,
                streams: bits & 16 != 0,
                sockets: bits & 32 != 0,
            };
            let program: Vec<_> = rules(Role::Program, networks)
                .map(|rule| format!("{rule:?}"))
                .collect();
            for role in Role::ALL {
                for rule in rules(role, networks) {
                    let rule = format!("{rule:?}");
                    assert!(program.contains(&rule), "{role:?} {networks:?}: {rule}");
                }
            }
        }
    }
}
