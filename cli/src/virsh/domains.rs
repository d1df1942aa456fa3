//! Commands that change machines.

use std::ffi::OsStr;
use std::io::{self, IsTerminal};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use bantam_libvirt::is_xml;
use bantam_manager::{Error, Machine, MachineName, Manager, Removal, StartOptions, saved_machine};
use bantam_vmm::ShutDown;
use bantam_vmm::config::{MemorySize, read_text_file};

use super::Session;
use super::args::{Arguments, scaled};
use crate::message::say;
use crate::named::{
    Edited, Memory, attach_console, config_of, define_domain, domain_xml, edit_domain, start_domain,
};

/// How long a guest may take to shut down before its power is cut, with `--graceful`.
const GRACE: Duration = Duration::from_secs(10);

/// Returns the machine that `--domain` names: by its id, its UUID or its name.
pub fn domain(arguments: &Arguments) -> anyhow::Result<Machine> {
    find(arguments.needed("domain")?)
}

/// Returns the machine that has the id, the UUID or the name `text`, looked for in this order.
pub fn find(text: &str) -> anyhow::Result<Machine> {
    let manager = Manager::of_user()?;
    if text.parse::<u32>().is_ok() {
        let machines = manager.machines()?;
        if let Some(machine) = machines.into_iter().find(|it| id_of(it) == text) {
            return Ok(machine);
        }
    }
    if text.len() == 36 {
        let is_it = |machine: &Machine| {
            let settings = machine.settings();
            settings.is_ok_and(|settings| settings.id.eq_ignore_ascii_case(text))
        };
        if let Some(machine) = manager.machines()?.into_iter().find(is_it) {
            return Ok(machine);
        }
    }
    let not_found = || anyhow!("failed to get domain '{text}'");
    let name: MachineName = text.parse().map_err(|_| not_found())?;
    manager.machine(&name).map_err(|error| match error {
        Error::NotFound { .. } => not_found(),
        error => error.into(),
    })
}

/// Returns the id of a machine: the process that it is, or `-` if it does not run.
pub fn id_of(machine: &Machine) -> String {
    let process = match machine.is_active() {
        Ok(true) => machine.process(),
        _ => None,
    };
    process.map_or_else(|| "-".to_owned(), |process| process.to_string())
}

/// Says of an error, as virsh does, what has failed.
fn failed(what: &str, machine: &Machine) -> impl Fn(Error) -> anyhow::Error {
    let what = format!("Failed to {what} domain '{}'", machine.name());
    move |error| match error {
        Error::NotRunning { .. } => anyhow!("{what}: domain is not running"),
        // The rest of their lines says again what has failed.
        Error::Control { source, .. } => anyhow!(source).context(what.clone()),
        Error::Start { reason, .. } | Error::Refused { reason, .. } => anyhow!("{what}: {reason}"),
        error => anyhow!(error).context(what.clone()),
    }
}

pub fn start(session: &mut Session, arguments: &Arguments) -> anyhow::Result<()> {
    let machine = domain(arguments)?;
    let options = StartOptions {
        force_boot: arguments.has("force-boot"),
        ..StartOptions::default()
    };
    machine.start(&options).map_err(|error| match error {
        Error::Running { .. } => anyhow!("Domain is already active"),
        error => failed("start", &machine)(error),
    })?;
    session.tell(&format!("Domain '{}' started", machine.name()));
    match arguments.has("console") {
        true => show_console(session, &machine),
        false => Ok(()),
    }
}

/// Connects the terminal to the console of a machine.
fn show_console(session: &mut Session, machine: &Machine) -> anyhow::Result<()> {
    if !machine.is_active()? {
        bail!("The domain is not running");
    }
    if !io::stdin().is_terminal() {
        bail!("Cannot run interactive console without a controlling TTY");
    }
    let escape = session.escape;
    session.tell(&format!("Connected to domain '{}'", machine.name()));
    session.tell(&format!("Escape character is {escape}"));
    session.flush()?;
    attach_console(machine, escape.byte())
}

