//! What a domain says of the machine apart from its devices: memory, vCPUs, kernel, identity, what ends it.

use bantam_manager::RestartPolicy;
use bantam_vmm::config::{
    HugePages, MachineConfig, MemorySize, OnReboot, SmbiosConfig, SmbiosText, VcpuCount,
};

use crate::error::Error;
use crate::values::{absolute, number, size};
use crate::xml::Element;

const KIB: u64 = 1 << 10;
const PAGE: u64 = 4 << 10;
const HUGE_PAGE: u64 = 2 << 20;

/// Checks that a domain is one for this hypervisor and processor.
pub(crate) fn check(domain: &Element) -> Result<(), Error> {
    match domain.get("type") {
        Some("kvm" | "qemu") => {}
        kind => {
            return Err(Error::unsupported(
                format!("a domain of type '{}'", kind.unwrap_or_default()),
                "write <domain type='kvm'>",
            ));
        }
    }
    let os = domain.first("os");
    let kind = os.and_then(|os| os.content_of("type"));
    if kind.as_deref().map(str::trim) != Some("hvm") {
        return Err(Error::unsupported(
            format!("an <os> of type '{}'", kind.unwrap_or_default()),
            "write <type arch='x86_64'>hvm</type>",
        ));
    }
    if let Some(os) = os {
        check_os(os)?;
    }
    check_cpu(domain.first("cpu"))?;
    check_clock(domain.first("clock"))
}

fn check_os(os: &Element) -> Result<(), Error> {
    let arch = os.get_of("type", "arch");
    if let Some(arch) = arch.filter(|arch| *arch != "x86_64") {
        return Err(Error::unsupported(
            format!("the architecture '{arch}'"),
            "guests are for x86_64",
        ));
    }
    if let Some(firmware) = os.get("firmware") {
        return Err(Error::unsupported(
            format!("<os firmware='{firmware}'>"),
            "remove it, and give the guest's kernel by <kernel>",
        ));
    }
    match os.get_of("smbios", "mode") {
        Some("host") => Err(Error::unsupported(
            "<smbios mode='host'>",
            "write <smbios mode='sysinfo'/> and <sysinfo type='smbios'>",
        )),
        _ => Ok(()),
    }
}

fn check_cpu(cpu: Option<&Element>) -> Result<(), Error> {
    let Some(cpu) = cpu else { return Ok(()) };
    let mode = cpu.get("mode");
    let is_named = cpu.content_of("model").is_some_and(|it| !it.is_empty());
    let is_host = matches!(mode, Some("host-passthrough" | "host-model" | "maximum"));
    if !is_host && (is_named || cpu.get("match").is_some()) {
        return Err(Error::unsupported(
            format!("<cpu mode='{}'>", mode.unwrap_or("custom")),
            "the guest has the processor of the host: write <cpu mode='host-passthrough'/>",
        ));
    }
    let is_change = |it: &&Element| !matches!(it.get("policy"), Some("require" | "optional"));
    if let Some(feature) = cpu.all("feature").find(is_change) {
        return Err(Error::unsupported(
            format!(
                "<feature policy='{}' name='{}'>",
                feature.get("policy").unwrap_or("force"),
                feature.get("name").unwrap_or_default()
            ),
            "remove it: the guest has the processor of the host",
        ));
    }
    Ok(())
}

fn check_clock(clock: Option<&Element>) -> Result<(), Error> {
    let Some(clock) = clock else { return Ok(()) };
    let has = |name: &str, values: &[&str]| clock.get(name).is_none_or(|it| values.contains(&it));
    let is_utc = has("offset", &["utc"])
        || (has("offset", &["variable"]) && has("adjustment", &["0", "reset"]));
    match is_utc && has("basis", &["utc"]) {
        true => Ok(()),
        false => Err(Error::unsupported(
            format!(
                "<clock offset='{}'>",
                clock.get("offset").unwrap_or_default()
            ),
            "the clock of the guest is in UTC: write <clock offset='utc'/>",
        )),
    }
}

