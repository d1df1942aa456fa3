//! The process of a named machine.

use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use bantam_manager::{Folders, Machine, MachineName, MachineProcess, ProcessLog, RunOrigin};
use bantam_vmm::ExitReason;
use bantam_vmm::config::{MachineConfig, OnReboot};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};

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
    close_others(&args.connection);
    let connections: Vec<_> = args
        .connection
        .into_iter()
        .filter_map(adopt_connection)
        .collect();
    raise_descriptor_limit();
    let origin = match (&args.from, args.reverted) {
        (None, _) if !connections.is_empty() => RunOrigin::Migrated,
        (None, _) => RunOrigin::Booted,
        (Some(_), false) => RunOrigin::Restored,
        (Some(_), true) => RunOrigin::Reverted,
    };
    let folders = Folders {
        machines: args.machines,
        runtime: args.runtime,
        units: None,
    };
    let mut process = match MachineProcess::enter(&folders, args.name.clone(), origin) {
        Ok(process) => process,
        Err(error) => {
            report(&error.into());
            return ExitCode::FAILURE;
        }
    };
    let log = log::of_process(ProcessLog::of(process.machine()));
    let limited = process.limit().map_err(anyhow::Error::from);
    let prepared = limited.and_then(|()| match connections.is_empty() {
        false => prepare_arrival(folders, args.name, connections),
        true => prepare(
            process.machine(),
            args.from.as_deref().map(|from| (from, origin)),
        ),
    });
    let ended = prepared.and_then(|(config, origin)| run_machine(&process, &config, origin, log));
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

/// Takes the connection that this process has inherited with the number `number`.
fn adopt_connection(number: RawFd) -> Option<OwnedFd> {
    let is_open = number > 2 && Path::new(&format!("/proc/self/fd/{number}")).exists();
    // SAFETY: the descriptor is open and was inherited, as this process has opened none yet. So nothing else in it owns it.
    let connection = is_open.then(|| unsafe { OwnedFd::from_raw_fd(number) })?;
    // Programs that this process starts must not hold it open.
    fcntl(&connection, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).ok()?;
    Some(connection)
}

/// Runs the machine.
fn run_machine(
    process: &MachineProcess,
    config: &MachineConfig,
    origin: Origin,
    log: LargeLog,
) -> anyhow::Result<u8> {
    let machine = process.machine();
    // Commands name files later, and find this process by its open files.
    let confinement = Confinement {
        is_visible: true,
        ..Confinement::of_machine(config, None)
    };
    confinement.enter()?;
    message::start()?;
    log::keep_small(log).context("cannot start the thread that keeps the log small")?;
    let owner = Background {
        process,
        restarts_on_reboot: config.on_reboot == OnReboot::Restart,
    };
    tracing::info!("machine '{}' is started", machine.name());
    run::run(config, origin, Some(&machine.control_socket()), &owner)
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

/// Returns a machine that arrives from another process or host, with its configuration here.
fn prepare_arrival(
    folders: Folders,
    name: MachineName,
    connections: Vec<OwnedFd>,
) -> anyhow::Result<(MachineConfig, Origin)> {
    let (arrival, config) = Machine::open_arrival(&folders, &name, connections)?;
    let origin = Origin::Arrival {
        arrival: Box::new(arrival),
        settle: Box::new(move || Machine::settle(&folders, &name)),
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
