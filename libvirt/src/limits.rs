//! What a domain may use of the host: `<memtune>` and `<cputune>`.

use bantam_vmm::config::{CgroupConfig, MachineConfig, Quantity};

use crate::error::Error;
use crate::values::{number, size};
use crate::xml::Element;

const KIB: u64 = 1 << 10;
/// The least number of bytes that is libvirt's word for no limit (`VIR_DOMAIN_MEMORY_PARAM_UNLIMITED`).
const UNLIMITED: u64 = 9_007_199_254_740_991 * KIB;

/// Reads the limits.
///
/// # Errors
/// If one is not a number.
pub(crate) fn read(domain: &Element, config: &mut MachineConfig) -> Result<(), Error> {
    let mut limits = CgroupConfig::default();
    if let Some(memory) = domain.first("memtune") {
        let read = |name: &str| {
            let what = format!("<{name}> in <memtune>");
            let limit = memory.first(name);
            let bytes = limit.map(|it| size(&it.content(), it.get("unit"), &what));
            let bytes = bytes.transpose()?.filter(|bytes| *bytes < UNLIMITED);
            quantity(bytes.and_then(|bytes| i64::try_from(bytes).ok()))
        };
        limits.memory_max = read("hard_limit")?;
        limits.memory_high = read("soft_limit")?;
    }
    if let Some(processor) = domain.first("cputune") {
        let read = |name: &str| {
            let text = processor.content_of(name);
            let text = text.filter(|text| !text.trim().starts_with('-'));
            let read = text.map(|text| number(&text, &format!("<{name}> in <cputune>")));
            quantity(read.transpose()?)
        };
        limits.cpu_shares = read("shares")?;
        // One that is negative is no limit.
        limits.cpu_quota = read("global_quota")?;
        limits.cpu_period = read("global_period")?.filter(|_| limits.cpu_quota.is_some());
    }
    config.cgroup = Some(limits).filter(|limits| *limits != CgroupConfig::default());
    Ok(())
}

/// In libvirt's XML, 0 is the same as nothing.
fn quantity(number: Option<i64>) -> Result<Option<Quantity>, Error> {
    let number = number.filter(|number| *number != 0);
    Ok(number.map(Quantity::try_from).transpose()?)
}

/// Writes the limits.
pub(crate) fn write(config: &MachineConfig) -> impl Iterator<Item = Element> {
    let limits = config.cgroup.unwrap_or_default();
    let mut memory = Element::new("memtune");
    for (name, limit) in [
        ("hard_limit", limits.memory_max),
        ("soft_limit", limits.memory_high),
    ] {
        if let Some(limit) = limit {
            let element = Element::new(name).attribute("unit", "KiB");
            memory.push(element.text(limit.get() / KIB));
        }
    }
    let mut processor = Element::new("cputune");
    for (name, limit) in [
        ("shares", limits.cpu_shares),
        ("global_period", limits.cpu_period),
        ("global_quota", limits.cpu_quota),
    ] {
        if let Some(limit) = limit {
            processor.push(Element::new(name).text(limit.get()));
        }
    }
    let elements = [memory, processor].into_iter();
    elements.filter(|element| !element.children.is_empty())
}
