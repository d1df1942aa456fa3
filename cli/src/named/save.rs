//! `bantam save` and `managedsave`, and `bantam restore` of what they have written.

use bantam_manager::{MachineName, saved_machine};

use super::args::{ManagedsaveArgs, SaveArgs};
use super::machine;
use crate::args::RestoreArgs;
use crate::message::say;

pub fn save(args: &SaveArgs) -> anyhow::Result<()> {
    machine(&args.name)?.save(&args.directory)?;
    say_saved(&args.name);
    Ok(())
}

pub fn managed_save(args: &ManagedsaveArgs) -> anyhow::Result<()> {
    let machine = machine(&args.name)?;
    if args.remove {
        return Ok(machine.remove_managed_save()?);
    }
    machine.managed_save()?;
    say_saved(&args.name);
    Ok(())
}

fn say_saved(name: &MachineName) {
    say(format_args!("machine '{name}' is saved"));
}

/// Starts a named machine again from the state that `bantam save` has written. Returns `None` if it is another state, or
/// is to be used for another machine.
pub fn restore(args: &RestoreArgs) -> Option<anyhow::Result<()>> {
    if !args.is_plain() {
        return None;
    }
    let name = saved_machine(&args.directory)?;
    Some(machine(&name).and_then(|machine| Ok(machine.restore(&args.directory)?)))
}
