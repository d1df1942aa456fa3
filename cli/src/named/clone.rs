//! `bantam clone` and `template`.

use std::io::{self, IsTerminal};

use bantam_manager::{CloneStorage, Manager};
use bantam_storage::tools::Job;

use super::args::{CloneArgs, TemplateArgs};
use super::create::start_new;
use crate::image::{Progress, cancel_on_signal};
use crate::message::say;

pub fn clone(args: &CloneArgs) -> anyhow::Result<()> {
    let cancelled = cancel_on_signal()?;
    let manager = Manager::of_user()?;
    let source = manager.machine(&args.name)?;
    let storage = match (args.linked, args.full) {
        (true, _) => CloneStorage::Linked,
        (_, true) => CloneStorage::Full,
        _ if source.settings()?.template => CloneStorage::Linked,
        _ => CloneStorage::Full,
    };
    let shown = storage == CloneStorage::Full && io::stdout().is_terminal();
    let progress = Progress::new(shown);
    let cloned = manager.clone_machine(
        &source,
        &args.new_name,
        storage,
        Job {
            progress: &|share| progress.set(share),
            cancelled,
        },
    );
    drop(progress);
    let cloned = cloned?;
    for (old, new) in &cloned.moved {
        say(format_args!(
            "what '{}' is for machine '{}' is '{}' for machine '{}'",
            old.display(),
            args.name,
            new.display(),
            args.new_name
        ));
    }
    if args.start {
        start_new(&cloned.machine)?;
    }
    Ok(())
}

pub fn template(args: &TemplateArgs) -> anyhow::Result<()> {
    let manager = Manager::of_user()?;
    let machine = manager.machine(&args.name)?;
    Ok(manager.set_template(&machine, !args.off)?)
}
