//! `bantam start`, `shutdown` and `destroy`.

use std::time::Duration;

use anyhow::bail;
use bantam_manager::{RunOrigin, StartOptions};
use bantam_vmm::ShutDown;
use bantam_vmm::config::ShutdownTimeout;

use super::args::{DestroyArgs, ShutdownArgs, StartArgs};
use super::{console, machine};
use crate::message::say;

/// How long a guest may take to shut down before its power is cut, with `--graceful`.
const GRACE: Duration = Duration::from_secs(10);
/// How much longer than its time the end of a machine may take.
const END_TIME: Duration = Duration::from_secs(5);

pub fn start(args: &StartArgs) -> anyhow::Result<()> {
    let machine = machine(&args.name)?;
    let origin = machine.start(&StartOptions {
        force_boot: args.force_boot,
        new_instance: args.new_instance,
    })?;
    if origin == RunOrigin::Restored {
        say(format_args!(
            "machine '{}' goes on from where it was saved",
            args.name
        ));
    }
    match args.console {
        true => console::attach(&machine),
        false => Ok(()),
    }
}

pub fn shutdown(args: &ShutdownArgs) -> anyhow::Result<()> {
    let machine = machine(&args.name)?;
    let timeout = args.timeout.map(ShutdownTimeout::get);
    match machine.shutdown(timeout)? {
        ShutDown::PowerCut if timeout != Some(Duration::ZERO) => say(format_args!(
            "the guest of machine '{}' listens neither to the power button nor to Ctrl-Alt-Del: its power is cut",
            args.name
        )),
        ShutDown::Unheard => bail!(
            "the guest of machine '{0}' cannot be asked to shut down: it is paused, or listens neither to the power \
             button nor to Ctrl-Alt-Del, or not yet; try again later, or end it (bantam destroy {0})",
            args.name
        ),
        ShutDown::PowerButton | ShutDown::CtrlAltDel | ShutDown::PowerCut => {}
    }
    let limit = timeout.map(|timeout| timeout + END_TIME);
    if args.wait && !machine.wait_until_shut_off(limit)? {
        bail!(
            "machine '{0}' has not ended in time; destroy it (bantam destroy {0})",
            args.name
        );
    }
    Ok(())
}

pub fn destroy(args: &DestroyArgs) -> anyhow::Result<()> {
    let grace = args.graceful.then_some(GRACE);
    Ok(machine(&args.name)?.destroy(grace)?)
}