/// Reads all but the devices and the kernel. Returns how many bytes of memory the guest is to give up.
///
/// # Errors
/// If a value is not one that the machine can have.
pub(crate) fn read(
    domain: &Element,
    config: &mut MachineConfig,
    notes: &mut Vec<String>,
) -> Result<u64, Error> {
    let given_up = read_memory(domain, config)?;
    read_vcpus(domain, config, notes)?;
    if domain
        .first("os")
        .and_then(|os| os.get_of("smbios", "mode"))
        == Some("sysinfo")
        && let Some(information) = domain.first("sysinfo")
    {
        config.smbios = Some(read_identity(domain, information, notes)?);
    }
    config.on_reboot = match end_of(domain, "on_reboot").as_deref() {
        None | Some("restart") => OnReboot::Restart,
        Some("destroy") => OnReboot::Exit,
        Some(action) => return Err(unsupported_end("on_reboot", action, "restart or destroy")),
    };
    Ok(given_up)
}

fn read_memory(domain: &Element, config: &mut MachineConfig) -> Result<u64, Error> {
    let read = |name: &str| {
        let what = format!("<{name}>");
        let element = domain.first(name);
        element.map(|it| size(&it.content(), it.get("unit"), &what))
    };
    let memory = read("memory").ok_or_else(|| Error::value("<memory>", "is missing"))??;
    let current = read("currentMemory").unwrap_or(Ok(memory))?;
    config.memory =
        MemorySize::from_bytes(memory.checked_next_multiple_of(PAGE).unwrap_or(memory))?;
    let pages = domain
        .first("memoryBacking")
        .and_then(|backing| backing.first("hugepages"));
    if let Some(pages) = pages {
        for page in pages.all("page") {
            let bytes = page.get("size").unwrap_or_default();
            if size(bytes, page.get("unit"), "the size of <page>")? != HUGE_PAGE {
                return Err(Error::unsupported(
                    format!("<page size='{bytes}'>"),
                    "huge pages have 2 MiB: write <page size='2048' unit='KiB'/>, or just <hugepages/>",
                ));
            }
        }
        config.huge_pages = HugePages::TwoMib;
    }
    Ok(memory.saturating_sub(current))
}

fn read_vcpus(
    domain: &Element,
    config: &mut MachineConfig,
    notes: &mut Vec<String>,
) -> Result<(), Error> {
    const WHAT: &str = "the number in <vcpu>";
    let vcpu = domain.first("vcpu");
    let maximum = match vcpu.map(Element::content) {
        Some(text) if !text.is_empty() => number(&text, WHAT)?,
        _ => 1,
    };
    let count = match vcpu.and_then(|vcpu| vcpu.get("current")) {
        Some(current) => number(current, WHAT)?,
        None => maximum,
    };
    if count != maximum {
        notes.push(format!(
            "the machine has {count} vCPUs, and not up to {maximum}: none is added while it runs"
        ));
    }
    config.cpus = VcpuCount::try_from(count)?;
    let Some(topology) = domain.first("cpu").and_then(|cpu| cpu.first("topology")) else {
        return Ok(());
    };
    let part = |name: &str| {
        let part = topology.get(name).unwrap_or("1");
        number(part, "a number in <topology>")
    };
    match part("threads")? {
        1 => {}
        2 => config.smt = true,
        threads => {
            return Err(Error::unsupported(
                format!("<topology threads='{threads}'>"),
                "a core has 1 or 2 threads",
            ));
        }
    }
    if part("sockets")? > 1 || part("dies")? > 1 {
        notes.push("<topology>: the guest finds all cores in one socket and die".to_owned());
    }
    Ok(())
}

