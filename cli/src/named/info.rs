//! `bantam dominfo`, `domstate`, `domblklist` and `dumpcfg`.

use bantam_manager::{Machine, MachineState, Run, RunOrigin};
use bantam_vmm::config::MachineConfig;
use nix::unistd::Pid;
use serde_json::{Value, json};

use super::args::{DomstateArgs, DumpcfgArgs, Output, OutputArgs};
use super::{facts, machine, print, print_json, table};
use crate::local_time::local_time;

pub fn info(args: &OutputArgs) -> anyhow::Result<()> {
    let machine = machine(&args.name)?;
    let config = machine.config()?;
    let settings = machine.settings()?;
    let state = machine.state()?;
    let run = machine.last_run()?;
    let process = (state != MachineState::ShutOff)
        .then(|| machine.process())
        .flatten();
    let memory = config.memory.bytes() >> 10;
    let has_save = machine.has_managed_save();
    if args.output == Output::Json {
        return print_json(&json!({
            "name": args.name,
            "id": settings.id,
            "instance-id": settings.instance_id,
            "state": state.as_str(),
            "process": process.map(Pid::as_raw),
            "vcpus": config.cpus.get(),
            "memory-kib": memory,
            "autostart": machine.is_autostarted(),
            "restart": settings.restart,
            "template": settings.template,
            "managed-save": has_save,
            "current-snapshot": settings.current_snapshot,
            "last-run": run,
            "machine-file": machine.machine_file(),
            "log": machine.log(),
        }));
    }
    let yes = |is: bool| if is { "yes" } else { "no" }.to_owned();
    let enabled = |is: bool| if is { "enable" } else { "disable" }.to_owned();
    let mut lines = vec![
        ("Name", args.name.to_string()),
        ("UUID", settings.id),
        ("State", state.as_str().to_owned()),
        ("CPU(s)", config.cpus.get().to_string()),
        ("Max memory", format!("{memory} KiB")),
        ("Autostart", enabled(machine.is_autostarted())),
        ("Restart", settings.restart.to_string()),
        ("Managed save", yes(has_save)),
    ];
    if settings.template {
        lines.push(("Template", yes(true)));
    }
    if let Some(id) = settings.instance_id {
        lines.push(("Instance id", id));
    }
    if let Some(process) = process {
        lines.push(("Process", process.to_string()));
    }
    if let Some(run) = &run {
        lines.push(("Started", local_time(run.started)));
        if run.restarts > 0 {
            lines.push(("Restarts", run.restarts.to_string()));
        }
        if run.end.is_some() {
            lines.push(("Ended", ending(run)));
        }
    }
    if let Some(snapshot) = settings.current_snapshot {
        lines.push(("Snapshot", snapshot));
    }
    lines.push(("Machine file", machine.machine_file().display().to_string()));
    lines.push(("Log", machine.log().display().to_string()));
    print(&facts(&lines))
}

/// Says how and when a run has ended.
fn ending(run: &Run) -> String {
    let Some(end) = &run.end else {
        return String::new();
    };
    let mut text = match end.time {
        Some(time) => format!("{} ({})", local_time(time), end.reason),
        None => end.reason.to_string(),
    };
    if let Some(detail) = &end.detail {
        text = format!("{text}: {detail}");
    }
    text
}

pub fn state(args: &DomstateArgs) -> anyhow::Result<()> {
    let machine = machine(&args.name)?;
    let state = machine.state()?;
    let run = machine.last_run()?;
    if args.output == Output::Json {
        return print_json(&json!({
            "name": args.name,
            "state": state.as_str(),
            "reason": reason(state, run.as_ref()),
            "last-run": run,
        }));
    }
    let state_text = state.as_str();
    print(&match reason(state, run.as_ref()) {
        Some(reason) if args.reason => format!("{state_text} ({reason})\n"),
        _ => format!("{state_text}\n"),
    })
}

/// Says what has led to a state.
fn reason(state: MachineState, run: Option<&Run>) -> Option<String> {
    let run = run?;
    match state {
        MachineState::ShutOff => run.end.as_ref().map(|end| end.reason.to_string()),
        MachineState::Running => Some(
            match run.origin {
                RunOrigin::Booted => "booted",
                RunOrigin::Restored => "restored",
                RunOrigin::Reverted => "from snapshot",
                RunOrigin::Migrated => "migrated",
            }
            .to_owned(),
        ),
        MachineState::Paused => Some("user".to_owned()),
        MachineState::Starting | MachineState::Ending | MachineState::Unresponsive => None,
    }
}

/// Returns the configuration of a machine: as it runs, or as it will.
pub fn present_config(machine: &Machine) -> anyhow::Result<MachineConfig> {
    Ok(match machine.is_active()? {
        true => machine.live_config()?,
        false => machine.process_config()?,
    })
}

pub fn disks(args: &OutputArgs) -> anyhow::Result<()> {
    let config = present_config(&machine(&args.name)?)?;
    let disks = config.disk_names().zip(&config.disks);
    if args.output == Output::Json {
        let disks = disks.map(|(name, disk)| {
            json!({
                "name": name,
                "source": disk.path.to_string_lossy(),
                "readonly": disk.readonly,
            })
        });
        return print_json(&disks.collect::<Vec<Value>>());
    }
    let mut rows = vec![vec!["Target".to_owned(), "Source".to_owned()]];
    rows.extend(disks.map(|(name, disk)| vec![name.to_string(), disk.path.display().to_string()]));
    print(&table(&rows))
}

pub fn dump(args: &DumpcfgArgs) -> anyhow::Result<()> {
    let machine = machine(&args.name)?;
    let text = match args.live {
        true => machine.live_config()?.to_toml(),
        false => machine.machine_file_text()?,
    };
    print(&text)
}