/// Refuses ways to ask a guest that Bantam does not have.
fn check_mode(arguments: &Arguments) -> anyhow::Result<()> {
    match arguments.value("mode") {
        None | Some("acpi") => Ok(()),
        Some(mode) => bail!("mode '{mode}' is not supported by Bantam; leave out --mode"),
    }
}

pub fn shutdown(session: &mut Session, arguments: &Arguments) -> anyhow::Result<()> {
    check_mode(arguments)?;
    let machine = domain(arguments)?;
    let name = machine.name();
    let how = machine.shutdown(None);
    if how.map_err(failed("shutdown", &machine))? == ShutDown::Unheard {
        bail!(
            "Failed to shutdown domain '{name}': its guest is paused, or listens neither to the power button nor to \
             Ctrl-Alt-Del, or not yet; try again later, or end it with 'destroy'"
        );
    }
    session.tell(&format!("Domain '{name}' is being shutdown"));
    Ok(())
}

pub fn reboot(session: &mut Session, arguments: &Arguments) -> anyhow::Result<()> {
    check_mode(arguments)?;
    let machine = domain(arguments)?;
    machine.reboot().map_err(failed("reboot", &machine))?;
    session.tell(&format!("Domain '{}' is being rebooted", machine.name()));
    Ok(())
}

pub fn reset(session: &mut Session, arguments: &Arguments) -> anyhow::Result<()> {
    let machine = domain(arguments)?;
    machine.reset().map_err(failed("reset", &machine))?;
    session.tell(&format!("Domain '{}' was reset", machine.name()));
    Ok(())
}

pub fn destroy(session: &mut Session, arguments: &Arguments) -> anyhow::Result<()> {
    let machine = domain(arguments)?;
    let grace = arguments.has("graceful").then_some(GRACE);
    machine
        .destroy(grace)
        .map_err(failed("destroy", &machine))?;
    session.tell(&format!("Domain '{}' destroyed", machine.name()));
    Ok(())
}

pub fn suspend(session: &mut Session, arguments: &Arguments) -> anyhow::Result<()> {
    let machine = domain(arguments)?;
    machine.suspend().map_err(failed("suspend", &machine))?;
    session.tell(&format!("Domain '{}' suspended", machine.name()));
    Ok(())
}

pub fn resume(session: &mut Session, arguments: &Arguments) -> anyhow::Result<()> {
    let machine = domain(arguments)?;
    machine.resume().map_err(failed("resume", &machine))?;
    session.tell(&format!("Domain '{}' resumed", machine.name()));
    Ok(())
}

pub fn console(session: &mut Session, arguments: &Arguments) -> anyhow::Result<()> {
    show_console(session, &domain(arguments)?)
}

pub fn create(session: &mut Session, arguments: &Arguments) -> anyhow::Result<()> {
    let file = Path::new(arguments.needed("file")?);
    let failed = || format!("Failed to create domain from {}", file.display());
    let text = read_text_file(file).with_context(failed)?;
    let machine = start_domain(&text).with_context(failed)?;
    session.tell(&format!(
        "Domain '{}' created from {}",
        machine.name(),
        file.display()
    ));
    match arguments.has("console") {
        true => show_console(session, &machine),
        false => Ok(()),
    }
}

pub fn define(session: &mut Session, arguments: &Arguments) -> anyhow::Result<()> {
    let file = Path::new(arguments.needed("file")?);
    let failed = || format!("Failed to define domain from {}", file.display());
    let name = define_file(file).with_context(failed)?;
    session.tell(&format!("Domain '{name}' defined from {}", file.display()));
    Ok(())
}

