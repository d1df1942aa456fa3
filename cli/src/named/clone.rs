//! `bantam clone` and `template`.

use std::io::{self, IsTerminal};

use bantam_manager::{CloneStorage, Manager};
use bantam_storage::tools::Job;

use super::args::{CloneArgs, TemplateArgs};
use super::create::start_new;
use super::print;
use super::sysprep::text_of;
use crate::image::{Progress, cancel_on_signal};
use crate::message::say;

pub fn clone(args: &CloneArgs) -> anyhow::Result<()> {
    let cancelled = cancel_on_signal()?;
    let manager = Manager::of_user()?;
    let source = manager.machine(&args.name)?;
    let is_template = source.settings()?.template;
    let storage = match (args.linked, args.full) {
        (true, _) => CloneStorage::Linked,
        (_, true) => CloneStorage::Full,
        _ if is_template => CloneStorage::Linked,
        _ => CloneStorage::Full,
    };
    let is_chosen = args.reset_identity || args.chosen.operations.is_some();
    let reset =
        match is_chosen || (is_template && !args.keep_identity) {
            true => Some(args.chosen.to_reset(None).map_err(|error| {
                match is_chosen {
            true => error,
            false => error.context(format!(
                "cannot reset the identity of the system (--keep-identity leaves it that of '{}')",
                args.name
            )),
        }
            })?),
            false => None,
        };
    let shown = storage == CloneStorage::Full && io::stdout().is_terminal();
    let progress = Progress::new(shown);
    let cloned = manager.clone_machine(
        &source,
        &args.new_name,
        storage,
        reset.as_ref(),
        Job {
            progress: &|share| progress.set(share),
            cancelled,
        },
    );
    drop(progress);
    let cloned = cloned?;
    if let Some(report) = &cloned.report {
        print(&text_of(report))?;
    }
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
