//! Rules of the table as programs of the kernel's packet filter, which decides about system calls.

use std::collections::BTreeMap;

use libc::c_long;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};

use crate::table::Rule;

/// Compiles a program that lets calls pass that one of `rules` allows, and answers others by `refusal`. The process
/// has the number `pid`.
pub(crate) fn allowing<'a>(
    rules: impl Iterator<Item = &'a Rule>,
    refusal: SeccompAction,
    pid: u32,
) -> Result<BpfProgram, BackendError> {
    let mut calls: BTreeMap<c_long, Calls> = BTreeMap::new();
    for rule in rules {
        let allowed = calls.entry(rule.call()).or_default();
        match conditions(rule, pid)? {
            None => allowed.with_any_arguments = true,
            Some(rules) => allowed.rules.extend(rules),
        }
    }
    // No rules at all mean any arguments.
    let calls = calls.into_iter().map(|(call, allowed)| match allowed {
        Calls {
            with_any_arguments: true,
            ..
        } => (call, Vec::new()),
        Calls { rules, .. } => (call, rules),
    });
    SeccompFilter::new(
        calls.collect(),
        refusal,
        SeccompAction::Allow,
        TargetArch::x86_64,
    )?
    .try_into()
}

/// Compiles a program that answers `calls` with the error `errno`, and lets all others pass.
pub(crate) fn answering(calls: &[c_long], errno: i32) -> Result<BpfProgram, BackendError> {
    SeccompFilter::new(
        calls.iter().map(|&call| (call, Vec::new())).collect(),
        SeccompAction::Allow,
        SeccompAction::Errno(errno.unsigned_abs()),
        TargetArch::x86_64,
    )?
    .try_into()
}

#[derive(Default)]
struct Calls {
    with_any_arguments: bool,
    rules: Vec<SeccompRule>,
}

/// Returns the conditions of a rule, one of which must hold, or `None` if it has none.
fn conditions(rule: &Rule, pid: u32) -> Result<Option<Vec<SeccompRule>>, BackendError> {
    let equal = |argument: u8, value: u64| {
        // The kernel takes the lower half of these arguments only, whatever the upper half is.
        let length = SeccompCmpArgLen::Dword;
        let condition = SeccompCondition::new(argument, length, SeccompCmpOp::Eq, value)?;
        SeccompRule::new(vec![condition])
    };
    Ok(match *rule {
        Rule::Call(_) => None,
        Rule::Among(_, argument, values) => {
            let rules = values.iter().map(|&value| equal(argument, value));
            Some(rules.collect::<Result<_, _>>()?)
        }
        Rule::Bits {
            argument,
            set,
            clear,
            ..
        } => {
            let operator = SeccompCmpOp::MaskedEq(set | clear);
            let length = SeccompCmpArgLen::Qword;
            let condition = SeccompCondition::new(argument, length, operator, set)?;
            Some(vec![SeccompRule::new(vec![condition])?])
        }
        Rule::ToItself(_) => Some(vec![equal(0, pid.into())?]),
    })
}