/// Defines a machine by XML, or by a machine file, whose name it then has.
fn define_file(file: &Path) -> anyhow::Result<MachineName> {
    let text = read_text_file(file).with_context(|| format!("cannot read '{}'", file.display()))?;
    if is_xml(&text) {
        return Ok(define_domain(&text, None, None, None)?.name().clone());
    }
    let config = config_of(&text, file)?;
    let stem = file.file_stem().and_then(OsStr::to_str).unwrap_or_default();
    let name: MachineName = stem.parse()?;
    Manager::of_user()?.define(&name, &config, None)?;
    Ok(name)
}

pub fn dump(session: &mut Session, arguments: &Arguments) -> anyhow::Result<()> {
    let memory = match arguments.has("inactive") {
        true => Memory::AtStart,
        false => Memory::Present,
    };
    let text = domain_xml(&domain(arguments)?, memory)?;
    session.print(&text);
    Ok(())
}

pub fn edit(session: &mut Session, arguments: &Arguments) -> anyhow::Result<()> {
    let machine = domain(arguments)?;
    let edited = edit_domain(&machine)
        .with_context(|| format!("Failed to edit domain '{}'", machine.name()))?;
    let is = match edited {
        Edited::Changed => "edited",
        Edited::Unchanged => "not changed",
    };
    session.tell(&format!(
        "Domain '{}' XML configuration {is}.",
        machine.name()
    ));
    Ok(())
}

pub fn undefine(session: &mut Session, arguments: &Arguments) -> anyhow::Result<()> {
    let machine = domain(arguments)?;
    let name = machine.name();
    let failed = failed("undefine", &machine);
    if machine.is_active()? {
        bail!(
            "Failed to undefine domain '{name}': domain is running; end it first ('shutdown' or 'destroy')"
        );
    }
    if machine.has_managed_save() && !arguments.has("managed-save") {
        bail!(
            "Failed to undefine domain '{name}': it has a managed save; remove that too (--managed-save)"
        );
    }
    let has_snapshots = !machine.snapshots().map_err(&failed)?.is_empty();
    if has_snapshots && !arguments.has("snapshots-metadata") {
        bail!(
            "Failed to undefine domain '{name}': it has snapshots; remove them too (--snapshots-metadata)"
        );
    }
    let removes_storage = arguments.has("remove-all-storage");
    let config = match removes_storage {
        true => Some(machine.config().map_err(&failed)?),
        false => None,
    };
    let removal = Removal {
        storage: removes_storage,
        snapshots: arguments.has("snapshots-metadata"),
        managed_save: arguments.has("managed-save"),
    };
    let kept = Manager::of_user()?.undefine(&machine, removal);
    let kept = kept.map_err(&failed)?;
    session.tell(&format!("Domain '{name}' has been undefined"));
    for (image, reason) in &kept {
        say(format_args!("'{}' is kept: {reason}", image.display()));
    }
    let disks = config.iter().flat_map(|it| it.disk_names().zip(&it.disks));
    for (target, disk) in disks {
        if !disk.readonly && !disk.path.exists() {
            session.tell(&format!(
                "Volume '{target}'({}) removed.",
                disk.path.display()
            ));
        }
    }
    Ok(())
}

pub fn rename(session: &mut Session, arguments: &Arguments) -> anyhow::Result<()> {
    let machine = domain(arguments)?;
    let name = arguments.needed("new-name")?.parse()?;
    Manager::of_user()?.rename(&machine, &name)?;
    session.tell("Domain successfully renamed");
    Ok(())
}

pub fn autostart(session: &mut Session, arguments: &Arguments) -> anyhow::Result<()> {
    let machine = domain(arguments)?;
    let is_on = !arguments.has("disable");
    let un = if is_on { "" } else { "un" };
    machine.set_autostart(is_on).with_context(|| {
        format!(
            "Failed to {un}mark domain '{}' as autostarted",
            machine.name()
        )
    })?;
    session.tell(&format!(
        "Domain '{}' {un}marked as autostarted",
        machine.name()
    ));
    Ok(())
}

