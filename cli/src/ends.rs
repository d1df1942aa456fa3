//! What a machine that goes on from another uses of the host.

use anyhow::{Context, bail};
use bantam_vmm::config::{
    ChannelName, DeviceName, DiskConfig, GuestCid, MachineConfig, NetConfig, NetEnd, SerialConfig,
};

use crate::api::read_metadata;
use crate::args::EndArgs;

/// Something of the host that a device is to use, in place of what it used before.
#[derive(Clone, Debug)]
pub struct Replacement<T> {
    /// The device.
    pub device: DeviceName,
    /// What it is to use.
    pub value: T,
}

impl<T> Replacement<T> {
    /// Reads `NAME=VALUE`.
    pub fn parse(
        text: &str,
        value: impl FnOnce(&str) -> Result<T, String>,
    ) -> Result<Self, String> {
        let (name, rest) = text
            .split_once('=')
            .ok_or("it must be the name of a device, '=', and what it is to use")?;
        let device = name.parse().map_err(|error| format!("{error}"))?;
        let value = value(rest)?;
        Ok(Replacement { device, value })
    }
}

impl EndArgs {
    /// Gives devices the ends on the host that the command line names, and the guest other metadata.
    pub fn apply(&self, config: &mut MachineConfig) -> anyhow::Result<()> {
        for Replacement { device, value } in &self.disks {
            let names: Vec<_> = config.disk_names().collect();
            let disk = named(&mut config.disks, &names, device, "disk")?;
            disk.path = value.path.clone();
            disk.format = value.format;
        }
        for Replacement { device, value } in &self.nets {
            let names: Vec<_> = config.net_names().collect();
            let net = named(&mut config.nets, &names, device, "network device")?;
            match net.end() {
                NetEnd::Tap(_) | NetEnd::Descriptor(_) => net.fd = None,
                NetEnd::User | NetEnd::Host(_) => {
                    bail!("network device '{device}' is on a network, and takes no tap")
                }
                NetEnd::Passt(_) => {
                    bail!("network device '{device}' is on a network of passt, and takes no tap")
                }
            }
            net.tap = value.tap.clone();
            net.mac = value.mac.or(net.mac);
        }
        if self.vsock.is_some() || self.cid.is_some() {
            let vsock = config.vsock.as_mut();
            let vsock = vsock.context("the machine has no socket device")?;
            if let Some(socket) = &self.vsock {
                vsock.socket.clone_from(socket);
            }
            vsock.cid = self.cid.unwrap_or(vsock.cid);
        }
        if let Some(serial) = &self.serial {
            config.serial = serial.clone();
        }
        if let Some(console) = &self.console {
            if config.console == SerialConfig::None {
                bail!("the machine has no virtio console");
            }
            if *console == SerialConfig::None {
                bail!("the virtio console cannot be removed: lead it to a file or a socket");
            }
            config.console = console.clone();
        }
        for (name, end) in &self.channels {
            let mut channels = config.channels.iter_mut();
            let channel = channels.find(|channel| channel.name == *name);
            let channel =
                channel.with_context(|| format!("the machine has no channel '{name}'"))?;
            channel.end = end.clone();
        }
        if let Some(path) = &self.metadata {
            let metadata = config.metadata.as_mut();
            let metadata = metadata.context("the machine serves no metadata")?;
            metadata.contents = Some(read_metadata(path)?);
        }
        Ok(())
    }
}

/// Returns the device called `name`.
fn named<'a, T>(
    devices: &'a mut [T],
    names: &[DeviceName],
    name: &DeviceName,
    kind: &str,
) -> anyhow::Result<&'a mut T> {
    let place = names.iter().position(|it| it == name);
    let device = place.and_then(|place| devices.get_mut(place));
    device.with_context(|| {
        let names: Vec<_> = names.iter().map(DeviceName::as_str).collect();
        match names.is_empty() {
            true => format!("the machine has no {kind}"),
            false => format!(
                "the machine has no {kind} '{name}', but {}",
                names.join(", ")
            ),
        }
    })
}

/// Reads a disk's replacement: `NAME=PATH[,format=FORMAT]`.
pub fn disk(text: &str) -> Result<Replacement<DiskConfig>, String> {
    Replacement::parse(text, |text| {
        text.parse().map_err(|error| format!("{error}"))
    })
}

/// Reads where a channel leads: `NAME=END`.
pub fn channel(text: &str) -> Result<(ChannelName, SerialConfig), String> {
    let (name, end) = text
        .split_once('=')
        .ok_or("it must be the name of a channel, '=', and where it leads")?;
    let name = ChannelName::try_from(name.to_owned()).map_err(|error| error.to_string())?;
    match end.parse() {
        Ok(SerialConfig::None) => Err("a channel cannot lead nowhere".to_owned()),
        end => Ok((name, end.map_err(|error| error.to_string())?)),
    }
}

/// Reads a network device's replacement: `NAME=TAP[,mac=MAC]`.
pub fn net(text: &str) -> Result<Replacement<NetConfig>, String> {
    Replacement::parse(text, |text| {
        let net: NetConfig = format!("tap={text}")
            .parse()
            .map_err(|error| format!("{error}"))?;
        let expected = NetConfig {
            tap: net.tap.clone(),
            user: false,
            mac: net.mac,
            ..NetConfig::user()
        };
        match net == expected {
            true => Ok(net),
            false => Err("only the tap and its 'mac' can be others".to_owned()),
        }
    })
}

/// Reads a context identifier of a guest.
pub fn cid(text: &str) -> Result<GuestCid, String> {
    let number: i64 = text.parse().map_err(|_| "it is not a whole number")?;
    GuestCid::try_from(number).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_device_gets_another_tap_and_mac_address_only() {
        let replaced = net("lan=tap7,mac=02:00:00:00:00:07").unwrap();
        assert_eq!(replaced.device.as_str(), "lan");
        assert_eq!(replaced.value.tap.unwrap().as_str(), "tap7");
        let mac = replaced.value.mac.unwrap();
        assert_eq!(mac.to_string(), "02:00:00:00:00:07");
        assert_eq!(net("lan=tap7").unwrap().value.mac, None);
        for (text, reason) in [
            ("tap7", "it must be the name of a device"),
            ("lan=tap7,mtu=9000", "only the tap and its 'mac'"),
            ("lan=tap7,mac=7", "invalid MAC address"),
        ] {
            let error = net(text).unwrap_err();
            assert!(error.contains(reason), "{error}");
        }
    }

    #[test]
    fn a_guest_cannot_have_every_cid() {
        assert_eq!(cid("3").unwrap().get(), 3);
        for text in ["2", "4294967295", "x", ""] {
            cid(text).unwrap_err();
        }
    }
}
