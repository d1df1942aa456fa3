//! A domain as a whole: read as the definition of a machine, and written of one.

use std::path::{Path, PathBuf};

use bantam_manager::RestartPolicy;
use bantam_vmm::config::{HugePages, MachineConfig, SerialConfig, Uuid};

use crate::error::Error;
use crate::xml::{Element, Node, check_size};
use crate::{disk, interface, keep, limits, options, platform, small, streams};

/// What a machine boots, beside what its domain says of that.
#[derive(Clone, Debug)]
pub enum Boot {
    /// A kernel in place of that of the domain, if it has one.
    Given {
        /// Kernel image.
        kernel: PathBuf,
        /// Initial RAM disk, in place of that of the domain.
        initrd: Option<PathBuf>,
        /// Words for the end of the kernel command line.
        append: Option<String>,
    },
    /// A kernel image for a domain that has a disk or an initial RAM disk and no kernel.
    Default(PathBuf),
}

/// What domain XML says of a machine.
#[derive(Clone, Debug)]
pub struct Definition {
    /// Its name, which may be one that Bantam does not have.
    pub name: String,
    /// Its UUID, if it is given.
    pub id: Option<Uuid>,
    /// Its title.
    pub title: Option<String>,
    /// When it is started again by itself.
    pub restart: RestartPolicy,
    /// The machine. Paths of sockets that the domain leaves open are relative to the folder of the machine; all others are
    /// absolute.
    pub config: MachineConfig,
    /// What the user has to know: what is kept without effect, and what is otherwise than libvirt has it. A line for each.
    pub notes: Vec<String>,
    original: Element,
}

/// A machine that is written as a domain.
#[derive(Clone, Copy, Debug)]
pub struct Machine<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its UUID.
    pub id: &'a str,
    /// Its title.
    pub title: Option<&'a str>,
    /// When it is started again by itself.
    pub restart: RestartPolicy,
    /// What it is. Its network devices have their MAC addresses.
    pub config: &'a MachineConfig,
    /// The folder in which it is kept.
    pub folder: &'a Path,
}

/// Whether a text is XML and not a machine file: whether it begins with `<`.
pub fn is_xml(text: &str) -> bool {
    let text = text.trim_start_matches('\u{feff}').trim_start();
    text.starts_with('<')
}

impl Definition {
    /// Reads domain XML of a machine that boots what the domain or `boot` says.
    ///
    /// # Errors
    /// If it is not the XML of a domain, has something that a guest would rely on and Bantam does not have, or describes a
    /// machine that cannot be.
    pub fn parse(text: &str, boot: Option<Boot>) -> Result<Definition, Error> {
        let original = Element::parse(text.trim_start_matches('\u{feff}').trim_start())?;
        if original.name != "domain" {
            return Err(Error::unsupported(
                format!("XML of <{}>", original.name),
                "a machine is a <domain>",
            ));
        }
        let name = original.content_of("name").unwrap_or_default();
        let id = original.content_of("uuid");
        let id = id.map(|id| id.trim().parse::<Uuid>()).transpose()?;
        let kept = keep::check(&original)?;
        let mut notes = Vec::new();
        let (mut config, restart) = read(&original, &mut notes)?;
        match boot {
            Some(Boot::Given {
                kernel,
                initrd,
                append,
            }) => {
                config.kernel = kernel;
                config.initrd = initrd.or(config.initrd);
                config.append = append.or(config.append);
            }
            Some(Boot::Default(kernel))
                if config.kernel.as_os_str().is_empty()
                    && (config.initrd.is_some() || !config.disks.is_empty()) =>
            {
                config.kernel = kernel;
            }
            _ => {}
        }
        if config.kernel.as_os_str().is_empty() {
            return Err(Error::value(
                "<os>",
                "has no <kernel>, and no kernel is installed that a domain with a disk boots: install Bantam's (make install), add \
                 <kernel> and perhaps <initrd> and <cmdline>, or define it by bantam define FILE --kernel KERNEL",
            ));
        }
        let config = match options::find(&original) {
            Some(options) => options::apply(&config, &options, &mut notes)?,
            None => {
                config.validate_values()?;
                config
            }
        };
        notes.extend(kept.lines());
        Ok(Definition {
            name: name.trim().to_owned(),
            id,
            title: original.content_of("title").filter(|it| !it.is_empty()),
            restart,
            config,
            notes,
            original,
        })
    }

