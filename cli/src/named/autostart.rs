//! `bantam autostart`.

use super::args::AutostartArgs;
use super::machine;
use crate::message::say;

pub fn autostart(args: &AutostartArgs) -> anyhow::Result<()> {
    let machine = machine(&args.name)?;
    machine.set_autostart(!args.disable)?;
    let name = &args.name;
    match args.disable {
        true => say(format_args!("machine '{name}' is not started any more")),
        false => say(format_args!(
            "machine '{name}' is started by the systemd unit bantam-{name}.service"
        )),
    }
    Ok(())
}
