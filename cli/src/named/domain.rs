//! `bantam dumpxml`, and machines that are defined by libvirt's domain XML.

use anyhow::{Context, anyhow, bail};
use bantam_libvirt::{Boot, Definition, write_domain};
use bantam_manager::{
    DocumentedMachine, Error, Machine, MachineName, Manager, RestartPolicy, Settings,
};
use bantam_vmm::config::MachineConfig;

use super::args::DumpxmlArgs;
use super::edit::edit_text;
use super::{machine, print};
use crate::default_kernel;
use crate::message::say;

/// What an editor has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Edited {
    /// The machine is another one from its next start on.
    Changed,
    /// All is as it was.
    Unchanged,
}

/// Defines a machine by domain XML, which boots the kernel that is installed if neither the XML nor `boot` has one. The name and the policy are those that are given, or those of the XML. What the user
/// has to know is said on standard error.
pub fn define_domain(
    text: &str,
    name: Option<&MachineName>,
    restart: Option<RestartPolicy>,
    boot: Option<Boot>,
) -> anyhow::Result<Machine> {
    let definition = Definition::parse(text, boot.or_else(default_boot))?;
    let name = match name {
        Some(name) => name.clone(),
        None => definition.name.parse().context("<name>")?,
    };
    let machine = put(&name, &definition, restart, None)?;
    say_notes(&definition.notes);
    Ok(machine)
}

/// Starts a machine by domain XML that vanishes when it has ended.
pub fn start_domain(text: &str) -> anyhow::Result<Machine> {
    let definition = Definition::parse(text, default_boot())?;
    let name = definition.name.parse().context("<name>")?;
    let machine = Manager::of_user()?
        .start_transient(
            &name,
            &documented(&definition, None),
            documents(&definition),
        )
        .map_err(reason_alone)?;
    say_notes(&definition.notes);
    Ok(machine)
}

fn default_boot() -> Option<Boot> {
    default_kernel::find().map(Boot::Default)
}

fn put(
    name: &MachineName,
    definition: &Definition,
    restart: Option<RestartPolicy>,
    before: Option<&str>,
) -> anyhow::Result<Machine> {
    let documented = DocumentedMachine {
        restart: restart.unwrap_or(definition.restart),
        ..documented(definition, before)
    };
    let defined = Manager::of_user()?.define_by_document(name, &documented, documents(definition));
    defined.map_err(reason_alone)
}

fn documented<'a>(definition: &'a Definition, before: Option<&'a str>) -> DocumentedMachine<'a> {
    DocumentedMachine {
        config: &definition.config,
        id: definition.id,
        title: definition.title.as_deref(),
        restart: definition.restart,
        before,
    }
}

/// Returns what writes the document that is kept with a machine.
fn documents(
    definition: &Definition,
) -> impl Fn(&Machine, &MachineConfig, &Settings) -> Result<String, String> {
    move |machine, config, settings| {
        let document = definition.document(&describe(machine, config, settings));
        document.map_err(|error| error.to_string())
    }
}

/// Returns why a machine cannot be defined or started; the callers say what was to be done.
fn reason_alone(error: Error) -> anyhow::Error {
    match error {
        Error::Refused { reason, .. } | Error::Start { reason, .. } => anyhow!(reason),
        error => error.into(),
    }
}

fn say_notes(notes: &[String]) {
    for note in notes {
        say(format_args!("note: {note}"));
    }
}

fn describe<'a>(
    machine: &'a Machine,
    config: &'a MachineConfig,
    settings: &'a Settings,
) -> bantam_libvirt::Machine<'a> {
    bantam_libvirt::Machine {
        name: machine.name().as_str(),
        id: &settings.id,
        title: settings.title.as_deref(),
        restart: settings.restart,
        config,
        folder: machine.folder(),
    }
}

/// Which memory of a machine that runs is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    /// That which its guest is to have now.
    Present,
    /// That which it is to have at the next start.
    AtStart,
}

/// Returns the domain XML of a machine, as it is at its next start.
pub fn domain_xml(machine: &Machine, memory: Memory) -> anyhow::Result<String> {
    let mut config = machine.addressed_config()?;
    if memory == Memory::Present && machine.is_active()? {
        // One that does not answer is written as it will be.
        let live = machine.live_config().ok().and_then(|live| live.balloon);
        // The machine may have less memory at its next start.
        let live = live.filter(|live| live.size.bytes() <= config.memory.bytes());
        if let (Some(balloon), Some(live)) = (&mut config.balloon, live) {
            balloon.size = live.size;
        }
    }
    let settings = machine.settings()?;
    let document = machine.document()?;
    Ok(write_domain(
        &describe(machine, &config, &settings),
        document.as_deref(),
    )?)
}

pub fn dump(args: &DumpxmlArgs) -> anyhow::Result<()> {
    let memory = match args.inactive {
        true => Memory::AtStart,
        false => Memory::Present,
    };
    print(&domain_xml(&machine(&args.name)?, memory)?)
}

/// Has the user edit the domain XML of a machine, and puts it in place.
pub fn edit_domain(machine: &Machine) -> anyhow::Result<Edited> {
    let before_file = machine.machine_file_text()?;
    let before = domain_xml(machine, Memory::AtStart)?;
    let earlier = Definition::parse(&before, None)?;
    let check = |text: &str| {
        let definition = Definition::parse(text, default_boot())?;
        if definition.name != machine.name().as_str() || definition.id != earlier.id {
            bail!("its <name> and <uuid> do not change here; domrename gives it another name");
        }
        Ok(())
    };
    let Some(text) = edit_text(machine, "xml", &before, check)? else {
        return Ok(Edited::Unchanged);
    };
    let definition = Definition::parse(&text, default_boot())?;
    put(machine.name(), &definition, None, Some(&before_file))?;
    let is_new = |note: &&String| !earlier.notes.contains(note);
    say_notes(
        &definition
            .notes
            .iter()
            .filter(is_new)
            .cloned()
            .collect::<Vec<_>>(),
    );
    Ok(Edited::Changed)
}