/// The names of libvirt's entries, and the fields that they are.
fn fields(
    identity: &mut SmbiosConfig,
) -> [(&'static str, &'static str, &mut Option<SmbiosText>); 7] {
    [
        ("system", "manufacturer", &mut identity.manufacturer),
        ("system", "product", &mut identity.product),
        ("system", "version", &mut identity.version),
        ("system", "serial", &mut identity.serial),
        ("system", "sku", &mut identity.sku),
        ("system", "family", &mut identity.family),
        ("chassis", "asset", &mut identity.asset_tag),
    ]
}

fn read_identity(
    domain: &Element,
    information: &Element,
    notes: &mut Vec<String>,
) -> Result<SmbiosConfig, Error> {
    let mut identity = SmbiosConfig::default();
    for table in information.elements() {
        for entry in table.all("entry") {
            let name = entry.get("name").unwrap_or_default();
            let text = entry.content();
            let text = text.trim();
            let mut fields = fields(&mut identity).into_iter();
            let field = fields.find(|(kind, it, _)| *kind == table.name && *it == name);
            match field {
                Some((_, _, field)) => *field = Some(text.parse()?),
                None if table.name == "system" && name == "uuid" => {
                    let id = domain.content_of("uuid").unwrap_or_default();
                    if !id.trim().eq_ignore_ascii_case(text) {
                        return Err(Error::value(
                            "the uuid in <sysinfo>",
                            "is another than the <uuid> of the domain; write the same",
                        ));
                    }
                }
                None => notes.push(format!(
                    "entry '{name}' of <sysinfo/{}> is not kept: the guest does not find it",
                    table.name
                )),
            }
        }
    }
    Ok(identity)
}

fn end_of(domain: &Element, name: &str) -> Option<String> {
    let text = domain.content_of(name)?;
    Some(text.trim().to_owned())
}

fn unsupported_end(name: &str, action: &str, accepted: &str) -> Error {
    Error::unsupported(
        format!("<{name}>{action}</{name}>"),
        format!("write {accepted}"),
    )
}

/// Reads when the machine is started again by itself.
///
/// # Errors
/// If it is to be what Bantam does not do.
pub(crate) fn read_restart(domain: &Element) -> Result<RestartPolicy, Error> {
    let is_restart = |name: &str| match end_of(domain, name).as_deref() {
        None | Some("destroy") => Ok(false),
        Some("restart") => Ok(true),
        Some(action) => Err(unsupported_end(name, action, "destroy or restart")),
    };
    match (is_restart("on_poweroff")?, is_restart("on_crash")?) {
        (false, false) => Ok(RestartPolicy::Never),
        (false, true) => Ok(RestartPolicy::OnFailure),
        (true, true) => Ok(RestartPolicy::Always),
        (true, false) => Err(unsupported_end(
            "on_poweroff",
            "restart",
            "<on_crash>restart</on_crash> as well",
        )),
    }
}

/// Reads kernel, initial RAM disk and command line. Without a kernel there is none.
///
/// # Errors
/// If a path is relative.
pub(crate) fn read_boot(domain: &Element, config: &mut MachineConfig) -> Result<(), Error> {
    let Some(os) = domain.first("os") else {
        return Ok(());
    };
    let text = |name: &str| os.content_of(name).filter(|text| !text.is_empty());
    if let Some(kernel) = text("kernel") {
        config.kernel = absolute(&kernel, "<kernel>")?;
    }
    if let Some(initrd) = text("initrd") {
        config.initrd = Some(absolute(&initrd, "<initrd>")?);
    }
    config.cmdline = text("cmdline");
    Ok(())
}

