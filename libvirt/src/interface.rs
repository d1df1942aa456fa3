//! Network devices.

use bantam_vmm::config::{
    HostNetwork, InterfaceName, Mtu, NetConfig, NetEnd, NetworkName, QueuePairs,
};

use crate::disk::{alias, user_alias};
use crate::error::Error;
use crate::values::number;
use crate::xml::Element;

/// Reads the network devices.
///
/// # Errors
/// If one is such that Bantam does not have it.
pub(crate) fn read_all(devices: &Element) -> Result<Vec<NetConfig>, Error> {
    let mut nets: Vec<NetConfig> = Vec::new();
    for (place, element) in devices.all("interface").enumerate() {
        let mut net = read(element, place)?;
        let alias = user_alias(element);
        if let Some(alias) = alias.filter(|alias| net.device_name(place).as_str() != *alias) {
            net.name = Some(alias.parse()?);
        }
        nets.push(net);
    }
    Ok(nets)
}

fn read(element: &Element, place: usize) -> Result<NetConfig, Error> {
    let label = match element.get_of("mac", "address") {
        Some(mac) => format!("interface '{mac}'"),
        None => format!("interface {}", place + 1),
    };
    let mut net = read_end(element, &label)?;
    match element.get_of("model", "type") {
        None | Some("virtio") => {}
        Some(model) => {
            return Err(Error::unsupported(
                format!("{label} of the model '{model}'"),
                "a guest finds virtio network devices only: write <model type='virtio'/> if it has that driver \
                 (virt-install --network ...,model=virtio)",
            ));
        }
    }
    if element.get_of("link", "state") == Some("down") {
        return Err(Error::unsupported(
            format!("{label} with a link that is down"),
            "remove the interface, or <link state='down'/>",
        ));
    }
    if let Some(mac) = element.get_of("mac", "address") {
        net.mac = Some(mac.parse()?);
    }
    if let Some(size) = element.get_of("mtu", "size") {
        net.mtu = Some(Mtu::try_from(number(
            size,
            &format!("the MTU of {label}"),
        )?)?);
    }
    if let Some(queues) = element.get_of("driver", "queues") {
        let queues = number(queues, &format!("the number of queues of {label}"))?;
        net.queues = Some(QueuePairs::try_from(queues)?);
    }
    Ok(net)
}

/// Reads what the device is connected to.
fn read_end(element: &Element, label: &str) -> Result<NetConfig, Error> {
    let mut net = NetConfig::user();
    let source = |attribute: &str| {
        let value = element.get_of("source", attribute);
        value.ok_or_else(|| Error::value(label, format!("has no <source {attribute}='...'/>")))
    };
    let interface = |name: &str| InterfaceName::try_from(name.to_owned());
    let kind = element.get("type").unwrap_or_default();
    net.user = kind == "user";
    match kind {
        "user" => {
            let children = ["ip", "route", "portForward"];
            if let Some(child) = children.into_iter().find(|it| element.first(it).is_some()) {
                return Err(Error::unsupported(
                    format!("<{child}> of {label}"),
                    "remove it, and give 'subnet' or 'forward' in the machine file (bantam edit)",
                ));
            }
        }
        "network" => match source("network")? {
            name if name == NetworkName::nat().as_str() => net.nat = true,
            name if name == NetworkName::host_only().as_str() => net.hostonly = true,
            name => {
                let name = name.parse::<NetworkName>();
                net.network = Some(name.map_err(|error| Error::value(label, error.to_string()))?);
            }
        },
        "bridge" => net.bridge = Some(interface(source("bridge")?)?),
        "direct" => {
            if let Some(mode) = element
                .get_of("source", "mode")
                .filter(|it| *it != "bridge")
            {
                return Err(Error::unsupported(
                    format!("{label} with the mode '{mode}'"),
                    "write <source dev='...' mode='bridge'/>",
                ));
            }
            net.macvtap = Some(interface(source("dev")?)?);
        }
        "ethernet" => {
            let tap = element.get_of("target", "dev");
            let tap = tap.ok_or_else(|| {
                Error::value(label, "has no <target dev='...'/>, which names the tap")
            })?;
            net.tap = Some(interface(tap)?);
        }
        _ => {
            return Err(Error::unsupported(
                format!("{label} of type '{kind}'"),
                "write network, bridge, direct, ethernet (a tap) or user",
            ));
        }
    }
    Ok(net)
}

/// Writes the network devices.
pub(crate) fn write_all(nets: &[NetConfig]) -> impl Iterator<Item = Element> {
    nets.iter().map(write)
}

fn write(net: &NetConfig) -> Element {
    let mut source = Element::new("source");
    let mut target = None;
    let kind = match net.end() {
        NetEnd::Host(HostNetwork::Network(name)) => {
            source = source.attribute("network", name);
            "network"
        }
        NetEnd::Host(HostNetwork::Bridge(name)) => {
            source = source.attribute("bridge", name);
            "bridge"
        }
        NetEnd::Host(HostNetwork::Beside(name)) => {
            source = source.attribute("dev", name).attribute("mode", "bridge");
            "direct"
        }
        NetEnd::Tap(tap) => {
            let made = Element::new("target").attribute("dev", tap);
            target = Some(made.attribute("managed", "no"));
            "ethernet"
        }
        // libvirt has nothing like the latter two; Bantam's own options say what it is.
        NetEnd::User | NetEnd::Passt(_) | NetEnd::Descriptor(_) => "user",
    };
    let mut element = Element::new("interface").attribute("type", kind);
    if let Some(mac) = net.mac {
        element.push(Element::new("mac").attribute("address", mac));
    }
    if !source.attributes.is_empty() {
        element.push(source);
    }
    element
        .children
        .extend(target.map(crate::xml::Node::Element));
    element.push(Element::new("model").attribute("type", "virtio"));
    if let Some(queues) = net.queues {
        element.push(Element::new("driver").attribute("queues", queues));
    }
    if let Some(mtu) = net.mtu {
        element.push(Element::new("mtu").attribute("size", mtu));
    }
    element.children.extend(
        net.name
            .as_ref()
            .and_then(alias)
            .map(crate::xml::Node::Element),
    );
    element
}

/// Writes the two networks that have words of their own by these words.
pub(crate) fn say_words(nets: &mut [NetConfig]) {
    for net in nets {
        let name = net.network.take();
        match name {
            Some(name) if name == NetworkName::nat() => net.nat = true,
            Some(name) if name == NetworkName::host_only() => net.hostonly = true,
            name => net.network = name,
        }
    }
}
