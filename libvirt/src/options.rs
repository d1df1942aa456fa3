//! Options of a machine that libvirt has no words for. They are text in TOML, in an element of Bantam's own in `<metadata>`,
//! where libvirt lets programs keep what is theirs.

use bantam_vmm::config::MachineConfig;
use toml::{Table, Value};

use crate::error::Error;
use crate::xml::Element;

/// The namespace of the element.
const NAMESPACE: &str = "urn:bantam:machine";
/// The element, with the prefix that it is written with.
const ELEMENT: &str = "bantam:machine";
/// The keys of devices that there can be many of.
const LISTS: [&str; 3] = ["disk", "net", "channel"];

/// Whether an element holds options of Bantam.
pub(crate) fn are_in(element: &Element) -> bool {
    let (prefix, local) = element.name.split_once(':').unwrap_or(("", &element.name));
    let declaration = match prefix {
        "" => "xmlns".to_owned(),
        _ => format!("xmlns:{prefix}"),
    };
    local == "machine" && element.get(&declaration) == Some(NAMESPACE)
}

/// Returns the options of a domain.
pub(crate) fn find(domain: &Element) -> Option<String> {
    let metadata = domain.first("metadata")?;
    let found = metadata.elements().find(|it| are_in(it));
    found.map(Element::content)
}

/// Makes the element that says in which way `config` differs from `read`, which is what the rest of its domain says. It is
/// `None` if they are the same.
pub(crate) fn write(read: &MachineConfig, config: &MachineConfig) -> Option<Element> {
    let keys = keys_of(read);
    let (mut read, mut config) = (full_table(read), full_table(config));
    let mut lists = Table::new();
    for (list, keys) in LISTS.into_iter().zip(keys) {
        let (before, after) = (take_list(&mut read, list), take_list(&mut config, list));
        let mut differing = Table::new();
        for ((before, after), key) in before.iter().zip(&after).zip(keys) {
            let found = difference(before, after);
            if !found.is_empty() {
                differing.insert(key, Value::Table(found));
            }
        }
        if !differing.is_empty() {
            lists.insert(list.to_owned(), Value::Table(differing));
        }
    }
    let mut options = difference(&read, &config);
    options.extend(lists);
    if options.is_empty() {
        return None;
    }
    let element = Element::new(ELEMENT).attribute("xmlns:bantam", NAMESPACE);
    Some(element.text(format_args!("\n{options}")))
}

/// Returns `config` with options laid over it. What has to be said of them goes into `notes`.
///
/// # Errors
/// If they are not options of a machine.
pub(crate) fn apply(
    config: &MachineConfig,
    options: &str,
    notes: &mut Vec<String>,
) -> Result<MachineConfig, Error> {
    let options: Table = toml::from_str(options)
        .map_err(|error| Error::Options(error.message().replace('\n', " ")))?;
    let keys = keys_of(config);
    let mut table = full_table(config);
    for (key, value) in options {
        let Some(place) = LISTS.iter().position(|list| *list == key) else {
            table.insert(key, value);
            continue;
        };
        let Value::Table(devices) = value else {
            return Err(Error::Options(format!("'{key}' is not a table of tables")));
        };
        for (name, value) in devices {
            let Value::Table(device) = value else {
                return Err(Error::Options(format!("'{key}.{name}' is not a table")));
            };
            let index = keys[place].iter().position(|it| *it == name);
            let list = table.get_mut(&key).and_then(Value::as_array_mut);
            let found = index.and_then(|index| list?.get_mut(index)?.as_table_mut());
            match found {
                Some(found) => found.extend(device),
                None => notes.push(format!(
                    "options of Bantam for the {key} '{name}' are dropped: there is none"
                )),
            }
        }
    }
    MachineConfig::from_toml(&table.to_string()).map_err(|error| Error::Options(error.to_string()))
}

/// Returns the names of disks, network devices and channels by which options find them.
fn keys_of(config: &MachineConfig) -> [Vec<String>; 3] {
    let disks = config.disk_names().map(|name| name.to_string());
    let nets = config.nets.iter().zip(config.net_names());
    let nets = nets.map(|(net, name)| match net.mac {
        Some(mac) => mac.to_string(),
        None => name.to_string(),
    });
    let channels = config.channels.iter().map(|it| it.name.to_string());
    [disks.collect(), nets.collect(), channels.collect()]
}

/// Returns the keys of a machine file, including defaults.
fn full_table(config: &MachineConfig) -> Table {
    Table::try_from(config).unwrap_or_default()
}

fn take_list(table: &mut Table, key: &str) -> Vec<Table> {
    let Some(Value::Array(items)) = table.remove(key) else {
        return Vec::new();
    };
    let tables = items.into_iter().map(|item| match item {
        Value::Table(table) => table,
        _ => Table::new(),
    });
    tables.collect()
}

/// Returns what has to be laid over `before` for `after`.
fn difference(before: &Table, after: &Table) -> Table {
    let mut found = Table::new();
    for (key, value) in after {
        if before.get(key) != Some(value) {
            found.insert(key.clone(), value.clone());
        }
    }
    for (key, value) in before {
        // Those that are false are left out of the tables of devices.
        if value.as_bool() == Some(true) && !after.contains_key(key) {
            found.insert(key.clone(), Value::Boolean(false));
        }
    }
    found
}