/// Writes all but the devices, name and UUID, in the order of libvirt.
pub(crate) fn write(
    config: &MachineConfig,
    restart: RestartPolicy,
    original: Option<&Element>,
    domain: &mut Element,
) {
    let kib = |bytes: u64| bytes / KIB;
    let memory = config.memory.bytes();
    let given_up = config.balloon.map_or(0, |balloon| balloon.size.bytes());
    for (name, bytes) in [
        ("memory", memory),
        ("currentMemory", memory.saturating_sub(given_up)),
    ] {
        domain.push(Element::new(name).attribute("unit", "KiB").text(kib(bytes)));
    }
    if config.huge_pages == HugePages::TwoMib {
        let backing = Element::new("memoryBacking");
        domain.push(backing.child(Element::new("hugepages")));
    }
    let vcpus = config.cpus.get();
    let vcpu = Element::new("vcpu").attribute("placement", "static");
    domain.push(vcpu.text(vcpus));
    let mut os = Element::new("os");
    os.push(Element::new("type").attribute("arch", "x86_64").text("hvm"));
    let boot_file =
        |name: &str, path: &std::path::Path| Element::new(name).text(path.to_string_lossy());
    os.push(boot_file("kernel", &config.kernel));
    if let Some(initrd) = &config.initrd {
        os.push(boot_file("initrd", initrd));
    }
    if let Some(cmdline) = &config.cmdline {
        os.push(Element::new("cmdline").text(cmdline));
    }
    let identity = config.smbios.as_ref().and_then(write_identity);
    if let Some(identity) = identity {
        os.push(Element::new("smbios").attribute("mode", "sysinfo"));
        domain.push(identity);
    }
    domain.push(os);
    let has = |name: &str| original.is_some_and(|original| original.first(name).is_some());
    if !has("features") {
        let features = Element::new("features").child(Element::new("acpi"));
        domain.push(features.child(Element::new("apic")));
    }
    domain.push(write_cpu(config, original.and_then(|it| it.first("cpu"))));
    if !has("clock") {
        domain.push(Element::new("clock").attribute("offset", "utc"));
    }
    let action = |is_restart: bool| if is_restart { "restart" } else { "destroy" };
    for (name, is_restart) in [
        ("on_poweroff", restart == RestartPolicy::Always),
        ("on_reboot", config.on_reboot == OnReboot::Restart),
        ("on_crash", restart != RestartPolicy::Never),
    ] {
        domain.push(Element::new(name).text(action(is_restart)));
    }
}

/// Writes the processor. What `original` says of threads, cores and sockets stays if it is still so.
fn write_cpu(config: &MachineConfig, original: Option<&Element>) -> Element {
    let mut cpu = Element::new("cpu");
    // Without a mode, libvirt's guests have another processor.
    if original.is_none_or(|cpu| cpu.get("mode").is_none()) {
        cpu = cpu.attribute("mode", "host-passthrough");
    }
    let vcpus = i64::from(config.cpus.get());
    let part = |topology: &Element, name: &str| {
        let part = topology.get(name).unwrap_or("1");
        number(part, name).unwrap_or_default()
    };
    let said = original.and_then(|cpu| cpu.first("topology"));
    let said = said.filter(|topology| {
        let parts = ["sockets", "dies", "cores"].map(|name| part(topology, name));
        let threads = part(topology, "threads");
        let product = parts.into_iter().try_fold(threads, i64::checked_mul);
        product == Some(vcpus) && (threads == 2) == config.smt
    });
    match said {
        Some(topology) => cpu.push(topology.clone()),
        None if config.smt && vcpus > 1 => cpu.push(
            Element::new("topology")
                .attribute("sockets", 1)
                .attribute("dies", 1)
                .attribute("cores", vcpus / 2)
                .attribute("threads", 2),
        ),
        None => {}
    }
    cpu
}

fn write_identity(identity: &SmbiosConfig) -> Option<Element> {
    let mut tables = [Element::new("system"), Element::new("chassis")];
    for (kind, name, field) in fields(&mut identity.clone()) {
        if let Some(text) = field.take() {
            let entry = Element::new("entry").attribute("name", name);
            let table = tables.iter_mut().find(|table| table.name == kind);
            if let Some(table) = table {
                table.push(entry.text(String::from(text)));
            }
        }
    }
    let mut information = Element::new("sysinfo").attribute("type", "smbios");
    for table in tables.into_iter().filter(|it| !it.children.is_empty()) {
        information.push(table);
    }
    (!information.children.is_empty()).then_some(information)
}