pub fn set_memory(_session: &mut Session, arguments: &Arguments) -> anyhow::Result<()> {
    let size = scaled(arguments.needed("size")?, 1024, "size")?;
    let size = MemorySize::from_bytes(size)?;
    let machine = domain(arguments)?;
    machine.set_memory(size).map_err(|error| match error {
        Error::NotRunning { .. } => anyhow!("domain is not running"),
        error => error.into(),
    })
}

pub fn set_vcpus(_session: &mut Session, arguments: &Arguments) -> anyhow::Result<()> {
    let count = arguments.needed("count")?;
    let count: u32 = count.parse().map_err(|_| {
        anyhow!("Numeric value '{count}' for <count> option is malformed or out of range")
    })?;
    let count = count.to_string().parse()?;
    let machine = domain(arguments)?;
    if machine.is_active()? && !arguments.has("config") {
        bail!(
            "the number of vCPUs of a domain that runs does not change; set that of its next start (--config)"
        );
    }
    Ok(machine.set_vcpus(count)?)
}

pub fn resize_disk(session: &mut Session, arguments: &Arguments) -> anyhow::Result<()> {
    let disk = arguments.needed("path")?;
    let size = scaled(arguments.needed("size")?, 1024, "size")?;
    let machine = domain(arguments)?;
    let failed = |error: Error| {
        let what = format!("Failed to resize block device '{disk}'");
        match error {
            Error::NotRunning { .. } => anyhow!("{what}: domain is not running"),
            error => anyhow!(error).context(what),
        }
    };
    let config = machine.live_config().map_err(failed)?;
    let mut disks = config.disk_names().zip(&config.disks);
    let found = disks.find(|(name, it)| name.as_str() == disk || it.path == Path::new(disk));
    let Some((name, _)) = found else {
        bail!("invalid path: {disk}; 'domblklist' lists the disks");
    };
    machine.grow_disk(&name, size).map_err(failed)?;
    session.tell(&format!("Block device '{disk}' is resized"));
    Ok(())
}

pub fn managed_save(session: &mut Session, arguments: &Arguments) -> anyhow::Result<()> {
    let machine = domain(arguments)?;
    let name = machine.name();
    machine
        .managed_save()
        .with_context(|| format!("Failed to save domain '{name}' state"))?;
    session.tell(&format!("\nDomain '{name}' state saved by Bantam"));
    Ok(())
}

pub fn remove_managed_save(session: &mut Session, arguments: &Arguments) -> anyhow::Result<()> {
    let machine = domain(arguments)?;
    let name = machine.name();
    if !machine.has_managed_save() {
        session.tell(&format!(
            "Domain '{name}' has no manage save image; removal skipped"
        ));
        return Ok(());
    }
    let what = || format!("Failed to remove managed save image for domain '{name}'");
    machine.remove_managed_save().with_context(what)?;
    session.tell(&format!("Removed managedsave image for domain '{name}'"));
    Ok(())
}

pub fn save(session: &mut Session, arguments: &Arguments) -> anyhow::Result<()> {
    let directory = arguments.needed("file")?;
    let machine = domain(arguments)?;
    let name = machine.name();
    let what = || format!("Failed to save domain '{name}' to {directory}");
    machine.save(Path::new(directory)).with_context(what)?;
    session.tell(&format!("\nDomain '{name}' saved to {directory}"));
    Ok(())
}

pub fn restore(session: &mut Session, arguments: &Arguments) -> anyhow::Result<()> {
    let directory = Path::new(arguments.needed("file")?);
    let what = || format!("Failed to restore domain from {}", directory.display());
    let name = saved_machine(directory)
        .context("it is not a directory that 'save' has written")
        .with_context(what)?;
    let machine = Manager::of_user()?.machine(&name).with_context(what)?;
    machine.restore(directory).with_context(what)?;
    session.tell(&format!("Domain restored from {}", directory.display()));
    Ok(())
}