    /// Writes the domain of the machine that this has become, with what is kept.
    ///
    /// # Errors
    /// Those of [`write_domain`].
    pub fn document(&self, machine: &Machine<'_>) -> Result<String, Error> {
        write_over(machine, Some(&self.original))
    }
}

/// Writes a machine as domain XML. `earlier` is the text of the domain that it was defined by, if it was: what is kept of
/// it is there again.
///
/// # Errors
/// If `earlier` is not XML, the machine has a character that XML does not have, or the XML is larger than what is read.
pub fn write_domain(machine: &Machine<'_>, earlier: Option<&str>) -> Result<String, Error> {
    let original = earlier.map(Element::parse).transpose()?;
    write_over(machine, original.as_ref())
}

/// Reads the machine that a domain is, apart from Bantam's own options. The machine may be one without a kernel.
fn read(
    domain: &Element,
    notes: &mut Vec<String>,
) -> Result<(MachineConfig, RestartPolicy), Error> {
    platform::check(domain)?;
    let mut config = MachineConfig::new("");
    let given_up = platform::read(domain, &mut config, notes)?;
    platform::read_boot(domain, &mut config)?;
    limits::read(domain, &mut config)?;
    let none = Element::new("devices");
    let devices = domain.first("devices").unwrap_or(&none);
    config.disks = disk::read_all(devices, notes)?;
    config.nets = interface::read_all(devices)?;
    streams::read_all(devices, &mut config)?;
    small::read_all(devices, given_up, &mut config)?;
    if config.huge_pages == HugePages::TwoMib && config.balloon.take().is_some() {
        notes.push("the machine has no memory balloon, as its memory is in huge pages".to_owned());
    }
    Ok((config, platform::read_restart(domain)?))
}

fn write_over(machine: &Machine<'_>, original: Option<&Element>) -> Result<String, Error> {
    let config = as_written(machine);
    let mut domain = Element::new("domain").attribute("type", "kvm");
    domain.push(Element::new("name").text(machine.name));
    domain.push(Element::new("uuid").text(machine.id));
    if let Some(title) = machine.title {
        domain.push(Element::new("title").text(title));
    }
    platform::write(&config, machine.restart, original, &mut domain);
    limits::write(&config).for_each(|element| domain.push(element));
    let mut devices = Element::new("devices");
    let original_devices = original.and_then(|it| it.first("devices"));
    let elements = disk::write_all(&config.disks, original_devices)
        .into_iter()
        .chain(interface::write_all(&config.nets))
        .chain(streams::write_all(&config))
        .chain(small::write_all(&config));
    devices.children.extend(elements.map(Node::Element));
    domain.push(devices);
    domain.make_writable();
    let (read, _) = read(&domain, &mut Vec::new())?;
    if let Some(options) = options::write(&read, &config) {
        domain.push(Element::new("metadata").child(options));
    }
    keep::merge(&mut domain, original);
    if !domain.is_writable() {
        return Err(Error::Character);
    }
    let text = domain.to_string();
    // It is read again.
    check_size(&text)?;
    Ok(text)
}

/// Returns the machine as it is read of its domain: what a machine file may leave out is said, and sockets whose place a
/// domain leaves open are relative to the folder of the machine.
fn as_written(machine: &Machine<'_>) -> MachineConfig {
    let mut config = machine.config.clone();
    disk::say_formats(&mut config.disks);
    interface::say_words(&mut config.nets);
    for channel in &mut config.channels {
        let open = streams::channel_socket(&channel.name);
        if channel.end == SerialConfig::Socket(machine.folder.join(&open)) {
            channel.end = SerialConfig::Socket(open);
        }
    }
    if let Some(vsock) = &mut config.vsock
        && vsock.socket == machine.folder.join(small::vsock_socket())
    {
        vsock.socket = small::vsock_socket();
    }
    config
}
