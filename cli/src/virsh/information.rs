//! Commands that show what is known of machines.

use std::fs;
use std::os::unix::fs::FileTypeExt;

use bantam_manager::{EndReason, Entry, Machine, MachineState, Manager, Run, RunOrigin, Usage};
use bantam_network::Networks;
use bantam_vmm::config::{DiskConfig, MachineConfig, NetConfig};

use super::Session;
use super::args::Arguments;
use super::domains::{domain, find, id_of};
use crate::named;

/// Returns a state in the words and with the number (`virDomainState`) of libvirt.
fn state_of(state: MachineState) -> (u32, &'static str) {
    match state {
        MachineState::Unresponsive => (0, "no state"),
        MachineState::Running => (1, "running"),
        // What libvirt builds is paused until its guest runs.
        MachineState::Starting | MachineState::Paused => (3, "paused"),
        MachineState::Ending => (4, "in shutdown"),
        MachineState::ShutOff => (5, "shut off"),
    }
}

/// Returns what has led to a state, in the words and with the number of libvirt.
fn reason_of(state: MachineState, run: Option<&Run>) -> (u32, &'static str) {
    const UNKNOWN: (u32, &str) = (0, "unknown");
    match state {
        MachineState::Unresponsive | MachineState::Ending => UNKNOWN,
        MachineState::Starting => (11, "starting up"),
        MachineState::Paused => (1, "user"),
        MachineState::Running => match run.map(|run| run.origin) {
            Some(RunOrigin::Booted) => (1, "booted"),
            Some(RunOrigin::Migrated) => (2, "migrated"),
            Some(RunOrigin::Restored) => (3, "restored"),
            Some(RunOrigin::Reverted) => (4, "from snapshot"),
            None => UNKNOWN,
        },
        MachineState::ShutOff => {
            let end = run.and_then(|run| run.end.as_ref());
            match end.map(|end| end.reason) {
                None => UNKNOWN,
                Some(
                    EndReason::PoweredOff
                    | EndReason::Rebooted
                    | EndReason::Halted
                    | EndReason::Number(_),
                ) => (1, "shutdown"),
                Some(EndReason::Destroyed) => (2, "destroyed"),
                Some(EndReason::Moved) => (4, "migrated"),
                Some(EndReason::Crashed | EndReason::Killed) => (3, "crashed"),
                Some(EndReason::Saved) => (5, "saved"),
                Some(EndReason::HostError) => (6, "failed"),
                Some(EndReason::Reverted) => (7, "from snapshot"),
            }
        }
    }
}

/// Whether a machine is one of those that `list` is asked for.
fn is_listed(entry: &Entry, arguments: &Arguments) -> bool {
    let machine = &entry.machine;
    let is_active = entry.state != MachineState::ShutOff;
    let all = arguments.has("all");
    let by_activity = match is_active {
        true => all || !arguments.has("inactive"),
        false => all || arguments.has("inactive"),
    };
    let is_one_of = |flags: &[(&str, bool)]| {
        let given: Vec<_> = flags
            .iter()
            .filter(|(flag, _)| arguments.has(flag))
            .collect();
        given.is_empty() || given.iter().any(|(_, is_so)| *is_so)
    };
    let (number, _) = state_of(entry.state);
    let is_autostarted = machine.is_autostarted();
    let has_save = machine.has_managed_save();
    let is_transient = machine.is_transient();
    by_activity
        && is_one_of(&[
            ("state-running", number == 1),
            ("state-paused", number == 3),
            ("state-shutoff", number == 5),
            ("state-other", ![1, 3, 5].contains(&number)),
        ])
        && is_one_of(&[
            ("autostart", is_autostarted),
            ("no-autostart", !is_autostarted),
        ])
        && is_one_of(&[("persistent", !is_transient), ("transient", is_transient)])
        && is_one_of(&[
            ("with-managed-save", has_save),
            ("without-managed-save", !has_save),
        ])
}

