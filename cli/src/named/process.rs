//! The process of a named machine.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use bantam_manager::{Folders, Machine, MachineProcess, ProcessLog, RunOrigin};
use bantam_vmm::ExitReason;
use bantam_vmm::config::{MachineConfig, OnReboot};

use super::args::ProcessArgs;
use crate::confine::Confinement;
use crate::exit_status::Ending;
use crate::log::{self, LargeLog};
use crate::main_loop::EndedBy;
use crate::run::{self, Origin, Owner};
use crate::{close_others, message, raise_descriptor_limit, reason, report};

/// Runs a named machine until it ends for good.
pub fn run(args: ProcessArgs) -> ExitCode {
    // The machine must not keep the pipes and locks of whoever has started it. Nothing else is open yet.
    close_others(None);
    raise_descriptor_limit();
    let origin = match (&args.from, args.reverted) {
        (None, _) => RunOrigin::Booted,
        (Some(_), false) => RunOrigin::Restored,
        (Some(_), true) => RunOrigin::Reverted,
    };
    let folders = Folders {
        machines: args.machines,
        runtime: args.runtime,
        units: None,
    };
    let mut process = match MachineProcess::enter(&folders, args.name, origin) {
        Ok(process) => process,
        Err(error) => {
            report(&error.into());
            return ExitCode::FAILURE;
        }
    };
    let log = log::of_process(ProcessLog::of(process.machine()));
    let from = args.from.as_deref().map(|from| (from, origin));
    let ended = process
        .limit()
        .map_err(anyhow::Error::from)
        .and_then(|()| run_machine(&process, from, log));
    if let Err(error) = &ended {
        report(error);
        process.say_failed(&reason(error));
    }
    process.leave();
    match ended {
        Ok(status) => ExitCode::from(status),
        Err(_) => ExitCode::FAILURE,
    }
}

/// Runs the machine, from a state in a directory if there is one.
fn run_machine(
    process: &MachineProcess,
    from: Option<(&Path, RunOrigin)>,
    log: LargeLog,
) -> anyhow::Result<u8> {
    let machine = process.machine();
    let (config, origin) = prepare(machine, from)?;
    // Commands name files later, and find this process by its open files.
    let confinement = Confinement {
        is_visible: true,
        ..Confinement::of_machine(&config, None)
    };
    confinement.enter()?;
    message::start()?;
    log::keep_small(log).context("cannot start the thread that keeps the log small")?;
    let owner = Background {
        process,
        restarts_on_reboot: config.on_reboot == OnReboot::Restart,
    };
    tracing::info!("machine '{}' is started", machine.name());
    run::run(&config, origin, Some(&machine.control_socket()), &owner)
}

fn prepare(
    machine: &Machine,
    from: Option<(&Path, RunOrigin)>,
) -> anyhow::Result<(MachineConfig, Origin)> {
    let Some((directory, origin)) = from else {
        let config = machine.process_config()?;
        config.validate()?;
        return Ok((config, Origin::Boot));
    };
    let opened = machine.open_state(directory, origin);
    let (snapshot, config) =
        opened.with_context(|| format!("cannot go on from '{}'", directory.display()))?;
    let origin = Origin::Snapshot {
        snapshot: Arc::new(snapshot),
        paused: false,
    };
    Ok((config, origin))
}

/// A named machine as its process runs it.
struct Background<'a> {
    process: &'a MachineProcess,
    restarts_on_reboot: bool,
}

impl Owner for Background<'_> {
    fn started(&self) {
        self.process.say_running();
    }

    fn ended(&self, ending: Ending) {
        self.process.ended(match (ending.by, ending.reason) {
            // A guest that was asked to end, by keys that ask for a restart, has done so.
            (EndedBy::User, ExitReason::Reboot) => ExitReason::PowerOff,
            (_, reason) => reason,
        });
    }

    fn restarts_after(&self, reason: ExitReason) -> bool {
        self.process.restarts_after(reason, self.restarts_on_reboot)
    }

    fn restarts_after_error(&self) -> bool {
        self.process.restarts_after_error()
    }

    fn restarted(&self) {
        self.process.restarted();
    }
}
