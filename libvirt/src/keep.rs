//! What a domain has and a machine does not: it is reported, and put back when the domain is written again.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use crate::devices;
use crate::error::Error;
use crate::options;
use crate::rules::{DOMAIN, Fate, Spec};
use crate::xml::{Element, Node};

/// The elements of a domain in the order in which libvirt writes them.
const DOMAIN_ORDER: &[&str] = &[
    "name",
    "uuid",
    "genid",
    "title",
    "description",
    "metadata",
    "maxMemory",
    "memory",
    "currentMemory",
    "blkiotune",
    "memtune",
    "memoryBacking",
    "vcpu",
    "iothreads",
    "iothreadids",
    "defaultiothread",
    "cputune",
    "numatune",
    "resource",
    "sysinfo",
    "os",
    "features",
    "cpu",
    "clock",
    "on_poweroff",
    "on_reboot",
    "on_crash",
    "on_lockfailure",
    "pm",
    "perf",
    "devices",
];

/// The devices in the order in which libvirt writes them.
const DEVICE_ORDER: &[&str] = &[
    "emulator",
    "disk",
    "controller",
    "interface",
    "smartcard",
    "serial",
    "parallel",
    "console",
    "channel",
    "input",
    "graphics",
    "sound",
    "audio",
    "video",
    "redirdev",
    "redirfilter",
    "hub",
    "watchdog",
    "memballoon",
    "rng",
    "nvram",
    "panic",
    "iommu",
    "vsock",
    "crypto",
];

/// Things that are kept and have no effect, each with how many of it there are.
#[derive(Debug, Default)]
pub(crate) struct Kept {
    things: Vec<(String, usize)>,
    places: HashMap<String, usize>,
}

impl Kept {
    /// Notes one more thing that is kept.
    fn add(&mut self, what: String) {
        let next = self.things.len();
        match self.places.entry(what) {
            Entry::Occupied(place) => self.things[*place.get()].1 += 1,
            Entry::Vacant(vacant) => {
                self.things.push((vacant.key().clone(), 1));
                vacant.insert(next);
            }
        }
    }

    /// Returns a line for each.
    pub(crate) fn lines(&self) -> impl Iterator<Item = String> {
        self.things.iter().map(|(what, count)| match count {
            1 => format!("{what} is kept and has no effect"),
            _ => format!("{what} is kept and has no effect ({count} times)"),
        })
    }
}

/// Collects what a domain has and a machine does not.
///
/// # Errors
/// If a guest would rely on one of these things.
pub(crate) fn check(domain: &Element) -> Result<Kept, Error> {
    let mut kept = Kept::default();
    check_element(domain, &DOMAIN, "", &mut kept)?;
    Ok(kept)
}

fn check_element(element: &Element, spec: &Spec, path: &str, kept: &mut Kept) -> Result<(), Error> {
    for (name, value) in &element.attributes {
        let is_decided = [spec.attributes, spec.quiet]
            .iter()
            .any(|names| names.contains(&name.as_str()));
        if !is_decided && !name.starts_with("xmlns") {
            let path = if path.is_empty() { "domain" } else { path };
            kept.add(format!("{name}='{value}' of <{path}>"));
        }
    }
    for child in element.elements() {
        let name = &child.name;
        let inner = match path {
            "" => name.clone(),
            _ => format!("{path}/{name}"),
        };
        if path.is_empty() && name.contains(':') {
            return Err(Error::unsupported(
                format!("<{name}>"),
                "remove it: options for another program have no effect here",
            ));
        }
        match spec.fate(name) {
            Some(Fate::Refused(remedy)) => {
                return Err(Error::unsupported(format!("<{inner}>"), remedy));
            }
            Some(Fate::Quiet) => {}
            Some(Fate::Known(_)) if path == "devices" && !devices::is_understood(child) => {
                kept.add(devices::describe_kept(child));
            }
            Some(Fate::Known(spec)) => check_element(child, spec, &inner, kept)?,
            None => kept.add(format!("<{inner}>")),
        }
    }
    Ok(())
}

/// Puts what `original` has and a machine does not into `domain`, which was made of the machine.
pub(crate) fn merge(domain: &mut Element, original: Option<&Element>) {
    if let Some(original) = original {
        merge_element(domain, original, &DOMAIN);
    }
    sort(domain, DOMAIN_ORDER);
    for node in &mut domain.children {
        match node {
            Node::Element(devices) if devices.name == "devices" => sort(devices, DEVICE_ORDER),
            _ => {}
        }
    }
}

/// Puts the elements into an order; others come before the last of them.
fn sort(element: &mut Element, order: &[&str]) {
    element.children.sort_by_key(|node| match node {
        Node::Element(child) => order
            .iter()
            .position(|it| *it == child.name)
            .map_or_else(|| (order.len().saturating_sub(2), 1), |place| (place, 0)),
        Node::Text(_) => (0, 0),
    });
}

fn merge_element(made: &mut Element, original: &Element, spec: &Spec) {
    for (name, value) in &original.attributes {
        if !spec.attributes.contains(&name.as_str()) && made.get(name).is_none() {
            made.attributes.push((name.clone(), value.clone()));
        }
    }
    let is_devices = made.name == "devices";
    // One that was there before the others of its name were merged.
    let mut taken = vec![false; made.children.len()];
    for child in original.elements() {
        if made.name == "metadata" && options::are_in(child) {
            continue;
        }
        let spec = match spec.fate(&child.name) {
            Some(Fate::Known(spec)) => spec,
            Some(Fate::Refused(_)) => continue,
            Some(Fate::Quiet) | None => {
                made.push(child.clone());
                continue;
            }
        };
        let place = made.children.iter().zip(&taken).position(|(node, taken)| {
            matches!(node, Node::Element(it) if !taken && it.name == child.name
                && (!is_devices || devices::is_same(it, child)))
        });
        match place {
            Some(place) => {
                taken[place] = true;
                if let Node::Element(found) = &mut made.children[place] {
                    merge_element(found, child, spec);
                }
            }
            None if is_devices => made
                .children
                .extend(devices::left(child).map(Node::Element)),
            // What it says of a machine is no longer so; what else it says may go on.
            None if is_container(&child.name) => {
                let mut empty = Element::new(&child.name);
                merge_element(&mut empty, child, spec);
                if !empty.children.is_empty() || !empty.attributes.is_empty() {
                    made.push(empty);
                }
            }
            None => {}
        }
    }
}

/// Whether an element of a domain or device can be there for what is kept in it alone.
fn is_container(name: &str) -> bool {
    matches!(
        name,
        "memoryBacking"
            | "features"
            | "memtune"
            | "cputune"
            | "cpu"
            | "clock"
            | "metadata"
            | "driver"
            | "blockio"
            | "iotune"
    )
}