pub fn list(session: &mut Session, arguments: &Arguments) -> anyhow::Result<()> {
    let wants_inactive = arguments.has("all") || arguments.has("inactive");
    let entries = Manager::of_user()?.list(wants_inactive)?;
    let listed = entries.into_iter().filter(|it| is_listed(it, arguments));
    let mut listed: Vec<_> = listed.map(|it| (id_of(&it.machine), it)).collect();
    // Those that run come first, in the order of their ids; the others are in the order of their names.
    listed.sort_by_key(|(id, _)| id.parse().unwrap_or(u32::MAX));
    let columns = ["id", "uuid", "name"].map(|column| arguments.has(column));
    if let [false, false, false] = columns {
        let heading = match arguments.has("title") {
            true => &["Id", "Name", "State", "Title"][..],
            false => &["Id", "Name", "State"],
        };
        let rows = listed.into_iter().map(|(id, entry)| {
            let state = match (arguments.has("managed-save"), entry.state) {
                (true, MachineState::ShutOff) if entry.machine.has_managed_save() => "saved",
                (_, state) => state_of(state).1,
            };
            let mut row = vec![id, entry.machine.name().to_string(), state.to_owned()];
            if arguments.has("title") {
                let settings = entry.machine.settings();
                let title = settings.ok().and_then(|settings| settings.title);
                row.push(title.unwrap_or_default());
            }
            row
        });
        session.table(heading, &rows.collect::<Vec<_>>());
        return Ok(());
    }
    for (id, entry) in listed {
        let [with_id, with_uuid, with_name] = columns;
        let mut words = Vec::new();
        if with_uuid {
            words.push(entry.machine.settings()?.id);
        }
        if with_id {
            words.push(id);
        }
        if with_name {
            words.push(entry.machine.name().to_string());
        }
        session.print(&(words.join(" ") + "\n"));
    }
    Ok(())
}

pub fn id(session: &mut Session, arguments: &Arguments) -> anyhow::Result<()> {
    let id = id_of(&domain(arguments)?);
    session.print(&(id + "\n"));
    Ok(())
}

pub fn uuid(session: &mut Session, arguments: &Arguments) -> anyhow::Result<()> {
    let id = domain(arguments)?.settings()?.id;
    session.print(&(id + "\n"));
    Ok(())
}

pub fn name(session: &mut Session, arguments: &Arguments) -> anyhow::Result<()> {
    let machine = domain(arguments)?;
    session.print(&format!("{}\n", machine.name()));
    Ok(())
}

pub fn state(session: &mut Session, arguments: &Arguments) -> anyhow::Result<()> {
    let machine = domain(arguments)?;
    let state = machine.state()?;
    let (_, text) = state_of(state);
    let line = match arguments.has("reason") {
        true => {
            let run = machine.last_run()?;
            format!("{text} ({})\n", reason_of(state, run.as_ref()).1)
        }
        false => format!("{text}\n"),
    };
    session.print(&line);
    Ok(())
}

/// Returns the configuration of a machine: as it runs, or, if it does not or does not answer, as it will.
fn present_config(machine: &Machine, state: MachineState) -> anyhow::Result<MachineConfig> {
    Ok(match state {
        MachineState::Running | MachineState::Paused => match machine.live_config() {
            Ok(config) => config,
            // It may have ended meanwhile.
            Err(_) => machine.config()?,
        },
        _ => machine.config()?,
    })
}

/// Returns the memory that the guest has been left by its balloon, in bytes.
fn present_memory(config: &MachineConfig) -> u64 {
    let balloon = config.balloon.as_ref().map_or(0, |it| it.size.bytes());
    config.memory.bytes().saturating_sub(balloon)
}

pub fn info(session: &mut Session, arguments: &Arguments) -> anyhow::Result<()> {
    let machine = domain(arguments)?;
    let state = machine.state()?;
    let config = present_config(&machine, state)?;
    let yes = |is: bool| if is { "yes" } else { "no" }.to_owned();
    let enabled = if machine.is_autostarted() {
        "enable"
    } else {
        "disable"
    };
    let mut lines = vec![
        ("Id", id_of(&machine)),
        ("Name", machine.name().to_string()),
        ("UUID", machine.settings()?.id),
        ("OS Type", "hvm".to_owned()),
        ("State", state_of(state).1.to_owned()),
        ("CPU(s)", config.cpus.get().to_string()),
    ];
    if let MachineState::Running | MachineState::Paused = state
        && let Ok(usage) = machine.usage()
    {
        let seconds = usage.cpu_time.as_secs_f64();
        lines.push(("CPU time", format!("{seconds:.1}s")));
    }
    lines.extend([
        ("Max memory", format!("{} KiB", config.memory.bytes() >> 10)),
        (
            "Used memory",
            format!("{} KiB", present_memory(&config) >> 10),
        ),
        ("Persistent", yes(!machine.is_transient())),
        ("Autostart", enabled.to_owned()),
        ("Managed save", yes(machine.has_managed_save())),
        ("Security model", "none".to_owned()),
        ("Security DOI", "0".to_owned()),
    ]);
    session.facts(&lines);
    Ok(())
}

/// Returns the configuration that a list of devices is about.
fn listed_config(machine: &Machine, arguments: &Arguments) -> anyhow::Result<MachineConfig> {
    match arguments.has("inactive") {
        true => Ok(machine.config()?),
        false => present_config(machine, machine.state()?),
    }
}

pub fn disks(session: &mut Session, arguments: &Arguments) -> anyhow::Result<()> {
    let config = listed_config(&domain(arguments)?, arguments)?;
    let has_details = arguments.has("details");
    let row = |(target, disk): (_, &DiskConfig)| {
        let mut row = Vec::new();
        if has_details {
            let metadata = fs::metadata(&disk.path);
            let is_device = metadata.is_ok_and(|it| it.file_type().is_block_device());
            row.push(if is_device { "block" } else { "file" }.to_owned());
            row.push("disk".to_owned());
        }
        row.extend([target, disk.path.display().to_string()]);
        row
    };
    let names = config.disk_names().map(|name| name.to_string());
    let rows: Vec<_> = names.zip(&config.disks).map(row).collect();
    let heading = match has_details {
        true => &["Type", "Device", "Target", "Source"][..],
        false => &["Target", "Source"],
    };
    session.table(heading, &rows);
    Ok(())
}

/// Returns the type of a network device in libvirt's words, and what it is connected to.
fn connection(net: &NetConfig) -> (&'static str, Option<String>) {
    match named::connection(net) {
        ("passt", _) => ("user", None),
        // libvirt lists a tap as the interface of the device.
        ("ethernet", _) => ("ethernet", None),
        connection => connection,
    }
}

/// Returns the interface that a machine on a network of the host has there.
fn interface_on(network: &str, mac: &str) -> Option<String> {
    let info = Networks::of_host().info(&network.parse().ok()?).ok()?;
    let mut ports = info.ports.into_iter();
    let port = ports.find(|port| port.mac.to_string().eq_ignore_ascii_case(mac))?;
    Some(port.interface)
}

pub fn interfaces(session: &mut Session, arguments: &Arguments) -> anyhow::Result<()> {
    let machine = domain(arguments)?;
    let config = listed_config(&machine, arguments)?;
    let is_active = machine.is_active()? && !arguments.has("inactive");
    let row = |net: &NetConfig| {
        let (kind, source) = connection(net);
        let mac = net.mac.as_ref().map(ToString::to_string);
        let interface = match (&net.tap, kind, &source, &mac) {
            (Some(tap), ..) => Some(tap.to_string()),
            (None, "network", Some(network), Some(mac)) if is_active => interface_on(network, mac),
            _ => None,
        };
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        vec![
            or_dash(interface),
            kind.to_owned(),
            or_dash(source),
            "virtio".to_owned(),
            or_dash(mac),
        ]
    };
    let rows: Vec<_> = config.nets.iter().map(row).collect();
    session.table(&["Interface", "Type", "Source", "Model", "MAC"], &rows);
    Ok(())
}

pub fn stats(session: &mut Session, arguments: &Arguments) -> anyhow::Result<()> {
    let named = arguments.values("domain").map(find);
    let mut machines = named.collect::<Result<Vec<_>, _>>()?;
    if machines.is_empty() {
        let entries = Manager::of_user()?.list(true)?;
        machines.extend(entries.into_iter().map(|entry| entry.machine));
    }
    for (place, machine) in machines.iter().enumerate() {
        if place > 0 {
            session.print("\n");
        }
        let text = stats_of(machine, arguments)?;
        session.print(&text);
    }
    Ok(())
}

/// Returns the statistics of a machine, in the groups that were asked for or all.
fn stats_of(machine: &Machine, arguments: &Arguments) -> anyhow::Result<String> {
    const GROUPS: [&str; 6] = [
        "state",
        "cpu-total",
        "balloon",
        "vcpu",
        "interface",
        "block",
    ];
    let is_any = GROUPS.iter().any(|group| arguments.has(group));
    let wants = |group: &str| !is_any || arguments.has(group);
    let state = machine.state()?;
    let config = present_config(machine, state)?;
    let usage = match state {
        MachineState::Running | MachineState::Paused => machine.usage().ok(),
        _ => None,
    };
    let mut text = format!("Domain: '{}'\n", machine.name());
    let mut add = |key: &str, value: &str| text.push_str(&format!("  {key}={value}\n"));
    if wants("state") {
        let run = machine.last_run()?;
        add("state.state", &state_of(state).0.to_string());
        let (reason, _) = reason_of(state, run.as_ref());
        add("state.reason", &reason.to_string());
    }
    if wants("cpu-total")
        && let Some(usage) = &usage
    {
        add("cpu.time", &usage.cpu_time.as_nanos().to_string());
    }
    if wants("balloon") {
        add(
            "balloon.current",
            &(present_memory(&config) >> 10).to_string(),
        );
        add(
            "balloon.maximum",
            &(config.memory.bytes() >> 10).to_string(),
        );
        if let Some(usage) = &usage {
            add("balloon.rss", &(usage.resident >> 10).to_string());
        }
    }
    if wants("vcpu") {
        let count = config.cpus.get().to_string();
        add("vcpu.current", &count);
        add("vcpu.maximum", &count);
    }
    let usage = usage.unwrap_or_default();
    if wants("interface") {
        add_interfaces(&config, &usage, &mut add);
    }
    if wants("block") {
        add_disks(&config, &usage, &mut add);
    }
    Ok(text)
}

fn add_interfaces(config: &MachineConfig, usage: &Usage, add: &mut impl FnMut(&str, &str)) {
    add("net.count", &config.nets.len().to_string());
    for (place, name) in config.net_names().enumerate() {
        add(&format!("net.{place}.name"), name.as_str());
        let Some(used) = usage.networks.iter().find(|it| it.name == name.as_str()) else {
            continue;
        };
        for (key, value) in [
            ("rx.bytes", used.received_bytes),
            ("rx.pkts", used.received_packets),
            ("tx.bytes", used.sent_bytes),
            ("tx.pkts", used.sent_packets),
        ] {
            add(&format!("net.{place}.{key}"), &value.to_string());
        }
    }
}

fn add_disks(config: &MachineConfig, usage: &Usage, add: &mut impl FnMut(&str, &str)) {
    add("block.count", &config.disks.len().to_string());
    let disks = config.disk_names().zip(&config.disks).enumerate();
    for (place, (name, disk)) in disks {
        add(&format!("block.{place}.name"), name.as_str());
        let path = disk.path.display().to_string();
        add(&format!("block.{place}.path"), &path);
        let Some(used) = usage.disks.iter().find(|it| it.name == name.as_str()) else {
            continue;
        };
        for (key, value) in [
            ("rd.reqs", used.reads),
            ("rd.bytes", used.read_bytes),
            ("wr.reqs", used.writes),
            ("wr.bytes", used.write_bytes),
        ] {
            add(&format!("block.{place}.{key}"), &value.to_string());
        }
    }
}
